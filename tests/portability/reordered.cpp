// SPDX-License-Identifier: MIT
// Flags by which sums may be reordered, and which no macro shows: the numbers stay right. (clang
// gets them on the command line.)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("unsafe-math-optimizations")
#endif
#include "computations.cpp"
