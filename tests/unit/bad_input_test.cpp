// SPDX-License-Identifier: MIT
// Bad inputs: each is a std::invalid_argument that names the argument, what was expected and what
// came.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/library.hpp"

namespace {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionCall;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalMHAParameters;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::LocalTransformerParameters;
using local_mha::PaddingMask;
using local_mha::RowMatrix;
using local_mha::Tensor;
using local_mha::TensorView;
using local_mha::Vector;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

struct BadInput {
  std::string name;
  std::function<void()> call;
  std::vector<std::string> fragments;  // that the message must hold: argument, expected, got
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
                             const LocalAttentionCall& call = {}, bool use_xpos = false) {
  return [=] {
    LocalAttentionConfig config = attention_config();
    config.use_xpos = use_xpos;
    const auto q = heads(2, 3, 10, 8);
    LocalAttention<float>(config).forward(q, q, q, mask, support::optional_view(bias), call);
  };
}

/// forward() of a good attention with queries, keys and values of these shapes.
std::function<void()> attend(const Tensor<float, 4>& q, const Tensor<float, 4>& k,
                             const Tensor<float, 4>& v) {
  return [=] { LocalAttention<float>(attention_config()).forward(q, k, v); };
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
std::function<void()> layer_weights(Change change) {
  return [change] {
    auto parameters = LocalMHAParameters<double>::zeros(layer_config());
    change(parameters);
    LocalMHA<double>(layer_config(), parameters);
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

/// backward() of a feed-forward 6 → 4 → 6 of 5 rows, with what another one saved.
std::function<void()> feed_forward_backward(Index inner, Index rows, Index grad_inner = 4) {
  return [=] {
    using M = RowMatrix<double>;
    using P = local_mha::FeedForwardParameters<double>;
    const Eigen::DefaultDevice device;
    local_mha::FeedForward<double>::Saved saved;
    local_mha::FeedForward<double>(P::zeros(6, inner))
        .forward_saving(device, saved, M::Zero(rows, 6));
    auto gradients = P::zeros(6, grad_inner);
    local_mha::FeedForward<double>(P::zeros(6, 4))
        .backward(device, gradients, saved, M::Zero(5, 6), M::Zero(5, 6));
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

std::function<void()> predict(const Tensor<std::int64_t, 2>& input, const PaddingMask& mask = {}) {
  return [=] { LocalTransformer<float>(transformer_config()).forward(input, mask); };
}

std::function<void()> loss(const Tensor<std::int64_t, 2>& input, const PaddingMask& mask = {}) {
  return [=] { LocalTransformer<float>(transformer_config()).loss(input, mask); };
}

std::vector<BadInput> attention_configurations() {
  using C = LocalAttentionConfig;
  return {
      {"NoWindow", [] { LocalAttention<float>{C{}}; }, {"window_size", "at least 1", "got 0"}},
      {"NegativeWindow",
       attention([](C& c) { c.window_size = -3; }),
       {"window_size", "at least 1", "got -3"}},
      {"NegativeLookBackward",
       attention([](C& c) { c.look_backward = -1; }),
       {"look_backward", "at least 0", "got -1"}},
      {"NegativeLookForward",
       attention([](C& c) { c.look_forward = -2; }),
       {"look_forward", "at least 0", "got -2"}},
      {"CausalWithLookForward",
       attention([](C& c) { c.causal = true, c.look_forward = 1; }),
       {"look_forward", "causal", "got 1"}},
      {"HugeLookBackward",
       attention([](C& c) { c.look_backward = std::numeric_limits<Index>::max(); }),
       {"look_backward", "2^20", "9223372036854775807"}},
      {"HugeLookForward",
       attention([](C& c) { c.look_forward = Index{1} << 40; }),
       {"look_forward", "2^20", "1099511627776"}},
      {"DropoutOfOne",
       attention([](C& c) { c.dropout = 1; }),
       {"dropout", "probability in [0, 1)", "got 1"}},
      {"NegativeDropout",
       attention([](C& c) { c.dropout = -0.1; }),
       {"dropout", "probability in [0, 1)", "got -0.1"}},
      {"DropoutOfNaN",
       attention([](C& c) { c.dropout = nan; }),
       {"dropout", "probability in [0, 1)", "nan"}},
      {"ScaleOfNaN", attention([](C& c) { c.scale = nan; }), {"scale", "finite", "nan"}},
      {"InfiniteScale", attention([](C& c) { c.scale = infinity; }), {"scale", "finite", "inf"}},
      {"NoChannels", attention([](C& c) { c.dim = 0; }), {"dim", "at least 1", "got 0"}},
      {"OddDimWithRotary", attention([](C& c) { c.dim = 7; }), {"dim", "even", "rotary", "got 7"}},
      {"XposWithoutDim",
       attention([](C& c) { c.use_xpos = true, c.dim.reset(); }),
       {"use_xpos", "rotary"}},
      {"XposWithoutRotary",
       attention([](C& c) { c.use_xpos = true, c.use_rotary_pos_emb = false; }),
       {"use_xpos", "rotary"}},
      {"XposBaseOfZero",
       attention([](C& c) { c.use_xpos = true, c.xpos_scale_base = 0; }),
       {"xpos_scale_base", "at least 0.5", "got 0"}},
      {"XposBaseOfNaN",
       attention([](C& c) { c.use_xpos = true, c.xpos_scale_base = nan; }),
       {"xpos_scale_base", "nan"}},
      {"NegativeXposBase",
       attention([](C& c) { c.use_xpos = true, c.xpos_scale_base = -8; }),
       {"xpos_scale_base", "at least 0.5", "got -8"}},
  };
}

std::vector<BadInput> layer_configurations() {
  using C = LocalMHAConfig;
  return {
      {"LayerNoDim", [] { LocalMHA<float>{C{.window_size = 4}}; }, {"dim", "at least 1", "got 0"}},
      {"LayerNoWindow",
       [] { LocalMHA<float>{C{.dim = 4}}; },
       {"window_size", "at least 1", "got 0"}},
      {"LayerNegativeDim", layer([](C& c) { c.dim = -512; }), {"dim", "at least 1", "got -512"}},
      {"LayerNoHeads", layer([](C& c) { c.heads = 0; }), {"heads", "at least 1", "got 0"}},
      {"LayerNoDimHead", layer([](C& c) { c.dim_head = 0; }), {"dim_head", "at least 1", "got 0"}},
      {"LayerOddDimHeadWithRotary",
       layer([](C& c) { c.dim_head = 5; }),
       {"dim_head", "even", "rotary", "got 5"}},
      {"LayerHugeHeads",
       layer([](C& c) { c.heads = std::numeric_limits<Index>::max(); }),
       {"heads", "2^40", "9223372036854775807"}},
      {"LayerHugeDim", layer([](C& c) { c.dim = Index{1} << 50; }), {"dim", "2^40"}},
      {"LayerQkScaleOfNaN", layer([](C& c) { c.qk_scale = nan; }), {"qk_scale", "finite", "nan"}},
      {"LayerDropoutOfTwo",
       layer([](C& c) { c.dropout = 2; }),
       {"dropout", "probability in [0, 1)", "got 2"}},
      {"LayerNegativeLookBackward",
       layer([](C& c) { c.look_backward = -1; }),
       {"look_backward", "at least 0", "got -1"}},
      {"LayerCausalWithLookForward",
       layer([](C& c) { c.causal = true, c.look_forward = 2; }),
       {"look_forward", "causal", "got 2"}},
      {"LayerXposWithoutRotary",
       layer([](C& c) { c.use_xpos = true, c.use_rotary_pos_emb = false; }),
       {"use_xpos", "rotary"}},
      {"LayerTinyXposBase",
       layer([](C& c) { c.use_xpos = true, c.xpos_scale_base = 0.01; }),
       {"xpos_scale_base", "at least 0.5", "got 0.01"}},
  };
}

std::vector<BadInput> transformer_configurations() {
  using C = LocalTransformerConfig;
  return {
      {"ModelNoTokens",
       transformer([](C& c) { c.num_tokens = 0; }),
       {"num_tokens", "at least 1", "got 0"}},
      {"ModelNoLength",
       transformer([](C& c) { c.max_seq_len = 0; }),
       {"max_seq_len", "at least 1", "got 0"}},
      {"ModelNoDim", transformer([](C& c) { c.dim = 0; }), {"dim", "at least 1", "got 0"}},
      {"ModelNegativeDepth",
       transformer([](C& c) { c.depth = -1; }),
       {"depth", "at least 0", "got -1"}},
      {"ModelHugeDepth",
       transformer([](C& c) { c.depth = std::numeric_limits<Index>::max(); }),
       {"depth", "9223372036854775807"}},
      {"ModelNoWindow",
       transformer([](C& c) { c.local_attn_window_size = 0; }),
       {"local_attn_window_size", "at least 1", "got 0"}},
      {"ModelHugeVocabulary",
       transformer([](C& c) { c.num_tokens = Index{1} << 45; }),
       {"num_tokens", "2^40"}},
      {"ModelHugeLength",
       transformer([](C& c) { c.max_seq_len = Index{1} << 45; }),
       {"max_seq_len", "2^40"}},
      {"ModelFeedForwardOfNaN",
       transformer([](C& c) { c.ff_mult = nan; }),
       {"ff_mult", "finite", "nan"}},
      {"ModelNoFeedForward", transformer([](C& c) { c.ff_mult = 0.01; }), {"ff_mult", "0.01"}},
      {"ModelNegativeFeedForward", transformer([](C& c) { c.ff_mult = -4; }), {"ff_mult", "-4"}},
      {"ModelAttentionDropoutOfOne",
       transformer([](C& c) { c.attn_dropout = 1; }),
       {"attn_dropout", "probability in [0, 1)", "got 1"}},
      {"ModelFeedForwardDropoutOfNaN",
       transformer([](C& c) { c.ff_dropout = nan; }),
       {"ff_dropout", "probability in [0, 1)", "nan"}},
      {"ModelXposWithDynamicBias",
       transformer([](C& c) { c.use_xpos = c.use_dynamic_pos_bias = true; }),
       {"use_xpos", "dynamic position bias"}},
      {"ModelDynamicBiasOfOneChannel",
       transformer([](C& c) { c.use_dynamic_pos_bias = true, c.dim = 1; }),
       {"dim", "at least 2", "got 1"}},
      {"ModelDynamicBiasOfAHugeWindow",
       transformer(
           [](C& c) { c.use_dynamic_pos_bias = true, c.local_attn_window_size = Index{1} << 40; }),
       {"local_attn_window_size", "1099511627776"}},
      {"ModelOddDimHead", transformer([](C& c) { c.dim_head = 3; }), {"dim_head", "even", "got 3"}},
  };
}

std::vector<BadInput> attention_arguments() {
  const auto q = heads(2, 3, 10, 8);
  const auto at = [](Index first) { return LocalAttentionCall{.first_position = first}; };
  const auto of_window = [](Index w) { return LocalAttentionCall{.window_size = w}; };
  return {
      {"QueriesOfOtherChannels",
       attend(heads(2, 3, 10, 6), heads(2, 3, 10, 6), heads(2, 3, 10, 6)),
       {"q", "[any, any, any, 8]", "[2, 3, 10, 6]"}},
      {"KeysOfOtherLength",
       attend(q, heads(2, 3, 9, 8), q),
       {"k", "[2, 3, 10, 8]", "[2, 3, 9, 8]"}},
      {"ValuesOfOtherBatch",
       attend(q, q, heads(1, 3, 10, 8)),
       {"v", "[2, 3, 10, 8]", "[1, 3, 10, 8]"}},
      {"ValuesOfOtherHeads",
       attend(q, q, heads(2, 1, 10, 8)),
       {"v", "[2, 3, 10, 8]", "[2, 1, 10, 8]"}},
      {"QueriesWithoutChannels",
       [] {
         const auto none = heads(1, 1, 5, 0);
         LocalAttention<float>({.window_size = 4}).forward(none, none, none);
       },
       {"q", "at least 1 channel", "[1, 1, 5, 0]"}},
      {"QueriesOfNegativeLength",
       [] {
         const float nothing = 0;
         const TensorView<const float, 4> view(&nothing, {1, 1, -5, 8});
         LocalAttention<float>(attention_config()).forward(view, view, view);
       },
       {"q", "-5"}},
      {"ProbabilitiesOfOtherKeys",
       [q] {
         LocalAttention<float>(attention_config()).attention_probabilities(q, heads(2, 3, 4, 8));
       },
       {"k", "[2, 3, 10, 8]", "[2, 3, 4, 8]"}},
      {"MaskOfOtherBatch", attend(mask_of(1, 10)), {"mask", "[2, 10]", "[1, 10]"}},
      {"MaskOfOtherLength", attend(mask_of(2, 12)), {"mask", "[2, 10]", "[2, 12]"}},
      {"BiasOfOtherHeads", attend({}, zeros(2, 4, 12)), {"attn_bias", "3 (heads) or 1", "got 2"}},
      {"BiasOfOtherWindow",
       attend({}, zeros(3, 5, 12)),
       {"attn_bias", "[any, 4, 12]", "[3, 5, 12]"}},
      {"BiasOfOtherLookAround",
       attend({}, zeros(3, 4, 8)),
       {"attn_bias", "[any, 4, 12]", "[3, 4, 8]"}},
      {"BiasOfAllPairs",
       attend({}, zeros(3, 10, 10)),
       {"attn_bias", "[any, 4, 12]", "[3, 10, 10]"}},
      {"BiasOfTheConfigurationsWindow",
       attend({}, zeros(3, 4, 12), of_window(5), true),
       {"attn_bias", "[any, 5, 15]", "[3, 4, 12]"}},
      {"WindowAtTheCallWithoutXpos",
       attend({}, {}, of_window(8)),
       {"window_size", "xPos", "got 8"}},
      {"WindowOfZeroAtTheCall",
       attend({}, {}, of_window(0), true),
       {"window_size", "at least 1", "got 0"}},
      {"NegativeFirstPosition", attend({}, {}, at(-1)), {"first_position", "got -1"}},
      {"HugeFirstPosition",
       attend({}, {}, at(std::numeric_limits<Index>::max())),
       {"first_position", "2^60", "9223372036854775807"}},
      {"LengthBeyondTheSequence",
       [] { PaddingMask::from_lengths(std::vector<Index>{3, 11}, 10); },
       {"lengths[1]", "0 to 10", "got 11"}},
      {"NegativeLength",
       [] { PaddingMask::from_lengths(std::vector<Index>{-1}, 10); },
       {"lengths[0]", "0 to 10", "got -1"}},
      {"NegativeSequence",
       [] { PaddingMask::from_lengths(std::vector<Index>{}, -4); },
       {"seqlen", "at least 0", "got -4"}},
      {"HugeSequences",
       [] { PaddingMask::from_lengths(std::vector<Index>(4, 1), Index{1} << 62); },
       {"seqlen", "4611686018427387904"}},
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
      {"InputOfOtherDim", forward(zeros(2, 10, 16)), {"x", "[any, any, 12]", "[2, 10, 16]"}},
      {"LayerMaskOfOtherLength",
       forward(zeros(2, 10, 12), mask_of(2, 9)),
       {"mask", "[2, 10]", "[2, 9]"}},
      {"LayerBiasOfOtherHeads",
       forward(zeros(2, 10, 12), {}, zeros(8, 4, 12)),
       {"attn_bias", "2 (heads) or 1", "got 8"}},
      {"LayerBiasOfOtherWindow",
       forward(zeros(2, 10, 12), {}, zeros(2, 4, 4)),
       {"attn_bias", "[any, 4, 12]", "[2, 4, 4]"}},
      {"LayerProbabilitiesOfOtherDim",
       [] { LocalMHA<float>(layer_config()).attention_probabilities(zeros(1, 3, 5)); },
       {"x", "[any, any, 12]", "[1, 3, 5]"}},
      {"SavedByOtherHeads",
       layer_backward([](C& c) { c.heads = 3; }),
       {"saved", "2 heads of 6 channels with gates", "3 heads of 6 channels with gates"}},
      {"SavedByOtherChannels",
       layer_backward([](C& c) { c.dim_head = 8; }),
       {"saved", "2 heads of 6 channels with gates", "2 heads of 8 channels with gates"}},
      {"SavedWithoutGates",
       layer_backward([](C& c) { c.gate_values_per_head = false; }),
       {"saved", "2 heads of 6 channels with gates", "2 heads of 6 channels without gates"}},
      {"SavedOfAnotherLength", layer_backward([](C&) {}, 9), {"saved", "[2, 10]", "[2, 9]"}},
      {"SavedByNothing", layer_backward([](C&) {}, -1), {"saved", "2 heads", "0 heads"}},
      {"MisshapenProjection",
       layer_weights([](P& p) { p.to_qkv.resize(36, 13); }),
       {"to_qkv.weight", "[36, 12]", "[36, 13]"}},
      {"TransposedOutput",
       layer_weights([](P& p) { p.to_out.resize(13, 12); }),
       {"to_out.weight", "[12, 12]", "[13, 12]"}},
      {"NoProjection",
       layer_weights([](P& p) { p.to_qkv.resize(0, 0); }),
       {"to_qkv.weight", "[36, 12]"}},
      {"NoNorm", layer_weights([](P& p) { p.norm_weight.resize(0); }), {"norm.weight", "[12, 1]"}},
      {"LongScale",
       layer_weights([](P& p) { p.k_scale.resize(7); }),
       {"k_scale", "[6, 1]", "[7, 1]"}},
      {"GateOfOtherHeads",
       layer_weights([](P& p) { p.to_v_gate_bias.resize(8); }),
       {"to_v_gate.0.bias", "[2, 1]", "[8, 1]"}},
      {"WeightsThatTheConfigurationDoesNotUse",
       [] {
         LocalMHAConfig plain = layer_config();
         plain.prenorm = false;
         LocalMHA<double>(plain, P::zeros(layer_config()));
       },
       {"norm.weight"}},
      {"NewMisshapenWeights",
       [] {
         LocalMHA<double> mha(layer_config());
         P p = mha.parameters();
         p.q_scale.resize(5);
         mha.set_parameters(p);
       },
       {"q_scale", "[6, 1]", "[5, 1]"}},
  };
}

std::vector<BadInput> transformer_arguments() {
  using P = LocalTransformerParameters<double>;
  return {
      {"TokenBeyondTheVocabulary",
       predict(tokens({1, 2, 10})),
       {"tokens", "0 to 9", "got 10", "at 2"}},
      {"NegativeToken", predict(tokens({1, -1, 3})), {"tokens", "0 to 9", "got -1", "at 1"}},
      {"SequenceTooLong",
       predict(tokens({1, 2, 3, 4, 5, 6, 7, 8, 9})),
       {"tokens", "max_seq_len = 8", "got 9"}},
      {"TokenMaskOfOtherLength",
       predict(tokens({1, 2, 3}), mask_of(1, 4)),
       {"mask", "[1, 3]", "[1, 4]"}},
      {"LossWithoutTokens", loss(tokens({})), {"tokens", "at least 1", "[1, 0]"}},
      {"LossOfASequenceTooLong",
       loss(tokens({1, 2, 3, 4, 5, 6, 7, 8, 9, 1})),
       {"tokens", "max_seq_len = 8", "got 9"}},
      {"LossOfALabelBeyondTheVocabulary", loss(tokens({1, 2, 77})), {"0 to 9", "got 77"}},
      {"LossMaskOfTheLabels", loss(tokens({1, 2, 3}), mask_of(1, 3)), {"mask", "[1, 2]", "[1, 3]"}},
      {"MisshapenEmbedding",
       transformer_weights([](P& p) { p.token_emb.resize(11, 12); }),
       {"token_emb.weight", "[10, 12]", "[11, 12]"}},
      {"TooFewLayers", transformer_weights([](P& p) { p.layers.pop_back(); }), {"layers.1.0"}},
      {"TooManyLayers",
       transformer_weights([](P& p) { p.layers.push_back(p.layers[0]); }),
       {"layers.2.0"}},
      {"MisshapenFeedForward",
       transformer_weights([](P& p) { p.layers[1].feed_forward.proj_out.resize(12, 31); }),
       {"layers.1.1.branch.4.weight", "[12, 32]", "[12, 31]"}},
      {"UnexpectedDynamicBias",
       transformer_weights([](P& p) {
         p.dynamic_pos_bias = local_mha::DynamicPositionBiasParameters<double>::zeros(6, 2);
       }),
       {"dynamic_pos_bias.mlp.0.weight"}},
      {"MisshapenLogits",
       transformer_weights([](P& p) { p.to_logits.resize(10, 11); }),
       {"to_logits.1.weight", "[10, 12]", "[10, 11]"}},
  };
}

std::vector<BadInput> component_arguments() {
  using M = RowMatrix<double>;
  using V = Vector<double>;
  return {
      {"LinearBiasOfOtherSize",
       [] { local_mha::Linear<double>(M::Zero(3, 2), V::Zero(2)); },
       {"bias", "3", "got 2"}},
      {"LinearInputOfOtherWidth",
       [] { local_mha::Linear<double>(M::Zero(3, 2)).forward(M::Zero(5, 3)); },
       {"x", "2 columns", "got 3"}},
      {"NormBiasOfOtherSize",
       [] { local_mha::LayerNorm<double>(V::Zero(3), V::Zero(4)); },
       {"bias", "3", "got 4"}},
      {"NormInputOfOtherWidth",
       [] { local_mha::LayerNorm<double>(V::Zero(3), V::Zero(3)).forward(M::Zero(5, 2)); },
       {"x", "3 columns", "got 2"}},
      {"QkNormInputOfOtherWidth",
       [] { local_mha::QkNorm<double>(V::Ones(4)).forward(M::Zero(5, 8)); },
       {"x", "4 columns", "got 8"}},
      {"RotaryOfOddChannels",
       [] { local_mha::RotaryEmbedding<double>(5); },
       {"dim_head", "even", "got 5"}},
      {"RotaryOfOtherChannels",
       [] { local_mha::RotaryEmbedding<double>(4).rotate_keys(M::Zero(3, 6)); },
       {"keys", "4 columns", "got 6"}},
      {"RotaryBeyondAGroup",
       [] { local_mha::RotaryEmbedding<double>(4).rotate_queries(M::Zero(1000, 4)); },
       {"queries", "256 rows", "got 1000"}},
      {"RotaryOfABadBase",
       [] { local_mha::RotaryEmbedding<double>(4, nan); },
       {"xpos_scale_base", "0.5", "nan"}},
      {"FeedForwardOfOtherShapes",
       [] {
         auto p = local_mha::FeedForwardParameters<double>::zeros(6, 4);
         p.proj_in.resize(7, 6);
         local_mha::FeedForward<double>{p};
       },
       {"1.weight", "[8, 6]", "[7, 6]"}},
      {"FeedForwardInputOfOtherWidth",
       [] {
         local_mha::FeedForward<double>(local_mha::FeedForwardParameters<double>::zeros(6, 4))
             .forward(M::Zero(2, 5));
       },
       {"x", "6 columns", "got 5"}},
      {"FeedForwardSavedByAnother", feed_forward_backward(3, 5), {"saved", "[5, 4]", "[5, 3]"}},
      {"FeedForwardSavedOfOtherRows", feed_forward_backward(4, 6), {"saved", "[5, 4]", "[6, 4]"}},
      {"FeedForwardMisshapenGradients",
       feed_forward_backward(4, 5, 3),
       {"1.weight", "[8, 6]", "[6, 6]"}},
      {"FeedForwardDropoutOfOne",
       [] {
         local_mha::FeedForward<double>(local_mha::FeedForwardParameters<double>::zeros(6, 4), 1.0);
       },
       {"dropout", "[0, 1)", "got 1"}},
      {"DynamicBiasOfOtherShapes",
       [] {
         auto p = local_mha::DynamicPositionBiasParameters<double>::zeros(4, 2);
         p.weight_2.resize(4, 5);
         local_mha::DynamicPositionBias<double>{p};
       },
       {"mlp.2.weight", "4 columns", "got 5"}},
      {"DynamicBiasOfNoWindow",
       [] {
         local_mha::DynamicPositionBias<double>(
             local_mha::DynamicPositionBiasParameters<double>::zeros(4, 2))
             .forward(0, 1, 1);
       },
       {"window_size", "at least 1", "got 0"}},
      {"CrossEntropyOfOtherShapes",
       [] { local_mha::cross_entropy<float>(zeros(2, 3, 4), Tensor<std::int64_t, 2>(2, 4)); },
       {"labels", "[2, 3]", "[2, 4]"}},
  };
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

}  // namespace
