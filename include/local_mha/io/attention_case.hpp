// SPDX-License-Identifier: MIT
/// \file
/// Files with the attention layer of a published model and what it computes, as
/// `examples/export_layer.py` writes them.
///
/// The metadata entry `case` says `family` (the model_type), `config` (its `config.json`) and
/// `layer` (its number); weights are `param/…`. `input/inv_freq` and `rotary_scale` are what the
/// model gave its layer for the rotary embedding, and count more than what the configuration says.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/config.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/attention_layers.hpp>
#include <local_mha/io/case.hpp>
#include <local_mha/io/json.hpp>
#include <local_mha/io/longformer_layers.hpp>
#include <local_mha/io/model_config.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/safetensors_error.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

/// The metadata entry; an empty object if there is none.
inline void parse_case(const TensorSource& source, nlohmann::json& parsed) {
  const auto found = source.metadata().find("case");
  parsed = found == source.metadata().end() ? nlohmann::json::object()
                                            : parse_json(found->second, "case");
  if (!parsed.is_object()) reject("case", "an object", describe(parsed));
}

}  // namespace detail

/// The `model_type` of which the file holds a layer; empty: of none.
/// \throws std::invalid_argument if its metadata are malformed
inline std::string family_of_case(const TensorSource& source) {
  nlohmann::json described;
  const detail::EmptiedJson emptied(described);
  detail::parse_case(source, described);
  return detail::ModelConfig(described, "case").get<std::string>("family", "");
}

namespace detail {

/// Calls `read(config, case)` with the configuration, which has the family's name, and the case.
template <typename Read>
auto read_layer_case(const TensorSource& source, const Read& read) {
  try {
    nlohmann::json described;
    nlohmann::json config;
    const EmptiedJson emptied(described);
    const EmptiedJson emptied_config(config);
    parse_case(source, described);
    const ModelConfig members(described, "case");
    config = described.value("config", nlohmann::json());
    if (!config.is_object()) reject("case.config", "a JSON object", describe(config));
    config["model_type"] = members.required<std::string>("family");
    return read(config, members);
  } catch (const std::invalid_argument& error) {
    throw SafetensorsError(source.file_name(), "", error.what());
  }
}

}  // namespace detail

/// The layer of such a file, whose weights are at the prefix `param/`.
/// \throws SafetensorsError naming what is missing or malformed, see attention_layer()
inline AttentionLayer read_attention_case(const TensorSource& source) {
  return detail::read_layer_case(
      source, [&](const nlohmann::json& config, const detail::ModelConfig& described) {
        AttentionLayer layer =
            attention_layer(source, "param/", config, described.get<Index>("layer", 0));
        RotaryConfig& rotary = layer.config.rotary;
        if (layer.config.use_rotary_pos_emb && source.contains("input/inv_freq")) {
          rotary.inv_freq = source.read<double>("input/inv_freq");
          rotary.rotary_dim = 2 * static_cast<Index>(rotary.inv_freq.size());
          rotary.factor = described.get("rotary_scale", rotary.factor);
        }
        validate(layer.config);
        return layer;
      });
}

/// The same of a Longformer's layer.
/// \throws SafetensorsError naming what is missing or malformed, see longformer_layer()
inline LongformerLayer read_longformer_case(const TensorSource& source) {
  return detail::read_layer_case(
      source, [](const nlohmann::json& config, const detail::ModelConfig& described) {
        return longformer_layer(config, described.get<Index>("layer", 0));
      });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
