// SPDX-License-Identifier: MIT
// Eigen's default layout is column-major; taking such a tensor would transpose it silently.
#include <local_mha/mha.hpp>

#ifdef CORRECTED
using Input = Eigen::Tensor<float, 3, Eigen::RowMajor>;
#else
using Input = Eigen::Tensor<float, 3>;
#endif

void call(const local_mha::LocalMHA<float>& mha, const Input& x) { mha.forward(x); }
