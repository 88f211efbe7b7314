// SPDX-License-Identifier: MIT
/// \file
/// A block of queries and the keys that each of them sees: what the attention's kernels, forward
/// and backward, have in common.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <local_mha/attention/log_sum_exp.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/rotary.hpp>

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

/// What all blocks of queries of one head have in common.
template <typename Scalar>
struct AttentionHead {
  const Window* window = nullptr;
  /// Rows of the sequence, which is all that a query can see.
  Index seqlen = 0;
  /// Steps between groups of positions; null: no rotary embedding.
  const RotarySteps<Scalar>* steps = nullptr;
  /// The queries that attend; others in their blocks see nothing.
  Range queries;
  /// Flags of the keys from row `masked_begin` on, 1 = masked; null: none is.
  const std::uint8_t* masked = nullptr;
  Index masked_begin = 0;
  /// No key outside of it is unmasked.
  Range unmasked;
  /// `[w, (1 + lb + lf)·w]`; null: none.
  const Scalar* attn_bias = nullptr;
  /// A position attends itself only if it sees nothing else.
  bool shared_qk = false;
  /// Null: evaluation.
  const Dropout<Scalar>* dropout = nullptr;

  bool is_masked(Index key) const { return masked != nullptr && masked[key - masked_begin] != 0; }
};

/// Which keys the queries of a block see.
template <typename Scalar>
struct QueryTile {
  static constexpr Index count = block_rows<Scalar>;
  static constexpr int half = static_cast<int>(count / 2);

  /// \param first_row the block's first, a row of the sequence
  QueryTile(const AttentionHead<Scalar>& head, Index first_row) : first(first_row) {
    const Index begin = (std::max<Index>)(0, head.queries.begin - first_row);
    const Index end = (std::min)(count, head.queries.end - first_row);
    queries = {static_cast<int>(begin), static_cast<int>(end)};
    for (Index r = begin; r < end; ++r)
      seen[r] = head.window->keys(first_row + r).clipped_to(head.unmasked);
    keys = {seen[begin].begin, seen[end - 1].end};
    by_all = {seen[end - 1].begin, seen[begin].end};
    if (keys.begin >= keys.end) keys = {0, 0};
    for (Index r = 0; r < begin; ++r) seen[r] = {keys.begin, keys.begin};
    for (Index r = end; r < count; ++r) seen[r] = {keys.end, keys.end};
    lower_end = seen[half - 1].end;
    upper_begin = seen[half].begin;
  }

  /// Both ends of what is seen grow along the lanes, so that the lanes that see a key are a range,
  /// whose ends grow with the key.
  /// \param lanes `{0, 0}` at first, then those of an earlier key
  void advance(LaneRange& lanes, Index key) const {
    while (lanes.begin < count && seen[lanes.begin].end <= key) ++lanes.begin;
    while (lanes.end < count && seen[lanes.end].begin <= key) ++lanes.end;
  }

  /// The first lane of the half outside of which no query sees any of `some` keys; -1: there is
  /// none.
  int half_that_sees(const Range& some) const {
    if (some.end <= upper_begin) return 0;
    return some.begin >= lower_end ? half : -1;
  }

  /// Whether every query of the tile sees every one of the keys, and none is special. Lanes that
  /// are no queries do not count.
  bool plain(const AttentionHead<Scalar>& head, const Range& some) const {
    if (some.begin < by_all.begin || some.end > by_all.end) return false;
    if (head.shared_qk && some.begin < first + count && first < some.end) return false;
    if (head.masked == nullptr) return true;
    const std::uint8_t* masked = head.masked + (some.begin - head.masked_begin);
    return std::none_of(masked, masked + (some.end - some.begin),
                        [](std::uint8_t flag) { return flag != 0; });
  }

  /// Whether every lane is a query.
  bool whole() const { return queries.begin == 0 && queries.end == count; }
  bool single() const { return queries.end - queries.begin == 1; }

  /// Row of the sequence of the first lane.
  Index first;
  /// The lanes that are queries.
  LaneRange queries;
  /// What each lane sees, masks inside of it apart.
  Range seen[count];
  /// What any lane sees.
  Range keys;
  /// What all lanes see that are queries.
  Range by_all;
  /// The end of what the first half of the queries sees, and the begin of what the second does.
  Index lower_end;
  Index upper_begin;
};

/// The rows of attn_bias for the queries of a tile.
template <typename Scalar>
class BiasRows {
 public:
  BiasRows(const AttentionHead<Scalar>& head, const QueryTile<Scalar>& tile)
      : columns_(head.window->look_around()) {
    for (Index r = 0; r < count; ++r) {
      const Index query = (std::min)(tile.first + r, head.seqlen - 1);
      row_[r] = head.attn_bias + head.window->place_in_bucket(query) * columns_;
      begin_[r] = head.window->look_around_begin(query);
    }
  }

  /// `[key][query]` for one block of keys; anything where a query does not see a key.
  /// \param to `[block_rows][block_rows]`, aligned
  void gather(Index first_key, Scalar* to) const {
    const auto column = [&](Index r) { return first_key - begin_[r]; };
    bool inside = true;
    for (Index r = 0; r < count; ++r)
      inside = inside && column(r) >= 0 && column(r) + count <= columns_;
    if (inside) {
      load_block(count, count, [&](Index r) { return row_[r] + column(r); }, to);
      return;
    }
    for (Index key = 0; key < count; ++key)
      for (Index r = 0; r < count; ++r) {
        const bool there = Range{0, columns_}.contains(column(r) + key);
        to[key * count + r] = there ? row_[r][column(r) + key] : Scalar(0);
      }
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  Index columns_;
  const Scalar* row_[count];
  Index begin_[count];  // the key of column 0
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
