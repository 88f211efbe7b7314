// SPDX-License-Identifier: MIT
/// \file
/// The room for FeedForward's backward pass.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/feed_forward_weights.hpp>
#include <local_mha/ops/packed_weight.hpp>
#include <local_mha/ops/weight_gradient.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// What lies between the steps, of all rows. It stays for the next call.
template <typename Scalar>
struct FeedForwardBackwardRoom {
  /// Becomes that of a call.
  /// \param threads of the device
  void prepare(const FeedForwardWeights<Scalar>& weights, Index rows, Index threads) {
    const Index blocks = ceil_div(rows, block_rows<Scalar>);
    const Index stretches = ceil_div(blocks, stretch_blocks);
    proj_out.pack_transposed(weights.proj_out);
    proj_in.pack_transposed(weights.proj_in);
    normed_panels.prepare(blocks, panel_channels<Scalar>(weights.dim));
    hidden_panels.prepare(blocks, panel_channels<Scalar>(weights.inner));
    grad_out.prepare(blocks, weights.dim);
    grad_in.prepare(blocks, 2 * weights.inner);
    norm_sums.prepare(stretches, 2 * weights.dim);
    const auto workers = static_cast<std::size_t>((std::min)(threads, stretches));
    if (rooms.size() < workers) rooms.resize(workers);
    for (OfWorker& room : rooms) {
      room.narrow.prepare(stretch_blocks, weights.dim);
      room.hidden.prepare(1, (std::max)(weights.inner, weights.dim));
    }
  }

  /// Transposed: from gradients of results to those of inputs.
  PackedWeight<Scalar> proj_out;
  PackedWeight<Scalar> proj_in;
  PanelArray<Scalar> normed_panels;
  PanelArray<Scalar> hidden_panels;
  BlockArray<Scalar> grad_out;
  BlockArray<Scalar> grad_in;  ///< of values, then of gates
  StretchSums<Scalar> norm_sums;
  struct OfWorker {
    BlockArray<Scalar> narrow;
    BlockArray<Scalar> hidden;
  };
  std::vector<OfWorker> rooms;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
