// SPDX-License-Identifier: MIT
/// \file
/// Names and shapes of the Python modules' state dicts, gone through once for reading and writing.
#pragma once

#include <array>
#include <string>

#include <local_mha/config.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/encoder_config.hpp>
#include <local_mha/io/state_dict_reader.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

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
  const std::string name = reader.first_name(".static_alpha");
  return name.empty() ? 1 : reader.rows(name);
}

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
