// SPDX-License-Identifier: MIT
// What a progress bar draws on a terminal, and that it draws nothing elsewhere.
#include "terminal.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>

#include "pseudo_terminal.hpp"

namespace {

using local_mha::examples::ProgressBar;

/// What goes to standard error meanwhile, which is another file.
std::string written(int to, int from, const std::function<void()>& work) {
  std::cerr.flush();
  const int kept = ::dup(STDERR_FILENO);
  ::dup2(to, STDERR_FILENO);
  work();
  std::cerr << "END" << std::flush;
  ::dup2(kept, STDERR_FILENO);
  ::close(kept);
  std::string text;
  while (!text.ends_with("END")) {
    char block[4096];
    const ssize_t got = ::read(from, block, sizeof block);
    if (got <= 0) return text + " and no end";
    text.append(block, static_cast<std::size_t>(got));
  }
  return text.substr(0, text.size() - 3);
}

std::string on_a_terminal(const std::function<void()>& work) {
  const PseudoTerminal ends = PseudoTerminal::open();
  const std::string text = written(ends.terminal, ends.master, work);
  ::close(ends.terminal);
  ::close(ends.master);
  return text;
}

// Ten times a second there is something to see, from the second second on.
TEST(ProgressBar, ShowsShareRateAndTimeLeft) {
  EXPECT_EQ(
      on_a_terminal([] {
        ProgressBar progress(1000, "things");
        progress.update_at(1.4, 200);
        progress.update_at(2, 250, "a note");
        progress.update_at(2.05, 260);
        progress.update_at(2.2, 550);
      }),
      "\r\x1b[K[##########..............................]  25 %  125 things/s  6 s left  a note"
      "\r\x1b[K[######################..................]  55 %  250 things/s  2 s left"
      "\r\x1b[K");
}

TEST(ProgressBar, CountsWhereTheTotalIsUnknown) {
  EXPECT_EQ(on_a_terminal([] {
              ProgressBar progress(0, "things");
              progress.update_at(2, 250);
            }),
            "\r\x1b[K250 things  125 things/s\r\x1b[K");
}

TEST(ProgressBar, IsFullAtTheEndAndBeyond) {
  const std::string full = "\r\x1b[K[########################################] 100 %  500 things/s";
  EXPECT_EQ(on_a_terminal([] {
              ProgressBar progress(1000, "things");
              progress.update_at(2, 1000);
              progress.update_at(4, 2000);
            }),
            full + "  0 s left" + full + "  0 s left\r\x1b[K");
}

TEST(ProgressBar, DrawsNothingBeforeThereIsSomethingToSee) {
  EXPECT_EQ(on_a_terminal([] {
              ProgressBar progress(1000, "things");
              progress.update_at(1.4, 250);
            }),
            "");
}

TEST(ProgressBar, HasAClockOfItsOwn) {
  EXPECT_NE(on_a_terminal([] {
              ProgressBar progress(1000, "things");
              std::this_thread::sleep_for(std::chrono::milliseconds(1600));
              progress.update(250);
            }),
            "");
}

TEST(ProgressBar, DrawsNothingIfItShallNot) {
  EXPECT_EQ(on_a_terminal([] {
              ProgressBar progress(1000, "things", false);
              progress.update_at(2, 250);
            }),
            "");
}

TEST(ProgressBar, DrawsNothingWhereNobodyLooks) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  EXPECT_EQ(written(ends[1], ends[0],
                    [] {
                      ProgressBar progress(1000, "things");
                      progress.update_at(2, 250);
                    }),
            "");
}

}  // namespace
