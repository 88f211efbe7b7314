// SPDX-License-Identifier: MIT
// Tables of numbers as they are, and as they should not be.
#include "csv_file.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using local_mha::RowMatrix;
using local_mha::examples::read_csv;
using local_mha::examples::Table;

class Csv : public testing::Test {
 protected:
  Table read(const std::string& text) {
    std::ofstream(path_, std::ios::binary) << text;
    return read_csv(path_);
  }
  std::string error(const std::string& text) {
    try {
      read(text);
    } catch (const std::runtime_error& problem) {
      return std::string(problem.what()).substr(path_.size());
    }
    return "none";
  }
  ~Csv() override { std::filesystem::remove(path_); }

  std::string path_ =
      (std::filesystem::temp_directory_path() / ("csv_test" + std::to_string(::getpid()))).string();
};

TEST_F(Csv, HasNamesOrNone) {
  const Table named = read("\"time\",level\r\n1,-2.5\r\n\r\n3e2, 4\r\n");
  EXPECT_EQ(named.names, (std::vector<std::string>{"time", "level"}));
  EXPECT_EQ(named.rows, (RowMatrix<float>(2, 2) << 1, -2.5, 300, 4).finished());
  const Table unnamed = read("1,2\n3,4");
  EXPECT_EQ(unnamed.names, (std::vector<std::string>{"column 1", "column 2"}));
  EXPECT_EQ(unnamed.rows, (RowMatrix<float>(2, 2) << 1, 2, 3, 4).finished());
  const Table spaced = read("\xEF\xBB\xBF\nroom temp , level\n +1.5,1e-50\n");
  EXPECT_EQ(spaced.names, (std::vector<std::string>{"room temp", "level"}));
  EXPECT_EQ(spaced.rows, (RowMatrix<float>(1, 2) << 1.5, 0).finished());
  EXPECT_EQ(read("\xEF\xBB\xBF"
                 "1,2\n")
                .rows.rows(),
            1);
  EXPECT_EQ(read("").rows.size(), 0);
  EXPECT_EQ(read("a,b\n").rows.rows(), 0);
}

TEST_F(Csv, SaysWhatIsWrong) {
  EXPECT_EQ(error("a,b\n1,2\n1,x\n"), ": line 3: expected a number of at most 1e15, got 'x'");
  EXPECT_EQ(error("1,2\n1,nan\n"), ": line 2: expected a number of at most 1e15, got 'nan'");
  EXPECT_EQ(error("1,2\n1,\n"), ": line 2: expected a number of at most 1e15, got ''");
  EXPECT_EQ(error("1,2\n1 2,3\n"), ": line 2: expected a number of at most 1e15, got '1 2'");
  EXPECT_EQ(error("1,2\n3e38,3\n"), ": line 2: expected a number of at most 1e15, got '3e38'");
  EXPECT_EQ(error("1,2\n\n1\n"), ": line 3: expected 2 numbers, got 1");
  EXPECT_EQ(error("1,2\n1,2,3\n"), ": line 2: expected 2 numbers, got 3");
}

TEST(Normalize, ByTheFirstRows) {
  RowMatrix<float> rows(4, 2);
  rows << 1, 5, 3, 5, 7, 5, -1, 6;
  local_mha::examples::normalize(rows, 2);
  EXPECT_NEAR(rows(0, 0), -1, 1e-5);
  EXPECT_NEAR(rows(2, 0), 5, 1e-5);
  EXPECT_NEAR(rows(3, 0), -3, 1e-5);
  EXPECT_EQ(rows(2, 1), 0);
}

}  // namespace
