// SPDX-License-Identifier: MIT
/// \file
/// The configuration of Encoder.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include <local_mha/config/attention_config.hpp>
#include <local_mha/config/checks.hpp>
#include <local_mha/config/feed_forward.hpp>
#include <local_mha/config/mha_config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What Encoder computes.
struct EncoderConfig {
  /// Number of layers, each attention and feed-forward. Required.
  Index depth = 0;
  /// The attention of the layers: one that all share, or `depth`, one each, of the same dim.
  /// Required.
  std::vector<LocalMHAConfig> layers = {};
  /// The feed-forward's hidden width is `int(dim · ff_mult · 2/3)`.
  double ff_mult = 4;
  /// Probability of dropping a hidden activation of the feed-forward, in training mode.
  double ff_dropout = 0;
  /// Residual streams, which hyper-connections mix; 1: plain residual connections. The default of
  /// the Python package's LocalTransformer is 4.
  Index num_residual_streams = 1;
  /// A learned bias over distances, of all layers, in place of the rotary embedding.
  bool use_dynamic_pos_bias = false;

  friend bool operator==(const EncoderConfig&, const EncoderConfig&) = default;
};

/// The attention of layer `i`.
/// \throws std::invalid_argument if there is no such layer
inline const LocalMHAConfig& layer_config(const EncoderConfig& config, Index i) {
  if (config.layers.empty()) reject("layers", "at least 1", 0);
  const Index last = config.layers.size() == 1 ? (std::max<Index>)(1, config.depth)
                                               : static_cast<Index>(config.layers.size());
  if (i < 0 || i >= last) reject("i", "a layer of " + std::to_string(last), i);
  return config.layers[config.layers.size() == 1 ? 0 : static_cast<std::size_t>(i)];
}

namespace detail {

// All layers see the same bias, which is of their windows.
inline void require_same_bias(const LocalMHAConfig& layer, const LocalMHAConfig& first,
                              const std::string& name) {
  if (layer.use_rotary_pos_emb)
    reject(name + "use_rotary_pos_emb",
           "false, because the dynamic position bias takes the rotary's place", true);
  if (layer.token_window)
    reject(name + "token_window", "none, because there is a dynamic position bias", "one");
  const auto same = [&](const char* member, Index value, Index of_first) {
    if (value != of_first)
      reject(name + member,
             std::to_string(of_first) + ", because layers share the dynamic position bias", value);
  };
  same("heads", layer.heads, first.heads);
  same("window_size", layer.window_size, first.window_size);
  same("look_backward", layer.look_backward, first.look_backward);
  same("look_forward", resolved_look_forward(layer), resolved_look_forward(first));
}

}  // namespace detail

/// Refuses a configuration that is out of range.
/// \throws std::invalid_argument naming the first member that is out of range
inline void validate(const EncoderConfig& config) {
  detail::require_at_least("depth", config.depth, 0);
  if (config.layers.size() != 1 &&
      (config.layers.empty() || static_cast<Index>(config.layers.size()) != config.depth))
    reject("layers", "1, or as many as the depth, " + std::to_string(config.depth),
           config.layers.size());
  const LocalMHAConfig& first = config.layers.front();
  Index largest = 0;
  for (std::size_t i = 0; i < config.layers.size(); ++i) {
    const LocalMHAConfig& layer = config.layers[i];
    const std::string name = "layers[" + std::to_string(i) + "].";
    try {
      validate(layer);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(name + error.what());
    }
    if (layer.dim != first.dim)
      reject(name + "dim", std::to_string(first.dim) + ", as layers[0] has", layer.dim);
    if (config.use_dynamic_pos_bias) detail::require_same_bias(layer, first, name);
    largest = (std::max)(largest, layer.heads * layer.dim_head);
  }
  detail::require_ff_mult(first.dim, config.ff_mult);
  detail::require_probability("ff_dropout", config.ff_dropout);
  detail::require_streams("num_residual_streams", config.num_residual_streams, first.dim);
  if (config.use_dynamic_pos_bias) {
    detail::require_at_least("layers[0].dim", first.dim, 2);
    detail::require_bias_size("layers[0].window_size", first.heads, first.window_size,
                              first.look_backward, resolved_look_forward(first));
  }
  detail::require_product(
      "depth", config.depth,
      first.dim * (4 * largest + 3 * feed_forward_inner_dim(first.dim, config.ff_mult)));
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
