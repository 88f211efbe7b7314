// SPDX-License-Identifier: MIT
/// \file
/// LocalAttention: sliding-window attention of given queries, keys and values.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include <local_mha/attention/backward_flow.hpp>
#include <local_mha/attention/call.hpp>
#include <local_mha/attention/kernel.hpp>
#include <local_mha/attention/narrow_kernel.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/rows.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// What a call sees of its sequences: checked once, then asked for each head.
template <typename Scalar>
class AttentionInputs {
 public:
  using Bias = std::optional<TensorView<const Scalar, 3>>;

  /// \param mask must outlive this
  /// \throws std::invalid_argument if the mask or the bias does not fit
  AttentionInputs(const Window& window, Index batch, Index heads, Index seqlen,
                  const PaddingMask& mask, const Bias& attn_bias)
      : AttentionInputs(window, batch, heads, attn_bias) {
    seqlen_ = seqlen;
    mask_ = &mask;
    if (mask) require_shape("mask", mask.shape(), {batch, seqlen});
  }

  /// Of streams, whose rows and masks come bit by bit.
  AttentionInputs(const Window& window, Index batch, Index heads, const Bias& attn_bias)
      : window_(window), heads_(heads), attn_bias_(attn_bias) {
    if (attn_bias) {
      require_shape("attn_bias", attn_bias->dimensions(),
                    {-1, window.size(), window.look_around()});
      const Index biases = attn_bias->dimension(0);
      if (biases != batch * heads && biases != heads && biases != 1)
        reject("attn_bias",
               "a first dimension of " + std::to_string(batch * heads) + " (batch x heads), " +
                   std::to_string(heads) + " (heads) or 1",
               biases);
    }
  }

  /// What the kernel gets for head `h` of sequence `b`, but for rotary and dropout.
  AttentionHead<Scalar> head(Index b, Index h) const {
    AttentionHead<Scalar> head;
    head.window = &window_;
    head.seqlen = seqlen_;
    head.queries = {0, seqlen_};
    head.masked = mask_ != nullptr ? mask_->row(b) : nullptr;
    head.unmasked = unmasked(head.masked);
    // A padding mask's only say is where its sequence ends.
    if (head.masked != nullptr &&
        std::none_of(head.masked + head.unmasked.begin, head.masked + head.unmasked.end,
                     [](std::uint8_t masked) { return masked != 0; }))
      head.masked = nullptr;
    if (attn_bias_) {
      const Index bias = (b * heads_ + h) % attn_bias_->dimension(0);
      head.attn_bias = attn_bias_->data() + bias * window_.size() * window_.look_around();
    }
    return head;
  }

  Index heads() const { return heads_; }
  const Window& window() const { return window_; }
  /// The bias, for what outlives it.
  std::optional<Tensor<Scalar, 3>> copy_of_bias() const {
    if (!attn_bias_) return std::nullopt;
    return Eigen::TensorMap<const Tensor<Scalar, 3>>(attn_bias_->data(), attn_bias_->dimensions());
  }

 private:
  // From the first to the last key that is not masked.
  Range unmasked(const std::uint8_t* masked) const {
    Range keys{0, seqlen_};
    if (masked == nullptr) return keys;
    while (keys.begin < keys.end && masked[keys.begin] != 0) ++keys.begin;
    while (keys.begin < keys.end && masked[keys.end - 1] != 0) --keys.end;
    return keys;
  }

  Window window_;
  Index heads_;
  Index seqlen_ = 0;
  const PaddingMask* mask_ = nullptr;
  Bias attn_bias_;
};

}  // namespace detail

/// Local attention: softmax(softmax_scale · q·kᵀ + attn_bias) · v over the keys that Window shows.
///
/// \tparam Scalar float, double, or any type that Eigen computes with
template <typename Scalar>
class LocalAttention {
  class Flow;

 public:
  using Bias = std::optional<TensorView<const Scalar, 3>>;

  /// Sequences that come bit by bit: see local_attention_stream.hpp.
  class Stream;

  /// Gradients of an attention bias: a bias that heads share is summed for each of them alone, so
  /// that the order of the sum does not depend on threads.
  class BiasGradients {
   public:
    /// Becomes 0. Memory is used again.
    /// \param attn_bias null: no gradients
    void prepare(const Bias& attn_bias, Index heads) {
      biases_ = attn_bias ? attn_bias->dimension(0) : 0;
      number_ = attn_bias ? (std::max)(biases_, heads) : 0;
      size_ = attn_bias ? attn_bias->dimension(1) * attn_bias->dimension(2) : 0;
      sums_.assign(static_cast<std::size_t>(number_ * size_), Scalar(0));
    }

    explicit operator bool() const { return biases_ > 0; }
    /// Sums that are apart: head `b·H + h` adds to that of its number modulo theirs.
    Index number() const { return number_; }
    /// Null if there are no gradients.
    Scalar* sum(Index i) { return biases_ > 0 ? sums_.data() + i * size_ : nullptr; }

    /// \param to in the shape of the bias
    void add_to(Tensor<Scalar, 3>& to) const {
      if (biases_ == 0) return;
      for (Index i = 0; i < number_; ++i)
        for (Index c = 0; c < size_; ++c)
          to.data()[i % biases_ * size_ + c] += sums_[static_cast<std::size_t>(i * size_ + c)];
    }

   private:
    Index biases_ = 0;
    Index number_ = 0;
    Index size_ = 0;
    BlockBuffer<Scalar> sums_;
  };

  /// Room for calls of forward_into() and backward_into().
  class Workspace {
   private:
    friend LocalAttention;

    void prepare(const LocalAttention& attention, const Window& window, Index seqlen,
                 Index dim_head, Index dim_value, Index workers) {
      detail::provide(
          flows_, workers,
          [&](const Flow& flow) {
            return flow.fits(attention, window, seqlen, dim_head, dim_value);
          },
          [&] { return Flow(attention, window, seqlen, dim_head, dim_value); });
      for (Flow& flow : flows_) flow.use(attention, seqlen);
    }
    Flow& flow(Index worker) { return flows_[static_cast<std::size_t>(worker)]; }

    void prepare_backward(const LocalAttention& attention, const Window& window, Index seqlen,
                          Index dim_head, Index workers) {
      // Not copied where it is the same: frequencies take memory.
      if (!shape_back_ || shape_back_->config != attention.config_ ||
          shape_back_->window != window || shape_back_->dim_head != dim_head) {
        flows_back_.clear();
        shape_back_ = BackwardShape{attention.config_, window, dim_head};
      }
      detail::provide(
          flows_back_, workers, [&](const auto& flow) { return flow.serves(seqlen); },
          [&] {
            return AttentionBackwardFlow<Scalar>(window, seqlen, dim_head, dim_head,
                                                 attention.softmax_scale(dim_head),
                                                 attention.rotary_steps(window, seqlen));
          });
    }
    AttentionBackwardFlow<Scalar>& flow_back(Index worker) {
      return flows_back_[static_cast<std::size_t>(worker)];
    }

    struct BackwardShape {
      LocalAttentionConfig config;
      Window window;
      Index dim_head;
    };

    std::vector<Flow> flows_;
    std::optional<BackwardShape> shape_back_;
    std::vector<AttentionBackwardFlow<Scalar>> flows_back_;
    BiasGradients grad_bias_;
  };

  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit LocalAttention(const LocalAttentionConfig& config) : config_(config) {
    validate(config);
    if (!config.dim || !config.use_rotary_pos_emb) return;
    std::optional<double> base;
    if (config.use_xpos)
      base = config.xpos_scale_base.value_or(std::sqrt(static_cast<double>(*config.dim)));
    rotary_.emplace(*config.dim, base, config.rotary);
  }

  LocalAttention(const LocalAttention&) = default;
  LocalAttention(LocalAttention&&) = default;
  /// If it throws, this is as it was.
  LocalAttention& operator=(const LocalAttention& other) { return *this = LocalAttention(other); }
  LocalAttention& operator=(LocalAttention&&) = default;
  ~LocalAttention() = default;

  const LocalAttentionConfig& config() const { return config_; }

  /// \param q, k, v `[B, H, N, D]`; with shared_qk, `k` is the same as `q`
  /// \param mask keys that nobody attends, `[B, N]`
  /// \param attn_bias `[H or 1, w, (1 + lb + lf)·w]`, or `[B·H, …]`, one for each sequence; added
  ///        to the scaled scores: query `i` takes row `i mod w`, and key `j` column
  ///        `j − (i/w − lb)·w`
  /// \return `[B, H, N, D]`; 0 for a query that sees no key
  /// \throws std::invalid_argument naming the argument that does not fit
  Tensor<Scalar, 4> forward(TensorView<const Scalar, 4> q, TensorView<const Scalar, 4> k,
                            TensorView<const Scalar, 4> v, const PaddingMask& mask = {},
                            const Bias& attn_bias = {}, const LocalAttentionCall& call = {}) const {
    return forward(Eigen::DefaultDevice(), q, k, v, mask, attn_bias, call);
  }

  /// The same on the threads of a device; the same bits for any number of them.
  template <ThreadDevice Device>
  Tensor<Scalar, 4> forward(const Device& device, TensorView<const Scalar, 4> q,
                            TensorView<const Scalar, 4> k, TensorView<const Scalar, 4> v,
                            const PaddingMask& mask = {}, const Bias& attn_bias = {},
                            const LocalAttentionCall& call = {}) const {
    check_arguments(q, k, v, mask, attn_bias, call);
    Tensor<Scalar, 4> out(q.dimension(0), q.dimension(1), q.dimension(2), q.dimension(3));
    Workspace workspace;
    forward_into(device, out, workspace, q, k, v, mask, attn_bias, call);
    return out;
  }

  /// The same into given memory. Allocates nothing if the workspace was last used for the same
  /// configuration, window and dim_head, and before for sequences as long and as many threads.
  /// \param out `[B, H, N, D]`, must not overlap the inputs
  /// \param workspace for one call at a time
  template <ThreadDevice Device>
  void forward_into(const Device& device, TensorView<Scalar, 4> out, Workspace& workspace,
                    TensorView<const Scalar, 4> q, TensorView<const Scalar, 4> k,
                    TensorView<const Scalar, 4> v, const PaddingMask& mask = {},
                    const Bias& attn_bias = {}, const LocalAttentionCall& call = {}) const {
    const auto inputs = check_arguments(q, k, v, mask, attn_bias, call);
    require_shape("out", out.dimensions(), q.dimensions());
    detail::require_apart("out", out, "q", q);
    detail::require_apart("out", out, "k", k);
    detail::require_apart("out", out, "v", v);
    const Index head_size = q.dimension(2) * q.dimension(3);
    attend(
        device, workspace, inputs, q, k, q.dimension(3),
        [&](Index head) {
          return Values{v.data() + head * head_size, out.data() + head * head_size, nullptr};
        },
        call.training);
  }
  void forward_into(TensorView<Scalar, 4> out, Workspace& workspace, TensorView<const Scalar, 4> q,
                    TensorView<const Scalar, 4> k, TensorView<const Scalar, 4> v,
                    const PaddingMask& mask = {}, const Bias& attn_bias = {},
                    const LocalAttentionCall& call = {}) const {
    forward_into(Eigen::DefaultDevice(), out, workspace, q, k, v, mask, attn_bias, call);
  }

  /// What forward() must keep for backward(), beside its inputs.
  struct Saved {
    Tensor<Scalar, 4> out;       ///< what forward() returns
    Tensor<Scalar, 3> lse;       ///< `[B, H, N]`: logarithms of the softmax' denominator
    Tensor<Scalar, 3> lse_rest;  ///< `[B, H, N]`: what they round off, see log_sum_exp.hpp
    /// Of the configuration and the call; inputs are known again by a sample of their numbers.
    LocalAttentionConfig config = {};
    detail::SavedCall<Scalar> call = {};
    std::array<detail::Sample<Scalar>, 3> inputs = {};
  };

  /// Gradients of what forward() takes, in the same shapes.
  struct Gradients {
    Tensor<Scalar, 4> q;
    Tensor<Scalar, 4> k;
    Tensor<Scalar, 4> v;
    std::optional<Tensor<Scalar, 3>> attn_bias;  ///< if there was one
  };

  /// forward() that keeps what backward() needs.
  template <ThreadDevice Device>
  Saved forward_saving(const Device& device, TensorView<const Scalar, 4> q,
                       TensorView<const Scalar, 4> k, TensorView<const Scalar, 4> v,
                       const PaddingMask& mask = {}, const Bias& attn_bias = {},
                       const LocalAttentionCall& call = {}) const {
    const auto inputs = check_arguments(q, k, v, mask, attn_bias, call);
    const auto [batch, heads, seqlen, dim_head] = q.dimensions();
    Saved saved{Tensor<Scalar, 4>(batch, heads, seqlen, dim_head),
                Tensor<Scalar, 3>(batch, heads, seqlen), Tensor<Scalar, 3>(batch, heads, seqlen),
                config_};
    saved.call.take(mask, attn_bias, call);
    for (std::size_t i = 0; i < 3; ++i)
      saved.inputs[i].take(detail::numbers_of(*std::array{&q, &k, &v}[i]));
    const auto values = [&, n = seqlen, size = seqlen * dim_head](Index head) {
      return Values{v.data() + head * size, saved.out.data() + head * size,
                    saved.lse.data() + head * n, saved.lse_rest.data() + head * n};
    };
    Workspace workspace;
    attend(device, workspace, inputs, q, k, dim_head, values, call.training);
    return saved;
  }
  Saved forward_saving(TensorView<const Scalar, 4> q, TensorView<const Scalar, 4> k,
                       TensorView<const Scalar, 4> v, const PaddingMask& mask = {},
                       const Bias& attn_bias = {}, const LocalAttentionCall& call = {}) const {
    return forward_saving(Eigen::DefaultDevice(), q, k, v, mask, attn_bias, call);
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_out`.
  ///
  /// The probabilities are computed again, tile by tile: scratch memory does not depend on `N`,
  /// gradients of the bias for each head apart. A query that sees no key, and a key that nobody
  /// sees, has the gradient 0. With shared_qk, `k` is taken as an input of its own: add its
  /// gradient to that of `q` if they are one.
  /// \param saved what forward_saving() returned. It holds the mask and what else the call was
  ///        given: here, they may be left out
  /// \param grad_out `[B, H, N, D]`
  /// \param q, k, v, attn_bias what forward_saving() was given
  /// \throws std::invalid_argument naming the argument that does not fit, or is not that of
  ///         forward_saving() (tensors are known by a sample of their numbers)
  template <ThreadDevice Device>
  Gradients backward(const Device& device, const Saved& saved, TensorView<const Scalar, 4> grad_out,
                     TensorView<const Scalar, 4> q, TensorView<const Scalar, 4> k,
                     TensorView<const Scalar, 4> v, const PaddingMask& mask = {},
                     const Bias& attn_bias = {}, const LocalAttentionCall& call = {}) const {
    Gradients gradients;
    Workspace workspace;
    backward_into(device, gradients, workspace, saved, grad_out, q, k, v, mask, attn_bias, call);
    return gradients;
  }
  Gradients backward(const Saved& saved, TensorView<const Scalar, 4> grad_out,
                     TensorView<const Scalar, 4> q, TensorView<const Scalar, 4> k,
                     TensorView<const Scalar, 4> v, const PaddingMask& mask = {},
                     const Bias& attn_bias = {}, const LocalAttentionCall& call = {}) const {
    return backward(Eigen::DefaultDevice(), saved, grad_out, q, k, v, mask, attn_bias, call);
  }

  /// The same into tensors that may be there already, and in room that is kept: allocates nothing
  /// where forward_into() would not, if the gradients have their shapes.
  /// \param gradients become what backward() returns; their memory is used again if they have the
  ///        inputs' shape
  /// \param workspace for one call at a time
  template <ThreadDevice Device>
  void backward_into(const Device& device, Gradients& gradients, Workspace& workspace,
                     const Saved& saved, TensorView<const Scalar, 4> grad_out,
                     TensorView<const Scalar, 4> q, TensorView<const Scalar, 4> k,
                     TensorView<const Scalar, 4> v, const PaddingMask& mask = {},
                     const Bias& attn_bias = {}, const LocalAttentionCall& call = {}) const;

  /// Allocates what differentiate() of the same arguments uses.
  template <ThreadDevice Device>
  void prepare_differentiate(const Device& device, Workspace& workspace,
                             const detail::AttentionInputs<Scalar>& inputs, Index batch,
                             Index seqlen, Index dim_head, const BiasGradients& grad_bias) const {
    const Index tasks = grad_bias ? grad_bias.number() : batch * inputs.heads();
    workspace.prepare_backward(*this, inputs.window(), seqlen, dim_head,
                               (std::min)(thread_count(device), tasks));
  }

  /// backward() of heads that lie elsewhere than in tensors: the calls of AttentionBackwardFlow.
  /// \param head_of `head_of(b·H + h)` gives the head's blocks
  template <ThreadDevice Device, typename HeadOf>
  void differentiate(const Device& device, Workspace& workspace,
                     const detail::AttentionInputs<Scalar>& inputs, Index batch, Index seqlen,
                     Index dim_head, HeadOf&& head_of, BiasGradients& grad_bias,
                     const std::optional<Training>& training) const {
    const Index heads = inputs.heads();
    // What adds to one gradient of the bias does so in the order of the batch.
    const Index tasks = grad_bias ? grad_bias.number() : batch * heads;
    const Index workers = (std::min)(thread_count(device), tasks);
    prepare_differentiate(device, workspace, inputs, batch, seqlen, dim_head, grad_bias);
    parallel_for(device, workers, tasks, [&](Index worker, Index task) {
      for (Index head = task; head < batch * heads; head += tasks) {
        const Index b = head / heads;
        const Index h = head % heads;
        AttentionHead<Scalar> seen = inputs.head(b, h);
        seen.shared_qk = config_.shared_qk;
        const std::optional<Dropout<Scalar>> dropout = dropout_of(training, head);
        seen.dropout = dropout ? &*dropout : nullptr;
        workspace.flow_back(worker).run(rotary(), seen, head_of(head), grad_bias.sum(task));
      }
    });
  }

  /// The probabilities with which forward() weights the values, to look at: memory `O(N²)`.
  /// \return `[B, H, N, N]`, `[query][key]`; 0 where a query does not see a key
  Tensor<Scalar, 4> attention_probabilities(TensorView<const Scalar, 4> q,
                                            TensorView<const Scalar, 4> k,
                                            const PaddingMask& mask = {},
                                            const Bias& attn_bias = {},
                                            const LocalAttentionCall& call = {}) const;

  /// Factor of the scores for heads of `dim_head` channels.
  /// \throws std::invalid_argument if dim_head is out of range
  double softmax_scale(Index dim_head) const {
    detail::require_dim_head("dim_head", dim_head);
    return config_.scale.value_or(1 / std::sqrt(static_cast<double>(dim_head)));
  }

  /// The same for scores in units of log 2, which the kernels take.
  Scalar score_scale(Index dim_head) const { return Scalar(softmax_scale(dim_head) * log2_e); }

  /// Null: none.
  const RotaryEmbedding<Scalar>* rotary() const { return rotary_ ? &*rotary_ : nullptr; }

  /// Makes what the kernel takes: scales queries, normalizes keys if they are shared_qk, and turns
  /// both by their place.
  /// \param block `[dim_head][block_rows]`, in place
  /// \param first position of the block's first row
  void place_queries(Index dim_head, Scalar* block, Index first) const {
    scale_block(dim_head, score_scale(dim_head), block);
    if (rotary_) rotary_->apply_to_queries(block, first);
  }
  void place_keys(Index dim_head, Scalar* block, Index first) const {
    if (config_.shared_qk) l2_normalize(dim_head, block);
    if (rotary_) rotary_->apply_to_keys(block, first);
  }

  /// The steps of the rotary embedding in sequences of `seqlen` rows.
  std::optional<RotarySteps<Scalar>> rotary_steps(const Window& window, Index seqlen) const {
    if (!rotary_) return std::nullopt;
    return RotarySteps<Scalar>(*rotary_, window.ahead(), (std::min)(window.reach_behind(), seqlen),
                               (std::min)(window.reach_ahead(), seqlen));
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  // What one head attends to, `[N, dim_value]`, and what it makes of it.
  struct Values {
    const Scalar* v;
    Scalar* out;
    // [N] each, or null: not wanted.
    Scalar* lse = nullptr;
    Scalar* lse_rest = nullptr;
  };

  // One head on the way back, `[N, D]` each, as AttentionBackwardFlow takes it.
  struct RowsHead {
    Index seqlen;
    Index channels;
    bool shared_qk;
    const Scalar* q;
    const Scalar* k;
    const Scalar* v;
    const Scalar* grad_out;
    const Scalar* out;
    const Scalar* lse;
    const Scalar* lse_rest;
    Scalar* grad_q;
    Scalar* grad_k;
    Scalar* grad_v;

    void load_queries(Index block, Scalar* to) const { load(q, block, to); }
    void load_keys(Index block, Scalar* to) const {
      load(k, block, to);
      if (shared_qk) l2_normalize(channels, to);
    }
    void load_values(Index block, Scalar* to) const { load(v, block, to); }
    void load_grad_out(Index block, Scalar* to) const { load(grad_out, block, to); }
    void load_out(Index block, Scalar* to) const { load(out, block, to); }
    void load_lse(Index block, Scalar* to) const {
      const Index rows = rows_of(block);
      const auto load = [&](const Scalar* from, double others, Scalar* part) {
        std::copy_n(from + block * count, rows, part);
        std::fill(part + rows, part + count, Scalar(others));
      };
      load(lse, -std::numeric_limits<double>::infinity(), to);
      load(lse_rest, 0, to + count);
    }
    void store_grad_queries(Index block, Scalar* from) const { store(grad_q, block, from); }
    void store_grad_keys(Index block, Scalar* from, Scalar* room) const {
      if (shared_qk) {
        load(k, block, room);
        l2_normalize_backward(channels, room, from);
      }
      store(grad_k, block, from);
    }
    void store_grad_values(Index block, Scalar* from) const { store(grad_v, block, from); }

    void add_upcoming(Index queries, Index keys, Index finished_keys, Upcoming<Scalar>& to) const {
      const auto add = [&](const Scalar* rows, Index block) {
        if (block * count < seqlen)
          to.add(rows + block * count * channels, rows_of(block) * channels);
      };
      for (const Scalar* rows : {q, grad_out, out, static_cast<const Scalar*>(grad_q)})
        add(rows, queries);
      for (const Scalar* rows : {k, v}) add(rows, keys);
      for (const Scalar* rows : {grad_k, grad_v}) add(rows, finished_keys);
    }

    Index rows_of(Index block) const { return (std::min)(count, seqlen - block * count); }
    void load(const Scalar* rows, Index block, Scalar* to) const {
      const Scalar* first = rows + block * count * channels;
      load_block(channels, rows_of(block), [&](Index r) { return first + r * channels; }, to);
    }
    void store(Scalar* rows, Index block, const Scalar* from) const {
      Scalar* first = rows + block * count * channels;
      store_block(channels, rows_of(block), from, [&](Index r) { return first + r * channels; });
    }
  };

  std::optional<Dropout<Scalar>> dropout_of(const std::optional<Training>& training,
                                            Index head) const {
    if (!training || config_.dropout == 0) return std::nullopt;
    return Dropout<Scalar>(config_.dropout, training->seed, static_cast<std::uint32_t>(head));
  }

  // One head of one sequence: keys and values enter a ring just before they are seen.
  class Flow {
    using Blocks = Range;

   public:
    Flow(const LocalAttention& attention, const Window& window, Index seqlen, Index dim_head,
         Index dim_value)
        : attention_(&attention),
          config_(attention.config_),
          window_(window),
          made_for_(seqlen),
          seqlen_(seqlen),
          dim_head_(dim_head),
          dim_value_(dim_value),
          steps_(attention.rotary_steps(window, seqlen)) {
      const Index reach =
          (std::min)(window.reach_behind(), seqlen) + (std::min)(window.reach_ahead(), seqlen);
      const Index kept =
          (std::max<Index>)(1, (std::min)(ceil_div(reach, count) + 2, ceil_div(seqlen, count)));
      keys_ = Ring<Scalar>(dim_head, kept);
      // Values need no change, and are read as fast where they lie.
      if (Rows<Scalar>::fits(dim_value))
        value_rows_.emplace(dim_value, kept);
      else
        values_ = Ring<Scalar>(dim_value, kept);
      kernel_ = AttentionKernel<Scalar>(dim_head, (std::min)(reach + count, seqlen));
      queries_ = make_block_buffer<Scalar>(dim_head * count);
      out_ = make_block_buffer<Scalar>(padded_channels<Scalar>(dim_value) * count);
    }

    bool fits(const LocalAttention& attention, const Window& window, Index seqlen, Index dim_head,
              Index dim_value) const {
      return config_ == attention.config_ && window_ == window &&
             window.room_serves(made_for_, seqlen, 2 * count) && dim_head_ == dim_head &&
             dim_value_ == dim_value;
    }
    // The attention and the sequences of the runs that follow, which this fits.
    void use(const LocalAttention& attention, Index seqlen) {
      attention_ = &attention;
      seqlen_ = seqlen;
    }

    // The output of the queries `[begin, end)`, in blocks.
    void run(const detail::AttentionInputs<Scalar>& inputs, Index b, Index h, const Blocks& queries,
             const Scalar* q, const Scalar* k, const Values& values,
             const std::optional<Training>& training);

   private:
    // The rows of the next block of queries, and of the keys that it will be the first to see.
    void fetch_next(Index query, Index key, const Scalar* q, const Scalar* k,
                    const Values& values) {
      kernel_.upcoming().clear();
      const auto add = [&](const Scalar* rows, Index first, Index channels) {
        if (first < seqlen_)
          kernel_.upcoming().add(rows + first * channels,
                                 (std::min)(count, seqlen_ - first) * channels);
      };
      add(q, query, dim_head_);
      add(values.out, query, dim_value_);
      add(k, key, dim_head_);
      add(values.v, key, dim_value_);
    }

    void make_queries(Index first, const Scalar* q) {
      load(queries_.data(), first / count, dim_head_, q);
      attention_->place_queries(dim_head_, queries_.data(), first);
    }

    void make_keys(Index block, const Scalar* k) {
      load(keys_[block], block, dim_head_, k);
      attention_->place_keys(dim_head_, keys_[block], block * count);
    }

    void make_values(Index block, const Scalar* v) {
      if (value_rows_) return value_rows_->note_finite(block);
      load(values_[block], block, dim_value_, v);
      values_.note_finite(block);
    }

    // One block of the rows `[seqlen][channels]`.
    void load(Scalar* to, Index block, Index channels, const Scalar* from) const {
      const Scalar* first = from + block * count * channels;
      load_block(
          channels, (std::min)(count, seqlen_ - block * count),
          [&](Index r) { return first + r * channels; }, to);
    }

    const LocalAttention* attention_;
    LocalAttentionConfig config_;
    Window window_;
    Index made_for_;
    Index seqlen_;
    Index dim_head_;
    Index dim_value_;
    std::optional<RotarySteps<Scalar>> steps_;
    Ring<Scalar> keys_;
    Ring<Scalar> values_;
    std::optional<Rows<Scalar>> value_rows_;
    AttentionKernel<Scalar> kernel_;
    NarrowKernel<Scalar> narrow_kernel_;
    BlockBuffer<Scalar> queries_;
    BlockBuffer<Scalar> out_;
    BlockBuffer<Scalar> lse_ = make_block_buffer<Scalar>(2 * count);
  };

  // `values_of(head)` gives the Values of head `b·H + h`.
  template <ThreadDevice Device, typename ValuesOf>
  void attend(const Device& device, Workspace& workspace,
              const detail::AttentionInputs<Scalar>& inputs, const TensorView<const Scalar, 4>& q,
              const TensorView<const Scalar, 4>& k, Index dim_value, ValuesOf&& values_of,
              const std::optional<Training>& training) const {
    const auto [batch, heads, seqlen, dim_head] = q.dimensions();
    const Window& window = inputs.window();
    const Index reach =
        (std::min)(window.reach_behind(), seqlen) + (std::min)(window.reach_ahead(), seqlen);
    // A run makes its keys anew by transposing them, which costs next to nothing.
    const Index cheap_reach = ceil_div(reach, 16 * count);
    const Runs runs(batch * heads, ceil_div(seqlen, count), cheap_reach, thread_count(device));
    const Index workers = (std::min)(thread_count(device), runs.tasks());
    workspace.prepare(*this, window, seqlen, dim_head, dim_value, workers);
    const auto run = [&, head_size = seqlen * dim_head](Index worker, Index task) {
      const Index head = runs.sequence(task);
      workspace.flow(worker).run(inputs, head / inputs.heads(), head % inputs.heads(),
                                 {runs.begin(task), runs.end(task)}, q.data() + head * head_size,
                                 k.data() + head * head_size, values_of(head), training);
    };
    parallel_for(device, workers, runs.tasks(), run);
  }

  detail::AttentionInputs<Scalar> check_arguments(const TensorView<const Scalar, 4>& q,
                                                  const TensorView<const Scalar, 4>& k,
                                                  const TensorView<const Scalar, 4>& v,
                                                  const PaddingMask& mask, const Bias& attn_bias,
                                                  const LocalAttentionCall& call) const {
    require_shape("q", q.dimensions(), {-1, -1, -1, config_.dim.value_or(-1)});
    if (q.dimension(3) < 1)
      reject("q", "at least 1 channel in [B, H, N, D]", to_string(q.dimensions()));
    require_shape("k", k.dimensions(), q.dimensions());
    require_shape("v", v.dimensions(), q.dimensions());
    return {window(call), q.dimension(0), q.dimension(1), q.dimension(2), mask, attn_bias};
  }

  Window window(const LocalAttentionCall& call) const {
    if (call.window_size) {
      if (!config_.use_xpos)
        reject("window_size", "none at the call, because the attention has no xPos",
               *call.window_size);
      detail::require_at_least("window_size", *call.window_size, 1);
    }
    constexpr Index last_position = Index{1} << 60;
    if (call.first_position < 0 || call.first_position > last_position)
      reject("first_position", "0 to 2^60", call.first_position);
    return Window(config_, call.window_size.value_or(config_.window_size), call.first_position);
  }

  LocalAttentionConfig config_;
  std::optional<RotaryEmbedding<Scalar>> rotary_;
};

template <typename Scalar>
template <ThreadDevice Device>
void LocalAttention<Scalar>::backward_into(
    const Device& device, Gradients& gradients, Workspace& workspace, const Saved& saved,
    TensorView<const Scalar, 4> grad_out, TensorView<const Scalar, 4> q,
    TensorView<const Scalar, 4> k, TensorView<const Scalar, 4> v, const PaddingMask& mask,
    const Bias& attn_bias, const LocalAttentionCall& call) const {
  check_arguments(q, k, v, mask, attn_bias, call);
  require_shape("grad_out", grad_out.dimensions(), q.dimensions());
  const auto [batch, heads, seqlen, dim_head] = q.dimensions();
  require_shape<4>("saved.out", TensorView<const Scalar, 4>(saved.out).dimensions(),
                   q.dimensions());
  for (const auto& [name, lse] :
       {std::pair{"saved.lse", &saved.lse}, std::pair{"saved.lse_rest", &saved.lse_rest}})
    require_shape<3>(name, TensorView<const Scalar, 3>(*lse).dimensions(), {batch, heads, seqlen});
  if (saved.config != config_)
    reject("saved", "that of an attention of this configuration", "that of another");
  saved.call.require_same_call(mask, attn_bias, call);
  for (std::size_t i = 0; i < 3; ++i)
    if (!saved.inputs[i].is_of(detail::numbers_of(*std::array{&q, &k, &v}[i])))
      reject(std::array{"q", "k", "v"}[i], "what forward_saving() was given", "other numbers");
  const auto inputs = check_arguments(q, k, v, saved.call.mask(), attn_bias, saved.call.options());
  for (Tensor<Scalar, 4>* gradient : {&gradients.q, &gradients.k, &gradients.v})
    set_shape<Scalar, 4>(*gradient, q.dimensions());
  BiasGradients& grad_bias = workspace.grad_bias_;
  grad_bias.prepare(attn_bias, heads);
  if (!attn_bias)
    gradients.attn_bias.reset();
  else if (!gradients.attn_bias)
    gradients.attn_bias.emplace();
  if (attn_bias) {
    set_shape<Scalar, 3>(*gradients.attn_bias, attn_bias->dimensions());
    gradients.attn_bias->setZero();
  }
  const auto head_of = [&, n = seqlen, size = seqlen * dim_head, channels = dim_head,
                        shared_qk = config_.shared_qk](Index head) {
    const auto part = [&](const Scalar* tensor) { return tensor + head * size; };
    return RowsHead{n,
                    channels,
                    shared_qk,
                    part(q.data()),
                    part(k.data()),
                    part(v.data()),
                    part(grad_out.data()),
                    part(saved.out.data()),
                    saved.lse.data() + head * n,
                    saved.lse_rest.data() + head * n,
                    gradients.q.data() + head * size,
                    gradients.k.data() + head * size,
                    gradients.v.data() + head * size};
  };
  differentiate(device, workspace, inputs, batch, seqlen, dim_head, head_of, grad_bias,
                saved.call.options().training);
  if (attn_bias) grad_bias.add_to(*gradients.attn_bias);
}

template <typename Scalar>
Tensor<Scalar, 4> LocalAttention<Scalar>::attention_probabilities(
    TensorView<const Scalar, 4> q, TensorView<const Scalar, 4> k, const PaddingMask& mask,
    const Bias& attn_bias, const LocalAttentionCall& call) const {
  const auto inputs = check_arguments(q, k, k, mask, attn_bias, call);
  const auto [batch, heads, seqlen, dim_head] = q.dimensions();
  // With the unit vectors as values, the output is the weights.
  const RowMatrix<Scalar> unit = RowMatrix<Scalar>::Identity(seqlen, seqlen);
  Tensor<Scalar, 4> out(batch, heads, seqlen, seqlen);
  Workspace workspace;
  attend(
      Eigen::DefaultDevice(), workspace, inputs, q, k, seqlen,
      [&](Index head) { return Values{unit.data(), out.data() + head * unit.size()}; },
      call.training);
  return out;
}

template <typename Scalar>
void LocalAttention<Scalar>::Flow::run(const detail::AttentionInputs<Scalar>& inputs, Index b,
                                       Index h, const Blocks& queries, const Scalar* q,
                                       const Scalar* k, const Values& values,
                                       const std::optional<Training>& training) {
  AttentionHead<Scalar> head = inputs.head(b, h);
  head.steps = steps_ ? &*steps_ : nullptr;
  head.shared_qk = config_.shared_qk;
  const std::optional<Dropout<Scalar>> dropout =
      attention_->dropout_of(training, b * inputs.heads() + h);
  head.dropout = dropout ? &*dropout : nullptr;
  const bool narrow = NarrowKernel<Scalar>::fits(head, dim_head_, dim_value_);
  if (value_rows_) value_rows_->view(values.v, seqlen_);
  Index made = 0;
  for (Index block = queries.begin; block < queries.end; ++block) {
    const Index first = block * count;
    const Index rows = (std::min)(count, seqlen_ - first);
    const Range seen = window_.keys_of({first, first + rows}, seqlen_).clipped_to(head.unmasked);
    if (seen.begin >= seen.end) {
      std::fill_n(values.out + first * dim_value_, rows * dim_value_, Scalar(0));
      if (values.lse != nullptr) {
        std::fill_n(values.lse + first, rows, Scalar(-std::numeric_limits<double>::infinity()));
        std::fill_n(values.lse_rest + first, rows, Scalar(0));
      }
      continue;
    }
    const auto keep_lse = [&] {
      if (values.lse == nullptr) return;
      std::copy_n(lse_.data(), rows, values.lse + first);
      std::copy_n(lse_.data() + count, rows, values.lse_rest + first);
    };
    Scalar* lse = values.lse != nullptr ? lse_.data() : nullptr;
    if (narrow) {
      narrow_kernel_.attend(head, first, dim_head_, dim_value_, attention_->score_scale(dim_head_),
                            q, k, values.v, values.out, lse);
      keep_lse();
      continue;
    }
    for (made = (std::max)(made, seen.begin / count); made * count < seen.end; ++made) {
      make_keys(made, k);
      make_values(made, values.v);
    }
    make_queries(first, q);
    fetch_next(first + count, made * count, q, k, values);
    if (value_rows_)
      kernel_.attend(head, first, queries_.data(), keys_, *value_rows_, out_.data(), lse);
    else
      kernel_.attend(head, first, queries_.data(), keys_, values_, out_.data(), lse);
    keep_lse();
    store_block(dim_value_, rows, out_.data(),
                [&](Index r) { return values.out + (first + r) * dim_value_; });
  }
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
