// SPDX-License-Identifier: MIT
// Operands in bfloat16, the memory that they lie in and the loops that multiply them, each against
// its definition.
#define EIGEN_USE_THREADS

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

#include <local_mha/attention/key_products.hpp>
#include <local_mha/attention/operand_ring.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/local_mha.hpp>
#include <local_mha/ops/project_operands.hpp>
#include <local_mha/ops/weight_gradient.hpp>

#include "reference/operands.hpp"
#include "support/operand_blocks.hpp"
#include "support/random.hpp"

namespace bf16_operands_test {

using Eigen::bfloat16;
using local_mha::Index;
using local_mha::OperandWeight;
using local_mha::RowMatrix;
using local_mha::detail::Pair;
using reference::operand;
using support::random_block;
using support::random_rows;
using support::random_weight;
using support::sum_tolerance;
using support::WeightShape;
using L = local_mha::Lanes<float>;

constexpr Index count = local_mha::block_rows<float>;

static_assert(local_mha::can_multiply<float, float, float>);
static_assert(local_mha::can_multiply<double, double, double>);
static_assert(local_mha::can_multiply<float, bfloat16, float>);
static_assert(local_mha::can_multiply<float, bfloat16, bfloat16>);
static_assert(!local_mha::can_multiply<float, float, bfloat16>);
static_assert(!local_mha::can_multiply<float, Eigen::half, bfloat16>);
static_assert(!local_mha::can_multiply<double, bfloat16, bfloat16>);

template <typename Layer>
concept GoesBack =
    requires(const Layer& layer, typename Layer::Saved& saved,
             typename Layer::Parameters& gradients, const local_mha::Tensor<float, 3>& x) {
      layer.forward_saving(saved, x);
      layer.backward(gradients, saved, x, x);
    };
static_assert(GoesBack<local_mha::LocalMHA<float>>);
static_assert(GoesBack<local_mha::LocalMHA<float, bfloat16, bfloat16>>);
static_assert(!GoesBack<local_mha::LocalMHA<float, bfloat16>>);
template <typename Layer>
concept Saves = requires(const Layer& layer, typename Layer::Saved& saved,
                         const local_mha::Tensor<float, 3>& x) { layer.forward_saving(saved, x); };
static_assert(Saves<local_mha::LocalMHA<float>>);
static_assert(!Saves<local_mha::LocalMHA<float, bfloat16>>);

// ---- numbers

/// Every half with which a float can begin, with what decides how it is rounded.
std::vector<float> hostile_numbers() {
  std::vector<float> numbers;
  for (std::uint32_t high = 0; high <= 0xffff; ++high)
    for (const std::uint32_t low : {0x0000U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU})
      numbers.push_back(std::bit_cast<float>(high << 16 | low));
  return numbers;
}

std::uint32_t bits_of(bfloat16 x) { return std::bit_cast<std::uint16_t>(x); }

/// Whether an operand is what a number becomes.
testing::AssertionResult is_operand_of(bfloat16 got, float number) {
  const auto bits = std::bit_cast<std::uint32_t>(number);
  const std::uint32_t wanted = reference::operand_bits(bits);
  if (std::isnan(number)) {
    // Which NaN is of no account, but its sign stays.
    if ((bits_of(got) & 0x7fff) > 0x7f80 && bits_of(got) >> 15 == bits >> 31)
      return testing::AssertionSuccess();
  } else if (bits_of(got) == wanted) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure()
         << std::hex << bits << " became " << bits_of(got) << ", not " << wanted;
}

TEST(Bf16Operands, TheReferenceRoundsAsTheFormatIsDefined) {
  EXPECT_EQ(operand(1.0), 1.0);
  EXPECT_EQ(operand(1 + 0x1p-8), 1.0);  // ties
  EXPECT_EQ(operand(1 + 3 * 0x1p-8), 1 + 0x1p-6);
  EXPECT_EQ(operand(1 + 0x1.01p-8), 1 + 0x1p-7);
  EXPECT_EQ(operand(-0x1p-126), -0x1p-126);
  EXPECT_EQ(operand(0x1.fffffcp-127), 0.0);
  EXPECT_TRUE(std::signbit(operand(-0x1p-130)));
  EXPECT_EQ(operand(0x1.fep127), 0x1.fep127);
  EXPECT_EQ(operand(0x1.fefffep127), 0x1.fep127);
  EXPECT_EQ(operand(0x1.ffp127), std::numeric_limits<double>::infinity());
  EXPECT_TRUE(std::isnan(operand(std::numeric_limits<double>::quiet_NaN())));
}

TEST(Bf16Operands, OneByOne) {
  for (const float number : hostile_numbers())
    ASSERT_TRUE(is_operand_of(local_mha::detail::to_operand<bfloat16>(number), number));
  // What is no operand stays.
  EXPECT_EQ(local_mha::detail::to_operand<float>(1e-40F), 1e-40F);
}

TEST(Bf16Operands, InPairs) {
  const std::vector<float> numbers = hostile_numbers();
  const std::size_t size = numbers.size() / count * count;
  alignas(64) float first[count], second[count];
  alignas(64) Pair pairs[count];
  for (std::size_t i = 0; i < size; i += count) {
    for (std::size_t lane = 0; lane < count; ++lane) {
      first[lane] = numbers[i + lane];
      second[lane] = numbers[(i * 7 + lane * 13) % numbers.size()];
    }
    local_mha::detail::store_pairs(L::load(first), L::load(second), pairs);
    for (std::size_t lane = 0; lane < count; ++lane) {
      ASSERT_TRUE(is_operand_of(pairs[lane].of[0], first[lane])) << lane;
      ASSERT_TRUE(is_operand_of(pairs[lane].of[1], second[lane])) << lane;
    }
  }
}

TEST(Bf16Operands, InLanesAndInPlace) {
  const std::vector<float> numbers = hostile_numbers();
  const Index size = static_cast<Index>(numbers.size()) / count * count;
  auto in_place = local_mha::make_block_buffer<float>(size);
  std::copy_n(numbers.begin(), size, in_place.begin());
  auto same = in_place;
  local_mha::detail::round_to_operands<bfloat16>(size, in_place.data());
  local_mha::detail::round_to_operands<float>(size, same.data());
  alignas(64) bfloat16 operands[count];
  for (Index i = 0; i < size; i += count) {
    local_mha::detail::store_operands(L::load_unaligned(numbers.data() + i), operands);
    for (Index lane = 0; lane < count; ++lane) {
      const auto at = static_cast<std::size_t>(i + lane);
      ASSERT_TRUE(is_operand_of(operands[lane], numbers[at]));
      const auto bits = std::bit_cast<std::uint32_t>(in_place[at]);
      ASSERT_EQ(bits & 0xffff, 0U);
      ASSERT_TRUE(is_operand_of(std::bit_cast<bfloat16>(static_cast<std::uint16_t>(bits >> 16)),
                                numbers[at]));
      ASSERT_EQ(std::bit_cast<std::uint32_t>(same[at]), std::bit_cast<std::uint32_t>(numbers[at]));
    }
  }
}

TEST(Bf16Operands, OfABlockWithZerosBehind) {
  const std::vector<float> numbers = hostile_numbers();
  std::size_t next = 0;
  for (const Index channels : {1, 2, 7, 31, 32, 33, 64, 65, 100}) {
    auto block = local_mha::make_block_buffer<float>(channels * count);
    for (float& x : block) x = numbers[next = (next + 4099) % numbers.size()];
    const Index pairs_of_block = local_mha::detail::pairs_of(channels);
    EXPECT_EQ(pairs_of_block, (channels + 31) / 32 * 16);
    std::vector<Pair> pairs(static_cast<std::size_t>((pairs_of_block + 1) * count));
    for (Pair& pair : pairs) pair.of[0] = pair.of[1] = bfloat16(3);
    local_mha::detail::pack_block(channels, block.data(), pairs.data());
    for (Index c = 0; c < 2 * pairs_of_block; ++c)
      for (Index lane = 0; lane < count; ++lane) {
        const bfloat16 got = pairs[static_cast<std::size_t>(c / 2 * count + lane)].of[c % 2];
        if (c < channels)
          ASSERT_TRUE(is_operand_of(got, block[static_cast<std::size_t>(c * count + lane)]));
        else
          ASSERT_EQ(bits_of(got), 0U) << c;
      }
    for (Index lane = 0; lane < count; ++lane)  // nothing behind
      ASSERT_EQ(
          static_cast<float>(pairs[static_cast<std::size_t>(pairs_of_block * count + lane)].of[0]),
          3.0F);
  }
}

// ---- products

template <bool InWords>
void expect_products() {
  using Lanes = local_mha::detail::PairLanes<L, InWords>;
  Random random(5);
  alignas(64) float c[count], got[count], a[2][count], b[2];
  alignas(64) Pair pairs[count];
  for (int trial = 0; trial < 2000; ++trial) {
    // Of sizes from far below to far above each other.
    const auto number = [&] {
      return static_cast<float>(
          operand(random.normal() * std::ldexp(1.0, static_cast<int>(random.integer(-50, 50)))));
    };
    for (Index lane = 0; lane < count; ++lane) {
      for (int k = 0; k < 2; ++k) a[k][lane] = number();
      c[lane] = static_cast<float>(random.normal());
    }
    Pair all;
    for (int k = 0; k < 2; ++k) all.of[k] = bfloat16(b[k] = number());
    local_mha::detail::store_pairs(L::load(a[0]), L::load(a[1]), pairs);
    fma(all, Lanes::load(pairs), L::load(c)).store(got);
    for (Index lane = 0; lane < count; ++lane) {
      double sum = static_cast<double>(c[lane]), size = std::abs(sum);
      for (int k = 0; k < 2; ++k) {
        const double product = static_cast<double>(a[k][lane]) * static_cast<double>(b[k]);
        sum += product;
        size += std::abs(product);
      }
      ASSERT_NEAR(static_cast<double>(got[lane]), sum, sum_tolerance(2, size)) << lane;
    }
  }
  // What is not finite.
  for (const float x :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
    for (int k = 0; k < 2; ++k) {
      std::fill_n(a[0], count, 1.0F);
      std::fill_n(a[1], count, 1.0F);
      a[k][3] = x;
      local_mha::detail::store_pairs(L::load(a[0]), L::load(a[1]), pairs);
      for (const float factor : {0.0F, 1.0F}) {
        Pair all;
        all.of[k] = bfloat16(factor);
        all.of[1 - k] = bfloat16(1);
        fma(all, Lanes::load(pairs), L::zero()).store(got);
        for (Index lane = 0; lane < count; ++lane) {
          if (lane != 3) {
            ASSERT_EQ(got[lane], 1 + factor);
          } else if (factor == 0 || std::isnan(x)) {
            ASSERT_TRUE(std::isnan(got[lane]));
          } else {
            ASSERT_EQ(got[lane], x);
          }
        }
      }
    }
}

TEST(Bf16Operands, ProductsOfPairs) {
  expect_products<false>();
#if defined(LOCAL_MHA_VDPBF16PS)
  expect_products<true>();
#endif
}

// ---- weights

/// Where a column lies in the depth.
Index place(const WeightShape& s, Index column) {
  return s.column_group > 0 ? column / s.column_group * s.padded_group + column % s.column_group
                            : column;
}

TEST(Bf16Operands, AWeightLiesInTilesOfThem) {
  Random random(3);
  for (const WeightShape& s : support::weight_shapes) {
    RowMatrix<float> weight = random_weight(random, s.rows, s.columns);
    weight(0, 0) = 1e-39F;
    weight(s.rows - 1, s.columns - 1) = 1 + 0x1.01p-8F;
    const OperandWeight<float> packed(weight, s.group_rows, s.column_group, s.padded_group);
    const RowMatrix<float> back = packed.unpacked();
    ASSERT_EQ(back.rows(), s.rows);
    ASSERT_EQ(back.cols(), s.columns);
    const Index group_rows = s.group_rows > 0 ? s.group_rows : s.rows;
    // All numbers of all panels: those of the weight, and zeros.
    const Index depth =
        s.column_group > 0 ? s.columns / s.column_group * s.padded_group : s.columns;
    ASSERT_EQ(packed.depth(), depth);
    std::vector<float> wanted(static_cast<std::size_t>(packed.panel_size() * packed.group_panels() *
                                                       (s.rows / group_rows)),
                              0.0F);
    for (Index r = 0; r < s.rows; ++r)
      for (Index column = 0; column < s.columns; ++column) {
        const auto value = static_cast<float>(operand(static_cast<double>(weight(r, column))));
        ASSERT_EQ(back(r, column), value);
        const Index panel = r / group_rows * packed.group_panels() + r % group_rows / 16;
        const Index p = place(s, column);
        wanted[static_cast<std::size_t>(panel * packed.panel_size() + p / 32 * 16 * 32 +
                                        r % group_rows % 16 * 32 + p % 32)] = value;
      }
    for (std::size_t i = 0; i < wanted.size(); ++i)
      ASSERT_EQ(static_cast<float>(packed.panel(0, 0)[i]), wanted[i]) << i;
    // Of numbers that are stored so, and of its transpose.
    const RowMatrix<bfloat16> stored = back.cast<bfloat16>();
    const OperandWeight<float> of_stored(stored, s.group_rows, s.column_group, s.padded_group);
    ASSERT_TRUE(of_stored.unpacked() == back);
    OperandWeight<float> transposed;
    transposed.pack_transposed(packed, s.column_group);
    ASSERT_TRUE(transposed.unpacked() == back.transpose());
  }
}

TEST(Bf16Operands, PassAWeightInBlocks) {
  Random random(8);
  for (const WeightShape& s : support::weight_shapes)
    for (const Index blocks : {1, 2, 3, 4, 5}) {
      const RowMatrix<float> given = random_weight(random, s.rows, s.columns);
      const OperandWeight<float> weight(given, s.group_rows, s.column_group, s.padded_group);
      const RowMatrix<float> held = weight.unpacked();
      const Index depth = weight.depth(), group_rows = weight.group_rows();
      const support::OperandRows x = random_rows(random, depth, blocks);
      const Index groups = s.rows / group_rows;
      for (Index group = 0; group < groups; ++group) {
        const auto size = static_cast<std::size_t>(group_rows * count);
        std::vector<local_mha::BlockBuffer<float>> y;
        for (Index b = 0; b < blocks; ++b) y.emplace_back(size + count, 7.0F);
        const auto of = [&](Index b) { return y[static_cast<std::size_t>(b)].data(); };
        // As the threads of a device share its panels.
        const Index middle = std::min<Index>(16, group_rows);
        if (random.chance(0.5)) {
          project(weight, group, x.pairs.data(), blocks, of);
        } else {
          project(weight, group, {0, middle}, x.pairs.data(), blocks, of);
          for (std::size_t b = 0; b < y.size(); ++b)
            for (std::size_t i = static_cast<std::size_t>(middle * count); i < y[b].size(); ++i)
              ASSERT_EQ(y[b][i], 7.0F);
          project(weight, group, {middle, group_rows}, x.pairs.data(), blocks, of);
        }
        for (Index b = 0; b < blocks; ++b) {
          for (Index r = 0; r < group_rows; ++r)
            for (Index lane = 0; lane < count; ++lane) {
              double sum = 0, magnitude = 0;
              for (Index column = 0; column < s.columns; ++column) {
                const double product = static_cast<double>(held(group * group_rows + r, column)) *
                                       x.numbers[static_cast<std::size_t>(
                                           (b * depth + place(s, column)) * count + lane)];
                sum += product;
                magnitude += std::abs(product);
              }
              ASSERT_NEAR(static_cast<double>(of(b)[r * count + lane]), sum,
                          sum_tolerance(depth, magnitude))
                  << s.rows << " x " << s.columns << ", row " << r << ", lane " << lane;
            }
          for (Index i = 0; i < count; ++i) ASSERT_EQ(of(b)[group_rows * count + i], 7.0F);
        }
      }
    }
}

TEST(Bf16Operands, ANaNStaysInItsLane) {
  Random random(2);
  const OperandWeight<float> weight(random_weight(random, 24, 40));
  support::OperandRows x = random_rows(random, 40, 1);
  auto clean = local_mha::make_block_buffer<float>(24 * count), poisoned = clean;
  project(weight, 0, x.pairs.data(), 1, [&](Index) { return clean.data(); });
  x.pairs[7 * count + 3].of[1] = bfloat16(std::numeric_limits<float>::quiet_NaN());
  project(weight, 0, x.pairs.data(), 1, [&](Index) { return poisoned.data(); });
  for (Index r = 0; r < 24; ++r)
    for (Index lane = 0; lane < count; ++lane) {
      const auto i = static_cast<std::size_t>(r * count + lane);
      if (lane == 3)
        ASSERT_TRUE(std::isnan(poisoned[i]));
      else
        ASSERT_EQ(poisoned[i], clean[i]);
    }
}

TEST(Bf16Operands, PassAWeightAlone) {
  Random random(9);
  for (const WeightShape& s : support::weight_shapes) {
    const OperandWeight<float> weight(random_weight(random, s.rows, s.columns), s.group_rows,
                                      s.column_group, s.padded_group);
    const RowMatrix<float> held = weight.unpacked();
    const Index depth = weight.depth(), group_rows = weight.group_rows();
    // Apart from each other.
    std::vector<float> x(static_cast<std::size_t>(3 * depth));
    for (float& number : x) number = static_cast<float>(random.normal());
    x[0] = 1e-39F;
    auto spread = local_mha::make_block_buffer<float>(spread_size(weight));
    std::fill(spread.begin(), spread.end(), 5.0F);
    spread_lane(weight, x.data(), 3, spread.data());
    for (Index group = 0; group < s.rows / group_rows; ++group) {
      std::vector<float> y(static_cast<std::size_t>(2 * group_rows + 2), 7.0F);
      const Index middle = std::min<Index>(16, group_rows);
      if (group % 2 == 0) {
        project_lane(weight, group, spread.data(), y.data(), 2);
      } else {
        project_lane(weight, group, {0, middle}, spread.data(), y.data(), 2);
        project_lane(weight, group, {middle, group_rows}, spread.data(), y.data(), 2);
      }
      for (Index r = 0; r < group_rows; ++r) {
        double sum = 0, magnitude = 0;
        for (Index column = 0; column < s.columns; ++column) {
          const double product =
              static_cast<double>(held(group * group_rows + r, column)) *
              operand(static_cast<double>(x[static_cast<std::size_t>(3 * place(s, column))]));
          sum += product;
          magnitude += std::abs(product);
        }
        ASSERT_NEAR(static_cast<double>(y[static_cast<std::size_t>(2 * r)]), sum,
                    sum_tolerance(depth, magnitude))
            << s.rows << " x " << s.columns << ", row " << r;
        ASSERT_EQ(y[static_cast<std::size_t>(2 * r + 1)], 7.0F);
      }
      ASSERT_EQ(y[static_cast<std::size_t>(2 * group_rows)], 7.0F);
    }
  }
}

// ---- keys and values

/// Makes a block one of fewer rows, 0 beyond them. Returns these, `[rows][channels]`, and no more.
std::vector<float> first_rows(Index rows, Index channels, local_mha::BlockBuffer<float>& block) {
  std::vector<float> of(static_cast<std::size_t>(rows * channels));
  for (Index c = 0; c < channels; ++c)
    for (Index r = 0; r < count; ++r) {
      float& x = block[static_cast<std::size_t>(c * count + r)];
      if (r < rows)
        of[static_cast<std::size_t>(r * channels + c)] = x;
      else
        x = 0;
    }
  return of;
}

/// Puts a block into a ring, in one of the ways, of which some leave rows out.
template <typename Ring>
void put_somehow(Random& random, Index b, local_mha::BlockBuffer<float>& block, Ring& other,
                 Ring& ring) {
  if (b % 4 == 0) {
    ring.put(b, block.data());
  } else if (b % 4 == 1) {
    other.put(b, block.data());
    ring.copy_block(b, other);
  } else if (b % 4 == 2) {  // as in a stream, row by row
    std::vector<bfloat16> row(static_cast<std::size_t>(ring.channels()));
    for (Index r = 0; r < count; ++r) {
      for (Index c = 0; c < ring.channels(); ++c)
        row[static_cast<std::size_t>(c)] =
            static_cast<bfloat16>(block[static_cast<std::size_t>(c * count + r)]);
      ring.put_row(b * count + r, row.data());
    }
    if constexpr (requires { ring.note_finite(b); }) ring.note_finite(b);
  } else {
    const Index rows = random.chance(0.5) ? count : random.integer(1, count);
    const std::vector<float> of = first_rows(rows, ring.channels(), block);
    ring.put_rows(b, rows, {of.data(), ring.channels()});
  }
}

TEST(Bf16Operands, KeysLieInRows) {
  Random random(4);
  for (const Index channels : {1, 7, 8, 32, 33, 64, 100})
    for (const Index capacity : {1, 3, 4}) {
      local_mha::KeyOperands<float> ring(channels, capacity), other(channels, 5);
      ASSERT_EQ(ring.channels(), channels);
      ASSERT_EQ(ring.tiles(), (channels + 31) / 32);
      std::vector<local_mha::BlockBuffer<float>> blocks;
      for (Index b = 0; b < 9; ++b) {
        blocks.push_back(random_block(random, channels));
        put_somehow(random, b, blocks.back(), other, ring);
        // The last ones, past where the ring turns over.
        const Index first = std::max<Index>(0, b + 1 - capacity);
        auto cursor = ring.cursor(first);
        for (Index kept = first; kept <= b; ++kept, cursor.advance()) {
          ASSERT_EQ(cursor.block(), ring[kept]);
          for (Index key = 0; key < count; ++key)
            for (Index c = 0; c < ring.tiles() * 32; ++c) {
              const Pair& pair =
                  ring[kept][c / 32 * ring.tile + key * ring.position_stride() + c % 32 / 2];
              if (c < channels)
                ASSERT_TRUE(is_operand_of(pair.of[c % 2],
                                          blocks[static_cast<std::size_t>(kept)]
                                                [static_cast<std::size_t>(c * count + key)]));
              else
                ASSERT_EQ(bits_of(pair.of[c % 2]), 0U);
            }
        }
      }
    }
}

TEST(Bf16Operands, QueriesBecomeThoseOfABlock) {
  Random random(7);
  for (const Index channels : {1, 7, 16, 31, 32, 33, 64, 100})
    for (int trial = 0; trial < 8; ++trial) {
      auto block = random_block(random, channels);
      const Index end = trial == 0 ? count : random.integer(1, count);
      const Index begin = trial < 4 ? 0 : random.integer(0, end - 1);
      const std::vector<float> rows = first_rows(end, channels, block);
      for (Index c = 0; c < channels; ++c) std::fill_n(block.begin() + c * count, begin, 0.0F);
      const float factor = trial % 2 == 0 ? 1.0F : 0.37F;
      for (float& x : block) x *= factor;
      local_mha::detail::BlockOperands<float, bfloat16> of_block(channels), of_rows(channels);
      const Pair* wanted = of_block.of(block.data());
      const Pair* got = of_rows.of_rows({static_cast<int>(begin), static_cast<int>(end)},
                                        {rows.data(), channels}, factor);
      for (Index i = 0; i < local_mha::detail::pairs_of(channels) * count; ++i)
        for (int k = 0; k < 2; ++k) ASSERT_EQ(bits_of(got[i].of[k]), bits_of(wanted[i].of[k])) << i;
    }
}

TEST(Bf16Operands, ValuesLieTwoBlocksSideBySide) {
  Random random(6);
  for (const Index channels : {1, 7, 16, 20, 64, 65})
    for (const Index capacity : {1, 2, 3, 6}) {
      local_mha::ValueOperands<float> ring(channels, capacity), other(channels, 4);
      ASSERT_EQ(ring.capacity(), (capacity + 1) / 2 * 2);
      for (Index b = 0; b < ring.capacity(); ++b) ASSERT_TRUE(ring.finite(b));
      std::vector<local_mha::BlockBuffer<float>> blocks;
      for (Index b = 0; b < 15; ++b) {
        blocks.push_back(random_block(random, channels));
        const bool finite = b % 5 != 2;
        if (!finite)  // in the first row, which is always there
          blocks.back()[static_cast<std::size_t>(random.integer(0, channels - 1) * count)] =
              random.pick({std::numeric_limits<float>::quiet_NaN(),
                           -std::numeric_limits<float>::infinity(), 3.4e38F});
        put_somehow(random, b, blocks.back(), other, ring);
        ASSERT_EQ(ring.finite(b), finite) << b;
        const Index first = std::max<Index>(0, b + 1 - ring.capacity());
        auto cursor = ring.cursor(first);
        for (Index kept = first; kept <= b; ++kept, cursor.advance()) {
          ASSERT_EQ(cursor.block(), ring[kept]);
          ASSERT_EQ(ring.finite(kept), kept % 5 != 2);
          // An even one is followed by its neighbour, channel by channel.
          if (kept % 2 == 1 && kept > first) {
            ASSERT_EQ(ring[kept], ring[kept - 1] + count / 2);
          }
          for (Index c = 0; c < channels; ++c)
            for (Index key = 0; key < count; ++key) {
              const float number =
                  blocks[static_cast<std::size_t>(kept)][static_cast<std::size_t>(c * count + key)];
              ASSERT_TRUE(is_operand_of(ring[kept][c * ring.channel_stride() + key / 2].of[key % 2],
                                        number));
              ASSERT_TRUE(is_operand_of(ring.value(kept, c, key), number));
            }
        }
      }
    }
}

// ---- products over positions

using GradientBlocks = local_mha::BlockArray<float, bfloat16>;
using RowPanels = local_mha::PanelArray<float, bfloat16>;

/// Positions of a tile, which fill its depth.
constexpr Index tile_positions = std::max<Index>(32, count);

TEST(Bf16Operands, PositionsLieInTiles) {
  Random random(12);
  for (const Index channels : {1, 7, 16, 20, 33, 64})
    for (const Index blocks : {1, 2, 3, 5, 8, 9}) {
      // In memory that held something else.
      const Index panels = local_mha::panel_channels<float>(channels) + count;
      GradientBlocks grad(blocks + 8, panels + 3);
      RowPanels rows(blocks + 8, panels);
      auto ones = local_mha::make_block_buffer<float>((panels + 3) * count);
      std::fill(ones.begin(), ones.end(), 1.0F);
      for (Index b = 0; b < blocks + 8; ++b) {
        grad.put(b, 0, panels + 3, ones.data());
        rows.put(b, 0, panels, ones.data());
      }
      grad.prepare(blocks, channels + 3);
      rows.prepare(blocks, panels);
      ASSERT_EQ(grad.channels(), channels + 3);
      ASSERT_EQ(grad.stride(), (channels + 3) * tile_positions / 2);
      std::vector<local_mha::BlockBuffer<float>> numbers;
      alignas(64) float aside[1];
      for (Index b = 0; b < blocks; ++b) {
        numbers.push_back(random_block(random, channels));
        numbers.back()[0] = random.pick({1e-39F, 1 + 0x1.01p-8F, -3.4e38F});
        ASSERT_EQ(grad.room(b, 0, aside), aside);
        // In two parts, as heads come.
        const Index first = channels / 2;
        grad.put(b, 3, first, numbers.back().data());
        grad.put(b, 3 + first, channels - first, numbers.back().data() + first * count);
        rows.put(b, 1, channels, numbers.back().data());
      }
      const Index tiles = (blocks * count + tile_positions - 1) / tile_positions;
      for (Index position = 0; position < tiles * tile_positions; ++position) {
        const Index b = position / count, lane = position % count, tile = position / tile_positions;
        const Index in_tile = position % tile_positions;
        if (b < blocks && lane == 0) {
          ASSERT_EQ(grad[b], grad[0] + tile * grad.stride() + in_tile / 2);
        }
        for (Index c = 0; c < local_mha::panel_channels<float>(channels); ++c) {
          const bfloat16 of_panel =
              rows.panel(1 + c / count)[(tile * tile_positions + in_tile) / 2 * count + c % count]
                  .of[position % 2];
          if (b < blocks && c < channels) {
            const float number =
                numbers[static_cast<std::size_t>(b)][static_cast<std::size_t>(c * count + lane)];
            ASSERT_TRUE(is_operand_of(of_panel, number));
          } else {
            ASSERT_EQ(bits_of(of_panel), 0U);
          }
          if (c >= channels) continue;
          const bfloat16 of_block =
              grad[0][tile * grad.stride() + (3 + c) * tile_positions / 2 + in_tile / 2]
                  .of[position % 2];
          ASSERT_EQ(bits_of(of_block), bits_of(of_panel));
        }
      }
    }
}

TEST(Bf16Operands, AreAddedUpOverPositions) {
  Random random(13);
  struct Shape {
    Index positions, row_groups, rows, padded_rows, column_groups, columns;
  };
  for (const Shape& s : std::initializer_list<Shape>{{1, 1, 1, 1, 1, 1},
                                                     {16, 1, 7, 7, 1, 16},
                                                     {17, 3, 5, 8, 1, 33},
                                                     {33, 1, 17, 17, 2, 20},
                                                     {100, 2, 33, 40, 3, 7},
                                                     {1100, 1, 40, 40, 1, 100},
                                                     {600, 1, 100, 100, 1, 530}}) {
    const Index blocks = (s.positions + count - 1) / count;
    const Index padded_columns = local_mha::panel_channels<float>(s.columns);
    const Index rows = s.row_groups * s.rows, columns = s.column_groups * s.columns;
    GradientBlocks grad(blocks, s.row_groups * s.padded_rows);
    RowPanels x(blocks, s.column_groups * padded_columns);
    RowMatrix<double> g(s.positions, rows), of_x(s.positions, columns);
    const auto number = [&](double& is, Index position) {
      if (position >= s.positions) return 0.0F;
      const auto drawn = static_cast<float>(random.normal());
      is = operand(static_cast<double>(drawn));
      return drawn;
    };
    double none = 0;
    for (Index b = 0; b < blocks; ++b) {
      const auto put = [&](Index groups, Index of_group, RowMatrix<double>& all, auto&& take) {
        auto block = local_mha::make_block_buffer<float>(of_group * count);
        for (Index group = 0; group < groups; ++group) {
          for (Index c = 0; c < of_group; ++c)
            for (Index lane = 0; lane < count; ++lane) {
              const Index position = b * count + lane;
              double& is = position < s.positions ? all(position, group * of_group + c) : none;
              block[static_cast<std::size_t>(c * count + lane)] = number(is, position);
            }
          take(group, block.data());
        }
      };
      put(s.row_groups, s.rows, g, [&](Index group, const float* block) {
        grad.put(b, group * s.padded_rows, s.rows, block);
      });
      put(s.column_groups, s.columns, of_x, [&](Index group, const float* block) {
        x.put(b, group * padded_columns / count, s.columns, block);
      });
    }
    const RowMatrix<float> before = random_weight(random, rows, columns);
    RowMatrix<float> weight = before;
    const auto add = [&](const local_mha::AnyDevice& device, RowMatrix<float>& to) {
      add_weight_gradient(device, blocks, grad[0], grad.stride(),
                          local_mha::Groups::of(s.row_groups, s.rows, s.padded_rows), x,
                          local_mha::Groups::of(s.column_groups, s.columns, padded_columns),
                          to.data());
    };
    add({}, weight);
    for (Index r = 0; r < rows; ++r)
      for (Index c = 0; c < columns; ++c) {
        double sum = static_cast<double>(before(r, c)), size = std::abs(sum);
        for (Index i = 0; i < s.positions; ++i) {
          sum += g(i, r) * of_x(i, c);
          size += std::abs(g(i, r) * of_x(i, c));
        }
        ASSERT_NEAR(static_cast<double>(weight(r, c)), sum, sum_tolerance(s.positions, size))
            << s.positions << " positions, " << r << ", " << c;
      }
    for (const int threads : {2, 5}) {
      Eigen::ThreadPool pool(threads);
      Eigen::ThreadPoolDevice device(&pool, threads);
      RowMatrix<float> on_threads = before;
      add(device, on_threads);
      ASSERT_EQ(on_threads, weight);
    }
  }
}

}  // namespace bf16_operands_test
