// SPDX-License-Identifier: MIT
/// \file
/// The first half of the attention's backward kernel: the probabilities P and the gradients dS of
/// the scores of a segment of keys, see backward_kernel.hpp.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>

#include <local_mha/attention/backward_strip.hpp>
#include <local_mha/attention/head.hpp>
#include <local_mha/attention/key_products.hpp>
#include <local_mha/attention/log_sum_exp.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/score.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/exp2.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/project.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Buffers for one segment, `[key][query]`, and the computation in them.
/// \tparam Arithmetic as of AttentionKernel
template <typename Scalar, typename Arithmetic = Scalar>
class ScoreGradients {
 public:
  using L = Lanes<Scalar>;
  using Strip = BackwardStrip<Scalar, Arithmetic>;
  static constexpr Index count = block_rows<Scalar>;
  /// Keys that one micro-kernel takes, all of one block.
  static constexpr Index group =
      count % Tiling<Scalar>::values == 0 ? Tiling<Scalar>::values : Tiling<Scalar>::rows;

  ScoreGradients() = default;
  /// \param keys of a segment, from the first to the last block
  /// \param changes_scores heads have a function of the scores
  ScoreGradients(Index dim_head, Index dim_value, Index keys, bool changes_scores)
      : queries_(dim_head),
        grad_out_(dim_value),
        probabilities_(make_block_buffer<Scalar>(keys * count)),
        gradients_(make_block_buffer<Scalar>(keys * count)),
        derivatives_(make_block_buffer<Scalar>(changes_scores ? keys * count : 0)),
        bias_(make_block_buffer<Scalar>(count * count)) {}

  /// P and dS of a key.
  Scalar* probabilities(const Range& segment, Index key) {
    return row_of(probabilities_, segment, key);
  }
  Scalar* gradients(const Range& segment, Index key) { return row_of(gradients_, segment, key); }

  /// The segments that follow are of this block of queries.
  void take_queries(const QueryGradients<Scalar>& block) { g_ = grad_out_.of(block.grad_out); }

  /// Makes P and dS of a segment; with dropout, P and g·v. Operands are multiplied by the matrix
  /// unit, if there is one: the caller's.
  /// \param queries as they are turned to the segment
  /// \param cursor `{0, 0}` at first, then that of an earlier segment
  /// \param upcoming is fetched meanwhile
  void make(const AttentionHead<Scalar>& head, const Strip& strip, const Range& segment,
            const QueryGradients<Scalar>& block, const Scalar* queries, LaneRange& cursor,
            Upcoming<Scalar>& upcoming) {
    const Tile& tile = strip.tile;
    const auto& keys = strip.store.keys();
    const auto& values = strip.store.values();
    const auto* q = queries_.of(queries);
    const Denominator denominator(block.lse);
    std::optional<BiasRows<Scalar>> bias_rows;
    if (head.attn_bias != nullptr) bias_rows.emplace(head, tile);
    auto key_cursor = keys.cursor(segment.begin / count);
    auto value_cursor = values.cursor(segment.begin / count);
    const bool multiplied = by_matrix_unit<Scalar, Arithmetic>();
#if defined(LOCAL_MHA_AMX)
    auto next_keys = key_cursor;
    auto next_values = value_cursor;
    Index next = segment.begin / count * count;
#endif
    for (Index begin = segment.begin; begin < segment.end;
         key_cursor.advance(), value_cursor.advance()) {
      const Index end = (std::min)((begin / count + 1) * count, segment.end);
      const Index first_key = strip.block_in_sequence(begin / count) * count;
      if (bias_rows) bias_rows->gather(first_key, bias_.data());
#if defined(LOCAL_MHA_AMX)
      if constexpr (of_operands) {
        // With those of the next block, which are made while this one's become gradients.
        for (; multiplied && next < (std::min)(begin / count * count + 2 * count, segment.end);
             next += count, next_keys.advance(), next_values.advance()) {
          multiply_keys_by_matrix_unit(next_keys.block(), keys.tiles(), q,
                                       probabilities(segment, next));
          multiply_keys_by_matrix_unit(next_values.block(), values.tiles(), g_,
                                       gradients(segment, next));
        }
      }
#endif
      for (Index key = begin; key < end; key += group) {
        Scalar* p = probabilities(segment, key);
        Scalar* ds = gradients(segment, key);
        Scalar* derivatives = head.score ? row_of(derivatives_, segment, key) : nullptr;
        const Scalar* const bias =
            head.attn_bias != nullptr ? bias_.data() + key % count * count : nullptr;
        const auto change_scores = [&](L(&scores)[group][1]) {
          if (derivatives != nullptr)
            change(head, tile, first_key + key % count, p, derivatives, scores);
        };
        const auto* const k = key_cursor.block() + key % count * keys.position_stride();
        const auto* const v = value_cursor.block() + key % count * values.position_stride();
        const bool drops = head.dropout != nullptr;
        const int lane =
            derivatives == nullptr && may_halve ? tile.half_that_sees({key, key + group}) : -1;
        upcoming.fetch();
        if (may_halve && lane >= 0) {
          make_probabilities<2>(keys, k, q + lane, false, lane, bias, denominator, [](auto&) {}, p);
          upcoming.fetch();
          make_gradients<2>(values, v, g_ + lane, false, block, lane, drops, p, ds);
        } else {
          make_probabilities<1>(keys, k, q, multiplied, 0, bias, denominator, change_scores, p);
          upcoming.fetch();
          make_gradients<1>(values, v, g_, multiplied, block, 0, drops, p, ds);
        }
        // The products that follow sum over all lanes.
        if (!tile.whole() || !tile.plain({key, key + group}))
          hide(tile, key, denominator, p, ds, derivatives, cursor);
      }
      begin = end;
    }
  }

  /// From P and g·v to what is left of P, and dS.
  void drop(const AttentionHead<Scalar>& head, const Strip& strip, const Range& segment,
            const QueryGradients<Scalar>& block) {
    const Tile& tile = strip.tile;
    constexpr Index together = Dropout<Scalar>::together;
    const Range keys{segment.begin,
                     segment.begin + ceil_div(segment.end - segment.begin, group) * group};
    const L delta = L::load(block.delta);
    L factors[together];
    for (Index octet = keys.begin / together; octet * together < keys.end; ++octet) {
      head.dropout->factors(tile.first, strip.row(octet * together) / together, factors);
      for (Index i = 0; i < together; ++i) {
        const Index key = octet * together + i;
        if (!keys.contains(key)) continue;
        Scalar* p = probabilities(segment, key);
        Scalar* ds = gradients(segment, key);
        const L probability = L::load(p);
        const L grad = probability * (factors[i] * L::load(ds) - delta);
        // What is not seen has p = 0, but delta may be no number there.
        L seen = select_negative(L::zero() - probability, grad, Scalar(0) * probability);
        const int self = tile.self_lane(key);
        if (self >= 0) seen = select_lanes(self, self + 1, L::zero(), seen);
        seen.store(ds);
        (probability * factors[i]).store(p);
      }
    }
  }

  /// \param grad_bias `[w, (1 + lb + lf)·w]`, is added to
  void add_to_bias(const AttentionHead<Scalar>& head, const Strip& strip, const Range& segment,
                   LongSum<Scalar>* grad_bias) {
    using Sum = LongSum<Scalar>;
    const Tile& tile = strip.tile;
    const Index cols = head.window->look_around();
    for (Index r = tile.queries.begin; r < tile.queries.end; ++r) {
      const Index query = tile.first + r;
      Sum* row = grad_bias + head.window->place_in_bucket(query) * cols;
      const Index first = head.window->look_around_begin(query);
      Range keys = tile.seen[r].clipped_to(segment);
      if (strip.blocks == nullptr) keys = keys.clipped_to({first, first + cols});
      if (keys.begin >= keys.end) continue;
      const Scalar* ds = gradients(segment, keys.begin) + r;
      if (strip.blocks == nullptr) {
        row += keys.begin - first;
        for (Index i = 0; i < keys.end - keys.begin; ++i) row[i] += Sum(ds[i * count]);
        continue;
      }
      for (Index key = keys.begin; key < keys.end; ++key, ds += count) {
        const Index column = strip.row(key) - first;
        if (Range{0, cols}.contains(column)) row[column] += Sum(*ds);
      }
    }
  }

  /// From the gradients of what the head's function makes of scores to theirs.
  void multiply_by_derivatives(const Range& segment) {
    const Scalar* derivatives = row_of(derivatives_, segment, segment.begin);
    Scalar* ds = gradients(segment, segment.begin);
    const Index keys = ceil_div(segment.end - segment.begin, group) * group;
    for (Index i = 0; i < keys * count; i += count)
      (L::load(derivatives + i) * L::load(ds + i)).store(ds + i);
  }

 private:
  using Tile = QueryTile<Scalar>;
  static constexpr bool of_operands = !std::is_same_v<Arithmetic, Scalar>;
  static constexpr bool may_halve = !of_operands && Tiling<Scalar>::half_keys > 0;

  // Log-sum-exp in units of log 2.
  class Denominator {
   public:
    explicit Denominator(const Scalar* lse) {
      for (Index r = 0; r < count; ++r) {
        const auto parts = binary_log_sum_exp<Scalar>({lse[r], lse[count + r]});
        whole_[r] = parts.nearest;
        rest_[r] = parts.rest;
      }
    }

    /// \param lane of which the first of the scores is
    template <int Parts>
    LOCAL_MHA_INLINE Lanes<Scalar, Parts> probability(const Lanes<Scalar, Parts>& score,
                                                      int lane = 0) const {
      using P = Lanes<Scalar, Parts>;
      return exp2((score - P::load(whole_ + lane)) - P::load(rest_ + lane));
    }

   private:
    alignas(64) Scalar whole_[count];
    alignas(64) Scalar rest_[count];
  };

  // P of a group of keys, for all lanes or for half of them from `lane` on.
  // \param multiplied the product is in `p`
  // \param change of the scores in registers
  template <int Parts, typename Keys, typename Operand, typename Change>
  static LOCAL_MHA_INLINE void make_probabilities(const Keys& keys, const Operand* k,
                                                  const Operand* queries, bool multiplied, int lane,
                                                  const Scalar* bias,
                                                  const Denominator& denominator, Change&& change,
                                                  Scalar* p) {
    using P = Lanes<Scalar, Parts>;
    P acc[group][1];
    multiply(keys, k, queries, multiplied, p + lane, acc);
    change(acc);
    if (bias != nullptr) {
      LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) acc[r][0] =
          fma(Scalar(log2_e), P::load(bias + r * count + lane), acc[r][0]);
    }
    // Sums that started at −lse would round at its size.
    LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) denominator.probability(acc[r][0], lane)
        .store(p + r * count + lane);
  }

  // dS of P; g·v if some are dropped.
  template <int Parts, typename Values, typename Operand>
  static LOCAL_MHA_INLINE void make_gradients(const Values& values, const Operand* v,
                                              const Operand* grad_out, bool multiplied,
                                              const QueryGradients<Scalar>& block, int lane,
                                              bool drops, const Scalar* p, Scalar* ds) {
    using P = Lanes<Scalar, Parts>;
    P acc[group][1];
    multiply(values, v, grad_out, multiplied, ds + lane, acc);
    if (!drops) {
      const P delta = P::load(block.delta + lane);
      LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) acc[r][0] =
          P::load(p + r * count + lane) * (acc[r][0] - delta);
    }
    LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) acc[r][0].store(ds + r * count + lane);
  }

  // The product of a group of keys, or of values, with a block of rows.
  // \param multiplied it is in `made`
  template <typename Keys, typename Operand, int Parts>
  static LOCAL_MHA_INLINE void multiply(const Keys& keys, const Operand* from, const Operand* rows,
                                        bool multiplied, const Scalar* made,
                                        Lanes<Scalar, Parts> (&product)[group][1]) {
    using P = Lanes<Scalar, Parts>;
    if (of_operands && multiplied) {
      LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) product[r][0] = P::load(made + r * count);
      return;
    }
    LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) product[r][0] = P::zero();
    multiply_keys(keys, from, rows, product);
  }

  static Scalar* row_of(BlockBuffer<Scalar>& rows, const Range& segment, Index key) {
    return rows.data() + (key - segment.begin / count * count) * count;
  }

  // Applies the head's function to scores in registers, and keeps its derivatives.
  static void change(const AttentionHead<Scalar>& head, const Tile& tile, Index first_key,
                     Scalar* room, Scalar* derivatives, L (&scores)[group][1]) {
    LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) scores[r][0].store(room + r * count);
    head.score.apply({head.index, tile.first, first_key}, group, room, derivatives);
    LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) scores[r][0] = L::load(room + r * count);
  }

  // Puts 0 where a query does not see a key of the group, and in lanes that are no queries. Where a
  // query attends itself for want of anything else (shared_qk), its score is a constant. `cursor`
  // starts as {0, 0} and is kept for the keys that follow.
  // \param derivatives null: none
  static void hide(const Tile& tile, Index first_key, const Denominator& denominator, Scalar* p,
                   Scalar* ds, Scalar* derivatives, LaneRange& cursor) {
    for (Index i = 0; i < group; ++i, p += count, ds += count) {
      const LaneRange lanes = tile.that_see(first_key + i, cursor);
      const auto keep = [&](const L& values, Scalar* to) {
        select_lanes(lanes.begin, lanes.end, values, L::zero()).store(to);
      };
      L probability = L::load(p);
      L grad = L::load(ds);
      const int self = tile.self_lane(first_key + i);
      if (self >= 0) {
        const L constant = denominator.probability(L::broadcast(binary_self_score<Scalar>()));
        probability = select_lanes(self, self + 1, constant, probability);
        grad = select_lanes(self, self + 1, L::zero(), grad);
      }
      keep(probability, p);
      keep(grad, ds);
      if (derivatives != nullptr) keep(L::load(derivatives + i * count), derivatives + i * count);
    }
  }

  BlockOperands<Scalar, Arithmetic> queries_;
  BlockOperands<Scalar, Arithmetic> grad_out_;
  // The gradient of the output of the block of queries.
  decltype(grad_out_.of(static_cast<const Scalar*>(nullptr))) g_ = nullptr;
  BlockBuffer<Scalar> probabilities_;
  BlockBuffer<Scalar> gradients_;
  BlockBuffer<Scalar> derivatives_;  // of the head's function of scores
  BlockBuffer<Scalar> bias_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail

LOCAL_MHA_INT_BOUNDS_END
