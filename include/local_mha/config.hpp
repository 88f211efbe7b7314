// SPDX-License-Identifier: MIT
/// \file
/// Configurations: the parameters of the Python modules with their names and defaults.
#pragma once

#include <cstdint>
#include <optional>

#include <local_mha/config/attention_config.hpp>
#include <local_mha/config/checks.hpp>
#include <local_mha/config/mha_config.hpp>
#include <local_mha/config/options.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What LocalTransformer computes. The members after `use_dynamic_pos_bias` are handed to every
/// LocalMHA, as the Python module does with its further keyword arguments.
struct LocalTransformerConfig {
  /// Size of the vocabulary. Required.
  Index num_tokens = 0;
  /// Rows of the position embedding: the longest sequence. Required.
  Index max_seq_len = 0;
  /// Channels of the residual stream. Required.
  Index dim = 0;
  /// Number of layers, each attention and feed-forward. Required.
  Index depth = 0;
  /// A position sees no later one.
  bool causal = true;
  /// LocalMHAConfig::window_size of every layer.
  Index local_attn_window_size = 512;
  /// Channels of a head.
  Index dim_head = 64;
  /// Number of heads.
  Index heads = 8;
  /// The feed-forward's hidden width is `int(dim · ff_mult · 2/3)`.
  double ff_mult = 4;
  /// LocalMHAConfig::dropout of every layer.
  double attn_dropout = 0;
  /// Probability of dropping a hidden activation of the feed-forward, in training mode.
  double ff_dropout = 0;
  /// Labels with this value do not count in the loss.
  std::int64_t ignore_index = -1;
  /// xPos in every layer.
  bool use_xpos = false;
  /// LocalMHAConfig::xpos_scale_base of every layer.
  std::optional<double> xpos_scale_base = {};
  /// A learned bias over distances in place of the rotary embedding.
  bool use_dynamic_pos_bias = false;
  /// L2 normalization of queries and keys in every layer.
  bool qk_rmsnorm = false;
  /// Factor of the scores if `qk_rmsnorm`.
  double qk_scale = 8;
  /// LocalMHAConfig::exact_windowsize of every layer.
  bool exact_windowsize = true;
  /// LocalMHAConfig::look_backward of every layer.
  Index look_backward = 1;
  /// LocalMHAConfig::look_forward of every layer.
  std::optional<Index> look_forward = {};
  /// LocalMHAConfig::gate_values_per_head of every layer.
  bool gate_values_per_head = false;
  /// Residual streams, which hyper-connections mix; 1: plain residual connections. The Python
  /// package's default is 4.
  Index num_residual_streams = 1;
};

/// The layers inside a transformer.
inline LocalMHAConfig layer_config(const LocalTransformerConfig& config) {
  return {
      .dim = config.dim,
      .window_size = config.local_attn_window_size,
      .dim_head = config.dim_head,
      .heads = config.heads,
      .dropout = config.attn_dropout,
      .causal = config.causal,
      .prenorm = true,
      .qk_rmsnorm = config.qk_rmsnorm,
      .qk_scale = config.qk_scale,
      .use_xpos = config.use_xpos,
      .xpos_scale_base = config.xpos_scale_base,
      .exact_windowsize = config.exact_windowsize,
      .look_backward = config.look_backward,
      .look_forward = config.look_forward,
      .use_rotary_pos_emb = !config.use_dynamic_pos_bias,
      .gate_values_per_head = config.gate_values_per_head,
  };
}

/// Hidden width of the feed-forward: `int(dim · ff_mult · 2/3)`.
/// \throws std::invalid_argument if that is negative or no Index
inline Index feed_forward_inner_dim(Index dim, double ff_mult) {
  const double inner = static_cast<double>(dim) * ff_mult * 2 / 3;
  if (!(inner >= 0 && inner < 0x1p62))
    reject("ff_mult", "int(dim * ff_mult * 2 / 3) to be a number of channels", ff_mult);
  return static_cast<Index>(inner);
}

namespace detail {

inline void require_ff_mult(Index dim, double ff_mult) {
  require_finite("ff_mult", ff_mult);
  if (!(ff_mult > 0) || ff_mult > 1e6 || feed_forward_inner_dim(dim, ff_mult) < 1)
    reject("ff_mult", "positive, with int(dim * ff_mult * 2 / 3) at least 1", ff_mult);
  require_product("ff_mult", feed_forward_inner_dim(dim, ff_mult), 2 * dim);
}

}  // namespace detail

/// \throws std::invalid_argument naming the first member that is out of range
inline void validate(const LocalTransformerConfig& config) {
  detail::require_at_least("num_tokens", config.num_tokens, 1);
  detail::require_at_least("max_seq_len", config.max_seq_len, 1);
  detail::require_at_least("dim", config.dim, 1);
  detail::require_at_least("depth", config.depth, 0);
  detail::require_at_least("local_attn_window_size", config.local_attn_window_size, 1);
  detail::require_product("num_tokens", config.num_tokens, config.dim);
  detail::require_product("max_seq_len", config.max_seq_len, config.dim);
  detail::require_ff_mult(config.dim, config.ff_mult);
  detail::require_probability("attn_dropout", config.attn_dropout);
  detail::require_probability("ff_dropout", config.ff_dropout);
  detail::require_streams("num_residual_streams", config.num_residual_streams, config.dim);
  if (config.use_dynamic_pos_bias) {
    if (config.use_xpos)
      reject("use_xpos", "false, because the dynamic position bias takes the rotary's place", true);
    detail::require_at_least("dim", config.dim, 2);
  }
  const LocalMHAConfig layer = layer_config(config);
  validate(layer);
  if (config.use_dynamic_pos_bias)
    detail::require_bias_size("local_attn_window_size", config.heads, layer.window_size,
                              layer.look_backward, resolved_look_forward(layer));
  detail::require_product("depth", config.depth,
                          4 * config.heads * config.dim_head * config.dim +
                              3 * feed_forward_inner_dim(config.dim, config.ff_mult) * config.dim);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
