// SPDX-License-Identifier: MIT
/// \file
/// Activation functions, element by element.
#pragma once

#include <cmath>

#include <local_mha/core/lanes.hpp>

namespace local_mha {

/// `1 / (1 + e^-x)`
template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> sigmoid(const Lanes<Scalar>& x) {
  using L = Lanes<Scalar>;
  const L one = L::broadcast(Scalar(1));
  // Of the two forms, the one whose exponential is at most 1.
  const L e = exp2(Scalar(-1.44269504088896340736) * max(x, L::zero() - x));
  return select_negative(x, e, one) / (one + e);
}

/// Exact gelu, `x·Φ(x) = x/2 · (1 + erf(x/√2))`.
template <typename Scalar>
Scalar gelu(const Scalar& x) {
  using std::erf;
  return Scalar(x * Scalar(0.5) * (Scalar(1) + erf(Scalar(x * Scalar(0.70710678118654752440)))));
}

/// Derivative of gelu(), `Φ(x) + x·φ(x)`.
template <typename Scalar>
Scalar gelu_derivative(const Scalar& x) {
  using std::erf;
  using std::exp;
  const Scalar normal = Scalar(Scalar(0.39894228040143267794) * exp(Scalar(x * x * Scalar(-0.5))));
  return Scalar(Scalar(0.5) * (Scalar(1) + erf(Scalar(x * Scalar(0.70710678118654752440)))) +
                x * normal);
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

}  // namespace local_mha
