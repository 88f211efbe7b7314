// SPDX-License-Identifier: MIT
/// \file
/// Where the blocks of a batch of sequences lie, one after the other.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// The rows of a batch in blocks: each sequence, or segment of a packed one, starts a block of its
/// own. Rows and blocks are counted through the batch. Of a sequence of which only a part is here,
/// they are that part's, whose blocks begin where those of the whole sequence do.
class SequenceBlocks {
 public:
  /// Becomes those of a batch. Memory is used again.
  /// \param inputs the sequences and their rows, as AttentionInputs
  template <typename Inputs>
  void assign(const Inputs& inputs, Index block_rows) {
    block_rows_ = block_rows;
    begins_.resize(static_cast<std::size_t>(inputs.sequences()) + 1);
    Begin begin;
    for (Index s = 0; s < inputs.sequences(); ++s) {
      const Range rows = inputs.own(s);
      begin.place = inputs.place(s);
      begin.lane = rows.begin % block_rows;
      at(s) = begin;
      begin.row += rows.end - rows.begin;
      if (rows.begin < rows.end)
        begin.block += ceil_div(begin.lane + rows.end - rows.begin, block_rows);
    }
    begins_.back() = begin;
  }

  /// The first row and the first block of a sequence; one past the last sequence, all.
  Index first_row(Index sequence) const { return at(sequence).row; }
  Index first_block(Index sequence) const { return at(sequence).block; }
  Index length(Index sequence) const { return first_row(sequence + 1) - first_row(sequence); }
  Index blocks_of(Index sequence) const {
    return first_block(sequence + 1) - first_block(sequence);
  }
  /// Blocks of all sequences.
  Index count() const { return begins_.back().block; }

  /// Where the first row of a sequence lies among all rows of the batch, those of no sequence
  /// included.
  Index place(Index sequence) const { return at(sequence).place; }
  /// Where the first row of a block lies there, and its lane, which is 0 but where a part begins.
  Index row(Index block) const {
    const Index s = sequence(block);
    const Index before = (block - first_block(s)) * block_rows_ - at(s).lane;
    return place(s) + (std::max<Index>)(0, before);
  }
  Index lane(Index block) const {
    const Index s = sequence(block);
    return block == first_block(s) ? at(s).lane : 0;
  }
  /// How many rows a block holds.
  Index rows(Index block) const {
    const Index s = sequence(block);
    const Index before = (block - first_block(s)) * block_rows_ - at(s).lane;
    const Index begin = (std::max<Index>)(0, before);
    return (std::min)(before + block_rows_, length(s)) - begin;
  }

 private:
  struct Begin {
    Index row = 0;
    Index block = 0;
    Index place = 0;
    Index lane = 0;  // of the first row in its block
  };

  Begin& at(Index sequence) { return begins_[static_cast<std::size_t>(sequence)]; }
  const Begin& at(Index sequence) const { return begins_[static_cast<std::size_t>(sequence)]; }

  // Of the sequences that begin there, the last one has rows.
  Index sequence(Index block) const {
    const auto after =
        std::upper_bound(begins_.begin(), begins_.end(), block,
                         [](Index b, const Begin& begin) { return b < begin.block; });
    return static_cast<Index>(after - begins_.begin()) - 1;
  }

  Index block_rows_ = 1;
  std::vector<Begin> begins_ = {Begin{}};  // of each sequence, and all
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
