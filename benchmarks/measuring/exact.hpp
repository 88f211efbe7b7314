// SPDX-License-Identifier: MIT
/// \file
/// Single rows of the result by the formulas, in double: what measured results are checked against.
/// Shares nothing with the library.
#pragma once

#include <cmath>
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
/// `ζ_m^(r / xpos_scale_base)`, `r = i − j + lf·w`.
inline double exact_score(const Case& c, const Eigen::VectorXd& q, const Eigen::VectorXd& k,
                          Index i, Index j) {
  if (c.rotary == 0) return q.dot(k);
  const auto d = static_cast<double>(c.dim_head);
  const double base = std::sqrt(c.dim > 0 ? static_cast<double>(c.dim) : d);
  const auto r = static_cast<double>(i - j + c.look_forward() * c.window_size);
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

/// Query `i`'s output of one head.
/// \param seen the keys that it sees, of which `k` and `v` hold the rows
/// \param bias_at `bias_at(column)` of the attention bias' row `i mod w`; column 0 is the first key
///        of the bucket before
template <typename BiasAt>
Eigen::VectorXd exact_attention(const Case& c, const Eigen::VectorXd& q, const Eigen::MatrixXd& k,
                                const Eigen::MatrixXd& v, const std::vector<Index>& seen, Index i,
                                double softmax_scale, BiasAt&& bias_at) {
  if (seen.empty()) return Eigen::VectorXd::Zero(c.dim_head);
  Eigen::VectorXd p(static_cast<Index>(seen.size()));
  for (Index t = 0; t < p.size(); ++t) {
    const Index j = seen[static_cast<std::size_t>(t)];
    p[t] = softmax_scale * exact_score(c, q, k.row(t), i, j);
    if (c.bias != 0) p[t] += bias_at(j - (i / c.window_size - 1) * c.window_size);
  }
  p = (p.array() - p.maxCoeff()).exp();
  return v.transpose() * p / p.sum();
}

}  // namespace measuring
