// SPDX-License-Identifier: MIT
/// \file
/// Rows of a sequence on their way into a ring that keeps them in 16 bits, which are made aside
/// before they are rounded: what RowsForRing is where nothing is rounded.
#pragma once

#include <utility>

#include <local_mha/attention/past.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Those of a ring of numbers.
template <typename Scalar, typename Storage>
class RoundedRowsForRing {
 public:
  /// \param rows not empty; of their last block, the ring takes the rest, too, unless they are one
  /// \param made where they are made: has room for their blocks
  RoundedRowsForRing(Ring<Scalar, Storage>& ring, const Range& rows, Ring<Scalar>& made)
      : ring_(ring), rows_(rows), made_(made) {}

  /// Where block `b` of the sequence is made.
  Scalar* operator()(Index b) const { return made_[b]; }

  /// All are made.
  void put() const {
    constexpr Index count = block_rows<Scalar>;
    const bool single = rows_.end - rows_.begin == 1;
    for_each_block<Scalar>(rows_, [&](Index block, LaneRange lanes) {
      const Scalar* from = std::as_const(made_)[block];
      if (lanes.begin == 0)
        pack(from, ring_.channels() * count, ring_[block]);
      else if (single)
        ring_.put_lane(block, lanes.begin, from);
      else
        ring_.put_lanes(block, lanes.begin, from);
    });
  }

 private:
  Ring<Scalar, Storage>& ring_;
  Range rows_;
  Ring<Scalar>& made_;
};

/// The same of a ring of operands, which takes whole blocks.
template <typename Scalar, typename Operands>
class RowsForOperands {
 public:
  /// \param rows not empty, from the begin of a block on
  RowsForOperands(Operands& ring, const Range& rows, Ring<Scalar>& made)
      : ring_(ring), rows_(rows), made_(made) {}

  Scalar* operator()(Index b) const { return made_[b]; }
  void put() const {
    const Range blocks = blocks_of<Scalar>(rows_);
    for (Index block = blocks.begin; block < blocks.end; ++block)
      ring_.put(block, std::as_const(made_)[block]);
  }

 private:
  Operands& ring_;
  Range rows_;
  Ring<Scalar>& made_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
