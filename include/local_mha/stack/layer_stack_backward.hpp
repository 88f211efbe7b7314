// SPDX-License-Identifier: MIT
/// \file
/// The backward pass of LayerStack: from each branch to the one before it, each position on its
/// own.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>

#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/stack/layer_stack.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class LayerStackBackward {
  static constexpr Index count = block_rows<Scalar>;
  using Stack = LayerStack<Scalar, Storage, Arithmetic>;
  using Room = StackBackwardRoom<Scalar, Storage, Arithmetic>;
  using Connection = typename Stack::Connection;

 public:
  /// \param room prepared for the call
  /// \param grad `[B·N, dim]` of the result; becomes that of the input
  LayerStackBackward(const Stack& stack, Room& room, Index rows, Scalar* grad)
      : stack_(stack), room_(room), rows_{1, rows, count}, grad_(grad) {}

  /// What a branch is, and what it was given and gave.
  struct Branch {
    const Connection& connection;
    const SavedBranch<Scalar>& saved;
    std::optional<HyperConnectionParameters<Scalar>>& gradients;
  };

  /// Goes back from `behind` to `before`: takes the gradient of the input of one, which lies in the
  /// room, and gives that of the result of the other. Null: the end, or the beginning.
  void move(const AnyDevice& device, const Branch* behind, const Branch* before) {
    if (stack_.streams() == 1) {
      if (behind != nullptr) add(device);
      return;
    }
    if (behind != nullptr)
      room_.sums.prepare(ceil_div(rows_.count(), stretch_blocks), behind->connection->sums());
    for_each_stretch(device, rows_.count(), [&](Index worker, Index stretch, const Range& blocks) {
      auto& of_worker = room_.rooms[static_cast<std::size_t>(worker)];
      Scalar* const one = of_worker.one[0];
      Scalar* const room = of_worker.connection[0];
      for (Index b = blocks.begin; b < blocks.end; ++b) {
        Scalar* const of_streams = room_.streams[b];
        if (behind != nullptr) {
          load(room_.of_input.data(), b, one);
          behind->connection->apply_mix_backward(behind->saved.streams[b], behind->saved.result[b],
                                                 one, of_streams, room, room_.sums[stretch]);
        } else {
          load(grad_, b, one);
          stack_.expand(one, of_streams);
        }
        if (before != nullptr)
          before->connection->apply_add_backward(of_streams, before->saved.streams[b], one, room);
        else
          stack_.reduce(of_streams, one);
        store_block(stack_.dim(), rows_.rows(b), one,
                    StridedRows{before != nullptr ? room_.of_result.data() : grad_, stack_.dim(),
                                rows_.row(b)});
      }
    });
    if (behind != nullptr) behind->connection->add_gradients(room_.sums, *behind->gradients);
  }

  /// The gradient of the result of the branch that move() came to, rows.
  const Scalar* grad() const { return stack_.streams() == 1 ? grad_ : room_.of_result.data(); }

 private:
  void load(const Scalar* from, Index block, Scalar* to) const {
    load_block(stack_.dim(), rows_.rows(block), StridedRows{from, stack_.dim(), rows_.row(block)},
               to);
  }

  void add(const AnyDevice& device) {
    for_each_stretch(device, rows_.count(), [&](Index, Index, const Range& blocks) {
      const Index end = (std::min)(blocks.end * count, rows_.seqlen) * stack_.dim();
      for (Index i = blocks.begin * count * stack_.dim(); i < end; ++i)
        grad_[i] += room_.of_input[static_cast<std::size_t>(i)];
    });
  }

  const Stack& stack_;
  Room& room_;
  BatchBlocks rows_;
  Scalar* grad_;
};

template <typename Scalar, typename Storage, typename Arithmetic>
void LayerStack<Scalar, Storage, Arithmetic>::backward(const AnyDevice& device,
                                                       EncoderParameters<Scalar>& gradients,
                                                       Workspace& workspace, const Saved& saved,
                                                       TensorView<Scalar, 3> grad) const
  requires Trainable<Scalar, Storage, Arithmetic>
{
  workspace.prepare_attentions(*this);
  run_back(device, gradients, workspace, saved, grad,
           [&](std::size_t i, const LocalMHA<Scalar, Storage, Arithmetic>& attention,
               LocalMHAParameters<Scalar>& to, const SavedLayer<Scalar>& kept,
               const TensorView<const Scalar, 3>& grad_y, const TensorView<const Scalar, 3>& x,
               const TensorView<Scalar, 3>& grad_x, Tensor<Scalar, 3>* grad_bias) {
             attention.backward_into(grad_x, workspace.attentions_[to_size(layers_[i].kind)], to,
                                     kept, grad_y, x, {.attn_bias = attn_bias(), .device = device},
                                     grad_bias);
           });
}

template <typename Scalar, typename Storage, typename Arithmetic>
template <typename Attend>
void LayerStack<Scalar, Storage, Arithmetic>::run_back(const AnyDevice& device,
                                                       EncoderParameters<Scalar>& gradients,
                                                       Workspace& workspace, const Saved& saved,
                                                       TensorView<Scalar, 3> grad,
                                                       Attend&& attend) const
  requires Trainable<Scalar, Storage, Arithmetic>
{
  const auto shape = saved.shape;
  const Index rows = shape[0] * shape[1];
  if (layers_.empty()) {
    for (Index i = 0; i < grad.size(); ++i) grad.data()[i] *= Scalar(static_cast<double>(streams_));
    return;
  }
  std::optional<Tensor<Scalar, 3>> grad_bias;
  if (bias_) grad_bias = bias_->constant(Scalar(0));
  auto& room = workspace.backward_;
  room.prepare(*this, rows, thread_count(device));
  const TensorView<Scalar, 3> of_input(room.of_input.data(), shape);
  using Back = LayerStackBackward<Scalar, Storage, Arithmetic>;
  Back back(*this, room, rows, grad.data());
  std::optional<typename Back::Branch> behind;
  const auto move_to = [&](const typename Back::Branch& before) {
    back.move(device, behind ? &*behind : nullptr, &before);
    behind.emplace(before);
  };
  const auto rows_of = [&](const SavedBranch<Scalar>& branch) {
    return TensorView<const Scalar, 3>(branch.input.data(), shape);
  };
  for (std::size_t i = layers_.size(); i-- > 0;) {
    const Layer& layer = layers_[i];
    auto& to = gradients.layers[i];
    const auto& kept = saved.layers[i];

    move_to({layer.feed_forward_connection, kept.feed_forward_branch, to.feed_forward_connection});
    layer.feed_forward.backward_into(of_input, room.feed_forward, to.feed_forward,
                                     kept.feed_forward, {back.grad(), shape},
                                     rows_of(kept.feed_forward_branch), {.device = device});

    move_to({layer.attention_connection, kept.attention_branch, to.attention_connection});
    const TensorView<const Scalar, 3> of_result(back.grad(), shape);
    attend(i, layer.attention, to.attention, kept.attention, of_result,
           rows_of(kept.attention_branch), of_input, grad_bias ? &*grad_bias : nullptr);
  }
  back.move(device, &*behind, nullptr);
  if (!grad_bias) return;
  const LocalMHAConfig& first = layers_.front().attention.config();
  position_bias_->backward(*gradients.dynamic_pos_bias, *grad_bias, first.window_size,
                           first.look_backward, resolved_look_forward(first));
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
