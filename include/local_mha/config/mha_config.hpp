// SPDX-License-Identifier: MIT
/// \file
/// The configuration of LocalMHA.
#pragma once

#include <cmath>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>

#include <local_mha/config/attention_config.hpp>
#include <local_mha/config/checks.hpp>
#include <local_mha/config/options.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

struct LocalMHAConfig;

/// How a layer normalizes queries and keys: `qk_rmsnorm` is QkNormKind::l2.
inline QkNormKind resolved_qk_norm(const LocalMHAConfig& config);

/// Factor of a layer's scores; empty: `dim_head^-0.5`.
inline std::optional<double> resolved_scale(const LocalMHAConfig& config);

/// A layer's heads of keys and values; empty: as many as heads.
inline Index resolved_kv_heads(const LocalMHAConfig& config);

/// What LocalMHA computes: LocalAttention between two projections.
struct LocalMHAConfig {
  /// Channels of the input and the output. Required.
  Index dim = 0;
  /// Positions in a window (bucket), at least 1. Required, unless there is a token window.
  Index window_size = 0;
  /// Channels of a head.
  Index dim_head = 64;
  /// Number of heads.
  Index heads = 8;
  /// Probability of dropping an attention probability, in training mode.
  double dropout = 0;
  /// A query sees no later position.
  bool causal = false;
  /// Normalization of the input, as `norm` says: by default a layer normalization.
  bool prenorm = false;
  /// L2 normalization of queries and keys, times learned scales (the field calls it RMSNorm): the
  /// same as `qk_norm = {.kind = QkNormKind::l2}`.
  bool qk_rmsnorm = false;
  /// Factor of the scores if `qk_rmsnorm`; otherwise it is `dim_head^-0.5`. See `scale`.
  double qk_scale = 8;
  /// xPos: the rotary scores decay with distance.
  bool use_xpos = false;
  /// Distance over which xPos decays by `ζ`, at least 0.5 (1 with LOCAL_MHA_LANE_BYTES of 128).
  /// Empty: `√dim`.
  std::optional<double> xpos_scale_base = {};
  /// A query sees `look_backward·w` positions back and `look_forward·w` ahead, not whole windows.
  bool exact_windowsize = true;
  /// Windows before its own that a query sees.
  Index look_backward = 1;
  /// Windows after its own that a query sees. Empty: 0 if causal, else 1.
  std::optional<Index> look_forward = {};
  /// Rotary position embedding of queries and keys.
  bool use_rotary_pos_emb = true;
  /// Each head's output times `sigmoid(to_v_gate(x))`.
  bool gate_values_per_head = false;
  /// A bias is added to the queries, keys and values that are projected.
  bool qkv_bias = false;
  /// A bias is added to the result.
  bool out_bias = false;
  /// How the rotary embedding turns. With xPos, only `theta` may differ from the default.
  RotaryConfig rotary = {};
  /// Factor of the scores. Empty: `qk_scale` if `qk_rmsnorm`, else `dim_head^-0.5`.
  std::optional<double> scale = {};
  /// Normalization of queries and keys.
  QkNormConfig qk_norm = {};
  /// Which normalization `prenorm` is.
  NormConfig norm = {};
  /// Heads of keys and values, a divisor of `heads`: head `h` of the queries reads head
  /// `⌊h / (heads/kv_heads)⌋`. Empty: as many as heads.
  std::optional<Index> kv_heads = {};
  /// Takes the place of `window_size`, `look_backward` and `look_forward`, which stay at their
  /// defaults. With `right` = 0, the attention is causal.
  std::optional<TokenWindow> token_window = {};
  /// What becomes of scores.
  ScoreConfig score = {};
  /// A learned score for each head, which takes its share of the softmax and has no value.
  bool sinks = false;
  /// A learned bias for each head and distance, added to the scores; needs a token window with
  /// bounded ends.
  bool relative_bias = false;
  /// Rows at the begin of a sequence that every query sees, too (not before they come if causal).
  Index first_keys = 0;

  /// Options without a use do not count.
  friend bool operator==(const LocalMHAConfig& a, const LocalMHAConfig& b) {
    const auto qk_eps_of = [](const LocalMHAConfig& c) {
      const bool rms = resolved_qk_norm(c) >= QkNormKind::rms;
      return rms ? c.qk_norm.eps : 0;
    };
    return detail::meaning_of(a) == detail::meaning_of(b) && a.dim == b.dim &&
           a.dim_head == b.dim_head && a.heads == b.heads && a.prenorm == b.prenorm &&
           resolved_qk_norm(a) == resolved_qk_norm(b) && qk_eps_of(a) == qk_eps_of(b) &&
           resolved_scale(a) == resolved_scale(b) &&
           a.gate_values_per_head == b.gate_values_per_head && a.qkv_bias == b.qkv_bias &&
           a.out_bias == b.out_bias && (!a.prenorm || a.norm == b.norm) &&
           resolved_kv_heads(a) == resolved_kv_heads(b) && a.token_window == b.token_window &&
           a.score == b.score && a.sinks == b.sinks && a.relative_bias == b.relative_bias &&
           a.first_keys == b.first_keys &&
           (!a.use_rotary_pos_emb || detail::same_rotary(a.rotary, b.rotary, a.dim_head));
  }
};

inline QkNormKind resolved_qk_norm(const LocalMHAConfig& config) {
  return config.qk_rmsnorm ? QkNormKind::l2 : config.qk_norm.kind;
}

inline std::optional<double> resolved_scale(const LocalMHAConfig& config) {
  if (config.scale) return config.scale;
  const bool l2 = resolved_qk_norm(config) == QkNormKind::l2;
  return l2 ? std::optional<double>(config.qk_scale) : std::nullopt;
}

inline Index resolved_kv_heads(const LocalMHAConfig& config) {
  return config.kv_heads.value_or(config.heads);
}

/// The attention inside a layer.
inline LocalAttentionConfig attention_config(const LocalMHAConfig& config) {
  return {
      .window_size = config.window_size,
      .causal = config.causal,
      .look_backward = config.look_backward,
      .look_forward = config.look_forward,
      .dropout = config.dropout,
      .shared_qk = false,
      .dim = config.dim_head,
      .exact_windowsize = config.exact_windowsize,
      .scale = resolved_scale(config),
      .use_rotary_pos_emb = config.use_rotary_pos_emb,
      .use_xpos = config.use_xpos,
      .xpos_scale_base =
          config.xpos_scale_base.value_or(std::sqrt(static_cast<double>(config.dim))),
      .rotary = config.rotary,
      .token_window = config.token_window,
      .first_keys = config.first_keys,
      .score = config.score,
  };
}

namespace detail {

// Channels of the weights of QkNormKind::rms and rms_all of so many heads; 0: there are none.
inline Index qk_norm_channels(const LocalMHAConfig& config, Index heads) {
  switch (resolved_qk_norm(config)) {
    case QkNormKind::rms:
      return config.dim_head;
    case QkNormKind::rms_all:
      return heads * config.dim_head;
    default:
      return 0;
  }
}

// Heads that a layer projects to: queries, then keys, then values.
inline Index qkv_heads(const LocalMHAConfig& config) {
  return config.heads + 2 * resolved_kv_heads(config);
}

// Columns of the relative bias; 0: there is none.
inline Index relative_bias_columns(const LocalMHAConfig& config) {
  return config.relative_bias ? config.token_window->left + config.token_window->right + 1 : 0;
}

inline void require_relative_bias(const LocalMHAConfig& config) {
  if (!config.token_window || !config.token_window->bounded())
    reject("relative_bias", "false, because it is for token windows with bounded ends", true);
  for (const auto& [name, side] :
       {std::pair<const char*, Index>{"token_window.left", config.token_window->left},
        std::pair<const char*, Index>{"token_window.right", config.token_window->right}})
    if (side > (Index{1} << 40) / config.heads)
      reject(name, "a side whose relative_bias has at most 2^40 values", side);
}

}  // namespace detail

/// Refuses a configuration that is out of range.
/// \throws std::invalid_argument naming the first member that is out of range
inline void validate(const LocalMHAConfig& config) {
  detail::require_at_least("dim", config.dim, 1);
  detail::require_window_size(config);
  detail::require_at_least("dim_head", config.dim_head, 1);
  detail::require_dim_head("dim_head", config.dim_head);
  detail::require_at_least("heads", config.heads, 1);
  if (config.use_rotary_pos_emb) detail::require_rotary(config.rotary, "dim_head", config.dim_head);
  detail::require_product("heads", config.heads, config.dim_head);
  const Index kv_heads = resolved_kv_heads(config);
  if (kv_heads < 1 || config.heads % kv_heads != 0)
    reject("kv_heads", "a divisor of the " + std::to_string(config.heads) + " heads", kv_heads);
  detail::require_product("dim", config.dim, detail::qkv_heads(config) * config.dim_head);
  detail::require_finite("qk_scale", config.qk_scale);
  if (config.prenorm) detail::require_norm(config.norm);
  detail::require_qk_norm(config.qk_rmsnorm, config.qk_norm);
  validate(attention_config(config));
  const std::size_t slopes = config.score.alibi_slopes.size();
  if (slopes > 0 && slopes != static_cast<std::size_t>(config.heads))
    reject("score.alibi_slopes", std::to_string(config.heads) + " slopes, one for each head",
           slopes);
  if (config.relative_bias) detail::require_relative_bias(config);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
