// SPDX-License-Identifier: MIT
/// \file
/// What the heads of a call drop.
#pragma once

#include <cstdint>
#include <optional>

#include <local_mha/core/types.hpp>
#include <local_mha/ops/dropout.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Dropout of each head of each sequence; none in evaluation.
struct AttentionDropout {
  double probability = 0;
  std::optional<Training> training = {};

  /// \param head `s·H + h`
  template <typename Scalar>
  std::optional<Dropout<Scalar>> of_head(Index head) const {
    if (!training || probability == 0) return std::nullopt;
    return Dropout<Scalar>(probability, training->seed, static_cast<std::uint32_t>(head));
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
