// SPDX-License-Identifier: MIT
// The reference against stacks of layers of the PyTorch package: their outputs and gradients.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "reference/gradients.hpp"
#include "support/compare.hpp"
#include "support/golden_file.hpp"

namespace golden_stack_reference_test {

using reference::Array;
using reference::Int;

std::vector<std::filesystem::path> files() {
  return golden::files(LOCAL_MHA_TEST_DATA_DIR "/golden_stack");
}

testing::AssertionResult close(const Array<double>& got, const Array<double>& expected,
                               double tolerance) {
  return support::close(got, expected, tolerance * support::largest(expected));
}

class StackReferenceOnGoldenFile : public testing::TestWithParam<std::filesystem::path> {
 protected:
  void expect_gradients(const reference::Parameters<double>& gradients) const {
    const auto expected = file_.below("grad/param/");
    double largest = 0;
    for (const auto& [name, gradient] : expected)
      largest = std::max(largest, support::largest(gradient));
    ASSERT_FALSE(expected.empty());
    for (const auto& [name, gradient] : gradients) {
      if (name.find("inv_freq") != std::string::npos) continue;
      ASSERT_EQ(expected.count(name), 1U) << name;
      // The softmax does not feel what all scores have in common.
      const double size = std::max(support::largest(expected.at(name)), 1e-3 * largest);
      EXPECT_TRUE(support::close(gradient, expected.at(name), 1e-11 * size)) << name;
    }
  }

  golden::Case file_ = golden::read(GetParam());
  reference::Parameters<double> weights_ = file_.below("param/");
};

TEST_P(StackReferenceOnGoldenFile, GivesItsOutputAndGradients) {
  auto gradients = reference::zeros_like(weights_);
  if (file_.has("input/tokens")) {
    const auto options = golden::transformer_options(file_);
    const Array<Int> tokens = file_.tokens();
    Array<Int> inputs({tokens.shape[0], tokens.shape[1] - 1}), labels(inputs.shape);
    for (Int b = 0; b < inputs.shape[0]; ++b)
      for (Int i = 0; i < inputs.shape[1]; ++i)
        inputs(b, i) = tokens(b, i), labels(b, i) = tokens(b, i + 1);
    const auto got =
        reference::transformer_backward(options, weights_, inputs, labels, Int{-1}, {}, gradients);
    EXPECT_TRUE(close(got.logits, file_.at("output/logits"), 1e-13));
    EXPECT_NEAR(got.loss, file_.at("output/loss").data.at(0), 1e-14);
  } else {
    const auto options =
        file_.kind == "Stack" ? golden::stack_options(file_) : golden::transformer_options(file_);
    const auto pass =
        reference::encoder_pass(options, weights_, file_.at("input/x"), file_.masked());
    EXPECT_TRUE(close(pass.y, file_.at("output/y"), 1e-13));
    const auto grad_x = reference::encoder_backward(
        options, weights_, pass, file_.at("input/grad_y"), file_.masked(), gradients);
    EXPECT_TRUE(close(grad_x, file_.at("grad/x"), 1e-12));
  }
  expect_gradients(gradients);
}

INSTANTIATE_TEST_SUITE_P(, StackReferenceOnGoldenFile, testing::ValuesIn(files()),
                         [](const auto& file) { return file.param.stem().string(); });

TEST(GoldenStackFiles, AreOfEveryKind) {
  std::set<std::string> kinds;
  std::set<Int> streams;
  for (const auto& path : files()) {
    const golden::Case file = golden::read(path);
    kinds.insert(file.kind + (file.has("input/tokens") ? " of tokens" : " of rows"));
    streams.insert(file.kwargs.value("num_residual_streams", Int{1}));
  }
  EXPECT_EQ(files().size(), 9U);
  EXPECT_EQ(kinds, (std::set<std::string>{"LocalTransformer of rows", "LocalTransformer of tokens",
                                          "Stack of rows"}));
  EXPECT_EQ(streams, (std::set<Int>{1, 2, 4}));
}

}  // namespace golden_stack_reference_test
