// SPDX-License-Identifier: MIT
// Loaded into a program: says at its end which signals that stop it are not handled.
#include <csignal>
#include <cstdio>

#include <initializer_list>

namespace {

struct AtExit {
  ~AtExit() {
    for (const int number : {SIGINT, SIGTERM}) {
      struct ::sigaction action = {};
      if (::sigaction(number, nullptr, &action) != 0 || action.sa_handler == SIG_DFL)
        std::fprintf(stderr, "signal %d is not handled\n", number);
    }
  }
} at_exit;

}  // namespace
