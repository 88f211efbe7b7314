// SPDX-License-Identifier: MIT
// Weak and strong scaling over ranks, how long these wait, and what delays do to them:
//
//   mpirun -n R local_mha_measure_mpi [option...]          see --help
//
// Each case runs on 1, 2, 4, … ranks of those that there are, while the others sleep. Times are
// wall time, from a barrier to the end of the last rank. A round in which a rank has not had its
// core to itself, as its processor time tells, does not count where there are others.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <ctime>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#include <sys/resource.h>
#endif

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <local_mha/local_mha.hpp>
#include <local_mha/mpi.hpp>

#include "../measuring/fma_peak.hpp"
#include "../measuring/random.hpp"
#include "delays.hpp"
#include "model.hpp"

namespace {

using local_mha::Index;
using local_mha::Tensor;
namespace mpi = local_mha::mpi;

struct Options {
  Index rows = Index{1} << 17;
  Index dim = 512;
  Index heads = 8;
  Index dim_head = 64;
  Index window = 256;
  Index depth = 2;
  int rounds = 3;
  int short_rounds = 25;
  std::vector<int> ranks;
  std::vector<int> processors;
  bool in_turn = false;
  bool backward = true;
  bool delays = true;
  bool scaling = true;
  std::string json_path;
  int simulated_ranks = 1000;
};

int world_rank() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}
int world_size() {
  int size = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

// Those that are not of a case leave their cores to those that are.
void meet_asleep(MPI_Comm comm) {
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Ibarrier(comm, &request);
  for (int done = 0; done == 0;) {
    MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (done == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

#if defined(__linux__)
// Those that this process may run on: first one of each physical core, then its other threads, as
// far as the machine tells which these are.
std::vector<int> processors_by_core() {
  cpu_set_t allowed;
  std::vector<int> first, others;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return first;
  std::set<std::string> cores;
  for (int processor = 0; processor < CPU_SETSIZE; ++processor) {
    if (!CPU_ISSET(processor, &allowed)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(processor) +
                       "/topology/thread_siblings_list");
    std::string siblings;
    const bool is_told = static_cast<bool>(std::getline(file, siblings));
    (is_told && !cores.insert(siblings).second ? others : first).push_back(processor);
  }
  first.insert(first.end(), others.begin(), others.end());
  return first;
}
#endif

// \param processors of the ranks; empty: one of each physical core as far as these go
void take_a_core(std::vector<int> processors) {
#if defined(__linux__)
  const bool is_chosen = !processors.empty();
  if (!is_chosen) processors = processors_by_core();
  if (processors.size() < static_cast<std::size_t>(world_size())) {
    if (is_chosen)
      throw std::invalid_argument("--processors: fewer than the " + std::to_string(world_size()) +
                                  " ranks");
    return;
  }
  const int mine = processors[static_cast<std::size_t>(world_rank())];
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(mine, &one);
  if (sched_setaffinity(0, sizeof one, &one) != 0 && is_chosen)
    throw std::invalid_argument("--processors: this process may not run on " +
                                std::to_string(mine));
#else
  if (!processors.empty()) throw std::invalid_argument("--processors: on Linux alone");
#endif
}

// Of two, the smaller one.
double median(std::vector<double> all) {
  std::sort(all.begin(), all.end());
  return all[(all.size() - 1) / 2];
}

std::string processor() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  return "unknown";
}

// Wall time of a task, and the processor time of this process in it.
struct Times {
  double wall = 0;
  double processor = 0;

  double share() const { return wall > 0 ? processor / wall : 1; }
};
template <typename Task>
Times times_of(Task&& task) {
  const std::clock_t processor = std::clock();
  const double wall = MPI_Wtime();
  task();
  return {MPI_Wtime() - wall, static_cast<double>(std::clock() - processor) / CLOCKS_PER_SEC};
}

// What the system has done for this process.
struct Resources {
  double user = 0;    // seconds
  double system = 0;  // seconds
  double faults = 0;  // of pages that were not there

  static Resources now() {
    Resources all;
#if defined(__linux__)
    rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& time) {
      return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
    };
    all.user = seconds(usage.ru_utime);
    all.system = seconds(usage.ru_stime);
    all.faults = static_cast<double>(usage.ru_minflt);
#endif
    return all;
  }
  Resources since(const Resources& before) const {
    return {user - before.user, system - before.system, faults - before.faults};
  }
};

double over_ranks(double number, MPI_Op op, MPI_Comm comm) {
  MPI_Allreduce(MPI_IN_PLACE, &number, 1, MPI_DOUBLE, op, comm);
  return number;
}

struct Figure {
  double seconds = 0;
  double waiting = 0;    // share of the time, the mean over ranks
  double imbalance = 0;  // share of the time by which the first rank is ready before the last
  double bytes = 0;      // that a rank sends, the mean
  double processor = 1;  // processor time of the time, of the rank that has had the least
  // Of the same on one rank in the same rounds, if that was run.
  double seconds_of_one = 0;
  double stolen = 0;  // of all processors' time, by what the virtual machine runs on
  double faults = 0;  // of pages, of a rank, the mean
  double system = 0;  // share of the time that the ranks have been in the system, the mean
};

// Of a rank in a round.
struct OfRank {
  double seconds = 0;
  Resources used = {};
};

// Share of the processors' time that a host has taken from a virtual machine since it started, and
// all of their time.
struct Stolen {
  double stolen = 0;
  double all = 0;

  static Stolen now() {
    std::ifstream stat("/proc/stat");
    std::string name;
    stat >> name;
    Stolen sum;
    double of_kind = 0;
    for (int kind = 0; kind < 8 && stat >> of_kind; ++kind) {
      sum.all += of_kind;
      if (kind == 7) sum.stolen = of_kind;
    }
    return sum;
  }
  double share_since(const Stolen& before) const {
    return all > before.all ? (stolen - before.stolen) / (all - before.all) : 0;
  }
};

// Less of it, and another program has had the core.
constexpr double undisturbed = 0.99;

/// What is measured on some ranks, each with `rows` of the sequence.
class Work {
 public:
  Work() = default;
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;
  virtual ~Work() = default;
  virtual void run() = 0;
};

Tensor<float, 3> random_rows(Index rows, Index dim, std::uint64_t seed) {
  Tensor<float, 3> x(1, rows, dim);
  measuring::Random random(seed);
  random.fill(x);
  return x;
}

local_mha::LocalMHAConfig layer_config(const Options& o) {
  return {.dim = o.dim,
          .window_size = o.window,
          .dim_head = o.dim_head,
          .heads = o.heads,
          .causal = true,
          .prenorm = true,
          .qk_rmsnorm = true,
          .use_xpos = true};
}

class Layer final : public Work {
 public:
  Layer(const mpi::Communicator& communicator, const Options& o, Index rows, bool backward)
      : split_(communicator, rows),
        layer_(communicator, local_mha::LocalMHA<float>(layer_config(o), 1)),
        x_(random_rows(rows, o.dim, 1)),
        y_(x_.dimensions()) {
    y_.setZero();
    if (!backward) return;
    grad_y_ = random_rows(rows, o.dim, 2);
    grad_x_.resize(x_.dimensions());
    grad_x_.setZero();
    gradients_ = local_mha::LocalMHAParameters<float>::zeros(layer_config(o));
  }
  void run() override {
    if (!gradients_) return layer_.forward_into(y_, x_, split_);
    layer_.forward_saving_into(y_, saved_, x_, split_);
    layer_.backward_into(grad_x_, workspace_, *gradients_, saved_, grad_y_, x_, split_);
  }

 private:
  mpi::Split split_;
  mpi::LocalMHA<float> layer_;
  mpi::LocalMHA<float>::Saved saved_;
  mpi::LocalMHA<float>::Workspace workspace_;
  Tensor<float, 3> x_, y_, grad_y_, grad_x_;
  std::optional<local_mha::LocalMHAParameters<float>> gradients_;
};

class Encoder final : public Work {
 public:
  Encoder(const mpi::Communicator& communicator, const Options& o, Index rows)
      : split_(communicator, rows),
        encoder_(communicator,
                 local_mha::Encoder<float>({.depth = o.depth, .layers = {layer_config(o)}}, 1)),
        x_(random_rows(rows, o.dim, 1)),
        y_(x_.dimensions()) {
    y_.setZero();
  }
  void run() override { encoder_.forward_into(y_, x_, split_); }

 private:
  mpi::Split split_;
  mpi::Encoder<float> encoder_;
  Tensor<float, 3> x_, y_;
};

// A round on all ranks of a communicator.
// \param of_ranks null, or becomes on the first rank what each has taken
Figure measure_round(const mpi::Communicator& communicator, Work& work,
                     std::vector<OfRank>* of_ranks = nullptr) {
  MPI_Barrier(communicator.get());
  communicator.reset_traffic();
  const Resources before = Resources::now();
  const Times own = times_of([&] { work.run(); });
  const OfRank here{own.wall, Resources::now().since(before)};
  const mpi::Traffic& traffic = communicator.traffic();
  const double ranks = communicator.size();
  Figure figure;
  figure.seconds = over_ranks(own.wall, MPI_MAX, communicator.get());
  figure.imbalance = 1 - over_ranks(own.wall, MPI_MIN, communicator.get()) / figure.seconds;
  figure.waiting =
      over_ranks(traffic.seconds_waiting / own.wall, MPI_SUM, communicator.get()) / ranks;
  figure.bytes =
      over_ranks(static_cast<double>(traffic.keys_and_values + traffic.gradients + traffic.sums),
                 MPI_SUM, communicator.get()) /
      ranks;
  figure.processor = over_ranks(own.share(), MPI_MIN, communicator.get());
  figure.faults = over_ranks(here.used.faults, MPI_SUM, communicator.get()) / ranks;
  figure.system = over_ranks(here.used.system / own.wall, MPI_SUM, communicator.get()) / ranks;
  if (of_ranks != nullptr) {
    of_ranks->resize(static_cast<std::size_t>(communicator.size()));
    MPI_Gather(&here, sizeof here, MPI_BYTE, of_ranks->data(), sizeof here, MPI_BYTE, 0,
               communicator.get());
  }
  return figure;
}

// Medians of rounds.
Figure median_of(std::vector<Figure> rounds) {
  const auto is_disturbed = [](const Figure& round) { return round.processor < undisturbed; };
  if (!std::all_of(rounds.begin(), rounds.end(), is_disturbed))
    rounds.erase(std::remove_if(rounds.begin(), rounds.end(), is_disturbed), rounds.end());
  const auto of = [&](double Figure::* member) {
    std::vector<double> all;
    for (const Figure& round : rounds) all.push_back(round.*member);
    return median(all);
  };
  return {of(&Figure::seconds),
          of(&Figure::waiting),
          of(&Figure::imbalance),
          of(&Figure::bytes),
          of(&Figure::processor),
          of(&Figure::seconds_of_one),
          0,
          of(&Figure::faults),
          of(&Figure::system)};
}

// After a first one, unless there is a single one.
// \param one null, or the same on one rank, which takes turns; null on all but the first rank
// \param of_ranks null, or becomes on the first rank what each has taken in the last round
Figure measure(const mpi::Communicator& communicator, Work& work, int rounds, Work* one = nullptr,
               bool in_turn = false, std::vector<OfRank>* of_ranks = nullptr) {
  if (rounds > 1) work.run();
  std::vector<Figure> all;
  for (int round = 0; round < rounds; ++round) {
    Times alone;
    if (in_turn) {
      if (one != nullptr) alone = times_of([&] { one->run(); });
      meet_asleep(communicator.get());
    }
    all.push_back(measure_round(communicator, work, of_ranks));
    if (one == nullptr) continue;
    all.back().seconds_of_one = alone.wall;
    all.back().processor = std::min(all.back().processor, alone.share());
  }
  // The ranks have seen the same rounds, but for what the first one did alone.
  Figure figure = median_of(all);
  MPI_Bcast(&figure, sizeof figure, MPI_BYTE, 0, communicator.get());
  return figure;
}

// The layer over one rank beside no MPI, in turn, over the same rows: in many short rounds, of
// which the order changes.
double share_of_alone(const mpi::Communicator& communicator, const Options& o) {
  const Index rows = std::max<Index>(o.rows / 8, 1);
  const local_mha::LocalMHA<float> layer(layer_config(o), 1);
  local_mha::LocalMHA<float>::Workspace workspace;
  const mpi::LocalMHA<float> over_ranks(communicator, layer);
  const mpi::Split split(communicator, rows);
  const Tensor<float, 3> x = random_rows(rows, o.dim, 1);
  Tensor<float, 3> y(x.dimensions());
  y.setZero();
  const auto alone = [&] { layer.forward_into(y, workspace, x); };
  const auto over_one = [&] { over_ranks.forward_into(y, x, split); };
  std::vector<double> ratios, of_all;
  for (int round = -1; round < o.short_rounds; ++round) {
    const bool alone_first = round % 2 == 0;
    const Times first = alone_first ? times_of(alone) : times_of(over_one);
    const Times second = alone_first ? times_of(over_one) : times_of(alone);
    if (round < 0) continue;
    of_all.push_back(alone_first ? second.wall / first.wall : first.wall / second.wall);
    if (std::min(first.share(), second.share()) >= undisturbed) ratios.push_back(of_all.back());
  }
  return median(ratios.empty() ? of_all : ratios);
}

class Measurement {
 public:
  explicit Measurement(const Options& options) : options_(options) {}

  void run() {
    if (world_rank() == 0)
      steps_ = static_cast<long>(measuring::fma_peak<float>(0.2) / MultiplyAdds::flops(1));
    meet_asleep(MPI_COMM_WORLD);
    MPI_Bcast(&steps_, 1, MPI_LONG, 0, MPI_COMM_WORLD);
    // Against one rank; first what says most.
    std::vector<int> numbers{1};
    if (world_size() > 1) numbers.push_back(world_size());
    int n = 1;
    while (2 * n < world_size()) n *= 2;
    for (; n > 1; n /= 2) numbers.push_back(n);
    if (!options_.ranks.empty())
      numbers.erase(std::remove_if(numbers.begin() + 1, numbers.end(),
                                   [&](int of) {
                                     return std::find(options_.ranks.begin(), options_.ranks.end(),
                                                      of) == options_.ranks.end();
                                   }),
                    numbers.end());
    all_["processor"] = processor();
    all_["cores"] = std::thread::hardware_concurrency();
    all_["rows"] = options_.rows;
    all_["dim"] = options_.dim;
    all_["window_size"] = options_.window;
    all_["depth"] = options_.depth;
    for (const int number : numbers) of_ranks(number);
    save();
  }

 private:
  // What there is, also while the rest is being measured.
  void save() const {
    if (world_rank() != 0 || options_.json_path.empty()) return;
    std::ofstream file(options_.json_path);
    file << all_.dump(2) << std::endl;
    if (!file) throw std::runtime_error(options_.json_path + ": cannot be written");
  }

  // All cases on the first `n` ranks.
  void of_ranks(int n) {
    MPI_Comm some = MPI_COMM_NULL;
    MPI_Comm_split(MPI_COMM_WORLD, world_rank() < n ? 0 : MPI_UNDEFINED, world_rank(), &some);
    if (some != MPI_COMM_NULL) {
      const mpi::Communicator communicator(some);
      MPI_Comm_free(&some);
      measure_on(communicator);
    }
    meet_asleep(MPI_COMM_WORLD);
  }

  // Of multiply-adds in registers: as many on each rank, which take a second where a core is alone,
  // until the last rank has done them. So cores count that share a physical one, or are taken away.
  double peak(const mpi::Communicator& communicator) const {
    volatile float factor = 0.75F, addend = 0.25F, used = 0;
    MPI_Barrier(communicator.get());
    const double own = times_of([&] { used = MultiplyAdds::run(steps_, factor, addend); }).wall;
    return communicator.size() * MultiplyAdds::flops(steps_) /
           over_ranks(own, MPI_MAX, communicator.get());
  }

  void measure_on(const mpi::Communicator& communicator) {
    const int n = communicator.size();
    if (n == 1 && options_.scaling) {
      const double ratio = share_of_alone(communicator, options_);
      all_["layer_on_one_rank_against_no_mpi"] = ratio;
      tell([&](std::ostream& out) {
        out << processor() << "\n\nthe layer on one rank takes " << ratio
            << " of the time without MPI\n\n"
            << "ranks  case                      rows a rank  positions a second  scaling  of the "
               "peak's  waiting   bytes a rank  processor    stolen  page faults    system\n";
      });
    }
    double before = peak(communicator);
    const auto add = [&](const std::string& name, bool strong, auto&& make) {
      const Stolen begin = Stolen::now();
      const Index rows = strong ? options_.rows / n : options_.rows;
      Figure figure;
      std::vector<OfRank> of_ranks;
      {
        const auto work = make(communicator, rows);
        const bool in_turn = options_.in_turn && n > 1;
        std::optional<mpi::Communicator> self;
        std::unique_ptr<Work> one;
        if (in_turn && communicator.rank() == 0) {
          self.emplace(MPI_COMM_SELF);
          one = make(*self, options_.rows);
        }
        figure = measure(communicator, *work, options_.rounds, one.get(), in_turn, &of_ranks);
      }
      const double after = peak(communicator);
      figure.stolen = Stolen::now().share_since(begin);
      report(communicator, name, strong, rows, figure, of_ranks, (before + after) / 2);
      before = after;
    };
    for (const bool strong : {false, true}) {
      if ((strong && n == 1) || !options_.scaling) continue;
      add("layer", strong, [&](const mpi::Communicator& of, Index rows) {
        return std::make_unique<Layer>(of, options_, rows, false);
      });
      if (options_.backward)
        add("layer_and_back", strong, [&](const mpi::Communicator& of, Index rows) {
          return std::make_unique<Layer>(of, options_, rows, true);
        });
      add("encoder", strong, [&](const mpi::Communicator& of, Index rows) {
        return std::make_unique<Encoder>(of, options_, rows);
      });
    }
    if (n == world_size() && n > 1 && options_.delays) delayed(communicator);
  }

  void report(const mpi::Communicator& communicator, const std::string& name, bool strong,
              Index rows, const Figure& figure, const std::vector<OfRank>& of_ranks,
              double peak_now) {
    const int n = communicator.size();
    const double rate = static_cast<double>(rows * n) / figure.seconds;
    if (n == 1) {
      one_[name] = rate;
      peak_of_one_[name] = peak_now;
    }
    if (communicator.rank() != 0) return;
    const double of_one = figure.seconds_of_one > 0
                              ? static_cast<double>(options_.rows) / figure.seconds_of_one
                              : one_.at(name);
    const double scaling = rate / (n * of_one);
    const double of_peak = peak_now / (n * peak_of_one_.at(name));
    all_["cases"].push_back({{"case", name},
                             {"ranks", n},
                             {"scaling", strong ? "strong" : "weak"},
                             {"rows", rows},
                             {"seconds", figure.seconds},
                             {"positions_per_second", rate},
                             {"share_of_one_rank", scaling},
                             {"share_of_peak_scaling", scaling / of_peak},
                             {"peak_flops", peak_now},
                             {"waiting", figure.waiting},
                             {"imbalance", figure.imbalance},
                             {"processor", figure.processor},
                             {"stolen", figure.stolen},
                             {"bytes_of_a_rank", figure.bytes},
                             {"page_faults", figure.faults},
                             {"system", figure.system}});
    auto& each = all_["cases"].back()["ranks_of_last_round"];
    for (const OfRank& rank : of_ranks)
      each.push_back({{"seconds", rank.seconds},
                      {"user_seconds", rank.used.user},
                      {"system_seconds", rank.used.system},
                      {"page_faults", rank.used.faults}});
    tell([&](std::ostream& out) {
      out << std::setw(5) << n << "  " << std::left << std::setw(16) << name << std::setw(8)
          << (strong ? "strong" : "weak") << std::right << std::setw(13) << rows << std::setw(20)
          << std::fixed << std::setprecision(0) << rate << std::setprecision(1) << std::setw(7)
          << 100 * scaling << " %" << std::setw(11) << 100 * scaling / of_peak << " %"
          << std::setprecision(2) << std::setw(9) << 100 * figure.waiting << " %"
          << std::setprecision(0) << std::setw(13) << figure.bytes << std::setprecision(1)
          << std::setw(9) << 100 * figure.processor << " %" << std::setw(8) << 100 * figure.stolen
          << " %" << std::setprecision(0) << std::setw(13) << figure.faults << std::setprecision(2)
          << std::setw(8) << 100 * figure.system << " %\n";
    });
    save();
  }

  // An encoder with delays, beside the model of what it takes without them: of stretches that hide
  // them, and of short ones.
  void delayed(const mpi::Communicator& communicator) {
    const Figure plain = delayed(communicator, options_.rows, {50e-6, 1e-3}, 0.1);
    for (const Index rows : {4 * options_.window, options_.window})
      if (rows < options_.rows) delayed(communicator, rows, {50e-6, 1e-3, 30e-3}, 0);
    on_paper(communicator, plain);
  }

  // \param slower of rank 0; 0: not tried
  Figure delayed(const mpi::Communicator& communicator, Index rows,
                 const std::vector<double>& latencies, double slower) {
    const int n = communicator.size();
    const int rounds = rows < options_.rows ? 5 * options_.rounds : options_.rounds;
    Encoder work(communicator, options_, rows);
    const Figure plain = measure(communicator, work, rounds);
    const auto compare = [&](const std::string& name, double latency, double slower_by) {
      measuring::set_delays({latency, communicator.rank() == 0 ? slower_by : 0});
      const Figure figure = measure(communicator, work, rounds);
      measuring::set_delays({});
      measuring::Pass pass = pass_of(plain, rows, rows, options_.depth);
      pass.latency = latency;
      const measuring::Times model =
          measuring::simulate(pass, n, [&](int rank, int) { return rank == 0 ? slower_by : 0; });
      if (communicator.rank() != 0) return;
      all_["delays"].push_back({{"delay", name},
                                {"rows", rows},
                                {"seconds", figure.seconds},
                                {"share_of_plain", figure.seconds / plain.seconds},
                                {"waiting", figure.waiting},
                                {"model_seconds", model.seconds},
                                {"model_waiting", model.waiting}});
      tell([&](std::ostream& out) {
        out << std::left << std::setw(28) << name << std::right << std::fixed
            << std::setprecision(4) << figure.seconds << " s, " << std::setprecision(2)
            << 100 * figure.waiting << " % waiting; the model: " << std::setprecision(4)
            << model.seconds << " s, " << std::setprecision(2) << 100 * model.waiting << " %\n";
      });
    };
    tell([&](std::ostream& out) {
      out << "\nencoder, " << n << " ranks of " << rows << " rows, delayed\n";
    });
    compare("nothing", 0, 0);
    for (const double latency : latencies) {
      std::ostringstream name;
      name << "latency of " << 1e3 * latency << " ms";
      compare(name.str(), latency, 0);
    }
    if (slower > 0) compare("rank 0 slower by 10 %", 0, slower);
    return plain;
  }

  // A pass whose ranks have `rows` each, by what one of `measured` rows without delays took.
  measuring::Pass pass_of(const Figure& plain, Index measured, Index rows, Index depth) const {
    const double row =
        plain.seconds * (1 - plain.waiting) / static_cast<double>(options_.depth * measured);
    const double attention = row * attention_share();
    // A window of the rows is lent, and so many queries wait for what is borrowed. Keys of lent
    // rows are made twice.
    const auto all = static_cast<double>(rows);
    const double some = std::min(all, static_cast<double>(options_.window));
    return {.layers = static_cast<int>(depth),
            .lend = attention * some / 4,
            .inner = attention * (all - some),
            .outer = attention * some + (row - attention) * all,
            .bytes = 2.0 * sizeof(float) *
                     static_cast<double>(options_.heads * options_.dim_head * options_.window),
            .bandwidth = 1e9};
  }

  // Many ranks, by the model.
  void on_paper(const mpi::Communicator& communicator, const Figure& plain) {
    if (communicator.rank() != 0) return;
    const int ranks = options_.simulated_ranks;
    std::cout << "\non paper: " << ranks
              << " ranks, 24 layers, 1 GB/s, against ranks that wait for "
              << "nothing\n";
    const auto row = [&](const std::string& name, double latency, Index rows, auto&& slower) {
      measuring::Pass pass = pass_of(plain, options_.rows, rows, 24);
      pass.latency = latency;
      pass.sums = true;
      const measuring::Times times = measuring::simulate(pass, ranks, slower);
      const measuring::Times ideal = measuring::simulate(pass, 1, [](int, int) { return 0.0; });
      const double share = times.seconds / ideal.seconds;
      std::cout << std::left << std::setw(58) << name << std::right << std::fixed
                << std::setprecision(3) << share << " of the time, " << std::setprecision(2)
                << 100 * times.waiting << " % waiting\n";
      all_["on_paper"].push_back({{"case", name},
                                  {"ranks", ranks},
                                  {"rows", rows},
                                  {"share_of_ideal", share},
                                  {"waiting", times.waiting}});
    };
    const auto even = [](int, int) { return 0.0; };
    const Index n = options_.rows;
    row("latency 50 us", 50e-6, n, even);
    row("latency 1 ms", 1e-3, n, even);
    for (const Index rows : {Index{1024}, Index{512}, Index{256}})
      row("latency 1 ms, " + std::to_string(rows) + " rows a rank", 1e-3, rows, even);
    row("one rank slower by 10 %", 50e-6, n, [](int rank, int) { return rank == 7 ? 0.1 : 0.0; });
    const local_mha::Philox random(1);
    const auto drawn = [&](int rank, int layer) {
      return random(
                 {static_cast<std::uint32_t>(rank), static_cast<std::uint32_t>(layer), 0, 0})[0] *
             0x1p-32;
    };
    row("each layer of each rank slower by 0 to 10 %", 50e-6, n,
        [&](int rank, int layer) { return 0.1 * drawn(rank, layer); });
    row("a hundredth of layers stopped for as long as they take", 50e-6, n,
        [&](int rank, int layer) { return drawn(rank, layer) < 0.01 ? 1.0 : 0.0; });
  }

  // Of a layer of the encoder, by multiplications.
  double attention_share() const {
    const auto dim = static_cast<double>(options_.dim);
    const double attention =
        8 * dim * static_cast<double>(options_.heads * options_.dim_head) +
        4 * static_cast<double>(options_.heads * options_.dim_head * (options_.window + 1));
    const double feed_forward = 6 * dim * std::floor(dim * 8 / 3);
    return attention / (attention + feed_forward);
  }

  template <typename Write>
  static void tell(Write&& write) {
    if (world_rank() != 0) return;
    std::ostringstream line;
    write(line);
    std::cout << line.str() << std::flush;
  }

  using MultiplyAdds = measuring::detail::MultiplyAdds<float>;

  Options options_;
  long steps_ = 1;
  std::map<std::string, double> one_;
  std::map<std::string, double> peak_of_one_;
  nlohmann::json all_;
};

}  // namespace

int main(int argc, char** argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  Options options;
  CLI::App app("Scaling of layers and encoders over ranks, and what delays do to it.");
  const auto add = [&](const char* name, auto& value, const char* what) {
    app.add_option(name, value, what)->check(CLI::PositiveNumber)->capture_default_str();
  };
  add("--rows", options.rows, "Positions of a rank (weak scaling), and of all (strong)");
  add("--dim", options.dim, "Channels");
  add("--heads", options.heads, "Heads of a layer");
  add("--dim-head", options.dim_head, "Channels of a head");
  add("--window-size", options.window, "Positions that a position looks back");
  add("--depth", options.depth, "Layers of the encoder");
  add("--rounds", options.rounds, "Rounds, of which the median is taken");
  add("--short-rounds", options.short_rounds,
      "Rounds of an eighth of the rows, of the layer on one rank beside the one without MPI");
  app.add_option("--ranks", options.ranks, "Numbers of ranks beside 1. Default: 2, 4, 8, … and all")
      ->delimiter(',');
  app.add_option("--processors", options.processors,
                 "The logical processor of each rank. Default: one of each physical core first, as "
                 "far as the machine tells which share one")
      ->delimiter(',');
  app.add_flag("--in-turn", options.in_turn,
               "The same on one rank before each round, for machines that others use, too");
  add("--simulate", options.simulated_ranks, "Ranks of the plan on paper");
  app.add_flag("!--no-backward", options.backward, "Leaves the way back out");
  app.add_flag("!--no-scaling", options.scaling, "Leaves scaling out");
  app.add_flag("!--no-delays", options.delays, "Leaves delays and the plan on paper out");
  app.add_option("--json", options.json_path, "A file of all figures");
  int status = 0;
  try {
    app.parse(argc, argv);
    take_a_core(options.processors);
    Measurement(options).run();
  } catch (const CLI::ParseError& error) {
    status = world_rank() == 0 ? app.exit(error) : error.get_exit_code();
  } catch (const std::exception& error) {
    std::cerr << "local_mha_measure_mpi: " << error.what() << '\n';
    MPI_Abort(MPI_COMM_WORLD, 2);
  }
  MPI_Finalize();
  return status;
}
