// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA's forward pass of a batch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/past.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/task_order.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/layer/plan.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/layer/worker.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Takes batches through LayerWorkers on the threads of a device, and holds the buffers for that.
/// Sequences follow one another through `pasts_`; workers share the one of a sequence.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class LayerForward {
  using Weights = LayerWeights<Scalar, Storage, Arithmetic>;

 public:
  LayerForward() = default;
  // Not to be copied.
  LayerForward(LayerForward&&) = default;
  LayerForward& operator=(LayerForward&&) = default;
  ~LayerForward() = default;

  /// \param x, y the batch, `[B, N, dim]`
  /// \param saved null, or where is kept what the backward pass needs
  void run(const AnyDevice& device, const Weights& weights, const AttentionInputs<Scalar>& inputs,
           const std::optional<Training>& training, const StridedView<const Scalar>& x,
           const StridedView<Scalar>& y, SavedLayer<Scalar>* saved) {
    prepare(weights, inputs, thread_count(device));
    clear_rows_without_sequence(inputs, y);
    const auto work = [&](Index worker, Index) {
      try {
        take_tasks(*workers_[static_cast<std::size_t>(worker)], inputs, training, x, y, saved);
      } catch (...) {
        order_->abandon();
        throw;
      }
    };
    parallel_for(device, plan_.workers(), plan_.workers(), work);
  }

 private:
  using Worker = LayerWorker<Scalar, Storage, Arithmetic>;
  using BatchPast = typename Worker::BatchPast;

  void prepare(const Weights& weights, const AttentionInputs<Scalar>& inputs, Index threads) {
    plan_.assign(inputs, threads);
    const Window& window = inputs.window();
    const Index longest = inputs.longest();
    const typename BatchPast::Size size = size_of_past(weights.config, window, longest);
    provide(
        workers_, plan_.workers(),
        [&](const auto& worker) { return worker->fits(weights, window, longest); },
        [&] { return std::make_unique<Worker>(weights, window, longest); });
    provide(
        pasts_, plan_.pasts(), [&](const auto& past) { return past->serves(size); },
        [&] { return std::make_unique<BatchPast>(size); });
    for (auto& worker : workers_) worker->steps().use(weights);
    // Not to be moved, nor copied.
    if (!order_) order_ = std::make_unique<TaskOrder>();
    order_->start(plan_.tasks(), plan_.waiting());
  }

  // Holds the stretches that wait, and the keys that the first of them looks back at.
  typename BatchPast::Size size_of_past(const LocalMHAConfig& config, const Window& window,
                                        Index seqlen) const {
    constexpr Index count = block_rows<Scalar>;
    const Index behind = (std::min)(window.reach_behind(), seqlen);
    const Index waiting = plan_.waiting() * plan_.stretch_rows() / count;
    const Index blocks = ceil_div(seqlen, count);
    return {.heads = config.heads,
            .dim_head = config.dim_head,
            .gated = config.gate_values_per_head,
            .waiting = (std::min)(waiting, blocks),
            .kept = (std::min)(ceil_div(behind, count) + waiting, blocks),
            .kv_heads = resolved_kv_heads(config),
            .pinned = ceil_div((std::min)(window.first_keys(), seqlen), count)};
  }

  // Until none is left.
  void take_tasks(Worker& worker, const AttentionInputs<Scalar>& inputs,
                  const std::optional<Training>& training, const StridedView<const Scalar>& x,
                  const StridedView<Scalar>& y, SavedLayer<Scalar>* saved) {
    const auto next = [&] {
      return order_->next([&](Index task) { return plan_.needs(task, inputs.window()); });
    };
    Index sequence = -1;
    for (auto task = next(); task.kind != TaskOrder::Kind::none; order_->end(task), task = next()) {
      const Index s = plan_.sequence(task.i);
      if (s != std::exchange(sequence, s))
        worker.steps().take_sequence(inputs, s, training, saved, plan_.blocks().first_block(s));
      BatchPast& past = *pasts_[static_cast<std::size_t>(plan_.past(s))];
      const Range rows = plan_.rows(task.i);
      const Index first = plan_.blocks().place(s) + rows.begin;
      if (task.kind == TaskOrder::Kind::make)
        worker.make(past, rows, x.rows(first));
      else
        worker.answer(past, rows, y.rows(first));
    }
  }

  LayerPlan<Scalar, Arithmetic> plan_;
  // Which move without their rooms.
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<std::unique_ptr<BatchPast>> pasts_;
  std::unique_ptr<TaskOrder> order_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
