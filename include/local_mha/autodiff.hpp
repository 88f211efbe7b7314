// SPDX-License-Identifier: MIT
/// \file
/// Opt-in: what dual numbers of Eigen's AutoDiff module need to go through a transformer.
#pragma once

#include <cmath>

// The module does not include what it needs.
#include <Eigen/Core>
#include <unsupported/Eigen/AutoDiff>

namespace Eigen {

/// `erf`, which the module lacks; `erf'(x) = 2/√π · e^(−x²)`.
template <typename Derivatives>
auto erf(const AutoDiffScalar<Derivatives>& x) {
  using std::erf;
  using std::exp;
  using Value = typename AutoDiffScalar<Derivatives>::Scalar;
  using Plain = AutoDiffScalar<typename internal::remove_all<Derivatives>::type::PlainObject>;
  const Value value = x.value();
  const Value slope = Value(1.12837916709551257390) * exp(-value * value);
  return Plain(erf(value), (x.derivatives() * slope).eval());
}

}  // namespace Eigen
