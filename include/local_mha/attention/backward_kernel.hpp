// SPDX-License-Identifier: MIT
/// \file
/// The attention's backward kernel: what one block of queries gives to the gradients.
///
/// With g the gradient of the output and `delta_i = Σ_c g_ic · out_ic`,
///
///     p_ij = exp(s_ij − lse_i)                          dv_j += p_ij · g_i
///     ds_ij = p_ij · (g_i·v_j − delta_i)                dk_j += softmax_scale · ds_ij · q_i
///     d attn_bias += ds_ij                              dq_i += softmax_scale · ds_ij · k_j
///
/// where a function of the scores multiplies ds_ij by its derivative before dk and dq take it
/// (T. Dao et al., "FlashAttention", 2022). The probabilities come from the log-sum-exp that the
/// forward pass kept, so that nothing of the size of the scores is stored: two products make P and
/// dS of a segment of keys, `[key][query]` as in the forward kernel, and three more use them up.
/// With dropout, `p_ij` in dv and `g_i·v_j` in ds are multiplied by the pair's factor.
///
/// A query's gradient is held over the whole segment. Those of keys and values are added in place,
/// query block by query block in the order of the sequence, which fixes the order of every sum.
///
/// A pair that is not seen contributes exactly nothing, whatever its rows hold.
#pragma once

#include <algorithm>
#include <optional>

#include <local_mha/attention/backward_strip.hpp>
#include <local_mha/attention/gradient_sums.hpp>
#include <local_mha/attention/head.hpp>
#include <local_mha/attention/score_gradients.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/ops/rotary.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Buffers for one block of queries, and the computation in them.
/// \tparam Arithmetic as of AttentionKernel
template <typename Scalar, typename Arithmetic = Scalar>
class AttentionBackwardKernel {
 public:
  using L = Lanes<Scalar>;
  static constexpr Index count = block_rows<Scalar>;
  /// Keys whose probabilities are kept at once.
  static constexpr Index segment_keys = 1024;
  /// Keys, values, and buffers for their gradients.
  using Store = detail::GradientRings<Scalar, Arithmetic>;

  AttentionBackwardKernel() = default;
  /// \param longest_range keys that a block of queries sees at most
  /// \param changes_scores heads have a function of the scores
  AttentionBackwardKernel(Index dim_head, Index dim_value, Index longest_range, bool changes_scores)
      : scores_(dim_head, dim_value, (std::min)(longest_range, segment_keys) + 2 * count,
                changes_scores),
        turned_(room(dim_head)),
        grad_turned_(room(padded_channels<Scalar>(dim_head))),
        sums_(dim_head, dim_value, (std::min)(longest_range, segment_keys) + 2 * count) {}

  /// Memory that differentiate() fetches while it computes.
  Upcoming<Scalar>& upcoming() { return upcoming_; }

  /// \param window the blocks that the window shows
  /// \param pinned those of `head.pinned`, one after the other, if there are any
  /// \param grad_bias null, or `[w, (1 + lb + lf)·w]` to be added to
  void differentiate(const AttentionHead<Scalar>& head, const QueryGradients<Scalar>& block,
                     Store& window, Store& pinned, LongSum<Scalar>* grad_bias) {
    std::fill(block.grad_queries,
              block.grad_queries + padded_channels<Scalar>(window.keys().channels()) * count,
              Scalar(0));
    take_queries(head, block, window);
    take({Tile(head, block.first), window, nullptr}, head, block, grad_bias);
    if (head.pinned == nullptr) return;
    const Index* const blocks = head.pinned->blocks().data();
    take({Tile::before_window(head, block.first), pinned, blocks}, head, block, grad_bias);
    take({Tile::after_window(head, block.first), pinned, blocks}, head, block, grad_bias);
  }

  /// The same of all of some keys, which are part of what the queries see: their gradients are
  /// added to.
  void differentiate_part(const AttentionHead<Scalar>& head, const QueryGradients<Scalar>& block,
                          const Range& keys, Store& store, LongSum<Scalar>* grad_bias) {
    take_queries(head, block, store);
    take({Tile::all_of(head, block.first, keys), store, nullptr}, head, block, grad_bias);
  }

 private:
  using Tile = QueryTile<Scalar>;
  using Strip = detail::BackwardStrip<Scalar, Arithmetic>;
  static constexpr Index group = detail::ScoreGradients<Scalar, Arithmetic>::group;

  static BlockBuffer<Scalar> room(Index lanes) { return make_block_buffer<Scalar>(lanes * count); }

  void take_queries(const AttentionHead<Scalar>& head, const QueryGradients<Scalar>& block,
                    const Store& store) {
    scores_.take_queries(block);
    sums_.take_grad_out(block.grad_out);
    if (head.steps == nullptr) sums_.take_queries(block.queries);
    finite_queries_ =
        detail::all_finite_operands<Arithmetic>(block.queries, store.keys().channels() * count) &&
        local_mha::all_finite(block.grad_out, store.values().channels() * count);
  }

  void take(const Strip& strip, const AttentionHead<Scalar>& head,
            const QueryGradients<Scalar>& block, LongSum<Scalar>* grad_bias) {
    if (strip.tile.keys.begin >= strip.tile.keys.end) return;
    const RotarySteps<Scalar>* const steps = strip.steps(head);
    const Tile& tile = strip.tile;
    const bool finite = finite_queries_ && all_finite(strip.store, tile.keys);
#if defined(LOCAL_MHA_AMX)
    std::optional<detail::MatrixUnit> unit;
    if (detail::by_matrix_unit<Scalar, Arithmetic>()) unit.emplace();
#endif
    upcoming_.spread_over(2 * (tile.keys.end - tile.keys.begin) / group +
                          sums_.micro_kernels(tile.keys.end - tile.keys.begin));
    LaneRange cursor{0, 0};
    for (Range segment{tile.keys.begin / group * group, 0}; segment.begin < tile.keys.end;
         segment.begin = segment.end) {
      segment.end = (std::min)(segment_end(steps, strip, segment.begin), tile.keys.end);
      const Scalar* queries = block.queries;
      Index groups_back = 0;
      if (steps != nullptr) {
        groups_back = block.first / steps->group() - strip.row(segment.begin) / steps->group();
        steps->turn_queries(queries, groups_back, turned_.data());
        queries = turned_.data();
        sums_.take_queries(queries);
      }
      scores_.make(head, strip, segment, block, queries, cursor, upcoming_);
      if (head.dropout != nullptr) scores_.drop(head, strip, segment, block);
      if (grad_bias != nullptr) scores_.add_to_bias(head, strip, segment, grad_bias);
      if (head.score) scores_.multiply_by_derivatives(segment);
      Scalar* grad_queries = block.grad_queries;
      if (steps != nullptr) {
        std::fill(grad_turned_.begin(), grad_turned_.end(), Scalar(0));
        grad_queries = grad_turned_.data();
      }
      sums_.take_scores(scores_, segment);
      if (finite) {
        sums_.add_to_keys(strip, segment, upcoming_);
        sums_.add_to_queries(strip, segment, upcoming_, grad_queries);
      } else {
        sums_.add_seen(strip, segment, grad_queries);
      }
      if (steps != nullptr)
        steps->turn_gradients_back(grad_queries, groups_back, block.grad_queries);
    }
  }

  // Segments end where the queries must be turned anew.
  static Index segment_end(const RotarySteps<Scalar>* steps, const Strip& strip, Index begin) {
    const Index end = begin / count * count + segment_keys;
    if (steps == nullptr) return end;
    const Index length = steps->group();
    if (strip.blocks == nullptr) return (std::min)(end, (begin / length + 1) * length);
    Index block = begin / count + 1;
    while (block * count < (std::min)(end, strip.tile.keys.end) &&
           strip.row(block * count) / length == strip.row(begin) / length)
      ++block;
    return block * count;
  }

  static bool all_finite(const Store& store, const Range& seen) {
    for (Index b = seen.begin / count; b * count < seen.end; ++b)
      if (!store.finite(b)) return false;
    return true;
  }

  detail::ScoreGradients<Scalar, Arithmetic> scores_;
  BlockBuffer<Scalar> turned_;       // [channel][query]
  BlockBuffer<Scalar> grad_turned_;  // [channel][query]
  detail::GradientSums<Scalar, Arithmetic> sums_;
  bool finite_queries_ = false;
  Upcoming<Scalar> upcoming_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
