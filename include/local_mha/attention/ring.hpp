// SPDX-License-Identifier: MIT
/// \file
/// What a sequence's flow keeps of the past: the last blocks of a head's queries, keys or values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/ops/project.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// Goes through the blocks of a ring in order.
template <typename SomeRing>
class RingCursor {
 public:
  RingCursor(const SomeRing& ring, Index block) : ring_(ring), slot_(block % ring.capacity()) {}
  const auto* block() const { return ring_.in_slot(slot_); }
  void advance() { slot_ = slot_ + 1 < ring_.capacity() ? slot_ + 1 : 0; }

 private:
  const SomeRing& ring_;
  Index slot_;
};

}  // namespace detail

/// The last `capacity` blocks of an endless sequence of blocks, `[channels][block_rows]` each.
/// \tparam Storage what its numbers are rounded to: see can_store
template <typename Scalar, typename Storage = Scalar>
class Ring {
  static_assert(can_store<Scalar, Storage>,
                "keys and values are stored as what is computed with, or where that is float, as "
                "Eigen::bfloat16 or Eigen::half");

 public:
  using Stored = Storage;

  Ring() = default;
  /// \param channels of a block; its room is padded_channels() of it, and the rest stays 0
  Ring(Index channels, Index capacity)
      : stride_(padded_channels<Scalar>(channels) * block_rows<Scalar>),
        channels_(channels),
        capacity_(capacity),
        blocks_(make_block_buffer<Storage>(stride_ * capacity)),
        finite_(static_cast<std::size_t>(capacity), 1) {}

  Index channels() const { return channels_; }
  Index capacity() const { return capacity_; }

  /// Block `b` of the sequence, `b >= 0`.
  Storage* operator[](Index b) { return blocks_.data() + slot(b) * stride_; }
  const Storage* operator[](Index b) const { return blocks_.data() + slot(b) * stride_; }

  /// Takes the lanes from `begin` on of block `b` from another block; those before it stay.
  void put_lanes(Index b, int begin, const Scalar* from) {
    using L = Lanes<Scalar>;
    Storage* to = (*this)[b];
    for (Index c = 0; c < channels_; ++c, from += L::count, to += L::count)
      detail::store_rounded(
          select_lanes(begin, L::count, L::load(from), detail::load_stored<L>(to)), to);
  }
  /// Takes one lane of block `b` from another block.
  void put_lane(Index b, int lane, const Scalar* from) {
    Storage* to = (*this)[b];
    for (Index i = lane; i < channels_ * block_rows<Scalar>; i += block_rows<Scalar>)
      to[i] = detail::to_stored<Storage>(from[i]);
  }

  /// Takes one row, `[channels]`, stored as it is or otherwise.
  template <typename Given>
  void put_row(Index row, const Given* from) {
    Storage* to = (*this)[row / block_rows<Scalar>] + row % block_rows<Scalar>;
    for (Index c = 0; c < channels_; ++c)
      to[c * block_rows<Scalar>] = detail::to_stored<Storage>(detail::from_stored<Scalar>(from[c]));
  }
  /// Takes block `b` of another ring, and what was noted of it.
  void copy_block(Index b, const Ring& from) {
    std::copy_n(from[b], channels_ * block_rows<Scalar>, (*this)[b]);
    copy_finite(b, from);
  }

  /// In a block, channel `c` of position `r` is at `c·channel_stride() + r·position_stride()`.
  static constexpr Index channel_stride() { return block_rows<Scalar>; }
  static constexpr Index position_stride() { return 1; }

  using Cursor = detail::RingCursor<Ring>;
  Cursor cursor(Index b) const { return {*this, b}; }
  /// What lies in place `slot` of `capacity()`: blocks `slot`, `slot + capacity()` and so on.
  const Storage* in_slot(Index slot) const { return blocks_.data() + slot * stride_; }

  /// Looks at block `b`, for finite().
  void note_finite(Index b) {
    finite_[static_cast<std::size_t>(slot(b))] =
        detail::all_finite_stored<Scalar>((*this)[b], channels_ * block_rows<Scalar>) ? 1 : 0;
  }
  /// The same of what was noted of the block of another ring.
  template <typename Other>
  void copy_finite(Index b, const Other& other) {
    finite_[static_cast<std::size_t>(slot(b))] = other.finite(b) ? 1 : 0;
  }
  /// False if block `b` holds a NaN or an infinity.
  bool finite(Index b) const { return finite_[static_cast<std::size_t>(slot(b))] != 0; }

 private:
  Index slot(Index b) const { return b % capacity_; }

  Index stride_ = 0;
  Index channels_ = 0;
  Index capacity_ = 1;
  BlockBuffer<Storage> blocks_;
  std::vector<std::uint8_t> finite_;
};

namespace detail {

/// Rows of a sequence on their way into a ring. Those of a block of which the ring holds some rows
/// already are made aside.
template <typename Scalar>
class RowsForRing {
 public:
  /// \param rows not empty; of their last block, the ring takes the rest, too, unless they are one
  /// \param aside room for a block of the ring
  RowsForRing(Ring<Scalar>& ring, const Range& rows, Scalar* aside)
      : ring_(ring),
        block_(rows.begin / block_rows<Scalar>),
        lane_(static_cast<int>(rows.begin % block_rows<Scalar>)),
        single_(rows.end - rows.begin == 1),
        aside_(aside) {}

  /// Where block `b` of the sequence is made.
  Scalar* operator()(Index b) const { return lane_ > 0 && b == block_ ? aside_ : ring_[b]; }

  /// All are made.
  void put() const {
    if (lane_ == 0) return;
    if (single_)
      ring_.put_lane(block_, lane_, aside_);
    else
      ring_.put_lanes(block_, lane_, aside_);
  }

 private:
  Ring<Scalar>& ring_;
  Index block_;
  int lane_;
  bool single_;
  Scalar* aside_;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
