// SPDX-License-Identifier: MIT
#define SOAK_INSTANTIATE
#include "soak/bounded_reference.hpp"
