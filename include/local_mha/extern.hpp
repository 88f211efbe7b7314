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
/// Layers that store float in 16 bits take part if the program says so: all files that use them
///
///     #define LOCAL_MHA_STORAGE Eigen::bfloat16
///     #include <local_mha/extern.hpp>
///
/// and one file, beside that of float, compiles them:
///
///     #define LOCAL_MHA_INSTANTIATE_STORAGE Eigen::bfloat16
///     #include <local_mha/extern.hpp>
///
/// Those that multiply in Eigen::bfloat16, too, take part beside those that store in it if the
/// program says `LOCAL_MHA_ARITHMETIC Eigen::bfloat16` in all files, and in one of them
/// `LOCAL_MHA_INSTANTIATE_ARITHMETIC Eigen::bfloat16`.
///
/// That file's flags decide how fast the program is; all files must have the same ones. This is
/// about float and double; other scalars are compiled where they are used, as without this header.
#pragma once

#include <local_mha/local_mha.hpp>

#define LOCAL_MHA_TEMPLATES(EXTERN, Scalar)                                                      \
  EXTERN template class AttentionForwardFlow<Scalar>;                                            \
  EXTERN template class LocalAttention<Scalar>;                                                  \
  EXTERN template class LocalAttention<Scalar>::StreamOf<Scalar>;                                \
  EXTERN template class LocalMHA<Scalar>;                                                        \
  EXTERN template class Encoder<Scalar>;                                                         \
  EXTERN template class detail::LayerSteps<Scalar>;                                              \
  EXTERN template class detail::LayerWorker<Scalar>;                                             \
  EXTERN template struct detail::LayerWeights<Scalar>;                                           \
  EXTERN template class PackedWeight<Scalar>;                                                    \
  EXTERN template struct detail::FeedForwardWeights<Scalar>;                                     \
  EXTERN template class detail::StackLayers<Scalar>;                                             \
  EXTERN template class LocalTransformer<Scalar>;                                                \
  EXTERN template class detail::LayerStack<Scalar>;                                              \
  EXTERN template class detail::LayerStackBackward<Scalar>;                                      \
  EXTERN template class detail::LayerForward<Scalar>;                                            \
  EXTERN template class detail::LayerBackward<Scalar>;                                           \
  EXTERN template class detail::AttentionForward<Scalar>;                                        \
  EXTERN template class HyperConnection<Scalar>;                                                 \
  EXTERN template class FeedForward<Scalar>;                                                     \
  EXTERN template class LayerNorm<Scalar>;                                                       \
  EXTERN template class RmsNorm<Scalar>;                                                         \
  EXTERN template class Linear<Scalar>;                                                          \
  EXTERN template class DynamicPositionBias<Scalar>;                                             \
  EXTERN template class AdamW<LocalMHAParameters<Scalar>>;                                       \
  EXTERN template class AdamW<EncoderParameters<Scalar>>;                                        \
  EXTERN template class AdamW<LocalTransformerParameters<Scalar>>;                               \
  EXTERN template class SequenceStream<Scalar>;                                                  \
  EXTERN template class SequenceStream<Scalar, detail::StreamedStack<Scalar>>;                   \
  EXTERN template LocalMHAParameters<Scalar> initial_parameters(const LocalMHAConfig&,           \
                                                                std::uint64_t);                  \
  EXTERN template EncoderParameters<Scalar> initial_parameters(const EncoderConfig&,             \
                                                               std::uint64_t);                   \
  EXTERN template LocalTransformerParameters<Scalar> initial_parameters(                         \
      const LocalTransformerConfig&, std::uint64_t);                                             \
  EXTERN template void detail::require_same_shapes(const LocalMHAParameters<Scalar>&,            \
                                                   const LocalMHAParameters<Scalar>&);           \
  EXTERN template void detail::require_same_shapes(const EncoderParameters<Scalar>&,             \
                                                   const EncoderParameters<Scalar>&);            \
  EXTERN template void detail::require_same_shapes(const LocalTransformerParameters<Scalar>&,    \
                                                   const LocalTransformerParameters<Scalar>&);   \
  EXTERN template RowMatrix<Scalar> detail::linear_backward_through(                             \
      const AnyDevice&, const PackedWeight<Scalar>&, const Eigen::Ref<const RowMatrix<Scalar>>&, \
      const Eigen::Ref<const RowMatrix<Scalar>>&, RowMatrix<Scalar>&, Vector<Scalar>*);

// Of float, beside those above.
#define LOCAL_MHA_STORED_TEMPLATES(EXTERN, Storage)                                      \
  EXTERN template class LocalAttention<float>::StreamOf<Storage>;                        \
  EXTERN template class LocalMHA<float, Storage>;                                        \
  EXTERN template class Encoder<float, Storage>;                                         \
  EXTERN template class LocalTransformer<float, Storage>;                                \
  EXTERN template class detail::LayerSteps<float, Storage>;                              \
  EXTERN template class detail::LayerWorker<float, Storage>;                             \
  EXTERN template class detail::LayerForward<float, Storage>;                            \
  EXTERN template struct detail::LayerWeights<float, Storage>;                           \
  EXTERN template class PackedWeight<float, Storage>;                                    \
  EXTERN template struct detail::FeedForwardWeights<float, Storage>;                     \
  EXTERN template class FeedForward<float, Storage>;                                     \
  EXTERN template class detail::StackLayers<float, Storage>;                             \
  EXTERN template class detail::LayerStack<float, Storage>;                              \
  EXTERN template class Linear<float, Storage>;                                          \
  EXTERN template class SequenceStream<float, detail::StreamedSequence<float, Storage>>; \
  EXTERN template class SequenceStream<float, detail::StreamedStack<float, Storage>>;

// Of float, beside those above of the same type.
#define LOCAL_MHA_MULTIPLIED_TEMPLATES(EXTERN, Number)                                      \
  EXTERN template class AttentionForwardFlow<float, Number>;                                \
  EXTERN template class detail::AttentionForward<float, Number>;                            \
  EXTERN template class LocalAttention<float, ConfiguredScore, Number>;                     \
  EXTERN template class LocalAttention<float, ConfiguredScore, Number>::StreamOf<Number>;   \
  EXTERN template class LocalMHA<float, Number, Number>;                                    \
  EXTERN template class Encoder<float, Number, Number>;                                     \
  EXTERN template class LocalTransformer<float, Number, Number>;                            \
  EXTERN template class detail::LayerSteps<float, Number, Number>;                          \
  EXTERN template class detail::LayerWorker<float, Number, Number>;                         \
  EXTERN template class detail::LayerForward<float, Number, Number>;                        \
  EXTERN template struct detail::LayerWeights<float, Number, Number>;                       \
  EXTERN template class PackedWeight<float, Number, Number>;                                \
  EXTERN template struct detail::FeedForwardWeights<float, Number, Number>;                 \
  EXTERN template class FeedForward<float, Number, Number>;                                 \
  EXTERN template class detail::StackLayers<float, Number, Number>;                         \
  EXTERN template class detail::LayerStack<float, Number, Number>;                          \
  EXTERN template class detail::LayerBackward<float, Number, Number>;                       \
  EXTERN template class detail::LayerStackBackward<float, Number, Number>;                  \
  EXTERN template class Linear<float, Number, Number>;                                      \
  EXTERN template RowMatrix<float> detail::linear_backward_through(                         \
      const AnyDevice&, const PackedWeight<float, Number, Number>&,                         \
      const Eigen::Ref<const RowMatrix<float>>&, const Eigen::Ref<const RowMatrix<float>>&, \
      RowMatrix<float>&, Vector<float>*);

namespace local_mha::inline LOCAL_MHA_ABI {

#ifdef LOCAL_MHA_INSTANTIATE
LOCAL_MHA_TEMPLATES(, LOCAL_MHA_INSTANTIATE)
#else
LOCAL_MHA_TEMPLATES(extern, float)
LOCAL_MHA_TEMPLATES(extern, double)
#endif
#if defined(LOCAL_MHA_INSTANTIATE_STORAGE)
LOCAL_MHA_STORED_TEMPLATES(, LOCAL_MHA_INSTANTIATE_STORAGE)
#elif defined(LOCAL_MHA_STORAGE)
LOCAL_MHA_STORED_TEMPLATES(extern, LOCAL_MHA_STORAGE)
#endif
#if defined(LOCAL_MHA_INSTANTIATE_ARITHMETIC)
LOCAL_MHA_MULTIPLIED_TEMPLATES(, LOCAL_MHA_INSTANTIATE_ARITHMETIC)
#elif defined(LOCAL_MHA_ARITHMETIC)
LOCAL_MHA_MULTIPLIED_TEMPLATES(extern, LOCAL_MHA_ARITHMETIC)
#endif

}  // namespace local_mha::inline LOCAL_MHA_ABI

#undef LOCAL_MHA_TEMPLATES
#undef LOCAL_MHA_STORED_TEMPLATES
#undef LOCAL_MHA_MULTIPLIED_TEMPLATES
