// SPDX-License-Identifier: MIT
/// \file
/// Dropout from counters: what is kept depends on the seed and the place alone, not on the order in
/// which places are visited.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <span>

#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/random.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/words.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Training mode: dropout acts, and this is its seed. Layers that are given the same one drop the
/// same places.
struct Training {
  /// The same seed drops the same places.
  std::uint64_t seed = 0;

  friend bool operator==(const Training&, const Training&) = default;

  /// That of a part of a model, such as a layer, which drops something else than all other parts:
  ///
  ///     for (std::size_t i = 0; i < layers.size(); ++i)
  ///       x = layers[i].forward(x, mask, {}, training.of_part(i));
  Training of_part(std::uint64_t part) const {
    const auto words = Philox(seed)(
        {static_cast<std::uint32_t>(part), static_cast<std::uint32_t>(part >> 32), 0, 1});
    return {std::uint64_t{words[1]} << 32 | words[0]};
  }
};

/// Keeps a value with probability `keep`, the positive multiple of 2^-16 next to `1 − dropout`, and
/// scales what is kept by `1 / keep`, so that the mean stays.
///
/// The value at `place` (a key, a channel) of `position` (a query, a row) is kept if 16 bits of
/// Philox(seed) are less than `65536 · keep`: of the four words for the counter
///
///     position mod 2^32, place / 8 mod 2^32, 16 more bits of each, stream
///
/// the word `place mod 8 / 2`, whose lower half is that of even places.
template <typename Scalar>
class Dropout {
 public:
  /// Values of one position that one counter serves.
  static constexpr Index together = 8;

  /// Drops with the probability `dropout`, by a seed.
  /// \param dropout probability in `[0, 1)`
  /// \param stream tells apart what shares a seed, such as the head of a batch item
  /// \throws std::invalid_argument if dropout is no such probability
  Dropout(double dropout, std::uint64_t seed, std::uint32_t stream)
      : philox_(seed),
        stream_(stream),
        threshold_(kept_of_65536(dropout)),
        scale_(Scalar(65536.0 / threshold_)) {}

  /// Factors, 0 or `1 / keep`, of values `[8·octet, 8·octet + 8)` of `block_rows` positions.
  /// \param first the first position: a query's for the attention
  /// \param octet the values' place: an octet of keys for the attention
  LOCAL_MHA_INLINE void factors(Index first, Index octet, Lanes<Scalar> (&to)[together]) const {
    using W = Words<Scalar>;
    alignas(64) Scalar kept[together][block_rows<Scalar>];
    const auto position = static_cast<std::uint64_t>(first);
    const auto place = static_cast<std::uint64_t>(octet);
    // 48 bits of the position and 48 of the place, 32 of the stream.
    const auto high = static_cast<std::uint32_t>((position >> 32) << 16 | (place >> 32 & 0xFFFF));
    LOCAL_MHA_UNROLL for (int r = 0; r < block_rows<Scalar>; r += W::count) {
      typename W::Word words[4];
      philox_.template apply<W>(W::from(static_cast<std::uint32_t>(first + r)),
                                {static_cast<std::uint32_t>(place), high, stream_}, words);
      LOCAL_MHA_UNROLL for (int i = 0; i < together; ++i) {
        const typename W::Word word = words[i / 2];
        W::choose_less(i % 2 == 0 ? word & 0xFFFFU : word >> 16, threshold_, scale_, kept[i] + r);
      }
    }
    LOCAL_MHA_UNROLL for (int i = 0; i < together; ++i) to[i] = Lanes<Scalar>::load(kept[i]);
  }

 private:
  static std::uint32_t kept_of_65536(double dropout) {
    detail::require_probability("dropout", dropout);
    return static_cast<std::uint32_t>((std::max)(1L, std::lround((1 - dropout) * 65536)));
  }

  Philox philox_;
  std::uint32_t stream_;
  std::uint32_t threshold_;
  Scalar scale_;
};

namespace detail {

/// Rows of a call, from `row` up to that of the next, are rows of a larger whole from `place` on.
struct RowPlace {
  Index row;
  Index place;
};

/// Dropout of rows by their places in the whole.
template <typename Scalar>
class PlacedDropout {
 public:
  static constexpr Index together = Dropout<Scalar>::together;

  /// \param places from row 0 on, in order; empty: each row's own number. Must outlive this
  PlacedDropout(const Dropout<Scalar>& dropout, std::span<const RowPlace> places)
      : dropout_(dropout), places_(places) {}

  /// Dropout::factors() of `block_rows` rows.
  /// \param first a multiple of `block_rows`
  LOCAL_MHA_INLINE void factors(Index first, Index octet, Lanes<Scalar> (&to)[together]) const {
    if (places_.empty()) return dropout_.factors(first, octet, to);
    gather(first, octet, to);
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  void gather(Index first, Index octet, Lanes<Scalar> (&to)[together]) const {
    alignas(64) Scalar gathered[together][count];
    auto piece = std::upper_bound(places_.begin(), places_.end(), first,
                                  [](Index row, const RowPlace& p) { return row < p.row; }) -
                 1;
    for (Index lane = 0, next = 0; lane < count; lane = next) {
      while (piece + 1 != places_.end() && (piece + 1)->row <= first + lane) ++piece;
      const Index place = piece->place + first + lane - piece->row;
      // A call counts the lower 32 bits alone.
      constexpr Index turn = Index{1} << 32;
      next = (std::min)(count, lane + turn - place % turn);
      if (piece + 1 != places_.end()) next = (std::min)(next, (piece + 1)->row - first);
      dropout_.factors(place, octet, to);
      alignas(64) Scalar made[count];
      for (Index i = 0; i < together; ++i) {
        to[i].store(made);
        std::copy(made, made + (next - lane), gathered[i] + lane);
      }
    }
    for (Index i = 0; i < together; ++i) to[i] = Lanes<Scalar>::load(gathered[i]);
  }

  Dropout<Scalar> dropout_;
  std::span<const RowPlace> places_;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
