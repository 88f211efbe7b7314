// SPDX-License-Identifier: MIT
/// \file
/// The normalization of a layer's input: LayerNorm or RmsNorm.
#pragma once

#include <local_mha/config.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/layer_norm.hpp>
#include <local_mha/ops/rms_norm.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// One of the two, with the calls that they have in common.
template <typename Scalar>
class Prenorm {
 public:
  /// None.
  Prenorm() = default;
  /// With given weights.
  /// \param weight `[dim]`, at least 1 channel
  /// \param bias `[dim]`; of NormKind::rms there is none
  /// \throws std::invalid_argument if a size or eps is out of range
  Prenorm(const NormConfig& config, const Vector<Scalar>& weight, const Vector<Scalar>& bias) {
    if (config.kind == NormKind::layer)
      layer_ = LayerNorm<Scalar>(weight, bias, config.eps);
    else
      rms_ = RmsNorm<Scalar>(weight, config.eps);
  }

  /// `[dim]`
  const Vector<Scalar>& weight() const { return is_rms() ? rms_.weight() : layer_.weight(); }
  /// Empty if there is none.
  const Vector<Scalar>& bias() const { return layer_.bias(); }

  /// Normalizes each position of a block in place.
  /// \param block `[dim][block_rows]`, from the lanes on that are normalized
  template <int Parts = 1>
  void apply(Scalar* block) const {
    if (is_rms())
      rms_.template apply<Parts>(block);
    else
      layer_.template apply<Parts>(block);
  }

  /// Turns the gradient of apply()'s result into that of its input, in place.
  /// \param x `[dim][block_rows]`, what apply() was given
  /// \param grad the same shape
  /// \param sums `[2·dim][block_rows]`: the gradients of the weight and, if it has one, the bias
  ///        are added here, a value for each lane
  void apply_backward(const Scalar* x, Scalar* grad, Scalar* sums) const {
    if (is_rms())
      rms_.apply_backward(x, grad, sums);
    else
      layer_.apply_backward(x, grad, sums);
  }

 private:
  bool is_rms() const { return rms_.dim() > 0; }

  LayerNorm<Scalar> layer_;
  RmsNorm<Scalar> rms_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
