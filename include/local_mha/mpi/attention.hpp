// SPDX-License-Identifier: MIT
/// \file
/// LocalAttention over the ranks that hold a sequence.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/attention/call.hpp>
#include <local_mha/attention/forward.hpp>
#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/local_attention.hpp>
#include <local_mha/attention/saved.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/attention_access.hpp>
#include <local_mha/mpi/call_check.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/exchange.hpp>
#include <local_mha/mpi/gathered_keys.hpp>
#include <local_mha/mpi/parts.hpp>
#include <local_mha/mpi/split.hpp>
#include <local_mha/mpi/sum.hpp>
#include <local_mha/streaming/description.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi {

/// What a rank's forward pass keeps for the backward pass: that of its rows, `out` included, and
/// what it has borrowed.
template <typename Scalar>
struct SavedAttention : local_mha::detail::SavedAttention<Scalar> {
  BlockBuffer<Scalar> borrowed = {};  ///< keys and values, as they came
  /// What its queries have seen.
  std::shared_ptr<const detail::SeenRows> seen = {};
  /// Rows of each whole sequence, if they are not all the same.
  std::vector<Index> whole_lengths = {};
  std::uint64_t split = 0;    ///< a checksum of the stretches
  std::uint64_t call_id = 0;  ///< by which all ranks know that theirs is of the same one
};

/// local_mha::LocalAttention of sequences that no rank holds alone: what mpi::LocalMHA says, of
/// queries, keys and values that are given. Keys travel as they are given; where they are used,
/// they are turned by their place in the whole. On the way back, the gradients of what was borrowed
/// return to the ranks that lent it, in as many bytes.
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
  /// What forward_saving() keeps for backward().
  using Saved = SavedAttention<Scalar>;
  /// Those of a rank's queries, keys and values, and the sums over all ranks of those of a bias and
  /// of sinks.
  using Gradients = typename Whole::Gradients;

  /// Collective.
  /// \param communicator must outlive this
  /// \param attention the same on every rank
  /// \throws std::invalid_argument, on every rank, if it is not the same
  LocalAttention(const Communicator& communicator, const Whole& attention)
      : communicator_(&communicator), attention_(attention) {
    detail::agree(communicator, "LocalAttention", [&](detail::Agreement& agreement) {
      config_.add(local_mha::detail::description_of(attention, Window(attention.config()),
                                                    std::optional<TensorView<const Scalar, 3>>()));
      config_.add(attention.config().dropout);
      config_.add(sizeof(Scalar));
      agreement.same("config", config_);
    });
  }

  /// The attention whose rows are split.
  const Whole& attention() const { return attention_; }
  /// The ranks.
  const Communicator& communicator() const { return *communicator_; }

  /// Attends from the queries of this rank.
  /// \param q `[B, H, split.rows(), D]`: the rows of this rank
  /// \param k, v `[B, H_kv, split.rows(), D]`, where `H_kv` divides `H`
  /// \return `[B, H, split.rows(), D]`; 0 for a query that sees no key
  /// \throws std::invalid_argument, on every rank, naming the argument that does not fit on one, or
  ///         is not the same on all
  Tensor<Scalar, 4> forward(View q, View k, View v, const Split& split,
                            const Call& call = {}) const {
    agree("forward", q, k, v, split, call, [] {});
    return communicator_->alone([&] {
      Tensor<Scalar, 4> out(q.dimensions());
      run(out, q, k, v, split, call, see(q, k, split, call), nullptr);
      return out;
    });
  }

  /// forward() that keeps what backward() needs; its result is `out` of that.
  Saved forward_saving(View q, View k, View v, const Split& split, const Call& call = {}) const {
    agree("forward_saving", q, k, v, split, call, [] {});
    return communicator_->alone([&] {
      const std::vector<Index> lengths = detail::own_lengths(split, call.lengths);
      Saved saved{local_mha::detail::SavedAttention<Scalar>::of(attention_.config(), q, k, v,
                                                                own_call(call, lengths))};
      saved.seen = see(q, k, split, call);
      run(saved.out, q, k, v, split, call, saved.seen, &saved);
      saved.split = split.checksum().value();
      saved.call_id = communicator_->agreements();
      saved.whole_lengths.assign(call.lengths.begin(), call.lengths.end());
      return saved;
    });
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_out`.
  ///
  /// What a rank has made of borrowed keys and values goes home, and is added there in the order of
  /// the ranks; so are the gradients of a bias and of sinks, whose bits depend on the stretches
  /// alone.
  /// \param saved what forward_saving() kept. It holds what the call was given but for tensors of
  ///        Scalars: in `call`, the rest may be left out
  /// \param grad_out `[B, H, split.rows(), D]`
  /// \param q, k, v, split, call what forward_saving() was given; the device may be another
  /// \throws std::invalid_argument, on every rank, as LocalAttention::backward() does and forward()
  ///         here
  Gradients backward(const Saved& saved, View grad_out, View q, View k, View v, const Split& split,
                     const Call& call = {}) const {
    Call given = call;
    if (!given.window_size && saved.config == attention_.config())
      given.window_size = saved.call.with_tensors_of(call).window_size;
    agree(
        "backward", q, k, v, split, given,
        [&] { check_backward(saved, grad_out, q, k, v, split, call); }, saved.call_id);
    return communicator_->alone([&] { return run_back(saved, grad_out, q, k, v, split, call); });
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  // The call, of the whole.
  static Call without_mask(const Call& call) {
    Call whole = call;
    whole.mask = {};
    return whole;
  }

  // What a call is for this rank's rows.
  static Call own_call(const Call& call, const std::vector<Index>& lengths) {
    Call own = call;
    own.lengths = lengths;
    return own;
  }

  void check_backward(const Saved& saved, const View& grad_out, const View& q, const View& k,
                      const View& v, const Split& split, const Call& call) const {
    require_shape("grad_out", grad_out.dimensions(), q.dimensions());
    if (saved.split != split.checksum().value())
      reject("saved", "that of a call with this split", "that of another, or none");
    if (!call.lengths.empty() && !std::ranges::equal(call.lengths, saved.whole_lengths))
      reject("lengths", "that of forward_saving(), or none", "another");
    const std::vector<Index> lengths = detail::own_lengths(split, call.lengths);
    saved.check_arguments(attention_.config(), q, k, v, own_call(call, lengths));
  }

  // \param check throws what else is wrong
  template <typename Check>
  void agree(std::string_view name, const View& q, const View& k, const View& v, const Split& split,
             const Call& call, Check&& check, std::uint64_t saved = 0) const {
    detail::agree(*communicator_, name, [&](detail::Agreement& agreement) {
      const Index batch = q.dimension(0), heads = q.dimension(1), dim_head = q.dimension(3);
      agreement.check([&] {
        detail::check_split(*communicator_, split, call.device);
        require_shape("q", q.dimensions(),
                      {-1, -1, split.rows(), attention_.config().dim.value_or(-1)});
        if (dim_head < 1)
          reject("q", "at least 1 channel in [B, H, N, D]", to_string(q.dimensions()));
        require_shape("k", k.dimensions(), {batch, -1, split.rows(), dim_head});
        require_shape("v", v.dimensions(), k.dimensions());
        if (call.global_rows)
          reject("global_rows", "none over ranks, because they see the whole sequence", "some");
        inputs_of(q, k, split, without_mask(call));
        detail::check_mask(call.mask, batch, split);
        check();
      });
      agreement.same("config", config_);
      agreement.same("saved", saved);
      agreement.same("heads", heads);
      agreement.same("kv_heads", k.dimension(1));
      agreement.same("dim_head", dim_head);
      detail::agree_on_call(agreement, split, batch, call);
      agreement.same("window_size", call.window_size.value_or(-1));
      agreement.same("first_position", call.first_position);
      detail::agree_on_tensor(agreement, "attn_bias", call.attn_bias);
      detail::agree_on_tensor(agreement, "relative_bias", call.relative_bias);
      detail::agree_on_tensor(agreement, "sinks", call.sinks);
    });
  }

  // \param whole must outlive what is returned
  Inputs inputs_of(const View& q, const View& k, const Split& split, const Call& whole) const {
    return Access::inputs_of(attention_, q.dimension(0), q.dimension(1), k.dimension(1),
                             split.total(), whole);
  }

  // What a call's queries see. Collective if there is a mask.
  std::shared_ptr<const detail::SeenRows> see(const View& q, const View& k, const Split& split,
                                              const Call& call) const {
    const Call whole = without_mask(call);
    const Inputs inputs = inputs_of(q, k, split, whole);
    return std::make_shared<const detail::SeenRows>(split, inputs, call.mask,
                                                    detail::Unmasked(split, inputs, call.mask));
  }

  // A call's rows, and what travels for them.
  struct Part {
    Part(const LocalAttention& of, const View& q, const View& k, const Split& split,
         const Call& call, std::shared_ptr<const detail::SeenRows> seen_rows)
        : whole(without_mask(call)),
          inputs(of.inputs_of(q, k, split, whole)),
          seen(std::move(seen_rows)),
          exchange(*of.communicator_, seen->plan, 2 * inputs.kv_heads() * q.dimension(3)),
          keys(inputs, q.dimension(2), q.dimension(3)) {
      inputs.take_part(split.stretch(), seen->parts.all());
      keys.make_room();
    }
    Part(const Part&) = delete;
    Part& operator=(const Part&) = delete;

    Call whole;
    Inputs inputs;
    std::shared_ptr<const detail::SeenRows> seen;
    detail::RowExchange<Scalar> exchange;
    detail::GatheredKeys<Scalar> keys;
  };

  // \param saved null, or what gets what backward() needs
  void run(Tensor<Scalar, 4>& out, const View& q, const View& k, const View& v, const Split& split,
           const Call& call, const std::shared_ptr<const detail::SeenRows>& seen,
           Saved* saved) const {
    Part part(*this, q, k, split, call, seen);
    const Inputs& inputs = part.inputs;
    detail::GatheredKeys<Scalar>& keys = part.keys;
    const Index heads = q.dimension(1), channels = q.dimension(3);
    keys.take(k, v);
    keys.give(part.seen->plan.lent(), part.exchange.lent(0));
    part.exchange.start(communicator_->traffic().keys_and_values);
    inputs.clear_other_rows(heads, channels, Scalar(0), out.data());
    if (saved != nullptr) {
      inputs.clear_other_rows(heads, 1, -std::numeric_limits<Scalar>::infinity(),
                              saved->lse.data());
      inputs.clear_other_rows(heads, 1, Scalar(0), saved->lse_rest.data());
    }

    local_mha::detail::AttentionForward<Scalar> room;
    const auto answer = [&](const std::vector<Task>& tasks) {
      room.run_some(call.device, attention_.config(), Access::placement(attention_), inputs,
                    channels, tasks, call.training, [&](Index s, Index h) {
                      const Index kv = h / inputs.group();
                      const Index row = keys.offset(heads, s, h, 0, 1);
                      return local_mha::detail::ForwardRows<Scalar>{
                          .q = q.data() + row * channels,
                          .k = keys.rows(s, kv, 0),
                          .v = keys.rows(s, kv, 1),
                          .out = out.data() + row * channels,
                          .lse = saved != nullptr ? saved->lse.data() + row : nullptr,
                          .lse_rest = saved != nullptr ? saved->lse_rest.data() + row : nullptr,
                          .first_k = keys.first_rows(s, kv, 0),
                          .first_v = keys.first_rows(s, kv, 1)};
                    });
    };
    answer(tasks_of(inputs, true));
    part.exchange.wait();
    keys.take(part.seen->plan, part.exchange.borrowed(0));
    answer(tasks_of(inputs, false));
    if (saved != nullptr) saved->borrowed = part.exchange.take_borrowed();
  }

  Gradients run_back(const Saved& saved, const View& grad_out, const View& q, const View& k,
                     const View& v, const Split& split, const Call& call) const {
    Call of_forward = saved.call.with_tensors_of(call);
    of_forward.lengths = saved.whole_lengths;
    Part part(*this, q, k, split, of_forward, saved.seen);
    const Inputs& inputs = part.inputs;
    const Index heads = q.dimension(1), channels = q.dimension(3);
    part.keys.take(k, v);
    part.keys.take(part.seen->plan, saved.borrowed.data());
    detail::GatheredKeys<Scalar> grad_keys(inputs, q.dimension(2), channels);
    grad_keys.make_room();
    Gradients gradients;
    gradients.prepare(q, k, v, call);
    inputs.clear_other_rows(heads, channels, Scalar(0), gradients.q.data());
    for (Tensor<Scalar, 4>* shared : {&gradients.k, &gradients.v})
      inputs.clear_other_rows(inputs.kv_heads(), channels, Scalar(0), shared->data());

    typename Whole::BiasGradients grad_bias;
    grad_bias.prepare(Access::bias_of(attention_, inputs.window(), heads, call), heads);
    local_mha::detail::AttentionBackward<Scalar> room;
    attention_.differentiate(
        call.device, room, inputs, q.dimension(0), channels,
        [&](Index s, Index h) {
          const Index row = part.keys.offset(heads, s, h, 0, 1);
          return detail::GatheredHead<Scalar>{
              {inputs.own(s), channels, q.data() + row * channels, grad_out.data() + row * channels,
               saved.out.data() + row * channels, saved.lse.data() + row,
               saved.lse_rest.data() + row, gradients.q.data() + row * channels},
              s,
              h / inputs.group(),
              attention_.config().shared_qk,
              part.keys,
              grad_keys};
        },
        grad_bias, of_forward.training);

    grad_keys.give(part.seen->plan.borrowed(), part.exchange.borrowed(0));
    part.exchange.start_back(communicator_->traffic().gradients);
    part.exchange.wait();
    grad_keys.add(part.seen->plan, part.exchange.lent(0));
    grad_keys.give(gradients.k.data(), gradients.v.data());
    if (gradients.attn_bias) grad_bias.add_to(gradients.attn_bias->data());
    if (gradients.relative_bias) grad_bias.add_to(gradients.relative_bias->data());
    if (gradients.sinks) room.add_sink_gradients(heads, gradients.sinks->data());
    const auto sum = [&](auto& gradient) {
      if (!gradient) return;
      std::vector<Scalar> numbers(gradient->data(), gradient->data() + gradient->size());
      detail::sum_over_ranks(*communicator_, numbers);
      std::copy(numbers.begin(), numbers.end(), gradient->data());
    };
    sum(gradients.attn_bias);
    sum(gradients.relative_bias);
    sum(gradients.sinks);
    return gradients;
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

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi
