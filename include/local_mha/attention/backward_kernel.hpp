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
#include <cmath>
#include <limits>
#include <optional>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/score.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/exp2.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/rotary.hpp>
#include <local_mha/ops/weight_gradient.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// A block of queries on the way back.
template <typename Scalar>
struct QueryGradients {
  Index first = 0;                   ///< the block's first row
  const Scalar* queries = nullptr;   ///< `[dim_head][block_rows]` as AttentionKernel::attend() has
  const Scalar* grad_out = nullptr;  ///< `[dim_value][block_rows]`, 0 in rows that do not exist
  const Scalar* lse = nullptr;       ///< `[2][block_rows]` as AttentionKernel::attend() leaves it
  const Scalar* delta = nullptr;     ///< `[block_rows]`
  /// `[padded dim_head][block_rows]`: becomes `Σ_j ds_ij · k_j`, turned back to the place of the
  /// queries
  Scalar* grad_queries = nullptr;
};

/// Where keys and values lie, looked at by note_finite(), and the room for their gradients, panels
/// that are added to; that of the keys is `Σ_i ds_ij · queries_i`, which is theirs times `log2(e)`.
template <typename Scalar>
struct GradientStore {
  const Ring<Scalar>* keys = nullptr;
  const Ring<Scalar>* values = nullptr;
  Ring<Scalar>* grad_keys = nullptr;
  Ring<Scalar>* grad_values = nullptr;
};

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
      : probabilities_(room((std::min)(longest_range, segment_keys) + 2 * count)),
        grad_scores_(room((std::min)(longest_range, segment_keys) + 2 * count)),
        derivatives_(changes_scores ? room((std::min)(longest_range, segment_keys) + 2 * count)
                                    : room(0)),
        turned_(room(dim_head)),
        grad_turned_(room(padded_channels<Scalar>(dim_head))),
        query_panels_(room(panel_channels<Scalar>(dim_head))),
        grad_out_panels_(room(panel_channels<Scalar>(dim_value))),
        bias_(room(count)) {}

  /// Memory that differentiate() fetches while it computes.
  Upcoming<Scalar>& upcoming() { return upcoming_; }

  /// \param window the blocks that the window shows
  /// \param pinned those of `head.pinned`, one after the other, if there are any
  /// \param grad_bias null, or `[w, (1 + lb + lf)·w]` to be added to
  void differentiate(const AttentionHead<Scalar>& head, const QueryGradients<Scalar>& block,
                     const GradientStore<Scalar>& window, const GradientStore<Scalar>& pinned,
                     Scalar* grad_bias) {
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
                          Scalar* grad_bias) {
    take_queries(head, block, store);
    take({Tile::all_of(head, block.first, keys), store, nullptr}, head, block, grad_bias);
  }

 private:
  using Tile = QueryTile<Scalar>;

  // Keys one after the other in a store, and what the tile's queries see of them.
  struct Strip {
    Tile tile;
    GradientStore<Scalar> store;
    const Index* blocks;  // of the store in the sequence; null: the same

    Index block_in_sequence(Index block) const { return blocks == nullptr ? block : blocks[block]; }
    Index row(Index key) const { return block_in_sequence(key / count) * count + key % count; }
    const RotarySteps<Scalar>* steps(const AttentionHead<Scalar>& head) const {
      return blocks == nullptr ? head.steps : head.pinned_steps;
    }
  };

  // Keys that one micro-kernel of the scores takes, all of one block.
  static constexpr Index group =
      count % Tiling<Scalar>::values == 0 ? Tiling<Scalar>::values : Tiling<Scalar>::rows;
  // The register tile of the products that are added in place: keys × panels of channels.
  static constexpr int panels = Tiling<Scalar>::accumulators >= 16 ? 4 : 2;
  static constexpr int panel_keys = Tiling<Scalar>::accumulators >= 16 ? 4 : 2;
  static_assert(count % group == 0 && group % panel_keys == 0);

  // Log-sum-exp in units of log 2.
  class Denominator {
   public:
    explicit Denominator(const Scalar* lse) {
      alignas(64) Scalar whole[count];
      alignas(64) Scalar rest[count];
      for (Index r = 0; r < count; ++r) {
        const auto parts = binary_log_sum_exp<Scalar>({lse[r], lse[count + r]});
        whole[r] = parts.nearest;
        rest[r] = parts.rest;
      }
      whole_ = L::load(whole);
      rest_ = L::load(rest);
    }

    LOCAL_MHA_INLINE L probability(const L& score) const { return exp2((score - whole_) - rest_); }

   private:
    L whole_;
    L rest_;
  };

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
            const QueryGradients<Scalar>& block, Scalar* grad_bias) {
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
      grad_scores(head, strip, segment, block, queries, cursor);
      if (head.dropout != nullptr) drop(head, strip, segment, block);
      if (grad_bias != nullptr) add_to_bias(head, strip, segment, grad_bias);
      if (head.score) multiply_by_derivatives(segment);
      Scalar* grad_queries = block.grad_queries;
      if (steps != nullptr) {
        std::fill(grad_turned_.begin(), grad_turned_.end(), Scalar(0));
        grad_queries = grad_turned_.data();
      }
      if (finite) {
        add_to_keys(tile, segment, *strip.store.grad_keys, *strip.store.grad_values);
        add_to_queries(segment, keys, grad_queries);
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

  Scalar* row_of(BlockBuffer<Scalar>& rows, const Range& segment, Index key) {
    return rows.data() + (key - segment.begin / count * count) * count;
  }

  // P and dS of a segment; with dropout, P and g·v.
  void grad_scores(const AttentionHead<Scalar>& head, const Strip& strip, const Range& segment,
                   const QueryGradients<Scalar>& block, const Scalar* queries, LaneRange& cursor) {
    const Tile& tile = strip.tile;
    const Ring<Scalar>& keys = *strip.store.keys;
    const Ring<Scalar>& values = *strip.store.values;
    const Denominator denominator(block.lse);
    const L delta = L::load(block.delta);
    std::optional<BiasRows<Scalar>> bias_rows;
    if (head.attn_bias != nullptr) bias_rows.emplace(head, tile);
    auto key_cursor = keys.cursor(segment.begin / count);
    auto value_cursor = values.cursor(segment.begin / count);
    for (Index begin = segment.begin; begin < segment.end;
         key_cursor.advance(), value_cursor.advance()) {
      const Index end = (std::min)((begin / count + 1) * count, segment.end);
      const Index first_key = strip.block_in_sequence(begin / count) * count;
      if (bias_rows) bias_rows->gather(first_key, bias_.data());
      for (Index key = begin; key < end; key += group) {
        Scalar* p = row_of(probabilities_, segment, key);
        Scalar* ds = row_of(grad_scores_, segment, key);
        Scalar* derivatives = head.score ? row_of(derivatives_, segment, key) : nullptr;
        {
          upcoming_.fetch();
          L acc[group][1];
          LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) acc[r][0] = L::zero();
          const Scalar* const x[1] = {queries};
          multiply(keys.channels(), key_cursor.block() + key % count,
                   Ring<Scalar>::position_stride(), Ring<Scalar>::channel_stride(), x, acc);
          if (derivatives != nullptr)
            change(head, tile, first_key + key % count, p, derivatives, acc);
          if (head.attn_bias != nullptr) {
            LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) acc[r][0] =
                fma(Scalar(log2_e), L::load(bias_.data() + (key % count + r) * count), acc[r][0]);
          }
          // Sums that started at −lse would round at its size.
          LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) denominator.probability(acc[r][0])
              .store(p + r * count);
        }
        {
          upcoming_.fetch();
          L acc[group][1];
          LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) acc[r][0] = L::zero();
          const Scalar* const x[1] = {block.grad_out};
          multiply(values.channels(), value_cursor.block() + key % count,
                   Ring<Scalar>::position_stride(), Ring<Scalar>::channel_stride(), x, acc);
          if (head.dropout == nullptr) {
            LOCAL_MHA_UNROLL for (Index r = 0; r < group;
                                  ++r)(L::load(p + r * count) * (acc[r][0] - delta))
                .store(ds + r * count);
          } else {
            LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) acc[r][0].store(ds + r * count);
          }
        }
        // The products that follow sum over all lanes.
        if (!tile.whole() || !tile.plain({key, key + group}))
          hide(tile, key, denominator, p, ds, derivatives, cursor);
      }
      begin = end;
    }
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

  // From the gradients of what the head's function makes of scores to theirs.
  void multiply_by_derivatives(const Range& segment) {
    const Scalar* derivatives = row_of(derivatives_, segment, segment.begin);
    Scalar* ds = row_of(grad_scores_, segment, segment.begin);
    const Index keys = ceil_div(segment.end - segment.begin, group) * group;
    for (Index i = 0; i < keys * count; i += count)
      (L::load(derivatives + i) * L::load(ds + i)).store(ds + i);
  }

  // From P and g·v to what is left of P, and dS.
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
        Scalar* p = row_of(probabilities_, segment, key);
        Scalar* ds = row_of(grad_scores_, segment, key);
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

  void add_to_bias(const AttentionHead<Scalar>& head, const Strip& strip, const Range& segment,
                   Scalar* grad_bias) {
    const Tile& tile = strip.tile;
    const Index columns = head.window->look_around();
    for (Index r = tile.queries.begin; r < tile.queries.end; ++r) {
      const Index query = tile.first + r;
      Scalar* row = grad_bias + head.window->place_in_bucket(query) * columns;
      const Index first = head.window->look_around_begin(query);
      Range keys = tile.seen[r].clipped_to(segment);
      if (strip.blocks == nullptr) keys = keys.clipped_to({first, first + columns});
      if (keys.begin >= keys.end) continue;
      const Scalar* ds = row_of(grad_scores_, segment, keys.begin) + r;
      if (strip.blocks == nullptr) {
        row += keys.begin - first;
        for (Index i = 0; i < keys.end - keys.begin; ++i) row[i] += ds[i * count];
        continue;
      }
      for (Index key = keys.begin; key < keys.end; ++key, ds += count) {
        const Index column = strip.row(key) - first;
        if (Range{0, columns}.contains(column)) row[column] += *ds;
      }
    }
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
        add_panels(any, row_of(probabilities_, segment, key), grad_out_panels_.data(),
                   to_values + place, grad_values.channels());
        add_panels(any, row_of(grad_scores_, segment, key), query_panels_.data(), to_keys + place,
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
  void add_to_queries(const Range& segment, const Ring<Scalar>& keys, Scalar* grad_queries) {
    constexpr int most = Tiling<Scalar>::values;
    constexpr int least = Tiling<Scalar>::rows;
    const Index channels = padded_channels<Scalar>(keys.channels());
    for (Index c = 0; c < channels;) {
      const bool many = Tiling<Scalar>::template is_next<most>(channels - c);
      if (many)
        add_channels<most>(segment, keys, c, grad_queries + c * count);
      else
        add_channels<least>(segment, keys, c, grad_queries + c * count);
      c += many ? most : least;
    }
  }

  template <int Channels>
  LOCAL_MHA_NOINLINE void add_channels(const Range& segment, const Ring<Scalar>& keys, Index c,
                                       Scalar* to) {
    L acc[Channels][1];
    LOCAL_MHA_UNROLL for (int r = 0; r < Channels; ++r) acc[r][0] = L::load(to + r * count);
    auto cursor = keys.cursor(segment.begin / count);
    for (Index begin = segment.begin; begin < segment.end; cursor.advance()) {
      const Index end = (std::min)((begin / count + 1) * count, segment.end);
      const Scalar* block = cursor.block() + c * count;
      const Scalar* const ds[1] = {row_of(grad_scores_, segment, begin)};
      if (end - begin == count)
        multiply(count, block, count, 1, ds, acc);
      else
        multiply(end - begin, block + begin % count, count, 1, ds, acc);
      upcoming_.fetch();
      begin = end;
    }
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
      const Scalar* p = row_of(probabilities_, segment, key);
      const Scalar* ds = row_of(grad_scores_, segment, key);
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

  BlockBuffer<Scalar> probabilities_;    // [key][query]
  BlockBuffer<Scalar> grad_scores_;      // [key][query]
  BlockBuffer<Scalar> derivatives_;      // [key][query], of the head's function of scores
  BlockBuffer<Scalar> turned_;           // [channel][query]
  BlockBuffer<Scalar> grad_turned_;      // [channel][query]
  BlockBuffer<Scalar> query_panels_;     // [panel][query][channel]
  BlockBuffer<Scalar> grad_out_panels_;  // [panel][query][channel]
  BlockBuffer<Scalar> bias_;             // [key][query]
  bool finite_queries_ = false;
  Upcoming<Scalar> upcoming_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
