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
  /// Becomes the rows `[0, first)` and those with a flag.
  /// \param flags of `seqlen` rows, 1 = pinned; null: none is
  /// \param masked flags of rows that nobody sees; null: none is
  void assign(Index seqlen, Index first, const std::uint8_t* flags, const std::uint8_t* masked) {
    blocks_.clear();
    hidden_.clear();
    places_ = 0;
    any_hidden_ = false;
    const Index end = flags != nullptr ? seqlen : (std::min)(first, seqlen);
    for (Index begin = 0; begin < end; begin += count) {
      const auto is_pinned = [&](Index row) {
        if (row >= seqlen || (masked != nullptr && masked[row] != 0)) return false;
        return row < first || (flags != nullptr && flags[row] != 0);
      };
      Index last = -1;
      for (Index r = 0; r < count; ++r)
        if (is_pinned(begin + r)) last = r;
      if (last < 0) continue;
      any_hidden_ = any_hidden_ || places_ < static_cast<Index>(hidden_.size());
      for (Index r = 0; r < count; ++r) {
        hidden_.push_back(is_pinned(begin + r) ? 0 : 1);
        any_hidden_ = any_hidden_ || (r < last && hidden_.back() != 0);
      }
      places_ = static_cast<Index>(blocks_.size()) * count + last + 1;
      blocks_.push_back(begin / count);
    }
  }

  bool empty() const { return blocks_.empty(); }
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

 private:
  static constexpr Index count = block_rows<Scalar>;

  std::vector<Index> blocks_;
  std::vector<std::uint8_t> hidden_;
  Index places_ = 0;
  bool any_hidden_ = false;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
