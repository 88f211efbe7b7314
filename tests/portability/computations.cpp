// SPDX-License-Identifier: MIT
// The computations of float and double: right whatever the processor and the flags.
#include "computations.hpp"

int main() {
  return computations::check<float>("float", 1e-5) | computations::check<double>("double", 1e-13);
}
