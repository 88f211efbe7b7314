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
#include <concepts>
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
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/layer/backward.hpp>
#include <local_mha/layer/call.hpp>
#include <local_mha/layer/forward.hpp>
#include <local_mha/layer/plan.hpp>
#include <local_mha/layer/positional_calls.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/layer/worker.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

template <typename Scalar, typename Storage, typename Arithmetic>
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
///
/// Of float, weights, and the keys and values that are kept, can be stored in 16 bits, and computed
/// with in float:
///
///     local_mha::LocalMHA<float, Eigen::bfloat16> small(mha.config(), mha.parameters());
///
/// The weights of projections are rounded when they are given; keys, normalized and turned, and
/// values when they are made, in forward() as in a stream: how a sequence is cut changes the order
/// of sums alone, by which a number may be rounded the other way.
/// All else is float. Such a layer goes forward alone: train a LocalMHA<float>, and round it.
///
/// What is stored in Eigen::bfloat16 can also be multiplied so, which some processors do several
/// times as fast:
///
///     local_mha::LocalMHA<float, Eigen::bfloat16, Eigen::bfloat16> fast(mha.config(),
///                                                                      mha.parameters());
///
/// Then the operands of every product are rounded, see operands.hpp: beside weights, keys and
/// values, what passes a projection, queries when they are turned and scaled, and probabilities,
/// `2^(score − ⌈maximum⌉)` with scores in units of log 2; backward, also gradients of what
/// projections and heads give, and of scores. Sums are float, and so is all else. Gradients are
/// those for the float parameters that the weights were rounded from: who trains keeps these, and
/// gives them to set_parameters().
/// \tparam Storage what weights, keys and values are rounded to, see can_store
/// \tparam Arithmetic what is multiplied, see can_multiply
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class LocalMHA : public detail::PositionalCalls<LocalMHA<Scalar, Storage, Arithmetic>, Scalar> {
  using Positional = detail::PositionalCalls<LocalMHA<Scalar, Storage, Arithmetic>, Scalar>;
  using Input = StridedView<const Scalar>;
  using Output = StridedView<Scalar>;
  using Weights = detail::LayerWeights<Scalar, Storage, Arithmetic>;
  using Flow = detail::LayerWorker<Scalar, Storage, Arithmetic>;

  static constexpr Index stretch = detail::layer_stretch<Scalar, Arithmetic>;

 public:
  /// Its weights.
  using Parameters = LocalMHAParameters<Scalar>;
  /// A view of an attention bias, or none.
  using Bias = std::optional<TensorView<const Scalar, 3>>;
  /// What a call is given beside its rows.
  using Call = LocalMHACall<Scalar>;

  /// Sequences that come bit by bit: see mha_stream.hpp.
  class Stream;
  friend detail::LayerAccess<Scalar, Storage, Arithmetic>;

  /// Memory for calls of forward_into(), forward_saving_into() and backward_into().
  class Workspace {
   private:
    friend LocalMHA;

    detail::LayerForward<Scalar, Storage, Arithmetic> forward_;
    detail::LayerBackwardRoom<Scalar, Storage, Arithmetic> backward_;
    typename LocalAttention<Scalar>::BiasGradients grad_bias_;
  };

  /// Starts with the weights of a new PyTorch module.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit LocalMHA(const LocalMHAConfig& config, std::uint64_t seed = 0)
      : LocalMHA(config, initial_parameters<Parameters>(config, seed)) {}

  /// With given weights.
  /// \throws std::invalid_argument also naming the tensor whose shape does not fit
  LocalMHA(const LocalMHAConfig& config, Parameters parameters)
      : weights_(std::make_shared<const Weights>(config,
                                                 detail::fitting(std::move(parameters), config))) {}

  /// Of weights as they are stored, as files in 16 bits have them: none is made a Scalar on the
  /// way, but for vectors.
  template <std::same_as<Storage> Given>
    requires(!std::same_as<Given, Scalar>)
  LocalMHA(const LocalMHAConfig& config, LocalMHAParameters<Given> parameters)
      : weights_(std::make_shared<const Weights>(config,
                                                 detail::fitting(std::move(parameters), config))) {}

  // A layer that was moved from would have no weights: moving is copying.
  LocalMHA(const LocalMHA&) = default;
  LocalMHA& operator=(const LocalMHA&) = default;

  /// What it was made with.
  const LocalMHAConfig& config() const { return weights_->config; }
  /// The weights as they were given, or rounded. Passes read them in another order, which is the
  /// only one in which a layer holds them; the first call makes this set, and all copies of the
  /// layer keep it. Threads may call it at once.
  /// \return valid until set_parameters() or an assignment, and as long as the layer
  const Parameters& parameters() const { return weights_->parameters(); }

  /// If it throws, the layer is as it was.
  /// \throws std::invalid_argument naming the tensor whose shape does not fit
  void set_parameters(Parameters parameters) {
    weights_ =
        std::make_shared<const Weights>(config(), detail::fitting(std::move(parameters), config()));
  }

  // With a device first, and with arguments in a row.
  using Positional::backward;
  using Positional::backward_into;
  using Positional::forward;
  using Positional::forward_into;
  using Positional::forward_saving;
  using Positional::forward_saving_into;

  /// Computes the layer: projections, attention over the window, output projection.
  /// \param x `[B, N, dim]`: see StridedView
  /// \return `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit
  Tensor<Scalar, 3> forward(Input x, const Call& call = {}) const {
    check_arguments(x, call);
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
    // Of a workspace, a program that goes forward alone compiles no more than this.
    detail::LayerForward<Scalar, Storage, Arithmetic> room;
    flow(y, room, x, call, nullptr);
    return y;
  }

  /// The same into given memory. Allocates nothing if the workspace was last used for this
  /// configuration, and before for batches as large and as many threads; threads take several short
  /// sequences at once, for which memory is taken the first time.
  /// \param y `[B, N, dim]`, must not overlap x
  /// \param workspace for one call at a time
  void forward_into(Output y, Workspace& workspace, Input x, const Call& call = {}) const {
    flow(y, workspace.forward_, x, call, nullptr);
  }

  /// What forward_saving() keeps for backward().
  using Saved = SavedLayer<Scalar>;

  /// forward() that keeps what backward() needs.
  /// \param saved becomes what this call kept
  Tensor<Scalar, 3> forward_saving(Saved& saved, Input x, const Call& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    check_arguments(x, call);
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
    Workspace workspace;
    forward_saving_into(y, workspace, saved, x, call);
    return y;
  }

  /// The same into given memory, also that of `saved`: see forward_into().
  void forward_saving_into(Output y, Workspace& workspace, Saved& saved, Input x,
                           const Call& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    const auto inputs = check_arguments(x, call);
    require_shape("y", y.dimensions(), x.dimensions());
    detail::require_apart("y", y, "x", x);
    saved.prepare(config(), x.dimension(0), x.dimension(1), inputs);
    flow(y, workspace.forward_, x, call, &saved);
    saved.complete(*weights_, x, call);
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param gradients those of the weights are added here: `Parameters::zeros(config())` at first
  /// \param saved what forward_saving() kept. It holds the mask, the training and the lengths of
  ///        sequences: in `call`, they may be left out
  /// \param grad_y `[B, N, dim]`
  /// \param x, call what forward_saving() was given; the device may be another
  /// \param grad_attn_bias null, or where that of attn_bias is added, in its shape
  /// \return that of x, `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit, or is not that of
  ///         forward_saving(), as far as a sample of its numbers tells; then, and where memory runs
  ///         out, the gradients are as they were
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved, Input grad_y, Input x,
                             const Call& call = {},
                             Tensor<Scalar, 3>* grad_attn_bias = nullptr) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    check_arguments(x, call);
    Tensor<Scalar, 3> grad_x(x.dimension(0), x.dimension(1), x.dimension(2));
    Workspace workspace;
    backward_into(grad_x, workspace, gradients, saved, grad_y, x, call, grad_attn_bias);
    return grad_x;
  }

  /// The same into given memory. What lies between the steps, seven to nine tensors of the size of
  /// x, stays in the workspace for the next call, which allocates nothing where forward_into()
  /// would not.
  /// \param grad_x that of x, `[B, N, dim]`, must not overlap grad_y and x
  /// \param workspace for one call at a time
  void backward_into(Output grad_x, Workspace& workspace, Parameters& gradients, const Saved& saved,
                     Input grad_y, Input x, const Call& call = {},
                     Tensor<Scalar, 3>* grad_attn_bias = nullptr) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>;

  /// The probabilities with which forward() weights the values, to look at: memory `O(N²)`. Queries
  /// and keys are made on the calling thread, and computed with as Scalars whatever Arithmetic is.
  /// \return `[B, heads, N, N]`, `[query][key]`; 0 where a query does not see a key
  Tensor<Scalar, 4> attention_probabilities(Input x, const Call& call = {}) const;
  /// The same with a mask alone.
  template <std::same_as<PaddingMask> Mask>
  Tensor<Scalar, 4> attention_probabilities(Input x, const Mask& mask) const {
    return attention_probabilities(x, Call{.mask = mask});
  }
  /// The same with mask, bias and packed sequences in a row.
  Tensor<Scalar, 4> attention_probabilities(Input x, const PaddingMask& mask, const Bias& attn_bias,
                                            std::span<const Index> cu_seqlens = {}) const {
    return attention_probabilities(
        x, Call{.mask = mask, .attn_bias = attn_bias, .cu_seqlens = cu_seqlens});
  }

 private:
  // \param saved null, or where is kept what backward() needs
  void flow(const Output& y, detail::LayerForward<Scalar, Storage, Arithmetic>& room,
            const Input& x, const Call& call, Saved* saved) const {
    const auto inputs = check_arguments(x, call);
    require_shape("y", y.dimensions(), x.dimensions());
    detail::require_apart("y", y, "x", x);
    room.run(call.device, *weights_, inputs, call.training, x, y, saved);
  }

  const LocalAttention<Scalar>& attention() const { return weights_->attention; }

  // \throws std::invalid_argument naming the argument that does not fit
  // \return what the queries see; a view of the call
  detail::AttentionInputs<Scalar> check_arguments(const Input& x, const Call& call) const {
    require_shape("x", x.dimensions(), {-1, -1, config().dim});
    return inputs_of(x.dimension(0), x.dimension(1), call.mask, bias_of(call.attn_bias),
                     call.cu_seqlens, call.lengths);
  }
  detail::AttentionInputs<Scalar> inputs_of(Index batch, Index seqlen, const PaddingMask& mask,
                                            const Bias& attn_bias,
                                            std::span<const Index> cu_seqlens,
                                            std::span<const Index> lengths) const {
    detail::AttentionInputs<Scalar> inputs(Window(attention().config()), batch, config().heads,
                                           seqlen, mask, attn_bias);
    add_options(inputs);
    inputs.cut(cu_seqlens);
    inputs.shorten(lengths);
    return inputs;
  }

  // What the queries of a stream see, but for their place.
  detail::AttentionInputs<Scalar> shown_to(Index batch, const Bias& attn_bias) const {
    detail::AttentionInputs<Scalar> inputs(Window(attention().config()), batch, config().heads,
                                           bias_of(attn_bias));
    add_options(inputs);
    return inputs;
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
  template <typename Sequence, typename Complete>
  void stream_rows(const AnyDevice& device, Flow& flow, Sequence& sequence,
                   const detail::AttentionInputs<Scalar>& inputs, Index b, const Range& in,
                   const Range& out, const RowsView<const Scalar>& x, const std::uint8_t* masked,
                   const RowsView<Scalar>& y, Complete&& complete) const {
    flow.steps().use(*weights_);
    flow.stream(device, sequence, inputs, b, in, out, x, masked, y, complete);
  }

  std::shared_ptr<const Weights> weights_;
};

template <typename Scalar, typename Storage, typename Arithmetic>
void LocalMHA<Scalar, Storage, Arithmetic>::backward_into(Output grad_x, Workspace& workspace,
                                                          Parameters& gradients, const Saved& saved,
                                                          Input grad_y, Input x, const Call& call,
                                                          Tensor<Scalar, 3>* grad_attn_bias) const
  requires detail::Trainable<Scalar, Storage, Arithmetic>
{
  check_arguments(x, call);
  const Bias& attn_bias = call.attn_bias;
  require_shape("grad_x", grad_x.dimensions(), x.dimensions());
  require_shape("grad_y", grad_y.dimensions(), x.dimensions());
  detail::require_apart("grad_x", grad_x, "grad_y", grad_y);
  detail::require_apart("grad_x", grad_x, "x", x);
  saved.check_arguments(*weights_, x, call);
  weights_->require_same_shapes(gradients);
  if (grad_attn_bias != nullptr) {
    if (!attn_bias) reject("grad_attn_bias", "null, because there is no attn_bias", "a tensor");
    require_shape("grad_attn_bias", TensorView<Scalar, 3>(*grad_attn_bias).dimensions(),
                  attn_bias->dimensions());
  }
  if (x.size() == 0) return;
  const LocalAttentionCall<Scalar> of_forward =
      saved.call.with_tensors_of(Saved::of_attention(call));
  const auto inputs = inputs_of(x.dimension(0), x.dimension(1), of_forward.mask, bias_of(attn_bias),
                                of_forward.cu_seqlens, of_forward.lengths);
  auto& grad_bias = workspace.grad_bias_;
  const bool wants_bias = config().relative_bias || grad_attn_bias != nullptr;
  grad_bias.prepare(wants_bias ? bias_of(attn_bias) : Bias(), config().heads);
  detail::LayerBackward<Scalar, Storage, Arithmetic>(*weights_, saved, workspace.backward_,
                                                     thread_count(call.device))
      .run(call.device, inputs, of_forward.training, x, grad_y, grad_x, gradients, grad_bias);
  if (grad_attn_bias != nullptr) grad_bias.add_to(*grad_attn_bias);
  if (config().relative_bias) grad_bias.add_to(gradients.relative_bias.data());
}

template <typename Scalar, typename Storage, typename Arithmetic>
Tensor<Scalar, 4> LocalMHA<Scalar, Storage, Arithmetic>::attention_probabilities(
    Input x, const Call& call) const {
  check_arguments(x, call);
  const auto [batch, seqlen, dim] = x.dimensions();
  constexpr Index most = Index{1} << 40;
  if (batch * seqlen > most / (config().heads * config().dim_head))
    reject("x", "at most 2^40 numbers of queries", to_string(x.dimensions()));
  Tensor<Scalar, 4> q(batch, config().heads, seqlen, config().dim_head);
  Tensor<Scalar, 4> k(batch, resolved_kv_heads(config()), seqlen, config().dim_head);
  Flow projections(*weights_, Window(attention().config()), seqlen);
  for (Index b = 0; b < batch; ++b) projections.queries_and_keys(x.sequence(b), b, q, k);
  LocalAttentionCall<Scalar> of_attention = Saved::of_attention(call);
  const RowMatrix<Scalar>& bias = weights_->relative_bias;
  if (config().relative_bias)
    of_attention.relative_bias.emplace(bias.data(), std::array{bias.rows(), bias.cols()});
  if (config().sinks)
    of_attention.sinks.emplace(weights_->sinks.data(), std::array{config().heads});
  return attention().attention_probabilities(q, k, of_attention);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
