// SPDX-License-Identifier: MIT
// Scalars of 16 bits, whose packets in Eigen lack what is needed.
#include "computations.hpp"

int main() {
  return computations::check<Eigen::half>("half", 5e-3) |
         computations::check<Eigen::bfloat16>("bfloat16", 4e-2);
}
