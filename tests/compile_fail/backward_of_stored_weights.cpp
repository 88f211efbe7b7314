// SPDX-License-Identifier: MIT
// A layer that stores its weights in 16 bits, and multiplies in float, goes forward alone.
#include <Eigen/Core>

#include <local_mha/mha.hpp>

#ifdef CORRECTED
using Layer = local_mha::LocalMHA<float>;
#else
using Layer = local_mha::LocalMHA<float, Eigen::bfloat16>;
#endif

void call(const Layer& layer, Layer::Parameters& gradients, const local_mha::Tensor<float, 3>& x) {
  Layer::Saved saved;
  const local_mha::Tensor<float, 3> y = layer.forward_saving(saved, x);
  layer.backward(gradients, saved, y, x);
}
