// SPDX-License-Identifier: MIT
/// \file
/// What all blocks of queries of one head have in common.
#pragma once

#include <cstdint>
#include <limits>

#include <local_mha/attention/pinned.hpp>
#include <local_mha/attention/score_function.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// One head of one sequence: what its queries see, and what becomes of their scores.
template <typename Scalar>
struct AttentionHead {
  /// Its number among those of the sequence.
  Index index = 0;

  const Window* window = nullptr;
  /// Rows of the sequence, which is all that a query can see.
  Index seqlen = 0;
  /// The queries that attend; others in their blocks see nothing.
  Range queries;
  /// Flags of the keys from row `masked_begin` on, 1 = masked; null: none is.
  const std::uint8_t* masked = nullptr;
  Index masked_begin = 0;
  /// No key outside of it is unmasked.
  Range unmasked;
  /// Rows that queries see wherever they are; null: none.
  const PinnedRows<Scalar>* pinned = nullptr;

  /// Steps between groups of positions; null: no rotary embedding.
  const RotarySteps<Scalar>* steps = nullptr;
  /// The same as far as pinned rows are.
  const RotarySteps<Scalar>* pinned_steps = nullptr;
  /// What becomes of scores before a bias is added.
  ScoreFunction<Scalar> score;
  /// `[w, (1 + lb + lf)·w]`; null: none.
  const Scalar* attn_bias = nullptr;
  /// A position attends itself only if it sees nothing else.
  bool shared_qk = false;
  /// A score without a value, which takes part in the softmax, in units of log 2; −∞: none.
  Scalar sink = Scalar(-std::numeric_limits<double>::infinity());
  /// Null: evaluation.
  const Dropout<Scalar>* dropout = nullptr;

  bool is_masked(Index key) const { return masked != nullptr && masked[key - masked_begin] != 0; }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
