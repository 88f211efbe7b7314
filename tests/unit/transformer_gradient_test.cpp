// SPDX-License-Identifier: MIT
// LocalTransformer's backward pass, and those of its parts, against central differences of the
// reference and against dual numbers.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "support/differences.hpp"
#include "support/dual.hpp"
#include "support/library.hpp"
#include "support/random_case.hpp"

namespace transformer_gradient_test {

using local_mha::Index;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::LocalTransformerParameters;
using local_mha::RowMatrix;
using local_mha::Tensor;
using local_mha::Training;
using local_mha::Vector;
using reference::Array;
using reference::Int;
using support::array;
using support::tensor;

using support::tolerance_of_differences;

template <typename Scalar>
RowMatrix<Scalar> matrix(const Array<double>& from) {
  RowMatrix<Scalar> to(from.shape.at(0), from.shape.at(1));
  for (Index i = 0; i < to.size(); ++i)
    to.data()[i] = static_cast<Scalar>(from.data[static_cast<std::size_t>(i)]);
  return to;
}

template <typename Scalar>
Array<Scalar> array_of(const RowMatrix<Scalar>& from) {
  Array<Scalar> to({from.rows(), from.cols()});
  std::copy_n(from.data(), from.size(), to.data.begin());
  return to;
}

/// `Σ weights · y`
long double weighted(const Array<long double>& y, const Array<double>& weights) {
  long double sum = 0;
  for (std::size_t i = 0; i < y.data.size(); ++i)
    sum += y.data[i] * static_cast<long double>(weights.data[i]);
  return sum;
}

LocalTransformerConfig transformer_config(Random& random) {
  LocalTransformerConfig config{.num_tokens = random.integer(3, 20),
                                .max_seq_len = random.integer(12, 40),
                                .dim = random.integer(4, 18),
                                .depth = random.integer(1, 2),
                                .local_attn_window_size = random.integer(2, 9),
                                .dim_head = 2 * random.integer(1, 4),
                                .heads = random.integer(1, 3)};
  support::pick_window_rules(random, config);
  config.ff_mult = random.pick({1.0, 2.5, 4.0});
  config.use_dynamic_pos_bias = random.chance(0.4);
  config.use_xpos = !config.use_dynamic_pos_bias && random.chance(0.5);
  if (config.use_xpos) config.xpos_scale_base = 12;
  config.qk_rmsnorm = random.chance(0.5);
  config.gate_values_per_head = random.chance(0.5);
  return config;
}

template <typename Scalar>
class TransformerGradients : public testing::Test {};
TYPED_TEST_SUITE(TransformerGradients, support::Scalars, support::ScalarNames);

TYPED_TEST(TransformerGradients, AreThoseOfRandomConfigurations) {
  for (std::uint64_t seed = 1; seed <= 12; ++seed) {
    Random random(seed);
    const auto config = transformer_config(random);
    const auto values = support::random_parameters(
        random, support::named<double>(LocalTransformerParameters<double>::zeros(config)));
    const Int batch = random.integer(1, 3), n = random.integer(1, config.max_seq_len - 1);
    Array<Int> tokens({batch, n + 1});
    for (Int& token : tokens.data) token = random.integer(0, config.num_tokens - 1);
    std::vector<unsigned char> masked;
    if (random.chance(0.5))
      for (Int i = 0; i < batch * n; ++i) masked.push_back(random.chance(0.3) ? 1 : 0);

    const LocalTransformer<TypeParam> model(
        config, support::transformer_parameters<TypeParam>(config, values));
    auto gradients = LocalTransformerParameters<TypeParam>::zeros(config);
    const auto t = tensor<std::int64_t, 2>(tokens);
    const auto mask = support::padding_mask(masked, batch, n);
    EXPECT_EQ(model.backward(gradients, t, {.mask = mask}), model.loss(t, {.mask = mask}));
    const auto parameters = reference::cast<long double>(values);
    for (const auto& [name, gradient] : support::named<TypeParam>(gradients))
      support::expect_gradient(
          random, gradient, values.at(name),
          [&, moving = name](const auto& at) {
            auto moved = parameters;
            moved[moving] = at;
            return reference::transformer_loss(support::options(config), moved, tokens, -1, masked);
          },
          // Each of two layers passes on, and adds to, what the other makes of a rounding.
          4 * tolerance_of_differences<TypeParam>, "seed " + std::to_string(seed) + ", " + name);
  }
}

TEST(TransformerGradients, AgreeWithDualNumbersInTraining) {
  using support::Dual;
  for (std::uint64_t seed = 20; seed < 32; ++seed) {
    Random random(seed);
    auto config = transformer_config(random);
    config.attn_dropout = 0.2;
    config.ff_dropout = 0.3;
    const auto values = support::random_parameters(
        random, support::named<double>(LocalTransformerParameters<double>::zeros(config)));
    Array<Int> tokens({2, 11});
    for (Int& token : tokens.data) token = random.integer(0, config.num_tokens - 1);
    const auto t = tensor<std::int64_t, 2>(tokens);
    const LocalTransformer<double> model(config,
                                         support::transformer_parameters<double>(config, values));
    auto gradients = LocalTransformerParameters<double>::zeros(config);
    model.backward(gradients, t, {.training = Training{.seed = seed}});
    const auto of_model = support::named<double>(gradients);

    auto parameters = LocalTransformerParameters<Dual>::zeros(config);
    support::Direction direction(random);
    local_mha::for_each_parameter(parameters, [&](const std::string& name, auto& weight) {
      direction.move(values.at(name), of_model.at(name), weight.data());
    });
    const LocalTransformer<Dual> dual(config, std::move(parameters));
    EXPECT_NEAR(direction.slope(),
                dual.loss(t, {.training = Training{.seed = seed}}).derivatives()(0),
                1e-10 * (1 + std::abs(direction.slope())));
  }
}

TYPED_TEST(TransformerGradients, LeaveOutLabelsThatDoNotCount) {
  LocalTransformerConfig config{.num_tokens = 6,
                                .max_seq_len = 20,
                                .dim = 8,
                                .depth = 1,
                                .local_attn_window_size = 4,
                                .dim_head = 4,
                                .heads = 2};
  config.ignore_index = 5;
  const LocalTransformer<TypeParam> model(config, 1);
  Tensor<std::int64_t, 2> tokens(1, 12);
  tokens.setConstant(5);
  tokens(0, 0) = 1;
  auto gradients = LocalTransformerParameters<TypeParam>::zeros(config);
  EXPECT_TRUE(std::isnan(static_cast<double>(model.backward(gradients, tokens))));
  for (const auto& [name, gradient] : support::named<double>(gradients))
    for (const double g : gradient.data) EXPECT_EQ(g, 0) << name;

  tokens(0, 3) = 2;
  EXPECT_EQ(model.backward(gradients, tokens), model.loss(tokens));
  // Only the tokens that the one label's position sees.
  for (Index token = 0; token < 6; ++token)
    EXPECT_EQ(gradients.token_emb.row(token).isZero(0), token != 1 && token != 5) << token;
  for (Index i = 0; i < 20; ++i) EXPECT_EQ(gradients.pos_emb.row(i).isZero(0), i > 2) << i;
}

TYPED_TEST(TransformerGradients, OfCrossEntropy) {
  Random random(3);
  const auto logits = random.array({2, 5, 7}, 3);
  Array<Int> labels({2, 5});
  for (Int& label : labels.data) label = random.integer(0, 6);
  labels(0, 1) = labels(1, 4) = -100;
  const auto gradient = local_mha::cross_entropy_gradient<TypeParam>(
      tensor<TypeParam, 3>(logits), tensor<std::int64_t, 2>(labels), -100);
  support::expect_gradient(
      random, array(gradient), logits,
      [&](const auto& at) { return reference::cross_entropy(at, labels, -100); },
      tolerance_of_differences<TypeParam>, "logits");
  for (Index c = 0; c < 7; ++c) EXPECT_EQ(gradient(0, 1, c), TypeParam(0));
  EXPECT_THROW(local_mha::cross_entropy_gradient<TypeParam>(tensor<TypeParam, 3>(logits),
                                                            tensor<std::int64_t, 2>(labels), -1),
               std::invalid_argument);
}

TYPED_TEST(TransformerGradients, OfLinear) {
  for (const Int rows : {1, 15, 16, 37, 700}) {
    Random random(static_cast<std::uint64_t>(rows));
    const Int in = random.integer(1, 40), out = random.integer(1, 40);
    const auto x = random.array({rows, in}), weight = random.array({out, in}),
               bias = random.array({out}), weights = random.array({rows, out});
    RowMatrix<TypeParam> grad_weight = RowMatrix<TypeParam>::Zero(out, in);
    Vector<TypeParam> grad_bias = Vector<TypeParam>::Zero(out);
    const auto grad_x = local_mha::linear_backward<Eigen::DefaultDevice, TypeParam>(
        {}, matrix<TypeParam>(weight), matrix<TypeParam>(x), matrix<TypeParam>(weights),
        grad_weight, &grad_bias);
    Array<TypeParam> of_bias({out});
    std::copy_n(grad_bias.data(), out, of_bias.data.begin());
    const auto loss = [&](const auto& at_x, const auto& at_weight, const auto& at_bias) {
      return weighted(reference::linear(at_x, at_weight, at_bias), weights);
    };
    const auto lx = reference::cast<long double>(x), lw = reference::cast<long double>(weight),
               lb = reference::cast<long double>(bias);
    support::expect_gradient(
        random, array_of(grad_x), x, [&](const auto& at) { return loss(at, lw, lb); },
        tolerance_of_differences<TypeParam>, "x");
    support::expect_gradient(
        random, array_of(grad_weight), weight, [&](const auto& at) { return loss(lx, at, lb); },
        tolerance_of_differences<TypeParam>, "weight");
    support::expect_gradient(
        random, of_bias, bias, [&](const auto& at) { return loss(lx, lw, at); },
        tolerance_of_differences<TypeParam>, "bias");
  }
}

TYPED_TEST(TransformerGradients, OfFeedForward) {
  for (const Int rows : {1, 16, 37, 600}) {
    Random random(static_cast<std::uint64_t>(rows));
    const Int dim = random.integer(3, 20), inner = random.integer(1, 30);
    auto zeros = local_mha::FeedForwardParameters<TypeParam>::zeros(dim, inner);
    const auto values = support::random_parameters(random, support::named<double>(zeros));
    auto parameters = zeros;
    support::assign(parameters, values);
    const local_mha::FeedForward<TypeParam> feed_forward(parameters);
    const auto x = random.array({rows, dim}), weights = random.array({rows, dim});
    typename local_mha::FeedForward<TypeParam>::Saved saved;
    const auto y = feed_forward.forward_saving(saved, matrix<TypeParam>(x));
    EXPECT_EQ(y, feed_forward.forward(matrix<TypeParam>(x)));
    const auto grad_x =
        feed_forward.backward(zeros, saved, matrix<TypeParam>(weights), matrix<TypeParam>(x));
    const auto lx = reference::cast<long double>(x);
    const auto lp = reference::cast<long double>(values);
    support::expect_gradient(
        random, array_of(grad_x), x,
        [&](const auto& at) { return weighted(reference::feed_forward(lp, at), weights); },
        tolerance_of_differences<TypeParam>, "x");
    for (const auto& [name, gradient] : support::named<TypeParam>(zeros))
      support::expect_gradient(
          random, gradient, values.at(name),
          [&, moving = name](const auto& at) {
            auto moved = lp;
            moved[moving] = at;
            return weighted(reference::feed_forward(moved, lx), weights);
          },
          tolerance_of_differences<TypeParam>, name);
  }
}

TYPED_TEST(TransformerGradients, OfDynamicPositionBias) {
  Random random(6);
  auto gradients = local_mha::DynamicPositionBiasParameters<TypeParam>::zeros(5, 3);
  const auto values = support::random_parameters(random, support::named<double>(gradients));
  auto parameters = gradients;
  support::assign(parameters, values);
  const auto weights = random.array({3, 4, 16});
  local_mha::DynamicPositionBias<TypeParam>(parameters)
      .backward(gradients, tensor<TypeParam, 3>(weights), 4, 2, 1);
  const auto lp = reference::cast<long double>(values);
  for (const auto& [name, gradient] : support::named<TypeParam>(gradients))
    support::expect_gradient(
        random, gradient, values.at(name),
        [&, moving = name](const auto& at) {
          auto moved = lp;
          moved[moving] = at;
          return weighted(reference::dynamic_position_bias(moved, 4, 2, 1), weights);
        },
        tolerance_of_differences<TypeParam>, name);
}

}  // namespace transformer_gradient_test
