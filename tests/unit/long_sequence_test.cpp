// SPDX-License-Identifier: MIT
// Long sequences, long windows and far positions, on sampled rows of the naive reference.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionCall;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::Tensor;
using reference::Int;
using support::tensor;

/// The largest error of some rows of the result, in units of the largest value.
template <typename Scalar>
double error_on_rows(const LocalAttentionConfig& config, const LocalAttentionCall& call,
                     const reference::AttentionInputs<double>& in, const std::vector<Int>& rows) {
  const auto q = tensor<Scalar, 4>(in.q);
  const auto k = tensor<Scalar, 4>(in.k);
  const auto v = tensor<Scalar, 4>(in.v);
  const auto bias = support::bias_tensor<Scalar>(in.bias);
  const auto y = LocalAttention<Scalar>(config).forward(
      q, k, v, support::padding_mask(in.masked, in.q.shape[0], in.q.shape[2]),
      support::optional_view(bias), call);

  const auto options = support::options(config, call);
  reference::Rotation<double> rotation(options, in.q.shape[3]);
  double error = 0;
  for (const Int i : rows) {
    const auto expected = reference::attend_row(options, in, rotation, 0, 0, i);
    for (Int c = 0; c < in.q.shape[3]; ++c) {
      const double difference =
          std::abs(static_cast<double>(y(0, 0, i, c)) - expected.out[static_cast<std::size_t>(c)]);
      if (!(difference <= error)) error = difference;
    }
  }
  return error / support::largest(in.v);
}

reference::AttentionInputs<double> random_inputs(std::uint64_t seed, Int n, Int d) {
  Random random(seed);
  reference::AttentionInputs<double> in;
  in.q = random.array({1, 1, n, d});
  in.k = random.array({1, 1, n, d});
  in.v = random.array({1, 1, n, d});
  return in;
}

std::vector<Int> sampled_rows(Int n, int count) {
  Random random(99);
  std::vector<Int> rows{0, 1, n / 2, n - 2, n - 1};
  while (static_cast<int>(rows.size()) < count) rows.push_back(random.integer(0, n - 1));
  return rows;
}

template <typename Scalar>
class LongSequence : public testing::Test {
 protected:
  static constexpr double epsilon = std::numeric_limits<Scalar>::epsilon();
};
TYPED_TEST_SUITE(LongSequence, support::Scalars, support::ScalarNames);

TYPED_TEST(LongSequence, IsRightOnSampledRows) {
  for (const Int n : {1'000, 30'011, 200'000}) {
    const auto in = random_inputs(static_cast<std::uint64_t>(n), n, 8);
    const auto rows = sampled_rows(n, 60);
    for (const bool causal : {false, true}) {
      LocalAttentionConfig config{.window_size = 16, .causal = causal, .dim = 8};
      config.exact_windowsize = causal;
      config.use_xpos = true;
      config.xpos_scale_base = 32;
      EXPECT_LE(error_on_rows<TypeParam>(config, {}, in, rows), 40 * this->epsilon)
          << "N " << n << ", causal " << causal;
    }
  }
}

TYPED_TEST(LongSequence, WithAMaskIsRightOnSampledRows) {
  const Int n = 50'000;
  auto in = random_inputs(2, n, 4);
  Random random(3);
  // Stretches of padding, longer and shorter than what a query sees.
  in.masked.assign(static_cast<std::size_t>(n), 0);
  for (Int i = 0; i < n;) {
    const bool masked = random.chance(0.5);
    for (Int end = std::min(n, i + random.pick<Int>({1, 5, 16, 40, 200})); i < end; ++i)
      in.masked[static_cast<std::size_t>(i)] = masked;
  }
  EXPECT_LE(error_on_rows<TypeParam>({.window_size = 16, .causal = true, .dim = 4}, {}, in,
                                     sampled_rows(n, 200)),
            40 * this->epsilon);
}

TYPED_TEST(LongSequence, WithLongWindowsIsRightOnSampledRows) {
  // What a query sees passes through the softmax in several parts.
  const Int n = 5'000;
  for (const Index w : {500, 1023, 1024, 1025, 2500})
    for (const bool causal : {false, true}) {
      auto in = random_inputs(static_cast<std::uint64_t>(w), n, 6);
      LocalAttentionConfig config{.window_size = w, .causal = causal, .dim = 6};
      config.exact_windowsize = w % 2 == 0;
      Random random(5);
      if (w == 1025) {
        in.masked.assign(static_cast<std::size_t>(n), 0);
        // Whole parts without a key: from 1000 to 2600, and of many others.
        for (Int i = 0; i < n; ++i)
          in.masked[static_cast<std::size_t>(i)] = (i > 1000 && i < 2600) || random.chance(0.4);
      }
      if (w == 500) in.bias = random.array({1, w, (causal ? 2 : 3) * w}, 3);
      if (w == 1024)  // growing scores: the maximum moves with every part
        for (Int i = 0; i < n; ++i)
          for (Int c = 0; c < 6; ++c) in.k(0, 0, i, c) *= 1 + static_cast<double>(i / 256) / 8;
      EXPECT_LE(error_on_rows<TypeParam>(config, {}, in, sampled_rows(n, 80)), 300 * this->epsilon)
          << "w " << w << ", causal " << causal;
    }
}

TYPED_TEST(LongSequence, AtPositionTenMillionIsAsAccurateAsAtPositionTen) {
  const auto in = random_inputs(6, 300, 64);
  const auto rows = sampled_rows(300, 300);
  for (const Index w : {5, 16, 128}) {
    for (const bool causal : {false, true}) {
      LocalAttentionConfig config{.window_size = w, .causal = causal, .dim = 64};
      config.use_xpos = true;
      config.xpos_scale_base = 64;
      config.exact_windowsize = causal;
      for (const Index far : {Index{10'000'000}, Index{10'000'019}, Index{1} << 40}) {
        // Near, with the same rows beginning the windows: what is seen, and how far, is the same.
        const Index start = 10 / w * w + far % w;
        const double near = error_on_rows<TypeParam>(config, {.first_position = start}, in, rows);
        EXPECT_LE(near, 60 * this->epsilon);
        EXPECT_LE(error_on_rows<TypeParam>(config, {.first_position = far}, in, rows),
                  1.1 * near + this->epsilon)
            << "position " << far << ", w " << w << ", causal " << causal;
      }
    }
  }
}

TYPED_TEST(LongSequence, GivesTheSameRowsWhereverTheSequenceStarts) {
  // A sequence of 100,000 rows, and its tail given alone with the tail's position.
  const Int n = 100'000, tail = 500;
  const auto in = random_inputs(8, n, 16);
  LocalAttentionConfig config{.window_size = 16, .causal = true, .dim = 16};
  config.use_xpos = true;
  const auto cut = [&](const reference::Array<double>& all) {
    reference::Array<double> last({1, 1, tail, 16});
    std::copy(all.data.end() - tail * 16, all.data.end(), last.data.begin());
    return tensor<TypeParam, 4>(last);
  };
  const LocalAttention<TypeParam> attention(config);
  const auto whole = attention.forward(tensor<TypeParam, 4>(in.q), tensor<TypeParam, 4>(in.k),
                                       tensor<TypeParam, 4>(in.v));
  const auto alone =
      attention.forward(cut(in.q), cut(in.k), cut(in.v), {}, {}, {.first_position = n - tail});
  double error = 0;
  for (Int i = 40; i < tail; ++i)  // rows that see nothing before the tail
    for (Int c = 0; c < 16; ++c)
      error = std::max(
          error, static_cast<double>(std::abs(alone(0, 0, i, c) - whole(0, 0, n - tail + i, c))));
  EXPECT_LE(error, 60 * this->epsilon);
}

TYPED_TEST(LongSequence, ThroughTheLayerEqualsItsStretches) {
  // Rows depend on their look-around alone, so that a stretch that starts whole windows later
  // gives the same, but for rounding.
  const Int n = 20'000, from = 16 * 1000, length = 400;
  LocalMHAConfig config{.dim = 12, .window_size = 16, .dim_head = 8, .heads = 2};
  config.causal = true;
  config.use_xpos = true;
  config.qk_rmsnorm = true;
  const LocalMHA<TypeParam> mha(config, 3);
  Random random(12);
  const auto x = random.array({1, n, 12});
  reference::Array<double> part({1, length, 12});
  std::copy_n(x.data.begin() + from * 12, length * 12, part.data.begin());
  const auto whole = mha.forward(tensor<TypeParam, 3>(x));
  const auto alone = mha.forward(tensor<TypeParam, 3>(part));
  double error = 0;
  for (Int i = 32; i < length; ++i)
    for (Int c = 0; c < 12; ++c)
      error =
          std::max(error, static_cast<double>(std::abs(alone(0, i, c) - whole(0, from + i, c))));
  EXPECT_LE(error, 60 * this->epsilon);
}

}  // namespace
