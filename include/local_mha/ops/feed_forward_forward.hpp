// SPDX-License-Identifier: MIT
/// \file
/// The forward pass of FeedForward.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <optional>
#include <string>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/feed_forward.hpp>
#include <local_mha/ops/project_rows.hpp>
#include <local_mha/ops/weight_gradient.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

template <typename Scalar, typename Storage, typename Arithmetic>
RowMatrix<Scalar> FeedForward<Scalar, Storage, Arithmetic>::flow(
    const Eigen::Ref<const RowMatrix<Scalar>>& x, const ModuleCall& call, Saved* saved) const {
  if (x.cols() != dim_) reject("x", std::to_string(dim_) + " columns", x.cols());
  const std::optional<detail::PlacedDropout<Scalar>> dropout = dropout_of(call.training);
  if (saved != nullptr) prepare(*saved, x.rows());
  RowMatrix<Scalar> y(x.rows(), dim_);
  for_each_stretch(
      call.device, ceil_div(x.rows(), count),
      [&](Index, Index, const Range& some) {
        Workspace workspace(*this);
        run({some.begin * count, (std::min)(some.end * count, x.rows())}, x.data(), x.outerStride(),
            y.data(), workspace, dropout, false, saved);
      },
      forward_stretch_blocks);
  return y;
}

template <typename Scalar, typename Storage, typename Arithmetic>
void FeedForward<Scalar, Storage, Arithmetic>::flow(TensorView<Scalar, 3> y, Workspace& workspace,
                                                    TensorView<const Scalar, 3> x,
                                                    const ModuleCall& call, Saved* saved) const {
  const std::optional<detail::PlacedDropout<Scalar>> dropout = dropout_of(call.training);
  const Index rows = x.dimension(0) * x.dimension(1);
  const Index rows_of_task = forward_stretch_blocks * count;
  const Index tasks = ceil_div(rows, rows_of_task);
  const Index threads = (std::min)(thread_count(call.device), tasks);
  const auto room_of = [&](Index worker) -> Workspace& {
    return worker == 0 ? workspace : workspace.of_threads_[static_cast<std::size_t>(worker - 1)];
  };
  if (std::ssize(workspace.of_threads_) < threads - 1)
    workspace.of_threads_.resize(static_cast<std::size_t>(threads - 1));
  for (Index worker = 0; worker < threads; ++worker) room_of(worker).prepare(*this);
  if (saved != nullptr) prepare(*saved, rows);
  parallel_for(call.device, threads, tasks, [&](Index worker, Index task) {
    run({task * rows_of_task, (std::min)((task + 1) * rows_of_task, rows)}, x.data(), dim_,
        y.data(), room_of(worker), dropout, false, saved);
  });
}

template <typename Scalar, typename Storage, typename Arithmetic>
void FeedForward<Scalar, Storage, Arithmetic>::run(
    const Range& rows, const Scalar* x, Index x_stride, Scalar* y, Workspace& workspace,
    const std::optional<detail::PlacedDropout<Scalar>>& dropout, bool single, Saved* saved) const {
  Index first = rows.begin;
  map_rows(rows.end - rows.begin, dim_, x + rows.begin * x_stride, x_stride, dim_,
           y + rows.begin * dim_, together, workspace.in_.data(), workspace.out_.data(),
           [&](Index blocks, Scalar* in, Scalar* out) {
             apply(first, rows.end, blocks, in, out, workspace, dropout, single, saved);
             first += blocks * count;
           });
}

template <typename Scalar, typename Storage, typename Arithmetic>
void FeedForward<Scalar, Storage, Arithmetic>::apply(
    Index first, Index rows, Index blocks, Scalar* in, Scalar* out, Workspace& workspace,
    const std::optional<detail::PlacedDropout<Scalar>>& dropout, bool single, Saved* saved) const {
  const auto value = [&](Index b) { return workspace.values_.data() + b * inner_ * count; };
  const auto gate = [&](Index b) { return workspace.gates_.data() + b * inner_ * count; };
  project_rows(
      weights_->proj_in, blocks, single, workspace.passing_,
      [&](Index b) {
        Scalar* const x = in + b * dim_ * count;
        const Index rows_of_block = (std::min)(count, rows - first - b * count);
        weights_->norm.apply(x);
        clear_other_lanes(dim_, {0, static_cast<int>(rows_of_block)}, x);
        return x;
      },
      [&](Index group, Index b) { return group == 0 ? value(b) : gate(b); });
  if (saved != nullptr) {
    std::copy_n(value(0), blocks * inner_ * count, saved->values[first / count]);
    std::copy_n(gate(0), blocks * inner_ * count, saved->gates[first / count]);
  }
  project_rows(
      weights_->proj_out, blocks, single, workspace.passing_,
      [&](Index b) {
        hide(dropout, first + b * count, value(b), gate(b));
        return value(b);
      },
      [&](Index, Index b) { return out + b * dim_ * count; });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
