// SPDX-License-Identifier: MIT
/// \file
/// How the components of layers are called: what a call is given beside its rows.
#pragma once

#include <optional>

#include <local_mha/core/parallel.hpp>
#include <local_mha/ops/dropout.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What a call of Linear, LayerNorm or FeedForward is given beside its rows; all of it may be left
/// out:
///
///     feed_forward.forward(x, {.training = Training{seed}, .device = device});
struct ModuleCall {
  /// Dropout acts, where there is one, with this seed. Empty: evaluation.
  std::optional<Training> training = {};
  /// Whose threads share the work; the same bits for any number of them.
  AnyDevice device = {};
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
