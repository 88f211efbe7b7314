// SPDX-License-Identifier: MIT
/// \file
/// The backward pass of HyperConnection.
#pragma once

#include <algorithm>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/tanh.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/layer_parameters.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/residual_streams.hpp>
#include <local_mha/ops/weight_gradient.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

template <typename Scalar>
void HyperConnection<Scalar>::apply_add_backward(const Scalar* grad, const Scalar* r,
                                                 Scalar* grad_y, Scalar* room) const {
  make_arguments(r, room);
  make_weights(room, room);
  for (Index c = 0; c < dim(); ++c) {
    L sum = L::zero();
    for (Index s = 0; s < streams(); ++s)
      sum = fma(at(room, beta_row(s)), at(grad, stream(s) + c), sum);
    put(sum, grad_y, c);
  }
}

// With the unit vector û_s = r_s / ‖r_s‖, the arguments of tanh are a_st = Σ_c û_s[c]·f[c, t], of
// which f holds √dim and the gains. So Σ_c û_s[c]·(gradient of û_s[c]) = Σ_t a_st·(gradient of
// a_st), and the sums over positions of û_s[c]·(gradient of a_st) give the gradients of all that f
// is made of.
template <typename Scalar>
void HyperConnection<Scalar>::apply_mix_backward(const Scalar* r, const Scalar* y,
                                                 const Scalar* grad_branch_input, Scalar* grad,
                                                 Scalar* room, Scalar* sums) const {
  const Index number = streams();
  Scalar* const weights = room;
  Scalar* const arguments = weights + table() * count;
  Scalar* const slopes = arguments + table() * count;  // gradients of the weights, then of a / ‖r‖
  Scalar* const of_mix = slopes + table() * count;     // a channel
  Scalar* const of_r = of_mix + (number + 1) * count;
  Scalar* const along = of_r + (number + 1) * count;
  Scalar* const inverses = along + (number + 1) * count;  // their product could underflow
  const auto load_channel = [&](Index c) {
    put(at(grad_branch_input, c), of_mix, 0);
    for (Index s = 0; s < number; ++s) {
      put(at(grad, stream(s) + c), of_mix, s + 1);
      put(at(r, stream(s) + c), of_r, s);
    }
  };
  make_arguments(r, arguments);
  make_weights(arguments, weights);

  std::fill_n(slopes, table() * count, Scalar(0));
  for (Index c = 0; c < dim(); ++c) {
    load_channel(c);
    for (Index s = 0; s < number; ++s) {
      const L value = at(of_r, s);
      for (Index t = 0; t <= number; ++t) accumulate(value, at(of_mix, t), slopes, s * cols() + t);
      accumulate(at(of_mix, s + 1), at(y, c), slopes, s * cols() + number + 1);
    }
  }

  Scalar* const of_fixed = sums + dim() * cols() * count;
  Scalar* const of_scales = of_fixed + table() * count;
  const L least = sqrt(detail::least_square<Scalar>());
  for (Index s = 0; s < number; ++s) {
    const L inverse = inverse_norm(r, s);
    L total = L::zero();
    for (Index t = 0; t < cols(); ++t) {
      const Index i = s * cols() + t;
      const L dynamic = tanh(at(arguments, i));
      const L slope = at(slopes, i);
      put(at(of_fixed, i) + slope, of_fixed, i);
      accumulate(slope, dynamic, of_scales, t <= number ? 0 : 1);
      const L of_argument = (scale(t) * slope) * (L::broadcast(Scalar(1)) - dynamic * dynamic);
      total = fma(of_argument, at(arguments, i), total);
      put(of_argument * inverse, slopes, i);
    }
    // Where the norm is bounded below, it is a constant.
    const L free = select_negative(least - l2_norm(dim(), r + stream(s) * count), total, L::zero());
    put(L::zero() - free * inverse, along, s);
    put(inverse, inverses, s);
  }

  for (Index c = 0; c < dim(); ++c) {
    load_channel(c);
    in_groups(number, [&]<int n>(Index first) {
      L of_stream[std::size_t{n}];
      LOCAL_MHA_UNROLL for (int i = 0; i < n; ++i) of_stream[i] =
          at(along, first + i) * (at(inverses, first + i) * at(of_r, first + i));
      for (Index t = 0; t <= number; ++t) {
        const L value = at(of_mix, t);
        LOCAL_MHA_UNROLL for (int i = 0; i < n; ++i) of_stream[i] =
            fma(at(weights, (first + i) * cols() + t), value, of_stream[i]);
      }
      for (Index t = 0; t < cols(); ++t) {
        const Scalar& factor = function(t, c);
        LOCAL_MHA_UNROLL for (int i = 0; i < n; ++i) of_stream[i] =
            fma(factor, at(slopes, (first + i) * cols() + t), of_stream[i]);
      }
      LOCAL_MHA_UNROLL for (int i = 0; i < n; ++i) put(of_stream[i], grad, stream(first + i) + c);
    });
    for (Index t = 0; t < cols(); ++t) {
      L sum = at(sums, c * cols() + t);
      for (Index s = 0; s < number; ++s) sum = fma(at(of_r, s), at(slopes, s * cols() + t), sum);
      put(sum, sums, c * cols() + t);
    }
  }
}

template <typename Scalar>
void HyperConnection<Scalar>::add_gradients(const StretchSums<Scalar>& sums,
                                            HyperConnectionParameters<Scalar>& gradients) const {
  const auto& p = parameters_;
  for (Index c = 0; c < dim(); ++c) {
    const Scalar gain = Scalar(root_ * (Scalar(1) + p.norm_gamma[c]));
    const auto of_function = [&](Index t) { return sums.total(c * cols() + t); };
    const Scalar of_beta = of_function(streams() + 1);
    Scalar of_gamma = Scalar(of_beta * p.beta_fn[c]);
    for (Index t = 0; t <= streams(); ++t) {
      const Scalar of_alpha = of_function(t);
      gradients.alpha_fn(c, t) += gain * of_alpha;
      of_gamma += of_alpha * p.alpha_fn(c, t);
    }
    gradients.beta_fn[c] += gain * of_beta;
    gradients.norm_gamma[c] += root_ * of_gamma;
  }
  Index fixed = dim() * cols();
  for (Index s = 0; s < streams(); ++s, fixed += cols()) {
    for (Index t = 0; t <= streams(); ++t) gradients.static_alpha(s, t) += sums.total(fixed + t);
    gradients.static_beta[s] += sums.total(fixed + streams() + 1);
  }
  gradients.alpha_scale(0) += sums.total(fixed);
  gradients.beta_scale(0) += sums.total(fixed + 1);
}

template <typename Scalar>
RowMatrix<Scalar> HyperConnection<Scalar>::add_backward(
    const Eigen::Ref<const RowMatrix<Scalar>>& grad,
    const Eigen::Ref<const RowMatrix<Scalar>>& streams) const {
  const Index rows = streams.rows();
  check_rows("streams", streams, rows, this->streams() * dim());
  check_rows("grad", grad, rows, streams.cols());
  RowMatrix<Scalar> grad_y(rows, dim());
  auto r = make_block_buffer<Scalar>(streams.cols() * count);
  auto of_streams = r;
  auto of_y = make_block_buffer<Scalar>(dim() * count);
  auto room = make_block_buffer<Scalar>(this->room() * count);
  for_each_block_of(rows, [&](Index first, Index some) {
    load(streams, first, some, r.data());
    load(grad, first, some, of_streams.data());
    apply_add_backward(of_streams.data(), r.data(), of_y.data(), room.data());
    store(of_y.data(), first, some, grad_y);
  });
  return grad_y;
}

template <typename Scalar>
RowMatrix<Scalar> HyperConnection<Scalar>::mix_backward(
    HyperConnectionParameters<Scalar>& gradients, const Eigen::Ref<const RowMatrix<Scalar>>& grad,
    const Eigen::Ref<const RowMatrix<Scalar>>& streams,
    const Eigen::Ref<const RowMatrix<Scalar>>& y,
    const Eigen::Ref<const RowMatrix<Scalar>>& grad_branch_input) const {
  const Index rows = streams.rows();
  check_rows("streams", streams, rows, this->streams() * dim());
  check_rows("grad", grad, rows, streams.cols());
  check_rows("y", y, rows, dim());
  check_rows("grad_branch_input", grad_branch_input, rows, dim());
  detail::require_fitting(gradients, this->streams(), dim());
  RowMatrix<Scalar> to(rows, streams.cols());
  auto r = make_block_buffer<Scalar>(streams.cols() * count);
  auto of_streams = r;
  auto result = make_block_buffer<Scalar>(dim() * count);
  auto of_input = result;
  auto room = make_block_buffer<Scalar>(this->room() * count);
  StretchSums<Scalar> sums(ceil_div(rows, stretch_blocks * count), this->sums());
  for_each_block_of(rows, [&](Index first, Index some) {
    load(streams, first, some, r.data());
    load(grad, first, some, of_streams.data());
    load(y, first, some, result.data());
    load(grad_branch_input, first, some, of_input.data());
    apply_mix_backward(r.data(), result.data(), of_input.data(), of_streams.data(), room.data(),
                       sums[first / (stretch_blocks * count)]);
    store(of_streams.data(), first, some, to);
  });
  add_gradients(sums, gradients);
  return to;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
