// SPDX-License-Identifier: MIT
/// \file
/// Numbers that are computed with in float and stored in 16 bits: how they are read into Lanes, and
/// rounded from them.
///
/// What is stored is rounded to the nearest number of the format, ties to the even one, and beyond
/// the largest to infinity; a NaN stays one, though not each of its bits. Reading is exact.
#pragma once

#include <local_mha/core/requirements.hpp>

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <Eigen/Core>

#if defined(EIGEN_VECTORIZE_AVX2) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(EIGEN_VECTORIZE_NEON)
#include <arm_neon.h>
#endif

#include <local_mha/core/compiler.hpp>
#include <local_mha/core/lanes.hpp>
#include <local_mha/core/types.hpp>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Whether numbers that are computed with as a Scalar can be stored as a Storage: as what they are,
/// and those of float as Eigen::bfloat16 or Eigen::half.
template <typename Scalar, typename Storage>
inline constexpr bool can_store =
    std::is_same_v<Storage, Scalar> ||
    (std::is_same_v<Scalar, float> &&
     (std::is_same_v<Storage, Eigen::bfloat16> || std::is_same_v<Storage, Eigen::half>));

namespace detail {

/// A layer whose weights are rounded for the sake of memory goes forward alone: steps of training
/// would be lost in them. One that multiplies what it has rounded goes back, too: who trains it
/// keeps the numbers that the weights were before.
template <typename Scalar, typename Storage, typename Arithmetic = Scalar>
concept Trainable = std::is_same_v<Scalar, Storage> || !std::is_same_v<Scalar, Arithmetic>;

/// As a state of a stream names it.
template <typename Storage>
constexpr const char* name_of_storage() {
  if constexpr (std::is_same_v<Storage, Eigen::bfloat16>)
    return "bfloat16";
  else
    return "half";
}

/// The number nearest to `x`.
template <typename Storage, typename Scalar>
LOCAL_MHA_INLINE Storage to_stored(const Scalar& x) {
  if constexpr (std::is_same_v<Storage, Scalar>) {
    return x;
  } else if constexpr (std::is_same_v<Storage, Eigen::bfloat16> && std::is_same_v<Scalar, float>) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t rounded = bits + 0x7fffU + (bits >> 16 & 1U);
    const bool is_nan = (bits & 0x7fffffffU) > 0x7f800000U;
    return std::bit_cast<Eigen::bfloat16>(
        static_cast<std::uint16_t>((is_nan ? bits | 0x400000U : rounded) >> 16));
  } else {
    return static_cast<Storage>(x);
  }
}
template <typename Scalar, typename Storage>
LOCAL_MHA_INLINE Scalar from_stored(const Storage& x) {
  if constexpr (std::is_same_v<Storage, Eigen::bfloat16> && std::is_same_v<Scalar, float>)
    return std::bit_cast<float>(static_cast<std::uint32_t>(std::bit_cast<std::uint16_t>(x)) << 16);
  else
    return static_cast<Scalar>(x);
}

/// A vector or matrix of other numbers.
template <typename Scalar, typename Plain>
auto cast(Plain tensor) {
  if constexpr (std::is_same_v<typename Plain::Scalar, Scalar>)
    return tensor;
  else
    return tensor.template cast<Scalar>().eval();
}

#if defined(__GNUC__)
/// The integers that lie where the numbers of a packet do.
template <int Size>
struct Words {
  typedef std::uint32_t Type __attribute__((vector_size(4 * Size)));
  typedef std::uint16_t Halves __attribute__((vector_size(2 * Size)));
  typedef float Floats __attribute__((vector_size(4 * Size)));
};

/// A packet of float whose bits are those of an integer each.
template <typename Packet, typename Some>
LOCAL_MHA_INLINE Packet reinterpreted(const Some& some) {
  static_assert(sizeof(Packet) == sizeof(Some));
  Packet packet;
  std::memcpy(&packet, &some, sizeof packet);
  return packet;
}

/// Eigen::half without instructions for it.
template <int Size>
LOCAL_MHA_INLINE typename Words<Size>::Type float_of_half(typename Words<Size>::Type bits) {
  using Type = typename Words<Size>::Type;
  // As if the exponent were one of a float, which is 112 smaller: also where it is 0.
  const Type magnitude = (bits & 0x7fffU) << 13;
  const auto scaled = reinterpreted<typename Words<Size>::Floats>(magnitude) * 0x1p112F;
  const Type infinite = (Type)((bits & 0x7c00U) == 0x7c00U) & 0x7f800000U;
  return reinterpreted<Type>(scaled) | infinite | (bits & 0x8000U) << 16;
}
#endif

/// A packet of float from numbers that lie side by side.
template <typename Packet, typename Storage>
LOCAL_MHA_INLINE Packet read_packet(const Storage* from) {
  constexpr int size = Eigen::internal::unpacket_traits<Packet>::size;
  if constexpr (size == 1) {
    return from_stored<float>(*from);
  } else {
#if defined(EIGEN_VECTORIZE_AVX512)
    if constexpr (size == 16) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      if constexpr (std::is_same_v<Storage, Eigen::half>)
        return _mm512_cvtph_ps(halves);
      else  // __builtin_convertvector of g++ 12 takes two instructions of half as much
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
#endif
#if defined(EIGEN_VECTORIZE_AVX2)
    if constexpr (std::is_same_v<Storage, Eigen::bfloat16> && size == 8)
      return _mm256_castsi256_ps(_mm256_slli_epi32(
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16));
#endif
#if defined(__F16C__)
    if constexpr (std::is_same_v<Storage, Eigen::half> && size == 8)
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    if constexpr (std::is_same_v<Storage, Eigen::half> && size == 4)
      return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__) && defined(EIGEN_VECTORIZE_NEON)
    if constexpr (std::is_same_v<Storage, Eigen::half> && size == 4)
      return vcvt_f32_f16(
          vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(from))));
#endif
#if defined(__GNUC__)
    typename Words<size>::Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const auto words = __builtin_convertvector(halves, typename Words<size>::Type);
    if constexpr (std::is_same_v<Storage, Eigen::bfloat16>)
      return reinterpreted<Packet>(words << 16);
    else
      return reinterpreted<Packet>(float_of_half<size>(words));
#else
    alignas(64) float values[size];
    for (int i = 0; i < size; ++i) values[i] = from_stored<float>(from[i]);
    return Eigen::internal::pload<Packet>(values);
#endif
  }
}

/// The reverse, rounded.
template <typename Packet, typename Storage>
LOCAL_MHA_INLINE void write_packet(Storage* to, const Packet& packet) {
  constexpr int size = Eigen::internal::unpacket_traits<Packet>::size;
  if constexpr (size == 1) {
    *to = to_stored<Storage>(packet);
    return;
  } else {
#if defined(EIGEN_VECTORIZE_AVX512)
    if constexpr (std::is_same_v<Storage, Eigen::half> && size == 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          _mm512_cvtps_ph(packet, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#endif
#if defined(__F16C__)
    if constexpr (std::is_same_v<Storage, Eigen::half> && size == 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                       _mm256_cvtps_ph(packet, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
    if constexpr (std::is_same_v<Storage, Eigen::half> && size == 4) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to),
                       _mm_cvtps_ph(packet, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#elif defined(__aarch64__) && defined(EIGEN_VECTORIZE_NEON)
    if constexpr (std::is_same_v<Storage, Eigen::half> && size == 4) {
      vst1_u16(reinterpret_cast<std::uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32(packet)));
      return;
    }
#endif
#if defined(__GNUC__)
    if constexpr (std::is_same_v<Storage, Eigen::bfloat16>) {
      using Type = typename Words<size>::Type;
      const auto bits = reinterpreted<Type>(packet);
      const Type rounded = bits + 0x7fffU + (bits >> 16 & 1U);
      const Type is_nan = (Type)((bits & 0x7fffffffU) > 0x7f800000U);
      const Type chosen = ((rounded & ~is_nan) | ((bits | 0x400000U) & is_nan)) >> 16;
      const auto halves = __builtin_convertvector(chosen, typename Words<size>::Halves);
      std::memcpy(static_cast<void*>(to), &halves, sizeof halves);
      return;
    }
#endif
    alignas(64) float values[size];
    Eigen::internal::pstore(values, packet);
    for (int i = 0; i < size; ++i) to[i] = to_stored<Storage>(values[i]);
  }
}

/// Lanes from what is stored, aligned as a packet is.
template <typename L, typename Storage>
LOCAL_MHA_INLINE L load_stored(const Storage* from) {
  if constexpr (requires { L::load(from); })
    return L::load(from);
  else
    return L::make(
        [&](int i) { return read_packet<typename L::Packet>(from + i * L::packet_size); });
}
/// Lanes to where they are stored.
template <typename L, typename Storage>
LOCAL_MHA_INLINE void store_rounded(const L& lanes, Storage* to) {
  if constexpr (requires { lanes.store(to); }) {
    lanes.store(to);
  } else {
    LOCAL_MHA_UNROLL for (int i = 0; i < L::packets; ++i)
        write_packet(to + i * L::packet_size, lanes.packet[i]);
  }
}

/// How many numbers that are read one after the other lie side by side, for each lane: two of
/// Eigen::bfloat16, which are the halves of a word, so that a packet of words is two of float by a
/// shift and a mask.
template <typename Storage>
inline constexpr int side_by_side = std::is_same_v<Storage, Eigen::bfloat16> ? 2 : 1;

/// Lanes from `[lane][2]` Eigen::bfloat16.
template <typename L>
LOCAL_MHA_INLINE void load_pairs(const Eigen::bfloat16* from, L& first, L& second) {
  using Packet = typename L::Packet;
  constexpr int size = L::packet_size;
  LOCAL_MHA_UNROLL for (int i = 0; i < L::packets; ++i) {
    const Eigen::bfloat16* const pairs = from + 2 * i * size;
    if constexpr (size == 1) {
      first.packet[i] = from_stored<float>(pairs[0]);
      second.packet[i] = from_stored<float>(pairs[1]);
    } else {
#if defined(__GNUC__)
      typename Words<size>::Type words;
      std::memcpy(&words, pairs, sizeof words);
      if constexpr (std::endian::native == std::endian::big) words = words >> 16 | words << 16;
      words = rounded(words);  // read once, and not for each of the two
      first.packet[i] = reinterpreted<Packet>(words << 16);
      second.packet[i] = reinterpreted<Packet>(words & 0xffff0000U);
#else
      alignas(64) float values[2][size];
      for (int k = 0; k < 2 * size; ++k) values[k % 2][k / 2] = from_stored<float>(pairs[k]);
      first.packet[i] = Eigen::internal::pload<Packet>(values[0]);
      second.packet[i] = Eigen::internal::pload<Packet>(values[1]);
#endif
    }
  }
}

/// Lanes of what is stored, or two of what lies side by side.
template <typename L, int Count, typename Storage>
LOCAL_MHA_INLINE void load_side_by_side(const Storage* from, L (&lanes)[Count]) {
  static_assert(Count <= 2);
  if constexpr (Count == 2)
    load_pairs(from, lanes[0], lanes[1]);
  else
    lanes[0] = load_stored<L>(from);
}

/// Channels of a block, `[channels][block_rows]`, that are read from where they are stored at a
/// time: one, or of Eigen::bfloat16, where a packet has as many words as two of them, both. Then
/// load_side_by_side() gives the even lanes of the first and of the second, and those between.
template <typename L, typename Storage>
struct StoredChannels {
#if defined(EIGEN_VECTORIZE_AVX512)
  static constexpr bool paired = std::is_same_v<Storage, Eigen::bfloat16> && L::packets == 1 &&
                                 L::packet_size == 16 && L::count == Lanes<float>::count;
#else
  static constexpr bool paired = false;
#endif
  /// How many, and as many packets.
  static constexpr int count = paired ? 2 : 1;

  /// A value for each lane, as it meets those of each of the channels.
  static LOCAL_MHA_INLINE void spread(const L& lanes, L (&packets)[count]) {
#if defined(EIGEN_VECTORIZE_AVX512)
    if constexpr (paired) {
      const __m512i even = _mm512_set_epi32(14, 12, 10, 8, 6, 4, 2, 0, 14, 12, 10, 8, 6, 4, 2, 0);
      const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
      packets[0].packet[0] = _mm512_permutexvar_ps(even, lanes.packet[0]);
      packets[1].packet[0] = _mm512_permutexvar_ps(odd, lanes.packet[0]);
      return;
    }
#endif
    packets[0] = lanes;
  }
  /// Sums over the channels, a value for each lane.
  static LOCAL_MHA_INLINE L sum(const L (&packets)[count]) {
#if defined(EIGEN_VECTORIZE_AVX512)
    if constexpr (paired) {
      // The even lanes of the first channels, and those of the second ones, which are 8 behind.
      const __m512i first =
          _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      const __m512i second = _mm512_or_si512(first, _mm512_set1_epi32(8));
      L result;
      result.packet[0] =
          _mm512_add_ps(_mm512_permutex2var_ps(packets[0].packet[0], first, packets[1].packet[0]),
                        _mm512_permutex2var_ps(packets[0].packet[0], second, packets[1].packet[0]));
      return result;
    }
#endif
    return packets[0];
  }
};

/// Reads what is stored, and the reverse.
/// \param size a multiple of `Lanes<Scalar>::count`
template <typename Scalar, typename Storage>
LOCAL_MHA_FLATTEN void unpack(const Storage* from, Index size, Scalar* to) {
  using L = Lanes<Scalar>;
  for (Index i = 0; i < size; i += L::count) load_stored<L>(from + i).store(to + i);
}
template <typename Scalar, typename Storage>
LOCAL_MHA_FLATTEN void pack(const Scalar* from, Index size, Storage* to) {
  using L = Lanes<Scalar>;
  for (Index i = 0; i < size; i += L::count) store_rounded(L::load(from + i), to + i);
}

/// Makes numbers what they are when they have been stored.
/// \param size a multiple of `Lanes<Scalar>::count`
template <typename Storage, typename Scalar>
LOCAL_MHA_FLATTEN void round_as_stored(Index size, Scalar* numbers) {
  if constexpr (!std::is_same_v<Storage, Scalar>) {
    using L = Lanes<Scalar>;
    alignas(64) Storage stored[L::count];
    for (Index i = 0; i < size; i += L::count) {
      store_rounded(L::load(numbers + i), stored);
      load_stored<L>(stored).store(numbers + i);
    }
  }
}

/// all_finite() of what is stored.
/// \param size a multiple of `Lanes<Scalar>::count`
template <typename Scalar, typename Storage>
bool all_finite_stored(const Storage* values, Index size) {
  if constexpr (std::is_same_v<Storage, Scalar>) {
    return all_finite(values, size);
  } else {
    using L = Lanes<Scalar>;
    L sums[2] = {L::zero(), L::zero()};
    Index i = 0;
    for (; i + 2 * L::count <= size; i += 2 * L::count) {
      LOCAL_MHA_UNROLL for (int s = 0; s < 2; ++s) sums[s] =
          fma(Scalar(0), load_stored<L>(values + i + s * L::count), sums[s]);
    }
    for (; i < size; i += L::count) sums[0] = fma(Scalar(0), load_stored<L>(values + i), sums[0]);
    alignas(64) Scalar sum[L::count];
    (sums[0] + sums[1]).store(sum);
    return all_finite(sum, L::count);
  }
}

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
