// SPDX-License-Identifier: MIT
/// \file
/// Packets of 32-bit words, which random numbers are made of.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <local_mha/core/lanes.hpp>
#include <local_mha/core/types.hpp>

// The attributes of a raw packet type do not belong to its identity as a template argument.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// For a Words of one.
struct OneWord {};

/// 32-bit words, one for each value of a packet, with the language's own arithmetic on them.
template <typename Scalar>
struct Words {
  static constexpr int count = [] {
#if defined(__GNUC__)
    if constexpr (!std::is_same_v<Scalar, OneWord>) return Lanes<Scalar>::packet_size;
#endif
    return 1;
  }();

  template <typename Integer, int Count>
  struct Of {
#if defined(__GNUC__)
    using type [[gnu::vector_size(Count * sizeof(Integer))]] = Integer;
#endif
  };
  template <typename Integer>
  struct Of<Integer, 1> {
    using type = Integer;
  };
  using Word = typename Of<std::uint32_t, count>::type;

  /// `first, first + 1, …`
  static LOCAL_MHA_INLINE Word from(std::uint32_t first) {
    if constexpr (count == 1) {
      return first;
    } else {
      Word words{};
      LOCAL_MHA_UNROLL for (int i = 0; i < count; ++i) words[i] =
          first + static_cast<std::uint32_t>(i);
      return words;
    }
  }

  static LOCAL_MHA_INLINE Word broadcast(std::uint32_t value) { return Word{} + value; }

  /// The upper half of the 64-bit product.
  static LOCAL_MHA_INLINE Word multiply_high(const Word& a, std::uint32_t b) {
    if constexpr (count == 1) {
      return static_cast<std::uint32_t>(std::uint64_t{a} * b >> 32);
    } else {
      // Those with an even and with an odd index, in 64 bits each.
      using Wide = typename Of<std::uint64_t, count / 2>::type;
      const Wide wide = std::bit_cast<Wide>(a);
      const Wide even = multiply_low_halves(wide, b);
      const Wide odd = multiply_low_halves(wide >> 32, b);
      return std::bit_cast<Word>((even >> 32) | (odd & ~std::uint64_t{0xFFFFFFFF}));
    }
  }

  /// `value` where a word is less than `bound`, 0 elsewhere.
  static LOCAL_MHA_INLINE void choose_less(const Word& words, std::uint32_t bound, Scalar value,
                                           Scalar* to) {
    if constexpr (count == 1) {
      *to = words < bound ? value : Scalar(0);
    } else {
      using Bits = std::conditional_t<sizeof(Scalar) == 8, std::int64_t, std::int32_t>;
      using Chosen = typename Of<Bits, count>::type;
      const Chosen chosen = __builtin_convertvector(words < bound, Chosen);
      const Chosen bits = chosen & std::bit_cast<Bits>(value);
      std::memcpy(to, &bits, sizeof bits);
    }
  }

 private:
  // g++ finds the instruction for this on no processor, and takes two or three times as long.
  template <typename Wide>
  static LOCAL_MHA_INLINE Wide multiply_low_halves(const Wide& a, std::uint32_t b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Wide) == 64)
      return std::bit_cast<Wide>(_mm512_mul_epu32(std::bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(Wide) == 32)
      return std::bit_cast<Wide>(
          _mm256_mul_epu32(std::bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#endif
#if defined(__SSE2__)
    if constexpr (sizeof(Wide) == 16)
      return std::bit_cast<Wide>(_mm_mul_epu32(std::bit_cast<__m128i>(a), _mm_set1_epi64x(b)));
#endif
    return (a & 0xFFFFFFFFU) * b;
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
