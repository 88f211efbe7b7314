// SPDX-License-Identifier: MIT
/// \file
/// Counts what is allocated. Include it before Eigen, in one file of a program.
#pragma once

#define EIGEN_RUNTIME_NO_MALLOC  // lets a test forbid Eigen's own allocations

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

#include <Eigen/Core>

// A sanitizer has an operator new of its own.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define COUNTS_ALLOCATIONS 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || \
    __has_feature(memory_sanitizer)
#define COUNTS_ALLOCATIONS 0
#endif
#endif
#ifndef COUNTS_ALLOCATIONS
#define COUNTS_ALLOCATIONS 1
#endif

namespace support {
inline std::atomic<long> allocations{0};
}  // namespace support

#if COUNTS_ALLOCATIONS
namespace support {
inline void* counted(std::size_t size, std::size_t alignment) {
  ++allocations;
  // The size of an aligned allocation is a multiple of the alignment.
  void* memory = std::aligned_alloc(alignment, (size / alignment + 1) * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
}  // namespace support

// Every other form of new and delete calls one of these.
void* operator new(std::size_t size) { return support::counted(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return support::counted(size, static_cast<std::size_t>(alignment));
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

namespace support {

/// Allocations of a call; Eigen's own, which go past operator new, assert.
template <typename Call>
long allocations_of(Call&& call) {
  const long before = allocations;
  Eigen::internal::set_is_malloc_allowed(false);
  call();
  Eigen::internal::set_is_malloc_allowed(true);
  return allocations - before;
}

}  // namespace support
