// SPDX-License-Identifier: MIT
// What the README shows, compiled as it stands there.
#include <gtest/gtest.h>

#include <optional>

#include <local_mha/local_mha.hpp>

#include "support/library.hpp"

namespace {

using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::Training;

TEST(Readme, TrainsAModel) {
  local_mha::LocalTransformerConfig config{.num_tokens = 5,
                                           .max_seq_len = 12,
                                           .dim = 8,
                                           .depth = 1,
                                           .local_attn_window_size = 4,
                                           .dim_head = 4,
                                           .heads = 2};
  config.attn_dropout = 0.1;
  const Eigen::DefaultDevice device;
  const PaddingMask mask;
  Tensor<std::int64_t, 2> tokens(2, 11);
  for (Index i = 0; i < tokens.size(); ++i) tokens.data()[i] = i % 3;
  const Index steps = 100;
  const float before = local_mha::LocalTransformer<float>(config, 1).loss(tokens);
#include "model.inc"
  EXPECT_EQ(optimizer.steps(), 100U);
  EXPECT_LT(model.loss(tokens), before / 4);
}

TEST(Readme, TakesALayerThereAndBack) {
  const LocalMHA<float> mha({.dim = 8, .window_size = 4, .dim_head = 4, .heads = 2});
  auto gradients = local_mha::LocalMHAParameters<float>::zeros(mha.config());
  Tensor<float, 3> x(1, 10, 8), grad_y(1, 10, 8);
  x.setRandom();
  grad_y.setRandom();
  const PaddingMask mask;
  const LocalMHA<float>::Bias attn_bias;
  const std::optional<Training> training;
#include "layer.inc"
  EXPECT_TRUE(support::same_bits(y, mha.forward(x)));
  EXPECT_EQ(grad_x.dimensions(), x.dimensions());
}

}  // namespace
