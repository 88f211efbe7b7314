// SPDX-License-Identifier: MIT
/// \file
/// The layers of a transformer and their parts, written out naively.
#pragma once

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "reference/array.hpp"
#include "reference/attention.hpp"
#include "reference/layer.hpp"
#include "reference/residual_streams.hpp"

namespace reference {

/// x · Φ(x), with the exact normal distribution function.
template <typename Real>
Real gelu(const Real& x) {
  using std::erf;
  using std::sqrt;
  return x * Real(0.5) * (Real(1) + erf(x / sqrt(Real(2))));
}

/// LayerNorm, Linear to twice the width, first half · gelu(second half), Linear back.
/// \param multiplier factor of a row's hidden channel, that is 0 or 1 / (1 - dropout); empty: 1
template <typename Real>
Array<Real> feed_forward(const Parameters<Real>& parameters, const Array<Real>& x,
                         const std::string& prefix = "",
                         const std::function<Real(Int, Int)>& multiplier = {}) {
  const Array<Real> normed =
      layer_norm(x, parameters.at(prefix + "0.weight"), parameters.at(prefix + "0.bias"));
  const Array<Real> both = linear(normed, parameters.at(prefix + "1.weight"));
  const Int width = both.shape.back(), inner = width / 2;
  std::vector<Int> shape = both.shape;
  shape.back() = inner;
  Array<Real> gated(shape);
  const Int rows = static_cast<Int>(both.data.size()) / width;
  for (Int row = 0; row < rows; ++row)
    for (Int c = 0; c < inner; ++c)
      gated.data[static_cast<std::size_t>(row * inner + c)] =
          both.data[static_cast<std::size_t>(row * width + c)] *
          gelu(both.data[static_cast<std::size_t>(row * width + inner + c)]) *
          (multiplier ? multiplier(row, c) : Real(1));
  return linear(gated, parameters.at(prefix + "4.weight"));
}

/// What the MLP 1 → hidden → hidden → heads gives for a distance, `[heads]`.
template <typename Real>
Array<Real> distance_bias(const Parameters<Real>& parameters, Int distance,
                          const std::string& prefix = "") {
  const auto layer = [&](const Array<Real>& x, const char* name) {
    return linear(x, parameters.at(prefix + "mlp." + name + ".weight"),
                  parameters.at(prefix + "mlp." + name + ".bias"));
  };
  const auto silu = [](Array<Real> x) {
    for (Real& value : x.data) value *= sigmoid(value);
    return x;
  };
  Array<Real> x({1}, static_cast<Real>(distance));
  x = silu(layer(x, "0"));
  x = silu(layer(x, "2"));
  return layer(x, "4");
}

/// `[H, w, (1+lb+lf)·w]`: the bias of every distance |i - j| in the look-around of a window.
template <typename Real>
Array<Real> dynamic_position_bias(const Parameters<Real>& parameters, Int window_size,
                                  Int look_backward, Int look_forward,
                                  const std::string& prefix = "") {
  const Int keys = (1 + look_backward + look_forward) * window_size;
  const Int heads = parameters.at(prefix + "mlp.4.bias").shape[0];
  Array<Real> bias({heads, window_size, keys});
  for (Int i = 0; i < window_size; ++i)
    for (Int j = 0; j < keys; ++j) {
      const Int distance = std::abs(look_backward * window_size + i - j);
      const Array<Real> of_heads = distance_bias(parameters, distance, prefix);
      for (Int h = 0; h < heads; ++h) bias(h, i, j) = of_heads(h);
    }
  return bias;
}

struct EncoderOptions {
  Int depth = 1;
  bool use_dynamic_pos_bias = false;
  LayerOptions layer;
  Int streams = 1;                        // residual streams; 1: plain connections
  std::vector<LayerOptions> layers = {};  // one each; empty: all are `layer`
  std::string branch = "branch.";         // stands before the names of a branch's weights

  const LayerOptions& of_layer(Int i) const {
    return layers.empty() ? layer : layers[static_cast<std::size_t>(i)];
  }
};

/// Factors of what is dropped in each layer: see AttentionInputs and feed_forward(). Empty: 1.
template <typename Real>
struct EncoderDropout {
  std::function<std::function<Real(Int, Int, Int, Int)>(Int layer)> attention;
  std::function<std::function<Real(Int, Int)>(Int layer)> feed_forward;
};

/// A pass of rows through all layers, of which branch `2·i` is the attention of layer `i`, and
/// `2·i + 1` its feed-forward.
template <typename Real>
struct EncoderPass {
  std::vector<Array<Real>> streams;  // [B, N, S, dim] before each branch
  std::vector<Array<Real>> inputs;   // [B, N, dim] of each branch
  std::vector<Array<Real>> results;  // [B, N, dim]
  Array<Real> bias;                  // of all attentions; empty: none
  Array<Real> y;                     // [B, N, dim]
};

/// The names of a branch's connection and of its own weights.
struct BranchNames {
  std::string connection, weights;
};
inline BranchNames branch_names(const EncoderOptions& o, Int branch) {
  const std::string names =
      "layers." + std::to_string(branch / 2) + "." + std::to_string(branch % 2) + ".";
  return {names, names + o.branch};
}

/// What the attention of a layer is given.
template <typename Real>
LayerInputs<Real> attention_layer_inputs(const Array<Real>& x,
                                         const std::vector<unsigned char>& masked,
                                         const Array<Real>& bias,
                                         const EncoderDropout<Real>& dropout, Int layer) {
  return {x, masked, bias, dropout.attention ? dropout.attention(layer) : nullptr};
}

/// Takes `x` `[B, N, dim]` through all layers.
template <typename Real>
EncoderPass<Real> encoder_pass(const EncoderOptions& o, const Parameters<Real>& parameters,
                               const Array<Real>& x, const std::vector<unsigned char>& masked = {},
                               const EncoderDropout<Real>& dropout = {}) {
  const Int batch = x.shape[0], n = x.shape[1], dim = x.shape[2];
  EncoderPass<Real> pass;
  if (o.use_dynamic_pos_bias) {
    const AttentionOptions& a = o.of_layer(0).attention;
    pass.bias = dynamic_position_bias(parameters, a.window_size, a.look_backward, a.look_forward,
                                      "dynamic_pos_bias.");
  }
  Array<Real> r({batch, n, o.streams, dim});
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i)
      for (Int s = 0; s < o.streams; ++s)
        for (Int c = 0; c < dim; ++c) r(b, i, s, c) = x(b, i, c);
  for (Int branch = 0; branch < 2 * o.depth; ++branch) {
    const BranchNames names = branch_names(o, branch);
    const auto apply = [&](const Array<Real>& input) {
      pass.inputs.push_back(input);
      const Int layer = branch / 2;
      pass.results.push_back(
          branch % 2 == 0
              ? local_mha(o.of_layer(layer), parameters,
                          attention_layer_inputs(input, masked, pass.bias, dropout, layer),
                          names.weights)
                    .y
              : feed_forward(parameters, input, names.weights,
                             dropout.feed_forward ? dropout.feed_forward(layer) : nullptr));
      return pass.results.back();
    };
    pass.streams.push_back(r);
    if (o.streams > 1) {
      r = hyper_connection(parameters, names.connection, r, apply);
    } else {
      Array<Real> input({batch, n, dim});
      input.data = r.data;
      const Array<Real> y = apply(input);
      for (std::size_t i = 0; i < y.data.size(); ++i) r.data[i] += y.data[i];
    }
  }
  pass.y = Array<Real>(x.shape);
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i)
      for (Int c = 0; c < dim; ++c) {
        pass.y(b, i, c) = r(b, i, 0, c);
        for (Int s = 1; s < o.streams; ++s) pass.y(b, i, c) += r(b, i, s, c);
      }
  return pass;
}

template <typename Real>
Array<Real> encoder(const EncoderOptions& o, const Parameters<Real>& parameters,
                    const Array<Real>& x, const std::vector<unsigned char>& masked = {}) {
  return encoder_pass(o, parameters, x, masked).y;
}

}  // namespace reference
