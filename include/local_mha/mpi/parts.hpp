// SPDX-License-Identifier: MIT
/// \file
/// What a rank's queries see of the sequences of a batch, masks included.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/mpi/borrow_plan.hpp>
#include <local_mha/mpi/exchange.hpp>
#include <local_mha/mpi/split.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail {

/// Of a sequence whose rows are `rows` of its item of the batch, those that are here, counted in
/// it.
inline Range own_rows(const Split& split, const Range& rows) {
  const Range held = split.stretch();
  const Index begin = (std::max)(rows.begin, held.begin), end = (std::min)(rows.end, held.end);
  return begin < end ? Range{begin - rows.begin, end - rows.begin} : Range{};
}

/// A mask's flags of the rows that are here.
template <typename Inputs>
class OwnFlags {
 public:
  /// All must outlive this.
  OwnFlags(const Split& split, const Inputs& inputs, const PaddingMask& mask)
      : inputs_(inputs), mask_(mask), begin_(split.stretch().begin) {}

  /// 1: masked.
  std::uint8_t operator()(Index sequence, Index row) const {
    const Index in_stretch = inputs_.rows(sequence).begin + row - begin_;
    return mask_.row(inputs_.item(sequence))[in_stretch] != 0 ? 1 : 0;
  }

 private:
  const Inputs& inputs_;
  const PaddingMask& mask_;
  Index begin_;
};

/// What a mask leaves of each sequence of the whole: that its tile has a masked key decides over
/// the last bits of a query's result.
class Unmasked {
 public:
  /// Collective if there is a mask.
  /// \param mask of this rank's rows, `[B, rows]`; on every rank, or on none
  template <typename Inputs>
  Unmasked(const Split& split, const Inputs& inputs, const PaddingMask& mask) {
    for (Index s = 0; s < inputs.sequences(); ++s)
      keys_.push_back({0, inputs.rows(s).end - inputs.rows(s).begin});
    some_masked_.assign(keys_.size(), 0);
    if (mask) find(split, inputs, OwnFlags<Inputs>(split, inputs, mask));
  }

  /// From the first to the last key that is not masked.
  const Range& keys(Index sequence) const { return keys_[static_cast<std::size_t>(sequence)]; }
  /// Whether one of them is.
  bool some_masked(Index sequence) const {
    return some_masked_[static_cast<std::size_t>(sequence)] != 0;
  }

 private:
  template <typename Inputs>
  void find(const Split& split, const Inputs& inputs, const OwnFlags<Inputs>& own_flag) {
    constexpr auto none = (std::numeric_limits<std::int64_t>::max)();
    std::vector<std::int64_t> ends(2 * keys_.size(), none);
    for (Index s = 0; s < inputs.sequences(); ++s) {
      const auto i = static_cast<std::size_t>(s);
      const Range own = own_rows(split, inputs.rows(s));
      for (Index row = own.begin; row < own.end; ++row) {
        if (own_flag(s, row) != 0) continue;
        ends[2 * i] = (std::min)(ends[2 * i], static_cast<std::int64_t>(row));
        ends[2 * i + 1] = -static_cast<std::int64_t>(row) - 1;
      }
    }
    const auto reduce = [&, comm = split.communicator().get()](void* numbers, std::size_t size,
                                                               MPI_Datatype type, MPI_Op op) {
      const Waiting waiting(split.communicator());
      check(MPI_Allreduce(MPI_IN_PLACE, numbers, static_cast<int>(size), type, op, comm),
            "MPI_Allreduce");
    };
    reduce(ends.data(), ends.size(), MPI_INT64_T, MPI_MIN);
    for (Index s = 0; s < inputs.sequences(); ++s) {
      const auto i = static_cast<std::size_t>(s);
      Range& keys = keys_[i];
      // As one process has it, where all are masked.
      keys = ends[2 * i] == none
                 ? Range{keys.end, keys.end}
                 : Range{static_cast<Index>(ends[2 * i]), static_cast<Index>(-ends[2 * i + 1])};
      const Range own = own_rows(split, inputs.rows(s)).clipped_to(keys);
      for (Index row = own.begin; row < own.end && some_masked_[i] == 0; ++row)
        some_masked_[i] = own_flag(s, row);
    }
    reduce(some_masked_.data(), some_masked_.size(), MPI_UINT8_T, MPI_MAX);
  }

  std::vector<Range> keys_;
  std::vector<std::uint8_t> some_masked_;
};

/// SequenceParts of a call, and the flags that they point to.
class Parts {
  using SequencePart = local_mha::detail::SequencePart;
  using Flags = std::vector<std::uint8_t>;

 public:
  /// If there is a mask, its flags travel as the rows do.
  /// \param mask of this rank's rows, `[B, rows]`; on every rank, or on none
  template <typename Inputs>
  Parts(const Split& split, const BorrowPlan& plan, const Inputs& inputs, const PaddingMask& mask,
        const Unmasked& unmasked) {
    parts_.resize(static_cast<std::size_t>(inputs.sequences()));
    for (Index s = 0; s < inputs.sequences(); ++s) {
      at(s).unmasked = unmasked.keys(s);
      const Range own = own_rows(split, inputs.rows(s));
      if (own.begin >= own.end) continue;
      at(s).keys = inputs.window().keys_of(own, inputs.rows(s).end - inputs.rows(s).begin);
      at(s).keys.begin = (std::min)(at(s).keys.begin, own.begin);
      at(s).keys.end = (std::max)(at(s).keys.end, own.end);
    }
    if (mask) take_mask(split, plan, inputs, mask, unmasked);
  }
  // Parts point to flags.
  Parts(const Parts&) = delete;
  Parts& operator=(const Parts&) = delete;

  const std::vector<SequencePart>& all() const { return parts_; }

 private:
  SequencePart& at(Index sequence) { return parts_[static_cast<std::size_t>(sequence)]; }

  template <typename Inputs>
  void take_mask(const Split& split, const BorrowPlan& plan, const Inputs& inputs,
                 const PaddingMask& mask, const Unmasked& unmasked) {
    RowExchange<std::uint8_t> exchange(split.communicator(), plan, 1);
    const OwnFlags<Inputs> own_flag(split, inputs, mask);
    for (const Piece& piece : plan.lent())
      for (Index row = piece.rows.begin; row < piece.rows.end; ++row)
        *exchange.lent(piece.offset + row - piece.rows.begin) = own_flag(piece.sequence, row);
    exchange.start(split.communicator().traffic().masks);
    exchange.wait();

    const Index first_keys = inputs.window().first_keys();
    flags_.resize(parts_.size());
    first_flags_.resize(parts_.size());
    const auto put = [&](Index s, Index row, std::uint8_t flag) {
      const auto i = static_cast<std::size_t>(s);
      if (at(s).keys.contains(row))
        flags_[i][static_cast<std::size_t>(row - masked_begin(at(s)))] = flag;
      if (row < first_keys) first_flags_[i][static_cast<std::size_t>(row)] = flag;
    };
    for (Index s = 0; s < inputs.sequences(); ++s) {
      const auto i = static_cast<std::size_t>(s);
      const Range rows = inputs.rows(s);
      flags_[i].assign(static_cast<std::size_t>(at(s).keys.end - masked_begin(at(s))), 0);
      first_flags_[i].assign(
          static_cast<std::size_t>((std::min)(first_keys, rows.end - rows.begin)), 0);
      const Range own = own_rows(split, rows);
      for (Index row = own.begin; row < own.end; ++row) put(s, row, own_flag(s, row));
    }
    for (const Piece& piece : plan.borrowed())
      for (Index row = piece.rows.begin; row < piece.rows.end; ++row)
        put(piece.sequence, row, *exchange.borrowed(piece.offset + row - piece.rows.begin));
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      parts_[i].masked = unmasked.some_masked(static_cast<Index>(i)) ? flags_[i].data() : nullptr;
      parts_[i].masked_begin = masked_begin(parts_[i]);
      parts_[i].first_masked = first_flags_[i].empty() ? nullptr : first_flags_[i].data();
    }
  }

  // Kernels ask from the beginning of a block on, of which 64 is a multiple.
  static Index masked_begin(const SequencePart& part) { return part.keys.begin / 64 * 64; }

  std::vector<SequencePart> parts_;
  std::vector<Flags> flags_;        // of each part's keys
  std::vector<Flags> first_flags_;  // of its first keys
};

/// Which rows travel for a rank's queries, and what these see: the same for all layers of a window.
struct SeenRows {
  template <typename Inputs>
  SeenRows(const Split& split, const Inputs& inputs, const PaddingMask& mask,
           const Unmasked& unmasked)
      : plan(split, inputs), parts(split, plan, inputs, mask, unmasked) {}

  BorrowPlan plan;
  Parts parts;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail
