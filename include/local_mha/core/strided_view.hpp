// SPDX-License-Identifier: MIT
/// \file
/// Rows of a batch wherever they lie: tensors, matrices, slices of larger batches, channels first.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <local_mha/core/error.hpp>
#include <local_mha/core/rows_view.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// A batch of rows that somebody else owns, `[B, N, dim]`, with any distance between sequences,
/// between rows and between channels. What takes one takes, without a copy, an `Eigen::Tensor`
/// that is row-major and its `TensorMap`; a row-major matrix `[N, dim]`, an `Eigen::Map`, `Ref` or
/// block of one, which is one sequence; and by a constructor, anything else in memory. See
/// channels_first() for `[B, dim, N]`. A temporary may be an argument; a view of it that has a name
/// outlives it.
/// \tparam Element the scalar type, `const` for a read-only view
template <typename Element>
class StridedView {
  using Scalar = std::remove_const_t<Element>;

 public:
  /// Of three axes.
  using Dimensions = std::array<Index, 3>;

  /// Rows that adjoin.
  /// \throws std::invalid_argument as TensorView for a pointer
  StridedView(Element* data, const Dimensions& dimensions)
      : StridedView(TensorView<Element, 3>(data, dimensions)) {}

  /// A std::vector, std::array or std::span of rows that adjoin.
  /// \throws std::invalid_argument also if it has another number of elements
  StridedView(std::span<Element> data, const Dimensions& dimensions)
      : StridedView(TensorView<Element, 3>(data, dimensions)) {}

  /// A view of memory with strides.
  /// \param data the element of `(0, 0, 0)`
  /// \param strides elements from one sequence, row and channel to the next, at least 0
  /// \throws std::invalid_argument also if a stride is negative, or if elements that can be written
  ///         may be the same
  StridedView(Element* data, const Dimensions& dimensions, const Dimensions& strides)
      : data_(TensorView<Element, 3>(data, dimensions).data()),
        dimensions_(dimensions),
        strides_(strides) {
    check_strides();
  }

  /// Of a tensor, or what a view can be made of.
  template <typename Source>
    requires(std::constructible_from<TensorView<Element, 3>, Source &&> &&
             !std::derived_from<std::remove_cvref_t<Source>, StridedView>)
  StridedView(Source&& tensor LOCAL_MHA_LIFETIME_BOUND)
      : StridedView(TensorView<Element, 3>(std::forward<Source>(tensor)), 0) {}

  /// One sequence, `[1, N, dim]`.
  template <typename Derived>
  StridedView(const Eigen::MatrixBase<Derived>& matrix LOCAL_MHA_LIFETIME_BOUND)
    requires std::is_const_v<Element>
  {
    take_matrix(matrix.derived());
  }
  /// One sequence to be written to.
  template <typename Derived>
  StridedView(Eigen::MatrixBase<Derived>& matrix LOCAL_MHA_LIFETIME_BOUND) {
    take_matrix(matrix.derived());
  }
  // A block or a Map that has no name is written through.
  /// The same of a block or a Map without a name.
  template <typename Derived>
    requires(!std::is_const_v<Element>)
  StridedView(Eigen::MatrixBase<Derived>&& matrix LOCAL_MHA_LIFETIME_BOUND) {
    static_assert(!std::is_base_of_v<Eigen::PlainObjectBase<Derived>, Derived>,
                  "results in a temporary matrix are lost: give it a name");
    take_matrix(matrix.derived());
  }

  /// Does not compile: an expression has no memory, and a tensor of another scalar is no view.
  template <typename Derived>
  StridedView(const Eigen::TensorBase<Derived, Eigen::ReadOnlyAccessors>&) {
    constexpr bool same = std::is_same_v<typename Derived::Scalar, Scalar>;
    static_assert(same, "the tensor has another scalar than the layer");
    static_assert(!same, "an expression of tensors has no memory: assign it to a tensor first");
  }

  /// A read-only view of a writable one.
  template <typename Other>
    requires(std::is_same_v<const Other, Element> && !std::is_const_v<Other>)
  StridedView(const StridedView<Other>& other)
      : data_(other.data()), dimensions_(other.dimensions()), strides_(other.strides()) {}

  /// The first element.
  Element* data() const { return data_; }
  /// `[B, N, channels]`
  const Dimensions& dimensions() const { return dimensions_; }
  /// Elements from one to the next, along each axis.
  const Dimensions& strides() const { return strides_; }
  /// Extent along an axis.
  /// \throws std::invalid_argument if there is no such axis
  Index dimension(int axis) const {
    if (axis < 0 || axis > 2) reject("axis", "0 to 2", axis);
    return dimensions_[static_cast<std::size_t>(axis)];
  }
  /// Number of elements.
  Index size() const { return dimensions_[0] * dimensions_[1] * dimensions_[2]; }

  /// The rows of sequence `b`.
  RowsView<Element> sequence(Index b) const {
    return {data_ + b * strides_[0], strides_[1], strides_[2]};
  }
  /// The same from row `i` of the batch on, counted through its sequences.
  RowsView<Element> rows(Index i) const {
    const Index seqlen = dimensions_[1];
    return sequence(i / seqlen).from(i % seqlen);
  }

  /// The view of the other two axes exchanged, `[B, dim, N]`.
  StridedView transposed() const {
    StridedView view = *this;
    std::swap(view.dimensions_[1], view.dimensions_[2]);
    std::swap(view.strides_[1], view.strides_[2]);
    return view;
  }

 private:
  StridedView(const TensorView<Element, 3>& tensor, int)
      : data_(tensor.data()),
        dimensions_(tensor.dimensions()),
        strides_{dimensions_[1] * dimensions_[2], dimensions_[2], 1} {}

  template <typename Matrix>
  void take_matrix(Matrix& matrix) {
    static_assert(std::is_same_v<typename Matrix::Scalar, Scalar>,
                  "the matrix has another scalar than the layer");
    constexpr bool in_memory = bool(Matrix::Flags & Eigen::DirectAccessBit);
    static_assert(in_memory, "an expression has no memory: assign it to a matrix first");
    static_assert(!in_memory || bool(Matrix::IsRowMajor),
                  "local_mha takes row-major matrices [N, dim]: "
                  "Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>");
    if constexpr (in_memory) {
      data_ = matrix.data();
      dimensions_ = {1, matrix.rows(), matrix.cols()};
      strides_ = {matrix.rows() * matrix.outerStride(), matrix.outerStride(), matrix.innerStride()};
      check_strides();
    }
  }

  void check_strides() const {
    constexpr Index most = (std::numeric_limits<Index>::max)() / Index{sizeof(Scalar)};
    Index last = 0;
    for (std::size_t axis = 0; axis < 3; ++axis) {
      const Index steps = (std::max<Index>)(0, dimensions_[axis] - 1);
      if (strides_[axis] < 0 || (steps > 0 && strides_[axis] > (most - last) / steps))
        reject("strides", "at least 0, within what memory could hold", to_string(strides_));
      last += steps * strides_[axis];
    }
    if (!std::is_const_v<Element> && size() > 0) check_apart();
  }
  // Each axis steps over all that the ones of shorter strides reach.
  void check_apart() const {
    std::array<std::size_t, 3> axes{0, 1, 2};
    std::sort(axes.begin(), axes.end(),
              [&](std::size_t a, std::size_t b) { return strides_[a] < strides_[b]; });
    Index reached = 0;
    for (const std::size_t axis : axes) {
      if (dimensions_[axis] == 1) continue;
      if (strides_[axis] <= reached)
        reject("strides", "such that no two results have the same place", to_string(strides_));
      reached += (dimensions_[axis] - 1) * strides_[axis];
    }
  }

  Element* data_ = nullptr;
  Dimensions dimensions_{};
  Dimensions strides_{};
};

namespace detail {

// A tensor, and no reference to one.
template <typename Source>
inline constexpr bool is_owner = false;
template <typename Scalar, int Rank, int Options, typename Extent>
inline constexpr bool is_owner<Eigen::Tensor<Scalar, Rank, Options, Extent>> = true;

}  // namespace detail

/// A batch whose channels come before its rows, `[B, dim, N]`, as convolutions leave it.
/// \param tensor anything of which there is a StridedView, or one
/// \return `[B, N, dim]`
template <typename Source>
auto channels_first(Source&& tensor LOCAL_MHA_LIFETIME_BOUND) {
  using Pointed = std::remove_pointer_t<decltype(tensor.data())>;
  // Of a temporary tensor, which ends with the call, nobody sees what is written.
  using Element = std::conditional_t<detail::is_owner<Source>, const Pointed, Pointed>;
  return StridedView<Element>(std::forward<Source>(tensor)).transposed();
}

namespace detail {

/// The memory from the first to the last element.
template <typename Element>
std::pair<Element*, Element*> extent(const StridedView<Element>& view) {
  if (view.size() == 0) return {view.data(), view.data()};
  Index last = 0;
  for (std::size_t axis = 0; axis < 3; ++axis)
    last += (view.dimensions()[axis] - 1) * view.strides()[axis];
  return {view.data(), view.data() + last + 1};
}

/// Rejects memory for results that is also that of an argument, or lies between its elements.
template <typename Scalar>
void require_apart(std::string_view argument, const StridedView<Scalar>& results,
                   std::string_view other, const StridedView<const Scalar>& input) {
  const std::less<const Scalar*> before;
  const auto to = extent(results);
  const auto from = extent(input);
  if (before(to.first, from.second) && before(from.first, to.second))
    reject(argument, "memory that does not overlap " + std::string(other), "some that does");
}

/// The numbers of the sequences of a view, one after the other, for what samples them.
template <typename Scalar>
class StridedNumbers {
 public:
  /// \param lengths rows of each sequence; empty: all
  /// \param heads items of the view, one after the other, that are of one sequence
  StridedNumbers(const StridedView<const Scalar>& view, std::span<const Index> lengths,
                 Index heads = 1)
      : view_(view), lengths_(lengths), heads_(heads) {
    if (lengths.empty()) {
      rows_ = view.dimensions()[0] * view.dimensions()[1];
      return;
    }
    for (Index item = 0; item < view.dimensions()[0]; ++item) rows_ += length(item);
  }

  std::size_t size() const { return static_cast<std::size_t>(rows_ * view_.dimensions()[2]); }
  const Scalar& operator[](std::size_t i) const {
    const Index dim = view_.dimensions()[2];
    const Index channel = static_cast<Index>(i) % dim;
    Index row = static_cast<Index>(i) / dim;
    if (lengths_.empty()) return view_.rows(row)(0, channel);
    Index item = 0;
    for (; row >= length(item); ++item) row -= length(item);
    return view_.sequence(item)(row, channel);
  }

 private:
  Index length(Index item) const { return lengths_[static_cast<std::size_t>(item / heads_)]; }

  StridedView<const Scalar> view_;
  std::span<const Index> lengths_;
  Index heads_;
  Index rows_ = 0;
};
template <typename Scalar>
std::array<StridedNumbers<Scalar>, 1> numbers_of(const StridedView<const Scalar>& view,
                                                 std::span<const Index> lengths) {
  return {StridedNumbers<Scalar>(view, lengths)};
}
/// The same of the heads of an attention, `[B, H, N, D]`.
template <typename Scalar>
std::array<StridedNumbers<Scalar>, 1> numbers_of(const TensorView<const Scalar, 4>& tensor,
                                                 std::span<const Index> lengths) {
  const auto [batch, heads, seqlen, channels] = tensor.dimensions();
  return {
      StridedNumbers<Scalar>({tensor.data(), {batch * heads, seqlen, channels}}, lengths, heads)};
}

/// Makes the rows of a batch that are of no sequence 0.
/// \param inputs whose items hold one sequence each, or no such rows
template <typename Inputs, typename Scalar>
void clear_rows_without_sequence(const Inputs& inputs, const StridedView<Scalar>& y) {
  if (inputs.packed()) return;
  for (Index b = 0; b < inputs.sequences(); ++b) {
    const Range own = inputs.own(b);
    const Index end = own.end - own.begin;
    clear_rows(y.sequence(b).from(end), y.dimensions()[1] - end, y.dimensions()[2]);
  }
}

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
