// SPDX-License-Identifier: MIT
/// \file
/// What dropout keeps, by the published layout of counters.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "reference/array.hpp"

namespace reference {

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
inline std::array<std::uint32_t, 4> philox(std::uint64_t key, std::array<std::uint32_t, 4> c) {
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * c[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(b),
         static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(a)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

/// Whether the pair of query row `i` and key row `j` is kept: 16 bits of it are less than
/// `65536 · keep`. Rows are those of their sequence.
/// \param stream the head, counted over all sequences of the batch
inline bool keeps(double dropout, std::uint64_t seed, Int stream, Int i, Int j) {
  const auto query = static_cast<std::uint64_t>(i), octet = static_cast<std::uint64_t>(j / 8);
  const auto words =
      philox(seed, {static_cast<std::uint32_t>(query), static_cast<std::uint32_t>(octet),
                    static_cast<std::uint32_t>((query >> 32) << 16 | (octet >> 32 & 0xFFFF)),
                    static_cast<std::uint32_t>(stream)});
  const std::uint32_t word = words[static_cast<std::size_t>(j % 8 / 2)];
  const std::uint32_t bits = j % 2 == 0 ? word & 0xFFFF : word >> 16;
  return static_cast<long>(bits) < std::lround((1 - dropout) * 65536);
}

/// Factors of the probabilities, as AttentionInputs take them. A segment of packed sequences is
/// what the sequence of its number in a batch is.
/// \param cu_seqlens where segments begin and the last ends; empty: none
template <typename Real>
std::function<Real(Int, Int, Int, Int)> dropout_factors(double dropout, std::uint64_t seed,
                                                        Int heads,
                                                        std::vector<Int> cu_seqlens = {}) {
  return [=](Int sequence, Int h, Int i, Int j) {
    if (!cu_seqlens.empty()) {
      const auto next = std::upper_bound(cu_seqlens.begin(), cu_seqlens.end(), i);
      sequence = next - cu_seqlens.begin() - 1;
      i -= *(next - 1);
      j -= *(next - 1);
    }
    return keeps(dropout, seed, sequence * heads + h, i, j)
               ? static_cast<Real>(65536.0L /
                                   static_cast<long double>(std::lround((1 - dropout) * 65536)))
               : Real(0);
  };
}

}  // namespace reference
