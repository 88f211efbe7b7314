// SPDX-License-Identifier: MIT
// Eigen's default layout is column-major; taking such a matrix as [N, dim] would transpose it.
#include <local_mha/mha.hpp>

#ifdef CORRECTED
using Input = local_mha::RowMatrix<float>;
#else
using Input = Eigen::MatrixXf;
#endif

void call(const local_mha::LocalMHA<float>& mha, const Input& x) { mha.forward(x); }
