// SPDX-License-Identifier: MIT
/// \file
/// LocalTransformer, written out naively.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "reference/array.hpp"
#include "reference/encoder.hpp"
#include "reference/layer.hpp"

namespace reference {

using TransformerOptions = EncoderOptions;

/// Token and position embeddings, `[B, N, dim]` of tokens `[B, N]`.
template <typename Real>
Array<Real> embedded(const Parameters<Real>& parameters, const Array<Int>& tokens) {
  const Array<Real>& token_emb = parameters.at("token_emb.weight");
  const Array<Real>& pos_emb = parameters.at("pos_emb.weight");
  const Int batch = tokens.shape[0], n = tokens.shape[1], dim = token_emb.shape[1];
  Array<Real> x({batch, n, dim});
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i)
      for (Int c = 0; c < dim; ++c) x(b, i, c) = token_emb(tokens(b, i), c) + pos_emb(i, c);
  return x;
}

/// Logits `[B, N, num_tokens]` of tokens `[B, N]`.
template <typename Real>
Array<Real> transformer_logits(const TransformerOptions& o, const Parameters<Real>& parameters,
                               const Array<Int>& tokens,
                               const std::vector<unsigned char>& masked = {}) {
  const Array<Real> x = encoder(o, parameters, embedded(parameters, tokens), masked);
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
