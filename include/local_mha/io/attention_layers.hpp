// SPDX-License-Identifier: MIT
/// \file
/// The attention layers of published models, by name.
///
///     io::SafetensorsFile file("model.safetensors");
///     const auto config = io::read_model_config("config.json");
///     auto layer = io::load_attention<float>(file, "model.layers.0.self_attn", config);
///     auto y = layer.forward(x);
///
/// attention_families.hpp has the table of models. What stands around a model's attention, such as
/// the norm before it, is not a part of it; snac's norm is.
#pragma once

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstddef>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/io/attention_layer_description.hpp>
#include <local_mha/io/attention_layer_source.hpp>
#include <local_mha/io/layer_tensors.hpp>
#include <local_mha/io/model_config.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/state_dict_reader.hpp>
#include <local_mha/mha.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// What LocalMHA a model's layer is, and of which tensors.
/// \param prefix stands before the names of the layer's tensors, such as
///   `model.layers.0.self_attn`, with or without a dot behind it
/// \param config the model's `config.json`, see read_model_config(), or a part of it that has
///   `model_type` and what the family needs. Of a model with `text_config`, it is that which counts
/// \param number of the layer in its stack. Empty: the first number of the prefix
/// \throws std::invalid_argument naming the member of the configuration that is missing, out of
///   range or not supported, or the prefix if the layer has no sliding window
/// \throws SafetensorsError naming a tensor that is misshapen
inline AttentionLayer attention_layer(const TensorSource& source, const std::string& prefix,
                                      const nlohmann::json& config,
                                      std::optional<Index> number = {}) {
  detail::ModelConfig members(config);
  if (members.is_object("text_config")) members = members.object("text_config");
  if (number && (*number < 0 || *number >= detail::most_layers))
    reject("number", "0 to 2^30 - 1", *number);
  const std::string before = detail::find_layer_prefix(source, prefix);
  detail::StateDictReader<double> reader(source, before, RotaryBuffers::ignore);
  return detail::describe_layer(
      {members, reader, before, number ? number : detail::layer_number(before)});
}

/// Weights of a layer, of which attention_layer() says where they are.
/// \param prefix stands before the names of the layer's tensors
/// \param buffers whether rotary frequencies in the file must be this library's
/// \throws std::invalid_argument if the layer's configuration is
/// \throws SafetensorsError naming the tensor that is missing, unexpected, misshapen or not
///   floating-point
template <typename Scalar>
LocalMHAParameters<Scalar> load_attention_parameters(const TensorSource& source,
                                                     const std::string& prefix,
                                                     const AttentionLayer& layer,
                                                     RotaryBuffers buffers = RotaryBuffers::check) {
  validate(layer.config);
  detail::StateDictReader<Scalar> reader(source, detail::find_layer_prefix(source, prefix),
                                         buffers);
  // All there is to object to, before memory is taken.
  detail::LayerTensorReader<Scalar> tensors(source, reader, layer.tensors, buffers);
  for (const std::string& name : layer.buffers) reader.ignore(name);
  if (layer.config.use_rotary_pos_emb)
    reader.rotary_buffers("rotary_emb.", layer.config.dim_head, layer.config.rotary);
  reader.reject_unexpected();

  auto parameters = LocalMHAParameters<Scalar>::zeros(layer.config);
  parameters.to_out.setIdentity();  // unless there is an output projection
  tensors.read(parameters);
  return parameters;
}

/// A layer of a model, ready to be called.
///
/// It is the module that the prefix names: `forward(x)` gives what that gives, but for a residual
/// connection in it, and for the order of axes, see AttentionLayer.
/// \param prefix, config see attention_layer()
/// \param buffers whether rotary frequencies in the file must be this library's
/// \throws std::invalid_argument naming the member of the configuration that is missing, out of
///   range or not supported, or the prefix if the layer has no sliding window
/// \throws SafetensorsError naming the tensor that is missing, unexpected, misshapen or not
///   floating-point
template <typename Scalar>
LocalMHA<Scalar> load_attention(const TensorSource& source, const std::string& prefix,
                                const nlohmann::json& config,
                                RotaryBuffers buffers = RotaryBuffers::check) {
  const AttentionLayer layer = attention_layer(source, prefix, config);
  return LocalMHA<Scalar>(layer.config,
                          load_attention_parameters<Scalar>(source, prefix, layer, buffers));
}

/// Gradients of a model's tensors from those of a layer's weights.
/// \return row-major numbers, by the tensors' names
/// \throws std::invalid_argument naming the gradient whose shape does not fit the layer
template <typename Scalar>
std::map<std::string, std::vector<Scalar>> attention_gradients(
    const AttentionLayer& layer, const LocalMHAParameters<Scalar>& gradients) {
  local_mha::detail::require_same_shapes(gradients,
                                         LocalMHAParameters<Scalar>::zeros(layer.config));
  return detail::tensor_gradients<Scalar>(layer.tensors, gradients);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
