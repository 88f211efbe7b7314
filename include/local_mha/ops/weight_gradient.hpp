// SPDX-License-Identifier: MIT
/// \file
/// What the backward passes of the matrix products have in common.
///
/// Of `y = x·Wᵀ` over many positions, the gradient of W is a sum over positions, `gᵀ·x`. One
/// operand is read as blocks, `[channel][position]`, the other as panels, `[position][channel]`, so
/// that the micro-kernel of the forward pass does this product, too. Sums go through the positions
/// in their order, those of weights and those of biases each in stretches of a fixed length: they
/// do not depend on threads.
#pragma once

#include <algorithm>
#include <iterator>
#include <string>
#include <type_traits>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/project.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Channels rounded up to whole panels of block_rows channels.
template <typename Scalar>
constexpr Index panel_channels(Index channels) {
  return ceil_div(channels, block_rows<Scalar>) * block_rows<Scalar>;
}

/// Transposes a block `[channels][block_rows]` into panels `[panel][position][block_rows
/// channels]`; channels that fill up the last panel become 0.
/// \param panel_stride from panel to panel
template <typename Scalar>
void block_to_panels(Index channels, const Scalar* block, Scalar* panels,
                     Index panel_stride = block_rows<Scalar> * block_rows<Scalar>) {
  constexpr Index count = block_rows<Scalar>;
  for (Index c = 0; c < channels; c += count, panels += panel_stride)
    load_block(count, (std::min)(count, channels - c), StridedRows{block, count, c}, panels);
}

/// The reverse of block_to_panels().
template <typename Scalar>
void panels_to_block(Index channels, const Scalar* panels, Scalar* block) {
  constexpr Index count = block_rows<Scalar>;
  for (Index c = 0; c < channels; c += count)
    store_block(count, (std::min)(count, channels - c), panels + c * count,
                StridedRows{block, count, c});
}

/// Blocks of many positions, `[blocks][channels][block_rows]`, without values until they are
/// written.
template <typename Scalar>
class BlockArray {
 public:
  BlockArray() = default;
  BlockArray(Index blocks, Index channels) { prepare(blocks, channels); }

  /// Becomes room for that many, without values.
  void prepare(Index blocks, Index channels) {
    resize_without_values(data_, blocks * channels * block_rows<Scalar>);
    stride_ = channels * block_rows<Scalar>;
  }

  Scalar* operator[](Index b) { return data_.data() + b * stride_; }
  const Scalar* operator[](Index b) const { return data_.data() + b * stride_; }
  /// From block to block.
  Index stride() const { return stride_; }
  Index channels() const { return stride_ / block_rows<Scalar>; }

 private:
  Index stride_ = 0;
  BlockBuffer<Scalar> data_;
};

/// Panels of many positions, `[panel][block][position][block_rows channels]`: those of adjoining
/// blocks adjoin. Without values until put() writes them.
template <typename Scalar>
class PanelArray {
 public:
  PanelArray() = default;
  /// \param channels panel_channels() of those that are put here
  PanelArray(Index blocks, Index channels) { prepare(blocks, channels); }

  /// Becomes room for that many, without values.
  void prepare(Index blocks, Index channels) {
    resize_without_values(data_, blocks * channels * block_rows<Scalar>);
    stride_ = blocks * size;
  }

  /// Takes a block's channels, of which the first is that of panel `first`.
  void put(Index block, Index first, Index channels, const Scalar* from) {
    block_to_panels(channels, from, data_.data() + first * stride_ + block * size, stride_);
  }

  /// Panel `p`, `[block][position][block_rows channels]`.
  const Scalar* panel(Index p) const { return data_.data() + p * stride_; }

 private:
  static constexpr Index size = block_rows<Scalar> * block_rows<Scalar>;

  Index stride_ = 0;
  BlockBuffer<Scalar> data_;
};

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

// weight[r][c] += Σ_b Σ_i a(b)[r][i] · x(b)[c][i] for Rows rows and Panels panels of columns.
template <int Rows, int Panels, typename Scalar>
void add_weight_tile(const Range& blocks, const Scalar* a, Index a_stride,
                     const PanelArray<Scalar>& x, Index first_panel, Index cols, Scalar* weight,
                     Index weight_stride) {
  using L = Lanes<Scalar>;
  constexpr Index count = block_rows<Scalar>;
  L acc[Rows][Panels];
  LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) {
    LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) acc[r][p] = L::zero();
  }
  for (Index b = blocks.begin; b < blocks.end; ++b) {
    const Scalar* from[Panels];
    LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) from[p] =
        x.panel(first_panel + p) + b * count * count;
    const Scalar* rows = a + b * a_stride;
    // The next block's rows are far away.
    LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) prefetch(rows, a_stride + r * count);
    multiply<Ahead{.x = count / 2}>(count, rows, count, 1, from, acc);
  }
  LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) {
    LOCAL_MHA_UNROLL for (int p = 0; p < Panels; ++p) {
      Scalar* to = weight + r * weight_stride + p * count;
      if (cols >= (p + 1) * count) {
        (L::load_unaligned(to) + acc[r][p]).store_unaligned(to);
        continue;
      }
      alignas(64) Scalar sum[count];
      acc[r][p].store(sum);
      for (Index c = 0; c < cols - p * count; ++c) to[c] += sum[c];
    }
  }
}

// add_weight_gradient() for `rows` rows of `a` and some panels of x.
// `cols` are there from the first of these panels on.
template <typename Scalar>
void add_weight_tiles(Index blocks, const Scalar* a, Index a_stride, Index rows,
                      const PanelArray<Scalar>& x, const Range& panels, Index cols, Scalar* weight,
                      Index weight_stride) {
  constexpr int most_rows = Tiling<Scalar>::rows;
  constexpr int most_panels = Tiling<Scalar>::blocks;
  constexpr Index count = block_rows<Scalar>;
  // Blocks that are summed up in registers: more would leave the cache from tile to tile.
  constexpr Index depth = 32 * 64 / LOCAL_MHA_LANE_BYTES;
  for (Index begin = 0; begin < blocks; begin += depth) {
    const Range some{begin, (std::min)(begin + depth, blocks)};
    Index panel = panels.begin;
    const auto next_panels = [&]<int Panels>() {
      const Index c = (panel - panels.begin) * count;
      const auto next_rows = [&]<int Rows>(Index r) {
        add_weight_tile<Rows, Panels>(some, a + r * count, a_stride, x, panel, cols - c,
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
/// \param a blocks `[rows][block_rows]`, `a_stride` apart
/// \param x the columns' panels: a group starts with a panel of its own
/// \param weight `[rows][columns]`, to be added to
template <typename Scalar>
void add_weight_gradient(const AnyDevice& device, Index blocks, const Scalar* a, Index a_stride,
                         const Groups& rows, const PanelArray<Scalar>& x, const Groups& cols,
                         Scalar* weight) {
  constexpr Index count = block_rows<Scalar>;
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
      rows_of_task = ceil_div(rows_of_task, 2 * Tiling<Scalar>::rows) * Tiling<Scalar>::rows;
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
        blocks, a + (row_group * rows.padded_size + row) * count, a_stride,
        (std::min)(rows_of_task, rows.size - row), x,
        {first_panel + panel_begin, first_panel + (std::min)(panel_begin + panels_of_task, panels)},
        cols.size - column,
        weight + (row_group * rows.size + row) * weight_stride + column_group * cols.size + column,
        weight_stride);
  });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
