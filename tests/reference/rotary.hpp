// SPDX-License-Identifier: MIT
/// \file
/// Scores of queries and keys that are turned by how far they are apart. Angles and powers are
/// formed in long double.
#pragma once

#include <cmath>
#include <unordered_map>
#include <vector>

#include "reference/array.hpp"
#include "reference/options.hpp"

namespace reference {

/// What a cosine or sine of an angle rθ, times zeta, is as a `Real`; and a gradient that was turned
/// with xPos. A number that bounds its own error knows what either loses.
template <typename Real>
struct Turning {
  static const Real& decayed(const Real& gradient) { return gradient; }
  static Real of(long double turn, long double zeta, long double /*angle*/, long double /*theta*/) {
    return static_cast<Real>(turn * zeta);
  }
};

/// cos(rθ_m) and sin(rθ_m), times ζ_m^(r / base) with xPos, for each channel pair m; times the
/// factor of the query and that of the key.
template <typename Real>
class Rotation {
 public:
  Rotation(const AttentionOptions& options, Int dim_head)
      : options_(options), d_(options.rotary_options.rotary_dim.value_or(dim_head)) {}

  struct Turn {
    Real cos, sin;
  };

  /// How many channels are turned.
  Int dim() const { return d_; }

  const std::vector<Turn>& at(Int r) {
    std::vector<Turn>& turns = cache_[r];
    if (turns.empty() && d_ >= 2) {
      const auto d = static_cast<long double>(d_);
      const RotaryOptions& rotary = options_.rotary_options;
      const auto factor = static_cast<long double>(rotary.factor);
      for (Int m = 0; m < d_ / 2; ++m) {
        const auto pair = static_cast<long double>(m);
        const long double theta =
            rotary.inv_freq.empty()
                ? std::pow(static_cast<long double>(rotary.theta), -2 * pair / d)
                : static_cast<long double>(rotary.inv_freq.at(static_cast<std::size_t>(m)));
        const long double angle = static_cast<long double>(r) * theta;
        long double zeta = factor * factor;
        if (options_.xpos)
          zeta *= std::pow(
              (2 * pair + 0.4L * d) / (1.4L * d),
              static_cast<long double>(r) / static_cast<long double>(options_.xpos_scale_base));
        turns.push_back({Turning<Real>::of(std::cos(angle), zeta, angle, theta),
                         Turning<Real>::of(std::sin(angle), zeta, angle, theta)});
      }
    }
    return turns;
  }

 private:
  AttentionOptions options_;
  Int d_;
  std::unordered_map<Int, std::vector<Turn>> cache_;
};

/// How far apart the query of row `i` and the key of row `j` are: with the look-around, `lf·w`
/// more.
inline Int rotary_distance(const AttentionOptions& o, Int i, Int j) {
  return o.token_window ? i - j : i - j + o.look_forward * o.window_size;
}

/// Channels that are turned together.
struct ChannelPair {
  std::size_t first, second;
};
inline ChannelPair channel_pair(const AttentionOptions& o, Int rotary_dim, Int m) {
  const auto first = static_cast<std::size_t>(m);
  if (o.rotary_options.interleaved) return {2 * first, 2 * first + 1};
  return {first, first + static_cast<std::size_t>(rotary_dim / 2)};
}

/// q·k, or with rotary the sum over channel pairs of
/// (q1 k1 + q2 k2) cos(rθ) + (q1 k2 - q2 k1) sin(rθ), and q·k of the channels that are not turned.
/// `magnitude` is the sum of the terms' absolute values: what rounding errors are relative to.
template <typename Real>
Real raw_score(const AttentionOptions& o, Rotation<Real>& rotation, const Real* q, const Real* k,
               Int dim_head, Int i, Int j, Real& magnitude) {
  using std::abs;
  Real score = 0;
  magnitude = 0;
  Int turned = 0;
  if (o.rotary) {
    turned = rotation.dim();
    const auto& turns = rotation.at(rotary_distance(o, i, j));
    for (Int m = 0; m < turned / 2; ++m) {
      const auto [first, second] = channel_pair(o, turned, m);
      const Real q1 = q[first], q2 = q[second], k1 = k[first], k2 = k[second];
      const auto [cos, sin] = turns[static_cast<std::size_t>(m)];
      score += (q1 * k1 + q2 * k2) * cos + (q1 * k2 - q2 * k1) * sin;
      magnitude +=
          (abs(q1 * k1) + abs(q2 * k2)) * abs(cos) + (abs(q1 * k2) + abs(q2 * k1)) * abs(sin);
    }
  }
  for (Int c = turned; c < dim_head; ++c) {
    score += q[c] * k[c];
    magnitude += abs(q[c] * k[c]);
  }
  return score;
}

/// Adds a score's share of the gradients of its query and key; `slope` is that of raw_score().
template <typename Real>
void raw_score_backward(const AttentionOptions& o, Rotation<Real>& rotation, const Real* q,
                        const Real* k, Int dim_head, Int i, Int j, const Real& slope, Real* grad_q,
                        Real* grad_k) {
  Int turned = 0;
  if (o.rotary) {
    turned = rotation.dim();
    const auto& turns = rotation.at(rotary_distance(o, i, j));
    for (Int m = 0; m < turned / 2; ++m) {
      const auto [first, second] = channel_pair(o, turned, m);
      const Real q1 = q[first], q2 = q[second], k1 = k[first], k2 = k[second];
      const auto [cos, sin] = turns[static_cast<std::size_t>(m)];
      const auto decayed = [&](const Real& gradient) {
        return o.xpos ? Turning<Real>::decayed(gradient) : gradient;
      };
      grad_q[first] += decayed(slope * (k1 * cos + k2 * sin));
      grad_q[second] += decayed(slope * (k2 * cos - k1 * sin));
      grad_k[first] += decayed(slope * (q1 * cos - q2 * sin));
      grad_k[second] += decayed(slope * (q2 * cos + q1 * sin));
    }
  }
  for (Int c = turned; c < dim_head; ++c) {
    grad_q[c] += slope * k[c];
    grad_k[c] += slope * q[c];
  }
}

}  // namespace reference
