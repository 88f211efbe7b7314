// SPDX-License-Identifier: MIT
// What a forward pass keeps knows its call: a backward pass takes mask and training from it, and
// refuses what is not that call's.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace saved_call_test {

using local_mha::FeedForward;
using local_mha::FeedForwardParameters;
using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::PaddingMask;
using local_mha::RowMatrix;
using local_mha::Tensor;
using local_mha::TensorView;
using local_mha::Training;
using support::same_bits;
using support::tensor;

/// What a call says when it refuses; empty if it does not.
template <typename Call>
std::string refusal(Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}
testing::AssertionResult names(const std::string& message, const std::string& argument) {
  if (message.starts_with(argument + ":")) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "'" << message << "' does not name " << argument;
}

PaddingMask mask_of(std::vector<Index> lengths) { return PaddingMask::from_lengths(lengths, 9); }

class SavedCallOfTheLayer : public testing::Test {
 protected:
  using Layer = LocalMHA<float>;
  using Bias = Layer::Bias;
  using Parameters = Layer::Parameters;

  static LocalMHAConfig config() {
    LocalMHAConfig c{.dim = 12, .window_size = 4, .dim_head = 6, .heads = 2, .dropout = 0.3};
    c.prenorm = c.qk_rmsnorm = c.gate_values_per_head = true;
    return c;
  }

  SavedCallOfTheLayer() {
    Random random(3);
    x = tensor<float, 3>(random.array({2, 9, 12}));
    grad_y = tensor<float, 3>(random.array({2, 9, 12}));
    bias = tensor<float, 3>(random.array({2, 4, 12}));
    layer.forward_saving(saved, x, mask, view(), training);
  }

  Bias view() const { return TensorView<const float, 3>(bias); }
  Tensor<float, 3> backward(const PaddingMask& with_mask, const Bias& with_bias,
                            std::optional<Training> with_training) {
    Parameters gradients = Parameters::zeros(config());
    return layer.backward(gradients, saved, grad_y, x, with_mask, with_bias, with_training);
  }

  Layer layer{config(), 1};
  Tensor<float, 3> x, grad_y, bias;
  PaddingMask mask = mask_of({9, 5});
  std::optional<Training> training = Training{.seed = 7};
  Layer::Saved saved;
};

TEST_F(SavedCallOfTheLayer, IsTakenFromWhatIsSaved) {
  const auto expected = backward(mask, view(), training);
  EXPECT_TRUE(same_bits(backward({}, view(), {}), expected));
  EXPECT_TRUE(same_bits(backward(mask_of({9, 5}), view(), {}), expected));
  EXPECT_TRUE(same_bits(backward({}, view(), training), expected));
  // They matter: another call has other gradients.
  const auto of_call = [&](const PaddingMask& m, std::optional<Training> t) {
    layer.forward_saving(saved, x, m, view(), t);
    return backward({}, view(), {});
  };
  EXPECT_FALSE(same_bits(of_call({}, training), expected));
  EXPECT_FALSE(same_bits(of_call(mask, {}), expected));
  EXPECT_FALSE(same_bits(of_call(mask, Training{.seed = 8}), expected));
  EXPECT_TRUE(same_bits(of_call(mask, training), expected));
}

TEST_F(SavedCallOfTheLayer, KeepsAMaskThatLooksAtFlags) {
  const auto expected = backward({}, view(), {});
  Tensor<bool, 2> flags(2, 9);
  flags.setConstant(false);
  for (Index i = 5; i < 9; ++i) flags(1, i) = true;
  Layer::Workspace workspace;
  Tensor<float, 3> y(2, 9, 12);
  layer.forward_saving_into(Eigen::DefaultDevice(), y, workspace, saved, x,
                            PaddingMask::masked_view(flags), view(), training);
  flags.setConstant(true);
  EXPECT_TRUE(same_bits(backward({}, view(), {}), expected));
}

TEST_F(SavedCallOfTheLayer, RefusesAnother) {
  const auto refused = [&](const PaddingMask& m, const Bias& b, std::optional<Training> t) {
    return refusal([&] { backward(m, b, t); });
  };
  EXPECT_TRUE(names(refused(mask_of({9, 4}), view(), training), "mask"));
  EXPECT_TRUE(names(refused(mask, view(), Training{.seed = 8}), "training"));
  EXPECT_TRUE(names(refused(mask, {}, training), "attn_bias"));
  Tensor<float, 3> other = bias;
  other(1, 3, 11) += 1;
  EXPECT_TRUE(names(refused(mask, TensorView<const float, 3>(other), training), "attn_bias"));
  const Tensor<float, 3> one = tensor<float, 3>(Random(4).array({1, 4, 12}));
  EXPECT_TRUE(names(refused(mask, TensorView<const float, 3>(one), training), "attn_bias"));
  x = x + grad_y;
  EXPECT_TRUE(names(refused(mask, view(), training), "x"));
}

TEST_F(SavedCallOfTheLayer, RefusesWhatTheCallWasWithout) {
  layer.forward_saving(saved, x);
  EXPECT_EQ(refusal([&] { backward({}, {}, {}); }), "");
  EXPECT_TRUE(names(refusal([&] { backward(mask, {}, {}); }), "mask"));
  EXPECT_TRUE(names(refusal([&] { backward({}, view(), {}); }), "attn_bias"));
  EXPECT_TRUE(names(refusal([&] { backward({}, {}, training); }), "training"));
}

TEST_F(SavedCallOfTheLayer, RefusesAnotherLayersSaved) {
  layer.forward_saving(saved, x);
  const auto refused = [&](const LocalMHAConfig& c, std::uint64_t seed) {
    const Layer other(c, seed);
    Parameters gradients = Parameters::zeros(c);
    return refusal([&] { other.backward(gradients, saved, grad_y, x); });
  };
  EXPECT_EQ(refused(config(), 1), "") << "the same weights in another object are the same";
  EXPECT_TRUE(names(refused(config(), 2), "saved"));
  for (const auto change : std::vector<void (*)(LocalMHAConfig&)>{
           [](LocalMHAConfig& c) { c.causal = true; },
           [](LocalMHAConfig& c) { c.exact_windowsize = false; },
           [](LocalMHAConfig& c) { c.dropout = 0.2; }, [](LocalMHAConfig& c) { c.qk_scale = 9; },
           [](LocalMHAConfig& c) { c.use_xpos = true; },
           [](LocalMHAConfig& c) { c.window_size = 5; }}) {
    LocalMHAConfig other = config();
    change(other);
    EXPECT_TRUE(names(refused(other, 1), "saved"));
  }
  Parameters stepped = layer.parameters();
  stepped.to_out *= 1.0001F;
  layer.set_parameters(stepped);
  EXPECT_TRUE(names(refusal([&] { backward({}, {}, {}); }), "saved"));
}

TEST_F(SavedCallOfTheLayer, RefusalLeavesTheGradients) {
  Parameters gradients = Parameters::zeros(config());
  gradients.to_out.setConstant(3);
  EXPECT_THROW(layer.backward(gradients, saved, grad_y, x, mask_of({1, 1}), view()),
               std::invalid_argument);
  EXPECT_EQ(gradients.to_out, RowMatrix<float>::Constant(12, 12, 3));
  EXPECT_EQ(gradients.to_qkv, RowMatrix<float>::Zero(36, 12));
}

TEST_F(SavedCallOfTheLayer, OfARefusedForwardPassStays) {
  const auto expected = backward({}, view(), {});
  Layer::Workspace workspace;
  Tensor<float, 3> y(2, 8, 12);
  EXPECT_THROW(layer.forward_saving_into(Eigen::DefaultDevice(), y, workspace, saved, x),
               std::invalid_argument);
  EXPECT_TRUE(same_bits(backward({}, view(), {}), expected));
}

TEST_F(SavedCallOfTheLayer, KnowsNaN) {
  x(1, 8, 3) = std::numeric_limits<float>::quiet_NaN();  // a masked row
  layer.forward_saving(saved, x, mask, view(), training);
  EXPECT_EQ(refusal([&] { backward({}, view(), {}); }), "");
}

class SavedCallOfTheAttention : public testing::Test {
 protected:
  using Attention = LocalAttention<float>;

  SavedCallOfTheAttention() {
    Random random(3);
    for (auto* t : {&q, &k, &v, &grad}) *t = tensor<float, 4>(random.array({2, 2, 9, 6}));
    saved = attention.forward_saving(q, k, v, call);
  }
  static LocalAttentionConfig config() {
    LocalAttentionConfig c{.window_size = 4, .dropout = 0.3, .dim = 6};
    c.use_xpos = true;
    return c;
  }
  Tensor<float, 4> backward(const Attention::Call& given = {}) const {
    return attention.backward(saved, grad, q, k, v, given).k;
  }

  Attention attention{config()};
  Tensor<float, 4> q, k, v, grad;
  PaddingMask mask = mask_of({9, 5});
  Attention::Call call{
      .mask = mask, .window_size = 5, .first_position = 2, .training = Training{.seed = 7}};
  Attention::Saved saved;
};

TEST_F(SavedCallOfTheAttention, IsTakenFromWhatIsSaved) {
  const auto expected = backward(call);
  EXPECT_TRUE(same_bits(backward(), expected));
  EXPECT_TRUE(same_bits(backward({.first_position = 2}), expected));
  for (const Attention::Call& other : {Attention::Call{.mask = mask},
                                       {.mask = mask, .window_size = 5, .first_position = 2},
                                       {.mask = mask, .window_size = 5}}) {
    saved = attention.forward_saving(q, k, v, other);
    EXPECT_FALSE(same_bits(backward(), expected));
  }
}

TEST_F(SavedCallOfTheAttention, HasTheWindowThatItsBiasIsOf) {
  Tensor<float, 3> bias(2, 5, 15);
  bias.setConstant(0.5F);
  call.attn_bias = bias;
  saved = attention.forward_saving(q, k, v, call);
  EXPECT_TRUE(same_bits(backward({.attn_bias = bias}), backward(call)));
}

TEST_F(SavedCallOfTheAttention, RefusesAnother) {
  const auto refused = [&](const Attention::Call& other) {
    return refusal([&] { backward(other); });
  };
  EXPECT_TRUE(names(refused({.mask = mask_of({8, 5})}), "mask"));
  EXPECT_TRUE(names(refused({.window_size = 4}), "window_size"));
  EXPECT_TRUE(names(refused({.first_position = 1}), "first_position"));
  EXPECT_TRUE(names(refused({.training = Training{.seed = 8}}), "training"));
  for (auto [t, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}}) {
    const Tensor<float, 4> before = *t;
    *t = *t * 2.0F;
    EXPECT_TRUE(names(refused({}), name));
    *t = before;
  }
  EXPECT_EQ(refused({}), "");
  LocalAttentionConfig other = config();
  other.causal = true;
  attention = Attention(other);
  EXPECT_TRUE(names(refused({}), "saved"));
  // The window of the saved call would not be allowed here.
  other.use_xpos = false;
  attention = Attention(other);
  EXPECT_TRUE(names(refused({}), "saved"));
}

TEST(SavedCallOfTheFeedForward, IsTakenFromWhatIsSavedOrRefused) {
  using Layer = FeedForward<float>;
  using Matrix = RowMatrix<float>;
  auto parameters = FeedForwardParameters<float>::zeros(6, 10);
  local_mha::for_each_parameter(parameters, [](const auto&, auto& w) { w.setRandom(); });
  const Layer layer(parameters, 0.4);
  Matrix x = Matrix::Random(20, 6);
  const Matrix grad_y = Matrix::Random(20, 6);
  Layer::Saved saved;
  const auto backward = [&](const Layer& of, std::optional<Training> training) {
    auto gradients = FeedForwardParameters<float>::zeros(6, 10);
    of.backward(gradients, saved, grad_y, x, {.training = training});
    return gradients.proj_in;
  };
  layer.forward_saving(saved, x, {.training = Training{.seed = 3}});
  const Matrix expected = backward(layer, Training{.seed = 3});
  EXPECT_EQ(backward(layer, {}), expected);
  EXPECT_TRUE(names(refusal([&] { backward(layer, Training{.seed = 4}); }), "training"));
  EXPECT_TRUE(names(refusal([&] { backward(Layer(parameters, 0.3), {}); }), "saved"));
  auto others = parameters;
  others.proj_out *= 2;
  EXPECT_TRUE(names(refusal([&] { backward(Layer(others, 0.4), {}); }), "saved"));
  layer.forward_saving(saved, x);
  EXPECT_NE(backward(layer, {}), expected);
  x *= 2;
  EXPECT_TRUE(names(refusal([&] { backward(layer, {}); }), "x"));
}

// A batch of no sequences has masks, too; and what is kept may be given again.
TEST(ASample, TellsTensorsFromOthers) {
  using Tensors = std::vector<std::span<const float>>;
  local_mha::detail::Sample<float> sample;
  for (const std::size_t size :
       {std::size_t{1}, std::size_t{5}, std::size_t{64}, std::size_t{65}, std::size_t{1000}}) {
    std::vector<float> numbers(size, 2);
    sample.take(Tensors{numbers});
    EXPECT_TRUE(sample.is_of(Tensors{numbers}));
    // As many are looked at, and all of them are 2.
    numbers.push_back(2);
    EXPECT_FALSE(sample.is_of(Tensors{numbers})) << size;
    numbers.pop_back();
    for (std::size_t i = 0; i < size; ++i) {
      if (size > 64 && i > 0 && i + 1 < size) continue;
      numbers[i] = 3;
      EXPECT_FALSE(sample.is_of(Tensors{numbers})) << i << " of " << size;
      numbers[i] = std::numeric_limits<float>::quiet_NaN();
      EXPECT_FALSE(sample.is_of(Tensors{numbers})) << i << " of " << size;
      local_mha::detail::Sample<float> of_nan;
      of_nan.take(Tensors{numbers});
      EXPECT_TRUE(of_nan.is_of(Tensors{numbers})) << i << " of " << size;
      numbers[i] = 2;
    }
  }
  const std::vector<float> two(2, 2), three(3, 2);
  sample.take(Tensors{two, three});
  EXPECT_TRUE(sample.is_of(Tensors{three, two}));  // the same numbers
  EXPECT_FALSE(sample.is_of(Tensors{two, two}));
  EXPECT_FALSE(sample.is_of(Tensors{two, three, two}));
}

TEST(SavedCall, KeepsAnyMask) {
  const LocalMHA<float> layer({.dim = 4, .window_size = 2, .dim_head = 4, .heads = 1});
  LocalMHA<float>::Saved saved;
  const std::vector<Index> nobody;
  layer.forward_saving(saved, Tensor<float, 3>(0, 5, 4), PaddingMask::from_lengths(nobody, 5));
  Tensor<float, 3> x(1, 5, 4);
  x.setRandom();
  const std::vector<Index> lengths{3};
  const auto y = layer.forward_saving(saved, x, PaddingMask::from_lengths(lengths, 5));
  Tensor<float, 3> again(1, 5, 4);
  LocalMHA<float>::Workspace workspace;
  const PaddingMask kept = saved.call.with_tensors_of({}).mask;
  layer.forward_saving_into(Eigen::DefaultDevice(), again, workspace, saved, x, kept);
  EXPECT_TRUE(same_bits(y, again));
  EXPECT_TRUE(saved.call.with_tensors_of({}).mask == PaddingMask::from_lengths(lengths, 5));
}

}  // namespace saved_call_test
