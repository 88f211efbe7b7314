// SPDX-License-Identifier: MIT
/// \file
/// Operands of products in Eigen::bfloat16, which are added up in float.
///
/// A number becomes an operand by rounding to the nearest one, ties to the even one; what is
/// smaller than the smallest normal number, 2^-126, becomes 0, for instructions take it for that.
/// Two that are neighbours in the depth of a product lie in one word of 32 bits, as a float does,
/// so that the same loops serve both. The product of two is exact in float.
#pragma once

#include <local_mha/core/requirements.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <Eigen/Core>

#include <local_mha/core/block.hpp>
#include <local_mha/core/compiler.hpp>
#include <local_mha/core/lanes.hpp>
#include <local_mha/core/namespace.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/transpose.hpp>
#include <local_mha/core/types.hpp>

#if defined(LOCAL_MHA_VDPBF16PS)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Whether numbers that are stored as Storage and computed with as Scalar can be multiplied as
/// Arithmetic: as what they are computed with, or in Eigen::bfloat16 what is stored so.
template <typename Scalar, typename Storage, typename Arithmetic>
inline constexpr bool can_multiply =
    std::is_same_v<Arithmetic, Scalar> ||
    (std::is_same_v<Scalar, float> && std::is_same_v<Storage, Eigen::bfloat16> &&
     std::is_same_v<Arithmetic, Eigen::bfloat16>);

namespace detail {

/// Two operands that are neighbours in depth.
struct alignas(4) Pair {
  Eigen::bfloat16 of[2];
};

/// The operand that a number becomes.
template <typename Arithmetic, typename Scalar>
LOCAL_MHA_INLINE Arithmetic to_operand(const Scalar& x) {
  if constexpr (std::is_same_v<Arithmetic, Scalar>) {
    return x;
  } else {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const bool normal = (bits & 0x7f800000U) != 0;
    return to_stored<Arithmetic>(normal ? x : std::bit_cast<Scalar>(bits & 0x80000000U));
  }
}

#if defined(LOCAL_MHA_VDPBF16PS)
template <typename L>
inline constexpr bool multiplies_pairs = sizeof(typename L::Packet) == 64;
#else
template <typename L>
inline constexpr bool multiplies_pairs = false;
#endif

/// A pair of each lane, as numbers.
template <typename L, bool InWords = multiplies_pairs<L>>
struct PairLanes {
  L first, second;

  static LOCAL_MHA_INLINE PairLanes load(const Pair* from) {
    PairLanes lanes;
    load_pairs(reinterpret_cast<const Eigen::bfloat16*>(from), lanes.first, lanes.second);
    return lanes;
  }
  /// `a[0]·b[0] + a[1]·b[1] + c` with the same pair `a` in every lane.
  friend LOCAL_MHA_INLINE L fma(const Pair& a, const PairLanes& b, const L& c) {
    return local_mha::fma(from_stored<float>(a.of[1]), b.second,
                          local_mha::fma(from_stored<float>(a.of[0]), b.first, c));
  }
};

#if defined(LOCAL_MHA_VDPBF16PS)
/// The same as an instruction takes them.
template <typename L>
struct PairLanes<L, true> {
  __m512i words[L::packets];

  static LOCAL_MHA_INLINE PairLanes load(const Pair* from) {
    PairLanes lanes;
    LOCAL_MHA_UNROLL for (int i = 0; i < L::packets; ++i) lanes.words[i] =
        _mm512_loadu_si512(from + i * L::packet_size);
    return lanes;
  }
  friend LOCAL_MHA_INLINE L fma(const Pair& a, const PairLanes& b, const L& c) {
    const __m512i all = _mm512_set1_epi32(std::bit_cast<int>(a));
    return L::make(
        [&](int i) { return _mm512_dpbf16_ps(c.packet[i], (__m512bh)b.words[i], (__m512bh)all); });
  }
};
#endif

/// Makes operands of two Lanes that are neighbours in depth, `[lane][2]`.
template <typename L>
LOCAL_MHA_INLINE void store_pairs(const L& first, const L& second, Pair* to) {
  LOCAL_MHA_UNROLL for (int i = 0; i < L::packets; ++i) {
    Pair* const pairs = to + i * L::packet_size;
    if constexpr (L::packet_size == 1) {
      pairs->of[0] = to_operand<Eigen::bfloat16>(first.packet[i]);
      pairs->of[1] = to_operand<Eigen::bfloat16>(second.packet[i]);
    } else {
#if defined(LOCAL_MHA_VDPBF16PS)
      if constexpr (L::packet_size == 16) {
        struct Order {
          alignas(64) std::uint16_t of[32];
          constexpr Order() : of{} {
            for (std::uint16_t k = 0; k < 32; ++k)
              of[k] = static_cast<std::uint16_t>(k / 2 + (k % 2) * 16);
          }
        };
        static constexpr Order order;
        const auto both = (__m512i)_mm512_cvtne2ps_pbh(second.packet[i], first.packet[i]);
        _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(_mm512_load_si512(order.of), both));
        continue;
      }
#endif
#if defined(__GNUC__)
      using Type = typename Words<L::packet_size>::Type;
      const auto operands = [](const typename L::Packet& packet) {
        const auto bits = reinterpreted<Type>(packet);
        const Type rounded = bits + 0x7fffU + (bits >> 16 & 1U);
        const Type is_nan = (Type)((bits & 0x7fffffffU) > 0x7f800000U);
        const Type number = (rounded & ~is_nan) | ((bits | 0x400000U) & is_nan);
        const Type normal = (Type)((bits & 0x7f800000U) != 0U);
        return number & ((normal & 0xffff0000U) | 0x80000000U);
      };
      Type words = operands(first.packet[i]) >> 16 | operands(second.packet[i]);
      if constexpr (std::endian::native == std::endian::big) words = words >> 16 | words << 16;
      std::memcpy(static_cast<void*>(pairs), &words, sizeof words);
#else
      alignas(64) float values[2][L::packet_size];
      Eigen::internal::pstore(values[0], first.packet[i]);
      Eigen::internal::pstore(values[1], second.packet[i]);
      for (int lane = 0; lane < L::packet_size; ++lane)
        for (int k = 0; k < 2; ++k)
          pairs[lane].of[k] = to_operand<Eigen::bfloat16>(values[k][lane]);
#endif
    }
  }
}

/// Makes operands of Lanes, `[lane]`.
template <typename L>
LOCAL_MHA_INLINE void store_operands(const L& lanes, Eigen::bfloat16* to) {
  LOCAL_MHA_UNROLL for (int i = 0; i < L::packets; ++i) {
    Eigen::bfloat16* const operands = to + i * L::packet_size;
    if constexpr (L::packet_size == 1) {
      *operands = to_operand<Eigen::bfloat16>(lanes.packet[i]);
    } else {
#if defined(LOCAL_MHA_VDPBF16PS)
      if constexpr (L::packet_size == 16) {
        const __m256bh rounded = _mm512_cvtneps_pbh(lanes.packet[i]);
        std::memcpy(static_cast<void*>(operands), &rounded, sizeof rounded);
        continue;
      }
#endif
#if defined(__GNUC__)
      using Type = typename Words<L::packet_size>::Type;
      const auto bits = reinterpreted<Type>(lanes.packet[i]);
      const Type normal = (Type)((bits & 0x7f800000U) != 0U);
      write_packet(operands, reinterpreted<typename L::Packet>(bits & (normal | 0x80000000U)));
#else
      alignas(64) float values[L::packet_size];
      Eigen::internal::pstore(values, lanes.packet[i]);
      for (int lane = 0; lane < L::packet_size; ++lane)
        operands[lane] = to_operand<Eigen::bfloat16>(values[lane]);
#endif
    }
  }
}

/// Rows of a tile, and its depth: `[tile_rows][tile_depth]`.
inline constexpr Index tile_rows = 16;
inline constexpr Index tile_depth = 32;
inline constexpr Index tile_pairs = tile_depth / 2;
/// Pairs of so many channels in whole tiles: those beyond the channels are 0.
constexpr Index pairs_of(Index channels) { return ceil_div(channels, tile_depth) * tile_pairs; }

/// Zero at first: instructions read what fills up tiles, too.
inline BlockBuffer<Pair> make_operand_buffer(Index size) {
  return BlockBuffer<Pair>(static_cast<std::size_t>(size), Pair{});
}

/// Makes operands of an even number of channels: `[channels/2][block_rows]`.
/// \param block `[channels][block_rows]`
template <typename Scalar>
LOCAL_MHA_FLATTEN void pack_channels(Index channels, const Scalar* block, Pair* to) {
  using L = Lanes<Scalar>;
  for (Index c = 0; c + 2 <= channels; c += 2, block += 2 * L::count, to += L::count)
    store_pairs(L::load(block), L::load(block + L::count), to);
}

/// Makes operands of a block: `[pairs_of(channels)][block_rows]`.
/// \param block `[channels][block_rows]`
template <typename Scalar>
void pack_block(Index channels, const Scalar* block, Pair* to) {
  using L = Lanes<Scalar>;
  constexpr Index count = L::count;
  const Index whole = channels / 2 * 2;
  pack_channels(whole, block, to);
  Pair* rest = to + whole / 2 * count;
  if (whole < channels) {
    store_pairs(L::load(block + whole * count), L::zero(), rest);
    rest += count;
  }
  std::fill(rest, to + pairs_of(channels) * count, Pair{});
}

/// Lanes of a row from channel `c` on; 0 beyond its `channels`.
template <typename L, typename Scalar>
LOCAL_MHA_INLINE L load_row(const Scalar* row, Index c, Index channels) {
  if (c + L::count <= channels) return L::load_unaligned(row + c);
  alignas(64) Scalar rest[L::count] = {};
  for (Index i = 0; c + i < channels; ++i) rest[i] = row[c + i];
  return L::load(rest);
}

/// Makes operands of rows, a tile's depth of each: `[block_rows][tile_pairs]`, 0 of rows that there
/// are not.
/// \param lanes_of `lanes_of(r, c)`: Lanes of row `r` from channel `c` of the tile on
template <typename Scalar, typename LanesOf>
LOCAL_MHA_INLINE void pack_rows(Index rows, LanesOf&& lanes_of, Pair* to) {
  constexpr Index count = block_rows<Scalar>;
  static_assert(tile_depth % count == 0);
  for (Index r = 0; r < rows; ++r, to += tile_pairs) {
    for (Index c = 0; c < tile_depth; c += count)
      store_operands(lanes_of(r, c), reinterpret_cast<Eigen::bfloat16*>(to) + c);
  }
  std::fill_n(to, (count - rows) * tile_pairs, Pair{});
}

/// Words `[depth][block_rows]` to `rows` rows of `depth`, which lie `stride` apart.
/// \param depth whole packets, where there are any
template <typename Scalar>
LOCAL_MHA_INLINE void transpose_pairs_out(Index depth, Index rows, const Pair* from, Index stride,
                                          Pair* to) {
  using L = Lanes<Scalar>;
  constexpr Index count = L::count;
  if constexpr (L::vectorized) {
    // As words that are moved, whatever they are.
    const auto* const words = reinterpret_cast<const Scalar*>(from);
    auto* const moved = reinterpret_cast<Scalar*>(to);
    for (Index i = 0; i < depth; i += L::packet_size)
      transpose_out(rows, words + i * count, [&](Index r) { return moved + r * stride + i; });
  } else {
    for (Index r = 0; r < rows; ++r)
      for (Index i = 0; i < depth; ++i) to[r * stride + i] = from[i * count + r];
  }
}

/// Rows of a tile, `[block_rows][tile_pairs]`, to words `[tile_pairs][block_rows]`.
template <typename Scalar>
LOCAL_MHA_INLINE void transpose_pairs_in(const Pair* from, Pair* to) {
  using L = Lanes<Scalar>;
  constexpr Index count = L::count;
  if constexpr (L::vectorized) {
    const StridedRows words{reinterpret_cast<const Scalar*>(from), tile_pairs};
    load_block(tile_pairs, count, words, reinterpret_cast<Scalar*>(to));
  } else {
    for (Index r = 0; r < count; ++r)
      for (Index i = 0; i < tile_pairs; ++i) to[i * count + r] = from[r * tile_pairs + i];
  }
}

/// Makes numbers what they are as operands.
/// \param size a multiple of `Lanes<Scalar, Parts>::count`
template <typename Arithmetic, int Parts = 1, typename Scalar>
LOCAL_MHA_FLATTEN void round_to_operands(Index size, Scalar* numbers) {
  if constexpr (!std::is_same_v<Arithmetic, Scalar>) {
    using L = Lanes<Scalar, Parts>;
    alignas(64) Arithmetic operands[L::count];
    for (Index i = 0; i < size; i += L::count) {
      store_operands(L::load(numbers + i), operands);
      load_stored<L>(operands).store(numbers + i);
    }
  }
}

/// all_finite() of what numbers are as operands.
/// \param size a multiple of `Lanes<Scalar>::count`
template <typename Arithmetic, typename Scalar>
LOCAL_MHA_FLATTEN bool all_finite_operands(const Scalar* numbers, Index size) {
  if constexpr (std::is_same_v<Arithmetic, Scalar>) {
    return all_finite(numbers, size);
  } else {
    using L = Lanes<Scalar>;
    alignas(64) Arithmetic operands[L::count];
    L sums = L::zero();
    for (Index i = 0; i < size; i += L::count) {
      store_operands(L::load(numbers + i), operands);
      sums = fma(Scalar(0), load_stored<L>(operands), sums);
    }
    alignas(64) Scalar sum[L::count];
    sums.store(sum);
    return all_finite(sum, L::count);
  }
}

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
