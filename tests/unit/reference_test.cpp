// SPDX-License-Identifier: MIT
// The reference against the outputs of the PyTorch package: what the other tests rest on.
#include <gtest/gtest.h>

#include <string>

#include "reference/transformer.hpp"
#include "support/compare.hpp"
#include "support/golden_file.hpp"

namespace reference_test {

using reference::Array;

testing::AssertionResult close(const Array<double>& got, const Array<double>& expected) {
  return support::close(got, expected, 1e-14 * support::largest(expected));
}

class ReferenceOnGoldenFile : public testing::TestWithParam<std::filesystem::path> {};

TEST_P(ReferenceOnGoldenFile, GivesWhatPyTorchGave) {
  const golden::Case c = golden::read(GetParam());
  if (c.kind == "LocalAttention") {
    reference::AttentionInputs<double> in;
    in.q = c.at("input/q"), in.k = c.at("input/k"), in.v = c.at("input/v");
    in.masked = c.masked();
    if (c.has("input/attn_bias")) in.bias = c.at("input/attn_bias");
    const auto result = reference::attention(golden::attention_options(c), in);
    EXPECT_TRUE(close(result.out, c.at("output/y")));
  } else if (c.kind == "LocalMHA") {
    reference::LayerInputs<double> in;
    in.x = c.at("input/x");
    in.masked = c.masked();
    if (c.has("input/attn_bias")) in.bias = c.at("input/attn_bias");
    const auto result =
        reference::local_mha(golden::layer_options(c.kwargs), c.below("param/"), in);
    EXPECT_TRUE(close(result.y, c.at("output/y")));
  } else {
    ASSERT_EQ(c.kind, "LocalTransformer");
    const auto options = golden::transformer_options(c);
    Array<golden::Int> inputs({c.tokens().shape[0], c.tokens().shape[1] - 1});
    for (golden::Int b = 0; b < inputs.shape[0]; ++b)
      for (golden::Int i = 0; i < inputs.shape[1]; ++i) inputs(b, i) = c.tokens()(b, i);
    const auto logits = reference::transformer_logits(options, c.below("param/"), inputs);
    EXPECT_TRUE(close(logits, c.at("output/logits")));
    const double loss =
        reference::transformer_loss(options, c.below("param/"), c.tokens(), /*ignore_index=*/-1);
    EXPECT_NEAR(loss, c.at("output/loss").data.at(0), 1e-14);
  }
}

INSTANTIATE_TEST_SUITE_P(, ReferenceOnGoldenFile,
                         testing::ValuesIn(golden::files(LOCAL_MHA_TEST_DATA_DIR "/golden")),
                         [](const auto& file) { return file.param.stem().string(); });

TEST(Reference, SeesThePairsOfADrawnWindow) {
  // w = 2, lb = lf = 1, four positions of windows 0 and 1 and one of window 2.
  const auto drawn = [](const reference::AttentionOptions& o) {
    std::string picture;
    for (int i = 0; i < 5; ++i, picture += '\n')
      for (int j = 0; j < 5; ++j) picture += reference::sees(o, i, j) ? '1' : '0';
    return picture;
  };
  reference::AttentionOptions o{.window_size = 2, .look_backward = 1, .look_forward = 1};
  EXPECT_EQ(drawn(o), "11110\n11110\n11111\n11111\n00111\n");
  o.exact_windowsize = true;
  EXPECT_EQ(drawn(o), "11100\n11110\n11111\n01111\n00111\n");
  o.look_forward = 0;
  o.causal = true;
  EXPECT_EQ(drawn(o), "10000\n11000\n11100\n01110\n00111\n");
  o.exact_windowsize = false;
  EXPECT_EQ(drawn(o), "10000\n11000\n11100\n11110\n00111\n");
  o.first_position = 1;  // the buckets shift against the rows
  EXPECT_EQ(drawn(o), "10000\n11000\n11100\n01110\n01111\n");
}

}  // namespace reference_test
