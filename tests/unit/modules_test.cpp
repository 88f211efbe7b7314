// SPDX-License-Identifier: MIT
// Linear, LayerNorm and FeedForward in the dialect of the layers: tensors, devices, workspaces,
// backward passes, weights.
#define EIGEN_USE_THREADS
#include "support/allocations.hpp"  // before Eigen

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace modules_test {

using local_mha::FeedForward;
using local_mha::FeedForwardConfig;
using local_mha::Index;
using local_mha::LayerNorm;
using local_mha::LayerNormConfig;
using local_mha::Linear;
using local_mha::LinearConfig;
using local_mha::RowMatrix;
using local_mha::Tensor;
using local_mha::TensorView;
using local_mha::Training;
using support::allocations_of;

template <typename Scalar>
LinearConfig config_of(const Linear<Scalar>*) {
  return {.in_features = 6, .out_features = 5};
}
template <typename Scalar>
LayerNormConfig config_of(const LayerNorm<Scalar>*) {
  return {.dim = 6};
}
template <typename Scalar>
FeedForwardConfig config_of(const FeedForward<Scalar>*) {
  return {.dim = 6, .ff_mult = 2};
}

/// The scalar of a module.
template <typename Module>
struct ScalarOf;
template <template <typename> class Module, typename S>
struct ScalarOf<Module<S>> {
  using type = S;
};

template <typename Module>
class Modules : public testing::Test {
 protected:
  using Scalar = typename ScalarOf<Module>::type;
  using X = Tensor<Scalar, 3>;
  static auto config() { return config_of(static_cast<const Module*>(nullptr)); }

  static X rows(std::uint64_t seed, Index batch, Index seqlen, Index channels) {
    return support::tensor<Scalar, 3>(Random(seed).array({batch, seqlen, channels}));
  }

  /// Σ y ⊙ weights in double.
  static double loss(const X& y, const X& weights) {
    double sum = 0;
    for (Index i = 0; i < y.size(); ++i)
      sum += static_cast<double>(y.data()[i]) * static_cast<double>(weights.data()[i]);
    return sum;
  }

  /// Weights that are none of the first ones, so that no gradient is one by chance.
  static typename Module::Parameters some_parameters() {
    auto parameters = Module(config(), 3).parameters();
    Index i = 0;
    local_mha::for_each_parameter(parameters, [&](const std::string&, auto& tensor) {
      for (Index k = 0; k < tensor.size(); ++k)
        tensor.data()[k] += static_cast<Scalar>(0.3 * std::sin(static_cast<double>(++i)));
    });
    return parameters;
  }
};
using AllModules = testing::Types<Linear<float>, Linear<double>, LayerNorm<float>,
                                  LayerNorm<double>, FeedForward<float>, FeedForward<double>>;
TYPED_TEST_SUITE(Modules, AllModules);

TYPED_TEST(Modules, TakeTensorsAsTheyTakeRows) {
  TypeParam module(this->config(), 1);
  module.set_parameters(this->some_parameters());
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  typename TypeParam::Workspace workspace;
  for (const auto& [batch, seqlen] :
       {std::pair(1, 1), std::pair(2, 7), std::pair(3, 700), std::pair(0, 4), std::pair(2, 0)}) {
    const auto x = this->rows(1, batch, seqlen, 6);
    const auto y = module.forward(x);
    ASSERT_EQ(y.dimension(0), batch);
    ASSERT_EQ(y.dimension(1), seqlen);
    using Rows = RowMatrix<typename TestFixture::Scalar>;
    const Eigen::Map<const Rows> rows(x.data(), batch * seqlen, 6);
    const Rows expected = module.forward(rows);
    ASSERT_EQ(y.dimension(2), expected.cols());
    EXPECT_EQ(Rows(Eigen::Map<const Rows>(y.data(), expected.rows(), expected.cols())), expected);
    EXPECT_TRUE(support::same_bits(module.forward(x, {.device = device}), y));
    Tensor<typename TestFixture::Scalar, 3> into = y;
    into.setConstant(NAN);
    module.forward_into(into, workspace, x);
    EXPECT_TRUE(support::same_bits(into, y));
    into.setConstant(NAN);
    module.forward_into(into, workspace, x, {.device = device});
    EXPECT_TRUE(support::same_bits(into, y));
    typename TypeParam::Saved saved;
    EXPECT_TRUE(support::same_bits(module.forward_saving(saved, x), y));
    EXPECT_TRUE(support::same_bits(module.forward_saving(saved, x, {.device = device}), y));
  }
}

TYPED_TEST(Modules, AllocateNothingWhenRepeated) {
  const TypeParam module(this->config(), 1);
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  typename TypeParam::Workspace workspace;
  auto y = module.forward(this->rows(1, 2, 900, 6));
  bool is_first = true;
  for (const Index seqlen : {900, 900, 30, 900}) {
    const auto x = this->rows(1, 2, seqlen, 6);
    const TensorView<typename TestFixture::Scalar, 3> to(y.data(), {2, seqlen, y.dimension(2)});
    if (std::exchange(is_first, false)) module.forward_into(to, workspace, x, {.device = device});
    EXPECT_EQ(allocations_of([&] { module.forward_into(to, workspace, x); }), 0);
    EXPECT_EQ(allocations_of([&] { module.forward_into(to, workspace, x, {.device = device}); }),
              0);
  }
}

TYPED_TEST(Modules, HaveTheGradientsOfTheirFormulas) {
  if (std::is_same_v<typename TestFixture::Scalar, float>) return;  // differences need digits
  auto parameters = this->some_parameters();
  TypeParam module(this->config());
  module.set_parameters(parameters);
  auto x = this->rows(1, 2, 9, 6);
  typename TypeParam::Saved saved;
  const auto y = module.forward_saving(saved, x);
  const auto weights = this->rows(2, 2, 9, y.dimension(2));
  auto gradients = TypeParam::Parameters::zeros(this->config());
  const auto grad_x = module.backward(gradients, saved, weights, x);
  constexpr double h = 1e-6;
  const auto expect_slope = [&](double got, auto&& set, const std::string& what) {
    set(h);
    const double above = this->loss(module.forward(x), weights);
    set(-h);
    const double below = this->loss(module.forward(x), weights);
    set(0);
    EXPECT_NEAR(got, (above - below) / (2 * h), 1e-7 * (1 + std::abs(got))) << what;
  };
  for (Index i = 0; i < x.size(); i += 7) {
    const auto before = x.data()[i];
    expect_slope(
        static_cast<double>(grad_x.data()[i]),
        [&](double by) { x.data()[i] = before + static_cast<typename TestFixture::Scalar>(by); },
        "x " + std::to_string(i));
  }
  std::vector<const typename TestFixture::Scalar*> of;
  local_mha::for_each_parameter(gradients,
                                [&](const std::string&, auto& g) { of.push_back(g.data()); });
  std::size_t place = 0;
  local_mha::for_each_parameter(parameters, [&](const std::string& name, auto& tensor) {
    for (Index i = 0; i < tensor.size(); ++i) {
      const auto before = tensor.data()[i];
      expect_slope(
          static_cast<double>(of[place][i]),
          [&](double by) {
            tensor.data()[i] = before + static_cast<typename TestFixture::Scalar>(by);
            module.set_parameters(parameters);
          },
          name);
    }
    ++place;
  });
}

TYPED_TEST(Modules, AddTheSameGradientsOnThreads) {
  const TypeParam module(this->config(), 1);
  const auto x = this->rows(1, 3, 500, 6);
  typename TypeParam::Saved saved;
  const auto y = module.forward_saving(saved, x);
  auto alone = TypeParam::Parameters::zeros(this->config());
  auto on_threads = alone;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  EXPECT_TRUE(support::same_bits(module.backward(alone, saved, y, x),
                                 module.backward(on_threads, saved, y, x, {.device = device})));
  const auto expected = support::named<typename TestFixture::Scalar>(alone);
  for (const auto& [name, tensor] : support::named<typename TestFixture::Scalar>(on_threads)) {
    EXPECT_EQ(tensor.data, expected.at(name).data) << name;
    EXPECT_GT(support::largest(tensor), 0) << name;
  }
  // They are added to.
  module.backward(on_threads, saved, y, x);
  for (const auto& [name, tensor] : support::named<typename TestFixture::Scalar>(on_threads))
    EXPECT_NEAR(tensor.data[0] / expected.at(name).data[0], 2, 1e-5) << name;
}

TYPED_TEST(Modules, KnowTheirCallsAgain) {
  TypeParam module(this->config(), 1);
  const auto x = this->rows(1, 2, 9, 6);
  const auto other = this->rows(2, 2, 9, 6);
  typename TypeParam::Saved saved;
  auto gradients = TypeParam::Parameters::zeros(this->config());
  const auto y = module.forward(x);
  EXPECT_THROW(module.backward(gradients, saved, y, x), std::invalid_argument);
  module.forward_saving(saved, x);
  EXPECT_THROW(module.backward(gradients, saved, y, other), std::invalid_argument);
  EXPECT_THROW(module.backward(gradients, saved, y, this->rows(1, 1, 9, 6)), std::invalid_argument);
  EXPECT_THROW(module.backward(gradients, saved, this->rows(1, 2, 8, y.dimension(2)), x),
               std::invalid_argument);
  typename TypeParam::Parameters empty;
  EXPECT_THROW(module.backward(empty, saved, y, x), std::invalid_argument);
  // A refused call leaves what another one kept.
  EXPECT_THROW(module.forward_saving(saved, this->rows(1, 2, 9, 7)), std::invalid_argument);
  auto unused = gradients;
  EXPECT_NO_THROW(module.backward(unused, saved, y, x));
  module.set_parameters(this->some_parameters());
  EXPECT_THROW(module.backward(gradients, saved, y, x), std::invalid_argument);
  for (const auto& [name, tensor] : support::named<typename TestFixture::Scalar>(gradients))
    EXPECT_EQ(support::largest(tensor), 0) << name;
}

TYPED_TEST(Modules, GiveTheirWeightsBack) {
  TypeParam module(this->config(), 1);
  const auto given = this->some_parameters();
  module.set_parameters(given);
  const TypeParam copy = module;
  const auto x = this->rows(1, 2, 9, 6);
  const auto y = module.forward(x);
  const auto expected = support::named<typename TestFixture::Scalar>(given);
  const auto back = module.parameters();
  for (const auto& [name, tensor] : support::named<typename TestFixture::Scalar>(back))
    EXPECT_EQ(tensor.data, expected.at(name).data) << name;
  // What does not fit changes nothing.
  EXPECT_THROW(module.set_parameters({}), std::invalid_argument);
  EXPECT_TRUE(support::same_bits(module.forward(x), y));
  module.set_parameters(TypeParam(this->config(), 7).parameters());
  EXPECT_FALSE(support::same_bits(module.forward(x), y));
  EXPECT_TRUE(support::same_bits(copy.forward(x), y));
}

// Other sizes than in the other tests: panels that are full and not, no bias, a single channel.
TEST(LinearModule, IsTheProductWithItsParameters) {
  for (const Index in : {1, 7, 64})
    for (const Index out : {1, 5, 24, 67})
      for (const bool bias : {false, true}) {
        const LinearConfig config{.in_features = in, .out_features = out, .bias = bias};
        const Linear<double> linear(config, 5);
        EXPECT_EQ(linear.config(), config);
        const auto p = linear.parameters();
        EXPECT_EQ(p.bias.size(), bias ? out : 0);
        const RowMatrix<double> x = RowMatrix<double>::Random(20, in);
        RowMatrix<double> y = x * p.weight.transpose();
        if (bias) y.rowwise() += p.bias.transpose();
        EXPECT_TRUE(linear.forward(x).isApprox(y, 1e-13));
        std::vector<std::string> names;
        local_mha::for_each_parameter(
            p, [&](const std::string& name, const auto&) { names.push_back(name); });
        EXPECT_EQ(names.size(), bias ? 2U : 1U);
        EXPECT_EQ(names[0], "weight");
        // Uniform in ±1/√in, the bias too.
        const double bound = 1 / std::sqrt(static_cast<double>(in));
        EXPECT_LE(p.weight.cwiseAbs().maxCoeff(), bound);
        if (in * out > 400) {
          EXPECT_GT(p.weight.maxCoeff(), 0.97 * bound);
          EXPECT_LT(p.weight.minCoeff(), -0.97 * bound);
          EXPECT_NEAR(p.weight.mean(), 0, 4 * bound / std::sqrt(3.0 * double(in * out)));
        }
        if (bias) {
          EXPECT_LE(p.bias.cwiseAbs().maxCoeff(), bound);
          EXPECT_GT(p.bias.cwiseAbs().maxCoeff(), 0);
        }
        if (in > 1) {
          EXPECT_NE(p.weight, Linear<double>(config, 6).parameters().weight);
        }
        EXPECT_EQ(p.weight, Linear<double>(config, 5).parameters().weight);
      }
}

// So few that each is looked at.
TEST(LinearModule, KnowsItsCallAgainByEachOfItsWeights) {
  Linear<double> linear({.in_features = 2, .out_features = 3}, 1);
  Tensor<double, 3> x(1, 4, 2);
  x.setRandom();
  Linear<double>::Saved saved;
  const auto y = linear.forward_saving(saved, x);
  const auto parameters = linear.parameters();
  auto gradients = local_mha::LinearParameters<double>::zeros(linear.config());
  for (Index i = 0; i < 9; ++i) {
    auto other = parameters;
    if (i < 6)
      other.weight.data()[i] += 1;
    else
      other.bias[i - 6] += 1;
    linear.set_parameters(other);
    EXPECT_THROW(linear.backward(gradients, saved, y, x), std::invalid_argument) << i;
  }
  linear.set_parameters(parameters);
  EXPECT_NO_THROW(linear.backward(gradients, saved, y, x));
}

TEST(LinearModule, WithoutABiasHasNoGradientOfOne) {
  const LinearConfig config{.in_features = 3, .out_features = 2, .bias = false};
  const Linear<float> linear(config);
  Tensor<float, 3> x(1, 4, 3);
  x.setRandom();
  Linear<float>::Saved saved;
  const auto y = linear.forward_saving(saved, x);
  auto gradients = local_mha::LinearParameters<float>::zeros(config);
  linear.backward(gradients, saved, y, x);
  EXPECT_EQ(gradients.bias.size(), 0);
  EXPECT_GT(gradients.weight.norm(), 0);
  gradients.bias.setZero(2);
  EXPECT_THROW(linear.backward(gradients, saved, y, x), std::invalid_argument);
}

TEST(LayerNormModule, StartsAtOnesAndZeros) {
  const LayerNorm<float> norm({.dim = 5});
  EXPECT_EQ(norm.config(), (LayerNormConfig{.dim = 5, .eps = 1e-5}));
  EXPECT_EQ(norm.parameters().weight, local_mha::Vector<float>::Ones(5));
  EXPECT_EQ(norm.parameters().bias, local_mha::Vector<float>::Zero(5));
  LayerNorm<float> other({.dim = 5, .eps = 1});
  other.set_parameters(norm.parameters());
  EXPECT_EQ(other.config().eps, 1);
}

TEST(FeedForwardModule, DropsTheSameThereAndBack) {
  const FeedForward<double> layer({.dim = 6, .ff_mult = 4, .dropout = 0.4}, 2);
  EXPECT_EQ(layer.dim(), 6);
  EXPECT_EQ(layer.inner_dim(), 16);
  EXPECT_EQ(layer.dropout(), 0.4);
  const auto x = support::tensor<double, 3>(Random(1).array({2, 600, 6}));
  const Training training{.seed = 9};
  FeedForward<double>::Saved saved;
  const auto y = layer.forward_saving(saved, x, {.training = training});
  EXPECT_TRUE(support::same_bits(layer.forward(x, {.training = training}), y));
  EXPECT_FALSE(support::same_bits(layer.forward(x), y));
  const Eigen::Map<const RowMatrix<double>> rows(x.data(), 1200, 6), grad(y.data(), 1200, 6);
  FeedForward<double>::Saved of_rows;
  layer.forward_saving(of_rows, rows, {.training = training});
  auto expected = local_mha::FeedForwardParameters<double>::zeros(6, 16);
  const RowMatrix<double> grad_x = layer.backward(expected, of_rows, grad, rows);
  auto gradients =
      local_mha::FeedForwardParameters<double>::zeros(FeedForwardConfig{.dim = 6, .ff_mult = 4});
  const auto got = layer.backward(gradients, saved, y, x);
  EXPECT_EQ(RowMatrix<double>(Eigen::Map<const RowMatrix<double>>(got.data(), 1200, 6)), grad_x);
  EXPECT_EQ(gradients.proj_in, expected.proj_in);
  EXPECT_EQ(gradients.norm_weight, expected.norm_weight);
}

TEST(ALinear, ThatWasMovedFromIsAsItWas) {
  const local_mha::RowMatrix<float> x = local_mha::RowMatrix<float>::Random(3, 4);
  local_mha::Linear<float> linear({.in_features = 4, .out_features = 2});
  const local_mha::RowMatrix<float> y = linear.forward(x);
  const local_mha::Linear<float> other(std::move(linear));
  EXPECT_EQ(other.forward(x), y);
  EXPECT_EQ(linear.forward(x), y);  // NOLINT(bugprone-use-after-move)
}

}  // namespace modules_test
