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
#include <local_mha/core/types.hpp>
#include <local_mha/ops/activations.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/layer_norm.hpp>
#include <local_mha/ops/linear.hpp>
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
    norm_ = LayerNorm<Scalar>(std::move(parameters.norm_weight), std::move(parameters.norm_bias));
    proj_in_ = PackedWeight<Scalar>(parameters.proj_in, inner_);
    proj_out_ = PackedWeight<Scalar>(parameters.proj_out);
  }

  /// \param x `[rows, dim]`
  /// \param training dropout acts, with this seed; empty: evaluation
  /// \return `[rows, dim]`, to be added to the residual stream
  RowMatrix<Scalar> forward(const Eigen::Ref<const RowMatrix<Scalar>>& x,
                            std::optional<Training> training = {}) const {
    if (x.cols() != dim_) reject("x", std::to_string(dim_) + " columns", x.cols());
    RowMatrix<Scalar> y(x.rows(), dim_);
    Workspace workspace(*this);
    forward_into(x.rows(), x.data(), x.outerStride(), y.data(), workspace, training);
    return y;
  }

  /// Room for calls of forward_into().
  class Workspace {
   public:
    Workspace() = default;
    explicit Workspace(const FeedForward& layer)
        : in_(room(layer.dim_)),
          out_(in_),
          values_(room(layer.inner_)),
          gates_(values_),
          spread_(make_block_buffer<Scalar>(
              std::max(spread_size(layer.proj_in_), spread_size(layer.proj_out_)))) {}

   private:
    friend FeedForward;
    static BlockBuffer<Scalar> room(Index channels) {
      return make_block_buffer<Scalar>(stretch * channels * block_rows<Scalar>);
    }
    BlockBuffer<Scalar> in_;
    BlockBuffer<Scalar> out_;
    BlockBuffer<Scalar> values_;
    BlockBuffer<Scalar> gates_;
    BlockBuffer<Scalar> spread_;
  };

  /// The same into given memory. Allocates nothing.
  /// \param x, x_stride `[rows, dim]`, and from row to row
  /// \param y `[rows, dim]`, row below row
  /// \param workspace of a layer of this one's sizes
  void forward_into(Index rows, const Scalar* x, Index x_stride, Scalar* y, Workspace& workspace,
                    std::optional<Training> training = {}) const {
    constexpr Index count = block_rows<Scalar>;
    std::optional<Dropout<Scalar>> dropout;
    if (training && dropout_ > 0) dropout.emplace(dropout_, training->seed, 0);
    const auto value = [&](Index b) { return workspace.values_.data() + b * inner_ * count; };
    const auto gate = [&](Index b) { return workspace.gates_.data() + b * inner_ * count; };
    const bool single = rows == 1;
    const auto multiply = [&](const PackedWeight<Scalar>& weight, Index group, const Scalar* in,
                              Index blocks, auto&& to) {
      project_rows(weight, group, in, blocks, single, workspace.spread_.data(), to);
    };
    Index first = 0;
    const auto apply = [&](Index blocks, Scalar* in, Scalar* out) {
      for (Index b = 0; b < blocks; ++b) norm_.apply(in + b * dim_ * count);
      multiply(proj_in_, 0, in, blocks, value);
      multiply(proj_in_, 1, in, blocks, gate);
      for (Index b = 0; b < blocks; ++b) {
        geglu(value(b), gate(b), single ? count : 1);
        if (dropout) drop(*dropout, first + b * count, value(b));
      }
      multiply(proj_out_, 0, value(0), blocks, [&](Index b) { return out + b * dim_ * count; });
      first += blocks * count;
    };
    map_rows(rows, dim_, x, x_stride, dim_, y, stretch, workspace.in_.data(), workspace.out_.data(),
             apply);
  }

 private:
  // Blocks that pass the weights together.
  static constexpr Index stretch = 4 * Tiling<Scalar>::blocks;

  void geglu(Scalar* values, const Scalar* gates, Index step) const {
    for (Index i = 0; i < inner_ * block_rows<Scalar>; i += step) values[i] *= gelu(gates[i]);
  }

  void drop(const Dropout<Scalar>& dropout, Index first, Scalar* values) const {
    using L = Lanes<Scalar>;
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
  LayerNorm<Scalar> norm_;
  PackedWeight<Scalar> proj_in_;
  PackedWeight<Scalar> proj_out_;
};

}  // namespace local_mha
