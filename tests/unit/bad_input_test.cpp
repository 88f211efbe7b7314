// SPDX-License-Identifier: MIT
// Bad inputs: each is a std::invalid_argument that names the argument, what was expected and what
// came.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <local_mha/attention/token_window.hpp>
#include <local_mha/longformer.hpp>

#include "support/library.hpp"
#include "support/public_names.hpp"

namespace bad_input_test {

using local_mha::Encoder;
using local_mha::EncoderConfig;
using local_mha::EncoderParameters;
using local_mha::HyperConnection;
using local_mha::HyperConnectionParameters;
using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalMHAParameters;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::LocalTransformerParameters;
using local_mha::PaddingMask;
using local_mha::RowMatrix;
using local_mha::StridedView;
using local_mha::Tensor;
using local_mha::TensorView;
using local_mha::Vector;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

local_mha::LongformerAttention<double> longformer() {
  const local_mha::LongformerConfig config{.dim = 4, .heads = 2, .attention_window = 2};
  return {config, local_mha::LongformerParameters<double>::zeros(config)};
}

struct BadInput {
  std::string name;
  std::function<void()> call;
  std::vector<std::string> fragments;  // that the message must hold: argument, expected, got
  std::string function;                // that refuses it, as support::PublicNames gives it
};

void PrintTo(const BadInput& bad, std::ostream* out) { *out << bad.name; }

LocalAttentionConfig attention_config() { return {.window_size = 4, .dim = 8}; }

LocalMHAConfig layer_config() {
  LocalMHAConfig config{.dim = 12, .window_size = 4, .dim_head = 6, .heads = 2};
  config.prenorm = config.qk_rmsnorm = config.gate_values_per_head = true;
  return config;
}

LocalTransformerConfig transformer_config() {
  return {.num_tokens = 10,
          .max_seq_len = 8,
          .dim = 12,
          .depth = 2,
          .local_attn_window_size = 4,
          .dim_head = 6,
          .heads = 2};
}

/// The construction of an attention after `change` of a good configuration.
template <typename Change>
std::function<void()> attention(Change change) {
  return [change] {
    LocalAttentionConfig config = attention_config();
    change(config);
    LocalAttention<float>{config};
  };
}

template <typename Change>
std::function<void()> layer(Change change) {
  return [change] {
    LocalMHAConfig config = layer_config();
    change(config);
    LocalMHA<float>{config};
  };
}

template <typename Change>
std::function<void()> transformer(Change change) {
  return [change] {
    LocalTransformerConfig config = transformer_config();
    change(config);
    LocalTransformer<float>{config};
  };
}

Tensor<float, 4> heads(Index b, Index h, Index n, Index d) {
  Tensor<float, 4> t(b, h, n, d);
  t.setZero();
  return t;
}

/// forward() of a good attention, `[2, 3, 10, 8]`, with a mask, a bias and call options.
std::function<void()> attend(const PaddingMask& mask, const Tensor<float, 3>& bias = {},
                             const support::AttentionOptions& options = {}, bool use_xpos = false) {
  return [=] {
    LocalAttentionConfig config = attention_config();
    config.use_xpos = use_xpos;
    const auto q = heads(2, 3, 10, 8);
    LocalAttention<float>(config).forward(
        q, q, q, support::attention_call<float>(options, mask, support::optional_view(bias)));
  };
}

/// forward() of a good attention with queries, keys and values of these shapes.
std::function<void()> attend(const Tensor<float, 4>& q, const Tensor<float, 4>& k,
                             const Tensor<float, 4>& v) {
  return [=] { LocalAttention<float>(attention_config()).forward(q, k, v); };
}

/// An attention of a token window.
LocalAttention<float> of_tokens(Index left, Index right) {
  LocalAttentionConfig config;
  config.token_window = {left, right};
  return LocalAttention<float>(config);
}

/// forward() of packed sequences, `[batch, 3, 10, 8]`.
std::function<void()> attend_packed(Index batch, std::vector<Index> cu_seqlens, Index first = 0) {
  return [=] {
    const auto q = heads(batch, 3, 10, 8);
    LocalAttention<float>(attention_config())
        .forward(q, q, q, {.first_position = first, .cu_seqlens = cu_seqlens});
  };
}

Tensor<float, 3> zeros(Index a, Index b, Index c) {
  Tensor<float, 3> t(a, b, c);
  t.setZero();
  return t;
}

PaddingMask mask_of(Index batch, Index n) {
  return PaddingMask::from_lengths(std::vector<Index>(static_cast<std::size_t>(batch), n), n);
}

template <typename Change>
std::function<void()> layer_weights(
    Change change, std::function<void(LocalMHAConfig&)> configure = [](LocalMHAConfig&) {}) {
  return [change, configure] {
    LocalMHAConfig config = layer_config();
    configure(config);
    auto parameters = LocalMHAParameters<double>::zeros(config);
    change(parameters);
    LocalMHA<double>(config, parameters);
  };
}

/// backward() of a good layer, `[2, 10, 12]`, with what another one saved of `[2, length, 12]`;
/// negative: nothing was saved.
template <typename Change>
std::function<void()> layer_backward(Change change, Index length = 10) {
  return [change, length] {
    LocalMHAConfig other = layer_config();
    change(other);
    LocalMHA<float>::Saved saved;
    if (length >= 0) LocalMHA<float>(other).forward_saving(saved, zeros(2, length, 12));
    auto gradients = LocalMHAParameters<float>::zeros(layer_config());
    const auto x = zeros(2, 10, 12);
    LocalMHA<float>(layer_config()).backward(gradients, saved, x, x);
  };
}

/// forward() of packed sequences, `[batch, 10, 12]`.
std::function<void()> layer_packed(Index batch, std::vector<Index> cu_seqlens) {
  return [=] {
    LocalMHA<float>(layer_config()).forward(zeros(batch, 10, 12), {}, {}, {}, cu_seqlens);
  };
}

/// backward() of a feed-forward 6 → 4 → 6 of 5 rows, with what another one saved.
std::function<void()> feed_forward_backward(Index inner, Index rows, Index grad_inner = 4) {
  return [=] {
    using M = RowMatrix<double>;
    using P = local_mha::FeedForwardParameters<double>;
    local_mha::FeedForward<double>::Saved saved;
    local_mha::FeedForward<double>(P::zeros(6, inner)).forward_saving(saved, M::Zero(rows, 6));
    auto gradients = P::zeros(6, grad_inner);
    local_mha::FeedForward<double>(P::zeros(6, 4))
        .backward(gradients, saved, M::Zero(5, 6), M::Zero(5, 6));
  };
}

template <typename Change>
std::function<void()> transformer_weights(Change change) {
  return [change] {
    auto parameters = LocalTransformerParameters<double>::zeros(transformer_config());
    change(parameters);
    LocalTransformer<double>(transformer_config(), parameters);
  };
}

Tensor<std::int64_t, 2> tokens(std::vector<std::int64_t> of_one_sequence) {
  Tensor<std::int64_t, 2> t(1, static_cast<Index>(of_one_sequence.size()));
  std::copy(of_one_sequence.begin(), of_one_sequence.end(), t.data());
  return t;
}

std::function<void()> predict(const Tensor<std::int64_t, 2>& input, const PaddingMask& mask = {},
                              const std::vector<Index>& lengths = {},
                              const std::vector<Index>& cu_seqlens = {}) {
  return [=] {
    LocalTransformer<float>(transformer_config())
        .forward(input, {.mask = mask, .cu_seqlens = cu_seqlens, .lengths = lengths});
  };
}

std::function<void()> loss(const Tensor<std::int64_t, 2>& input, const PaddingMask& mask = {}) {
  return [=] { LocalTransformer<float>(transformer_config()).loss(input, {.mask = mask}); };
}

std::vector<BadInput> attention_configurations() {
  using C = LocalAttentionConfig;
  return {
      {"NoWindow",
       [] { LocalAttention<float>{C{}}; },
       {"window_size", "at least 1", "got 0"},
       "LocalAttention::LocalAttention"},
      {"NegativeLeft",
       attention([](C& c) { c = {}, c.token_window = {-1, 0}; }),
       {"token_window.left", "at least 0", "got -1"},
       "LocalAttention::LocalAttention"},
      {"NegativeRight",
       attention([](C& c) { c = {}, c.token_window = {0, -2}; }),
       {"token_window.right", "at least 0", "got -2"},
       "LocalAttention::LocalAttention"},
      {"TwoWindows",
       attention([](C& c) { c.token_window = {3, 0}; }),
       {"window_size", "token window", "got 4"},
       "LocalAttention::LocalAttention"},
      {"LookBackwardOfATokenWindow",
       attention([](C& c) { c = {}, c.token_window = {3, 0}, c.look_backward = 2; }),
       {"look_backward", "token window", "got 2"},
       "LocalAttention::LocalAttention"},
      {"LookForwardOfATokenWindow",
       attention([](C& c) { c = {}, c.token_window = {3, 0}, c.look_forward = 0; }),
       {"look_forward", "token window", "got 0"},
       "LocalAttention::LocalAttention"},
      {"CausalWindowThatSeesAhead",
       attention([](C& c) { c = {}, c.token_window = {3, 1}, c.causal = true; }),
       {"token_window.right", "causal", "got 1"},
       "LocalAttention::LocalAttention"},
      {"NegativeFirstKeys",
       attention([](C& c) { c.first_keys = -1; }),
       {"first_keys", "at least 0", "got -1"},
       "LocalAttention::LocalAttention"},
      {"SoftCapOfZero",
       attention([](C& c) { c.score.soft_cap = 0; }),
       {"soft_cap", "positive", "got 0"},
       "LocalAttention::LocalAttention"},
      {"SlopeOfNaN",
       attention([](C& c) { c.score.alibi_slopes = {1, nan}; }),
       {"alibi_slopes", "finite", "nan"},
       "LocalAttention::LocalAttention"},
      {"AScoreBesideAFunctor",
       [] {
         const auto itself = [](float s, Index, Index, Index) { return s; };
         LocalAttentionConfig config = attention_config();
         config.score.soft_cap = 5;
         LocalAttention<float, decltype(itself)>(config, itself);
       },
       {"score", "none, because the attention has a functor of its own", "got one"},
       "LocalAttention::LocalAttention"},
      {"TwoScores",
       attention([](C& c) { c.score = {.soft_cap = 5, .alibi_slopes = {1, 1, 1}}; }),
       {"alibi_slopes", "soft_cap", "3 slopes"},
       "LocalAttention::LocalAttention"},
      {"NegativeWindow",
       attention([](C& c) { c.window_size = -3; }),
       {"window_size", "at least 1", "got -3"},
       "LocalAttention::LocalAttention"},
      {"NegativeLookBackward",
       attention([](C& c) { c.look_backward = -1; }),
       {"look_backward", "at least 0", "got -1"},
       "LocalAttention::LocalAttention"},
      {"NegativeLookForward",
       attention([](C& c) { c.look_forward = -2; }),
       {"look_forward", "at least 0", "got -2"},
       "LocalAttention::LocalAttention"},
      {"CausalWithLookForward",
       attention([](C& c) { c.causal = true, c.look_forward = 1; }),
       {"look_forward", "causal", "got 1"},
       "LocalAttention::LocalAttention"},
      {"HugeLookBackward",
       attention([](C& c) { c.look_backward = std::numeric_limits<Index>::max(); }),
       {"look_backward", "2^20", "9223372036854775807"},
       "LocalAttention::LocalAttention"},
      {"HugeLookForward",
       attention([](C& c) { c.look_forward = Index{1} << 40; }),
       {"look_forward", "2^20", "1099511627776"},
       "LocalAttention::LocalAttention"},
      {"DropoutOfOne",
       attention([](C& c) { c.dropout = 1; }),
       {"dropout", "probability in [0, 1)", "got 1"},
       "LocalAttention::LocalAttention"},
      {"NegativeDropout",
       attention([](C& c) { c.dropout = -0.1; }),
       {"dropout", "probability in [0, 1)", "got -0.1"},
       "LocalAttention::LocalAttention"},
      {"DropoutOfNaN",
       attention([](C& c) { c.dropout = nan; }),
       {"dropout", "probability in [0, 1)", "nan"},
       "LocalAttention::LocalAttention"},
      {"ScaleOfNaN",
       attention([](C& c) { c.scale = nan; }),
       {"scale", "finite", "nan"},
       "LocalAttention::LocalAttention"},
      {"InfiniteScale",
       attention([](C& c) { c.scale = infinity; }),
       {"scale", "finite", "inf"},
       "LocalAttention::LocalAttention"},
      {"NoChannels",
       attention([](C& c) { c.dim = 0; }),
       {"dim", "at least 1", "got 0"},
       "LocalAttention::LocalAttention"},
      {"OddDimWithRotary",
       attention([](C& c) { c.dim = 7; }),
       {"dim", "even", "rotary", "got 7"},
       "LocalAttention::LocalAttention"},
      {"XposWithoutDim",
       attention([](C& c) { c.use_xpos = true, c.dim.reset(); }),
       {"use_xpos", "rotary"},
       "LocalAttention::LocalAttention"},
      {"XposWithoutRotary",
       attention([](C& c) { c.use_xpos = true, c.use_rotary_pos_emb = false; }),
       {"use_xpos", "rotary"},
       "LocalAttention::LocalAttention"},
      {"XposBaseOfZero",
       attention([](C& c) { c.use_xpos = true, c.xpos_scale_base = 0; }),
       {"xpos_scale_base", local_mha::detail::at_least_xpos_scale_base, "got 0"},
       "LocalAttention::LocalAttention"},
      {"XposBaseOfNaN",
       attention([](C& c) { c.use_xpos = true, c.xpos_scale_base = nan; }),
       {"xpos_scale_base", "nan"},
       "LocalAttention::LocalAttention"},
      {"NegativeXposBase",
       attention([](C& c) { c.use_xpos = true, c.xpos_scale_base = -8; }),
       {"xpos_scale_base", local_mha::detail::at_least_xpos_scale_base, "got -8"},
       "LocalAttention::LocalAttention"},
  };
}

std::vector<BadInput> layer_configurations() {
  using C = LocalMHAConfig;
  return {
      {"LayerNoDim",
       [] { LocalMHA<float>{C{.window_size = 4}}; },
       {"dim", "at least 1", "got 0"},
       "LocalMHA::LocalMHA"},
      {"LayerNoWindow",
       [] { LocalMHA<float>{C{.dim = 4}}; },
       {"window_size", "at least 1", "got 0"},
       "LocalMHA::LocalMHA"},
      {"LayerNegativeDim",
       layer([](C& c) { c.dim = -512; }),
       {"dim", "at least 1", "got -512"},
       "LocalMHA::LocalMHA"},
      {"LayerNoHeads",
       layer([](C& c) { c.heads = 0; }),
       {"heads", "at least 1", "got 0"},
       "LocalMHA::LocalMHA"},
      {"LayerNoDimHead",
       layer([](C& c) { c.dim_head = 0; }),
       {"dim_head", "at least 1", "got 0"},
       "LocalMHA::LocalMHA"},
      {"LayerOddDimHeadWithRotary",
       layer([](C& c) { c.dim_head = 5; }),
       {"dim_head", "even", "rotary", "got 5"},
       "LocalMHA::LocalMHA"},
      {"LayerScaleOfNaN",
       layer([](C& c) { c.scale = nan; }),
       {"scale", "finite", "nan"},
       "LocalMHA::LocalMHA"},
      {"LayerNormOfNoName",
       layer([](C& c) { c.norm.kind = static_cast<local_mha::NormKind>(2); }),
       {"norm.kind", "layer or rms", "got 2"},
       "LocalMHA::LocalMHA"},
      {"LayerNormWithoutEps",
       layer([](C& c) { c.norm = {.kind = local_mha::NormKind::rms, .eps = -1}; }),
       {"norm.eps", "1e-30", "got -1"},
       "LocalMHA::LocalMHA"},
      {"LayerQkNormOfTwoKinds",
       layer([](C& c) { c.qk_norm.kind = local_mha::QkNormKind::rms_all; }),
       {"qk_norm.kind", "none or l2", "qk_rmsnorm", "got rms_all"},
       "LocalMHA::LocalMHA"},
      {"LayerQkNormOfNoName",
       layer([](C& c) { c.qk_norm.kind = static_cast<local_mha::QkNormKind>(9); }),
       {"qk_norm.kind", "rms_all", "got 9"},
       "LocalMHA::LocalMHA"},
      {"LayerQkNormWithoutEps",
       layer([](C& c) {
         c.qk_rmsnorm = false, c.qk_norm = {.kind = local_mha::QkNormKind::rms, .eps = 0};
       }),
       {"qk_norm.eps", "1e-30", "got 0"},
       "LocalMHA::LocalMHA"},
      {"LayerQkNormEpsOfNaN",
       layer([](C& c) {
         c.qk_rmsnorm = false, c.qk_norm = {.kind = local_mha::QkNormKind::rms_all, .eps = nan};
       }),
       {"qk_norm.eps", "1e-30", "nan"},
       "LocalMHA::LocalMHA"},
      {"LayerRotaryOfMoreChannelsThanAHeadHas",
       layer([](C& c) { c.rotary.rotary_dim = 8; }),
       {"rotary.rotary_dim", "even", "2 to the 6 channels", "got 8"},
       "LocalMHA::LocalMHA"},
      {"LayerRotaryOfOddChannels",
       layer([](C& c) { c.rotary.rotary_dim = 3; }),
       {"rotary.rotary_dim", "even", "got 3"},
       "LocalMHA::LocalMHA"},
      {"LayerRotaryOfNoChannels",
       layer([](C& c) { c.rotary.rotary_dim = 0; }),
       {"rotary.rotary_dim", "even", "got 0"},
       "LocalMHA::LocalMHA"},
      {"LayerTinyTheta",
       layer([](C& c) { c.rotary.theta = 0.5; }),
       {"rotary.theta", "at least 1", "got 0.5"},
       "LocalMHA::LocalMHA"},
      {"LayerThetaOfNaN",
       layer([](C& c) { c.rotary.theta = nan; }),
       {"rotary.theta", "finite", "nan"},
       "LocalMHA::LocalMHA"},
      {"LayerPairingOfNoName",
       layer([](C& c) { c.rotary.pairing = static_cast<local_mha::RotaryPairing>(7); }),
       {"rotary.pairing", "halves or interleaved", "got 7"},
       "LocalMHA::LocalMHA"},
      {"LayerTooFewFrequencies",
       layer([](C& c) { c.rotary.inv_freq = {1, 0.5}; }),
       {"rotary.inv_freq", "3 frequencies", "got 2"},
       "LocalMHA::LocalMHA"},
      {"LayerFrequencyOfNaN",
       layer([](C& c) { c.rotary.inv_freq = {1, nan, 1}; }),
       {"rotary.inv_freq", "2^20", "nan"},
       "LocalMHA::LocalMHA"},
      {"LayerFactorOfZero",
       layer([](C& c) { c.rotary.factor = 0; }),
       {"rotary.factor", "positive", "got 0"},
       "LocalMHA::LocalMHA"},
      {"LayerXposOfSomeChannels",
       layer([](C& c) { c.use_xpos = true, c.rotary.rotary_dim = 4; }),
       {"use_xpos", "false", "all channels"},
       "LocalMHA::LocalMHA"},
      {"LayerXposInterleaved",
       layer([](C& c) {
         c.use_xpos = true, c.rotary.pairing = local_mha::RotaryPairing::interleaved;
       }),
       {"use_xpos", "false", "halves"},
       "LocalMHA::LocalMHA"},
      {"LayerXposTimesAFactor",
       layer([](C& c) { c.use_xpos = true, c.rotary.factor = 2; }),
       {"use_xpos", "false", "factor"},
       "LocalMHA::LocalMHA"},
      {"LayerXposOfGivenFrequencies",
       layer([](C& c) { c.use_xpos = true, c.rotary.inv_freq = {1, 1, 1}; }),
       {"use_xpos", "false", "frequencies"},
       "LocalMHA::LocalMHA"},
      {"AttentionRotaryOfOddChannels",
       attention([](LocalAttentionConfig& c) { c.rotary.rotary_dim = 5; }),
       {"rotary.rotary_dim", "even", "got 5"},
       "LocalAttention::LocalAttention"},
      {"LayerHugeHeads",
       layer([](C& c) { c.heads = std::numeric_limits<Index>::max(); }),
       {"heads", "2^40", "9223372036854775807"},
       "LocalMHA::LocalMHA"},
      {"LayerHugeDim",
       layer([](C& c) { c.dim = Index{1} << 50; }),
       {"dim", "2^40"},
       "LocalMHA::LocalMHA"},
      {"LayerQkScaleOfNaN",
       layer([](C& c) { c.qk_scale = nan; }),
       {"qk_scale", "finite", "nan"},
       "LocalMHA::LocalMHA"},
      {"LayerDropoutOfTwo",
       layer([](C& c) { c.dropout = 2; }),
       {"dropout", "probability in [0, 1)", "got 2"},
       "LocalMHA::LocalMHA"},
      {"LayerNegativeLookBackward",
       layer([](C& c) { c.look_backward = -1; }),
       {"look_backward", "at least 0", "got -1"},
       "LocalMHA::LocalMHA"},
      {"LayerCausalWithLookForward",
       layer([](C& c) { c.causal = true, c.look_forward = 2; }),
       {"look_forward", "causal", "got 2"},
       "LocalMHA::LocalMHA"},
      {"LayerXposWithoutRotary",
       layer([](C& c) { c.use_xpos = true, c.use_rotary_pos_emb = false; }),
       {"use_xpos", "rotary"},
       "LocalMHA::LocalMHA"},
      {"LayerTinyXposBase",
       layer([](C& c) { c.use_xpos = true, c.xpos_scale_base = 0.01; }),
       {"xpos_scale_base", local_mha::detail::at_least_xpos_scale_base, "got 0.01"},
       "LocalMHA::LocalMHA"},
  };
}

std::vector<BadInput> transformer_configurations() {
  using C = LocalTransformerConfig;
  return {
      {"ModelNoTokens",
       transformer([](C& c) { c.num_tokens = 0; }),
       {"num_tokens", "at least 1", "got 0"},
       "LocalTransformer::LocalTransformer"},
      {"ModelNoLength",
       transformer([](C& c) { c.max_seq_len = 0; }),
       {"max_seq_len", "at least 1", "got 0"},
       "LocalTransformer::LocalTransformer"},
      {"ModelNoDim",
       transformer([](C& c) { c.dim = 0; }),
       {"dim", "at least 1", "got 0"},
       "LocalTransformer::LocalTransformer"},
      {"ModelNegativeDepth",
       transformer([](C& c) { c.depth = -1; }),
       {"depth", "at least 0", "got -1"},
       "LocalTransformer::LocalTransformer"},
      {"ModelHugeDepth",
       transformer([](C& c) { c.depth = std::numeric_limits<Index>::max(); }),
       {"depth", "9223372036854775807"},
       "LocalTransformer::LocalTransformer"},
      {"ModelNoWindow",
       transformer([](C& c) { c.local_attn_window_size = 0; }),
       {"local_attn_window_size", "at least 1", "got 0"},
       "LocalTransformer::LocalTransformer"},
      {"ModelHugeVocabulary",
       transformer([](C& c) { c.num_tokens = Index{1} << 45; }),
       {"num_tokens", "2^40"},
       "LocalTransformer::LocalTransformer"},
      {"ModelHugeLength",
       transformer([](C& c) { c.max_seq_len = Index{1} << 45; }),
       {"max_seq_len", "2^40"},
       "LocalTransformer::LocalTransformer"},
      {"ModelFeedForwardOfNaN",
       transformer([](C& c) { c.ff_mult = nan; }),
       {"ff_mult", "finite", "nan"},
       "LocalTransformer::LocalTransformer"},
      {"ModelNoFeedForward",
       transformer([](C& c) { c.ff_mult = 0.01; }),
       {"ff_mult", "0.01"},
       "LocalTransformer::LocalTransformer"},
      {"ModelNegativeFeedForward",
       transformer([](C& c) { c.ff_mult = -4; }),
       {"ff_mult", "-4"},
       "LocalTransformer::LocalTransformer"},
      {"ModelAttentionDropoutOfOne",
       transformer([](C& c) { c.attn_dropout = 1; }),
       {"attn_dropout", "probability in [0, 1)", "got 1"},
       "LocalTransformer::LocalTransformer"},
      {"ModelFeedForwardDropoutOfNaN",
       transformer([](C& c) { c.ff_dropout = nan; }),
       {"ff_dropout", "probability in [0, 1)", "nan"},
       "LocalTransformer::LocalTransformer"},
      {"ModelXposWithDynamicBias",
       transformer([](C& c) { c.use_xpos = c.use_dynamic_pos_bias = true; }),
       {"use_xpos", "dynamic position bias"},
       "LocalTransformer::LocalTransformer"},
      {"ModelDynamicBiasOfOneChannel",
       transformer([](C& c) { c.use_dynamic_pos_bias = true, c.dim = 1; }),
       {"dim", "at least 2", "got 1"},
       "LocalTransformer::LocalTransformer"},
      {"ModelDynamicBiasOfAHugeWindow",
       transformer(
           [](C& c) { c.use_dynamic_pos_bias = true, c.local_attn_window_size = Index{1} << 40; }),
       {"local_attn_window_size", "1099511627776"},
       "LocalTransformer::LocalTransformer"},
      {"ModelLayersOfOtherNumber",
       transformer([](C& c) { c.depth = 3, c.layers = {2, layer_config(c)}; }),
       {"layers", "1, or as many as the depth, 3", "got 2"},
       "LocalTransformer::LocalTransformer"},
      {"ModelLayersOfAnotherDim",
       transformer([](C& c) { c.layers = {layer_config(c)}, c.layers[0].dim = 6; }),
       {"layers[0].dim", "12, the model's dim", "got 6"},
       "LocalTransformer::LocalTransformer"},
      {"ModelLayersWithHeadsBeside",
       transformer([](C& c) { c.layers = {layer_config(c)}, c.layers[0].heads = c.heads + 1; }),
       {"heads", "its default, or what layers[0].heads is"},
       "LocalTransformer::LocalTransformer"},
      {"ModelLayersWithAScaleBaseBeside",
       transformer([](C& c) { c.layers = {layer_config(c)}, c.xpos_scale_base = 7; }),
       {"xpos_scale_base", "its default, or what layers[0].xpos_scale_base is", "got 7"},
       "LocalTransformer::LocalTransformer"},
      {"ModelLayersThatAreWrong",
       transformer([](C& c) { c.layers = {layer_config(c)}, c.layers[0].kv_heads = 0; }),
       {"layers[0].kv_heads", "divisor", "got 0"},
       "LocalTransformer::LocalTransformer"},
      {"ModelDynamicBiasOfATokenWindow",
       transformer([](C& c) {
         c = {.num_tokens = 5, .max_seq_len = 9, .dim = 6, .depth = 1};
         c.use_dynamic_pos_bias = true;
         c.layers = {{.dim = 6, .use_rotary_pos_emb = false}};
         c.layers[0].token_window = {3, 0};
       }),
       {"layers[0].token_window", "dynamic position bias"},
       "LocalTransformer::LocalTransformer"},
      {"ModelLayerOfNoNumber",
       [] {
         C config{.num_tokens = 5, .max_seq_len = 9, .dim = 6, .depth = 2};
         config.layers = {2, layer_config(config)};
         layer_config(config);
       },
       {"layers", "one that all share", "got 2"},
       "layer_config"},
      {"ModelOddDimHead",
       transformer([](C& c) { c.dim_head = 3; }),
       {"dim_head", "even", "got 3"},
       "LocalTransformer::LocalTransformer"},
  };
}

std::vector<BadInput> attention_arguments() {
  const auto q = heads(2, 3, 10, 8);
  const auto at = [](Index first) { return support::AttentionOptions{.first_position = first}; };
  const auto of_window = [](Index w) { return support::AttentionOptions{.window_size = w}; };
  return {
      {"QueriesOfOtherChannels",
       attend(heads(2, 3, 10, 6), heads(2, 3, 10, 6), heads(2, 3, 10, 6)),
       {"q", "[any, any, any, 8]", "[2, 3, 10, 6]"},
       "LocalAttention::forward"},
      {"KeysOfOtherLength",
       attend(q, heads(2, 3, 9, 8), q),
       {"k", "[2, 3, 10, 8]", "[2, 3, 9, 8]"},
       "LocalAttention::forward"},
      {"ValuesOfOtherBatch",
       attend(q, q, heads(1, 3, 10, 8)),
       {"v", "[2, 3, 10, 8]", "[1, 3, 10, 8]"},
       "LocalAttention::forward"},
      {"KeysOfHeadsThatDoNotDivide",
       attend(q, heads(2, 2, 10, 8), heads(2, 2, 10, 8)),
       {"k", "divides", "3", "got 2"},
       "LocalAttention::forward"},
      {"SharedKeysOfFewerHeads",
       [q] {
         LocalAttention<float>({.window_size = 4, .shared_qk = true})
             .forward(q, heads(2, 1, 10, 8), heads(2, 1, 10, 8));
       },
       {"k", "shared_qk", "got 1"},
       "LocalAttention::forward"},
      {"SinksOfOtherHeads",
       [q] {
         Tensor<float, 1> sinks(2);
         LocalAttention<float>(attention_config()).forward(q, q, q, {.sinks = sinks});
       },
       {"sinks", "[3]", "[2]"},
       "LocalAttention::forward"},
      {"RelativeBiasOfALookAround",
       [q] {
         Tensor<float, 2> bias(3, 9);
         LocalAttention<float>(attention_config()).forward(q, q, q, {.relative_bias = bias});
       },
       {"relative_bias", "token windows"},
       "LocalAttention::forward"},
      {"RelativeBiasOfAnEndlessWindow",
       [q] {
         Tensor<float, 2> bias(3, 9);
         of_tokens(local_mha::TokenWindow::unbounded, 0).forward(q, q, q, {.relative_bias = bias});
       },
       {"relative_bias", "bounded"},
       "LocalAttention::forward"},
      {"RelativeBiasOfOtherWidth",
       [q] {
         Tensor<float, 2> bias(3, 9);
         of_tokens(3, 2).forward(q, q, q, {.relative_bias = bias});
       },
       {"relative_bias", "[any, 6]", "[3, 9]"},
       "LocalAttention::forward"},
      {"RelativeBiasOfOtherHeads",
       [q] {
         Tensor<float, 2> bias(2, 6);
         of_tokens(3, 2).forward(q, q, q, {.relative_bias = bias});
       },
       {"relative_bias", "3 (heads) or 1", "got 2"},
       "LocalAttention::forward"},
      {"BiasOfATokenWindow",
       [q] {
         const Tensor<float, 3> bias = zeros(3, 1, 6);
         of_tokens(3, 2).forward(q, q, q, {.attn_bias = bias});
       },
       {"attn_bias", "relative_bias"},
       "LocalAttention::forward"},
      {"WindowAtTheCallOfATokenWindow",
       [q] {
         LocalAttentionConfig config{.dim = 8, .use_xpos = true};
         config.token_window = {3, 2};
         LocalAttention<float>(config).forward(q, q, q, {.window_size = 5});
       },
       {"window_size", "token window", "got 5"},
       "LocalAttention::forward"},
      {"SlopesOfOtherHeads",
       [q] {
         LocalAttentionConfig config = attention_config();
         config.score.alibi_slopes = {0.5, 0.25};
         LocalAttention<float>(config).forward(q, q, q);
       },
       {"alibi_slopes", "3 slopes", "got 2"},
       "LocalAttention::forward"},
      {"SegmentsOfABatch",
       attend_packed(2, {0, 10}),
       {"cu_seqlens", "batch of 2"},
       "LocalAttention::forward"},
      {"SegmentsNotFromZero",
       attend_packed(1, {1, 10}),
       {"cu_seqlens", "0 at first", "got 1"},
       "LocalAttention::forward"},
      {"SegmentsThatFall",
       attend_packed(1, {0, 7, 5, 10}),
       {"cu_seqlens", "never fall", "5 after 7"},
       "LocalAttention::forward"},
      {"SegmentsOfOtherLength",
       attend_packed(1, {0, 7, 9}),
       {"cu_seqlens", "10 (rows)", "got 9"},
       "LocalAttention::forward"},
      {"LengthsOfAnotherBatch",
       [q] {
         const std::vector<Index> lengths{3, 4, 5};
         LocalAttention<float>(attention_config()).forward(q, q, q, {.lengths = lengths});
       },
       {"lengths", "2 (batch) numbers", "got 3"},
       "LocalAttention::forward"},
      {"LengthOfMoreRows",
       [q] {
         const std::vector<Index> lengths{3, 11};
         LocalAttention<float>(attention_config()).forward(q, q, q, {.lengths = lengths});
       },
       {"lengths[1]", "0 to 10", "got 11"},
       "LocalAttention::forward"},
      {"LengthsOfAStream",
       [] {
         const std::vector<Index> lengths{3};
         LocalAttention<float>::Stream(LocalAttention<float>(attention_config()), 3, 8, {},
                                       {.lengths = lengths});
       },
       {"lengths", "a stream ends at flush()"},
       "LocalAttention::StreamOf::StreamOf"},
      {"SegmentsFromAPosition",
       attend_packed(1, {0, 10}, 3),
       {"first_position", "got 3"},
       "LocalAttention::forward"},
      {"ValuesOfOtherHeads",
       attend(q, q, heads(2, 1, 10, 8)),
       {"v", "[2, 3, 10, 8]", "[2, 1, 10, 8]"},
       "LocalAttention::forward"},
      {"QueriesWithoutChannels",
       [] {
         const auto none = heads(1, 1, 5, 0);
         LocalAttention<float>({.window_size = 4}).forward(none, none, none);
       },
       {"q", "at least 1 channel", "[1, 1, 5, 0]"},
       "LocalAttention::forward"},
      {"ProbabilitiesOfOtherKeys",
       [q] {
         LocalAttention<float>(attention_config()).attention_probabilities(q, heads(2, 3, 4, 8));
       },
       {"k", "[2, 3, 10, 8]", "[2, 3, 4, 8]"},
       "LocalAttention::attention_probabilities"},
      {"MaskOfOtherBatch",
       attend(mask_of(1, 10)),
       {"mask", "[2, 10]", "[1, 10]"},
       "LocalAttention::forward"},
      {"MaskOfOtherLength",
       attend(mask_of(2, 12)),
       {"mask", "[2, 10]", "[2, 12]"},
       "LocalAttention::forward"},
      {"BiasOfOtherHeads",
       attend({}, zeros(4, 4, 12)),
       {"attn_bias", "divides 6 (batch x heads)", "3 (heads) or 1", "got 4"},
       "LocalAttention::forward"},
      {"BiasOfOtherWindow",
       attend({}, zeros(3, 5, 12)),
       {"attn_bias", "[any, 4, 12]", "[3, 5, 12]"},
       "LocalAttention::forward"},
      {"BiasOfOtherLookAround",
       attend({}, zeros(3, 4, 8)),
       {"attn_bias", "[any, 4, 12]", "[3, 4, 8]"},
       "LocalAttention::forward"},
      {"BiasOfAllPairs",
       attend({}, zeros(3, 10, 10)),
       {"attn_bias", "[any, 4, 12]", "[3, 10, 10]"},
       "LocalAttention::forward"},
      {"BiasOfTheConfigurationsWindow",
       attend({}, zeros(3, 4, 12), of_window(5), true),
       {"attn_bias", "[any, 5, 15]", "[3, 4, 12]"},
       "LocalAttention::forward"},
      {"WindowAtTheCallWithoutXpos",
       attend({}, {}, of_window(8)),
       {"window_size", "xPos", "got 8"},
       "LocalAttention::forward"},
      {"WindowOfZeroAtTheCall",
       attend({}, {}, of_window(0), true),
       {"window_size", "at least 1", "got 0"},
       "LocalAttention::forward"},
      {"NegativeFirstPosition",
       attend({}, {}, at(-1)),
       {"first_position", "got -1"},
       "LocalAttention::forward"},
      {"HugeFirstPosition",
       attend({}, {}, at(std::numeric_limits<Index>::max())),
       {"first_position", "2^60", "9223372036854775807"},
       "LocalAttention::forward"},
      {"FlagsOfAnotherNumber",
       [] { PaddingMask::masked_view(std::vector<std::uint8_t>(5), {2, 3}); },
       {"flags", "6 for [2, 3]", "got 5"},
       "PaddingMask::masked_view"},
      {"LengthBeyondTheSequence",
       [] { PaddingMask::from_lengths(std::vector<Index>{3, 11}, 10); },
       {"lengths[1]", "0 to 10", "got 11"},
       "PaddingMask::from_lengths"},
      {"NegativeLength",
       [] { PaddingMask::from_lengths(std::vector<Index>{-1}, 10); },
       {"lengths[0]", "0 to 10", "got -1"},
       "PaddingMask::from_lengths"},
      {"NegativeSequence",
       [] { PaddingMask::from_lengths(std::vector<Index>{}, -4); },
       {"seqlen", "at least 0", "got -4"},
       "PaddingMask::from_lengths"},
      {"HugeSequences",
       [] { PaddingMask::from_lengths(std::vector<Index>(4, 1), Index{1} << 62); },
       {"seqlen", "4611686018427387904"},
       "PaddingMask::from_lengths"},
      {"HugeSequencesTogether",
       [] { PaddingMask::from_lengths(std::vector<Index>(4, 1), (Index{1} << 38) + 1); },
       {"seqlen", "at most 2^40 positions in all", "got 274877906945"},
       "PaddingMask::from_lengths"},
  };
}

std::vector<BadInput> layer_arguments() {
  using C = LocalMHAConfig;
  using P = LocalMHAParameters<double>;
  const auto forward = [](const Tensor<float, 3>& x, const PaddingMask& mask = {},
                          const Tensor<float, 3>& bias = {}) {
    return [=] { LocalMHA<float>(layer_config()).forward(x, mask, support::optional_view(bias)); };
  };
  return {
      {"InputOfOtherDim",
       forward(zeros(2, 10, 16)),
       {"x", "[any, any, 12]", "[2, 10, 16]"},
       "LocalMHA::forward"},
      {"LayerMaskOfOtherLength",
       forward(zeros(2, 10, 12), mask_of(2, 9)),
       {"mask", "[2, 10]", "[2, 9]"},
       "LocalMHA::forward"},
      {"LayerBiasOfOtherHeads",
       forward(zeros(2, 10, 12), {}, zeros(8, 4, 12)),
       {"attn_bias", "2 (heads) or 1", "got 8"},
       "LocalMHA::forward"},
      {"LayerBiasOfOtherWindow",
       forward(zeros(2, 10, 12), {}, zeros(2, 4, 4)),
       {"attn_bias", "[any, 4, 12]", "[2, 4, 4]"},
       "LocalMHA::forward"},
      {"LayerLengthsOfAnotherBatch",
       [] {
         LocalMHA<float>(layer_config())
             .forward(zeros(2, 10, 12), {.lengths = std::vector<Index>{10}});
       },
       {"lengths", "2 (batch) numbers", "got 1"},
       "LocalMHA::forward"},
      {"LayerLengthsOfPackedSequences",
       [] {
         LocalMHA<float>(layer_config())
             .forward(zeros(1, 10, 12),
                      {.cu_seqlens = std::vector<Index>{0, 10}, .lengths = std::vector<Index>{10}});
       },
       {"lengths", "none beside cu_seqlens"},
       "LocalMHA::forward"},
      {"LayerLengthsOfAnotherCall",
       [] {
         const LocalMHA<float> layer(layer_config());
         auto gradients = LocalMHAParameters<float>::zeros(layer_config());
         LocalMHA<float>::Saved saved;
         const auto x = zeros(1, 10, 12);
         layer.forward_saving(saved, x, {.lengths = std::vector<Index>{4}});
         layer.backward(gradients, saved, x, x, {.lengths = std::vector<Index>{5}});
       },
       {"lengths", "that of forward_saving(), or none"},
       "LocalMHA::backward"},
      {"ViewOfTooFewNumbers",
       [] {
         const std::vector<float> numbers(23);
         LocalMHA<float>(layer_config()).forward({numbers, {1, 2, 12}});
       },
       {"data", "24 elements for [1, 2, 12]", "got 23"},
       "StridedView::StridedView"},
      {"TensorViewOfTooManyNumbers",
       [] {
         const std::vector<float> numbers(81);
         const TensorView<const float, 4> q(numbers, {1, 2, 10, 4});
         LocalAttention<float>(attention_config()).forward(q, q, q);
       },
       {"data", "80 elements for [1, 2, 10, 4]", "got 81"},
       "TensorView::TensorView"},
      {"ViewOfNothing",
       [] { LocalMHA<float>(layer_config()).forward({static_cast<float*>(nullptr), {1, 2, 12}}); },
       {"data", "[1, 2, 12]", "null"},
       "StridedView::StridedView"},
      {"ViewWithNegativeStrides",
       [] {
         std::vector<float> numbers(24);
         StridedView<const float>(numbers.data(), {1, 2, 12}, {24, -12, 1});
       },
       {"strides", "at least 0", "[24, -12, 1]"},
       "StridedView::StridedView"},
      {"ViewWithStridesBeyondMemory",
       [] {
         std::vector<float> numbers(24);
         StridedView<const float>(numbers.data(), {3, 2, 12}, {Index{1} << 61, 12, 1});
       },
       {"strides", "memory"},
       "StridedView::StridedView"},
      {"ResultsInTheSamePlace",
       [] {
         std::vector<float> numbers(24);
         StridedView<float>(numbers.data(), {1, 3, 4}, {24, 2, 1});
       },
       {"strides", "no two results have the same place", "[24, 2, 1]"},
       "StridedView::StridedView"},
      {"ResultsInOneRowOfAMap",
       [] {
         std::vector<float> numbers(48);
         const Eigen::Map<RowMatrix<float>, 0, Eigen::OuterStride<>> rows(numbers.data(), 4, 12,
                                                                          Eigen::OuterStride<>(0));
         LocalMHA<float>::Workspace workspace;
         LocalMHA<float>(layer_config())
             .forward_into(Eigen::Map<RowMatrix<float>, 0, Eigen::OuterStride<>>(rows), workspace,
                           zeros(1, 4, 12));
       },
       {"strides", "no two results have the same place"},
       "StridedView::StridedView"},
      {"MapThatGoesBackwards",
       [] {
         std::vector<float> numbers(48);
         using Map = Eigen::Map<const RowMatrix<float>, 0, Eigen::OuterStride<>>;
         LocalMHA<float>(layer_config())
             .forward(Map(numbers.data() + 36, 4, 12, Eigen::OuterStride<>(-12)));
       },
       {"strides", "at least 0"},
       "StridedView::StridedView"},
      {"ViewOfNoRowsOfTooMany",
       [] {
         LocalMHA<float>(layer_config())
             .forward({static_cast<float*>(nullptr), {0, Index{1} << 61, 12}});
       },
       {"dimensions", "memory"},
       "TensorView::TensorView"},
      {"ProbabilitiesBeyondMemory",
       [] {
         const std::vector<float> number(12);
         LocalMHA<float>(layer_config())
             .attention_probabilities({number.data(), {Index{1} << 50, 16, 12}, {0, 0, 1}});
       },
       {"x", "2^40 numbers of queries"},
       "LocalMHA::attention_probabilities"},
      {"ProbabilitiesOfTooLongSequences",
       [] {
         const Tensor<float, 4> q(1, 1, Index{1} << 21, 1);
         LocalAttention<float>({.window_size = 4}).attention_probabilities(q, q);
       },
       {"q", "2^40 numbers"},
       "LocalAttention::attention_probabilities"},
      {"AxisOfNoView",
       [] { static_cast<void>(StridedView<const float>(nullptr, {0, 2, 12}).dimension(3)); },
       {"axis", "0 to 2", "got 3"},
       "StridedView::dimension"},
      {"ResultsAmongTheRowsOfAnInput",
       [] {
         std::vector<float> numbers(200);
         const StridedView<const float> x(numbers.data(), {1, 4, 12}, {0, 40, 1});
         LocalMHA<float>::Workspace workspace;
         LocalMHA<float>(layer_config())
             .forward_into({numbers.data() + 20, {1, 4, 12}, {0, 40, 1}}, workspace, x);
       },
       {"y", "memory that does not overlap x"},
       "LocalMHA::forward_into"},
      {"LayerProbabilitiesOfOtherDim",
       [] { LocalMHA<float>(layer_config()).attention_probabilities(zeros(1, 3, 5)); },
       {"x", "[any, any, 12]", "[1, 3, 5]"},
       "LocalMHA::attention_probabilities"},
      {"SavedByOtherHeads",
       layer_backward([](C& c) { c.heads = 3; }),
       {"saved", "2 heads of 6 channels with gates", "3 heads of 6 channels with gates"},
       "LocalMHA::backward"},
      {"SavedByOtherChannels",
       layer_backward([](C& c) { c.dim_head = 8; }),
       {"saved", "2 heads of 6 channels with gates", "2 heads of 8 channels with gates"},
       "LocalMHA::backward"},
      {"SavedWithoutGates",
       layer_backward([](C& c) { c.gate_values_per_head = false; }),
       {"saved", "2 heads of 6 channels with gates", "2 heads of 6 channels without gates"},
       "LocalMHA::backward"},
      {"SavedOfAnotherLength",
       layer_backward([](C&) {}, 9),
       {"saved", "[2, 10]", "[2, 9]"},
       "LocalMHA::backward"},
      {"SavedByNothing",
       layer_backward([](C&) {}, -1),
       {"saved", "what forward_saving() kept", "nothing that was kept"},
       "LocalMHA::backward"},
      {"MisshapenProjection",
       layer_weights([](P& p) { p.to_qkv.resize(36, 13); }),
       {"to_qkv.weight", "[36, 12]", "[36, 13]"},
       "LocalMHA::LocalMHA"},
      {"TransposedOutput",
       layer_weights([](P& p) { p.to_out.resize(13, 12); }),
       {"to_out.weight", "[12, 12]", "[13, 12]"},
       "LocalMHA::LocalMHA"},
      {"NoProjection",
       layer_weights([](P& p) { p.to_qkv.resize(0, 0); }),
       {"to_qkv.weight", "[36, 12]"},
       "LocalMHA::LocalMHA"},
      {"NoNorm",
       layer_weights([](P& p) { p.norm_weight.resize(0); }),
       {"norm.weight", "[12, 1]"},
       "LocalMHA::LocalMHA"},
      {"LongScale",
       layer_weights([](P& p) { p.k_scale.resize(7); }),
       {"k_scale", "[6, 1]", "[7, 1]"},
       "LocalMHA::LocalMHA"},
      {"GateOfOtherHeads",
       layer_weights([](P& p) { p.to_v_gate_bias.resize(8); }),
       {"to_v_gate.0.bias", "[2, 1]", "[8, 1]"},
       "LocalMHA::LocalMHA"},
      {"NoBiasOfTheProjection",
       layer_weights([](P& p) { p.to_qkv_bias.resize(0); }, [](C& c) { c.qkv_bias = true; }),
       {"to_qkv.bias", "[36, 1]"},
       "LocalMHA::LocalMHA"},
      {"BiasOfTheProjectionOfOtherHeads",
       layer_weights([](P& p) { p.to_qkv_bias.resize(12); }, [](C& c) { c.qkv_bias = true; }),
       {"to_qkv.bias", "[36, 1]", "[12, 1]"},
       "LocalMHA::LocalMHA"},
      {"BiasOfTheOutputThatTheConfigurationDoesNotUse",
       layer_weights([](P& p) { p.to_out_bias.resize(12); }),
       {"to_out.bias", "no such tensor"},
       "LocalMHA::LocalMHA"},
      {"BiasOfANormThatHasNone",
       layer_weights([](P& p) { p.norm_bias.resize(12); },
                     [](C& c) { c.norm.kind = local_mha::NormKind::rms; }),
       {"norm.bias", "to_qkv.weight"},
       "LocalMHA::LocalMHA"},
      {"NormOfOneHeadWhereAllAreNormed",
       layer_weights(
           [](P& p) { p.k_norm_weight.resize(6); },
           [](C& c) { c.qk_rmsnorm = false, c.qk_norm.kind = local_mha::QkNormKind::rms_all; }),
       {"k_norm.weight", "[12, 1]", "[6, 1]"},
       "LocalMHA::LocalMHA"},
      {"KvHeadsThatDoNotDivide",
       layer([](C& c) { c.heads = 4, c.kv_heads = 3; }),
       {"kv_heads", "a divisor of the 4 heads", "3"},
       "LocalMHA::LocalMHA"},
      {"NoKvHeads",
       layer([](C& c) { c.kv_heads = 0; }),
       {"kv_heads", "a divisor of the 2 heads", "0"},
       "LocalMHA::LocalMHA"},
      {"LayerWithTwoWindows",
       layer([](C& c) { c.token_window = {.left = 4, .right = 0}; }),
       {"window_size", "0, because a token window takes its place", "4"},
       "LocalMHA::LocalMHA"},
      {"LayerWithAnEndBehindItself",
       layer([](C& c) { c.window_size = 0, c.token_window = {.left = 4, .right = -1}; }),
       {"token_window.right", "at least 0", "-1"},
       "LocalMHA::LocalMHA"},
      {"CausalLayerThatLooksAhead",
       layer([](C& c) {
         c.causal = true;
         c.window_size = 0;
         c.token_window = {.left = 4, .right = 1};
       }),
       {"token_window.right", "0, because the attention is causal", "1"},
       "LocalMHA::LocalMHA"},
      {"LayerWithASoftCapOfNothing",
       layer([](C& c) { c.score.soft_cap = 0; }),
       {"score.soft_cap", "a finite positive number", "0"},
       "LocalMHA::LocalMHA"},
      {"LayerWithSlopesOfOtherHeads",
       layer([](C& c) { c.score.alibi_slopes = {1, 2, 3}; }),
       {"score.alibi_slopes", "2 slopes, one for each head", "3"},
       "LocalMHA::LocalMHA"},
      {"RelativeBiasOfALookAround",
       layer([](C& c) { c.relative_bias = true; }),
       {"relative_bias", "token windows with bounded ends", "got 1"},
       "LocalMHA::LocalMHA"},
      {"RelativeBiasWithoutAnEnd",
       layer([](C& c) {
         c.window_size = 0;
         c.token_window = {.left = local_mha::TokenWindow::unbounded, .right = 0};
         c.relative_bias = true;
       }),
       {"relative_bias", "token windows with bounded ends", "got 1"},
       "LocalMHA::LocalMHA"},
      {"LayerWithFewerThanNoFirstKeys",
       layer([](C& c) { c.first_keys = -1; }),
       {"first_keys", "at least 0", "-1"},
       "LocalMHA::LocalMHA"},
      {"WeightsOfOtherKvHeads",
       layer_weights([](P& p) { p.to_qkv.resize(36, 12); }, [](C& c) { c.kv_heads = 1; }),
       {"to_qkv.weight", "[24, 12]", "[36, 12]"},
       "LocalMHA::LocalMHA"},
      {"NoSinks",
       layer_weights([](P& p) { p.sinks.resize(0); }, [](C& c) { c.sinks = true; }),
       {"sinks", "[2, 1]", "nothing"},
       "LocalMHA::LocalMHA"},
      {"SinksThatTheConfigurationDoesNotUse",
       layer_weights([](P& p) { p.sinks.resize(2); }),
       {"sinks", "no such tensor"},
       "LocalMHA::LocalMHA"},
      {"RelativeBiasOfAnotherWindow",
       layer_weights([](P& p) { p.relative_bias.resize(2, 4); },
                     [](C& c) {
                       c.window_size = 0;
                       c.token_window = {.left = 4, .right = 0};
                       c.relative_bias = true;
                     }),
       {"relative_bias", "[2, 5]", "[2, 4]"},
       "LocalMHA::LocalMHA"},
      {"BiasOfALayerWithATokenWindow",
       [] {
         C config = layer_config();
         config.window_size = 0;
         config.token_window = {.left = 4, .right = 0};
         const auto bias = zeros(1, 1, 5);
         LocalMHA<float>(config).forward(zeros(2, 10, 12), {}, support::optional_view(bias));
       },
       {"attn_bias", "none, because a token window takes a relative_bias", "one"},
       "LocalMHA::forward"},
      {"StreamOfALayerWithoutAnEnd",
       [] {
         C config = layer_config();
         config.window_size = 0;
         config.token_window = {.left = local_mha::TokenWindow::unbounded, .right = 0};
         LocalMHA<float>::Stream{LocalMHA<float>(config)};
       },
       {"token_window", "bounded ends", "an unbounded one"},
       "LocalMHA::Stream::Stream"},
      {"StreamOfALayerThatSeesAllThatComes",
       [] {
         C config = layer_config();
         config.window_size = 0;
         config.token_window = {.left = 1, .right = local_mha::TokenWindow::unbounded};
         LocalMHA<float>::Stream{LocalMHA<float>(config)};
       },
       {"token_window", "bounded ends", "an unbounded one"},
       "LocalMHA::Stream::Stream"},
      // No token window, and as long as one without an end.
      {"StreamOfALayerWithAWindowThatIsTooLong",
       [] {
         C config = layer_config();
         config.window_size = Index{1} << 60;
         config.exact_windowsize = true;
         LocalMHA<float>::Stream{LocalMHA<float>(config)};
       },
       {"window_size", "a look-around whose keys and values are at most 2^36 numbers",
        std::to_string((std::numeric_limits<Index>::max)() / 16)},
       "LocalMHA::Stream::Stream"},
      {"PackedBatchOfALayer",
       layer_packed(2, {0, 10}),
       {"cu_seqlens", "none unless the batch is 1", "a batch of 2"},
       "LocalMHA::forward"},
      {"PackedFromTheMiddleOfALayer",
       layer_packed(1, {1, 10}),
       {"cu_seqlens", "0 at first", "1"},
       "LocalMHA::forward"},
      {"PackedBackwardsInALayer",
       layer_packed(1, {0, 7, 5, 10}),
       {"cu_seqlens", "never fall", "5 after 7"},
       "LocalMHA::forward"},
      {"PackedTooShortInALayer",
       layer_packed(1, {0, 7, 9}),
       {"cu_seqlens", "10 (rows) at last", "9"},
       "LocalMHA::forward"},
      {"SavedWithASoftCap",
       layer_backward([](C& c) { c.score.soft_cap = 3; }),
       {"saved", "configuration", "another"},
       "LocalMHA::backward"},
      {"SavedWithABias",
       layer_backward([](C& c) { c.qkv_bias = true; }),
       {"saved", "configuration", "another"},
       "LocalMHA::backward"},
      {"WeightsThatTheConfigurationDoesNotUse",
       [] {
         LocalMHAConfig plain = layer_config();
         plain.prenorm = false;
         LocalMHA<double>(plain, P::zeros(layer_config()));
       },
       {"norm.weight"},
       "LocalMHA::LocalMHA"},
      {"NewMisshapenWeights",
       [] {
         LocalMHA<double> mha(layer_config());
         P p = mha.parameters();
         p.q_scale.resize(5);
         mha.set_parameters(p);
       },
       {"q_scale", "[6, 1]", "[5, 1]"},
       "LocalMHA::set_parameters"},
  };
}

std::vector<BadInput> transformer_arguments() {
  using P = LocalTransformerParameters<double>;
  return {
      {"TokenBeyondTheVocabulary",
       predict(tokens({1, 2, 10})),
       {"tokens", "0 to 9", "got 10", "at 2"},
       "LocalTransformer::forward"},
      {"NegativeToken",
       predict(tokens({1, -1, 3})),
       {"tokens", "0 to 9", "got -1", "at 1"},
       "LocalTransformer::forward"},
      {"SequenceTooLong",
       predict(tokens({1, 2, 3, 4, 5, 6, 7, 8, 9})),
       {"tokens", "max_seq_len = 8", "got 9"},
       "LocalTransformer::forward"},
      {"TokenMaskOfOtherLength",
       predict(tokens({1, 2, 3}), mask_of(1, 4)),
       {"mask", "[1, 3]", "[1, 4]"},
       "LocalTransformer::forward"},
      {"LossWithoutTokens",
       loss(tokens({})),
       {"tokens", "at least 1", "[1, 0]"},
       "LocalTransformer::loss"},
      {"LossOfASequenceTooLong",
       loss(tokens({1, 2, 3, 4, 5, 6, 7, 8, 9, 1})),
       {"tokens", "max_seq_len = 8", "got 9"},
       "LocalTransformer::loss"},
      {"LossOfALabelBeyondTheVocabulary",
       loss(tokens({1, 2, 77})),
       {"0 to 9", "got 77"},
       "LocalTransformer::loss"},
      {"LossMaskOfTheLabels",
       loss(tokens({1, 2, 3}), mask_of(1, 3)),
       {"mask", "[1, 2]", "[1, 3]"},
       "LocalTransformer::loss"},
      {"TokenLengthsOfAnotherBatch",
       predict(tokens({1, 2, 3}), {}, {1, 2}),
       {"lengths", "1 (batch) numbers", "got 2"},
       "LocalTransformer::forward"},
      {"LengthOfMoreTokens",
       predict(tokens({1, 2, 3}), {}, {4}),
       {"lengths[0]", "0 to 3", "got 4"},
       "LocalTransformer::forward"},
      {"TokenLengthsOfPackedSequences",
       predict(tokens({1, 2, 3}), {}, {3}, {0, 3}),
       {"lengths", "none beside cu_seqlens"},
       "LocalTransformer::forward"},
      {"TokenMaskOfOtherLengthBesideLengths",
       predict(tokens({1, 2, 3}), mask_of(1, 2), {3}),
       {"mask", "[1, 3]", "[1, 2]"},
       "LocalTransformer::forward"},
      {"TokenWithinTheLengthsBeyondTheVocabulary",
       predict(tokens({1, 10, 10}), {}, {2}),
       {"tokens", "0 to 9", "got 10", "at 1"},
       "LocalTransformer::forward"},
      {"LengthOfASequenceTooLong",
       predict(tokens({1, 2, 3, 4, 5, 6, 7, 8, 9, 1}), {}, {9}),
       {"tokens", "max_seq_len = 8", "got 9"},
       "LocalTransformer::forward"},
      {"PackedTokensOfABatch",
       [] {
         Tensor<std::int64_t, 2> input(2, 3);
         input.setZero();
         predict(input, {}, {}, {0, 3})();
       },
       {"cu_seqlens", "batch of 2"},
       "LocalTransformer::forward"},
      {"PackedTokensNotFromZero",
       predict(tokens({1, 2, 3}), {}, {}, {1, 3}),
       {"cu_seqlens", "0 at first", "got 1"},
       "LocalTransformer::forward"},
      {"PackedTokensThatFall",
       predict(tokens({1, 2, 3}), {}, {}, {0, 2, 1, 3}),
       {"cu_seqlens", "never fall", "1 after 2"},
       "LocalTransformer::forward"},
      {"PackedTokensOfOtherLength",
       predict(tokens({1, 2, 3}), {}, {}, {0, 2}),
       {"cu_seqlens", "3 (rows)", "got 2"},
       "LocalTransformer::forward"},
      {"PackedSequenceTooLong",
       predict(tokens({1, 2, 3, 4, 5, 6, 7, 8, 9, 1}), {}, {}, {0, 1, 10}),
       {"tokens", "max_seq_len = 8", "got 9"},
       "LocalTransformer::forward"},
      {"LossLengthsOfTheLabels",
       [] {
         const std::vector<Index> lengths{3};
         LocalTransformer<float>(transformer_config())
             .loss(tokens({1, 2, 3}), {.lengths = lengths});
       },
       {"lengths[0]", "0 to 2", "got 3"},
       "LocalTransformer::loss"},
      {"LossOfPackedSequences",
       [] {
         const std::vector<Index> cuts{0, 2};
         LocalTransformer<float>(transformer_config())
             .loss(tokens({1, 2, 3}), {.cu_seqlens = cuts});
       },
       {"cu_seqlens", "none"},
       "LocalTransformer::loss"},
      {"GradientsOfPackedSequences",
       [] {
         const std::vector<Index> cuts{0, 2};
         auto gradients = LocalTransformerParameters<float>::zeros(transformer_config());
         LocalTransformer<float>(transformer_config())
             .backward(gradients, tokens({1, 2, 3}), {.cu_seqlens = cuts});
       },
       {"cu_seqlens", "none"},
       "LocalTransformer::backward"},
      {"MisshapenEmbedding",
       transformer_weights([](P& p) { p.token_emb.resize(11, 12); }),
       {"token_emb.weight", "[10, 12]", "[11, 12]"},
       "LocalTransformer::LocalTransformer"},
      {"TooFewLayers",
       transformer_weights([](P& p) { p.layers.pop_back(); }),
       {"layers.1.0"},
       "LocalTransformer::LocalTransformer"},
      {"TooManyLayers",
       transformer_weights([](P& p) { p.layers.push_back(p.layers[0]); }),
       {"layers.2.0"},
       "LocalTransformer::LocalTransformer"},
      {"MisshapenFeedForward",
       transformer_weights([](P& p) { p.layers[1].feed_forward.proj_out.resize(12, 31); }),
       {"layers.1.1.branch.4.weight", "[12, 32]", "[12, 31]"},
       "LocalTransformer::LocalTransformer"},
      {"UnexpectedDynamicBias",
       transformer_weights([](P& p) {
         p.dynamic_pos_bias = local_mha::DynamicPositionBiasParameters<double>::zeros(6, 2);
       }),
       {"dynamic_pos_bias.mlp.0.weight"},
       "LocalTransformer::LocalTransformer"},
      {"MisshapenLogits",
       transformer_weights([](P& p) { p.to_logits.resize(10, 11); }),
       {"to_logits.1.weight", "[10, 12]", "[10, 11]"},
       "LocalTransformer::LocalTransformer"},
  };
}

std::vector<BadInput> component_arguments() {
  using M = RowMatrix<double>;
  using V = Vector<double>;
  return {
      {"LinearBiasOfOtherSize",
       [] { local_mha::Linear<double>(M::Zero(3, 2), V::Zero(2)); },
       {"bias", "3", "got 2"},
       "Linear::Linear"},
      {"LinearInputOfOtherWidth",
       [] { local_mha::Linear<double>(M::Zero(3, 2)).forward(M::Zero(5, 3)); },
       {"x", "2 columns", "got 3"},
       "Linear::forward"},
      {"NormBiasOfOtherSize",
       [] { local_mha::LayerNorm<double>(V::Zero(3), V::Zero(4)); },
       {"bias", "3", "got 4"},
       "LayerNorm::LayerNorm"},
      {"NormOfNoChannels",
       [] { local_mha::LayerNorm<double>(V(), V()); },
       {"weight", "at least 1", "got 0"},
       "LayerNorm::LayerNorm"},
      {"NormInputOfOtherWidth",
       [] { local_mha::LayerNorm<double>(V::Zero(3), V::Zero(3)).forward(M::Zero(5, 2)); },
       {"x", "3 columns", "got 2"},
       "LayerNorm::forward"},
      {"QkNormInputOfOtherWidth",
       [] { local_mha::QkNorm<double>(V::Ones(4)).forward(M::Zero(5, 8)); },
       {"x", "4 columns", "got 8"},
       "QkNorm::forward"},
      {"RotaryOfOddChannels",
       [] { local_mha::RotaryEmbedding<double>(5); },
       {"dim_head", "even", "got 5"},
       "RotaryEmbedding::RotaryEmbedding"},
      {"RotaryOfOtherChannels",
       [] { local_mha::RotaryEmbedding<double>(4).rotate_keys(M::Zero(3, 6)); },
       {"keys", "4 columns", "got 6"},
       "RotaryEmbedding::rotate_keys"},
      {"RotaryBeyondAGroup",
       [] { local_mha::RotaryEmbedding<double>(4).rotate_queries(M::Zero(1000, 4)); },
       {"queries", "256 rows", "got 1000"},
       "RotaryEmbedding::rotate_queries"},
      {"RotaryOfABadBase",
       [] { local_mha::RotaryEmbedding<double>(4, nan); },
       {"xpos_scale_base", local_mha::detail::at_least_xpos_scale_base, "nan"},
       "RotaryEmbedding::RotaryEmbedding"},
      {"RotaryOfXposTimesAFactor",
       [] { local_mha::RotaryEmbedding<double>(4, 16.0, {.factor = 2}); },
       {"use_xpos", "false", "factor"},
       "RotaryEmbedding::RotaryEmbedding"},
      {"LongformerOfNoHeads",
       [] { local_mha::LongformerParameters<double>::zeros({.dim = 4}); },
       {"heads", "at least 1", "got 0"},
       "LongformerParameters::zeros"},
      {"LongformerOfTooManyChannels",
       [] {
         constexpr Index most = std::numeric_limits<Index>::max();
         local_mha::validate(local_mha::LongformerConfig{most, most, 2});
       },
       {"dim", "at most 2^40", "got 9223372036854775807"},
       "validate"},
      {"LongformerOfAnOddWindow",
       [] { local_mha::validate(local_mha::LongformerConfig{4, 2, 3}); },
       {"attention_window", "an even number", "got 3"},
       "validate"},
      {"LongformerOfUnevenHeads",
       [] { local_mha::validate(local_mha::LongformerConfig{4, 3, 2}); },
       {"dim", "a multiple of the 3 heads", "got 4"},
       "validate"},
      {"LongformerOfOtherShapes",
       [] {
         auto p = local_mha::LongformerParameters<double>::zeros({4, 2, 2});
         p.to_qkv_global.resize(3, 4);
         local_mha::LongformerAttention<double>({4, 2, 2}, p);
       },
       {"to_qkv_global.weight", "[12, 4]", "[3, 4]"},
       "LongformerAttention::LongformerAttention"},
      {"LongformerInputOfOtherWidth",
       [] { longformer().forward(Tensor<double, 3>(1, 2, 5)); },
       {"x", "[any, any, 4]", "[1, 2, 5]"},
       "LongformerAttention::forward"},
      {"LongformerGlobalRowsOfOtherLength",
       [] {
         local_mha::LongformerAttention<double>::Saved saved;
         const Tensor<bool, 2> global(1, 3);
         longformer().forward_saving(saved, Tensor<double, 3>(1, 2, 4), {.global_rows = global});
       },
       {"global_rows", "[1, 2]", "[1, 3]"},
       "LongformerAttention::forward_saving"},
      {"LongformerIntoAnotherShape",
       [] {
         local_mha::LongformerAttention<double>::Workspace workspace;
         Tensor<double, 3> x(1, 2, 4), y(1, 3, 4);
         longformer().forward_into(y, workspace, x);
       },
       {"y", "shape [1, 2, 4]", "[1, 3, 4]"},
       "LongformerAttention::forward_into"},
      {"LongformerIntoItsInput",
       [] {
         local_mha::LongformerAttention<double>::Workspace workspace;
         Tensor<double, 3> x(1, 2, 4);
         longformer().forward_into(x, workspace, x);
       },
       {"y", "x"},
       "LongformerAttention::forward_into"},
      {"LongformerNotSaved",
       [] {
         auto gradients = local_mha::LongformerParameters<double>::zeros({4, 2, 2});
         const Tensor<double, 3> x(1, 2, 4);
         longformer().backward(gradients, {}, x, x);
       },
       {"saved", "[1, 2, 2, 2]", "[0, 0, 0, 0]"},
       "LongformerAttention::backward"},
      {"LongformerBackwardOfOtherGlobalRows",
       [] {
         auto gradients = local_mha::LongformerParameters<double>::zeros({4, 2, 2});
         Tensor<double, 3> x(1, 2, 4);
         x.setZero();
         local_mha::LongformerAttention<double>::Saved saved;
         longformer().forward_saving(saved, x);
         Tensor<bool, 2> global(1, 2);
         global.setConstant(true);
         longformer().backward(gradients, saved, x, x, {.global_rows = global});
       },
       {"global_rows", "those of forward_saving()", "got some"},
       "LongformerAttention::backward"},
      {"FeedForwardOfOtherShapes",
       [] {
         auto p = local_mha::FeedForwardParameters<double>::zeros(6, 4);
         p.proj_in.resize(7, 6);
         local_mha::FeedForward<double>{p};
       },
       {"1.weight", "[8, 6]", "[7, 6]"},
       "FeedForward::FeedForward"},
      {"FeedForwardInputOfOtherWidth",
       [] {
         local_mha::FeedForward<double>(local_mha::FeedForwardParameters<double>::zeros(6, 4))
             .forward(M::Zero(2, 5));
       },
       {"x", "6 columns", "got 5"},
       "FeedForward::forward"},
      {"FeedForwardSavedByAnother",
       feed_forward_backward(3, 5),
       {"saved", "[5, 4]", "[5, 3]"},
       "FeedForward::backward"},
      {"FeedForwardSavedOfOtherRows",
       feed_forward_backward(4, 6),
       {"saved", "[5, 4]", "[6, 4]"},
       "FeedForward::backward"},
      {"FeedForwardBackwardIntoOtherRoom",
       [] {
         const local_mha::FeedForward<float> layer({.dim = 6});
         local_mha::FeedForward<float>::Workspace workspace;
         local_mha::FeedForward<float>::Saved saved;
         auto gradients = local_mha::FeedForwardParameters<float>::zeros({.dim = 6});
         const auto x = zeros(1, 3, 6);
         const Tensor<float, 3> y = layer.forward_saving(saved, x);
         Tensor<float, 3> grad_x(1, 4, 6);
         layer.backward_into(grad_x, workspace, gradients, saved, y, x);
       },
       {"grad_x", "[1, 3, 6]", "[1, 4, 6]"},
       "FeedForward::backward_into"},
      {"FeedForwardMisshapenGradients",
       feed_forward_backward(4, 5, 3),
       {"1.weight", "[8, 6]", "[6, 6]"},
       "FeedForward::backward"},
      {"FeedForwardDropoutOfOne",
       [] {
         local_mha::FeedForward<double>(local_mha::FeedForwardParameters<double>::zeros(6, 4), 1.0);
       },
       {"dropout", "[0, 1)", "got 1"},
       "FeedForward::FeedForward"},
      {"DynamicBiasOfOtherShapes",
       [] {
         auto p = local_mha::DynamicPositionBiasParameters<double>::zeros(4, 2);
         p.weight_2.resize(4, 5);
         local_mha::DynamicPositionBias<double>{p};
       },
       {"mlp.2.weight", "4 columns", "got 5"},
       "DynamicPositionBias::DynamicPositionBias"},
      {"DynamicBiasOfOtherHeads",
       [] {
         auto p = local_mha::DynamicPositionBiasParameters<double>::zeros(4, 2);
         p.weight_4.resize(2, 3);
         local_mha::DynamicPositionBias<double>{p};
       },
       {"mlp.4.weight", "4 columns", "got 3"},
       "DynamicPositionBias::DynamicPositionBias"},
      {"DynamicBiasOfNoWindow",
       [] {
         local_mha::DynamicPositionBias<double>(
             local_mha::DynamicPositionBiasParameters<double>::zeros(4, 2))
             .forward(0, 1, 1);
       },
       {"window_size", "at least 1", "got 0"},
       "DynamicPositionBias::forward"},
      {"CrossEntropyOfOtherShapes",
       [] { local_mha::cross_entropy<float>(zeros(2, 3, 4), Tensor<std::int64_t, 2>(2, 4)); },
       {"labels", "[2, 3]", "[2, 4]"},
       "cross_entropy"},
  };
}

/// `call(module, x, y, saved, gradients, workspace)` of a module of 3 channels, with x and y
/// `[2, 5, 3]`.
template <typename Module, typename Config, typename Call>
std::function<void()> module_call(const Config& config, Call call) {
  return [=] {
    Module module(config, 1);
    const Tensor<float, 3> x = zeros(2, 5, 3);
    Tensor<float, 3> y = zeros(2, 5, 3);
    typename Module::Saved saved;
    auto gradients = Module::Parameters::zeros(config);
    typename Module::Workspace workspace;
    module.forward_saving(saved, x);
    call(module, x, y, saved, gradients, workspace);
  };
}

/// What every module must refuse.
template <typename Module, typename Config>
void add_module_arguments(const std::string& name, const Config& config, const std::string& weight,
                          std::vector<BadInput>& all) {
  const auto add = [&](const std::string& what, const std::vector<std::string>& fragments,
                       const std::string& function, auto call) {
    all.push_back(
        {name + what, module_call<Module>(config, call), fragments, name + "::" + function});
  };
  const Tensor<float, 3> wide = zeros(2, 5, 4);
  add("OfOtherWidth", {"x", "[any, any, 3]", "[2, 5, 4]"}, "forward",
      [=](auto& m, auto&...) { m.forward(wide); });
  add("IntoOtherShape", {"y", "[2, 5, 3]", "[2, 5, 4]"}, "forward_into",
      [=](auto& m, auto& x, auto&, auto&, auto&, auto& workspace) {
        Tensor<float, 3> y = wide;
        m.forward_into(y, workspace, x);
      });
  add("IntoItsInput", {"y", "does not overlap x"}, "forward_into",
      [=](auto& m, auto&, auto& y, auto&, auto&, auto& workspace) {
        m.forward_into(y, workspace, y);
      });
  add("SavingOtherWidth", {"x", "[any, any, 3]"}, "forward_saving",
      [=](auto& m, auto&, auto&, auto& saved, auto&...) { m.forward_saving(saved, wide); });
  add("OfNothingSaved", {"saved", "expected"}, "backward",
      [=](auto& m, auto& x, auto& y, auto&, auto& gradients, auto&) {
        m.backward(gradients, typename Module::Saved(), y, x);
      });
  add("OfAnotherGradient", {"grad_y", "[2, 5, 3]", "[2, 5, 4]"}, "backward",
      [=](auto& m, auto& x, auto&, auto& saved, auto& gradients, auto&) {
        m.backward(gradients, saved, wide, x);
      });
  add("OfGradientsWithoutShapes", {weight, "shape"}, "backward",
      [=](auto& m, auto& x, auto& y, auto& saved, auto&...) {
        typename Module::Parameters none;
        m.backward(none, saved, y, x);
      });
  add("OfOtherWeights", {weight, "shape"}, "set_parameters",
      [=](auto& m, auto&...) { m.set_parameters({}); });
}

std::vector<BadInput> module_arguments() {
  using local_mha::FeedForward;
  using local_mha::LayerNorm;
  using local_mha::Linear;
  std::vector<BadInput> all{
      {"LinearOfNoFeatures",
       [] { Linear<float>({.in_features = 0, .out_features = 3}); },
       {"in_features", "at least 1", "got 0"},
       "Linear::Linear"},
      {"LinearToNoFeatures",
       [] { Linear<float>({.in_features = 3}); },
       {"out_features", "at least 1", "got 0"},
       "Linear::Linear"},
      {"LinearOfTooMany",
       [] { Linear<float>({.in_features = Index{1} << 30, .out_features = Index{1} << 30}); },
       {"out_features", "2^40"},
       "Linear::Linear"},
      {"LinearWeightsOfNoFeatures",
       [] { local_mha::LinearParameters<float>::zeros({}); },
       {"in_features", "at least 1"},
       "LinearParameters::zeros"},
      {"NormOfNoChannels",
       [] { LayerNorm<float>({.dim = 0}); },
       {"dim", "at least 1", "got 0"},
       "LayerNorm::LayerNorm"},
      {"NormOfEpsNaN",
       [] { LayerNorm<float>({.dim = 3, .eps = nan}); },
       {"eps", "1e-30", "nan"},
       "LayerNorm::LayerNorm"},
      {"NormOfMisshapenWeights",
       [] {
         LayerNorm<float>({.dim = 3}, local_mha::LayerNormParameters<float>::zeros({.dim = 4}));
       },
       {"weight", "[3, 1]", "[4, 1]"},
       "LayerNorm::LayerNorm"},
      {"NormWeightsOfNoChannels",
       [] { local_mha::LayerNormParameters<float>::zeros({}); },
       {"dim", "at least 1"},
       "LayerNormParameters::zeros"},
      {"FeedForwardOfNoChannels",
       [] { FeedForward<float>({.ff_mult = 2}); },
       {"dim", "at least 1"},
       "FeedForward::FeedForward"},
      {"FeedForwardOfNoWidth",
       [] { FeedForward<float>({.dim = 3, .ff_mult = 0}); },
       {"ff_mult", "positive"},
       "FeedForward::FeedForward"},
      {"FeedForwardOfDropoutOne",
       [] { FeedForward<float>({.dim = 3, .dropout = 1}); },
       {"dropout", "[0, 1)"},
       "FeedForward::FeedForward"},
  };
  add_module_arguments<Linear<float>>(
      "Linear", local_mha::LinearConfig{.in_features = 3, .out_features = 3}, "weight", all);
  add_module_arguments<LayerNorm<float>>("LayerNorm", local_mha::LayerNormConfig{.dim = 3},
                                         "weight", all);
  add_module_arguments<FeedForward<float>>("FeedForward", local_mha::FeedForwardConfig{.dim = 3},
                                           "0.weight", all);
  return all;
}

/// backward() of a layer norm of 3 channels, 5 rows.
std::function<void()> norm_backward(Index channels, Index of_weight, Index of_bias) {
  return [=] {
    const local_mha::LayerNorm<float> norm(Vector<float>::Ones(3), Vector<float>::Zero(3));
    const RowMatrix<float> x = RowMatrix<float>::Zero(5, 3);
    const RowMatrix<float> grad_y = RowMatrix<float>::Zero(5, channels);
    Vector<float> grad_weight = Vector<float>::Zero(of_weight);
    Vector<float> grad_bias = Vector<float>::Zero(of_bias);
    norm.backward(grad_y, x, grad_weight, grad_bias);
  };
}

/// linear_backward() of a weight `[7, 4]`.
std::function<void()> linear_backward_of(Index in, Index out, Index grad_rows, Index grad_columns,
                                         Index of_bias) {
  return [=] {
    using M = RowMatrix<float>;
    const M weight = M::Zero(7, 4), x = M::Zero(5, in), grad_y = M::Zero(5, out);
    M grad_weight = M::Zero(grad_rows, grad_columns);
    Vector<float> grad_bias = Vector<float>::Zero(of_bias);
    local_mha::linear_backward<Eigen::DefaultDevice, float>({}, weight, x, grad_y, grad_weight,
                                                            &grad_bias);
  };
}

/// What forward_into() of a feed-forward 6 → 4 → 6 takes.
struct FeedForwardCall {
  Index rows = 5;
  const float* x;
  Index x_stride = 6;
  float* y;
  local_mha::FeedForward<float>::Workspace workspace;
};

/// That call after `change` of a good one.
template <typename Change>
std::function<void()> feed_forward_into(Change change) {
  return [change] {
    const local_mha::FeedForward<float> layer(local_mha::FeedForwardParameters<float>::zeros(6, 4));
    std::vector<float> x(30), y(30);
    FeedForwardCall call{
        .x = x.data(), .y = y.data(), .workspace = local_mha::FeedForward<float>::Workspace(layer)};
    change(call);
    layer.forward_into(call.rows, call.x, call.x_stride, call.y, call.workspace);
  };
}

std::vector<BadInput> gradient_arguments() {
  using M = RowMatrix<float>;
  using BiasParameters = local_mha::DynamicPositionBiasParameters<float>;
  const auto dynamic_bias = [](const BiasParameters& like, const Tensor<float, 3>& grad) {
    return [=] {
      BiasParameters gradients = like;
      local_mha::DynamicPositionBias<float>(BiasParameters::zeros(4, 2))
          .backward(gradients, grad, 3, 1, 0);
    };
  };
  const auto embedding = [](std::vector<std::int64_t> rows, Index n, Index dim) {
    return [=] {
      M grad_table = M::Zero(4, 3);
      local_mha::embedding_backward<float>(grad_table, rows, M::Zero(n, dim));
    };
  };
  return {
      {"NormGradientOfOtherWidth",
       norm_backward(2, 3, 3),
       {"grad_y", "[5, 3]", "[5, 2]"},
       "LayerNorm::backward"},
      {"NormWithoutRoomForTheWeight",
       norm_backward(3, 0, 3),
       {"grad_weight", "[3]", "[0]"},
       "LayerNorm::backward"},
      {"NormWithoutRoomForTheBias",
       norm_backward(3, 3, 0),
       {"grad_bias", "[3]", "[0]"},
       "LayerNorm::backward"},
      {"LinearGradientsOfAnInputOfOtherWidth",
       linear_backward_of(5, 7, 7, 4, 7),
       {"x", "4 columns", "got 5"},
       "linear_backward"},
      {"LinearGradientsOfANarrowResult",
       linear_backward_of(4, 6, 7, 4, 7),
       {"grad_y", "[5, 7]", "[5, 6]"},
       "linear_backward"},
      {"LinearGradientsTransposed",
       linear_backward_of(4, 7, 4, 7, 7),
       {"grad_weight", "[7, 4]", "[4, 7]"},
       "linear_backward"},
      {"LinearGradientsWithoutRoom",
       linear_backward_of(4, 7, 0, 0, 7),
       {"grad_weight", "[7, 4]", "[0, 0]"},
       "linear_backward"},
      {"LinearGradientsWithoutRoomForTheBias",
       linear_backward_of(4, 7, 7, 4, 0),
       {"grad_bias", "[7]", "[0]"},
       "linear_backward"},
      {"DynamicBiasGradientsWithoutRoom",
       dynamic_bias({}, zeros(2, 3, 6)),
       {"mlp.0.weight", "[4, 1]", "[0, 0]"},
       "DynamicPositionBias::backward"},
      {"DynamicBiasGradientsOfOtherHeads",
       dynamic_bias(BiasParameters::zeros(4, 3), zeros(2, 3, 6)),
       {"mlp.4.weight", "[2, 4]", "[3, 4]"},
       "DynamicPositionBias::backward"},
      {"DynamicBiasGradientsOfAnotherBias",
       dynamic_bias(BiasParameters::zeros(4, 2), zeros(2, 3, 9)),
       {"grad_bias", "[2, 3, 6]", "[2, 3, 9]"},
       "DynamicPositionBias::backward"},
      {"EmbeddingRowsBeyondTheTable",
       embedding({0, 4}, 2, 3),
       {"rows", "0 to 3", "got 4", "at 1"},
       "embedding_backward"},
      {"EmbeddingGradientsOfFewerRows",
       embedding({0, 1}, 1, 3),
       {"grad_y", "[2, 3]", "[1, 3]"},
       "embedding_backward"},
      {"EmbeddingGradientsOfOtherWidth",
       embedding({0, 1}, 2, 4),
       {"grad_y", "[2, 3]", "[2, 4]"},
       "embedding_backward"},
  };
}

std::vector<BadInput> further_component_arguments() {
  using M = RowMatrix<float>;
  using FeedForwardParameters = local_mha::FeedForwardParameters<float>;
  using BiasParameters = local_mha::DynamicPositionBiasParameters<float>;
  using Packed = local_mha::PackedWeight<float>;
  using Call = FeedForwardCall;
  const auto label = [](std::int64_t value) { return tokens({value}); };
  const auto rotary_steps = [](Index dim_head, Index behind, Index ahead) {
    return [=] {
      const auto rotary = dim_head > 0 ? local_mha::RotaryEmbedding<float>(dim_head)
                                       : local_mha::RotaryEmbedding<float>();
      local_mha::RotarySteps<float>(rotary, 0, behind, ahead);
    };
  };
  const auto sample = [](const std::vector<float>& logits, Index n) {
    return [=] {
      local_mha::RandomSequence random(1);
      local_mha::Sampler sampler({});
      sampler(logits.empty() ? nullptr : logits.data(), n, random);
    };
  };
  const auto view = [](std::array<Index, 2> dimensions, bool null = false) {
    return [=] {
      const float nothing = 0;
      TensorView<const float, 2>(null ? nullptr : &nothing, dimensions);
    };
  };
  return {
      {"PackedGroupsThatDoNotDivideTheRows",
       [] { Packed(M::Zero(7, 4), 3); },
       {"group_rows", "7 rows", "got 3"},
       "PackedWeight::PackedWeight"},
      {"PackedAgainInGroupsThatDoNotDivideTheRows",
       [] { Packed(M::Zero(6, 4), 3).pack(M::Zero(7, 4), 3); },
       {"group_rows", "7 rows", "got 3"},
       "PackedWeight::pack"},
      {"PackedTransposedInGroupsThatDoNotDivideTheOthers",
       [] { Packed().pack_transposed(Packed(M::Zero(7, 12), 0, 6, 8), 4); },
       {"group_rows", "a divisor of 6", "got 4"},
       "PackedWeight::pack_transposed"},
      {"PackedGroupsThatDoNotDivideTheColumns",
       [] { Packed(M::Zero(7, 4), 0, 3, 4); },
       {"column_group", "4 columns", "got 3"},
       "PackedWeight::PackedWeight"},
      {"PackedGroupsThatShrink",
       [] { Packed(M::Zero(7, 4), 0, 2, 1); },
       {"padded_group", "at least 2", "got 1"},
       "PackedWeight::PackedWeight"},
      {"FeedForwardOfNegativeRows",
       feed_forward_into([](Call& call) { call.rows = -1; }),
       {"rows", "at least 0", "got -1"},
       "FeedForward::forward_into"},
      {"FeedForwardOfRowsThatOverlap",
       feed_forward_into([](Call& call) { call.x_stride = 5; }),
       {"x_stride", "at least 6", "got 5"},
       "FeedForward::forward_into"},
      {"FeedForwardWithoutRows",
       feed_forward_into([](Call& call) { call.x = nullptr; }),
       {"x", "null"},
       "FeedForward::forward_into"},
      {"FeedForwardWithoutRoom",
       feed_forward_into([](Call& call) { call.y = nullptr; }),
       {"y", "null"},
       "FeedForward::forward_into"},
      {"FeedForwardOfAFreshWorkspace",
       feed_forward_into([](Call& call) { call.workspace = {}; }),
       {"workspace", "these sizes"},
       "FeedForward::forward_into"},
      {"FeedForwardOfAnothersWorkspace",
       feed_forward_into([](Call& call) {
         const local_mha::FeedForward<float> other(FeedForwardParameters::zeros(6, 3));
         call.workspace = local_mha::FeedForward<float>::Workspace(other);
       }),
       {"workspace", "these sizes"},
       "FeedForward::forward_into"},
      {"FeedForwardSavingOfOtherWidth",
       [] {
         local_mha::FeedForward<float>::Saved saved;
         local_mha::FeedForward<float>(FeedForwardParameters::zeros(6, 4))
             .forward_saving(saved, M::Zero(5, 7));
       },
       {"x", "6 columns", "got 7"},
       "FeedForward::forward_saving"},
      {"CrossEntropyOfNoClasses",
       [label] { local_mha::cross_entropy<float>(zeros(1, 1, 0), label(-1)); },
       {"logits", "at least 1 class", "[1, 1, 0]"},
       "cross_entropy"},
      {"CrossEntropyOfALabelThatIsNoClass",
       [label] { local_mha::cross_entropy<float>(zeros(1, 1, 3), label(3)); },
       {"labels", "0 to 2", "got 3"},
       "cross_entropy"},
      {"CrossEntropyGradientOfNoClasses",
       [label] { local_mha::cross_entropy_gradient<float>(zeros(1, 1, 0), label(-1)); },
       {"logits", "at least 1 class", "[1, 1, 0]"},
       "cross_entropy_gradient"},
      {"CrossEntropyGradientOfOtherShapes",
       [label] { local_mha::cross_entropy_gradient<float>(zeros(1, 2, 3), label(0)); },
       {"labels", "[1, 2]", "[1, 1]"},
       "cross_entropy_gradient"},
      {"PrenormWithoutABias",
       [] { local_mha::Prenorm<float>({}, Vector<float>::Ones(3), {}); },
       {"bias", "3 values", "got 0"},
       "Prenorm::Prenorm"},
      {"RmsNormOfNoChannels",
       [] { local_mha::RmsNorm<float>({}, 1e-6); },
       {"weight", "at least 1 channel", "got 0"},
       "RmsNorm::RmsNorm"},
      {"RmsNormWithoutEps",
       [] { local_mha::RmsNorm<float>(Vector<float>::Ones(3), 0); },
       {"eps", "1e-30", "got 0"},
       "RmsNorm::RmsNorm"},
      {"RmsNormOfOtherWidth",
       [] { local_mha::RmsNorm<float>(Vector<float>::Ones(3), 1e-6).forward(M::Zero(2, 4)); },
       {"x", "3 columns", "got 4"},
       "RmsNorm::forward"},
      {"RotaryStepsOfNothing",
       rotary_steps(0, 1, 1),
       {"dim_head", "at least 1", "got 0"},
       "RotarySteps::RotarySteps"},
      {"RotaryStepsOfNegativeRowsBehind",
       rotary_steps(4, -1, 1),
       {"behind", "at least 0", "got -1"},
       "RotarySteps::RotarySteps"},
      {"RotaryStepsOfNegativeRowsAhead",
       rotary_steps(4, 1, -2),
       {"ahead", "at least 0", "got -2"},
       "RotarySteps::RotarySteps"},
      {"DropoutOfAll",
       [] { local_mha::Dropout<float>(1, 0, 0); },
       {"dropout", "[0, 1)", "got 1"},
       "Dropout::Dropout"},
      {"DropoutProbabilityOfNaN",
       [] { local_mha::Dropout<float>(nan, 0, 0); },
       {"dropout", "[0, 1)", "nan"},
       "Dropout::Dropout"},
      {"NegativeTemperature",
       [] { local_mha::Sampler({.temperature = -1}); },
       {"temperature", "at least 0", "got -1"},
       "Sampler::Sampler"},
      {"TemperatureOfNaN",
       [] { local_mha::Sampler({.temperature = nan}); },
       {"temperature", "nan"},
       "Sampler::Sampler"},
      {"NegativeTopK",
       [] { local_mha::validate(local_mha::SamplingConfig{.top_k = -1}); },
       {"top_k", "at least 0", "got -1"},
       "validate"},
      {"TopPOfNothing",
       [] { local_mha::validate(local_mha::SamplingConfig{.top_p = 0}); },
       {"top_p", "above 0", "got 0"},
       "validate"},
      {"TopPOfNaN",
       [] { local_mha::validate(local_mha::SamplingConfig{.top_p = nan}); },
       {"top_p", "nan"},
       "validate"},
      {"SamplingOfNoTokens",
       sample({1}, 0),
       {"num_tokens", "at least 1", "got 0"},
       "Sampler::operator()"},
      {"SamplingOfNoLogits", sample({}, 3), {"logits", "null"}, "Sampler::operator()"},
      {"ViewOfNegativeLength",
       view({3, -5}),
       {"dimensions", "at least 0", "[3, -5]"},
       "TensorView::TensorView"},
      {"ViewOfMoreThanMemory",
       view({Index{1} << 40, Index{1} << 40}),
       {"dimensions", "memory", "[1099511627776, 1099511627776]"},
       "TensorView::TensorView"},
      {"ViewOfNull", view({2, 3}, true), {"data", "[2, 3]", "null"}, "TensorView::TensorView"},
      {"OptionalViewOfAMapOfNull",
       [] {
         const Eigen::TensorMap<const Tensor<float, 2>> map(nullptr, 2, 3);
         local_mha::OptionalView<float, 2>{map};
       },
       {"data", "[2, 3]", "null"},
       "OptionalView::OptionalView"},
      {"ViewOfAMapOfNull",
       [] {
         const Eigen::TensorMap<const Tensor<float, 2>> map(nullptr, 2, 3);
         TensorView<const float, 2>{map};
       },
       {"data", "[2, 3]", "null"},
       "TensorView::TensorView"},
      {"AxisOfAView",
       [] {
         const auto t = zeros(1, 2, 3);
         const TensorView<const float, 3> of_t(t);
         static_cast<void>(of_t.dimension(3));
       },
       {"axis", "0 to 2", "got 3"},
       "TensorView::dimension"},
      {"MaskOfASequenceThatIsNone",
       [] { mask_of(2, 5).row(2); },
       {"b", "0 to 1", "got 2"},
       "PaddingMask::row"},
      {"VisibleToARowThatIsNone",
       [] { local_mha::Window(attention_config()).keys_visible(-1); },
       {"i", "at least 0", "got -1"},
       "Window::keys_visible"},
      {"VisibleToARowBehindTheLast",
       [] { local_mha::Window(attention_config()).keys_visible(5, 5); },
       {"i", "a row of 5", "got 5"},
       "Window::keys_visible"},
      {"BandOfNoWindow",
       [] { local_mha::token_windows::lookaround_exact(0, 1, 1); },
       {"window_size", "got 0"},
       "lookaround_exact"},
      {"BandOfAHugeWindow",
       [] { local_mha::token_windows::lookaround_exact((Index{1} << 40) + 1, 1, 1); },
       {"window_size", "1 to 2^40", "got 1099511627777"},
       "lookaround_exact"},
      {"BandThatLooksBackLess",
       [] { local_mha::token_windows::lookaround_exact(4, -1, 1); },
       {"look_backward", "0 to 2^20 windows", "got -1"},
       "lookaround_exact"},
      {"BandThatLooksBackTooFar",
       [] { local_mha::token_windows::lookaround_exact(4, (Index{1} << 20) + 1, 1); },
       {"look_backward", "0 to 2^20 windows", "got 1048577"},
       "lookaround_exact"},
      {"BandThatLooksAheadLess",
       [] { local_mha::token_windows::lookaround_exact(4, 1, -1); },
       {"look_forward", "0 to 2^20 windows", "got -1"},
       "lookaround_exact"},
      {"BandThatLooksAheadTooFar",
       [] { local_mha::token_windows::lookaround_exact(4, 1, (Index{1} << 20) + 1); },
       {"look_forward", "0 to 2^20 windows", "got 1048577"},
       "lookaround_exact"},
      {"SlidingWindowOfNothing",
       [] { local_mha::token_windows::hugging_face(0); },
       {"sliding_window", "at least 1", "got 0"},
       "hugging_face"},
      {"LocalAttentionOfLess",
       [] { local_mha::token_windows::modernbert(-1); },
       {"local_attention", "at least 0", "got -1"},
       "modernbert"},
      {"AttentionWindowOfLess",
       [] { local_mha::token_windows::longformer(-2); },
       {"attention_window", "at least 0", "got -2"},
       "longformer"},
      {"LocalRadiusOfLess",
       [] { local_mha::token_windows::long_t5(-1); },
       {"local_radius", "at least 0", "got -1"},
       "long_t5"},
      {"ChunksAfterACausalOne",
       [] { local_mha::token_windows::reformer(4, 1, 1, true); },
       {"chunks_after", "causal", "got 1"},
       "reformer"},
      {"FlashWindowBelowUnbounded",
       [] { local_mha::token_windows::flash(-2, 0); },
       {"left", "-1 for unbounded", "got -2"},
       "flash"},
      {"OnnxWindowBelowUnbounded",
       [] { local_mha::token_windows::onnx(0, -5); },
       {"right", "-1 for unbounded", "got -5"},
       "onnx"},
      {"LocalWindowSizeOfNothing",
       [] { local_mha::token_windows::onnx_runtime(0); },
       {"local_window_size", "at least 1", "got 0"},
       "onnx_runtime"},
      {"WindowOfNoPositions",
       [] { local_mha::Window(attention_config(), 0); },
       {"window_size", "at least 1", "got 0"},
       "Window::Window"},
      {"WindowOfANegativeLookAround",
       [] {
         LocalAttentionConfig config = attention_config();
         config.look_backward = -1;
         local_mha::Window{config};
       },
       {"look_backward", "at least 0", "got -1"},
       "Window::Window"},
      {"WindowFromANegativePosition",
       [] { local_mha::Window(attention_config(), 4, -1); },
       {"first_position", "at least 0", "got -1"},
       "Window::Window"},
      {"FeedForwardWidthOfNaN",
       [] { local_mha::feed_forward_inner_dim(8, nan); },
       {"ff_mult", "nan"},
       "feed_forward_inner_dim"},
      {"FeedForwardWidthOfAllAndMore",
       [] { local_mha::feed_forward_inner_dim(8, 1e300); },
       {"ff_mult", "1e+300"},
       "feed_forward_inner_dim"},
      {"ScaleOfNoChannels",
       [] { LocalAttention<float>({.window_size = 4}).softmax_scale(0); },
       {"dim_head", "got 0"},
       "LocalAttention::softmax_scale"},
      {"ScoreScaleOfNoChannels",
       [] { LocalAttention<float>({.window_size = 4}).score_scale(-3); },
       {"dim_head", "got -3"},
       "LocalAttention::score_scale"},
      {"WeightsOfNoDim",
       [] { LocalMHAParameters<float>::zeros({.dim = -1, .window_size = 4}); },
       {"dim", "at least 1", "got -1"},
       "LocalMHAParameters::zeros"},
      {"WeightsThatFitNoDim",
       [] { LocalMHAParameters<float>().fits({.dim = -1, .window_size = 4}); },
       {"dim", "at least 1", "got -1"},
       "LocalMHAParameters::fits"},
      {"WeightsThatFitNoTokens",
       [] { LocalTransformerParameters<float>().fits({}); },
       {"num_tokens", "at least 1", "got 0"},
       "LocalTransformerParameters::fits"},
      {"FeedForwardWeightsThatFitNegativeWidth",
       [] { FeedForwardParameters().fits(4, -1); },
       {"inner", "at least 0", "got -1"},
       "FeedForwardParameters::fits"},
      {"DynamicBiasWeightsThatFitNegativeWidth",
       [] { BiasParameters().fits(-1, 2); },
       {"hidden", "at least 0", "got -1"},
       "DynamicPositionBiasParameters::fits"},
      {"WeightsOfNoTokens",
       [] { LocalTransformerParameters<float>::zeros({}); },
       {"num_tokens", "at least 1", "got 0"},
       "LocalTransformerParameters::zeros"},
      {"FeedForwardWeightsOfNegativeWidth",
       [] { FeedForwardParameters::zeros(4, -1); },
       {"inner", "at least 0", "got -1"},
       "FeedForwardParameters::zeros"},
      {"DynamicBiasWeightsOfNegativeWidth",
       [] { BiasParameters::zeros(-1, 2); },
       {"hidden", "at least 0", "got -1"},
       "DynamicPositionBiasParameters::zeros"},
      {"InitialWeightsOfNoHeads",
       [] {
         LocalMHAConfig config = layer_config();
         config.heads = 0;
         local_mha::initial_parameters<LocalMHAParameters<float>>(config, 1);
       },
       {"heads", "at least 1", "got 0"},
       "initial_parameters"},
  };
}

std::vector<BadInput> training_arguments() {
  using P = LocalMHAParameters<float>;
  using Optimizer = local_mha::AdamW<P>;
  const P good = P::zeros(layer_config());
  P other = good;
  other.to_out.resize(1, 1);
  const auto optimizer = [good](const local_mha::AdamWConfig& config) {
    return [=] { Optimizer(config, good); };
  };
  const auto step = [good](const P& weights, const P& gradients, double rate) {
    return [=] {
      P changed = weights;
      Optimizer({}, good).step(changed, gradients, rate);
    };
  };
  const auto schedule = [](double peak, double least, Index warmup, Index total) {
    return [=] { local_mha::CosineSchedule(peak, least, warmup, total); };
  };
  const auto clip = [good](double max_norm) {
    return [=] {
      P gradients = good;
      local_mha::clip_gradients(gradients, max_norm);
    };
  };
  const std::string cosine = "CosineSchedule::CosineSchedule";
  return {
      {"BetaOfOne", optimizer({.beta1 = 1}), {"beta1", "[0, 1)", "got 1"}, "AdamW::AdamW"},
      {"BetaOfNaN", optimizer({.beta2 = nan}), {"beta2", "[0, 1)", "nan"}, "AdamW::AdamW"},
      {"NegativeEps", optimizer({.eps = -1}), {"eps", "at least 0", "got -1"}, "AdamW::AdamW"},
      {"InfiniteDecay",
       optimizer({.weight_decay = infinity}),
       {"weight_decay", "finite", "inf"},
       "AdamW::AdamW"},
      {"StepOfOtherWeights",
       step(other, good, 0.1),
       {"to_out.weight", "[12, 12]", "[1, 1]"},
       "AdamW::step"},
      {"StepOfOtherGradients",
       step(good, other, 0.1),
       {"to_out.weight", "[12, 12]", "[1, 1]"},
       "AdamW::step"},
      {"StepOfNoGradients", step(good, P(), 0.1), {"q_scale", "[6, 1]"}, "AdamW::step"},
      {"NegativeLearningRate",
       step(good, good, -0.1),
       {"learning_rate", "at least 0", "got -0.1"},
       "AdamW::step"},
      {"LearningRateOfNaN", step(good, good, nan), {"learning_rate", "nan"}, "AdamW::step"},
      {"StateOfOtherWeights",
       [good, other] { Optimizer({}, good).restore(1, good, other); },
       {"to_out.weight", "[12, 12]", "[1, 1]"},
       "AdamW::restore"},
      {"NormOfNothing", clip(0), {"max_norm", "positive", "got 0"}, "clip_gradients"},
      {"NormOfNaN", clip(nan), {"max_norm", "positive", "nan"}, "clip_gradients"},
      {"NegativePeak", schedule(-1, 0, 0, 10), {"peak", "at least 0", "got -1"}, cosine},
      {"PeakOfNaN", schedule(nan, 0, 0, 10), {"peak", "nan"}, cosine},
      {"LeastAboveThePeak", schedule(1, 2, 0, 10), {"least", "0 to peak", "got 2"}, cosine},
      {"NegativeWarmUp", schedule(1, 0, -1, 10), {"warmup_steps", "at least 0", "got -1"}, cosine},
      {"WarmUpBeyondTheEnd",
       schedule(1, 0, 11, 10),
       {"total_steps", "at least 11", "got 10"},
       cosine},
      {"NegativeStep",
       [] { local_mha::CosineSchedule(1, 0, 2, 10)(-1); },
       {"step", "at least 0", "got -1"},
       "CosineSchedule::operator()"},
  };
}

/// What a layer of layer_config() gets and gives for `[2, 10, 12]`.
struct LayerCall {
  LocalMHA<float> mha{layer_config()};
  LocalMHA<float>::Workspace workspace = {};
  LocalMHA<float>::Saved saved = {};
  Tensor<float, 3> x = zeros(2, 10, 12);
  Tensor<float, 3> y = x;
  Tensor<float, 3> grad_y = x;
  Tensor<float, 3> grad_x = x;
  LocalMHAParameters<float> gradients = LocalMHAParameters<float>::zeros(layer_config());
  Eigen::DefaultDevice device = {};
};

/// `call` of a LayerCall after forward_saving().
template <typename Call>
std::function<void()> after_forward(Call call) {
  return [call] {
    LayerCall of;
    of.mha.forward_saving(of.saved, of.x);
    call(of);
  };
}

std::vector<BadInput> results_and_gradients() {
  using C = LayerCall;
  const auto q = heads(1, 2, 6, 8);
  const auto attention_backward = [q](Index grad_length, Index saved_length, bool into) {
    return [=] {
      const LocalAttention<float> a(attention_config());
      const auto other = heads(1, 2, saved_length, 8), grad_out = heads(1, 2, grad_length, 8);
      const auto saved = a.forward_saving(other, other, other);
      LocalAttention<float>::Gradients gradients;
      LocalAttention<float>::Workspace workspace;
      if (into)
        a.backward_into(gradients, workspace, saved, grad_out, q, q, q);
      else
        a.backward(saved, grad_out, q, q, q);
    };
  };
  return {
      {"RoomOfOtherLength",
       [q] {
         auto out = heads(1, 2, 5, 8);
         LocalAttention<float>::Workspace workspace;
         LocalAttention<float>(attention_config()).forward_into(out, workspace, q, q, q);
       },
       {"out", "[1, 2, 6, 8]", "[1, 2, 5, 8]"},
       "LocalAttention::forward_into"},
      {"RoomThatIsTheQueries",
       [q] {
         auto out = q;
         LocalAttention<float>::Workspace workspace;
         LocalAttention<float>(attention_config()).forward_into(out, workspace, out, q, q);
       },
       {"out", "not overlap q"},
       "LocalAttention::forward_into"},
      {"RoomThatIsTheValues",
       [q] {
         auto v = q;
         LocalAttention<float>::Workspace workspace;
         LocalAttention<float>(attention_config()).forward_into(v, workspace, q, q, v);
       },
       {"out", "not overlap v"},
       "LocalAttention::forward_into"},
      {"RoomThatIsTheKeys",
       [q] {
         auto k = q;
         LocalAttention<float>::Workspace workspace;
         LocalAttention<float>(attention_config()).forward_into(k, workspace, q, k, q);
       },
       {"out", "not overlap k"},
       "LocalAttention::forward_into"},
      {"SavingOfOtherKeys",
       [q] { LocalAttention<float>(attention_config()).forward_saving(q, heads(1, 2, 7, 8), q); },
       {"k", "[1, 2, 6, 8]", "[1, 2, 7, 8]"},
       "LocalAttention::forward_saving"},
      {"AttentionGradientOfOtherLength",
       attention_backward(5, 6, false),
       {"grad_out", "[1, 2, 6, 8]", "[1, 2, 5, 8]"},
       "LocalAttention::backward"},
      {"AttentionSavedOfOtherLength",
       attention_backward(6, 7, false),
       {"saved", "6", "7"},
       "LocalAttention::backward"},
      {"AttentionGradientOfOtherLengthInto",
       attention_backward(5, 6, true),
       {"grad_out", "[1, 2, 6, 8]", "[1, 2, 5, 8]"},
       "LocalAttention::backward_into"},
      {"LayerRoomOfOtherLength",
       after_forward([](C& of) {
         of.y = zeros(2, 9, 12);
         of.mha.forward_into(of.y, of.workspace, of.x);
       }),
       {"y", "[2, 10, 12]", "[2, 9, 12]"},
       "LocalMHA::forward_into"},
      {"LayerRoomThatIsTheInput",
       after_forward([](C& of) { of.mha.forward_into(of.x, of.workspace, of.x); }),
       {"y", "not overlap x"},
       "LocalMHA::forward_into"},
      {"LayerSavingOfOtherDim",
       after_forward([](C& of) { of.mha.forward_saving(of.saved, zeros(2, 10, 11)); }),
       {"x", "[any, any, 12]", "[2, 10, 11]"},
       "LocalMHA::forward_saving"},
      {"LayerSavingRoomOfOtherBatch",
       after_forward([](C& of) {
         of.y = zeros(1, 10, 12);
         of.mha.forward_saving_into(of.device, of.y, of.workspace, of.saved, of.x);
       }),
       {"y", "[2, 10, 12]", "[1, 10, 12]"},
       "LocalMHA::forward_saving_into"},
      {"LayerGradientOfOtherLength",
       after_forward([](C& of) {
         of.grad_y = zeros(2, 9, 12);
         of.mha.backward_into(of.device, of.grad_x, of.workspace, of.gradients, of.saved, of.grad_y,
                              of.x);
       }),
       {"grad_y", "[2, 10, 12]", "[2, 9, 12]"},
       "LocalMHA::backward_into"},
      {"LayerGradientsWithoutRoom",
       after_forward([](C& of) {
         of.gradients = {};
         of.mha.backward_into(of.device, of.grad_x, of.workspace, of.gradients, of.saved, of.grad_y,
                              of.x);
       }),
       {"q_scale", "[6, 1]"},
       "LocalMHA::backward_into"},
      {"LayerGradientThatIsThatOfTheResult",
       after_forward([](C& of) {
         of.mha.backward_into(of.device, of.grad_y, of.workspace, of.gradients, of.saved, of.grad_y,
                              of.x);
       }),
       {"grad_x", "not overlap grad_y"},
       "LocalMHA::backward_into"},
      {"ModelGradientsWithoutRoom",
       [] {
         LocalTransformerParameters<float> gradients;
         LocalTransformer<float>(transformer_config()).backward(gradients, tokens({1, 2, 3}));
       },
       {"token_emb.weight", "[10, 12]", "[0, 0]"},
       "LocalTransformer::backward"},
      {"ModelLabelsOfOtherLength",
       [] {
         auto gradients = LocalTransformerParameters<float>::zeros(transformer_config());
         LocalTransformer<float>(transformer_config())
             .backward(gradients, tokens({1, 2, 3}), tokens({1, 2}));
       },
       {"labels", "[1, 3]", "[1, 2]"},
       "LocalTransformer::backward"},
      {"ModelLossOfOtherLabels",
       [] {
         LocalTransformer<float>(transformer_config()).loss(tokens({1, 2, 3}), tokens({1, 2, 10}));
       },
       {"labels", "0 to 9", "got 10 in sequence 0 at 2"},
       "LocalTransformer::loss"},
      {"NewMisshapenModelWeights",
       [] {
         LocalTransformer<float> model(transformer_config());
         auto parameters = model.parameters();
         parameters.pos_emb.resize(7, 12);
         model.set_parameters(parameters);
       },
       {"pos_emb.weight", "[8, 12]", "[7, 12]"},
       "LocalTransformer::set_parameters"},
  };
}

/// generate() after `change` of what it takes.
template <typename Change>
std::function<void()> generate(Change change) {
  return [change] {
    LocalTransformerConfig config = transformer_config();
    local_mha::GenerateConfig how{.length = 3};
    Tensor<std::int64_t, 2> prompt = tokens({1, 2});
    change(config, how, prompt);
    LocalTransformer<float>(config).generate(prompt, how);
  };
}

std::vector<BadInput> streams() {
  using Config = local_mha::StreamConfig;
  using LayerStream = LocalMHA<float>::Stream;
  using AttentionStream = LocalAttention<float>::Stream;
  using ModelStream = LocalTransformer<float>::Stream;
  // A stream of 2 sequences, after a push of 3 positions.
  const auto of_layer = [](auto use, const Config& stream_config = {.batch = 2}) {
    return [=] {
      LocalMHAConfig config = layer_config();
      config.causal = true;
      const LocalMHA<float> mha(config);
      LayerStream stream(mha, stream_config);
      stream.push(zeros(2, 3, 12));
      use(stream);
    };
  };
  const auto of_attention = [](auto use, Index number_of_heads = 3) {
    return [=] {
      LocalAttentionConfig config = attention_config();
      config.causal = true;
      const LocalAttention<float> attention_of_heads(config);
      AttentionStream stream(attention_of_heads, number_of_heads, 8);
      use(stream);
    };
  };
  const auto of_model = [](auto use, const Config& stream_config = {}) {
    return [=] {
      const LocalTransformer<float> model(transformer_config());
      ModelStream stream(model, stream_config);
      use(stream);
    };
  };
  const auto nothing = [](auto&) {};
  constexpr Index huge = std::numeric_limits<Index>::max();
  return {
      {"StreamOfNoSequences",
       of_layer(nothing, {.batch = 0}),
       {"batch", "at least 1", "got 0"},
       "LocalMHA::Stream::Stream"},
      {"StreamOfTooManySequences",
       of_layer(nothing, {.batch = huge}),
       {"batch", "2^32", "9223372036854775807"},
       "LocalMHA::Stream::Stream"},
      {"StreamOfNegativeRollback",
       of_layer(nothing, {.max_rollback = -1}),
       {"max_rollback", "at least 0", "got -1"},
       "LocalMHA::Stream::Stream"},
      {"StreamOfALongRollback",
       of_layer(nothing, {.max_rollback = Index{1} << 36}),
       {"max_rollback", "positions whose keys and values are at most 2^36 numbers", "68719476736"},
       "LocalMHA::Stream::Stream"},
      {"StreamOfNoThreads",
       of_layer(nothing, {.max_threads = 0}),
       {"max_threads", "at least 1", "got 0"},
       "LocalMHA::Stream::Stream"},
      {"PushOfOtherBatch",
       of_layer([](LayerStream& stream) { stream.push(zeros(1, 3, 12)); }),
       {"x", "[2, any, 12]", "[1, 3, 12]"},
       "LocalMHA::Stream::push"},
      {"PushMaskOfOtherLength",
       of_layer([](LayerStream& stream) { stream.push(zeros(2, 3, 12), {.mask = mask_of(2, 4)}); }),
       {"mask", "[2, 3]", "[2, 4]"},
       "LocalMHA::Stream::push"},
      {"PushAfterTheEnd",
       of_layer([](LayerStream& stream) {
         stream.flush();
         stream.push(zeros(2, 1, 12));
       }),
       {"sequence 0", "flush() ended"},
       "LocalMHA::Stream::push"},
      {"PushIntoOtherRoom",
       of_layer([](LayerStream& stream) {
         auto y = zeros(2, 2, 12);
         stream.push_into(y, zeros(2, 3, 12));
       }),
       {"y", "[2, 3, 12]", "[2, 2, 12]"},
       "LocalMHA::Stream::push_into"},
      {"PushIntoTheInput",
       of_layer([](LayerStream& stream) {
         auto y = zeros(2, 3, 12);
         stream.push_into(y, y);
       }),
       {"y", "not overlap x"},
       "LocalMHA::Stream::push_into"},
      {"FlushIntoOtherRoom",
       of_layer([](LayerStream& stream) {
         auto y = zeros(2, 1, 12);
         stream.flush_into(y);
       }),
       {"y", "[2, 0, 12]", "[2, 1, 12]"},
       "LocalMHA::Stream::flush_into"},
      {"PositionOfASequenceThatIsNone",
       of_layer([](LayerStream& stream) { stream.position(2); }),
       {"sequence", "0 to 1", "got 2"},
       "SequenceStream::position"},
      {"AnswersOfASequenceThatIsNone",
       of_layer([](LayerStream& stream) { stream.answered(-1); }),
       {"sequence", "0 to 1", "got -1"},
       "SequenceStream::answered"},
      {"RollbackRoomOfASequenceThatIsNone",
       of_layer([](LayerStream& stream) { stream.most_rollback(2); }),
       {"sequence", "0 to 1", "got 2"},
       "SequenceStream::most_rollback"},
      {"ResetOfASequenceThatIsNone",
       of_layer([](LayerStream& stream) { stream.reset(2); }),
       {"sequence", "0 to 1", "got 2"},
       "SequenceStream::reset"},
      {"RollbackOfASequenceThatIsNone",
       of_layer([](LayerStream& stream) { stream.rollback(2, 1); }),
       {"sequence", "0 to 1", "got 2"},
       "SequenceStream::rollback"},
      {"RollbackBeforeTheBegin",
       of_layer([](LayerStream& stream) { stream.rollback(4); }),
       {"n", "at most 3", "got 4"},
       "SequenceStream::rollback"},
      {"RollbackOfNegativePositions",
       of_layer([](LayerStream& stream) { stream.rollback(-1); }),
       {"n", "at least 0", "got -1"},
       "SequenceStream::rollback"},
      {"ResultsOfNegativePositions",
       of_layer([](LayerStream& stream) { stream.results_of(-1); }),
       {"n", "0 to 2^60", "got -1"},
       "SequenceStream::results_of"},
      {"ResultsOfTooManyPositions",
       of_layer([](LayerStream& stream) { stream.results_of(huge); }),
       {"n", "0 to 2^60", "9223372036854775807"},
       "SequenceStream::results_of"},
      {"StateThatIsNone",
       of_layer([](LayerStream& stream) {
         std::istringstream in("no state");
         stream.load(in);
       }),
       {"state"},
       "SequenceStream::load"},
      {"AttentionStreamOfNoHeads",
       of_attention(nothing, 0),
       {"heads", "at least 1", "got 0"},
       "LocalAttention::StreamOf::StreamOf"},
      {"AttentionPushOfOtherHeads",
       of_attention([](AttentionStream& stream) {
         const auto q = heads(1, 2, 5, 8);
         stream.push(q, q, q);
       }),
       {"q", "[1, 3, any, 8]", "[1, 2, 5, 8]"},
       "LocalAttention::StreamOf::push"},
      {"AttentionPushIntoOtherRoom",
       of_attention([](AttentionStream& stream) {
         const auto q = heads(1, 3, 5, 8);
         auto out = heads(1, 3, 4, 8);
         stream.push_into(out, q, q, q);
       }),
       {"out", "[1, 3, 5, 8]", "[1, 3, 4, 8]"},
       "LocalAttention::StreamOf::push_into"},
      {"AttentionPushIntoTheQueries",
       of_attention([](AttentionStream& stream) {
         const auto k = heads(1, 3, 5, 8);
         auto q = k;
         stream.push_into(q, q, k, k);
       }),
       {"out", "not overlap q"},
       "LocalAttention::StreamOf::push_into"},
      {"AttentionPushIntoTheKeys",
       of_attention([](AttentionStream& stream) {
         const auto q = heads(1, 3, 5, 8);
         auto k = q;
         stream.push_into(k, q, k, q);
       }),
       {"out", "not overlap k"},
       "LocalAttention::StreamOf::push_into"},
      {"AttentionPushIntoTheValues",
       of_attention([](AttentionStream& stream) {
         const auto q = heads(1, 3, 5, 8);
         auto v = q;
         stream.push_into(v, q, q, v);
       }),
       {"out", "not overlap v"},
       "LocalAttention::StreamOf::push_into"},
      {"AttentionFlushIntoOtherRoom",
       of_attention([](AttentionStream& stream) {
         auto out = heads(1, 3, 1, 8);
         stream.flush_into(out);
       }),
       {"out", "[1, 3, 0, 8]", "[1, 3, 1, 8]"},
       "LocalAttention::StreamOf::flush_into"},
      {"ModelStreamOfNegativeBatch",
       of_model(nothing, {.batch = -1}),
       {"batch", "at least 1", "got -1"},
       "LocalTransformer::Stream::Stream"},
      {"AttentionStreamOfAnEndlessWindow",
       [] {
         const auto endless = of_tokens(local_mha::TokenWindow::unbounded, 0);
         AttentionStream(endless, 2, 8);
       },
       {"token_window", "bounded", "unbounded"},
       "LocalAttention::StreamOf::StreamOf"},
      {"AttentionStreamOfKeyHeadsThatDoNotDivide",
       [] { AttentionStream(of_tokens(3, 0), 3, 8, {}, {}, 2); },
       {"k", "divides", "got 2"},
       "LocalAttention::StreamOf::StreamOf"},
      {"AttentionStreamOfAMask",
       [] { AttentionStream(of_tokens(3, 0), 3, 8, {}, {.mask = mask_of(1, 5)}); },
       {"mask", "none, because push() takes one", "got one"},
       "LocalAttention::StreamOf::StreamOf"},
      {"AttentionStreamOnThreads",
       [] {
         struct Device {
           int numThreads() const { return 3; }
         };
         AttentionStream(of_tokens(3, 0), 3, 8, {}, {.device = Device()});
       },
       {"device", "none, because push() takes one", "3 threads"},
       "LocalAttention::StreamOf::StreamOf"},
      {"AttentionStreamOfSegments",
       [] {
         const std::vector<Index> cu_seqlens{0};
         AttentionStream(of_tokens(3, 0), 3, 8, {}, {.cu_seqlens = cu_seqlens});
       },
       {"cu_seqlens", "none"},
       "LocalAttention::StreamOf::StreamOf"},
      {"AttentionStreamOfGlobalRows",
       [] {
         Tensor<bool, 2> global(1, 5);
         global.setConstant(false);
         AttentionStream(of_tokens(3, 0), 3, 8, {}, {.global_rows = global});
       },
       {"global_rows", "none, because queries see them before they come", "got some"},
       "LocalAttention::StreamOf::StreamOf"},
      {"ModelPushOfATokenThatIsNone",
       of_model([](ModelStream& stream) { stream.push(tokens({1, 10})); }),
       {"tokens", "0 to 9", "got 10"},
       "LocalTransformer::Stream::push"},
      {"ModelPushIntoOtherRoom",
       of_model([](ModelStream& stream) {
         auto logits = zeros(1, 1, 10);
         stream.push_into(logits, tokens({1, 2}));
       }),
       {"logits", "[1, 2, 10]", "[1, 1, 10]"},
       "LocalTransformer::Stream::push_into"},
      {"ModelFlushIntoOtherRoom",
       of_model([](ModelStream& stream) {
         auto logits = zeros(1, 1, 10);
         stream.flush_into(logits);
       }),
       {"logits", "[1, 0, 10]", "[1, 1, 10]"},
       "LocalTransformer::Stream::flush_into"},
      {"TextOfNegativeLength",
       generate([](auto&, auto& how, auto&) { how.length = -1; }),
       {"length", "at least 0", "got -1"},
       "LocalTransformer::generate"},
      {"TextOfNoPrompt",
       generate([](auto&, auto&, auto& prompt) { prompt = tokens({}); }),
       {"prompt", "at least 1 token", "[1, 0]"},
       "LocalTransformer::generate"},
      {"TextThatStopsAtNoToken",
       generate([](auto&, auto& how, auto&) { how.stop_token = 10; }),
       {"stop_token", "0 to 9", "got 10"},
       "LocalTransformer::generate"},
      {"TextOfABadTemperature",
       generate([](auto&, auto& how, auto&) { how.sampling.temperature = nan; }),
       {"temperature", "nan"},
       "LocalTransformer::generate"},
      {"TextOfAModelThatSeesAhead",
       generate([](auto& config, auto&, auto&) { config.causal = false; }),
       {"causal", "true"},
       "LocalTransformer::generate"},
      {"TextOfAModelOneOfWhoseLayersSeesAhead",
       generate([](auto& config, auto&, auto&) {
         config.layers = {2, layer_config(config)};
         config.layers[1].window_size = 0;
         config.layers[1].causal = false;
         config.layers[1].token_window = {3, 1};
         config.local_attn_window_size = LocalTransformerConfig().local_attn_window_size;
       }),
       {"layers", "causal ones", "got others"},
       "LocalTransformer::generate"},
  };
}

EncoderConfig encoder_config_of_two() { return {.depth = 2, .layers = {layer_config()}}; }

/// The construction of an encoder after `change` of a good configuration.
template <typename Change>
std::function<void()> encoder(Change change) {
  return [change] {
    EncoderConfig config = encoder_config_of_two();
    change(config);
    Encoder<float>{config};
  };
}

/// `use(connection)` of a good connection of 3 streams of 4 channels.
template <typename Use>
std::function<void()> connection(Use use) {
  return [use] { use(HyperConnection<double>(HyperConnectionParameters<double>::zeros(3, 4))); };
}

std::vector<BadInput> encoders() {
  using C = EncoderConfig;
  using Rows = RowMatrix<double>;
  const auto x = [](Index b, Index n, Index dim) {
    Tensor<float, 3> t(b, n, dim);
    t.setZero();
    return t;
  };
  const auto good = [] { return Encoder<float>(encoder_config_of_two()); };
  return {
      {"EncoderOfNegativeDepth",
       encoder([](C& c) { c.depth = -1; }),
       {"depth", "at least 0", "got -1"},
       "Encoder::Encoder"},
      {"EncoderOfNoLayers",
       encoder([](C& c) { c.layers.clear(); }),
       {"layers", "1, or as many as the depth, 2", "got 0"},
       "Encoder::Encoder"},
      {"EncoderOfThreeLayersForTwo",
       encoder([](C& c) { c.layers.resize(3, c.layers[0]); }),
       {"layers", "1, or as many as the depth, 2", "got 3"},
       "Encoder::Encoder"},
      {"EncoderOfABadLayer",
       encoder([](C& c) { c.layers.resize(2, c.layers[0]), c.layers[1].heads = 0; }),
       {"layers[1].heads", "at least 1", "got 0"},
       "Encoder::Encoder"},
      {"EncoderOfLayersOfDifferentWidth",
       encoder([](C& c) { c.layers.resize(2, c.layers[0]), c.layers[1].dim = 10; }),
       {"layers[1].dim", "12", "got 10"},
       "Encoder::Encoder"},
      {"EncoderOfNoHiddenChannels",
       encoder([](C& c) { c.ff_mult = 0; }),
       {"ff_mult", "positive", "got 0"},
       "Encoder::Encoder"},
      {"EncoderDropout",
       encoder([](C& c) { c.ff_dropout = 1; }),
       {"ff_dropout", "[0, 1)", "got 1"},
       "Encoder::Encoder"},
      {"EncoderOfNoStreams",
       encoder([](C& c) { c.num_residual_streams = 0; }),
       {"num_residual_streams", "1 to 1024", "got 0"},
       "Encoder::Encoder"},
      {"EncoderBiasBesideRotary",
       encoder([](C& c) { c.use_dynamic_pos_bias = true; }),
       {"layers[0].use_rotary_pos_emb", "false", "got 1"},
       "Encoder::Encoder"},
      {"EncoderBiasOfTwoWindows",
       encoder([](C& c) {
         c.use_dynamic_pos_bias = true;
         c.layers[0].use_rotary_pos_emb = false;
         c.layers.resize(2, c.layers[0]);
         c.layers[1].window_size = 5;
       }),
       {"layers[1].window_size", "4", "got 5"},
       "Encoder::Encoder"},
      {"EncoderBiasWithATokenWindow",
       encoder([](C& c) {
         c.use_dynamic_pos_bias = true;
         c.layers[0].use_rotary_pos_emb = false;
         c.layers[0].window_size = 0;
         c.layers[0].token_window = {1, 1};
       }),
       {"layers[0].token_window", "none", "got one"},
       "Encoder::Encoder"},
      {"EncoderTooDeep",
       encoder([](C& c) { c.depth = Index{1} << 50; }),
       {"depth", "2^40", "1125899906842624"},
       "Encoder::Encoder"},
      {"EncoderWeightsOfAnotherWidth",
       [] {
         auto p = EncoderParameters<float>::zeros(encoder_config_of_two());
         p.layers[1].feed_forward.proj_out.resize(1, 1);
         Encoder<float>(encoder_config_of_two(), p);
       },
       {"layers.1.1.branch.4.weight", "[12, 32]", "got [1, 1]"},
       "Encoder::Encoder"},
      {"EncoderOtherWeightsOfNoConnections",
       [] {
         EncoderConfig config = encoder_config_of_two();
         config.num_residual_streams = 2;
         Encoder<float> several(config);
         several.set_parameters(EncoderParameters<float>::zeros(encoder_config_of_two()));
       },
       {"layers.0.0.static_alpha", "[2, 3]"},
       "Encoder::set_parameters"},
      {"WeightsOfNoEncoder",
       [] { EncoderParameters<float>::zeros({}); },
       {"layers", "got 0"},
       "EncoderParameters::zeros"},
      {"WeightsThatFitNoEncoder",
       [] { EncoderParameters<float>().fits({}); },
       {"layers", "got 0"},
       "EncoderParameters::fits"},
      {"ConnectionWeightsThatFitNoStreams",
       [] { HyperConnectionParameters<double>().fits(0, 4); },
       {"streams", "got 0"},
       "HyperConnectionParameters::fits"},
      {"EncoderInput",
       [=] { good().forward(x(1, 3, 11)); },
       {"x", "[any, any, 12]", "[1, 3, 11]"},
       "Encoder::forward"},
      {"EncoderMask",
       [=] {
         good().forward(x(1, 3, 12), {.mask = PaddingMask::from_lengths(std::vector<Index>{1}, 2)});
       },
       {"mask", "[1, 3]", "[1, 2]"},
       "Encoder::forward"},
      {"EncoderPackedSequences",
       [=] { good().forward(x(1, 3, 12), {.cu_seqlens = std::vector<Index>{0, 2}}); },
       {"cu_seqlens"},
       "Encoder::forward"},
      {"EncoderLengthsOfAnotherBatch",
       [=] { good().forward(x(2, 3, 12), {.lengths = std::vector<Index>{3}}); },
       {"lengths", "2 (batch) numbers", "got 1"},
       "Encoder::forward"},
      {"EncoderLengthBeyondTheSequence",
       [=] { good().forward(x(1, 3, 12), {.lengths = std::vector<Index>{4}}); },
       {"lengths[0]", "0 to 3", "got 4"},
       "Encoder::forward"},
      {"EncoderLengthsOfPackedSequences",
       [=] {
         const std::vector<Index> ends{0, 3}, lengths{3};
         good().forward(x(1, 3, 12), {.cu_seqlens = ends, .lengths = lengths});
       },
       {"lengths", "none beside cu_seqlens"},
       "Encoder::forward"},
      {"EncoderResultOfAnotherShape",
       [=] {
         Encoder<float>::Workspace workspace;
         auto y = x(1, 2, 12);
         good().forward_into(y, workspace, x(1, 3, 12));
       },
       {"y", "[1, 3, 12]", "[1, 2, 12]"},
       "Encoder::forward_into"},
      {"EncoderResultOverItsInput",
       [=] {
         Encoder<float>::Workspace workspace;
         auto y = x(1, 2, 12);
         good().forward_into(y, workspace, y);
       },
       {"y", "memory that does not overlap x"},
       "Encoder::forward_into"},
      {"EncoderSavingInput",
       [=] {
         Encoder<float>::Saved saved;
         good().forward_saving(saved, x(1, 3, 11));
       },
       {"x", "[any, any, 12]", "[1, 3, 11]"},
       "Encoder::forward_saving"},
      {"InputOfNoLayer",
       [=] {
         Encoder<float>::Saved saved;
         good().forward_saving(saved, x(1, 3, 12));
         static_cast<void>(saved.input_of_attention(2));
       },
       {"layer", "0 to 1", "got 2"},
       "Encoder::Saved::input_of_attention"},
      {"EncoderBackwardOfNoForward",
       [=] {
         auto gradients = EncoderParameters<float>::zeros(encoder_config_of_two());
         good().backward(gradients, {}, x(1, 3, 12));
       },
       {"saved", "got another, or none"},
       "Encoder::backward"},
      {"EncoderBackwardOfAnotherShape",
       [=] {
         auto gradients = EncoderParameters<float>::zeros(encoder_config_of_two());
         Encoder<float>::Saved saved;
         const auto module = good();
         module.forward_saving(saved, x(1, 3, 12));
         module.backward(gradients, saved, x(1, 4, 12));
       },
       {"grad_y", "[1, 3, 12]", "[1, 4, 12]"},
       "Encoder::backward"},
      {"EncoderBackwardIntoOtherGradients",
       [=] {
         EncoderParameters<float> gradients;
         Encoder<float>::Saved saved;
         const auto module = good();
         module.forward_saving(saved, x(1, 3, 12));
         module.backward(gradients, saved, x(1, 3, 12));
       },
       {"layers.0.0.branch.q_scale", "[6, 1]", "got nothing"},
       "Encoder::backward"},
      {"EncoderSavingIntoOtherRoom",
       [=] {
         Encoder<float>::Workspace workspace;
         Encoder<float>::Saved saved;
         Tensor<float, 3> y(1, 4, 12);
         good().forward_saving_into(y, workspace, saved, x(1, 3, 12));
       },
       {"y", "[1, 3, 12]", "[1, 4, 12]"},
       "Encoder::forward_saving_into"},
      {"EncoderBackwardIntoOtherRoom",
       [=] {
         auto gradients = EncoderParameters<float>::zeros(encoder_config_of_two());
         Encoder<float>::Workspace workspace;
         Encoder<float>::Saved saved;
         Tensor<float, 3> grad_x(1, 4, 12);
         const auto module = good();
         module.forward_saving(saved, x(1, 3, 12));
         module.backward_into(grad_x, workspace, gradients, saved, x(1, 3, 12));
       },
       {"grad_x", "[1, 3, 12]", "[1, 4, 12]"},
       "Encoder::backward_into"},
      {"EncoderBackwardOverItsGradient",
       [=] {
         auto gradients = EncoderParameters<float>::zeros(encoder_config_of_two());
         Encoder<float>::Workspace workspace;
         Encoder<float>::Saved saved;
         const auto module = good();
         Tensor<float, 3> grad = module.forward_saving(saved, x(1, 3, 12));
         module.backward_into(grad, workspace, gradients, saved, grad);
       },
       {"grad_x", "not overlap grad_y"},
       "Encoder::backward_into"},
      {"EncoderStreamOfNoSequences",
       [=] { Encoder<float>::Stream(good(), {.batch = 0}); },
       {"batch", "at least 1", "got 0"},
       "Encoder::Stream::Stream"},
      {"EncoderPush",
       [=] { Encoder<float>::Stream(good()).push(x(1, 3, 11)); },
       {"x", "[1, any, 12]", "[1, 3, 11]"},
       "Encoder::Stream::push"},
      {"EncoderPushIntoOtherRoom",
       [=] {
         auto y = x(1, 4, 12);
         Encoder<float>::Stream(good()).push_into(y, x(1, 3, 12));
       },
       {"y", "[1, 0, 12]", "[1, 4, 12]"},
       "Encoder::Stream::push_into"},
      {"EncoderFlushIntoOtherRoom",
       [=] {
         auto y = x(1, 4, 12);
         Encoder<float>::Stream(good()).flush_into(y);
       },
       {"y", "[1, 0, 12]", "[1, 4, 12]"},
       "Encoder::Stream::flush_into"},
      {"ConnectionWeightsOfTooManyStreams",
       [] { HyperConnectionParameters<double>::zeros(1025, 4); },
       {"streams", "1 to 1024", "got 1025"},
       "HyperConnectionParameters::zeros"},
      {"ConnectionOfOtherWeights",
       [] {
         auto p = HyperConnectionParameters<double>::zeros(3, 4);
         p.alpha_fn.resize(4, 3);
         HyperConnection<double>{p};
       },
       {"dynamic_alpha_fn", "[4, 4]", "[4, 3]"},
       "HyperConnection::HyperConnection"},
      {"ConnectionStreams",
       connection([](const auto& c) { c.mix(Rows(2, 11)); }),
       {"streams", "[2, 12]", "[2, 11]"},
       "HyperConnection::mix"},
      {"ConnectionWithMixedStreamsOfOtherWidth",
       connection([](const auto& c) {
         auto mixed = c.mix(Rows::Zero(2, 12));
         mixed.streams = Rows::Zero(2, 11);
         c.add(mixed, Rows::Zero(2, 4));
       }),
       {"mixed.streams", "[2, 12]", "[2, 11]"},
       "HyperConnection::add"},
      {"ConnectionWithMixedFactorsOfOtherWidth",
       connection([](const auto& c) {
         auto mixed = c.mix(Rows::Zero(2, 12));
         mixed.beta = Rows::Zero(2, 2);
         c.add(mixed, Rows::Zero(2, 4));
       }),
       {"mixed.beta", "[2, 3]", "[2, 2]"},
       "HyperConnection::add"},
      {"ConnectionResult",
       connection([](const auto& c) { c.add(c.mix(Rows::Zero(2, 12)), Rows(2, 3)); }),
       {"y", "[2, 4]", "[2, 3]"},
       "HyperConnection::add"},
      {"ConnectionGradient",
       connection([](const auto& c) { c.add_backward(Rows(2, 11), Rows(2, 12)); }),
       {"grad", "[2, 12]", "[2, 11]"},
       "HyperConnection::add_backward"},
      {"ConnectionGradientOfTheBranch",
       connection([](const auto& c) {
         auto gradients = c.parameters();
         c.mix_backward(gradients, Rows(2, 12), Rows(2, 12), Rows(2, 4), Rows(1, 4));
       }),
       {"grad_branch_input", "[2, 4]", "[1, 4]"},
       "HyperConnection::mix_backward"},
      {"ConnectionGradientsOfOtherWeights",
       connection([](const auto& c) {
         auto gradients = HyperConnectionParameters<double>::zeros(2, 4);
         c.mix_backward(gradients, Rows(2, 12), Rows(2, 12), Rows(2, 4), Rows(2, 4));
       }),
       {"static_alpha", "[3, 4]", "[2, 3]"},
       "HyperConnection::mix_backward"},
      {"ModelOfNoStreams",
       transformer([](LocalTransformerConfig& c) { c.num_residual_streams = 0; }),
       {"num_residual_streams", "1 to 1024", "got 0"},
       "LocalTransformer::LocalTransformer"},
  };
}

/// Public functions that cannot be given bad input, and why.
const std::map<std::string, std::set<std::string>>& without_bad_input() {
  static const std::map<std::string, std::set<std::string>> reasons{
      {"functions of scores that come from kernels",
       {"ALiBi::derivative", "ALiBi::operator()", "ScoreWithDerivative::derivative",
        "ScoreWithDerivative::operator()", "SoftCap::derivative", "SoftCap::operator()",
        "with_derivative"}},
      {"any number will do",
       {"Philox::Philox", "Philox::apply", "Philox::operator()", "RandomSequence::RandomSequence",
        "Range::clipped_to", "Range::contains", "Training::of_part", "gelu", "normal", "sigmoid",
        "silu", "silu_derivative", "tanh"}},
      {"any object will do, for its making is checked",
       {"DynamicPositionBiasParameters::visit_each",
        "Encoder::Stream::flush",
        "EncoderParameters::has_shapes_of",
        "EncoderParameters::visit_each",
        "HyperConnectionParameters::has_shapes_of",
        "HyperConnectionParameters::visit_around",
        "HyperConnectionParameters::visit_each",
        "FeedForward::Workspace::Workspace",
        "FeedForwardParameters::visit_each",
        "FeedForwardParameters::has_shapes_of",
        "LayerNormParameters::has_shapes_of",
        "LayerNormParameters::visit_each",
        "LinearParameters::has_shapes_of",
        "LinearParameters::visit_each",
        "DynamicPositionBiasParameters::has_shapes_of",
        "LocalMHAParameters::has_shapes_of",
        "LongformerParameters::has_shapes_of",
        "LongformerParameters::visit_each",
        "LocalTransformerParameters::has_shapes_of",
        "PaddingMask::assign",
        "LocalAttention::StreamOf::flush",
        "LocalMHA::Stream::flush",
        "LocalMHAParameters::visit_each",
        "LocalTransformer::Stream::flush",
        "LocalTransformerParameters::visit_each",
        "PaddingMask::keep",
        "PaddingMask::masked",
        "QkNorm::QkNorm",
        "for_each_parameter",
        "global_norm",
        "list_parameters",
        "set_zero"}},
      {"std::runtime_error where it cannot be written", {"SequenceStream::save"}},
      {"it does not compile, see tests/compile_fail", {"LongformerAttention::Stream::Stream"}},
      {"these are the checks",
       {"SavedLayer::check_arguments", "refuse", "reject", "require_shape", "to_string"}},
      {"members are copied, which validate() checks",
       {"SavedLayer::of_attention", "attention_config", "encoder_config", "is_causal",
        "resolved_kv_heads", "resolved_look_forward", "resolved_qk_norm", "resolved_scale"}},
      {"arithmetic of sizes, which others have checked", {"ceil_div"}},
      {"asked for each row, by those who know the sequence",
       {"Window::attends", "Window::room_serves", "Window::complete", "Window::keys",
        "Window::keys_of", "Window::look_around_begin", "Window::place_in_bucket", "Window::reach",
        "Window::blocks_seen"}},
      {"of rows that the view has",
       {"StridedView::rows", "StridedView::sequence", "channels_first"}},
      {"for the layer, which has checked what it passes on",
       {"LocalAttention::prepare_differentiate", "SavedLayer::complete", "set_shape",
        "LocalAttention::differentiate", "LocalAttention::place_keys",
        "LocalAttention::place_queries", "LocalAttention::rotary_steps", "SavedLayer::prepare"}},
      {"blocks of memory, whose layout the documentation gives",
       {"BatchBlocks::row",
        "BatchBlocks::rows",
        "BlockArray::BlockArray",
        "BlockArray::prepare",
        "BlockArray::put",
        "BlockArray::room",
        "Dropout::factors",
        "Groups::of",
        "HyperConnection::add_gradients",
        "HyperConnection::apply_add",
        "HyperConnection::apply_add_backward",
        "HyperConnection::apply_mix",
        "HyperConnection::apply_mix_backward",
        "LayerNorm::apply",
        "LayerNorm::apply_backward",
        "PackedWeight::panel",
        "PackedWeight::panel_behind",
        "PanelArray::PanelArray",
        "PanelArray::panel",
        "PanelArray::prepare",
        "PanelArray::put",
        "PositionTiles::count",
        "Prenorm::apply",
        "Prenorm::apply_backward",
        "QkNorm::apply",
        "QkNorm::apply_backward",
        "RmsNorm::apply",
        "RmsNorm::apply_backward",
        "RmsNorm::begin_backward",
        "RmsNorm::end_backward",
        "RmsNorm::inverse",
        "RotaryEmbedding::apply_back_to_keys",
        "RotaryEmbedding::apply_back_to_queries",
        "RotaryEmbedding::apply_to_keys",
        "RotaryEmbedding::apply_to_queries",
        "RotaryEmbedding::turns",
        "RotarySteps::move_to",
        "RotarySteps::turn_gradients_back",
        "RotarySteps::turn_queries",
        "StretchSums::StretchSums",
        "StretchSums::add_to",
        "StretchSums::prepare",
        "StretchSums::total",
        "Tiling::is_next",
        "Tiling::may_fetch",
        "add_bias",
        "add_weight_gradient",
        "block_to_panels",
        "for_each_stretch",
        "l2_norm",
        "l2_normalize",
        "l2_normalize_backward",
        "multiply",
        "multiply_half",
        "padded_channels",
        "panel_channels",
        "panels_to_block",
        "project",
        "project_lane",
        "pass_rows",
        "project_rows",
        "rotate_pair",
        "scale_block",
        "spread_lane",
        "spread_size",
        "turn_all",
        "turn_all_back"}},
  };
  return reasons;
}

/// Headers of the kernels' inside alone: blocks of memory, lanes and tasks, in loops that have no
/// time for checks. Their documentation says what they need.
const std::set<std::string>& kernel_headers() {
  static const std::set<std::string> headers{"attention/attention_dropout.hpp",
                                             "attention/backward_flow.hpp",
                                             "attention/backward_kernel.hpp",
                                             "attention/forward_flow.hpp",
                                             "attention/head.hpp",
                                             "attention/kernel.hpp",
                                             "attention/log_sum_exp.hpp",
                                             "attention/narrow_kernel.hpp",
                                             "attention/operand_ring.hpp",
                                             "attention/past.hpp",
                                             "attention/pinned.hpp",
                                             "attention/ring.hpp",
                                             "attention/rows.hpp",
                                             "attention/score.hpp",
                                             "attention/score_function.hpp",
                                             "attention/softmax.hpp",
                                             "attention/strips.hpp",
                                             "attention/visibility.hpp",
                                             "core/block.hpp",
                                             "core/exp2.hpp",
                                             "core/lanes.hpp",
                                             "core/parallel.hpp",
                                             "core/rows_view.hpp",
                                             "core/task_order.hpp",
                                             "core/transpose.hpp",
                                             "core/upcoming.hpp",
                                             "core/words.hpp"};
  return headers;
}

class BadInputs : public testing::TestWithParam<BadInput> {};

TEST_P(BadInputs, AreNamedWithWhatWasExpectedAndWhatCame) {
  try {
    GetParam().call();
    FAIL() << "no exception";
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    for (const std::string& fragment : GetParam().fragments)
      EXPECT_NE(message.find(fragment), std::string::npos)
          << "no \"" << fragment << "\" in \"" << message << '"';
  }
}

std::string name_of(const testing::TestParamInfo<BadInput>& input) { return input.param.name; }

INSTANTIATE_TEST_SUITE_P(AttentionConfiguration, BadInputs,
                         testing::ValuesIn(attention_configurations()), name_of);
INSTANTIATE_TEST_SUITE_P(LayerConfiguration, BadInputs, testing::ValuesIn(layer_configurations()),
                         name_of);
INSTANTIATE_TEST_SUITE_P(TransformerConfiguration, BadInputs,
                         testing::ValuesIn(transformer_configurations()), name_of);
INSTANTIATE_TEST_SUITE_P(Attention, BadInputs, testing::ValuesIn(attention_arguments()), name_of);
INSTANTIATE_TEST_SUITE_P(Layer, BadInputs, testing::ValuesIn(layer_arguments()), name_of);
INSTANTIATE_TEST_SUITE_P(Transformer, BadInputs, testing::ValuesIn(transformer_arguments()),
                         name_of);
INSTANTIATE_TEST_SUITE_P(Component, BadInputs, testing::ValuesIn(component_arguments()), name_of);
INSTANTIATE_TEST_SUITE_P(FurtherComponent, BadInputs,
                         testing::ValuesIn(further_component_arguments()), name_of);
INSTANTIATE_TEST_SUITE_P(Module, BadInputs, testing::ValuesIn(module_arguments()), name_of);
INSTANTIATE_TEST_SUITE_P(Gradient, BadInputs, testing::ValuesIn(gradient_arguments()), name_of);
INSTANTIATE_TEST_SUITE_P(Training, BadInputs, testing::ValuesIn(training_arguments()), name_of);
INSTANTIATE_TEST_SUITE_P(Result, BadInputs, testing::ValuesIn(results_and_gradients()), name_of);
INSTANTIATE_TEST_SUITE_P(Stream, BadInputs, testing::ValuesIn(streams()), name_of);
INSTANTIATE_TEST_SUITE_P(EncoderOrConnection, BadInputs, testing::ValuesIn(encoders()), name_of);

TEST(BadInput, IsTriedOnEveryPublicFunction) {
  namespace fs = std::filesystem;
  const fs::path folder = LOCAL_MHA_INCLUDE_DIR "/local_mha";
  std::set<std::string> tried;
  for (const auto& cases :
       {attention_configurations(), layer_configurations(), transformer_configurations(),
        attention_arguments(), layer_arguments(), transformer_arguments(), component_arguments(),
        further_component_arguments(), module_arguments(), gradient_arguments(),
        training_arguments(), results_and_gradients(), streams(), encoders()})
    for (const BadInput& bad : cases) tried.insert(bad.function);
  std::set<std::string> excused;
  for (const auto& [reason, names] : without_bad_input())
    excused.insert(names.begin(), names.end());

  std::set<std::string> present;
  std::size_t kernels = 0;
  for (const auto& file : fs::recursive_directory_iterator(folder)) {
    const std::string header = fs::relative(file.path(), folder).generic_string();
    if (file.path().extension() != ".hpp" || header.starts_with("io/") ||
        header.starts_with("mpi/"))
      continue;
    if (kernel_headers().contains(header)) {
      ++kernels;
      continue;
    }
    for (const std::string& name : support::PublicNames::of_file(file.path())) {
      present.insert(name);
      EXPECT_TRUE(tried.contains(name) || excused.contains(name))
          << header << ": " << name
          << " is tried with no bad input, and without_bad_input() does not say why";
      EXPECT_FALSE(tried.contains(name) && excused.contains(name)) << name;
    }
  }
  // No list outlives what it names.
  EXPECT_EQ(kernels, kernel_headers().size());
  for (const auto* names : {&tried, &excused})
    for (const std::string& name : *names)
      EXPECT_TRUE(present.contains(name)) << name << " is in no header";
}

// What the list above rests on.
TEST(PublicNames, AreThoseOfTheText) {
  const auto names = support::PublicNames::of_text(R"(
#define NOTHING(x) \
  x
NOTHING_BEGIN
namespace local_mha::inline ABI {
namespace detail { void hidden(int); }
/* void comment(int); */
template <typename T, int n = Pair{.a = 1}>
  requires std::same_as<T, Pair<int, int>>
std::array<T, 2> free_one(const T& t = {}) { if (t) call(t); return {}; }
inline constexpr int variable = size_of(3);
void nothing();
struct Open { explicit Open(int a) : a_{a}, b_(a) {} Open(const Open& other); int a_; int b_; };
class Closed final : public Open {
  void secret(int);
 public:
  template <typename F>
  void shown(F&& f = [](int) {}) const;
  int operator()(int i) const { return "{(" [i]; }
  Closed(int, int) = delete;
  struct Inner { void of_inner(int); };
 private:
  struct Private { void of_private(int); };
};
template <typename T> void Closed::shown(T&& t) const {}
template <> class Outer<int>::Stream : Open { public: Stream(int) {} ~Stream() {} };
}
namespace other { void elsewhere(int); }
)");
  EXPECT_EQ(names,
            (std::set<std::string>{"free_one", "Open::Open", "Closed::shown", "Closed::operator()",
                                   "Closed::Inner::of_inner", "Outer::Stream::Stream"}));
}

TEST(BadInput, LeavesTheParametersAsTheyWere) {
  LocalMHA<double> mha(layer_config(), 4);
  const auto before = support::named<double>(mha.parameters());
  auto changed = mha.parameters();
  changed.to_qkv.setZero();
  changed.to_out.resize(1, 1);
  EXPECT_THROW(mha.set_parameters(changed), std::invalid_argument);
  const auto after = support::named<double>(mha.parameters());
  for (const auto& [name, weight] : before) EXPECT_EQ(weight.data, after.at(name).data) << name;
}

}  // namespace bad_input_test
