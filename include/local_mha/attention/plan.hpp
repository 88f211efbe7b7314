// SPDX-License-Identifier: MIT
/// \file
/// In which stretches the queries of a batch attend.
#pragma once

#include <algorithm>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/sequence_blocks.hpp>
#include <local_mha/attention/stretches.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// A task is a stretch of the queries of the heads that share keys and values. It makes the keys of
/// its look-around anew, and needs no other task. Results do not depend on the cut, because every
/// block of queries is computed alone.
template <typename Scalar>
class AttentionPlan {
 public:
  struct Task {
    Index sequence;
    Index kv_head;
    /// Blocks of the sequence.
    Range queries;
  };

  /// Becomes that of a call. Memory is used again.
  void assign(const AttentionInputs<Scalar>& inputs, Index batch, Index threads) {
    constexpr Index count = block_rows<Scalar>;
    blocks_.assign(inputs, count);
    kv_heads_ = inputs.kv_heads();
    const Index sharing = batch * kv_heads_;
    const Index of_item = batch > 0 ? blocks_.count() / batch : 0;
    Index number = 1;
    if (threads > 1 && sharing > 0) {
      // More stretches than threads even out the load, as long as the look-around costs little: its
      // keys are transposed, which costs next to nothing.
      const Index reach = ceil_div(inputs.window().reach(inputs.longest()), 16 * count);
      const Index each =
          std::clamp<Index>(sharing * of_item / (threads * 8 * (std::max<Index>)(1, reach)), 1, 4);
      number = ceil_div(threads * each, sharing);
    }
    const Index rows = (std::max<Index>)(1, ceil_div(of_item, number)) * count;
    stretches_.assign(blocks_, inputs.sequences(), rows);
    batch_ = batch;
    // No more for shorter sequences, whose stretches may come out even where longer ones' do not:
    // what was made for workers serves them.
    workers_ = (std::min)(threads, (std::max)(tasks(), sharing * (std::min)(number, of_item)));
  }

  Index tasks() const { return stretches_.count() * kv_heads_; }
  Index workers() const { return workers_; }
  /// Item by item, and head by head, as they lie.
  Task task(Index i) const {
    // An item that is alone may hold several sequences.
    const Index item = batch_ == 1 ? 0 : stretches_.sequence(i / kv_heads_);
    const Index first = stretches_.first(item);
    const Index of_item = (batch_ == 1 ? stretches_.count() : stretches_.first(item + 1)) - first;
    const Index head = (i - first * kv_heads_) / of_item;
    const Index stretch = first + (i - first * kv_heads_) % of_item;
    const Range rows = stretches_.rows(stretch);
    return {stretches_.sequence(stretch),
            head,
            {rows.begin / block_rows<Scalar>, ceil_div(rows.end, block_rows<Scalar>)}};
  }

 private:
  SequenceBlocks blocks_;
  Stretches stretches_;
  Index kv_heads_ = 0;
  Index batch_ = 0;
  Index workers_ = 0;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
