// SPDX-License-Identifier: MIT
// The components alone, against the naive reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <local_mha/core/exp2.hpp>
#include <local_mha/core/random.hpp>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace components_test {

using local_mha::block_rows;
using local_mha::Index;
using local_mha::RowMatrix;
using local_mha::Vector;
using reference::Array;
using reference::Int;

template <typename Scalar>
RowMatrix<Scalar> matrix(const Array<double>& from) {
  RowMatrix<Scalar> to(from.shape.at(0), from.shape.at(1));
  for (std::size_t i = 0; i < from.data.size(); ++i)
    to.data()[i] = static_cast<Scalar>(from.data[i]);
  return to;
}

template <typename Scalar>
Vector<Scalar> vector(const Array<double>& from) {
  Vector<Scalar> to(static_cast<Index>(from.data.size()));
  for (std::size_t i = 0; i < from.data.size(); ++i)
    to.data()[i] = static_cast<Scalar>(from.data[i]);
  return to;
}

template <typename Scalar>
Array<Scalar> array(const RowMatrix<Scalar>& from) {
  Array<Scalar> to({from.rows(), from.cols()});
  for (std::size_t i = 0; i < to.data.size(); ++i) to.data[i] = from.data()[i];
  return to;
}

template <typename Scalar>
class Component : public testing::Test {
 protected:
  static constexpr double epsilon = std::numeric_limits<Scalar>::epsilon();
};
TYPED_TEST_SUITE(Component, support::Scalars, support::ScalarNames);

// 2^x of numbers that go through all lanes.
template <typename Scalar>
std::vector<Scalar> powers_of_two(const std::vector<Scalar>& x) {
  using L = local_mha::Lanes<Scalar>;
  std::vector<Scalar> y(x.size());
  alignas(64) Scalar lanes[L::count];
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t lane = i % static_cast<std::size_t>(L::count);
    std::fill_n(lanes, L::count, Scalar(-1));
    lanes[lane] = x[i];
    exp2(L::load(lanes)).store(lanes);
    y[i] = lanes[lane];
  }
  return y;
}

TYPED_TEST(Component, PowersOfTwoAreThoseOfTheFormatsPrecision) {
  using Limits = std::numeric_limits<TypeParam>;
  Random random(11);
  std::vector<TypeParam> x;
  for (int i = 0; i < 60000; ++i) {
    const double size = random.uniform() * (i % 3 == 0 ? 126 : i % 3 == 1 ? 2 : 1e-6);
    x.push_back(static_cast<TypeParam>(-size));
  }
  for (int i = 0; i <= 252; ++i) x.push_back(static_cast<TypeParam>(-i) / 2);
  const std::vector<TypeParam> y = powers_of_two(x);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const TypeParam wanted = std::exp2(x[i]);
    ASSERT_NEAR(static_cast<double>(y[i] / wanted), 1, 3 * this->epsilon) << x[i];
  }
  // No weight is above that of the largest score, and what is hidden has none.
  const TypeParam infinity = Limits::infinity();
  const std::vector<TypeParam> special = powers_of_two<TypeParam>(
      {0, -TypeParam(0), -Limits::denorm_min(), -Limits::min(), -infinity, -Limits::max(),
       TypeParam(Limits::min_exponent - 2), Limits::quiet_NaN()});
  for (const std::size_t i : {0U, 1U}) EXPECT_EQ(special[i], 1);
  for (const std::size_t i : {2U, 3U}) {
    EXPECT_LE(special[i], 1);
    EXPECT_NEAR(static_cast<double>(special[i]), 1, 3 * this->epsilon);
  }
  for (const std::size_t i : {4U, 5U, 6U}) EXPECT_EQ(special[i], 0);
  EXPECT_TRUE(std::isnan(special[7]));
}

// Sizes below, at and above those of tiles, and none.
constexpr std::array<Index, 9> row_counts{0, 1, 7, 8, 16, 17, 33, 100, 200};
constexpr std::array<Index, 7> channel_counts{1, 2, 7, 8, 17, 40, 65};

TYPED_TEST(Component, LinearIsTheProductWithTheTransposedWeight) {
  Random random(1);
  for (const Index rows : row_counts)
    for (const Index in : channel_counts)
      for (const Index out : channel_counts) {
        const auto x = random.array({rows, in});
        const auto weight = random.array({out, in}, 1 / std::sqrt(static_cast<double>(in)));
        const auto bias = random.array({out});
        const local_mha::Linear<TypeParam> with_bias(matrix<TypeParam>(weight),
                                                     vector<TypeParam>(bias));
        const local_mha::Linear<TypeParam> without(matrix<TypeParam>(weight));
        EXPECT_EQ(without.in_features(), in);
        EXPECT_EQ(without.out_features(), out);
        EXPECT_TRUE(support::close(array(without.forward(matrix<TypeParam>(x))),
                                   reference::linear(x, weight), 60 * this->epsilon));
        EXPECT_TRUE(support::close(array(with_bias.forward(matrix<TypeParam>(x))),
                                   reference::linear(x, weight, bias), 60 * this->epsilon));
      }
}

TYPED_TEST(Component, ProjectionOfOnePositionIsTheProductWithTheWeight) {
  Random random(11);
  constexpr Index count = block_rows<TypeParam>;
  for (const Index groups : {1, 3})
    for (const Index in : channel_counts)
      for (const Index group_rows : channel_counts) {
        const auto x = random.array({1, in});
        const auto weight = random.array({groups * group_rows, in});
        const auto expected = reference::linear(x, weight);
        const local_mha::PackedWeight<TypeParam> packed(matrix<TypeParam>(weight), group_rows);
        for (const Index stride : {Index{1}, count}) {
          Vector<TypeParam> lane = Vector<TypeParam>::Constant(in * stride, TypeParam(NAN));
          for (Index c = 0; c < in; ++c) lane[c * stride] = static_cast<TypeParam>(x(0, c));
          auto spread = local_mha::make_block_buffer<TypeParam>(local_mha::spread_size(packed));
          spread_lane(packed, lane.data(), stride, spread.data());
          Array<TypeParam> y({1, groups * group_rows});
          Vector<TypeParam> to(group_rows * stride);
          for (Index g = 0; g < groups; ++g) {
            project_lane(packed, g, spread.data(), to.data(), stride);
            for (Index r = 0; r < group_rows; ++r) y(0, g * group_rows + r) = to[r * stride];
          }
          EXPECT_TRUE(support::close(y, expected, 60 * this->epsilon * static_cast<double>(in)));

          // Groups together, and a part of a group: the same numbers.
          if (stride != 1) continue;
          Array<TypeParam> together({1, groups * group_rows}, TypeParam(NAN));
          project_lane(packed, {0, 1}, spread.data(), together.data.data());
          project_lane(packed, {1, groups}, spread.data(), together.data.data() + group_rows);
          EXPECT_EQ(together.data, y.data);
          project_lane(packed, {0, groups}, spread.data(), together.data.data());
          EXPECT_EQ(together.data, y.data);
          const Index end = std::min<Index>(group_rows, 3 * packed.panel_rows);
          to.setConstant(TypeParam(NAN));
          project_lane(packed, groups - 1, {packed.panel_rows, end}, spread.data(), to.data(), 1);
          for (Index r = packed.panel_rows; r < end; ++r)
            EXPECT_EQ(to[r], y(0, (groups - 1) * group_rows + r));
        }
      }
}

TYPED_TEST(Component, LayerNormNormalizesEachRow) {
  Random random(2);
  for (const Index rows : row_counts)
    for (const Index dim : {3, 4, 8, 17, 64, 130}) {
      const auto weight = random.array({dim}), bias = random.array({dim});
      auto x = random.array({rows, dim}, 3);
      for (double& value : x.data) value += 2;
      const local_mha::LayerNorm<TypeParam> norm(vector<TypeParam>(weight),
                                                 vector<TypeParam>(bias));
      const auto exact = reference::layer_norm(x, weight, bias);
      const auto naive =
          reference::layer_norm(reference::cast<TypeParam>(x), reference::cast<TypeParam>(weight),
                                reference::cast<TypeParam>(bias));
      EXPECT_TRUE(support::close(array(norm.forward(matrix<TypeParam>(x))), exact,
                                 2 * support::largest_error(naive, exact) + 60 * this->epsilon))
          << rows << " rows of " << dim;
    }
}

TYPED_TEST(Component, LayerNormOfAConstantRowIsItsBias) {
  // The variance is 0; eps keeps the quotient finite.
  const RowMatrix<TypeParam> x = RowMatrix<TypeParam>::Constant(5, 8, TypeParam(3));
  Vector<TypeParam> bias(8);
  for (Index c = 0; c < 8; ++c) bias[c] = static_cast<TypeParam>(c);
  const local_mha::LayerNorm<TypeParam> norm(Vector<TypeParam>::Ones(8), bias);
  EXPECT_EQ(norm.forward(x), RowMatrix<TypeParam>(bias.transpose().replicate(5, 1)));
}

TYPED_TEST(Component, RmsNormDividesEachRowByItsRootMeanSquare) {
  Random random(9);
  for (const Index rows : row_counts)
    for (const Index dim : channel_counts) {
      const auto x = random.array({rows, dim});
      const auto weight = random.array({dim});
      const local_mha::RmsNorm<TypeParam> norm(vector<TypeParam>(weight), 0.25);
      const auto exact = reference::rms_norm(x, weight, 0.25);
      EXPECT_TRUE(support::close(array<TypeParam>(norm.forward(matrix<TypeParam>(x))), exact,
                                 20 * this->epsilon * (1 + support::largest(exact))));
    }
}

TYPED_TEST(Component, QkNormGivesRowsOfLengthOneTimesTheScale) {
  Random random(3);
  for (const Index rows : row_counts)
    for (const Index d : channel_counts) {
      const auto x = random.array({rows, d}), scale = random.array({d});
      const local_mha::QkNorm<TypeParam> norm(vector<TypeParam>(scale));
      EXPECT_TRUE(support::close(array(norm.forward(matrix<TypeParam>(x))),
                                 reference::qk_norm(x, scale), 20 * this->epsilon));
    }
}

TYPED_TEST(Component, QkNormOfZeroIsZeroAndOfTinyRowsIsLimited) {
  RowMatrix<TypeParam> x = RowMatrix<TypeParam>::Zero(3, 4);
  x(1, 2) = TypeParam(1e-13);  // shorter than 1e-12
  x(2, 2) = TypeParam(1e-11);
  const local_mha::QkNorm<TypeParam> norm(Vector<TypeParam>::Ones(4));
  const RowMatrix<TypeParam> y = norm.forward(x);
  EXPECT_EQ(y.row(0).norm(), 0);
  EXPECT_NEAR(y(1, 2), 0.1, 1e-5);
  EXPECT_NEAR(y(2, 2), 1, 1e-5);
}

TYPED_TEST(Component, RotaryEmbeddingScoresDependOnTheDistanceAlone) {
  constexpr auto count = static_cast<double>(block_rows<TypeParam>);
  const double underflow =
      std::numeric_limits<TypeParam>::min() * (std::max)(1e9, std::pow(3.5, count));
  for (const Index d : {2, 6, 64})
    for (const double base : {0.0, 1.0, 8.0, 100.0}) {
      std::optional<double> xpos;
      if (base > 0) xpos = base;
      const local_mha::RotaryEmbedding<TypeParam> rotary(d, xpos);
      const Index group = rotary.group();
      ASSERT_EQ(group % block_rows<TypeParam>, 0);
      Random random(static_cast<std::uint64_t>(d));
      const auto q = random.array({group, d}), k = random.array({group, d});
      const RowMatrix<TypeParam> keys = rotary.rotate_keys(matrix<TypeParam>(k));
      const reference::AttentionOptions options{
          .rotary = true, .xpos = base > 0, .xpos_scale_base = base};
      reference::Rotation<double> rotation(options, d);
      for (const Index distance : {Index{0}, group, 2 * group, -group, 3 * group + 5}) {
        const RowMatrix<TypeParam> queries = rotary.rotate_queries(matrix<TypeParam>(q), distance);
        for (Index i = 0; i < group; i += 5)
          for (Index j = 0; j < group; j += 3) {
            double score = 0;
            for (Index c = 0; c < d; ++c)
              score += static_cast<double>(queries(i, c)) * static_cast<double>(keys(j, c));
            double magnitude = 0;
            const double expected =
                reference::raw_score(options, rotation, q.data.data() + i * d,
                                     k.data.data() + j * d, d, i + distance, j, magnitude);
            // Three turns, each a few roundings, of angles up to 800 that are rounded, too; and
            // what falls below the normal numbers before the key's inverse decay enlarges it, which
            // is at most that of a block by 0.4 / 1.4 a position: 1e9 for 16 positions.
            ASSERT_NEAR(score, expected, 200 * this->epsilon * magnitude + underflow)
                << "d " << d << ", base " << base << ", distance " << i + distance - j;
          }
      }
    }
}

TYPED_TEST(Component, AttentionKernelGivesTheOutputAndItsLogSumExp) {
  constexpr Index count = block_rows<TypeParam>;
  for (const Index n : {1, 15, 16, 40})
    for (const bool causal : {false, true}) {
      const Index d = 6;
      Random random(static_cast<std::uint64_t>(n));
      reference::AttentionInputs<double> in;
      in.q = random.array({1, 1, n, d}), in.k = random.array({1, 1, n, d});
      in.v = random.array({1, 1, n, d});
      in.masked.assign(static_cast<std::size_t>(n), 0);
      for (Index i = 0; i < n / 2; ++i) in.masked[static_cast<std::size_t>(i)] = i % 3 != 1;
      const local_mha::LocalAttentionConfig config{.window_size = 5, .causal = causal};
      const auto expected = reference::attention(support::options(config), in);

      const Index blocks = (n + count - 1) / count;
      local_mha::Ring<TypeParam> keys(d, blocks), values(d, blocks);
      const auto load = [&](const Array<double>& rows, Index block, TypeParam* to) {
        for (Index c = 0; c < d; ++c)
          for (Index r = 0; r < count; ++r)
            to[c * count + r] = block * count + r < n
                                    ? static_cast<TypeParam>(rows(0, 0, block * count + r, c))
                                    : TypeParam(0);
      };
      for (Index block = 0; block < blocks; ++block) {
        load(in.k, block, keys[block]);
        load(in.v, block, values[block]);
        values.note_finite(block);
      }
      const local_mha::Window window(config);
      local_mha::AttentionHead<TypeParam> head;
      head.window = &window;
      head.seqlen = n;
      head.queries = {0, n};
      head.masked = in.masked.data();
      head.queries = {0, n};
      head.unmasked = {0, n};
      local_mha::AttentionKernel<TypeParam> kernel(d, n);
      auto queries = local_mha::make_block_buffer<TypeParam>(d * count);
      auto out =
          local_mha::make_block_buffer<TypeParam>(local_mha::padded_channels<TypeParam>(d) * count);
      auto lse = local_mha::make_block_buffer<TypeParam>(2 * count);
      for (Index block = 0; block < blocks; ++block) {
        load(in.q, block, queries.data());
        for (TypeParam& q : queries)
          q *= static_cast<TypeParam>(1.4426950408889634 / std::sqrt(6.0));  // log2(e) / √d
        kernel.attend(head, block * count, queries.data(), keys, values, out.data(), lse.data());
        for (Index r = 0; r < count && block * count + r < n; ++r) {
          const Index i = block * count + r;
          const double of_row = expected.lse(0, 0, i);
          if (std::isinf(of_row))
            EXPECT_EQ(lse[static_cast<std::size_t>(r)], of_row) << i;
          else
            EXPECT_NEAR(lse[static_cast<std::size_t>(r)], of_row, 40 * this->epsilon) << i;
          for (Index c = 0; c < d; ++c)
            EXPECT_NEAR(out[static_cast<std::size_t>(c * count + r)], expected.out(0, 0, i, c),
                        40 * this->epsilon);
        }
      }
    }
}

TYPED_TEST(Component, FeedForwardIsGEGLUBetweenProjections) {
  Random random(4);
  for (const Index rows : {0, 1, 17, 150})
    for (const Index dim : {4, 9, 24})
      for (const Index inner : {1, 8, 21, 64}) {
        auto parameters = local_mha::FeedForwardParameters<TypeParam>::zeros(dim, inner);
        const auto values = support::random_parameters(random, support::named<double>(parameters));
        support::assign(parameters, values);
        const auto x = random.array({rows, dim});
        const auto exact = reference::feed_forward(values, x);
        const auto naive = reference::feed_forward(reference::cast<TypeParam>(values),
                                                   reference::cast<TypeParam>(x));
        const local_mha::FeedForward<TypeParam> feed_forward(parameters);
        EXPECT_TRUE(support::close(array(feed_forward.forward(matrix<TypeParam>(x))), exact,
                                   2 * support::largest_error(naive, exact) +
                                       20 * this->epsilon * (1 + support::largest(exact))))
            << rows << ' ' << dim << ' ' << inner;
      }
}

TYPED_TEST(Component, FeedForwardDropsHiddenActivationsInTraining) {
  Random random(5);
  auto parameters = local_mha::FeedForwardParameters<TypeParam>::zeros(6, 20);
  support::assign(parameters,
                  support::random_parameters(random, support::named<double>(parameters)));
  const local_mha::FeedForward<TypeParam> feed_forward(parameters, 0.3);
  const auto x = matrix<TypeParam>(random.array({30, 6}));
  const RowMatrix<TypeParam> evaluated = feed_forward.forward(x);
  RowMatrix<double> mean = RowMatrix<double>::Zero(30, 6), squares = mean;
  constexpr int seeds = 2000;
  for (int seed = 0; seed < seeds; ++seed) {
    const RowMatrix<double> y =
        feed_forward
            .forward(x, {.training = local_mha::Training{.seed = static_cast<std::uint64_t>(seed)}})
            .template cast<double>();
    mean += y / seeds;
    squares += y.cwiseProduct(y) / seeds;
  }
  for (Index i = 0; i < mean.size(); ++i) {
    const double variance = squares.data()[i] - mean.data()[i] * mean.data()[i];
    EXPECT_GT(variance, 0);
    EXPECT_NEAR(mean.data()[i], static_cast<double>(evaluated.data()[i]),
                5 * std::sqrt(std::max(0.0, variance) / seeds));
  }
}

TYPED_TEST(Component, DynamicPositionBiasIsAnMLPOfTheDistance) {
  Random random(6);
  for (const Index hidden : {1, 6, 17})
    for (const Index heads : {1, 3}) {
      auto parameters = local_mha::DynamicPositionBiasParameters<TypeParam>::zeros(hidden, heads);
      const auto values = support::random_parameters(random, support::named<double>(parameters));
      support::assign(parameters, values);
      const local_mha::DynamicPositionBias<TypeParam> bias(parameters);
      EXPECT_EQ(bias.heads(), heads);
      for (const auto& [w, lb, lf] : std::vector<std::array<Index, 3>>{
               {1, 0, 0}, {1, 1, 1}, {5, 1, 0}, {4, 2, 3}, {7, 0, 2}}) {
        const auto exact = reference::dynamic_position_bias(values, w, lb, lf);
        const auto naive =
            reference::dynamic_position_bias(reference::cast<TypeParam>(values), w, lb, lf);
        EXPECT_TRUE(support::close(support::array(bias.forward(w, lb, lf)), exact,
                                   4 * support::largest_error(naive, exact) +
                                       20 * this->epsilon * (1 + support::largest(exact))));
      }
    }
}

TYPED_TEST(Component, CrossEntropyIsTheMeanOverTheLabelsThatCount) {
  Random random(7);
  const auto logits = random.array({3, 5, 6}, 10);
  Array<Int> labels({3, 5});
  for (Int& label : labels.data) label = random.integer(0, 5);
  labels(0, 0) = labels(1, 4) = labels(2, 2) = -100;
  EXPECT_NEAR(local_mha::cross_entropy<TypeParam>(support::tensor<TypeParam, 3>(logits),
                                                  support::tensor<std::int64_t, 2>(labels), -100),
              reference::cross_entropy(logits, labels, -100), 100 * this->epsilon);
  // As in PyTorch, the mean of nothing.
  EXPECT_TRUE(std::isnan(local_mha::cross_entropy<TypeParam>(
      support::tensor<TypeParam, 3>(logits),
      support::tensor<std::int64_t, 2>(Array<Int>({3, 5}, -1)), -1)));
}

TEST(WindowGeometry, EqualsTheReferencePredicate) {
  for (const Index w : {1, 2, 3, 5, 16})
    for (const Index lb : {0, 1, 3})
      for (const Index lf : {0, 1, 2})
        for (const bool exact : {false, true})
          for (const bool causal : {false, true})
            for (const Index first : {0, 1, 7, 10'000'000}) {
              if (causal && lf > 0) continue;
              local_mha::LocalAttentionConfig config{.window_size = w, .causal = causal};
              config.look_backward = lb;
              config.look_forward = lf;
              config.exact_windowsize = exact;
              const local_mha::Window window(config, w, first);
              const reference::AttentionOptions options =
                  support::options(config, support::AttentionOptions{.first_position = first});
              EXPECT_EQ(window.size(), w);
              EXPECT_EQ(window.look_around(), (1 + lb + lf) * w);
              EXPECT_EQ(window.behind(), lb * w);
              EXPECT_EQ(window.ahead(), lf * w);
              for (Index i = 0; i < 40; ++i) {
                EXPECT_EQ(window.place_in_bucket(i), (first + i) % w);
                EXPECT_EQ(window.look_around_begin(i), ((first + i) / w - lb) * w - first);
                for (Index j = 0; j < 40; ++j) {
                  ASSERT_EQ(window.attends(i, j), reference::sees(options, i, j))
                      << "w " << w << ", lb " << lb << ", lf " << lf << ", exact " << exact
                      << ", causal " << causal << ", first " << first << ": " << i << ' ' << j;
                  if (window.attends(i, j)) {
                    EXPECT_LE(i - j, window.reach_behind());
                    EXPECT_LE(j - i, window.reach_ahead());
                  }
                }
                const local_mha::Range keys = window.keys_of({i, i + 5}, 40);
                for (Index j = 0; j < 40; ++j) {
                  bool any = false;
                  for (Index query = i; query < i + 5; ++query)
                    any = any || reference::sees(options, query, j);
                  EXPECT_EQ(keys.contains(j), any);
                }
              }
            }
}

TEST(WindowGeometry, OfHugeWindowsDoesNotOverflow) {
  for (const Index w :
       {Index{1} << 30, Index{1} << 50, Index{1} << 62, std::numeric_limits<Index>::max()})
    for (const bool exact : {false, true}) {
      local_mha::LocalAttentionConfig config{.window_size = w};
      config.look_backward = config.look_forward.emplace(1 << 20);
      config.exact_windowsize = exact;
      const local_mha::Window window(config, w, 5);
      for (const Index i : {Index{0}, Index{17}, Index{1} << 40}) {
        EXPECT_TRUE(window.attends(i, 0));
        EXPECT_TRUE(window.attends(i, i));
        EXPECT_TRUE(window.attends(0, i) || i > w);
      }
    }
}

TEST(PaddingMasks, SayTheirPolarity) {
  local_mha::Tensor<bool, 2> flags(2, 3);
  flags.setValues({{true, false, false}, {false, true, true}});
  const auto masked = local_mha::PaddingMask::masked(flags);
  const auto keep = local_mha::PaddingMask::keep(flags);
  ASSERT_TRUE(masked && keep);
  EXPECT_EQ(masked.shape(), (std::array<Index, 2>{2, 3}));
  for (Index b = 0; b < 2; ++b)
    for (Index i = 0; i < 3; ++i) {
      EXPECT_EQ(masked.row(b)[i], flags(b, i) ? 1 : 0);
      EXPECT_EQ(keep.row(b)[i], flags(b, i) ? 0 : 1);
    }
  const auto view = local_mha::PaddingMask::masked_view(flags);
  const auto copy = view;
  ASSERT_TRUE(view);
  EXPECT_EQ(view.shape(), (std::array<Index, 2>{2, 3}));
  for (Index b = 0; b < 2; ++b)
    for (Index i = 0; i < 3; ++i) EXPECT_EQ(copy.row(b)[i], flags(b, i) ? 1 : 0);
  EXPECT_EQ(static_cast<const void*>(view.row(0)), static_cast<const void*>(flags.data()));
  const std::vector<Index> lengths{2, 0, 3};
  const auto by_length = local_mha::PaddingMask::from_lengths(lengths, 3);
  EXPECT_EQ(by_length.shape(), (std::array<Index, 2>{3, 3}));
  for (Index b = 0; b < 3; ++b)
    for (Index i = 0; i < 3; ++i)
      EXPECT_EQ(by_length.row(b)[i], i < lengths[static_cast<std::size_t>(b)] ? 0 : 1);
  EXPECT_FALSE(local_mha::PaddingMask());
  EXPECT_EQ(local_mha::PaddingMask().row(0), nullptr);
}

TEST(PaddingMasks, OfEachPolarityGiveTheSameAttention) {
  Random random(8);
  const auto q = support::tensor<float, 4>(random.array({2, 1, 12, 4}));
  const std::vector<Index> lengths{5, 12};
  local_mha::Tensor<bool, 2> is_padding(2, 12), is_token(2, 12);
  for (Index b = 0; b < 2; ++b)
    for (Index i = 0; i < 12; ++i) {
      is_padding(b, i) = i >= lengths[static_cast<std::size_t>(b)];
      is_token(b, i) = !is_padding(b, i);
    }
  const local_mha::LocalAttention<float> attention({.window_size = 4});
  const auto y =
      attention.forward(q, q, q, {.mask = local_mha::PaddingMask::from_lengths(lengths, 12)});
  EXPECT_TRUE(support::same_bits(
      y, attention.forward(q, q, q, {.mask = local_mha::PaddingMask::masked(is_padding)})));
  EXPECT_TRUE(support::same_bits(
      y, attention.forward(q, q, q, {.mask = local_mha::PaddingMask::keep(is_token)})));
  EXPECT_TRUE(support::same_bits(
      y, attention.forward(q, q, q, {.mask = local_mha::PaddingMask::masked_view(is_padding)})));
  EXPECT_FALSE(support::same_bits(y, attention.forward(q, q, q)));
}

TEST(PhiloxGenerator, GivesThePublishedNumbers) {
  // The known answers of the Random123 distribution for philox4x32-10.
  using Counter = local_mha::Philox::Counter;
  EXPECT_EQ(local_mha::Philox(0)({0, 0, 0, 0}),
            (Counter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(local_mha::Philox(0xffffffffffffffff)({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}),
            (Counter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(local_mha::Philox(0x299f31d0a4093822)({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}),
            (Counter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TYPED_TEST(Component, PhiloxOfCountersSideBySideIsThatOfEachAlone) {
  using Side = local_mha::Words<TypeParam>;
  const local_mha::Philox philox(0x299f31d0a4093822);
  const std::uint32_t first = 0x243f6a88;
  typename Side::Word words[4];
  philox.apply<Side>(Side::from(first), {0x85a308d3, 0x13198a2e, 0x03707344}, words);
  for (int i = 0; i < Side::count; ++i) {
    const auto alone =
        philox({first + static_cast<std::uint32_t>(i), 0x85a308d3, 0x13198a2e, 0x03707344});
    for (int word = 0; word < 4; ++word) {
      std::uint32_t side_by_side[Side::count];
      std::memcpy(side_by_side, &words[word], sizeof side_by_side);
      EXPECT_EQ(side_by_side[i], alone[static_cast<std::size_t>(word)]) << i << ", " << word;
    }
  }
}

}  // namespace components_test
