// SPDX-License-Identifier: MIT
// Programs that go wrong: see CMakeLists.txt for what each of them must say, and how soon.
#include <sys/resource.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
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

// How many allocations of this rank there were, and which one fails.
struct Memory {
  int made = 0;
  int fails_at = -1;
};
Memory memory;
int first_that_fails = 0;

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

// What all ranks have thrown is kept, and then one has an error of its own.
void leave_with_kept() {
  const Communicator communicator;
  std::exception_ptr kept;
  try {
    const Split split(communicator, communicator.rank() == 0 ? -1 : 1);
  } catch (const std::invalid_argument&) {
    kept = std::current_exception();
  }
  if (communicator.rank() == 1) throw std::runtime_error("out of luck");
  const Split split(communicator, 1);
}

// An error that all ranks throw ends a communicator that it is not of.
void leave_others() {
  const Communicator others, communicator;
  others.alone([&] { const Split split(communicator, communicator.rank() == 0 ? -1 : 1); });
}

// Some ranks agree on an error, of which the others do not know.
void leave_some() {
  const Communicator all;
  MPI_Comm some = MPI_COMM_NULL;
  MPI_Comm_split(all.get(), all.rank() == 0 ? 0 : 1, all.rank(), &some);
  const Communicator communicator(some);
  MPI_Comm_free(&some);
  if (all.rank() > 0) const Split split(communicator, communicator.rank() == 0 ? -1 : 1);
  const Split split(all, 1);
}

// The same where the program takes it out of a call of the library.
void leave_some_in_call() {
  const Communicator all;
  MPI_Comm some = MPI_COMM_NULL;
  MPI_Comm_split(all.get(), all.rank() == 0 ? 0 : 1, all.rank(), &some);
  const Communicator communicator(some);
  MPI_Comm_free(&some);
  try {
    all.alone([&] {
      if (all.rank() > 0) const Split split(communicator, communicator.rank() == 0 ? -1 : 1);
    });
  } catch (const std::invalid_argument&) {
  }
  const Split split(all, 1);
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

// The first allocation fails on a rank, then the second, and so on, in all that is collective: the
// program takes the error, and goes on.
void have_no_memory_to_agree() {
  const Communicator communicator;
  const local_mha::LocalMHA<float> layer({.dim = 8, .window_size = 4, .dim_head = 8, .heads = 2});
  const auto go = [&] {
    const Split split(communicator, 40);
    const local_mha::mpi::LocalMHA<float> mha(communicator, layer);
    local_mha::Tensor<float, 3> x(1, split.rows(), 8);
    x.setZero();
    mha.forward(x, split);
  };
  memory.fails_at = -1;
  memory.made = 0;
  go();
  const int all = memory.made;
  std::printf("%d allocations\n", all);
  // One after the other, until one ends all.
  for (int i = first_that_fails; i < all; ++i) {
    memory.made = 0;
    memory.fails_at = communicator.rank() == 1 ? i : -1;
    try {
      go();
    } catch (const std::exception& error) {
      memory.fails_at = -1;
      std::printf("rank %d took: %s\n", communicator.rank(), error.what());
    }
    memory.fails_at = -1;
  }
}

}  // namespace

// NOLINTBEGIN(cppcoreguidelines-no-malloc)
void* operator new(std::size_t size) {
  if (memory.made++ == memory.fails_at) throw std::bad_alloc();
  if (void* const room = std::malloc(size)) return room;
  throw std::bad_alloc();
}
void operator delete(void* room) noexcept { std::free(room); }
void operator delete(void* room, std::size_t) noexcept { std::free(room); }
// NOLINTEND(cppcoreguidelines-no-malloc)

int main(int argc, char** argv) {
  const std::string fault = argc > 1 ? argv[1] : "";
  if (argc > 2) first_that_fails = std::atoi(argv[2]);
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
    if (fault == "kept") leave_with_kept();
    if (fault == "other") leave_others();
    if (fault == "some") leave_some();
    if (fault == "some_in_call") leave_some_in_call();
    if (fault == "no_memory") have_no_memory();
    if (fault == "no_memory_to_agree") have_no_memory_to_agree();
    if (fault == "single") Communicator::require_running(TwoThreads());
    const Communicator communicator;
  } catch (const std::exception& error) {
    std::puts(error.what());
    result = 1;
  }
  if (fault != "not_initialized" && fault != "finalized") MPI_Finalize();
  return result;
}
