// SPDX-License-Identifier: MIT
/// \file
/// What is asked of the naive attention.
#pragma once

#include <limits>
#include <optional>
#include <vector>

#include "reference/array.hpp"

namespace reference {

/// `left` keys back and `right` ahead, the query's own between them. Empty: as many as there are.
struct TokenWindow {
  std::optional<Int> left = {};
  std::optional<Int> right = {};
};

/// Which channels are turned by which angles; every default is that of the Python packages' layer.
struct RotaryOptions {
  double theta = 10000;
  std::optional<Int> rotary_dim = {};  // the first channels, which are turned; empty: all
  bool interleaved = false;            // pairs (2m, 2m + 1) instead of (m, m + rotary_dim / 2)
  std::vector<double> inv_freq = {};   // [rotary_dim / 2] angles of one step; empty: from theta
  double factor = 1;                   // on cosine and sine of a query's and of a key's angle
};

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
  Int first_position = 0;            // absolute position of row 0, or of each segment's first
  /// A bias of at most this hides a key, as one of −∞ does.
  double hiding_bias = -std::numeric_limits<double>::infinity();

  std::optional<TokenWindow> token_window = {};  // in place of the look-around
  std::vector<Int> cu_seqlens = {};  // [S + 1] where segments begin and the last ends; empty: one
  Int first_keys = 0;                // so many keys of each segment stay visible
  RotaryOptions rotary_options = {};
  /// Show the probabilities, too: N numbers a row.
  bool probabilities = false;
};

}  // namespace reference
