// SPDX-License-Identifier: MIT
/// \file
/// What a set of weights is: whatever says which tensors it has. This library's sets are, and so is
/// a struct of yours:
///
///     struct Weights {
///       RowMatrix<float> embedding;
///       EncoderParameters<float> encoder;
///       Vector<float> bias;
///
///       static void visit_each(auto& set, auto&& visit) {
///         visit("embedding", set.embedding);
///         visit("encoder", set.encoder);
///         visit("bias", set.bias);
///       }
///     };
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// Takes whatever a set has.
struct AnyVisitor {
  void operator()(std::string_view /*name*/, const auto& /*member*/) const {}
};

}  // namespace detail

/// A struct with `static void visit_each(auto& set, auto&& visit)`, which calls
/// `visit("name", set.member)` for each tensor or set in it, whether `set` is const or not.
template <typename Set>
concept ParameterSet =
    requires(std::remove_const_t<Set>& set, const Set& constant, detail::AnyVisitor visit) {
      Set::visit_each(set, visit);
      Set::visit_each(constant, visit);
    };

namespace detail {

template <typename Member>
inline constexpr bool is_dense =
    std::is_base_of_v<Eigen::PlainObjectBase<std::remove_const_t<Member>>, Member>;
template <typename Member>
inline constexpr bool is_tensor_or_set = is_dense<Member> || ParameterSet<Member>;
template <typename Member>
inline constexpr bool is_tensor_or_set<std::optional<Member>> = is_tensor_or_set<Member>;
template <typename Member>
inline constexpr bool is_tensor_or_set<std::vector<Member>> = is_tensor_or_set<Member>;

/// Visits the tensors of a member: itself, or those of a set, of sets in a vector, or of an
/// optional.
template <typename Member, typename Visitor>
void visit_member(const std::string& name, Member& member, Visitor& visit) {
  using Plain = std::remove_const_t<Member>;
  static_assert(is_tensor_or_set<Plain>,
                "visit: a member is a RowMatrix, a Vector, a Single or a ParameterSet, or a "
                "std::vector or std::optional of them");
  if constexpr (is_dense<Plain>) {
    visit(name, member);
  } else if constexpr (ParameterSet<Plain>) {
    Plain::visit_each(member, [&](std::string_view inner, auto& tensor) {
      visit_member(name.empty() ? std::string(inner) : name + '.' + std::string(inner), tensor,
                   visit);
    });
  } else if constexpr (requires { member.has_value(); }) {
    if (member) visit_member(name, *member, visit);
  } else if constexpr (is_tensor_or_set<Plain>) {
    for (std::size_t i = 0; i < member.size(); ++i)
      visit_member(name + '.' + std::to_string(i), member[i], visit);
  }
}

}  // namespace detail

/// Calls `visit(name, tensor)` for each tensor that a set has: a RowMatrix where it has two
/// dimensions, a Vector where it has one, a Single where none. The names of this library's sets are
/// those of the state dict, in its order; a set in a set puts its own name and a dot before them.
template <ParameterSet Parameters, typename Visitor>
void for_each_parameter(Parameters& parameters, Visitor&& visit) {
  detail::visit_member(std::string(), parameters, visit);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
