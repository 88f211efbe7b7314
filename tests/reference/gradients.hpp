// SPDX-License-Identifier: MIT
/// \file
/// Gradients of the naive modules, by their formulas and plain loops. Every function adds to the
/// gradients of the weights, in a set of their shapes, and returns that of its input.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "reference/array.hpp"
#include "reference/attention.hpp"
#include "reference/layer.hpp"
#include "reference/transformer.hpp"

namespace reference {

/// A set of the same shapes whose numbers are 0.
template <typename Real>
Parameters<Real> zeros_like(const Parameters<Real>& parameters) {
  Parameters<Real> zeros;
  for (const auto& [name, array] : parameters) zeros[name] = Array<Real>(array.shape);
  return zeros;
}

template <typename Real>
void add(const Array<Real>& from, Array<Real>& to) {
  for (std::size_t i = 0; i < to.data.size(); ++i) to.data[i] += from.data[i];
}

/// Of linear(). `grad_bias` is null where there is no bias.
template <typename Real>
Array<Real> linear_backward(const Array<Real>& x, const Array<Real>& weight,
                            const Array<Real>& grad_y, Array<Real>& grad_weight,
                            Array<Real>* grad_bias = nullptr) {
  const Int out = weight.shape[0], in = weight.shape[1];
  Array<Real> grad_x(x.shape);
  const Int rows = static_cast<Int>(x.data.size()) / in;
  for (Int row = 0; row < rows; ++row)
    for (Int o = 0; o < out; ++o) {
      const Real& g = grad_y.data[static_cast<std::size_t>(row * out + o)];
      if (grad_bias != nullptr) (*grad_bias)(o) += g;
      for (Int c = 0; c < in; ++c) {
        const auto at = static_cast<std::size_t>(row * in + c);
        grad_weight(o, c) += g * x.data[at];
        grad_x.data[at] += g * weight(o, c);
      }
    }
  return grad_x;
}

template <typename Real>
struct AttentionGradients {
  Array<Real> out;  // what attention() returns
  Array<Real> lse;  // the same
  Array<Real> q, k, v, bias;
  Array<Real> relative_bias, sinks, global_q, global_k, global_v;  // empty where the input is
};

/// Of attention(), and its results. With shared_qk, k is an input of its own.
/// \param grad_out `[B, H, N, D]`
template <typename Real>
AttentionGradients<Real> attention_backward(const AttentionOptions& options,
                                            AttentionInputs<Real> in, const Array<Real>& grad_out) {
  using std::exp;
  const Int batch = in.q.shape[0], heads = in.q.shape[1], n = in.q.shape[2], d = in.q.shape[3];
  const Real scale = scale_of<Real>(options, d);
  const Array<Real> raw_k = in.k;
  if (options.shared_qk) in.k = normalized_rows(std::move(in.k));
  AttentionGradients<Real> to;
  to.out = Array<Real>({batch, heads, n, d});
  to.lse = Array<Real>({batch, heads, n}, Real(-std::numeric_limits<double>::infinity()));
  to.q = Array<Real>(in.q.shape);
  to.k = Array<Real>(in.k.shape);
  to.v = Array<Real>(in.v.shape);
  const auto zeros_where = [](const Array<Real>& input, Array<Real>& gradient) {
    if (!input.empty()) gradient = Array<Real>(input.shape);
  };
  zeros_where(in.bias, to.bias);
  zeros_where(in.relative_bias, to.relative_bias);
  zeros_where(in.sinks, to.sinks);
  zeros_where(in.global_q, to.global_q);
  zeros_where(in.global_k, to.global_k);
  zeros_where(in.global_v, to.global_v);
  Rotation<Real> rotation(options, d);
  for (Int b = 0; b < batch; ++b)
    for (Int h = 0; h < heads; ++h)
      for (Int i = 0; i < n; ++i) {
        const AttentionRow<Real> row = attend_row(options, in, rotation, b, h, i);
        to.lse(b, h, i) = row.lse;
        if (row.keys.empty()) continue;
        const bool global = in.global_row(b, i);
        Array<Real>& of_queries = global && !in.global_q.empty() ? to.global_q : to.q;
        Array<Real>& of_keys = global && !in.global_k.empty() ? to.global_k : to.k;
        Array<Real>& of_values = global && !in.global_v.empty() ? to.global_v : to.v;
        const Int key_head = in.key_head(h);
        const Real* g = row_at(grad_out, b, h, i);
        Real mean(0);  // Σ_j p_ij · (gradient of p_ij)
        for (Int c = 0; c < d; ++c) {
          to.out(b, h, i, c) = row.out[static_cast<std::size_t>(c)];
          mean += g[c] * row.out[static_cast<std::size_t>(c)];
        }
        if (!in.sinks.empty()) to.sinks(h) -= exp(in.sinks(h) - row.lse) * mean;
        for (std::size_t s = 0; s < row.keys.size(); ++s) {
          const Int j = row.keys[s];
          const Real factor = in.multiplier ? in.multiplier(b, h, i, j) : Real(1);
          // As from what a forward pass keeps.
          const Real probability = exp(row.scores[s] - row.lse);
          const Real* v = row_at(in.values_of(b, i), b, key_head, j);
          Real* grad_v = row_at(of_values, b, key_head, j);
          Real of_probability(0);
          for (Int c = 0; c < d; ++c) {
            of_probability += g[c] * v[c];
            grad_v[c] += probability * factor * g[c];
          }
          if (options.shared_qk && i == j) continue;  // a constant score
          const Real of_score = probability * (factor * of_probability - mean);
          if (!in.bias.empty()) {
            if (Real* of_bias = attn_bias_of(options, to.bias, h, i, j)) *of_bias += of_score;
          } else if (!in.relative_bias.empty()) {
            if (Real* of_bias = relative_bias_of(options, to.relative_bias, h, i, j))
              *of_bias += of_score;
          }
          Real of_scaled = of_score;
          if (in.score.value)
            of_scaled *=
                in.score.slope(row.scaled[s], h, position(options, i), position(options, j));
          raw_score_backward(options, rotation, row_at(in.queries_of(b, i), b, h, i),
                             row_at(in.keys_of(b, i), b, key_head, j), d, i, j, of_scaled * scale,
                             row_at(of_queries, b, h, i), row_at(of_keys, b, key_head, j));
        }
      }
  if (options.shared_qk) to.k = normalized_rows_backward(raw_k, to.k);
  return to;
}

template <typename Real>
struct LayerGradients {
  Array<Real> y;  // what local_mha() returns
  Array<Real> x;
  Array<Real> bias;
};

/// Of prenormed().
template <typename Real>
Array<Real> prenormed_backward(const LayerOptions& o, const Parameters<Real>& parameters,
                               const Array<Real>& x, const Array<Real>& grad_normed,
                               Parameters<Real>& gradients, const std::string& prefix) {
  if (!o.prenorm) return grad_normed;
  const std::string weight = prefix + "norm.weight";
  if (o.prenorm_kind == Prenorm::Rms)
    return rms_norm_backward(x, parameters.at(weight), o.norm_eps, grad_normed,
                             gradients.at(weight));
  return layer_norm_backward(x, parameters.at(weight), grad_normed, gradients.at(weight),
                             gradients.at(prefix + "norm.bias"),
                             static_cast<long double>(o.norm_eps));
}

/// Of qk_normed().
template <typename Real>
Array<Real> qk_normed_backward(const LayerOptions& o, const Parameters<Real>& parameters,
                               const Array<Real>& heads, const Array<Real>& grad_normed,
                               Parameters<Real>& gradients, const std::string& which) {
  if (o.qk_norm == QkNorm::None) return grad_normed;
  if (o.qk_norm == QkNorm::L2) {
    const std::string scale = which + "_scale";
    return qk_norm_backward(heads, parameters.at(scale), grad_normed, gradients.at(scale));
  }
  const std::string weight = which + "_norm.weight";
  if (o.qk_norm == QkNorm::Rms)
    return rms_norm_backward(heads, parameters.at(weight), o.qk_norm_eps, grad_normed,
                             gradients.at(weight));
  return split_heads(rms_norm_backward(merged(heads), parameters.at(weight), o.qk_norm_eps,
                                       merged(grad_normed), gradients.at(weight)),
                     0, heads.shape[1], heads.shape[3]);
}

/// Of projected().
template <typename Real>
Array<Real> projected_backward(const LayerOptions& o, const Parameters<Real>& parameters,
                               const Array<Real>& x, const Projected<Real>& grad,
                               Parameters<Real>& gradients, const std::string& name) {
  Array<Real> grad_qkv({x.shape[0], x.shape[1], (o.heads + 2 * o.key_heads()) * o.dim_head});
  merge_heads(grad.q, 0, grad_qkv);
  merge_heads(grad.k, o.heads, grad_qkv);
  merge_heads(grad.v, o.heads + o.key_heads(), grad_qkv);
  return linear_backward(x, parameters.at(name + ".weight"), grad_qkv,
                         gradients.at(name + ".weight"),
                         o.qkv_bias ? &gradients.at(name + ".bias") : nullptr);
}

/// Of local_mha(), and its result.
/// \param gradients those of the weights, by their names behind `prefix`, are added here
template <typename Real>
LayerGradients<Real> local_mha_backward(const LayerOptions& o, const Parameters<Real>& parameters,
                                        const LayerInputs<Real>& in, const Array<Real>& grad_y,
                                        Parameters<Real>& gradients,
                                        const std::string& prefix = "") {
  const auto weight = [&](const char* name) -> const Array<Real>& {
    return parameters.at(prefix + name);
  };
  const auto grad = [&](const char* name) -> Array<Real>& { return gradients.at(prefix + name); };
  const Int batch = in.x.shape[0], n = in.x.shape[1], d = o.dim_head, inner = o.heads * d;
  const Array<Real> x = prenormed(o, parameters, in.x, prefix);
  const Projected<Real> raw = projected(o, parameters, x, prefix + "to_qkv");
  const auto for_each_channel = [&](auto&& visit) {
    for (Int b = 0; b < batch; ++b)
      for (Int h = 0; h < o.heads; ++h)
        for (Int i = 0; i < n; ++i)
          for (Int c = 0; c < d; ++c) visit(b, h, i, c);
  };

  Array<Real> gates({batch, n, o.heads}, Real(1));
  if (o.gate_values_per_head) {
    gates = linear(x, weight("to_v_gate.0.weight"), weight("to_v_gate.0.bias"));
    for (Real& gate : gates.data) gate = sigmoid(gate);
  }
  Array<Real> grad_heads = grad_y;
  if (o.out_projection) {
    // The gradient of the gated heads needs no result, that of to_out's weight does.
    Array<Real> unused(weight("to_out.weight").shape);
    grad_heads =
        linear_backward(Array<Real>({batch, n, inner}), weight("to_out.weight"), grad_y, unused);
  }
  Array<Real> grad_out({batch, o.heads, n, d});
  for_each_channel([&](Int b, Int h, Int i, Int c) {
    grad_out(b, h, i, c) = grad_heads(b, i, h * d + c) * gates(b, i, h);
  });
  AttentionGradients<Real> attended = attention_backward(
      attention_options(o), attention_inputs(o, parameters, in, x, raw, prefix), grad_out);

  Array<Real> heads({batch, n, inner}), grad_gates({batch, n, o.heads});
  for_each_channel([&](Int b, Int h, Int i, Int c) {
    heads(b, i, h * d + c) = attended.out(b, h, i, c) * gates(b, i, h);
    grad_gates(b, i, h) += attended.out(b, h, i, c) * grad_heads(b, i, h * d + c);
  });
  LayerGradients<Real> result;
  result.bias = std::move(attended.bias);
  result.y = heads;
  if (o.out_projection) {
    result.y = linear(heads, weight("to_out.weight"),
                      used(o.out_bias, parameters, prefix + "to_out.bias"));
    linear_backward(heads, weight("to_out.weight"), grad_y, grad("to_out.weight"),
                    o.out_bias ? &grad("to_out.bias") : nullptr);
  }
  if (o.sinks) add(attended.sinks, grad("sinks"));
  if (o.relative_bias) add(attended.relative_bias, grad("relative_bias"));
  if (o.relative_buckets) {
    const auto [left, right] = relative_ends(o);
    bias_of_buckets_backward(*o.relative_buckets, left, right, attended.relative_bias,
                             grad("relative_attention_bias.weight"));
  }

  const Projected<Real> grad_raw{
      qk_normed_backward(o, parameters, raw.q, attended.q, gradients, prefix + "q"),
      qk_normed_backward(o, parameters, raw.k, attended.k, gradients, prefix + "k"), attended.v};
  result.x = projected_backward(o, parameters, x, grad_raw, gradients, prefix + "to_qkv");
  if (o.global_projections)
    add(projected_backward(o, parameters, x,
                           Projected<Real>{attended.global_q, attended.global_k, attended.global_v},
                           gradients, prefix + "to_qkv_global"),
        result.x);
  if (o.gate_values_per_head) {
    for (std::size_t i = 0; i < gates.data.size(); ++i)
      grad_gates.data[i] *= gates.data[i] * (Real(1) - gates.data[i]);
    add(linear_backward(x, weight("to_v_gate.0.weight"), grad_gates, grad("to_v_gate.0.weight"),
                        &grad("to_v_gate.0.bias")),
        result.x);
  }
  result.x = prenormed_backward(o, parameters, in.x, result.x, gradients, prefix);
  return result;
}

/// The derivative of gelu(): Φ(x) + x·φ(x).
template <typename Real>
Real gelu_slope(const Real& x) {
  using std::erf;
  using std::exp;
  using std::sqrt;
  return Real(0.5) * (Real(1) + erf(x / sqrt(Real(2)))) +
         x * exp(x * x * Real(-0.5)) / sqrt(Real(2 * 3.14159265358979323846L));
}

/// Of feed_forward().
template <typename Real>
Array<Real> feed_forward_backward(const Parameters<Real>& parameters, const Array<Real>& x,
                                  const Array<Real>& grad_y, Parameters<Real>& gradients,
                                  const std::string& prefix = "",
                                  const std::function<Real(Int, Int)>& multiplier = {}) {
  const Array<Real> normed =
      layer_norm(x, parameters.at(prefix + "0.weight"), parameters.at(prefix + "0.bias"));
  const Array<Real> both = linear(normed, parameters.at(prefix + "1.weight"));
  const auto width = static_cast<std::size_t>(both.shape.back()), inner = width / 2;
  std::vector<Int> shape = both.shape;
  shape.back() /= 2;
  const auto factor = [&](std::size_t i) {
    return multiplier ? multiplier(static_cast<Int>(i / inner), static_cast<Int>(i % inner))
                      : Real(1);
  };
  Array<Real> hidden(shape);
  for (std::size_t i = 0; i < hidden.data.size(); ++i) {
    const std::size_t value = i / inner * width + i % inner;
    hidden.data[i] = both.data[value] * gelu(both.data[value + inner]) * factor(i);
  }
  Array<Real> grad_hidden = linear_backward(hidden, parameters.at(prefix + "4.weight"), grad_y,
                                            gradients.at(prefix + "4.weight"));
  Array<Real> grad_both(both.shape);
  for (std::size_t i = 0; i < hidden.data.size(); ++i) {
    const std::size_t value = i / inner * width + i % inner;
    const Real& gate = both.data[value + inner];
    grad_hidden.data[i] *= factor(i);
    grad_both.data[value] = grad_hidden.data[i] * gelu(gate);
    grad_both.data[value + inner] = grad_hidden.data[i] * both.data[value] * gelu_slope(gate);
  }
  return layer_norm_backward(x, parameters.at(prefix + "0.weight"),
                             linear_backward(normed, parameters.at(prefix + "1.weight"), grad_both,
                                             gradients.at(prefix + "1.weight")),
                             gradients.at(prefix + "0.weight"), gradients.at(prefix + "0.bias"));
}

/// Of distance_bias(), which has no input but the distance.
template <typename Real>
void distance_bias_backward(const Parameters<Real>& parameters, Int distance,
                            const Array<Real>& grad_y, Parameters<Real>& gradients,
                            const std::string& prefix = "") {
  const auto name = [&](const char* layer, const char* tensor) {
    return prefix + "mlp." + layer + tensor;
  };
  const auto layer = [&](const Array<Real>& x, const char* of) {
    return linear(x, parameters.at(name(of, ".weight")), parameters.at(name(of, ".bias")));
  };
  const auto layer_backward = [&](const Array<Real>& x, const char* of, const Array<Real>& grad) {
    return linear_backward(x, parameters.at(name(of, ".weight")), grad,
                           gradients.at(name(of, ".weight")), &gradients.at(name(of, ".bias")));
  };
  const auto silu = [](Array<Real> x) {
    for (Real& value : x.data) value *= sigmoid(value);
    return x;
  };
  const auto silu_backward = [](const Array<Real>& x, Array<Real> grad) {
    for (std::size_t i = 0; i < x.data.size(); ++i) {
      const Real s = sigmoid(x.data[i]);
      grad.data[i] *= s * (Real(1) + x.data[i] * (Real(1) - s));
    }
    return grad;
  };
  const Array<Real> x({1}, static_cast<Real>(distance));
  const Array<Real> first = layer(x, "0");
  const Array<Real> second = layer(silu(first), "2");
  const Array<Real> of_second = silu_backward(second, layer_backward(silu(second), "4", grad_y));
  layer_backward(x, "0", silu_backward(first, layer_backward(silu(first), "2", of_second)));
}

/// Of cross_entropy(), for the logits.
template <typename Real>
Array<Real> cross_entropy_backward(const Array<Real>& logits, const Array<Int>& labels,
                                   Int ignore_index) {
  const auto classes = static_cast<std::size_t>(logits.shape[2]);
  Int counted = 0;
  for (const Int label : labels.data) counted += label != ignore_index;
  Array<Real> grad(logits.shape);
  for (std::size_t row = 0; row < labels.data.size(); ++row) {
    if (labels.data[row] == ignore_index) continue;
    const Real* of_row = logits.data.data() + row * classes;
    const Real largest = *std::max_element(of_row, of_row + classes);
    Real sum(0);
    for (std::size_t c = 0; c < classes; ++c) sum += exp_below(of_row[c], largest);
    for (std::size_t c = 0; c < classes; ++c)
      grad.data[row * classes + c] = (share(exp_below(of_row[c], largest), sum) -
                                      Real(static_cast<Int>(c) == labels.data[row] ? 1 : 0)) /
                                     static_cast<Real>(counted);
  }
  return grad;
}

/// Of encoder_pass(): adds to the gradients of the weights and returns that of x.
/// \param pass what encoder_pass() gave
/// \param grad_y `[B, N, dim]`
template <typename Real>
Array<Real> encoder_backward(const EncoderOptions& o, const Parameters<Real>& parameters,
                             const EncoderPass<Real>& pass, const Array<Real>& grad_y,
                             const std::vector<unsigned char>& masked, Parameters<Real>& gradients,
                             const EncoderDropout<Real>& dropout = {}) {
  const Int batch = grad_y.shape[0], n = grad_y.shape[1], dim = grad_y.shape[2];
  Array<Real> grad({batch, n, o.streams, dim});
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i)
      for (Int s = 0; s < o.streams; ++s)
        for (Int c = 0; c < dim; ++c) grad(b, i, s, c) = grad_y(b, i, c);
  Array<Real> grad_bias(pass.bias.shape);
  for (Int branch = 2 * o.depth; branch-- > 0;) {
    const auto at = static_cast<std::size_t>(branch);
    const Int layer = branch / 2;
    const BranchNames names = branch_names(o, branch);
    const auto branch_backward = [&](const Array<Real>& of_result) {
      if (branch % 2 == 1)
        return feed_forward_backward(parameters, pass.inputs[at], of_result, gradients,
                                     names.weights,
                                     dropout.feed_forward ? dropout.feed_forward(layer) : nullptr);
      const LayerGradients<Real> of_layer = local_mha_backward(
          o.of_layer(layer), parameters,
          attention_layer_inputs(pass.inputs[at], masked, pass.bias, dropout, layer), of_result,
          gradients, names.weights);
      if (o.use_dynamic_pos_bias) add(of_layer.bias, grad_bias);
      return of_layer.x;
    };
    if (o.streams > 1) {
      grad = hyper_connection_backward(parameters, names.connection, pass.streams[at],
                                       pass.results[at], grad, gradients, branch_backward);
    } else {
      Array<Real> of_result({batch, n, dim});
      of_result.data = grad.data;
      add(branch_backward(of_result), grad);
    }
  }
  if (o.use_dynamic_pos_bias) {
    const AttentionOptions& a = o.of_layer(0).attention;
    for (Int i = 0; i < grad_bias.shape[1]; ++i)
      for (Int j = 0; j < grad_bias.shape[2]; ++j) {
        Array<Real> of_heads({grad_bias.shape[0]});
        for (Int h = 0; h < grad_bias.shape[0]; ++h) of_heads(h) = grad_bias(h, i, j);
        distance_bias_backward(parameters, std::abs(a.look_backward * a.window_size + i - j),
                               of_heads, gradients, "dynamic_pos_bias.");
      }
  }
  Array<Real> grad_x(grad_y.shape);
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i)
      for (Int s = 0; s < o.streams; ++s)
        for (Int c = 0; c < dim; ++c) grad_x(b, i, c) += grad(b, i, s, c);
  return grad_x;
}

template <typename Real>
using TransformerDropout = EncoderDropout<Real>;

template <typename Real>
struct TransformerGradients {
  Real loss;
  Array<Real> logits;  // what transformer_logits() returns
};

/// Of cross_entropy() of transformer_logits(), for the weights.
template <typename Real>
TransformerGradients<Real> transformer_backward(
    const TransformerOptions& o, const Parameters<Real>& parameters, const Array<Int>& tokens,
    const Array<Int>& labels, Int ignore_index, const std::vector<unsigned char>& masked,
    Parameters<Real>& gradients, const TransformerDropout<Real>& dropout = {}) {
  const EncoderPass<Real> pass =
      encoder_pass(o, parameters, embedded(parameters, tokens), masked, dropout);
  const Array<Real>& x = pass.y;
  const Array<Real> normed =
      layer_norm(x, parameters.at("to_logits.0.weight"), parameters.at("to_logits.0.bias"));
  TransformerGradients<Real> result;
  result.logits = linear(normed, parameters.at("to_logits.1.weight"));
  result.loss = cross_entropy(result.logits, labels, ignore_index);

  const Array<Real> of_encoder = layer_norm_backward(
      x, parameters.at("to_logits.0.weight"),
      linear_backward(normed, parameters.at("to_logits.1.weight"),
                      cross_entropy_backward(result.logits, labels, ignore_index),
                      gradients.at("to_logits.1.weight")),
      gradients.at("to_logits.0.weight"), gradients.at("to_logits.0.bias"));
  const Array<Real> grad =
      encoder_backward(o, parameters, pass, of_encoder, masked, gradients, dropout);
  const Int batch = grad.shape[0], n = grad.shape[1], dim = grad.shape[2];
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i)
      for (Int c = 0; c < dim; ++c) {
        gradients.at("token_emb.weight")(tokens(b, i), c) += grad(b, i, c);
        gradients.at("pos_emb.weight")(i, c) += grad(b, i, c);
      }
  return result;
}

}  // namespace reference
