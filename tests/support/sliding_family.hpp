// SPDX-License-Identifier: MIT
/// \file
/// The layers of published models as the reference computes them: what a family's config.json and
/// the names of its weights mean.
#pragma once

#include <cmath>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "reference/frequencies.hpp"
#include "reference/layer.hpp"
#include "support/golden_file.hpp"

namespace golden {

using reference::Array;
using reference::Int;
using reference::Parameters;

/// A layer of a model.
struct SlidingLayer {
  reference::LayerOptions options;
  std::optional<double> soft_cap = {};
  /// The model's weights, one below the other, that each of the reference's is.
  std::map<std::string, std::vector<std::string>> sources;
  bool one_plus_norms = false;  // 1 is added to the weights of norms
  bool channels_first = false;  // x and y are [B, dim, N]
  bool residual = false;        // y includes x

  template <typename Real>
  reference::Score<Real> score() const {
    return soft_cap ? reference::soft_cap<Real>(*soft_cap) : reference::Score<Real>{};
  }
};

namespace family {

using Json = nlohmann::json;

template <typename T>
T value(const Json& config, const char* name, T otherwise) {
  return config.contains(name) && !config[name].is_null() ? config[name].get<T>() : otherwise;
}

inline bool has(const Json& config, const char* name) {
  return config.contains(name) && !config[name].is_null();
}

/// Whether a layer of a stack has a sliding window.
inline bool slides(const Json& config, Int layer) {
  if (has(config, "layer_types"))
    return config["layer_types"].at(static_cast<std::size_t>(layer)) == "sliding_attention";
  if (has(config, "global_attn_every_n_layers"))
    return layer % config["global_attn_every_n_layers"].get<Int>() != 0;
  if (has(config, "sliding_window_pattern"))
    return (layer + 1) % config["sliding_window_pattern"].get<Int>() != 0;
  if (!value(config, "use_sliding_window", true)) return false;
  return layer >= value<Int>(config, "max_window_layers", 0) && has(config, "sliding_window");
}

/// The rotary embedding of sliding layers.
inline reference::RotaryOptions rotary(const std::string& family, const Json& config,
                                       Int dim_head) {
  reference::RotaryOptions o;
  Json rope = Json::object();
  for (const char* name : {"rope_scaling", "rope_parameters"})
    if (has(config, name)) rope = config[name];
  if (family == "olmo3") {
    // What stretches the other layers' frequencies, or is given by the kind of layer, is not asked.
    rope["rope_type"] = "default";
  } else if (rope.contains("sliding_attention")) {
    rope = rope["sliding_attention"];
  }
  o.theta = value(config, "rope_theta", 10000.0);
  // Where layers that slide have a theta of their own.
  for (const char* name : {"rope_local_base_freq", "local_rope_theta"})
    o.theta = value(config, name, o.theta);
  o.theta = value(rope, "rope_theta", o.theta);
  const double partial =
      value(rope, "partial_rotary_factor", value(config, "partial_rotary_factor", 1.0));
  const Int dim = static_cast<Int>(static_cast<double>(dim_head) * partial);
  o.rotary_dim = dim;
  const std::string type = value<std::string>(rope, "rope_type", "default");
  const double factor = value(rope, "factor", 1.0);
  const double original = value(rope, "original_max_position_embeddings",
                                value(config, "max_position_embeddings", 0.0));
  if (type == "yarn") {
    reference::Yarn yarn{.theta = o.theta, .factor = factor, .original_length = original};
    yarn.beta_fast = value(rope, "beta_fast", yarn.beta_fast);
    yarn.beta_slow = value(rope, "beta_slow", yarn.beta_slow);
    yarn.truncate = value(rope, "truncate", yarn.truncate);
    o.inv_freq = reference::yarn_frequencies(yarn, dim);
    o.factor = value(rope, "attention_factor", reference::yarn_scale(factor));
  } else if (type == "llama3") {
    o.inv_freq = reference::llama3_frequencies(
        {.theta = o.theta,
         .factor = factor,
         .low_freq_factor = rope.at("low_freq_factor").get<double>(),
         .high_freq_factor = rope.at("high_freq_factor").get<double>(),
         .original_length = original},
        dim);
  } else if (type == "linear") {
    o.inv_freq = reference::plain_frequencies(o.theta, dim);
    for (double& frequency : o.inv_freq) frequency /= factor;
  } else if (type != "default") {
    throw std::runtime_error("unexpected rope_type " + type);
  }
  return o;
}

/// Sets the sources of `name`.weight, and of its bias if there is one.
inline bool set_sources(SlidingLayer& to, const Parameters<double>& weights,
                        const std::string& name, const std::vector<std::string>& from) {
  const bool has_bias = weights.count(from.front() + ".bias") > 0;
  for (const std::string& source : from) {
    to.sources[name + ".weight"].push_back(source + ".weight");
    if (has_bias) to.sources[name + ".bias"].push_back(source + ".bias");
  }
  return has_bias;
}

/// Mistral and what followed it: the last `sliding_window` keys, the query's own included.
inline SlidingLayer decoder(const std::string& family, const Json& config,
                            const Parameters<double>& weights) {
  SlidingLayer to;
  reference::LayerOptions& o = to.options;
  o.dim = config.at("hidden_size").get<Int>();
  o.heads = config.at("num_attention_heads").get<Int>();
  o.kv_heads = value(config, "num_key_value_heads", o.heads);
  o.dim_head = value(config, "head_dim", o.dim / o.heads);
  o.attention.causal = true;
  o.attention.token_window = reference::TokenWindow{config.at("sliding_window").get<Int>() - 1, 0};
  o.attention.rotary = true;
  o.attention.rotary_options = rotary(family, config, o.dim_head);
  o.attention.rotary_options.interleaved = family == "cohere2";
  o.qk_norm_eps = value(config, "rms_norm_eps", 1e-6);
  o.qkv_bias = family == "phi3"
                   ? set_sources(to, weights, "to_qkv", {"qkv_proj"})
                   : set_sources(to, weights, "to_qkv", {"q_proj", "k_proj", "v_proj"});
  o.out_bias = set_sources(to, weights, "to_out", {"o_proj"});
  const bool gemma = family.rfind("gemma", 0) == 0;
  if (gemma) o.softmax_scale = 1 / std::sqrt(config.at("query_pre_attn_scalar").get<double>());
  if (gemma && has(config, "attn_logit_softcapping"))
    to.soft_cap = config["attn_logit_softcapping"].get<double>();
  if (weights.count("q_norm.weight") > 0) {
    o.qk_norm = family == "olmo3" ? reference::QkNorm::RmsAll : reference::QkNorm::Rms;
    to.sources["q_norm.weight"] = {"q_norm.weight"};
    to.sources["k_norm.weight"] = {"k_norm.weight"};
    to.one_plus_norms = gemma;
  }
  if (family == "gpt_oss") {
    o.sinks = true;
    to.sources["sinks"] = {"sinks"};
  }
  return to;
}

/// Half of `local_attention` keys on both sides.
inline SlidingLayer modernbert(const Json& config, const Parameters<double>& weights) {
  SlidingLayer to;
  reference::LayerOptions& o = to.options;
  o.dim = config.at("hidden_size").get<Int>();
  o.heads = config.at("num_attention_heads").get<Int>();
  o.dim_head = o.dim / o.heads;
  const Int side = config.at("local_attention").get<Int>() / 2;
  o.attention.token_window = reference::TokenWindow{side, side};
  o.attention.rotary = true;
  o.attention.rotary_options = rotary("modernbert", config, o.dim_head);
  o.qkv_bias = set_sources(to, weights, "to_qkv", {"Wqkv"});
  o.out_bias = set_sources(to, weights, "to_out", {"Wo"});
  return to;
}

inline SlidingLayer longformer(const Json& config, const Parameters<double>& weights, Int layer) {
  SlidingLayer to;
  reference::LayerOptions& o = to.options;
  o.dim = config.at("hidden_size").get<Int>();
  o.heads = config.at("num_attention_heads").get<Int>();
  o.dim_head = o.dim / o.heads;
  const Json& windows = config.at("attention_window");
  const Int window =
      (windows.is_array() ? windows.at(static_cast<std::size_t>(layer)) : windows).get<Int>();
  o.attention.token_window = reference::TokenWindow{window / 2, window / 2};
  o.out_projection = false;
  o.global_projections = true;
  o.qkv_bias = set_sources(to, weights, "to_qkv", {"query", "key", "value"});
  set_sources(to, weights, "to_qkv_global", {"query_global", "key_global", "value_global"});
  return to;
}

inline SlidingLayer longt5(const Json& config, const Parameters<double>& weights) {
  SlidingLayer to;
  reference::LayerOptions& o = to.options;
  o.dim = config.at("d_model").get<Int>();
  o.heads = config.at("num_heads").get<Int>();
  o.dim_head = config.at("d_kv").get<Int>();
  o.softmax_scale = 1;
  const Int radius = config.at("local_radius").get<Int>();
  o.attention.token_window = reference::TokenWindow{radius, radius};
  o.qkv_bias = set_sources(to, weights, "to_qkv", {"q", "k", "v"});
  o.out_bias = set_sources(to, weights, "to_out", {"o"});
  const std::string table = "relative_attention_bias.weight";
  if (weights.count(table) > 0) {
    o.relative_buckets =
        reference::RelativeBuckets{value<Int>(config, "relative_attention_num_buckets", 32),
                                   value<Int>(config, "relative_attention_max_distance", 128)};
    to.sources[table] = {table};
  }
  return to;
}

/// Chunks of positions, those before and after them.
inline SlidingLayer reformer(const Json& config, const Parameters<double>& weights) {
  SlidingLayer to;
  reference::LayerOptions& o = to.options;
  o.dim = config.at("hidden_size").get<Int>();
  o.heads = config.at("num_attention_heads").get<Int>();
  o.dim_head = value(config, "attention_head_size", o.dim / o.heads);
  o.attention.window_size = config.at("local_attn_chunk_length").get<Int>();
  o.attention.look_backward = value<Int>(config, "local_num_chunks_before", 1);
  o.attention.look_forward = value<Int>(config, "local_num_chunks_after", 0);
  o.attention.causal = value(config, "is_decoder", false);
  o.out_projection = false;
  o.qkv_bias = set_sources(to, weights, "to_qkv", {"query", "key", "value"});
  return to;
}

/// One window alone.
inline SlidingLayer snac(const Json& config, const Parameters<double>& weights) {
  SlidingLayer to;
  reference::LayerOptions& o = to.options;
  o.dim = config.at("dim").get<Int>();
  o.dim_head = value<Int>(config, "dim_head", 64);
  o.heads = o.dim / o.dim_head;
  o.prenorm = true;
  o.attention.window_size = value<Int>(config, "window_size", 32);
  o.attention.look_backward = o.attention.look_forward = 0;
  o.attention.rotary = value(config, "use_rotary_pos_emb", true);
  if (o.attention.rotary) o.attention.rotary_options.inv_freq = weights.at("rel_pos.inv_freq").data;
  for (const char* name : {"norm.weight", "norm.bias", "to_qkv.weight", "to_out.weight"})
    to.sources[name] = {name};
  to.channels_first = to.residual = true;
  return to;
}

}  // namespace family

/// \param family `model_type`
/// \param config of config.json
/// \param weights the layer's, by their names in the model
inline SlidingLayer sliding_layer(const std::string& family, const nlohmann::json& config,
                                  Int layer, const Parameters<double>& weights) {
  if (family == "longformer") return family::longformer(config, weights, layer);
  if (family == "longt5") return family::longt5(config, weights);
  if (family == "reformer") return family::reformer(config, weights);
  if (family == "snac") return family::snac(config, weights);
  if (!family::slides(config, layer))
    throw std::runtime_error("layer " + std::to_string(layer) + " of " + family +
                             " does not slide");
  if (family == "modernbert") return family::modernbert(config, weights);
  for (const char* known :
       {"mistral", "qwen2", "starcoder2", "ministral", "phi3", "qwen3", "gemma2", "gemma3",
        "gemma3_text", "gpt_oss", "cohere2", "olmo3", "mimi"})
    if (family == known) return family::decoder(family, config, weights);
  throw std::runtime_error("unknown model_type " + family);
}

/// The layer of a golden file, with the frequencies that the model gave it.
inline SlidingLayer sliding_layer(const Case& file) {
  SlidingLayer layer = sliding_layer(file.description.at("family"), file.description.at("config"),
                                     file.description.at("layer"), file.below("param/"));
  if (file.has("input/inv_freq"))
    layer.options.attention.rotary_options.inv_freq = file.at("input/inv_freq").data;
  return layer;
}

/// Whether 1 is added to a weight of the reference.
inline bool one_plus(const SlidingLayer& layer, const std::string& name) {
  return layer.one_plus_norms && name.find("_norm.weight") != std::string::npos;
}

/// The reference's weights.
inline Parameters<double> reference_weights(const SlidingLayer& layer,
                                            const Parameters<double>& weights) {
  Parameters<double> to;
  for (const auto& [name, sources] : layer.sources) {
    Array<double>& all = to[name];
    for (const std::string& source : sources) {
      const Array<double>& part = weights.at(source);
      if (all.shape.empty()) {
        all = part;
        continue;
      }
      all.shape[0] += part.shape[0];
      all.data.insert(all.data.end(), part.data.begin(), part.data.end());
    }
    if (one_plus(layer, name))
      for (double& number : all.data) number += 1;
  }
  return to;
}

/// The gradients of the model's weights, from those of the reference's; `weights` has their shapes.
inline Parameters<double> model_gradients(const SlidingLayer& layer,
                                          const Parameters<double>& gradients,
                                          const Parameters<double>& weights) {
  Parameters<double> to;
  for (const auto& [name, sources] : layer.sources) {
    auto from = gradients.at(name).data.begin();
    for (const std::string& source : sources) {
      Array<double> part(weights.at(source).shape);
      for (double& number : part.data) number = *from++;
      to[source] = part;
    }
  }
  return to;
}

}  // namespace golden
