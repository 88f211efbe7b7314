// SPDX-License-Identifier: MIT
// No pass touches memory before or behind what it is given, nor writes to its inputs: a test that
// does ends with a signal.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "support/guarded.hpp"
#include "support/library.hpp"
#include "support/random_case.hpp"

namespace guarded_memory_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalMHA;
using local_mha::Tensor;
using local_mha::TensorView;
using support::tensor;

/// A tensor next to forbidden pages.
template <typename Scalar, int Rank>
class GuardedTensor {
  using Memory = support::Guarded<Scalar>;

 public:
  /// A copy that can only be read.
  GuardedTensor(const Tensor<Scalar, Rank>& from, typename Memory::At at)
      : memory_(from.data(), static_cast<std::size_t>(from.size()), at),
        shape_(from.dimensions()) {}
  GuardedTensor(const Eigen::DSizes<Index, Rank>& shape, typename Memory::At at)
      : memory_(static_cast<std::size_t>(shape.TotalSize()), at), shape_(shape) {}

  TensorView<const Scalar, Rank> view() { return {memory_.data(), shape_}; }
  TensorView<Scalar, Rank> output() { return {memory_.data(), shape_}; }
  Tensor<Scalar, Rank> values() {
    Tensor<Scalar, Rank> copy(shape_);
    std::copy_n(memory_.data(), copy.size(), copy.data());
    return copy;
  }

 private:
  Memory memory_;
  Eigen::DSizes<Index, Rank> shape_;
};

template <typename Scalar>
class GuardedMemory : public testing::Test {};
TYPED_TEST_SUITE(GuardedMemory, support::Scalars, support::ScalarNames);

/// Lengths around the ends of blocks and of windows, and channels that fill no register.
template <typename Visit>
void for_each_size(Visit&& visit) {
  for (const Index n : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 50})
    for (const Index d : {1, 3, 8, 16, 18}) visit(n, d);
}

TYPED_TEST(GuardedMemory, IsEnoughForTheAttention) {
  using Scalar = TypeParam;
  using At = typename support::Guarded<Scalar>::At;
  for (const At at : {At::Begin, At::End})
    for_each_size([&](Index n, Index d) {
      Random random(static_cast<std::uint64_t>(100 * n + d));
      for (const Index w : {1, 5, 16, 40}) {
        local_mha::LocalAttentionConfig config{.window_size = w, .causal = d % 2 == 0};
        config.look_backward = 2;
        config.exact_windowsize = n % 2 == 0;
        if (d % 2 == 0) config.dim = d;
        const LocalAttention<Scalar> attention(config);
        const auto q = tensor<Scalar, 4>(random.array({1, 2, n, d}));
        const auto k = tensor<Scalar, 4>(random.array({1, 2, n, d}));
        const auto v = tensor<Scalar, 4>(random.array({1, 2, n, d}));
        GuardedTensor<Scalar, 4> at_q(q, at), at_k(k, at), at_v(v, at), out(q.dimensions(), at);
        typename LocalAttention<Scalar>::Workspace workspace;
        attention.forward_into(out.output(), workspace, at_q.view(), at_k.view(), at_v.view());
        EXPECT_TRUE(support::same_bits(out.values(), attention.forward(q, k, v)));

        const auto saved = attention.forward_saving(at_q.view(), at_k.view(), at_v.view());
        const auto guarded =
            attention.backward(saved, at_v.view(), at_q.view(), at_k.view(), at_v.view());
        const auto plain = attention.backward(saved, v, q, k, v);
        EXPECT_TRUE(support::same_bits(guarded.q, plain.q));
        EXPECT_TRUE(support::same_bits(guarded.k, plain.k));
        EXPECT_TRUE(support::same_bits(guarded.v, plain.v));
      }
    });
}

TYPED_TEST(GuardedMemory, IsEnoughForABiasAndAMask) {
  using Scalar = TypeParam;
  using At = typename support::Guarded<Scalar>::At;
  using AtFlags = typename support::Guarded<bool>::At;
  for (const bool end : {false, true})
    for (const Index n : {1, 15, 16, 17, 33})
      for (const Index w : {1, 5, 16, 17}) {
        const At at = end ? At::End : At::Begin;
        Random random(static_cast<std::uint64_t>(100 * n + w));
        const LocalAttention<Scalar> attention({.window_size = w});
        const auto q = tensor<Scalar, 4>(random.array({2, 2, n, 5}));
        const auto bias = tensor<Scalar, 3>(random.array({2, w, 3 * w}));
        Tensor<bool, 2> flags(2, n);
        for (Index i = 0; i < flags.size(); ++i) flags.data()[i] = random.chance(0.3);
        GuardedTensor<Scalar, 4> at_q(q, at);
        GuardedTensor<Scalar, 3> at_bias(bias, at);
        GuardedTensor<bool, 2> at_flags(flags, end ? AtFlags::End : AtFlags::Begin);
        const auto mask = local_mha::PaddingMask::masked_view(at_flags.view());
        EXPECT_TRUE(support::same_bits(
            attention.forward(at_q.view(), at_q.view(), at_q.view(), mask, at_bias.view()),
            attention.forward(q, q, q, mask, support::optional_view(bias))));
      }
}

// Whole tiles of it are looked at where nothing is masked, up to its end.
TYPED_TEST(GuardedMemory, IsEnoughForAMaskOfFewRows) {
  using Scalar = TypeParam;
  for (const bool end : {false, true})
    for (const Index n : {64, 120, 127}) {
      Random random(static_cast<std::uint64_t>(n));
      const LocalAttention<Scalar> attention({.window_size = 40});
      const auto q = tensor<Scalar, 4>(random.array({1, 1, n, 8}));
      Tensor<bool, 2> flags(1, n);
      flags.setConstant(false);
      flags(0, end ? 3 : n - 4) = true;
      using At = typename support::Guarded<bool>::At;
      GuardedTensor<bool, 2> at_flags(flags, end ? At::End : At::Begin);
      const auto mask = local_mha::PaddingMask::masked_view(at_flags.view());
      EXPECT_TRUE(support::same_bits(
          attention.forward(q, q, q, {.mask = mask}),
          attention.forward(q, q, q, {.mask = local_mha::PaddingMask::masked(flags)})));
    }
}

TYPED_TEST(GuardedMemory, IsEnoughForTheLayerAndItsStream) {
  using Scalar = TypeParam;
  using At = typename support::Guarded<Scalar>::At;
  for (const At at : {At::Begin, At::End})
    for_each_size([&](Index n, Index dim) {
      Random random(static_cast<std::uint64_t>(100 * n + dim));
      local_mha::LocalMHAConfig config{.dim = dim, .window_size = 6, .dim_head = 4, .heads = 3};
      config.causal = true;
      config.gate_values_per_head = n % 2 == 0;
      config.prenorm = dim > 2;
      if (n % 3 == 0) {
        config.heads = 4;
        config.kv_heads = 2;
        config.window_size = 0;
        config.token_window = {.left = 7, .right = 0};
        config.sinks = config.relative_bias = true;
        config.first_keys = 2;
      }
      const LocalMHA<Scalar> mha(config, 1);
      const auto x = tensor<Scalar, 3>(random.array({1, n, dim}));
      GuardedTensor<Scalar, 3> at_x(x, at), y(x.dimensions(), at), grad_x(x.dimensions(), at);
      typename LocalMHA<Scalar>::Workspace workspace;
      mha.forward_into(y.output(), workspace, at_x.view());
      EXPECT_TRUE(support::same_bits(y.values(), mha.forward(x)));

      typename LocalMHA<Scalar>::Saved saved;
      mha.forward_saving(saved, at_x.view());
      auto gradients = local_mha::LocalMHAParameters<Scalar>::zeros(config);
      mha.backward_into(Eigen::DefaultDevice(), grad_x.output(), workspace, gradients, saved,
                        at_x.view(), at_x.view());
      auto plain = local_mha::LocalMHAParameters<Scalar>::zeros(config);
      EXPECT_TRUE(support::same_bits(grad_x.values(), mha.backward(plain, saved, x, x)));

      typename LocalMHA<Scalar>::Stream guarded(mha), stream(mha);
      guarded.push_into(y.output(), at_x.view());
      EXPECT_TRUE(support::same_bits(y.values(), stream.push(x)));
    });
}

}  // namespace guarded_memory_test
