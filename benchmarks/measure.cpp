// SPDX-License-Identifier: MIT
// Measures cases, in rounds that go through all of them, and prints every sample as JSON. It is
// built several times, for other instruction sets and by another compiler; the report runs them
// all.
//
//   local_mha_measure [--rounds R] [--seconds S] [--wall] CASE...
//
// Times are of the thread's processor time, on one core, unless --wall, which threads need.
// CASE is for example  attention/float/seqlen:8192/dim_head:64/window_size:256
// (measuring/case.hpp).
#include <algorithm>
#include <array>
#include <cmath>
#include <exception>
#include <iomanip>
#include <iostream>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "measuring/clock.hpp"
#include "measuring/heap.hpp"
#include "measuring/make_work.hpp"

namespace {

// So that a figure and its peak are of the same core.
void stay_on_this_core() {
#if defined(__linux__)
  const int core = sched_getcpu();
  if (core < 0) return;
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(static_cast<unsigned>(core), &cores);
  // Not being allowed to is no reason to stop.
  sched_setaffinity(0, sizeof cores, &cores);
#endif
}

struct Sample {
  double seconds = 0;  // of one run, the median
  double peak = 0;     // mean of just before and just after
};

struct Measured {
  std::unique_ptr<measuring::Work> work;
  std::vector<Sample> samples;
  double run_seconds = 0;  // of the first run
  std::size_t scratch_bytes = 0;
  std::size_t allocations = 0;  // in the first sample
};

using Clock = double (*)();

// Runs for at least `seconds`, unless that takes over 100 runs, and three times unless that takes
// too long: the first run brings the case's data back into the cache.
// The peak is measured in windows as long as a run, but no longer than a tenth of a second.
// \param run seconds of a run, as far as is known
Sample sample(measuring::Work& work, double seconds, double run, Clock now) {
  constexpr double peak_seconds = 0.02, most = 0.1;
  Sample s;
  s.peak = work.peak(peak_seconds, std::min(run, most)) / 2;
  std::array<double, 100> runs{};
  std::size_t count = 0;
  double elapsed = 0;
  do {
    const double begin = now();
    work.run();
    runs[count] = now() - begin;
    elapsed += runs[count++];
  } while (count < runs.size() && (elapsed < seconds || (count < 3 && elapsed < 20 * seconds)));
  const auto middle = runs.begin() + static_cast<std::ptrdiff_t>(count / 2);
  std::nth_element(runs.begin(), middle, runs.begin() + static_cast<std::ptrdiff_t>(count));
  s.seconds = *middle;
  s.peak += work.peak(peak_seconds, std::min(s.seconds, most)) / 2;
  return s;
}

// The first run: the workspace takes its size, caches get warm.
void warm_up(Measured& m) {
  measuring::restart_heap_count();
  const std::size_t before = measuring::heap_use().live;
  const double begin = measuring::wall_seconds();
  m.work->run();
  m.run_seconds = measuring::wall_seconds() - begin;
  m.scratch_bytes = measuring::heap_use().most - before;
}

// A round's sample; the first one counts allocations too.
void add_sample(Measured& m, double seconds, Clock now) {
  measuring::restart_heap_count();
  const Sample taken = sample(*m.work, seconds, m.run_seconds, now);
  if (m.samples.empty()) m.allocations = measuring::heap_use().allocations;
  m.samples.push_back(taken);
}

void print_string(const char* key, const std::string& value) {
  std::cout << '"' << key << "\": \"";
  for (const char c : value) {
    if (c == '"' || c == '\\') std::cout << '\\';
    std::cout << c;
  }
  std::cout << '"';
}

template <typename Value>
void print_samples(const char* key, const std::vector<Sample>& samples, Value&& value) {
  std::cout << '"' << key << "\": [";
  for (std::size_t i = 0; i < samples.size(); ++i)
    std::cout << (i ? ", " : "") << value(samples[i]);
  std::cout << ']';
}

// By which instructions.
const char* bfloat16_products() {
#if defined(LOCAL_MHA_AMX)
  if (local_mha::detail::has_matrix_unit()) return "AMX";
#endif
#if defined(LOCAL_MHA_VDPBF16PS)
  return "VDPBF16PS";
#else
  return "float";
#endif
}

void print(const std::vector<Measured>& all) {
  std::cout << std::setprecision(9) << "{";
#if defined(__clang__)
  print_string("compiler", "clang " + std::to_string(__clang_major__) + "." +
                               std::to_string(__clang_minor__) + "." +
                               std::to_string(__clang_patchlevel__));
#elif defined(__GNUC__)
  print_string("compiler", "g++ " __VERSION__);
#else
  print_string("compiler", "unknown");
#endif
  std::cout << ", ";
  print_string("flags", LOCAL_MHA_BENCHMARK_FLAGS);
  std::cout << ", ";
  print_string("instruction_sets", Eigen::SimdInstructionSetsInUse());
  std::cout << ", ";
  print_string("bfloat16_products", bfloat16_products());
  std::cout << ",\n\"results\": [";
  for (std::size_t i = 0; i < all.size(); ++i) {
    const Measured& m = all[i];
    std::cout << (i ? ",\n" : "\n") << "{";
    print_string("case", m.work->of().name());
    std::cout << ", \"flops\": " << m.work->flops() << ", \"tokens\": " << m.work->of().tokens();
    std::cout << ", ";
    print_samples("seconds", m.samples, [](const Sample& s) { return s.seconds; });
    std::cout << ", ";
    print_samples("peak", m.samples, [](const Sample& s) { return s.peak; });
    const double error = m.work->max_error();
    // JSON has no infinity.
    std::cout << ", \"max_error\": "
              << (std::isfinite(error) ? error : std::numeric_limits<double>::max())
              << ", \"correct\": " << (error <= m.work->tolerance() ? "true" : "false");
    if (measuring::counts_heap)
      std::cout << ", \"scratch_bytes\": " << m.scratch_bytes
                << ", \"allocations\": " << m.allocations;
    std::cout << '}';
  }
  std::cout << "\n]}\n";
}

double number(const std::string& option, const char* text) {
  std::size_t used = 0;
  double value = 0;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || text[used] != '\0' || !(value >= 0) || value > 1e6)
    throw std::invalid_argument(option + ": expected a number from 0 to 1e6, got " + text);
  return value;
}

int run(const std::vector<std::string>& arguments) {
  long rounds = 5;
  double seconds = 0.05;
  bool wall = false;
  std::vector<measuring::Case> cases;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--help") {
      std::cout << "usage: local_mha_measure [--rounds R] [--seconds S] [--wall] CASE...\n"
                   "A case: attention/float/seqlen:8192/dim_head:64/window_size:256\n"
                   "Prints JSON; see benchmarks/README.md.\n";
      return 0;
    }
    if (argument == "--wall") {
      wall = true;
    } else if (argument == "--rounds" || argument == "--seconds") {
      if (++i == arguments.size()) throw std::invalid_argument(argument + ": expected a number");
      const double value = number(argument, arguments[i].c_str());
      if (argument == "--rounds")
        rounds = std::max(1L, static_cast<long>(value));
      else
        seconds = value;
    } else {
      cases.push_back(measuring::Case::parse(argument));
    }
  }
  if (cases.empty()) throw std::invalid_argument("expected at least one case; see --help");

  for (const measuring::Case& c : cases)
    if (c.threads > 1 && !wall)
      throw std::invalid_argument("case '" + c.name() + "': threads are measured with --wall");
  if (!wall) stay_on_this_core();
  std::vector<Measured> all;
  for (const measuring::Case& c : cases) {
    all.emplace_back().work = measuring::make_work(c);
    warm_up(all.back());
  }
  for (long round = 0; round < rounds; ++round)
    for (Measured& m : all)
      add_sample(m, seconds, wall ? measuring::wall_seconds : measuring::cpu_seconds);
  print(all);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "local_mha_measure: " << error.what() << '\n';
    return 2;
  }
}
