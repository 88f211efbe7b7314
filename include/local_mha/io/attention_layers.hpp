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
#include <local_mha/io/attention_families.hpp>
#include <local_mha/io/model_config.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/state_dict.hpp>
#include <local_mha/mha.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

/// As it stands before the names of a layer's tensors.
inline std::string layer_prefix(std::string prefix) {
  if (!prefix.empty() && prefix.back() != '.' && prefix.back() != '/') prefix += '.';
  return prefix;
}

/// The first number among the parts of a prefix.
inline std::optional<Index> layer_number(std::string_view prefix) {
  while (!prefix.empty()) {
    const std::string_view part = prefix.substr(0, prefix.find('.'));
    Index number = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), number);
    if (error == std::errc() && end == part.data() + part.size() && number >= 0) return number;
    prefix.remove_prefix((std::min)(part.size() + 1, prefix.size()));
  }
  return std::nullopt;
}

/// The tensors of a parameter, one after the other.
template <typename Visitor>
void for_each_part(const AttentionLayer& layer, const std::string& parameter, Visitor&& visit) {
  for (const LayerTensor& tensor : layer.tensors)
    if (tensor.parameter == parameter) visit(tensor);
}

inline Index size_of(const std::vector<Index>& shape) {
  Index size = 1;
  for (const Index extent : shape) size *= extent;
  return size;
}

}  // namespace detail

/// What LocalMHA a model's layer is, and of which tensors.
/// \param prefix stands before the names of the layer's tensors, such as
///   `model.layers.0.self_attn`, with or without a dot behind it
/// \param config the model's `config.json`, see read_model_config(), or a part of it that has
///   `model_type` and what the family needs. Of a model with `text_config`, it is that which counts
/// \param number of the layer in its stack. Empty: the first number of the prefix
/// \throws std::invalid_argument naming the member of the configuration that is missing, out of
///   range or not supported, or the prefix if the layer has no sliding window
/// \throws SafetensorsError naming a tensor that is misshapen
inline AttentionLayer attention_layer(const SafetensorsFile& file, const std::string& prefix,
                                      const nlohmann::json& config,
                                      std::optional<Index> number = {}) {
  detail::ModelConfig members(config);
  if (members.is_object("text_config")) members = members.object("text_config");
  if (number && *number < 0) reject("number", "at least 0", *number);
  const std::string before = detail::layer_prefix(prefix);
  detail::StateDictReader<double> reader(file, before, RotaryBuffers::ignore);
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
LocalMHAParameters<Scalar> load_attention_parameters(const SafetensorsFile& file,
                                                     const std::string& prefix,
                                                     const AttentionLayer& layer,
                                                     RotaryBuffers buffers = RotaryBuffers::check) {
  validate(layer.config);
  detail::StateDictReader<Scalar> reader(file, detail::layer_prefix(prefix), buffers);
  const auto read_from = [&](const LayerTensor& tensor, const auto& read) {
    if (tensor.prefix.empty()) return read(reader);
    detail::StateDictReader<Scalar> other(file, tensor.prefix, buffers);
    read(other);
  };
  // All there is to object to, before memory is taken.
  for (const LayerTensor& tensor : layer.tensors)
    read_from(tensor, [&](auto& from) { from.require(tensor.name, tensor.shape); });
  for (const std::string& name : layer.buffers) reader.ignore(name);
  if (layer.config.use_rotary_pos_emb)
    reader.rotary_buffers("rotary_emb.", layer.config.dim_head, layer.config.rotary);
  reader.reject_unexpected();

  auto parameters = LocalMHAParameters<Scalar>::zeros(layer.config);
  // Unless there is an output projection.
  parameters.to_out.setIdentity();
  for_each_parameter(parameters, [&](const std::string& name, auto& parameter) {
    const Index cols = parameter.cols();
    detail::for_each_part(layer, name, [&](const LayerTensor& tensor) {
      const Index size = detail::size_of(tensor.shape);
      const auto read = [&](Scalar* to) {
        read_from(tensor, [&](auto& from) {
          from.read_into(tensor.name, tensor.shape, {to, static_cast<std::size_t>(size)});
        });
        for (Index i = 0; tensor.offset != 0 && i < size; ++i) to[i] += Scalar(tensor.offset);
      };
      if (tensor.rows.empty()) return read(parameter.data() + tensor.first_row * cols);
      RowMatrix<Scalar> table(tensor.shape[0], tensor.shape[1]);
      read(table.data());
      for (Index c = 0; c < cols; ++c)
        for (Index h = 0; h < parameter.rows(); ++h)
          parameter(h, c) = table(tensor.rows[static_cast<std::size_t>(c)], h);
    });
  });
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
LocalMHA<Scalar> load_attention(const SafetensorsFile& file, const std::string& prefix,
                                const nlohmann::json& config,
                                RotaryBuffers buffers = RotaryBuffers::check) {
  const AttentionLayer layer = attention_layer(file, prefix, config);
  return LocalMHA<Scalar>(layer.config,
                          load_attention_parameters<Scalar>(file, prefix, layer, buffers));
}

/// Gradients of a model's tensors from those of a layer's weights.
/// \return row-major numbers, by the tensors' names
/// \throws std::invalid_argument naming the gradient whose shape does not fit the layer
template <typename Scalar>
std::map<std::string, std::vector<Scalar>> attention_gradients(
    const AttentionLayer& layer, const LocalMHAParameters<Scalar>& gradients) {
  local_mha::detail::require_same_shapes(gradients,
                                         LocalMHAParameters<Scalar>::zeros(layer.config));
  std::map<std::string, std::vector<Scalar>> of_tensors;
  for_each_parameter(gradients, [&](const std::string& name, const auto& gradient) {
    detail::for_each_part(layer, name, [&](const LayerTensor& tensor) {
      const auto size = static_cast<std::size_t>(detail::size_of(tensor.shape));
      const Index cols = gradient.cols();
      if (tensor.rows.empty()) {
        const Scalar* first = gradient.data() + tensor.first_row * cols;
        of_tensors.emplace(tensor.name, std::vector<Scalar>(first, first + size));
        return;
      }
      RowMatrix<Scalar> table = RowMatrix<Scalar>::Zero(tensor.shape[0], tensor.shape[1]);
      for (Index c = 0; c < cols; ++c)
        for (Index h = 0; h < gradient.rows(); ++h)
          table(tensor.rows[static_cast<std::size_t>(c)], h) += gradient(h, c);
      of_tensors.emplace(tensor.name, std::vector<Scalar>(table.data(), table.data() + size));
    });
  });
  return of_tensors;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
