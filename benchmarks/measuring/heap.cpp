// SPDX-License-Identifier: MIT
// Every call of malloc and its kin in this program arrives here, because the linker is told so
// (--wrap); operator new is made to come the same way. Eigen allocates by malloc, the standard
// library by operator new.
#include "heap.hpp"

#include <atomic>

#if defined(LOCAL_MHA_BENCHMARK_WRAPS_MALLOC)

#include <malloc.h>

#include <cstdlib>
#include <new>

namespace measuring {

namespace {

std::atomic<std::size_t> live{0};
std::atomic<std::size_t> most{0};
std::atomic<std::size_t> allocations{0};

void* gained(void* memory) {
  if (memory == nullptr) return memory;
  const std::size_t now = live += malloc_usable_size(memory);
  ++allocations;
  std::size_t before = most;
  while (now > before && !most.compare_exchange_weak(before, now)) {
  }
  return memory;
}

void lost(void* memory) {
  if (memory != nullptr) live -= malloc_usable_size(memory);
}

}  // namespace

const bool counts_heap = true;

HeapUse heap_use() { return {live, most, allocations}; }

void restart_heap_count() {
  most = live.load();
  allocations = 0;
}

}  // namespace measuring

extern "C" {
// Names that the linker prescribes.
void* __real_malloc(std::size_t size);
void* __real_calloc(std::size_t count, std::size_t size);
void* __real_realloc(void* memory, std::size_t size);
void* __real_aligned_alloc(std::size_t alignment, std::size_t size);
int __real_posix_memalign(void** memory, std::size_t alignment, std::size_t size);
void __real_free(void* memory);

void* __wrap_malloc(std::size_t size) { return measuring::gained(__real_malloc(size)); }
void* __wrap_calloc(std::size_t count, std::size_t size) {
  return measuring::gained(__real_calloc(count, size));
}
void* __wrap_realloc(void* memory, std::size_t size) {
  const std::size_t before = memory == nullptr ? 0 : malloc_usable_size(memory);
  void* moved = __real_realloc(memory, size);
  if (moved == nullptr && size > 0) return nullptr;
  measuring::live -= before;
  return measuring::gained(moved);
}
void* __wrap_aligned_alloc(std::size_t alignment, std::size_t size) {
  return measuring::gained(__real_aligned_alloc(alignment, size));
}
int __wrap_posix_memalign(void** memory, std::size_t alignment, std::size_t size) {
  const int error = __real_posix_memalign(memory, alignment, size);
  if (error == 0) measuring::gained(*memory);
  return error;
}
void __wrap_free(void* memory) {
  measuring::lost(memory);
  __real_free(memory);
}
}

namespace {

void* allocate(std::size_t size) {
  if (void* memory = __wrap_malloc(size > 0 ? size : 1)) return memory;
  throw std::bad_alloc();
}

void* allocate(std::size_t size, std::align_val_t alignment) {
  void* memory = nullptr;
  if (__wrap_posix_memalign(&memory, static_cast<std::size_t>(alignment), size > 0 ? size : 1) == 0)
    return memory;
  throw std::bad_alloc();
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size); }
void* operator new[](std::size_t size) { return allocate(size); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, alignment);
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return allocate(size, alignment);
}
void operator delete(void* memory) noexcept { __wrap_free(memory); }
void operator delete[](void* memory) noexcept { __wrap_free(memory); }
void operator delete(void* memory, std::size_t) noexcept { __wrap_free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { __wrap_free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { __wrap_free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { __wrap_free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { __wrap_free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept {
  __wrap_free(memory);
}

#else

namespace measuring {

const bool counts_heap = false;
HeapUse heap_use() { return {}; }
void restart_heap_count() {}

}  // namespace measuring

#endif
