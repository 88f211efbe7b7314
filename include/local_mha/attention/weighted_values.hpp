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
  for (const auto& piece : chunk) {
    const Values& values = *piece.values;
    const Index last = piece.keys.end;
    auto cursor = values.cursor(piece.keys.begin / count);
    for (Index begin = piece.keys.begin; begin < last; cursor.advance()) {
      const Index end = (std::min)((begin / count + 1) * count, last);
      const Scalar* block = cursor.block() + c * values.channel_stride();
      const Scalar* const p[1] = {piece.score(begin)};
      upcoming.fetch();
      if (end - begin == count)
        multiply(count, block, values.channel_stride(), values.position_stride(), p, acc);
      else
        multiply(end - begin, block + begin % count * values.position_stride(),
                 values.channel_stride(), values.position_stride(), p, acc);
      begin = end;
    }
  }
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
