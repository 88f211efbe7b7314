// SPDX-License-Identifier: MIT
/// \file
/// LocalAttention's forward pass of a batch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include <local_mha/attention/attention_dropout.hpp>
#include <local_mha/attention/forward_flow.hpp>
#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/placement.hpp>
#include <local_mha/attention/plan.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// The tensors of a call.
template <typename Scalar>
struct AttentionTensors {
  const Scalar* q;  ///< `[B, H, N, dim_head]`
  const Scalar* k;  ///< `[B, H_kv, N, dim_head]`
  const Scalar* v;  ///< `[N, dim_value]` of each head of k, so far apart; 0: the same for all
  Index v_stride;
  Index batch;
  Index seqlen;
  Index dim_head;
  Index dim_value;
  Scalar* out;                 ///< `[B, H, N, dim_value]`
  Scalar* lse = nullptr;       ///< null, or `[B, H, N]`
  Scalar* lse_rest = nullptr;  ///< the same
};

/// Takes batches through flows on the threads of a device, and holds the buffers for that.
/// \tparam Arithmetic as of AttentionKernel
template <typename Scalar, typename Arithmetic = Scalar>
class AttentionForward {
 public:
  /// \param placement that of the configuration; must outlive the call
  void run(const AnyDevice& device, const LocalAttentionConfig& config,
           const Placement<Scalar>& placement, const AttentionInputs<Scalar>& inputs,
           const AttentionTensors<Scalar>& tensors, const std::optional<Training>& training) {
    plan_.assign(inputs, tensors.batch, thread_count(device));
    prepare(config, placement, inputs, tensors.dim_head, tensors.dim_value, plan_.workers());
    const AttentionDropout dropout{config.dropout, training};
    parallel_for(device, plan_.workers(), plan_.tasks(), [&](Index worker, Index i) {
      const auto task = plan_.task(i);
      const Index item = inputs.item(task.sequence);
      const Index row = inputs.rows(task.sequence).begin;
      const Index shared = item * inputs.kv_heads() + task.kv_head;
      const auto at = [&](Index head, Index channels) {
        return (head * tensors.seqlen + row) * channels;
      };
      flows_[static_cast<std::size_t>(worker)].run(
          inputs, task.sequence, task.kv_head, task.queries, dropout,
          [&](Index h) -> typename Flow::Rows {
            const Index head = item * inputs.heads() + h;
            return {tensors.q + at(head, tensors.dim_head),
                    tensors.k + at(shared, tensors.dim_head),
                    tensors.v + shared * tensors.v_stride + row * tensors.dim_value,
                    tensors.out + at(head, tensors.dim_value),
                    tensors.lse != nullptr ? tensors.lse + at(head, 1) : nullptr,
                    tensors.lse != nullptr ? tensors.lse_rest + at(head, 1) : nullptr};
          });
    });
  }

  using Task = typename AttentionPlan<Scalar>::Task;

  /// Takes some stretches of queries, whose rows may lie anywhere.
  /// \param rows_of `rows_of(sequence, h)` gives the Rows of head `h` of AttentionForwardFlow
  template <typename RowsOf>
  void run_some(const AnyDevice& device, const LocalAttentionConfig& config,
                const Placement<Scalar>& placement, const AttentionInputs<Scalar>& inputs,
                Index dim_head, std::span<const Task> tasks,
                const std::optional<Training>& training, RowsOf&& rows_of) {
    const auto number = static_cast<Index>(tasks.size());
    const Index workers = (std::min)(thread_count(device), number);
    prepare(config, placement, inputs, dim_head, dim_head, workers);
    const AttentionDropout dropout{config.dropout, training};
    parallel_for(device, workers, number, [&](Index worker, Index i) {
      const Task& task = tasks[static_cast<std::size_t>(i)];
      flows_[static_cast<std::size_t>(worker)].run(
          inputs, task.sequence, task.kv_head, task.queries, dropout,
          [&](Index h) -> typename Flow::Rows { return rows_of(task.sequence, h); });
    });
  }

 private:
  using Flow = AttentionForwardFlow<Scalar, Arithmetic>;

  void prepare(const LocalAttentionConfig& config, const Placement<Scalar>& placement,
               const AttentionInputs<Scalar>& inputs, Index dim_head, Index dim_value,
               Index workers) {
    const Window& window = inputs.window();
    const Index seqlen = inputs.longest();
    const bool pins = inputs.pins();
    if (made_for_ != config) {
      flows_.clear();
      made_for_ = config;
    }
    provide(
        flows_, workers,
        [&](const Flow& flow) { return flow.fits(window, seqlen, dim_head, dim_value, pins); },
        [&] { return Flow(placement, window, seqlen, dim_head, dim_value, pins); });
    const Index global_blocks = inputs.most_global_blocks();
    for (Flow& flow : flows_) flow.use(placement, inputs.group(), global_blocks);
  }

  AttentionPlan<Scalar> plan_;
  std::optional<LocalAttentionConfig> made_for_;
  std::vector<Flow> flows_;  // of each worker
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
