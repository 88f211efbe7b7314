// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA: projection, normalization, positions, local attention and output projection.
///
/// The layer flows: a stretch of rows comes in, its queries, keys and values are made while it is
/// in cache, the queries whose look-around is complete attend, and their rows go out. Only the
/// look-around is kept, in rings, so that scratch memory does not depend on the sequence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include <local_mha/attention/kernel.hpp>
#include <local_mha/attention/local_attention.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/mha_backward.hpp>
#include <local_mha/ops/activations.hpp>
#include <local_mha/ops/layer_norm.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha {

/// Local multi-head attention, the counterpart of the Python packages' module of that name.
///
/// \tparam Scalar float, double, or any type that Eigen computes with
///
///     local_mha::LocalMHAConfig config{.dim = 512, .window_size = 5};
///     local_mha::LocalMHA<float> mha(config);
///     auto y = mha.forward(x);  // x: Eigen::Tensor<float, 3, Eigen::RowMajor>, [B, N, 512]
template <typename Scalar>
class LocalMHA {
  class Flow;

 public:
  using Parameters = LocalMHAParameters<Scalar>;
  using Bias = std::optional<TensorView<const Scalar, 3>>;

  /// Room for calls of forward_into().
  class Workspace {
   private:
    friend LocalMHA;

    void prepare(const LocalMHA& layer, const Window& window, Index seqlen, Index workers) {
      if (!flows_.empty() && !flows_.front().fits(layer, seqlen)) flows_.clear();
      while (static_cast<Index>(flows_.size()) < workers)
        flows_.emplace_back(layer, window, seqlen);
      for (Flow& flow : flows_) flow.use(layer);
    }
    Flow& flow(Index worker) { return flows_[static_cast<std::size_t>(worker)]; }

    std::vector<Flow> flows_;
  };

  /// Starts with the weights of a new PyTorch module.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit LocalMHA(const LocalMHAConfig& config, std::uint64_t seed = 0)
      : LocalMHA(config, initial_parameters<Parameters>(config, seed)) {}

  /// \throws std::invalid_argument also naming the tensor whose shape does not fit
  LocalMHA(const LocalMHAConfig& config, Parameters parameters)
      : config_(checked(config)), attention_(attention_config(config)) {
    set_parameters(std::move(parameters));
  }

  const LocalMHAConfig& config() const { return config_; }
  const Parameters& parameters() const { return parameters_; }

  /// \throws std::invalid_argument naming the tensor whose shape does not fit
  void set_parameters(Parameters parameters) {
    detail::require_same_shapes(parameters, Parameters::zeros(config_));
    parameters_ = std::move(parameters);
    const Parameters& p = parameters_;
    if (config_.prenorm) norm_ = LayerNorm<Scalar>(p.norm_weight, p.norm_bias);
    if (config_.qk_rmsnorm) {
      q_norm_ = QkNorm<Scalar>(p.q_scale);
      k_norm_ = QkNorm<Scalar>(p.k_scale);
    }
    const Index dim_head = config_.dim_head;
    to_qkv_ = PackedWeight<Scalar>(p.to_qkv, dim_head);
    if (config_.gate_values_per_head) to_v_gate_ = PackedWeight<Scalar>(p.to_v_gate_weight);
    to_out_ = PackedWeight<Scalar>(p.to_out, 0, dim_head, padded_channels<Scalar>(dim_head));
  }

  /// \param x `[B, N, dim]`
  /// \param mask keys that nobody attends, `[B, N]`
  /// \param attn_bias `[heads or 1, w, (1 + lb + lf)·w]`, see LocalAttention::forward()
  /// \param training dropout acts, with this seed; empty: evaluation
  /// \return `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit
  Tensor<Scalar, 3> forward(TensorView<const Scalar, 3> x, const PaddingMask& mask = {},
                            const Bias& attn_bias = {},
                            std::optional<Training> training = {}) const {
    return forward(Eigen::DefaultDevice(), x, mask, attn_bias, training);
  }

  /// The same on the threads of a device; the same bits for any number of them.
  template <ThreadDevice Device>
  Tensor<Scalar, 3> forward(const Device& device, TensorView<const Scalar, 3> x,
                            const PaddingMask& mask = {}, const Bias& attn_bias = {},
                            std::optional<Training> training = {}) const {
    check(x, mask, attn_bias);
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
    Workspace workspace;
    forward_into(device, y, workspace, x, mask, attn_bias, training);
    return y;
  }

  /// The same into given memory. Allocates nothing if the workspace was last used for this
  /// configuration, sequence length and number of threads (a thread pool's own queue aside).
  /// \param y `[B, N, dim]`, must not overlap x
  /// \param workspace for one call at a time
  template <ThreadDevice Device>
  void forward_into(const Device& device, TensorView<Scalar, 3> y, Workspace& workspace,
                    TensorView<const Scalar, 3> x, const PaddingMask& mask = {},
                    const Bias& attn_bias = {}, std::optional<Training> training = {}) const {
    flow(device, y, workspace, x, mask, attn_bias, training, nullptr);
  }
  void forward_into(TensorView<Scalar, 3> y, Workspace& workspace, TensorView<const Scalar, 3> x,
                    const PaddingMask& mask = {}, const Bias& attn_bias = {},
                    std::optional<Training> training = {}) const {
    forward_into(Eigen::DefaultDevice(), y, workspace, x, mask, attn_bias, training);
  }

  /// What forward_saving() keeps for backward().
  using Saved = SavedLayer<Scalar>;

  /// forward() that keeps what backward() needs.
  /// \param saved becomes what this call kept
  template <ThreadDevice Device>
  Tensor<Scalar, 3> forward_saving(const Device& device, Saved& saved,
                                   TensorView<const Scalar, 3> x, const PaddingMask& mask = {},
                                   const Bias& attn_bias = {},
                                   std::optional<Training> training = {}) const {
    check(x, mask, attn_bias);
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
    saved = Saved(config_, x.dimension(0), x.dimension(1));
    Workspace workspace;
    flow(device, y, workspace, x, mask, attn_bias, training, &saved);
    return y;
  }
  Tensor<Scalar, 3> forward_saving(Saved& saved, TensorView<const Scalar, 3> x,
                                   const PaddingMask& mask = {}, const Bias& attn_bias = {},
                                   std::optional<Training> training = {}) const {
    return forward_saving(Eigen::DefaultDevice(), saved, x, mask, attn_bias, training);
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param gradients those of the weights are added here: `Parameters::zeros(config())` at first
  /// \param saved what forward_saving() kept for the same arguments
  /// \param grad_y `[B, N, dim]`
  /// \param grad_attn_bias null, or where that of attn_bias is added, in its shape
  /// \return that of x, `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit
  template <ThreadDevice Device>
  Tensor<Scalar, 3> backward(const Device& device, Parameters& gradients, const Saved& saved,
                             TensorView<const Scalar, 3> grad_y, TensorView<const Scalar, 3> x,
                             const PaddingMask& mask = {}, const Bias& attn_bias = {},
                             std::optional<Training> training = {},
                             Tensor<Scalar, 3>* grad_attn_bias = nullptr) const {
    const auto inputs = check(x, mask, attn_bias);
    require_shape("grad_y", grad_y.dimensions(), x.dimensions());
    require_shape<2>("saved", {saved.batch, saved.seqlen}, {x.dimension(0), x.dimension(1)});
    detail::require_same_shapes(gradients, Parameters::zeros(config_));
    if (grad_attn_bias != nullptr) {
      if (!attn_bias) reject("grad_attn_bias", "null, because there is no attn_bias", "a tensor");
      require_shape("grad_attn_bias", TensorView<Scalar, 3>(*grad_attn_bias).dimensions(),
                    attn_bias->dimensions());
    }
    Tensor<Scalar, 3> grad_x(x.dimension(0), x.dimension(1), x.dimension(2));
    if (x.size() == 0) return grad_x;
    typename LocalAttention<Scalar>::BiasGradients grad_bias(
        grad_attn_bias != nullptr ? attn_bias : Bias(), config_.heads);
    detail::LayerBackward<Scalar>({config_, parameters_, attention_, norm_, q_norm_, k_norm_},
                                  saved)
        .run(device, inputs, training, x.data(), grad_y.data(), grad_x.data(), gradients,
             grad_bias);
    if (grad_attn_bias != nullptr) *grad_attn_bias += *grad_bias.sum();
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

  /// The probabilities with which forward() weights the values, to look at: memory `O(N²)`.
  /// \return `[B, heads, N, N]`, `[query][key]`; 0 where a query does not see a key
  Tensor<Scalar, 4> attention_probabilities(TensorView<const Scalar, 3> x,
                                            const PaddingMask& mask = {},
                                            const Bias& attn_bias = {}) const {
    check(x, mask, attn_bias);
    const auto [batch, seqlen, dim] = x.dimensions();
    Tensor<Scalar, 4> q(batch, config_.heads, seqlen, config_.dim_head);
    Tensor<Scalar, 4> k(batch, config_.heads, seqlen, config_.dim_head);
    Flow projections(*this, Window(attention_.config()), seqlen);
    for (Index b = 0; b < batch; ++b)
      projections.queries_and_keys(x.data() + b * seqlen * dim, b, q, k);
    return attention_.attention_probabilities(q, k, mask, attn_bias);
  }

 private:
  static constexpr Index count = block_rows<Scalar>;
  // Blocks that pass the weights together: enough to pay for reading them.
  static constexpr Index stretch = std::max(9, 3 * Tiling<Scalar>::blocks);

  template <ThreadDevice Device>
  void flow(const Device& device, TensorView<Scalar, 3> y, Workspace& workspace,
            TensorView<const Scalar, 3> x, const PaddingMask& mask, const Bias& attn_bias,
            const std::optional<Training>& training, Saved* saved) const {
    const auto inputs = check(x, mask, attn_bias);
    require_shape("y", y.dimensions(), x.dimensions());
    const auto [batch, seqlen, dim] = x.dimensions();
    const Index workers = thread_count(device);
    const Index reach = std::min(inputs.window().reach_behind(), seqlen) +
                        std::min(inputs.window().reach_ahead(), seqlen);
    const Runs runs(batch, ceil_div(seqlen, count), ceil_div(reach, count), workers);
    workspace.prepare(*this, inputs.window(), seqlen, std::min(workers, runs.tasks()));
    const auto run = [&, sequence_size = seqlen * dim](Index worker, Index task) {
      const Index b = runs.sequence(task);
      workspace.flow(worker).run(inputs, b, {runs.begin(task), runs.end(task)},
                                 x.data() + b * sequence_size, y.data() + b * sequence_size,
                                 training, saved);
    };
    parallel_for(device, std::min(workers, runs.tasks()), runs.tasks(), run);
  }

  static const LocalMHAConfig& checked(const LocalMHAConfig& config) {
    validate(config);
    return config;
  }

  detail::AttentionInputs<Scalar> check(const TensorView<const Scalar, 3>& x,
                                        const PaddingMask& mask, const Bias& attn_bias) const {
    require_shape("x", x.dimensions(), {-1, -1, config_.dim});
    return {Window(attention_.config()),
            x.dimension(0),
            config_.heads,
            x.dimension(1),
            mask,
            attn_bias};
  }

  // One sequence on its way through the layer.
  class Flow {
    using Blocks = Range;

   public:
    Flow(const LocalMHA& layer, const Window& window, Index seqlen)
        : layer_(&layer),
          config_(layer.config_),
          seqlen_(seqlen),
          blocks_(ceil_div(seqlen, count)),
          steps_(layer.attention_.rotary_steps(window, seqlen)),
          x_(make_block_buffer<Scalar>(stretch * dim() * count)),
          out_(make_block_buffer<Scalar>(stretch * heads() * head_size())),
          y_(make_block_buffer<Scalar>(stretch * dim() * count)) {
      const Index behind = std::min(window.reach_behind(), seqlen);
      const Index ahead = std::min(window.reach_ahead(), seqlen);
      kernel_ = AttentionKernel<Scalar>(dim_head(), std::min(behind + ahead + count, seqlen));
      // Queries wait until their look-around is complete; if it is at once, heads share the room.
      const Index waiting =
          std::max<Index>(1, std::min(ceil_div(ahead, count) + stretch + 2, blocks_));
      const Index kept =
          std::max<Index>(1, std::min(ceil_div(behind + ahead, count) + stretch + 3, blocks_));
      queries_.assign(static_cast<std::size_t>(ahead > 0 ? heads() : 1),
                      Ring<Scalar>(dim_head(), waiting));
      keys_.assign(static_cast<std::size_t>(heads()), Ring<Scalar>(dim_head(), kept));
      values_ = keys_;
      if (layer.config_.gate_values_per_head) gates_ = Ring<Scalar>(heads(), waiting);
    }

    bool fits(const LocalMHA& layer, Index seqlen) const {
      return config_ == layer.config_ && seqlen_ == seqlen;
    }
    // A layer that this fits.
    void use(const LocalMHA& layer) { layer_ = &layer; }

    // The rows of `y` of the queries `[begin, end)`, in blocks.
    // \param saved null, or where the run keeps what belongs to these blocks
    void run(const detail::AttentionInputs<Scalar>& inputs, Index b, const Blocks& queries,
             const Scalar* x, Scalar* y, const std::optional<Training>& training, Saved* saved) {
      saved_ = saved;
      saved_blocks_ = queries;
      first_saved_ = b * blocks_;
      const Window& window = inputs.window();
      make_heads(inputs, b, training);
      const Range keys = window.keys_of({queries.begin * count, queries.end * count}, seqlen_);
      const Index needed = ceil_div(keys.end, count);
      Blocks made{0, keys.begin / count};
      Blocks attended{0, queries.begin};
      while (attended.end < queries.end) {
        // New rows only when no query is ready.
        const bool waiting = ready(window, made.end) <= attended.end;
        made = {made.end, waiting ? std::min(made.end + stretch, needed) : made.end};
        const Index complete = std::min(ready(window, made.end), queries.end);
        attended = {attended.end, std::clamp(complete, attended.end, attended.end + stretch)};
        load(made, x);
        make_gates(made.clipped_to(queries), made.begin);
        for (Index h = 0; h < heads(); ++h) {
          make_queries(made.clipped_to(queries), made.begin, h);
          make_keys_and_values(made, h);
          attend(attended, h);
        }
        project_out(attended, y);
      }
    }

    // Normalized queries and keys of a whole sequence, before positions and scale.
    void queries_and_keys(const Scalar* x, Index b, Tensor<Scalar, 4>& q, Tensor<Scalar, 4>& k) {
      for (Blocks made{0, 0}; made.end < blocks_;) {
        made = {made.end, std::min(made.end + stretch, blocks_)};
        load(made, x);
        for (Index h = 0; h < heads(); ++h) {
          project_queries(made, made.begin, h);
          project_keys(made, h);
          for (Index block = made.begin; block < made.end; ++block) {
            const auto row_of = [&](Tensor<Scalar, 4>& to) {
              return [&, block, h](Index r) { return &to(b, h, block * count + r, 0); };
            };
            store_block(dim_head(), rows_of(block), queries(h)[block], row_of(q));
            store_block(dim_head(), rows_of(block), keys(h)[block], row_of(k));
          }
        }
      }
    }

   private:
    const LocalMHAConfig& config() const { return config_; }
    Index dim() const { return config().dim; }
    Index heads() const { return config().heads; }
    Index dim_head() const { return config().dim_head; }
    Index head_size() const { return padded_channels<Scalar>(dim_head()) * count; }
    Index rows_of(Index block) const { return std::min(count, seqlen_ - block * count); }
    Ring<Scalar>& queries(Index h) { return queries_[queries_.size() > 1 ? to_size(h) : 0]; }
    Ring<Scalar>& keys(Index h) { return keys_[to_size(h)]; }
    Ring<Scalar>& values(Index h) { return values_[to_size(h)]; }
    static std::size_t to_size(Index i) { return static_cast<std::size_t>(i); }

    void make_heads(const detail::AttentionInputs<Scalar>& inputs, Index b,
                    const std::optional<Training>& training) {
      const bool drops = training && config().dropout > 0;
      heads_.clear();
      dropouts_.clear();
      if (drops)
        for (Index h = 0; h < heads(); ++h)
          dropouts_.emplace_back(config().dropout, training->seed,
                                 static_cast<std::uint32_t>(b * heads() + h));
      for (Index h = 0; h < heads(); ++h) {
        heads_.push_back(inputs.head(b, h));
        heads_.back().steps = steps_ ? &*steps_ : nullptr;
        heads_.back().dropout = drops ? &dropouts_[to_size(h)] : nullptr;
      }
    }

    // The first block of queries that sees keys which are not made yet.
    Index ready(const Window& window, Index made) const {
      if (made == blocks_) return blocks_;
      Index first = std::max<Index>(0, made - ceil_div(window.reach_ahead(), count) - 1);
      while (first < made &&
             window.keys_of({first * count, (first + 1) * count}, seqlen_).end <= made * count)
        ++first;
      return first;
    }

    void load(const Blocks& blocks, const Scalar* x) {
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        Scalar* to = x_.data() + (block - blocks.begin) * dim() * count;
        load_block(
            dim(), rows_of(block), [&](Index r) { return x + (block * count + r) * dim(); }, to);
        if (config().prenorm) layer_->norm_.apply(to);
      }
    }

    // The head group's projection of blocks, of which `loaded` is the first in x_, into a ring.
    void project_into(Ring<Scalar>& ring, const PackedWeight<Scalar>& weight, Index group,
                      const Blocks& blocks, Index loaded) {
      project(weight, group, x_.data() + (blocks.begin - loaded) * dim() * count,
              blocks.end - blocks.begin, [&](Index i) { return ring[blocks.begin + i]; });
    }

    void make_gates(const Blocks& blocks, Index loaded) {
      if (!config().gate_values_per_head) return;
      project_into(gates_, layer_->to_v_gate_, 0, blocks, loaded);
      for (Index block = blocks.begin; block < blocks.end; ++block)
        for (Index h = 0; h < heads(); ++h) {
          Scalar* gate = gates_[block] + h * count;
          const auto bias = Lanes<Scalar>::broadcast(layer_->parameters_.to_v_gate_bias[h]);
          const auto opened = sigmoid(Lanes<Scalar>::load(gate) + bias);
          opened.store(gate);
          if (saved_ != nullptr) opened.store(saved_->gates[first_saved_ + block] + h * count);
        }
    }

    // Keeps those blocks of a ring that belong to the run.
    void save(BlockArray<Scalar> Saved::* part, Ring<Scalar>& ring, const Blocks& blocks, Index h) {
      if (saved_ == nullptr) return;
      const Blocks own = blocks.clipped_to(saved_blocks_);
      for (Index block = own.begin; block < own.end; ++block)
        std::copy_n(ring[block], dim_head() * count,
                    (saved_->*part)[first_saved_ + block] + h * head_size());
    }

    void project_queries(const Blocks& blocks, Index loaded, Index h) {
      project_into(queries(h), layer_->to_qkv_, h, blocks, loaded);
      save(&Saved::q, queries(h), blocks, h);
      if (!config().qk_rmsnorm) return;
      for (Index block = blocks.begin; block < blocks.end; ++block)
        layer_->q_norm_.apply(queries(h)[block]);
    }

    void project_keys(const Blocks& blocks, Index h) {
      project_into(keys(h), layer_->to_qkv_, heads() + h, blocks, blocks.begin);
      save(&Saved::k, keys(h), blocks, h);
      if (!config().qk_rmsnorm) return;
      for (Index block = blocks.begin; block < blocks.end; ++block)
        layer_->k_norm_.apply(keys(h)[block]);
    }

    void make_queries(const Blocks& blocks, Index loaded, Index h) {
      project_queries(blocks, loaded, h);
      const auto scale = static_cast<Scalar>(layer_->attention_.softmax_scale(dim_head()) * log2_e);
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        scale_block(dim_head(), scale, queries(h)[block]);
        if (const auto* rotary = layer_->attention_.rotary())
          rotary->apply_to_queries(queries(h)[block], block * count);
      }
    }

    void make_keys_and_values(const Blocks& blocks, Index h) {
      project_keys(blocks, h);
      project_into(values(h), layer_->to_qkv_, 2 * heads() + h, blocks, blocks.begin);
      save(&Saved::v, values(h), blocks, h);
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        if (const auto* rotary = layer_->attention_.rotary())
          rotary->apply_to_keys(keys(h)[block], block * count);
        values(h).note_finite(block);
      }
    }

    void attend(const Blocks& blocks, Index h) {
      const AttentionHead<Scalar>& head = heads_[to_size(h)];
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        Scalar* out = out_.data() + ((block - blocks.begin) * heads() + h) * head_size();
        Scalar* lse = saved_ != nullptr ? saved_->lse[first_saved_ + block] + h * count : nullptr;
        kernel_.attend(head, block * count, queries(h)[block], keys(h), values(h), out, lse);
        if (saved_ != nullptr)
          std::copy_n(out, dim_head() * count, saved_->out[first_saved_ + block] + h * head_size());
        if (!config().gate_values_per_head) continue;
        const auto gate = Lanes<Scalar>::load(gates_[block] + h * count);
        for (Index c = 0; c < dim_head(); ++c)
          (gate * Lanes<Scalar>::load(out + c * count)).store(out + c * count);
      }
    }

    void project_out(const Blocks& blocks, Scalar* y) {
      const auto block_of_y = [&](Index i) { return y_.data() + i * dim() * count; };
      project(layer_->to_out_, 0, out_.data(), blocks.end - blocks.begin, block_of_y);
      for (Index block = blocks.begin; block < blocks.end; ++block)
        store_block(dim(), rows_of(block), block_of_y(block - blocks.begin),
                    [&](Index r) { return y + (block * count + r) * dim(); });
    }

    const LocalMHA* layer_;
    LocalMHAConfig config_;
    Index seqlen_;
    Index blocks_;
    std::optional<RotarySteps<Scalar>> steps_;
    AttentionKernel<Scalar> kernel_;
    BlockBuffer<Scalar> x_;    // [block][dim][count], after step 1
    BlockBuffer<Scalar> out_;  // [block][head][channel][count], of the heads
    BlockBuffer<Scalar> y_;    // [block][dim][count]
    std::vector<Ring<Scalar>> queries_;
    std::vector<Ring<Scalar>> keys_;
    std::vector<Ring<Scalar>> values_;
    Ring<Scalar> gates_;
    std::vector<AttentionHead<Scalar>> heads_;
    std::vector<Dropout<Scalar>> dropouts_;
    Saved* saved_ = nullptr;  // null: nothing is kept
    Blocks saved_blocks_;
    Index first_saved_ = 0;
  };

  LocalMHAConfig config_;
  LocalAttention<Scalar> attention_;
  Parameters parameters_;
  LayerNorm<Scalar> norm_;
  QkNorm<Scalar> q_norm_;
  QkNorm<Scalar> k_norm_;
  PackedWeight<Scalar> to_qkv_;
  PackedWeight<Scalar> to_v_gate_;
  PackedWeight<Scalar> to_out_;
};

}  // namespace local_mha
