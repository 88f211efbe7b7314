// SPDX-License-Identifier: MIT
// Layers that store in 16 bits over ranks, against one process: what travels is stored so, too.
#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include <local_mha/local_mha.hpp>
#include <local_mha/mpi.hpp>
#include <mpi/instances.hpp>
#include <mpi/layers.hpp>
#include <mpi/splits.hpp>

namespace sixteen_bits_test {
namespace {

using Eigen::bfloat16;
using Eigen::half;
using local_mha::EncoderCall;
using local_mha::Index;
using local_mha::LocalMHACall;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::mpi::Communicator;
using local_mha::mpi::Split;
using mpi_tests::difference;
using mpi_tests::own_mask;
using mpi_tests::own_rows;
using mpi_tests::random_rows;
using mpi_tests::says;

template <typename Storage>
class SplitSixteenBits : public testing::Test {};
using Storages = testing::Types<bfloat16, half>;
TYPED_TEST_SUITE(SplitSixteenBits, Storages);

template <typename Storage>
local_mha::LocalMHA<float, Storage> layer_of(const local_mha::LocalMHAConfig& config) {
  return {config, mpi_tests::layer_of<float>(config).parameters()};
}

// What a key that is rounded to the other side changes in a result.
template <typename Storage>
constexpr double step = std::is_same_v<Storage, half> ? 0x1p-9 : 0x1p-6;

TYPED_TEST(SplitSixteenBits, HaveTheBitsOfOneProcessOnTheGrid) {
  const Communicator communicator;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  for (const auto& [name, config] : mpi_tests::layers()) {
    const auto layer = layer_of<TypeParam>(config);
    const local_mha::mpi::LocalMHA<float, TypeParam> mha(communicator, layer);
    // Of 97 and 513 rows, the last is alone in its stretch.
    for (const Index length : {413, 97, 513}) {
      const auto x = random_rows<float>(2, length, config.dim, 5);
      const auto expected = layer.forward(x);
      for (const Index multiple : {16, 48, 128}) {
        const Split split = Split::even(communicator, length, multiple);
        const auto own = own_rows(x, split), of_one = own_rows(expected, split);
        EXPECT_EQ(difference(mha.forward(own, split), of_one), 0)
            << name << ", " << length << ", " << multiple;
        if (multiple == 48)
          EXPECT_EQ(difference(mha.forward(own, split, {.device = device}), of_one), 0) << name;
      }
    }
  }
}

TYPED_TEST(SplitSixteenBits, TakeMasksLengthsAndPackedSequences) {
  const Communicator communicator;
  const std::vector<Index> lengths{150, 77}, cu_seqlens{0, 0, 13, 60, 61, 61, 149, 150};
  Tensor<bool, 2> masked(2, 150);
  for (Index i = 0; i < 300; ++i) masked.data()[i] = i < 20 || i % 7 == 3 || i > 290;
  for (const auto& [name, config] : mpi_tests::layers()) {
    const auto layer = layer_of<TypeParam>(config);
    const local_mha::mpi::LocalMHA<float, TypeParam> mha(communicator, layer);
    const auto x = random_rows<float>(2, 150, config.dim, 5);
    const auto one = random_rows<float>(1, 150, config.dim, 6);
    const LocalMHACall<float> ragged{.lengths = lengths}, packed{.cu_seqlens = cu_seqlens};
    LocalMHACall<float> call{.mask = PaddingMask::masked(masked)};
    const auto of_mask = layer.forward(x, call), of_lengths = layer.forward(x, ragged),
               of_packed = layer.forward(one, packed);
    const Split grid = Split::even(communicator, 150, 16);
    call.mask = own_mask(masked, grid);
    EXPECT_EQ(difference(mha.forward(own_rows(x, grid), grid, call), own_rows(of_mask, grid)), 0)
        << name;
    EXPECT_EQ(difference(mha.forward(own_rows(x, grid), grid, ragged), own_rows(of_lengths, grid)),
              0)
        << name;
    for (const Index rows : mpi_tests::splits(communicator, 150)) {
      const Split split(communicator, rows);
      call.mask = own_mask(masked, split);
      const auto near = [&](const Tensor<float, 3>& y, const Tensor<float, 3>& expected) {
        EXPECT_LE(difference(y, own_rows(expected, split)), step<TypeParam>)
            << name << ", " << rows;
      };
      near(mha.forward(own_rows(x, split), split, call), of_mask);
      near(mha.forward(own_rows(x, split), split, ragged), of_lengths);
      near(mha.forward(own_rows(one, split), split, packed), of_packed);
    }
  }
}

TYPED_TEST(SplitSixteenBits, SendHalfTheBytes) {
  const Communicator communicator;
  for (const bool causal : {true, false}) {
    local_mha::LocalMHAConfig config{
        .dim = 12, .window_size = 20, .dim_head = 8, .heads = 4, .causal = causal};
    config.kv_heads = 2;
    const local_mha::mpi::LocalMHA<float, TypeParam> mha(communicator, layer_of<TypeParam>(config));
    const Index batch = 3;
    const Split split(communicator, 100);
    const auto x = own_rows(random_rows<float>(batch, split.total(), 12, 5), split);
    communicator.reset_traffic();
    mha.forward(x, split);
    std::uint64_t bytes = communicator.traffic().keys_and_values;
    MPI_Allreduce(MPI_IN_PLACE, &bytes, 1, MPI_UINT64_T, MPI_SUM, communicator.get());
    const Index cuts = communicator.size() - 1, reach = causal ? 20 : 40;
    EXPECT_EQ(bytes, static_cast<std::uint64_t>(batch * cuts * reach * 2 * 2 * 8 * 2));
  }
}

local_mha::LocalMHAConfig attention() {
  return {.dim = 12, .window_size = 9, .dim_head = 6, .heads = 2, .prenorm = true};
}

TYPED_TEST(SplitSixteenBits, AreEncodersAndModels) {
  const Communicator communicator;
  for (const Index streams : {1, 3}) {
    local_mha::EncoderConfig config{.depth = 2, .layers = {attention()}};
    config.num_residual_streams = streams;
    const local_mha::Encoder<float, TypeParam> encoder(config, 3);
    const local_mha::mpi::Encoder<float, TypeParam> split_encoder(communicator, encoder);
    const auto x = random_rows<float>(2, 301, 12, 5);
    const Split split = Split::even(communicator, 301, 16);
    EXPECT_EQ(difference(split_encoder.forward(own_rows(x, split), split),
                         own_rows(encoder.forward(x), split)),
              0)
        << streams;
  }

  const local_mha::LocalTransformer<float, TypeParam> model({.num_tokens = 11,
                                                             .max_seq_len = 400,
                                                             .dim = 12,
                                                             .depth = 2,
                                                             .local_attn_window_size = 8,
                                                             .dim_head = 6,
                                                             .heads = 2},
                                                            3);
  const local_mha::mpi::LocalTransformer<float, TypeParam> split_model(communicator, model);
  const Split split = Split::even(communicator, 301, 16);
  const auto tokens_of = [](Index rows, Index first) {
    Tensor<std::int64_t, 2> tokens(1, rows);
    for (Index i = 0; i < rows; ++i) tokens(0, i) = (first + i) * (first + i) % 11;
    return tokens;
  };
  const auto whole = tokens_of(301, 0), own = tokens_of(split.rows(), split.stretch().begin);
  EXPECT_EQ(difference(split_model.forward(own, split), own_rows(model.forward(whole), split)), 0);
  EXPECT_NEAR(split_model.loss(own, own, split), model.loss(whole, whole), 1e-6);
}

// Their weights are rounded: they are not trained.
template <typename Mha>
concept GoesBack = requires(const Mha& mha, typename Mha::Parameters& gradients,
                            const typename Mha::Saved& saved, const Tensor<float, 3>& x,
                            const Split& split) { mha.backward(gradients, saved, x, x, split); };
static_assert(GoesBack<local_mha::mpi::LocalMHA<float>>);
static_assert(!GoesBack<local_mha::mpi::LocalMHA<float, half>>);

TEST(SplitSixteenBitLayers, MustBeStoredInTheSameWay) {
  const Communicator communicator;
  if (communicator.size() == 1) GTEST_SKIP();
  const auto make = [&](auto storage) {
    local_mha::mpi::LocalMHA<float, decltype(storage)>(communicator,
                                                       layer_of<decltype(storage)>(attention()));
  };
  const bool last = communicator.rank() == communicator.size() - 1;
  says("config: expected the same on every rank", [&] { last ? make(half()) : make(bfloat16()); });
  says("config: expected the same on every rank", [&] { last ? make(0.0F) : make(bfloat16()); });
}

}  // namespace
}  // namespace sixteen_bits_test
