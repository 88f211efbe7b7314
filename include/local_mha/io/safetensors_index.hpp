// SPDX-License-Identifier: MIT
/// \file
/// Models in several files: the index `model.safetensors.index.json`, which says what is where.
#pragma once

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/io/file_bytes.hpp>
#include <local_mha/io/file_kind.hpp>
#include <local_mha/io/json.hpp>
#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/safetensors_header.hpp>
#include <local_mha/io/system_file.hpp>
#include <local_mha/io/tensor_names.hpp>
#include <local_mha/io/tensor_source.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io::detail {

/// What the index says: in which file a tensor is, and metadata, of which texts are kept.
struct SafetensorsIndex {
  std::map<std::string, std::string> weight_map;
  std::map<std::string, std::string> metadata;
};

/// \throws SafetensorsError if it is malformed, or a file is named that is not below its folder
inline SafetensorsIndex parse_index(const FileBytes& bytes) {
  const auto fail = [&](const std::string& tensor, const std::string& problem) {
    throw SafetensorsError(bytes.name(), tensor, problem);
  };
  if (bytes.bytes().size() > max_header_size)
    fail("", "index: expected at most " + std::to_string(max_header_size) + " bytes, got " +
                 std::to_string(bytes.bytes().size()));
  nlohmann::json parsed;
  const EmptiedJson emptied(parsed);
  try {
    parsed = parse_json(as_text(bytes.bytes()), "index");
  } catch (const std::invalid_argument& error) {
    fail("", error.what());
  }
  const auto weight_map = parsed.find("weight_map");
  if (weight_map == parsed.end())
    fail("",
         "expected a safetensors file, or an index of several with the key 'weight_map', got "
         "other JSON");
  if (!weight_map->is_object())
    fail("", "index: weight_map: expected an object, got " + describe(*weight_map));
  SafetensorsIndex index;
  for (const auto& [tensor, file] : weight_map->items()) {
    if (!file.is_string()) fail(tensor, "index: expected a file's name, got " + describe(file));
    const auto& name = file.get_ref<const std::string&>();
    const std::filesystem::path path = path_of(name);
    bool is_below =
        path.has_filename() && !path.has_root_path() && name.find('\0') == std::string::npos;
    for (const auto& part : path) is_below = is_below && part != "..";
    // One name for a file, or it would be opened for each.
    if (!is_below || path.lexically_normal().native() != path.native())
      fail(tensor,
           "index: expected the name of a file beside the index, got '" + printable(name) + "'");
    index.weight_map.emplace(tensor, name);
  }
  if (const auto metadata = parsed.find("metadata");
      metadata != parsed.end() && metadata->is_object())
    for (const auto& [key, text] : metadata->items())
      if (text.is_string()) index.metadata.emplace(key, text.get<std::string>());
  return index;
}

/// Whether a tensor is one of those that are asked for, wrapped or not.
inline bool is_wanted(std::string_view name, const std::vector<std::string>& prefixes) {
  return prefixes.empty() || std::ranges::any_of(prefixes, [&](const std::string& prefix) {
           return name.starts_with(prefix) ||
                  without_wrappers(name).starts_with(without_wrappers(prefix));
         });
}

/// Opens the files that an index names.
/// \param path of the index
/// \param prefixes of the tensors whose files are opened; none: all
/// \throws SafetensorsError if one of them cannot be opened or is malformed, they do not hold what
///   the index says, or it has no tensor with one of the prefixes
inline TensorContent open_index(const std::filesystem::path& path, const FileBytes& bytes,
                                FileAccess access, const std::vector<std::string>& prefixes) {
  SafetensorsIndex index = parse_index(bytes);
  for (const std::string& prefix : prefixes)
    if (std::ranges::none_of(index.weight_map,
                             [&](const auto& named) { return is_wanted(named.first, {prefix}); }))
      throw SafetensorsError(bytes.name(), prefix,
                             "expected it, or names that begin so, in the index, got none");
  TensorContent content{bytes.name(), {}, {std::move(index.metadata), {}}};
  std::set<std::string> names;
  for (const auto& [tensor, name] : index.weight_map)
    if (is_wanted(tensor, prefixes)) names.insert(name);
  for (const std::string& name : names) {
    const auto& file =
        content.files.emplace_back(FileBytes::open(path.parent_path() / path_of(name), access));
    SafetensorsHeader header = parse_header(file->name(), file->bytes());
    content.header.metadata.merge(header.metadata);
    for (auto& [tensor, entry] : header.tensors) {
      const auto place = index.weight_map.find(tensor);
      if (place != index.weight_map.end() && place->second != name) continue;
      const auto [other, is_new] = content.header.tensors.emplace(tensor, std::move(entry));
      if (!is_new)
        throw SafetensorsError(
            content.name, tensor,
            "expected it in one file, or the index to say in which, got it in '" +
                printable(other->second.file) + "' and '" + printable(file->name()) + "'");
    }
  }
  for (const auto& [tensor, name] : index.weight_map)
    if (!names.contains(name))
      content.elsewhere.emplace(tensor, name);
    else if (!content.header.tensors.contains(tensor))
      throw SafetensorsError(content.name, tensor,
                             "expected it in '" + printable(name) + "', got no such tensor there");
  return content;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io::detail
