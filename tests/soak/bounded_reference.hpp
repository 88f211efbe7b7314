// SPDX-License-Identifier: MIT
/// \file
/// The naive modules of numbers that bound their own error, compiled by bounded_reference.cpp.
#pragma once

#include "reference/extern.hpp"
#include "soak/bounded.hpp"

namespace reference {

#ifdef SOAK_INSTANTIATE
REFERENCE_TEMPLATES(, soak::Bounded<float>)
REFERENCE_TEMPLATES(, soak::Bounded<double>)
#else
REFERENCE_TEMPLATES(extern, soak::Bounded<float>)
REFERENCE_TEMPLATES(extern, soak::Bounded<double>)
#endif

}  // namespace reference
