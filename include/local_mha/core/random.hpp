// SPDX-License-Identifier: MIT
/// \file
/// Counter-based random numbers: the same for any order of evaluation.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include <local_mha/core/types.hpp>

namespace local_mha {

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four
/// random words for a counter and a key.
class Philox {
 public:
  using Counter = std::array<std::uint32_t, 4>;

  explicit Philox(std::uint64_t seed)
      : key_{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)} {}

  Counter operator()(Counter c) const {
    std::uint32_t k0 = key_[0];
    std::uint32_t k1 = key_[1];
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0];
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57} * c[2];
      c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(p1),
           static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p0)};
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    return c;
  }

 private:
  std::array<std::uint32_t, 2> key_;
};

/// Uniform and normal numbers for initial weights, the same on every platform.
class RandomSequence {
 public:
  explicit RandomSequence(std::uint64_t seed) : philox_(seed) {}

  /// Uniform in `[0, 1)`, 53 bits.
  double uniform() {
    const auto high = std::uint64_t{next()} >> 5;
    const auto low = std::uint64_t{next()} >> 6;
    return static_cast<double>((high << 26) + low) * 0x1p-53;
  }

  /// Standard normal (Box and Muller).
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(6.283185307179586476925 * uniform());
  }

 private:
  std::uint32_t next() {
    if (used_ == 4) {
      words_ = philox_(
          {static_cast<std::uint32_t>(counter_), static_cast<std::uint32_t>(counter_ >> 32), 0, 0});
      ++counter_;
      used_ = 0;
    }
    return words_[used_++];
  }

  Philox philox_;
  Philox::Counter words_{};
  std::uint64_t counter_ = 0;
  std::size_t used_ = 4;
};

}  // namespace local_mha
