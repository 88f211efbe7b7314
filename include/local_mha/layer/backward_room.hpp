// SPDX-License-Identifier: MIT
/// \file
/// Buffers for the backward pass of LocalMHA.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <vector>

#include <local_mha/attention/backward.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/ops/packed_weight.hpp>
#include <local_mha/ops/project_rows.hpp>
#include <local_mha/ops/weight_gradient.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// What lies between the steps, of all positions. It stays for the next call.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
struct LayerBackwardRoom {
  using Weights = LayerWeights<Scalar, Storage, Arithmetic>;
  using Weight = PackedWeight<Scalar, Storage, Arithmetic>;
  static constexpr bool of_operands = !std::is_same_v<Scalar, Arithmetic>;

  /// Becomes that of a call: all but what the attention takes for each of its workers.
  /// \param threads of the device
  void prepare(const Weights& layer, const SavedLayer<Scalar>& saved, Index threads) {
    const LocalMHAConfig& config = layer.config;
    const Index dim = config.dim, heads = config.heads, dim_head = config.dim_head;
    const Index head_channels = padded_channels<Scalar>(dim_head);
    const Index blocks = saved.rows.count();
    const Index stretches = ceil_div(blocks, stretch_blocks);
    const bool gates = config.gate_values_per_head;
    normed_panels.prepare(blocks, panel_channels<Scalar>(dim));
    grad_y.prepare(blocks, dim);
    out_panels.prepare(blocks, heads * panel_channels<Scalar>(dim_head));
    grad_out.prepare(blocks, heads * head_channels);
    grad_qkv.prepare(blocks, qkv_heads(config) * head_channels);
    if (of_operands) multiplied_qkv.prepare(blocks, qkv_heads(config) * head_channels);
    if (resolved_qk_norm(config) == QkNormKind::rms_all)
      scale_sums.prepare(stretches, (heads + resolved_kv_heads(config)) * dim_head);
    else if (layer.q_norm)
      scale_sums.prepare(saved.batch * heads * count_scale_stretches(saved), 2 * dim_head);
    if (config.prenorm) norm_sums.prepare(stretches, 2 * dim);
    if (config.qkv_bias) qkv_sums.prepare(stretches, qkv_heads(config) * dim_head);
    if (config.out_bias) out_sums.prepare(stretches, dim);
    to_out.pack_transposed(layer.to_out, dim_head);
    to_qkv.pack_transposed(layer.to_qkv, 0, dim_head, head_channels);
    if (gates) {
      grad_gates.prepare(blocks, padded_channels<Scalar>(heads));
      if (of_operands) multiplied_gates.prepare(blocks, padded_channels<Scalar>(heads));
      gate_sums.prepare(stretches, heads);
      to_v_gate.pack_transposed(layer.to_v_gate, 0, heads, padded_channels<Scalar>(heads));
    }
    const auto workers = static_cast<std::size_t>((std::min)(threads, stretches));
    if (rooms.size() < workers) rooms.resize(workers);
    for (OfWorker& room : rooms) {
      room.block.prepare(1, (std::max)(dim, head_channels));
      if (of_operands) room.grad_y.prepare(1, dim);
      for (const Weight* weight : {&to_out, &to_qkv, &to_v_gate})
        room.passing.fit_blocks(*weight, stretch_blocks);
      room.grad.prepare(stretch_blocks, dim);
      if (gates) room.more.prepare(stretch_blocks, dim);
    }
  }

  /// Blocks of an item of the batch whose gradients of a head's scales are added up in the scalar.
  static constexpr Index scale_stretch = 256;
  // An item that is alone may hold several sequences.
  static Index first_block_of_item(const SavedLayer<Scalar>& saved, Index item) {
    return saved.batch == 1 ? item * saved.rows.count() : saved.rows.first_block(item);
  }
  Index count_scale_stretches(const SavedLayer<Scalar>& saved) {
    scale_stretches = 0;
    for (Index item = 0; item < saved.batch; ++item)
      scale_stretches = (std::max)(scale_stretches, ceil_div(first_block_of_item(saved, item + 1) -
                                                                 first_block_of_item(saved, item),
                                                             scale_stretch));
    return scale_stretches;
  }
  /// Of an item, at most.
  Index scale_stretches = 0;

  PanelArray<Scalar, Arithmetic> normed_panels;
  BlockArray<Scalar, Arithmetic> grad_y;
  PanelArray<Scalar, Arithmetic> out_panels;
  BlockArray<Scalar> grad_out;
  BlockArray<Scalar> grad_qkv;
  BlockArray<Scalar> grad_gates;
  /// The last two as they are multiplied, where these are operands.
  BlockArray<Scalar, Arithmetic> multiplied_qkv;
  BlockArray<Scalar, Arithmetic> multiplied_gates;
  AttentionBackward<Scalar, Arithmetic> attention;
  /// Transposed, from gradients of results to those of inputs.
  Weight to_out;
  Weight to_qkv;
  Weight to_v_gate;
  StretchSums<Scalar> scale_sums;  ///< of each head, or of all
  StretchSums<Scalar> norm_sums;
  StretchSums<Scalar> gate_sums;
  StretchSums<Scalar> qkv_sums;
  StretchSums<Scalar> out_sums;
  struct OfWorker {
    BlockArray<Scalar> block;
    BlockArray<Scalar> grad_y;  ///< where operands are made of them
    BlockArray<Scalar> grad;
    BlockArray<Scalar> more;
    PassingRows<Scalar, Arithmetic> passing;
  };
  std::vector<OfWorker> rooms;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
