// SPDX-License-Identifier: MIT
// Dropout of attention probabilities and of the feed-forward, in training mode.
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
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::Tensor;
using local_mha::Training;
using reference::Array;
using reference::Int;
using support::array;
using support::tensor;

template <typename Scalar>
class DropoutInTraining : public testing::Test {
 protected:
  static constexpr double epsilon = std::numeric_limits<Scalar>::epsilon();
};
TYPED_TEST_SUITE(DropoutInTraining, support::Scalars, support::ScalarNames);

TYPED_TEST(DropoutInTraining, KeepsAShareOfTheProbabilitiesScaledUp) {
  for (const double rate : {0.1, 0.5, 0.75}) {
    LocalAttentionConfig config{.window_size = 20, .dropout = rate, .dim = 8};
    const LocalAttention<TypeParam> attention(config);
    Random random(1);
    const Int n = 70;
    const auto q = tensor<TypeParam, 4>(random.array({2, 2, n, 8}));
    const auto k = tensor<TypeParam, 4>(random.array({2, 2, n, 8}));
    const LocalAttentionCall call{.training = Training{.seed = 5}};
    const auto plain = array(attention.attention_probabilities(q, k));
    const auto dropped = array(attention.attention_probabilities(q, k, {}, {}, call));
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
          // The rate may be rounded to 16 bits.
          EXPECT_NEAR(static_cast<double>(dropped.data[at] / plain.data[at]), 1 / (1 - rate),
                      2e-4 / (1 - rate));
        }
    for (std::size_t head = 0; head < 4; ++head)
      EXPECT_NEAR(kept[head] / seen[head], 1 - rate, 5 * std::sqrt(rate * (1 - rate) / seen[head]));
  }
}

TYPED_TEST(DropoutInTraining, DropsOtherPairsInEachHeadAndSequence) {
  const LocalAttention<TypeParam> attention({.window_size = 40, .dropout = 0.5});
  const Int n = 40;
  const auto q = tensor<TypeParam, 4>(Array<double>({3, 2, n, 4}));
  const auto dropped = array(attention.attention_probabilities(
      q, q, {}, {}, LocalAttentionCall{.training = Training{.seed = 11}}));
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
    const LocalAttentionCall call{.training = Training{.seed = 3}};
    const auto probabilities = array(attention.attention_probabilities(q, k, {}, {}, call));
    Array<double> expected({1, 1, n, 6});
    for (Int i = 0; i < n; ++i)
      for (Int j = 0; j < n; ++j)
        for (Int c = 0; c < 6; ++c)
          expected(0, 0, i, c) += static_cast<double>(probabilities(0, 0, i, j)) * v(0, 0, j, c);
    EXPECT_TRUE(
        support::close(array(attention.forward(q, k, tensor<TypeParam, 4>(v), {}, {}, call)),
                       expected, 100 * this->epsilon));
  }
}

TYPED_TEST(DropoutInTraining, GivesTheMeanOfTheEvaluation) {
  const LocalAttentionConfig config{.window_size = 6, .dropout = 0.25, .dim = 4};
  const LocalAttention<TypeParam> attention(config);
  Random random(3);
  const auto q = tensor<TypeParam, 4>(random.array({1, 2, 20, 4}));
  const auto evaluated = attention.forward(q, q, q);
  constexpr int seeds = 3000;
  std::vector<double> sum(static_cast<std::size_t>(q.size()), 0), squares = sum;
  for (int seed = 0; seed < seeds; ++seed) {
    const auto y = attention.forward(
        q, q, q, {}, {},
        LocalAttentionCall{.training = Training{.seed = static_cast<std::uint64_t>(seed)}});
    for (std::size_t i = 0; i < sum.size(); ++i) {
      sum[i] += static_cast<double>(y.data()[i]);
      squares[i] += static_cast<double>(y.data()[i]) * static_cast<double>(y.data()[i]);
    }
  }
  for (std::size_t i = 0; i < sum.size(); ++i) {
    const double mean = sum[i] / seeds;
    const double variance = std::max(0.0, squares[i] / seeds - mean * mean);
    EXPECT_NEAR(mean, static_cast<double>(evaluated.data()[i]), 5 * std::sqrt(variance / seeds));
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
  EXPECT_TRUE(support::same_bits(evaluated, plain.forward(t, {}, Training{.seed = 1})));
  for (const bool attention : {false, true}) {
    LocalTransformerConfig config = base;
    (attention ? config.attn_dropout : config.ff_dropout) = 0.5;
    const LocalTransformer<TypeParam> model(config, plain.parameters());
    EXPECT_TRUE(support::same_bits(evaluated, model.forward(t)));
    const auto trained = model.forward(t, {}, Training{.seed = 1});
    EXPECT_GT(support::largest_error(array(trained), array(evaluated)), 0.01);
    EXPECT_TRUE(support::same_bits(trained, model.forward(t, {}, Training{.seed = 1})));
    EXPECT_FALSE(support::same_bits(trained, model.forward(t, {}, Training{.seed = 2})));
    EXPECT_NE(model.loss(t), model.loss(t, {}, Training{.seed = 1}));
    // The second sequence drops elsewhere than the first.
    Array<Int> twice = tokens;
    std::copy_n(twice.data.begin(), 17, twice.data.begin() + 17);
    const auto both = array(model.forward(tensor<std::int64_t, 2>(twice), {}, Training{.seed = 1}));
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
        support::largest_error(array(model.forward(t, {}, Training{.seed = 1})), without);
    EXPECT_GT(evaluated, 0);
    EXPECT_LT(evaluated, 1e-8);
    EXPECT_GT(trained, 1e-7) << (attention ? "attention" : "feed-forward");
  }
}

}  // namespace
