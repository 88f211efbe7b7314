// SPDX-License-Identifier: MIT
/// \file
/// Random test data, the same on every platform.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <vector>

#include "reference/array.hpp"

/// How many random cases a test tries: a fifth where they take several times as long through the
/// same code, as where scalars have no packets.
constexpr std::uint64_t random_cases(std::uint64_t number) {
#if defined(EIGEN_DONT_VECTORIZE) || defined(LOCAL_MHA_TEST_FEWER_CASES)
  return number / 5;
#else
  return number;
#endif
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  /// Uniform in [0, 1).
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }

  /// Uniform in [low, high], both included.
  long long integer(long long low, long long high) {
    return low + static_cast<long long>(engine_() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool chance(double probability) { return uniform() < probability; }

  template <typename T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[integer(0, static_cast<long long>(choices.size()) - 1)];
  }

  double normal() {
    return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform());
  }

  /// Normal numbers times `scale`. A float holds each exactly, so that every precision computes
  /// from the same numbers.
  reference::Array<double> array(std::vector<reference::Int> shape, double scale = 1) {
    reference::Array<double> numbers(std::move(shape));
    for (double& number : numbers.data)
      number = static_cast<double>(static_cast<float>(scale * normal()));
    return numbers;
  }

 private:
  std::mt19937_64 engine_;
};
