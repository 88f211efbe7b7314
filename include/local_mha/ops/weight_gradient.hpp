// SPDX-License-Identifier: MIT
/// \file
/// What the backward passes of the matrix products have in common.
///
/// Of `y = x·Wᵀ` over many positions, the gradient of W is a sum over positions, `gᵀ·x`. One
/// operand is read as blocks, `[channel][position]`, the other as panels, `[position][channel]`, so
/// that the micro-kernel of the forward pass does this product, too, of Scalars as of operands in
/// Eigen::bfloat16. Sums go through the positions in their order, those of weights and those of
/// biases each in stretches of a fixed length: they do not depend on threads.
#pragma once

#include <algorithm>

#include <local_mha/core/block.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/position_arrays.hpp>
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/weight_gradient_operands.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// The rows of a batch of sequences in blocks: each sequence starts a block of its own.
struct BatchBlocks {
  Index batch;
  Index seqlen;
  Index block_rows;

  Index of_sequence() const { return ceil_div(seqlen, block_rows); }
  Index count() const { return batch * of_sequence(); }
  /// The first row of block `b`, counted through the batch.
  Index row(Index b) const { return b / of_sequence() * seqlen + b % of_sequence() * block_rows; }
  Index rows(Index b) const {
    return (std::min)(block_rows, seqlen - b % of_sequence() * block_rows);
  }
};

/// Blocks that one task of a backward pass takes, and whose sums are added up before they are added
/// to others: few enough to stay in the second-level cache while all weights pass, where a layer is
/// some hundred channels wide.
inline constexpr Index stretch_blocks = 12 * 64 / LOCAL_MHA_LANE_BYTES;

/// Calls `task(worker, stretch, blocks)`, see parallel_for(), for stretches of `length` blocks.
template <typename Task>
void for_each_stretch(const AnyDevice& device, Index blocks, Task&& task,
                      Index length = stretch_blocks) {
  const Index stretches = ceil_div(blocks, length);
  parallel_for(device, thread_count(device), stretches, [&](Index worker, Index stretch) {
    task(worker, stretch, Range{stretch * length, (std::min)((stretch + 1) * length, blocks)});
  });
}

/// Blocks that one task of a forward pass takes, which makes its own memory.
inline constexpr Index forward_stretch_blocks = 32 * 64 / LOCAL_MHA_LANE_BYTES;

/// Sums over positions, such as the gradient of a bias: each stretch of blocks adds up alone, lane
/// by lane, and the stretches are a long sum.
template <typename Scalar>
class StretchSums {
 public:
  StretchSums() = default;
  StretchSums(Index stretches, Index channels) { prepare(stretches, channels); }

  /// Becomes StretchSums(stretches, channels). Memory is used again.
  void prepare(Index stretches, Index channels) {
    stretches_ = stretches;
    sums_.prepare(stretches, channels);
    std::fill_n(sums_[0], stretches * sums_.stride(), Scalar(0));
  }

  /// `[channels][block_rows]`
  Scalar* operator[](Index stretch) { return sums_[stretch]; }

  /// Adds the sums of channels `[first, first + to.size())`.
  void add_to(Vector<Scalar>& to, Index first = 0) const {
    for (Index c = 0; c < to.size(); ++c) to[c] += total(first + c);
  }
  /// The sum of a channel.
  Scalar total(Index channel) const {
    LongSum<Scalar> sum(0);
    for (Index stretch = 0; stretch < stretches_; ++stretch) {
      const Scalar* lanes = sums_[stretch] + channel * block_rows<Scalar>;
      for (Index i = 0; i < block_rows<Scalar>; ++i) sum += LongSum<Scalar>(lanes[i]);
    }
    return Scalar(sum);
  }

 private:
  Index stretches_ = 0;
  BlockArray<Scalar> sums_;
};

namespace detail {

// weight[r][c] += Σ_t Σ_i a(t)[r][i] · x(t)[c][i] for Rows rows and Panels panels of columns.
template <int Rows, int Panels, typename Scalar, typename Arithmetic>
void add_weight_tile(const Range& tiles,
                     const typename PositionTiles<Scalar, Arithmetic>::Number* a, Index a_stride,
                     const PanelArray<Scalar, Arithmetic>& x, Index first_panel, Index cols,
                     Scalar* weight, Index weight_stride) {
  using L = Lanes<Scalar>;
  using Number = typename PositionTiles<Scalar, Arithmetic>::Number;
  constexpr Index count = block_rows<Scalar>;
  constexpr Index depth = PositionTiles<Scalar, Arithmetic>::depth;
  L acc[Rows][Panels];
  LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) {
    LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) acc[r][p] = L::zero();
  }
  for (Index t = tiles.begin; t < tiles.end; ++t) {
    const Number* from[Panels];
    LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) from[p] =
        x.panel(first_panel + p) + t * depth * count;
    const Number* rows = a + t * a_stride;
    // The next tile's rows are far away.
    LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) prefetch(rows, a_stride + r * depth);
    multiply<Ahead{.x = count / 2}>(depth, rows, depth, 1, from, acc);
  }
  LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) {
    LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p)
        add_to_row(acc[r][p], cols - p * count, weight + r * weight_stride + p * count);
  }
}

// add_weight_gradient() for `rows` rows of `a` and some panels of x.
// `cols` are there from the first of these panels on.
template <typename Scalar, typename Arithmetic>
void add_weight_tiles(Index blocks, const typename PositionTiles<Scalar, Arithmetic>::Number* a,
                      Index a_stride, Index rows, const PanelArray<Scalar, Arithmetic>& x,
                      const Range& panels, Index cols, Scalar* weight, Index weight_stride) {
  using Tiles = PositionTiles<Scalar, Arithmetic>;
  constexpr int most_rows = Tiling<Scalar>::rows;
  constexpr int most_panels = Tiling<Scalar>::blocks;
  constexpr Index count = block_rows<Scalar>;
  // Tiles that are summed up in registers: more would leave the cache from tile to tile.
  constexpr Index depth = 32 * 64 / LOCAL_MHA_LANE_BYTES / Tiles::blocks;
  const Index tiles = Tiles::count(blocks);
  for (Index begin = 0; begin < tiles; begin += depth) {
    const Range some{begin, (std::min)(begin + depth, tiles)};
#if defined(LOCAL_MHA_AMX)
    if constexpr (Tiles::of_operands) {
      if (has_matrix_unit()) {
        add_weight_tiles_by_matrix_unit(some, a, a_stride, rows, x, panels, cols, weight,
                                        weight_stride);
        continue;
      }
    }
#endif
    Index panel = panels.begin;
    const auto next_panels = [&]<int Panels>() {
      const Index c = (panel - panels.begin) * count;
      const auto next_rows = [&]<int Rows>(Index r) {
        add_weight_tile<Rows, Panels>(some, a + r * Tiles::depth, a_stride, x, panel, cols - c,
                                      weight + r * weight_stride + c, weight_stride);
      };
      Index r = 0;
      for (; r + most_rows <= rows; r += most_rows) next_rows.template operator()<most_rows>(r);
      for (; r < rows; ++r) next_rows.template operator()<1>(r);
      panel += Panels;
    };
    while (panel < panels.end) {
      const Index left = panels.end - panel;
      if constexpr (most_panels == 3) {
        // Two pairs of panels are faster than three and a single one.
        if (left == 2 || left == 4) {
          next_panels.template operator()<2>();
          continue;
        }
      }
      if (left >= most_panels)
        next_panels.template operator()<most_panels>();
      else
        next_panels.template operator()<1>();
    }
  }
}

}  // namespace detail

/// Rows or columns of a weight that come in groups, such as those of heads.
struct Groups {
  Index number;
  Index size;
  /// From group to group in blocks and panels: what fills a group up lies there, but not in the
  /// weight.
  Index padded_size;

  /// Groups that adjoin, as one.
  static Groups of(Index number, Index size, Index padded_size) {
    if (size == padded_size) return {1, number * size, number * size};
    return {number, size, padded_size};
  }
  static Groups of(Index size) { return of(1, size, size); }
};

/// `weight[r, c] += Σ_b Σ_i a(b)[r][i] · x(b)[c][i]`, on threads, which share the weight.
/// \param a, a_stride the first of the blocks `[rows][block_rows]`, and from one to the next; of
///        operands, what a BlockArray says
/// \param x the columns' panels: a group starts with a panel of its own
/// \param weight `[rows][columns]`, to be added to
template <typename Scalar, typename Arithmetic>
void add_weight_gradient(const AnyDevice& device, Index blocks,
                         const typename PositionTiles<Scalar, Arithmetic>::Number* a,
                         Index a_stride, const Groups& rows,
                         const PanelArray<Scalar, Arithmetic>& x, const Groups& cols,
                         Scalar* weight) {
  using Tiles = PositionTiles<Scalar, Arithmetic>;
  constexpr Index count = block_rows<Scalar>;
  // Rows that a micro-kernel takes.
  constexpr Index together = Tiles::of_operands ? detail::tile_rows : Tiling<Scalar>::rows;
  const Index threads = thread_count(device);
  const Index panels = ceil_div(cols.size, count);
  const Index weight_stride = cols.number * cols.size;
  // A large part of the weight reads its operands less often than small ones do, but threads need
  // several parts each.
  Index rows_of_task = std::clamp<Index>(rows.size, 1, 192);
  Index panels_of_task = std::clamp<Index>(panels, 1, 32);
  const auto row_tasks = [&] { return ceil_div(rows.size, rows_of_task); };
  const auto panel_tasks = [&] { return ceil_div(panels, panels_of_task); };
  const auto all_tasks = [&] { return rows.number * row_tasks() * cols.number * panel_tasks(); };
  while (threads > 1 && all_tasks() < 4 * threads && (panels_of_task > 4 || rows_of_task > 24)) {
    if (panels_of_task > 4)
      panels_of_task = ceil_div(panels_of_task, 2);
    else
      rows_of_task = ceil_div(rows_of_task, 2 * together) * together;
  }
  parallel_for(device, threads, all_tasks(), [&](Index, Index task) {
    const Index panel_begin = task % panel_tasks() * panels_of_task;
    const Index column_group = task / panel_tasks() % cols.number;
    const Index rest = task / panel_tasks() / cols.number;
    const Index row = rest % row_tasks() * rows_of_task;
    const Index row_group = rest / row_tasks();
    const Index first_panel = column_group * (cols.padded_size / count);
    const Index column = panel_begin * count;
    detail::add_weight_tiles(
        blocks, a + (row_group * rows.padded_size + row) * Tiles::depth, a_stride,
        (std::min)(rows_of_task, rows.size - row), x,
        {first_panel + panel_begin, first_panel + (std::min)(panel_begin + panels_of_task, panels)},
        cols.size - column,
        weight + (row_group * rows.size + row) * weight_stride + column_group * cols.size + column,
        weight_stride);
  });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
