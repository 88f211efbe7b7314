// SPDX-License-Identifier: MIT
/// \file
/// Rows of a sequence that stay visible when the window has moved on.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// The blocks that hold pinned rows, one after the other: as long as a window shows them they are
/// seen there, before and after it here.
///
/// Places count the rows of these blocks, in the order of the sequence.
template <typename Scalar>
class PinnedRows {
 public:
  /// Becomes the rows `[0, first)` and those with a flag. Memory is used again.
  /// \param flags of `seqlen` rows; null: none is pinned
  /// \param is_masked `is_masked(row)`: nobody sees the row
  template <typename IsMasked>
  void assign(Index seqlen, Index first, const bool* flags, IsMasked&& is_masked) {
    number_ = 0;
    places_ = 0;
    any_hidden_ = false;
    flagged_ = flags != nullptr;
    const Index end = flags != nullptr ? seqlen : (std::min)(first, seqlen);
    for (Index begin = 0; begin < end; begin += count) {
      const auto is_pinned = [&](Index row) {
        return row < seqlen && (row < first || (flags != nullptr && flags[row])) && !is_masked(row);
      };
      Index last = -1;
      for (Index r = 0; r < count; ++r)
        if (is_pinned(begin + r)) last = r;
      // The blocks of the first rows are all there, so that they lie at their own places.
      if (last < 0 && begin >= first) continue;
      any_hidden_ = any_hidden_ || places_ < number_ * count;
      make_room(number_ + 1);
      for (Index r = 0; r < count; ++r) {
        const auto at = static_cast<std::size_t>(number_ * count + r);
        hidden_[at] = is_pinned(begin + r) ? 0 : 1;
        any_hidden_ = any_hidden_ || (r < last && hidden_[at] != 0);
        not_flagged_[at] = flagged_ && is_pinned(begin + r) && flags[begin + r] ? 0 : 1;
      }
      if (last >= 0) places_ = number_ * count + last + 1;
      blocks_[static_cast<std::size_t>(number_++)] = begin / count;
    }
  }
  /// Makes room for so many blocks, which copies have, too.
  void make_room(Index blocks) {
    const auto number = static_cast<std::size_t>(blocks);
    if (blocks_.size() >= number) return;
    hidden_.resize(number * static_cast<std::size_t>(count));
    not_flagged_.resize(number * static_cast<std::size_t>(count));
    // Last, because it says what there is room for: memory may run out.
    blocks_.resize(number);
  }

  bool empty() const { return number_ == 0; }
  /// The place of a block of the sequence; −1 if none of its rows is pinned.
  Index place_of_block(Index block) const {
    const auto at = std::lower_bound(blocks().begin(), blocks().end(), block);
    return at != blocks().end() && *at == block ? at - blocks().begin() : -1;
  }
  /// Indices of the blocks in the sequence.
  std::span<const Index> blocks() const {
    return {blocks_.data(), static_cast<std::size_t>(number_)};
  }
  /// One past the last pinned row's place.
  Index places() const { return places_; }
  /// The first place whose row is `row` or later.
  Index place_of(Index row) const {
    const auto block = std::lower_bound(blocks().begin(), blocks().end(), row / count);
    const Index place = (block - blocks().begin()) * count;
    const bool inside = block != blocks().end() && *block == row / count;
    return (std::min)(place + (inside ? row % count : 0), places_);
  }
  /// A flag for each place, 1 = not pinned; null if all up to places() are.
  const std::uint8_t* hidden() const { return any_hidden_ ? hidden_.data() : nullptr; }
  /// A flag for each place, 1 = not pinned by a flag; null if none is.
  const std::uint8_t* not_flagged() const {
    return flagged_ && number_ > 0 ? not_flagged_.data() : nullptr;
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  // Room, of which the first `number_` blocks are used.
  std::vector<Index> blocks_;
  std::vector<std::uint8_t> hidden_;
  std::vector<std::uint8_t> not_flagged_;
  Index number_ = 0;
  Index places_ = 0;
  bool flagged_ = false;
  bool any_hidden_ = false;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
