// SPDX-License-Identifier: MIT
/// \file
/// The weights of the modules inside a layer, with the names and shapes of the Python state dicts.
///
/// Every set offers `zeros(…)`, which has all shapes; for_each_parameter() goes through its
/// tensors. Gradients are sets of the same type.
#pragma once

#include <algorithm>
#include <string>

#include <local_mha/component_config.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/parameter_set.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

template <typename A, typename B>
bool same_shape(const A& a, const B& b) {
  return a.rows() == b.rows() && a.cols() == b.cols();
}

// What Parameters::zeros() and Parameters::fits() do with `visit_shapes(visit)`, which calls
// `visit(tensor, rows, cols)` for each tensor.
template <typename VisitShapes>
void set_zeros(VisitShapes&& visit_shapes) {
  visit_shapes([](auto& tensor, Index rows, Index cols) { tensor.setZero(rows, cols); });
}
template <typename VisitShapes>
bool all_fit(VisitShapes&& visit_shapes) {
  bool fit = true;
  visit_shapes([&](const auto& tensor, Index rows, Index cols) {
    fit = fit && tensor.rows() == rows && tensor.cols() == cols;
  });
  return fit;
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

  /// All of them 0, in the shapes of a configuration.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  static LocalMHAParameters zeros(const LocalMHAConfig& config) {
    LocalMHAParameters p;
    detail::set_zeros([&](auto&& visit) { visit_shapes(p, config, visit); });
    return p;
  }

  /// Whether each tensor has the shape that it has in `zeros(config)`.
  /// \throws std::invalid_argument as zeros() does
  bool fits(const LocalMHAConfig& config) const {
    return detail::all_fit([&](auto&& visit) { visit_shapes(*this, config, visit); });
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

 private:
  // `visit(tensor, rows, cols)` for each tensor with the shape that the configuration gives it,
  // `[0, 0]` or `[0]` if it does not use it.
  template <typename Self, typename Visitor>
  static void visit_shapes(Self& p, const LocalMHAConfig& config, Visitor&& visit) {
    validate(config);
    const Index dim = config.dim, heads = config.heads, kv_heads = resolved_kv_heads(config);
    const Index qkv = detail::qkv_heads(config) * config.dim_head;
    const auto matrix = [&](auto& tensor, bool used, Index rows, Index cols) {
      visit(tensor, used ? rows : 0, used ? cols : 0);
    };
    const auto vector = [&](auto& tensor, bool used, Index size) {
      visit(tensor, used ? size : 0, 1);
    };
    const bool gates = config.gate_values_per_head;
    const bool scales = resolved_qk_norm(config) == QkNormKind::l2;
    matrix(p.to_qkv, true, qkv, dim);
    matrix(p.to_out, true, dim, heads * config.dim_head);
    vector(p.norm_weight, config.prenorm, dim);
    vector(p.norm_bias, config.prenorm && config.norm.kind == NormKind::layer, dim);
    vector(p.q_scale, scales, config.dim_head);
    vector(p.k_scale, scales, config.dim_head);
    matrix(p.to_v_gate_weight, gates, heads, dim);
    vector(p.to_v_gate_bias, gates, heads);
    vector(p.to_qkv_bias, config.qkv_bias, qkv);
    vector(p.to_out_bias, config.out_bias, dim);
    vector(p.q_norm_weight, true, detail::qk_norm_channels(config, heads));
    vector(p.k_norm_weight, true, detail::qk_norm_channels(config, kv_heads));
    vector(p.sinks, config.sinks, heads);
    matrix(p.relative_bias, config.relative_bias, heads,
           config.relative_bias ? detail::relative_bias_columns(config) : 0);
  }
};

/// Weights of FeedForward.
template <typename Scalar>
struct FeedForwardParameters {
  Vector<Scalar> norm_weight;  ///< `[dim]`
  Vector<Scalar> norm_bias;    ///< `[dim]`
  RowMatrix<Scalar> proj_in;   ///< `[2·inner, dim]`: values, then gates
  RowMatrix<Scalar> proj_out;  ///< `[dim, inner]`

  /// All of them 0.
  /// \throws std::invalid_argument if a size is negative, or the weights are too large
  static FeedForwardParameters zeros(Index dim, Index inner) {
    FeedForwardParameters p;
    detail::set_zeros([&](auto&& visit) { visit_shapes(p, dim, inner, visit); });
    return p;
  }

  /// Whether each tensor has the shape that it has in `zeros(dim, inner)`. Allocates nothing.
  /// \throws std::invalid_argument as zeros() does
  bool fits(Index dim, Index inner) const {
    return detail::all_fit([&](auto&& visit) { visit_shapes(*this, dim, inner, visit); });
  }

  /// All of them 0, in the shapes of a configuration.
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

 private:
  // `visit(tensor, rows, cols)` for each tensor with its shape.
  template <typename Self, typename Visitor>
  static void visit_shapes(Self& p, Index dim, Index inner, Visitor&& visit) {
    detail::require_at_least("dim", dim, 0);
    detail::require_at_least("inner", inner, 0);
    detail::require_product("inner", inner, 2 * dim);
    visit(p.norm_weight, dim, 1);
    visit(p.norm_bias, dim, 1);
    visit(p.proj_in, 2 * inner, dim);
    visit(p.proj_out, dim, inner);
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

  /// All of them 0, in the shapes of a configuration.
  /// \throws std::invalid_argument if a size is negative, or the weights are too large
  static DynamicPositionBiasParameters zeros(Index hidden, Index heads) {
    DynamicPositionBiasParameters p;
    detail::set_zeros([&](auto&& visit) { visit_shapes(p, hidden, heads, visit); });
    return p;
  }

  /// Whether each tensor has the shape that it has in `zeros(hidden, heads)`. Allocates nothing.
  /// \throws std::invalid_argument as zeros() does
  bool fits(Index hidden, Index heads) const {
    return detail::all_fit([&](auto&& visit) { visit_shapes(*this, hidden, heads, visit); });
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

 private:
  // `visit(tensor, rows, cols)` for each tensor with its shape.
  template <typename Self, typename Visitor>
  static void visit_shapes(Self& p, Index hidden, Index heads, Visitor&& visit) {
    detail::require_at_least("hidden", hidden, 0);
    detail::require_at_least("heads", heads, 0);
    detail::require_product("hidden", hidden, (std::max)(hidden, heads));
    visit(p.weight_0, hidden, 1);
    visit(p.bias_0, hidden, 1);
    visit(p.weight_2, hidden, hidden);
    visit(p.bias_2, hidden, 1);
    visit(p.weight_4, heads, hidden);
    visit(p.bias_4, heads, 1);
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

  /// All of them 0.
  /// \throws std::invalid_argument if a size is out of range
  static HyperConnectionParameters zeros(Index streams, Index dim) {
    HyperConnectionParameters p;
    detail::set_zeros([&](auto&& visit) { visit_shapes(p, streams, dim, visit); });
    return p;
  }

  /// Whether each tensor has the shape that it has in `zeros(streams, dim)`. Allocates nothing.
  /// \throws std::invalid_argument as zeros() does
  bool fits(Index streams, Index dim) const {
    return detail::all_fit([&](auto&& visit) { visit_shapes(*this, streams, dim, visit); });
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

 private:
  // `visit(tensor, rows, cols)` for each tensor with its shape.
  template <typename Self, typename Visitor>
  static void visit_shapes(Self& p, Index streams, Index dim, Visitor&& visit) {
    detail::require_streams("streams", streams, dim);
    visit(p.static_alpha, streams, streams + 1);
    visit(p.alpha_fn, dim, streams + 1);
    visit(p.static_beta, streams, 1);
    visit(p.beta_fn, dim, 1);
    visit(p.norm_gamma, dim, 1);
  }
};

namespace detail {

// Adds the numbers of a set of the same shapes, which become 0. Allocates nothing.
template <typename Tensor>
void add_and_clear(Eigen::PlainObjectBase<Tensor>& to, Eigen::PlainObjectBase<Tensor>& from) {
  for (Index i = 0; i < to.size(); ++i) {
    to.data()[i] += from.data()[i];
    from.data()[i] = typename Tensor::Scalar(0);
  }
}
template <typename Scalar>
void add_and_clear(LocalMHAParameters<Scalar>& to, LocalMHAParameters<Scalar>& from) {
  add_and_clear(to.to_qkv, from.to_qkv);
  add_and_clear(to.to_out, from.to_out);
  add_and_clear(to.norm_weight, from.norm_weight);
  add_and_clear(to.norm_bias, from.norm_bias);
  add_and_clear(to.q_scale, from.q_scale);
  add_and_clear(to.k_scale, from.k_scale);
  add_and_clear(to.to_v_gate_weight, from.to_v_gate_weight);
  add_and_clear(to.to_v_gate_bias, from.to_v_gate_bias);
  add_and_clear(to.to_qkv_bias, from.to_qkv_bias);
  add_and_clear(to.to_out_bias, from.to_out_bias);
  add_and_clear(to.q_norm_weight, from.q_norm_weight);
  add_and_clear(to.k_norm_weight, from.k_norm_weight);
  add_and_clear(to.sinks, from.sinks);
  add_and_clear(to.relative_bias, from.relative_bias);
}
template <typename Scalar>
void add_and_clear(FeedForwardParameters<Scalar>& to, FeedForwardParameters<Scalar>& from) {
  add_and_clear(to.norm_weight, from.norm_weight);
  add_and_clear(to.norm_bias, from.norm_bias);
  add_and_clear(to.proj_in, from.proj_in);
  add_and_clear(to.proj_out, from.proj_out);
}
template <typename Scalar>
void add_and_clear(DynamicPositionBiasParameters<Scalar>& to,
                   DynamicPositionBiasParameters<Scalar>& from) {
  add_and_clear(to.weight_0, from.weight_0);
  add_and_clear(to.bias_0, from.bias_0);
  add_and_clear(to.weight_2, from.weight_2);
  add_and_clear(to.bias_2, from.bias_2);
  add_and_clear(to.weight_4, from.weight_4);
  add_and_clear(to.bias_4, from.bias_4);
}
template <typename Scalar>
void add_and_clear(HyperConnectionParameters<Scalar>& to, HyperConnectionParameters<Scalar>& from) {
  add_and_clear(to.static_alpha, from.static_alpha);
  add_and_clear(to.alpha_fn, from.alpha_fn);
  add_and_clear(to.alpha_scale, from.alpha_scale);
  add_and_clear(to.static_beta, from.static_beta);
  add_and_clear(to.beta_fn, from.beta_fn);
  add_and_clear(to.beta_scale, from.beta_scale);
  add_and_clear(to.norm_gamma, from.norm_gamma);
}

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
