// SPDX-License-Identifier: MIT
// Long sequences, long windows and far positions, on sampled rows of the naive reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace long_sequence_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::Tensor;
using reference::Array;
using reference::Int;
using support::tensor;

/// The largest error of some rows of the result, in units of the largest value.
template <typename Scalar>
double error_on_rows(const LocalAttentionConfig& config, const support::AttentionOptions& call,
                     const reference::AttentionInputs<double>& in, const std::vector<Int>& rows) {
  const auto q = tensor<Scalar, 4>(in.q);
  const auto k = tensor<Scalar, 4>(in.k);
  const auto v = tensor<Scalar, 4>(in.v);
  const auto bias = support::bias_tensor<Scalar>(in.bias);
  const auto y = LocalAttention<Scalar>(config).forward(
      q, k, v,
      support::attention_call<Scalar>(
          call, support::padding_mask(in.masked, in.q.shape[0], in.q.shape[2]),
          support::optional_view(bias)));

  const auto options = support::options(config, call);
  reference::Rotation<double> rotation(options, in.q.shape[3]);
  Array<double> got({static_cast<Int>(rows.size()), in.q.shape[3]}), expected = got;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const auto row = reference::attend_row(options, in, rotation, 0, 0, rows[r]);
    for (Int c = 0; c < in.q.shape[3]; ++c) {
      got(r, c) = static_cast<double>(y(0, 0, rows[r], c));
      expected(r, c) = row.out[static_cast<std::size_t>(c)];
    }
  }
  return support::largest_error(got, expected) / support::largest(in.v);
}

/// The last `count` rows of a result `[…, N, columns]` of one sequence and head, without the last
/// `behind` of them.
template <typename Scalar, int Rank>
Array<Scalar> rows_before(const Tensor<Scalar, Rank>& y, Int count, Int behind = 0) {
  const Int columns = y.dimension(Rank - 1);
  Array<Scalar> rows({count, columns});
  std::copy_n(y.data() + y.size() - (count + behind) * columns, count * columns, rows.data.begin());
  return rows;
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
  const auto cut = [&](const Array<double>& all) {
    Array<double> last({1, 1, tail, 16});
    std::copy(all.data.end() - tail * 16, all.data.end(), last.data.begin());
    return tensor<TypeParam, 4>(last);
  };
  const LocalAttention<TypeParam> attention(config);
  const auto whole = attention.forward(tensor<TypeParam, 4>(in.q), tensor<TypeParam, 4>(in.k),
                                       tensor<TypeParam, 4>(in.v));
  const auto alone =
      attention.forward(cut(in.q), cut(in.k), cut(in.v), {.first_position = n - tail});
  const Int count = tail - 40;  // rows that see nothing before the tail
  EXPECT_TRUE(
      support::close(rows_before(alone, count), rows_before(whole, count), 60 * this->epsilon));
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
  Array<double> part({1, length, 12});
  std::copy_n(x.data.begin() + from * 12, length * 12, part.data.begin());
  const auto whole = mha.forward(tensor<TypeParam, 3>(x));
  const auto alone = mha.forward(tensor<TypeParam, 3>(part));
  const Int count = length - 32, behind = n - (from + length);
  EXPECT_TRUE(support::close(rows_before(alone, count), rows_before(whole, count, behind),
                             60 * this->epsilon));
}

}  // namespace long_sequence_test
