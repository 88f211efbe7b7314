// SPDX-License-Identifier: MIT
// What all programs have in common: exit status and messages, in any locale.
#include "program.hpp"

#include <gtest/gtest.h>

#include <clocale>
#include <iomanip>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>

namespace {

using local_mha::examples::run_program;

/// Runs it and gives what it wrote to standard error.
template <typename Program>
std::string message_of(const Program& program, int expected_status) {
  testing::internal::CaptureStderr();
  EXPECT_EQ(run_program("name", program), expected_status);
  return testing::internal::GetCapturedStderr();
}

TEST(RunProgram, PassesTheStatusOn) {
  EXPECT_EQ(message_of([] { return 0; }, 0), "");
  EXPECT_EQ(message_of([] { return 1; }, 1), "");
}

TEST(RunProgram, SaysWhatFailed) {
  EXPECT_EQ(message_of([]() -> int { throw std::runtime_error("this and that"); }, 2),
            "name: this and that\n");
  EXPECT_EQ(message_of([]() -> int { throw std::bad_alloc(); }, 2), "name: not enough memory\n");
}

/// Numbers of another country, wherever the machine is.
struct Elsewhere : std::numpunct<char> {
  char do_decimal_point() const override { return ','; }
  char do_thousands_sep() const override { return '.'; }
  std::string do_grouping() const override { return "\3"; }
};

// A library that the program is linked with may set the locale of all.
TEST(RunProgram, ReadsAndWritesNumbersTheSameInEveryLocale) {
  const std::locale before;
  const std::locale elsewhere(std::locale::classic(), new Elsewhere);
  // A country's own, too, where the machine has it: it is C's as well.
  for (const char* name : {"", "de_DE.UTF-8", "fr_FR.UTF-8"}) {
    try {
      std::locale::global(*name == '\0' ? elsewhere : std::locale(name));
    } catch (const std::runtime_error&) {
      continue;
    }
    std::cout.imbue(std::locale());
    std::cerr.imbue(std::locale());
    double option = 0;
    std::string written;
    const std::string log = message_of(
        [&] {
          CLI::App app;
          app.add_option("--number", option);
          app.parse("--number 1234.5");
          std::ostringstream text;
          text << std::setprecision(8) << 1234567.5 << ' ' << 1234567;
          written = text.str();
          testing::internal::CaptureStdout();
          std::cout << 1234567.5 << ' ' << 1234567 << std::flush;
          std::cerr << 1234567;
          return 0;
        },
        0);
    EXPECT_EQ(option, 1234.5) << name;
    EXPECT_EQ(written, "1234567.5 1234567") << name;
    EXPECT_EQ(testing::internal::GetCapturedStdout(), "1.23457e+06 1234567") << name;
    EXPECT_EQ(log, "1234567") << name;
  }
  std::locale::global(before);
}

}  // namespace
