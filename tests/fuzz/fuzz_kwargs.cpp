// SPDX-License-Identifier: MIT
// Any text as the keyword arguments of each of the Python modules. What is wrong with it must come
// as std::invalid_argument and nothing else; a configuration must come back from what it is
// written as.
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string_view>

#include <nlohmann/json.hpp>

#include <local_mha/io/kwargs.hpp>

#include "fuzz/fuzz_target.hpp"

namespace {

using namespace local_mha;
using namespace local_mha::io;

template <typename Config>
void read_and_write(const nlohmann::json& kwargs, Config (*read)(const nlohmann::json&)) {
  std::optional<Config> config;
  try {
    config = read(kwargs);
  } catch (const std::invalid_argument& error) {
    const std::string_view message = error.what();
    fuzz::require(message.find(": expected ") != std::string_view::npos, "an expectation");
    fuzz::require(message.find(", got ") != std::string_view::npos, "what came");
    fuzz::require(message.size() < 2000, "a readable error");
  }
  if (!config) return;
  const nlohmann::json written = to_kwargs(*config);
  const Config again = read(parse_json(written.dump(), "kwargs"));
  fuzz::require(to_kwargs(again) == written, "the configuration comes back");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text =
      size > 0 ? std::string_view(reinterpret_cast<const char*>(data), size) : std::string_view();
  nlohmann::json kwargs;
  try {
    kwargs = parse_json(text, "kwargs");
  } catch (const std::invalid_argument&) {
    return 0;
  }
  read_and_write(kwargs, local_attention_config);
  read_and_write(kwargs, local_mha_config);
  read_and_write(kwargs, local_transformer_config);
  return 0;
}
