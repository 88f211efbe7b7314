// SPDX-License-Identifier: MIT
// Streams of LocalMHA and LocalAttention: whatever the chunks, and whatever happened in between,
// the results are those of the full forward pass.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace streaming_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::PaddingMask;
using local_mha::StreamConfig;
using local_mha::Tensor;
using reference::Array;
using reference::Int;
using support::Length;
using support::tensor;

/// What the results of a stream may differ from the full forward pass, relative to the largest.
template <typename Scalar>
constexpr double tolerance = std::is_same_v<Scalar, float> ? 2e-5 : 1e-12;

/// A layer, or an attention, behind one face: sequences of rows of numbers in and out.
template <typename Scalar>
struct Subject {
  virtual ~Subject() = default;
  virtual Index in_columns() const = 0;
  virtual Index out_columns() const = 0;
  /// \param rows `[n][in_columns]`; \param masked `[n]`, or empty
  /// \return `[n][out_columns]`
  virtual std::vector<Scalar> forward(const std::vector<Scalar>& rows,
                                      const std::vector<unsigned char>& masked) const = 0;

  struct Stream {
    virtual ~Stream() = default;
    /// \param rows `[B][n][in_columns]`; the results are `[B][m][out_columns]`
    virtual std::vector<Scalar> push(const std::vector<Scalar>& rows, Index n,
                                     const std::vector<unsigned char>& masked) = 0;
    virtual std::vector<Scalar> flush() = 0;
    virtual local_mha::SequenceStream<Scalar>& base() = 0;
  };
  virtual std::unique_ptr<Stream> stream(const StreamConfig& config) const = 0;
};

template <typename Scalar, int Rank>
std::vector<Scalar> values(const Tensor<Scalar, Rank>& t) {
  return {t.data(), t.data() + t.size()};
}

template <typename Scalar>
struct LayerSubject : Subject<Scalar> {
  explicit LayerSubject(const support::LayerCase& c)
      : mha(c.config, support::layer_parameters<Scalar>(c.config, c.parameters)),
        bias(support::bias_tensor<Scalar>(c.in.bias)) {}

  Index in_columns() const override { return mha.config().dim; }
  Index out_columns() const override { return mha.config().dim; }
  std::vector<Scalar> forward(const std::vector<Scalar>& rows,
                              const std::vector<unsigned char>& masked) const override {
    const Index n = static_cast<Index>(rows.size()) / in_columns();
    return values(
        mha.forward(local_mha::TensorView<const Scalar, 3>(rows.data(), {1, n, in_columns()}),
                    support::padding_mask(masked, 1, n), support::optional_view(bias)));
  }

  struct Stream : Subject<Scalar>::Stream {
    Stream(const LayerSubject& s, const StreamConfig& config)
        : stream(s.mha, config, support::optional_view(s.bias)), dim(s.in_columns()) {}
    std::vector<Scalar> push(const std::vector<Scalar>& rows, Index n,
                             const std::vector<unsigned char>& masked) override {
      return values(
          stream.push(local_mha::TensorView<const Scalar, 3>(rows.data(), {stream.batch(), n, dim}),
                      {.mask = support::padding_mask(masked, stream.batch(), n)}));
    }
    std::vector<Scalar> flush() override { return values(stream.flush()); }
    local_mha::SequenceStream<Scalar>& base() override { return stream; }
    typename LocalMHA<Scalar>::Stream stream;
    Index dim;
  };
  std::unique_ptr<typename Subject<Scalar>::Stream> stream(
      const StreamConfig& config) const override {
    return std::make_unique<Stream>(*this, config);
  }

  LocalMHA<Scalar> mha;
  Tensor<Scalar, 3> bias;
};

/// A row is that of the queries of all heads, then the keys, then the values.
template <typename Scalar>
struct AttentionSubject : Subject<Scalar> {
  explicit AttentionSubject(const support::AttentionCase& c)
      : attention(c.config),
        heads(c.in.q.shape[1]),
        d(c.in.q.shape[3]),
        bias(support::bias_tensor<Scalar>(c.in.bias)),
        call(c.call) {}

  Index in_columns() const override { return 3 * heads * d; }
  Index out_columns() const override { return heads * d; }

  /// Part 0, 1 or 2 of rows `[batch][n]`: `[batch, heads, n, d]`.
  static Tensor<Scalar, 4> part(const AttentionSubject& s, const std::vector<Scalar>& rows,
                                Index batch, Index n, Index which) {
    Tensor<Scalar, 4> t(batch, s.heads, n, s.d);
    for (Index b = 0; b < batch; ++b)
      for (Index h = 0; h < s.heads; ++h)
        for (Index i = 0; i < n; ++i)
          for (Index c = 0; c < s.d; ++c)
            t(b, h, i, c) = rows[static_cast<std::size_t>(
                ((b * n + i) * 3 + which) * s.heads * s.d + h * s.d + c)];
    return t;
  }
  static std::vector<Scalar> rows_of(const Tensor<Scalar, 4>& t) {
    std::vector<Scalar> rows;
    for (Index b = 0; b < t.dimension(0); ++b)
      for (Index i = 0; i < t.dimension(2); ++i)
        for (Index h = 0; h < t.dimension(1); ++h)
          for (Index c = 0; c < t.dimension(3); ++c) rows.push_back(t(b, h, i, c));
    return rows;
  }
  Index which(Index part) const { return attention.config().shared_qk && part == 1 ? 0 : part; }

  std::vector<Scalar> forward(const std::vector<Scalar>& rows,
                              const std::vector<unsigned char>& masked) const override {
    const Index n = static_cast<Index>(rows.size()) / in_columns();
    return rows_of(attention.forward(
        part(*this, rows, 1, n, 0), part(*this, rows, 1, n, which(1)), part(*this, rows, 1, n, 2),
        support::attention_call<Scalar>(call, support::padding_mask(masked, 1, n),
                                        support::optional_view(bias))));
  }

  struct Stream : Subject<Scalar>::Stream {
    Stream(const AttentionSubject& s, const StreamConfig& config)
        : subject(s),
          stream(s.attention, s.heads, s.d, config,
                 support::attention_call<Scalar>(s.call, {}, support::optional_view(s.bias))) {}
    std::vector<Scalar> push(const std::vector<Scalar>& rows, Index n,
                             const std::vector<unsigned char>& masked) override {
      const Index batch = stream.batch();
      return rows_of(stream.push(
          part(subject, rows, batch, n, 0), part(subject, rows, batch, n, subject.which(1)),
          part(subject, rows, batch, n, 2), {.mask = support::padding_mask(masked, batch, n)}));
    }
    std::vector<Scalar> flush() override { return rows_of(stream.flush()); }
    local_mha::SequenceStream<Scalar>& base() override { return stream; }
    const AttentionSubject& subject;
    typename LocalAttention<Scalar>::Stream stream;
  };
  std::unique_ptr<typename Subject<Scalar>::Stream> stream(
      const StreamConfig& config) const override {
    return std::make_unique<Stream>(*this, config);
  }

  LocalAttention<Scalar> attention;
  Index heads, d;
  Tensor<Scalar, 3> bias;
  support::AttentionOptions call;
};

/// What should be in a stream: the rows of each sequence, and the results that came of them.
template <typename Scalar>
struct Ledger {
  struct Sequence {
    std::vector<Scalar> rows, results;
    std::vector<unsigned char> masked;
  };
  std::vector<Sequence> sequences;
};

/// Does random things to a stream, and compares what comes of them with the full forward pass.
template <typename Scalar>
class RandomUse {
 public:
  /// Every 50th seed also pushes many times what comes in at once.
  RandomUse(const Subject<Scalar>& subject, std::uint64_t seed)
      : subject_(subject), random_(seed), masks_(seed % 2 == 0), large_(seed % 50 == 0) {
    config_ = {.batch = random_.integer(1, 3), .max_rollback = random_.integer(0, 40)};
    stream_ = subject.stream(config_);
    ledger_.sequences.resize(static_cast<std::size_t>(config_.batch));
  }

  testing::AssertionResult run(int operations) {
    for (int i = 0; i < operations; ++i) {
      switch (random_.integer(0, 9)) {
        case 0:
        case 1:
          rollback();
          break;
        case 2:
          if (!reset()) return failure_;
          break;
        case 3:
          save_or_load();
          break;
        case 4:
          push_and_take_back();
          break;
        default:
          push(large_ && random_.chance(0.4)
                   ? random_.pick<Index>({700, 4096})
                   : random_.pick<Index>({0, 1, 1, 1, 2, 3, 7, 15, 16, 17, 33, 150}),
               Scalar(0));
      }
      if (!counts_fit()) return failure_;
    }
    add(stream_->flush());
    for (std::size_t b = 0; b < ledger_.sequences.size(); ++b) {
      const auto& [rows, results, masked] = ledger_.sequences[b];
      if (results.size() != masked.size() * out_width())
        return fail() << "sequence " << b << " ends with " << results.size() / out_width()
                      << " results of " << masked.size();
      if (!matches(b)) return failure_;
    }
    return testing::AssertionSuccess();
  }

 private:
  Index batch() const { return config_.batch; }
  auto& base() { return stream_->base(); }
  std::size_t width() const { return static_cast<std::size_t>(subject_.in_columns()); }
  std::size_t out_width() const { return static_cast<std::size_t>(subject_.out_columns()); }

  // Pushes rows of random numbers; every other one is `poison` if that is not 0.
  void push(Index n, Scalar poison) {
    log_ << "push " << n << "; ";
    std::vector<Scalar> rows;
    std::vector<unsigned char> masked;
    const bool with_mask = masks_ && random_.chance(0.5);
    const double share = random_.pick({0.1, 0.5, 1.0});
    for (auto& sequence : ledger_.sequences)
      for (Index i = 0; i < n; ++i) {
        const unsigned char hidden = with_mask && random_.chance(share);
        for (std::size_t c = 0; c < width(); ++c) {
          rows.push_back(static_cast<Scalar>(static_cast<float>(random_.normal())));
          if (poison != Scalar(0) && c % 2 == 0) rows.back() = poison;
        }
        sequence.rows.insert(sequence.rows.end(), rows.end() - static_cast<Index>(width()),
                             rows.end());
        sequence.masked.push_back(hidden);
        if (with_mask) masked.push_back(hidden);
      }
    const Index expected = base().results_of(n);
    const auto results = stream_->push(rows, n, masked);
    EXPECT_EQ(results.size(), static_cast<std::size_t>(batch() * expected) * out_width());
    add(results);
  }

  // The first rows of each sequence's results, as many as have become complete.
  void add(const std::vector<Scalar>& results) {
    const std::size_t room = results.size() / ledger_.sequences.size();
    for (std::size_t b = 0; b < ledger_.sequences.size(); ++b) {
      auto& to = ledger_.sequences[b].results;
      const auto answered = static_cast<std::size_t>(base().answered(static_cast<Index>(b)));
      const auto fresh = static_cast<Index>(answered * out_width() - to.size());
      const auto first = results.begin() + static_cast<Index>(b * room);
      to.insert(to.end(), first, first + fresh);
      for (auto rest = first + fresh; rest != first + static_cast<Index>(room); ++rest)
        EXPECT_EQ(*rest, Scalar(0)) << "behind the results of sequence " << b;
    }
  }

  void forget(std::size_t b, Index n) {
    auto& sequence = ledger_.sequences[b];
    sequence.rows.resize(sequence.rows.size() - static_cast<std::size_t>(n) * width());
    sequence.masked.resize(sequence.masked.size() - static_cast<std::size_t>(n));
    const auto answered = static_cast<std::size_t>(base().answered(static_cast<Index>(b)));
    EXPECT_GE(sequence.results.size(), answered * out_width());
    sequence.results.resize(answered * out_width());
  }

  Index most_rollback() {
    Index most = std::numeric_limits<Index>::max();
    for (Index b = 0; b < batch(); ++b) most = std::min(most, base().most_rollback(b));
    return most;
  }

  // Must change nothing, which the later results show.
  void rollback_too_far() {
    const Index b = random_.integer(0, batch() - 1);
    const Index n = base().most_rollback(b) + random_.pick<Index>({1, 1, 1, 2, 100});
    EXPECT_THROW(base().rollback(b, n), std::invalid_argument) << log_.str();
    EXPECT_THROW(base().rollback(most_rollback() + 1), std::invalid_argument) << log_.str();
  }

  void rollback() {
    if (random_.chance(0.3)) rollback_too_far();
    if (random_.chance(0.3)) {
      const Index b = random_.integer(0, batch() - 1);
      const Index n = random_.integer(0, base().most_rollback(b));
      log_ << "rollback of sequence " << b << " by " << n << "; ";
      base().rollback(b, n);
      forget(static_cast<std::size_t>(b), n);
      return;
    }
    const Index n = random_.integer(0, most_rollback());
    log_ << "rollback by " << n << "; ";
    base().rollback(n);
    for (Index b = 0; b < batch(); ++b) forget(static_cast<std::size_t>(b), n);
  }

  // Numbers that must leave no trace, and an end that is none.
  void push_and_take_back() {
    const Index n = random_.integer(1, std::max<Index>(1, config_.max_rollback));
    if (n > config_.max_rollback) return;
    const auto poison = random_.pick({std::numeric_limits<Scalar>::quiet_NaN(),
                                      std::numeric_limits<Scalar>::infinity(), Scalar(1e30)});
    // Going back is counted from the furthest position, which may lie ahead.
    push(n, poison);
    if (random_.chance(0.3)) {
      log_ << "flush; ";
      add(stream_->flush());
      EXPECT_THROW(
          stream_->push(std::vector<Scalar>(static_cast<std::size_t>(batch()) * width()), 1, {}),
          std::invalid_argument);
    }
    EXPECT_GE(most_rollback(), n) << log_.str();
    log_ << "and back " << n << "; ";
    base().rollback(n);
    for (Index b = 0; b < batch(); ++b) forget(static_cast<std::size_t>(b), n);
  }

  bool reset() {
    if (random_.chance(0.5)) {
      log_ << "reset; ";
      for (std::size_t b = 0; b < ledger_.sequences.size(); ++b)
        if (!matches(b)) return false;
      base().reset();
      ledger_ = {};
      ledger_.sequences.resize(static_cast<std::size_t>(batch()));
    } else {
      const Index b = random_.integer(0, batch() - 1);
      log_ << "reset of sequence " << b << "; ";
      if (!matches(static_cast<std::size_t>(b))) return false;
      base().reset(b);
      ledger_.sequences[static_cast<std::size_t>(b)] = {};
    }
    return true;
  }

  void save_or_load() {
    if (saved_.empty() || random_.chance(0.6)) {
      log_ << "save; ";
      std::ostringstream out;
      base().save(out);
      saved_ = out.str();
      saved_ledger_ = ledger_;
    }
    if (random_.chance(0.5)) return;
    log_ << "load; ";
    if (random_.chance(0.5)) {
      config_.max_rollback = random_.integer(0, 40);
      stream_ = subject_.stream(config_);
    }
    std::istringstream in(saved_);
    base().load(in);
    ledger_ = saved_ledger_;
  }

  bool counts_fit() {
    for (std::size_t b = 0; b < ledger_.sequences.size(); ++b) {
      const auto& sequence = ledger_.sequences[b];
      if (static_cast<Index>(sequence.masked.size()) != base().position(static_cast<Index>(b)) ||
          static_cast<Index>(sequence.results.size() / out_width()) !=
              base().answered(static_cast<Index>(b)))
        return fail() << "sequence " << b << " is at " << base().position(static_cast<Index>(b)),
               false;
    }
    return true;
  }

  bool matches(std::size_t b) {
    const auto& sequence = ledger_.sequences[b];
    const auto expected = subject_.forward(sequence.rows, sequence.masked);
    const double largest = std::max(1.0, static_cast<double>(support::largest(rows(expected))));
    const auto result =
        support::close(rows(sequence.results), rows(expected, sequence.results.size()),
                       tolerance<Scalar> * largest);
    if (!result)
      fail() << "sequence " << b << ", after " << sequence.masked.size()
             << " positions: " << result.message();
    return static_cast<bool>(result);
  }

  // The first `size` numbers, or all, as rows of results.
  Array<Scalar> rows(const std::vector<Scalar>& numbers, std::optional<std::size_t> size = {}) {
    const std::size_t count = size.value_or(numbers.size()) / out_width();
    Array<Scalar> to({static_cast<Int>(count), static_cast<Int>(out_width())});
    std::copy_n(numbers.begin(), std::min(numbers.size(), to.data.size()), to.data.begin());
    return to;
  }

  testing::AssertionResult& fail() {
    failure_ = testing::AssertionFailure() << log_.str();
    return failure_;
  }

  const Subject<Scalar>& subject_;
  Random random_;
  bool masks_;
  bool large_;
  StreamConfig config_;
  std::unique_ptr<typename Subject<Scalar>::Stream> stream_;
  Ledger<Scalar> ledger_;
  std::string saved_;
  Ledger<Scalar> saved_ledger_;
  std::ostringstream log_;
  testing::AssertionResult failure_ = testing::AssertionSuccess();
};

template <typename Scalar>
class Streaming : public testing::Test {};
TYPED_TEST_SUITE(Streaming, support::Scalars, support::ScalarNames);

TYPED_TEST(Streaming, OfTheLayerEqualsForwardWhateverHappens) {
  int failures = 0;
  for (std::uint64_t seed = 1; seed <= random_cases(1500) && failures < 5; ++seed) {
    const auto c = support::layer_case(seed, seed % 10 == 0 ? Length::Long : Length::Short);
    const LayerSubject<TypeParam> subject(c);
    RandomUse<TypeParam> use(subject, seed);
    const auto result = use.run(seed % 10 == 0 ? 12 : 20);
    if (!result) ++failures;
    EXPECT_TRUE(result) << "seed " << seed << ", " << support::describe(c.config);
  }
}

TYPED_TEST(Streaming, OfTheAttentionEqualsForwardWhateverHappens) {
  int failures = 0;
  for (std::uint64_t seed = 1; seed <= random_cases(1500) && failures < 5; ++seed) {
    const auto c = support::attention_case(seed, seed % 10 == 0 ? Length::Long : Length::Short);
    const AttentionSubject<TypeParam> subject(c);
    RandomUse<TypeParam> use(subject, seed);
    const auto result = use.run(seed % 10 == 0 ? 12 : 20);
    if (!result) ++failures;
    EXPECT_TRUE(result) << "seed " << seed << ", first_position " << c.call.first_position << ", "
                        << support::describe(c.config);
  }
}

// One position at a time, whose look-around is longer than what the kernel scores at once.
TYPED_TEST(Streaming, OfALookAroundOfManyThousands) {
  local_mha::LocalAttentionConfig config{.window_size = 20000};
  config.causal = true;
  config.exact_windowsize = true;
  const local_mha::LocalAttention<TypeParam> attention(config);
  constexpr Index n = 20100;
  constexpr Index steps = 5;
  Random random(3);
  const auto make = [&](double magnitude) {
    Tensor<TypeParam, 4> t(1, 1, n, 2);
    for (Index i = 0; i < t.size(); ++i)
      t.data()[i] = static_cast<TypeParam>(magnitude * random.normal());
    return t;
  };
  // Scores far apart, so that the largest one is found late in some rows.
  const auto q = make(5);
  const auto k = make(5);
  const auto v = make(1);
  // By the formula, in double.
  const auto expected = [&](Index row, Index channel) {
    double sum = 0;
    double weighted = 0;
    const auto score = [&](Index key) {
      double s = 0;
      for (Index c = 0; c < 2; ++c)
        s += static_cast<double>(q(0, 0, row, c)) * static_cast<double>(k(0, 0, key, c));
      return s / std::sqrt(2.0);
    };
    double most = score(row);
    for (Index key = row - 20000; key < row; ++key) most = std::max(most, score(key));
    for (Index key = row - 20000; key <= row; ++key) {
      const double p = std::exp(score(key) - most);
      sum += p;
      weighted += p * static_cast<double>(v(0, 0, key, channel));
    }
    return weighted / sum;
  };
  const auto rows = [](const Tensor<TypeParam, 4>& t, Index begin, Index end) {
    return Tensor<TypeParam, 4>(
        t.slice(std::array<Index, 4>{0, 0, begin, 0}, std::array<Index, 4>{1, 1, end - begin, 2}));
  };
  typename local_mha::LocalAttention<TypeParam>::Stream stream(attention, 1, 2);
  stream.push(rows(q, 0, n - steps), rows(k, 0, n - steps), rows(v, 0, n - steps));
  for (Index row = n - steps; row < n; ++row) {
    const Tensor<TypeParam, 4> out =
        stream.push(rows(q, row, row + 1), rows(k, row, row + 1), rows(v, row, row + 1));
    for (Index c = 0; c < 2; ++c)
      // Scores of some hundred round at that size.
      EXPECT_NEAR(static_cast<double>(out(0, 0, 0, c)), expected(row, c),
                  500 * static_cast<double>(std::numeric_limits<TypeParam>::epsilon()))
          << "row " << row;
  }
}

// Against the naive reference itself, position by position and in chunks.
TYPED_TEST(Streaming, EqualsTheReference) {
  int failures = 0;
  for (std::uint64_t seed = 2001; seed <= 2000 + random_cases(300) && failures < 5; ++seed) {
    const auto c = support::layer_case(seed);
    const Int batch = c.in.x.shape[0], n = c.in.x.shape[1], dim = c.config.dim;
    const auto precise = reference::local_mha(
        support::options(c.config), reference::cast<support::Precise<TypeParam>>(c.parameters),
        support::cast<support::Precise<TypeParam>>(c.in));
    const LocalMHA<TypeParam> mha(c.config,
                                  support::layer_parameters<TypeParam>(c.config, c.parameters));
    const auto bias = support::bias_tensor<TypeParam>(c.in.bias);
    typename LocalMHA<TypeParam>::Stream stream(mha, {.batch = batch},
                                                support::optional_view(bias));
    const auto x = tensor<TypeParam, 3>(c.in.x);
    Random random(seed);
    Tensor<TypeParam, 3> y(batch, n, dim);
    Index made = 0;
    const auto take = [&](const Tensor<TypeParam, 3>& part) {
      for (Index b = 0; b < batch; ++b)
        for (Index i = 0; i < part.dimension(1); ++i)
          for (Index k = 0; k < dim; ++k) y(b, made + i, k) = part(b, i, k);
      made += part.dimension(1);
    };
    for (Index i = 0; i < n;) {
      const Index size = seed % 2 == 0 ? 1 : std::min<Index>(n - i, random.integer(0, 20));
      const Tensor<TypeParam, 3> chunk =
          x.slice(Eigen::array<Index, 3>{0, i, 0}, Eigen::array<Index, 3>{batch, size, dim});
      std::vector<unsigned char> masked;
      if (!c.in.masked.empty())
        for (Index b = 0; b < batch; ++b)
          masked.insert(masked.end(), c.in.masked.begin() + b * n + i,
                        c.in.masked.begin() + b * n + i + size);
      take(stream.push(chunk, {.mask = support::padding_mask(masked, batch, size)}));
      i += size;
    }
    take(stream.flush());
    ASSERT_EQ(made, n);
    const auto naive =
        reference::local_mha(support::options(c.config), reference::cast<TypeParam>(c.parameters),
                             support::cast<TypeParam>(c.in));
    const auto result = support::close(
        support::array(y), precise.y,
        support::tolerance<TypeParam>(
            support::largest_error(naive.y, precise.y),
            std::max<double>(c.size(), support::largest(naive.y)),
            static_cast<double>(precise.largest_magnitude) + support::largest(c.in.bias)));
    if (!result) ++failures;
    EXPECT_TRUE(result) << "seed " << seed << ", " << support::describe(c.config);
  }
}

TYPED_TEST(Streaming, GivesResultsAsSoonAsWhatTheySeeIsThere) {
  const LocalMHA<TypeParam> causal({.dim = 4, .window_size = 3, .dim_head = 2, .causal = true});
  typename LocalMHA<TypeParam>::Stream at_once(causal);
  EXPECT_EQ(at_once.results_of(5), 5);

  LocalMHAConfig config{.dim = 4, .window_size = 3, .dim_head = 2};
  config.look_forward = 2;
  const LocalMHA<TypeParam> exact(config);
  typename LocalMHA<TypeParam>::Stream later(exact);
  Tensor<TypeParam, 3> one(1, 1, 4);
  one.setConstant(TypeParam(0.5));
  for (Index i = 0; i < 6; ++i) EXPECT_EQ(later.push(one).dimension(1), 0);
  EXPECT_EQ(later.push(one).dimension(1), 1);  // position 0 sees 0 to 6

  config.exact_windowsize = false;
  const LocalMHA<TypeParam> bucketed(config);
  typename LocalMHA<TypeParam>::Stream in_windows(bucketed);
  for (Index i = 0; i < 8; ++i) EXPECT_EQ(in_windows.push(one).dimension(1), 0);
  EXPECT_EQ(in_windows.push(one).dimension(1), 3);  // positions 0 to 2 see windows 0, 1 and 2
  EXPECT_EQ(in_windows.answered(), 3);
  EXPECT_EQ(in_windows.flush().dimension(1), 6);
  EXPECT_EQ(in_windows.flush().dimension(1), 0);
}

TYPED_TEST(Streaming, HidesWhatIsMaskedWhateverItHolds) {
  for (const bool causal : {true, false}) {
    LocalMHAConfig config{.dim = 10, .window_size = 9, .dim_head = 4, .heads = 3};
    config.causal = causal;
    config.prenorm = config.qk_rmsnorm = config.gate_values_per_head = true;
    const LocalMHA<TypeParam> mha(config, 17);
    Random random(5);
    const Index n = 70;
    auto clean = tensor<TypeParam, 3>(random.array({1, n, 10}));
    std::vector<unsigned char> masked(static_cast<std::size_t>(n), 0);
    auto poisoned = clean;
    for (Index i = 0; i < n; ++i) {
      if (!random.chance(0.3)) continue;
      masked[static_cast<std::size_t>(i)] = 1;
      for (Index c = 0; c < 10; ++c)
        poisoned(0, i, c) = random.pick({std::numeric_limits<TypeParam>::quiet_NaN(),
                                         std::numeric_limits<TypeParam>::infinity()});
    }
    const auto expected = mha.forward(clean, support::padding_mask(masked, 1, n));
    for (const Index size : {1, 5, 16, 70}) {
      typename LocalMHA<TypeParam>::Stream stream(mha);
      std::vector<TypeParam> y;
      for (Index i = 0; i < n; i += size) {
        const Index m = std::min(size, n - i);
        const Tensor<TypeParam, 3> chunk =
            poisoned.slice(Eigen::array<Index, 3>{0, i, 0}, Eigen::array<Index, 3>{1, m, 10});
        const auto part = stream.push(
            chunk,
            {.mask = support::padding_mask({masked.begin() + i, masked.begin() + i + m}, 1, m)});
        y.insert(y.end(), part.data(), part.data() + part.size());
      }
      const auto last = stream.flush();
      y.insert(y.end(), last.data(), last.data() + last.size());
      for (Index i = 0; i < n; ++i)
        for (Index c = 0; c < 10; ++c) {
          if (masked[static_cast<std::size_t>(i)]) continue;
          ASSERT_NEAR(y[static_cast<std::size_t>(i * 10 + c)], expected(0, i, c),
                      tolerance<TypeParam>)
              << "row " << i << ", chunks of " << size;
        }
    }
  }
}

TYPED_TEST(Streaming, ShowsNaNInTheSameRowsAsForward) {
  LocalMHAConfig config{.dim = 6, .window_size = 7, .dim_head = 4, .heads = 2, .causal = true};
  const LocalMHA<TypeParam> mha(config, 3);
  auto x = tensor<TypeParam, 3>(Random(6).array({1, 60, 6}));
  x(0, 20, 2) = std::numeric_limits<TypeParam>::quiet_NaN();
  const auto expected = mha.forward(x);
  typename LocalMHA<TypeParam>::Stream stream(mha);
  for (Index i = 0; i < 60; ++i) {
    const Tensor<TypeParam, 3> row =
        x.slice(Eigen::array<Index, 3>{0, i, 0}, Eigen::array<Index, 3>{1, 1, 6});
    const auto y = stream.push(row);
    for (Index c = 0; c < 6; ++c)
      EXPECT_EQ(std::isnan(y(0, 0, c)), std::isnan(expected(0, i, c))) << i;
  }
}

TYPED_TEST(Streaming, ACopyGoesOnByItself) {
  const LocalMHA<TypeParam> mha({.dim = 6, .window_size = 5, .dim_head = 4, .causal = true}, 3);
  const auto x = tensor<TypeParam, 3>(Random(6).array({1, 40, 6}));
  const auto part = [&](Index begin, Index end) -> Tensor<TypeParam, 3> {
    return x.slice(Eigen::array<Index, 3>{0, begin, 0}, Eigen::array<Index, 3>{1, end - begin, 6});
  };
  typename LocalMHA<TypeParam>::Stream stream(mha);
  stream.push(part(0, 21));
  auto copy = stream;
  const auto y = stream.push(part(21, 40));
  stream.push(part(0, 30));
  EXPECT_TRUE(support::same_bits(copy.push(part(21, 40)), y));
}

/// Every way in which what a query sees moves on.
std::vector<LocalMHAConfig> kinds_of_windows() {
  LocalMHAConfig causal{.dim = 10, .window_size = 7, .dim_head = 4, .heads = 2};
  causal.prenorm = causal.gate_values_per_head = true;
  LocalMHAConfig ahead = causal;
  causal.causal = true;
  ahead.look_forward = 2;
  LocalMHAConfig bucketed = ahead;
  bucketed.exact_windowsize = false;
  return {causal, ahead, bucketed};
}

template <typename Scalar>
Tensor<Scalar, 3> rows(const Tensor<Scalar, 3>& x, Index begin, Index end) {
  return x.slice(Eigen::array<Index, 3>{0, begin, 0},
                 Eigen::array<Index, 3>{1, end - begin, x.dimension(2)});
}

// Queries are turned to first keys by groups of positions: here two sequences take turns, of which
// one is a group further and the other is between two.
TYPED_TEST(Streaming, OfFirstKeysTakesSequencesThatAreFarApart) {
  LocalMHAConfig config{.dim = 6, .dim_head = 4, .heads = 2};
  config.token_window = {.left = 5, .right = 0};
  config.first_keys = 3;
  const LocalMHA<TypeParam> mha(config, 3);
  const Index group = LocalAttention<TypeParam>({.window_size = 5, .dim = 4}).rotary()->group();
  const auto x = tensor<TypeParam, 3>(Random(6).array({2, 3 * group, 6}));
  const auto part = [&](Index n) -> Tensor<TypeParam, 3> {
    return x.slice(Eigen::array<Index, 3>{0, 0, 0}, Eigen::array<Index, 3>{2, n, 6});
  };
  typename LocalMHA<TypeParam>::Stream stream(mha, {.batch = 2});
  stream.push(part(group + 40));
  stream.reset(1);
  stream.push(part(group - 7));
  // Rows of the first sequence from 2·group + 33 on, of the other from group - 7 on.
  const auto y = stream.push(part(20));
  Tensor<TypeParam, 3> all(2, 2 * group + 53, 6);
  all.setZero();
  Index n = 0;
  for (const Index some : {group + 40, group - 7, Index{20}}) {
    for (Index i = 0; i < some; ++i)
      for (Index c = 0; c < 6; ++c) {
        all(0, n + i, c) = x(0, i, c);
        if (n >= group + 40) all(1, n - group - 40 + i, c) = x(1, i, c);
      }
    n += some;
  }
  const auto expected = mha.forward(all, {.lengths = std::array<Index, 2>{n, group + 13}});
  for (Index i = 0; i < 20; ++i)
    for (Index c = 0; c < 6; ++c) {
      EXPECT_NEAR(y(0, i, c), expected(0, n - 20 + i, c), 1e-5) << i;
      EXPECT_NEAR(y(1, i, c), expected(1, group - 7 + i, c), 1e-5) << i;
    }
}

TYPED_TEST(Streaming, GoesBackAsFarAsTheRingsHoldAndNoFurther) {
  for (const LocalMHAConfig& config : kinds_of_windows()) {
    const LocalMHA<TypeParam> mha(config, 3);
    const Index n = 1000;
    const auto x = tensor<TypeParam, 3>(Random(6).array({1, n, 10}));
    const auto expected = mha.forward(x);
    for (const Index max_rollback : {0, 5, 300}) {
      typename LocalMHA<TypeParam>::Stream stream(mha, {.max_rollback = max_rollback});
      stream.push(x);
      const Index most = stream.most_rollback();
      ASSERT_GE(most, max_rollback);
      ASSERT_LT(most, n) << "else it ends at the sequence's begin";
      const Index answered = stream.answered();
      EXPECT_THROW(stream.rollback(most + 1), std::invalid_argument);
      EXPECT_THROW(stream.rollback(0, most + 1), std::invalid_argument);
      EXPECT_EQ(stream.position(), n);
      EXPECT_EQ(stream.answered(), answered);
      EXPECT_EQ(stream.most_rollback(), most);

      stream.rollback(most);
      EXPECT_EQ(stream.position(), n - most);
      EXPECT_EQ(stream.most_rollback(), 0);
      Index row = stream.answered();
      const auto expect_rows = [&](const Tensor<TypeParam, 3>& y) {
        for (Index i = 0; i < y.dimension(1); ++i, ++row)
          for (Index c = 0; c < 10; ++c)
            ASSERT_NEAR(y(0, i, c), expected(0, row, c), tolerance<TypeParam>)
                << support::describe(config) << ", row " << row;
      };
      expect_rows(stream.push(rows(x, n - most, n)));
      expect_rows(stream.flush());
      EXPECT_EQ(row, n);
    }
  }
}

/// The state of one sequence that came `shift` positions later.
template <typename Scalar>
std::string moved(const std::string& state, std::int64_t shift) {
  std::uint64_t size = 0;
  std::memcpy(&size, state.data() + 8, sizeof size);
  const std::string description = state.substr(16, size);
  std::istringstream in(state);
  std::ostringstream out;
  local_mha::detail::StateReader from(in, description);
  local_mha::detail::StateWriter to(out, description);
  const auto copy = [&](std::int64_t by) {
    const auto value = from.get<std::int64_t>();
    to.put(value + by);
    return value;
  };
  const auto position = copy(shift);
  copy(0);  // whether it has ended
  const auto oldest_key = copy(shift);
  copy(shift);  // the oldest query
  copy(shift);  // the end of the masked ones
  for (auto row = oldest_key; row < position; ++row) to.put(from.get<std::uint8_t>());
  const auto numbers_end = static_cast<std::streamoff>(state.size() - sizeof(std::uint64_t));
  while (in.tellg() < numbers_end) to.put(from.get<Scalar>());
  from.finish();
  to.finish();
  return out.str();
}

TYPED_TEST(Streaming, GivesTheSameBitsAtPositionsBeyond32Bits) {
  for (LocalMHAConfig config : kinds_of_windows())
    for (const bool xpos : {false, true}) {
      config.use_xpos = xpos;
      config.xpos_scale_base = 16;
      const LocalMHA<TypeParam> mha(config, 3);
      Random random(6);
      const auto x = tensor<TypeParam, 3>(random.array({1, 600, 10}));
      typename LocalMHA<TypeParam>::Stream twin(mha, {.max_rollback = 40});
      std::vector<unsigned char> masked(600, 0);
      for (auto& flag : masked) flag = random.chance(0.2);
      twin.push(x, {.mask = support::padding_mask(masked, 1, 600)});
      ASSERT_LT(twin.most_rollback(), 600) << "else it sees where the sequence begins";
      std::ostringstream out;
      twin.save(out);

      const local_mha::RotaryEmbedding<TypeParam> rotary(
          config.dim_head, xpos ? config.xpos_scale_base : std::nullopt);
      const Index shift = config.window_size * rotary.group() * ((Index{1} << 33) + 1);
      auto stream = twin;
      std::istringstream here(out.str()), beyond(moved<TypeParam>(out.str(), shift));
      twin.load(here);
      stream.load(beyond);
      const auto expect_the_same = [&](const auto& a, const auto& b) {
        EXPECT_TRUE(support::same_bits(a, b)) << support::describe(config);
        EXPECT_EQ(stream.position(), twin.position() + shift);
        EXPECT_EQ(stream.answered(), twin.answered() + shift);
        EXPECT_EQ(stream.most_rollback(), twin.most_rollback());
      };
      for (const Index n : {1, 33, 200, 7}) {
        const auto chunk = rows(x, 0, n);
        expect_the_same(stream.push(chunk), twin.push(chunk));
      }
      stream.rollback(39);
      twin.rollback(39);
      const auto chunk = rows(x, 100, 150);
      expect_the_same(stream.push(chunk), twin.push(chunk));
      expect_the_same(stream.flush(), twin.flush());
      stream.rollback(3);
      twin.rollback(3);
      expect_the_same(stream.push(chunk), twin.push(chunk));
    }
}

/// \return the message of the exception that `call` throws
template <typename Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST(StreamingBadInput, IsNamedAndChangesNothing) {
  LocalMHAConfig config{.dim = 6, .window_size = 5, .dim_head = 4, .heads = 2};
  const LocalMHA<float> mha(config);
  LocalMHA<float>::Stream stream(mha, {.batch = 2});
  Tensor<float, 3> x(2, 3, 6);
  x.setRandom();
  stream.push(x);
  const auto expect_error = [&](const std::string& begin, auto&& call) {
    const std::string error = error_of(call);
    EXPECT_EQ(error.substr(0, begin.size()), begin) << error;
    EXPECT_EQ(stream.position(0), 3);
    EXPECT_EQ(stream.position(1), 3);
  };
  Tensor<float, 3> y(2, 1, 6);
  expect_error("x: expected shape [2, any, 6], got [1, 3, 6]",
               [&] { stream.push(Tensor<float, 3>(1, 3, 6)); });
  expect_error("x: ", [&] { stream.push(Tensor<float, 3>(2, 3, 5)); });
  expect_error("y: expected shape [2, 0, 6], got [2, 1, 6]", [&] { stream.push_into(y, y); });
  expect_error("y: ", [&] { stream.flush_into(y); });
  expect_error("mask: ", [&] {
    stream.push(x, {.mask = PaddingMask::from_lengths(std::vector<Index>{1, 2}, 4)});
  });
  expect_error("n: expected at most 3 positions to take back, got 4", [&] { stream.rollback(4); });
  expect_error("n: expected at least 0", [&] { stream.rollback(-1); });
  expect_error("sequence: expected 0 to 1, got 2", [&] { stream.reset(2); });
  expect_error("sequence: ", [&] { stream.rollback(-1, 1); });
  expect_error("sequence: ", [&] { static_cast<void>(stream.position(2)); });

  expect_error("batch: ", [&] { LocalMHA<float>::Stream(mha, {.batch = 0}); });
  expect_error("max_rollback: ", [&] { LocalMHA<float>::Stream(mha, {.max_rollback = -1}); });
  expect_error("max_rollback: ",
               [&] { LocalMHA<float>::Stream(mha, {.max_rollback = Index{1} << 50}); });
  expect_error("max_threads: ", [&] { LocalMHA<float>::Stream(mha, {.max_threads = 0}); });
  const Tensor<float, 3> bias(2, 5, 14);
  expect_error("attn_bias: ", [&] {
    LocalMHA<float>::Stream(mha, {}, local_mha::TensorView<const float, 3>(bias));
  });
  config.window_size = Index{1} << 50;
  const LocalMHA<float> endless(config);
  expect_error("window_size: ", [&] { LocalMHA<float>::Stream(endless, {}); });

  const LocalAttention<float> attention({.window_size = 4, .dim = 8});
  expect_error("dim_head: ", [&] { LocalAttention<float>::Stream(attention, 2, 6); });
  expect_error("heads: ", [&] { LocalAttention<float>::Stream(attention, 0, 8); });
  expect_error("training: ", [&] {
    LocalAttention<float>::Stream(attention, 1, 8, {}, {.training = local_mha::Training{}});
  });
  expect_error("window_size: ",
               [&] { LocalAttention<float>::Stream(attention, 1, 8, {}, {.window_size = 3}); });
  LocalAttention<float>::Stream of_heads(attention, 2, 8);
  const Tensor<float, 4> q(1, 2, 3, 8);
  expect_error("k: ", [&] { of_heads.push(q, Tensor<float, 4>(1, 2, 4, 8), q); });
  expect_error("q: ", [&] { of_heads.push(Tensor<float, 4>(1, 1, 3, 8), q, q); });

  stream.flush();
  expect_error("sequence 0: expected one that goes on", [&] { stream.push(x); });
}

TEST(StreamingBadInput, OfAStateIsNamedAndChangesNothing) {
  const LocalMHAConfig config{.dim = 6, .window_size = 5, .dim_head = 4, .heads = 2};
  const LocalMHA<float> mha(config);
  Tensor<float, 3> x(1, 30, 6);
  x.setRandom();
  LocalMHA<float>::Stream from(mha);
  from.push(x);
  std::ostringstream out;
  from.save(out);
  const std::string saved = out.str();

  LocalMHA<float>::Stream stream(mha);
  stream.push(x);
  auto twin = stream;
  const auto expect_error = [&](const std::string& begin, const std::string& data) {
    std::istringstream in(data);
    const std::string error = error_of([&] { stream.load(in); });
    EXPECT_EQ(error.substr(0, begin.size()), begin) << error;
  };
  for (std::size_t size = 0; size < saved.size(); size += 7)
    expect_error("state: expected more data, got its end", saved.substr(0, size));
  for (std::size_t at = 0; at < saved.size(); ++at) {
    std::string damaged = saved;
    damaged[at] = static_cast<char>(damaged[at] ^ 64);
    expect_error("state: ", damaged);
  }
  expect_error("state: expected one that save() wrote", std::string(1000, 'x'));

  const auto expect_other = [&](const auto& other_stream) {
    std::ostringstream other;
    other_stream.save(other);
    expect_error("state: expected that of LocalMHA, dim 6", other.str());
  };
  auto other_config = config;
  other_config.window_size = 6;
  const LocalMHA<float> other_window(other_config);
  expect_other(LocalMHA<float>::Stream(other_window));
  expect_other(LocalMHA<float>::Stream(mha, {.batch = 2}));
  const Tensor<float, 3> bias(2, 5, 15), one_bias(1, 5, 15);
  expect_other(LocalMHA<float>::Stream(mha, {}, local_mha::TensorView<const float, 3>(bias)));
  expect_other(LocalMHA<float>::Stream(mha, {}, local_mha::TensorView<const float, 3>(one_bias)));
  const LocalMHA<double> in_double(config);
  expect_other(LocalMHA<double>::Stream(in_double));
  const LocalAttention<float> attention({.window_size = 5});
  expect_other(LocalAttention<float>::Stream(attention, 2, 4));

  EXPECT_TRUE(support::same_bits(stream.push(x), twin.push(x)));
}

TEST(StreamingBadInput, OfAStateWithANumberOutOfItsRangeIsRefused) {
  for (const Index number : {Index{-1}, Index{0}, Index{4}, Index{5}}) {
    std::ostringstream out;
    local_mha::detail::StateWriter writer(out, "numbers");
    writer.put(static_cast<std::int64_t>(number));
    writer.finish();
    std::istringstream in(out.str());
    local_mha::detail::StateReader reader(in, "numbers");
    if (number >= 0 && number <= 4) {
      EXPECT_EQ(reader.get_index(0, 4), number);
      EXPECT_NO_THROW(reader.finish());
    } else {
      EXPECT_EQ(error_of([&] { reader.get_index(0, 4); }),
                "state: expected a number from 0 to 4, got " + std::to_string(number));
    }
  }
}

TEST(StreamingBadInput, OfAStateWithOtherPairsOfChannelsSaysWhichTheyAre) {
  LocalMHAConfig config{.dim = 6, .window_size = 5, .dim_head = 4, .heads = 2};
  config.rotary = {.theta = 1e3, .pairing = local_mha::RotaryPairing::interleaved};
  std::ostringstream out;
  LocalMHA<float>::Stream(LocalMHA<float>(config)).save(out);
  config.rotary.pairing = local_mha::RotaryPairing::halves;
  LocalMHA<float>::Stream stream{LocalMHA<float>(config)};
  std::istringstream in(out.str());
  const std::string error = error_of([&] { stream.load(in); });
  const std::size_t got = error.find(", got LocalMHA");
  ASSERT_NE(got, std::string::npos) << error;
  EXPECT_NE(error.substr(0, got).find(" halves "), std::string::npos) << error;
  EXPECT_NE(error.substr(got).find(" interleaved "), std::string::npos) << error;
}

TEST(StreamingBadInput, OfAStateWithTwoSignsChangedIsRefused) {
  const LocalMHA<double> mha({.dim = 6, .window_size = 5, .dim_head = 4, .heads = 2});
  LocalMHA<double>::Stream stream(mha);
  stream.push(tensor<double, 3>(Random(3).array({1, 30, 6})));
  std::ostringstream out;
  stream.save(out);
  const std::string saved = out.str();
  // The numbers end where the checksum begins; the last byte of each holds its sign.
  const std::size_t checksum = saved.size() - 8;
  for (std::size_t first = 1; first < 4; ++first)
    for (std::size_t second = first + 1; second < 20; ++second) {
      std::string damaged = saved;
      for (const std::size_t number : {first, second}) {
        char& byte = damaged[checksum - 8 * (number - 1) - 1];
        byte = static_cast<char>(byte ^ 0x80);
      }
      std::istringstream in(damaged);
      EXPECT_EQ(error_of([&] { stream.load(in); }),
                "state: expected one that is intact, got a damaged one");
    }
}

}  // namespace streaming_test
