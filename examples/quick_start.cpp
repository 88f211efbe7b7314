// SPDX-License-Identifier: MIT
#include <iostream>

#include <local_mha/local_mha.hpp>

int main() {
  Eigen::Tensor<float, 3, Eigen::RowMajor> x(2, 100, 512);  // [batch, sequence, dim]
  x.setRandom();

  local_mha::LocalMHAConfig config{.dim = 512, .window_size = 5};
  local_mha::LocalMHA<float> mha(config);
  auto y = mha.forward(x);

  std::cout << y.dimension(0) << " x " << y.dimension(1) << " x " << y.dimension(2) << '\n';
}
