// SPDX-License-Identifier: MIT
/// \file
/// The hyperbolic tangent of Lanes, exact to a few units in the last place.
#pragma once

#include <cmath>
#include <type_traits>

#include <local_mha/core/exp2.hpp>
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

/// `2^y − 1`, relative to itself, for `|y|` of at most half the exponents: `2^n` is made of bits,
/// and the rest `r` of at most 1/2 goes through the series of the exponential without its 1.
template <typename Scalar, typename Packet>
LOCAL_MHA_INLINE Packet exp2_minus_one(const Packet& y) {
  using namespace Eigen::internal;
  constexpr bool wide = std::is_same_v<Scalar, double>;
  // ln(2)^n / n!
  constexpr double c[] = {
      0.69314718055994530942,    0.24022650695910071233,    0.055504108664821579953,
      0.0096181291076284771620,  0.0013333558146428443423,  0.00015403530393381609954,
      1.5252733804059840280e-05, 1.3215486790144309489e-06, 1.0178086009239699729e-07,
      7.0549116208011233299e-09, 4.4455382718708114975e-10, 2.5678435993488205140e-11,
      1.3691488853904128881e-12};
  // As in exp2(): the low bits of `shifted` are the exponent of 2^n with its bias.
  const Packet magic =
      pset1<Packet>(static_cast<Scalar>(wide ? 6755399441055744.0 + 1023.0 : 12582912.0 + 127.0));
  const Packet shifted = rounded(padd(y, magic));
  const Packet r = psub(y, rounded(psub(shifted, magic)));
  constexpr int terms = wide ? 13 : 7;
  Packet slope = pset1<Packet>(static_cast<Scalar>(c[terms - 1]));
  LOCAL_MHA_UNROLL for (int n = terms - 2; n >= 0; --n) slope =
      pmadd(slope, r, pset1<Packet>(static_cast<Scalar>(c[n])));
#if defined(__GNUC__)
  const Packet power = power_of_two(shifted, Scalar{});
#else
  const Packet power = pldexp(pset1<Packet>(Scalar(1)), psub(shifted, magic));
#endif
  return pmadd(power, pmul(r, slope), psub(power, pset1<Packet>(Scalar(1))));
}

}  // namespace detail

/// With `e = exp(2x) − 1`, which loses no digits where `x` is small, `tanh(x) = e / (e + 2)`.
template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> tanh(const Lanes<Scalar>& x) {
  using L = Lanes<Scalar>;
  return L::make([&](int i) -> typename L::Packet {
    if constexpr (L::vectorized) {
      using namespace Eigen::internal;
      using Packet = typename L::Packet;
      const auto all = [](double value) { return pset1<Packet>(static_cast<Scalar>(value)); };
      // Beyond it, the nearest number is 1. NaN stays.
      constexpr double most = std::is_same_v<Scalar, double> ? 64 : 32;
      const Packet y = pmul(all(2 * 1.44269504088896340736), x.packet[i]);
      const Packet e = detail::exp2_minus_one<Scalar>(pmin(pmax(y, all(-most)), all(most)));
      return pdiv(e, padd(e, all(2)));
    } else {
      using std::exp, std::tanh;
      const auto& value = x.packet[i];
      using Value = std::remove_cvref_t<decltype(value)>;
      // A scalar of a user's may have no tanh.
      if constexpr (requires { tanh(value); })
        return tanh(value);
      else
        return Value(1) - Value(2) / (exp(Value(2) * value) + Value(1));
    }
  });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
