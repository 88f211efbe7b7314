// SPDX-License-Identifier: MIT
/// \file
/// A random LocalTransformer with tokens and labels.
#pragma once

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include <local_mha/parameters.hpp>

#include "reference/transformer.hpp"
#include "soak/layer_draw.hpp"
#include "soak/ragged.hpp"
#include "support/random_encoder.hpp"

namespace soak {

struct TransformerDraw {
  local_mha::LocalTransformerConfig config;
  reference::Parameters<double> parameters;
  Array<Int> tokens, labels;
  std::vector<unsigned char> masked;
  std::vector<Index> lengths;
  std::optional<local_mha::Training> training;

  Index batch() const { return tokens.shape[0]; }
  Index seqlen() const { return tokens.shape[1]; }
  /// Labels that count, of all sequences or of one.
  Index counted() const {
    Index all = 0;
    for (Index b = 0; b < batch(); ++b) all += counted(b);
    return all;
  }
  Index counted(Index b) const {
    const auto first = labels.data.begin() + b * seqlen();
    return std::count_if(first, first + length_of(lengths, b, seqlen()),
                         [&](Int label) { return label != config.ignore_index; });
  }
};

/// Layers of their own, which alternate or not, in place of what the model says of all.
inline void give_layers(Random& random, local_mha::LocalTransformerConfig& config) {
  const auto seed = static_cast<std::uint64_t>(random.integer(0, 1 << 30));
  const local_mha::EncoderConfig like = support::RandomEncoder(seed).config;
  local_mha::LocalTransformerConfig given{.num_tokens = config.num_tokens,
                                          .max_seq_len = config.max_seq_len,
                                          .dim = like.layers.front().dim,
                                          .depth = like.depth};
  given.ff_mult = config.ff_mult;
  given.num_residual_streams = config.num_residual_streams;
  given.use_dynamic_pos_bias = like.use_dynamic_pos_bias;
  given.layers = like.layers;
  for (local_mha::LocalMHAConfig& layer : given.layers) layer.prenorm = true;
  config = given;
}

/// A small model. Every part of it normalizes, so that few sizes matter.
template <typename Scalar>
TransformerDraw draw_transformer(Random& random) {
  TransformerDraw t;
  local_mha::LocalTransformerConfig& config = t.config;
  const Index n = std::min<Index>(draw_length<Scalar>(random), 40);
  config.num_tokens = random.chance(0.03) ? 1 : random.integer(2, 12);
  config.max_seq_len = n + random.integer(n == 0 ? 1 : 0, 3);
  config.dim = random.integer(3, 12);
  config.depth = random.pick<Index>({0, 1, 1, 2});
  config.dim_head = 2 * random.integer(1, 4);
  config.heads = random.integer(1, 2);
  config.ff_mult = random.pick({1.0, 2.0, 4.0});
  config.local_attn_window_size = random.integer(1, 20);
  draw_rules(random, config);
  config.qk_rmsnorm = random.chance(0.4);
  config.gate_values_per_head = random.chance(0.3);
  config.num_residual_streams = random.pick<Index>({1, 1, 1, 2, 4});
  config.use_dynamic_pos_bias = random.chance(0.25);
  if (config.use_dynamic_pos_bias)
    config.local_attn_window_size = std::min<Index>(config.local_attn_window_size, 6);
  else if (random.chance(0.3))
    draw_xpos(random, config,
              config.causal || config.exact_windowsize ? 0 : config.local_attn_window_size,
              std::sqrt(static_cast<double>(config.dim)));

  if (random.chance(0.25)) give_layers(random, config);
  if (random.chance(0.25)) {
    if (config.layers.empty()) config.attn_dropout = random.pick({0.0, 0.1, 0.5});
    config.ff_dropout = random.pick({0.0, 0.1, 0.5});
    t.training = local_mha::Training{static_cast<std::uint64_t>(random.integer(0, 1 << 30))};
  }

  t.parameters =
      support::named<double>(local_mha::LocalTransformerParameters<Scalar>::zeros(config));
  const double size_of_x = random.chance(0.3) ? random.uniform(-10, 10) : 0;
  for (auto& [name, array] : t.parameters) {
    const bool is_matrix = array.shape.size() == 2;
    double size = 0.3;
    if (name == "token_emb.weight" || name == "pos_emb.weight")
      size = std::pow(10.0, size_of_x);
    else if (is_matrix)
      size = (random.chance(0.2) ? power(random, -2, 2) : 1) /
             std::sqrt(static_cast<double>(array.shape.back()));
    if (array.shape.empty())
      array.data.front() = round_to<Scalar>(size * random.normal());
    else
      array = draw_numbers<Scalar>(random, array.shape, size);
    const bool is_scale = !is_matrix && (name.ends_with("norm.weight") ||
                                         name.ends_with(".0.weight") || name.ends_with("_scale"));
    if (is_scale)
      for (double& number : array.data) number = round_to<Scalar>(1 + number);
  }
  const Index batch = random.integer(1, 2);
  t.tokens = t.labels = Array<Int>({batch, n});
  const double ignored = random.chance(0.03) ? 1 : random.pick({0.0, 0.0, 0.2});
  for (Int& token : t.tokens.data) token = random.integer(0, config.num_tokens - 1);
  for (Int& label : t.labels.data)
    label = random.chance(ignored) ? config.ignore_index : random.integer(0, config.num_tokens - 1);
  t.masked = draw_mask(random, batch, n);
  // What is dropped is told by the place in the batch.
  if (!t.training) t.lengths = draw_lengths(random, batch, n);
  return t;
}

template <typename Scalar>
reference::TransformerOptions transformer_options(const local_mha::LocalTransformerConfig& config) {
  reference::TransformerOptions options = support::options(config);
  const double hiding = -static_cast<double>(std::numeric_limits<Scalar>::max()) / 4;
  options.layer.attention.hiding_bias = hiding;
  for (reference::LayerOptions& layer : options.layers) layer.attention.hiding_bias = hiding;
  return options;
}

/// Each layer's attention and feed-forward drop by a seed of their own.
template <typename Scalar>
reference::TransformerDropout<Bounded<Scalar>> dropout_of(const TransformerDraw& t) {
  reference::TransformerDropout<Bounded<Scalar>> dropout;
  if (!t.training) return dropout;
  const auto seed_of = [training = *t.training](Int part) {
    const auto words =
        reference::philox(training.seed, {static_cast<std::uint32_t>(part), 0, 0, 1});
    return std::uint64_t{words[1]} << 32 | words[0];
  };
  const local_mha::LocalTransformerConfig& config = t.config;
  if (config.attn_dropout > 0)
    dropout.attention = [=, heads = config.heads, rate = config.attn_dropout](Int layer) {
      return reference::dropout_factors<Bounded<Scalar>>(rate, seed_of(2 * layer), heads);
    };
  if (config.ff_dropout > 0)
    dropout.feed_forward = [=, rate = config.ff_dropout](Int layer) {
      return
          [of_place = reference::dropout_factors<Bounded<Scalar>>(rate, seed_of(2 * layer + 1), 1)](
              Int row, Int channel) { return of_place(0, 0, row, channel); };
    };
  return dropout;
}

inline std::string describe(const TransformerDraw& t) {
  const local_mha::LocalTransformerConfig& c = t.config;
  std::ostringstream text;
  text << "B " << t.batch() << " N " << t.seqlen() << " dim " << c.dim << " depth " << c.depth
       << " H " << c.heads << " D " << c.dim_head << " w " << c.local_attn_window_size << " lb "
       << c.look_backward << (c.causal ? " causal" : "") << (c.exact_windowsize ? " exact" : "")
       << (c.qk_rmsnorm ? " qk_rmsnorm" : "") << (c.gate_values_per_head ? " gates" : "")
       << (c.use_xpos ? " xpos" : "") << " streams " << c.num_residual_streams
       << (c.layers.empty() ? "" : " with layers") << describe_lengths(t.lengths)
       << (c.use_dynamic_pos_bias ? " dynamic bias" : "") << (t.masked.empty() ? "" : " mask")
       << (t.training ? " dropout" : "");
  return text.str();
}

}  // namespace soak
