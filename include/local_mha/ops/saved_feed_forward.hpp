// SPDX-License-Identifier: MIT
/// \file
/// What a feed-forward keeps between its passes.
#pragma once

#include <optional>
#include <vector>

#include <local_mha/attention/call.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/weight_gradient.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What FeedForward::forward_saving() keeps for backward(): the result of the first projection. It
/// knows its layer and its call again.
template <typename Scalar>
struct SavedFeedForward {
  /// Rows of the call.
  Index rows = 0;
  /// Hidden width.
  Index inner = 0;
  BlockArray<Scalar> values;  ///< `[block][inner][block_rows]`
  BlockArray<Scalar> gates;   ///< the same, before gelu
  /// The layer's.
  double dropout = 0;
  /// The call's.
  std::optional<Training> training = {};
  /// Of rows of a larger whole, see PlacedDropout.
  std::vector<detail::RowPlace> places = {};
  /// Samples by which x and the weights are known again.
  detail::Sample<Scalar> input = {};
  /// The same of the weights.
  detail::Sample<Scalar> weights = {};
  /// The layer rounds what it multiplies.
  bool of_operands = false;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
