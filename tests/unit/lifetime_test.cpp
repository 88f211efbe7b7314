// SPDX-License-Identifier: MIT
// Streams own what they read: they go on whatever becomes of the layer that they were made with.
#include <gtest/gtest.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace lifetime_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::Tensor;
using local_mha::TensorView;
using support::same_bits;
using support::tensor;

// A mask that looks at flags does not look at those of a temporary tensor.
template <typename Flags>
concept CanBeLookedAt =
    requires(Flags&& flags) { local_mha::PaddingMask::masked_view(std::forward<Flags>(flags)); };
static_assert(CanBeLookedAt<Tensor<bool, 2>&> && CanBeLookedAt<TensorView<const bool, 2>> &&
              !CanBeLookedAt<Tensor<bool, 2>>);

LocalMHAConfig layer_config() {
  LocalMHAConfig config{.dim = 12, .window_size = 5, .dim_head = 6, .heads = 2, .causal = true};
  config.prenorm = config.qk_rmsnorm = config.gate_values_per_head = config.use_xpos = true;
  return config;
}

LocalTransformerConfig model_config() {
  LocalTransformerConfig config{.num_tokens = 9, .max_seq_len = 40, .dim = 12, .depth = 2};
  config.local_attn_window_size = 5;
  config.dim_head = 6;
  config.heads = 2;
  config.use_dynamic_pos_bias = true;
  return config;
}

/// What a stream is pushed.
template <typename Module>
struct Input;
template <>
struct Input<LocalMHA<float>> {
  static Tensor<float, 3> of(std::uint64_t seed) {
    Random random(seed);
    return tensor<float, 3>(random.array({1, 7, 12}));
  }
};
template <>
struct Input<LocalTransformer<float>> {
  static Tensor<std::int64_t, 2> of(std::uint64_t seed) {
    Random random(seed);
    Tensor<std::int64_t, 2> tokens(1, 7);
    for (Index i = 0; i < tokens.size(); ++i) tokens.data()[i] = random.integer(0, 8);
    return tokens;
  }
};

template <typename Module>
struct Config;
template <>
struct Config<LocalMHA<float>> {
  static LocalMHAConfig make() { return layer_config(); }
};
template <>
struct Config<LocalTransformer<float>> {
  static LocalTransformerConfig make() { return model_config(); }
};

template <typename Module>
class Lifetime : public testing::Test {
 protected:
  using Stream = typename Module::Stream;

  static Module module(std::uint64_t seed = 1) { return Module(Config<Module>::make(), seed); }

  /// What a stream of module() gives for three pushes, while it lives.
  static std::vector<Tensor<float, 3>> expected() {
    const Module living = module();
    Stream stream(living);
    std::vector<Tensor<float, 3>> results;
    for (const std::uint64_t seed : {1U, 2U, 3U}) results.push_back(stream.push(input(seed)));
    return results;
  }
  static auto input(std::uint64_t seed) { return Input<Module>::of(seed); }

  /// Runs `change` between the pushes of a stream, which must not notice.
  template <typename Change>
  static void expect_unmoved(Stream& stream, Change&& change) {
    const auto results = expected();
    for (const std::uint64_t seed : {1U, 2U, 3U}) {
      EXPECT_TRUE(same_bits(stream.push(input(seed)), results[seed - 1])) << "push " << seed;
      change();
    }
  }
};
using Modules = testing::Types<LocalMHA<float>, LocalTransformer<float>>;
struct ModuleNames {
  template <typename Module>
  static std::string GetName(int) {
    return std::is_same_v<Module, LocalMHA<float>> ? "LocalMHA" : "LocalTransformer";
  }
};
TYPED_TEST_SUITE(Lifetime, Modules, ModuleNames);

TYPED_TEST(Lifetime, AStreamOutlivesItsModule) {
  auto module = std::make_unique<TypeParam>(this->module());
  typename TypeParam::Stream stream(*module);
  this->expect_unmoved(stream, [&] { module.reset(); });
}

TYPED_TEST(Lifetime, AStreamMayBeMadeOfATemporary) {
  typename TypeParam::Stream stream(this->module());
  this->expect_unmoved(stream, [] {});
}

TYPED_TEST(Lifetime, StreamsGoOnWhereTheirModulesMove) {
  std::vector<TypeParam> modules;
  std::vector<typename TypeParam::Stream> streams;
  for (std::uint64_t i = 0; i < 5; ++i) {
    modules.push_back(this->module(i));
    streams.emplace_back(modules.back());
  }
  this->expect_unmoved(streams[1], [&] { modules.insert(modules.begin(), this->module(7)); });
}

TYPED_TEST(Lifetime, AStreamGoesOnWithTheWeightsThatItWasMadeWith) {
  TypeParam module = this->module();
  typename TypeParam::Stream stream(module);
  const auto others = this->module(2).parameters();
  this->expect_unmoved(stream, [&] { module.set_parameters(others); });
  typename TypeParam::Stream newer(module);
  EXPECT_FALSE(same_bits(newer.push(this->input(1)), this->expected()[0]));
}

TYPED_TEST(Lifetime, ACopyKeepsItsWeights) {
  TypeParam module = this->module();
  const TypeParam copy = module;
  module.set_parameters(this->module(2).parameters());
  EXPECT_TRUE(same_bits(copy.forward(this->input(1)), this->module().forward(this->input(1))));
  EXPECT_TRUE(same_bits(module.forward(this->input(1)), this->module(2).forward(this->input(1))));
  module = copy;
  EXPECT_TRUE(same_bits(module.forward(this->input(1)), copy.forward(this->input(1))));
}

TYPED_TEST(Lifetime, AModuleThatWasMovedFromIsStillOne) {
  TypeParam module = this->module();
  const TypeParam moved = std::move(module);
  EXPECT_TRUE(same_bits(module.forward(this->input(1)), moved.forward(this->input(1))));
  EXPECT_EQ(module.config().heads, 2);
}

TEST(LifetimeOfTheAttention, OneThatWasMovedFromIsStillOne) {
  LocalAttentionConfig config{.window_size = 5, .causal = true, .dim = 6};
  config.score.alibi_slopes = {0.5, 0.25};
  Random random(1);
  const auto q = tensor<float, 4>(random.array({1, 2, 9, 6}));
  const auto expected = LocalAttention<float>(config).forward(q, q, q);
  LocalAttention<float> attention(config);
  LocalAttention<float> moved = std::move(attention);
  const LocalAttention<float> copy = attention;
  LocalAttention<float>& itself = moved;
  moved = std::move(itself);
  for (const auto* each :
       std::initializer_list<const LocalAttention<float>*>{&attention, &moved, &copy}) {
    EXPECT_TRUE(same_bits(each->forward(q, q, q), expected));
    LocalAttention<float>::Stream stream(*each, 2, 6);
    EXPECT_TRUE(
        support::close(support::array(stream.push(q, q, q)), support::array(expected), 1e-5));
  }
}

TEST(LifetimeOfTheLayerNorm, OneThatWasMovedFromHasNoChannels) {
  local_mha::LayerNorm<float> norm({.dim = 3});
  const local_mha::LayerNorm<float> moved = std::move(norm);
  EXPECT_EQ(moved.forward(local_mha::RowMatrix<float>::Ones(2, 3)).rows(), 2);
  EXPECT_EQ(norm.forward(local_mha::RowMatrix<float>(2, norm.dim())).rows(), 2);
}

TEST(LifetimeOfTheAttention, AStreamOutlivesItAndItsBias) {
  LocalAttentionConfig config{.window_size = 5, .causal = true, .dim = 6};
  config.use_xpos = true;
  const LocalAttention<float> living(config);
  Random random(1);
  const auto q = tensor<float, 4>(random.array({1, 2, 9, 6}));
  const auto bias = tensor<float, 3>(random.array({2, 5, 10}));
  const auto expected = living.forward(q, q, q, {.attn_bias = TensorView<const float, 3>(bias)});
  auto attention = std::make_unique<LocalAttention<float>>(config);
  auto of_stream = std::make_unique<Tensor<float, 3>>(bias);
  LocalAttention<float>::Stream stream(*attention, 2, 6, {},
                                       {.attn_bias = TensorView<const float, 3>(*of_stream)});
  of_stream->setConstant(1e9F);
  of_stream.reset();
  attention.reset();
  std::vector<LocalAttention<float>::Stream> streams;
  streams.push_back(std::move(stream));
  streams.push_back(streams.front());
  for (auto& each : streams) {
    const auto got = each.push(q, q, q);
    EXPECT_TRUE(support::close(support::array(got), support::array(expected), 1e-5));
  }
  LocalAttention<float>::Stream of_temporary(LocalAttention<float>(config), 2, 6);
  EXPECT_TRUE(support::close(support::array(of_temporary.push(q, q, q)),
                             support::array(living.forward(q, q, q)), 1e-5));
}

TEST(LifetimeOfTheLayer, AWorkspaceServesOneAfterAnother) {
  LocalMHA<float>::Workspace workspace;
  const auto x = Input<LocalMHA<float>>::of(1);
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    Tensor<float, 3> y(1, 7, 12);
    std::make_unique<LocalMHA<float>>(layer_config(), seed)->forward_into(y, workspace, x);
    EXPECT_TRUE(same_bits(y, LocalMHA<float>(layer_config(), seed).forward(x)));
  }
}

TEST(LifetimeOfTheLayer, AStreamKeepsItsBias) {
  const LocalMHA<float> mha(layer_config(), 1);
  Random random(1);
  const auto x = tensor<float, 3>(random.array({2, 9, 12}));
  auto bias = std::make_unique<Tensor<float, 3>>(tensor<float, 3>(random.array({2, 5, 10})));
  const auto expected = mha.forward(x, {}, TensorView<const float, 3>(*bias));
  LocalMHA<float>::Stream stream(mha, {.batch = 2}, TensorView<const float, 3>(*bias));
  bias->setConstant(1e9F);
  bias.reset();
  EXPECT_TRUE(support::close(support::array(stream.push(x)), support::array(expected), 1e-5));
}

}  // namespace lifetime_test
