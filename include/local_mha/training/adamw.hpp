// SPDX-License-Identifier: MIT
/// \file
/// AdamW: Adam with decoupled weight decay.
/// I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/parameter_set.hpp>
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
/// m, v and w are kept in the weights' scalar and each is rounded once a step, for a step's
/// arithmetic is a LongSum's: `1 − lr · weight_decay` has no digits left in float. A mean forgets,
/// so that roundings do not pile up: m and v are `ε / (1 − β)` off at most.
///
/// \tparam Parameters such as LocalTransformerParameters<float>, or a struct of yours
template <ParameterSet Parameters>
class AdamW {
 public:
  /// Starts with moments of 0.
  /// \param like a set of the shapes of the weights, such as the weights themselves
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit AdamW(const AdamWConfig& config, Parameters like)
      : config_(checked(config)), mean_(std::move(like)) {
    for_each_parameter(mean_, [](const std::string&, auto& tensor) { tensor.setZero(); });
    square_ = mean_;
  }

  /// What it was made with.
  const AdamWConfig& config() const { return config_; }
  /// Steps so far.
  std::uint64_t steps() const { return steps_; }
  /// Running means of the gradients and of their squares.
  const Parameters& mean() const { return mean_; }
  /// Mean squares of the gradients, the second moment.
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
    const auto t = static_cast<double>(steps_ + 1);
    const double correction = 1 - std::pow(config_.beta1, t);
    const double root_correction = std::sqrt(1 - std::pow(config_.beta2, t));
    // All memory is taken before a number changes.
    std::vector<Weight> weights;
    for_each_parameter(parameters, [&](const std::string&, auto& tensor) {
      using Plain = std::remove_reference_t<decltype(tensor)>;
      weights.push_back({tensor.size(), Plain::ColsAtCompileTime != 1 || config_.decay_vectors,
                         tensor.data(), &AdamW::template update<typename Plain::Scalar>});
    });
    const auto of_loss = detail::addresses_of(gradients);
    const auto means = detail::addresses_of(mean_);
    const auto squares = detail::addresses_of(square_);
    ++steps_;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const Weight& weight = weights[i];
      (this->*weight.update)(weight, of_loss[i], means[i], squares[i],
                             1 - (weight.decays ? learning_rate * config_.weight_decay : 0),
                             learning_rate / correction, root_correction);
    }
  }

 private:
  // A tensor, and what updates numbers of its type.
  struct Weight {
    Index size;
    bool decays;
    void* data;
    void (AdamW::*update)(const Weight&, const void* gradient, void* mean, void* square,
                          double kept, double step_size, double root_correction) const;
  };

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
  void update(const Weight& of, const void* of_loss, void* means, void* squares, double kept,
              double step_size, double root_correction) const {
    using std::sqrt;
    auto* const weight = static_cast<Scalar*>(of.data);
    const auto* const gradient = static_cast<const Scalar*>(of_loss);
    auto* const mean = static_cast<Scalar*>(means);
    auto* const square = static_cast<Scalar*>(squares);
    using Sum = LongSum<Scalar>;
    const Sum beta1 = Sum(config_.beta1), rest1 = Sum(1 - config_.beta1);
    const Sum beta2 = Sum(config_.beta2), rest2 = Sum(1 - config_.beta2);
    const Sum inverse_root = Sum(1 / root_correction);
    const Sum eps = Sum(config_.eps);
    const Sum keep = Sum(kept);
    const Sum rate = Sum(step_size);
    for (Index i = 0; i < of.size; ++i) {
      const Sum g = Sum(gradient[i]);
      const Sum m = beta1 * Sum(mean[i]) + rest1 * g;
      const Sum v = beta2 * Sum(square[i]) + rest2 * g * g;
      mean[i] = Scalar(m);
      square[i] = Scalar(v);
      weight[i] = Scalar(keep * Sum(weight[i]) - rate * (m / (sqrt(v) * inverse_root + eps)));
    }
  }

  AdamWConfig config_;
  std::uint64_t steps_ = 0;
  Parameters mean_;
  Parameters square_;
};

template <ParameterSet Parameters>
AdamW(const AdamWConfig&, Parameters) -> AdamW<Parameters>;

}  // namespace local_mha::inline LOCAL_MHA_ABI
