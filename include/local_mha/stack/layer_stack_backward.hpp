// SPDX-License-Identifier: MIT
/// \file
/// The backward pass of LayerStack: from each branch to the one before it, each position on its
/// own.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/stack/layer_stack.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

template <typename Scalar>
class LayerStackBackward {
  using L = Lanes<Scalar>;
  static constexpr Index count = block_rows<Scalar>;
  using Stack = LayerStack<Scalar>;
  using Connection = typename Stack::Connection;

 public:
  /// \param grad `[B·N, dim]` of the result; becomes that of the input
  LayerStackBackward(const Stack& stack, Index rows, Scalar* grad)
      : stack_(stack), rows_{1, rows, count}, grad_(grad) {
    if (stack.streams() == 1) return;
    through_.resize(rows, stack.dim());
    streams_.prepare(rows_.count(), stack.streams() * stack.dim());
  }

  /// What a branch is, and what it was given and gave.
  struct Branch {
    const Connection& connection;
    const SavedBranch<Scalar>& saved;
    std::optional<HyperConnectionParameters<Scalar>>& gradients;
  };

  /// Goes back from `behind` to `before`: takes the gradient of the input of one, and gives that of
  /// the result of the other. Null: the end, or the beginning.
  /// \param of_input rows; not that of grad()
  void move(const AnyDevice& device, const Branch* behind, const Scalar* of_input,
            const Branch* before) {
    if (stack_.streams() == 1) return add(device, behind != nullptr ? of_input : nullptr);
    if (behind != nullptr) sums_.prepare(ceil_div(rows_.count(), stretch_blocks), sums_channels());
    for_each_stretch(device, rows_.count(), [&](Index stretch, const Range& blocks) {
      auto one = make_block_buffer<Scalar>(stack_.dim() * count);
      auto room = make_block_buffer<Scalar>(any_connection().room() * count);
      for (Index b = blocks.begin; b < blocks.end; ++b) {
        Scalar* const of_streams = streams_[b];
        if (behind != nullptr) {
          load(of_input, b, one.data());
          behind->connection->apply_mix_backward(behind->saved.streams[b], behind->saved.result[b],
                                                 one.data(), of_streams, room.data(),
                                                 sums_[stretch]);
        } else {
          load(grad_, b, one.data());
          stack_.expand(one.data(), of_streams);
        }
        if (before != nullptr)
          before->connection->apply_add_backward(of_streams, before->saved.streams[b], one.data(),
                                                 room.data());
        else
          stack_.reduce(of_streams, one.data());
        store_block(
            stack_.dim(), rows_.rows(b), one.data(),
            StridedRows{before != nullptr ? through_.data() : grad_, stack_.dim(), rows_.row(b)});
      }
    });
    if (behind != nullptr) behind->connection->add_gradients(sums_, *behind->gradients);
  }

  /// The gradient of the result of the branch that move() came to, rows.
  const Scalar* grad() const { return stack_.streams() == 1 ? grad_ : through_.data(); }

 private:
  const HyperConnection<Scalar>& any_connection() const {
    return *stack_.layers().front().attention_connection;
  }
  Index sums_channels() const { return any_connection().sums(); }
  void load(const Scalar* from, Index block, Scalar* to) const {
    load_block(stack_.dim(), rows_.rows(block), StridedRows{from, stack_.dim(), rows_.row(block)},
               to);
  }

  void add(const AnyDevice& device, const Scalar* of_input) {
    if (of_input == nullptr) return;
    for_each_stretch(device, rows_.count(), [&](Index, const Range& blocks) {
      const Index end = (std::min)(blocks.end * count, rows_.seqlen) * stack_.dim();
      for (Index i = blocks.begin * count * stack_.dim(); i < end; ++i) grad_[i] += of_input[i];
    });
  }

  const Stack& stack_;
  BatchBlocks rows_;
  Scalar* grad_;
  RowMatrix<Scalar> through_;
  BlockArray<Scalar> streams_;
  StretchSums<Scalar> sums_;
};

template <typename Scalar>
void LayerStack<Scalar>::backward(const AnyDevice& device, EncoderParameters<Scalar>& gradients,
                                  const Saved& saved, TensorView<Scalar, 3> grad) const {
  const auto shape = saved.shape;
  const Index rows = shape[0] * shape[1];
  if (layers_.empty()) {
    for (Index i = 0; i < grad.size(); ++i) grad.data()[i] *= Scalar(static_cast<double>(streams_));
    return;
  }
  std::optional<Tensor<Scalar, 3>> grad_bias;
  if (bias_) grad_bias = bias_->constant(Scalar(0));
  std::vector<typename LocalMHA<Scalar>::Workspace> workspaces(to_size(kinds_));
  Tensor<Scalar, 3> of_input(shape[0], shape[1], shape[2]);
  using Back = LayerStackBackward<Scalar>;
  Back back(*this, rows, grad.data());
  std::optional<typename Back::Branch> behind;
  const auto move_to = [&](const typename Back::Branch& before) {
    back.move(device, behind ? &*behind : nullptr, of_input.data(), &before);
    behind.emplace(before);
  };
  for (std::size_t i = layers_.size(); i-- > 0;) {
    const Layer& layer = layers_[i];
    auto& to = gradients.layers[i];
    const auto& kept = saved.layers[i];
    using Rows = Eigen::Map<const RowMatrix<Scalar>>;

    move_to({layer.feed_forward_connection, kept.feed_forward_branch, to.feed_forward_connection});
    Eigen::Map<RowMatrix<Scalar>>(of_input.data(), rows, dim_) = layer.feed_forward.backward(
        to.feed_forward, kept.feed_forward, Rows(back.grad(), rows, dim_),
        Rows(kept.feed_forward_branch.input.data(), rows, dim_), {.device = device});

    move_to({layer.attention_connection, kept.attention_branch, to.attention_connection});
    layer.attention.backward_into(of_input, workspaces[to_size(layer.kind)], to.attention,
                                  kept.attention, {back.grad(), shape}, kept.attention_branch.input,
                                  {.attn_bias = attn_bias(), .device = device},
                                  grad_bias ? &*grad_bias : nullptr);
  }
  back.move(device, &*behind, of_input.data(), nullptr);
  if (!grad_bias) return;
  const LocalMHAConfig& first = layers_.front().attention.config();
  position_bias_->backward(*gradients.dynamic_pos_bias, *grad_bias, first.window_size,
                           first.look_backward, resolved_look_forward(first));
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
