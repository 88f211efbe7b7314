// SPDX-License-Identifier: MIT
// The loops of the matrix unit against their definition and the portable ones. Where there is none,
// they say so.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include <local_mha/attention/weighted_operands.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/local_mha.hpp>
#include <local_mha/ops/project_operands.hpp>
#include <local_mha/ops/weight_gradient.hpp>

#include "reference/operands.hpp"
#include "support/operand_blocks.hpp"

namespace bf16_matrix_unit_test {

#if defined(LOCAL_MHA_AMX)
using Eigen::bfloat16;
using local_mha::Index;
using local_mha::OperandWeight;
using local_mha::detail::Pair;
using reference::operand;
using support::random_block;
using support::sum_tolerance;
using L = local_mha::Lanes<float>;
constexpr Index count = local_mha::block_rows<float>;

#define BF16_TEST_NEEDS_MATRIX_UNIT()                                                       \
  if (!local_mha::detail::has_matrix_unit())                                                \
  GTEST_SKIP() << "NOT TESTED: this processor has no AMX-BF16, or the system does not let " \
                  "this process use it"

TEST(MatrixUnit, ScoresAreSumsOfProducts) {
  BF16_TEST_NEEDS_MATRIX_UNIT();
  const local_mha::detail::MatrixUnit unit;
  Random random(1);
  for (const Index channels : {1, 8, 32, 40, 64, 96, 128}) {
    // A ring that turns over.
    local_mha::KeyOperands<float> keys(channels, 4);
    const Index block = random.integer(4, 9);
    for (Index b = 0; b < block; ++b) keys.put(b, random_block(random, channels).data());
    const auto numbers = random_block(random, channels);
    keys.put(block, numbers.data());
    const auto queries = random_block(random, channels);
    std::vector<Pair> pairs(
        static_cast<std::size_t>(local_mha::detail::pairs_of(channels) * count));
    local_mha::detail::pack_block(channels, queries.data(), pairs.data());
    auto scores = local_mha::make_block_buffer<float>((count + 1) * count);
    std::fill(scores.begin(), scores.end(), 7.0F);
    local_mha::detail::multiply_keys_by_matrix_unit(keys.cursor(block).block(), keys.tiles(),
                                                    pairs.data(), scores.data());
    for (Index key = 0; key < count; ++key)
      for (Index query = 0; query < count; ++query) {
        double sum = 0, size = 0;
        for (Index c = 0; c < channels; ++c) {
          const double product =
              operand(static_cast<double>(numbers[static_cast<std::size_t>(c * count + key)])) *
              operand(static_cast<double>(queries[static_cast<std::size_t>(c * count + query)]));
          sum += product;
          size += std::abs(product);
        }
        ASSERT_NEAR(static_cast<double>(scores[static_cast<std::size_t>(key * count + query)]), sum,
                    sum_tolerance(channels, size));
      }
    for (Index i = 0; i < count; ++i)
      ASSERT_EQ(scores[static_cast<std::size_t>(count * count + i)], 7.0F);
  }
}

TEST(MatrixUnit, WeightedValuesAreThoseOfThePortableLoops) {
  BF16_TEST_NEEDS_MATRIX_UNIT();
  using namespace local_mha::detail;
  using Values = local_mha::ValueOperands<float>;
  using Keys = local_mha::KeyOperands<float>;
  const MatrixUnit unit;
  Random random(2);
  for (const Index channels : {1, 8, 12, 16, 20, 64, 72, 128})
    for (int trial = 0; trial < 12; ++trial) {
      Values values(channels, 12);
      for (Index b = 0; b < 12; ++b) values.put(b, random_block(random, channels).data());
      const local_mha::Range keys{random.integer(0, 100), random.integer(101, 190)};
      Piece<float, Values, Keys> piece{{nullptr, keys, nullptr, nullptr}, &values};
      const local_mha::Range blocks = piece.blocks();
      std::vector<Pair> p(
          static_cast<std::size_t>((blocks.end - blocks.begin) * count / 2 * count));
      for (Index key = blocks.begin * count; key < blocks.end * count; ++key)
        for (Index lane = 0; lane < count; ++lane)
          p[static_cast<std::size_t>((key - blocks.begin * count) / 2 * count + lane)].of[key % 2] =
              bfloat16(keys.contains(key) ? static_cast<float>(random.uniform()) : 0.0F);
      piece.pairs = p.data();
      Chunk<float, Values, Keys> chunk;
      chunk.pieces[chunk.number++] = piece;
      const L rescale = L::broadcast(0.5F), factor = L::broadcast(0.25F);
      const L* const before = trial % 2 == 0 ? nullptr : &rescale;
      auto got = random_block(random, local_mha::padded_channels<float>(channels));
      auto wanted = got;
      // Each block's are made once, just before they are multiplied.
      std::vector<Index> made;
      add_weighted_values_by_matrix_unit<true>(
          chunk, channels, before, [&](const auto&, Index block) { made.push_back(block); },
          [&] { return factor; }, got.data());
      ASSERT_EQ(static_cast<Index>(made.size()), piece.blocks().end - piece.blocks().begin);
      for (std::size_t i = 0; i < made.size(); ++i)
        ASSERT_EQ(made[i], piece.blocks().begin + static_cast<Index>(i));
      local_mha::Upcoming<float> upcoming;
      constexpr int least = local_mha::Tiling<float>::rows;
      for (Index c = 0; c < channels; c += least)
        add_weighted_channels<least, true>(chunk, c, before, factor, upcoming, wanted.data());
      for (std::size_t i = 0; i < static_cast<std::size_t>(channels * count); ++i)
        ASSERT_NEAR(static_cast<double>(got[i]), static_cast<double>(wanted[i]), 2e-4);
    }
}

TEST(MatrixUnit, ProjectionsAreThoseOfThePortableLoops) {
  BF16_TEST_NEEDS_MATRIX_UNIT();
  Random random(3);
  for (const support::WeightShape& s : support::weight_shapes)
    for (const Index blocks : {1, 2, 5}) {
      const OperandWeight<float> weight(support::random_weight(random, s.rows, s.columns),
                                        s.group_rows, s.column_group, s.padded_group);
      const support::OperandRows x = support::random_rows(random, weight.depth(), blocks);
      const Index rows = weight.group_rows(), depth = (weight.depth() + 31) / 32;
      std::vector<local_mha::BlockBuffer<float>> y;
      for (Index b = 0; b < blocks; ++b) y.push_back(random_block(random, rows));
      local_mha::detail::project_by_matrix_unit(
          weight, 0, {0, rows}, x.pairs.data(), blocks,
          [&](Index b) { return y[static_cast<std::size_t>(b)].data(); });
      const Index stride = depth * 16 * count;
      constexpr Index together = local_mha::Tiling<float>::rows;
      for (Index b = 0; b < blocks; ++b)
        for (Index row = 0; row < rows; row += together) {
          auto portable = local_mha::make_block_buffer<float>(together * count);
          float* const to[1] = {portable.data()};
          local_mha::detail::project_tiles<1>(
              depth, local_mha::detail::pairs_of_panel(weight, 0, row) + row % 16 * 16, rows - row,
              x.pairs.data() + b * stride, stride, to);
          for (Index i = 0; i < std::min(together, rows - row) * count; ++i)
            ASSERT_NEAR(
                static_cast<double>(
                    y[static_cast<std::size_t>(b)][static_cast<std::size_t>(row * count + i)]),
                static_cast<double>(portable[static_cast<std::size_t>(i)]), 1e-3);
        }
    }
}

TEST(MatrixUnit, WeightGradientsAreThoseOfThePortableLoops) {
  BF16_TEST_NEEDS_MATRIX_UNIT();
  using namespace local_mha::detail;
  Random random(4);
  for (const Index rows : {1, 16, 17, 40, 70})
    for (const Index columns : {1, 16, 20, 33, 100})
      for (const Index blocks : {1, 2, 5, 40}) {
        local_mha::BlockArray<float, bfloat16> grad(blocks, rows);
        local_mha::PanelArray<float, bfloat16> x(blocks, local_mha::panel_channels<float>(columns));
        for (Index b = 0; b < blocks; ++b) {
          grad.put(b, 0, rows, random_block(random, rows).data());
          x.put(b, 0, columns, random_block(random, columns).data());
        }
        const local_mha::Range tiles{0, local_mha::PositionTiles<float, bfloat16>::count(blocks)};
        const Index panels = (columns + count - 1) / count;
        const local_mha::RowMatrix<float> before = support::random_weight(random, rows, columns);
        local_mha::RowMatrix<float> got = before, wanted = before;
        add_weight_tiles_by_matrix_unit(tiles, grad[0], grad.stride(), rows, x, {0, panels},
                                        columns, got.data(), columns);
        for (Index r = 0; r < rows; ++r)
          for (Index p = 0; p < panels; ++p)
            add_weight_tile<1, 1>(tiles, grad[0] + r * tile_pairs, grad.stride(), x, p,
                                  columns - p * count, wanted.data() + r * columns + p * count,
                                  columns);
        for (Index i = 0; i < got.size(); ++i)
          ASSERT_NEAR(static_cast<double>(got.data()[i]), static_cast<double>(wanted.data()[i]),
                      1e-3);
      }
}
#else
TEST(MatrixUnit, IsComparedWithThePortableLoops) {
  GTEST_SKIP() << "NOT TESTED: these tests were compiled for a processor without AMX-BF16; "
                  "compile them with -march=sapphirerapids, or native there";
}
#endif

}  // namespace bf16_matrix_unit_test
