// SPDX-License-Identifier: MIT
/// \file
/// How the sequences of a batch are cut into stretches of rows, which threads take one by one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include <local_mha/attention/sequence_blocks.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// The stretches of all sequences, one after the other. Those at the batch's end may be shorter, so
/// that threads that take them end together.
class Stretches {
 public:
  /// Becomes those of a batch. Memory is used again.
  /// \param rows, short_rows of a stretch, at least 1, and of those at the end
  /// \param shorts_begin row of the batch from which on they are short
  void assign(const SequenceBlocks& blocks, Index sequences, Index rows, Index short_rows,
              Index shorts_begin) {
    rows_ = rows;
    short_rows_ = short_rows;
    most_short_ = 0;
    starts_.resize(static_cast<std::size_t>(sequences) + 1);
    Start next;
    for (Index s = 0; s < sequences; ++s) {
      const Index length = blocks.length(s);
      const Index before = shorts_begin - next.row;
      next.longs = length <= before ? ceil_div(length, rows) : (std::max<Index>)(0, before) / rows;
      at(s) = next;
      most_short_ = (std::max)(most_short_, holding(s, length) - next.longs);
      next.row += length;
      next.stretch += holding(s, length);
      next.number += length > 0 ? 1 : 0;
    }
    starts_.back() = next;
  }
  /// The same, all of the same length.
  void assign(const SequenceBlocks& blocks, Index sequences, Index rows) {
    assign(blocks, sequences, rows, rows, blocks.first_row(sequences));
  }

  /// Stretches of all sequences.
  Index count() const { return starts_.back().stretch; }
  Index sequences() const { return static_cast<Index>(starts_.size()) - 1; }
  /// The sequence of a stretch, and its rows there.
  Index sequence(Index stretch) const {
    const auto after =
        std::upper_bound(starts_.begin(), starts_.end(), stretch,
                         [](Index i, const Start& start) { return i < start.stretch; });
    return static_cast<Index>(after - starts_.begin()) - 1;
  }
  Range rows(Index stretch) const {
    const Index s = sequence(stretch);
    const Index i = stretch - first(s);
    return {first_row(s, i), first_row(s, i + 1)};
  }

  /// The first stretch of a sequence; one past the last sequence, all.
  Index first(Index sequence) const { return at(sequence).stretch; }
  /// Sequences before it that have rows.
  Index number(Index sequence) const { return at(sequence).number; }
  Index length(Index sequence) const { return at(sequence + 1).row - at(sequence).row; }
  /// Stretches of a sequence that hold its first `n` rows.
  Index holding(Index sequence, Index n) const {
    const Index in_long = (std::min)(n, at(sequence).longs * rows_);
    return ceil_div(in_long, rows_) + ceil_div(n - in_long, short_rows_);
  }
  /// Stretches that hold `n` adjoining rows of any sequence, beside the one before them.
  Index holding_any(Index n) const {
    return (std::min)(ceil_div(n, short_rows_), ceil_div(n, rows_) + most_short_);
  }

 private:
  struct Start {
    Index row = 0;      // of the batch
    Index stretch = 0;  // the first one
    Index number = 0;   // of the sequences before it that have rows
    Index longs = 0;    // stretches that are not short
  };

  Start& at(Index sequence) { return starts_[static_cast<std::size_t>(sequence)]; }
  const Start& at(Index sequence) const { return starts_[static_cast<std::size_t>(sequence)]; }
  Index first_row(Index sequence, Index i) const {
    const Index longs = (std::min)(i, at(sequence).longs);
    return (std::min)(longs * rows_ + (i - longs) * short_rows_, length(sequence));
  }

  Index rows_ = 1;
  Index short_rows_ = 1;
  Index most_short_ = 0;                   // of a sequence
  std::vector<Start> starts_ = {Start{}};  // of each sequence, and all
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
