// SPDX-License-Identifier: MIT
/// \file
/// A weight in the order in which products read it, which is the only one in which it is held.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <string>
#include <type_traits>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/lanes.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/multiply.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class TensorNumbers;

}  // namespace detail

/// A weight `[out, in]` in the order in which project() reads it: panels of panel_rows rows,
/// `[panel][in][row]`, or of Eigen::bfloat16 `[panel][in/2][row][2]`; the last panel is filled up
/// with zeros.
///
/// A head's rows are a group that starts a new panel, so that each head's product has its own
/// panels.
///
/// Operands of products in Eigen::bfloat16 lie in tiles, `[panel][in/32][row][32]`.
/// \tparam Storage what its numbers are rounded to: see can_store
/// \tparam Arithmetic what they are multiplied as: see can_multiply
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class PackedWeight {
  static_assert(can_store<Scalar, Storage>,
                "weights are stored as what is computed with, or where that is float, as "
                "Eigen::bfloat16 or Eigen::half");
  static_assert(can_multiply<Scalar, Storage, Arithmetic>,
                "products are of what is computed with, or of Eigen::bfloat16 that is stored so");
  static constexpr bool is_rounded = !std::is_same_v<Scalar, Storage>;
  static constexpr bool in_tiles = !std::is_same_v<Scalar, Arithmetic>;
  // Columns whose values lie side by side.
  static constexpr Index together = in_tiles     ? detail::tile_depth
                                    : is_rounded ? detail::side_by_side<Storage>
                                                 : 1;

 public:
  /// Of a weight in 16 bits, as many as a packet holds: it is read from far away, by a single row.
  static constexpr Index panel_rows =
      in_tiles     ? detail::tile_rows
      : is_rounded ? (std::max)(Tiling<Scalar>::rows, Lanes<Scalar>::packet_size)
                   : Tiling<Scalar>::rows;

  PackedWeight() = default;

  /// Packs a weight.
  /// \param weight `[groups·group_rows, in]`, a matrix or its transpose
  /// \param group_rows rows of a group; a divisor of the weight's rows
  /// \param column_group, padded_group `in` is made of groups of `column_group` columns, each to be
  ///        filled up with zeros to `padded_group`, as blocks with padded channels are. 0: it is
  ///        not
  /// \throws std::invalid_argument if rows or columns are not made of such groups
  template <typename Matrix>
    requires(std::same_as<typename Matrix::Scalar, Scalar> ||
             std::same_as<typename Matrix::Scalar, Storage>)
  explicit PackedWeight(const Eigen::MatrixBase<Matrix>& weight, Index group_rows = 0,
                        Index column_group = 0, Index padded_group = 0) {
    pack(weight, group_rows, column_group, padded_group);
  }

  /// Becomes what the constructor makes of the same arguments. Memory is used again.
  template <typename Matrix>
    requires(std::same_as<typename Matrix::Scalar, Scalar> ||
             std::same_as<typename Matrix::Scalar, Storage>)
  void pack(const Eigen::MatrixBase<Matrix>& weight, Index group_rows = 0, Index column_group = 0,
            Index padded_group = 0) {
    prepare(weight.rows(), weight.cols(), group_rows, column_group, padded_group);
    for_each_panel([&](Index first, Index rows, Storage* panel) {
      for (Index column = 0; column < columns_; ++column) {
        for (Index r = 0; r < rows; ++r)
          panel[in_panel(place(column), r)] = made(weight.derived().coeff(first + r, column));
      }
    });
  }

  /// Becomes what pack() makes of the transpose of a weight that is packed.
  /// \param weight another one; a group of its columns, if they are grouped, is made of groups of
  ///        `group_rows`
  /// \throws std::invalid_argument also if it is not
  void pack_transposed(const PackedWeight& weight, Index group_rows = 0, Index column_group = 0,
                       Index padded_group = 0) {
    if (weight.column_group_ > 0 && (group_rows < 1 || weight.column_group_ % group_rows != 0))
      reject("group_rows", "a divisor of " + std::to_string(weight.column_group_), group_rows);
    prepare(weight.columns_, weight.rows_, group_rows, column_group, padded_group);
    for_each_panel([&](Index first, Index rows, Storage* panel) {
      // Rows of a panel are columns there that adjoin.
      const Index begin = weight.place(first);
      for (Index column = 0; column < columns_; ++column) {
        const Storage* const from = weight.panel_of(column);
        const Index row = weight.row_of_panel(column);
        for (Index r = 0; r < rows; ++r)
          panel[in_panel(place(column), r)] = from[in_panel(begin + r, row)];
      }
    });
  }

  /// What was packed, bit for bit if it was of the Storage; of operands, what they became.
  RowMatrix<Scalar> unpacked() const {
    RowMatrix<Scalar> weight(rows_, columns_);
    for (Index r = 0; columns_ > 0 && r < rows_; ++r)
      for (Index column = 0; column < columns_; ++column)
        weight(r, column) = detail::from_stored<Scalar>(at(r, column));
    return weight;
  }
  /// Those of what was packed.
  Index rows() const { return rows_; }
  /// Columns of what was packed.
  Index cols() const { return columns_; }
  /// Columns, those that fill up included.
  Index depth() const { return depth_; }
  /// Rows of a group.
  Index group_rows() const { return group_rows_; }
  /// Panels of a group.
  Index group_panels() const { return group_panels_; }
  /// Panel `p` of group `g`, `[depth][panel_rows]`, or `[depth/2][panel_rows][2]`, or
  /// `[depth/32][panel_rows][32]`
  const Storage* panel(Index g, Index p) const {
    return packed_.data() + (g * group_panels_ + p) * panel_size_;
  }
  /// The panel behind another one; the first, behind the last.
  const Storage* panel_behind(const Storage* panel) const {
    const Storage* const next = panel + panel_size_;
    return next == packed_.data() + packed_.size() ? packed_.data() : next;
  }
  /// Values of a panel, up to a multiple of block_rows: what fills it up is 0.
  Index panel_size() const { return panel_size_; }

 private:
  friend detail::TensorNumbers<Scalar, Storage, Arithmetic>;

  // Zeros of the shape.
  void prepare(Index rows, Index cols, Index group_rows, Index column_group, Index padded_group) {
    check_arguments(rows, cols, group_rows, column_group, padded_group);
    const Index rows_of_group = group_rows > 0 ? group_rows : rows;
    const Index panels = ceil_div(rows_of_group, panel_rows);
    const Index depth = column_group > 0 ? cols / column_group * padded_group : cols;
    const Index panel_size =
        ceil_div(ceil_div(depth, together) * together * panel_rows, block_rows<Scalar>) *
        block_rows<Scalar>;
    const Index groups = rows_of_group > 0 ? rows / rows_of_group : 0;
    // All that may fail, before anything changes.
    packed_.assign(static_cast<std::size_t>(groups * panels * panel_size), Storage(0));
    rows_ = rows;
    columns_ = cols;
    column_group_ = column_group;
    padded_group_ = padded_group;
    group_rows_ = rows_of_group;
    group_panels_ = panels;
    depth_ = depth;
    panel_size_ = panel_size;
  }

  // `fill(first, rows, panel)` for each panel, with its rows.
  template <typename Fill>
  void for_each_panel(Fill&& fill) {
    for (Index first = 0; first < rows_;) {
      const Index in_group = first % group_rows_;
      const Index number = (std::min)(panel_rows, group_rows_ - in_group);
      fill(first, number,
           packed_.data() +
               (first / group_rows_ * group_panels_ + in_group / panel_rows) * panel_size_);
      first += number;
    }
  }

  // What is kept of a number.
  template <typename Number>
  static Storage made(const Number& x) {
    if constexpr (in_tiles)
      return detail::to_operand<Arithmetic>(static_cast<Scalar>(x));
    else
      return detail::to_stored<Storage>(x);
  }

  // Where a column lies among those that fill up.
  Index place(Index column) const {
    return column_group_ > 0 ? column / column_group_ * padded_group_ + column % column_group_
                             : column;
  }
  // Where a row's value at such a place lies in its panel.
  static Index in_panel(Index place, Index row) {
    return (place / together * panel_rows + row) * together + place % together;
  }
  const Storage* panel_of(Index r) const {
    return panel(r / group_rows_, r % group_rows_ / panel_rows);
  }
  Index row_of_panel(Index r) const { return r % group_rows_ % panel_rows; }

  const Storage& at(Index r, Index column) const {
    return panel_of(r)[in_panel(place(column), row_of_panel(r))];
  }

  static void check_arguments(Index rows, Index cols, Index group_rows, Index column_group,
                              Index padded_group) {
    if (group_rows < 0 || (group_rows > 0 && rows % group_rows != 0))
      reject("group_rows", "a divisor of " + std::to_string(rows) + " rows, or 0", group_rows);
    if (column_group < 0 || (column_group > 0 && cols % column_group != 0))
      reject("column_group", "a divisor of " + std::to_string(cols) + " columns, or 0",
             column_group);
    if (column_group > 0 && padded_group < column_group)
      reject("padded_group", "at least " + std::to_string(column_group), padded_group);
  }

  Index rows_ = 0;
  Index columns_ = 0;
  Index column_group_ = 0;
  Index padded_group_ = 0;
  Index group_rows_ = 0;
  Index group_panels_ = 0;
  Index depth_ = 0;
  Index panel_size_ = 0;
  BlockBuffer<Storage> packed_;
};

namespace detail {

/// The numbers of a tensor, or of a weight as it is rounded, row by row, as a Sample takes them,
/// wherever they lie.
template <typename Scalar, typename Storage, typename Arithmetic>
class TensorNumbers {
  using Weight = PackedWeight<Scalar, Storage, Arithmetic>;

 public:
  template <typename Plain>
  explicit TensorNumbers(const Eigen::PlainObjectBase<Plain>& tensor)
      : data_(tensor.data()), size_(static_cast<std::size_t>(tensor.size())) {}
  explicit TensorNumbers(const Weight& weight)
      : packed_(&weight), size_(static_cast<std::size_t>(weight.rows() * weight.cols())) {}

  std::size_t size() const { return size_; }
  Scalar operator[](std::size_t i) const {
    if (packed_ == nullptr) return data_[i];
    const auto place = static_cast<Index>(i);
    return from_stored<Scalar>(packed_->at(place / packed_->cols(), place % packed_->cols()));
  }

 private:
  const Scalar* data_ = nullptr;
  const Weight* packed_ = nullptr;
  std::size_t size_;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
