// SPDX-License-Identifier: MIT
// Memory that is counted.
#include "support/allocations.hpp"

#include <cstddef>
#include <cstdlib>
#include <new>

#if COUNTS_ALLOCATIONS
namespace {
void* counted(std::size_t size, std::size_t alignment) {
  ++support::allocations;
  // The size of an aligned allocation is a multiple of the alignment.
  void* memory = std::aligned_alloc(alignment, (size / alignment + 1) * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
}  // namespace

// Every other form of new and delete calls one of these.
void* operator new(std::size_t size) { return counted(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return counted(size, static_cast<std::size_t>(alignment));
}
// Not inlined, for g++ takes free() after new for a mistake.
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}
#endif
