// SPDX-License-Identifier: MIT
/// \file
/// Normalization of queries and keys over the channels of a head: `y = x / max(‖x‖₂, 1e-12) ⊙
/// scale`, or RmsNorm.
///
/// The field calls the former RMSNorm, too (`qk_rmsnorm`); it is one up to the constant
/// `√dim_head`. A. Henry et al., "Query-Key Normalization for Transformers", 2020.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/rms_norm.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Multiplies a block by a factor.
/// \param block `[channels][block_rows]`, from the lanes on that are multiplied
template <int Parts = 1, typename Scalar>
void scale_block(Index channels, const Scalar& factor, Scalar* block) {
  using L = Lanes<Scalar, Parts>;
  for (Index c = 0; c < channels; ++c, block += block_rows<Scalar>)
    (factor * L::load(block)).store(block);
}

namespace detail {

/// The least square of a norm, 1e-24; of a scalar that has no such number, its least one.
template <typename Scalar, int Parts = 1>
Lanes<Scalar, Parts> least_square() {
  const auto least = Scalar(1e-24);
  return Lanes<Scalar, Parts>::broadcast(
      least > Scalar(0) ? least : std::numeric_limits<Scalar>::denorm_min());
}

}  // namespace detail

/// `max(‖x‖₂, 1e-12)` of each position of a block.
/// \param block `[channels][block_rows]`
template <int Parts = 1, typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar, Parts> l2_norm(Index channels, const Scalar* block) {
  using L = Lanes<Scalar, Parts>;
  return detail::root_of_squares<Parts>(
      channels, block, Scalar(1),
      // √ has no derivative at 0: the larger of the squares, not of the roots.
      [](const L& squares) { return (max)(squares, detail::least_square<Scalar, Parts>()); },
      [](const L& x) { return x; });
}

/// Normalizes each position of a block in place, without a scale: `x / max(‖x‖₂, 1e-12)`.
template <int Parts = 1, typename Scalar>
void l2_normalize(Index channels, Scalar* block) {
  using L = Lanes<Scalar, Parts>;
  const L inverse = L::broadcast(Scalar(1)) / l2_norm<Parts>(channels, block);
  for (Index c = 0; c < channels; ++c, block += block_rows<Scalar>)
    (L::load(block) * inverse).store(block);
}

/// Turns the gradient of l2_normalize()'s result into that of its input, in place:
/// `(g − y·Σ_c y_c·g_c) / ‖x‖` with `y = x / ‖x‖`, and `g / eps` where the norm is at its least.
/// \param x `[channels][block_rows]`, what was normalized
/// \param grad the same shape
template <typename Scalar>
void l2_normalize_backward(Index channels, const Scalar* x, Scalar* grad) {
  using L = Lanes<Scalar>;
  const L norm = l2_norm(channels, x);
  const L inverse = L::broadcast(Scalar(1)) / norm;
  L along = L::zero();
  for (Index c = 0; c < channels; ++c)
    along = fma(L::load(x + c * L::count) * inverse, L::load(grad + c * L::count), along);
  // Where the norm is bounded below, it is a constant.
  along = select_negative(sqrt(detail::least_square<Scalar>()) - norm, along, L::zero());
  for (Index c = 0; c < channels; ++c) {
    const L y = L::load(x + c * L::count) * inverse;
    ((L::load(grad + c * L::count) - y * along) * inverse).store(grad + c * L::count);
  }
}

/// The normalization of the queries, or of the keys, of every head.
template <typename Scalar>
class QkNorm {
 public:
  /// None.
  QkNorm() = default;
  /// By the length.
  /// \param scale `[dim_head]`
  explicit QkNorm(Vector<Scalar> scale) : scale_(std::move(scale)) {}
  /// By the root mean square.
  /// \param rms of `dim_head` channels
  explicit QkNorm(RmsNorm<Scalar> rms) : rms_(std::move(rms)) {}

  /// Whether there is one.
  explicit operator bool() const { return dim_head() > 0; }
  /// Channels that are normalized together.
  Index dim_head() const { return is_rms() ? rms_.dim() : scale_.size(); }
  /// `[dim_head]`: the scale, or that of the root mean square.
  const Vector<Scalar>& weight() const { return is_rms() ? rms_.weight() : scale_; }

  /// Normalizes each position of a block in place.
  /// \param block `[dim_head][block_rows]`, from the lanes on that are normalized
  template <int Parts = 1>
  void apply(Scalar* block) const {
    using L = Lanes<Scalar, Parts>;
    if (is_rms()) return rms_.template apply<Parts>(block);
    const L inverse = L::broadcast(Scalar(1)) / l2_norm<Parts>(dim_head(), block);
    for (Index c = 0; c < dim_head(); ++c, block += block_rows<Scalar>)
      (scale_[c] * (L::load(block) * inverse)).store(block);
  }

  /// Turns the gradient of apply()'s result into that of its input, in place.
  /// \param x `[dim_head][block_rows]`, what apply() was given
  /// \param grad the same shape
  /// \param sums the same shape: the gradient of the scale is added here, a value for each lane
  void apply_backward(const Scalar* x, Scalar* grad, Scalar* sums) const {
    using L = Lanes<Scalar>;
    if (is_rms()) return rms_.apply_backward(x, grad, sums);
    const L inverse = L::broadcast(Scalar(1)) / l2_norm(dim_head(), x);
    for (Index c = 0; c < dim_head(); ++c) {
      Scalar* sum = sums + c * L::count;
      const L g = L::load(grad + c * L::count);
      fma(g, L::load(x + c * L::count) * inverse, L::load(sum)).store(sum);
      (scale_[c] * g).store(grad + c * L::count);
    }
    l2_normalize_backward(dim_head(), x, grad);
  }

  /// Normalizes the rows of a matrix.
  /// \param x `[rows, dim_head]`
  /// \throws std::invalid_argument if x has another width
  RowMatrix<Scalar> forward(const Eigen::Ref<const RowMatrix<Scalar>>& x) const {
    if (x.cols() != dim_head()) reject("x", std::to_string(dim_head()) + " columns", x.cols());
    return map_blocks<Scalar>(x, dim_head(), 1, [&](Index, const Scalar* in, Scalar* out) {
      std::copy(in, in + dim_head() * block_rows<Scalar>, out);
      apply(out);
    });
  }

 private:
  bool is_rms() const { return rms_.dim() > 0; }

  Vector<Scalar> scale_;
  RmsNorm<Scalar> rms_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
