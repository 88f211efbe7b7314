// SPDX-License-Identifier: MIT
// Flags by which there are no NaN, and which no macro shows: the program ends before main().
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("finite-math-only")
#endif
#include <cstdio>

#include <local_mha/core/types.hpp>

int main() { std::puts("started"); }
