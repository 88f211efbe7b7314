// SPDX-License-Identifier: MIT
/// \file
/// What the attention's backward kernel takes: a block of queries, and the keys that it sees as
/// they lie in stores.
#pragma once

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/rotary.hpp>
#include <local_mha/ops/weight_gradient.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// A block of queries on the way back.
template <typename Scalar>
struct QueryGradients {
  Index first = 0;                   ///< the block's first row
  const Scalar* queries = nullptr;   ///< `[dim_head][block_rows]` as AttentionKernel::attend() has
  const Scalar* grad_out = nullptr;  ///< `[dim_value][block_rows]`, 0 in rows that do not exist
  const Scalar* lse = nullptr;       ///< `[2][block_rows]` as AttentionKernel::attend() leaves it
  const Scalar* delta = nullptr;     ///< `[block_rows]`
  /// `[padded dim_head][block_rows]`: becomes `Σ_j ds_ij · k_j`, turned back to the place of the
  /// queries
  Scalar* grad_queries = nullptr;
};

/// Where keys and values lie, looked at by note_finite(), and the room for their gradients, panels
/// that are added to; that of the keys is `Σ_i ds_ij · queries_i`, which is theirs times `log2(e)`.
template <typename Scalar>
struct GradientStore {
  const Ring<Scalar>* keys = nullptr;
  const Ring<Scalar>* values = nullptr;
  Ring<Scalar>* grad_keys = nullptr;
  Ring<Scalar>* grad_values = nullptr;
};

namespace detail {

/// Keys and values, and the room for their gradients.
template <typename Scalar>
struct GradientRings {
  GradientRings() = default;
  GradientRings(Index dim_head, Index dim_value, Index blocks)
      : keys(dim_head, blocks),
        values(dim_value, blocks),
        grad_keys(panel_channels<Scalar>(dim_head), blocks),
        grad_values(panel_channels<Scalar>(dim_value), blocks) {}

  GradientStore<Scalar> store() { return {&keys, &values, &grad_keys, &grad_values}; }

  Ring<Scalar> keys;
  Ring<Scalar> values;
  Ring<Scalar> grad_keys;    ///< panels
  Ring<Scalar> grad_values;  ///< panels
};

/// Keys one after the other in a store, and what the tile's queries see of them.
template <typename Scalar>
struct BackwardStrip {
  static constexpr Index count = block_rows<Scalar>;

  QueryTile<Scalar> tile;
  GradientStore<Scalar> store;
  const Index* blocks;  ///< of the store in the sequence; null: the same

  Index block_in_sequence(Index block) const { return blocks == nullptr ? block : blocks[block]; }
  Index row(Index key) const { return block_in_sequence(key / count) * count + key % count; }
  const RotarySteps<Scalar>* steps(const AttentionHead<Scalar>& head) const {
    return blocks == nullptr ? head.steps : head.pinned_steps;
  }
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
