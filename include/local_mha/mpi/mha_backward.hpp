// SPDX-License-Identifier: MIT
/// \file
/// What LocalMHA's backward pass does over the rows of a rank that it does not where all are here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/log_sum_exp.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/layer/backward_head.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/mpi/borrow_plan.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/exchange.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail {

/// Keys and values that a rank has borrowed, and buffers for their gradients.
template <typename Scalar>
class BorrowedKeys {
 public:
  /// \param numbers as they came: rows of row_width()
  /// \param gradients to be sent back to their owners, 0 at first
  BorrowedKeys(const BlockBuffer<Scalar>& numbers, RowExchange<Scalar>& gradients)
      : numbers_(numbers),
        gradients_(gradients),
        pieces_(BorrowPlan::by_sequence(gradients.plan().borrowed())) {}

  /// Calls `visit(lane, row, grad)` for each borrowed row of a block of a sequence.
  template <typename Visit>
  void for_each_row(Index sequence, Index block, Visit&& visit) const {
    constexpr Index count = block_rows<Scalar>;
    const Range rows{block * count, (block + 1) * count};
    auto piece = std::lower_bound(pieces_.begin(), pieces_.end(), sequence,
                                  [](const Piece& p, Index s) { return p.sequence < s; });
    for (; piece != pieces_.end() && piece->sequence == sequence; ++piece) {
      const Range some = rows.clipped_to(piece->rows);
      for (Index row = some.begin; row < some.end; ++row) {
        const Index at = piece->offset + row - piece->rows.begin;
        visit(row - rows.begin, numbers_.data() + at * gradients_.width(), gradients_.borrowed(at));
      }
    }
  }

 private:
  const BlockBuffer<Scalar>& numbers_;
  RowExchange<Scalar>& gradients_;
  std::vector<Piece> pieces_;
};

/// A head of which some keys and values are borrowed: those in the lanes of blocks, or in whole
/// blocks, that are not here.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
struct BorrowingHead {
  static constexpr Index count = block_rows<Scalar>;
  using Head = local_mha::detail::LayerBackwardHead<Scalar, Storage, Arithmetic>;

  Head head;
  const BorrowedKeys<Scalar>& borrowed;
  Index sequence;
  Range own;  ///< rows of the sequence

  Index dim_head() const { return head.dim_head(); }
  bool is_here(Index block) const {
    return block * count < own.end && (block + 1) * count > own.begin;
  }
  // In a borrowed row.
  Index keys_at() const { return head.kv_head * 2 * dim_head(); }
  Index values_at() const { return keys_at() + dim_head(); }

  void load_queries(Index block, Scalar* to) const { head.load_queries(block, to); }
  void load_grad_out(Index block, Scalar* to) const { head.load_grad_out(block, to); }
  void load_out(Index block, Scalar* to) const { head.load_out(block, to); }
  void load_lse(Index block, Scalar* to) const { head.load_lse(block, to); }
  void load_keys(Index block, Scalar* to) const {
    if (is_here(block)) return head.load_keys(block, to);
    std::fill_n(to, dim_head() * count, Scalar(0));
  }
  void put_placed_keys(Index block, Scalar* to) const { put(block, keys_at(), to); }
  void load_values(Index block, Scalar* to) const {
    if (is_here(block))
      head.load_values(block, to);
    else
      std::fill_n(to, dim_head() * count, Scalar(0));
    put(block, values_at(), to);
  }

  void store_grad_queries(Index block, Scalar* from) const {
    clear_others(block, from);
    head.store_grad_queries(block, from);
  }
  void take_placed_grad_keys(Index block, const Scalar* from) const {
    take(block, keys_at(), from);
  }
  void store_grad_keys(Index block, Scalar* from, Scalar* more) const {
    if (!is_here(block)) return;
    clear_others(block, from);
    head.store_grad_keys(block, from, more);
  }
  void store_grad_values(Index block, Scalar* from) const {
    take(block, values_at(), from);
    if (!is_here(block)) return;
    clear_others(block, from);
    head.store_grad_values(block, from);
  }

  void add_upcoming(Index queries, Index keys, Index finished_keys, Upcoming<Scalar>& to) const {
    if (is_here(queries) && is_here(keys) && is_here(finished_keys))
      head.add_upcoming(queries, keys, finished_keys, to);
  }

 private:
  void put(Index block, Index at, Scalar* to) const {
    borrowed.for_each_row(sequence, block, [&](Index lane, const Scalar* from, Scalar*) {
      for (Index c = 0; c < dim_head(); ++c) to[c * count + lane] = from[at + c];
    });
  }
  void take(Index block, Index at, const Scalar* from) const {
    borrowed.for_each_row(sequence, block, [&](Index lane, const Scalar*, Scalar* grad) {
      for (Index c = 0; c < dim_head(); ++c) grad[at + c] = from[c * count + lane];
    });
  }
  // What is summed over a block's rows counts those that are here.
  void clear_others(Index block, Scalar* of) const {
    const Range lanes =
        Range{own.begin - block * count, own.end - block * count}.clipped_to({0, count});
    clear_other_lanes(dim_head(), {static_cast<int>(lanes.begin), static_cast<int>(lanes.end)}, of);
  }
};

/// The part of sequences that LayerBackward::run_part() takes.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class MhaPart {
 public:
  /// \param borrowed keys and values as they came
  /// \param exchange of their gradients
  MhaPart(const Communicator& communicator,
          const local_mha::detail::LayerWeights<Scalar, Storage, Arithmetic>& weights,
          const local_mha::detail::AttentionInputs<Scalar>& inputs,
          const BlockBuffer<Scalar>& borrowed, RowExchange<Scalar>& exchange)
      : communicator_(communicator),
        weights_(weights),
        inputs_(inputs),
        exchange_(exchange),
        borrowed_(borrowed, exchange) {
    exchange.clear_borrowed();
  }

  BorrowingHead<Scalar, Storage, Arithmetic> head(
      const local_mha::detail::LayerBackwardHead<Scalar, Storage, Arithmetic>& head,
      Index sequence) const {
    return {head, borrowed_, sequence, inputs_.own(sequence)};
  }

  /// Sends gradients of what was borrowed to its owners, who add them in the order of the ranks.
  template <typename HeadOf>
  void finish(HeadOf&& head_of) {
    exchange_.start_back(communicator_.traffic().gradients);
    exchange_.wait();
    const Index dim_head = weights_.config.dim_head;
    keys_ = make_block_buffer<Scalar>(dim_head * count);
    values_ = make_block_buffer<Scalar>(dim_head * count);
    before_ = make_block_buffer<Scalar>(dim_head * count);
    for (const Piece& piece : exchange_.plan().lent())
      for (Index block = piece.rows.begin / count; block * count < piece.rows.end; ++block)
        for (Index kv_head = 0; kv_head < inputs_.kv_heads(); ++kv_head) {
          load(piece, block, kv_head);
          add(head_of(piece.sequence, kv_head * inputs_.group()), block);
        }
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  void load(const Piece& piece, Index block, Index kv_head) {
    const Index dim_head = weights_.config.dim_head;
    std::fill(keys_.begin(), keys_.end(), Scalar(0));
    std::fill(values_.begin(), values_.end(), Scalar(0));
    const Range rows = piece.rows.clipped_to({block * count, (block + 1) * count});
    for (Index row = rows.begin; row < rows.end; ++row) {
      const Scalar* from =
          exchange_.lent(piece.offset + row - piece.rows.begin) + kv_head * 2 * dim_head;
      for (Index c = 0; c < dim_head; ++c) {
        const auto at = static_cast<std::size_t>(c * count + row % count);
        keys_[at] = from[c];
        values_[at] = from[dim_head + c];
      }
    }
  }

  // As AttentionBackwardFlow does with those that come from here.
  void add(const local_mha::detail::LayerBackwardHead<Scalar, Storage, Arithmetic>& head,
           Index block) {
    const Index dim_head = weights_.config.dim_head;
    if (const auto* rotary = weights_.attention.rotary())
      rotary->apply_back_to_keys(keys_.data(), block * count);
    scale_block(dim_head, Scalar(ln_2), keys_.data());
    const auto add_to = [&](Scalar* grad, const Scalar* more) {
      for (Index i = 0; i < dim_head * count; ++i) grad[i] += more[i];
    };
    // Normalization is linear in the gradient.
    Scalar* grad_keys = head.grad(1, block);
    std::copy_n(grad_keys, dim_head * count, before_.data());
    head.store_grad_keys(block, keys_.data(), nullptr);
    add_to(grad_keys, before_.data());
    add_to(head.grad(2, block), values_.data());
  }

  const Communicator& communicator_;
  const local_mha::detail::LayerWeights<Scalar, Storage, Arithmetic>& weights_;
  const local_mha::detail::AttentionInputs<Scalar>& inputs_;
  RowExchange<Scalar>& exchange_;
  BorrowedKeys<Scalar> borrowed_;
  BlockBuffer<Scalar> keys_;
  BlockBuffer<Scalar> values_;
  BlockBuffer<Scalar> before_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail
