// SPDX-License-Identifier: MIT
// A mask that looks at flags does not look at those of a temporary tensor.
#include <local_mha/core/mask.hpp>

local_mha::Tensor<bool, 2> flags();

local_mha::PaddingMask mask() {
#ifdef CORRECTED
  return local_mha::PaddingMask::masked(flags());
#else
  return local_mha::PaddingMask::masked_view(flags());
#endif
}
