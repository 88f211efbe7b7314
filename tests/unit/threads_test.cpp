// SPDX-License-Identifier: MIT
// The threads of a device, and calls into given memory.
#define EIGEN_USE_THREADS
#include "support/allocations.hpp"  // before Eigen

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <local_mha/core/parallel.hpp>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace threads_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::Training;
using support::allocations_of;
using support::same_bits;
using support::tensor;

/// A device of its own threads.
struct Threads {
  explicit Threads(int count) : pool(count), device(&pool, count) {}
  Eigen::ThreadPool pool;
  Eigen::ThreadPoolDevice device;
};

/// A device that counts what it is given to run.
struct CountedThreads : Eigen::ThreadPoolInterface {
  explicit CountedThreads(int count) : pool(count), device(this, count) {}
  void Schedule(std::function<void()> run) override {
    ++scheduled;
    pool.Schedule(std::move(run));
  }
  int NumThreads() const override { return pool.NumThreads(); }
  int CurrentThreadId() const override { return pool.CurrentThreadId(); }

  std::atomic<int> scheduled{0};
  Eigen::ThreadPool pool;
  Eigen::ThreadPoolDevice device;
};

/// Waits until so many threads wait.
class Meeting {
 public:
  explicit Meeting(int size) : missing_(size) {}
  /// \return whether all came; gives up after a time that even a loaded machine has
  bool wait() {
    std::unique_lock lock(mutex_);
    if (--missing_ == 0) all_came_.notify_all();
    const bool came =
        all_came_.wait_for(lock, std::chrono::seconds(20), [&] { return missing_ <= 0; });
    missing_ = 0;  // once is enough to wait in vain
    return came;
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_came_;
  int missing_;
};

constexpr std::array<int, 4> thread_counts{1, 2, 3, 7};

template <typename Scalar>
class OnThreads : public testing::Test {};
TYPED_TEST_SUITE(OnThreads, support::Scalars, support::ScalarNames);

TYPED_TEST(OnThreads, TheAttentionGivesTheSameBitsForAnyNumber) {
  for (const int count : thread_counts) {
    const Threads threads(count);
    for (std::uint64_t seed = 1; seed <= random_cases(90); ++seed) {
      support::AttentionCase c = support::attention_case(
          seed, seed % 3 == 0 ? support::Length::Long : support::Length::Short);
      if (seed % 2 == 0) {
        c.config.dropout = 0.3;
        c.call.training = Training{.seed = seed};
      }
      const auto q = tensor<TypeParam, 4>(c.in.q);
      const auto k = tensor<TypeParam, 4>(c.in.k);
      const auto v = tensor<TypeParam, 4>(c.in.v);
      const auto bias = support::bias_tensor<TypeParam>(c.in.bias);
      const auto mask = support::padding_mask(c.in.masked, c.batch(), c.seqlen());
      const LocalAttention<TypeParam> attention(c.config);
      EXPECT_TRUE(same_bits(
          attention.forward(
              q, k, v,
              support::attention_call<TypeParam>(c.call, mask, support::optional_view(bias))),
          attention.forward(q, k, v,
                            support::attention_call<TypeParam>(
                                c.call, mask, support::optional_view(bias), threads.device))))
          << count << " threads, seed " << seed << ", " << support::describe(c.config);
    }
  }
}

TYPED_TEST(OnThreads, TheLayerGivesTheSameBitsForAnyNumber) {
  for (const int count : thread_counts) {
    const Threads threads(count);
    for (std::uint64_t seed = 1; seed <= random_cases(90); ++seed) {
      support::LayerCase c =
          support::layer_case(seed, seed % 2 == 0 ? support::Length::Long : support::Length::Short);
      std::optional<Training> training;
      if (seed % 3 == 0) {
        c.config.dropout = 0.3;
        training = Training{.seed = seed};
      }
      const auto x = tensor<TypeParam, 3>(c.in.x);
      const auto bias = support::bias_tensor<TypeParam>(c.in.bias);
      const auto mask = support::padding_mask(c.in.masked, c.in.x.shape[0], c.in.x.shape[1]);
      const LocalMHA<TypeParam> mha(c.config,
                                    support::layer_parameters<TypeParam>(c.config, c.parameters));
      EXPECT_TRUE(
          same_bits(mha.forward(x, mask, support::optional_view(bias), training),
                    mha.forward(threads.device, x, mask, support::optional_view(bias), training)))
          << count << " threads, seed " << seed << ", N " << c.in.x.shape[1] << ", "
          << support::describe(c.config);
    }
  }
}

TYPED_TEST(OnThreads, ALongSequenceAndALargeBatchGiveTheSameBits) {
  const Threads threads(3);
  for (const auto& [batch, n] :
       std::vector<std::array<Index, 2>>{{1, 20'011}, {37, 61}, {5, 700}}) {
    LocalMHAConfig config{.dim = 12, .window_size = 16, .dim_head = 6, .heads = 2};
    config.causal = n != 700;
    config.use_xpos = config.qk_rmsnorm = config.gate_values_per_head = true;
    const LocalMHA<TypeParam> mha(config, 1);
    const auto x = tensor<TypeParam, 3>(Random(2).array({batch, n, 12}));
    EXPECT_TRUE(same_bits(mha.forward(x), mha.forward(threads.device, x)));
  }
}

// The same bits also come of a call that leaves the threads idle.
TYPED_TEST(OnThreads, EveryPassGivesThemWork) {
  using Scalar = TypeParam;
  CountedThreads threads(3);
  const auto& device = threads.device;
  const auto expect_work = [&](const char* what, const auto& call) {
    threads.scheduled = 0;
    call();
    EXPECT_GT(threads.scheduled, 0) << what;
  };
  Random random(1);
  const auto q = tensor<Scalar, 4>(random.array({3, 2, 200, 8}));
  const LocalAttention<Scalar> attention({.window_size = 16, .causal = true, .dim = 8});
  typename LocalAttention<Scalar>::Saved saved_attention;
  expect_work("attention, forward", [&] { attention.forward(q, q, q, {.device = device}); });
  expect_work("attention, forward_saving",
              [&] { saved_attention = attention.forward_saving(q, q, q, {.device = device}); });
  expect_work("attention, backward",
              [&] { attention.backward(saved_attention, q, q, q, q, {.device = device}); });

  const LocalMHA<Scalar> mha(
      {.dim = 16, .window_size = 16, .dim_head = 8, .heads = 2, .causal = true});
  for (const Index batch : {1, 3}) {
    const auto x = tensor<Scalar, 3>(random.array({batch, 600, 16}));
    typename LocalMHA<Scalar>::Saved saved;
    auto gradients = local_mha::LocalMHAParameters<Scalar>::zeros(mha.config());
    expect_work("layer, forward", [&] { mha.forward(device, x); });
    expect_work("layer, forward_saving", [&] { mha.forward_saving(device, saved, x); });
    expect_work("layer, backward", [&] { mha.backward(device, gradients, saved, x, x); });
    // A batch by its sequences, a single one by its heads.
    typename LocalMHA<Scalar>::Stream stream(mha, {.batch = batch, .max_threads = 3});
    expect_work("stream, push", [&] { stream.push(x, {.device = device}); });
  }

  const local_mha::LocalTransformer<Scalar> model({.num_tokens = 9,
                                                   .max_seq_len = 200,
                                                   .dim = 16,
                                                   .depth = 1,
                                                   .local_attn_window_size = 16,
                                                   .dim_head = 8,
                                                   .heads = 2});
  Tensor<std::int64_t, 2> tokens(3, 200);
  tokens.setConstant(1);
  auto gradients = local_mha::LocalTransformerParameters<Scalar>::zeros(model.config());
  expect_work("transformer, forward", [&] { model.forward(tokens, {.device = device}); });
  expect_work("transformer, backward",
              [&] { model.backward(gradients, tokens, {.device = device}); });
}

TYPED_TEST(OnThreads, ARepeatedCallIntoGivenMemoryAllocatesNothing) {
  for (const bool causal : {false, true}) {
    LocalMHAConfig config{.dim = 12, .window_size = 7, .dim_head = 6, .heads = 2};
    config.causal = causal;
    config.prenorm = config.qk_rmsnorm = config.gate_values_per_head = true;
    config.dropout = 0.2;
    const LocalMHA<TypeParam> mha(config, 1);
    Random random(3);
    const auto x = tensor<TypeParam, 3>(random.array({3, 300, 12}));
    const auto bias = tensor<TypeParam, 3>(random.array({2, 7, causal ? 14 : 21}));
    const PaddingMask mask = PaddingMask::from_lengths(std::vector<Index>{300, 17, 0}, 300);
    const Training training{.seed = 5};
    Tensor<TypeParam, 3> y(3, 300, 12);
    typename LocalMHA<TypeParam>::Workspace workspace;
    const auto call = [&] {
      mha.forward_into(y, workspace, x, mask, support::optional_view(bias), training);
    };
    const long first_time = allocations_of([&] {
      Eigen::internal::set_is_malloc_allowed(true);
      call();
    });
    if (COUNTS_ALLOCATIONS) {
      EXPECT_GT(first_time, 0) << "the count does not work";
    }
    const Tensor<TypeParam, 3> first = y;
    y.setZero();
    EXPECT_EQ(allocations_of(call), 0);
    EXPECT_TRUE(same_bits(y, first));
    EXPECT_TRUE(same_bits(y, mha.forward(x, mask, support::optional_view(bias), training)));

    // Another batch of the same length.
    const auto one = tensor<TypeParam, 3>(random.array({1, 300, 12}));
    Tensor<TypeParam, 3> y_of_one(1, 300, 12);
    EXPECT_EQ(allocations_of([&] { mha.forward_into(y_of_one, workspace, one); }), 0);
    EXPECT_TRUE(same_bits(y_of_one, mha.forward(one)));

    const auto q = tensor<TypeParam, 4>(random.array({2, 2, 130, 6}));
    local_mha::LocalAttentionConfig of_heads{.window_size = 7, .causal = causal, .dim = 6};
    const LocalAttention<TypeParam> attention(of_heads);
    Tensor<TypeParam, 4> out(2, 2, 130, 6);
    typename LocalAttention<TypeParam>::Workspace room;
    attention.forward_into(out, room, q, q, q);
    EXPECT_EQ(allocations_of([&] { attention.forward_into(out, room, q, q, q); }), 0);
    EXPECT_TRUE(same_bits(out, attention.forward(q, q, q)));
  }
}

TYPED_TEST(OnThreads, AWorkspaceServesOtherLayersLengthsAndNumbersOfThreads) {
  // Whatever the call before left in it, infinities included.
  typename LocalMHA<TypeParam>::Workspace workspace;
  const Threads two(2), three(3);
  for (std::uint64_t seed = 500; seed < 560; ++seed) {
    const support::LayerCase c =
        support::layer_case(seed, seed % 4 == 0 ? support::Length::Long : support::Length::Short);
    const auto x = tensor<TypeParam, 3>(c.in.x);
    auto poisoned = x;
    poisoned.setConstant(std::numeric_limits<TypeParam>::infinity());
    const auto bias = support::bias_tensor<TypeParam>(c.in.bias);
    const auto mask = support::padding_mask(c.in.masked, c.in.x.shape[0], c.in.x.shape[1]);
    const LocalMHA<TypeParam> mha(c.config,
                                  support::layer_parameters<TypeParam>(c.config, c.parameters));
    const LocalMHA<TypeParam> of_other_weights(c.config, seed);
    Tensor<TypeParam, 3> y = x;
    const auto expect = [&](const LocalMHA<TypeParam>& layer, const char* what) {
      EXPECT_TRUE(same_bits(y, layer.forward(x, mask, support::optional_view(bias))))
          << "seed " << seed << ", " << what;
    };
    mha.forward_into(y, workspace, poisoned);
    mha.forward_into(y, workspace, x, mask, support::optional_view(bias));
    expect(mha, "alone");
    of_other_weights.forward_into(two.device, y, workspace, x, mask, support::optional_view(bias));
    expect(of_other_weights, "other weights, two threads");
    mha.forward_into(three.device, y, workspace, x, mask, support::optional_view(bias));
    expect(mha, "three threads");
    mha.forward_into(y, workspace, x, mask, support::optional_view(bias));
    expect(mha, "alone again");
  }
}

TYPED_TEST(OnThreads, AWorkspaceServesOtherAttentions) {
  typename LocalAttention<TypeParam>::Workspace workspace;
  const Threads two(2);
  for (std::uint64_t seed = 700; seed < 800; ++seed) {
    const support::AttentionCase c = support::attention_case(seed);
    const auto q = tensor<TypeParam, 4>(c.in.q);
    const auto k = tensor<TypeParam, 4>(c.in.k);
    const auto v = tensor<TypeParam, 4>(c.in.v);
    auto poisoned = q;
    poisoned.setConstant(std::numeric_limits<TypeParam>::quiet_NaN());
    const auto bias = support::bias_tensor<TypeParam>(c.in.bias);
    const auto mask = support::padding_mask(c.in.masked, c.batch(), c.seqlen());
    const LocalAttention<TypeParam> attention(c.config);
    const auto expected = attention.forward(
        q, k, v, support::attention_call<TypeParam>(c.call, mask, support::optional_view(bias)));
    Tensor<TypeParam, 4> out = q;
    attention.forward_into(out, workspace, poisoned, poisoned, poisoned,
                           support::attention_call<TypeParam>(c.call));
    attention.forward_into(
        out, workspace, q, k, v,
        support::attention_call<TypeParam>(c.call, mask, support::optional_view(bias)));
    EXPECT_TRUE(same_bits(out, expected)) << "seed " << seed;
    attention.forward_into(
        out, workspace, q, k, v,
        support::attention_call<TypeParam>(c.call, mask, support::optional_view(bias), two.device));
    EXPECT_TRUE(same_bits(out, expected)) << "seed " << seed << ", two threads";
    // Elsewhere: the same workspace must notice that the buckets lie differently.
    support::AttentionOptions elsewhere = c.call;
    elsewhere.first_position += 1;
    attention.forward_into(
        out, workspace, q, k, v,
        support::attention_call<TypeParam>(elsewhere, mask, support::optional_view(bias)));
    EXPECT_TRUE(
        same_bits(out, attention.forward(q, k, v,
                                         support::attention_call<TypeParam>(
                                             elsewhere, mask, support::optional_view(bias)))))
        << "seed " << seed << ", elsewhere";
  }
}

/// The message of the std::invalid_argument that a call throws.
template <typename Call>
std::string rejection(Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no exception";
}

TYPED_TEST(OnThreads, BadArgumentsAreNamed) {
  const Threads threads(2);
  const LocalMHA<TypeParam> mha(LocalMHAConfig{.dim = 6, .window_size = 4, .dim_head = 4});
  const Tensor<TypeParam, 3> x(2, 10, 6), wrong(2, 10, 5);
  Tensor<TypeParam, 3> short_y(2, 9, 6), y(2, 10, 6);
  typename LocalMHA<TypeParam>::Workspace workspace;
  EXPECT_EQ(rejection([&] { mha.forward_into(threads.device, short_y, workspace, x); }),
            "y: expected shape [2, 10, 6], got [2, 9, 6]");
  EXPECT_EQ(rejection([&] { mha.forward_into(short_y, workspace, x); }),
            "y: expected shape [2, 10, 6], got [2, 9, 6]");
  EXPECT_NE(rejection([&] { mha.forward(threads.device, wrong); }).find("x: expected"),
            std::string::npos);
  EXPECT_NE(rejection([&] {
              mha.forward_into(threads.device, y, workspace, x,
                               PaddingMask::from_lengths(std::vector<Index>{1}, 10));
            }).find("mask: expected"),
            std::string::npos);

  const LocalAttention<TypeParam> attention({.window_size = 4});
  const Tensor<TypeParam, 4> q(1, 2, 10, 4);
  Tensor<TypeParam, 4> out(1, 2, 10, 3);
  typename LocalAttention<TypeParam>::Workspace room;
  EXPECT_EQ(
      rejection([&] { attention.forward_into(out, room, q, q, q, {.device = threads.device}); }),
      "out: expected shape [1, 2, 10, 4], got [1, 2, 10, 3]");
}

TEST(ParallelFor, CallsEachTaskOnceAndNoWorkerTwiceAtATime) {
  for (const int count : thread_counts) {
    const Threads threads(count);
    for (const Index tasks : {0, 1, 2, 5, 100}) {
      std::vector<std::atomic<int>> calls(static_cast<std::size_t>(tasks));
      std::vector<std::atomic<int>> busy(static_cast<std::size_t>(count));
      std::atomic<bool> overlapped{false};
      local_mha::parallel_for(threads.device, count, tasks, [&](Index worker, Index task) {
        if (busy[static_cast<std::size_t>(worker)]++ != 0) overlapped = true;
        ++calls[static_cast<std::size_t>(task)];
        --busy[static_cast<std::size_t>(worker)];
      });
      EXPECT_FALSE(overlapped);
      for (const auto& call : calls) EXPECT_EQ(call, 1);
    }
  }
}

// All tasks run on even if one throws, and the call returns when the last has ended: tasks take so
// long that one that returns early is caught with some of them running.
TEST(ParallelFor, ThrowsTheExceptionOfATaskOnceAllHaveEnded) {
  const Threads threads(3);
  for (const Index thrower : {0, 7, 49}) {
    std::atomic<int> ended{0};
    const auto task = [&](Index, Index i) {
      if (i == thrower) throw std::runtime_error("a task");
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      ++ended;
    };
    EXPECT_THROW(local_mha::parallel_for(threads.device, 3, 50, task), std::runtime_error);
    EXPECT_EQ(ended, 49);
  }
  // The device goes on.
  std::atomic<int> calls{0};
  local_mha::parallel_for(threads.device, 3, 10, [&](Index, Index) { ++calls; });
  EXPECT_EQ(calls, 10);
}

TEST(ParallelFor, ReturnsOnceAllTasksHaveEnded) {
  const Threads threads(3);
  for (int repeat = 0; repeat < 20; ++repeat) {
    std::atomic<int> ended{0};
    local_mha::parallel_for(threads.device, 3, 5, [&](Index, Index) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      ++ended;
    });
    EXPECT_EQ(ended, 5);
  }
}

// Tasks that wait for each other: each has a thread of its own, the calling one among them.
TEST(ParallelFor, RunsAsManyTasksAtOnceAsThereAreWorkers) {
  for (const int count : {2, 3, 7}) {
    const Threads threads(count);
    Meeting meeting(count);
    std::atomic<bool> caller_takes_part{false};
    const auto caller = std::this_thread::get_id();
    local_mha::parallel_for(threads.device, count, count, [&](Index worker, Index) {
      if (std::this_thread::get_id() == caller) caller_takes_part = worker == 0;
      EXPECT_TRUE(meeting.wait()) << count << " threads, worker " << worker;
    });
    EXPECT_TRUE(caller_takes_part);
  }
}

// Every thread of the pool calls parallel_for on that pool: nobody may wait for a free thread.
TEST(ParallelFor, MayBeCalledByTheDevicesOwnThreads) {
  const Threads threads(2);
  std::atomic<int> calls{0};
  local_mha::parallel_for(threads.device, 2, 4, [&](Index, Index) {
    local_mha::parallel_for(threads.device, 2, 10, [&](Index, Index) { ++calls; });
  });
  EXPECT_EQ(calls, 40);
}

// Something that says how many threads it has, but has no pool to run them.
TEST(ParallelFor, RunsOnTheCallingThreadIfTheDeviceHasNoPool) {
  struct Device {
    int numThreads() const { return 4; }
  };
  int calls = 0;
  local_mha::parallel_for(Device{}, 4, 10, [&](Index worker, Index) {
    EXPECT_EQ(worker, 0);
    ++calls;
  });
  EXPECT_EQ(calls, 10);
}

TEST(ParallelFor, RunsOnTheCallingThreadIfTheDeviceHasNoThreads) {
  Eigen::ThreadPool pool(2);
  const Eigen::ThreadPoolDevice device(&pool, 0);
  EXPECT_EQ(local_mha::thread_count(device), 1);
  const LocalMHA<float> mha({.dim = 8, .window_size = 4, .dim_head = 4, .heads = 2});
  Tensor<float, 3> x(1, 30, 8);
  x.setRandom();
  EXPECT_TRUE(same_bits(mha.forward(device, x), mha.forward(x)));
}

}  // namespace threads_test
