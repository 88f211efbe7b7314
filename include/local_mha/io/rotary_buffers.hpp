// SPDX-License-Identifier: MIT
/// \file
/// The buffers of the rotary embedding, which state dicts hold beside the weights.
#pragma once

#include <cstdint>
#include <vector>

#include <local_mha/config.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// How the buffers of the rotary embedding (`inv_freq`, `scale`) in a file are taken.
enum class RotaryBuffers : std::uint8_t {
  /// They must be those that this library computes with, up to what rounding to float makes of
  /// them. A model that was converted to F16 or BF16 as a whole has others, with which Python
  /// computes other results.
  check,
  /// They are not looked at: this library's own are what the model is to be computed with.
  ignore,
};

namespace detail {

/// `θ_m`: the buffer `inv_freq` of the rotary embedding.
inline Vector<double> rotary_frequencies(Index dim_head, const RotaryConfig& rotary) {
  const std::vector<double> frequencies = local_mha::detail::frequencies_of(rotary, dim_head);
  return Eigen::Map<const Vector<double>>(frequencies.data(),
                                          static_cast<Index>(frequencies.size()));
}

/// `(2m + 0.4·D) / (1.4·D)`, `m < D/2`: the buffer `scale` of xPos.
inline Vector<double> xpos_scales(Index dim_head) {
  Vector<double> scales(dim_head / 2);
  const auto dim = static_cast<double>(dim_head);
  for (Index m = 0; m < scales.size(); ++m)
    scales[m] = (2 * static_cast<double>(m) + 0.4 * dim) / (1.4 * dim);
  return scales;
}

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
