// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA's backward pass: the layer's steps in reverse, each over all positions.
///
///     g_heads = g_y · W_out                         dW_out += g_yᵀ · (gate ⊙ out)
///     g_out = gate ⊙ g_heads                        g_gate = σ' · Σ_c g_heads · out
///     g_q, g_k, g_v = attention's backward(g_out)   through rotary and QkNorm, or RmsNorm
///     g_x = [g_q | g_k | g_v] · W_qkv               dW_qkv += [g_q | g_k | g_v]ᵀ · x
///     through the gates' projection and the norm of the input
///
/// The gradients of biases are sums over the positions, of `g_y` and of `[g_q | g_k | g_v]`.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/local_attention.hpp>
#include <local_mha/attention/sequence_blocks.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/rms_norm.hpp>
#include <local_mha/ops/weight_gradient.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// The steps of LocalMHA::backward().
template <typename Scalar>
class LayerBackward {
 public:
  /// What lies between the steps, of all positions.
  struct Between {
    PanelArray<Scalar> normed_panels;
    BlockArray<Scalar> grad_y;
    PanelArray<Scalar> out_panels;
    BlockArray<Scalar> grad_out;
    BlockArray<Scalar> grad_qkv;
    BlockArray<Scalar> grad_gates;
    typename LocalAttention<Scalar>::Workspace attention;
    // Transposed, from gradients of results to those of inputs.
    PackedWeight<Scalar> to_out;
    PackedWeight<Scalar> to_qkv;
    PackedWeight<Scalar> to_v_gate;
    StretchSums<Scalar> scale_sums;  // of each head, or of all
    StretchSums<Scalar> norm_sums;
    StretchSums<Scalar> gate_sums;
    StretchSums<Scalar> qkv_sums;
    StretchSums<Scalar> out_sums;
    // Of a worker.
    struct Room {
      BlockArray<Scalar> block;
      BlockArray<Scalar> grad;
      BlockArray<Scalar> more;
    };
    std::vector<Room> rooms;
  };

  /// Allocates all that run() uses, but for what the attention takes for each of its workers.
  /// \param layer must outlive this
  /// \param threads of the device
  LayerBackward(const LayerWeights<Scalar>& layer, const SavedLayer<Scalar>& saved,
                Between& between, Index threads)
      : layer_(layer),
        saved_(saved),
        between_(between),
        rows_(saved.rows),
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
    grad_qkv_.prepare(rows_.count(), qkv_heads() * head_channels());
    const Index stretches = ceil_div(rows_.count(), stretch_blocks);
    const bool gates = config().gate_values_per_head;
    if (norms_all_heads())
      between.scale_sums.prepare(stretches, (heads() + kv_heads()) * dim_head());
    else if (norms_each_head())
      between.scale_sums.prepare(saved.batch * heads() * scale_stretches(), 2 * dim_head());
    if (config().prenorm) between.norm_sums.prepare(stretches, 2 * dim());
    if (config().qkv_bias) between.qkv_sums.prepare(stretches, qkv_heads() * dim_head());
    if (config().out_bias) between.out_sums.prepare(stretches, dim());
    between.to_out.pack(weights().to_out.transpose(), dim_head());
    between.to_qkv.pack(weights().to_qkv.transpose(), 0, dim_head(), head_channels());
    if (gates) {
      grad_gates_.prepare(rows_.count(), padded_channels<Scalar>(heads()));
      between.gate_sums.prepare(stretches, heads());
      between.to_v_gate.pack(weights().to_v_gate_weight.transpose(), 0, heads(),
                             padded_channels<Scalar>(heads()));
    }
    const auto workers = static_cast<std::size_t>((std::min)(threads, stretches));
    if (between.rooms.size() < workers) between.rooms.resize(workers);
    for (auto& room : between.rooms) {
      room.block.prepare(1, (std::max)(dim(), head_channels()));
      room.grad.prepare(stretch_blocks, dim());
      if (gates) room.more.prepare(stretch_blocks, dim());
    }
  }

  /// \param x, grad_y `[B·N, dim]`
  /// \param grad_x the same shape
  template <ThreadDevice Device>
  void run(const Device& device, const AttentionInputs<Scalar>& inputs,
           const std::optional<Training>& training, const Scalar* x, const Scalar* grad_y,
           Scalar* grad_x, LocalMHAParameters<Scalar>& gradients,
           typename LocalAttention<Scalar>::BiasGradients& grad_bias);

 private:
  using L = Lanes<Scalar>;
  using Room = typename Between::Room;
  static constexpr Index count = block_rows<Scalar>;

  // `task(room, stretch, blocks)`, as for_each_stretch() calls it.
  template <ThreadDevice Device, typename Task>
  void over_stretches(const Device& device, Task&& task) {
    const Index blocks = rows_.count();
    parallel_for(device, thread_count(device), ceil_div(blocks, stretch_blocks),
                 [&](Index worker, Index i) {
                   const Index begin = i * stretch_blocks;
                   task(between_.rooms[static_cast<std::size_t>(worker)], i,
                        Range{begin, (std::min)(begin + stretch_blocks, blocks)});
                 });
  }

  const LocalMHAConfig& config() const { return layer_.config; }
  const LocalMHAParameters<Scalar>& weights() const { return layer_.parameters; }
  Index dim() const { return config().dim; }
  Index heads() const { return config().heads; }
  Index kv_heads() const { return resolved_kv_heads(config()); }
  Index qkv_heads() const { return detail::qkv_heads(config()); }
  Index dim_head() const { return config().dim_head; }
  Index head_channels() const { return padded_channels<Scalar>(dim_head()); }
  Index head_size() const { return head_channels() * count; }
  bool norms_each_head() const { return static_cast<bool>(layer_.q_norm); }
  bool norms_all_heads() const { return layer_.norms_of_all.front().dim() > 0; }
  Index panels_of_head() const { return panel_channels<Scalar>(dim_head()) / count; }
  // Blocks of an item of the batch whose gradients of the scales are added up in the scalar.
  static constexpr Index scale_stretch = 256;
  Index item_blocks() const { return rows_.count() / saved_.batch; }
  Index scale_stretches() const { return ceil_div(item_blocks(), scale_stretch); }

  void load_rows(const Scalar* from, Index block, Scalar* to) const {
    load_block(dim(), rows_.rows(block), StridedRows{from, dim(), rows_.row(block)}, to);
  }

  // From the gradient of y to those of the heads' outputs and gates, and of to_out.
  template <ThreadDevice Device>
  void project_out(const Device& device, const Scalar* x, const Scalar* grad_y,
                   LocalMHAParameters<Scalar>& gradients) {
    const PackedWeight<Scalar>& weight = between_.to_out;
    over_stretches(device, [&](Room& rooms, Index stretch, const Range& blocks) {
      Scalar* const room = rooms.block[0];
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        clear_filling_gates(block);
        load_rows(x, block, room);
        if (config().prenorm) {
          layer_.norm.apply(room);
          clear_other_lanes(dim(), {0, static_cast<int>(rows_.rows(block))}, room);
        }
        normed_panels_.put(block, 0, dim(), room);
        load_rows(grad_y, block, grad_y_[block]);
        if (config().out_bias) add(dim(), grad_y_[block], between_.out_sums[stretch]);
      }
      for (Index h = 0; h < heads(); ++h) {
        project(weight, h, grad_y_[blocks.begin], blocks.end - blocks.begin,
                [&](Index b) { return grad_out_[blocks.begin + b] + h * head_size(); });
        for (Index block = blocks.begin; block < blocks.end; ++block) open_gate(block, h, room);
      }
    });
    add_weight_gradient(device, rows_.count(), grad_y_[0], grad_y_.stride(), Groups::of(dim()),
                        out_panels_,
                        Groups::of(heads(), dim_head(), panel_channels<Scalar>(dim_head())),
                        gradients.to_out.data());
    if (config().out_bias) between_.out_sums.add_to(gradients.to_out_bias);
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
    Index b;  // of the batch
    Index first_block;
    Index block_count;
    Index h;
    Index kv_head;
    StretchSums<Scalar>& scale_sums;

    Index at(Index block) const { return first_block + block; }
    const Scalar* saved(const BlockArray<Scalar>& blocks, Index block) const {
      return blocks[at(block)] + h * layer.head_size();
    }
    const Scalar* saved_of_keys(const BlockArray<Scalar>& blocks, Index block) const {
      return blocks[at(block)] + kv_head * layer.head_size();
    }
    Scalar* grad(Index part, Index block) const {
      const Index head = part == 0 ? h : layer.heads() + (part - 1) * layer.kv_heads() + kv_head;
      return layer.grad_qkv_[at(block)] + head * layer.head_size();
    }
    Scalar* sums(Index block) const {
      const Index in_item = at(block) - b * layer.item_blocks();
      return scale_sums[(b * layer.heads() + h) * layer.scale_stretches() +
                        in_item / scale_stretch];
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
      load_normed(0, saved(layer.saved_.q, block), layer.layer_.q_norm, block, to);
    }
    void load_keys(Index block, Scalar* to) const {
      load_normed(1, saved_of_keys(layer.saved_.k, block), layer.layer_.k_norm, block, to);
    }
    void load_normed(std::size_t part, const Scalar* from, const QkNorm<Scalar>& norm, Index block,
                     Scalar* to) const {
      const Index channels = layer.dim_head();
      if (layer.norms_all_heads())
        return layer.layer_.norms_of_all[part].apply(
            (part == 0 ? h : kv_head) * channels, channels,
            layer.saved_inverse(static_cast<Index>(part), at(block)), from, to);
      copy(from, to);
      if (norm) norm.apply(to);
    }
    void load_values(Index block, Scalar* to) const {
      copy(saved_of_keys(layer.saved_.v, block), to);
    }
    void load_out(Index block, Scalar* to) const { copy(saved(layer.saved_.out, block), to); }
    void load_grad_out(Index block, Scalar* to) const { copy(saved(layer.grad_out_, block), to); }
    void load_lse(Index block, Scalar* to) const {
      std::copy_n(layer.saved_.lse[at(block)] + 2 * h * count, 2 * count, to);
    }
    void store_grad_queries(Index block, Scalar* from) const {
      if (layer.norms_each_head())
        layer.layer_.q_norm.apply_backward(saved(layer.saved_.q, block), from, sums(block));
      put_grad(0, block, from);
    }
    void store_grad_keys(Index block, Scalar* from, Scalar* /*room*/) const {
      if (layer.norms_each_head())
        layer.layer_.k_norm.apply_backward(saved_of_keys(layer.saved_.k, block), from,
                                           sums(block) + layer.dim_head() * count);
      put_grad(1, block, from);
    }
    void store_grad_values(Index block, Scalar* from) const { put_grad(2, block, from); }

    void add_upcoming(Index queries, Index keys, Index finished_keys, Upcoming<Scalar>& to) const {
      const auto add = [&](const Scalar* block) { to.add(block, layer.dim_head() * count); };
      if (queries < block_count) {
        add(saved(layer.saved_.q, queries));
        add(saved(layer.saved_.out, queries));
        add(saved(layer.grad_out_, queries));
        add(grad(0, queries));
      }
      if (keys < block_count) {
        add(saved_of_keys(layer.saved_.k, keys));
        add(saved_of_keys(layer.saved_.v, keys));
      }
      add(grad(1, finished_keys));
      add(grad(2, finished_keys));
    }
  };

  template <ThreadDevice Device>
  void attend(const Device& device, const AttentionInputs<Scalar>& inputs,
              const std::optional<Training>& training, LocalMHAParameters<Scalar>& gradients,
              typename LocalAttention<Scalar>::BiasGradients& grad_bias) {
    StretchSums<Scalar>& scale_sums = between_.scale_sums;
    const auto head_of = [&](Index sequence, Index h) {
      return Head{*this,
                  inputs.item(sequence),
                  rows_.first_block(sequence),
                  rows_.blocks_of(sequence),
                  h,
                  h / inputs.group(),
                  scale_sums};
    };
    layer_.attention.differentiate(device, workspace_, inputs, saved_.batch, dim_head(), head_of,
                                   grad_bias, training);
    if (config().sinks)
      layer_.attention.add_sink_gradients(workspace_, heads(), gradients.sinks.data());
    if (norms_all_heads()) normalize_back(device);
    // Those that the configuration has not are empty.
    const Index channels = norms_all_heads() ? heads() * dim_head() : dim_head();
    for (Vector<Scalar>* of_queries : {&gradients.q_scale, &gradients.q_norm_weight})
      scale_sums.add_to(*of_queries);
    for (Vector<Scalar>* of_keys : {&gradients.k_scale, &gradients.k_norm_weight})
      scale_sums.add_to(*of_keys, channels);
  }

  L saved_inverse(Index part, Index block) const {
    return L::load(saved_.inverses[block] + part * count);
  }

  // Through the normalization over all heads.
  template <ThreadDevice Device>
  void normalize_back(const Device& device) {
    over_stretches(device, [&](Room&, Index stretch, const Range& blocks) {
      for (Index block = blocks.begin; block < blocks.end; ++block)
        for (Index part = 0; part < 2; ++part) {
          const RmsNorm<Scalar>& norm = layer_.norms_of_all[static_cast<std::size_t>(part)];
          const L inverse = saved_inverse(part, block);
          const Scalar* x = (part == 0 ? saved_.q : saved_.k)[block];
          Scalar* grad = grad_qkv_[block] + part * heads() * head_size();
          Scalar* sums = between_.scale_sums[stretch] + part * heads() * dim_head() * count;
          L along = L::zero();
          const Index number = part == 0 ? heads() : kv_heads();
          for (Index h = 0; h < number; ++h)
            along = along + norm.begin_backward(h * dim_head(), dim_head(), inverse,
                                                x + h * head_size(), grad + h * head_size(),
                                                sums + h * dim_head() * count);
          for (Index h = 0; h < number; ++h)
            norm.end_backward(dim_head(), inverse, along, x + h * head_size(),
                              grad + h * head_size());
        }
    });
  }

  // From the gradients of queries, keys, values and gates to those of x and the weights.
  template <ThreadDevice Device>
  void project_in(const Device& device, const Scalar* x, Scalar* grad_x,
                  LocalMHAParameters<Scalar>& gradients) {
    const bool gates = config().gate_values_per_head;
    add_weight_gradient(device, rows_.count(), grad_qkv_[0], grad_qkv_.stride(),
                        Groups::of(qkv_heads(), dim_head(), head_channels()), normed_panels_,
                        Groups::of(dim()), gradients.to_qkv.data());
    if (gates)
      add_weight_gradient(device, rows_.count(), grad_gates_[0], grad_gates_.stride(),
                          Groups::of(heads()), normed_panels_, Groups::of(dim()),
                          gradients.to_v_gate_weight.data());

    StretchSums<Scalar>& norm_sums = between_.norm_sums;
    StretchSums<Scalar>& gate_sums = between_.gate_sums;
    over_stretches(device, [&](Room& rooms, Index stretch, const Range& blocks) {
      const Index size = blocks.end - blocks.begin;
      BlockArray<Scalar>& grad = rooms.grad;
      project(between_.to_qkv, 0, grad_qkv_[blocks.begin], size, [&](Index b) { return grad[b]; });
      if (gates) {
        BlockArray<Scalar>& more = rooms.more;
        project(between_.to_v_gate, 0, grad_gates_[blocks.begin], size,
                [&](Index b) { return more[b]; });
        for (Index b = 0; b < size; ++b) {
          add(dim(), more[b], grad[b]);
          add(heads(), grad_gates_[blocks.begin + b], gate_sums[stretch]);
        }
      }
      if (config().qkv_bias)
        for (Index block = blocks.begin; block < blocks.end; ++block)
          for (Index group = 0; group < qkv_heads(); ++group)
            add(dim_head(), grad_qkv_[block] + group * head_size(),
                between_.qkv_sums[stretch] + group * dim_head() * count);
      Scalar* const room = rooms.block[0];
      for (Index b = 0; b < size; ++b) {
        const Index block = blocks.begin + b;
        if (config().prenorm) {
          load_rows(x, block, room);
          layer_.norm.apply_backward(room, grad[b], norm_sums[stretch]);
        }
        store_block(dim(), rows_.rows(block), grad[b],
                    StridedRows{grad_x, dim(), rows_.row(block)});
      }
    });
    if (config().prenorm) {
      norm_sums.add_to(gradients.norm_weight);
      norm_sums.add_to(gradients.norm_bias, dim());  // if there is one
    }
    if (gates) gate_sums.add_to(gradients.to_v_gate_bias);
    if (config().qkv_bias) between_.qkv_sums.add_to(gradients.to_qkv_bias);
  }

  static void add(Index channels, const Scalar* from, Scalar* to) {
    for (Index c = 0; c < channels; ++c)
      (L::load(to + c * count) + L::load(from + c * count)).store(to + c * count);
  }

  const LayerWeights<Scalar>& layer_;
  const SavedLayer<Scalar>& saved_;
  Between& between_;
  const SequenceBlocks& rows_;
  PanelArray<Scalar>& normed_panels_;
  BlockArray<Scalar>& grad_y_;
  PanelArray<Scalar>& out_panels_;
  BlockArray<Scalar>& grad_out_;
  BlockArray<Scalar>& grad_qkv_;
  BlockArray<Scalar>& grad_gates_;
  typename LocalAttention<Scalar>::Workspace& workspace_;
};

template <typename Scalar>
template <ThreadDevice Device>
void LayerBackward<Scalar>::run(const Device& device, const AttentionInputs<Scalar>& inputs,
                                const std::optional<Training>& training, const Scalar* x,
                                const Scalar* grad_y, Scalar* grad_x,
                                LocalMHAParameters<Scalar>& gradients,
                                typename LocalAttention<Scalar>::BiasGradients& grad_bias) {
  layer_.attention.prepare_differentiate(device, workspace_, inputs, saved_.batch, dim_head(),
                                         grad_bias);
  project_out(device, x, grad_y, gradients);
  attend(device, inputs, training, gradients, grad_bias);
  project_in(device, x, grad_x, gradients);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
