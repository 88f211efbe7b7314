// SPDX-License-Identifier: MIT
/// \file
/// Cross entropy of logits and labels, in nats.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// The positions of `[B, N]` labels that count.
/// \throws std::invalid_argument if the shapes differ or a label is no class
inline Index count_labels(const std::array<Index, 3>& logits,
                          const TensorView<const std::int64_t, 2>& labels,
                          std::int64_t ignore_index) {
  require_shape("labels", labels.dimensions(), {logits[0], logits[1]});
  const Index classes = logits[2];
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

}  // namespace detail

/// Mean of `log Σ_c exp(logits_c) − logits_label` over the positions whose label counts.
/// \param logits `[B, N, classes]`
/// \param labels `[B, N]`, classes or ignore_index
/// \param ignore_index positions with this label do not count
/// \return NaN if no label counts, as in PyTorch
/// \throws std::invalid_argument if the shapes differ or a label is no class
template <typename Scalar>
Scalar cross_entropy(TensorView<const Scalar, 3> logits, TensorView<const std::int64_t, 2> labels,
                     std::int64_t ignore_index = -1) {
  using std::exp;
  using std::log;
  const Index counted = detail::count_labels(logits.dimensions(), labels, ignore_index);
  const Index classes = logits.dimension(2);
  Scalar total(0);
  for (Index i = 0; i < labels.size(); ++i) {
    if (labels.data()[i] == ignore_index) continue;
    const Scalar* row = logits.data() + i * classes;
    Scalar maximum = row[0];
    for (Index c = 1; c < classes; ++c)
      if (maximum < row[c]) maximum = row[c];
    Scalar sum(0);
    for (Index c = 0; c < classes; ++c) sum += exp(Scalar(row[c] - maximum));
    total += log(sum) + maximum - row[labels.data()[i]];
  }
  return Scalar(total / Scalar(static_cast<double>(counted)));
}

/// The gradient of cross_entropy() for the logits: `(softmax(logits) − one_hot(label)) / counted`,
/// and 0 where a label does not count.
/// \return `[B, N, classes]`
/// \throws std::invalid_argument if the shapes differ or a label is no class
template <typename Scalar>
Tensor<Scalar, 3> cross_entropy_gradient(TensorView<const Scalar, 3> logits,
                                         TensorView<const std::int64_t, 2> labels,
                                         std::int64_t ignore_index = -1) {
  using std::exp;
  const Index counted = detail::count_labels(logits.dimensions(), labels, ignore_index);
  const Index classes = logits.dimension(2);
  Tensor<Scalar, 3> gradient(logits.dimension(0), logits.dimension(1), classes);
  gradient.setZero();
  for (Index i = 0; i < labels.size(); ++i) {
    if (labels.data()[i] == ignore_index) continue;
    const Scalar* row = logits.data() + i * classes;
    Scalar* to = gradient.data() + i * classes;
    const Scalar maximum = *std::max_element(row, row + classes);
    Scalar sum(0);
    for (Index c = 0; c < classes; ++c) {
      to[c] = exp(Scalar(row[c] - maximum));
      sum += to[c];
    }
    const Scalar factor = Scalar(Scalar(1 / static_cast<double>(counted)) / sum);
    for (Index c = 0; c < classes; ++c) to[c] *= factor;
    to[labels.data()[i]] -= Scalar(1 / static_cast<double>(counted));
  }
  return gradient;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
