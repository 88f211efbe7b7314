// SPDX-License-Identifier: MIT
// LocalMHA's backward pass against central differences of the reference, for every option, and
// against dual numbers that go through the library's own forward pass.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "support/differences.hpp"
#include "support/dual.hpp"
#include "support/library.hpp"
#include "support/random_case.hpp"

namespace layer_gradient_test {

using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalMHAParameters;
using local_mha::Tensor;
using local_mha::Training;
using reference::Array;
using reference::Int;
using support::array;
using support::tensor;

template <typename Scalar>
struct Gradients {
  Tensor<Scalar, 3> x;
  LocalMHAParameters<Scalar> parameters;
  Tensor<Scalar, 3> attn_bias;
};

template <typename Scalar>
Gradients<Scalar> gradients_of(const support::LayerCase& c, const Array<double>& weights,
                               std::optional<Training> training = {}) {
  const LocalMHA<Scalar> mha(c.config, support::layer_parameters<Scalar>(c.config, c.parameters));
  const auto x = tensor<Scalar, 3>(c.in.x);
  const auto bias = support::bias_tensor<Scalar>(c.in.bias);
  const auto view = support::optional_view(bias);
  const auto mask = support::padding_mask(c.in.masked, c.in.x.shape[0], c.in.x.shape[1]);
  // What other configurations left in them must not matter.
  static typename LocalMHA<Scalar>::Workspace workspace;
  static typename LocalMHA<Scalar>::Saved saved;
  const Eigen::DefaultDevice device;
  Tensor<Scalar, 3> y(x.dimensions());
  mha.forward_saving_into(device, y, workspace, saved, x, mask, view, training);
  EXPECT_TRUE(support::same_bits(y, mha.forward(x, mask, view, training)));
  Gradients<Scalar> g{Tensor<Scalar, 3>(), LocalMHAParameters<Scalar>::zeros(c.config), bias};
  g.attn_bias.setZero();
  g.x.resize(x.dimensions());
  mha.backward_into(device, g.x, workspace, g.parameters, saved, tensor<Scalar, 3>(weights), x,
                    mask, view, training, view ? &g.attn_bias : nullptr);
  return g;
}

template <typename Scalar>
void expect_gradients(const support::LayerCase& c, std::uint64_t seed) {
  Random random(seed);
  const auto weights = random.array(c.in.x.shape);
  const auto g = gradients_of<Scalar>(c, weights);
  const auto parameters = reference::cast<long double>(c.parameters);
  const auto in = support::cast<long double>(c.in);
  const auto options = support::options(c.config);
  const auto loss = [&](const auto& p, const auto& inputs) {
    const auto y = reference::local_mha(options, p, inputs).y;
    long double sum = 0;
    for (std::size_t i = 0; i < y.data.size(); ++i)
      sum += y.data[i] * static_cast<long double>(weights.data[i]);
    return sum;
  };
  const double largest_score =
      static_cast<double>(reference::local_mha(options, parameters, in).largest_magnitude) +
      support::largest(c.in.bias);
  const double tolerance = support::tolerance_of_differences<Scalar> * (1 + largest_score);
  // The result is as large as what the projections take in, weights being about 1.
  const double x = std::max(3e-3, support::largest(c.in.x) / 3);
  const double inner = c.config.prenorm ? 1 : x;
  const support::Sizes of_x{inner / x, inner}, of_weights{inner, inner};
  const std::string what = "seed " + std::to_string(seed) + ", " + support::describe(c.config);
  support::expect_gradient(
      random, array(g.x), c.in.x,
      [&](const auto& values) {
        auto moved = in;
        moved.x = values;
        return loss(parameters, moved);
      },
      tolerance, what + ", x", of_x);
  if (!c.in.bias.empty())
    support::expect_gradient(
        random, array(g.attn_bias), c.in.bias,
        [&](const auto& values) {
          auto moved = in;
          moved.bias = values;
          return loss(parameters, moved);
        },
        tolerance, what + ", attn_bias", of_weights);
  for (const auto& [name, gradient] : support::named<Scalar>(g.parameters))
    support::expect_gradient(
        random, gradient, c.parameters.at(name),
        [&, moving = name](const auto& values) {
          auto moved = parameters;
          moved[moving] = values;
          return loss(moved, in);
        },
        tolerance, what + ", " + name, of_weights);
}

template <typename Scalar>
class LayerGradients : public testing::Test {};
TYPED_TEST_SUITE(LayerGradients, support::Scalars, support::ScalarNames);

TYPED_TEST(LayerGradients, AreThoseOfRandomConfigurations) {
  // Differences of large inputs take long.
  std::uint64_t compared = 0;
  for (std::uint64_t seed = 1; compared < random_cases(45); ++seed) {
    const auto c = support::layer_case(seed);
    if (c.in.x.data.size() > 800 || c.in.x.empty()) continue;
    ++compared;
    expect_gradients<TypeParam>(c, seed);
  }
}

TYPED_TEST(LayerGradients, AreThoseOfLongSequences) {
  for (std::uint64_t seed = 1; seed <= 2; ++seed)
    expect_gradients<TypeParam>(support::layer_case(seed, support::Length::Long), seed);
}

// Wide heads: their gradients are added to panels of channels, several at once.
TYPED_TEST(LayerGradients, AreThoseOfWideHeads) {
  support::LayerCase c;
  c.config = {.dim = 128, .window_size = 16, .dim_head = 64, .heads = 2, .causal = true};
  c.config.prenorm = c.config.qk_rmsnorm = c.config.use_xpos = true;
  Random random(1);
  c.parameters = support::random_parameters(
      random, support::named<double>(LocalMHAParameters<double>::zeros(c.config)));
  c.in.x = random.array({1, 70, 128});
  expect_gradients<TypeParam>(c, 1);
}

TYPED_TEST(LayerGradients, AreAddedToWhatIsThere) {
  const auto c = support::layer_case(3);
  ASSERT_FALSE(c.in.x.empty());
  const LocalMHA<TypeParam> mha(c.config,
                                support::layer_parameters<TypeParam>(c.config, c.parameters));
  const auto x = tensor<TypeParam, 3>(c.in.x);
  typename LocalMHA<TypeParam>::Saved saved;
  const auto y = mha.forward_saving(saved, x);
  auto once = LocalMHAParameters<TypeParam>::zeros(c.config);
  mha.backward(once, saved, y, x);
  auto twice = once;
  mha.backward(twice, saved, y, x);
  const auto of_once = support::named<double>(once);
  for (const auto& [name, gradient] : support::named<double>(twice)) {
    auto expected = of_once.at(name);
    for (double& value : expected.data) value *= 2;
    // Each part of the positions adds its sum, to 0 or to what is there: of 2 parts that is off by
    // a rounding or two.
    const double tolerance = 4 * std::numeric_limits<TypeParam>::epsilon();
    EXPECT_TRUE(support::close(gradient, expected, tolerance * support::largest(expected))) << name;
  }
}

// The derivative of a loss along a direction, by a dual number that goes through the forward pass.
TEST(LayerGradients, AgreeWithDualNumbers) {
  using support::Dual;
  std::uint64_t compared = 0;
  for (std::uint64_t seed = 100; compared < 20; ++seed) {
    auto c = support::layer_case(seed);
    if (c.in.x.data.size() > 600 || c.in.x.data.empty()) continue;
    ++compared;
    c.config.dropout = seed % 2 == 0 ? 0.3 : 0;
    const Training training{.seed = seed};
    Random random(seed);
    const auto weights = random.array(c.in.x.shape);
    const auto g = gradients_of<double>(c, weights, training);
    support::Direction direction(random);
    Tensor<Dual, 3> x = tensor<Dual, 3>(c.in.x);
    direction.move(c.in.x, array(g.x), x.data());
    Tensor<Dual, 3> bias = support::bias_tensor<Dual>(c.in.bias);
    if (!c.in.bias.empty()) direction.move(c.in.bias, array(g.attn_bias), bias.data());
    auto parameters = LocalMHAParameters<Dual>::zeros(c.config);
    const auto of_parameters = support::named<double>(g.parameters);
    local_mha::for_each_parameter(parameters, [&](const std::string& name, auto& weight) {
      direction.move(c.parameters.at(name), of_parameters.at(name), weight.data());
    });
    const LocalMHA<Dual> mha(c.config, std::move(parameters));
    const auto y =
        mha.forward(x, support::padding_mask(c.in.masked, c.in.x.shape[0], c.in.x.shape[1]),
                    support::optional_view(bias), training);
    direction.expect_slope(y, weights,
                           "seed " + std::to_string(seed) + ", " + support::describe(c.config));
  }
}

TYPED_TEST(LayerGradients, AreZeroOfRowsThatAreMaskedThroughout) {
  auto c = support::layer_case(5);
  ASSERT_FALSE(c.in.x.empty());
  c.config.gate_values_per_head = true;
  c.config.prenorm = c.config.dim > 2;
  Random random(5);
  c.parameters = support::random_parameters(
      random, support::named<double>(LocalMHAParameters<double>::zeros(c.config)));
  c.in.masked.assign(static_cast<std::size_t>(c.in.x.shape[0] * c.in.x.shape[1]), 1);
  const auto g = gradients_of<TypeParam>(c, random.array(c.in.x.shape));
  for (Index i = 0; i < g.x.size(); ++i) EXPECT_EQ(g.x.data()[i], TypeParam(0));
  for (const auto& [name, gradient] : support::named<TypeParam>(g.parameters))
    for (const TypeParam value : gradient.data) EXPECT_EQ(value, TypeParam(0)) << name;
}

// Beside a sequence that is masked throughout, the other one has the gradients that it has alone.
TYPED_TEST(LayerGradients, AreNotReachedByASequenceThatIsMaskedThroughout) {
  support::LayerCase c;
  c.config = {.dim = 12, .window_size = 5, .dim_head = 8, .heads = 2};
  c.config.prenorm = c.config.qk_rmsnorm = c.config.use_xpos = c.config.gate_values_per_head = true;
  Random random(8);
  c.parameters = support::random_parameters(
      random, support::named<double>(LocalMHAParameters<double>::zeros(c.config)));
  const Int n = 23;
  c.in.bias = random.array({2, 5, 15});
  for (const Int masked : {0, 1}) {
    c.in.x = random.array({2, n, 12});
    c.in.masked.assign(static_cast<std::size_t>(2 * n), 0);
    std::fill_n(c.in.masked.begin() + masked * n, n, 1);
    const auto weights = random.array(c.in.x.shape);
    const auto both = gradients_of<TypeParam>(c, weights);
    const auto part = [&](const Array<double>& of_both) {
      Array<double> one({1, n, 12});
      std::copy_n(of_both.data.begin() + (1 - masked) * n * 12, n * 12, one.data.begin());
      return one;
    };
    auto alone = c;
    alone.in.x = part(c.in.x);
    alone.in.masked.clear();
    const auto expected = gradients_of<TypeParam>(alone, part(weights));
    for (Int i = 0; i < n; ++i)
      for (Int channel = 0; channel < 12; ++channel) {
        EXPECT_EQ(both.x(masked, i, channel), TypeParam(0)) << i;
        EXPECT_EQ(both.x(1 - masked, i, channel), expected.x(0, i, channel)) << i;
      }
    const double close = 20 * static_cast<double>(std::numeric_limits<TypeParam>::epsilon());
    const auto of_both = support::named<double>(both.parameters);
    for (const auto& [name, gradient] : support::named<double>(expected.parameters)) {
      EXPECT_GT(support::largest(gradient), 0) << name;
      EXPECT_TRUE(support::close(of_both.at(name), gradient, close * support::largest(gradient)))
          << name;
    }
    EXPECT_TRUE(support::same_bits(both.attn_bias, expected.attn_bias));
  }
}

// 7 heads fill as many blocks as 8: what is beyond them must not be what 8 heads left.
TYPED_TEST(LayerGradients, DoNotSeeWhatALargerLayerLeftInTheWorkspace) {
  typename LocalMHA<TypeParam>::Workspace workspace;
  typename LocalMHA<TypeParam>::Saved saved;
  const Eigen::DefaultDevice device;
  Tensor<TypeParam, 3> x(1, 20, 6), y(1, 20, 6), grad_x(1, 20, 6);
  const auto step = [&](Index heads, Index dim_head, TypeParam value) {
    LocalMHAConfig config{.dim = 6, .window_size = 4, .dim_head = dim_head, .heads = heads};
    config.gate_values_per_head = true;
    const LocalMHA<TypeParam> mha(config);
    auto gradients = LocalMHAParameters<TypeParam>::zeros(config);
    x.setConstant(value);
    mha.forward_saving_into(device, y, workspace, saved, x);
    mha.backward_into(device, grad_x, workspace, gradients, saved, x, x);
    return support::same_bits(grad_x, mha.backward(gradients, saved, x, x));
  };
  constexpr TypeParam nan = std::numeric_limits<TypeParam>::quiet_NaN();
  for (const Index heads : {8, 7})
    for (const Index dim_head : {8, 6}) {
      step(8, 8, nan);
      EXPECT_TRUE(step(heads, dim_head, TypeParam(1))) << heads << " heads of " << dim_head;
    }
}

TYPED_TEST(LayerGradients, RejectWhatDoesNotFit) {
  const LocalMHA<TypeParam> mha({.dim = 8, .window_size = 4, .dim_head = 4, .heads = 2});
  Tensor<TypeParam, 3> x(1, 10, 8), short_x(1, 9, 8), bias(2, 4, 12);
  x.setZero();
  short_x.setZero();
  bias.setZero();
  typename LocalMHA<TypeParam>::Saved saved;
  mha.forward_saving(saved, x);
  auto gradients = LocalMHAParameters<TypeParam>::zeros(mha.config());
  EXPECT_THROW(mha.backward(gradients, saved, short_x, x), std::invalid_argument);
  EXPECT_THROW(mha.backward(gradients, saved, short_x, short_x), std::invalid_argument);
  EXPECT_THROW(mha.backward(gradients, saved, x, x, {}, {}, {}, &bias), std::invalid_argument);
  typename LocalMHA<TypeParam>::Workspace workspace;
  EXPECT_THROW(
      mha.backward_into(Eigen::DefaultDevice(), short_x, workspace, gradients, saved, x, x),
      std::invalid_argument);
  // Of a layer that has other heads, or gates.
  LocalMHAConfig others[] = {mha.config(), mha.config(), mha.config()};
  others[0].heads = 4;
  others[1].dim_head = 2;
  others[2].gate_values_per_head = true;
  for (const LocalMHAConfig& other : others) {
    typename LocalMHA<TypeParam>::Saved of_other;
    LocalMHA<TypeParam>(other).forward_saving(of_other, x);
    EXPECT_THROW(mha.backward(gradients, of_other, x, x), std::invalid_argument);
    auto other_gradients = LocalMHAParameters<TypeParam>::zeros(other);
    EXPECT_THROW(LocalMHA<TypeParam>(other).backward(other_gradients, saved, x, x),
                 std::invalid_argument);
  }
  EXPECT_THROW(mha.backward(gradients, {}, x, x), std::invalid_argument);
  gradients.to_out.resize(8, 7);
  EXPECT_THROW(mha.backward(gradients, saved, x, x), std::invalid_argument);
}

}  // namespace layer_gradient_test
