// SPDX-License-Identifier: MIT
// What holds a sequence together, from the installed package. Alone, it is one rank.
#include <cstdio>

#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/split.hpp>

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  bool whole = false;
  {
    const local_mha::mpi::Communicator communicator;
    const auto split = local_mha::mpi::Split::even(communicator, 1000);
    whole = split.total() == 1000 && split.stretch(0).begin == 0;
  }
  MPI_Finalize();
  std::puts(whole ? "1000 positions" : "something else");
  return whole ? 0 : 1;
}
