// SPDX-License-Identifier: MIT
// NaN and infinity in what a query does not see reach no result; in what it sees, they do.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace unseen_keys_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::Tensor;
using reference::Int;
using support::same_bits;
using support::tensor;

template <typename Scalar>
struct Inputs {
  Tensor<Scalar, 4> q, k, v;
  std::vector<unsigned char> masked;
  Tensor<Scalar, 3> bias;

  Tensor<Scalar, 4> attend(const LocalAttentionConfig& config,
                           const support::AttentionOptions& call = {}) const {
    return LocalAttention<Scalar>(config).forward(
        q, k, v,
        support::attention_call<Scalar>(
            call, support::padding_mask(masked, q.dimension(0), q.dimension(2)),
            support::optional_view(bias)));
  }
};

template <typename Scalar>
Inputs<Scalar> inputs(Random& random, Index heads, Index n, Index d) {
  Inputs<Scalar> in;
  in.q = tensor<Scalar, 4>(random.array({1, heads, n, d}));
  in.k = tensor<Scalar, 4>(random.array({1, heads, n, d}));
  in.v = tensor<Scalar, 4>(random.array({1, heads, n, d}));
  in.bias = Tensor<Scalar, 3>(0, 0, 0);
  return in;
}

template <typename Scalar>
void fill_row(Tensor<Scalar, 4>& t, Index row, Scalar value) {
  for (Index h = 0; h < t.dimension(1); ++h)
    for (Index c = 0; c < t.dimension(3); ++c) t(0, h, row, c) = value;
}

template <typename Scalar>
const std::vector<Scalar>& poisons() {
  static const std::vector<Scalar> values{std::numeric_limits<Scalar>::quiet_NaN(),
                                          std::numeric_limits<Scalar>::infinity(),
                                          -std::numeric_limits<Scalar>::infinity()};
  return values;
}

/// Windows and lengths around the edges of tiles and buckets.
template <typename Visit>
void for_each_geometry(Visit&& visit) {
  std::uint64_t seed = 0;
  for (const Index w : {1, 2, 3, 5, 7, 8, 15, 16, 17, 33})
    for (const Index n : {1, 7, 16, 17, 31, 33, 50})
      for (const int kind : {0, 1, 2, 3, 4, 5}) {
        LocalAttentionConfig config{.window_size = w};
        config.causal = kind < 3;
        config.exact_windowsize = kind % 2 == 0;
        config.look_backward = kind == 2 || kind == 5 ? 2 : 1;
        if (kind == 4) config.look_forward = 2;
        if (kind == 5) config.look_forward = 0;
        visit(config, n, ++seed);
      }
}

template <typename Scalar>
class UnseenKeys : public testing::Test {};
TYPED_TEST_SUITE(UnseenKeys, support::Scalars, support::ScalarNames);

TYPED_TEST(UnseenKeys, ThatAreMaskedMayHoldAnything) {
  int failures = 0;
  for_each_geometry([&](LocalAttentionConfig config, Index n, std::uint64_t seed) {
    if (failures > 5) return;
    Random random(seed);
    const Index d = random.pick<Index>({2, 5, 8, 16, 64});
    if (d % 2 == 0 && random.chance(0.7)) {
      config.dim = d;
      config.use_xpos = random.chance(0.5);
      if (config.use_xpos) config.xpos_scale_base = 40;
    }
    auto clean = inputs<TypeParam>(random, 2, n, d);
    clean.masked.assign(static_cast<std::size_t>(n), 0);
    const double share = random.pick({0.1, 0.5, 0.9, 1.0});
    for (auto& masked : clean.masked) masked = random.chance(share);
    auto poisoned = clean;
    for (Index j = 0; j < n; ++j) {
      if (!clean.masked[static_cast<std::size_t>(j)]) continue;
      const TypeParam poison = poisons<TypeParam>()[static_cast<std::size_t>(random.integer(0, 2))];
      fill_row(clean.k, j, TypeParam(0));
      fill_row(clean.v, j, TypeParam(0));
      if (!random.chance(0.2)) fill_row(poisoned.k, j, poison);
      if (!random.chance(0.2)) fill_row(poisoned.v, j, poison);
    }
    const auto result = same_bits(poisoned.attend(config), clean.attend(config));
    if (!result) ++failures;
    EXPECT_TRUE(result) << "seed " << seed << ", N " << n << ", " << support::describe(config);
  });
}

TYPED_TEST(UnseenKeys, OutsideOfTheWindowMayHoldAnythingAndSeenOnesShow) {
  int failures = 0;
  for_each_geometry([&](LocalAttentionConfig config, Index n, std::uint64_t seed) {
    Random random(seed);
    const Index d = random.pick<Index>({2, 5, 8, 16, 64});
    if (d % 2 == 0 && random.chance(0.7)) config.dim = d;
    support::AttentionOptions call;
    if (random.chance(0.3)) call.first_position = random.integer(0, 2 * config.window_size);
    const auto options = support::options(config, call);
    const auto original = inputs<TypeParam>(random, 2, n, d);
    for (int repeat = 0; repeat < 3; ++repeat) {
      if (failures > 5) return;
      const Index j = random.integer(0, n - 1);
      const TypeParam poison = poisons<TypeParam>()[static_cast<std::size_t>(repeat)];
      auto clean = original;
      fill_row(clean.k, j, TypeParam(0));
      fill_row(clean.v, j, TypeParam(0));
      auto poisoned = clean;
      fill_row(poisoned.k, j, std::numeric_limits<TypeParam>::quiet_NaN());
      fill_row(poisoned.v, j, poison);
      const auto expected = clean.attend(config, call);
      const auto got = poisoned.attend(config, call);
      bool right = true;
      for (Index h = 0; h < 2; ++h)
        for (Index i = 0; i < n; ++i)
          for (Index c = 0; c < d; ++c)
            right =
                right && (reference::sees(options, i, j) ? std::isnan(got(0, h, i, c))
                                                         : got(0, h, i, c) == expected(0, h, i, c));
      if (!right) ++failures;
      EXPECT_TRUE(right) << "seed " << seed << ", N " << n << ", key " << j << ", first_position "
                         << call.first_position << ", " << support::describe(config);
    }
  });
}

TYPED_TEST(UnseenKeys, LeaveEveryOtherChannelAlone) {
  // A NaN in one channel of a seen value is in that channel of the result, and in no other.
  Random random(4);
  const LocalAttentionConfig config{.window_size = 6, .causal = true, .dim = 10};
  auto clean = inputs<TypeParam>(random, 1, 40, 10);
  clean.v(0, 0, 20, 3) = 0;
  auto poisoned = clean;
  poisoned.v(0, 0, 20, 3) = std::numeric_limits<TypeParam>::quiet_NaN();
  const auto expected = clean.attend(config);
  const auto got = poisoned.attend(config);
  for (Index i = 0; i < 40; ++i)
    for (Index c = 0; c < 10; ++c) {
      if (c == 3 && reference::sees(support::options(config), i, 20))
        EXPECT_TRUE(std::isnan(got(0, 0, i, c))) << i;
      else
        EXPECT_EQ(got(0, 0, i, c), expected(0, 0, i, c)) << i << ' ' << c;
    }
}

TYPED_TEST(UnseenKeys, QueriesShowInTheirOwnRowOnly) {
  for (const TypeParam poison : poisons<TypeParam>()) {
    Random random(9);
    const LocalAttentionConfig config{.window_size = 5, .dim = 8};
    const auto clean = inputs<TypeParam>(random, 2, 37, 8);
    auto poisoned = clean;
    fill_row(poisoned.q, 18, poison);
    const auto expected = clean.attend(config);
    const auto got = poisoned.attend(config);
    for (Index h = 0; h < 2; ++h)
      for (Index i = 0; i < 37; ++i)
        for (Index c = 0; c < 8; ++c) {
          if (i == 18)
            EXPECT_TRUE(std::isnan(got(0, h, i, c)));
          else
            EXPECT_EQ(got(0, h, i, c), expected(0, h, i, c)) << i;
        }
  }
}

TYPED_TEST(UnseenKeys, OfAQueryThatSeesNoneLeaveZerosWhateverTheyHold) {
  for (const TypeParam poison : poisons<TypeParam>()) {
    Random random(10);
    auto in = inputs<TypeParam>(random, 1, 30, 4);
    for (Index j = 0; j < 30; ++j) {
      fill_row(in.k, j, poison);
      fill_row(in.v, j, poison);
    }
    in.masked.assign(30, 1);
    const auto y = in.attend({.window_size = 4, .causal = true, .dim = 4});
    for (Index i = 0; i < y.size(); ++i) EXPECT_EQ(y.data()[i], TypeParam(0));
  }
}

TYPED_TEST(UnseenKeys, NeverMeetTheirBias) {
  // The bias of pairs that a causal or exact window hides, or a mask, may hold anything, too.
  int failures = 0;
  for_each_geometry([&](LocalAttentionConfig config, Index n, std::uint64_t seed) {
    if (failures > 5) return;
    Random random(seed);
    const Index w = config.window_size;
    const auto options = support::options(config);
    const Index columns = (1 + options.look_backward + options.look_forward) * w;
    auto clean = inputs<TypeParam>(random, 2, n, 4);
    clean.bias = tensor<TypeParam, 3>(random.array({2, w, columns}));
    auto poisoned = clean;
    for (Index h = 0; h < 2; ++h)
      for (Index row = 0; row < w; ++row)
        for (Index column = 0; column < columns; ++column) {
          // As if far inside an endless sequence: which columns does this row never see?
          const Index query = 100 * w + row;
          const Index key = 100 * w - options.look_backward * w + column;
          if (!reference::sees(options, query, key))
            poisoned.bias(h, row, column) =
                poisons<TypeParam>()[static_cast<std::size_t>(random.integer(0, 2))];
        }
    const auto result = same_bits(poisoned.attend(config), clean.attend(config));
    if (!result) ++failures;
    EXPECT_TRUE(result) << "seed " << seed << ", N " << n << ", " << support::describe(config);
  });
}

TYPED_TEST(UnseenKeys, OfTheLayerMayHoldAnything) {
  // Rows of x that are masked, or out of a query's reach, do not change it.
  for (const Index w : {1, 4, 9, 16})
    for (const bool causal : {false, true})
      for (const Index poisoned_row : {0, 15, 16, 23, 49}) {
        LocalMHAConfig config{.dim = 10, .window_size = w, .dim_head = 4, .heads = 3};
        config.causal = causal;
        config.prenorm = true;
        config.qk_rmsnorm = true;
        config.gate_values_per_head = true;
        const LocalMHA<TypeParam> mha(config, 17);
        const auto options = support::options(config).attention;
        Random random(static_cast<std::uint64_t>(w));
        const Index n = 50;
        auto clean = tensor<TypeParam, 3>(random.array({1, n, 10}));
        auto poisoned = clean;
        for (Index c = 0; c < 10; ++c) {
          clean(0, poisoned_row, c) = 0;
          poisoned(0, poisoned_row, c) = poisons<TypeParam>()[static_cast<std::size_t>(c % 3)];
        }
        std::vector<unsigned char> masked(n, 0);
        for (const bool is_masked : {false, true}) {
          masked[static_cast<std::size_t>(poisoned_row)] = is_masked;
          const auto mask = support::padding_mask(masked, 1, n);
          const auto expected = mha.forward(clean, mask);
          const auto got = mha.forward(poisoned, mask);
          for (Index i = 0; i < n; ++i) {
            if (i == poisoned_row) continue;
            const bool seen = !is_masked && reference::sees(options, i, poisoned_row);
            for (Index c = 0; c < 10; ++c) {
              if (seen)
                EXPECT_TRUE(std::isnan(got(0, i, c))) << "row " << i;
              else
                EXPECT_EQ(got(0, i, c), expected(0, i, c))
                    << "w " << w << ", causal " << causal << ", poisoned row " << poisoned_row
                    << ", row " << i << (is_masked ? ", masked" : "");
            }
          }
        }
      }
}

// A row that is NaN for good reason leaves nothing behind for the rows that follow, though the room
// of a head of 12 channels is wider than the head.
TEST(UnseenKeys, OfALayerWithOddHeadsLeaveNothingBehind) {
  const local_mha::LocalMHAConfig config{
      .dim = 16, .window_size = 20, .dim_head = 12, .heads = 2, .causal = true};
  const local_mha::LocalMHA<float> mha(config);
  local_mha::Tensor<float, 3> x(1, 400, 16);
  for (local_mha::Index i = 0; i < x.size(); ++i)
    x.data()[i] = static_cast<float>(std::sin(static_cast<double>(i)));
  local_mha::Tensor<float, 3> bias(1, 20, 40);
  bias.setZero();
  for (local_mha::Index j = 0; j < 40; ++j) bias(0, 3, j) = std::numeric_limits<float>::infinity();
  local_mha::Tensor<bool, 2> masked(1, 400);
  masked.setConstant(false);
  masked(0, 300) = true;
  const auto mask = local_mha::PaddingMask::masked(masked);
  const auto expected = mha.forward(x, mask, bias);
  for (local_mha::Index c = 0; c < 16; ++c) x(0, 300, c) = std::numeric_limits<float>::quiet_NaN();
  const auto y = mha.forward(x, mask, bias);
  for (local_mha::Index i = 0; i < 400; ++i)
    for (local_mha::Index c = 0; c < 16; ++c) {
      if (i == 300 || i % 20 == 3) continue;
      ASSERT_EQ(y(0, i, c), expected(0, i, c)) << "row " << i;
    }
}

}  // namespace unseen_keys_test
