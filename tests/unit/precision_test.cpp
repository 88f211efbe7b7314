// SPDX-License-Identifier: MIT
// Sums of millions of terms, and numbers far from 0 or 1, in float: against the same in double.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/library.hpp"
#include "support/random.hpp"

namespace precision_test {

using local_mha::Index;
using local_mha::RowMatrix;
using local_mha::Tensor;
using local_mha::Vector;

constexpr double epsilon = std::numeric_limits<float>::epsilon();

// As many terms of one size that a sum in float loses two digits more than are tolerated here.
constexpr Index many = 2'000'000;

Tensor<std::int64_t, 2> labels(Index n, std::int64_t label) {
  Tensor<std::int64_t, 2> t(1, n);
  t.setConstant(label);
  return t;
}

/// Largest difference, of the largest of `exact`.
template <typename Got, typename Exact>
double relative_error(const Got& got, const Exact& exact) {
  const RowMatrix<double> difference = got.template cast<double>() - exact;
  return difference.array().isFinite().all()
             ? difference.cwiseAbs().maxCoeff() / exact.cwiseAbs().maxCoeff()
             : INFINITY;
}

TEST(CrossEntropy, OfMillionsOfPositionsIsTheirMean) {
  Tensor<float, 3> logits(1, many, 2);
  logits.setZero();
  EXPECT_NEAR(local_mha::cross_entropy<float>(logits, labels(many, 0)), std::log(2.0), epsilon);
}

TEST(CrossEntropy, OfAMillionClassesCountsAllOfThem) {
  constexpr Index classes = 1'000'000;
  Tensor<float, 3> logits(1, 1, classes);
  logits.setConstant(-2.3F);
  logits(0, 0, 0) = 0;
  const double sum = 1 + (classes - 1) * std::exp(static_cast<double>(-2.3F));
  EXPECT_NEAR(local_mha::cross_entropy<float>(logits, labels(1, 0)) / std::log(sum), 1, epsilon);
  const auto gradient = local_mha::cross_entropy_gradient<float>(logits, labels(1, 0));
  EXPECT_NEAR(gradient(0, 0, 1) * sum / std::exp(static_cast<double>(-2.3F)), 1, 4 * epsilon);
}

TEST(CrossEntropy, KeepsItsDigitsWhereLogitsAreLarge) {
  Tensor<float, 3> logits(1, 1, 2);
  logits.setValues({{{1e4F, 1e4F - 1}}});
  EXPECT_NEAR(local_mha::cross_entropy<float>(logits, labels(1, 0)), std::log(1 + std::exp(-1.0)),
              epsilon);
}

TEST(CrossEntropy, KeepsItsDigitsWhereTheLabelIsCertain) {
  Tensor<float, 3> logits(1, 1, 2);
  logits.setValues({{{20, 0}}});
  const double rest = std::exp(-20.0) / (1 + std::exp(-20.0));
  EXPECT_NEAR(local_mha::cross_entropy<float>(logits, labels(1, 0)) / rest, 1, 4 * epsilon);
  const auto gradient = local_mha::cross_entropy_gradient<float>(logits, labels(1, 0));
  EXPECT_NEAR(gradient(0, 0, 0) / -rest, 1, 4 * epsilon);
  EXPECT_NEAR(gradient(0, 0, 1) / rest, 1, 4 * epsilon);
}

struct Row {
  double centre;
  double spread;
};

class LayerNormOf : public testing::TestWithParam<Row> {};

TEST_P(LayerNormOf, IsThatInDouble) {
  const auto [centre, spread] = GetParam();
  Random random(1);
  for (const Index dim : {7, 64, 515}) {
    constexpr Index rows = 19;
    RowMatrix<float> x(rows, dim), grad_y(rows, dim);
    for (Index i = 0; i < x.size(); ++i) {
      x.data()[i] = static_cast<float>(centre + spread * random.normal());
      grad_y.data()[i] = static_cast<float>(random.normal());
    }
    const Vector<float> ones = Vector<float>::Ones(dim), zeros = Vector<float>::Zero(dim);
    const local_mha::LayerNorm<float> norm(ones, zeros);
    const local_mha::LayerNorm<double> exact(ones.cast<double>(), zeros.cast<double>());
    const RowMatrix<double> x_exact = x.cast<double>(), grad_exact = grad_y.cast<double>();
    // The few roundings of a value, those of a sum of `dim` squares, and those of the values that
    // are given, which lie on a grid: 1 where the spread is that of the grid.
    const double tolerance = 16 * epsilon;
    EXPECT_LT(relative_error(norm.forward(x), exact.forward(x_exact)), tolerance) << dim;
    Vector<float> grad_weight = zeros, grad_bias = zeros;
    Vector<double> exact_weight = zeros.cast<double>(), exact_bias = exact_weight;
    EXPECT_LT(relative_error(norm.backward(grad_y, x, grad_weight, grad_bias),
                             exact.backward(grad_exact, x_exact, exact_weight, exact_bias)),
              tolerance)
        << dim;
    EXPECT_LT(relative_error(grad_weight, exact_weight), tolerance) << dim;
    EXPECT_LT(relative_error(grad_bias, exact_bias), tolerance) << dim;
  }
}

// The last three leave the range of float when they are squared.
INSTANTIATE_TEST_SUITE_P(Precision, LayerNormOf,
                         testing::Values(Row{0, 1}, Row{1e3, 1}, Row{-1e5, 1}, Row{1e6, 1},
                                         Row{0, 1e-4}, Row{0, 1e-30}, Row{0, 1e20}, Row{1e25, 1e22},
                                         Row{-1e30, 1e30}));

TEST(LayerNormOfAConstantRow, IsItsBias) {
  for (const float constant : {1e-30F, 0.1F, 3.3F, 1e8F, -1e30F})
    for (const Index dim : {1, 7, 515}) {
      const local_mha::LayerNorm<float> norm(Vector<float>::Ones(dim),
                                             Vector<float>::Constant(dim, 0.25F));
      EXPECT_EQ(norm.forward(RowMatrix<float>::Constant(3, dim, constant)),
                RowMatrix<float>(RowMatrix<float>::Constant(3, dim, 0.25F)))
          << constant << ' ' << dim;
    }
}

TEST(LayerNormOfAnOutlier, IsThatInDouble) {
  // The first channel is where the mean is counted from.
  Random random(2);
  for (const Index place : {0, 1, 511}) {
    RowMatrix<float> x(5, 512);
    for (Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>(random.normal());
    x.col(place).setConstant(1e6F);
    const Vector<float> ones = Vector<float>::Ones(512), zeros = Vector<float>::Zero(512);
    RowMatrix<float> got = local_mha::LayerNorm<float>(ones, zeros).forward(x);
    RowMatrix<double> exact =
        local_mha::LayerNorm<double>(ones.cast<double>(), zeros.cast<double>())
            .forward(x.cast<double>());
    got.col(place).setZero();
    exact.col(place).setZero();
    EXPECT_LT(relative_error(got, exact), 16 * epsilon) << place;
  }
}

TEST(LayerNormGradients, OfMillionsOfRowsAreTheirSums) {
  const RowMatrix<float> x = RowMatrix<float>::Random(many / 4, 2);
  const RowMatrix<float> grad_y = RowMatrix<float>::Constant(many / 4, 2, 0.1F);
  const local_mha::LayerNorm<float> norm(Vector<float>::Ones(2), Vector<float>::Zero(2));
  Vector<float> grad_weight = Vector<float>::Zero(2), grad_bias = grad_weight;
  norm.backward(grad_y, x, grad_weight, grad_bias);
  const double sum = static_cast<double>(0.1F) * (many / 4);
  EXPECT_NEAR(grad_bias[0] / sum, 1, 4 * epsilon);
  EXPECT_NEAR(grad_bias[1] / sum, 1, 4 * epsilon);
}

TEST(LinearGradients, OfMillionsOfRowsAreTheirSums) {
  const RowMatrix<float> weight = RowMatrix<float>::Ones(1, 1);
  const RowMatrix<float> x = RowMatrix<float>::Ones(many, 1);
  const RowMatrix<float> grad_y = RowMatrix<float>::Constant(many, 1, 0.1F);
  RowMatrix<float> grad_weight = RowMatrix<float>::Zero(1, 1);
  Vector<float> grad_bias = Vector<float>::Zero(1);
  local_mha::linear_backward<Eigen::DefaultDevice, float>({}, weight, x, grad_y, grad_weight,
                                                          &grad_bias);
  EXPECT_NEAR(grad_bias[0] / (static_cast<double>(0.1F) * many), 1, 4 * epsilon);
}

TEST(EmbeddingGradients, OfMillionsOfPositionsAreTheirSums) {
  std::vector<std::int64_t> rows(many, 1);
  rows[5] = 2;
  const RowMatrix<float> grad_y = RowMatrix<float>::Constant(many, 1, 0.1F);
  RowMatrix<float> grad_table = RowMatrix<float>::Zero(4, 1);
  grad_table(1, 0) = 7;
  local_mha::embedding_backward<float>(grad_table, rows, grad_y);
  EXPECT_EQ(grad_table(0, 0), 0);
  EXPECT_NEAR(grad_table(1, 0) / (7 + static_cast<double>(0.1F) * (many - 1)), 1, 4 * epsilon);
  EXPECT_EQ(grad_table(2, 0), 0.1F);
  EXPECT_EQ(grad_table(3, 0), 0);
}

TEST(DynamicPositionBiasGradients, OfADistanceAreTheSumOverAllQueries) {
  constexpr Index w = 2000;
  auto parameters = local_mha::DynamicPositionBiasParameters<float>::zeros(1, 1);
  const local_mha::DynamicPositionBias<float> bias(parameters);
  auto gradients = parameters;
  Tensor<float, 3> grad_bias(1, w, 2 * w);
  grad_bias.setZero();
  for (Index i = 0; i < w; ++i) grad_bias(0, i, w + i) = 0.1F;
  bias.backward(gradients, grad_bias, w, 1, 0);
  EXPECT_NEAR(gradients.bias_4[0] / (static_cast<double>(0.1F) * w), 1, 4 * epsilon);
}

/// Rows that repeat every four, so that what a bias gets of each is about the same.
template <typename Scalar>
Tensor<Scalar, 4> repeating(std::uint64_t seed, Index n) {
  Random random(seed);
  double of[8];
  for (double& number : of) number = random.normal();
  Tensor<Scalar, 4> t(1, 1, n, 2);
  for (Index i = 0; i < t.size(); ++i)
    t.data()[i] = static_cast<Scalar>(static_cast<float>(of[i % 8]));
  return t;
}

// Those of attn_bias of windows of two, or of relative_bias.
template <typename Scalar>
Vector<double> bias_gradients(const local_mha::LocalAttentionConfig& config, bool of_windows,
                              Index n) {
  const auto q = repeating<Scalar>(1, n), k = repeating<Scalar>(2, n), v = repeating<Scalar>(3, n);
  const auto grad = repeating<Scalar>(4, n);
  const local_mha::LocalAttention<Scalar> attention(config);
  local_mha::LocalAttentionCall<Scalar> call;
  Tensor<Scalar, 3> attn_bias(1, 2, 4);
  Tensor<Scalar, 2> relative_bias(1, 3);
  attn_bias.setZero();
  relative_bias.setZero();
  if (of_windows)
    call.attn_bias = attn_bias;
  else
    call.relative_bias = relative_bias;
  const auto saved = attention.forward_saving(q, k, v, call);
  const auto gradients = attention.backward(saved, grad, q, k, v, call);
  Vector<double> all(of_windows ? 8 : 3);
  for (Index i = 0; i < all.size(); ++i)
    all[i] = static_cast<double>(of_windows ? gradients.attn_bias->data()[i]
                                            : gradients.relative_bias->data()[i]);
  return all;
}

TEST(BiasGradients, OfMillionsOfQueriesAreTheirSums) {
  const local_mha::LocalAttentionConfig windows{.window_size = 2, .causal = true};
  local_mha::LocalAttentionConfig tokens;
  tokens.token_window = {.left = 2, .right = 0};
  for (const bool of_windows : {true, false}) {
    const auto& config = of_windows ? windows : tokens;
    const Vector<double> got = bias_gradients<float>(config, of_windows, many / 2);
    const Vector<double> exact = bias_gradients<double>(config, of_windows, many / 2);
    EXPECT_GT(exact.cwiseAbs().maxCoeff(), many / 2000.0);
    EXPECT_LT(relative_error(got, exact), 20 * epsilon) << (of_windows ? "windows" : "tokens");
  }
}

TEST(QkScaleGradients, OfALongSequenceAreTheirSums) {
  local_mha::LocalMHAConfig config{.dim = 2, .window_size = 2, .dim_head = 2, .heads = 1};
  config.causal = config.qk_rmsnorm = true;
  config.use_rotary_pos_emb = false;
  Random random(3);
  const auto exact_parameters =
      local_mha::initial_parameters<local_mha::LocalMHAParameters<double>>(config, 1);
  auto parameters = local_mha::LocalMHAParameters<float>::zeros(config);
  support::assign(parameters, support::named<double>(exact_parameters));
  constexpr Index n = 400'000;
  Tensor<double, 3> x(1, n, 2), grad_y(1, n, 2);
  for (Index i = 0; i < n; ++i) {
    // Two kinds of positions, and the gradient asks for the first kind.
    const bool first = i % 2 == 0;
    x(0, i, 0) = first ? 1 : -0.5, x(0, i, 1) = first ? 0.25 : 0.75;
    grad_y(0, i, 0) = 1, grad_y(0, i, 1) = -1;
  }
  const Tensor<float, 3> x_float = x.cast<float>(), grad_float = grad_y.cast<float>();
  const auto gradients_of = [&](auto& layer, const auto& input, const auto& grad) {
    using Layer = std::remove_cvref_t<decltype(layer)>;
    typename Layer::Saved saved;
    layer.forward_saving(saved, input);
    auto gradients = Layer::Parameters::zeros(config);
    layer.backward(gradients, saved, grad, input);
    return gradients;
  };
  const local_mha::LocalMHA<float> layer(config, parameters);
  const local_mha::LocalMHA<double> exact(config, exact_parameters);
  const auto got = gradients_of(layer, x_float, grad_float);
  const auto expected = gradients_of(exact, x, grad_y);
  EXPECT_LT(relative_error(got.q_scale, expected.q_scale), 100 * epsilon);
  EXPECT_LT(relative_error(got.k_scale, expected.k_scale), 100 * epsilon);
}

TEST(QkNorm, OfNumbersOfAnySizeIsThatInDouble) {
  Random random(4);
  for (const double size : {1e-37, 1e-30, 1e-20, 1e-13, 1e-5, 1.0, 1e10, 1e19, 1e20, 1e30, 1e37})
    for (const Index d : {3, 64}) {
      RowMatrix<float> x(21, d);
      for (Index i = 0; i < x.size(); ++i)
        x.data()[i] = static_cast<float>(size * random.uniform());
      x.row(3).setOnes();  // others of its block leave the range of float when they are squared
      const local_mha::QkNorm<float> norm(Vector<float>::Ones(d));
      const local_mha::QkNorm<double> exact(Vector<double>::Ones(d));
      const RowMatrix<float> got = norm.forward(x);
      const RowMatrix<double> expected = exact.forward(x.cast<double>());
      for (Index r = 0; r < x.rows(); ++r)
        EXPECT_LT(relative_error(RowMatrix<float>(got.row(r)), RowMatrix<double>(expected.row(r))),
                  8 * epsilon)
            << size << ' ' << d << " row " << r;
    }
}

TEST(QkNorm, HasFiniteGradientsForNumbersOfAnySize) {
  Random random(5);
  constexpr Index d = 8, count = local_mha::block_rows<float>,
                  exact_count = local_mha::block_rows<double>;
  for (const double size : {1e-37, 1e-30, 1e-13, 1e-11, 1.0, 1e19, 1e20, 1e30, 1e36}) {
    auto x = local_mha::make_block_buffer<float>(d * count), grad = x, sums = x;
    auto x_exact = local_mha::make_block_buffer<double>(d * exact_count), grad_exact = x_exact,
         sums_exact = x_exact;
    for (Index c = 0; c < d; ++c) {
      const auto value = static_cast<float>(size * (0.5 + random.uniform()));
      const auto gradient = static_cast<float>(random.normal());
      for (Index r = 0; r < count; ++r) {
        x[static_cast<std::size_t>(c * count + r)] = value;
        grad[static_cast<std::size_t>(c * count + r)] = gradient;
      }
      x_exact[static_cast<std::size_t>(c * exact_count)] = value;
      grad_exact[static_cast<std::size_t>(c * exact_count)] = gradient;
    }
    local_mha::QkNorm<float>(Vector<float>::Ones(d))
        .apply_backward(x.data(), grad.data(), sums.data());
    local_mha::QkNorm<double>(Vector<double>::Ones(d))
        .apply_backward(x_exact.data(), grad_exact.data(), sums_exact.data());
    double largest = 0;
    for (Index c = 0; c < d; ++c)
      largest = std::max(largest, std::abs(grad_exact[static_cast<std::size_t>(c * exact_count)]));
    for (Index c = 0; c < d; ++c)
      EXPECT_NEAR(grad[static_cast<std::size_t>(c * count)],
                  grad_exact[static_cast<std::size_t>(c * exact_count)], 16 * epsilon * largest)
          << size;
  }
}

// A decay is e to a power, known as well as that power.
TEST(Rotary, DecaysToAllDigitsOverLongDistances) {
  constexpr Index d = 48, distance = 2000;
  const local_mha::RotaryEmbedding<double> rotary(d, 1.0);
  std::vector<double> turns(static_cast<std::size_t>(d));
  rotary.turns(distance, turns.data());
  int compared = 0;
  for (int m = 0; m < d / 2; ++m) {
    const long double power = distance * std::log((2 * m + 0.4L * d) / (1.4L * d));
    if (power < -300) continue;
    ++compared;
    const double* turn = turns.data() + 2 * m;
    const double decay = std::hypot(turn[0], turn[1]);
    const double allowed =
        (4 - 2 * static_cast<double>(power)) * std::numeric_limits<double>::epsilon();
    EXPECT_NEAR(decay / static_cast<double>(std::exp(power)), 1, allowed) << m;
  }
  EXPECT_GE(compared, 3);
}

}  // namespace precision_test
