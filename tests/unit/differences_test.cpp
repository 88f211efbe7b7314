// SPDX-License-Identifier: MIT
// Where this library differs from the Python packages on purpose: a test for each difference.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include <local_mha/io/kwargs.hpp>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace differences_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::Tensor;
using local_mha::Training;
using reference::Array;
using reference::Int;
using support::array;
using support::tensor;

template <typename Scalar>
class Difference : public testing::Test {
 protected:
  static constexpr double epsilon = std::numeric_limits<Scalar>::epsilon();

  static reference::Parameters<double> weights(const LocalMHA<Scalar>& mha) {
    return support::named<double>(mha.parameters());
  }

  /// The reference's result of a layer with its own weights.
  static Array<double> expected(const LocalMHA<Scalar>& mha, const Array<double>& x,
                                const std::vector<unsigned char>& masked = {}) {
    return reference::local_mha(support::options(mha.config()), weights(mha), {x, masked, {}, {}})
        .y;
  }
};
TYPED_TEST_SUITE(Difference, support::Scalars, support::ScalarNames);

// zeta's LocalMHA raises at every call, because it takes a tensor as mask value.
TYPED_TEST(Difference, TheLayerOfZetaRaisesAtEveryCallAndThisOneWorks) {
  // zeta's defaults, without and with a mask.
  const LocalMHA<TypeParam> mha(LocalMHAConfig{.dim = 16, .window_size = 4, .dim_head = 8});
  const auto x = Random(1).array({2, 11, 16});
  EXPECT_TRUE(support::close(array(mha.forward(tensor<TypeParam, 3>(x))), this->expected(mha, x),
                             50 * this->epsilon));
  std::vector<unsigned char> masked(22, 0);
  masked[3] = masked[14] = 1;
  EXPECT_TRUE(support::close(
      array(mha.forward(tensor<TypeParam, 3>(x), support::padding_mask(masked, 2, 11))),
      this->expected(mha, x, masked), 50 * this->epsilon));
}

// The dropout given to LocalMHA never reaches the attention.
TYPED_TEST(Difference, DropoutOfTheLayerReachesTheAttention) {
  LocalMHAConfig config{.dim = 8, .window_size = 5, .dim_head = 4, .heads = 2};
  config.dropout = 0.3;
  const LocalMHA<TypeParam> mha(config, 2);
  const auto x = tensor<TypeParam, 3>(Random(3).array({2, 23, 8}));
  const auto evaluated = mha.forward(x);
  const auto trained = mha.forward(x, {}, {}, Training{.seed = 1});
  EXPECT_GT(support::largest_error(array(trained), array(evaluated)), 0.01);
  EXPECT_TRUE(support::same_bits(trained, mha.forward(x, {}, {}, Training{.seed = 1})));
  EXPECT_FALSE(support::same_bits(trained, mha.forward(x, {}, {}, Training{.seed = 2})));

  // Over many seeds the mean of each output is that without dropout.
  constexpr int seeds = 1500;
  std::vector<double> sum(static_cast<std::size_t>(x.size()), 0), squares = sum;
  for (int seed = 0; seed < seeds; ++seed) {
    const auto y = mha.forward(x, {}, {}, Training{.seed = static_cast<std::uint64_t>(seed)});
    for (std::size_t i = 0; i < sum.size(); ++i) {
      const auto value = static_cast<double>(y.data()[i]);
      sum[i] += value;
      squares[i] += value * value;
    }
  }
  for (std::size_t i = 0; i < sum.size(); ++i) {
    const double mean = sum[i] / seeds;
    const double variance = std::max(0.0, squares[i] / seeds - mean * mean);
    EXPECT_NEAR(mean, static_cast<double>(evaluated.data()[i]),
                5 * std::sqrt(variance / seeds) + 1e-4 * std::abs(mean))
        << i;
    EXPECT_GT(variance, 0) << i;
  }

  LocalMHAConfig without = config;
  without.dropout = 0;
  EXPECT_TRUE(support::same_bits(
      evaluated,
      LocalMHA<TypeParam>(without, mha.parameters()).forward(x, {}, {}, Training{.seed = 1})));
}

// Zero keys that auto-padding appends are attended when non-causal and no mask is given.
TYPED_TEST(Difference, KeysThatFillUpTheLastWindowAreNeverAttended) {
  LocalMHAConfig config{.dim = 12, .window_size = 6, .dim_head = 4, .heads = 3};
  config.exact_windowsize = false;
  const LocalMHA<TypeParam> mha(config, 5);
  const Int n = 20;
  const auto x = Random(4).array({2, n, 12});
  const auto y = array(mha.forward(tensor<TypeParam, 3>(x)));
  EXPECT_TRUE(support::close(y, this->expected(mha, x), 50 * this->epsilon));

  // What they do, to see that the test tells it apart: four zero rows behind.
  Array<double> padded({2, n + 4, 12});
  for (Int b = 0; b < 2; ++b)
    for (Int i = 0; i < n; ++i)
      for (Int c = 0; c < 12; ++c) padded(b, i, c) = x(b, i, c);
  const auto theirs = this->expected(mha, padded);
  double difference = 0;
  for (Int b = 0; b < 2; ++b)
    for (Int c = 0; c < 12; ++c)
      difference =
          std::max(difference, std::abs(theirs(b, n - 1, c) - static_cast<double>(y(b, n - 1, c))));
  EXPECT_GT(difference, 0.01);
}

// Fully masked rows become the mean of everything, the future included.
TYPED_TEST(Difference, RowsThatSeeOnlyMaskedKeysAreZeros) {
  for (const bool causal : {false, true}) {
    LocalMHAConfig config{.dim = 12, .window_size = 4, .dim_head = 4, .heads = 3};
    config.causal = causal;
    config.prenorm = true;
    config.gate_values_per_head = true;
    const LocalMHA<TypeParam> mha(config, 6);
    const auto x = Random(5).array({1, 30, 12});
    std::vector<unsigned char> masked(30, 1);
    masked[29] = 0;
    const auto y =
        array(mha.forward(tensor<TypeParam, 3>(x), support::padding_mask(masked, 1, 30)));
    for (Int i = 0; i < 30; ++i) {
      const bool sees = reference::sees(support::options(config).attention, i, 29);
      for (Int c = 0; c < 12; ++c) {
        if (sees)
          EXPECT_NE(y(0, i, c), TypeParam(0)) << i;
        else
          EXPECT_EQ(y(0, i, c), TypeParam(0)) << i;
      }
    }
  }
}

// Cached decoding rotates keys twice, ignores qk_scale and drops a window at each bucket's end.
TYPED_TEST(Difference, EveryTokenOfACausalSequenceIsThatOfTheFullForwardOfItsPrefix) {
  for (const bool exact : {false, true}) {
    LocalMHAConfig config{.dim = 10, .window_size = 5, .dim_head = 6, .heads = 2};
    config.causal = true;
    config.exact_windowsize = exact;
    config.qk_rmsnorm = true;
    config.qk_scale = 5;
    config.use_xpos = true;
    config.look_backward = 2;
    const LocalMHA<TypeParam> mha(config, 7);
    const Int n = 40;
    const auto x = Random(6).array({2, n, 10});
    const auto whole = array(mha.forward(tensor<TypeParam, 3>(x)));
    typename LocalMHA<TypeParam>::Stream stream(mha, {.batch = 2});
    for (Int length = 1; length <= n; ++length) {
      Array<double> prefix({2, length, 10}), token({2, 1, 10});
      for (Int b = 0; b < 2; ++b) {
        for (Int i = 0; i < length; ++i)
          for (Int c = 0; c < 10; ++c) prefix(b, i, c) = x(b, i, c);
        for (Int c = 0; c < 10; ++c) token(b, 0, c) = x(b, length - 1, c);
      }
      const auto y = array(mha.forward(tensor<TypeParam, 3>(prefix)));
      const auto streamed = array(stream.push(tensor<TypeParam, 3>(token)));
      for (Int b = 0; b < 2; ++b)
        for (Int c = 0; c < 10; ++c) {
          const TypeParam expected = whole(b, length - 1, c);
          EXPECT_NEAR(y(b, length - 1, c), expected, 20 * this->epsilon)
              << "exact " << exact << ", token " << length - 1;
          EXPECT_NEAR(streamed(b, 0, c), expected, 20 * this->epsilon)
              << "exact " << exact << ", token " << length - 1;
        }
    }
  }
}

// A window given at the call is ignored by exact masks.
TYPED_TEST(Difference, AWindowGivenAtTheCallCountsInExactMasks) {
  LocalAttentionConfig config{.window_size = 4, .causal = true, .dim = 8};
  config.exact_windowsize = true;
  config.use_xpos = true;
  config.xpos_scale_base = 20;
  Random random(8);
  const reference::AttentionInputs<double> in{random.array({1, 2, 50, 8}),
                                              random.array({1, 2, 50, 8}),
                                              random.array({1, 2, 50, 8}),
                                              {},
                                              {},
                                              {}};
  const auto q = tensor<TypeParam, 4>(in.q);
  const auto k = tensor<TypeParam, 4>(in.k);
  const auto v = tensor<TypeParam, 4>(in.v);
  const LocalAttention<TypeParam> attention(config);
  const auto own = attention.forward(q, k, v);
  for (const Index w : {1, 3, 9, 100}) {
    const auto y = attention.forward(q, k, v, {.window_size = w});
    EXPECT_TRUE(support::close(
        array(y), reference::attention(support::options(config, {.window_size = w}), in).out,
        50 * this->epsilon))
        << w;
    EXPECT_GT(support::largest_error(array(y), array(own)), 0.01) << w;
    LocalAttentionConfig same = config;
    same.window_size = w;
    EXPECT_TRUE(support::same_bits(y, LocalAttention<TypeParam>(same).forward(q, k, v))) << w;
  }
  EXPECT_TRUE(support::same_bits(own, attention.forward(q, k, v, {.window_size = 4})));
}

// The dynamic position bias with causal=false crashes.
TYPED_TEST(Difference, TheDynamicPositionBiasOfNonCausalModelsCoversTheWholeLookAround) {
  LocalTransformerConfig config{.num_tokens = 11,
                                .max_seq_len = 40,
                                .dim = 12,
                                .depth = 2,
                                .causal = false,
                                .local_attn_window_size = 6,
                                .dim_head = 4,
                                .heads = 3};
  config.use_dynamic_pos_bias = true;
  for (const Index ahead : {1, 2}) {
    config.look_forward = ahead;
    const LocalTransformer<TypeParam> model(config, 9);
    Random random(10);
    Array<Int> tokens({2, 33});
    for (Int& token : tokens.data) token = random.integer(0, 10);
    const auto weights = support::named<double>(model.parameters());
    const auto expected = reference::transformer_logits(support::options(config), weights, tokens);
    EXPECT_TRUE(support::close(array(model.forward(tensor<std::int64_t, 2>(tokens))), expected,
                               200 * this->epsilon * support::largest(expected)));

    // The bias matters also for keys ahead.
    auto changed = weights;
    changed.at("dynamic_pos_bias.mlp.4.weight") =
        random.array(changed.at("dynamic_pos_bias.mlp.4.weight").shape, 3);
    EXPECT_GT(
        support::largest_error(
            reference::transformer_logits(support::options(config), changed, tokens), expected),
        0.01);
  }
}

// xpos_scale_base empty is documented as √dim and coded as window_size // 2.
TYPED_TEST(Difference, AnEmptyXposScaleBaseIsTheRootOfDimAndForPythonLayersHalfTheWindow) {
  LocalMHAConfig config{.dim = 25, .window_size = 7, .dim_head = 8, .heads = 2};
  config.use_xpos = true;
  const LocalMHA<TypeParam> by_default(config, 4);
  const auto x = tensor<TypeParam, 3>(Random(11).array({1, 30, 25}));
  config.xpos_scale_base = 5;
  const LocalMHA<TypeParam> root_of_dim(config, by_default.parameters());
  EXPECT_TRUE(support::same_bits(by_default.forward(x), root_of_dim.forward(x)));

  const auto python = local_mha::io::local_mha_config(
      {{"dim", 25}, {"window_size", 7}, {"dim_head", 8}, {"heads", 2}, {"use_xpos", true}});
  config.xpos_scale_base = 3;
  const LocalMHA<TypeParam> half_of_window(config, by_default.parameters());
  EXPECT_TRUE(support::same_bits(LocalMHA<TypeParam>(python, by_default.parameters()).forward(x),
                                 half_of_window.forward(x)));
  EXPECT_FALSE(support::same_bits(by_default.forward(x), half_of_window.forward(x)));

  // LocalAttention's dim is that of a head.
  LocalAttentionConfig attention{.window_size = 7, .dim = 16};
  attention.use_xpos = true;
  const auto q = tensor<TypeParam, 4>(Random(12).array({1, 1, 30, 16}));
  const auto y = LocalAttention<TypeParam>(attention).forward(q, q, q);
  attention.xpos_scale_base = 4;
  EXPECT_TRUE(support::same_bits(y, LocalAttention<TypeParam>(attention).forward(q, q, q)));
}

}  // namespace differences_test
