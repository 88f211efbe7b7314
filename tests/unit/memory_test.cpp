// SPDX-License-Identifier: MIT
// Memory of the passes: the result, and scratch that does not grow with the sequence.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <local_mha/local_mha.hpp>

#if defined(__has_feature)
#define TEST_HAS_FEATURE(feature) __has_feature(feature)
#else
#define TEST_HAS_FEATURE(feature) 0
#endif

namespace {

using local_mha::Index;
using local_mha::Tensor;

// A sanitizer's own memory is far larger.
constexpr bool sanitized =
#if defined(__SANITIZE_ADDRESS__)
    true;
#else
    TEST_HAS_FEATURE(address_sanitizer) || TEST_HAS_FEATURE(memory_sanitizer);
#endif

/// The most memory that the process has held so far, in MB.
double peak_megabytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024;
}

// Each test needs more than those before it, because the peak counts from the start of the process.

TEST(Memory, OfAWindowBeyondTheSequenceIsThatOfTheSequence) {
  if (sanitized) GTEST_SKIP() << "measures the process";
  Tensor<float, 4> q(1, 1, 300, 16);
  q.setConstant(0.5F);
  const double before = peak_megabytes();
  local_mha::LocalAttentionConfig config{.window_size = Index{1} << 40, .dim = 16};
  config.look_backward = 1000;
  const auto y = local_mha::LocalAttention<float>(config).forward(q, q, q);
  EXPECT_LT(peak_megabytes() - before, 4);
  EXPECT_FLOAT_EQ(y(0, 0, 299, 0), 0.5F);
}

TEST(Memory, OfTheAttentionIsTheResultAndScratchThatDoesNotGrow) {
  if (sanitized) GTEST_SKIP() << "measures the process";
  const Index n = 400'000, d = 8;
  Tensor<float, 4> q(1, 1, n, d);
  q.setConstant(0.5F);
  const double before = peak_megabytes();
  local_mha::LocalAttentionConfig config{.window_size = 64, .dim = d};
  config.exact_windowsize = true;
  const auto y = local_mha::LocalAttention<float>(config).forward(q, q, q);
  const double result = static_cast<double>(y.size()) * sizeof(float) / (1024 * 1024);
  EXPECT_GT(result, 10);
  EXPECT_LT(peak_megabytes() - before, result + 4);
  EXPECT_FLOAT_EQ(y(0, 0, n - 1, 0), 0.5F);
}

TEST(Memory, OfTheLayerIsTheResultAndScratchThatDoesNotGrow) {
  if (sanitized) GTEST_SKIP() << "measures the process";
  const Index n = 500'000, dim = 16;
  Tensor<float, 3> x(1, n, dim);
  x.setConstant(0.5F);
  local_mha::LocalMHAConfig config{.dim = dim, .window_size = 32, .dim_head = 8, .heads = 4};
  config.prenorm = config.qk_rmsnorm = config.gate_values_per_head = true;
  const local_mha::LocalMHA<float> mha(config, 1);
  const double before = peak_megabytes();
  const auto y = mha.forward(x);
  const double result = static_cast<double>(y.size()) * sizeof(float) / (1024 * 1024);
  EXPECT_GT(result, 30);
  EXPECT_LT(peak_megabytes() - before, result + 4);
}

TEST(Memory, OfTheAttentionsBackwardPassIsTheGradientsAndScratchThatDoesNotGrow) {
  if (sanitized) GTEST_SKIP() << "measures the process";
  const Index n = 1'500'000, d = 8;
  Tensor<float, 4> q(1, 1, n, d);
  q.setConstant(0.5F);
  const local_mha::LocalAttention<float> attention({.window_size = 64, .causal = true, .dim = d});
  const auto saved = attention.forward_saving(q, q, q);
  const double before = peak_megabytes();
  const auto gradients = attention.backward(saved, q, q, q, q);
  const double result = 3 * static_cast<double>(q.size()) * sizeof(float) / (1024 * 1024);
  EXPECT_GT(result, 120);
  EXPECT_LT(peak_megabytes() - before, result + 4);
  EXPECT_NEAR(gradients.q(0, 0, n - 1, 0), 0, 1e-4);
}

TEST(Memory, BetweenTheLayersPassesIsFourValuesOfAChannel) {
  if (sanitized) GTEST_SKIP() << "measures the process";
  const Index n = 100'000;
  const local_mha::LocalMHA<float> mha(
      {.dim = 32, .window_size = 128, .dim_head = 32, .heads = 2, .causal = true});
  Tensor<float, 3> x(1, n, 32);
  x.setConstant(0.5F);
  const double before = peak_megabytes();
  local_mha::LocalMHA<float>::Saved saved;
  const auto y = mha.forward_saving(saved, x);
  const double megabyte = 1024 * 1024;
  const double result = static_cast<double>(y.size()) * sizeof(float) / megabyte;
  const double kept = n * (4 * 64 + 2) * static_cast<double>(sizeof(float)) / megabyte;
  EXPECT_GT(kept, 90);
  EXPECT_LT(peak_megabytes() - before, kept + result + 6);
}

}  // namespace
