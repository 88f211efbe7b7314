// SPDX-License-Identifier: MIT
/// \file
/// What a model's attention layer is here, and what it is read from.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/layer_tensors.hpp>
#include <local_mha/io/model_config.hpp>
#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/state_dict_reader.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// A model's attention layer as a LocalMHA.
struct AttentionLayer {
  std::string model_type;
  LocalMHAConfig config;
  /// If none is the output projection, that is the identity.
  std::vector<LayerTensor> tensors;
  /// Numbers in the file that are no weights, behind the layer's prefix.
  std::vector<std::string> buffers = {};
  /// The module takes and gives `[B, dim, N]`.
  bool channels_first = false;
  /// The module adds its input to its output.
  bool residual = false;
};

namespace detail {

/// What a family reads of a model.
struct LayerSource {
  const ModelConfig& config;
  StateDictReader<double>& tensors;
  const std::string& prefix;
  std::optional<Index> layer;  ///< its number in the stack

  Index number() const {
    if (layer) return *layer;
    reject("prefix", "the layer's number, as in model.layers.0.self_attn", "'", printable(prefix),
           "'");
  }
};

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
