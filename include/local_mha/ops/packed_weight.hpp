// SPDX-License-Identifier: MIT
/// \file
/// A weight in the order in which products read it.
#pragma once

#include <algorithm>
#include <concepts>
#include <string>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/multiply.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// A weight `[out, in]` in the order in which project() reads it: panels of `Tiling::rows` rows,
/// `[panel][in][row]`; the last panel is filled up with zeros.
///
/// A head's rows are a group that starts a new panel, so that each head's product has its own
/// panels.
template <typename Scalar>
class PackedWeight {
 public:
  static constexpr Index panel_rows = Tiling<Scalar>::rows;

  PackedWeight() = default;

  /// \param weight `[groups·group_rows, in]`, a matrix or its transpose
  /// \param group_rows rows of a group; a divisor of the weight's rows
  /// \param column_group, padded_group `in` is made of groups of `column_group` columns, each to be
  ///        filled up with zeros to `padded_group`, as blocks with padded channels are. 0: it is
  ///        not
  /// \throws std::invalid_argument if rows or columns are not made of such groups
  template <typename Matrix>
    requires std::same_as<typename Matrix::Scalar, Scalar>
  explicit PackedWeight(const Eigen::MatrixBase<Matrix>& weight, Index group_rows = 0,
                        Index column_group = 0, Index padded_group = 0) {
    pack(weight, group_rows, column_group, padded_group);
  }

  /// Becomes what the constructor makes of the same arguments. Memory is used again.
  template <typename Matrix>
    requires std::same_as<typename Matrix::Scalar, Scalar>
  void pack(const Eigen::MatrixBase<Matrix>& weight, Index group_rows = 0, Index column_group = 0,
            Index padded_group = 0) {
    check_arguments(weight.rows(), weight.cols(), group_rows, column_group, padded_group);
    group_rows_ = group_rows > 0 ? group_rows : weight.rows();
    group_panels_ = ceil_div(group_rows_, panel_rows);
    depth_ = column_group > 0 ? weight.cols() / column_group * padded_group : weight.cols();
    panel_size_ = ceil_div(depth_ * panel_rows, block_rows<Scalar>) * block_rows<Scalar>;
    const Index groups = group_rows_ > 0 ? weight.rows() / group_rows_ : 0;
    packed_.assign(static_cast<std::size_t>(groups * group_panels_ * panel_size_), Scalar(0));
    for (Index i = 0; i < groups * group_panels_; ++i) {
      const Index in_group = i % group_panels_ * panel_rows;
      const Index first = i / group_panels_ * group_rows_ + in_group;
      const Index rows = (std::min)(panel_rows, group_rows_ - in_group);
      Scalar* panel = packed_.data() + i * panel_size_;
      for (Index column = 0; column < weight.cols(); ++column) {
        const Index d = column_group > 0
                            ? column / column_group * padded_group + column % column_group
                            : column;
        for (Index r = 0; r < rows; ++r)
          panel[d * panel_rows + r] = weight.derived().coeff(first + r, column);
      }
    }
  }

  /// Columns, those that fill up included.
  Index depth() const { return depth_; }
  Index group_rows() const { return group_rows_; }
  Index group_panels() const { return group_panels_; }
  /// Panel `p` of group `g`, `[depth][panel_rows]`
  const Scalar* panel(Index g, Index p) const {
    return packed_.data() + (g * group_panels_ + p) * panel_size_;
  }
  /// Values of a panel, up to a multiple of block_rows: what fills it up is 0.
  Index panel_size() const { return panel_size_; }

 private:
  static void check_arguments(Index rows, Index columns, Index group_rows, Index column_group,
                              Index padded_group) {
    if (group_rows < 0 || (group_rows > 0 && rows % group_rows != 0))
      reject("group_rows", "a divisor of " + std::to_string(rows) + " rows, or 0", group_rows);
    if (column_group < 0 || (column_group > 0 && columns % column_group != 0))
      reject("column_group", "a divisor of " + std::to_string(columns) + " columns, or 0",
             column_group);
    if (column_group > 0 && padded_group < column_group)
      reject("padded_group", "at least " + std::to_string(column_group), padded_group);
  }

  Index group_rows_ = 0;
  Index group_panels_ = 0;
  Index depth_ = 0;
  Index panel_size_ = 0;
  BlockBuffer<Scalar> packed_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
