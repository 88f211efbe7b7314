// SPDX-License-Identifier: MIT
/// \file
/// `config.json` of a model: its members, by name and type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <nlohmann/json.hpp>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/file_bytes.hpp>
#include <local_mha/io/file_kind.hpp>
#include <local_mha/io/json.hpp>
#include <local_mha/io/kwargs.hpp>
#include <local_mha/io/safetensors_error.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// Reads a model's `config.json`, for load_attention().
/// \throws SafetensorsError if the file cannot be read
/// \throws std::invalid_argument naming the file if it holds no JSON
inline nlohmann::json read_model_config(const std::filesystem::path& path) {
  const auto bytes = detail::FileBytes::open(path, FileAccess::read);
  return parse_json(detail::as_text(bytes->bytes()), bytes->name());
}

namespace detail {

/// Members of a JSON object, which must outlive it. One that is null is as one that is not there.
class ModelConfig {
 public:
  /// \param name of the object, for errors
  explicit ModelConfig(const nlohmann::json& object, std::string name = "config")
      : object_(&object), name_(std::move(name)) {
    if (!object.is_object()) reject(name_, "a JSON object", describe(object));
  }

  bool has(std::string_view member) const { return value_of(member) != nullptr; }

  bool is_object(std::string_view member) const {
    const nlohmann::json* value = value_of(member);
    return value != nullptr && value->is_object();
  }
  bool is_array(std::string_view member) const {
    const nlohmann::json* value = value_of(member);
    return value != nullptr && value->is_array();
  }

  /// \tparam Value Index, double, bool or std::string
  template <typename Value>
  std::optional<Value> find(std::string_view member) const {
    const nlohmann::json* value = value_of(member);
    if (value == nullptr) return std::nullopt;
    return converted<Value>(path(member), *value);
  }

  template <typename Value>
  Value get(std::string_view member, Value otherwise) const {
    return find<Value>(member).value_or(std::move(otherwise));
  }

  template <typename Value>
  Value required(std::string_view member) const {
    if (auto value = find<Value>(member)) return *std::move(value);
    reject(path(member), "a value, because the layer needs it", "none");
  }

  /// An integer of at least 1.
  Index size(std::string_view member) const {
    const auto value = required<Index>(member);
    if (value < 1) reject(path(member), "at least 1", value);
    return value;
  }

  ModelConfig object(std::string_view member) const {
    if (const nlohmann::json* value = value_of(member)) return ModelConfig(*value, path(member));
    reject(path(member), "an object", "none");
  }

  /// An element of an array.
  template <typename Value>
  Value element(std::string_view member, Index i) const {
    const nlohmann::json* value = value_of(member);
    if (value == nullptr || !value->is_array())
      reject(path(member), "an array", value == nullptr ? "none" : describe(*value));
    if (i < 0 || static_cast<std::size_t>(i) >= value->size())
      reject(path(member), "an element for layer " + std::to_string(i),
             std::to_string(value->size()) + " elements");
    return converted<Value>(path(member) + '[' + std::to_string(i) + ']',
                            (*value)[static_cast<std::size_t>(i)]);
  }

  /// `config.member`, as errors name it.
  std::string path(std::string_view member) const { return name_ + '.' + std::string(member); }

 private:
  const nlohmann::json* value_of(std::string_view member) const {
    const auto found = object_->find(member);
    return found == object_->end() || found->is_null() ? nullptr : &*found;
  }

  template <typename Value>
  static Value converted(const std::string& path, const nlohmann::json& value) {
    if constexpr (std::is_same_v<Value, bool>) {
      if (!value.is_boolean()) reject(path, "true or false", describe(value));
    } else if constexpr (std::is_same_v<Value, Index>) {
      if (!KeywordArguments::is_index(value)) reject(path, "an integer", describe(value));
    } else if constexpr (std::is_same_v<Value, double>) {
      if (!value.is_number()) reject(path, "a number", describe(value));
    } else {
      if (!value.is_string()) reject(path, "a string", describe(value));
    }
    return value.get<Value>();
  }

  const nlohmann::json* object_;
  std::string name_;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
