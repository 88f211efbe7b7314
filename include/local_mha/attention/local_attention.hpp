// SPDX-License-Identifier: MIT
/// \file
/// LocalAttention: sliding-window attention of given queries, keys and values.
#pragma once

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>

#include <local_mha/attention/backward.hpp>
#include <local_mha/attention/bias_gradients.hpp>
#include <local_mha/attention/call.hpp>
#include <local_mha/attention/forward.hpp>
#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/placement.hpp>
#include <local_mha/attention/saved.hpp>
#include <local_mha/attention/score_functors.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

template <typename Scalar, typename Score>
struct AttentionAccess;

}  // namespace detail

/// Local attention: softmax(score(softmax_scale · q·kᵀ) + bias) · v over the keys that Window
/// shows.
///
/// \tparam Scalar float, double, or any type that Eigen computes with
/// \tparam Score what becomes of scores: that of the configuration, or a functor of your own, see
///         score_functors.hpp
/// \tparam Arithmetic what q, k, probabilities and v are multiplied as: with Eigen::bfloat16, they
///         are rounded as LocalMHA says
template <typename Scalar, typename Score = ConfiguredScore, typename Arithmetic = Scalar>
class LocalAttention {
  static_assert(can_multiply<Scalar, Arithmetic, Arithmetic>,
                "products are of what is computed with, or of float as Eigen::bfloat16");
  friend detail::AttentionAccess<Scalar, Score>;
  using View = TensorView<const Scalar, 4>;
  using Forward = detail::AttentionForward<Scalar, Arithmetic>;

 public:
  /// A view of an attention bias, or none.
  using Bias = std::optional<TensorView<const Scalar, 3>>;
  /// What a call is given beside q, k and v.
  using Call = LocalAttentionCall<Scalar>;

  /// Sequences that come bit by bit, whose keys and values are kept as Storage: see
  /// local_attention_stream.hpp.
  template <typename Storage>
  class StreamOf;
  /// A stream that keeps keys and values as they are multiplied.
  using Stream = StreamOf<Arithmetic>;

  /// Gradients of what is added to scores.
  using BiasGradients = detail::BiasGradients<Scalar>;

  /// Memory for calls of forward_into() and backward_into().
  class Workspace {
   private:
    friend LocalAttention;

    Forward forward_;
    detail::AttentionBackward<Scalar, Arithmetic> backward_;
    BiasGradients grad_bias_;
  };

  /// An attention; it has no weights.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit LocalAttention(const LocalAttentionConfig& config, const Score& score = {})
      : made_(std::make_shared<const Made>(config, score)) {}

  // One that was moved from would compute nothing: moving is copying, which shares all there is.
  LocalAttention(const LocalAttention&) = default;
  LocalAttention& operator=(const LocalAttention&) = default;

  /// What it was made with.
  const LocalAttentionConfig& config() const { return made_->config; }

  /// The same whose keys, as place_keys() leaves them, a Storage can hold.
  template <typename Storage>
  LocalAttention keys_as() const {
    LocalAttention result = *this;
    constexpr int max_exponent = std::numeric_limits<Storage>::max_exponent;
    if constexpr (max_exponent < std::numeric_limits<Scalar>::max_exponent) {
      const auto made = std::make_shared<Made>(*made_);
      made->placement = detail::Placement<Scalar>(config(), max_exponent);
      result.made_ = made;
    }
    return result;
  }

  /// Attends: each query's mean of the values that it sees, weighted by the softmax of its scores.
  /// \param q `[B, H, N, D]`
  /// \param k, v `[B, H, N, D]`, or of fewer heads, `[B, H_kv, N, D]`, where `H_kv` divides `H`:
  ///        head `h` of `q` reads head `⌊h / (H/H_kv)⌋`. With shared_qk, `k` is the same as `q`
  /// \return `[B, H, N, D]`; 0 for a query that sees no key
  /// \throws std::invalid_argument naming the argument that does not fit
  Tensor<Scalar, 4> forward(View q, View k, View v, const Call& call = {}) const {
    const auto inputs = check_arguments(q, k, v, call);
    Tensor<Scalar, 4> out(q.dimensions());
    // Of a workspace, a program that goes forward alone compiles no more than this.
    Forward room;
    attend(room, inputs, q, k, v, call, out.data(), nullptr, nullptr);
    return out;
  }

  /// The same with mask and bias in a row.
  Tensor<Scalar, 4> forward(View q, View k, View v, const PaddingMask& mask,
                            const Bias& attn_bias) const {
    return forward(q, k, v, {.mask = mask, .attn_bias = attn_bias});
  }

  /// The same into given memory. Allocates nothing if the workspace was last used for the same
  /// configuration, window and dim_head, and before for sequences as long and as many threads.
  /// \param out `[B, H, N, D]`, must not overlap the inputs
  /// \param workspace for one call at a time
  void forward_into(TensorView<Scalar, 4> out, Workspace& workspace, View q, View k, View v,
                    const Call& call = {}) const {
    const auto inputs = check_arguments(q, k, v, call);
    require_shape("out", out.dimensions(), q.dimensions());
    detail::require_apart("out", out, "q", q);
    detail::require_apart("out", out, "k", k);
    detail::require_apart("out", out, "v", v);
    attend(workspace.forward_, inputs, q, k, v, call, out.data(), nullptr, nullptr);
  }

  /// What forward() must keep for backward(), beside its inputs; and gradients of what it takes.
  using Saved = detail::SavedAttention<Scalar>;
  /// Gradients of q, k, v and of what a call looks at.
  using Gradients = detail::AttentionGradients<Scalar>;

  /// forward() that keeps what backward() needs.
  Saved forward_saving(View q, View k, View v, const Call& call = {}) const {
    const auto inputs = check_arguments(q, k, v, call);
    Saved saved = Saved::of(config(), q, k, v, call);
    saved.of_operands = !std::is_same_v<Scalar, Arithmetic>;
    Forward room;
    attend(room, inputs, q, k, v, call, saved.out.data(), saved.lse.data(), saved.lse_rest.data());
    return saved;
  }

  /// The same with mask and bias in a row.
  Saved forward_saving(View q, View k, View v, const PaddingMask& mask,
                       const Bias& attn_bias) const {
    return forward_saving(q, k, v, {.mask = mask, .attn_bias = attn_bias});
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_out`.
  ///
  /// The probabilities are computed again, tile by tile: scratch memory does not depend on `N`,
  /// gradients of the bias for each head apart. A query that sees no key, and a key that nobody
  /// sees, has the gradient 0. With shared_qk, `k` is taken as an input of its own: add its
  /// gradient to that of `q` if they are one. A Score of one's own must have a derivative.
  /// \param saved what forward_saving() returned. It holds what the call was given but for tensors
  ///        of Scalars: in `call`, the rest may be left out
  /// \param grad_out `[B, H, N, D]`
  /// \param q, k, v, call what forward_saving() was given; the device may be another
  /// \throws std::invalid_argument naming the argument that does not fit, or is not that of
  ///         forward_saving() (tensors are known by a sample of their numbers)
  Gradients backward(const Saved& saved, View grad_out, View q, View k, View v,
                     const Call& call = {}) const {
    Gradients gradients;
    Workspace workspace;
    backward_into(gradients, workspace, saved, grad_out, q, k, v, call);
    return gradients;
  }

  /// The same with mask and bias in a row.
  Gradients backward(const Saved& saved, View grad_out, View q, View k, View v,
                     const PaddingMask& mask, const Bias& attn_bias) const {
    return backward(saved, grad_out, q, k, v, {.mask = mask, .attn_bias = attn_bias});
  }

  /// The same into tensors that may be there already, and with buffers that are kept: allocates
  /// nothing where forward_into() would not, if the gradients have their shapes.
  /// \param gradients become what backward() returns; their memory is used again if they have the
  ///        inputs' shape
  /// \param workspace for one call at a time
  void backward_into(Gradients& gradients, Workspace& workspace, const Saved& saved, View grad_out,
                     View q, View k, View v, const Call& call = {}) const;

  /// Allocates what differentiate() of the same arguments uses.
  template <typename Multiplied>
  void prepare_differentiate(const AnyDevice& device,
                             detail::AttentionBackward<Scalar, Multiplied>& room,
                             const detail::AttentionInputs<Scalar>& inputs, Index batch,
                             Index dim_head, const BiasGradients& grad_bias) const {
    room.prepare(device, config(), made_->placement, inputs, batch, dim_head, grad_bias);
  }

  /// backward() of heads that lie elsewhere than in tensors: the calls of AttentionBackwardFlow.
  /// \tparam Multiplied the Arithmetic of the products, of a layer's that is not the attention's
  /// \param room buffers; they hold the gradients of sinks then
  /// \param head_of `head_of(s, h)` gives the blocks of head `h` of sequence `s`
  template <typename Multiplied, typename HeadOf>
  void differentiate(const AnyDevice& device, detail::AttentionBackward<Scalar, Multiplied>& room,
                     const detail::AttentionInputs<Scalar>& inputs, Index batch, Index dim_head,
                     HeadOf&& head_of, BiasGradients& grad_bias,
                     const std::optional<Training>& training) const {
    static_assert(detail::HeldScore<Scalar, Score>::differentiable,
                  "backward() needs the derivative of the score functor: give it a member "
                  "derivative(), or see local_mha::with_derivative()");
    room.run(device, config(), made_->placement, inputs, batch, dim_head, head_of, grad_bias,
             training);
  }

  /// The probabilities with which forward() weights the values, to look at: memory `O(N²)`.
  /// \return `[B, H, N, N]`, `[query][key]`; 0 where a query does not see a key
  Tensor<Scalar, 4> attention_probabilities(View q, View k, const Call& call = {}) const;

  /// Factor of the scores for heads of `dim_head` channels.
  /// \throws std::invalid_argument if dim_head is out of range
  double softmax_scale(Index dim_head) const {
    detail::require_dim_head("dim_head", dim_head);
    return made_->placement.softmax_scale(dim_head);
  }

  /// The same for scores in units of log 2, which the kernels take.
  Scalar score_scale(Index dim_head) const { return Scalar(softmax_scale(dim_head) * log2_e); }

  /// Null: none.
  const RotaryEmbedding<Scalar>* rotary() const { return made_->placement.rotary(); }
  /// What becomes of scores; valid as long as this.
  ScoreFunction<Scalar> score() const { return made_->score.function(); }

  /// Makes what the kernel takes: scales queries, normalizes keys if they are shared_qk, and turns
  /// both by their place.
  /// \param block `[dim_head][block_rows]`, in place, from the lanes on that count
  /// \param first position of the first of them
  template <int Parts = 1>
  void place_queries(Index dim_head, Scalar* block, Index first) const {
    made_->placement.template place_queries<Parts>(dim_head, block, first);
  }
  /// The same of keys.
  template <int Parts = 1>
  void place_keys(Index dim_head, Scalar* block, Index first) const {
    made_->placement.template place_keys<Parts>(dim_head, block, first);
  }

  /// The steps of the rotary embedding in sequences of `seqlen` rows.
  std::optional<RotarySteps<Scalar>> rotary_steps(const Window& window, Index seqlen) const {
    return made_->placement.steps(window, seqlen);
  }

 private:
  static const LocalAttentionConfig& checked(const LocalAttentionConfig& config) {
    validate(config);
    return config;
  }

  // \param lse, lse_rest null, or `[B, H, N]`
  void attend(Forward& room, const detail::AttentionInputs<Scalar>& inputs, const View& q,
              const View& k, const View& v, const Call& call, Scalar* out, Scalar* lse,
              Scalar* lse_rest) const {
    const auto [batch, heads, seqlen, dim_head] = q.dimensions();
    inputs.clear_other_rows(heads, dim_head, Scalar(0), out);
    if (lse != nullptr) {
      inputs.clear_other_rows(heads, 1, -std::numeric_limits<Scalar>::infinity(), lse);
      inputs.clear_other_rows(heads, 1, Scalar(0), lse_rest);
    }
    room.run(call.device, config(), made_->placement, inputs,
             {q.data(), k.data(), v.data(), seqlen * dim_head, batch, seqlen, dim_head, dim_head,
              out, lse, lse_rest},
             call.training);
  }

  detail::AttentionInputs<Scalar> check_arguments(const View& q, const View& k, const View& v,
                                                  const Call& call) const {
    require_shape("q", q.dimensions(), {-1, -1, -1, config().dim.value_or(-1)});
    const auto [batch, heads, seqlen, dim_head] = q.dimensions();
    if (dim_head < 1) reject("q", "at least 1 channel in [B, H, N, D]", to_string(q.dimensions()));
    require_shape("k", k.dimensions(), {batch, k.dimension(1), seqlen, dim_head});
    require_shape("v", v.dimensions(), k.dimensions());
    return inputs_of(batch, heads, k.dimension(1), seqlen, call);
  }
  detail::AttentionInputs<Scalar> inputs_of(Index batch, Index heads, Index kv_heads, Index seqlen,
                                            const Call& call) const {
    const Window rows = window(call);
    detail::AttentionInputs<Scalar> inputs(rows, batch, heads, seqlen, call.mask,
                                           bias_of(rows, heads, call));
    add_options(inputs, kv_heads, call);
    return inputs;
  }

  // What is beside masks and biases.
  void add_options(detail::AttentionInputs<Scalar>& inputs, Index kv_heads,
                   const Call& call) const {
    inputs.share_keys(kv_heads);
    if (config().shared_qk && kv_heads != inputs.heads())
      reject("k", "as many heads as q has, because they are the same (shared_qk)", kv_heads);
    inputs.cut(call.cu_seqlens);
    inputs.shorten(call.lengths);
    inputs.add_global(call.global_rows);
    inputs.add_sinks(call.sinks);
    made_->score.check_heads(inputs.heads());
    inputs.set_score(score());
  }

  // The bias of all places of a window: a relative one is that of windows of one position.
  Bias bias_of(const Window& window, Index heads, const Call& call) const {
    if (config().token_window && call.attn_bias)
      reject("attn_bias", "none, because a token window takes a relative_bias", "one");
    if (!call.relative_bias) return call.attn_bias;
    if (!config().token_window || !config().token_window->bounded())
      reject("relative_bias", "none, because that is for token windows with bounded ends", "one");
    require_shape("relative_bias", call.relative_bias->dimensions(), {-1, window.look_around()});
    const auto [biases, cols] = call.relative_bias->dimensions();
    if (biases != heads && biases != 1)
      reject("relative_bias", "a first dimension of " + std::to_string(heads) + " (heads) or 1",
             biases);
    return TensorView<const Scalar, 3>(call.relative_bias->data(), {biases, 1, cols});
  }

  Window window(const Call& call) const { return detail::window_of(config(), call); }

  // All that a call reads.
  struct Made {
    Made(const LocalAttentionConfig& given, const Score& of_scores)
        : config(checked(given)), placement(config), score(config, of_scores) {}

    LocalAttentionConfig config;
    detail::Placement<Scalar> placement;
    detail::HeldScore<Scalar, Score> score;
  };

  std::shared_ptr<const Made> made_;
};

template <typename Scalar, typename Score, typename Arithmetic>
Tensor<Scalar, 4> LocalAttention<Scalar, Score, Arithmetic>::attention_probabilities(
    View q, View k, const Call& call) const {
  const auto inputs = check_arguments(q, k, k, call);
  const auto [batch, heads, seqlen, dim_head] = q.dimensions();
  constexpr Index most = Index{1} << 40;
  if (seqlen > 0 && batch * heads * seqlen > most / seqlen)
    reject("q", "sequences of which [B, H, N, N] has at most 2^40 numbers",
           to_string(q.dimensions()));
  // With the unit vectors as values, the output is the weights.
  const RowMatrix<Scalar> unit = RowMatrix<Scalar>::Identity(seqlen, seqlen);
  Tensor<Scalar, 4> out(batch, heads, seqlen, seqlen);
  inputs.clear_other_rows(heads, seqlen, Scalar(0), out.data());
  Forward room;
  room.run(call.device, config(), made_->placement, inputs,
           {q.data(), k.data(), unit.data(), 0, batch, seqlen, dim_head, seqlen, out.data()},
           call.training);
  return out;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

#include <local_mha/attention/local_attention_backward.hpp>
