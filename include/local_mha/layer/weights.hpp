// SPDX-License-Identifier: MIT
/// \file
/// The weights of a layer, as its passes read them.
#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include <local_mha/attention/local_attention.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/prenorm.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/rms_norm.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// All that a pass reads of a layer. What the configuration has not is empty.
template <typename Scalar>
struct LayerWeights {
  /// \param given fit the configuration, which is valid
  LayerWeights(const LocalMHAConfig& layer_config, LocalMHAParameters<Scalar> given)
      : config(layer_config), attention(attention_config(config)), parameters(std::move(given)) {
    const LocalMHAParameters<Scalar>& p = parameters;
    if (config.prenorm) norm = Prenorm<Scalar>(config.norm, p.norm_weight, p.norm_bias);
    make_norm(p.q_scale, p.q_norm_weight, q_norm, norms_of_all[0]);
    make_norm(p.k_scale, p.k_norm_weight, k_norm, norms_of_all[1]);
    const Index dim_head = config.dim_head;
    to_qkv = PackedWeight<Scalar>(p.to_qkv, dim_head);
    if (config.gate_values_per_head) to_v_gate = PackedWeight<Scalar>(p.to_v_gate_weight);
    to_out = PackedWeight<Scalar>(p.to_out, 0, dim_head, padded_channels<Scalar>(dim_head));
  }

  LocalMHAConfig config;
  LocalAttention<Scalar> attention;
  LocalMHAParameters<Scalar> parameters;
  Prenorm<Scalar> norm;
  QkNorm<Scalar> q_norm;
  QkNorm<Scalar> k_norm;
  std::array<RmsNorm<Scalar>, 2> norms_of_all;  ///< of queries and of keys, all heads together
  PackedWeight<Scalar> to_qkv;                  ///< a group of rows is a head
  PackedWeight<Scalar> to_v_gate;
  PackedWeight<Scalar> to_out;

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
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
