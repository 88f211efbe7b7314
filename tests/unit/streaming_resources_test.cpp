// SPDX-License-Identifier: MIT
// What streams need: no allocation in a push, the same work at any position, threads that change
// nothing.
#define EIGEN_USE_THREADS
#include "support/allocations.hpp"  // before Eigen
#include "support/locks.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace streaming_resources_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::TensorView;
using support::allocations_of;
using support::tensor;

template <typename Scalar>
class StreamingResources : public testing::Test {};
TYPED_TEST_SUITE(StreamingResources, support::Scalars, support::ScalarNames);

/// Flags by turns, for masks that look at them.
struct Flags {
  Flags() {
    for (std::size_t i = 0; i < flags.size(); ++i) flags[i] = i % 3 == 0;
  }
  PaddingMask mask(Index batch, Index n) const {
    return PaddingMask::masked_view(TensorView<const bool, 2>(flags.data(), {batch, n}));
  }
  std::array<bool, 1400> flags{};
};

TEST(Locks, AreCounted) {
  std::mutex mutex;
  EXPECT_EQ(support::locks_of([&] { const std::lock_guard lock(mutex); }), COUNTS_LOCKS);
}

/// No allocation and no lock.
template <typename Call>
void expect_no_cost(Call&& call) {
  long locks = 0;
  EXPECT_EQ(allocations_of([&] { locks = support::locks_of(call); }), 0);
  EXPECT_EQ(locks, 0);
}

/// Every way of attending that has a path of its own through a push.
std::vector<LocalMHAConfig> kinds_of_layers() {
  std::vector<LocalMHAConfig> kinds;
  for (const bool causal : {true, false})
    for (const Index window_size : {1, 7})
      for (const bool xpos : {false, true}) {
        LocalMHAConfig config{.dim = 12, .window_size = window_size, .dim_head = 6, .heads = 2};
        config.causal = causal;
        config.use_xpos = xpos;
        config.prenorm = config.qk_rmsnorm = config.gate_values_per_head = true;
        kinds.push_back(config);
      }
  return kinds;
}

TYPED_TEST(StreamingResources, APushAllocatesAndLocksNothing) {
  const Flags flags;
  for (const LocalMHAConfig& config : kinds_of_layers()) {
    const Index w = config.window_size;
    const LocalMHA<TypeParam> mha(config, 1);
    LocalAttentionConfig of_heads_config{.window_size = w, .causal = config.causal, .dim = 6};
    of_heads_config.use_xpos = config.use_xpos;
    of_heads_config.shared_qk = config.use_xpos;
    const LocalAttention<TypeParam> attention(of_heads_config);
    Random random(3);
    const auto x = tensor<TypeParam, 3>(random.array({2, 700, 12}));
    const auto q = tensor<TypeParam, 4>(random.array({2, 2, 700, 6}));
    const auto bias = tensor<TypeParam, 3>(random.array({2, w, (config.causal ? 2 : 3) * w}));
    Tensor<TypeParam, 3> y(2, 700, 12);
    Tensor<TypeParam, 4> out(2, 2, 700, 6);
    std::optional<typename LocalMHA<TypeParam>::Stream> stream;
    const long at_construction = allocations_of([&] {
      Eigen::internal::set_is_malloc_allowed(true);
      stream.emplace(mha, local_mha::StreamConfig{.batch = 2}, support::optional_view(bias));
    });
    if (COUNTS_ALLOCATIONS) {
      EXPECT_GT(at_construction, 0) << "the count does not work";
    }
    typename LocalAttention<TypeParam>::Stream of_heads(
        attention, 2, 6, {.batch = 2}, {.attn_bias = support::optional_view(bias)});
    SCOPED_TRACE(support::describe(config));
    for (const Index n : {1, 1, 7, 16, 700, 1, 0, 130})
      expect_no_cost([&] {
        const PaddingMask mask = n % 2 == 0 ? PaddingMask() : flags.mask(2, n);
        stream->push_into(TensorView<TypeParam, 3>(y.data(), {2, stream->results_of(n), 12}),
                          TensorView<const TypeParam, 3>(x.data(), {2, n, 12}), {.mask = mask});
        const TensorView<const TypeParam, 4> heads(q.data(), {2, 2, n, 6});
        of_heads.push_into(TensorView<TypeParam, 4>(out.data(), {2, 2, of_heads.results_of(n), 6}),
                           heads, heads, heads, {.mask = mask});
        if (n == 7) stream->rollback(3);
        if (n == 700) stream->reset(1);
      });
    expect_no_cost([&] {
      stream->flush_into(TensorView<TypeParam, 3>(y.data(), {2, stream->results_of_flush(), 12}));
      of_heads.flush_into(
          TensorView<TypeParam, 4>(out.data(), {2, 2, of_heads.results_of_flush(), 6}));
      stream->reset();
    });
  }
}

TYPED_TEST(StreamingResources, APushOfTokensAllocatesAndLocksNothing) {
  const Flags flags;
  for (const bool causal : {true, false}) {
    local_mha::LocalTransformerConfig config{
        .num_tokens = 9, .max_seq_len = 100, .dim = 12, .depth = 3};
    config.causal = causal;
    config.local_attn_window_size = 5;
    config.dim_head = 4;
    config.heads = 2;
    config.use_dynamic_pos_bias = true;
    config.exact_windowsize = false;
    const local_mha::LocalTransformer<TypeParam> model(config, 1);
    typename local_mha::LocalTransformer<TypeParam>::Stream stream(model, {.batch = 2});
    Random random(3);
    Tensor<std::int64_t, 2> tokens(2, 500);
    for (Index i = 0; i < tokens.size(); ++i) tokens.data()[i] = random.integer(0, 8);
    Tensor<TypeParam, 3> logits(2, 500, 9);
    for (const Index n : {1, 1, 7, 16, 400, 1, 0})
      expect_no_cost([&] {
        stream.push_into(TensorView<TypeParam, 3>(logits.data(), {2, stream.results_of(n), 9}),
                         TensorView<const std::int64_t, 2>(tokens.data(), {2, n}),
                         {.mask = n % 2 == 0 ? PaddingMask() : flags.mask(2, n)});
        if (n == 7) stream.rollback(3);
        if (n == 400) stream.reset(1);
      });
    expect_no_cost([&] {
      stream.flush_into(TensorView<TypeParam, 3>(logits.data(), {2, stream.results_of_flush(), 9}));
    });
  }
}

TYPED_TEST(StreamingResources, AreTheSameAtPositionTenMillion) {
  LocalMHAConfig config{.dim = 2, .window_size = 12, .dim_head = 2, .heads = 1};
  config.causal = true;
  config.use_xpos = true;
  config.exact_windowsize = false;
  const LocalMHA<TypeParam> mha(config, 4);
  typename LocalMHA<TypeParam>::Stream stream(mha);
  // Each row is a function of its position, and no two stretches are alike.
  const auto value = [](Index i, Index c) {
    const auto bits = (static_cast<std::uint64_t>(2 * i + c) * 0x9E3779B97F4A7C15U) >> 40;
    return static_cast<TypeParam>(static_cast<double>(bits) * 0x1p-23 - 1);
  };
  const Index end = 10'000'000, tail = 480;  // whole windows
  Tensor<TypeParam, 3> chunk(1, 4096, 2);
  Tensor<TypeParam, 3> y(1, 4096, 2);
  std::vector<TypeParam> last;
  Random random(1);
  for (Index i = 0; i < end;) {
    const Index most = i < end - 2 * tail ? 4096 : 16;
    const Index n = std::min<Index>(end - i, random.integer(1, most));
    for (Index r = 0; r < n; ++r)
      for (Index c = 0; c < 2; ++c) chunk.data()[2 * r + c] = value(i + r, c);
    stream.push_into(TensorView<TypeParam, 3>(y.data(), {1, n, 2}),
                     TensorView<const TypeParam, 3>(chunk.data(), {1, n, 2}));
    i += n;
    last.insert(last.end(), y.data(), y.data() + 2 * n);
    if (last.size() > 100'000) last.erase(last.begin(), last.end() - 2 * tail);
  }
  EXPECT_EQ(stream.position(), end);
  // Ten million is no multiple of 12: the stretch begins where a window does.
  const Index begin = (end - tail) / 12 * 12;
  Tensor<TypeParam, 3> x(1, end - begin, 2);
  for (Index i = begin; i < end; ++i)
    for (Index c = 0; c < 2; ++c) x(0, i - begin, c) = value(i, c);
  const auto expected = mha.forward(x);
  const double allowed = std::is_same_v<TypeParam, float> ? 2e-5 : 1e-12;
  for (Index i = begin + 24; i < end; ++i)
    for (Index c = 0; c < 2; ++c)
      ASSERT_NEAR(last[last.size() - static_cast<std::size_t>(2 * (end - i) - c)],
                  expected(0, i - begin, c), allowed)
          << "position " << i;
}

TYPED_TEST(StreamingResources, OfAnyNumberOfThreadsGiveTheSameBits) {
  for (const int count : {1, 2, 3, 7}) {
    Eigen::ThreadPool pool(count);
    const Eigen::ThreadPoolDevice device(&pool, count);
    for (std::uint64_t seed = 1; seed <= random_cases(60); ++seed) {
      const auto c = support::layer_case(seed);
      const Index dim = c.config.dim;
      const auto bias = support::bias_tensor<TypeParam>(c.in.bias);
      const LocalMHA<TypeParam> mha(c.config,
                                    support::layer_parameters<TypeParam>(c.config, c.parameters));
      typename LocalMHA<TypeParam>::Stream alone(mha, {.batch = 5}, support::optional_view(bias));
      typename LocalMHA<TypeParam>::Stream together(mha, {.batch = 5, .max_threads = 4},
                                                    support::optional_view(bias));
      Random random(seed);
      for (int i = 0; i < 6; ++i) {
        const Index n = random.pick<Index>({1, 1, 5, 16, 40});
        const auto x = tensor<TypeParam, 3>(random.array({5, n, dim}));
        EXPECT_TRUE(support::same_bits(alone.push(x), together.push(x, {.device = device})))
            << count << " threads, seed " << seed;
      }
      EXPECT_TRUE(support::same_bits(alone.flush(), together.flush(device)));
    }
  }
}

TYPED_TEST(StreamingResources, OfFewSequencesShareTheirHeadsAmongThreads) {
  for (const int count : {2, 3, 7}) {
    Eigen::ThreadPool pool(count);
    const Eigen::ThreadPoolDevice device(&pool, count);
    for (std::uint64_t seed = 1; seed <= random_cases(60); ++seed) {
      auto c = support::layer_case(seed);
      const Index dim = c.config.dim;
      const Index batch = 1 + static_cast<Index>(seed % 4);
      const auto bias = support::bias_tensor<TypeParam>(c.in.bias);
      const LocalMHA<TypeParam> mha(c.config,
                                    support::layer_parameters<TypeParam>(c.config, c.parameters));
      typename LocalMHA<TypeParam>::Stream alone(mha, {.batch = batch},
                                                 support::optional_view(bias));
      typename LocalMHA<TypeParam>::Stream together(mha, {.batch = batch, .max_threads = 1 << 20},
                                                    support::optional_view(bias));
      Random random(seed);
      for (int i = 0; i < 8; ++i) {
        const Index n = random.pick<Index>({1, 1, 1, 5, 16, 150});
        const auto x = tensor<TypeParam, 3>(random.array({batch, n, dim}));
        EXPECT_TRUE(support::same_bits(alone.push(x), together.push(x, {.device = device})))
            << count << " threads, seed " << seed;
      }
      EXPECT_TRUE(support::same_bits(alone.flush(), together.flush(device)));
    }
  }
}

TYPED_TEST(StreamingResources, OfTheAttentionOnThreadsGiveTheSameBits) {
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  const LocalAttention<TypeParam> attention({.window_size = 9, .dim = 6});
  typename LocalAttention<TypeParam>::Stream alone(attention, 2, 6, {.batch = 4});
  typename LocalAttention<TypeParam>::Stream together(attention, 2, 6,
                                                      {.batch = 4, .max_threads = 3});
  Random random(8);
  for (const Index n : {1, 30, 1, 1, 17, 2}) {
    const auto q = tensor<TypeParam, 4>(random.array({4, 2, n, 6}));
    EXPECT_TRUE(
        support::same_bits(alone.push(q, q, q), together.push(q, q, q, {.device = device})));
  }
}

/// A device of four threads that counts how often one of them is asked for, and does its work
/// itself.
struct CountingDevice {
  struct Pool {
    template <typename Task>
    void Schedule(Task&& task) {
      ++asked;
      task();
    }
    long asked = 0;
  };
  int numThreads() const { return 4; }
  Pool* getPool() const { return &pool; }
  mutable Pool pool;
};

TEST(StreamThreads, AreNoMoreThanTheStreamsConfigurationSays) {
  const LocalAttention<float> attention({.window_size = 9, .dim = 6});
  const LocalMHA<float> layer({.dim = 6, .window_size = 9, .dim_head = 6, .heads = 2});
  const local_mha::LocalTransformer<float> model(
      {.num_tokens = 9, .max_seq_len = 100, .dim = 6, .depth = 1});
  Tensor<float, 4> q(3, 2, 20, 6);
  q.setRandom();
  Tensor<float, 3> x(3, 20, 6);
  x.setRandom();
  Tensor<std::int64_t, 2> tokens(3, 20);
  tokens.setConstant(4);
  for (const Index max_threads : {1, 2, 3, 4, 9}) {
    SCOPED_TRACE(max_threads);
    const local_mha::StreamConfig config{.batch = 3, .max_threads = max_threads};
    const long others = std::min<Index>(max_threads, 3) - 1;
    CountingDevice device;
    LocalAttention<float>::Stream(attention, 2, 6, config).push(q, q, q, {.device = device});
    EXPECT_EQ(device.pool.asked, others);
    device.pool.asked = 0;
    local_mha::LocalTransformer<float>::Stream(model, config).push(tokens, {.device = device});
    EXPECT_EQ(device.pool.asked, others);
    device.pool.asked = 0;
    LocalMHA<float>::Stream(layer, config).push(x, {.device = device});
    EXPECT_EQ(device.pool.asked, others);
  }
}

TYPED_TEST(StreamingResources, OfAModelOnThreadsGiveTheSameBits) {
  for (const bool causal : {true, false}) {
    local_mha::LocalTransformerConfig config{
        .num_tokens = 9, .max_seq_len = 100, .dim = 12, .depth = 3};
    config.causal = causal;
    config.local_attn_window_size = 5;
    config.dim_head = 4;
    config.heads = 2;
    const local_mha::LocalTransformer<TypeParam> model(config, 1);
    using Stream = typename local_mha::LocalTransformer<TypeParam>::Stream;
    for (const int count : {1, 2, 5}) {
      Eigen::ThreadPool pool(count);
      const Eigen::ThreadPoolDevice device(&pool, count);
      Stream alone(model, {.batch = 5});
      Stream together(model, {.batch = 5, .max_threads = 4});
      Random random(8);
      for (const Index n : {1, 30, 1, 1, 200, 2}) {
        Tensor<std::int64_t, 2> tokens(5, n);
        for (Index i = 0; i < tokens.size(); ++i) tokens.data()[i] = random.integer(0, 8);
        EXPECT_TRUE(
            support::same_bits(alone.push(tokens), together.push(tokens, {.device = device})));
      }
      EXPECT_TRUE(support::same_bits(alone.flush(), together.flush(device)));
    }
  }
}

}  // namespace streaming_resources_test
