// SPDX-License-Identifier: MIT
// Layers that store in 16 bits, and that multiply so, over ranks, against one process: what travels
// is stored so, too.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
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

// How numbers are stored and multiplied.
template <typename Storage, typename Arithmetic = float>
struct As {
  using Layer = local_mha::LocalMHA<float, Storage, Arithmetic>;
  using SplitLayer = local_mha::mpi::LocalMHA<float, Storage, Arithmetic>;
  using Encoder = local_mha::Encoder<float, Storage, Arithmetic>;
  using SplitEncoder = local_mha::mpi::Encoder<float, Storage, Arithmetic>;
  using Model = local_mha::LocalTransformer<float, Storage, Arithmetic>;
  using SplitModel = local_mha::mpi::LocalTransformer<float, Storage, Arithmetic>;

  static Layer layer_of(const local_mha::LocalMHAConfig& config) {
    return {config, mpi_tests::layer_of<float>(config).parameters()};
  }
  // What a key that is rounded to the other side changes in a result.
  static constexpr double step = std::is_same_v<Storage, half> ? 0x1p-9 : 0x1p-6;
};
using Operands = As<bfloat16, bfloat16>;

template <typename Numbers>
class SplitSixteenBits : public testing::Test {};
using Kinds = testing::Types<As<bfloat16>, As<half>, Operands>;
TYPED_TEST_SUITE(SplitSixteenBits, Kinds);

TYPED_TEST(SplitSixteenBits, HaveTheBitsOfOneProcessOnTheGrid) {
  const Communicator communicator;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  for (const auto& [name, config] : mpi_tests::layers()) {
    const auto layer = TypeParam::layer_of(config);
    const typename TypeParam::SplitLayer mha(communicator, layer);
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
    const auto layer = TypeParam::layer_of(config);
    const typename TypeParam::SplitLayer mha(communicator, layer);
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
        EXPECT_LE(difference(y, own_rows(expected, split)), TypeParam::step)
            << name << ", " << rows;
      };
      near(mha.forward(own_rows(x, split), split, call), of_mask);
      near(mha.forward(own_rows(x, split), split, ragged), of_lengths);
      near(mha.forward(own_rows(one, split), split, packed), of_packed);
    }
  }
}

// What is no number comes from other ranks to those that see it, and to nobody else.
TYPED_TEST(SplitSixteenBits, ShowNoNumbersToThoseThatSeeThem) {
  const Communicator communicator;
  for (const auto& [name, config] : mpi_tests::layers()) {
    const auto layer = TypeParam::layer_of(config);
    const typename TypeParam::SplitLayer mha(communicator, layer);
    auto x = random_rows<float>(1, 150, config.dim, 5);
    for (const Index row : {49, 50, 77, 120})
      for (Index c = 0; c < config.dim; ++c) x(0, row, c) = std::numeric_limits<float>::quiet_NaN();
    const auto expected = layer.forward(x);
    std::vector<Split> all{Split::even(communicator, 150, 16)};
    for (const Index rows : mpi_tests::splits(communicator, 150))
      all.emplace_back(communicator, rows);
    for (const Split& split : all) {
      const auto y = mha.forward(own_rows(x, split), split), of_one = own_rows(expected, split);
      Index others = 0;
      for (Index i = 0; i < y.size(); ++i)
        others += std::isnan(y.data()[i]) != std::isnan(of_one.data()[i]) ? 1 : 0;
      EXPECT_EQ(others, 0) << name << ", " << split.rows();
    }
  }
}

TYPED_TEST(SplitSixteenBits, SendHalfTheBytes) {
  const Communicator communicator;
  for (const bool causal : {true, false}) {
    local_mha::LocalMHAConfig config{
        .dim = 12, .window_size = 20, .dim_head = 8, .heads = 4, .causal = causal};
    config.kv_heads = 2;
    const typename TypeParam::SplitLayer mha(communicator, TypeParam::layer_of(config));
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

// Gradients are sums in another order, so that one of them may be rounded to another operand, here
// and there.
struct Apart {
  double sum = 0, most = 0, largest = 0;
  Index size = 0;

  template <typename Tensor>
  void add(const Tensor& got, const Tensor& expected) {
    for (Index i = 0; i < expected.size(); ++i, ++size) {
      const double apart = support::distance(got.data()[i], expected.data()[i]);
      sum += apart;
      most = std::max(most, apart);
      largest = std::max(largest, std::abs(static_cast<double>(expected.data()[i])));
    }
  }
  void expect_close(const std::string& name) const {
    EXPECT_LE(most, 1e-3 * largest) << name;
    EXPECT_LE(sum, 1e-5 * largest * static_cast<double>(size)) << name;
  }
};
template <typename Parameters>
void expect_close(const std::string& name, const Parameters& got, const Parameters& expected) {
  std::vector<std::pair<std::string, Tensor<float, 1>>> tensors;
  const auto flat = [](const auto& tensor) {
    Tensor<float, 1> all(tensor.size());
    std::copy_n(tensor.data(), tensor.size(), all.data());
    return all;
  };
  local_mha::for_each_parameter(got, [&](const std::string& of, const auto& tensor) {
    tensors.emplace_back(of, flat(tensor));
  });
  std::size_t i = 0;
  local_mha::for_each_parameter(expected, [&](const std::string&, const auto& tensor) {
    Apart apart;
    apart.add(tensors[i].second, flat(tensor));
    apart.expect_close(name + ", " + tensors[i++].first);
  });
}

local_mha::LocalMHAConfig attention() {
  return {.dim = 12, .window_size = 9, .dim_head = 6, .heads = 2, .prenorm = true};
}

TYPED_TEST(SplitSixteenBits, AreEncodersAndModels) {
  const Communicator communicator;
  for (const Index streams : {1, 3}) {
    local_mha::EncoderConfig config{.depth = 2, .layers = {attention()}};
    config.num_residual_streams = streams;
    const typename TypeParam::Encoder encoder(config, 3);
    const typename TypeParam::SplitEncoder split_encoder(communicator, encoder);
    const auto x = random_rows<float>(2, 301, 12, 5);
    const Split split = Split::even(communicator, 301, 16);
    EXPECT_EQ(difference(split_encoder.forward(own_rows(x, split), split),
                         own_rows(encoder.forward(x), split)),
              0)
        << streams;
  }

  const typename TypeParam::Model model({.num_tokens = 11,
                                         .max_seq_len = 400,
                                         .dim = 12,
                                         .depth = 2,
                                         .local_attn_window_size = 8,
                                         .dim_head = 6,
                                         .heads = 2},
                                        3);
  const typename TypeParam::SplitModel split_model(communicator, model);
  const Split split = Split::even(communicator, 301, 16);
  const auto tokens_of = [](Index rows, Index first) {
    Tensor<std::int64_t, 2> tokens(1, rows);
    for (Index i = 0; i < rows; ++i) tokens(0, i) = (first + i) * (first + i) % 11;
    return tokens;
  };
  const auto whole = tokens_of(301, 0), own = tokens_of(split.rows(), split.stretch().begin);
  EXPECT_EQ(difference(split_model.forward(own, split), own_rows(model.forward(whole), split)), 0);
  EXPECT_NEAR(split_model.loss(own, own, split), model.loss(whole, whole), 1e-6);
  if constexpr (std::is_same_v<TypeParam, Operands>) {
    auto gradients = TypeParam::SplitModel::Parameters::zeros(model.config());
    auto expected = gradients;
    const float loss = split_model.backward(gradients, own, own, split);
    EXPECT_NEAR(loss, model.backward(expected, whole, whole), 1e-6);
    expect_close("model", gradients, expected);
  }
}

// Layers whose weights are rounded are not trained, unless they multiply what they round.
template <typename Mha>
concept GoesBack = requires(const Mha& mha, typename Mha::Parameters& gradients,
                            const typename Mha::Saved& saved, const Tensor<float, 3>& x,
                            const Split& split) { mha.backward(gradients, saved, x, x, split); };
static_assert(GoesBack<local_mha::mpi::LocalMHA<float>>);
static_assert(!GoesBack<local_mha::mpi::LocalMHA<float, half>>);
static_assert(GoesBack<Operands::SplitLayer>);

TEST(SplitOperands, GoBackAsOneProcessDoes) {
  const Communicator communicator;
  const std::vector<Index> lengths{201, 77};
  for (const auto& [name, of_layer] : mpi_tests::layers()) {
    auto config = of_layer;
    config.dropout = 0.2;
    const auto layer = Operands::layer_of(config);
    const Operands::SplitLayer mha(communicator, layer);
    const auto x = random_rows<float>(2, 201, config.dim, 5);
    const auto grad_y = random_rows<float>(2, 201, config.dim, 6);
    const LocalMHACall<float> call{.training = local_mha::Training{.seed = 9}, .lengths = lengths};
    auto expected = local_mha::LocalMHAParameters<float>::zeros(config);
    Operands::Layer::Saved saved;
    layer.forward_saving(saved, x, call);
    const auto grad_x = layer.backward(expected, saved, grad_y, x, call);
    for (const Index rows :
         {Split::even(communicator, 201, 16).rows(), mpi_tests::splits(communicator, 201).back()}) {
      const Split split(communicator, rows);
      const auto own = own_rows(x, split);
      Operands::SplitLayer::Saved own_saved;
      mha.forward_saving(own_saved, own, split, call);
      auto gradients = local_mha::LocalMHAParameters<float>::zeros(config);
      Apart apart;
      apart.add(mha.backward(gradients, own_saved, own_rows(grad_y, split), own, split, call),
                own_rows(grad_x, split));
      if (rows > 0) apart.expect_close(name);
      expect_close(name, gradients, expected);
    }
  }
}

TEST(SplitSixteenBitLayers, MustBeStoredInTheSameWay) {
  const Communicator communicator;
  if (communicator.size() == 1) GTEST_SKIP();
  const auto make = [&](auto numbers) {
    using Numbers = decltype(numbers);
    typename Numbers::SplitLayer(communicator, Numbers::layer_of(attention()));
  };
  const bool last = communicator.rank() == communicator.size() - 1;
  says("config: expected the same on every rank",
       [&] { last ? make(As<half>()) : make(As<bfloat16>()); });
  says("config: expected the same on every rank",
       [&] { last ? make(As<float>()) : make(As<bfloat16>()); });
  says("config: expected the same on every rank",
       [&] { last ? make(Operands()) : make(As<bfloat16>()); });
}

}  // namespace
}  // namespace sixteen_bits_test
