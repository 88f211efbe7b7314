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

/// `[seqlen, channels]` each, as AttentionBackwardFlow takes it.
template <typename Scalar>
struct RowsHead {
  Index seqlen;
  Index channels;
  bool shared_qk;
  const Scalar* q;
  const Scalar* k;
  const Scalar* v;
  const Scalar* grad_out;
  const Scalar* out;
  const Scalar* lse;
  const Scalar* lse_rest;
  Scalar* grad_q;
  Scalar* grad_k;
  Scalar* grad_v;

  void load_queries(Index block, Scalar* to) const { load(q, block, to); }
  void load_keys(Index block, Scalar* to) const {
    load(k, block, to);
    if (shared_qk) l2_normalize(channels, to);
  }
  void load_values(Index block, Scalar* to) const { load(v, block, to); }
  void load_grad_out(Index block, Scalar* to) const { load(grad_out, block, to); }
  void load_out(Index block, Scalar* to) const { load(out, block, to); }
  void load_lse(Index block, Scalar* to) const {
    const Index rows = rows_of(block);
    const auto load_part = [&](const Scalar* from, double others, Scalar* part) {
      std::copy_n(from + block * count, rows, part);
      std::fill(part + rows, part + count, Scalar(others));
    };
    load_part(lse, -std::numeric_limits<double>::infinity(), to);
    load_part(lse_rest, 0, to + count);
  }
  void store_grad_queries(Index block, Scalar* from) const { store(grad_q, block, from); }
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
      if (block * count < seqlen)
        to.add(rows + block * count * channels, rows_of(block) * channels);
    };
    for (const Scalar* rows : {q, grad_out, out, static_cast<const Scalar*>(grad_q)})
      add(rows, queries);
    for (const Scalar* rows : {k, v}) add(rows, keys);
    for (const Scalar* rows : {grad_k, grad_v}) add(rows, finished_keys);
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  Index rows_of(Index block) const { return (std::min)(count, seqlen - block * count); }
  void load(const Scalar* rows, Index block, Scalar* to) const {
    load_block(channels, rows_of(block), StridedRows{rows, channels, block * count}, to);
  }
  void store(Scalar* rows, Index block, const Scalar* from) const {
    store_block(channels, rows_of(block), from, StridedRows{rows, channels, block * count});
  }
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
