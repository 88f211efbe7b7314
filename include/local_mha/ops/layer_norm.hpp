// SPDX-License-Identifier: MIT
/// \file
/// Layer normalization: `y = (x − mean) / √(var + eps) ⊙ weight + bias` over the channels.
/// J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016.
#pragma once

#include <algorithm>
#include <utility>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// PyTorch's `nn.LayerNorm` over the last dimension; the variance is the biased one.
template <typename Scalar>
class LayerNorm {
 public:
  static constexpr double eps = 1e-5;

  LayerNorm() = default;
  /// \param weight, bias `[dim]`
  LayerNorm(Vector<Scalar> weight, Vector<Scalar> bias)
      : weight_(std::move(weight)), bias_(std::move(bias)) {
    if (bias_.size() != weight_.size())
      reject("bias", std::to_string(weight_.size()) + " values, as the weight has", bias_.size());
  }

  Index dim() const { return weight_.size(); }

  /// Normalizes each position of a block in place.
  /// \param block `[dim][block_rows]`
  void apply(Scalar* block) const {
    using L = Lanes<Scalar>;
    const Scalar mean_factor = Scalar(1.0 / static_cast<double>(dim()));
    const L mean = mean_factor * sum(block, [](const L& x) { return x; });
    const L variance = mean_factor * sum(block, [&](const L& x) {
                         const L centred = x - mean;
                         return centred * centred;
                       });
    const L scale = L::broadcast(Scalar(1)) / sqrt(variance + L::broadcast(Scalar(eps)));
    for (Index c = 0; c < dim(); ++c) {
      Scalar* x = block + c * L::count;
      fma(weight_[c], (L::load(x) - mean) * scale, L::broadcast(bias_[c])).store(x);
    }
  }

  /// Turns the gradient of apply()'s result into that of its input, in place:
  /// `(g⊙weight − mean(g⊙weight) − x̂·mean(g⊙weight⊙x̂)) / √(var + eps)`, `x̂` the normalized input.
  /// \param x `[dim][block_rows]`, what apply() was given
  /// \param grad the same shape
  /// \param sums `[2·dim][block_rows]`: the gradients of weight and bias are added here, a value
  /// for
  ///        each lane
  void apply_backward(const Scalar* x, Scalar* grad, Scalar* sums) const {
    using L = Lanes<Scalar>;
    const Scalar mean_factor = Scalar(1.0 / static_cast<double>(dim()));
    const L mean = mean_factor * sum(x, [](const L& value) { return value; });
    const L variance = mean_factor * sum(x, [&](const L& value) {
                         const L centred = value - mean;
                         return centred * centred;
                       });
    const L scale = L::broadcast(Scalar(1)) / sqrt(variance + L::broadcast(Scalar(eps)));
    L total = L::zero();
    L along = L::zero();
    for (Index c = 0; c < dim(); ++c) {
      const L normed = (L::load(x + c * L::count) - mean) * scale;
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
    total = mean_factor * total;
    along = mean_factor * along;
    for (Index c = 0; c < dim(); ++c) {
      const L normed = (L::load(x + c * L::count) - mean) * scale;
      Scalar* g = grad + c * L::count;
      ((L::load(g) - total - normed * along) * scale).store(g);
    }
  }

  /// \param x `[rows, dim]`
  RowMatrix<Scalar> forward(const Eigen::Ref<const RowMatrix<Scalar>>& x) const {
    if (x.cols() != dim()) reject("x", std::to_string(dim()) + " columns", x.cols());
    return map_blocks<Scalar>(x, dim(), 1, [&](Index, const Scalar* in, Scalar* out) {
      std::copy(in, in + dim() * block_rows<Scalar>, out);
      apply(out);
    });
  }

  /// \param grad_y gradient of forward()'s result, `[rows, dim]`
  /// \param x what forward() was given
  /// \param grad_weight, grad_bias `[dim]`, to be added to
  /// \return the gradient of x
  RowMatrix<Scalar> backward(const Eigen::Ref<const RowMatrix<Scalar>>& grad_y,
                             const Eigen::Ref<const RowMatrix<Scalar>>& x,
                             Vector<Scalar>& grad_weight, Vector<Scalar>& grad_bias) const {
    if (x.cols() != dim()) reject("x", std::to_string(dim()) + " columns", x.cols());
    require_shape<2>("grad_y", {grad_y.rows(), grad_y.cols()}, {x.rows(), x.cols()});
    constexpr Index count = block_rows<Scalar>;
    auto sums = make_block_buffer<Scalar>(2 * dim() * count);
    auto at = make_block_buffer<Scalar>(dim() * count);
    Index first = 0;
    auto grad_x = map_blocks<Scalar>(grad_y, dim(), 1, [&](Index, const Scalar* in, Scalar* out) {
      load_block(
          dim(), std::min(count, x.rows() - first),
          [&](Index r) { return x.data() + (first + r) * x.outerStride(); }, at.data());
      std::copy(in, in + dim() * count, out);
      apply_backward(at.data(), out, sums.data());
      first += count;
    });
    for (Index c = 0; c < dim(); ++c)
      for (Index i = 0; i < count; ++i) {
        grad_weight[c] += sums[static_cast<std::size_t>(c * count + i)];
        grad_bias[c] += sums[static_cast<std::size_t>((dim() + c) * count + i)];
      }
    return grad_x;
  }

 private:
  // Four sums, because one would wait for its own additions.
  template <typename Term>
  Lanes<Scalar> sum(const Scalar* block, Term&& term) const {
    using L = Lanes<Scalar>;
    L partial[4] = {L::zero(), L::zero(), L::zero(), L::zero()};
    Index c = 0;
    for (; c + 4 <= dim(); c += 4) {
      LOCAL_MHA_UNROLL for (int i = 0; i < 4; ++i) partial[i] =
          partial[i] + term(L::load(block + (c + i) * L::count));
    }
    for (; c < dim(); ++c) partial[0] = partial[0] + term(L::load(block + c * L::count));
    return (partial[0] + partial[1]) + (partial[2] + partial[3]);
  }

  Vector<Scalar> weight_;
  Vector<Scalar> bias_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
