// SPDX-License-Identifier: MIT
/// \file
/// What is added to the score of a pair of positions, and LongT5's table of it.
#pragma once

#include <algorithm>
#include <cmath>

#include "reference/array.hpp"
#include "reference/options.hpp"
#include "reference/visibility.hpp"

namespace reference {

/// Where a bias of one or of all heads holds that of head `h`.
template <typename Bias>
Int head_of_bias(const Bias& bias, Int h) {
  return bias.shape[0] == 1 ? 0 : h;
}

/// The element of `[H or 1, w, (1+lb+lf)·w]` for query row `i` and key row `j`: (h, i mod w,
/// j − (i/w − lb)·w). Null where there is none, as for a first key or a global row far away.
template <typename Bias>
auto* attn_bias_of(const AttentionOptions& o, Bias& bias, Int h, Int i, Int j) {
  const Int query = position(o, i), key = position(o, j);
  const Int first_key = (query / o.window_size - o.look_backward) * o.window_size;
  const Int column = key - first_key;
  return 0 <= column && column < bias.shape[2]
             ? &bias(head_of_bias(bias, h), query % o.window_size, column)
             : nullptr;
}

/// The element of `[H or 1, left + right + 1]` for query row `i` and key row `j`: (h, j − i +
/// left). Null where there is none.
template <typename Bias>
auto* relative_bias_of(const AttentionOptions& o, Bias& bias, Int h, Int i, Int j) {
  const Int column = j - i + o.token_window.value().left.value();
  return 0 <= column && column < bias.shape[1] ? &bias(head_of_bias(bias, h), column) : nullptr;
}

/// LongT5's buckets of relative positions.
struct RelativeBuckets {
  Int buckets = 32;
  Int max_distance = 128;
};

/// The bucket of the key `j − i = ahead` positions ahead: half of the buckets are of later keys; of
/// each half, the first half are of one distance each, and the others grow up to the last.
inline Int bucket_of(const RelativeBuckets& o, Int ahead) {
  const Int half = o.buckets / 2, exact = o.buckets / 4, n = std::abs(ahead);
  const Int first = ahead > 0 ? half : 0;
  if (n < exact) return first + n;
  const double growth = std::log(static_cast<double>(n) / static_cast<double>(exact)) /
                        std::log(static_cast<double>(o.max_distance) / static_cast<double>(exact)) *
                        static_cast<double>(half - exact);
  return first + std::min(exact + static_cast<Int>(std::floor(growth)), half - 1);
}

/// `[H, left + right + 1]` from a table `[buckets, H]`.
template <typename Real>
Array<Real> bias_of_buckets(const RelativeBuckets& o, const Array<Real>& table, Int left,
                            Int right) {
  const Int heads = table.shape[1];
  Array<Real> bias({heads, left + right + 1});
  for (Int h = 0; h < heads; ++h)
    for (Int ahead = -left; ahead <= right; ++ahead)
      bias(h, ahead + left) = table(bucket_of(o, ahead), h);
  return bias;
}

template <typename Real>
void bias_of_buckets_backward(const RelativeBuckets& o, Int left, Int right,
                              const Array<Real>& grad_bias, Array<Real>& grad_table) {
  for (Int h = 0; h < grad_table.shape[1]; ++h)
    for (Int ahead = -left; ahead <= right; ++ahead)
      grad_table(bucket_of(o, ahead), h) += grad_bias(h, ahead + left);
}

}  // namespace reference
