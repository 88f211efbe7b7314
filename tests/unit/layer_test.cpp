// SPDX-License-Identifier: MIT
// LocalMHA against the naive reference, over random configurations.
#include <gtest/gtest.h>

#include <optional>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace layer_test {

using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::Tensor;
using reference::Int;
using support::array;
using support::layer_case;
using support::LayerCase;
using support::Length;
using support::tensor;

template <typename Scalar>
LocalMHA<Scalar> layer(const LayerCase& c) {
  return LocalMHA<Scalar>(c.config, support::layer_parameters<Scalar>(c.config, c.parameters));
}

template <typename Scalar>
Tensor<Scalar, 3> forward(const LayerCase& c) {
  const auto x = tensor<Scalar, 3>(c.in.x);
  const auto bias = support::bias_tensor<Scalar>(c.in.bias);
  return layer<Scalar>(c).forward(
      x, support::padding_mask(c.in.masked, c.in.x.shape[0], c.in.x.shape[1]),
      support::optional_view(bias));
}

template <typename Real>
reference::LayerResult<Real> expected(const LayerCase& c) {
  auto options = support::options(c.config);
  options.attention.probabilities = true;
  return reference::local_mha(options, reference::cast<Real>(c.parameters),
                              support::cast<Real>(c.in));
}

template <typename Scalar>
class Layer : public testing::Test {};
TYPED_TEST_SUITE(Layer, support::Scalars, support::ScalarNames);

template <typename Scalar>
void expect_the_reference(Length length, std::uint64_t cases) {
  int failures = 0;
  for (std::uint64_t seed = 1; seed <= random_cases(cases) && failures < 5; ++seed) {
    const LayerCase c = layer_case(seed, length);
    const auto precise = expected<support::Precise<Scalar>>(c);
    const auto naive = expected<Scalar>(c);
    const auto result = support::close(
        array(forward<Scalar>(c)), precise.y,
        support::tolerance<Scalar>(
            support::largest_error(naive.y, precise.y),
            std::max<double>(c.size(), support::largest(naive.y)),
            static_cast<double>(precise.largest_magnitude) + support::largest(c.in.bias)));
    if (!result) ++failures;
    EXPECT_TRUE(result) << "seed " << seed << ", N " << c.in.x.shape[1] << ", "
                        << support::describe(c.config);
  }
}

TYPED_TEST(Layer, EqualsTheReferenceForRandomConfigurations) {
  expect_the_reference<TypeParam>(Length::Short, 2000);
}

TYPED_TEST(Layer, EqualsTheReferenceForRandomConfigurationsOfLongerSequences) {
  expect_the_reference<TypeParam>(Length::Long, 60);
}

TYPED_TEST(Layer, ProbabilitiesEqualTheReference) {
  int failures = 0;
  for (std::uint64_t seed = 1; seed <= 200 && failures < 5; ++seed) {
    const LayerCase c = layer_case(seed);
    const auto precise = expected<support::Precise<TypeParam>>(c);
    const auto naive = expected<TypeParam>(c);
    const auto x = tensor<TypeParam, 3>(c.in.x);
    const auto bias = support::bias_tensor<TypeParam>(c.in.bias);
    const auto probabilities = layer<TypeParam>(c).attention_probabilities(
        x, support::padding_mask(c.in.masked, c.in.x.shape[0], c.in.x.shape[1]),
        support::optional_view(bias));
    const auto result = support::close(
        array(probabilities), precise.probabilities,
        support::tolerance<TypeParam>(
            support::largest_error(naive.probabilities, precise.probabilities), 1,
            static_cast<double>(precise.largest_magnitude) + support::largest(c.in.bias)));
    if (!result) ++failures;
    EXPECT_TRUE(result) << "seed " << seed << ", N " << c.in.x.shape[1] << ", "
                        << support::describe(c.config);
  }
}

TYPED_TEST(Layer, OfAnEmptySequenceOrBatchIsEmpty) {
  const LocalMHA<TypeParam> mha(LocalMHAConfig{.dim = 6, .window_size = 4, .dim_head = 4});
  for (const auto& shape : std::vector<std::vector<Int>>{{2, 0, 6}, {0, 3, 6}, {0, 0, 6}}) {
    const auto x = tensor<TypeParam, 3>(reference::Array<double>(shape));
    EXPECT_EQ(array(mha.forward(x)).shape, shape);
    EXPECT_EQ(array(mha.attention_probabilities(x)).shape,
              (std::vector<Int>{shape[0], 8, shape[1], shape[1]}));
  }
}

TYPED_TEST(Layer, GivesTheSameBitsTwiceAndForAMapOfItsInput) {
  for (std::uint64_t seed = 30; seed < 50; ++seed) {
    const LayerCase c = layer_case(seed);
    const auto mha = layer<TypeParam>(c);
    auto x = tensor<TypeParam, 3>(c.in.x);
    const auto y = mha.forward(x);
    EXPECT_TRUE(support::same_bits(y, mha.forward(x)));
    EXPECT_TRUE(support::same_bits(y, LocalMHA<TypeParam>(mha).forward(x))) << "a copy";
    const Eigen::TensorMap<Tensor<TypeParam, 3>> map(x.data(), x.dimensions());
    EXPECT_TRUE(support::same_bits(y, mha.forward(map)));
    const Eigen::TensorMap<const Tensor<TypeParam, 3>> const_map(x.data(), x.dimensions());
    EXPECT_TRUE(support::same_bits(y, mha.forward(const_map)));
  }
}

TYPED_TEST(Layer, OfEachSequenceIsThatOfItAlone) {
  for (std::uint64_t seed = 100; seed < 140; ++seed) {
    const LayerCase c = layer_case(seed);
    const auto together = array(forward<TypeParam>(c));
    const Int n = c.in.x.shape[1], size = n * c.config.dim;
    for (Int b = 0; b < c.in.x.shape[0]; ++b) {
      LayerCase one = c;
      one.in.x = reference::Array<double>({1, n, c.config.dim});
      std::copy_n(c.in.x.data.begin() + b * size, size, one.in.x.data.begin());
      if (!c.in.masked.empty())
        one.in.masked.assign(c.in.masked.begin() + b * n, c.in.masked.begin() + (b + 1) * n);
      const auto alone = array(forward<TypeParam>(one));
      EXPECT_TRUE(
          std::equal(alone.data.begin(), alone.data.end(), together.data.begin() + b * size))
          << "seed " << seed << ", sequence " << b;
    }
  }
}

TYPED_TEST(Layer, TakesNewParameters) {
  const LayerCase c = layer_case(9);
  LocalMHA<TypeParam> mha(c.config, /*seed=*/3);
  const auto x = tensor<TypeParam, 3>(c.in.x);
  mha.set_parameters(support::layer_parameters<TypeParam>(c.config, c.parameters));
  EXPECT_TRUE(support::same_bits(mha.forward(x), layer<TypeParam>(c).forward(x)));
  EXPECT_EQ(support::named<double>(mha.parameters()).at("to_out.weight").data,
            c.parameters.at("to_out.weight").data);
}

// Each way to call with arguments in a row is the call that has them by name.
TEST(LayerCalls, InARowAreThoseByName) {
  using Layer = LocalMHA<double>;
  LocalMHAConfig config{.dim = 6, .window_size = 5, .dim_head = 4, .heads = 2, .dropout = 0.3};
  const Layer layer(config, 1);
  Random random(2);
  const auto x = tensor<double, 3>(random.array({1, 30, 6}));
  const auto grad_y = tensor<double, 3>(random.array({1, 30, 6}));
  const auto bias = tensor<double, 3>(random.array({2, 5, 15}));
  const std::optional bias_view = local_mha::TensorView<const double, 3>(bias);
  const auto mask = local_mha::PaddingMask::from_lengths(std::vector<Index>{25}, 30);
  const local_mha::Training training{.seed = 7};
  const std::vector<Index> cuts{0, 11, 30};
  const Eigen::DefaultDevice device;
  const Layer::Call by_name{
      .mask = mask, .attn_bias = bias_view, .training = training, .cu_seqlens = cuts};

  const auto of_mask = layer.forward(x, {.mask = mask});
  const auto of_all = layer.forward(x, by_name);
  EXPECT_FALSE(support::same_bits(of_mask, of_all));
  EXPECT_TRUE(support::same_bits(layer.forward(x, mask), of_mask));
  EXPECT_TRUE(support::same_bits(layer.forward(x, mask, bias_view, training, cuts), of_all));
  EXPECT_TRUE(
      support::same_bits(layer.forward(device, x, mask, bias_view, training, cuts), of_all));
  Layer::Workspace workspace;
  Tensor<double, 3> y(1, 30, 6);
  const auto expect_all = [&](const auto& call) {
    y.setConstant(-1);
    call();
    EXPECT_TRUE(support::same_bits(y, of_all));
  };
  expect_all([&] { layer.forward_into(y, workspace, x, mask, bias_view, training, cuts); });
  expect_all([&] { layer.forward_into(device, y, workspace, x, mask, bias_view, training, cuts); });

  struct Gradients {
    Tensor<double, 3> of_x, of_bias;
    Layer::Parameters of_weights;
  };
  const auto back = [&](const Layer::Saved& saved, const auto& backward) {
    Gradients gradients{Tensor<double, 3>(1, 30, 6), Tensor<double, 3>(2, 5, 15),
                        Layer::Parameters::zeros(config)};
    gradients.of_x.setZero();
    gradients.of_bias.setZero();
    backward(gradients, saved);
    return gradients;
  };
  const auto expect_same = [](const Gradients& a, const Gradients& b) {
    EXPECT_TRUE(support::same_bits(a.of_x, b.of_x));
    EXPECT_TRUE(support::same_bits(a.of_bias, b.of_bias));
    EXPECT_EQ(a.of_weights.to_qkv, b.of_weights.to_qkv);
    EXPECT_EQ(a.of_weights.to_out, b.of_weights.to_out);
  };
  Layer::Saved saved;
  layer.forward_saving(saved, x, {.mask = mask});
  const auto gradients_of_mask = back(saved, [&](Gradients& to, const Layer::Saved& from) {
    to.of_x = layer.backward(to.of_weights, from, grad_y, x, {.mask = mask});
  });
  EXPECT_TRUE(support::same_bits(layer.forward_saving(saved, x, mask), of_mask));
  expect_same(back(saved,
                   [&](Gradients& to, const Layer::Saved& from) {
                     to.of_x = layer.backward(to.of_weights, from, grad_y, x, mask);
                   }),
              gradients_of_mask);

  layer.forward_saving(saved, x, by_name);
  const auto gradients_of_all = back(saved, [&](Gradients& to, const Layer::Saved& from) {
    to.of_x = layer.backward(to.of_weights, from, grad_y, x, by_name, &to.of_bias);
  });
  EXPECT_GT(support::largest(array(gradients_of_all.of_bias)), 0);
  const auto expect_saved = [&](const auto& call) {
    saved = {};
    y.setConstant(-1);
    call();
    EXPECT_TRUE(support::same_bits(y, of_all));
    expect_same(back(saved,
                     [&](Gradients& to, const Layer::Saved& from) {
                       to.of_x = layer.backward(to.of_weights, from, grad_y, x, mask, bias_view,
                                                training, &to.of_bias);
                     }),
                gradients_of_all);
    expect_same(back(saved,
                     [&](Gradients& to, const Layer::Saved& from) {
                       to.of_x = layer.backward(device, to.of_weights, from, grad_y, x, mask,
                                                bias_view, training, &to.of_bias);
                     }),
                gradients_of_all);
    expect_same(back(saved,
                     [&](Gradients& to, const Layer::Saved& from) {
                       layer.backward_into(device, to.of_x, workspace, to.of_weights, from, grad_y,
                                           x, mask, bias_view, training, &to.of_bias);
                     }),
                gradients_of_all);
  };
  expect_saved([&] { y = layer.forward_saving(saved, x, mask, bias_view, training, cuts); });
  expect_saved(
      [&] { y = layer.forward_saving(device, saved, x, mask, bias_view, training, cuts); });
  expect_saved([&] {
    layer.forward_saving_into(device, y, workspace, saved, x, mask, bias_view, training, cuts);
  });
}

}  // namespace layer_test
