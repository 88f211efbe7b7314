// SPDX-License-Identifier: MIT
/// \file
/// The configuration of LocalAttention.
#pragma once

#include <optional>
#include <tuple>

#include <local_mha/config/checks.hpp>
#include <local_mha/config/options.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Windows ahead that a query sees.
template <typename Config>
Index resolved_look_forward(const Config& config) {
  return config.look_forward.value_or(config.causal ? 0 : 1);
}

namespace detail {

// The options that LocalAttentionConfig and LocalMHAConfig share, those without a use at a default.
template <typename Config>
auto meaning_of(const Config& config) {
  const std::optional<double> no_base;
  return std::tuple(config.window_size, config.causal, config.look_backward,
                    resolved_look_forward(config), config.dropout, config.exact_windowsize,
                    config.use_rotary_pos_emb, config.use_xpos,
                    config.use_xpos ? config.xpos_scale_base : no_base);
}

}  // namespace detail

/// What LocalAttention computes. `w` = window_size; windows are counted, not tokens.
struct LocalAttentionConfig {
  /// Positions in a window (bucket), at least 1. Required, unless there is a token window.
  Index window_size = 0;
  /// A query sees no later position.
  bool causal = false;
  /// Windows before its own that a query sees.
  Index look_backward = 1;
  /// Windows after its own that a query sees. Empty: 0 if causal, else 1.
  std::optional<Index> look_forward = {};
  /// Probability of dropping an attention probability, in training mode.
  double dropout = 0;
  /// Keys are the normalized queries, and a position attends itself only if it sees nothing else.
  bool shared_qk = false;
  /// Channels of a head. Empty: any, and no rotary embedding (as in Python).
  std::optional<Index> dim = {};
  /// A query sees `look_backward·w` positions back and `look_forward·w` ahead, not whole windows.
  bool exact_windowsize = false;
  /// Factor of the scores. Empty: `dim_head^-0.5`.
  std::optional<double> scale = {};
  /// Rotary position embedding, if `dim` is given.
  bool use_rotary_pos_emb = true;
  /// xPos: the rotary scores decay with distance.
  bool use_xpos = false;
  /// Distance over which xPos decays by `ζ`, at least 0.5 (1 with LOCAL_MHA_LANE_BYTES of 128).
  /// Empty: `√dim`.
  std::optional<double> xpos_scale_base = {};
  /// How the rotary embedding turns. With xPos, only `theta` may differ from the default.
  RotaryConfig rotary = {};
  /// Takes the place of `window_size`, `look_backward` and `look_forward`, which stay at their
  /// defaults. With `right` = 0, the attention is causal.
  std::optional<TokenWindow> token_window = {};
  /// Rows at the begin of a sequence that every query sees, too (not before they come if causal).
  Index first_keys = 0;
  /// What becomes of scores.
  ScoreConfig score = {};

  /// Options without a use do not count.
  friend bool operator==(const LocalAttentionConfig& a, const LocalAttentionConfig& b) {
    return detail::meaning_of(a) == detail::meaning_of(b) && a.shared_qk == b.shared_qk &&
           a.dim == b.dim && a.scale == b.scale && a.token_window == b.token_window &&
           a.first_keys == b.first_keys && a.score == b.score &&
           (!a.dim || !a.use_rotary_pos_emb || detail::same_rotary(a.rotary, b.rotary, *a.dim));
  }
};

namespace detail {

// A token window, and nothing else that says what a query sees.
inline void require_token_window(const LocalAttentionConfig& config) {
  const auto [left, right] = *config.token_window;
  require_at_least("token_window.left", left, 0);
  require_at_least("token_window.right", right, 0);
  if (config.window_size != 0)
    reject("window_size", "0, because a token window takes its place", config.window_size);
  if (config.look_backward != 1)
    reject("look_backward", "1, because a token window takes its place", config.look_backward);
  if (config.look_forward)
    reject("look_forward", "none, because a token window takes its place", *config.look_forward);
  if (config.causal && right > 0)
    reject("token_window.right", "0, because the attention is causal", right);
}

/// A window, unless a token window takes its place.
template <typename Config>
void require_window_size(const Config& config) {
  if (!config.token_window && config.window_size < 1)
    reject("window_size", "at least 1, or a token_window", config.window_size);
}

inline void require_look_around(const LocalAttentionConfig& config) {
  require_at_least("look_backward", config.look_backward, 0);
  const Index look_forward = resolved_look_forward(config);
  require_at_least("look_forward", look_forward, 0);
  if (config.causal && look_forward > 0)
    reject("look_forward", "0, because the attention is causal", look_forward);
  constexpr Index most_windows = Index{1} << 20;
  if (config.look_backward > most_windows)
    reject("look_backward", "at most 2^20 windows", config.look_backward);
  if (look_forward > most_windows) reject("look_forward", "at most 2^20 windows", look_forward);
}

}  // namespace detail

/// Refuses a configuration that is out of range.
/// \throws std::invalid_argument naming the first member that is out of range
inline void validate(const LocalAttentionConfig& config) {
  if (config.token_window) {
    detail::require_token_window(config);
  } else {
    detail::require_window_size(config);
    detail::require_look_around(config);
  }
  detail::require_at_least("first_keys", config.first_keys, 0);
  detail::require_score(config.score);
  detail::require_probability("dropout", config.dropout);
  if (config.scale) detail::require_finite("scale", *config.scale);
  if (config.dim) {
    detail::require_at_least("dim", *config.dim, 1);
    detail::require_dim_head("dim", *config.dim);
    if (config.use_rotary_pos_emb) detail::require_rotary(config.rotary, "dim", *config.dim);
  }
  if (config.use_xpos) {
    if (!config.dim || !config.use_rotary_pos_emb)
      reject("use_xpos", "false, because xPos scales the rotary embedding and that is off", true);
    if (config.xpos_scale_base) {
      detail::require_finite("xpos_scale_base", *config.xpos_scale_base);
      if (!(*config.xpos_scale_base >= detail::least_xpos_scale_base))
        reject("xpos_scale_base", detail::at_least_xpos_scale_base, *config.xpos_scale_base);
    }
    detail::require_rotary_of_xpos(config.rotary, *config.dim);
  }
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
