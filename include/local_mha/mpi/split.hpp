// SPDX-License-Identifier: MIT
/// \file
/// Which rows of a sequence each rank holds.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/config/checks.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/communicator.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi {

/// A sequence of `total()` positions, of which each rank holds a stretch: rank 0 the first
/// positions, rank 1 the next ones, and so on. Stretches have any length, 0 included.
///
///     local_mha::mpi::Split split(communicator, rows_of_this_rank);
///     local_mha::mpi::Split even = local_mha::mpi::Split::even(communicator, total);
///
/// It outlives its communicator only to be destroyed.
class Split {
 public:
  /// Collective.
  /// \param rows that this rank holds, at least 0
  /// \param total of all ranks, if that is known: then the same on every rank, and their sum
  /// \throws std::invalid_argument, on every rank, if that is not so, or there are more than 2^60
  Split(const Communicator& communicator, Index rows, std::optional<Index> total = {})
      : communicator_(&communicator) {
    constexpr Index most = Index{1} << 60;
    detail::agree(communicator, "Split", [&](detail::Agreement& agreement) {
      agreement.check([&] {
        Communicator::require_running();
        if (rows < 0 || rows > most) reject("rows", "0 to 2^60", rows);
        if (total && (*total < 0 || *total > most)) reject("total", "0 to 2^60", *total);
      });
      agreement.same("total", total ? *total : Index{-1});
    });
    communicator.alone([&] {
      std::vector<std::int64_t> lengths(static_cast<std::size_t>(communicator.size()));
      const auto own = static_cast<std::int64_t>(rows);
      detail::check(
          MPI_Allgather(&own, 1, MPI_INT64_T, lengths.data(), 1, MPI_INT64_T, communicator.get()),
          "MPI_Allgather");
      begins_.reserve(lengths.size() + 1);
      begins_.assign(1, 0);
      // All ranks have the same numbers, and throw the same.
      communicator.agreed([&] {
        for (const std::int64_t length : lengths) {
          if (length > most - begins_.back()) reject("rows", "at most 2^60 in all", "more");
          begins_.push_back(begins_.back() + static_cast<Index>(length));
        }
        if (total && *total != begins_.back())
          reject("total", "the sum of all ranks' rows, " + std::to_string(begins_.back()), *total);
      });
      checksum_.add(std::span<const Index>(begins_));
    });
  }

  /// Stretches of about the same length, each but the last a multiple of `multiple` rows: of 512,
  /// they begin where tiles do, and a result has the bits that one process gives.
  /// \throws std::invalid_argument, on every rank, unless total >= 0 and multiple >= 1 are the same
  ///         on all of them
  static Split even(const Communicator& communicator, Index total, Index multiple = 512) {
    detail::agree(communicator, "Split::even", [&](detail::Agreement& agreement) {
      agreement.check([&] {
        local_mha::detail::require_at_least("total", total, 0);
        local_mha::detail::require_at_least("multiple", multiple, 1);
      });
      agreement.same("total", total);
      agreement.same("multiple", multiple);
    });
    const Index pieces = total / multiple, size = communicator.size();
    const auto begin = [&](Index rank) {
      return rank == size ? total
                          : (pieces / size * rank + (std::min)(pieces % size, rank)) * multiple;
    };
    const Index rank = communicator.rank();
    return Split(communicator, begin(rank + 1) - begin(rank), total);
  }

  /// The ranks.
  const Communicator& communicator() const { return *communicator_; }
  /// Positions of all ranks.
  Index total() const { return begins_.back(); }
  /// This rank's: how many, and where they lie in the whole.
  Index rows() const { return stretch().end - stretch().begin; }
  /// Where this rank's rows lie in the whole.
  Range stretch() const { return stretch(communicator_->rank()); }
  /// Those of a rank.
  /// \throws std::invalid_argument if there is no such rank
  Range stretch(int rank) const {
    if (rank < 0 || rank >= communicator_->size())
      reject("rank", "0 to " + std::to_string(communicator_->size() - 1), rank);
    const auto at = static_cast<std::size_t>(rank);
    return {begins_[at], begins_[at + 1]};
  }

  /// Those ranks that hold some of `rows`, the first and one past the last.
  /// \throws std::invalid_argument unless they are some of the sequence's
  std::pair<int, int> holders(const Range& rows) const {
    if (rows.begin < 0 || rows.begin >= rows.end || rows.end > total())
      reject("rows", "some of the " + std::to_string(total()), rows.begin, " to ", rows.end);
    const auto first = std::upper_bound(begins_.begin(), begins_.end(), rows.begin) - 1;
    const auto last = std::lower_bound(begins_.begin(), begins_.end(), rows.end);
    return {static_cast<int>(first - begins_.begin()), static_cast<int>(last - begins_.begin())};
  }

  /// The same for the same stretches.
  const detail::Checksum& checksum() const { return checksum_; }

 private:
  const Communicator* communicator_;
  std::vector<Index> begins_;  // of each rank, and the end
  detail::Checksum checksum_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi
