// SPDX-License-Identifier: MIT
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>

/// Two ends: a program that writes to `terminal` writes to a terminal, and `master` reads it.
struct PseudoTerminal {
  int master = -1;
  int terminal = -1;

  static PseudoTerminal open() {
    const int master = ::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master == -1 || ::grantpt(master) != 0 || ::unlockpt(master) != 0)
      throw std::runtime_error("no pseudo-terminal");
    const int terminal = ::open(::ptsname(master), O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (terminal == -1) throw std::runtime_error("no pseudo-terminal");
    return {master, terminal};
  }
};
