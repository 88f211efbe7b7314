// SPDX-License-Identifier: MIT
/// \file
/// What a pass over many ranks takes, on paper: a rank's layer goes on when what it computes
/// without others is done, and what it borrows has come.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace measuring {

/// A forward pass over ranks. Times are in seconds.
struct Pass {
  int layers = 1;
  double lend = 0;          ///< of a layer, before what is lent goes out
  double inner = 0;         ///< what needs nothing of others
  double outer = 0;         ///< what needs what is borrowed, and what comes behind the attention
  double latency = 0;       ///< of a message
  double bytes = 0;         ///< of a message
  double bandwidth = 1;     ///< bytes a second that a rank receives
  bool both_sides = false;  ///< keys come from the right, too
  bool sums = false;        ///< all ranks meet at the end
};

struct Times {
  double seconds = 0;  ///< of the last rank
  double waiting = 0;  ///< share of the ranks' time, the mean
};

/// \param slower for each rank and layer, how much longer it computes: `slower(rank, layer)`
template <typename Slower>
Times simulate(const Pass& pass, int ranks, Slower&& slower) {
  const auto size = static_cast<std::size_t>(ranks);
  std::vector<double> at(size, 0), sent(size), waited(size, 0);
  for (int layer = 0; layer < pass.layers; ++layer) {
    for (std::size_t r = 0; r < size; ++r)
      sent[r] = at[r] + pass.lend * (1 + slower(static_cast<int>(r), layer));
    for (std::size_t r = 0; r < size; ++r) {
      const double factor = 1 + slower(static_cast<int>(r), layer);
      const double ready = sent[r] + pass.inner * factor;
      double come = ready;
      const double travel = pass.latency + pass.bytes / pass.bandwidth;
      if (r > 0) come = (std::max)(come, sent[r - 1] + travel);
      if (pass.both_sides && r + 1 < size) come = (std::max)(come, sent[r + 1] + travel);
      waited[r] += come - ready;
      at[r] = come + pass.outer * factor;
    }
  }
  Times times;
  times.seconds = *std::max_element(at.begin(), at.end());
  for (std::size_t r = 0; r < size; ++r) {
    const double total = pass.sums ? times.seconds : at[r];
    times.waiting += (waited[r] + total - at[r]) / (total * static_cast<double>(ranks));
  }
  return times;
}

}  // namespace measuring
