// SPDX-License-Identifier: MIT
/// \file
/// The backward pass of a projection.
#pragma once

#include <string>
#include <type_traits>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/lanes.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/packed_weight.hpp>
#include <local_mha/ops/project_rows.hpp>
#include <local_mha/ops/weight_gradient.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

// linear_backward() with the weight's transpose, `[in, out]`.
template <typename Scalar, typename Storage, typename Arithmetic>
RowMatrix<Scalar> linear_backward_through(
    const AnyDevice& device, const PackedWeight<Scalar, Storage, Arithmetic>& transposed,
    const Eigen::Ref<const RowMatrix<Scalar>>& x, const Eigen::Ref<const RowMatrix<Scalar>>& grad_y,
    RowMatrix<Scalar>& grad_weight, Vector<Scalar>* grad_bias) {
  using L = Lanes<Scalar>;
  const Index in = transposed.rows();
  const Index out = transposed.cols();
  if (x.cols() != in) reject("x", std::to_string(in) + " columns", x.cols());
  require_shape<2>("grad_y", {grad_y.rows(), grad_y.cols()}, {x.rows(), out});
  require_shape<2>("grad_weight", {grad_weight.rows(), grad_weight.cols()}, {out, in});
  if (grad_bias != nullptr) require_shape<1>("grad_bias", {grad_bias->size()}, {out});
  const BatchBlocks rows{1, x.rows(), block_rows<Scalar>};
  RowMatrix<Scalar> grad_x(x.rows(), in);
  if (x.rows() == 0) return grad_x;
  PanelArray<Scalar, Arithmetic> x_panels(rows.count(), panel_channels<Scalar>(in));
  BlockArray<Scalar, Arithmetic> grad_blocks(rows.count(), out);
  StretchSums<Scalar> sums(ceil_div(rows.count(), stretch_blocks), out);
  for_each_stretch(device, rows.count(), [&](Index, Index stretch, const Range& blocks) {
    const Index number = blocks.end - blocks.begin;
    BlockArray<Scalar> made(number, in);
    BlockArray<Scalar> aside(PassingRows<Scalar, Arithmetic>::of_operands ? 1 : 0, out);
    PassingRows<Scalar, Arithmetic> passing;
    passing.fit_blocks(transposed, number);
    project_rows(
        transposed, number, false, passing,
        [&](Index i) {
          const Index b = blocks.begin + i;
          load_block(in, rows.rows(b), StridedRows{x.data(), x.outerStride(), rows.row(b)},
                     made[0]);
          x_panels.put(b, 0, in, made[0]);
          Scalar* const grad = grad_blocks.room(b, 0, aside[0]);
          load_block(out, rows.rows(b),
                     StridedRows{grad_y.data(), grad_y.outerStride(), rows.row(b)}, grad);
          for (Index c = 0; c < out; ++c) {
            Scalar* sum = sums[stretch] + c * L::count;
            (L::load(sum) + L::load(grad + c * L::count)).store(sum);
          }
          grad_blocks.put(b, 0, out, grad);
          return grad;
        },
        [&](Index, Index i) { return made[i]; });
    for (Index i = 0; i < number; ++i)
      store_block(in, rows.rows(blocks.begin + i), made[i],
                  StridedRows{grad_x.data(), in, rows.row(blocks.begin + i)});
  });
  add_weight_gradient(device, rows.count(), grad_blocks[0], grad_blocks.stride(), Groups::of(out),
                      x_panels, Groups::of(in), grad_weight.data());
  if (grad_bias != nullptr) sums.add_to(*grad_bias);
  return grad_x;
}

}  // namespace detail

/// The backward pass of `y = x·Wᵀ + b`.
/// \param weight `[out, in]`
/// \param x `[rows, in]`
/// \param grad_y gradient of y, `[rows, out]`
/// \param grad_weight `[out, in]`, to be added to
/// \param grad_bias null, or `[out]`, to be added to
/// \return the gradient of x, `[rows, in]`
/// \throws std::invalid_argument naming the argument that does not fit
template <ThreadDevice Device, typename Scalar>
RowMatrix<Scalar> linear_backward(
    const Device& device, const RowMatrix<Scalar>& weight,
    const Eigen::Ref<const RowMatrix<std::type_identity_t<Scalar>>>& x,
    const Eigen::Ref<const RowMatrix<std::type_identity_t<Scalar>>>& grad_y,
    RowMatrix<Scalar>& grad_weight, Vector<std::type_identity_t<Scalar>>* grad_bias) {
  return detail::linear_backward_through<Scalar>(device, PackedWeight<Scalar>(weight.transpose()),
                                                 x, grad_y, grad_weight, grad_bias);
}
/// The same of a weight that is packed in one group. If it is multiplied in Eigen::bfloat16, x and
/// grad_y are rounded so for both products, but not for the gradient of the bias.
template <ThreadDevice Device, typename Scalar, typename Storage, typename Arithmetic>
  requires detail::Trainable<Scalar, Storage, Arithmetic>
RowMatrix<Scalar> linear_backward(
    const Device& device, const PackedWeight<Scalar, Storage, Arithmetic>& weight,
    const Eigen::Ref<const RowMatrix<std::type_identity_t<Scalar>>>& x,
    const Eigen::Ref<const RowMatrix<std::type_identity_t<Scalar>>>& grad_y,
    RowMatrix<Scalar>& grad_weight, Vector<std::type_identity_t<Scalar>>* grad_bias) {
  PackedWeight<Scalar, Storage, Arithmetic> transposed;
  transposed.pack_transposed(weight);
  return detail::linear_backward_through<Scalar>(device, transposed, x, grad_y, grad_weight,
                                                 grad_bias);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
