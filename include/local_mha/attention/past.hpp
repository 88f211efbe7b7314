// SPDX-License-Identifier: MIT
/// \file
/// What a layer keeps of a sequence while it flows through.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include <local_mha/attention/ring.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// The last queries, keys and values of every head, ready for the kernel, and the heads' gates.
/// \tparam Keys, Values where keys and values lie: a Ring, or KeyOperands and ValueOperands
template <typename Scalar, typename Keys = Ring<Scalar>, typename Values = Keys>
class Past {
 public:
  struct Size {
    Index heads = 0;
    Index dim_head = 0;
    /// Heads have gates.
    bool gated = false;
    /// Blocks of queries and gates, and of keys and values.
    Index waiting = 1;
    Index kept = 1;
    /// Queries wait for keys ahead; otherwise later rows do not need them.
    bool queries_wait = false;
    /// Heads of keys and values; 0: as many.
    Index kv_heads = 0;
    /// First blocks of keys and values, which stay.
    Index pinned = 0;
  };

  Past() = default;
  LOCAL_MHA_NOINLINE explicit Past(const Size& size)
      : size_(size),
        queries_(rings<Ring<Scalar>>(size.heads, size.dim_head, size.waiting)),
        keys_(rings_of_keys<Keys>(size, size.kept)),
        values_(rings_of_keys<Values>(size, size.kept)),
        pinned_keys_(rings_of_keys<Keys>(size, size.pinned)),
        pinned_values_(rings_of_keys<Values>(size, size.pinned)) {
    if (size.gated) gates_ = Ring<Scalar>(size.heads, size.waiting);
  }

  const Size& size() const { return size_; }
  /// Whether it can take the place of one of this size.
  bool serves(const Size& size) const {
    return size_.heads == size.heads && size_.dim_head == size.dim_head &&
           size_.gated == size.gated && size_.waiting >= size.waiting && size_.kept >= size.kept &&
           size_.queries_wait == size.queries_wait && size_.kv_heads == size.kv_heads &&
           size_.pinned >= size.pinned;
  }
  Ring<Scalar>& queries(Index h) { return queries_[to_size(h)]; }
  Keys& keys(Index h) { return keys_[to_size(h)]; }
  Values& values(Index h) { return values_[to_size(h)]; }
  Ring<Scalar>& gates() { return gates_; }
  /// Null: nothing is pinned.
  Keys* pinned_keys(Index h) { return size_.pinned > 0 ? &pinned_keys_[to_size(h)] : nullptr; }
  Values* pinned_values(Index h) {
    return size_.pinned > 0 ? &pinned_values_[to_size(h)] : nullptr;
  }

  /// Keeps those of some rows that are pinned, which keys(h) and values(h) have.
  void pin(Index h, const Range& rows) {
    constexpr Index count = block_rows<Scalar>;
    for (Index block = rows.begin / count; block < size_.pinned && block * count < rows.end;
         ++block) {
      pinned_keys(h)->copy_block(block, keys(h));
      pinned_values(h)->copy_block(block, values(h));
    }
  }

  /// Calls `visit(ring, waits)` for every ring that later rows need; `waits`: of queries or gates.
  template <typename Self, typename Visit>
  static void for_each_ring(Self& past, Visit&& visit) {
    for (auto& keys : past.keys_) visit(keys, false);
    for (auto& values : past.values_) visit(values, false);
    if (!past.size_.queries_wait) return;
    for (auto& queries : past.queries_) visit(queries, true);
    if (past.size_.gated) visit(past.gates_, true);
  }
  /// The same for those that hold pinned rows, `visit(ring)`.
  template <typename Self, typename Visit>
  static void for_each_pinned_ring(Self& past, Visit&& visit) {
    for (auto& keys : past.pinned_keys_) visit(keys);
    for (auto& values : past.pinned_values_) visit(values);
  }

 private:
  static std::size_t to_size(Index i) { return static_cast<std::size_t>(i); }
  template <typename Some>
  static LOCAL_MHA_NOINLINE std::vector<Some> rings(Index number, Index channels, Index blocks) {
    std::vector<Some> rings;
    rings.reserve(to_size(number));
    while (static_cast<Index>(rings.size()) < number) rings.emplace_back(channels, blocks);
    return rings;
  }
  template <typename Some>
  static std::vector<Some> rings_of_keys(const Size& size, Index blocks) {
    const Index kv_heads = size.kv_heads > 0 ? size.kv_heads : size.heads;
    return rings<Some>(blocks > 0 ? kv_heads : 0, size.dim_head, blocks);
  }

  Size size_;
  std::vector<Ring<Scalar>> queries_;
  std::vector<Keys> keys_;
  std::vector<Values> values_;
  std::vector<Keys> pinned_keys_;
  std::vector<Values> pinned_values_;
  Ring<Scalar> gates_;
};

/// One whose keys and values are stored as Storage.
template <typename Scalar, typename Storage>
using StoredPast = Past<Scalar, Ring<Scalar, Storage>>;

/// The blocks that hold `rows`.
template <typename Scalar>
Range blocks_of(const Range& rows) {
  constexpr Index count = block_rows<Scalar>;
  if (rows.begin == rows.end) return {rows.begin / count, rows.begin / count};
  return {rows.begin / count, ceil_div(rows.end, count)};
}

/// Calls `visit(block, lanes)` for each block that holds some of `rows`, with their lanes there.
template <typename Scalar, typename Visit>
void for_each_block(const Range& rows, Visit&& visit) {
  constexpr Index count = block_rows<Scalar>;
  const Range blocks = blocks_of<Scalar>(rows);
  for (Index block = blocks.begin; block < blocks.end; ++block) {
    const Range lanes = rows.clipped_to({block * count, (block + 1) * count});
    visit(block, LaneRange{static_cast<int>(lanes.begin - block * count),
                           static_cast<int>(lanes.end - block * count)});
  }
}

/// Calls `work.operator()<Parts>(lane)` for the lanes of a block, from `lane` on, that hold `rows`:
/// all of them, or of a single row a packet. The others stay.
template <typename Scalar, typename Work>
LOCAL_MHA_INLINE void with_lanes_of(const Range& rows, Work&& work) {
  using L = Lanes<Scalar>;
  if constexpr (L::packets > 1) {
    if (rows.end - rows.begin == 1)
      return work.template operator()<L::packets>(rows.begin % L::count / L::packet_size *
                                                  L::packet_size);
  }
  work.template operator()<1>(Index{0});
}

/// Moves rows through a layer, at most `stretch` blocks at a time: calls `step(in, out)` with the
/// rows that come in and those that are answered then. New rows come only when no query is
/// complete, so that the past need not grow.
/// \param in rows that come in, all in all
/// \param out queries that are answered, of which the last is complete when all rows are in
/// \param complete `complete(rows)` queries see no row from `rows` on
template <typename Scalar, typename Complete, typename Step>
void flow_through(const Range& in, const Range& out, Index stretch, Complete&& complete,
                  Step&& step) {
  const auto stretch_end = [&](Index row) {
    return (row / block_rows<Scalar> + stretch) * block_rows<Scalar>;
  };
  Range made{in.begin, in.begin};
  Range answered{out.begin, out.begin};
  while (made.end < in.end || answered.end < out.end) {
    const bool waiting = complete(made.end) <= answered.end;
    made = {made.end, waiting ? (std::min)(stretch_end(made.end), in.end) : made.end};
    const Index until = (std::min)({complete(made.end), stretch_end(answered.end), out.end});
    answered = {answered.end, (std::max)(until, answered.end)};
    step(made, answered);
  }
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
