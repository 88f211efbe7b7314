// SPDX-License-Identifier: MIT
/// \file
/// A sequence of a stream: where it stands, and what is kept of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <istream>
#include <ostream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/attention/kernel.hpp>
#include <local_mha/attention/past.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/streaming/state_file.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// A stream's last position; positions are counted in 64 bits.
inline constexpr Index last_position = Index{1} << 60;

/// The largest `n <= most` that is possible, as all smaller ones are.
template <typename Possible>
Index largest_rollback(Index most, Possible&& possible) {
  Index largest = 0;
  for (Index too_many = most + 1; too_many - largest > 1;) {
    const Index middle = largest + (too_many - largest) / 2;
    (possible(middle) ? largest : too_many) = middle;
  }
  return largest;
}

/// A sequence that comes bit by bit: where it stands, and its past.
/// \tparam Storage what keys and values are rounded to: see can_store
template <typename Scalar, typename Storage = Scalar>
class StreamedSequence {
  using PastRows = StoredPast<Scalar, Storage>;

 public:
  using Stored = Storage;

  /// \param size heads, dim_head and gated; the rings' sizes are computed
  /// \param stretch blocks that come in at once
  StreamedSequence(const Window& window, typename PastRows::Size size, Index stretch,
                   Index max_rollback)
      : window_(window) {
    const Index ahead = window.reach_ahead();
    const Index reach = checked_reach(window, size, max_rollback);
    // Behind the rows that a query needs: what comes in at once, or what may be taken back.
    const Index spare = (std::max)(stretch, ceil_div(max_rollback, count)) + 3;
    size.queries_wait = ahead > 0;
    size.kept = ceil_div(reach, count) + spare;
    size.waiting = ahead > 0 ? ceil_div(ahead, count) + spare : stretch + 1;
    size.pinned = ceil_div(window.first_keys(), count);
    past_ = PastRows(size);
    pinned_.make_room(size.pinned);
    pinned_masked_.assign(static_cast<std::size_t>(window.first_keys()), 0);
    masked_.assign(static_cast<std::size_t>(2 * size.kept * count), 0);
  }

  PastRows& past() { return past_; }
  const Window& window() const { return window_; }
  /// Positions so far.
  Index position() const { return position_; }
  /// Positions whose results are out: all that no later position changes.
  Index answered() const { return ended_ ? position_ : window_.complete(position_); }
  /// Positions whose results are out when `positions` are in.
  Index complete(Index positions) const { return window_.complete(positions); }
  bool ended() const { return ended_; }

  void reset() {
    position_ = furthest_ = masked_begin_ = masked_end_ = oldest_key_ = oldest_query_ = 0;
    ended_ = false;
    note_pinned();
  }

  /// Makes room for rows that follow.
  /// \param masked a flag for each, 1 = masked; null: none is
  void take(const Range& rows, const std::uint8_t* masked) {
    if (rows.begin == rows.end) return;
    note_masked(rows, masked);
    position_ = rows.end;
    furthest_ = (std::max)(furthest_, rows.end);
    for (Index row = rows.begin; row < (std::min)(rows.end, window_.first_keys()); ++row)
      pinned_masked_[static_cast<std::size_t>(row)] = masked_at(row);
    if (rows.begin < window_.first_keys()) note_pinned();
    const auto oldest = [&](Index capacity) {
      return (ceil_div(furthest_, count) - capacity) * count;
    };
    oldest_key_ = (std::max)(oldest_key_, oldest(past_.size().kept));
    oldest_query_ = (std::max)(oldest_query_, oldest(past_.size().waiting));
  }
  void end() { ended_ = true; }

  /// Says what queries see, but for rotary and bias.
  void show(const Range& queries, AttentionHead<Scalar>& head) const {
    head.window = &window_;
    head.seqlen = position_;
    head.queries = queries;
    head.unmasked = {0, position_};
    const bool sees_masked = masked_end_ > window_.keys(queries.begin).begin;
    head.masked = sees_masked ? masked_.data() : nullptr;
    head.masked_begin = masked_begin_;
    head.pinned = pinned_.empty() ? nullptr : &pinned_;
  }

  /// Whether the rings hold what going on from an earlier position needs.
  bool holds(Index position) const {
    const Index next = window_.complete(position);
    if (position < oldest_key_ || (std::max<Index>)(0, window_.keys(next).begin) < oldest_key_)
      return false;
    return !past_.size().queries_wait || next >= oldest_query_;
  }

  /// The most positions that can be taken back.
  Index most_rollback() const {
    return largest_rollback(position_, [&](Index n) { return holds(position_ - n); });
  }
  /// Takes back the last `n` positions, and the sequence's end.
  void rollback(Index n) {
    position_ -= n;
    masked_end_ = (std::min)(masked_end_, position_);
    ended_ = false;
    note_pinned();
  }

  void save(StateWriter& to) const {
    to.put(static_cast<std::int64_t>(position_));
    to.put(static_cast<std::int64_t>(ended_));
    to.put(static_cast<std::int64_t>(oldest_key_));
    to.put(static_cast<std::int64_t>((std::min)(oldest_query_, position_)));
    to.put(static_cast<std::int64_t>(masked_end_));
    for (Index row = oldest_key_; row < position_; ++row) to.put(masked_at(row));
    PastRows::for_each_ring(past_, [&](const auto& ring, bool of_queries) {
      const Index begin = of_queries ? (std::min)(oldest_query_, position_) : oldest_key_;
      for (Index row = begin; row < position_; ++row)
        for (Index c = 0; c < ring.channels(); ++c)
          to.put(ring[row / count][c * count + row % count]);
    });
    const Index pinned = (std::min)(position_, window_.first_keys());
    for (Index row = 0; row < pinned; ++row) to.put(pinned_masked_[static_cast<std::size_t>(row)]);
    PastRows::for_each_pinned_ring(past_, [&](const auto& ring) {
      for (Index row = 0; row < pinned; ++row)
        for (Index c = 0; c < ring.channels(); ++c)
          to.put(ring[row / count][c * count + row % count]);
    });
  }

  /// \throws std::invalid_argument if the data end, or cannot be a state
  void load(StateReader& from) {
    reset();
    position_ = furthest_ = from.get_index(0, last_position);
    ended_ = from.get_index(0, 1) != 0;
    const Index key_begin = from.get_index(0, position_);
    const Index query_begin = from.get_index(0, position_);
    masked_end_ = from.get_index(0, position_);
    const auto oldest = [&](Index begin, Index capacity) {
      return (std::max)(begin, (ceil_div(position_, count) - capacity) * count);
    };
    oldest_key_ = oldest(key_begin, past_.size().kept);
    oldest_query_ = oldest(query_begin, past_.size().waiting);
    if (!holds(position_)) reject("state", "all that the next query sees", "less");
    clear_block_of(oldest_key_);
    clear_block_of(oldest_query_);
    clear_block_of(position_);
    masked_begin_ = oldest_key_;
    for (Index row = key_begin; row < position_; ++row) {
      const auto masked = from.get<std::uint8_t>();
      if (row >= oldest_key_) masked_at(row) = masked != 0;
    }
    PastRows::for_each_ring(past_, [&](auto& ring, bool of_queries) {
      const Index oldest_row = of_queries ? oldest_query_ : oldest_key_;
      for (Index row = of_queries ? query_begin : key_begin; row < position_; ++row)
        for (Index c = 0; c < ring.channels(); ++c) {
          const auto value = from.get<std::remove_cvref_t<decltype(*ring[0])>>();
          if (row >= oldest_row) ring[row / count][c * count + row % count] = value;
        }
      for (Index block = oldest_row / count; block * count < position_; ++block)
        ring.note_finite(block);
    });
    const Index pinned = (std::min)(position_, window_.first_keys());
    for (Index row = 0; row < pinned; ++row)
      pinned_masked_[static_cast<std::size_t>(row)] = from.get<std::uint8_t>() != 0;
    PastRows::for_each_pinned_ring(past_, [&](auto& ring) {
      for (Index block = 0; block * count < pinned; ++block)
        std::fill_n(ring[block], ring.channels() * count, Storage(0));
      for (Index row = 0; row < pinned; ++row)
        for (Index c = 0; c < ring.channels(); ++c)
          ring[row / count][c * count + row % count] = from.get<Storage>();
      for (Index block = 0; block * count < pinned; ++block) ring.note_finite(block);
    });
    note_pinned();
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  static Index checked_reach(const Window& window, const typename PastRows::Size& size,
                             Index max_rollback) {
    const Index reach = window.reach_behind() + window.reach_ahead();
    constexpr Index most = Index{1} << 36;
    if (window.is_endless())
      reject("token_window", "bounded ends, because a stream keeps what a query sees",
             "an unbounded one");
    const Index each =
        (std::max<Index>)(1, 3 * size.heads * padded_channels<Scalar>(size.dim_head));
    if (reach > most / each)
      reject("window_size", "a look-around whose keys and values are at most 2^36 numbers",
             window.size());
    if (max_rollback > most / each)
      reject("max_rollback", "positions whose keys and values are at most 2^36 numbers",
             max_rollback);
    return reach;
  }

  // Of the first keys, those that have come.
  void note_pinned() {
    pinned_.assign(position_, window_.first_keys(), nullptr,
                   [&](Index row) { return pinned_masked_[static_cast<std::size_t>(row)] != 0; });
  }

  // What stands in a block beside the rows of the sequence is nothing from before.
  void clear_block_of(Index row) {
    PastRows::for_each_ring(past_, [&](auto& ring, bool) {
      auto* const block = ring[row / count];
      std::fill(block, block + ring.channels() * count, std::remove_cvref_t<decltype(*block)>(0));
    });
  }

  std::uint8_t& masked_at(Index row) {
    return masked_[static_cast<std::size_t>(row - masked_begin_)];
  }
  const std::uint8_t& masked_at(Index row) const {
    return masked_[static_cast<std::size_t>(row - masked_begin_)];
  }

  // Flags lie in order from masked_begin_ on. Where the room ends, the last ones move to its front.
  void note_masked(const Range& rows, const std::uint8_t* masked) {
    const auto size = static_cast<Index>(masked_.size());
    if (rows.end - masked_begin_ > size) {
      const Index begin = rows.end - size / 2;
      if (begin < rows.begin)
        std::memmove(masked_.data(), &masked_at(begin),
                     static_cast<std::size_t>(rows.begin - begin));
      masked_begin_ = begin;
    }
    for (Index row = rows.begin; row < rows.end; ++row) {
      masked_at(row) = masked != nullptr && masked[row - rows.begin] != 0;
      if (masked_at(row) != 0) masked_end_ = row + 1;
    }
  }

  Window window_;
  PastRows past_;
  Index position_ = 0;
  bool ended_ = false;
  // One past the last row ever taken: what the rings hold is behind it.
  Index furthest_ = 0;
  Index oldest_key_ = 0;
  Index oldest_query_ = 0;
  // Flags of rows, and one past the last masked one.
  std::vector<std::uint8_t> masked_;
  Index masked_begin_ = 0;
  Index masked_end_ = 0;
  // Of the first keys.
  PinnedRows<Scalar> pinned_;
  std::vector<std::uint8_t> pinned_masked_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
