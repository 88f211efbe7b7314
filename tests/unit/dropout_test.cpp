// SPDX-License-Identifier: MIT
// Dropout of attention probabilities and of the feed-forward, in training mode.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace dropout_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionCall;
using local_mha::LocalAttentionConfig;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::Tensor;
using local_mha::Training;
using reference::Array;
using reference::Int;
using support::array;
using support::tensor;

/// Whether a value is kept, by the published layout of counters; positions and places below 2^32.
bool keeps(const local_mha::Philox& philox, double rate, Int position, Int place, Int stream) {
  const auto words =
      philox({static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(place / 8), 0,
              static_cast<std::uint32_t>(stream)});
  const std::uint32_t word = words[static_cast<std::size_t>(place % 8 / 2)];
  return (place % 2 == 0 ? word & 0xFFFF : word >> 16) < std::lround((1 - rate) * 65536);
}

template <typename Scalar>
class DropoutInTraining : public testing::Test {
 protected:
  static constexpr double epsilon = std::numeric_limits<Scalar>::epsilon();
};
TYPED_TEST_SUITE(DropoutInTraining, support::Scalars, support::ScalarNames);

TYPED_TEST(DropoutInTraining, KeepsAShareOfTheProbabilitiesScaledUp) {
  for (const double rate : {0.1, 0.5, 0.75}) {
    const double keep = std::round((1 - rate) * 65536) / 65536;
    LocalAttentionConfig config{.window_size = 20, .dropout = rate, .dim = 8};
    const LocalAttention<TypeParam> attention(config);
    Random random(1);
    const Int n = 70;
    const auto q = tensor<TypeParam, 4>(random.array({2, 2, n, 8}));
    const auto k = tensor<TypeParam, 4>(random.array({2, 2, n, 8}));
    const LocalAttentionCall<TypeParam> call{.training = Training{.seed = 5}};
    const auto plain = array(attention.attention_probabilities(q, k));
    const auto dropped = array(attention.attention_probabilities(q, k, call));
    std::vector<double> seen(4, 0), kept(4, 0);
    for (Int head = 0; head < 4; ++head)
      for (Int i = 0; i < n; ++i)
        for (Int j = 0; j < n; ++j) {
          const auto at = static_cast<std::size_t>((head * n + i) * n + j);
          if (plain.data[at] == 0) {
            EXPECT_EQ(dropped.data[at], TypeParam(0));
            continue;
          }
          ++seen[static_cast<std::size_t>(head)];
          if (dropped.data[at] == 0) continue;
          ++kept[static_cast<std::size_t>(head)];
          // A rounding of the factor, one of each product, and one of the quotient here.
          EXPECT_NEAR(static_cast<double>(dropped.data[at] / plain.data[at]), 1 / keep,
                      4 * this->epsilon / keep);
        }
    for (std::size_t head = 0; head < 4; ++head)
      EXPECT_NEAR(kept[head] / seen[head], 1 - rate, 5 * std::sqrt(rate * (1 - rate) / seen[head]));
  }
}

TYPED_TEST(DropoutInTraining, DropsOtherPairsInEachHeadAndSequence) {
  const LocalAttention<TypeParam> attention({.window_size = 40, .dropout = 0.5});
  const Int n = 40;
  const auto q = tensor<TypeParam, 4>(Array<double>({3, 2, n, 4}));
  const auto dropped =
      array(attention.attention_probabilities(q, q, {.training = Training{.seed = 11}}));
  const auto kept = [&](Int head, Int i, Int j) {
    return dropped.data[static_cast<std::size_t>((head * n + i) * n + j)] != 0;
  };
  // Of two independent patterns, half of the pairs agree; so do neighbours in one pattern.
  const double pairs = static_cast<double>(n * n);
  for (Int a = 0; a < 6; ++a)
    for (Int b = 0; b <= a; ++b) {
      double agree = 0, agree_below = 0, agree_beside = 0;
      for (Int i = 0; i < n; ++i)
        for (Int j = 0; j < n; ++j) {
          agree += kept(a, i, j) == kept(b, i, j);
          agree_below += kept(a, i, j) == kept(b, (i + 1) % n, j);
          agree_beside += kept(a, i, j) == kept(b, i, (j + 1) % n);
        }
      if (a != b) {
        EXPECT_NEAR(agree / pairs, 0.5, 5 * 0.5 / std::sqrt(pairs));
      }
      EXPECT_NEAR(agree_below / pairs, 0.5, 5 * 0.5 / std::sqrt(pairs));
      EXPECT_NEAR(agree_beside / pairs, 0.5, 5 * 0.5 / std::sqrt(pairs));
    }
}

TYPED_TEST(DropoutInTraining, WeightsTheValuesByTheDroppedProbabilities) {
  for (const Index w : {3, 16, 50, 2000}) {
    LocalAttentionConfig config{.window_size = w, .causal = w == 16, .dropout = 0.4, .dim = 6};
    const LocalAttention<TypeParam> attention(config);
    Random random(2);
    const Int n = w == 2000 ? 1300 : 90;
    const auto q = tensor<TypeParam, 4>(random.array({1, 1, n, 6}));
    const auto k = tensor<TypeParam, 4>(random.array({1, 1, n, 6}));
    const auto v = random.array({1, 1, n, 6});
    const LocalAttentionCall<TypeParam> call{.training = Training{.seed = 3}};
    const auto probabilities = array(attention.attention_probabilities(q, k, call));
    Array<double> expected({1, 1, n, 6});
    for (Int i = 0; i < n; ++i)
      for (Int j = 0; j < n; ++j)
        for (Int c = 0; c < 6; ++c)
          expected(0, 0, i, c) += static_cast<double>(probabilities(0, 0, i, j)) * v(0, 0, j, c);
    EXPECT_TRUE(support::close(array(attention.forward(q, k, tensor<TypeParam, 4>(v), call)),
                               expected, 100 * this->epsilon));
  }
}

// What is dropped is the same in every version, on every processor and for either scalar: a
// training that goes on elsewhere drops what it would have dropped.
TYPED_TEST(DropoutInTraining, DropsThePairsThatPhiloxNames) {
  const std::uint64_t seed = 0x0123456789abcdef;
  const double rate = 0.3;
  LocalAttentionConfig config{.window_size = 80, .dropout = rate};
  config.scale = 0;  // so that every probability shows
  const Int batch = 2, heads = 3, n = 75;
  const auto q = tensor<TypeParam, 4>(Array<double>({batch, heads, n, 4}));
  const auto dropped = array(LocalAttention<TypeParam>(config).attention_probabilities(
      q, q, {.training = Training{.seed = seed}}));
  const local_mha::Philox philox(seed);
  for (Int b = 0; b < batch; ++b)
    for (Int h = 0; h < heads; ++h)
      for (Int i = 0; i < n; ++i)
        for (Int j = 0; j < n; ++j)
          EXPECT_EQ(dropped(b, h, i, j) != TypeParam(0), keeps(philox, rate, i, j, b * heads + h))
              << b << ' ' << h << ' ' << i << ' ' << j;
}

// A feed-forward whose result is its hidden activations, which are all alike.
TYPED_TEST(DropoutInTraining, OfTheFeedForwardKeepsAShareScaledUp) {
  const Index rows = 301, dim = 28;
  auto parameters = local_mha::FeedForwardParameters<TypeParam>::zeros(dim, dim);
  parameters.norm_bias.setOnes();
  parameters.proj_in.setConstant(TypeParam(1) / TypeParam(dim));
  parameters.proj_out.setIdentity();
  Random random(7);
  const auto x = tensor<TypeParam, 2>(random.array({rows, dim}));
  const local_mha::RowMatrix<TypeParam> input =
      Eigen::Map<const local_mha::RowMatrix<TypeParam>>(x.data(), rows, dim);
  const auto evaluated = local_mha::FeedForward<TypeParam>(parameters).forward(input);
  for (const double rate : {0.1, 0.5, 0.75}) {
    const double keep = std::round((1 - rate) * 65536) / 65536;
    const auto y = local_mha::FeedForward<TypeParam>(parameters, rate)
                       .forward(input, {.training = Training{.seed = 9}});
    double kept = 0, mean = 0, squares = 0;
    for (Index r = 0; r < rows; ++r)
      for (Index c = 0; c < dim; ++c) {
        const auto factor = static_cast<double>(y(r, c)) / static_cast<double>(evaluated(r, c));
        EXPECT_EQ(factor != 0, keeps(local_mha::Philox(9), rate, r, c, 0)) << r << ' ' << c;
        if (factor != 0) {
          EXPECT_NEAR(factor, 1 / keep, 4 * this->epsilon / keep);
          ++kept;
        }
        mean += factor;
        squares += factor * factor;
      }
    const auto number = static_cast<double>(rows * dim);
    mean /= number;
    // Of the share that is kept the rest follows: mean 1, variance 1 / keep − 1.
    const double five_sigma = 5 * std::sqrt(keep * (1 - keep) / number);
    EXPECT_NEAR(kept / number, keep, five_sigma);
    EXPECT_NEAR(mean, 1, five_sigma / keep);
    EXPECT_NEAR(squares / number - mean * mean, 1 / keep - 1, 3 * five_sigma / (keep * keep));
  }
}

TYPED_TEST(DropoutInTraining, GivesTheMeanOfTheEvaluationAndTheVarianceOfIndependentPairs) {
  const LocalAttentionConfig config{.window_size = 6, .dropout = 0.25, .dim = 4};
  const LocalAttention<TypeParam> attention(config);
  Random random(3);
  const auto q = tensor<TypeParam, 4>(random.array({1, 2, 20, 4}));
  const auto evaluated = attention.forward(q, q, q);
  const auto probabilities = array(attention.attention_probabilities(q, q));
  const auto v = array(q);
  constexpr int seeds = 3000;
  // Moments around the result of the evaluation.
  const auto size = static_cast<std::size_t>(q.size());
  std::vector<double> first(size, 0), second(size, 0), fourth(size, 0);
  for (int seed = 0; seed < seeds; ++seed) {
    const auto y = attention.forward(
        q, q, q, {.training = Training{.seed = static_cast<std::uint64_t>(seed)}});
    for (std::size_t i = 0; i < size; ++i) {
      const double off =
          static_cast<double>(y.data()[i]) - static_cast<double>(evaluated.data()[i]);
      first[i] += off / seeds;
      second[i] += off * off / seeds;
      fourth[i] += off * off * off * off / seeds;
    }
  }
  for (Int h = 0; h < 2; ++h)
    for (Int i = 0; i < 20; ++i)
      for (Int c = 0; c < 4; ++c) {
        const auto at = static_cast<std::size_t>((h * 20 + i) * 4 + c);
        double variance = 0;
        for (Int j = 0; j < 20; ++j) {
          const auto term = static_cast<double>(probabilities(0, h, i, j) * v(0, h, j, c));
          variance += (1 / 0.75 - 1) * term * term;
        }
        EXPECT_NEAR(first[at], 0, 5 * std::sqrt(variance / seeds));
        EXPECT_NEAR(second[at], variance,
                    5 * std::sqrt((fourth[at] - variance * variance) / seeds));
      }
}

TYPED_TEST(DropoutInTraining, LeavesEvaluationAloneWhateverTheRate) {
  Random random(4);
  const auto q = tensor<TypeParam, 4>(random.array({1, 2, 20, 4}));
  const auto y = LocalAttention<TypeParam>({.window_size = 6}).forward(q, q, q);
  EXPECT_TRUE(support::same_bits(
      y, LocalAttention<TypeParam>({.window_size = 6, .dropout = 0.9}).forward(q, q, q)));
}

TYPED_TEST(DropoutInTraining, OfTheTransformerActsInAttentionAndFeedForward) {
  const LocalTransformerConfig base{.num_tokens = 9,
                                    .max_seq_len = 20,
                                    .dim = 8,
                                    .depth = 2,
                                    .local_attn_window_size = 5,
                                    .dim_head = 4,
                                    .heads = 2};
  const LocalTransformer<TypeParam> plain(base, 1);
  Array<Int> tokens({2, 17});
  Random random(5);
  for (Int& token : tokens.data) token = random.integer(0, 8);
  const auto t = tensor<std::int64_t, 2>(tokens);
  const auto evaluated = plain.forward(t);
  EXPECT_TRUE(support::same_bits(evaluated, plain.forward(t, {.training = Training{.seed = 1}})));
  for (const bool attention : {false, true}) {
    LocalTransformerConfig config = base;
    (attention ? config.attn_dropout : config.ff_dropout) = 0.5;
    const LocalTransformer<TypeParam> model(config, plain.parameters());
    EXPECT_TRUE(support::same_bits(evaluated, model.forward(t)));
    const auto trained = model.forward(t, {.training = Training{.seed = 1}});
    EXPECT_GT(support::largest_error(array(trained), array(evaluated)), 0.01);
    EXPECT_TRUE(support::same_bits(trained, model.forward(t, {.training = Training{.seed = 1}})));
    EXPECT_FALSE(support::same_bits(trained, model.forward(t, {.training = Training{.seed = 2}})));
    EXPECT_NE(model.loss(t), model.loss(t, {.training = Training{.seed = 1}}));
    // The second sequence drops elsewhere than the first.
    Array<Int> twice = tokens;
    std::copy_n(twice.data.begin(), 17, twice.data.begin() + 17);
    const auto both =
        array(model.forward(tensor<std::int64_t, 2>(twice), {.training = Training{.seed = 1}}));
    EXPECT_FALSE(
        std::equal(both.data.begin(), both.data.begin() + 17 * 9, both.data.begin() + 17 * 9));
  }
}

TEST(DropoutInTraining, DropsElsewhereInEachLayer) {
  // The second layer takes back what the first added, but for the small change of its input: to
  // second order nothing is left, unless the two drop different things.
  LocalTransformerConfig config{.num_tokens = 9,
                                .max_seq_len = 20,
                                .dim = 8,
                                .depth = 2,
                                .local_attn_window_size = 5,
                                .dim_head = 4,
                                .heads = 2};
  config.attn_dropout = config.ff_dropout = 0.5;
  Array<Int> tokens({1, 17});
  Random random(6);
  for (Int& token : tokens.data) token = random.integer(0, 8);
  const auto t = tensor<std::int64_t, 2>(tokens);
  for (const bool attention : {false, true}) {
    auto parameters = LocalTransformer<double>(config, 3).parameters();
    for (auto& layer : parameters.layers) {
      layer.attention.to_out *= attention ? 1e-5 : 0;
      layer.feed_forward.proj_out *= attention ? 0 : 1e-5;
    }
    parameters.layers[1] = parameters.layers[0];
    parameters.layers[1].attention.to_out *= -1;
    parameters.layers[1].feed_forward.proj_out *= -1;
    const LocalTransformer<double> model(config, parameters);
    for (auto& layer : parameters.layers) {
      layer.attention.to_out.setZero();
      layer.feed_forward.proj_out.setZero();
    }
    const auto without = array(LocalTransformer<double>(config, parameters).forward(t));
    const double evaluated = support::largest_error(array(model.forward(t)), without);
    const double trained =
        support::largest_error(array(model.forward(t, {.training = Training{.seed = 1}})), without);
    EXPECT_GT(evaluated, 0);
    EXPECT_LT(evaluated, 1e-8);
    EXPECT_GT(trained, 1e-7) << (attention ? "attention" : "feed-forward");
  }
}

// Of rows of a larger whole: by the published layout of counters, also where the lower half of a
// place turns.
TEST(PlacedDropout, IsThatOfThePlace) {
  constexpr Index turn = Index{1} << 32;
  constexpr Index count = local_mha::block_rows<double>;
  const local_mha::Philox philox(9);
  for (const Index begin : {Index{0}, Index{5}, turn - 3, 3 * turn - 1, (Index{1} << 40) + 2}) {
    const std::vector<local_mha::detail::RowPlace> places{
        {0, begin}, {3, begin + 100}, {3, begin + 1000}, {2 * count + 1, begin + 2001}};
    const local_mha::detail::PlacedDropout<double> dropout({0.5, 9, 0}, places);
    for (Index row = 0; row < 4 * count; ++row) {
      const Index place = row < 3               ? begin + row
                          : row < 2 * count + 1 ? begin + 1000 + row - 3
                                                : begin + 2001 + row - 2 * count - 1;
      for (const Index octet : {Index{0}, Index{4}}) {
        local_mha::Lanes<double> factors[8];
        dropout.factors(row / count * count, octet, factors);
        const auto words =
            philox({static_cast<std::uint32_t>(place), static_cast<std::uint32_t>(octet),
                    static_cast<std::uint32_t>((place >> 32) << 16), 0});
        for (int i = 0; i < 8; ++i) {
          alignas(64) double lanes[count];
          factors[i].store(lanes);
          const std::uint32_t word = words[static_cast<std::size_t>(i / 2)];
          const bool kept = (i % 2 == 0 ? word & 0xFFFF : word >> 16) < 32768;
          EXPECT_EQ(lanes[row % count], kept ? 2 : 0) << begin << ", " << row << ", " << i;
        }
      }
    }
  }
}

}  // namespace dropout_test
