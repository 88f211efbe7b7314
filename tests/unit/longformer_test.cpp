// SPDX-License-Identifier: MIT
// Longformer's self-attention: the model's results, and the reference's for random global rows.
#define EIGEN_USE_THREADS
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <local_mha/io/attention_case.hpp>
#include <local_mha/io/longformer_layers.hpp>
#include <local_mha/local_mha.hpp>
#include <local_mha/longformer.hpp>

#include "reference/gradients.hpp"
#include "support/compare.hpp"
#include "support/library.hpp"
#include "support/random.hpp"

namespace longformer_test {

using local_mha::Index;
using local_mha::LongformerAttention;
using local_mha::LongformerConfig;
using local_mha::LongformerParameters;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::TensorView;
namespace io = local_mha::io;
using reference::Array;

template <typename Scalar>
Array<Scalar> array(const Tensor<Scalar, 3>& t) {
  Array<Scalar> a({t.dimension(0), t.dimension(1), t.dimension(2)});
  std::copy(t.data(), t.data() + t.size(), a.data.begin());
  return a;
}

template <typename Scalar>
Tensor<Scalar, 3> tensor(const Array<double>& a) {
  Tensor<Scalar, 3> t(a.shape[0], a.shape[1], a.shape[2]);
  std::transform(a.data.begin(), a.data.end(), t.data(),
                 [](double value) { return static_cast<Scalar>(value); });
  return t;
}

Tensor<bool, 2> flags(const std::vector<unsigned char>& given, Index batch) {
  Tensor<bool, 2> t(batch, static_cast<Index>(given.size()) / batch);
  std::transform(given.begin(), given.end(), t.data(),
                 [](unsigned char flag) { return flag != 0; });
  return t;
}

template <typename Scalar>
void expect_golden(double tolerance, double gradient_tolerance) {
  const io::SafetensorsFile file(LOCAL_MHA_TEST_DATA_DIR "/golden_sliding/longformer.safetensors");
  const io::LongformerLayer layer = io::read_longformer_case(file);
  const LongformerAttention<Scalar> attention(
      layer.config, io::load_longformer_parameters<Scalar>(file, "param/", layer));
  const auto x = file.tensor<Scalar, 3>("input/x");
  const auto global = file.tensor<bool, 2>("input/global_mask");
  const auto keep = file.tensor<bool, 2>("input/keep_mask");
  const PaddingMask mask = PaddingMask::keep(keep);
  typename LongformerAttention<Scalar>::Saved saved;
  Tensor<Scalar, 3> y = attention.forward_saving(saved, x, {.global_rows = global, .mask = mask});
  EXPECT_EQ(array(y).data, array(attention.forward(x, {.global_rows = global, .mask = mask})).data);
  Tensor<double, 3> expected = file.tensor<double, 3>("output/y");
  for (Index b = 0; b < y.dimension(0); ++b)
    for (Index i = 0; i < y.dimension(1); ++i)
      if (!keep(b, i)) {  // rows of padding may hold anything
        y.chip(b, 0).chip(i, 0).setZero();
        expected.chip(b, 0).chip(i, 0).setZero();
      }
  const auto close = [](const Array<Scalar>& got, const Array<double>& wanted, double share) {
    return support::close(got, wanted, share * support::largest(wanted));
  };
  EXPECT_TRUE(close(array(y), array(expected), tolerance));

  auto gradients = LongformerParameters<Scalar>::zeros(layer.config);
  const auto grad_y = file.tensor<Scalar, 3>("input/grad_y");
  const auto grad_x = attention.backward(gradients, saved, grad_y, x, {.global_rows = global});
  EXPECT_TRUE(close(array(grad_x), array(file.tensor<double, 3>("grad/x")), gradient_tolerance));
  const auto of_tensors = io::longformer_gradients(layer, gradients);
  EXPECT_EQ(of_tensors.size(), 12U);
  const double largest_of_all = 10;  // of gradients that are 0 but for roundings
  for (const auto& [name, got] : of_tensors) {
    const std::vector<double> wanted = file.read<double>("grad/param/" + name);
    double largest = 0;
    for (const double value : wanted) largest = std::max(largest, std::abs(value));
    if (largest < 1e-10) largest = largest_of_all;
    for (std::size_t i = 0; i < wanted.size(); ++i)
      ASSERT_NEAR(static_cast<double>(got[i]), wanted[i], gradient_tolerance * largest) << name;
  }
}

TEST(Longformer, GivesTheModelsOutputAndGradients) {
  expect_golden<double>(1e-10, 1e-9);
  expect_golden<float>(2e-5, 1e-4);
}

LongformerParameters<double> parameters_of(const LongformerConfig& config, Random& random) {
  auto parameters = LongformerParameters<double>::zeros(config);
  local_mha::for_each_parameter(parameters, [&](const std::string&, auto& tensor) {
    for (Index i = 0; i < tensor.size(); ++i) tensor.data()[i] = random.uniform(-0.5, 0.5);
  });
  return parameters;
}

template <typename Matrix>
Array<double> array_of(const Matrix& matrix) {
  Array<double> a(Matrix::ColsAtCompileTime == 1
                      ? std::vector<reference::Int>{matrix.rows()}
                      : std::vector<reference::Int>{matrix.rows(), matrix.cols()});
  std::copy(matrix.data(), matrix.data() + matrix.size(), a.data.begin());
  return a;
}

TEST(Longformer, GivesTheReferencesForRandomGlobalRows) {
  for (int trial = 0; trial < 40; ++trial) {
    Random random(static_cast<std::uint64_t>(trial));
    const Index batch = random.integer(1, 2), seqlen = random.integer(1, 40);
    const LongformerConfig config{
        .dim = 12, .heads = trial % 2 == 0 ? 3 : 2, .attention_window = 2 * random.integer(0, 9)};
    const LongformerAttention<double> attention(config, parameters_of(config, random));
    reference::LayerOptions o;
    o.dim = config.dim;
    o.heads = config.heads;
    o.dim_head = config.dim / config.heads;
    const Index side = config.attention_window / 2;
    o.attention.token_window = reference::TokenWindow{side, side};
    o.qkv_bias = true;
    o.out_projection = false;
    o.global_projections = true;
    reference::LayerInputs<double> in;
    in.x = random.array({batch, seqlen, config.dim});
    const Array<double> grad_y = random.array(in.x.shape);
    for (Index row = 0; row < batch * seqlen; ++row) {
      in.global.push_back(trial % 4 != 0 && random.integer(0, 9) == 0);
      // A global row is no padding.
      in.masked.push_back(trial % 3 == 0 && !in.global.back() && random.integer(0, 3) == 0);
    }
    reference::Parameters<double> weights;
    local_mha::for_each_parameter(
        attention.parameters(),
        [&](const std::string& name, const auto& tensor) { weights[name] = array_of(tensor); });
    auto expected_gradients = reference::zeros_like(weights);
    const auto expected = reference::local_mha_backward(o, weights, in, grad_y, expected_gradients);

    const auto global = flags(in.global, batch);
    const auto mask = PaddingMask::masked(flags(in.masked, batch));
    const auto x = tensor<double>(in.x);
    LongformerAttention<double>::Saved saved;
    const auto y = attention.forward_saving(saved, x, {.global_rows = global, .mask = mask});
    auto gradients = LongformerParameters<double>::zeros(config);
    const auto grad_x =
        attention.backward(gradients, saved, tensor<double>(grad_y), x, {.global_rows = global});
    EXPECT_TRUE(support::close(array(y), expected.y, 1e-12)) << trial;
    EXPECT_TRUE(support::close(array(grad_x), expected.x, 1e-11)) << trial;
    local_mha::for_each_parameter(gradients, [&](const std::string& name, const auto& gradient) {
      EXPECT_TRUE(support::close(array_of(gradient), expected_gradients.at(name), 1e-10))
          << trial << name;
    });
    // They are added.
    auto twice = gradients;
    attention.backward(twice, saved, tensor<double>(grad_y), x, {.global_rows = global});
    EXPECT_TRUE(
        support::close(array_of(twice.to_qkv), array_of((2 * gradients.to_qkv).eval()), 1e-12));
  }
}

TEST(Longformer, GivesTheSameBitsOnThreads) {
  Random random(5);
  const LongformerConfig config{.dim = 24, .heads = 3, .attention_window = 10, .dropout = 0.2};
  const LongformerAttention<double> attention(config, parameters_of(config, random));
  const auto x = tensor<double>(random.array({2, 150, 24}));
  const auto grad_y = tensor<double>(random.array({2, 150, 24}));
  Tensor<bool, 2> global(2, 150), masked(2, 150);
  for (Index i = 0; i < global.size(); ++i) {
    global.data()[i] = random.integer(0, 19) == 0;
    masked.data()[i] = !global.data()[i] && random.integer(0, 9) == 0;
  }
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  const auto pass = [&](const local_mha::AnyDevice& threads) {
    const local_mha::LongformerCall call{.global_rows = global,
                                         .mask = PaddingMask::masked(masked),
                                         .training = local_mha::Training{.seed = 3},
                                         .device = threads};
    LongformerAttention<double>::Saved saved;
    auto gradients = LongformerParameters<double>::zeros(config);
    LongformerAttention<double>::Workspace workspace;
    Tensor<double, 3> y(x.dimensions());
    attention.forward_into(y, workspace, x, call);
    std::vector<std::vector<double>> all{
        array(attention.forward(x, call)).data, array(y).data,
        array(attention.forward_saving(saved, x, call)).data,
        array(attention.backward(gradients, saved, grad_y, x, call)).data};
    local_mha::for_each_parameter(gradients, [&](const std::string&, const auto& gradient) {
      all.push_back(array_of(gradient).data);
    });
    return all;
  };
  const auto alone = pass({});
  EXPECT_EQ(alone[0], alone[1]);
  EXPECT_EQ(alone[0], alone[2]);
  EXPECT_EQ(pass(device), alone);
}

TEST(Longformer, IsALocalLayerWithoutGlobalRows) {
  Random random(3);
  const LongformerConfig config{.dim = 12, .heads = 3, .attention_window = 6};
  const auto parameters = parameters_of(config, random);
  const LongformerAttention<double> attention(config, parameters);
  local_mha::LocalMHAConfig layer_config{.dim = 12, .dim_head = 4, .heads = 3};
  layer_config.token_window = local_mha::TokenWindow{3, 3};
  layer_config.qkv_bias = true;
  layer_config.use_rotary_pos_emb = false;
  auto weights = local_mha::LocalMHAParameters<double>::zeros(layer_config);
  weights.to_qkv = parameters.to_qkv;
  weights.to_qkv_bias = parameters.to_qkv_bias;
  weights.to_out.setIdentity();
  const local_mha::LocalMHA<double> layer(layer_config, weights);
  const auto x = tensor<double>(random.array({2, 19, 12}));
  const auto y = attention.forward(x);
  EXPECT_TRUE(support::close(array(y), array(layer.forward(x)), 1e-13));
  // Which has a stream.
  local_mha::LocalMHA<double>::Stream stream(layer, {.batch = 2});
  Tensor<double, 3> streamed(2, 19, 12);
  Index out = 0;
  const auto take = [&](const Tensor<double, 3>& some) {
    for (Index i = 0; i < some.dimension(1); ++i, ++out) streamed.chip(out, 1) = some.chip(i, 1);
  };
  for (Index i = 0; i < 19; ++i)
    take(stream.push(
        Tensor<double, 3>(x.slice(std::array<Index, 3>{0, i, 0}, std::array<Index, 3>{2, 1, 12}))));
  take(stream.flush());
  EXPECT_EQ(out, 19);
  EXPECT_TRUE(support::close(array(streamed), array(y), 1e-13));
}

TEST(Longformer, LeavesARoomThatServesTheNextCall) {
  Random random(8);
  const LongformerConfig config{.dim = 12, .heads = 3, .attention_window = 6};
  const LongformerAttention<double> attention(config, parameters_of(config, random));
  LongformerAttention<double>::Workspace workspace;
  // More and fewer rows and global ones, and none, by turns.
  for (const auto& [batch, seqlen, every] : {std::array<Index, 3>{2, 70, 20},
                                             {1, 9, 3},
                                             {3, 100, 0},
                                             {2, 0, 1},
                                             {1, 130, 2},
                                             {1, 1, 1}}) {
    const auto x = tensor<double>(random.array({batch, seqlen, 12}));
    Tensor<bool, 2> global(batch, seqlen);
    for (Index i = 0; i < global.size(); ++i) global.data()[i] = every > 0 && i % every == 0;
    Tensor<double, 3> y(batch, seqlen, 12);
    y.setConstant(std::nan(""));
    attention.forward_into(y, workspace, x, {.global_rows = global});
    EXPECT_TRUE(support::same_bits(y, attention.forward(x, {.global_rows = global}))) << seqlen;
  }
}

TEST(Longformer, TakesEmptySequences) {
  Random random(3);
  const LongformerConfig config{.dim = 4, .heads = 1, .attention_window = 6};
  const LongformerAttention<double> attention(config, parameters_of(config, random));
  const Tensor<double, 3> x(2, 0, 4);
  LongformerAttention<double>::Saved saved;
  EXPECT_EQ(attention.forward_saving(saved, x).size(), 0);
  auto gradients = LongformerParameters<double>::zeros(config);
  EXPECT_EQ(attention.backward(gradients, saved, x, x).size(), 0);
  EXPECT_EQ(gradients.to_qkv.norm(), 0);
}

TEST(Longformer, DropsProbabilitiesInTraining) {
  Random random(3);
  const LongformerConfig config{.dim = 4, .heads = 1, .attention_window = 6, .dropout = 0.5};
  const LongformerAttention<double> attention(config, parameters_of(config, random));
  const auto x = tensor<double>(random.array({1, 9, 4}));
  Tensor<bool, 2> global(1, 9);
  global.setConstant(false);
  global(0, 4) = true;
  const auto evaluated = array(attention.forward(x, {.global_rows = global})).data;
  const auto trained =
      array(attention.forward(x, {.global_rows = global, .training = local_mha::Training{1}})).data;
  EXPECT_NE(evaluated, trained);
  EXPECT_EQ(trained,
            array(attention.forward(x, {.global_rows = global, .training = local_mha::Training{1}}))
                .data);
  EXPECT_NE(trained,
            array(attention.forward(x, {.global_rows = global, .training = local_mha::Training{2}}))
                .data);
}

TEST(Longformer, KnowsItsCallAgain) {
  Random random(3);
  const LongformerConfig config{.dim = 4, .heads = 1, .attention_window = 6};
  const auto parameters = parameters_of(config, random);
  const LongformerAttention<double> attention(config, parameters);
  const auto x = tensor<double>(random.array({1, 9, 4}));
  LongformerAttention<double>::Saved saved;
  attention.forward_saving(saved, x);
  auto gradients = LongformerParameters<double>::zeros(config);
  const Tensor<double, 3> other = x * 2.0;
  EXPECT_THROW(attention.backward(gradients, saved, x, other), std::invalid_argument);
  const LongformerAttention<double> another(config, parameters_of(config, random));
  EXPECT_THROW(another.backward(gradients, saved, x, x), std::invalid_argument);
  EXPECT_EQ(gradients.to_qkv.norm(), 0);
  // Rows of which none is global are no others than none.
  Tensor<bool, 2> none(1, 9);
  none.setConstant(false);
  EXPECT_TRUE(support::same_bits(attention.backward(gradients, saved, x, x, {.global_rows = none}),
                                 attention.backward(gradients, saved, x, x)));
}

}  // namespace longformer_test
