// SPDX-License-Identifier: MIT
/// \file
/// Memory that runs out when a test says so: operator new and Eigen's own allocations alike.
/// Link failing_memory.cpp.
#pragma once

#include <atomic>
#include <cerrno>
#include <new>

// A sanitizer has a malloc of its own; others than glibc's have no second name.
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MEMORY_FAILS 1
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || \
    __has_feature(memory_sanitizer)
#undef MEMORY_FAILS
#endif
#endif
#endif
#ifndef MEMORY_FAILS
#define MEMORY_FAILS 0
#endif

namespace support {

/// Allocations to go, the one that fails included; 0: none fails; −1: one has.
inline std::atomic<long> until_failure{0};
/// Whether all after it fail, too.
inline std::atomic<bool> stays_out{false};

inline bool runs_out() noexcept {
  long left = until_failure;
  do {
    if (left == 0 || (left < 0 && !stays_out)) return false;
  } while (!until_failure.compare_exchange_weak(left, left <= 1 ? -1 : left - 1));
  if (left > 1) return false;
  errno = ENOMEM;
  return true;
}

struct Outcome {
  bool failed;  ///< an allocation did
  bool threw;   ///< std::bad_alloc
};

/// Runs a call in which allocation `number`, counted from 1, fails.
template <typename Call>
Outcome with_failure(long number, bool and_all_after_it, Call&& call) {
  bool threw = false;
  stays_out = and_all_after_it;
  until_failure = number;
  try {
    call();
  } catch (const std::bad_alloc&) {
    threw = true;
  }
  return {until_failure.exchange(0) < 0, threw};
}

}  // namespace support
