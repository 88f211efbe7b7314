// SPDX-License-Identifier: MIT
// Nothing that lies in memory from an earlier call reaches a result: not in the lanes of a last
// block that are no positions, nor in the channels that fill up, nor in what a call before made.
#define EIGEN_USE_THREADS

#include "support/poison.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include <local_mha/local_mha.hpp>

#include "support/library.hpp"

namespace poisoned_memory_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalMHAParameters;
using local_mha::Tensor;
using support::AlignedMemory;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// Lengths whose last block holds no row less than it can, one, two, and all but one.
template <typename Scalar>
std::vector<Index> lengths() {
  const Index lanes = local_mha::block_rows<Scalar>;
  return {2 * lanes, 2 * lanes + 1, 2 * lanes + 2, 3 * lanes - 1, 1, 2};
}

struct Threads {
  explicit Threads(int count) : pool(count), device(&pool, count) {}
  Eigen::ThreadPool pool;
  Eigen::ThreadPoolDevice device;
};

template <typename Tensor>
std::string bytes(const Tensor& tensor) {
  std::string all(static_cast<std::size_t>(tensor.size()) * sizeof(*tensor.data()), '\0');
  if (!all.empty()) std::memcpy(all.data(), tensor.data(), all.size());
  return all;
}

template <typename Parameters>
std::string bytes_of_all(const Parameters& parameters) {
  std::string all;
  for_each_parameter(parameters, [&](const std::string&, const auto& t) { all += bytes(t); });
  return all;
}

template <typename Scalar>
bool all_finite(const std::string& bytes) {
  for (std::size_t i = 0; i < bytes.size(); i += sizeof(Scalar)) {
    Scalar value;
    std::memcpy(&value, &bytes[i], sizeof value);
    if (!std::isfinite(value)) return false;
  }
  return true;
}

template <typename Scalar, int Rank>
Tensor<Scalar, Rank> random(const std::array<Index, Rank>& shape, std::uint64_t seed) {
  Tensor<Scalar, Rank> t(shape);
  local_mha::RandomSequence numbers(seed);
  for (Index i = 0; i < t.size(); ++i) t.data()[i] = Scalar(numbers.normal());
  return t;
}

// dim_head and heads that leave channels to fill up, and all that a layer can be asked for.
std::vector<LocalMHAConfig> layers() {
  LocalMHAConfig all{.dim = 24, .window_size = 5, .dim_head = 12, .heads = 3};
  all.causal = true;
  all.exact_windowsize = true;
  all.prenorm = true;
  all.qk_rmsnorm = true;
  all.gate_values_per_head = true;
  all.use_rotary_pos_emb = false;
  LocalMHAConfig plain{.dim = 16, .window_size = 40, .dim_head = 16, .heads = 1};
  plain.use_rotary_pos_emb = false;
  LocalMHAConfig rotary = all;
  rotary.use_rotary_pos_emb = true;
  rotary.use_xpos = true;
  // A bias makes what is no position something else than 0, unless it is left out there.
  LocalMHAConfig further = all;
  further.qk_rmsnorm = false;
  further.qkv_bias = further.out_bias = true;
  further.qk_norm.kind = local_mha::QkNormKind::rms_all;
  further.norm.kind = local_mha::NormKind::rms;
  LocalMHAConfig each_head = further;
  each_head.use_rotary_pos_emb = true;
  each_head.rotary = {.rotary_dim = 6, .pairing = local_mha::RotaryPairing::interleaved};
  each_head.qk_norm.kind = local_mha::QkNormKind::rms;
  // What sliding windows can have.
  LocalMHAConfig sliding{.dim = 24, .dim_head = 12, .heads = 4, .kv_heads = 2};
  sliding.use_rotary_pos_emb = false;
  sliding.token_window = {.left = 6, .right = 2};
  sliding.sinks = sliding.relative_bias = true;
  sliding.qkv_bias = true;
  sliding.qk_norm.kind = local_mha::QkNormKind::rms_all;
  LocalMHAConfig capped = sliding;
  capped.score.soft_cap = 2;
  capped.qk_norm.kind = local_mha::QkNormKind::rms;
  capped.first_keys = 3;
  LocalMHAConfig slopes = sliding;
  slopes.score.alibi_slopes = {1, 0.5, 0.25, 0.125};
  slopes.relative_bias = false;
  slopes.token_window = {.left = 40, .right = 0};
  slopes.use_rotary_pos_emb = true;
  slopes.first_keys = 20;
  return {all, plain, rotary, further, each_head, sliding, capped, slopes};
}

// Whether a workspace holds numbers that no call makes: the rotary embedding's.
bool has_tables(const LocalMHAConfig& config) { return config.use_rotary_pos_emb; }

template <typename Scalar>
class PoisonedMemory : public testing::Test {};
TYPED_TEST_SUITE(PoisonedMemory, support::Scalars, support::ScalarNames);

TYPED_TEST(PoisonedMemory, OfALayer) {
  for (const LocalMHAConfig& config : layers()) {
    const LocalMHA<TypeParam> layer(config, 7);
    for (const Index n : lengths<TypeParam>()) {
      const auto x = random<TypeParam, 3>({2, n, config.dim}, 1);
      const auto grad_y = random<TypeParam, 3>({2, n, config.dim}, 2);
      Tensor<TypeParam, 3> not_a_number(x.dimensions());
      not_a_number.setConstant(TypeParam(nan));
      const auto fresh = LocalMHAParameters<TypeParam>::zeros(config);

      typename LocalMHA<TypeParam>::Saved saved;
      const Tensor<TypeParam, 3> y = layer.forward_saving(saved, x);
      auto gradients = fresh;
      const Tensor<TypeParam, 3> grad_x = layer.backward(gradients, saved, grad_y, x);
      EXPECT_TRUE(all_finite<TypeParam>(bytes_of_all(gradients)));

      for (int threads = 1; threads <= 3; ++threads) {
        SCOPED_TRACE("N " + std::to_string(n) + ", threads " + std::to_string(threads));
        const Threads on(threads);
        const long mark = AlignedMemory::instance().mark();
        typename LocalMHA<TypeParam>::Workspace workspace;
        typename LocalMHA<TypeParam>::Saved kept;
        for (int call = 0; call < 3; ++call) {
          Tensor<TypeParam, 3> to = not_a_number;
          layer.forward_saving_into(on.device, to, workspace, kept, not_a_number);
          Tensor<TypeParam, 3> back = not_a_number;
          auto ignored = fresh;
          layer.backward_into(on.device, back, workspace, ignored, kept, not_a_number,
                              not_a_number);
          const auto poison = [&] {
            if (!has_tables(config)) {
              EXPECT_GT(AlignedMemory::instance().poison_since(mark), 0U);
            }
          };
          poison();
          layer.forward_into(on.device, to, workspace, x);
          EXPECT_EQ(bytes(to), bytes(y));
          poison();
          layer.forward_saving_into(on.device, to, workspace, kept, x);
          EXPECT_EQ(bytes(to), bytes(y));
          auto summed = fresh;
          layer.backward_into(on.device, back, workspace, summed, kept, grad_y, x);
          EXPECT_EQ(bytes(back), bytes(grad_x));
          EXPECT_EQ(bytes_of_all(summed), bytes_of_all(gradients));
        }
      }
    }
  }
}

// Segments of all lengths, each in blocks of its own.
TYPED_TEST(PoisonedMemory, OfPackedSequencesInALayer) {
  for (const LocalMHAConfig& config : layers()) {
    const LocalMHA<TypeParam> layer(config, 7);
    std::vector<Index> cuts{0};
    for (const Index n : lengths<TypeParam>()) cuts.insert(cuts.end(), 1, cuts.back() + n);
    cuts.insert(cuts.begin() + 2, cuts[2]);  // and one of none
    std::sort(cuts.begin(), cuts.end());
    const auto x = random<TypeParam, 3>({1, cuts.back(), config.dim}, 1);
    const auto grad_y = random<TypeParam, 3>({1, cuts.back(), config.dim}, 2);
    Tensor<TypeParam, 3> not_a_number(x.dimensions());
    not_a_number.setConstant(TypeParam(nan));
    const auto fresh = LocalMHAParameters<TypeParam>::zeros(config);
    typename LocalMHA<TypeParam>::Saved saved;
    const Tensor<TypeParam, 3> y = layer.forward_saving(saved, x, {}, {}, {}, cuts);
    auto gradients = fresh;
    const Tensor<TypeParam, 3> grad_x = layer.backward(gradients, saved, grad_y, x);
    EXPECT_TRUE(all_finite<TypeParam>(bytes_of_all(gradients)));
    for (int threads = 1; threads <= 3; ++threads) {
      const Threads on(threads);
      const long mark = AlignedMemory::instance().mark();
      typename LocalMHA<TypeParam>::Workspace workspace;
      typename LocalMHA<TypeParam>::Saved kept;
      for (int call = 0; call < 3; ++call) {
        Tensor<TypeParam, 3> to = not_a_number, back = not_a_number;
        auto ignored = fresh;
        layer.forward_saving_into(on.device, to, workspace, kept, not_a_number, {}, {}, {}, cuts);
        layer.backward_into(on.device, back, workspace, ignored, kept, not_a_number, not_a_number);
        if (!has_tables(config)) AlignedMemory::instance().poison_since(mark);
        layer.forward_saving_into(on.device, to, workspace, kept, x, {}, {}, {}, cuts);
        EXPECT_EQ(bytes(to), bytes(y));
        auto summed = fresh;
        layer.backward_into(on.device, back, workspace, summed, kept, grad_y, x);
        EXPECT_EQ(bytes(back), bytes(grad_x));
        EXPECT_EQ(bytes_of_all(summed), bytes_of_all(gradients));
      }
    }
  }
}

TYPED_TEST(PoisonedMemory, OfTheAttention) {
  for (const Index window : {3, 40}) {
    for (const Index dim_head : {12, 16}) {
      LocalAttentionConfig config{.window_size = window};
      config.causal = window == 3;
      config.exact_windowsize = config.causal;
      const LocalAttention<TypeParam> attention(config);
      for (const Index n : lengths<TypeParam>()) {
        const std::array<Index, 4> shape{1, 3, n, dim_head};
        const auto q = random<TypeParam, 4>(shape, 1);
        const auto k = random<TypeParam, 4>(shape, 2);
        const auto v = random<TypeParam, 4>(shape, 3);
        const auto grad_out = random<TypeParam, 4>(shape, 4);
        Tensor<TypeParam, 4> not_a_number(shape);
        not_a_number.setConstant(TypeParam(nan));
        const auto saved = attention.forward_saving(q, k, v);
        const auto gradients = attention.backward(saved, grad_out, q, k, v);

        for (int threads = 1; threads <= 3; ++threads) {
          SCOPED_TRACE("N " + std::to_string(n) + ", threads " + std::to_string(threads));
          const Threads on(threads);
          const long mark = AlignedMemory::instance().mark();
          typename LocalAttention<TypeParam>::Workspace workspace;
          typename LocalAttention<TypeParam>::Gradients kept;
          for (int call = 0; call < 3; ++call) {
            Tensor<TypeParam, 4> out = not_a_number;
            attention.forward_into(out, workspace, not_a_number, not_a_number, not_a_number,
                                   {.device = on.device});
            AlignedMemory::instance().poison_since(mark);
            attention.forward_into(out, workspace, q, k, v, {.device = on.device});
            EXPECT_EQ(bytes(out), bytes(saved.out));
            AlignedMemory::instance().poison_since(mark);
            for (auto* gradient : {&kept.q, &kept.k, &kept.v}) *gradient = not_a_number;
            attention.backward_into(kept, workspace, saved, grad_out, q, k, v,
                                    {.device = on.device});
            EXPECT_EQ(bytes(kept.q), bytes(gradients.q));
            EXPECT_EQ(bytes(kept.k), bytes(gradients.k));
            EXPECT_EQ(bytes(kept.v), bytes(gradients.v));
          }
        }
      }
    }
  }
}

TYPED_TEST(PoisonedMemory, OfAFeedForward) {
  using local_mha::FeedForward;
  using local_mha::FeedForwardParameters;
  using local_mha::RowMatrix;
  auto parameters = FeedForwardParameters<TypeParam>::zeros(12, 20);
  local_mha::RandomSequence numbers(3);
  for_each_parameter(parameters, [&](const std::string&, auto& t) {
    for (Index i = 0; i < t.size(); ++i) t.data()[i] = TypeParam(numbers.normal());
  });
  const FeedForward<TypeParam> layer(parameters);
  for (const Index n : lengths<TypeParam>()) {
    SCOPED_TRACE("N " + std::to_string(n));
    const RowMatrix<TypeParam> x = RowMatrix<TypeParam>::Random(n, 12);
    RowMatrix<TypeParam> y(n, 12);
    const long mark = AlignedMemory::instance().mark();
    typename FeedForward<TypeParam>::Workspace workspace(layer);
    layer.forward_into(n, x.data(), 12, y.data(), workspace);
    const std::string expected = bytes(y);
    EXPECT_GT(AlignedMemory::instance().poison_since(mark), 0U);
    y.setConstant(TypeParam(nan));
    layer.forward_into(n, x.data(), 12, y.data(), workspace);
    EXPECT_EQ(bytes(y), expected);
  }
}

/// A Linear, LayerNorm or FeedForward of 12 channels.
template <typename Module, typename Scalar, typename Config>
void poison_module(const Config& config) {
  const Module module(config, 3);
  Threads threads(3);
  typename Module::Workspace workspace;
  const long mark = AlignedMemory::instance().mark();
  for (const Index n : lengths<Scalar>()) {
    SCOPED_TRACE("N " + std::to_string(n));
    const auto x = random<Scalar, 3>({2, n, 12}, 5);
    Tensor<Scalar, 3> y(2, n, 12);
    module.forward_into(y, workspace, x, {.device = threads.device});
    const std::string expected = bytes(y);
    EXPECT_TRUE(all_finite<Scalar>(expected));
    EXPECT_GT(AlignedMemory::instance().poison_since(mark), 0U);
    y.setConstant(Scalar(nan));
    module.forward_into(y, workspace, x, {.device = threads.device});
    EXPECT_EQ(bytes(y), expected);
  }
}

TYPED_TEST(PoisonedMemory, OfModules) {
  poison_module<local_mha::Linear<TypeParam>, TypeParam>(
      local_mha::LinearConfig{.in_features = 12, .out_features = 12});
  poison_module<local_mha::LayerNorm<TypeParam>, TypeParam>(local_mha::LayerNormConfig{.dim = 12});
  poison_module<local_mha::FeedForward<TypeParam>, TypeParam>(
      local_mha::FeedForwardConfig{.dim = 12});
}

TYPED_TEST(PoisonedMemory, OfAnEncoder) {
  using local_mha::Encoder;
  for (const Index streams : {1, 3}) {
    local_mha::EncoderConfig config{.depth = 2, .layers = {layers()[0]}};
    config.num_residual_streams = streams;
    const Encoder<TypeParam> encoder(config, 7);
    for (const Index n : lengths<TypeParam>()) {
      const auto x = random<TypeParam, 3>({2, n, 24}, 1);
      const auto grad_y = random<TypeParam, 3>({2, n, 24}, 2);
      Tensor<TypeParam, 3> not_a_number(x.dimensions());
      not_a_number.setConstant(TypeParam(nan));
      typename Encoder<TypeParam>::Saved saved;
      const Tensor<TypeParam, 3> y = encoder.forward_saving(saved, x);
      auto gradients = local_mha::EncoderParameters<TypeParam>::zeros(config);
      const auto fresh = gradients;
      const Tensor<TypeParam, 3> grad_x = encoder.backward(gradients, saved, grad_y);
      EXPECT_TRUE(all_finite<TypeParam>(bytes_of_all(gradients)));
      for (int threads = 1; threads <= 3; ++threads) {
        SCOPED_TRACE("streams " + std::to_string(streams) + ", N " + std::to_string(n) +
                     ", threads " + std::to_string(threads));
        const Threads on(threads);
        const long mark = AlignedMemory::instance().mark();
        typename Encoder<TypeParam>::Workspace workspace;
        typename Encoder<TypeParam>::Saved kept;
        Tensor<TypeParam, 3> to = not_a_number;
        Tensor<TypeParam, 3> back(x.dimensions());
        encoder.forward_into(to, workspace, not_a_number, {.device = on.device});
        encoder.forward_saving_into(to, workspace, kept, not_a_number, {.device = on.device});
        auto ignored = fresh;
        encoder.backward_into(back, workspace, ignored, kept, not_a_number, on.device);
        EXPECT_GT(AlignedMemory::instance().poison_since(mark), 0U);
        encoder.forward_into(to, workspace, x, {.device = on.device});
        EXPECT_EQ(bytes(to), bytes(y));
        encoder.forward_saving_into(to, workspace, kept, x, {.device = on.device});
        EXPECT_EQ(bytes(to), bytes(y));
        auto summed = fresh;
        encoder.backward_into(back, workspace, summed, kept, grad_y, on.device);
        EXPECT_EQ(bytes(back), bytes(grad_x));
        EXPECT_EQ(bytes_of_all(summed), bytes_of_all(gradients));
      }
    }
  }
}

// A stream's memory holds its past, which a reset makes none of the results'.
TYPED_TEST(PoisonedMemory, OfStreams) {
  for (const LocalMHAConfig& config : layers()) {
    const LocalMHA<TypeParam> layer(config, 7);
    for (const Index n : lengths<TypeParam>())
      for (const Index chunk : {Index{1}, Index{3}, n})
        for (int threads = 1; threads <= 3; ++threads) {
          SCOPED_TRACE("N " + std::to_string(n) + ", chunks of " + std::to_string(chunk) +
                       ", threads " + std::to_string(threads));
          const Threads on(threads);
          const auto x = random<TypeParam, 3>({2, n, config.dim}, 1);
          Tensor<TypeParam, 3> not_a_number(x.dimensions());
          not_a_number.setConstant(TypeParam(nan));
          const auto results = [&](auto& stream, const Tensor<TypeParam, 3>& of) {
            std::string all;
            for (Index row = 0; row < n; row += chunk) {
              const Index rows = std::min(chunk, n - row);
              const Tensor<TypeParam, 3> part = of.slice(std::array<Index, 3>{0, row, 0},
                                                         std::array<Index, 3>{2, rows, config.dim});
              all += bytes(stream.push(part, {.device = on.device}));
            }
            return all + bytes(stream.flush(on.device));
          };
          const local_mha::StreamConfig sizes{
              .batch = 2, .max_rollback = 0, .max_threads = threads};
          typename LocalMHA<TypeParam>::Stream fresh(layer, sizes);
          const std::string expected = results(fresh, x);
          EXPECT_TRUE(all_finite<TypeParam>(expected));
          const long mark = AlignedMemory::instance().mark();
          typename LocalMHA<TypeParam>::Stream stream(layer, sizes);
          for (int call = 0; call < 2; ++call) {
            results(stream, not_a_number);
            stream.reset();
            if (!has_tables(config)) AlignedMemory::instance().poison_since(mark);
            EXPECT_EQ(results(stream, x), expected);
            stream.reset();
          }
        }
  }
}

#if defined(__linux__)
// Large memory between the steps of a backward pass: its pages come to the thread that writes them.
TEST(BlockArray, IsNotTouchedBeforeItIsWritten) {
  const auto resident = [] {
    std::ifstream file("/proc/self/statm");
    long all = 0;
    long now = 0;
    file >> all >> now;
    return now * 4096;
  };
  constexpr Index blocks = 1 << 14;
  constexpr Index channels = 256;
  const Index size = blocks * channels * 64;
  const long before = resident();
  local_mha::BlockArray<float> array(blocks, channels);
  local_mha::PanelArray<float> panels(blocks, channels);
  EXPECT_LT(resident() - before, size / 2);
  std::memset(array[0], 0, static_cast<std::size_t>(size));
  EXPECT_GT(resident() - before, size / 2);
}
#endif

}  // namespace poisoned_memory_test
