// SPDX-License-Identifier: MIT
/// \file
/// Cross entropy of logits and labels, in nats.
#pragma once

#include <cmath>
#include <cstdint>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha {

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
  require_shape("labels", labels.dimensions(), {logits.dimension(0), logits.dimension(1)});
  const Index classes = logits.dimension(2);
  const auto counts = [&](Index i) { return labels.data()[i] != ignore_index; };
  for (Index i = 0; i < labels.size(); ++i)
    if (counts(i) && (labels.data()[i] < 0 || labels.data()[i] >= classes))
      reject("labels", "0 to " + std::to_string(classes - 1) + " or ignore_index", labels.data()[i],
             " at ", i);
  Scalar total(0);
  Index counted = 0;
  for (Index i = 0; i < labels.size(); ++i) {
    if (!counts(i)) continue;
    const Scalar* row = logits.data() + i * classes;
    Scalar maximum = row[0];
    for (Index c = 1; c < classes; ++c)
      if (maximum < row[c]) maximum = row[c];
    Scalar sum(0);
    for (Index c = 0; c < classes; ++c) sum += exp(Scalar(row[c] - maximum));
    total += log(sum) + maximum - row[labels.data()[i]];
    ++counted;
  }
  return Scalar(total / Scalar(static_cast<double>(counted)));
}

}  // namespace local_mha
