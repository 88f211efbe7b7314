// SPDX-License-Identifier: MIT
/// \file
/// The weights of a layer, as its passes read them.
#pragma once

#include <array>
#include <cstddef>
#include <type_traits>
#include <utility>

#include <local_mha/attention/local_attention.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/on_demand.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/ops/packed_weight.hpp>
#include <local_mha/ops/prenorm.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/rms_norm.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// All that a pass reads of a layer: its weights, each in one form. What the configuration has not
/// is empty.
/// \tparam Storage what the weights of projections are rounded to, see can_store
/// \tparam Arithmetic what they are multiplied as, see can_multiply
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
struct LayerWeights {
  using Parameters = LocalMHAParameters<Scalar>;
  using Weight = PackedWeight<Scalar, Storage, Arithmetic>;
  /// Whether products are of what is rounded.
  static constexpr bool of_operands = !std::is_same_v<Scalar, Arithmetic>;

  /// \param given fit the configuration, which is valid; of Scalars, or of the Storage
  template <typename Given>
  LayerWeights(const LocalMHAConfig& layer_config, LocalMHAParameters<Given> given)
      : config(layer_config),
        attention(LocalAttention<Scalar>(attention_config(config)).template keys_as<Storage>()),
        to_v_gate_bias(cast<Scalar>(std::move(given.to_v_gate_bias))),
        to_qkv_bias(cast<Scalar>(std::move(given.to_qkv_bias))),
        to_out_bias(cast<Scalar>(std::move(given.to_out_bias))),
        sinks(cast<Scalar>(std::move(given.sinks))),
        relative_bias(cast<Scalar>(std::move(given.relative_bias))) {
    if (config.prenorm)
      norm = Prenorm<Scalar>(config.norm, cast<Scalar>(std::move(given.norm_weight)),
                             cast<Scalar>(std::move(given.norm_bias)));
    make_norm(cast<Scalar>(std::move(given.q_scale)), cast<Scalar>(std::move(given.q_norm_weight)),
              q_norm, norms_of_all[0]);
    make_norm(cast<Scalar>(std::move(given.k_scale)), cast<Scalar>(std::move(given.k_norm_weight)),
              k_norm, norms_of_all[1]);
    const Index dim_head = config.dim_head;
    to_qkv = Weight(given.to_qkv, dim_head);
    if (config.gate_values_per_head) to_v_gate = Weight(given.to_v_gate_weight);
    to_out = Weight(given.to_out, 0, dim_head, padded_channels<Scalar>(dim_head));
  }

  /// What the layer was made of, as it is rounded: made at the first call.
  const Parameters& parameters() const {
    return parameters_.get([&] { return unpacked(); });
  }

  /// The same, made anew.
  Parameters unpacked() const {
    Parameters p;
    p.to_qkv = to_qkv.unpacked();
    p.to_out = to_out.unpacked();
    p.norm_weight = norm.weight();
    p.norm_bias = norm.bias();
    const bool scales = resolved_qk_norm(config) == QkNormKind::l2;
    (scales ? p.q_scale : p.q_norm_weight) = weight_of(q_norm, norms_of_all[0]);
    (scales ? p.k_scale : p.k_norm_weight) = weight_of(k_norm, norms_of_all[1]);
    p.to_v_gate_weight = to_v_gate.unpacked();
    p.to_v_gate_bias = to_v_gate_bias;
    p.to_qkv_bias = to_qkv_bias;
    p.to_out_bias = to_out_bias;
    p.sinks = sinks;
    p.relative_bias = relative_bias;
    return p;
  }

  /// Allocates nothing where they fit.
  /// \throws std::invalid_argument naming the first tensor of `gradients` that has another shape
  void require_same_shapes(const Parameters& gradients) const {
    const Parameters& g = gradients;
    const bool scales = resolved_qk_norm(config) == QkNormKind::l2;
    const auto same = [&](const Vector<Scalar>& scale, const Vector<Scalar>& weight, std::size_t i,
                          const QkNorm<Scalar>& norm_of_each) {
      return same_shape(scales ? scale : weight, weight_of(norm_of_each, norms_of_all[i])) &&
             (scales ? weight : scale).size() == 0;
    };
    if (same_shape(g.to_qkv, to_qkv) && same_shape(g.to_out, to_out) &&
        same_shape(g.norm_weight, norm.weight()) && same_shape(g.norm_bias, norm.bias()) &&
        same(g.q_scale, g.q_norm_weight, 0, q_norm) &&
        same(g.k_scale, g.k_norm_weight, 1, k_norm) && same_shape(g.to_v_gate_weight, to_v_gate) &&
        same_shape(g.to_v_gate_bias, to_v_gate_bias) && same_shape(g.to_qkv_bias, to_qkv_bias) &&
        same_shape(g.to_out_bias, to_out_bias) && same_shape(g.sinks, sinks) &&
        same_shape(g.relative_bias, relative_bias))
      return;
    detail::require_same_shapes(gradients, Parameters::zeros(config));
  }

  /// All numbers, by a sample of which these weights are known again.
  std::array<TensorNumbers<Scalar, Storage, Arithmetic>, 12> numbers() const
    requires Trainable<Scalar, Storage, Arithmetic>
  {
    const auto of = [](const auto& tensor) {
      return TensorNumbers<Scalar, Storage, Arithmetic>(tensor);
    };
    return {of(to_qkv),
            of(to_out),
            of(norm.weight()),
            of(norm.bias()),
            of(weight_of(q_norm, norms_of_all[0])),
            of(weight_of(k_norm, norms_of_all[1])),
            of(to_v_gate),
            of(to_v_gate_bias),
            of(to_qkv_bias),
            of(to_out_bias),
            of(sinks),
            of(relative_bias)};
  }

  LocalMHAConfig config;
  LocalAttention<Scalar> attention;
  Prenorm<Scalar> norm;
  QkNorm<Scalar> q_norm;
  QkNorm<Scalar> k_norm;
  std::array<RmsNorm<Scalar>, 2> norms_of_all;  ///< of queries and of keys, all heads together
  Weight to_qkv;                                ///< a group of rows is a head
  Weight to_v_gate;
  Weight to_out;
  // As in LocalMHAParameters.
  Vector<Scalar> to_v_gate_bias;
  Vector<Scalar> to_qkv_bias;
  Vector<Scalar> to_out_bias;
  Vector<Scalar> sinks;
  RowMatrix<Scalar> relative_bias;

 private:
  // That of queries or of keys, which is of each head or of all.
  LOCAL_MHA_NOINLINE void make_norm(const Vector<Scalar>& scale, const Vector<Scalar>& weight,
                                    QkNorm<Scalar>& of_each, RmsNorm<Scalar>& of_all) const {
    if (scale.size() > 0) of_each = QkNorm<Scalar>(scale);
    if (weight.size() == 0) return;
    RmsNorm<Scalar> rms(weight, config.qk_norm.eps);
    if (config.qk_norm.kind == QkNormKind::rms)
      of_each = QkNorm<Scalar>(std::move(rms));
    else
      of_all = std::move(rms);
  }
  static const Vector<Scalar>& weight_of(const QkNorm<Scalar>& of_each,
                                         const RmsNorm<Scalar>& of_all) {
    return of_each ? of_each.weight() : of_all.weight();
  }

  OnDemand<Parameters> parameters_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
