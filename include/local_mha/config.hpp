// SPDX-License-Identifier: MIT
/// \file
/// Configurations: the parameters of the Python modules with their names and defaults.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Which channels of a head the rotary embedding turns together.
enum class RotaryPairing : std::uint8_t {
  /// `m` and `m + rotary_dim/2`, as GPT-NeoX and the models of Hugging Face have them.
  halves,
  /// `2m` and `2m + 1`, as RoFormer and GPT-J have them.
  interleaved,
};

/// How the rotary embedding turns: pair `m < rotary_dim/2` by the angle `θ_m` from a position to
/// the next.
struct RotaryConfig {
  /// `θ_m = theta^(−2m/rotary_dim)`; at least 1.
  double theta = 10000;
  /// The first channels of a head, which turn; the others stay. Even. Empty: all.
  std::optional<Index> rotary_dim = {};
  /// The channels of a pair.
  RotaryPairing pairing = RotaryPairing::halves;
  /// `θ_m` themselves, `[rotary_dim/2]`, as YaRN and other scalings make them: then `theta` has no
  /// use. Empty: those of `theta`.
  std::vector<double> inv_freq = {};
  /// Multiplies cosines and sines, and so its square the scores of the channels that turn.
  double factor = 1;

  friend bool operator==(const RotaryConfig&, const RotaryConfig&) = default;
};

/// How a layer normalizes its input.
enum class NormKind : std::uint8_t {
  /// `(x − mean) / √(var + eps) ⊙ weight + bias`
  layer,
  /// `x / √(mean(x²) + eps) ⊙ weight`
  rms,
};

/// Normalization of a layer's input.
struct NormConfig {
  NormKind kind = NormKind::layer;
  /// From 1e-30 to 1e30.
  double eps = 1e-5;

  friend bool operator==(const NormConfig&, const NormConfig&) = default;
};

/// How queries and keys are normalized.
enum class QkNormKind : std::uint8_t {
  none,
  /// `x / max(‖x‖₂, 1e-12) ⊙ scale` of each head, and the scores times `qk_scale`.
  l2,
  /// `x / √(mean(x²) + eps) ⊙ weight` of each head, as Qwen 3 and Gemma 3 have it.
  rms,
  /// The same over the channels of all heads, as OLMo 2 and 3 have it.
  rms_all,
};

/// Normalization of queries and keys.
struct QkNormConfig {
  QkNormKind kind = QkNormKind::none;
  /// Of the root mean squares; from 1e-30 to 1e30.
  double eps = 1e-6;

  friend bool operator==(const QkNormConfig&, const QkNormConfig&) = default;
};

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

// Whether embeddings of heads of `dim` channels turn in the same way.
inline bool same_rotary(const RotaryConfig& a, const RotaryConfig& b, Index dim) {
  return a.rotary_dim.value_or(dim) == b.rotary_dim.value_or(dim) && a.pairing == b.pairing &&
         a.inv_freq == b.inv_freq && (a.theta == b.theta || !a.inv_freq.empty()) &&
         a.factor == b.factor;
}

}  // namespace detail

/// Positions before and after its own that a query sees: at `i` those at `j` with
/// `i − left ≤ j ≤ i + right`. See attention/token_window.hpp for the conventions of others.
struct TokenWindow {
  /// As far as the sequence goes.
  static constexpr Index unbounded = (std::numeric_limits<Index>::max)();

  Index left = 0;
  Index right = 0;

  bool bounded() const { return left != unbounded && right != unbounded; }
  friend bool operator==(const TokenWindow&, const TokenWindow&) = default;
};

/// What becomes of a score `s` of query `i` and key `j` in head `h`, before a bias is added. At
/// most one of these; a functor of your own is a template argument of LocalAttention.
struct ScoreConfig {
  /// `soft_cap · tanh(s / soft_cap)`, positive. Empty: none.
  std::optional<double> soft_cap = {};
  /// ALiBi, `s − alibi_slopes[h] · |i − j|`, `[heads]`. Empty: none.
  std::vector<double> alibi_slopes = {};

  friend bool operator==(const ScoreConfig&, const ScoreConfig&) = default;
};

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
  /// Distance over which xPos decays by `ζ`, at least 0.5. Empty: `√dim`.
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
  /// Distance over which xPos decays by `ζ`, at least 0.5. Empty: `√dim`.
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

namespace detail {

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
  const double columns =
      (1.0 + static_cast<double>(look_backward) + static_cast<double>(look_forward)) *
      static_cast<double>(window_size);
  if (static_cast<double>(heads) * static_cast<double>(window_size) * columns > 0x1p40)
    reject(argument, "a window whose bias [heads, w, look-around] has at most 2^40 values",
           window_size);
}

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

inline void require_score(const ScoreConfig& score) {
  if (score.soft_cap && !(std::isfinite(*score.soft_cap) && *score.soft_cap > 0))
    reject("score.soft_cap", "a finite positive number", *score.soft_cap);
  for (const double slope : score.alibi_slopes) require_finite("score.alibi_slopes", slope);
  if (score.soft_cap && !score.alibi_slopes.empty())
    reject("score.alibi_slopes", "none, because there is a soft_cap", score.alibi_slopes.size(),
           " slopes");
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

// Numbers that lie between those that float has.
inline void require_eps(std::string_view argument, double eps) {
  if (!(eps >= 1e-30 && eps <= 1e30)) reject(argument, "a number from 1e-30 to 1e30", eps);
}

inline void require_norm(const NormConfig& norm) {
  if (norm.kind != NormKind::layer && norm.kind != NormKind::rms)
    reject("norm.kind", "layer or rms", static_cast<int>(norm.kind));
  require_eps("norm.eps", norm.eps);
}

inline void require_qk_norm(bool qk_rmsnorm, const QkNormConfig& norm) {
  const bool rms = norm.kind == QkNormKind::rms || norm.kind == QkNormKind::rms_all;
  if (!rms && norm.kind != QkNormKind::none && norm.kind != QkNormKind::l2)
    reject("qk_norm.kind", "none, l2, rms or rms_all", static_cast<int>(norm.kind));
  if (qk_rmsnorm && rms)
    reject("qk_norm.kind", "none or l2, because qk_rmsnorm is the latter",
           norm.kind == QkNormKind::rms ? "rms" : "rms_all");
  if (rms) require_eps("qk_norm.eps", norm.eps);
}

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

// \param dim channels of a head, which `dim_name` says
inline void require_rotary(const RotaryConfig& rotary, std::string_view dim_name, Index dim) {
  if (!rotary.rotary_dim && dim % 2 != 0)
    reject(dim_name, "an even number, because rotary pairs the channels of a head", dim);
  const Index turned = rotary.rotary_dim.value_or(dim);
  if (turned < 2 || turned > dim || turned % 2 != 0)
    reject("rotary.rotary_dim",
           "an even number from 2 to the " + std::to_string(dim) + " channels of a head", turned);
  if (!(std::isfinite(rotary.theta) && rotary.theta >= 1))
    reject("rotary.theta", "a finite number of at least 1", rotary.theta);
  if (rotary.pairing != RotaryPairing::halves && rotary.pairing != RotaryPairing::interleaved)
    reject("rotary.pairing", "halves or interleaved", static_cast<int>(rotary.pairing));
  if (!rotary.inv_freq.empty() && static_cast<Index>(rotary.inv_freq.size()) != turned / 2)
    reject("rotary.inv_freq", std::to_string(turned / 2) + " frequencies, or none",
           rotary.inv_freq.size());
  // Of an angle beyond any of a position, double has no digits left.
  for (const double frequency : rotary.inv_freq)
    if (!(std::abs(frequency) <= 0x1p20))
      reject("rotary.inv_freq", "frequencies of at most 2^20", frequency);
  if (!(std::isfinite(rotary.factor) && rotary.factor > 0))
    reject("rotary.factor", "a positive finite number", rotary.factor);
}

// xPos is defined for all channels in halves.
inline void require_rotary_of_xpos(const RotaryConfig& rotary, Index dim) {
  if (rotary.rotary_dim.value_or(dim) != dim || rotary.pairing != RotaryPairing::halves ||
      !rotary.inv_freq.empty() || rotary.factor != 1)
    reject("use_xpos",
           "false, because xPos is of a rotary embedding of all channels, in halves, without given "
           "frequencies and factor",
           true);
}

}  // namespace detail

/// \throws std::invalid_argument naming the first member that is out of range
inline void validate(const LocalAttentionConfig& config) {
  if (config.token_window) {
    detail::require_token_window(config);
  } else {
    detail::require_at_least("window_size", config.window_size, 1);
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
      if (!(*config.xpos_scale_base >= 0.5))
        reject("xpos_scale_base", "at least 0.5", *config.xpos_scale_base);
    }
    detail::require_rotary_of_xpos(config.rotary, *config.dim);
  }
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

/// \throws std::invalid_argument naming the first member that is out of range
inline void validate(const LocalMHAConfig& config) {
  detail::require_at_least("dim", config.dim, 1);
  if (!config.token_window) detail::require_at_least("window_size", config.window_size, 1);
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
