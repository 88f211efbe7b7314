// SPDX-License-Identifier: MIT
/// \file
/// A random call of LocalMHA, and what it should give.
#pragma once

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include <local_mha/parameters.hpp>

#include "reference/dropout.hpp"
#include "reference/gradients.hpp"
#include "soak/draw.hpp"
#include "soak/sliding_draw.hpp"
#include "support/library.hpp"

namespace soak {

/// A configuration, weights, the arguments of a call, and the gradient of its result.
struct LayerDraw {
  local_mha::LocalMHAConfig config;
  reference::Parameters<double> parameters;
  Array<double> x, grad_y, bias;
  Places places;
  std::vector<unsigned char> masked;
  std::optional<local_mha::Training> training;
  std::string sizes;

  Index batch() const { return x.shape[0]; }
  Index seqlen() const { return x.shape[1]; }
};

/// Weights for inputs of about 10^x: queries and keys whose scores are about `score`, values and
/// results of sizes of their own.
template <typename Scalar>
reference::Parameters<double> draw_layer_weights(Random& random,
                                                 const local_mha::LocalMHAConfig& config,
                                                 double size_of_x, double score) {
  auto parameters = support::named<double>(local_mha::LocalMHAParameters<Scalar>::zeros(config));
  const double normed = config.prenorm ? 0 : size_of_x;  // after the norm, an exponent of 10
  const double split = random.chance(0.3) ? random.uniform(-8, 8) : 0;
  const double size_of_v = random.chance(0.3) ? random.uniform(-15, 15) : 0;
  const bool rms = resolved_qk_norm(config) >= local_mha::QkNormKind::rms;
  const bool normed_qk = rms || resolved_qk_norm(config) == local_mha::QkNormKind::l2;
  const double root = normed_qk ? random.uniform(-5, 5) : std::log10(score) / 2;
  const double of_q = root + split, of_k = root - split;
  // The exponent of what a row of to_qkv gives.
  const Int inner = config.heads * config.dim_head;
  const Int inner_k = resolved_kv_heads(config) * config.dim_head;
  const auto size_of_row = [&](Int row) {
    return std::pow(10.0, row < inner ? of_q : row < inner + inner_k ? of_k : size_of_v);
  };
  for (auto& [name, array] : parameters) {
    const double fan_in = std::sqrt(static_cast<double>(array.shape.back()));
    double size = 0.3;
    if (name == "to_qkv.weight")
      size = std::pow(10.0, -normed) / fan_in;
    else if (name == "to_out.weight")
      size = std::pow(10.0, random.chance(0.3) ? random.uniform(-10, 10) : 0) / fan_in;
    else if (name == "to_v_gate.0.weight")
      size = std::pow(10.0, -normed) * random.pick({0.3, 1.0, 30.0}) / fan_in;
    else if (name == "to_out.bias")
      size = random.chance(0.3) ? power(random, -10, 10) : 1;
    if (name == "sinks")
      array = draw_sinks<Scalar>(random, config.heads, score);
    else if (name == "relative_bias")
      array = draw_bias<Scalar>(random, array.shape);
    else
      array = draw_numbers<Scalar>(random, array.shape, size);
    if (name.ends_with("norm.weight") || name == "q_scale" || name == "k_scale")
      for (double& number : array.data) number = round_to<Scalar>(1 + number);
    if (name == "to_qkv.bias" || name == "to_qkv.weight")
      for (std::size_t i = 0; i < array.data.size(); ++i)
        array.data[i] = round_to<Scalar>(
            array.data[i] *
            size_of_row(static_cast<Int>(
                i / (array.data.size() / static_cast<std::size_t>(array.shape[0])))));
  }
  return parameters;
}

/// Makes queries and keys multiples of one another: products that are equal, of one sign and large.
template <typename Scalar>
void align_queries(Random& random, LayerDraw& l) {
  Array<double> unused;
  align<Scalar>(random, l.x, unused, 1);
  const double sign = random.pick({-1, 1});
  const local_mha::LocalMHAConfig& config = l.config;
  const Int kv_heads = resolved_kv_heads(config), group = config.heads / kv_heads;
  for (const char* name : {"to_qkv.weight", "to_qkv.bias"}) {
    if (l.parameters.count(name) == 0) continue;
    Array<double>& weight = l.parameters.at(name);
    // A head's rows.
    const Int size = static_cast<Int>(weight.data.size()) / (config.heads + 2 * kv_heads);
    const auto at = [&](Int i) -> double& { return weight.data[static_cast<std::size_t>(i)]; };
    double squares_q = 0, squares_k = 0;
    for (Int i = 0; i < config.heads * size; ++i) squares_q += at(i) * at(i);
    for (Int i = 0; i < kv_heads * size; ++i)
      squares_k += at(config.heads * size + i) * at(config.heads * size + i);
    if (squares_q == 0) return;
    const double ratio = sign * std::sqrt(squares_k * static_cast<double>(group) / squares_q);
    for (Int head = 0; head < kv_heads; ++head)
      for (Int i = 0; i < size; ++i)
        at((config.heads + head) * size + i) =
            round_to<Scalar>(at(head * group * size + i) * ratio);
  }
}

/// What the layers of other models have around their attention.
inline void draw_further_options(Random& random, local_mha::LocalMHAConfig& config) {
  using local_mha::QkNormKind;
  config.qkv_bias = random.chance(0.4);
  config.out_bias = random.chance(0.4);
  if (!config.qk_rmsnorm)
    config.qk_norm.kind = random.pick(
        {QkNormKind::none, QkNormKind::none, QkNormKind::l2, QkNormKind::rms, QkNormKind::rms_all});
  config.qk_norm.eps = random.pick({1e-6, 1e-6, 1e-5, 1e-2, 1e-12});
  if (random.chance(0.5)) config.norm.kind = local_mha::NormKind::rms;
  config.norm.eps = random.pick({1e-5, 1e-5, 1e-6, 1e-2});
  if (random.chance(0.3)) config.scale = random.pick({0.5, 1.0, 2.0, 0.0, -0.75});
  config.sinks = random.chance(0.35);
}

template <typename Scalar>
LayerDraw draw_layer(Random& random, Arrival arrival = Arrival::AtOnce) {
  LayerDraw l;
  local_mha::LocalMHAConfig& config = l.config;
  Index n = draw_length<Scalar>(random);
  const bool sliding = random.chance(0.6);  // what the Python module does not have
  config.window_size = draw_window(random, n);
  draw_rules(random, config);
  config.relative_bias = sliding && random.chance(0.4);
  if (sliding)
    draw_window_rules(random, config, n, config.relative_bias || arrival == Arrival::BitByBit);
  config.relative_bias = config.relative_bias && config.token_window;
  config.dim = random.integer(1, 24);
  config.dim_head = random.integer(1, 16);
  Heads heads{random.integer(1, 3), 1};
  if (sliding) heads = draw_heads(random);
  if (random.chance(0.15)) {
    config.dim = random.pick<Index>({16, 32, 48, 64, 70});
    config.dim_head = random.pick<Index>({16, 32, 64});
  }
  Index batch = random.integer(1, 2);
  if (n * heads.all() * config.dim_head * (config.dim + keys_seen(config, config.window_size, n)) >
      40'000) {
    batch = 1;
    n = std::min<Index>(n, 70);
    if (heads.group > 1) heads = {1, 2};
  }
  config.heads = heads.all();
  if (heads.group > 1) config.kv_heads = heads.kv_heads;
  const bool packed = sliding && arrival == Arrival::AtOnce && random.chance(0.3);
  if (packed) {
    batch = 1;
    l.places.cu_seqlens = draw_segments(random, n);
  }
  config.prenorm = random.chance(0.4) && config.dim > 2;
  config.qk_rmsnorm = random.chance(sliding ? 0.2 : 0.4);
  if (sliding) draw_further_options(random, config);
  if (resolved_qk_norm(config) == local_mha::QkNormKind::l2)
    config.qk_scale = random.pick({8.0, 4.0, 1.5, 100.0, -2.0});
  config.gate_values_per_head = random.chance(0.4);
  config.use_rotary_pos_emb =
      (sliding ? config.dim_head > 1 : config.dim_head % 2 == 0) && random.chance(0.75);
  if (config.use_rotary_pos_emb && config.dim_head % 2 == 0 && random.chance(0.35))
    draw_xpos(random, config, ahead_of_shift(config, config.window_size, n, false),
              std::sqrt(static_cast<double>(config.dim)));
  if (config.use_rotary_pos_emb && sliding)
    draw_rotary(random, config.rotary, config.dim_head, config.use_xpos);
  if (!config.use_xpos && random.chance(0.1))
    config.xpos_scale_base = std::numeric_limits<double>::quiet_NaN();
  if (random.chance(0.2)) {
    config.dropout = random.pick({0.1, 0.1, 0.5, 0.5, 0.9});
    l.training = local_mha::Training{static_cast<std::uint64_t>(random.integer(0, 1 << 30))};
  }

  const double score =
      random.chance(0.04) ? 1e3 : random.pick({1e-6, 0.1, 1.0, 1.0, 1.0, 3.0, 10.0, 50.0, 50.0});
  if (sliding && random.chance(0.35)) draw_score(random, config.score, config.heads, score);
  const double reach = config.use_xpos ? 5 : 25;
  const double size_of_x = random.chance(0.4) ? random.uniform(-reach, reach) : 0;
  l.parameters = draw_layer_weights<Scalar>(random, config, size_of_x, score);
  l.x = draw_numbers<Scalar>(random, {batch, n, config.dim}, std::pow(10.0, size_of_x));
  const double size_of_grad = random.chance(0.3) ? random.uniform(-10, 5) : 0;
  if (n > 0 && random.chance(0.25)) align_queries<Scalar>(random, l);
  l.grad_y = draw_numbers<Scalar>(random, {batch, n, config.dim}, std::pow(10.0, size_of_grad));
  l.masked = draw_mask(random, batch, n);
  const Index ahead = config.look_forward.value_or(config.causal ? 0 : 1);
  const Index keys = (1 + config.look_backward + ahead) * config.window_size;
  if (!config.token_window && random.chance(0.25) && config.window_size * keys <= 4096)
    l.bias = draw_bias<Scalar>(random,
                               {random.chance(0.5) ? config.heads : 1, config.window_size, keys});
  // Whether a hidden score, or the gate of a query that sees nothing, hides a NaN, nobody says.
  const bool may_be_poisoned =
      n > 0 && l.bias.empty() && !config.relative_bias && !config.gate_values_per_head;
  if (sliding && may_be_poisoned && random.chance(0.1)) {
    const Index row = random.integer(0, batch * n - 1);
    for (Index c = 0; c < config.dim; ++c) l.x(row / n, row % n, c) = draw_poison(random);
  }
  std::ostringstream text;
  text.precision(3);
  text << ", scores " << score << ", 10^(x " << size_of_x << " grad " << size_of_grad << ")";
  l.sizes = text.str();
  return l;
}

template <typename Scalar>
reference::Parameters<Bounded<Scalar>> exact(const reference::Parameters<double>& parameters) {
  reference::Parameters<Bounded<Scalar>> to;
  for (const auto& [name, array] : parameters) to[name] = exact<Scalar>(array);
  return to;
}

template <typename Scalar>
reference::LayerOptions options_of(const LayerDraw& l) {
  reference::LayerOptions options = support::options(l.config);
  options.attention.cu_seqlens.assign(l.places.cu_seqlens.begin(), l.places.cu_seqlens.end());
  options.attention.hiding_bias = -static_cast<double>(std::numeric_limits<Scalar>::max()) / 4;
  return options;
}

template <typename Scalar>
reference::LayerInputs<Bounded<Scalar>> inputs_of(const LayerDraw& l) {
  reference::LayerInputs<Bounded<Scalar>> in{
      exact<Scalar>(l.x), l.masked, exact<Scalar>(l.bias), {}};
  if (l.training && l.config.dropout > 0)
    in.multiplier = reference::dropout_factors<Bounded<Scalar>>(
        l.config.dropout, l.training->seed, l.config.heads,
        options_of<Scalar>(l).attention.cu_seqlens);
  in.score = support::score<Bounded<Scalar>>(l.config.score);
  return in;
}

/// The weights' gradients are added to `gradients`.
template <typename Scalar>
reference::LayerGradients<Bounded<Scalar>> expected_of(
    const LayerDraw& l, reference::Parameters<Bounded<Scalar>>& gradients) {
  return reference::local_mha_backward(options_of<Scalar>(l), exact<Scalar>(l.parameters),
                                       inputs_of<Scalar>(l), exact<Scalar>(l.grad_y), gradients);
}

inline std::string describe(const LayerDraw& l) {
  const local_mha::LocalMHAConfig& c = l.config;
  std::ostringstream text;
  text << "B " << l.batch() << " N " << l.seqlen() << " dim " << c.dim << " H " << c.heads;
  if (c.kv_heads) text << " on " << *c.kv_heads;
  text << " D " << c.dim_head << describe_window(c) << describe(l.places)
       << (c.prenorm ? " prenorm" : "") << (c.qk_rmsnorm ? " qk_rmsnorm" : "")
       << (c.gate_values_per_head ? " gates" : "")
       << (c.use_rotary_pos_emb ? describe(c.rotary) : "") << (c.use_xpos ? " xpos" : "");
  if (c.prenorm && c.norm.kind == local_mha::NormKind::rms) text << " rms norm";
  if (c.prenorm && c.norm.eps != 1e-5) text << " eps " << c.norm.eps;
  switch (c.qk_norm.kind) {
    case local_mha::QkNormKind::none:
      break;
    case local_mha::QkNormKind::l2:
      text << " l2";
      break;
    case local_mha::QkNormKind::rms:
      text << " rms " << c.qk_norm.eps;
      break;
    case local_mha::QkNormKind::rms_all:
      text << " rms_all " << c.qk_norm.eps;
      break;
  }
  if (c.scale) text << " scale " << *c.scale;
  text << (c.qkv_bias ? " qkv_bias" : "") << (c.out_bias ? " out_bias" : "") << describe(c.score)
       << describe_bias(l.bias);
  if (c.relative_bias) text << describe_bias(l.parameters.at("relative_bias"), " relative_bias ");
  if (c.sinks) text << describe_bias(l.parameters.at("sinks"), " sinks ");
  text << (l.masked.empty() ? "" : " mask") << (l.training ? " dropout" : "") << l.sizes;
  return text.str();
}

}  // namespace soak
