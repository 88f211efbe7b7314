// SPDX-License-Identifier: MIT
// A view that has a name is not one of a temporary tensor, which may be an argument.
#include <local_mha/local_mha.hpp>

local_mha::Tensor<float, 3> input();

void call(const local_mha::LocalMHA<float>& mha) {
#ifdef CORRECTED
  mha.forward(input());
#else
  const local_mha::TensorView<const float, 3> x = input();
  mha.forward(x);
#endif
}
