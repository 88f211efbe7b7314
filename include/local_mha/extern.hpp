// SPDX-License-Identifier: MIT
/// \file
/// For programs of many files: the same as local_mha.hpp, but what takes long to compile is
/// compiled once for the program and not in each of its files.
///
/// Include this wherever you would include local_mha.hpp. In one file, for each scalar that the
/// program uses, say that its templates are instantiated there:
///
///     #define LOCAL_MHA_INSTANTIATE float
///     #include <local_mha/extern.hpp>
///
/// That file's flags decide how fast the program is; all files must have the same ones. This is
/// about float and double on Eigen::DefaultDevice and, where EIGEN_USE_THREADS is defined,
/// Eigen::ThreadPoolDevice: define it in all files or in none. Other scalars and devices are
/// compiled where they are used, as without this header.
#pragma once

#include <local_mha/local_mha.hpp>

// What depends on the scalar alone: the classes, but for their members that are templates.
#define LOCAL_MHA_TEMPLATES_OF(EXTERN, Scalar)                                                \
  EXTERN template class AttentionForwardFlow<Scalar>;                                         \
  EXTERN template class LocalAttention<Scalar>;                                               \
  EXTERN template class LocalMHA<Scalar>;                                                     \
  EXTERN template class Encoder<Scalar>;                                                      \
  EXTERN template class detail::LayerSteps<Scalar>;                                           \
  EXTERN template class detail::LayerWorker<Scalar>;                                          \
  EXTERN template struct detail::LayerWeights<Scalar>;                                        \
  EXTERN template class LocalTransformer<Scalar>;                                             \
  EXTERN template class detail::LayerStack<Scalar>;                                           \
  EXTERN template class detail::LayerStackBackward<Scalar>;                                   \
  EXTERN template class HyperConnection<Scalar>;                                              \
  EXTERN template class FeedForward<Scalar>;                                                  \
  EXTERN template class LayerNorm<Scalar>;                                                    \
  EXTERN template class RmsNorm<Scalar>;                                                      \
  EXTERN template class Linear<Scalar>;                                                       \
  EXTERN template class DynamicPositionBias<Scalar>;                                          \
  EXTERN template class SequenceStream<Scalar>;                                               \
  EXTERN template class SequenceStream<Scalar, detail::StreamedStack<Scalar>>;                \
  EXTERN template LocalMHAParameters<Scalar> initial_parameters(const LocalMHAConfig&,        \
                                                                std::uint64_t);               \
  EXTERN template EncoderParameters<Scalar> initial_parameters(const EncoderConfig&,          \
                                                               std::uint64_t);                \
  EXTERN template LocalTransformerParameters<Scalar> initial_parameters(                      \
      const LocalTransformerConfig&, std::uint64_t);                                          \
  EXTERN template void detail::require_same_shapes(const LocalMHAParameters<Scalar>&,         \
                                                   const LocalMHAParameters<Scalar>&);        \
  EXTERN template void detail::require_same_shapes(const EncoderParameters<Scalar>&,          \
                                                   const EncoderParameters<Scalar>&);         \
  EXTERN template void detail::require_same_shapes(const LocalTransformerParameters<Scalar>&, \
                                                   const LocalTransformerParameters<Scalar>&);

// The members that do the work on a device.
#define LOCAL_MHA_TEMPLATES_ON(EXTERN, Scalar, Device)                                             \
  EXTERN template void LocalAttention<Scalar>::forward_into(                                       \
      const Device&, TensorView<Scalar, 4>, Workspace&, TensorView<const Scalar, 4>,               \
      TensorView<const Scalar, 4>, TensorView<const Scalar, 4>, const PaddingMask&, const Bias&,   \
      const LocalAttentionCall&, const Terms&) const;                                              \
  EXTERN template void LocalAttention<Scalar>::backward_into(                                      \
      const Device&, Gradients&, Workspace&, const Saved&, TensorView<const Scalar, 4>,            \
      TensorView<const Scalar, 4>, TensorView<const Scalar, 4>, TensorView<const Scalar, 4>,       \
      const PaddingMask&, const Bias&, const LocalAttentionCall&, const Terms&) const;             \
  EXTERN template void LocalAttention<Scalar>::Stream::push_into(                                  \
      const Device&, TensorView<Scalar, 4>, TensorView<const Scalar, 4>,                           \
      TensorView<const Scalar, 4>, TensorView<const Scalar, 4>, const PaddingMask&);               \
  EXTERN template void LocalAttention<Scalar>::Stream::flush_into(const Device&,                   \
                                                                  TensorView<Scalar, 4>);          \
  EXTERN template void LocalMHA<Scalar>::flow(const Device&, TensorView<Scalar, 3>, Workspace&,    \
                                              TensorView<const Scalar, 3>, const PaddingMask&,     \
                                              const Bias&, const std::optional<Training>&,         \
                                              std::span<const Index>, Saved*) const;               \
  EXTERN template void detail::LayerWorker<Scalar>::make_and_answer(                               \
      const Device&, Past<Scalar>&, const Range&, const Scalar*, const Range&, Scalar*);           \
  EXTERN template void detail::LayerBackward<Scalar>::run(                                         \
      const Device&, const AttentionInputs<Scalar>&, const std::optional<Training>&,               \
      const Scalar*, const Scalar*, Scalar*, LocalMHAParameters<Scalar>&,                          \
      LocalAttention<Scalar>::BiasGradients&);                                                     \
  EXTERN template RowMatrix<Scalar> FeedForward<Scalar>::flow(                                     \
      const Device&, const Eigen::Ref<const RowMatrix<Scalar>>&, const std::optional<Training>&,   \
      Saved*) const;                                                                               \
  EXTERN template void FeedForward<Scalar>::flow(const Device&, TensorView<Scalar, 3>, Workspace&, \
                                                 TensorView<const Scalar, 3>,                      \
                                                 const std::optional<Training>&, Saved*) const;    \
  EXTERN template void Linear<Scalar>::flow(const Device&, Workspace&, Index, const Scalar*,       \
                                            Index, Scalar*) const;                                 \
  EXTERN template Tensor<Scalar, 3> LayerNorm<Scalar>::backward(                                   \
      const Device&, Parameters&, const Saved&, TensorView<const Scalar, 3>,                       \
      TensorView<const Scalar, 3>) const;                                                          \
  EXTERN template RowMatrix<Scalar> FeedForward<Scalar>::backward(                                 \
      const Device&, FeedForwardParameters<Scalar>&, const Saved&,                                 \
      const Eigen::Ref<const RowMatrix<Scalar>>&, const Eigen::Ref<const RowMatrix<Scalar>>&,      \
      std::optional<Training>) const;                                                              \
  EXTERN template void detail::LayerStack<Scalar>::forward(                                        \
      const Device&, TensorView<Scalar, 3>, Workspace&, TensorView<const Scalar, 3>,               \
      const PaddingMask&, const std::optional<Training>&, std::span<const Index>, Saved*) const;   \
  EXTERN template void detail::LayerStack<Scalar>::backward(                                       \
      const Device&, EncoderParameters<Scalar>&, const Saved&, TensorView<Scalar, 3>) const;       \
  EXTERN template Tensor<Scalar, 3> LocalTransformer<Scalar>::forward(                             \
      const Device&, Tokens, const PaddingMask&, std::optional<Training>) const;                   \
  EXTERN template Scalar LocalTransformer<Scalar>::backward(                                       \
      const Device&, Parameters&, Tokens, Tokens, const PaddingMask&, std::optional<Training>)     \
      const;                                                                                       \
  EXTERN template RowMatrix<Scalar> linear_backward(                                               \
      const Device&, const RowMatrix<Scalar>&, const Eigen::Ref<const RowMatrix<Scalar>>&,         \
      const Eigen::Ref<const RowMatrix<Scalar>>&, RowMatrix<Scalar>&, Vector<Scalar>*);

#ifdef EIGEN_USE_THREADS
#define LOCAL_MHA_TEMPLATES(EXTERN, Scalar)                    \
  LOCAL_MHA_TEMPLATES_OF(EXTERN, Scalar)                       \
  LOCAL_MHA_TEMPLATES_ON(EXTERN, Scalar, Eigen::DefaultDevice) \
  LOCAL_MHA_TEMPLATES_ON(EXTERN, Scalar, Eigen::ThreadPoolDevice)
#else
#define LOCAL_MHA_TEMPLATES(EXTERN, Scalar) \
  LOCAL_MHA_TEMPLATES_OF(EXTERN, Scalar)    \
  LOCAL_MHA_TEMPLATES_ON(EXTERN, Scalar, Eigen::DefaultDevice)
#endif

namespace local_mha::inline LOCAL_MHA_ABI {

#ifdef LOCAL_MHA_INSTANTIATE
LOCAL_MHA_TEMPLATES(, LOCAL_MHA_INSTANTIATE)
#else
LOCAL_MHA_TEMPLATES(extern, float)
LOCAL_MHA_TEMPLATES(extern, double)
#endif

}  // namespace local_mha::inline LOCAL_MHA_ABI

#undef LOCAL_MHA_TEMPLATES
#undef LOCAL_MHA_TEMPLATES_ON
#undef LOCAL_MHA_TEMPLATES_OF
