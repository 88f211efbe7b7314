// SPDX-License-Identifier: MIT
// LocalAttention's backward pass against central differences of the reference, for every option.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/differences.hpp"
#include "support/dual.hpp"
#include "support/library.hpp"
#include "support/random_case.hpp"

namespace attention_gradient_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::Tensor;
using local_mha::Training;
using reference::Array;
using reference::Int;
using support::array;
using support::tensor;

/// `Σ weights · out` of the reference.
long double loss(const support::AttentionCase& c, const reference::AttentionInputs<long double>& in,
                 const Array<double>& weights) {
  const auto out = reference::attention(support::options(c.config, c.call), in).out;
  long double sum = 0;
  for (std::size_t i = 0; i < out.data.size(); ++i)
    sum += out.data[i] * static_cast<long double>(weights.data[i]);
  return sum;
}

template <typename Scalar>
struct Passed {
  typename LocalAttention<Scalar>::Saved saved;
  typename LocalAttention<Scalar>::Gradients gradients;
};

template <typename Scalar>
Passed<Scalar> pass(const support::AttentionCase& c, const Array<double>& weights) {
  const LocalAttention<Scalar> attention(c.config);
  const auto q = tensor<Scalar, 4>(c.in.q);
  const auto k = tensor<Scalar, 4>(c.in.k);
  const auto v = tensor<Scalar, 4>(c.in.v);
  const auto bias = support::bias_tensor<Scalar>(c.in.bias);
  const auto mask = support::padding_mask(c.in.masked, c.batch(), c.seqlen());
  const auto view = support::optional_view(bias);
  const auto call = support::attention_call<Scalar>(c.call, mask, view);
  auto saved = attention.forward_saving(q, k, v, call);
  EXPECT_TRUE(support::same_bits(saved.out, attention.forward(q, k, v, call)));
  auto gradients = attention.backward(saved, tensor<Scalar, 4>(weights), q, k, v, call);
  return {std::move(saved), std::move(gradients)};
}

template <typename Scalar>
void expect_gradients(const support::AttentionCase& c, std::uint64_t seed,
                      const std::function<long double(Int, Int, Int, Int)>& multiplier = {}) {
  Random random(seed);
  const auto weights = random.array(c.in.q.shape);
  const auto [saved, gradients] = pass<Scalar>(c, weights);
  auto in = support::cast<long double>(c.in);
  in.multiplier = multiplier;
  const auto options = support::options(c.config, c.call);
  const double largest_score =
      static_cast<double>(reference::attention(options, in).largest_magnitude) +
      support::largest(c.in.bias);
  const auto dim_head = static_cast<double>(c.in.q.shape[3]);
  // g·v and delta, which may cancel, are of the size √D.
  const double size = std::max(1.0, std::sqrt(dim_head) / 4);
  const double tolerance = support::tolerance_of_differences<Scalar> * (1 + largest_score) * size;
  const double scale = std::abs(options.scale.value_or(1 / std::sqrt(dim_head)));
  const bool shared = c.config.shared_qk;  // keys are normalized
  const double q = support::largest(c.in.q), k = shared ? 1 : support::largest(c.in.k),
               v = support::largest(c.in.v);
  const std::string what = "seed " + std::to_string(seed) + ", " + support::describe(c.config);
  const auto along = [&](Array<long double> reference::AttentionInputs<long double>::* member) {
    return [&, member](const Array<long double>& values) {
      auto moved = in;
      moved.*member = values;
      return loss(c, moved, weights);
    };
  };
  using In = reference::AttentionInputs<long double>;
  support::expect_gradient(random, array(gradients.q), c.in.q, along(&In::q), tolerance,
                           what + ", q", {scale * k * v, v});
  support::expect_gradient(random, array(gradients.k), c.in.k, along(&In::k), tolerance,
                           what + ", k", {(shared ? std::max(1.0, scale * q) : scale * q) * v, v});
  support::expect_gradient(random, array(gradients.v), c.in.v, along(&In::v), tolerance,
                           what + ", v", {1, v});
  ASSERT_EQ(gradients.attn_bias.has_value(), !c.in.bias.empty());
  if (gradients.attn_bias)
    support::expect_gradient(random, array(*gradients.attn_bias), c.in.bias, along(&In::bias),
                             tolerance, what + ", attn_bias", {v, v});
}

template <typename Scalar>
constexpr double epsilon = std::numeric_limits<Scalar>::epsilon();

template <typename Scalar>
class AttentionGradients : public testing::Test {};
TYPED_TEST_SUITE(AttentionGradients, support::Scalars, support::ScalarNames);

TYPED_TEST(AttentionGradients, AreThoseOfRandomConfigurations) {
  // Differences of large inputs take long.
  std::uint64_t compared = 0;
  for (std::uint64_t seed = 1; compared < random_cases(60); ++seed) {
    const auto c = support::attention_case(seed);
    if (c.in.q.data.size() > 1500 || c.in.q.empty()) continue;
    ++compared;
    expect_gradients<TypeParam>(c, seed);
  }
}

TYPED_TEST(AttentionGradients, AreThoseOfLongSequences) {
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    const auto c = support::attention_case(seed, support::Length::Long);
    expect_gradients<TypeParam>(c, seed);
  }
}

/// Wide heads, whose gradients are added to panels of channels, several at once.
support::AttentionCase wide_attention_case(Index dim_head, bool xpos, bool exact) {
  support::AttentionCase c;
  c.config = {.window_size = 12, .causal = xpos, .dim = dim_head};
  c.config.exact_windowsize = exact;
  c.config.use_xpos = xpos;
  Random random(static_cast<std::uint64_t>(dim_head));
  for (auto* part : {&c.in.q, &c.in.k, &c.in.v}) *part = random.array({2, 1, 45, dim_head});
  return c;
}

constexpr Index wide[] = {32, 48, 64, 80, 128};

TEST(AttentionGradientsOfWideHeads, AreThoseOfTheReference) {
  for (const Index dim_head : wide)
    for (const bool xpos : {false, true})
      for (const bool exact : {false, true})
        expect_gradients<double>(wide_attention_case(dim_head, xpos, exact), 1);
}

TEST(AttentionGradientsOfWideHeads, AreTheSameInFloat) {
  for (const Index dim_head : wide)
    for (const bool xpos : {false, true})
      for (const bool exact : {false, true}) {
        const auto c = wide_attention_case(dim_head, xpos, exact);
        const auto weights = Random(2).array(c.in.q.shape);
        const auto single = pass<float>(c, weights).gradients;
        const auto twice = pass<double>(c, weights).gradients;
        for (const auto& [got, expected] :
             {std::pair{&single.q, &twice.q}, std::pair{&single.k, &twice.k},
              std::pair{&single.v, &twice.v}})
          EXPECT_TRUE(support::close(array(*got), array(*expected),
                                     2e-5 * support::largest(array(*expected))))
              << support::describe(c.config);
      }
}

// The forward pass of narrow windows has a kernel of its own, which saves as the other does.
TYPED_TEST(AttentionGradients, AreThoseOfNarrowWindows) {
  for (std::uint64_t seed = 1; seed <= 30; ++seed)
    expect_gradients<TypeParam>(support::narrow_attention_case(seed), seed);
}

// Segments of keys, and of positions, end inside of a window.
TYPED_TEST(AttentionGradients, AreThoseOfWindowsBeyondASegment) {
  for (const bool rotary : {false, true}) {
    support::AttentionCase c;
    c.config.window_size = 1200;
    c.config.causal = true;
    if (rotary) c.config.dim = 2;
    Random random(7);
    for (auto* part : {&c.in.q, &c.in.k, &c.in.v}) *part = random.array({1, 1, 1060, 2});
    expect_gradients<TypeParam>(c, 7);
  }
}

TYPED_TEST(AttentionGradients, AreThoseOfTheDroppedProbabilities) {
  std::uint64_t compared = 0;
  for (std::uint64_t seed = 1; compared < random_cases(25); ++seed) {
    auto c = support::attention_case(seed);
    // Of shared queries and keys, a position's own probability would not show.
    if (c.in.q.data.size() > 1000 || c.in.q.empty() || c.config.shared_qk) continue;
    ++compared;
    c.config.dropout = 0.3;
    c.call.training = Training{.seed = seed};
    // What is dropped, by the probabilities with and without.
    const LocalAttention<TypeParam> attention(c.config);
    const auto q = tensor<TypeParam, 4>(c.in.q);
    const auto k = tensor<TypeParam, 4>(c.in.k);
    const auto mask = support::padding_mask(c.in.masked, c.batch(), c.seqlen());
    // Without a scale every pair that is seen has a probability that shows.
    auto flat = c.config;
    flat.scale = 0;
    const auto dropped = array(LocalAttention<TypeParam>(flat).attention_probabilities(
        q, k, support::attention_call<TypeParam>(c.call, mask)));
    const double keep = std::round((1 - 0.3) * 65536) / 65536;
    expect_gradients<TypeParam>(c, seed, [&](Int b, Int h, Int i, Int j) -> long double {
      return dropped(b, h, i, j) == TypeParam(0) ? 0.0L : 1.0L / keep;
    });
  }
}

TYPED_TEST(AttentionGradients, OfSharedQueriesAndKeysWithDropout) {
  // Each position sees others, so that its own constant score has no share.
  support::AttentionCase c;
  c.config = {.window_size = 4, .causal = false, .dropout = 0.4, .shared_qk = true, .dim = 4};
  c.call.training = Training{.seed = 3};
  Random random(3);
  c.in.q = c.in.k = random.array({1, 2, 13, 4});
  c.in.v = random.array({1, 2, 13, 4});
  auto flat = c.config;
  flat.scale = 0;
  flat.shared_qk = false;
  const auto q = tensor<TypeParam, 4>(c.in.q);
  const auto dropped = array(LocalAttention<TypeParam>(flat).attention_probabilities(
      q, q, support::attention_call<TypeParam>(c.call)));
  const double keep = std::round((1 - 0.4) * 65536) / 65536;
  expect_gradients<TypeParam>(c, 3, [&](Int b, Int h, Int i, Int j) -> long double {
    return dropped(b, h, i, j) == TypeParam(0) ? 0.0L : 1.0L / keep;
  });
}

// The derivative of a loss along a direction, by a dual number that goes through the forward pass.
TEST(AttentionGradients, AgreeWithDualNumbers) {
  using support::Dual;
  std::uint64_t compared = 0;
  for (std::uint64_t seed = 200; compared < 40; ++seed) {
    auto c = support::attention_case(seed);
    if (c.in.q.data.size() > 600 || c.in.q.data.empty()) continue;
    ++compared;
    c.config.shared_qk = seed % 2 == 0;
    if (seed % 3 == 0) c.config.scale = 0.7;
    if (seed % 5 == 0) c.call.first_position = 3 + c.config.window_size;
    // At the call, with xPos only.
    if (c.config.use_xpos) {
      c.call.window_size = c.config.window_size + 2;
      c.in.bias = {};
    }
    if (seed % 4 == 0) {
      c.config.dropout = 0.3;
      c.call.training = Training{.seed = seed};
    }
    Random random(seed);
    const auto weights = random.array(c.in.q.shape);
    const auto g = pass<double>(c, weights).gradients;
    support::Direction direction(random);
    auto q = tensor<Dual, 4>(c.in.q), k = tensor<Dual, 4>(c.in.k), v = tensor<Dual, 4>(c.in.v);
    auto bias = support::bias_tensor<Dual>(c.in.bias);
    direction.move(c.in.q, array(g.q), q.data());
    direction.move(c.in.k, array(g.k), k.data());
    direction.move(c.in.v, array(g.v), v.data());
    if (g.attn_bias) direction.move(c.in.bias, array(*g.attn_bias), bias.data());
    const auto y = LocalAttention<Dual>(c.config).forward(
        q, k, v,
        support::attention_call<Dual>(c.call,
                                      support::padding_mask(c.in.masked, c.batch(), c.seqlen()),
                                      support::optional_view(bias)));
    direction.expect_slope(y, weights,
                           "seed " + std::to_string(seed) + ", " + support::describe(c.config));
  }
}

TYPED_TEST(AttentionGradients, AreZeroWhereNothingIsSeen) {
  for (const bool rotary : {false, true}) {
    support::AttentionCase c;
    c.config = {.window_size = 3, .causal = true};
    if (rotary) c.config.dim = 4;
    Random random(5);
    const Int n = 40;
    for (auto* part : {&c.in.q, &c.in.k, &c.in.v}) *part = random.array({1, 2, n, 4});
    c.in.masked.assign(n, 1);
    c.in.masked[20] = 0;
    const auto weights = random.array(c.in.q.shape);
    const auto g = pass<TypeParam>(c, weights).gradients;
    for (Int h = 0; h < 2; ++h)
      for (Int i = 0; i < n; ++i)
        for (Int channel = 0; channel < 4; ++channel) {
          // Of a single key the probability is 1, whatever the score: of the query's gradient is
          // left by how much two sums of the same 4 products differ, times the key.
          double products = 0, keys = 0;
          for (Int e = 0; e < 4; ++e) {
            products += std::abs(weights(0, h, i, e) * c.in.v(0, h, 20, e));
            keys = std::max(keys, std::abs(c.in.k(0, h, 20, e)));
          }
          EXPECT_NEAR(g.q(0, h, i, channel), 0, 8 * epsilon<TypeParam> * products * keys) << i;
          if (i < 20 || i > 23) {
            EXPECT_EQ(g.q(0, h, i, channel), TypeParam(0)) << i;
          }
          if (i == 20) continue;
          EXPECT_EQ(g.k(0, h, i, channel), TypeParam(0)) << i;
          EXPECT_EQ(g.v(0, h, i, channel), TypeParam(0)) << i;
        }
    EXPECT_NE(g.v(0, 0, 20, 0), TypeParam(0));
  }
}

// A NaN shows in the gradients of the rows that see it, or that it sees, and in no other.
TYPED_TEST(AttentionGradients, AreNotReachedByUnseenNaN) {
  constexpr auto nan = std::numeric_limits<double>::quiet_NaN();
  for (const bool dropout : {false, true})
    for (const int spoiled : {0, 1, 2, 3}) {
      support::AttentionCase c;
      c.config = {.window_size = 5, .causal = true, .exact_windowsize = true};
      if (dropout) {
        c.config.dropout = 0.25;
        c.call.training = Training{.seed = 2};
      }
      Random random(9);
      const Int n = 70, bad = 33;
      for (auto* part : {&c.in.q, &c.in.k, &c.in.v}) *part = random.array({1, 1, n, 4});
      auto weights = random.array(c.in.q.shape);
      const auto clean = pass<TypeParam>(c, weights).gradients;
      Array<double>* const parts[] = {&c.in.q, &c.in.k, &c.in.v, &weights};
      for (Int channel = 0; channel < 4; ++channel) (*parts[spoiled])(0, 0, bad, channel) = nan;
      const auto g = pass<TypeParam>(c, weights).gradients;
      // Queries that see the row, or the query itself; then the keys that these queries see.
      const bool of_query = spoiled == 0 || spoiled == 3;
      const auto affected_query = [&](Int i) {
        return of_query ? i == bad : bad <= i && i <= bad + 5;
      };
      for (Int i = 0; i < n; ++i) {
        bool affected_key = false;
        for (Int query = i; query <= std::min(n - 1, i + 5); ++query)
          affected_key = affected_key || affected_query(query);
        for (Int channel = 0; channel < 4; ++channel) {
          // The sums of other groups of terms round differently.
          if (!affected_query(i)) {
            EXPECT_NEAR(g.q(0, 0, i, channel), clean.q(0, 0, i, channel), 4 * epsilon<TypeParam>)
                << i;
          }
          if (!affected_key) {
            EXPECT_NEAR(g.k(0, 0, i, channel), clean.k(0, 0, i, channel), 4 * epsilon<TypeParam>)
                << i;
            EXPECT_NEAR(g.v(0, 0, i, channel), clean.v(0, 0, i, channel), 4 * epsilon<TypeParam>)
                << i;
          }
        }
      }
      EXPECT_TRUE(std::isnan(g.q(0, 0, bad, 0)));
    }
}

// Values that a bias takes away have no gradients, even where it takes away all.
TYPED_TEST(AttentionGradients, OfABiasOfMinusInfinity) {
  support::AttentionCase c;
  c.config = {.window_size = 4, .causal = true, .look_backward = 0};
  Random random(4);
  for (auto* part : {&c.in.q, &c.in.k, &c.in.v}) *part = random.array({1, 1, 8, 4});
  c.in.bias = Array<double>({1, 4, 4}, 0);
  for (Int j = 0; j < 4; ++j) c.in.bias(0, 2, j) = -std::numeric_limits<double>::infinity();
  const auto g = pass<TypeParam>(c, random.array(c.in.q.shape)).gradients;
  for (const auto* t : {&g.q, &g.k, &g.v})
    for (Index i = 0; i < t->size(); ++i) EXPECT_TRUE(std::isfinite(t->data()[i]));
  for (Int i = 0; i < 8; ++i)
    for (Int channel = 0; channel < 4; ++channel)
      if (i % 4 == 2) {
        EXPECT_EQ(g.q(0, 0, i, channel), TypeParam(0));
      }
  for (Int j = 0; j < 4; ++j) EXPECT_EQ((*g.attn_bias)(0, 2, j), TypeParam(0));
}

// A bias that is the same for every pair changes nothing, be its power of 2 beyond the scalar: also
// where the sequence ends within a block.
TYPED_TEST(AttentionGradients, OfALargeBias) {
  support::AttentionCase c;
  c.config = {.window_size = 64, .causal = true};
  Random random(6);
  for (auto* part : {&c.in.q, &c.in.k, &c.in.v}) *part = random.array({1, 1, 85, 4});
  const auto weights = random.array(c.in.q.shape);
  const auto plain = pass<TypeParam>(c, weights).gradients;
  const bool single = std::is_same_v<TypeParam, float>;
  c.in.bias = Array<double>({1, 64, 128}, single ? 88.75 : 709.8);
  const auto biased = pass<TypeParam>(c, weights).gradients;
  for (const auto& [a, b] : {std::pair{&plain.q, &biased.q}, std::pair{&plain.k, &biased.k},
                             std::pair{&plain.v, &biased.v}})
    // A score rounds at the size of its bias, and so does the log-sum-exp, and by as much a
    // probability is off.
    EXPECT_TRUE(
        support::close(array(*a), array(*b),
                       4 * epsilon<TypeParam> * c.in.bias.data[0] * support::largest(array(*b))));
}

// Scores round at their size, and the gradients lose the digits that the output loses, not those of
// a sum that runs at that size.
TYPED_TEST(AttentionGradients, OfScoresFarFromZeroAreAsGoodAsTheOutput) {
  support::AttentionCase c;
  c.config = {.window_size = 32, .causal = true, .exact_windowsize = true};
  Random random(7);
  for (auto* part : {&c.in.q, &c.in.k, &c.in.v}) *part = random.array({1, 2, 96, 64});
  const auto weights = random.array(c.in.q.shape);
  const auto plain = pass<TypeParam>(c, weights);
  const auto difference = [](const auto& a, const auto& b) {
    return support::largest_error(array(b), array(a)) /
           static_cast<double>(support::largest(array(a)));
  };
  for (const double constant : {1e3, 1e4, 1e5}) {
    c.in.bias = Array<double>({1, 32, 64}, constant);
    const auto biased = pass<TypeParam>(c, weights);
    const double out = difference(plain.saved.out, biased.saved.out);
    for (const auto& [a, b] : {std::pair{&plain.gradients.q, &biased.gradients.q},
                               std::pair{&plain.gradients.k, &biased.gradients.k},
                               std::pair{&plain.gradients.v, &biased.gradients.v}})
      EXPECT_LE(difference(*a, *b), 5 * out) << constant;
  }
}

TYPED_TEST(AttentionGradients, RejectWhatDoesNotFit) {
  const LocalAttention<TypeParam> attention({.window_size = 4});
  Tensor<TypeParam, 4> q(1, 2, 10, 4), short_q(1, 2, 9, 4);
  q.setZero();
  short_q.setZero();
  const auto saved = attention.forward_saving(q, q, q);
  EXPECT_THROW(attention.backward(saved, short_q, q, q, q), std::invalid_argument);
  EXPECT_THROW(attention.backward(saved, short_q, short_q, short_q, short_q),
               std::invalid_argument);
}

}  // namespace attention_gradient_test
