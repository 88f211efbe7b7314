// SPDX-License-Identifier: MIT
// Numbers are not converted silently.
#include <local_mha/mha.hpp>

#ifdef CORRECTED
using Given = float;
#else
using Given = double;
#endif

void call(const local_mha::LocalMHA<float>& mha, const local_mha::Tensor<Given, 3>& x) {
  mha.forward(x);
}
