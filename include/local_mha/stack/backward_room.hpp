// SPDX-License-Identifier: MIT
/// \file
/// Buffers for the backward pass of LayerStack.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/feed_forward.hpp>
#include <local_mha/ops/weight_gradient.hpp>
#include <local_mha/stack/stack_layers.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// What lies between the branches, of all rows. It stays for the next call.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
struct StackBackwardRoom {
  /// Becomes that of a call.
  /// \param threads of the device
  void prepare(const StackLayers<Scalar, Storage, Arithmetic>& stack, Index rows, Index threads) {
    const Index blocks = ceil_div(rows, block_rows<Scalar>);
    const Index stretches = ceil_div(blocks, stretch_blocks);
    resize_without_values(of_input, rows * stack.dim());
    const bool several = stack.streams() > 1;
    resize_without_values(of_result, several ? rows * stack.dim() : 0);
    streams.prepare(several ? blocks : 0, stack.streams() * stack.dim());
    if (!several) return;
    sums.prepare(stretches, stack.layers().front().attention_connection->sums());
    const auto workers = static_cast<std::size_t>((std::min)(threads, stretches));
    if (rooms.size() < workers) rooms.resize(workers);
    for (OfWorker& room : rooms) {
      room.one.prepare(1, stack.dim());
      room.connection.prepare(1, stack.room());
    }
  }

  BlockBuffer<Scalar> of_input;   ///< gradient of a branch's input, rows
  BlockBuffer<Scalar> of_result;  ///< and of its result; none of a single stream
  BlockArray<Scalar> streams;     ///< gradient of several streams
  StretchSums<Scalar> sums;       ///< of the weights of a connection
  typename FeedForward<Scalar, Storage, Arithmetic>::Workspace feed_forward;
  struct OfWorker {
    BlockArray<Scalar> one;
    BlockArray<Scalar> connection;
  };
  std::vector<OfWorker> rooms;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
