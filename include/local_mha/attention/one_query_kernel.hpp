// SPDX-License-Identifier: MIT
/// \file
/// The attention of a single query, as where a sequence comes position by position.
///
/// Lanes are keys: a block of keys or values is read as it lies, so that the query costs what it
/// reads. Scores of a key are one value, and the output is a Lanes for each channel, which is added
/// up at the end.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/score.hpp>
#include <local_mha/attention/softmax.hpp>
#include <local_mha/attention/strips.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/rotary.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// In the room of an AttentionKernel, of which it computes the same: with Arithmetic, the query and
/// the probabilities are rounded, and multiplied as what they have become.
template <typename Scalar, typename Arithmetic = Scalar>
class OneQueryKernel {
 public:
  using L = Lanes<Scalar>;
  static constexpr Index count = block_rows<Scalar>;

  /// \param scores of the keys that are taken at once, which are so many blocks
  /// \param turned, sums `[dim_head][count]`
  OneQueryKernel(Scalar* scores, Index blocks, Scalar* turned, Scalar* sums)
      : scores_(scores), most_blocks_(blocks), turned_(turned), sums_(sums) {}

  /// AttentionKernel::attend() of a tile with one query, whose lane of `out` it writes.
  /// \tparam Keys a Ring of any storage, which is read as it lies
  template <typename Keys>
  void attend(const Strips<Scalar, Keys, Keys>& strips, const Scalar* queries, Scalar* out,
              Scalar* lse) {
    const AttentionHead<Scalar>& head = strips.head;
    const Index channels = strips.strips->values->channels();
    std::fill_n(sums_, channels * count, Scalar(0));
    Softmax softmax(head.sink);
    bool any = false;
    for (const Strip<Scalar, Keys, Keys>& strip : strips) {
      const Index last = ceil_div(strip.tile->keys.end, count);
      for (Range blocks{strip.tile->keys.begin / count, 0}; blocks.begin < last;
           blocks.begin = blocks.end) {
        blocks.end = (std::min)(blocks.begin + most_blocks_, last);
        score(head, strip, blocks, queries);
        L maximum = (max)(softmax.maximum, L::broadcast(largest(blocks)));
        if constexpr (of_operands) maximum = ceil(maximum);
        const L rescale = softmax.rise(maximum);
        if (any) rescale_sums(channels, rescale);
        any = true;
        softmax.sum = softmax.sum + L::broadcast(exponentiate(blocks, softmax));
        add_values(*strip.tile, blocks, *strip.values);
      }
    }
    if (lse != nullptr) softmax.log_sum_exp(lse);
    const int lane = strips.strips->tile->queries.begin;
    store_sums(channels, softmax.weight(), out + lane);
  }

 private:
  static constexpr bool of_operands = !std::is_same_v<Arithmetic, Scalar>;
  using Tile = QueryTile<Scalar>;
  using Softmax = SoftmaxState<Scalar>;

  // scores[key] of whole blocks, −∞ where the query does not see a key.
  template <typename Keys>
  void score(const AttentionHead<Scalar>& head, const KeyStrip<Scalar, Keys>& strip,
             const Range& blocks, const Scalar* queries) {
    constexpr int together = std::clamp(Tiling<Scalar>::accumulators, 1, 4);
    const Tile& tile = *strip.tile;
    const Keys& keys = *strip.keys;
    const RotarySteps<Scalar>* const steps = strip.steps(head);
    const int lane = tile.queries.begin;
    if constexpr (of_operands) {
      if (steps == nullptr) {
        std::copy_n(queries, keys.channels() * count, turned_);
        queries = round(keys.channels(), lane, turned_);
      }
    }
    const Scalar* turned = queries + lane;
    const BiasRow<Scalar> bias =
        head.attn_bias != nullptr ? BiasRow<Scalar>(head, tile.first + lane) : BiasRow<Scalar>();
    auto cursor = keys.cursor(blocks.begin);
    Scalar* to = scores_;
    for (Index block = blocks.begin; block < blocks.end;) {
      Index until = blocks.end;
      if (steps != nullptr) {
        const auto group_of = [&](Index b) {
          return strip.block_in_sequence(b) * count / steps->group();
        };
        const Index group_of_keys = group_of(block);
        for (until = block + 1; until < blocks.end && group_of(until) == group_of_keys;) ++until;
        steps->turn_queries(queries, tile.first / steps->group() - group_of_keys, turned_);
        turned = round(keys.channels(), lane, turned_) + lane;
      }
      for (; block < until; block += together) {
        // Where there are fewer blocks, the last one is taken again, to no effect.
        const int fresh = static_cast<int>((std::min<Index>)(together, until - block));
        const typename Keys::Stored* x[together];
        for (int b = 0; b < together; ++b) {
          x[b] = cursor.block();
          if (b < fresh) cursor.advance();
          if (b >= fresh) x[b] = x[b - 1];
        }
        L acc[1][together];
        LOCAL_MHA_UNROLL for (int b = 0; b < together; ++b) acc[0][b] = L::zero();
        multiply(keys.channels(), turned, 0, count, x, acc);
        LOCAL_MHA_UNROLL for (int b = 0; b < together; ++b) {
          if (b < fresh) acc[0][b].store(to + b * count);
        }
        for (int b = 0; b < fresh; ++b, to += count)
          finish(head, tile, bias, block + b, strip.block_in_sequence(block + b) * count, to);
      }
      block = until;
    }
  }

  // Applies the head's function to the scores of a block of keys, adds the bias, and hides what the
  // query does not see.
  // \param first_row of the keys, in the sequence
  static void finish(const AttentionHead<Scalar>& head, const Tile& tile,
                     const BiasRow<Scalar>& bias, Index block, Index first_row, Scalar* scores) {
    const int lane = tile.queries.begin;
    const Index first = block * count;
    if (head.score) head.score.apply({head.index, tile.first + lane, first_row, true}, 1, scores);
    const bool has_bias = head.attn_bias != nullptr;
    const bool bias_at_once =
        has_bias && bias.keys().begin <= first_row && first_row + count <= bias.keys().end;
    const bool plain = tile.plain({first, first + count});
    if (plain && (!has_bias || bias_at_once)) {
      if (has_bias)
        fma(Scalar(log2_e), L::load_unaligned(bias.at(first_row)), L::load(scores)).store(scores);
      return;
    }
    for (Index r = 0; r < count; ++r) {
      const Index key = first + r;
      if (!tile.sees(lane, key))
        scores[r] = Scalar(-std::numeric_limits<double>::infinity());
      else if (tile.self_lane(key) == lane)
        scores[r] = binary_self_score<Scalar>();
      else if (has_bias)
        scores[r] = scores[r] + Scalar(log2_e) * bias.of(first_row + r);
    }
  }

  Scalar largest(const Range& blocks) const {
    L most = L::broadcast(Softmax::lowest());
    for (Index i = 0; i < blocks.end - blocks.begin; ++i)
      most = (max)(most, L::load(scores_ + i * count));
    alignas(64) Scalar lanes[count];
    most.store(lanes);
    return *std::max_element(lanes, lanes + count);
  }

  // Turns the scores into 2^(score − maximum). Returns their sum.
  Scalar exponentiate(const Range& blocks, const Softmax& softmax) {
    L sums = L::zero();
    for (Index i = 0; i < blocks.end - blocks.begin; ++i) {
      Scalar* scores = scores_ + i * count;
      L p = softmax.term(L::load(scores));
      p.store(scores);
      if constexpr (of_operands) {
        round_to_operands<Arithmetic>(count, scores);
        p = L::load(scores);
      }
      sums = sums + p;
    }
    return sum_of_lanes(sums);
  }

  // The query of a lane as it is multiplied.
  static const Scalar* round(Index channels, int lane, Scalar* queries) {
    if constexpr (of_operands)
      for (Index c = 0; c < channels; ++c) {
        Scalar& x = queries[c * count + lane];
        x = from_stored<Scalar>(to_operand<Arithmetic>(x));
      }
    return queries;
  }

  void rescale_sums(Index channels, const L& rescale) {
    alignas(64) Scalar factor[count];
    rescale.store(factor);
    scale_block(channels, factor[0], sums_);
  }

  // sums[channel] += Σ_key p[key]·v[key], lane by lane.
  template <typename Values>
  void add_values(const Tile& tile, const Range& blocks, const Values& values) {
    Scalar* const sums = sums_;
    const Scalar* scores = scores_;
    auto cursor = values.cursor(blocks.begin);
    constexpr Index together = 4;
    for (Index block = blocks.begin; block < blocks.end;) {
      bool finite = block + together <= blocks.end;
      for (Index b = block; finite && b < block + together; ++b) finite = values.finite(b);
      const Index some = finite ? together : 1;
      if (finite)
        add_values<together>(values.channels(), scores, cursor, sums);
      else if (values.finite(block))
        add_values<1>(values.channels(), scores, cursor, sums);
      else
        add_seen_values(tile, block, values, scores, cursor, sums);
      block += some;
      scores += some * count;
    }
  }

  // out[channel] = weight·Σ_lane sums[channel][lane]
  void store_sums(Index channels, const L& weight, Scalar* out) const {
    const Scalar* const sums = sums_;
    alignas(64) Scalar weights[count];
    weight.store(weights);
    const Scalar factor = weights[0];
    alignas(64) Scalar rows[count * L::folded];
    alignas(64) Scalar lanes[count];
    Index c = 0;
    for (; c + count <= channels; c += count) {
      for (Index i = 0; i < count; ++i) L::load(sums + (c + i) * count).fold(rows + i * L::folded);
      L::sum_folded(rows, lanes);
      for (Index i = 0; i < count; ++i) out[(c + i) * count] = factor * lanes[i];
    }
    for (; c < channels; ++c) out[c * count] = factor * sum_of_lanes(L::load(sums + c * count));
  }

  // sums[channel] += Σ_block p[block]·v[block][channel], lane by lane.
  template <int Blocks, typename Cursor>
  static void add_values(Index channels, const Scalar* scores, Cursor& cursor, Scalar* sums) {
    L p[Blocks];
    decltype(cursor.block()) v[Blocks];
    for (int b = 0; b < Blocks; ++b, cursor.advance()) {
      p[b] = L::load(scores + b * count);
      v[b] = cursor.block();
    }
    LOCAL_MHA_UNROLL_4 for (Index c = 0; c < channels * count; c += count) {
      L sum = L::load(sums + c);
      LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) sum =
          fma(p[b], load_stored<L>(v[b] + c), sum);
      sum.store(sums + c);
    }
  }

  // The same of one block with a NaN or an infinity, which 0 does not cancel: leaves out what is
  // not seen.
  template <typename Values>
  static void add_seen_values(const Tile& tile, Index block, const Values& values,
                              const Scalar* scores, typename Values::Cursor& cursor, Scalar* sums) {
    alignas(64) Scalar unseen[count];
    for (Index r = 0; r < count; ++r)
      unseen[r] = Scalar(tile.sees(tile.queries.begin, block * count + r) ? 0 : -1);
    const L p = L::load(scores);
    for (Index c = 0; c < values.channels() * count; c += count) {
      const L v = select_negative(L::load(unseen), L::zero(), load_stored<L>(cursor.block() + c));
      fma(p, v, L::load(sums + c)).store(sums + c);
    }
    cursor.advance();
  }

  Scalar* scores_;
  Index most_blocks_;
  Scalar* turned_;
  Scalar* sums_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail

LOCAL_MHA_INT_BOUNDS_END
