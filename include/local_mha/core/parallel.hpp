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
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha {

/// Something with threads: Eigen::ThreadPoolDevice (define EIGEN_USE_THREADS before including
/// Eigen), or Eigen::DefaultDevice, which is the calling thread alone.
template <typename T>
concept ThreadDevice = requires(const T& device) {
  { device.numThreads() } -> std::convertible_to<int>;
};

/// Threads of a device.
template <ThreadDevice Device>
Index thread_count(const Device& device) {
  return static_cast<Index>(device.numThreads());
}

/// Calls `task(worker, i)` once for each `0 <= i < tasks`, in any order; calls of the same worker
/// `0 <= worker < workers` do not overlap. The calling thread is worker 0 and waits for no other
/// thread to become free, so that it may be one of the device's own. An exception of a task is
/// thrown again once all tasks have ended.
template <ThreadDevice Device, typename Task>
void parallel_for(const Device& device, Index workers, Index tasks, Task&& task) {
  constexpr bool has_pool = requires { device.getPool()->Schedule([] {}); };
  if (!has_pool || workers <= 1 || tasks <= 1) {
    for (Index i = 0; i < tasks; ++i) task(Index{0}, i);
    return;
  }
  if constexpr (has_pool) {
    // Shared, because a worker that starts late finds no task when this function is long over.
    struct State {
      std::atomic<Index> next{0};
      std::atomic<Index> ended{0};
      std::exception_ptr error;
      std::mutex error_mutex;
    };
    const auto state = std::make_shared<State>();
    const auto work = [state, tasks, &task](Index worker) {
      for (Index i = state->next++; i < tasks; i = state->next++) {
        try {
          task(worker, i);
        } catch (...) {
          const std::lock_guard lock(state->error_mutex);
          state->error = std::current_exception();
        }
        if (++state->ended == tasks) state->ended.notify_all();
      }
    };
    for (Index worker = 1; worker < workers; ++worker)
      device.getPool()->Schedule([work, worker] { work(worker); });
    work(0);
    for (Index ended = state->ended; ended != tasks; ended = state->ended) state->ended.wait(ended);
    if (state->error) std::rethrow_exception(state->error);
  }
}

/// Steps that several threads take one after the other, each in two parts: it makes something that
/// later steps read, and then it answers, which needs what it and all steps before it have made.
/// What step `s` makes takes the room of what was made `slack` steps before, or earlier.
///
/// A step waits for earlier ones only, which threads have taken already, so that threads that are
/// not there hold nothing up.
class StepOrder {
 public:
  /// Not while threads take steps.
  void start(Index steps, Index slack) {
    steps_ = steps;
    slack_ = slack;
    taken_ = 0;
    abandoned_ = false;
    made_.start(2 * slack);
    answered_.start(2 * slack);
  }

  /// Takes a step and waits until there is room for what it makes. steps(): none is left.
  Index take() {
    std::unique_lock lock(mutex_);
    if (taken_ == steps_ || abandoned_) return steps_;
    const Index step = taken_++;
    changed_.wait(lock, [&] { return abandoned_ || answered_.all_before > step - slack_; });
    return step;
  }
  Index steps() const { return steps_; }

  /// Says that a step has made what it makes, and waits for all before it.
  void made(Index step) {
    std::unique_lock lock(mutex_);
    if (made_.add(step)) changed_.notify_all();
    changed_.wait(lock, [&] { return abandoned_ || made_.all_before > step; });
  }

  /// Says that a thread can not end its step: no other waits any longer, nor takes a step.
  void abandon() {
    const std::lock_guard lock(mutex_);
    abandoned_ = true;
    changed_.notify_all();
  }

  void answered(Index step) {
    const std::lock_guard lock(mutex_);
    if (answered_.add(step)) changed_.notify_all();
  }

 private:
  // Steps that are done, in any order, as far as they are close together.
  struct Done {
    void start(Index most_apart) {
      all_before = 0;
      done.assign(static_cast<std::size_t>(most_apart), 0);
    }
    // True if all_before grows.
    bool add(Index step) {
      const auto flag = [&](Index s) -> std::uint8_t& {
        return done[static_cast<std::size_t>(s) % done.size()];
      };
      flag(step) = 1;
      if (step != all_before) return false;
      for (; flag(all_before) != 0; ++all_before) flag(all_before) = 0;
      return true;
    }

    Index all_before = 0;
    std::vector<std::uint8_t> done;
  };

  std::mutex mutex_;
  std::condition_variable changed_;
  Index steps_ = 0;
  Index slack_ = 1;
  Index taken_ = 0;
  bool abandoned_ = false;
  Done made_;
  Done answered_;
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
      const Index each = std::clamp<Index>(total / (workers * 8 * std::max<Index>(1, reach)), 1, 4);
      count_ = std::min(blocks, ceil_div(workers * each, sequences));
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

}  // namespace local_mha
