// SPDX-License-Identifier: MIT
/// \file
/// The tensors of a parameter set as lists of numbers, for what treats all of them alike.
#pragma once

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/parameter_set.hpp>

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

template <typename Set>
struct ScalarOfSet {};
template <typename Set>
  requires requires { typename Set::Scalar; }
struct ScalarOfSet<Set> {
  using type = typename Set::Scalar;
};
template <template <typename> class Set, typename Scalar>
struct ScalarOfSet<Set<Scalar>> {
  using type = Scalar;
};

/// A set whose numbers are of one type that its own says: `Set<Scalar>`, or a member `Scalar`.
template <typename Set>
concept OfOneScalar = requires { typename ScalarOfSet<Set>::type; };

template <typename Scalar, typename Set>
std::vector<ParameterEntry<Scalar>> list_parameters(Set& parameters) {
  std::vector<ParameterEntry<Scalar>> entries;
  for_each_parameter(parameters, [&](const std::string& name, auto& tensor) {
    using Tensor = std::remove_const_t<std::remove_reference_t<decltype(tensor)>>;
    entries.push_back({name, tensor.data(), tensor.size(), Tensor::ColsAtCompileTime != 1});
  });
  return entries;
}

/// Where the tensors of a set lie, of types that another set of its type says.
template <ParameterSet Set>
auto addresses_of(Set& parameters) {
  std::vector<std::conditional_t<std::is_const_v<Set>, const void*, void*>> all;
  for_each_parameter(parameters,
                     [&](const std::string&, auto& tensor) { all.push_back(tensor.data()); });
  return all;
}

}  // namespace detail

/// The tensors of a set, in the order of for_each_parameter(). They stay where they are as long as
/// the set is neither moved nor resized.
/// \tparam Set of one scalar: a template `Set<Scalar>`, or with a member type `Scalar`
template <ParameterSet Set>
  requires detail::OfOneScalar<Set>
auto list_parameters(Set& parameters) {
  return detail::list_parameters<typename detail::ScalarOfSet<Set>::type>(parameters);
}
template <ParameterSet Set>
  requires detail::OfOneScalar<Set>
auto list_parameters(const Set& parameters) {
  return detail::list_parameters<const typename detail::ScalarOfSet<Set>::type>(parameters);
}

/// Sets every number of a set to 0.
template <ParameterSet Set>
void set_zero(Set& parameters) {
  for_each_parameter(parameters, [](const std::string&, auto& tensor) { tensor.setZero(); });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
