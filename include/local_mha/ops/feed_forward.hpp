// SPDX-License-Identifier: MIT
/// \file
/// The transformer's feed-forward with GEGLU:
/// `y = (a ⊙ gelu(g)) · W_outᵀ`, `[a | g] = LayerNorm(x) · W_inᵀ`.
/// N. Shazeer, "GLU Variants Improve Transformer", 2020.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/activations.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/layer_norm.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/weight_gradient.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha {

/// LayerNorm, Linear, GEGLU, dropout, Linear.
template <typename Scalar>
class FeedForward {
 public:
  /// \param dropout probability of dropping a hidden activation, in training mode
  /// \throws std::invalid_argument if dropout is no probability, or naming the weight whose shape
  ///         does not fit the others
  explicit FeedForward(FeedForwardParameters<Scalar> parameters, double dropout = 0)
      : dim_(parameters.norm_weight.size()), inner_(parameters.proj_out.cols()), dropout_(dropout) {
    detail::require_probability("dropout", dropout);
    require_shape<2>("1.weight", {parameters.proj_in.rows(), parameters.proj_in.cols()},
                     {2 * inner_, dim_});
    require_shape<2>("4.weight", {parameters.proj_out.rows(), parameters.proj_out.cols()},
                     {dim_, inner_});
    norm_ = LayerNorm<Scalar>(parameters.norm_weight, parameters.norm_bias);
    proj_in_ = PackedWeight<Scalar>(parameters.proj_in, inner_);
    proj_out_ = PackedWeight<Scalar>(parameters.proj_out);
    parameters_ = std::move(parameters);
  }

  /// \param x `[rows, dim]`
  /// \param training dropout acts, with this seed; empty: evaluation
  /// \return `[rows, dim]`, to be added to the residual stream
  RowMatrix<Scalar> forward(const Eigen::Ref<const RowMatrix<Scalar>>& x,
                            std::optional<Training> training = {}) const {
    return forward(Eigen::DefaultDevice(), x, training);
  }

  /// The same on the threads of a device; the same bits for any number of them.
  template <ThreadDevice Device>
  RowMatrix<Scalar> forward(const Device& device, const Eigen::Ref<const RowMatrix<Scalar>>& x,
                            std::optional<Training> training = {}) const {
    return flow(device, x, training, nullptr);
  }

  /// What forward_saving() keeps for backward(): the result of the first projection.
  struct Saved {
    BlockArray<Scalar> values;  ///< `[block][inner][block_rows]`
    BlockArray<Scalar> gates;   ///< the same, before gelu
  };

  /// forward() that keeps what backward() needs.
  /// \param saved becomes what this call kept
  template <ThreadDevice Device>
  RowMatrix<Scalar> forward_saving(const Device& device, Saved& saved,
                                   const Eigen::Ref<const RowMatrix<Scalar>>& x,
                                   std::optional<Training> training = {}) const {
    return flow(device, x, training, &saved);
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param gradients those of the weights are added here
  /// \param saved what forward_saving() kept for the same arguments
  /// \param grad_y `[rows, dim]`
  /// \return that of x, `[rows, dim]`
  template <ThreadDevice Device>
  RowMatrix<Scalar> backward(const Device& device, FeedForwardParameters<Scalar>& gradients,
                             const Saved& saved, const Eigen::Ref<const RowMatrix<Scalar>>& grad_y,
                             const Eigen::Ref<const RowMatrix<Scalar>>& x,
                             std::optional<Training> training = {}) const {
    if (x.cols() != dim_) reject("x", std::to_string(dim_) + " columns", x.cols());
    require_shape<2>("grad_y", {grad_y.rows(), grad_y.cols()}, {x.rows(), x.cols()});
    const std::optional<Dropout<Scalar>> dropout = dropout_of(training);
    const BatchBlocks rows{1, x.rows(), count};
    RowMatrix<Scalar> grad_x(x.rows(), dim_);
    if (x.rows() == 0) return grad_x;
    // Transposed: from gradients of results to those of inputs.
    const PackedWeight<Scalar> proj_out(parameters_.proj_out.transpose());
    const PackedWeight<Scalar> proj_in(parameters_.proj_in.transpose());
    BlockArray<Scalar> normed_panels(rows.count(), panel_channels<Scalar>(dim_));
    BlockArray<Scalar> hidden_panels(rows.count(), panel_channels<Scalar>(inner_));
    BlockArray<Scalar> grad_out(rows.count(), dim_);
    BlockArray<Scalar> grad_in(rows.count(), 2 * inner_);  // of values, then of gates
    StretchSums<Scalar> norm_sums(ceil_div(rows.count(), stretch_blocks), 2 * dim_);
    for_each_stretch(device, rows.count(), [&](Index part, const Range& blocks) {
      const Index size = blocks.end - blocks.begin;
      BlockArray<Scalar> narrow(size, dim_);
      auto hidden = make_block_buffer<Scalar>(std::max(inner_, dim_) * count);
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        load_rows(x, rows, block, hidden.data());
        norm_.apply(hidden.data());
        block_to_panels(dim_, hidden.data(), normed_panels[block]);
        load_rows(grad_y, rows, block, grad_out[block]);
      }
      project(proj_out, 0, grad_out[blocks.begin], size,
              [&](Index b) { return grad_in[blocks.begin + b]; });
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        const Scalar* gates = saved.gates[block];
        std::copy_n(saved.values[block], inner_ * count, hidden.data());
        hide(dropout, rows.row(block), hidden.data(), gates);
        block_to_panels(inner_, hidden.data(), hidden_panels[block]);
        Scalar* grad_values = grad_in[block];
        if (dropout) drop(*dropout, rows.row(block), grad_values);
        differentiate_geglu(saved.values[block], gates, grad_values, grad_values + inner_ * count);
      }
      project(proj_in, 0, grad_in[blocks.begin], size, [&](Index b) { return narrow[b]; });
      for (Index b = 0; b < size; ++b) {
        load_rows(x, rows, blocks.begin + b, hidden.data());
        norm_.apply_backward(hidden.data(), narrow[b], norm_sums[part]);
        store_rows(narrow[b], rows, blocks.begin + b, grad_x);
      }
    });
    norm_sums.add_to(gradients.norm_weight);
    norm_sums.add_to(gradients.norm_bias, dim_);
    add_weight_gradient(device, rows.count(), grad_out[0], grad_out.stride(), dim_,
                        hidden_panels[0], hidden_panels.stride(), inner_, gradients.proj_out.data(),
                        inner_);
    add_weight_gradient(device, rows.count(), grad_in[0], grad_in.stride(), 2 * inner_,
                        normed_panels[0], normed_panels.stride(), dim_, gradients.proj_in.data(),
                        dim_);
    return grad_x;
  }

 private:
  using L = Lanes<Scalar>;
  static constexpr Index count = block_rows<Scalar>;
  std::optional<Dropout<Scalar>> dropout_of(const std::optional<Training>& training) const {
    if (!training || dropout_ == 0) return std::nullopt;
    return Dropout<Scalar>(dropout_, training->seed, 0);
  }

  void load_rows(const Eigen::Ref<const RowMatrix<Scalar>>& x, const BatchBlocks& rows, Index block,
                 Scalar* to) const {
    load_block(
        dim_, rows.rows(block),
        [&](Index r) { return x.data() + (rows.row(block) + r) * x.outerStride(); }, to);
  }
  void store_rows(const Scalar* from, const BatchBlocks& rows, Index block,
                  RowMatrix<Scalar>& y) const {
    store_block(dim_, rows.rows(block), from,
                [&](Index r) { return y.data() + (rows.row(block) + r) * dim_; });
  }

  template <ThreadDevice Device>
  RowMatrix<Scalar> flow(const Device& device, const Eigen::Ref<const RowMatrix<Scalar>>& x,
                         const std::optional<Training>& training, Saved* saved) const {
    if (x.cols() != dim_) reject("x", std::to_string(dim_) + " columns", x.cols());
    const std::optional<Dropout<Scalar>> dropout = dropout_of(training);
    const BatchBlocks rows{1, x.rows(), count};
    if (saved != nullptr)
      *saved = {BlockArray<Scalar>(rows.count(), inner_), BlockArray<Scalar>(rows.count(), inner_)};
    RowMatrix<Scalar> y(x.rows(), dim_);
    for_each_stretch(device, rows.count(), [&](Index, const Range& blocks) {
      const Index size = blocks.end - blocks.begin;
      BlockArray<Scalar> narrow(size, dim_);
      BlockArray<Scalar> values(size, inner_);
      BlockArray<Scalar> gates(size, inner_);
      for (Index b = 0; b < size; ++b) {
        load_rows(x, rows, blocks.begin + b, narrow[b]);
        norm_.apply(narrow[b]);
      }
      project(proj_in_, 0, narrow[0], size, [&](Index b) { return values[b]; });
      project(proj_in_, 1, narrow[0], size, [&](Index b) { return gates[b]; });
      if (saved != nullptr) {
        std::copy_n(values[0], size * values.stride(), saved->values[blocks.begin]);
        std::copy_n(gates[0], size * gates.stride(), saved->gates[blocks.begin]);
      }
      for (Index b = 0; b < size; ++b)
        hide(dropout, rows.row(blocks.begin + b), values[b], gates[b]);
      project(proj_out_, 0, values[0], size, [&](Index b) { return narrow[b]; });
      for (Index b = 0; b < size; ++b) store_rows(narrow[b], rows, blocks.begin + b, y);
    });
    return y;
  }

  // The hidden activations of a block, in place of its values.
  void hide(const std::optional<Dropout<Scalar>>& dropout, Index first, Scalar* values,
            const Scalar* gates) const {
    for (Index i = 0; i < inner_ * count; i += count)
      (L::load(values + i) * gelu(L::load(gates + i))).store(values + i);
    if (dropout) drop(*dropout, first, values);
  }

  // From the gradient of the hidden activations, in place of that of the values.
  void differentiate_geglu(const Scalar* values, const Scalar* gates, Scalar* grad_values,
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

  void drop(const Dropout<Scalar>& dropout, Index first, Scalar* values) const {
    constexpr Index together = Dropout<Scalar>::together;
    L factors[together];
    for (Index c = 0; c < inner_; ++c) {
      if (c % together == 0) dropout.factors(first, c / together, factors);
      Scalar* x = values + c * L::count;
      (L::load(x) * factors[c % together]).store(x);
    }
  }

  Index dim_;
  Index inner_;
  double dropout_;
  FeedForwardParameters<Scalar> parameters_;
  LayerNorm<Scalar> norm_;
  PackedWeight<Scalar> proj_in_;
  PackedWeight<Scalar> proj_out_;
};

}  // namespace local_mha
