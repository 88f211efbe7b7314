// SPDX-License-Identifier: MIT
/// \file
/// Index, matrix and tensor types. Everything is row-major, as in PyTorch.
#pragma once

#include <local_mha/core/requirements.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include <Eigen/Core>
#include <unsupported/Eigen/CXX11/Tensor>

#include <local_mha/core/error.hpp>
#include <local_mha/core/index.hpp>
#include <local_mha/core/namespace.hpp>

// g++ takes the bound of an array for a conversion where it is an int that a template gives.
#if defined(__GNUC__) && !defined(__clang__)
#define LOCAL_MHA_INT_BOUNDS_BEGIN \
  _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wsign-conversion\"")
#define LOCAL_MHA_INT_BOUNDS_END _Pragma("GCC diagnostic pop")
#else
#define LOCAL_MHA_INT_BOUNDS_BEGIN
#define LOCAL_MHA_INT_BOUNDS_END
#endif

/// clang warns where a view of a temporary tensor is given a name.
#if defined(__has_cpp_attribute) && __has_cpp_attribute(clang::lifetimebound)
#define LOCAL_MHA_LIFETIME_BOUND [[clang::lifetimebound]]
#else
#define LOCAL_MHA_LIFETIME_BOUND
#endif

namespace local_mha::inline LOCAL_MHA_ABI {

/// Positions, or rows, `[begin, end)`.
struct Range {
  /// The first.
  Index begin = 0;
  /// Behind the last.
  Index end = 0;

  /// Whether `i` is one of them.
  bool contains(Index i) const { return begin <= i && i < end; }
  /// Those that the other has, too; a range without elements if there are none.
  Range clipped_to(const Range& other) const {
    return {std::clamp(begin, other.begin, other.end), std::clamp(end, other.begin, other.end)};
  }
  friend bool operator==(const Range&, const Range&) = default;
};

/// Row-major matrix, `[rows, cols]`: a weight of PyTorch's `nn.Linear` is `[out, in]`.
template <typename Scalar>
using RowMatrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Column vector, `[size]`.
template <typename Scalar>
using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;

/// A number that is a tensor without dimensions, `[]`.
template <typename Scalar>
using Single = Eigen::Matrix<Scalar, 1, 1>;

/// Row-major tensor.
template <typename Scalar, int Rank>
using Tensor = Eigen::Tensor<Scalar, Rank, Eigen::RowMajor>;

/// Gives a tensor a shape; its numbers become any if that is another. Where memory runs out, it is
/// as it was, which Eigen's resize() does not promise.
LOCAL_MHA_INT_BOUNDS_BEGIN
template <typename Scalar, int Rank>
void set_shape(Tensor<Scalar, Rank>& tensor,
               const std::array<Index, static_cast<std::size_t>(Rank)>& shape) {
  for (std::size_t axis = 0; axis < shape.size(); ++axis)
    if (tensor.dimension(axis) != shape[axis]) {
      tensor = Tensor<Scalar, Rank>(shape);
      return;
    }
}
LOCAL_MHA_INT_BOUNDS_END

/// A dense row-major tensor that somebody else owns: `[d0, d1, …]`, the last index contiguous.
/// Converts implicitly from `Eigen::Tensor` and from an `Eigen::TensorMap` of one. A temporary
/// tensor may be an argument; a view of it that has a name outlives it.
/// \tparam Element the scalar type, `const` for a read-only view
template <typename Element, int Rank>
class TensorView {
  using Scalar = std::remove_const_t<Element>;

 public:
  /// Extents.
  using Dimensions = std::array<Index, static_cast<std::size_t>(Rank)>;

  /// A view of memory in which the last index runs fastest.
  /// \throws std::invalid_argument if an extent is negative, there are more elements than memory
  ///         could hold, or `data` is null although there are some
  TensorView(Element* data, const Dimensions& dimensions) : data_(data), dimensions_(dimensions) {
    check_arguments();
  }

  /// Of a std::vector, std::array or std::span; one that has no name is gone after the call.
  /// \throws std::invalid_argument also if it has another number of elements
  TensorView(std::span<Element> data, const Dimensions& dimensions)
      : TensorView(data.data(), dimensions) {
    if (static_cast<Index>(data.size()) != size())
      reject("data", std::to_string(size()) + " elements for " + to_string(dimensions),
             data.size());
  }

  /// Of a whole tensor, which must stay.
  template <int Options, typename Extent>
  TensorView(Eigen::Tensor<Scalar, Rank, Options, Extent>& tensor LOCAL_MHA_LIFETIME_BOUND)
      : data_(tensor.data()) {
    take_dimensions(tensor);
  }

  /// The same, to be read.
  template <int Options, typename Extent>
    requires std::is_const_v<Element>
  TensorView(const Eigen::Tensor<Scalar, Rank, Options, Extent>& tensor LOCAL_MHA_LIFETIME_BOUND)
      : data_(tensor.data()) {
    take_dimensions(tensor);
  }

  /// Of what a map looks at.
  /// \throws std::invalid_argument as for a pointer
  template <typename Plain, int Options, template <class> class MakePointer>
    requires(std::is_same_v<std::remove_const_t<typename Plain::Scalar>, Scalar> &&
             (std::is_const_v<Element> || !std::is_const_v<Plain>))
  TensorView(const Eigen::TensorMap<Plain, Options, MakePointer>& map)
      : data_(const_cast<Element*>(map.data())) {
    take_dimensions(map);
    check_arguments();
  }

  /// A read-only view of a writable one.
  template <typename Other>
    requires(std::is_same_v<const Other, Element> && !std::is_const_v<Other>)
  TensorView(const TensorView<Other, Rank>& other)
      : data_(other.data()), dimensions_(other.dimensions()) {}

  /// The first element.
  Element* data() const { return data_; }
  /// The shape.
  const Dimensions& dimensions() const { return dimensions_; }
  /// Extent along an axis.
  /// \throws std::invalid_argument if there is no such axis
  Index dimension(int axis) const {
    if (axis < 0 || axis >= Rank) reject("axis", "0 to " + std::to_string(Rank - 1), axis);
    return dimensions_[static_cast<std::size_t>(axis)];
  }
  /// Number of elements.
  Index size() const {
    Index size = 1;
    for (const Index extent : dimensions_) size *= extent;
    return size;
  }

 private:
  void check_arguments() const {
    constexpr Index most = (std::numeric_limits<Index>::max)() / Index{sizeof(Scalar)};
    // Without those that are 0, so that no product of some of them overflows.
    Index others = 1;
    for (const Index extent : dimensions_) {
      if (extent < 0 || (extent > 0 && others > most / extent))
        reject("dimensions", "extents of at least 0 whose product memory could hold",
               to_string(dimensions_));
      if (extent > 0) others *= extent;
    }
    if (data_ == nullptr && size() > 0)
      reject("data", "the elements of a tensor " + to_string(dimensions_), "null");
  }

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

LOCAL_MHA_INT_BOUNDS_BEGIN
template <typename Element, std::size_t Rank>
TensorView(Element*, const std::array<Index, Rank>&) -> TensorView<Element, static_cast<int>(Rank)>;
template <typename Element, std::size_t Extent, std::size_t Rank>
TensorView(std::span<Element, Extent>, const std::array<Index, Rank>&)
    -> TensorView<Element, static_cast<int>(Rank)>;
template <typename Scalar, int Rank, int Options, typename Extent>
TensorView(Eigen::Tensor<Scalar, Rank, Options, Extent>&) -> TensorView<Scalar, Rank>;
template <typename Scalar, int Rank, int Options, typename Extent>
TensorView(const Eigen::Tensor<Scalar, Rank, Options, Extent>&) -> TensorView<const Scalar, Rank>;
template <typename Scalar, int Rank, int Options, typename Extent, int MapOptions,
          template <class> class MakePointer>
TensorView(
    const Eigen::TensorMap<Eigen::Tensor<Scalar, Rank, Options, Extent>, MapOptions, MakePointer>&)
    -> TensorView<Scalar, Rank>;
template <typename Scalar, int Rank, int Options, typename Extent, int MapOptions,
          template <class> class MakePointer>
TensorView(const Eigen::TensorMap<const Eigen::Tensor<Scalar, Rank, Options, Extent>, MapOptions,
                                  MakePointer>&) -> TensorView<const Scalar, Rank>;
LOCAL_MHA_INT_BOUNDS_END

namespace detail {

template <typename Source>
struct ScalarOfSource {};
template <typename Source>
  requires requires { typename Source::Scalar; }
struct ScalarOfSource<Source> {
  using type = std::remove_const_t<typename Source::Scalar>;
};
template <typename Element, int Rank>
struct ScalarOfSource<TensorView<Element, Rank>> {
  using type = std::remove_const_t<Element>;
};
/// Of a tensor, a matrix, a map or a view of one.
template <typename Source>
using ScalarOf = typename ScalarOfSource<Source>::type;

/// Rejects memory for results that is also that of an argument.
template <typename Scalar, int Rank, int OtherRank>
void require_apart(std::string_view argument, const TensorView<Scalar, Rank>& results,
                   std::string_view other, const TensorView<const Scalar, OtherRank>& input) {
  const std::less<const Scalar*> before;
  if (before(results.data(), input.data() + input.size()) &&
      before(input.data(), results.data() + results.size()))
    reject(argument, "memory that does not overlap " + std::string(other), "some that does");
}

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
