// SPDX-License-Identifier: MIT
/// \file
/// Memory that is needed soon.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>

#include <local_mha/core/block.hpp>
#include <local_mha/core/lanes.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What the next block of positions will read and write, brought into the cache while the present
/// one is computed: a few cache lines at a time, evenly, because in a burst they wait for
/// one another and the computation for them.
template <typename Scalar>
class Upcoming {
 public:
  static constexpr std::size_t most = 8;

  /// Forgets what is not fetched yet.
  void clear() { *this = {}; }

  /// \param size values from `begin`. At most `most` pieces.
  void add(const Scalar* begin, Index size) {
    pieces_[count_++] = {begin, ceil_div(size, line)};
    lines_ += ceil_div(size, line);
  }

  /// All of it is to be fetched in `steps` calls of fetch().
  void spread_over(Index steps) { lines_a_step_ = ceil_div(lines_, (std::max<Index>)(1, steps)); }

  /// A step's share.
  LOCAL_MHA_INLINE void fetch() {
    for (Index left = lines_a_step_; left > 0 && piece_ < count_;) {
      Piece& piece = pieces_[piece_];
      const Index cache_lines = (std::min)(left, piece.cache_lines);
      for (Index i = 0; i < cache_lines; ++i) prefetch(piece.at, i * line);
      piece.at += cache_lines * line;
      piece.cache_lines -= cache_lines;
      if (piece.cache_lines == 0) ++piece_;
      left -= cache_lines;
    }
  }

 private:
  static constexpr Index line = (std::max<Index>)(1, 64 / static_cast<Index>(sizeof(Scalar)));

  struct Piece {
    const Scalar* at;
    Index cache_lines;
  };

  std::array<Piece, most> pieces_{};
  std::size_t count_ = 0;
  std::size_t piece_ = 0;  // the one that is being fetched
  Index lines_ = 0;
  Index lines_a_step_ = 0;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
