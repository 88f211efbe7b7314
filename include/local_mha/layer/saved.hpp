// SPDX-License-Identifier: MIT
/// \file
/// What LocalMHA::forward_saving() keeps for backward().
#pragma once

#include <optional>
#include <string>

#include <local_mha/attention/call.hpp>
#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/sequence_blocks.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/layer/call.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/ops/weight_gradient.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What a layer's forward pass keeps for the backward pass, in blocks: four numbers of each channel
/// of a head and position, and the log-sum-exp. What fills up channels has no value. It knows its
/// layer and its call again.
template <typename Scalar>
struct SavedLayer {
  using View = StridedView<const Scalar>;
  using Call = LocalMHACall<Scalar>;

  /// Resizes to a batch of sequences; memory that is large enough stays. Until complete(), it
  /// is that of no layer.
  void prepare(const LocalMHAConfig& layer, Index batch_size, Index length,
               const detail::AttentionInputs<Scalar>& inputs) {
    config.dim_head = config.heads = 0;
    batch = batch_size;
    seqlen = length;
    rows.assign(inputs, block_rows<Scalar>);
    const Index blocks = rows.count();
    const Index channels = padded_channels<Scalar>(layer.dim_head);
    for (BlockArray<Scalar>* part : {&q, &out}) part->prepare(blocks, layer.heads * channels);
    for (BlockArray<Scalar>* part : {&k, &v})
      part->prepare(blocks, resolved_kv_heads(layer) * channels);
    lse.prepare(blocks, 2 * layer.heads);
    gates.prepare(layer.gate_values_per_head ? blocks : 0, padded_channels<Scalar>(layer.heads));
    inverses.prepare(resolved_qk_norm(layer) == QkNormKind::rms_all ? blocks : 0, 2);
  }

  /// Becomes that of a layer, of LayerWeights, and a call.
  template <typename Weights>
  void complete(const Weights& layer, const View& x, const Call& given) {
    call.take(of_attention(given));
    input.take(detail::numbers_of(x, given.lengths));
    weights.take(layer.numbers());
    of_operands = Weights::of_operands;
    config = layer.config;
  }

  /// \throws std::invalid_argument if it is not of this layer and this call
  template <typename Weights>
  void check_arguments(const Weights& of_layer, const View& x, const Call& given) const {
    const LocalMHAConfig& layer = of_layer.config;
    const auto describe = [](const LocalMHAConfig& c) {
      return std::to_string(c.heads) + " heads of " + std::to_string(c.dim_head) +
             " channels with" + (c.gate_values_per_head ? "" : "out") + " gates";
    };
    if (config.dim == 0) reject("saved", "what forward_saving() kept", "nothing that was kept");
    if (config.heads != layer.heads || config.dim_head != layer.dim_head ||
        config.gate_values_per_head != layer.gate_values_per_head)
      reject("saved", describe(layer), describe(config));
    require_shape<2>("saved", {batch, seqlen}, {x.dimension(0), x.dimension(1)});
    if (config != layer) reject("saved", "that of a layer of this configuration", "another");
    if (of_operands != Weights::of_operands || !weights.is_of(of_layer.numbers()))
      reject("saved", "that of a layer of these weights and this arithmetic", "another");
    call.require_same_call(of_attention(given));
    if (!input.is_of(detail::numbers_of(x, call.lengths())))
      reject("x", "what forward_saving() was given", "other numbers");
  }

  /// What the attention is given of a layer's call.
  static LocalAttentionCall<Scalar> of_attention(const Call& given) {
    return {.mask = given.mask,
            .attn_bias = given.attn_bias,
            .training = given.training,
            .cu_seqlens = given.cu_seqlens,
            .lengths = given.lengths,
            .device = given.device};
  }
  /// The configuration of no layer.
  static LocalMHAConfig of_nothing() { return {.dim_head = 0, .heads = 0}; }

  LocalMHAConfig config = of_nothing();
  /// The layer rounds what it multiplies.
  bool of_operands = false;
  Index batch = 0;
  Index seqlen = 0;
  detail::SequenceBlocks rows;
  detail::SavedCall<Scalar> call;
  /// Samples by which x and the weights are known again.
  detail::Sample<Scalar> input;
  detail::Sample<Scalar> weights;
  /// Blocks of all sequences, one after the other: `[block][head][padded channel][block_rows]`, of
  /// keys and values those of the heads that they have; queries and keys as they were projected.
  BlockArray<Scalar> q;
  BlockArray<Scalar> k;
  BlockArray<Scalar> v;
  BlockArray<Scalar> out;    ///< of the attention, before the gates
  BlockArray<Scalar> lse;    ///< `[block][head][2][block_rows]`, as AttentionKernel leaves it
  BlockArray<Scalar> gates;  ///< `[block][padded head][block_rows]`, after the sigmoid
  /// Of QkNormKind::rms_all, `[block][queries, keys][block_rows]`: see RmsNorm::inverse().
  BlockArray<Scalar> inverses;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
