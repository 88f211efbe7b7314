// SPDX-License-Identifier: MIT
/// \file
/// What takes long to compile, or to compute where nothing is optimized, of the naive modules in
/// float, double and long double: compiled once for all tests, by instances.cpp. Other numbers have
/// files of their own with REFERENCE_TEMPLATES.
#pragma once

#include "reference/gradients.hpp"

#define REFERENCE_TEMPLATES(EXTERN, Real)                                                          \
  EXTERN template struct Array<Real>;                                                              \
  EXTERN template class Rotation<Real>;                                                            \
  EXTERN template Array<Real> normalized_rows(Array<Real>);                                        \
  EXTERN template Array<Real> rms_norm(Array<Real>, const Array<Real>&, double);                   \
  EXTERN template Array<Real> layer_norm(Array<Real>, const Array<Real>&, const Array<Real>&,      \
                                         long double);                                             \
  EXTERN template Array<Real> linear(const Array<Real>&, const Array<Real>&, const Array<Real>&);  \
  EXTERN template AttentionRow<Real> attend_row(                                                   \
      const AttentionOptions&, const AttentionInputs<Real>&, Rotation<Real>&, Int, Int, Int);      \
  EXTERN template AttentionResult<Real> attention(const AttentionOptions&, AttentionInputs<Real>); \
  EXTERN template AttentionGradients<Real> attention_backward(                                     \
      const AttentionOptions&, AttentionInputs<Real>, const Array<Real>&);                         \
  EXTERN template LayerResult<Real> local_mha(const LayerOptions&, const Parameters<Real>&,        \
                                              const LayerInputs<Real>&, const std::string&);       \
  EXTERN template LayerGradients<Real> local_mha_backward(                                         \
      const LayerOptions&, const Parameters<Real>&, const LayerInputs<Real>&, const Array<Real>&,  \
      Parameters<Real>&, const std::string&);                                                      \
  EXTERN template Array<Real> feed_forward(const Parameters<Real>&, const Array<Real>&,            \
                                           const std::string&,                                     \
                                           const std::function<Real(Int, Int)>&);                  \
  EXTERN template Array<Real> feed_forward_backward(                                               \
      const Parameters<Real>&, const Array<Real>&, const Array<Real>&, Parameters<Real>&,          \
      const std::string&, const std::function<Real(Int, Int)>&);                                   \
  EXTERN template Array<Real> dynamic_position_bias(const Parameters<Real>&, Int, Int, Int,        \
                                                    const std::string&);                           \
  EXTERN template void distance_bias_backward(const Parameters<Real>&, Int, const Array<Real>&,    \
                                              Parameters<Real>&, const std::string&);              \
  EXTERN template StreamWeights<Real> stream_weights(const Parameters<Real>&, const std::string&,  \
                                                     const Real*);                                 \
  EXTERN template Array<Real> mixed_streams(const StreamWeights<Real>&, const Real*);              \
  EXTERN template EncoderPass<Real> encoder_pass(                                                  \
      const EncoderOptions&, const Parameters<Real>&, const Array<Real>&,                          \
      const std::vector<unsigned char>&, const EncoderDropout<Real>&);                             \
  EXTERN template Array<Real> encoder_backward(const EncoderOptions&, const Parameters<Real>&,     \
                                               const EncoderPass<Real>&, const Array<Real>&,       \
                                               const std::vector<unsigned char>&,                  \
                                               Parameters<Real>&, const EncoderDropout<Real>&);    \
  EXTERN template Array<Real> transformer_logits(const TransformerOptions&,                        \
                                                 const Parameters<Real>&, const Array<Int>&,       \
                                                 const std::vector<unsigned char>&);               \
  EXTERN template Real transformer_loss(const TransformerOptions&, const Parameters<Real>&,        \
                                        const Array<Int>&, Int,                                    \
                                        const std::vector<unsigned char>&);                        \
  EXTERN template TransformerGradients<Real> transformer_backward(                                 \
      const TransformerOptions&, const Parameters<Real>&, const Array<Int>&, const Array<Int>&,    \
      Int, const std::vector<unsigned char>&, Parameters<Real>&, const EncoderDropout<Real>&);

namespace reference {

#ifdef REFERENCE_INSTANTIATE
REFERENCE_TEMPLATES(, float)
REFERENCE_TEMPLATES(, double)
REFERENCE_TEMPLATES(, long double)
#else
REFERENCE_TEMPLATES(extern, float)
REFERENCE_TEMPLATES(extern, double)
REFERENCE_TEMPLATES(extern, long double)
#endif

}  // namespace reference
