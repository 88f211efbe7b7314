// SPDX-License-Identifier: MIT
/// \file
/// The hidden width of feed-forwards, and what is asked of `ff_mult`.
#pragma once

#include <local_mha/config/checks.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Hidden width of the feed-forward: `int(dim · ff_mult · 2/3)`.
/// \throws std::invalid_argument if that is negative or no Index
inline Index feed_forward_inner_dim(Index dim, double ff_mult) {
  const double inner = static_cast<double>(dim) * ff_mult * 2 / 3;
  if (!(inner >= 0 && inner < 0x1p62))
    reject("ff_mult", "int(dim * ff_mult * 2 / 3) to be a number of channels", ff_mult);
  return static_cast<Index>(inner);
}

namespace detail {

inline void require_ff_mult(Index dim, double ff_mult) {
  require_finite("ff_mult", ff_mult);
  if (!(ff_mult > 0) || ff_mult > 1e6 || feed_forward_inner_dim(dim, ff_mult) < 1)
    reject("ff_mult", "positive, with int(dim * ff_mult * 2 / 3) at least 1", ff_mult);
  require_product("ff_mult", feed_forward_inner_dim(dim, ff_mult), 2 * dim);
}

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
