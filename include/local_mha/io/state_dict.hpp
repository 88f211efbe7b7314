// SPDX-License-Identifier: MIT
/// \file
/// Names and shapes of the Python modules' state dicts, gone through once for reading and writing.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io::detail {

/// `10000^(-2m/D)`, `m < D/2`: the buffer `inv_freq` of the rotary embedding.
inline Vector<double> rotary_frequencies(Index dim_head) {
  Vector<double> frequencies(dim_head / 2);
  for (Index m = 0; m < frequencies.size(); ++m)
    frequencies[m] = std::pow(10000., static_cast<double>(-2 * m) / static_cast<double>(dim_head));
  return frequencies;
}

/// `(2m + 0.4·D) / (1.4·D)`, `m < D/2`: the buffer `scale` of xPos.
inline Vector<double> xpos_scales(Index dim_head) {
  Vector<double> scales(dim_head / 2);
  const auto dim = static_cast<double>(dim_head);
  for (Index m = 0; m < scales.size(); ++m)
    scales[m] = (2 * static_cast<double>(m) + 0.4 * dim) / (1.4 * dim);
  return scales;
}

/// Reads tensors under a prefix, and knows which were read.
template <typename Scalar>
class StateDictReader {
 public:
  StateDictReader(const SafetensorsFile& file, std::string prefix)
      : file_(file), prefix_(std::move(prefix)) {}

  /// A weight that the configuration has if `used`.
  void tensor(bool used, const std::string& name, RowMatrix<Scalar>& matrix, Index rows,
              Index cols) {
    if (!used) return;
    require(name, {{rows, cols}});
    matrix.resize(rows, cols);
    read(name, {matrix.data(), static_cast<std::size_t>(matrix.size())});
  }

  void tensor(bool used, const std::string& name, Vector<Scalar>& vector, Index size) {
    if (!used) return;
    require(name, {{size}});
    vector.resize(size);
    read(name, {vector.data(), static_cast<std::size_t>(size)});
  }

  /// Projections of the same input, `[rows, cols]` each, in one tensor or one each.
  void stacked(const std::string& name, const std::array<std::string, 3>& parts,
               RowMatrix<Scalar>& matrix, Index rows, Index cols) {
    const bool apart = !has(name) && (has(parts[0]) || has(parts[1]) || has(parts[2]));
    if (!apart) return tensor(true, name, matrix, 3 * rows, cols);
    for (const std::string& part : parts) require(part, {{rows, cols}});
    matrix.resize(3 * rows, cols);
    const auto size = static_cast<std::size_t>(rows * cols);
    for (std::size_t i = 0; i < parts.size(); ++i) read(parts[i], {matrix.data() + i * size, size});
  }

  /// `branch.` where the module of a layer stands in a residual connection of its own.
  std::string branch(const std::string& layer) const {
    return has_any(prefix_ + layer + "branch.") ? "branch." : "";
  }

  /// The weights of layer `i` of `count`.
  template <typename Layer>
  Layer& layer(std::vector<Layer>& layers, Index /*i*/, Index /*count*/) {
    return layers.emplace_back();
  }

  /// A set of weights that the configuration has if `used`.
  template <typename Parameters>
  Parameters* optional(bool used, const std::string& /*name*/, std::optional<Parameters>& set) {
    return used ? &set.emplace() : nullptr;
  }

  /// The buffers of the rotary embedding, if they are there, must be those that are computed with.
  void rotary_buffers(const std::string& prefix, Index dim_head) {
    if (has(prefix + "inv_freq")) require_equal(prefix + "inv_freq", rotary_frequencies(dim_head));
    if (has(prefix + "scale")) require_equal(prefix + "scale", xpos_scales(dim_head));
  }

  /// \throws SafetensorsError if a tensor under the prefix was not read
  void reject_unexpected() const {
    const auto& entries = file_.entries();
    for (auto named = entries.lower_bound(prefix_);
         named != entries.end() && named->first.starts_with(prefix_); ++named) {
      const std::string& name = named->first;
      if (read_.contains(name) || (prefix_.empty() && is_of_case(name))) continue;
      std::string problem =
          "expected no such tensor for this configuration, got " + to_string(named->second);
      for (const char* hyper_connection : {"static_alpha", "static_beta", "dynamic_alpha"})
        if (name.find(hyper_connection) != std::string::npos)
          problem += "; hyper-connections (num_residual_streams > 1) are not supported";
      throw SafetensorsError(file_.file_name(), name, named->second.offset, problem);
    }
  }

 private:
  bool has(const std::string& name) const { return file_.contains(prefix_ + name); }

  bool has_any(const std::string& prefix) const {
    const auto first = file_.entries().lower_bound(prefix);
    return first != file_.entries().end() && first->first.starts_with(prefix);
  }

  // Inputs, outputs and gradients may stand beside a state dict that has no prefix.
  static bool is_of_case(const std::string& name) {
    return name.starts_with("input/") || name.starts_with("output/") || name.starts_with("grad/");
  }

  void require(const std::string& name, const std::vector<Index>& shape) {
    const std::string full_name = prefix_ + name;
    TensorEntry wanted;
    wanted.shape = shape;
    const std::string expected =
        "expected F64, F32, F16 or BF16" + to_string(wanted).substr(name_of(wanted.dtype).size());
    if (!file_.contains(full_name))
      throw SafetensorsError(file_.file_name(), full_name,
                             expected + ", got no such tensor" + similar(name));
    const TensorEntry& stored = file_.entry(full_name);
    if (!is_float(stored.dtype) || stored.shape != shape)
      throw SafetensorsError(file_.file_name(), full_name, stored.offset,
                             expected + ", got " + to_string(stored));
    read_.insert(full_name);
  }

  // A hint for a wrong prefix.
  std::string similar(const std::string& name) const {
    for (const auto& named : file_.entries())
      if (named.first.ends_with(name) && !is_of_case(named.first))
        return ", but '" + printable(named.first) + "' (is the prefix '" +
               printable(named.first.substr(0, named.first.size() - name.size())) + "'?)";
    return "";
  }

  void read(const std::string& name, std::span<Scalar> out) const {
    if constexpr (std::is_same_v<Scalar, float> || std::is_same_v<Scalar, double>) {
      file_.read_into<Scalar>(prefix_ + name, out);
    } else {
      const std::vector<double> values = file_.read<double>(prefix_ + name);
      std::transform(values.begin(), values.end(), out.begin(),
                     [](double value) { return Scalar(value); });
    }
  }

  // As the Python package computes buffers in float, whatever they were converted to later.
  void require_equal(const std::string& name, const Vector<double>& expected) {
    require(name, {expected.size()});
    const TensorEntry& stored = file_.entry(prefix_ + name);
    double tolerance = 16 * static_cast<double>(std::numeric_limits<float>::epsilon());
    if (stored.dtype == Dtype::F16) tolerance += 0x1p-11;
    if (stored.dtype == Dtype::BF16) tolerance += 0x1p-8;
    const std::vector<double> values = file_.read<double>(prefix_ + name);
    for (std::size_t m = 0; m < values.size(); ++m) {
      const double wanted = expected[static_cast<Index>(m)];
      if (!(std::abs(values[m] - wanted) <= tolerance * wanted))
        throw SafetensorsError(
            file_.file_name(), prefix_ + name, stored.offset + m * size_of(stored.dtype),
            "expected " + nlohmann::json(wanted).dump() + " at " + std::to_string(m) + ", got " +
                nlohmann::json(values[m]).dump() + "; this library computes with the former");
    }
  }

  const SafetensorsFile& file_;
  std::string prefix_;
  std::set<std::string, std::less<>> read_;
};

/// Adds tensors under a prefix, and checks that they have the shapes that the configuration says.
template <typename Scalar>
class StateDictWriter {
 public:
  /// \param dtype empty: as `Scalar` is
  StateDictWriter(SafetensorsWriter& writer, std::string prefix, std::optional<Dtype> dtype)
      : writer_(writer), prefix_(std::move(prefix)), dtype_(dtype.value_or(dtype_of<Scalar>())) {
    if (!is_float(dtype_)) reject("dtype", "F64, F32, F16 or BF16", name_of(dtype_));
  }

  void tensor(bool used, const std::string& name, const RowMatrix<Scalar>& matrix, Index rows,
              Index cols) {
    const auto expected = used ? std::array<Index, 2>{rows, cols} : std::array<Index, 2>{0, 0};
    require_shape(name, std::array<Index, 2>{matrix.rows(), matrix.cols()}, expected);
    if (used) writer_.add(prefix_ + name, matrix, dtype_);
  }

  void tensor(bool used, const std::string& name, const Vector<Scalar>& vector, Index size) {
    require_shape(name, std::array<Index, 1>{vector.size()}, {used ? size : 0});
    if (used) writer_.add(prefix_ + name, vector, dtype_);
  }

  void stacked(const std::string& name, const std::array<std::string, 3>& /*parts*/,
               const RowMatrix<Scalar>& matrix, Index rows, Index cols) {
    tensor(true, name, matrix, 3 * rows, cols);
  }

  static std::string branch(const std::string& /*layer*/) { return "branch."; }

  template <typename Layer>
  static const Layer& layer(const std::vector<Layer>& layers, Index i, Index count) {
    if (static_cast<Index>(layers.size()) != count)
      reject("layers", std::to_string(count), layers.size());
    return layers[static_cast<std::size_t>(i)];
  }

  template <typename Parameters>
  static const Parameters* optional(bool used, const std::string& name,
                                    const std::optional<Parameters>& set) {
    if (used != set.has_value())
      reject(name, used ? "weights, because the configuration has it" : "no weights",
             set ? "some" : "none");
    return set ? &*set : nullptr;
  }

  /// Python's `load_state_dict` would miss them.
  void rotary_buffers(const std::string& prefix, Index dim_head) {
    writer_.add(prefix_ + prefix + "inv_freq", rotary_frequencies(dim_head),
                dtype_ == Dtype::F64 ? Dtype::F64 : Dtype::F32);
  }

 private:
  SafetensorsWriter& writer_;
  std::string prefix_;
  Dtype dtype_;
};

/// Goes through the weights of a LocalMHA.
/// \tparam StateDict StateDictReader, which sizes and fills them, or StateDictWriter
template <typename StateDict, typename Parameters>
void visit_state_dict(StateDict& state_dict, const std::string& prefix,
                      const LocalMHAConfig& config, Parameters& p) {
  const Index inner = config.heads * config.dim_head;
  state_dict.tensor(config.prenorm, prefix + "norm.weight", p.norm_weight, config.dim);
  state_dict.tensor(config.prenorm, prefix + "norm.bias", p.norm_bias, config.dim);
  state_dict.stacked(prefix + "to_qkv.weight",
                     {prefix + "to_q.weight", prefix + "to_k.weight", prefix + "to_v.weight"},
                     p.to_qkv, inner, config.dim);
  state_dict.tensor(config.qk_rmsnorm, prefix + "q_scale", p.q_scale, config.dim_head);
  state_dict.tensor(config.qk_rmsnorm, prefix + "k_scale", p.k_scale, config.dim_head);
  if (config.use_rotary_pos_emb)
    state_dict.rotary_buffers(prefix + "attn_fn.rel_pos.", config.dim_head);
  const bool gated = config.gate_values_per_head;
  state_dict.tensor(gated, prefix + "to_v_gate.0.weight", p.to_v_gate_weight, config.heads,
                    config.dim);
  state_dict.tensor(gated, prefix + "to_v_gate.0.bias", p.to_v_gate_bias, config.heads);
  state_dict.tensor(true, prefix + "to_out.weight", p.to_out, config.dim, inner);
}

/// Goes through the weights of a FeedForward.
template <typename StateDict, typename Parameters>
void visit_state_dict(StateDict& state_dict, const std::string& prefix, Index dim, Index inner,
                      Parameters& p) {
  state_dict.tensor(true, prefix + "0.weight", p.norm_weight, dim);
  state_dict.tensor(true, prefix + "0.bias", p.norm_bias, dim);
  state_dict.tensor(true, prefix + "1.weight", p.proj_in, 2 * inner, dim);
  state_dict.tensor(true, prefix + "4.weight", p.proj_out, dim, inner);
}

/// Goes through the weights of a LocalTransformer.
template <typename StateDict, typename Parameters>
void visit_state_dict(StateDict& state_dict, const std::string& prefix,
                      const LocalTransformerConfig& config, Parameters& p) {
  const Index dim = config.dim;
  state_dict.tensor(true, prefix + "token_emb.weight", p.token_emb, config.num_tokens, dim);
  state_dict.tensor(true, prefix + "pos_emb.weight", p.pos_emb, config.max_seq_len, dim);
  for (Index i = 0; i < config.depth; ++i) {
    auto& layer = state_dict.layer(p.layers, i, config.depth);
    const std::string attention = prefix + "layers." + std::to_string(i) + ".0.";
    const std::string feed_forward = prefix + "layers." + std::to_string(i) + ".1.";
    visit_state_dict(state_dict, attention + state_dict.branch(attention), layer_config(config),
                     layer.attention);
    visit_state_dict(state_dict, feed_forward + state_dict.branch(feed_forward), dim,
                     feed_forward_inner_dim(dim, config.ff_mult), layer.feed_forward);
  }
  const std::string bias = prefix + "dynamic_pos_bias.";
  if (auto* mlp = state_dict.optional(config.use_dynamic_pos_bias, "dynamic_pos_bias",
                                      p.dynamic_pos_bias)) {
    const Index hidden = dim / 2;
    state_dict.tensor(true, bias + "mlp.0.weight", mlp->weight_0, hidden, 1);
    state_dict.tensor(true, bias + "mlp.0.bias", mlp->bias_0, hidden);
    state_dict.tensor(true, bias + "mlp.2.weight", mlp->weight_2, hidden, hidden);
    state_dict.tensor(true, bias + "mlp.2.bias", mlp->bias_2, hidden);
    state_dict.tensor(true, bias + "mlp.4.weight", mlp->weight_4, config.heads, hidden);
    state_dict.tensor(true, bias + "mlp.4.bias", mlp->bias_4, config.heads);
  }
  state_dict.tensor(true, prefix + "to_logits.0.weight", p.to_logits_norm_weight, dim);
  state_dict.tensor(true, prefix + "to_logits.0.bias", p.to_logits_norm_bias, dim);
  state_dict.tensor(true, prefix + "to_logits.1.weight", p.to_logits, config.num_tokens, dim);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io::detail
