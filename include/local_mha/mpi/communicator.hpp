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

#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
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

/// What all ranks throw, known as long as somebody holds it.
class AgreedError : public std::invalid_argument {
 public:
  AgreedError(const std::string& what, std::shared_ptr<const int> token)
      : std::invalid_argument(what), token_(std::move(token)) {}

 private:
  std::shared_ptr<const int> token_;
};

}  // namespace detail

/// What a rank has sent to others, in bytes, and how long it has waited for them.
struct Traffic {
  std::uint64_t keys_and_values = 0;  ///< of forward passes
  std::uint64_t gradients = 0;        ///< of these, in backward passes
  std::uint64_t masks = 0;            ///< a byte for each position that travels
  std::uint64_t sums = 0;             ///< of gradients of weights
  double seconds_waiting = 0;         ///< with nothing else to do
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
/// that all ranks throw is to be caught while this communicator lives, and every other one, and not
/// to be kept beyond its handler (as a std::exception_ptr is): until then, what one rank alone
/// throws is taken for it.
class Communicator {
 public:
  /// Collective over `parent`.
  /// \throws std::invalid_argument if MPI is not initialized, is finalized, or does not let this
  ///         thread call it
  /// \throws std::runtime_error if MPI fails
  explicit Communicator(MPI_Comm parent = MPI_COMM_WORLD)
      : exceptions_(std::uncaught_exceptions()) {
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
    if (std::uncaught_exceptions() > exceptions_ && !is_agreed())
      abort("an exception ends this rank's part");
    MPI_Comm_free(&comm_);
  }

  /// The duplicate, for the library's own messages.
  MPI_Comm get() const { return comm_; }
  /// This process's number, and how many there are.
  int rank() const { return rank_; }
  /// How many processes there are.
  int size() const { return size_; }

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

  /// Ends all ranks, with a message.
  [[noreturn]] void abort(const char* why) const {
    std::fprintf(stderr, "local_mha: rank %d of %d: %s; all ranks end\n", rank_, size_, why);
    std::fflush(stderr);
    MPI_Abort(comm_, 1);
    std::terminate();
  }

  /// Calls `task()`. What that throws, the other ranks do not know of: it ends them all, unless it
  /// is what all ranks throw.
  template <typename Task>
  decltype(auto) alone(Task&& task) const {
    clear_agreed_error();
    try {
      return std::forward<Task>(task)();
    } catch (const std::exception& error) {
      if (is_agreed()) throw;
      abort(error.what());
    } catch (...) {
      abort("an unknown exception");
    }
  }

  /// Calls `task()`, which throws on all ranks or on none, so that none of them waits. When such a
  /// std::invalid_argument has been dealt with, the next exception is one rank's own again.
  template <typename Task>
  decltype(auto) agreed(Task&& task) const {
    try {
      return std::forward<Task>(task)();
    } catch (const std::invalid_argument& error) {
      auto token = std::make_shared<const int>(0);
      agreed_error_ = token;
      throw detail::AgreedError(error.what(), std::move(token));
    } catch (...) {
      // Another type cannot say when it is dealt with: until the next agreement.
      other_agreed_error_ = true;
      throw;
    }
  }
  /// What is thrown from here on is one rank's alone.
  void clear_agreed_error() const {
    agreed_error_.reset();
    other_agreed_error_ = false;
  }

  /// How often all ranks have agreed: the same number on all of them.
  std::uint64_t agreements() const { return agreements_; }
  /// Counts one more.
  void note_agreement() const { ++agreements_; }

  /// What this rank has sent, and how long it has waited, since reset_traffic().
  Traffic& traffic() const { return traffic_; }
  /// Counts anew.
  void reset_traffic() const { traffic_ = {}; }

 private:
  bool is_agreed() const { return other_agreed_error_ || !agreed_error_.expired(); }

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
  mutable std::weak_ptr<const int> agreed_error_;
  mutable bool other_agreed_error_ = false;
  mutable std::uint64_t agreements_ = 0;
  mutable Traffic traffic_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi
