// SPDX-License-Identifier: MIT
/// \file
/// Delays put between a program and MPI, by MPI's profiling interface: what a slower network and a
/// slower rank would do to it.
#pragma once

namespace measuring {

/// What delays what the program does from now on.
struct Delays {
  /// Messages are seen no sooner than so long after they were sent.
  double latency = 0;
  /// So much longer this rank takes for what it computes between two calls of MPI, such as 0.1.
  double slower = 0;
};

/// \return what was set before
Delays set_delays(const Delays& delays);

}  // namespace measuring
