// SPDX-License-Identifier: MIT
/// \file
/// Weights of the Python modules in safetensors files, or in memory: state dicts to parameters and
/// back.
///
///     io::SafetensorsFile file("model.safetensors");
///     auto [config, parameters] = io::load_local_transformer<float>(file);
///     local_mha::LocalTransformer<float> model(config, std::move(parameters));
///
/// A file carries its configuration in `__metadata__["case"]` (case.hpp); for one without, there
/// are the functions that take a configuration. Names are those of the state dict behind a prefix.
/// Where no tensor of the module has them as they are asked for, `ema_model.`, `online_model.`,
/// `ema.` and `state_dict.`, also several of them, may stand before: if that is so in
/// more ways than one, the file is refused, and a prefix says which it is. Read are also:
/// `to_q.weight`, `to_k.weight`, `to_v.weight` in the place of `to_qkv.weight`; transformer layers
/// without `branch.` (older versions of the package); names with `_orig_mod.`, `module.` and what
/// else wraps a module, anywhere; a weight that is left out because it is tied to another one,
/// which `__metadata__` names (as safetensors.torch.save_model() does); buffers of the rotary
/// embedding, which may be there or not, see RotaryBuffers.
///
/// Every tensor under the prefix must be known, there, of the right shape and floating-point. All
/// this is checked tensor by tensor before memory is taken for it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <local_mha/config.hpp>
#include <local_mha/io/case.hpp>
#include <local_mha/io/kwargs.hpp>
#include <local_mha/io/prefix.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/state_dict.hpp>
#include <local_mha/ops/dynamic_position_bias.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// A LocalMHA from a file.
template <typename Scalar>
struct LocalMHAWeights {
  /// What the file says of itself.
  LocalMHAConfig config;
  /// Its weights.
  LocalMHAParameters<Scalar> parameters;
};

/// A LocalTransformer from a file.
template <typename Scalar>
struct LocalTransformerWeights {
  /// What the file says of itself.
  LocalTransformerConfig config;
  /// Its weights.
  LocalTransformerParameters<Scalar> parameters;
};

/// How weights are written.
struct SaveOptions {
  /// Stands before the names of the state dict.
  std::string prefix = "param/";
  /// F64, F32, F16 or BF16. Empty: as the weights are.
  std::optional<Dtype> dtype = {};
  /// Goes into the metadata, for people.
  std::string note = {};
};

namespace detail {

/// Names of which every module of a kind has some; or what names begin with.
inline std::string local_mha_prefix(const TensorSource& source,
                                    const std::optional<std::string>& prefix) {
  return find_prefix(source, prefix_of(source, prefix),
                     {"to_qkv.weight", "to_q.weight", "to_out.weight"});
}
inline std::string local_transformer_prefix(const TensorSource& source,
                                            const std::optional<std::string>& prefix) {
  return find_prefix(source, prefix_of(source, prefix), {"token_emb.weight", "layers.0."});
}

/// The configuration of the file's module; its errors name the file.
template <typename ReadConfig>
auto config_of(const TensorSource& source, std::string_view kind, const ReadConfig& read_config) {
  Case described = read_case(source);
  const EmptiedJson emptied(described.kwargs);
  const EmptiedJson emptied_call(described.call);
  if (described.kind != kind)
    throw SafetensorsError(source.file_name(), "",
                           "case: kind: expected '" + std::string(kind) + "', got '" +
                               printable(described.kind) + "'");
  try {
    return read_config(described.kwargs);
  } catch (const std::invalid_argument& error) {
    throw SafetensorsError(source.file_name(), "", "case: kwargs: " + std::string(error.what()));
  }
}

/// A configuration with as many residual streams as the weights have, if no argument says it.
template <typename Config, typename Scalar>
Config with_residual_streams(Config config, const nlohmann::json& kwargs,
                             const StateDictReader<Scalar>& reader) {
  constexpr const char* name = "num_residual_streams";
  if (kwargs.contains(name) && !kwargs[name].is_null()) return config;
  config.num_residual_streams = residual_streams(reader);
  validate(config);
  return config;
}

}  // namespace detail

/// Weights of a LocalMHA whose configuration is known.
/// \param prefix stands before the names, such as `layers.3.0.branch.`; empty: `param/` if there
///   are such names, else none
/// \param buffers whether those of the rotary embedding in the file must be this library's
/// \throws std::invalid_argument if the configuration is
/// \throws SafetensorsError naming the tensor that is missing, unexpected, misshapen or not
///   floating-point
template <typename Scalar>
LocalMHAParameters<Scalar> load_local_mha_parameters(const TensorSource& source,
                                                     const LocalMHAConfig& config,
                                                     const std::optional<std::string>& prefix = {},
                                                     RotaryBuffers buffers = RotaryBuffers::check) {
  validate(config);
  detail::StateDictReader<Scalar> reader(source, detail::local_mha_prefix(source, prefix), buffers);
  LocalMHAParameters<Scalar> parameters;
  detail::visit_state_dict(reader, "", config, parameters);
  reader.reject_unexpected();
  return parameters;
}

/// Weights of a LocalTransformer whose configuration is known.
/// \param prefix stands before the names; empty: `param/` if there are such names, else none
/// \param buffers whether those of the rotary embedding in the file must be this library's
/// \throws std::invalid_argument if the configuration is
/// \throws SafetensorsError naming the tensor that is missing, unexpected, misshapen or not
///   floating-point
template <typename Scalar>
LocalTransformerParameters<Scalar> load_local_transformer_parameters(
    const TensorSource& source, const LocalTransformerConfig& config,
    const std::optional<std::string>& prefix = {}, RotaryBuffers buffers = RotaryBuffers::check) {
  validate(config);
  detail::StateDictReader<Scalar> reader(source, detail::local_transformer_prefix(source, prefix),
                                         buffers);
  LocalTransformerParameters<Scalar> parameters;
  detail::visit_state_dict(reader, "", config, parameters);
  reader.reject_unexpected();
  return parameters;
}

/// Weights of a FeedForward alone.
/// \param inner hidden width, see feed_forward_inner_dim()
/// \param prefix stands before the names, such as `layers.3.1.branch.`
/// \throws SafetensorsError naming the tensor that is missing, unexpected, misshapen or not
///   floating-point
template <typename Scalar>
FeedForwardParameters<Scalar> load_feed_forward_parameters(const TensorSource& source, Index dim,
                                                           Index inner, const std::string& prefix) {
  local_mha::detail::require_at_least("dim", dim, 1);
  local_mha::detail::require_at_least("inner", inner, 1);
  detail::StateDictReader<Scalar> reader(
      source, detail::find_prefix(source, prefix, {"1.weight", "4.weight"}), RotaryBuffers::check);
  FeedForwardParameters<Scalar> parameters;
  detail::visit_state_dict(reader, "", dim, inner, parameters);
  reader.reject_unexpected();
  return parameters;
}

/// A DynamicPositionBias alone, of the size that its weights have.
/// \param prefix stands before `mlp.0.weight`, such as `dynamic_pos_bias.` or `pos_bias.`
/// \throws SafetensorsError naming the tensor that is missing, unexpected, misshapen or not
///   floating-point
template <typename Scalar>
DynamicPositionBias<Scalar> load_dynamic_position_bias(const TensorSource& source,
                                                       const std::string& prefix) {
  detail::StateDictReader<Scalar> reader(source, detail::find_prefix(source, prefix, {"mlp."}),
                                         RotaryBuffers::check);
  DynamicPositionBiasParameters<Scalar> parameters;
  const Index hidden = reader.rows("mlp.0.weight");
  detail::visit_position_bias(reader, "", hidden, reader.rows("mlp.4.weight"), parameters);
  reader.reject_unexpected();
  return DynamicPositionBias<Scalar>(std::move(parameters));
}

/// The configuration in the file's metadata; the buffers of the rotary embedding are checked.
/// \param prefix stands before the names; empty: `param/` if there are such names, else none
/// \param buffers whether those of the rotary embedding in the file must be this library's
/// \throws SafetensorsError
inline LocalAttentionConfig load_local_attention(const TensorSource& source,
                                                 const std::optional<std::string>& prefix = {},
                                                 RotaryBuffers buffers = RotaryBuffers::check) {
  const LocalAttentionConfig config =
      detail::config_of(source, "LocalAttention", local_attention_config);
  detail::StateDictReader<double> reader(source, detail::prefix_of(source, prefix), buffers);
  if (config.dim && config.use_rotary_pos_emb)
    reader.rotary_buffers("rel_pos.", *config.dim, config.rotary);
  reader.reject_unexpected();
  return config;
}

/// Configuration and weights of a LocalMHA.
/// \param prefix stands before the names; empty: `param/` if there are such names, else none
/// \param buffers whether those of the rotary embedding in the file must be this library's
/// \throws SafetensorsError naming the argument or tensor that is wrong
template <typename Scalar>
LocalMHAWeights<Scalar> load_local_mha(const TensorSource& source,
                                       const std::optional<std::string>& prefix = {},
                                       RotaryBuffers buffers = RotaryBuffers::check) {
  const LocalMHAConfig config = detail::config_of(source, "LocalMHA", local_mha_config);
  return {config, load_local_mha_parameters<Scalar>(source, config,
                                                    detail::prefix_of(source, prefix), buffers)};
}

/// Configuration and weights of a LocalTransformer. Where its arguments do not say how many
/// residual streams there are, the weights do.
/// \param prefix stands before the names; empty: `param/` if there are such names, else none
/// \param buffers whether those of the rotary embedding in the file must be this library's
/// \throws SafetensorsError naming the argument or tensor that is wrong
template <typename Scalar>
LocalTransformerWeights<Scalar> load_local_transformer(
    const TensorSource& source, const std::optional<std::string>& prefix = {},
    RotaryBuffers buffers = RotaryBuffers::check) {
  const std::string names = detail::local_transformer_prefix(source, prefix);
  const LocalTransformerConfig config =
      detail::config_of(source, "LocalTransformer", [&](const nlohmann::json& kwargs) {
        return detail::with_residual_streams(
            local_transformer_config(kwargs), kwargs,
            detail::StateDictReader<Scalar>(source, names, buffers));
      });
  return {config, load_local_transformer_parameters<Scalar>(source, config, names, buffers)};
}

/// Adds a LocalMHA's state dict and its configuration; Python's `load_state_dict` takes the former.
/// \throws std::invalid_argument if the configuration is, or a tensor does not fit it
template <typename Scalar>
void add_local_mha(SafetensorsWriter& writer, const LocalMHAConfig& config,
                   const LocalMHAParameters<Scalar>& parameters, const SaveOptions& options = {}) {
  validate(config);
  SafetensorsWriter added;  // all of it or nothing
  detail::StateDictWriter<Scalar> state_dict(added, options.prefix, options.dtype);
  detail::visit_state_dict(state_dict, "", config, parameters);
  Case described{.kind = "LocalMHA", .kwargs = to_kwargs(config), .note = options.note};
  const detail::EmptiedJson emptied(described.kwargs);
  set_case(added, described);
  writer.merge(added);
}

/// Adds a LocalTransformer's state dict and its configuration; Python's `load_state_dict` takes the
/// former.
/// \throws std::invalid_argument if the configuration is, or a tensor does not fit it
template <typename Scalar>
void add_local_transformer(SafetensorsWriter& writer, const LocalTransformerConfig& config,
                           const LocalTransformerParameters<Scalar>& parameters,
                           const SaveOptions& options = {}) {
  validate(config);
  SafetensorsWriter added;  // all of it or nothing
  detail::StateDictWriter<Scalar> state_dict(added, options.prefix, options.dtype);
  detail::visit_state_dict(state_dict, "", config, parameters);
  Case described{.kind = "LocalTransformer", .kwargs = to_kwargs(config), .note = options.note};
  const detail::EmptiedJson emptied(described.kwargs);
  set_case(added, described);
  writer.merge(added);
}

/// Writes a file that load_local_mha() reads.
/// \throws std::invalid_argument if the configuration is, or a tensor does not fit it
/// \throws SafetensorsError if the file cannot be written
template <typename Scalar>
void save_local_mha(const std::filesystem::path& path, const LocalMHAConfig& config,
                    const LocalMHAParameters<Scalar>& parameters, const SaveOptions& options = {}) {
  SafetensorsWriter writer;
  add_local_mha(writer, config, parameters, options);
  writer.write(path);
}

/// Writes a file that load_local_transformer() reads.
/// \throws std::invalid_argument if the configuration is, or a tensor does not fit it
/// \throws SafetensorsError if the file cannot be written
template <typename Scalar>
void save_local_transformer(const std::filesystem::path& path, const LocalTransformerConfig& config,
                            const LocalTransformerParameters<Scalar>& parameters,
                            const SaveOptions& options = {}) {
  SafetensorsWriter writer;
  add_local_transformer(writer, config, parameters, options);
  writer.write(path);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
