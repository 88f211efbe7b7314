// SPDX-License-Identifier: MIT
/// \file
/// What fresh memory holds, and how often it is asked for. A program that links memory.cpp gets NaN
/// from every allocation: no number in it comes from nowhere unnoticed.
#pragma once

#include <limits>

namespace soak {

/// Allocations of this thread so far.
long allocations();

/// The allocation after `count` more of this thread throws std::bad_alloc, and all that follow it
/// succeed.
void fail_after(long count);
/// No allocation fails. True if one had failed.
bool fail_no_more();

/// Allocations of a call on this thread.
template <typename Call>
long allocations_of(Call&& call) {
  const long before = allocations();
  call();
  return allocations() - before;
}

}  // namespace soak
