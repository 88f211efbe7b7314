// SPDX-License-Identifier: MIT
// The reference against the attention layers of published models: their outputs and gradients.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "reference/gradients.hpp"
#include "support/compare.hpp"
#include "support/golden_file.hpp"
#include "support/sliding_family.hpp"

namespace golden_sliding_reference_test {

using reference::Array;
using reference::Int;

testing::AssertionResult close(const Array<double>& got, const Array<double>& expected,
                               double tolerance) {
  return support::close(got, expected, tolerance * support::largest(expected));
}

std::vector<std::filesystem::path> files() {
  return golden::files(LOCAL_MHA_TEST_DATA_DIR "/golden_sliding");
}

/// `[B, N, C]` from `[B, C, N]`, and the reverse.
Array<double> transposed(const Array<double>& from) {
  Array<double> to({from.shape[0], from.shape[2], from.shape[1]});
  for (Int b = 0; b < from.shape[0]; ++b)
    for (Int i = 0; i < from.shape[1]; ++i)
      for (Int j = 0; j < from.shape[2]; ++j) to(b, j, i) = from(b, i, j);
  return to;
}

/// Without the rows of padding, which may hold anything.
Array<double> without_padding(Array<double> rows, const std::vector<unsigned char>& masked) {
  for (std::size_t row = 0; row < masked.size(); ++row)
    for (std::size_t c = 0; masked[row] && c < static_cast<std::size_t>(rows.shape[2]); ++c)
      rows.data[row * static_cast<std::size_t>(rows.shape[2]) + c] = 0;
  return rows;
}

class SlidingReferenceOnGoldenFile : public testing::TestWithParam<std::filesystem::path> {
 protected:
  golden::Case file_ = golden::read(GetParam());
  reference::Parameters<double> weights_ = file_.below("param/");
  golden::SlidingLayer layer_ = golden::sliding_layer(file_);
};

TEST_P(SlidingReferenceOnGoldenFile, GivesTheModelsOutputAndGradients) {
  reference::LayerInputs<double> in;
  Array<double> grad_y = file_.at("input/grad_y");
  in.x = file_.at("input/x");
  if (layer_.channels_first) in.x = transposed(in.x), grad_y = transposed(grad_y);
  in.masked = file_.masked();
  in.score = layer_.score<double>();
  if (file_.has("input/global_mask"))
    for (const double global : file_.at("input/global_mask").data) in.global.push_back(global != 0);
  const auto parameters = golden::reference_weights(layer_, weights_);
  auto gradients = reference::zeros_like(parameters);
  auto got = reference::local_mha_backward(layer_.options, parameters, in, grad_y, gradients);
  EXPECT_EQ(got.y.data, reference::local_mha(layer_.options, parameters, in).y.data);
  if (layer_.residual) {
    reference::add(in.x, got.y);
    reference::add(grad_y, got.x);
  }
  if (layer_.channels_first) got.y = transposed(got.y), got.x = transposed(got.x);
  EXPECT_TRUE(close(without_padding(got.y, in.masked),
                    without_padding(file_.at("output/y"), in.masked), 1e-13));
  EXPECT_TRUE(close(got.x, file_.at("grad/x"), 1e-13));

  // Every gradient, and every weight but a table of constants.
  const auto of_weights = golden::model_gradients(layer_, gradients, weights_);
  const auto expected = file_.below("grad/param/");
  // The gradient of a key's bias, which all scores of a query have in common, may be 0 but for
  // roundings.
  double largest = 0;
  for (const auto& [name, gradient] : expected)
    largest = std::max(largest, support::largest(gradient));
  ASSERT_FALSE(expected.empty());
  for (const auto& [name, gradient] : expected) {
    ASSERT_EQ(of_weights.count(name), 1U) << name;
    const double size = std::max(support::largest(gradient), 1e-3 * largest);
    EXPECT_TRUE(support::close(of_weights.at(name), gradient, 1e-12 * size)) << name;
  }
  for (const auto& [name, weight] : weights_) {
    EXPECT_EQ(of_weights.count(name) + (name == "rel_pos.inv_freq"), 1U) << name;
  }
  EXPECT_EQ(of_weights.size(), expected.size());
}

TEST_P(SlidingReferenceOnGoldenFile, SaysWhatTheModelSays) {
  const auto& described = file_.description;
  const auto& o = layer_.options;
  if (golden::family::has(described, "scaling")) {
    const double scale = o.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(o.dim_head)));
    EXPECT_NEAR(scale, described["scaling"].get<double>(), 1e-15);
  }
  const auto from_config =
      golden::sliding_layer(described["family"], described["config"], described["layer"], weights_)
          .options.attention;
  const auto& rotary = from_config.rotary_options;
  EXPECT_NEAR(rotary.factor, golden::family::value(described, "rotary_scale", 1.0), 1e-15);
  EXPECT_TRUE(from_config.rotary || !file_.has("input/position_cos"));
  if (!file_.has("input/inv_freq")) return;
  const Array<double>& given = file_.at("input/inv_freq");
  const auto frequencies = rotary.inv_freq.empty()
                               ? reference::plain_frequencies(rotary.theta, *rotary.rotary_dim)
                               : rotary.inv_freq;
  // The model rounds stretched ones to float.
  const double tolerance = rotary.inv_freq.empty() ? 1e-14 : 1e-7;
  ASSERT_EQ(given.data.size(), frequencies.size());
  for (std::size_t m = 0; m < frequencies.size(); ++m)
    EXPECT_NEAR(frequencies[m], given.data[m], tolerance * given.data[m]);
}

INSTANTIATE_TEST_SUITE_P(, SlidingReferenceOnGoldenFile, testing::ValuesIn(files()),
                         [](const auto& file) { return file.param.stem().string(); });

TEST(GoldenSlidingFiles, AreOfEveryFamily) {
  std::set<std::string> families;
  for (const auto& path : files()) families.insert(golden::read(path).description["family"]);
  EXPECT_EQ(files().size(), 17U);
  EXPECT_EQ(families,
            (std::set<std::string>{"cohere2", "gemma2", "gemma3_text", "gpt_oss", "longformer",
                                   "longt5", "mimi", "mistral", "modernbert", "olmo3", "phi3",
                                   "qwen3", "reformer", "snac"}));
}

TEST(SlidingFamily, RefusesLayersThatDoNotSlide) {
  for (const auto& path : files()) {
    const golden::Case file = golden::read(path);
    const std::string family = file.description["family"];
    if (family != "gemma2" && family != "gpt_oss" && family != "modernbert") continue;
    const Int other = family == "modernbert" ? 0 : 1;
    EXPECT_THROW(
        golden::sliding_layer(family, file.description["config"], other, file.below("param/")),
        std::runtime_error);
  }
}

}  // namespace golden_sliding_reference_test
