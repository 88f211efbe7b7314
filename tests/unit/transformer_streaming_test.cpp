// SPDX-License-Identifier: MIT
// The stream of LocalTransformer, and what it generates.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace transformer_streaming_test {

using local_mha::GenerateConfig;
using local_mha::Index;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::Tensor;
using Tokens = Tensor<std::int64_t, 2>;

template <typename Scalar>
constexpr double tolerance = std::is_same_v<Scalar, float> ? 2e-5 : 1e-12;

LocalTransformerConfig random_config(Random& random) {
  LocalTransformerConfig config;
  support::pick_window_rules(random, config);
  config.local_attn_window_size = random.pick<Index>({1, 2, 3, 5, 8, 16, 17, 100});
  config.num_tokens = random.integer(2, 20);
  config.max_seq_len = 600;
  config.dim = random.pick<Index>({4, 5, 8, 12, 21});
  config.depth = random.integer(0, 3);
  config.dim_head = random.pick<Index>({2, 4, 8});
  config.heads = random.integer(1, 3);
  config.ff_mult = random.pick({4.0, 2.5, 1.0});
  config.qk_rmsnorm = random.chance(0.4);
  config.gate_values_per_head = random.chance(0.3);
  config.use_dynamic_pos_bias = random.chance(0.3);
  if (!config.use_dynamic_pos_bias && random.chance(0.4)) {
    config.use_xpos = true;
    support::pick_xpos_base(random, config, config.local_attn_window_size,
                            std::sqrt(static_cast<double>(config.dim)));
  }
  return config;
}

template <typename Scalar>
LocalTransformer<Scalar> random_model(Random& random, const LocalTransformerConfig& config) {
  return LocalTransformer<Scalar>(
      config,
      support::transformer_parameters<Scalar>(
          config, support::random_parameters(
                      random, support::named<double>(
                                  local_mha::LocalTransformerParameters<double>::zeros(config)))));
}

Tokens random_tokens(Random& random, Index batch, Index n, Index num_tokens) {
  Tokens tokens(batch, n);
  for (Index i = 0; i < tokens.size(); ++i) tokens.data()[i] = random.integer(0, num_tokens - 1);
  return tokens;
}

/// At least 1.
template <typename Scalar>
double largest_logit(const Tensor<Scalar, 3>& logits) {
  return std::max(1.0, static_cast<double>(support::largest(support::array(logits))));
}

template <typename Scalar>
class TransformerStreaming : public testing::Test {};
TYPED_TEST_SUITE(TransformerStreaming, support::Scalars, support::ScalarNames);

// Pushes, goes back, saves and loads at random; then compares all logits with forward()'s.
TYPED_TEST(TransformerStreaming, EqualsForwardWhateverHappens) {
  int failures = 0;
  for (std::uint64_t seed = 1; seed <= random_cases(1500) && failures < 5; ++seed) {
    Random random(seed);
    LocalTransformerConfig config = random_config(random);
    const bool large = seed % 50 == 0;  // pushes many times what passes the layers at once
    if (large) config.max_seq_len = 10'000;
    const auto model = random_model<TypeParam>(random, config);
    const Index vocabulary = config.num_tokens;
    Index max_rollback = random.integer(0, 20);
    using Stream = typename LocalTransformer<TypeParam>::Stream;
    auto stream = std::make_unique<Stream>(
        model, local_mha::StreamConfig{.batch = 1, .max_rollback = max_rollback});
    std::vector<std::int64_t> tokens;
    std::vector<unsigned char> masked;
    std::vector<TypeParam> logits;
    std::ostringstream log;
    const bool masks = seed % 2 == 0;
    const auto add = [&](const Tensor<TypeParam, 3>& part) {
      logits.insert(logits.end(), part.data(), part.data() + part.size());
    };
    const auto push = [&](Index n) {
      log << "push " << n << "; ";
      Tokens chunk = random_tokens(random, 1, n, vocabulary);
      std::vector<unsigned char> hidden(static_cast<std::size_t>(n), 0);
      if (masks)
        for (auto& flag : hidden) flag = random.chance(0.3);
      tokens.insert(tokens.end(), chunk.data(), chunk.data() + n);
      masked.insert(masked.end(), hidden.begin(), hidden.end());
      add(stream->push(
          chunk, {.mask = masks ? support::padding_mask(hidden, 1, n) : local_mha::PaddingMask()}));
    };
    const auto back = [&](Index n) {
      log << "back " << n << "; ";
      stream->rollback(n);
      tokens.resize(tokens.size() - static_cast<std::size_t>(n));
      masked.resize(tokens.size());
      logits.resize(static_cast<std::size_t>(stream->answered() * vocabulary));
    };
    for (int i = 0; i < 12; ++i) {
      switch (random.integer(0, 6)) {
        case 0: {
          const Index most = stream->most_rollback();
          // Changes nothing, which the later logits show.
          EXPECT_THROW(stream->rollback(most + random.pick<Index>({1, 1, 2, 100})),
                       std::invalid_argument)
              << "seed " << seed << ", " << log.str();
          back(random.integer(0, most));
          break;
        }
        case 1: {
          const Index n = random.integer(0, max_rollback);
          push(n);
          if (random.chance(0.4)) {
            log << "flush; ";
            add(stream->flush());
          }
          ASSERT_GE(stream->most_rollback(), n) << "seed " << seed << ", " << log.str();
          back(n);
          break;
        }
        case 2: {
          log << "save and load; ";
          std::stringstream state;
          stream->save(state);
          max_rollback = random.integer(0, 20);
          stream = std::make_unique<Stream>(
              model, local_mha::StreamConfig{.batch = 1, .max_rollback = max_rollback});
          if (random.chance(0.5)) stream->push(random_tokens(random, 1, 40, vocabulary));
          stream->load(state);
          break;
        }
        default:
          if (large && tokens.size() < 5000 && random.chance(0.4))
            push(random.pick<Index>({700, 4096}));
          else if (large || tokens.size() < 400)
            push(random.pick<Index>({0, 1, 1, 1, 2, 7, 16, 33, 160}));
      }
      ASSERT_EQ(static_cast<Index>(tokens.size()), stream->position());
      ASSERT_EQ(static_cast<Index>(logits.size()), stream->answered() * vocabulary)
          << "seed " << seed << ", " << log.str();
    }
    add(stream->flush());
    const auto n = static_cast<Index>(tokens.size());
    Tokens all(1, n);
    std::copy(tokens.begin(), tokens.end(), all.data());
    const auto expected = model.forward(all, {.mask = support::padding_mask(masked, 1, n)});
    ASSERT_EQ(static_cast<Index>(logits.size()), expected.size());
    for (Index i = 0; i < expected.size() && failures < 5; ++i)
      if (const auto result = support::near(
              logits[static_cast<std::size_t>(i)], expected.data()[i],
              tolerance<TypeParam> * std::max(TypeParam(1), std::abs(expected.data()[i])));
          !result) {
        ++failures;
        ADD_FAILURE() << "seed " << seed << ", row " << i / vocabulary << " of " << n << ": "
                      << result.message() << ", window " << config.local_attn_window_size
                      << ", causal " << config.causal << ", exact " << config.exact_windowsize
                      << ", depth " << config.depth << ": " << log.str();
        break;
      }
  }
}

TYPED_TEST(TransformerStreaming, OfABatchKeepsItsSequencesApart) {
  Random random(3);
  LocalTransformerConfig config{.num_tokens = 9, .max_seq_len = 100, .dim = 8, .depth = 2};
  config.local_attn_window_size = 6;
  config.dim_head = 4;
  config.heads = 2;
  const auto model = random_model<TypeParam>(random, config);
  typename LocalTransformer<TypeParam>::Stream stream(model, {.batch = 3});
  const auto first = random_tokens(random, 3, 20, 9);
  const auto second = random_tokens(random, 3, 30, 9);
  stream.push(first);
  stream.reset(1);
  stream.rollback(2, 5);
  const auto got = stream.push(second);
  for (Index b = 0; b < 3; ++b) {
    const Index before = b == 0 ? 20 : b == 1 ? 0 : 15;
    Tokens all(1, before + 30);
    std::copy_n(&first(b, 0), before, all.data());
    std::copy_n(&second(b, 0), 30, all.data() + before);
    const auto expected = model.forward(all);
    const double allowed = tolerance<TypeParam> * largest_logit(expected);
    for (Index i = 0; i < 30; ++i)
      for (Index c = 0; c < 9; ++c)
        ASSERT_NEAR(got(b, i, c), expected(0, before + i, c), allowed)
            << "sequence " << b << ", row " << i;
  }
}

TYPED_TEST(TransformerStreaming, PastMaxSeqLenStaysAtTheLastPosition) {
  Random random(4);
  LocalTransformerConfig config{.num_tokens = 7, .max_seq_len = 10, .dim = 8, .depth = 2};
  config.local_attn_window_size = 4;
  config.dim_head = 4;
  config.heads = 2;
  auto parameters = support::transformer_parameters<TypeParam>(
      config, support::random_parameters(
                  random, support::named<double>(
                              local_mha::LocalTransformerParameters<double>::zeros(config))));
  const LocalTransformer<TypeParam> model(config, parameters);
  // The same model with an embedding that is as long as the text, its last row repeated.
  auto longer = config;
  longer.max_seq_len = 50;
  const auto rows = parameters.pos_emb;
  parameters.pos_emb.resize(50, 8);
  for (Index i = 0; i < 50; ++i) parameters.pos_emb.row(i) = rows.row(std::min<Index>(i, 9));
  const LocalTransformer<TypeParam> long_model(longer, parameters);

  const auto tokens = random_tokens(random, 1, 50, 7);
  typename LocalTransformer<TypeParam>::Stream stream(model);
  Tokens part(1, 10);
  std::copy_n(tokens.data(), 10, part.data());
  stream.push(part);
  EXPECT_FALSE(stream.is_past_max_seq_len());
  Tokens rest(1, 40);
  std::copy_n(tokens.data() + 10, 40, rest.data());
  const auto got = stream.push(rest);
  EXPECT_TRUE(stream.is_past_max_seq_len());
  const auto expected = long_model.forward(tokens);
  const double allowed = tolerance<TypeParam> * largest_logit(expected);
  for (Index i = 0; i < 40; ++i)
    for (Index c = 0; c < 7; ++c) ASSERT_NEAR(got(0, i, c), expected(0, i + 10, c), allowed);
}

LocalTransformerConfig small_model() {
  LocalTransformerConfig config{.num_tokens = 11, .max_seq_len = 64, .dim = 8, .depth = 2};
  config.local_attn_window_size = 5;
  config.dim_head = 4;
  config.heads = 2;
  return config;
}

TEST(Generate, TakesTheMostLikelyTokenOfForwardAtTemperatureZero) {
  Random random(5);
  const auto model = random_model<double>(random, small_model());
  const auto prompt = random_tokens(random, 3, 9, 11);
  const auto made = model.generate(prompt, {.length = 30, .sampling = {.temperature = 0}});
  ASSERT_EQ(made.dimension(1), 30);
  for (Index b = 0; b < 3; ++b) {
    std::vector<std::int64_t> text(&prompt(b, 0), &prompt(b, 0) + 9);
    for (Index i = 0; i < 30; ++i) {
      Tokens all(1, static_cast<Index>(text.size()));
      std::copy(text.begin(), text.end(), all.data());
      const auto logits = model.forward(all);
      const double* last = &logits(0, all.dimension(1) - 1, 0);
      EXPECT_EQ(made(b, i), std::max_element(last, last + 11) - last);
      text.push_back(made(b, i));
    }
  }
}

// The prompt's last 64 tokens at the positions 0 to 63, and all that follow at 63.
TEST(Generate, GoesOnPastMaxSeqLenFromTheEndOfALongPrompt) {
  Random random(15);
  const auto config = small_model();
  auto parameters = support::transformer_parameters<double>(
      config, support::random_parameters(
                  random, support::named<double>(
                              local_mha::LocalTransformerParameters<double>::zeros(config))));
  const LocalTransformer<double> model(config, parameters);
  auto longer = config;
  longer.max_seq_len = 200;
  const auto rows = parameters.pos_emb;
  parameters.pos_emb.resize(200, rows.cols());
  for (Index i = 0; i < 200; ++i) parameters.pos_emb.row(i) = rows.row(std::min<Index>(i, 63));
  const LocalTransformer<double> long_model(longer, parameters);

  const auto prompt = random_tokens(random, 1, 300, 11);
  const auto made = model.generate(prompt, {.length = 30, .sampling = {.temperature = 0}});
  std::vector<std::int64_t> text(prompt.data() + 300 - 64, prompt.data() + 300);
  for (Index i = 0; i < 30; ++i) {
    Tokens all(1, static_cast<Index>(text.size()));
    std::copy(text.begin(), text.end(), all.data());
    const auto logits = long_model.forward(all);
    const double* last = &logits(0, all.dimension(1) - 1, 0);
    EXPECT_EQ(made(0, i), std::max_element(last, last + 11) - last) << i;
    text.push_back(made(0, i));
  }
}

TEST(Generate, IsTheSameForTheSameSeedAndForTheFirstSequenceAlone) {
  Random random(6);
  const auto model = random_model<float>(random, small_model());
  const auto prompt = random_tokens(random, 3, 4, 11);
  const GenerateConfig config{.length = 20, .seed = 7};
  const auto made = model.generate(prompt, config);
  EXPECT_TRUE(support::same_bits(made, model.generate(prompt, config)));
  Tokens first(1, 4);
  std::copy_n(&prompt(0, 0), 4, first.data());
  const auto alone = model.generate(first, config);
  for (Index i = 0; i < 20; ++i) EXPECT_EQ(alone(0, i), made(0, i));
  const auto other = model.generate(prompt, {.length = 20, .seed = 70});
  EXPECT_FALSE(support::same_bits(made, other));
}

TEST(Generate, DrawsNoSequenceOfASeedAsOneOfAnother) {
  Random random(16);
  const auto model = random_model<float>(random, small_model());
  Tokens prompt(3, 1);
  prompt.setConstant(5);
  std::set<std::vector<std::int64_t>> texts;
  for (std::uint64_t seed = 7; seed < 12; ++seed) {
    const auto made = model.generate(prompt, {.length = 30, .seed = seed});
    for (Index b = 0; b < 3; ++b) texts.emplace(&made(b, 0), &made(b, 0) + 30);
  }
  EXPECT_EQ(texts.size(), 15U);
}

TEST(Generate, EndsWithTheStopTokenAndTellsEachStep) {
  Random random(7);
  const auto model = random_model<float>(random, small_model());
  const auto prompt = random_tokens(random, 2, 4, 11);
  const auto free_run = model.generate(prompt, {.length = 40});
  const std::int64_t stop = free_run(0, 3);
  std::vector<std::int64_t> told;
  const auto made = model.generate(
      prompt, {.length = 40, .stop_token = stop},
      [&](const auto& tokens) { told.insert(told.end(), tokens.begin(), tokens.end()); });
  ASSERT_EQ(told.size(), static_cast<std::size_t>(made.size()));
  bool all_stopped = true;
  for (Index b = 0; b < 2; ++b) {
    bool stopped = false;
    for (Index i = 0; i < made.dimension(1); ++i) {
      EXPECT_EQ(told[static_cast<std::size_t>(2 * i + b)], made(b, i));
      EXPECT_EQ(made(b, i), stopped ? stop : free_run(b, i));
      stopped = stopped || made(b, i) == stop;
    }
    all_stopped = all_stopped && stopped;
  }
  EXPECT_TRUE(all_stopped || made.dimension(1) == 40);
}

TEST(Generate, RejectsWhatDoesNotFit) {
  Random random(8);
  auto config = small_model();
  const auto model = random_model<float>(random, config);
  const auto prompt = random_tokens(random, 1, 4, 11);
  EXPECT_THROW(model.generate(Tokens(1, 0), {.length = 1}), std::invalid_argument);
  EXPECT_THROW(model.generate(prompt, {.length = -1}), std::invalid_argument);
  EXPECT_THROW(model.generate(prompt, {.length = 1, .stop_token = 11}), std::invalid_argument);
  EXPECT_THROW(model.generate(prompt, {.length = 1, .sampling = {.temperature = -1}}),
               std::invalid_argument);
  EXPECT_THROW(model.generate(prompt, {.length = 1, .sampling = {.top_k = -1}}),
               std::invalid_argument);
  EXPECT_THROW(model.generate(prompt, {.length = 1, .sampling = {.top_p = 0}}),
               std::invalid_argument);
  Tokens unknown(1, 1);
  unknown(0, 0) = 11;
  EXPECT_THROW(model.generate(unknown, {.length = 1}), std::invalid_argument);
  config.causal = false;
  const auto sees_ahead = random_model<float>(random, config);
  EXPECT_THROW(sees_ahead.generate(prompt, {.length = 1}), std::invalid_argument);
}

TEST(TransformerStreamingBadInput, IsNamedAndChangesNothing) {
  Random random(9);
  const auto config = small_model();
  const auto model = random_model<float>(random, config);
  LocalTransformer<float>::Stream stream(model);
  stream.push(random_tokens(random, 1, 30, 11));
  auto twin = stream;
  const auto error_of = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "no error";
  };
  const auto expect_error = [&](const std::string& begin, auto&& call) {
    const std::string error = error_of(call);
    EXPECT_EQ(error.substr(0, begin.size()), begin) << error;
  };
  const auto load = [&](const std::string& state) {
    return [&stream, state] {
      std::istringstream in(state);
      stream.load(in);
    };
  };
  Tokens unknown(1, 1);
  unknown(0, 0) = 11;
  expect_error("tokens: expected 0 to 10, got 11", [&] { stream.push(unknown); });
  expect_error("tokens: expected shape [1, any], got [2, 1]",
               [&] { stream.push(random_tokens(random, 2, 1, 11)); });
  expect_error("n: expected at most", [&] { stream.rollback(31); });
  Tensor<float, 3> room(1, 2, 11);
  expect_error("logits: expected shape [1, 1, 11], got [1, 2, 11]",
               [&] { stream.push_into(room, random_tokens(random, 1, 1, 11)); });

  const auto state_of = [](const auto& saved) {
    std::ostringstream out;
    saved.save(out);
    return out.str();
  };
  const std::string saved = state_of(stream);
  for (std::size_t size = 0; size < saved.size(); size += 97)
    expect_error("state: expected more data, got its end", load(saved.substr(0, size)));
  for (std::size_t at = 0; at < saved.size(); at += 5) {
    std::string damaged = saved;
    damaged[at] = static_cast<char>(damaged[at] ^ 32);
    expect_error("state: ", load(damaged));
  }
  const auto expect_other = [&](auto&& change) {
    auto other_config = config;
    change(other_config);
    const auto other = random_model<float>(random, other_config);
    expect_error("state: expected that of LocalTransformer, num_tokens",
                 load(state_of(LocalTransformer<float>::Stream(other))));
  };
  expect_other([](auto& other) { other.depth = 3; });
  expect_other([](auto& other) { other.max_seq_len = 65; });
  expect_other([](auto& other) { other.ff_mult = 2; });
  expect_other([](auto& other) { other.use_dynamic_pos_bias = true; });
  const auto in_double = random_model<double>(random, config);
  expect_error("state: expected that of LocalTransformer, num_tokens",
               load(state_of(LocalTransformer<double>::Stream(in_double))));
  const auto more = random_tokens(random, 1, 9, 11);
  EXPECT_TRUE(support::same_bits(stream.push(more), twin.push(more)));
}

TEST(Sampler, DrawsAsOftenAsProbableOfThoseThatAreLeft) {
  // Probabilities 0.5, 0.3, 0.15 and 0.05, not in order.
  const std::array<double, 4> p{0.15, 0.5, 0.05, 0.3};
  std::array<double, 4> logits{};
  for (std::size_t i = 0; i < 4; ++i) logits[i] = std::log(p[i]) + 3;
  const auto share = [&](const local_mha::SamplingConfig& config) {
    local_mha::Sampler sampler(config);
    local_mha::RandomSequence random(1);
    std::array<double, 4> drawn{};
    constexpr int draws = 40'000;
    for (int i = 0; i < draws; ++i)
      drawn[static_cast<std::size_t>(sampler(logits.data(), 4, random))] += 1.0 / draws;
    return drawn;
  };
  const auto expect = [&](const std::array<double, 4>& expected,
                          const local_mha::SamplingConfig& config) {
    const auto drawn = share(config);
    for (std::size_t i = 0; i < 4; ++i) {
      EXPECT_NEAR(drawn[i], expected[i], expected[i] == 0 ? 0 : 0.012) << i;
    }
  };
  expect(p, {});
  expect({0, 1, 0, 0}, {.temperature = 0});
  expect({0, 0.5 / 0.8, 0, 0.3 / 0.8}, {.top_k = 2});
  expect({0, 0.5 / 0.8, 0, 0.3 / 0.8}, {.top_p = 0.6});
  expect({0, 1, 0, 0}, {.top_p = 0.4});
  expect({0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95}, {.top_p = 0.9});
  // Of the two that top_k leaves, 0.625 and 0.375, top_p leaves the first.
  expect({0, 1, 0, 0}, {.top_k = 2, .top_p = 0.6});
  const double squares = 0.0225 + 0.25 + 0.0025 + 0.09;
  expect({0.0225 / squares, 0.25 / squares, 0.0025 / squares, 0.09 / squares},
         {.temperature = 0.5});
}

}  // namespace transformer_streaming_test
