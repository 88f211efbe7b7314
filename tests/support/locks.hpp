// SPDX-License-Identifier: MIT
/// \file
/// Counts the mutexes that are locked. Include it in one file of a program, and link
/// allocations.cpp.
#pragma once

#include <atomic>
#include <cstdlib>

#include "support/allocations.hpp"

namespace support {
inline std::atomic<long> locks{0};
}  // namespace support

// A sanitizer has functions of its own here, too, and a static program no next function. Elsewhere
// than with glibc, nothing is counted.
#if COUNTS_ALLOCATIONS && defined(__GLIBC__) && !defined(LOCAL_MHA_TEST_STATIC)
#define COUNTS_LOCKS 1
#include <dlfcn.h>
#include <pthread.h>

extern "C" int pthread_mutex_lock(pthread_mutex_t* mutex) noexcept {
  using Lock = int (*)(pthread_mutex_t*);
  // Known at compile time, so that no lock guards it.
  static std::atomic<Lock> next{nullptr};
  Lock lock = next;
  if (lock == nullptr) {
    lock = reinterpret_cast<Lock>(dlsym(RTLD_NEXT, "pthread_mutex_lock"));
    if (lock == nullptr) std::abort();
    next = lock;
  }
  ++support::locks;
  return lock(mutex);
}
#else
#define COUNTS_LOCKS 0
#endif

namespace support {

/// Mutexes that are locked during a call.
template <typename Call>
long locks_of(Call&& call) {
  const long before = locks;
  call();
  return locks - before;
}

}  // namespace support
