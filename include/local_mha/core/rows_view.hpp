// SPDX-License-Identifier: MIT
/// \file
/// Rows of one sequence wherever they lie, and how they become blocks.
#pragma once

#include <algorithm>

#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Adjoining rows of a sequence.
template <typename T>
struct RowsView {
  T* data = nullptr;  ///< channel 0 of the first
  /// Values from a row to the next.
  Index row_stride = 0;
  /// Values from a channel to the next.
  Index channel_stride = 1;

  /// The rows from row `i` on.
  RowsView from(Index i) const { return {data + i * row_stride, row_stride, channel_stride}; }
  /// The value at a row and channel.
  T& operator()(Index row, Index channel) const {
    return data[row * row_stride + channel * channel_stride];
  }
};

namespace detail {

/// Copies `n` rows of `channels` channels.
template <typename Scalar>
void copy_rows(const RowsView<const Scalar>& from, Index n, Index channels,
               const RowsView<Scalar>& to) {
  for (Index i = 0; i < n; ++i)
    for (Index c = 0; c < channels; ++c) to(i, c) = from(i, c);
}

/// Makes `n` rows of `channels` channels 0.
template <typename Scalar>
void clear_rows(const RowsView<Scalar>& rows, Index n, Index channels) {
  for (Index i = 0; i < n; ++i)
    for (Index c = 0; c < channels; ++c) rows(i, c) = Scalar(0);
}

/// Rows whose channels do not adjoin, as load_block() has them.
template <typename Scalar>
LOCAL_MHA_NOINLINE void gather_lanes(Index channels, LaneRange lanes,
                                     const RowsView<const Scalar>& rows, Index first,
                                     Scalar* block) {
  constexpr Index count = block_rows<Scalar>;
  std::fill_n(block, channels * count, Scalar(0));
  const Index begin = lanes.begin, end = lanes.end;
  const Scalar* from = rows.data + (first + begin) * rows.row_stride;
  for (Index c = 0; c < channels; ++c, from += rows.channel_stride, block += count) {
    if (rows.row_stride == 1)
      std::copy(from, from + (end - begin), block + begin);
    else
      for (Index r = begin; r < end; ++r) block[r] = from[(r - begin) * rows.row_stride];
  }
}
template <typename Scalar>
LOCAL_MHA_NOINLINE void scatter_lanes(Index channels, LaneRange lanes, const Scalar* block,
                                      const RowsView<Scalar>& rows, Index first) {
  constexpr Index count = block_rows<Scalar>;
  const Index begin = lanes.begin, end = lanes.end;
  Scalar* to = rows.data + (first + begin) * rows.row_stride;
  for (Index c = 0; c < channels; ++c, to += rows.channel_stride, block += count) {
    if (rows.row_stride == 1)
      std::copy(block + begin, block + end, to);
    else
      for (Index r = begin; r < end; ++r) to[(r - begin) * rows.row_stride] = block[r];
  }
}

}  // namespace detail

/// load_lanes() of rows wherever they lie.
/// \param first the row that lane 0 would be
template <typename Scalar>
void load_lanes(Index channels, LaneRange lanes, const RowsView<const Scalar>& rows, Index first,
                Scalar* block) {
  if (rows.channel_stride == 1)
    load_lanes(channels, lanes, StridedRows{rows.data, rows.row_stride, first}, block);
  else
    detail::gather_lanes(channels, lanes, rows, first, block);
}

/// store_lanes() to rows wherever they lie.
template <typename Scalar>
void store_lanes(Index channels, LaneRange lanes, const Scalar* block, const RowsView<Scalar>& rows,
                 Index first) {
  if (rows.channel_stride == 1)
    store_lanes(channels, lanes, block, StridedRows{rows.data, rows.row_stride, first});
  else
    detail::scatter_lanes(channels, lanes, block, rows, first);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
