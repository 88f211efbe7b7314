// SPDX-License-Identifier: MIT
/// \file
/// Tasks over the threads of a device such as Eigen::ThreadPoolDevice.
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>

#include <local_mha/core/index.hpp>
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

/// A device whatever its type is, so that what runs on it is compiled once. Must not outlive it.
class AnyDevice {
 public:
  /// The calling thread alone.
  AnyDevice() = default;

  template <ThreadDevice Device>
    requires(!std::same_as<Device, AnyDevice>)
  AnyDevice(const Device& device LOCAL_MHA_LIFETIME_BOUND)
      : threads_(thread_count(device)), device_(std::addressof(device)) {
    constexpr bool has_pool = requires { device.getPool()->Schedule([] {}); };
    if constexpr (has_pool)
      schedule_ = [](const void* pool, detail::SharedTasks* shared, std::uint32_t call) {
        // A function of two words is stored without an allocation.
        static_cast<const Device*>(pool)->getPool()->Schedule(
            [shared, call] { shared->join(call); });
      };
  }

  /// As Eigen's devices say it: how many threads there are.
  int numThreads() const { return static_cast<int>(threads_); }
  /// Whether there are threads beside the calling one.
  bool has_pool() const { return schedule_ != nullptr; }
  /// Lets another thread join a call.
  void schedule(detail::SharedTasks* shared, std::uint32_t call) const {
    schedule_(device_, shared, call);
  }

 private:
  Index threads_ = 1;
  const void* device_ = nullptr;
  void (*schedule_)(const void*, detail::SharedTasks*, std::uint32_t) = nullptr;
};

namespace detail {

/// See parallel_for().
inline void run_tasks(const AnyDevice& device, Index workers, Index tasks, SharedTasks::Run run,
                      void* task) {
  SharedTasks* const shared = workers > 1 && device.has_pool() ? SharedTasks::acquire() : nullptr;
  if (shared == nullptr) {
    for (Index i = 0; i < tasks; ++i) run(task, 0, i);
    return;
  }
  const std::unique_ptr<SharedTasks, void (*)(SharedTasks*)> given_back(shared,
                                                                        SharedTasks::release);
  const std::uint32_t call = shared->start(tasks, run, task);
  try {
    for (Index worker = 1; worker < workers; ++worker) device.schedule(shared, call);
  } catch (...) {
    // Without memory for more threads, fewer do the same.
  }
  shared->finish();
}

}  // namespace detail

/// Ranges of things that threads share: long ones while there is one for every thread, and what is
/// left in equal parts, so that all threads end at about the same time.
class EvenRanges {
 public:
  /// Divides `number` evenly.
  /// \param most of a range, a multiple of `step`
  /// \param step what a range is a multiple of, but for the last one
  EvenRanges(Index number, Index workers, Index most, Index step) : number_(number), most_(most) {
    workers = (std::max<Index>)(1, workers);
    whole_ = number / (workers * most) * workers;
    size_ = (std::max<Index>)(1, ceil_div(number - whole_ * most, workers * step)) * step;
  }

  /// How many ranges there are.
  Index count() const { return whole_ + ceil_div(number_ - whole_ * most_, size_); }
  /// The range of number `i`, below count().
  Range operator[](Index i) const {
    if (i < whole_) return {i * most_, (i + 1) * most_};
    const Index begin = whole_ * most_ + (i - whole_) * size_;
    return {begin, (std::min)(begin + size_, number_)};
  }

 private:
  Index number_;
  Index most_;
  Index whole_ = 0;  // ranges of `most`
  Index size_ = 1;   // of the others
};

/// Calls `task(worker, i)` once for each `0 <= i < tasks`, in any order; calls of the same worker
/// `0 <= worker < workers` do not overlap. The calling thread is worker 0 and waits for no other
/// thread to become free, so that it may be one of the device's own. An exception of a task is
/// thrown again once all tasks have ended. Throws none of its own: without memory for threads, the
/// calling one does all. Allocates nothing when repeated, unless the process has more calls at once
/// than ever before.
template <typename Task>
void parallel_for(const AnyDevice& device, Index workers, Index tasks, Task&& task) {
  using Call = std::remove_reference_t<Task>;
  detail::run_tasks(
      device, (std::min)(workers, tasks), tasks,
      [](void* f, Index worker, Index i) { (*static_cast<Call*>(f))(worker, i); },
      const_cast<std::remove_const_t<Call>*>(std::addressof(task)));
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
