// SPDX-License-Identifier: MIT
/// \file
/// Counts what is allocated. Include it before Eigen, and link allocations.cpp.
#pragma once

#define EIGEN_RUNTIME_NO_MALLOC  // lets a test forbid Eigen's own allocations

#include <atomic>

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
