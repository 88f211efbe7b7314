// SPDX-License-Identifier: MIT
/// \file
/// Functions of a scaled score, with their derivatives.
#pragma once

#include <cmath>
#include <functional>
#include <vector>

#include "reference/array.hpp"

namespace reference {

/// `value(s, h, i, j)` takes the place of the scaled score `s` of head `h`; `slope` is its
/// derivative for `s`. `i` and `j` are positions, counted from the segment's start.
template <typename Real>
struct Score {
  std::function<Real(const Real& s, Int h, Int i, Int j)> value = {};  // empty: s
  std::function<Real(const Real& s, Int h, Int i, Int j)> slope = {};
};

/// `cap · tanh(s / cap)`, and 1 − tanh².
template <typename Real>
Score<Real> soft_cap(double cap) {
  const auto bent = [cap](const Real& s) {
    using std::tanh;
    return tanh(s / static_cast<Real>(static_cast<long double>(cap)));
  };
  return {[=](const Real& s, Int, Int, Int) {
            return static_cast<Real>(static_cast<long double>(cap)) * bent(s);
          },
          [=](const Real& s, Int, Int, Int) { return Real(1) - bent(s) * bent(s); }};
}

/// `s − slopes[h] · |i − j|`.
template <typename Real>
Score<Real> alibi(const std::vector<double>& slopes) {
  return {[slopes](const Real& s, Int h, Int i, Int j) {
            const auto slope = static_cast<long double>(slopes.at(static_cast<std::size_t>(h)));
            return s - static_cast<Real>(slope) * static_cast<Real>(i < j ? j - i : i - j);
          },
          [](const Real&, Int, Int, Int) { return Real(1); }};
}

/// `outer` of what `inner` gives.
template <typename Real>
Score<Real> composed(const Score<Real>& outer, const Score<Real>& inner) {
  return {[=](const Real& s, Int h, Int i, Int j) {
            return outer.value(inner.value(s, h, i, j), h, i, j);
          },
          [=](const Real& s, Int h, Int i, Int j) {
            return outer.slope(inner.value(s, h, i, j), h, i, j) * inner.slope(s, h, i, j);
          }};
}

}  // namespace reference
