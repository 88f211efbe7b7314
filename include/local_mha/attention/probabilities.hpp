// SPDX-License-Identifier: MIT
/// \file
/// Scores become probabilities, but for the denominator:
///
///     p_ij = 2^(s_ij − m_i), dropped or scaled by what is kept
#pragma once

#include <type_traits>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/operand_ring.hpp>
#include <local_mha/attention/softmax.hpp>
#include <local_mha/attention/strips.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/ops/dropout.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Makes operands of whole blocks of probabilities: 0 of keys that are not the piece's.
/// \tparam FromScores they are not yet made of the scores, nor added to the sum, which is of what
///         they are rounded to, so that a query's weights add up to 1
/// \param upcoming is fetched meanwhile where the matrix unit multiplies, whose steps are large
template <bool FromScores, typename Scalar, typename Keys>
LOCAL_MHA_NOINLINE void make_operands(const KeyPiece<Scalar, Keys>& piece, const Range& blocks,
                                      SoftmaxState<Scalar>& softmax, Upcoming<Scalar>& upcoming) {
  using L = Lanes<Scalar>;
  constexpr Index count = block_rows<Scalar>;
  const SoftmaxState<Scalar> fixed = softmax;
  L sum = softmax.sum;
  const Pair ones{{Eigen::bfloat16(1), Eigen::bfloat16(1)}};
  const Range all{blocks.begin * count, blocks.end * count};
  const Range keys = piece.keys.clipped_to(all);
  Index key = all.begin;
  Pair* to = piece.pairs_of_block(blocks.begin);
  const bool fetches = by_matrix_unit<Scalar, Eigen::bfloat16>();
  const auto take = [&](bool first_is, bool second_is) {
    if (fetches) upcoming.fetch();
    L p[2] = {L::zero(), L::zero()};
    const bool is[2] = {first_is, second_is};
    LOCAL_MHA_UNROLL for (int i = 0; i < 2; ++i) {
      if (!is[i]) continue;
      p[i] = L::load(piece.score(key + i));
      if constexpr (FromScores) p[i] = fixed.term(p[i]);
    }
    store_pairs(p[0], p[1], to);
    if constexpr (FromScores) sum = fma(ones, PairLanes<L>::load(to), sum);
    key += 2;
    to += count;
  };
  const auto take_until = [&](Index end) {
    while (key < end) take(piece.keys.contains(key), piece.keys.contains(key + 1));
  };
  take_until(keys.begin);
  while (key + 2 <= keys.end) take(true, true);
  take_until(all.end);
  softmax.sum = sum;
}

/// Drops some. The denominator counts them, and what others were before they are rounded.
template <typename Scalar, typename Keys>
void drop(const Dropout<Scalar>& dropout, const KeyPiece<Scalar, Keys>& piece) {
  using L = Lanes<Scalar>;
  constexpr Index count = block_rows<Scalar>;
  constexpr Index together = Dropout<Scalar>::together;
  L factors[together];
  for (Index octet = piece.keys.begin / together; octet * together < piece.keys.end; ++octet) {
    const Index first = octet * together;
    const Index in_sequence = piece.strip->block_in_sequence(first / count) * count + first % count;
    dropout.factors(piece.tile().first, in_sequence / together, factors);
    for (Index i = 0; i < together; ++i) {
      const Index key = first + i;
      if (!piece.keys.contains(key)) continue;
      Scalar* p = piece.score(key);
      (L::load(p) * factors[i]).store(p);
    }
  }
}

/// Turns the scores of a piece into probabilities, in their place or as operands, and adds them to
/// the sum.
template <typename Scalar, typename Keys>
void exponentiate(const AttentionHead<Scalar>& head, const KeyPiece<Scalar, Keys>& piece,
                  SoftmaxState<Scalar>& softmax, Upcoming<Scalar>& upcoming) {
  using L = Lanes<Scalar>;
  constexpr Index count = block_rows<Scalar>;
  constexpr bool of_operands = std::is_same_v<Keys, KeyOperands<Scalar>>;
  if constexpr (of_operands) {
    if (head.dropout == nullptr)
      return make_operands<true>(piece, piece.blocks(), softmax, upcoming);
  }
  const SoftmaxState<Scalar> fixed = softmax;
  L sum = softmax.sum;
  Scalar* scores = piece.score(piece.keys.begin);
  LOCAL_MHA_UNROLL_4 for (Index key = piece.keys.begin; key < piece.keys.end;
                          ++key, scores += count) {
    const L p = fixed.term(L::load(scores));
    sum = sum + p;
    p.store(scores);
  }
  softmax.sum = sum;
  if (head.dropout == nullptr) return;
  drop(*head.dropout, piece);
  if constexpr (of_operands) make_operands<false>(piece, piece.blocks(), softmax, upcoming);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail

LOCAL_MHA_INT_BOUNDS_END
