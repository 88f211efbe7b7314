// SPDX-License-Identifier: MIT
/// \file
/// Sums over a batch whose order does not depend on threads: gradients of biases and of sinks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <optional>
#include <vector>

#include <local_mha/attention/log_sum_exp.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// Gradients of an attention bias, of which head `b·H + h` has that of its number modulo theirs: a
/// bias that heads share is summed for each of them alone, so that the order of the sum does not
/// depend on threads. Each is a sum over all queries.
template <typename Scalar>
class BiasGradients {
 public:
  using Sum = LongSum<Scalar>;
  using Bias = std::optional<TensorView<const Scalar, 3>>;

  /// Becomes 0. Memory is used again.
  /// \param attn_bias null: no gradients
  void prepare(const Bias& attn_bias, Index heads) {
    biases_ = attn_bias ? attn_bias->dimension(0) : 0;
    number_ = biases_ > 0 && heads > 0 ? std::lcm(biases_, heads) : biases_;
    size_ = attn_bias ? attn_bias->dimension(1) * attn_bias->dimension(2) : 0;
    sums_.assign(static_cast<std::size_t>(number_ * size_), Sum(0));
  }

  explicit operator bool() const { return biases_ > 0; }
  /// Sums that are apart: head `b·H + h` adds to that of its number modulo theirs.
  Index number() const { return number_; }
  /// Null if there are no gradients.
  Sum* of_head(Index head) { return biases_ > 0 ? sums_.data() + head % number_ * size_ : nullptr; }

  /// \param to in the shape of the bias
  void add_to(Scalar* to) const {
    for (Index i = 0; i < biases_; ++i)
      for (Index c = 0; c < size_; ++c) {
        Sum sum(0);
        for (Index head = i; head < number_; head += biases_)
          sum += sums_[static_cast<std::size_t>(head * size_ + c)];
        to[i * size_ + c] += static_cast<Scalar>(sum);
      }
  }
  void add_to(Tensor<Scalar, 3>& to) const { add_to(to.data()); }

 private:
  Index biases_ = 0;
  Index number_ = 0;
  Index size_ = 0;
  BlockBuffer<Sum> sums_;
};

/// What a block of queries gives to the gradient of its sink: `−Σ_i p_i,sink · delta_i`.
/// \param sink in units of log 2
/// \param lse, delta those of QueryGradients
template <typename Scalar>
void add_sink_gradient(const Scalar& sink, const Scalar* lse, const Scalar* delta,
                       LongSum<Scalar>& sum) {
  constexpr Index count = block_rows<Scalar>;
  for (Index r = 0; r < count; ++r) {
    // Nothing but the sink, or no query: then there is no delta.
    if (delta[r] == Scalar(0)) continue;
    const auto parts = binary_log_sum_exp<Scalar>({lse[r], lse[r + count]});
    using std::exp;
    using Sum = LongSum<Scalar>;
    sum -= exp(Sum(ln_2) * ((Sum(sink) - Sum(parts.nearest)) - Sum(parts.rest))) * Sum(delta[r]);
  }
}

/// Those of sinks: of each head of each sequence of the batch, then of each head.
template <typename Scalar>
class SinkGradients {
 public:
  using Sum = LongSum<Scalar>;

  /// Becomes 0. Memory is used again.
  /// \param heads of all sequences of the batch; 0: no gradients
  void prepare(Index heads) { sums_.assign(static_cast<std::size_t>(heads), Sum(0)); }

  /// Null if there are no gradients.
  Sum* of_head(Index head) {
    return sums_.empty() ? nullptr : &sums_[static_cast<std::size_t>(head)];
  }

  /// \param to `[heads]`
  void add_to(Index heads, Scalar* to) const {
    for (Index h = 0; h < heads && !sums_.empty(); ++h) {
      Sum sum(0);
      for (auto i = static_cast<std::size_t>(h); i < sums_.size();
           i += static_cast<std::size_t>(heads))
        sum += sums_[i];
      to[h] += static_cast<Scalar>(sum);
    }
  }

 private:
  std::vector<Sum> sums_;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
