// SPDX-License-Identifier: MIT
/// \file
/// Products of a packed weight and rows: `y = x·Wᵀ`, by blocks of rows or of a single one.
#pragma once

#include <algorithm>

#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/multiply.hpp>
#include <local_mha/ops/packed_weight.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

template <int Blocks, typename Scalar>
void project_panels(const PackedWeight<Scalar>& weight, Index group, Index row_begin, Index row_end,
                    const Scalar* x, Index x_stride, Scalar* const (&y)[Blocks]) {
  using L = Lanes<Scalar>;
  constexpr int rows = Tiling<Scalar>::rows;
  // A chunk of the weight comes from the last cache when it passes first. A single block, which is
  // all that registers hold without AVX-512, has no instructions to spare for it.
  constexpr Ahead ahead = Blocks > 1 ? Ahead{.a = 64, .x = 8} : Ahead{};
  const Scalar* from[Blocks];
  for (int b = 0; b < Blocks; ++b) from[b] = x + b * x_stride;
  for (Index row = row_begin; row < row_end; row += rows) {
    L acc[rows][Blocks];
    LOCAL_MHA_UNROLL for (int r = 0; r < rows; ++r) {
      LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) acc[r][b] = L::zero();
    }
    const Scalar* panel = weight.panel(group, row / rows);
    multiply<ahead>(weight.depth(), panel, 1, rows, from, acc);
    LOCAL_MHA_UNROLL for (int r = 0; r < rows; ++r) {
      if (row + r < weight.group_rows()) {
        LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) acc[r][b].store(y[b] +
                                                                          (row + r) * L::count);
      }
    }
  }
}

}  // namespace detail

/// `y(b)[r] = Σ_c W[group·group_rows + r, c] · x(b)[c]` for blocks `0 <= b < blocks`.
/// \param some_rows those of the group that are computed, whole panels
/// \param x blocks `[weight.depth()][block_rows]`, one after the other
/// \param y `y(b)` points to block `b` of the result, `[group_rows][block_rows]`
template <typename Scalar, typename BlockOf>
void project(const PackedWeight<Scalar>& weight, Index group, const Range& some_rows,
             const Scalar* x, Index blocks, BlockOf&& y) {
  constexpr Index rows = Tiling<Scalar>::rows;
  constexpr Index together = Tiling<Scalar>::blocks;
  const Index x_stride = weight.depth() * block_rows<Scalar>;
  // A chunk of the weight stays in the second-level cache while all blocks pass it.
  constexpr Index chunk_bytes = 256 * 1024;
  const Index panel_bytes = weight.depth() * rows * static_cast<Index>(sizeof(Scalar));
  const Index chunk = (std::max<Index>)(1, chunk_bytes / (std::max<Index>)(1, panel_bytes)) * rows;
  for (Index row = some_rows.begin; row < some_rows.end; row += chunk) {
    const Index row_end = (std::min)(row + chunk, some_rows.end);
    Index b = 0;
    for (; b + together <= blocks; b += together) {
      Scalar* to[together];
      for (Index i = 0; i < together; ++i) to[i] = y(b + i);
      detail::project_panels<together>(weight, group, row, row_end, x + b * x_stride, x_stride, to);
    }
    for (; b < blocks; ++b) {
      Scalar* to[1] = {y(b)};
      detail::project_panels<1>(weight, group, row, row_end, x + b * x_stride, x_stride, to);
    }
  }
}

/// The same for all rows of the group.
template <typename Scalar, typename BlockOf>
void project(const PackedWeight<Scalar>& weight, Index group, const Scalar* x, Index blocks,
             BlockOf&& y) {
  project(weight, group, {0, weight.group_rows()}, x, blocks, y);
}

/// Adds a bias to each position of a block.
/// \param bias `[channels]`
/// \param block `[channels][block_rows]`
template <typename Scalar>
void add_bias(Index channels, const Scalar* bias, Scalar* block) {
  using L = Lanes<Scalar>;
  for (Index c = 0; c < channels; ++c, block += L::count)
    (L::load(block) + L::broadcast(bias[c])).store(block);
}

namespace detail {

/// How project_lane() reads a panel: its rows at one column at a time, where they fill at least 32
/// bytes or a packet, else at as many columns as do.
template <typename Scalar>
struct PanelReading {
  static constexpr int rows = Tiling<Scalar>::rows;
  static constexpr int filling =
      (std::min)(Lanes<Scalar>::packet_size, (std::max)(1, 32 / static_cast<int>(sizeof(Scalar))));
  using P = Lanes<Scalar, Lanes<Scalar>::count / (std::max)(rows, filling)>;
  static constexpr int columns = P::count / rows;
  /// How often a value of the position is needed: a single time, it is broadcast.
  static constexpr int copies = columns == 1 ? 1 : rows;
  /// Panels that are read at a time.
  static constexpr int panels = 4;
  /// One sum would wait for its own additions.
  static constexpr int sums = (std::max)(1, 8 / P::packets / panels);

  static LOCAL_MHA_INLINE P multiply_add(const Scalar* x, const Scalar* weights, const P& sum) {
    if constexpr (columns == 1)
      return fma(*x, P::load(weights), sum);
    else
      return fma(P::load(x), P::load(weights), sum);
  }
};

}  // namespace detail

/// Values of a position for project_lane().
template <typename Scalar>
Index spread_size(const PackedWeight<Scalar>& weight) {
  return weight.panel_size() / Tiling<Scalar>::rows * detail::PanelReading<Scalar>::copies;
}

/// Prepares one position for project_lane(): its values one after the other, each as often as is
/// needed, then zeros.
/// \param x `[weight.depth()]`, values `x_stride` apart: `block_rows` for a lane of a block
/// \param spread `[spread_size(weight)]`
template <typename Scalar>
void spread_lane(const PackedWeight<Scalar>& weight, const Scalar* x, Index x_stride,
                 Scalar* spread) {
  constexpr Index copies = detail::PanelReading<Scalar>::copies;
  for (Index d = 0; d < weight.depth(); ++d)
    std::fill(spread + d * copies, spread + (d + 1) * copies, x[d * x_stride]);
  std::fill(spread + weight.depth() * copies, spread + spread_size(weight), Scalar(0));
}

namespace detail {

/// `Panels` panels of a group from that of `row` on, for project_lane().
template <int Panels, typename Scalar>
LOCAL_MHA_INLINE void project_lane_panels(const PackedWeight<Scalar>& weight, Index group,
                                          Index row, const Scalar* spread, Scalar* y,
                                          Index y_stride) {
  using Reading = PanelReading<Scalar>;
  using P = typename Reading::P;
  constexpr Index rows = Reading::rows;
  constexpr Index x_step = Reading::columns * Reading::copies;
  constexpr int sums = Reading::sums;
  const Index steps = weight.panel_size() / P::count;
  const Scalar* from[Panels];
  P acc[Panels][sums];
  LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) {
    from[p] = weight.panel(group, row / rows + p);
    LOCAL_MHA_UNROLL for (int s = 0; s < sums; ++s) acc[p][s] = P::zero();
  }
  const Scalar* x = spread;
  Index i = 0;
  for (; i + sums <= steps; i += sums, x += sums * x_step) {
    LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) {
      LOCAL_MHA_UNROLL for (int s = 0; s < sums; ++s) acc[p][s] =
          Reading::multiply_add(x + s * x_step, from[p] + (i + s) * P::count, acc[p][s]);
    }
  }
  for (; i < steps; ++i, x += x_step) {
    LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) acc[p][0] =
        Reading::multiply_add(x, from[p] + i * P::count, acc[p][0]);
  }
  for (int p = 0; p < Panels; ++p, row += rows) {
    LOCAL_MHA_UNROLL for (int s = 1; s < sums; ++s) acc[p][0] = acc[p][0] + acc[p][s];
    alignas(64) Scalar sum[P::count];
    acc[p][0].store(sum);
    for (Index r = 0; r < (std::min)(rows, weight.group_rows() - row); ++r) {
      for (Index lane = r + rows; lane < P::count; lane += rows) sum[r] = sum[r] + sum[lane];
      y[(row + r) * y_stride] = sum[r];
    }
  }
}

}  // namespace detail

/// project() of a single position. Its lanes are rows of the weight: panels are multiplied as they
/// lie, several at a time, because memory answers that many readers in order faster than one. The
/// order in which a row is summed does not depend on how many there are.
/// \param some_rows those of the group that are computed, whole panels
/// \param spread made by spread_lane()
/// \param y `[group_rows]`, values `y_stride` apart: `block_rows` for a lane of a block
template <typename Scalar>
void project_lane(const PackedWeight<Scalar>& weight, Index group, const Range& some_rows,
                  const Scalar* spread, Scalar* y, Index y_stride) {
  using Reading = detail::PanelReading<Scalar>;
  constexpr Index rows = Reading::rows;
  constexpr int together = Reading::panels;
  Index row = some_rows.begin;
  for (; row + (together - 1) * rows < some_rows.end; row += together * rows)
    detail::project_lane_panels<together>(weight, group, row, spread, y, y_stride);
  for (; row < some_rows.end; row += rows)
    detail::project_lane_panels<1>(weight, group, row, spread, y, y_stride);
}

/// The same for all rows of the group.
template <typename Scalar>
void project_lane(const PackedWeight<Scalar>& weight, Index group, const Scalar* spread, Scalar* y,
                  Index y_stride) {
  project_lane(weight, group, {0, weight.group_rows()}, spread, y, y_stride);
}

/// project(), or project_lane() if there is a single position, in lane 0.
/// \param spread `[spread_size(weight)]`
template <typename Scalar, typename BlockOf>
void project_rows(const PackedWeight<Scalar>& weight, Index group, const Scalar* x, Index blocks,
                  bool single, Scalar* spread, BlockOf&& y) {
  if (!single) return project(weight, group, x, blocks, y);
  spread_lane(weight, x, block_rows<Scalar>, spread);
  project_lane(weight, group, spread, y(0), block_rows<Scalar>);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
