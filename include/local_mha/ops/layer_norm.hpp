// SPDX-License-Identifier: MIT
/// \file
/// Layer normalization: `y = (x − mean) / √(var + eps) ⊙ weight + bias` over the channels.
/// J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/component_parameters.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/ops/call.hpp>
#include <local_mha/ops/row_pass.hpp>
#include <local_mha/ops/weight_gradient.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// PyTorch's `nn.LayerNorm` over the last dimension; the variance is the biased one.
template <typename Scalar>
class LayerNorm {
 public:
  /// Its weights.
  using Parameters = LayerNormParameters<Scalar>;

  /// Where none is given.
  static constexpr double eps = 1e-5;

  /// Memory for calls of forward_into(); for one call at a time. It prepares itself.
  class Workspace {
    friend LayerNorm;
    std::vector<detail::RowRoom<Scalar>> rooms_;
  };
  /// What forward_saving() keeps for backward(), by which that knows the call again.
  class Saved {
    friend LayerNorm;
    detail::SavedRows<Scalar> rows_;
  };

  LayerNorm() = default;
  /// Starts as a new PyTorch module: the weight is 1, the bias 0.
  /// \param seed of no effect, for nothing is drawn; here as every module has it
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit LayerNorm(const LayerNormConfig& config, std::uint64_t seed = 0)
      : LayerNorm(config, initial_parameters<Parameters>(config, seed)) {}
  /// With given weights.
  /// \throws std::invalid_argument also naming the tensor whose shape does not fit
  LayerNorm(const LayerNormConfig& config, Parameters parameters) {
    detail::require_same_shapes(parameters, Parameters::zeros(config));
    weight_ = std::move(parameters.weight);
    bias_ = std::move(parameters.bias);
    eps_ = config.eps;
  }
  /// With a given weight and bias.
  /// \param weight, bias `[dim]`, at least 1 channel
  /// \param eps_of_variance from 1e-30 to 1e30
  /// \throws std::invalid_argument if their sizes differ or are 0, or eps is out of range
  LayerNorm(Vector<Scalar> weight, Vector<Scalar> bias, double eps_of_variance = eps)
      : weight_(std::move(weight)), bias_(std::move(bias)), eps_(eps_of_variance) {
    detail::require_eps("eps_of_variance", eps_of_variance);
    if (dim() < 1) reject("weight", "at least 1 channel", dim());
    if (bias_.size() != weight_.size())
      reject("bias", std::to_string(weight_.size()) + " values, as the weight has", bias_.size());
  }

  /// Channels of a row.
  Index dim() const { return weight_.size(); }
  /// `[dim]`
  const Vector<Scalar>& weight() const { return weight_; }
  /// `[dim]`
  const Vector<Scalar>& bias() const { return bias_; }
  /// What would make one of this size.
  LayerNormConfig config() const { return {dim(), eps_}; }

  /// A copy of the weights.
  Parameters parameters() const { return {weight_, bias_}; }
  /// If it throws, the module is as it was.
  /// \throws std::invalid_argument naming the tensor whose shape does not fit
  void set_parameters(const Parameters& parameters) { *this = LayerNorm(config(), parameters); }

  /// Normalizes each position of a block in place.
  /// \param block `[dim][block_rows]`, from the lanes on that are normalized
  template <int Parts = 1>
  void apply(Scalar* block) const {
    using L = Lanes<Scalar, Parts>;
    const Moments<L> of = moments<Parts>(block);
    for (Index c = 0; c < dim(); ++c) {
      Scalar* x = block + c * block_rows<Scalar>;
      fma(weight_[c], of.normalized(L::load(x)), L::broadcast(bias_[c])).store(x);
    }
  }

  /// Turns the gradient of apply()'s result into that of its input, in place:
  /// `(g⊙weight − mean(g⊙weight) − x̂·mean(g⊙weight⊙x̂)) / √(var + eps)`, `x̂` the normalized input.
  /// \param x `[dim][block_rows]`, what apply() was given
  /// \param grad the same shape
  /// \param sums `[2·dim][block_rows]`: the gradients of weight and bias are added here, a value
  ///        for each lane
  void apply_backward(const Scalar* x, Scalar* grad, Scalar* sums) const {
    using L = Lanes<Scalar>;
    const Moments of = moments(x);
    L total = L::zero();
    L along = L::zero();
    for (Index c = 0; c < dim(); ++c) {
      const L normed = of.normalized(L::load(x + c * L::count));
      const L g = L::load(grad + c * L::count);
      Scalar* weight_sum = sums + c * L::count;
      Scalar* bias_sum = sums + (dim() + c) * L::count;
      fma(g, normed, L::load(weight_sum)).store(weight_sum);
      (L::load(bias_sum) + g).store(bias_sum);
      const L weighted = weight_[c] * g;
      total = total + weighted;
      along = fma(weighted, normed, along);
      weighted.store(grad + c * L::count);
    }
    total = mean_factor() * total;
    along = mean_factor() * along;
    for (Index c = 0; c < dim(); ++c) {
      const L normed = of.normalized(L::load(x + c * L::count));
      Scalar* g = grad + c * L::count;
      ((L::load(g) - total - normed * along) * of.scale).store(g);
    }
  }

  /// Normalizes the rows of a matrix.
  /// \param x `[rows, dim]`
  /// \throws std::invalid_argument if x has another width
  RowMatrix<Scalar> forward(const Eigen::Ref<const RowMatrix<Scalar>>& x) const {
    if (x.cols() != dim()) reject("x", std::to_string(dim()) + " columns", x.cols());
    return map_blocks<Scalar>(x, dim(), 1, [&](Index, const Scalar* in, Scalar* out) {
      std::copy(in, in + dim() * block_rows<Scalar>, out);
      apply(out);
    });
  }

  /// Normalizes a batch of sequences.
  /// \param x `[B, N, dim]`
  /// \return `[B, N, dim]`
  /// \throws std::invalid_argument if x has another width
  Tensor<Scalar, 3> forward(TensorView<const Scalar, 3> x, const ModuleCall& call = {}) const {
    check_input(x);
    Tensor<Scalar, 3> y(x.dimensions());
    Workspace workspace;
    forward_into(y, workspace, x, call);
    return y;
  }

  /// The same into given memory. Allocates nothing if the workspace has served a batch as large and
  /// as many threads before.
  /// \param y `[B, N, dim]`, must not overlap x
  void forward_into(TensorView<Scalar, 3> y, Workspace& workspace, TensorView<const Scalar, 3> x,
                    const ModuleCall& call = {}) const {
    check_input(x);
    require_shape("y", y.dimensions(), x.dimensions());
    detail::require_apart("y", y, "x", x);
    detail::map_rows_on(
        call.device, workspace.rooms_, x.dimension(0) * x.dimension(1), dim(), x.data(), dim(),
        dim(), y.data(), 1, [](const auto&) {},
        [&](const auto&, Index, const Scalar* in, Scalar* out) {
          std::copy(in, in + dim() * block_rows<Scalar>, out);
          apply(out);
        });
  }

  /// forward() that keeps what backward() needs.
  /// \param saved becomes what this call kept
  Tensor<Scalar, 3> forward_saving(Saved& saved, TensorView<const Scalar, 3> x,
                                   const ModuleCall& call = {}) const {
    check_input(x);
    saved.rows_.take(x, numbers());
    return forward(x, call);
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param gradients those of the weights are added here: `Parameters::zeros(config())` at first
  /// \param saved what forward_saving() kept
  /// \param grad_y `[B, N, dim]`
  /// \param x what forward_saving() was given
  /// \return that of x, `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit, or is not that of
  ///         forward_saving(), as far as a sample of its numbers tells; then, and where memory runs
  ///         out, the gradients are as they were
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved,
                             TensorView<const Scalar, 3> grad_y, TensorView<const Scalar, 3> x,
                             const ModuleCall& call = {}) const;

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param grad_y gradient of forward()'s result, `[rows, dim]`
  /// \param x what forward() was given
  /// \param grad_weight, grad_bias `[dim]`, to be added to
  /// \return the gradient of x
  /// \throws std::invalid_argument naming the argument that does not fit
  RowMatrix<Scalar> backward(const Eigen::Ref<const RowMatrix<Scalar>>& grad_y,
                             const Eigen::Ref<const RowMatrix<Scalar>>& x,
                             Vector<Scalar>& grad_weight, Vector<Scalar>& grad_bias) const {
    if (x.cols() != dim()) reject("x", std::to_string(dim()) + " columns", x.cols());
    require_shape<2>("grad_y", {grad_y.rows(), grad_y.cols()}, {x.rows(), x.cols()});
    require_shape<1>("grad_weight", {grad_weight.size()}, {dim()});
    require_shape<1>("grad_bias", {grad_bias.size()}, {dim()});
    constexpr Index count = block_rows<Scalar>;
    auto sums = make_block_buffer<Scalar>(2 * dim() * count);
    auto at = make_block_buffer<Scalar>(dim() * count);
    // Lanes add up some blocks in the scalar, and those are a long sum.
    constexpr Index together = 16;
    std::vector<LongSum<Scalar>> totals(static_cast<std::size_t>(2 * dim()), LongSum<Scalar>(0));
    const auto take_sums = [&] {
      for (std::size_t i = 0; i < sums.size(); ++i)
        totals[i / static_cast<std::size_t>(count)] += LongSum<Scalar>(sums[i]);
      std::fill(sums.begin(), sums.end(), Scalar(0));
    };
    Index first = 0;
    auto grad_x = map_blocks<Scalar>(grad_y, dim(), 1, [&](Index, const Scalar* in, Scalar* out) {
      load_block(dim(), (std::min)(count, x.rows() - first),
                 StridedRows{x.data(), x.outerStride(), first}, at.data());
      std::copy(in, in + dim() * count, out);
      apply_backward(at.data(), out, sums.data());
      first += count;
      if (first % (together * count) == 0) take_sums();
    });
    take_sums();
    for (Index c = 0; c < dim(); ++c) {
      grad_weight[c] += Scalar(totals[static_cast<std::size_t>(c)]);
      grad_bias[c] += Scalar(totals[static_cast<std::size_t>(dim() + c)]);
    }
    return grad_x;
  }

 private:
  void check_input(const TensorView<const Scalar, 3>& x) const {
    require_shape("x", x.dimensions(), {-1, -1, dim()});
  }
  // Those of the weights.
  std::array<std::span<const Scalar>, 2> numbers() const {
    const auto size = static_cast<std::size_t>(dim());
    return {std::span(weight_.data(), size), std::span(bias_.data(), size)};
  }

  // Of each position. `mean` alone rounds at the size of the inputs, which may lie far from 0 and
  // close together: what is left of them has the mean `rest`.
  template <typename L>
  struct Moments {
    L mean;
    L rest;
    L scale;  // 1 / √(var + eps)

    LOCAL_MHA_INLINE L centred(const L& x) const { return rounded(x - mean) - rest; }
    LOCAL_MHA_INLINE L normalized(const L& x) const { return centred(x) * scale; }
  };

  Scalar mean_factor() const { return Scalar(1.0 / static_cast<double>(dim())); }

  template <int Parts = 1>
  LOCAL_MHA_INLINE Moments<Lanes<Scalar, Parts>> moments(const Scalar* block) const {
    using L = Lanes<Scalar, Parts>;
    const Scalar factor = mean_factor();
    Moments<L> of{L::zero(), L::zero(), L::zero()};
    // From the first channel on, so that the mean of a constant row is its constant.
    const L first = dim() > 0 ? L::load(block) : L::zero();
    of.mean = first + detail::sum_channels<Parts>(dim(), block, [&](const L& x, const L& sum) {
                return fma(factor, x - first, sum);
              });
    of.rest = detail::sum_channels<Parts>(dim(), block, [&](const L& x, const L& sum) {
      return fma(factor, rounded(x - of.mean), sum);
    });
    const L deviation = detail::root_of_squares<Parts>(
        dim(), block, factor,
        [&](const L& variance) { return variance + L::broadcast(typename L::Value(eps_)); },
        [&](const L& x) { return of.centred(x); });
    of.scale = L::broadcast(Scalar(1)) / deviation;
    return of;
  }

  Vector<Scalar> weight_;
  Vector<Scalar> bias_;
  double eps_ = eps;
};

template <typename Scalar>
Tensor<Scalar, 3> LayerNorm<Scalar>::backward(Parameters& gradients, const Saved& saved,
                                              TensorView<const Scalar, 3> grad_y,
                                              TensorView<const Scalar, 3> x,
                                              const ModuleCall& call) const {
  saved.rows_.require_known(x, numbers(), "a LayerNorm");
  require_shape("grad_y", grad_y.dimensions(), x.dimensions());
  require_shape<1>("weight", {gradients.weight.size()}, {dim()});
  require_shape<1>("bias", {gradients.bias.size()}, {dim()});
  const BatchBlocks rows{1, x.dimension(0) * x.dimension(1), block_rows<Scalar>};
  Tensor<Scalar, 3> grad_x(x.dimensions());
  if (rows.seqlen == 0) return grad_x;
  StretchSums<Scalar> sums(ceil_div(rows.count(), stretch_blocks), 2 * dim());
  for_each_stretch(call.device, rows.count(), [&](Index, Index stretch, const Range& blocks) {
    BlockArray<Scalar> room(2, dim());
    for (Index b = blocks.begin; b < blocks.end; ++b) {
      const auto load = [&](const TensorView<const Scalar, 3>& from, Scalar* to) {
        load_block(dim(), rows.rows(b), StridedRows{from.data(), dim(), rows.row(b)}, to);
      };
      load(x, room[0]);
      load(grad_y, room[1]);
      apply_backward(room[0], room[1], sums[stretch]);
      store_block(dim(), rows.rows(b), room[1], StridedRows{grad_x.data(), dim(), rows.row(b)});
    }
  });
  sums.add_to(gradients.weight);
  sums.add_to(gradients.bias, dim());
  return grad_x;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
