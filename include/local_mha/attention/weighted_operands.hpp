// SPDX-License-Identifier: MIT
/// \file
/// The attention's second product where probabilities and values are operands in Eigen::bfloat16:
/// add_weighted_values() of such.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include <local_mha/attention/operand_ring.hpp>
#include <local_mha/attention/strips.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/ops/multiply.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// The probability of a key for each query, as it is multiplied.
template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> probability(const Pair* pairs, Index key) {
  using L = Lanes<Scalar>;
  L both[2];
  load_pairs(reinterpret_cast<const Eigen::bfloat16*>(pairs + key / 2 * L::count), both[0],
             both[1]);
  return both[key % 2];
}

/// False of a NaN or an infinity.
inline bool is_finite(const Eigen::bfloat16& x) {
  return (std::bit_cast<std::uint16_t>(x) & 0x7f80U) != 0x7f80U;
}

/// What is multiplied of values some of which are not finite, of which 0 times is not 0: zeros for
/// these, so that all others are added up as ever.
/// \param size pairs
/// \return to
inline const Pair* finite_values(Index size, const Pair* from, Pair* to) {
  for (Index i = 0; i < size; ++i)
    for (int k = 0; k < 2; ++k)
      to[i].of[k] = is_finite(from[i].of[k]) ? from[i].of[k] : Eigen::bfloat16(0);
  return to;
}

/// Adds those that are not finite to the queries that see them.
template <typename Scalar, typename Keys>
LOCAL_MHA_NOINLINE void add_seen_values(const Chunk<Scalar, ValueOperands<Scalar>, Keys>& chunk,
                                        Index channels, Scalar* out) {
  using L = Lanes<Scalar>;
  constexpr Index count = block_rows<Scalar>;
  for (const auto& piece : chunk) {
    LaneRange cursor{0, 0};
    for (Index key = piece.keys.begin; key < piece.keys.end; ++key) {
      const Index block = key / count;
      const LaneRange lanes = piece.tile().that_see(key, cursor);
      if (lanes.begin >= lanes.end || piece.values->finite(block)) continue;
      const L p = probability<Scalar>(piece.pairs_of_block(block), key % count);
      for (Index c = 0; c < channels; ++c) {
        const Eigen::bfloat16& value = piece.values->value(block, c, key % count);
        if (is_finite(value)) continue;
        const L sum = L::load(out + c * count);
        select_lanes(lanes.begin, lanes.end, fma(from_stored<Scalar>(value), p, sum), sum)
            .store(out + c * count);
      }
    }
  }
}

/// add_weighted_values() of some channels.
/// \tparam Finite all values are
template <int Channels, bool Finite, typename Scalar, typename Keys>
LOCAL_MHA_NOINLINE void add_weighted_channels(
    const Chunk<Scalar, ValueOperands<Scalar>, Keys>& chunk, Index c, const Lanes<Scalar>* rescale,
    const Lanes<Scalar>& factor, Upcoming<Scalar>& upcoming, Scalar* out) {
  using L = Lanes<Scalar>;
  constexpr Index count = block_rows<Scalar>;
  out += c * count;
  L acc[Channels][1];
  LOCAL_MHA_UNROLL for (int r = 0; r < Channels; ++r) acc[r][0] =
      rescale == nullptr ? L::zero() : *rescale * L::load(out + r * count);
  for (const auto& piece : chunk) {
    const Range blocks = piece.blocks();
    auto cursor = piece.values->cursor(blocks.begin);
    for (Index block = blocks.begin; block < blocks.end; ++block, cursor.advance()) {
      upcoming.fetch();
      const Pair* const x[1] = {piece.pairs_of_block(block)};
      const Pair* const v = cursor.block() + c * count;
      if constexpr (Finite) {
        multiply(count / 2, v, count, 1, x, acc);
      } else {
        Pair aside[Channels * count];
        multiply(count / 2, finite_values(Channels * count - count / 2, v, aside), count, 1, x,
                 acc);
      }
    }
  }
  LOCAL_MHA_UNROLL for (int r = 0; r < Channels; ++r)(acc[r][0] * factor).store(out + r * count);
}

#if defined(LOCAL_MHA_AMX)
/// Of probabilities that there are: nothing is left to make.
inline constexpr auto already_made = [](const auto& /*piece*/, Index /*block*/) {};

/// `out[c][lane] += Σ_key v[key][c]·p[key][lane]` of `Tiles` times 16 channels, by the matrix unit.
/// \param make `make(piece, block)` makes a block's probabilities, which are multiplied while the
///        next ones' are made
template <int Tiles, bool Finite, typename Keys, typename Make>
LOCAL_MHA_NOINLINE void add_weighted_tiles(const Chunk<float, ValueOperands<float>, Keys>& chunk,
                                           Index c, bool begins, float* const (&out)[Tiles],
                                           const Make& make) {
  using Sums = TileSums<Tiles>;
  constexpr Index stride = ValueOperands<float>::channel_stride();
  constexpr Index size = Tiles * tile_rows * stride;
  if (begins)
    Sums::zero();
  else
    Sums::load(out);
  for (const auto& piece : chunk) {
    const Range blocks = piece.blocks();
    auto cursor = piece.values->cursor(blocks.begin);
    for (Index block = blocks.begin; block < blocks.end; ++block, cursor.advance()) {
      make(piece, block);
      alignas(64) Pair aside[Finite ? 1 : size];
      const Pair* v = cursor.block() + c * stride;
      if constexpr (!Finite) v = finite_values(size - stride / 2, v, aside);
      const Pair* tiles[Tiles];
      for (int i = 0; i < Tiles; ++i) tiles[i] = v + i * tile_rows * stride;
      Sums::add(tiles, stride, piece.pairs_of_block(block));
    }
  }
  Sums::store(out);
}

/// add_weighted_values() by the matrix unit.
/// \param make as of add_weighted_tiles()
/// \param factor `factor()`, when all probabilities are made
template <bool Finite, typename Keys, typename Make, typename Factor>
void add_weighted_values_by_matrix_unit(const Chunk<float, ValueOperands<float>, Keys>& chunk,
                                        Index channels, const Lanes<float>* rescale,
                                        const Make& make, const Factor& factor, float* out) {
  using L = Lanes<float>;
  constexpr Index count = block_rows<float>;
  constexpr Index size = tile_rows * count;
  const auto multiply_all = [&](const L& by) {
    for (Index c = 0; c < channels; ++c) (by * L::load(out + c * count)).store(out + c * count);
  };
  const bool begins = rescale == nullptr;
  if (!begins) multiply_all(*rescale);
  const auto add = [&](Index c, const auto& make_first) {
    if (c + 2 * tile_rows <= channels) {
      add_weighted_tiles<2, Finite>(chunk, c, begins, {out + c * count, out + c * count + size},
                                    make_first);
      return c + 2 * tile_rows;
    }
    // The result may have no room for all rows of a tile.
    alignas(64) float aside[size] = {};
    const Index rows = (std::min)(channels - c, tile_rows);
    if (!begins) std::copy_n(out + c * count, rows * count, aside);
    add_weighted_tiles<1, Finite>(chunk, c, begins, {aside}, make_first);
    std::copy_n(aside, rows * count, out + c * count);
    return c + tile_rows;
  };
  for (Index c = add(0, make); c < channels;) c = add(c, already_made);
  multiply_all(factor());
}
#endif

/// Calls `add.template operator()<Finite>()`: whether all values are, of which what is not finite
/// is added apart.
template <typename Scalar, typename Keys, typename Add>
void add_values_seen(const Chunk<Scalar, ValueOperands<Scalar>, Keys>& chunk, Index channels,
                     Scalar* out, const Add& add) {
  bool finite = true;
  for (const auto& piece : chunk)
    for (Index block = piece.blocks().begin; block < piece.blocks().end; ++block)
      finite = finite && piece.values->finite(block);
  if (finite) return add.template operator()<true>();
  add.template operator()<false>();
  add_seen_values(chunk, channels, out);
}

/// add_weighted_values() of operands: `piece.pairs` are the probabilities.
template <typename Scalar, typename Keys>
void add_weighted_values(const Chunk<Scalar, ValueOperands<Scalar>, Keys>& chunk, Index channels,
                         const Lanes<Scalar>* rescale, const Lanes<Scalar>& factor,
                         Upcoming<Scalar>& upcoming, Scalar* out) {
  constexpr int least = Tiling<Scalar>::rows;
  constexpr int most = (std::max)(Tiling<Scalar>::values, least);
  add_values_seen(chunk, channels, out, [&]<bool Finite>() {
#if defined(LOCAL_MHA_AMX)
    if (has_matrix_unit())
      return add_weighted_values_by_matrix_unit<Finite>(
          chunk, channels, rescale, already_made, [&] { return factor; }, out);
#endif
    const Index padded = padded_channels<Scalar>(channels);
    for (Index c = 0; c < padded;) {
      if (Tiling<Scalar>::template is_next<most>(padded - c)) {
        add_weighted_channels<most, Finite>(chunk, c, rescale, factor, upcoming, out);
        c += most;
      } else {
        add_weighted_channels<least, Finite>(chunk, c, rescale, factor, upcoming, out);
        c += least;
      }
    }
  });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail

LOCAL_MHA_INT_BOUNDS_END
