// SPDX-License-Identifier: MIT
/// \file
/// The attention kernel for windows of a few keys.
///
/// Where a query sees few more keys than a block has queries, most of what AttentionKernel computes
/// for a block is hidden again. Here each query meets its own keys only, and lanes are channels:
/// products of channels, `[place][query][channel]`, are summed over the channels by transposing
/// them; the softmax is vertical again, `[place][query]`, the place of a key being counted from the
/// first one that its query sees.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/softmax.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/lanes.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/project.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Buffers for one block of queries, and the computation in them.
template <typename Scalar>
class NarrowKernel {
 public:
  using L = Lanes<Scalar>;
  static constexpr Index count = block_rows<Scalar>;
  /// Channels that are computed at a time: 64 bytes, however many positions a block has.
  using C = Lanes<Scalar, LOCAL_MHA_LANE_BYTES / 64>;
  /// Keys that a query sees at most.
  static constexpr Index most_keys = 2 * C::count;

  NarrowKernel()
      : products_(make_block_buffer<Scalar>(most_keys * count * C::folded)),
        scores_(make_block_buffer<Scalar>(most_keys * count)) {}

  /// True if heads of these sizes can be attended here. AttentionKernel is for all others.
  static bool fits(const AttentionHead<Scalar>& head, Index dim_head, Index dim_value) {
    const bool plain = head.steps == nullptr && head.masked == nullptr && head.pinned == nullptr &&
                       !head.score && head.attn_bias == nullptr && head.dropout == nullptr &&
                       !head.shared_qk;
    // Summing over the channels costs as much for few of them as for many.
    const Index most = most_keys * (std::min<Index>)(dim_head, 64) / 64;
    return plain && L::vectorized && dim_head % C::count == 0 && dim_value % C::count == 0 &&
           head.window->reach_behind() + head.window->reach_ahead() < most;
  }

  /// Attends from the block of queries whose first row is `first`.
  /// \param q, k `[seqlen][dim_head]`
  /// \param scale of the scores, times log2(e)
  /// \param v, out `[seqlen][dim_value]`; 0 where a query sees no key
  /// \param lse null, or `[2][block_rows]`: logarithms of the softmax' denominator, −∞ for no key,
  ///        and what they round off
  void attend(const AttentionHead<Scalar>& head, Index first, Index dim_head, Index dim_value,
              Scalar scale, const Scalar* q, const Scalar* k, const Scalar* v, Scalar* out,
              Scalar* lse = nullptr) {
    look(head, first);
    for (Index r = 0; r < rows_; ++r)
      multiply_channels(r, dim_head, scale, q + (first + r) * dim_head, k);
    sum_channels();
    softmax(head.sink, lse);
    for (Index r = 0; r < rows_; ++r) weight_values(r, dim_value, v, out + (first + r) * dim_value);
  }

 private:
  // Lanes of channels that are in registers at once.
  static constexpr int most_pieces =
      std::clamp(Tiling<Scalar>::accumulators * (LOCAL_MHA_LANE_BYTES / 64), 1, 4);

  // Which keys the queries see.
  void look(const AttentionHead<Scalar>& head, Index first) {
    rows_ = (std::min)(count, head.seqlen - first);
    const Range seen = head.window->keys(first);
    places_ = seen.end - seen.begin;
    even_ = rows_ == count && head.window->slides() && seen.begin >= head.unmasked.begin &&
            seen.end + count <= head.unmasked.end;
    if (even_) {
      for (Index r = 0; r < count; ++r) seen_[r] = {seen.begin + r, seen.end + r};
      return;
    }
    places_ = 0;
    for (Index r = 0; r < rows_; ++r) {
      seen_[r] = head.window->keys(first + r).clipped_to(head.unmasked);
      places_ = (std::max)(places_, length(r));
    }
  }

  Index length(Index r) const { return seen_[r].end - seen_[r].begin; }
  Scalar* products(Index place, Index r) {
    return products_.data() + (place * count + r) * C::folded;
  }

  // Calls `f(c, pieces)`, `pieces` a constant, for pieces of Lanes that make up the channels.
  template <typename F>
  static LOCAL_MHA_INLINE void for_pieces(Index channels, F&& f) {
    Index c = 0;
    for (; c + most_pieces * C::count <= channels; c += most_pieces * C::count)
      f(c, std::integral_constant<int, most_pieces>());
    for (; c < channels; c += C::count) f(c, std::integral_constant<int, 1>());
  }

  // products = (scale·q[c])·k[c], summed over pieces of channels, and in a piece as far as
  // registers do that for nothing.
  void multiply_channels(Index r, Index dim_head, Scalar scale, const Scalar* q, const Scalar* k) {
    const Index places = length(r);
    for_pieces(dim_head, [&](Index c, auto pieces) {
      constexpr int n = pieces;
      C query[n];
      LOCAL_MHA_UNROLL for (int p = 0; p < n; ++p) query[p] =
          scale * C::load_unaligned(q + c + p * C::count);
      const Scalar* key = k + seen_[r].begin * dim_head + c;
      Scalar* to = products(0, r);
      for (Index place = 0; place < places; ++place, key += dim_head, to += count * C::folded) {
        C product = query[0] * C::load_unaligned(key);
        LOCAL_MHA_UNROLL for (int p = 1; p < n; ++p) product =
            fma(query[p], C::load_unaligned(key + p * C::count), product);
        if (c == 0)
          product.fold(to);
        else
          product.add_folded(to);
      }
    });
  }

  void sum_channels() {
    for (Index place = 0; place < places_; ++place) {
      Scalar* scores = scores_.data() + place * count;
      for (Index r = 0; r < count; r += C::count) C::sum_folded(products(place, r), scores + r);
      if (even_) continue;
      for (Index r = 0; r < count; ++r)
        if (r >= rows_ || place >= length(r))
          scores[r] = Scalar(-std::numeric_limits<double>::infinity());
    }
  }

  void softmax(const Scalar& sink, Scalar* lse) {
    Scalar* scores = scores_.data();
    SoftmaxState<Scalar> softmax(sink);
    L maximum = softmax.maximum;
    for (Index place = 0; place < places_; ++place)
      maximum = (max)(maximum, L::load(scores + place * count));
    softmax.rise(maximum);
    for (Index place = 0; place < places_; ++place) {
      const L p = softmax.term(L::load(scores + place * count));
      softmax.sum = softmax.sum + p;
      p.store(scores + place * count);
    }
    if (lse != nullptr) softmax.log_sum_exp(lse);
    const L weight = softmax.weight();
    for (Index place = 0; place < places_; ++place)
      (weight * L::load(scores + place * count)).store(scores + place * count);
  }

  // out = Σ_key weight[key]·v[key]
  void weight_values(Index r, Index dim_value, const Scalar* v, Scalar* out) {
    const Index places = length(r);
    for_pieces(dim_value, [&](Index c, auto pieces) {
      constexpr int n = pieces;
      C sum[n];
      LOCAL_MHA_UNROLL for (int p = 0; p < n; ++p) sum[p] = C::zero();
      const Scalar* value = v + seen_[r].begin * dim_value + c;
      const Scalar* weight = scores_.data() + r;
      for (Index place = 0; place < places; ++place, value += dim_value, weight += count) {
        LOCAL_MHA_UNROLL for (int p = 0; p < n; ++p) sum[p] =
            fma(*weight, C::load_unaligned(value + p * C::count), sum[p]);
      }
      LOCAL_MHA_UNROLL for (int p = 0; p < n; ++p) sum[p].store_unaligned(out + c + p * C::count);
    });
  }

  BlockBuffer<Scalar> products_;  // [place][query][folded]
  BlockBuffer<Scalar> scores_;    // [place][query], then the weights
  Range seen_[count];
  Index rows_ = 0;
  Index places_ = 0;
  // Every query sees `places_` keys.
  bool even_ = false;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
