// SPDX-License-Identifier: MIT
// Programs that go wrong: see CMakeLists.txt for what each of them must say, and how soon.
#include <sys/resource.h>

#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include <local_mha/local_mha.hpp>
#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/mha.hpp>
#include <local_mha/mpi/split.hpp>

namespace {

using local_mha::mpi::Communicator;
using local_mha::mpi::Split;

// A device with threads that is only asked how many.
struct TwoThreads {
  int numThreads() const { return 2; }
};

// Rank 1 leaves, and the others wait for it.
void leave() {
  const Communicator communicator;
  if (communicator.rank() == 1) throw std::runtime_error("out of luck");
  const Split split(communicator, 1);
}

// The same in the middle of a call.
void leave_call() {
  const Communicator communicator;
  communicator.alone([&] {
    if (communicator.rank() == 2) throw std::runtime_error("out of luck");
  });
  const Split split(communicator, 1);
}

// An error that all ranks have agreed on and dealt with, and then one that a rank has alone.
void leave_after_agreed() {
  const Communicator communicator;
  try {
    const Split split(communicator, communicator.rank() == 0 ? -1 : 1);
  } catch (const std::invalid_argument&) {
  }
  if (communicator.rank() == 1) throw std::runtime_error("out of luck");
  const Split split(communicator, 1);
}

// Where the program takes it out of a call of the library, too: nobody waits for the next one.
void have_no_memory() {
  const Communicator communicator;
  const Split split(communicator, 1 << 20);
  const local_mha::mpi::LocalMHA<float> mha(
      communicator, local_mha::LocalMHA<float>({.dim = 8, .window_size = 4, .dim_head = 8}));
  local_mha::Tensor<float, 3> x(1, split.rows(), 8);
  x.setZero();
  if (communicator.rank() == 1) {
    const rlimit most{64 << 20, 64 << 20};
    setrlimit(RLIMIT_DATA, &most);
  }
  try {
    mha.forward(x, split);
  } catch (const std::bad_alloc&) {
  }
  const Split another(communicator, 1);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string fault = argc > 1 ? argv[1] : "";
  int provided = 0;
  int result = 0;
  try {
    if (fault != "not_initialized")
      MPI_Init_thread(&argc, &argv, fault == "single" ? MPI_THREAD_SINGLE : MPI_THREAD_FUNNELED,
                      &provided);
    if (fault == "finalized") MPI_Finalize();
    if (fault == "exception") leave();
    if (fault == "in_call") leave_call();
    if (fault == "after_agreed") leave_after_agreed();
    if (fault == "no_memory") have_no_memory();
    if (fault == "single") Communicator::require_running(TwoThreads());
    const Communicator communicator;
  } catch (const std::exception& error) {
    std::puts(error.what());
    result = 1;
  }
  if (fault != "not_initialized" && fault != "finalized") MPI_Finalize();
  return result;
}
