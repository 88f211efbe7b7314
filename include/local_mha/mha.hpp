// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA: projection, normalization, positions, local attention and output projection.
///
/// The layer flows: a stretch of rows comes in, its queries, keys and values are made while it is
/// in cache, the queries whose look-around is complete attend, and their rows go out. Only the
/// look-around is kept, in rings, so that scratch memory does not depend on the sequence. What it
/// computes is in layer/steps.hpp.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/local_attention.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/layer/backward.hpp>
#include <local_mha/layer/forward.hpp>
#include <local_mha/layer/plan.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/layer/worker.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

template <typename Scalar>
struct LayerAccess;

}  // namespace detail

/// Local multi-head attention, the counterpart of the Python packages' module of that name.
///
/// \tparam Scalar float, double, or any type that Eigen computes with
///
///     local_mha::LocalMHAConfig config{.dim = 512, .window_size = 5};
///     local_mha::LocalMHA<float> mha(config);
///     auto y = mha.forward(x);  // x: Eigen::Tensor<float, 3, Eigen::RowMajor>, [B, N, 512]
///
/// A copy shares the weights, which nobody changes: set_parameters() gives a layer others, and a
/// stream goes on with those that it was made with.
template <typename Scalar>
class LocalMHA {
  using Weights = detail::LayerWeights<Scalar>;
  using Flow = detail::LayerWorker<Scalar>;

  static constexpr Index stretch = detail::layer_stretch<Scalar>;

 public:
  using Parameters = LocalMHAParameters<Scalar>;
  using Bias = std::optional<TensorView<const Scalar, 3>>;

  /// Sequences that come bit by bit: see mha_stream.hpp.
  class Stream;
  friend detail::LayerAccess<Scalar>;

  /// Room for calls of forward_into(), forward_saving_into() and backward_into().
  class Workspace {
   private:
    friend LocalMHA;

    detail::LayerForward<Scalar> forward_;
    detail::LayerBackwardRoom<Scalar> backward_;
    typename LocalAttention<Scalar>::BiasGradients grad_bias_;
  };

  /// Starts with the weights of a new PyTorch module.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit LocalMHA(const LocalMHAConfig& config, std::uint64_t seed = 0)
      : LocalMHA(config, initial_parameters<Parameters>(config, seed)) {}

  /// \throws std::invalid_argument also naming the tensor whose shape does not fit
  LocalMHA(const LocalMHAConfig& config, Parameters parameters)
      : weights_(std::make_shared<const Weights>(config,
                                                 detail::fitting(std::move(parameters), config))) {}

  // A layer that was moved from would have no weights: moving is copying.
  LocalMHA(const LocalMHA&) = default;
  LocalMHA& operator=(const LocalMHA&) = default;

  const LocalMHAConfig& config() const { return weights_->config; }
  /// The weights as they were given. Passes read them in another order, which is the only one in
  /// which a layer holds them; the first call makes this set, and all copies of the layer keep it.
  /// Threads may call it at once.
  /// \return valid until set_parameters() or an assignment, and as long as the layer
  const Parameters& parameters() const { return weights_->parameters(); }

  /// If it throws, the layer is as it was.
  /// \throws std::invalid_argument naming the tensor whose shape does not fit
  void set_parameters(Parameters parameters) {
    weights_ =
        std::make_shared<const Weights>(config(), detail::fitting(std::move(parameters), config()));
  }

  /// \param x `[B, N, dim]`
  /// \param mask keys that nobody attends, `[B, N]`
  /// \param attn_bias `[heads or 1, w, (1 + lb + lf)·w]`, or `[B·heads, …]`, one for each sequence;
  ///        see LocalAttention::forward(). None with a token window
  /// \param training dropout acts, with this seed; empty: evaluation
  /// \param cu_seqlens a batch of 1 holds sequences of any lengths, `[S + 1]` with the first row of
  ///        each and `N` at last, which see nothing of one another; empty: it holds one
  /// \return `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit
  Tensor<Scalar, 3> forward(TensorView<const Scalar, 3> x, const PaddingMask& mask = {},
                            const Bias& attn_bias = {}, std::optional<Training> training = {},
                            std::span<const Index> cu_seqlens = {}) const {
    return forward(Eigen::DefaultDevice(), x, mask, attn_bias, training, cu_seqlens);
  }

  /// The same on the threads of a device; the same bits for any number of them.
  template <ThreadDevice Device>
  Tensor<Scalar, 3> forward(const Device& device, TensorView<const Scalar, 3> x,
                            const PaddingMask& mask = {}, const Bias& attn_bias = {},
                            std::optional<Training> training = {},
                            std::span<const Index> cu_seqlens = {}) const {
    check_arguments(x, mask, attn_bias, cu_seqlens);
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
    Workspace workspace;
    forward_into(device, y, workspace, x, mask, attn_bias, training, cu_seqlens);
    return y;
  }

  /// The same into given memory. Allocates nothing if the workspace was last used for this
  /// configuration, and before for batches as large and as many threads; threads take several short
  /// sequences at once, for which room is made the first time.
  /// \param y `[B, N, dim]`, must not overlap x
  /// \param workspace for one call at a time
  template <ThreadDevice Device>
  void forward_into(const Device& device, TensorView<Scalar, 3> y, Workspace& workspace,
                    TensorView<const Scalar, 3> x, const PaddingMask& mask = {},
                    const Bias& attn_bias = {}, std::optional<Training> training = {},
                    std::span<const Index> cu_seqlens = {}) const {
    flow(device, y, workspace, x, mask, attn_bias, training, cu_seqlens, nullptr);
  }
  void forward_into(TensorView<Scalar, 3> y, Workspace& workspace, TensorView<const Scalar, 3> x,
                    const PaddingMask& mask = {}, const Bias& attn_bias = {},
                    std::optional<Training> training = {},
                    std::span<const Index> cu_seqlens = {}) const {
    forward_into(Eigen::DefaultDevice(), y, workspace, x, mask, attn_bias, training, cu_seqlens);
  }

  /// What forward_saving() keeps for backward().
  using Saved = SavedLayer<Scalar>;

  /// forward() that keeps what backward() needs.
  /// \param saved becomes what this call kept
  template <ThreadDevice Device>
  Tensor<Scalar, 3> forward_saving(const Device& device, Saved& saved,
                                   TensorView<const Scalar, 3> x, const PaddingMask& mask = {},
                                   const Bias& attn_bias = {},
                                   std::optional<Training> training = {},
                                   std::span<const Index> cu_seqlens = {}) const {
    check_arguments(x, mask, attn_bias, cu_seqlens);
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
    Workspace workspace;
    forward_saving_into(device, y, workspace, saved, x, mask, attn_bias, training, cu_seqlens);
    return y;
  }
  Tensor<Scalar, 3> forward_saving(Saved& saved, TensorView<const Scalar, 3> x,
                                   const PaddingMask& mask = {}, const Bias& attn_bias = {},
                                   std::optional<Training> training = {},
                                   std::span<const Index> cu_seqlens = {}) const {
    return forward_saving(Eigen::DefaultDevice(), saved, x, mask, attn_bias, training, cu_seqlens);
  }

  /// The same into given memory, also that of `saved`: see forward_into().
  template <ThreadDevice Device>
  void forward_saving_into(const Device& device, TensorView<Scalar, 3> y, Workspace& workspace,
                           Saved& saved, TensorView<const Scalar, 3> x,
                           const PaddingMask& mask = {}, const Bias& attn_bias = {},
                           std::optional<Training> training = {},
                           std::span<const Index> cu_seqlens = {}) const {
    const auto inputs = check_arguments(x, mask, attn_bias, cu_seqlens);
    require_shape("y", y.dimensions(), x.dimensions());
    detail::require_apart("y", y, "x", x);
    saved.prepare(config(), x.dimension(0), x.dimension(1), inputs);
    flow(device, y, workspace, x, mask, attn_bias, training, cu_seqlens, &saved);
    saved.complete(*weights_, x, mask, attn_bias, {.training = training, .cu_seqlens = cu_seqlens});
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param gradients those of the weights are added here: `Parameters::zeros(config())` at first
  /// \param saved what forward_saving() kept. It holds the mask, the training and the packed
  ///        sequences: here, mask and training may be left out
  /// \param grad_y `[B, N, dim]`
  /// \param x, attn_bias what forward_saving() was given
  /// \param grad_attn_bias null, or where that of attn_bias is added, in its shape
  /// \return that of x, `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit, or is not that of
  ///         forward_saving(), as far as a sample of its numbers tells; then, and where memory runs
  ///         out, the gradients are as they were
  template <ThreadDevice Device>
  Tensor<Scalar, 3> backward(const Device& device, Parameters& gradients, const Saved& saved,
                             TensorView<const Scalar, 3> grad_y, TensorView<const Scalar, 3> x,
                             const PaddingMask& mask = {}, const Bias& attn_bias = {},
                             std::optional<Training> training = {},
                             Tensor<Scalar, 3>* grad_attn_bias = nullptr) const {
    check_arguments(x, mask, attn_bias);
    Tensor<Scalar, 3> grad_x(x.dimension(0), x.dimension(1), x.dimension(2));
    Workspace workspace;
    backward_into(device, grad_x, workspace, gradients, saved, grad_y, x, mask, attn_bias, training,
                  grad_attn_bias);
    return grad_x;
  }
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved,
                             TensorView<const Scalar, 3> grad_y, TensorView<const Scalar, 3> x,
                             const PaddingMask& mask = {}, const Bias& attn_bias = {},
                             std::optional<Training> training = {},
                             Tensor<Scalar, 3>* grad_attn_bias = nullptr) const {
    return backward(Eigen::DefaultDevice(), gradients, saved, grad_y, x, mask, attn_bias, training,
                    grad_attn_bias);
  }

  /// The same into given memory. What lies between the steps, about seven tensors of the size of x,
  /// stays in the workspace for the next call, which allocates nothing where forward_into() would
  /// not.
  /// \param grad_x that of x, `[B, N, dim]`, must not overlap grad_y and x
  /// \param workspace for one call at a time
  template <ThreadDevice Device>
  void backward_into(const Device& device, TensorView<Scalar, 3> grad_x, Workspace& workspace,
                     Parameters& gradients, const Saved& saved, TensorView<const Scalar, 3> grad_y,
                     TensorView<const Scalar, 3> x, const PaddingMask& mask = {},
                     const Bias& attn_bias = {}, std::optional<Training> training = {},
                     Tensor<Scalar, 3>* grad_attn_bias = nullptr) const {
    check_arguments(x, mask, attn_bias);
    require_shape("grad_x", grad_x.dimensions(), x.dimensions());
    require_shape("grad_y", grad_y.dimensions(), x.dimensions());
    detail::require_apart("grad_x", grad_x, "grad_y", grad_y);
    detail::require_apart("grad_x", grad_x, "x", x);
    saved.check_arguments(*weights_, x, mask, attn_bias, training);
    weights_->require_same_shapes(gradients);
    if (grad_attn_bias != nullptr) {
      if (!attn_bias) reject("grad_attn_bias", "null, because there is no attn_bias", "a tensor");
      require_shape("grad_attn_bias", TensorView<Scalar, 3>(*grad_attn_bias).dimensions(),
                    attn_bias->dimensions());
    }
    if (x.size() == 0) return;
    const auto inputs =
        check_arguments(x, saved.call.mask(), attn_bias, saved.call.options().cu_seqlens);
    const Weights& w = *weights_;
    auto& grad_bias = workspace.grad_bias_;
    const bool wants_bias = config().relative_bias || grad_attn_bias != nullptr;
    grad_bias.prepare(wants_bias ? bias_of(attn_bias) : Bias(), config().heads);
    detail::LayerBackward<Scalar>(w, saved, workspace.backward_, thread_count(device))
        .run(device, inputs, saved.call.options().training, x.data(), grad_y.data(), grad_x.data(),
             gradients, grad_bias);
    if (grad_attn_bias != nullptr) grad_bias.add_to(*grad_attn_bias);
    if (config().relative_bias) grad_bias.add_to(gradients.relative_bias.data());
  }

  /// The probabilities with which forward() weights the values, to look at: memory `O(N²)`.
  /// \return `[B, heads, N, N]`, `[query][key]`; 0 where a query does not see a key
  Tensor<Scalar, 4> attention_probabilities(TensorView<const Scalar, 3> x,
                                            const PaddingMask& mask = {},
                                            const Bias& attn_bias = {},
                                            std::span<const Index> cu_seqlens = {}) const;

 private:
  template <ThreadDevice Device>
  void flow(const Device& device, TensorView<Scalar, 3> y, Workspace& workspace,
            TensorView<const Scalar, 3> x, const PaddingMask& mask, const Bias& attn_bias,
            const std::optional<Training>& training, std::span<const Index> cu_seqlens,
            Saved* saved) const;

  const LocalAttention<Scalar>& attention() const { return weights_->attention; }

  detail::AttentionInputs<Scalar> check_arguments(const TensorView<const Scalar, 3>& x,
                                                  const PaddingMask& mask, const Bias& attn_bias,
                                                  std::span<const Index> cu_seqlens = {}) const {
    require_shape("x", x.dimensions(), {-1, -1, config().dim});
    detail::AttentionInputs<Scalar> inputs(Window(attention().config()), x.dimension(0),
                                           config().heads, x.dimension(1), mask,
                                           bias_of(attn_bias));
    add_options(inputs);
    inputs.cut(cu_seqlens);
    return inputs;
  }

  // What the queries of a stream see, but for their place.
  detail::AttentionInputs<Scalar> shown_to(Index batch, const Bias& attn_bias) const {
    detail::AttentionInputs<Scalar> inputs(Window(attention().config()), batch, config().heads,
                                           bias_of(attn_bias));
    add_options(inputs);
    return inputs;
  }

  // What the attention alone takes of the weights.
  typename LocalAttention<Scalar>::Terms terms() const {
    typename LocalAttention<Scalar>::Terms terms;
    const RowMatrix<Scalar>& bias = weights_->relative_bias;
    if (config().relative_bias)
      terms.relative_bias.emplace(bias.data(), std::array{bias.rows(), bias.cols()});
    if (config().sinks) terms.sinks.emplace(weights_->sinks.data(), std::array{config().heads});
    return terms;
  }
  // The bias of a call, or that of the weights, which is one of windows of one position.
  Bias bias_of(const Bias& attn_bias) const {
    if (config().token_window && attn_bias)
      reject("attn_bias", "none, because a token window takes a relative_bias", "one");
    if (!config().relative_bias) return attn_bias;
    const RowMatrix<Scalar>& bias = weights_->relative_bias;
    return TensorView<const Scalar, 3>(bias.data(), {bias.rows(), 1, bias.cols()});
  }
  void add_options(detail::AttentionInputs<Scalar>& inputs) const {
    inputs.share_keys(resolved_kv_heads(config()));
    if (config().sinks) inputs.add_sinks(weights_->sinks.data());
    inputs.set_score(attention().score());
  }

  // See LayerWorker::stream().
  template <typename Device, typename Sequence, typename Complete>
  void stream_rows(const Device& device, Flow& flow, Sequence& sequence,
                   const detail::AttentionInputs<Scalar>& inputs, Index b, const Range& in,
                   const Range& out, const Scalar* x, const std::uint8_t* masked, Scalar* y,
                   Complete&& complete) const {
    flow.steps().use(*weights_);
    flow.stream(device, sequence, inputs, b, in, out, x, masked, y, complete);
  }

  std::shared_ptr<const Weights> weights_;
};

template <typename Scalar>
Tensor<Scalar, 4> LocalMHA<Scalar>::attention_probabilities(
    TensorView<const Scalar, 3> x, const PaddingMask& mask, const Bias& attn_bias,
    std::span<const Index> cu_seqlens) const {
  check_arguments(x, mask, attn_bias, cu_seqlens);
  const auto [batch, seqlen, dim] = x.dimensions();
  Tensor<Scalar, 4> q(batch, config().heads, seqlen, config().dim_head);
  Tensor<Scalar, 4> k(batch, resolved_kv_heads(config()), seqlen, config().dim_head);
  Flow projections(*weights_, Window(attention().config()), seqlen);
  for (Index b = 0; b < batch; ++b)
    projections.queries_and_keys(x.data() + b * seqlen * dim, b, q, k);
  return attention().attention_probabilities(q, k, mask, attn_bias, {.cu_seqlens = cu_seqlens},
                                             terms());
}

template <typename Scalar>
template <ThreadDevice Device>
void LocalMHA<Scalar>::flow(const Device& device, TensorView<Scalar, 3> y, Workspace& workspace,
                            TensorView<const Scalar, 3> x, const PaddingMask& mask,
                            const Bias& attn_bias, const std::optional<Training>& training,
                            std::span<const Index> cu_seqlens, Saved* saved) const {
  const auto inputs = check_arguments(x, mask, attn_bias, cu_seqlens);
  require_shape("y", y.dimensions(), x.dimensions());
  detail::require_apart("y", y, "x", x);
  workspace.forward_.run(device, *weights_, inputs, training, x.data(), y.data(), saved);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
