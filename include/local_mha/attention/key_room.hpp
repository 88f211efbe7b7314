// SPDX-License-Identifier: MIT
/// \file
/// Keys and values that a stream keeps in 16 bits, while they are computed with: rows that come in,
/// before they are rounded, and what a stretch of queries sees, unpacked.
#pragma once

#include <type_traits>
#include <utility>

#include <local_mha/attention/past.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/strips.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// RowsForRing of a ring in 16 bits: all of them are made aside.
template <typename Scalar, typename Storage>
class RoundedRowsForRing {
 public:
  /// \param rows not empty; of their last block, the ring takes the rest, too, unless they are one
  /// \param made where they are made: has room for their blocks
  RoundedRowsForRing(Ring<Scalar, Storage>& ring, const Range& rows, Ring<Scalar>& made)
      : ring_(ring), rows_(rows), made_(made) {}

  /// Where block `b` of the sequence is made.
  Scalar* operator()(Index b) const { return made_[b]; }

  /// All are made.
  void put() const {
    constexpr Index count = block_rows<Scalar>;
    const bool single = rows_.end - rows_.begin == 1;
    for_each_block<Scalar>(rows_, [&](Index block, LaneRange lanes) {
      const Scalar* from = std::as_const(made_)[block];
      if (lanes.begin == 0)
        pack(from, ring_.channels() * count, ring_[block]);
      else if (single)
        ring_.put_lane(block, lanes.begin, from);
      else
        ring_.put_lanes(block, lanes.begin, from);
    });
  }

 private:
  Ring<Scalar, Storage>& ring_;
  Range rows_;
  Ring<Scalar>& made_;
};

/// Room for one head at a time.
template <typename Scalar>
class KeyRoom {
 public:
  KeyRoom() = default;
  /// \param stretch blocks that come in, or are answered, at once
  KeyRoom(const Window& window, Index dim_head, Index stretch) {
    constexpr Index count = block_rows<Scalar>;
    // Two more, where rows begin and end inside of a block.
    const Index seen = ceil_div(window.reach_behind() + window.reach_ahead(), count) + stretch + 2;
    keys_ = Ring<Scalar>(dim_head, seen);
    values_ = Ring<Scalar>(dim_head, seen);
    const Index pinned = ceil_div(window.first_keys(), count);
    if (pinned == 0) return;
    pinned_keys_ = Ring<Scalar>(dim_head, pinned);
    pinned_values_ = Ring<Scalar>(dim_head, pinned);
  }

  /// Keys or values on their way into a ring.
  template <typename Storage>
  RoundedRowsForRing<Scalar, Storage> rows_for(Ring<Scalar, Storage>& ring, const Range& rows) {
    return {ring, rows, keys_};
  }

  /// Unpacks what queries see of a head of a past.
  /// \param keys those that the window shows to any of them
  template <typename Storage>
  void show(Past<Scalar, Storage>& past, Index head, const Range& keys) {
    const Range blocks = blocks_of<Scalar>(keys);
    unpack_blocks(past.keys(head), past.values(head), blocks, keys_, values_);
    if (past.size().pinned > 0)
      unpack_blocks(*past.pinned_keys(head), *past.pinned_values(head), {0, past.size().pinned},
                    pinned_keys_, pinned_values_);
  }
  /// What show() unpacked last.
  KeyStore<Scalar, Ring<Scalar>> window() const { return {&keys_, &values_}; }
  KeyStore<Scalar, Ring<Scalar>> pinned() const { return {&pinned_keys_, &pinned_values_}; }

 private:
  template <typename Storage>
  static void unpack_blocks(const Ring<Scalar, Storage>& keys, const Ring<Scalar, Storage>& values,
                            const Range& blocks, Ring<Scalar>& to_keys, Ring<Scalar>& to_values) {
    const Index size = keys.channels() * block_rows<Scalar>;
    for (Index block = blocks.begin; block < blocks.end; ++block) {
      unpack(keys[block], size, to_keys[block]);
      unpack(values[block], size, to_values[block]);
      to_values.copy_finite(block, values);
    }
  }

  Ring<Scalar> keys_;
  Ring<Scalar> values_;
  Ring<Scalar> pinned_keys_;
  Ring<Scalar> pinned_values_;
};

/// The keys and values of a head of a past, as they lie.
template <typename Scalar, typename Storage>
KeyStore<Scalar, Ring<Scalar, Storage>, Ring<Scalar, Storage>> window_of(
    Past<Scalar, Storage>& past, Index head) {
  return {&past.keys(head), &past.values(head)};
}
template <typename Scalar, typename Storage>
KeyStore<Scalar, Ring<Scalar, Storage>, Ring<Scalar, Storage>> pinned_of(
    Past<Scalar, Storage>& past, Index head) {
  return {past.pinned_keys(head), past.pinned_values(head)};
}

/// Calls `answer(window, pinned)` with what some queries see of a head of a past: as it lies, where
/// the kernel can read it, or unpacked.
/// \param queries not empty
/// \param keys that the window shows to any of them
template <typename Scalar, typename Storage, typename Answer>
void show_keys(KeyRoom<Scalar>& room, Past<Scalar, Storage>& past, Index head, const Range& queries,
               const Range& keys, Answer&& answer) {
  if constexpr (!std::is_same_v<Scalar, Storage>) {
    if (queries.end - queries.begin > 1) {
      room.show(past, head, keys);
      return answer(room.window(), room.pinned());
    }
  }
  answer(window_of(past, head), pinned_of(past, head));
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
