// SPDX-License-Identifier: MIT
/// \file
/// Sequences that go through a stream in chunks, and come out whole.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include <local_mha/core/mask.hpp>
#include <local_mha/core/random.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::examples {

/// How sequences are cut.
struct ChunkConfig {
  Index size = 1;          ///< positions in a chunk; 0: random, 0 to 1023
  std::uint64_t seed = 0;  ///< of random sizes
};

/// `size` positions of `t` from `begin` on, along `axis`.
template <typename T, int Rank>
Tensor<T, Rank> positions_of(const Tensor<T, Rank>& t, int axis, Index begin, Index size) {
  std::array<Index, Rank> offset{};
  std::array<Index, Rank> extent = TensorView<const T, Rank>(t).dimensions();
  offset[static_cast<std::size_t>(axis)] = begin;
  extent[static_cast<std::size_t>(axis)] = size;
  return t.slice(offset, extent);
}

/// The same of a mask.
inline PaddingMask positions_of(const PaddingMask& mask, Index begin, Index size) {
  if (!mask) return {};
  const Index batch = mask.shape()[0];
  Tensor<bool, 2> masked(batch, size);
  for (Index b = 0; b < batch; ++b)
    for (Index i = 0; i < size; ++i) masked(b, i) = mask.row(b)[begin + i] != 0;
  return PaddingMask::masked(masked);
}

/// Calls `push(begin, size)` for one chunk after the other, then `flush()`, and joins the results.
/// \param shape of the whole result, whose `axis` is that of the positions
template <typename Scalar, int Rank, typename Push, typename Flush>
Tensor<Scalar, Rank> in_chunks(const std::array<Index, Rank>& shape, int axis,
                               const ChunkConfig& config, Push&& push, Flush&& flush) {
  const auto positions = static_cast<std::size_t>(axis);
  RandomSequence random(config.seed);
  Tensor<Scalar, Rank> whole(shape);
  std::array<Index, Rank> offset{};
  const auto add = [&](const Tensor<Scalar, Rank>& part) {
    const auto extent = TensorView<const Scalar, Rank>(part).dimensions();
    if (extent[positions] > 0) whole.slice(offset, extent) = part;
    offset[positions] += extent[positions];
  };
  for (Index begin = 0; begin < shape[positions];) {
    const Index wanted =
        config.size > 0 ? config.size : static_cast<Index>(std::exp2(10 * random.uniform())) - 1;
    const Index size = std::min(wanted, shape[positions] - begin);
    add(push(begin, size));
    begin += size;
  }
  add(flush());
  return whole;
}

}  // namespace local_mha::examples
