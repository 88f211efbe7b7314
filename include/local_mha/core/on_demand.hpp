// SPDX-License-Identifier: MIT
/// \file
/// A value that is made when somebody asks for it.
#pragma once

#include <atomic>
#include <mutex>

#include <local_mha/core/namespace.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// A value of an object that does not change: the first call of get() makes it, and then it stays
/// as long as this. Threads may ask at once.
template <typename Value>
class OnDemand {
 public:
  OnDemand() = default;
  OnDemand(const OnDemand&) = delete;
  OnDemand& operator=(const OnDemand&) = delete;
  ~OnDemand() { delete value_.load(std::memory_order_relaxed); }

  /// \param make `make()` makes the value; if it throws, there is none, as before
  template <typename Make>
  const Value& get(Make&& make) const {
    if (const Value* made = value_.load(std::memory_order_acquire)) return *made;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const Value* made = value_.load(std::memory_order_relaxed)) return *made;
    const Value* const made = new Value(make());
    value_.store(made, std::memory_order_release);
    return *made;
  }

 private:
  mutable std::atomic<const Value*> value_{nullptr};
  mutable std::mutex mutex_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
