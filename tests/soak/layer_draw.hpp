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

#include "reference/gradients.hpp"
#include "soak/draw.hpp"
#include "support/library.hpp"

namespace soak {

/// A configuration, weights, the arguments of a call, and the gradient of its result.
struct LayerDraw {
  local_mha::LocalMHAConfig config;
  reference::Parameters<double> parameters;
  Array<double> x, grad_y, bias;
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
  for (auto& [name, array] : parameters) {
    const double fan_in = std::sqrt(static_cast<double>(array.shape.back()));
    double size = 0.3;
    if (name == "to_qkv.weight")
      size = std::pow(10.0, -normed) / fan_in;
    else if (name == "to_out.weight")
      size = std::pow(10.0, random.chance(0.3) ? random.uniform(-10, 10) : 0) / fan_in;
    else if (name == "to_v_gate.0.weight")
      size = std::pow(10.0, -normed) * random.pick({0.3, 1.0, 30.0}) / fan_in;
    array = draw_numbers<Scalar>(random, array.shape, size);
    if (name == "norm.weight" || name == "q_scale" || name == "k_scale")
      for (double& number : array.data) number = round_to<Scalar>(1 + number);
    if (name != "to_qkv.weight") continue;
    const Int inner = config.heads * config.dim_head;
    const double root = config.qk_rmsnorm ? random.uniform(-5, 5) : std::log10(score) / 2;
    const double sizes[] = {root + split, root - split, size_of_v};
    for (Int row = 0; row < 3 * inner; ++row)
      for (Int c = 0; c < config.dim; ++c)
        array(row, c) = round_to<Scalar>(array(row, c) * std::pow(10.0, sizes[row / inner]));
  }
  return parameters;
}

/// Makes queries and keys multiples of one another: products that are equal, of one sign and large.
template <typename Scalar>
void align_queries(Random& random, LayerDraw& l) {
  Array<double> unused;
  align<Scalar>(random, l.x, unused, 1);
  Array<double>& weight = l.parameters.at("to_qkv.weight");
  const Int size = l.config.heads * l.config.dim_head * l.config.dim;
  const auto at = [&](Int i) -> double& { return weight.data[static_cast<std::size_t>(i)]; };
  double squares_q = 0, squares_k = 0;
  for (Int i = 0; i < size; ++i) {
    squares_q += at(i) * at(i);
    squares_k += at(size + i) * at(size + i);
  }
  if (squares_q == 0) return;
  const double ratio = random.pick({-1, 1}) * std::sqrt(squares_k / squares_q);
  for (Int i = 0; i < size; ++i) at(size + i) = round_to<Scalar>(at(i) * ratio);
}

template <typename Scalar>
LayerDraw draw_layer(Random& random) {
  LayerDraw l;
  local_mha::LocalMHAConfig& config = l.config;
  Index n = draw_length<Scalar>(random);
  config.window_size = draw_window(random, n);
  draw_rules(random, config);
  config.dim = random.integer(1, 24);
  config.dim_head = random.integer(1, 16);
  config.heads = random.integer(1, 3);
  if (random.chance(0.15)) {
    config.dim = random.pick<Index>({16, 32, 48, 64, 70});
    config.dim_head = random.pick<Index>({16, 32, 64});
  }
  Index batch = random.integer(1, 2);
  if (n * config.heads * config.dim_head * (config.dim + std::min(n, 4 * config.window_size)) >
      40'000) {
    batch = 1;
    n = std::min<Index>(n, 70);
  }
  config.prenorm = random.chance(0.4) && config.dim > 2;
  config.qk_rmsnorm = random.chance(0.4);
  if (config.qk_rmsnorm) config.qk_scale = random.pick({8.0, 4.0, 1.5, 100.0, -2.0});
  config.gate_values_per_head = random.chance(0.4);
  config.use_rotary_pos_emb = config.dim_head % 2 == 0 && random.chance(0.75);
  if (config.use_rotary_pos_emb && random.chance(0.35))
    draw_xpos(random, config, config.window_size, std::sqrt(static_cast<double>(config.dim)));
  if (!config.use_xpos && random.chance(0.1))
    config.xpos_scale_base = std::numeric_limits<double>::quiet_NaN();
  if (random.chance(0.2)) {
    config.dropout = random.pick({0.1, 0.5, 0.9});
    l.training = local_mha::Training{static_cast<std::uint64_t>(random.integer(0, 1 << 30))};
  }

  const double score = random.pick({1e-6, 0.1, 1.0, 1.0, 1.0, 3.0, 10.0, 50.0, 50.0, 1e3});
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
  if (random.chance(0.25) && config.window_size * keys <= 4096)
    l.bias = draw_bias<Scalar>(random, config.heads, config.window_size, keys);
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
reference::LayerOptions layer_options(const local_mha::LocalMHAConfig& config) {
  reference::LayerOptions options = support::options(config);
  options.attention.hiding_bias = -static_cast<double>(std::numeric_limits<Scalar>::max()) / 4;
  return options;
}

/// The weights' gradients are added to `gradients`.
template <typename Scalar>
reference::LayerGradients<Bounded<Scalar>> expected_of(
    const LayerDraw& l, reference::Parameters<Bounded<Scalar>>& gradients) {
  reference::LayerInputs<Bounded<Scalar>> in{
      exact<Scalar>(l.x), l.masked, exact<Scalar>(l.bias), {}};
  if (l.training && l.config.dropout > 0)
    in.multiplier = dropout_factors<Scalar>(l.config.dropout, l.training->seed, l.config.heads);
  return reference::local_mha_backward(layer_options<Scalar>(l.config), exact<Scalar>(l.parameters),
                                       in, exact<Scalar>(l.grad_y), gradients);
}

inline std::string describe(const LayerDraw& l) {
  const local_mha::LocalMHAConfig& c = l.config;
  std::ostringstream text;
  text << "B " << l.batch() << " N " << l.seqlen() << " dim " << c.dim << " H " << c.heads << " D "
       << c.dim_head << " w " << c.window_size << " lb " << c.look_backward << " lf "
       << (c.look_forward ? std::to_string(*c.look_forward) : "-") << (c.causal ? " causal" : "")
       << (c.exact_windowsize ? " exact" : "") << (c.prenorm ? " prenorm" : "")
       << (c.qk_rmsnorm ? " qk_rmsnorm" : "") << (c.gate_values_per_head ? " gates" : "")
       << (c.use_rotary_pos_emb ? " rotary" : "") << (c.use_xpos ? " xpos" : "")
       << describe_bias(l.bias) << (l.masked.empty() ? "" : " mask")
       << (l.training ? " dropout" : "") << l.sizes;
  return text.str();
}

}  // namespace soak
