// SPDX-License-Identifier: MIT
// The outputs of the PyTorch package, from its files through io/ to the result.
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>

#include <local_mha/io/weights.hpp>

#include "support/golden_file.hpp"
#include "support/library.hpp"

namespace golden_test {

namespace io = local_mha::io;
using local_mha::Index;
using local_mha::Tensor;

/// What the tests hold outputs against: 1e-10 in double, 2e-5 in float, of the largest output.
template <typename Scalar>
constexpr double tolerance = std::is_same_v<Scalar, float> ? 2e-5 : 1e-10;

local_mha::PaddingMask mask(const io::SafetensorsFile& file) {
  if (!file.contains("input/keep_mask")) return {};
  return local_mha::PaddingMask::keep(file.tensor<bool, 2>("input/keep_mask"));
}

template <typename Scalar>
Tensor<Scalar, 3> bias(const io::SafetensorsFile& file) {
  if (!file.contains("input/attn_bias")) return Tensor<Scalar, 3>(0, 0, 0);
  return file.tensor<Scalar, 3>("input/attn_bias");
}

template <typename Scalar, int Rank>
testing::AssertionResult is_output(const Tensor<Scalar, Rank>& got, const io::SafetensorsFile& file,
                                   const std::string& name) {
  const auto expected = support::array(file.tensor<double, Rank>(name));
  return support::close(support::array(got), expected,
                        tolerance<Scalar> * support::largest(expected));
}

template <typename Scalar>
void expect_golden_outputs(const std::filesystem::path& path) {
  const io::SafetensorsFile file(path);
  const io::Case described = io::read_case(file);
  const auto attn_bias = bias<Scalar>(file);
  if (described.kind == "LocalAttention") {
    local_mha::LocalAttentionCall<Scalar> call{.mask = mask(file),
                                               .attn_bias = support::optional_view(attn_bias)};
    if (described.call.contains("window_size"))
      call.window_size = described.call["window_size"].get<Index>();
    const local_mha::LocalAttention<Scalar> attention(io::load_local_attention(file));
    const auto y =
        attention.forward(file.tensor<Scalar, 4>("input/q"), file.tensor<Scalar, 4>("input/k"),
                          file.tensor<Scalar, 4>("input/v"), call);
    EXPECT_TRUE(is_output(y, file, "output/y"));
  } else if (described.kind == "LocalMHA") {
    auto [config, parameters] = io::load_local_mha<Scalar>(file);
    const local_mha::LocalMHA<Scalar> mha(config, std::move(parameters));
    const auto y = mha.forward(file.tensor<Scalar, 3>("input/x"), mask(file),
                               support::optional_view(attn_bias));
    EXPECT_TRUE(is_output(y, file, "output/y"));
  } else {
    ASSERT_EQ(described.kind, "LocalTransformer");
    auto [config, parameters] = io::load_local_transformer<Scalar>(file);
    const local_mha::LocalTransformer<Scalar> model(config, std::move(parameters));
    const auto tokens = file.tensor<std::int64_t, 2>("input/tokens");
    Tensor<std::int64_t, 2> inputs(tokens.dimension(0), tokens.dimension(1) - 1);
    for (Index b = 0; b < inputs.dimension(0); ++b)
      for (Index i = 0; i < inputs.dimension(1); ++i) inputs(b, i) = tokens(b, i);
    EXPECT_TRUE(is_output(model.forward(inputs), file, "output/logits"));
    const auto loss = file.scalar<double>("output/loss");
    EXPECT_NEAR(static_cast<double>(model.loss(tokens)), loss, tolerance<Scalar> * loss);
  }
}

class GoldenFile : public testing::TestWithParam<std::filesystem::path> {};

TEST_P(GoldenFile, InDouble) { expect_golden_outputs<double>(GetParam()); }
TEST_P(GoldenFile, InFloat) { expect_golden_outputs<float>(GetParam()); }

INSTANTIATE_TEST_SUITE_P(, GoldenFile,
                         testing::ValuesIn(golden::files(LOCAL_MHA_TEST_DATA_DIR "/golden")),
                         [](const auto& file) { return file.param.stem().string(); });

TEST(GoldenFiles, AreAllThere) {
  std::set<std::string> kinds;
  const auto files = golden::files(LOCAL_MHA_TEST_DATA_DIR "/golden");
  for (const auto& path : files) kinds.insert(io::read_case(io::SafetensorsFile(path)).kind);
  EXPECT_EQ(files.size(), 39U);
  EXPECT_EQ(kinds, (std::set<std::string>{"LocalAttention", "LocalMHA", "LocalTransformer"}));
}

TEST(GoldenFiles, OfWrongWeightsAreToldApart) {
  // A parameter changed by 1e-6 shows in double: the comparison is no formality.
  const io::SafetensorsFile file(LOCAL_MHA_TEST_DATA_DIR "/golden/mha_everything.safetensors");
  auto [config, parameters] = io::load_local_mha<double>(file);
  parameters.to_qkv(0, 0) += 1e-6;
  const local_mha::LocalMHA<double> mha(config, std::move(parameters));
  const auto attn_bias = bias<double>(file);
  EXPECT_FALSE(is_output(
      mha.forward(file.tensor<double, 3>("input/x"), mask(file), support::optional_view(attn_bias)),
      file, "output/y"));
}

class TrainedModel : public testing::Test {
 protected:
  TrainedModel()
      : expected_(LOCAL_MHA_EXAMPLE_DATA_DIR "/shakespeare_expected.safetensors"),
        tokens_(expected_.tensor<std::int64_t, 2>("input/tokens")) {}

  static local_mha::LocalTransformer<float> model() {
    const io::SafetensorsFile file(LOCAL_MHA_EXAMPLE_DATA_DIR "/shakespeare.safetensors");
    auto [config, parameters] = io::load_local_transformer<float>(file);
    return local_mha::LocalTransformer<float>(config, std::move(parameters));
  }

  io::SafetensorsFile expected_;
  Tensor<std::int64_t, 2> tokens_;
};

TEST_F(TrainedModel, GivesTheLogitsOfPyTorch) {
  Tensor<std::int64_t, 2> inputs(tokens_.dimension(0), tokens_.dimension(1) - 1);
  for (Index b = 0; b < inputs.dimension(0); ++b)
    for (Index i = 0; i < inputs.dimension(1); ++i) inputs(b, i) = tokens_(b, i);
  EXPECT_TRUE(support::close(support::array(model().forward(inputs)),
                             support::array(expected_.tensor<double, 3>("output/logits")), 2e-4));
}

TEST_F(TrainedModel, GivesTheLossOfPyTorch) {
  EXPECT_NEAR(static_cast<double>(model().loss(tokens_)), expected_.scalar<double>("output/loss"),
              1e-4);
}

}  // namespace golden_test
