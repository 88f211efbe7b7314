// SPDX-License-Identifier: MIT
/// \file
/// A number that counts what is computed with it.
#pragma once

#include <cmath>
#include <compare>
#include <limits>

#include <Eigen/Core>

namespace support {

/// A double. Every operation of any of them counts.
class Counted {
 public:
  static inline long operations = 0;

  Counted() = default;
  Counted(double value) : value_(value) {}

  friend Counted operator+(Counted a, Counted b) { return counted(a.value_ + b.value_); }
  friend Counted operator-(Counted a, Counted b) { return counted(a.value_ - b.value_); }
  friend Counted operator*(Counted a, Counted b) { return counted(a.value_ * b.value_); }
  friend Counted operator/(Counted a, Counted b) { return counted(a.value_ / b.value_); }
  Counted operator-() const { return counted(-value_); }
  Counted& operator+=(Counted b) { return *this = *this + b; }
  Counted& operator-=(Counted b) { return *this = *this - b; }
  Counted& operator*=(Counted b) { return *this = *this * b; }
  Counted& operator/=(Counted b) { return *this = *this / b; }
  friend std::partial_ordering operator<=>(Counted a, Counted b) {
    ++operations;
    return a.value_ <=> b.value_;
  }
  friend bool operator==(Counted a, Counted b) {
    ++operations;
    return a.value_ == b.value_;
  }
  friend Counted exp(Counted a) { return counted(std::exp(a.value_)); }
  friend Counted erfc(Counted a) { return counted(std::erfc(a.value_)); }
  friend Counted log(Counted a) { return counted(std::log(a.value_)); }
  friend Counted sqrt(Counted a) { return counted(std::sqrt(a.value_)); }

 private:
  static Counted counted(double value) {
    ++operations;
    return value;
  }

  double value_ = 0;
};

}  // namespace support

template <>
struct Eigen::NumTraits<support::Counted> : Eigen::GenericNumTraits<support::Counted> {
  using Real = support::Counted;
  using NonInteger = support::Counted;
  using Nested = support::Counted;
  static support::Counted highest() { return std::numeric_limits<double>::max(); }
};
