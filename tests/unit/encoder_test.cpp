// SPDX-License-Identifier: MIT
// Encoder against the naive reference: layers of one configuration or of one each, residual
// streams, gradients; and what its results do not depend on.
#define EIGEN_USE_THREADS
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "reference/gradients.hpp"
#include "support/differences.hpp"
#include "support/library.hpp"
#include "support/random_encoder.hpp"

namespace encoder_test {

using local_mha::Encoder;
using local_mha::EncoderConfig;
using local_mha::EncoderParameters;
using local_mha::Index;
using local_mha::LocalMHAConfig;
using local_mha::Tensor;
using local_mha::Training;
using reference::Array;
using support::RandomEncoder;

template <typename Scalar>
class AnEncoder : public testing::Test {
 protected:
  static constexpr double epsilon = std::numeric_limits<Scalar>::epsilon();
  // Of the largest number. Hyper-connections with random weights enlarge errors.
  static constexpr double tolerance = 2e4 * epsilon;
};
TYPED_TEST_SUITE(AnEncoder, support::Scalars, support::ScalarNames);

template <typename Scalar, typename Real>
testing::AssertionResult close(const Array<Scalar>& got, const Array<Real>& expected,
                               double tolerance, double size = 0) {
  size = std::max(size, static_cast<double>(support::largest(expected)));
  return support::close(got, expected, tolerance * size);
}

TYPED_TEST(AnEncoder, GivesWhatTheReferenceGives) {
  using Precise = support::Precise<TypeParam>;
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(seed);
    const RandomEncoder c(seed);
    const auto encoder = c.encoder<TypeParam>();
    const auto options = support::options(c.config);
    const auto parameters = reference::cast<Precise>(c.parameters);
    const auto pass =
        reference::encoder_pass(options, parameters, reference::cast<Precise>(c.x), c.masked);
    const auto x = c.input<TypeParam>();
    typename Encoder<TypeParam>::Saved saved;
    const auto y = encoder.forward_saving(saved, x, {.mask = c.mask()});
    EXPECT_TRUE(close(support::array(y), pass.y, this->tolerance));
    EXPECT_TRUE(support::same_bits(encoder.forward(x, {.mask = c.mask()}), y));

    auto expected = reference::zeros_like(parameters);
    const auto of_x = reference::encoder_backward(
        options, parameters, pass, reference::cast<Precise>(c.grad_y), c.masked, expected);
    auto gradients = EncoderParameters<TypeParam>::zeros(c.config);
    const auto grad_x = encoder.backward(gradients, saved, support::tensor<TypeParam, 3>(c.grad_y));
    EXPECT_TRUE(close(support::array(grad_x), of_x, this->tolerance));
    double largest = 0;
    for (const auto& [name, gradient] : expected)
      largest = std::max(largest, static_cast<double>(support::largest(gradient)));
    const auto got = support::named<TypeParam>(gradients);
    ASSERT_EQ(got.size(), expected.size());
    for (const auto& [name, gradient] : expected)
      EXPECT_TRUE(close(got.at(name), gradient, this->tolerance, 0.1 * largest)) << name;
  }
}

EncoderConfig small(Index streams) {
  EncoderConfig config{.depth = 2, .layers = {{.dim = 6, .window_size = 3}}};
  config.layers[0].dim_head = 4;
  config.layers[0].heads = 2;
  config.layers[0].prenorm = true;
  config.layers.push_back(config.layers[0]);
  config.layers[1].causal = true;
  config.ff_mult = 2;
  config.num_residual_streams = streams;
  return config;
}

TEST(EncoderGradients, AreThoseOfDifferences) {
  for (const Index streams : {1, 4}) {
    RandomEncoder c(static_cast<std::uint64_t>(20 + streams), small(streams));
    using Real = long double;
    const auto options = support::options(c.config);
    const auto encoder = c.encoder<double>();
    Encoder<double>::Saved saved;
    encoder.forward_saving(saved, c.input<double>(), {.mask = c.mask()});
    auto gradients = EncoderParameters<double>::zeros(c.config);
    const auto grad_x = encoder.backward(gradients, saved, support::tensor<double, 3>(c.grad_y));
    const auto loss = [&](const reference::Parameters<Real>& p, const Array<Real>& x) {
      const auto y = reference::encoder(options, p, x, c.masked);
      Real sum = 0;
      for (std::size_t i = 0; i < y.data.size(); ++i)
        sum += y.data[i] * static_cast<Real>(c.grad_y.data[i]);
      return sum;
    };
    const auto p = reference::cast<Real>(c.parameters);
    const auto x = reference::cast<Real>(c.x);
    support::expect_gradient<double>(
        c.random, support::array(grad_x), c.x,
        [&](const Array<Real>& moved) { return loss(p, moved); }, 1e-9, "x");
    for (const auto& weight : support::named<double>(gradients)) {
      const std::string& name = weight.first;
      support::expect_gradient<double>(
          c.random, weight.second, c.parameters.at(name),
          [&](const Array<Real>& moved) {
            auto other = p;
            other[name] = moved;
            return loss(other, x);
          },
          1e-9, name);
    }
  }
}

TYPED_TEST(AnEncoder, GivesTheSameBitsOnAnyNumberOfThreads) {
  for (const Index streams : {1, 4})
    for (const Index n : {1, 40, 500}) {
      EncoderConfig config = small(streams);
      config.ff_dropout = 0.2;
      for (auto& layer : config.layers) layer.dropout = 0.1;
      const Encoder<TypeParam> encoder(config, 3);
      const auto x = support::tensor<TypeParam, 3>(Random(1).array({3, n, 6}));
      const Training training{.seed = 3};
      typename Encoder<TypeParam>::Saved saved;
      auto one = EncoderParameters<TypeParam>::zeros(config);
      const auto y = encoder.forward_saving(saved, x, {.training = training});
      const auto grad = encoder.backward(one, saved, x);
      for (const int threads : {1, 2, 3, 8}) {
        Eigen::ThreadPool pool(threads);
        const Eigen::ThreadPoolDevice device(&pool, threads);
        EXPECT_TRUE(
            support::same_bits(encoder.forward(x, {.training = training, .device = device}), y));
        auto many = EncoderParameters<TypeParam>::zeros(config);
        typename Encoder<TypeParam>::Saved other;
        EXPECT_TRUE(support::same_bits(
            encoder.forward_saving(other, x, {.training = training, .device = device}), y));
        EXPECT_TRUE(support::same_bits(encoder.backward(many, other, x, device), grad));
        const auto expected = support::named<TypeParam>(one);
        for (const auto& [name, gradient] : support::named<TypeParam>(many))
          EXPECT_EQ(gradient.data, expected.at(name).data) << name;
      }
    }
}

TYPED_TEST(AnEncoder, TakesPackedSequences) {
  const Encoder<TypeParam> encoder(small(3), 3);
  const std::vector<Index> ends{0, 7, 7, 30, 31};
  const auto x = support::tensor<TypeParam, 3>(Random(1).array({1, 31, 6}));
  const auto packed = encoder.forward(x, {.cu_seqlens = ends});
  for (std::size_t s = 0; s + 1 < ends.size(); ++s) {
    const Eigen::array<Index, 3> begin{0, ends[s], 0}, size{1, ends[s + 1] - ends[s], 6};
    const Tensor<TypeParam, 3> alone = x.slice(begin, size);
    const Tensor<TypeParam, 3> part = packed.slice(begin, size);
    EXPECT_TRUE(close(support::array(part), support::array(encoder.forward(alone)), 1e-5));
  }
}

// Each part drops something else: with the same weights in both layers, the second does not repeat
// what the first one does.
TYPED_TEST(AnEncoder, DropsSomethingElseInEachLayer) {
  EncoderConfig config{.depth = 2, .layers = {{.dim = 8, .window_size = 4}}};
  config.layers[0].dim_head = 4;
  config.ff_dropout = 0.5;
  auto parameters = Encoder<TypeParam>(config, 3).parameters();
  parameters.layers[1] = parameters.layers[0];
  for (auto& layer : parameters.layers) layer.attention.to_out.setZero();
  const Encoder<TypeParam> encoder(config, parameters);
  const auto x = support::tensor<TypeParam, 3>(Random(1).array({1, 20, 8}));
  const Training training{.seed = 7};
  const auto y = encoder.forward(x, {.training = training});
  EXPECT_TRUE(support::same_bits(encoder.forward(x, {.training = training}), y));
  EXPECT_FALSE(support::same_bits(encoder.forward(x, {.training = Training{.seed = 8}}), y));
  // By hand, with the seeds of the parts.
  using Rows = Eigen::Map<local_mha::RowMatrix<TypeParam>>;
  local_mha::RowMatrix<TypeParam> rows =
      Eigen::Map<const local_mha::RowMatrix<TypeParam>>(x.data(), 20, 8);
  const local_mha::FeedForward<TypeParam> feed_forward(parameters.layers[0].feed_forward, 0.5);
  local_mha::RowMatrix<TypeParam> same = rows;
  for (const std::uint64_t part : {1U, 3U}) {
    rows += feed_forward.forward(rows, {.training = training.of_part(part)});
    same += feed_forward.forward(same, {.training = training.of_part(1)});
  }
  Tensor<TypeParam, 3> expected = y;
  Rows(expected.data(), 20, 8) = rows;
  EXPECT_TRUE(support::same_bits(expected, y));
  EXPECT_NE(rows, same);
}

TYPED_TEST(AnEncoder, OfNoLayersAddsItsStreamsUp) {
  EncoderConfig config{.depth = 0, .layers = {{.dim = 8, .window_size = 4}}};
  const auto x = support::tensor<TypeParam, 3>(Random(1).array({1, 5, 8}));
  EXPECT_TRUE(support::same_bits(Encoder<TypeParam>(config).forward(x), x));
  config.num_residual_streams = 2;
  const Encoder<TypeParam> encoder(config);
  typename Encoder<TypeParam>::Saved saved;
  const Tensor<TypeParam, 3> twice = TypeParam(2) * x;
  EXPECT_TRUE(support::same_bits(encoder.forward_saving(saved, x), twice));
  auto none = encoder.parameters();
  EXPECT_TRUE(support::same_bits(encoder.backward(none, saved, x), twice));
}

TYPED_TEST(AnEncoder, IsCopiedAndGetsOtherWeights) {
  const auto x = support::tensor<TypeParam, 3>(Random(1).array({2, 9, 6}));
  Encoder<TypeParam> encoder(small(2), 1);
  const Encoder<TypeParam> copy = encoder;
  const auto before = encoder.forward(x);
  encoder.set_parameters(Encoder<TypeParam>(small(2), 2).parameters());
  EXPECT_TRUE(support::same_bits(copy.forward(x), before));
  EXPECT_FALSE(support::same_bits(encoder.forward(x), before));
  // What the other weights kept is not these weights'.
  typename Encoder<TypeParam>::Saved saved;
  copy.forward_saving(saved, x);
  auto gradients = EncoderParameters<TypeParam>::zeros(small(2));
  EXPECT_THROW(encoder.backward(gradients, saved, x), std::invalid_argument);
  for (const auto& [name, gradient] : support::named<TypeParam>(gradients))
    EXPECT_EQ(support::largest(gradient), 0) << name;
}

// With streams that only repeat, an encoder is one with plain connections.
TEST(EncoderCalls, OfBadSegmentsWriteNothing) {
  for (const Index depth : {0, 1}) {
    EncoderConfig config = small(2);
    config.depth = depth;
    config.layers.resize(1);
    const Encoder<float> encoder(config);
    Tensor<float, 3> x(1, 5, 6), y(1, 5, 6);
    x.setZero();
    y.setConstant(7);
    Encoder<float>::Workspace workspace;
    const std::vector<Index> cuts{0, 9};
    EXPECT_THROW(encoder.forward_into(y, workspace, x, {.cu_seqlens = cuts}),
                 std::invalid_argument);
    EXPECT_EQ(y(0, 0, 0), 7);
  }
}

TEST(EncoderStreams, ThatAreNewGiveWhatOneGives) {
  EncoderConfig config = small(1);
  const auto plain = Encoder<double>(config, 5);
  config.num_residual_streams = 4;
  const auto streams = Encoder<double>(config, 5);
  const auto x = support::tensor<double, 3>(Random(1).array({1, 9, 6}));
  Tensor<double, 3> four = plain.forward(x);
  four = 4.0 * four;
  EXPECT_TRUE(close(support::array(streams.forward(x)), support::array(four), 1e-13));
}

TEST(EncoderTraining, OfStreamsLowersTheLoss) {
  EncoderConfig config = small(4);
  Encoder<double> encoder(config, 1);
  auto parameters = encoder.parameters();
  auto gradients = EncoderParameters<double>::zeros(config);
  local_mha::AdamW optimizer({.weight_decay = 0.01}, parameters);
  const auto x = support::tensor<double, 3>(Random(1).array({2, 20, 6}));
  const auto target = support::tensor<double, 3>(Random(2).array({2, 20, 6}));
  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    local_mha::set_zero(gradients);
    Encoder<double>::Saved saved;
    const auto y = encoder.forward_saving(saved, x);
    Tensor<double, 3> grad = y - target;
    const Tensor<double, 0> sum = grad.square().sum();
    last = sum(0);
    if (step == 0) first = last;
    grad = 2.0 * grad;
    encoder.backward(gradients, saved, grad);
    local_mha::clip_gradients(gradients, 1.0);
    optimizer.step(parameters, gradients, 1e-2);
    encoder.set_parameters(parameters);
  }
  EXPECT_LT(last, 0.5 * first);
  // The connections learn, too.
  const auto& connection = *parameters.layers[0].attention_connection;
  EXPECT_NE(connection.alpha_scale(0), 0.01);
  EXPECT_GT(connection.alpha_fn.norm(), 0);
  EXPECT_GT(connection.norm_gamma.norm(), 0);
}

}  // namespace encoder_test
