// SPDX-License-Identifier: MIT
/// \file
/// Configurations of components that stand alone, with PyTorch's names.
#pragma once

#include <local_mha/config.hpp>
#include <local_mha/config/checks.hpp>
#include <local_mha/core/index.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What a Linear is made from.
struct LinearConfig {
  Index in_features = 0;   ///< required
  Index out_features = 0;  ///< required
  /// Whether a bias is added.
  bool bias = true;

  friend bool operator==(const LinearConfig&, const LinearConfig&) = default;
};

/// Refuses a configuration that is out of range.
/// \throws std::invalid_argument naming the member that is out of range
inline void validate(const LinearConfig& config) {
  detail::require_at_least("in_features", config.in_features, 1);
  detail::require_at_least("out_features", config.out_features, 1);
  detail::require_product("out_features", config.out_features, config.in_features);
}

/// What a LayerNorm is made from.
struct LayerNormConfig {
  Index dim = 0;      ///< required
  double eps = 1e-5;  ///< from 1e-30 to 1e30

  friend bool operator==(const LayerNormConfig&, const LayerNormConfig&) = default;
};

/// Refuses a configuration that is out of range.
/// \throws std::invalid_argument naming the member that is out of range
inline void validate(const LayerNormConfig& config) {
  detail::require_at_least("dim", config.dim, 1);
  detail::require_eps("eps", config.eps);
}

/// What a FeedForward is made from.
struct FeedForwardConfig {
  Index dim = 0;       ///< required
  double ff_mult = 4;  ///< hidden width: `int(dim · ff_mult · 2/3)`
  double dropout = 0;  ///< probability of dropping a hidden activation, in training mode

  friend bool operator==(const FeedForwardConfig&, const FeedForwardConfig&) = default;
};

/// Refuses a configuration that is out of range.
/// \throws std::invalid_argument naming the member that is out of range
inline void validate(const FeedForwardConfig& config) {
  detail::require_at_least("dim", config.dim, 1);
  detail::require_ff_mult(config.dim, config.ff_mult);
  detail::require_probability("dropout", config.dropout);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
