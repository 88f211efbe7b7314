// SPDX-License-Identifier: MIT
/// \file
/// The clocks.
#pragma once

#include <chrono>
#include <ctime>

namespace measuring {

inline double wall_seconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

/// Seconds that this thread has computed: what others take from its core does not count,
/// so that a busy machine gives the figures of an idle one, up to what they do to the caches.
/// (Wall time where the system has no such clock.)
inline double cpu_seconds() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec now{};
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) == 0)
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
#endif
  return wall_seconds();
}

}  // namespace measuring
