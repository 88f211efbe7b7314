// SPDX-License-Identifier: MIT
// LocalMHA over ranks, forward, against one process and the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
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
#include <reference/layer.hpp>
#include <support/random_case.hpp>

namespace mha_forward_test {
namespace {

using local_mha::Index;
using local_mha::LocalMHACall;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::mpi::Communicator;
using local_mha::mpi::Split;
using mpi_tests::difference;
using mpi_tests::layer_of;
using mpi_tests::own_mask;
using mpi_tests::own_rows;
using mpi_tests::random_rows;
using mpi_tests::says;

constexpr double close = 1e-12;

TEST(MhaForward, IsThatOfOneProcess) {
  const Communicator communicator;
  for (const auto& [name, config] : mpi_tests::layers()) {
    const auto layer = layer_of<double>(config);
    const local_mha::mpi::LocalMHA<double> mha(communicator, layer);
    EXPECT_EQ(&mha.communicator(), &communicator);
    const auto x = random_rows<double>(2, 201, config.dim, 5);
    const auto expected = layer.forward(x);
    for (const Index rows : mpi_tests::splits(communicator, 201)) {
      const Split split(communicator, rows);
      const auto y = mha.forward(own_rows(x, split), split);
      EXPECT_LE(difference(y, own_rows(expected, split)), close) << name << ", " << rows;
    }
  }
}

template <typename Scalar>
void expect_the_same_bits() {
  const Communicator communicator;
  for (const auto& [name, config] : mpi_tests::layers()) {
    const auto layer = layer_of<Scalar>(config);
    const local_mha::mpi::LocalMHA<Scalar> mha(communicator, layer);
    // Of 97 and 513 rows, the last is alone in its stretch.
    for (const Index length : {413, 97, 513}) {
      const auto x = random_rows<Scalar>(2, length, config.dim, 5);
      const auto expected = layer.forward(x);
      for (const Index multiple : {16, 48, 128}) {
        const Split split = Split::even(communicator, length, multiple);
        const auto y = mha.forward(own_rows(x, split), split);
        EXPECT_EQ(difference(y, own_rows(expected, split)), 0)
            << name << ", " << length << ", " << multiple;
      }
    }
  }
}
TEST(MhaForward, HasTheSameBitsOnTheGrid) {
  expect_the_same_bits<double>();
  expect_the_same_bits<float>();
}

TEST(MhaForward, TakesMasksBiasesAndDropout) {
  const Communicator communicator;
  for (const auto& [name, layer_config] : mpi_tests::layers()) {
    auto config = layer_config;
    config.dropout = 0.3;
    const auto layer = layer_of<double>(config);
    const local_mha::mpi::LocalMHA<double> mha(communicator, layer);
    const auto x = random_rows<double>(2, 150, config.dim, 5);
    Tensor<bool, 2> masked(2, 150);
    for (Index i = 0; i < 300; ++i) masked.data()[i] = i < 20 || i % 7 == 3 || i > 290;
    const PaddingMask whole = PaddingMask::masked(masked);
    LocalMHACall<double> call{.mask = whole, .training = local_mha::Training{.seed = 9}};
    const local_mha::Window window(local_mha::attention_config(config));
    const auto bias =
        random_rows<double>(4, window.size(), std::min<Index>(window.look_around(), 999), 8);
    if (!config.token_window) call.attn_bias = bias;
    const auto expected = layer.forward(x, call);
    for (const Index rows : mpi_tests::splits(communicator, 150)) {
      const Split split(communicator, rows);
      call.mask = own_mask(masked, split);
      const auto y = mha.forward(own_rows(x, split), split, call);
      EXPECT_LE(difference(y, own_rows(expected, split)), close) << name << ", " << rows;
    }
    const Split split = Split::even(communicator, 150, 16);
    call.mask = own_mask(masked, split);
    EXPECT_EQ(difference(mha.forward(own_rows(x, split), split, call), own_rows(expected, split)),
              0)
        << name;
  }
}

TEST(MhaForward, TakesLengthsAndPackedSequences) {
  const Communicator communicator;
  const std::vector<Index> lengths{150, 0, 77}, cu_seqlens{0, 0, 13, 60, 61, 61, 149, 150};
  for (const auto& [name, config] : mpi_tests::layers()) {
    const auto layer = layer_of<double>(config);
    const local_mha::mpi::LocalMHA<double> mha(communicator, layer);
    const auto x = random_rows<double>(3, 150, config.dim, 5);
    const auto one = random_rows<double>(1, 150, config.dim, 6);
    const LocalMHACall<double> ragged{.lengths = lengths}, packed{.cu_seqlens = cu_seqlens};
    const auto expected = layer.forward(x, ragged);
    const auto expected_packed = layer.forward(one, packed);
    for (const Index rows : mpi_tests::splits(communicator, 150)) {
      const Split split(communicator, rows);
      const auto y = mha.forward(own_rows(x, split), split, ragged);
      EXPECT_LE(difference(y, own_rows(expected, split)), close) << name << ", " << rows;
      const auto z = mha.forward(own_rows(one, split), split, packed);
      EXPECT_LE(difference(z, own_rows(expected_packed, split)), close) << name << ", " << rows;
    }
  }
}

TEST(MhaForward, IsWhatTheReferenceSays) {
  const Communicator communicator;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    const support::LayerCase c =
        support::layer_case(seed, seed % 3 == 0 ? support::Length::Long : support::Length::Short);
    const Index batch = c.in.x.shape[0], n = c.in.x.shape[1];
    const local_mha::LocalMHA<double> layer(
        c.config, support::layer_parameters<double>(c.config, c.parameters));
    const local_mha::mpi::LocalMHA<double> mha(communicator, layer);
    const auto expected = reference::local_mha(support::options(c.config), c.parameters, c.in).y;
    const auto x = support::tensor<double, 3>(c.in.x);
    const auto bias = support::bias_tensor<double>(c.in.bias);
    for (const Index rows : mpi_tests::splits(communicator, n)) {
      const Split split(communicator, rows);
      LocalMHACall<double> call{.attn_bias = support::optional_view(bias)};
      if (!c.in.masked.empty()) {
        Tensor<bool, 2> masked(batch, n);
        for (Index i = 0; i < batch * n; ++i)
          masked.data()[i] = c.in.masked[static_cast<std::size_t>(i)] != 0;
        call.mask = own_mask(masked, split);
      }
      const auto y = mha.forward(own_rows(x, split), split, call);
      const auto own = own_rows(support::tensor<double, 3>(expected), split);
      double largest = 1;
      for (const double value : expected.data) largest = std::max(largest, std::abs(value));
      EXPECT_LE(difference(y, own), 1e-9 * largest) << "seed " << seed << ", " << rows;
    }
  }
}

TEST(MhaForward, HasTheSameBitsOnThreads) {
  const Communicator communicator;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  for (const auto& [name, config] : mpi_tests::layers()) {
    const auto layer = layer_of<double>(config);
    const local_mha::mpi::LocalMHA<double> mha(communicator, layer);
    const auto x = random_rows<double>(1, 300, config.dim, 5);
    const Split split(communicator, mpi_tests::splits(communicator, 300).back());
    const auto y = mha.forward(own_rows(x, split), split);
    EXPECT_EQ(difference(mha.forward(own_rows(x, split), split, {.device = device}), y), 0) << name;
  }
}

TEST(MhaForward, ReadsRowsWhereverTheyLie) {
  const Communicator communicator;
  const auto layer = layer_of<double>(mpi_tests::layers().front().config);
  const local_mha::mpi::LocalMHA<double> mha(communicator, layer);
  const auto x = random_rows<double>(2, 90, 12, 5);
  const Split split(communicator, mpi_tests::splits(communicator, 90).front());
  const auto own = own_rows(x, split);
  Tensor<double, 3> turned(2, 12, split.rows());
  for (Index b = 0; b < 2; ++b)
    for (Index i = 0; i < split.rows(); ++i)
      for (Index c = 0; c < 12; ++c) turned(b, c, i) = own(b, i, c);
  EXPECT_EQ(
      difference(mha.forward(local_mha::channels_first(turned), split), mha.forward(own, split)),
      0);
}

// What travels: per sequence and cut, 2 · kv_heads · dim_head numbers a position of the
// look-around.
TEST(MhaForward, SendsTheLookAroundAlone) {
  const Communicator communicator;
  for (const bool causal : {true, false}) {
    local_mha::LocalMHAConfig config{
        .dim = 12, .window_size = 20, .dim_head = 8, .heads = 4, .causal = causal};
    config.kv_heads = 2;
    const auto layer = layer_of<float>(config);
    const local_mha::mpi::LocalMHA<float> mha(communicator, layer);
    const Index total = 100 * communicator.size(), batch = 3;
    const Split split(communicator, 100);
    const auto x = own_rows(random_rows<float>(batch, total, 12, 5), split);
    communicator.reset_traffic();
    mha.forward(x, split);
    std::uint64_t bytes = communicator.traffic().keys_and_values;
    MPI_Allreduce(MPI_IN_PLACE, &bytes, 1, MPI_UINT64_T, MPI_SUM, communicator.get());
    const Index cuts = communicator.size() - 1, reach = causal ? 20 : 40;
    EXPECT_EQ(bytes, static_cast<std::uint64_t>(batch * cuts * reach * 2 * 2 * 8) * sizeof(float));
  }
}

// Nothing of a far position, and no NaN of a masked one, comes through.
TEST(MhaForward, LetsNothingUnseenThrough) {
  const Communicator communicator;
  auto config = mpi_tests::layers().front().config;
  const auto layer = layer_of<double>(config);
  const local_mha::mpi::LocalMHA<double> mha(communicator, layer);
  auto x = random_rows<double>(1, 120, 12, 5);
  Tensor<bool, 2> masked(1, 120);
  masked.setConstant(false);
  for (Index i = 3; i < 120; i += 10) {
    masked(0, i) = true;
    for (Index c = 0; c < 12; ++c) x(0, i, c) = std::numeric_limits<double>::quiet_NaN();
  }
  const auto expected = layer.forward(x, {.mask = PaddingMask::masked(masked)});
  for (const Index rows : mpi_tests::splits(communicator, 120)) {
    const Split split(communicator, rows);
    const auto y = mha.forward(own_rows(x, split), split, {.mask = own_mask(masked, split)});
    const auto own = own_rows(expected, split);
    for (Index i = 0; i < y.size(); ++i)
      EXPECT_EQ(std::isnan(y.data()[i]), std::isnan(own.data()[i]));
  }
}

template <typename Task>
std::string message_of(Task&& task) {
  try {
    task();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "none";
}

TEST(MhaForward, RejectsBadInputOnEveryRank) {
  const Communicator communicator, other;
  const int last = communicator.size() - 1;
  const bool is_last = communicator.rank() == last;
  const auto layer = layer_of<double>(mpi_tests::layers().front().config);
  const local_mha::mpi::LocalMHA<double> mha(communicator, layer);
  const Split split(communicator, 4), elsewhere(other, 4);
  const auto x = random_rows<double>(2, 4, 12, 5), wide = random_rows<double>(2, 4, 13, 5),
             more = random_rows<double>(3, 4, 12, 5);
  says("x: expected shape", [&] { mha.forward(is_last ? wide : x, split); });
  says("split: expected one of the same communicator", [&] { mha.forward(x, elsewhere); });
  const std::vector<Index> lengths{1, 5 * communicator.size()}, cu_seqlens{0, 1};
  says("lengths: expected 0 to", [&] { mha.forward(x, split, {.lengths = lengths}); });
  says("cu_seqlens: expected", [&] { mha.forward(x, split, {.cu_seqlens = cu_seqlens}); });
  Tensor<bool, 2> flags(2, 5);
  flags.setConstant(false);
  says("mask: expected shape",
       [&] { mha.forward(x, split, {.mask = PaddingMask::masked(flags)}); });
  Tensor<double, 3> y(2, 4, 13);
  says("y: expected shape", [&] { mha.forward_into(y, x, split); });
  if (communicator.size() == 1) return;
  says("batch: expected the same on every rank", [&] { mha.forward(is_last ? more : x, split); });
  says("training: expected the same on every rank",
       [&] { mha.forward(x, split, {.training = local_mha::Training{is_last ? 1U : 2U}}); });
  says("mask: expected the same on every rank", [&] {
    Tensor<bool, 2> none(2, 4);
    none.setConstant(false);
    mha.forward(
        x, split,
        is_last ? LocalMHACall<double>{.mask = PaddingMask::masked(none)} : LocalMHACall<double>{});
  });
  const std::vector<Index> some{1, is_last ? 2 : 3};
  says("lengths: expected the same on every rank",
       [&] { mha.forward(x, split, {.lengths = some}); });
  says("weights: expected the same on every rank", [&] {
    local_mha::mpi::LocalMHA<double>(communicator,
                                     layer_of<double>(layer.config(), is_last ? 1 : 2));
  });
  says("config: expected the same on every rank", [&] {
    auto config = layer.config();
    if (is_last) config.window_size = 8;
    local_mha::mpi::LocalMHA<double>(communicator, layer_of<double>(config));
  });
}

}  // namespace
}  // namespace mha_forward_test
