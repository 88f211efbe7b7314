// SPDX-License-Identifier: MIT
// One of two units of a program, each compiled with other flags.
#include "computations.hpp"

int UNIT() { return computations::check<float>("float", 1e-5); }
