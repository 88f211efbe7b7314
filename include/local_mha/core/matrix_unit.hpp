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

#include <local_mha/core/block.hpp>
#include <local_mha/core/compiler.hpp>
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
  MatrixUnit() {
    struct alignas(64) Shapes {
      std::uint8_t palette = 1;
      std::uint8_t first_row = 0;
      std::uint8_t reserved[14] = {};
      std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Shapes whole;
    __asm__ volatile("ldtilecfg %0" ::"m"(whole));
  }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
  ~MatrixUnit() { __asm__ volatile("tilerelease"); }

  template <int Tile>
  static LOCAL_MHA_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
  }
  /// \param row_bytes from row to row
  template <int Tile>
  static LOCAL_MHA_INLINE void load(const void* from, long row_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(Tile)
                     : "memory");
  }
  template <int Tile>
  static LOCAL_MHA_INLINE void store(float* to, long row_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(Tile)
                     : "memory");
  }
  /// `C += A·B`
  template <int C, int A, int B>
  static LOCAL_MHA_INLINE void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

/// Sums of `RowTiles` times tile_rows rows, `[rows][block_rows]`, in the matrix unit: a Lanes is
/// two tiles wide, so that each tile of either operand serves two of the other.
template <int RowTiles>
class TileSums {
  static_assert((RowTiles == 1 || RowTiles == 2) && block_rows<float> == 2 * tile_rows);
  using Unit = MatrixUnit;
  static constexpr bool both = RowTiles == 2;
  static constexpr long row_bytes = sizeof(float) * block_rows<float>;

 public:
  using Rows = float* const (&)[RowTiles];
  using ConstRows = const float* const (&)[RowTiles];

  static LOCAL_MHA_INLINE void zero() {
    Unit::zero<0>();
    Unit::zero<1>();
    if constexpr (both) Unit::zero<2>();
    if constexpr (both) Unit::zero<3>();
  }
  /// \param from the first row of each tile of rows
  static LOCAL_MHA_INLINE void load(ConstRows from) {
    Unit::load<0>(from[0], row_bytes);
    Unit::load<1>(from[0] + tile_rows, row_bytes);
    if constexpr (both) Unit::load<2>(from[1], row_bytes);
    if constexpr (both) Unit::load<3>(from[1] + tile_rows, row_bytes);
  }
  static LOCAL_MHA_INLINE void store(Rows to) {
    Unit::store<0>(to[0], row_bytes);
    Unit::store<1>(to[0] + tile_rows, row_bytes);
    if constexpr (both) Unit::store<2>(to[1], row_bytes);
    if constexpr (both) Unit::store<3>(to[1] + tile_rows, row_bytes);
  }
  /// Adds the products of a tile's depth.
  /// \param a for each tile of rows, `[tile_rows][tile_pairs]`
  /// \param a_stride pairs from row to row
  /// \param b `[tile_pairs][block_rows]`
  static LOCAL_MHA_INLINE void add(const Pair* const (&a)[RowTiles], Index a_stride,
                                   const Pair* b) {
    const long a_bytes = static_cast<long>(sizeof(Pair)) * a_stride;
    Unit::load<4>(a[0], a_bytes);
    Unit::load<6>(b, row_bytes);
    Unit::multiply<0, 4, 6>();
    Unit::load<7>(b + tile_rows, row_bytes);
    Unit::multiply<1, 4, 7>();
    if constexpr (both) {
      Unit::load<5>(a[1], a_bytes);
      Unit::multiply<2, 5, 6>();
      Unit::multiply<3, 5, 7>();
    }
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
