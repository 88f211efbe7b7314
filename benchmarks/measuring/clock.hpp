// SPDX-License-Identifier: MIT
/// \file
/// The clock of figures that are about one thread.
#pragma once

#include <chrono>
#include <ctime>

namespace measuring {

/// Seconds that this thread has computed: what others take from its core does not count,
/// so that a busy machine gives the figures of an idle one, up to what they do to the caches.
/// (Wall time where the system has no such clock.)
inline double cpu_seconds() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec now{};
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) == 0)
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
#endif
  const auto now_on_the_wall = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now_on_the_wall).count();
}

}  // namespace measuring
