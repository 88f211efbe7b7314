// SPDX-License-Identifier: MIT
/// \file
/// What is asked of the members of configurations.
#pragma once

#include <cmath>
#include <string>
#include <string_view>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Within a block of positions, the decay of xPos must stay far from float's range.
inline constexpr double least_xpos_scale_base = LOCAL_MHA_LANE_BYTES / 128.0;
inline constexpr const char* at_least_xpos_scale_base =
    LOCAL_MHA_LANE_BYTES == 64 ? "at least 0.5" : "at least 1";

inline void require_at_least(std::string_view argument, Index value, Index least) {
  if (value < least) reject(argument, "at least " + std::to_string(least), value);
}

// Channels of a head: far more than any has, and tables of them still fit.
inline void require_dim_head(std::string_view argument, Index dim_head) {
  constexpr Index most = Index{1} << 20;
  if (dim_head < 1 || dim_head > most) reject(argument, "1 to 2^20 channels of a head", dim_head);
}

inline void require_probability(std::string_view argument, double value) {
  if (!(value >= 0 && value < 1)) reject(argument, "a probability in [0, 1)", value);
}

inline void require_finite(std::string_view argument, double value) {
  if (!std::isfinite(value)) reject(argument, "a finite number", value);
}

// The product of sizes that a user gives; 2^40 elements are more than a machine holds.
inline void require_product(std::string_view argument, Index a, Index b) {
  constexpr Index most = Index{1} << 40;
  if (a > 0 && b > most / a) reject(argument, "at most 2^40 weights", a, " x ", b);
}

// Residual streams of `dim` channels.
inline void require_streams(std::string_view argument, Index streams, Index dim) {
  constexpr Index most = 1024;
  if (streams < 1 || streams > most) reject(argument, "1 to 1024 residual streams", streams);
  require_product(argument, streams + 1, dim);
}

// An attention bias `[heads, w, (1 + lb + lf)·w]` that fits into a machine.
inline void require_bias_size(std::string_view argument, Index heads, Index window_size,
                              Index look_backward, Index look_forward) {
  const double cols =
      (1.0 + static_cast<double>(look_backward) + static_cast<double>(look_forward)) *
      static_cast<double>(window_size);
  if (static_cast<double>(heads) * static_cast<double>(window_size) * cols > 0x1p40)
    reject(argument, "a window whose bias [heads, w, look-around] has at most 2^40 values",
           window_size);
}

// Numbers that lie between those that float has.
inline void require_eps(std::string_view argument, double eps) {
  if (!(eps >= 1e-30 && eps <= 1e30)) reject(argument, "a number from 1e-30 to 1e30", eps);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
