// SPDX-License-Identifier: MIT
/// \file
/// How loud blocks of sound are at several frequencies.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include <local_mha/local_mha.hpp>

namespace local_mha::examples {

/// Blocks of 20 ms, at 100, 200, … 3800 Hz: a Linear whose weights are waves that fade in and out
/// within a block (a Fourier transform in Hann's window).
class Spectrum {
 public:
  static constexpr Index bins = 38;

  /// \param rate samples per second, at least 8000
  explicit Spectrum(std::uint32_t rate) : block_(rate / 50), waves_(waves(block_)) {}

  /// Samples in a block.
  Index block() const { return block_; }
  /// Takes no memory after the first block.
  /// \param samples of a block
  /// \param loudness `[bins]`, the logarithm of the power, for speech about -1 to 2
  void operator()(const float* samples, float* loudness) {
    waves_.forward_into({sums_.data(), {1, 1, 2 * bins}}, workspace_, {samples, {1, 1, block_}});
    for (Index k = 0; k < bins; ++k) {
      const float even = sums_[2 * k], odd = sums_[2 * k + 1];
      loudness[k] = 2.5F + 0.25F * std::log(1e-9F + even * even + odd * odd);
    }
  }

 private:
  static RowMatrix<float> waves(Index block) {
    RowMatrix<float> waves(2 * bins, block);
    for (Index k = 0; k < bins; ++k)
      for (Index i = 0; i < block; ++i) {
        const double turn = 6.283185307179586 * static_cast<double>(i) / static_cast<double>(block);
        const double fade = (1 - std::cos(turn)) / static_cast<double>(block);
        const double angle = turn * static_cast<double>(2 * (k + 1));  // 2 waves of 100 Hz
        waves(2 * k, i) = static_cast<float>(fade * std::cos(angle));
        waves(2 * k + 1, i) = static_cast<float>(fade * std::sin(angle));
      }
    return waves;
  }

  Index block_;
  Linear<float> waves_;
  Linear<float>::Workspace workspace_;
  Eigen::Vector<float, 2 * bins> sums_;
};

}  // namespace local_mha::examples
