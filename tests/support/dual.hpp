// SPDX-License-Identifier: MIT
/// \file
/// Dual numbers through a forward pass, which gradients are compared with.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include <local_mha/autodiff.hpp>

#include "reference/array.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace support {

using Dual = Eigen::AutoDiffScalar<Eigen::Matrix<double, 1, 1>>;

/// All arguments of a function, moved along one random direction.
class Direction {
 public:
  explicit Direction(Random& random) : random_(random) {}

  /// \param gradient of a loss for this argument
  /// \param to becomes `values` with the derivatives of the movement
  void move(const reference::Array<double>& values, const reference::Array<double>& gradient,
            Dual* to) {
    const auto along = random_.array(values.shape);
    for (std::size_t i = 0; i < values.data.size(); ++i) {
      to[i] = Dual(values.data[i], Eigen::Matrix<double, 1, 1>::Constant(along.data[i]));
      const double term = along.data[i] * gradient.data[i];
      slope_ += term;
      size_ += std::abs(term);
    }
  }

  /// What the loss grows by along the direction, by its gradients.
  double slope() const { return slope_; }

  /// Compares slope() with the derivatives of a result whose loss is `Σ weights · y`.
  /// \param y a tensor of Dual
  template <typename Duals>
  void expect_slope(const Duals& y, const reference::Array<double>& weights,
                    const std::string& what) const {
    double got = 0, size = size_;
    for (std::size_t i = 0; i < weights.data.size(); ++i) {
      const auto& derivatives = y.data()[i].derivatives();
      if (derivatives.size() == 0) continue;
      const double term = weights.data[i] * derivatives(0);
      got += term;
      size += std::abs(term);
    }
    EXPECT_TRUE(near(slope_, got, 1e-10 * size)) << what;
  }

 private:
  Random& random_;
  double slope_ = 0;
  double size_ = 0;  // of its terms
};

}  // namespace support
