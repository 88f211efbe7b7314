// SPDX-License-Identifier: MIT
/// \file
/// What the library asks of the compiler and of its flags. Where it is missing, the compilation
/// ends here, with one message; or the program does when it starts.
#pragma once

// A file that is not found ends the compilation everywhere, as #error does not.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 11
#include <local_mha needs g++ 11 or newer>
#elif __cplusplus < 202002L && !(defined(_MSVC_LANG) && _MSVC_LANG >= 202002L)
#include <local_mha needs C++20: compile with -std=c++20 or later>
#elif defined(__GNUC__) && !defined(__cpp_exceptions)
#include <local_mha reports errors by exceptions: compile without -fno-exceptions>
#elif defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0)
#include <local_mha is exact only without -ffast-math, -Ofast and their parts>
#elif defined(__SIZEOF_POINTER__) && __SIZEOF_POINTER__ < 8 && \
    !defined(EIGEN_DEFAULT_DENSE_INDEX_TYPE)
#include <local_mha counts in 64 bits: compile with -DEIGEN_DEFAULT_DENSE_INDEX_TYPE=__INT64_TYPE__>
#endif

#include <version>
// A compiler may know C++20 and have a library that does not.
#if !defined(__cpp_lib_bit_cast)
#include <local_mha needs std::bit_cast: libstdc++ 11, libc++ 14, or newer>
#endif

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include <Eigen/Core>

/// Not in the inline namespace: what all units of a program share.
namespace local_mha::program {

/// EIGEN_DEFAULT_ALIGN_BYTES of the first unit.
inline std::atomic<int> alignment = -1;

[[noreturn]] inline void refuse(const char* reason) {
  std::fprintf(stderr, "local_mha: %s\n", reason);
  std::_Exit(EXIT_FAILURE);
}

// What runs before main() may use no instructions but those of every processor: a program may have
// units for others than the one it runs on.
#if defined(__GNUC__) && defined(__x86_64__)
#define LOCAL_MHA_FOR_ANY_PROCESSOR __attribute__((noinline, target("no-avx")))
#else
#define LOCAL_MHA_FOR_ANY_PROCESSOR
#endif

// No macro shows the flags of `#pragma GCC optimize`, nor some of clang's.
LOCAL_MHA_FOR_ANY_PROCESSOR static bool lacks_special_numbers() {
#if defined(__GNUC__)
  const float infinity = __builtin_huge_valf();
#else
  const float infinity = std::numeric_limits<float>::infinity();
#endif
  const volatile float zero = 0;
  const volatile float most = 3.40282347e+38F;
  const float infinite = 1 / zero;
  const float twice = 2 * most;
  const float nan = infinite - infinite;
  return nan == nan || !(nan != nan) || infinite != infinity || !(twice == infinity);
}

// Of each unit its own, compiled with its flags.
static bool check_unit() {
  if (lacks_special_numbers())
    refuse(
        "a part of this program is compiled with flags by which there are no NaN and no "
        "infinities (-ffinite-math-only, -fno-honor-nans, -fno-honor-infinities, -ffast-math)");
  // The linker keeps one of Eigen's functions that take memory and one of those that free it.
  int first = -1;
  if (!alignment.compare_exchange_strong(first, EIGEN_DEFAULT_ALIGN_BYTES) &&
      first != EIGEN_DEFAULT_ALIGN_BYTES)
    refuse(
        "parts of this program are compiled with flags by which Eigen aligns memory differently. "
        "Give all of them the same -m flags, or all of them -DEIGEN_MAX_ALIGN_BYTES=64");
  return true;
}

[[maybe_unused]] static const bool unit_is_checked = check_unit();

}  // namespace local_mha::program
