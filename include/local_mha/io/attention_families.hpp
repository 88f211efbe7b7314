// SPDX-License-Identifier: MIT
/// \file
/// The attention layers of published models: which LocalMHA each is, and which tensors are its
/// weights.
///
/// A family is what models of a `model_type` have in common: a row of attention_families, whose
/// defaults are those of Mistral.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/attention_family_rules.hpp>
#include <local_mha/io/attention_layer_source.hpp>
#include <local_mha/io/model_config.hpp>
#include <local_mha/io/rope.hpp>
#include <local_mha/io/safetensors_error.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

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

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
