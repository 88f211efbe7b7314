// SPDX-License-Identifier: MIT
/// \file
/// What stands before the names of a module's tensors, found where nobody says it.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <set>
#include <string>
#include <string_view>

#include <local_mha/core/namespace.hpp>
#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/tensor_names.hpp>
#include <local_mha/io/tensor_source.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io::detail {

/// What holds a whole model as its member puts these before all of its names: running averages of
/// weights (`EMA` of ema-pytorch holds the model that is trained, too), and checkpoints.
inline constexpr std::array<std::string_view, 4> holders{"ema_model.", "online_model.", "ema.",
                                                         "state_dict."};

/// `param/` if the source has tensors with that prefix, else none.
inline std::string prefix_of(const TensorSource& source, const std::optional<std::string>& prefix) {
  constexpr std::string_view usual = "param/";
  if (prefix) return *prefix;
  const auto first = source.entries().lower_bound(usual);
  return std::string(first != source.entries().end() && first->first.starts_with(usual) ? usual
                                                                                        : "");
}

/// The prefix of a module's tensors: the one that is asked for, if there is any tensor of the
/// module behind it; else the only sequence of holders before it that leads to some. Wrappers may
/// stand anywhere.
/// \param begins names behind the prefix, or what they begin with, of which a module has some
/// \throws SafetensorsError if there are several such sequences
inline std::string find_prefix(const TensorSource& source, const std::string& prefix,
                               std::initializer_list<std::string_view> begins) {
  const std::string wanted = without_wrappers(prefix);
  const auto is_of_module = [&](std::string_view name) {
    return name.starts_with(wanted) && std::ranges::any_of(begins, [&](std::string_view begin) {
             return name.substr(wanted.size()).starts_with(begin);
           });
  };
  std::set<std::string> found;
  for (const auto& named : source.entries()) {
    const std::string name = without_wrappers(named.first);
    std::string_view rest = name;
    while (!is_of_module(rest)) {
      const auto* const holder = std::ranges::find_if(
          holders, [&](std::string_view begin) { return rest.starts_with(begin); });
      if (holder == holders.end()) break;
      rest.remove_prefix(holder->size());
    }
    if (!is_of_module(rest)) continue;
    if (rest.size() == name.size()) return prefix;
    found.insert(name.substr(0, name.size() - rest.size()));
  }
  if (found.size() > 1)
    throw SafetensorsError(source.file_name(), "",
                           "expected one module, or a prefix that says which, got them at '" +
                               printable(*found.begin() + wanted) + "' and '" +
                               printable(*found.rbegin() + wanted) + "'");
  return found.empty() ? prefix : *found.begin() + wanted;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io::detail
