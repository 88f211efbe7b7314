// SPDX-License-Identifier: MIT
/// \file
/// Opt-in: what dual numbers of Eigen's AutoDiff module need to go through a transformer.
#pragma once

#include <local_mha/core/requirements.hpp>

#include <cmath>

// The module does not include what it needs.
#include <Eigen/Core>
#include <unsupported/Eigen/AutoDiff>

namespace Eigen {

/// `erfc`, which the module lacks; ``erfc'(x) = −2/√π · e^(−x²)``.
template <typename Derivatives>
auto erfc(const AutoDiffScalar<Derivatives>& x) {
  using std::erfc;
  using std::exp;
  using Value = typename AutoDiffScalar<Derivatives>::Scalar;
  using Plain = AutoDiffScalar<typename internal::remove_all<Derivatives>::type::PlainObject>;
  const Value value = x.value();
  const Value slope = Value(-1.12837916709551257390) * exp(-value * value);
  return Plain(erfc(value), (x.derivatives() * slope).eval());
}

}  // namespace Eigen
