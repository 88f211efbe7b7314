// SPDX-License-Identifier: MIT
/// \file
/// A user to whom something can be forbidden.
#pragma once

#include <unistd.h>

#include <cstdlib>

namespace io_test {

/// As long as it lives, the process is not root, to whom nothing is forbidden.
class WithoutRoot {
 public:
  WithoutRoot() { is_root_ = ::geteuid() == 0 && ::seteuid(65534) == 0; }
  WithoutRoot(const WithoutRoot&) = delete;
  WithoutRoot& operator=(const WithoutRoot&) = delete;
  ~WithoutRoot() {
    if (is_root_ && ::seteuid(0) != 0) std::abort();
  }

 private:
  bool is_root_;
};

}  // namespace io_test
