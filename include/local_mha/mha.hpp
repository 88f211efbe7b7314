// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA: projection, normalization, positions, local attention and output projection.
///
/// The layer flows: a stretch of rows comes in, its queries, keys and values are made while it is in
/// cache, the queries whose look-around is complete attend, and their rows go out. Only the
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
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
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
 public:
  using Parameters = LocalMHAParameters<Scalar>;
  using Bias = std::optional<TensorView<const Scalar, 3>>;

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
    const auto inputs = check(x, mask, attn_bias);
    const auto [batch, seqlen, dim] = x.dimensions();
    Tensor<Scalar, 3> y(batch, seqlen, dim);
    Flow flow(*this, inputs.window(), seqlen);
    for (Index b = 0; b < batch; ++b)
      flow.run(inputs, b, x.data() + b * seqlen * dim, y.data() + b * seqlen * dim, training);
    return y;
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
    Flow flow(*this, Window(attention_.config()), seqlen);
    for (Index b = 0; b < batch; ++b) flow.queries_and_keys(x.data() + b * seqlen * dim, b, q, k);
    return attention_.attention_probabilities(q, k, mask, attn_bias);
  }

 private:
  static constexpr Index count = block_rows<Scalar>;
  // Blocks that pass the weights together: enough to pay for reading them.
  static constexpr Index stretch = std::max(9, 3 * Tiling<Scalar>::blocks);

  static const LocalMHAConfig& checked(const LocalMHAConfig& config) {
    validate(config);
    return config;
  }

  detail::AttentionInputs<Scalar> check(const TensorView<const Scalar, 3>& x,
                                        const PaddingMask& mask, const Bias& attn_bias) const {
    require_shape("x", x.dimensions(), {-1, -1, config_.dim});
    return {Window(attention_.config()), x.dimension(0), config_.heads, x.dimension(1), mask,
            attn_bias};
  }

  // One sequence on its way through the layer.
  class Flow {
   public:
    Flow(const LocalMHA& layer, const Window& window, Index seqlen)
        : layer_(layer),
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
      const Index waiting = std::max<Index>(1, std::min(ceil_div(ahead, count) + stretch + 2, blocks_));
      const Index kept =
          std::max<Index>(1, std::min(ceil_div(behind + ahead, count) + stretch + 3, blocks_));
      queries_.assign(static_cast<std::size_t>(ahead > 0 ? heads() : 1),
                      Ring<Scalar>(dim_head(), waiting));
      keys_.assign(static_cast<std::size_t>(heads()), Ring<Scalar>(dim_head(), kept));
      values_ = keys_;
      if (layer.config_.gate_values_per_head) gates_ = Ring<Scalar>(heads(), waiting);
    }

    void run(const detail::AttentionInputs<Scalar>& inputs, Index b, const Scalar* x, Scalar* y,
             const std::optional<Training>& training) {
      std::vector<AttentionHead<Scalar>> heads_of_sequence;
      std::vector<Dropout<Scalar>> dropouts;
      make_heads(inputs, b, training, heads_of_sequence, dropouts);
      Blocks made{0, 0};
      Blocks attended{0, 0};
      while (attended.end < blocks_) {
        // New rows only when no query is ready.
        const bool waiting = attended.end == ready(inputs.window(), made.end);
        made = {made.end, waiting ? std::min(made.end + stretch, blocks_) : made.end};
        attended = {attended.end,
                    std::min(ready(inputs.window(), made.end), attended.end + stretch)};
        load(made, x);
        make_gates(made);
        for (Index h = 0; h < heads(); ++h) {
          make_queries_keys_values(made, h);
          attend(attended, h, heads_of_sequence[static_cast<std::size_t>(h)]);
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
          project_and_normalize(made, h);
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
    using Blocks = Range;

    Index dim() const { return layer_.config_.dim; }
    Index heads() const { return layer_.config_.heads; }
    Index dim_head() const { return layer_.config_.dim_head; }
    Index head_size() const { return padded_channels<Scalar>(dim_head()) * count; }
    Index rows_of(Index block) const { return std::min(count, seqlen_ - block * count); }
    Ring<Scalar>& queries(Index h) { return queries_[queries_.size() > 1 ? to_size(h) : 0]; }
    Ring<Scalar>& keys(Index h) { return keys_[to_size(h)]; }
    Ring<Scalar>& values(Index h) { return values_[to_size(h)]; }
    static std::size_t to_size(Index i) { return static_cast<std::size_t>(i); }

    void make_heads(const detail::AttentionInputs<Scalar>& inputs, Index b,
                    const std::optional<Training>& training,
                    std::vector<AttentionHead<Scalar>>& all,
                    std::vector<Dropout<Scalar>>& dropouts) const {
      const bool drops = training && layer_.config_.dropout > 0;
      if (drops)
        for (Index h = 0; h < heads(); ++h)
          dropouts.emplace_back(layer_.config_.dropout, training->seed,
                                static_cast<std::uint32_t>(b * heads() + h));
      for (Index h = 0; h < heads(); ++h) {
        all.push_back(inputs.head(b, h));
        all.back().steps = steps_ ? &*steps_ : nullptr;
        all.back().dropout = drops ? &dropouts[to_size(h)] : nullptr;
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
        if (layer_.config_.prenorm) layer_.norm_.apply(to);
      }
    }

    void make_gates(const Blocks& blocks) {
      if (!layer_.config_.gate_values_per_head) return;
      project(layer_.to_v_gate_, 0, x_.data(), blocks.end - blocks.begin,
              [&](Index i) { return gates_[blocks.begin + i]; });
      for (Index block = blocks.begin; block < blocks.end; ++block)
        for (Index h = 0; h < heads(); ++h) {
          Scalar* gate = gates_[block] + h * count;
          const auto bias = Lanes<Scalar>::broadcast(layer_.parameters_.to_v_gate_bias[h]);
          sigmoid(Lanes<Scalar>::load(gate) + bias).store(gate);
        }
    }

    void project_and_normalize(const Blocks& blocks, Index h) {
      const Index n = blocks.end - blocks.begin;
      const auto into = [&](Ring<Scalar>& ring) {
        return [&](Index i) { return ring[blocks.begin + i]; };
      };
      project(layer_.to_qkv_, h, x_.data(), n, into(queries(h)));
      project(layer_.to_qkv_, heads() + h, x_.data(), n, into(keys(h)));
      project(layer_.to_qkv_, 2 * heads() + h, x_.data(), n, into(values(h)));
      if (!layer_.config_.qk_rmsnorm) return;
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        layer_.q_norm_.apply(queries(h)[block]);
        layer_.k_norm_.apply(keys(h)[block]);
      }
    }

    void make_queries_keys_values(const Blocks& blocks, Index h) {
      project_and_normalize(blocks, h);
      const auto scale = static_cast<Scalar>(layer_.attention_.softmax_scale(dim_head()) * log2_e);
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        scale_block(dim_head(), scale, queries(h)[block]);
        if (const auto* rotary = layer_.attention_.rotary()) {
          rotary->apply_to_queries(queries(h)[block], block * count);
          rotary->apply_to_keys(keys(h)[block], block * count);
        }
        values(h).note_finite(block);
      }
    }

    void attend(const Blocks& blocks, Index h, const AttentionHead<Scalar>& head) {
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        Scalar* out = out_.data() + ((block - blocks.begin) * heads() + h) * head_size();
        kernel_.attend(head, block * count, queries(h)[block], keys(h), values(h), out);
        if (!layer_.config_.gate_values_per_head) continue;
        const auto gate = Lanes<Scalar>::load(gates_[block] + h * count);
        for (Index c = 0; c < dim_head(); ++c)
          (gate * Lanes<Scalar>::load(out + c * count)).store(out + c * count);
      }
    }

    void project_out(const Blocks& blocks, Scalar* y) {
      const auto block_of_y = [&](Index i) { return y_.data() + i * dim() * count; };
      project(layer_.to_out_, 0, out_.data(), blocks.end - blocks.begin, block_of_y);
      for (Index block = blocks.begin; block < blocks.end; ++block)
        store_block(dim(), rows_of(block), block_of_y(block - blocks.begin),
                    [&](Index r) { return y + (block * count + r) * dim(); });
    }

    const LocalMHA& layer_;
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
