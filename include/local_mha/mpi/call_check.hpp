// SPDX-License-Identifier: MIT
/// \file
/// What all ranks agree on before a call of a layer.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/split.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/parameter_set.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail {

/// \throws std::invalid_argument unless the split is of this communicator, and MPI may be called
inline void check_split(const Communicator& communicator, const Split& split,
                        const AnyDevice& device) {
  Communicator::require_running(device);
  if (&split.communicator() != &communicator)
    reject("split", "one of the same communicator", "that of another");
}

/// \throws std::invalid_argument unless a mask is of this rank's rows
inline void check_mask(const PaddingMask& mask, Index batch, const Split& split) {
  if (mask) require_shape<2>("mask", mask.shape(), {batch, split.rows()});
}

/// What a call of any kind is given but for tensors of numbers.
template <typename Call>
void agree_on_call(Agreement& agreement, const Split& split, Index batch, const Call& call) {
  agreement.same("batch", batch);
  agreement.same("split", split.checksum());
  agreement.same("mask", Index{call.mask ? 1 : 0});
  Checksum training;
  if (call.training) training.add(call.training->seed);
  agreement.same("training", training);
  Checksum lengths;
  lengths.add(call.lengths);
  agreement.same("lengths", lengths);
  Checksum cu_seqlens;
  cu_seqlens.add(call.cu_seqlens);
  agreement.same("cu_seqlens", cu_seqlens);
}

/// A tensor that may be there, and is the same on every rank.
template <typename Tensor>
void agree_on_tensor(Agreement& agreement, std::string_view name,
                     const std::optional<Tensor>& tensor) {
  Checksum sum;
  if (tensor) {
    for (const Index extent : tensor->dimensions()) sum.add(extent);
    sum.add_numbers(tensor->data(), static_cast<std::size_t>(tensor->size()));
  }
  agreement.same(name, sum);
}

/// Of all numbers of a set of parameters.
template <typename Parameters>
void add_parameters(const Parameters& parameters, Checksum& to) {
  for_each_parameter(parameters, [&](const std::string& name, const auto& tensor) {
    to.add(std::string_view(name));
    to.add_numbers(tensor.data(), static_cast<std::size_t>(tensor.size()));
  });
}

/// The rows that each sequence of a rank's batch has there, `[B]`; empty: all.
inline std::vector<Index> own_lengths(const Split& split, std::span<const Index> lengths) {
  std::vector<Index> own;
  for (const Index length : lengths)
    own.push_back(std::clamp(length - split.stretch().begin, Index{0}, split.rows()));
  return own;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail
