// SPDX-License-Identifier: MIT
/// \file
/// Weights of components that stand alone, with PyTorch's names.
#pragma once

#include <string>

#include <local_mha/component_config.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/layer_parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Weights of Linear.
template <typename Scalar>
struct LinearParameters {
  RowMatrix<Scalar> weight;  ///< `[out_features, in_features]`
  Vector<Scalar> bias = {};  ///< `[out_features]`, or empty for none

  /// All of them 0, in the shapes of a configuration.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  static LinearParameters zeros(const LinearConfig& config) {
    validate(config);
    LinearParameters p;
    p.weight.setZero(config.out_features, config.in_features);
    if (config.bias) p.bias.setZero(config.out_features);
    return p;
  }

  /// Whether each tensor has the shape that it has in `other`.
  bool has_shapes_of(const LinearParameters& other) const {
    return detail::same_shape(weight, other.weight) && detail::same_shape(bias, other.bias);
  }

  /// See for_each_parameter().
  template <typename Self, typename Visitor>
  static void visit_each(Self& p, Visitor&& visit) {
    visit(std::string("weight"), p.weight);
    if (p.bias.size() > 0) visit(std::string("bias"), p.bias);
  }
};

/// Weights of LayerNorm.
template <typename Scalar>
struct LayerNormParameters {
  Vector<Scalar> weight;  ///< `[dim]`
  Vector<Scalar> bias;    ///< `[dim]`

  /// All of them 0, in the shapes of a configuration.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  static LayerNormParameters zeros(const LayerNormConfig& config) {
    validate(config);
    LayerNormParameters p;
    p.weight.setZero(config.dim);
    p.bias.setZero(config.dim);
    return p;
  }

  /// Whether each tensor has the shape that it has in `other`.
  bool has_shapes_of(const LayerNormParameters& other) const {
    return detail::same_shape(weight, other.weight) && detail::same_shape(bias, other.bias);
  }

  /// See for_each_parameter().
  template <typename Self, typename Visitor>
  static void visit_each(Self& p, Visitor&& visit) {
    visit(std::string("weight"), p.weight);
    visit(std::string("bias"), p.bias);
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
