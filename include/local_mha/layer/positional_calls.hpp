// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA's calls with a device first, as Eigen writes it, and with arguments in a row.
#pragma once

#include <concepts>
#include <optional>
#include <span>

#include <local_mha/core/mask.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/layer/call.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/ops/dropout.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Each is the member of that name of `Layer`, which has them by inheritance, of a LocalMHACall.
template <typename Layer, typename Scalar>
class PositionalCalls {
  using Input = StridedView<const Scalar>;
  using Output = StridedView<Scalar>;
  using Call = LocalMHACall<Scalar>;
  using Bias = std::optional<TensorView<const Scalar, 3>>;
  using Saved = SavedLayer<Scalar>;
  using Parameters = LocalMHAParameters<Scalar>;
  using Segments = std::span<const Index>;
  using Dropping = std::optional<Training>;

 public:
  // `{}` alone is no mask, but a call.
  template <std::same_as<PaddingMask> Mask>
  Tensor<Scalar, 3> forward(Input x, const Mask& mask) const {
    return layer().forward(x, call({}, mask, {}, {}, {}));
  }
  Tensor<Scalar, 3> forward(Input x, const PaddingMask& mask, const Bias& attn_bias,
                            Dropping training = {}, Segments cu_seqlens = {}) const {
    return layer().forward(x, call({}, mask, attn_bias, training, cu_seqlens));
  }
  Tensor<Scalar, 3> forward(const AnyDevice& device, Input x, const PaddingMask& mask = {},
                            const Bias& attn_bias = {}, Dropping training = {},
                            Segments cu_seqlens = {}) const {
    return layer().forward(x, call(device, mask, attn_bias, training, cu_seqlens));
  }

  template <typename Workspace>
  void forward_into(Output y, Workspace& workspace, Input x, const PaddingMask& mask,
                    const Bias& attn_bias = {}, Dropping training = {},
                    Segments cu_seqlens = {}) const {
    layer().forward_into(y, workspace, x, call({}, mask, attn_bias, training, cu_seqlens));
  }
  template <typename Workspace>
  void forward_into(const AnyDevice& device, Output y, Workspace& workspace, Input x,
                    const PaddingMask& mask = {}, const Bias& attn_bias = {},
                    Dropping training = {}, Segments cu_seqlens = {}) const {
    layer().forward_into(y, workspace, x, call(device, mask, attn_bias, training, cu_seqlens));
  }

  template <std::same_as<PaddingMask> Mask>
  Tensor<Scalar, 3> forward_saving(Saved& saved, Input x, const Mask& mask) const {
    return layer().forward_saving(saved, x, call({}, mask, {}, {}, {}));
  }
  Tensor<Scalar, 3> forward_saving(Saved& saved, Input x, const PaddingMask& mask,
                                   const Bias& attn_bias, Dropping training = {},
                                   Segments cu_seqlens = {}) const {
    return layer().forward_saving(saved, x, call({}, mask, attn_bias, training, cu_seqlens));
  }
  Tensor<Scalar, 3> forward_saving(const AnyDevice& device, Saved& saved, Input x,
                                   const PaddingMask& mask = {}, const Bias& attn_bias = {},
                                   Dropping training = {}, Segments cu_seqlens = {}) const {
    return layer().forward_saving(saved, x, call(device, mask, attn_bias, training, cu_seqlens));
  }

  template <typename Workspace>
  void forward_saving_into(const AnyDevice& device, Output y, Workspace& workspace, Saved& saved,
                           Input x, const PaddingMask& mask = {}, const Bias& attn_bias = {},
                           Dropping training = {}, Segments cu_seqlens = {}) const {
    layer().forward_saving_into(y, workspace, saved, x,
                                call(device, mask, attn_bias, training, cu_seqlens));
  }

  template <std::same_as<PaddingMask> Mask>
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved, Input grad_y, Input x,
                             const Mask& mask) const {
    return layer().backward(gradients, saved, grad_y, x, call({}, mask, {}, {}, {}), nullptr);
  }
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved, Input grad_y, Input x,
                             const PaddingMask& mask, const Bias& attn_bias, Dropping training = {},
                             Tensor<Scalar, 3>* grad_attn_bias = nullptr) const {
    return layer().backward(gradients, saved, grad_y, x, call({}, mask, attn_bias, training, {}),
                            grad_attn_bias);
  }
  Tensor<Scalar, 3> backward(const AnyDevice& device, Parameters& gradients, const Saved& saved,
                             Input grad_y, Input x, const PaddingMask& mask = {},
                             const Bias& attn_bias = {}, Dropping training = {},
                             Tensor<Scalar, 3>* grad_attn_bias = nullptr) const {
    return layer().backward(gradients, saved, grad_y, x,
                            call(device, mask, attn_bias, training, {}), grad_attn_bias);
  }

  template <typename Workspace>
  void backward_into(const AnyDevice& device, Output grad_x, Workspace& workspace,
                     Parameters& gradients, const Saved& saved, Input grad_y, Input x,
                     const PaddingMask& mask = {}, const Bias& attn_bias = {},
                     Dropping training = {}, Tensor<Scalar, 3>* grad_attn_bias = nullptr) const {
    layer().backward_into(grad_x, workspace, gradients, saved, grad_y, x,
                          call(device, mask, attn_bias, training, {}), grad_attn_bias);
  }

 private:
  friend Layer;
  PositionalCalls() = default;

  const Layer& layer() const { return static_cast<const Layer&>(*this); }

  static Call call(const AnyDevice& device, const PaddingMask& mask, const Bias& attn_bias,
                   const Dropping& training, Segments cu_seqlens) {
    return {.mask = mask,
            .attn_bias = attn_bias,
            .training = training,
            .cu_seqlens = cu_seqlens,
            .device = device};
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
