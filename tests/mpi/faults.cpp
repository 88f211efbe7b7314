// SPDX-License-Identifier: MIT
// Programs that go wrong: see CMakeLists.txt for what each of them must say, and how soon.
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/communicator.hpp>
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
    if (fault == "single") Communicator::require_running(TwoThreads());
    const Communicator communicator;
  } catch (const std::exception& error) {
    std::puts(error.what());
    result = 1;
  }
  if (fault != "not_initialized" && fault != "finalized") MPI_Finalize();
  return result;
}
