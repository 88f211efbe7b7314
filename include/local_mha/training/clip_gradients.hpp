// SPDX-License-Identifier: MIT
/// \file
/// Gradient clipping by the norm of all gradients together.
/// R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks",
/// 2013.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/parameter_set.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// `√Σ g²` over every number of a set: a double, in which squares of float numbers neither overflow
/// nor vanish. Not finite only if a number is not, or the norm itself is too large for a double.
template <ParameterSet Set>
double global_norm(const Set& gradients) {
  const auto over_all = [&](auto&& take) {
    for_each_parameter(gradients, [&](const std::string&, const auto& tensor) {
      for (Index i = 0; i < tensor.size(); ++i) take(static_cast<double>(tensor.data()[i]));
    });
  };
  const auto sum_squares = [&](double factor) {
    double sum = 0;
    over_all([&](double g) { sum += (factor * g) * (factor * g); });
    return sum;
  };
  const double squares = sum_squares(1);
  if (std::isfinite(squares) && squares > 1e-270) return std::sqrt(squares);
  // Squares of double numbers beyond 1e154 overflow, and those below 1e-154 vanish.
  double largest = 0;
  over_all([&](double g) { largest = std::isnan(g) ? g : (std::max)(largest, std::abs(g)); });
  if (!(largest > 0) || !std::isfinite(largest)) return largest == 0 ? 0 : squares;
  const int exponent = std::ilogb(largest);
  return std::ldexp(std::sqrt(sum_squares(std::ldexp(1.0, std::clamp(-exponent, -1022, 1022)))),
                    std::clamp(exponent, -1022, 1022));
}

/// Scales the gradients down to a norm of `max_norm`, if theirs is larger: PyTorch's
/// `clip_grad_norm_`, by `max_norm / (norm + 1e-6)`. If a gradient is NaN or infinite, so is the
/// norm, and all of them stay as they are, where PyTorch makes NaN or 0 of them: such a step is
/// better left out.
/// \param max_norm positive
/// \return the norm before
/// \throws std::invalid_argument if max_norm is not positive
template <ParameterSet Set>
double clip_gradients(Set& gradients, double max_norm) {
  if (!(max_norm > 0)) reject("max_norm", "a positive number", max_norm);
  const double norm = global_norm(gradients);
  const double factor = max_norm / (norm + 1e-6);
  if (!std::isfinite(norm) || !(factor < 1)) return norm;
  // All memory is taken before a number changes.
  struct Tensor {
    void* data;
    Index size;
    void (*scale)(const Tensor&, double);
  };
  std::vector<Tensor> tensors;
  for_each_parameter(gradients, [&](const std::string&, auto& tensor) {
    using Scalar = typename std::remove_reference_t<decltype(tensor)>::Scalar;
    tensors.push_back({tensor.data(), tensor.size(), [](const Tensor& of, double by) {
                         auto* const numbers = static_cast<Scalar*>(of.data);
                         for (Index i = 0; i < of.size; ++i)
                           numbers[i] = Scalar(static_cast<double>(numbers[i]) * by);
                       }});
  });
  for (const Tensor& tensor : tensors) tensor.scale(tensor, factor);
  return norm;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
