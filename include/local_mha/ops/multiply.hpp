// SPDX-License-Identifier: MIT
/// \file
/// The micro-kernel of every matrix product here, and the tiles of registers that it takes.
#pragma once

#include <algorithm>
#include <type_traits>

#include <local_mha/core/block.hpp>
#include <local_mha/core/lanes.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Sizes of the register tiles.
///
/// A product keeps `rows × blocks` Lanes of accumulators in registers, leaving eight of the
/// processor's registers for operands.
template <typename Scalar>
struct Tiling {
  using L = Lanes<Scalar>;
  static constexpr int registers = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS;
  static constexpr int accumulators = registers / L::packets - 8 / L::packets;
  /// Rows of a weight, or keys, that one micro-kernel takes. Divides block_rows.
  static constexpr int rows = accumulators >= 8 ? 8 : accumulators >= 4 ? 4 : 2;
  /// Blocks of positions that one micro-kernel of a projection takes.
  static constexpr int blocks = (std::max)(1, accumulators / rows);
  /// Whether a micro-kernel of so many blocks has instructions to spare for fetching its operands:
  /// a single packet's rows, which is all that registers hold without AVX-512, have none.
  static constexpr bool may_fetch(int some_blocks) {
    return some_blocks * (sizeof(typename L::Packet) == 64 ? L::packets : 1) > 1;
  }
  /// Keys that one micro-kernel of the attention takes, where a block has so many left: what fits
  /// beside one Lanes of queries and a key. Fewer multiply-adds in flight than 8 wait for each
  /// other.
  static constexpr int keys = std::clamp((registers - L::packets - 2) / L::packets, rows, 8);
  /// Keys that one micro-kernel takes for half of the queries, to save the rest where no other sees
  /// them; 0 where that saves nothing.
  static constexpr int half_keys = Lanes<Scalar, 2>::packets == 1 && L::count >= 16 ? 8 : 0;
  /// Channels of the values that one micro-kernel of the attention takes; and keys that one of its
  /// backward pass takes, where this divides block_rows.
  static constexpr int values = L::packets == 1 && accumulators >= 16 ? 16 : keys;

  /// Whether a micro-kernel of `most` rows is next where `left` are left, of micro-kernels of
  /// `most` and of `rows`: none may count a row twice.
  template <int most>
  static constexpr bool is_next(Index left) {
    return most == rows || left == most || left >= most + rows;
  }
};

/// Channels rounded up to whole micro-kernels: the room of a block.
template <typename Scalar>
constexpr Index padded_channels(Index channels) {
  return ceil_div(channels, Tiling<Scalar>::rows) * Tiling<Scalar>::rows;
}

/// How many depths before it is needed an operand of multiply() is fetched; 0: when the processor
/// sees fit, which is too late for what comes from the last cache.
struct Ahead {
  Index a = 0;  ///< only if the rows of a depth adjoin: one cache line is asked for
  Index x = 0;
};

namespace detail {

/// Lanes of an operand, as they lie.
template <typename L, typename Storage>
LOCAL_MHA_INLINE auto load_operand(const Storage* from) {
  if constexpr (std::is_same_v<Storage, Pair>)
    return PairLanes<L>::load(from);
  else
    return load_stored<L>(from);
}

}  // namespace detail

/// `acc[r][b] += Σ_d a[r, d] · x[b][d]`: the micro-kernel.
/// \tparam Operand a Scalar, or a Pair of neighbours in depth, as x then is
/// \param row_stride, depth_stride where `a[r, d]` lies: at `a + r·row_stride + d·depth_stride`.
///        Constants where the caller has them as such
/// \param x for each block of positions, `[depth][block_rows]`, from the lanes on that count, as
///        they are stored
template <Ahead ahead = Ahead{}, int Rows, int Blocks, typename Operand, typename Scalar, int Parts,
          typename Storage>
LOCAL_MHA_INLINE void multiply(Index depth, const Operand* a, Index row_stride, Index depth_stride,
                               const Storage* const (&x)[Blocks],
                               Lanes<Scalar, Parts> (&acc)[Rows][Blocks]) {
  using L = Lanes<Scalar, Parts>;
  LOCAL_MHA_UNROLL_4 for (Index d = 0; d < depth; ++d) {
    decltype(detail::load_operand<L>(x[0])) lanes[Blocks];
    LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) lanes[b] =
        detail::load_operand<L>(x[b] + d * block_rows<Scalar>);
    if constexpr (ahead.a > 0) prefetch(a, (d + ahead.a) * depth_stride);
    if constexpr (ahead.x > 0) {
      LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b)
          prefetch(x[b], (d + ahead.x) * block_rows<Scalar>);
    }
    LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) {
      const Operand& weight = a[r * row_stride + d * depth_stride];
      LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) acc[r][b] =
          fma(weight, lanes[b], acc[r][b]);
    }
  }
}

/// multiply() of one block for the first (0) or the second (1) half of its lanes, which is a
/// packet.
template <int Half, int Rows, typename Scalar>
LOCAL_MHA_INLINE void multiply_half(Index depth, const Scalar* a, Index row_stride,
                                    Index depth_stride, const Scalar* x,
                                    Lanes<Scalar> (&acc)[Rows][1]) {
  using L = Lanes<Scalar, 2>;
  static_assert(L::packets == 1 && Lanes<Scalar>::packets == 2);
  L part[Rows][1];
  LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) part[r][0].packet[0] = acc[r][0].packet[Half];
  const Scalar* const from[1] = {x + Half * L::count};
  multiply(depth, a, row_stride, depth_stride, from, part);
  LOCAL_MHA_UNROLL for (int r = 0; r < Rows; ++r) acc[r][0].packet[Half] = part[r][0].packet[0];
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
