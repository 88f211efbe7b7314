// SPDX-License-Identifier: MIT
// LocalTransformer's backward pass, and those of its parts, against central differences of the
// reference and against dual numbers.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <utility>
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

// ---- layers with options that the model has no members for

/// One that all layers share, layers that alternate, and such as see ahead.
std::vector<LocalTransformerConfig> configs_with_layers() {
  using local_mha::LocalMHAConfig;
  LocalTransformerConfig model{.num_tokens = 11, .max_seq_len = 50, .dim = 12, .depth = 2};
  model.ff_mult = 2;

  LocalMHAConfig shared = layer_config(model);
  shared.window_size = 0;
  shared.dim_head = 6;
  shared.heads = 4;
  shared.kv_heads = 2;
  shared.token_window = {3, 0};
  shared.sinks = shared.relative_bias = shared.qkv_bias = shared.out_bias = true;
  shared.qk_norm.kind = local_mha::QkNormKind::rms;
  shared.norm = {.kind = local_mha::NormKind::rms, .eps = 1e-6};
  shared.rotary = {.theta = 100,
                   .rotary_dim = 4,
                   .pairing = local_mha::RotaryPairing::interleaved,
                   .factor = 1.2};
  shared.scale = 0.3;
  shared.score.soft_cap = 2;

  LocalMHAConfig slopes{.dim = 12, .dim_head = 5, .heads = 3, .causal = true};
  slopes.use_rotary_pos_emb = false;
  slopes.token_window = {5, 0};
  slopes.score.alibi_slopes = {0.5, 0.25, 0.125};
  slopes.qk_norm.kind = local_mha::QkNormKind::rms_all;
  slopes.sinks = true;
  slopes.first_keys = 2;
  LocalMHAConfig buckets{.dim = 12, .window_size = 4, .dim_head = 4, .heads = 2, .causal = true};
  buckets.prenorm = buckets.gate_values_per_head = buckets.use_xpos = true;
  buckets.exact_windowsize = false;
  LocalMHAConfig ahead = shared;
  ahead.causal = ahead.prenorm = false;
  ahead.token_window = {2, 3};

  std::vector<LocalTransformerConfig> configs(3, model);
  configs[0].layers = {shared};
  configs[1].layers = {slopes, buckets};
  configs[1].num_residual_streams = 2;
  configs[2].layers = {ahead, slopes};
  return configs;
}

TEST(TransformerGradients, OfLayersWithAllTheirOptions) {
  Random random(77);
  for (LocalTransformerConfig config : configs_with_layers()) {
    // The reference takes functions of scores beside its options: see the next test.
    for (local_mha::LocalMHAConfig& layer : config.layers) layer.score = {};
    const auto what = "layers " + std::to_string(config.layers.size());
    const auto values = support::random_parameters(
        random, support::named<double>(LocalTransformerParameters<double>::zeros(config)));
    Array<Int> tokens({1, 17});
    for (Int& token : tokens.data) token = random.integer(0, config.num_tokens - 1);
    std::vector<unsigned char> masked;
    for (Int i = 0; i < 16; ++i) masked.push_back(random.chance(0.2) ? 1 : 0);
    const auto t = tensor<std::int64_t, 2>(tokens);
    const auto mask = support::padding_mask(masked, 1, 16);
    Array<Int> inputs({1, 16});
    for (Int i = 0; i < 16; ++i) inputs(0, i) = tokens(0, i);

    const LocalTransformer<double> model(config,
                                         support::transformer_parameters<double>(config, values));
    const auto input = tensor<std::int64_t, 2>(inputs);
    const Tensor<double, 3> logits = model.forward(input, {.mask = mask});
    const auto parameters = reference::cast<long double>(values);
    const auto options = support::options(config);
    EXPECT_LT(
        support::largest_error(reference::cast<long double>(array(logits)),
                               reference::transformer_logits(options, parameters, inputs, masked)),
        1e-11)
        << what;
    auto gradients = LocalTransformerParameters<double>::zeros(config);
    EXPECT_EQ(model.backward(gradients, t, {.mask = mask}), model.loss(t, {.mask = mask}));
    const auto of_model = support::named<double>(gradients);
    for (const auto& [name, gradient] : of_model)
      support::expect_gradient(
          random, gradient, values.at(name),
          [&, moving = name](const auto& at) {
            auto moved = parameters;
            moved[moving] = at;
            return reference::transformer_loss(options, moved, tokens, -1, masked);
          },
          4 * tolerance_of_differences<double>, what + ", " + name);
  }
}

TEST(TransformerGradients, AreThoseOfEmbeddingsAnEncoderAndLogits) {
  const auto rows = [](auto& t) {
    return Eigen::Map<RowMatrix<double>>(const_cast<double*>(t.data()), t.dimension(1),
                                         t.dimension(2));
  };
  Random random(78);
  for (const LocalTransformerConfig& config : configs_with_layers()) {
    const auto p = support::transformer_parameters<double>(
        config,
        support::random_parameters(
            random, support::named<double>(LocalTransformerParameters<double>::zeros(config))));
    const LocalTransformer<double> model(config, p);
    const local_mha::Encoder<double> encoder(
        {.depth = config.depth,
         .layers = config.layers,
         .ff_mult = config.ff_mult,
         .num_residual_streams = config.num_residual_streams},
        static_cast<const local_mha::EncoderParameters<double>&>(p));
    const Index n = 37, dim = config.dim;
    Tensor<std::int64_t, 2> input(1, n), labels(1, n);
    Tensor<double, 3> x(1, n, dim);
    for (Index i = 0; i < n; ++i) {
      input(0, i) = random.integer(0, config.num_tokens - 1);
      labels(0, i) = random.integer(0, config.num_tokens - 1);
      rows(x).row(i) = p.token_emb.row(input(0, i)) + p.pos_emb.row(i);
    }
    auto wanted = LocalTransformerParameters<double>::zeros(config);
    local_mha::Encoder<double>::Saved saved;
    const Tensor<double, 3> y = encoder.forward_saving(saved, x);
    const local_mha::LayerNorm<double> norm(p.to_logits_norm_weight, p.to_logits_norm_bias);
    const RowMatrix<double> normed = norm.forward(rows(y));
    Tensor<double, 3> logits(1, n, config.num_tokens);
    rows(logits) = normed * p.to_logits.transpose();
    const Tensor<double, 3> got = model.forward(input);
    EXPECT_LT(support::largest_error(array(got), array(logits)), 1e-12);

    // Bit by bit, and with what another stream goes on with.
    LocalTransformer<double>::Stream first(model), second(model);
    Index out = 0;
    const auto take = [&](const Tensor<double, 3>& part) {
      for (Index i = 0; i < part.dimension(1); ++i, ++out)
        for (Index c = 0; c < config.num_tokens; ++c)
          EXPECT_NEAR(part(0, i, c), logits(0, out, c), 1e-11) << out;
    };
    for (Index i = 0, some = 1; i < n; i += some, some = some % 7 + 2) {
      some = std::min(some, n - i);
      Tensor<std::int64_t, 2> chunk(1, some);
      for (Index j = 0; j < some; ++j) chunk(0, j) = input(0, i + j);
      std::stringstream state;
      first.save(state);
      second.load(state);
      take(second.push(chunk));
      std::swap(first, second);
    }
    take(first.flush());
    EXPECT_EQ(out, n);

    const Tensor<double, 3> grad_logits =
        local_mha::cross_entropy_gradient<double>(logits, labels, -1);
    const RowMatrix<double> of_logits = rows(grad_logits);
    wanted.to_logits = of_logits.transpose() * normed;
    Tensor<double, 3> grad_y(1, n, dim);
    rows(grad_y) = norm.backward(of_logits * p.to_logits, rows(y), wanted.to_logits_norm_weight,
                                 wanted.to_logits_norm_bias);
    const Tensor<double, 3> grad_x = encoder.backward(wanted, saved, grad_y);
    for (Index i = 0; i < n; ++i) {
      wanted.token_emb.row(input(0, i)) += rows(grad_x).row(i);
      wanted.pos_emb.row(i) += rows(grad_x).row(i);
    }
    auto gradients = LocalTransformerParameters<double>::zeros(config);
    model.backward(gradients, input, labels);
    const auto of_model = support::named<double>(gradients);
    for (const auto& [name, gradient] : support::named<double>(wanted))
      EXPECT_LT(support::largest_error(gradient, of_model.at(name)),
                1e-12 * (1 + support::largest(gradient)))
          << name;
  }
}

TEST(TransformerStreams, RefuseTheStateOfLayersWithOtherOptions) {
  const auto save = [](const LocalTransformerConfig& config) {
    std::stringstream state;
    LocalTransformer<double>::Stream(LocalTransformer<double>{config}).save(state);
    return state;
  };
  for (const LocalTransformerConfig& config : configs_with_layers()) {
    LocalTransformer<double>::Stream stream(LocalTransformer<double>{config});
    auto same = save(config);
    stream.load(same);
    for (std::size_t i = 0; i < config.layers.size(); ++i) {
      auto other = config;
      other.layers[i].sinks = !other.layers[i].sinks;
      auto of_sinks = save(other);
      EXPECT_THROW(stream.load(of_sinks), std::invalid_argument) << i;
      other = config;
      other.layers[i].scale = 0.7;
      auto of_scale = save(other);
      EXPECT_THROW(stream.load(of_scale), std::invalid_argument) << i;
    }
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
