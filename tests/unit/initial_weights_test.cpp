// SPDX-License-Identifier: MIT
// Weights start as those of PyTorch's modules, from a seed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "support/library.hpp"

namespace initial_weights_test {

using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using reference::Array;
using reference::Parameters;

struct Moments {
  double mean = 0, variance = 0, least = 0, most = 0;
};

Moments moments(const Array<double>& numbers) {
  Moments m;
  m.least = m.most = numbers.data.at(0);
  const auto n = static_cast<double>(numbers.data.size());
  for (const double x : numbers.data) {
    m.mean += x / n;
    m.least = std::min(m.least, x);
    m.most = std::max(m.most, x);
  }
  for (const double x : numbers.data) m.variance += (x - m.mean) * (x - m.mean) / n;
  return m;
}

/// nn.Linear: uniform in ±1/√in, weight and bias alike.
void expect_linear(const Parameters<double>& parameters, const std::string& name, double in) {
  SCOPED_TRACE(name);
  const Array<double>& numbers = parameters.at(name);
  const double bound = 1 / std::sqrt(in);
  const double deviation = bound / std::sqrt(3);
  const auto n = static_cast<double>(numbers.data.size());
  const Moments m = moments(numbers);
  EXPECT_GE(m.least, -bound);
  EXPECT_LE(m.most, bound);
  EXPECT_NEAR(m.mean, 0, 4 * deviation / std::sqrt(n));
  // The variance of a uniform number's square is 4/45 of the bound's fourth power.
  EXPECT_NEAR(
      m.variance, deviation * deviation,
      4 * bound * bound * std::sqrt(4.0 / 45) / std::sqrt(n) + deviation * deviation * 16 / n);
  if (n > 500) {
    EXPECT_LT(m.least, -0.98 * bound);
    EXPECT_GT(m.most, 0.98 * bound);
  }
}

void expect_normal(const Parameters<double>& parameters, const std::string& name) {
  SCOPED_TRACE(name);
  const Array<double>& numbers = parameters.at(name);
  const auto n = static_cast<double>(numbers.data.size());
  const Moments m = moments(numbers);
  EXPECT_NEAR(m.mean, 0, 4 / std::sqrt(n));
  EXPECT_NEAR(m.variance, 1, 4 * std::sqrt(2 / n));
  EXPECT_GT(m.most, 2.5);
  EXPECT_LT(m.least, -2.5);
  double beyond_one = 0;
  for (const double x : numbers.data) beyond_one += std::abs(x) > 1;
  EXPECT_NEAR(beyond_one / n, 0.3173, 4 * std::sqrt(0.3173 * 0.6827 / n));
}

void expect_all(const Parameters<double>& parameters, const std::string& name, double value) {
  ASSERT_FALSE(parameters.at(name).empty()) << name;
  for (const double x : parameters.at(name).data) EXPECT_EQ(x, value) << name;
}

LocalMHAConfig everything() {
  LocalMHAConfig config{.dim = 48, .window_size = 4, .dim_head = 10, .heads = 6};
  config.prenorm = config.qk_rmsnorm = config.gate_values_per_head = true;
  return config;
}

TEST(InitialWeights, OfTheLayerAreThoseOfItsPyTorchParts) {
  const auto p = support::named<double>(LocalMHA<float>(everything(), 1).parameters());
  EXPECT_EQ(p.size(), 8U);
  expect_linear(p, "to_qkv.weight", 48);
  expect_linear(p, "to_out.weight", 60);
  expect_linear(p, "to_v_gate.0.weight", 48);
  expect_linear(p, "to_v_gate.0.bias", 48);
  expect_all(p, "norm.weight", 1);
  expect_all(p, "norm.bias", 0);
  expect_all(p, "q_scale", 1);
  expect_all(p, "k_scale", 1);
}

TEST(InitialWeights, OfTheTransformerAreThoseOfItsPyTorchParts) {
  LocalTransformerConfig config{
      .num_tokens = 100, .max_seq_len = 90, .dim = 36, .depth = 2, .dim_head = 8, .heads = 3};
  config.local_attn_window_size = 8;
  config.use_dynamic_pos_bias = true;
  const auto p = support::named<double>(LocalTransformer<double>(config, 2).parameters());
  expect_normal(p, "token_emb.weight");
  expect_normal(p, "pos_emb.weight");
  for (const std::string layer : {"layers.0.", "layers.1."}) {
    expect_linear(p, layer + "0.branch.to_qkv.weight", 36);
    expect_linear(p, layer + "0.branch.to_out.weight", 24);
    expect_all(p, layer + "0.branch.norm.weight", 1);
    expect_all(p, layer + "0.branch.norm.bias", 0);
    expect_all(p, layer + "1.branch.0.weight", 1);
    expect_all(p, layer + "1.branch.0.bias", 0);
    expect_linear(p, layer + "1.branch.1.weight", 36);
    expect_linear(p, layer + "1.branch.4.weight", 96);  // int(36 · 4 · 2/3)
  }
  expect_linear(p, "dynamic_pos_bias.mlp.0.weight", 1);
  expect_linear(p, "dynamic_pos_bias.mlp.0.bias", 1);
  expect_linear(p, "dynamic_pos_bias.mlp.2.weight", 18);
  expect_linear(p, "dynamic_pos_bias.mlp.2.bias", 18);
  expect_linear(p, "dynamic_pos_bias.mlp.4.weight", 18);
  expect_linear(p, "dynamic_pos_bias.mlp.4.bias", 18);
  expect_all(p, "to_logits.0.weight", 1);
  expect_all(p, "to_logits.0.bias", 0);
  expect_linear(p, "to_logits.1.weight", 36);
  EXPECT_NE(p.at("layers.0.0.branch.to_qkv.weight").data,
            p.at("layers.1.0.branch.to_qkv.weight").data);
}

TEST(InitialWeights, ComeFromTheSeed) {
  const auto of_seed = [](std::uint64_t seed) {
    return support::named<double>(LocalMHA<double>(everything(), seed).parameters())
        .at("to_qkv.weight")
        .data;
  };
  EXPECT_EQ(of_seed(1), of_seed(1));
  EXPECT_NE(of_seed(1), of_seed(2));
  EXPECT_NE(of_seed(1), of_seed(std::uint64_t{1} << 32 | 1));
  EXPECT_EQ(
      of_seed(0),
      support::named<double>(LocalMHA<double>(everything()).parameters()).at("to_qkv.weight").data);
}

TEST(InitialWeights, OfFloatAreThoseOfDoubleRounded) {
  const auto of_float = support::named<float>(LocalMHA<float>(everything(), 3).parameters());
  const auto of_double = support::named<double>(LocalMHA<double>(everything(), 3).parameters());
  for (const auto& [name, numbers] : of_double)
    EXPECT_EQ(reference::cast<float>(numbers).data, of_float.at(name).data) << name;
}

// So many that their means are known to a few thousandths.
TEST(RandomSequence, IsUniformAndNormal) {
  constexpr int number = 1'000'000;
  local_mha::RandomSequence random(3);
  double sum = 0, squares = 0, least = 1, largest = 0;
  for (int i = 0; i < number; ++i) {
    const double u = random.uniform();
    sum += u, squares += u * u;
    least = std::min(least, u), largest = std::max(largest, u);
  }
  EXPECT_NEAR(sum / number, 1. / 2, 2e-3);
  EXPECT_NEAR(squares / number, 1. / 3, 2e-3);
  EXPECT_GE(least, 0);
  EXPECT_LT(least, 1e-4);
  EXPECT_LT(largest, 1);
  EXPECT_GT(largest, 1 - 1e-4);
  double powers[5] = {};
  for (int i = 0; i < number; ++i) {
    const double x = random.normal();
    for (int p = 1; p < 5; ++p) powers[p] += std::pow(x, p) / number;
  }
  EXPECT_NEAR(powers[1], 0, 5e-3);
  EXPECT_NEAR(powers[2], 1, 6e-3);
  EXPECT_NEAR(powers[3], 0, 2e-2);
  EXPECT_NEAR(powers[4], 3, 5e-2);
}

}  // namespace initial_weights_test
