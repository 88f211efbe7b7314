// SPDX-License-Identifier: MIT
/// \file
/// The attention kernel: one block of queries against the keys that its window shows.
///
///     s_ij = softmax_scale · q_i·k_j + attn_bias,   p_ij = exp(s_ij − m_i) / Σ_j exp(s_ij − m_i)
///     out_i = Σ_j p_ij · v_j,   lse_i = m_i + log Σ_j exp(s_ij − m_i)
///
/// Lanes are queries: the scores of a key are one Lanes, `[key][query]`, so that the softmax is
/// vertical and keys and values are read as they lie, one value broadcast at a time. The scores of
/// up to `chunk_keys` keys are kept; longer windows go on with the softmax online: maximum, sum and
/// output so far are rescaled.
///
/// Keys come in strips: what the window shows, and rows that are pinned before and after it. The
/// parts that may be exchanged are visibility.hpp (who sees a key), score.hpp (what a score is),
/// softmax.hpp, and where keys and values lie (Ring, Rows). A single query takes another way
/// through them, one_query_kernel.hpp.
///
/// A key that a query does not see contributes exactly nothing, whatever its key and value hold.
#pragma once

#include <algorithm>
#include <iterator>
#include <limits>
#include <optional>
#include <type_traits>

#include <local_mha/attention/block_scores.hpp>
#include <local_mha/attention/head.hpp>
#include <local_mha/attention/one_query_kernel.hpp>
#include <local_mha/attention/probabilities.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/softmax.hpp>
#include <local_mha/attention/strips.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/attention/weighted_operands.hpp>
#include <local_mha/attention/weighted_values.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/core/window.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Buffers for one block of queries, and the computation in them.
/// \tparam Arithmetic what queries, keys, probabilities and values are multiplied as, see
///         can_multiply
template <typename Scalar, typename Arithmetic = Scalar>
class AttentionKernel {
 public:
  /// What is computed at a time.
  using L = Lanes<Scalar>;
  /// Positions of a block.
  static constexpr Index count = block_rows<Scalar>;
  /// Keys whose scores are kept at once.
  static constexpr Index chunk_keys = 1024;
  /// Whether products are of operands.
  static constexpr bool of_operands = !std::is_same_v<Arithmetic, Scalar>;
  /// Where the keys of a block of queries lie.
  using BlockKeys = detail::BlockKeys<Scalar, Arithmetic>;

  AttentionKernel() = default;
  /// Allocates what a block of queries needs.
  /// \param longest_range keys that a block of queries sees at most
  AttentionKernel(Index dim_head, Index longest_range)
      : scores_(
            make_block_buffer<Scalar>(((std::min)(longest_range, chunk_keys) + 2 * count) * count)),
        sums_(make_block_buffer<Scalar>(dim_head * count)),
        block_scores_(dim_head) {
    if (of_operands) probabilities_ = detail::make_operand_buffer(std::ssize(scores_) / 2);
  }

  /// Memory that attend() fetches while it computes.
  Upcoming<Scalar>& upcoming() { return upcoming_; }

  /// Attends from the block of queries whose first row is `first`.
  /// \param queries `[dim_head][block_rows]`, scaled by softmax_scale·log2(e), turned by their
  /// place
  /// \param keys the blocks that the queries see
  /// \param values the same: a Ring, or Rows
  /// \param out `[padded channels of the values][block_rows]`; 0 where a query sees no key, in
  ///        lanes that are no queries, and in channels that fill up
  /// \param lse null, or `[2][block_rows]`: logarithms of the softmax' denominator, −∞ for no key
  ///        and in lanes that are no queries; and what they round off
  template <typename Values>
  void attend(const AttentionHead<Scalar>& head, Index first, const Scalar* queries,
              const Ring<Scalar>& keys, const Values& values, Scalar* out, Scalar* lse = nullptr) {
    attend(head, first, queries, KeyStore<Scalar, Values>{&keys, &values}, {}, out, lse);
  }

  /// The same with rows that are pinned.
  /// \tparam Query Scalar, or detail::Pair: queries that no step of the rotary embedding turns, as
  ///         operands
  /// \param queries as above, or `[pairs_of(dim_head)][block_rows]`
  /// \param window the blocks that the window shows
  ///        If they are a Ring in 16 bits, there is a single query, which drops nothing
  /// \param pinned those of `head.pinned`, one after the other, if there are any
  template <typename Query, typename Values, typename Keys>
  void attend(const AttentionHead<Scalar>& head, Index first, const Query* queries,
              const KeyStore<Scalar, Values, Keys>& window,
              const std::type_identity_t<KeyStore<Scalar, Values, Keys>>& pinned, Scalar* out,
              Scalar* lse = nullptr) {
    const Tile tile(head, first);
    detail::Strips<Scalar, Values, Keys> strips(head, tile, window);
    std::optional<Tile> before, after;
    if (head.pinned != nullptr) {
      strips.add(before.emplace(Tile::before_window(head, first)), pinned, *head.pinned);
      strips.add(after.emplace(Tile::after_window(head, first)), pinned, *head.pinned);
    }
    const Index channels = window.values->channels();
    bool done = false;
    if constexpr (std::is_same_v<Values, Keys> && std::is_same_v<Query, Scalar>) {
      // Lanes are keys, so that a single query costs what it reads.
      done = tile.single() && head.dropout == nullptr && channels <= window.keys->channels();
      if (done)
        detail::OneQueryKernel<Scalar, Arithmetic>(scores_.data(), std::ssize(scores_) / count,
                                                   block_scores_.turned(), sums_.data())
            .attend(strips, queries, out, lse);
    }
    if constexpr (std::is_same_v<Keys, BlockKeys>) {
      if (!done) {
        Softmax softmax(head.sink);
        attend_block(strips, queries, softmax, true, true, out, lse);
      }
    }
    if (!done) clear_other_lanes(channels, tile.queries, out);
    clear_rest(tile, channels, out, lse);
  }

  /// Attends to all of some keys, which are part of what the queries see.
  /// \param softmax, out those of the parts before; `SoftmaxState(head.sink)` and anything at first
  /// \param begins, ends this is the first part, and the last one
  template <typename Values>
  void attend_part(const AttentionHead<Scalar>& head, Index first, const Scalar* queries,
                   const Range& keys, const KeyStore<Scalar, Values, BlockKeys>& store,
                   SoftmaxState<Scalar>& softmax, bool begins, bool ends, Scalar* out,
                   Scalar* lse) {
    const Tile tile = Tile::all_of(head, first, keys);
    attend_block(Strips<Values>(head, tile, store), queries, softmax, begins, ends, out,
                 ends ? lse : nullptr);
    if (!ends) return;
    clear_other_lanes(store.values->channels(), tile.queries, out);
    clear_rest(tile, store.values->channels(), out, lse);
  }

 private:
  using Tile = QueryTile<Scalar>;
  using Softmax = SoftmaxState<Scalar>;
  using KeyStrip = detail::KeyStrip<Scalar, BlockKeys>;
  using KeyPiece = detail::KeyPiece<Scalar, BlockKeys>;
  template <typename Values>
  using Strip = detail::Strip<Scalar, Values, BlockKeys>;
  template <typename Values>
  using Strips = detail::Strips<Scalar, Values, BlockKeys>;
  template <typename Values>
  using Chunk = detail::Chunk<Scalar, Values, BlockKeys>;
  static constexpr Index group = Tiling<Scalar>::rows;
  // `begins`: there is no out yet; `ends`: it is divided by the sum.
  template <typename Values, typename Query>
  void attend_block(const Strips<Values>& strips, const Query* queries, Softmax& softmax,
                    bool begins, bool ends, Scalar* out, Scalar* lse) {
    const AttentionHead<Scalar>& head = strips.head;
    const Index channels = strips.strips->values->channels();
#if defined(LOCAL_MHA_AMX)
    std::optional<detail::MatrixUnit> unit;
    if (of_operands && detail::has_matrix_unit()) unit.emplace();
#endif
    Index fetches = 0;
    for (const Strip<Values>& strip : strips)
      fetches += fetches_of(strip.tile->keys.end - strip.tile->keys.begin, channels);
    upcoming_.spread_over(fetches);
    const Strip<Values>* strip = strips.begin();
    Index next = first_of(*strip);
    do {
      const Chunk<Values> chunk = take_chunk(strips, strip, next);
      L maximum = softmax.maximum;
      for (const auto& piece : chunk)
        maximum = block_scores_.make(head, piece, queries, maximum, upcoming_);
      // So that the scale of the probabilities, which are rounded, is a power of two, and what they
      // become does not depend on how keys are taken together.
      if constexpr (of_operands) maximum = ceil(maximum);
      const L rescale = softmax.rise(maximum);
      const bool last = ends && strip == strips.end();
      const auto factor = [&] { return last ? softmax.weight() : L::broadcast(Scalar(1)); };
      const L* const so_far = begins ? nullptr : &rescale;
#if defined(LOCAL_MHA_AMX)
      if constexpr (of_operands) {
        if (unit && head.dropout == nullptr) {
          const auto make = [&](const KeyPiece& piece, Index block) {
            detail::make_operands<true>(piece, {block, block + 1}, softmax, upcoming_);
          };
          detail::add_values_seen(chunk, channels, out, [&]<bool Finite>() {
            detail::add_weighted_values_by_matrix_unit<Finite>(chunk, channels, so_far, make,
                                                               factor, out);
          });
          begins = false;
          continue;
        }
      }
#endif
      for (const auto& piece : chunk) detail::exponentiate(head, piece, softmax, upcoming_);
      detail::add_weighted_values(chunk, channels, so_far, factor(), upcoming_, out);
      begins = false;
    } while (strip != strips.end());
    if (lse != nullptr) softmax.log_sum_exp(lse);
  }

  static Index first_of(const KeyStrip& strip) { return strip.tile->keys.begin / group * group; }

  // As many keys as have room, from `next` of `strip` on, which move on.
  template <typename Values>
  Chunk<Values> take_chunk(const Strips<Values>& strips, const Strip<Values>*& strip, Index& next) {
    Chunk<Values> chunk;
    [[maybe_unused]] detail::Pair* pairs = probabilities_.data();
    for (Index taken = 0; strip != strips.end() && taken < chunk_keys;) {
      const Index end =
          (std::min)(next / count * count + (chunk_keys - taken), strip->tile->keys.end);
      const auto& piece = chunk.pieces[chunk.number++] = {
          {strip, {next, end}, scores_.data() + taken * count, pairs}, strip->values};
      if constexpr (of_operands) pairs = piece.pairs_of_block(piece.blocks().end);
      taken += ceil_div(end, count) * count - next / count * count;
      next = end;
      if (end < strip->tile->keys.end) break;
      if (++strip != strips.end()) next = first_of(*strip);
    }
    return chunk;
  }

  // Whoever reads whole blocks relies on it.
  static void clear_rest(const Tile& tile, Index channels, Scalar* out, Scalar* lse) {
    std::fill(out + channels * count, out + padded_channels<Scalar>(channels) * count, Scalar(0));
    if (lse == nullptr || tile.whole()) return;
    const L nothing = L::broadcast(Scalar(-std::numeric_limits<double>::infinity()));
    select_lanes(tile.queries.begin, tile.queries.end, L::load(lse), nothing).store(lse);
    clear_other_lanes(1, tile.queries, lse + count);
  }

  // How often what is upcoming is fetched, at least: once in a micro-kernel, or, by the matrix
  // unit, with two probabilities.
  static Index fetches_of(Index keys, Index dim_value) {
    if (detail::by_matrix_unit<Scalar, Arithmetic>()) return keys / 2;
    return keys / Tiling<Scalar>::keys +
           keys / count * ceil_div(dim_value, Index{Tiling<Scalar>::values});
  }

  BlockBuffer<Scalar> scores_;
  BlockBuffer<Scalar> sums_;
  BlockBuffer<detail::Pair> probabilities_;  // as operands
  detail::BlockScores<Scalar, Arithmetic> block_scores_;
  Upcoming<Scalar> upcoming_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
