// SPDX-License-Identifier: MIT
/// \file
/// A head that lies in tensors, on the way back.
#pragma once

#include <algorithm>
#include <limits>

#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/ops/qk_norm.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// The queries of a head that lie in tensors, `[rows, channels]` each, all of a sequence or some.
template <typename Scalar>
struct RowsOfQueries {
  static constexpr Index count = block_rows<Scalar>;

  Range own;  ///< rows of the sequence that are here
  Index channels;
  // Where row 0 of the sequence is, or would be.
  const Scalar* q;
  const Scalar* grad_out;
  const Scalar* out;
  const Scalar* lse;
  const Scalar* lse_rest;
  Scalar* grad_q;

  void load_queries(Index block, Scalar* to) const { load(q, block, to); }
  void load_grad_out(Index block, Scalar* to) const { load(grad_out, block, to); }
  void load_out(Index block, Scalar* to) const { load(out, block, to); }
  void load_lse(Index block, Scalar* to) const {
    const LaneRange lanes = lanes_of(block);
    const auto load_part = [&](const Scalar* from, double others, Scalar* part) {
      std::fill_n(part, count, Scalar(others));
      std::copy(from + block * count + lanes.begin, from + block * count + lanes.end,
                part + lanes.begin);
    };
    load_part(lse, -std::numeric_limits<double>::infinity(), to);
    load_part(lse_rest, 0, to + count);
  }
  void store_grad_queries(Index block, Scalar* from) const {
    store_lanes(channels, lanes_of(block), from, StridedRows{grad_q, channels, block * count});
  }
  void add_upcoming_queries(Index block, Upcoming<Scalar>& to) const {
    const Range rows = Range{block * count, (block + 1) * count}.clipped_to(own);
    if (rows.begin >= rows.end) return;
    for (const Scalar* of : {q, grad_out, out, static_cast<const Scalar*>(grad_q)})
      to.add(of + rows.begin * channels, (rows.end - rows.begin) * channels);
  }

 private:
  LaneRange lanes_of(Index block) const {
    const Range lanes =
        Range{own.begin - block * count, own.end - block * count}.clipped_to({0, count});
    return {static_cast<int>(lanes.begin), static_cast<int>(lanes.end)};
  }
  void load(const Scalar* rows, Index block, Scalar* to) const {
    const LaneRange lanes = lanes_of(block);
    const StridedRows from{rows, channels, block * count};
    if (lanes.begin == 0) return load_block(channels, lanes.end, from, to);
    load_lanes(channels, lanes, from, to);
    clear_other_lanes(channels, lanes, to);
  }
};

/// A head all of which lies in tensors, `[seqlen, channels]` each, as AttentionBackwardFlow takes
/// it.
template <typename Scalar>
struct RowsHead : RowsOfQueries<Scalar> {
  using RowsOfQueries<Scalar>::channels;
  using RowsOfQueries<Scalar>::count;

  bool shared_qk;
  const Scalar* k;
  const Scalar* v;
  Scalar* grad_k;
  Scalar* grad_v;

  void load_keys(Index block, Scalar* to) const {
    load(k, block, to);
    if (shared_qk) l2_normalize(channels, to);
  }
  void load_values(Index block, Scalar* to) const { load(v, block, to); }
  void store_grad_keys(Index block, Scalar* from, Scalar* room) const {
    if (shared_qk) {
      load(k, block, room);
      l2_normalize_backward(channels, room, from);
    }
    store(grad_k, block, from);
  }
  void store_grad_values(Index block, Scalar* from) const { store(grad_v, block, from); }

  void add_upcoming(Index queries, Index keys, Index finished_keys, Upcoming<Scalar>& to) const {
    const auto add = [&](const Scalar* rows, Index block) {
      if (block * count < this->own.end)
        to.add(rows + block * count * channels, rows_of(block) * channels);
    };
    this->add_upcoming_queries(queries, to);
    for (const Scalar* rows : {k, v}) add(rows, keys);
    for (const Scalar* rows : {grad_k, grad_v}) add(rows, finished_keys);
  }

 private:
  Index rows_of(Index block) const { return (std::min)(count, this->own.end - block * count); }
  void load(const Scalar* rows, Index block, Scalar* to) const {
    load_block(channels, rows_of(block), StridedRows{rows, channels, block * count}, to);
  }
  void store(Scalar* rows, Index block, const Scalar* from) const {
    store_block(channels, rows_of(block), from, StridedRows{rows, channels, block * count});
  }
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
