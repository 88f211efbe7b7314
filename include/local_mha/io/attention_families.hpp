// SPDX-License-Identifier: MIT
/// \file
/// The attention layers of published models: which LocalMHA each is, and which tensors are its
/// weights.
///
/// A family is what models of a `model_type` have in common: a row of attention_families, whose
/// defaults are those of Mistral.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <local_mha/attention/token_window.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/layer_tensors.hpp>
#include <local_mha/io/model_config.hpp>
#include <local_mha/io/rope.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/state_dict.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// A model's attention layer as a LocalMHA.
struct AttentionLayer {
  std::string model_type;
  LocalMHAConfig config;
  /// If none is the output projection, that is the identity.
  std::vector<LayerTensor> tensors;
  /// Numbers in the file that are no weights, behind the layer's prefix.
  std::vector<std::string> buffers = {};
  /// The module takes and gives `[B, dim, N]`.
  bool channels_first = false;
  /// The module adds its input to its output.
  bool residual = false;
};

namespace detail {

/// What a family reads of a model.
struct LayerSource {
  const ModelConfig& config;
  StateDictReader<double>& tensors;
  const std::string& prefix;
  std::optional<Index> layer;  ///< its number in the stack

  Index number() const {
    if (layer) return *layer;
    reject("prefix", "the layer's number, as in model.layers.0.self_attn", "'", printable(prefix),
           "'");
  }
};

// Which layers of a stack slide, if `layer_types` does not say so.

inline bool every_layer(const LayerSource& source) { return source.config.has("sliding_window"); }

/// All but the last of every so many.
template <Index otherwise>
bool but_each_last(const LayerSource& source) {
  const Index period = source.config.has("sliding_window_pattern")
                           ? source.config.size("sliding_window_pattern")
                           : otherwise;
  return (source.number() + 1) % period != 0;
}

/// All but the first of every so many.
inline bool but_each_first(const LayerSource& source) {
  const Index period = source.config.has("global_attn_every_n_layers")
                           ? source.config.size("global_attn_every_n_layers")
                           : 3;
  return source.number() % period != 0;
}

/// Those behind the first ones, if there is to be a window at all.
inline bool from_a_layer_on(const LayerSource& source) {
  return source.config.get("use_sliding_window", false) && every_layer(source) &&
         source.number() >= source.config.get<Index>("max_window_layers", 28);
}
inline bool if_used(const LayerSource& source) {
  return source.config.get("use_sliding_window", false) && every_layer(source);
}

/// Whether the layer has a rotary embedding, where not all have.
inline bool has_positions(const LayerSource& source) {
  const ModelConfig& config = source.config;
  if (config.has("no_rope_layers"))  // 1: has
    return config.element<Index>("no_rope_layers", source.number()) != 0;
  return !config.has("no_rope_layer_interval") ||
         (source.number() + 1) % config.size("no_rope_layer_interval") != 0;
}
inline bool without_positions(const LayerSource& source) {
  return if_used(source) && !has_positions(source);
}

inline bool gpt_neo_local(const LayerSource& source) {
  return source.config.element<std::string>("attention_layers", source.number()) == "local";
}

// Where a layer's queries look.

inline void sliding_window(const LayerSource& source, LocalMHAConfig& config) {
  config.token_window = token_windows::hugging_face(source.config.size("sliding_window"));
  config.causal = true;
}

inline void modernbert_window(const LayerSource& source, LocalMHAConfig& config) {
  // Newer files may have half of it alone.
  if (source.config.has("local_attention")) {
    config.token_window = token_windows::modernbert(source.config.size("local_attention"));
  } else {
    const Index side = source.config.size("sliding_window");
    config.token_window = token_windows::flash(side, side);
  }
}

/// A decoder's window counts the query's own position, and is half of the encoder's.
inline void modernbert_decoder_window(const LayerSource& source, LocalMHAConfig& config) {
  const Index width = source.config.has("sliding_window")
                          ? source.config.size("sliding_window")
                          : source.config.size("local_attention") / 2;
  config.token_window = token_windows::hugging_face(width);
  config.causal = true;
}

inline void long_t5_window(const LayerSource& source, LocalMHAConfig& config) {
  const Index radius = source.config.size("local_radius");
  if (radius > 1 << 24) reject("config.local_radius", "at most 2^24", radius);
  config.token_window = token_windows::long_t5(radius);
}

inline void gpt_neo_window(const LayerSource& source, LocalMHAConfig& config) {
  config.token_window = token_windows::hugging_face(
      source.config.has("window_size") ? source.config.size("window_size") : 256);
  config.causal = true;
}

inline void reformer_window(const LayerSource& source, LocalMHAConfig& config) {
  const auto before = source.config.get<Index>("local_num_chunks_before", 1);
  const auto after = source.config.get<Index>("local_num_chunks_after", 0);
  const bool is_decoder = source.config.get("is_decoder", false);
  // The module rolls its chunks, and a decoder's mask alone hides what comes round.
  if (!is_decoder && (before > 0 || after > 0))
    reject("config.is_decoder",
           "true, because otherwise the first chunks look round to the last ones", "false");
  const LocalAttentionConfig around = token_windows::reformer(
      source.config.size("local_attn_chunk_length"), before, after, is_decoder);
  config.window_size = around.window_size;
  config.look_backward = around.look_backward;
  config.look_forward = around.look_forward;
  config.causal = around.causal;
  config.exact_windowsize = false;
}

/// One bucket alone.
inline void snac_window(const LayerSource& source, LocalMHAConfig& config) {
  config.window_size = source.config.has("attn_window_size")
                           ? source.config.size("attn_window_size")
                           : source.config.get<Index>("window_size", 32);
  config.look_backward = 0;
  config.look_forward = 0;
  config.exact_windowsize = false;
}

// What else is special.

/// LongT5's bucket of a key that is `ahead` positions ahead: half of the buckets are of later keys;
/// of each half, one half is of a distance each, and the other of ranges that grow.
inline Index long_t5_bucket(Index ahead, Index buckets, Index max_distance) {
  const Index half = buckets / 2;
  const Index exact = buckets / 4;
  const Index n = std::abs(ahead);
  Index bucket = n;
  if (n >= exact) {
    const double share = std::log(static_cast<double>(n) / static_cast<double>(exact)) /
                         std::log(static_cast<double>(max_distance) / static_cast<double>(exact));
    bucket =
        (std::min)(exact + static_cast<Index>(share * static_cast<double>(half - exact)), half - 1);
  }
  return (ahead > 0 ? half : 0) + bucket;
}

inline void long_t5(const LayerSource& source, AttentionLayer& layer) {
  if (source.config.get<std::string>("encoder_attention_type", "local") != "local")
    reject("config.encoder_attention_type", "local",
           source.config.get<std::string>("encoder_attention_type", ""));
  if (source.prefix.find("decoder.") != std::string::npos)
    reject("prefix", "a layer that slides, one of the encoder", "'", printable(source.prefix), "'");
  // The first block's table serves all of them.
  LayerTensor table{
      .name = "relative_attention_bias.weight", .shape = {}, .parameter = "relative_bias"};
  if (!source.tensors.has(table.name)) {
    const std::size_t at = source.prefix.find("block.");
    if (at == std::string::npos) return;
    const std::size_t number = at + std::string_view("block.").size();
    table.prefix = source.prefix.substr(0, number) + '0' +
                   source.prefix.substr(source.prefix.find('.', number));
  }
  const Index buckets = source.config.get<Index>("relative_attention_num_buckets", 32);
  const Index distance = source.config.get<Index>("relative_attention_max_distance", 128);
  if (buckets < 4 || buckets > 1 << 20)
    reject("config.relative_attention_num_buckets", "4 to 2^20", buckets);
  if (distance <= buckets / 4)
    reject("config.relative_attention_max_distance",
           "more than a quarter of the " + std::to_string(buckets) + " buckets", distance);
  layer.config.relative_bias = true;
  validate(layer.config);
  const auto [left, right] = *layer.config.token_window;
  table.shape = {buckets, layer.config.heads};
  for (Index ahead = -left; ahead <= right; ++ahead)
    table.rows.push_back(long_t5_bucket(ahead, buckets, distance));
  layer.tensors.push_back(std::move(table));
}

inline void gemma(const LayerSource& source, AttentionLayer& layer) {
  if (source.config.get("use_bidirectional_attention", false))
    reject("config.use_bidirectional_attention", "false", true);
  layer.config.score.soft_cap = source.config.find<double>("attn_logit_softcapping");
}

inline void gpt_oss(const LayerSource&, AttentionLayer& layer) {
  layer.config.sinks = true;
  layer.tensors.push_back({"sinks", {layer.config.heads}, "sinks"});
}

inline void granite(const LayerSource& source, AttentionLayer& layer) {
  layer.config.scale = source.config.find<double>("attention_multiplier");
  gpt_oss(source, layer);
}

/// Channels are one axis before rows, and the input is added to the output.
inline void snac(const LayerSource& source, AttentionLayer& layer) {
  LocalMHAConfig& config = layer.config;
  config.prenorm = true;
  layer.tensors.push_back({"norm.weight", {config.dim}, "norm.weight"});
  layer.tensors.push_back({"norm.bias", {config.dim}, "norm.bias"});
  layer.channels_first = layer.residual = true;
  config.use_rotary_pos_emb = source.config.get("use_rotary_pos_emb", true);
  const std::string frequencies = "rel_pos.inv_freq";
  if (!config.use_rotary_pos_emb || !source.tensors.has(frequencies)) return;
  Vector<double> inv_freq;
  source.tensors.tensor(true, frequencies, inv_freq, config.dim_head / 2);
  config.rotary.inv_freq.assign(inv_freq.data(), inv_freq.data() + inv_freq.size());
  layer.buffers.push_back(frequencies);
}

inline void gpt_neo(const LayerSource& source, AttentionLayer& layer) {
  for (const char* name : {"bias", "masked_bias"})
    if (source.tensors.has(name)) layer.buffers.emplace_back(name);
}

/// Members of `config.json` that are sizes of a layer.
struct SizeMembers {
  std::string_view dim = "hidden_size";
  std::string_view heads = "num_attention_heads";  ///< empty: dim / dim_head
  std::string_view kv_heads = "num_key_value_heads";
  std::string_view dim_head = "head_dim";
  Index dim_head_otherwise = 0;  ///< if it is not given; 0: dim / heads
  std::string_view dropout = "attention_dropout";
};

/// Names of projections, without `.weight` and `.bias`.
struct ProjectionNames {
  std::array<std::string_view, 3> qkv{"q_proj", "k_proj", "v_proj"};  ///< the first alone: fused
  std::string_view out = "o_proj";                                    ///< empty: there is none
};

/// A row of the table.
struct AttentionFamily {
  std::string_view model_type;
  /// Which layers slide if neither `layer_types` nor `kinds` says so. Null: all.
  bool (*slides)(const LayerSource&) = every_layer;
  /// A list with the kind of each layer, and the kind that slides.
  std::string_view kinds = "layer_types";
  std::string_view sliding_kind = "sliding_attention";
  void (*window)(const LayerSource&, LocalMHAConfig&) = sliding_window;
  SizeMembers sizes = {};
  ProjectionNames projections = {};
  /// A member that says whether the queries, keys and values have biases. They may have them
  /// without.
  std::string_view bias = "attention_bias";
  QkNormKind qk_norm = QkNormKind::none;
  double norm_offset = 0;  ///< what is added to the norms' weights
  bool rotary = true;
  RopeRules rope = {};
  /// The factor of scores is this member to the power −1/2. Empty: `dim_head^-0.5`.
  std::string_view scale_member = {};
  std::optional<double> scale = {};  ///< the factor of scores
  void (*special)(const LayerSource&, AttentionLayer&) = nullptr;
};

// clang-format off
inline const std::array attention_families{
    AttentionFamily{.model_type = "mistral"},
    AttentionFamily{.model_type = "mixtral"},
    AttentionFamily{.model_type = "ministral"},
    AttentionFamily{.model_type = "starcoder2", .bias = "use_bias"},
    AttentionFamily{.model_type = "mimi"},
    AttentionFamily{.model_type = "cwm"},
    AttentionFamily{.model_type = "granite_swa", .special = granite},
    AttentionFamily{.model_type = "granitemoe_swa", .special = granite},
    AttentionFamily{.model_type = "phi3", .projections = {.qkv = {"qkv_proj"}}},
    AttentionFamily{.model_type = "phimoe"},
    AttentionFamily{.model_type = "qwen2", .slides = from_a_layer_on},
    AttentionFamily{.model_type = "qwen2_moe", .slides = from_a_layer_on, .bias = "qkv_bias"},
    AttentionFamily{.model_type = "qwen3", .slides = from_a_layer_on, .qk_norm = QkNormKind::rms},
    AttentionFamily{.model_type = "qwen3_moe", .slides = if_used, .qk_norm = QkNormKind::rms},
    AttentionFamily{.model_type = "dots1", .slides = from_a_layer_on, .qk_norm = QkNormKind::rms},
    AttentionFamily{.model_type = "smollm3", .slides = without_positions},
    AttentionFamily{.model_type = "exaone4", .slides = but_each_last<4>,
                    .qk_norm = QkNormKind::rms},
    AttentionFamily{.model_type = "exaone_moe", .slides = but_each_last<4>,
                    .qk_norm = QkNormKind::rms},
    AttentionFamily{.model_type = "gemma2", .slides = but_each_last<2>,
                    .scale_member = "query_pre_attn_scalar", .special = gemma},
    AttentionFamily{.model_type = "vaultgemma", .slides = but_each_last<2>,
                    .scale_member = "query_pre_attn_scalar", .special = gemma},
    AttentionFamily{.model_type = "gemma3", .slides = but_each_last<6>,
                    .qk_norm = QkNormKind::rms, .norm_offset = 1,
                    .rope = {.local_theta = "rope_local_base_freq"},
                    .scale_member = "query_pre_attn_scalar", .special = gemma},
    AttentionFamily{.model_type = "gpt_oss", .slides = but_each_last<2>, .special = gpt_oss},
    AttentionFamily{.model_type = "cohere2", .slides = but_each_last<4>,
                    .rope = {.pairing = RotaryPairing::interleaved}},
    AttentionFamily{.model_type = "cohere2_moe", .slides = but_each_last<4>,
                    .rope = {.pairing = RotaryPairing::interleaved}},
    AttentionFamily{.model_type = "olmo3", .slides = but_each_last<4>,
                    .qk_norm = QkNormKind::rms_all, .rope = {.only_theta = true}},
    AttentionFamily{.model_type = "modernbert", .slides = but_each_first,
                    .window = modernbert_window, .sizes = {.kv_heads = {}, .dim_head = {}},
                    .projections = {.qkv = {"Wqkv"}, .out = "Wo"},
                    .rope = {.local_theta = "local_rope_theta"}},
    AttentionFamily{.model_type = "modernbert-decoder", .slides = but_each_first,
                    .window = modernbert_decoder_window,
                    .sizes = {.kv_heads = {}, .dim_head = {}}, .projections = {.out = "Wo"},
                    .rope = {.local_theta = "local_rope_theta"}},
    AttentionFamily{.model_type = "gpt_neo", .slides = gpt_neo_local, .kinds = "attention_layers",
                    .sliding_kind = "local", .window = gpt_neo_window,
                    .sizes = {.heads = "num_heads", .kv_heads = {}, .dim_head = {}},
                    .projections = {.out = "out_proj"}, .bias = {}, .rotary = false, .scale = 1,
                    .special = gpt_neo},
    AttentionFamily{.model_type = "longt5", .slides = nullptr, .kinds = {},
                    .window = long_t5_window,
                    .sizes = {.dim = "d_model", .heads = "num_heads", .kv_heads = {},
                              .dim_head = "d_kv", .dim_head_otherwise = 64,
                              .dropout = "dropout_rate"},
                    .projections = {.qkv = {"q", "k", "v"}, .out = "o"}, .bias = {},
                    .rotary = false, .scale = 1, .special = long_t5},
    AttentionFamily{.model_type = "reformer", .slides = nullptr, .kinds = "attn_layers",
                    .sliding_kind = "local", .window = reformer_window,
                    .sizes = {.kv_heads = {}, .dim_head = "attention_head_size",
                              .dropout = "local_attention_probs_dropout_prob"},
                    .projections = {.qkv = {"query", "key", "value"}, .out = {}}, .bias = {},
                    .rotary = false},
    AttentionFamily{.model_type = "snac", .slides = nullptr, .kinds = {}, .window = snac_window,
                    .sizes = {.dim = "dim", .heads = {}, .kv_heads = {}, .dim_head = "dim_head",
                              .dim_head_otherwise = 64, .dropout = {}},
                    .projections = {.qkv = {"to_qkv"}, .out = "to_out"}, .bias = {},
                    .special = snac},
};
// clang-format on

inline const AttentionFamily& family_of(const ModelConfig& config) {
  const auto type = config.required<std::string>("model_type");
  // The language models of those that see or hear, too, whose configuration is a part of theirs.
  const std::string_view name = type == "gemma3_text" ? std::string_view("gemma3") : type;
  std::string all;
  for (const AttentionFamily& family : attention_families) {
    if (family.model_type == name) return family;
    all += (all.empty() ? "" : ", ") + std::string(family.model_type);
  }
  if (name == "longformer" || name == "led")
    reject(config.path("model_type"), "another one, because it is load_longformer() that reads it",
           "'", name, "'");
  reject(config.path("model_type"), "one of " + all, "'", printable(type), "'");
}

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
