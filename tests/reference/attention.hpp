// SPDX-License-Identifier: MIT
/// \file
/// Local attention written out naively: every pair of positions is asked whether it is attended.
///
/// It shares no code with the library, so that one cannot repeat the other's mistake. `Real` is the
/// precision of every sum, product and exponential; angles and powers are formed in long double.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "reference/array.hpp"
#include "reference/bias.hpp"
#include "reference/norms.hpp"
#include "reference/options.hpp"
#include "reference/rotary.hpp"
#include "reference/score.hpp"
#include "reference/visibility.hpp"

namespace reference {

/// exp(score − largest), and its share of a sum of such. A number that bounds its own error knows
/// that neither is above 1.
template <typename Real>
Real exp_below(const Real& score, const Real& largest) {
  using std::exp;
  return exp(score - largest);
}
template <typename Real>
Real share(const Real& part, const Real& sum) {
  return part / sum;
}

template <typename Real>
struct AttentionInputs {
  Array<Real> q, k, v;                // [B, H, N, D]; k and v [B, G, N, D] where G divides H
  std::vector<unsigned char> masked;  // [B, N], 1 = not attended; empty: none
  Array<Real> bias;                   // [H or 1, w, (1+lb+lf)·w]; empty: none
  /// Factor of the probability of (b, h, i, j), that is 0 or 1 / (1 - dropout); empty: 1.
  std::function<Real(Int, Int, Int, Int)> multiplier;

  Score<Real> score = {};
  Array<Real> relative_bias = {};          // [H or 1, left + right + 1]; empty: none
  Array<Real> sinks = {};                  // [H] logits that have no value; empty: none
  std::vector<unsigned char> global = {};  // [B, N], 1 = sees all and is seen by all; empty: none
  /// What a global row's query is, and the keys and values that it sees; empty: q, k, v. Not with
  /// shared_qk.
  Array<Real> global_q = {}, global_k = {}, global_v = {};

  bool global_row(Int b, Int i) const { return flag_of(global, q.shape[2], b, i); }
  const Array<Real>& queries_of(Int b, Int i) const {
    return global_row(b, i) && !global_q.empty() ? global_q : q;
  }
  const Array<Real>& keys_of(Int b, Int i) const {
    return global_row(b, i) && !global_k.empty() ? global_k : k;
  }
  const Array<Real>& values_of(Int b, Int i) const {
    return global_row(b, i) && !global_v.empty() ? global_v : v;
  }
  /// The head of the keys and values that query head `h` reads.
  Int key_head(Int h) const { return h / (q.shape[1] / k.shape[1]); }
};

/// The first channel of a row of `[B, H, N, D]`.
template <typename Rows>
auto* row_at(Rows& rows, Int b, Int h, Int row) {
  return rows.data.data() + rows.offset(b, h, row, 0);
}

template <typename Real>
struct AttentionRow {
  std::vector<Real> out;            // [D]
  std::vector<Real> scaled;         // scale · q·k of the seen keys
  std::vector<Real> scores;         // of the seen keys
  std::vector<Real> probabilities;  // of the seen keys, in their order
  std::vector<Int> keys;            // the seen keys
  // Log of the sum of exponentials, the sink's included.
  Real lse = Real(-std::numeric_limits<double>::infinity());
  Real largest_magnitude = 0;  // of the scores' terms: rounding errors scale with it
};

template <typename Real>
Real scale_of(const AttentionOptions& o, Int dim_head) {
  return o.scale ? static_cast<Real>(*o.scale)
                 : static_cast<Real>(1 / std::sqrt(static_cast<long double>(dim_head)));
}

/// The bias of a pair of rows; null: none.
template <typename Real>
const Real* bias_of(const AttentionOptions& o, const AttentionInputs<Real>& in, Int h, Int i,
                    Int j) {
  if (!in.bias.empty()) return attn_bias_of(o, in.bias, h, i, j);
  if (!in.relative_bias.empty()) return relative_bias_of(o, in.relative_bias, h, i, j);
  return nullptr;
}

/// One row of the result. Keys must be normalized already if `shared_qk`.
template <typename Real>
AttentionRow<Real> attend_row(const AttentionOptions& o, const AttentionInputs<Real>& in,
                              Rotation<Real>& rotation, Int b, Int h, Int i) {
  using std::abs;
  using std::log;
  const Int n = in.k.shape[2], d = in.k.shape[3], key_head = in.key_head(h);
  const Real scale = scale_of<Real>(o, d);
  AttentionRow<Real> row;
  row.out.assign(static_cast<std::size_t>(d), Real(0));

  std::vector<Real>& scores = row.scores;
  for (Int j = 0; j < n; ++j) {
    if (!sees(o, in.masked, in.global, n, b, i, j)) continue;
    const Real* bias = bias_of(o, in, h, i, j);
    const bool self = o.shared_qk && i == j;
    if (bias != nullptr && !self && !(*bias > Real(o.hiding_bias))) continue;
    Real magnitude = 0;
    const Real scaled = raw_score(o, rotation, row_at(in.queries_of(b, i), b, h, i),
                                  row_at(in.keys_of(b, i), b, key_head, j), d, i, j, magnitude) *
                        scale;
    Real score = scaled;
    row.largest_magnitude = std::max(row.largest_magnitude, magnitude * abs(scale));
    if (in.score.value) {
      score = in.score.value(scaled, h, position(o, i), position(o, j));
      row.largest_magnitude = std::max(row.largest_magnitude, Real(abs(score)));
    }
    if (bias != nullptr) score += *bias;
    if (self) score = Real(-5e4);
    row.scaled.push_back(scaled);
    scores.push_back(score);
    row.keys.push_back(j);
  }
  if (scores.empty()) {
    if (!in.sinks.empty()) row.lse = in.sinks(h);
    return row;
  }

  Real largest = *std::max_element(scores.begin(), scores.end());
  if (!in.sinks.empty()) largest = std::max(largest, in.sinks(h));
  Real sum = 0;
  for (const Real& score : scores) {
    row.probabilities.push_back(exp_below(score, largest));
    sum += row.probabilities.back();
  }
  if (!in.sinks.empty()) sum += exp_below(in.sinks(h), largest);
  row.lse = largest + log(sum);
  for (std::size_t s = 0; s < scores.size(); ++s) {
    Real& probability = row.probabilities[s];
    probability = share(probability, sum);
    if (in.multiplier) probability *= in.multiplier(b, h, i, row.keys[s]);
    const Real* v = row_at(in.values_of(b, i), b, key_head, row.keys[s]);
    for (Int c = 0; c < d; ++c) row.out[static_cast<std::size_t>(c)] += probability * v[c];
  }
  return row;
}

template <typename Real>
struct AttentionResult {
  Array<Real> out;            // [B, H, N, D]
  Array<Real> probabilities;  // [B, H, N, N], if asked for
  Array<Real> lse;            // [B, H, N], the sink's share included; -infinity of nothing
  Real largest_magnitude = 0;
};

template <typename Real>
AttentionResult<Real> attention(const AttentionOptions& options, AttentionInputs<Real> in) {
  const Int batch = in.q.shape[0], heads = in.q.shape[1], n = in.q.shape[2], d = in.q.shape[3];
  if (options.shared_qk) in.k = normalized_rows(std::move(in.k));
  AttentionResult<Real> result{Array<Real>({batch, heads, n, d}), Array<Real>(),
                               Array<Real>({batch, heads, n}), Real(0)};
  if (options.probabilities) result.probabilities = Array<Real>({batch, heads, n, n});
  Rotation<Real> rotation(options, d);
  for (Int b = 0; b < batch; ++b)
    for (Int h = 0; h < heads; ++h)
      for (Int i = 0; i < n; ++i) {
        const AttentionRow<Real> row = attend_row(options, in, rotation, b, h, i);
        for (Int c = 0; c < d; ++c) result.out(b, h, i, c) = row.out[static_cast<std::size_t>(c)];
        for (std::size_t s = 0; options.probabilities && s < row.keys.size(); ++s)
          result.probabilities(b, h, i, row.keys[s]) = row.probabilities[s];
        result.lse(b, h, i) = row.lse;
        result.largest_magnitude = std::max(result.largest_magnitude, row.largest_magnitude);
      }
  return result;
}

}  // namespace reference
