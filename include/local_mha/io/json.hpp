// SPDX-License-Identifier: MIT
/// \file
/// JSON from an untrusted text.
#pragma once

#include <cstddef>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/core/error.hpp>
#include <local_mha/io/safetensors_error.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// Parses a text strictly: one JSON value, at most 32 levels deep (copying a value recurses), no
/// key twice in an object (nlohmann's parser would keep the last), nothing behind it.
/// \param argument what the text is, for errors
/// \throws std::invalid_argument naming `argument` and the byte
inline nlohmann::json parse_json(std::string_view text, std::string_view argument) {
  constexpr int deepest = 32;
  // nlohmann's parser takes a null byte for the end of its input.
  if (const std::size_t null = text.find('\0'); null != std::string_view::npos)
    reject(argument, "JSON", "a null byte at byte ", null);

  std::vector<std::set<std::string>> keys;  // of the objects and arrays that are open
  const auto check = [&](int depth, nlohmann::json::parse_event_t event,
                         const nlohmann::json& value) {
    using Event = nlohmann::json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      if (depth >= deepest)
        reject(argument, "JSON of at most " + std::to_string(deepest) + " levels", "more");
      keys.emplace_back();
    } else if (event == Event::object_end || event == Event::array_end) {
      keys.pop_back();
    } else if (event == Event::key) {
      const auto& key = value.get_ref<const std::string&>();
      if (!keys.back().insert(key).second)
        reject(argument, "JSON with distinct keys", "'", printable(key), "' twice");
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), check);
  } catch (const nlohmann::json::exception& error) {
    reject(argument, "JSON", printable(error.what(), 300));
  }
}

/// A text as JSON, in quotes.
/// \throws nlohmann::json::exception if it is not UTF-8
inline std::string quoted(const std::string& text) { return nlohmann::json(text).dump(); }

namespace detail {

/// Empties a value when it goes out of scope. The destructor of nlohmann's objects and arrays that
/// are not empty takes memory, and ends the process where there is none.
class EmptiedJson {
 public:
  explicit EmptiedJson(nlohmann::json& value) : value_(value) {}
  EmptiedJson(const EmptiedJson&) = delete;
  EmptiedJson& operator=(const EmptiedJson&) = delete;
  ~EmptiedJson() { empty(value_); }

 private:
  // The iterators of structured values throw nothing.
  // NOLINTNEXTLINE(bugprone-exception-escape)
  static void empty(nlohmann::json& value) noexcept {
    if (!value.is_structured()) return;
    for (nlohmann::json& element : value) empty(element);
    value.clear();
  }

  nlohmann::json& value_;
};

}  // namespace detail

/// A value as an error message shows it: containers by their type, the rest as it is, shortened.
inline std::string describe(const nlohmann::json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array";
  return printable(value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
