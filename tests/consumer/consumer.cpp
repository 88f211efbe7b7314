// SPDX-License-Identifier: MIT
// What a user's first program does, with what the package alone gives.
#include <iostream>

#include <local_mha/local_mha.hpp>
#include <local_mha/version.hpp>

int main() {
  const local_mha::LocalMHAConfig config{.dim = 32, .window_size = 5, .dim_head = 8, .heads = 2};
  const local_mha::LocalMHA<float> mha(config);
  Eigen::Tensor<float, 3, Eigen::RowMajor> x(2, 11, 32);
  x.setRandom();
  const auto y = mha.forward(x);
  std::cout << "local_mha " << LOCAL_MHA_VERSION_MAJOR << '.' << LOCAL_MHA_VERSION_MINOR << ": "
            << y.dimensions() << '\n';
  const bool same_shape =
      y.dimension(0) == x.dimension(0) && y.dimension(1) == x.dimension(1) && y.dimension(2) == 32;
  return same_shape ? 0 : 1;
}
