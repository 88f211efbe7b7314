// SPDX-License-Identifier: MIT
/// \file
/// What fuzz targets check.
#pragma once

#include <cstdlib>
#include <iostream>

namespace fuzz {

/// Ends the program, for libFuzzer to keep the input, unless `holds`.
inline void require(bool holds, const char* what) {
  if (holds) return;
  std::cerr << "does not hold: " << what << '\n';
  std::abort();
}

}  // namespace fuzz
