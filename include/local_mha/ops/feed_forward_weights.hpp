// SPDX-License-Identifier: MIT
/// \file
/// The weights of FeedForward, as its passes read them.
#pragma once

#include <array>
#include <utility>

#include <local_mha/core/error.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/layer_norm.hpp>
#include <local_mha/ops/packed_weight.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Each weight in one form.
/// \tparam Storage what the weights of projections are rounded to, see can_store
/// \tparam Arithmetic what they are multiplied as, see can_multiply
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
struct FeedForwardWeights {
  using Parameters = FeedForwardParameters<Scalar>;
  using Weight = PackedWeight<Scalar, Storage, Arithmetic>;

  /// \throws std::invalid_argument naming the weight whose shape does not fit the others
  template <typename Given>
  explicit FeedForwardWeights(FeedForwardParameters<Given> given)
      : dim(given.norm_weight.size()), inner(given.proj_out.cols()) {
    require_shape<2>("1.weight", {given.proj_in.rows(), given.proj_in.cols()}, {2 * inner, dim});
    require_shape<2>("4.weight", {given.proj_out.rows(), given.proj_out.cols()}, {dim, inner});
    norm = LayerNorm<Scalar>(cast<Scalar>(std::move(given.norm_weight)),
                             cast<Scalar>(std::move(given.norm_bias)));
    proj_in = Weight(given.proj_in, inner);
    proj_out = Weight(given.proj_out);
  }

  /// What this was made of, as it is rounded.
  Parameters unpacked() const {
    return {norm.weight(), norm.bias(), proj_in.unpacked(), proj_out.unpacked()};
  }

  /// All numbers, by a sample of which these weights are known again.
  std::array<TensorNumbers<Scalar, Storage, Arithmetic>, 4> numbers() const
    requires Trainable<Scalar, Storage, Arithmetic>
  {
    const auto of = [](const auto& tensor) {
      return TensorNumbers<Scalar, Storage, Arithmetic>(tensor);
    };
    return {of(norm.weight()), of(norm.bias()), of(proj_in), of(proj_out)};
  }

  Index dim;
  Index inner;
  LayerNorm<Scalar> norm;
  Weight proj_in;  ///< a group of rows is that of values, or of gates
  Weight proj_out;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
