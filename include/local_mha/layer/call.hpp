// SPDX-License-Identifier: MIT
/// \file
/// How layers are called: what a call is given beside its rows.
#pragma once

#include <optional>
#include <span>

#include <local_mha/core/mask.hpp>
#include <local_mha/core/optional_view.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/dropout.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What a call of Encoder or LocalTransformer is given beside its rows or tokens; all of it may be
/// left out:
///
///     encoder.forward(x, {.mask = mask, .device = device});
struct EncoderCall {
  /// Keys that nobody attends, `[B, N]`.
  PaddingMask mask = {};
  /// Dropout acts, with this seed. Empty: evaluation.
  std::optional<Training> training = {};
  /// A batch of 1 holds sequences of any lengths, `[S + 1]` with the first row of each and `N` at
  /// last, which see nothing of one another. Empty: it holds one.
  std::span<const Index> cu_seqlens = {};
  /// Rows of each sequence, `[B]`: those behind them are not computed, and their results are 0,
  /// whatever they hold. Empty: all are. Not beside cu_seqlens. In training, what an encoder drops
  /// of a sequence depends on the lengths before it.
  std::span<const Index> lengths = {};
  /// Whose threads share the work; the same bits for any number of them.
  AnyDevice device = {};
};

/// What a call of LocalMHA is given beside its rows; all of it may be left out:
///
///     mha.forward(x, {.mask = mask, .training = Training{seed}});
///
/// The members are those of EncoderCall, and a bias.
template <typename Scalar>
struct LocalMHACall {
  /// Keys that nobody attends, `[B, N]`; none if it is left out.
  PaddingMask mask = {};
  /// `[heads or 1, w, (1 + lb + lf)·w]`, or `[B·heads, …]`, one for each sequence; see
  /// LocalAttention::forward(). None with a token window.
  OptionalView<Scalar, 3> attn_bias = {};
  /// Dropout acts, by this seed; it does not if this is left out.
  std::optional<Training> training = {};
  /// `[S + 1]`: a batch of 1 holds S sequences one after the other.
  std::span<const Index> cu_seqlens = {};
  /// `[B]`: rows of each sequence; those behind them may hold anything and come out as 0.
  std::span<const Index> lengths = {};
  /// Whose threads share the work; the calling one alone if it is left out.
  AnyDevice device = {};
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
