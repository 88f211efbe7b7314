// SPDX-License-Identifier: MIT
/// \file
/// What the attention's backward kernel takes: a block of queries, and the keys that it sees as
/// they lie in stores.
#pragma once

#include <algorithm>
#include <type_traits>

#include <Eigen/Core>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/operand_ring.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/position_arrays.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// A block of queries on the way back.
template <typename Scalar>
struct QueryGradients {
  Index first = 0;                   ///< the block's first row
  const Scalar* queries = nullptr;   ///< `[dim_head][block_rows]` as AttentionKernel::attend() has
  const Scalar* grad_out = nullptr;  ///< `[dim_value][block_rows]`, 0 in rows that do not exist;
                                     ///< what it is as operands
  const Scalar* lse = nullptr;       ///< `[2][block_rows]` as AttentionKernel::attend() leaves it
  const Scalar* delta = nullptr;     ///< `[block_rows]`
  /// `[padded dim_head][block_rows]`: becomes `Σ_j ds_ij · k_j`, turned back to the place of the
  /// queries
  Scalar* grad_queries = nullptr;
};

namespace detail {

/// Keys and values of a sequence as numbers, as the products of the backward pass take them.
template <typename Scalar>
class KeyValueNumbers {
 public:
  KeyValueNumbers() = default;
  KeyValueNumbers(Index dim_head, Index dim_value, Index blocks)
      : keys_(dim_head, blocks), values_(dim_value, blocks) {}

  /// Where block `b` of the keys is made, `[dim_head][block_rows]`; then it is taken.
  Scalar* made_keys(Index b) { return keys_[b]; }
  void take_keys(Index b) { keys_.note_finite(b); }
  /// The same of values.
  Scalar* made_values(Index b) { return values_[b]; }
  void take_values(Index b) { values_.note_finite(b); }

  /// For products with a block of rows.
  const Ring<Scalar>& keys() const { return keys_; }
  const Ring<Scalar>& values() const { return values_; }
  /// For sums over keys.
  const Ring<Scalar>& summed_keys() const { return keys_; }
  /// Number `channel` of key `r` of block `b`.
  Scalar key(Index b, Index channel, Index r) const {
    return keys_[b][channel * block_rows<Scalar> + r];
  }
  /// False if block `b` holds a NaN or an infinity, of which 0 times is not 0.
  bool finite(Index b) const { return keys_.finite(b) && values_.finite(b); }

 private:
  Ring<Scalar> keys_;
  Ring<Scalar> values_;
};

/// The same as operands.
template <typename Scalar>
class KeyValueOperands {
 public:
  KeyValueOperands() = default;
  KeyValueOperands(Index dim_head, Index dim_value, Index blocks)
      : keys_(dim_head, blocks),
        values_(dim_value, blocks),
        summed_keys_(dim_head, blocks),
        made_(make_block_buffer<Scalar>((std::max)(dim_head, dim_value) * block_rows<Scalar>)) {}

  Scalar* made_keys(Index /*b*/) { return made_.data(); }
  void take_keys(Index b) {
    keys_.put(b, made_.data());
    summed_keys_.put(b, made_.data());
  }
  Scalar* made_values(Index /*b*/) { return made_.data(); }
  void take_values(Index b) { values_.put(b, made_.data()); }

  const KeyOperands<Scalar>& keys() const { return keys_; }
  const KeyOperands<Scalar>& values() const { return values_; }
  const ValueOperands<Scalar>& summed_keys() const { return summed_keys_; }
  Scalar key(Index b, Index channel, Index r) const {
    return from_stored<Scalar>(summed_keys_.value(b, channel, r));
  }
  /// Sums over operands leave out what is not seen by themselves.
  static constexpr bool finite(Index /*b*/) { return true; }

 private:
  KeyOperands<Scalar> keys_;
  KeyOperands<Scalar> values_;
  ValueOperands<Scalar> summed_keys_;
  BlockBuffer<Scalar> made_;  // before it is taken
};

/// What products with Arithmetic read.
template <typename Scalar, typename Arithmetic>
using KeyValueInputs = std::conditional_t<std::is_same_v<Arithmetic, Scalar>,
                                          KeyValueNumbers<Scalar>, KeyValueOperands<Scalar>>;

/// Keys and values of a sequence, and buffers for their gradients, panels that are added to; that
/// of the keys is `Σ_i ds_ij · queries_i`, which is theirs times `log2(e)`.
template <typename Scalar, typename Arithmetic = Scalar>
struct GradientRings : KeyValueInputs<Scalar, Arithmetic> {
  using Inputs = KeyValueInputs<Scalar, Arithmetic>;

  GradientRings() = default;
  GradientRings(Index dim_head, Index dim_value, Index blocks)
      : Inputs(dim_head, dim_value, blocks),
        grad_keys(panel_channels<Scalar>(dim_head), blocks),
        grad_values(panel_channels<Scalar>(dim_value), blocks) {}

  /// Those of block `b` become 0.
  void clear_gradients(Index b) {
    for (Ring<Scalar>* of : {&grad_keys, &grad_values})
      std::fill_n((*of)[b], of->channels() * block_rows<Scalar>, Scalar(0));
  }

  Ring<Scalar> grad_keys;    ///< panels
  Ring<Scalar> grad_values;  ///< panels
};

/// Keys one after the other in a store, and what the tile's queries see of them.
template <typename Scalar, typename Arithmetic = Scalar>
struct BackwardStrip {
  static constexpr Index count = block_rows<Scalar>;

  QueryTile<Scalar> tile;
  GradientRings<Scalar, Arithmetic>& store;
  const Index* blocks;  ///< of the store in the sequence; null: the same

  Index block_in_sequence(Index block) const { return blocks == nullptr ? block : blocks[block]; }
  Index row(Index key) const { return block_in_sequence(key / count) * count + key % count; }
  const RotarySteps<Scalar>* steps(const AttentionHead<Scalar>& head) const {
    return blocks == nullptr ? head.steps : head.pinned_steps;
  }
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
