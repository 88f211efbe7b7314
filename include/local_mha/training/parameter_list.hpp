// SPDX-License-Identifier: MIT
/// \file
/// The tensors of a parameter set as lists of numbers, for what treats all of them alike.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// One tensor of a parameter set.
/// \tparam Scalar const if the set is
template <typename Scalar>
struct ParameterEntry {
  std::string name;
  Scalar* data;
  Index size;
  bool is_matrix;  ///< two dimensions: a weight, not a bias or scale
};

namespace detail {

template <typename Scalar, typename Parameters>
std::vector<ParameterEntry<Scalar>> list_parameters(Parameters& parameters) {
  std::vector<ParameterEntry<Scalar>> entries;
  for_each_parameter(parameters, [&](const std::string& name, auto& tensor) {
    using Tensor = std::remove_const_t<std::remove_reference_t<decltype(tensor)>>;
    entries.push_back({name, tensor.data(), tensor.size(), Tensor::ColsAtCompileTime != 1});
  });
  return entries;
}

}  // namespace detail

/// The tensors of a set, in the order of for_each_parameter(). They stay where they are as long as
/// the set is neither moved nor resized.
template <template <typename> class Set, typename Scalar>
std::vector<ParameterEntry<Scalar>> list_parameters(Set<Scalar>& parameters) {
  return detail::list_parameters<Scalar>(parameters);
}
template <template <typename> class Set, typename Scalar>
std::vector<ParameterEntry<const Scalar>> list_parameters(const Set<Scalar>& parameters) {
  return detail::list_parameters<const Scalar>(parameters);
}

/// Sets every number of a set to 0.
template <template <typename> class Set, typename Scalar>
void set_zero(Set<Scalar>& parameters) {
  for_each_parameter(parameters, [](const std::string&, auto& tensor) { tensor.setZero(); });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
