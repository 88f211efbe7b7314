// SPDX-License-Identifier: MIT
// A functor of scores that nobody has differentiated goes forward only.
#include <type_traits>

#include <local_mha/attention/local_attention.hpp>

using Tensor = local_mha::Tensor<float, 4>;

void call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& grad_out) {
  const auto square = [](float s, local_mha::Index, local_mha::Index, local_mha::Index) {
    return s * s;
  };
#ifdef CORRECTED
  const auto score = local_mha::with_derivative(
      square, [](float s, local_mha::Index, local_mha::Index, local_mha::Index) { return 2 * s; });
#else
  const auto score = square;
#endif
  const local_mha::LocalAttention<float, std::remove_const_t<decltype(score)>> attention(
      {.window_size = 16}, score);
  attention.forward(q, k, v);
  attention.backward(attention.forward_saving(q, k, v), grad_out, q, k, v);
}
