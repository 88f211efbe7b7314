// SPDX-License-Identifier: MIT
/// \file
/// Powers of two of Lanes.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include <local_mha/core/lanes.hpp>
#include <local_mha/core/types.hpp>

// The attributes of a raw packet type do not belong to its identity as a template argument.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

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
/// left, and takes the rest of at most 1/2 through a minimax polynomial, 2e-7 relative.
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
  y = pmadd(y, r, all(0.2402234903902036F));
  y = pmadd(y, r, all(0.69314718055994529F));
  y = pmadd(y, r, all(1.0F));
  return pmul(y, power_of_two(shifted, float{}));
}

#if defined(EIGEN_VECTORIZE_AVX512DQ)
/// The same with the instructions that AVX-512 has for it: `2^⌊x⌋` times `2^r` for `0 <= r <= 1` by
/// a minimax polynomial, 1e-7 relative.
LOCAL_MHA_INLINE __m512 exp2_packet(const __m512& x, float) {
  using namespace Eigen::internal;
  const auto all = [](float c) { return pset1<__m512>(c); };
  // Those with a mask, for g++ 12 warns of the others (GCC bug 105593).
  const __m512 r = _mm512_maskz_reduce_ps(0xFFFF, x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = pmadd(all(0.0018671302119512632F), r, all(0.0090170299625296129F));
  y = pmadd(y, r, all(0.055799913425224286F));
  y = pmadd(y, r, all(0.24016445003927303F));
  y = pmadd(y, r, all(0.69315131181760979F));
  y = pmadd(y, r, all(1.0F));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, all(-126.5F), _CMP_NLT_UQ), y, x);
}
#endif

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

/// `2^x` for `x <= 0`, exactly 0 where that is less than about 0.7 of the least normal number. NaN
/// stays.
template <typename Scalar, int Parts>
LOCAL_MHA_INLINE Lanes<Scalar, Parts> exp2(const Lanes<Scalar, Parts>& x) {
  using L = Lanes<Scalar, Parts>;
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

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
