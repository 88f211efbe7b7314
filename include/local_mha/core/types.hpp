// SPDX-License-Identifier: MIT
/// \file
/// Index, matrix and tensor types. Everything is row-major, as in PyTorch.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <type_traits>

#include <Eigen/Core>
#include <unsupported/Eigen/CXX11/Tensor>

#include <local_mha/core/namespace.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

using Index = Eigen::Index;
static_assert(sizeof(Index) >= 8,
              "positions are counted in 64 bits: EIGEN_DEFAULT_DENSE_INDEX_TYPE");

/// Positions, or rows, `[begin, end)`.
struct Range {
  Index begin = 0;
  Index end = 0;

  bool contains(Index i) const { return begin <= i && i < end; }
  Range clipped_to(const Range& other) const {
    return {std::clamp(begin, other.begin, other.end), std::clamp(end, other.begin, other.end)};
  }
  friend bool operator==(const Range&, const Range&) = default;
};

/// Row-major matrix, `[rows, cols]`: a weight of PyTorch's `nn.Linear` is `[out, in]`.
template <typename Scalar>
using RowMatrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <typename Scalar>
using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;

template <typename Scalar, int Rank>
using Tensor = Eigen::Tensor<Scalar, Rank, Eigen::RowMajor>;

/// Gives a tensor a shape; its numbers become any if that is another. Where memory runs out, it is
/// as it was, which Eigen's resize() does not promise.
template <typename Scalar, int Rank>
void set_shape(Tensor<Scalar, Rank>& tensor, const std::array<Index, Rank>& shape) {
  for (std::size_t axis = 0; axis < shape.size(); ++axis)
    if (tensor.dimension(axis) != shape[axis]) {
      tensor = Tensor<Scalar, Rank>(shape);
      return;
    }
}

/// A dense row-major tensor that somebody else owns: `[d0, d1, …]`, the last index contiguous.
/// Converts implicitly from `Eigen::Tensor` and from an `Eigen::TensorMap` of one.
/// \tparam Element the scalar type, `const` for a read-only view
template <typename Element, int Rank>
class TensorView {
  using Scalar = std::remove_const_t<Element>;

 public:
  using Dimensions = std::array<Index, Rank>;

  TensorView(Element* data, const Dimensions& dimensions) : data_(data), dimensions_(dimensions) {}

  template <int Options, typename I>
  TensorView(Eigen::Tensor<Scalar, Rank, Options, I>& tensor) : data_(tensor.data()) {
    take_dimensions(tensor);
  }

  template <int Options, typename I>
    requires std::is_const_v<Element>
  TensorView(const Eigen::Tensor<Scalar, Rank, Options, I>& tensor) : data_(tensor.data()) {
    take_dimensions(tensor);
  }

  template <typename Plain, int Options, template <class> class MakePointer>
    requires(std::is_same_v<std::remove_const_t<typename Plain::Scalar>, Scalar> &&
             (std::is_const_v<Element> || !std::is_const_v<Plain>))
  TensorView(const Eigen::TensorMap<Plain, Options, MakePointer>& map)
      : data_(const_cast<Element*>(map.data())) {
    take_dimensions(map);
  }

  /// A read-only view of a writable one.
  template <typename Other>
    requires(std::is_same_v<const Other, Element> && !std::is_const_v<Other>)
  TensorView(const TensorView<Other, Rank>& other)
      : data_(other.data()), dimensions_(other.dimensions()) {}

  Element* data() const { return data_; }
  const Dimensions& dimensions() const { return dimensions_; }
  Index dimension(int axis) const { return dimensions_[static_cast<std::size_t>(axis)]; }
  Index size() const {
    Index size = 1;
    for (const Index extent : dimensions_) size *= extent;
    return size;
  }

 private:
  template <typename Source>
  void take_dimensions(const Source& source) {
    static_assert(
        static_cast<int>(Source::Layout) == static_cast<int>(Eigen::RowMajor),
        "local_mha takes row-major tensors: Eigen::Tensor<Scalar, Rank, Eigen::RowMajor>");
    static_assert(Source::NumIndices == Rank, "this tensor has another rank than the argument");
    for (std::size_t axis = 0; axis < dimensions_.size(); ++axis)
      dimensions_[axis] = static_cast<Index>(source.dimensions()[axis]);
  }

  Element* data_;
  Dimensions dimensions_{};
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
