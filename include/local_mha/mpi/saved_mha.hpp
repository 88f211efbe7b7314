// SPDX-License-Identifier: MIT
/// \file
/// What mpi::LocalMHA::forward_saving() keeps for backward().
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/mpi/parts.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi {

/// What a rank's forward pass keeps for the backward pass: that of its rows, and what it has
/// borrowed.
template <typename Scalar>
struct SavedMHA {
  /// Of its own rows.
  SavedLayer<Scalar> layer = {};
  /// What its queries have seen.
  std::shared_ptr<const detail::SeenRows> seen = {};
  BlockBuffer<Scalar> borrowed = {};  ///< keys and values, as they came
  std::vector<Index> lengths = {};    ///< of the whole
  std::uint64_t split = 0;            ///< a checksum of the stretches
  std::uint64_t call = 0;             ///< by which all ranks know that theirs is of the same one
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi
