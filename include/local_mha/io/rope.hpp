// SPDX-License-Identifier: MIT
/// \file
/// The rotary embedding that a model's `config.json` describes.
///
/// Its frequencies are `θ_m = theta^(−2m/D)`, `m < D/2`, and may be stretched for sequences that
/// are longer than those the model was first trained on, by a factor `s`:
///
/// - linear: `θ_m / s`
/// - Llama 3: with `t_m = L·θ_m/2π` turns in the original length `L`, the frequency goes from
///   `θ_m / s` at `t_m ≤ low_freq_factor` to `θ_m` at `t_m ≥ high_freq_factor`, linearly in `t_m`.
/// - YaRN (B. Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models",
///   2023): the same from `beta_slow` to `beta_fast` turns, linearly in `m`; and cosines and sines
///   are multiplied by `0.1·ln(s) + 1`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/model_config.hpp>
#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io::detail {

/// What a family's layers that slide make of the members that say how positions turn.
struct RopeRules {
  RotaryPairing pairing = RotaryPairing::halves;
  /// Layers that slide have a theta of this name; others' is not theirs, nor is its stretching.
  std::string_view local_theta = {};
  /// Layers that slide are not stretched, and look for theta above what is given by kind of layer.
  bool only_theta = false;
};

/// A positive finite number.
inline double positive(const ModelConfig& config, std::string_view member,
                       std::optional<double> otherwise = {}) {
  const double value = otherwise ? config.get(member, *otherwise) : config.required<double>(member);
  if (!(std::isfinite(value) && value > 0))
    reject(config.path(member), "a positive finite number", value);
  return value;
}

inline void stretch_llama3(const ModelConfig& rope, double factor, double original_length,
                           std::vector<double>& frequencies) {
  const double low = positive(rope, "low_freq_factor");
  const double high = positive(rope, "high_freq_factor");
  if (!(high > low)) reject(rope.path("high_freq_factor"), "more than low_freq_factor", high);
  for (double& frequency : frequencies) {
    const double turns = original_length * frequency / (2 * std::numbers::pi);
    const double kept = std::clamp((turns - low) / (high - low), 0.0, 1.0);
    frequency *= kept + (1 - kept) / factor;
  }
}

inline void stretch_yarn(const ModelConfig& rope, double factor, double original_length,
                         double theta, std::vector<double>& frequencies) {
  const double fast = positive(rope, "beta_fast", 32);
  const double slow = positive(rope, "beta_slow", 1);
  const auto last = 2 * static_cast<double>(frequencies.size()) - 1;
  // The pair, a fraction, that turns so often in the original length.
  const auto pair_of = [&](double turns) {
    return (last + 1) * std::log(original_length / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(theta));
  };
  double low = pair_of(fast);
  double high = pair_of(slow);
  if (rope.get("truncate", true)) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = (std::max)(low, 0.0);
  high = (std::min)(high, last);
  if (low == high) high += 0.001;  // no ramp, but a step
  for (std::size_t m = 0; m < frequencies.size(); ++m) {
    const double slowed = std::clamp((static_cast<double>(m) - low) / (high - low), 0.0, 1.0);
    frequencies[m] *= (1 - slowed) + slowed / factor;
  }
}

/// YaRN's factor on cosine and sine.
inline double yarn_factor(const ModelConfig& rope, double factor) {
  if (rope.has("attention_factor")) return positive(rope, "attention_factor");
  const auto of = [&](double scale) {
    return factor <= 1 ? 1 : 0.1 * scale * std::log(factor) + 1;
  };
  const double mscale = rope.get("mscale", 0.0);
  const double mscale_all_dim = rope.get("mscale_all_dim", 0.0);
  return mscale != 0 && mscale_all_dim != 0 ? of(mscale) / of(mscale_all_dim) : of(1);
}

/// The rotary embedding of a layer that slides.
/// \param config with `rope_theta`, and `rope_parameters` (which may be given by kind of layer) or
///   `rope_scaling`
/// \throws std::invalid_argument naming the member that is missing, out of range, or of a kind that
///   depends on the sequence's length
inline RotaryConfig rotary_of(const ModelConfig& config, const RopeRules& rules, Index dim_head) {
  const nlohmann::json none = nlohmann::json::object();
  ModelConfig rope(none, "config.rope_parameters");
  for (const char* member : {"rope_scaling", "rope_parameters"})
    if (config.has(member)) rope = config.object(member);
  const bool by_kind = rope.has("sliding_attention");
  if (by_kind && !rules.only_theta) rope = rope.object("sliding_attention");
  const bool stretched = !rules.only_theta && (rules.local_theta.empty() || by_kind);

  RotaryConfig rotary{.pairing = rules.pairing};
  const std::string_view theta = rules.local_theta.empty() ? "rope_theta" : rules.local_theta;
  rotary.theta = rope.get("rope_theta", config.get(theta, rotary.theta));
  const double share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0));
  if (!(share > 0 && share <= 1))
    reject(config.path("partial_rotary_factor"), "a share from 0 to 1", share);
  rotary.rotary_dim = static_cast<Index>(static_cast<double>(dim_head) * share);

  const std::string type =
      stretched ? rope.get<std::string>("rope_type", rope.get<std::string>("type", "default"))
                : "default";
  if (type == "default") return rotary;
  if (type != "linear" && type != "llama3" && type != "yarn")
    reject(rope.path("rope_type"),
           "default, linear, llama3 or yarn, whose frequencies are constant", "'", printable(type),
           "'");
  local_mha::detail::require_rotary(rotary, "head_dim", dim_head);
  rotary.inv_freq = local_mha::detail::frequencies_of(rotary, dim_head);
  const double factor = positive(rope, "factor");
  if (type == "linear") {
    for (double& frequency : rotary.inv_freq) frequency /= factor;
    return rotary;
  }
  const double original_length = rope.has("original_max_position_embeddings")
                                     ? positive(rope, "original_max_position_embeddings")
                                     : positive(config, "max_position_embeddings");
  if (type == "llama3") {
    stretch_llama3(rope, factor, original_length, rotary.inv_freq);
  } else {
    if (!(rotary.theta > 1)) reject(rope.path("rope_theta"), "more than 1", rotary.theta);
    stretch_yarn(rope, factor, original_length, rotary.theta, rotary.inv_freq);
    rotary.factor = yarn_factor(rope, factor);
  }
  return rotary;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io::detail
