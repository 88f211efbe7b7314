// SPDX-License-Identifier: MIT
/// \file
/// Rows of a sequence that stay visible when the window has moved on.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
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
    blocks_.clear();
    hidden_.clear();
    not_flagged_.clear();
    places_ = 0;
    any_hidden_ = false;
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
      any_hidden_ = any_hidden_ || places_ < static_cast<Index>(hidden_.size());
      for (Index r = 0; r < count; ++r) {
        hidden_.push_back(is_pinned(begin + r) ? 0 : 1);
        any_hidden_ = any_hidden_ || (r < last && hidden_.back() != 0);
        if (flags != nullptr)
          not_flagged_.push_back(is_pinned(begin + r) && flags[begin + r] ? 0 : 1);
      }
      if (last >= 0) places_ = static_cast<Index>(blocks_.size()) * count + last + 1;
      blocks_.push_back(begin / count);
    }
  }
  /// Makes room for as many first rows.
  void reserve(Index first) {
    blocks_.reserve(static_cast<std::size_t>(ceil_div(first, count)));
    hidden_.reserve(static_cast<std::size_t>(ceil_div(first, count) * count));
  }

  bool empty() const { return blocks_.empty(); }
  /// The place of a block of the sequence; −1 if none of its rows is pinned.
  Index place_of_block(Index block) const {
    const auto at = std::lower_bound(blocks_.begin(), blocks_.end(), block);
    return at != blocks_.end() && *at == block ? static_cast<Index>(at - blocks_.begin()) : -1;
  }
  /// Indices of the blocks in the sequence.
  const std::vector<Index>& blocks() const { return blocks_; }
  /// One past the last pinned row's place.
  Index places() const { return places_; }
  /// The first place whose row is `row` or later.
  Index place_of(Index row) const {
    const auto block = std::lower_bound(blocks_.begin(), blocks_.end(), row / count);
    const Index place = static_cast<Index>(block - blocks_.begin()) * count;
    const bool inside = block != blocks_.end() && *block == row / count;
    return (std::min)(place + (inside ? row % count : 0), places_);
  }
  /// A flag for each place, 1 = not pinned; null if all up to places() are.
  const std::uint8_t* hidden() const { return any_hidden_ ? hidden_.data() : nullptr; }
  /// A flag for each place, 1 = not pinned by a flag; null if none is.
  const std::uint8_t* not_flagged() const {
    return not_flagged_.empty() ? nullptr : not_flagged_.data();
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  std::vector<Index> blocks_;
  std::vector<std::uint8_t> hidden_;
  std::vector<std::uint8_t> not_flagged_;
  Index places_ = 0;
  bool any_hidden_ = false;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
