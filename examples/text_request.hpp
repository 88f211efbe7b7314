// SPDX-License-Identifier: MIT
/// \file
/// What somebody asks a language model for, as a line of JSON.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/core/error.hpp>
#include <local_mha/core/index.hpp>

namespace local_mha::examples {

/// `{"prompt": "ROMEO:", "length": 100, "seed": 0, "temperature": 0.8}`
struct TextRequest {
  std::vector<std::int64_t> prompt;  ///< its bytes, at least one
  Index length = 100;                ///< bytes to make
  std::uint64_t seed = 0;
  double temperature = 0.8;
};

/// What a stranger sent, for a message: the beginning, on one line of printable characters.
inline std::string shown(const nlohmann::json& value) {
  constexpr auto escaped = nlohmann::json::error_handler_t::replace;
  const std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, escaped);
  return text.size() <= 80 ? text : text.substr(0, 80) + "…";
}

/// \param longest bytes of a prompt
/// \param num_tokens which bytes a prompt may have: those below
/// \throws std::invalid_argument naming what is wrong with the line
inline TextRequest read_text_request(std::string_view line, Index longest, Index num_tokens) {
  const auto json = nlohmann::json::parse(line, nullptr, false);
  if (!json.is_object() || !json.contains("prompt") || !json["prompt"].is_string())
    reject("request", R"(a line such as {"prompt": "ROMEO:", "length": 100})",
           shown(std::string(line.substr(0, 70))));
  TextRequest request;
  const auto read = [&](std::string_view name, auto& number, auto least, auto most) {
    const auto found = json.find(name);
    if (found == json.end()) return;
    const auto text = [](auto bound) { return std::to_string(static_cast<std::uint64_t>(bound)); };
    constexpr bool whole = std::is_integral_v<decltype(most)>;
    const bool is_number = whole ? found->is_number_unsigned() : found->is_number();
    if (!is_number || *found < least || *found > most)
      reject(name, (whole ? "a whole number of " : "") + text(least) + " to " + text(most),
             found->is_structured() ? std::string(found->type_name()) : shown(*found));
    number = found->template get<decltype(most)>();
  };
  for (const auto& [name, value] : json.items())
    if (name != "prompt" && name != "length" && name != "seed" && name != "temperature")
      reject("request", "prompt, length, seed or temperature", shown(name));
  read("length", request.length, 1U, 10'000U);
  read("seed", request.seed, 0U, 4'294'967'295U);
  read("temperature", request.temperature, 0.0, 100.0);
  const auto& prompt = json["prompt"].get_ref<const std::string&>();
  if (prompt.empty() || static_cast<Index>(prompt.size()) > longest)
    reject("prompt", "1 to " + std::to_string(longest) + " bytes", prompt.size());
  for (const char c : prompt) {
    const Index byte = static_cast<unsigned char>(c);
    if (byte >= num_tokens) reject("prompt", "bytes below " + std::to_string(num_tokens), byte);
    request.prompt.push_back(byte);
  }
  return request;
}

}  // namespace local_mha::examples
