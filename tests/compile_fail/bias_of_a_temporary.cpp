// SPDX-License-Identifier: MIT
// What a call is given may have a name, and then outlives a temporary tensor.
#include <local_mha/local_mha.hpp>

local_mha::Tensor<float, 3> bias();

void name_a_call() {
#ifdef CORRECTED
  const local_mha::Tensor<float, 3> made = bias();
  const local_mha::LocalMHACall<float> call{.attn_bias = made};
#else
  const local_mha::LocalMHACall<float> call{.attn_bias = bias()};
#endif
  static_cast<void>(call);
}
