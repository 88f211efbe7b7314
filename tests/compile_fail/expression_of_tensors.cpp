// SPDX-License-Identifier: MIT
// The same of tensors.
#include <local_mha/mha.hpp>

void call(const local_mha::LocalMHA<float>& mha, const local_mha::Tensor<float, 3>& x) {
#ifdef CORRECTED
  const local_mha::Tensor<float, 3> twice = x + x;
  mha.forward(twice);
#else
  mha.forward(x + x);
#endif
}
