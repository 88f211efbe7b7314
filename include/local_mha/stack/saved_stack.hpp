// SPDX-License-Identifier: MIT
/// \file
/// What a forward pass of LayerStack keeps for the backward pass.
#pragma once

#include <array>
#include <vector>

#include <local_mha/attention/call.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/mha.hpp>
#include <local_mha/ops/feed_forward.hpp>
#include <local_mha/ops/weight_gradient.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// What the backward pass needs of a branch, such as an attention.
template <typename Scalar>
struct SavedBranch {
  BlockBuffer<Scalar> input;   // [B·N][dim]
  BlockArray<Scalar> streams;  // [block][S·dim], before it; none of a single stream
  BlockArray<Scalar> result;   // [block][dim]; the same
};

/// What LayerStack::forward() keeps for backward().
template <typename Scalar>
struct SavedStack {
  struct Layer {
    SavedBranch<Scalar> attention_branch;
    typename LocalMHA<Scalar>::Saved attention;
    SavedBranch<Scalar> feed_forward_branch;
    typename FeedForward<Scalar>::Saved feed_forward;
  };

  std::array<Index, 3> shape{};  // of the call; [0, 0, 0]: none is complete
  std::vector<Layer> layers;
  Sample<Scalar> connections = {};  // of their weights, by which these are known again
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
