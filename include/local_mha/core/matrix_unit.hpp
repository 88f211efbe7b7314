// SPDX-License-Identifier: MIT
/// \file
/// The matrix unit of Intel's processors (AMX), which multiplies tiles of Eigen::bfloat16.
///
///     C[row][lane] += Σ_d A[row][d] · B[d][lane]
///
/// A tile of A holds 16 rows of 32 operands, `[16][32]`; one of B 32 of 16 lanes, as pairs of
/// neighbours in depth, `[16][16][2]`; one of C sums in float, `[16][16]`. (Intel 64 and IA-32
/// Architectures Software Developer's Manual, volume 1, chapter 18.)
///
/// Its code is there if the compiler may use the instructions (`-mamx-tile -mamx-bf16`), and runs
/// if the processor has them and the system permits it, which is asked for once.
#pragma once

#include <type_traits>

#include <local_mha/core/namespace.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>

#if defined(LOCAL_MHA_AMX)

#include <cstdint>

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Whether this process may use the matrix unit.
inline bool has_matrix_unit() {
  static const bool permitted = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    constexpr unsigned bf16 = 1U << 22, tiles = 1U << 24;
    if ((d & bf16) == 0 || (d & tiles) == 0) return false;
    // Of the state that a tile takes, which Linux saves only for those who ask (5.16 and later).
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return permitted;
}

/// The tiles of the calling thread: as long as it lives, and no other one. What a caller has
/// configured them as before is lost.
class MatrixUnit {
 public:
  /// What tiles 4 to 7 are.
  enum class Depth : std::uint8_t {
    whole,  ///< 16 rows of 32 operands, or 16 pairs of 16 lanes
    half    ///< tile 4 16 rows of 16 operands, the others 8 pairs of 16 lanes
  };

  explicit MatrixUnit(Depth depth = Depth::whole) {
    struct alignas(64) Shapes {
      std::uint8_t palette = 1;
      std::uint8_t first_row = 0;
      std::uint8_t reserved[14] = {};
      std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Shapes whole;
    static constexpr Shapes half{.bytes = {64, 64, 64, 64, 32, 64, 64, 64},
                                 .rows = {16, 16, 16, 16, 16, 8, 8, 8}};
    __asm__ volatile("ldtilecfg %0" ::"m"(depth == Depth::half ? half : whole));
  }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
  ~MatrixUnit() { __asm__ volatile("tilerelease"); }

  /// Bytes from row to row of sums, and of operands.
  static constexpr long row_bytes = 64;

  template <int Tile>
  static LOCAL_MHA_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
  }
  /// \param stride bytes from row to row
  template <int Tile>
  static LOCAL_MHA_INLINE void load(const void* from, long stride = row_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile)
                     : "memory");
  }
  template <int Tile>
  static LOCAL_MHA_INLINE void store(float* to) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(Tile)
                     : "memory");
  }
  /// `C += A·B`
  template <int C, int A, int B>
  static LOCAL_MHA_INLINE void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail

#endif

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Whether products are those of the matrix unit.
/// \tparam Arithmetic what is multiplied, see can_multiply
template <typename Scalar, typename Arithmetic>
bool by_matrix_unit() {
#if defined(LOCAL_MHA_AMX)
  if constexpr (!std::is_same_v<Scalar, Arithmetic>) return has_matrix_unit();
#endif
  return false;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
