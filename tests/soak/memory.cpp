// SPDX-License-Identifier: MIT
// operator new and malloc that fill what they give with NaN, count, and fail on demand. Eigen's
// tensors come from malloc, which is wrapped by the linker: --wrap=malloc.
#include "soak/memory.hpp"

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

thread_local long allocated = 0;
thread_local long left_before_failure = -1;
thread_local bool failed = false;

// Bytes of which every floating-point number is a NaN.
constexpr int poison = 0xFF;

bool may_allocate() {
  ++allocated;
  if (left_before_failure < 0 || left_before_failure-- > 0) return true;
  failed = true;
  return false;
}

}  // namespace

namespace soak {

long allocations() { return allocated; }
void fail_after(long count) {
  failed = false;
  left_before_failure = count;
}
bool fail_no_more() {
  left_before_failure = -1;
  return failed;
}

}  // namespace soak

extern "C" {
void* __real_malloc(std::size_t size);   // NOLINT: the linker's name
void* __wrap_malloc(std::size_t size) {  // NOLINT: the linker's name
  void* memory = may_allocate() ? __real_malloc(size) : nullptr;
  if (memory != nullptr) std::memset(memory, poison, size);
  return memory;
}
}

namespace {

void* poisoned(std::size_t size, std::size_t alignment) {
  // The size of an aligned allocation is a multiple of the alignment.
  const std::size_t whole = (size / alignment + 1) * alignment;
  void* memory = may_allocate() ? std::aligned_alloc(alignment, whole) : nullptr;
  if (memory == nullptr) throw std::bad_alloc();
  return std::memset(memory, poison, whole);
}

}  // namespace

// Every other form of new and delete calls one of these.
void* operator new(std::size_t size) { return poisoned(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return poisoned(size, static_cast<std::size_t>(alignment));
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
