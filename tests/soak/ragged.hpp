// SPDX-License-Identifier: MIT
/// \file
/// Sequences of different lengths in one batch, each of which gives what it gives alone.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "reference/array.hpp"
#include "soak/draw.hpp"

namespace soak {

/// Empty: whole sequences.
inline std::vector<Index> draw_lengths(Random& random, Index batch, Index n) {
  std::vector<Index> lengths;
  if (random.chance(0.6)) return lengths;
  for (Index b = 0; b < batch; ++b) lengths.push_back(random.integer(0, n));
  return lengths;
}
inline Index length_of(const std::vector<Index>& lengths, Index b, Index n) {
  return lengths.empty() ? n : lengths[static_cast<std::size_t>(b)];
}
inline std::string describe_lengths(const std::vector<Index>& lengths) {
  std::string text = lengths.empty() ? "" : " lengths";
  for (const Index length : lengths) text += " " + std::to_string(length);
  return text;
}

/// The first `length` rows of sequence `b`, `[1, length, …]`.
/// \param all `[B, N, …]`
template <typename T>
Array<T> sequence_of(const Array<T>& all, Index b, Index length) {
  std::vector<Int> shape = all.shape;
  const auto row = static_cast<std::size_t>(shape.size() > 2 ? shape[2] : 1);
  const auto first = static_cast<std::size_t>(b * shape[1]) * row;
  shape[0] = 1;
  shape[1] = length;
  Array<T> to(shape);
  std::copy_n(all.data.begin() + static_cast<std::ptrdiff_t>(first), to.data.size(),
              to.data.begin());
  return to;
}
inline std::vector<unsigned char> sequence_of(const std::vector<unsigned char>& masked, Index b,
                                              Index length, Index n) {
  if (masked.empty()) return {};
  return {masked.begin() + b * n, masked.begin() + b * n + length};
}
/// Puts it back; `[B, N, …]` has the others' numbers.
template <typename T>
void put_sequence(const Array<T>& sequence, Index b, Array<T>& all) {
  const auto row = static_cast<std::size_t>(all.shape.size() > 2 ? all.shape[2] : 1);
  std::copy(sequence.data.begin(), sequence.data.end(),
            all.data.begin() +
                static_cast<std::ptrdiff_t>(static_cast<std::size_t>(b * all.shape[1]) * row));
}

}  // namespace soak
