// SPDX-License-Identifier: MIT
// F16 and BF16 against Eigen's types, and rounding against its definition.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include <Eigen/Core>

#include <local_mha/io/dtype.hpp>

namespace float16_test {

using namespace local_mha::io;

struct Float16 {
  static float decode(std::uint16_t bits) { return from_float16(bits); }
  static std::uint16_t encode(double value) { return to_float16(value); }
  static float expected(std::uint16_t bits) {
    return static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(bits));
  }
  static constexpr std::uint16_t infinity = 0x7c00;
};

struct Bfloat16 {
  static float decode(std::uint16_t bits) { return from_bfloat16(bits); }
  static std::uint16_t encode(double value) { return to_bfloat16(value); }
  static float expected(std::uint16_t bits) {
    return static_cast<float>(Eigen::numext::bit_cast<Eigen::bfloat16>(bits));
  }
  static constexpr std::uint16_t infinity = 0x7f80;
};

template <typename Format>
class SixteenBits : public testing::Test {};
using Formats = testing::Types<Float16, Bfloat16>;
TYPED_TEST_SUITE(SixteenBits, Formats);

TYPED_TEST(SixteenBits, EveryValueIsDecodedExactly) {
  for (std::uint32_t i = 0; i <= 0xffff; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const float value = TypeParam::decode(bits);
    const float expected = TypeParam::expected(bits);
    if (std::isnan(expected))
      ASSERT_TRUE(std::isnan(value)) << i;
    else
      ASSERT_EQ(std::bit_cast<std::uint32_t>(value), std::bit_cast<std::uint32_t>(expected)) << i;
  }
}

TYPED_TEST(SixteenBits, EveryValueComesBack) {
  for (std::uint32_t i = 0; i <= 0xffff; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const float value = TypeParam::decode(bits);
    const std::uint16_t again = TypeParam::encode(static_cast<double>(value));
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(TypeParam::decode(again))) << i;
      ASSERT_EQ(again >> 15, bits >> 15) << i;
    } else {
      ASSERT_EQ(again, bits);
    }
  }
}

// Between two neighbours the midpoint goes to the even one, and what lies next to it to the nearer.
TYPED_TEST(SixteenBits, RoundsToNearestAndTiesToEven) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  for (std::uint32_t i = 0; i + 1 < TypeParam::infinity; ++i) {
    const auto low = static_cast<std::uint16_t>(i);
    const auto high = static_cast<std::uint16_t>(i + 1);
    const double middle = (static_cast<double>(TypeParam::decode(low)) +
                           static_cast<double>(TypeParam::decode(high))) /
                          2;
    const std::uint16_t even = i % 2 == 0 ? low : high;
    ASSERT_EQ(TypeParam::encode(middle), even) << i;
    ASSERT_EQ(TypeParam::encode(std::nextafter(middle, -inf)), low) << i;
    ASSERT_EQ(TypeParam::encode(std::nextafter(middle, inf)), high) << i;
    ASSERT_EQ(TypeParam::encode(-middle), even | 0x8000) << i;
  }
}

TYPED_TEST(SixteenBits, WhatIsTooLargeBecomesInfinity) {
  const auto infinity = TypeParam::infinity;
  const auto largest = static_cast<std::uint16_t>(infinity - 1);
  const auto value = static_cast<double>(TypeParam::decode(largest));
  const double spacing =
      value - static_cast<double>(TypeParam::decode(static_cast<std::uint16_t>(largest - 1)));
  const double limit = value + spacing / 2;
  EXPECT_EQ(TypeParam::encode(limit), infinity);
  EXPECT_EQ(TypeParam::encode(std::nextafter(limit, 0.)), largest);
  EXPECT_EQ(TypeParam::encode(std::numeric_limits<double>::max()), infinity);
  EXPECT_EQ(TypeParam::encode(-std::numeric_limits<double>::infinity()), infinity | 0x8000);
}

TYPED_TEST(SixteenBits, WhatIsTooSmallBecomesZeroWithItsSign) {
  EXPECT_EQ(TypeParam::encode(std::numeric_limits<double>::denorm_min()), 0);
  EXPECT_EQ(TypeParam::encode(-std::numeric_limits<double>::min()), 0x8000);
  EXPECT_EQ(TypeParam::encode(0x1p-200), 0);
  EXPECT_EQ(TypeParam::encode(-0.), 0x8000);
}

TYPED_TEST(SixteenBits, SignallingNanStaysNan) {
  const double signalling = std::bit_cast<double>(std::uint64_t{0x7ff0000000000001});
  EXPECT_TRUE(std::isnan(TypeParam::decode(TypeParam::encode(signalling))));
}

TEST(Float16, RoundsADoubleOnce) {
  // Through float it would come to lie halfway and round up: 1 + 2^-11 + 2^-40 is above the
  // midpoint, 1 + 2^-11 - 2^-40 below it, and both are the midpoint as a float.
  EXPECT_EQ(to_float16(1 + 0x1p-11 + 0x1p-40), 0x3c01);
  EXPECT_EQ(to_float16(1 + 0x1p-11 - 0x1p-40), 0x3c00);
}

}  // namespace float16_test
