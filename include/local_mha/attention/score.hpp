// SPDX-License-Identifier: MIT
/// \file
/// What becomes of the products of queries and keys before the softmax takes them:
///
///     s_ij = score(softmax_scale · q_i·k_j, h, i, j) + bias[h, i, j]
///
/// and with shared_qk a constant where `i = j`. All in units of log 2.
#pragma once

#include <algorithm>
#include <type_traits>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/log_sum_exp.hpp>
#include <local_mha/attention/score_function.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/window.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// The score of a position with itself if shared_qk.
inline constexpr double self_score = -5e4;

/// The same in units of log 2; in half precision, which does not reach so far, a quarter of its
/// range.
template <typename Scalar>
Scalar binary_self_score() {
  if constexpr (std::is_same_v<Scalar, Eigen::half>)
    return Scalar(-Eigen::NumTraits<Scalar>::highest() * Scalar(0.25));
  else
    return Scalar(self_score * log2_e);
}

/// The row of attn_bias of a query.
template <typename Scalar>
class BiasRow {
 public:
  BiasRow() = default;
  BiasRow(const AttentionHead<Scalar>& head, Index query)
      : columns_(head.window->look_around()),
        row_(head.attn_bias + head.window->place_in_bucket(query) * columns_),
        begin_(head.window->look_around_begin(query)) {}

  /// Keys that have a bias.
  Range keys() const { return {begin_, begin_ + columns_}; }
  /// Of the keys from `key` on, which have one.
  const Scalar* at(Index key) const { return row_ + (key - begin_); }
  /// 0 where there is none.
  Scalar of(Index key) const { return keys().contains(key) ? *at(key) : Scalar(0); }

 private:
  Index columns_ = 0;
  const Scalar* row_ = nullptr;
  Index begin_ = 0;  // the key of column 0
};

/// Those of the queries of a tile.
template <typename Scalar>
class BiasRows {
 public:
  BiasRows(const AttentionHead<Scalar>& head, const QueryTile<Scalar>& tile) {
    for (Index r = 0; r < count; ++r)
      rows_[r] = BiasRow<Scalar>(head, (std::min)(tile.first + r, head.seqlen - 1));
  }

  /// `[key][query]` for one block of keys; anything where a query does not see a key.
  /// \param to `[block_rows][block_rows]`, aligned
  void gather(Index first_key, Scalar* to) const {
    bool inside = true;
    for (const BiasRow<Scalar>& row : rows_)
      inside = inside && row.keys().begin <= first_key && first_key + count <= row.keys().end;
    if (inside) {
      load_block(count, count, [&](Index r) { return rows_[r].at(first_key); }, to);
      return;
    }
    for (Index key = 0; key < count; ++key)
      for (Index r = 0; r < count; ++r) to[key * count + r] = rows_[r].of(first_key + key);
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  BiasRow<Scalar> rows_[count];
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
