// SPDX-License-Identifier: MIT
#define REFERENCE_INSTANTIATE
#include "reference/extern.hpp"
