// SPDX-License-Identifier: MIT
/// \file
/// LocalTransformer: a language model of LocalMHA layers.
///
///     x = token_emb[tokens] + pos_emb[0 … N)
///     x = Encoder(x)
///     logits = LayerNorm(x) · to_logitsᵀ
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/on_demand.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/layer/call.hpp>
#include <local_mha/ops/cross_entropy.hpp>
#include <local_mha/ops/embedding.hpp>
#include <local_mha/ops/layer_norm.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/linear_backward.hpp>
#include <local_mha/ops/sampling.hpp>
#include <local_mha/parameters.hpp>
#include <local_mha/stack/layer_stack.hpp>
#include <local_mha/stack/layer_stack_backward.hpp>
#include <local_mha/stack/token_batch.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

template <typename Scalar, typename Storage, typename Arithmetic>
struct StackAccess;

}  // namespace detail

/// How LocalTransformer::generate() goes on from a prompt.
struct GenerateConfig {
  /// Tokens to make, at least 0.
  Index length = 0;
  /// How tokens are drawn.
  SamplingConfig sampling = {};
  /// A sequence that has made it makes no other. Empty: none.
  std::optional<std::int64_t> stop_token = {};
  /// Sequence `b` of the batch draws by the seed and `b`, sequence 0 as one that is alone does.
  std::uint64_t seed = 0;
  /// Tokens of each prompt, `[B]`, at least 1: what follows them in a row is padding, and may be
  /// anything. Each sequence goes on behind its own. Empty: whole rows.
  std::vector<Index> prompt_lengths = {};
};

/// The counterpart of the Python package's module of that name.
///
/// A copy shares the weights, which nobody changes: set_parameters() gives a model others, and a
/// stream goes on with those that it was made with.
/// \tparam Scalar float, double, or any type that Eigen computes with
/// \tparam Storage what embeddings, weights, keys and values are rounded to: see LocalMHA
/// \tparam Arithmetic what is multiplied: see LocalMHA, FeedForward and Linear
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class LocalTransformer {
  friend detail::StackAccess<Scalar, Storage, Arithmetic>;
  struct Weights;

 public:
  /// Its weights.
  using Parameters = LocalTransformerParameters<Scalar>;
  /// `[B, N]`, numbers from 0 to below `num_tokens`.
  using Tokens = TensorView<const std::int64_t, 2>;

  /// Sequences of tokens that come bit by bit: see transformer_stream.hpp.
  class Stream;

  /// Starts with the weights of a new PyTorch module.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit LocalTransformer(const LocalTransformerConfig& config, std::uint64_t seed = 0)
      : LocalTransformer(config, initial_parameters<Parameters>(config, seed)) {}

  /// With given weights.
  /// \throws std::invalid_argument also naming the tensor whose shape does not fit
  LocalTransformer(const LocalTransformerConfig& config, Parameters parameters)
      : weights_(std::make_shared<const Weights>(config,
                                                 detail::fitting(std::move(parameters), config))) {}

  /// Of weights as they are stored: see LocalMHA.
  template <std::same_as<Storage> Given>
    requires(!std::same_as<Given, Scalar>)
  LocalTransformer(const LocalTransformerConfig& config,
                   LocalTransformerParameters<Given> parameters)
      : weights_(std::make_shared<const Weights>(config,
                                                 detail::fitting(std::move(parameters), config))) {}

  // A model that was moved from would have no weights: moving is copying.
  LocalTransformer(const LocalTransformer&) = default;
  LocalTransformer& operator=(const LocalTransformer&) = default;

  /// What it was made with.
  const LocalTransformerConfig& config() const { return weights_->config; }
  /// The weights as they were given, or rounded; made at the first call, see
  /// LocalMHA::parameters().
  /// \return valid until set_parameters() or an assignment, and as long as the model
  const Parameters& parameters() const {
    return weights_->parameters.get([&] { return weights_->unpacked(); });
  }

  /// If it throws, the model is as it was.
  /// \throws std::invalid_argument naming the tensor whose shape does not fit
  void set_parameters(Parameters parameters) {
    weights_ =
        std::make_shared<const Weights>(config(), detail::fitting(std::move(parameters), config()));
  }

  /// The logits of the next token at each position.
  /// \param tokens `[B, N]`, each in `[0, num_tokens)`, of no sequence more than max_seq_len. Those
  ///        behind a sequence's `call.lengths` may be anything
  /// \return logits, `[B, N, num_tokens]`
  /// \throws std::invalid_argument naming the argument that does not fit
  Tensor<Scalar, 3> forward(Tokens tokens, const EncoderCall& call = {}) const {
    const detail::TokenBatch batch(tokens, call);
    check_arguments(batch, tokens, call);
    Tensor<Scalar, 3> x;
    return batch.unpacked(logits_of(batch, call, x, nullptr));
  }

  /// Mean cross entropy, in nats, of predicting each token from those before it.
  /// \param tokens `[B, N + 1]`: the first `N` are the input, the last `N` the labels; labels equal
  ///        to ignore_index do not count, nor do those behind `call.lengths`, which are of the
  ///        input: one less than a sequence's tokens
  /// \param call of the input, without packed sequences
  /// \return NaN if no label counts, as in PyTorch
  Scalar loss(Tokens tokens, const EncoderCall& call = {}) const {
    const InputAndLabels parts = split(tokens, call);
    return loss(parts.input, parts.labels, call);
  }

  /// Mean cross entropy, in nats, of labels that are given.
  /// \param input `[B, N]`, tokens
  /// \param labels `[B, N]`: what each position is to predict; those equal to ignore_index do not
  ///        count
  Scalar loss(Tokens input, Tokens labels, const EncoderCall& call = {}) const {
    const detail::TokenBatch batch(input, call);
    const auto counted = check_arguments(batch, input, labels, call);
    Tensor<Scalar, 3> x;
    return cross_entropy<Scalar>(logits_of(batch, call, x, nullptr), counted,
                                 config().ignore_index);
  }

  /// Goes on from prompts, token by token, each from the model's logits for all before it: by a
  /// Stream, so that a token costs the same however many there are. As in the Python package with a
  /// cache, the last max_seq_len tokens of a prompt count, and where prompt and text are longer
  /// than max_seq_len, the position embedding stays at its last row, for which the model was not
  /// trained. Include transformer_stream.hpp to use it.
  /// \param prompt `[B, N]`, `N >= 1`; shorter ones padded behind, see prompt_lengths: each
  ///        sequence is, to the bit, what it would be alone
  /// \param on_tokens called after each step with a `std::span` of the `B` tokens that were made
  /// \return the tokens made, `[B, length]`, or fewer if all sequences have stopped; behind a
  ///         sequence's stop_token there are more of it
  /// \throws std::invalid_argument naming the argument that does not fit; std::runtime_error if
  ///         logits are not finite
  template <typename OnTokens>
  Tensor<std::int64_t, 2> generate(Tokens prompt, const GenerateConfig& config,
                                   OnTokens&& on_tokens) const;
  /// The same, and nobody is told of the tokens of each step.
  Tensor<std::int64_t, 2> generate(Tokens prompt, const GenerateConfig& config) const {
    return generate(prompt, config, [](const auto&) {});
  }

  /// loss() and its gradients.
  /// \param gradients those of the weights are added here: `Parameters::zeros(config())` at first
  /// \param tokens, call as loss() takes them
  /// \return the loss; NaN and no gradients if no label counts
  /// \throws std::invalid_argument naming the argument that does not fit; then, and where memory
  ///         runs out, the gradients are as they were
  Scalar backward(Parameters& gradients, Tokens tokens, const EncoderCall& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    const InputAndLabels parts = split(tokens, call);
    return backward(gradients, parts.input, parts.labels, call);
  }

  /// The same of labels that are given, as loss() takes them.
  Scalar backward(Parameters& gradients, Tokens input, Tokens labels,
                  const EncoderCall& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>;

 private:
  const detail::LayerStack<Scalar, Storage, Arithmetic>& stack() const { return weights_->stack; }

  struct InputAndLabels {
    Tensor<std::int64_t, 2> input;
    Tensor<std::int64_t, 2> labels;
  };

  // All tokens but the last, and all but the first.
  static InputAndLabels split(const Tokens& tokens, const EncoderCall& call) {
    if (!call.cu_seqlens.empty())
      reject("cu_seqlens", "none, because the last label of a sequence would be of the next one",
             "some");
    const Index batch = tokens.dimension(0);
    const Index seqlen = tokens.dimension(1) - 1;
    if (seqlen < 0) reject("tokens", "at least 1 in each sequence", to_string(tokens.dimensions()));
    InputAndLabels parts{Tensor<std::int64_t, 2>(batch, seqlen),
                         Tensor<std::int64_t, 2>(batch, seqlen)};
    for (Index b = 0; b < batch; ++b) {
      const std::int64_t* row = tokens.data() + b * (seqlen + 1);
      std::copy(row, row + seqlen, parts.input.data() + b * seqlen);
      std::copy(row + 1, row + 1 + seqlen, parts.labels.data() + b * seqlen);
    }
    return parts;
  }

  // The logits of the tokens that pass.
  // \param x becomes what the layers give
  // \param saved null, or what becomes what the layers' backward pass needs
  Tensor<Scalar, 3> logits_of(
      const detail::TokenBatch& batch, const EncoderCall& call, Tensor<Scalar, 3>& x,
      typename detail::LayerStack<Scalar, Storage, Arithmetic>::Saved* saved) const {
    {
      const Tensor<Scalar, 3> embedded = embed(batch);
      set_shape<Scalar, 3>(x, embedded.dimensions());
      typename detail::LayerStack<Scalar, Storage, Arithmetic>::Workspace workspace;
      stack().forward(call.device, x, workspace, embedded, batch.mask(), call.training,
                      batch.cu_seqlens(), saved);
    }
    return project(call.device, weights_->to_logits_norm.forward(rows(x)), x);
  }

  // `[B, N, num_tokens]` of the normalized positions below one another.
  Tensor<Scalar, 3> project(const AnyDevice& device, const RowMatrix<Scalar>& normed,
                            const Tensor<Scalar, 3>& x) const {
    Tensor<Scalar, 3> logits(x.dimension(0), x.dimension(1), config().num_tokens);
    for_each_stretch(
        device, ceil_div(normed.rows(), block_rows<Scalar>),
        [&](Index, Index, const Range& blocks) {
          const Index first = blocks.begin * block_rows<Scalar>;
          const Index last = (std::min)(blocks.end * block_rows<Scalar>, normed.rows());
          rows(logits).middleRows(first, last - first) =
              weights_->to_logits.forward(normed.middleRows(first, last - first));
        },
        forward_stretch_blocks);
    return logits;
  }

  // All that a pass reads of the model.
  struct Weights {
    template <typename Given>
    Weights(const LocalTransformerConfig& model_config, LocalTransformerParameters<Given> given)
        : config(model_config),
          token_emb(detail::cast<Storage>(std::move(given.token_emb))),
          pos_emb(detail::cast<Storage>(std::move(given.pos_emb))),
          stack(encoder_config(config), std::move(static_cast<EncoderParameters<Given>&>(given))),
          to_logits_norm(detail::cast<Scalar>(std::move(given.to_logits_norm_weight)),
                         detail::cast<Scalar>(std::move(given.to_logits_norm_bias))),
          to_logits(given.to_logits) {}

    Parameters unpacked() const {
      Parameters p;
      static_cast<EncoderParameters<Scalar>&>(p) = stack.unpacked();
      p.token_emb = detail::cast<Scalar>(token_emb);
      p.pos_emb = detail::cast<Scalar>(pos_emb);
      p.to_logits_norm_weight = to_logits_norm.weight();
      p.to_logits_norm_bias = to_logits_norm.bias();
      p.to_logits = to_logits.weight().unpacked();
      return p;
    }

    LocalTransformerConfig config;
    RowMatrix<Storage> token_emb;
    RowMatrix<Storage> pos_emb;
    detail::LayerStack<Scalar, Storage, Arithmetic> stack;
    LayerNorm<Scalar> to_logits_norm;
    Linear<Scalar, Storage, Arithmetic> to_logits;
    detail::OnDemand<Parameters> parameters;
  };

  // All positions of a batch below one another, `[B·N, dim]`.
  static Eigen::Map<RowMatrix<Scalar>> rows(Tensor<Scalar, 3>& x) {
    return {x.data(), x.dimension(0) * x.dimension(1), x.dimension(2)};
  }

  void check_arguments(const detail::TokenBatch& batch, const Tokens& tokens,
                       const EncoderCall& call) const {
    batch.for_each_sequence([&](Index, Index begin, Index end) {
      if (end - begin > config().max_seq_len)
        reject("tokens",
               "at most max_seq_len = " + std::to_string(config().max_seq_len) + " in a sequence",
               end - begin);
    });
    check_tokens("tokens", tokens, length_in(tokens, call));
  }
  // How many tokens of a sequence there are.
  static auto length_in(const Tokens& tokens, const EncoderCall& call) {
    return [&call, n = tokens.dimension(1)](Index b) {
      return call.lengths.empty() ? n : call.lengths[static_cast<std::size_t>(b)];
    };
  }
  // \return the labels of the tokens that pass
  Tensor<std::int64_t, 2> check_arguments(const detail::TokenBatch& batch, const Tokens& input,
                                          const Tokens& labels, const EncoderCall& call) const {
    check_arguments(batch, input, call);
    require_shape("labels", labels.dimensions(), input.dimensions());
    check_tokens("labels", labels, length_in(input, call), config().ignore_index);
    return batch.packed(labels);
  }

  // \param length_of `length_of(b)` says how many tokens of sequence `b` there are
  // \param ignored allowed, too
  template <typename LengthOf>
  void check_tokens(const char* name, const Tokens& tokens, LengthOf&& length_of,
                    std::optional<std::int64_t> ignored = {}) const {
    for (Index b = 0; b < tokens.dimension(0); ++b) {
      const std::int64_t* of_sequence = tokens.data() + b * tokens.dimension(1);
      for (Index i = 0; i < length_of(b); ++i)
        if ((of_sequence[i] < 0 || of_sequence[i] >= config().num_tokens) &&
            of_sequence[i] != ignored)
          reject(name,
                 "0 to " + std::to_string(config().num_tokens - 1) +
                     (ignored ? " or ignore_index" : ""),
                 of_sequence[i], " in sequence ", b, " at ", i);
    }
  }

  Tensor<Scalar, 3> embed(const detail::TokenBatch& batch) const {
    const Tensor<std::int64_t, 2>& tokens = batch.tokens();
    Tensor<Scalar, 3> x(tokens.dimension(0), tokens.dimension(1), config().dim);
    for (Index i = 0; i < tokens.size(); ++i)
      embed(tokens.data()[i], batch.places()[static_cast<std::size_t>(i)],
            x.data() + i * config().dim);
    return x;
  }

  // A token at a place.
  void embed(std::int64_t token, Index place, Scalar* to) const {
    using Row = Eigen::Matrix<Scalar, 1, Eigen::Dynamic>;
    Eigen::Map<Row>(to, config().dim) = weights_->token_emb.row(token).template cast<Scalar>() +
                                        weights_->pos_emb.row(place).template cast<Scalar>();
  }

  std::shared_ptr<const Weights> weights_;
};

template <typename Scalar, typename Storage, typename Arithmetic>
Scalar LocalTransformer<Scalar, Storage, Arithmetic>::backward(Parameters& gradients, Tokens input,
                                                               Tokens labels,
                                                               const EncoderCall& call) const
  requires detail::Trainable<Scalar, Storage, Arithmetic>
{
  const detail::TokenBatch batch(input, call);
  const Tensor<std::int64_t, 2> counted = check_arguments(batch, input, labels, call);
  detail::require_fitting(gradients, config());

  typename detail::LayerStack<Scalar, Storage, Arithmetic>::Saved saved;
  Tensor<Scalar, 3> x;
  const Tensor<Scalar, 3> logits = logits_of(batch, call, x, &saved);
  const Scalar loss = cross_entropy<Scalar>(logits, counted, config().ignore_index);

  // Added at the end, where nothing can fail.
  Parameters made = Parameters::zeros(config());
  Tensor<Scalar, 3> grad_logits =
      cross_entropy_gradient<Scalar>(logits, counted, config().ignore_index);
  Tensor<Scalar, 3> grad(x.dimensions());
  const RowMatrix<Scalar> normed = weights_->to_logits_norm.forward(rows(x));
  rows(grad) = weights_->to_logits_norm.backward(
      linear_backward<AnyDevice, Scalar>(call.device, weights_->to_logits.weight(), normed,
                                         rows(grad_logits), made.to_logits, nullptr),
      rows(x), made.to_logits_norm_weight, made.to_logits_norm_bias);
  {
    typename detail::LayerStack<Scalar, Storage, Arithmetic>::Workspace workspace;
    stack().backward(call.device, made, workspace, saved, grad);
  }
  const Tensor<std::int64_t, 2>& tokens = batch.tokens();
  embedding_backward<Scalar>(made.token_emb,
                             {tokens.data(), static_cast<std::size_t>(tokens.size())}, rows(grad));
  embedding_backward<Scalar>(made.pos_emb, batch.places(), rows(grad));
  detail::add_and_clear(gradients, made);
  return loss;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
