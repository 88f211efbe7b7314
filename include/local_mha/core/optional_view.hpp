// SPDX-License-Identifier: MIT
/// \file
/// A tensor that a call may be given and looks at.
#pragma once

#include <optional>

#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

LOCAL_MHA_INT_BOUNDS_BEGIN
/// A read-only view of a tensor that somebody else owns, or none: a member of what a call is given.
/// Unlike an argument, that may have a name, and then outlives a temporary tensor, which therefore
/// does not convert.
template <typename Scalar, int Rank>
class OptionalView : public std::optional<TensorView<const Scalar, Rank>> {
  using View = TensorView<const Scalar, Rank>;
  using Base = std::optional<View>;

 public:
  OptionalView() = default;
  OptionalView(std::nullopt_t) {}
  OptionalView(const Base& other) : Base(other) {}
  OptionalView(const View& view) : Base(view) {}
  OptionalView(const TensorView<Scalar, Rank>& view) : Base(view) {}
  /// \throws std::invalid_argument as TensorView does
  template <typename Plain, int Options, template <class> class MakePointer>
  OptionalView(const Eigen::TensorMap<Plain, Options, MakePointer>& map) : Base(View(map)) {}
  template <int Options, typename Extent>
  OptionalView(const Eigen::Tensor<Scalar, Rank, Options, Extent>& tensor LOCAL_MHA_LIFETIME_BOUND)
      : Base(View(tensor)) {}
  template <int Options, typename Extent>
  OptionalView(const Eigen::Tensor<Scalar, Rank, Options, Extent>&&) = delete;
};
LOCAL_MHA_INT_BOUNDS_END

}  // namespace local_mha::inline LOCAL_MHA_ABI
