// SPDX-License-Identifier: MIT
/// \file
/// Buffers for the backward pass of FeedForward.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/feed_forward_weights.hpp>
#include <local_mha/ops/packed_weight.hpp>
#include <local_mha/ops/project_rows.hpp>
#include <local_mha/ops/weight_gradient.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// What lies between the steps, of all rows. It stays for the next call.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
struct FeedForwardBackwardRoom {
  using Weight = PackedWeight<Scalar, Storage, Arithmetic>;

  /// Becomes that of a call.
  /// \param threads of the device
  void prepare(const FeedForwardWeights<Scalar, Storage, Arithmetic>& weights, Index rows,
               Index threads) {
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
      if constexpr (OfWorker::of_operands) room.wide.prepare(stretch_blocks, 2 * weights.inner);
      for (const Weight* weight : {&proj_out, &proj_in})
        room.passing.fit_blocks(*weight, stretch_blocks);
    }
  }

  /// Transposed: from gradients of results to those of inputs.
  Weight proj_out;
  Weight proj_in;
  PanelArray<Scalar, Arithmetic> normed_panels;
  PanelArray<Scalar, Arithmetic> hidden_panels;
  BlockArray<Scalar, Arithmetic> grad_out;
  BlockArray<Scalar, Arithmetic> grad_in;  ///< of values, then of gates
  StretchSums<Scalar> norm_sums;
  struct OfWorker {
    static constexpr bool of_operands = PositionTiles<Scalar, Arithmetic>::of_operands;
    BlockArray<Scalar> narrow;
    BlockArray<Scalar> hidden;
    BlockArray<Scalar> wide;  ///< what becomes grad_in, before it is rounded; none of Scalars
    PassingRows<Scalar, Arithmetic> passing;
  };
  std::vector<OfWorker> rooms;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
