// SPDX-License-Identifier: MIT
/// \file
/// Rotary frequencies that were stretched for longer sequences than a model was first trained on.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "reference/array.hpp"

namespace reference {

constexpr double two_pi = 6.283185307179586476925;

/// θ_m = theta^(−2m/dim).
inline std::vector<double> plain_frequencies(double theta, Int dim) {
  std::vector<double> frequencies;
  for (Int m = 0; m < dim / 2; ++m)
    frequencies.push_back(std::pow(theta, -2 * static_cast<double>(m) / static_cast<double>(dim)));
  return frequencies;
}

/// YaRN (Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023):
/// channels that turn less than `beta_slow` times in the original length are slowed down by
/// `factor`, those that turn more than `beta_fast` times are not, and between them is a ramp.
struct Yarn {
  double theta = 10000;
  double factor = 1;
  double original_length = 1;
  double beta_fast = 32;
  double beta_slow = 1;
  bool truncate = true;  // the ends of the ramp are whole channels
};

inline std::vector<double> yarn_frequencies(const Yarn& o, Int dim) {
  // The channel pair, a fraction, that turns so many times.
  const auto pair_of = [&](double turns) {
    return static_cast<double>(dim) * std::log(o.original_length / (turns * two_pi)) /
           (2 * std::log(o.theta));
  };
  double low = pair_of(o.beta_fast), high = pair_of(o.beta_slow);
  if (o.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(dim - 1));
  if (low == high) high += 0.001;
  std::vector<double> frequencies = plain_frequencies(o.theta, dim);
  for (std::size_t m = 0; m < frequencies.size(); ++m) {
    const double slowed = std::clamp((static_cast<double>(m) - low) / (high - low), 0.0, 1.0);
    frequencies[m] *= slowed / o.factor + (1 - slowed);
  }
  return frequencies;
}

/// YaRN's factor on cosine and sine.
inline double yarn_scale(double factor) { return factor <= 1 ? 1 : 0.1 * std::log(factor) + 1; }

/// Llama 3: wavelengths of more than `original / low` are stretched by `factor`, those of less than
/// `original / high` are not, and between them is a ramp of the frequency.
struct Llama3 {
  double theta = 10000;
  double factor = 1;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  double original_length = 1;
};

inline std::vector<double> llama3_frequencies(const Llama3& o, Int dim) {
  std::vector<double> frequencies = plain_frequencies(o.theta, dim);
  for (double& frequency : frequencies) {
    const double turns = o.original_length * frequency / two_pi;
    const double kept = std::clamp(
        (turns - o.low_freq_factor) / (o.high_freq_factor - o.low_freq_factor), 0.0, 1.0);
    frequency *= kept + (1 - kept) / o.factor;
  }
  return frequencies;
}

}  // namespace reference
