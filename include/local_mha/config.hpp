// SPDX-License-Identifier: MIT
/// \file
/// Configurations: the parameters of the Python modules with their names and defaults.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <local_mha/config/attention_config.hpp>
#include <local_mha/config/checks.hpp>
#include <local_mha/config/feed_forward.hpp>
#include <local_mha/config/mha_config.hpp>
#include <local_mha/config/options.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/encoder_config.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What LocalTransformer computes: embeddings, an Encoder, logits. The members that name no other
/// are those of the Python module; `layers` is there for all that its layers do not have.
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
  /// The attention of the layers with all its options, as EncoderConfig::layers: one that all
  /// share, or `depth`, one each. Each is as it says, `prenorm` included. `causal`,
  /// `local_attn_window_size`, `dim_head`, `heads`, `attn_dropout` and the other members that are a
  /// layer's own then stay at their defaults, or say what the layers say. Empty: those members.
  ///
  ///     config.layers = {layer_config(config)};
  ///     config.layers.front().kv_heads = 2;
  std::vector<LocalMHAConfig> layers = {};
};

/// The layers inside a transformer, if all are the same.
/// \throws std::invalid_argument if there is one each: ask for that of layer `i`
inline LocalMHAConfig layer_config(const LocalTransformerConfig& config) {
  if (config.layers.size() > 1)
    reject("layers", "one that all share, where no layer is named", config.layers.size());
  if (!config.layers.empty()) return config.layers.front();
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

/// The encoder inside a transformer.
inline EncoderConfig encoder_config(const LocalTransformerConfig& config) {
  return {.depth = config.depth,
          .layers = config.layers.empty() ? std::vector<LocalMHAConfig>{layer_config(config)}
                                          : config.layers,
          .ff_mult = config.ff_mult,
          .ff_dropout = config.ff_dropout,
          .num_residual_streams = config.num_residual_streams,
          .use_dynamic_pos_bias = config.use_dynamic_pos_bias};
}

/// The attention of layer `i` of a transformer.
/// \throws std::invalid_argument if there is no such layer
inline LocalMHAConfig layer_config(const LocalTransformerConfig& config, Index i) {
  return layer_config(encoder_config(config), i);
}

/// Whether no position sees a later one, in any layer.
inline bool is_causal(const LocalTransformerConfig& config) {
  const std::vector<LocalMHAConfig> layers = encoder_config(config).layers;
  return std::all_of(layers.begin(), layers.end(), [](const LocalMHAConfig& layer) {
    return layer.token_window ? layer.token_window->right == 0 : layer.causal;
  });
}

namespace detail {

inline void require_members_of_layers(const LocalTransformerConfig& config) {
  using Model = LocalTransformerConfig;
  using Layer = LocalMHAConfig;
  const Model defaults;
  for (std::size_t i = 0; i < config.layers.size(); ++i) {
    const std::string of_layer = "layers[" + std::to_string(i) + "].";
    const auto same = [&](const char* name, auto Model::* member, const char* name_in_layer,
                          auto Layer::* member_of_layer) {
      const auto& got = config.*member;
      if (got == defaults.*member || got == config.layers[i].*member_of_layer) return;
      const std::string expected = "its default, or what " + of_layer + name_in_layer + " is";
      if constexpr (requires { *got; })
        reject(name, expected, *got);
      else
        reject(name, expected, got);
    };
    same("causal", &Model::causal, "causal", &Layer::causal);
    same("local_attn_window_size", &Model::local_attn_window_size, "window_size",
         &Layer::window_size);
    same("dim_head", &Model::dim_head, "dim_head", &Layer::dim_head);
    same("heads", &Model::heads, "heads", &Layer::heads);
    same("attn_dropout", &Model::attn_dropout, "dropout", &Layer::dropout);
    same("use_xpos", &Model::use_xpos, "use_xpos", &Layer::use_xpos);
    same("xpos_scale_base", &Model::xpos_scale_base, "xpos_scale_base", &Layer::xpos_scale_base);
    same("qk_rmsnorm", &Model::qk_rmsnorm, "qk_rmsnorm", &Layer::qk_rmsnorm);
    same("qk_scale", &Model::qk_scale, "qk_scale", &Layer::qk_scale);
    same("exact_windowsize", &Model::exact_windowsize, "exact_windowsize",
         &Layer::exact_windowsize);
    same("look_backward", &Model::look_backward, "look_backward", &Layer::look_backward);
    same("look_forward", &Model::look_forward, "look_forward", &Layer::look_forward);
    same("gate_values_per_head", &Model::gate_values_per_head, "gate_values_per_head",
         &Layer::gate_values_per_head);
  }
}

}  // namespace detail

/// Refuses a configuration that is out of range.
/// \throws std::invalid_argument naming the first member that is out of range
inline void validate(const LocalTransformerConfig& config) {
  detail::require_at_least("num_tokens", config.num_tokens, 1);
  detail::require_at_least("max_seq_len", config.max_seq_len, 1);
  detail::require_at_least("dim", config.dim, 1);
  detail::require_at_least("depth", config.depth, 0);
  detail::require_product("num_tokens", config.num_tokens, config.dim);
  detail::require_product("max_seq_len", config.max_seq_len, config.dim);
  if (!config.layers.empty()) {
    detail::require_members_of_layers(config);
    validate(encoder_config(config));
    if (config.layers.front().dim != config.dim)
      reject("layers[0].dim", std::to_string(config.dim) + ", the model's dim",
             config.layers.front().dim);
    return;
  }
  detail::require_at_least("local_attn_window_size", config.local_attn_window_size, 1);
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
