// SPDX-License-Identifier: MIT
/// \file
/// LocalAttention::backward_into().
#pragma once

#include <type_traits>

#include <local_mha/attention/local_attention.hpp>
#include <local_mha/attention/rows_head.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

template <typename Scalar, typename Score, typename Arithmetic>
void LocalAttention<Scalar, Score, Arithmetic>::backward_into(Gradients& gradients,
                                                              Workspace& workspace,
                                                              const Saved& saved, View grad_out,
                                                              View q, View k, View v,
                                                              const Call& call) const {
  const Call of_forward = saved.call.with_tensors_of(call);
  // A bias is that of the window, which may be left out.
  Call given = call;
  if (!given.window_size && saved.config == config()) given.window_size = of_forward.window_size;
  check_arguments(q, k, v, given);
  require_shape("grad_out", grad_out.dimensions(), q.dimensions());
  const auto [batch, heads, seqlen, dim_head] = q.dimensions();
  saved.check_arguments(config(), q, k, v, call);
  if (saved.of_operands == std::is_same_v<Scalar, Arithmetic>)
    reject("saved", "that of an attention of this arithmetic", "that of another");
  const auto inputs = check_arguments(q, k, v, of_forward);
  gradients.prepare(q, k, v, call);
  BiasGradients& grad_bias = workspace.grad_bias_;
  grad_bias.prepare(bias_of(inputs.window(), heads, call), heads);
  const auto head_of = [&, n = seqlen, d = dim_head, q_heads = heads](Index sequence, Index h) {
    const Range rows = inputs.rows(sequence);
    const Index item = inputs.item(sequence);
    const Index row = (item * q_heads + h) * n + rows.begin;
    const Index shared = (item * inputs.kv_heads() + h / inputs.group()) * n + rows.begin;
    return detail::RowsHead<Scalar>{{{0, rows.end - rows.begin},
                                     d,
                                     q.data() + row * d,
                                     grad_out.data() + row * d,
                                     saved.out.data() + row * d,
                                     saved.lse.data() + row,
                                     saved.lse_rest.data() + row,
                                     gradients.q.data() + row * d},
                                    config().shared_qk,
                                    k.data() + shared * d,
                                    v.data() + shared * d,
                                    gradients.k.data() + shared * d,
                                    gradients.v.data() + shared * d};
  };
  inputs.clear_other_rows(heads, dim_head, Scalar(0), gradients.q.data());
  for (Tensor<Scalar, 4>* shared : {&gradients.k, &gradients.v})
    inputs.clear_other_rows(inputs.kv_heads(), dim_head, Scalar(0), shared->data());
  differentiate(call.device, workspace.backward_, inputs, batch, dim_head, head_of, grad_bias,
                of_forward.training);
  if (gradients.attn_bias) grad_bias.add_to(gradients.attn_bias->data());
  if (gradients.relative_bias) grad_bias.add_to(gradients.relative_bias->data());
  if (gradients.sinks) workspace.backward_.add_sink_gradients(heads, gradients.sinks->data());
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
