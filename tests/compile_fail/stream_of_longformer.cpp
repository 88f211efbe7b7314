// SPDX-License-Identifier: MIT
// Longformer's attention does not stream: a global row sees what comes after it.
#include <local_mha/longformer.hpp>

void stream(const local_mha::LongformerAttention<float>& attention) {
#ifdef CORRECTED
  static_cast<void>(attention);
#else
  local_mha::LongformerAttention<float>::Stream stream(attention);
#endif
}
