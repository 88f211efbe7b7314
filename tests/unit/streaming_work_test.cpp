// SPDX-License-Identifier: MIT
// What a step of a stream computes does not grow with its position.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include <local_mha/local_mha.hpp>

#include "support/counted.hpp"
#include "support/random_case.hpp"

namespace streaming_work_test {

using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::Tensor;
using local_mha::TensorView;

// Operations are counted, for time is not the same twice.
TEST(StreamingWork, OfAStepIsTheSameAfterAMillionPositions) {
  using support::Counted;
  for (const bool causal : {true, false})
    for (const bool exact : {true, false}) {
      LocalMHAConfig config{.dim = 2, .window_size = 4, .dim_head = 2, .heads = 1};
      config.causal = causal;
      config.exact_windowsize = exact;
      config.use_xpos = true;
      config.xpos_scale_base = 8;
      const LocalMHA<Counted> mha(config, 1);
      LocalMHA<Counted>::Stream stream(mha);
      // After as many positions, windows and the groups of rotary begin together again.
      const Index period = 4 * local_mha::RotaryEmbedding<Counted>(2, 8.0).group();
      Tensor<Counted, 3> x(1, 2 * period, 2), y(1, 3 * period, 2);
      x.setConstant(Counted(0.5));
      const auto push = [&](Index n) {
        const long before = Counted::operations;
        stream.push_into(TensorView<Counted, 3>(y.data(), {1, stream.results_of(n), 2}),
                         TensorView<const Counted, 3>(x.data(), {1, n, 2}));
        return Counted::operations - before;
      };
      const auto steps = [&] {
        std::vector<long> work;
        for (Index i = 0; i < period; ++i) work.push_back(push(1));
        return work;
      };
      push(2 * period);
      const auto early = steps();
      push(period);
      while (stream.position() < 1'000'000) push(2 * period);
      EXPECT_GT(*std::min_element(early.begin(), early.end()), 0);
      EXPECT_EQ(steps(), early) << support::describe(config);
    }
}

/// Operations of a step whose window is full.
long work_of_a_step(Index window_size) {
  using support::Counted;
  using Attention = local_mha::LocalAttention<Counted>;
  local_mha::LocalAttentionConfig config{.window_size = window_size, .causal = true};
  config.exact_windowsize = true;
  typename Attention::Stream stream(Attention(config), 1, 2);
  Tensor<Counted, 4> q(1, 1, window_size + 2, 2);
  q.setConstant(Counted(0.5));
  const auto push = [&](Index n) {
    const TensorView<const Counted, 4> rows(q.data(), {1, 1, n, 2});
    stream.push(rows, rows, rows);
  };
  push(window_size + 2);
  const long before = Counted::operations;
  push(1);
  return Counted::operations - before;
}

// A window that has no room to be scored at once costs as much a key as one that has.
TEST(StreamingWork, OfAStepGrowsWithItsWindowAlone) {
  using Kernel = local_mha::AttentionKernel<support::Counted>;
  constexpr Index room = Kernel::chunk_keys;
  const auto small = static_cast<double>(work_of_a_step(room / 2));
  const auto large = static_cast<double>(work_of_a_step(4 * room));
  EXPECT_GT(large, 7.5 * small);
  EXPECT_LT(large, 8.5 * small);
}

}  // namespace streaming_work_test
