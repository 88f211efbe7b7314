// SPDX-License-Identifier: MIT
/// \file
/// What a stack of layers, and a layer over several processes, may do with attentions beyond what
/// everybody may.
#pragma once

#include <cstdint>

#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/mha.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
struct LayerAccess {
  using Attention = LocalMHA<Scalar, Storage, Arithmetic>;
  using Flow = typename Attention::Flow;
  /// Blocks of a stream that pass together.
  static constexpr Index stretch = Attention::stretch;

  /// LocalMHA::parameters(), which the attention does not keep.
  static LocalMHAParameters<Scalar> unpacked(const Attention& attention) {
    return attention.weights_->unpacked();
  }

  static const LayerWeights<Scalar, Storage, Arithmetic>& weights(const Attention& attention) {
    return *attention.weights_;
  }
  /// What the queries of sequences of `seqlen` rows see, masks apart.
  /// \throws std::invalid_argument naming the member of the call that does not fit
  static AttentionInputs<Scalar> inputs_of(const Attention& attention, Index batch, Index seqlen,
                                           const LocalMHACall<Scalar>& call) {
    static const PaddingMask none;
    return attention.inputs_of(batch, seqlen, none, attention.bias_of(call.attn_bias),
                               call.cu_seqlens, call.lengths);
  }

  /// The bias of a call, or that of the weights.
  static auto bias_of(const Attention& attention, const typename Attention::Bias& attn_bias) {
    return attention.bias_of(attn_bias);
  }

  // How the rows of a stream pass an attention.
  static Flow make_flow(const Attention& attention) {
    return Flow::for_stream(*attention.weights_, Window(attention_config(attention.config())));
  }
  static auto shown_to(const Attention& attention, const typename Attention::Bias& attn_bias) {
    return attention.shown_to(1, attn_bias);
  }
  template <typename Sequence, typename Inputs, typename Complete>
  static void stream_rows(const Attention& attention, Flow& flow, Sequence& sequence,
                          const Inputs& inputs, const Range& in, const Range& out,
                          const RowsView<const Scalar>& x, const std::uint8_t* masked,
                          const RowsView<Scalar>& y, Complete&& complete) {
    attention.stream_rows(AnyDevice(), flow, sequence, inputs, 0, in, out, x, masked, y, complete);
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
