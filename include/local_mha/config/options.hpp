// SPDX-License-Identifier: MIT
/// \file
/// The options that configurations are made of, and what is asked of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <local_mha/config/checks.hpp>
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
  /// Layer norm or RMS norm.
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
  /// None, L2 or RMS.
  QkNormKind kind = QkNormKind::none;
  /// Of the root mean squares; from 1e-30 to 1e30.
  double eps = 1e-6;

  friend bool operator==(const QkNormConfig&, const QkNormConfig&) = default;
};

/// Positions before and after its own that a query sees: at `i` those at `j` with
/// `i − left ≤ j ≤ i + right`. See attention/token_window.hpp for the conventions of others.
struct TokenWindow {
  /// As far as the sequence goes.
  static constexpr Index unbounded = (std::numeric_limits<Index>::max)();

  /// Positions back; `unbounded`: all of them.
  Index left = 0;
  /// Positions ahead; `unbounded`: all of them.
  Index right = 0;

  /// Whether both ends are.
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

namespace detail {

// Whether embeddings of heads of `dim` channels turn in the same way.
inline bool same_rotary(const RotaryConfig& a, const RotaryConfig& b, Index dim) {
  return a.rotary_dim.value_or(dim) == b.rotary_dim.value_or(dim) && a.pairing == b.pairing &&
         a.inv_freq == b.inv_freq && (a.theta == b.theta || !a.inv_freq.empty()) &&
         a.factor == b.factor;
}

inline void require_score(const ScoreConfig& score) {
  if (score.soft_cap && !(std::isfinite(*score.soft_cap) && *score.soft_cap > 0))
    reject("score.soft_cap", "a finite positive number", *score.soft_cap);
  for (const double slope : score.alibi_slopes) require_finite("score.alibi_slopes", slope);
  if (score.soft_cap && !score.alibi_slopes.empty())
    reject("score.alibi_slopes", "none, because there is a soft_cap", score.alibi_slopes.size(),
           " slopes");
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

}  // namespace local_mha::inline LOCAL_MHA_ABI
