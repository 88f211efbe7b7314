// SPDX-License-Identifier: MIT
/// \file
/// LocalTransformer: a language model of LocalMHA layers.
///
///     x = token_emb[tokens] + pos_emb[0 … N)
///     depth times:  x += LocalMHA(x);  x += FeedForward(x)
///     logits = LayerNorm(x) · to_logitsᵀ
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/random.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/mha.hpp>
#include <local_mha/ops/cross_entropy.hpp>
#include <local_mha/ops/dynamic_position_bias.hpp>
#include <local_mha/ops/feed_forward.hpp>
#include <local_mha/ops/layer_norm.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/sampling.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha {

/// How LocalTransformer::generate() goes on from a prompt.
struct GenerateConfig {
  /// Tokens to make, at least 0.
  Index length = 0;
  /// How tokens are drawn.
  SamplingConfig sampling = {};
  /// A sequence that has made it makes no other. Empty: none.
  std::optional<std::int64_t> stop_token = {};
  /// Sequence `b` of the batch draws by `seed + b`.
  std::uint64_t seed = 0;
};

/// The counterpart of the Python package's module of that name, with plain residual connections
/// (`num_residual_streams = 1`).
/// \tparam Scalar float, double, or any type that Eigen computes with
template <typename Scalar>
class LocalTransformer {
 public:
  using Parameters = LocalTransformerParameters<Scalar>;
  using Tokens = TensorView<const std::int64_t, 2>;

  /// Sequences of tokens that come bit by bit: see transformer_stream.hpp.
  class Stream;

  /// Starts with the weights of a new PyTorch module.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit LocalTransformer(const LocalTransformerConfig& config, std::uint64_t seed = 0)
      : LocalTransformer(config, initial_parameters<Parameters>(config, seed)) {}

  /// \throws std::invalid_argument also naming the tensor whose shape does not fit
  LocalTransformer(const LocalTransformerConfig& config, Parameters parameters)
      : config_(checked(config)) {
    set_parameters(std::move(parameters));
  }

  const LocalTransformerConfig& config() const { return config_; }
  const Parameters& parameters() const { return parameters_; }

  /// \throws std::invalid_argument naming the tensor whose shape does not fit
  void set_parameters(Parameters parameters) {
    detail::require_same_shapes(parameters, Parameters::zeros(config_));
    parameters_ = std::move(parameters);
    const Parameters& p = parameters_;
    layers_.clear();
    for (const auto& layer : p.layers)
      layers_.push_back({LocalMHA<Scalar>(layer_config(config_), layer.attention),
                         FeedForward<Scalar>(layer.feed_forward, config_.ff_dropout)});
    if (p.dynamic_pos_bias) {
      const LocalMHAConfig layer = layer_config(config_);
      attn_bias_ =
          DynamicPositionBias<Scalar>(*p.dynamic_pos_bias)
              .forward(layer.window_size, layer.look_backward, resolved_look_forward(layer));
    }
    to_logits_norm_ = LayerNorm<Scalar>(p.to_logits_norm_weight, p.to_logits_norm_bias);
    to_logits_ = Linear<Scalar>(p.to_logits);
  }

  /// \param tokens `[B, N]`, each in `[0, num_tokens)`, `N <= max_seq_len`
  /// \param mask positions that nobody attends, `[B, N]`
  /// \param training dropout acts, with this seed; empty: evaluation
  /// \return logits, `[B, N, num_tokens]`
  /// \throws std::invalid_argument naming the argument that does not fit
  Tensor<Scalar, 3> forward(Tokens tokens, const PaddingMask& mask = {},
                            std::optional<Training> training = {}) const {
    check(tokens, mask);
    Tensor<Scalar, 3> x = embed(tokens);
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const Bias bias = attn_bias_ ? Bias(*attn_bias_) : Bias();
      x += layers_[i].attention.forward(x, mask, bias, of_part(training, 2 * i));
      rows(x) += layers_[i].feed_forward.forward(rows(x), of_part(training, 2 * i + 1));
    }
    const RowMatrix<Scalar> logits = to_logits_.forward(to_logits_norm_.forward(rows(x)));
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), config_.num_tokens);
    std::copy(logits.data(), logits.data() + logits.size(), y.data());
    return y;
  }

  /// Mean cross entropy, in nats, of predicting each token from those before it.
  /// \param tokens `[B, N + 1]`: the first `N` are the input, the last `N` the labels; labels equal
  ///        to ignore_index do not count
  /// \param mask `[B, N]`, of the input
  /// \return NaN if no label counts, as in PyTorch
  Scalar loss(Tokens tokens, const PaddingMask& mask = {},
              std::optional<Training> training = {}) const {
    const Index batch = tokens.dimension(0);
    const Index seqlen = tokens.dimension(1) - 1;
    if (seqlen < 0) reject("tokens", "at least 1 in each sequence", to_string(tokens.dimensions()));
    Tensor<std::int64_t, 2> input(batch, seqlen);
    Tensor<std::int64_t, 2> labels(batch, seqlen);
    for (Index b = 0; b < batch; ++b) {
      const std::int64_t* row = tokens.data() + b * (seqlen + 1);
      std::copy(row, row + seqlen, input.data() + b * seqlen);
      std::copy(row + 1, row + 1 + seqlen, labels.data() + b * seqlen);
    }
    const Tensor<Scalar, 3> logits = forward(input, mask, training);
    return cross_entropy<Scalar>(logits, labels, config_.ignore_index);
  }

  /// Goes on from prompts, token by token, each from the model's logits for all before it: by a
  /// Stream, so that a token costs the same however many there are. As in the Python package with a
  /// cache, the last max_seq_len tokens of a prompt count, and where prompt and text are longer
  /// than max_seq_len, the position embedding stays at its last row, for which the model was not
  /// trained. Include transformer_stream.hpp to use it.
  /// \param prompt `[B, N]`, `N >= 1`
  /// \param on_tokens called after each step with a `std::span` of the `B` tokens that were made
  /// \return the tokens made, `[B, length]`, or fewer if all sequences have stopped; behind a
  ///         sequence's stop_token there are more of it
  /// \throws std::invalid_argument naming the argument that does not fit; std::runtime_error if
  ///         logits are not finite
  template <typename OnTokens>
  Tensor<std::int64_t, 2> generate(Tokens prompt, const GenerateConfig& config,
                                   OnTokens&& on_tokens) const;
  Tensor<std::int64_t, 2> generate(Tokens prompt, const GenerateConfig& config) const {
    return generate(prompt, config, [](const auto&) {});
  }

 private:
  using Bias = typename LocalMHA<Scalar>::Bias;

  struct Layer {
    LocalMHA<Scalar> attention;
    FeedForward<Scalar> feed_forward;
  };

  static const LocalTransformerConfig& checked(const LocalTransformerConfig& config) {
    validate(config);
    return config;
  }

  // All positions of a batch below one another, `[B·N, dim]`.
  static Eigen::Map<RowMatrix<Scalar>> rows(Tensor<Scalar, 3>& x) {
    return {x.data(), x.dimension(0) * x.dimension(1), x.dimension(2)};
  }

  // Each part of the model drops something else.
  static std::optional<Training> of_part(const std::optional<Training>& training,
                                         std::size_t part) {
    if (!training) return std::nullopt;
    const auto words = Philox(training->seed)({static_cast<std::uint32_t>(part), 0, 0, 1});
    return Training{std::uint64_t{words[1]} << 32 | words[0]};
  }

  void check(const Tokens& tokens, const PaddingMask& mask) const {
    if (tokens.dimension(1) > config_.max_seq_len)
      reject("tokens",
             "at most max_seq_len = " + std::to_string(config_.max_seq_len) + " in a sequence",
             tokens.dimension(1));
    if (mask) require_shape("mask", mask.shape(), tokens.dimensions());
    check_tokens(tokens);
  }

  void check_tokens(const Tokens& tokens) const {
    for (Index i = 0; i < tokens.size(); ++i)
      if (tokens.data()[i] < 0 || tokens.data()[i] >= config_.num_tokens)
        reject("tokens", "0 to " + std::to_string(config_.num_tokens - 1), tokens.data()[i],
               " in sequence ", i / tokens.dimension(1), " at ", i % tokens.dimension(1));
  }

  Tensor<Scalar, 3> embed(const Tokens& tokens) const {
    const auto [batch, seqlen] = tokens.dimensions();
    Tensor<Scalar, 3> x(batch, seqlen, config_.dim);
    for (Index i = 0; i < tokens.size(); ++i)
      rows(x).row(i) =
          parameters_.token_emb.row(tokens.data()[i]) + parameters_.pos_emb.row(i % seqlen);
    return x;
  }

  LocalTransformerConfig config_;
  Parameters parameters_;
  std::vector<Layer> layers_;
  std::optional<Tensor<Scalar, 3>> attn_bias_;
  LayerNorm<Scalar> to_logits_norm_;
  Linear<Scalar> to_logits_{RowMatrix<Scalar>()};
};

}  // namespace local_mha
