// SPDX-License-Identifier: MIT
// Two units of other flags in one program: both are right. With an argument, the one for any
// processor alone.
#include <cstdio>

int any_processor();
int avx2();

int main(int argc, char** /*argv*/) {
  if (argc > 1) return any_processor();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::puts("this processor has no AVX2");
    return 77;
  }
  return any_processor() | avx2();
}
