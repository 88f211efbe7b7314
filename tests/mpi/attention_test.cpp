// SPDX-License-Identifier: MIT
// LocalAttention over ranks, forward, against one process and the reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include <local_mha/local_mha.hpp>
#include <local_mha/mpi.hpp>
#include <mpi/attentions.hpp>
#include <mpi/layers.hpp>
#include <mpi/splits.hpp>
#include <support/random_case.hpp>

namespace attention_test {
namespace {

using local_mha::Index;
using local_mha::LocalAttentionCall;
using local_mha::LocalAttentionConfig;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::mpi::Communicator;
using local_mha::mpi::Split;
using mpi_tests::attentions;
using mpi_tests::difference;
using mpi_tests::Heads;
using mpi_tests::own_mask;
using mpi_tests::own_rows;
using mpi_tests::random_heads;
using mpi_tests::says;

using Attention = local_mha::LocalAttention<double>;
using SplitAttention = local_mha::mpi::LocalAttention<double>;

void expect_that_of_one(const std::string& name, const Attention& attention, Index batch,
                        LocalAttentionCall<double> call, const Tensor<bool, 2>* masked) {
  const Communicator communicator;
  const SplitAttention split_attention(communicator, attention);
  const Index total = 150;
  const bool shared = attention.config().shared_qk;
  const Heads q = random_heads(batch, 4, total, 16, 1),
              k = shared ? q : random_heads(batch, 2, total, 16, 2),
              v = random_heads(batch, shared ? 4 : 2, total, 16, 3);
  if (masked != nullptr) call.mask = PaddingMask::masked(*masked);
  const Heads expected = attention.forward(q, k, v, call);
  const auto of_ranks = [&](const Split& split) {
    if (masked != nullptr) call.mask = own_mask(*masked, split);
    return split_attention.forward(own_rows(q, split), own_rows(k, split), own_rows(v, split),
                                   split, call);
  };
  for (const Index rows : mpi_tests::splits(communicator, total)) {
    const Split split(communicator, rows);
    EXPECT_LE(difference(of_ranks(split), own_rows(expected, split)), 1e-12)
        << name << ", " << rows;
  }
  if (!call.cu_seqlens.empty()) return;
  for (const Index multiple : {16, 48}) {
    const Split split = Split::even(communicator, total, multiple);
    EXPECT_EQ(difference(of_ranks(split), own_rows(expected, split)), 0)
        << name << ", " << multiple;
  }
}

TEST(SplitAttentions, AreThoseOfOneProcess) {
  const std::vector<Index> lengths{150, 0, 77}, cu_seqlens{0, 0, 13, 60, 61, 61, 149, 150};
  Tensor<bool, 2> masked(2, 150);
  for (Index i = 0; i < 300; ++i) masked.data()[i] = i < 20 || i % 7 == 3 || i > 290;
  Tensor<double, 1> sinks(4);
  sinks.setConstant(0.3);
  Tensor<double, 2> relative(4, 39);
  for (Index i = 0; i < relative.size(); ++i) relative.data()[i] = std::sin(static_cast<double>(i));
  for (const auto& [name, one] : attentions()) {
    LocalAttentionConfig config = one;
    config.dropout = 0.2;
    const Attention attention(config);
    expect_that_of_one(name, attention, 2, {}, nullptr);
    expect_that_of_one(name, attention, 2, {.first_position = 1000003}, nullptr);
    expect_that_of_one(name, attention, 2,
                       {.sinks = sinks, .training = local_mha::Training{.seed = 7}}, &masked);
    expect_that_of_one(name, attention, 3, {.lengths = lengths}, nullptr);
    expect_that_of_one(name, attention, 1, {.cu_seqlens = cu_seqlens}, nullptr);
    if (config.token_window)
      expect_that_of_one(name, attention, 2, {.relative_bias = relative}, nullptr);
  }
}

TEST(SplitAttentions, AreWhatTheReferenceSays) {
  const Communicator communicator;
  for (std::uint64_t seed = 1; seed < 60; ++seed) {
    const support::AttentionCase c =
        seed % 3 == 0 ? support::narrow_attention_case(seed) : support::attention_case(seed);
    const auto expected = support::tensor<double, 4>(
        reference::attention(support::options(c.config, c.call), c.in).out);
    const Heads q = support::tensor<double, 4>(c.in.q), k = support::tensor<double, 4>(c.in.k),
                v = support::tensor<double, 4>(c.in.v);
    const auto bias = support::bias_tensor<double>(c.in.bias);
    const SplitAttention attention(communicator, Attention(c.config));
    double largest = 0;
    for (Index i = 0; i < expected.size(); ++i)
      largest = std::max(largest, std::abs(expected.data()[i]));
    for (const Index rows : mpi_tests::splits(communicator, c.seqlen())) {
      const Split split(communicator, rows);
      LocalAttentionCall<double> call{.attn_bias = support::optional_view(bias),
                                      .window_size = c.call.window_size,
                                      .first_position = c.call.first_position};
      if (!c.in.masked.empty()) {
        Tensor<bool, 2> masked(c.batch(), c.seqlen());
        for (Index i = 0; i < masked.size(); ++i)
          masked.data()[i] = c.in.masked[static_cast<std::size_t>(i)] != 0;
        call.mask = own_mask(masked, split);
      }
      const Heads out = attention.forward(own_rows(q, split), own_rows(k, split),
                                          own_rows(v, split), split, call);
      EXPECT_LE(difference(out, own_rows(expected, split)), 1e-9 * largest)
          << "seed " << seed << ", " << rows;
    }
  }
}

TEST(SplitAttentions, HaveTheSameBitsOnThreads) {
  const Communicator communicator;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  for (const auto& [name, config] : attentions()) {
    const SplitAttention attention(communicator, Attention(config));
    const Split split(communicator, mpi_tests::splits(communicator, 600).back());
    const Heads q = own_rows(random_heads(1, 2, 600, 16, 1), split);
    EXPECT_EQ(difference(attention.forward(q, q, q, split, {.device = device}),
                         attention.forward(q, q, q, split)),
              0)
        << name;
  }
}

TEST(SplitAttentions, RejectBadInputOnEveryRank) {
  const Communicator communicator;
  const bool is_last = communicator.rank() == communicator.size() - 1;
  const SplitAttention attention(communicator, Attention({.window_size = 4}));
  const Split split(communicator, 5);
  const Heads q = random_heads(1, 2, 5, 8, 1), three = random_heads(1, 3, 5, 8, 1),
              wide = random_heads(1, 2, 5, 9, 1), more = random_heads(2, 2, 5, 8, 1),
              longer = random_heads(1, 2, 6, 8, 1);
  says("q: expected shape", [&] { attention.forward(is_last ? longer : q, q, q, split); });
  says("k: expected shape", [&] { attention.forward(q, is_last ? wide : q, q, split); });
  says("v: expected shape", [&] { attention.forward(q, q, is_last ? three : q, split); });
  says("k: expected a number of heads", [&] { attention.forward(q, three, three, split); });
  const Heads none(1, 2, 5, 0);
  says("q: expected at least 1 channel", [&] { attention.forward(none, none, none, split); });
  Tensor<bool, 2> flags(1, 5);
  flags.setConstant(false);
  says("global_rows: expected none over ranks",
       [&] { attention.forward(q, q, q, split, {.global_rows = flags}); });
  if (communicator.size() == 1) return;
  says("batch: expected the same on every rank", [&] {
    const Heads& x = is_last ? more : q;
    attention.forward(x, x, x, split);
  });
  says("dim_head: expected the same on every rank", [&] {
    const Heads& x = is_last ? wide : q;
    attention.forward(x, x, x, split);
  });
  says("first_position: expected the same on every rank",
       [&] { attention.forward(q, q, q, split, {.first_position = is_last ? 1 : 2}); });
  says("config: expected the same on every rank",
       [&] { SplitAttention(communicator, Attention({.window_size = is_last ? 4 : 5})); });
}

}  // namespace
}  // namespace attention_test
