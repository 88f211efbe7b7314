// SPDX-License-Identifier: MIT
// Uses that libraries of this kind are known to fail in.
#define EIGEN_USE_THREADS

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <mutex>
#include <utility>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace usage_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalMHA;
using local_mha::LocalTransformer;
using local_mha::Tensor;
using support::tensor;

LocalMHA<float> layer() {
  return LocalMHA<float>({.dim = 12, .window_size = 16, .dim_head = 8, .heads = 2, .causal = true},
                         1);
}

// More than fit into 16 bits, which is where grids of other devices end.
TEST(Batches, OfSeventyThousandHeads) {
  const LocalAttention<float> attention({.window_size = 2, .causal = true, .dim = 2});
  const auto q = tensor<float, 4>(Random(1).array({35'000, 2, 3, 2}));
  const auto saved = attention.forward_saving(q, q, q);
  const auto gradients = attention.backward(saved, q, q, q, q);
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  EXPECT_TRUE(support::same_bits(attention.forward(q, q, q, {.device = device}), saved.out));
  for (const Index b : {0, 1, 32'767, 32'768, 34'999}) {
    const Tensor<float, 4> one =
        q.slice(Eigen::array<Index, 4>{b, 0, 0, 0}, Eigen::array<Index, 4>{1, 2, 3, 2});
    const auto alone = attention.forward_saving(one, one, one);
    const auto of_alone = attention.backward(alone, one, one, one, one);
    for (Index i = 0; i < one.size(); ++i) {
      EXPECT_EQ(saved.out.data()[b * one.size() + i], alone.out.data()[i]) << b;
      EXPECT_EQ(gradients.k.data()[b * one.size() + i], of_alone.k.data()[i]) << b;
    }
  }
}

// ThreadSanitizer lets no child of a process with threads start any.
#if defined(__SANITIZE_THREAD__)
#define THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define THREAD_SANITIZER 1
#endif
#endif

// A child has none of its parent's threads.
TEST(Processes, MayForkBesideThreads) {
#ifdef THREAD_SANITIZER
  GTEST_SKIP() << "starts threads in a child";
#endif
  const auto mha = layer();
  const auto x = tensor<float, 3>(Random(2).array({3, 200, 12}));
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  const auto y = mha.forward(device, x);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // rather than wait for ever
    bool right(support::same_bits(mha.forward(x), y));
    Eigen::ThreadPool own(2);
    right = right && support::same_bits(mha.forward(Eigen::ThreadPoolDevice(&own, 2), x), y);
    _exit(right ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(support::same_bits(mha.forward(device, x), y));
}

// The calling thread does alone what the others have no time for.
TEST(Pools, MayBeBusyForEver) {
  const auto mha = layer();
  const auto x = tensor<float, 3>(Random(3).array({3, 200, 12}));
  const auto y = mha.forward(x);
  std::mutex mutex;
  std::condition_variable changed;
  bool free = false;
  Eigen::ThreadPool pool(2);
  const Eigen::ThreadPoolDevice device(&pool, 2);
  for (int thread = 0; thread < 2; ++thread)
    pool.Schedule([&] {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return free; });
    });
  EXPECT_TRUE(support::same_bits(mha.forward(device, x), y));
  LocalMHA<float>::Saved saved;
  auto gradients = local_mha::LocalMHAParameters<float>::zeros(mha.config());
  mha.forward_saving(device, saved, x);
  mha.backward(device, gradients, saved, y, x);
  LocalMHA<float>::Stream stream(mha, {.batch = 3, .max_threads = 2});
  EXPECT_EQ(stream.push(x, {.device = device}).dimension(1), 200);
  {
    const std::lock_guard lock(mutex);
    free = true;
  }
  changed.notify_all();
}

TEST(Pools, MayHaveFewerOrMoreThreadsThanTheDeviceSays) {
  const auto mha = layer();
  const auto x = tensor<float, 3>(Random(4).array({2, 300, 12}));
  const auto y = mha.forward(x);
  for (const auto& [threads, said] : {std::pair{2, 64}, std::pair{64, 2}, std::pair{1, 3}}) {
    Eigen::ThreadPool pool(threads);
    const Eigen::ThreadPoolDevice device(&pool, said);
    EXPECT_TRUE(support::same_bits(mha.forward(device, x), y)) << threads << ' ' << said;
  }
}

// Several callers on one pool, whose threads are callers, too.
TEST(Pools, MayBeSharedByCallsWithinCalls) {
  const auto mha = layer();
  const auto x = tensor<float, 3>(Random(5).array({2, 100, 12}));
  const auto y = mha.forward(x);
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  std::vector<char> right(12, 0);
  local_mha::parallel_for(device, 3, 12, [&](Index, Index i) {
    right[static_cast<std::size_t>(i)] =
        static_cast<bool>(support::same_bits(mha.forward(device, x), y));
  });
  EXPECT_EQ(std::count(right.begin(), right.end(), 1), 12);
}

// Drafts are pushed together; of some of them nothing may be left.
TEST(SpeculativeDecoding, WithRejectedDraftsGivesTheLogitsOfWhatIsKept) {
  for (const bool dynamic : {false, true}) {
    local_mha::LocalTransformerConfig config{.num_tokens = 11,
                                             .max_seq_len = 150,
                                             .dim = 16,
                                             .depth = 2,
                                             .local_attn_window_size = 6,
                                             .dim_head = 8,
                                             .heads = 2};
    config.use_dynamic_pos_bias = dynamic;
    const LocalTransformer<double> model(config, 1);
    LocalTransformer<double>::Stream stream(model, {.max_rollback = 8});
    Random random(6);
    std::vector<std::int64_t> kept;
    reference::Array<double> logits({0, 11});
    while (kept.size() < 140) {
      const Index drafts = random.integer(1, 8), accepted = random.integer(0, drafts);
      Tensor<std::int64_t, 2> tokens(1, drafts);
      for (Index i = 0; i < drafts; ++i) tokens(0, i) = random.integer(0, 10);
      const auto got = stream.push(tokens);
      stream.rollback(drafts - accepted);
      kept.insert(kept.end(), tokens.data(), tokens.data() + accepted);
      logits.data.insert(logits.data.end(), got.data(), got.data() + accepted * 11);
    }
    const auto n = static_cast<Index>(kept.size());
    logits.shape[0] = n;
    Tensor<std::int64_t, 2> all(1, n);
    std::copy(kept.begin(), kept.end(), all.data());
    auto expected = support::array(model.forward(all));
    expected.shape = {n, 11};
    EXPECT_TRUE(support::close(logits, expected, 1e-12 * support::largest(expected)));
  }
}

TEST(Chunks, MayBeLongerThanWindowAndRing) {
  for (const bool causal : {true, false}) {
    const LocalMHA<double> mha(
        {.dim = 6, .window_size = 4, .dim_head = 4, .heads = 2, .causal = causal}, 1);
    LocalMHA<double>::Stream stream(mha);
    const Index n = 3000;
    const auto x = tensor<double, 3>(Random(7).array({1, n, 6}));
    reference::Array<double> got({0, 6});
    const auto take = [&](const Tensor<double, 3>& y) {
      got.data.insert(got.data.end(), y.data(), y.data() + y.size());
    };
    for (Index i = 0; i < n; i += 1500)
      take(stream.push(local_mha::TensorView<const double, 3>(x.data() + 6 * i, {1, 1500, 6})));
    take(stream.flush());
    got.shape[0] = static_cast<Index>(got.data.size()) / 6;
    auto expected = support::array(mha.forward(x));
    expected.shape = {n, 6};
    EXPECT_TRUE(support::close(got, expected, 1e-12 * support::largest(expected)));
  }
}

template <typename Scalar>
class Biases : public testing::Test {};
TYPED_TEST_SUITE(Biases, support::Scalars, support::ScalarNames);

// The mask of many a program: 0 where a key is seen, and the lowest number where it is not.
TYPED_TEST(Biases, OfTheLowestNumberHideAsMinusInfinityDoes) {
  using Scalar = TypeParam;
  const Index w = 5, n = 37;
  for (const bool rotary : {false, true}) {
    local_mha::LocalAttentionConfig config{.window_size = w};
    if (rotary) config.dim = 8;
    const LocalAttention<Scalar> attention(config);
    Random random(8);
    const auto q = tensor<Scalar, 4>(random.array({1, 2, n, 8}, 3));
    const auto v = tensor<Scalar, 4>(random.array({1, 2, n, 8}));
    Tensor<Scalar, 3> lowest(2, w, 3 * w);
    lowest.setZero();
    // All of row 3 is hidden, others in part.
    for (Index h = 0; h < 2; ++h)
      for (Index i = 0; i < w; ++i)
        for (Index j = 0; j < 3 * w; ++j)
          if (i == 3 || random.chance(0.4)) lowest(h, i, j) = std::numeric_limits<Scalar>::lowest();
    auto infinite = lowest;
    for (Index i = 0; i < infinite.size(); ++i)
      if (infinite.data()[i] != 0) infinite.data()[i] = -std::numeric_limits<Scalar>::infinity();
    const auto y = attention.forward(q, q, v, {}, lowest);
    EXPECT_TRUE(support::same_bits(y, attention.forward(q, q, v, {}, infinite)));
    for (Index h = 0; h < 2; ++h)
      for (Index i = 0; i < n; ++i)
        for (Index c = 0; c < 8; ++c) EXPECT_EQ(y(0, h, i, c) == 0, i % w == 3) << i;

    const auto saved = attention.forward_saving(q, q, v, {}, lowest);
    const auto gradients = attention.backward(saved, v, q, q, v, {}, lowest);
    const auto expected = attention.backward(attention.forward_saving(q, q, v, {}, infinite), v, q,
                                             q, v, {}, infinite);
    EXPECT_TRUE(support::same_bits(gradients.q, expected.q));
    EXPECT_TRUE(support::same_bits(gradients.k, expected.k));
    EXPECT_TRUE(support::same_bits(gradients.v, expected.v));
    for (Index i = 0; i < gradients.q.size(); ++i)
      ASSERT_TRUE(std::isfinite(gradients.q.data()[i]));
  }
}

}  // namespace usage_test
