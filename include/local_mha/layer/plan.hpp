// SPDX-License-Identifier: MIT
/// \file
/// In which stretches, and with how much room, a batch passes the layer.
#pragma once

#include <algorithm>
#include <type_traits>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/sequence_blocks.hpp>
#include <local_mha/attention/stretches.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/project.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// A stretch is a multiple of so many blocks: of operands two, because ValueOperands are.
template <typename Scalar, typename Arithmetic = Scalar>
inline constexpr Index layer_unit =
    std::is_same_v<Scalar, Arithmetic> ? Index{Tiling<Scalar>::blocks} : 2;

/// Blocks that pass the layer's weights together: enough to pay for reading them.
template <typename Scalar, typename Arithmetic = Scalar>
inline constexpr Index layer_stretch =
    std::is_same_v<Scalar, Arithmetic> ? (std::max)(6, 2 * Tiling<Scalar>::blocks) : 12;

/// Sequences pass one after the other, in stretches that come in and are answered in order: see
/// TaskOrder. Each is taken by any worker.
template <typename Scalar, typename Arithmetic = Scalar>
class LayerPlan {
  static constexpr Index stretch = layer_stretch<Scalar, Arithmetic>;

 public:
  /// Becomes that of a call. Memory is used again.
  void assign(const AttentionInputs<Scalar>& inputs, Index threads) {
    constexpr Index count = block_rows<Scalar>;
    blocks_.assign(inputs, count);
    // Threads even out over several stretches each, which are not too short, for all the weights
    // pass the cache for each.
    constexpr Index unit = layer_unit<Scalar, Arithmetic>;
    const Index fair = blocks_.count() / (4 * threads) / unit * unit;
    rows_ = count * (threads == 1 ? stretch : std::clamp(fair, unit, stretch));
    const Index short_rows = threads == 1 ? rows_ : (std::min)(rows_, count * unit);
    const Index sequences = inputs.sequences();
    const Index all = blocks_.first_row(sequences);
    // Three short stretches for each thread even out the end: of the last sequence, or of the last
    // segments.
    const Index earliest = inputs.packed() || sequences == 0 ? 0 : blocks_.first_row(sequences - 1);
    stretches_.assign(blocks_, sequences, rows_, short_rows,
                      threads == 1 ? all : (std::max)(all - 3 * threads * short_rows, earliest));
    workers_ = (std::min)(threads, tasks());
    const Index ahead = (std::min)(inputs.window().reach_ahead(), inputs.longest());
    waiting_ = 1 + stretches_.holding_any(ahead) + (workers_ <= 1 ? 0 : 2 * workers_);
    count_pasts();
  }

  /// Stretches, each of which comes in and is answered.
  Index tasks() const { return stretches_.count(); }
  Index sequence(Index task) const { return stretches_.sequence(task); }
  /// Rows of the task's sequence.
  Range rows(Index task) const { return stretches_.rows(task); }
  /// Stretches that must have come in before a stretch is answered.
  Index needs(Index task, const Window& window) const {
    const Index s = sequence(task);
    const Index seen = window.keys_of(rows(task), stretches_.length(s)).end;
    return (std::max)(task + 1, stretches_.first(s) + stretches_.holding(s, seen));
  }

  /// Where the blocks of the sequences lie.
  const SequenceBlocks& blocks() const { return blocks_; }
  /// Rows of a stretch at most.
  Index stretch_rows() const { return rows_; }
  Index workers() const { return workers_; }
  /// Stretches that come in before the first of them is answered, at most.
  Index waiting() const { return waiting_; }
  /// Sequences that are under way at a time.
  Index pasts() const { return pasts_; }
  /// The place of a sequence among them.
  Index past(Index sequence) const { return stretches_.number(sequence) % pasts_; }

 private:
  // A sequence takes the past of another one when that is answered: what comes in then is
  // `waiting` stretches ahead at most.
  void count_pasts() {
    const Index sequences = stretches_.sequences();
    pasts_ = 0;
    for (Index s = 0, later = 0; s < sequences; ++s) {
      if (stretches_.length(s) == 0) continue;
      const Index free = stretches_.first(s + 1) + waiting_ - 1;
      later = (std::max)(later, s + 1);
      while (later < sequences && stretches_.first(later) < free) ++later;
      pasts_ = (std::max)(pasts_, stretches_.number(later) - stretches_.number(s));
    }
  }

  SequenceBlocks blocks_;
  Stretches stretches_;
  Index rows_ = block_rows<Scalar>;
  Index workers_ = 1;
  Index waiting_ = 1;
  Index pasts_ = 0;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
