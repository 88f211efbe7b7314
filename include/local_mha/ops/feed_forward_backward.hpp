// SPDX-License-Identifier: MIT
/// \file
/// The backward pass of FeedForward.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/ops/activations.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/feed_forward.hpp>
#include <local_mha/ops/packed_weight.hpp>
#include <local_mha/ops/project_rows.hpp>
#include <local_mha/ops/weight_gradient.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

template <typename Scalar, typename Storage, typename Arithmetic>
void FeedForward<Scalar, Storage, Arithmetic>::differentiate_geglu(const Scalar* values,
                                                                   const Scalar* gates,
                                                                   Scalar* grad_values,
                                                                   Scalar* grad_gates) const {
  for (Index i = 0; i < inner_ * count; i += count) {
    const L gate = L::load(gates + i);
    const Normal<Scalar> at = normal(gate);
    const L grad = L::load(grad_values + i);
    // gelu'(x) = Φ(x) + x·φ(x)
    const L slope = fma(gate, at.density, at.distribution);
    (grad * L::load(values + i) * slope).store(grad_gates + i);
    (grad * (gate * at.distribution)).store(grad_values + i);
  }
}

template <typename Scalar, typename Storage, typename Arithmetic>
RowMatrix<Scalar> FeedForward<Scalar, Storage, Arithmetic>::backward(
    Parameters& gradients, const Saved& saved, const Eigen::Ref<const RowMatrix<Scalar>>& grad_y,
    const Eigen::Ref<const RowMatrix<Scalar>>& x, const ModuleCall& call) const
  requires detail::Trainable<Scalar, Storage, Arithmetic>
{
  if (x.cols() != dim_) reject("x", std::to_string(dim_) + " columns", x.cols());
  require_shape<2>("grad_y", {grad_y.rows(), grad_y.cols()}, {x.rows(), x.cols()});
  RowMatrix<Scalar> grad_x(x.rows(), dim_);
  BackwardRoom room;
  flow_back(grad_x.data(), room, gradients, saved, grad_y, x, call);
  return grad_x;
}

template <typename Scalar, typename Storage, typename Arithmetic>
void FeedForward<Scalar, Storage, Arithmetic>::flow_back(
    Scalar* grad_x, BackwardRoom& room, Parameters& gradients, const Saved& saved,
    const Eigen::Ref<const RowMatrix<Scalar>>& grad_y, const Eigen::Ref<const RowMatrix<Scalar>>& x,
    const ModuleCall& call) const
  requires detail::Trainable<Scalar, Storage, Arithmetic>
{
  require_shape<2>("saved", {saved.rows, saved.inner}, {x.rows(), inner_});
  if (saved.dropout != dropout_ || saved.of_operands == std::is_same_v<Scalar, Arithmetic> ||
      !saved.weights.is_of(weights_->numbers()))
    reject("saved", "that of a feed-forward of these weights, this dropout and this arithmetic",
           "another");
  detail::require_same("training", call.training.has_value(), call.training, saved.training);
  if (!saved.input.is_of(std::array{Numbers{x}}))
    reject("x", "what forward_saving() was given", "other numbers");
  detail::require_fitting(gradients, dim_, inner_);
  if (x.rows() == 0) return;
  const std::optional<detail::PlacedDropout<Scalar>> dropout =
      dropout_of(saved.training, saved.places);
  const BatchBlocks rows{1, x.rows(), count};
  room.prepare(*weights_, x.rows(), thread_count(call.device));
  for_each_stretch(
      call.device, rows.count(), [&](Index worker, Index stretch, const Range& blocks) {
        auto& of_worker = room.rooms[static_cast<std::size_t>(worker)];
        BlockArray<Scalar>& narrow = of_worker.narrow;
        Scalar* const hidden = of_worker.hidden[0];
        const Index first = blocks.begin, end = blocks.end;
        const auto grad_in = [&](Index block) {
          if constexpr (PositionTiles<Scalar, Arithmetic>::of_operands)
            return of_worker.wide[block - first];
          else
            return room.grad_in[block];
        };
        for (Index block = first; block < end; ++block) {
          load_rows(x, rows, block, hidden);
          weights_->norm.apply(hidden);
          clear_other_lanes(dim_, {0, static_cast<int>(rows.rows(block))}, hidden);
          room.normed_panels.put(block, 0, dim_, hidden);
        }
        project_rows(
            room.proj_out, end - first, false, of_worker.passing,
            [&](Index b) {
              const Index block = first + b;
              Scalar* const grad = room.grad_out.room(block, 0, hidden);
              load_rows(grad_y, rows, block, grad);
              room.grad_out.put(block, 0, dim_, grad);
              return grad;
            },
            [&](Index, Index b) { return grad_in(first + b); });
        project_rows(
            room.proj_in, end - first, false, of_worker.passing,
            [&](Index b) {
              const Index block = first + b;
              const Scalar* gates = saved.gates[block];
              std::copy_n(saved.values[block], inner_ * count, hidden);
              hide(dropout, rows.row(block), hidden, gates);
              room.hidden_panels.put(block, 0, inner_, hidden);
              Scalar* const grad_values = grad_in(block);
              if (dropout) drop(*dropout, rows.row(block), grad_values);
              differentiate_geglu(saved.values[block], gates, grad_values,
                                  grad_values + inner_ * count);
              room.grad_in.put(block, 0, 2 * inner_, grad_values);
              return grad_values;
            },
            [&](Index, Index b) { return narrow[b]; });
        for (Index block = first; block < end; ++block) {
          load_rows(x, rows, block, hidden);
          weights_->norm.apply_backward(hidden, narrow[block - first], room.norm_sums[stretch]);
          store_rows(narrow[block - first], rows, block, grad_x);
        }
      });
  room.norm_sums.add_to(gradients.norm_weight);
  room.norm_sums.add_to(gradients.norm_bias, dim_);
  add_weight_gradient(call.device, rows.count(), room.grad_out[0], room.grad_out.stride(),
                      Groups::of(dim_), room.hidden_panels, Groups::of(inner_),
                      gradients.proj_out.data());
  add_weight_gradient(call.device, rows.count(), room.grad_in[0], room.grad_in.stride(),
                      Groups::of(2 * inner_), room.normed_panels, Groups::of(dim_),
                      gradients.proj_in.data());
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
