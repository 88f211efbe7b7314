// SPDX-License-Identifier: MIT
/// \file
/// LocalTransformer and its parts, written out naively.
#pragma once

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "reference/array.hpp"
#include "reference/attention.hpp"
#include "reference/layer.hpp"

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

struct TransformerOptions {
  Int depth = 1;
  bool use_dynamic_pos_bias = false;
  LayerOptions layer;
};

/// Logits `[B, N, num_tokens]` of tokens `[B, N]`.
template <typename Real>
Array<Real> transformer_logits(const TransformerOptions& o, const Parameters<Real>& parameters,
                               const Array<Int>& tokens,
                               const std::vector<unsigned char>& masked = {}) {
  const Int batch = tokens.shape[0], n = tokens.shape[1], dim = o.layer.dim;
  const Array<Real>& token_emb = parameters.at("token_emb.weight");
  const Array<Real>& pos_emb = parameters.at("pos_emb.weight");
  Array<Real> x({batch, n, dim});
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i)
      for (Int c = 0; c < dim; ++c) x(b, i, c) = token_emb(tokens(b, i), c) + pos_emb(i, c);

  Array<Real> bias;
  const AttentionOptions& a = o.layer.attention;
  if (o.use_dynamic_pos_bias)
    bias = dynamic_position_bias(parameters, a.window_size, a.look_backward, a.look_forward,
                                 "dynamic_pos_bias.");
  const auto add = [&x](const Array<Real>& y) {
    for (std::size_t i = 0; i < x.data.size(); ++i) x.data[i] += y.data[i];
  };
  for (Int layer = 0; layer < o.depth; ++layer) {
    const std::string prefix = "layers." + std::to_string(layer);
    add(local_mha(o.layer, parameters, LayerInputs<Real>{x, masked, bias, {}},
                  prefix + ".0.branch.")
            .y);
    add(feed_forward(parameters, x, prefix + ".1.branch."));
  }
  return linear(
      layer_norm(x, parameters.at("to_logits.0.weight"), parameters.at("to_logits.0.bias")),
      parameters.at("to_logits.1.weight"));
}

/// Mean of -log softmax(logits)[label] over the labels that are not `ignore_index`.
template <typename Real>
Real cross_entropy(const Array<Real>& logits, const Array<Int>& labels, Int ignore_index) {
  using std::exp;
  using std::log;
  const Int batch = logits.shape[0], n = logits.shape[1], classes = logits.shape[2];
  Real total = 0;
  Int counted = 0;
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i) {
      if (labels(b, i) == ignore_index) continue;
      Real largest = logits(b, i, 0), sum = 0;
      for (Int c = 1; c < classes; ++c) largest = std::max(largest, logits(b, i, c));
      for (Int c = 0; c < classes; ++c) sum += exp(logits(b, i, c) - largest);
      total += largest + log(sum) - logits(b, i, labels(b, i));
      ++counted;
    }
  return total / static_cast<Real>(counted);
}

/// Loss of predicting each next token of `[B, N + 1]` tokens.
template <typename Real>
Real transformer_loss(const TransformerOptions& o, const Parameters<Real>& parameters,
                      const Array<Int>& tokens, Int ignore_index,
                      const std::vector<unsigned char>& masked = {}) {
  const Int batch = tokens.shape[0], n = tokens.shape[1] - 1;
  Array<Int> inputs({batch, n}), labels({batch, n});
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i) {
      inputs(b, i) = tokens(b, i);
      labels(b, i) = tokens(b, i + 1);
    }
  return cross_entropy(transformer_logits(o, parameters, inputs, masked), labels, ignore_index);
}

}  // namespace reference
