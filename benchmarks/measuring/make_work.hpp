// SPDX-License-Identifier: MIT
/// \file
/// What computes a case.
#pragma once

#include <memory>
#include <type_traits>

#include "case.hpp"
#include "encoder_work.hpp"
#include "peer_work.hpp"
#include "work.hpp"

namespace measuring {

namespace detail {

template <typename Scalar>
std::unique_ptr<Work> make_work(const Case& c) {
  if constexpr (std::is_same_v<Scalar, float>) {
    using Bfloat16 = Eigen::bfloat16;
    if (c.arithmetic_bits == 16 && c.subject == "attention" && c.backward != 0)
      return std::make_unique<AttentionBackwardWork<float, Bfloat16>>(c);
    if (c.arithmetic_bits == 16 && c.subject == "attention")
      return std::make_unique<LocalAttentionWork<float, Bfloat16>>(c);
    if (c.arithmetic_bits == 16 && c.subject == "layer" && c.backward != 0)
      return std::make_unique<LayerStepWork<float, Bfloat16>>(c);
    if (c.arithmetic_bits == 16 && c.subject == "layer")
      return std::make_unique<LocalMHAWork<float, Bfloat16, Bfloat16>>(c);
    if (c.arithmetic_bits == 16) return std::make_unique<StreamWork<float, Bfloat16, Bfloat16>>(c);
    if (c.stored_bits == 16 && c.subject == "layer")
      return std::make_unique<LocalMHAWork<float, Bfloat16>>(c);
    if (c.stored_bits == 16) return std::make_unique<StreamWork<float, Bfloat16>>(c);
  }
  if (c.subject == "attention" && c.backward != 0)
    return std::make_unique<AttentionBackwardWork<Scalar>>(c);
  if (c.subject == "layer" && c.backward != 0) return std::make_unique<LayerStepWork<Scalar>>(c);
  if (c.subject == "attention") return std::make_unique<LocalAttentionWork<Scalar>>(c);
  if (c.subject == "naive_attention") return std::make_unique<NaiveAttentionWork<Scalar>>(c);
  if (c.subject == "tiled_attention") return std::make_unique<TiledAttentionWork<Scalar>>(c);
  if (c.subject == "tiled_layer") return std::make_unique<TiledLayerWork<Scalar>>(c);
  if (c.subject == "layer") return std::make_unique<LocalMHAWork<Scalar>>(c);
  if (c.subject == "encoder") return std::make_unique<EncoderWork<Scalar>>(c);
  if (c.subject == "prefill" || c.subject == "decode")
    return std::make_unique<StreamWork<Scalar>>(c);
  if (c.subject == "eigen_vectors") return std::make_unique<EigenVectorsWork<Scalar>>(c);
  return std::make_unique<EigenProductWork<Scalar>>(c);
}

}  // namespace detail

inline std::unique_ptr<Work> make_work(const Case& c) {
  return c.scalar == "float" ? detail::make_work<float>(c) : detail::make_work<double>(c);
}

}  // namespace measuring
