// SPDX-License-Identifier: MIT
// Durations whose quantiles are known.
#include "durations.hpp"

#include <gtest/gtest.h>

namespace {

using local_mha::examples::Durations;

/// At least the exact quantile, and at most 1 % more.
void expect_quantile(const Durations& durations, double share, double exact) {
  const double got = durations.quantile(share);
  EXPECT_GE(got, exact * (1 - 1e-12)) << share;
  EXPECT_LE(got, exact * 1.01 * (1 + 1e-12)) << share;
}

TEST(Durations, OfOneToAThousandHaveTheirQuantilesInOrder) {
  Durations durations;
  // In an order that is not theirs: 7 has no factor in common with 1000.
  for (int i = 1; i <= 1000; ++i) durations.add(1e-6 * (7 * i % 1000 + 1));
  EXPECT_EQ(durations.count(), 1000U);
  EXPECT_NEAR(durations.mean(), 500.5e-6, 1e-12);
  EXPECT_EQ(durations.longest(), 1000e-6);
  for (const double share : {0.001, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0})
    expect_quantile(durations, share, share * 1000e-6);
}

TEST(Durations, HaveAHighQuantileThatOneInTwoThousandDoesNotMove) {
  Durations durations;
  for (int i = 0; i < 1999; ++i) durations.add(1e-3);
  durations.add(2);
  expect_quantile(durations, 0.999, 1e-3);
  EXPECT_EQ(durations.quantile(1), 2);
  // Two more, and it is among the 99.9 % no longer.
  durations.add(2);
  durations.add(2);
  EXPECT_EQ(durations.quantile(0.999), 2);
}

TEST(Durations, OfASingleOneAreThatOne) {
  for (const double seconds : {0.0, 1e-12, 1e-8, 3e-5, 1.0, 1e5}) {
    Durations durations;
    durations.add(seconds);
    EXPECT_EQ(durations.mean(), seconds);
    EXPECT_EQ(durations.longest(), seconds);
    for (const double share : {0.001, 0.5, 0.999}) {
      EXPECT_LE(durations.quantile(share), seconds);
      if (seconds > 1e-8 && seconds < 100) expect_quantile(durations, share, seconds);
    }
  }
}

}  // namespace
