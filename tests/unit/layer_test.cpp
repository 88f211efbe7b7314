// SPDX-License-Identifier: MIT
// LocalMHA against the naive reference, over random configurations.
#include <gtest/gtest.h>

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

}  // namespace layer_test
