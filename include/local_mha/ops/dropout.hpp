// SPDX-License-Identifier: MIT
/// \file
/// Dropout from counters: what is kept depends on the seed and the place alone, not on the order in
/// which places are visited.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include <local_mha/core/block.hpp>
#include <local_mha/core/random.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha {

/// Training mode: dropout acts, and this is its seed.
struct Training {
  std::uint64_t seed = 0;
};

/// Keeps a value with probability `keep`, the positive multiple of 2^-16 next to `1 − dropout`, and
/// scales what is kept by `1 / keep`, so that the mean stays.
template <typename Scalar>
class Dropout {
 public:
  /// Values of one position that one counter serves.
  static constexpr Index together = 8;

  /// \param dropout probability in `[0, 1)`
  /// \param stream tells apart what shares a seed: the head of a batch item, the layer
  Dropout(double dropout, std::uint64_t seed, std::uint32_t stream)
      : philox_(seed),
        stream_(stream),
        threshold_(static_cast<std::uint32_t>(std::max(1L, std::lround((1 - dropout) * 65536)))),
        scale_(Scalar(65536.0 / threshold_)) {}

  /// Factors, 0 or `1 / keep`, of values `[8·octet, 8·octet + 8)` of `block_rows` positions.
  /// \param first the first position: a query's for the attention
  /// \param octet the values' place: an octet of keys for the attention
  void factors(Index first, Index octet, Lanes<Scalar> (&to)[together]) const {
    alignas(64) Scalar kept[together][block_rows<Scalar>];
    for (Index r = 0; r < block_rows<Scalar>; ++r) {
      const auto position = static_cast<std::uint64_t>(first + r);
      const auto place = static_cast<std::uint64_t>(octet);
      // 48 bits of the position and 48 of the place, 32 of the stream.
      const Philox::Counter words = philox_(
          {static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(place),
           static_cast<std::uint32_t>((position >> 32) << 16 | (place >> 32 & 0xFFFF)), stream_});
      for (std::size_t i = 0; i < together; ++i) {
        const std::uint32_t bits = words[i / 2] >> (16 * (i % 2)) & 0xFFFF;
        kept[i][r] = bits < threshold_ ? scale_ : Scalar(0);
      }
    }
    for (Index i = 0; i < together; ++i) to[i] = Lanes<Scalar>::load(kept[i]);
  }

 private:
  Philox philox_;
  std::uint32_t stream_;
  std::uint32_t threshold_;
  Scalar scale_;
};

}  // namespace local_mha
