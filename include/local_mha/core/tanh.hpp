// SPDX-License-Identifier: MIT
/// \file
/// The hyperbolic tangent of Lanes, exact to a few units in the last place.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include <local_mha/core/lanes.hpp>
#include <local_mha/core/types.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// `(2^r − 1) / r` for `|r| <= 1/2`: the series of the exponential.
template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> exp2_slope(const Lanes<Scalar>& r) {
  using L = Lanes<Scalar>;
  // ln(2)^n / n!
  constexpr double c[] = {
      0.69314718055994530942,    0.24022650695910071233,    0.055504108664821579953,
      0.0096181291076284771620,  0.0013333558146428443423,  0.00015403530393381609954,
      1.5252733804059840280e-05, 1.3215486790144309489e-06, 1.0178086009239699729e-07,
      7.0549116208011233299e-09, 4.4455382718708114975e-10, 2.5678435993488205140e-11,
      1.3691488853904128881e-12};
  constexpr int terms = sizeof(Scalar) > 4 ? 13 : 7;
  L sum = L::broadcast(Scalar(c[terms - 1]));
  LOCAL_MHA_UNROLL for (int n = terms - 2; n >= 0; --n) sum =
      fma(sum, r, L::broadcast(Scalar(c[n])));
  return sum;
}

}  // namespace detail

/// With `e = 2^(−2·|x|·log2(e)) − 1`, which loses no digits where `x` is small,
///
///     tanh(x) = sign(x) · −e / (e + 2)
template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> tanh(const Lanes<Scalar>& x) {
  using L = Lanes<Scalar>;
  if constexpr (L::vectorized) {
    const L zero = L::zero();
    const L magnitude = select_negative(x, zero - x, x);
    // What is this large is 1.
    constexpr double most = sizeof(Scalar) > 4 ? 64 : 32;
    const L y = (max)(Scalar(-2 * 1.44269504088896340736) * magnitude, L::broadcast(Scalar(-most)));
    // A number so large that no fraction is left when it is added rounds to an integer.
    const L magic = L::broadcast(Scalar(sizeof(Scalar) > 4 ? 6755399441055744.0 : 12582912.0));
    const L n = rounded(rounded(y + magic) - magic);
    const L r = y - n;
    const L power = exp2(n);  // exact
    const L e = fma(power, r * detail::exp2_slope(r), power - L::broadcast(Scalar(1)));
    const L t = (zero - e) / (e + L::broadcast(Scalar(2)));
    return select_negative(x, zero - t, t);
  } else {
    using std::tanh;
    return L::make([&](int i) -> typename L::Packet { return tanh(x.packet[i]); });
  }
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
