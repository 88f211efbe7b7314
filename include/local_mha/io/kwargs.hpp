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

#include <algorithm>
#include <cmath>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/json.hpp>
#include <local_mha/io/keyword_arguments.hpp>
#include <local_mha/io/kwargs_options.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

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

namespace detail {

/// Keyword arguments of a LocalMHA each, in a list.
/// \return whether it is there
inline bool take_layers(KeywordArguments& arguments, std::vector<LocalMHAConfig>& layers) {
  const nlohmann::json* given = arguments.find("layers");
  if (given == nullptr) return false;
  if (!given->is_array()) reject("layers", "a list of keyword arguments", describe(*given));
  for (const nlohmann::json& layer : *given) layers.push_back(local_mha_config(layer));
  return true;
}

inline void put_layers(nlohmann::json& kwargs, const std::vector<LocalMHAConfig>& layers) {
  kwargs["layers"] = nlohmann::json::array();
  for (const LocalMHAConfig& layer : layers) kwargs["layers"].push_back(to_kwargs(layer));
}

/// The same model if its layers are such ones, by the members that Python has.
inline LocalTransformerConfig with_members_of(const LocalMHAConfig& layer,
                                              LocalTransformerConfig config) {
  config.layers.clear();
  config.causal = layer.causal;
  config.local_attn_window_size = layer.window_size;
  config.dim_head = layer.dim_head;
  config.heads = layer.heads;
  config.attn_dropout = layer.dropout;
  config.use_xpos = layer.use_xpos;
  config.xpos_scale_base = layer.xpos_scale_base;
  config.qk_rmsnorm = resolved_qk_norm(layer) == QkNormKind::l2;
  config.qk_scale = layer.qk_scale;
  config.exact_windowsize = layer.exact_windowsize;
  config.look_backward = layer.look_backward;
  config.look_forward = layer.look_forward;
  config.gate_values_per_head = layer.gate_values_per_head;
  return config;
}

/// Whether all layers are this one.
inline bool all_are(const std::vector<LocalMHAConfig>& layers, const LocalMHAConfig& layer) {
  return std::all_of(layers.begin(), layers.end(), [&](const auto& each) { return each == layer; });
}

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
  take_layers(arguments, config.layers);
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
/// becomes what the Python code takes, `local_attn_window_size // 2`. `layers`, which Python does
/// not have, is a list of the arguments of each layer's `LocalMHA`, or of one that all share.
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

/// The keyword arguments for which a Python `LocalTransformer` computes the same; `layers` among
/// them if its layers have what Python does not.
inline nlohmann::json to_kwargs(const LocalTransformerConfig& config) {
  if (!config.layers.empty()) {
    const auto like = detail::with_members_of(config.layers.front(), config);
    if (detail::all_are(config.layers, layer_config(like))) return to_kwargs(like);
  }
  nlohmann::json kwargs = nlohmann::json::object();
  kwargs["num_tokens"] = config.num_tokens;
  kwargs["max_seq_len"] = config.max_seq_len;
  kwargs["dim"] = config.dim;
  kwargs["depth"] = config.depth;
  kwargs["ff_mult"] = config.ff_mult;
  kwargs["ff_dropout"] = config.ff_dropout;
  kwargs["ignore_index"] = config.ignore_index;
  kwargs["use_dynamic_pos_bias"] = config.use_dynamic_pos_bias;
  kwargs["num_residual_streams"] = config.num_residual_streams;
  if (!config.layers.empty()) {
    detail::put_layers(kwargs, config.layers);
    return kwargs;
  }
  kwargs["causal"] = config.causal;
  kwargs["local_attn_window_size"] = config.local_attn_window_size;
  kwargs["dim_head"] = config.dim_head;
  kwargs["heads"] = config.heads;
  kwargs["attn_dropout"] = config.attn_dropout;
  detail::put_attention_options(kwargs, config);
  return kwargs;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
