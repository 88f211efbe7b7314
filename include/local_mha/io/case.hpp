// SPDX-License-Identifier: MIT
/// \file
/// The metadata of a file with a Python module: which module, and how it was made and called.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include <local_mha/io/json.hpp>
#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/safetensors_writer.hpp>
#include <local_mha/io/tensor_source.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// What `__metadata__["case"]` says, itself a JSON text: `{"kind", "kwargs", "call", "note"}`.
struct Case {
  std::string kind = {};                             ///< the module's name in Python
  nlohmann::json kwargs = nlohmann::json::object();  ///< arguments of its constructor
  nlohmann::json call = nlohmann::json::object();    ///< further arguments of the call
  std::string note = {};                             ///< for people
};

/// Whether a file says its configuration.
inline bool has_case(const TensorSource& source) { return source.metadata().contains("case"); }

/// Of these keys only `kind` must be there; further ones are left to whoever wrote them.
/// \throws SafetensorsError if the file has no such metadata or they are malformed
inline Case read_case(const TensorSource& source) {
  const auto fail = [&](const std::string& problem) {
    throw SafetensorsError(source.file_name(), "", problem);
  };
  if (!has_case(source)) fail("__metadata__: expected the key 'case', got none");
  nlohmann::json parsed;
  const detail::EmptiedJson emptied(parsed);
  try {
    parsed = parse_json(source.metadata().at("case"), "case");
  } catch (const std::invalid_argument& error) {
    fail(error.what());
  }
  if (!parsed.is_object()) fail("case: expected an object, got " + describe(parsed));
  if (!parsed.contains("kind")) fail("case: expected the key 'kind', got none");
  Case result;
  for (const auto& [key, value] : parsed.items()) {
    if (key == "kind" || key == "note") {
      if (!value.is_string()) fail("case: " + key + ": expected a string, got " + describe(value));
      (key == "kind" ? result.kind : result.note) = value.get<std::string>();
    } else if (key == "kwargs" || key == "call") {
      if (!value.is_object()) fail("case: " + key + ": expected an object, got " + describe(value));
      (key == "kwargs" ? result.kwargs : result.call) = value;
    }
  }
  return result;
}

/// Sets the metadata that read_case() reads.
/// \throws std::invalid_argument if a text is not UTF-8
inline void set_case(SafetensorsWriter& writer, const Case& described) {
  try {
    writer.set_metadata("case", "{\"call\":" + described.call.dump() +
                                    ",\"kind\":" + quoted(described.kind) +
                                    ",\"kwargs\":" + described.kwargs.dump() +
                                    ",\"note\":" + quoted(described.note) + "}");
  } catch (const nlohmann::json::exception&) {
    reject("case", "UTF-8", "'", printable(described.note), "'");
  }
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
