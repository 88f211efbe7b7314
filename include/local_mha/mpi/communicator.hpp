// SPDX-License-Identifier: MIT
/// \file
/// The processes that hold a sequence together.
#pragma once

// The C interface is all that is used.
#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1
#endif
#ifndef MPICH_SKIP_MPICXX
#define MPICH_SKIP_MPICXX 1
#endif
#include <mpi.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include <local_mha/core/error.hpp>
#include <local_mha/core/parallel.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi {

namespace detail {

/// \throws std::runtime_error naming the call of MPI that has failed, and why
inline void check(int result, const char* call) {
  if (result == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(result, text, &length);
  throw std::runtime_error(std::string(call) + ": " +
                           std::string(text, static_cast<std::size_t>(length)));
}

/// What all ranks of a communicator have thrown last, and which that was.
struct AgreedError {
  std::exception_ptr error;
  std::uint64_t communicator = 0;

  /// That of this thread.
  static AgreedError& last() {
    static thread_local AgreedError error;
    return error;
  }
};

}  // namespace detail

/// What a rank has sent to others, in bytes, and how long it has waited for them.
struct Traffic {
  std::uint64_t keys_and_values = 0;  ///< of forward passes
  std::uint64_t gradients = 0;        ///< of these, in backward passes
  std::uint64_t masks = 0;            ///< a byte for each position that travels
  std::uint64_t sums = 0;             ///< of gradients of weights
  double seconds_waiting = 0;         ///< with nothing else to do: for rows, agreements and sums
};

/// Processes that hold a sequence together, each a stretch of it: a duplicate of a communicator, so
/// that what the library sends meets nothing of the program's own messages.
///
///     MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
///     local_mha::mpi::Communicator communicator;  // of MPI_COMM_WORLD
///
/// What is made of it, and calls with it, are collective: every rank makes them, in the same order.
/// Where an exception that the other ranks do not know of ends its life, or leaves a collective
/// call of the library, all ranks end with a message: nobody waits for what does not come. An error
/// that all ranks throw may end it, and end what is beside it: these ranks meet before they go on,
/// and if one has not come after ten seconds, all end.
class Communicator {
 public:
  /// Collective over `parent`.
  /// \throws std::invalid_argument if MPI is not initialized, is finalized, or does not let this
  ///         thread call it
  /// \throws std::runtime_error if MPI fails
  explicit Communicator(MPI_Comm parent = MPI_COMM_WORLD)
      : exceptions_(std::uncaught_exceptions()), id_(next_id()) {
    require_running();
    if (parent == MPI_COMM_NULL) reject("parent", "a communicator", "MPI_COMM_NULL");
    detail::check(MPI_Comm_dup(parent, &comm_), "MPI_Comm_dup");
    detail::check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    detail::check(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
    detail::check(MPI_Comm_size(comm_, &size_), "MPI_Comm_size");
  }

  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  ~Communicator() {
    int finalized = 0;
    if (MPI_Finalized(&finalized) != MPI_SUCCESS || finalized != 0) return;
    // Which exception it is, nobody can say here: one that all ranks have thrown brings them all.
    if (std::uncaught_exceptions() > exceptions_ &&
        (detail::AgreedError::last().error == nullptr || !all_leave()))
      abort("an exception ends this rank's part");
    MPI_Comm_free(&comm_);
  }

  /// The duplicate, for the library's own messages.
  MPI_Comm get() const { return comm_; }
  /// This process's number, and how many there are.
  int rank() const { return rank_; }
  /// How many processes there are.
  int size() const { return size_; }

  /// Refuses to go on without MPI.
  /// \throws std::invalid_argument unless MPI runs, and lets the calling thread call it while the
  ///         threads of a device compute
  static void require_running(const AnyDevice& device = {}) {
    int initialized = 0, finalized = 0;
    MPI_Initialized(&initialized);
    if (initialized == 0) reject("MPI", "a call of MPI_Init_thread() before this", "none");
    MPI_Finalized(&finalized);
    if (finalized != 0) reject("MPI", "no call of MPI_Finalize() before this", "one");
    int level = MPI_THREAD_SINGLE, is_main = 0;
    detail::check(MPI_Query_thread(&level), "MPI_Query_thread");
    detail::check(MPI_Is_thread_main(&is_main), "MPI_Is_thread_main");
    if (is_main == 0 && level < MPI_THREAD_SERIALIZED)
      reject("MPI", "MPI_THREAD_SERIALIZED, because another thread initialized it",
             level_name(level));
    if (thread_count(device) > 1 && level < MPI_THREAD_FUNNELED)
      reject("MPI", "MPI_THREAD_FUNNELED, because the device has threads", level_name(level));
  }

  /// Ends all ranks, with a message, and with 2 as the exit status, which mpirun passes on.
  [[noreturn]] void abort(const char* why) const {
    std::fprintf(stderr, "local_mha: rank %d of %d: %s; all ranks end\n", rank_, size_, why);
    std::fflush(stderr);
    MPI_Abort(comm_, 2);
    std::terminate();
  }

  /// Calls `task()`. What that throws, the other ranks do not know of: it ends them all, unless it
  /// is what all ranks throw.
  template <typename Task>
  decltype(auto) alone(Task&& task) const {
    clear_agreed_error();
    try {
      return std::forward<Task>(task)();
    } catch (...) {
      end_unless_agreed();
      throw;
    }
  }
  /// Of the exception that is being handled: ends all ranks, unless all of them throw it.
  void end_unless_agreed() const {
    const detail::AgreedError& agreed = detail::AgreedError::last();
    const bool known = agreed.error != nullptr && agreed.error == std::current_exception();
    // Of another communicator, some of these ranks may not know of it.
    if (known && (agreed.communicator == id_ || all_leave())) return;
    try {
      throw;
    } catch (const std::exception& error) {
      abort(error.what());
    } catch (...) {
      abort("an unknown exception");
    }
  }

  /// Calls `task()`, which throws on all ranks or on none, so that none of them waits.
  template <typename Task>
  decltype(auto) agreed(Task&& task) const {
    try {
      return std::forward<Task>(task)();
    } catch (...) {
      detail::AgreedError::last() = {std::current_exception(), id_};
      throw;
    }
  }
  /// What is thrown from here on is one rank's alone.
  void clear_agreed_error() const { detail::AgreedError::last() = {}; }

  /// How often all ranks have agreed: the same number on all of them.
  std::uint64_t agreements() const { return agreements_; }
  /// Counts one more.
  void note_agreement() const { ++agreements_; }

  /// What this rank has sent, and how long it has waited, since reset_traffic().
  Traffic& traffic() const { return traffic_; }
  /// Counts anew.
  void reset_traffic() const { traffic_ = {}; }

 private:
  static std::uint64_t next_id() {
    static std::atomic<std::uint64_t> made = 0;
    return ++made;
  }

  // Whether all ranks come here, within ten seconds. Those who do not may be in any other call of
  // this communicator, so that these are messages of their own, to the first rank and back.
  bool all_leave() const {
    constexpr int tag = 2;
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    const auto send = [&](int rank) {
      MPI_Request request = MPI_REQUEST_NULL;
      if (MPI_Isend(nullptr, 0, MPI_BYTE, rank, tag, comm_, &request) == MPI_SUCCESS)
        MPI_Request_free(&request);
    };
    const auto comes = [&](int rank) {
      for (int is_there = 0; std::chrono::steady_clock::now() < until;) {
        MPI_Iprobe(rank, tag, comm_, &is_there, MPI_STATUS_IGNORE);
        if (is_there != 0)
          return MPI_Recv(nullptr, 0, MPI_BYTE, rank, tag, comm_, MPI_STATUS_IGNORE) == MPI_SUCCESS;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      return false;
    };
    if (rank_ > 0) {
      send(0);
      return comes(0);
    }
    for (int rank = 1; rank < size_; ++rank)
      if (!comes(rank)) return false;
    for (int rank = 1; rank < size_; ++rank) send(rank);
    return true;
  }

  static const char* level_name(int level) {
    switch (level) {
      case MPI_THREAD_SINGLE:
        return "MPI_THREAD_SINGLE";
      case MPI_THREAD_FUNNELED:
        return "MPI_THREAD_FUNNELED";
      case MPI_THREAD_SERIALIZED:
        return "MPI_THREAD_SERIALIZED";
      default:
        return "MPI_THREAD_MULTIPLE";
    }
  }

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  int exceptions_ = 0;
  std::uint64_t id_ = 0;
  mutable std::uint64_t agreements_ = 0;
  mutable Traffic traffic_;
};

namespace detail {

/// Counts the time of a scope as waiting.
class Waiting {
 public:
  explicit Waiting(const Communicator& communicator)
      : seconds_(communicator.traffic().seconds_waiting), begin_(MPI_Wtime()) {}
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;
  ~Waiting() { seconds_ += MPI_Wtime() - begin_; }

 private:
  double& seconds_;
  double begin_;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi
