// SPDX-License-Identifier: MIT
/// \file
/// Memory next to pages that nobody may touch: what reads or writes beyond it ends the program,
/// whether or not the result shows it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <new>

namespace support {

/// Numbers that end where a forbidden page begins, or begin where one ends.
template <typename Scalar>
class Guarded {
 public:
  enum class At { End, Begin };

  Guarded(std::size_t size, At at) : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    const std::size_t bytes = size * sizeof(Scalar);
    room_ = (bytes + page_ - 1) / page_ * page_;
    memory_ = mmap(nullptr, room_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    allow(PROT_READ | PROT_WRITE);
    std::byte* const begin = static_cast<std::byte*>(memory_) + page_;
    data_ = reinterpret_cast<Scalar*>(at == At::Begin ? begin : begin + room_ - bytes);
  }
  /// A copy that cannot be written to.
  Guarded(const Scalar* from, std::size_t size, At at) : Guarded(size, at) {
    std::copy_n(from, size, data_);
    allow(PROT_READ);
  }
  ~Guarded() { munmap(memory_, room_ + 2 * page_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  Scalar* data() { return data_; }

 private:
  void allow(int access) {
    if (room_ > 0 && mprotect(static_cast<std::byte*>(memory_) + page_, room_, access) != 0)
      throw std::bad_alloc();
  }

  std::size_t page_;
  std::size_t room_ = 0;
  void* memory_ = nullptr;
  Scalar* data_ = nullptr;
};

}  // namespace support
