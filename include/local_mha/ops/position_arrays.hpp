// SPDX-License-Identifier: MIT
/// \file
/// Where a product over positions finds its operands: one as blocks, `[channel][position]`, the
/// other as panels, `[position][channel]`.
#pragma once

#include <algorithm>
#include <type_traits>

#include <Eigen/Core>

#include <local_mha/core/block.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>

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

/// How a product over positions takes them: block by block, or of operands a tile's blocks at a
/// time, as pairs.
template <typename Scalar, typename Arithmetic = Scalar>
struct PositionTiles {
  static constexpr bool of_operands = !std::is_same_v<Scalar, Arithmetic>;
  static_assert(!of_operands ||
                (std::is_same_v<Scalar, float> && std::is_same_v<Arithmetic, Eigen::bfloat16>));
  /// What lies there.
  using Number = std::conditional_t<of_operands, detail::Pair, Scalar>;
  /// Blocks of a tile.
  static constexpr Index blocks =
      of_operands ? (std::max)(Index{1}, detail::tile_depth / block_rows<Scalar>) : 1;
  /// Numbers of a block's channel.
  static constexpr Index of_block = block_rows<Scalar> / (of_operands ? 2 : 1);
  /// Numbers of a tile's channel.
  static constexpr Index depth = blocks * of_block;

  static constexpr Index count(Index some_blocks) { return ceil_div(some_blocks, blocks); }
};

/// Blocks of many positions, `[blocks][channels][block_rows]`, without values until they are
/// written.
/// \tparam Arithmetic what they are multiplied as, see can_multiply
template <typename Scalar, typename Arithmetic = Scalar>
class BlockArray {
 public:
  BlockArray() = default;
  BlockArray(Index blocks, Index channels) { prepare(blocks, channels); }

  /// Resizes to that many, without values.
  void prepare(Index blocks, Index channels) {
    resize_without_values(data_, blocks * channels * block_rows<Scalar>);
    stride_ = channels * block_rows<Scalar>;
  }

  Scalar* operator[](Index b) { return data_.data() + b * stride_; }
  const Scalar* operator[](Index b) const { return data_.data() + b * stride_; }
  /// From block to block.
  Index stride() const { return stride_; }
  Index channels() const { return stride_ / block_rows<Scalar>; }

  /// Where Scalars of a block's channels from `first` on are written before put() takes them: where
  /// they stay. Of operands, it is `aside`.
  Scalar* room(Index block, Index first, Scalar*) {
    return (*this)[block] + first * block_rows<Scalar>;
  }
  /// Takes a block's channels from `first` on.
  /// \param from `[channels][block_rows]`, in room() or elsewhere
  void put(Index block, Index first, Index channels, const Scalar* from) {
    Scalar* const to = room(block, first, nullptr);
    if (from != to) std::copy_n(from, channels * block_rows<Scalar>, to);
  }

 private:
  Index stride_ = 0;
  BlockBuffer<Scalar> data_;
};

/// Panels of many positions, `[panel][block][position][block_rows channels]`: those of adjoining
/// blocks adjoin. Without values until put() writes them.
/// \tparam Arithmetic what they are multiplied as, see can_multiply
template <typename Scalar, typename Arithmetic = Scalar>
class PanelArray {
 public:
  PanelArray() = default;
  /// \param channels panel_channels() of those that are put here
  PanelArray(Index blocks, Index channels) { prepare(blocks, channels); }

  /// Resizes to that many, without values.
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

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
