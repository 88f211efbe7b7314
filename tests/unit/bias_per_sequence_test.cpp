// SPDX-License-Identifier: MIT
// An attention bias [B·H, w, look-around]: each sequence has its own, forward, backward and in
// streams, as if it were alone with it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace bias_per_sequence_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::Tensor;
using local_mha::TensorView;
using support::same_bits;
using support::tensor;

constexpr Index batch = 3, heads = 2, w = 4, seqlen = 21;

/// Sequence `b` of a batch.
template <typename Scalar, int Rank>
Tensor<Scalar, Rank> of_sequence(const Tensor<Scalar, Rank>& all, Index b, Index sequences) {
  auto shape = all.dimensions();
  shape[0] = all.dimension(0) / sequences;
  Tensor<Scalar, Rank> one(shape);
  std::copy_n(all.data() + b * one.size(), one.size(), one.data());
  return one;
}
template <typename Scalar, int Rank>
TensorView<const Scalar, Rank> view(const Tensor<Scalar, Rank>& t) {
  return t;
}

template <typename Scalar>
class BiasPerSequence : public testing::Test {
 protected:
  template <int Rank>
  static Tensor<Scalar, Rank> random(std::uint64_t seed, const std::vector<Index>& shape) {
    return tensor<Scalar, Rank>(Random(seed).array({shape.begin(), shape.end()}));
  }
};
TYPED_TEST_SUITE(BiasPerSequence, support::Scalars, support::ScalarNames);

TYPED_TEST(BiasPerSequence, OfTheAttention) {
  const LocalAttention<TypeParam> attention({.window_size = w, .causal = true, .dim = 6});
  const auto q = this->template random<4>(1, {batch, heads, seqlen, 6});
  const auto k = this->template random<4>(2, {batch, heads, seqlen, 6});
  const auto v = this->template random<4>(3, {batch, heads, seqlen, 6});
  const auto grad = this->template random<4>(4, {batch, heads, seqlen, 6});
  const auto bias = this->template random<3>(5, {batch * heads, w, 2 * w});
  const auto saved = attention.forward_saving(q, k, v, {.attn_bias = view(bias)});
  EXPECT_TRUE(same_bits(saved.out, attention.forward(q, k, v, {.attn_bias = view(bias)})));
  const auto g = attention.backward(saved, grad, q, k, v, {.attn_bias = view(bias)});
  ASSERT_TRUE(g.attn_bias);
  for (Index b = 0; b < batch; ++b) {
    const auto one = [&](const auto& all) { return of_sequence(all, b, batch); };
    const auto own = one(bias);
    const auto alone = attention.forward_saving(one(q), one(k), one(v), {.attn_bias = view(own)});
    EXPECT_TRUE(same_bits(one(saved.out), alone.out)) << b;
    const auto of_own =
        attention.backward(alone, one(grad), one(q), one(k), one(v), {.attn_bias = view(own)});
    EXPECT_TRUE(same_bits(one(g.q), of_own.q)) << b;
    EXPECT_TRUE(same_bits(one(*g.attn_bias), *of_own.attn_bias)) << b;
  }
  typename LocalAttention<TypeParam>::Stream stream(attention, heads, 6, {.batch = batch},
                                                    {.attn_bias = view(bias)});
  EXPECT_TRUE(
      support::close(support::array(stream.push(q, k, v)), support::array(saved.out), 1e-5));
}

TYPED_TEST(BiasPerSequence, OfTheLayer) {
  LocalMHAConfig config{.dim = 10, .window_size = w, .dim_head = 6, .heads = heads};
  config.gate_values_per_head = config.qk_rmsnorm = true;
  const LocalMHA<TypeParam> layer(config, 1);
  const auto x = this->template random<3>(1, {batch, seqlen, 10});
  const auto grad_y = this->template random<3>(2, {batch, seqlen, 10});
  const auto bias = this->template random<3>(5, {batch * heads, w, 3 * w});
  typename LocalMHA<TypeParam>::Saved saved;
  const auto y = layer.forward_saving(saved, x, {}, view(bias));
  auto weights = LocalMHA<TypeParam>::Parameters::zeros(config);
  Tensor<TypeParam, 3> grad_bias(bias.dimensions());
  grad_bias.setZero();
  const auto grad_x = layer.backward(weights, saved, grad_y, x, {}, view(bias), {}, &grad_bias);
  for (Index b = 0; b < batch; ++b) {
    const auto one = [&](const auto& all) { return of_sequence(all, b, batch); };
    const auto own = one(bias);
    const auto its_x = one(x);
    EXPECT_TRUE(same_bits(one(y), layer.forward_saving(saved, its_x, {}, view(own)))) << b;
    Tensor<TypeParam, 3> of_own(own.dimensions());
    of_own.setZero();
    const auto its_grad =
        layer.backward(weights, saved, one(grad_y), its_x, {}, view(own), {}, &of_own);
    EXPECT_TRUE(same_bits(one(grad_x), its_grad)) << b;
    EXPECT_TRUE(same_bits(one(grad_bias), of_own)) << b;
  }
  typename LocalMHA<TypeParam>::Stream stream(layer, {.batch = batch}, view(bias));
  Tensor<TypeParam, 3> streamed(y.dimensions());
  const auto first = stream.push(x);
  const auto rest = stream.flush();
  for (Index b = 0; b < batch; ++b)
    for (Index i = 0; i < seqlen; ++i)
      for (Index c = 0; c < 10; ++c)
        streamed(b, i, c) =
            i < first.dimension(1) ? first(b, i, c) : rest(b, i - first.dimension(1), c);
  EXPECT_TRUE(support::close(support::array(streamed), support::array(y), 1e-5));
}

// A bias of all heads, or of each head, is that of a sequence again and again.
TYPED_TEST(BiasPerSequence, RepeatedIsOneForAll) {
  const LocalAttention<TypeParam> attention({.window_size = w, .causal = true, .dim = 6});
  const auto q = this->template random<4>(1, {batch, heads, seqlen, 6});
  for (const Index biases : {Index{1}, heads}) {
    const auto bias = this->template random<3>(5, {biases, w, 2 * w});
    Tensor<TypeParam, 3> repeated(batch * heads, w, 2 * w);
    for (Index i = 0; i < repeated.size(); ++i) repeated.data()[i] = bias.data()[i % bias.size()];
    EXPECT_TRUE(same_bits(attention.forward(q, q, q, {}, view(bias)),
                          attention.forward(q, q, q, {}, view(repeated))));
    const auto g = [&](const auto& of) {
      const auto saved = attention.forward_saving(q, q, q, {}, view(of));
      return *attention.backward(saved, q, q, q, q, {}, view(of)).attn_bias;
    };
    const auto of_each = g(repeated);
    Tensor<TypeParam, 3> sum(bias.dimensions());
    sum.setZero();
    for (Index i = 0; i < of_each.size(); ++i) sum.data()[i % sum.size()] += of_each.data()[i];
    EXPECT_TRUE(support::close(support::array(g(bias)), support::array(sum), 1e-5));
  }
}

// As in Python, which repeats a bias over all heads of the batch.
TYPED_TEST(BiasPerSequence, OfAnyDivisorIsRepeated) {
  const LocalAttention<TypeParam> attention({.window_size = w, .causal = true, .dim = 6});
  const auto q = this->template random<4>(1, {batch, heads, seqlen, 6});
  for (Index biases = 1; biases <= batch * heads; ++biases) {
    if (batch * heads % biases != 0) continue;
    const auto bias = this->template random<3>(5, {biases, w, 2 * w});
    Tensor<TypeParam, 3> repeated(batch * heads, w, 2 * w);
    for (Index i = 0; i < repeated.size(); ++i) repeated.data()[i] = bias.data()[i % bias.size()];
    EXPECT_TRUE(same_bits(attention.forward(q, q, q, {.attn_bias = bias}),
                          attention.forward(q, q, q, {.attn_bias = repeated})));
    const auto of_each = *attention
                              .backward(attention.forward_saving(q, q, q, {.attn_bias = repeated}),
                                        q, q, q, q, {.attn_bias = repeated})
                              .attn_bias;
    Tensor<TypeParam, 3> sum(bias.dimensions());
    sum.setZero();
    for (Index i = 0; i < of_each.size(); ++i) sum.data()[i % sum.size()] += of_each.data()[i];
    const auto saved = attention.forward_saving(q, q, q, {.attn_bias = bias});
    for (const int threads : {1, 3}) {
      Eigen::ThreadPool pool(threads);
      const Eigen::ThreadPoolDevice device(&pool, threads);
      const auto got = attention.backward(saved, q, q, q, q, {.attn_bias = bias, .device = device});
      EXPECT_TRUE(support::close(support::array(*got.attn_bias), support::array(sum), 1e-5));
    }
  }
}

TYPED_TEST(BiasPerSequence, OfAnotherNumberIsRefused) {
  const LocalAttention<TypeParam> attention({.window_size = w, .causal = true, .dim = 6});
  const auto q = this->template random<4>(1, {batch, heads, seqlen, 6});
  for (const Index biases : {0, 4, 5, 12}) {
    const auto bias = this->template random<3>(5, {biases, w, 2 * w});
    EXPECT_THROW(attention.forward(q, q, q, {}, view(bias)), std::invalid_argument) << biases;
  }
}

}  // namespace bias_per_sequence_test
