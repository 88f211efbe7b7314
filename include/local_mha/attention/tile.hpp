// SPDX-License-Identifier: MIT
/// \file
/// A block of queries and the keys that each of them sees: what the attention's kernels, forward
/// and backward, have in common.
#pragma once

#include <algorithm>
#include <cstdint>

#include <local_mha/core/block.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha {

inline constexpr double log2_e = 1.44269504088896340736;
inline constexpr double ln_2 = 0.69314718055994530942;

/// The score of a position with itself if shared_qk.
inline constexpr double self_score = -5e4;

/// What all blocks of queries of one head have in common.
template <typename Scalar>
struct AttentionHead {
  const Window* window = nullptr;
  /// Rows of the sequence, which is all that a query can see.
  Index seqlen = 0;
  /// Steps between groups of positions; null: no rotary embedding.
  const RotarySteps<Scalar>* steps = nullptr;
  /// Flags of `seqlen` keys, 1 = masked; null: none is.
  const std::uint8_t* masked = nullptr;
  /// No key outside of it is unmasked.
  Range unmasked;
  /// `[w, (1 + lb + lf)·w]`; null: none.
  const Scalar* attn_bias = nullptr;
  /// A position attends itself only if it sees nothing else.
  bool shared_qk = false;
  /// Null: evaluation.
  const Dropout<Scalar>* dropout = nullptr;
};

/// Lanes `[begin, end)` of a block.
struct LaneRange {
  int begin;
  int end;
};

/// Which keys the queries of a block see.
template <typename Scalar>
struct QueryTile {
  static constexpr Index count = block_rows<Scalar>;

  /// \param first_row the block's first, a row of the sequence
  QueryTile(const AttentionHead<Scalar>& head, Index first_row) : first(first_row) {
    const Index rows = std::min(count, head.seqlen - first_row);
    for (Index r = 0; r < rows; ++r)
      seen[r] = head.window->keys(first_row + r).clipped_to(head.unmasked);
    keys = {seen[0].begin, seen[rows - 1].end};
    if (keys.begin >= keys.end) keys = {0, 0};
    for (Index r = rows; r < count; ++r) seen[r] = {keys.end, keys.end};
    by_all = {seen[count - 1].begin, seen[0].end};
  }

  /// Both ends of what is seen grow along the lanes, so that the lanes that see a key are a range,
  /// whose ends grow with the key.
  /// \param lanes `{0, 0}` at first, then those of an earlier key
  void advance(LaneRange& lanes, Index key) const {
    while (lanes.begin < count && seen[lanes.begin].end <= key) ++lanes.begin;
    while (lanes.end < count && seen[lanes.end].begin <= key) ++lanes.end;
  }

  /// Whether every query of the tile sees every one of the keys, and none is special.
  bool plain(const AttentionHead<Scalar>& head, const Range& some) const {
    if (some.begin < by_all.begin || some.end > by_all.end) return false;
    if (head.shared_qk && some.begin < first + count && first < some.end) return false;
    return head.masked == nullptr || std::none_of(head.masked + some.begin, head.masked + some.end,
                                                  [](std::uint8_t masked) { return masked != 0; });
  }

  /// Row of the sequence of the first lane.
  Index first;
  /// What each lane sees, masks inside of it apart.
  Range seen[count];
  /// What any lane sees.
  Range keys;
  /// What all lanes see.
  Range by_all;
};

/// attn_bias as `[key][query]` for the keys of one block; 0 where a query does not see a key.
/// \param keys of one block
/// \param to `[block_rows][block_rows]`, aligned
template <typename Scalar>
void gather_bias(const AttentionHead<Scalar>& head, const QueryTile<Scalar>& tile,
                 const Range& keys, Scalar* to) {
  constexpr Index count = block_rows<Scalar>;
  const Index columns = head.window->look_around();
  const Scalar* row[count];
  for (Index r = 0; r < count; ++r) {
    const Index query = std::min(tile.first + r, head.seqlen - 1);
    row[r] = head.attn_bias + head.window->place_in_bucket(query) * columns;
  }
  const auto column = [&](Index r, Index key) {
    return key - head.window->look_around_begin(tile.first + r);
  };
  if (keys.end - keys.begin == count && tile.plain(head, keys)) {
    load_block(count, count, [&](Index r) { return row[r] + column(r, keys.begin); }, to);
    return;
  }
  for (Index key = keys.begin; key < keys.end; ++key)
    for (Index r = 0; r < count; ++r)
      to[key % count * count + r] = tile.seen[r].contains(key) ? row[r][column(r, key)] : Scalar(0);
}

}  // namespace local_mha
