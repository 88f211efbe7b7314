// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA: projection, normalization, positions, local attention and output projection.
///
/// The layer flows: a stretch of rows comes in, its queries, keys and values are made while it is
/// in cache, the queries whose look-around is complete attend, and their rows go out. Only the
/// look-around is kept, in rings, so that scratch memory does not depend on the sequence.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <local_mha/attention/kernel.hpp>
#include <local_mha/attention/local_attention.hpp>
#include <local_mha/attention/past.hpp>
#include <local_mha/attention/sequence_blocks.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/mha_backward.hpp>
#include <local_mha/ops/activations.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/prenorm.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/rms_norm.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

template <typename Scalar>
class LocalTransformer;

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
  struct Weights;
  class Flow;

  static constexpr Index count = block_rows<Scalar>;
  // Blocks that pass the weights together: enough to pay for reading them.
  static constexpr Index stretch = (std::max)(6, 2 * Tiling<Scalar>::blocks);

  // How sequences pass the layer: one after the other, in stretches of rows, which any worker may
  // take. The last ones end in short stretches, so that the workers end together.
  class Plan {
   public:
    // Becomes that of a call. Memory is used again.
    void assign(const detail::AttentionInputs<Scalar>& inputs, Index threads) {
      blocks.assign(inputs, count);
      // Threads even out over several stretches each, which are not too short, for all the weights
      // pass the cache for each.
      const Index unit = Tiling<Scalar>::blocks;
      const Index fair = blocks.count() / (4 * threads) / unit * unit;
      rows_ = count * (threads == 1 ? stretch : std::clamp(fair, unit, stretch));
      short_rows_ = threads == 1 ? rows_ : (std::min)(rows_, count * unit);
      cut(inputs, threads);
      workers = (std::min)(threads, tasks());
      // Rows ahead lie in so many stretches, of which only the last ones of a sequence are short.
      const Index reach = (std::min)(inputs.window().reach_ahead(), inputs.longest());
      const Index ahead =
          (std::min)(ceil_div(reach, short_rows_), ceil_div(reach, rows_) + most_short_);
      waiting = 1 + ahead + (workers <= 1 ? 0 : 2 * workers);
      count_pasts(inputs.sequences());
    }

    // Stretches of all sequences.
    Index tasks() const { return starts_.back().task; }
    Index sequence(Index task) const {
      const auto after =
          std::upper_bound(starts_.begin(), starts_.end(), task,
                           [](Index t, const Start& start) { return t < start.task; });
      return static_cast<Index>(after - starts_.begin()) - 1;
    }
    // Rows of the task's sequence.
    Range range(Index task) const {
      const Index s = sequence(task);
      const Index i = task - start(s).task;
      return {first_row(s, i), first_row(s, i + 1)};
    }
    // Stretches that must have come in before a stretch is answered.
    Index needs(Index task, const Window& window) const {
      const Index s = sequence(task);
      const Index seen = window.keys_of(range(task), blocks.length(s)).end;
      return (std::max)(task + 1, start(s).task + stretches_of(s, seen));
    }
    // The place of a sequence among `pasts`.
    Index past(Index sequence) const { return start(sequence).number % pasts; }
    // Rows of a stretch.
    Index rows() const { return rows_; }

    detail::SequenceBlocks blocks;
    Index workers = 1;
    Index waiting = 1;  // stretches that come in before the first of them is answered
    Index pasts = 0;    // of sequences that are under way

   private:
    struct Start {
      Index task = 0;    // the first one
      Index number = 0;  // of the sequences before it that have rows
      Index longs = 0;   // stretches that are not short
    };
    const Start& start(Index sequence) const { return starts_[static_cast<std::size_t>(sequence)]; }

    void cut(const detail::AttentionInputs<Scalar>& inputs, Index threads) {
      const Index sequences = inputs.sequences();
      const Index all = blocks.first_row(sequences);
      // Three short stretches for each thread even out the end: of the last sequence, or of the
      // last segments.
      const Index earliest =
          inputs.packed() || sequences == 0 ? 0 : blocks.first_row(sequences - 1);
      const Index shorts_begin =
          threads == 1 ? all : (std::max)(all - 3 * threads * short_rows_, earliest);
      starts_.resize(static_cast<std::size_t>(sequences) + 1);
      most_short_ = 0;
      Start next;
      for (Index s = 0; s < sequences; ++s) {
        const Index length = blocks.length(s);
        const Index before = shorts_begin - blocks.first_row(s);
        next.longs =
            length <= before ? ceil_div(length, rows_) : (std::max<Index>)(0, before) / rows_;
        starts_[static_cast<std::size_t>(s)] = next;
        most_short_ = (std::max)(most_short_, stretches_of(s, length) - next.longs);
        next.task += stretches_of(s, length);
        next.number += length > 0 ? 1 : 0;
      }
      starts_.back() = next;
    }

    // A sequence takes the past of another one when that is answered: what comes in then is
    // `waiting` stretches ahead at most.
    void count_pasts(Index sequences) {
      pasts = 0;
      for (Index s = 0, later = 0; s < sequences; ++s) {
        if (blocks.length(s) == 0) continue;
        const Index free = start(s + 1).task + waiting - 1;
        later = (std::max)(later, s + 1);
        while (later < sequences && start(later).task < free) ++later;
        pasts = (std::max)(pasts, start(later).number - start(s).number);
      }
    }

    // Stretches of a sequence that hold its first `n` rows.
    Index stretches_of(Index sequence, Index n) const {
      const Index in_long = (std::min)(n, start(sequence).longs * rows_);
      return ceil_div(in_long, rows_) + ceil_div(n - in_long, short_rows_);
    }
    Index first_row(Index sequence, Index i) const {
      const Index in_long = (std::min)(i, start(sequence).longs);
      return (std::min)(in_long * rows_ + (i - in_long) * short_rows_, blocks.length(sequence));
    }

    Index rows_ = count;
    Index short_rows_ = count;
    Index most_short_ = 0;                   // stretches of a sequence
    std::vector<Start> starts_ = {Start{}};  // of each sequence, and all
  };

 public:
  using Parameters = LocalMHAParameters<Scalar>;
  using Bias = std::optional<TensorView<const Scalar, 3>>;

  /// Sequences that come bit by bit: see mha_stream.hpp.
  class Stream;
  template <typename>
  friend class LocalTransformer;

  /// Room for calls of forward_into(), forward_saving_into() and backward_into().
  class Workspace {
   private:
    friend LocalMHA;

    // Sequences follow one another through `pasts_`; workers share the one of a sequence.
    void prepare(const LocalMHA& layer, const detail::AttentionInputs<Scalar>& inputs,
                 Index threads) {
      plan_.assign(inputs, threads);
      const Weights& weights = *layer.weights_;
      const Window& window = inputs.window();
      const Index longest = inputs.longest();
      const typename Past<Scalar>::Size past = layer.size_of_past(window, longest, plan_);
      detail::provide(
          flows_, plan_.workers,
          [&](const Flow& flow) { return flow.fits(weights, window, longest); },
          [&] { return Flow(weights, window, longest); });
      detail::provide(
          pasts_, plan_.pasts, [&](const Past<Scalar>& kept) { return kept.serves(past); },
          [&] { return Past<Scalar>(past); });
      for (Flow& flow : flows_) flow.use(weights);
      // Not to be moved, nor copied.
      if (!order_) order_ = std::make_unique<TaskOrder>();
      order_->start(plan_.tasks(), plan_.waiting);
    }

    Plan plan_;
    std::vector<Flow> flows_;
    std::vector<Past<Scalar>> pasts_;
    std::unique_ptr<TaskOrder> order_;
    typename detail::LayerBackward<Scalar>::Between backward_;
    typename LocalAttention<Scalar>::BiasGradients grad_bias_;
  };

  /// Starts with the weights of a new PyTorch module.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit LocalMHA(const LocalMHAConfig& config, std::uint64_t seed = 0)
      : LocalMHA(config, initial_parameters<Parameters>(config, seed)) {}

  /// \throws std::invalid_argument also naming the tensor whose shape does not fit
  LocalMHA(const LocalMHAConfig& config, Parameters parameters)
      : weights_(std::make_shared<const Weights>(
            config, fitting(std::move(parameters), Parameters::zeros(checked(config))))) {}

  // A layer that was moved from would have no weights: moving is copying.
  LocalMHA(const LocalMHA&) = default;
  LocalMHA& operator=(const LocalMHA&) = default;

  const LocalMHAConfig& config() const { return weights_->config; }
  /// Valid until set_parameters() or an assignment, and as long as the layer.
  const Parameters& parameters() const { return weights_->parameters; }

  /// If it throws, the layer is as it was.
  /// \throws std::invalid_argument naming the tensor whose shape does not fit
  void set_parameters(Parameters parameters) {
    weights_ = std::make_shared<const Weights>(config(),
                                               fitting(std::move(parameters), this->parameters()));
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
    saved.complete(config(), parameters(), x, mask, attn_bias,
                   {.training = training, .cu_seqlens = cu_seqlens});
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
    saved.check_arguments(config(), parameters(), x, mask, attn_bias, training);
    detail::require_same_shapes(gradients, parameters());
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
    detail::LayerBackward<Scalar>(
        {w.config, w.parameters, w.attention, w.norm, w.q_norm, w.k_norm, w.norms_of_all}, saved,
        workspace.backward_, thread_count(device))
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

  static const LocalMHAConfig& checked(const LocalMHAConfig& config) {
    validate(config);
    return config;
  }
  static Parameters fitting(Parameters parameters, const Parameters& shapes) {
    detail::require_same_shapes(parameters, shapes);
    return parameters;
  }

  // All that a pass reads of the layer.
  struct Weights {
    Weights(const LocalMHAConfig& layer_config, Parameters given)
        : config(layer_config), attention(attention_config(config)), parameters(std::move(given)) {
      const Parameters& p = parameters;
      if (config.prenorm) norm = Prenorm<Scalar>(config.norm, p.norm_weight, p.norm_bias);
      make_norm(p.q_scale, p.q_norm_weight, q_norm, norms_of_all[0]);
      make_norm(p.k_scale, p.k_norm_weight, k_norm, norms_of_all[1]);
      const Index dim_head = config.dim_head;
      to_qkv = PackedWeight<Scalar>(p.to_qkv, dim_head);
      if (config.gate_values_per_head) to_v_gate = PackedWeight<Scalar>(p.to_v_gate_weight);
      to_out = PackedWeight<Scalar>(p.to_out, 0, dim_head, padded_channels<Scalar>(dim_head));
    }

    // That of queries or of keys, which is of each head or of all.
    LOCAL_MHA_NOINLINE void make_norm(const Vector<Scalar>& scale, const Vector<Scalar>& weight,
                                      QkNorm<Scalar>& of_each, RmsNorm<Scalar>& of_all) const {
      if (scale.size() > 0) of_each = QkNorm<Scalar>(scale);
      if (weight.size() == 0) return;
      RmsNorm<Scalar> rms(weight, config.qk_norm.eps);
      if (config.qk_norm.kind == QkNormKind::rms)
        of_each = QkNorm<Scalar>(std::move(rms));
      else
        of_all = std::move(rms);
    }

    LocalMHAConfig config;
    LocalAttention<Scalar> attention;
    Parameters parameters;
    Prenorm<Scalar> norm;
    QkNorm<Scalar> q_norm;
    QkNorm<Scalar> k_norm;
    std::array<RmsNorm<Scalar>, 2> norms_of_all;  // of queries and of keys, all heads together
    PackedWeight<Scalar> to_qkv;
    PackedWeight<Scalar> to_v_gate;
    PackedWeight<Scalar> to_out;
  };

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
    const RowMatrix<Scalar>& bias = parameters().relative_bias;
    if (config().relative_bias)
      terms.relative_bias.emplace(bias.data(), std::array{bias.rows(), bias.cols()});
    if (config().sinks) terms.sinks.emplace(parameters().sinks.data(), std::array{config().heads});
    return terms;
  }
  // The bias of a call, or that of the weights, which is one of windows of one position.
  Bias bias_of(const Bias& attn_bias) const {
    if (config().token_window && attn_bias)
      reject("attn_bias", "none, because a token window takes a relative_bias", "one");
    if (!config().relative_bias) return attn_bias;
    const RowMatrix<Scalar>& bias = parameters().relative_bias;
    return TensorView<const Scalar, 3>(bias.data(), {bias.rows(), 1, bias.cols()});
  }
  void add_options(detail::AttentionInputs<Scalar>& inputs) const {
    inputs.share_keys(resolved_kv_heads(config()));
    if (config().sinks) inputs.add_sinks(parameters().sinks.data());
    inputs.set_score(attention().score());
  }

  // A worker's memory, and the steps by which rows of a sequence pass the layer in it.
  class Flow {
    using Store = KeyStore<Scalar, Ring<Scalar>>;

   public:
    // \param seqlen of the longest sequence
    // \param threads that step() uses at most
    LOCAL_MHA_NOINLINE Flow(const Weights& weights, const Window& window, Index seqlen,
                            Index threads = 1)
        : weights_(&weights),
          config_(weights.config),
          made_for_(seqlen),
          threads_(threads),
          steps_(weights.attention.rotary_steps(window, seqlen)),
          x_(make_block_buffer<Scalar>(stretch * dim() * count)),
          out_(make_block_buffer<Scalar>(stretch * heads() * head_size())),
          y_(make_block_buffer<Scalar>(stretch * dim() * count)),
          spread_(make_block_buffer<Scalar>(
              (std::max)(spread_size(weights.to_qkv), spread_size(weights.to_out)))),
          projected_(make_block_buffer<Scalar>(gates_row() + heads())) {
      if (norms_all_heads()) {
        raw_ = make_block_buffer<Scalar>(2 * stretch * (heads() * dim_head() + 1) * count);
      }
      const Index reach = window.reach(seqlen);
      const Index first_keys = (std::min)(window.first_keys(), seqlen);
      if (first_keys > 0 && weights.attention.rotary() != nullptr)
        pinned_steps_.emplace(*weights.attention.rotary(), window.rotary_shift(),
                              first_keys + stretch * count, 0);
      pinned_.make_room(ceil_div(first_keys, count));
      // Beside the window's keys, pinned ones in whole blocks.
      const Index range =
          first_keys > 0 ? reach + first_keys + 4 * count : (std::min)(reach + count, seqlen);
      const Index most_channels = padded_channels<Scalar>((std::max)(heads(), dim_head()));
      scratch_.assign(to_size((std::min)(threads, heads())),
                      {AttentionKernel<Scalar>(dim_head(), range),
                       make_block_buffer<Scalar>(most_channels * count)});
      heads_.resize(to_size(heads()));
      dropouts_.reserve(to_size(config().dropout > 0 ? heads() : 0));
    }

    bool fits(const Weights& weights, const Window& window, Index seqlen) const {
      return config_ == weights.config && window.room_serves(made_for_, seqlen, count);
    }
    // What this fits: the weights of the calls that follow.
    void use(const Weights& weights) { weights_ = &weights; }

    // Takes tasks until none is left.
    // \param x, y the batch
    // \param saved null, or where is kept what the backward pass needs
    void run(Workspace& workspace, const detail::AttentionInputs<Scalar>& inputs, const Scalar* x,
             Scalar* y, const std::optional<Training>& training, Saved* saved) {
      one_by_one_ = false;
      saved_ = saved;
      const Plan& plan = workspace.plan_;
      TaskOrder& order = *workspace.order_;
      const auto next = [&] {
        return order.next([&](Index task) { return plan.needs(task, inputs.window()); });
      };
      Index sequence = -1;
      for (auto task = next(); task.kind != TaskOrder::Kind::none; order.end(task), task = next()) {
        const Index s = plan.sequence(task.i);
        if (s != std::exchange(sequence, s)) take_heads(inputs, s, training);
        Past<Scalar>& past = workspace.pasts_[to_size(plan.past(s))];
        first_saved_ = plan.blocks.first_block(s);
        const Range rows = plan.range(task.i);
        const Index first = (plan.blocks.first_row(s) + rows.begin) * dim();
        if (task.kind == TaskOrder::Kind::make) {
          load(Eigen::DefaultDevice(), rows, x + first);
          make_gates(past, rows, rows);
          project_together(Eigen::DefaultDevice(), rows, rows);
          for (Index kv_head = 0; kv_head < kv_heads(); ++kv_head)
            make_heads(scratch_.front(), past, rows, rows, kv_head);
        } else {
          move_pinned_steps(rows);
          for (Index h = 0; h < heads(); ++h) attend(scratch_.front(), past, rows, h);
          project_out(Eigen::DefaultDevice(), rows, y + first);
        }
      }
    }

    void take_heads(const detail::AttentionInputs<Scalar>& inputs, Index sequence,
                    const std::optional<Training>& training) {
      make_dropouts(sequence, training);
      if (inputs.pins()) inputs.assign_pinned(sequence, pinned_);
      take_heads([&](Index h) {
        AttentionHead<Scalar> head = inputs.head(sequence, h);
        head.dropout = dropouts_.empty() ? nullptr : &dropouts_[to_size(h)];
        head.pinned = inputs.pins() ? &pinned_ : nullptr;
        return head;
      });
    }

    // Takes the heads of a sequence; `head_of(h)` says all but the rotary steps.
    template <typename HeadOf>
    void take_heads(HeadOf&& head_of) {
      for (Index h = 0; h < heads(); ++h) {
        heads_[to_size(h)] = head_of(h);
        heads_[to_size(h)].steps = steps_ ? &*steps_ : nullptr;
        heads_[to_size(h)].pinned_steps = pinned_steps_ ? &*pinned_steps_ : nullptr;
      }
    }

    // Takes in the rows `made`, of which `asked` are queries, too, and answers the queries
    // `answered`: at most `stretch` blocks of each. The threads of the device share the heads.
    // \param x, y the first row of `made` and of `answered`
    template <typename Device>
    void step(const Device& device, Past<Scalar>& past, const Range& made, const Range& asked,
              const Scalar* x, const Range& answered, Scalar* y);

    // Normalized queries and keys of an item of the batch, before positions and scale.
    void queries_and_keys(const Scalar* x, Index b, Tensor<Scalar, 4>& q, Tensor<Scalar, 4>& k) {
      auto normed = make_block_buffer<Scalar>(head_size());
      const Index seqlen = q.dimension(2);
      for (Index block = 0; block * count < seqlen; ++block) {
        const Range rows{block * count, (std::min)((block + 1) * count, seqlen)};
        load(Eigen::DefaultDevice(), rows, x + rows.begin * dim());
        project_together(Eigen::DefaultDevice(), rows, rows);
        const auto make = [&](Index part, Index h, Tensor<Scalar, 4>& to) {
          if (norms_all_heads()) {
            normalize_together(part, 0, h, normed.data());
          } else {
            const Index group = group_of(part, h);
            project(weights_->to_qkv, group, x_.data(), 1, [&](Index) { return normed.data(); });
            add_qkv_bias(group, rows, rows.begin, normed.data());
            const QkNorm<Scalar>& norm = part == 0 ? weights_->q_norm : weights_->k_norm;
            if (norm) norm.apply(normed.data());
          }
          store_block(dim_head(), rows.end - rows.begin, normed.data(),
                      StridedRows{&to(b, h, rows.begin, 0), dim_head()});
        };
        for (Index h = 0; h < heads(); ++h) make(0, h, q);
        for (Index h = 0; h < kv_heads(); ++h) make(1, h, k);
      }
    }

   private:
    // What a thread needs to compute a head.
    struct Scratch {
      AttentionKernel<Scalar> kernel;
      BlockBuffer<Scalar> begun;  // a block of which a ring holds some rows already
    };

    const LocalMHAConfig& config() const { return config_; }
    Index dim() const { return config().dim; }
    Index heads() const { return config().heads; }
    Index kv_heads() const { return resolved_kv_heads(config()); }
    // Heads that read the same keys and values.
    Index members() const { return heads() / kv_heads(); }
    // Of the projections' weights.
    // \param part 0: queries, 1: keys, 2: values
    Index group_of(Index part, Index h) const {
      return part == 0 ? h : heads() + (part - 1) * kv_heads() + h;
    }
    Index dim_head() const { return config().dim_head; }
    Index head_size() const { return padded_channels<Scalar>(dim_head()) * count; }
    static std::size_t to_size(Index i) { return static_cast<std::size_t>(i); }
    template <typename Device>
    Index workers(const Device& device) const {
      return (std::min)(thread_count(device), threads_);
    }
    bool is_single(const Range& rows) const { return one_by_one_ && rows.end - rows.begin == 1; }
    static Range blocks_of(const Range& rows) { return local_mha::blocks_of<Scalar>(rows); }

    void make_dropouts(Index sequence, const std::optional<Training>& training) {
      dropouts_.clear();
      if (!training || config().dropout <= 0) return;
      for (Index h = 0; h < heads(); ++h)
        dropouts_.emplace_back(config().dropout, training->seed,
                               static_cast<std::uint32_t>(sequence * heads() + h));
    }

    template <typename Device>
    void load(const Device& device, const Range& rows, const Scalar* x) {
      if (is_single(rows)) return project_single(device, rows.begin % count, x);
      Scalar* to = x_.data();
      for_each_block<Scalar>(rows, [&](Index block, LaneRange lanes) {
        load_lanes(dim(), lanes, StridedRows{x, dim(), block * count - rows.begin}, to);
        if (config().prenorm) {
          weights_->norm.apply(to);
          clear_other_lanes(dim(), lanes, to);
        }
        to += dim() * count;
      });
    }

    // All projections of a single row, one after the other as the weights lie.
    template <typename Device>
    void project_single(const Device& device, Index lane, const Scalar* x) {
      if (config().prenorm) {
        const LaneRange lanes{static_cast<int>(lane), static_cast<int>(lane + 1)};
        load_lanes(dim(), lanes, StridedRows{x, dim(), -lane}, x_.data());
        weights_->norm.apply(x_.data());
        spread_lane(weights_->to_qkv, x_.data() + lane, count, spread_.data());
      } else {
        spread_lane(weights_->to_qkv, x, 1, spread_.data());
      }
      parallel_for(device, workers(device), detail::qkv_heads(config()), [&](Index, Index group) {
        project_lane(weights_->to_qkv, group, spread_.data(),
                     projected_.data() + group * dim_head(), 1);
      });
      if (config().gate_values_per_head)
        project_lane(weights_->to_v_gate, 0, spread_.data(), projected_.data() + gates_row(), 1);
    }
    Index gates_row() const { return detail::qkv_heads(config()) * dim_head(); }

    // Puts rows into a ring: `make(blocks, target)` makes their blocks, block `b` at `target(b)`,
    // and `finish(first_row, block)` makes each what it is to be there. Rows that a block had
    // before stay.
    template <typename Make, typename Finish>
    void put_rows(Scratch& scratch, Ring<Scalar>& ring, const Range& rows, bool single, Make&& make,
                  Finish&& finish) {
      const Range blocks = blocks_of(rows);
      if (blocks.begin == blocks.end) return;
      const int first_lane = static_cast<int>(rows.begin % count);
      Scalar* const begun = scratch.begun.data();
      const auto target = [&](Index block) {
        return first_lane > 0 && block == blocks.begin ? begun : ring[block];
      };
      make(blocks, target);
      for (Index block = blocks.begin; block < blocks.end; ++block)
        finish(block * count, target(block));
      if (first_lane > 0 && single)
        ring.put_lane(blocks.begin, first_lane, begun);
      else if (first_lane > 0)
        ring.put_lanes(blocks.begin, first_lane, begun);
    }

    // The same of rows that the weights of a group project.
    // \param loaded the rows that are in x_; a single one is in projected_, from `first_row` on
    template <typename Finish>
    void project_into(Scratch& scratch, Ring<Scalar>& ring, const PackedWeight<Scalar>& weight,
                      Index group, Index first_row, const Range& rows, const Range& loaded,
                      Finish&& finish) {
      const bool single = is_single(loaded);
      put_rows(
          scratch, ring, rows, single,
          [&](const Range& blocks, auto&& target) {
            if (single)
              return put_projected(weight.group_rows(), first_row, rows.begin % count,
                                   target(blocks.begin));
            project(weight, group,
                    x_.data() + (blocks.begin - loaded.begin / count) * dim() * count,
                    blocks.end - blocks.begin, [&](Index i) { return target(blocks.begin + i); });
          },
          finish);
    }

    // A lane of a block from projected_; if it is the first, the others become 0.
    void put_projected(Index channels, Index first_row, Index lane, Scalar* block) const {
      if (lane == 0) std::fill(block, block + channels * count, Scalar(0));
      for (Index c = 0; c < channels; ++c)
        block[c * count + lane] = projected_[to_size(first_row + c)];
    }

    template <typename Finish>
    void project_head(Scratch& scratch, Ring<Scalar>& ring, Index group, const Range& rows,
                      const Range& loaded, Finish&& finish) {
      project_into(scratch, ring, weights_->to_qkv, group, group * dim_head(), rows, loaded,
                   finish);
    }

    // Adds to_qkv's bias to a head's block whose first row is `first`. What is none of `rows`
    // becomes 0, as it is without a bias.
    void add_qkv_bias(Index group, const Range& rows, Index first, Scalar* block) const {
      if (!config().qkv_bias) return;
      add_bias(dim_head(), weights_->parameters.to_qkv_bias.data() + group * dim_head(), block);
      const Range lanes = Range{rows.begin - first, rows.end - first}.clipped_to({0, count});
      clear_other_lanes(dim_head(), {static_cast<int>(lanes.begin), static_cast<int>(lanes.end)},
                        block);
    }

    // Queries and keys are normalized over all heads.
    bool norms_all_heads() const { return resolved_qk_norm(config()) == QkNormKind::rms_all; }

    // Blocks that are projected, but not yet normalized, and what they are to be multiplied with.
    // \param part 0: queries, 1: keys
    // \param i block of the rows that are loaded
    Scalar* raw(Index part, Index i, Index h) {
      const Index block = heads() * dim_head() + 1;
      return raw_.data() + ((part * stretch + i) * block + h * dim_head()) * count;
    }
    Scalar* inverse(Index part, Index i) { return raw(part, i, heads()); }

    // Projects queries of the rows `asked` and keys of the rows `made`, which are loaded, of all
    // heads: before any of them is known, none can be normalized. The threads of the device share
    // the heads.
    template <typename Device>
    void project_together(const Device& device, const Range& made, const Range& asked) {
      if (!norms_all_heads()) return;
      const Index first_block = made.begin / count;
      const Index groups = heads() + kv_heads();
      parallel_for(device, (std::min)(workers(device), groups), groups, [&](Index, Index group) {
        const Index part = group < heads() ? 0 : 1;
        const Range& rows = part == 0 ? asked : made;
        const Range blocks = blocks_of(rows);
        const auto target = [&](Index block) {
          return raw(part, block - first_block, group - part * heads());
        };
        if (blocks.begin == blocks.end) return;
        if (is_single(made)) {
          std::fill_n(target(blocks.begin), dim_head() * count, Scalar(0));
          put_projected(dim_head(), group * dim_head(), rows.begin % count, target(blocks.begin));
        } else {
          project(weights_->to_qkv, group, x_.data() + (blocks.begin - first_block) * dim() * count,
                  blocks.end - blocks.begin, [&](Index i) { return target(blocks.begin + i); });
        }
        for (Index block = blocks.begin; block < blocks.end; ++block)
          add_qkv_bias(group, rows, block * count, target(block));
      });
      for (Index part = 0; part < 2; ++part) {
        const Range blocks = blocks_of(part == 0 ? asked : made);
        for (Index block = blocks.begin; block < blocks.end; ++block) {
          Scalar* to = inverse(part, block - first_block);
          weights_->norms_of_all[to_size(part)]
              .inverse(raw(part, block - first_block, 0))
              .store(to);
          if (saved_ != nullptr)
            std::copy_n(to, count, saved_->inverses[first_saved_ + block] + part * count);
        }
      }
    }

    // A head's block that project_together() made.
    void normalize_together(Index part, Index i, Index h, Scalar* to) {
      weights_->norms_of_all[to_size(part)].apply(
          h * dim_head(), dim_head(), Lanes<Scalar>::load(inverse(part, i)), raw(part, i, h), to);
    }

    void make_gates(Past<Scalar>& past, const Range& rows, const Range& loaded) {
      if (!config().gate_values_per_head) return;
      project_into(
          scratch_.front(), past.gates(), weights_->to_v_gate, 0, gates_row(), rows, loaded,
          [&](Index first, Scalar* gates) {
            for (Index h = 0; h < heads(); ++h) {
              Scalar* gate = gates + h * count;
              const auto bias = Lanes<Scalar>::broadcast(weights_->parameters.to_v_gate_bias[h]);
              sigmoid(Lanes<Scalar>::load(gate) + bias).store(gate);
            }
            if (saved_ != nullptr)
              std::copy_n(gates, heads() * count, saved_->gates[first_saved_ + first / count]);
          });
    }

    // Keeps a head's block whose first row is `first`.
    void save(BlockArray<Scalar> Saved::* part, const Scalar* block, Index first, Index h) {
      if (saved_ == nullptr) return;
      std::copy_n(block, dim_head() * count,
                  (saved_->*part)[first_saved_ + first / count] + h * head_size());
    }

    // Queries (part 0) or keys (part 1) of a head as the kernel takes them.
    LOCAL_MHA_NOINLINE void make_normed(Scratch& scratch, Ring<Scalar>& ring, Index part,
                                        const Range& rows, const Range& made, Index h) {
      const auto saved_part = part == 0 ? &Saved::q : &Saved::k;
      const auto place = [&](Index first, Scalar* block) {
        if (part == 0)
          weights_->attention.place_queries(dim_head(), block, first);
        else
          weights_->attention.place_keys(dim_head(), block, first);
      };
      if (norms_all_heads()) {
        put_rows(
            scratch, ring, rows, is_single(made),
            [&](const Range& blocks, auto&& target) {
              for (Index block = blocks.begin; block < blocks.end; ++block) {
                const Index i = block - made.begin / count;
                save(saved_part, raw(part, i, h), block * count, h);
                normalize_together(part, i, h, target(block));
              }
            },
            place);
        return;
      }
      const QkNorm<Scalar>& norm = part == 0 ? weights_->q_norm : weights_->k_norm;
      const Index group = group_of(part, h);
      project_head(scratch, ring, group, rows, made, [&](Index first, Scalar* block) {
        add_qkv_bias(group, rows, first, block);
        save(saved_part, block, first, h);
        if (norm) norm.apply(block);
        place(first, block);
      });
    }

    // The heads that read one head of keys and values: queries of the rows `asked`, keys and values
    // of the rows `made`, which are loaded.
    void make_heads(Scratch& scratch, Past<Scalar>& past, const Range& made, const Range& asked,
                    Index kv_head) {
      for (Index i = 0; i < members(); ++i) {
        const Index h = kv_head * members() + i;
        make_normed(scratch, past.queries(h), 0, asked, made, h);
      }
      make_normed(scratch, past.keys(kv_head), 1, made, made, kv_head);
      const Index group = group_of(2, kv_head);
      project_head(scratch, past.values(kv_head), group, made, made,
                   [&](Index first, Scalar* values) {
                     add_qkv_bias(group, made, first, values);
                     save(&Saved::v, values, first, kv_head);
                   });
      const Range blocks = blocks_of(made);
      for (Index block = blocks.begin; block < blocks.end; ++block)
        past.values(kv_head).note_finite(block);
      past.pin(kv_head, made);
    }

    // Those from a stretch of queries to the first keys.
    void move_pinned_steps(const Range& queries) {
      if (pinned_steps_ && queries.begin < queries.end)
        pinned_steps_->move_to(*weights_->attention.rotary(), heads_.front().window->rotary_shift(),
                               (queries.end - 1) / pinned_steps_->group());
    }

    void attend(Scratch& scratch, Past<Scalar>& past, const Range& rows, Index h) {
      AttentionHead<Scalar>& head = heads_[to_size(h)];
      head.queries = rows;
      const Index kv_head = h / members();
      const Range blocks = blocks_of(rows);
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        Scalar* out = out_.data() + ((block - blocks.begin) * heads() + h) * head_size();
        Scalar* lse =
            saved_ != nullptr ? saved_->lse[first_saved_ + block] + 2 * h * count : nullptr;
        scratch.kernel.attend(head, block * count, past.queries(h)[block],
                              Store{&past.keys(kv_head), &past.values(kv_head)},
                              {past.pinned_keys(kv_head), past.pinned_values(kv_head)}, out, lse);
        save(&Saved::out, out, block * count, h);
        if (!config().gate_values_per_head) continue;
        const auto gate = Lanes<Scalar>::load(past.gates()[block] + h * count);
        for (Index c = 0; c < dim_head(); ++c)
          (gate * Lanes<Scalar>::load(out + c * count)).store(out + c * count);
      }
    }

    // The threads of the device share the rows of the weight.
    template <typename Device>
    void project_out(const Device& device, const Range& rows, Scalar* y) {
      if (rows.begin == rows.end) return;
      const PackedWeight<Scalar>& weight = weights_->to_out;
      const bool single = is_single(rows);
      const Range blocks = blocks_of(rows);
      const auto block_of_y = [&](Index i) { return y_.data() + i * dim() * count; };
      if (single) spread_lane(weight, out_.data() + rows.begin % count, count, spread_.data());
      const Index shares = workers(device);
      const auto share_begin = [&](Index i) {
        return i * weight.group_panels() / shares * PackedWeight<Scalar>::panel_rows;
      };
      parallel_for(device, shares, shares, [&](Index, Index i) {
        const Range some_rows{share_begin(i), (std::min)(share_begin(i + 1), dim())};
        if (single)
          project_lane(weight, 0, some_rows, spread_.data(), y, 1);
        else
          project(weight, 0, some_rows, out_.data(), blocks.end - blocks.begin, block_of_y);
      });
      const Scalar* const bias =
          config().out_bias ? weights_->parameters.to_out_bias.data() : nullptr;
      if (single) {
        for (Index c = 0; bias != nullptr && c < dim(); ++c) y[c] += bias[c];
        return;
      }
      for_each_block<Scalar>(rows, [&](Index block, LaneRange lanes) {
        if (bias != nullptr) add_bias(dim(), bias, block_of_y(block - blocks.begin));
        store_lanes(dim(), lanes, block_of_y(block - blocks.begin),
                    StridedRows{y, dim(), block * count - rows.begin});
      });
    }

    const Weights* weights_;  // of the call
    LocalMHAConfig config_;
    Index made_for_;
    Index threads_;
    std::optional<RotarySteps<Scalar>> steps_;
    std::optional<RotarySteps<Scalar>> pinned_steps_;
    PinnedRows<Scalar> pinned_;     // of the sequence
    std::vector<Scratch> scratch_;  // of each thread
    BlockBuffer<Scalar> x_;         // [block][dim][count], after step 1
    BlockBuffer<Scalar> out_;       // [block][head][channel][count], of the heads
    BlockBuffer<Scalar> y_;         // [block][dim][count]
    // A single position as project_lane() takes it, if positions may come one by one: its sums are
    // in another order, and results must not depend on where a sequence is cut into steps.
    BlockBuffer<Scalar> spread_;
    BlockBuffer<Scalar> projected_;  // what it is projected to: `[to_qkv's rows, gates]`
    bool one_by_one_ = false;
    // If queries and keys are normalized over all heads: see project_together().
    BlockBuffer<Scalar> raw_;  // [queries, keys][block][channels of all heads, inverse][count]
    std::vector<AttentionHead<Scalar>> heads_;
    std::vector<Dropout<Scalar>> dropouts_;
    Saved* saved_ = nullptr;  // null: nothing is kept
    Index first_saved_ = 0;   // the sequence's first block there
  };

  // Holds `plan.waiting` stretches, and the keys that the first of them looks back at.
  typename Past<Scalar>::Size size_of_past(const Window& window, Index seqlen,
                                           const Plan& plan) const {
    const Index behind = (std::min)(window.reach_behind(), seqlen);
    const Index waiting = plan.waiting * plan.rows() / count;
    const Index blocks = ceil_div(seqlen, count);
    return {.heads = config().heads,
            .dim_head = config().dim_head,
            .gated = config().gate_values_per_head,
            .waiting = (std::min)(waiting, blocks),
            .kept = (std::min)(ceil_div(behind, count) + waiting, blocks),
            .kv_heads = resolved_kv_heads(config()),
            .pinned = ceil_div((std::min)(window.first_keys(), seqlen), count)};
  }

  // Takes rows of sequence `b` of a stream in, and answers rows, a stretch at a time.
  // \param inputs what its queries see, but for its place
  // \param x, y the first row of `in` and of `out`
  // \param masked a flag for each row that comes in; null: none is masked
  // \param complete see flow_through()
  template <typename Device, typename Sequence, typename Complete>
  void stream_rows(const Device& device, Flow& flow, Sequence& sequence,
                   const detail::AttentionInputs<Scalar>& inputs, Index b, const Range& in,
                   const Range& out, const Scalar* x, const std::uint8_t* masked, Scalar* y,
                   Complete&& complete) const {
    flow.use(*weights_);
    flow_through<Scalar>(in, out, stretch, complete, [&](const Range& made, const Range& answered) {
      sequence.take(made, masked == nullptr ? nullptr : masked + (made.begin - in.begin));
      flow.take_heads([&](Index h) {
        AttentionHead<Scalar> head = inputs.head(b, h);
        sequence.show(answered, head);
        return head;
      });
      flow.step(device, sequence.past(), made, made, x + (made.begin - in.begin) * config().dim,
                answered, y + (answered.begin - out.begin) * config().dim);
    });
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
  workspace.prepare(*this, inputs, thread_count(device));
  const auto work = [&](Index worker, Index) {
    try {
      workspace.flows_[static_cast<std::size_t>(worker)].run(workspace, inputs, x.data(), y.data(),
                                                             training, saved);
    } catch (...) {
      workspace.order_->abandon();
      throw;
    }
  };
  parallel_for(device, workspace.plan_.workers, workspace.plan_.workers, work);
}

template <typename Scalar>
template <typename Device>
void LocalMHA<Scalar>::Flow::step(const Device& device, Past<Scalar>& past, const Range& made,
                                  const Range& asked, const Scalar* x, const Range& answered,
                                  Scalar* y) {
  one_by_one_ = true;
  load(device, made, x);
  make_gates(past, asked, made);
  if (made.begin == made.end && answered.begin == answered.end) return;
  project_together(device, made, asked);
  move_pinned_steps(answered);
  parallel_for(device, (std::min)(workers(device), kv_heads()), kv_heads(),
               [&](Index worker, Index kv_head) {
                 Scratch& scratch = scratch_[to_size(worker)];
                 make_heads(scratch, past, made, asked, kv_head);
                 for (Index i = 0; i < members(); ++i)
                   attend(scratch, past, answered, kv_head * members() + i);
               });
  project_out(device, answered, y);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
