// SPDX-License-Identifier: MIT
/// \file
/// Names of tensors in state dicts, and what tools make of them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <string_view>

#include <local_mha/core/namespace.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

/// Modules that wrap another one put these before its names: torch.compile, DataParallel and
/// DistributedDataParallel, FSDP, checkpointed activations, Fabric, Opacus, fairscale.
inline constexpr std::array<std::string_view, 7> wrappers{
    "_orig_mod.",       "module.",  "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.",
    "_forward_module.", "_module.", "_fpw_module."};

/// The name that a tensor has without wrappers around its module or a module of that.
inline std::string without_wrappers(std::string_view name) {
  std::string result;
  while (!name.empty()) {
    const auto* const wrapper = std::ranges::find_if(
        wrappers, [&](std::string_view begin) { return name.starts_with(begin); });
    if (wrapper != wrappers.end()) {
      name.remove_prefix(wrapper->size());
      continue;
    }
    const std::string_view part = name.substr(0, name.find_first_of("./"));
    const std::size_t size = (std::min)(part.size() + 1, name.size());
    result += name.substr(0, size);
    name.remove_prefix(size);
  }
  return result;
}

/// The part that `name` has more than `wanted`, with its dot, as another wrapper would leave it;
/// empty if that is not what tells them apart.
inline std::string_view part_more(std::string_view name, std::string_view wanted) {
  for (std::size_t begin = 0; begin < name.size();) {
    const std::size_t end = name.find('.', begin);
    if (end == name.npos) break;
    const std::string_view part = name.substr(begin, end + 1 - begin);
    if (name.size() - part.size() == wanted.size() && wanted.starts_with(name.substr(0, begin)) &&
        wanted.substr(begin) == name.substr(end + 1))
      return part;
    begin = end + 1;
  }
  return {};
}

/// Whether it is a weight of hyper-connections alone.
inline bool is_of_connection(std::string_view name) {
  return std::ranges::any_of(std::array{"static_alpha", "static_beta", "dynamic_alpha"},
                             [&](const char* part) { return name.find(part) != name.npos; });
}

/// What to do about a tensor that some tool has made of the module's own; empty for others.
inline std::string_view remedy(std::string_view name) {
  struct Remedy {
    std::string_view part;
    std::string_view text;
  };
  static constexpr std::string_view adapters =
      "; adapters are not supported, merge them into the weights first (as peft's "
      "merge_and_unload() does)";
  static constexpr std::string_view norm =
      "; weight normalization is not supported, remove it first (remove_weight_norm() or "
      "remove_parametrizations() of PyTorch)";
  static constexpr std::string_view streams =
      "; it is of hyper-connections, which a module with num_residual_streams > 1 has";
  static constexpr std::array remedies{
      Remedy{"lora_", adapters}, Remedy{"base_layer.", adapters},  Remedy{"weight_g", norm},
      Remedy{"weight_v", norm},  Remedy{"parametrizations", norm},
  };
  if (is_of_connection(name)) return streams;
  for (const auto& [part, text] : remedies)
    if (name.find(part) != std::string_view::npos) return text;
  return "";
}

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
