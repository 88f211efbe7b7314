// SPDX-License-Identifier: MIT
// Reads a layer that export_layer.py has written, runs it, and compares with what PyTorch gave.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <utility>

#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const local_mha::io::SafetensorsFile file(argv[1]);
  auto [config, parameters] = local_mha::io::load_local_mha<float>(file);
  const local_mha::LocalMHA<float> mha(config, std::move(parameters));

  const auto x = file.tensor<float, 3>("input/x");  // [batch, sequence, dim]
  const auto expected = file.tensor<float, 3>("output/y");
  const auto y = mha.forward(x);

  float largest = 0;
  bool all_numbers = y.dimensions() == expected.dimensions();
  for (Eigen::Index i = 0; all_numbers && i < y.size(); ++i) {
    all_numbers = std::isfinite(y.data()[i]);
    largest = std::max(largest, std::abs(y.data()[i] - expected.data()[i]));
  }
  std::cout << "dim " << config.dim << ", " << config.heads << " heads, window "
            << config.window_size << ": largest difference " << largest << '\n';
  return all_numbers && largest < 2e-5F ? 0 : 1;
}
