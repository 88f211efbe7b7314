// SPDX-License-Identifier: MIT
/// \file
/// The configuration and the weights of LongformerAttention.
#pragma once

#include <string>

#include <local_mha/config/checks.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What LongformerAttention computes.
struct LongformerConfig {
  /// Channels of the input and the output, a multiple of `heads`. Required.
  Index dim = 0;
  /// Number of heads. Required.
  Index heads = 0;
  /// Positions that a query sees on both sides together, even. Required.
  Index attention_window = 0;
  /// Probability of dropping an attention probability, in training mode.
  double dropout = 0;

  friend bool operator==(const LongformerConfig&, const LongformerConfig&) = default;
};

/// Refuses a configuration that is out of range.
/// \throws std::invalid_argument naming the first member that is out of range
inline void validate(const LongformerConfig& config) {
  detail::require_at_least("dim", config.dim, 1);
  detail::require_at_least("heads", config.heads, 1);
  if (config.dim % config.heads != 0)
    reject("dim", "a multiple of the " + std::to_string(config.heads) + " heads", config.dim);
  detail::require_dim_head("dim / heads", config.dim / config.heads);
  detail::require_product("dim", config.dim, config.dim);
  detail::require_at_least("attention_window", config.attention_window, 0);
  if (config.attention_window % 2 != 0)
    reject("attention_window", "an even number", config.attention_window);
  detail::require_probability("dropout", config.dropout);
}

/// Weights of LongformerAttention.
template <typename Scalar>
struct LongformerParameters {
  RowMatrix<Scalar> to_qkv;         ///< `[3·dim, dim]`: q, k, v; a head's rows adjoin
  Vector<Scalar> to_qkv_bias;       ///< `[3·dim]`
  RowMatrix<Scalar> to_qkv_global;  ///< the same of global queries, and of what they see
  /// `[3·dim]`, the same.
  Vector<Scalar> to_qkv_global_bias;

  /// All of them 0, in the shapes of a configuration.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  static LongformerParameters zeros(const LongformerConfig& config) {
    validate(config);
    LongformerParameters p;
    p.to_qkv.setZero(3 * config.dim, config.dim);
    p.to_qkv_bias.setZero(3 * config.dim);
    p.to_qkv_global = p.to_qkv;
    p.to_qkv_global_bias = p.to_qkv_bias;
    return p;
  }

  /// Whether each tensor has the shape that it has in `other`.
  bool has_shapes_of(const LongformerParameters& other) const {
    return detail::same_shape(to_qkv, other.to_qkv) &&
           detail::same_shape(to_qkv_bias, other.to_qkv_bias) &&
           detail::same_shape(to_qkv_global, other.to_qkv_global) &&
           detail::same_shape(to_qkv_global_bias, other.to_qkv_global_bias);
  }

  /// See for_each_parameter().
  template <typename Self, typename Visitor>
  static void visit_each(Self& p, Visitor&& visit) {
    visit(std::string("to_qkv.weight"), p.to_qkv);
    visit(std::string("to_qkv.bias"), p.to_qkv_bias);
    visit(std::string("to_qkv_global.weight"), p.to_qkv_global);
    visit(std::string("to_qkv_global.bias"), p.to_qkv_global_bias);
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
