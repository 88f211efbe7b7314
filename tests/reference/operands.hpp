// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA, and the gradients of projections and of a feed-forward, whose products are of operands
/// that were rounded to bfloat16, written out naively: the formulas of layer.hpp and gradients.hpp,
/// with the rounding by its definition. Products and sums are double.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "reference/array.hpp"
#include "reference/attention.hpp"
#include "reference/encoder.hpp"
#include "reference/gradients.hpp"
#include "reference/layer.hpp"
#include "reference/norms.hpp"

namespace reference {

/// The first half of a float's bits, as an operand has them: to the nearest, of two that are as
/// near to the even one; what is smaller than 2^-126 is 0.
inline std::uint32_t operand_bits(std::uint32_t bits) {
  const std::uint32_t sign = bits >> 31 << 15, exponent = bits >> 23 & 0xff;
  const std::uint32_t kept = bits >> 16, lost = bits & 0xffff;
  if (exponent == 0) return sign;
  if (exponent == 0xff && (bits & 0x7fffff) != 0) return kept | 0x40;  // a quiet NaN
  const bool odd = kept % 2 == 1;
  return kept + (lost > 0x8000 || (lost == 0x8000 && odd) ? 1 : 0);
}

/// The operand that a number becomes. `near_tie` is set if it lies so near to the middle of two
/// that float arithmetic may make it the other one.
inline double operand(double x) {
  const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(x));
  return static_cast<double>(std::bit_cast<float>(operand_bits(bits) << 16));
}

/// Which of the operands are rounded: to see what it comes to where one kind is not.
struct Operands {
  bool weights = true;
  bool rows = true;           // that pass to_qkv and to_v_gate
  bool keys = true;           // normalized, and turned
  bool values = true;         // with their bias
  bool queries = true;        // normalized, turned, times softmax_scale·log2(e)
  bool probabilities = true;  // 2^(s − ⌈m⌉), s and the largest one, m, in units of log 2
  bool heads = true;          // the results that pass to_out
  /// The denominator counts what probabilities are rounded to, where none is dropped.
  bool sum_of_rounded = true;
  /// Probabilities are 2^(s − m).
  bool whole_maximum = true;

  static Operands none() { return {false, false, false, false, false, false, false}; }
};

inline void round_if(bool is_rounded, Array<double>& array) {
  if (!is_rounded) return;
  for (double& number : array.data) number = operand(number);
}

/// Turns `row`, of a head, by `distance` positions: a query, or a key, whose xPos is the inverse.
/// \param back the transpose, as gradients are turned
inline void turn_row(const AttentionOptions& o, Int d, double distance, bool of_key, double* row,
                     bool back = false) {
  if (!o.rotary) return;
  const RotaryOptions& rotary = o.rotary_options;
  const Int turned = rotary.rotary_dim.value_or(d);
  for (Int m = 0; m < turned / 2; ++m) {
    const double two_m = 2 * static_cast<double>(m), of = static_cast<double>(turned);
    const double theta = rotary.inv_freq.empty() ? std::pow(rotary.theta, -two_m / of)
                                                 : rotary.inv_freq.at(static_cast<std::size_t>(m));
    double factor = rotary.factor;
    if (o.xpos)
      factor *= std::pow((two_m + 0.4 * of) / (1.4 * of),
                         (of_key ? -distance : distance) / o.xpos_scale_base);
    const auto [first, second] = channel_pair(o, turned, m);
    const double x = row[first], y = row[second], angle = (back ? -distance : distance) * theta;
    row[first] = factor * (x * std::cos(angle) - y * std::sin(angle));
    row[second] = factor * (x * std::sin(angle) + y * std::cos(angle));
  }
}

/// A query of attention_of_operands(), and the keys that it sees.
struct OperandRow {
  /// The query as it meets the keys of a group of positions.
  struct Turned {
    double distance;
    std::vector<double> query;  // an operand, times softmax_scale·log2(e)
  };
  std::vector<Int> keys;
  std::vector<std::size_t> turned;  // of `queries`, the one that meets the key
  std::vector<double> scaled;       // softmax_scale · q·k
  std::vector<double> scores;       // in units of log 2
  std::vector<Turned> queries;
  double largest = 0;  // of the scores, or the whole number above it
  double sum = 0;      // of 2^(score − largest)
};

/// \param in its keys are operands, turned by their place in their group
/// \param group positions of a group
inline OperandRow operand_row(const AttentionOptions& o, const AttentionInputs<double>& in,
                              Int group, const Operands& operands, Int b, Int h, Int i) {
  constexpr double log2_e = 1.44269504088896340736;
  const Int n = in.q.shape[2], d = in.q.shape[3];
  const double scale = scale_of<double>(o, d) * log2_e;
  OperandRow row;
  Int group_of_query = -1;
  for (Int j = 0; j < n; ++j) {
    if (!sees(o, in.masked, in.global, n, b, i, j)) continue;
    const double* bias = bias_of(o, in, h, i, j);
    if (bias != nullptr && !(*bias > o.hiding_bias)) continue;
    const Int group_of_key = position(o, j) / group;
    if (group_of_key != group_of_query) {
      // Queries are turned the rest of the way, from the begin of the keys' group on.
      group_of_query = group_of_key;
      const Int first = i - (position(o, i) - group_of_key * group);
      OperandRow::Turned turned{static_cast<double>(rotary_distance(o, i, first)), {}};
      for (Int c = 0; c < d; ++c) turned.query.push_back(scale * in.q(b, h, i, c));
      turn_row(o, d, turned.distance, false, turned.query.data());
      for (double& x : turned.query) x = operands.queries ? operand(x) : x;
      row.queries.push_back(turned);
    }
    const double* key = row_at(in.k, b, in.key_head(h), j);
    double score = 0;
    for (Int c = 0; c < d; ++c)
      score += row.queries.back().query[static_cast<std::size_t>(c)] * key[c];
    row.scaled.push_back(score / log2_e);
    if (in.score.value)
      score = log2_e * in.score.value(score / log2_e, h, position(o, i), position(o, j));
    if (bias != nullptr) score += log2_e * *bias;
    row.scores.push_back(score);
    row.keys.push_back(j);
    row.turned.push_back(row.queries.size() - 1);
  }
  if (row.scores.empty()) return row;
  row.largest = *std::max_element(row.scores.begin(), row.scores.end());
  if (!in.sinks.empty()) row.largest = std::max(row.largest, log2_e * in.sinks(h));
  if (operands.whole_maximum) row.largest = std::ceil(row.largest);
  if (!in.sinks.empty()) row.sum += std::exp2(log2_e * in.sinks(h) - row.largest);
  for (const double score : row.scores) {
    const double p = std::exp2(score - row.largest);
    row.sum += operands.sum_of_rounded && operands.probabilities && !in.multiplier ? operand(p) : p;
  }
  return row;
}

/// The attention of local_mha_of_operands().
/// \param in its keys and values are operands, its keys turned by their place in their group
/// \param group positions of a group
inline Array<double> attention_of_operands(const AttentionOptions& o,
                                           const AttentionInputs<double>& in, Int group,
                                           const Operands& operands) {
  const Int batch = in.q.shape[0], heads = in.q.shape[1], n = in.q.shape[2], d = in.q.shape[3];
  Array<double> out({batch, heads, n, d});
  for (Int b = 0; b < batch; ++b)
    for (Int h = 0; h < heads; ++h)
      for (Int i = 0; i < n; ++i) {
        const OperandRow row = operand_row(o, in, group, operands, b, h, i);
        if (row.keys.empty()) continue;
        double* const to = row_at(out, b, h, i);
        for (std::size_t s = 0; s < row.keys.size(); ++s) {
          double p = std::exp2(row.scores[s] - row.largest);
          if (in.multiplier) p *= in.multiplier(b, h, i, row.keys[s]);
          if (operands.probabilities) p = operand(p);
          const double* v = row_at(in.v, b, in.key_head(h), row.keys[s]);
          for (Int c = 0; c < d; ++c) to[c] += p * v[c];
        }
        for (Int c = 0; c < d; ++c) to[c] /= row.sum;
      }
  return out;
}

/// What the attention of local_mha_of_operands() is given: keys and values as operands, keys turned
/// by their place in their group.
inline AttentionInputs<double> operand_inputs(const LayerOptions& o,
                                              const Parameters<double>& parameters,
                                              const LayerInputs<double>& in, const Array<double>& x,
                                              const Projected<double>& raw, Int group,
                                              const Operands& operands) {
  auto attend = attention_inputs(o, parameters, in, x, raw, "");
  const AttentionOptions options = attention_options(o);
  for (Int b = 0; b < in.x.shape[0]; ++b)
    for (Int h = 0; h < o.key_heads(); ++h)
      for (Int j = 0; j < in.x.shape[1]; ++j)
        turn_row(options, o.dim_head, static_cast<double>(position(options, j) % group), true,
                 row_at(attend.k, b, h, j));
  round_if(operands.keys, attend.k);
  round_if(operands.values, attend.v);
  return attend;
}

/// \param group positions in whose middle queries and keys meet: those that
///        RotaryEmbedding::group() says
inline Array<double> local_mha_of_operands(const LayerOptions& o, Parameters<double> parameters,
                                           const LayerInputs<double>& in, Int group,
                                           const Operands& operands = {}) {
  for (const char* name : {"to_qkv.weight", "to_out.weight", "to_v_gate.0.weight"})
    if (const auto weight = parameters.find(name); weight != parameters.end())
      round_if(operands.weights, weight->second);
  Array<double> x = prenormed(o, parameters, in.x, "");
  round_if(operands.rows, x);
  const Projected<double> raw = projected(o, parameters, x, "to_qkv");
  const Int d = o.dim_head, n = in.x.shape[1];
  const auto attend = operand_inputs(o, parameters, in, x, raw, group, operands);
  Array<double> out = attention_of_operands(attention_options(o), attend, group, operands);
  if (o.gate_values_per_head) {
    const Array<double> gates =
        linear(x, parameters.at("to_v_gate.0.weight"), parameters.at("to_v_gate.0.bias"));
    for (Int b = 0; b < out.shape[0]; ++b)
      for (Int h = 0; h < o.heads; ++h)
        for (Int i = 0; i < n; ++i)
          for (Int c = 0; c < d; ++c) out(b, h, i, c) *= sigmoid(gates(b, i, h));
  }
  Array<double> y = merged(out);
  round_if(operands.heads, y);
  return linear(y, parameters.at("to_out.weight"), used(o.out_bias, parameters, "to_out.bias"));
}

/// Which operands of the products of a projection's backward pass are rounded.
struct BackwardOperands {
  bool weights = true;
  bool rows = true;       // that have passed the projection
  bool gradients = true;  // of what it made

  static BackwardOperands none() { return {false, false, false}; }
};

/// Of linear(): dx = g·W and dW += gᵀ·x of operands. That of the bias, which may be null, is no
/// product.
inline Array<double> linear_backward_of_operands(Array<double> x, Array<double> weight,
                                                 Array<double> grad_y, Array<double>& grad_weight,
                                                 Array<double>* grad_bias = nullptr,
                                                 const BackwardOperands& operands = {}) {
  const Int out = weight.shape[0];
  for (std::size_t i = 0; grad_bias != nullptr && i < grad_y.data.size(); ++i)
    (*grad_bias)(static_cast<Int>(i) % out) += grad_y.data[i];
  round_if(operands.rows, x);
  round_if(operands.weights, weight);
  round_if(operands.gradients, grad_y);
  return linear_backward(x, weight, grad_y, grad_weight);
}

/// Of feed_forward() whose products are of operands; what passes them back is rounded as
/// `operands` says.
inline Array<double> feed_forward_backward_of_operands(
    const Parameters<double>& parameters, const Array<double>& x, const Array<double>& grad_y,
    Parameters<double>& gradients, const std::function<double(Int, Int)>& multiplier = {},
    const BackwardOperands& operands = {}, bool forward_of_operands = true) {
  const auto rounded = [&](Array<double> array) {
    round_if(forward_of_operands, array);
    return array;
  };
  const Array<double> normed = layer_norm(x, parameters.at("0.weight"), parameters.at("0.bias"));
  const Array<double> both = linear(rounded(normed), rounded(parameters.at("1.weight")));
  const Int rows = x.shape[0], inner = both.shape[1] / 2;
  const auto factor = [&](Int row, Int c) { return multiplier ? multiplier(row, c) : 1.0; };
  Array<double> hidden({rows, inner}), grad_both(both.shape);
  for (Int row = 0; row < rows; ++row)
    for (Int c = 0; c < inner; ++c)
      hidden(row, c) = both(row, c) * gelu(both(row, inner + c)) * factor(row, c);
  const Array<double> grad_hidden = linear_backward_of_operands(
      hidden, parameters.at("4.weight"), grad_y, gradients.at("4.weight"), nullptr, operands);
  for (Int row = 0; row < rows; ++row)
    for (Int c = 0; c < inner; ++c) {
      const double gate = both(row, inner + c), grad = grad_hidden(row, c) * factor(row, c);
      grad_both(row, c) = grad * gelu(gate);
      grad_both(row, inner + c) = grad * both(row, c) * gelu_slope(gate);
    }
  return layer_norm_backward(
      x, parameters.at("0.weight"),
      linear_backward_of_operands(normed, parameters.at("1.weight"), grad_both,
                                  gradients.at("1.weight"), nullptr, operands),
      gradients.at("0.weight"), gradients.at("0.bias"));
}

}  // namespace reference
