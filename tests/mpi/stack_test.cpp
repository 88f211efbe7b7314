// SPDX-License-Identifier: MIT
// Encoders and language models over ranks, forward, backward and in training, against one process.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include <local_mha/local_mha.hpp>
#include <local_mha/mpi.hpp>
#include <mpi/counted_calls.hpp>
#include <mpi/instances.hpp>
#include <mpi/layers.hpp>
#include <mpi/splits.hpp>

namespace stack_test {
namespace {

using local_mha::EncoderCall;
using local_mha::EncoderConfig;
using local_mha::Index;
using local_mha::LocalTransformerConfig;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::mpi::Communicator;
using local_mha::mpi::Split;
using mpi_tests::difference;
using mpi_tests::difference_of;
using mpi_tests::own_mask;
using mpi_tests::own_rows;
using mpi_tests::random_rows;
using mpi_tests::says;

using Encoder = local_mha::Encoder<double>;
using SplitEncoder = local_mha::mpi::Encoder<double>;
using Model = local_mha::LocalTransformer<double>;
using SplitModel = local_mha::mpi::LocalTransformer<double>;
using Tokens = Tensor<std::int64_t, 2>;

constexpr double close = 1e-11;

std::vector<EncoderConfig> encoders() {
  const local_mha::LocalMHAConfig wide{
      .dim = 12, .window_size = 9, .dim_head = 6, .heads = 2, .dropout = 0.2, .prenorm = true};
  local_mha::LocalMHAConfig narrow = wide;
  narrow.causal = true;
  narrow.window_size = 4;
  EncoderConfig two{.depth = 2, .layers = {wide, narrow}};
  EncoderConfig streams = two;
  streams.num_residual_streams = 3;
  EncoderConfig dropping = two;
  dropping.ff_dropout = 0.3;
  EncoderConfig biased{.depth = 2, .layers = {wide}};
  biased.use_dynamic_pos_bias = true;
  biased.layers.front().use_rotary_pos_emb = false;
  return {two, streams, dropping, biased};
}

void expect_encoder_of_one(const EncoderConfig& config, Index batch, EncoderCall call,
                           const Tensor<bool, 2>* masked) {
  const Encoder encoder(config, 3);
  const Communicator communicator;
  const SplitEncoder split_encoder(communicator, encoder);
  EXPECT_TRUE(split_encoder.encoder().config() == config);
  EXPECT_EQ(&split_encoder.communicator(), &communicator);
  const Index total = 130;
  auto x = random_rows<double>(batch, total, 12, 5);
  auto grad_y = random_rows<double>(batch, total, 12, 6);
  // What is behind a sequence may be anything.
  for (Index b = 0; b < std::ssize(call.lengths); ++b)
    for (Index i = call.lengths[static_cast<std::size_t>(b)]; i < total; ++i)
      for (Index c = 0; c < 12; ++c) x(b, i, c) = grad_y(b, i, c) = std::nan("");
  if (masked != nullptr) call.mask = PaddingMask::masked(*masked);
  Encoder::Saved saved;
  const auto y = encoder.forward_saving(saved, x, call);
  auto gradients = Encoder::Parameters::zeros(config);
  const auto grad_x = encoder.backward(gradients, saved, grad_y);
  for (const Index rows : mpi_tests::splits(communicator, total)) {
    const Split split(communicator, rows);
    if (masked != nullptr) call.mask = own_mask(*masked, split);
    SplitEncoder::Saved kept;
    const auto own = own_rows(x, split);
    const auto got = split_encoder.forward_saving(kept, own, split, call);
    EXPECT_LE(difference(got, own_rows(y, split)), close) << rows;
    EXPECT_EQ(difference(split_encoder.forward(own, split, call), got), 0) << rows;
    auto sums = Encoder::Parameters::zeros(config);
    const auto grad = split_encoder.backward(sums, kept, own_rows(grad_y, split), split);
    EXPECT_LE(difference(grad, own_rows(grad_x, split)), close) << rows;
    EXPECT_LE(difference_of(sums, gradients), close) << rows;
  }
}

TEST(SplitEncoders, AreThoseOfOneProcess) {
  const std::vector<Index> cu_seqlens{0, 13, 60, 61, 61, 130}, lengths{99, 0, 130, 3, 64};
  Tensor<bool, 2> masked(2, 130), of_five(5, 130);
  for (Index i = 0; i < 260; ++i) masked.data()[i] = i < 20 || i % 7 == 3;
  for (Index i = 0; i < 650; ++i) of_five.data()[i] = i % 11 == 4;
  const std::optional training = local_mha::Training{.seed = 4};
  for (const EncoderConfig& config : encoders()) {
    expect_encoder_of_one(config, 2, {}, nullptr);
    expect_encoder_of_one(config, 2, {.training = training}, &masked);
    expect_encoder_of_one(config, 1, {.training = training, .cu_seqlens = cu_seqlens}, nullptr);
    expect_encoder_of_one(config, 5, {.lengths = lengths}, nullptr);
    expect_encoder_of_one(config, 5, {.training = training, .lengths = lengths}, &of_five);
  }
}

TEST(SplitEncoders, HaveTheSameBitsOnTheGridAndOnThreads) {
  const Communicator communicator;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  for (const EncoderConfig& config : encoders()) {
    const Encoder encoder(config, 3);
    const SplitEncoder split_encoder(communicator, encoder);
    const auto x = random_rows<double>(1, 301, 12, 5);
    const auto y = encoder.forward(x);
    const Split split = Split::even(communicator, 301, 16);
    const auto own = own_rows(x, split);
    EXPECT_EQ(difference(split_encoder.forward(own, split), own_rows(y, split)), 0);
    EXPECT_EQ(difference(split_encoder.forward(own, split, {.device = device}), own_rows(y, split)),
              0);
  }
}

// What ranks must find out of a mask together, they find out once, whatever the windows are.
TEST(SplitEncoders, MeetOnceForAMask) {
  const Communicator communicator;
  const Split split(communicator, 40);
  Tensor<bool, 2> masked(1, 40);
  for (Index i = 0; i < 40; ++i) masked(0, i) = i % 7 == 3;
  const EncoderCall plain, with_mask{.mask = PaddingMask::masked(masked)};
  const auto x = random_rows<double>(1, 40, 12, 5);
  for (const bool alike : {true, false}) {
    EncoderConfig config = encoders().front();
    if (alike) config.layers = {config.layers.front()};
    config.depth = alike ? 5 : 2;
    const SplitEncoder encoder(communicator, Encoder(config, 3));
    const auto meetings = [&](auto&& task) {
      const int before = mpi_tests::allreduces();
      task();
      return mpi_tests::allreduces() - before;
    };
    const int of_plain = meetings([&] { encoder.forward(x, split, plain); });
    EXPECT_EQ(of_plain, 2);
    EXPECT_EQ(meetings([&] { encoder.forward(x, split, with_mask); }), of_plain + 2);
    SplitEncoder::Saved saved;
    EXPECT_EQ(meetings([&] { encoder.forward_saving(saved, x, split, with_mask); }), of_plain + 2);
    auto gradients = Encoder::Parameters::zeros(config);
    EXPECT_EQ(meetings([&] { encoder.backward(gradients, saved, x, split); }), of_plain);
  }
}

LocalTransformerConfig model_config() {
  return {.num_tokens = 11,
          .max_seq_len = 200,
          .dim = 12,
          .depth = 2,
          .local_attn_window_size = 8,
          .dim_head = 6,
          .heads = 2,
          .attn_dropout = 0.1,
          .ff_dropout = 0.2,
          .use_xpos = true,
          .qk_rmsnorm = true};
}

Tokens random_tokens(Index batch, Index total, std::uint64_t seed) {
  Random random(seed);
  Tokens tokens(batch, total);
  for (Index i = 0; i < tokens.size(); ++i) tokens.data()[i] = random.integer(0, 10);
  return tokens;
}

Tokens own_tokens(const Tokens& tokens, const Split& split, Index ahead = 0) {
  Tokens own(tokens.dimension(0), split.rows());
  for (Index b = 0; b < own.dimension(0); ++b)
    for (Index i = 0; i < split.rows(); ++i)
      own(b, i) = tokens(b, split.stretch().begin + i + ahead);
  return own;
}

void expect_model_of_one(Index batch, const EncoderCall& call) {
  const Communicator communicator;
  const Model model(model_config(), 3);
  const SplitModel split_model(communicator, model);
  EXPECT_EQ(split_model.model().config().dim, model.config().dim);
  EXPECT_EQ(&split_model.communicator(), &communicator);
  const Index total = 130;
  Tokens tokens = random_tokens(batch, total, 5), labels = random_tokens(batch, total, 6);
  for (Index i = 0; i < labels.size(); i += 9) labels.data()[i] = model.config().ignore_index;
  // What is behind a sequence may be anything.
  for (Index b = 0; b < std::ssize(call.lengths); ++b)
    for (Index i = call.lengths[static_cast<std::size_t>(b)]; i < total; ++i)
      tokens(b, i) = labels(b, i) = 77;
  const auto logits = model.forward(tokens, call);
  auto gradients = Model::Parameters::zeros(model.config());
  const double loss = model.backward(gradients, tokens, labels, call);
  for (const Index rows : mpi_tests::splits(communicator, total)) {
    const Split split(communicator, rows);
    const Tokens own = own_tokens(tokens, split), own_labels = own_tokens(labels, split);
    EXPECT_LE(difference(split_model.forward(own, split, call), own_rows(logits, split)), close);
    EXPECT_NEAR(split_model.loss(own, own_labels, split, call), loss, 1e-12);
    auto sums = Model::Parameters::zeros(model.config());
    EXPECT_NEAR(split_model.backward(sums, own, own_labels, split, call), loss, 1e-12);
    EXPECT_LE(difference_of(sums, gradients), close) << rows;
  }
}

TEST(SplitModels, AreThoseOfOneProcess) {
  const std::vector<Index> cu_seqlens{0, 13, 60, 61, 61, 130}, lengths{130, 0, 71, 5};
  const std::optional training = local_mha::Training{.seed = 8};
  expect_model_of_one(2, {.training = training});
  expect_model_of_one(1, {.training = training, .cu_seqlens = cu_seqlens});
  expect_model_of_one(4, {.training = training, .lengths = lengths});
}

TEST(SplitModels, HaveNoLossWhereNoLabelCounts) {
  const Communicator communicator;
  const Model model(model_config(), 3);
  const Split split(communicator, 5);
  const Tokens tokens = own_tokens(random_tokens(1, split.total(), 5), split);
  Tokens labels(1, 5);
  labels.setConstant(model.config().ignore_index);
  auto gradients = Model::Parameters::zeros(model.config());
  const SplitModel split_model(communicator, model);
  EXPECT_TRUE(std::isnan(split_model.backward(gradients, tokens, labels, split)));
  EXPECT_EQ(difference_of(gradients, Model::Parameters::zeros(model.config())), 0);
}

// 50 steps on one process, and on all ranks.
TEST(SplitModels, LearnWhatOneProcessLearns) {
  const Communicator communicator;
  const Index total = 150;
  Model one(model_config(), 3), many(model_config(), 3);
  const Split split(communicator, mpi_tests::splits(communicator, total).back());
  local_mha::AdamW<Model::Parameters> optimizer_of_one({}, one.parameters()),
      optimizer({}, many.parameters());
  constexpr double learning_rate = 3e-3;
  double first = 0, last = 0;
  for (std::uint64_t step = 0; step < 50; ++step) {
    const Tokens tokens = random_tokens(2, total + 1, step % 3);
    const EncoderCall call{.training = local_mha::Training{.seed = step}};
    auto gradients = Model::Parameters::zeros(one.config());
    const double loss = one.backward(gradients, tokens, call);
    auto parameters = one.parameters();
    optimizer_of_one.step(parameters, gradients, learning_rate);
    one.set_parameters(parameters);

    auto sums = Model::Parameters::zeros(many.config());
    const double got =
        SplitModel(communicator, many)
            .backward(sums, own_tokens(tokens, split), own_tokens(tokens, split, 1), split, call);
    parameters = many.parameters();
    optimizer.step(parameters, sums, learning_rate);
    many.set_parameters(parameters);
    EXPECT_NEAR(got, loss, 1e-10) << step;
    (step == 0 ? first : last) = got;
  }
  EXPECT_LT(last, 0.9 * first);
}

TEST(SplitModels, RejectBadInputOnEveryRank) {
  const Communicator communicator;
  const bool is_last = communicator.rank() == communicator.size() - 1;
  const Split split(communicator, 4), longer(communicator, 201);
  const Model model(model_config(), 3);
  const SplitModel split_model(communicator, model);
  Tokens tokens(1, 4), bad(1, 4), wide(1, 5), more(1, 201);
  for (Tokens* all : {&tokens, &bad, &wide, &more}) all->setConstant(2);
  bad(0, 2) = 11;
  auto gradients = Model::Parameters::zeros(model.config());
  const std::vector<Index> lengths{split.total() + 1}, one_less{3}, two{4, 4};
  says("tokens: expected 0 to 10", [&] { split_model.forward(is_last ? bad : tokens, split); });
  says("tokens: expected shape", [&] { split_model.forward(is_last ? wide : tokens, split); });
  says("tokens: expected at most max_seq_len", [&] { split_model.forward(more, longer); });
  says("labels: expected 0 to 10",
       [&] { split_model.backward(gradients, tokens, is_last ? bad : tokens, split); });
  says("labels: expected shape", [&] { split_model.loss(tokens, wide, split); });
  says("lengths: expected 0 to " + std::to_string(split.total()),
       [&] { split_model.forward(tokens, split, {.lengths = lengths}); });
  says("lengths: expected 1 (batch) numbers",
       [&] { split_model.forward(tokens, split, {.lengths = two}); });
  const auto encoder_config = encoders().front();
  const auto x = random_rows<double>(1, 4, 12, 5), other = random_rows<double>(1, 4, 13, 5);
  const SplitEncoder encoder(communicator, Encoder(encoder_config, 3));
  says("x: expected shape", [&] { encoder.forward(is_last ? other : x, split); });
  SplitEncoder::Saved saved;
  auto of_encoder = Encoder::Parameters::zeros(encoder_config);
  says("saved: expected", [&] { encoder.backward(of_encoder, saved, x, split); });
  encoder.forward_saving(saved, x, split);
  says("grad_y: expected shape",
       [&] { encoder.backward(of_encoder, saved, is_last ? other : x, split); });
  if (communicator.size() == 1) return;
  says("lengths: expected the same on every rank", [&] {
    const std::span<const Index> none;
    encoder.forward(x, split, {.lengths = is_last ? std::span<const Index>(one_less) : none});
  });
  says("weights: expected the same on every rank",
       [&] { SplitModel(communicator, Model(model_config(), is_last ? 3 : 4)); });
  says("config: expected the same on every rank", [&] {
    auto config = encoder_config;
    if (is_last) config.ff_dropout = 0.5;
    SplitEncoder(communicator, Encoder(config, 3));
  });
}

}  // namespace
}  // namespace stack_test
