// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA's backward pass: the layer's steps in reverse, each over all positions.
///
///     g_heads = g_y · W_out                         dW_out += g_yᵀ · (gate ⊙ out)
///     g_out = gate ⊙ g_heads                        g_gate = σ' · Σ_c g_heads · out
///     g_q, g_k, g_v = attention's backward(g_out)   through rotary and QkNorm
///     g_x = [g_q | g_k | g_v] · W_qkv               dW_qkv += [g_q | g_k | g_v]ᵀ · x
///     through the gates' projection and LayerNorm
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include <local_mha/attention/local_attention.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/layer_norm.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/weight_gradient.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What a layer's forward pass keeps for the backward pass, in blocks: four numbers of each channel
/// of a head and position, and the log-sum-exp. What fills up channels has no value.
template <typename Scalar>
struct SavedLayer {
  /// Becomes room for a batch of sequences; memory of the same shape stays.
  void prepare(const LocalMHAConfig& config, Index batch_size, Index length) {
    batch = batch_size;
    seqlen = length;
    heads = config.heads;
    dim_head = config.dim_head;
    gated = config.gate_values_per_head;
    const Index blocks = batch * ceil_div(seqlen, block_rows<Scalar>);
    for (BlockArray<Scalar>* part : {&q, &k, &v, &out})
      part->prepare(blocks, config.heads * padded_channels<Scalar>(config.dim_head));
    lse.prepare(blocks, config.heads);
    gates.prepare(config.gate_values_per_head ? blocks : 0, padded_channels<Scalar>(config.heads));
  }

  /// \throws std::invalid_argument if it is not of a layer of these heads, or of another batch
  void check(const LocalMHAConfig& config, Index batch_size, Index length) const {
    const auto describe = [](Index number, Index channels, bool with_gates) {
      return std::to_string(number) + " heads of " + std::to_string(channels) + " channels with" +
             (with_gates ? "" : "out") + " gates";
    };
    if (heads != config.heads || dim_head != config.dim_head ||
        gated != config.gate_values_per_head)
      reject("saved", describe(config.heads, config.dim_head, config.gate_values_per_head),
             describe(heads, dim_head, gated));
    require_shape<2>("saved", {batch, seqlen}, {batch_size, length});
  }

  Index batch = 0;
  Index seqlen = 0;
  Index heads = 0;
  Index dim_head = 0;
  bool gated = false;
  /// Blocks of all sequences, one after the other: `[block][head][padded channel][block_rows]`,
  /// queries and keys as they were projected.
  BlockArray<Scalar> q;
  BlockArray<Scalar> k;
  BlockArray<Scalar> v;
  BlockArray<Scalar> out;    ///< of the attention, before the gates
  BlockArray<Scalar> lse;    ///< `[block][head][block_rows]`
  BlockArray<Scalar> gates;  ///< `[block][padded head][block_rows]`, after the sigmoid
};

namespace detail {

/// The steps of LocalMHA::backward().
template <typename Scalar>
class LayerBackward {
 public:
  /// The layer, whose parts must outlive this.
  struct Layer {
    const LocalMHAConfig& config;
    const LocalMHAParameters<Scalar>& parameters;
    const LocalAttention<Scalar>& attention;
    const LayerNorm<Scalar>& norm;
    const QkNorm<Scalar>& q_norm;
    const QkNorm<Scalar>& k_norm;
  };

  /// What lies between the steps, of all positions.
  struct Between {
    PanelArray<Scalar> normed_panels;
    BlockArray<Scalar> grad_y;
    PanelArray<Scalar> out_panels;
    BlockArray<Scalar> grad_out;
    BlockArray<Scalar> grad_qkv;
    BlockArray<Scalar> grad_gates;
    typename LocalAttention<Scalar>::Workspace attention;
  };

  LayerBackward(const Layer& layer, const SavedLayer<Scalar>& saved, Between& between)
      : layer_(layer),
        saved_(saved),
        rows_{saved.batch, saved.seqlen, block_rows<Scalar>},
        normed_panels_(between.normed_panels),
        grad_y_(between.grad_y),
        out_panels_(between.out_panels),
        grad_out_(between.grad_out),
        grad_qkv_(between.grad_qkv),
        grad_gates_(between.grad_gates),
        workspace_(between.attention) {
    normed_panels_.prepare(rows_.count(), panel_channels<Scalar>(dim()));
    grad_y_.prepare(rows_.count(), dim());
    out_panels_.prepare(rows_.count(), heads() * panel_channels<Scalar>(dim_head()));
    grad_out_.prepare(rows_.count(), heads() * head_channels());
    grad_qkv_.prepare(rows_.count(), 3 * heads() * head_channels());
    if (config().gate_values_per_head)
      grad_gates_.prepare(rows_.count(), padded_channels<Scalar>(heads()));
  }

  /// \param x, grad_y `[B·N, dim]`
  /// \param grad_x the same shape
  template <ThreadDevice Device>
  void run(const Device& device, const AttentionInputs<Scalar>& inputs,
           const std::optional<Training>& training, const Scalar* x, const Scalar* grad_y,
           Scalar* grad_x, LocalMHAParameters<Scalar>& gradients,
           typename LocalAttention<Scalar>::BiasGradients& grad_bias) {
    project_out(device, x, grad_y, gradients);
    attend(device, inputs, training, gradients, grad_bias);
    project_in(device, x, grad_x, gradients);
  }

 private:
  using L = Lanes<Scalar>;
  static constexpr Index count = block_rows<Scalar>;

  const LocalMHAConfig& config() const { return layer_.config; }
  const LocalMHAParameters<Scalar>& weights() const { return layer_.parameters; }
  Index dim() const { return config().dim; }
  Index heads() const { return config().heads; }
  Index dim_head() const { return config().dim_head; }
  Index head_channels() const { return padded_channels<Scalar>(dim_head()); }
  Index head_size() const { return head_channels() * count; }
  Index panels_of_head() const { return panel_channels<Scalar>(dim_head()) / count; }

  void load_rows(const Scalar* from, Index block, Scalar* to) const {
    load_block(
        dim(), rows_.rows(block), [&](Index r) { return from + (rows_.row(block) + r) * dim(); },
        to);
  }

  // From the gradient of y to those of the heads' outputs and gates, and of to_out.
  template <ThreadDevice Device>
  void project_out(const Device& device, const Scalar* x, const Scalar* grad_y,
                   LocalMHAParameters<Scalar>& gradients) {
    const PackedWeight<Scalar> weight(weights().to_out.transpose(), dim_head());
    for_each_stretch(device, rows_.count(), [&](Index, const Range& blocks) {
      auto room = make_block_buffer<Scalar>(std::max(dim(), head_channels()) * count);
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        clear_filling_gates(block);
        load_rows(x, block, room.data());
        if (config().prenorm) {
          layer_.norm.apply(room.data());
          clear_other_lanes(dim(), {0, static_cast<int>(rows_.rows(block))}, room.data());
        }
        normed_panels_.put(block, 0, dim(), room.data());
        load_rows(grad_y, block, grad_y_[block]);
      }
      for (Index h = 0; h < heads(); ++h) {
        project(weight, h, grad_y_[blocks.begin], blocks.end - blocks.begin,
                [&](Index b) { return grad_out_[blocks.begin + b] + h * head_size(); });
        for (Index block = blocks.begin; block < blocks.end; ++block)
          open_gate(block, h, room.data());
      }
    });
    add_weight_gradient(device, rows_.count(), grad_y_[0], grad_y_.stride(), Groups::of(dim()),
                        out_panels_,
                        Groups::of(heads(), dim_head(), panel_channels<Scalar>(dim_head())),
                        gradients.to_out.data());
  }

  // A projection multiplies what fills up the gates' channels by 0.
  void clear_filling_gates(Index block) {
    if (!config().gate_values_per_head) return;
    std::fill(grad_gates_[block] + heads() * count, grad_gates_[block] + grad_gates_.stride(),
              Scalar(0));
  }

  // Through the gate of a head, and the operand of to_out's gradient.
  void open_gate(Index block, Index h, Scalar* gated) {
    const Scalar* out = saved_.out[block] + h * head_size();
    Scalar* grad = grad_out_[block] + h * head_size();
    const auto put = [&](const Scalar* gated_out) {
      out_panels_.put(block, h * panels_of_head(), dim_head(), gated_out);
    };
    if (!config().gate_values_per_head) return put(out);
    const L gate = L::load(saved_.gates[block] + h * count);
    const L grad_gate = dot(dim_head(), grad, out);
    // σ' = σ·(1 − σ)
    (grad_gate * (gate - gate * gate)).store(grad_gates_[block] + h * count);
    for (Index c = 0; c < dim_head(); ++c) {
      (gate * L::load(out + c * count)).store(gated + c * count);
      (gate * L::load(grad + c * count)).store(grad + c * count);
    }
    put(gated);
  }

  // A head of the attention, as AttentionBackwardFlow takes it.
  struct Head {
    LayerBackward& layer;
    Index b;
    Index h;
    Scalar* scale_sums;

    Index at(Index block) const { return b * layer.rows_.of_sequence() + block; }
    const Scalar* saved(const BlockArray<Scalar>& blocks, Index block) const {
      return blocks[at(block)] + h * layer.head_size();
    }
    Scalar* grad(Index part, Index block) const {
      return layer.grad_qkv_[at(block)] + (part * layer.heads() + h) * layer.head_size();
    }
    void copy(const Scalar* from, Scalar* to) const {
      std::copy_n(from, layer.dim_head() * count, to);
    }

    // With 0 in the channels that fill up, which a projection multiplies by 0.
    void put_grad(Index part, Index block, const Scalar* from) const {
      Scalar* to = grad(part, block);
      copy(from, to);
      std::fill(to + layer.dim_head() * count, to + layer.head_size(), Scalar(0));
    }

    void load_queries(Index block, Scalar* to) const {
      copy(saved(layer.saved_.q, block), to);
      if (layer.config().qk_rmsnorm) layer.layer_.q_norm.apply(to);
    }
    void load_keys(Index block, Scalar* to) const {
      copy(saved(layer.saved_.k, block), to);
      if (layer.config().qk_rmsnorm) layer.layer_.k_norm.apply(to);
    }
    void load_values(Index block, Scalar* to) const { copy(saved(layer.saved_.v, block), to); }
    void load_out(Index block, Scalar* to) const { copy(saved(layer.saved_.out, block), to); }
    void load_grad_out(Index block, Scalar* to) const { copy(saved(layer.grad_out_, block), to); }
    void load_lse(Index block, Scalar* to) const {
      std::copy_n(layer.saved_.lse[at(block)] + h * count, count, to);
    }
    void store_grad_queries(Index block, Scalar* from) const {
      if (layer.config().qk_rmsnorm)
        layer.layer_.q_norm.apply_backward(saved(layer.saved_.q, block), from, scale_sums);
      put_grad(0, block, from);
    }
    void store_grad_keys(Index block, Scalar* from, Scalar* /*room*/) const {
      if (layer.config().qk_rmsnorm)
        layer.layer_.k_norm.apply_backward(saved(layer.saved_.k, block), from,
                                           scale_sums + layer.dim_head() * count);
      put_grad(1, block, from);
    }
    void store_grad_values(Index block, Scalar* from) const { put_grad(2, block, from); }

    void add_upcoming(Index queries, Index keys, Index finished_keys, Upcoming<Scalar>& to) const {
      const auto add = [&](const Scalar* block) { to.add(block, layer.dim_head() * count); };
      if (queries < layer.rows_.of_sequence()) {
        add(saved(layer.saved_.q, queries));
        add(saved(layer.saved_.out, queries));
        add(saved(layer.grad_out_, queries));
        add(grad(0, queries));
      }
      if (keys < layer.rows_.of_sequence()) {
        add(saved(layer.saved_.k, keys));
        add(saved(layer.saved_.v, keys));
      }
      add(grad(1, finished_keys));
      add(grad(2, finished_keys));
    }
  };

  template <ThreadDevice Device>
  void attend(const Device& device, const AttentionInputs<Scalar>& inputs,
              const std::optional<Training>& training, LocalMHAParameters<Scalar>& gradients,
              typename LocalAttention<Scalar>::BiasGradients& grad_bias) {
    StretchSums<Scalar> scale_sums;
    if (config().qk_rmsnorm)
      scale_sums = StretchSums<Scalar>(saved_.batch * heads(), 2 * dim_head());
    const auto head_of = [&](Index head) {
      return Head{*this, head / heads(), head % heads(),
                  config().qk_rmsnorm ? scale_sums[head] : nullptr};
    };
    layer_.attention.differentiate(device, workspace_, inputs, saved_.batch, saved_.seqlen,
                                   dim_head(), head_of, grad_bias, training);
    if (!config().qk_rmsnorm) return;
    scale_sums.add_to(gradients.q_scale);
    scale_sums.add_to(gradients.k_scale, dim_head());
  }

  // From the gradients of queries, keys, values and gates to those of x and the weights.
  template <ThreadDevice Device>
  void project_in(const Device& device, const Scalar* x, Scalar* grad_x,
                  LocalMHAParameters<Scalar>& gradients) {
    const bool gates = config().gate_values_per_head;
    add_weight_gradient(device, rows_.count(), grad_qkv_[0], grad_qkv_.stride(),
                        Groups::of(3 * heads(), dim_head(), head_channels()), normed_panels_,
                        Groups::of(dim()), gradients.to_qkv.data());
    if (gates)
      add_weight_gradient(device, rows_.count(), grad_gates_[0], grad_gates_.stride(),
                          Groups::of(heads()), normed_panels_, Groups::of(dim()),
                          gradients.to_v_gate_weight.data());

    const PackedWeight<Scalar> to_qkv(weights().to_qkv.transpose(), 0, dim_head(), head_channels());
    PackedWeight<Scalar> to_v_gate;
    if (gates)
      to_v_gate = PackedWeight<Scalar>(weights().to_v_gate_weight.transpose(), 0, heads(),
                                       padded_channels<Scalar>(heads()));
    const Index stretches = ceil_div(rows_.count(), stretch_blocks);
    StretchSums<Scalar> norm_sums;
    if (config().prenorm) norm_sums = StretchSums<Scalar>(stretches, 2 * dim());
    StretchSums<Scalar> gate_sums;
    if (gates) gate_sums = StretchSums<Scalar>(stretches, heads());
    for_each_stretch(device, rows_.count(), [&](Index stretch, const Range& blocks) {
      const Index size = blocks.end - blocks.begin;
      BlockArray<Scalar> grad(size, dim());
      project(to_qkv, 0, grad_qkv_[blocks.begin], size, [&](Index b) { return grad[b]; });
      if (gates) {
        BlockArray<Scalar> more(size, dim());
        project(to_v_gate, 0, grad_gates_[blocks.begin], size, [&](Index b) { return more[b]; });
        for (Index b = 0; b < size; ++b) {
          add(dim(), more[b], grad[b]);
          add(heads(), grad_gates_[blocks.begin + b], gate_sums[stretch]);
        }
      }
      auto room = make_block_buffer<Scalar>(dim() * count);
      for (Index b = 0; b < size; ++b) {
        const Index block = blocks.begin + b;
        if (config().prenorm) {
          load_rows(x, block, room.data());
          layer_.norm.apply_backward(room.data(), grad[b], norm_sums[stretch]);
        }
        store_block(dim(), rows_.rows(block), grad[b],
                    [&](Index r) { return grad_x + (rows_.row(block) + r) * dim(); });
      }
    });
    if (config().prenorm) {
      norm_sums.add_to(gradients.norm_weight);
      norm_sums.add_to(gradients.norm_bias, dim());
    }
    if (gates) gate_sums.add_to(gradients.to_v_gate_bias);
  }

  static void add(Index channels, const Scalar* from, Scalar* to) {
    for (Index c = 0; c < channels; ++c)
      (L::load(to + c * count) + L::load(from + c * count)).store(to + c * count);
  }

  Layer layer_;
  const SavedLayer<Scalar>& saved_;
  BatchBlocks rows_;
  PanelArray<Scalar>& normed_panels_;
  BlockArray<Scalar>& grad_y_;
  PanelArray<Scalar>& out_panels_;
  BlockArray<Scalar>& grad_out_;
  BlockArray<Scalar>& grad_qkv_;
  BlockArray<Scalar>& grad_gates_;
  typename LocalAttention<Scalar>::Workspace& workspace_;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
