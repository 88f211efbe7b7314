// SPDX-License-Identifier: MIT
// The reference's rules of sliding windows: drawn by hand, by what one says of another, and their
// gradients by differences.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <local_mha/ops/dropout.hpp>

#include "reference/dropout.hpp"
#include "reference/frequencies.hpp"
#include "reference/gradients.hpp"
#include "support/compare.hpp"
#include "support/every_element.hpp"
#include "support/random.hpp"

namespace sliding_reference_test {

using reference::Array;
using reference::AttentionInputs;
using reference::AttentionOptions;
using reference::Int;
using reference::RotaryOptions;
using reference::TokenWindow;
using Flags = std::vector<unsigned char>;

std::string drawn(const AttentionOptions& o, Int n, const Flags& masked = {},
                  const Flags& global = {}) {
  std::string picture;
  for (Int i = 0; i < n; ++i, picture += '\n')
    for (Int j = 0; j < n; ++j)
      picture += reference::sees(o, masked, global, n, 0, i, j) ? '1' : '0';
  return picture;
}

TEST(SlidingReference, SeesTokenWindows) {
  AttentionOptions o{.token_window = TokenWindow{2, 1}};
  EXPECT_EQ(drawn(o, 5), "11000\n11100\n11110\n01111\n00111\n");
  o.causal = true;
  EXPECT_EQ(drawn(o, 5), "10000\n11000\n11100\n01110\n00111\n");
  o.token_window = TokenWindow{0, 0};
  EXPECT_EQ(drawn(o, 3), "100\n010\n001\n");
  o.token_window = TokenWindow{{}, 0};
  EXPECT_EQ(drawn(o, 3), "100\n110\n111\n");
  o.causal = false;
  o.token_window = TokenWindow{1, {}};
  EXPECT_EQ(drawn(o, 4), "1111\n1111\n0111\n0011\n");
  o.token_window = TokenWindow{};
  EXPECT_EQ(drawn(o, 2), "11\n11\n");
}

TEST(SlidingReference, SeesSegmentsAlone) {
  // Of 1, 0, 4 and 1 rows.
  AttentionOptions o{.cu_seqlens = {0, 1, 1, 5, 6}};
  o.token_window = TokenWindow{1, 1};
  EXPECT_EQ(drawn(o, 6), "100000\n011000\n011100\n001110\n000110\n000001\n");
  // Windows of two rows count from the segment's start.
  o.token_window.reset();
  o.window_size = 2;
  o.look_backward = 0;
  EXPECT_EQ(drawn(o, 6), "100000\n011000\n011000\n000110\n000110\n000001\n");
}

TEST(SlidingReference, SeesFirstKeys) {
  AttentionOptions o{.token_window = TokenWindow{1, 0}, .first_keys = 2};
  EXPECT_EQ(drawn(o, 5), "11000\n11000\n11100\n11110\n11011\n");
  o.causal = true;
  EXPECT_EQ(drawn(o, 5), "10000\n11000\n11100\n11110\n11011\n");
  EXPECT_EQ(drawn(o, 5, {0, 1, 0, 0, 0}), "10000\n10000\n10100\n10110\n10011\n");
  o.first_keys = 1;
  o.cu_seqlens = {0, 1, 5};
  EXPECT_EQ(drawn(o, 5), "10000\n01000\n01100\n01110\n01011\n");
}

TEST(SlidingReference, SeesGlobalRows) {
  AttentionOptions o{.token_window = TokenWindow{0, 0}};
  EXPECT_EQ(drawn(o, 4, {}, {0, 1, 0, 0}), "1100\n1111\n0110\n0101\n");
  EXPECT_EQ(drawn(o, 4, {0, 1, 0, 1}, {0, 1, 0, 0}), "1000\n1010\n0010\n0000\n");
  o.causal = true;
  EXPECT_EQ(drawn(o, 4, {}, {0, 1, 0, 0}), "1100\n1111\n0110\n0101\n");
  o.cu_seqlens = {0, 2, 4};
  EXPECT_EQ(drawn(o, 4, {}, {0, 1, 0, 0}), "1100\n1100\n0010\n0001\n");
}

/// Queries, keys and values of `heads` and `kv_heads`.
AttentionInputs<double> random_inputs(Random& random, Int n, Int d, Int heads = 2,
                                      Int kv_heads = 2) {
  return {random.array({1, heads, n, d}),
          random.array({1, kv_heads, n, d}),
          random.array({1, kv_heads, n, d}),
          {},
          {},
          {}};
}

void expect_same(const reference::AttentionResult<double>& got,
                 const reference::AttentionResult<double>& expected, double tolerance = 1e-14) {
  EXPECT_TRUE(support::close(got.out, expected.out, tolerance));
  EXPECT_TRUE(support::close(got.lse, expected.lse, tolerance));
}

TEST(SlidingReference, TokenWindowIsTheExactLookAroundOfItsBand) {
  Random random(1);
  auto in = random_inputs(random, 23, 4);
  AttentionOptions around{.window_size = 3, .look_backward = 2, .look_forward = 0, .causal = true};
  around.exact_windowsize = around.rotary = true;
  AttentionOptions window{.rotary = true, .token_window = TokenWindow{6, 0}};
  expect_same(attention(window, in), attention(around, in));
  // The look-around's numbers then mean nothing.
  window.window_size = 5;
  window.look_forward = 1;
  expect_same(attention(window, in), attention(around, in));
  // One of both sides has no shift by lf·w.
  around.causal = around.rotary = window.rotary = false;
  around.look_forward = 1;
  window.token_window = TokenWindow{6, 3};
  expect_same(attention(window, in), attention(around, in));
}

TEST(SlidingReference, FewerKeyHeadsAreRepeatedOnes) {
  Random random(2);
  const Int n = 9, d = 4;
  auto in = random_inputs(random, n, d, 6, 2);
  in.sinks = random.array({6});
  const AttentionOptions o{.rotary = true, .token_window = TokenWindow{3, 1}};
  auto repeated = in;
  repeated.k = repeated.v = Array<double>({1, 6, n, d});
  for (Int h = 0; h < 6; ++h)
    for (Int i = 0; i < n; ++i)
      for (Int c = 0; c < d; ++c) {
        repeated.k(0, h, i, c) = in.k(0, h / 3, i, c);
        repeated.v(0, h, i, c) = in.v(0, h / 3, i, c);
      }
  expect_same(attention(o, in), attention(o, repeated), 0);
}

TEST(SlidingReference, SinkTakesItsShareOfTheProbability) {
  Random random(3);
  auto in = random_inputs(random, 9, 4);
  in.masked = {1, 0, 0, 1, 1, 1, 0, 0, 0};
  const AttentionOptions o{.token_window = TokenWindow{1, 0}};
  const auto without = attention(o, in);
  in.sinks = random.array({2}, 3);
  const auto with = attention(o, in);
  for (Int h = 0; h < 2; ++h)
    for (Int i = 0; i < 9; ++i) {
      const double lse = without.lse(0, h, i);
      const double kept = std::exp(lse) / (std::exp(lse) + std::exp(in.sinks(h)));
      if (std::isinf(lse)) {
        EXPECT_EQ(with.lse(0, h, i), in.sinks(h));
      } else {
        EXPECT_NEAR(with.lse(0, h, i), std::log(std::exp(lse) + std::exp(in.sinks(h))), 1e-14);
      }
      for (Int c = 0; c < 4; ++c)
        EXPECT_NEAR(with.out(0, h, i, c), kept * without.out(0, h, i, c), 1e-14);
    }
  EXPECT_EQ(with.out(0, 0, 0, 0), 0);
}

TEST(SlidingReference, SegmentsAreWhatTheyAreAlone) {
  Random random(4);
  const auto in = random_inputs(random, 11, 4);
  AttentionOptions o{.window_size = 2, .look_forward = 1, .rotary = true};
  o.first_keys = 1;
  o.cu_seqlens = {0, 0, 3, 8, 8, 9, 11};
  auto packed_in = in;
  packed_in.score.value = [](double s, Int h, Int i, Int j) {
    return s * static_cast<double>(1 + h + i % 3) - static_cast<double>(j) / 4;
  };
  packed_in.bias = random.array({2, 2, 6});
  const auto packed = attention(o, packed_in);
  AttentionOptions alone = o;
  alone.cu_seqlens.clear();
  for (std::size_t s = 0; s + 1 < o.cu_seqlens.size(); ++s) {
    const Int begin = o.cu_seqlens[s], length = o.cu_seqlens[s + 1] - begin;
    AttentionInputs<double> part = packed_in;
    for (auto array :
         {&AttentionInputs<double>::q, &AttentionInputs<double>::k, &AttentionInputs<double>::v}) {
      part.*array = Array<double>({1, 2, length, 4});
      for (Int h = 0; h < 2; ++h)
        for (Int i = 0; i < length; ++i)
          for (Int c = 0; c < 4; ++c) (part.*array)(0, h, i, c) = (in.*array)(0, h, begin + i, c);
    }
    const auto got = attention(alone, part);
    for (Int h = 0; h < 2; ++h)
      for (Int i = 0; i < length; ++i)
        for (Int c = 0; c < 4; ++c) EXPECT_EQ(got.out(0, h, i, c), packed.out(0, h, begin + i, c));
  }
}

TEST(SlidingReference, BiasesOfDistanceAgree) {
  Random random(5);
  auto in = random_inputs(random, 13, 4);
  const AttentionOptions o{.token_window = TokenWindow{4, 2}};
  auto alibi = in, relative = in;
  alibi.score = reference::alibi<double>({0.5, 0.125});
  relative.relative_bias = Array<double>({2, 7});
  for (Int h = 0; h < 2; ++h)
    for (Int column = 0; column < 7; ++column)
      relative.relative_bias(h, column) = -(h == 0 ? 0.5 : 0.125) * std::abs(double(column - 4));
  expect_same(attention(o, alibi), attention(o, relative));
  // And what the look-around adds at (h, i mod w, j − (i/w − lb)·w).
  AttentionOptions around{.window_size = 2, .look_backward = 2, .look_forward = 1};
  around.exact_windowsize = true;
  auto places = in;
  places.bias = Array<double>({2, 2, 8});
  for (Int h = 0; h < 2; ++h)
    for (Int i = 0; i < 2; ++i)
      for (Int column = 0; column < 8; ++column)
        if (const Int at = column - i; 0 <= at && at < 7)
          places.bias(h, i, column) = relative.relative_bias(h, at);
  expect_same(attention(around, places), attention(o, relative));
}

TEST(SlidingReference, ScoresAreBentBeforeTheBias) {
  // Two keys, of which the second's score is bent to 2·tanh(3/2), and 1 is added.
  AttentionInputs<double> in{Array<double>({1, 1, 2, 1}, 1),
                             Array<double>({1, 1, 2, 1}),
                             Array<double>({1, 1, 2, 1}),
                             {},
                             {},
                             {}};
  in.k(0, 0, 1, 0) = 3;
  in.score = reference::soft_cap<double>(2);
  in.relative_bias = Array<double>({1, 3});
  in.relative_bias(0, 2) = 1;
  const auto result = attention({.scale = 1, .token_window = TokenWindow{1, 1}}, in);
  EXPECT_NEAR(result.lse(0, 0, 0), std::log(1 + std::exp(1 + 2 * std::tanh(1.5))), 1e-15);
  const auto both =
      reference::composed(reference::soft_cap<double>(2), reference::alibi<double>({0.5}));
  EXPECT_NEAR(both.value(3, 0, 4, 2), 2 * std::tanh(1.0), 1e-15);
}

TEST(SlidingReference, RotaryOptionsAgree) {
  Random random(6);
  const Int n = 9, d = 6;
  const auto in = random_inputs(random, n, d);
  AttentionOptions o{.rotary = true, .token_window = TokenWindow{5, 1}};
  const auto plain = attention(o, in);
  {
    AttentionOptions given = o;
    for (int m = 0; m < 3; ++m)
      given.rotary_options.inv_freq.push_back(std::pow(10000.0, -2.0 * m / 6));
    expect_same(attention(given, in), plain);
    given.rotary_options.factor = 1.5;
    given.scale = 1 / std::sqrt(6.0) / 2.25;
    expect_same(attention(given, in), plain);
  }
  {
    AttentionOptions interleaved = o;
    interleaved.rotary_options.interleaved = true;
    auto permuted = in;
    for (auto array : {&AttentionInputs<double>::q, &AttentionInputs<double>::k})
      for (Int h = 0; h < 2; ++h)
        for (Int i = 0; i < n; ++i)
          for (Int m = 0; m < 3; ++m) {
            (permuted.*array)(0, h, i, 2 * m) = (in.*array)(0, h, i, m);
            (permuted.*array)(0, h, i, 2 * m + 1) = (in.*array)(0, h, i, m + 3);
          }
    const auto got = attention(interleaved, permuted);
    EXPECT_TRUE(support::close(got.lse, plain.lse, 1e-14));
  }
  {
    // Four of six channels are turned: those of four alone, if the other two are 0.
    AttentionOptions partial = o;
    partial.scale = 0.5;
    partial.rotary_options = RotaryOptions{.theta = 500, .rotary_dim = 4};
    auto wide = in;
    auto narrow = random_inputs(random, n, 4);
    for (auto array : {&AttentionInputs<double>::q, &AttentionInputs<double>::k})
      for (Int h = 0; h < 2; ++h)
        for (Int i = 0; i < n; ++i)
          for (Int c = 0; c < 6; ++c)
            (wide.*array)(0, h, i, c) = c < 4 ? (narrow.*array)(0, h, i, c) : 0;
    AttentionOptions of_four = partial;
    of_four.rotary_options.rotary_dim.reset();
    EXPECT_TRUE(support::close(attention(partial, wide).lse, attention(of_four, narrow).lse, 0));
    // The others count as they are.
    wide.q(0, 0, 3, 5) = 2;
    wide.k(0, 0, 3, 5) = 7;
    Int seen = 0;
    const auto moved = attention(partial, wide);
    for (Int i = 0; i < n; ++i)
      seen += moved.lse(0, 0, i) != attention(partial, narrow).lse(0, 0, i);
    EXPECT_EQ(seen, 1);
  }
}

TEST(SlidingReference, GlobalRowsUseProjectionsOfTheirOwn) {
  Random random(7);
  auto in = random_inputs(random, 8, 4);
  const AttentionOptions o{.token_window = TokenWindow{2, 2}};
  in.global = {0, 0, 1, 0, 0, 0, 0, 0};
  const auto shared = attention(o, in);
  auto own = in;
  own.global_q = random.array(in.q.shape);
  own.global_k = random.array(in.q.shape);
  own.global_v = random.array(in.q.shape);
  const auto got = attention(o, own);
  auto all = own;
  all.q = own.global_q, all.k = own.global_k, all.v = own.global_v;
  const auto of_global = attention(o, all);
  for (Int h = 0; h < 2; ++h)
    for (Int i = 0; i < 8; ++i)
      for (Int c = 0; c < 4; ++c)
        EXPECT_EQ(got.out(0, h, i, c), (i == 2 ? of_global : shared).out(0, h, i, c));
}

TEST(SlidingReference, FrequenciesAreStretchedWhereTheyAreSlow) {
  // Of 8 channels of theta 1e4, in a length of 628 = 200π, 100, 10, 1 and 0.1 turns.
  const double length = 100 * reference::two_pi;
  const std::vector<double> plain{1, 0.1, 0.01, 0.001};
  const auto expect = [](const std::vector<double>& got, const std::vector<double>& expected) {
    ASSERT_EQ(got.size(), expected.size());
    for (std::size_t m = 0; m < got.size(); ++m)
      EXPECT_NEAR(got[m], expected[m], 1e-14 * expected[m]) << m;
  };
  expect(reference::plain_frequencies(1e4, 8), plain);
  // 10 turns lie at two thirds of 4 to 13.
  expect(reference::llama3_frequencies({.theta = 1e4,
                                        .factor = 4,
                                        .low_freq_factor = 4,
                                        .high_freq_factor = 13,
                                        .original_length = length},
                                       8),
         {1, 0.1 * (2.0 / 3 + 1.0 / 12), 0.01 / 4, 0.001 / 4});
  // Pair 1 lies in the middle of the ramp from pair 0, of 100 turns, to pair 2, of 1.
  reference::Yarn yarn{.theta = 1e4, .factor = 4, .original_length = length};
  yarn.beta_fast = 100;
  yarn.truncate = false;
  expect(reference::yarn_frequencies(yarn, 8), {1, 0.1 * (0.5 + 0.125), 0.01 / 4, 0.001 / 4});
  // Also if its ends, between two pairs, are rounded away from it.
  yarn.beta_fast = 10.5;
  yarn.beta_slow = 1.1;
  yarn.truncate = true;
  expect(reference::yarn_frequencies(yarn, 8), {1, 0.1 * (0.5 + 0.125), 0.01 / 4, 0.001 / 4});
  EXPECT_EQ(reference::yarn_scale(1), 1);
  EXPECT_NEAR(reference::yarn_scale(32), 1.3465735902799727, 1e-15);
}

TEST(SlidingReference, BucketsOfLongT5) {
  const reference::RelativeBuckets o{.buckets = 8, .max_distance = 12};
  const std::vector<Int> expected{3, 3, 2, 2, 2, 1, 0, 5, 6, 6, 6, 7, 7};
  for (Int ahead = -6; ahead <= 6; ++ahead)
    EXPECT_EQ(reference::bucket_of(o, ahead), expected[static_cast<std::size_t>(ahead + 6)])
        << ahead;
  EXPECT_EQ(reference::bucket_of({}, 1000), 31);
  EXPECT_EQ(reference::bucket_of({}, -7), 7);
}

TEST(SlidingReference, RandomWordsAreThoseOfThePaper) {
  // The known answers of the authors' implementation.
  using Words = std::array<std::uint32_t, 4>;
  EXPECT_EQ(reference::philox(0, {0, 0, 0, 0}),
            (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(reference::philox(~std::uint64_t{0}, {~0U, ~0U, ~0U, ~0U}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(reference::philox(0x299f31d0a4093822, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(SlidingReference, DropsWhatTheLibraryDrops) {
  using Dropout = local_mha::Dropout<double>;
  constexpr Int rows = local_mha::block_rows<double>;
  constexpr std::uint64_t seed = 0x123456789ABCDEF;
  for (const double rate : {0.1, 0.5, 0.9})
    for (const Int first : {Int{0}, Int{48}, Int{5'000'000'000}})
      for (const Int octet : {Int{0}, Int{3}, Int{700'000'000}, Int{5'000'000'000}}) {
        local_mha::Lanes<double> factors[Dropout::together];
        Dropout(rate, seed, 5).factors(first, octet, factors);
        const auto expected = reference::dropout_factors<double>(rate, seed, 3);
        for (Int key = 0; key < 8; ++key) {
          alignas(64) double got[rows];
          factors[key].store(got);
          for (Int row = 0; row < rows; ++row)
            EXPECT_EQ(got[row], expected(1, 2, first + row, octet * 8 + key));
        }
      }
}

TEST(SlidingReference, GradientsOfAttentionAreDifferences) {
  using Real = long double;
  for (int kind = 0; kind < 12; ++kind) {
    Random random(static_cast<std::uint64_t>(kind));
    const auto numbers = [&](std::vector<Int> shape) {
      return reference::cast<Real>(random.array(std::move(shape)));
    };
    const Int n = 7, d = 6, heads = 4, kv_heads = kind % 3 == 0 ? 4 : kind % 3;
    AttentionOptions o;
    if (kind % 4 != 1) o.token_window = TokenWindow{2, kind % 2};
    o.window_size = 2;
    o.causal = kind % 5 == 0;
    o.first_keys = kind % 3;
    if (kind % 3 == 1) o.cu_seqlens = {0, 2, 2, 6, 7};
    o.rotary = kind % 2 == 0;
    o.rotary_options.interleaved = kind % 4 == 0;
    if (kind % 4 == 2) o.rotary_options.rotary_dim = 4;
    o.rotary_options.factor = 1.25;
    AttentionInputs<Real> in{numbers({1, heads, n, d}),
                             numbers({1, kv_heads, n, d}),
                             numbers({1, kv_heads, n, d}),
                             kind % 2 == 0 ? Flags{} : Flags{0, 1, 0, 0, 0, 1, 0},
                             {},
                             {}};
    if (kind % 4 == 1) in.bias = numbers({kind % 8 == 1 ? 1 : heads, 2, 4});
    if (kind % 4 >= 2) in.relative_bias = numbers({kind % 8 < 4 ? 1 : heads, 3 + kind % 2});
    if (kind % 5 < 3) in.sinks = numbers({heads});
    if (kind % 3 == 1) in.score = reference::soft_cap<Real>(1.5);
    if (kind % 3 == 2)
      in.score =
          reference::composed(reference::soft_cap<Real>(2),
                              reference::composed(reference::alibi<Real>({0.5, 0.25, 0.125, 1}),
                                                  reference::soft_cap<Real>(3)));
    if (kind % 4 == 3) in.global = {0, 0, 0, 1, 0, 0, 1};
    if (kind == 7) {
      in.global_q = numbers(in.q.shape);
      in.global_k = numbers(in.k.shape);
      in.global_v = numbers(in.k.shape);
    }
    if (kind % 6 == 4) in.multiplier = reference::dropout_factors<Real>(0.25, 3, heads);
    const auto weight = numbers(in.q.shape);
    const auto got = reference::attention_backward(o, in, weight);
    const auto loss = [&] { return support::loss_of(reference::attention(o, in).out, weight); };
    EXPECT_EQ(got.out.data, reference::attention(o, in).out.data);
    EXPECT_EQ(got.lse.data, reference::attention(o, in).lse.data);
    const std::string name = "kind " + std::to_string(kind);
    support::expect_gradient(name + " q", in.q, loss, got.q);
    support::expect_gradient(name + " k", in.k, loss, got.k);
    support::expect_gradient(name + " v", in.v, loss, got.v);
    support::expect_gradient(name + " bias", in.bias, loss, got.bias);
    support::expect_gradient(name + " relative_bias", in.relative_bias, loss, got.relative_bias);
    support::expect_gradient(name + " sinks", in.sinks, loss, got.sinks);
    support::expect_gradient(name + " global_q", in.global_q, loss, got.global_q);
    support::expect_gradient(name + " global_k", in.global_k, loss, got.global_k);
    support::expect_gradient(name + " global_v", in.global_v, loss, got.global_v);
  }
}

TEST(SlidingReference, GradientsOfALayerAreDifferences) {
  using Real = long double;
  using reference::QkNorm;
  for (int kind = 0; kind < 8; ++kind) {
    Random random(static_cast<std::uint64_t>(kind));
    const Int n = 6, dim = 5, d = 4, heads = 2, kv_heads = kind % 2 + 1;
    reference::LayerOptions o;
    o.dim = dim;
    o.heads = heads;
    o.kv_heads = kv_heads;
    o.dim_head = d;
    o.prenorm = kind % 3 != 0;
    o.prenorm_kind = kind % 3 == 1 ? reference::Prenorm::Rms : reference::Prenorm::Layer;
    o.norm_eps = 1e-2;
    o.qk_norm = kind % 4 == 0   ? QkNorm::Rms
                : kind % 4 == 1 ? QkNorm::RmsAll
                : kind % 4 == 2 ? QkNorm::L2
                                : QkNorm::None;
    o.qk_norm_eps = 0.1;
    if (kind % 2 == 0) o.softmax_scale = 0.7;
    o.qkv_bias = kind != 0;
    o.out_bias = kind != 1;
    o.out_projection = kind != 2;
    o.gate_values_per_head = kind % 3 == 2;
    o.sinks = kind % 2 == 1;
    o.global_projections = kind == 3 || kind == 7;
    o.attention.token_window = TokenWindow{2, 1};
    o.attention.rotary = kind < 6;
    if (kind == 4) o.relative_bias = true;
    if (kind >= 5) o.relative_buckets = {.buckets = 8, .max_distance = 12};
    reference::LayerInputs<Real> in{reference::cast<Real>(random.array({2, n, dim})), {}, {}, {}};
    if (kind % 2 == 0) in.masked = {0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1};
    if (o.global_projections) in.global = {0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1};
    if (kind == 5) in.score = reference::soft_cap<Real>(1.5);
    reference::Parameters<Real> parameters;
    const auto add = [&](const char* name, std::vector<Int> shape) {
      parameters[name] = reference::cast<Real>(random.array(std::move(shape), 0.6));
    };
    const Int rows = (heads + 2 * kv_heads) * d;
    add("to_qkv.weight", {rows, dim});
    add("to_qkv.bias", {rows});
    add("to_qkv_global.weight", {rows, dim});
    add("to_qkv_global.bias", {rows});
    add("to_out.weight", {dim, heads * d});
    add("to_out.bias", {dim});
    add("norm.weight", {dim});
    add("norm.bias", {dim});
    add("q_scale", {d});
    add("k_scale", {d});
    const bool all = o.qk_norm == QkNorm::RmsAll;
    add("q_norm.weight", {all ? heads * d : d});
    add("k_norm.weight", {all ? kv_heads * d : d});
    add("to_v_gate.0.weight", {heads, dim});
    add("to_v_gate.0.bias", {heads});
    add("sinks", {heads});
    add("relative_bias", {heads, 4});
    add("relative_attention_bias.weight", {8, heads});
    auto gradients = reference::zeros_like(parameters);
    const auto result = reference::local_mha(o, parameters, in);
    const auto weight = reference::cast<Real>(random.array(result.y.shape));
    const auto got = reference::local_mha_backward(o, parameters, in, weight, gradients);
    const auto loss = [&] {
      return support::loss_of(reference::local_mha(o, parameters, in).y, weight);
    };
    EXPECT_EQ(got.y.data, result.y.data);
    const std::string name = "kind " + std::to_string(kind) + " ";
    support::expect_gradient(name + "x", in.x, loss, got.x);
    for (auto& [of, array] : parameters)
      support::expect_gradient(name + of, array, loss, gradients.at(of));
  }
}

TEST(SlidingReference, NormsAreTheirFormulas) {
  // Rows (3, 4) and (0, 0), of mean squares 12.5 and 0.
  Array<double> x({2, 2});
  x.data = {3, 4, 0, 0};
  Array<double> weight({2}, 2);
  const auto normed = reference::rms_norm(x, weight, 0.5);
  EXPECT_EQ(normed.data, (std::vector<double>{6 / std::sqrt(13.0), 8 / std::sqrt(13.0), 0, 0}));
  // All heads' channels are one row.
  reference::LayerOptions o;
  o.qk_norm = reference::QkNorm::RmsAll;
  o.qk_norm_eps = 0.5;
  Array<double> heads({1, 2, 1, 1});
  heads.data = {3, 4};
  EXPECT_EQ(reference::qk_normed(o, {{"q_norm.weight", weight}}, heads, "q").data,
            (std::vector<double>{6 / std::sqrt(13.0), 8 / std::sqrt(13.0)}));
}

}  // namespace sliding_reference_test
