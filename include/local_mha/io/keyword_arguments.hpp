// SPDX-License-Identifier: MIT
/// \file
/// Keyword arguments of a Python constructor, as a JSON object, taken one by one.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/json.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

/// Takes arguments out of a JSON object, and rejects what nobody took.
class KeywordArguments {
 public:
  /// \param module the Python module, for errors
  /// \param argument the argument of it that these are members of; empty: none
  KeywordArguments(std::string_view module, const nlohmann::json& kwargs,
                   std::string_view argument = "")
      : module_(module), prefix_(argument), kwargs_(kwargs) {
    if (!kwargs.is_object())
      reject(argument.empty() ? "kwargs" : argument, "a JSON object", describe(kwargs));
    if (!prefix_.empty()) prefix_ += '.';
  }

  /// Null if absent or null.
  const nlohmann::json* find(std::string_view key) {
    known_.emplace_back(key);
    const auto found = kwargs_.find(key);
    return found == kwargs_.end() || found->is_null() ? nullptr : &*found;
  }

  /// Sets `member` unless the argument is absent or null.
  template <typename Member>
  void optional(std::string_view key, Member& member) {
    if (const nlohmann::json* value = find(key))
      convert(prefix_ + std::string(key), *value, member);
  }

  /// One of some words.
  /// \param words pairs of a word and what it means
  template <typename Member, typename Words>
  void choice(std::string_view key, Member& member, const Words& words) {
    const nlohmann::json* value = find(key);
    if (value == nullptr) return;
    std::string all;
    for (const auto& [word, meaning] : words) {
      if (*value == word) {
        member = meaning;
        return;
      }
      all += (all.empty() ? "" : ", ") + std::string(word);
    }
    reject(prefix_ + std::string(key), "one of " + all, describe(*value));
  }

  template <typename Member>
  void required(std::string_view key, Member& member) {
    const nlohmann::json* value = find(key);
    if (value == nullptr)
      reject(key, "a value, because " + module_ + " has no default for it", "none");
    convert(key, *value, member);
  }

  /// An argument that only one value of is supported, which absent or null stands for as well.
  void only(std::string_view key, const nlohmann::json& value, std::string_view reason) {
    const nlohmann::json* given = find(key);
    if (given != nullptr && *given != value)
      reject(key, describe(value) + std::string(reason), describe(*given));
  }

  /// An integer of 64 bits.
  static bool is_index(const nlohmann::json& value) {
    constexpr auto largest = static_cast<std::uint64_t>((std::numeric_limits<std::int64_t>::max)());
    return value.is_number_integer() &&
           !(value.is_number_unsigned() && value.get<std::uint64_t>() > largest);
  }

  void reject_unknown() const {
    for (const auto& [key, value] : kwargs_.items()) {
      bool known = false;
      std::string all;
      for (const std::string& name : known_) {
        known = known || name == key;
        all += (all.empty() ? "" : ", ") + name;
      }
      if (!known)
        reject(prefix_ + printable(key),
               (prefix_.empty() ? "a keyword argument of " : "a member of an argument of ") +
                   module_ + " (" + all + ")",
               describe(value));
    }
  }

 private:
  template <typename Member>
  static void convert(std::string_view key, const nlohmann::json& value,
                      std::optional<Member>& member) {
    convert(key, value, member.emplace());
  }

  static void convert(std::string_view key, const nlohmann::json& value,
                      std::vector<double>& member) {
    if (!value.is_array()) reject(key, "an array of numbers", describe(value));
    for (const nlohmann::json& number : value) convert(key, number, member.emplace_back());
  }

  static void convert(std::string_view key, const nlohmann::json& value, bool& member) {
    if (!value.is_boolean()) reject(key, "true or false", describe(value));
    member = value.get<bool>();
  }

  static void convert(std::string_view key, const nlohmann::json& value, std::int64_t& member) {
    if (!is_index(value)) reject(key, "an integer", describe(value));
    member = value.get<std::int64_t>();
  }

  static void convert(std::string_view key, const nlohmann::json& value, double& member) {
    if (!value.is_number()) reject(key, "a number", describe(value));
    member = value.get<double>();
  }

  std::string module_;
  std::string prefix_;
  const nlohmann::json& kwargs_;
  std::vector<std::string> known_;
};

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
