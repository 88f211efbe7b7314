// SPDX-License-Identifier: MIT
/// \file
/// What compilers are told of functions and loops.
#pragma once

#include <local_mha/core/requirements.hpp>

#include <Eigen/Core>

/// Inlined whatever the compiler's heuristics say: accumulators must stay in registers.
#define LOCAL_MHA_INLINE EIGEN_ALWAYS_INLINE
/// Before a statement: what it calls is inlined, functions that cannot say so themselves, too.
/// (Before clang 15, no statement had this attribute.)
#if defined(__clang__) && __clang_major__ >= 15
#define LOCAL_MHA_INLINE_CALLS [[clang::always_inline]]
#else
#define LOCAL_MHA_INLINE_CALLS
#endif
/// Not inlined: a loop over accumulators has the registers for itself.
#define LOCAL_MHA_NOINLINE EIGEN_DONT_INLINE

/// All that the function calls is inlined into it: where a compiler leaves Eigen's transpositions
/// as calls, as g++ does in large files, their registers go through memory.
#if defined(__GNUC__)
#define LOCAL_MHA_FLATTEN __attribute__((flatten)) inline
#else
#define LOCAL_MHA_FLATTEN inline
#endif

// A loop over registers, which has no registers unless it is unrolled.
#if defined(__clang__)
#define LOCAL_MHA_UNROLL _Pragma("clang loop unroll(full)")
#define LOCAL_MHA_UNROLL_4 _Pragma("clang loop unroll_count(4)")
#elif defined(__GNUC__)
#define LOCAL_MHA_UNROLL _Pragma("GCC unroll 64")
#define LOCAL_MHA_UNROLL_4 _Pragma("GCC unroll 4")
#else
#define LOCAL_MHA_UNROLL
#define LOCAL_MHA_UNROLL_4
#endif
