// SPDX-License-Identifier: MIT
// Gradients of LocalMHA and LocalAttention whose products are of operands in bfloat16, against a
// reference that rounds the same numbers by their definition. Where the processor has a matrix
// unit, all of it runs through that.
#define EIGEN_USE_THREADS

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/local_mha.hpp>

#include "reference/operand_gradients.hpp"
#include "support/operand_case.hpp"

namespace bf16_backward_test {

using local_mha::Index;
using local_mha::Tensor;
using reference::Array;
using Operands = reference::LayerBackwardOperands;
using support::apart;
using support::Apart;
using support::for_each_case;
using support::layer_of;
using support::OperandCase;
using Layer = support::OperandLayer;
using Attention = local_mha::LocalAttention<float, local_mha::ConfiguredScore, Eigen::bfloat16>;

/// Gradients by their names: of "x", "attn_bias" and the weights.
template <typename Real>
using Gradients = std::map<std::string, Array<Real>>;

Array<double> grad_y_of(const OperandCase& c) {
  Random random(static_cast<std::uint64_t>(c.seqlen() + 1000 * c.config.dim));
  return support::without_rows_behind_lengths(c,
                                              random.array({c.batch(), c.seqlen(), c.config.dim}));
}

template <typename SomeLayer>
Gradients<float> gradients_of(const SomeLayer& layer, const OperandCase& c,
                              const Tensor<float, 3>& grad_y,
                              const local_mha::AnyDevice& device = {}) {
  const Tensor<float, 3> x = support::tensor<float, 3>(c.in.x);
  const Tensor<float, 3> bias = support::bias_tensor<float>(c.in.bias);
  local_mha::LocalMHACall<float> call{
      .mask = support::padding_mask(c.in.masked, c.batch(), c.seqlen()),
      .training = c.training,
      .cu_seqlens = c.cu_seqlens,
      .lengths = c.lengths,
      .device = device};
  Tensor<float, 3> grad_bias(bias.dimensions());
  grad_bias.setZero();
  if (bias.size() > 0) call.attn_bias = local_mha::TensorView<const float, 3>(bias);
  typename SomeLayer::Saved saved;
  const Tensor<float, 3> y = layer.forward_saving(saved, x, call);
  EXPECT_TRUE(support::same_bits(y, layer.forward(x, call)));
  auto of_weights = local_mha::LocalMHAParameters<float>::zeros(c.config);
  const Tensor<float, 3> of_x =
      layer.backward(of_weights, saved, grad_y, x, call, bias.size() > 0 ? &grad_bias : nullptr);
  Gradients<float> result = support::named<float>(of_weights);
  result["x"] = support::array(of_x);
  if (bias.size() > 0) result["attn_bias"] = support::array(grad_bias);
  return result;
}
Gradients<float> gradients_of(const OperandCase& c, const local_mha::AnyDevice& device = {}) {
  return gradients_of(layer_of(c), c, support::tensor<float, 3>(grad_y_of(c)), device);
}

Gradients<double> named(reference::LayerGradients<double> of_call,
                        reference::Parameters<double> of_weights, const OperandCase& c) {
  of_weights["x"] = support::without_rows_behind_lengths(c, of_call.x);
  if (!c.in.bias.empty()) of_weights["attn_bias"] = of_call.bias;
  return of_weights;
}
Gradients<double> rounded_of(const OperandCase& c, const Operands& operands = {}) {
  auto of_weights = reference::zeros_like(c.parameters);
  auto of_call = reference::local_mha_backward_of_operands(
      support::reference_options(c), c.parameters, support::reference_inputs(c), grad_y_of(c),
      support::rotary_group(c), of_weights, operands);
  return named(std::move(of_call), std::move(of_weights), c);
}
Gradients<double> exact_of(const OperandCase& c, const Array<double>& grad_y) {
  auto of_weights = reference::zeros_like(c.parameters);
  auto of_call = reference::local_mha_backward(support::reference_options(c), c.parameters,
                                               support::reference_inputs(c), grad_y, of_weights);
  return named(std::move(of_call), std::move(of_weights), c);
}

double largest_of(const Array<double>& array) {
  double largest = 0;
  for (const double x : array.data) largest = std::max(largest, std::abs(x));
  return largest;
}

/// How far all gradients of many cases are apart, each as a share of what it is.
class Pooled {
 public:
  template <typename Got>
  void add(const Gradients<Got>& got, const Gradients<double>& wanted) {
    double largest = 0;
    for (const auto& [name, array] : wanted) largest = std::max(largest, largest_of(array));
    for (const auto& [name, array] : wanted) {
      // What is 0 has no share: those of queries that see a single key, say.
      if (largest_of(array) < 1e-6 * largest) {
        most_of_nothing_ =
            std::max(most_of_nothing_, largest_of(reference::cast<double>(got.at(name))) / largest);
        continue;
      }
      const Apart error = apart(got.at(name), array);
      squares_ += error.rms * error.rms;
      ++number_;
      most_ = std::max(most_, error.most);
    }
  }
  double rms() const { return std::sqrt(squares_ / number_); }
  double most() const { return most_; }
  double most_of_nothing() const { return most_of_nothing_; }

 private:
  double squares_ = 0, number_ = 0, most_ = 0, most_of_nothing_ = 0;
};

// What float's own rounding changes: here and there, an operand becomes the next one.
constexpr double rms_of_flips = 3e-4, most_of_flips = 0.01;

TEST(Bf16Backward, IsThatOfRoundedOperands) {
  Pooled of_rounded, of_exact;
  for_each_case(random_cases(20), [&](const OperandCase& c) {
    const Gradients<float> got = gradients_of(c);
    const Gradients<double> wanted = rounded_of(c);
    ASSERT_EQ(got.size(), wanted.size());
    of_rounded.add(got, wanted);
    of_exact.add(got, exact_of(c, grad_y_of(c)));
  });
  EXPECT_LT(of_rounded.rms(), rms_of_flips);
  EXPECT_LT(of_rounded.most(), most_of_flips);
  EXPECT_LT(of_rounded.most_of_nothing(), 1e-5);
  EXPECT_GT(of_exact.rms(), 10 * rms_of_flips);
}

TEST(Bf16Backward, RoundsEveryKindOfOperand) {
  const std::pair<const char*, Operands> kinds[] = {
      {"rows", {.projections = {.rows = false}}},
      {"gradients", {.projections = {.gradients = false}}},
      {"results", {.results = false}},
      {"probabilities", {.probabilities = false}},
      {"scores", {.scores = false}}};
  Pooled all;
  std::vector<Pooled> without(std::size(kinds));
  for (std::uint64_t seed = 0; seed < random_cases(15); ++seed) {
    const OperandCase c = support::operand_case(66000 + seed, 30);
    const Gradients<float> got = gradients_of(c);
    all.add(got, rounded_of(c));
    for (std::size_t i = 0; i < std::size(kinds); ++i)
      without[i].add(got, rounded_of(c, kinds[i].second));
  }
  for (std::size_t i = 0; i < std::size(kinds); ++i)
    EXPECT_GT(without[i].rms(), 5 * all.rms()) << kinds[i].first;
}

TEST(Bf16Backward, IsUpToThreeTimesAsFarFromTheExactResultAsRoundedInputs) {
  Pooled inputs, results;
  for_each_case(random_cases(8), [&](const OperandCase& c) {
    const Gradients<double> exact = exact_of(c, grad_y_of(c));
    OperandCase rounded = c;
    Array<double> grad_y = grad_y_of(c);
    reference::round_if(true, grad_y);
    reference::round_if(true, rounded.in.x);
    for (auto& [name, weight] : rounded.parameters)
      reference::round_if(weight.shape.size() == 2 && name != "relative_bias", weight);
    inputs.add(exact_of(rounded, grad_y), exact);
    results.add(gradients_of(c), exact);
  });
  EXPECT_LE(results.rms(), 3 * inputs.rms());
}

TEST(Bf16Backward, GivesTheSameBitsOnAnyNumberOfThreads) {
  Eigen::ThreadPool two(2), five(5);
  const Eigen::ThreadPoolDevice of_two(&two, 2), of_five(&five, 5);
  for_each_case(random_cases(12), [&](const OperandCase& c) {
    const Gradients<float> wanted = gradients_of(c);
    for (const Eigen::ThreadPoolDevice* device : {&of_two, &of_five}) {
      const Gradients<float> got = gradients_of(c, *device);
      for (const auto& [name, array] : wanted) EXPECT_EQ(got.at(name).data, array.data) << name;
    }
  });
}

// ---- what is not seen

constexpr float none = std::numeric_limits<float>::quiet_NaN();

struct AttentionCase {
  Tensor<float, 4> q, k, v, grad_out;
};
AttentionCase attention_case(std::uint64_t seed, Index heads, Index kv_heads, Index n, Index d) {
  Random random(seed);
  const auto make = [&](Index h) { return support::tensor<float, 4>(random.array({1, h, n, d})); };
  return {make(heads), make(kv_heads), make(kv_heads), make(heads)};
}
Attention::Gradients gradients_of(const Attention& attention, const AttentionCase& c,
                                  const local_mha::LocalAttentionCall<float>& call) {
  const auto saved = attention.forward_saving(c.q, c.k, c.v, call);
  return attention.backward(saved, c.grad_out, c.q, c.k, c.v, call);
}
void fill_row(Tensor<float, 4>& of, Index row, float with) {
  for (Index h = 0; h < of.dimension(1); ++h)
    for (Index c = 0; c < of.dimension(3); ++c) of(0, h, row, c) = with;
}

TEST(Bf16Backward, WhatIsNotSeenGivesNothingWhateverItHolds) {
  const float beyond[] = {none, std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::max(), -3.4e38F, 1e-40F};
  for (const bool causal : {true, false})
    for (const Index d : {Index{8}, Index{33}, Index{64}}) {
      const Index n = 90;
      const Attention attention({.window_size = 20,
                                 .causal = causal,
                                 .exact_windowsize = true,
                                 .use_rotary_pos_emb = d % 2 == 0});
      AttentionCase c = attention_case(static_cast<std::uint64_t>(d), 2, 1, n, d);
      std::vector<unsigned char> masked(static_cast<std::size_t>(n), 0);
      for (const Index row : {0, 5, 31, 47, 88}) masked[static_cast<std::size_t>(row)] = 1;
      const local_mha::PaddingMask mask = support::padding_mask(masked, 1, n);
      const auto with = [&](float number) {
        for (Index i = 0; i < n; ++i)
          if (masked[static_cast<std::size_t>(i)] != 0) {
            fill_row(c.k, i, number);
            fill_row(c.v, i, number);
          }
        return gradients_of(attention, c, {.mask = mask});
      };
      const Attention::Gradients wanted = with(0);
      for (const float number : beyond) {
        const Attention::Gradients got = with(number);
        // A sum pair by pair has another order.
        EXPECT_LT(apart(support::array(got.q), support::array(wanted.q)).most, 1e-5) << number;
        EXPECT_LT(apart(support::array(got.k), support::array(wanted.k)).most, 1e-5) << number;
        EXPECT_LT(apart(support::array(got.v), support::array(wanted.v)).most, 1e-5) << number;
        for (const Index row : {0, 5, 31, 47, 88})
          for (Index at = 0; at < d; ++at) {
            EXPECT_EQ(got.k(0, 0, row, at), 0) << number;
            EXPECT_EQ(got.v(0, 0, row, at), 0) << number;
          }
      }
    }
}

TEST(Bf16Backward, WhatIsNoNumberReachesWhatSeesItAndNothingElse) {
  const Index n = 70, row = 33;
  const Attention attention({.window_size = 10, .causal = true, .exact_windowsize = true});
  for (const float number : {none, std::numeric_limits<float>::infinity(), 3.4e38F}) {
    AttentionCase c = attention_case(7, 1, 1, n, 16);
    fill_row(c.v, row, number);
    const Attention::Gradients got = gradients_of(attention, c, {});
    for (Index i = 0; i < n; ++i) {
      // Queries up to 10 behind see it; its value changes their gradients alone, and through these
      // those of keys that they see.
      const bool sees = i >= row && i <= row + 10;
      const bool beside_such = i >= row - 10 && i <= row + 10;
      EXPECT_EQ(std::isfinite(got.q(0, 0, i, 3)), !sees) << i;
      EXPECT_EQ(std::isfinite(got.k(0, 0, i, 3)), !beside_such) << i;
      EXPECT_TRUE(std::isfinite(got.v(0, 0, i, 3))) << i;
    }
  }
}

TEST(Bf16Backward, AQueryOrAGradientThatIsNoNumberReachesTheKeysThatItSees) {
  const Index n = 70, row = 33;
  local_mha::LocalAttentionConfig config{
      .window_size = 10, .causal = true, .exact_windowsize = true};
  // Queries are multiplied as they are given, of which the last number is too large.
  config.scale = std::numbers::ln2;
  const Attention attention(config);
  const AttentionCase given = attention_case(9, 1, 1, n, 16);
  const Attention::Gradients wanted = gradients_of(attention, given, {});
  for (const bool of_query : {true, false})
    for (const float number : {none, std::numeric_limits<float>::infinity(), 3.4e38F}) {
      AttentionCase c = given;
      fill_row(of_query ? c.q : c.grad_out, row, number);
      const Attention::Gradients got = gradients_of(attention, c, {});
      for (Index i = 0; i < n; ++i) {
        const bool seen = i >= row - 10 && i <= row;
        for (Index at = 0; at < 16; ++at) {
          if (i != row) {
            EXPECT_NEAR(got.q(0, 0, i, at), wanted.q(0, 0, i, at), 1e-5) << i;
          }
          if (seen) continue;
          EXPECT_NEAR(got.k(0, 0, i, at), wanted.k(0, 0, i, at), 1e-5) << i;
          EXPECT_NEAR(got.v(0, 0, i, at), wanted.v(0, 0, i, at), 1e-5) << i;
        }
      }
    }
}

TEST(Bf16Backward, OfPackedSequencesIsThatOfEachAlone) {
  const Attention attention({.window_size = 12, .causal = true});
  const std::vector<Index> ends{0, 1, 1, 30, 47, 90};
  const AttentionCase c = attention_case(3, 4, 2, 90, 32);
  const Attention::Gradients got = gradients_of(attention, c, {.cu_seqlens = ends});
  for (std::size_t s = 0; s + 1 < ends.size(); ++s) {
    const auto part = [&](const Tensor<float, 4>& of) {
      return Tensor<float, 4>(of.slice(
          Eigen::array<Index, 4>{0, 0, ends[s], 0},
          Eigen::array<Index, 4>{1, of.dimension(1), ends[s + 1] - ends[s], of.dimension(3)}));
    };
    const AttentionCase alone{part(c.q), part(c.k), part(c.v), part(c.grad_out)};
    const Attention::Gradients wanted = gradients_of(attention, alone, {});
    EXPECT_TRUE(support::same_bits(part(got.q), wanted.q)) << s;
    EXPECT_TRUE(support::same_bits(part(got.k), wanted.k)) << s;
    EXPECT_TRUE(support::same_bits(part(got.v), wanted.v)) << s;
  }
}

TEST(Bf16Backward, OfGlobalRowsAndFirstKeysIsNearThatOfFloat) {
  for (std::uint64_t seed = 0; seed < random_cases(12); ++seed) {
    const Index n = 60 + static_cast<Index>(13 * seed);
    local_mha::LocalAttentionConfig config{.causal = seed % 2 == 1};
    config.token_window = {20, seed % 2 == 1 ? 0 : 20};
    if (seed % 3 == 0) config.first_keys = 5;
    const AttentionCase c = attention_case(seed, 2, 1, n, seed % 3 == 1 ? 40 : 64);
    local_mha::Tensor<bool, 2> global(1, n);
    global.setConstant(false);
    local_mha::LocalAttentionCall<float> call;
    if (config.first_keys == 0) {
      global(0, 3) = global(0, n / 2) = global(0, n - 1) = true;
      call.global_rows = local_mha::TensorView<const bool, 2>(global);
    }
    if (config.causal && config.first_keys == 0) continue;
    const Attention::Gradients got = gradients_of(Attention(config), c, call);
    const local_mha::LocalAttention<float> exact(config);
    const auto saved = exact.forward_saving(c.q, c.k, c.v, call);
    const auto wanted = exact.backward(saved, c.grad_out, c.q, c.k, c.v, call);
    EXPECT_LT(apart(support::array(got.q), support::array(wanted.q)).rms, 0.01) << seed;
    EXPECT_LT(apart(support::array(got.k), support::array(wanted.k)).rms, 0.01) << seed;
    EXPECT_LT(apart(support::array(got.v), support::array(wanted.v)).rms, 0.01) << seed;
  }
}

TEST(Bf16Backward, ASavedCallIsKnownAgain) {
  OperandCase c = support::operand_case(5, 20);
  const Layer layer = layer_of(c);
  const Tensor<float, 3> x = support::tensor<float, 3>(c.in.x);
  const Tensor<float, 3> grad_y = support::tensor<float, 3>(grad_y_of(c));
  Layer::Saved saved;
  layer.forward_saving(saved, x);
  c.parameters.at("to_qkv.weight").data[0] += 1;
  auto gradients = local_mha::LocalMHAParameters<float>::zeros(c.config);
  EXPECT_THROW(layer_of(c).backward(gradients, saved, grad_y, x), std::invalid_argument);
  // Weights may be the same in float.
  const local_mha::LocalMHA<float> exact(c.config, layer.parameters());
  EXPECT_THROW(exact.backward(gradients, saved, grad_y, x), std::invalid_argument);
  decltype(exact)::Saved of_float;
  exact.forward_saving(of_float, x);
  EXPECT_THROW(layer.backward(gradients, of_float, grad_y, x), std::invalid_argument);
  const AttentionCase a = attention_case(1, 2, 2, 20, 8);
  const local_mha::LocalAttention<float> exact_attention({.window_size = 5});
  const Attention attention({.window_size = 5});
  EXPECT_THROW(
      attention.backward(exact_attention.forward_saving(a.q, a.k, a.v), a.grad_out, a.q, a.k, a.v),
      std::invalid_argument);
  EXPECT_THROW(
      exact_attention.backward(attention.forward_saving(a.q, a.k, a.v), a.grad_out, a.q, a.k, a.v),
      std::invalid_argument);
  using FeedForward = local_mha::FeedForward<float, Eigen::bfloat16, Eigen::bfloat16>;
  const FeedForward module({.dim = 8}, 1);
  const local_mha::FeedForward<float> exact_module(module.parameters());
  Tensor<float, 3> rows(1, 4, 8);
  rows.setRandom();
  FeedForward::Saved of_module;
  module.forward_saving(of_module, rows);
  auto of_weights = module.parameters();
  EXPECT_THROW(exact_module.backward(of_weights, of_module, rows, rows), std::invalid_argument);
}

}  // namespace bf16_backward_test
