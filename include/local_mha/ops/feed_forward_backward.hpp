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
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/weight_gradient.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

template <typename Scalar>
void FeedForward<Scalar>::differentiate_geglu(const Scalar* values, const Scalar* gates,
                                              Scalar* grad_values, Scalar* grad_gates) const {
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

template <typename Scalar>
RowMatrix<Scalar> FeedForward<Scalar>::backward(Parameters& gradients, const Saved& saved,
                                                const Eigen::Ref<const RowMatrix<Scalar>>& grad_y,
                                                const Eigen::Ref<const RowMatrix<Scalar>>& x,
                                                const ModuleCall& call) const {
  if (x.cols() != dim_) reject("x", std::to_string(dim_) + " columns", x.cols());
  require_shape<2>("grad_y", {grad_y.rows(), grad_y.cols()}, {x.rows(), x.cols()});
  require_shape<2>("saved", {saved.rows, saved.inner}, {x.rows(), inner_});
  if (saved.dropout != dropout_ || !saved.weights.is_of(weights_->numbers()))
    reject("saved", "that of a feed-forward of these weights and this dropout", "another");
  detail::require_same("training", call.training.has_value(), call.training, saved.training);
  if (!saved.input.is_of(std::array{Numbers{x}}))
    reject("x", "what forward_saving() was given", "other numbers");
  detail::require_fitting(gradients, dim_, inner_);
  const std::optional<Dropout<Scalar>> dropout = dropout_of(saved.training);
  const BatchBlocks rows{1, x.rows(), count};
  RowMatrix<Scalar> grad_x(x.rows(), dim_);
  if (x.rows() == 0) return grad_x;
  // Transposed: from gradients of results to those of inputs.
  PackedWeight<Scalar> proj_out, proj_in;
  proj_out.pack_transposed(weights_->proj_out);
  proj_in.pack_transposed(weights_->proj_in);
  PanelArray<Scalar> normed_panels(rows.count(), panel_channels<Scalar>(dim_));
  PanelArray<Scalar> hidden_panels(rows.count(), panel_channels<Scalar>(inner_));
  BlockArray<Scalar> grad_out(rows.count(), dim_);
  BlockArray<Scalar> grad_in(rows.count(), 2 * inner_);  // of values, then of gates
  StretchSums<Scalar> norm_sums(ceil_div(rows.count(), stretch_blocks), 2 * dim_);
  for_each_stretch(call.device, rows.count(), [&](Index part, const Range& blocks) {
    const Index size = blocks.end - blocks.begin;
    BlockArray<Scalar> narrow(size, dim_);
    auto hidden = make_block_buffer<Scalar>((std::max)(inner_, dim_) * count);
    for (Index block = blocks.begin; block < blocks.end; ++block) {
      load_rows(x, rows, block, hidden.data());
      weights_->norm.apply(hidden.data());
      clear_other_lanes(dim_, {0, static_cast<int>(rows.rows(block))}, hidden.data());
      normed_panels.put(block, 0, dim_, hidden.data());
      load_rows(grad_y, rows, block, grad_out[block]);
    }
    project(proj_out, 0, grad_out[blocks.begin], size,
            [&](Index b) { return grad_in[blocks.begin + b]; });
    for (Index block = blocks.begin; block < blocks.end; ++block) {
      const Scalar* gates = saved.gates[block];
      std::copy_n(saved.values[block], inner_ * count, hidden.data());
      hide(dropout, rows.row(block), hidden.data(), gates);
      hidden_panels.put(block, 0, inner_, hidden.data());
      Scalar* grad_values = grad_in[block];
      if (dropout) drop(*dropout, rows.row(block), grad_values);
      differentiate_geglu(saved.values[block], gates, grad_values, grad_values + inner_ * count);
    }
    project(proj_in, 0, grad_in[blocks.begin], size, [&](Index b) { return narrow[b]; });
    for (Index b = 0; b < size; ++b) {
      load_rows(x, rows, blocks.begin + b, hidden.data());
      weights_->norm.apply_backward(hidden.data(), narrow[b], norm_sums[part]);
      store_rows(narrow[b], rows, blocks.begin + b, grad_x);
    }
  });
  norm_sums.add_to(gradients.norm_weight);
  norm_sums.add_to(gradients.norm_bias, dim_);
  add_weight_gradient(call.device, rows.count(), grad_out[0], grad_out.stride(), Groups::of(dim_),
                      hidden_panels, Groups::of(inner_), gradients.proj_out.data());
  add_weight_gradient(call.device, rows.count(), grad_in[0], grad_in.stride(),
                      Groups::of(2 * inner_), normed_panels, Groups::of(dim_),
                      gradients.proj_in.data());
  return grad_x;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
