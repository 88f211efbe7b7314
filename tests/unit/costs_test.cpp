// SPDX-License-Identifier: MIT
// What the page "What it costs" says, counted: the pairs of queries and keys, operations, packed
// weights, and what is kept for the backward pass.
#include <gtest/gtest.h>

#include <algorithm>

#include <local_mha/local_mha.hpp>

#include "support/counted.hpp"

namespace costs_test {

using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::Tensor;
using support::Counted;

/// As on the page: `a` positions back and `b` ahead.
double pairs(Index n, Index a, Index b) {
  const auto triangle = [n](Index reach) {
    const double r = static_cast<double>(std::min(reach, n - 1));
    return r * (r + 1) / 2;
  };
  const auto side = [&](Index reach) {
    return static_cast<double>(n) * static_cast<double>(std::min(reach, n - 1)) - triangle(reach);
  };
  return static_cast<double>(n) + side(a) + side(b);
}

/// As on the page, of one sequence.
double operations(const LocalMHAConfig& c, Index n, Index a, Index b) {
  const auto heads = static_cast<double>(c.heads), d = static_cast<double>(c.dim_head);
  const auto kv = static_cast<double>(c.kv_heads.value_or(c.heads));
  return 2 * static_cast<double>(n * c.dim) * (2 * heads + 2 * kv) * d +
         4 * d * heads * pairs(n, a, b);
}

TEST(Costs, PairsAreThoseThatTheWindowShows) {
  for (const Index n : {1, 2, 7, 64, 100})
    for (const Index w : {1, 3, 16, 200})
      for (const bool causal : {true, false}) {
        local_mha::LocalAttentionConfig config{.window_size = w, .causal = causal};
        config.exact_windowsize = true;
        const local_mha::Window window(config);
        Index seen = 0;
        for (Index i = 0; i < n; ++i) {
          const local_mha::Range keys = window.keys_visible(i, n);
          seen += keys.end - keys.begin;
        }
        EXPECT_EQ(pairs(n, w, causal ? 0 : w), static_cast<double>(seen)) << n << ' ' << w;
      }
}

Tensor<Counted, 3> numbers(Index n, Index dim) {
  Tensor<Counted, 3> x(1, n, dim);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = Counted(0.01 * static_cast<double>(i % 97));
  return x;
}

long counted_operations(const LocalMHAConfig& config, Index n) {
  const LocalMHA<Counted> mha(config, 1);
  const Tensor<Counted, 3> x = numbers(n, config.dim);
  const long before = Counted::operations;
  mha.forward(x);
  return Counted::operations - before;
}

// Tiles at both ends of a window, the softmax and the rotation come to what the formula counts: a
// tenth at 32 channels, a thirtieth at 128.
TEST(Costs, OperationsOfALayerAreThoseOfTheFormulaAndLittleMore) {
  const LocalMHAConfig narrow{.dim = 32, .window_size = 128, .dim_head = 16, .heads = 2};
  const LocalMHAConfig wide{.dim = 128, .window_size = 128, .dim_head = 32, .heads = 4};
  for (LocalMHAConfig config : {narrow, wide})
    for (const bool causal : {true, false})
      for (const Index n : {256, 512}) {
        config.causal = causal;
        const double said = operations(config, n, 128, causal ? 0 : 128);
        const auto counted = static_cast<double>(counted_operations(config, n));
        const double most = config.dim == 32 ? 1.1 : 1.04;
        EXPECT_GE(counted, said) << config.dim << ' ' << n << (causal ? " causal" : "");
        EXPECT_LE(counted, most * said) << config.dim << ' ' << n << (causal ? " causal" : "");
      }
}

// A layer's backward pass, which makes the probabilities again.
TEST(Costs, OperationsOfTheBackwardPassAreThoseOfTheFormulaAndLittleMore) {
  const LocalMHAConfig config{
      .dim = 128, .window_size = 128, .dim_head = 32, .heads = 4, .causal = true};
  const Index n = 512;
  const double projections = 2 * static_cast<double>(n * config.dim) * 4 * 4 * 32;
  const double said = 2 * projections + 2.5 * (operations(config, n, 128, 0) - projections);
  const LocalMHA<Counted> mha(config, 1);
  const Tensor<Counted, 3> x = numbers(n, config.dim);
  LocalMHA<Counted>::Saved saved;
  const Tensor<Counted, 3> y = mha.forward_saving(saved, x);
  auto gradients = LocalMHA<Counted>::Parameters::zeros(config);
  const long before = Counted::operations;
  mha.backward(gradients, saved, y, x);
  const auto counted = static_cast<double>(Counted::operations - before);
  EXPECT_GE(counted, said);
  EXPECT_LE(counted, 1.06 * said);
}

TEST(Costs, OperationsOfAFeedForwardAreThoseOfTheFormulaAndLittleMore) {
  const Index n = 64, dim = 96, inner = dim * 8 / 3;
  const local_mha::FeedForward<Counted> feed_forward({.dim = dim}, 1);
  const Tensor<Counted, 3> x = numbers(n, dim);
  const long before = Counted::operations;
  feed_forward.forward(x);
  const auto counted = static_cast<double>(Counted::operations - before);
  const auto said = static_cast<double>(6 * n * dim * inner);
  EXPECT_GE(counted, said);
  EXPECT_LE(counted, 1.06 * said);
}

// Twice the sequence, twice the work: there is no term in N².
TEST(Costs, OperationsGrowWithTheSequenceAndWithTheWindow) {
  LocalMHAConfig config{.dim = 16, .window_size = 16, .dim_head = 16, .heads = 1, .causal = true};
  const auto of = [&](Index n) { return static_cast<double>(counted_operations(config, n)); };
  const double a = of(512), b = of(1024), c = of(2048);
  EXPECT_NEAR((c - b) / (b - a), 2, 0.02);
}

/// Numbers of a packed weight, by where its first panel begins and its last one ends.
template <typename Weight>
Index numbers_of(const Weight& weight) {
  const Index groups = weight.rows() / weight.group_rows();
  return weight.panel(groups - 1, weight.group_panels() - 1) - weight.panel(0, 0) +
         weight.panel_size();
}

template <typename Scalar>
void expect_packed_weights() {
  using Weights = local_mha::detail::LayerWeights<Scalar>;
  const Index p = Weights::Weight::panel_rows, block = local_mha::block_rows<Scalar>;
  const auto up = [](Index n, Index to) { return local_mha::ceil_div(n, to) * to; };
  for (const Index dim : {32, 50, 512})
    for (const Index d : {16, 22, 64})
      for (const Index kv : {2, 6}) {
        LocalMHAConfig config{.dim = dim, .window_size = 8, .dim_head = d, .heads = 6};
        config.kv_heads = kv;
        const Weights weights(config, Weights::Parameters::zeros(config));
        const Index got = numbers_of(weights.to_qkv) + numbers_of(weights.to_out);
        const Index filled = local_mha::padded_channels<Scalar>(d);
        const Index said = (6 + 2 * kv) * up(d, p) * dim + 6 * filled * up(dim, p);
        const Index panels = (6 + 2 * kv) * up(d, p) / p + up(dim, p) / p;
        EXPECT_GE(got, said) << dim << ' ' << d << ' ' << kv;
        EXPECT_LT(got, said + panels * block) << dim << ' ' << d << ' ' << kv;
        if (dim % block == 0 && d % block == 0) {
          EXPECT_EQ(got, (2 * 6 + 2 * kv) * d * dim) << dim << ' ' << d << ' ' << kv;
        }
      }
}

TEST(Costs, PackedWeightsOfALayerAreTheFormulas) {
  expect_packed_weights<float>();
  expect_packed_weights<double>();
}

TEST(Costs, WhatIsKeptForTheBackwardPassIsTheFormulas) {
  LocalMHAConfig config{.dim = 24, .window_size = 8, .dim_head = 16, .heads = 4};
  for (const Index kv_heads : {4, 2}) {
    config.kv_heads = kv_heads;
    const LocalMHA<float> mha(config, 1);
    const Index n = 10 * local_mha::block_rows<float>;
    Tensor<float, 3> x(1, n, config.dim);
    x.setConstant(0.5F);
    LocalMHA<float>::Saved saved;
    mha.forward_saving(saved, x);
    const Index a_position = saved.q.channels() + saved.k.channels() + saved.v.channels() +
                             saved.out.channels() + saved.lse.channels();
    EXPECT_EQ(a_position, 2 * (config.heads + kv_heads) * 16 + 2 * config.heads) << kv_heads;
    // Block to block, without room between.
    EXPECT_EQ(saved.q[1] - saved.q[0], saved.q.channels() * local_mha::block_rows<float>);
  }
}

}  // namespace costs_test
