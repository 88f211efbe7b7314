// SPDX-License-Identifier: MIT
/// \file
/// Longformer's attention layers, by name.
///
///     io::SafetensorsFile file("model.safetensors");
///     const auto config = io::read_model_config("config.json");
///     auto layer = io::load_longformer<float>(
///         file, "longformer.encoder.layer.0.attention.self", config);
///     auto y = layer.forward(x, global_rows);
#pragma once

#include <array>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/io/layer_tensors.hpp>
#include <local_mha/io/model_config.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/state_dict_reader.hpp>
#include <local_mha/longformer.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// A model's layer, and its tensors.
struct LongformerLayer {
  LongformerConfig config;
  std::vector<LayerTensor> tensors;
};

/// Whether models of this `model_type` have such layers: `longformer`, and the encoder of `led`.
inline bool is_longformer(std::string_view model_type) {
  return model_type == "longformer" || model_type == "led";
}

/// What a layer of a Longformer computes.
/// \param config the model's `config.json`, or a part of it that has `model_type`, `hidden_size`,
///   `num_attention_heads` and `attention_window`; LED's has `d_model` and
///   `encoder_attention_heads`
/// \param number of the layer in its stack; needed if windows differ
/// \throws std::invalid_argument naming the member that is missing or out of range
inline LongformerLayer longformer_layer(const nlohmann::json& config,
                                        std::optional<Index> number = {}) {
  const detail::ModelConfig members(config);
  if (const auto type = members.required<std::string>("model_type"); !is_longformer(type))
    reject(members.path("model_type"), "longformer or led", "'", printable(type), "'");
  const auto size = [&](std::string_view name, std::string_view of_led) {
    return members.size(members.has(of_led) ? of_led : name);
  };
  LongformerLayer layer;
  layer.config = {.dim = size("hidden_size", "d_model"),
                  .heads = size("num_attention_heads", "encoder_attention_heads"),
                  .attention_window = 0,
                  .dropout = members.get("attention_probs_dropout_prob", 0.0)};
  if (!members.is_array("attention_window"))
    layer.config.attention_window = members.size("attention_window");
  else if (number)
    layer.config.attention_window = members.element<Index>("attention_window", *number);
  else
    reject("prefix", "the layer's number, because each has a window of its own", "none");
  validate(layer.config);
  const Index dim = layer.config.dim;
  const auto add = [&](const std::array<std::string, 3>& names, const std::string& to) {
    Index row = 0;
    for (const std::string& name : names) {
      layer.tensors.push_back({name + ".weight", {dim, dim}, to + ".weight", row});
      layer.tensors.push_back({name + ".bias", {dim}, to + ".bias", row});
      row += dim;
    }
  };
  add({"query", "key", "value"}, "to_qkv");
  add({"query_global", "key_global", "value_global"}, "to_qkv_global");
  return layer;
}

/// Weights of a layer.
/// \param prefix stands before the names of the layer's tensors
/// \throws std::invalid_argument if the layer's configuration is
/// \throws SafetensorsError naming the tensor that is missing, unexpected, misshapen or not
///   floating-point
template <typename Scalar>
LongformerParameters<Scalar> load_longformer_parameters(const TensorSource& source,
                                                        const std::string& prefix,
                                                        const LongformerLayer& layer) {
  validate(layer.config);
  constexpr RotaryBuffers buffers = RotaryBuffers::check;
  detail::StateDictReader<Scalar> reader(source, detail::find_layer_prefix(source, prefix),
                                         buffers);
  detail::LayerTensorReader<Scalar> tensors(source, reader, layer.tensors, buffers);
  reader.reject_unexpected();
  auto parameters = LongformerParameters<Scalar>::zeros(layer.config);
  tensors.read(parameters);
  return parameters;
}

/// A layer of a model, ready to be called.
/// \param prefix stands before the names of the layer's tensors; its first number is the layer's
/// \param config see longformer_layer()
/// \throws std::invalid_argument naming the member of the configuration that is missing or out of
///   range
/// \throws SafetensorsError naming the tensor that is missing, unexpected, misshapen or not
///   floating-point
template <typename Scalar>
LongformerAttention<Scalar> load_longformer(const TensorSource& source, const std::string& prefix,
                                            const nlohmann::json& config) {
  const LongformerLayer layer = longformer_layer(config, detail::layer_number(prefix));
  return LongformerAttention<Scalar>(layer.config,
                                     load_longformer_parameters<Scalar>(source, prefix, layer));
}

/// Gradients of a model's tensors from those of a layer's weights.
/// \return row-major numbers, by the tensors' names
/// \throws std::invalid_argument naming the gradient whose shape does not fit the layer
template <typename Scalar>
std::map<std::string, std::vector<Scalar>> longformer_gradients(
    const LongformerLayer& layer, const LongformerParameters<Scalar>& gradients) {
  local_mha::detail::require_same_shapes(gradients,
                                         LongformerParameters<Scalar>::zeros(layer.config));
  return detail::tensor_gradients<Scalar>(layer.tensors, gradients);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
