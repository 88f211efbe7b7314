// SPDX-License-Identifier: MIT
/// \file
/// Random weights, rows and blocks that become operands in bfloat16.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>

#include "reference/operands.hpp"
#include "support/random.hpp"

namespace support {

/// How far a sum of so many products, whose absolute values add up to `size`, may be off: each is
/// below 2^-126 taken for 0 by some instructions.
inline double sum_tolerance(local_mha::Index depth, double size) {
  return static_cast<double>(depth + 2) * (size * 0x1p-24 + 0x1p-126);
}

/// Of a weight.
struct WeightShape {
  local_mha::Index rows, columns, group_rows, column_group, padded_group;
};
inline constexpr WeightShape weight_shapes[] = {
    {1, 1, 0, 0, 0},     {16, 32, 0, 0, 0},  {17, 33, 0, 0, 0},   {40, 20, 20, 0, 0},
    {24, 7, 8, 0, 0},    {36, 97, 12, 0, 0}, {20, 24, 0, 12, 16}, {33, 40, 0, 20, 24},
    {80, 300, 40, 0, 0}, {7, 64, 7, 64, 64}, {128, 65, 64, 0, 0}};

inline local_mha::RowMatrix<float> random_weight(Random& random, local_mha::Index rows,
                                                 local_mha::Index columns) {
  local_mha::RowMatrix<float> weight(rows, columns);
  for (local_mha::Index i = 0; i < weight.size(); ++i)
    weight.data()[i] = static_cast<float>(random.normal());
  return weight;
}

/// `[channels][block_rows]`
inline local_mha::BlockBuffer<float> random_block(Random& random, local_mha::Index channels) {
  auto block = local_mha::make_block_buffer<float>(channels * local_mha::block_rows<float>);
  for (float& x : block) x = static_cast<float>(random.normal());
  return block;
}

/// Blocks that pass a weight.
struct OperandRows {
  local_mha::Index blocks;
  std::vector<local_mha::detail::Pair> pairs;  // [block][pairs_of(depth)][block_rows]
  std::vector<double> numbers;                 // [block][depth][block_rows]
};
inline OperandRows random_rows(Random& random, local_mha::Index depth, local_mha::Index blocks) {
  OperandRows rows{blocks, {}, {}};
  const auto size = local_mha::detail::pairs_of(depth) * local_mha::block_rows<float>;
  rows.pairs.resize(static_cast<std::size_t>(blocks * size));
  for (local_mha::Index b = 0; b < blocks; ++b) {
    const auto block = random_block(random, depth);
    for (const float x : block) rows.numbers.push_back(reference::operand(static_cast<double>(x)));
    local_mha::detail::pack_block(depth, block.data(), rows.pairs.data() + b * size);
  }
  return rows;
}

}  // namespace support
