// SPDX-License-Identifier: MIT
// LocalMHA over ranks, backward, against one process and the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include <local_mha/local_mha.hpp>
#include <local_mha/mpi.hpp>
#include <mpi/instances.hpp>
#include <mpi/layers.hpp>
#include <mpi/splits.hpp>

namespace mha_backward_test {
namespace {

using local_mha::Index;
using local_mha::LocalMHACall;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::mpi::Communicator;
using local_mha::mpi::Split;
using mpi_tests::difference;
using mpi_tests::difference_of;
using mpi_tests::layer_of;
using mpi_tests::own_mask;
using mpi_tests::own_rows;
using mpi_tests::random_rows;
using mpi_tests::says;

using Layer = local_mha::LocalMHA<double>;
using SplitLayer = local_mha::mpi::LocalMHA<double>;
using Parameters = local_mha::LocalMHAParameters<double>;

constexpr double close = 1e-11;

struct Gradients {
  explicit Gradients(const Layer& layer) : weights(Parameters::zeros(layer.config())) {}
  Tensor<double, 3> x;
  Parameters weights;
  Tensor<double, 3> bias;
};

// What is to be had of one process.
Gradients of_one(const Layer& layer, const Tensor<double, 3>& x, const Tensor<double, 3>& grad_y,
                 const LocalMHACall<double>& call, const Tensor<double, 3>* bias) {
  Gradients all(layer);
  Layer::Saved saved;
  layer.forward_saving(saved, x, call);
  if (bias != nullptr) all.bias = bias->constant(0.0);
  all.x =
      layer.backward(all.weights, saved, grad_y, x, call, bias != nullptr ? &all.bias : nullptr);
  return all;
}

Gradients of_ranks(const SplitLayer& mha, const Split& split, const Tensor<double, 3>& x,
                   const Tensor<double, 3>& grad_y, const LocalMHACall<double>& call,
                   const Tensor<double, 3>* bias) {
  Gradients all(mha.layer());
  const auto own = own_rows(x, split);
  SplitLayer::Saved saved;
  const auto y = mha.forward_saving(saved, own, split, call);
  EXPECT_EQ(difference(y, mha.forward(own, split, call)), 0);
  if (bias != nullptr) all.bias = bias->constant(0.0);
  all.x = mha.backward(all.weights, saved, own_rows(grad_y, split), own, split, call,
                       bias != nullptr ? &all.bias : nullptr);
  return all;
}

void expect_that_of_one(const std::string& name, const Layer& layer, Index batch, Index total,
                        LocalMHACall<double> call, const Tensor<bool, 2>* masked,
                        const Tensor<double, 3>* bias) {
  const Communicator communicator;
  const SplitLayer mha(communicator, layer);
  const auto x = random_rows<double>(batch, total, layer.config().dim, 5);
  const auto grad_y = random_rows<double>(batch, total, layer.config().dim, 6);
  if (masked != nullptr) call.mask = PaddingMask::masked(*masked);
  const Gradients expected = of_one(layer, x, grad_y, call, bias);
  for (const Index rows : mpi_tests::splits(communicator, total)) {
    const Split split(communicator, rows);
    if (masked != nullptr) call.mask = own_mask(*masked, split);
    const Gradients got = of_ranks(mha, split, x, grad_y, call, bias);
    EXPECT_LE(difference(got.x, own_rows(expected.x, split)), close) << name << ", " << rows;
    EXPECT_LE(difference_of(got.weights, expected.weights), close) << name << ", " << rows;
    if (bias != nullptr)
      EXPECT_LE(difference(got.bias, expected.bias), close * 10) << name << ", " << rows;
  }
}

TEST(MhaBackward, IsThatOfOneProcess) {
  for (const auto& [name, config] : mpi_tests::layers())
    expect_that_of_one(name, layer_of<double>(config), 2, 201, {}, nullptr, nullptr);
}

TEST(MhaBackward, TakesMasksBiasesAndDropout) {
  Tensor<bool, 2> masked(2, 150);
  for (Index i = 0; i < 300; ++i) masked.data()[i] = i < 20 || i % 7 == 3 || i > 290;
  for (const auto& [name, layer_config] : mpi_tests::layers()) {
    auto config = layer_config;
    config.dropout = 0.3;
    LocalMHACall<double> call{.training = local_mha::Training{.seed = 9}};
    if (config.token_window) {
      expect_that_of_one(name, layer_of<double>(config), 2, 150, call, &masked, nullptr);
      continue;
    }
    const local_mha::Window window(local_mha::attention_config(config));
    const auto bias = random_rows<double>(4, window.size(), window.look_around(), 8);
    call.attn_bias = bias;
    expect_that_of_one(name, layer_of<double>(config), 2, 150, call, &masked, &bias);
  }
}

TEST(MhaBackward, TakesLengthsAndPackedSequences) {
  const std::vector<Index> lengths{150, 0, 77}, cu_seqlens{0, 0, 13, 60, 61, 61, 149, 150};
  for (const auto& [name, config] : mpi_tests::layers()) {
    const auto layer = layer_of<double>(config);
    expect_that_of_one(name, layer, 3, 150, {.lengths = lengths}, nullptr, nullptr);
    expect_that_of_one(name, layer, 1, 150, {.cu_seqlens = cu_seqlens}, nullptr, nullptr);
  }
}

// Also on threads.
TEST(MhaBackward, HasTheSameBitsEachTime) {
  const Communicator communicator;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  for (const auto& [name, config] : mpi_tests::layers()) {
    const auto layer = layer_of<double>(config);
    const SplitLayer mha(communicator, layer);
    const auto x = random_rows<double>(2, 201, config.dim, 5);
    const auto grad_y = random_rows<double>(2, 201, config.dim, 6);
    for (const Index rows : mpi_tests::splits(communicator, 201)) {
      const Split split(communicator, rows);
      const Gradients once = of_ranks(mha, split, x, grad_y, {}, nullptr);
      const Gradients again = of_ranks(mha, split, x, grad_y, {.device = device}, nullptr);
      EXPECT_EQ(difference(once.x, again.x), 0) << name;
      EXPECT_EQ(difference_of(once.weights, again.weights), 0) << name;
    }
  }
}

// A number of each weight, and of a row of each rank, by differences of the forward pass.
TEST(MhaBackward, IsTheDerivativeOfTheForwardPass) {
  const Communicator communicator;
  const Index total = 60;
  for (const auto& [name, config] : mpi_tests::layers()) {
    const auto layer = layer_of<double>(config);
    const auto x = random_rows<double>(1, total, config.dim, 5);
    const auto grad_y = random_rows<double>(1, total, config.dim, 6);
    const Split split(communicator, mpi_tests::splits(communicator, total).back());
    const auto own_grad = own_rows(grad_y, split);
    const auto loss = [&](const Layer& of, const Tensor<double, 3>& at) {
      const auto y = SplitLayer(communicator, of).forward(own_rows(at, split), split);
      double sum = 0;
      for (Index i = 0; i < y.size(); ++i) sum += y.data()[i] * own_grad.data()[i];
      MPI_Allreduce(MPI_IN_PLACE, &sum, 1, MPI_DOUBLE, MPI_SUM, communicator.get());
      return sum;
    };
    const auto got = of_ranks(SplitLayer(communicator, layer), split, x, grad_y, {}, nullptr);
    constexpr double step = 1e-5;
    const auto expect_slope = [&](double gradient, const std::string& of, auto&& loss_at) {
      const double slope = (loss_at(step) - loss_at(-step)) / (2 * step);
      EXPECT_NEAR(gradient, slope, 1e-6 * (1 + std::abs(slope))) << name << ", " << of;
    };
    std::vector<double> gradients;
    local_mha::for_each_parameter(got.weights, [&](const std::string&, const auto& tensor) {
      if (tensor.size() > 0) gradients.push_back(tensor.data()[tensor.size() / 2]);
    });
    for (std::size_t which = 0; which < gradients.size(); ++which)
      expect_slope(gradients[which], "weight " + std::to_string(which), [&](double change) {
        Parameters parameters = layer.parameters();
        std::size_t i = 0;
        local_mha::for_each_parameter(parameters, [&](const std::string&, auto& tensor) {
          if (tensor.size() > 0 && i++ == which) tensor.data()[tensor.size() / 2] += change;
        });
        return loss(Layer(config, parameters), x);
      });
    for (Index row = 3; row < total; row += 14) {
      double gradient =
          split.stretch().contains(row) ? got.x(0, row - split.stretch().begin, 2) : 0;
      MPI_Allreduce(MPI_IN_PLACE, &gradient, 1, MPI_DOUBLE, MPI_SUM, communicator.get());
      expect_slope(gradient, "row " + std::to_string(row), [&](double change) {
        auto moved = x;
        moved(0, row, 2) += change;
        return loss(layer, moved);
      });
    }
  }
}

TEST(MhaBackward, SendsHomeAsManyBytesAsCame) {
  const Communicator communicator;
  for (const auto& [name, config] : mpi_tests::layers()) {
    const SplitLayer mha(communicator, layer_of<double>(config));
    const auto x = random_rows<double>(2, 201, config.dim, 5);
    const Split split(communicator, mpi_tests::splits(communicator, 201).front());
    const auto own = own_rows(x, split);
    communicator.reset_traffic();
    SplitLayer::Saved saved;
    mha.forward_saving(saved, own, split);
    auto gradients = Parameters::zeros(config);
    mha.backward(gradients, saved, own, own_rows(x, split), split);
    std::uint64_t bytes[2] = {communicator.traffic().keys_and_values,
                              communicator.traffic().gradients};
    MPI_Allreduce(MPI_IN_PLACE, bytes, 2, MPI_UINT64_T, MPI_SUM, communicator.get());
    EXPECT_EQ(bytes[0], bytes[1]) << name;
  }
}

TEST(MhaBackward, RejectsBadInputOnEveryRank) {
  const Communicator communicator;
  const bool is_last = communicator.rank() == communicator.size() - 1;
  const auto layer = layer_of<double>(mpi_tests::layers().front().config);
  const SplitLayer mha(communicator, layer);
  const Split split(communicator, 4), other(communicator, is_last ? 4 : 3);
  const auto x = random_rows<double>(1, 4, 12, 5), y = random_rows<double>(1, 4, 12, 6),
             wide = random_rows<double>(1, 4, 13, 5);
  SplitLayer::Saved saved;
  mha.forward_saving(saved, x, split);
  auto gradients = Parameters::zeros(layer.config());
  says("grad_y: expected shape",
       [&] { mha.backward(gradients, saved, is_last ? wide : y, x, split); });
  says("x: expected what forward_saving() was given",
       [&] { mha.backward(gradients, saved, x, is_last ? y : x, split); });
  says("saved: expected", [&] { mha.backward(gradients, SplitLayer::Saved(), y, x, split); });
  Tensor<double, 3> bias(1, 7, 21);
  says("grad_attn_bias: expected null",
       [&] { mha.backward(gradients, saved, y, x, split, {}, &bias); });
  const std::vector<Index> lengths{1};
  says("lengths: expected that of forward_saving()",
       [&] { mha.backward(gradients, saved, y, x, split, {.lengths = lengths}); });
  Parameters none;
  says("to_qkv.weight: expected", [&] { mha.backward(none, saved, y, x, split); });
  SplitLayer::Saved of_another_call;
  mha.forward_saving(of_another_call, x, split);
  if (communicator.size() > 1)
    says("saved: expected the same on every rank",
         [&] { mha.backward(gradients, is_last ? of_another_call : saved, y, x, split); });
  if (communicator.size() > 1)
    says("saved: expected that of a call with this split", [&] {
      const auto own = random_rows<double>(1, other.rows(), 12, 5);
      mha.backward(gradients, saved, random_rows<double>(1, other.rows(), 12, 6), own, other);
    });
}

TEST(ASumOverRanks, IsInTheOrderOfTheRanks) {
  const Communicator communicator;
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{1}, std::size_t{7}, std::size_t{1} << 20}) {
    const auto number = [](int rank, std::size_t i) {
      return 1 / (1.0 + static_cast<double>(i % 1000) + 0.3 * rank);
    };
    std::vector<double> numbers(size);
    for (std::size_t i = 0; i < size; ++i) numbers[i] = number(communicator.rank(), i);
    local_mha::mpi::detail::sum_over_ranks(communicator, numbers);
    bool same = true;
    for (std::size_t i = 0; i < size; ++i) {
      double sum = number(0, i);
      for (int rank = 1; rank < communicator.size(); ++rank) sum += number(rank, i);
      same = same && numbers[i] == sum;
    }
    EXPECT_TRUE(same) << size;
  }
}

TEST(ASumOverRanks, IsOfParametersAndOfNumbers) {
  const Communicator communicator;
  const auto config = mpi_tests::layers().front().config;
  const Parameters own =
      layer_of<double>(config, static_cast<std::uint64_t>(communicator.rank()) + 1).parameters();
  Parameters sum = layer_of<double>(config, 100).parameters(), expected = sum;
  std::vector<Parameters> of_ranks;
  for (int rank = 0; rank < communicator.size(); ++rank)
    of_ranks.push_back(layer_of<double>(config, static_cast<std::uint64_t>(rank) + 1).parameters());
  local_mha::mpi::add_over_ranks(communicator, own, sum);
  for (int rank = 1; rank < communicator.size(); ++rank)
    of_ranks.front().to_qkv += of_ranks[static_cast<std::size_t>(rank)].to_qkv;
  expected.to_qkv += of_ranks.front().to_qkv;
  EXPECT_EQ((expected.to_qkv - sum.to_qkv).cwiseAbs().maxCoeff(), 0);
  EXPECT_EQ(local_mha::mpi::sum_over_ranks(communicator, communicator.rank() + 0.5),
            communicator.size() * communicator.size() / 2.0);

  const bool is_last = communicator.rank() == communicator.size() - 1;
  Parameters other = Parameters::zeros(mpi_tests::layers()[7].config);
  says("to: expected the shapes of own",
       [&] { local_mha::mpi::add_over_ranks(communicator, own, is_last ? other : sum); });
  if (communicator.size() == 1) return;
  Parameters same = other;
  says("own: expected the same on every rank", [&] {
    local_mha::mpi::add_over_ranks(communicator, is_last ? other : own, is_last ? same : sum);
  });
}

// Of the layer and of an encoder.
TEST(CallsIntoGivenMemory, AreThoseThatReturn) {
  const Communicator communicator;
  const Layer layer({.dim = 12, .window_size = 7, .dim_head = 8, .heads = 4}, 3);
  const SplitLayer mha(communicator, layer);
  const Split split = Split::even(communicator, 301, 16);
  const auto x = own_rows(random_rows<double>(2, 301, 12, 5), split);
  const auto grad_y = own_rows(random_rows<double>(2, 301, 12, 6), split);
  Tensor<double, 3> room(x.dimensions());
  const auto spoiled = [&]() -> Tensor<double, 3>& { return room.setConstant(-1), room; };

  SplitLayer::Saved saved, kept;
  const auto y = mha.forward_saving(saved, x, split);
  mha.forward_saving_into(spoiled(), kept, x, split);
  EXPECT_EQ(difference(room, y), 0);
  Parameters weights = Parameters::zeros(layer.config()), into = weights;
  const auto grad_x = mha.backward(weights, saved, grad_y, x, split);
  // Also in room that was another call's.
  SplitLayer::Workspace workspace;
  {
    const Split of_others = Split::even(communicator, 400, 16);
    const auto others = own_rows(random_rows<double>(2, 400, 12, 7), of_others);
    SplitLayer::Saved saved_others;
    mha.forward_saving(saved_others, others, of_others);
    Tensor<double, 3> grad_others(others.dimensions());
    Parameters to = Parameters::zeros(layer.config());
    mha.backward_into(grad_others, workspace, to, saved_others, others, others, of_others);
  }
  mha.backward_into(spoiled(), workspace, into, kept, grad_y, x, split);
  EXPECT_EQ(difference(room, grad_x), 0);
  EXPECT_EQ(into.to_qkv, weights.to_qkv);
  EXPECT_EQ(into.to_out, weights.to_out);

  const local_mha::mpi::Encoder<double> encoder(
      communicator, local_mha::Encoder<double>({.depth = 2, .layers = {layer.config()}}, 3));
  const auto of_encoder = encoder.forward(x, split);
  encoder.forward_into(spoiled(), x, split);
  EXPECT_EQ(difference(room, of_encoder), 0);

  const bool is_last = communicator.rank() == communicator.size() - 1;
  Tensor<double, 3> longer(2, split.rows() + 1, 12);
  Tensor<double, 3>& other = is_last ? longer : room;
  says("y: expected", [&] { mha.forward_saving_into(other, kept, x, split); });
  says("grad_x: expected",
       [&] { mha.backward_into(other, workspace, into, saved, grad_y, x, split); });
  says("y: expected", [&] { encoder.forward_into(other, x, split); });
  Tensor<double, 3> overlapping = grad_y;
  says("grad_x: expected memory that does not overlap grad_y", [&] {
    mha.backward_into(is_last ? overlapping : room, workspace, into, saved,
                      is_last ? overlapping : grad_y, x, split);
  });
  overlapping = x;
  says("y: expected memory that does not overlap x", [&] {
    encoder.forward_into(is_last ? overlapping : room, is_last ? overlapping : x, split);
  });
}

}  // namespace
}  // namespace mha_backward_test
