// SPDX-License-Identifier: MIT
// Memory of the passes: the result, and scratch that does not grow with the sequence.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include <local_mha/local_mha.hpp>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#if defined(__has_feature)
#define TEST_HAS_FEATURE(feature) __has_feature(feature)
#else
#define TEST_HAS_FEATURE(feature) 0
#endif

namespace memory_test {

using local_mha::Index;
using local_mha::Tensor;

// A sanitizer's own memory is far larger.
constexpr bool sanitized =
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    true;
#else
    TEST_HAS_FEATURE(address_sanitizer) || TEST_HAS_FEATURE(memory_sanitizer) ||
    TEST_HAS_FEATURE(thread_sanitizer);
#endif

/// The most memory that the process has held so far, in MB.
double peak_megabytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024;
}

/// `count` numbers of a Scalar in MB.
template <typename Scalar>
double megabytes(Index count) {
  return static_cast<double>(count) * sizeof(Scalar) / (1024 * 1024);
}

struct Measured {
  double growth = std::numeric_limits<double>::quiet_NaN();  // of the most memory held, in MB
  double value = 0;                                          // what the call returned
};

/// Measures a call in a process of its own: the peak of this one is that of every test before, and
/// so is the free memory of its heap.
template <typename Call>
Measured measured(Call&& call) {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
  Measured result;
  int ends[2];
  if (pipe(ends) != 0) return result;
  const pid_t child = fork();
  if (child == 0) {
    const double before = peak_megabytes();
    result.value = static_cast<double>(call());
    result.growth = peak_megabytes() - before;
    _exit(write(ends[1], &result, sizeof result) == sizeof result ? 0 : 1);
  }
  close(ends[1]);
  if (read(ends[0], &result, sizeof result) != sizeof result) result = {};
  close(ends[0]);
  waitpid(child, nullptr, 0);
  return result;
}

/// Whether a call's memory grew by what it must, and by no more than some scratch.
testing::AssertionResult grew(const Measured& measured, double needed, double scratch) {
  if (0.95 * needed <= measured.growth && measured.growth < needed + scratch)
    return testing::AssertionSuccess();
  return testing::AssertionFailure() << measured.growth << " MB, where " << needed
                                     << " are needed, and " << scratch << " for scratch";
}

class Memory : public testing::Test {
 protected:
  void SetUp() override {
    if (sanitized) GTEST_SKIP() << "measures the process";
  }
};

TEST_F(Memory, OfAnythingIsSeen) {
  Tensor<float, 1> kept(10'000'000);
  kept.setConstant(1);
  const auto touch = [] {
    Tensor<float, 1> t(5'000'000);
    t.setConstant(1);
    return t(4'999'999);
  };
  // Neither what this process holds nor what it has given back hides it.
  const double first = touch();
  const Measured second = measured(touch);
  EXPECT_EQ(second.value, first);
  EXPECT_TRUE(grew(second, megabytes<float>(5'000'000), 1));
}

TEST_F(Memory, OfAWindowBeyondTheSequenceIsThatOfTheSequence) {
  Tensor<float, 4> q(1, 1, 300, 16);
  q.setConstant(0.5F);
  const auto m = measured([&] {
    local_mha::LocalAttentionConfig config{.window_size = Index{1} << 40, .dim = 16};
    config.look_backward = 1000;
    return local_mha::LocalAttention<float>(config).forward(q, q, q)(0, 0, 299, 0);
  });
  EXPECT_TRUE(grew(m, 0, 4));
  EXPECT_FLOAT_EQ(static_cast<float>(m.value), 0.5F);
}

TEST_F(Memory, OfTheAttentionIsTheResultAndScratchThatDoesNotGrow) {
  const Index n = 400'000, d = 8;
  Tensor<float, 4> q(1, 1, n, d);
  q.setConstant(0.5F);
  const auto m = measured([&] {
    local_mha::LocalAttentionConfig config{.window_size = 64, .dim = d};
    config.exact_windowsize = true;
    return local_mha::LocalAttention<float>(config).forward(q, q, q)(0, 0, n - 1, 0);
  });
  EXPECT_TRUE(grew(m, megabytes<float>(n * d), 4));
  EXPECT_FLOAT_EQ(static_cast<float>(m.value), 0.5F);
}

TEST_F(Memory, OfTheLayerIsTheResultAndScratchThatDoesNotGrow) {
  const Index n = 500'000, dim = 16;
  Tensor<float, 3> x(1, n, dim);
  x.setConstant(0.5F);
  local_mha::LocalMHAConfig config{.dim = dim, .window_size = 32, .dim_head = 8, .heads = 4};
  config.prenorm = config.qk_rmsnorm = config.gate_values_per_head = true;
  const local_mha::LocalMHA<float> mha(config, 1);
  const auto m = measured([&] { return mha.forward(x)(0, n - 1, 0); });
  EXPECT_TRUE(grew(m, megabytes<float>(n * dim), 4));
}

TEST_F(Memory, OfTheAttentionsBackwardPassIsTheGradientsAndScratchThatDoesNotGrow) {
  const Index n = 500'000, d = 8;
  Tensor<float, 4> q(1, 1, n, d);
  q.setConstant(0.5F);
  const local_mha::LocalAttention<float> attention({.window_size = 64, .causal = true, .dim = d});
  const auto saved = attention.forward_saving(q, q, q);
  const auto m = measured([&] { return attention.backward(saved, q, q, q, q).q(0, 0, n - 1, 0); });
  EXPECT_TRUE(grew(m, megabytes<float>(3 * n * d), 4));
  EXPECT_NEAR(m.value, 0, 1e-4);
}

TEST_F(Memory, BetweenTheLayersPassesIsFourValuesOfAChannel) {
  const Index n = 100'000;
  const local_mha::LocalMHA<float> mha(
      {.dim = 32, .window_size = 128, .dim_head = 32, .heads = 2, .causal = true});
  Tensor<float, 3> x(1, n, 32);
  x.setConstant(0.5F);
  const auto m = measured([&] {
    local_mha::LocalMHA<float>::Saved saved;
    return mha.forward_saving(saved, x)(0, n - 1, 0);
  });
  const double kept = megabytes<float>(n * (4 * 64 + 2)), result = megabytes<float>(n * 32);
  EXPECT_TRUE(grew(m, kept + result, 6));
}

TEST_F(Memory, OfTheLayersBackwardPassIsAboutSevenTensorsOfTheSizeOfTheInput) {
  const Index n = 40'000, dim = 64;
  const local_mha::LocalMHA<float> mha(
      {.dim = dim, .window_size = 64, .dim_head = 32, .heads = 2, .causal = true});
  Tensor<float, 3> x(1, n, dim), grad_x(1, n, dim);
  x.setConstant(0.5F);
  grad_x.setZero();
  local_mha::LocalMHA<float>::Saved saved;
  mha.forward_saving(saved, x);
  auto gradients = local_mha::LocalMHAParameters<float>::zeros(mha.config());
  const auto m = measured([&] {
    local_mha::LocalMHA<float>::Workspace workspace;
    mha.backward_into(Eigen::DefaultDevice(), grad_x, workspace, gradients, saved, x, x);
    return grad_x(0, n - 1, 0);
  });
  const double tensor = megabytes<float>(n * dim);
  EXPECT_TRUE(grew(m, 6.5 * tensor, tensor)) << m.growth / tensor << " tensors";
}

TEST_F(Memory, OfAPromptHasNoRoomForItsLogits) {
  const Index prompted = 800, vocabulary = 20'000;
  local_mha::LocalTransformerConfig config{
      .num_tokens = vocabulary, .max_seq_len = prompted, .dim = 8, .depth = 1};
  config.local_attn_window_size = 16;
  config.causal = true;
  const local_mha::LocalTransformer<float> model(config, 1);
  Tensor<std::int64_t, 2> prompt(1, prompted);
  prompt.setConstant(1);
  const auto m = measured([&] { return model.generate(prompt, {.length = 1})(0, 0); });
  // A stream has that of the rows that it takes together.
  const Index rows =
      std::max<Index>(6, 2 * local_mha::Tiling<float>::blocks) * local_mha::Lanes<float>::count;
  EXPECT_TRUE(grew(m, megabytes<float>(rows * vocabulary), 8));
}

#if defined(__GLIBC__)
/// Bytes that the process has allocated and not given back.
double allocated_bytes() {
  const auto info = mallinfo2();
  return static_cast<double>(info.uordblks + info.hblkhd);
}

// The formula of the page realtime of the guide.
TEST_F(Memory, OfAStreamIsWhatItsWindowsNeed) {
  constexpr Index block = local_mha::Lanes<float>::count;
  for (const bool causal : {true, false})
    for (const bool exact : {true, false})
      for (const Index max_rollback : {0, 3000}) {
        const Index heads = 2, d = 32, w = 2000, batch = 2;
        local_mha::LocalMHAConfig config{
            .dim = 16, .window_size = w, .dim_head = d, .heads = heads};
        config.causal = causal;
        config.exact_windowsize = exact;
        const local_mha::LocalMHA<float> mha(config);
        const double before = allocated_bytes();
        const local_mha::LocalMHA<float>::Stream stream(
            mha, {.batch = batch, .max_rollback = max_rollback});
        const double bytes = allocated_bytes() - before;
        // A causal layer's look-around ends with the query, also in whole windows.
        const Index ahead = causal ? 0 : w, whole = exact ? 0 : w - 1;
        const Index reach = w + ahead + (causal ? 1 : 2) * whole;
        const Index stretch = std::max<Index>(6, 2 * local_mha::Tiling<float>::blocks) * block;
        const Index more = std::max(stretch, max_rollback) + 5 * block;
        const Index queries = causal ? stretch + block : ahead + whole + more;
        const auto formula =
            static_cast<double>(batch * heads * d * (2 * (reach + more) + queries)) * sizeof(float);
        // And some scratch, which depends on none of them.
        EXPECT_GE(bytes, formula) << causal << exact << max_rollback;
        EXPECT_LE(bytes, formula + 200'000) << causal << exact << max_rollback;
      }
}

// Sizes whose weights are each below what is asked for in huge pages, of which the rest counts.
local_mha::LocalTransformerConfig model_config(Index depth) {
  local_mha::LocalTransformerConfig config{
      .num_tokens = 301, .max_seq_len = 256, .dim = 256, .depth = depth};
  config.local_attn_window_size = 16;
  config.causal = true;
  return config;
}

template <typename Parameters>
double weight_bytes(const Parameters& parameters) {
  double bytes = 0;
  local_mha::for_each_parameter(parameters, [&](const auto&, const auto& tensor) {
    bytes += static_cast<double>(tensor.size()) * sizeof(*tensor.data());
  });
  return bytes;
}

/// What is held after a call, in bytes more than before.
template <typename Call>
double held_after(Call&& call) {
  const double before = allocated_bytes();
  call();
  return allocated_bytes() - before;
}

/// That a module holds its weights once, and that its copies hold none.
template <typename Module, typename Config>
void expect_weights_once(const Config& config) {
  const double weights = weight_bytes(Module::Parameters::zeros(config));
  std::optional<Module> module;
  const double held = held_after([&] { module.emplace(config, 1); });
  EXPECT_GE(held, weights);
  EXPECT_LE(held, 1.1 * weights);
  std::vector<Module> copies;
  copies.reserve(64);
  EXPECT_LE(held_after([&] { copies.assign(64, *module); }), 10'000);
  // Those of others, and nothing of the old ones.
  {
    auto others = Module::Parameters::zeros(config);
    const double change = held_after([&] {
      module->set_parameters(std::move(others));
      others = {};
      copies.clear();
    });
    EXPECT_LE(change, 10'000 - weights);
  }
  EXPECT_LE(held_after([&] { module->parameters(); }), 1.01 * weights);
  EXPECT_LE(held_after([&] { module->parameters(); }), 0);
}

TEST_F(Memory, OfTheWeightsIsTheirOwn) {
  local_mha::LocalMHAConfig layer{.dim = 256, .window_size = 16};
  layer.prenorm = layer.gate_values_per_head = layer.qk_rmsnorm = true;
  expect_weights_once<local_mha::LocalMHA<float>>(layer);
  expect_weights_once<local_mha::LocalMHA<double>>(layer);
  local_mha::EncoderConfig encoder{.depth = 3, .layers = {layer}};
  encoder.num_residual_streams = 4;
  expect_weights_once<local_mha::Encoder<float>>(encoder);
  expect_weights_once<local_mha::LocalTransformer<float>>(model_config(4));
}

TEST_F(Memory, OfTrainingHoldsTheWeightsOnce) {
  const local_mha::LocalTransformer<float> model(model_config(2), 1);
  auto gradients = local_mha::LocalTransformerParameters<float>::zeros(model.config());
  Tensor<std::int64_t, 2> tokens(1, 40);
  tokens.setConstant(3);
  EXPECT_LE(held_after([&] { model.backward(gradients, tokens); }), 100'000);
}

TEST_F(Memory, OfStreamsOfAModelIsTheirRings) {
  using Model = local_mha::LocalTransformer<float>;
  const Model small(model_config(2), 1), large(model_config(6), 1);
  const Index number = 64;
  const auto of_streams = [&](const Model& model) {
    std::vector<Model::Stream> streams;
    streams.reserve(number);
    return held_after([&] {
      for (Index i = 0; i < number; ++i) streams.emplace_back(model);
    });
  };
  // Room for rows is that of a sequence, however many layers it passes.
  const double of_layer = (of_streams(large) - of_streams(small)) / (4 * number);
  constexpr Index block = local_mha::Lanes<float>::count;
  const Index heads = 8, dim_head = 64, reach = 16;
  const Index stretch = std::max<Index>(6, 2 * local_mha::Tiling<float>::blocks) * block;
  const Index rows = 2 * (reach + stretch + 5 * block) + stretch + block;
  const auto rings = static_cast<double>(heads * dim_head * rows) * sizeof(float);
  EXPECT_LE(of_layer, rings + 20'000);
  EXPECT_LE(of_streams(small), 64 * 10e6);
}
#endif

}  // namespace memory_test
