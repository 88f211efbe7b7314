// SPDX-License-Identifier: MIT
/// \file
/// Activation functions, element by element.
#pragma once

#include <cmath>
#include <type_traits>

#include <local_mha/core/exp2.hpp>
#include <local_mha/core/lanes.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// `1 / (1 + e^-x)`
template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> sigmoid(const Lanes<Scalar>& x) {
  using L = Lanes<Scalar>;
  const L one = L::broadcast(Scalar(1));
  // Of the two forms, the one whose exponential is at most 1.
  const L e = exp2(Scalar(-1.44269504088896340736) * (max)(x, L::zero() - x));
  return select_negative(x, e, one) / (one + e);
}

/// The standard normal distribution at x: its distribution function Φ and its density φ.
template <typename Scalar>
struct Normal {
  Lanes<Scalar> distribution;
  Lanes<Scalar> density;
};

/// Φ is exact to a few roundings in both tails: `Φ(−|x|) = e^(−x²/2) · erfcx(|x|/√2) / 2`, where
/// in float `erfcx(z) = e^(z²)·erfc(z)` is `t` times a Chebyshev fit of degree 9 in
/// `t = 1/(1 + 0.4z)`, 5e-9 off at most.
template <typename Scalar>
LOCAL_MHA_INLINE Normal<Scalar> normal(const Lanes<Scalar>& x) {
  using L = Lanes<Scalar>;
  constexpr double inverse_root_two_pi = 0.39894228040143267794;
  constexpr double inverse_root_two = 0.70710678118654752440;
  if constexpr (std::is_same_v<Scalar, float> && L::vectorized) {
    constexpr double c[] = {-0.0335011268715, 0.21878535613,  -0.546502617759, 0.609342180285,
                            -0.334311876173,  0.297973194581, 0.121059982469,  0.216689385959,
                            0.224748665273,   0.225716857437};
    const L one = L::broadcast(Scalar(1));
    const L magnitude = (max)(x, L::zero() - x);
    const L gauss = exp2(Scalar(-0.5 * 1.44269504088896340736) * (x * x));
    const L t = one / fma(Scalar(0.4 * inverse_root_two), magnitude, one);
    L polynomial = L::broadcast(Scalar(c[0]));
    LOCAL_MHA_UNROLL for (int i = 1; i < 10; ++i) polynomial =
        fma(polynomial, t, L::broadcast(Scalar(c[i])));
    const L tail = Scalar(0.5) * (gauss * (t * polynomial));
    return {select_negative(x, tail, one - tail), Scalar(inverse_root_two_pi) * gauss};
  } else {
    using std::erfc;
    using std::exp;
    alignas(64) Scalar at[L::count];
    alignas(64) Scalar distribution[L::count];
    alignas(64) Scalar density[L::count];
    x.store(at);
    for (int i = 0; i < L::count; ++i) {
      distribution[i] = Scalar(Scalar(0.5) * erfc(Scalar(at[i] * Scalar(-inverse_root_two))));
      density[i] = Scalar(Scalar(inverse_root_two_pi) * exp(Scalar(at[i] * at[i] * Scalar(-0.5))));
    }
    return {L::load(distribution), L::load(density)};
  }
}

/// Exact gelu, `x·Φ(x)`.
template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> gelu(const Lanes<Scalar>& x) {
  return x * normal(x).distribution;
}

/// `x · sigmoid(x)`, also called swish.
template <typename Scalar>
Scalar silu(const Scalar& x) {
  using std::exp;
  return Scalar(x / (Scalar(1) + exp(Scalar(-x))));
}

/// Derivative of silu(), `σ·(1 + x·(1 − σ))`.
template <typename Scalar>
Scalar silu_derivative(const Scalar& x) {
  using std::exp;
  const Scalar sigma = Scalar(Scalar(1) / (Scalar(1) + exp(Scalar(-x))));
  return Scalar(sigma * (Scalar(1) + x * (Scalar(1) - sigma)));
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
