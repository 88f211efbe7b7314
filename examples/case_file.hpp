// SPDX-License-Identifier: MIT
/// \file
/// Case files: inputs and outputs of a layer, with its weights or beside them.
///
/// A case file is a safetensors file with `__metadata__["case"]` and tensors `param/…`, `input/…`,
/// `output/…`, as `export_layer.py` writes it and `tests/golden/README.md` describes it; that of a
/// published model's attention layer, `tests/golden_sliding/README.md`; those of stacks of layers,
/// `tests/golden_stack/README.md`.
#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <local_mha/core/mask.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/attention_case.hpp>
#include <local_mha/io/case.hpp>
#include <local_mha/io/safetensors.hpp>

namespace local_mha::examples {

/// Two files, or the same one twice.
struct CaseFiles {
  io::SafetensorsFile inputs;   ///< `input/…` and `output/…`
  io::SafetensorsFile weights;  ///< the state dict, and the configuration in its metadata
  std::string kind;     ///< LocalMHA, LocalAttention, LocalTransformer, Stack, or a model's class
  nlohmann::json call;  ///< further arguments of the call
  std::string family = {};  ///< model_type of a published model's attention layer
  bool is_encoder = false;  ///< a Stack, or a LocalTransformer without tokens

  /// \param weights_path empty: the weights stand with the inputs
  /// \throws io::SafetensorsError if a file is malformed or the two describe different layers
  static CaseFiles open(const std::string& path, const std::string& weights_path) {
    io::SafetensorsFile inputs(path);
    io::SafetensorsFile weights = weights_path.empty() ? inputs : io::SafetensorsFile(weights_path);
    const io::Case layer = io::read_case(weights);
    if (const std::string family = io::family_of_case(weights); !family.empty()) {
      if (!weights_path.empty())
        throw io::SafetensorsError(weights_path, "",
                                   "case: expected no model's layer, whose weights stand with its "
                                   "inputs, got '" +
                                       io::printable(layer.kind) + "'");
      return {inputs, weights, layer.kind, layer.call, family};
    }
    nlohmann::json call = layer.call;
    if (!weights_path.empty() && io::has_case(inputs)) {
      const io::Case other = io::read_case(inputs);
      if (other.kind != layer.kind || other.kwargs != layer.kwargs)
        throw io::SafetensorsError(
            path, "",
            "case: expected the layer of " + weights_path + ", got another kind or other kwargs");
      call = other.call;
    }
    if (layer.kind != "LocalMHA" && layer.kind != "LocalAttention" &&
        layer.kind != "LocalTransformer" && layer.kind != "Stack")
      throw io::SafetensorsError(
          weights.file_name(), "",
          "case: kind: expected LocalMHA, LocalAttention, LocalTransformer or Stack, got '" +
              io::printable(layer.kind) + "'");
    const bool is_encoder = layer.kind == "Stack" || (layer.kind == "LocalTransformer" &&
                                                      layer.kwargs.contains("num_tokens") &&
                                                      layer.kwargs["num_tokens"].is_null());
    return {inputs, weights, layer.kind, std::move(call), "", is_encoder};
  }
};

/// Rejects tensors that nobody would look at.
/// \param group `input/` or `output/`
/// \throws io::SafetensorsError naming the first tensor of the group that is not in `known`
inline void require_known(const io::SafetensorsFile& file, const std::string& group,
                          const std::vector<std::string>& known) {
  std::string all;
  for (const std::string& name : known) all += (all.empty() ? "" : ", ") + name;
  for (const std::string& name : file.names())
    if (name.starts_with(group) &&
        std::find(known.begin(), known.end(), name.substr(group.size())) == known.end())
      throw io::SafetensorsError(
          file.file_name(), name,
          "expected one of " + group + "{" + all + "}, got a name that says nothing here");
}

/// `input/keep_mask`, `[B, N]`, 1 = attend; masks nothing if it is not there.
inline PaddingMask read_mask(const io::SafetensorsFile& file) {
  constexpr std::string_view name = "input/keep_mask";
  return file.contains(name) ? PaddingMask::keep(file.tensor<bool, 2>(name)) : PaddingMask();
}

/// `input/attn_bias`, `[heads or 1, w, (1 + lb + lf)·w]`, if it is there.
template <typename Scalar>
std::optional<Tensor<Scalar, 3>> read_attn_bias(const io::SafetensorsFile& file) {
  constexpr std::string_view name = "input/attn_bias";
  if (!file.contains(name)) return std::nullopt;
  return file.tensor<Scalar, 3>(name);
}

/// What the layer's forward() takes.
template <typename Scalar>
std::optional<TensorView<const Scalar, 3>> view(const std::optional<Tensor<Scalar, 3>>& tensor) {
  if (!tensor) return std::nullopt;
  return TensorView<const Scalar, 3>(*tensor);
}

/// The only argument of a call that is not a tensor: LocalAttention's `window_size`.
/// \throws std::invalid_argument if there is another, or this one is not a positive integer
inline std::optional<Index> window_size_of_call(const CaseFiles& files) {
  std::optional<Index> window_size;
  for (const auto& [key, value] : files.call.items()) {
    if (value.is_null()) continue;
    if (files.kind != "LocalAttention" || key != "window_size")
      reject("call", "no argument of this name for " + files.kind, "'", io::printable(key), "'");
    if (!value.is_number_unsigned() || value > 1 << 30 || value < 1)
      reject("call: window_size", "1 to 2^30", io::describe(value));
    window_size = value.get<Index>();
  }
  return window_size;
}

}  // namespace local_mha::examples
