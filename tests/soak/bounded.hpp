// SPDX-License-Identifier: MIT
/// \file
/// A number, and how far a computation of it in `Scalar` may lie from it.
///
/// The reference, computed with it, bounds the error of each of its results by a running error
/// analysis: each operation rounds by at most half a unit in the last place, and hands on what its
/// operands are off. Where an operation leaves `Scalar`'s range, nothing is known of what follows.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/attention.hpp"

namespace soak {

template <typename Scalar>
struct Bounded {
  using Limits = std::numeric_limits<Scalar>;
  /// Of one operation; for double twice, because the reference rounds, too.
  static constexpr double unit = sizeof(Scalar) == 8 ? Limits::epsilon() : Limits::epsilon() / 2.0;
  /// Numbers beyond this may overflow on another way to the same result.
  static constexpr double most = static_cast<double>(Limits::max()) / 16;
  static constexpr double nothing_known = std::numeric_limits<double>::quiet_NaN();

  double value = 0;
  /// At most this far away; NaN: anything, or no number.
  double error = 0;

  Bounded() = default;
  Bounded(double exact) : value(exact) {}  // NOLINT: as from a literal
  Bounded(double v, double e) : value(v), error(e) {}
  explicit Bounded(long double constant) : Bounded(rounded(static_cast<double>(constant), 0)) {}
  explicit Bounded(int exact) : value(exact) {}
  explicit Bounded(long long exact) : value(static_cast<double>(exact)) {}
  explicit Bounded(std::size_t exact) : value(static_cast<double>(exact)) {}

  /// The result of an operation whose operands' errors make `error`.
  static Bounded rounded(double value, double error) {
    const double all = error + (unit * std::abs(value) + static_cast<double>(Limits::denorm_min()));
    return {value, std::abs(value) + error <= most ? all : nothing_known};
  }
  bool known() const { return !std::isnan(error); }

  friend Bounded operator+(const Bounded& a, const Bounded& b) {
    return rounded(a.value + b.value, a.error + b.error);
  }
  friend Bounded operator-(const Bounded& a, const Bounded& b) {
    return rounded(a.value - b.value, a.error + b.error);
  }
  friend Bounded operator-(const Bounded& a) { return {-a.value, a.error}; }
  friend Bounded operator*(const Bounded& a, const Bounded& b) {
    const double size_a = std::abs(a.value), size_b = std::abs(b.value);
    // A factor that is taken into one of the operands may make that a denormal number.
    const double coarse = 4 * static_cast<double>(Limits::denorm_min()) * (size_a + size_b);
    return rounded(a.value * b.value,
                   size_a * b.error + size_b * a.error + a.error * b.error + coarse);
  }
  friend Bounded operator/(const Bounded& a, const Bounded& b) {
    const double quotient = a.value / b.value, least = std::abs(b.value) - b.error;
    if (!(least > 0)) return {quotient, nothing_known};
    return rounded(quotient, (a.error + std::abs(quotient) * b.error) / least);
  }
  Bounded& operator+=(const Bounded& b) { return *this = *this + b; }
  Bounded& operator-=(const Bounded& b) { return *this = *this - b; }
  Bounded& operator*=(const Bounded& b) { return *this = *this * b; }
  Bounded& operator/=(const Bounded& b) { return *this = *this / b; }

  friend bool operator==(const Bounded& a, const Bounded& b) { return a.value == b.value; }
  friend bool operator<(const Bounded& a, const Bounded& b) { return a.value < b.value; }
  friend bool operator>(const Bounded& a, const Bounded& b) { return a.value > b.value; }
};

template <typename Scalar>
Bounded<Scalar> abs(const Bounded<Scalar>& a) {
  return {std::abs(a.value), a.error};
}

template <typename Scalar>
Bounded<Scalar> sqrt(const Bounded<Scalar>& a) {
  const double root = std::sqrt(a.value);
  // √(a + e) − √a is the smaller of both.
  return Bounded<Scalar>::rounded(root, std::min(a.error / root, std::sqrt(a.error)));
}

template <typename Scalar>
Bounded<Scalar> exp(const Bounded<Scalar>& a) {
  const double value = std::exp(a.value);
  // An exponential may be off by some units, and 0 where it is no normal number.
  return Bounded<Scalar>::rounded(value,
                                  value * std::expm1(a.error) + 2 * Bounded<Scalar>::unit * value +
                                      static_cast<double>(std::numeric_limits<Scalar>::min()));
}

template <typename Scalar>
Bounded<Scalar> log(const Bounded<Scalar>& a) {
  const double least = a.value - a.error;
  return Bounded<Scalar>::rounded(
      std::log(a.value),
      least > 0 ? a.error / least + 2 * Bounded<Scalar>::unit : Bounded<Scalar>::nothing_known);
}

/// The same, knowing that the result is at most `most`.
template <typename Scalar>
Bounded<Scalar> at_most(double most, const Bounded<Scalar>& a, bool in_range) {
  return {a.value, in_range && !(a.error < most) ? most : a.error};
}

/// See reference::exp_below().
template <typename Scalar>
Bounded<Scalar> exp_below(const Bounded<Scalar>& score, const Bounded<Scalar>& largest) {
  const Bounded<Scalar> difference = score - largest;
  return at_most(1, exp(difference), !std::isnan(difference.error));
}
template <typename Scalar>
Bounded<Scalar> share(const Bounded<Scalar>& part, const Bounded<Scalar>& sum) {
  return at_most(1, part / sum, !std::isnan(part.error) && !std::isnan(sum.error));
}

/// Norms are of numbers of any size.
template <typename Scalar>
Bounded<Scalar> root_of_squares(const Bounded<Scalar>* x, std::size_t count,
                                const Bounded<Scalar>& divisor, const Bounded<Scalar>& added) {
  double squares = 0, errors = 0;
  for (std::size_t i = 0; i < count; ++i) {
    squares += x[i].value * x[i].value;
    errors += x[i].error * x[i].error;
  }
  const double root = std::sqrt(squares / divisor.value + added.value);
  // A norm changes by no more than the norm of a change.
  return Bounded<Scalar>::rounded(
      root, std::sqrt(errors / divisor.value) +
                (static_cast<double>(count) / 2 + 3) * Bounded<Scalar>::unit * root);
}

/// The mean of what is left of the numbers without their mean, as far as that is known, takes away
/// what that lacked.
template <typename Scalar>
std::vector<Bounded<Scalar>> centred(const Bounded<Scalar>* x, std::size_t count) {
  constexpr double unit = Bounded<Scalar>::unit;
  constexpr double unit_of_mean = std::numeric_limits<long double>::epsilon();
  const auto n = static_cast<double>(count);
  long double sum = 0;
  double error = 0, size = 0, around_mean = 0;
  for (std::size_t i = 0; i < count; ++i) {
    sum += static_cast<long double>(x[i].value);
    error += x[i].error / n;
    size += std::abs(x[i].value) / n;
  }
  const long double mean = sum / static_cast<long double>(count);
  const auto centre = [&](const Bounded<Scalar>& number) {
    return static_cast<double>(static_cast<long double>(number.value) - mean);
  };
  for (std::size_t i = 0; i < count; ++i) around_mean += std::abs(centre(x[i])) / n;
  error += n * (unit * (around_mean + n * unit * size) + unit_of_mean * size);
  std::vector<Bounded<Scalar>> to;
  for (std::size_t i = 0; i < count; ++i)
    to.push_back(Bounded<Scalar>::rounded(centre(x[i]), x[i].error + error));
  return to;
}

/// Functions whose formula has larger intermediate results than results.
template <typename Scalar>
Bounded<Scalar> sigmoid(const Bounded<Scalar>& x) {
  const double value = 1 / (1 + std::exp(-x.value));
  const double least = static_cast<double>(std::numeric_limits<Scalar>::min());
  return Bounded<Scalar>::rounded(
      value, std::min(1.0, x.error / 4 + 4 * Bounded<Scalar>::unit * value + least) + 0 * x.error);
}

/// Its slope is nowhere larger than at the number nearest to 0.
template <typename Scalar>
Bounded<Scalar> tanh(const Bounded<Scalar>& x) {
  const double value = std::tanh(x.value),
               cosh = std::cosh(std::max(0.0, std::abs(x.value) - x.error));
  return Bounded<Scalar>::rounded(value, std::min(2.0, x.error / (cosh * cosh)) +
                                             4 * Bounded<Scalar>::unit * std::abs(value) +
                                             0 * x.error);
}

/// Φ and φ have an absolute error, where they are not as good as 0 and 1.
template <typename Scalar>
double error_of_normal(const Bounded<Scalar>& x) {
  return 4 * Bounded<Scalar>::unit * std::min(std::abs(x.value), 10.0);
}
template <typename Scalar>
Bounded<Scalar> gelu(const Bounded<Scalar>& x) {
  const double value = x.value * 0.5 * std::erfc(-x.value / std::sqrt(2.0));
  return Bounded<Scalar>::rounded(value, 1.13 * x.error + error_of_normal(x));
}
template <typename Scalar>
Bounded<Scalar> gelu_slope(const Bounded<Scalar>& x) {
  constexpr double root_of_two_pi = 2.50662827463100050242;
  const double value = 0.5 * std::erfc(-x.value / std::sqrt(2.0)) +
                       x.value * std::exp(-0.5 * x.value * x.value) / root_of_two_pi;
  return Bounded<Scalar>::rounded(value, std::min(2.0, 0.8 * x.error) + error_of_normal(x) +
                                             4 * Bounded<Scalar>::unit + 0 * x.error);
}

}  // namespace soak

/// A turn may be made of several, by a place among `places` positions and back: it has an absolute
/// error. With xPos these are up to 2^±60, within which small numbers are lost.
template <typename Scalar>
struct reference::Turning<soak::Bounded<Scalar>> {
  using Real = soak::Bounded<Scalar>;
  static constexpr int places = 256;
  static constexpr double lost = 0x1p60 * static_cast<double>(Real::Limits::denorm_min());

  static Real decayed(const Real& gradient) { return {gradient.value, gradient.error + lost}; }
  static Real of(long double turn, long double zeta, long double angle, long double theta) {
    constexpr double of_angle = std::numeric_limits<double>::epsilon();
    const auto size = static_cast<double>(std::abs(zeta));
    const double error =
        size * (4 * Real::unit +
                of_angle * static_cast<double>(std::abs(angle) + places * std::abs(theta) +
                                               std::abs(std::log(zeta))));
    // Queries and keys are seldom smaller than 2^-30.
    return Real::rounded(static_cast<double>(turn * zeta), error + (size < 1 ? 0x1p30 * lost : 0));
  }
};
