// SPDX-License-Identifier: MIT
/// \file
/// Which keys the queries of a block see: the ranges that kernels go through, and what they hide at
/// the edges.
#pragma once

#include <algorithm>
#include <cstdint>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/pinned.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/window.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// A block of queries and a run of keys, of which each query sees a range.
///
/// Both ends of what is seen grow along the lanes, so that the lanes that see a key are a range,
/// whose ends grow with the key.
template <typename Scalar>
class QueryTile {
 public:
  static constexpr Index count = block_rows<Scalar>;
  static constexpr int half = static_cast<int>(count / 2);

  /// What the window shows.
  /// \param first_row the block's first, a row of the sequence
  QueryTile(const AttentionHead<Scalar>& head, Index first_row)
      : QueryTile(head, first_row, Part::window, {}) {}

  /// All of some keys.
  static QueryTile all_of(const AttentionHead<Scalar>& head, Index first_row, const Range& keys) {
    return {head, first_row, Part::all, keys};
  }

  /// Pinned rows before and after what the window shows; keys are their places. First rows that the
  /// window does not show lie before it, or are not seen yet.
  static QueryTile before_window(const AttentionHead<Scalar>& head, Index first_row) {
    return {head, first_row, Part::before, {}};
  }
  static QueryTile after_window(const AttentionHead<Scalar>& head, Index first_row) {
    return {head, first_row, Part::after, {}};
  }

  /// The lanes that see a key.
  /// \param cursor `{0, 0}` at first, then that of an earlier key
  LaneRange that_see(Index key, LaneRange& cursor) const {
    while (cursor.begin < count && seen[cursor.begin].end <= key) ++cursor.begin;
    while (cursor.end < count && seen[cursor.end].begin <= key) ++cursor.end;
    return {cursor.begin, is_masked(key) ? 0 : cursor.end};
  }

  /// Lanes outside of which no query sees any of the keys `[key, key + number)`, masks apart.
  LaneRange that_see_any(Index key, Index number, LaneRange& cursor) const {
    that_see(key, cursor);
    const int begin = cursor.begin;
    that_see(key + number - 1, cursor);
    return {begin, cursor.end};
  }

  /// Whether the query of a lane sees a key.
  bool sees(Index lane, Index key) const { return seen[lane].contains(key) && !is_masked(key); }

  /// The first lane of the half outside of which no query sees any of `some` keys; -1: there is
  /// none.
  int half_that_sees(const Range& some) const {
    if (some.end <= upper_begin_) return 0;
    return some.begin >= lower_end_ ? half : -1;
  }
  /// Where the keys end, of `some` from its first one on, of which half_that_sees() says the same.
  Index run_end(const Range& some) const {
    Index end = some.end;
    for (const Index edge : {lower_end_, upper_begin_})
      if (some.begin < edge && edge < end) end = edge;
    return end;
  }

  /// The lane whose own position a key is, if its score is then another (shared_qk); -1: none.
  int self_lane(Index key) const {
    return shared_qk_ && first <= key && key < first + count ? static_cast<int>(key - first) : -1;
  }

  /// Whether every query of the tile sees every one of the keys, and none is special. Lanes that
  /// are no queries do not count.
  bool plain(const Range& some) const {
    if (some.begin < by_all.begin || some.end > by_all.end) return false;
    if (shared_qk_ && some.begin < first + count && first < some.end) return false;
    if (masked_ == nullptr) return true;
    const std::uint8_t* masked = masked_ + (some.begin - masked_begin_);
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

 private:
  enum class Part : std::uint8_t { window, all, before, after };

  LOCAL_MHA_NOINLINE QueryTile(const AttentionHead<Scalar>& head, Index first_row, Part part,
                               const Range& all_keys)
      : first(first_row), masked_(head.masked), masked_begin_(head.masked_begin) {
    if (part == Part::before || part == Part::after) {
      masked_ = part == Part::before ? head.pinned->hidden() : head.pinned->not_flagged();
      masked_begin_ = 0;
    } else {
      shared_qk_ = head.shared_qk;
    }
    const Index begin = (std::max<Index>)(0, head.queries.begin - first_row);
    const Index end = (std::min)(count, head.queries.end - first_row);
    queries = {static_cast<int>(begin), static_cast<int>(end)};
    if (part == Part::window) {
      // Copies, which nothing that is written can change.
      const Window window = *head.window;
      const Range unmasked = head.unmasked;
      for (Index r = begin; r < end; ++r) seen[r] = window.keys(first_row + r).clipped_to(unmasked);
    } else {
      for (Index r = begin; r < end; ++r) seen[r] = seen_by(head, first_row + r, part, all_keys);
    }
    keys = {seen[begin].begin, seen[end - 1].end};
    by_all = {seen[end - 1].begin, seen[begin].end};
    if (keys.begin >= keys.end) keys = {0, 0};
    for (Index r = 0; r < begin; ++r) seen[r] = {keys.begin, keys.begin};
    for (Index r = end; r < count; ++r) seen[r] = {keys.end, keys.end};
    lower_end_ = seen[half - 1].end;
    upper_begin_ = seen[half].begin;
  }

  static Range seen_by(const AttentionHead<Scalar>& head, Index row, Part part,
                       const Range& all_keys) {
    if (part == Part::all) return all_keys.clipped_to(head.unmasked);
    const Range shown = head.window->keys(row).clipped_to(head.unmasked);
    const PinnedRows<Scalar>& pinned = *head.pinned;
    if (part == Part::before) return {0, pinned.place_of(shown.begin)};
    return {pinned.not_flagged() == nullptr ? pinned.places() : pinned.place_of(shown.end),
            pinned.places()};
  }

  // What fills up the last block has no flag.
  bool is_masked(Index key) const {
    return masked_ != nullptr && key < keys.end && masked_[key - masked_begin_] != 0;
  }

  const std::uint8_t* masked_;
  Index masked_begin_;
  bool shared_qk_ = false;
  // The end of what the first half of the queries sees, and the begin of what the second does.
  Index lower_end_;
  Index upper_begin_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
