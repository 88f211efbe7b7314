// SPDX-License-Identifier: MIT
// The comparisons and the random cases that the other tests rest on.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "support/compare.hpp"
#include "support/random_case.hpp"

namespace support_test {

using local_mha::Index;
using reference::Array;
using support::Length;
using support::NaN;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

Array<double> numbers(const std::vector<double>& values) {
  Array<double> array({static_cast<reference::Int>(values.size())});
  array.data = values;
  return array;
}

TEST(Comparison, FindsANaNWhereverItIs) {
  const auto zeros = numbers({0, 0, 0});
  for (const auto& got : {numbers({1e-9, nan, 1e-9}), numbers({nan, 0, 0}), numbers({0, 0, nan})}) {
    EXPECT_EQ(support::largest_error(got, zeros), infinity);
    EXPECT_EQ(support::largest_error(zeros, got), infinity);
    EXPECT_EQ(support::largest(got), infinity);
    EXPECT_FALSE(support::close(got, zeros, 1e300));
    EXPECT_FALSE(support::close(zeros, got, 1e300));
    EXPECT_FALSE(support::close(got, got, 1e300));
    EXPECT_TRUE(support::close(got, got, 0, NaN::EqualsNaN));
    EXPECT_FALSE(support::close(got, zeros, 1e300, NaN::EqualsNaN));
    EXPECT_FALSE(support::close(zeros, got, 1e300, NaN::EqualsNaN));
  }
}

TEST(Comparison, TellsInfinityFromAllElse) {
  const auto at = numbers({1, infinity, 1}), below = numbers({1, -infinity, 1});
  const auto finite = numbers({1, std::numeric_limits<double>::max(), 1});
  EXPECT_TRUE(support::close(at, at, 0));
  EXPECT_EQ(support::largest_error(at, at), 0);
  for (const auto& other : {below, finite, numbers({1, nan, 1})}) {
    EXPECT_FALSE(support::close(at, other, 1e300));
    EXPECT_FALSE(support::close(other, at, 1e300));
    EXPECT_EQ(support::largest_error(other, at), infinity);
  }
  // Finite in the type that is compared with, which is a wider one.
  EXPECT_FALSE(support::near(std::numeric_limits<float>::infinity(), 1e39, 1e300));
}

TEST(Comparison, RefusesAToleranceThatIsNotFinite) {
  for (const double tolerance : {infinity, nan}) {
    EXPECT_FALSE(support::near(1.0, 1.0, tolerance));
    EXPECT_FALSE(support::close(numbers({1}), numbers({1}), tolerance));
  }
}

TEST(Comparison, AllowsTheToleranceAndNoMore) {
  const auto expected = numbers({1, 2, 3});
  EXPECT_TRUE(support::close(numbers({1, 2.25, 3}), expected, 0.25));
  EXPECT_FALSE(support::close(numbers({1, 2.25, 3}), expected, 0.125));
  EXPECT_EQ(support::largest_error(numbers({1.5, 2, 2.25}), expected), 0.75);
  EXPECT_EQ(support::largest(numbers({1, -4, 3})), 4);
  // Numbers of two types are compared in the wider one.
  EXPECT_EQ(support::distance(1.0F, 1 + 0x1p-40), 0x1p-40);
  EXPECT_EQ(support::distance(1 + 0x1p-40, 1.0F), 0x1p-40);
}

TEST(Comparison, NeedsTheSameShape) {
  Array<double> row({1, 3}), column({3, 1});
  EXPECT_FALSE(support::close(row, column, 1));
  EXPECT_EQ(support::largest_error(row, column), infinity);
  EXPECT_FALSE(support::close(numbers({1, 2}), numbers({1, 2, 3}), 10));
}

TEST(Comparison, SaysWhere) {
  Array<double> got({2, 3}), expected({2, 3});
  got(1, 2) = nan;
  EXPECT_STREQ(support::close(got, expected, 1e-3).message(),
               "nan, not 0: error inf where 0.001 is allowed; first at [1, 2], the largest error "
               "is inf");
}

/// What there is among the cases of many seeds.
struct Shares {
  void add(bool empty, bool zero, Index d, double size) {
    const double share = 1.0 / cases;
    nothing += (empty || zero) * share;
    wide += (d >= 16) * share;
    wider += (d >= 64) * share;
    small += (size < 1e-2) * share;
    large += (size > 10) * share;
  }
  static constexpr int cases = 400;
  // No position or no result but 0; dim_head; the size of the values or inputs.
  double nothing = 0, wide = 0, wider = 0, small = 0, large = 0;
};

bool hides_all(const std::vector<unsigned char>& masked) {
  return !masked.empty() && std::find(masked.begin(), masked.end(), 0) == masked.end();
}

// Some cases of nothing, for they must work; but most have something to be wrong.
TEST(RandomCases, OfTheAttentionAreUsefulAndOfAllSizes) {
  for (const Length length : {Length::Short, Length::Long}) {
    Shares shares;
    for (std::uint64_t seed = 1; seed <= Shares::cases; ++seed) {
      const auto c = support::attention_case(seed, length);
      shares.add(c.in.q.empty(), hides_all(c.in.masked), c.in.q.shape[3], support::largest(c.in.v));
    }
    EXPECT_GT(shares.nothing, 0);
    EXPECT_LT(shares.nothing, 0.05);
    EXPECT_GT(shares.wide, 0.1);
    EXPECT_GT(shares.wider, 0.03);
    EXPECT_GT(shares.small, 0.2);
    EXPECT_GT(shares.large, 0.2);
  }
}

TEST(RandomCases, OfSmallWindowsAreUseful) {
  Shares shares;
  for (std::uint64_t seed = 1; seed <= Shares::cases; ++seed) {
    const auto c = support::narrow_attention_case(seed);
    shares.add(c.in.q.empty(), hides_all(c.in.masked), c.in.q.shape[3], support::largest(c.in.v));
  }
  EXPECT_GT(shares.nothing, 0);
  EXPECT_LT(shares.nothing, 0.05);
  EXPECT_GT(shares.small, 0.2);
  EXPECT_GT(shares.large, 0.2);
}

TEST(RandomCases, OfTheLayerAreUsefulAndOfAllSizes) {
  for (const Length length : {Length::Short, Length::Long}) {
    Shares shares;
    for (std::uint64_t seed = 1; seed <= Shares::cases; ++seed) {
      const auto c = support::layer_case(seed, length);
      shares.add(c.in.x.empty(), hides_all(c.in.masked), c.config.dim_head,
                 support::largest(c.in.x));
    }
    EXPECT_GT(shares.nothing, 0);
    EXPECT_LT(shares.nothing, 0.05);
    EXPECT_GT(shares.wide, 0.1);
    EXPECT_GT(shares.wider, 0.02);
    EXPECT_GT(shares.small, 0.03);
    EXPECT_GT(shares.large, 0.1);
  }
}

}  // namespace support_test
