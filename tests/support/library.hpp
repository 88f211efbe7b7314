// SPDX-License-Identifier: MIT
/// \file
/// Between the library's types and the reference's, and comparisons of their results.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <local_mha/local_mha.hpp>

#include "reference/transformer.hpp"
#include "support/compare.hpp"

namespace support {

using local_mha::Index;
using reference::Array;
using reference::Int;

/// The precisions that tests are typed over: one of them where neither has packets.
#ifdef EIGEN_DONT_VECTORIZE
using Scalars = testing::Types<float>;
#else
using Scalars = testing::Types<float, double>;
#endif

struct ScalarNames {
  template <typename Scalar>
  static std::string GetName(int) {
    return std::is_same_v<Scalar, float> ? "float" : "double";
  }
};

/// What the results of a Scalar are compared with.
template <typename Scalar>
using Precise = std::conditional_t<std::is_same_v<Scalar, float>, double, long double>;

template <typename Scalar, int Rank, typename Real>
local_mha::Tensor<Scalar, Rank> tensor(const Array<Real>& from) {
  Eigen::array<Index, Rank> shape{};
  for (std::size_t axis = 0; axis < Rank; ++axis)
    shape[axis] = static_cast<Index>(from.shape.at(axis));
  local_mha::Tensor<Scalar, Rank> to(shape);
  for (std::size_t i = 0; i < from.data.size(); ++i)
    to.data()[i] = static_cast<Scalar>(from.data[i]);
  return to;
}

template <typename Scalar, int Rank>
Array<Scalar> array(const local_mha::Tensor<Scalar, Rank>& from) {
  std::vector<Int> shape;
  for (std::size_t axis = 0; axis < Rank; ++axis) shape.push_back(from.dimension(axis));
  Array<Scalar> to(shape);
  for (std::size_t i = 0; i < to.data.size(); ++i) to.data[i] = from.data()[i];
  return to;
}

/// Flags `[B, N]` as the library takes them; empty if there are none.
inline local_mha::Tensor<bool, 2> flag_tensor(const std::vector<unsigned char>& flags, Int batch,
                                              Int n) {
  if (flags.empty()) return local_mha::Tensor<bool, 2>(0, 0);
  local_mha::Tensor<bool, 2> to(batch, n);
  for (std::size_t i = 0; i < flags.size(); ++i) to.data()[i] = flags[i] != 0;
  return to;
}

/// The mask for flags `[B, N]` with 1 = not attended; none if there are no flags.
inline local_mha::PaddingMask padding_mask(const std::vector<unsigned char>& masked, Int batch,
                                           Int n) {
  if (masked.empty()) return {};
  return local_mha::PaddingMask::masked(flag_tensor(masked, batch, n));
}

/// What the library may be given, such as a bias `[heads, w, keys]`, as it takes it; none if the
/// tensor is empty. The tensor must outlive it.
template <typename Scalar, int Rank>
std::optional<local_mha::TensorView<const Scalar, Rank>> optional_view(
    const local_mha::Tensor<Scalar, Rank>& given) {
  if (given.size() == 0) return std::nullopt;
  return local_mha::TensorView<const Scalar, Rank>(given);
}

/// The same of an array, empty if that is.
template <typename Scalar, int Rank, typename Real>
local_mha::Tensor<Scalar, Rank> optional_tensor(const Array<Real>& given) {
  if (given.empty()) return local_mha::Tensor<Scalar, Rank>(Eigen::array<Index, Rank>{});
  return tensor<Scalar, Rank>(given);
}
template <typename Scalar, typename Real>
local_mha::Tensor<Scalar, 3> bias_tensor(const Array<Real>& bias) {
  return optional_tensor<Scalar, 3>(bias);
}

/// What of a call of the attention does not depend on the scalar.
struct AttentionOptions {
  std::optional<Index> window_size = {};
  Index first_position = 0;
  std::optional<local_mha::Training> training = {};
  std::span<const Index> cu_seqlens = {};
  std::span<const Index> lengths = {};
  std::optional<local_mha::TensorView<const bool, 2>> global_rows = {};
};

/// The call with these options and what else there is; without relative biases and sinks.
template <typename Scalar>
local_mha::LocalAttentionCall<Scalar> attention_call(
    const AttentionOptions& options, const local_mha::PaddingMask& mask = {},
    const std::optional<local_mha::TensorView<const std::type_identity_t<Scalar>, 3>>& attn_bias =
        {},
    const local_mha::AnyDevice& device = {}) {
  return {.mask = mask,
          .attn_bias = attn_bias,
          .window_size = options.window_size,
          .first_position = options.first_position,
          .training = options.training,
          .cu_seqlens = options.cu_seqlens,
          .lengths = options.lengths,
          .global_rows = options.global_rows,
          .device = device};
}

/// The reference's function of scores for a configuration's.
template <typename Real>
reference::Score<Real> score(const local_mha::ScoreConfig& config) {
  if (config.soft_cap) return reference::soft_cap<Real>(*config.soft_cap);
  if (!config.alibi_slopes.empty()) return reference::alibi<Real>(config.alibi_slopes);
  return {};
}

/// The reference's options for what says, in either configuration, which keys a query sees and how
/// they turn.
template <typename Config>
void set_rules(const Config& config, reference::AttentionOptions& o) {
  o.window_size = config.window_size;
  o.look_backward = config.look_backward;
  o.look_forward = config.look_forward ? *config.look_forward : (config.causal ? 0 : 1);
  o.causal = config.causal;
  o.exact_windowsize = config.exact_windowsize;
  o.first_keys = config.first_keys;
  if (config.token_window) {
    const auto side = [](Index positions) {
      return positions == local_mha::TokenWindow::unbounded ? std::nullopt
                                                            : std::optional<Int>(positions);
    };
    o.token_window = {side(config.token_window->left), side(config.token_window->right)};
    if (config.token_window->right == 0) o.causal = true;
  }
  const local_mha::RotaryConfig& rotary = config.rotary;
  o.rotary_options.theta = rotary.theta;
  if (rotary.rotary_dim) o.rotary_options.rotary_dim = *rotary.rotary_dim;
  o.rotary_options.interleaved = rotary.pairing == local_mha::RotaryPairing::interleaved;
  o.rotary_options.inv_freq = rotary.inv_freq;
  o.rotary_options.factor = rotary.factor;
}

/// The reference's options for a configuration, with the contract's defaults.
inline reference::AttentionOptions options(const local_mha::LocalAttentionConfig& config,
                                           const AttentionOptions& call = {}) {
  reference::AttentionOptions o;
  set_rules(config, o);
  if (call.window_size) o.window_size = *call.window_size;
  o.rotary = config.dim.has_value() && config.use_rotary_pos_emb;
  o.xpos = config.use_xpos;
  if (o.xpos)
    o.xpos_scale_base = config.xpos_scale_base ? *config.xpos_scale_base
                                               : std::sqrt(static_cast<double>(*config.dim));
  o.shared_qk = config.shared_qk;
  o.scale = config.scale;
  o.first_position = call.first_position;
  o.cu_seqlens.assign(call.cu_seqlens.begin(), call.cu_seqlens.end());
  return o;
}

inline reference::LayerOptions options(const local_mha::LocalMHAConfig& config) {
  reference::LayerOptions o;
  o.dim = config.dim;
  o.heads = config.heads;
  o.dim_head = config.dim_head;
  if (config.kv_heads) o.kv_heads = *config.kv_heads;
  o.prenorm = config.prenorm;
  if (config.norm.kind == local_mha::NormKind::rms) o.prenorm_kind = reference::Prenorm::Rms;
  o.norm_eps = config.norm.eps;
  switch (config.qk_norm.kind) {
    case local_mha::QkNormKind::none:
      break;
    case local_mha::QkNormKind::l2:
      o.qk_norm = reference::QkNorm::L2;
      break;
    case local_mha::QkNormKind::rms:
      o.qk_norm = reference::QkNorm::Rms;
      break;
    case local_mha::QkNormKind::rms_all:
      o.qk_norm = reference::QkNorm::RmsAll;
      break;
  }
  if (config.qk_rmsnorm) o.qk_norm = reference::QkNorm::L2;
  o.qk_norm_eps = config.qk_norm.eps;
  o.qk_scale = config.qk_scale;
  o.softmax_scale = config.scale;
  o.gate_values_per_head = config.gate_values_per_head;
  o.qkv_bias = config.qkv_bias;
  o.out_bias = config.out_bias;
  o.sinks = config.sinks;
  o.relative_bias = config.relative_bias;
  reference::AttentionOptions& a = o.attention;
  set_rules(config, a);
  a.rotary = config.use_rotary_pos_emb;
  a.xpos = config.use_xpos;
  a.xpos_scale_base =
      config.xpos_scale_base ? *config.xpos_scale_base : std::sqrt(static_cast<double>(config.dim));
  return o;
}

inline reference::TransformerOptions options(const local_mha::LocalTransformerConfig& config) {
  if (!config.layers.empty()) {
    reference::TransformerOptions o;
    o.depth = config.depth;
    o.use_dynamic_pos_bias = config.use_dynamic_pos_bias;
    o.streams = config.num_residual_streams;
    for (Index i = 0; i < config.depth; ++i)
      o.layers.push_back(
          options(config.layers[config.layers.size() == 1 ? 0 : static_cast<std::size_t>(i)]));
    return o;
  }
  local_mha::LocalMHAConfig layer;
  layer.dim = config.dim;
  layer.window_size = config.local_attn_window_size;
  layer.dim_head = config.dim_head;
  layer.heads = config.heads;
  layer.causal = config.causal;
  layer.prenorm = true;
  layer.qk_rmsnorm = config.qk_rmsnorm;
  layer.qk_scale = config.qk_scale;
  layer.use_xpos = config.use_xpos;
  layer.xpos_scale_base = config.xpos_scale_base;
  layer.exact_windowsize = config.exact_windowsize;
  layer.look_backward = config.look_backward;
  layer.look_forward = config.look_forward;
  layer.use_rotary_pos_emb = !config.use_dynamic_pos_bias;
  layer.gate_values_per_head = config.gate_values_per_head;
  return {config.depth, config.use_dynamic_pos_bias, options(layer), config.num_residual_streams};
}

/// The library's weights by their names.
template <typename Real, typename LibraryParameters>
reference::Parameters<Real> named(const LibraryParameters& parameters) {
  reference::Parameters<Real> to;
  local_mha::for_each_parameter(parameters, [&](const std::string& name, const auto& weight) {
    using Weight = std::decay_t<decltype(weight)>;
    std::vector<Int> shape;
    if constexpr (Weight::RowsAtCompileTime != 1) shape.push_back(weight.rows());
    if constexpr (Weight::ColsAtCompileTime != 1) shape.push_back(weight.cols());
    Array<Real> array(shape);
    for (std::size_t i = 0; i < array.data.size(); ++i)
      array.data[i] = static_cast<Real>(weight.data()[i]);
    to[name] = std::move(array);
  });
  return to;
}

/// Sets the library's weights from arrays by their names; every one must be there.
template <typename LibraryParameters, typename Real>
void assign(LibraryParameters& parameters, const reference::Parameters<Real>& from) {
  local_mha::for_each_parameter(parameters, [&](const std::string& name, auto& weight) {
    const Array<Real>& array = from.at(name);
    ASSERT_EQ(static_cast<std::size_t>(weight.size()), array.data.size()) << name;
    using Scalar = typename std::decay_t<decltype(weight)>::Scalar;
    for (std::size_t i = 0; i < array.data.size(); ++i)
      weight.data()[i] = static_cast<Scalar>(array.data[i]);
  });
}

/// Same shape and same bits: tells zeros apart and NaNs alike.
template <typename Scalar, int Rank>
testing::AssertionResult same_bits(const local_mha::Tensor<Scalar, Rank>& a,
                                   const local_mha::Tensor<Scalar, Rank>& b) {
  for (std::size_t axis = 0; axis < Rank; ++axis)
    if (a.dimension(axis) != b.dimension(axis))
      return testing::AssertionFailure() << "different shapes";
  for (Index i = 0; i < a.size(); ++i)
    if (std::memcmp(a.data() + i, b.data() + i, sizeof(Scalar)) != 0)
      return testing::AssertionFailure()
             << "element " << i << ": " << a.data()[i] << " and " << b.data()[i];
  return testing::AssertionSuccess();
}

}  // namespace support
