// SPDX-License-Identifier: MIT
// Batches of sequences of different lengths: each is what it is alone, and what lies behind it is
// not read.
#define EIGEN_USE_THREADS
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "support/allocations.hpp"
#include "support/library.hpp"
#include "support/random_case.hpp"
#include "support/random_encoder.hpp"

namespace ragged_test {

using local_mha::Encoder;
using local_mha::EncoderCall;
using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalMHAParameters;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::Training;
using support::array;
using support::same_bits;

template <typename Scalar>
class Ragged : public testing::Test {
 protected:
  // Sums over rows are in another order.
  static constexpr double tolerance = 2e3 * std::numeric_limits<Scalar>::epsilon();

  static testing::AssertionResult close(const reference::Array<Scalar>& got,
                                        const reference::Array<Scalar>& expected) {
    return support::close(got, expected,
                          tolerance * (1 + static_cast<double>(support::largest(expected))));
  }
};
TYPED_TEST_SUITE(Ragged, support::Scalars, support::ScalarNames);

// Rows `[0, n)` of item `b`, as a batch of their own.
template <typename Scalar>
Tensor<Scalar, 3> item(const Tensor<Scalar, 3>& from, Index b, Index n) {
  return from.slice(Eigen::array<Index, 3>{b, 0, 0},
                    Eigen::array<Index, 3>{1, n, from.dimension(2)});
}
template <typename Scalar>
void spoil_behind(Tensor<Scalar, 3>& x, const std::vector<Index>& lengths) {
  for (Index b = 0; b < x.dimension(0); ++b)
    for (Index i = lengths[static_cast<std::size_t>(b)]; i < x.dimension(1); ++i)
      for (Index c = 0; c < x.dimension(2); ++c)
        x(b, i, c) = std::numeric_limits<Scalar>::quiet_NaN();
}
template <typename Scalar>
testing::AssertionResult is_zero_behind(const Tensor<Scalar, 3>& y,
                                        const std::vector<Index>& lengths) {
  for (Index b = 0; b < y.dimension(0); ++b)
    for (Index i = lengths[static_cast<std::size_t>(b)]; i < y.dimension(1); ++i)
      for (Index c = 0; c < y.dimension(2); ++c)
        if (!(y(b, i, c) == 0))
          return testing::AssertionFailure() << y(b, i, c) << " at " << b << ", " << i;
  return testing::AssertionSuccess();
}
std::vector<Index> pick_lengths(Random& random, Index batch, Index n) {
  std::vector<Index> lengths;
  for (Index b = 0; b < batch; ++b)
    lengths.push_back(random.pick<Index>({0, 1, n, random.integer(0, n), random.integer(0, n)}));
  for (Index& length : lengths) length = std::min(length, n);
  return lengths;
}
PaddingMask mask_of(const std::vector<unsigned char>& flags, Index b, Index n, Index length) {
  if (flags.empty()) return {};
  const auto begin = flags.begin() + b * n;
  return support::padding_mask({begin, begin + length}, 1, length);
}

TYPED_TEST(Ragged, SequencesOfALayerAreWhatTheyAreAlone) {
  using Scalar = TypeParam;
  using Layer = LocalMHA<Scalar>;
  for (std::uint64_t seed = 1; seed <= 120; ++seed) {
    SCOPED_TRACE(seed);
    auto c = support::layer_case(seed);
    Random random(seed);
    const Index n = c.in.x.shape[1], dim = c.config.dim, batch = random.integer(1, 4);
    c.in.x = random.array({batch, n, dim});
    c.in.masked = support::pick_mask(random, batch, n);
    const Layer layer(c.config, support::layer_parameters<Scalar>(c.config, c.parameters));
    auto x = support::tensor<Scalar, 3>(c.in.x);
    auto grad_y = support::tensor<Scalar, 3>(random.array({batch, n, dim}));
    const std::vector<Index> lengths = pick_lengths(random, batch, n);
    spoil_behind(x, lengths);
    spoil_behind(grad_y, lengths);
    const auto bias = support::bias_tensor<Scalar>(c.in.bias);
    const auto view = support::optional_view(bias);
    const typename Layer::Call call{.mask = support::padding_mask(c.in.masked, batch, n),
                                    .attn_bias = view,
                                    .lengths = lengths};
    typename Layer::Saved saved;
    const auto y = layer.forward_saving(saved, x, call);
    EXPECT_TRUE(same_bits(layer.forward(x, call), y));
    EXPECT_TRUE(is_zero_behind(y, lengths));
    auto gradients = LocalMHAParameters<Scalar>::zeros(c.config);
    // In the second call, all that is kept may be left out.
    const auto grad_x = layer.backward(gradients, saved, grad_y, x, {.attn_bias = view});
    EXPECT_TRUE(is_zero_behind(grad_x, lengths));

    auto summed = LocalMHAParameters<Scalar>::zeros(c.config);
    for (Index b = 0; b < batch; ++b) {
      const Index length = lengths[static_cast<std::size_t>(b)];
      const auto alone = item(x, b, length);
      const typename Layer::Call of_alone{.mask = mask_of(c.in.masked, b, n, length),
                                          .attn_bias = view};
      typename Layer::Saved kept;
      EXPECT_TRUE(this->close(array(item(y, b, length)),
                              array(layer.forward_saving(kept, alone, of_alone))));
      EXPECT_TRUE(this->close(
          array(item(grad_x, b, length)),
          array(layer.backward(summed, kept, item(grad_y, b, length), alone, of_alone))));
    }
    const auto expected = support::named<Scalar>(summed);
    for (const auto& [name, gradient] : support::named<Scalar>(gradients))
      EXPECT_TRUE(this->close(gradient, expected.at(name))) << name;
  }
}

TYPED_TEST(Ragged, SequencesOfAnEncoderAreWhatTheyAreAlone) {
  using Scalar = TypeParam;
  for (std::uint64_t seed = 1; seed <= 30; ++seed) {
    SCOPED_TRACE(seed);
    const support::RandomEncoder c(seed);
    const auto encoder = c.encoder<Scalar>();
    Random random(seed);
    auto x = c.input<Scalar>();
    const Index batch = x.dimension(0), n = x.dimension(1);
    const std::vector<Index> lengths = pick_lengths(random, batch, n);
    auto grad_y = support::tensor<Scalar, 3>(c.grad_y);
    spoil_behind(x, lengths);
    spoil_behind(grad_y, lengths);
    typename Encoder<Scalar>::Saved saved;
    const auto y = encoder.forward_saving(saved, x, {.mask = c.mask(), .lengths = lengths});
    EXPECT_TRUE(same_bits(encoder.forward(x, {.mask = c.mask(), .lengths = lengths}), y));
    EXPECT_TRUE(is_zero_behind(y, lengths));
    auto gradients = Encoder<Scalar>::Parameters::zeros(c.config);
    const auto grad_x = encoder.backward(gradients, saved, grad_y);
    EXPECT_TRUE(is_zero_behind(grad_x, lengths));
    for (Index b = 0; b < batch; ++b) {
      const Index length = lengths[static_cast<std::size_t>(b)];
      typename Encoder<Scalar>::Saved kept;
      EXPECT_TRUE(
          this->close(array(item(y, b, length)),
                      array(encoder.forward_saving(kept, item(x, b, length),
                                                   {.mask = mask_of(c.masked, b, n, length)}))));
      auto alone = Encoder<Scalar>::Parameters::zeros(c.config);
      EXPECT_TRUE(this->close(array(item(grad_x, b, length)),
                              array(encoder.backward(alone, kept, item(grad_y, b, length)))));
    }
  }
}

// [B, H, N, D] with the heads of a sequence below one another.
template <typename Scalar>
Tensor<Scalar, 4> sequence(const Tensor<Scalar, 4>& from, Index b, Index n) {
  return from.slice(Eigen::array<Index, 4>{b, 0, 0, 0},
                    Eigen::array<Index, 4>{1, from.dimension(1), n, from.dimension(3)});
}

TYPED_TEST(Ragged, SequencesOfAnAttentionAreWhatTheyAreAlone) {
  using Scalar = TypeParam;
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    SCOPED_TRACE(seed);
    const auto c = support::attention_case(seed);
    Random random(seed);
    const Index batch = c.batch(), n = c.seqlen();
    const LocalAttention<Scalar> attention(c.config);
    std::array<Tensor<Scalar, 4>, 4> inputs{
        support::tensor<Scalar, 4>(c.in.q), support::tensor<Scalar, 4>(c.in.k),
        support::tensor<Scalar, 4>(c.in.v), support::tensor<Scalar, 4>(random.array(c.in.q.shape))};
    const std::vector<Index> lengths = pick_lengths(random, batch, n);
    for (auto& tensor : inputs)
      for (Index b = 0; b < batch; ++b)
        for (Index h = 0; h < tensor.dimension(1); ++h)
          for (Index i = lengths[static_cast<std::size_t>(b)]; i < n; ++i)
            for (Index d = 0; d < tensor.dimension(3); ++d)
              tensor(b, h, i, d) = std::numeric_limits<Scalar>::quiet_NaN();
    const auto& [q, k, v, grad] = inputs;
    const auto mask = support::padding_mask(c.in.masked, batch, n);
    const auto saved = attention.forward_saving(q, k, v, {.mask = mask, .lengths = lengths});
    EXPECT_TRUE(
        same_bits(attention.forward(q, k, v, {.mask = mask, .lengths = lengths}), saved.out));
    const auto gradients = attention.backward(saved, grad, q, k, v);
    for (Index b = 0; b < batch; ++b) {
      const Index length = lengths[static_cast<std::size_t>(b)];
      const auto alone = attention.forward_saving(sequence(q, b, length), sequence(k, b, length),
                                                  sequence(v, b, length),
                                                  {.mask = mask_of(c.in.masked, b, n, length)});
      const auto of_alone =
          attention.backward(alone, sequence(grad, b, length), sequence(q, b, length),
                             sequence(k, b, length), sequence(v, b, length));
      EXPECT_TRUE(this->close(array(sequence(saved.out, b, length)), array(alone.out)));
      EXPECT_TRUE(this->close(array(sequence(gradients.q, b, length)), array(of_alone.q)));
      EXPECT_TRUE(this->close(array(sequence(gradients.k, b, length)), array(of_alone.k)));
      EXPECT_TRUE(this->close(array(sequence(gradients.v, b, length)), array(of_alone.v)));
      for (const auto* result : {&saved.out, &gradients.q, &gradients.k, &gradients.v})
        for (Index h = 0; h < result->dimension(1); ++h)
          for (Index i = length; i < n; ++i)
            for (Index d = 0; d < result->dimension(3); ++d)
              EXPECT_EQ((*result)(b, h, i, d), Scalar(0));
      // A row behind it is one of a query that sees nothing.
      for (Index h = 0; h < saved.lse.dimension(1); ++h)
        for (Index i = 0; i < n; ++i) {
          EXPECT_EQ(saved.lse(b, h, i),
                    i < length ? alone.lse(0, h, i) : -std::numeric_limits<Scalar>::infinity());
          EXPECT_EQ(saved.lse_rest(b, h, i), i < length ? alone.lse_rest(0, h, i) : Scalar(0));
        }
    }
  }
}

TYPED_TEST(Ragged, ProbabilitiesBehindASequenceAreZero) {
  using Scalar = TypeParam;
  const LocalMHAConfig config{.dim = 6, .window_size = 4, .dim_head = 4, .heads = 2};
  const LocalMHA<Scalar> layer(config);
  Tensor<Scalar, 3> x(2, 9, 6);
  x.setRandom();
  const std::vector<Index> lengths{9, 4};
  const auto shown = layer.attention_probabilities(x, {.lengths = lengths});
  const auto alone = layer.attention_probabilities(item(x, 1, 4));
  for (Index h = 0; h < 2; ++h)
    for (Index i = 0; i < 9; ++i)
      for (Index j = 0; j < 9; ++j)
        EXPECT_EQ(shown(1, h, i, j), i < 4 && j < 4 ? alone(0, h, i, j) : Scalar(0));
}

using Tokens = Tensor<std::int64_t, 2>;

// Sequences of several windows.
LocalTransformerConfig model_config(bool causal) {
  return {.num_tokens = 11,
          .max_seq_len = 33,
          .dim = 12,
          .depth = 2,
          .causal = causal,
          .local_attn_window_size = 5,
          .dim_head = 6,
          .heads = 2};
}

// Tokens and labels of a batch, of which the first label counts and others do not.
struct TokenDraw {
  TokenDraw(Random& random, Index batch, Index n)
      : tokens(batch, n), labels(batch, n), masked(support::pick_mask(random, batch, n)) {
    for (Index i = 0; i < tokens.size(); ++i) {
      tokens.data()[i] = random.integer(0, 10);
      labels.data()[i] = i > 0 && random.chance(0.3) ? -1 : random.integer(0, 10);
    }
  }
  PaddingMask mask() const {
    return support::padding_mask(masked, tokens.dimension(0), tokens.dimension(1));
  }
  Tokens tokens, labels;
  std::vector<unsigned char> masked;
};

// A sequence as a batch of its own.
struct TokenSequence {
  // `n` positions of sequence `b` from `begin` on.
  TokenSequence(const TokenDraw& draw, Index b, Index begin, Index n) : tokens(1, n), labels(1, n) {
    const Index first = b * draw.tokens.dimension(1) + begin;
    std::copy_n(draw.tokens.data() + first, n, tokens.data());
    std::copy_n(draw.labels.data() + first, n, labels.data());
    if (draw.masked.empty()) return;
    const auto flags = draw.masked.begin() + first;
    mask = support::padding_mask({flags, flags + n}, 1, n);
  }
  double counted() const {
    return static_cast<double>(std::count_if(labels.data(), labels.data() + labels.size(),
                                             [](std::int64_t label) { return label != -1; }));
  }
  Tokens tokens, labels;
  PaddingMask mask;
};

// Compares a batch with its sequences alone.
// \param logits_of `logits_of(i)` is `[1, n, num_tokens]` of sequence `i`
// \param loss, gradients the mean over all labels that count
template <typename Scalar, typename LogitsOf>
void expect_those_alone(const LocalTransformer<Scalar>& model,
                        const std::vector<TokenSequence>& sequences, LogitsOf&& logits_of,
                        Scalar loss,
                        const typename LocalTransformer<Scalar>::Parameters& gradients) {
  constexpr bool single = std::is_same_v<Scalar, float>;
  constexpr double tolerance = single ? 1e-5 : 1e-12;
  double counted = 0, total = 0;
  auto expected = support::named<double>(gradients);
  for (auto& [name, gradient] : expected)
    std::fill(gradient.data.begin(), gradient.data.end(), 0.0);
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const TokenSequence& s = sequences[i];
    if (s.tokens.size() == 0) continue;
    const EncoderCall call{.mask = s.mask};
    const auto logits = array(model.forward(s.tokens, call));
    EXPECT_TRUE(support::close(array(logits_of(static_cast<Index>(i))), logits,
                               tolerance * (1 + static_cast<double>(support::largest(logits)))))
        << "sequence " << i;
    if (s.counted() == 0) continue;
    auto alone = LocalTransformer<Scalar>::Parameters::zeros(model.config());
    total += s.counted() * static_cast<double>(model.backward(alone, s.tokens, s.labels, call));
    counted += s.counted();
    for (const auto& [name, gradient] : support::named<double>(alone))
      for (std::size_t k = 0; k < gradient.data.size(); ++k)
        expected.at(name).data[k] += s.counted() * gradient.data[k];
  }
  EXPECT_NEAR(static_cast<double>(loss), total / counted, tolerance * (1 + total / counted));
  double largest = 0;
  for (auto& [name, gradient] : expected) {
    for (double& value : gradient.data) value /= counted;
    largest = std::max(largest, support::largest(gradient));
  }
  for (const auto& [name, gradient] : support::named<double>(gradients))
    EXPECT_TRUE(support::close(gradient, expected.at(name), (single ? 1e-4 : 1e-11) * largest))
        << name;
}

TYPED_TEST(Ragged, SequencesOfAModelAreWhatTheyAreAlone) {
  using Model = LocalTransformer<TypeParam>;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  for (std::uint64_t seed = 1; seed <= 24; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    const Model model(model_config(seed % 2 == 0), seed);
    const Index batch = random.integer(1, 4), n = random.integer(1, 33);
    TokenDraw draw(random, batch, n);
    std::vector<Index> lengths = pick_lengths(random, batch, n);
    lengths[0] = n;
    std::vector<TokenSequence> sequences;
    for (Index b = 0; b < batch; ++b) {
      const Index length = lengths[static_cast<std::size_t>(b)];
      sequences.emplace_back(draw, b, 0, length);
      for (Index i = length; i < n; ++i) draw.tokens(b, i) = draw.labels(b, i) = -7;
    }
    const EncoderCall call{.mask = draw.mask(), .lengths = lengths};
    const auto logits = model.forward(draw.tokens, call);
    EXPECT_TRUE(is_zero_behind(logits, lengths));
    auto gradients = Model::Parameters::zeros(model.config());
    const TypeParam loss = model.backward(gradients, draw.tokens, draw.labels, call);
    EXPECT_EQ(loss, model.loss(draw.tokens, draw.labels, call));
    expect_those_alone<TypeParam>(
        model, sequences,
        [&](Index b) { return item(logits, b, lengths[static_cast<std::size_t>(b)]); }, loss,
        gradients);
    const EncoderCall on_threads{.mask = draw.mask(), .lengths = lengths, .device = device};
    EXPECT_TRUE(same_bits(model.forward(draw.tokens, on_threads), logits));
    EXPECT_EQ(model.loss(draw.tokens, draw.labels, on_threads), loss);
  }
}

TYPED_TEST(Ragged, PackedSequencesOfAModelAreWhatTheyAreAlone) {
  using Model = LocalTransformer<TypeParam>;
  for (std::uint64_t seed = 1; seed <= 24; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    const Model model(model_config(seed % 2 == 0), seed);
    // In all more than max_seq_len.
    std::vector<Index> cuts{0, random.integer(1, 33)};
    for (Index more = random.integer(0, 4); more > 0; --more)
      cuts.push_back(cuts.back() + random.pick<Index>({0, 1, 33, random.integer(0, 33)}));
    const TokenDraw draw(random, 1, cuts.back());
    std::vector<TokenSequence> sequences;
    for (std::size_t s = 1; s < cuts.size(); ++s)
      sequences.emplace_back(draw, 0, cuts[s - 1], cuts[s] - cuts[s - 1]);
    const EncoderCall call{.mask = draw.mask(), .cu_seqlens = cuts};
    const auto logits = model.forward(draw.tokens, call);
    auto gradients = Model::Parameters::zeros(model.config());
    const TypeParam loss = model.backward(gradients, draw.tokens, draw.labels, call);
    EXPECT_EQ(loss, model.loss(draw.tokens, draw.labels, call));
    expect_those_alone<TypeParam>(
        model, sequences,
        [&](Index s) -> Tensor<TypeParam, 3> {
          const Index begin = cuts[static_cast<std::size_t>(s)];
          const Index end = cuts[static_cast<std::size_t>(s) + 1];
          return logits.slice(Eigen::array<Index, 3>{0, begin, 0},
                              Eigen::array<Index, 3>{1, end - begin, logits.dimension(2)});
        },
        loss, gradients);
  }
}

// The lengths are those of the input: the last label of a sequence is the token behind them.
TYPED_TEST(Ragged, LabelsOfTokensAreTheNextOnes) {
  using Model = LocalTransformer<TypeParam>;
  const Model model(model_config(true), 1);
  Random random(1);
  const std::vector<Index> lengths{20, 7, 1, 0};
  TokenDraw draw(random, 4, 21);
  Tokens input(4, 20), labels(4, 20);
  for (Index b = 0; b < 4; ++b) {
    for (Index i = lengths[static_cast<std::size_t>(b)] + 1; i < 21; ++i) draw.tokens(b, i) = -7;
    for (Index i = 0; i < 20; ++i) {
      input(b, i) = draw.tokens(b, i);
      labels(b, i) = draw.tokens(b, i + 1);
    }
  }
  const EncoderCall call{.lengths = lengths};
  auto gradients = Model::Parameters::zeros(model.config()), expected = gradients;
  const TypeParam loss = model.loss(input, labels, call);
  EXPECT_EQ(model.loss(draw.tokens, call), loss);
  EXPECT_EQ(model.backward(expected, input, labels, call), loss);
  EXPECT_EQ(model.backward(gradients, draw.tokens, call), loss);
  const auto of_labels = support::named<TypeParam>(expected);
  for (const auto& [name, gradient] : support::named<TypeParam>(gradients))
    EXPECT_EQ(gradient.data, of_labels.at(name).data) << name;
}

// What is behind a sequence may change; what is in it may not.
TYPED_TEST(Ragged, ACallIsKnownByTheRowsOfItsSequences) {
  using Scalar = TypeParam;
  const LocalMHAConfig config{.dim = 6, .window_size = 4, .dim_head = 4, .heads = 2};
  const LocalMHA<Scalar> layer(config);
  Tensor<Scalar, 3> x(4, 1000, 6);
  x.setRandom();
  const std::vector<Index> lengths{3, 3, 3, 3};
  typename LocalMHA<Scalar>::Saved saved;
  const auto y = layer.forward_saving(saved, x, {.lengths = lengths});
  auto gradients = LocalMHAParameters<Scalar>::zeros(config);
  const auto grad_x = layer.backward(gradients, saved, y, x);
  spoil_behind(x, lengths);
  EXPECT_TRUE(same_bits(layer.backward(gradients, saved, y, x), grad_x));
  x(2, 1, 3) += Scalar(1);
  EXPECT_THROW(layer.backward(gradients, saved, y, x), std::invalid_argument);

  const LocalAttention<Scalar> attention({.window_size = 4});
  Tensor<Scalar, 4> q(4, 2, 500, 3);
  q.setRandom();
  const auto kept = attention.forward_saving(q, q, q, {.lengths = lengths});
  q(1, 1, 3, 0) = std::numeric_limits<Scalar>::quiet_NaN();
  EXPECT_NO_THROW(attention.backward(kept, kept.out, q, q, q));
  q(1, 1, 2, 0) += Scalar(1);
  EXPECT_THROW(attention.backward(kept, kept.out, q, q, q), std::invalid_argument);
}

TYPED_TEST(Ragged, BatchesAreTheSameOnThreadsAndAllocateNothing) {
  using Scalar = TypeParam;
  const LocalMHAConfig config{
      .dim = 10, .window_size = 8, .dim_head = 6, .heads = 3, .dropout = 0.2, .prenorm = true};
  const LocalMHA<Scalar> layer(config);
  const Encoder<Scalar> encoder({.depth = 2, .layers = {config}, .ff_dropout = 0.1});
  const std::vector<Index> lengths{90, 0, 33, 1, 64};
  Tensor<Scalar, 3> x(5, 90, 10), y(5, 90, 10);
  x.setRandom();
  const Training training{.seed = 5};
  const auto on_one = layer.forward(x, {.training = training, .lengths = lengths});
  const auto of_encoder = encoder.forward(x, {.training = training, .lengths = lengths});
  // A sequence of the batch drops what it does among whole ones.
  const std::vector<Index> whole(5, 90);
  EXPECT_TRUE(same_bits(layer.forward(x, {.training = training, .lengths = whole}),
                        layer.forward(x, {.training = training})));
  for (const int threads : {1, 2, 3}) {
    Eigen::ThreadPool pool(threads);
    const Eigen::ThreadPoolDevice device(&pool, threads);
    EXPECT_TRUE(same_bits(
        layer.forward(x, {.training = training, .lengths = lengths, .device = device}), on_one));
    EXPECT_TRUE(
        same_bits(encoder.forward(x, {.training = training, .lengths = lengths, .device = device}),
                  of_encoder));
    typename LocalMHA<Scalar>::Workspace workspace;
    typename Encoder<Scalar>::Workspace room;
    const auto call = [&] {
      layer.forward_into(y, workspace, x, {.lengths = lengths, .device = device});
      encoder.forward_into(y, room, x, {.lengths = lengths, .device = device});
    };
    call();
    call();
    if (threads == 1) {
      EXPECT_EQ(support::allocations_of(call), 0);
    }
  }
}

}  // namespace ragged_test
