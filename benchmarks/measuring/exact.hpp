// SPDX-License-Identifier: MIT
/// \file
/// Single rows of the result by the formulas, in double: what measured results are checked against.
/// Shares nothing with the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <Eigen/Dense>

#include "case.hpp"

namespace measuring {

/// The rows that are checked: both ends, around the first window's end, the middle.
inline std::vector<Index> sampled_rows(const Case& c) {
  std::vector<Index> rows{
      0, 1, c.window_size - 1, c.window_size, c.window_size + 3, c.seqlen / 2, c.seqlen - 1};
  std::erase_if(rows, [&](Index row) { return row < 0 || row >= c.seqlen; });
  return rows;
}

/// `q·k`; with rotary each channel pair `(m, m + D/2)` turned by `r·θ_m` and, with xPos, times
/// `ζ_m^(r / xpos_scale_base)`, `r = i − j + lf·w`, or `i − j` with a token window.
inline double exact_score(const Case& c, const Eigen::VectorXd& q, const Eigen::VectorXd& k,
                          Index i, Index j) {
  if (c.rotary == 0) return q.dot(k);
  const auto d = static_cast<double>(c.dim_head);
  const double base = std::sqrt(c.dim > 0 ? static_cast<double>(c.dim) : d);
  const Index shift = c.token_window != 0 ? 0 : c.look_forward() * c.window_size;
  const auto r = static_cast<double>(i - j + shift);
  const Index half = c.dim_head / 2;
  double score = 0;
  for (Index m = 0; m < half; ++m) {
    const double angle = r * std::pow(10000.0, -2 * static_cast<double>(m) / d);
    const double zeta = (2 * static_cast<double>(m) + 0.4 * d) / (1.4 * d);
    const double decay = c.xpos != 0 ? std::pow(zeta, r / base) : 1;
    score += decay * ((q[m] * k[m] + q[m + half] * k[m + half]) * std::cos(angle) +
                      (q[m] * k[m + half] - q[m + half] * k[m]) * std::sin(angle));
  }
  return score;
}

/// What dropout multiplies the probability of query `i` and key `j` by: 16 bits of Philox4x32-10
/// for the counter `(i, j / 8, 0, 0)` and the key `seed`.
inline double exact_dropout(const Case& c, std::uint64_t seed, Index i, Index j) {
  if (c.dropout == 0) return 1;
  std::uint32_t x[4] = {static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(j / 8), 0, 0};
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ULL * x[0];
    const std::uint64_t b = 0xCD9E8D57ULL * x[2];
    x[0] = static_cast<std::uint32_t>(b >> 32) ^ x[1] ^ key0;
    x[1] = static_cast<std::uint32_t>(b);
    x[2] = static_cast<std::uint32_t>(a >> 32) ^ x[3] ^ key1;
    x[3] = static_cast<std::uint32_t>(a);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  const double kept = std::round((1 - static_cast<double>(c.dropout) / 100) * 65536);
  const std::uint32_t bits = x[j % 8 / 2] >> (j % 2 * 16) & 0xFFFF;
  return bits < kept ? 65536 / kept : 0;
}

/// Query `i`'s output of one head.
/// \param seen the keys that it sees, of which `k` and `v` hold the rows
/// \param bias_at `bias_at(column)` of the attention bias' row `i mod w`; column 0 is the first key
///        of the bucket before
/// \param dropout_seed of the first head of the first sequence
/// \param h the head, and \param sink its logit, if there are sinks
template <typename BiasAt>
Eigen::VectorXd exact_attention(const Case& c, const Eigen::VectorXd& q, const Eigen::MatrixXd& k,
                                const Eigen::MatrixXd& v, const std::vector<Index>& seen, Index i,
                                double softmax_scale, BiasAt&& bias_at,
                                std::uint64_t dropout_seed = 0, Index h = 0, double sink = 0) {
  if (seen.empty()) return Eigen::VectorXd::Zero(c.dim_head);
  Eigen::VectorXd p(static_cast<Index>(seen.size()));
  for (Index t = 0; t < p.size(); ++t) {
    const Index j = seen[static_cast<std::size_t>(t)];
    p[t] = softmax_scale * exact_score(c, q, k.row(t), i, j);
    if (c.soft_cap != 0) {
      const auto cap = static_cast<double>(c.soft_cap);
      p[t] = cap * std::tanh(p[t] / cap);
    }
    if (c.alibi != 0)
      p[t] -= std::exp2(-8 * static_cast<double>(h + 1) / static_cast<double>(c.heads)) *
              static_cast<double>(std::abs(i - j));
    if (c.bias != 0) p[t] += bias_at(j - (i / c.window_size - 1) * c.window_size);
  }
  const double largest = c.sinks != 0 ? std::max(sink, p.maxCoeff()) : p.maxCoeff();
  p = (p.array() - largest).exp();
  p /= p.sum() + (c.sinks != 0 ? std::exp(sink - largest) : 0);
  for (Index t = 0; t < p.size(); ++t)
    p[t] *= exact_dropout(c, dropout_seed, i, seen[static_cast<std::size_t>(t)]);
  return v.transpose() * p;
}

/// Gradients of one head at row `row`: of its query, its key and its value.
struct ExactGradients {
  Eigen::VectorXd q, k, v;
};

/// \param q, k, v, grad_out matrices `[seqlen, dim_head]` of any scalar
/// \param factor `factor(i, j)`: what dropout makes of a probability
template <typename Matrix, typename Factor>
ExactGradients exact_gradients(const Case& c, const Matrix& q, const Matrix& k, const Matrix& v,
                               const Matrix& grad_out, Index row, Factor&& factor) {
  const double scale = 1 / std::sqrt(static_cast<double>(c.dim_head));
  const auto vector = [](const Matrix& m, Index i) -> Eigen::VectorXd {
    return m.row(i).template cast<double>();
  };
  ExactGradients gradients;
  gradients.q = gradients.k = gradients.v = Eigen::VectorXd::Zero(c.dim_head);
  const Index reach = 2 * c.window_size;
  for (Index i = std::max<Index>(0, row - reach); i < std::min(c.seqlen, row + reach); ++i) {
    if (i != row && !c.sees(i, row, c.seqlen)) continue;
    const std::vector<Index> seen = c.seen(i, c.seqlen);
    const auto size = static_cast<Index>(seen.size());
    const Eigen::VectorXd query = vector(q, i);
    const Eigen::VectorXd grad = vector(grad_out, i);
    Eigen::VectorXd p(size), dropped(size), of_dropped(size);
    for (Index t = 0; t < size; ++t) {
      const Index j = seen[static_cast<std::size_t>(t)];
      p[t] = scale * query.dot(vector(k, j));
      dropped[t] = factor(i, j);
      of_dropped[t] = dropped[t] * grad.dot(vector(v, j));
    }
    p = (p.array() - p.maxCoeff()).exp();
    p /= p.sum();
    const Eigen::VectorXd of_scores = p.array() * (of_dropped.array() - p.dot(of_dropped));
    for (Index t = 0; t < size; ++t) {
      const Index j = seen[static_cast<std::size_t>(t)];
      if (i == row) gradients.q += scale * of_scores[t] * vector(k, j);
      if (j != row) continue;
      gradients.k += scale * of_scores[t] * query;
      gradients.v += p[t] * dropped[t] * grad;
    }
  }
  return gradients;
}

}  // namespace measuring
