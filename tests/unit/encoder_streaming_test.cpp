// SPDX-License-Identifier: MIT
// The stream of an encoder: at every position what forward() of the whole sequence gives, whatever
// its layers see, however it is cut, after going back, and from a saved state.
#define EIGEN_USE_THREADS
#include "support/allocations.hpp"  // before Eigen

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "support/library.hpp"
#include "support/random_encoder.hpp"

namespace encoder_streaming_test {

using local_mha::Encoder;
using local_mha::EncoderConfig;
using local_mha::Index;
using local_mha::PaddingMask;
using local_mha::StreamConfig;
using local_mha::Tensor;
using support::RandomEncoder;

template <typename Scalar>
class AnEncoderStream : public testing::Test {
 protected:
  using OwnStream = typename Encoder<Scalar>::Stream;
  static constexpr double tolerance = 2e4 * std::numeric_limits<Scalar>::epsilon();
};
TYPED_TEST_SUITE(AnEncoderStream, support::Scalars, support::ScalarNames);

template <typename Scalar>
Tensor<Scalar, 3> positions(const Tensor<Scalar, 3>& t, Index begin, Index n) {
  const Eigen::array<Index, 3> offset{0, begin, 0};
  const Eigen::array<Index, 3> extent{t.dimension(0), n, t.dimension(2)};
  return t.slice(offset, extent);
}

PaddingMask positions(const std::vector<unsigned char>& masked, Index batch, Index begin, Index n) {
  if (masked.empty()) return {};
  const Index all = static_cast<Index>(masked.size()) / batch;
  Tensor<bool, 2> flags(batch, n);
  for (Index b = 0; b < batch; ++b)
    for (Index i = 0; i < n; ++i)
      flags(b, i) = masked[static_cast<std::size_t>(b * all + begin + i)] != 0;
  return PaddingMask::masked(flags);
}

/// The results that a stream has given, compared with those of a forward pass.
template <typename Scalar>
class Given {
 public:
  Given(const Tensor<Scalar, 3>& expected, double tolerance)
      : expected_(expected),
        tolerance_(tolerance * static_cast<double>(support::largest(support::array(expected)))) {}

  void take(const Tensor<Scalar, 3>& y) {
    ASSERT_LE(end_ + y.dimension(1), expected_.dimension(1));
    EXPECT_TRUE(support::close(
        support::array(y), support::array(positions(expected_, end_, y.dimension(1))), tolerance_))
        << "from " << end_;
    end_ += y.dimension(1);
  }
  void go_back_to(Index end) { end_ = end; }
  Index end() const { return end_; }

 private:
  const Tensor<Scalar, 3>& expected_;
  double tolerance_;
  Index end_ = 0;
};

TYPED_TEST(AnEncoderStream, GivesWhatForwardGives) {
  using Stream = typename TestFixture::OwnStream;
  for (std::uint64_t seed = 100; seed < 140; ++seed) {
    SCOPED_TRACE(seed);
    RandomEncoder c(seed);
    const auto encoder = c.encoder<TypeParam>();
    const auto x = c.input<TypeParam>();
    const Index batch = x.dimension(0), n = x.dimension(1);
    const auto expected = encoder.forward(x, {.mask = c.mask()});
    Stream stream(encoder, {.batch = batch, .max_rollback = c.random.integer(0, 20)});
    for (int pass = 0; pass < 2; ++pass) {
      Given<TypeParam> given(expected, this->tolerance);
      for (Index i = 0; i < n;) {
        const Index some = std::min<Index>(n - i, c.random.integer(0, 12));
        const Index announced = stream.results_of(some);
        const auto y =
            stream.push(positions(x, i, some), {.mask = positions(c.masked, batch, i, some)});
        EXPECT_EQ(y.dimension(1), announced);
        given.take(y);
        i += some;
        EXPECT_EQ(stream.position(), i);
        EXPECT_EQ(stream.answered(), given.end());
        if (c.random.chance(0.2)) {
          const Index back = c.random.integer(0, stream.most_rollback());
          stream.rollback(back);
          i -= back;
          given.go_back_to(stream.answered());
        }
        if (c.random.chance(0.2)) {
          std::stringstream state;
          stream.save(state);
          Stream other(encoder, {.batch = batch});
          EXPECT_NO_THROW(other.load(state));
          stream = other;
        }
      }
      given.take(stream.flush());
      EXPECT_EQ(given.end(), n);
      stream.reset();
    }
  }
}

/// Layers of which some are causal, and others see ahead.
EncoderConfig mixed(Index streams) {
  EncoderConfig config{.depth = 4, .layers = {{.dim = 6, .window_size = 3}}};
  config.layers[0].dim_head = 4;
  config.layers[0].heads = 2;
  config.layers[0].prenorm = true;
  config.layers.resize(4, config.layers[0]);
  config.layers[0].causal = config.layers[3].causal = true;
  config.layers[2].window_size = 0;
  config.layers[2].token_window = {4, 2};
  config.num_residual_streams = streams;
  return config;
}

// What the layers see ahead adds up: 3 and 2.
TEST(EncoderStreamDelay, IsTheSumOfTheLayers) {
  const Encoder<float> encoder(mixed(2), 1);
  Encoder<float>::Stream stream(encoder);
  EXPECT_EQ(stream.results_of(5), 0);
  EXPECT_EQ(stream.results_of(6), 1);
  EncoderConfig causal = mixed(1);
  causal.layers = {causal.layers[0]};
  EXPECT_EQ(Encoder<float>::Stream(Encoder<float>(causal)).results_of(1), 1);
}

// Sequences at different places, on threads.
TYPED_TEST(AnEncoderStream, TakesEachSequenceOnItsOwn) {
  using Stream = typename TestFixture::OwnStream;
  const Encoder<TypeParam> encoder(mixed(3), 1);
  const auto x = support::tensor<TypeParam, 3>(Random(1).array({3, 30, 6}));
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  Stream one(encoder, {.batch = 3});
  Stream many(encoder, {.batch = 3, .max_threads = 3});
  for (Index i = 0; i < 30; i += 5) {
    if (i == 15) {
      one.reset(1);
      many.reset(1);
    }
    EXPECT_TRUE(support::same_bits(many.push(positions(x, i, 5), {.device = device}),
                                   one.push(positions(x, i, 5))));
  }
  EXPECT_EQ(one.position(0), 30);
  EXPECT_EQ(one.position(1), 15);
  const auto y = one.flush();
  EXPECT_TRUE(support::same_bits(many.flush(device), y));
  // The sequence that began anew.
  const Tensor<TypeParam, 3> later = positions(x, 15, 15);
  const auto expected = encoder.forward(later);
  const Index left = 15 - 10;
  for (Index i = 0; i < left; ++i)
    for (Index c = 0; c < 6; ++c)
      EXPECT_NEAR(static_cast<double>(y(1, i, c)), static_cast<double>(expected(1, 10 + i, c)),
                  1e-4);
}

TYPED_TEST(AnEncoderStream, GoesOnWithTheWeightsThatItWasMadeWith) {
  using Stream = typename TestFixture::OwnStream;
  const auto x = support::tensor<TypeParam, 3>(Random(1).array({1, 20, 6}));
  Encoder<TypeParam> encoder(mixed(2), 1);
  const auto expected = encoder.forward(x);
  Stream stream(encoder);
  encoder.set_parameters(Encoder<TypeParam>(mixed(2), 2).parameters());
  Given<TypeParam> given(expected, this->tolerance);
  given.take(stream.push(x));
  given.take(stream.flush());
}

TYPED_TEST(AnEncoderStream, RefusesTheStateOfAnother) {
  using Stream = typename TestFixture::OwnStream;
  const Encoder<TypeParam> encoder(mixed(2), 1);
  const auto x = support::tensor<TypeParam, 3>(Random(1).array({1, 9, 6}));
  Stream stream(encoder);
  stream.push(x);
  std::stringstream out;
  stream.save(out);
  const std::string state = out.str();
  for (const Index streams : {1, 3}) {
    Stream other(Encoder<TypeParam>(mixed(streams), 1));
    std::stringstream in(state);
    EXPECT_THROW(other.load(in), std::invalid_argument);
  }
  for (const std::size_t size : {std::size_t{0}, state.size() / 2, state.size() - 1}) {
    std::stringstream in(state.substr(0, size));
    EXPECT_THROW(stream.load(in), std::invalid_argument);
  }
  EXPECT_EQ(stream.position(), 9);
}

// Without a device a stream allocates nothing, and forward_into() nothing when it is repeated.
TYPED_TEST(AnEncoderStream, AndItsEncoderAllocateNothing) {
  using Stream = typename TestFixture::OwnStream;
  for (const Index streams : {1, 4}) {
    EncoderConfig config = mixed(streams);
    config.ff_dropout = 0.1;
    const Encoder<TypeParam> encoder(config, 1);
    const auto x = support::tensor<TypeParam, 3>(Random(1).array({2, 90, 6}));
    Tensor<TypeParam, 3> y(2, 90, 6);
    Stream stream(encoder, {.batch = 2});
    for (const Index n : {1, 7, 90}) {
      const auto part = positions(x, 0, n);
      Tensor<TypeParam, 3> some(2, stream.results_of(n), 6);
      EXPECT_EQ(support::allocations_of([&] { stream.push_into(some, part); }), 0) << n;
    }
    Tensor<TypeParam, 3> last(2, stream.results_of_flush(), 6);
    EXPECT_EQ(support::allocations_of([&] { stream.flush_into(last); }), 0);

    Eigen::ThreadPool pool(3);
    const Eigen::ThreadPoolDevice device(&pool, 3);
    typename Encoder<TypeParam>::Workspace alone, on_threads;
    const local_mha::Training training{.seed = 1};
    encoder.forward_into(y, alone, x, {.training = training});
    encoder.forward_into(y, on_threads, x, {.training = training, .device = device});
    for (const Index n : {90, 13, 90}) {
      const auto part = positions(x, 0, n);
      Tensor<TypeParam, 3> to(2, n, 6);
      EXPECT_EQ(support::allocations_of(
                    [&] { encoder.forward_into(to, alone, part, {.training = training}); }),
                0)
          << n;
      if (n == 13)
        encoder.forward_into(to, on_threads, part, {.training = training, .device = device});
      EXPECT_EQ(support::allocations_of([&] {
                  encoder.forward_into(to, on_threads, part,
                                       {.training = training, .device = device});
                }),
                0)
          << n;
    }
  }
}

}  // namespace encoder_streaming_test
