// SPDX-License-Identifier: MIT
// One sequence over the ranks of MPI. Run by `mpirun -n 4`, each rank holds a quarter.
#include <cstdio>

#include <local_mha/mpi.hpp>

int main(int argc, char** argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  bool same = true;
  {
    local_mha::mpi::Communicator communicator;
    const auto split = local_mha::mpi::Split::even(communicator, 4000);
    const local_mha::LocalMHA<float> layer({.dim = 64, .window_size = 48, .causal = true}, 1);
    const local_mha::mpi::LocalMHA<float> over_ranks(communicator, layer);

    // Every rank makes the whole here, to compare; a real one reads its own rows alone.
    local_mha::Tensor<float, 3> whole(1, split.total(), 64);
    local_mha::RandomSequence random(3);
    for (Eigen::Index i = 0; i < whole.size(); ++i)
      whole.data()[i] = static_cast<float>(random.normal());
    const auto own = split.stretch();
    const local_mha::TensorView<const float, 3> rows(whole.data() + own.begin * 64,
                                                     {1, split.rows(), 64});
    const auto y = over_ranks.forward(rows, split);

    const auto expected = layer.forward(whole);
    for (Eigen::Index i = 0; i < y.size(); ++i)
      same = same && y.data()[i] == expected.data()[own.begin * 64 + i];
    std::printf("rank %d: rows %lld to %lld, %s, %llu bytes sent\n", communicator.rank(),
                static_cast<long long>(own.begin), static_cast<long long>(own.end),
                same ? "the same bits" : "OTHER NUMBERS",
                static_cast<unsigned long long>(communicator.traffic().keys_and_values));
  }
  MPI_Finalize();
  return same ? 0 : 1;
}
