// SPDX-License-Identifier: MIT
/// \file
/// What the program holds on the heap, counted at every allocation.
#pragma once

#include <cstddef>

namespace measuring {

struct HeapUse {
  std::size_t live = 0;         ///< bytes held now
  std::size_t most = 0;         ///< most bytes held since restart_heap_count()
  std::size_t allocations = 0;  ///< since restart_heap_count()
};

/// False where allocations cannot be counted: then heap_use() stays zero.
extern const bool counts_heap;

HeapUse heap_use();

/// Begins anew with `most = live` and no allocations.
void restart_heap_count();

}  // namespace measuring
