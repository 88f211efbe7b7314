// SPDX-License-Identifier: MIT
/// \file
/// Dynamic position bias: an attention bias that an MLP makes of the distance `|i − j|`.
/// W. Wang et al., "CrossFormer", 2021.
#pragma once

#include <cstdlib>
#include <utility>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/activations.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha {

/// MLP 1 → hidden → hidden → heads with SiLU.
template <typename Scalar>
class DynamicPositionBias {
 public:
  explicit DynamicPositionBias(DynamicPositionBiasParameters<Scalar> parameters)
      : heads_(parameters.weight_4.rows()),
        first_(std::move(parameters.weight_0), std::move(parameters.bias_0)),
        second_(std::move(parameters.weight_2), std::move(parameters.bias_2)),
        third_(std::move(parameters.weight_4), std::move(parameters.bias_4)) {
    if (first_.in_features() != 1) reject("mlp.0.weight", "1 column", first_.in_features());
    if (second_.in_features() != first_.out_features())
      reject("mlp.2.weight", std::to_string(first_.out_features()) + " columns",
             second_.in_features());
    if (third_.in_features() != second_.out_features())
      reject("mlp.4.weight", std::to_string(second_.out_features()) + " columns",
             third_.in_features());
  }

  Index heads() const { return heads_; }

  /// The biases of queries in one window for the keys of its look-around.
  /// \return `[heads, window_size, (1 + look_backward + look_forward)·window_size]`
  /// \throws std::invalid_argument if the window is empty, a count negative or the bias too large
  Tensor<Scalar, 3> forward(Index window_size, Index look_backward, Index look_forward) const {
    detail::require_at_least("window_size", window_size, 1);
    detail::require_at_least("look_backward", look_backward, 0);
    detail::require_at_least("look_forward", look_forward, 0);
    detail::require_bias_size("window_size", heads_, window_size, look_backward, look_forward);
    const Index columns = (1 + look_backward + look_forward) * window_size;
    RowMatrix<Scalar> distances(columns, 1);
    for (Index i = 0; i < columns; ++i) distances(i, 0) = Scalar(static_cast<double>(i));
    const auto activate = [](RowMatrix<Scalar> x) {
      for (Index i = 0; i < x.size(); ++i) x.data()[i] = silu(x.data()[i]);
      return x;
    };
    const RowMatrix<Scalar> of_distance =
        third_.forward(activate(second_.forward(activate(first_.forward(distances)))));
    Tensor<Scalar, 3> bias(heads_, window_size, columns);
    for (Index h = 0; h < heads_; ++h)
      for (Index i = 0; i < window_size; ++i)
        for (Index j = 0; j < columns; ++j)
          bias(h, i, j) = of_distance(std::abs(look_backward * window_size + i - j), h);
    return bias;
  }

 private:
  Index heads_;
  Linear<Scalar> first_;
  Linear<Scalar> second_;
  Linear<Scalar> third_;
};

}  // namespace local_mha
