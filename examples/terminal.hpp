// SPDX-License-Identifier: MIT
/// \file
/// A progress bar for long runs, and the clock that goes with it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iomanip>
#include <iostream>
#include <sstream>
#include <string>
#include <utility>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

namespace local_mha::examples {

/// True if people look at the stream; false where that cannot be known.
inline bool is_terminal([[maybe_unused]] std::FILE* stream) {
#if __has_include(<unistd.h>)
  return ::isatty(::fileno(stream)) == 1;
#else
  return false;
#endif
}

/// Seconds since it was made.
class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// `[#########...........]  45 %  12345 bytes/s  7 s left` on stderr, if that is a terminal, from
/// the second second on. Wiped at the end.
class ProgressBar {
 public:
  /// \param total what update() reaches at the end; 0 if unknown
  /// \param unit of total, in the plural
  /// \param shown false: nothing is drawn, wherever stderr goes
  ProgressBar(double total, std::string unit, bool shown = true)
      : total_(total), unit_(std::move(unit)), shown_(shown && is_terminal(stderr)) {}

  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  ~ProgressBar() {
    if (drawn_) std::cerr << "\r\x1b[K" << std::flush;
  }

  /// \param note what stands at the end of the line
  void update(double done, const std::string& note = {}) {
    update_at(watch_.seconds(), done, note);
  }

  /// The same, so many seconds after the beginning.
  void update_at(double seconds, double done, const std::string& note = {}) {
    if (!shown_ || seconds < next_) return;
    next_ = seconds + 0.1;
    drawn_ = true;
    const double rate = done / seconds;
    std::ostringstream line;
    line << "\r\x1b[K" << std::fixed << std::setprecision(0);
    if (total_ > 0) {
      constexpr int width = 40;
      const double share = done < total_ ? done / total_ : 1;
      const auto filled = static_cast<std::size_t>(share * width);
      line << '[' << std::string(filled, '#') << std::string(width - filled, '.') << "] "
           << std::setw(3) << 100 * share << " %  ";
    } else {
      line << done << ' ' << unit_ << "  ";
    }
    line << rate << ' ' << unit_ << "/s";
    if (total_ > 0 && rate > 0) line << "  " << std::max(total_ - done, 0.0) / rate << " s left";
    if (!note.empty()) line << "  " << note;
    std::cerr << line.str() << std::flush;
  }

 private:
  Stopwatch watch_;
  double total_;
  std::string unit_;
  bool shown_;
  bool drawn_ = false;
  double next_ = 1.5;
};

}  // namespace local_mha::examples
