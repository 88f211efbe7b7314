// SPDX-License-Identifier: MIT
/// \file
/// LocalAttention's backward pass of a batch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <vector>

#include <local_mha/attention/attention_dropout.hpp>
#include <local_mha/attention/backward_flow.hpp>
#include <local_mha/attention/bias_gradients.hpp>
#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/placement.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Takes batches through flows on the threads of a device, and holds the buffers for that.
/// \tparam Arithmetic as of AttentionKernel
template <typename Scalar, typename Arithmetic = Scalar>
class AttentionBackward {
 public:
  /// Allocates what run() of the same arguments uses.
  void prepare(const AnyDevice& device, const LocalAttentionConfig& config,
               const Placement<Scalar>& placement, const AttentionInputs<Scalar>& inputs,
               Index batch, Index dim_head, const BiasGradients<Scalar>& grad_bias) {
    const bool changes_scores = static_cast<bool>(inputs.score());
    const bool pins = inputs.pins();
    if (!made_for_ || !made_for_->is(config, inputs.window(), dim_head, changes_scores, pins)) {
      flows_.clear();
      made_for_ = Shape{config, inputs.window(), dim_head, changes_scores, pins};
    }
    const Index seqlen = inputs.longest();
    provide(
        flows_, (std::min)(thread_count(device), tasks(inputs, batch, grad_bias)),
        [&](const Flow& flow) { return flow.serves(seqlen); },
        [&] {
          return Flow(placement, inputs.window(), seqlen, dim_head, dim_head, changes_scores, pins);
        });
    const Index global_blocks = inputs.most_global_blocks();
    for (Flow& flow : flows_) flow.use(inputs.group(), global_blocks);
    grad_sinks_.prepare(inputs.sinks() != nullptr ? batch * inputs.heads() : 0);
  }

  /// \param placement that of the configuration
  /// \param head_of `head_of(s, h)` gives the blocks of head `h` of sequence `s`: see
  ///        AttentionBackwardFlow
  template <typename HeadOf>
  void run(const AnyDevice& device, const LocalAttentionConfig& config,
           const Placement<Scalar>& placement, const AttentionInputs<Scalar>& inputs, Index batch,
           Index dim_head, HeadOf&& head_of, BiasGradients<Scalar>& grad_bias,
           const std::optional<Training>& training) {
    prepare(device, config, placement, inputs, batch, dim_head, grad_bias);
    const AttentionDropout dropout{config.dropout, training};
    const auto run_heads = [&](Index worker, Index b, Index first_head, Index sequence) {
      Flow& flow = flows_[static_cast<std::size_t>(worker)];
      Index h = first_head;
      for (auto& member : flow.members(inputs.group())) {
        member.head = inputs.head(sequence, h);
        member.head.shared_qk = config.shared_qk;
        member.dropout = dropout.template of_head<Scalar>(sequence * inputs.heads() + h);
        member.grad_bias = grad_bias.of_head(b * inputs.heads() + h);
        member.grad_sink = grad_sinks_.of_head(b * inputs.heads() + h);
        ++h;
      }
      flow.run(placement.rotary(), inputs, sequence,
               [&](Index i) { return head_of(sequence, first_head + i); });
    };
    // What adds to one sum does so in the order of the batch.
    const Index number = tasks(inputs, batch, grad_bias);
    parallel_for(device, (std::min)(thread_count(device), number), number,
                 [&](Index worker, Index task) {
                   for (Index i = task; i < batch * inputs.kv_heads(); i += number) {
                     const Index b = i / inputs.kv_heads();
                     const Range sequences = inputs.sequences_of(b);
                     for (Index s = sequences.begin; s < sequences.end; ++s)
                       run_heads(worker, b, i % inputs.kv_heads() * inputs.group(), s);
                   }
                 });
  }

  /// Adds the gradients of sinks that the last run() gave.
  /// \param to `[heads]`
  void add_sink_gradients(Index heads, Scalar* to) const { grad_sinks_.add_to(heads, to); }

 private:
  using Flow = AttentionBackwardFlow<Scalar, Arithmetic>;

  // What all flows have been made for.
  struct Shape {
    LocalAttentionConfig config;
    Window window;
    Index dim_head;
    bool changes_scores;
    bool pins;

    bool is(const LocalAttentionConfig& other, const Window& other_window, Index channels,
            bool changes, bool pinned) const {
      return config == other && window == other_window && dim_head == channels &&
             changes_scores == changes && pins == pinned;
    }
  };

  // Those that add to no sum of another.
  static Index tasks(const AttentionInputs<Scalar>& inputs, Index batch,
                     const BiasGradients<Scalar>& grad_bias) {
    return grad_bias ? grad_bias.number() / inputs.group() : batch * inputs.kv_heads();
  }

  std::optional<Shape> made_for_;
  std::vector<Flow> flows_;  // of each worker
  SinkGradients<Scalar> grad_sinks_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
