// SPDX-License-Identifier: MIT
/// \file
/// Cross entropy of logits and labels, in nats.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <string>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// The positions of `[B, N]` labels that count.
/// \throws std::invalid_argument if there is no class, the shapes differ or a label is no class
inline Index count_labels(const std::array<Index, 3>& logits,
                          const TensorView<const std::int64_t, 2>& labels,
                          std::int64_t ignore_index) {
  const Index classes = logits[2];
  if (classes < 1) reject("logits", "at least 1 class", to_string(logits));
  require_shape("labels", labels.dimensions(), {logits[0], logits[1]});
  Index counted = 0;
  for (Index i = 0; i < labels.size(); ++i) {
    const std::int64_t label = labels.data()[i];
    if (label == ignore_index) continue;
    if (label < 0 || label >= classes)
      reject("labels", "0 to " + std::to_string(classes - 1) + " or ignore_index", label, " at ",
             i);
    ++counted;
  }
  return counted;
}

template <typename Scalar>
struct SoftmaxWeights {
  Scalar maximum;
  LongSum<Scalar> sum;
};

/// `exp(logits_c − maximum)` of each class, and their sum.
/// \param to `[classes]`
template <typename Scalar>
SoftmaxWeights<Scalar> softmax_weights(Index classes, const Scalar* logits, Scalar* to) {
  using std::exp;
  SoftmaxWeights<Scalar> of{*std::max_element(logits, logits + classes), LongSum<Scalar>(0)};
  for (Index c = 0; c < classes; ++c) {
    to[c] = exp(Scalar(logits[c] - of.maximum));
    of.sum += LongSum<Scalar>(to[c]);
  }
  return of;
}

/// The sum of what cross_entropy() is the mean of.
template <typename Scalar>
LongSum<Scalar> cross_entropy_sum(const TensorView<const Scalar, 3>& logits,
                                  const TensorView<const std::int64_t, 2>& labels,
                                  std::int64_t ignore_index) {
  using std::log;
  const Index classes = logits.dimension(2);
  LongSum<Scalar> total(0);
  std::vector<Scalar> weights(static_cast<std::size_t>(classes));
  for (Index i = 0; i < labels.size(); ++i) {
    if (labels.data()[i] == ignore_index) continue;
    const Scalar* row = logits.data() + i * classes;
    const auto [maximum, sum] = softmax_weights(classes, row, weights.data());
    // A difference of logits first, which may be large.
    total += LongSum<Scalar>(log(sum)) + LongSum<Scalar>(maximum - row[labels.data()[i]]);
  }
  return total;
}

/// cross_entropy_gradient() where so many positions count, which need not all be here.
template <typename Scalar>
Tensor<Scalar, 3> cross_entropy_gradient_of(const TensorView<const Scalar, 3>& logits,
                                            const TensorView<const std::int64_t, 2>& labels,
                                            std::int64_t ignore_index, Index counted) {
  const Index classes = logits.dimension(2);
  Tensor<Scalar, 3> gradient(logits.dimension(0), logits.dimension(1), classes);
  gradient.setZero();
  for (Index i = 0; i < labels.size(); ++i) {
    if (labels.data()[i] == ignore_index) continue;
    Scalar* to = gradient.data() + i * classes;
    const LongSum<Scalar> sum = softmax_weights(classes, logits.data() + i * classes, to).sum;
    const LongSum<Scalar> factor =
        LongSum<Scalar>(LongSum<Scalar>(1 / static_cast<double>(counted)) / sum);
    Scalar& of_label = to[labels.data()[i]];
    // Less the sum while both have all their digits: a probability may be next to 1.
    const Scalar grad_label = Scalar((LongSum<Scalar>(of_label) - sum) * factor);
    for (Index c = 0; c < classes; ++c) to[c] = Scalar(LongSum<Scalar>(to[c]) * factor);
    of_label = grad_label;
  }
  return gradient;
}

/// What has the numbers of a TensorView<const Scalar, 3>: a tensor, a map or a view.
template <typename Source>
concept LogitsSource = std::convertible_to<const Source&, TensorView<const ScalarOf<Source>, 3>>;

}  // namespace detail

/// Mean of `log Σ_c exp(logits_c) − logits_label` over the positions whose label counts.
/// \param logits `[B, N, classes]`
/// \param labels `[B, N]`, classes or ignore_index
/// \param ignore_index positions with this label do not count
/// \return NaN if no label counts, as in PyTorch
/// \throws std::invalid_argument if there is no class, the shapes differ or a label is no class
template <typename Scalar>
Scalar cross_entropy(TensorView<const Scalar, 3> logits, TensorView<const std::int64_t, 2> labels,
                     std::int64_t ignore_index = -1) {
  const Index counted = detail::count_labels(logits.dimensions(), labels, ignore_index);
  return Scalar(detail::cross_entropy_sum<Scalar>(logits, labels, ignore_index) /
                LongSum<Scalar>(static_cast<double>(counted)));
}

/// The same of a tensor, a map or a view, whose scalar need not be said.
template <detail::LogitsSource Logits>
auto cross_entropy(const Logits& logits, TensorView<const std::int64_t, 2> labels,
                   std::int64_t ignore_index = -1) {
  return cross_entropy<detail::ScalarOf<Logits>>(logits, labels, ignore_index);
}

/// The gradient of cross_entropy() for the logits: `(softmax(logits) − one_hot(label)) / counted`,
/// and 0 where a label does not count.
/// \return `[B, N, classes]`
/// \throws std::invalid_argument if there is no class, the shapes differ or a label is no class
template <typename Scalar>
Tensor<Scalar, 3> cross_entropy_gradient(TensorView<const Scalar, 3> logits,
                                         TensorView<const std::int64_t, 2> labels,
                                         std::int64_t ignore_index = -1) {
  const Index counted = detail::count_labels(logits.dimensions(), labels, ignore_index);
  return detail::cross_entropy_gradient_of<Scalar>(logits, labels, ignore_index, counted);
}

/// The same of a tensor, a map or a view, whose scalar need not be said.
template <detail::LogitsSource Logits>
auto cross_entropy_gradient(const Logits& logits, TensorView<const std::int64_t, 2> labels,
                            std::int64_t ignore_index = -1) {
  return cross_entropy_gradient<detail::ScalarOf<Logits>>(logits, labels, ignore_index);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
