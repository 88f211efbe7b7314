// SPDX-License-Identifier: MIT
// How the tests cut sequences.
#pragma once

#include <algorithm>
#include <vector>

#include <local_mha/mpi/communicator.hpp>

namespace mpi_tests {

using local_mha::Index;
using local_mha::mpi::Communicator;

// For this rank, its rows in several splits of a sequence: even ones, most of it on one rank, most
// ranks with a row or none, all on the last one, and odd ones.
inline std::vector<Index> splits(const Communicator& communicator, Index total) {
  const Index size = communicator.size(), rank = communicator.rank();
  const auto last = [&](Index others) {
    return rank + 1 < size ? (std::min)(others, total / size)
                           : total - (std::min)(others, total / size) * (size - 1);
  };
  const auto weight = [](Index i) { return i * i % 7; };
  Index sum = 0, before = 0;
  for (Index i = 0; i < size; ++i) {
    before += i < rank ? weight(i) : 0;
    sum += weight(i);
  }
  const auto share = [&](Index part) {
    return sum > 0 ? total * part / sum : (part > 0 ? total : 0);
  };
  const Index weighted =
      sum > 0 ? share(before + weight(rank)) - share(before) : (rank == 0 ? total : 0);
  return {total / size + (rank < total % size ? 1 : 0),
          last(1),
          last(0),
          last(total),
          rank == 0 ? total : 0,
          weighted};
}

}  // namespace mpi_tests
