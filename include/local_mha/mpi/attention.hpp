// SPDX-License-Identifier: MIT
/// \file
/// LocalAttention's forward pass over the ranks that hold a sequence.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

#include <local_mha/attention/call.hpp>
#include <local_mha/attention/forward.hpp>
#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/local_attention.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/borrow_plan.hpp>
#include <local_mha/mpi/call_check.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/exchange.hpp>
#include <local_mha/mpi/parts.hpp>
#include <local_mha/mpi/split.hpp>
#include <local_mha/streaming/description.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// What an attention over ranks may do beyond what everybody may.
template <typename Scalar, typename Score>
struct AttentionAccess {
  using Attention = LocalAttention<Scalar, Score>;

  static const Placement<Scalar>& placement(const Attention& attention) {
    return attention.made_->placement;
  }
  static AttentionInputs<Scalar> inputs_of(const Attention& attention, Index batch, Index heads,
                                           Index kv_heads, Index seqlen,
                                           const LocalAttentionCall<Scalar>& call) {
    return attention.inputs_of(batch, heads, kv_heads, seqlen, call);
  }
};

}  // namespace detail

namespace mpi::detail {

/// Keys and values of a rank's queries, its own and those of others, where a forward pass reads
/// them: of each sequence and head in whole blocks.
template <typename Scalar>
class GatheredKeys {
 public:
  using Inputs = local_mha::detail::AttentionInputs<Scalar>;
  using View = TensorView<const Scalar, 4>;

  /// Copies what is here.
  /// \param k, v `[B, H_kv, rows, D]`
  GatheredKeys(const Inputs& inputs, const View& k, const View& v)
      : inputs_(inputs), channels_(k.dimension(3)), sequences_(to_size(inputs.sequences())) {
    for (Index s = 0; s < inputs.sequences(); ++s) {
      const Range own = inputs.own(s);
      if (own.begin >= own.end) continue;
      const Index length = inputs.rows(s).end - inputs.rows(s).begin;
      const Range keys = inputs.part_of(s)->keys;
      OfSequence& of = sequences_[to_size(s)];
      of.rows = {keys.begin / count * count, (std::min)(ceil_div(keys.end, count) * count, length)};
      const Index first = (std::min)(inputs.window().first_keys(), length);
      of.first_rows = (std::min)(ceil_div(first, count) * count, length);
      of.numbers = make_block_buffer<Scalar>(2 * inputs.kv_heads() * of_head(of));
      for (Index row = own.begin; row < own.end; ++row)
        for (Index h = 0; h < inputs.kv_heads(); ++h) {
          put(of, h, row, 0, at(k, s, h, row));
          put(of, h, row, 1, at(v, s, h, row));
        }
    }
  }

  /// A row of one head as it lies in a tensor.
  const Scalar* at(const View& tensor, Index s, Index h, Index row) const {
    const Index n = tensor.dimension(2);
    const Index in_item = inputs_.place(s) - inputs_.item(s) * n + row - inputs_.own(s).begin;
    return tensor.data() + ((inputs_.item(s) * tensor.dimension(1) + h) * n + in_item) * channels_;
  }

  /// Takes what others have lent: rows of `[kv_head][keys, values][D]`.
  void take(const RowExchange<Scalar>& exchange) {
    for (const Piece& piece : exchange.plan().borrowed())
      for (Index row = piece.rows.begin; row < piece.rows.end; ++row) {
        const Scalar* from = exchange.borrowed(piece.offset + row - piece.rows.begin);
        for (Index h = 0; h < inputs_.kv_heads(); ++h)
          for (Index part = 0; part < 2; ++part)
            put(sequences_[to_size(piece.sequence)], h, row, part,
                from + (2 * h + part) * channels_);
      }
  }

  /// Where row 0 of the keys (0) or values (1) of a head would be, and the first ones.
  const Scalar* rows(Index s, Index h, Index part) const {
    const OfSequence& of = sequences_[to_size(s)];
    return of.numbers.data() + (2 * h + part) * of_head(of) - of.rows.begin * channels_;
  }
  const Scalar* first_rows(Index s, Index h, Index part) const {
    const OfSequence& of = sequences_[to_size(s)];
    if (of.first_rows == 0) return nullptr;
    return of.numbers.data() + (2 * h + part) * of_head(of) +
           (of.rows.end - of.rows.begin) * channels_;
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  struct OfSequence {
    Range rows;            // of the sequence
    Index first_rows = 0;  // first keys, behind them
    BlockBuffer<Scalar> numbers;
  };

  static std::size_t to_size(Index i) { return static_cast<std::size_t>(i); }
  Index of_head(const OfSequence& of) const {
    return (of.rows.end - of.rows.begin + of.first_rows) * channels_;
  }
  void put(OfSequence& of, Index h, Index row, Index part, const Scalar* from) const {
    Scalar* head = of.numbers.data() + (2 * h + part) * of_head(of);
    if (of.rows.contains(row))
      std::copy_n(from, channels_, head + (row - of.rows.begin) * channels_);
    if (row < of.first_rows)
      std::copy_n(from, channels_, head + (of.rows.end - of.rows.begin + row) * channels_);
  }

  const Inputs& inputs_;
  Index channels_;
  std::vector<OfSequence> sequences_;
};

}  // namespace mpi::detail

namespace mpi {

/// local_mha::LocalAttention of sequences that no rank holds alone, forward: what mpi::LocalMHA
/// says, of queries, keys and values that are given. Keys travel as they are given; where they are
/// used, they are turned by their place in the whole.
///
///     local_mha::mpi::LocalAttention<float> split_attention(communicator, attention);
///     auto out = split_attention.forward(q, k, v, split);  // [B, H, split.rows(), D]
///
/// \tparam Scalar float, double, or another type of numbers that may be copied as bytes
/// \tparam Score that of the attention
template <typename Scalar, typename Score = ConfiguredScore>
class LocalAttention {
  static_assert(std::is_trivially_copyable_v<Scalar>, "numbers travel as their bytes");
  using Whole = local_mha::LocalAttention<Scalar, Score>;
  using Access = local_mha::detail::AttentionAccess<Scalar, Score>;
  using Inputs = local_mha::detail::AttentionInputs<Scalar>;
  using View = TensorView<const Scalar, 4>;

 public:
  /// What a call is given beside queries, keys and values: of the mask the rows of this rank,
  /// `[B, rows]`; the rest is that of the whole, and the same on every rank. No global_rows.
  using Call = LocalAttentionCall<Scalar>;

  /// Collective.
  /// \param communicator must outlive this
  /// \param attention the same on every rank
  /// \throws std::invalid_argument, on every rank, if it is not the same
  LocalAttention(const Communicator& communicator, const Whole& attention)
      : communicator_(&communicator), attention_(attention) {
    config_.add(local_mha::detail::description_of(attention, Window(attention.config()),
                                                  std::optional<TensorView<const Scalar, 3>>()));
    config_.add(attention.config().dropout);
    config_.add(sizeof(Scalar));
    detail::Agreement agreement(communicator, "LocalAttention");
    agreement.same("config", config_);
    agreement.settle();
  }

  const Whole& attention() const { return attention_; }
  const Communicator& communicator() const { return *communicator_; }

  /// \param q `[B, H, split.rows(), D]`: the rows of this rank
  /// \param k, v `[B, H_kv, split.rows(), D]`, where `H_kv` divides `H`
  /// \return `[B, H, split.rows(), D]`; 0 for a query that sees no key
  /// \throws std::invalid_argument, on every rank, naming the argument that does not fit on one, or
  ///         is not the same on all
  Tensor<Scalar, 4> forward(View q, View k, View v, const Split& split,
                            const Call& call = {}) const {
    Tensor<Scalar, 4> out(q.dimensions());
    agree(q, k, v, split, call);
    communicator_->alone([&] { run(out, q, k, v, split, call); });
    return out;
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  // The call, of the whole.
  static Call without_mask(const Call& call) {
    Call whole = call;
    whole.mask = {};
    return whole;
  }

  void agree(const View& q, const View& k, const View& v, const Split& split,
             const Call& call) const {
    detail::Agreement agreement(*communicator_, "forward");
    const auto [batch, heads, rows, dim_head] = q.dimensions();
    agreement.check([&, n = batch, h = heads, d = dim_head] {
      detail::check_split(*communicator_, split, call.device);
      require_shape("q", q.dimensions(),
                    {-1, -1, split.rows(), attention_.config().dim.value_or(-1)});
      if (d < 1) reject("q", "at least 1 channel in [B, H, N, D]", to_string(q.dimensions()));
      require_shape("k", k.dimensions(), {n, -1, split.rows(), d});
      require_shape("v", v.dimensions(), k.dimensions());
      if (call.global_rows)
        reject("global_rows", "none over ranks, because they see the whole sequence", "some");
      const Call whole = without_mask(call);
      Access::inputs_of(attention_, n, h, k.dimension(1), split.total(), whole);
      detail::check_mask(call.mask, n, split);
    });
    agreement.same("config", config_);
    agreement.same("heads", heads);
    agreement.same("kv_heads", k.dimension(1));
    agreement.same("dim_head", dim_head);
    detail::agree_on_call(agreement, split, batch, call);
    agreement.same("window_size", call.window_size.value_or(-1));
    agreement.same("first_position", call.first_position);
    detail::agree_on_tensor(agreement, "attn_bias", call.attn_bias);
    detail::agree_on_tensor(agreement, "relative_bias", call.relative_bias);
    detail::agree_on_tensor(agreement, "sinks", call.sinks);
    agreement.settle();
  }

  void run(Tensor<Scalar, 4>& out, const View& q, const View& k, const View& v, const Split& split,
           const Call& call) const {
    const auto [batch, heads, rows, channels] = q.dimensions();
    const Call whole = without_mask(call);
    Inputs inputs =
        Access::inputs_of(attention_, batch, heads, k.dimension(1), split.total(), whole);
    const detail::BorrowPlan plan(split, inputs);
    const detail::Parts parts(split, plan, inputs, call.mask);
    inputs.take_part(split.stretch(), parts.all());
    inputs.clear_other_rows(heads, channels, Scalar(0), out.data());
    detail::RowExchange<Scalar> exchange(*communicator_, plan, 2 * inputs.kv_heads() * channels);
    detail::GatheredKeys<Scalar> keys(inputs, k, v);
    for (const detail::Piece& piece : plan.lent())
      for (Index row = piece.rows.begin; row < piece.rows.end; ++row) {
        Scalar* to = exchange.lent(piece.offset + row - piece.rows.begin);
        for (Index h = 0; h < inputs.kv_heads(); ++h, to += 2 * channels) {
          std::copy_n(keys.at(k, piece.sequence, h, row), channels, to);
          std::copy_n(keys.at(v, piece.sequence, h, row), channels, to + channels);
        }
      }
    exchange.start(communicator_->traffic().keys_and_values);

    local_mha::detail::AttentionForward<Scalar> room;
    const auto answer = [&, d = channels](const std::vector<Task>& tasks) {
      room.run_some(
          call.device, attention_.config(), Access::placement(attention_), inputs, d, tasks,
          call.training, [&](Index s, Index h) {
            const Index kv = h / inputs.group();
            const Index before = inputs.own(s).begin * d;
            return local_mha::detail::ForwardRows<Scalar>{
                .q = keys.at(q, s, h, inputs.own(s).begin) - before,
                .k = keys.rows(s, kv, 0),
                .v = keys.rows(s, kv, 1),
                .out = out.data() + (keys.at(q, s, h, inputs.own(s).begin) - q.data()) - before,
                .first_k = keys.first_rows(s, kv, 0),
                .first_v = keys.first_rows(s, kv, 1)};
          });
    };
    answer(tasks_of(inputs, true));
    exchange.wait();
    keys.take(exchange);
    answer(tasks_of(inputs, false));
  }

  using Task = typename local_mha::detail::AttentionForward<Scalar>::Task;

  // Stretches of queries that see nothing of other ranks, or the others, in blocks.
  static std::vector<Task> tasks_of(const Inputs& inputs, bool inner) {
    // Of many blocks each, so that threads even out and keys are made a second time for few.
    constexpr Index together = 64;
    std::vector<Task> tasks;
    for (Index s = 0; s < inputs.sequences(); ++s) {
      const Range own = inputs.own(s);
      if (own.begin >= own.end) continue;
      const Range blocks{own.begin / count, ceil_div(own.end, count)};
      const Range inside = inner_blocks(inputs, s, blocks);
      const auto add = [&](Index begin, Index end) {
        for (Index h = 0; h < inputs.kv_heads(); ++h)
          for (Index block = begin; block < end; block += together)
            tasks.push_back({s, h, {block, (std::min)(block + together, end)}});
      };
      if (inner) {
        add(inside.begin, inside.end);
      } else {
        add(blocks.begin, inside.begin);
        add(inside.end, blocks.end);
      }
    }
    return tasks;
  }
  static Range inner_blocks(const Inputs& inputs, Index s, const Range& blocks) {
    const Range own = inputs.own(s), keys = inputs.part_of(s)->keys;
    const Window& window = inputs.window();
    if (window.first_keys() > 0) return {blocks.begin, blocks.begin};
    Range inside = blocks;
    const Index rows = own.end - own.begin;
    if (keys.begin < own.begin)
      inside.begin = ceil_div(own.begin + (std::min)(window.reach_behind(), rows), count);
    if (keys.end > own.end) inside.end = (own.end - (std::min)(window.reach_ahead(), rows)) / count;
    return inside.begin < inside.end ? inside : Range{blocks.begin, blocks.begin};
  }

  const Communicator* communicator_;
  detail::Checksum config_;
  Whole attention_;
};

}  // namespace mpi

}  // namespace local_mha::inline LOCAL_MHA_ABI
