// SPDX-License-Identifier: MIT
/// \file
/// What an attention over ranks needs of LocalAttention beyond its interface.
#pragma once

#include <local_mha/attention/call.hpp>
#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/local_attention.hpp>
#include <local_mha/attention/placement.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// What an attention over ranks may do beyond what everybody may.
template <typename Scalar, typename Score>
struct AttentionAccess {
  using Attention = LocalAttention<Scalar, Score>;

  static const Placement<Scalar>& placement(const Attention& attention) {
    return attention.made_->placement;
  }
  static AttentionInputs<Scalar> inputs_of(const Attention& attention, Index batch, Index heads,
                                           Index kv_heads, Index seqlen,
                                           const LocalAttentionCall<Scalar>& call) {
    return attention.inputs_of(batch, heads, kv_heads, seqlen, call);
  }
  static typename Attention::Bias bias_of(const Attention& attention, const Window& window,
                                          Index heads, const LocalAttentionCall<Scalar>& call) {
    return attention.bias_of(window, heads, call);
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
