// SPDX-License-Identifier: MIT
/// \file
/// What a stream is, as the text that a saved state carries: that of another one is refused.
#pragma once

#include <sstream>
#include <string>
#include <type_traits>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/window.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// What a layer makes of its rows beside what its attention does, as text that a state carries.
inline std::string description_of(const LocalMHAConfig& config) {
  std::ostringstream text = plain_text();
  text << std::boolalpha << "LocalMHA, dim " << config.dim << ", heads " << config.heads
       << ", dim_head " << config.dim_head << ", prenorm " << config.prenorm << ", qk_rmsnorm "
       << (resolved_qk_norm(config) == QkNormKind::l2) << ", gates " << config.gate_values_per_head
       << ", ";
  if (config.qkv_bias) text << "qkv_bias, ";
  if (config.out_bias) text << "out_bias, ";
  if (resolved_kv_heads(config) != config.heads)
    text << "kv_heads " << resolved_kv_heads(config) << ", ";
  if (config.sinks) text << "sinks, ";
  if (config.relative_bias) text << "relative_bias, ";
  text.precision(17);
  if (resolved_qk_norm(config) >= QkNormKind::rms)
    text << (config.qk_norm.kind == QkNormKind::rms ? "rms " : "rms_all ") << config.qk_norm.eps
         << ", ";
  if (config.prenorm && config.norm != NormConfig{})
    text << (config.norm.kind == NormKind::layer ? "layer norm " : "rms norm ") << config.norm.eps
         << ", ";
  return text.str();
}

/// How operands of products are rounded, if they are, as text that a state carries: what is kept is
/// the same, but single positions read it as it lies.
template <typename Scalar, typename Arithmetic>
constexpr const char* description_of_products() {
  return std::is_same_v<Scalar, Arithmetic> ? "" : ", multiplied as bfloat16";
}

/// The rules by which positions see one another, as text that a state carries.
template <typename Attention, typename Bias>
std::string description_of(const Attention& attention, const Window& window,
                           const Bias& attn_bias) {
  const LocalAttentionConfig& config = attention.config();
  std::ostringstream text = plain_text();
  text << std::boolalpha << "window " << window.size() << " from " << window.place_in_bucket(0)
       << ", causal " << config.causal << ", exact " << config.exact_windowsize
       << ", look_backward " << config.look_backward << ", look_forward "
       << resolved_look_forward(config) << ", shared_qk "
       << config.shared_qk
       // Keys are rotated by their place in a group, whose size depends on the build.
       << ", rotary in groups of " << (attention.rotary() ? attention.rotary()->group() : 0)
       << ", xpos " << config.use_xpos;
  text.precision(17);
  if (config.xpos_scale_base) text << " over " << *config.xpos_scale_base;
  if (config.scale) text << ", scale " << *config.scale;
  if (attention.rotary() && config.rotary != RotaryConfig{}) {
    text << ", rotary " << attention.rotary()->pairs().count
         << (config.rotary.pairing == RotaryPairing::halves ? " halves" : " interleaved")
         << " times " << config.rotary.factor << " by";
    for (const double frequency : attention.rotary()->frequencies()) text << ' ' << frequency;
  }
  if (config.token_window)
    text << ", token_window " << config.token_window->left << " " << config.token_window->right;
  if (config.first_keys > 0) text << ", first_keys " << config.first_keys;
  if (config.score.soft_cap) text << ", soft_cap " << *config.score.soft_cap;
  if (!config.score.alibi_slopes.empty()) {
    text << ", alibi_slopes";
    for (const double slope : config.score.alibi_slopes) text << ' ' << slope;
  }
  if (attn_bias) text << ", attn_bias " << to_string(attn_bias->dimensions());
  return text.str();
}

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
