// SPDX-License-Identifier: MIT
/// \file
/// Windows by the conventions of other systems, which differ by one or by a factor of two.
#pragma once

#include <limits>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// Positions on one side, or −1.
inline Index side(const char* argument, Index size) {
  if (size < -1) reject(argument, "at least 0, or -1 for unbounded", size);
  return size == -1 ? TokenWindow::unbounded : size;
}

}  // namespace detail

namespace token_windows {

/// The band of an exact look-around, `{lb·w, lf·w}`.
/// \throws std::invalid_argument unless `window_size` is 1 to 2^40 and the others 0 to 2^20
inline TokenWindow lookaround_exact(Index window_size, Index look_backward, Index look_forward) {
  constexpr Index most_windows = Index{1} << 20;
  if (window_size < 1 || window_size > Index{1} << 40)
    reject("window_size", "1 to 2^40", window_size);
  if (look_backward < 0 || look_backward > most_windows)
    reject("look_backward", "0 to 2^20 windows", look_backward);
  if (look_forward < 0 || look_forward > most_windows)
    reject("look_forward", "0 to 2^20 windows", look_forward);
  return {look_backward * window_size, look_forward * window_size};
}

/// `sliding_window` of Hugging Face's causal models counts the query's own position: `{w − 1, 0}`.
/// \throws std::invalid_argument unless it is at least 1
inline TokenWindow hugging_face(Index sliding_window) {
  detail::require_at_least("sliding_window", sliding_window, 1);
  return {sliding_window - 1, 0};
}

/// `local_attention` of ModernBERT counts both sides: `{a/2, a/2}`.
/// \throws std::invalid_argument if it is negative
inline TokenWindow modernbert(Index local_attention) {
  detail::require_at_least("local_attention", local_attention, 0);
  return {local_attention / 2, local_attention / 2};
}

/// `attention_window` of Longformer counts both sides: `{a/2, a/2}`.
/// \throws std::invalid_argument if it is negative
inline TokenWindow longformer(Index attention_window) {
  detail::require_at_least("attention_window", attention_window, 0);
  return {attention_window / 2, attention_window / 2};
}

/// `local_radius` of LongT5: `{radius, radius}`.
/// \throws std::invalid_argument if it is negative
inline TokenWindow long_t5(Index local_radius) {
  detail::require_at_least("local_radius", local_radius, 0);
  return {local_radius, local_radius};
}

/// Local attention of Reformer is a look-around of whole windows.
/// \param chunk_length, chunks_before, chunks_after its `local_attn_chunk_length` and so on
/// \param is_decoder causal, which allows no chunks after
/// \throws std::invalid_argument naming the argument that is out of range
inline LocalAttentionConfig reformer(Index chunk_length, Index chunks_before, Index chunks_after,
                                     bool is_decoder = false) {
  detail::require_at_least("chunk_length", chunk_length, 1);
  detail::require_at_least("chunks_before", chunks_before, 0);
  detail::require_at_least("chunks_after", chunks_after, 0);
  if (is_decoder && chunks_after > 0)
    reject("chunks_after", "0, because the attention is causal", chunks_after);
  LocalAttentionConfig config{.window_size = chunk_length, .causal = is_decoder};
  config.look_backward = chunks_before;
  config.look_forward = chunks_after;
  return config;
}

/// FlashAttention's `window_size`: the same, and −1 is unbounded.
/// \throws std::invalid_argument if one is below −1
inline TokenWindow flash(Index left, Index right) {
  return {detail::side("left", left), detail::side("right", right)};
}

/// ONNX' attention: the same, and −1 is unbounded.
/// \throws std::invalid_argument if one is below −1
inline TokenWindow onnx(Index left, Index right) { return flash(left, right); }

/// `local_window_size` of ONNX Runtime's GroupQueryAttention: `{size − 1, 0}`.
/// \throws std::invalid_argument unless it is at least 1
inline TokenWindow onnx_runtime(Index local_window_size) {
  detail::require_at_least("local_window_size", local_window_size, 1);
  return {local_window_size - 1, 0};
}

}  // namespace token_windows

}  // namespace local_mha::inline LOCAL_MHA_ABI
