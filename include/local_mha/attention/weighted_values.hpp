// SPDX-License-Identifier: MIT
/// \file
/// The attention's second product: values, weighted by the probabilities of their keys.
#pragma once

#include <algorithm>

#include <local_mha/attention/strips.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/ops/project.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// `acc[r] += Σ_key weights(key)·rows(key)[c + r]`, of all or of that half of a tile's lanes that
/// sees a key.
/// \param rows a Ring, or Rows, finite
/// \param weights `weights(key)` points to those of a key, `[block_rows]`, and of the rest of its
///        block behind them; 0 where a query does not see the key
/// \param upcoming is fetched meanwhile
template <int Channels, typename Scalar, typename Store, typename Weights>
LOCAL_MHA_INLINE void add_weighted_rows(const QueryTile<Scalar>& tile, const Range& keys,
                                        const Store& rows, Index c, Weights&& weights,
                                        Upcoming<Scalar>& upcoming,
                                        Lanes<Scalar> (&acc)[Channels][1]) {
  constexpr Index count = block_rows<Scalar>;
  // Halves that are packets.
  constexpr bool halves = Tiling<Scalar>::half_keys > 0 && Lanes<Scalar>::packets == 2;
  auto cursor = rows.cursor(keys.begin / count);
  for (Index key = keys.begin; key < keys.end; cursor.advance()) {
    const Index end = (std::min)((key / count + 1) * count, keys.end);
    const Scalar* const block = cursor.block() + c * rows.channel_stride();
    upcoming.fetch();
    for (Index run_end = end; key < end; key = run_end) {
      const Scalar* const from = block + key % count * rows.position_stride();
      const Scalar* const x[1] = {weights(key)};
      if constexpr (halves) {
        run_end = tile.run_end({key, end});
        const int lane = tile.half_that_sees({key, run_end});
        if (lane >= 0) {
          if (lane == 0)
            multiply_half<0>(run_end - key, from, rows.channel_stride(), rows.position_stride(),
                             x[0], acc);
          else
            multiply_half<1>(run_end - key, from, rows.channel_stride(), rows.position_stride(),
                             x[0], acc);
          continue;
        }
      }
      if (run_end - key == count)
        multiply(count, from, rows.channel_stride(), rows.position_stride(), x, acc);
      else
        multiply(run_end - key, from, rows.channel_stride(), rows.position_stride(), x, acc);
    }
  }
}

/// add_weighted_values() of some channels.
template <int Channels, typename Scalar, typename Values>
LOCAL_MHA_NOINLINE void add_weighted_channels(const Chunk<Scalar, Values>& chunk, Index c,
                                              const Lanes<Scalar>* rescale,
                                              const Lanes<Scalar>& factor,
                                              Upcoming<Scalar>& upcoming, Scalar* out) {
  using L = Lanes<Scalar>;
  constexpr Index count = block_rows<Scalar>;
  out += c * count;
  L acc[Channels][1];
  LOCAL_MHA_UNROLL for (int r = 0; r < Channels; ++r) acc[r][0] =
      rescale == nullptr ? L::zero() : *rescale * L::load(out + r * count);
  for (const auto& piece : chunk)
    add_weighted_rows(
        piece.tile(), piece.keys, *piece.values, c, [&](Index key) { return piece.score(key); },
        upcoming, acc);
  LOCAL_MHA_UNROLL for (int r = 0; r < Channels; ++r)(acc[r][0] * factor).store(out + r * count);
}

/// The same of all where there is a NaN or an infinity, which 0 does not cancel: leaves out what is
/// not seen.
template <typename Scalar, typename Values>
void add_seen_values(const Chunk<Scalar, Values>& chunk, Index channels,
                     const Lanes<Scalar>* rescale, const Lanes<Scalar>& factor, Scalar* out) {
  using L = Lanes<Scalar>;
  constexpr Index count = block_rows<Scalar>;
  for (Index c = 0; c < channels; ++c, out += count) {
    L sum = rescale == nullptr ? L::zero() : *rescale * L::load(out);
    for (const auto& piece : chunk) {
      const Values& values = *piece.values;
      LaneRange lanes_cursor{0, 0};
      auto cursor = values.cursor(piece.keys.begin / count);
      for (Index key = piece.keys.begin; key < piece.keys.end; ++key) {
        if (key % count == 0 && key > piece.keys.begin) cursor.advance();
        const LaneRange lanes = piece.tile().that_see(key, lanes_cursor);
        if (lanes.begin >= lanes.end) continue;
        const Scalar& value =
            cursor.block()[c * values.channel_stride() + key % count * values.position_stride()];
        const L more = fma(value, L::load(piece.score(key)), sum);
        sum = select_lanes(lanes.begin, lanes.end, more, sum);
      }
    }
    (sum * factor).store(out);
  }
}

/// `out = (rescale·out + Σ_key p[key]·v[key])·factor`
/// \param chunk its scores have become the probabilities p
/// \param channels of the values
/// \param rescale null: there is no out yet
/// \param upcoming is fetched meanwhile
/// \param out `[padded channels][block_rows]`
template <typename Scalar, typename Values>
void add_weighted_values(const Chunk<Scalar, Values>& chunk, Index channels,
                         const Lanes<Scalar>* rescale, const Lanes<Scalar>& factor,
                         Upcoming<Scalar>& upcoming, Scalar* out) {
  constexpr Index count = block_rows<Scalar>;
  constexpr int least = Tiling<Scalar>::rows;
  constexpr int most = Tiling<Scalar>::values;
  for (const auto& piece : chunk)
    for (Index block = piece.keys.begin / count; block * count < piece.keys.end; ++block)
      if (!piece.values->finite(block))
        return add_seen_values(chunk, channels, rescale, factor, out);
  const Index padded = padded_channels<Scalar>(channels);
  for (Index c = 0; c < padded;) {
    if (Tiling<Scalar>::template is_next<most>(padded - c)) {
      add_weighted_channels<most>(chunk, c, rescale, factor, upcoming, out);
      c += most;
    } else {
      add_weighted_channels<least>(chunk, c, rescale, factor, upcoming, out);
      c += least;
    }
  }
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail

LOCAL_MHA_INT_BOUNDS_END
