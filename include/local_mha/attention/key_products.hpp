// SPDX-License-Identifier: MIT
/// \file
/// Products of the rows that a store keeps, keys or values, with a block of rows: scores, and what
/// the gradients of probabilities are made of.
///
///     product[key][lane] = Σ_c keys[key][c]·rows[c][lane]
#pragma once

#include <type_traits>

#include <local_mha/attention/operand_ring.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/compiler.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/multiply.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// A block of rows as it is multiplied with keys, and buffers for that.
template <typename Scalar, typename Arithmetic = Scalar>
class BlockOperands {
  static constexpr bool of_operands = !std::is_same_v<Arithmetic, Scalar>;

 public:
  BlockOperands() = default;
  explicit BlockOperands(Index channels) : channels_(channels) {
    if (of_operands) pairs_ = make_operand_buffer(pairs_of(channels) * block_rows<Scalar>);
  }

  /// \param block `[channels][block_rows]`
  /// \return valid until the next block, and as long as this one
  const auto* of(const Scalar* block) {
    if constexpr (of_operands) {
      pack_block(channels_, block, pairs_.data());
      return static_cast<const Pair*>(pairs_.data());
    } else {
      return block;
    }
  }
  /// Such as they are already.
  const Pair* of(const Pair* operands) { return operands; }
  /// Of rows, `[channels]`, times a factor: those of some lanes, the others become 0.
  const Pair* of_rows(LaneRange lanes, const StridedRows<const Scalar>& row, const Scalar& factor) {
    pack_scaled(lanes, row, factor, pairs_.data());
    return pairs_.data();
  }

 private:
  LOCAL_MHA_FLATTEN void pack_scaled(LaneRange lanes, const StridedRows<const Scalar>& row,
                                     const Scalar& factor, Pair* to) const {
    using L = Lanes<Scalar>;
    const L scale = L::broadcast(factor);
    const auto lanes_of = [&](Index r, Index c) {
      return r < lanes.begin ? L::zero() : scale * load_row<L>(row(r), c, channels_);
    };
    for (Index c = 0; c < channels_; c += tile_depth, to += tile_pairs * L::count) {
      alignas(64) Pair tile[tile_pairs * L::count];
      pack_rows<Scalar>(lanes.end, [&](Index r, Index i) { return lanes_of(r, c + i); }, tile);
      transpose_pairs_in<Scalar>(tile, to);
    }
  }

  Index channels_ = 0;
  BlockBuffer<Pair> pairs_;  // where they are operands
};

/// The product of adjoining keys of a block, in registers.
/// \param from the first of them
/// \param rows as BlockOperands has them, from the first lane on that counts
/// \param product 0 at first
template <int Number, typename Scalar, int Parts>
LOCAL_MHA_INLINE void multiply_keys(const Ring<Scalar>& keys, const Scalar* from,
                                    const Scalar* rows,
                                    Lanes<Scalar, Parts> (&product)[Number][1]) {
  const Scalar* const x[1] = {rows};
  multiply(keys.channels(), from, keys.position_stride(), keys.channel_stride(), x, product);
}
template <int Number, typename Scalar, int Parts>
LOCAL_MHA_INLINE void multiply_keys(const KeyOperands<Scalar>& keys, const Pair* from,
                                    const Pair* rows, Lanes<Scalar, Parts> (&product)[Number][1]) {
  for (Index tile = 0; tile < keys.tiles(); ++tile, from += keys.tile) {
    const Pair* const x[1] = {rows + tile * tile_pairs * block_rows<Scalar>};
    multiply(tile_pairs, from, keys.position_stride(), 1, x, product);
  }
}

#if defined(LOCAL_MHA_AMX)
/// The product of a block of keys, by the matrix unit, which is the caller's.
/// \param keys `[tiles][block_rows][tile_pairs]`
/// \param tiles in the depth
/// \param rows as BlockOperands has them
/// \param product `[block_rows][block_rows]`
inline void multiply_keys_by_matrix_unit(const Pair* keys, Index tiles, const Pair* rows,
                                         float* product) {
  using Sums = TileSums<2>;
  constexpr Index tile = KeyOperands<float>::tile;
  constexpr Index half = tile_rows * KeyOperands<float>::position_stride();
  Sums::zero();
  for (Index t = 0; t < tiles; ++t)
    Sums::add({keys + t * tile, keys + t * tile + half}, KeyOperands<float>::position_stride(),
              rows + t * tile);
  Sums::store({product, product + tile_rows * block_rows<float>});
}
#endif

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail

LOCAL_MHA_INT_BOUNDS_END
