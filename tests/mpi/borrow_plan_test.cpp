// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <optional>
#include <set>
#include <vector>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/mpi/borrow_plan.hpp>
#include <local_mha/mpi/exchange.hpp>
#include <local_mha/mpi/parts.hpp>
#include <mpi/splits.hpp>

namespace borrow_plan_test {
namespace {

using local_mha::Index;
using local_mha::LocalAttentionConfig;
using local_mha::PaddingMask;
using local_mha::Range;
using local_mha::Window;
using local_mha::mpi::Communicator;
using local_mha::mpi::Split;
using local_mha::mpi::detail::BorrowPlan;
using local_mha::mpi::detail::Piece;
using local_mha::mpi::detail::RowExchange;
using Inputs = local_mha::detail::AttentionInputs<double>;

struct Case {
  LocalAttentionConfig config;
  Index total;
  std::vector<Index> cu_seqlens;
};

std::vector<Case> cases() {
  const auto exact = [](Index w, Index behind, bool causal, Index first_keys) {
    return LocalAttentionConfig{.window_size = w,
                                .causal = causal,
                                .look_backward = behind,
                                .exact_windowsize = true,
                                .first_keys = first_keys};
  };
  LocalAttentionConfig bucketed = exact(7, 1, false, 0);
  bucketed.exact_windowsize = false;
  LocalAttentionConfig tokens;
  tokens.token_window = {.left = 12, .right = 3};
  LocalAttentionConfig all;
  all.token_window = {.left = local_mha::TokenWindow::unbounded, .right = 0};
  return {{exact(5, 1, true, 0), 97, {}},
          {exact(5, 2, false, 0), 97, {}},
          {exact(40, 1, false, 0), 50, {}},
          {exact(4, 1, true, 11), 60, {}},
          {exact(4, 1, false, 11), 60, {}},
          {bucketed, 97, {}},
          {tokens, 97, {}},
          {all, 40, {}},
          {exact(5, 2, false, 3), 97, {0, 0, 13, 40, 41, 41, 90, 97}}};
}

// Every rank takes the part of each in turn.
TEST(ABorrowPlan, HasWhatTheQueriesSee) {
  const Communicator communicator;
  const PaddingMask none;
  for (const Case& one : cases())
    for (const auto& rows : mpi_tests::splits(communicator, one.total)) {
      const Split split(communicator, rows);
      Inputs inputs(Window(one.config), 1, 1, one.total, none, std::nullopt);
      inputs.cut(one.cu_seqlens);
      const BorrowPlan plan(split, inputs);
      std::set<std::pair<Index, Index>> borrowed;
      for (const Piece& piece : plan.borrowed())
        for (Index row = piece.rows.begin; row < piece.rows.end; ++row) {
          EXPECT_TRUE(borrowed.insert({piece.sequence, row}).second) << "twice";
          EXPECT_TRUE(split.stretch(piece.peer).contains(inputs.rows(piece.sequence).begin + row));
        }
      for (Index s = 0; s < inputs.sequences(); ++s) {
        const Range in_item = inputs.rows(s);
        for (Index i = in_item.begin; i < in_item.end; ++i) {
          if (!split.stretch().contains(i)) continue;
          for (Index j = in_item.begin; j < in_item.end; ++j)
            if (!split.stretch().contains(j) &&
                inputs.window().attends(i - in_item.begin, j - in_item.begin))
              EXPECT_TRUE(borrowed.contains({s, j - in_item.begin})) << i << " sees " << j;
        }
      }
    }
}

TEST(ARowExchange, BringsEveryRowFromItsPlaceAndBack) {
  const Communicator communicator;
  const PaddingMask none;
  for (const Case& one : cases())
    for (const auto& rows : mpi_tests::splits(communicator, one.total)) {
      const Split split(communicator, rows);
      Inputs inputs(Window(one.config), 1, 1, one.total, none, std::nullopt);
      inputs.cut(one.cu_seqlens);
      const BorrowPlan plan(split, inputs);
      RowExchange<double> exchange(communicator, plan, 2);
      const auto visit = [](const std::vector<Piece>& pieces, auto&& task) {
        for (const Piece& piece : pieces)
          for (Index row = piece.rows.begin; row < piece.rows.end; ++row)
            task(piece.offset + row - piece.rows.begin, static_cast<double>(piece.sequence),
                 static_cast<double>(row));
      };
      visit(plan.lent(), [&](Index at, double s, double row) {
        exchange.lent(at)[0] = s;
        exchange.lent(at)[1] = row;
      });
      std::uint64_t there = 0, back = 0;
      exchange.start(there);
      exchange.progress();
      exchange.wait();
      visit(plan.borrowed(), [&](Index at, double s, double row) {
        EXPECT_EQ(exchange.borrowed(at)[0], s);
        EXPECT_EQ(exchange.borrowed(at)[1], row);
        exchange.borrowed(at)[0] = row;
        exchange.borrowed(at)[1] = communicator.rank();
      });
      exchange.start_back(back);
      exchange.wait();
      for (const Piece& piece : plan.lent())
        for (Index row = piece.rows.begin; row < piece.rows.end; ++row) {
          const double* at = exchange.lent(piece.offset + row - piece.rows.begin);
          EXPECT_EQ(at[0], row);
          EXPECT_EQ(at[1], piece.peer);
        }
      std::uint64_t sent[2] = {there, back};
      MPI_Allreduce(MPI_IN_PLACE, sent, 2, MPI_UINT64_T, MPI_SUM, communicator.get());
      EXPECT_EQ(sent[0], sent[1]);
    }
}

TEST(Parts, HaveTheFlagsOfTheWholeMask) {
  const Communicator communicator;
  const Index batch = 2;
  for (const Case& one : cases()) {
    if (!one.cu_seqlens.empty()) continue;
    local_mha::Tensor<bool, 2> masked(batch, one.total);
    for (Index b = 0; b < batch; ++b)
      for (Index i = 0; i < one.total; ++i) masked(b, i) = i < 9 + b || (b > 0 && i % 5 == 0);
    const PaddingMask whole = PaddingMask::masked(masked);
    const Inputs expected(Window(one.config), batch, 1, one.total, whole, std::nullopt);
    for (const auto& rows : mpi_tests::splits(communicator, one.total)) {
      const Split split(communicator, rows);
      const PaddingMask none;
      Inputs inputs(Window(one.config), batch, 1, one.total, none, std::nullopt);
      const BorrowPlan plan(split, inputs);
      local_mha::Tensor<bool, 2> own(batch, rows);
      for (Index b = 0; b < batch; ++b)
        for (Index i = 0; i < rows; ++i) own(b, i) = masked(b, split.stretch().begin + i);
      const PaddingMask mask = PaddingMask::masked(own);
      const local_mha::mpi::detail::Parts parts(
          split, plan, inputs, mask, local_mha::mpi::detail::Unmasked(split, inputs, mask));
      if (rows == 0) continue;
      inputs.take_part(split.stretch(), parts.all());
      for (Index b = 0; b < batch; ++b) {
        const auto head = inputs.head(b, 0), of_whole = expected.head(b, 0);
        EXPECT_EQ(head.unmasked, of_whole.unmasked);
        EXPECT_EQ(head.masked == nullptr, of_whole.masked == nullptr);
        if (head.masked == nullptr) continue;
        for (Index i = split.stretch().begin; i < split.stretch().end; ++i) {
          const Range seen = inputs.window().keys(i).clipped_to({0, one.total});
          for (Index j = seen.begin; j < seen.end; ++j) EXPECT_EQ(head.is_masked(j), masked(b, j));
        }
      }
    }
  }
}

}  // namespace
}  // namespace borrow_plan_test
