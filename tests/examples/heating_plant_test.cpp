// SPDX-License-Identifier: MIT
// The series that anomaly_detection makes for itself, and how its alarms are counted.
#include "heating_plant.hpp"

#include <gtest/gtest.h>

#include <string>

namespace {

using namespace local_mha::examples;
using local_mha::Index;

TEST(HeatingPlant, HasFaultsWhereItSaysSo) {
  const auto made = make_heating_plant(96 * 365, 96 * 100, 3);
  ASSERT_EQ(made.table.rows.rows(), 96 * 365);
  ASSERT_EQ(made.table.names.size(), 4U);
  EXPECT_TRUE(made.table.rows.allFinite());
  ASSERT_GT(made.faults.size(), 50U);
  Index before = 96 * 100;
  for (const auto& [begin, end] : made.faults) {
    EXPECT_GE(begin, before + 48);
    EXPECT_GT(end, begin);
    EXPECT_LE(end, begin + 80);
    before = end;
  }
  EXPECT_LE(before, 96 * 365);
  // Of sensors that measure, no value comes four times in a row; only in faults one does.
  Index stuck = 0;
  for (Index i = 3; i < made.table.rows.rows(); ++i)
    for (Index s = 0; s < 3; ++s) {
      const auto last = made.table.rows.col(s).segment(i - 3, 4);
      if (last.maxCoeff() != last.minCoeff()) continue;
      ++stuck;
      bool in_fault = false;
      for (const auto& [begin, end] : made.faults) in_fault = in_fault || (i >= begin && i < end);
      EXPECT_TRUE(in_fault) << i;
    }
  EXPECT_GT(stuck, 100);
}

TEST(HeatingPlant, IsTheSameUntilTheFirstFault) {
  const auto with = make_heating_plant(2000, 1000, 3);
  const auto without = make_heating_plant(2000, 2000, 3);
  EXPECT_TRUE(without.faults.empty());
  EXPECT_EQ(with.table.rows.topRows(1100), without.table.rows.topRows(1100));
  EXPECT_NE(with.table.rows, without.table.rows);
}

TEST(HeatingPlant, CountsAlarmsInFaultsAndBrieflyAfter) {
  const auto said = [](const std::vector<Stretch>& alarms) {
    testing::internal::CaptureStdout();
    print_found("x", alarms, {{100, 110}, {200, 210}});
    return testing::internal::GetCapturedStdout();
  };
  EXPECT_EQ(said({}), "by x: 0 of 0 alarms are right, 0 of 2 faults are found\n");
  EXPECT_EQ(said({{90, 100}, {126, 130}}),
            "by x: 0 of 2 alarms are right, 0 of 2 faults are found\n");
  EXPECT_EQ(said({{90, 101}, {125, 126}}),
            "by x: 2 of 2 alarms are right, 1 of 2 faults are found\n");
  EXPECT_EQ(said({{50, 300}}), "by x: 1 of 1 alarms are right, 2 of 2 faults are found\n");
}

}  // namespace
