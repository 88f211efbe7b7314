// SPDX-License-Identifier: MIT
/// \file
/// A batch as LayerStack takes it: rows that adjoin, all of sequences.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/rows_view.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/layer/call.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Whether the rows of a tensor follow each other without a gap.
template <typename Element>
bool adjoins(const StridedView<Element>& view) {
  const auto& shape = view.dimensions();
  return view.strides() == std::array<Index, 3>{shape[1] * shape[2], shape[2], 1};
}

/// How many rows of each item of a batch are its sequence: all, or the first of them, which pass
/// the layers as packed sequences.
class RaggedBatch {
 public:
  /// Becomes that of a call. Memory is used again.
  /// \param shape `[B, N, dim]`
  /// \throws std::invalid_argument if the lengths do not fit
  void assign(const std::array<Index, 3>& shape, std::span<const Index> lengths, bool packed) {
    check_lengths(lengths, shape[0], shape[1], packed);
    shape_ = shape;
    cu_seqlens_.assign(lengths.empty() ? 0 : lengths.size() + 1, 0);
    for (std::size_t b = 0; b < lengths.size(); ++b)
      cu_seqlens_[b + 1] = cu_seqlens_[b] + lengths[b];
  }

  const std::array<Index, 3>& shape() const { return shape_; }
  bool ragged() const { return !cu_seqlens_.empty(); }
  std::span<const Index> cu_seqlens() const { return cu_seqlens_; }
  /// That of the rows that pass.
  std::array<Index, 3> packed_shape() const {
    return ragged() ? std::array<Index, 3>{1, cu_seqlens_.back(), shape_[2]} : shape_;
  }

  /// Copies the rows that pass, to where they adjoin.
  template <typename Scalar>
  void pack(const StridedView<const Scalar>& from, Scalar* to) const {
    for (Index b = 0; b < shape_[0]; ++b)
      copy_rows(from.sequence(b), length(b), shape_[2],
                RowsView<Scalar>{to + first(b) * shape_[2], shape_[2]});
  }
  /// Copies them back; the others become 0.
  template <typename Scalar>
  void unpack(const Scalar* from, const StridedView<Scalar>& to) const {
    for (Index b = 0; b < shape_[0]; ++b) {
      const RowsView<Scalar> rows = to.sequence(b);
      copy_rows(RowsView<const Scalar>{from + first(b) * shape_[2], shape_[2]}, length(b),
                shape_[2], rows);
      clear_rows(rows.from(length(b)), shape_[1] - length(b), shape_[2]);
    }
  }
  /// \param flags `[B, N]`, becomes those of the rows that pass
  void pack(const PaddingMask& mask, std::vector<std::uint8_t>& flags) const {
    flags.resize(static_cast<std::size_t>(packed_shape()[1]));
    for (Index b = 0; b < shape_[0]; ++b)
      std::copy_n(mask.row(b), length(b), flags.begin() + first(b));
  }

 private:
  Index first(Index b) const {
    return ragged() ? cu_seqlens_[static_cast<std::size_t>(b)] : b * shape_[1];
  }
  Index length(Index b) const {
    return ragged() ? cu_seqlens_[static_cast<std::size_t>(b) + 1] - first(b) : shape_[1];
  }

  std::array<Index, 3> shape_{};
  std::vector<Index> cu_seqlens_;  // of the packed sequences; empty: there are none
};

/// The rows of a call that pass the layers, copied where they do not adjoin, and room for results.
template <typename Scalar>
class PackedBatch {
 public:
  /// Becomes that of a call. Memory is used again.
  /// \throws std::invalid_argument if the lengths do not fit
  void take(const StridedView<const Scalar>& x, const StridedView<Scalar>& y,
            const EncoderCall& call) {
    batch_.assign(x.dimensions(), call.lengths, !call.cu_seqlens.empty());
    const std::array<Index, 3> shape = batch_.packed_shape();
    const Index size = shape[0] * shape[1] * shape[2];
    copies_x_ = batch_.ragged() || !adjoins(x);
    copies_y_ = batch_.ragged() || !adjoins(y);
    resize_without_values(x_, copies_x_ ? size : 0);
    resize_without_values(y_, copies_y_ ? size : 0);
    if (copies_x_) batch_.pack(x, x_.data());
    if (batch_.ragged() && call.mask) batch_.pack(call.mask, flags_);
  }

  const RaggedBatch& batch() const { return batch_; }
  TensorView<const Scalar, 3> x(const StridedView<const Scalar>& given) const {
    return {copies_x_ ? x_.data() : given.data(), batch_.packed_shape()};
  }
  TensorView<Scalar, 3> y(const StridedView<Scalar>& given) {
    return {copies_y_ ? y_.data() : given.data(), batch_.packed_shape()};
  }
  /// Valid until the next take().
  PaddingMask mask(const PaddingMask& given) const {
    if (!batch_.ragged() || !given) return given;
    return PaddingMask::masked_view(flags_, {1, batch_.packed_shape()[1]});
  }
  std::span<const Index> cu_seqlens(std::span<const Index> given) const {
    return batch_.ragged() ? batch_.cu_seqlens() : given;
  }
  /// Gives the results, if they are not there.
  void give(const StridedView<Scalar>& y) const {
    if (copies_y_) batch_.unpack(y_.data(), y);
  }

 private:
  RaggedBatch batch_;
  bool copies_x_ = false;
  bool copies_y_ = false;
  BlockBuffer<Scalar> x_;
  BlockBuffer<Scalar> y_;
  std::vector<std::uint8_t> flags_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
