// SPDX-License-Identifier: MIT
// Optimizer, clipping and schedule: by their formulas, and along 50 steps of PyTorch.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <local_mha/core/random.hpp>

#include "support/golden_file.hpp"
#include "support/library.hpp"
#include "support/random.hpp"

namespace training_test {

using local_mha::AdamW;
using local_mha::AdamWConfig;
using local_mha::Index;
using local_mha::LocalMHAParameters;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::LocalTransformerParameters;
using local_mha::Tensor;

const golden::Case& curve() {
  static const golden::Case file = [] {
    return golden::read(LOCAL_MHA_TEST_DATA_DIR "/training/curve.safetensors");
  }();
  return file;
}

template <typename Scalar>
class TrainingCurve : public testing::Test {
 protected:
  static constexpr bool is_float = std::is_same_v<Scalar, float>;
  static std::string name(const std::string& what) {
    return "output/" + what + (is_float ? "_float32" : "_float64");
  }
};
TYPED_TEST_SUITE(TrainingCurve, support::Scalars, support::ScalarNames);

TYPED_TEST(TrainingCurve, IsThatOfPyTorch) {
  LocalTransformerConfig config{.num_tokens = 64,
                                .max_seq_len = 48,
                                .dim = 32,
                                .depth = 2,
                                .local_attn_window_size = 12,
                                .dim_head = 16,
                                .heads = 2};
  config.use_xpos = true;
  config.xpos_scale_base = 24;
  config.qk_rmsnorm = true;
  auto parameters = LocalTransformerParameters<TypeParam>::zeros(config);
  support::assign(parameters, curve().below("param/"));
  LocalTransformer<TypeParam> model(config, parameters);
  auto gradients = LocalTransformerParameters<TypeParam>::zeros(config);
  AdamW optimizer(AdamWConfig{.beta2 = 0.99, .weight_decay = 0.1, .decay_vectors = false},
                  gradients);
  const local_mha::CosineSchedule schedule(3e-3, 3e-4, 10, 50);

  const double close = this->is_float ? 1e-4 : 1e-9;
  const auto& tokens = curve().at("input/tokens");
  for (Index step = 0; step < 50; ++step) {
    Tensor<std::int64_t, 2> input(4, 48), labels(4, 48);
    for (Index b = 0; b < 4; ++b)
      for (Index i = 0; i < 48; ++i) {
        input(b, i) = std::max<std::int64_t>(0, static_cast<std::int64_t>(tokens(step, b, i)));
        labels(b, i) = static_cast<std::int64_t>(tokens(step, b, i + 1));
      }
    local_mha::set_zero(gradients);
    const auto loss = static_cast<double>(model.backward(gradients, input, labels));
    const double norm = local_mha::clip_gradients(gradients, 1.0);
    EXPECT_NEAR(loss / curve().at(this->name("loss"))(step), 1, close) << step;
    EXPECT_NEAR(norm / curve().at(this->name("grad_norm"))(step), 1, close) << step;
    EXPECT_NEAR(schedule(step) / curve().at("input/learning_rate")(step), 1, 1e-14) << step;
    optimizer.step(parameters, gradients, schedule(step));
    model.set_parameters(parameters);
  }
  for (const auto& [name, weight] : support::named<double>(parameters)) {
    const auto& expected = curve().at(this->name("final") + "/" + name);
    EXPECT_TRUE(support::close(weight, expected,
                               (this->is_float ? 1e-3 : 1e-7) * support::largest(expected)))
        << name;
  }
}

// What PyTorch makes of single steps with its own defaults.
template <typename Scalar>
class PyTorchsFigures : public testing::Test {
 protected:
  static constexpr double tolerance = std::is_same_v<Scalar, float> ? 1e-5 : 1e-12;

  static const reference::Array<double>& at(const std::string& name) {
    static const golden::Case file =
        golden::read(LOCAL_MHA_TEST_DATA_DIR "/training/optimizer.safetensors");
    return file.at(name);
  }

  // A set of two tensors, `name_a` and `name_b`, or of one step's.
  static LocalMHAParameters<Scalar> set(const std::string& name, Index step = 0) {
    LocalMHAParameters<Scalar> p;
    p.to_qkv.resize(3, 4);
    p.norm_bias.resize(5);
    const auto fill = [step](const reference::Array<double>& from, auto& to) {
      for (Index i = 0; i < to.size(); ++i)
        to.data()[i] =
            static_cast<Scalar>(from.data[static_cast<std::size_t>(step * to.size() + i)]);
    };
    fill(at(name + "_a"), p.to_qkv);
    fill(at(name + "_b"), p.norm_bias);
    return p;
  }

  static void expect_close(const LocalMHAParameters<Scalar>& got,
                           const LocalMHAParameters<Scalar>& expected) {
    const auto of_expected = support::named<double>(expected);
    for (const auto& [name, array] : support::named<double>(got))
      EXPECT_TRUE(support::close(array, of_expected.at(name),
                                 tolerance * support::largest(of_expected.at(name))))
          << name;
  }
};
TYPED_TEST_SUITE(PyTorchsFigures, support::Scalars, support::ScalarNames);

TYPED_TEST(PyTorchsFigures, OfClippedGradients) {
  auto gradients = this->set("clip/grad");
  const double norm = local_mha::clip_gradients(gradients, this->at("clip/max_norm")(0));
  EXPECT_NEAR(norm, this->at("clip/norm")(0), this->tolerance * norm);
  this->expect_close(gradients, this->set("clip/clipped"));
  EXPECT_GT(norm, 1.1 * local_mha::global_norm(gradients));
}

TYPED_TEST(PyTorchsFigures, OfAdamWWithItsDefaults) {
  auto parameters = this->set("adamw/param");
  auto zeros = parameters;
  local_mha::set_zero(zeros);
  AdamW optimizer(AdamWConfig{}, zeros);
  for (Index step = 0; step < 5; ++step) {
    optimizer.step(parameters, this->set("adamw/grad", step), 1e-3);
    this->expect_close(parameters, this->set("adamw/after", step));
  }
}

TYPED_TEST(PyTorchsFigures, OfCrossEntropyWithIgnoredLabels) {
  const auto logits = support::tensor<TypeParam, 3>(this->at("ce/logits"));
  const auto labels = support::tensor<std::int64_t, 2>(this->at("ce/labels"));
  const double loss = this->at("ce/loss")(0);
  EXPECT_NEAR(local_mha::cross_entropy<TypeParam>(logits, labels), loss, this->tolerance * loss);
  const auto& expected = this->at("ce/grad");
  EXPECT_TRUE(
      support::close(support::array(local_mha::cross_entropy_gradient<TypeParam>(logits, labels)),
                     expected, this->tolerance * support::largest(expected)));
  // Some are ignored.
  EXPECT_EQ(std::count(this->at("ce/labels").data.begin(), this->at("ce/labels").data.end(), -1),
            3);
}

LocalMHAParameters<double> filled(double weight, double vector) {
  auto p = LocalMHAParameters<double>::zeros(
      {.dim = 3, .window_size = 2, .dim_head = 2, .heads = 1, .prenorm = true});
  p.to_qkv.setConstant(weight);
  p.to_out.setConstant(weight);
  p.norm_weight.setConstant(vector);
  p.norm_bias.setConstant(vector);
  return p;
}

TEST(AdamW, TakesTheStepsOfItsFormula) {
  auto p = filled(2, 5);
  AdamW optimizer(AdamWConfig{.beta1 = 0.8, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.1},
                  filled(0, 0));
  EXPECT_EQ(optimizer.config().beta1, 0.8);
  double w = 2, b = 5, m_w = 0, v_w = 0, m_b = 0, v_b = 0;
  const double of_w[] = {0.5, -1, 0, 3}, of_b[] = {1e-4, 2e-4, -5, 0};
  for (int t = 1; t <= 4; ++t) {
    const double lr = 0.1 * t;
    optimizer.step(p, filled(of_w[t - 1], of_b[t - 1]), lr);
    const auto formula = [&](double& x, double& m, double& v, double g) {
      x -= lr * 0.1 * x;
      m = 0.8 * m + 0.2 * g;
      v = 0.9 * v + 0.1 * g * g;
      x -= lr * (m / (1 - std::pow(0.8, t))) / (std::sqrt(v / (1 - std::pow(0.9, t))) + 1e-3);
    };
    formula(w, m_w, v_w, of_w[t - 1]);
    formula(b, m_b, v_b, of_b[t - 1]);
    EXPECT_NEAR(p.to_qkv(1, 1), w, 1e-13);
    EXPECT_NEAR(p.to_out(2, 0), w, 1e-13);
    EXPECT_NEAR(p.norm_bias[2], b, 1e-13);
  }
  EXPECT_EQ(optimizer.steps(), 4U);
}

TEST(AdamW, LeavesVectorsFromTheDecayIfAsked) {
  auto p = filled(2, 5);
  AdamW optimizer(AdamWConfig{.weight_decay = 0.5, .decay_vectors = false}, filled(0, 0));
  optimizer.step(p, filled(0, 0), 0.1);
  EXPECT_NEAR(p.to_qkv(0, 0), 2 * (1 - 0.05), 1e-15);
  EXPECT_EQ(p.norm_weight[0], 5);
}

TEST(AdamW, GoesOnFromWhatWasKept) {
  auto p = filled(2, 5);
  AdamW whole(AdamWConfig{}, filled(0, 0));
  whole.step(p, filled(1, -1), 0.1);
  auto q = p;
  AdamW resumed(AdamWConfig{}, filled(0, 0));
  resumed.restore(whole.steps(), whole.mean(), whole.square());
  whole.step(p, filled(-0.3, 2), 0.1);
  resumed.step(q, filled(-0.3, 2), 0.1);
  EXPECT_EQ(p.to_qkv, q.to_qkv);
  EXPECT_EQ(p.norm_bias, q.norm_bias);
}

TEST(AdamW, TakesAnySetOfTheShapesOfTheWeights) {
  const auto weights = filled(2, 5);
  auto of_zeros = weights, of_weights = weights, of_noise = weights;
  AdamW with_zeros(AdamWConfig{}, filled(0, 0)), with_weights(AdamWConfig{}, weights),
      with_noise(AdamWConfig{}, filled(std::nan(""), 1e300));
  for (int step = 0; step < 3; ++step) {
    with_zeros.step(of_zeros, filled(0.5, -3), 1e-3);
    with_weights.step(of_weights, filled(0.5, -3), 1e-3);
    with_noise.step(of_noise, filled(0.5, -3), 1e-3);
  }
  for (const auto* got : {&of_weights, &of_noise}) {
    EXPECT_EQ(got->to_qkv, of_zeros.to_qkv);
    EXPECT_EQ(got->norm_bias, of_zeros.norm_bias);
  }
  EXPECT_NEAR(of_weights.to_qkv(0, 0), 2 - 3e-3, 1e-4);
}

TEST(AdamW, RoundsOnceAStep) {
  Random random(1);
  const auto fill = [&](auto& p, double scale) {
    local_mha::for_each_parameter(p, [&](const std::string&, auto& tensor) {
      for (Index i = 0; i < tensor.size(); ++i)
        tensor.data()[i] = static_cast<float>(scale * random.normal());
    });
  };
  const local_mha::LocalMHAConfig config{.dim = 16, .window_size = 2, .dim_head = 4, .heads = 2};
  auto weights = LocalMHAParameters<float>::zeros(config);
  auto gradients = weights, means = weights, squares = weights;
  fill(weights, 1), fill(gradients, 1e-3), fill(means, 1e-3), fill(squares, 1e-3);
  squares.to_qkv = squares.to_qkv.cwiseAbs2().eval();
  squares.to_out = squares.to_out.cwiseAbs2().eval();
  const auto before = weights;
  AdamW optimizer(AdamWConfig{.weight_decay = 0.03}, weights);
  optimizer.restore(70, means, squares);
  const double lr = 1e-5;  // 1 - lr·weight_decay has no digits in float
  optimizer.step(weights, gradients, lr);
  for (Index i = 0; i < weights.to_qkv.size(); ++i) {
    const double g = gradients.to_qkv.data()[i];
    const double m = 0.9 * means.to_qkv.data()[i] + (1 - 0.9) * g;
    const double v = 0.999 * squares.to_qkv.data()[i] + (1 - 0.999) * g * g;
    const double step = lr / (1 - std::pow(0.9, 71));
    const double w = (1 - lr * 0.03) * static_cast<double>(before.to_qkv.data()[i]) -
                     step * m / (std::sqrt(v) / std::sqrt(1 - std::pow(0.999, 71)) + 1e-8);
    // Half a unit in the last place, of whichever binade the value lies in.
    const auto half_unit = [](double value) {
      return 0.5001 * std::numeric_limits<float>::epsilon() * std::abs(value);
    };
    EXPECT_NEAR(optimizer.mean().to_qkv.data()[i], m, half_unit(m));
    EXPECT_NEAR(optimizer.square().to_qkv.data()[i], v, half_unit(v));
    EXPECT_NEAR(weights.to_qkv.data()[i], w, half_unit(w));
  }
}

TEST(AdamW, RejectsWhatDoesNotFit) {
  for (const AdamWConfig& config :
       {AdamWConfig{.beta1 = 1}, AdamWConfig{.beta2 = -0.1}, AdamWConfig{.eps = -1},
        AdamWConfig{.weight_decay = std::nan("")}})
    EXPECT_THROW(AdamW(config, filled(0, 0)), std::invalid_argument);
  AdamW optimizer(AdamWConfig{}, filled(0, 0));
  auto p = filled(1, 1), other = filled(1, 1);
  other.to_out.resize(1, 1);
  EXPECT_THROW(optimizer.step(p, other, 0.1), std::invalid_argument);
  EXPECT_THROW(optimizer.step(p, p, -1), std::invalid_argument);
  EXPECT_EQ(optimizer.steps(), 0U);
  EXPECT_THROW(optimizer.restore(1, other, p), std::invalid_argument);
}

TEST(Clipping, ScalesToTheNormAndLeavesWhatIsBelow) {
  auto g = filled(3, -4);  // 18 + 6 weights and 6 others
  const double norm = std::sqrt(24 * 9.0 + 6 * 16.0);
  EXPECT_NEAR(local_mha::clip_gradients(g, 2.0), norm, 1e-12);
  EXPECT_NEAR(g.to_qkv(0, 0), 3 * 2 / (norm + 1e-6), 1e-12);
  EXPECT_NEAR(local_mha::global_norm(g), 2, 1e-6);
  const auto before = g;
  EXPECT_NEAR(local_mha::clip_gradients(g, 100.0), 2, 1e-6);
  EXPECT_EQ(before.norm_bias, g.norm_bias);
  EXPECT_THROW(local_mha::clip_gradients(g, 0.0), std::invalid_argument);
}

TEST(Clipping, CountsNumbersWhoseSquaresLeaveTheRangeOfDouble) {
  for (const double size : {1e-300, 1e-200, 1e-100, 1.0, 1e100, 1e200, 1e300}) {
    auto g = filled(3 * size, -4 * size);
    EXPECT_NEAR(local_mha::global_norm(g) / size, std::sqrt(24 * 9.0 + 6 * 16.0), 1e-12);
    local_mha::clip_gradients(g, 1e-3);
    EXPECT_LE(local_mha::global_norm(g), 1e-3 * (1 + 1e-12)) << size;
    EXPECT_NEAR(g.norm_bias[0] / g.to_qkv(0, 0), -4.0 / 3, 1e-12) << size;
  }
  EXPECT_EQ(local_mha::global_norm(filled(0, 0)), 0);
  auto tiny = LocalMHAParameters<float>::zeros({.dim = 2, .window_size = 2, .dim_head = 2});
  tiny.to_qkv.setConstant(1e-30F);
  EXPECT_NEAR(local_mha::global_norm(tiny) / std::sqrt(static_cast<double>(tiny.to_qkv.size())),
              1e-30, 1e-36);
  tiny.to_qkv.setConstant(1e38F);  // the norm is no float
  local_mha::clip_gradients(tiny, 1.0);
  EXPECT_NEAR(local_mha::global_norm(tiny), 1, 1e-6);
}

TEST(Clipping, LeavesGradientsThatAreNotFinite) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {std::nan(""), infinity, -infinity}) {
    auto g = filled(3, -4);
    g.to_out(1, 1) = bad;
    const double norm = local_mha::clip_gradients(g, 1e-3);
    EXPECT_FALSE(std::isfinite(norm));
    EXPECT_EQ(g.to_qkv(0, 0), 3);
    EXPECT_EQ(g.norm_bias[0], -4);
    g.norm_bias[2] = std::nan("");
    EXPECT_TRUE(std::isnan(local_mha::global_norm(g)));
  }
}

TEST(CosineSchedule, WarmsUpAndEndsAtTheLeast) {
  const local_mha::CosineSchedule rate(1, 0.1, 4, 14);
  EXPECT_EQ(rate(0), 0.25);
  EXPECT_EQ(rate(3), 1);
  EXPECT_EQ(rate(4), 1);
  EXPECT_NEAR(rate(9), 0.55, 1e-15);
  EXPECT_EQ(rate(14), 0.1);
  EXPECT_EQ(rate(1000), 0.1);
  for (Index step = 4; step < 14; ++step) EXPECT_LT(rate(step + 1), rate(step));
  EXPECT_EQ(local_mha::CosineSchedule(1, 0, 0, 0)(0), 0);
  EXPECT_THROW(local_mha::CosineSchedule(1, 2, 0, 10), std::invalid_argument);
  EXPECT_THROW(local_mha::CosineSchedule(1, 0, 11, 10), std::invalid_argument);
  EXPECT_THROW(local_mha::CosineSchedule(-1, 0, 0, 10), std::invalid_argument);
  EXPECT_THROW(rate(-1), std::invalid_argument);
}

// A model of one's own, layer by layer, with the parts of the model's training.
TYPED_TEST(PyTorchsFigures, TrainingOfPartsIsThatOfTheTransformersLayers) {
  LocalTransformerConfig config{.num_tokens = 9,
                                .max_seq_len = 40,
                                .dim = 12,
                                .depth = 2,
                                .local_attn_window_size = 8,
                                .dim_head = 6,
                                .heads = 2};
  config.attn_dropout = 0.2;
  config.ff_dropout = 0.3;
  const LocalTransformer<TypeParam> model(config, 3);
  const auto& p = model.parameters();
  Tensor<std::int64_t, 2> tokens(1, 40);
  for (Index i = 0; i < 40; ++i) tokens(0, i) = i * i % 9;
  const local_mha::Training training{.seed = 77};

  Tensor<TypeParam, 3> x(1, 40, 12);
  const auto rows = [&] { return Eigen::Map<local_mha::RowMatrix<TypeParam>>(x.data(), 40, 12); };
  for (Index i = 0; i < 40; ++i) rows().row(i) = p.token_emb.row(tokens(0, i)) + p.pos_emb.row(i);
  for (std::uint64_t i = 0; i < 2; ++i) {
    const auto& layer = p.layers[i];
    const local_mha::LocalMHA<TypeParam> attention(layer_config(config), layer.attention);
    const local_mha::FeedForward<TypeParam> feed_forward(layer.feed_forward, config.ff_dropout);
    x += attention.forward(x, {}, {}, training.of_part(2 * i));
    rows() += feed_forward.forward(rows(), {.training = training.of_part(2 * i + 1)});
  }
  const local_mha::LayerNorm<TypeParam> norm(p.to_logits_norm_weight, p.to_logits_norm_bias);
  const local_mha::RowMatrix<TypeParam> logits =
      local_mha::Linear<TypeParam>(p.to_logits).forward(norm.forward(rows()));
  const auto expected = model.forward(tokens, {.training = training});
  EXPECT_TRUE(std::equal(logits.data(), logits.data() + logits.size(), expected.data()));
}

TEST(Training, OfEachPartDropsSomethingElse) {
  const local_mha::Training training{.seed = 77};
  // The seeds that LocalTransformer's layers have always had.
  const auto words = local_mha::Philox(77)({3, 0, 0, 1});
  EXPECT_EQ(training.of_part(3).seed, std::uint64_t{words[1]} << 32 | words[0]);
  auto parameters = local_mha::FeedForwardParameters<float>::zeros(4, 16);
  parameters.norm_bias.setOnes();
  parameters.proj_in.setOnes();
  parameters.proj_out.setOnes();
  const local_mha::FeedForward<float> layer(parameters, 0.5);
  const local_mha::RowMatrix<float> x = local_mha::RowMatrix<float>::Ones(20, 4);
  const std::uint64_t parts[] = {0, 1, 2, std::uint64_t{1} << 32, ~std::uint64_t{0}};
  for (const std::uint64_t a : parts)
    for (const std::uint64_t b : parts)
      EXPECT_EQ(layer.forward(x, {.training = training.of_part(a)}) ==
                    layer.forward(x, {.training = training.of_part(b)}),
                a == b);
  EXPECT_NE(training.of_part(0).seed, local_mha::Training{.seed = 78}.of_part(0).seed);
}

}  // namespace training_test
