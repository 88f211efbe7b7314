// SPDX-License-Identifier: MIT
/// \file
/// How long many things took, in little memory.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace local_mha::examples {

/// Durations, counted in steps of 1 %, so that they take no more memory the longer it lasts.
class Durations {
 public:
  void add(double seconds) {
    sum_ += seconds;
    longest_ = std::max(longest_, seconds);
    ++count_;
    const double step = std::log(std::max(seconds, shortest) / shortest) / std::log(ratio);
    ++counts_[std::min(static_cast<std::size_t>(step), counts_.size() - 1)];
  }
  std::uint64_t count() const { return count_; }
  double mean() const { return sum_ / static_cast<double>(count_); }
  double longest() const { return longest_; }
  /// What a share of all does not exceed, to 1 %.
  double quantile(double share) const {
    double wanted = share * static_cast<double>(count_);
    std::size_t step = 0;
    while (step + 1 < counts_.size() && (wanted -= static_cast<double>(counts_[step])) > 0) ++step;
    return std::min(longest_, shortest * std::pow(ratio, static_cast<double>(step + 1)));
  }

 private:
  static constexpr double shortest = 1e-8;
  static constexpr double ratio = 1.01;

  std::array<std::uint64_t, 2500> counts_{};
  std::uint64_t count_ = 0;
  double sum_ = 0;
  double longest_ = 0;
};

}  // namespace local_mha::examples
