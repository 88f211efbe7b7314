// SPDX-License-Identifier: MIT
/// \file
/// What LocalAttention::forward_saving() keeps for backward(), and what that gives.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <utility>

#include <local_mha/attention/call.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// What forward() must keep for backward(), beside its inputs.
template <typename Scalar>
struct SavedAttention {
  using View = TensorView<const Scalar, 4>;
  using Call = LocalAttentionCall<Scalar>;

  /// That of a call, with room for its results.
  static SavedAttention of(const LocalAttentionConfig& attention, const View& q, const View& k,
                           const View& v, const Call& given) {
    const auto [batch, heads, seqlen, dim_head] = q.dimensions();
    SavedAttention saved{Tensor<Scalar, 4>(batch, heads, seqlen, dim_head),
                         Tensor<Scalar, 3>(batch, heads, seqlen),
                         Tensor<Scalar, 3>(batch, heads, seqlen), attention};
    saved.call.take(given);
    for (std::size_t i = 0; i < 3; ++i)
      saved.inputs[i].take(numbers_of(*std::array{&q, &k, &v}[i], given.lengths));
    return saved;
  }

  /// \throws std::invalid_argument if it is not of this attention and this call
  void check_arguments(const LocalAttentionConfig& attention, const View& q, const View& k,
                       const View& v, const Call& given) const {
    const auto [batch, heads, seqlen, dim_head] = q.dimensions();
    require_shape<4>("saved.out", View(out).dimensions(), q.dimensions());
    for (const auto& [name, part] :
         {std::pair{"saved.lse", &lse}, std::pair{"saved.lse_rest", &lse_rest}})
      require_shape<3>(name, TensorView<const Scalar, 3>(*part).dimensions(),
                       {batch, heads, seqlen});
    if (config != attention)
      reject("saved", "that of an attention of this configuration", "that of another");
    call.require_same_call(given);
    for (std::size_t i = 0; i < 3; ++i)
      if (!inputs[i].is_of(numbers_of(*std::array{&q, &k, &v}[i], call.lengths())))
        reject(std::array{"q", "k", "v"}[i], "what forward_saving() was given", "other numbers");
  }

  Tensor<Scalar, 4> out;       ///< what forward() returns
  Tensor<Scalar, 3> lse;       ///< `[B, H, N]`: logarithms of the softmax' denominator
  Tensor<Scalar, 3> lse_rest;  ///< `[B, H, N]`: what they round off, see log_sum_exp.hpp
  /// Of the configuration and the call; inputs are known again by a sample of their numbers.
  LocalAttentionConfig config = {};
  SavedCall<Scalar> call = {};
  std::array<Sample<Scalar>, 3> inputs = {};
  /// The attention rounds what it multiplies.
  bool of_operands = false;
};

/// Gradients of what forward() takes, in the same shapes.
template <typename Scalar>
struct AttentionGradients {
  /// Become room for those of a call, terms 0. Memory is used again.
  void prepare(const TensorView<const Scalar, 4>& of_q, const TensorView<const Scalar, 4>& of_k,
               const TensorView<const Scalar, 4>& of_v, const LocalAttentionCall<Scalar>& call) {
    set_shape<Scalar, 4>(q, of_q.dimensions());
    set_shape<Scalar, 4>(k, of_k.dimensions());
    set_shape<Scalar, 4>(v, of_v.dimensions());
    const auto make_room = []<int Rank>(std::optional<Tensor<Scalar, Rank>>& gradient,
                                        const std::optional<TensorView<const Scalar, Rank>>& of) {
      if (!of) return gradient.reset();
      if (!gradient) gradient.emplace();
      set_shape<Scalar, Rank>(*gradient, of->dimensions());
      gradient->setZero();
    };
    make_room(attn_bias, call.attn_bias);
    make_room(relative_bias, call.relative_bias);
    make_room(sinks, call.sinks);
  }

  Tensor<Scalar, 4> q;
  Tensor<Scalar, 4> k;
  Tensor<Scalar, 4> v;
  std::optional<Tensor<Scalar, 3>> attn_bias;      ///< if there was one
  std::optional<Tensor<Scalar, 2>> relative_bias;  ///< if there was one
  std::optional<Tensor<Scalar, 1>> sinks;          ///< if there were some
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
