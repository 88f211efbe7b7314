// SPDX-License-Identifier: MIT
// A bool tensor does not say its polarity, so it is no PaddingMask.
#include <local_mha/mha.hpp>

void call(const local_mha::LocalMHA<float>& mha, const local_mha::Tensor<float, 3>& x,
          const local_mha::Tensor<bool, 2>& mask) {
#ifdef CORRECTED
  mha.forward(x, local_mha::PaddingMask::masked(mask));
#else
  mha.forward(x, mask);
#endif
}
