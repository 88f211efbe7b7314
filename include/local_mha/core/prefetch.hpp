// SPDX-License-Identifier: MIT
/// \file
/// Memory that is needed soon, asked for while something else is computed.
#pragma once

#include <array>
#include <cstddef>

#include <local_mha/core/block.hpp>
#include <local_mha/core/lanes.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha {

/// Stretches of memory, requested a few cache lines at a time: all at once would fill the processor's
/// queue of misses and stall it.
template <typename Scalar>
class Upcoming {
 public:
  /// Memory of `size` scalars; ignored once `most` stretches are waiting.
  void add(const Scalar* memory, Index size) {
    if (waiting_ == most || size <= 0) return;
    stretches_[waiting_++] = {memory, memory + size};
    lines_ += ceil_div(size, line);
  }

  /// Promises that request() will be called `steps` times for what was added.
  void spread_over(Index steps) { lines_a_step_ = ceil_div(lines_, std::max<Index>(1, steps)); }

  /// Requests the next few lines.
  LOCAL_MHA_INLINE void request() {
    for (Index i = 0; i < lines_a_step_ && next_ < waiting_; ++i) {
      Stretch& stretch = stretches_[next_];
      prefetch_line(stretch.begin);
      if (stretch.end - stretch.begin <= line)
        ++next_;
      else
        stretch.begin += line;
    }
  }

 private:
  static constexpr std::size_t most = 8;
  static constexpr Index line = std::max<Index>(1, 64 / static_cast<Index>(sizeof(Scalar)));

  struct Stretch {
    const Scalar* begin;
    const Scalar* end;
  };

  std::array<Stretch, most> stretches_{};
  std::size_t waiting_ = 0;
  std::size_t next_ = 0;
  Index lines_ = 0;
  Index lines_a_step_ = 0;
};

}  // namespace local_mha
