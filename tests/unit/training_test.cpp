// SPDX-License-Identifier: MIT
// Optimizer, clipping and schedule: by their formulas, and along 50 steps of PyTorch.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "support/golden_file.hpp"
#include "support/library.hpp"
#include "support/random.hpp"

namespace {

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
    const auto loss =
        static_cast<double>(model.backward(Eigen::DefaultDevice(), gradients, input, labels));
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
}

}  // namespace
