// SPDX-License-Identifier: MIT
/// \file
/// The layer that a model describes, by the rules of its family.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/attention_families.hpp>
#include <local_mha/io/attention_layer_source.hpp>
#include <local_mha/io/model_config.hpp>
#include <local_mha/io/rope.hpp>
#include <local_mha/io/safetensors_error.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

/// \throws std::invalid_argument if the layer has no window
inline void require_sliding(const AttentionFamily& family, const LayerSource& source) {
  const ModelConfig& config = source.config;
  const auto refuse = [&](const std::string& got) {
    reject("prefix", "a layer of " + std::string(family.model_type) + " that slides",
           source.layer ? "layer " + std::to_string(*source.layer) : std::string("one"), ", ", got);
  };
  if (!config.get("use_sliding_window", true)) {
    refuse("where config.use_sliding_window is false");
  } else if (!family.kinds.empty() && config.has(family.kinds) &&
             (family.slides != nullptr || source.layer)) {
    const auto kind = config.element<std::string>(family.kinds, source.number());
    if (kind != family.sliding_kind)
      refuse("which is '" + printable(kind) + "' in " + config.path(family.kinds));
  } else if (family.slides != nullptr && !family.slides(source)) {
    refuse(config.has("sliding_window") || config.has("local_attention")
               ? "which attends to the whole sequence"
               : "where config.sliding_window is none");
  }
}

/// Sizes of the layer. Where a family's own member is not there, Mistral's may be.
inline void set_sizes(const SizeMembers& members, const LayerSource& source,
                      LocalMHAConfig& config) {
  const ModelConfig& from = source.config;
  const SizeMembers usual;
  const auto name_of = [&](std::string_view own, std::string_view otherwise) {
    return from.has(own) ? own : from.has(otherwise) ? otherwise : own;
  };
  config.dim = from.size(name_of(members.dim, usual.dim));
  const auto given = members.dim_head.empty()
                         ? std::nullopt
                         : from.find<Index>(name_of(members.dim_head, usual.dim_head));
  if (given && *given < 1) reject(from.path(members.dim_head), "at least 1", *given);
  if (members.heads.empty()) {
    config.dim_head = given.value_or(members.dim_head_otherwise);
    config.heads = config.dim / config.dim_head;
  } else {
    config.heads = from.size(name_of(members.heads, usual.heads));
    const Index otherwise = members.dim_head_otherwise;
    config.dim_head = given.value_or(otherwise > 0 ? otherwise : config.dim / config.heads);
  }
  local_mha::detail::require_dim_head(from.path("head_dim"), config.dim_head);
  if (!members.kv_heads.empty()) config.kv_heads = from.find<Index>(members.kv_heads);
  if (!members.dropout.empty()) config.dropout = from.get(members.dropout, 0.0);
}

/// The projections, and their biases where there are some.
inline void add_projections(const AttentionFamily& family, const LayerSource& source,
                            AttentionLayer& layer) {
  LocalMHAConfig& config = layer.config;
  const auto& [qkv, out] = family.projections;
  const Index inner = config.heads * config.dim_head;
  const Index kv_inner = resolved_kv_heads(config) * config.dim_head;
  const auto has_bias = [&](std::string_view name) {
    return source.tensors.has(std::string(name) + ".bias");
  };
  const auto add = [&](std::string_view name, const char* parameter, Index first_row, Index rows,
                       Index cols, bool bias) {
    const std::string from(name);
    const std::string to(parameter);
    layer.tensors.push_back({from + ".weight", {rows, cols}, to + ".weight", first_row});
    if (bias) layer.tensors.push_back({from + ".bias", {rows}, to + ".bias", first_row});
  };
  const bool fused = qkv[1].empty();
  const auto end = fused ? qkv.begin() + 1 : qkv.end();
  config.qkv_bias = std::any_of(qkv.begin(), end, has_bias) ||
                    (!family.bias.empty() && source.config.get(family.bias, false));
  if (fused) {
    add(qkv[0], "to_qkv", 0, inner + 2 * kv_inner, config.dim, config.qkv_bias);
  } else {
    add(qkv[0], "to_qkv", 0, inner, config.dim, config.qkv_bias);
    add(qkv[1], "to_qkv", inner, kv_inner, config.dim, config.qkv_bias);
    add(qkv[2], "to_qkv", inner + kv_inner, kv_inner, config.dim, config.qkv_bias);
  }
  if (out.empty()) {
    if (inner != config.dim)
      reject("config." + std::string(family.sizes.dim_head),
             std::to_string(config.dim) +
                 " channels of all heads, those of the input, because the "
                 "module has no output projection",
             inner);
    return;
  }
  config.out_bias = has_bias(out);
  add(out, "to_out", 0, config.dim, inner, config.out_bias);
}

/// The weights of the norms of queries and keys.
inline void add_qk_norms(const AttentionFamily& family, const LayerSource& source,
                         AttentionLayer& layer) {
  LocalMHAConfig& config = layer.config;
  if (family.qk_norm == QkNormKind::none) return;
  config.qk_norm = {family.qk_norm, source.config.get("rms_norm_eps", 1e-6)};
  const bool all = family.qk_norm == QkNormKind::rms_all;
  const auto add = [&](const std::string& name, Index heads) {
    layer.tensors.push_back({.name = name,
                             .shape = {all ? heads * config.dim_head : config.dim_head},
                             .parameter = name,
                             .offset = family.norm_offset});
  };
  add("q_norm.weight", config.heads);
  add("k_norm.weight", resolved_kv_heads(config));
}

/// The layer that a family's configuration describes.
inline AttentionLayer describe_layer(const LayerSource& source) {
  const AttentionFamily& family = family_of(source.config);
  require_sliding(family, source);
  AttentionLayer layer{.model_type = std::string(family.model_type), .config = {}, .tensors = {}};
  LocalMHAConfig& config = layer.config;
  family.window(source, config);
  set_sizes(family.sizes, source, config);
  config.use_rotary_pos_emb = family.rotary && has_positions(source);
  if (config.use_rotary_pos_emb)
    config.rotary = rotary_of(source.config, family.rope, config.dim_head);
  config.scale = family.scale;
  if (!family.scale_member.empty())
    config.scale = 1 / std::sqrt(positive(source.config, family.scale_member));
  validate(config);
  add_projections(family, source, layer);
  add_qk_norms(family, source, layer);
  if (family.special != nullptr) family.special(source, layer);
  validate(config);
  return layer;
}

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
