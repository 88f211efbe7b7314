// SPDX-License-Identifier: MIT
/// \file
/// Central differences of the reference along every element of a small array.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>

#include "reference/array.hpp"

namespace support {

/// Σ weight · result.
inline long double loss_of(const reference::Array<long double>& result,
                           const reference::Array<long double>& weight) {
  long double loss = 0;
  for (std::size_t i = 0; i < result.data.size(); ++i) loss += result.data[i] * weight.data[i];
  return loss;
}

/// The gradient of a loss, by central differences of fourth order, is what was computed.
inline void expect_gradient(const std::string& what, reference::Array<long double>& at,
                            const std::function<long double()>& loss,
                            const reference::Array<long double>& got) {
  ASSERT_EQ(at.shape, got.shape) << what;
  // The differences' own error is step^4 times a fifth derivative, and 1e-19 / step.
  constexpr long double step = 2e-5L;
  for (std::size_t i = 0; i < at.data.size(); ++i) {
    const long double center = at.data[i];
    const auto moved = [&](long double by) {
      at.data[i] = center + by;
      return loss();
    };
    const long double expected =
        (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * step);
    at.data[i] = center;
    EXPECT_NEAR(static_cast<double>(got.data[i]), static_cast<double>(expected),
                1e-11 * (1 + std::abs(static_cast<double>(expected))))
        << what << " " << i;
  }
}

}  // namespace support
