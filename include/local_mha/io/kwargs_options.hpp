// SPDX-License-Identifier: MIT
/// \file
/// The keyword arguments that several modules have: options of their attention, and what Python
/// does not have, read and written.
#pragma once

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/json.hpp>
#include <local_mha/io/keyword_arguments.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

/// The scale base that the Python code takes, which is not the documented one, and no xPos where it
/// has no rotary embedding to act on.
inline void resolve_xpos(bool has_rotary, std::string_view window_key, Index window_size,
                         bool& use_xpos, std::optional<double>& xpos_scale_base) {
  use_xpos = use_xpos && has_rotary;
  if (!use_xpos || xpos_scale_base || window_size < 1) return;  // validate() rejects the last
  if (window_size == 1)
    reject("xpos_scale_base",
           "a value, because the Python default, " + std::string(window_key) +
               " // 2, is 0 for a window of 1, and Python divides by it",
           "none");
  const Index half = window_size / 2;
  xpos_scale_base = static_cast<double>(half);
}

/// What LocalMHA and LocalTransformer hand on to every attention.
template <typename Config>
void take_attention_options(KeywordArguments& kwargs, Config& config) {
  kwargs.optional("qk_rmsnorm", config.qk_rmsnorm);
  kwargs.optional("qk_scale", config.qk_scale);
  kwargs.optional("use_xpos", config.use_xpos);
  kwargs.optional("xpos_scale_base", config.xpos_scale_base);
  kwargs.optional("exact_windowsize", config.exact_windowsize);
  kwargs.optional("look_backward", config.look_backward);
  kwargs.optional("look_forward", config.look_forward);
  kwargs.optional("gate_values_per_head", config.gate_values_per_head);
  kwargs.only("shared_qk", false, ", because a layer projects its keys");
  // Deprecated: [channels of a head, heads], of which Python reads the first.
  if (const nlohmann::json* channels = kwargs.find("rel_pos_emb_config"))
    if (!channels->is_array() || channels->empty() || (*channels)[0] != config.dim_head)
      reject("rel_pos_emb_config", "[dim_head, heads] with the layer's dim_head",
             channels->is_array() && !channels->empty() ? describe((*channels)[0]) + " first"
                                                        : describe(*channels));
}

/// The words for members of RotaryConfig.
inline constexpr std::array rotary_pairings{
    std::pair<std::string_view, RotaryPairing>{"halves", RotaryPairing::halves},
    std::pair<std::string_view, RotaryPairing>{"interleaved", RotaryPairing::interleaved},
};

/// RotaryConfig, an object with its members. Python has none.
inline void take_rotary(std::string_view module, KeywordArguments& kwargs, RotaryConfig& rotary) {
  const nlohmann::json* given = kwargs.find("rotary");
  if (given == nullptr) return;
  KeywordArguments members(module, *given, "rotary");
  members.optional("theta", rotary.theta);
  members.optional("rotary_dim", rotary.rotary_dim);
  members.choice("pairing", rotary.pairing, rotary_pairings);
  members.optional("inv_freq", rotary.inv_freq);
  members.optional("factor", rotary.factor);
  members.reject_unknown();
}

/// The words for members of QkNormConfig.
inline constexpr std::array qk_norm_kinds{
    std::pair<std::string_view, QkNormKind>{"none", QkNormKind::none},
    std::pair<std::string_view, QkNormKind>{"l2", QkNormKind::l2},
    std::pair<std::string_view, QkNormKind>{"rms", QkNormKind::rms},
    std::pair<std::string_view, QkNormKind>{"rms_all", QkNormKind::rms_all},
};

/// QkNormConfig or NormConfig, an object with its members. Python has none.
template <typename Norm, typename Words>
void take_norm(KeywordArguments& kwargs, std::string_view key, const Words& kinds, Norm& norm) {
  const nlohmann::json* given = kwargs.find(key);
  if (given == nullptr) return;
  KeywordArguments members("LocalMHA", *given, key);
  members.choice("kind", norm.kind, kinds);
  members.optional("eps", norm.eps);
  members.reject_unknown();
}

/// The words for members of NormConfig.
inline constexpr std::array norm_kinds{
    std::pair<std::string_view, NormKind>{"layer", NormKind::layer},
    std::pair<std::string_view, NormKind>{"rms", NormKind::rms},
};

/// TokenWindow, an object with its members, of which −1 is unbounded.
inline void take_token_window(KeywordArguments& kwargs, std::optional<TokenWindow>& window) {
  const nlohmann::json* given = kwargs.find("token_window");
  if (given == nullptr) return;
  window.emplace();
  KeywordArguments members("LocalMHA", *given, "token_window");
  members.optional("left", window->left);
  members.optional("right", window->right);
  members.reject_unknown();
  for (Index* side : {&window->left, &window->right})
    if (*side == -1) *side = TokenWindow::unbounded;
}

/// ScoreConfig, an object with its members.
inline void take_score(KeywordArguments& kwargs, ScoreConfig& score) {
  const nlohmann::json* given = kwargs.find("score");
  if (given == nullptr) return;
  KeywordArguments members("LocalMHA", *given, "score");
  members.optional("soft_cap", score.soft_cap);
  members.optional("alibi_slopes", score.alibi_slopes);
  members.reject_unknown();
}

/// What the Python module does not have. `scale` it hands on to its attention twice, and fails.
inline void take_layer_options(KeywordArguments& kwargs, LocalMHAConfig& config) {
  kwargs.optional("qkv_bias", config.qkv_bias);
  kwargs.optional("out_bias", config.out_bias);
  kwargs.optional("softmax_scale", config.scale);
  take_rotary("LocalMHA", kwargs, config.rotary);
  take_norm(kwargs, "qk_norm", qk_norm_kinds, config.qk_norm);
  take_norm(kwargs, "norm", norm_kinds, config.norm);
  kwargs.optional("kv_heads", config.kv_heads);
  take_token_window(kwargs, config.token_window);
  take_score(kwargs, config.score);
  kwargs.optional("sinks", config.sinks);
  kwargs.optional("relative_bias", config.relative_bias);
  kwargs.optional("first_keys", config.first_keys);
}

template <typename Value>
void put(nlohmann::json& kwargs, const char* key, const std::optional<Value>& value) {
  if (value) kwargs[key] = *value;
}

template <typename Config>
void put_attention_options(nlohmann::json& kwargs, const Config& config) {
  kwargs["qk_rmsnorm"] = config.qk_rmsnorm;
  kwargs["qk_scale"] = config.qk_scale;
  kwargs["use_xpos"] = config.use_xpos;
  put(kwargs, "xpos_scale_base", config.xpos_scale_base);
  if (config.use_xpos && !config.xpos_scale_base)
    kwargs["xpos_scale_base"] = std::sqrt(static_cast<double>(config.dim));
  kwargs["exact_windowsize"] = config.exact_windowsize;
  kwargs["look_backward"] = config.look_backward;
  put(kwargs, "look_forward", config.look_forward);
  kwargs["gate_values_per_head"] = config.gate_values_per_head;
}

template <typename Value, typename Words>
void put_choice(nlohmann::json& kwargs, const char* key, const Value& value, const Words& words) {
  for (const auto& [word, meaning] : words)
    if (meaning == value) kwargs[key] = word;
}

/// Only if it is not the default.
inline void put_rotary(nlohmann::json& kwargs, const RotaryConfig& rotary) {
  if (rotary == RotaryConfig{}) return;
  nlohmann::json& members = kwargs["rotary"] = nlohmann::json::object();
  members["theta"] = rotary.theta;
  put(members, "rotary_dim", rotary.rotary_dim);
  put_choice(members, "pairing", rotary.pairing, rotary_pairings);
  if (!rotary.inv_freq.empty()) members["inv_freq"] = rotary.inv_freq;
  members["factor"] = rotary.factor;
}

template <typename Norm, typename Words>
void put_norm(nlohmann::json& kwargs, const char* key, const Words& kinds, const Norm& norm) {
  if (norm == Norm{}) return;
  nlohmann::json& members = kwargs[key] = nlohmann::json::object();
  put_choice(members, "kind", norm.kind, kinds);
  members["eps"] = norm.eps;
}

inline void put_token_window(nlohmann::json& kwargs, const std::optional<TokenWindow>& window) {
  if (!window) return;
  const auto side = [](Index size) { return size == TokenWindow::unbounded ? -1 : size; };
  nlohmann::json& members = kwargs["token_window"] = nlohmann::json::object();
  members["left"] = side(window->left);
  members["right"] = side(window->right);
}

/// Only if it is not the default.
inline void put_score(nlohmann::json& kwargs, const ScoreConfig& score) {
  if (score == ScoreConfig{}) return;
  nlohmann::json& members = kwargs["score"] = nlohmann::json::object();
  put(members, "soft_cap", score.soft_cap);
  if (!score.alibi_slopes.empty()) members["alibi_slopes"] = score.alibi_slopes;
}

/// Only where they are not at their defaults, so that Python takes what it can compute.
inline void put_layer_options(nlohmann::json& kwargs, const LocalMHAConfig& config) {
  if (config.qkv_bias) kwargs["qkv_bias"] = true;
  if (config.out_bias) kwargs["out_bias"] = true;
  put(kwargs, "softmax_scale", config.scale);
  put_rotary(kwargs, config.rotary);
  put_norm(kwargs, "qk_norm", qk_norm_kinds, config.qk_norm);
  put_norm(kwargs, "norm", norm_kinds, config.norm);
  put(kwargs, "kv_heads", config.kv_heads);
  put_token_window(kwargs, config.token_window);
  put_score(kwargs, config.score);
  if (config.sinks) kwargs["sinks"] = true;
  if (config.relative_bias) kwargs["relative_bias"] = true;
  if (config.first_keys != 0) kwargs["first_keys"] = config.first_keys;
}

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
