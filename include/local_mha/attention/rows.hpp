// SPDX-License-Identifier: MIT
/// \file
/// Values as they lie in memory, `[seqlen][channels]`, in the shape of a ring's blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/lanes.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/project.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// A view with the interface of Ring, for reading. Only the last block is copied, if it is not
/// whole.
template <typename Scalar>
class Rows {
 public:
  Rows() = default;
  /// \param kept blocks for which finite() is remembered
  Rows(Index channels, Index kept)
      : channels_(channels),
        last_(make_block_buffer<Scalar>(channels * count)),
        finite_(static_cast<std::size_t>(kept), 1) {}

  /// True if the kernel reads such rows: whole micro-kernels of channels, no further.
  static bool fits(Index channels) { return channels == padded_channels<Scalar>(channels); }

  /// \param data `[seqlen][channels]`
  void view(const Scalar* data, Index seqlen) {
    data_ = data;
    whole_ = seqlen / count;
    last_rows_ = seqlen % count;
    const Scalar* last = data + whole_ * count * channels_;
    std::fill(std::copy(last, last + last_rows_ * channels_, last_.begin()), last_.end(),
              Scalar(0));
  }

  Index channels() const { return channels_; }
  static constexpr Index channel_stride() { return 1; }
  Index position_stride() const { return channels_; }

  /// Goes through the blocks in order.
  class Cursor {
   public:
    Cursor(const Rows& rows, Index block) : rows_(rows), block_(block) {}
    const Scalar* block() const { return rows_.block(block_); }
    void advance() { ++block_; }

   private:
    const Rows& rows_;
    Index block_;
  };
  Cursor cursor(Index b) const { return {*this, b}; }

  /// Looks at block `b`, for finite().
  void note_finite(Index b) { finite_[slot(b)] = all_finite(block(b), channels_ * count) ? 1 : 0; }
  /// False if block `b` holds a NaN or an infinity.
  bool finite(Index b) const { return finite_[slot(b)] != 0; }

 private:
  static constexpr Index count = block_rows<Scalar>;

  const Scalar* block(Index b) const {
    return b < whole_ ? data_ + b * count * channels_ : last_.data();
  }
  std::size_t slot(Index b) const { return static_cast<std::size_t>(b) % finite_.size(); }

  const Scalar* data_ = nullptr;
  Index channels_ = 0;
  Index whole_ = 0;
  Index last_rows_ = 0;
  BlockBuffer<Scalar> last_;
  std::vector<std::uint8_t> finite_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
