// SPDX-License-Identifier: MIT
/// \file
/// LOCAL_MHA_ABI: the inline namespace that everything in `local_mha` lies in.
#pragma once

#include <local_mha/core/requirements.hpp>

#include <Eigen/Core>

// Its name says how Eigen computes and aligns here, for packets and layouts follow from that. Units
// of one program that are compiled with different flags thus share nothing but the spelling of
// `local_mha::…`, and what one passes to another of another kind is not found by the linker.
#if defined(EIGEN_VECTORIZE_AVX512DQ)
#define LOCAL_MHA_PACKETS avx512dq
#elif defined(EIGEN_VECTORIZE_AVX512)
#define LOCAL_MHA_PACKETS avx512
#elif defined(EIGEN_VECTORIZE_AVX2)
#define LOCAL_MHA_PACKETS avx2
#elif defined(EIGEN_VECTORIZE_AVX)
#define LOCAL_MHA_PACKETS avx
#elif defined(EIGEN_VECTORIZE_SSE4_2)
#define LOCAL_MHA_PACKETS sse4_2
#elif defined(EIGEN_VECTORIZE_SSE4_1)
#define LOCAL_MHA_PACKETS sse4_1
#elif defined(EIGEN_VECTORIZE_SSSE3)
#define LOCAL_MHA_PACKETS ssse3
#elif defined(EIGEN_VECTORIZE_SSE3)
#define LOCAL_MHA_PACKETS sse3
#elif defined(EIGEN_VECTORIZE_SSE)
#define LOCAL_MHA_PACKETS sse2
#elif defined(EIGEN_VECTORIZE_SVE)
#define LOCAL_MHA_PACKETS sve
#elif defined(EIGEN_VECTORIZE_NEON)
#define LOCAL_MHA_PACKETS neon
#elif defined(EIGEN_VECTORIZE)
#define LOCAL_MHA_PACKETS vectors
#else
#define LOCAL_MHA_PACKETS scalars
#endif

#if defined(EIGEN_VECTORIZE_FMA)
#define LOCAL_MHA_FMA _fma
#else
#define LOCAL_MHA_FMA
#endif

// Conversions of Eigen::half by instructions, or by code.
#if defined(EIGEN_HAS_FP16_C) || defined(EIGEN_VECTORIZE_FP16) || defined(__F16C__)
#define LOCAL_MHA_FP16 _fp16
#else
#define LOCAL_MHA_FP16
#endif

/// Bytes of a Lanes, one channel of a block of positions: 64, or 128 where there is AVX-512.
///
/// A processor that multiplies two whole packets of AVX-512 in a cycle, and loads no more, is fed
/// better by 128: each broadcast operand serves two packets. Those that also have AVX-VNNI are
/// such: Intel's from Sapphire Rapids on, AMD's from Zen 5 on.
#if !defined(LOCAL_MHA_LANE_BYTES)
#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVXVNNI__)
#define LOCAL_MHA_LANE_BYTES 128
#else
#define LOCAL_MHA_LANE_BYTES 64
#endif
#elif LOCAL_MHA_LANE_BYTES != 64 && \
    !(LOCAL_MHA_LANE_BYTES == 128 && defined(EIGEN_VECTORIZE_AVX512))
#include <local_mha takes LOCAL_MHA_LANE_BYTES of 64, or of 128 with AVX-512>
#endif

// Products of Eigen::bfloat16 by instructions: see operands.hpp and matrix_unit.hpp.
#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define LOCAL_MHA_VDPBF16PS
#endif
#if defined(LOCAL_MHA_VDPBF16PS) && (defined(__AMX_BF16__) || defined(__AMXBF16__)) && \
    (defined(__AMX_TILE__) || defined(__AMXTILE__)) && defined(__linux__) &&           \
    defined(__x86_64__) && defined(__GNUC__) && LOCAL_MHA_LANE_BYTES == 128
#define LOCAL_MHA_AMX
#endif
#if defined(LOCAL_MHA_AMX)
#define LOCAL_MHA_BF16 _amx
#elif defined(LOCAL_MHA_VDPBF16PS)
#define LOCAL_MHA_BF16 _bf16
#else
#define LOCAL_MHA_BF16
#endif

#define LOCAL_MHA_PASTE_TOKENS(packets, fma, fp16, bf16, lanes, bytes) \
  packets##fma##fp16##bf16##_lanes##lanes##_align##bytes
#define LOCAL_MHA_PASTE(packets, fma, fp16, bf16, lanes, bytes) \
  LOCAL_MHA_PASTE_TOKENS(packets, fma, fp16, bf16, lanes, bytes)
/// As in `avx2_fma_fp16_lanes64_align32`.
#define LOCAL_MHA_ABI                                                               \
  LOCAL_MHA_PASTE(LOCAL_MHA_PACKETS, LOCAL_MHA_FMA, LOCAL_MHA_FP16, LOCAL_MHA_BF16, \
                  LOCAL_MHA_LANE_BYTES, EIGEN_MAX_STATIC_ALIGN_BYTES)
