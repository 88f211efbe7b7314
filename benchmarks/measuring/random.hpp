// SPDX-License-Identifier: MIT
/// \file
/// Random inputs, the same in every run and on every platform.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>

namespace measuring {

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  /// Uniform in `[0, n)`.
  std::ptrdiff_t below(std::ptrdiff_t n) {
    return static_cast<std::ptrdiff_t>(engine_() % static_cast<std::uint64_t>(n));
  }

  /// Uniform, with mean 0 and this standard deviation.
  double centred(double deviation) {
    constexpr double sqrt_12 = 3.4641016151377544;
    return (static_cast<double>(engine_() >> 11) * 0x1p-53 - 0.5) * sqrt_12 * deviation;
  }

  template <typename Values>
  void fill(Values& values, double deviation = 1) {
    auto* data = values.data();
    for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(values.size()); ++i)
      data[i] = static_cast<std::remove_reference_t<decltype(data[i])>>(centred(deviation));
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace measuring
