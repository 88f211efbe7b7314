// SPDX-License-Identifier: MIT
/// \file
/// Runs an encoder over a sequence of which each rank of MPI holds a stretch:
///
///     mpirun -n 4 split_sequence --length 1000000 --check
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if __has_include(<sys/resource.h>)
#include <sys/resource.h>
#endif

#include <CLI/CLI.hpp>
#include <unsupported/Eigen/CXX11/ThreadPool>

#include <local_mha/local_mha.hpp>
#include <local_mha/mpi.hpp>

#include "program.hpp"

namespace {

using local_mha::Index;
using local_mha::Tensor;
namespace examples = local_mha::examples;
namespace mpi = local_mha::mpi;

struct Options {
  std::string input_path, output_path;
  Index length = 100000;
  Index dim = 64;
  Index heads = 4;
  Index dim_head = 16;
  Index window = 128;
  Index depth = 2;
  bool both_sides = false;
  int threads = 1;
  std::uint64_t seed = 0;
  bool check = false;
  std::uint64_t memory_mib = 0;

  local_mha::EncoderConfig encoder() const {
    return {.depth = depth,
            .layers = {{.dim = dim,
                        .window_size = window,
                        .dim_head = dim_head,
                        .heads = heads,
                        .causal = !both_sides,
                        .prenorm = true}}};
  }
};

// Memory that a process makes for itself, beyond which there is none.
void limit_memory(std::uint64_t mib) {
  if (mib == 0) return;
#if defined(RLIMIT_DATA)
  const rlimit most{static_cast<rlim_t>(mib << 20), static_cast<rlim_t>(mib << 20)};
  if (setrlimit(RLIMIT_DATA, &most) == 0) return;
#endif
  throw std::runtime_error("--memory-limit: this system has no such limit");
}

// The number of a position and channel, the same whoever makes it.
float made_number(std::uint64_t seed, Index row, Index channel) {
  const local_mha::Philox random(seed);
  const auto word = random({static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32),
                            static_cast<std::uint32_t>(channel), 0})[0];
  return static_cast<float>(word) * 0x1p-31F - 1;
}

void check_mpi(int result, const std::string& path) {
  if (result == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(result, text, &length);
  throw std::runtime_error(path + ": " + std::string(text, static_cast<std::size_t>(length)));
}

/// A file of float numbers as they lie in memory, `[N, dim]`, that all ranks open together.
class RawFile {
 public:
  RawFile(const mpi::Communicator& communicator, const std::string& path, int mode) : path_(path) {
    check_mpi(MPI_File_open(communicator.get(), path.c_str(), mode, MPI_INFO_NULL, &file_), path);
  }
  RawFile(const RawFile&) = delete;
  RawFile& operator=(const RawFile&) = delete;
  ~RawFile() { MPI_File_close(&file_); }

  std::uint64_t size() const {
    MPI_Offset size = 0;
    check_mpi(MPI_File_get_size(file_, &size), path_);
    return static_cast<std::uint64_t>(size);
  }
  void set_size(std::uint64_t size) {
    check_mpi(MPI_File_set_size(file_, static_cast<MPI_Offset>(size)), path_);
  }
  /// \param first number of the file
  void read(std::uint64_t first, Tensor<float, 3>& to) {
    for_each_part(first, to, [&](MPI_Offset at, float* part, int count) {
      MPI_Status status;
      check_mpi(MPI_File_read_at(file_, at, part, count, MPI_FLOAT, &status), path_);
      int read = 0;
      MPI_Get_count(&status, MPI_FLOAT, &read);
      if (read != count) throw std::runtime_error(path_ + ": it ends early");
    });
  }
  void write(std::uint64_t first, Tensor<float, 3>& from) {
    for_each_part(first, from, [&](MPI_Offset at, float* part, int count) {
      check_mpi(MPI_File_write_at(file_, at, part, count, MPI_FLOAT, MPI_STATUS_IGNORE), path_);
    });
  }

 private:
  // MPI counts in int.
  template <typename Visit>
  static void for_each_part(std::uint64_t first, Tensor<float, 3>& numbers, Visit&& visit) {
    constexpr Index most = Index{1} << 26;
    for (Index i = 0; i < numbers.size(); i += most)
      visit(static_cast<MPI_Offset>((first + static_cast<std::uint64_t>(i)) * sizeof(float)),
            numbers.data() + i, static_cast<int>((std::min)(most, numbers.size() - i)));
  }

  std::string path_;
  MPI_File file_ = MPI_FILE_NULL;
};

void make_rows(const Options& options, Index first, Tensor<float, 3>& x) {
  for (Index i = 0; i < x.dimension(1); ++i)
    for (Index c = 0; c < options.dim; ++c) x(0, i, c) = made_number(options.seed, first + i, c);
}

// Rank 0 computes the whole alone, and each rank compares its own rows.
// \return the largest difference on any
double difference_from_one(const Options& options, const mpi::Split& split,
                           const local_mha::Encoder<float>& encoder, const Tensor<float, 3>& x,
                           const Tensor<float, 3>& y) {
  const mpi::Communicator& communicator = split.communicator();
  const auto ranks = static_cast<std::size_t>(communicator.size());
  std::vector<int> counts(ranks), places(ranks);
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    const local_mha::Range rows = split.stretch(static_cast<int>(rank));
    counts[rank] = static_cast<int>((rows.end - rows.begin) * options.dim);
    places[rank] = static_cast<int>(rows.begin * options.dim);
  }
  const bool first = communicator.rank() == 0;
  const int own = static_cast<int>(x.size());
  Tensor<float, 3> whole(1, first ? split.total() : 0, options.dim);
  MPI_Gatherv(x.data(), own, MPI_FLOAT, whole.data(), counts.data(), places.data(), MPI_FLOAT, 0,
              communicator.get());
  if (first) whole = encoder.forward(whole);
  Tensor<float, 3> expected(1, split.rows(), options.dim);
  MPI_Scatterv(whole.data(), counts.data(), places.data(), MPI_FLOAT, expected.data(), own,
               MPI_FLOAT, 0, communicator.get());
  double most = 0;
  for (Index i = 0; i < y.size(); ++i) {
    const double apart = std::abs(double{y.data()[i]} - double{expected.data()[i]});
    // What is no number is as far as can be.
    most = apart <= most ? most : (apart > most ? apart : std::numeric_limits<double>::infinity());
  }
  MPI_Allreduce(MPI_IN_PLACE, &most, 1, MPI_DOUBLE, MPI_MAX, communicator.get());
  return most;
}

int run(const mpi::Communicator& communicator, const Options& options) {
  limit_memory(options.memory_mib);
  Index length = options.length;
  const auto row_bytes = static_cast<std::uint64_t>(options.dim) * sizeof(float);
  if (!options.input_path.empty()) {
    const std::uint64_t size = RawFile(communicator, options.input_path, MPI_MODE_RDONLY).size();
    if (size % row_bytes != 0)
      local_mha::reject("--input", "whole rows of float numbers", size, " bytes");
    length = static_cast<Index>(size / row_bytes);
  }
  if (options.check && length > (Index{1} << 30) / options.dim)
    local_mha::reject("--check", "a sequence of at most 2^30 numbers", length, " positions");
  const mpi::Split split = mpi::Split::even(communicator, length);
  const auto first_number = static_cast<std::uint64_t>(split.stretch().begin * options.dim);
  Tensor<float, 3> x(1, split.rows(), options.dim);
  if (options.input_path.empty())
    make_rows(options, split.stretch().begin, x);
  else
    RawFile(communicator, options.input_path, MPI_MODE_RDONLY).read(first_number, x);

  const local_mha::Encoder<float> encoder(options.encoder(), options.seed);
  const mpi::Encoder<float> split_encoder(communicator, encoder);
  Eigen::ThreadPool pool(options.threads);
  const Eigen::ThreadPoolDevice device(&pool, options.threads);
  Tensor<float, 3> y(x.dimensions());
  MPI_Barrier(communicator.get());
  communicator.reset_traffic();
  const double begin = MPI_Wtime();
  split_encoder.forward_into(y, x, split, {.device = device});
  const double own_seconds = MPI_Wtime() - begin;
  double seconds = own_seconds;
  MPI_Allreduce(MPI_IN_PLACE, &seconds, 1, MPI_DOUBLE, MPI_MAX, communicator.get());
  std::uint64_t bytes = communicator.traffic().keys_and_values;
  MPI_Allreduce(MPI_IN_PLACE, &bytes, 1, MPI_UINT64_T, MPI_SUM, communicator.get());
  double waiting = communicator.traffic().seconds_waiting / own_seconds;
  MPI_Allreduce(MPI_IN_PLACE, &waiting, 1, MPI_DOUBLE, MPI_SUM, communicator.get());

  if (!options.output_path.empty()) {
    RawFile file(communicator, options.output_path, MPI_MODE_CREATE | MPI_MODE_WRONLY);
    file.set_size(static_cast<std::uint64_t>(length) * row_bytes);
    file.write(first_number, y);
  }
  const bool tells = communicator.rank() == 0;
  if (tells)
    std::cout << length << " positions on " << communicator.size() << " ranks, "
              << static_cast<double>(length) / seconds << " a second\n"
              << bytes << " bytes exchanged, " << 100 * waiting / communicator.size()
              << " % of the time spent waiting\n";
  if (!options.check) return 0;
  const double difference = difference_from_one(options, split, encoder, x, y);
  if (tells) std::cout << "differs from one process by " << difference << " at most\n";
  return difference <= 1e-4 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  return examples::run_program("split_sequence", [&] {
    Options options;
    CLI::App app("Runs an encoder over a sequence of which each rank holds a stretch.");
    app.add_option("--input", options.input_path,
                   "Raw float numbers, [positions, dim]; otherwise a sequence is made");
    app.add_option("--output", options.output_path, "Where the results are written, as the input");
    app.add_option("--length", options.length, "Positions of a sequence that is made")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    const auto add_size = [&](const char* name, auto& size, const char* what) {
      app.add_option(name, size, what)->check(CLI::PositiveNumber)->capture_default_str();
    };
    add_size("--dim", options.dim, "Channels of the encoder");
    add_size("--heads", options.heads, "Heads of a layer");
    add_size("--dim-head", options.dim_head, "Channels of a head");
    add_size("--window-size", options.window, "Positions in a window");
    add_size("--depth", options.depth, "Layers");
    add_size("--threads", options.threads, "Threads of each rank");
    app.add_flag("--both-sides", options.both_sides, "Positions see ahead, too");
    app.add_option("--seed", options.seed, "Of the weights and the sequence")
        ->capture_default_str();
    app.add_flag("--check", options.check, "Compare with what rank 0 computes alone");
    app.add_option("--memory-limit", options.memory_mib, "MiB that a rank may take; 0: no limit");
    CLI11_PARSE(app, argc, argv);

    int provided = 0;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
    const int status = [&] {
      const mpi::Communicator communicator;
      return communicator.alone([&] { return run(communicator, options); });
    }();
    MPI_Finalize();
    return status;
  });
}
