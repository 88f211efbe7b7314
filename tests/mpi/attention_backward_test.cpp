// SPDX-License-Identifier: MIT
// LocalAttention over ranks, backward, against one process and differences of the reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include <local_mha/local_mha.hpp>
#include <local_mha/mpi.hpp>
#include <mpi/attentions.hpp>
#include <mpi/layers.hpp>
#include <mpi/splits.hpp>
#include <support/random_case.hpp>

namespace attention_backward_test {
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
using Call = LocalAttentionCall<double>;

constexpr double close = 1e-11;

// Of tensors that both have, or neither.
template <int Rank>
double difference_of(const std::optional<Tensor<double, Rank>>& a,
                     const std::optional<Tensor<double, Rank>>& b) {
  if (a.has_value() != b.has_value()) return 1e300;
  return a ? difference(*a, *b) : 0;
}

SplitAttention::Gradients of_ranks(const SplitAttention& attention, const Split& split,
                                   const Heads& grad, const Heads& q, const Heads& k,
                                   const Heads& v, const Call& call) {
  const Heads own_q = own_rows(q, split), own_k = own_rows(k, split), own_v = own_rows(v, split);
  const auto saved = attention.forward_saving(own_q, own_k, own_v, split, call);
  EXPECT_EQ(difference(saved.out, attention.forward(own_q, own_k, own_v, split, call)), 0);
  return attention.backward(saved, own_rows(grad, split), own_q, own_k, own_v, split, call);
}

void expect_that_of_one(const std::string& name, const Attention& attention, Index batch, Call call,
                        const Tensor<bool, 2>* masked) {
  const Communicator communicator;
  const SplitAttention split_attention(communicator, attention);
  const Index total = 150;
  const bool shared = attention.config().shared_qk;
  const Heads q = random_heads(batch, 4, total, 16, 1),
              k = shared ? q : random_heads(batch, 2, total, 16, 2),
              v = random_heads(batch, shared ? 4 : 2, total, 16, 3),
              grad = random_heads(batch, 4, total, 16, 4);
  if (masked != nullptr) call.mask = PaddingMask::masked(*masked);
  const auto expected =
      attention.backward(attention.forward_saving(q, k, v, call), grad, q, k, v, call);
  for (const Index rows : mpi_tests::splits(communicator, total)) {
    const Split split(communicator, rows);
    if (masked != nullptr) call.mask = own_mask(*masked, split);
    const auto got = of_ranks(split_attention, split, grad, q, k, v, call);
    EXPECT_LE(difference(got.q, own_rows(expected.q, split)), close) << name << ", " << rows;
    EXPECT_LE(difference(got.k, own_rows(expected.k, split)), close) << name << ", " << rows;
    EXPECT_LE(difference(got.v, own_rows(expected.v, split)), close) << name << ", " << rows;
    EXPECT_LE(difference_of(got.attn_bias, expected.attn_bias), 10 * close) << name << ", " << rows;
    EXPECT_LE(difference_of(got.relative_bias, expected.relative_bias), 10 * close)
        << name << ", " << rows;
    EXPECT_LE(difference_of(got.sinks, expected.sinks), 10 * close) << name << ", " << rows;
  }
}

TEST(SplitAttentionGradients, AreThoseOfOneProcess) {
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
    expect_that_of_one(name, attention, 2, {.first_position = 1000003}, nullptr);
    expect_that_of_one(name, attention, 2,
                       {.sinks = sinks, .training = local_mha::Training{.seed = 7}}, &masked);
    expect_that_of_one(name, attention, 3, {.lengths = lengths}, nullptr);
    expect_that_of_one(name, attention, 1, {.cu_seqlens = cu_seqlens}, nullptr);
    if (config.token_window) {
      expect_that_of_one(name, attention, 2, {.relative_bias = relative}, nullptr);
      continue;
    }
    const local_mha::Window window(config);
    const auto bias = mpi_tests::random_rows<double>(4, window.size(), window.look_around(), 8);
    expect_that_of_one(name, attention, 2, {.attn_bias = bias}, nullptr);
  }
}

// At some numbers of each input, by differences of the reference.
TEST(SplitAttentionGradients, AreDerivativesOfTheReference) {
  using In = reference::AttentionInputs<long double>;
  const Communicator communicator;
  for (std::uint64_t seed = 1; seed < 25; ++seed) {
    const support::AttentionCase c =
        seed % 3 == 0 ? support::narrow_attention_case(seed) : support::attention_case(seed);
    if (c.in.q.data.empty()) continue;
    const Heads q = support::tensor<double, 4>(c.in.q), k = support::tensor<double, 4>(c.in.k),
                v = support::tensor<double, 4>(c.in.v),
                grad = random_heads(c.batch(), q.dimension(1), c.seqlen(), q.dimension(3), seed);
    const auto bias = support::bias_tensor<double>(c.in.bias);
    const SplitAttention attention(communicator, Attention(c.config));
    const Split split(communicator, mpi_tests::splits(communicator, c.seqlen()).back());
    Call call{.attn_bias = support::optional_view(bias),
              .window_size = c.call.window_size,
              .first_position = c.call.first_position};
    if (!c.in.masked.empty()) {
      Tensor<bool, 2> masked(c.batch(), c.seqlen());
      for (Index i = 0; i < masked.size(); ++i)
        masked.data()[i] = c.in.masked[static_cast<std::size_t>(i)] != 0;
      call.mask = own_mask(masked, split);
    }
    const auto got = of_ranks(attention, split, grad, q, k, v, call);
    const auto loss = [&](const In& in) {
      const auto out = reference::attention(support::options(c.config, c.call), in).out;
      long double sum = 0;
      for (std::size_t i = 0; i < out.data.size(); ++i)
        sum += out.data[i] * static_cast<long double>(grad.data()[i]);
      return sum;
    };
    const auto expect = [&](const char* of, const Heads& gradient, auto In::* member) {
      auto in = support::cast<long double>(c.in);
      const std::vector<long double> before = (in.*member).data;
      long double largest = 0;
      for (const long double number : before) largest = std::max(largest, std::abs(number));
      const long double step = 1e-6L * (largest > 0 ? largest : 1);
      const Index n = gradient.dimension(2), channels = gradient.dimension(3);
      const auto size = static_cast<Index>(before.size());
      for (Index at = seed % 2; at < size; at += std::max<Index>(1, size / 7)) {
        const auto i = static_cast<std::size_t>(at);
        (in.*member).data[i] = before[i] + step;
        const long double ahead = loss(in);
        (in.*member).data[i] = before[i] - step;
        const long double behind = loss(in);
        (in.*member).data[i] = before[i];
        const Index row = at / channels % c.seqlen();
        double own = 0;
        if (split.stretch().contains(row))
          own = gradient.data()[(at / channels / c.seqlen() * n + row - split.stretch().begin) *
                                    channels +
                                at % channels];
        MPI_Allreduce(MPI_IN_PLACE, &own, 1, MPI_DOUBLE, MPI_SUM, communicator.get());
        const auto slope = static_cast<double>((ahead - behind) / (2 * step));
        const double size_of_loss = static_cast<double>(std::abs(ahead) / largest);
        EXPECT_NEAR(own, slope, 1e-5 * (std::abs(slope) + size_of_loss + 1e-3))
            << of << " of seed " << seed << " at " << at;
      }
    };
    // What is one is not changed apart.
    if (c.config.shared_qk) continue;
    expect("q", got.q, &In::q);
    expect("k", got.k, &In::k);
    expect("v", got.v, &In::v);
  }
}

TEST(SplitAttentionGradients, HaveTheSameBitsOnThreadsAndGoHomeInAsManyBytes) {
  const Communicator communicator;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  for (const auto& [name, config] : attentions()) {
    const SplitAttention attention(communicator, Attention(config));
    const Split split(communicator, mpi_tests::splits(communicator, 200).front());
    const Heads q = random_heads(1, 2, 200, 16, 1), own = own_rows(q, split);
    communicator.reset_traffic();
    const auto saved = attention.forward_saving(own, own, own, split);
    const auto once = attention.backward(saved, own, own, own, own, split);
    std::uint64_t bytes[2] = {communicator.traffic().keys_and_values,
                              communicator.traffic().gradients};
    MPI_Allreduce(MPI_IN_PLACE, bytes, 2, MPI_UINT64_T, MPI_SUM, communicator.get());
    EXPECT_EQ(bytes[0], bytes[1]) << name;
    const auto again = attention.backward(saved, own, own, own, own, split, {.device = device});
    EXPECT_EQ(difference(once.q, again.q), 0) << name;
    EXPECT_EQ(difference(once.k, again.k), 0) << name;
    EXPECT_EQ(difference(once.v, again.v), 0) << name;
  }
}

TEST(SplitAttentionGradients, TakeTheCallOfTheForwardPass) {
  const Communicator communicator;
  const SplitAttention attention(
      communicator, Attention({.window_size = 9, .dropout = 0.3, .dim = 16, .use_xpos = true}));
  const Split split(communicator, mpi_tests::splits(communicator, 100).back());
  const Heads q = own_rows(random_heads(2, 2, 100, 16, 1), split);
  const std::vector<Index> lengths{100, 31};
  const Call call{.window_size = 5, .training = local_mha::Training{.seed = 3}, .lengths = lengths};
  const auto saved = attention.forward_saving(q, q, q, split, call);
  const auto with = attention.backward(saved, q, q, q, q, split, call);
  const auto without = attention.backward(saved, q, q, q, q, split);
  EXPECT_EQ(difference(with.q, without.q), 0);
  EXPECT_EQ(difference(with.k, without.k), 0);
  EXPECT_EQ(difference(with.v, without.v), 0);
}

TEST(SplitAttentionGradients, RejectBadInputOnEveryRank) {
  const Communicator communicator;
  const bool is_last = communicator.rank() == communicator.size() - 1;
  const SplitAttention attention(communicator, Attention({.window_size = 4}));
  const Split split(communicator, 5), other(communicator, is_last ? 5 : 4);
  const Heads q = random_heads(1, 2, 5, 8, 1), wide = random_heads(1, 2, 5, 9, 1),
              changed = random_heads(1, 2, 5, 8, 2);
  const auto saved = attention.forward_saving(q, q, q, split);
  says("grad_out: expected shape",
       [&] { attention.backward(saved, is_last ? wide : q, q, q, q, split); });
  says("k: expected what forward_saving() was given",
       [&] { attention.backward(saved, q, q, is_last ? changed : q, q, split); });
  says("saved: expected",
       [&] { attention.backward(is_last ? SplitAttention::Saved() : saved, q, q, q, q, split); });
  const std::vector<Index> lengths{1};
  says("lengths: expected that of forward_saving()",
       [&] { attention.backward(saved, q, q, q, q, split, {.lengths = lengths}); });
  if (communicator.size() == 1) return;
  const auto of_another_call = attention.forward_saving(q, q, q, split);
  says("saved: expected the same on every rank",
       [&] { attention.backward(is_last ? of_another_call : saved, q, q, q, q, split); });
  says("saved: expected that of a call with this split", [&] {
    const Heads own = random_heads(1, 2, other.rows(), 8, 1);
    attention.backward(saved, own, own, own, own, other);
  });
}

}  // namespace
}  // namespace attention_backward_test
