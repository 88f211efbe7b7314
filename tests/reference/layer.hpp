// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA and its parts, written out naively. Arrays are `[rows, channels]` or `[B, N, dim]`.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "reference/array.hpp"
#include "reference/attention.hpp"

namespace reference {

/// y = x · weightᵀ + bias over the last axis; weight is `[out, in]`, bias empty or `[out]`.
template <typename Real>
Array<Real> linear(const Array<Real>& x, const Array<Real>& weight, const Array<Real>& bias = {}) {
  const Int out = weight.shape[0], in = weight.shape[1];
  std::vector<Int> shape = x.shape;
  shape.back() = out;
  Array<Real> y(shape);
  const Int rows = static_cast<Int>(x.data.size()) / in;
  for (Int row = 0; row < rows; ++row)
    for (Int o = 0; o < out; ++o) {
      Real sum = 0;
      for (Int c = 0; c < in; ++c)
        sum += x.data[static_cast<std::size_t>(row * in + c)] * weight(o, c);
      if (!bias.empty()) sum += bias(o);
      y.data[static_cast<std::size_t>(row * out + o)] = sum;
    }
  return y;
}

template <typename Real>
Real sigmoid(const Real& x) {
  using std::exp;
  return Real(1) / (Real(1) + exp(-x));
}

struct LayerOptions {
  Int dim = 0;
  Int heads = 1;
  Int dim_head = 1;
  bool prenorm = false;
  bool qk_rmsnorm = false;
  double qk_scale = 8;
  bool gate_values_per_head = false;
  AttentionOptions attention;  // its scale is set here
};

template <typename Real>
struct LayerInputs {
  Array<Real> x;                      // [B, N, dim]
  std::vector<unsigned char> masked;  // [B, N], 1 = not attended; empty: none
  Array<Real> bias;                   // [H or 1, w, (1+lb+lf)·w]; empty: none
  std::function<Real(Int, Int, Int, Int)> multiplier;
};

template <typename Real>
struct LayerResult {
  Array<Real> y;               // [B, N, dim]
  Array<Real> probabilities;   // [B, H, N, N]
  Real largest_magnitude = 0;  // of the scores' terms
};

/// Steps 1 to 10 of the layer.
template <typename Real>
LayerResult<Real> local_mha(const LayerOptions& o, const Parameters<Real>& parameters,
                            const LayerInputs<Real>& in, const std::string& prefix = "") {
  const auto weight = [&](const char* name) -> const Array<Real>& {
    return parameters.at(prefix + name);
  };
  const Int batch = in.x.shape[0], n = in.x.shape[1];
  const Array<Real> x =
      o.prenorm ? layer_norm(in.x, weight("norm.weight"), weight("norm.bias")) : in.x;
  const Array<Real> qkv = linear(x, weight("to_qkv.weight"));

  AttentionInputs<Real> attend;
  attend.masked = in.masked;
  attend.bias = in.bias;
  attend.multiplier = in.multiplier;
  Array<Real>* const parts[] = {&attend.q, &attend.k, &attend.v};
  for (Int part = 0; part < 3; ++part) {
    Array<Real>& to = *parts[part];
    to = Array<Real>({batch, o.heads, n, o.dim_head});
    for (Int b = 0; b < batch; ++b)
      for (Int h = 0; h < o.heads; ++h)
        for (Int i = 0; i < n; ++i)
          for (Int c = 0; c < o.dim_head; ++c)
            to(b, h, i, c) = qkv(b, i, (part * o.heads + h) * o.dim_head + c);
  }
  AttentionOptions attention_options = o.attention;
  attention_options.scale.reset();
  if (o.qk_rmsnorm) {
    attend.q = qk_norm(std::move(attend.q), weight("q_scale"));
    attend.k = qk_norm(std::move(attend.k), weight("k_scale"));
    attention_options.scale = o.qk_scale;
  }
  AttentionResult<Real> attended = attention(attention_options, std::move(attend));

  Array<Real> gates;
  if (o.gate_values_per_head)
    gates = linear(x, weight("to_v_gate.0.weight"), weight("to_v_gate.0.bias"));
  Array<Real> heads({batch, n, o.heads * o.dim_head});
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i)
      for (Int h = 0; h < o.heads; ++h)
        for (Int c = 0; c < o.dim_head; ++c)
          heads(b, i, h * o.dim_head + c) =
              attended.out(b, h, i, c) *
              (o.gate_values_per_head ? sigmoid(gates(b, i, h)) : Real(1));
  return {linear(heads, weight("to_out.weight")), std::move(attended.probabilities),
          attended.largest_magnitude};
}

}  // namespace reference
