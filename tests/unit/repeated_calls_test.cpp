// SPDX-License-Identifier: MIT
// What is said to allocate nothing when repeated does not, alone and on a thread pool: also with a
// mask, a bias and dropout, for fewer and shorter sequences than before, and whatever an option
// holds that is not used.
#define EIGEN_USE_THREADS
#include "support/allocations.hpp"  // before Eigen

#include <gtest/gtest.h>

#include <atomic>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include <local_mha/longformer.hpp>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace repeated_calls_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::TensorView;
using local_mha::Training;
using support::allocations_of;
using support::tensor;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

struct Alone {
  Eigen::DefaultDevice device;
};
struct OnAPool {
  Eigen::ThreadPool pool{3};
  Eigen::ThreadPoolDevice device{&pool, 3};
};

template <typename Threads>
class RepeatedCalls : public testing::Test {
 protected:
  Threads threads;
};
using Devices = testing::Types<Alone, OnAPool>;
struct DeviceNames {
  template <typename Threads>
  static std::string GetName(int) {
    return std::is_same_v<Threads, Alone> ? "Alone" : "OnAPool";
  }
};
TYPED_TEST_SUITE(RepeatedCalls, Devices, DeviceNames);

template <typename Scalar, int Rank>
TensorView<const Scalar, Rank> view(const Tensor<Scalar, Rank>& t) {
  return t;
}

/// Batches and lengths by turns, of which the first are the largest.
const std::vector<std::pair<Index, Index>> sizes{{3, 190}, {3, 190}, {1, 190}, {3, 17},
                                                 {2, 1},   {3, 190}, {3, 0},   {1, 188}};

/// The first call may allocate; on threads, which take several short sequences at once, also the
/// first of such, and one more after it: there are more rooms for these, some of which gave way.
template <typename Call>
void expect_no_allocations_but_at_first(Call&& call, bool on_threads = false) {
  call(sizes.front().first, sizes.front().second);
  if (on_threads) {
    call(3, 17);
    call(sizes.front().first, sizes.front().second);
  }
  for (const auto& [batch, seqlen] : sizes)
    EXPECT_EQ(call(batch, seqlen), 0) << "[" << batch << ", " << seqlen << "]";
}

TYPED_TEST(RepeatedCalls, OfTheAttention) {
  for (const bool causal : {true, false}) {
    LocalAttentionConfig config{.window_size = 9, .causal = causal, .dropout = 0.2, .dim = 6};
    config.xpos_scale_base = nan;  // there is no xPos
    const LocalAttention<float> attention(config);
    LocalAttention<float>::Workspace workspace;
    LocalAttention<float>::Gradients gradients;
    const Tensor<float, 3> bias = tensor<float, 3>(Random(2).array({2, 9, causal ? 18 : 27}));
    const Training training{.seed = 4};
    expect_no_allocations_but_at_first([&](Index batch, Index seqlen) {
      const auto q = tensor<float, 4>(Random(1).array({batch, 2, seqlen, 6}));
      const auto mask = PaddingMask::from_lengths(
          std::vector<Index>(static_cast<std::size_t>(batch), seqlen / 2), seqlen);
      Tensor<float, 4> out(batch, 2, seqlen, 6);
      return allocations_of([&] {
        attention.forward_into(out, workspace, q, q, q,
                               {.mask = mask,
                                .attn_bias = view(bias),
                                .training = training,
                                .device = this->threads.device});
      });
    });
    for (Index seqlen : {190, 190}) {
      const auto q = tensor<float, 4>(Random(1).array({3, 2, seqlen, 6}));
      const auto saved =
          attention.forward_saving(q, q, q, {.attn_bias = view(bias), .training = training});
      const auto backward = [&] {
        attention.backward_into(gradients, workspace, saved, q, q, q, q,
                                {.attn_bias = view(bias), .device = this->threads.device});
      };
      backward();
      EXPECT_EQ(allocations_of(backward), 0);
    }
  }
}

// Stretches of shorter sequences may come out even where those of longer ones do not, and then
// there are more of them.
TYPED_TEST(RepeatedCalls, OfTheAttentionForEveryShorterLength) {
  const LocalAttention<float> attention({.window_size = 9});
  for (Index longest = 40; longest < 72; ++longest) {
    LocalAttention<float>::Workspace workspace;
    for (Index seqlen = longest; seqlen >= 0; --seqlen) {
      Tensor<float, 4> q(1, 1, seqlen, 6), out(1, 1, seqlen, 6);
      q.setZero();
      const long allocations = allocations_of([&] {
        attention.forward_into(out, workspace, q, q, q, {.device = this->threads.device});
      });
      if (seqlen < longest) {
        EXPECT_EQ(allocations, 0) << seqlen << " after " << longest;
      }
    }
  }
}

/// Options beside those of the Python package, the frequencies of the rotary embedding in memory of
/// their own.
void set_further_options(LocalMHAConfig& config) {
  config.qk_rmsnorm = false;
  config.qkv_bias = config.out_bias = true;
  config.rotary.inv_freq = {1, 0.5, 0.1};
  config.qk_norm.kind = local_mha::QkNormKind::rms_all;
  config.norm.kind = local_mha::NormKind::rms;
}

TYPED_TEST(RepeatedCalls, OfTheLayer) {
  for (const auto& [causal, further] :
       {std::pair(true, false), std::pair(false, false), std::pair(true, true)}) {
    LocalMHAConfig config{.dim = 10, .window_size = 9, .dim_head = 6, .heads = 3, .dropout = 0.2};
    config.causal = causal;
    config.prenorm = config.qk_rmsnorm = config.gate_values_per_head = true;
    config.xpos_scale_base = nan;  // there is no xPos
    if (further) set_further_options(config);
    LocalMHA<float> layer(config, 1);
    LocalMHA<float>::Workspace workspace;
    LocalMHA<float>::Saved saved;
    auto gradients = LocalMHA<float>::Parameters::zeros(config);
    const Tensor<float, 3> bias = tensor<float, 3>(Random(2).array({3, 9, causal ? 18 : 27}));
    Tensor<float, 3> grad_bias = bias;
    const Training training{.seed = 4};
    const auto call = [&](Index batch, Index seqlen) {
      const auto x = tensor<float, 3>(Random(1).array({batch, seqlen, 10}));
      const auto mask = PaddingMask::from_lengths(
          std::vector<Index>(static_cast<std::size_t>(batch), seqlen / 2), seqlen);
      Tensor<float, 3> y(batch, seqlen, 10), grad_x(batch, seqlen, 10);
      const auto& device = this->threads.device;
      return allocations_of([&] {
        layer.forward_into(device, y, workspace, x, mask, view(bias), training);
        layer.forward_saving_into(device, y, workspace, saved, x, mask, view(bias), training);
        layer.backward_into(device, grad_x, workspace, gradients, saved, y, x, {}, view(bias), {},
                            &grad_bias);
      });
    };
    expect_no_allocations_but_at_first(call, std::is_same_v<TypeParam, OnAPool>);
  }
}

/// What sliding windows can have, with rows that stay visible.
LocalMHAConfig sliding_layer(Index right) {
  LocalMHAConfig config{.dim = 10, .dim_head = 6, .heads = 6, .dropout = 0.2, .kv_heads = 2};
  config.token_window = {.left = 17, .right = right};
  config.score.alibi_slopes = {1, 0.5, 0.25, 0.125, 0.0625, 0.03125};
  config.sinks = config.relative_bias = true;
  config.first_keys = 3;
  return config;
}

TYPED_TEST(RepeatedCalls, OfTheLayerWithASlidingWindow) {
  for (const Index right : {0, 20}) {
    const LocalMHAConfig config = sliding_layer(right);
    const LocalMHA<float> layer(config, 1);
    LocalMHA<float>::Workspace workspace;
    LocalMHA<float>::Saved saved;
    auto gradients = LocalMHA<float>::Parameters::zeros(config);
    const Training training{.seed = 4};
    const auto forth_and_back = [&](Index batch, Index seqlen, std::span<const Index> cu_seqlens) {
      const auto x = tensor<float, 3>(Random(1).array({batch, seqlen, 10}));
      const auto mask = PaddingMask::from_lengths(
          std::vector<Index>(static_cast<std::size_t>(batch), seqlen / 2), seqlen);
      Tensor<float, 3> y(batch, seqlen, 10), grad_x(batch, seqlen, 10);
      const auto& device = this->threads.device;
      return allocations_of([&] {
        layer.forward_into(device, y, workspace, x, mask, {}, training, cu_seqlens);
        layer.forward_saving_into(device, y, workspace, saved, x, mask, {}, training, cu_seqlens);
        layer.backward_into(device, grad_x, workspace, gradients, saved, y, x);
      });
    };
    expect_no_allocations_but_at_first(
        [&](Index batch, Index seqlen) { return forth_and_back(batch, seqlen, {}); },
        std::is_same_v<TypeParam, OnAPool>);
    // Packed, the segments that a sequence of the batch has.
    const std::vector<Index> cuts{0, 7, 7, 60, 61, 190};
    forth_and_back(1, 190, cuts);
    EXPECT_EQ(forth_and_back(1, 190, cuts), 0);
    EXPECT_EQ(forth_and_back(1, 61, std::span(cuts).first(5)), 0);
  }
}

TYPED_TEST(RepeatedCalls, OfTheEncoder) {
  for (const Index streams : {1, 3}) {
    local_mha::EncoderConfig config{.depth = 3, .num_residual_streams = streams};
    config.layers = {{.dim = 10, .window_size = 9, .dim_head = 6, .heads = 3, .prenorm = true}};
    config.layers.insert(config.layers.end(), 2, config.layers[0]);
    config.layers[1].causal = true;
    config.ff_dropout = 0.2;
    const local_mha::Encoder<float> encoder(config, 1);
    local_mha::Encoder<float>::Workspace workspace;
    local_mha::Encoder<float>::Saved saved;
    auto gradients = local_mha::EncoderParameters<float>::zeros(config);
    const auto call = [&](Index batch, Index seqlen) {
      const auto x = tensor<float, 3>(Random(1).array({batch, seqlen, 10}));
      const std::vector<Index> lengths(static_cast<std::size_t>(batch), seqlen / 2);
      Tensor<float, 3> y(batch, seqlen, 10), grad_x(batch, seqlen, 10);
      const auto& device = this->threads.device;
      const auto forth_and_back = [&] {
        encoder.forward_into(y, workspace, x, {.lengths = lengths, .device = device});
        encoder.forward_saving_into(y, workspace, saved, x,
                                    {.training = Training{.seed = 4}, .device = device});
        encoder.backward_into(grad_x, workspace, gradients, saved, y, device);
      };
      // The first time, Eigen makes a set of weights.
      if (seqlen == 0) forth_and_back();
      return allocations_of(forth_and_back);
    };
    call(1, 0);
    expect_no_allocations_but_at_first(call, std::is_same_v<TypeParam, OnAPool>);
  }
}

TYPED_TEST(RepeatedCalls, OfTheFeedForwardsBackwardPass) {
  const local_mha::FeedForward<float> layer({.dim = 6, .dropout = 0.2}, 1);
  local_mha::FeedForward<float>::Workspace workspace;
  auto gradients = local_mha::FeedForwardParameters<float>::zeros({.dim = 6});
  const auto call = [&](Index batch, Index seqlen) {
    const auto x = tensor<float, 3>(Random(1).array({batch, seqlen, 6}));
    local_mha::FeedForward<float>::Saved saved;
    const auto y = layer.forward_saving(saved, x, {.training = Training{.seed = 1}});
    Tensor<float, 3> grad_x(batch, seqlen, 6);
    return allocations_of([&] {
      layer.backward_into(grad_x, workspace, gradients, saved, y, x,
                          {.device = this->threads.device});
    });
  };
  expect_no_allocations_but_at_first(call, std::is_same_v<TypeParam, OnAPool>);
}

TYPED_TEST(RepeatedCalls, OfLongformer) {
  const local_mha::LongformerConfig config{
      .dim = 12, .heads = 2, .attention_window = 8, .dropout = 0.2};
  auto parameters = local_mha::LongformerParameters<float>::zeros(config);
  local_mha::for_each_parameter(parameters, [](const auto&, auto& weight) { weight.setRandom(); });
  const local_mha::LongformerAttention<float> attention(config, parameters);
  for (const bool global : {true, false}) {
    local_mha::LongformerAttention<float>::Workspace workspace;
    expect_no_allocations_but_at_first(
        [&](Index batch, Index seqlen) {
          const auto x = tensor<float, 3>(Random(1).array({batch, seqlen, 12}));
          Tensor<bool, 2> global_rows(batch, seqlen), masked(batch, seqlen);
          for (Index i = 0; i < masked.size(); ++i) {
            global_rows.data()[i] = global && i % 37 == 0;
            masked.data()[i] = i % 5 == 1;
          }
          const auto mask = PaddingMask::masked(masked);
          const local_mha::LongformerCall call{.global_rows = global_rows,
                                               .mask = mask,
                                               .training = Training{.seed = 4},
                                               .device = this->threads.device};
          Tensor<float, 3> y(batch, seqlen, 12);
          y.setConstant(7);
          const long allocations =
              allocations_of([&] { attention.forward_into(y, workspace, x, call); });
          EXPECT_TRUE(support::same_bits(y, attention.forward(x, call)));
          return allocations;
        },
        std::is_same_v<TypeParam, OnAPool>);
  }
}

TYPED_TEST(RepeatedCalls, OfStreams) {
  LocalMHAConfig config{.dim = 10, .window_size = 9, .dim_head = 6, .heads = 3, .causal = true};
  LocalMHAConfig with_more = config;
  set_further_options(with_more);
  const LocalMHA<float> layers[] = {LocalMHA<float>(config, 1), LocalMHA<float>(with_more, 1),
                                    LocalMHA<float>(sliding_layer(0), 1)};
  for (const auto& [batch, further] : {std::pair(1, 0), std::pair(4, 0), std::pair(1, 1),
                                       std::pair(4, 1), std::pair(1, 2), std::pair(4, 2)}) {
    LocalMHA<float>::Stream stream(layers[further], {.batch = batch, .max_threads = 3});
    const auto x = tensor<float, 3>(Random(1).array({batch, 40, 10}));
    Tensor<float, 3> y(batch, 40, 10);
    const auto push = [&](Index n) {
      stream.push_into(TensorView<float, 3>(y.data(), {batch, n, 10}),
                       TensorView<const float, 3>(x.data(), {batch, n, 10}),
                       {.device = this->threads.device});
    };
    push(40);
    for (const Index n : {1, 1, 7, 40, 0, 16, 1})
      EXPECT_EQ(allocations_of([&] { push(n); }), 0) << n;
  }
}

TEST(RepeatedCallsOfTheFeedForward, AllocateNothing) {
  auto parameters = local_mha::FeedForwardParameters<float>::zeros(6, 10);
  local_mha::for_each_parameter(parameters, [](const auto&, auto& w) { w.setRandom(); });
  const local_mha::FeedForward<float> layer(parameters, 0.2);
  local_mha::FeedForward<float>::Workspace workspace(layer);
  const local_mha::RowMatrix<float> x = local_mha::RowMatrix<float>::Random(50, 6);
  local_mha::RowMatrix<float> y(50, 6);
  for (const Index rows : {50, 1, 17, 0})
    EXPECT_EQ(allocations_of([&] {
                layer.forward_into(rows, x.data(), 6, y.data(), workspace, Training{.seed = 1});
              }),
              0);
}

// The pool's queue holds functions of two words without an allocation.
TEST(RepeatedCallsOfThreads, AllocateNothingHoweverLateTheyStart) {
  OnAPool threads;
  std::atomic<long> done{0};
  const auto call = [&] {
    local_mha::parallel_for(threads.device, 3, 5, [&](Index, Index) { ++done; });
  };
  call();
  EXPECT_EQ(allocations_of([&] {
              for (int i = 0; i < 2000; ++i) call();
            }),
            0);
  EXPECT_EQ(done, 5 * 2001);
}

TEST(RepeatedCallsOfThreads, CallEachOther) {
  OnAPool threads;
  std::atomic<long> done{0};
  const auto call = [&] {
    local_mha::parallel_for(threads.device, 3, 7, [&](Index, Index) {
      local_mha::parallel_for(threads.device, 3, 5, [&](Index, Index) { ++done; });
    });
  };
  for (int i = 0; i < 200; ++i) call();
  EXPECT_EQ(done, 200 * 35);
}

/// Forward and backward in room that other calls have used, against room of their own.
void expect_the_same_in_used_room(const std::vector<LocalAttentionConfig>& configs,
                                  const std::vector<Index>& lengths) {
  using Attention = LocalAttention<float>;
  Random random(21);
  Attention::Workspace workspace;
  Attention::Gradients gradients;
  for (const Index n : lengths)
    for (std::size_t i = 0; i < configs.size(); ++i) {
      const Attention attention(configs[i]);
      const auto q = tensor<float, 4>(random.array({2, 2, n, 8})),
                 k = tensor<float, 4>(random.array({2, 2, n, 8})),
                 v = tensor<float, 4>(random.array({2, 2, n, 8})),
                 grad = tensor<float, 4>(random.array({2, 2, n, 8}));
      Tensor<float, 4> out(q.dimensions());
      attention.forward_into(out, workspace, q, k, v);
      const auto saved = attention.forward_saving(q, k, v);
      EXPECT_TRUE(support::same_bits(out, saved.out)) << "configuration " << i << ", N " << n;
      attention.backward_into(gradients, workspace, saved, grad, q, k, v);
      const auto alone = attention.backward(saved, grad, q, k, v);
      EXPECT_TRUE(support::same_bits(gradients.q, alone.q)) << "configuration " << i << ", N " << n;
      EXPECT_TRUE(support::same_bits(gradients.k, alone.k)) << "configuration " << i << ", N " << n;
      EXPECT_TRUE(support::same_bits(gradients.v, alone.v)) << "configuration " << i << ", N " << n;
    }
}

TEST(UsedRoom, ServesLongerSequences) {
  const std::vector<Index> lengths{3, 20, 70, 300, 41, 150};
  for (const Index w : {1, 10, 100}) {
    LocalAttentionConfig config{.window_size = w, .dim = 8};
    expect_the_same_in_used_room({config}, lengths);
    config.first_keys = 5;
    expect_the_same_in_used_room({config}, lengths);
  }
}

TEST(UsedRoom, ServesOtherConfigurations) {
  const LocalAttentionConfig first{.window_size = 7, .dim = 8};
  std::vector<LocalAttentionConfig> configs(9, first);
  configs[1].rotary.theta = 50;
  configs[2].use_xpos = true;
  configs[3].use_xpos = true;
  configs[3].xpos_scale_base = 20;
  configs[4].scale = 2;
  configs[5].score.soft_cap = 0.5;
  configs[6].use_rotary_pos_emb = false;
  configs[7].window_size = 12;
  configs[8].look_backward = 2;
  expect_the_same_in_used_room(configs, {60, 25, 130});
}

TEST(Configurations, AreEqualWhateverAnUnusedOptionHolds) {
  LocalMHAConfig layer{.dim = 8, .window_size = 2};
  LocalAttentionConfig attention{.window_size = 2, .dim = 8};
  EXPECT_EQ(layer, layer);
  layer.xpos_scale_base = attention.xpos_scale_base = nan;
  EXPECT_EQ(layer, layer);
  EXPECT_EQ(attention, attention);
  EXPECT_EQ(layer, (LocalMHAConfig{.dim = 8, .window_size = 2, .qk_scale = 3}));
  EXPECT_EQ(attention, (LocalAttentionConfig{.window_size = 2, .look_forward = 1, .dim = 8}));
  layer.use_xpos = true;
  layer.xpos_scale_base = 4;
  LocalMHAConfig other = layer;
  other.xpos_scale_base = 5;
  EXPECT_NE(layer, other);
  other = layer;
  other.heads = 2;
  EXPECT_NE(layer, other);
}

}  // namespace repeated_calls_test
