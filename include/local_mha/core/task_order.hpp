// SPDX-License-Identifier: MIT
/// \file
/// The order in which threads take tasks that need one another.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

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

}  // namespace local_mha::inline LOCAL_MHA_ABI
