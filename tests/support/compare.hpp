// SPDX-License-Identifier: MIT
/// \file
/// The comparison of numbers that all tests share: what is not finite equals itself alone, NaN not
/// even that unless asked for, and no tolerance makes up for it.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <type_traits>

#include "reference/array.hpp"

namespace support {

/// Whether a NaN equals a NaN.
enum class NaN { EqualsNothing, EqualsNaN };

/// |got - expected|; infinite if one of them is NaN, or an infinity that the other is not.
template <typename Got, typename Expected>
double distance(Got got, Expected expected, NaN nan = NaN::EqualsNothing) {
  using Wide = std::common_type_t<Got, Expected, double>;
  const auto a = static_cast<Wide>(got), b = static_cast<Wide>(expected);
  if (a == b || (nan == NaN::EqualsNaN && std::isnan(a) && std::isnan(b))) return 0;
  if (!std::isfinite(a) || !std::isfinite(b)) return std::numeric_limits<double>::infinity();
  return static_cast<double>(std::abs(a - b));
}

/// The largest |value|; infinite if one is NaN.
template <typename Real>
Real largest(const reference::Array<Real>& a) {
  Real most = 0;
  for (const Real value : a.data)
    most =
        std::isnan(value) ? std::numeric_limits<Real>::infinity() : std::max(most, std::abs(value));
  return most;
}

/// The largest distance() of two elements; infinite if the shapes differ.
template <typename Got, typename Expected>
double largest_error(const reference::Array<Got>& got, const reference::Array<Expected>& expected,
                     NaN nan = NaN::EqualsNothing) {
  if (got.shape != expected.shape) return std::numeric_limits<double>::infinity();
  double worst = 0;
  for (std::size_t i = 0; i < got.data.size(); ++i)
    worst = std::max(worst, distance(got.data[i], expected.data[i], nan));
  return worst;
}

/// Whether two numbers are `tolerance` apart at most. A tolerance that is not finite, since what it
/// was computed from is not, allows nothing.
template <typename Got, typename Expected>
testing::AssertionResult near(Got got, Expected expected, double tolerance,
                              NaN nan = NaN::EqualsNothing) {
  if (!std::isfinite(tolerance))
    return testing::AssertionFailure() << "a tolerance of " << tolerance;
  const double error = distance(got, expected, nan);
  if (error <= tolerance) return testing::AssertionSuccess();
  return testing::AssertionFailure() << got << ", not " << expected << ": error " << error
                                     << " where " << tolerance << " is allowed";
}

/// The same for arrays of one shape.
template <typename Got, typename Expected>
testing::AssertionResult close(const reference::Array<Got>& got,
                               const reference::Array<Expected>& expected, double tolerance,
                               NaN nan = NaN::EqualsNothing) {
  if (got.shape != expected.shape)
    return testing::AssertionFailure() << "shape " << testing::PrintToString(got.shape) << ", not "
                                       << testing::PrintToString(expected.shape);
  for (std::size_t i = 0; i < got.data.size(); ++i) {
    auto result = near(got.data[i], expected.data[i], tolerance, nan);
    if (result) continue;
    std::string place;
    std::size_t rest = i;
    for (std::size_t axis = got.shape.size(); axis-- > 0;) {
      const auto extent = static_cast<std::size_t>(got.shape[axis]);
      place = std::to_string(rest % extent) + (place.empty() ? "" : ", ") + place;
      rest /= extent;
    }
    return result << "; first at [" << place << "], the largest error is "
                  << largest_error(got, expected, nan);
  }
  return testing::AssertionSuccess();
}

}  // namespace support
