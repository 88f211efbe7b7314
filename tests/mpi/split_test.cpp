// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <optional>
#include <stdexcept>
#include <string>

#include <local_mha/mpi/split.hpp>

namespace split_test {
namespace {

using local_mha::Index;
using local_mha::Range;
using local_mha::mpi::Communicator;
using local_mha::mpi::Split;

TEST(ASplit, HasTheStretchesInTheOrderOfTheRanks) {
  const Communicator communicator;
  // 0, 1, 4, 9, … rows.
  const auto rows = [](int rank) { return Index{rank} * rank; };
  const Split split(communicator, rows(communicator.rank()));
  Index begin = 0;
  for (int rank = 0; rank < communicator.size(); ++rank) {
    EXPECT_EQ(split.stretch(rank), (Range{begin, begin + rows(rank)}));
    begin += rows(rank);
  }
  EXPECT_EQ(split.total(), begin);
  EXPECT_EQ(split.rows(), rows(communicator.rank()));
  for (Index row = 0; row < begin; ++row) {
    const auto [first, last] = split.holders({row, row + 1});
    EXPECT_EQ(last, first + 1);
    EXPECT_TRUE(split.stretch(first).contains(row));
  }
  EXPECT_THROW(split.stretch(communicator.size()), std::invalid_argument);
  EXPECT_THROW(split.holders({-1, 1}), std::invalid_argument);
  EXPECT_THROW(split.holders({begin, begin}), std::invalid_argument);
  EXPECT_THROW(split.holders({0, begin + 1}), std::invalid_argument);
}

TEST(ASplit, CountsIn64Bits) {
  const Communicator communicator;
  const Index rows = Index{1} << 40;
  const Split split(communicator, rows);
  EXPECT_EQ(split.stretch().begin, communicator.rank() * rows);
  EXPECT_EQ(split.total(), communicator.size() * rows);
}

TEST(ASplit, IsEvenInMultiples) {
  const Communicator communicator;
  for (const Index total : {0, 1, 511, 512, 5000, 100000}) {
    const Split split = Split::even(communicator, total);
    EXPECT_EQ(split.total(), total);
    for (int rank = 0; rank < communicator.size(); ++rank) {
      EXPECT_EQ(split.stretch(rank).begin % 512, 0);
      EXPECT_LE(split.rows() - (split.stretch(rank).end - split.stretch(rank).begin), 1023);
    }
  }
}

TEST(ASplit, RejectsBadNumbersOnEveryRank) {
  const Communicator communicator;
  const bool last = communicator.rank() == communicator.size() - 1;
  EXPECT_THROW(Split(communicator, last ? -1 : 1), std::invalid_argument);
  EXPECT_THROW(Split(communicator, 1, communicator.size() + 1), std::invalid_argument);
  EXPECT_THROW(Split(communicator, Index{1} << 60, Index{1} << 59), std::invalid_argument);
  EXPECT_THROW(Split::even(communicator, -1), std::invalid_argument);
  EXPECT_THROW(Split::even(communicator, 1, 0), std::invalid_argument);
  if (communicator.size() > 1) {
    EXPECT_THROW(Split(communicator, 1, communicator.size() + (last ? 0 : 1)),
                 std::invalid_argument);
    // One rank's own mistake, which is another's "not known".
    EXPECT_THROW(Split(communicator, 1, last ? std::optional<Index>(-1) : std::nullopt),
                 std::invalid_argument);
  }
}

}  // namespace
}  // namespace split_test
