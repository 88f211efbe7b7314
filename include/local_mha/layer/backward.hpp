// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA's backward pass: the layer's steps in reverse, each over all positions.
///
///     g_heads = g_y · W_out                         dW_out += g_yᵀ · (gate ⊙ out)
///     g_out = gate ⊙ g_heads                        g_gate = σ' · Σ_c g_heads · out
///     g_q, g_k, g_v = attention's backward(g_out)   through rotary and QkNorm, or RmsNorm
///     g_x = [g_q | g_k | g_v] · W_qkv               dW_qkv += [g_q | g_k | g_v]ᵀ · x
///     through the gates' projection and the norm of the input
///
/// The gradients of biases are sums over the positions, of `g_y` and of `[g_q | g_k | g_v]`.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <type_traits>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/local_attention.hpp>
#include <local_mha/attention/sequence_blocks.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/layer/backward_head.hpp>
#include <local_mha/layer/backward_room.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/project_rows.hpp>
#include <local_mha/ops/rms_norm.hpp>
#include <local_mha/ops/weight_gradient.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// The steps of LocalMHA::backward(), named and counted as those of LayerSteps.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class LayerBackward {
  using Weights = LayerWeights<Scalar, Storage, Arithmetic>;
  using AllRoom = LayerBackwardRoom<Scalar, Storage, Arithmetic>;
  using Head = LayerBackwardHead<Scalar, Storage, Arithmetic>;

 public:
  /// Makes the room for all that run() uses, but for what the attention takes for each of its
  /// workers.
  /// \param layer, saved, room must outlive this
  /// \param threads of the device
  LayerBackward(const Weights& layer, const SavedLayer<Scalar>& saved, AllRoom& room, Index threads)
      : layer_(layer), saved_(saved), room_(room), rows_(saved.rows) {
    room.prepare(layer, saved, threads);
  }

  /// run() of a part of sequences, whose keys are not all here.
  /// \param part `part.head(head, sequence)` gives the blocks of a LayerBackwardHead, and those
  ///        that are elsewhere; `part.finish(head_of)` adds what these and other parts have given
  ///        to one another, of heads `head_of(sequence, h)`
  template <typename Part>
  void run_part(const AnyDevice& device, const AttentionInputs<Scalar>& inputs,
                const std::optional<Training>& training, const StridedView<const Scalar>& x,
                const StridedView<const Scalar>& grad_y, const StridedView<Scalar>& grad_x,
                LocalMHAParameters<Scalar>& gradients,
                typename LocalAttention<Scalar>::BiasGradients& grad_bias, Part&& part) {
    layer_.attention.prepare_differentiate(device, room_.attention, inputs, saved_.batch,
                                           dim_head(), grad_bias);
    clear_rows_without_sequence(inputs, grad_x);
    if (rows_.count() > 0) to_out(device, x, grad_y, gradients);
    attend(device, inputs, training, gradients, grad_bias, part);
    if (rows_.count() > 0) to_qkv(device, x, grad_x, gradients);
  }

  /// \param x, grad_y, grad_x `[B, N, dim]`
  void run(const AnyDevice& device, const AttentionInputs<Scalar>& inputs,
           const std::optional<Training>& training, const StridedView<const Scalar>& x,
           const StridedView<const Scalar>& grad_y, const StridedView<Scalar>& grad_x,
           LocalMHAParameters<Scalar>& gradients,
           typename LocalAttention<Scalar>::BiasGradients& grad_bias);

 private:
  using L = Lanes<Scalar>;
  using Room = typename AllRoom::OfWorker;
  static constexpr bool of_operands = !std::is_same_v<Scalar, Arithmetic>;
  static constexpr Index count = block_rows<Scalar>;

  // `task(room, stretch, blocks)` with the room of the worker.
  template <typename Task>
  void over_stretches(const AnyDevice& device, Task&& task) {
    for_each_stretch(device, rows_.count(), [&](Index worker, Index stretch, const Range& blocks) {
      task(room_.rooms[static_cast<std::size_t>(worker)], stretch, blocks);
    });
  }

  const LocalMHAConfig& config() const { return layer_.config; }
  Index dim() const { return config().dim; }
  Index heads() const { return config().heads; }
  Index kv_heads() const { return resolved_kv_heads(config()); }
  Index qkv_heads() const { return detail::qkv_heads(config()); }
  Index dim_head() const { return config().dim_head; }
  Index head_channels() const { return padded_channels<Scalar>(dim_head()); }
  Index head_size() const { return head_channels() * count; }
  bool norms_all_heads() const { return layer_.norms_of_all.front().dim() > 0; }
  Index panels_of_head() const { return panel_channels<Scalar>(dim_head()) / count; }

  // What is no row of a block becomes 0.
  void load_rows(const StridedView<const Scalar>& from, Index block, Scalar* to) const {
    const LaneRange lanes = lanes_of(block);
    load_lanes(dim(), lanes, from.rows(rows_.row(block)), -lanes.begin, to);
    clear_other_lanes(dim(), lanes, to);
  }
  LaneRange lanes_of(Index block) const {
    const auto lane = static_cast<int>(rows_.lane(block));
    return {lane, lane + static_cast<int>(rows_.rows(block))};
  }

  // Steps 10 and 9: from the gradient of y to those of the heads' outputs and gates, and of to_out.
  void to_out(const AnyDevice& device, const StridedView<const Scalar>& x,
              const StridedView<const Scalar>& grad_y, LocalMHAParameters<Scalar>& gradients) {
    over_stretches(device, [&](Room& rooms, Index stretch, const Range& blocks) {
      Scalar* const room = rooms.block[0];
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        clear_filling_gates(block);
        load_rows(x, block, room);
        if (config().prenorm) {
          layer_.norm.apply(room);
          clear_other_lanes(dim(), lanes_of(block), room);
        }
        room_.normed_panels.put(block, 0, dim(), room);
      }
      const auto* passing =
          pass_rows(room_.to_out, blocks.end - blocks.begin, rooms.passing, [&](Index b) {
            const Index block = blocks.begin + b;
            Scalar* const grad = room_.grad_y.room(block, 0, rooms.grad_y[0]);
            load_rows(grad_y, block, grad);
            if (config().out_bias) add(dim(), grad, room_.out_sums[stretch]);
            room_.grad_y.put(block, 0, dim(), grad);
            return grad;
          });
      for (Index h = 0; h < heads(); ++h) {
        project(room_.to_out, h, passing, blocks.end - blocks.begin,
                [&](Index b) { return room_.grad_out[blocks.begin + b] + h * head_size(); });
        for (Index block = blocks.begin; block < blocks.end; ++block) gate(block, h, room);
      }
    });
    add_weight_gradient(device, rows_.count(), room_.grad_y[0], room_.grad_y.stride(),
                        Groups::of(dim()), room_.out_panels,
                        Groups::of(heads(), dim_head(), panel_channels<Scalar>(dim_head())),
                        gradients.to_out.data());
    if (config().out_bias) room_.out_sums.add_to(gradients.to_out_bias);
  }

  // A projection multiplies what fills up the gates' channels by 0.
  void clear_filling_gates(Index block) {
    if (!config().gate_values_per_head) return;
    std::fill(room_.grad_gates[block] + heads() * count,
              room_.grad_gates[block] + room_.grad_gates.stride(), Scalar(0));
  }

  // Step 9: through the gate of a head, and the operand of to_out's gradient.
  void gate(Index block, Index h, Scalar* gated) {
    const Scalar* out = saved_.out[block] + h * head_size();
    Scalar* grad = room_.grad_out[block] + h * head_size();
    const auto put = [&](const Scalar* gated_out) {
      room_.out_panels.put(block, h * panels_of_head(), dim_head(), gated_out);
    };
    if (!config().gate_values_per_head) return put(out);
    const L gate = L::load(saved_.gates[block] + h * count);
    const L grad_gate = dot(dim_head(), grad, out);
    // σ' = σ·(1 − σ)
    (grad_gate * (gate - gate * gate)).store(room_.grad_gates[block] + h * count);
    for (Index c = 0; c < dim_head(); ++c) {
      (gate * L::load(out + c * count)).store(gated + c * count);
      (gate * L::load(grad + c * count)).store(grad + c * count);
    }
    put(gated);
  }

  // Where all is here.
  struct Whole {
    const Head& head(const Head& head, Index) const { return head; }
    template <typename HeadOf>
    void finish(HeadOf&&) const {}
  };

  // Steps 8 to 3: from the gradients of the heads' outputs to those of queries, keys and values as
  // they were projected.
  template <typename Part>
  void attend(const AnyDevice& device, const AttentionInputs<Scalar>& inputs,
              const std::optional<Training>& training, LocalMHAParameters<Scalar>& gradients,
              typename LocalAttention<Scalar>::BiasGradients& grad_bias, Part&& part) {
    StretchSums<Scalar>& scale_sums = room_.scale_sums;
    const auto head_of = [&](Index sequence, Index h) {
      const Index before = inputs.own(sequence).begin / count;
      return Head{layer_,
                  saved_,
                  room_,
                  inputs.item(sequence),
                  rows_.first_block(sequence) - before,
                  before + rows_.blocks_of(sequence),
                  h,
                  h / inputs.group()};
    };
    layer_.attention.differentiate(
        device, room_.attention, inputs, saved_.batch, dim_head(),
        [&](Index sequence, Index h) { return part.head(head_of(sequence, h), sequence); },
        grad_bias, training);
    part.finish(head_of);
    if (config().sinks) room_.attention.add_sink_gradients(heads(), gradients.sinks.data());
    if (norms_all_heads()) qk_norm_of_all(device);
    // Those that the configuration has not are empty.
    const Index channels = norms_all_heads() ? heads() * dim_head() : dim_head();
    for (Vector<Scalar>* of_queries : {&gradients.q_scale, &gradients.q_norm_weight})
      scale_sums.add_to(*of_queries);
    for (Vector<Scalar>* of_keys : {&gradients.k_scale, &gradients.k_norm_weight})
      scale_sums.add_to(*of_keys, channels);
  }

  L saved_inverse(Index part, Index block) const {
    return L::load(saved_.inverses[block] + part * count);
  }

  // Step 3 where it is over all heads.
  void qk_norm_of_all(const AnyDevice& device) {
    over_stretches(device, [&](Room&, Index stretch, const Range& blocks) {
      for (Index block = blocks.begin; block < blocks.end; ++block)
        for (Index part = 0; part < 2; ++part) {
          const RmsNorm<Scalar>& norm = layer_.norms_of_all[static_cast<std::size_t>(part)];
          const L inverse = saved_inverse(part, block);
          const Scalar* x = (part == 0 ? saved_.q : saved_.k)[block];
          Scalar* grad = room_.grad_qkv[block] + part * heads() * head_size();
          Scalar* sums = room_.scale_sums[stretch] + part * heads() * dim_head() * count;
          L along = L::zero();
          const Index number = part == 0 ? heads() : kv_heads();
          for (Index h = 0; h < number; ++h)
            along = along + norm.begin_backward(h * dim_head(), dim_head(), inverse,
                                                x + h * head_size(), grad + h * head_size(),
                                                sums + h * dim_head() * count);
          for (Index h = 0; h < number; ++h)
            norm.end_backward(dim_head(), inverse, along, x + h * head_size(),
                              grad + h * head_size());
        }
    });
  }

  // Steps 2, 9 and 1: from the gradients of queries, keys, values and gates to those of x and the
  // weights.
  void to_qkv(const AnyDevice& device, const StridedView<const Scalar>& x,
              const StridedView<Scalar>& grad_x, LocalMHAParameters<Scalar>& gradients) {
    const bool gates = config().gate_values_per_head;
    StretchSums<Scalar>& norm_sums = room_.norm_sums;
    StretchSums<Scalar>& gate_sums = room_.gate_sums;
    over_stretches(device, [&](Room& rooms, Index stretch, const Range& blocks) {
      const Index size = blocks.end - blocks.begin;
      BlockArray<Scalar>& grad = rooms.grad;
      pass(room_.to_qkv, blocks, room_.grad_qkv, room_.multiplied_qkv, rooms, grad);
      if (gates) {
        BlockArray<Scalar>& more = rooms.more;
        pass(room_.to_v_gate, blocks, room_.grad_gates, room_.multiplied_gates, rooms, more);
        for (Index b = 0; b < size; ++b) {
          add(dim(), more[b], grad[b]);
          add(heads(), room_.grad_gates[blocks.begin + b], gate_sums[stretch]);
        }
      }
      if (config().qkv_bias)
        for (Index block = blocks.begin; block < blocks.end; ++block)
          for (Index group = 0; group < qkv_heads(); ++group)
            add(dim_head(), room_.grad_qkv[block] + group * head_size(),
                room_.qkv_sums[stretch] + group * dim_head() * count);
      Scalar* const room = rooms.block[0];
      for (Index b = 0; b < size; ++b) {
        const Index block = blocks.begin + b;
        if (config().prenorm) {
          load_rows(x, block, room);
          layer_.norm.apply_backward(room, grad[b], norm_sums[stretch]);
        }
        const LaneRange lanes = lanes_of(block);
        store_lanes(dim(), lanes, grad[b], grad_x.rows(rows_.row(block)), -lanes.begin);
      }
    });
    add_gradient(device, multiplied(room_.grad_qkv, room_.multiplied_qkv),
                 Groups::of(qkv_heads(), dim_head(), head_channels()), gradients.to_qkv);
    if (gates)
      add_gradient(device, multiplied(room_.grad_gates, room_.multiplied_gates),
                   Groups::of(heads()), gradients.to_v_gate_weight);
    if (config().prenorm) {
      norm_sums.add_to(gradients.norm_weight);
      norm_sums.add_to(gradients.norm_bias, dim());  // if there is one
    }
    if (gates) gate_sums.add_to(gradients.to_v_gate_bias);
    if (config().qkv_bias) room_.qkv_sums.add_to(gradients.to_qkv_bias);
  }

  // Blocks of gradients of what a weight gave, to those of what it was given: as operands, they are
  // kept for the gradient of the weight.
  template <typename Weight>
  static void pass(const Weight& weight, const Range& blocks, const BlockArray<Scalar>& from,
                   [[maybe_unused]] BlockArray<Scalar, Arithmetic>& multiplied, Room& rooms,
                   BlockArray<Scalar>& to) {
    const Index size = blocks.end - blocks.begin;
    const auto* passing = pass_rows(weight, size, rooms.passing, [&](Index b) {
      const Scalar* const grad = from[blocks.begin + b];
      if constexpr (of_operands) multiplied.put(blocks.begin + b, 0, from.channels(), grad);
      return grad;
    });
    project(weight, 0, passing, size, [&](Index b) { return to[b]; });
  }

  // Those of gradients that were kept so.
  static const auto& multiplied(const BlockArray<Scalar>& numbers,
                                const BlockArray<Scalar, Arithmetic>& operands) {
    if constexpr (of_operands)
      return operands;
    else
      return numbers;
  }

  // The gradient of a weight that the normalized rows pass.
  void add_gradient(const AnyDevice& device, const BlockArray<Scalar, Arithmetic>& grad,
                    const Groups& rows, RowMatrix<Scalar>& gradient) const {
    add_weight_gradient(device, rows_.count(), grad[0], grad.stride(), rows, room_.normed_panels,
                        Groups::of(dim()), gradient.data());
  }

  static void add(Index channels, const Scalar* from, Scalar* to) {
    for (Index c = 0; c < channels; ++c)
      (L::load(to + c * count) + L::load(from + c * count)).store(to + c * count);
  }

  const Weights& layer_;
  const SavedLayer<Scalar>& saved_;
  AllRoom& room_;
  const SequenceBlocks& rows_;
};

template <typename Scalar, typename Storage, typename Arithmetic>
void LayerBackward<Scalar, Storage, Arithmetic>::run(
    const AnyDevice& device, const AttentionInputs<Scalar>& inputs,
    const std::optional<Training>& training, const StridedView<const Scalar>& x,
    const StridedView<const Scalar>& grad_y, const StridedView<Scalar>& grad_x,
    LocalMHAParameters<Scalar>& gradients,
    typename LocalAttention<Scalar>::BiasGradients& grad_bias) {
  layer_.attention.prepare_differentiate(device, room_.attention, inputs, saved_.batch, dim_head(),
                                         grad_bias);
  clear_rows_without_sequence(inputs, grad_x);
  if (rows_.count() == 0) return;
  to_out(device, x, grad_y, gradients);
  attend(device, inputs, training, gradients, grad_bias, Whole());
  to_qkv(device, x, grad_x, gradients);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
