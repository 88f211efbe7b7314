// SPDX-License-Identifier: MIT
/// \file
/// Where the attention's forward pass finds a head, and puts its results.
#pragma once

#include <algorithm>

#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// One head of one sequence, `[seqlen, channels]` each: where row 0 is, or would be where only a
/// part of the sequence is here, of keys and values in whole blocks.
template <typename Scalar>
struct ForwardRows {
  const Scalar* q;
  const Scalar* k;
  const Scalar* v;
  Scalar* out;
  /// `[seqlen]` each, or null: not wanted.
  Scalar* lse = nullptr;
  Scalar* lse_rest = nullptr;
  /// First keys, in whole blocks, if they do not lie with the others.
  const Scalar* first_k = nullptr;
  const Scalar* first_v = nullptr;

  /// Results of some queries of the block whose first row is `first`: nothing.
  void clear(Index first, LaneRange lanes, Index channels) const {
    std::fill_n(out + (first + lanes.begin) * channels, (lanes.end - lanes.begin) * channels,
                Scalar(0));
  }
  /// \param from `[2][block_rows]`, as AttentionKernel leaves them
  void store_lse(Index first, LaneRange lanes, const Scalar* from) const {
    if (lse == nullptr) return;
    constexpr Index count = block_rows<Scalar>;
    std::copy(from + lanes.begin, from + lanes.end, lse + first + lanes.begin);
    std::copy(from + count + lanes.begin, from + count + lanes.end, lse_rest + first + lanes.begin);
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
