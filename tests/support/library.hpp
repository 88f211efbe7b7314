// SPDX-License-Identifier: MIT
/// \file
/// Between the library's types and the reference's, and comparisons of their results.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
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

/// The mask for flags `[B, N]` with 1 = not attended; none if there are no flags.
inline local_mha::PaddingMask padding_mask(const std::vector<unsigned char>& masked, Int batch,
                                           Int n) {
  if (masked.empty()) return {};
  const auto flags = std::make_unique<bool[]>(masked.size());
  for (std::size_t i = 0; i < masked.size(); ++i) flags[i] = masked[i] != 0;
  return local_mha::PaddingMask::masked(
      local_mha::TensorView<const bool, 2>(flags.get(), {batch, n}));
}

/// A bias `[heads, w, keys]` as the library takes it; none if the array is empty. The tensor must
/// outlive it.
template <typename Scalar>
std::optional<local_mha::TensorView<const Scalar, 3>> optional_view(
    const local_mha::Tensor<Scalar, 3>& bias) {
  if (bias.size() == 0) return std::nullopt;
  return local_mha::TensorView<const Scalar, 3>(bias);
}

template <typename Scalar, typename Real>
local_mha::Tensor<Scalar, 3> bias_tensor(const Array<Real>& bias) {
  if (bias.empty()) return local_mha::Tensor<Scalar, 3>(0, 0, 0);
  return tensor<Scalar, 3>(bias);
}

/// The reference's options for a configuration, with the contract's defaults.
inline reference::AttentionOptions options(const local_mha::LocalAttentionConfig& config,
                                           const local_mha::LocalAttentionCall& call = {}) {
  reference::AttentionOptions o;
  o.window_size = call.window_size ? *call.window_size : config.window_size;
  o.look_backward = config.look_backward;
  o.look_forward = config.look_forward ? *config.look_forward : (config.causal ? 0 : 1);
  o.causal = config.causal;
  o.exact_windowsize = config.exact_windowsize;
  o.rotary = config.dim.has_value() && config.use_rotary_pos_emb;
  o.xpos = config.use_xpos;
  if (o.xpos)
    o.xpos_scale_base = config.xpos_scale_base ? *config.xpos_scale_base
                                               : std::sqrt(static_cast<double>(*config.dim));
  o.shared_qk = config.shared_qk;
  o.scale = config.scale;
  o.first_position = call.first_position;
  return o;
}

inline reference::LayerOptions options(const local_mha::LocalMHAConfig& config) {
  reference::LayerOptions o;
  o.dim = config.dim;
  o.heads = config.heads;
  o.dim_head = config.dim_head;
  o.prenorm = config.prenorm;
  if (config.qk_rmsnorm) o.qk_norm = reference::QkNorm::L2;
  o.qk_scale = config.qk_scale;
  o.gate_values_per_head = config.gate_values_per_head;
  reference::AttentionOptions& a = o.attention;
  a.window_size = config.window_size;
  a.look_backward = config.look_backward;
  a.look_forward = config.look_forward ? *config.look_forward : (config.causal ? 0 : 1);
  a.causal = config.causal;
  a.exact_windowsize = config.exact_windowsize;
  a.rotary = config.use_rotary_pos_emb;
  a.xpos = config.use_xpos;
  a.xpos_scale_base =
      config.xpos_scale_base ? *config.xpos_scale_base : std::sqrt(static_cast<double>(config.dim));
  return o;
}

inline reference::TransformerOptions options(const local_mha::LocalTransformerConfig& config) {
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
  return {config.depth, config.use_dynamic_pos_bias, options(layer)};
}

/// The library's weights by their names.
template <typename Real, typename LibraryParameters>
reference::Parameters<Real> named(const LibraryParameters& parameters) {
  reference::Parameters<Real> to;
  local_mha::for_each_parameter(parameters, [&](const std::string& name, const auto& weight) {
    std::vector<Int> shape{weight.rows()};
    if constexpr (std::decay_t<decltype(weight)>::ColsAtCompileTime != 1)
      shape.push_back(weight.cols());
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
