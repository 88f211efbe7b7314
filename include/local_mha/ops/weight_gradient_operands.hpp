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

  /// Resizes to that many, without values.
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

  /// Resizes to that many, without values.
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
/// add_weight_tile() of a panel and `RowTiles` times tile_rows rows, of which `rows` are there.
/// \param panel of x, from its first tile on
template <int RowTiles>
LOCAL_MHA_NOINLINE void add_weight_tile_by_matrix_unit(const Range& tiles, const Pair* a,
                                                       Index a_stride, Index rows,
                                                       const Pair* panel, Index cols, float* weight,
                                                       Index weight_stride) {
  using Sums = TileSums<RowTiles>;
  using L = Lanes<float>;
  constexpr Index tile = tile_rows * tile_pairs;
  Sums::zero();
  for (Index t = tiles.begin; t < tiles.end; ++t) {
    const Pair* const of_rows = a + t * a_stride;
    // The next tile's rows are far away.
    LOCAL_MHA_UNROLL for (int r = 0; r < RowTiles * tile_rows; ++r)
        prefetch(of_rows, a_stride + r * tile_pairs);
    const Pair* row_tiles[RowTiles];
    for (int r = 0; r < RowTiles; ++r) row_tiles[r] = of_rows + r * tile;
    Sums::add(row_tiles, tile_pairs, panel + t * tile_pairs * L::count);
  }
  alignas(64) float sums[RowTiles][tile_rows * L::count];
  float* to[RowTiles];
  for (int r = 0; r < RowTiles; ++r) to[r] = sums[r];
  Sums::store(to);
  for (Index r = 0; r < (std::min)(rows, RowTiles * tile_rows); ++r)
    add_to_row(L::load(sums[r / tile_rows] + r % tile_rows * L::count), cols,
               weight + r * weight_stride);
}

/// add_weight_tiles() of some tiles by the matrix unit.
inline void add_weight_tiles_by_matrix_unit(const Range& tiles, const Pair* a, Index a_stride,
                                            Index rows, const PanelArray<float, Eigen::bfloat16>& x,
                                            const Range& panels, Index cols, float* weight,
                                            Index weight_stride) {
  const MatrixUnit unit;
  const auto pass = [&]<int RowTiles>(Index r, Index panel) {
    const Index c = (panel - panels.begin) * block_rows<float>;
    add_weight_tile_by_matrix_unit<RowTiles>(tiles, a + r * tile_pairs, a_stride, rows - r,
                                             x.panel(panel), cols - c,
                                             weight + r * weight_stride + c, weight_stride);
  };
  for (Index panel = panels.begin; panel < panels.end; ++panel) {
    Index r = 0;
    for (; r + tile_rows < rows; r += 2 * tile_rows) pass.template operator()<2>(r, panel);
    if (r < rows) pass.template operator()<1>(r, panel);
  }
}
#endif

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
