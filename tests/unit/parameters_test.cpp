// SPDX-License-Identifier: MIT
// Modules hold their weights in the order in which passes read them. What parameters() makes of
// them again is what was given, to the bit.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "support/library.hpp"

namespace parameters_test {

using local_mha::Encoder;
using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalTransformer;
using local_mha::PackedWeight;
using local_mha::RowMatrix;

/// Random numbers, and some that only copies keep.
template <typename Parameters>
void fill(Parameters& parameters) {
  std::uint64_t state = 1;
  local_mha::for_each_parameter(parameters, [&](const std::string&, auto& tensor) {
    using Scalar = typename std::remove_reference_t<decltype(tensor)>::Scalar;
    using Limits = std::numeric_limits<Scalar>;
    for (Index i = 0; i < tensor.size(); ++i) {
      state = state * 6364136223846793005U + 1442695040888963407U;
      const auto random = static_cast<Scalar>(static_cast<double>(state >> 33) / 4294967296.0);
      switch (state >> 59) {
        case 0:
          tensor.data()[i] = -Scalar(0);
          break;
        case 1:
          tensor.data()[i] = Limits::denorm_min();
          break;
        case 2:
          tensor.data()[i] = -Limits::infinity();
          break;
        case 3:
          tensor.data()[i] = Limits::quiet_NaN();
          break;
        default:
          tensor.data()[i] = random;
      }
    }
  });
}

template <typename Parameters>
std::vector<unsigned char> bytes(const Parameters& parameters) {
  std::vector<unsigned char> all;
  local_mha::for_each_parameter(parameters, [&](const std::string& name, const auto& tensor) {
    all.insert(all.end(), name.begin(), name.end());
    for (const Index extent : {tensor.rows(), tensor.cols()})
      all.push_back(static_cast<unsigned char>(extent));
    const auto size = static_cast<std::size_t>(tensor.size()) * sizeof(*tensor.data());
    const auto before = all.size();
    all.resize(before + size);
    if (size > 0) std::memcpy(all.data() + before, tensor.data(), size);
  });
  return all;
}

template <typename Module, typename Config>
void expect_what_was_given(const std::string& what, const Config& config) {
  SCOPED_TRACE(what);
  auto given = Module::Parameters::zeros(config);
  fill(given);
  const Module module(config, given);
  const Module copy = module;

  std::vector<const typename Module::Parameters*> got(4);
  std::vector<std::thread> threads;
  for (auto& of_thread : got) threads.emplace_back([&] { of_thread = &module.parameters(); });
  for (std::thread& thread : threads) thread.join();

  for (const auto* parameters : got) EXPECT_EQ(parameters, got.front());
  EXPECT_EQ(&copy.parameters(), got.front());
  EXPECT_TRUE(got.front()->has_shapes_of(given));
  EXPECT_TRUE(bytes(*got.front()) == bytes(given));

  Module other(config, 7);
  const auto of_seven = bytes(other.parameters());
  EXPECT_FALSE(of_seven == bytes(given));
  other.set_parameters(given);
  EXPECT_TRUE(bytes(other.parameters()) == bytes(given));
}

template <typename Scalar>
class ParametersOf : public testing::Test {};
TYPED_TEST_SUITE(ParametersOf, support::Scalars, support::ScalarNames);

TYPED_TEST(ParametersOf, TheLayer) {
  using Layer = LocalMHA<TypeParam>;
  LocalMHAConfig config{.dim = 13, .window_size = 4, .dim_head = 5, .heads = 3};
  config.use_rotary_pos_emb = false;
  expect_what_was_given<Layer>("plain", config);
  config.prenorm = config.qk_rmsnorm = config.gate_values_per_head = true;
  config.qkv_bias = config.out_bias = true;
  expect_what_was_given<Layer>("norms, gates and biases", config);
  config.qk_rmsnorm = false;
  config.norm.kind = local_mha::NormKind::rms;
  for (const auto kind : {local_mha::QkNormKind::rms, local_mha::QkNormKind::rms_all}) {
    config.qk_norm.kind = kind;
    expect_what_was_given<Layer>("root mean squares", config);
  }
  config = {.dim = 7, .window_size = 0, .dim_head = 9, .heads = 6};
  config.use_rotary_pos_emb = false;
  config.kv_heads = 2;
  config.token_window = local_mha::TokenWindow{.left = 3, .right = 2};
  config.relative_bias = config.sinks = true;
  expect_what_was_given<Layer>("few keys, a token window, sinks", config);
  expect_what_was_given<Layer>("whole lanes", LocalMHAConfig{.dim = 64, .window_size = 4});
}

TYPED_TEST(ParametersOf, TheEncoder) {
  using Module = Encoder<TypeParam>;
  local_mha::EncoderConfig config{.depth = 3, .layers = {{.dim = 11, .window_size = 4}}};
  config.layers.front().dim_head = 6;
  config.layers.front().heads = 3;
  expect_what_was_given<Module>("one stream", config);
  config.use_dynamic_pos_bias = true;
  config.layers.front().use_rotary_pos_emb = false;
  config.num_residual_streams = 3;
  expect_what_was_given<Module>("three streams", config);
  config.depth = 0;
  config.use_dynamic_pos_bias = false;
  Module none(config);
  EXPECT_TRUE(none.parameters().layers.empty());
}

TYPED_TEST(ParametersOf, TheTransformer) {
  using Module = LocalTransformer<TypeParam>;
  local_mha::LocalTransformerConfig config{
      .num_tokens = 19, .max_seq_len = 21, .dim = 13, .depth = 2};
  config.local_attn_window_size = 4;
  config.dim_head = 6;
  config.heads = 3;
  expect_what_was_given<Module>("one stream", config);
  config.dim_head = 5;
  config.num_residual_streams = 2;
  config.use_dynamic_pos_bias = config.qk_rmsnorm = true;
  expect_what_was_given<Module>("two streams", config);
}

TYPED_TEST(ParametersOf, APackedWeight) {
  struct Case {
    Index rows, cols, group_rows, column_group, padded_group;
  };
  for (const Case& c :
       {Case{13, 7, 0, 0, 0}, Case{15, 6, 5, 0, 0}, Case{7, 15, 0, 5, 8}, Case{24, 18, 12, 9, 16},
        Case{8, 16, 0, 0, 0}, Case{0, 5, 0, 0, 0}, Case{5, 0, 0, 0, 0}, Case{1, 1, 0, 0, 0}}) {
    RowMatrix<TypeParam> weight(c.rows, c.cols);
    for (Index i = 0; i < weight.size(); ++i) weight.data()[i] = static_cast<TypeParam>(i + 1);
    const PackedWeight<TypeParam> packed(weight, c.group_rows, c.column_group, c.padded_group);
    EXPECT_EQ(packed.unpacked(), weight);
    EXPECT_EQ(packed.rows(), c.rows);
    EXPECT_EQ(packed.cols(), c.cols);

    // As from the matrix.
    const Index group = c.column_group;
    const PackedWeight<TypeParam> expected(weight.transpose(), group, c.group_rows,
                                           2 * c.group_rows);
    PackedWeight<TypeParam> transposed;
    transposed.pack_transposed(packed, group, c.group_rows, 2 * c.group_rows);
    EXPECT_EQ(transposed.unpacked(), weight.transpose());
    ASSERT_EQ(transposed.depth(), expected.depth());
    ASSERT_EQ(transposed.panel_size(), expected.panel_size());
    const Index groups = expected.group_rows() > 0 ? c.cols / expected.group_rows() : 0;
    for (Index g = 0; g < groups; ++g)
      for (Index p = 0; p < expected.group_panels(); ++p)
        for (Index i = 0; i < expected.panel_size(); ++i)
          ASSERT_EQ(transposed.panel(g, p)[i], expected.panel(g, p)[i]) << g << ' ' << p;
  }
  const PackedWeight<TypeParam> grouped(RowMatrix<TypeParam>::Ones(4, 12), 0, 6, 8);
  PackedWeight<TypeParam> transposed;
  EXPECT_THROW(transposed.pack_transposed(grouped), std::invalid_argument);
  EXPECT_THROW(transposed.pack_transposed(grouped, 4), std::invalid_argument);
  EXPECT_NO_THROW(transposed.pack_transposed(grouped, 3));
}

TYPED_TEST(ParametersOf, TrainingThatAsksForNone) {
  // The same gradients, whoever has made the set, and whatever order the weights lie in.
  using Layer = LocalMHA<TypeParam>;
  const LocalMHAConfig config{.dim = 13, .window_size = 4, .dim_head = 6, .heads = 3};
  const Layer layer(config, 3);
  const Layer asked(config, Layer(config, 3).parameters());
  local_mha::Tensor<TypeParam, 3> x(2, 9, 13);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<TypeParam>(i % 7) - 3;
  const auto gradients_of = [&](const Layer& l, bool first) {
    if (first) l.parameters();
    typename Layer::Saved saved;
    l.forward_saving(saved, x);
    auto gradients = Layer::Parameters::zeros(config);
    l.backward(gradients, saved, x, x);
    return bytes(gradients);
  };
  EXPECT_TRUE(gradients_of(layer, false) == gradients_of(asked, true));
}

}  // namespace parameters_test
