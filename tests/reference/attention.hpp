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
#include <optional>
#include <unordered_map>
#include <vector>

#include "reference/array.hpp"

namespace reference {

struct AttentionOptions {
  Int window_size = 1;
  Int look_backward = 1;
  Int look_forward = 0;
  bool causal = false;
  bool exact_windowsize = false;
  bool rotary = false;
  bool xpos = false;
  double xpos_scale_base = 1;
  bool shared_qk = false;
  std::optional<double> scale = {};  // empty: dim_head^-0.5
  Int first_position = 0;            // absolute position of row 0
  /// A bias of at most this hides a key, as one of −∞ does.
  double hiding_bias = -std::numeric_limits<double>::infinity();
};

/// May the query in row `i` see the key in row `j`, masks apart?
inline bool sees(const AttentionOptions& o, Int i, Int j) {
  const Int query = o.first_position + i;
  const Int key = o.first_position + j;
  const Int query_bucket = query / o.window_size;
  const Int key_bucket = key / o.window_size;
  if (key_bucket < query_bucket - o.look_backward) return false;
  if (key_bucket > query_bucket + o.look_forward) return false;
  if (o.causal && key > query) return false;
  if (o.exact_windowsize) {
    // In floating point, because a number of windows times a huge window overflows integers.
    const auto window = static_cast<long double>(o.window_size);
    const auto back = static_cast<long double>(query - key);
    if (back > static_cast<long double>(o.look_backward) * window) return false;
    if (back < -static_cast<long double>(o.look_forward) * window) return false;
  }
  return true;
}

/// What a cosine or sine of an angle, times zeta, is as a `Real`; and a gradient that was turned
/// with xPos. A number that bounds its own error knows what either loses.
template <typename Real>
struct Turning {
  static const Real& decayed(const Real& gradient) { return gradient; }
  static Real of(long double turn, long double zeta, long double /*angle*/) {
    return static_cast<Real>(turn * zeta);
  }
};

/// cos(rθ_m) and sin(rθ_m), times ζ_m^(r / base) with xPos, for each channel pair m.
template <typename Real>
class Rotation {
 public:
  Rotation(const AttentionOptions& options, Int dim_head) : options_(options), d_(dim_head) {}

  struct Turn {
    Real cos, sin;
  };

  const std::vector<Turn>& at(Int r) {
    std::vector<Turn>& turns = cache_[r];
    if (turns.empty() && d_ >= 2) {
      const auto d = static_cast<long double>(d_);
      for (Int m = 0; m < d_ / 2; ++m) {
        const auto pair = static_cast<long double>(m);
        const long double theta = std::pow(10000.0L, -2 * pair / d);
        const long double angle = static_cast<long double>(r) * theta;
        long double zeta = 1;
        if (options_.xpos)
          zeta = std::pow(
              (2 * pair + 0.4L * d) / (1.4L * d),
              static_cast<long double>(r) / static_cast<long double>(options_.xpos_scale_base));
        turns.push_back({Turning<Real>::of(std::cos(angle), zeta, angle),
                         Turning<Real>::of(std::sin(angle), zeta, angle)});
      }
    }
    return turns;
  }

 private:
  AttentionOptions options_;
  Int d_;
  std::unordered_map<Int, std::vector<Turn>> cache_;
};

/// q·k, or with rotary the sum over channel pairs (m, m + D/2) of
/// (q1 k1 + q2 k2) cos(rθ) + (q1 k2 - q2 k1) sin(rθ), r = i - j + lf·w.
/// `magnitude` is the sum of the terms' absolute values: what rounding errors are relative to.
template <typename Real>
Real raw_score(const AttentionOptions& o, Rotation<Real>& rotation, const Real* q, const Real* k,
               Int dim_head, Int i, Int j, Real& magnitude) {
  using std::abs;
  Real score = 0;
  magnitude = 0;
  if (!o.rotary) {
    for (Int c = 0; c < dim_head; ++c) {
      score += q[c] * k[c];
      magnitude += abs(q[c] * k[c]);
    }
    return score;
  }
  const auto& turns = rotation.at(i - j + o.look_forward * o.window_size);
  const Int half = dim_head / 2;
  for (Int m = 0; m < half; ++m) {
    const Real q1 = q[m], q2 = q[m + half], k1 = k[m], k2 = k[m + half];
    const auto [cos, sin] = turns[static_cast<std::size_t>(m)];
    score += (q1 * k1 + q2 * k2) * cos + (q1 * k2 - q2 * k1) * sin;
    magnitude +=
        (abs(q1 * k1) + abs(q2 * k2)) * abs(cos) + (abs(q1 * k2) + abs(q2 * k1)) * abs(sin);
  }
  return score;
}

/// √(Σ x² / divisor + added) of `count` numbers. A number that bounds its own error knows that no
/// square leaves its range on a careful way there.
template <typename Real>
Real root_of_squares(const Real* x, std::size_t count, const Real& divisor, const Real& added) {
  using std::sqrt;
  Real sum(0);
  for (std::size_t i = 0; i < count; ++i) sum += x[i] * x[i];
  return sqrt(sum / divisor + added);
}

/// max(|x|, 1e-12) of `count` numbers.
template <typename Real>
Real norm_of(const Real* x, std::size_t count) {
  return std::max(root_of_squares(x, count, Real(1), Real(0)), static_cast<Real>(1e-12L));
}

/// k / max(|k|, 1e-12) for every row of `dim_head` numbers.
template <typename Real>
Array<Real> normalized_rows(Array<Real> rows) {
  const auto d = static_cast<std::size_t>(rows.shape.back());
  for (std::size_t row = 0; d > 0 && row < rows.data.size(); row += d) {
    const Real norm = norm_of(rows.data.data() + row, d);
    for (std::size_t c = 0; c < d; ++c) rows.data[row + c] /= norm;
  }
  return rows;
}

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
  Array<Real> q, k, v;                // [B, H, N, D]
  std::vector<unsigned char> masked;  // [B, N], 1 = not attended; empty: none
  Array<Real> bias;                   // [H or 1, w, (1+lb+lf)·w]; empty: none
  /// Factor of the probability of (b, h, i, j), that is 0 or 1 / (1 - dropout); empty: 1.
  std::function<Real(Int, Int, Int, Int)> multiplier;
};

template <typename Real>
struct AttentionRow {
  std::vector<Real> out;            // [D]
  std::vector<Real> scores;         // of the seen keys
  std::vector<Real> probabilities;  // of the seen keys, in their order
  std::vector<Int> keys;            // the seen keys
  Real lse = 0;                     // log of the sum of exponentials; unused if no key is seen
  Real largest_magnitude = 0;       // of the scores' terms: rounding errors scale with it
};

/// The element of `[H or 1, w, (1+lb+lf)·w]` for query row `i` and key row `j`, which it sees.
template <typename Bias>
auto& bias_of(const AttentionOptions& o, Bias& bias, Int h, Int i, Int j) {
  const Int query = o.first_position + i, key = o.first_position + j;
  const Int first_key = (query / o.window_size - o.look_backward) * o.window_size;
  return bias(bias.shape[0] == 1 ? 0 : h, query % o.window_size, key - first_key);
}

/// One row of the result. Keys must be normalized already if `shared_qk`.
template <typename Real>
AttentionRow<Real> attend_row(const AttentionOptions& o, const AttentionInputs<Real>& in,
                              Rotation<Real>& rotation, Int b, Int h, Int i) {
  using std::abs;
  using std::log;
  const Int n = in.k.shape[2], d = in.k.shape[3];
  const Real scale = o.scale ? static_cast<Real>(*o.scale)
                             : static_cast<Real>(1 / std::sqrt(static_cast<long double>(d)));
  AttentionRow<Real> row;
  row.out.assign(static_cast<std::size_t>(d), Real(0));

  std::vector<Real>& scores = row.scores;
  for (Int j = 0; j < n; ++j) {
    if (!sees(o, i, j)) continue;
    if (!in.masked.empty() && in.masked[static_cast<std::size_t>(b * n + j)]) continue;
    const Real* bias = in.bias.empty() ? nullptr : &bias_of(o, in.bias, h, i, j);
    const bool self = o.shared_qk && i == j;
    if (bias != nullptr && !self && !(*bias > Real(o.hiding_bias))) continue;
    Real magnitude = 0;
    Real score = raw_score(o, rotation, in.q.data.data() + in.q.offset(b, h, i, 0),
                           in.k.data.data() + in.k.offset(b, h, j, 0), d, i, j, magnitude) *
                 scale;
    if (bias != nullptr) score += *bias;
    if (self) score = Real(-5e4);
    scores.push_back(score);
    row.keys.push_back(j);
    row.largest_magnitude = std::max(row.largest_magnitude, magnitude * abs(scale));
  }
  if (scores.empty()) return row;

  const Real largest = *std::max_element(scores.begin(), scores.end());
  Real sum = 0;
  for (const Real& score : scores) sum += exp_below(score, largest);
  row.lse = largest + log(sum);
  for (std::size_t s = 0; s < scores.size(); ++s) {
    Real probability = share(exp_below(scores[s], largest), sum);
    if (in.multiplier) probability *= in.multiplier(b, h, i, row.keys[s]);
    row.probabilities.push_back(probability);
    const Real* v = in.v.data.data() + in.v.offset(b, h, row.keys[s], 0);
    for (Int c = 0; c < d; ++c) row.out[static_cast<std::size_t>(c)] += probability * v[c];
  }
  return row;
}

template <typename Real>
struct AttentionResult {
  Array<Real> out;            // [B, H, N, D]
  Array<Real> probabilities;  // [B, H, N, N]
  Array<Real> lse;            // [B, H, N]; -infinity where no key is seen
  Real largest_magnitude = 0;
};

template <typename Real>
AttentionResult<Real> attention(const AttentionOptions& options, AttentionInputs<Real> in) {
  const Int batch = in.q.shape[0], heads = in.q.shape[1], n = in.q.shape[2], d = in.q.shape[3];
  if (options.shared_qk) in.k = normalized_rows(std::move(in.k));
  AttentionResult<Real> result{Array<Real>({batch, heads, n, d}), Array<Real>({batch, heads, n, n}),
                               Array<Real>({batch, heads, n}), Real(0)};
  Rotation<Real> rotation(options, d);
  for (Int b = 0; b < batch; ++b)
    for (Int h = 0; h < heads; ++h)
      for (Int i = 0; i < n; ++i) {
        const AttentionRow<Real> row = attend_row(options, in, rotation, b, h, i);
        for (Int c = 0; c < d; ++c) result.out(b, h, i, c) = row.out[static_cast<std::size_t>(c)];
        for (std::size_t s = 0; s < row.keys.size(); ++s)
          result.probabilities(b, h, i, row.keys[s]) = row.probabilities[s];
        result.lse(b, h, i) = row.keys.empty() ? -std::numeric_limits<Real>::infinity() : row.lse;
        result.largest_magnitude = std::max(result.largest_magnitude, row.largest_magnitude);
      }
  return result;
}

}  // namespace reference
