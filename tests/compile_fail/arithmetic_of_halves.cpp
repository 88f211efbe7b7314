// SPDX-License-Identifier: MIT
// What is multiplied in Eigen::bfloat16 is stored so.
#include <Eigen/Core>

#include <local_mha/mha.hpp>

#ifdef CORRECTED
using Layer = local_mha::LocalMHA<float, Eigen::bfloat16, Eigen::bfloat16>;
#else
using Layer = local_mha::LocalMHA<float, Eigen::half, Eigen::bfloat16>;
#endif

Layer layer_of(const local_mha::LocalMHAConfig& config) { return Layer(config); }
