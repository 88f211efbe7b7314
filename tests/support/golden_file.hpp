// SPDX-License-Identifier: MIT
/// \file
/// Golden files for the reference: a minimal reader of well-formed files, apart from the library's
/// own, and the options that the Python keyword arguments stand for.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "reference/array.hpp"
#include "reference/transformer.hpp"

namespace golden {

using reference::Array;
using reference::Int;

struct Case {
  std::string name;
  std::string kind;  // LocalMHA, LocalAttention or LocalTransformer
  nlohmann::json kwargs;
  nlohmann::json call;
  nlohmann::json description;  // all that the file says of its case
  std::map<std::string, Array<double>> tensors;

  bool has(const std::string& tensor) const { return tensors.count(tensor) > 0; }
  const Array<double>& at(const std::string& tensor) const { return tensors.at(tensor); }

  /// The tensors below `prefix`, without it.
  reference::Parameters<double> below(const std::string& prefix) const {
    reference::Parameters<double> found;
    for (const auto& [tensor, array] : tensors)
      if (tensor.rfind(prefix, 0) == 0) found[tensor.substr(prefix.size())] = array;
    return found;
  }

  /// 1 = not attended, as the reference takes it; the file has 1 = attend.
  std::vector<unsigned char> masked() const {
    std::vector<unsigned char> flags;
    if (has("input/keep_mask"))
      for (const double keep : at("input/keep_mask").data) flags.push_back(keep == 0);
    return flags;
  }

  Array<Int> tokens() const { return reference::cast<Int>(at("input/tokens")); }
};

inline double half_to_double(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 1023;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return (bits >> 15) ? -magnitude : magnitude;
}

template <typename Stored>
double stored_at(const char* bytes) {
  Stored value;
  std::memcpy(&value, bytes, sizeof value);
  return static_cast<double>(value);
}

inline Case read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (bytes.size() < 8) throw std::runtime_error("cannot read " + path.string());
  std::uint64_t header_size = 0;
  std::memcpy(&header_size, bytes.data(), 8);
  const auto header = nlohmann::json::parse(bytes.substr(8, header_size));
  const char* const data = bytes.data() + 8 + header_size;

  Case result;
  result.name = path.stem().string();
  if (header.value("__metadata__", nlohmann::json::object()).contains("case")) {
    const auto described = nlohmann::json::parse(header["__metadata__"]["case"].get<std::string>());
    result.description = described;
    result.kind = described["kind"];
    result.kwargs = described.value("kwargs", nlohmann::json::object());
    result.call = described.value("call", nlohmann::json::object());
  }
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    Array<double> array(entry["shape"].get<std::vector<Int>>());
    const std::string type = entry["dtype"];
    const char* at = data + entry["data_offsets"][0].get<std::size_t>();
    for (double& value : array.data) {
      if (type == "F64") {
        value = stored_at<double>(at), at += 8;
      } else if (type == "F32") {
        value = stored_at<float>(at), at += 4;
      } else if (type == "F16") {
        std::uint16_t half;
        std::memcpy(&half, at, 2);
        value = half_to_double(half), at += 2;
      } else if (type == "I64") {
        value = stored_at<std::int64_t>(at), at += 8;
      } else if (type == "U8") {
        value = stored_at<std::uint8_t>(at), at += 1;
      } else {
        throw std::runtime_error(path.string() + ": unexpected type " + type);
      }
    }
    result.tensors[name] = std::move(array);
  }
  return result;
}

/// Every golden file, by name.
inline std::vector<std::filesystem::path> files(const std::filesystem::path& directory) {
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(directory))
    if (entry.path().extension() == ".safetensors") paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  return paths;
}

namespace detail {

template <typename T>
T argument(const nlohmann::json& kwargs, const char* name, T otherwise) {
  return kwargs.contains(name) && !kwargs[name].is_null() ? kwargs[name].get<T>() : otherwise;
}

/// What LocalMHA and LocalAttention have in common; `window` is the name of the window's argument.
inline reference::AttentionOptions attention(const nlohmann::json& kwargs, const char* window) {
  reference::AttentionOptions o;
  o.window_size = kwargs.at(window).get<Int>();
  o.causal = argument(kwargs, "causal", false);
  o.look_backward = argument<Int>(kwargs, "look_backward", 1);
  o.look_forward = argument<Int>(kwargs, "look_forward", o.causal ? 0 : 1);
  o.xpos = argument(kwargs, "use_xpos", false);
  // The Python default, whatever its documentation says.
  o.xpos_scale_base = argument(kwargs, "xpos_scale_base", static_cast<double>(o.window_size / 2));
  return o;
}

}  // namespace detail

inline reference::AttentionOptions attention_options(const Case& c) {
  reference::AttentionOptions o = detail::attention(c.kwargs, "window_size");
  o.exact_windowsize = detail::argument(c.kwargs, "exact_windowsize", false);
  o.rotary = c.kwargs.contains("dim") && !c.kwargs["dim"].is_null() &&
             detail::argument(c.kwargs, "use_rotary_pos_emb", true);
  o.shared_qk = detail::argument(c.kwargs, "shared_qk", false);
  if (c.kwargs.contains("scale") && !c.kwargs["scale"].is_null())
    o.scale = c.kwargs["scale"].get<double>();
  o.window_size = detail::argument(c.call, "window_size", o.window_size);
  return o;
}

inline reference::LayerOptions layer_options(const nlohmann::json& kwargs,
                                             const char* window = "window_size") {
  reference::LayerOptions o;
  o.dim = kwargs.at("dim").get<Int>();
  o.heads = detail::argument<Int>(kwargs, "heads", 8);
  o.dim_head = detail::argument<Int>(kwargs, "dim_head", 64);
  o.prenorm = detail::argument(kwargs, "prenorm", false);
  if (detail::argument(kwargs, "qk_rmsnorm", false)) o.qk_norm = reference::QkNorm::L2;
  o.qk_scale = detail::argument(kwargs, "qk_scale", 8.0);
  o.gate_values_per_head = detail::argument(kwargs, "gate_values_per_head", false);
  o.attention = detail::attention(kwargs, window);
  o.attention.exact_windowsize = detail::argument(kwargs, "exact_windowsize", true);
  o.attention.rotary = detail::argument(kwargs, "use_rotary_pos_emb", true);
  return o;
}

/// Also of an encoder, which is a LocalTransformer without tokens.
inline reference::TransformerOptions transformer_options(const Case& c) {
  nlohmann::json kwargs = c.kwargs;
  kwargs["prenorm"] = true;
  kwargs["causal"] = detail::argument(c.kwargs, "causal", true);
  reference::TransformerOptions o;
  o.depth = kwargs.at("depth").get<Int>();
  o.use_dynamic_pos_bias = detail::argument(kwargs, "use_dynamic_pos_bias", false);
  kwargs["use_rotary_pos_emb"] = !o.use_dynamic_pos_bias;
  o.layer = layer_options(kwargs, "local_attn_window_size");
  o.streams = detail::argument<Int>(kwargs, "num_residual_streams", 4);
  return o;
}

/// Of a ModuleList of pairs.
inline reference::EncoderOptions stack_options(const Case& c) {
  reference::EncoderOptions o;
  o.depth = c.kwargs.at("depth").get<Int>();
  o.layer = layer_options(c.kwargs);
  o.branch = "";
  return o;
}

}  // namespace golden
