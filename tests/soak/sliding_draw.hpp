// SPDX-License-Identifier: MIT
/// \file
/// What the configurations of an attention and of a layer have for sliding windows in common.
#pragma once

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include <local_mha/config.hpp>

#include "soak/draw.hpp"
#include "support/random_sliding_case.hpp"

namespace soak {

/// Whether sequences come at once, or bit by bit: then neither without an end nor packed.
enum class Arrival { AtOnce, BitByBit };

/// Which keys a query sees beside what a configuration says.
struct Places {
  std::vector<Index> cu_seqlens;      // empty: none
  std::vector<unsigned char> global;  // [B, N]; empty: none
};

/// Heads of queries, of which so many share one of keys and values.
struct Heads {
  Index kv_heads, group;

  Index all() const { return kv_heads * group; }
};
inline Heads draw_heads(Random& random) {
  if (random.chance(0.7)) return {random.integer(1, 3), 1};
  return random.pick<Heads>({{1, 2}, {1, 3}, {1, 4}, {2, 2}});
}

/// A token window in place of the look-around, and first keys.
/// \param bounded whether both sides of a window must have an end
template <typename Config>
void draw_window_rules(Random& random, Config& config, Index n, bool bounded) {
  if (random.chance(0.45)) {
    const auto side = [&]() -> Index {
      if (random.chance(0.1)) return random.pick<Index>({64, 100, 1000});
      return support::pick_side(random, n, bounded).value_or(local_mha::TokenWindow::unbounded);
    };
    const Index left = side();
    config.token_window = {left, config.causal || random.chance(0.3) ? 0 : side()};
    config.window_size = 0;
    config.look_backward = 1;
    config.look_forward.reset();
  }
  if (random.chance(0.2)) config.first_keys = random.pick<Index>({1, 2, 4, 5, 15, 16, 19, 33, 100});
}

/// Segments of packed sequences: of none, of one and of any number of rows.
inline std::vector<Index> draw_segments(Random& random, Index n) {
  const std::vector<Int> segments = support::pick_segments(random, n);
  return {segments.begin(), segments.end()};
}

/// The most keys that a query sees, of `n`, as far as it costs.
template <typename Config>
Index keys_seen(const Config& config, Index window, Index n) {
  const auto together = [n](Index a, Index b) { return a < n - b ? a + b : n; };
  Index keys = std::min(n, 4 * window);
  if (config.token_window)
    keys =
        together(std::min(n, config.token_window->left), std::min(n, config.token_window->right));
  return together(keys, std::min(n, config.first_keys));
}

/// How far a key can lie ahead of a query, beyond what rotary's shift makes up for.
/// \param window positions in a window
template <typename Config>
Index ahead_of_shift(const Config& config, Index window, Index n, bool global) {
  if (global) return n;
  if (config.causal || (config.token_window && config.token_window->right == 0)) return 0;
  const Index ahead = config.token_window       ? config.token_window->right
                      : config.exact_windowsize ? 0
                                                : window;
  return std::max(std::min(n, ahead), std::min(n, config.first_keys));
}

/// Which of a head's `dim` channels, two at least, turn how fast.
inline void draw_rotary(Random& random, local_mha::RotaryConfig& rotary, Index dim, bool xpos) {
  rotary.theta = random.pick({10000.0, 500.0, 1e6});
  if (xpos) return;
  if (dim % 2 == 1 || random.chance(0.4)) rotary.rotary_dim = 2 * random.integer(1, dim / 2);
  if (random.chance(0.4)) rotary.pairing = local_mha::RotaryPairing::interleaved;
  if (random.chance(0.25))
    for (Index m = 0; m < rotary.rotary_dim.value_or(dim) / 2; ++m)
      rotary.inv_freq.push_back(random.chance(0.1) ? 0 : random.uniform(-1, 1));
  if (random.chance(0.25)) rotary.factor = random.pick({1.25, 0.75, 4.0});
}

/// What becomes of scores of about `size`.
inline void draw_score(Random& random, local_mha::ScoreConfig& score, Index heads, double size) {
  if (random.chance(0.5)) {
    score.soft_cap =
        random.pick({0.5, 1.0, 3.0}) * (random.chance(0.5) ? size : random.pick({1.0, 30.0}));
    return;
  }
  for (Index h = 0; h < heads; ++h)
    score.alibi_slopes.push_back(random.pick({0.5, 0.25, 0.0625, 1.0, 0.0, -0.1, 30.0}));
}

/// Scores without a value: about as large as others, far above or below them.
template <typename Scalar>
Array<double> draw_sinks(Random& random, Index heads, double size) {
  Array<double> sinks =
      draw_numbers<Scalar>(random, {heads}, random.chance(0.5) ? 1 : std::clamp(size, 1e-20, 1e5));
  const double far = random.pick({0.0, 0.0, 0.0, 88.75, -90.0, -200.0, 1e3, -1e6});
  for (double& sink : sinks.data) sink = round_to<Scalar>(sink + far);
  return sinks;
}

/// Of a token window with ends: `left + right + 1`; 0: there is none.
template <typename Config>
Index relative_columns(const Config& config) {
  return config.token_window && config.token_window->bounded()
             ? config.token_window->left + config.token_window->right + 1
             : 0;
}

/// For the line of a case.
template <typename Config>
std::string describe_window(const Config& config) {
  std::ostringstream text;
  const auto side = [](Index positions) {
    return positions == local_mha::TokenWindow::unbounded ? "all" : std::to_string(positions);
  };
  if (config.token_window)
    text << " {" << side(config.token_window->left) << ", " << side(config.token_window->right)
         << "}";
  else
    text << " w " << config.window_size << " lb " << config.look_backward << " lf "
         << (config.look_forward ? std::to_string(*config.look_forward) : "-");
  text << (config.causal ? " causal" : "") << (config.exact_windowsize ? " exact" : "");
  if (config.first_keys > 0) text << " first_keys " << config.first_keys;
  return text.str();
}

inline std::string describe(const local_mha::RotaryConfig& rotary) {
  std::ostringstream text;
  text << " rotary";
  if (rotary.rotary_dim) text << " dim " << *rotary.rotary_dim;
  if (rotary.theta != 10000) text << " theta " << rotary.theta;
  text << (rotary.pairing == local_mha::RotaryPairing::interleaved ? " interleaved" : "")
       << (rotary.inv_freq.empty() ? "" : " inv_freq");
  if (rotary.factor != 1) text << " factor " << rotary.factor;
  return text.str();
}

inline std::string describe(const local_mha::ScoreConfig& score) {
  std::ostringstream text;
  if (score.soft_cap) text << " cap " << *score.soft_cap;
  if (!score.alibi_slopes.empty()) text << " alibi";
  return text.str();
}

inline std::string describe(const Places& places) {
  std::ostringstream text;
  if (!places.cu_seqlens.empty()) text << " cu_seqlens";
  for (const Index begin : places.cu_seqlens) text << " " << begin;
  text << (places.global.empty() ? "" : " global");
  return text.str();
}

}  // namespace soak
