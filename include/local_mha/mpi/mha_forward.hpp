// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA's forward pass over the rows of a rank.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <type_traits>
#include <vector>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/past.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/rows_view.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/layer/plan.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/layer/worker.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/exchange.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail {

/// How the keys and values of a row travel: `[kv_head][keys, values][dim_head]`, ready for the
/// kernel, as what they are stored as.
inline Index row_width(const LocalMHAConfig& config) {
  return 2 * resolved_kv_heads(config) * config.dim_head;
}

/// Takes a rank's rows through a LayerWorker: first the keys and values that others wait for, which
/// then travel while the queries are answered that see nothing of other ranks; and then the others.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class MhaForward {
 public:
  /// \param inputs of which only a part is here
  /// \param exchange of rows of row_width()
  MhaForward(const AnyDevice& device,
             const local_mha::detail::LayerWeights<Scalar, Storage, Arithmetic>& weights,
             const local_mha::detail::AttentionInputs<Scalar>& inputs,
             RowExchange<Storage>& exchange)
      : device_(device),
        inputs_(inputs),
        exchange_(exchange),
        config_(weights.config),
        borrowed_(BorrowPlan::by_sequence(exchange.plan().borrowed())),
        worker_(weights, inputs.window(), inputs.longest(), thread_count(device)),
        past_(size_of_past()) {
    worker_.steps().use(weights);
  }

  /// \param x, y `[B, rows, dim]`
  /// \param saved null, or where is kept what the backward pass needs
  void run(Traffic& traffic, const std::optional<Training>& training,
           const StridedView<const Scalar>& x, const StridedView<Scalar>& y,
           SavedLayer<Scalar>* saved) {
    lend(x);
    exchange_.start(traffic.keys_and_values);
    local_mha::detail::clear_rows_without_sequence(inputs_, y);
    const auto pass_all = [&](auto&& queries_of) {
      for (Index s = 0; s < inputs_.sequences(); ++s) pass(s, queries_of(s), training, x, y, saved);
    };
    pass_all([&](Index s) { return inner(s); });
    exchange_.wait();
    take_first_keys();
    pass_all([&](Index s) { return Range{inputs_.own(s).begin, inner(s).begin}; });
    pass_all([&](Index s) { return Range{inner(s).end, inputs_.own(s).end}; });
  }

 private:
  static constexpr Index count = block_rows<Scalar>;
  static constexpr Index stretch = local_mha::detail::layer_stretch<Scalar, Arithmetic>;
  static constexpr bool of_operands = !std::is_same_v<Scalar, Arithmetic>;
  using Worker = local_mha::detail::LayerWorker<Scalar, Storage, Arithmetic>;
  using BatchPast = typename Worker::BatchPast;

  Index dim_head() const { return config_.dim_head; }
  Index kv_heads() const { return resolved_kv_heads(config_); }
  const Window& window() const { return inputs_.window(); }
  Index length(Index s) const { return inputs_.rows(s).end - inputs_.rows(s).begin; }
  // Of own rows, not empty.
  template <typename View>
  auto rows_of(const View& view, Index s, Index first) const {
    return view.rows(inputs_.place(s) + first - inputs_.own(s).begin);
  }

  // As that of a stream, which takes rows in, and answers them, in the same way.
  typename BatchPast::Size size_of_past() const {
    const Index longest = inputs_.longest();
    const Index ahead = (std::min)(window().reach_ahead(), longest);
    const Index behind = (std::min)(window().reach_behind(), longest);
    const Index spare = stretch + 3;
    return {.heads = config_.heads,
            .dim_head = dim_head(),
            .gated = config_.gate_values_per_head,
            .waiting = ceil_div(ahead, count) + spare,
            .kept = ceil_div(behind + ahead, count) + spare,
            .kv_heads = kv_heads(),
            .pinned = ceil_div(first_keys(longest), count)};
  }
  Index first_keys(Index rows) const { return (std::min)(window().first_keys(), rows); }

  // As what it travels: where operands are multiplied, as one.
  static Storage to_storage(const Scalar& number) {
    if constexpr (of_operands)
      return local_mha::detail::to_operand<Arithmetic>(number);
    else
      return local_mha::detail::to_stored<Storage>(number);
  }

  // Queries that see nothing of other ranks, in whole blocks but for the ends of what is here.
  Range inner(Index s) const {
    const Range own = inputs_.own(s);
    if (own.begin >= own.end || first_keys(length(s)) > 0) return {own.begin, own.begin};
    const Range keys = inputs_.part_of(s)->keys;
    Index begin = own.begin, end = own.end;
    if (keys.begin < own.begin) {
      const Index reach = (std::min)(window().reach_behind(), own.end - own.begin);
      begin = ceil_div(own.begin + reach, count) * count;
    }
    if (keys.end > own.end) {
      const Index reach = (std::min)(window().reach_ahead(), own.end - own.begin);
      end = (own.end - reach) / count * count;
    }
    return begin < end ? Range{begin, end} : Range{own.begin, own.begin};
  }

  // Makes the keys and values that travel, and own first keys.
  void lend(const StridedView<const Scalar>& x) {
    const std::vector<Piece> pieces = BorrowPlan::by_sequence(exchange_.plan().lent());
    first_.resize(static_cast<std::size_t>(window().first_keys() > 0 ? inputs_.sequences() : 0));
    for (Index s = 0; s < inputs_.sequences(); ++s) {
      const Range own = inputs_.own(s);
      if (own.begin >= own.end) continue;
      worker_.steps().take_sequence(inputs_, s, std::nullopt, nullptr, 0);
      const auto visit = [&](const Range& rows, auto&& to) {
        if (rows.begin >= rows.end) return;
        worker_.keys_and_values(
            rows, rows_of(x, s, rows.begin),
            [&](Index block, Index kv_head, const Scalar* keys, const Scalar* values) {
              const Range in_block = rows.clipped_to({block * count, (block + 1) * count});
              for (Index row = in_block.begin; row < in_block.end; ++row) {
                Storage* at = to(row) + kv_head * 2 * dim_head();
                for (Index c = 0; c < dim_head(); ++c) {
                  at[c] = to_storage(keys[c * count + row % count]);
                  at[dim_head() + c] = to_storage(values[c * count + row % count]);
                }
              }
            });
      };
      if (!first_.empty()) {
        BlockBuffer<Storage>& first = first_[static_cast<std::size_t>(s)];
        first = make_block_buffer<Storage>(first_keys(length(s)) * exchange_.width());
        visit(own.clipped_to({0, first_keys(length(s))}),
              [&](Index row) { return first.data() + row * exchange_.width(); });
      }
      // What several ranks borrow is made for each of them: that is little.
      for (const Piece& piece : pieces)
        if (piece.sequence == s)
          visit(piece.rows,
                [&](Index row) { return exchange_.lent(piece.offset + row - piece.rows.begin); });
    }
  }

  template <typename Visit>
  void for_each_borrowed(Index s, const Range& rows, Visit&& visit) const {
    auto piece = std::lower_bound(borrowed_.begin(), borrowed_.end(), s,
                                  [](const Piece& p, Index i) { return p.sequence < i; });
    for (; piece != borrowed_.end() && piece->sequence == s; ++piece) {
      const Range some = rows.clipped_to(piece->rows);
      for (Index row = some.begin; row < some.end; ++row)
        visit(row, exchange_.borrowed(piece->offset + row - piece->rows.begin));
    }
  }

  void take_first_keys() {
    for (std::size_t s = 0; s < first_.size(); ++s) {
      const Index number = static_cast<Index>(first_[s].size()) / exchange_.width();
      for_each_borrowed(static_cast<Index>(s), {0, number}, [&](Index row, const Storage* from) {
        std::copy_n(from, exchange_.width(), first_[s].data() + row * exchange_.width());
      });
    }
  }

  // A row of the rings of keys and values.
  template <typename Keys, typename Values>
  void put_row(Index row, const Storage* from, Index kv_head, Keys& keys, Values& values) const {
    from += kv_head * 2 * dim_head();
    keys.put_row(row, from);
    values.put_row(row, from + dim_head());
  }

  // Rows of others come in.
  void put(Index s, const Range& rows) {
    if (rows.begin >= rows.end) return;
    for (Index h = 0; h < kv_heads(); ++h) {
      for_each_borrowed(s, rows, [&](Index row, const Storage* from) {
        put_row(row, from, h, past_.keys(h), past_.values(h));
      });
      const Range blocks = blocks_of<Scalar>(rows);
      for (Index b = blocks.begin; b < blocks.end; ++b) past_.values(h).note_finite(b);
    }
  }

  void put_first_keys(Index s) {
    const BlockBuffer<Storage>& first = first_[static_cast<std::size_t>(s)];
    const Index number = static_cast<Index>(first.size()) / exchange_.width();
    for (Index h = 0; h < kv_heads(); ++h) {
      for (Index row = 0; row < number; ++row)
        put_row(row, first.data() + row * exchange_.width(), h, *past_.pinned_keys(h),
                *past_.pinned_values(h));
      for (Index b = 0; b * count < number; ++b) past_.pinned_values(h)->note_finite(b);
    }
  }

  // Answers some queries that are here: what they see passes, other ranks' rows as they came.
  void pass(Index s, const Range& out, const std::optional<Training>& training,
            const StridedView<const Scalar>& x, const StridedView<Scalar>& y,
            SavedLayer<Scalar>* saved) {
    if (out.begin >= out.end) return;
    const Range own = inputs_.own(s);
    const Range seen = window().keys_of(out, length(s));
    Range in{(std::min)(seen.begin, out.begin), (std::max)(seen.end, out.end)};
    // Own ones in whole blocks, as they are kept.
    if (in.begin > own.begin) in.begin = (std::max)(in.begin / count * count, own.begin);
    if (in.end < own.end) in.end = (std::min)(ceil_div(in.end, count) * count, own.end);
    const Index first_saved = saved != nullptr ? saved->rows.first_block(s) - own.begin / count : 0;
    worker_.steps().take_sequence(inputs_, s, training, saved, first_saved);
    const Index pinned = first_keys(length(s));
    if (pinned > 0) put_first_keys(s);
    // Whole blocks of queries, whose bits are then those of one process.
    const auto complete = [&](Index rows) {
      return rows >= in.end ? out.end : window().complete(rows) / count * count;
    };
    flow_through<Scalar>(in, out, stretch, complete, [&](const Range& made, const Range& answered) {
      exchange_.progress();
      const Range here = made.clipped_to(own);
      const RowsView<const Scalar> rows =
          here.begin < here.end ? rows_of(x, s, here.begin) : RowsView<const Scalar>{};
      const RowsView<Scalar> results =
          answered.begin < answered.end ? rows_of(y, s, answered.begin) : RowsView<Scalar>{};
      put(s, {made.begin, (std::min)(made.end, own.begin)});
      const Range ahead{(std::max)(made.begin, own.end), made.end};
      // Rows that are made here take a whole block's place, also that of other ranks' first keys.
      const bool pins = here.begin < here.end && here.begin / count * count < pinned;
      // Operands are made in whole blocks, also in the place of other ranks' rows before them.
      const bool begins_inside = of_operands && here.begin < here.end && here.begin % count > 0;
      if (ahead.begin >= ahead.end && !pins && !begins_inside)
        return worker_.make_and_answer(device_, past_, here, rows, answered, results);
      // The rows ahead complete blocks whose first rows are made here.
      const Range none{answered.begin, answered.begin};
      worker_.make_and_answer(device_, past_, here, rows, none, {});
      if (begins_inside) put(s, {here.begin / count * count, here.begin});
      put(s, ahead);
      if (pins) put_first_keys(s);
      worker_.make_and_answer(device_, past_, {here.end, here.end}, {}, answered, results);
    });
  }

  const AnyDevice& device_;
  const local_mha::detail::AttentionInputs<Scalar>& inputs_;
  RowExchange<Storage>& exchange_;
  LocalMHAConfig config_;
  std::vector<Piece> borrowed_;              // in the order of the sequences
  std::vector<BlockBuffer<Storage>> first_;  // first keys and values of each sequence
  Worker worker_;
  BatchPast past_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail
