// SPDX-License-Identifier: MIT
// LocalAttention against the naive reference, over random configurations.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace attention_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::Tensor;
using reference::Array;
using support::array;
using support::attention_case;
using support::AttentionCase;
using support::Length;
using support::tensor;

template <typename Scalar>
Tensor<Scalar, 4> forward(const AttentionCase& c) {
  const auto q = tensor<Scalar, 4>(c.in.q);
  const auto k = tensor<Scalar, 4>(c.in.k);
  const auto v = tensor<Scalar, 4>(c.in.v);
  const auto bias = support::bias_tensor<Scalar>(c.in.bias);
  return LocalAttention<Scalar>(c.config).forward(
      q, k, v,
      support::attention_call<Scalar>(c.call,
                                      support::padding_mask(c.in.masked, c.batch(), c.seqlen()),
                                      support::optional_view(bias)));
}

template <typename Scalar>
class Attention : public testing::Test {};
TYPED_TEST_SUITE(Attention, support::Scalars, support::ScalarNames);

template <typename Scalar>
void expect_the_reference(AttentionCase (*make)(std::uint64_t), std::uint64_t cases) {
  int failures = 0;
  for (std::uint64_t seed = 1; seed <= random_cases(cases) && failures < 5; ++seed) {
    const AttentionCase c = make(seed);
    const auto options = support::options(c.config, c.call);
    const auto expected =
        reference::attention(options, support::cast<support::Precise<Scalar>>(c.in));
    const auto naive = reference::attention(options, support::cast<Scalar>(c.in));
    const auto result = support::close(
        array(forward<Scalar>(c)), expected.out,
        support::tolerance<Scalar>(
            support::largest_error(naive.out, expected.out), support::largest(c.in.v),
            static_cast<double>(expected.largest_magnitude) + support::largest(c.in.bias)));
    if (!result) ++failures;
    EXPECT_TRUE(result) << "seed " << seed << ", N " << c.seqlen() << ", first_position "
                        << c.call.first_position << ", " << support::describe(c.config);
  }
}

TYPED_TEST(Attention, EqualsTheReferenceForRandomConfigurations) {
  expect_the_reference<TypeParam>([](std::uint64_t seed) { return attention_case(seed); }, 3000);
}

TYPED_TEST(Attention, EqualsTheReferenceForRandomConfigurationsOfLongerSequences) {
  expect_the_reference<TypeParam>(
      [](std::uint64_t seed) { return attention_case(seed, Length::Long); }, 60);
}

TYPED_TEST(Attention, EqualsTheReferenceForSmallWindowsWithoutAnythingAdded) {
  expect_the_reference<TypeParam>(support::narrow_attention_case, 1000);
}

// The widest window of the narrow kernel, of 16 keys in double and 32 in float, fills its room.
TYPED_TEST(Attention, EqualsTheReferenceForTheWidestWindowsOfTheNarrowKernel) {
  expect_the_reference<TypeParam>(
      [](std::uint64_t seed) {
        AttentionCase c = support::narrow_attention_case(seed);
        c.config.causal = c.config.exact_windowsize = true;
        c.config.look_backward = 1;
        c.config.look_forward = 0;
        c.config.window_size = (seed % 2 == 0 ? 14 : 30) + static_cast<Index>(seed / 2 % 4);
        Random random(seed);
        for (auto* in : {&c.in.q, &c.in.k, &c.in.v}) *in = random.array({1, 1, 90, 64});
        c.in.masked.clear();
        return c;
      },
      80);
}

TYPED_TEST(Attention, ProbabilitiesEqualTheReferenceAndSumToOneOrAreAllZero) {
  int failures = 0;
  for (std::uint64_t seed = 1; seed <= 300 && failures < 5; ++seed) {
    const AttentionCase c = attention_case(seed);
    auto options = support::options(c.config, c.call);
    options.probabilities = true;
    const auto expected =
        reference::attention(options, support::cast<support::Precise<TypeParam>>(c.in));
    const auto naive = reference::attention(options, support::cast<TypeParam>(c.in));
    const auto q = tensor<TypeParam, 4>(c.in.q);
    const auto k = tensor<TypeParam, 4>(c.in.k);
    const auto bias = support::bias_tensor<TypeParam>(c.in.bias);
    const auto probabilities = LocalAttention<TypeParam>(c.config).attention_probabilities(
        q, k,
        support::attention_call<TypeParam>(
            c.call, support::padding_mask(c.in.masked, c.batch(), c.seqlen()),
            support::optional_view(bias)));
    const auto result = support::close(
        array(probabilities), expected.probabilities,
        support::tolerance<TypeParam>(
            support::largest_error(naive.probabilities, expected.probabilities), 1,
            static_cast<double>(expected.largest_magnitude) + support::largest(c.in.bias)));
    if (!result) ++failures;
    EXPECT_TRUE(result) << "seed " << seed << ", N " << c.seqlen() << ", "
                        << support::describe(c.config);

    const Index n = probabilities.dimension(3);
    for (Index row = 0; n > 0 && row < probabilities.size() / n; ++row) {
      double sum = 0;
      for (Index j = 0; j < n; ++j) sum += static_cast<double>(probabilities.data()[row * n + j]);
      const bool sees_a_key = std::isfinite(expected.lse.data[static_cast<std::size_t>(row)]);
      if (sees_a_key)
        EXPECT_NEAR(sum, 1, 60 * std::numeric_limits<TypeParam>::epsilon()) << "seed " << seed;
      else
        EXPECT_EQ(sum, 0) << "seed " << seed;
    }
  }
}

TYPED_TEST(Attention, RowsThatSeeNoKeyAreExactZeros) {
  // Sequence 0 is all padding; in sequence 1 only position 9 is attended.
  const LocalAttentionConfig config{.window_size = 4, .causal = true, .dim = 8};
  Random random(7);
  const auto q = tensor<TypeParam, 4>(random.array({2, 3, 14, 8}));
  std::vector<unsigned char> masked(2 * 14, 1);
  masked[14 + 9] = 0;
  const auto y = LocalAttention<TypeParam>(config).forward(
      q, q, q, {.mask = support::padding_mask(masked, 2, 14)});
  for (Index b = 0; b < 2; ++b)
    for (Index h = 0; h < 3; ++h)
      for (Index i = 0; i < 14; ++i)
        for (Index c = 0; c < 8; ++c) {
          // Position 9 is in window 2, which windows 2 and 3 see, from position 9 on.
          const TypeParam expected = b == 1 && i >= 9 ? q(1, h, 9, c) : TypeParam(0);
          EXPECT_EQ(y(b, h, i, c), expected) << b << ' ' << h << ' ' << i << ' ' << c;
        }
}

TYPED_TEST(Attention, OfAnEmptySequenceOrBatchIsEmpty) {
  for (const auto& shape : std::vector<std::vector<reference::Int>>{
           {2, 3, 0, 8}, {0, 3, 5, 8}, {2, 0, 5, 8}, {0, 0, 0, 8}}) {
    const auto q = tensor<TypeParam, 4>(Array<double>(shape));
    const LocalAttention<TypeParam> attention({.window_size = 4, .dim = 8});
    EXPECT_EQ(array(attention.forward(q, q, q)).shape, shape);
    EXPECT_EQ(array(attention.attention_probabilities(q, q)).shape,
              (std::vector<reference::Int>{shape[0], shape[1], shape[2], shape[2]}));
    const std::vector<Index> lengths(static_cast<std::size_t>(shape[0]), 0);
    EXPECT_EQ(array(attention.forward(
                        q, q, q, {.mask = local_mha::PaddingMask::from_lengths(lengths, shape[2])}))
                  .shape,
              shape);
  }
}

TYPED_TEST(Attention, TakesTensorMapsAndGivesTheSameBits) {
  const AttentionCase c = attention_case(12);
  auto q = tensor<TypeParam, 4>(c.in.q);
  const auto k = tensor<TypeParam, 4>(c.in.k);
  const auto v = tensor<TypeParam, 4>(c.in.v);
  const auto dims = q.dimensions();
  const Eigen::TensorMap<Tensor<TypeParam, 4>> q_map(q.data(), dims);
  const Eigen::TensorMap<const Tensor<TypeParam, 4>> k_map(k.data(), dims);
  const Eigen::TensorMap<const Tensor<TypeParam, 4>> v_map(v.data(), dims);
  const LocalAttention<TypeParam> attention(c.config);
  EXPECT_TRUE(
      support::same_bits(attention.forward(q, k, v), attention.forward(q_map, k_map, v_map)));
}

TYPED_TEST(Attention, ReadsNothingBeforeOrBehindItsInputs) {
  // The sequence lies between NaNs, so that a read outside of it shows in the result.
  const Index d = 6;
  for (const Index w : {1, 3, 8, 16, 40})
    for (const Index n : {1, 5, 16, 17, 35}) {
      Random random(static_cast<std::uint64_t>(100 * w + n));
      const auto inner = random.array({1, 1, n, d});
      const auto guard = static_cast<std::size_t>(64 * d);
      const auto size = static_cast<std::size_t>(n * d);
      std::vector<TypeParam> memory(size + 2 * guard, std::numeric_limits<TypeParam>::quiet_NaN());
      for (std::size_t i = 0; i < size; ++i)
        memory[guard + i] = static_cast<TypeParam>(inner.data[i]);
      const local_mha::TensorView<const TypeParam, 4> view(memory.data() + guard, {1, 1, n, d});
      const LocalAttention<TypeParam> attention({.window_size = w, .look_backward = 2, .dim = d});
      const auto alone = tensor<TypeParam, 4>(inner);
      EXPECT_TRUE(support::same_bits(attention.forward(view, view, view),
                                     attention.forward(alone, alone, alone)))
          << "w " << w << ", n " << n;
    }
}

TYPED_TEST(Attention, GivesTheSameBitsTwice) {
  for (std::uint64_t seed = 40; seed < 60; ++seed) {
    const AttentionCase c = attention_case(seed);
    EXPECT_TRUE(support::same_bits(forward<TypeParam>(c), forward<TypeParam>(c)));
  }
}

TYPED_TEST(Attention, OfEachSequenceAndHeadIsThatOfItAlone) {
  for (std::uint64_t seed = 200; seed < 240; ++seed) {
    const AttentionCase c = attention_case(seed);
    const auto together = array(forward<TypeParam>(c));
    const reference::Int heads = c.in.q.shape[1], n = c.seqlen(), d = c.in.q.shape[3];
    for (reference::Int b = 0; b < c.batch(); ++b)
      for (reference::Int h = 0; h < heads; ++h) {
        AttentionCase one = c;
        const auto slice = [&](const Array<double>& all) {
          Array<double> part({1, 1, n, d});
          std::copy_n(all.data.begin() + (b * heads + h) * n * d, n * d, part.data.begin());
          return part;
        };
        one.in.q = slice(c.in.q), one.in.k = slice(c.in.k), one.in.v = slice(c.in.v);
        if (!c.in.masked.empty())
          one.in.masked.assign(c.in.masked.begin() + b * n, c.in.masked.begin() + (b + 1) * n);
        if (!c.in.bias.empty() && c.in.bias.shape[0] > 1) {
          one.in.bias = Array<double>({1, c.in.bias.shape[1], c.in.bias.shape[2]});
          const auto size = static_cast<reference::Int>(one.in.bias.data.size());
          std::copy_n(c.in.bias.data.begin() + h * size, size, one.in.bias.data.begin());
        }
        const auto alone = array(forward<TypeParam>(one));
        EXPECT_TRUE(std::equal(alone.data.begin(), alone.data.end(),
                               together.data.begin() + (b * heads + h) * n * d))
            << "seed " << seed << ", sequence " << b << ", head " << h;
      }
  }
}

TYPED_TEST(Attention, WithOneWindowOverAllIsOrdinarySoftmaxAttention) {
  // However large the window is; and it costs no more than the sequence.
  Random random(3);
  const auto q = random.array({1, 2, 21, 4});
  reference::AttentionInputs<double> in{q, q, q, {}, {}, {}};
  for (const bool causal : {false, true}) {
    const auto expected = reference::attention(
        {.window_size = 21, .look_backward = 0, .look_forward = 0, .causal = causal}, in);
    for (const Index w : {Index{21}, Index{1000}, Index{1} << 40, Index{1} << 62}) {
      const LocalAttention<TypeParam> attention(
          {.window_size = w, .causal = causal, .look_backward = 4, .look_forward = causal ? 0 : 3});
      const auto x = tensor<TypeParam, 4>(q);
      EXPECT_TRUE(support::close(array(attention.forward(x, x, x)), expected.out,
                                 50 * std::numeric_limits<TypeParam>::epsilon()))
          << "w " << w;
    }
  }
}

TYPED_TEST(Attention, WithScoresOfAnySizeStaysFinite) {
  Random random(5);
  for (const double size : {1e-20, 1e-10, 1e3, 1e8, 1e15})
    for (const bool negative : {false, true}) {
      AttentionCase c;
      c.config = {.window_size = 5, .causal = true, .exact_windowsize = true};
      c.config.scale = negative ? -1 : 1;
      c.in.q = random.array({1, 1, 40, 4}, size);
      c.in.k = random.array({1, 1, 40, 4}, size);
      if (size > 1) c.in.q.data = c.in.k.data;  // |q|² tells apart what rounding would not
      c.in.v = random.array({1, 1, 40, 4});
      const auto y = array(forward<TypeParam>(c));
      for (const TypeParam value : y.data) ASSERT_TRUE(std::isfinite(value)) << size;
      if (size < 1) {
        // All scores are nearly equal: the mean of the seen values.
        for (reference::Int i = 0; i < 40; ++i) {
          double mean = 0;
          const reference::Int first = std::max<reference::Int>(0, i - 5);
          for (reference::Int j = first; j <= i; ++j) mean += c.in.v(0, 0, j, 0);
          EXPECT_NEAR(y(0, 0, i, 0), mean / static_cast<double>(i - first + 1),
                      20 * std::numeric_limits<TypeParam>::epsilon());
        }
      }
    }
}

// Of a query whose only scores are close to the least number.
TYPED_TEST(Attention, SeesKeysWhoseScoresAreHardlyFinite) {
  using Scalar = TypeParam;
  const Scalar most = std::numeric_limits<Scalar>::max();
  for (const Index window_size : {2, 40}) {
    LocalAttentionConfig config{.window_size = window_size, .causal = true};
    config.scale = 1;
    const LocalAttention<Scalar> attention(config);
    for (const double share : {0.2, 0.5, 0.9}) {
      constexpr Index rows = 50;
      Tensor<Scalar, 4> q(1, 1, rows, 1), k(1, 1, rows, 1), v(1, 1, rows, 1);
      // Scores are in units of log 2.
      q.setConstant(std::sqrt(Scalar(share) * most / Scalar(1.4427)));
      k = -q;
      v.setConstant(3);
      const auto saved = attention.forward_saving(q, k, v);
      for (Index row = 0; row < rows; ++row) {
        EXPECT_NEAR(saved.out(0, 0, row, 0), 3, 1e-5) << window_size << " " << share << " " << row;
        EXPECT_TRUE(saved.lse(0, 0, row) < Scalar(-0.1) * most && saved.lse(0, 0, row) >= -most);
      }
    }
  }
}

TYPED_TEST(Attention, WithAConstantAddedToEveryScoreIsTheSame) {
  AttentionCase c = attention_case(1);
  c.config = {.window_size = 7, .dim = 6};
  c.in.masked.clear();
  Random random(8);
  c.in.q = random.array({2, 2, 30, 6}), c.in.k = random.array({2, 2, 30, 6});
  c.in.v = random.array({2, 2, 30, 6});
  c.call = {};
  c.in.bias = {};
  const auto without = array(forward<TypeParam>(c));
  for (const double constant : {64.0, -64.0, 1024.0}) {
    c.in.bias = Array<double>({2, 7, 21}, constant);
    EXPECT_TRUE(support::close(array(forward<TypeParam>(c)), without,
                               std::abs(constant) * 8 * std::numeric_limits<TypeParam>::epsilon()))
        << constant;
  }
}

}  // namespace attention_test
