// SPDX-License-Identifier: MIT
// Memory that runs out.
#include "support/failing_memory.hpp"

#include <cerrno>
#include <cstddef>
#include <cstdlib>

#if MEMORY_FAILS
extern "C" {
void* __libc_malloc(std::size_t size) noexcept;
void* __libc_memalign(std::size_t alignment, std::size_t size) noexcept;
void* malloc(std::size_t size) noexcept {
  return support::runs_out() ? nullptr : __libc_malloc(size);
}
// By one of these, operator new allocates with an alignment.
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  return support::runs_out() ? nullptr : __libc_memalign(alignment, size);
}
void* memalign(std::size_t alignment, std::size_t size) noexcept {
  return aligned_alloc(alignment, size);
}
int posix_memalign(void** memory, std::size_t alignment, std::size_t size) noexcept {
  *memory = aligned_alloc(alignment, size);
  return *memory == nullptr ? ENOMEM : 0;
}
}
#endif
