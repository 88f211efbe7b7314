// SPDX-License-Identifier: MIT
/// \file
/// What published models do in their own ways: which of their layers slide, where these look, and
/// what else is special.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

#include <local_mha/attention/token_window.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/attention_layer_source.hpp>
#include <local_mha/io/layer_tensors.hpp>
#include <local_mha/io/model_config.hpp>
#include <local_mha/io/safetensors_error.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

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

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
