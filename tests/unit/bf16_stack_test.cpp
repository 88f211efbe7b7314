// SPDX-License-Identifier: MIT
// Feed-forward, Linear, encoders and language models that multiply in bfloat16, against a reference
// that rounds the same operands by their definition. It says how far each number may be off: where
// a number lies so close to the middle of two operands that float and double may round it
// differently, by both. The attention of a layer is LocalMHA itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/io/encoder_weights.hpp>
#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>

#include "measuring/heap.hpp"
#include "reference/dropout.hpp"
#include "reference/operands.hpp"
#include "support/library.hpp"
#include "support/operand_case.hpp"
#include "support/random_encoder.hpp"

namespace bf16_stack_test {

using Eigen::bfloat16;
using local_mha::Index;
using local_mha::Tensor;
using local_mha::TensorView;
using reference::Array;
using reference::Int;
using Encoder = local_mha::Encoder<float, bfloat16, bfloat16>;
using FeedForward = local_mha::FeedForward<float, bfloat16, bfloat16>;
using Linear = local_mha::Linear<float, bfloat16, bfloat16>;
using LocalTransformer = local_mha::LocalTransformer<float, bfloat16, bfloat16>;
using EncoderParameters = local_mha::EncoderParameters<float>;
using FeedForwardParameters = local_mha::FeedForwardParameters<float>;
using TransformerParameters = local_mha::LocalTransformerParameters<float>;

// ---- the reference

/// What is rounded.
struct Roundings {
  bool weights = true, rows = true, hidden = true;
};

/// The operand nearest to a number: 8 digits, ties to even; 0 below the smallest normal number.
double operand(double x) {
  if (!std::isfinite(x)) return x;
  if (std::abs(x) < 0x1p-126) return std::copysign(0.0, x);
  const double step = std::ldexp(1.0, std::ilogb(x) - 7);
  return std::nearbyint(x / step) * step;
}

/// Numbers, and how far floats that stand for them may be off.
struct Numbers {
  Array<double> value, doubt;

  explicit Numbers(std::vector<Int> shape) : value(shape), doubt(std::move(shape)) {}
};

/// Errors of a float that is the sum of so many products.
double sum_error(Int terms) { return (8 + 2 * std::sqrt(static_cast<double>(terms))) * 0x1p-24; }

Numbers rounded(Numbers x, bool rounds) {
  for (std::size_t i = 0; rounds && i < x.value.data.size(); ++i) {
    double& value = x.value.data[i];
    double& doubt = x.doubt.data[i];
    const double nearest = operand(value);
    doubt = std::max(std::abs(operand(value + doubt) - nearest),
                     std::abs(operand(value - doubt) - nearest));
    value = nearest;
  }
  return x;
}

/// `x·Wᵀ` of rows.
Numbers linear(const Numbers& x, const Array<double>& weight, const Roundings& roundings) {
  const Int out = weight.shape[0], in = weight.shape[1], rows = x.value.shape[0];
  Numbers y({rows, out});
  for (Int row = 0; row < rows; ++row)
    for (Int o = 0; o < out; ++o) {
      double size = 0;
      for (Int c = 0; c < in; ++c) {
        const double w = roundings.weights ? operand(weight(o, c)) : weight(o, c);
        y.value(row, o) += w * x.value(row, c);
        y.doubt(row, o) += std::abs(w) * x.doubt(row, c);
        size += std::abs(w * x.value(row, c));
      }
      y.doubt(row, o) += sum_error(in) * size;
    }
  return y;
}

Numbers layer_norm(const Array<double>& x, const Array<double>& weight, const Array<double>& bias) {
  const Int rows = x.shape[0], dim = x.shape[1];
  Numbers y(x.shape);
  for (Int row = 0; row < rows; ++row) {
    double mean = 0, size = 0, variance = 0;
    for (Int c = 0; c < dim; ++c) mean += x(row, c), size = std::max(size, std::abs(x(row, c)));
    mean /= static_cast<double>(dim);
    for (Int c = 0; c < dim; ++c) variance += (x(row, c) - mean) * (x(row, c) - mean);
    const double sigma = std::sqrt(variance / static_cast<double>(dim) + 1e-5);
    for (Int c = 0; c < dim; ++c) {
      y.value(row, c) = (x(row, c) - mean) / sigma * weight(c) + bias(c);
      y.doubt(row, c) =
          sum_error(dim) * (std::abs(weight(c)) / sigma * (size / 4 + std::abs(x(row, c) - mean)) +
                            std::abs(bias(c)));
    }
  }
  return y;
}

/// Of rows `[rows, dim]`.
Numbers feed_forward(const reference::Parameters<double>& parameters, const Array<double>& x,
                     const std::string& prefix = "", const Roundings& roundings = {}) {
  const Numbers normed =
      rounded(layer_norm(x, parameters.at(prefix + "0.weight"), parameters.at(prefix + "0.bias")),
              roundings.rows);
  const Numbers both = linear(normed, parameters.at(prefix + "1.weight"), roundings);
  const Int rows = x.shape[0], inner = both.value.shape[1] / 2;
  Numbers gated({rows, inner});
  for (Int row = 0; row < rows; ++row)
    for (Int c = 0; c < inner; ++c) {
      const double a = both.value(row, c), g = both.value(row, inner + c);
      const double of_gate = 1.13 * both.doubt(row, inner + c) + 0x1p-21 * std::abs(g);
      gated.value(row, c) = a * reference::gelu(g);
      gated.doubt(row, c) = std::abs(a) * of_gate +
                            both.doubt(row, c) * (std::abs(reference::gelu(g)) + of_gate) +
                            0x1p-23 * std::abs(gated.value(row, c));
    }
  return linear(rounded(gated, roundings.hidden), parameters.at(prefix + "4.weight"), roundings);
}

/// Adds floats, as float does.
void add(Numbers& y, const Array<double>& x) {
  for (std::size_t i = 0; i < x.data.size(); ++i) {
    y.value.data[i] += x.data[i];
    y.doubt.data[i] += 0x1p-24 * std::abs(y.value.data[i]);
  }
}

/// Whether each number is as near as it must be.
testing::AssertionResult fits(const float* got, const Numbers& wanted) {
  for (std::size_t i = 0; i < wanted.value.data.size(); ++i)
    if (auto result = support::near(got[i], wanted.value.data[i], wanted.doubt.data[i] + 1e-30);
        !result)
      return result << " at " << i;
  return testing::AssertionSuccess();
}

/// A tensor's rows.
template <typename Rows>
Array<double> rows_of(const Rows& from, Index rows) {
  const Index channels = rows > 0 ? from.size() / rows : 0;
  Array<double> to({rows, channels});
  for (std::size_t i = 0; i < to.data.size(); ++i) to.data[i] = static_cast<double>(from.data()[i]);
  return to;
}

/// Root mean square of the difference, over that of `b`; infinite if a number is not finite.
double relative_error(const Tensor<float, 3>& a, const Tensor<float, 3>& b) {
  double error = 0, size = 0;
  for (Index i = 0; i < b.size(); ++i) {
    const auto wanted = static_cast<double>(b.data()[i]);
    const double distance = support::distance(a.data()[i], wanted);
    error += distance * distance;
    size += wanted * wanted;
  }
  const double relative = std::sqrt(error / size);
  return a.size() == b.size() && relative >= 0 ? relative : std::numeric_limits<double>::infinity();
}

Tensor<float, 3> random_rows(Random& random, Index batch, Index n, Index dim, double scale = 1) {
  return support::tensor<float, 3>(random.array({batch, n, dim}, scale));
}

template <typename Parameters>
Parameters random_parameters(Random& random, Parameters p, double scale) {
  local_mha::for_each_parameter(p, [&](const std::string&, auto& tensor) {
    for (Index i = 0; i < tensor.size(); ++i)
      tensor.data()[i] += static_cast<float>(scale * random.normal());
  });
  return p;
}

FeedForwardParameters random_feed_forward(Random& random, Index dim, Index inner) {
  FeedForwardParameters p = FeedForwardParameters::zeros(dim, inner);
  p.norm_weight.setOnes();
  return random_parameters(random, std::move(p), 0.3);
}

struct Threads {
  Eigen::ThreadPool pool{3};
  Eigen::ThreadPoolDevice device{&pool, 3};
};

// ---- feed-forward and Linear

TEST(Bf16Stack, AFeedForwardMultipliesRoundedOperands) {
  int told_apart[3] = {};
  for (std::uint64_t seed = 0; seed < random_cases(60); ++seed) {
    Random random(seed);
    const Index dim = random.integer(2, 70), inner = random.integer(1, 100),
                rows = random.integer(1, 150);
    const FeedForwardParameters parameters = random_feed_forward(random, dim, inner);
    const auto named = support::named<double>(parameters);
    const FeedForward layer(parameters);
    const Tensor<float, 3> x = random_rows(random, 1, rows, dim, random.uniform(0.1, 3));
    const Array<double> of_rows = rows_of(x, rows);
    const Numbers wanted = feed_forward(named, of_rows);
    const Tensor<float, 3> y = layer.forward(x);
    EXPECT_TRUE(fits(y.data(), wanted)) << seed;
    const Eigen::Map<const local_mha::RowMatrix<float>> matrix(x.data(), rows, dim);
    EXPECT_TRUE(fits(layer.forward(matrix).eval().data(), wanted)) << seed;
    // A row alone sums in another order.
    FeedForward::Workspace workspace(layer);
    Tensor<float, 3> by_row(1, rows, dim);
    for (Index i = 0; i < rows; ++i)
      layer.forward_into(1, x.data() + i * dim, dim, by_row.data() + i * dim, workspace);
    EXPECT_TRUE(fits(by_row.data(), wanted)) << seed;
    // Each rounding shows.
    const Roundings others[3] = {{.weights = false}, {.rows = false}, {.hidden = false}};
    for (int i = 0; i < 3; ++i)
      told_apart[i] += !fits(y.data(), feed_forward(named, of_rows, "", others[i]));
  }
  for (const int cases : told_apart) EXPECT_GE(cases, static_cast<int>(random_cases(60)) * 9 / 10);
}

TEST(Bf16Stack, ALinearMultipliesRoundedOperands) {
  for (std::uint64_t seed = 0; seed < random_cases(40); ++seed) {
    Random random(seed);
    const Index in = random.integer(1, 90), out = random.integer(1, 70),
                rows = random.integer(1, 300);
    auto parameters = local_mha::LinearParameters<float>::zeros({in, out, random.chance(0.5)});
    parameters = random_parameters(random, std::move(parameters), 0.5);
    const Linear layer(parameters);
    const Tensor<float, 3> x = random_rows(random, 1, rows, in);
    Numbers given({rows, in});
    given.value = rows_of(x, rows);
    const Array<double> weight = support::named<double>(parameters).at("weight");
    Numbers wanted = linear(rounded(given, true), weight, {});
    Numbers unrounded = linear(given, weight, {});
    for (Numbers* y : {&wanted, &unrounded}) {
      Array<double> bias({rows, out});
      for (Int row = 0; row < rows; ++row)
        for (Int c = 0; c < out && parameters.bias.size() > 0; ++c)
          bias(row, c) = static_cast<double>(parameters.bias[c]);
      add(*y, bias);
    }
    const Tensor<float, 3> y = layer.forward(x);
    EXPECT_TRUE(fits(y.data(), wanted)) << seed;
    EXPECT_FALSE(fits(y.data(), unrounded)) << seed;
    EXPECT_EQ(layer.parameters().weight(0, 0),
              static_cast<float>(operand(static_cast<double>(parameters.weight(0, 0)))));
  }
}

TEST(Bf16Stack, OperandsBelowTheSmallestNormalNumberAreZero) {
  Random random(1);
  FeedForwardParameters p = random_feed_forward(random, 20, 40);
  // The smallest normal number counts, half of it does not.
  p.proj_out.setConstant(0x1p-126F);
  const FeedForward smallest(p);
  p.proj_out.setConstant(0x1p-127F);
  const FeedForward smaller(p);
  EXPECT_EQ(smaller.parameters().proj_out(0, 0), 0.0F);
  EXPECT_EQ(smallest.parameters().proj_out(0, 0), 0x1p-126F);
  // Of hidden values, too.
  p.proj_out.setConstant(0x1p+100F);
  p.norm_bias.setZero();
  p.proj_in *= 0x1p-60F;
  const FeedForward large(p);
  p.proj_in.topRows(40) *= 0x1p-12F;
  const FeedForward tiny(p);
  for (const Index rows : {1, 30}) {
    const Tensor<float, 3> x = random_rows(random, 1, rows, 20);
    EXPECT_EQ(support::largest(support::array(smaller.forward(x))), 0.0F);
    EXPECT_GT(support::largest(support::array(large.forward(x))), 0.0F);
    FeedForward::Workspace workspace(tiny);
    Tensor<float, 3> y(1, rows, 20);
    tiny.forward_into(rows, x.data(), 20, y.data(), workspace);
    EXPECT_EQ(support::largest(support::array(y)), 0.0F) << rows;
  }
}

TEST(Bf16Stack, WhatAWorkspaceHeldBeforeChangesNothing) {
  Random random(2);
  const FeedForward layer(random_feed_forward(random, 24, 50));
  const Linear linear(
      random_parameters(random, local_mha::LinearParameters<float>::zeros({24, 30, true}), 0.5));
  Tensor<float, 3> bad(1, 200, 24);
  bad.setConstant(std::numeric_limits<float>::quiet_NaN());
  for (const Index rows : {1, 5, 16, 37}) {
    const Tensor<float, 3> x = random_rows(random, 1, rows, 24);
    FeedForward::Workspace workspace;
    Tensor<float, 3> y(1, 200, 24), z(1, rows, 24);
    layer.forward_into(y, workspace, bad);
    EXPECT_TRUE(std::isnan(y(0, 0, 0)));
    layer.forward_into(z, workspace, x);
    EXPECT_TRUE(support::same_bits(z, layer.forward(x))) << rows;
    Linear::Workspace of_linear;
    Tensor<float, 3> l(1, 200, 30), m(1, rows, 30);
    linear.forward_into(l, of_linear, bad);
    linear.forward_into(m, of_linear, x);
    EXPECT_TRUE(support::same_bits(m, linear.forward(x))) << rows;
    EXPECT_TRUE(std::isfinite(support::largest(support::array(m))));
  }
}

// ---- their gradients

/// Root mean square of the difference, over that of `wanted`; infinite if a number is not finite.
double error_of(const Array<double>& got, const Array<double>& wanted) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < wanted.data.size(); ++i) {
    const double distance = support::distance(got.data.at(i), wanted.data[i]);
    error += distance * distance;
    size += wanted.data[i] * wanted.data[i];
  }
  if (error == 0) return 0;
  const double relative = std::sqrt(error / size);
  return relative >= 0 ? relative : std::numeric_limits<double>::infinity();
}

/// All gradients by their names, that of the input as `x`.
using Gradients = reference::Parameters<double>;

double largest_error(const Gradients& got, const Gradients& wanted) {
  double largest = got.size() == wanted.size() ? 0 : std::numeric_limits<double>::infinity();
  for (const auto& [name, array] : wanted)
    largest = std::max(largest, error_of(got.at(name), array));
  return largest;
}

template <typename Module>
Gradients gradients_of(const Module& module, const Tensor<float, 3>& x,
                       const Tensor<float, 3>& grad_y, const local_mha::ModuleCall& call = {}) {
  typename Module::Saved saved;
  EXPECT_TRUE(support::same_bits(module.forward_saving(saved, x, call), module.forward(x, call)));
  auto gradients = module.parameters();
  local_mha::for_each_parameter(gradients,
                                [](const std::string&, auto& tensor) { tensor.setZero(); });
  const Tensor<float, 3> grad_x =
      module.backward(gradients, saved, grad_y, x, {.device = call.device});
  Gradients all = support::named<double>(gradients);
  all["x"] = rows_of(grad_x, x.dimension(0) * x.dimension(1));
  return all;
}

Gradients linear_gradients(const Gradients& parameters, const Array<double>& x,
                           const Array<double>& grad_y,
                           const reference::BackwardOperands& operands = {}) {
  Gradients all = reference::zeros_like(parameters);
  const bool has_bias = all.contains("bias") && !all.at("bias").data.empty();
  all["x"] =
      reference::linear_backward_of_operands(x, parameters.at("weight"), grad_y, all.at("weight"),
                                             has_bias ? &all.at("bias") : nullptr, operands);
  return all;
}

/// One kind of operands not rounded.
constexpr reference::BackwardOperands others_rounded[3] = {
    {.weights = false}, {.rows = false}, {.gradients = false}};

TEST(Bf16Stack, ALinearGoesBackThroughRoundedOperands) {
  for (std::uint64_t seed = 0; seed < random_cases(40); ++seed) {
    Random random(seed);
    const Index in = random.integer(1, 90), out = random.integer(1, 70),
                batch = random.integer(1, 3), n = random.integer(1, 200), rows = batch * n;
    auto parameters = local_mha::LinearParameters<float>::zeros({in, out, random.chance(0.5)});
    parameters = random_parameters(random, std::move(parameters), 0.5);
    const Linear layer(parameters);
    const Tensor<float, 3> x = random_rows(random, batch, n, in);
    const Tensor<float, 3> grad_y = random_rows(random, batch, n, out, random.uniform(0.01, 1));
    const Gradients got = gradients_of(layer, x, grad_y);
    const auto named = support::named<double>(parameters);
    const auto wanted_of = [&](const reference::BackwardOperands& operands) {
      return linear_gradients(named, rows_of(x, rows), rows_of(grad_y, rows), operands);
    };
    // Operands are exact, but for float's sums.
    EXPECT_LT(largest_error(got, wanted_of({})), 3e-6) << seed;
    for (const auto& operands : others_rounded)
      EXPECT_GT(largest_error(got, wanted_of(operands)), 2e-4) << seed;
    // Against what float computes, no more than roundings make of it.
    EXPECT_LT(largest_error(got, wanted_of(reference::BackwardOperands::none())), 0.02) << seed;
  }
}

TEST(Bf16Stack, AFeedForwardGoesBackThroughRoundedOperands) {
  int told_apart[3] = {};
  const auto cases = static_cast<int>(random_cases(20));
  for (int seed = 0; seed < cases; ++seed) {
    Random random(static_cast<std::uint64_t>(seed));
    const Index dim = random.integer(8, 70), inner = random.integer(8, 100),
                rows = random.integer(30, 300);
    const FeedForwardParameters parameters = random_feed_forward(random, dim, inner);
    const double dropout = random.pick({0.0, 0.25});
    const FeedForward layer(parameters, dropout);
    const Tensor<float, 3> x = random_rows(random, 1, rows, dim, random.uniform(0.1, 3));
    const Tensor<float, 3> grad_y = random_rows(random, 1, rows, dim);
    const local_mha::ModuleCall call{.training = local_mha::Training{.seed = 7}};
    const Gradients got = gradients_of(layer, x, grad_y, call);
    const auto named = support::named<double>(parameters);
    const auto kept = reference::dropout_factors<double>(dropout, 7, 1);
    const auto wanted_of = [&](const Gradients& weights, const Array<double>& of_x,
                               const Array<double>& of_y,
                               const reference::BackwardOperands& operands, bool forward) {
      Gradients all = reference::zeros_like(weights);
      all["x"] = reference::feed_forward_backward_of_operands(
          weights, of_x, of_y, all, [&](Int row, Int c) { return kept(0, 0, row, c); }, operands,
          forward);
      return all;
    };
    const Array<double> of_x = rows_of(x, rows), of_y = rows_of(grad_y, rows);
    const Gradients wanted = wanted_of(named, of_x, of_y, {}, true);
    EXPECT_LT(largest_error(got, wanted), 4e-4) << seed;
    for (int i = 0; i < 3; ++i)
      told_apart[i] += largest_error(got, wanted_of(named, of_x, of_y, others_rounded[i], true)) >
                       5 * largest_error(got, wanted);
    // No further from the exact ones than thrice as far as those of rounded x, weights and
    // gradient.
    const auto none = reference::BackwardOperands::none();
    const Gradients exact = wanted_of(named, of_x, of_y, none, false);
    const auto as_operands = [](Array<double> array) {
      reference::round_if(true, array);
      return array;
    };
    Gradients weights = named;
    for (const char* name : {"1.weight", "4.weight"})
      weights.at(name) = as_operands(named.at(name));
    const Gradients of_rounded =
        wanted_of(weights, as_operands(of_x), as_operands(of_y), none, false);
    for (const auto& [name, array] : exact) {
      EXPECT_LT(error_of(got.at(name), array), 3 * error_of(of_rounded.at(name), array))
          << seed << ' ' << name;
    }
  }
  for (const int number : told_apart) EXPECT_EQ(number, cases);
}

TEST(Bf16Stack, GradientsOfWhatIsTooSmallForAnOperandAreZero) {
  Random random(1);
  const Linear layer(local_mha::LinearConfig{.in_features = 20, .out_features = 10}, 1);
  const Tensor<float, 3> x = random_rows(random, 1, 50, 20, 0x1p40);
  Tensor<float, 3> grad_y(1, 50, 10);
  for (const float size : {0x1p-126F, 0x1p-127F}) {
    grad_y.setConstant(size);
    const Gradients got = gradients_of(layer, x, grad_y);
    for (const double of_weight : got.at("weight").data)
      EXPECT_EQ(of_weight == 0, size < 0x1p-126F);
    if (size < 0x1p-126F) {
      EXPECT_EQ(support::largest(got.at("x")), 0);
    }
    // That of the bias is no product.
    for (const double of_bias : got.at("bias").data)
      EXPECT_EQ(of_bias, 50 * static_cast<double>(size));
  }
}

TEST(Bf16Stack, GradientsOfARowAreThoseOfItsOwn) {
  Random random(3);
  const FeedForward layer(random_feed_forward(random, 24, 50), 0.5);
  const Linear linear(
      random_parameters(random, local_mha::LinearParameters<float>::zeros({24, 30, true}), 0.5));
  const Tensor<float, 3> x = random_rows(random, 2, 40, 24);
  const auto expect_apart = [&](const auto& module, Index out) {
    const Tensor<float, 3> grad_y = random_rows(random, 2, 40, out);
    const local_mha::ModuleCall call{.training = local_mha::Training{.seed = 3}};
    const Gradients wanted = gradients_of(module, x, grad_y, call);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(),
                            std::numeric_limits<float>::infinity(), 3.4e38F}) {
      Tensor<float, 3> bad_x = x, bad_grad = grad_y;
      bad_x(0, 17, 3) = bad_grad(1, 38, 2) = bad;
      typename std::decay_t<decltype(module)>::Saved saved;
      module.forward_saving(saved, bad_x, call);
      auto gradients = module.parameters();
      const Tensor<float, 3> got = module.backward(gradients, saved, bad_grad, bad_x);
      for (Index row = 0; row < 80; ++row)
        for (Index c = 0; c < 24; ++c) {
          const float number = got(row / 40, row % 40, c);
          if (row != 17 && row != 78) {
            ASSERT_EQ(static_cast<double>(number), wanted.at("x")(row, c)) << row;
          } else if (row == 78) {
            ASSERT_FALSE(std::abs(number) < 1e30F) << row;
          }
        }
    }
  };
  expect_apart(layer, 24);
  expect_apart(linear, 30);
}

TEST(Bf16Stack, BackwardPassesKnowTheirCallsAgain) {
  Random random(4);
  const auto parameters = random_feed_forward(random, 12, 20);
  FeedForward layer(parameters);
  const auto expect_known = [&](auto& module, Index channels, auto&& change) {
    const Tensor<float, 3> x = random_rows(random, 1, 30, channels);
    typename std::decay_t<decltype(module)>::Saved saved;
    auto gradients = module.parameters();
    const auto given = gradients;
    EXPECT_THROW(module.backward(gradients, saved, x, x), std::invalid_argument);
    module.forward_saving(saved, x);
    EXPECT_THROW(module.backward(gradients, saved, x, random_rows(random, 1, 30, channels)),
                 std::invalid_argument);
    auto other = given;
    // Less than what is rounded away changes no operand.
    change(other, 1 + 0x1p-16F);
    module.set_parameters(other);
    EXPECT_NO_THROW(module.backward(gradients, saved, x, x));
    change(other, 1.5F);
    module.set_parameters(other);
    EXPECT_THROW(module.backward(gradients, saved, x, x), std::invalid_argument);
  };
  expect_known(layer, 12, [](auto& p, float factor) { p.proj_out(0, 0) *= factor; });
  layer = FeedForward(parameters);
  expect_known(layer, 12, [](auto& p, float factor) { p.proj_in *= factor; });
  // So few weights that each is looked at.
  for (Index i = 0; i < 9; ++i) {
    Linear small(local_mha::LinearConfig{.in_features = 3, .out_features = 3}, 1);
    expect_known(small, 3, [&](auto& p, float factor) { p.weight.data()[i] *= factor; });
  }
}

// ---- encoders

/// The first layers alone.
template <typename Parameters>
std::pair<local_mha::EncoderConfig, Parameters> first_layers(local_mha::EncoderConfig config,
                                                             Parameters parameters, Index depth) {
  config.depth = depth;
  if (config.layers.size() > 1) config.layers.resize(static_cast<std::size_t>(depth));
  parameters.layers.resize(static_cast<std::size_t>(depth));
  return {std::move(config), std::move(parameters)};
}

EncoderParameters parameters_of(const support::RandomEncoder& random) {
  auto p = EncoderParameters::zeros(random.config);
  support::assign(p, random.parameters);
  return p;
}

/// The attention of a layer, as a black box.
Tensor<float, 3> attended(const local_mha::EncoderConfig& config, const EncoderParameters& p,
                          Index layer, const Tensor<float, 3>& x,
                          const local_mha::PaddingMask& mask) {
  const local_mha::LocalMHAConfig& of_layer = local_mha::layer_config(config, layer);
  Tensor<float, 3> bias(0, 0, 0);
  if (p.dynamic_pos_bias)
    bias = local_mha::DynamicPositionBias<float>(*p.dynamic_pos_bias)
               .forward(of_layer.window_size, of_layer.look_backward,
                        local_mha::resolved_look_forward(of_layer));
  return local_mha::LocalMHA<float, bfloat16, bfloat16>(
             of_layer, p.layers[static_cast<std::size_t>(layer)].attention)
      .forward(x, {.mask = mask, .attn_bias = support::optional_view(bias)});
}

TEST(Bf16Stack, AnEncoderIsItsLayersOneAfterTheOther) {
  int compared = 0;
  for (std::uint64_t seed = 0; seed < random_cases(80); ++seed) {
    const support::RandomEncoder random(seed);
    const auto& config = random.config;
    const EncoderParameters parameters = parameters_of(random);
    const Tensor<float, 3> x = random.input<float>();
    if (config.num_residual_streams > 1 || config.depth == 0 || x.size() == 0) continue;
    Tensor<float, 3> before = x;
    for (Index depth = 1; depth <= config.depth; ++depth) {
      const auto [of_first, first] = first_layers(config, parameters, depth);
      const Tensor<float, 3> y = Encoder(of_first, first).forward(x, {.mask = random.mask()});
      Tensor<float, 3> middle =
          before + attended(config, parameters, depth - 1, before, random.mask());
      const Index rows = x.dimension(0) * x.dimension(1);
      Numbers wanted = feed_forward(random.parameters, rows_of(middle, rows),
                                    "layers." + std::to_string(depth - 1) + ".1.branch.");
      add(wanted, rows_of(middle, rows));
      EXPECT_TRUE(fits(y.data(), wanted)) << seed << ", layer " << depth;
      before = y;
      ++compared;
    }
  }
  EXPECT_GE(compared, static_cast<int>(random_cases(30)));
}

TEST(Bf16Stack, AnEncoderOfSeveralStreamsRoundsInItsBranchesAlone) {
  int compared = 0;
  double wrong = 0, right = 0;
  for (std::uint64_t seed = 0; seed < random_cases(60); ++seed) {
    const support::RandomEncoder random(seed);
    auto [config, parameters] =
        first_layers(random.config, parameters_of(random), std::min<Index>(random.config.depth, 1));
    const Tensor<float, 3> x = random.input<float>();
    if (config.num_residual_streams == 1 || config.depth == 0 || x.size() < 200) continue;
    // By the reference's connections.
    const auto made = [&, &encoder = config, &weights = parameters](const Roundings& roundings) {
      const Index batch = x.dimension(0), n = x.dimension(1), dim = x.dimension(2);
      const Int streams = encoder.num_residual_streams;
      Array<double> r({batch, n, streams, dim});
      for (Index b = 0; b < batch; ++b)
        for (Index i = 0; i < n; ++i)
          for (Int s = 0; s < streams; ++s)
            for (Index c = 0; c < dim; ++c) r(b, i, s, c) = static_cast<double>(x(b, i, c));
      r = reference::hyper_connection(
          random.parameters, "layers.0.0.", r, [&](const Array<double>& in) {
            return reference::cast<double>(support::array(
                attended(encoder, weights, 0, support::tensor<float, 3>(in), random.mask())));
          });
      r = reference::hyper_connection(
          random.parameters, "layers.0.1.", r, [&](const Array<double>& in) {
            Array<double> rows = in;
            rows.shape = {batch * n, dim};
            rows = feed_forward(random.parameters, rows, "layers.0.1.branch.", roundings).value;
            rows.shape = in.shape;
            return rows;
          });
      Tensor<float, 3> y(batch, n, dim);
      for (Index b = 0; b < batch; ++b)
        for (Index i = 0; i < n; ++i)
          for (Index c = 0; c < dim; ++c) {
            double sum = 0;
            for (Int s = 0; s < streams; ++s) sum += r(b, i, s, c);
            y(b, i, c) = static_cast<float>(sum);
          }
      return y;
    };
    const Tensor<float, 3> y = Encoder(config, parameters).forward(x, {.mask = random.mask()});
    // Some numbers near a tie are rounded to the other side.
    right = std::max(right, relative_error(y, made({})));
    wrong = std::max(wrong, relative_error(y, made({.hidden = false})));
    ++compared;
  }
  EXPECT_LT(right, 4e-4);
  EXPECT_GT(wrong, 8e-4);
  EXPECT_GE(compared, static_cast<int>(random_cases(15)));
}

local_mha::EncoderConfig encoder_of(bool causal, Index streams) {
  return {.depth = 3,
          .layers = {{.dim = 48,
                      .window_size = 20,
                      .dim_head = 16,
                      .heads = 3,
                      .causal = causal,
                      .prenorm = true}},
          .num_residual_streams = streams};
}

TEST(Bf16Stack, TheErrorIsAboutThatOfStorage) {
  for (const Index streams : {1, 2}) {
    const auto config = encoder_of(true, streams);
    Random random(3);
    const local_mha::Encoder<float> exact(
        config, random_parameters(
                    random, local_mha::initial_parameters<EncoderParameters>(config, 7), 0.02));
    const local_mha::Encoder<float, bfloat16> stored(config, exact.parameters());
    const Encoder encoder(config, exact.parameters());
    const Tensor<float, 3> x = random_rows(random, 2, 150, 48);
    const Tensor<float, 3> y = exact.forward(x);
    const double of_storage = relative_error(stored.forward(x), y);
    const double of_operands = relative_error(encoder.forward(x), y);
    EXPECT_GT(of_operands, of_storage) << streams;
    EXPECT_LT(of_operands, 1.8 * of_storage) << streams;
    EXPECT_LT(of_operands, 3e-3) << streams;
    RecordProperty("of_storage_" + std::to_string(streams), std::to_string(of_storage));
    RecordProperty("of_operands_" + std::to_string(streams), std::to_string(of_operands));
  }
}

TEST(Bf16Stack, ThreadsGiveTheSameBits) {
  Threads threads;
  Random random(5);
  for (const Index streams : {1, 3}) {
    const Encoder encoder(encoder_of(false, streams), 2);
    for (const Index n : {1, 40, 333}) {
      const Tensor<float, 3> x = random_rows(random, 2, n, 48);
      const Tensor<float, 3> y = encoder.forward(x);
      EXPECT_TRUE(support::same_bits(encoder.forward(x, {.device = threads.device}), y)) << n;
      // Nor does it matter which rows pass beside a row.
      const Tensor<float, 3> second(
          x.slice(Eigen::array<Index, 3>{1, 0, 0}, Eigen::array<Index, 3>{1, n, 48}));
      const Tensor<float, 3> alone = encoder.forward(second);
      for (Index i = 0; i < alone.size(); ++i)
        ASSERT_EQ(alone.data()[i], y.data()[alone.size() + i]) << n;
    }
  }
  const FeedForward layer(random_feed_forward(random, 30, 77));
  const Linear linear(
      random_parameters(random, local_mha::LinearParameters<float>::zeros({30, 41, true}), 0.5));
  const Tensor<float, 3> x = random_rows(random, 3, 300, 30);
  const local_mha::ModuleCall call{.device = threads.device};
  EXPECT_TRUE(support::same_bits(layer.forward(x, call), layer.forward(x)));
  EXPECT_TRUE(support::same_bits(linear.forward(x, call), linear.forward(x)));
  for (const Index n : {900, 17}) {
    const Tensor<float, 3> rows = random_rows(random, 1, n, 30),
                           grad = random_rows(random, 1, n, 30);
    EXPECT_EQ(largest_error(gradients_of(layer, rows, grad, call), gradients_of(layer, rows, grad)),
              0);
    const Tensor<float, 3> of_linear = random_rows(random, 1, n, 41);
    EXPECT_EQ(largest_error(gradients_of(linear, rows, of_linear, call),
                            gradients_of(linear, rows, of_linear)),
              0);
  }
}

local_mha::LocalTransformerConfig small_model();
TransformerParameters model_parameters(std::uint64_t seed);
Tensor<std::int64_t, 2> random_tokens(Random& random, Index batch, Index n);

/// Of the rows, as "x", and of the weights.
template <typename SomeEncoder>
reference::Parameters<float> encoder_gradients(const SomeEncoder& encoder,
                                               const Tensor<float, 3>& x,
                                               const Tensor<float, 3>& grad_y,
                                               const local_mha::EncoderCall& call = {}) {
  typename SomeEncoder::Saved saved;
  const Tensor<float, 3> y = encoder.forward_saving(saved, x, call);
  EXPECT_TRUE(support::same_bits(y, encoder.forward(x, call)));
  auto gradients = EncoderParameters::zeros(encoder.config());
  const Tensor<float, 3> of_x = encoder.backward(gradients, saved, grad_y, call.device);
  auto all = support::named<float>(gradients);
  all["x"] = support::array(of_x);
  return all;
}

TEST(Bf16Stack, AnEncoderGoesBackAsItsLayersDo) {
  Threads threads;
  Random random(11);
  // One layer, written out in its modules: the same numbers up to the order of sums.
  auto config = encoder_of(true, 1);
  config.depth = 1;
  const Encoder encoder(config, 5);
  const EncoderParameters p = encoder.parameters();
  const local_mha::LocalMHA<float, bfloat16, bfloat16> attention(config.layers.front(),
                                                                 p.layers.front().attention);
  const FeedForward feed_forward(p.layers.front().feed_forward);
  const Tensor<float, 3> x = random_rows(random, 2, 75, 48),
                         grad_y = random_rows(random, 2, 75, 48);
  decltype(attention)::Saved of_attention;
  const Tensor<float, 3> middle = attention.forward_saving(of_attention, x) + x;
  FeedForward::Saved of_feed_forward;
  feed_forward.forward_saving(of_feed_forward, middle);
  auto wanted = EncoderParameters::zeros(config);
  const Tensor<float, 3> of_middle =
      feed_forward.backward(wanted.layers.front().feed_forward, of_feed_forward, grad_y, middle) +
      grad_y;
  const Tensor<float, 3> of_x =
      attention.backward(wanted.layers.front().attention, of_attention, of_middle, x) + of_middle;
  auto all = support::named<float>(wanted);
  all["x"] = support::array(of_x);
  const auto got = encoder_gradients(encoder, x, grad_y);
  ASSERT_EQ(got.size(), all.size());
  for (const auto& [name, array] : all)
    EXPECT_LT(support::apart(got.at(name), array).rms, 1e-6) << name;

  for (const Index streams : {1, 2}) {
    const local_mha::Encoder<float> exact(encoder_of(false, streams), 9);
    const Encoder deep(exact.config(), exact.parameters());
    const auto of_products = encoder_gradients(deep, x, grad_y),
               of_float = encoder_gradients(exact, x, grad_y);
    for (const auto& [name, array] : of_float) {
      double largest = 0;
      for (const float number : array.data) largest = std::max<double>(largest, std::abs(number));
      if (largest < 1e-4) continue;
      EXPECT_LT(support::apart(of_products.at(name), array).rms, 0.03) << name;
    }
    const auto on_threads = encoder_gradients(deep, x, grad_y, {.device = threads.device});
    for (const auto& [name, array] : of_products)
      EXPECT_EQ(on_threads.at(name).data, array.data) << name;
  }
}

TEST(Bf16Stack, AModelLearnsByItsRoundedProducts) {
  Random random(12);
  const Tensor<std::int64_t, 2> tokens = random_tokens(random, 4, 60);
  TransformerParameters parameters = model_parameters(3);
  LocalTransformer model(small_model(), parameters);
  local_mha::LocalTransformer<float> exact(small_model(), parameters);
  auto gradients = TransformerParameters::zeros(small_model()), of_float = gradients;
  EXPECT_NEAR(model.backward(gradients, tokens), exact.backward(of_float, tokens), 1e-2);
  const auto got = support::named<float>(gradients);
  for (const auto& [name, array] : support::named<float>(of_float))
    EXPECT_LT(support::apart(got.at(name), array).rms, 0.03) << name;
  const float before = model.loss(tokens);
  local_mha::AdamW optimizer({}, gradients);
  for (int step = 0; step < 60; ++step) {
    local_mha::set_zero(gradients);
    model.backward(gradients, tokens);
    optimizer.step(parameters, gradients, 1e-2);
    model.set_parameters(parameters);
  }
  EXPECT_LT(model.loss(tokens), before / 3);
}

TEST(Bf16Stack, WhatLiesBehindASequenceReachesNobody) {
  Random random(6);
  for (const Index streams : {1, 2}) {
    const Encoder encoder(encoder_of(false, streams), 4);
    const std::vector<Index> lengths{37, 1, 20};
    Tensor<float, 3> x = random_rows(random, 3, 37, 48);
    for (Index b = 0; b < 3; ++b)
      for (Index i = lengths[static_cast<std::size_t>(b)]; i < 37; ++i)
        for (Index c = 0; c < 48; ++c) x(b, i, c) = std::numeric_limits<float>::quiet_NaN();
    const Tensor<float, 3> y = encoder.forward(x, {.lengths = lengths});
    for (Index b = 0; b < 3; ++b) {
      const Index n = lengths[static_cast<std::size_t>(b)];
      const Tensor<float, 3> alone = encoder.forward(Tensor<float, 3>(
          x.slice(Eigen::array<Index, 3>{b, 0, 0}, Eigen::array<Index, 3>{1, n, 48})));
      for (Index i = 0; i < n; ++i)
        for (Index c = 0; c < 48; ++c) {
          ASSERT_TRUE(std::isfinite(y(b, i, c))) << b << ' ' << i;
          ASSERT_EQ(y(b, i, c), alone(0, i, c)) << b << ' ' << i;
        }
    }
  }
}

/// Pushes rows of one sequence in chunks; 0: of any sizes.
template <typename Stream>
Tensor<float, 3> pushed(Stream& stream, const Tensor<float, 3>& x, Random& random, Index chunk) {
  Tensor<float, 3> y(x.dimensions());
  Index out = 0;
  const auto take = [&](const Tensor<float, 3>& got) {
    std::copy_n(got.data(), got.size(), y.data() + out);
    out += got.size();
  };
  for (Index i = 0; i < x.dimension(1);) {
    const Index n = std::min<Index>(chunk > 0 ? chunk : random.integer(1, 90), x.dimension(1) - i);
    take(stream.push(Tensor<float, 3>(
        x.slice(Eigen::array<Index, 3>{0, i, 0}, Eigen::array<Index, 3>{1, n, x.dimension(2)}))));
    i += n;
  }
  take(stream.flush());
  EXPECT_EQ(out, y.size());
  return y;
}

TEST(Bf16Stack, AStreamGivesWhatForwardDoes) {
  Random random(8);
  double worst = 0;
  for (const bool causal : {true, false})
    for (const Index streams : {1, 2}) {
      const Encoder encoder(encoder_of(causal, streams), 9);
      const Tensor<float, 3> x = random_rows(random, 1, 260, 48);
      const Tensor<float, 3> wanted = encoder.forward(x);
      for (const Index chunk : {1, 3, 16, 260, 0}) {
        Encoder::Stream stream(encoder);
        const Tensor<float, 3> got = pushed(stream, x, random, chunk);
        worst = std::max(worst, relative_error(got, wanted));
        // By whole blocks, sums are the same.
        if (chunk == 260 && causal && streams == 1) {
          EXPECT_TRUE(support::same_bits(got, wanted));
        }
      }
    }
  // Where single rows sum in another order, some numbers near a tie are rounded to the other side.
  EXPECT_GT(worst, 0);
  EXPECT_LT(worst, 2e-4);
}

TEST(Bf16Stack, AStateGoesOnToTheSameBits) {
  Random random(10);
  const Encoder encoder(encoder_of(false, 2), 1);
  const Tensor<float, 3> x = random_rows(random, 1, 70, 48), more = random_rows(random, 1, 40, 48);
  Encoder::Stream stream(encoder), other(encoder);
  stream.push(x);
  std::stringstream state;
  stream.save(state);
  other.load(state);
  EXPECT_TRUE(support::same_bits(other.push(more), stream.push(more)));
  EXPECT_TRUE(support::same_bits(other.flush(), stream.flush()));
}

// ---- models

local_mha::LocalTransformerConfig small_model() {
  return {.num_tokens = 50,
          .max_seq_len = 128,
          .dim = 32,
          .depth = 2,
          .local_attn_window_size = 16,
          .dim_head = 16,
          .heads = 2};
}

TransformerParameters model_parameters(std::uint64_t seed) {
  Random random(seed);
  return random_parameters(
      random, local_mha::initial_parameters<TransformerParameters>(small_model(), seed), 0.05);
}

Tensor<std::int64_t, 2> random_tokens(Random& random, Index batch, Index n) {
  Tensor<std::int64_t, 2> tokens(batch, n);
  for (Index i = 0; i < tokens.size(); ++i) tokens.data()[i] = random.integer(0, 49);
  return tokens;
}

/// A state of one stream is refused by the other, which stays as it was, whichever comes first.
template <typename Some, typename Other>
void expect_refused_by_each_other(Some& of_sums, Other& of_products) {
  const auto message = [](const auto& from, auto& to) {
    std::stringstream state, before, after;
    from.save(state);
    to.save(before);
    std::string text = "none";
    try {
      to.load(state);
    } catch (const std::invalid_argument& error) {
      text = error.what();
    }
    to.save(after);
    EXPECT_EQ(before.str(), after.str());
    return text;
  };
  const std::string what = ", multiplied as bfloat16, batch 1, 4 bytes, kept as bfloat16";
  const std::string of_load = message(of_sums, of_products);
  EXPECT_NE(of_load.find("state: expected that of "), std::string::npos) << of_load;
  EXPECT_NE(of_load.find(what + ", got"), std::string::npos) << of_load;
  EXPECT_TRUE(message(of_products, of_sums).ends_with(what));
}

TEST(Bf16Stack, AStateOfStorageAloneIsRefused) {
  const local_mha::EncoderConfig config = encoder_of(true, 1);
  const Encoder encoder(config, 1);
  const local_mha::Encoder<float, bfloat16> stored(config, 1);
  Encoder::Stream stream(encoder);
  local_mha::Encoder<float, bfloat16>::Stream of_stored(stored);
  Random random(12);
  const Tensor<float, 3> x = random_rows(random, 1, 20, 48);
  of_stored.push(x);
  expect_refused_by_each_other(of_stored, stream);

  using Layer = local_mha::LocalMHA<float, bfloat16, bfloat16>;
  using Stored = local_mha::LocalMHA<float, bfloat16>;
  const Layer layer(config.layers.front());
  Layer::Stream of_layer(layer);
  Stored::Stream of_stored_layer(Stored{config.layers.front()});
  of_stored_layer.push(x);
  expect_refused_by_each_other(of_stored_layer, of_layer);

  using Attention = local_mha::LocalAttention<float, local_mha::ConfiguredScore, bfloat16>;
  const local_mha::LocalAttention<float> attention({.window_size = 4, .causal = true});
  Attention::StreamOf<bfloat16> of_attention(Attention{attention.config()}, 1, 16);
  local_mha::LocalAttention<float>::StreamOf<bfloat16> of_stored_attention(attention, 1, 16);
  expect_refused_by_each_other(of_stored_attention, of_attention);

  LocalTransformer::Stream of_model(LocalTransformer{small_model()});
  local_mha::LocalTransformer<float, bfloat16>::Stream of_stored_model(
      local_mha::LocalTransformer<float, bfloat16>{small_model()});
  of_stored_model.push(random_tokens(random, 1, 9));
  expect_refused_by_each_other(of_stored_model, of_model);
}

/// The logits of what the layers give for embeddings that are stored in bfloat16.
Numbers logits_of(const TransformerParameters& parameters, const Tensor<std::int64_t, 2>& tokens,
                  const Roundings& roundings = {}) {
  const auto config = small_model();
  const Index n = tokens.dimension(1);
  Tensor<float, 3> x(1, n, config.dim);
  for (Index i = 0; i < n; ++i)
    for (Index c = 0; c < config.dim; ++c)
      x(0, i, c) =
          static_cast<float>(operand(static_cast<double>(parameters.token_emb(tokens(0, i), c)))) +
          static_cast<float>(operand(static_cast<double>(parameters.pos_emb(i, c))));
  const Encoder encoder(local_mha::encoder_config(config),
                        static_cast<const EncoderParameters&>(parameters));
  const auto named = support::named<double>(parameters);
  return linear(rounded(layer_norm(rows_of(encoder.forward(x), n), named.at("to_logits.0.weight"),
                                   named.at("to_logits.0.bias")),
                        roundings.rows),
                named.at("to_logits.1.weight"), roundings);
}

TEST(Bf16Stack, AModelMapsRoundedRowsToLogits) {
  for (std::uint64_t seed = 0; seed < random_cases(10); ++seed) {
    Random random(seed);
    const TransformerParameters parameters = model_parameters(seed);
    const LocalTransformer model(small_model(), parameters);
    const Index n = random.integer(2, 100);
    const Tensor<std::int64_t, 2> tokens = random_tokens(random, 1, n);
    const Tensor<float, 3> logits = model.forward(tokens);
    EXPECT_TRUE(fits(logits.data(), logits_of(parameters, tokens))) << seed;
    EXPECT_FALSE(fits(logits.data(), logits_of(parameters, tokens, {.weights = false}))) << seed;
    EXPECT_FALSE(fits(logits.data(), logits_of(parameters, tokens, {.rows = false}))) << seed;

    // The loss is that of the logits.
    Array<Int> of_tokens({1, n});
    std::copy_n(tokens.data(), n, of_tokens.data.data());
    Array<Int> labels({1, n - 1});
    std::copy_n(tokens.data() + 1, n - 1, labels.data.data());
    Array<double> before_last({1, n - 1, 50});
    for (std::size_t i = 0; i < before_last.data.size(); ++i)
      before_last.data[i] = static_cast<double>(logits.data()[i]);
    EXPECT_NEAR(static_cast<double>(model.loss(tokens)),
                reference::cross_entropy(before_last, labels, -1), 1e-5);

    for (const Index chunk : {1, 7, 0}) {
      LocalTransformer::Stream stream(model);
      Tensor<float, 3> got(1, n, 50);
      for (Index i = 0; i < n;) {
        const Index some = std::min<Index>(chunk > 0 ? chunk : random.integer(1, 60), n - i);
        Tensor<std::int64_t, 2> part(1, some);
        std::copy_n(tokens.data() + i, some, part.data());
        const Tensor<float, 3> of_part = stream.push(part);
        std::copy_n(of_part.data(), of_part.size(), got.data() + i * 50);
        i += some;
      }
      EXPECT_LT(relative_error(got, logits), 1e-3) << seed << ", chunks of " << chunk;
    }
  }
}

TEST(Bf16Stack, AModelGeneratesAsItsStreamDoes) {
  const LocalTransformer model(small_model(), model_parameters(4));
  Tensor<std::int64_t, 2> prompt(1, 5);
  for (Index i = 0; i < 5; ++i) prompt(0, i) = 3 * i;
  const auto tokens = model.generate(prompt, {.length = 20, .sampling = {.temperature = 0}});
  LocalTransformer::Stream stream(model);
  Tensor<float, 3> logits = stream.push(prompt);
  for (Index i = 0; i < 20; ++i) {
    const float* last = &logits(0, logits.dimension(1) - 1, 0);
    const Index best = std::max_element(last, last + 50) - last;
    ASSERT_EQ(tokens(0, i), best) << i;
    Tensor<std::int64_t, 2> next(1, 1);
    next(0, 0) = best;
    logits = stream.push(next);
  }
}

TEST(Bf16Stack, FilesInBf16AreMultipliedAsTheyAre) {
  const LocalTransformer by_float(small_model(), model_parameters(2));
  local_mha::io::SafetensorsWriter writer;
  local_mha::io::add_local_transformer(writer, small_model(), by_float.parameters(),
                                       {.dtype = local_mha::io::Dtype::BF16});
  auto [config, parameters] = local_mha::io::load_local_transformer<bfloat16>(
      local_mha::io::SafetensorsFile::from_bytes(writer.bytes()));
  const LocalTransformer model(config, std::move(parameters));
  Random random(1);
  const auto tokens = random_tokens(random, 1, 40);
  // The vectors of the file are rounded, too.
  TransformerParameters vectors = by_float.parameters();
  local_mha::for_each_parameter(vectors, [](const std::string&, auto& tensor) {
    for (Index i = 0; i < tensor.size(); ++i)
      tensor.data()[i] = static_cast<float>(static_cast<bfloat16>(tensor.data()[i]));
  });
  const LocalTransformer wanted(small_model(), vectors);
  EXPECT_TRUE(support::same_bits(model.forward(tokens), wanted.forward(tokens)));
}

TEST(Bf16Stack, ParametersAreTheRoundedOnes) {
  const auto config = encoder_of(false, 2);
  const local_mha::Encoder<float> exact(config, 3);
  const local_mha::Encoder<float, bfloat16> stored(config, exact.parameters());
  const Encoder encoder(config, exact.parameters());
  const auto wanted = support::named<double>(stored.parameters());
  const auto got = support::named<double>(encoder.parameters());
  ASSERT_EQ(got.size(), wanted.size());
  for (const auto& [name, array] : wanted) EXPECT_EQ(got.at(name).data, array.data) << name;
}

template <typename Layer>
concept GoesBack = requires(const Layer& layer, typename Layer::Saved& saved,
                            const Tensor<float, 3>& x) { layer.forward_saving(saved, x); };
static_assert(GoesBack<local_mha::Encoder<float>> && GoesBack<Encoder>);
static_assert(!GoesBack<local_mha::Encoder<float, bfloat16>>);
static_assert(GoesBack<local_mha::FeedForward<float>> && GoesBack<FeedForward>);
static_assert(GoesBack<local_mha::Linear<float>> && GoesBack<Linear>);
static_assert(!GoesBack<local_mha::FeedForward<float, bfloat16>>);
static_assert(!GoesBack<local_mha::Linear<float, Eigen::half>>);
static_assert(std::is_same_v<local_mha::Encoder<float>, local_mha::Encoder<float, float, float>>);

// ---- memory

TEST(Bf16Stack, PassesIntoGivenMemoryAllocateNothing) {
  if (!measuring::counts_heap) GTEST_SKIP();
  Random random(3);
  const Encoder encoder(encoder_of(false, 2), 1);
  const FeedForward layer(random_feed_forward(random, 48, 70));
  const Linear linear(
      random_parameters(random, local_mha::LinearParameters<float>::zeros({48, 48, false}), 0.5));
  const LocalTransformer model(small_model(), model_parameters(1));
  Encoder::Workspace of_encoder;
  FeedForward::Workspace of_layer, of_rows(layer);
  Linear::Workspace of_linear;
  Encoder::Stream stream(encoder);
  LocalTransformer::Stream tokens(model);
  Tensor<float, 3> x = random_rows(random, 1, 300, 48), y(1, 300, 48), logits(1, 300, 50);
  const Tensor<std::int64_t, 2> given = random_tokens(random, 1, 300);
  FeedForward::Saved saved;
  layer.forward_saving(saved, x);
  FeedForwardParameters gradients = layer.parameters();
  for (const Index n : {300, 7, 1, 300, 1, 30}) {
    const TensorView<const float, 3> in(x.data(), {1, n, 48});
    const TensorView<float, 3> out(y.data(), {1, n, 48});
    measuring::restart_heap_count();
    encoder.forward_into(out, of_encoder, in);
    layer.forward_into(out, of_layer, in);
    linear.forward_into(out, of_linear, in);
    layer.backward_into(y, of_layer, gradients, saved, x, x);
    const std::size_t first = measuring::heap_use().allocations;
    measuring::restart_heap_count();
    layer.forward_into(n, x.data(), 48, y.data(), of_rows);
    stream.push_into(TensorView<float, 3>(y.data(), {1, stream.results_of(n), 48}), in);
    tokens.push_into(TensorView<float, 3>(logits.data(), {1, n, 50}),
                     TensorView<const std::int64_t, 2>(given.data(), {1, n}));
    EXPECT_EQ(measuring::heap_use().allocations, 0U) << n;
    static bool warm = false;
    if (warm) {
      EXPECT_EQ(first, 0U) << n;
    }
    warm = true;
  }
}

}  // namespace bf16_stack_test
