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

namespace local_mha {

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

  /// \param x `[rows, dim]`
  RowMatrix<Scalar> forward(const Eigen::Ref<const RowMatrix<Scalar>>& x) const {
    if (x.cols() != dim()) reject("x", std::to_string(dim()) + " columns", x.cols());
    return map_blocks<Scalar>(x, dim(), 1, [&](Index, const Scalar* in, Scalar* out) {
      std::copy(in, in + dim() * block_rows<Scalar>, out);
      apply(out);
    });
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

}  // namespace local_mha
