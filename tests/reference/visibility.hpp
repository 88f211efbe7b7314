// SPDX-License-Identifier: MIT
/// \file
/// Which keys a query sees: every rule as a question about one pair of rows.
#pragma once

#include <cstddef>
#include <vector>

#include "reference/array.hpp"
#include "reference/options.hpp"

namespace reference {

/// The first row of the segment that `row` lies in. A segment of no rows begins where the next
/// does.
inline Int segment_start(const AttentionOptions& o, Int row) {
  Int start = 0;
  for (const Int begin : o.cu_seqlens)
    if (begin <= row) start = begin;
  return start;
}

inline bool same_segment(const AttentionOptions& o, Int i, Int j) {
  return segment_start(o, i) == segment_start(o, j);
}

/// Counted from the segment's start.
inline Int position(const AttentionOptions& o, Int row) {
  return o.first_position + row - segment_start(o, row);
}

/// The look-around, of two positions.
inline bool in_look_around(const AttentionOptions& o, Int query, Int key) {
  const Int query_bucket = query / o.window_size;
  const Int key_bucket = key / o.window_size;
  if (key_bucket < query_bucket - o.look_backward) return false;
  if (key_bucket > query_bucket + o.look_forward) return false;
  if (o.exact_windowsize) {
    // In floating point, because a number of windows times a huge window overflows integers.
    const auto window = static_cast<long double>(o.window_size);
    const auto back = static_cast<long double>(query - key);
    if (back > static_cast<long double>(o.look_backward) * window) return false;
    if (back < -static_cast<long double>(o.look_forward) * window) return false;
  }
  return true;
}

/// `query − left ≤ key ≤ query + right`.
inline bool in_token_window(const TokenWindow& window, Int query, Int key) {
  if (window.left && query - key > *window.left) return false;
  if (window.right && key - query > *window.right) return false;
  return true;
}

/// May the query in row `i` see the key in row `j`, masks and global rows apart?
inline bool sees(const AttentionOptions& o, Int i, Int j) {
  if (!same_segment(o, i, j)) return false;
  const Int query = position(o, i), key = position(o, j);
  if (o.causal && key > query) return false;
  if (j - segment_start(o, j) < o.first_keys) return true;
  return o.token_window ? in_token_window(*o.token_window, query, key)
                        : in_look_around(o, query, key);
}

/// The flag of a row of `[B, N]` flags, of which there may be none.
inline bool flag_of(const std::vector<unsigned char>& flags, Int n, Int b, Int row) {
  return !flags.empty() && flags[static_cast<std::size_t>(b * n + row)] != 0;
}

/// The same, with masks and global rows. A global row sees, and is seen by, all of its segment,
/// whether causal or not; a masked key is seen by none.
/// \param n the number of keys
inline bool sees(const AttentionOptions& o, const std::vector<unsigned char>& masked,
                 const std::vector<unsigned char>& global, Int n, Int b, Int i, Int j) {
  if (flag_of(masked, n, b, j)) return false;
  if (same_segment(o, i, j) && (flag_of(global, n, b, i) || flag_of(global, n, b, j))) return true;
  return sees(o, i, j);
}

}  // namespace reference
