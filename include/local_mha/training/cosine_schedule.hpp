// SPDX-License-Identifier: MIT
/// \file
/// The learning rate over the steps of a training: linear warm-up, then a half cosine.
/// I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.
#pragma once

#include <cmath>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// `peak·(step + 1)/warmup_steps` for the first steps; then `least + (peak − least)·(1 +
/// cos(π·s))/2` with `s` from 0 to 1 over the rest, and `least` after them.
class CosineSchedule {
 public:
  /// Rates that rise over a warm-up and fall to the least by a cosine.
  /// \param peak the highest rate, at least 0
  /// \param least the rate at the end, at most `peak`
  /// \param warmup_steps at least 0
  /// \param total_steps at least `warmup_steps`
  /// \throws std::invalid_argument naming the argument that does not fit
  CosineSchedule(double peak, double least, Index warmup_steps, Index total_steps)
      : peak_(peak), least_(least), warmup_(warmup_steps), total_(total_steps) {
    if (!(peak >= 0) || !std::isfinite(peak)) reject("peak", "a finite number of at least 0", peak);
    if (!(least >= 0 && least <= peak)) reject("least", "0 to peak", least);
    detail::require_at_least("warmup_steps", warmup_steps, 0);
    detail::require_at_least("total_steps", total_steps, warmup_steps);
  }

  /// The rate of step `step`, counted from 0.
  /// \throws std::invalid_argument if it is negative
  double operator()(Index step) const {
    detail::require_at_least("step", step, 0);
    if (step < warmup_) return peak_ * static_cast<double>(step + 1) / static_cast<double>(warmup_);
    if (step >= total_) return least_;
    constexpr double pi = 3.14159265358979323846;
    const double share =
        static_cast<double>(step - warmup_) / static_cast<double>(total_ - warmup_);
    return least_ + (peak_ - least_) * (1 + std::cos(pi * share)) / 2;
  }

 private:
  double peak_;
  double least_;
  Index warmup_;
  Index total_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
