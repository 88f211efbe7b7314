// SPDX-License-Identifier: MIT
/// \file
/// Weights of encoders in safetensors files, or in memory, in the two forms that they have in
/// Python:
///
///     LocalTransformer(num_tokens=None)   layers.<i>.0.branch.…, layers.<i>.1.branch.…
///     a ModuleList of pairs               layers.<i>.0.…, layers.<i>.1.…
///
///     io::SafetensorsFile file("encoder.safetensors");
///     auto [config, parameters] = io::load_encoder<float>(file);
///     local_mha::Encoder<float> encoder(config, std::move(parameters));
///
/// Either form is read under either configuration; else, the rules of weights.hpp hold.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>

#include <local_mha/encoder_config.hpp>
#include <local_mha/io/case.hpp>
#include <local_mha/io/encoder_kwargs.hpp>
#include <local_mha/io/prefix.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/state_dict.hpp>
#include <local_mha/io/weights.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// An Encoder from a file.
template <typename Scalar>
struct EncoderWeights {
  /// What the file says of itself.
  EncoderConfig config;
  /// Its weights.
  EncoderParameters<Scalar> parameters;
};

/// What an encoder is in Python.
enum class EncoderForm : std::uint8_t {
  local_transformer,  ///< `LocalTransformer(num_tokens=None)`, whose layers are all the same
  module_list,        ///< pairs of a LocalMHA and a FeedForward; any layers
};

namespace detail {

inline std::string encoder_prefix(const TensorSource& source,
                                  const std::optional<std::string>& prefix) {
  return find_prefix(source, prefix_of(source, prefix), {"layers.0."});
}

}  // namespace detail

/// Weights of an Encoder whose configuration is known.
/// \param prefix stands before the names, such as `encoder.`; empty: `param/` if there are such
///   names, else none
/// \param buffers whether those of the rotary embedding in the file must be this library's
/// \throws std::invalid_argument if the configuration is
/// \throws SafetensorsError naming the tensor that is missing, unexpected, misshapen or not
///   floating-point
template <typename Scalar>
EncoderParameters<Scalar> load_encoder_parameters(const TensorSource& source,
                                                  const EncoderConfig& config,
                                                  const std::optional<std::string>& prefix = {},
                                                  RotaryBuffers buffers = RotaryBuffers::check) {
  validate(config);
  detail::StateDictReader<Scalar> reader(source, detail::encoder_prefix(source, prefix), buffers);
  EncoderParameters<Scalar> parameters;
  detail::visit_state_dict(reader, "", config, parameters);
  reader.reject_unexpected();
  return parameters;
}

/// Configuration and weights of an Encoder: the file's kind is `LocalTransformer`, without tokens,
/// or `Stack`. Where its arguments do not say how many residual streams there are, the weights do.
/// \param prefix stands before the names; empty: `param/` if there are such names, else none
/// \param buffers whether those of the rotary embedding in the file must be this library's
/// \throws SafetensorsError naming the argument or tensor that is wrong
template <typename Scalar>
EncoderWeights<Scalar> load_encoder(const TensorSource& source,
                                    const std::optional<std::string>& prefix = {},
                                    RotaryBuffers buffers = RotaryBuffers::check) {
  const std::string names = detail::encoder_prefix(source, prefix);
  Case described = read_case(source);
  const detail::EmptiedJson emptied(described.kwargs);
  const detail::EmptiedJson emptied_call(described.call);
  const bool is_stack = described.kind == "Stack";
  const EncoderConfig config =
      detail::config_of(source, is_stack ? "Stack" : "LocalTransformer", [&](const auto& kwargs) {
        return detail::with_residual_streams(
            is_stack ? stack_config(kwargs) : local_transformer_encoder_config(kwargs), kwargs,
            detail::StateDictReader<Scalar>(source, names, buffers));
      });
  return {config, load_encoder_parameters<Scalar>(source, config, names, buffers)};
}

/// Adds an Encoder's state dict and its configuration; Python's `load_state_dict` takes the former.
/// \throws std::invalid_argument if the configuration is, a tensor does not fit it, or its layers
///   are not those of the form
template <typename Scalar>
void add_encoder(SafetensorsWriter& writer, const EncoderConfig& config,
                 const EncoderParameters<Scalar>& parameters, EncoderForm form,
                 const SaveOptions& options = {}) {
  validate(config);
  const bool is_list = form == EncoderForm::module_list;
  Case described{.kind = is_list ? "Stack" : "LocalTransformer",
                 .kwargs = is_list ? to_stack_kwargs(config) : to_local_transformer_kwargs(config),
                 .note = options.note};
  const detail::EmptiedJson emptied(described.kwargs);
  SafetensorsWriter added;  // all of it or nothing
  detail::StateDictWriter<Scalar> state_dict(
      added, options.prefix, options.dtype,
      is_list && config.num_residual_streams == 1 ? "" : "branch.");
  detail::visit_state_dict(state_dict, "", config, parameters);
  set_case(added, described);
  writer.merge(added);
}

/// Writes a file that load_encoder() reads.
/// \throws std::invalid_argument as add_encoder() does
/// \throws SafetensorsError if the file cannot be written
template <typename Scalar>
void save_encoder(const std::filesystem::path& path, const EncoderConfig& config,
                  const EncoderParameters<Scalar>& parameters, EncoderForm form,
                  const SaveOptions& options = {}) {
  SafetensorsWriter writer;
  add_encoder(writer, config, parameters, form, options);
  writer.write(path);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
