// SPDX-License-Identifier: MIT
// How calls are cut into tasks: every row once, in an order in which no task waits for ever.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <thread>
#include <vector>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/plan.hpp>
#include <local_mha/core/task_order.hpp>
#include <local_mha/layer/plan.hpp>

namespace plan_test {

using local_mha::Index;
using local_mha::PaddingMask;
using local_mha::TaskOrder;

/// A call of sequences side by side, or of packed ones.
struct Sequences {
  std::string name;
  Index batch;
  std::vector<Index> lengths;  // of one that is packed; otherwise the first is that of all
};

const std::vector<Sequences>& all_sequences() {
  static const std::vector<Sequences> all{
      {"none", 0, {5}},
      {"empty", 3, {0}},
      {"one", 1, {1}},
      {"shorter than a block", 2, {7}},
      {"longer", 5, {1001}},
      {"long", 1, {20011}},
      {"many", 100, {33}},
      {"packed", 1, {0, 5, 0, 300, 1, 1, 77, 2000, 0}},
      {"packed, the last one long", 1, {16, 32, 9000}},
      {"packed, the last one short", 1, {9000, 32, 1}},
  };
  return all;
}

/// Calls `check(inputs, batch, threads)` for all of them.
template <typename Check>
void for_each_call(Check&& check) {
  for (const Sequences& of : all_sequences())
    for (const Index window_size : {1, 30, 5000})
      for (const Index threads : {1, 2, 3, 7, 64}) {
        SCOPED_TRACE(of.name + ", window " + std::to_string(window_size) + ", " +
                     std::to_string(threads) + " threads");
        const local_mha::Window window(local_mha::attention_config(
            {.dim = 8, .window_size = window_size, .dim_head = 4, .heads = 6}));
        std::vector<Index> cu_seqlens{0};
        for (const Index length : of.lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
        const PaddingMask mask;
        local_mha::detail::AttentionInputs<float> inputs(window, of.batch, 6, cu_seqlens.back(),
                                                         mask, {});
        inputs.share_keys(2);
        if (of.lengths.size() > 1) inputs.cut(cu_seqlens);
        check(inputs, of.batch, threads);
      }
}

Index length(const local_mha::detail::AttentionInputs<float>& inputs, Index sequence) {
  return inputs.rows(sequence).end - inputs.rows(sequence).begin;
}

TEST(PlanOfTheAttention, HasEveryBlockOfEveryHeadOnce) {
  constexpr Index count = local_mha::block_rows<float>;
  local_mha::detail::AttentionPlan<float> plan;
  for_each_call([&](const auto& inputs, Index batch, Index threads) {
    plan.assign(inputs, batch, threads);
    EXPECT_GE(plan.workers(), (std::min)(threads, plan.tasks()));
    EXPECT_LE(plan.workers(), threads);
    // Of packed sequences there may be more than tasks: those that longer ones have.
    if (!inputs.packed()) {
      EXPECT_EQ(plan.workers(), (std::min)(threads, plan.tasks()));
    }
    std::vector<std::vector<int>> covered;
    for (Index s = 0; s < inputs.sequences(); ++s)
      for (Index h = 0; h < inputs.kv_heads(); ++h)
        covered.emplace_back(
            static_cast<std::size_t>(local_mha::ceil_div(length(inputs, s), count)), 0);
    for (Index i = 0; i < plan.tasks(); ++i) {
      const auto task = plan.task(i);
      EXPECT_LT(task.queries.begin, task.queries.end);
      auto& times = covered.at(static_cast<std::size_t>(task.sequence * 2 + task.kv_head));
      for (Index block = task.queries.begin; block < task.queries.end; ++block)
        ++times.at(static_cast<std::size_t>(block));
    }
    for (const auto& of_head : covered)
      for (const int times : of_head) ASSERT_EQ(times, 1);
  });
}

TEST(PlanOfTheAttention, KeepsThreadsAtWork) {
  local_mha::detail::AttentionPlan<float> plan;
  const local_mha::Window window({.window_size = 30});
  const PaddingMask mask;
  const local_mha::detail::AttentionInputs<float> inputs(window, 1, 1, 100000, mask, {});
  plan.assign(inputs, 1, 16);
  EXPECT_GE(plan.tasks(), 32);
  EXPECT_EQ(plan.workers(), 16);
  plan.assign(inputs, 1, 1);
  EXPECT_EQ(plan.tasks(), 1);
}

TEST(PlanOfTheLayer, HasEveryRowOnceInOrder) {
  local_mha::detail::LayerPlan<float> plan;
  for_each_call([&](const auto& inputs, Index, Index threads) {
    plan.assign(inputs, threads);
    Index task = 0;
    Index with_rows = 0;
    for (Index s = 0; s < inputs.sequences(); ++s) {
      with_rows += length(inputs, s) > 0 ? 1 : 0;
      for (Index row = 0; row < length(inputs, s); row = plan.rows(task++).end) {
        ASSERT_LT(task, plan.tasks());
        ASSERT_EQ(plan.sequence(task), s);
        ASSERT_EQ(plan.rows(task).begin, row);
        ASSERT_GT(plan.rows(task).end, row);
        ASSERT_LE(plan.rows(task).end, (std::min)(row + plan.stretch_rows(), length(inputs, s)));
      }
    }
    EXPECT_EQ(task, plan.tasks());
    EXPECT_LE(plan.pasts(), with_rows);
    EXPECT_EQ(plan.workers(), (std::min)(threads, plan.tasks()));
  });
}

// Short stretches come last, so that all threads end at about the same time.
TEST(PlanOfTheLayer, KeepsThreadsAtWork) {
  local_mha::detail::LayerPlan<float> plan;
  const local_mha::Window window({.window_size = 30});
  const PaddingMask mask;
  const local_mha::detail::AttentionInputs<float> inputs(window, 2, 1, 100000, mask, {});
  const auto rows = [&](Index task) { return plan.rows(task).end - plan.rows(task).begin; };
  constexpr Index threads = 4;
  plan.assign(inputs, threads);
  ASSERT_GT(plan.tasks(), 8 * threads);
  for (Index i = 0; i < 3 * threads - 1; ++i) EXPECT_LT(rows(plan.tasks() - 1 - i), rows(0)) << i;
  EXPECT_EQ(rows(plan.tasks() - 6 * threads), rows(0));
  plan.assign(inputs, 1);
  EXPECT_EQ(rows(plan.tasks() - 2), rows(0));
}

// Otherwise threads would wait for one another for ever, or overwrite what is still needed.
TEST(PlanOfTheLayer, AnswersAStretchWhenAllThatItSeesCanHaveComeIn) {
  local_mha::detail::LayerPlan<float> plan;
  for_each_call([&](const auto& inputs, Index, Index threads) {
    plan.assign(inputs, threads);
    Index before = 0;
    for (Index task = 0; task < plan.tasks(); ++task) {
      const Index needs = plan.needs(task, inputs.window());
      ASSERT_GT(needs, task);
      // Threads that are at other stretches have room of their own.
      const Index others = plan.workers() > 1 ? 2 * plan.workers() : 0;
      ASSERT_LE(needs, task + plan.waiting() - others);
      ASSERT_GE(needs, before);
      before = needs;
      const Index s = plan.sequence(task);
      const Index seen = inputs.window().keys_of(plan.rows(task), length(inputs, s)).end;
      ASSERT_EQ(plan.sequence(needs - 1), s);
      ASSERT_GE(plan.rows(needs - 1).end, seen);
      // Sequences that are under way at a time are in different places.
      for (Index other = task; other < (std::min)(task + plan.waiting(), plan.tasks()); ++other) {
        if (plan.sequence(other) == s) continue;
        ASSERT_NE(plan.past(plan.sequence(other)), plan.past(s));
      }
    }
  });
}

/// `make 3`, as tasks are written down here.
std::string text(const TaskOrder::Task& task) {
  if (task.kind == TaskOrder::Kind::none) return "none";
  return (task.kind == TaskOrder::Kind::make ? "make " : "answer ") + std::to_string(task.i);
}

TEST(TheOrderOfTasks, AnswersFirstAndMakesWhileThereIsRoom) {
  TaskOrder order;
  for (int again = 0; again < 2; ++again) {
    order.start(4, 3);
    // Answer i needs two makes, and the last one all there are.
    const auto next = [&] { return order.next([](Index i) { return std::min<Index>(i + 2, 4); }); };
    const auto first = next(), second = next(), third = next();
    EXPECT_EQ(text(first) + ", " + text(second) + ", " + text(third), "make 0, make 1, make 2");
    // The second one counts when the first one has ended, too.
    order.end(second);
    order.end(first);
    const auto answer = next();
    EXPECT_EQ(text(answer), "answer 0");
    order.end(third);
    EXPECT_EQ(text(next()), "answer 1");
    order.end(answer);  // its room is that of make 3
    const auto last = next();
    EXPECT_EQ(text(last), "make 3");
    order.end(last);
    EXPECT_EQ(text(next()), "answer 2");
    EXPECT_EQ(text(next()), "answer 3");
    EXPECT_EQ(text(next()), "none");
  }
}

TEST(TheOrderOfTasks, HandsOutNoneOnceItIsAbandoned) {
  TaskOrder order;
  order.start(4, 2);
  const auto next = [&] { return text(order.next([](Index i) { return i + 1; })); };
  EXPECT_EQ(next(), "make 0");
  EXPECT_EQ(next(), "make 1");
  std::string waited_for;
  std::thread waiting([&] { waited_for = next(); });
  order.abandon();
  waiting.join();
  EXPECT_EQ(waited_for, "none");
  EXPECT_EQ(next(), "none");
  order.start(1, 1);
  EXPECT_EQ(next(), "make 0");
}

}  // namespace plan_test
