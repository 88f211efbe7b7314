// SPDX-License-Identifier: MIT
/// \file
/// The weights of the modules inside a layer, with the names and shapes of the Python state dicts.
///
/// Every set offers `zeros(…)`, which has all shapes; for_each_parameter() goes through its
/// tensors. Gradients are sets of the same type.
#pragma once

#include <algorithm>
#include <string>
#include <utility>

#include <local_mha/component_config.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/parameter_set.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

template <typename Matrix>
bool same_shape(const Matrix& a, const Matrix& b) {
  return a.rows() == b.rows() && a.cols() == b.cols();
}

}  // namespace detail

/// Weights of LocalMHA. What the configuration does not use is empty.
template <typename Scalar>
struct LocalMHAParameters {
  /// `[(heads + 2·kv_heads)·dim_head, dim]`: q, k, v; a head's rows adjoin
  RowMatrix<Scalar> to_qkv;
  RowMatrix<Scalar> to_out;            ///< `[dim, heads·dim_head]`
  Vector<Scalar> norm_weight;          ///< `[dim]`, prenorm
  Vector<Scalar> norm_bias;            ///< `[dim]`, prenorm of NormKind::layer
  Vector<Scalar> q_scale;              ///< `[dim_head]`, QkNormKind::l2
  Vector<Scalar> k_scale;              ///< `[dim_head]`, QkNormKind::l2
  RowMatrix<Scalar> to_v_gate_weight;  ///< `[heads, dim]`, gate_values_per_head
  Vector<Scalar> to_v_gate_bias;       ///< `[heads]`, gate_values_per_head
  Vector<Scalar> to_qkv_bias;          ///< qkv_bias: as to_qkv's rows
  Vector<Scalar> to_out_bias;          ///< `[dim]`, out_bias
  Vector<Scalar> q_norm_weight;        ///< `[dim_head]`, or rms_all `[heads·dim_head]`: QkNormKind
  Vector<Scalar> k_norm_weight;        ///< the same, of kv_heads
  Vector<Scalar> sinks;                ///< `[heads]`, sinks; 0 at first
  /// `[heads, left + right + 1]`, relative_bias: column `j − i + left` is that of query `i` and key
  /// `j`; 0 at first
  RowMatrix<Scalar> relative_bias;

  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  static LocalMHAParameters zeros(const LocalMHAConfig& config) {
    validate(config);
    const Index inner = config.heads * config.dim_head;
    LocalMHAParameters p;
    const Index kv_heads = resolved_kv_heads(config);
    const Index qkv = detail::qkv_heads(config) * config.dim_head;
    p.to_qkv.setZero(qkv, config.dim);
    p.to_out.setZero(config.dim, inner);
    if (config.prenorm) {
      p.norm_weight.setZero(config.dim);
      if (config.norm.kind == NormKind::layer) p.norm_bias.setZero(config.dim);
    }
    if (resolved_qk_norm(config) == QkNormKind::l2) {
      p.q_scale.setZero(config.dim_head);
      p.k_scale.setZero(config.dim_head);
    }
    if (config.gate_values_per_head) {
      p.to_v_gate_weight.setZero(config.heads, config.dim);
      p.to_v_gate_bias.setZero(config.heads);
    }
    p.q_norm_weight.setZero(detail::qk_norm_channels(config, config.heads));
    p.k_norm_weight.setZero(detail::qk_norm_channels(config, kv_heads));
    if (config.qkv_bias) p.to_qkv_bias.setZero(qkv);
    if (config.out_bias) p.to_out_bias.setZero(config.dim);
    if (config.sinks) p.sinks.setZero(config.heads);
    if (config.relative_bias)
      p.relative_bias.setZero(config.heads, detail::relative_bias_columns(config));
    return p;
  }

  /// Whether each tensor has the shape that it has in `other`.
  bool has_shapes_of(const LocalMHAParameters& other) const {
    return detail::same_shape(to_qkv, other.to_qkv) && detail::same_shape(to_out, other.to_out) &&
           detail::same_shape(norm_weight, other.norm_weight) &&
           detail::same_shape(norm_bias, other.norm_bias) &&
           detail::same_shape(q_scale, other.q_scale) &&
           detail::same_shape(k_scale, other.k_scale) &&
           detail::same_shape(to_v_gate_weight, other.to_v_gate_weight) &&
           detail::same_shape(to_v_gate_bias, other.to_v_gate_bias) &&
           detail::same_shape(to_qkv_bias, other.to_qkv_bias) &&
           detail::same_shape(to_out_bias, other.to_out_bias) &&
           detail::same_shape(q_norm_weight, other.q_norm_weight) &&
           detail::same_shape(k_norm_weight, other.k_norm_weight) &&
           detail::same_shape(sinks, other.sinks) &&
           detail::same_shape(relative_bias, other.relative_bias);
  }

  /// See for_each_parameter().
  template <typename Self, typename Visitor>
  static void visit_each(Self& p, Visitor&& visit) {
    const auto visit_used = [&](const char* name, auto& tensor) {
      if (tensor.size() > 0) visit(std::string(name), tensor);
    };
    visit_used("q_scale", p.q_scale);
    visit_used("k_scale", p.k_scale);
    visit_used("norm.weight", p.norm_weight);
    visit_used("norm.bias", p.norm_bias);
    visit_used("to_qkv.weight", p.to_qkv);
    visit_used("to_qkv.bias", p.to_qkv_bias);
    visit_used("q_norm.weight", p.q_norm_weight);
    visit_used("k_norm.weight", p.k_norm_weight);
    visit_used("to_v_gate.0.weight", p.to_v_gate_weight);
    visit_used("to_v_gate.0.bias", p.to_v_gate_bias);
    visit_used("to_out.weight", p.to_out);
    visit_used("to_out.bias", p.to_out_bias);
    visit_used("sinks", p.sinks);
    visit_used("relative_bias", p.relative_bias);
  }
};

/// Weights of FeedForward.
template <typename Scalar>
struct FeedForwardParameters {
  Vector<Scalar> norm_weight;  ///< `[dim]`
  Vector<Scalar> norm_bias;    ///< `[dim]`
  RowMatrix<Scalar> proj_in;   ///< `[2·inner, dim]`: values, then gates
  RowMatrix<Scalar> proj_out;  ///< `[dim, inner]`

  /// \throws std::invalid_argument if a size is negative, or the weights are too large
  static FeedForwardParameters zeros(Index dim, Index inner) {
    detail::require_at_least("dim", dim, 0);
    detail::require_at_least("inner", inner, 0);
    detail::require_product("inner", inner, 2 * dim);
    FeedForwardParameters p;
    p.norm_weight.setZero(dim);
    p.norm_bias.setZero(dim);
    p.proj_in.setZero(2 * inner, dim);
    p.proj_out.setZero(dim, inner);
    return p;
  }

  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  static FeedForwardParameters zeros(const FeedForwardConfig& config) {
    validate(config);
    return zeros(config.dim, feed_forward_inner_dim(config.dim, config.ff_mult));
  }

  /// Whether each tensor has the shape that it has in `other`.
  bool has_shapes_of(const FeedForwardParameters& other) const {
    return detail::same_shape(norm_weight, other.norm_weight) &&
           detail::same_shape(norm_bias, other.norm_bias) &&
           detail::same_shape(proj_in, other.proj_in) &&
           detail::same_shape(proj_out, other.proj_out);
  }

  /// See for_each_parameter().
  template <typename Self, typename Visitor>
  static void visit_each(Self& p, Visitor&& visit) {
    visit(std::string("0.weight"), p.norm_weight);
    visit(std::string("0.bias"), p.norm_bias);
    visit(std::string("1.weight"), p.proj_in);
    visit(std::string("4.weight"), p.proj_out);
  }
};

/// Weights of DynamicPositionBias: an MLP 1 → hidden → hidden → heads.
template <typename Scalar>
struct DynamicPositionBiasParameters {
  RowMatrix<Scalar> weight_0;  ///< `[hidden, 1]`
  Vector<Scalar> bias_0;       ///< `[hidden]`
  RowMatrix<Scalar> weight_2;  ///< `[hidden, hidden]`
  Vector<Scalar> bias_2;       ///< `[hidden]`
  RowMatrix<Scalar> weight_4;  ///< `[heads, hidden]`
  Vector<Scalar> bias_4;       ///< `[heads]`

  /// \throws std::invalid_argument if a size is negative, or the weights are too large
  static DynamicPositionBiasParameters zeros(Index hidden, Index heads) {
    detail::require_at_least("hidden", hidden, 0);
    detail::require_at_least("heads", heads, 0);
    detail::require_product("hidden", hidden, (std::max)(hidden, heads));
    DynamicPositionBiasParameters p;
    p.weight_0.setZero(hidden, 1);
    p.bias_0.setZero(hidden);
    p.weight_2.setZero(hidden, hidden);
    p.bias_2.setZero(hidden);
    p.weight_4.setZero(heads, hidden);
    p.bias_4.setZero(heads);
    return p;
  }

  /// Whether each tensor has the shape that it has in `other`.
  bool has_shapes_of(const DynamicPositionBiasParameters& other) const {
    return detail::same_shape(weight_0, other.weight_0) &&
           detail::same_shape(bias_0, other.bias_0) &&
           detail::same_shape(weight_2, other.weight_2) &&
           detail::same_shape(bias_2, other.bias_2) &&
           detail::same_shape(weight_4, other.weight_4) && detail::same_shape(bias_4, other.bias_4);
  }

  /// See for_each_parameter().
  template <typename Self, typename Visitor>
  static void visit_each(Self& p, Visitor&& visit) {
    visit(std::string("mlp.0.weight"), p.weight_0);
    visit(std::string("mlp.0.bias"), p.bias_0);
    visit(std::string("mlp.2.weight"), p.weight_2);
    visit(std::string("mlp.2.bias"), p.bias_2);
    visit(std::string("mlp.4.weight"), p.weight_4);
    visit(std::string("mlp.4.bias"), p.bias_4);
  }
};

/// Weights of HyperConnection, of `S` residual streams.
template <typename Scalar>
struct HyperConnectionParameters {
  RowMatrix<Scalar> static_alpha;                       ///< `[S, S + 1]`
  RowMatrix<Scalar> alpha_fn;                           ///< `[dim, S + 1]`
  Single<Scalar> alpha_scale = Single<Scalar>::Zero();  ///< `[]`
  Vector<Scalar> static_beta;                           ///< `[S]`
  Vector<Scalar> beta_fn;                               ///< `[dim]`
  Single<Scalar> beta_scale = Single<Scalar>::Zero();   ///< `[]`
  Vector<Scalar> norm_gamma;                            ///< `[dim]`

  /// \throws std::invalid_argument if a size is out of range
  static HyperConnectionParameters zeros(Index streams, Index dim) {
    detail::require_streams("streams", streams, dim);
    HyperConnectionParameters p;
    p.static_alpha.setZero(streams, streams + 1);
    p.alpha_fn.setZero(dim, streams + 1);
    p.static_beta.setZero(streams);
    p.beta_fn.setZero(dim);
    p.norm_gamma.setZero(dim);
    return p;
  }

  /// Whether each tensor has the shape that it has in `other`.
  bool has_shapes_of(const HyperConnectionParameters& other) const {
    return detail::same_shape(static_alpha, other.static_alpha) &&
           detail::same_shape(alpha_fn, other.alpha_fn) &&
           detail::same_shape(static_beta, other.static_beta) &&
           detail::same_shape(beta_fn, other.beta_fn) &&
           detail::same_shape(norm_gamma, other.norm_gamma);
  }

  /// See for_each_parameter().
  template <typename Self, typename Visitor>
  static void visit_each(Self& p, Visitor&& visit) {
    visit_around(p, visit, [] {});
  }
  /// The same with the branch in its place, whose own weights `visit_branch()` visits.
  template <typename Self, typename Visitor, typename VisitBranch>
  static void visit_around(Self& p, Visitor&& visit, VisitBranch&& visit_branch) {
    visit(std::string("static_alpha"), p.static_alpha);
    visit(std::string("dynamic_alpha_fn"), p.alpha_fn);
    visit(std::string("dynamic_alpha_scale"), p.alpha_scale);
    visit(std::string("static_beta"), p.static_beta);
    visit(std::string("dynamic_beta_fn"), p.beta_fn);
    visit(std::string("dynamic_beta_scale"), p.beta_scale);
    visit_branch();
    visit(std::string("norm.gamma"), p.norm_gamma);
  }
};

namespace detail {

// Adds the numbers of a set of the same shapes. Allocates nothing.
template <typename Scalar>
void add(LocalMHAParameters<Scalar>& to, const LocalMHAParameters<Scalar>& from) {
  to.to_qkv += from.to_qkv;
  to.to_out += from.to_out;
  to.norm_weight += from.norm_weight;
  to.norm_bias += from.norm_bias;
  to.q_scale += from.q_scale;
  to.k_scale += from.k_scale;
  to.to_v_gate_weight += from.to_v_gate_weight;
  to.to_v_gate_bias += from.to_v_gate_bias;
  to.to_qkv_bias += from.to_qkv_bias;
  to.to_out_bias += from.to_out_bias;
  to.q_norm_weight += from.q_norm_weight;
  to.k_norm_weight += from.k_norm_weight;
  to.sinks += from.sinks;
  to.relative_bias += from.relative_bias;
}
template <typename Scalar>
void add(FeedForwardParameters<Scalar>& to, const FeedForwardParameters<Scalar>& from) {
  to.norm_weight += from.norm_weight;
  to.norm_bias += from.norm_bias;
  to.proj_in += from.proj_in;
  to.proj_out += from.proj_out;
}
template <typename Scalar>
void add(DynamicPositionBiasParameters<Scalar>& to,
         const DynamicPositionBiasParameters<Scalar>& from) {
  to.weight_0 += from.weight_0;
  to.bias_0 += from.bias_0;
  to.weight_2 += from.weight_2;
  to.bias_2 += from.bias_2;
  to.weight_4 += from.weight_4;
  to.bias_4 += from.bias_4;
}
template <typename Scalar>
void add(HyperConnectionParameters<Scalar>& to, const HyperConnectionParameters<Scalar>& from) {
  to.static_alpha += from.static_alpha;
  to.alpha_fn += from.alpha_fn;
  to.alpha_scale += from.alpha_scale;
  to.static_beta += from.static_beta;
  to.beta_fn += from.beta_fn;
  to.beta_scale += from.beta_scale;
  to.norm_gamma += from.norm_gamma;
}

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
