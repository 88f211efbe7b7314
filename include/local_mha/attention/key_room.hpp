// SPDX-License-Identifier: MIT
/// \file
/// What a stretch of queries of a stream sees of keys and values that are kept in 16 bits, as the
/// kernel takes it.
#pragma once

#include <type_traits>
#include <utility>

#include <local_mha/attention/operand_ring.hpp>
#include <local_mha/attention/past.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/rounded_rows.hpp>
#include <local_mha/attention/strips.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Buffers for one head at a time.
/// \tparam Arithmetic as of AttentionKernel
template <typename Scalar, typename Arithmetic = Scalar>
class KeyRoom {
  static constexpr bool of_operands = !std::is_same_v<Scalar, Arithmetic>;
  using Keys = BlockKeys<Scalar, Arithmetic>;
  using Values = BlockValues<Scalar, Arithmetic>;

 public:
  KeyRoom() = default;
  /// Of a batch: for rows that come in.
  KeyRoom(Index dim_head, Index stretch) : made_(dim_head, stretch) {}
  /// Of a stream.
  /// \param stretch blocks that come in, or are answered, at once
  KeyRoom(const Window& window, Index dim_head, Index stretch) : KeyRoom(dim_head, stretch + 2) {
    constexpr Index count = block_rows<Scalar>;
    // Two more, where rows begin and end inside of a block.
    const Index seen = ceil_div(window.reach_behind() + window.reach_ahead(), count) + stretch + 2;
    keys_ = Keys(dim_head, seen);
    values_ = Values(dim_head, seen);
    const Index pinned = ceil_div(window.first_keys(), count);
    if (pinned == 0) return;
    pinned_keys_ = Keys(dim_head, pinned);
    pinned_values_ = Values(dim_head, pinned);
  }

  /// Keys or values on their way into a ring.
  template <typename Storage>
  RoundedRowsForRing<Scalar, Storage> rows_for(Ring<Scalar, Storage>& ring, const Range& rows) {
    return {ring, rows, made_};
  }
  template <typename Operands>
  RowsForOperands<Scalar, Operands> rows_for(Operands& ring, const Range& rows) {
    return {ring, rows, made_};
  }

  /// Unpacks what queries see of a head of a past.
  /// \param keys those that the window shows to any of them
  template <typename Storage>
  void show(StoredPast<Scalar, Storage>& past, Index head, const Range& keys) {
    const Range blocks = blocks_of<Scalar>(keys);
    unpack_blocks(past.keys(head), past.values(head), blocks, keys_, values_);
    if (past.size().pinned > 0)
      unpack_blocks(*past.pinned_keys(head), *past.pinned_values(head), {0, past.size().pinned},
                    pinned_keys_, pinned_values_);
  }
  /// What show() unpacked last.
  KeyStore<Scalar, Values, Keys> window() const { return {&keys_, &values_}; }
  KeyStore<Scalar, Values, Keys> pinned() const { return {&pinned_keys_, &pinned_values_}; }

 private:
  template <typename Storage>
  void unpack_blocks(const Ring<Scalar, Storage>& keys, const Ring<Scalar, Storage>& values,
                     const Range& blocks, Keys& to_keys, Values& to_values) {
    const Index size = keys.channels() * block_rows<Scalar>;
    for (Index block = blocks.begin; block < blocks.end; ++block) {
      if constexpr (of_operands) {
        unpack(keys[block], size, made_[0]);
        to_keys.put(block, made_[0]);
        unpack(values[block], size, made_[0]);
        to_values.put(block, made_[0]);
      } else {
        unpack(keys[block], size, to_keys[block]);
        unpack(values[block], size, to_values[block]);
        to_values.copy_finite(block, values);
      }
    }
  }

  Ring<Scalar> made_;
  Keys keys_;
  Values values_;
  Keys pinned_keys_;
  Values pinned_values_;
};

/// The keys and values of a head of a past, as they lie.
template <typename Scalar, typename Keys, typename Values>
KeyStore<Scalar, Values, Keys> window_of(Past<Scalar, Keys, Values>& past, Index head) {
  return {&past.keys(head), &past.values(head)};
}
template <typename Scalar, typename Keys, typename Values>
KeyStore<Scalar, Values, Keys> pinned_of(Past<Scalar, Keys, Values>& past, Index head) {
  return {past.pinned_keys(head), past.pinned_values(head)};
}

/// Calls `answer(window, pinned)` with what some queries see of a head of a past: as it lies, where
/// the kernel can read it, or unpacked.
/// \param queries not empty
/// \param keys that the window shows to any of them
template <typename Scalar, typename Arithmetic, typename Keys, typename Values, typename Answer>
void show_keys(KeyRoom<Scalar, Arithmetic>& room, Past<Scalar, Keys, Values>& past, Index head,
               const Range& queries, const Range& keys, Answer&& answer) {
  if constexpr (std::is_same_v<Keys, Values> && !std::is_same_v<Keys, Ring<Scalar>>) {
    if (queries.end - queries.begin > 1) {
      room.show(past, head, keys);
      return answer(room.window(), room.pinned());
    }
  }
  answer(window_of(past, head), pinned_of(past, head));
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
