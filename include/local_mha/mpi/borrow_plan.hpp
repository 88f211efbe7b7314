// SPDX-License-Identifier: MIT
/// \file
/// Whose keys and values a rank's queries see, and who sees its own.
#pragma once

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/mpi/split.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail {

/// Rows of a sequence that travel from one rank to another.
struct Piece {
  int peer;        ///< the other rank
  Index sequence;  ///< of the batch, or of the packed ones
  Range rows;      ///< counted in the sequence
  Index offset;    ///< of the first among all rows that travel in this direction
};

/// All rows that travel between this rank and another one, one after the other.
struct Message {
  int peer;
  Range rows;  ///< among all that travel in this direction
};

/// Which rows travel, the same seen from both ends: all ranks know all stretches.
class BorrowPlan {
 public:
  /// \param inputs the sequences of the whole
  template <typename Inputs>
  BorrowPlan(const Split& split, const Inputs& inputs) {
    const int me = split.communicator().rank();
    for (int rank = 0; rank < split.communicator().size(); ++rank)
      for_each_need(split, inputs, rank, [&](Index sequence, Range rows) {
        const Index begin = inputs.rows(sequence).begin;
        const auto [first, last] = split.holders({begin + rows.begin, begin + rows.end});
        for (int holder = first; holder < last; ++holder) {
          if (holder == rank || (rank != me && holder != me)) continue;
          const Range held = split.stretch(holder);
          const Range some =
              rows.clipped_to({(std::max)(held.begin - begin, Index{0}), held.end - begin});
          if (some.begin >= some.end) continue;
          (rank == me ? borrowed_ : lent_)
              .push_back({rank == me ? holder : rank, sequence, some, 0});
        }
      });
    arrange(borrowed_, from_);
    arrange(lent_, to_);
  }

  /// Rows of others that this rank's queries see, and own rows that those of others see, in the
  /// order of the ranks, and then of the rows.
  const std::vector<Piece>& borrowed() const { return borrowed_; }
  const std::vector<Piece>& lent() const { return lent_; }
  /// The same by ranks.
  const std::vector<Message>& from() const { return from_; }
  const std::vector<Message>& to() const { return to_; }

  static Index rows_of(const std::vector<Message>& messages) {
    return messages.empty() ? 0 : messages.back().rows.end;
  }

  /// In the order of the sequences.
  static std::vector<Piece> by_sequence(std::vector<Piece> pieces) {
    std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
      return std::pair(a.sequence, a.rows.begin) < std::pair(b.sequence, b.rows.begin);
    });
    return pieces;
  }

  /// Rows of others that a rank's queries of a sequence see.
  /// \param own rows of the sequence whose queries they are, not empty
  /// \param visit `visit(rows)`, in order
  template <typename Visit>
  static void for_each_range(const Window& window, const Range& own, Index length, Visit&& visit) {
    const Range seen = window.keys_of(own, length);
    // First keys that the window does not show; if it is causal, none of later rows.
    const Index last = (std::min)(window.first_keys(), length);
    const Index first_keys = window.reach_ahead() == 0 ? (std::min)(last, own.end) : last;
    const auto give = [&](Range rows) {
      if (rows.begin < rows.end) visit(rows);
    };
    const Index begin = (std::min)(seen.begin, own.begin);
    const Index end = (std::max)(seen.end, own.end);
    give({0, (std::min)(first_keys, begin)});
    give({begin, own.begin});
    give({own.end, end});
    give({(std::max)(end, Index{0}), first_keys});
  }

 private:
  template <typename Inputs, typename Visit>
  static void for_each_need(const Split& split, const Inputs& inputs, int rank, Visit&& visit) {
    const Range held = split.stretch(rank);
    if (held.begin == held.end) return;
    const bool packed = inputs.packed();
    Index s = 0;
    // Of packed sequences, the first that ends behind the stretch's begin.
    for (Index end = packed ? inputs.sequences() : 0; s < end;) {
      const Index middle = s + (end - s) / 2;
      if (inputs.rows(middle).end <= held.begin)
        s = middle + 1;
      else
        end = middle;
    }
    for (; s < inputs.sequences(); ++s) {
      const Range rows = inputs.rows(s);
      if (packed && rows.begin >= held.end) break;
      const Range own{(std::max)(rows.begin, held.begin), (std::min)(rows.end, held.end)};
      if (own.begin >= own.end) continue;
      for_each_range(inputs.window(), {own.begin - rows.begin, own.end - rows.begin},
                     rows.end - rows.begin, [&](const Range& some) { visit(s, some); });
    }
  }

  static void arrange(std::vector<Piece>& pieces, std::vector<Message>& messages) {
    // Both ends have the same order.
    std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
      return std::tuple(a.peer, a.sequence, a.rows.begin) <
             std::tuple(b.peer, b.sequence, b.rows.begin);
    });
    Index rows = 0;
    for (Piece& piece : pieces) {
      piece.offset = rows;
      rows += piece.rows.end - piece.rows.begin;
      if (messages.empty() || messages.back().peer != piece.peer)
        messages.push_back({piece.peer, {piece.offset, rows}});
      messages.back().rows.end = rows;
    }
  }

  std::vector<Piece> borrowed_;
  std::vector<Piece> lent_;
  std::vector<Message> from_;
  std::vector<Message> to_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi::detail
