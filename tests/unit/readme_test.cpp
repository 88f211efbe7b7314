// SPDX-License-Identifier: MIT
// What the READMEs and the guide show, compiled as it stands there; tests/CMakeLists.txt takes it
// from them.
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/io/attention_layers.hpp>
#include <local_mha/io/encoder_weights.hpp>
#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>

#include "support/library.hpp"
#include "support/temporary_folder.hpp"

namespace readme_test {

using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::Training;

/// A small model.
local_mha::LocalTransformerConfig transformer_config() {
  return {.num_tokens = 5,
          .max_seq_len = 12,
          .dim = 8,
          .depth = 1,
          .local_attn_window_size = 4,
          .dim_head = 4,
          .heads = 2};
}

TEST(Readme, StreamsALayer) {
#include "stream.cpp"
  EXPECT_EQ(stream.answered(), 7000);
}

TEST(Readme, GeneratesText) {
  const local_mha::LocalTransformer<float> model(transformer_config(), 1);
  Tensor<std::int64_t, 2> prompt(2, 3);
  prompt.setConstant(1);
#include "generate.cpp"
  EXPECT_EQ(tokens.dimension(0), 2);
  EXPECT_GT(tokens.dimension(1), 0);
  EXPECT_LE(tokens.dimension(1), 200);  // the stop token comes when it comes
}

TEST(Readme, LoadsALayer) {
  // The snippet's file is one of the current folder.
  const support::CurrentFolder folder;
  std::filesystem::copy_file(LOCAL_MHA_TEST_DATA_DIR "/golden/mha_everything.safetensors",
                             "layer.safetensors");
#include "weights.cpp"
  EXPECT_EQ(mha.forward(file.tensor<float, 3>("input/x")).dimension(2), mha.config().dim);
}

TEST(Readme, LoadsALayerFromMemory) {
  const local_mha::LocalMHAConfig config{.dim = 16, .window_size = 4, .dim_head = 8, .heads = 4};
  const std::vector<float> numbers(std::size_t{3} * 32 * 16, 0.5F);
  const float* const pointer = numbers.data();
  const local_mha::RowMatrix<float> matrix = local_mha::RowMatrix<float>::Random(16, 32);
#include "state_dict.cpp"
  EXPECT_EQ(parameters.to_qkv(95, 15), 0.5F);
  EXPECT_EQ(parameters.to_out, matrix);
}

// A program.
#define main load_attention
#include "load_attention.cpp"
#undef main

TEST(Readme, LoadsALayerOfAPublishedModel) {
  const support::CurrentFolder folder;
  local_mha::io::SafetensorsWriter model;
  for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj"})
    model.add("model.layers.0.self_attn." + std::string(name) + ".weight", {8, 8},
              std::vector<float>(64, 0.25F));
  model.write("model.safetensors");
  std::ofstream("config.json") << R"({"model_type": "mistral", "hidden_size": 8,
                                      "num_attention_heads": 2, "sliding_window": 5})";
  testing::internal::CaptureStdout();
  EXPECT_EQ(load_attention(), 0);
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "100 rows of layer 0\n");
}

// A program.
#define main train_own_model
#include "own_model.cpp"
#undef main

TEST(Readme, TrainsAModelOfOnesOwn) {
  testing::internal::CaptureStdout();
  EXPECT_EQ(train_own_model(), 0);
  std::istringstream text(testing::internal::GetCapturedStdout());
  const std::vector<double> losses{std::istream_iterator<double>(text), {}};
  ASSERT_EQ(losses.size(), 6U);
  EXPECT_GT(losses.front(), 2);
  EXPECT_LT(losses.back(), losses.front() / 10);
}

// A program.
#define main stream_audio
#include "audio_stream.cpp"
#undef main

TEST(Readme, StreamsSoundThroughAnEncoder) {
  testing::internal::CaptureStdout();
  EXPECT_EQ(stream_audio(), 0);
  EXPECT_EQ(testing::internal::GetCapturedStdout(),
            "200 frames in, 168 features out\n400 frames in, 368 features out\n"
            "600 frames in, 568 features out\n800 frames in, 768 features out\n"
            "0 missing, as of the whole\n");
}

// A program.
#define main use_encoder
#include "encoder.cpp"
#undef main

TEST(Readme, UsesAnEncoder) {
  testing::internal::CaptureStdout();
  EXPECT_EQ(use_encoder(), 0);
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "100 rows of an encoder\n");
}

TEST(Readme, LoadsAnEncoder) {
  const support::CurrentFolder folder;
  std::filesystem::copy_file(LOCAL_MHA_TEST_DATA_DIR "/golden_stack/stack_masked.safetensors",
                             "encoder.safetensors");
#include "encoder_weights.cpp"
  const local_mha::io::SafetensorsFile list("list.safetensors");
  EXPECT_EQ(local_mha::io::load_encoder<float>(list).config, encoder.config());
}

TEST(Readme, StoresWeightsIn16Bits) {
  const LocalMHA<float> mha({.dim = 8, .window_size = 4, .dim_head = 4, .heads = 2}, 1);
  const local_mha::io::SafetensorsFile file(LOCAL_MHA_TEST_DATA_DIR
                                            "/golden/transformer_causal.safetensors");
#include "storage.cpp"
  const float weight = mha.parameters().to_out(0, 0);
  const auto stored = static_cast<float>(Eigen::bfloat16(weight));
  EXPECT_NE(stored, weight);
  EXPECT_EQ(small.parameters().to_out(0, 0), stored);
#include "arithmetic.cpp"
  EXPECT_EQ(fast.parameters().to_out(0, 0), stored);
  EXPECT_EQ(fast_model.config().dim, config.dim);
  EXPECT_EQ(model.config().dim, config.dim);
}

TEST(Readme, TrainsALayerInBfloat16) {
  const local_mha::LocalMHAConfig config{.dim = 8, .window_size = 4, .dim_head = 4, .heads = 2};
  struct Batch {
    Tensor<float, 3> x;
    // Of half the squares of what lies between the layer's result and the rows turned around.
    Tensor<float, 3> gradient_of_loss(const Tensor<float, 3>& y) const { return y + x; }
  };
  std::vector<Batch> batches(200, Batch{Tensor<float, 3>(1, 12, 8)});
  for (Batch& batch : batches) batch.x.setRandom();
  const auto loss_of = [&](const auto& layer) {
    const Tensor<float, 3>& x = batches.front().x;
    const Tensor<float, 3> difference = layer.forward(x) + x;
    float loss = 0;
    for (Index i = 0; i < difference.size(); ++i)
      loss += difference.data()[i] * difference.data()[i];
    return loss;
  };
  const float before = loss_of(LocalMHA<float>(config));
#include "arithmetic_training.cpp"
  EXPECT_LT(loss_of(layer), before / 2);
  // The layer holds what the parameters are rounded to.
  EXPECT_NE(layer.parameters().to_out(0, 0), parameters.to_out(0, 0));
  EXPECT_EQ(layer.parameters().to_out(0, 0),
            static_cast<float>(Eigen::bfloat16(parameters.to_out(0, 0))));
}

TEST(Readme, AttendsFromTensors) {
#include "attention.cpp"
  EXPECT_EQ(out.dimensions(), q.dimensions());
}

TEST(Readme, StreamsAnAttention) {
#include "attention_stream.cpp"
  EXPECT_EQ(stream.answered(), 100);
}

TEST(Readme, TakesWeightsFromMemory) {
  const Eigen::MatrixXf my_weights = Eigen::MatrixXf::Random(16, 16);
#include "own_weights.cpp"
  EXPECT_EQ(mha.parameters().to_out(1, 2), my_weights(2, 1));
}

TEST(Readme, TrainsAModel) {
  local_mha::LocalTransformerConfig config = transformer_config();
  config.attn_dropout = 0.1;
  const Eigen::DefaultDevice device;
  const PaddingMask mask;
  Tensor<std::int64_t, 2> tokens(2, 11);
  for (Index i = 0; i < tokens.size(); ++i) tokens.data()[i] = i % 3;
  const Index steps = 100;
  const float before = local_mha::LocalTransformer<float>(config, 1).loss(tokens);
#include "model.cpp"
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
#include "layer.cpp"
  EXPECT_TRUE(support::same_bits(y, mha.forward(x)));
  EXPECT_EQ(grad_x.dimensions(), x.dimensions());
}

}  // namespace readme_test
