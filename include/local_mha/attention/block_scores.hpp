// SPDX-License-Identifier: MIT
/// \file
/// The attention's first product: scores of a block of queries with the keys that it sees.
///
///     s_ij = score(softmax_scale · q_i·k_j) + attn_bias, in units of log 2
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <optional>
#include <type_traits>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/key_products.hpp>
#include <local_mha/attention/score.hpp>
#include <local_mha/attention/softmax.hpp>
#include <local_mha/attention/strips.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/ops/multiply.hpp>
#include <local_mha/ops/rotary.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Makes them, and holds the buffers for that.
/// \tparam Arithmetic as of AttentionKernel
template <typename Scalar, typename Arithmetic = Scalar>
class BlockScores {
  using L = Lanes<Scalar>;
  using Tile = QueryTile<Scalar>;
  using Keys = BlockKeys<Scalar, Arithmetic>;
  using Piece = KeyPiece<Scalar, Keys>;

 public:
  BlockScores() = default;
  explicit BlockScores(Index dim_head)
      : turned_(make_block_buffer<Scalar>(dim_head * count)),
        bias_(make_block_buffer<Scalar>(count * count)),
        operands_(dim_head) {}

  /// Buffers for queries, `[dim_head][block_rows]`.
  Scalar* turned() { return turned_.data(); }

  /// `scores[key][query]` of a piece, −∞ where a query does not see a key. Operands are multiplied
  /// by the matrix unit, if there is one: the caller's.
  /// \tparam Query as of AttentionKernel::attend()
  /// \param maximum so far
  /// \param upcoming is fetched meanwhile, if there is no matrix unit
  /// \return the maximum then
  template <typename Query>
  L make(const AttentionHead<Scalar>& head, const Piece& piece, const Query* queries, L maximum,
         Upcoming<Scalar>& upcoming) {
    const Tile& tile = piece.tile();
    const auto& strip = *piece.strip;
    const Keys& keys = *strip.keys;
    const Range& chunk = piece.keys;
    const auto* turned = operands_.of(queries);
    Index groups_back = (std::numeric_limits<Index>::min)();
    LaneRange cursor_of_lanes{0, 0};
    std::optional<BiasRows<Scalar>> bias_rows;
    if (head.attn_bias != nullptr) bias_rows.emplace(head, tile);
    const RotarySteps<Scalar>* const steps =
        std::is_same_v<Query, Scalar> ? strip.steps(head) : nullptr;
    // From the queries to a block of keys, in groups of the steps.
    const auto groups_back_to = [&](Index block) {
      return tile.first / steps->group() - strip.block_in_sequence(block) * count / steps->group();
    };
    const bool plain_scores = !head.score;
    auto cursor = keys.cursor(chunk.begin / count);
#if defined(LOCAL_MHA_AMX)
    Index multiplied = chunk.begin / count;  // the piece's blocks before it have their products
    const Index blocks_end = ceil_div(chunk.end, count);
    auto ahead = cursor;
    const auto turned_for = [&](Index block) {
      return steps == nullptr || groups_back_to(block) == groups_back;
    };
#endif
    for (Index begin = chunk.begin; begin < chunk.end; cursor.advance()) {
      const Index end = (std::min)((begin / count + 1) * count, chunk.end);
      const Index first_key = strip.block_in_sequence(begin / count) * count;
      if constexpr (std::is_same_v<Query, Scalar>) {
        if (steps != nullptr) {
          const Index back = groups_back_to(begin / count);
          if (back != groups_back) {
            groups_back = back;
            steps->turn_queries(queries, back, turned_.data());
            turned = operands_.of(turned_.data());
          }
        }
      }
      if (bias_rows) bias_rows->gather(first_key, bias_.data());
      const Index block_end = begin / count * count + count;
#if defined(LOCAL_MHA_AMX)
      if constexpr (of_operands) {
        if (has_matrix_unit()) {
          // With those of the next block, which are made while the maximum of this one's is found.
          while (multiplied < blocks_end && multiplied <= begin / count + 1 &&
                 turned_for(multiplied)) {
            multiply_keys_by_matrix_unit(ahead.block(), keys.tiles(), turned,
                                         piece.score(multiplied * count));
            ahead.advance();
            ++multiplied;
          }
          const Index offset = begin % count;
          const Scalar* bias = bias_rows ? bias_.data() + offset * count : nullptr;
          const Range scored{begin, block_end};
          // What is hidden is not part of the maximum.
          const bool counts = plain_scores && (bias != nullptr || tile.plain(scored));
          maximum = finish(head, piece, scored, first_key + offset, bias,
                           counts ? add_bias(block_end - begin, bias, piece.score(begin)) : maximum,
                           cursor_of_lanes, maximum);
          begin = end;
          continue;
        }
      }
#endif
      for (Index key = begin; key < end;) {
        const auto* from = cursor.block() + key % count * keys.position_stride();
        const Scalar* bias = bias_rows ? bias_.data() + key % count * count : nullptr;
        // A function of the scores comes before the bias.
        const Scalar* bias_at_once = plain_scores ? bias : nullptr;
        Scalar* to = piece.score(key);
        const int lane = tile.half_that_sees({key, key + half_keys});
        if (half_keys > 0 && lane >= 0 &&
            Tiling<Scalar>::template is_next<half_keys>(block_end - key)) {
          score_keys<(std::max)(1, half_keys), 2>(
              keys, from, turned + lane, bias_at_once ? bias_at_once + lane : nullptr, to + lane);
          if (!plain_scores) change(head, tile, first_key + key % count, half_keys, bias, to);
          maximum = hide(tile, {key, key + half_keys}, to, cursor_of_lanes, maximum);
          key += half_keys;
          continue;
        }
        upcoming.fetch();
        const bool many = Tiling<Scalar>::template is_next<most>(block_end - key);
        const L largest = many ? score_keys<most>(keys, from, turned, bias_at_once, to)
                               : score_keys<group>(keys, from, turned, bias_at_once, to);
        const Range scored{key, key + (many ? most : group)};
        maximum = finish(head, piece, scored, first_key + key % count, bias, largest,
                         cursor_of_lanes, maximum);
        key = scored.end;
      }
      begin = end;
    }
    return maximum;
  }

 private:
  static constexpr Index count = block_rows<Scalar>;
  static constexpr Index group = Tiling<Scalar>::rows;
  static constexpr bool of_operands = !std::is_same_v<Arithmetic, Scalar>;
  static constexpr int half_keys = of_operands ? 0 : Tiling<Scalar>::half_keys;
  // Keys of a micro-kernel: those of operands have half as many multiply-adds.
  static constexpr int most =
      of_operands && L::packets == 1 && Tiling<Scalar>::keys >= 8 ? 16 : Tiling<Scalar>::keys;

  // Applies the head's function to scores of adjoining keys, whose maximum is `largest` without it,
  // and hides what is not seen. Returns the maximum so far.
  static LOCAL_MHA_INLINE L finish(const AttentionHead<Scalar>& head, const Piece& piece,
                                   const Range& scored, Index first_key, const Scalar* bias,
                                   L largest, LaneRange& cursor, L maximum) {
    const Tile& tile = piece.tile();
    Scalar* const scores = piece.score(scored.begin);
    if (head.score)
      largest = change(head, tile, first_key, scored.end - scored.begin, bias, scores);
    return tile.plain(scored) ? (max)(maximum, largest)
                              : hide(tile, scored, scores, cursor, maximum);
  }

  // Applies the head's function to scores, and adds the bias. Returns their maximum.
  static LOCAL_MHA_NOINLINE L change(const AttentionHead<Scalar>& head, const Tile& tile,
                                     Index first_key, Index number, const Scalar* bias,
                                     Scalar* scores) {
    const L largest = head.score.apply({head.index, tile.first, first_key}, number, scores);
    return bias == nullptr ? largest : add_bias(number, bias, scores);
  }

  // Adds the bias, if there is one, to scores. Returns their maximum.
  static L add_bias(Index number, const Scalar* bias, Scalar* scores) {
    L largest = L::broadcast(SoftmaxState<Scalar>::lowest());
    for (Index i = 0; i < number; ++i, scores += count) {
      L score = L::load(scores);
      if (bias != nullptr) {
        score = fma(Scalar(log2_e), L::load(bias + i * count), score);
        score.store(scores);
      }
      largest = (max)(largest, score);
    }
    return largest;
  }

  // scores[key][query] of keys of one block, for as many queries as the lanes hold. Returns their
  // maximum.
  template <int Number, int Parts = 1, typename Operand>
  static LOCAL_MHA_NOINLINE Lanes<Scalar, Parts> score_keys(const Keys& keys, const Operand* from,
                                                            const Operand* queries,
                                                            const Scalar* bias, Scalar* to) {
    using P = Lanes<Scalar, Parts>;
    P acc[Number][1];
    LOCAL_MHA_UNROLL for (int r = 0; r < Number; ++r) acc[r][0] = P::zero();
    multiply_keys(keys, from, queries, acc);
    if (bias != nullptr) {
      LOCAL_MHA_UNROLL for (int r = 0; r < Number; ++r) acc[r][0] =
          fma(Scalar(log2_e), P::load(bias + r * count), acc[r][0]);
    }
    LOCAL_MHA_UNROLL for (int r = 0; r < Number; ++r) acc[r][0].store(to + r * count);
    P largest = acc[0][0];
    LOCAL_MHA_UNROLL for (int r = 1; r < Number; ++r) largest = (max)(largest, acc[r][0]);
    return largest;
  }

  // Puts −∞ where a query does not see a key, and the self score where it is its own.
  // Returns the maximum so far.
  // `cursor` starts as {0, 0} and is kept for the keys that follow.
  static LOCAL_MHA_INLINE L hide(const Tile& tile, const Range& keys, Scalar* scores,
                                 LaneRange& cursor, L maximum) {
    const L nothing = L::broadcast(Scalar(-std::numeric_limits<double>::infinity()));
    for (Index key = keys.begin; key < keys.end; ++key, scores += count) {
      L score = L::load(scores);
      const int self = tile.self_lane(key);
      if (self >= 0)
        score = select_lanes(self, self + 1, L::broadcast(binary_self_score<Scalar>()), score);
      const LaneRange lanes = tile.that_see(key, cursor);
      score = select_lanes(lanes.begin, lanes.end, score, nothing);
      score.store(scores);
      maximum = (max)(maximum, score);
    }
    return maximum;
  }

  BlockBuffer<Scalar> turned_;
  BlockBuffer<Scalar> bias_;
  BlockOperands<Scalar, Arithmetic> operands_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail

LOCAL_MHA_INT_BOUNDS_END
