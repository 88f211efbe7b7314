// SPDX-License-Identifier: MIT
/// \file
/// Gradient clipping by the norm of all gradients together.
/// R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks",
/// 2013.
#pragma once

#include <cmath>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/training/parameter_list.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// `√Σ g²` over every number of a set. Summed in double.
template <template <typename> class Set, typename Scalar>
double global_norm(const Set<Scalar>& gradients) {
  double squares = 0;
  for (const auto& entry : list_parameters(gradients))
    for (Index i = 0; i < entry.size; ++i) {
      const auto g = static_cast<double>(entry.data[i]);
      squares += g * g;
    }
  return std::sqrt(squares);
}

/// Scales the gradients down to a norm of `max_norm`, if theirs is larger: PyTorch's
/// `clip_grad_norm_`, by `max_norm / (norm + 1e-6)`.
/// \param max_norm positive
/// \return the norm before
/// \throws std::invalid_argument if max_norm is not positive
template <template <typename> class Set, typename Scalar>
double clip_gradients(Set<Scalar>& gradients, double max_norm) {
  if (!(max_norm > 0)) reject("max_norm", "a positive number", max_norm);
  const double norm = global_norm(gradients);
  const double factor = max_norm / (norm + 1e-6);
  if (factor < 1)
    for (const auto& entry : list_parameters(gradients))
      for (Index i = 0; i < entry.size; ++i) entry.data[i] *= Scalar(factor);
  return norm;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
