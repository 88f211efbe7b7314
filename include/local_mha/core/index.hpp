// SPDX-License-Identifier: MIT
/// \file
/// What positions, sizes and shapes are counted in.
#pragma once

#include <local_mha/core/requirements.hpp>

#include <Eigen/Core>

#include <local_mha/core/namespace.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What positions, sizes and shapes are counted in: 64 bits, with a sign.
using Index = Eigen::Index;
static_assert(
    sizeof(Index) >= 8,
    "local_mha counts in 64 bits: compile with -DEIGEN_DEFAULT_DENSE_INDEX_TYPE=__INT64_TYPE__");

/// `ceil(a / b)` of non-negative numbers
constexpr Index ceil_div(Index a, Index b) { return a / b + (a % b != 0); }

}  // namespace local_mha::inline LOCAL_MHA_ABI
