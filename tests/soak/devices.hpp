// SPDX-License-Identifier: MIT
/// \file
/// Threads of a case.
#pragma once

#include <array>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include <unsupported/Eigen/CXX11/Tensor>

#include "support/random.hpp"

namespace soak {

inline constexpr int most_threads = 3;

/// Calls `call(device)`: with the default device for 0 threads, else with a pool of so many.
template <typename Call>
void on_threads(int threads, Call&& call) {
  if (threads == 0) return call(Eigen::DefaultDevice());
  thread_local std::array<std::unique_ptr<Eigen::ThreadPool>, most_threads + 1> pools;
  auto& pool = pools[static_cast<std::size_t>(threads)];
  if (!pool) pool = std::make_unique<Eigen::ThreadPool>(threads);
  call(Eigen::ThreadPoolDevice(pool.get(), threads));
}

inline int draw_threads(Random& random) {
  return static_cast<int>(random.chance(0.4) ? 0 : random.integer(1, most_threads));
}

/// Calls `call(i)` for `i` below `count`, all at once.
template <typename Call>
void all_at_once(int count, Call&& call) {
  std::vector<std::exception_ptr> thrown(static_cast<std::size_t>(count));
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i)
    threads.emplace_back([&, i] {
      try {
        call(i);
      } catch (...) {
        thrown[static_cast<std::size_t>(i)] = std::current_exception();
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& exception : thrown)
    if (exception) std::rethrow_exception(exception);
}

}  // namespace soak
