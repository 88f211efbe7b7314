// SPDX-License-Identifier: MIT
// Backward passes on the threads of a device: the same bits for any number of them.
#define EIGEN_USE_THREADS

#include "support/allocations.hpp"  // before Eigen

#include <gtest/gtest.h>

#include <array>
#include <string>
#include <type_traits>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace gradient_threads_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalMHA;
using local_mha::LocalMHAParameters;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::LocalTransformerParameters;
using local_mha::Tensor;
using local_mha::Training;
using support::same_bits;
using support::tensor;

struct Threads {
  explicit Threads(int count) : pool(count), device(&pool, count) {}
  Eigen::ThreadPool pool;
  Eigen::ThreadPoolDevice device;
};

constexpr std::array<int, 3> thread_counts{2, 3, 7};

template <typename Parameters>
void expect_same_bits(const Parameters& a, const Parameters& b, const std::string& what) {
  using Scalar = typename decltype(a.to_qkv)::Scalar;
  const auto of_b = support::named<Scalar>(b);
  for (const auto& [name, gradient] : support::named<Scalar>(a))
    EXPECT_EQ(gradient.data, of_b.at(name).data) << what << ", " << name;
}

template <typename Scalar>
class GradientsOnThreads : public testing::Test {};
TYPED_TEST_SUITE(GradientsOnThreads, support::Scalars, support::ScalarNames);

TYPED_TEST(GradientsOnThreads, OfTheAttention) {
  for (const int count : thread_counts) {
    const Threads threads(count);
    for (std::uint64_t seed = 1; seed <= 40; ++seed) {
      auto c = support::attention_case(
          seed, seed % 3 == 0 ? support::Length::Long : support::Length::Short);
      if (seed % 2 == 0) {
        c.config.dropout = 0.3;
        c.call.training = Training{.seed = seed};
      }
      const auto q = tensor<TypeParam, 4>(c.in.q);
      const auto k = tensor<TypeParam, 4>(c.in.k);
      const auto v = tensor<TypeParam, 4>(c.in.v);
      const auto bias = support::bias_tensor<TypeParam>(c.in.bias);
      const auto view = support::optional_view(bias);
      const auto mask = support::padding_mask(c.in.masked, c.batch(), c.seqlen());
      const LocalAttention<TypeParam> attention(c.config);
      const auto call = support::attention_call<TypeParam>(c.call, mask, view);
      const auto on_threads =
          support::attention_call<TypeParam>(c.call, mask, view, threads.device);
      const auto one = attention.forward_saving(q, k, v, call);
      const auto many = attention.forward_saving(q, k, v, on_threads);
      EXPECT_TRUE(same_bits(one.out, many.out));
      EXPECT_TRUE(same_bits(one.lse, many.lse));
      const auto a = attention.backward(one, v, q, k, v, call);
      const auto b = attention.backward(one, v, q, k, v, on_threads);
      EXPECT_TRUE(same_bits(a.q, b.q)) << seed;
      EXPECT_TRUE(same_bits(a.k, b.k)) << seed;
      EXPECT_TRUE(same_bits(a.v, b.v)) << seed;
      if (a.attn_bias) {
        EXPECT_TRUE(same_bits(*a.attn_bias, *b.attn_bias)) << seed;
      }
    }
  }
}

TYPED_TEST(GradientsOnThreads, OfTheLayer) {
  for (const int count : thread_counts) {
    const Threads threads(count);
    for (std::uint64_t seed = 1; seed <= 40; ++seed) {
      auto c =
          support::layer_case(seed, seed % 3 == 0 ? support::Length::Long : support::Length::Short);
      if (seed % 2 == 0) c.config.dropout = 0.2;
      const Training training{.seed = seed};
      const LocalMHA<TypeParam> mha(c.config,
                                    support::layer_parameters<TypeParam>(c.config, c.parameters));
      const auto x = tensor<TypeParam, 3>(c.in.x);
      const auto bias = support::bias_tensor<TypeParam>(c.in.bias);
      const auto view = support::optional_view(bias);
      const auto mask = support::padding_mask(c.in.masked, c.in.x.shape[0], c.in.x.shape[1]);
      const auto pass = [&](const auto& device, auto& gradients, auto& of_bias) {
        typename LocalMHA<TypeParam>::Saved saved;
        const auto y = mha.forward_saving(device, saved, x, mask, view, training);
        return mha.backward(device, gradients, saved, y, x, mask, view, training,
                            view ? &of_bias : nullptr);
      };
      auto a = LocalMHAParameters<TypeParam>::zeros(c.config);
      auto b = a;
      Tensor<TypeParam, 3> bias_a = bias.constant(TypeParam(0)), bias_b = bias_a;
      EXPECT_TRUE(
          same_bits(pass(Eigen::DefaultDevice(), a, bias_a), pass(threads.device, b, bias_b)))
          << seed;
      EXPECT_TRUE(same_bits(bias_a, bias_b)) << seed;
      expect_same_bits(a, b, "seed " + std::to_string(seed));
    }
  }
}

TYPED_TEST(GradientsOnThreads, OfALayerWithWideHeads) {
  // Not filled up in blocks of any width, and so wide that a head's weights are made in parts.
  const local_mha::LocalMHAConfig config{
      .dim = 35, .window_size = 9, .dim_head = 203, .heads = 2, .use_rotary_pos_emb = false};
  const LocalMHA<TypeParam> mha(config, 3);
  Random random(1);
  const auto x = tensor<TypeParam, 3>(random.array({2, 60, 35}));
  typename LocalMHA<TypeParam>::Saved saved;
  const auto y = mha.forward_saving(saved, x);
  auto one = LocalMHAParameters<TypeParam>::zeros(config);
  const auto of_x = mha.backward(one, saved, y, x);
  for (const int count : thread_counts) {
    const Threads threads(count);
    auto many = LocalMHAParameters<TypeParam>::zeros(config);
    EXPECT_TRUE(same_bits(of_x, mha.backward(threads.device, many, saved, y, x))) << count;
    expect_same_bits(one, many, std::to_string(count) + " threads");
  }
}

// Of so many rows that their gradients are summed in several stretches.
TYPED_TEST(GradientsOnThreads, OfTheBiasesOfALayer) {
  local_mha::LocalMHAConfig config{.dim = 9, .window_size = 7, .dim_head = 4, .heads = 2};
  config.qkv_bias = config.out_bias = true;
  const LocalMHA<TypeParam> mha(config, 3);
  Random random(1);
  const auto x = tensor<TypeParam, 3>(random.array({2, 1100, 9}));
  typename LocalMHA<TypeParam>::Saved saved;
  const auto y = mha.forward_saving(saved, x);
  auto one = LocalMHAParameters<TypeParam>::zeros(config);
  const auto of_x = mha.backward(one, saved, y, x);
  for (const int count : thread_counts) {
    const Threads threads(count);
    for (int time = 0; time < 3; ++time) {
      auto many = LocalMHAParameters<TypeParam>::zeros(config);
      EXPECT_TRUE(same_bits(of_x, mha.backward(threads.device, many, saved, y, x))) << count;
      expect_same_bits(one, many, std::to_string(count) + " threads");
    }
  }
}

// A weight that is computed in several parts, along both of its sides and over the positions.
TYPED_TEST(GradientsOnThreads, OfAWideLinear) {
  using Matrix = local_mha::RowMatrix<TypeParam>;
  constexpr Index rows = 530, in = 563, out = 410;
  Random random(1);
  const auto draw = [&](Index height, Index width) {
    Matrix m(height, width);
    for (Index i = 0; i < m.size(); ++i)
      m.data()[i] = static_cast<TypeParam>(random.uniform(-1, 1));
    return m;
  };
  const Matrix weight = draw(out, in), x = draw(rows, in), grad_y = draw(rows, out);
  const auto backward = [&]<typename Device>(const Device& device, Matrix& of_weight) {
    of_weight = Matrix::Constant(out, in, TypeParam(1));
    return local_mha::linear_backward<Device, TypeParam>(device, weight, x, grad_y, of_weight,
                                                         nullptr);
  };
  Matrix of_weight;
  const Matrix of_x = backward(Eigen::DefaultDevice(), of_weight);
  // NaN is not near anything, either.
  const auto is_near = [](const Matrix& got, const Eigen::MatrixXd& expected) {
    const double tolerance = std::is_same_v<TypeParam, float> ? 1e-4 : 1e-12;  // of sums of 530
    return ((got.template cast<double>() - expected).array().abs() <= tolerance).all();
  };
  const auto g = grad_y.template cast<double>();
  EXPECT_TRUE(is_near(of_x, g * weight.template cast<double>()));
  EXPECT_TRUE(is_near(of_weight, (g.transpose() * x.template cast<double>()).array() + 1));
  for (const int count : thread_counts) {
    const Threads threads(count);
    Matrix on_threads;
    EXPECT_EQ(backward(threads.device, on_threads), of_x) << count;
    EXPECT_EQ(on_threads, of_weight) << count;
  }
}

TYPED_TEST(GradientsOnThreads, OfTheTransformer) {
  LocalTransformerConfig config{.num_tokens = 30,
                                .max_seq_len = 400,
                                .dim = 24,
                                .depth = 2,
                                .local_attn_window_size = 16,
                                .dim_head = 8,
                                .heads = 3};
  config.attn_dropout = config.ff_dropout = 0.1;
  for (const bool dynamic : {false, true}) {
    config.use_dynamic_pos_bias = dynamic;
    const LocalTransformer<TypeParam> model(config, 4);
    Tensor<std::int64_t, 2> tokens(3, 391);
    Random random(1);
    for (Index i = 0; i < tokens.size(); ++i) tokens.data()[i] = random.integer(0, 29);
    auto one = LocalTransformerParameters<TypeParam>::zeros(config);
    const auto loss = model.backward(one, tokens, {.training = Training{.seed = 3}});
    EXPECT_EQ(loss, model.loss(tokens, {.training = Training{.seed = 3}}));
    for (const int count : thread_counts) {
      const Threads threads(count);
      auto many = LocalTransformerParameters<TypeParam>::zeros(config);
      EXPECT_EQ(loss, model.backward(many, tokens,
                                     {.training = Training{.seed = 3}, .device = threads.device}));
      const auto of_many = support::named<TypeParam>(many);
      for (const auto& [name, gradient] : support::named<TypeParam>(one))
        EXPECT_EQ(gradient.data, of_many.at(name).data) << count << " threads, " << name;
    }
  }
}

TYPED_TEST(GradientsOnThreads, OfAWorkspaceThatIsKept) {
  Random random(1);
  const LocalAttention<TypeParam> attention(
      {.window_size = 20, .causal = true, .dropout = 0.1, .shared_qk = true, .dim = 8});
  const local_mha::LocalAttentionCall<TypeParam> call{.training = Training{.seed = 1}};
  typename LocalAttention<TypeParam>::Workspace workspace;
  typename LocalAttention<TypeParam>::Gradients kept;
  for (const Index n : {70, 30, 70}) {
    const auto q = tensor<TypeParam, 4>(random.array({2, 2, n, 8}));
    const auto saved = attention.forward_saving(q, q, q, call);
    const auto expected = attention.backward(saved, q, q, q, q, call);
    const auto run = [&] { attention.backward_into(kept, workspace, saved, q, q, q, q, call); };
    run();
    if (COUNTS_ALLOCATIONS != 0) {
      EXPECT_EQ(support::allocations_of(run), 0);
    }
    EXPECT_TRUE(same_bits(kept.q, expected.q));
    EXPECT_TRUE(same_bits(kept.k, expected.k));
    EXPECT_TRUE(same_bits(kept.v, expected.v));
  }
  // A window of another size takes another room.
  const LocalAttention<TypeParam> wider({.window_size = 50, .causal = true, .dim = 8});
  const auto q = tensor<TypeParam, 4>(random.array({2, 2, 70, 8}));
  const auto saved = wider.forward_saving(q, q, q);
  wider.backward_into(kept, workspace, saved, q, q, q, q);
  EXPECT_TRUE(same_bits(kept.k, wider.backward(saved, q, q, q, q).k));
}

TEST(LayerThatSaves, AllocatesNothingWhenRepeated) {
  if (COUNTS_ALLOCATIONS == 0) GTEST_SKIP() << "counts allocations";
  const LocalMHA<float> mha({.dim = 32, .window_size = 16, .causal = true});
  Tensor<float, 3> x(2, 200, 32), y(2, 200, 32);
  x.setConstant(0.5F);
  LocalMHA<float>::Workspace workspace;
  LocalMHA<float>::Saved saved;
  const auto forward = [&] {
    mha.forward_saving_into(Eigen::DefaultDevice(), y, workspace, saved, x);
  };
  forward();
  EXPECT_EQ(support::allocations_of(forward), 0);
}

}  // namespace gradient_threads_test
