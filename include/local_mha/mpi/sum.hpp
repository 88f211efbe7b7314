// SPDX-License-Identifier: MIT
/// \file
/// Sums over ranks whose bits depend on nothing but their number.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <local_mha/core/types.hpp>
#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/parameter_set.hpp>
#include <local_mha/training/parameter_list.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi {

namespace detail {

/// Makes numbers the sums of those of all ranks, added in the order of the ranks: MPI_Allreduce may
/// choose another order each time. Each rank adds up a part of them.
template <typename Scalar>
void sum_over_ranks(const Communicator& communicator, std::vector<Scalar>& numbers) {
  static_assert(std::is_trivially_copyable_v<Scalar>, "numbers travel as their bytes");
  const auto ranks = static_cast<std::size_t>(communicator.size());
  if (ranks == 1) return;
  // Of each rank at a time: what MPI counts in int.
  constexpr std::size_t most = std::size_t{1} << 18;
  std::vector<Scalar> from, to;
  for (std::size_t begin = 0; begin < numbers.size();) {
    const std::size_t left = numbers.size() - begin;
    const std::size_t part = (std::min)(most, (left + ranks - 1) / ranks);
    const std::size_t size = (std::min)(left, part * ranks);
    from.assign(part * ranks, Scalar(0));
    to.assign(part * ranks, Scalar(0));
    std::copy_n(numbers.data() + begin, size, from.data());
    const auto bytes = static_cast<int>(part * sizeof(Scalar));
    {
      const Waiting waiting(communicator);
      check(MPI_Alltoall(from.data(), bytes, MPI_BYTE, to.data(), bytes, MPI_BYTE,
                         communicator.get()),
            "MPI_Alltoall");
    }
    for (std::size_t i = 0; i < part; ++i) {
      Scalar sum = to[i];
      for (std::size_t rank = 1; rank < ranks; ++rank) sum += to[rank * part + i];
      to[i] = sum;
    }
    {
      const Waiting waiting(communicator);
      check(MPI_Allgather(to.data(), bytes, MPI_BYTE, from.data(), bytes, MPI_BYTE,
                          communicator.get()),
            "MPI_Allgather");
    }
    std::copy_n(from.data(), size, numbers.data() + begin);
    communicator.traffic().sums += 2 * (ranks - 1) * part * sizeof(Scalar);
    begin += size;
  }
}

/// Adds the sums of all ranks' parameters to others.
/// \param own of this rank, in the same shapes
template <typename Scalar, typename Parameters>
void add_sums(const Communicator& communicator, const Parameters& own, Parameters& to) {
  std::vector<Scalar> numbers;
  for_each_parameter(own, [&](const std::string&, const auto& tensor) {
    numbers.insert(numbers.end(), tensor.data(), tensor.data() + tensor.size());
  });
  sum_over_ranks(communicator, numbers);
  const Scalar* from = numbers.data();
  for_each_parameter(to, [&](const std::string&, auto& tensor) {
    for (Index i = 0; i < tensor.size(); ++i) tensor.data()[i] += *from++;
  });
}

}  // namespace detail

/// Adds the sums of all ranks' parameters, or gradients, to others, on every rank, in the order of
/// the ranks: of groups of ranks that share a batch, for instance. Collective.
/// \param own of this rank
/// \param to in the same shapes
/// \throws std::invalid_argument, on every rank, if shapes differ
template <ParameterSet Parameters>
  requires local_mha::detail::OfOneScalar<Parameters>
void add_over_ranks(const Communicator& communicator, const Parameters& own, Parameters& to) {
  const auto shapes_of = [](const Parameters& parameters) {
    detail::Checksum shapes;
    for_each_parameter(parameters, [&](const std::string& name, const auto& tensor) {
      shapes.add(std::string_view(name));
      shapes.add(tensor.rows());
      shapes.add(tensor.cols());
    });
    return shapes;
  };
  detail::agree(communicator, "add_over_ranks", [&](detail::Agreement& agreement) {
    agreement.check([&] {
      if (shapes_of(own).value() != shapes_of(to).value())
        reject("to", "the shapes of own", "others");
    });
    agreement.same("own", shapes_of(own));
  });
  using Scalar = typename local_mha::detail::ScalarOfSet<Parameters>::type;
  communicator.alone([&] { detail::add_sums<Scalar>(communicator, own, to); });
}

/// The sum of a number of each rank, the same bits on all of them. Collective.
template <typename Scalar>
  requires std::is_floating_point_v<Scalar>
Scalar sum_over_ranks(const Communicator& communicator, Scalar number) {
  detail::agree(communicator, "sum_over_ranks", [](detail::Agreement&) {});
  return communicator.alone([&] {
    std::vector<Scalar> numbers{number};
    detail::sum_over_ranks(communicator, numbers);
    return numbers.front();
  });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi
