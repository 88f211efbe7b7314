// SPDX-License-Identifier: MIT
/// \file
/// The one place that knows SIMD packets: Lanes, the values of one channel at adjoining positions.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include <Eigen/Core>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <local_mha/core/types.hpp>

/// Inlined whatever the compiler's heuristics say: accumulators must stay in registers.
#define LOCAL_MHA_INLINE EIGEN_ALWAYS_INLINE
/// Not inlined: a loop over accumulators has the registers for itself.
#define LOCAL_MHA_NOINLINE EIGEN_DONT_INLINE

/// All that the function calls is inlined into it: where a compiler leaves Eigen's transpositions
/// as calls, as g++ does in large files, their registers go through memory.
#if defined(__GNUC__)
#define LOCAL_MHA_FLATTEN __attribute__((flatten)) inline
#else
#define LOCAL_MHA_FLATTEN inline
#endif

// A loop over registers, which has no registers unless it is unrolled.
#if defined(__clang__)
#define LOCAL_MHA_UNROLL _Pragma("clang loop unroll(full)")
#define LOCAL_MHA_UNROLL_4 _Pragma("clang loop unroll_count(4)")
#elif defined(__GNUC__)
#define LOCAL_MHA_UNROLL _Pragma("GCC unroll 64")
#define LOCAL_MHA_UNROLL_4 _Pragma("GCC unroll 4")
#else
#define LOCAL_MHA_UNROLL
#define LOCAL_MHA_UNROLL_4
#endif

// The attributes of a raw packet type do not belong to its identity as a template argument.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// `count` values side by side: one channel of a block of positions, a cache line of memory.
///
/// All arithmetic is element by element. float and double take the packets of Eigen, other scalars
/// (a dual number) the same code with packets of one. Those of 16 bits are float in registers: a
/// sum of 300 ones is 256 in Eigen::bfloat16.
/// \tparam Parts 1, or 2 for half as many values
template <typename Scalar, int Parts = 1>
struct Lanes {
  static constexpr bool converted =
      std::is_same_v<Scalar, Eigen::half> || std::is_same_v<Scalar, Eigen::bfloat16>;
  /// What a packet holds.
  using Value = std::conditional_t<converted, float, Scalar>;
  using Widest = std::conditional_t<std::is_same_v<Scalar, float> || std::is_same_v<Scalar, double>,
                                    typename Eigen::internal::packet_traits<Scalar>::type, Value>;
  using HalfPacket = typename Eigen::internal::unpacket_traits<Widest>::half;
  static constexpr bool vectorized = Eigen::internal::unpacket_traits<Widest>::size > 1;
  using Packet = std::conditional_t<sizeof(Widest) * Parts <= 64, Widest, HalfPacket>;
  static constexpr int packet_size = Eigen::internal::unpacket_traits<Packet>::size;
  /// Positions in a block, if not a part.
  static constexpr int count = (vectorized ? 64 / static_cast<int>(sizeof(Scalar)) : 4) / Parts;
  static constexpr int packets = count / packet_size;
  /// Packets that are transposed: of AVX-512 the halves, which take less.
  using Tile = std::conditional_t<sizeof(Packet) == 64, HalfPacket, Packet>;

  Packet packet[packets];

  /// Applies `f(i)` to make packet `i`.
  template <typename F>
  static LOCAL_MHA_INLINE Lanes make(F&& f) {
    Lanes result;
    LOCAL_MHA_UNROLL for (int i = 0; i < packets; ++i) result.packet[i] = f(i);
    return result;
  }

  static LOCAL_MHA_INLINE Lanes broadcast(const Value& value) {
    const Packet all = Eigen::internal::pset1<Packet>(value);
    return make([&](int) { return all; });
  }
  static LOCAL_MHA_INLINE Lanes zero() { return broadcast(Scalar(0)); }

  /// \param from aligned to the packet
  static LOCAL_MHA_INLINE Lanes load(const Scalar* from) {
    return make([&](int i) { return read<Packet>(from + i * packet_size); });
  }
  static LOCAL_MHA_INLINE Lanes load_unaligned(const Scalar* from) {
    return make([&](int i) -> Packet {
      if constexpr (converted)
        return Value(from[i]);
      else
        return Eigen::internal::ploadu<Packet>(from + i * packet_size);
    });
  }
  /// \param to aligned to the packet
  LOCAL_MHA_INLINE void store(Scalar* to) const {
    LOCAL_MHA_UNROLL for (int i = 0; i < packets; ++i) write(to + i * packet_size, packet[i]);
  }

  LOCAL_MHA_INLINE void store_unaligned(Scalar* to) const {
    LOCAL_MHA_UNROLL for (int i = 0; i < packets; ++i) {
      if constexpr (converted)
        to[i] = Scalar(packet[i]);
      else
        Eigen::internal::pstoreu<Scalar>(to + i * packet_size, packet[i]);
    }
  }

  /// Values that fold() leaves of the lanes.
  static constexpr int folded = vectorized ? Eigen::internal::unpacket_traits<Tile>::size : 1;

  /// Adds up lanes until `folded` sums are left.
  /// \param to aligned to `folded` values
  LOCAL_MHA_INLINE void fold(Scalar* to) const { write(to, folded_packet()); }
  /// The same, added to what is there.
  LOCAL_MHA_INLINE void add_folded(Scalar* to) const {
    write(to, Eigen::internal::padd(read<Tile>(to), folded_packet()));
  }
  /// Lane `i` becomes the sum of all that was folded into row `i`.
  /// \param rows `[count][folded]`
  /// \param to `count` values, aligned
  static LOCAL_MHA_FLATTEN void sum_folded(const Scalar* rows, Scalar* to) {
    LOCAL_MHA_UNROLL for (int first = 0; first < count; first += folded) {
      Eigen::internal::PacketBlock<Tile, folded> tile;
      LOCAL_MHA_UNROLL for (int i = 0; i < folded; ++i) tile.packet[i] =
          read<Tile>(rows + (first + i) * folded);
      Eigen::internal::ptranspose(tile);
      LOCAL_MHA_UNROLL for (int half = folded / 2; half > 0; half /= 2) {
        LOCAL_MHA_UNROLL for (int i = 0; i < half; ++i) tile.packet[i] =
            Eigen::internal::padd(tile.packet[i], tile.packet[i + half]);
      }
      write(to + first, tile.packet[0]);
    }
  }

  friend LOCAL_MHA_INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
    return make([&](int i) { return Eigen::internal::padd(a.packet[i], b.packet[i]); });
  }
  friend LOCAL_MHA_INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
    return make([&](int i) { return Eigen::internal::psub(a.packet[i], b.packet[i]); });
  }
  friend LOCAL_MHA_INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
    return make([&](int i) { return Eigen::internal::pmul(a.packet[i], b.packet[i]); });
  }
  friend LOCAL_MHA_INLINE Lanes operator/(const Lanes& a, const Lanes& b) {
    return make([&](int i) { return Eigen::internal::pdiv(a.packet[i], b.packet[i]); });
  }
  friend LOCAL_MHA_INLINE Lanes operator*(const Scalar& a, const Lanes& b) {
    return broadcast(a) * b;
  }

 private:
  template <typename Some>
  static LOCAL_MHA_INLINE Some read(const Scalar* from) {
    if constexpr (converted)
      return Value(*from);
    else
      return Eigen::internal::pload<Some>(from);
  }
  template <typename Some>
  static LOCAL_MHA_INLINE void write(Scalar* to, const Some& some) {
    if constexpr (converted)
      *to = Scalar(some);
    else
      Eigen::internal::pstore<Scalar>(to, some);
  }

  LOCAL_MHA_INLINE Tile folded_packet() const {
    Packet sum = packet[0];
    LOCAL_MHA_UNROLL for (int i = 1; i < packets; ++i) sum = Eigen::internal::padd(sum, packet[i]);
    if constexpr (folded < packet_size) {
      // The function for this has another name in each version of Eigen.
      Tile halves[2];
      static_assert(sizeof halves == sizeof sum);
      std::memcpy(halves, &sum, sizeof sum);
      return Eigen::internal::padd(halves[0], halves[1]);
    } else {
      return sum;
    }
  }
};

namespace detail {

/// `x`, of which the compiler does not know how it was made: of `(x + y) - y` it would leave `x`
/// where flags that no macro shows allow to reorder (clang's -funsafe-math-optimizations).
/// \tparam Value a packet, float or double
template <typename Value>
LOCAL_MHA_INLINE Value rounded(Value x) {
#if defined(__GNUC__) && defined(__SSE2__)
  __asm__("" : "+v"(x));
#elif defined(__GNUC__) && defined(__ARM_NEON)
  __asm__("" : "+w"(x));
#else
  EIGEN_OPTIMIZATION_BARRIER(x)
#endif
  return x;
}

}  // namespace detail

/// The same of all lanes.
template <typename Scalar, int Parts>
LOCAL_MHA_INLINE Lanes<Scalar, Parts> rounded(const Lanes<Scalar, Parts>& a) {
  if constexpr (std::is_arithmetic_v<typename Lanes<Scalar, Parts>::Value>)
    return Lanes<Scalar, Parts>::make([&](int i) { return detail::rounded(a.packet[i]); });
  else
    return a;
}

/// `a·b + c`
template <typename Scalar, int Parts>
LOCAL_MHA_INLINE Lanes<Scalar, Parts> fma(const Lanes<Scalar, Parts>& a,
                                          const Lanes<Scalar, Parts>& b,
                                          const Lanes<Scalar, Parts>& c) {
  return Lanes<Scalar, Parts>::make(
      [&](int i) { return Eigen::internal::pmadd(a.packet[i], b.packet[i], c.packet[i]); });
}

/// `a·b + c` with the same `a` in every lane
template <typename Scalar, int Parts>
LOCAL_MHA_INLINE Lanes<Scalar, Parts> fma(const Scalar& a, const Lanes<Scalar, Parts>& b,
                                          const Lanes<Scalar, Parts>& c) {
  using L = Lanes<Scalar, Parts>;
  using Packet = typename L::Packet;
  const Packet all = Eigen::internal::pset1<Packet>(static_cast<typename L::Value>(a));
  return L::make([&](int i) { return Eigen::internal::pmadd(all, b.packet[i], c.packet[i]); });
}

/// The larger one; a NaN in `a` stays.
template <typename Scalar, int Parts>
LOCAL_MHA_INLINE Lanes<Scalar, Parts>(max)(const Lanes<Scalar, Parts>& a,
                                           const Lanes<Scalar, Parts>& b) {
  return Lanes<Scalar, Parts>::make([&](int i) {
    if constexpr (Lanes<Scalar, Parts>::vectorized)
      return Eigen::internal::pmax(a.packet[i], b.packet[i]);
    else
      return a.packet[i] < b.packet[i] ? b.packet[i] : a.packet[i];
  });
}

/// The sum of all lanes.
template <typename Scalar>
LOCAL_MHA_INLINE Scalar sum_of_lanes(const Lanes<Scalar>& a) {
  auto sum = a.packet[0];
  LOCAL_MHA_UNROLL for (int i = 1; i < Lanes<Scalar>::packets; ++i) sum =
      Eigen::internal::padd(sum, a.packet[i]);
  return static_cast<Scalar>(Eigen::internal::predux(sum));
}

template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> sqrt(const Lanes<Scalar>& a) {
  return Lanes<Scalar>::make([&](int i) -> typename Lanes<Scalar>::Packet {
    if constexpr (Lanes<Scalar>::vectorized) {
      return Eigen::internal::psqrt(a.packet[i]);
    } else {
      using std::sqrt;
      return sqrt(a.packet[i]);
    }
  });
}

/// `condition < 0` chooses `a`, otherwise (NaN too) `b`.
template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> select_negative(const Lanes<Scalar>& condition,
                                               const Lanes<Scalar>& a, const Lanes<Scalar>& b) {
  using Packet = typename Lanes<Scalar>::Packet;
  return Lanes<Scalar>::make([&](int i) -> Packet {
    if constexpr (Lanes<Scalar>::vectorized) {
      const Packet zero = Eigen::internal::pset1<Packet>(Scalar(0));
      return Eigen::internal::pselect(Eigen::internal::pcmp_lt(condition.packet[i], zero),
                                      a.packet[i], b.packet[i]);
    } else {
      return condition.packet[i] < Packet(0) ? a.packet[i] : b.packet[i];
    }
  });
}

/// Lanes `[begin, end)` of `a`, the others of `b`.
template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> select_lanes(int begin, int end, const Lanes<Scalar>& a,
                                            const Lanes<Scalar>& b) {
  using L = Lanes<Scalar>;
  if constexpr (L::vectorized) {
    // -1 in the chosen lanes, 0 in the others, as a step that slides.
    struct Steps {
      Scalar from_begin[2 * L::count];
      Scalar to_end[2 * L::count];
      constexpr Steps() : from_begin{}, to_end{} {
        for (int i = 0; i < 2 * L::count; ++i) {
          from_begin[i] = i < L::count ? Scalar(0) : Scalar(-1);
          to_end[i] = i < L::count ? Scalar(-1) : Scalar(0);
        }
      }
    };
    static constexpr Steps steps;
    const auto chosen = L::make([&](int i) {
      const int lane = i * L::packet_size + L::count;
      return Eigen::internal::pmul(
          Eigen::internal::ploadu<typename L::Packet>(steps.from_begin + lane - begin),
          Eigen::internal::ploadu<typename L::Packet>(steps.to_end + lane - end));
    });
    return select_negative(L::zero() - chosen, a, b);
  } else {
    return L::make([&](int i) { return begin <= i && i < end ? a.packet[i] : b.packet[i]; });
  }
}

/// Asks for the cache line `ahead` values after another, whether there is memory or not. (Eigen's
/// prefetch is an ordinary function, which g++ takes for one without effect and leaves out.)
template <typename Scalar>
LOCAL_MHA_INLINE void prefetch(const Scalar* from, Index ahead = 0) {
  // Not a pointer's arithmetic, which must not leave the array.
  const auto* address = std::bit_cast<const char*>(
      std::bit_cast<std::uintptr_t>(from) + static_cast<std::uintptr_t>(ahead) * sizeof(Scalar));
#if defined(__GNUC__)
  __builtin_prefetch(address);
#else
  Eigen::internal::prefetch(address);
#endif
}

/// True if no value is NaN or infinite.
/// \param size a multiple of Lanes<Scalar>::count
template <typename Scalar>
bool all_finite(const Scalar* values, Index size) {
  using L = Lanes<Scalar>;
  // 0 times what is not finite is NaN. Four sums, because one would wait for its own additions.
  L sums[4] = {L::zero(), L::zero(), L::zero(), L::zero()};
  Index i = 0;
  for (; i + 4 * L::count <= size; i += 4 * L::count) {
    LOCAL_MHA_UNROLL for (int s = 0; s < 4; ++s) sums[s] =
        fma(Scalar(0), L::load_unaligned(values + i + s * L::count), sums[s]);
  }
  for (; i < size; i += L::count) sums[0] = fma(Scalar(0), L::load_unaligned(values + i), sums[0]);
  alignas(64) Scalar sum[L::count];
  ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(sum);
  return std::all_of(sum, sum + L::count, [](const Scalar& value) { return value == Scalar(0); });
}

namespace detail {

/// `2^n`, of a number whose low bits are the exponent of `2^n` with its bias.
template <typename Packet>
LOCAL_MHA_INLINE Packet power_of_two(const Packet& exponent, float) {
  using namespace Eigen::internal;
  using Integers = typename unpacket_traits<Packet>::integer_packet;
  return preinterpret<Packet>(plogical_shift_left<23>(preinterpret<Integers>(exponent)));
}
#if defined(__GNUC__)
/// Eigen has no packets of 64-bit integers to shift, and its pldexp takes twice as long as the rest
/// of exp2_packet().
template <typename Packet>
LOCAL_MHA_INLINE Packet power_of_two(const Packet& exponent, double) {
  using Integers [[gnu::vector_size(sizeof(Packet))]] = std::int64_t;
  return std::bit_cast<Packet>(std::bit_cast<Integers>(exponent) << 52);
}
#endif

/// `2^x` for `x <= 0`: rounds `x` to an integer by adding a number so large that no fraction is
/// left, and takes the rest of at most 1/2 through a minimax polynomial. 2e-7 relative in float.
template <typename Packet>
LOCAL_MHA_INLINE Packet exp2_packet(const Packet& x, float) {
  using namespace Eigen::internal;
  const auto all = [](float c) { return pset1<Packet>(c); };
  // The low bits of `shifted` are the exponent of 2^round(x) with its bias: those of 0 at -127.
  const Packet magic = all(12582912.0F + 127.0F);
  const Packet bounded = pmax(x, all(-127.0F));
  const Packet shifted = detail::rounded(padd(bounded, magic));
  const Packet r = psub(bounded, detail::rounded(psub(shifted, magic)));
  Packet y = pmadd(all(0.0013381302537320797F), r, all(0.0096663685153854477F));
  y = pmadd(y, r, all(0.055503810137964571F));
  y = pmadd(y, r, all(0.2402234903802036F));
  y = pmadd(y, r, all(0.69314718055994529F));
  y = pmadd(y, r, all(1.0F));
  return pmul(y, power_of_two(shifted, float{}));
}

/// The same in double, 2e-16 relative.
template <typename Packet>
LOCAL_MHA_INLINE Packet exp2_packet(const Packet& x, double) {
  using namespace Eigen::internal;
  constexpr double c[] = {1.0,
                          0.69314718055994529,
                          0.24022650695910097,
                          0.055504108664821597,
                          0.0096181291076068882,
                          0.0013333558146416936,
                          0.0001540353044173605,
                          1.5252733829836119e-05,
                          1.3215442587921689e-06,
                          1.0178062445845774e-07,
                          7.0725859692492234e-09,
                          4.4549605981865186e-10};
  // The exponent of 0 is -1023.
  const Packet magic = pset1<Packet>(6755399441055744.0 + 1023.0);
  const Packet bounded = pmax(x, pset1<Packet>(-1023.0));
  const Packet shifted = detail::rounded(padd(bounded, magic));
  const Packet n = detail::rounded(psub(shifted, magic));
  const Packet r = psub(bounded, n);
  const Packet r2 = pmul(r, r);
  Packet even = pset1<Packet>(c[10]);
  Packet odd = pset1<Packet>(c[11]);
  LOCAL_MHA_UNROLL for (int i = 8; i >= 0; i -= 2) {
    even = pmadd(even, r2, pset1<Packet>(c[i]));
    odd = pmadd(odd, r2, pset1<Packet>(c[i + 1]));
  }
  const Packet y = pmadd(odd, r, even);
#if defined(__GNUC__)
  return pmul(y, power_of_two(shifted, double{}));
#else
  return pandnot(pldexp(y, n), pcmp_lt(x, pset1<Packet>(-1022.0)));
#endif
}

}  // namespace detail

/// `2^x` for `x <= 0`, exactly 0 where that is no normal number. NaN stays.
template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> exp2(const Lanes<Scalar>& x) {
  using L = Lanes<Scalar>;
  return L::make([&](int i) -> typename L::Packet {
    if constexpr (L::vectorized) {
      return detail::exp2_packet(x.packet[i], Scalar{});
    } else {
      using std::exp;
      using Value = typename L::Value;
      if (x.packet[i] < Value(-1000)) return Value(0);
      return exp(x.packet[i] * Value(0.693147180559945309417));
    }
  });
}

/// Transposes as many channels as a packet holds of `rows` positions into `to`, `[channel][lane]`;
/// the remaining lanes become 0.
/// \param row `row(r)` points to the values of position `r`, `0 <= r < rows <= count`
/// \param to aligned
template <typename Scalar, typename RowOf>
LOCAL_MHA_INLINE void transpose_in(Index rows, RowOf&& row, Scalar* to) {
  using L = Lanes<Scalar>;
  using Packet = typename L::Packet;
  constexpr int n = L::packet_size;
  LOCAL_MHA_UNROLL for (int p = 0; p < L::packets; ++p) {
    Eigen::internal::PacketBlock<Packet, n> tile;
    LOCAL_MHA_UNROLL for (int r = 0; r < n; ++r) {
      tile.packet[r] = p * n + r < rows ? Eigen::internal::ploadu<Packet>(row(p * n + r))
                                        : Eigen::internal::pset1<Packet>(Scalar(0));
    }
    Eigen::internal::ptranspose(tile);
    LOCAL_MHA_UNROLL for (int r = 0; r < n; ++r)
        Eigen::internal::pstore<Scalar>(to + r * L::count + p * n, tile.packet[r]);
  }
}

/// The reverse of transpose_in().
template <typename Scalar, typename RowOf>
LOCAL_MHA_INLINE void transpose_out(Index rows, const Scalar* from, RowOf&& row) {
  using L = Lanes<Scalar>;
  using Packet = typename L::Packet;
  constexpr int n = L::packet_size;
  LOCAL_MHA_UNROLL for (int p = 0; p < L::packets; ++p) {
    Eigen::internal::PacketBlock<Packet, n> tile;
    LOCAL_MHA_UNROLL for (int r = 0; r < n; ++r) tile.packet[r] =
        Eigen::internal::pload<Packet>(from + r * L::count + p * n);
    Eigen::internal::ptranspose(tile);
    LOCAL_MHA_UNROLL for (int r = 0; r < n; ++r) {
      if (p * n + r < rows) Eigen::internal::pstoreu<Scalar>(row(p * n + r), tile.packet[r]);
    }
  }
}

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
      Word words;
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
