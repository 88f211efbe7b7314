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

namespace local_mha {

/// What the next block of positions will read and write, brought into the cache while the present
/// one is computed: a few cache lines between any two micro-kernels, because in a burst they wait
/// for one another and the micro-kernels for them.
template <typename Scalar>
class Upcoming {
 public:
  static constexpr std::size_t most = 4;

  /// Forgets what is not fetched yet.
  void clear() { count_ = 0; }

  /// \param size values from `begin`. At most `most` pieces.
  void add(const Scalar* begin, Index size) {
    if (count_ == 0) longest_ = at_ = 0;
    pieces_[count_++] = {begin, size};
    longest_ = std::max(longest_, size);
  }

  /// All of it is to be fetched in `steps` calls of fetch().
  void spread_over(Index steps) {
    lines_a_step_ = ceil_div(ceil_div(longest_, line), std::max<Index>(1, steps));
  }

  /// A step's share.
  LOCAL_MHA_INLINE void fetch() {
    const Index begin = at_;
    at_ = std::min(begin + lines_a_step_ * line, longest_);
    for (std::size_t i = 0; i < count_; ++i) {
      const Index end = std::min(at_, pieces_[i].size);
      for (Index at = begin; at < end; at += line) prefetch(pieces_[i].begin + at);
    }
  }

 private:
  static constexpr Index line = std::max<Index>(1, 64 / static_cast<Index>(sizeof(Scalar)));

  struct Piece {
    const Scalar* begin;
    Index size;
  };

  std::array<Piece, most> pieces_{};
  std::size_t count_ = 0;
  Index longest_ = 0;
  Index at_ = 0;
  Index lines_a_step_ = 0;
};

}  // namespace local_mha
