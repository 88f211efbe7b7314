// SPDX-License-Identifier: MIT
/// \file
/// One case: what it compares and what it finds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <sstream>
#include <string>

#include "reference/array.hpp"
#include "soak/bounded_reference.hpp"

namespace soak {

/// Results may lie this many times their bound away, for what the library does in another order,
/// with a factor more or less, or in other units.
inline double slack = 10;

class Check {
 public:
  /// What the case is, for the line that reports it.
  std::string description;

  /// Every number of a result lies within its bound; it is finite where the bound is.
  template <typename Scalar>
  void compare(const std::string& what, const Scalar* got,
               const reference::Array<Bounded<Scalar>>& expected) {
    const bool all_known = std::all_of(expected.data.begin(), expected.data.end(),
                                       [](const Bounded<Scalar>& e) { return e.known(); });
    for (std::size_t i = 0; i < expected.data.size() && !found_; ++i) {
      // Where others have left the scalar's range, what they are multiplied by 0 for may be NaN.
      if (!all_known && expected.data[i].value == 0 && std::isnan(got[i])) continue;
      compare(what, i, got[i], expected.data[i]);
    }
  }

  template <typename Scalar>
  void compare(const std::string& what, std::size_t i, Scalar got,
               const Bounded<Scalar>& expected) {
    ++numbers_;
    if (!expected.known()) return;
    const auto number = static_cast<double>(got);
    const double rounding =
        std::abs(expected.value) * static_cast<double>(std::numeric_limits<Scalar>::epsilon());
    const double bound = slack * (std::isfinite(rounding) ? expected.error + rounding : 0);
    if (std::isfinite(expected.value) ? !(std::abs(number - expected.value) <= bound)
                                      : number != expected.value) {
      std::ostringstream text;
      text.precision(9);
      text << what << "[" << i << "]: got " << number << ", expected " << expected.value << " +- "
           << bound;
      fail(text.str());
      return;
    }
    ++known_;
    if (!std::isfinite(expected.value)) return;
    if (std::abs(expected.value) >= 100 * bound && expected.value != 0) ++substantial_;
    if (expected.error > 0)
      worst_ = std::max(worst_, std::abs(number - expected.value) / expected.error);
  }

  /// Two results are the same bits.
  template <typename Scalar>
  void same(const std::string& what, const Scalar* got, const Scalar* expected, long size) {
    for (long i = 0; i < size && !found_; ++i) {
      if (std::memcmp(got + i, expected + i, sizeof(Scalar)) == 0) continue;
      if (std::isnan(got[i]) && std::isnan(expected[i])) continue;
      std::ostringstream text;
      text.precision(17);
      text << what << "[" << i << "]: got " << got[i] << ", expected the bits of " << expected[i];
      fail(text.str());
    }
  }

  template <typename Value>
  void equal(const std::string& what, const Value& got, const Value& expected) {
    if (got == expected) return;
    std::ostringstream text;
    text << what << ": got " << got << ", expected " << expected;
    fail(text.str());
  }

  void fail(const std::string& what) {
    if (!found_) found_ = what;
  }

  const std::optional<std::string>& found() const { return found_; }
  /// Numbers that were looked at, those whose value is known, and those known to two digits that
  /// are not 0.
  long numbers() const { return numbers_; }
  long known() const { return known_; }
  long substantial() const { return substantial_; }
  /// Whether the case compares numbers that say something: sixteen, or half of a few.
  bool says_something() const {
    return substantial_ >= 16 || (substantial_ > 0 && 2 * substantial_ >= numbers_);
  }
  /// The largest error in units of its bound.
  double worst() const { return worst_; }

 private:
  std::optional<std::string> found_;
  long numbers_ = 0;
  long known_ = 0;
  long substantial_ = 0;
  double worst_ = 0;
};

}  // namespace soak
