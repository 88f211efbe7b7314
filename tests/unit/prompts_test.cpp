// SPDX-License-Identifier: MIT
// Prompts of different lengths in one batch: each goes on as it would alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace prompts_test {

using local_mha::Index;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::Tensor;
using Tokens = Tensor<std::int64_t, 2>;

template <typename Scalar>
class Prompts : public testing::Test {
 protected:
  static LocalTransformerConfig config() {
    LocalTransformerConfig c{.num_tokens = 19, .max_seq_len = 300, .dim = 8, .depth = 2};
    c.local_attn_window_size = 7;
    c.dim_head = 4;
    c.heads = 2;
    return c;
  }

  /// Lengths at which the parts that a prompt comes in end in one token, or in none.
  const std::vector<Index> lengths{400, 1, 2, 16, 17, 97, 193, 256, 257, 300, 301};
  const LocalTransformer<Scalar> model{config(), 3};
  /// Every row behind its prompt is what no token may be.
  const Tokens prompt = [this] {
    Random random(5);
    Tokens t(std::ssize(lengths), 400);
    t.setConstant(std::numeric_limits<std::int64_t>::min());
    for (Index b = 0; b < t.dimension(0); ++b)
      for (Index i = 0; i < lengths[static_cast<std::size_t>(b)]; ++i)
        t(b, i) = random.integer(0, 18);
    return t;
  }();

  Tokens alone(Index b) const {
    Tokens t(1, lengths[static_cast<std::size_t>(b)]);
    std::copy_n(&prompt(b, 0), t.size(), t.data());
    return t;
  }
};
TYPED_TEST_SUITE(Prompts, support::Scalars, support::ScalarNames);

TYPED_TEST(Prompts, OfDifferentLengthsGoOnAsEachWouldAlone) {
  const auto made = this->model.generate(
      this->prompt,
      {.length = 25, .sampling = {.temperature = 0}, .prompt_lengths = this->lengths});
  for (Index b = 0; b < this->prompt.dimension(0); ++b) {
    const auto expected =
        this->model.generate(this->alone(b), {.length = 25, .sampling = {.temperature = 0}});
    for (Index i = 0; i < 25; ++i)
      EXPECT_EQ(made(b, i), expected(0, i)) << "prompt " << b << ", token " << i;
  }
}

// Sequence 0 draws as one that is alone, and any last bit of its logits moves a draw sometimes.
TYPED_TEST(Prompts, DrawAsTheyWouldAloneWhateverIsBesideThem) {
  for (Index b = 0; b < this->prompt.dimension(0); ++b) {
    Tokens first = this->prompt;
    auto swapped = this->lengths;
    std::swap(swapped[0], swapped[static_cast<std::size_t>(b)]);
    for (Index i = 0; i < 400; ++i) std::swap(first(0, i), first(b, i));
    const auto made =
        this->model.generate(first, {.length = 60, .seed = 9, .prompt_lengths = swapped});
    const auto expected = this->model.generate(this->alone(b), {.length = 60, .seed = 9});
    for (Index i = 0; i < 60; ++i)
      ASSERT_EQ(made(0, i), expected(0, i)) << "prompt " << b << ", token " << i;
  }
}

TYPED_TEST(Prompts, OfWholeRowsNeedNoLengths) {
  Tokens whole(2, 30);
  Random random(4);
  for (Index i = 0; i < whole.size(); ++i) whole.data()[i] = random.integer(0, 18);
  EXPECT_TRUE(support::same_bits(
      this->model.generate(whole, {.length = 9, .seed = 2}),
      this->model.generate(whole, {.length = 9, .seed = 2, .prompt_lengths = {30, 30}})));
}

TYPED_TEST(Prompts, OfBadLengthsAreRefused) {
  const auto refusal = [&](std::vector<Index> of) {
    try {
      this->model.generate(this->prompt, {.length = 1, .prompt_lengths = std::move(of)});
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  auto changed = this->lengths;
  EXPECT_EQ(refusal(changed), "");
  for (const Index bad : {0, -1, 401}) {
    changed[3] = bad;
    EXPECT_EQ(refusal(changed), "prompt_lengths[3]: expected 1 to 400, got " + std::to_string(bad));
  }
  EXPECT_EQ(refusal({1, 2}), "prompt_lengths: expected 11, one for each prompt, got 2");
  changed[3] = 18;
  EXPECT_NE(refusal(changed).find("in sequence 3 at 16"), std::string::npos) << refusal(changed);
}

}  // namespace prompts_test
