// SPDX-License-Identifier: MIT
/// \file
/// Dynamic position bias: an attention bias that an MLP makes of the distance `|i − j|`.
/// W. Wang et al., "CrossFormer", 2021.
#pragma once

#include <cstdlib>
#include <string>
#include <utility>

#include <local_mha/core/error.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/ops/activations.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/linear_backward.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// MLP 1 → hidden → hidden → heads with SiLU.
template <typename Scalar>
class DynamicPositionBias {
 public:
  /// With given weights.
  /// \throws std::invalid_argument naming the weight whose shape does not fit the others
  explicit DynamicPositionBias(const DynamicPositionBiasParameters<Scalar>& parameters)
      : heads_(parameters.weight_4.rows()),
        first_(parameters.weight_0, parameters.bias_0),
        second_(parameters.weight_2, parameters.bias_2),
        third_(parameters.weight_4, parameters.bias_4) {
    if (first_.in_features() != 1) reject("mlp.0.weight", "1 column", first_.in_features());
    if (second_.in_features() != first_.out_features())
      reject("mlp.2.weight", std::to_string(first_.out_features()) + " columns",
             second_.in_features());
    if (third_.in_features() != second_.out_features())
      reject("mlp.4.weight", std::to_string(second_.out_features()) + " columns",
             third_.in_features());
  }

  /// Number of heads.
  Index heads() const { return heads_; }
  /// What this was made of, bit for bit.
  DynamicPositionBiasParameters<Scalar> parameters() const {
    return {first_.weight().unpacked(), first_.bias(), second_.weight().unpacked(), second_.bias(),
            third_.weight().unpacked(), third_.bias()};
  }

  /// The biases of queries in one window for the keys of its look-around.
  /// \return `[heads, window_size, (1 + look_backward + look_forward)·window_size]`
  /// \throws std::invalid_argument if the window is empty, a count negative or the bias too large
  Tensor<Scalar, 3> forward(Index window_size, Index look_backward, Index look_forward) const {
    check_arguments(window_size, look_backward, look_forward);
    const Index cols = (1 + look_backward + look_forward) * window_size;
    const RowMatrix<Scalar> of_distance = activations(cols).heads;
    Tensor<Scalar, 3> bias(heads_, window_size, cols);
    for (Index h = 0; h < heads_; ++h)
      for (Index i = 0; i < window_size; ++i)
        for (Index j = 0; j < cols; ++j)
          bias(h, i, j) = of_distance(std::abs(look_backward * window_size + i - j), h);
    return bias;
  }

  /// Adds the gradients of the weights to `gradients`.
  /// \param grad_bias gradient of forward()'s result
  /// \param gradients `DynamicPositionBiasParameters::zeros(hidden, heads)` at first
  /// \throws std::invalid_argument as forward() does, and naming the gradient that has another
  /// shape
  void backward(DynamicPositionBiasParameters<Scalar>& gradients,
                TensorView<const Scalar, 3> grad_bias, Index window_size, Index look_backward,
                Index look_forward) const {
    check_arguments(window_size, look_backward, look_forward);
    const Index cols = (1 + look_backward + look_forward) * window_size;
    require_shape("grad_bias", grad_bias.dimensions(), {heads_, window_size, cols});
    detail::require_fitting(gradients, first_.out_features(), heads_);
    const Activations at = activations(cols);
    // A distance is that of up to two pairs of every query.
    RowMatrix<LongSum<Scalar>> of_distance =
        RowMatrix<LongSum<Scalar>>::Constant(cols, heads_, LongSum<Scalar>(0));
    const Scalar* of_pair = grad_bias.data();
    for (Index h = 0; h < heads_; ++h)
      for (Index i = 0; i < window_size; ++i)
        for (Index j = 0; j < cols; ++j)
          of_distance(std::abs(look_backward * window_size + i - j), h) +=
              LongSum<Scalar>(*of_pair++);
    RowMatrix<Scalar> grad = of_distance.template cast<Scalar>();

    const auto through = [](const Linear<Scalar>& layer, const RowMatrix<Scalar>& x,
                            const RowMatrix<Scalar>& grad_y, RowMatrix<Scalar>& grad_weight,
                            Vector<Scalar>& grad_weight_bias) {
      return linear_backward<AnyDevice, Scalar>({}, layer.weight(), x, grad_y, grad_weight,
                                                &grad_weight_bias);
    };
    const auto differentiate = [](RowMatrix<Scalar> g, const RowMatrix<Scalar>& x) {
      for (Index i = 0; i < g.size(); ++i) g.data()[i] *= silu_derivative(x.data()[i]);
      return g;
    };
    // Added at the end, where nothing can fail.
    auto made = DynamicPositionBiasParameters<Scalar>::zeros(first_.out_features(), heads_);
    grad = through(third_, activate(at.second), grad, made.weight_4, made.bias_4);
    grad = differentiate(std::move(grad), at.second);
    grad = through(second_, activate(at.first), grad, made.weight_2, made.bias_2);
    grad = differentiate(std::move(grad), at.first);
    through(first_, at.distances, grad, made.weight_0, made.bias_0);
    detail::add_and_clear(gradients, made);
  }

 private:
  // What the layers of the MLP make of the distances, before the activation: `[distance, …]`.
  struct Activations {
    RowMatrix<Scalar> distances;
    RowMatrix<Scalar> first;
    RowMatrix<Scalar> second;
    RowMatrix<Scalar> heads;
  };

  static RowMatrix<Scalar> activate(RowMatrix<Scalar> x) {
    for (Index i = 0; i < x.size(); ++i) x.data()[i] = silu(x.data()[i]);
    return x;
  }

  Activations activations(Index cols) const {
    Activations at;
    at.distances.resize(cols, 1);
    for (Index i = 0; i < cols; ++i) at.distances(i, 0) = Scalar(static_cast<double>(i));
    at.first = first_.forward(at.distances);
    at.second = second_.forward(activate(at.first));
    at.heads = third_.forward(activate(at.second));
    return at;
  }

  void check_arguments(Index window_size, Index look_backward, Index look_forward) const {
    detail::require_at_least("window_size", window_size, 1);
    detail::require_at_least("look_backward", look_backward, 0);
    detail::require_at_least("look_forward", look_forward, 0);
    detail::require_bias_size("window_size", heads_, window_size, look_backward, look_forward);
  }

  Index heads_;
  Linear<Scalar> first_;
  Linear<Scalar> second_;
  Linear<Scalar> third_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
