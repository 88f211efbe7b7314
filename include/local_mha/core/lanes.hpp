// SPDX-License-Identifier: MIT
/// \file
/// Lanes: the values of one channel at adjoining positions, in SIMD packets.
#pragma once

#include <local_mha/core/requirements.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <Eigen/Core>

#include <local_mha/core/compiler.hpp>
#include <local_mha/core/types.hpp>

// The attributes of a raw packet type do not belong to its identity as a template argument.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// `count` values side by side: one channel of a block of positions, one or two cache lines of
/// memory.
///
/// All arithmetic is element by element. float and double take the packets of Eigen, other scalars
/// (a dual number) the same code with packets of one. Those of 16 bits are float in registers: a
/// sum of 300 ones is 256 in Eigen::bfloat16.
/// \tparam Parts 1, 2 for half as many values, and so on: what works on a part of the positions of
///         a block, from one on that a packet begins with, is told of it, too
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
  using Packet =
      std::conditional_t<sizeof(Widest) * Parts <= LOCAL_MHA_LANE_BYTES, Widest, HalfPacket>;
  static constexpr int packet_size = Eigen::internal::unpacket_traits<Packet>::size;
  /// Positions in a block, if not a part.
  static constexpr int count =
      (vectorized ? LOCAL_MHA_LANE_BYTES / static_cast<int>(sizeof(Scalar)) : 4) / Parts;
  static constexpr int packets = count / packet_size;
  /// Packets that are transposed: of AVX-512 the halves, which take less.
  using Tile = std::conditional_t<sizeof(Packet) == 64, HalfPacket, Packet>;

  Packet packet[packets];

  /// Applies `f(i)` to make packet `i`.
  template <typename F>
  static LOCAL_MHA_INLINE Lanes make(F&& f) {
    Lanes result;
    LOCAL_MHA_UNROLL for (int i = 0; i < packets; ++i) {
      LOCAL_MHA_INLINE_CALLS result.packet[i] = f(i);
    }
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

#if defined(EIGEN_VECTORIZE_AVX512)
namespace detail {

/// Values of `a` where a bit is set, the others of `b`: Eigen makes a comparison of it.
LOCAL_MHA_INLINE __m512 select_bits(std::uint64_t bits, __m512 a, __m512 b) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), b, a);
}
LOCAL_MHA_INLINE __m512d select_bits(std::uint64_t bits, __m512d a, __m512d b) {
  return _mm512_mask_blend_pd(static_cast<__mmask8>(bits), b, a);
}

}  // namespace detail
#endif

/// The same of all lanes.
template <typename Scalar, int Parts>
LOCAL_MHA_INLINE Lanes<Scalar, Parts> rounded(const Lanes<Scalar, Parts>& a) {
  using Value = typename Lanes<Scalar, Parts>::Value;
  if constexpr (std::is_same_v<Value, float> || std::is_same_v<Value, double>)
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

/// The least whole number that is not smaller.
template <typename Scalar, int Parts>
LOCAL_MHA_INLINE Lanes<Scalar, Parts> ceil(const Lanes<Scalar, Parts>& a) {
  using L = Lanes<Scalar, Parts>;
  return L::make([&](int i) -> typename L::Packet {
    if constexpr (L::vectorized) {
      return Eigen::internal::pceil(a.packet[i]);
    } else {
      using std::ceil;
      return ceil(a.packet[i]);
    }
  });
}

/// The sum of all lanes.
template <typename Scalar, int Parts>
LOCAL_MHA_INLINE Scalar sum_of_lanes(const Lanes<Scalar, Parts>& a) {
  auto sum = a.packet[0];
  LOCAL_MHA_UNROLL for (int i = 1; i < Lanes<Scalar, Parts>::packets; ++i) sum =
      Eigen::internal::padd(sum, a.packet[i]);
  return static_cast<Scalar>(Eigen::internal::predux(sum));
}

template <typename Scalar, int Parts>
LOCAL_MHA_INLINE Lanes<Scalar, Parts> sqrt(const Lanes<Scalar, Parts>& a) {
  using L = Lanes<Scalar, Parts>;
  return L::make([&](int i) -> typename L::Packet {
    if constexpr (L::vectorized) {
      return Eigen::internal::psqrt(a.packet[i]);
    } else {
      using std::sqrt;
      return sqrt(a.packet[i]);
    }
  });
}

/// `condition < 0` chooses `a`, otherwise (NaN too) `b`.
template <typename Scalar, int Parts>
LOCAL_MHA_INLINE Lanes<Scalar, Parts> select_negative(const Lanes<Scalar, Parts>& condition,
                                                      const Lanes<Scalar, Parts>& a,
                                                      const Lanes<Scalar, Parts>& b) {
  using L = Lanes<Scalar, Parts>;
  using Packet = typename L::Packet;
  return L::make([&](int i) -> Packet {
    if constexpr (L::vectorized) {
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
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (L::vectorized && sizeof(typename L::Packet) == 64) {
    const std::uint64_t chosen =
        begin < end ? (std::uint64_t{1} << end) - (std::uint64_t{1} << begin) : 0;
    return L::make([&](int i) {
      return detail::select_bits(chosen >> (i * L::packet_size), a.packet[i], b.packet[i]);
    });
  }
#endif
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
/// \param size a multiple of Lanes<Scalar, Parts>::count
template <int Parts = 1, typename Scalar>
bool all_finite(const Scalar* values, Index size) {
  using L = Lanes<Scalar, Parts>;
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

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
