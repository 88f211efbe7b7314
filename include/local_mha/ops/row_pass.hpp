// SPDX-License-Identifier: MIT
/// \file
/// What components that take rows one by one have in common: passes on threads, and what a forward
/// pass is known by.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <local_mha/attention/call.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/weight_gradient.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Buffers for blocks on their way in and out, for each thread.
template <typename Scalar>
struct RowRoom {
  BlockBuffer<Scalar> in;
  BlockBuffer<Scalar> out;
};

/// map_rows() on threads. Allocates nothing if the rooms have served as large a pass before.
/// \tparam Room a RowRoom
/// \param prepare makes ready what else is in a room: `prepare(room)`
/// \param apply of map_rows(), with the room before its arguments
template <typename Scalar, typename Room, typename Prepare, typename Apply>
void map_rows_on(const AnyDevice& device, std::vector<Room>& rooms, Index rows, Index channels,
                 const Scalar* x, Index x_stride, Index out_channels, Scalar* y, Index together,
                 Prepare&& prepare, Apply&& apply) {
  const Index rows_of_task =
      ceil_div(forward_stretch_blocks, together) * together * block_rows<Scalar>;
  const Index tasks = ceil_div(rows, rows_of_task);
  const Index threads = (std::min)(thread_count(device), tasks);
  if (static_cast<Index>(rooms.size()) < threads) rooms.resize(static_cast<std::size_t>(threads));
  for (Index i = 0; i < threads; ++i) {
    Room& room = rooms[static_cast<std::size_t>(i)];
    resize_without_values(room.in, channels * block_rows<Scalar> * together);
    resize_without_values(room.out, out_channels * block_rows<Scalar> * together);
    prepare(room);
  }
  parallel_for(device, threads, tasks, [&](Index worker, Index task) {
    Room& room = rooms[static_cast<std::size_t>(worker)];
    const Index first = task * rows_of_task;
    map_rows((std::min)(rows_of_task, rows - first), channels, x + first * x_stride, x_stride,
             out_channels, y + first * out_channels, together, room.in.data(), room.out.data(),
             [&](Index blocks, Scalar* in, Scalar* out) { apply(room, blocks, in, out); });
  });
}

/// The rows of a tensor `[B, N, channels]`.
template <typename Element>
auto rows_of(const TensorView<Element, 3>& tensor) {
  using Scalar = std::remove_const_t<Element>;
  using Rows =
      std::conditional_t<std::is_const_v<Element>, const RowMatrix<Scalar>, RowMatrix<Scalar>>;
  return Eigen::Map<Rows>(tensor.data(), tensor.dimension(0) * tensor.dimension(1),
                          tensor.dimension(2));
}

/// What a forward pass is known by: the shape of x, and samples of x and the weights.
template <typename Scalar>
class SavedRows {
 public:
  /// \param weights a range of spans
  template <typename Weights>
  void take(const TensorView<const Scalar, 3>& x, const Weights& weights) {
    shape_ = {-1, -1, -1};
    input_.take(numbers_of(x));
    weights_.take(weights);
    shape_ = x.dimensions();
  }

  /// \param module what the weights are of
  /// \throws std::invalid_argument if x or the weights are not those of the forward pass
  template <typename Weights>
  void require_known(const TensorView<const Scalar, 3>& x, const Weights& weights,
                     std::string_view module) const {
    if (shape_[0] < 0 || !weights_.is_of(weights))
      reject("saved", "that of " + std::string(module) + " of these weights", "another, or none");
    require_shape("x", x.dimensions(), shape_);
    if (!input_.is_of(numbers_of(x)))
      reject("x", "what forward_saving() was given", "other numbers");
  }

 private:
  std::array<Index, 3> shape_ = {-1, -1, -1};
  Sample<Scalar> input_;
  Sample<Scalar> weights_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail

LOCAL_MHA_INT_BOUNDS_END
