// SPDX-License-Identifier: MIT
/// \file
/// Names and shapes of the Python modules' state dicts, gone through once for reading and writing.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
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
#include <local_mha/encoder_config.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/ops/rotary.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// How the buffers of the rotary embedding (`inv_freq`, `scale`) in a file are taken.
enum class RotaryBuffers : std::uint8_t {
  /// They must be those that this library computes with, up to what rounding to float makes of
  /// them. A model that was converted to F16 or BF16 as a whole has others, with which Python
  /// computes other results.
  check,
  /// They are not looked at: this library's own are what the model is to be computed with.
  ignore,
};

namespace detail {

/// `θ_m`: the buffer `inv_freq` of the rotary embedding.
inline Vector<double> rotary_frequencies(Index dim_head, const RotaryConfig& rotary) {
  const std::vector<double> frequencies = local_mha::detail::frequencies_of(rotary, dim_head);
  return Eigen::Map<const Vector<double>>(frequencies.data(),
                                          static_cast<Index>(frequencies.size()));
}

/// `(2m + 0.4·D) / (1.4·D)`, `m < D/2`: the buffer `scale` of xPos.
inline Vector<double> xpos_scales(Index dim_head) {
  Vector<double> scales(dim_head / 2);
  const auto dim = static_cast<double>(dim_head);
  for (Index m = 0; m < scales.size(); ++m)
    scales[m] = (2 * static_cast<double>(m) + 0.4 * dim) / (1.4 * dim);
  return scales;
}

/// Modules that wrap another one put these before its names: torch.compile, DataParallel and
/// DistributedDataParallel, FSDP, checkpointed activations, Fabric.
inline constexpr std::array<std::string_view, 5> wrappers{
    "_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.",
    "_forward_module."};

/// The name that a tensor has without wrappers around its module or a module of that.
inline std::string without_wrappers(std::string_view name) {
  std::string result;
  while (!name.empty()) {
    const auto* const wrapper = std::ranges::find_if(
        wrappers, [&](std::string_view begin) { return name.starts_with(begin); });
    if (wrapper != wrappers.end()) {
      name.remove_prefix(wrapper->size());
      continue;
    }
    const std::string_view part = name.substr(0, name.find_first_of("./"));
    const std::size_t size = (std::min)(part.size() + 1, name.size());
    result += name.substr(0, size);
    name.remove_prefix(size);
  }
  return result;
}

/// What to do about a tensor that some tool has made of the module's own; empty for others.
inline std::string_view remedy(std::string_view name) {
  struct Remedy {
    std::string_view part;
    std::string_view text;
  };
  static constexpr std::string_view adapters =
      "; adapters are not supported, merge them into the weights first (as peft's "
      "merge_and_unload() does)";
  static constexpr std::string_view norm =
      "; weight normalization is not supported, remove it first (remove_weight_norm() or "
      "remove_parametrizations() of PyTorch)";
  static constexpr std::string_view streams =
      "; it is of hyper-connections, which a module with num_residual_streams > 1 has";
  static constexpr std::array remedies{
      Remedy{"lora_", adapters},        Remedy{"base_layer.", adapters},
      Remedy{"weight_g", norm},         Remedy{"weight_v", norm},
      Remedy{"parametrizations", norm}, Remedy{"static_alpha", streams},
      Remedy{"static_beta", streams},   Remedy{"dynamic_alpha", streams},
  };
  for (const auto& [part, text] : remedies)
    if (name.find(part) != std::string_view::npos) return text;
  return "";
}

inline Index total(const std::array<Index, 3>& sizes) { return sizes[0] + sizes[1] + sizes[2]; }

/// Reads tensors under a prefix, and knows which were read.
template <typename Scalar>
class StateDictReader {
 public:
  StateDictReader(const SafetensorsFile& file, std::string prefix, RotaryBuffers buffers)
      : file_(file), prefix_(std::move(prefix)), buffers_(buffers) {
    const auto& entries = file_.entries();
    const auto first = entries.lower_bound(prefix_);
    const bool is_there = first != entries.end() && first->first.starts_with(prefix_);
    const std::string prefix_without = without_wrappers(prefix_);
    // The name behind the prefix, wrappers or not.
    const auto behind = [&](const std::string& name) -> std::optional<std::string> {
      if (is_there)
        return name.starts_with(prefix_)
                   ? std::optional(without_wrappers(std::string_view(name).substr(prefix_.size())))
                   : std::nullopt;
      const std::string without = without_wrappers(name);
      return without.starts_with(prefix_without)
                 ? std::optional(without.substr(prefix_without.size()))
                 : std::nullopt;
    };
    for (const Stored& stored : entries)
      if (const auto name = behind(stored.first)) {
        under_prefix_.push_back(&stored);
        const auto [other, is_new] = names_.emplace(*name, &stored);
        if (!is_new && stored.first == prefix_ + *name) other->second = &stored;
      }
    // A weight that is another one, too, stands in the file once: metadata names the other one.
    for (const auto& [tied, name] : file_.metadata())
      if (const auto behind_prefix = behind(tied))
        if (const auto other = entries.find(name); other != entries.end())
          names_.emplace(*behind_prefix, &*other);
  }

  /// A weight that the configuration has if `used`.
  void tensor(bool used, const std::string& name, RowMatrix<Scalar>& matrix, Index rows,
              Index cols) {
    if (!used) return;
    const Stored& stored = required(name, {{rows, cols}});
    matrix.resize(rows, cols);
    read(stored, {matrix.data(), static_cast<std::size_t>(matrix.size())});
  }

  void tensor(bool used, const std::string& name, Vector<Scalar>& vector, Index size) {
    if (!used) return;
    const Stored& stored = required(name, {{size}});
    vector.resize(size);
    read(stored, {vector.data(), static_cast<std::size_t>(size)});
  }

  /// A tensor without dimensions, or as older versions of PyTorch wrote it, `[1]`.
  void tensor(bool used, const std::string& name, Single<Scalar>& number) {
    if (!used) return;
    const auto found = names_.find(name);
    const bool listed =
        found != names_.end() && found->second->second.shape == std::vector<Index>{1};
    read(required(name, std::vector<Index>(listed ? 1 : 0, 1)), {number.data(), 1});
  }

  bool has(const std::string& name) const { return names_.contains(name); }

  /// Checks a tensor that read_into() reads when there is memory for it.
  void check_tensor(const std::string& name, const std::vector<Index>& shape) {
    required(name, shape);
  }
  /// \param out as many elements as `shape` says
  void read_into(const std::string& name, const std::vector<Index>& shape, std::span<Scalar> out) {
    read(required(name, shape), out);
  }

  /// A tensor that may be there, and is no weight.
  void ignore(const std::string& name) {
    if (const auto found = names_.find(name); found != names_.end()) read_.insert(found->second);
  }

  /// Projections of the same input, in one tensor or one each.
  /// \param rows of each, with `cols` columns
  void stacked(const std::string& name, const std::array<std::string, 3>& parts,
               RowMatrix<Scalar>& matrix, const std::array<Index, 3>& rows, Index cols) {
    if (!apart(name, parts)) return tensor(true, name, matrix, total(rows), cols);
    std::array<const Stored*, 3> stored{};
    for (std::size_t i = 0; i < parts.size(); ++i)
      stored[i] = &required(parts[i], {{rows[i], cols}});
    matrix.resize(total(rows), cols);
    read_each(stored, {rows[0] * cols, rows[1] * cols, rows[2] * cols}, matrix.data());
  }

  /// Their biases, in the same way.
  void stacked(bool used, const std::string& name, const std::array<std::string, 3>& parts,
               Vector<Scalar>& vector, const std::array<Index, 3>& sizes) {
    if (!used) return;
    if (!apart(name, parts)) return tensor(true, name, vector, total(sizes));
    std::array<const Stored*, 3> stored{};
    for (std::size_t i = 0; i < parts.size(); ++i) stored[i] = &required(parts[i], {sizes[i]});
    vector.resize(total(sizes));
    read_each(stored, sizes, vector.data());
  }

  /// `branch.` where the module of a layer stands in a residual connection of its own.
  std::string branch(const std::string& layer) const {
    const auto first = names_.lower_bound(layer + "branch.");
    return first != names_.end() && first->first.starts_with(layer + "branch.") ? "branch." : "";
  }

  /// Rows of a matrix whose size nothing else says, at least 1.
  Index rows(const std::string& name) const {
    const auto found = names_.find(name);
    if (found == names_.end()) fail_missing(name, "expected a matrix");
    const auto& [full_name, stored] = *found->second;
    if (stored.shape.size() != 2 || stored.shape[0] < 1)
      throw SafetensorsError(stored.file, full_name, stored.offset,
                             "expected a matrix of at least one row, got " + to_string(stored));
    return stored.shape[0];
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

  /// The buffers of the rotary embedding, which may be there or not.
  void rotary_buffers(const std::string& prefix, Index dim_head, const RotaryConfig& rotary) {
    rotary_buffer(prefix + "inv_freq", rotary_frequencies(dim_head, rotary));
    rotary_buffer(prefix + "scale", xpos_scales(rotary.rotary_dim.value_or(dim_head)));
  }

  /// \throws SafetensorsError if a tensor under the prefix was not read
  void reject_unexpected() const {
    for (const Stored* named : under_prefix_) {
      const auto& [name, stored] = *named;
      if (read_.contains(named) || (prefix_.empty() && is_of_case(name))) continue;
      throw SafetensorsError(stored.file, name, stored.offset,
                             "expected no such tensor for this configuration, got " +
                                 to_string(stored) + std::string(remedy(name)));
    }
  }

 private:
  using Stored = std::pair<const std::string, TensorEntry>;

  bool apart(const std::string& name, const std::array<std::string, 3>& parts) const {
    return !has(name) && (has(parts[0]) || has(parts[1]) || has(parts[2]));
  }

  // One tensor after the other.
  void read_each(const std::array<const Stored*, 3>& stored, const std::array<Index, 3>& sizes,
                 Scalar* to) const {
    for (std::size_t i = 0; i < stored.size(); to += sizes[i++])
      read(*stored[i], {to, static_cast<std::size_t>(sizes[i])});
  }

  // Inputs, outputs and gradients may stand beside a state dict that has no prefix.
  static bool is_of_case(const std::string& name) {
    return name.starts_with("input/") || name.starts_with("output/") || name.starts_with("grad/");
  }

  static std::string expected(const std::vector<Index>& shape) {
    const TensorEntry wanted{.shape = shape};
    return "expected F64, F32, F16 or BF16" +
           to_string(wanted).substr(name_of(wanted.dtype).size());
  }

  const Stored& required(const std::string& name, const std::vector<Index>& shape) {
    const auto found = names_.find(name);
    if (found == names_.end()) fail_missing(name, expected(shape));
    const auto& [full_name, stored] = *found->second;
    if (!is_float(stored.dtype) || stored.shape != shape)
      throw SafetensorsError(stored.file, full_name, stored.offset,
                             expected(shape) + ", got " + to_string(stored));
    read_.insert(found->second);
    return *found->second;
  }

  [[noreturn]] void fail_missing(const std::string& name, const std::string& expectation) const {
    throw SafetensorsError(file_.file_name(), prefix_ + name,
                           expectation + ", got no such tensor" + similar(name));
  }

  // A hint for a wrong prefix, or for names that another tool has made.
  std::string similar(const std::string& name) const {
    for (const auto& named : file_.entries()) {
      const std::string without = without_wrappers(named.first);
      if (without.ends_with(name) && !is_of_case(named.first))
        return ", but '" + printable(named.first) + "' (is the prefix '" +
               printable(without.substr(0, without.size() - name.size())) +
               "'? The loader takes it)";
    }
    for (const Stored* named : under_prefix_)
      if (const std::string_view text = remedy(named->first); !text.empty())
        return ", but '" + printable(named->first) + "'" + std::string(text);
    return "";
  }

  void read(const Stored& stored, std::span<Scalar> out) const {
    if constexpr (std::is_same_v<Scalar, float> || std::is_same_v<Scalar, double>) {
      file_.read_into<Scalar>(stored.first, out);
    } else {
      const std::vector<double> values = file_.read<double>(stored.first);
      std::transform(values.begin(), values.end(), out.begin(),
                     [](double value) { return Scalar(value); });
    }
  }

  // The Python package computes buffers in float, and then with what is left of them in the dtype
  // that they are converted to: however they are stored, one rule.
  void rotary_buffer(const std::string& name, const Vector<double>& expected) {
    if (!has(name)) return;
    const auto& [full_name, stored] = required(name, {expected.size()});
    if (buffers_ == RotaryBuffers::ignore) return;
    constexpr double tolerance = 16 * static_cast<double>(std::numeric_limits<float>::epsilon());
    const std::vector<double> values = file_.read<double>(full_name);
    for (std::size_t m = 0; m < values.size(); ++m) {
      const double wanted = expected[static_cast<Index>(m)];
      if (!(std::abs(values[m] - wanted) <= tolerance * std::abs(wanted)))
        throw SafetensorsError(
            stored.file, full_name, stored.offset + m * size_of(stored.dtype),
            "expected " + nlohmann::json(wanted).dump() + " at " + std::to_string(m) + ", got " +
                nlohmann::json(values[m]).dump() +
                "; this library computes with the former, Python with the latter: store it "
                "unrounded, leave it out, or load with RotaryBuffers::ignore");
    }
  }

  SafetensorsFile file_;
  std::string prefix_;
  RotaryBuffers buffers_;
  std::vector<const Stored*> under_prefix_;
  std::map<std::string, const Stored*, std::less<>> names_;  // without prefix and wrappers
  std::set<const Stored*> read_;
};

/// Adds tensors under a prefix, and checks that they have the shapes that the configuration says.
template <typename Scalar>
class StateDictWriter {
 public:
  /// \param dtype empty: as `Scalar` is
  /// \param branch stands before the names of a layer's modules
  StateDictWriter(SafetensorsWriter& writer, std::string prefix, std::optional<Dtype> dtype,
                  std::string branch = "branch.")
      : writer_(writer),
        prefix_(std::move(prefix)),
        branch_(std::move(branch)),
        dtype_(dtype.value_or(dtype_of<Scalar>())) {
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
               const RowMatrix<Scalar>& matrix, const std::array<Index, 3>& rows, Index cols) {
    tensor(true, name, matrix, total(rows), cols);
  }

  void stacked(bool used, const std::string& name, const std::array<std::string, 3>& /*parts*/,
               const Vector<Scalar>& vector, const std::array<Index, 3>& sizes) {
    tensor(used, name, vector, total(sizes));
  }

  void tensor(bool used, const std::string& name, const Single<Scalar>& number) {
    if (used) writer_.add(prefix_ + name, {}, std::span(number.data(), 1), dtype_);
  }

  std::string branch(const std::string& /*layer*/) const { return branch_; }

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
  void rotary_buffers(const std::string& prefix, Index dim_head, const RotaryConfig& rotary) {
    writer_.add(prefix_ + prefix + "inv_freq", rotary_frequencies(dim_head, rotary),
                dtype_ == Dtype::F64 ? Dtype::F64 : Dtype::F32);
  }

 private:
  SafetensorsWriter& writer_;
  std::string prefix_;
  std::string branch_;
  Dtype dtype_;
};

/// Goes through the weights of a LocalMHA.
/// \tparam StateDict StateDictReader, which sizes and fills them, or StateDictWriter
template <typename StateDict, typename Parameters>
void visit_state_dict(StateDict& state_dict, const std::string& prefix,
                      const LocalMHAConfig& config, Parameters& p) {
  const Index inner = config.heads * config.dim_head;
  const Index kv_inner = resolved_kv_heads(config) * config.dim_head;
  const std::array<Index, 3> qkv{inner, kv_inner, kv_inner};
  state_dict.tensor(config.prenorm, prefix + "norm.weight", p.norm_weight, config.dim);
  state_dict.tensor(config.prenorm && config.norm.kind == NormKind::layer, prefix + "norm.bias",
                    p.norm_bias, config.dim);
  state_dict.stacked(prefix + "to_qkv.weight",
                     {prefix + "to_q.weight", prefix + "to_k.weight", prefix + "to_v.weight"},
                     p.to_qkv, qkv, config.dim);
  state_dict.stacked(config.qkv_bias, prefix + "to_qkv.bias",
                     {prefix + "to_q.bias", prefix + "to_k.bias", prefix + "to_v.bias"},
                     p.to_qkv_bias, qkv);
  const bool l2 = resolved_qk_norm(config) == QkNormKind::l2;
  state_dict.tensor(l2, prefix + "q_scale", p.q_scale, config.dim_head);
  state_dict.tensor(l2, prefix + "k_scale", p.k_scale, config.dim_head);
  const Index q_normed = local_mha::detail::qk_norm_channels(config, config.heads);
  const Index k_normed = local_mha::detail::qk_norm_channels(config, resolved_kv_heads(config));
  state_dict.tensor(q_normed > 0, prefix + "q_norm.weight", p.q_norm_weight, q_normed);
  state_dict.tensor(k_normed > 0, prefix + "k_norm.weight", p.k_norm_weight, k_normed);
  if (config.use_rotary_pos_emb)
    state_dict.rotary_buffers(prefix + "attn_fn.rel_pos.", config.dim_head, config.rotary);
  const bool gated = config.gate_values_per_head;
  state_dict.tensor(gated, prefix + "to_v_gate.0.weight", p.to_v_gate_weight, config.heads,
                    config.dim);
  state_dict.tensor(gated, prefix + "to_v_gate.0.bias", p.to_v_gate_bias, config.heads);
  state_dict.tensor(true, prefix + "to_out.weight", p.to_out, config.dim, inner);
  state_dict.tensor(config.out_bias, prefix + "to_out.bias", p.to_out_bias, config.dim);
  state_dict.tensor(config.sinks, prefix + "sinks", p.sinks, config.heads);
  state_dict.tensor(config.relative_bias, prefix + "relative_bias", p.relative_bias, config.heads,
                    local_mha::detail::relative_bias_columns(config));
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

/// Goes through the weights of a DynamicPositionBias.
template <typename StateDict, typename Parameters>
void visit_position_bias(StateDict& state_dict, const std::string& prefix, Index hidden,
                         Index heads, Parameters& p) {
  state_dict.tensor(true, prefix + "mlp.0.weight", p.weight_0, hidden, 1);
  state_dict.tensor(true, prefix + "mlp.0.bias", p.bias_0, hidden);
  state_dict.tensor(true, prefix + "mlp.2.weight", p.weight_2, hidden, hidden);
  state_dict.tensor(true, prefix + "mlp.2.bias", p.bias_2, hidden);
  state_dict.tensor(true, prefix + "mlp.4.weight", p.weight_4, heads, hidden);
  state_dict.tensor(true, prefix + "mlp.4.bias", p.bias_4, heads);
}

/// Goes through the weights of a HyperConnection, which is there if there are several streams.
template <typename StateDict, typename Connection>
void visit_connection(StateDict& state_dict, const std::string& prefix, Index streams, Index dim,
                      Connection& connection) {
  auto* const p = state_dict.optional(streams > 1, prefix + "static_alpha", connection);
  if (p == nullptr) return;
  state_dict.tensor(true, prefix + "static_alpha", p->static_alpha, streams, streams + 1);
  state_dict.tensor(true, prefix + "dynamic_alpha_fn", p->alpha_fn, dim, streams + 1);
  state_dict.tensor(true, prefix + "dynamic_alpha_scale", p->alpha_scale);
  state_dict.tensor(true, prefix + "static_beta", p->static_beta, streams);
  state_dict.tensor(true, prefix + "dynamic_beta_fn", p->beta_fn, dim);
  state_dict.tensor(true, prefix + "dynamic_beta_scale", p->beta_scale);
  state_dict.tensor(true, prefix + "norm.gamma", p->norm_gamma, dim);
}

/// Goes through the weights of an Encoder.
template <typename StateDict, typename Parameters>
void visit_state_dict(StateDict& state_dict, const std::string& prefix, const EncoderConfig& config,
                      Parameters& p) {
  const Index streams = config.num_residual_streams;
  for (Index i = 0; i < config.depth; ++i) {
    auto& layer = state_dict.layer(p.layers, i, config.depth);
    const LocalMHAConfig& of_layer = layer_config(config, i);
    const std::string attention = prefix + "layers." + std::to_string(i) + ".0.";
    const std::string feed_forward = prefix + "layers." + std::to_string(i) + ".1.";
    visit_connection(state_dict, attention, streams, of_layer.dim, layer.attention_connection);
    visit_state_dict(state_dict, attention + state_dict.branch(attention), of_layer,
                     layer.attention);
    visit_connection(state_dict, feed_forward, streams, of_layer.dim,
                     layer.feed_forward_connection);
    visit_state_dict(state_dict, feed_forward + state_dict.branch(feed_forward), of_layer.dim,
                     feed_forward_inner_dim(of_layer.dim, config.ff_mult), layer.feed_forward);
  }
  if (auto* mlp = state_dict.optional(config.use_dynamic_pos_bias, "dynamic_pos_bias",
                                      p.dynamic_pos_bias)) {
    const LocalMHAConfig& first = layer_config(config, 0);
    visit_position_bias(state_dict, prefix + "dynamic_pos_bias.", first.dim / 2, first.heads, *mlp);
  }
}

/// Goes through the weights of a LocalTransformer.
template <typename StateDict, typename Parameters>
void visit_state_dict(StateDict& state_dict, const std::string& prefix,
                      const LocalTransformerConfig& config, Parameters& p) {
  const Index dim = config.dim;
  state_dict.tensor(true, prefix + "token_emb.weight", p.token_emb, config.num_tokens, dim);
  state_dict.tensor(true, prefix + "pos_emb.weight", p.pos_emb, config.max_seq_len, dim);
  visit_state_dict(state_dict, prefix, encoder_config(config), p);
  state_dict.tensor(true, prefix + "to_logits.0.weight", p.to_logits_norm_weight, dim);
  state_dict.tensor(true, prefix + "to_logits.0.bias", p.to_logits_norm_bias, dim);
  state_dict.tensor(true, prefix + "to_logits.1.weight", p.to_logits, config.num_tokens, dim);
}

/// Residual streams of the layers under a prefix, which their weights say.
/// \throws SafetensorsError if they say nothing sensible
template <typename Scalar>
Index residual_streams(const StateDictReader<Scalar>& reader) {
  const std::string name = "layers.0.0.static_alpha";
  return reader.has(name) ? reader.rows(name) : 1;
}

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
