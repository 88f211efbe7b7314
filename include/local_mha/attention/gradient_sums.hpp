// SPDX-License-Identifier: MIT
/// \file
/// The second half of the attention's backward kernel: what P and dS of a segment of keys give to
/// the gradients, see backward_kernel.hpp.
///
///     dv_j += Σ_i p_ij · g_i        dk_j += Σ_i ds_ij · q_i        dq_i += Σ_j ds_ij · k_j
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include <Eigen/Core>

#include <local_mha/attention/backward_strip.hpp>
#include <local_mha/attention/score_gradients.hpp>
#include <local_mha/attention/strips.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/attention/weighted_operands.hpp>
#include <local_mha/attention/weighted_values.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/multiply.hpp>
#include <local_mha/ops/position_arrays.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Buffers for one block of queries and one segment, and the computation in them. Operands are
/// multiplied by the matrix unit, if there is one: the caller's.
///
/// What is summed over queries is multiplied as rows of weights, `[key][query]`, with panels,
/// `[panel][query][block_rows channels]`; as operands, two neighbouring queries are a pair of both.
/// \tparam Arithmetic as of AttentionKernel
template <typename Scalar, typename Arithmetic = Scalar>
class GradientSums {
 public:
  using L = Lanes<Scalar>;
  using Strip = BackwardStrip<Scalar, Arithmetic>;
  static constexpr Index count = block_rows<Scalar>;

  GradientSums() = default;
  /// \param keys of a segment, from the first to the last block
  GradientSums(Index dim_head, Index dim_value, Index keys)
      : dim_head_(dim_head),
        dim_value_(dim_value),
        query_panels_(make_operands(panel_channels<Scalar>(dim_head) * count / together)),
        grad_out_panels_(make_operands(panel_channels<Scalar>(dim_value) * count / together)) {
    if constexpr (of_operands) {
      panels_ = make_block_buffer<Scalar>(panel_channels<Scalar>((std::max)(dim_head, dim_value)) *
                                          count);
      p_rows_ = make_operands(keys * count / 2);
      ds_rows_ = make_operands(keys * count / 2);
      ds_pairs_ = make_operands(keys * count / 2);
    }
  }

  /// The segments that follow are of this block of queries.
  /// \param grad_out `[dim_value][block_rows]`
  void take_grad_out(const Scalar* grad_out) {
    make_panels(dim_value_, grad_out, grad_out_panels_.data());
  }
  /// \param queries `[dim_head][block_rows]`, turned to the segments that follow
  void take_queries(const Scalar* queries) {
    make_panels(dim_head_, queries, query_panels_.data());
  }

  /// Takes P and dS of a segment.
  void take_scores(ScoreGradients<Scalar, Arithmetic>& scores, const Range& segment) {
    first_ = segment.begin / count * count;
    const Scalar* const p = scores.probabilities(segment, first_);
    const Scalar* const ds = scores.gradients(segment, first_);
    if constexpr (of_operands) {
      make_rows(segment, p, ds);
      p_ = p_rows_.data();
      ds_ = ds_rows_.data();
    } else {
      p_ = p;
      ds_ = ds;
    }
  }

  /// `dv += Pᵀ·g` and `dk += dSᵀ·q`, for the lanes that see a key: lanes without a query do not.
  /// \param upcoming is fetched meanwhile
  void add_to_keys(const Strip& strip, const Range& segment, Upcoming<Scalar>& upcoming) {
#if defined(LOCAL_MHA_AMX)
    if constexpr (of_operands) {
      if (has_matrix_unit()) return add_to_keys_by_matrix_unit(strip, segment);
    }
#endif
    LaneRange cursor{0, 0};
    for (Index begin = segment.begin; begin < segment.end;) {
      const Index end = (std::min)((begin / count + 1) * count, segment.end);
      Scalar* to_keys = strip.store.grad_keys[begin / count];
      Scalar* to_values = strip.store.grad_values[begin / count];
      for (Index key = begin; key < end; key += panel_keys) {
        const LaneRange any = strip.tile.that_see_any(key, panel_keys, cursor);
        const Index place = key % count * count;
        add_panels(any, row_of(p_, key), grad_out_panels_.data(), to_values + place,
                   strip.store.grad_values.channels(), upcoming);
        add_panels(any, row_of(ds_, key), query_panels_.data(), to_keys + place,
                   strip.store.grad_keys.channels(), upcoming);
      }
      begin = end;
    }
  }

  /// `dq += dS·k`
  /// \param grad_queries `[padded dim_head][block_rows]`
  void add_to_queries(const Strip& strip, const Range& segment, Upcoming<Scalar>& upcoming,
                      Scalar* grad_queries) {
    if constexpr (of_operands) {
      using Keys = KeyOperands<Scalar>;
      const KeyStrip<Scalar, Keys> keys{&strip.tile, &strip.store.keys(), strip.blocks};
      const Chunk<Scalar, ValueOperands<Scalar>, Keys> chunk{
          {{{&keys, segment, nullptr, ds_pairs_.data()}, &strip.store.summed_keys()}}, 1};
      const L one = L::broadcast(Scalar(1));
      add_weighted_values(chunk, dim_head_, &one, one, upcoming, grad_queries);
    } else {
      constexpr int most = Tiling<Scalar>::values;
      constexpr int least = Tiling<Scalar>::rows;
      const Index channels = padded_channels<Scalar>(dim_head_);
      for (Index c = 0; c < channels;) {
        const bool many = Tiling<Scalar>::template is_next<most>(channels - c);
        if (many)
          add_channels<most>(strip, segment, c, upcoming, grad_queries + c * count);
        else
          add_channels<least>(strip, segment, c, upcoming, grad_queries + c * count);
        c += many ? most : least;
      }
    }
  }

  /// All three where there is a NaN or an infinity, which 0 does not cancel: pair by pair, those
  /// that are seen.
  void add_seen(const Strip& strip, const Range& segment, Scalar* grad_queries) {
    const QueryTile<Scalar>& tile = strip.tile;
    for (Index key = segment.begin; key < segment.end; ++key) {
      Scalar* to_keys = strip.store.grad_keys[key / count];
      Scalar* to_values = strip.store.grad_values[key / count];
      const auto in_panels = [&](Index c) {
        return (c / count * count + key % count) * count + c % count;
      };
      for (Index r = tile.queries.begin; r < tile.queries.end; ++r) {
        if (!tile.sees(r, key)) continue;
        const Scalar p = number(row_of(p_, key) + r / together, r);
        for (Index c = 0; c < dim_value_; ++c)
          to_values[in_panels(c)] += p * in_panel(grad_out_panels_, c, r);
        // A constant score has no gradient.
        if (tile.self_lane(key) == r) continue;
        const Scalar ds = number(row_of(ds_, key) + r / together, r);
        for (Index c = 0; c < dim_head_; ++c)
          to_keys[in_panels(c)] += ds * in_panel(query_panels_, c, r);
        for (Index c = 0; c < dim_head_; ++c)
          grad_queries[c * count + r] += ds * strip.store.key(key / count, c, key % count);
      }
    }
  }

  /// Those of a segment of so many keys that fetch what is upcoming.
  Index micro_kernels(Index keys) const {
    if (by_matrix_unit<Scalar, Arithmetic>()) return 0;
    const auto panel_products = [](Index channels) { return ceil_div(channels, panels * count); };
    return keys / panel_keys * (panel_products(dim_head_) + panel_products(dim_value_)) +
           keys / count * ceil_div(dim_head_, Index{Tiling<Scalar>::values});
  }

 private:
  static constexpr bool of_operands = !std::is_same_v<Arithmetic, Scalar>;
  using Operand = std::conditional_t<of_operands, Pair, Scalar>;
  /// Queries of an operand.
  static constexpr Index together = of_operands ? 2 : 1;
  static constexpr Index panel_size = count * count / together;

  // The register tile of the products that are added in place: keys × panels of channels.
  static constexpr int panels = Tiling<Scalar>::accumulators >= 16 ? 4 : 2;
  static constexpr int panel_keys = Tiling<Scalar>::registers / L::packets >= 16 ? 4 : 2;
  static constexpr Index group = ScoreGradients<Scalar, Arithmetic>::group;
  static_assert(count % group == 0 && group % panel_keys == 0 && group % 2 == 0);

  static BlockBuffer<Operand> make_operands(Index size) {
    return BlockBuffer<Operand>(static_cast<std::size_t>(size), Operand{});
  }

  const Operand* row_of(const Operand* rows, Index key) const {
    return rows + (key - first_) * (count / together);
  }
  static Scalar number(const Operand* operand, [[maybe_unused]] Index r) {
    if constexpr (of_operands)
      return from_stored<Scalar>(operand->of[r % 2]);
    else
      return *operand;
  }
  static Scalar in_panel(const BlockBuffer<Operand>& of, Index c, Index r) {
    return number(of.data() + c / count * panel_size + r / together * count + c % count, r);
  }

  void make_panels(Index channels, const Scalar* block, Operand* to) {
    if constexpr (of_operands) {
      block_to_panels(channels, block, panels_.data());
      // Rows of panels are packed as channels of blocks are.
      pack_channels(panel_channels<Scalar>(channels), panels_.data(), to);
    } else {
      block_to_panels(channels, block, to);
    }
  }

  // Operands of P and dS: pairs of queries, and of dS those of keys, too, 0 of keys that are not
  // the segment's.
  LOCAL_MHA_FLATTEN void make_rows(const Range& segment, const Scalar* p, const Scalar* ds) {
    const Index before = segment.begin - first_;
    const Index end = before + ceil_div(segment.end - segment.begin, group) * group;
    const Index whole = ceil_div(end, count) * count;
    auto* const p_rows = reinterpret_cast<Eigen::bfloat16*>(p_rows_.data());
    auto* const ds_rows = reinterpret_cast<Eigen::bfloat16*>(ds_rows_.data());
    Pair* pairs = ds_pairs_.data();
    const auto clear_until = [&](Pair* until) {
      std::fill(pairs, until, Pair{});
      pairs = until;
    };
    clear_until(pairs + before / 2 * count);
    for (Index key = before; key < end; key += 2, pairs += count) {
      const L first = L::load(ds + key * count), second = L::load(ds + (key + 1) * count);
      store_operands(L::load(p + key * count), p_rows + key * count);
      store_operands(L::load(p + (key + 1) * count), p_rows + (key + 1) * count);
      store_operands(first, ds_rows + key * count);
      store_operands(second, ds_rows + (key + 1) * count);
      store_pairs(first, second, pairs);
    }
    clear_until(ds_pairs_.data() + whole / 2 * count);
    if (!by_matrix_unit<Scalar, Arithmetic>()) return;
    // It multiplies whole blocks of keys.
    for (Pair* rows : {p_rows_.data(), ds_rows_.data()}) {
      std::fill_n(rows, before * count / 2, Pair{});
      std::fill(rows + end * count / 2, rows + whole * count / 2, Pair{});
    }
  }

  // to[key][channel] += Σ_lane weights[key][lane]·rows[lane][channel] for panel_keys keys.
  static LOCAL_MHA_NOINLINE void add_panels(const LaneRange& lanes, const Operand* weights,
                                            const Operand* rows, Scalar* to, Index channels,
                                            Upcoming<Scalar>& upcoming) {
    const auto add = [&]<int Panels>() {
      for (; channels >= Panels * count; channels -= Panels * count) {
        upcoming.fetch();
        add_product<Panels>(lanes, weights, rows, to);
        rows += Panels * panel_size;
        to += Panels * count * count;
      }
    };
    add.template operator()<panels>();
    if constexpr (panels > 2) add.template operator()<2>();
    add.template operator()<1>();
  }

  template <int Panels>
  static LOCAL_MHA_INLINE void add_product(const LaneRange& lanes, const Operand* weights,
                                           const Operand* rows, Scalar* to) {
    constexpr Index depth = count / together;
    const Index begin = lanes.begin / together;
    L acc[panel_keys][Panels];
    LOCAL_MHA_UNROLL for (int r = 0; r < panel_keys; ++r) {
      LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) acc[r][p] = L::zero();
    }
    const Operand* x[Panels];
    LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) x[p] = rows + p * panel_size + begin * count;
    if (lanes.end - lanes.begin == count)
      multiply(depth, weights, depth, 1, x, acc);
    else
      multiply(ceil_div(Index{lanes.end}, together) - begin, weights + begin, depth, 1, x, acc);
    LOCAL_MHA_UNROLL for (int r = 0; r < panel_keys; ++r) {
      LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) {
        Scalar* sum = to + p * count * count + r * count;
        (L::load(sum) + acc[r][p]).store(sum);
      }
    }
  }

  template <int Channels>
  LOCAL_MHA_NOINLINE void add_channels(const Strip& strip, const Range& segment, Index c,
                                       Upcoming<Scalar>& upcoming, Scalar* to) {
    L acc[Channels][1];
    LOCAL_MHA_UNROLL for (int r = 0; r < Channels; ++r) acc[r][0] = L::load(to + r * count);
    add_weighted_rows(
        strip.tile, segment, strip.store.summed_keys(), c,
        [&](Index key) { return row_of(ds_, key); }, upcoming, acc);
    LOCAL_MHA_UNROLL for (int r = 0; r < Channels; ++r) acc[r][0].store(to + r * count);
  }

#if defined(LOCAL_MHA_AMX)
  void add_to_keys_by_matrix_unit(const Strip& strip, const Range& segment) const {
    for (Index block = segment.begin / count; block * count < segment.end; ++block) {
      add_panels_by_matrix_unit(row_of(p_, block * count), grad_out_panels_.data(),
                                strip.store.grad_values[block], strip.store.grad_values.channels());
      add_panels_by_matrix_unit(row_of(ds_, block * count), query_panels_.data(),
                                strip.store.grad_keys[block], strip.store.grad_keys.channels());
    }
  }

  // add_panels() of a block of keys.
  static LOCAL_MHA_NOINLINE void add_panels_by_matrix_unit(const Pair* weights, const Pair* rows,
                                                           float* to, Index channels) {
    using Sums = TileSums<2>;
    constexpr Index size = count * count;
    for (; channels > 0; channels -= count, rows += panel_size, to += size) {
      Sums::load({to, to + size / 2});
      Sums::add({weights, weights + tile_rows * tile_pairs}, tile_pairs, rows);
      Sums::store({to, to + size / 2});
    }
  }
#endif

  Index dim_head_ = 0;
  Index dim_value_ = 0;
  BlockBuffer<Operand> query_panels_;     // [panel][query][channel]
  BlockBuffer<Operand> grad_out_panels_;  // [panel][query][channel]
  BlockBuffer<Scalar> panels_;            // before they are operands
  BlockBuffer<Operand> p_rows_;           // [key][query], where they are operands
  BlockBuffer<Operand> ds_rows_;          // [key][query]
  BlockBuffer<Operand> ds_pairs_;         // [pair of keys][query]
  // P and dS of the segment, from its first block on.
  Index first_ = 0;
  const Operand* p_ = nullptr;
  const Operand* ds_ = nullptr;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail

LOCAL_MHA_INT_BOUNDS_END
