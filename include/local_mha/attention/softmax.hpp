// SPDX-License-Identifier: MIT
/// \file
/// The softmax so far of scores that come bit by bit:
///
///     m = max s_j,   Σ_j 2^(s_j − m),   lse = log Σ_j exp(s_j)
///
/// (M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018). Scores are in
/// units of log 2, because 2^x is what a processor makes. A sink is a score without a value.
#pragma once

#include <limits>

#include <local_mha/attention/log_sum_exp.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/exp2.hpp>
#include <local_mha/core/types.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// That of each lane's query.
template <typename Scalar, int Parts = 1>
struct SoftmaxState {
  using L = Lanes<Scalar, Parts>;

  /// No score but −∞ is below it; it is finite, so that its difference to −∞ is −∞.
  static auto lowest() { return -Eigen::NumTraits<typename L::Value>::highest(); }

  /// Of the sink alone; −∞: of nothing.
  explicit SoftmaxState(const Scalar& sink)
      : maximum((max)(L::broadcast(lowest()), L::broadcast(sink))),
        sum(exp2(L::broadcast(sink) - maximum)) {}

  /// Takes a maximum that is at least as large. Returns the factor of all that was summed up.
  L rise(const L& to) {
    const L rescale = exp2(maximum - to);
    maximum = to;
    sum = rescale * sum;
    return rescale;
  }

  /// What a score, which is no larger than the maximum, adds to the sum.
  LOCAL_MHA_INLINE L term(const L& score) const { return exp2(score - maximum); }

  /// `1 / sum`; 1 where nothing is seen, whose output is 0, and so is its sum.
  L weight() const {
    const L one = L::broadcast(Scalar(1));
    return one / select_negative(L::zero() - sum, sum, sum + one);
  }

  /// \param lse `[2][block_rows]`, from the first of the lanes on: logarithms of the denominators,
  ///        −∞ of nothing, and what they round off
  void log_sum_exp(Scalar* lse) const {
    alignas(64) Scalar sums[L::count];
    sum.store(sums);
    maximum.store(lse);
    for (Index r = 0; r < L::count; ++r) {
      const LogSumExp<Scalar> parts = natural_log_sum_exp(lse[r], sums[r]);
      lse[r] = parts.nearest;
      lse[block_rows<Scalar> + r] = parts.rest;
    }
  }

  L maximum;
  L sum;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
