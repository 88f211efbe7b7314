// SPDX-License-Identifier: MIT
// Whether two checkpoints have the same losses:
//   compare_losses FILE FILE LARGEST_DIFFERENCE STEPS
#include <cmath>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include <local_mha/io/safetensors.hpp>

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  try {
    const auto losses = [&](int i, const char* name) {
      return local_mha::io::SafetensorsFile(argv[i]).read<double>(name);
    };
    double most = 0;
    for (const char* name : {"history/loss", "history/gradient_norm", "history/validation_loss"}) {
      const std::vector<double> a = losses(1, name), b = losses(2, name);
      if (a.size() != b.size() || a.empty()) return 1;
      for (std::size_t i = 0; i < a.size(); ++i) {
        // What is no number is not near another.
        if (!(std::abs(a[i] - b[i]) <= std::stod(argv[3]))) {
          std::printf("%s: step %zu has %.17g and %.17g\n", name, i + 1, a[i], b[i]);
          return 1;
        }
        most = std::fmax(most, std::abs(a[i] - b[i]));
      }
    }
    const auto steps = losses(1, "history/loss").size();
    if (steps < std::stoul(argv[4])) return 1;
    std::printf("%zu losses differ by %g at most\n", steps, most);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
