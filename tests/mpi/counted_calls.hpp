// SPDX-License-Identifier: MIT
// How often this rank has met the others.
#pragma once

namespace mpi_tests {

/// Calls of MPI_Allreduce so far.
int allreduces();

}  // namespace mpi_tests
