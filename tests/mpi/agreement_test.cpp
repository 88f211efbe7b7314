// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/communicator.hpp>

namespace agreement_test {
namespace {

using local_mha::Index;
using local_mha::mpi::Communicator;
using local_mha::mpi::detail::Agreement;
using local_mha::mpi::detail::Checksum;

std::string message_of(Agreement& agreement) {
  try {
    agreement.settle();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "none";
}

TEST(ACommunicator, IsNotThatOfTheProgram) {
  const Communicator communicator;
  int result = MPI_UNEQUAL;
  MPI_Comm_compare(MPI_COMM_WORLD, communicator.get(), &result);
  EXPECT_EQ(result, MPI_CONGRUENT);
  int rank = -1, size = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  EXPECT_EQ(communicator.rank(), rank);
  EXPECT_EQ(communicator.size(), size);
  EXPECT_THROW(Communicator(MPI_COMM_NULL), std::invalid_argument);
}

TEST(AnAgreement, IsReachedWhereAllAreTheSame) {
  const Communicator communicator;
  Agreement agreement(communicator, "call");
  agreement.check([] {});
  agreement.same("batch", Index{3});
  EXPECT_EQ(message_of(agreement), "none");
}

TEST(AnAgreement, FailsOnEveryRankWhereOneDiffers) {
  const Communicator communicator;
  if (communicator.size() == 1) GTEST_SKIP();
  const bool last = communicator.rank() == communicator.size() - 1;
  Agreement numbers(communicator, "call");
  numbers.same("dim", Index{7});
  numbers.same("batch", Index{last ? 4 : 3});
  EXPECT_EQ(message_of(numbers),
            "batch: expected the same on every rank, got 3 on one and 4 on another");

  Agreement sums(communicator, "call");
  Checksum sum;
  sum.add(last ? 1.0 : 2.0);
  sums.same("weights", sum);
  EXPECT_EQ(message_of(sums), "weights: expected the same on every rank, got others on some");

  Agreement calls(communicator, last ? "backward" : "forward");
  calls.same("batch", Index{3});
  EXPECT_EQ(message_of(calls).substr(0, 38), "call: expected the same on every rank,");
}

TEST(AnAgreement, TellsAllRanksWhatOneHasFound) {
  const Communicator communicator;
  const int last = communicator.size() - 1;
  Agreement agreement(communicator, "call");
  agreement.check([&] {
    if (communicator.rank() == last) local_mha::reject("x", "three", 4);
  });
  agreement.same("batch", Index{communicator.rank()});
  const std::string found = "x: expected three, got 4";
  EXPECT_EQ(message_of(agreement), communicator.rank() == last
                                       ? found
                                       : found + " (on rank " + std::to_string(last) + ")");
}

TEST(AChecksum, IsOfEveryByte) {
  const auto of = [](const std::string& text) {
    Checksum sum;
    sum.add(text);
    return sum.value();
  };
  EXPECT_EQ(of("0123456789"), of("0123456789"));
  EXPECT_NE(of("0123456789"), of("0123456780"));
  EXPECT_NE(of("0123456789"), of("1023456789"));
  EXPECT_NE(of(""), of(std::string(1, '\0')));
}

TEST(AChecksum, IsOfNumbersAndNotOfWhatLiesBetweenThem) {
  alignas(long double) unsigned char bytes[2][2 * sizeof(long double)];
  std::memset(bytes[0], 0x00, sizeof(bytes[0]));
  std::memset(bytes[1], 0xFF, sizeof(bytes[1]));
  const std::size_t value =
      std::numeric_limits<long double>::digits == 64 ? 10 : sizeof(long double);
  const auto of = [&](int i, long double first, long double second) {
    std::memcpy(bytes[i], &first, value);
    std::memcpy(bytes[i] + sizeof(long double), &second, value);
    Checksum sum;
    sum.add_numbers(reinterpret_cast<const long double*>(bytes[i]), 2);
    return sum.value();
  };
  EXPECT_EQ(of(0, 1, 2), of(1, 1, 2));
  EXPECT_NE(of(0, 1, 2), of(1, 2, 1));
  EXPECT_NE(of(0, 1, 2), of(1, 1, std::nextafter(2.0L, 3.0L)));
}

}  // namespace
}  // namespace agreement_test
