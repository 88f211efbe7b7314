// SPDX-License-Identifier: MIT
/// \file
/// Encoders of random configurations and weights, with inputs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <local_mha/local_mha.hpp>

#include "reference/encoder.hpp"
#include "support/library.hpp"
#include "support/random.hpp"

namespace support {

/// The reference's options for an encoder.
inline reference::EncoderOptions options(const local_mha::EncoderConfig& config) {
  reference::EncoderOptions o;
  o.depth = config.depth;
  o.use_dynamic_pos_bias = config.use_dynamic_pos_bias;
  o.streams = config.num_residual_streams;
  for (Index i = 0; i < config.depth; ++i) o.layers.push_back(options(layer_config(config, i)));
  if (config.depth == 0) o.layer = options(config.layers.front());
  return o;
}

struct RandomEncoder {
  explicit RandomEncoder(std::uint64_t seed) : random(seed) {
    config.depth = random.integer(0, 3);
    config.ff_mult = random.uniform(1, 3);
    config.num_residual_streams = random.pick({1, 1, 2, 3, 4});
    config.use_dynamic_pos_bias = random.chance(0.2);
    const Index dim = random.integer(2, 20);
    const bool share = config.depth == 0 || config.use_dynamic_pos_bias || random.chance(0.4);
    for (Index i = 0; i < (share ? 1 : config.depth); ++i) config.layers.push_back(layer(dim));
    draw();
  }

  /// Weights and inputs of a configuration.
  RandomEncoder(std::uint64_t seed, local_mha::EncoderConfig given)
      : random(seed), config(std::move(given)) {
    draw();
  }

  template <typename Scalar>
  local_mha::Encoder<Scalar> encoder() const {
    auto p = local_mha::EncoderParameters<Scalar>::zeros(config);
    assign(p, parameters);
    return local_mha::Encoder<Scalar>(config, std::move(p));
  }
  template <typename Scalar>
  local_mha::Tensor<Scalar, 3> input() const {
    return tensor<Scalar, 3>(x);
  }
  local_mha::PaddingMask mask() const { return padding_mask(masked, x.shape[0], x.shape[1]); }

  Random random;
  local_mha::EncoderConfig config;
  reference::Parameters<double> parameters;
  Array<double> x, grad_y;
  std::vector<unsigned char> masked;

 private:
  local_mha::LocalMHAConfig layer(Index dim) {
    local_mha::LocalMHAConfig c{.dim = dim, .window_size = random.integer(1, 9)};
    c.dim_head = 2 * random.integer(1, 5);
    c.heads = random.integer(1, 3);
    c.causal = random.chance(0.4);
    c.prenorm = random.chance(0.8);
    c.qk_rmsnorm = random.chance(0.3);
    c.exact_windowsize = random.chance(0.6);
    c.gate_values_per_head = random.chance(0.3);
    c.use_rotary_pos_emb = !config.use_dynamic_pos_bias;
    if (config.use_dynamic_pos_bias) return c;
    c.use_xpos = random.chance(0.2);
    if (random.chance(0.3)) {
      c.window_size = 0;
      c.token_window = {random.integer(0, 7), c.causal ? 0 : random.integer(0, 4)};
      c.first_keys = random.chance(0.3) ? random.integer(0, 4) : 0;
      if (c.heads == 2 && random.chance(0.5)) c.kv_heads = 1;
    }
    return c;
  }

  void draw() {
    auto initial = local_mha::initial_parameters<local_mha::EncoderParameters<double>>(config, 1);
    parameters = named<double>(initial);
    for (auto& [name, weight] : parameters)
      for (double& value : weight.data)
        value = static_cast<double>(static_cast<float>(value + 0.2 * random.normal()));
    const Index batch = random.integer(1, 3), n = random.integer(0, 60);
    x = random.array({batch, n, config.layers.front().dim});
    grad_y = random.array(x.shape);
    if (random.chance(0.5))
      for (Index i = 0; i < batch * n; ++i) masked.push_back(random.chance(0.2) ? 1 : 0);
  }
};

}  // namespace support
