// SPDX-License-Identifier: MIT
/// \file
/// A random Encoder and its input, and what it should give.
#pragma once

#include <cmath>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "reference/gradients.hpp"
#include "soak/layer_draw.hpp"
#include "soak/ragged.hpp"
#include "support/random_encoder.hpp"

namespace soak {

struct EncoderDraw {
  support::RandomEncoder of;
  std::vector<Index> lengths;
  std::string sizes;

  Index batch() const { return of.x.shape[0]; }
  Index seqlen() const { return of.x.shape[1]; }
  Index dim() const { return of.x.shape[2]; }
};

template <typename Scalar>
EncoderDraw draw_encoder(Random& random) {
  EncoderDraw e{
      support::RandomEncoder(static_cast<std::uint64_t>(random.integer(0, 1 << 30))), {}, {}};
  const double size_of_x = random.chance(0.4) ? random.uniform(-10, 10) : 0;
  const double size_of_grad = random.chance(0.3) ? random.uniform(-10, 5) : 0;
  for (double& number : e.of.x.data) number = round_to<Scalar>(number * std::pow(10.0, size_of_x));
  for (double& number : e.of.grad_y.data)
    number = round_to<Scalar>(number * std::pow(10.0, size_of_grad));
  if (random.chance(0.5)) e.of.masked = draw_mask(random, e.batch(), e.seqlen());
  e.lengths = draw_lengths(random, e.batch(), e.seqlen());
  std::ostringstream text;
  text.precision(3);
  text << ", 10^(x " << size_of_x << " grad " << size_of_grad << ")";
  e.sizes = text.str();
  return e;
}

template <typename Scalar>
reference::EncoderOptions encoder_options(const local_mha::EncoderConfig& config) {
  reference::EncoderOptions options = support::options(config);
  const double hiding = -static_cast<double>(std::numeric_limits<Scalar>::max()) / 4;
  options.layer.attention.hiding_bias = hiding;
  for (reference::LayerOptions& layer : options.layers) layer.attention.hiding_bias = hiding;
  return options;
}

/// The results of all sequences, one by one, and their gradients; those of the weights are added to
/// `gradients`.
/// \return y and the gradient of x, `[B, N, dim]`
template <typename Scalar>
std::pair<Array<Bounded<Scalar>>, Array<Bounded<Scalar>>> expected_of(
    const EncoderDraw& e, reference::Parameters<Bounded<Scalar>>& gradients) {
  const auto options = encoder_options<Scalar>(e.of.config);
  const auto parameters = exact<Scalar>(e.of.parameters);
  Array<Bounded<Scalar>> y(e.of.x.shape), grad_x(e.of.x.shape);
  for (Index b = 0; b < e.batch(); ++b) {
    const Index length = length_of(e.lengths, b, e.seqlen());
    const auto masked = sequence_of(e.of.masked, b, length, e.seqlen());
    const auto pass = reference::encoder_pass(
        options, parameters, sequence_of(exact<Scalar>(e.of.x), b, length), masked);
    put_sequence(pass.y, b, y);
    put_sequence(reference::encoder_backward(options, parameters, pass,
                                             sequence_of(exact<Scalar>(e.of.grad_y), b, length),
                                             masked, gradients),
                 b, grad_x);
  }
  return {std::move(y), std::move(grad_x)};
}

inline std::string describe(const EncoderDraw& e) {
  const local_mha::EncoderConfig& c = e.of.config;
  std::ostringstream text;
  text << "B " << e.batch() << " N " << e.seqlen() << " depth " << c.depth << " streams "
       << c.num_residual_streams << " dim " << e.dim()
       << (c.use_dynamic_pos_bias ? " dynamic bias" : "") << describe_lengths(e.lengths)
       << (e.of.masked.empty() ? "" : " mask");
  for (const local_mha::LocalMHAConfig& layer : c.layers)
    text << "; H " << layer.heads << " D " << layer.dim_head << describe_window(layer)
         << (layer.prenorm ? " prenorm" : "") << (layer.qk_rmsnorm ? " qk_rmsnorm" : "")
         << (layer.gate_values_per_head ? " gates" : "") << (layer.use_xpos ? " xpos" : "");
  text << e.sizes;
  return text.str();
}

}  // namespace soak
