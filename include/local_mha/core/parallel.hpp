// SPDX-License-Identifier: MIT
/// \file
/// Tasks over the threads of a device such as Eigen::ThreadPoolDevice.
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Something with threads: Eigen::ThreadPoolDevice (define EIGEN_USE_THREADS before including
/// Eigen), or Eigen::DefaultDevice, which is the calling thread alone.
template <typename T>
concept ThreadDevice = requires(const T& device) {
  { device.numThreads() } -> std::convertible_to<int>;
};

/// Threads of a device, at least the one that calls.
template <ThreadDevice Device>
Index thread_count(const Device& device) {
  return (std::max<Index>)(1, static_cast<Index>(device.numThreads()));
}

namespace detail {

/// Tasks that threads share. It serves one call after another, and lives for ever: a worker that
/// starts when its call is over finds that it came too late.
class SharedTasks {
 public:
  using Run = void (*)(void* task, Index worker, Index i);

  /// One that no call uses; null where memory runs out. To be given back by release().
  static SharedTasks* acquire() {
    Unused& unused = all_unused();
    const std::lock_guard lock(unused.mutex);
    if (unused.first == nullptr) return new (std::nothrow) SharedTasks;
    return std::exchange(unused.first, unused.first->next_unused_);
  }
  static void release(SharedTasks* tasks) {
    Unused& unused = all_unused();
    const std::lock_guard lock(unused.mutex);
    tasks->next_unused_ = std::exchange(unused.first, tasks);
  }

  /// Starts a call. Its number is for join().
  std::uint32_t start(Index tasks, Run run, void* task) {
    run_ = run;
    task_ = task;
    tasks_ = tasks;
    next_ = 0;
    workers_ = 0;
    failed_ = false;
    return static_cast<std::uint32_t>(gate_ >> 32);
  }

  /// Takes tasks of a call, if it is not over, until there are no more.
  void join(std::uint32_t call) {
    std::uint64_t gate = gate_;
    do {
      if (gate >> 32 != call) return;
    } while (!gate_.compare_exchange_weak(gate, gate + 1));
    work(++workers_);
    if (static_cast<std::uint32_t>(--gate_) == 0) gate_.notify_all();
  }

  /// The same as worker 0, and ends the call when those who have joined it are done. An exception
  /// of a task is thrown again.
  void finish() {
    work(0);
    std::uint64_t gate = gate_ += std::uint64_t{1} << 32;
    for (; static_cast<std::uint32_t>(gate) != 0; gate = gate_) gate_.wait(gate);
    if (failed_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  struct Unused {
    std::mutex mutex;
    SharedTasks* first = nullptr;
  };
  static Unused& all_unused() {
    static Unused unused;
    return unused;
  }

  void work(Index worker) {
    for (Index i = next_++; i < tasks_; i = next_++) {
      try {
        run_(task_, worker, i);
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
    }
  }

  Run run_ = nullptr;
  void* task_ = nullptr;
  Index tasks_ = 0;
  std::atomic<Index> next_{0};
  std::atomic<Index> workers_{0};  // but for worker 0
  std::atomic<std::uint64_t> gate_{
      0};  // the call's number, and how many have joined it: 32 bits each
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  SharedTasks* next_unused_ = nullptr;
};

}  // namespace detail

/// Calls `task(worker, i)` once for each `0 <= i < tasks`, in any order; calls of the same worker
/// `0 <= worker < workers` do not overlap. The calling thread is worker 0 and waits for no other
/// thread to become free, so that it may be one of the device's own. An exception of a task is
/// thrown again once all tasks have ended. Throws none of its own: without memory for threads, the
/// calling one does all. Allocates nothing when repeated.
template <ThreadDevice Device, typename Task>
void parallel_for(const Device& device, Index workers, Index tasks, Task&& task) {
  workers = (std::min)(workers, tasks);
  constexpr bool has_pool = requires { device.getPool()->Schedule([] {}); };
  if constexpr (has_pool) {
    using Call = std::remove_reference_t<Task>;
    detail::SharedTasks* const shared = workers > 1 ? detail::SharedTasks::acquire() : nullptr;
    if (shared != nullptr) {
      const std::unique_ptr<detail::SharedTasks, void (*)(detail::SharedTasks*)> given_back(
          shared, detail::SharedTasks::release);
      const std::uint32_t call = shared->start(
          tasks, [](void* f, Index worker, Index i) { (*static_cast<Call*>(f))(worker, i); },
          const_cast<std::remove_const_t<Call>*>(std::addressof(task)));
      try {
        // A function of two words is stored without an allocation.
        for (Index worker = 1; worker < workers; ++worker)
          device.getPool()->Schedule([shared, call] { shared->join(call); });
      } catch (...) {
        // Without memory for more threads, fewer do the same.
      }
      return shared->finish();
    }
  }
  for (Index i = 0; i < tasks; ++i) task(Index{0}, i);
}

/// Hands out tasks of two kinds as they can be done: makes `0, 1, …`, and answers `0, 1, …`, as
/// many, each of which needs all makes before a certain one. What make `i` makes takes the room of
/// make `i − room`, whose answer has ended. Answers come first, then makes, each in order, so that
/// a slow thread holds up the others only when the room is full.
class TaskOrder {
 public:
  enum class Kind : std::uint8_t { make, answer, none };
  struct Task {
    Kind kind = Kind::none;
    Index i = 0;
  };

  /// Not while threads take tasks.
  /// \param tasks of each kind
  void start(Index tasks, Index room) {
    tasks_ = tasks;
    room_ = room;
    abandoned_ = false;
    makes_.start(room);
    answers_.start(room);
  }

  /// Takes a task, and waits if there is none yet. Kind::none: all are taken.
  /// \param needs `needs(i)` makes come before answer `i`: from i + 1 to i + room, and not fewer
  ///        than before answer i − 1
  template <typename Needs>
  Task next(Needs&& needs) {
    std::unique_lock lock(mutex_);
    while (!abandoned_ && answers_.taken < tasks_) {
      if (needs(answers_.taken) <= makes_.ended) return {Kind::answer, answers_.taken++};
      if (makes_.taken < (std::min)(answers_.ended + room_, tasks_))
        return {Kind::make, makes_.taken++};
      changed_.wait(lock);
    }
    return {};
  }

  void end(const Task& task) {
    const std::lock_guard lock(mutex_);
    if ((task.kind == Kind::make ? makes_ : answers_).end(task.i)) changed_.notify_all();
  }

  /// A thread cannot end its task: no further one is handed out.
  void abandon() {
    const std::lock_guard lock(mutex_);
    abandoned_ = true;
    changed_.notify_all();
  }

 private:
  struct Progress {
    void start(Index most_apart) {
      taken = ended = 0;
      flags.assign(static_cast<std::size_t>(most_apart), 0);
    }
    std::uint8_t& flag(Index i) { return flags[static_cast<std::size_t>(i) % flags.size()]; }
    // True if `ended` grows.
    bool end(Index i) {
      flag(i) = 1;
      if (i != ended) return false;
      for (; flag(ended) != 0; ++ended) flag(ended) = 0;
      return true;
    }

    Index taken = 0;
    Index ended = 0;                  // this one has not, all before it have
    std::vector<std::uint8_t> flags;  // of those that have ended before `ended`
  };

  std::mutex mutex_;
  std::condition_variable changed_;
  Index tasks_ = 0;
  Index room_ = 0;
  bool abandoned_ = false;
  Progress makes_;
  Progress answers_;
};

/// How sequences are cut into runs of blocks of queries, which threads take one after the other.
///
/// A run makes the keys of its look-around anew. Results do not depend on the cut, because every
/// block of queries is computed alone.
class Runs {
 public:
  /// \param blocks of queries of a sequence
  /// \param reach blocks of keys that a run makes in addition to its own
  Runs(Index sequences, Index blocks, Index reach, Index workers) : blocks_(blocks) {
    if (sequences == 0 || blocks == 0) return;
    if (workers > 1) {
      // More runs than workers even out the load, as long as the look-around costs little.
      const Index total = sequences * blocks;
      const Index each =
          std::clamp<Index>(total / (workers * 8 * (std::max<Index>)(1, reach)), 1, 4);
      count_ = (std::min)(blocks, ceil_div(workers * each, sequences));
    }
    tasks_ = sequences * count_;
  }

  Index tasks() const { return tasks_; }
  Index sequence(Index task) const { return task / count_; }
  /// Blocks `[begin, end)` of the sequence
  Index begin(Index task) const { return task % count_ * blocks_ / count_; }
  Index end(Index task) const { return (task % count_ + 1) * blocks_ / count_; }

 private:
  Index blocks_;
  Index count_ = 1;
  Index tasks_ = 0;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
