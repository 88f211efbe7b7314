// SPDX-License-Identifier: MIT
// Runs random cases of everything against the independent reference. Case `i` of a seed is the same
// wherever it runs, so that pieces of a long soak may run on several machines, and a line repeats
// what was found.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "soak/cases.hpp"

namespace {

using soak::Check;
using soak::Kind;
using soak::kinds;

constexpr std::size_t kind_count = std::size(kinds);

struct Options {
  std::uint64_t seed = 1;
  long long first = 0;
  long long cases = 100'000;
  int jobs = 1;
  long long stop_after = 20;
  std::optional<std::size_t> only;
  bool verbose = false;
};

constexpr const char* usage = R"(soak [OPTIONS]
Runs random cases against the reference; 0: all were right.
  --seed S        of the cases, 1
  --first I       number of the first case, 0
  --cases N       how many, 100000
  --jobs J        threads, 1
  --only KIND     attention, layer, transformer, stream or training
  --stop-after F  findings, 20
  --slack B       results may lie B times their bound away, 10
  --verbose       a line for each case
)";

struct Count {
  long long cases = 0;
  /// Cases that compare numbers which are not 0 and known to two digits.
  long long substantial = 0;
  long long numbers = 0;
  long long known = 0;
  long long findings = 0;
  double worst = 0;
  double seconds = 0;
};

// Of the case that a thread is at, for a process that ends there.
thread_local char current[200];

extern "C" void say_where(int signal) {
  const char text[] = "# ended by a signal\n";
  [[maybe_unused]] auto written = write(STDOUT_FILENO, current, std::strlen(current));
  written = write(STDOUT_FILENO, text, sizeof(text) - 1);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

// Asked to end: what is counted so far is printed.
volatile std::sig_atomic_t asked_to_end = 0;
extern "C" void end_soon(int) { asked_to_end = 1; }

std::uint64_t mixed(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15U;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
  return x ^ (x >> 31);
}

std::size_t kind_of(const Options& options, Random& random) {
  long long place = random.integer(0, 9);
  std::size_t kind = 0;
  while (place >= kinds[kind].share) place -= kinds[kind++].share;
  return options.only.value_or(kind);
}

class Soak {
 public:
  explicit Soak(const Options& options) : options_(options) {}

  bool run() {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> jobs;
    for (int job = 0; job < options_.jobs; ++job)
      jobs.emplace_back([&] {
        for (long long i = next_++; i < options_.cases && asked_to_end == 0; i = next_++)
          run_case(options_.first + i);
      });
    for (std::thread& job : jobs) job.join();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    Count all;
    std::puts("kind             cases  substantial  known numbers  worst/bound  findings  ms each");
    for (std::size_t kind = 0; kind < kind_count; ++kind) {
      print(kinds[kind].name, counts_[kind]);
      add(counts_[kind], all);
    }
    print("all", all);
    std::printf("seed %llu, cases %lld to %lld, %d jobs, %.0f s\n",
                static_cast<unsigned long long>(options_.seed), options_.first,
                options_.first + all.cases - 1, options_.jobs, elapsed.count());
    return all.findings == 0;
  }

 private:
  static void add(const Count& from, Count& to) {
    to.cases += from.cases;
    to.substantial += from.substantial;
    to.numbers += from.numbers;
    to.known += from.known;
    to.findings += from.findings;
    to.worst = std::max(to.worst, from.worst);
    to.seconds += from.seconds;
  }
  static void print(const char* name, const Count& c) {
    const auto share = [](long long part, long long whole) {
      return whole == 0 ? 0.0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
    };
    std::printf("%-12s %9lld  %9.2f %%  %11.2f %%  %11.2f  %8lld  %7.2f\n", name, c.cases,
                share(c.substantial, c.cases), share(c.known, c.numbers), c.worst / soak::slack,
                c.findings, 1e3 * c.seconds / static_cast<double>(std::max(1LL, c.cases)));
  }

  static std::string right(const Check& check) {
    return "right, " + std::to_string(check.numbers()) + " numbers, of which " +
           std::to_string(check.known()) + " are known and " + std::to_string(check.substantial()) +
           " say something";
  }

  void run_case(long long i) {
    Random random(mixed(mixed(options_.seed) + static_cast<std::uint64_t>(i)));
    const std::size_t kind = kind_of(options_, random);
    const std::string only =
        options_.only ? std::string("--only ") + kinds[kind].name + " " : std::string();
    std::snprintf(current, sizeof(current), "soak --seed %llu --first %lld --cases 1 %s",
                  static_cast<unsigned long long>(options_.seed), i, only.c_str());
    Check check;
    const auto begin = std::chrono::steady_clock::now();
    try {
      kinds[kind].run(check, random);
    } catch (const std::exception& e) {
      check.fail(std::string("threw ") + e.what());
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    const std::lock_guard lock(mutex_);
    add({.cases = 1,
         .substantial = check.says_something(),
         .numbers = check.numbers(),
         .known = check.known(),
         .findings = check.found().has_value(),
         .worst = check.worst(),
         .seconds = elapsed.count()},
        counts_[kind]);
    if (check.found() || options_.verbose)
      std::printf("%s # %s, %s: %s\n", current, kinds[kind].name, check.description.c_str(),
                  check.found().value_or(right(check)).c_str());
    if (!check.found()) return;
    std::fflush(stdout);
    if (++findings_ >= options_.stop_after) next_ = options_.cases;
  }

  Options options_;
  std::atomic<long long> next_{0};
  std::mutex mutex_;
  long long findings_ = 0;
  Count counts_[kind_count];
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--verbose") {
      options.verbose = true;
      continue;
    }
    if (i + 1 == argc) throw std::invalid_argument(option + ": unknown, or without a value");
    const std::string value = argv[++i];
    if (option == "--only") {
      for (std::size_t kind = 0; kind < kind_count; ++kind)
        if (value == kinds[kind].name) options.only = kind;
      if (!options.only) throw std::invalid_argument("--only: no kind " + value);
      continue;
    }
    if (option == "--slack") {
      soak::slack = std::stod(value);
      continue;
    }
    const long long number = std::stoll(value);
    if (number < 0) throw std::invalid_argument(option + ": less than 0");
    if (option == "--seed")
      options.seed = static_cast<std::uint64_t>(number);
    else if (option == "--first")
      options.first = number;
    else if (option == "--cases")
      options.cases = number;
    else if (option == "--jobs" && number > 0 && number <= 1024)
      options.jobs = static_cast<int>(number);
    else if (option == "--stop-after")
      options.stop_after = number;
    else
      throw std::invalid_argument(option + " " + value + ": unknown");
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGABRT}) std::signal(signal, say_where);
    for (const int signal : {SIGINT, SIGTERM}) std::signal(signal, end_soon);
    return Soak(options).run() ? 0 : 1;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "soak: %s\n%s", e.what(), usage);
    return 2;
  }
}
