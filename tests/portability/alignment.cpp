// SPDX-License-Identifier: MIT
// One of two units that align differently: the program ends before main().
#include <cstdio>

#include <local_mha/core/types.hpp>

#if defined(MAIN)
int other();
int main() {
  std::puts("started");
  return other();
}
#else
int other() { return 0; }
#endif
