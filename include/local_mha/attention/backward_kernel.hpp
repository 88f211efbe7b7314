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
#include <cstddef>

#include <local_mha/attention/backward_strip.hpp>
#include <local_mha/attention/head.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/score_gradients.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/attention/weighted_values.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/rotary.hpp>
#include <local_mha/ops/weight_gradient.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Room for one block of queries, and the computation in it.
template <typename Scalar>
class AttentionBackwardKernel {
 public:
  using L = Lanes<Scalar>;
  static constexpr Index count = block_rows<Scalar>;
  /// Keys whose probabilities are kept at once.
  static constexpr Index segment_keys = 1024;

  AttentionBackwardKernel() = default;
  /// \param longest_range keys that a block of queries sees at most
  /// \param changes_scores heads have a function of the scores
  AttentionBackwardKernel(Index dim_head, Index dim_value, Index longest_range, bool changes_scores)
      : scores_((std::min)(longest_range, segment_keys) + 2 * count, changes_scores),
        turned_(room(dim_head)),
        grad_turned_(room(padded_channels<Scalar>(dim_head))),
        query_panels_(room(panel_channels<Scalar>(dim_head))),
        grad_out_panels_(room(panel_channels<Scalar>(dim_value))) {}

  /// Memory that differentiate() fetches while it computes.
  Upcoming<Scalar>& upcoming() { return upcoming_; }

  /// \param window the blocks that the window shows
  /// \param pinned those of `head.pinned`, one after the other, if there are any
  /// \param grad_bias null, or `[w, (1 + lb + lf)·w]` to be added to
  void differentiate(const AttentionHead<Scalar>& head, const QueryGradients<Scalar>& block,
                     const GradientStore<Scalar>& window, const GradientStore<Scalar>& pinned,
                     LongSum<Scalar>* grad_bias) {
    std::fill(block.grad_queries,
              block.grad_queries + padded_channels<Scalar>(window.keys->channels()) * count,
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
                          const Range& keys, const GradientStore<Scalar>& store,
                          LongSum<Scalar>* grad_bias) {
    take_queries(head, block, store);
    take({Tile::all_of(head, block.first, keys), store, nullptr}, head, block, grad_bias);
  }

 private:
  using Tile = QueryTile<Scalar>;
  using Strip = detail::BackwardStrip<Scalar>;
  static constexpr Index group = detail::ScoreGradients<Scalar>::group;

  // The register tile of the products that are added in place: keys × panels of channels.
  static constexpr int panels = Tiling<Scalar>::accumulators >= 16 ? 4 : 2;
  static constexpr int panel_keys = Tiling<Scalar>::registers / L::packets >= 16 ? 4 : 2;
  static_assert(count % group == 0 && group % panel_keys == 0);

  static BlockBuffer<Scalar> room(Index lanes) { return make_block_buffer<Scalar>(lanes * count); }

  void take_queries(const AttentionHead<Scalar>& head, const QueryGradients<Scalar>& block,
                    const GradientStore<Scalar>& store) {
    const Index dim_head = store.keys->channels();
    const Index dim_value = store.values->channels();
    block_to_panels(dim_value, block.grad_out, grad_out_panels_.data());
    if (head.steps == nullptr) block_to_panels(dim_head, block.queries, query_panels_.data());
    finite_queries_ = local_mha::all_finite(block.queries, dim_head * count) &&
                      local_mha::all_finite(block.grad_out, dim_value * count);
  }

  void take(const Strip& strip, const AttentionHead<Scalar>& head,
            const QueryGradients<Scalar>& block, LongSum<Scalar>* grad_bias) {
    if (strip.tile.keys.begin >= strip.tile.keys.end) return;
    const RotarySteps<Scalar>* const steps = strip.steps(head);
    const Tile& tile = strip.tile;
    const Ring<Scalar>& keys = *strip.store.keys;
    const Ring<Scalar>& values = *strip.store.values;
    const bool finite = finite_queries_ && all_finite(keys, values, tile.keys);
    upcoming_.spread_over(
        micro_kernels(tile.keys.end - tile.keys.begin, keys.channels(), values.channels()));
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
        block_to_panels(keys.channels(), queries, query_panels_.data());
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
      if (finite) {
        add_to_keys(tile, segment, *strip.store.grad_keys, *strip.store.grad_values);
        add_to_queries(tile, segment, keys, grad_queries);
      } else {
        add_seen(tile, segment, strip.store, grad_queries);
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

  static bool all_finite(const Ring<Scalar>& keys, const Ring<Scalar>& values, const Range& seen) {
    for (Index b = seen.begin / count; b * count < seen.end; ++b)
      if (!keys.finite(b) || !values.finite(b)) return false;
    return true;
  }

  // dv += Pᵀ·g and dk += dSᵀ·q, for the lanes that see a key: lanes without a query do not.
  void add_to_keys(const Tile& tile, const Range& segment, Ring<Scalar>& grad_keys,
                   Ring<Scalar>& grad_values) {
    LaneRange cursor{0, 0};
    for (Index begin = segment.begin; begin < segment.end;) {
      const Index end = (std::min)((begin / count + 1) * count, segment.end);
      Scalar* to_keys = grad_keys[begin / count];
      Scalar* to_values = grad_values[begin / count];
      for (Index key = begin; key < end; key += panel_keys) {
        const LaneRange any = tile.that_see_any(key, panel_keys, cursor);
        const Index place = key % count * count;
        add_panels(any, scores_.probabilities(segment, key), grad_out_panels_.data(),
                   to_values + place, grad_values.channels());
        add_panels(any, scores_.gradients(segment, key), query_panels_.data(), to_keys + place,
                   grad_keys.channels());
      }
      begin = end;
    }
  }

  // to[key][channel] += Σ_lane weights[key][lane]·rows[lane][channel] for panel_keys keys.
  LOCAL_MHA_NOINLINE void add_panels(const LaneRange& lanes, const Scalar* weights,
                                     const Scalar* rows, Scalar* to, Index channels) {
    const auto add = [&]<int Panels>() {
      for (; channels >= Panels * count; channels -= Panels * count) {
        upcoming_.fetch();
        add_product<Panels>(lanes, weights, rows, to);
        rows += Panels * count * count;
        to += Panels * count * count;
      }
    };
    add.template operator()<panels>();
    if constexpr (panels > 2) add.template operator()<2>();
    add.template operator()<1>();
  }

  // Those that fetch what is upcoming.
  static Index micro_kernels(Index keys, Index dim_head, Index dim_value) {
    const auto panel_products = [](Index channels) { return ceil_div(channels, panels * count); };
    return 2 * keys / group +
           keys / panel_keys * (panel_products(dim_head) + panel_products(dim_value)) +
           keys / count * ceil_div(dim_head, Index{Tiling<Scalar>::values});
  }

  template <int Panels>
  static LOCAL_MHA_INLINE void add_product(const LaneRange& lanes, const Scalar* weights,
                                           const Scalar* rows, Scalar* to) {
    constexpr Index panel_size = count * count;
    L acc[panel_keys][Panels];
    LOCAL_MHA_UNROLL for (int r = 0; r < panel_keys; ++r) {
      LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) acc[r][p] = L::zero();
    }
    const Scalar* x[Panels];
    LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) x[p] =
        rows + p * panel_size + lanes.begin * count;
    if (lanes.end - lanes.begin == count)
      multiply(count, weights, count, 1, x, acc);
    else
      multiply(lanes.end - lanes.begin, weights + lanes.begin, count, 1, x, acc);
    LOCAL_MHA_UNROLL for (int r = 0; r < panel_keys; ++r) {
      LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) {
        Scalar* sum = to + p * panel_size + r * count;
        (L::load(sum) + acc[r][p]).store(sum);
      }
    }
  }

  // dq += dS·k
  void add_to_queries(const Tile& tile, const Range& segment, const Ring<Scalar>& keys,
                      Scalar* grad_queries) {
    constexpr int most = Tiling<Scalar>::values;
    constexpr int least = Tiling<Scalar>::rows;
    const Index channels = padded_channels<Scalar>(keys.channels());
    for (Index c = 0; c < channels;) {
      const bool many = Tiling<Scalar>::template is_next<most>(channels - c);
      if (many)
        add_channels<most>(tile, segment, keys, c, grad_queries + c * count);
      else
        add_channels<least>(tile, segment, keys, c, grad_queries + c * count);
      c += many ? most : least;
    }
  }

  template <int Channels>
  LOCAL_MHA_NOINLINE void add_channels(const Tile& tile, const Range& segment,
                                       const Ring<Scalar>& keys, Index c, Scalar* to) {
    L acc[Channels][1];
    LOCAL_MHA_UNROLL for (int r = 0; r < Channels; ++r) acc[r][0] = L::load(to + r * count);
    detail::add_weighted_rows(
        tile, segment, keys, c, [&](Index key) { return scores_.gradients(segment, key); },
        upcoming_, acc);
    LOCAL_MHA_UNROLL for (int r = 0; r < Channels; ++r) acc[r][0].store(to + r * count);
  }

  // Where there is a NaN or an infinity, which 0 does not cancel: pair by pair, those that are
  // seen.
  void add_seen(const Tile& tile, const Range& segment, const GradientStore<Scalar>& store,
                Scalar* grad_queries) {
    const auto in_panels = [](Index c, Index position) {
      return (c / count * count + position) * count + c % count;
    };
    auto cursor = store.keys->cursor(segment.begin / count);
    for (Index key = segment.begin; key < segment.end; ++key) {
      if (key % count == 0 && key > segment.begin) cursor.advance();
      const Scalar* p = scores_.probabilities(segment, key);
      const Scalar* ds = scores_.gradients(segment, key);
      Scalar* to_keys = (*store.grad_keys)[key / count];
      Scalar* to_values = (*store.grad_values)[key / count];
      for (Index r = tile.queries.begin; r < tile.queries.end; ++r) {
        if (!tile.sees(r, key)) continue;
        for (Index c = 0; c < store.grad_values->channels(); ++c)
          to_values[in_panels(c, key % count)] +=
              p[r] * grad_out_panels_[static_cast<std::size_t>(in_panels(c, r))];
        // A constant score has no gradient.
        if (tile.self_lane(key) == r) continue;
        for (Index c = 0; c < store.grad_keys->channels(); ++c)
          to_keys[in_panels(c, key % count)] +=
              ds[r] * query_panels_[static_cast<std::size_t>(in_panels(c, r))];
        for (Index c = 0; c < store.keys->channels(); ++c)
          grad_queries[c * count + r] += ds[r] * cursor.block()[c * count + key % count];
      }
    }
  }

  detail::ScoreGradients<Scalar> scores_;
  BlockBuffer<Scalar> turned_;           // [channel][query]
  BlockBuffer<Scalar> grad_turned_;      // [channel][query]
  BlockBuffer<Scalar> query_panels_;     // [panel][query][channel]
  BlockBuffer<Scalar> grad_out_panels_;  // [panel][query][channel]
  bool finite_queries_ = false;
  Upcoming<Scalar> upcoming_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
