// SPDX-License-Identifier: MIT
/// \file
/// Gradients of LocalMHA whose products are of operands that were rounded to bfloat16, written out
/// naively: the formulas of gradients.hpp, with the rounding by its definition. Products and sums
/// are double.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "reference/gradients.hpp"
#include "reference/operands.hpp"

namespace reference {

/// Which of the operands of the way back are rounded, beside those of the way forward.
struct LayerBackwardOperands {
  BackwardOperands projections = {};
  bool results = true;        // gradients of the heads' results
  bool probabilities = true;  // exp(s − lse) after dropout, in the gradient of the values
  bool scores = true;         // gradients of scores, in those of queries and keys
};

/// Of attention_of_operands(), for queries and keys as they are before they are turned.
/// \param in keys and values are operands, keys turned by their place in their group
inline AttentionGradients<double> attention_backward_of_operands(
    const AttentionOptions& o, const AttentionInputs<double>& in, Int group, Array<double> grad_out,
    const LayerBackwardOperands& operands) {
  constexpr double log2_e = 1.44269504088896340736;
  const Int batch = in.q.shape[0], heads = in.q.shape[1], n = in.q.shape[2], d = in.q.shape[3];
  round_if(operands.results, grad_out);
  AttentionGradients<double> to;
  to.out = attention_of_operands(o, in, group, {});
  to.q = Array<double>(in.q.shape);
  to.k = Array<double>(in.k.shape);
  to.v = Array<double>(in.v.shape);
  if (!in.bias.empty()) to.bias = Array<double>(in.bias.shape);
  if (!in.relative_bias.empty()) to.relative_bias = Array<double>(in.relative_bias.shape);
  if (!in.sinks.empty()) to.sinks = Array<double>(in.sinks.shape);
  for (Int b = 0; b < batch; ++b)
    for (Int h = 0; h < heads; ++h)
      for (Int i = 0; i < n; ++i) {
        const OperandRow row = operand_row(o, in, group, {}, b, h, i);
        if (row.keys.empty()) continue;
        const double lse = row.largest + std::log2(row.sum);
        const double* g = row_at(grad_out, b, h, i);
        double mean = 0;
        for (Int c = 0; c < d; ++c) mean += g[c] * to.out(b, h, i, c);
        if (!in.sinks.empty()) to.sinks(h) -= std::exp2(log2_e * in.sinks(h) - lse) * mean;
        std::vector<std::vector<double>> of_turned(
            row.queries.size(), std::vector<double>(static_cast<std::size_t>(d)));
        for (std::size_t s = 0; s < row.keys.size(); ++s) {
          const Int j = row.keys[s], key_head = in.key_head(h);
          const double factor = in.multiplier ? in.multiplier(b, h, i, j) : 1;
          const double p = std::exp2(row.scores[s] - lse);
          const double weight = operands.probabilities ? operand(p * factor) : p * factor;
          double of_probability = 0;
          for (Int c = 0; c < d; ++c) {
            of_probability += g[c] * row_at(in.v, b, key_head, j)[c];
            row_at(to.v, b, key_head, j)[c] += weight * g[c];
          }
          double of_score = p * (factor * of_probability - mean);
          if (!in.bias.empty()) {
            if (double* bias = attn_bias_of(o, to.bias, h, i, j)) *bias += of_score;
          } else if (!in.relative_bias.empty()) {
            if (double* bias = relative_bias_of(o, to.relative_bias, h, i, j)) *bias += of_score;
          }
          if (in.score.value)
            of_score *= in.score.slope(row.scaled[s], h, position(o, i), position(o, j));
          if (operands.scores) of_score = operand(of_score);
          for (Int c = 0; c < d; ++c) {
            const auto at = static_cast<std::size_t>(c);
            of_turned[row.turned[s]][at] += of_score * row_at(in.k, b, key_head, j)[c];
            row_at(to.k, b, key_head, j)[c] +=
                of_score * row.queries[row.turned[s]].query[at] / log2_e;
          }
        }
        for (std::size_t t = 0; t < of_turned.size(); ++t) {
          turn_row(o, d, row.queries[t].distance, false, of_turned[t].data(), true);
          for (Int c = 0; c < d; ++c)
            to.q(b, h, i, c) += scale_of<double>(o, d) * of_turned[t][static_cast<std::size_t>(c)];
        }
      }
  for (Int b = 0; b < batch; ++b)
    for (Int h = 0; h < in.k.shape[1]; ++h)
      for (Int j = 0; j < n; ++j)
        turn_row(o, d, static_cast<double>(position(o, j) % group), true, row_at(to.k, b, h, j),
                 true);
  return to;
}

/// Of local_mha_of_operands(): what it gives is y.
inline LayerGradients<double> local_mha_backward_of_operands(
    const LayerOptions& o, Parameters<double> parameters, const LayerInputs<double>& in,
    const Array<double>& grad_y, Int group, Parameters<double>& gradients,
    const LayerBackwardOperands& operands = {}) {
  for (const char* name : {"to_qkv.weight", "to_out.weight", "to_v_gate.0.weight"})
    if (const auto weight = parameters.find(name); weight != parameters.end())
      round_if(true, weight->second);
  const Int batch = in.x.shape[0], n = in.x.shape[1], d = o.dim_head, inner = o.heads * d;
  const auto for_each_channel = [&](auto&& visit) {
    for (Int b = 0; b < batch; ++b)
      for (Int h = 0; h < o.heads; ++h)
        for (Int i = 0; i < n; ++i)
          for (Int c = 0; c < d; ++c) visit(b, h, i, c);
  };
  const Array<double> normed = prenormed(o, parameters, in.x, "");
  Array<double> x = normed;
  round_if(true, x);
  const Projected<double> raw = projected(o, parameters, x, "to_qkv");
  const auto attend = operand_inputs(o, parameters, in, x, raw, group, {});
  Array<double> gates({batch, n, o.heads}, 1);
  if (o.gate_values_per_head) {
    gates = linear(x, parameters.at("to_v_gate.0.weight"), parameters.at("to_v_gate.0.bias"));
    for (double& gate : gates.data) gate = sigmoid(gate);
  }
  Array<double> unused(parameters.at("to_out.weight").shape);
  const Array<double> grad_heads =
      linear_backward_of_operands(Array<double>({batch, n, inner}), parameters.at("to_out.weight"),
                                  grad_y, unused, nullptr, operands.projections);
  Array<double> grad_out({batch, o.heads, n, d});
  for_each_channel([&](Int b, Int h, Int i, Int c) {
    grad_out(b, h, i, c) = grad_heads(b, i, h * d + c) * gates(b, i, h);
  });
  AttentionGradients<double> attended = attention_backward_of_operands(
      attention_options(o), attend, group, std::move(grad_out), operands);

  Array<double> heads({batch, n, inner}), grad_gates({batch, n, o.heads});
  for_each_channel([&](Int b, Int h, Int i, Int c) {
    heads(b, i, h * d + c) = attended.out(b, h, i, c) * gates(b, i, h);
    grad_gates(b, i, h) += attended.out(b, h, i, c) * grad_heads(b, i, h * d + c);
  });
  LayerGradients<double> result;
  result.bias = std::move(attended.bias);
  linear_backward_of_operands(
      heads, parameters.at("to_out.weight"), grad_y, gradients.at("to_out.weight"),
      o.out_bias ? &gradients.at("to_out.bias") : nullptr, operands.projections);
  if (o.sinks) add(attended.sinks, gradients.at("sinks"));
  if (o.relative_bias) add(attended.relative_bias, gradients.at("relative_bias"));

  Array<double> grad_qkv({batch, n, (o.heads + 2 * o.key_heads()) * d});
  merge_heads(qk_normed_backward(o, parameters, raw.q, attended.q, gradients, "q"), 0, grad_qkv);
  merge_heads(qk_normed_backward(o, parameters, raw.k, attended.k, gradients, "k"), o.heads,
              grad_qkv);
  merge_heads(attended.v, o.heads + o.key_heads(), grad_qkv);
  result.x = linear_backward_of_operands(
      normed, parameters.at("to_qkv.weight"), std::move(grad_qkv), gradients.at("to_qkv.weight"),
      o.qkv_bias ? &gradients.at("to_qkv.bias") : nullptr, operands.projections);
  if (o.gate_values_per_head) {
    for (std::size_t i = 0; i < gates.data.size(); ++i)
      grad_gates.data[i] *= gates.data[i] * (1 - gates.data[i]);
    add(linear_backward_of_operands(normed, parameters.at("to_v_gate.0.weight"), grad_gates,
                                    gradients.at("to_v_gate.0.weight"),
                                    &gradients.at("to_v_gate.0.bias"), operands.projections),
        result.x);
  }
  result.x = prenormed_backward(o, parameters, in.x, result.x, gradients, "");
  return result;
}

}  // namespace reference
