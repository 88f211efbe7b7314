// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA and its parts, written out naively. Arrays are `[rows, channels]` or `[B, N, dim]`.
#pragma once

#include <cmath>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "reference/array.hpp"
#include "reference/attention.hpp"
#include "reference/bias.hpp"
#include "reference/norms.hpp"

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

/// What queries and keys are normalized by: nothing; their length, times `q_scale` and `k_scale`
/// `[D]`; their root mean square, times `q_norm.weight` and `k_norm.weight`, over `[D]` each head's
/// channels or over all heads' `[heads·D]`, `[kv_heads·D]`.
enum class QkNorm { None, L2, Rms, RmsAll };

/// What the input is normalized by.
enum class Prenorm { Layer, Rms };

struct LayerOptions {
  Int dim = 0;
  Int heads = 1;
  Int dim_head = 1;
  bool prenorm = false;
  QkNorm qk_norm = QkNorm::None;
  double qk_scale = 8;
  bool gate_values_per_head = false;
  AttentionOptions attention;  // its scale is set here

  std::optional<Int> kv_heads = {};          // empty: heads
  std::optional<double> softmax_scale = {};  // empty: qk_scale with L2, else dim_head^-0.5
  Prenorm prenorm_kind = Prenorm::Layer;     // if prenorm
  double norm_eps = 1e-5;                    // of prenorm
  double qk_norm_eps = 1e-6;                 // of Rms and RmsAll
  bool qkv_bias = false;                     // to_qkv.bias
  bool out_bias = false;                     // to_out.bias
  bool out_projection = true;                // false: the heads side by side are the result
  bool sinks = false;                        // sinks [heads]
  bool relative_bias = false;                // relative_bias [heads or 1, left + right + 1]
  std::optional<RelativeBuckets> relative_buckets = {};  // relative_attention_bias.weight
  /// Global rows use to_qkv_global.weight, and .bias with qkv_bias, for their queries and for the
  /// keys and values that they see. These are not normalized.
  bool global_projections = false;

  Int key_heads() const { return kv_heads.value_or(heads); }
};

template <typename Real>
struct LayerInputs {
  Array<Real> x;                      // [B, N, dim]
  std::vector<unsigned char> masked;  // [B, N], 1 = not attended; empty: none
  Array<Real> bias;                   // [H or 1, w, (1+lb+lf)·w]; empty: none
  std::function<Real(Int, Int, Int, Int)> multiplier;
  Score<Real> score = {};
  std::vector<unsigned char> global = {};  // [B, N], 1 = sees all and is seen by all; empty: none
};

template <typename Real>
struct LayerResult {
  Array<Real> y;               // [B, N, dim]
  Array<Real> probabilities;   // [B, H, N, N]
  Real largest_magnitude = 0;  // of the scores' terms
};

/// The parameter if it is used, or none.
template <typename Real>
Array<Real> used(bool is_used, const Parameters<Real>& parameters, const std::string& name) {
  return is_used ? parameters.at(name) : Array<Real>();
}

/// The input as the projections take it.
template <typename Real>
Array<Real> prenormed(const LayerOptions& o, const Parameters<Real>& parameters,
                      const Array<Real>& x, const std::string& prefix) {
  if (!o.prenorm) return x;
  const Array<Real>& weight = parameters.at(prefix + "norm.weight");
  if (o.prenorm_kind == Prenorm::Rms) return rms_norm(x, weight, o.norm_eps);
  return layer_norm(x, weight, parameters.at(prefix + "norm.bias"),
                    static_cast<long double>(o.norm_eps));
}

/// Heads `[first, first + count)` of `[B, N, heads·D]`, as `[B, count, N, D]`.
template <typename Real>
Array<Real> split_heads(const Array<Real>& rows, Int first, Int count, Int d) {
  const Int batch = rows.shape[0], n = rows.shape[1];
  Array<Real> heads({batch, count, n, d});
  for (Int b = 0; b < batch; ++b)
    for (Int h = 0; h < count; ++h)
      for (Int i = 0; i < n; ++i)
        for (Int c = 0; c < d; ++c) heads(b, h, i, c) = rows(b, i, (first + h) * d + c);
  return heads;
}

/// The reverse, into heads `[first, …)` of `rows`.
template <typename Real>
void merge_heads(const Array<Real>& heads, Int first, Array<Real>& rows) {
  const Int batch = heads.shape[0], count = heads.shape[1], n = heads.shape[2], d = heads.shape[3];
  for (Int b = 0; b < batch; ++b)
    for (Int h = 0; h < count; ++h)
      for (Int i = 0; i < n; ++i)
        for (Int c = 0; c < d; ++c) rows(b, i, (first + h) * d + c) = heads(b, h, i, c);
}

/// All heads of a row side by side, `[B, N, heads·D]`.
template <typename Real>
Array<Real> merged(const Array<Real>& heads) {
  Array<Real> rows({heads.shape[0], heads.shape[2], heads.shape[1] * heads.shape[3]});
  merge_heads(heads, 0, rows);
  return rows;
}

/// Queries (`which` is q) or keys (k), `[B, heads, N, D]`, normalized.
template <typename Real>
Array<Real> qk_normed(const LayerOptions& o, const Parameters<Real>& parameters,
                      const Array<Real>& heads, const std::string& which) {
  if (o.qk_norm == QkNorm::None) return heads;
  if (o.qk_norm == QkNorm::L2) return qk_norm(heads, parameters.at(which + "_scale"));
  const Array<Real>& weight = parameters.at(which + "_norm.weight");
  if (o.qk_norm == QkNorm::Rms) return rms_norm(heads, weight, o.qk_norm_eps);
  return split_heads(rms_norm(merged(heads), weight, o.qk_norm_eps), 0, heads.shape[1],
                     heads.shape[3]);
}

/// Queries, keys and values as they are projected, `[B, heads or kv_heads, N, D]`.
template <typename Real>
struct Projected {
  Array<Real> q, k, v;
};
template <typename Real>
Projected<Real> projected(const LayerOptions& o, const Parameters<Real>& parameters,
                          const Array<Real>& x, const std::string& name) {
  const Array<Real> qkv =
      linear(x, parameters.at(name + ".weight"), used(o.qkv_bias, parameters, name + ".bias"));
  return {split_heads(qkv, 0, o.heads, o.dim_head),
          split_heads(qkv, o.heads, o.key_heads(), o.dim_head),
          split_heads(qkv, o.heads + o.key_heads(), o.key_heads(), o.dim_head)};
}

/// Both ends of the window that a relative bias belongs to.
struct RelativeEnds {
  Int left, right;
};
inline RelativeEnds relative_ends(const LayerOptions& o) {
  const TokenWindow& window = o.attention.token_window.value();
  return {window.left.value(), window.right.value()};
}

/// What the attention takes in.
/// \param x the input after prenorm
/// \param raw what `x` is projected to
template <typename Real>
AttentionInputs<Real> attention_inputs(const LayerOptions& o, const Parameters<Real>& parameters,
                                       const LayerInputs<Real>& in, const Array<Real>& x,
                                       const Projected<Real>& raw, const std::string& prefix) {
  AttentionInputs<Real> attend{qk_normed(o, parameters, raw.q, prefix + "q"),
                               qk_normed(o, parameters, raw.k, prefix + "k"),
                               raw.v,
                               in.masked,
                               in.bias,
                               in.multiplier};
  attend.score = in.score;
  attend.global = in.global;
  attend.sinks = used(o.sinks, parameters, prefix + "sinks");
  attend.relative_bias = used(o.relative_bias, parameters, prefix + "relative_bias");
  if (o.relative_buckets) {
    const auto [left, right] = relative_ends(o);
    attend.relative_bias = bias_of_buckets(
        *o.relative_buckets, parameters.at(prefix + "relative_attention_bias.weight"), left, right);
  }
  if (o.global_projections) {
    Projected<Real> global = projected(o, parameters, x, prefix + "to_qkv_global");
    attend.global_q = std::move(global.q);
    attend.global_k = std::move(global.k);
    attend.global_v = std::move(global.v);
  }
  return attend;
}

inline AttentionOptions attention_options(const LayerOptions& o) {
  AttentionOptions options = o.attention;
  options.scale = o.softmax_scale;
  if (!options.scale && o.qk_norm == QkNorm::L2) options.scale = o.qk_scale;
  return options;
}

/// Steps 1 to 10 of the layer.
template <typename Real>
LayerResult<Real> local_mha(const LayerOptions& o, const Parameters<Real>& parameters,
                            const LayerInputs<Real>& in, const std::string& prefix = "") {
  const auto weight = [&](const char* name) -> const Array<Real>& {
    return parameters.at(prefix + name);
  };
  const Array<Real> x = prenormed(o, parameters, in.x, prefix);
  const Projected<Real> raw = projected(o, parameters, x, prefix + "to_qkv");
  AttentionResult<Real> attended =
      attention(attention_options(o), attention_inputs(o, parameters, in, x, raw, prefix));
  if (o.gate_values_per_head) {
    const Array<Real> gates = linear(x, weight("to_v_gate.0.weight"), weight("to_v_gate.0.bias"));
    for (Int b = 0; b < attended.out.shape[0]; ++b)
      for (Int h = 0; h < o.heads; ++h)
        for (Int i = 0; i < attended.out.shape[2]; ++i)
          for (Int c = 0; c < o.dim_head; ++c) attended.out(b, h, i, c) *= sigmoid(gates(b, i, h));
  }
  Array<Real> y = merged(attended.out);
  if (o.out_projection)
    y = linear(y, weight("to_out.weight"), used(o.out_bias, parameters, prefix + "to_out.bias"));
  return {std::move(y), std::move(attended.probabilities), attended.largest_magnitude};
}

}  // namespace reference
