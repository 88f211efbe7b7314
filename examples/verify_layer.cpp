// SPDX-License-Identifier: MIT
/// \file
/// Runs a layer that was exported from Python and compares its outputs, and its gradients, with
/// Python's.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iomanip>
#include <iostream>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include <local_mha/io/attention_case.hpp>
#include <local_mha/io/attention_layers.hpp>
#include <local_mha/io/encoder_weights.hpp>
#include <local_mha/io/longformer_layers.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>
#include <local_mha/longformer.hpp>

#include "case_file.hpp"
#include "chunks.hpp"
#include "output_file.hpp"
#include "program.hpp"

namespace {

using local_mha::Index;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::TensorView;
using local_mha::examples::CaseFiles;
namespace examples = local_mha::examples;
namespace io = local_mha::io;

struct Options {
  std::string case_path;
  std::string weights_path;
  std::string scalar = "double";
  std::optional<double> tolerance;
  std::string output_path;
  std::optional<Index> chunk;  ///< of a stream; empty: the full forward pass
  std::uint64_t seed = 0;

  /// How sequences are cut, if they are to go through a stream.
  std::optional<examples::ChunkConfig> chunks() const {
    if (!chunk) return std::nullopt;
    return examples::ChunkConfig{.size = *chunk, .seed = seed};
  }
};

/// How far an output is from the expected one.
struct Comparison {
  std::string name;
  std::string stored;         // dtype and shape
  double largest = 0;         // expected element
  double absolute_error = 0;  // infinite where one of the two is not finite
  double relative_error = 0;  // to the largest expected element
  double tolerance = 0;

  bool passed() const { return relative_error <= tolerance; }
};

/// What is reached in this precision, relative to the largest output.
double usual_tolerance(io::Dtype dtype) {
  switch (dtype) {
    case io::Dtype::F64:
      return 1e-10;
    case io::Dtype::F32:
      return 2e-5;
    case io::Dtype::F16:
      return 2e-3;
    default:
      return 2e-2;
  }
}

/// The same for gradients, which go through twice as many steps.
double usual_gradient_tolerance(io::Dtype dtype) {
  switch (dtype) {
    case io::Dtype::F64:
      return 1e-9;
    case io::Dtype::F32:
      return 1e-4;
    case io::Dtype::F16:
      return 5e-3;
    default:
      return 5e-2;
  }
}

bool is_gradient(const std::string& name) { return name.starts_with("grad/"); }

/// The name of a weight in a file where `branch` stands before those of a layer's modules.
std::string in_file(std::string name, const std::string& branch) {
  constexpr std::string_view usual = "branch.";
  if (const auto at = name.find(usual); at != std::string::npos)
    name.replace(at, usual.size(), branch);
  return name;
}

/// Compares outputs and gradients with a file's, and keeps them for another file.
class Outputs {
 public:
  Outputs(const io::SafetensorsFile& expected, const std::optional<double>& tolerance)
      : expected_(expected), tolerance_(tolerance) {
    for (const std::string& name : expected.names())
      if (is_gradient(name))
        for (const double value : expected.read<double>(name))
          if (std::isfinite(value))
            largest_gradient_ = std::max(largest_gradient_, std::abs(value));
  }

  /// `grad/name`
  template <typename Scalar, int Rank>
  void add_gradient(const std::string& name, const Tensor<Scalar, Rank>& computed) {
    add("grad/" + name, computed);
  }

  /// `grad/param/…` of every weight.
  /// \param branch see in_file()
  template <typename Parameters>
  void add_gradients(const Parameters& parameters, const std::string& branch = "branch.") {
    local_mha::for_each_parameter(parameters, [&](const std::string& name, const auto& gradient) {
      using Gradient = std::decay_t<decltype(gradient)>;
      using Scalar = typename Gradient::Scalar;
      const std::string full = "grad/param/" + in_file(name, branch);
      std::vector<Index> shape;
      if (Gradient::RowsAtCompileTime != 1) shape.push_back(gradient.rows());
      if (Gradient::ColsAtCompileTime != 1) shape.push_back(gradient.cols());
      add<Scalar>(full, shape, {gradient.data(), static_cast<std::size_t>(gradient.size())});
    });
  }

  template <typename Scalar, int Rank>
  void add(const std::string& name, const Tensor<Scalar, Rank>& computed) {
    const auto shape = TensorView<const Scalar, Rank>(computed).dimensions();
    add<Scalar>(name, shape, {computed.data(), static_cast<std::size_t>(computed.size())});
  }

  /// Compares it, if the file has it.
  /// \param shape the stored one must be this, but for a single number, which may be `[]` or `[1]`
  template <typename Scalar>
  void add(const std::string& name, std::span<const Index> shape,
           std::span<const Scalar> computed) {
    if (!expected_.contains(name)) return skip(name);
    const io::TensorEntry& stored = expected_.entry(name);
    if (!std::ranges::equal(stored.shape, shape) &&
        !(shape.empty() && stored.shape == std::vector<Index>{1}))
      throw io::SafetensorsError(
          expected_.file_name(), name,
          "expected the shape " + text(shape) + " that the layer gives, got " + text(stored.shape));
    const std::vector<double> expected = expected_.read<double>(name);
    Comparison result{.name = name, .stored = to_string(stored)};
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double error = std::abs(static_cast<double>(computed[i]) - expected[i]);
      // Not a number compares as nothing: infinitely far.
      result.absolute_error =
          std::max(result.absolute_error,
                   std::isfinite(error) ? error : std::numeric_limits<double>::infinity());
      if (std::isfinite(expected[i]))
        result.largest = std::max(result.largest, std::abs(expected[i]));
    }
    // A gradient that is 0 by its nature is the rounding of larger terms, in Python too.
    double size = is_gradient(name) && result.largest < 1e-12 * largest_gradient_
                      ? largest_gradient_
                      : result.largest;
    if (is_gradient(name) && shape.empty()) size = std::max(size, largest_beside(name));
    result.relative_error = result.absolute_error > 0 ? result.absolute_error / size : 0;
    const auto usual = is_gradient(name) ? usual_gradient_tolerance : usual_tolerance;
    result.tolerance =
        tolerance_.value_or(std::max(usual(io::dtype_of<Scalar>()), usual(stored.dtype)));
    comparisons_.push_back(std::move(result));
    computed_.add(name, stored.shape, computed);
  }

  /// Notes that the file does not have it.
  void skip(const std::string& name) { skipped_.push_back(name); }

  const std::vector<Comparison>& comparisons() const { return comparisons_; }
  /// What the layer gives and the file does not have.
  const std::vector<std::string>& skipped() const { return skipped_; }
  io::SafetensorsWriter& computed() { return computed_; }

 private:
  // The largest element of the gradients of a module's own tensors. That of a single number, such
  // as the scale of a function, is a sum of terms of their size, which may be much smaller than
  // they.
  double largest_beside(const std::string& name) const {
    const std::string module = name.substr(0, name.rfind('.') + 1);
    double largest = 0;
    for (const std::string& other : expected_.names())
      if (other.starts_with(module) && other.find('.', module.size()) == std::string::npos)
        for (const double value : expected_.read<double>(other))
          if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
    return largest;
  }

  static std::string text(std::span<const Index> shape) {
    std::ostringstream text;
    text << '[';
    for (std::size_t axis = 0; axis < shape.size(); ++axis)
      text << (axis ? ", " : "") << shape[axis];
    text << ']';
    return text.str();
  }

  const io::SafetensorsFile& expected_;
  std::optional<double> tolerance_;
  double largest_gradient_ = 0;
  std::vector<Comparison> comparisons_;
  std::vector<std::string> skipped_;
  io::SafetensorsWriter computed_;
};

/// The gradients that a layer has: of its inputs and its weights.
/// \throws io::SafetensorsError naming one that the file has beside them, or that cannot be
///         computed for want of `input/grad_y`
template <typename Parameters>
void require_known_gradients(const io::SafetensorsFile& file, std::vector<std::string> known,
                             const Parameters& parameters, bool has_grad_y,
                             const std::string& branch = "branch.") {
  local_mha::for_each_parameter(parameters, [&](const std::string& name, const auto&) {
    known.push_back("param/" + in_file(name, branch));
  });
  examples::require_known(file, "grad/", known);
  for (const std::string& name : file.names())
    if (!has_grad_y && is_gradient(name))
      throw io::SafetensorsError(file.file_name(), name,
                                 "expected input/grad_y beside it, the gradient of the output");
}

using Chunks = std::optional<examples::ChunkConfig>;

template <typename Scalar>
void run_mha(const CaseFiles& files, const Chunks& chunks, Outputs& outputs) {
  examples::require_known(files.inputs, "input/", {"x", "keep_mask", "attn_bias", "grad_y"});
  examples::require_known(files.inputs, "output/", {"y"});
  auto [config, parameters] = io::load_local_mha<Scalar>(files.weights);
  const local_mha::LocalMHA<Scalar> mha(config, std::move(parameters));
  const auto x = files.inputs.tensor<Scalar, 3>("input/x");
  const auto attn_bias = examples::read_attn_bias<Scalar>(files.inputs);
  const PaddingMask mask = examples::read_mask(files.inputs);
  const bool has_grad_y = files.inputs.contains("input/grad_y");
  require_known_gradients(files.inputs, {"x", "attn_bias"}, mha.parameters(), has_grad_y);
  // A stream has no way back.
  if (chunks) {
    typename local_mha::LocalMHA<Scalar>::Stream stream(mha, {.batch = x.dimension(0)},
                                                        examples::view(attn_bias));
    if (mask) local_mha::require_shape("mask", mask.shape(), {x.dimension(0), x.dimension(1)});
    outputs.add("output/y", examples::in_chunks<Scalar, 3>(
                                {x.dimension(0), x.dimension(1), mha.config().dim}, 1, *chunks,
                                [&](Index begin, Index size) {
                                  return stream.push(
                                      examples::positions_of(x, 1, begin, size),
                                      {.mask = examples::positions_of(mask, begin, size)});
                                },
                                [&] { return stream.flush(); }));
    return;
  }
  typename local_mha::LocalMHA<Scalar>::Saved saved;
  outputs.add("output/y", mha.forward_saving(saved, x, mask, examples::view(attn_bias)));
  if (!has_grad_y) return;
  auto gradients = local_mha::LocalMHAParameters<Scalar>::zeros(mha.config());
  std::optional<Tensor<Scalar, 3>> grad_bias;
  if (attn_bias) grad_bias = attn_bias->constant(Scalar(0));
  outputs.add_gradient(
      "x", mha.backward(gradients, saved, files.inputs.tensor<Scalar, 3>("input/grad_y"), x, mask,
                        examples::view(attn_bias), {}, grad_bias ? &*grad_bias : nullptr));
  if (grad_bias) outputs.add_gradient("attn_bias", *grad_bias);
  outputs.add_gradients(gradients);
}

/// `[B, N, C]` from `[B, C, N]`, and the reverse.
template <typename Scalar>
Tensor<Scalar, 3> transposed(const Tensor<Scalar, 3>& t) {
  return t.shuffle(std::array<Index, 3>{0, 2, 1});
}

/// Gives rows of padding, which may hold anything, what `output/y` has there.
template <typename Scalar>
void take_padding(const io::SafetensorsFile& file, const PaddingMask& mask, Tensor<Scalar, 3>& y) {
  if (!mask || !file.contains("output/y")) return;
  const auto expected = file.tensor<Scalar, 3>("output/y");
  local_mha::require_shape("output/y", TensorView<const Scalar, 3>(expected).dimensions(),
                           TensorView<const Scalar, 3>(y).dimensions());
  for (Index b = 0; b < y.dimension(0); ++b)
    for (Index i = 0; i < y.dimension(1); ++i)
      if (mask.row(b)[i] != 0) y.chip(b, 0).chip(i, 0) = expected.chip(b, 0).chip(i, 0);
}

/// The gradients of a model's layer, `param/…` of its tensors.
template <typename Scalar>
void require_known_gradients(const io::SafetensorsFile& file,
                             const std::vector<io::LayerTensor>& tensors) {
  std::vector<std::string> known{"x"};
  for (const io::LayerTensor& tensor : tensors) known.push_back("param/" + tensor.name);
  require_known_gradients(file, std::move(known), local_mha::LocalMHAParameters<Scalar>(),
                          file.contains("input/grad_y"));
}

template <typename Scalar>
void add_gradients(const std::vector<io::LayerTensor>& tensors,
                   const std::map<std::string, std::vector<Scalar>>& gradients, Outputs& outputs) {
  for (const io::LayerTensor& tensor : tensors)
    outputs.add<Scalar>("grad/param/" + tensor.name, tensor.shape, gradients.at(tensor.name));
}

/// The attention layer of a published model.
template <typename Scalar>
class ModelLayer {
 public:
  explicit ModelLayer(const CaseFiles& files)
      : file_(files.inputs),
        layer_(io::read_attention_case(file_)),
        mha_(layer_.config, io::load_attention_parameters<Scalar>(file_, "param/", layer_)),
        x_(rows("input/x")),
        mask_(examples::read_mask(file_)) {}

  void run(const Chunks& chunks, Outputs& outputs) const {
    examples::require_known(
        file_, "input/", {"x", "keep_mask", "grad_y", "inv_freq", "position_cos", "position_sin"});
    examples::require_known(file_, "output/", {"y"});
    require_known_gradients<Scalar>(file_, layer_.tensors);
    if (chunks) return outputs.add("output/y", module_output(stream(*chunks)));
    typename local_mha::LocalMHA<Scalar>::Saved saved;
    outputs.add("output/y", module_output(mha_.forward_saving(saved, x_, mask_)));
    if (file_.contains("input/grad_y")) add_all_gradients(saved, outputs);
  }

 private:
  Tensor<Scalar, 3> rows(const char* name) const {
    auto t = file_.tensor<Scalar, 3>(name);
    return layer_.channels_first ? transposed(t) : t;
  }
  Tensor<Scalar, 3> as_of_module(const Tensor<Scalar, 3>& t) const {
    return layer_.channels_first ? transposed(t) : t;
  }

  Tensor<Scalar, 3> stream(const examples::ChunkConfig& chunks) const {
    typename local_mha::LocalMHA<Scalar>::Stream stream(mha_, {.batch = x_.dimension(0)});
    if (mask_) local_mha::require_shape("mask", mask_.shape(), {x_.dimension(0), x_.dimension(1)});
    return examples::in_chunks<Scalar, 3>(
        {x_.dimension(0), x_.dimension(1), mha_.config().dim}, 1, chunks,
        [&](Index begin, Index size) {
          return stream.push(examples::positions_of(x_, 1, begin, size),
                             {.mask = examples::positions_of(mask_, begin, size)});
        },
        [&] { return stream.flush(); });
  }

  Tensor<Scalar, 3> module_output(Tensor<Scalar, 3> y) const {
    if (layer_.residual) y += x_;
    y = as_of_module(y);
    if (!layer_.channels_first) take_padding(file_, mask_, y);
    return y;
  }

  void add_all_gradients(const typename local_mha::LocalMHA<Scalar>::Saved& saved,
                         Outputs& outputs) const {
    const Tensor<Scalar, 3> grad_y = rows("input/grad_y");
    auto gradients = local_mha::LocalMHAParameters<Scalar>::zeros(mha_.config());
    Tensor<Scalar, 3> grad_x = mha_.backward(gradients, saved, grad_y, x_, mask_);
    if (layer_.residual) grad_x += grad_y;
    outputs.add_gradient("x", as_of_module(grad_x));
    add_gradients(layer_.tensors, io::attention_gradients(layer_, gradients), outputs);
  }

  const io::SafetensorsFile& file_;
  io::AttentionLayer layer_;
  local_mha::LocalMHA<Scalar> mha_;
  Tensor<Scalar, 3> x_;
  PaddingMask mask_;
};

template <typename Scalar>
void run_longformer(const io::SafetensorsFile& file, const Chunks& chunks, Outputs& outputs) {
  if (chunks)
    local_mha::reject("--stream", "none, because global rows may come later than who sees them",
                      chunks->size);
  examples::require_known(file, "input/", {"x", "keep_mask", "global_mask", "grad_y"});
  examples::require_known(file, "output/", {"y"});
  const io::LongformerLayer layer = io::read_longformer_case(file);
  const local_mha::LongformerAttention<Scalar> attention(
      layer.config, io::load_longformer_parameters<Scalar>(file, "param/", layer));
  require_known_gradients<Scalar>(file, layer.tensors);
  const auto x = file.tensor<Scalar, 3>("input/x");
  Tensor<bool, 2> flags;
  local_mha::LongformerCall call{.mask = examples::read_mask(file)};
  if (file.contains("input/global_mask"))
    call.global_rows = flags = file.tensor<bool, 2>("input/global_mask");
  typename local_mha::LongformerAttention<Scalar>::Saved saved;
  Tensor<Scalar, 3> y = attention.forward_saving(saved, x, call);
  take_padding(file, call.mask, y);
  outputs.add("output/y", y);
  if (!file.contains("input/grad_y")) return;
  auto gradients = local_mha::LongformerParameters<Scalar>::zeros(layer.config);
  outputs.add_gradient(
      "x", attention.backward(gradients, saved, file.tensor<Scalar, 3>("input/grad_y"), x, call));
  add_gradients(layer.tensors, io::longformer_gradients(layer, gradients), outputs);
}

template <typename Scalar>
void run_attention(const CaseFiles& files, const Chunks& chunks, Outputs& outputs) {
  examples::require_known(files.inputs, "input/",
                          {"q", "k", "v", "keep_mask", "attn_bias", "grad_y"});
  examples::require_known(files.inputs, "output/", {"y"});
  const local_mha::LocalAttention<Scalar> attention(io::load_local_attention(files.weights));
  const auto q = files.inputs.tensor<Scalar, 4>("input/q");
  const auto k = files.inputs.tensor<Scalar, 4>("input/k");
  const auto v = files.inputs.tensor<Scalar, 4>("input/v");
  const auto attn_bias = examples::read_attn_bias<Scalar>(files.inputs);
  const PaddingMask mask = examples::read_mask(files.inputs);
  local_mha::LocalAttentionCall<Scalar> call{.attn_bias = examples::view(attn_bias),
                                             .window_size = examples::window_size_of_call(files)};
  const bool has_grad_y = files.inputs.contains("input/grad_y");
  require_known_gradients(files.inputs, {"q", "k", "v", "attn_bias"},
                          local_mha::LocalMHAParameters<Scalar>(), has_grad_y);
  if (chunks) {
    const Index batch = q.dimension(0);
    const Index seqlen = q.dimension(2);
    local_mha::require_shape("k", k.dimensions(), q.dimensions());
    local_mha::require_shape("v", v.dimensions(), q.dimensions());
    if (mask) local_mha::require_shape("mask", mask.shape(), {batch, seqlen});
    typename local_mha::LocalAttention<Scalar>::Stream stream(
        attention, q.dimension(1), q.dimension(3), {.batch = batch}, call);
    outputs.add("output/y", examples::in_chunks<Scalar, 4>(
                                {batch, q.dimension(1), seqlen, q.dimension(3)}, 2, *chunks,
                                [&](Index begin, Index size) {
                                  return stream.push(
                                      examples::positions_of(q, 2, begin, size),
                                      examples::positions_of(k, 2, begin, size),
                                      examples::positions_of(v, 2, begin, size),
                                      {.mask = examples::positions_of(mask, begin, size)});
                                },
                                [&] { return stream.flush(); }));
    return;
  }
  call.mask = mask;
  const auto saved = attention.forward_saving(q, k, v, call);
  outputs.add("output/y", saved.out);
  if (!has_grad_y) return;
  auto gradients =
      attention.backward(saved, files.inputs.tensor<Scalar, 4>("input/grad_y"), q, k, v, call);
  // In Python shared queries and keys are one tensor.
  const bool are_one = attention.config().shared_qk && !files.inputs.contains("grad/k");
  if (are_one) gradients.q += gradients.k;
  outputs.add_gradient("q", gradients.q);
  if (!are_one) outputs.add_gradient("k", gradients.k);
  outputs.add_gradient("v", gradients.v);
  if (gradients.attn_bias) outputs.add_gradient("attn_bias", *gradients.attn_bias);
}

/// The logits by a stream, or by the full forward pass.
template <typename Scalar>
Tensor<Scalar, 3> logits_of(const local_mha::LocalTransformer<Scalar>& model,
                            const Tensor<std::int64_t, 2>& tokens, const PaddingMask& mask,
                            const Chunks& chunks) {
  if (!chunks) return model.forward(tokens, {.mask = mask});
  const Index batch = tokens.dimension(0);
  const Index seqlen = tokens.dimension(1);
  if (mask) local_mha::require_shape("mask", mask.shape(), {batch, seqlen});
  typename local_mha::LocalTransformer<Scalar>::Stream stream(model, {.batch = batch});
  return examples::in_chunks<Scalar, 3>(
      {batch, seqlen, model.config().num_tokens}, 1, *chunks,
      [&](Index begin, Index size) {
        return stream.push(examples::positions_of(tokens, 1, begin, size),
                           {.mask = examples::positions_of(mask, begin, size)});
      },
      [&] { return stream.flush(); });
}

template <typename Scalar>
void run_transformer(const CaseFiles& files, const Chunks& chunks, Outputs& outputs) {
  examples::require_known(files.inputs, "input/", {"tokens", "keep_mask"});
  examples::require_known(files.inputs, "output/", {"logits", "loss"});
  auto [config, parameters] = io::load_local_transformer<Scalar>(files.weights);
  const local_mha::LocalTransformer<Scalar> model(config, std::move(parameters));
  const auto tokens = files.inputs.tensor<std::int64_t, 2>("input/tokens");
  const PaddingMask mask = examples::read_mask(files.inputs);
  const Index length = tokens.dimension(1);
  if (files.inputs.contains("output/logits")) {
    // The last token of a sequence is a label only, unless there are logits for it.
    const io::TensorEntry& logits = files.inputs.entry("output/logits");
    const bool has_labels = files.inputs.contains("output/loss") ||
                            (logits.shape.size() == 3 && logits.shape[1] != length);
    const auto input =
        examples::positions_of(tokens, 1, 0, has_labels && length > 0 ? length - 1 : length);
    outputs.add("output/logits", logits_of(model, input, mask, chunks));
  } else {
    outputs.skip("output/logits");
  }
  require_known_gradients(files.inputs, {}, model.parameters(), true);
  const std::vector<std::string> names = files.inputs.names();
  const bool has_gradients = std::ranges::any_of(names, is_gradient);
  if (!files.inputs.contains("output/loss") && (!has_gradients || chunks))
    return outputs.skip("output/loss");
  if (chunks) {
    if (length < 1) local_mha::reject("input/tokens", "at least 1 in each sequence", length);
    const Scalar loss = local_mha::cross_entropy<Scalar>(
        logits_of(model, examples::positions_of(tokens, 1, 0, length - 1), mask, chunks),
        examples::positions_of(tokens, 1, 1, length - 1), model.config().ignore_index);
    outputs.add<Scalar>("output/loss", {}, {&loss, 1});
    return;
  }
  auto gradients = local_mha::LocalTransformerParameters<Scalar>::zeros(model.config());
  const Scalar loss = has_gradients ? model.backward(gradients, tokens, {.mask = mask})
                                    : model.loss(tokens, {.mask = mask});
  outputs.add<Scalar>("output/loss", {}, {&loss, 1});
  if (has_gradients) outputs.add_gradients(gradients);
}

template <typename Scalar>
void run_encoder(const CaseFiles& files, const Chunks& chunks, Outputs& outputs) {
  examples::require_known(files.inputs, "input/", {"x", "keep_mask", "grad_y"});
  examples::require_known(files.inputs, "output/", {"y"});
  auto [config, parameters] = io::load_encoder<Scalar>(files.weights);
  const local_mha::Encoder<Scalar> encoder(config, std::move(parameters));
  const auto x = files.inputs.tensor<Scalar, 3>("input/x");
  const PaddingMask mask = examples::read_mask(files.inputs);
  const bool has_grad_y = files.inputs.contains("input/grad_y");
  const std::string branch =
      files.kind == "Stack" && config.num_residual_streams == 1 ? "" : "branch.";
  require_known_gradients(files.inputs, {"x"}, encoder.parameters(), has_grad_y, branch);
  if (chunks) {
    typename local_mha::Encoder<Scalar>::Stream stream(encoder, {.batch = x.dimension(0)});
    if (mask) local_mha::require_shape("mask", mask.shape(), {x.dimension(0), x.dimension(1)});
    outputs.add("output/y",
                examples::in_chunks<Scalar, 3>(
                    {x.dimension(0), x.dimension(1), layer_config(config, 0).dim}, 1, *chunks,
                    [&](Index begin, Index size) {
                      return stream.push(examples::positions_of(x, 1, begin, size),
                                         {.mask = examples::positions_of(mask, begin, size)});
                    },
                    [&] { return stream.flush(); }));
    return;
  }
  typename local_mha::Encoder<Scalar>::Saved saved;
  outputs.add("output/y", encoder.forward_saving(saved, x, {.mask = mask}));
  if (!has_grad_y) return;
  auto gradients = local_mha::EncoderParameters<Scalar>::zeros(config);
  outputs.add_gradient(
      "x", encoder.backward(gradients, saved, files.inputs.tensor<Scalar, 3>("input/grad_y")));
  outputs.add_gradients(gradients, branch);
}

template <typename Scalar>
void compute(const CaseFiles& files, const Chunks& chunks, Outputs& outputs) {
  examples::window_size_of_call(files);
  if (io::is_longformer(files.family)) return run_longformer<Scalar>(files.inputs, chunks, outputs);
  if (!files.family.empty()) return ModelLayer<Scalar>(files).run(chunks, outputs);
  if (files.kind == "LocalMHA") return run_mha<Scalar>(files, chunks, outputs);
  if (files.kind == "LocalAttention") return run_attention<Scalar>(files, chunks, outputs);
  if (files.is_encoder) return run_encoder<Scalar>(files, chunks, outputs);
  run_transformer<Scalar>(files, chunks, outputs);
}

void print(const std::vector<Comparison>& comparisons) {
  std::size_t name_width = 6;
  std::size_t stored_width = 8;
  for (const Comparison& c : comparisons) {
    name_width = std::max(name_width, c.name.size());
    stored_width = std::max(stored_width, c.stored.size());
  }
  const auto print_row = [&](const auto& name, const auto& stored, const auto& largest,
                             const auto& absolute, const auto& relative, const auto& tolerance,
                             const auto& verdict) {
    std::cout << std::left << std::setw(static_cast<int>(name_width)) << name << "  "
              << std::setw(static_cast<int>(stored_width)) << stored << std::right
              << std::setprecision(3) << std::setw(12) << largest << std::setw(12) << absolute
              << std::setw(12) << relative << std::setw(12) << tolerance << "  " << verdict << '\n';
  };
  print_row("output", "expected", "largest", "abs error", "rel error", "tolerance", "");
  for (const Comparison& c : comparisons)
    print_row(c.name, c.stored, c.largest, c.absolute_error, c.relative_error, c.tolerance,
              c.passed() ? "ok" : "FAILED");
}

int verify(const Options& options) {
  if (options.tolerance && !(*options.tolerance >= 0))
    local_mha::reject("--tolerance", "a number of at least 0", *options.tolerance);
  if (options.chunk && *options.chunk < 0)
    local_mha::reject("--stream", "at least 0", *options.chunk);
  examples::require_different_files(
      "--output", {{"the case", options.case_path}, {"the output", options.output_path}});
  examples::require_different_files(
      "--output", {{"the weights", options.weights_path}, {"the output", options.output_path}});
  const CaseFiles files = CaseFiles::open(options.case_path, options.weights_path);
  const std::vector<std::string> names = files.inputs.names();
  const bool has_gradients = std::ranges::any_of(names, is_gradient);
  if ((options.chunk || !has_gradients) &&
      std::ranges::none_of(names, [](const auto& name) { return name.starts_with("output/"); }))
    throw io::SafetensorsError(files.inputs.file_name(), "",
                               std::string("expected a tensor output/...") +
                                   (options.chunk ? "" : " or grad/...") +
                                   ", got none: nothing to compare");

  Outputs outputs(files.inputs, options.tolerance);
  // clang-tidy, whose macro this is, looks at one scalar: of the same templates.
#ifndef __clang_analyzer__
  if (options.scalar == "double")
    compute<double>(files, options.chunks(), outputs);
  else
#endif
    compute<float>(files, options.chunks(), outputs);

  std::cout << files.kind << " in " << options.scalar;
  if (options.chunk && *options.chunk > 0)
    std::cout << ", as a stream in chunks of " << *options.chunk;
  else if (options.chunk)
    std::cout << ", as a stream in chunks of random sizes";
  std::cout << '\n';
  if (options.chunk && has_gradients)
    std::cout << "the file's gradients are not compared: a stream has no way back\n";
  print(outputs.comparisons());
  if (!outputs.skipped().empty()) {
    std::cout << "not compared, because the file does not hold them:";
    for (const std::string& name : outputs.skipped()) std::cout << ' ' << name;
    std::cout << '\n';
  }
  if (!options.output_path.empty()) {
    if (!files.family.empty()) {
      outputs.computed().set_metadata("case", files.inputs.metadata().at("case"));
    } else {
      io::Case described = io::read_case(files.weights);
      described.call = files.call;
      described.note = "outputs and gradients computed by local_mha in " + options.scalar;
      set_case(outputs.computed(), described);
    }
    outputs.computed().write(options.output_path);
  }
  return std::ranges::all_of(outputs.comparisons(), &Comparison::passed) ? 0 : 1;
}

int run(int argc, char** argv) {
  Options options;
  CLI::App app(
      "Runs a layer exported from Python and compares its outputs and gradients with Python's.\n\n"
      "Prints, for each output that the file holds (output/y, output/logits, output/loss) and "
      "each\n"
      "gradient (grad/..., for the upstream gradient input/grad_y; a model's are of its loss), "
      "the\n"
      "largest absolute error, and that relative to the largest expected element; for gradients "
      "of\n"
      "single numbers, which are sums that cancel, to the largest of their module. Says what it\n"
      "did not compare.\n"
      "Exit status: 0 if every relative error is within the tolerance, 1 if not, 2 if the files\n"
      "cannot be used or hold nothing to compare.",
      "verify_layer");
  app.add_option(
         "case", options.case_path,
         "Inputs and expected outputs of a LocalMHA, LocalAttention or LocalTransformer, of a "
         "stack of layers, or of an attention layer of a model, as export_layer.py writes them")
      ->required()
      ->type_name("CASE.safetensors");
  app.add_option("--weights", options.weights_path,
                 "Weights and configuration, if they stand in a file of their own")
      ->type_name("MODEL.safetensors");
  app.add_option("--scalar", options.scalar, "What to compute in: float or double")
      ->check(CLI::IsMember({"float", "double"}))
      ->capture_default_str();
  app.add_option("--tolerance", options.tolerance,
                 "Largest relative error that passes. Default: the larger of what the scalar and "
                 "the stored output allow, 1e-10 for double, 2e-5 for float, 2e-3 for F16, 2e-2 "
                 "for BF16; for gradients 1e-9, 1e-4, 5e-3, 5e-2");
  auto* const stream = app.add_option(
      "--stream", options.chunk,
      "Takes the sequences through a stream, in chunks of that many positions; 0: of random sizes. "
      "Gradients are not compared then, because a stream has no way back");
  stream->type_name("CHUNK");
  app.add_option("--seed", options.seed, "Seed of the random sizes of --stream 0")
      ->needs(stream)
      ->check([](const std::string& seed) {  // the conversion would wrap it
        return seed.starts_with('-') ? "expected at least 0, got " + seed : std::string();
      })
      ->capture_default_str();
  app.add_option("--output", options.output_path, "Where to write the computed outputs")
      ->type_name("OUT.safetensors");
  if (const auto status = examples::parse(app, argc, argv)) return *status;
  return verify(options);
}

}  // namespace

int main(int argc, char** argv) {
  return examples::run_program("verify_layer", [&] { return run(argc, argv); });
}
