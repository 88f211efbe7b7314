// SPDX-License-Identifier: MIT
/// \file
/// AdamW: Adam with decoupled weight decay.
/// I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/training/parameter_list.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Names and defaults are those of PyTorch's `torch.optim.AdamW`, but for `decay_vectors`.
struct AdamWConfig {
  /// Decay of the mean of the gradients, in `[0, 1)`.
  double beta1 = 0.9;
  /// Decay of the mean of their squares, in `[0, 1)`.
  double beta2 = 0.999;
  /// Added to the root of the squares, at least 0.
  double eps = 1e-8;
  /// Share of a weight, times the learning rate, that each step takes away; at least 0.
  double weight_decay = 0.01;
  /// Whether biases and scales decay, too: tensors of one dimension.
  bool decay_vectors = true;
};

/// The optimizer's state for one parameter set. With g the gradient, t the number of steps so far:
///
///     w ← w − lr · weight_decay · w
///     m ← β₁·m + (1 − β₁)·g        v ← β₂·v + (1 − β₂)·g²
///     w ← w − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + eps)
///
/// \tparam Parameters such as LocalTransformerParameters<float>
template <typename Parameters>
class AdamW {
 public:
  /// \param zeros a set of the same shapes whose numbers are 0
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit AdamW(const AdamWConfig& config, Parameters zeros)
      : config_(checked(config)), mean_(zeros), square_(std::move(zeros)) {}

  const AdamWConfig& config() const { return config_; }
  /// Steps so far.
  std::uint64_t steps() const { return steps_; }
  /// Running means of the gradients and of their squares.
  const Parameters& mean() const { return mean_; }
  const Parameters& square() const { return square_; }

  /// Goes on from a state that was kept.
  /// \throws std::invalid_argument naming the tensor whose shape does not fit
  void restore(std::uint64_t steps, Parameters mean, Parameters square) {
    detail::require_same_shapes(mean, mean_);
    detail::require_same_shapes(square, square_);
    steps_ = steps;
    mean_ = std::move(mean);
    square_ = std::move(square);
  }

  /// One step.
  /// \param learning_rate a finite number of at least 0
  /// \throws std::invalid_argument naming the argument that does not fit
  void step(Parameters& parameters, const Parameters& gradients, double learning_rate) {
    if (!(learning_rate >= 0) || !std::isfinite(learning_rate))
      reject("learning_rate", "a finite number of at least 0", learning_rate);
    detail::require_same_shapes(parameters, mean_);
    detail::require_same_shapes(gradients, mean_);
    ++steps_;
    const auto t = static_cast<double>(steps_);
    const double correction = 1 - std::pow(config_.beta1, t);
    const double root_correction = std::sqrt(1 - std::pow(config_.beta2, t));
    const auto weights = list_parameters(parameters);
    const auto of_loss = list_parameters(gradients);
    const auto means = list_parameters(mean_);
    const auto squares = list_parameters(square_);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const bool decays = weights[i].is_matrix || config_.decay_vectors;
      update(weights[i].size, of_loss[i].data, means[i].data, squares[i].data, weights[i].data,
             1 - (decays ? learning_rate * config_.weight_decay : 0), learning_rate / correction,
             root_correction);
    }
  }

 private:
  static const AdamWConfig& checked(const AdamWConfig& config) {
    detail::require_probability("beta1", config.beta1);
    detail::require_probability("beta2", config.beta2);
    for (const auto& [name, value] :
         {std::pair{"eps", config.eps}, std::pair{"weight_decay", config.weight_decay}})
      if (!(value >= 0) || !std::isfinite(value))
        reject(name, "a finite number of at least 0", value);
    return config;
  }

  template <typename Scalar>
  void update(Index size, const Scalar* gradient, Scalar* mean, Scalar* square, Scalar* weight,
              double kept, double step_size, double root_correction) const {
    using std::sqrt;
    const Scalar beta1 = Scalar(config_.beta1);
    const Scalar beta2 = Scalar(config_.beta2);
    const Scalar rest1 = Scalar(1 - config_.beta1);
    const Scalar rest2 = Scalar(1 - config_.beta2);
    const Scalar inverse_root = Scalar(1 / root_correction);
    const Scalar eps = Scalar(config_.eps);
    const Scalar keep = Scalar(kept);
    const Scalar rate = Scalar(step_size);
    for (Index i = 0; i < size; ++i) {
      mean[i] = beta1 * mean[i] + rest1 * gradient[i];
      square[i] = beta2 * square[i] + rest2 * gradient[i] * gradient[i];
      const Scalar root = sqrt(square[i]) * inverse_root + eps;
      weight[i] = keep * weight[i] - rate * (mean[i] / root);
    }
  }

  AdamWConfig config_;
  std::uint64_t steps_ = 0;
  Parameters mean_;
  Parameters square_;
};

template <typename Parameters>
AdamW(const AdamWConfig&, Parameters) -> AdamW<Parameters>;

}  // namespace local_mha::inline LOCAL_MHA_ABI
