// SPDX-License-Identifier: MIT
/// \file
/// The backward pass of an embedding, a table of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// The backward pass of `y[i] = table[rows[i]]`.
/// \param grad_table `[entries, dim]`, to be added to
/// \param rows of the table, one for each row of y
/// \param grad_y gradient of y, `[rows, dim]`
/// \throws std::invalid_argument naming the argument that does not fit
template <typename Scalar>
void embedding_backward(RowMatrix<Scalar>& grad_table, std::span<const std::int64_t> rows,
                        const Eigen::Ref<const RowMatrix<std::type_identity_t<Scalar>>>& grad_y) {
  require_shape<2>("grad_y", {grad_y.rows(), grad_y.cols()},
                   {static_cast<Index>(rows.size()), grad_table.cols()});
  for (std::size_t i = 0; i < rows.size(); ++i)
    if (rows[i] < 0 || rows[i] >= grad_table.rows())
      reject("rows", "0 to " + std::to_string(grad_table.rows() - 1), rows[i], " at ", i);
  // Each entry's positions one after the other, for there may be millions of one entry.
  std::vector<std::size_t> order(rows.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return rows[a] != rows[b] ? rows[a] < rows[b] : a < b;
  });
  Vector<LongSum<Scalar>> sum(grad_y.cols());
  for (std::size_t begin = 0, end = 0; begin < order.size(); begin = end) {
    const std::int64_t entry = rows[order[begin]];
    sum.setConstant(LongSum<Scalar>(0));
    for (; end < order.size() && rows[order[end]] == entry; ++end)
      sum +=
          grad_y.row(static_cast<Index>(order[end])).transpose().template cast<LongSum<Scalar>>();
    grad_table.row(entry) += sum.transpose().template cast<Scalar>();
  }
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
