// SPDX-License-Identifier: MIT
/// \file
/// Products over positions of operands in Eigen::bfloat16: where they lie, as pairs of positions
/// that are neighbours, and how the matrix unit multiplies them.
///
/// Blocks lie together in tiles, as many as fill the depth of a tile of the matrix unit.
#pragma once

#include <algorithm>
#include <concepts>

#include <Eigen/Core>

#include <local_mha/core/block.hpp>
#include <local_mha/core/lanes.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/position_arrays.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Blocks of operands, `[tile][channel][positions of a tile's blocks]`, a tile being of
/// PositionTiles. Without values until put() writes them, but for what fills up the last tile.
template <std::same_as<float> Scalar>
class BlockArray<Scalar, Eigen::bfloat16> {
  using Tiles = PositionTiles<Scalar, Eigen::bfloat16>;

 public:
  BlockArray() = default;
  BlockArray(Index blocks, Index channels) { prepare(blocks, channels); }

  /// Becomes room for that many, without values.
  void prepare(Index blocks, Index channels) {
    stride_ = channels * Tiles::depth;
    const Index size = Tiles::count(blocks) * stride_;
    // Those of the matrix unit take so many channels behind the first.
    const Index behind = (detail::tile_rows - 1) * Tiles::depth;
    resize_without_values(data_, size + behind);
    const Index whole = blocks / Tiles::blocks * stride_;
    std::fill(data_.begin() + whole, data_.end(), detail::Pair{});
  }

  /// Block `b`: `[channel][pairs]`, with the pairs of a tile from channel to channel.
  const detail::Pair* operator[](Index b) const { return data_.data() + place(b); }
  /// From tile to tile.
  Index stride() const { return stride_; }
  Index channels() const { return stride_ / Tiles::depth; }

  /// Where Scalars of a block are written before put() takes them.
  Scalar* room(Index, Index, Scalar* aside) { return aside; }
  /// Takes a block's channels from `first` on, which it rounds.
  /// \param from `[channels][block_rows]`
  LOCAL_MHA_FLATTEN void put(Index block, Index first, Index channels, const Scalar* from) {
    using L = Lanes<Scalar>;
    detail::Pair* const pairs = data_.data() + place(block) + first * Tiles::depth;
    auto* to = reinterpret_cast<Eigen::bfloat16*>(pairs);
    for (Index c = 0; c < channels; ++c, from += L::count, to += 2 * Tiles::depth)
      detail::store_operands(L::load(from), to);
  }

 private:
  Index place(Index b) const {
    return b / Tiles::blocks * stride_ + b % Tiles::blocks * Tiles::of_block;
  }

  Index stride_ = 0;
  BlockBuffer<detail::Pair> data_;
};

/// Panels of operands, `[panel][tile][pair of positions][block_rows channels]`, a tile being of
/// PositionTiles. Without values until put() writes them, but for what fills up the last tile.
template <std::same_as<float> Scalar>
class PanelArray<Scalar, Eigen::bfloat16> {
  using Tiles = PositionTiles<Scalar, Eigen::bfloat16>;
  static constexpr Index count = block_rows<Scalar>;

 public:
  PanelArray() = default;
  /// \param channels panel_channels() of those that are put here
  PanelArray(Index blocks, Index channels) { prepare(blocks, channels); }

  /// Becomes room for that many, without values.
  void prepare(Index blocks, Index channels) {
    const Index panels = channels / count;
    stride_ = Tiles::count(blocks) * size;
    resize_without_values(data_, panels * stride_);
    const Index whole = blocks / Tiles::blocks * size;
    for (Index p = 0; p < panels; ++p)
      std::fill(data_.begin() + p * stride_ + whole, data_.begin() + (p + 1) * stride_,
                detail::Pair{});
  }

  /// Takes a block's channels, of which the first is that of panel `first`, and rounds them.
  void put(Index block, Index first, Index channels, const Scalar* from) {
    alignas(64) Scalar panel[count * count];
    detail::Pair* to = data_.data() + first * stride_ + block / Tiles::blocks * size +
                       block % Tiles::blocks * Tiles::of_block * count;
    for (Index c = 0; c < channels; c += count, to += stride_) {
      block_to_panels((std::min)(count, channels - c), from + c * count, panel);
      detail::pack_channels(count, panel, to);
    }
  }

  /// Panel `p`, `[tile][pair of positions][block_rows channels]`.
  const detail::Pair* panel(Index p) const { return data_.data() + p * stride_; }

 private:
  static constexpr Index size = Tiles::depth * count;

  Index stride_ = 0;
  BlockBuffer<detail::Pair> data_;
};

namespace detail {

/// Adds a sum of each column to those of a weight, of which `cols` are there.
template <typename L, typename Scalar>
LOCAL_MHA_INLINE void add_to_row(const L& sum, Index cols, Scalar* to) {
  if (cols >= L::count) {
    (L::load_unaligned(to) + sum).store_unaligned(to);
    return;
  }
  alignas(64) Scalar sums[L::count];
  sum.store(sums);
  for (Index c = 0; c < cols; ++c) to[c] += sums[c];
}

#if defined(LOCAL_MHA_AMX)
/// add_weight_tile() of `RowTiles` times tile_rows rows, of which `rows` are there.
template <int RowTiles, int Panels>
LOCAL_MHA_NOINLINE void add_weight_tile_by_matrix_unit(const Range& tiles, const Pair* a,
                                                       Index a_stride, Index rows,
                                                       const PanelArray<float, Eigen::bfloat16>& x,
                                                       Index first_panel, Index cols, float* weight,
                                                       Index weight_stride) {
  static_assert(RowTiles <= 2 && Panels <= 2);
  using Unit = MatrixUnit;
  using L = Lanes<float>;
  constexpr Index tile = tile_rows * tile_pairs;
  const Pair* const first = x.panel(first_panel);
  const Pair* const second = Panels == 2 ? x.panel(first_panel + 1) : first;
  Unit::zero<0>();
  if constexpr (Panels == 2) Unit::zero<1>();
  if constexpr (RowTiles == 2) Unit::zero<2>();
  if constexpr (RowTiles == 2 && Panels == 2) Unit::zero<3>();
  for (Index t = tiles.begin; t < tiles.end; ++t) {
    const Pair* const of_rows = a + t * a_stride;
    // The next tile's rows are far away.
    LOCAL_MHA_UNROLL for (int r = 0; r < RowTiles * tile_rows; ++r)
        prefetch(of_rows, a_stride + r * tile_pairs);
    Unit::load<4>(of_rows);
    Unit::load<6>(first + t * tile);
    Unit::multiply<0, 4, 6>();
    if constexpr (Panels == 2) {
      Unit::load<7>(second + t * tile);
      Unit::multiply<1, 4, 7>();
    }
    if constexpr (RowTiles == 2) {
      Unit::load<5>(of_rows + tile);
      Unit::multiply<2, 5, 6>();
      if constexpr (Panels == 2) Unit::multiply<3, 5, 7>();
    }
  }
  alignas(64) float sums[RowTiles][Panels][tile_rows * L::count];
  Unit::store<0>(sums[0][0]);
  if constexpr (Panels == 2) Unit::store<1>(sums[0][1]);
  if constexpr (RowTiles == 2) Unit::store<2>(sums[1][0]);
  if constexpr (RowTiles == 2 && Panels == 2) Unit::store<3>(sums[1][1]);
  for (Index r = 0; r < (std::min)(rows, RowTiles * tile_rows); ++r)
    for (int p = 0; p < Panels; ++p)
      add_to_row(L::load(sums[r / tile_rows][p] + r % tile_rows * L::count), cols - p * L::count,
                 weight + r * weight_stride + p * L::count);
}

/// add_weight_tiles() of some tiles by the matrix unit.
inline void add_weight_tiles_by_matrix_unit(const Range& tiles, const Pair* a, Index a_stride,
                                            Index rows, const PanelArray<float, Eigen::bfloat16>& x,
                                            const Range& panels, Index cols, float* weight,
                                            Index weight_stride) {
  constexpr Index count = block_rows<float>;
  const MatrixUnit unit;
  const auto pass = [&]<int RowTiles, int Panels>(Index r, Index panel) {
    const Index c = (panel - panels.begin) * count;
    add_weight_tile_by_matrix_unit<RowTiles, Panels>(tiles, a + r * tile_pairs, a_stride, rows - r,
                                                     x, panel, cols - c,
                                                     weight + r * weight_stride + c, weight_stride);
  };
  for (Index panel = panels.begin; panel < panels.end; panel += 2) {
    const bool both = panel + 2 <= panels.end;
    Index r = 0;
    for (; r + tile_rows < rows; r += 2 * tile_rows)
      both ? pass.template operator()<2, 2>(r, panel) : pass.template operator()<2, 1>(r, panel);
    if (r < rows)
      both ? pass.template operator()<1, 2>(r, panel) : pass.template operator()<1, 1>(r, panel);
  }
}
#endif

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
