// SPDX-License-Identifier: MIT
// LocalTransformer against the naive reference.
#include <gtest/gtest.h>

#include <cstdint>
#include <sstream>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace transformer_test {

using local_mha::Index;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::Tensor;
using reference::Array;
using reference::Int;
using support::array;

struct TransformerCase {
  LocalTransformerConfig config;
  reference::Parameters<double> parameters;
  Array<Int> tokens;  // [B, N + 1]
  std::vector<unsigned char> masked;
};

Array<Int> without_last(const Array<Int>& tokens) {
  Array<Int> inputs({tokens.shape[0], tokens.shape[1] - 1});
  for (Int b = 0; b < inputs.shape[0]; ++b)
    for (Int i = 0; i < inputs.shape[1]; ++i) inputs(b, i) = tokens(b, i);
  return inputs;
}

Tensor<std::int64_t, 2> token_tensor(const Array<Int>& tokens) {
  return support::tensor<std::int64_t, 2>(tokens);
}

TransformerCase transformer_case(std::uint64_t seed) {
  Random random(seed);
  TransformerCase c;
  Index n = 0;
  support::pick_sizes(random, support::Length::Short, n, c.config.local_attn_window_size);
  n = std::max<Index>(n, 1);
  support::pick_window_rules(random, c.config);
  c.config.num_tokens = random.integer(2, 20);
  c.config.max_seq_len = n + random.integer(0, 9);
  c.config.dim = random.pick<Index>({4, 5, 6, 8, 12, 21});
  c.config.depth = random.integer(0, 3);
  c.config.dim_head = random.pick<Index>({2, 4, 8});
  c.config.heads = random.integer(1, 3);
  c.config.ff_mult = random.pick({4.0, 2.5, 1.0});
  c.config.qk_rmsnorm = random.chance(0.4);
  c.config.gate_values_per_head = random.chance(0.3);
  c.config.use_dynamic_pos_bias = random.chance(0.4);
  if (seed % 3 == 0) c.config.num_residual_streams = 2 + static_cast<Index>(seed / 3 % 3);
  if (!c.config.use_dynamic_pos_bias && random.chance(0.4)) {
    c.config.use_xpos = true;
    support::pick_xpos_base(random, c.config, c.config.local_attn_window_size,
                            std::sqrt(static_cast<double>(c.config.dim)));
  }
  c.parameters = support::random_parameters(
      random,
      support::named<double>(local_mha::LocalTransformerParameters<double>::zeros(c.config)));
  const Index batch = random.integer(1, 3);
  c.tokens = Array<Int>({batch, n + 1});
  for (Int& token : c.tokens.data) token = random.integer(0, c.config.num_tokens - 1);
  c.masked = support::pick_mask(random, batch, n);
  return c;
}

template <typename Scalar>
LocalTransformer<Scalar> transformer(const TransformerCase& c) {
  return LocalTransformer<Scalar>(c.config,
                                  support::transformer_parameters<Scalar>(c.config, c.parameters));
}

std::string describe(const TransformerCase& c) {
  std::ostringstream text;
  text << std::boolalpha << "N " << c.tokens.shape[1] - 1 << ", depth " << c.config.depth
       << ", streams " << c.config.num_residual_streams << ", dynamic bias "
       << c.config.use_dynamic_pos_bias << ", "
       << support::describe(local_mha::layer_config(c.config));
  return text.str();
}

template <typename Scalar>
class Transformer : public testing::Test {};
TYPED_TEST_SUITE(Transformer, support::Scalars, support::ScalarNames);

TYPED_TEST(Transformer, EqualsTheReferenceForRandomConfigurations) {
  using Precise = support::Precise<TypeParam>;
  int failures = 0;
  for (std::uint64_t seed = 1; seed <= random_cases(250) && failures < 5; ++seed) {
    const TransformerCase c = transformer_case(seed);
    const auto options = support::options(c.config);
    const Array<Int> inputs = without_last(c.tokens);
    const auto expected = reference::transformer_logits(
        options, reference::cast<Precise>(c.parameters), inputs, c.masked);
    const auto naive = reference::transformer_logits(
        options, reference::cast<TypeParam>(c.parameters), inputs, c.masked);
    const auto model = transformer<TypeParam>(c);
    const auto mask = support::padding_mask(c.masked, inputs.shape[0], inputs.shape[1]);
    // How far a rounding of every weight moves the result: layer after layer multiplies it.
    constexpr auto epsilon = std::numeric_limits<TypeParam>::epsilon();
    auto rounded = reference::cast<Precise>(c.parameters);
    Random signs(seed);
    for (auto& [name, weight] : rounded)
      for (Precise& value : weight.data)
        value *= 1 + (signs.chance(0.5) ? Precise(epsilon) : -Precise(epsilon));
    const double moved = support::largest_error(
        reference::transformer_logits(options, rounded, inputs, c.masked), expected);
    const double allowed = 4 * std::max(support::largest_error(naive, expected), moved) +
                           100 * epsilon * support::largest(naive);
    const auto result = support::close(array(model.forward(token_tensor(inputs), {.mask = mask})),
                                       expected, allowed);
    if (!result) ++failures;
    EXPECT_TRUE(result) << "seed " << seed << ", " << describe(c);

    const auto loss = static_cast<double>(model.loss(token_tensor(c.tokens), {.mask = mask}));
    const auto expected_loss = static_cast<double>(
        reference::transformer_loss(options, reference::cast<Precise>(c.parameters), c.tokens,
                                    c.config.ignore_index, c.masked));
    EXPECT_NEAR(loss, expected_loss, 2 * allowed + 100 * epsilon * expected_loss)
        << "seed " << seed << ", " << describe(c);
  }
}

TYPED_TEST(Transformer, LossLeavesOutIgnoredLabels) {
  TransformerCase c = transformer_case(4);
  c.config.ignore_index = 1;  // a token that may stand in the input, too
  const auto model = transformer<TypeParam>(c);
  const auto tokens = token_tensor(c.tokens);
  const double expected =
      reference::transformer_loss(support::options(c.config), c.parameters, c.tokens, 1);
  EXPECT_NEAR(model.loss(tokens), expected, 1e3 * std::numeric_limits<TypeParam>::epsilon());
  c.config.ignore_index = -1;
  EXPECT_GT(std::abs(transformer<TypeParam>(c).loss(tokens) - expected), 1e-3)
      << "the test's tokens hold no ignored label";
}

TYPED_TEST(Transformer, OfAnEmptySequenceIsEmpty) {
  const LocalTransformer<TypeParam> model(LocalTransformerConfig{.num_tokens = 5,
                                                                 .max_seq_len = 4,
                                                                 .dim = 6,
                                                                 .depth = 1,
                                                                 .local_attn_window_size = 2,
                                                                 .dim_head = 2,
                                                                 .heads = 2});
  for (const auto& shape : std::vector<std::vector<Int>>{{2, 0}, {0, 3}, {0, 0}}) {
    const auto logits = model.forward(token_tensor(Array<Int>(shape)));
    EXPECT_EQ(array(logits).shape, (std::vector<Int>{shape[0], shape[1], 5}));
  }
}

TYPED_TEST(Transformer, GivesTheSameBitsTwiceAndForEachSequenceAlone) {
  for (std::uint64_t seed = 60; seed < 75; ++seed) {
    const TransformerCase c = transformer_case(seed);
    const auto model = transformer<TypeParam>(c);
    const Array<Int> inputs = without_last(c.tokens);
    const auto logits = model.forward(token_tensor(inputs));
    EXPECT_TRUE(support::same_bits(logits, model.forward(token_tensor(inputs))));
    const Int n = inputs.shape[1], size = n * c.config.num_tokens;
    for (Int b = 0; b < inputs.shape[0]; ++b) {
      Array<Int> one({1, n});
      std::copy_n(inputs.data.begin() + b * n, n, one.data.begin());
      const auto alone = model.forward(token_tensor(one));
      EXPECT_TRUE(std::equal(alone.data(), alone.data() + size, logits.data() + b * size))
          << "seed " << seed << ", sequence " << b;
    }
  }
}

TYPED_TEST(Transformer, TakesNewParameters) {
  const TransformerCase c = transformer_case(11);
  LocalTransformer<TypeParam> model(c.config, /*seed=*/5);
  model.set_parameters(support::transformer_parameters<TypeParam>(c.config, c.parameters));
  const auto tokens = token_tensor(without_last(c.tokens));
  EXPECT_TRUE(support::same_bits(model.forward(tokens), transformer<TypeParam>(c).forward(tokens)));
}

}  // namespace transformer_test
