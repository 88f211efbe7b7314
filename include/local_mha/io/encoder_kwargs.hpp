// SPDX-License-Identifier: MIT
/// \file
/// Configurations of encoders from keyword arguments of Python, as JSON, and back, in the two forms
/// that encoders have there.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

#include <nlohmann/json.hpp>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/encoder_config.hpp>
#include <local_mha/io/json.hpp>
#include <local_mha/io/kwargs.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// The encoder that a Python `LocalTransformer(num_tokens=None, **kwargs)` is. `max_seq_len`, the
/// longest sequence that Python takes, has no effect here. As local_transformer_config() else.
/// \throws std::invalid_argument naming the argument, what was expected and what came
inline EncoderConfig local_transformer_encoder_config(const nlohmann::json& kwargs) {
  detail::KeywordArguments arguments("LocalTransformer", kwargs);
  LocalTransformerConfig config{.num_tokens = 1, .max_seq_len = 1};
  arguments.only("num_tokens", nullptr, ", because an encoder takes rows, not tokens");
  arguments.optional("max_seq_len", config.max_seq_len);
  detail::take_transformer_options(arguments, config);
  validate(config);
  return encoder_config(config);
}

/// The encoder that a ModuleList of pairs is: arguments of `LocalMHA`, `depth` and, if they are
/// given, `ff_mult`, `ff_dropout`, `num_residual_streams`, `use_dynamic_pos_bias`. Where layers
/// differ, `layers` is a list with the arguments of each one's `LocalMHA`.
/// \throws std::invalid_argument naming the argument, what was expected and what came
inline EncoderConfig stack_config(const nlohmann::json& kwargs) {
  if (!kwargs.is_object()) reject("kwargs", "a JSON object", describe(kwargs));
  static constexpr const char* of_stack[] = {
      "depth", "ff_mult", "ff_dropout", "num_residual_streams", "use_dynamic_pos_bias", "layers"};
  nlohmann::json own = nlohmann::json::object();
  nlohmann::json of_layer = kwargs;
  const detail::EmptiedJson emptied(own);
  const detail::EmptiedJson emptied_layer(of_layer);
  for (const char* key : of_stack)
    if (const auto found = of_layer.find(key); found != of_layer.end()) {
      own[key] = *found;
      of_layer.erase(found);
    }
  detail::KeywordArguments arguments("Stack", own);
  EncoderConfig config;
  arguments.required("depth", config.depth);
  arguments.optional("ff_mult", config.ff_mult);
  arguments.optional("ff_dropout", config.ff_dropout);
  arguments.optional("num_residual_streams", config.num_residual_streams);
  arguments.optional("use_dynamic_pos_bias", config.use_dynamic_pos_bias);
  if (!detail::take_layers(arguments, config.layers))
    config.layers.push_back(local_mha_config(of_layer));
  else if (!of_layer.empty())
    reject(printable(of_layer.begin().key()), "nothing beside layers", "a value");
  validate(config);
  return config;
}

/// The arguments that local_transformer_encoder_config() reads.
/// \throws std::invalid_argument naming `layers` if Python's LocalTransformer has no such ones
inline nlohmann::json to_local_transformer_kwargs(const EncoderConfig& config) {
  validate(config);
  const LocalMHAConfig& layer = config.layers.front();
  const LocalTransformerConfig like =
      detail::with_members_of(layer, {.num_tokens = 1,
                                      .max_seq_len = Index{1} << 20,
                                      .dim = layer.dim,
                                      .depth = config.depth,
                                      .ff_mult = config.ff_mult,
                                      .ff_dropout = config.ff_dropout,
                                      .use_dynamic_pos_bias = config.use_dynamic_pos_bias,
                                      .num_residual_streams = config.num_residual_streams});
  if (!detail::all_are(config.layers, layer_config(like)))
    reject("layers", "what a Python LocalTransformer has: prenorm, all the same, no other options",
           "others");
  nlohmann::json kwargs = to_kwargs(like);
  kwargs["num_tokens"] = nullptr;
  return kwargs;
}

/// The arguments that stack_config() reads; those of a pair's modules, where layers are the same.
inline nlohmann::json to_stack_kwargs(const EncoderConfig& config) {
  validate(config);
  nlohmann::json kwargs = nlohmann::json::object();
  if (config.layers.size() == 1) {
    kwargs = to_kwargs(config.layers.front());
  } else {
    detail::put_layers(kwargs, config.layers);
  }
  kwargs["depth"] = config.depth;
  kwargs["ff_mult"] = config.ff_mult;
  if (config.ff_dropout != 0) kwargs["ff_dropout"] = config.ff_dropout;
  if (config.num_residual_streams != 1)
    kwargs["num_residual_streams"] = config.num_residual_streams;
  if (config.use_dynamic_pos_bias) kwargs["use_dynamic_pos_bias"] = true;
  return kwargs;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
