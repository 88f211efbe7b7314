// SPDX-License-Identifier: MIT
/// \file
/// Fills with NaN what the library keeps from call to call: its buffers are all that is allocated
/// with an alignment. Include it in one file of a program.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

namespace support {

/// The aligned memory in use.
class AlignedMemory {
 public:
  static AlignedMemory& instance() {
    static AlignedMemory memory;
    return memory;
  }

  void* allocate(std::size_t size, std::size_t alignment) {
    void* memory = std::aligned_alloc(alignment, (size / alignment + 1) * alignment);
    if (memory == nullptr) throw std::bad_alloc();
    const std::lock_guard lock(mutex_);
    blocks_[memory] = {size, ++allocations_};
    return memory;
  }
  void release(void* memory) {
    const std::lock_guard lock(mutex_);
    blocks_.erase(memory);
    std::free(memory);
  }

  /// Allocations so far.
  long mark() {
    const std::lock_guard lock(mutex_);
    return allocations_;
  }
  /// Makes every number of what was allocated after mark() NaN. Returns how many bytes those are.
  std::size_t poison_since(long mark) {
    const std::lock_guard lock(mutex_);
    std::size_t bytes = 0;
    for (const auto& [memory, block] : blocks_) {
      if (block.number <= mark) continue;
      std::memset(memory, 0xFF, block.size);
      bytes += block.size;
    }
    return bytes;
  }

 private:
  struct Block {
    std::size_t size;
    long number;
  };

  std::mutex mutex_;
  std::map<void*, Block> blocks_;
  long allocations_ = 0;
};

}  // namespace support

void* operator new(std::size_t size, std::align_val_t alignment) {
  return support::AlignedMemory::instance().allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory, std::align_val_t) noexcept {
  support::AlignedMemory::instance().release(memory);
}
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  support::AlignedMemory::instance().release(memory);
}
