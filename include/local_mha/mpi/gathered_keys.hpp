// SPDX-License-Identifier: MIT
/// \file
/// Keys and values of LocalAttention over ranks, where its passes read them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/rows_head.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/mpi/exchange.hpp>
#include <local_mha/ops/qk_norm.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail {

/// Keys and values of a rank's queries, its own and those of others, of each sequence and head in
/// whole blocks; or their gradients, which lie in the same way.
template <typename Scalar>
class GatheredKeys {
 public:
  using Inputs = local_mha::detail::AttentionInputs<Scalar>;
  using View = TensorView<const Scalar, 4>;

  /// \param inputs must outlive this
  /// \param held rows of tensors
  GatheredKeys(const Inputs& inputs, Index held, Index channels)
      : inputs_(inputs),
        held_(held),
        channels_(channels),
        sequences_(to_size(inputs.sequences())) {}

  /// Of a part that the inputs have taken: all numbers become 0.
  void make_room() {
    for (Index s = 0; s < inputs_.sequences(); ++s) {
      const Range own = inputs_.own(s);
      if (own.begin >= own.end) continue;
      const Range keys = inputs_.part_of(s)->keys;
      OfSequence& of = sequences_[to_size(s)];
      of.length = inputs_.rows(s).end - inputs_.rows(s).begin;
      of.rows = {keys.begin / count * count,
                 (std::min)(ceil_div(keys.end, count) * count, of.length)};
      const Index first = (std::min)(inputs_.window().first_keys(), of.length);
      of.first_rows = (std::min)(ceil_div(first, count) * count, of.length);
      of.numbers = make_block_buffer<Scalar>(2 * inputs_.kv_heads() * of_head(of));
    }
  }

  /// Copies what is here.
  /// \param k, v `[B, H_kv, rows, D]`
  void take(const View& k, const View& v) {
    for_each_own([&](Index s, Index h, Index row) {
      put(s, h, row, 0, k.data() + offset(inputs_.kv_heads(), s, h, row));
      put(s, h, row, 1, v.data() + offset(inputs_.kv_heads(), s, h, row));
    });
  }
  /// Copies what others have lent: rows of `[kv_head][keys, values][D]`.
  /// \param borrowed as they came
  void take(const BorrowPlan& plan, const Scalar* borrowed) {
    for_each_number(plan.borrowed(), borrowed,
                    [&](Index s, Index h, Index row, Index part, const Scalar* from) {
                      put(s, h, row, part, from);
                    });
  }
  /// Adds to own rows what others have made of them.
  /// \param lent in the order in which they are added
  void add(const BorrowPlan& plan, const Scalar* lent) {
    for_each_number(plan.lent(), lent,
                    [&](Index s, Index h, Index row, Index part, const Scalar* from) {
                      Scalar* to = this->row(s, h, row, part);
                      for (Index c = 0; c < channels_; ++c) to[c] += from[c];
                    });
  }
  /// Rows that travel, from here.
  /// \param to becomes rows of `[kv_head][keys, values][D]`
  void give(const std::vector<Piece>& pieces, Scalar* to) const {
    for_each_number(pieces, to, [&](Index s, Index h, Index row, Index part, Scalar* at) {
      std::copy_n(this->row(s, h, row, part), channels_, at);
    });
  }
  /// Own rows.
  /// \param k, v `[B, H_kv, rows, D]`
  void give(Scalar* k, Scalar* v) const {
    for_each_own([&](Index s, Index h, Index row) {
      const Index at = offset(inputs_.kv_heads(), s, h, row);
      std::copy_n(this->row(s, h, row, 0), channels_, k + at);
      std::copy_n(this->row(s, h, row, 1), channels_, v + at);
    });
  }

  /// Where a row that is here begins in a tensor `[B, heads, rows, D]`.
  Index offset(Index heads, Index s, Index h, Index row) const {
    return offset(heads, s, h, row, channels_);
  }
  Index offset(Index heads, Index s, Index h, Index row, Index channels) const {
    const Index in_item = inputs_.place(s) - inputs_.item(s) * held_ + row - inputs_.own(s).begin;
    return ((inputs_.item(s) * heads + h) * held_ + in_item) * channels;
  }

  /// Where row 0 of the keys (0) or values (1) of a head would be, and the first ones.
  const Scalar* rows(Index s, Index h, Index part) const {
    const OfSequence& of = sequences_[to_size(s)];
    return head(of, h, part) - of.rows.begin * channels_;
  }
  const Scalar* first_rows(Index s, Index h, Index part) const {
    const OfSequence& of = sequences_[to_size(s)];
    if (of.first_rows == 0) return nullptr;
    return head(of, h, part) + (of.rows.end - of.rows.begin) * channels_;
  }
  /// A row, or the first of a block: among first keys where the window does not show its block.
  const Scalar* row(Index s, Index h, Index row, Index part) const {
    const OfSequence& of = sequences_[to_size(s)];
    const bool near = of.rows.contains(row);
    return head(of, h, part) +
           (near ? row - of.rows.begin : of.rows.end - of.rows.begin + row) * channels_;
  }
  Scalar* row(Index s, Index h, Index row, Index part) {
    return const_cast<Scalar*>(static_cast<const GatheredKeys&>(*this).row(s, h, row, part));
  }
  /// Rows of a block that the sequence has.
  Index rows_of(Index s, Index block) const {
    return (std::min)(count, sequences_[to_size(s)].length - block * count);
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  struct OfSequence {
    Index length = 0;
    Range rows;            // of the sequence
    Index first_rows = 0;  // first keys, behind them
    BlockBuffer<Scalar> numbers;
  };

  static std::size_t to_size(Index i) { return static_cast<std::size_t>(i); }
  Index of_head(const OfSequence& of) const {
    return (of.rows.end - of.rows.begin + of.first_rows) * channels_;
  }
  const Scalar* head(const OfSequence& of, Index h, Index part) const {
    return of.numbers.data() + (2 * h + part) * of_head(of);
  }
  template <typename Visit>
  void for_each_own(Visit&& visit) const {
    for (Index s = 0; s < inputs_.sequences(); ++s) {
      const Range own = inputs_.own(s);
      for (Index h = 0; h < inputs_.kv_heads(); ++h)
        for (Index row = own.begin; row < own.end; ++row) visit(s, h, row);
    }
  }
  template <typename Number, typename Visit>
  void for_each_number(const std::vector<Piece>& pieces, Number* numbers, Visit&& visit) const {
    const Index width = 2 * inputs_.kv_heads() * channels_;
    for (const Piece& piece : pieces)
      for (Index row = piece.rows.begin; row < piece.rows.end; ++row) {
        Number* at = numbers + (piece.offset + row - piece.rows.begin) * width;
        for (Index h = 0; h < inputs_.kv_heads(); ++h)
          for (Index part = 0; part < 2; ++part, at += channels_)
            visit(piece.sequence, h, row, part, at);
      }
  }
  void put(Index s, Index h, Index row, Index part, const Scalar* from) {
    OfSequence& of = sequences_[to_size(s)];
    Scalar* to = of.numbers.data() + (2 * h + part) * of_head(of);
    if (of.rows.contains(row)) std::copy_n(from, channels_, to + (row - of.rows.begin) * channels_);
    if (row < of.first_rows)
      std::copy_n(from, channels_, to + (of.rows.end - of.rows.begin + row) * channels_);
  }

  const Inputs& inputs_;
  Index held_;
  Index channels_;
  std::vector<OfSequence> sequences_;
};

/// A head on the way back, as AttentionBackwardFlow takes it: queries that are here, and gathered
/// keys.
template <typename Scalar>
struct GatheredHead : local_mha::detail::RowsOfQueries<Scalar> {
  using local_mha::detail::RowsOfQueries<Scalar>::channels;
  using local_mha::detail::RowsOfQueries<Scalar>::count;

  Index sequence;
  Index kv_head;
  bool shared_qk;
  const GatheredKeys<Scalar>& keys;
  GatheredKeys<Scalar>& gradients;

  void load_keys(Index block, Scalar* to) const {
    load_gathered(0, block, to);
    if (shared_qk) l2_normalize(channels, to);
  }
  void load_values(Index block, Scalar* to) const { load_gathered(1, block, to); }

  void store_grad_keys(Index block, Scalar* from, Scalar* room) const {
    if (shared_qk) {
      load_gathered(0, block, room);
      l2_normalize_backward(channels, room, from);
    }
    store_gathered(0, block, from);
  }
  void store_grad_values(Index block, Scalar* from) const { store_gathered(1, block, from); }

  void add_upcoming(Index queries, Index, Index, Upcoming<Scalar>& to) const {
    this->add_upcoming_queries(queries, to);
  }

 private:
  void load_gathered(Index part, Index block, Scalar* to) const {
    load_block(channels, keys.rows_of(sequence, block),
               StridedRows{keys.row(sequence, kv_head, block * count, part), channels}, to);
  }
  void store_gathered(Index part, Index block, const Scalar* from) const {
    store_block(channels, gradients.rows_of(sequence, block), from,
                StridedRows{gradients.row(sequence, kv_head, block * count, part), channels});
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail
