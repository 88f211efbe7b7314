// SPDX-License-Identifier: MIT
/// \file
/// Central differences of the reference, which gradients are compared with.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "reference/array.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace support {

using reference::Array;

/// `values + h · along`
inline Array<long double> moved(const Array<long double>& values, const Array<double>& along,
                                long double h) {
  Array<long double> to = values;
  for (std::size_t i = 0; i < to.data.size(); ++i)
    to.data[i] += h * static_cast<long double>(along.data[i]);
  return to;
}

/// What expect_gradient() may find. The gradients of a module differ by 15 roundings at most in the
/// tests, twice as many are allowed. The differences themselves are off by 3e-12: long double's
/// roundings of a loss of some hundred terms, over a millionth of it.
template <typename Scalar>
constexpr double tolerance_of_differences =
    32 * static_cast<double>(std::numeric_limits<Scalar>::epsilon()) + 1e-11;

/// How large the terms are that gradients and losses are sums of: what errors are relative to.
struct Sizes {
  double gradient = 1;
  double loss = 1;
};

/// Compares a gradient with differences of a loss in random directions and along some elements.
/// \param values of the argument that the gradient belongs to
/// \param loss `loss(values)`: the reference's, in long double
/// \param tolerance relative to the size of the gradient, and of its terms
template <typename Scalar, typename Loss>
void expect_gradient(Random& random, const Array<Scalar>& gradient, const Array<double>& values,
                     const Loss& loss, double tolerance, const std::string& what,
                     const Sizes& sizes = {}) {
  ASSERT_EQ(gradient.shape, values.shape) << what;
  if (values.empty()) return;
  if (sizes.gradient == 0) {  // of what does not count at all
    EXPECT_EQ(largest(gradient), Scalar(0)) << what;
    return;
  }
  const auto at = reference::cast<long double>(values);
  // Moves the loss by a millionth of its size.
  const auto h = static_cast<long double>(1e-6 * sizes.loss / sizes.gradient);
  double norm = 0;
  for (const Scalar g : gradient.data) norm += static_cast<double>(g) * static_cast<double>(g);
  norm = std::sqrt(norm);
  const int trials = values.data.size() > 1000 ? 2 : 6;
  for (int trial = 0; trial < trials; ++trial) {
    Array<double> along(values.shape);
    if (trial < 2) {
      along = random.array(values.shape);
    } else {
      along.data[static_cast<std::size_t>(
          random.integer(0, static_cast<long long>(along.data.size()) - 1))] = 1;
    }
    const auto step =
        static_cast<double>((8 * (loss(moved(at, along, h)) - loss(moved(at, along, -h))) -
                             (loss(moved(at, along, 2 * h)) - loss(moved(at, along, -2 * h)))) /
                            (12 * h));
    double got = 0;
    for (std::size_t i = 0; i < along.data.size(); ++i)
      got += static_cast<double>(gradient.data[i]) * along.data[i];
    EXPECT_TRUE(near(got, step, tolerance * (sizes.gradient + norm)))
        << what << ", direction " << trial;
  }
}

}  // namespace support
