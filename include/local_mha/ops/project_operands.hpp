// SPDX-License-Identifier: MIT
/// \file
/// Products of a weight and rows that are both operands in Eigen::bfloat16, added up in float:
/// project() and project_lane() of such a weight.
#pragma once

#include <algorithm>
#include <concepts>
#include <type_traits>

#include <local_mha/core/lanes.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/ops/multiply.hpp>
#include <local_mha/ops/packed_weight.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// What operands are added up in.
template <typename Scalar>
concept OperandSum = std::same_as<Scalar, float>;

/// A weight whose products are of operands.
template <typename Scalar>
using OperandWeight = PackedWeight<Scalar, Eigen::bfloat16, Eigen::bfloat16>;

namespace detail {

/// Pairs of a panel.
template <typename Scalar>
const Pair* pairs_of_panel(const OperandWeight<Scalar>& weight, Index group, Index row) {
  return reinterpret_cast<const Pair*>(weight.panel(group, row / tile_rows));
}

/// `y[b][r] = Σ_c weight[r, c]·x[b][c]` for a micro-kernel's rows, of which `rows` are there.
/// \param weight from the micro-kernel's first row on
/// \param depth in tiles
template <int Blocks, typename Scalar>
LOCAL_MHA_NOINLINE void project_tiles(Index depth, const Pair* weight, Index rows, const Pair* x,
                                      Index x_stride, Scalar* const (&y)[Blocks]) {
  using L = Lanes<Scalar>;
  constexpr int most = Tiling<Scalar>::rows;
  const Pair* from[Blocks];
  for (int b = 0; b < Blocks; ++b) from[b] = x + b * x_stride;
  L acc[most][Blocks];
  LOCAL_MHA_UNROLL for (int r = 0; r < most; ++r) {
    LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) acc[r][b] = L::zero();
  }
  for (Index tile = 0; tile < depth; ++tile) {
    multiply(tile_pairs, weight, tile_pairs, 1, from, acc);
    weight += tile_rows * tile_pairs;
    for (int b = 0; b < Blocks; ++b) from[b] += tile_pairs * L::count;
  }
  LOCAL_MHA_UNROLL for (int r = 0; r < most; ++r) {
    if (r < rows) {
      LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) acc[r][b].store(y[b] + r * L::count);
    }
  }
}

#if defined(LOCAL_MHA_AMX)
/// The same of one block by the matrix unit: `Panels` times tile_rows rows.
/// \param panel_stride from panel to panel
/// \param upcoming is fetched meanwhile, in `depth` steps
template <int Panels>
LOCAL_MHA_NOINLINE void project_by_matrix_unit(Index depth, const Pair* weight, Index panel_stride,
                                               const Pair* x, float* const (&y)[Panels],
                                               Upcoming<Pair>& upcoming) {
  using Sums = TileSums<Panels>;
  Sums::zero();
  for (Index t = 0; t < depth; ++t) {
    upcoming.fetch();
    const Pair* panels[Panels];
    for (int p = 0; p < Panels; ++p)
      panels[p] = weight + p * panel_stride + t * tile_rows * tile_pairs;
    Sums::add(panels, tile_pairs, x + t * tile_pairs * block_rows<float>);
  }
  Sums::store(y);
}

/// project() by the matrix unit.
template <typename BlockOf>
void project_by_matrix_unit(const OperandWeight<float>& weight, Index group, const Range& some_rows,
                            const Pair* x, Index blocks, BlockOf&& y) {
  constexpr Index count = block_rows<float>;
  const MatrixUnit unit;
  const Index depth = ceil_div(weight.depth(), tile_depth);
  const Index x_stride = depth * tile_pairs * count;
  const Index panel_stride = weight.panel_size() / 2;
  const Index end = (std::min)(some_rows.end, weight.group_rows());
  Upcoming<Pair> upcoming;
  const auto pass = [&]<int Panels>(Index row, Index b) {
    // Rows of a tile that the result has no room for.
    alignas(64) float aside[tile_rows * count];
    float* to[Panels];
    for (int p = 0; p < Panels; ++p) {
      const Index first = row + p * tile_rows;
      to[p] = first + tile_rows <= end ? y(b) + first * count : aside;
    }
    project_by_matrix_unit<Panels>(depth, pairs_of_panel(weight, group, row), panel_stride,
                                   x + b * x_stride, to, upcoming);
    const Index last = row + (Panels - 1) * tile_rows;
    if (last + tile_rows > end) std::copy_n(aside, (end - last) * count, y(b) + last * count);
  };
  for (Index row = some_rows.begin; row < end; row += 2 * tile_rows) {
    const bool both = row + tile_rows < end;
    // What comes next would be waited for.
    upcoming.clear();
    const auto* next = weight.panel(group, row / tile_rows + (both ? 1 : 0));
    for (int i = 0; i < 2; ++i) {
      next = weight.panel_behind(next);
      upcoming.add(reinterpret_cast<const Pair*>(next), panel_stride);
    }
    upcoming.spread_over(depth * blocks);
    for (Index b = 0; b < blocks; ++b)
      both ? pass.template operator()<2>(row, b) : pass.template operator()<1>(row, b);
  }
}
#endif

}  // namespace detail

/// project() of operands.
/// \param x blocks `[pairs_of(weight.depth())][block_rows]`, one after the other
template <OperandSum Scalar, typename BlockOf>
void project(const OperandWeight<Scalar>& weight, Index group, const Range& some_rows,
             const detail::Pair* x, Index blocks, BlockOf&& y) {
#if defined(LOCAL_MHA_AMX)
  if (detail::has_matrix_unit())
    return detail::project_by_matrix_unit(weight, group, some_rows, x, blocks, y);
#endif
  constexpr Index rows = Tiling<Scalar>::rows;
  constexpr Index together = Tiling<Scalar>::blocks;
  const Index depth = ceil_div(weight.depth(), detail::tile_depth);
  const Index x_stride = depth * detail::tile_pairs * block_rows<Scalar>;
  const Index end = (std::min)(some_rows.end, weight.group_rows());
  const auto pass = [&]<int Blocks>(Index row, Index b) {
    Scalar* to[Blocks];
    for (int i = 0; i < Blocks; ++i) to[i] = y(b + i) + row * block_rows<Scalar>;
    detail::project_tiles<Blocks>(
        depth,
        detail::pairs_of_panel(weight, group, row) + row % detail::tile_rows * detail::tile_pairs,
        end - row, x + b * x_stride, x_stride, to);
  };
  for (Index row = some_rows.begin; row < end; row += rows) {
    Index b = 0;
    for (; b + together <= blocks; b += together) pass.template operator()<together>(row, b);
    for (; b < blocks; ++b) pass.template operator()<1>(row, b);
  }
}

/// The same for all rows of the group.
template <OperandSum Scalar, typename BlockOf>
void project(const OperandWeight<Scalar>& weight, Index group, const detail::Pair* x, Index blocks,
             BlockOf&& y) {
  project(weight, group, {0, weight.group_rows()}, x, blocks, y);
}

/// Values of a position for project_lane().
template <OperandSum Scalar>
Index spread_size(const OperandWeight<Scalar>& weight) {
  return ceil_div(weight.depth(), detail::tile_depth) * detail::tile_depth;
}

/// spread_lane() for a weight of operands: those of a tile's depth whose places are even, then the
/// others.
template <OperandSum Scalar>
void spread_lane(const OperandWeight<Scalar>& weight, const Scalar* x, Index x_stride,
                 Scalar* spread) {
  using namespace detail;
  std::fill_n(spread, spread_size(weight), Scalar(0));
  for (Index d = 0; d < weight.depth(); ++d)
    spread[d / tile_depth * tile_depth + d % 2 * tile_pairs + d % tile_depth / 2] =
        from_stored<Scalar>(to_operand<Eigen::bfloat16>(x[d * x_stride]));
}

namespace detail {

/// `y[r] = Σ_c weight[r, c]·x[c]` for `Rows` rows of a panel.
/// \param depth in tiles
/// \param y `[Rows]`
template <int Rows, typename Scalar>
LOCAL_MHA_NOINLINE void project_lane_rows(Index depth, const Eigen::bfloat16* weight,
                                          const Scalar* x, Scalar* y) {
  // Lanes are pairs of a row.
  using P = Lanes<Scalar, (std::max)(1, static_cast<int>(block_rows<Scalar> / tile_pairs))>;
  P acc[Rows];
  LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) acc[r] = P::zero();
  for (Index tile = 0; tile < depth; ++tile, weight += tile_rows * tile_depth, x += tile_depth) {
    for (Index i = 0; i < tile_pairs; i += P::count) {
      const P even = P::load(x + i);
      const P odd = P::load(x + tile_pairs + i);
      LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) {
        P weights[2];
        // What is used up sooner than memory answers is asked for.
        prefetch(weight + r * tile_depth, 4 * tile_rows * tile_depth);
        load_pairs(weight + r * tile_depth + 2 * i, weights[0], weights[1]);
        acc[r] = fma(odd, weights[1], fma(even, weights[0], acc[r]));
      }
    }
  }
  if constexpr (Rows == P::count) {
    alignas(64) Scalar folded[Rows * P::folded];
    LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) acc[r].fold(folded + r * P::folded);
    P::sum_folded(folded, y);
  } else {
    LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) y[r] = sum_of_lanes(acc[r]);
  }
}

}  // namespace detail

/// project_lane() of operands.
template <OperandSum Scalar>
void project_lane(const OperandWeight<Scalar>& weight, Index group, const Range& some_rows,
                  const Scalar* spread, Scalar* y, Index y_stride) {
  using namespace detail;
  // A whole tile, which is read as it lies, if there are registers for that.
  constexpr Index rows =
      Tiling<Scalar>::accumulators * (block_rows<Scalar> / tile_pairs) >= tile_rows ? tile_rows : 4;
  const Index depth = ceil_div(weight.depth(), tile_depth);
  const Index end = (std::min)(some_rows.end, weight.group_rows());
  for (Index row = some_rows.begin; row < end; row += rows) {
    alignas(64) Scalar sums[rows];
    project_lane_rows<rows>(
        depth, weight.panel(group, row / tile_rows) + row % tile_rows * tile_depth, spread, sums);
    for (Index r = 0; r < (std::min)(rows, end - row); ++r) y[(row + r) * y_stride] = sums[r];
  }
}

/// The same for all rows of the group.
template <OperandSum Scalar>
void project_lane(const OperandWeight<Scalar>& weight, Index group, const Scalar* spread, Scalar* y,
                  Index y_stride) {
  project_lane(weight, group, {0, weight.group_rows()}, spread, y, y_stride);
}

/// The same for some groups.
/// \param y `[groups][group_rows]`
template <OperandSum Scalar>
void project_lane(const OperandWeight<Scalar>& weight, const Range& groups, const Scalar* spread,
                  Scalar* y) {
  for (Index group = groups.begin; group < groups.end; ++group, y += weight.group_rows())
    project_lane(weight, group, spread, y, 1);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
