// SPDX-License-Identifier: MIT
/// \file
/// Norms of rows of numbers, and the gradients through them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

#include "reference/array.hpp"

namespace reference {

/// √(Σ x² / divisor + added) of `count` numbers. A number that bounds its own error knows that no
/// square leaves its range on a careful way there.
template <typename Real>
Real root_of_squares(const Real* x, std::size_t count, const Real& divisor, const Real& added) {
  using std::sqrt;
  Real sum(0);
  for (std::size_t i = 0; i < count; ++i) sum += x[i] * x[i];
  return sqrt(sum / divisor + added);
}

/// max(|x|, 1e-12) of `count` numbers.
template <typename Real>
Real norm_of(const Real* x, std::size_t count) {
  return std::max(root_of_squares(x, count, Real(1), Real(0)), static_cast<Real>(1e-12L));
}

/// k / max(|k|, 1e-12) for every row of `dim_head` numbers.
template <typename Real>
Array<Real> normalized_rows(Array<Real> rows) {
  const auto d = static_cast<std::size_t>(rows.shape.back());
  for (std::size_t row = 0; d > 0 && row < rows.data.size(); row += d) {
    const Real norm = norm_of(rows.data.data() + row, d);
    for (std::size_t c = 0; c < d; ++c) rows.data[row + c] /= norm;
  }
  return rows;
}

template <typename Real>
Array<Real> normalized_rows_backward(const Array<Real>& rows, const Array<Real>& grad_y) {
  const auto d = static_cast<std::size_t>(rows.shape.back());
  Array<Real> grad(rows.shape);
  for (std::size_t row = 0; d > 0 && row < rows.data.size(); row += d) {
    const Real norm = norm_of(rows.data.data() + row, d);
    Real along(0);
    // Where the norm is at its least, it is a constant.
    if (static_cast<Real>(1e-12L) < norm)
      for (std::size_t c = 0; c < d; ++c) along += rows.data[row + c] / norm * grad_y.data[row + c];
    for (std::size_t c = 0; c < d; ++c)
      grad.data[row + c] = (grad_y.data[row + c] - rows.data[row + c] / norm * along) / norm;
  }
  return grad;
}

/// Rows of length one, times a learned scale of each channel.
template <typename Real>
Array<Real> qk_norm(Array<Real> rows, const Array<Real>& scale) {
  rows = normalized_rows(std::move(rows));
  for (std::size_t i = 0; i < rows.data.size(); ++i)
    rows.data[i] *= scale.data[i % scale.data.size()];
  return rows;
}

template <typename Real>
Array<Real> qk_norm_backward(const Array<Real>& rows, const Array<Real>& scale, Array<Real> grad_y,
                             Array<Real>& grad_scale) {
  const Array<Real> normed = normalized_rows(rows);
  for (std::size_t i = 0; i < rows.data.size(); ++i) {
    const std::size_t c = i % scale.data.size();
    grad_scale.data[c] += grad_y.data[i] * normed.data[i];
    grad_y.data[i] *= scale.data[c];
  }
  return normalized_rows_backward(rows, grad_y);
}

/// x / √(mean(x²) + eps) · weight, of every row of as many numbers as there are weights.
template <typename Real>
Array<Real> rms_norm(Array<Real> x, const Array<Real>& weight, double eps) {
  const std::size_t dim = weight.data.size();
  for (std::size_t row = 0; row < x.data.size(); row += dim) {
    const Real root = root_of_squares(x.data.data() + row, dim, static_cast<Real>(dim),
                                      static_cast<Real>(static_cast<long double>(eps)));
    for (std::size_t c = 0; c < dim; ++c) x.data[row + c] = x.data[row + c] / root * weight.data[c];
  }
  return x;
}

template <typename Real>
Array<Real> rms_norm_backward(const Array<Real>& x, const Array<Real>& weight, double eps,
                              const Array<Real>& grad_y, Array<Real>& grad_weight) {
  const std::size_t dim = weight.data.size();
  const auto channels = static_cast<Real>(dim);
  Array<Real> grad_x(x.shape);
  for (std::size_t row = 0; row < x.data.size(); row += dim) {
    const Real root = root_of_squares(x.data.data() + row, dim, channels,
                                      static_cast<Real>(static_cast<long double>(eps)));
    Real along(0);  // Σ (gradient of the normed) · (the normed)
    for (std::size_t c = 0; c < dim; ++c) {
      const Real normed = x.data[row + c] / root;
      grad_weight.data[c] += grad_y.data[row + c] * normed;
      along += grad_y.data[row + c] * weight.data[c] * normed;
    }
    for (std::size_t c = 0; c < dim; ++c)
      grad_x.data[row + c] =
          (grad_y.data[row + c] * weight.data[c] - x.data[row + c] / root * (along / channels)) /
          root;
  }
  return grad_x;
}

/// x − mean of `count` numbers. A number that bounds its own error knows that the mean's error is
/// none of theirs on a careful way there.
template <typename Real>
std::vector<Real> centred(const Real* x, std::size_t count) {
  Real mean(0);
  for (std::size_t i = 0; i < count; ++i) mean += x[i];
  mean /= static_cast<Real>(count);
  std::vector<Real> to(x, x + count);
  for (Real& number : to) number -= mean;
  return to;
}

/// (x - mean) / sqrt(variance + eps) · weight + bias over the last axis.
template <typename Real>
Array<Real> layer_norm(Array<Real> x, const Array<Real>& weight, const Array<Real>& bias,
                       long double eps = 1e-5L) {
  const auto dim = static_cast<std::size_t>(x.shape.back());
  for (std::size_t row = 0; row < x.data.size(); row += dim) {
    const std::vector<Real> around_mean = centred(x.data.data() + row, dim);
    const Real deviation =
        root_of_squares(around_mean.data(), dim, static_cast<Real>(dim), static_cast<Real>(eps));
    for (std::size_t c = 0; c < dim; ++c)
      x.data[row + c] = around_mean[c] / deviation * weight.data[c] + bias.data[c];
  }
  return x;
}

template <typename Real>
Array<Real> layer_norm_backward(const Array<Real>& x, const Array<Real>& weight,
                                const Array<Real>& grad_y, Array<Real>& grad_weight,
                                Array<Real>& grad_bias, long double eps = 1e-5L) {
  const auto dim = static_cast<std::size_t>(x.shape.back());
  const auto channels = static_cast<Real>(dim);
  Array<Real> grad_x(x.shape);
  std::vector<Real> normed(dim), weighted(dim);
  for (std::size_t row = 0; row < x.data.size(); row += dim) {
    const std::vector<Real> around_mean = centred(x.data.data() + row, dim);
    const Real deviation =
        root_of_squares(around_mean.data(), dim, channels, static_cast<Real>(eps));
    Real total(0), along(0);
    for (std::size_t c = 0; c < dim; ++c) {
      const Real& g = grad_y.data[row + c];
      normed[c] = around_mean[c] / deviation;
      weighted[c] = g * weight.data[c];
      grad_weight.data[c] += g * normed[c];
      grad_bias.data[c] += g;
      total += weighted[c];
      along += weighted[c] * normed[c];
    }
    for (std::size_t c = 0; c < dim; ++c)
      grad_x.data[row + c] =
          (weighted[c] - total / channels - normed[c] * (along / channels)) / deviation;
  }
  return grad_x;
}

}  // namespace reference
