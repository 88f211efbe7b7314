// SPDX-License-Identifier: MIT
/// \file
/// Configurations from the Python modules' keyword arguments, as JSON, and back.
///
/// The arguments are those of local-attention 1.11.2. One that is absent or null has the Python
/// default. An unknown one, one of the wrong type and one that asks for what this library does not
/// have is an error that names it; so is every value that validate() rejects. Options that Python
/// does not have are there under the names of the configuration's members (`softmax_scale` for a
/// layer's `scale`), and are written only where they are not at their defaults.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/json.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

/// Takes arguments out of a JSON object, and rejects what nobody took.
class KeywordArguments {
 public:
  /// \param module the Python module, for errors
  /// \param argument the argument of it that these are members of; empty: none
  KeywordArguments(std::string_view module, const nlohmann::json& kwargs,
                   std::string_view argument = "")
      : module_(module), prefix_(argument), kwargs_(kwargs) {
    if (!kwargs.is_object())
      reject(argument.empty() ? "kwargs" : argument, "a JSON object", describe(kwargs));
    if (!prefix_.empty()) prefix_ += '.';
  }

  /// Null if absent or null.
  const nlohmann::json* find(std::string_view key) {
    known_.emplace_back(key);
    const auto found = kwargs_.find(key);
    return found == kwargs_.end() || found->is_null() ? nullptr : &*found;
  }

  /// Sets `member` unless the argument is absent or null.
  template <typename Member>
  void optional(std::string_view key, Member& member) {
    if (const nlohmann::json* value = find(key))
      convert(prefix_ + std::string(key), *value, member);
  }

  /// One of some words.
  /// \param words pairs of a word and what it means
  template <typename Member, typename Words>
  void choice(std::string_view key, Member& member, const Words& words) {
    const nlohmann::json* value = find(key);
    if (value == nullptr) return;
    std::string all;
    for (const auto& [word, meaning] : words) {
      if (*value == word) {
        member = meaning;
        return;
      }
      all += (all.empty() ? "" : ", ") + std::string(word);
    }
    reject(prefix_ + std::string(key), "one of " + all, describe(*value));
  }

  template <typename Member>
  void required(std::string_view key, Member& member) {
    const nlohmann::json* value = find(key);
    if (value == nullptr)
      reject(key, "a value, because " + module_ + " has no default for it", "none");
    convert(key, *value, member);
  }

  /// An argument that only one value of is supported, which absent or null stands for as well.
  void only(std::string_view key, const nlohmann::json& value, std::string_view reason) {
    const nlohmann::json* given = find(key);
    if (given != nullptr && *given != value)
      reject(key, describe(value) + std::string(reason), describe(*given));
  }

  /// An integer of 64 bits.
  static bool is_index(const nlohmann::json& value) {
    constexpr auto largest = static_cast<std::uint64_t>((std::numeric_limits<std::int64_t>::max)());
    return value.is_number_integer() &&
           !(value.is_number_unsigned() && value.get<std::uint64_t>() > largest);
  }

  void reject_unknown() const {
    for (const auto& [key, value] : kwargs_.items()) {
      bool known = false;
      std::string all;
      for (const std::string& name : known_) {
        known = known || name == key;
        all += (all.empty() ? "" : ", ") + name;
      }
      if (!known)
        reject(prefix_ + printable(key),
               (prefix_.empty() ? "a keyword argument of " : "a member of an argument of ") +
                   module_ + " (" + all + ")",
               describe(value));
    }
  }

 private:
  template <typename Member>
  static void convert(std::string_view key, const nlohmann::json& value,
                      std::optional<Member>& member) {
    convert(key, value, member.emplace());
  }

  static void convert(std::string_view key, const nlohmann::json& value,
                      std::vector<double>& member) {
    if (!value.is_array()) reject(key, "an array of numbers", describe(value));
    for (const nlohmann::json& number : value) convert(key, number, member.emplace_back());
  }

  static void convert(std::string_view key, const nlohmann::json& value, bool& member) {
    if (!value.is_boolean()) reject(key, "true or false", describe(value));
    member = value.get<bool>();
  }

  static void convert(std::string_view key, const nlohmann::json& value, std::int64_t& member) {
    if (!is_index(value)) reject(key, "an integer", describe(value));
    member = value.get<std::int64_t>();
  }

  static void convert(std::string_view key, const nlohmann::json& value, double& member) {
    if (!value.is_number()) reject(key, "a number", describe(value));
    member = value.get<double>();
  }

  std::string module_;
  std::string prefix_;
  const nlohmann::json& kwargs_;
  std::vector<std::string> known_;
};

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

/// The configuration of a Python `LocalAttention(**kwargs)`.
///
/// `autopad` is accepted and does nothing: any sequence length works here. An absent
/// `xpos_scale_base` becomes what the Python code takes, `window_size // 2`, so that weights give
/// their results.
/// \throws std::invalid_argument naming the argument, what was expected and what came
inline LocalAttentionConfig local_attention_config(const nlohmann::json& kwargs) {
  detail::KeywordArguments arguments("LocalAttention", kwargs);
  LocalAttentionConfig config;
  bool autopad = false;
  arguments.required("window_size", config.window_size);
  arguments.optional("causal", config.causal);
  arguments.optional("look_backward", config.look_backward);
  arguments.optional("look_forward", config.look_forward);
  arguments.optional("dropout", config.dropout);
  arguments.optional("shared_qk", config.shared_qk);
  arguments.optional("dim", config.dim);
  arguments.optional("autopad", autopad);
  arguments.optional("exact_windowsize", config.exact_windowsize);
  arguments.optional("scale", config.scale);
  arguments.optional("use_rotary_pos_emb", config.use_rotary_pos_emb);
  arguments.optional("use_xpos", config.use_xpos);
  arguments.optional("xpos_scale_base", config.xpos_scale_base);
  detail::take_rotary("LocalAttention", arguments, config.rotary);
  // Deprecated: [channels of a head, heads], of which Python reads the first.
  if (const nlohmann::json* channels = arguments.find("rel_pos_emb_config")) {
    if (!channels->is_array() || channels->empty() ||
        !detail::KeywordArguments::is_index((*channels)[0]))
      reject("rel_pos_emb_config", "[dim, heads]", describe(*channels));
    config.dim = (*channels)[0].get<Index>();
  }
  arguments.reject_unknown();
  detail::resolve_xpos(config.dim && config.use_rotary_pos_emb, "window_size", config.window_size,
                       config.use_xpos, config.xpos_scale_base);
  validate(config);
  return config;
}

/// The configuration of a Python `LocalMHA(**kwargs)`.
///
/// An absent `xpos_scale_base` becomes what the Python code takes, `window_size // 2`, so that
/// weights give their results.
/// \throws std::invalid_argument naming the argument, what was expected and what came
inline LocalMHAConfig local_mha_config(const nlohmann::json& kwargs) {
  detail::KeywordArguments arguments("LocalMHA", kwargs);
  LocalMHAConfig config;
  arguments.required("dim", config.dim);
  if (kwargs.is_object() && kwargs.contains("token_window"))
    arguments.optional("window_size", config.window_size);
  else
    arguments.required("window_size", config.window_size);
  arguments.optional("dim_head", config.dim_head);
  arguments.optional("heads", config.heads);
  arguments.optional("dropout", config.dropout);
  arguments.optional("causal", config.causal);
  arguments.optional("prenorm", config.prenorm);
  arguments.optional("use_rotary_pos_emb", config.use_rotary_pos_emb);
  detail::take_attention_options(arguments, config);
  detail::take_layer_options(arguments, config);
  arguments.reject_unknown();
  detail::resolve_xpos(config.use_rotary_pos_emb, "window_size", config.window_size,
                       config.use_xpos, config.xpos_scale_base);
  validate(config);
  return config;
}

namespace detail {

/// All but the tokens' of a LocalTransformer.
inline void take_transformer_options(KeywordArguments& arguments, LocalTransformerConfig& config) {
  arguments.required("dim", config.dim);
  arguments.required("depth", config.depth);
  arguments.optional("causal", config.causal);
  arguments.optional("local_attn_window_size", config.local_attn_window_size);
  arguments.optional("dim_head", config.dim_head);
  arguments.optional("heads", config.heads);
  arguments.optional("ff_mult", config.ff_mult);
  arguments.optional("attn_dropout", config.attn_dropout);
  arguments.optional("ff_dropout", config.ff_dropout);
  arguments.optional("ignore_index", config.ignore_index);
  arguments.optional("use_dynamic_pos_bias", config.use_dynamic_pos_bias);
  arguments.optional("num_residual_streams", config.num_residual_streams);
  take_attention_options(arguments, config);
  arguments.only("global_attn_layer", nullptr, ", because global layers are not supported");
  arguments.only("layers_insert_global_attn", nullptr, ", because global layers are not supported");
  arguments.reject_unknown();
  resolve_xpos(!config.use_dynamic_pos_bias, "local_attn_window_size",
               config.local_attn_window_size, config.use_xpos, config.xpos_scale_base);
}

}  // namespace detail

/// The configuration of a Python `LocalTransformer(**kwargs)`.
///
/// An absent `num_residual_streams` becomes 1, what versions of the package without it compute;
/// where there are weights, load_local_transformer() looks at them. An absent `xpos_scale_base`
/// becomes what the Python code takes, `local_attn_window_size // 2`.
/// \throws std::invalid_argument naming the argument, what was expected and what came
inline LocalTransformerConfig local_transformer_config(const nlohmann::json& kwargs) {
  detail::KeywordArguments arguments("LocalTransformer", kwargs);
  LocalTransformerConfig config;
  arguments.required("num_tokens", config.num_tokens);
  arguments.required("max_seq_len", config.max_seq_len);
  detail::take_transformer_options(arguments, config);
  validate(config);
  return config;
}

/// The keyword arguments for which a Python `LocalAttention` computes the same.
inline nlohmann::json to_kwargs(const LocalAttentionConfig& config) {
  nlohmann::json kwargs = nlohmann::json::object();
  kwargs["window_size"] = config.window_size;
  kwargs["causal"] = config.causal;
  kwargs["look_backward"] = config.look_backward;
  kwargs["dropout"] = config.dropout;
  kwargs["shared_qk"] = config.shared_qk;
  kwargs["autopad"] = true;
  kwargs["exact_windowsize"] = config.exact_windowsize;
  kwargs["use_rotary_pos_emb"] = config.use_rotary_pos_emb;
  kwargs["use_xpos"] = config.use_xpos;
  detail::put(kwargs, "look_forward", config.look_forward);
  detail::put(kwargs, "dim", config.dim);
  detail::put(kwargs, "scale", config.scale);
  detail::put(kwargs, "xpos_scale_base", config.xpos_scale_base);
  if (config.use_xpos && !config.xpos_scale_base && config.dim)
    kwargs["xpos_scale_base"] = std::sqrt(static_cast<double>(*config.dim));
  detail::put_rotary(kwargs, config.rotary);
  return kwargs;
}

/// The keyword arguments for which a Python `LocalMHA` computes the same.
inline nlohmann::json to_kwargs(const LocalMHAConfig& config) {
  nlohmann::json kwargs = nlohmann::json::object();
  kwargs["dim"] = config.dim;
  if (!config.token_window) kwargs["window_size"] = config.window_size;
  kwargs["dim_head"] = config.dim_head;
  kwargs["heads"] = config.heads;
  kwargs["dropout"] = config.dropout;
  kwargs["causal"] = config.causal;
  kwargs["prenorm"] = config.prenorm;
  kwargs["use_rotary_pos_emb"] = config.use_rotary_pos_emb;
  detail::put_attention_options(kwargs, config);
  detail::put_layer_options(kwargs, config);
  return kwargs;
}

/// The keyword arguments for which a Python `LocalTransformer` computes the same.
inline nlohmann::json to_kwargs(const LocalTransformerConfig& config) {
  nlohmann::json kwargs = nlohmann::json::object();
  kwargs["num_tokens"] = config.num_tokens;
  kwargs["max_seq_len"] = config.max_seq_len;
  kwargs["dim"] = config.dim;
  kwargs["depth"] = config.depth;
  kwargs["causal"] = config.causal;
  kwargs["local_attn_window_size"] = config.local_attn_window_size;
  kwargs["dim_head"] = config.dim_head;
  kwargs["heads"] = config.heads;
  kwargs["ff_mult"] = config.ff_mult;
  kwargs["attn_dropout"] = config.attn_dropout;
  kwargs["ff_dropout"] = config.ff_dropout;
  kwargs["ignore_index"] = config.ignore_index;
  kwargs["use_dynamic_pos_bias"] = config.use_dynamic_pos_bias;
  kwargs["num_residual_streams"] = config.num_residual_streams;
  detail::put_attention_options(kwargs, config);
  return kwargs;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
