// SPDX-License-Identifier: MIT
/// \file
/// Root mean square normalization: `y = x / √(mean(x²) + eps) ⊙ weight` over the channels.
/// B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", 2019.
#pragma once

#include <string>
#include <utility>

#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// PyTorch's `nn.RMSNorm` over the last dimension. With `r = 1/√(mean(x²) + eps)` of a position,
/// `y = x·r ⊙ weight`, and from the gradient `g` of `y`, that of `x` is
///
///     r·(g ⊙ weight − x·r · mean(g ⊙ weight ⊙ x·r))
///
/// The channels of a position may lie in parts, such as heads: then `r` and the sum in the mean are
/// those of all of them, and each part takes its own steps.
template <typename Scalar>
class RmsNorm {
 public:
  /// What is computed at a time.
  using L = Lanes<Scalar>;

  RmsNorm() = default;
  /// With a given weight.
  /// \param weight `[dim]`, at least 1 channel
  /// \throws std::invalid_argument if there is none, or eps is not from 1e-30 to 1e30
  RmsNorm(Vector<Scalar> weight, double eps) : weight_(std::move(weight)), eps_(eps) {
    if (dim() < 1) reject("weight", "at least 1 channel", dim());
    detail::require_eps("eps", eps);
  }

  /// Channels of a row.
  Index dim() const { return weight_.size(); }
  /// `[dim]`
  const Vector<Scalar>& weight() const { return weight_; }

  /// `r` of each position of a block.
  /// \param block `[dim][block_rows]`, from the lanes on whose it is
  template <int Parts = 1>
  LOCAL_MHA_INLINE Lanes<Scalar, Parts> inverse(const Scalar* block) const {
    using P = Lanes<Scalar, Parts>;
    const P root = detail::root_of_squares<Parts>(
        dim(), block, mean_factor(),
        [&](const P& square) { return square + P::broadcast(typename P::Value(eps_)); },
        [](const P& x) { return x; });
    return P::broadcast(Scalar(1)) / root;
  }

  /// Normalizes a part of the channels of each position.
  /// \param first the first of them
  /// \param x, y `[channels][block_rows]`, from the lanes on that are normalized; may be the same
  template <int Parts>
  LOCAL_MHA_INLINE void apply(Index first, Index channels, const Lanes<Scalar, Parts>& inverse,
                              const Scalar* x, Scalar* y) const {
    using P = Lanes<Scalar, Parts>;
    for (Index c = 0; c < channels; ++c)
      (weight_[first + c] * (P::load(x + c * L::count) * inverse)).store(y + c * L::count);
  }

  /// Normalizes each position of a block in place.
  /// \param block `[dim][block_rows]`, from the lanes on that are normalized
  template <int Parts = 1>
  void apply(Scalar* block) const {
    apply(0, dim(), inverse<Parts>(block), block, block);
  }

  /// The first step back: `g` becomes `g ⊙ weight`.
  /// \param first, channels the part
  /// \param x `[channels][block_rows]`, what apply() was given
  /// \param grad the same shape
  /// \param sums the same shape: the gradient of the weight is added here, a value for each lane
  /// \return its share of the sum of `g ⊙ weight ⊙ x·r`
  LOCAL_MHA_INLINE L begin_backward(Index first, Index channels, const L& inverse, const Scalar* x,
                                    Scalar* grad, Scalar* sums) const {
    L along = L::zero();
    for (Index c = 0; c < channels; ++c) {
      const L normed = L::load(x + c * L::count) * inverse;
      const L g = L::load(grad + c * L::count);
      Scalar* sum = sums + c * L::count;
      fma(g, normed, L::load(sum)).store(sum);
      const L weighted = weight_[first + c] * g;
      along = fma(weighted, normed, along);
      weighted.store(grad + c * L::count);
    }
    return along;
  }

  /// The second step back, to the gradient of x.
  /// \param along the sum over all parts of what begin_backward() returned
  LOCAL_MHA_INLINE void end_backward(Index channels, const L& inverse, const L& along,
                                     const Scalar* x, Scalar* grad) const {
    const L mean = mean_factor() * along;
    for (Index c = 0; c < channels; ++c) {
      const L normed = L::load(x + c * L::count) * inverse;
      ((L::load(grad + c * L::count) - normed * mean) * inverse).store(grad + c * L::count);
    }
  }

  /// Turns the gradient of apply()'s result into that of its input, in place.
  /// \param x `[dim][block_rows]`, what apply() was given
  /// \param grad the same shape
  /// \param sums the same shape: the gradient of the weight is added here, a value for each lane
  void apply_backward(const Scalar* x, Scalar* grad, Scalar* sums) const {
    const L r = inverse(x);
    end_backward(dim(), r, begin_backward(0, dim(), r, x, grad, sums), x, grad);
  }

  /// Normalizes the rows of a matrix.
  /// \param x `[rows, dim]`
  /// \throws std::invalid_argument if x has another width
  RowMatrix<Scalar> forward(const Eigen::Ref<const RowMatrix<Scalar>>& x) const {
    if (x.cols() != dim()) reject("x", std::to_string(dim()) + " columns", x.cols());
    return map_blocks<Scalar>(x, dim(), 1, [&](Index, const Scalar* in, Scalar* out) {
      apply(0, dim(), inverse(in), in, out);
    });
  }

 private:
  Scalar mean_factor() const { return Scalar(1.0 / static_cast<double>(dim())); }

  Vector<Scalar> weight_;
  double eps_ = 0;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
