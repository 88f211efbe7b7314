// SPDX-License-Identifier: MIT
/// \file
/// Rows on their way between ranks, while these compute.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/mpi/borrow_plan.hpp>
#include <local_mha/mpi/communicator.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail {

/// The rows of a BorrowPlan, of `width` numbers each: from those who lend them to those who borrow
/// them, or what these have made of them back home.
template <typename Number>
class RowExchange {
  static_assert(std::is_trivially_copyable_v<Number>, "numbers travel as their bytes");

 public:
  /// \param plan must outlive this
  RowExchange(const Communicator& communicator, const BorrowPlan& plan, Index width)
      : communicator_(&communicator), plan_(&plan), width_(width) {
    resize_without_values(lent_, BorrowPlan::rows_of(plan.to()) * width);
    resize_without_values(borrowed_, BorrowPlan::rows_of(plan.from()) * width);
  }

  const BorrowPlan& plan() const { return *plan_; }
  Index width() const { return width_; }
  /// A row by its place among all that travel, see Piece::offset.
  Number* lent(Index row) { return lent_.data() + row * width_; }
  const Number* lent(Index row) const { return lent_.data() + row * width_; }
  Number* borrowed(Index row) { return borrowed_.data() + row * width_; }
  const Number* borrowed(Index row) const { return borrowed_.data() + row * width_; }

  /// What was borrowed, for what outlives this.
  BlockBuffer<Number> take_borrowed() { return std::move(borrowed_); }
  /// The same as numbers to compute with.
  template <typename Scalar>
  void copy_borrowed(BlockBuffer<Scalar>& to) const {
    resize_without_values(to, static_cast<Index>(borrowed_.size()));
    std::transform(borrowed_.begin(), borrowed_.end(), to.begin(),
                   local_mha::detail::from_stored<Scalar, Number>);
  }
  /// Nothing has become of what was borrowed yet.
  void clear_borrowed() { std::fill(borrowed_.begin(), borrowed_.end(), Number()); }

  /// Sends what is lent. Until wait(), nobody touches either.
  /// \param bytes what is sent is added to
  void start(std::uint64_t& bytes) { post(lent_, plan_->to(), borrowed_, plan_->from(), bytes); }
  /// Sends what has become of what was borrowed.
  void start_back(std::uint64_t& bytes) {
    post(borrowed_, plan_->from(), lent_, plan_->to(), bytes);
  }
  /// Many implementations of MPI move messages only when they are called.
  void progress() {
    if (requests_.empty()) return;
    int done = 0;
    check(MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done,
                      MPI_STATUSES_IGNORE),
          "MPI_Testall");
    if (done != 0) requests_.clear();
  }
  void wait() {
    if (requests_.empty()) return;
    const Waiting waiting(*communicator_);
    check(MPI_Waitall(static_cast<int>(requests_.size()), requests_.data(), MPI_STATUSES_IGNORE),
          "MPI_Waitall");
    requests_.clear();
  }

 private:
  static constexpr int tag = 1;

  void post(BlockBuffer<Number>& from, const std::vector<Message>& send, BlockBuffer<Number>& to,
            const std::vector<Message>& receive, std::uint64_t& bytes) {
    for (const Message& message : receive)
      for_each_part(to, message, [&](char* part, int size) {
        check(MPI_Irecv(part, size, MPI_BYTE, message.peer, tag, communicator_->get(), next()),
              "MPI_Irecv");
      });
    for (const Message& message : send)
      for_each_part(from, message, [&](const char* part, int size) {
        check(MPI_Isend(part, size, MPI_BYTE, message.peer, tag, communicator_->get(), next()),
              "MPI_Isend");
        bytes += static_cast<std::uint64_t>(size);
      });
  }

  // MPI counts in int.
  template <typename Visit>
  void for_each_part(BlockBuffer<Number>& numbers, const Message& message, Visit&& visit) {
    constexpr std::size_t most = std::size_t{1} << 30;
    auto* part = reinterpret_cast<char*>(numbers.data() + message.rows.begin * width_);
    auto left =
        static_cast<std::size_t>((message.rows.end - message.rows.begin) * width_) * sizeof(Number);
    while (left > 0) {
      const std::size_t size = (std::min)(left, most);
      visit(part, static_cast<int>(size));
      part += size;
      left -= size;
    }
  }

  MPI_Request* next() {
    requests_.push_back(MPI_REQUEST_NULL);
    return &requests_.back();
  }

  const Communicator* communicator_;
  const BorrowPlan* plan_;
  Index width_;
  BlockBuffer<Number> lent_;
  BlockBuffer<Number> borrowed_;
  std::vector<MPI_Request> requests_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail
