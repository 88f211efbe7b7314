// SPDX-License-Identifier: MIT
/// \file
/// Keys and values as operands of products in Eigen::bfloat16: the last blocks of a sequence, as
/// Ring keeps them as numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <local_mha/attention/ring.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Blocks of keys, each of which is a row of pairs: `[channels/32][block_rows][16]`.
template <typename Scalar>
class KeyOperands {
 public:
  using Cursor = detail::RingCursor<KeyOperands>;

  KeyOperands() = default;
  KeyOperands(Index channels, Index capacity)
      : channels_(channels),
        capacity_(capacity),
        stride_(detail::pairs_of(channels) * count),
        pairs_(detail::make_operand_buffer(stride_ * capacity)) {}

  Index channels() const { return channels_; }
  Index capacity() const { return capacity_; }
  /// Tiles in the depth of a block.
  Index tiles() const { return stride_ / tile; }
  /// Pairs of a tile of a block.
  static constexpr Index tile = block_rows<Scalar> * detail::tile_pairs;
  /// Pairs from key to key.
  static constexpr Index position_stride() { return detail::tile_pairs; }

  const detail::Pair* operator[](Index b) const { return in_slot(b % capacity_); }
  Cursor cursor(Index b) const { return {*this, b}; }
  const detail::Pair* in_slot(Index slot) const { return pairs_.data() + slot * stride_; }

  /// Takes a block, `[channels][block_rows]`.
  void put(Index b, const Scalar* block) {
    detail::Pair* to = pairs_.data() + b % capacity_ * stride_;
    for (Index c = 0; c < channels_; c += detail::tile_depth, to += tile) {
      alignas(64) detail::Pair pairs[tile];
      detail::pack_block((std::min)(channels_ - c, detail::tile_depth), block + c * count, pairs);
      detail::transpose_pairs_out<Scalar>(detail::tile_pairs, count, pairs, detail::tile_pairs, to);
    }
  }
  /// The same of its first `rows` rows, `[channels]`.
  LOCAL_MHA_FLATTEN void put_rows(Index b, Index rows, const StridedRows<const Scalar>& row) {
    detail::Pair* to = pairs_.data() + b % capacity_ * stride_;
    for (Index c = 0; c < channels_; c += detail::tile_depth, to += tile) {
      detail::pack_rows<Scalar>(
          rows,
          [&](Index r, Index i) {
            return detail::load_row<Lanes<Scalar>>(row(r), c + i, channels_);
          },
          to);
    }
  }
  /// Takes one row, `[channels]`.
  void put_row(Index row, const Eigen::bfloat16* from) {
    detail::Pair* to =
        pairs_.data() + row / count % capacity_ * stride_ + row % count * detail::tile_pairs;
    for (Index c = 0; c < channels_; ++c)
      to[c / detail::tile_depth * tile + c % detail::tile_depth / 2].of[c % 2] = from[c];
  }
  /// Takes block `b` of another ring.
  void copy_block(Index b, const KeyOperands& from) {
    std::copy_n(from[b], stride_, pairs_.data() + b % capacity_ * stride_);
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  Index channels_ = 0;
  Index capacity_ = 1;
  Index stride_ = 0;
  BlockBuffer<detail::Pair> pairs_;
};

/// Blocks of values, two and two, so that a channel's keys adjoin: `[channel][2][block_rows]`.
template <typename Scalar>
class ValueOperands {
 public:
  using Cursor = detail::RingCursor<ValueOperands>;

  ValueOperands() = default;
  ValueOperands(Index channels, Index capacity)
      : channels_(channels),
        capacity_(ceil_div(capacity, Index{2}) * 2),
        stride_(ceil_div(channels, detail::tile_rows) * detail::tile_rows * count),
        pairs_(detail::make_operand_buffer(stride_ * capacity_ / 2)),
        finite_(static_cast<std::size_t>(capacity_), 1) {}

  Index channels() const { return channels_; }
  Index capacity() const { return capacity_; }
  /// Pairs of keys from channel to channel.
  static constexpr Index channel_stride() { return block_rows<Scalar>; }

  const detail::Pair* operator[](Index b) const { return in_slot(b % capacity_); }
  Cursor cursor(Index b) const { return {*this, b}; }
  const detail::Pair* in_slot(Index slot) const { return pairs_.data() + place_of(slot); }

  /// Takes a block, `[channels][block_rows]`.
  LOCAL_MHA_FLATTEN void put(Index b, const Scalar* block) {
    using L = Lanes<Scalar>;
    auto* to = reinterpret_cast<Eigen::bfloat16*>(pairs_.data() + place(b));
    // 0 times what is not finite is NaN.
    L sums = L::zero();
    for (Index c = 0; c < channels_; ++c, to += 2 * count) {
      detail::store_operands(L::load(block + c * count), to);
      sums = fma(Scalar(0), detail::load_stored<L>(to), sums);
    }
    take_finite(b, sums);
  }
  /// The same of its first `rows` rows, `[channels]`.
  LOCAL_MHA_FLATTEN void put_rows(Index b, Index rows, const StridedRows<const Scalar>& row) {
    using L = Lanes<Scalar>;
    constexpr Index depth = count / 2;
    constexpr Index packets = (std::max)(depth, Index{L::packet_size});
    detail::Pair* to = pairs_.data() + place(b);
    L sums = L::zero();
    for (Index c = 0; c < channels_; c += count, to += count * channel_stride()) {
      alignas(64) detail::Pair pairs[packets * count] = {};
      for (Index r = 0; r < rows; r += 2) {
        const auto lanes = [&](Index key) {
          return key < rows ? detail::load_row<L>(row(key), c, channels_) : L::zero();
        };
        detail::Pair* const both = pairs + r / 2 * count;
        detail::store_pairs(lanes(r), lanes(r + 1), both);
        sums = fma(detail::Pair{}, detail::PairLanes<L>::load(both), sums);
      }
      const Index channels = (std::min)(channels_ - c, count);
      if constexpr (depth == packets || !L::vectorized) {
        detail::transpose_pairs_out<Scalar>(depth, channels, pairs, channel_stride(), to);
      } else {
        // Beside them lie those of the next block.
        alignas(64) detail::Pair aside[packets * count];
        detail::transpose_pairs_out<Scalar>(packets, count, pairs, packets, aside);
        for (Index i = 0; i < channels; ++i)
          std::copy_n(aside + i * packets, depth, to + i * channel_stride());
      }
    }
    take_finite(b, sums);
  }
  /// Takes one row, `[channels]`; then finite() is what note_finite() sees.
  void put_row(Index row, const Eigen::bfloat16* from) {
    const Index key = row % count;
    detail::Pair* to = pairs_.data() + place(row / count) + key / 2;
    for (Index c = 0; c < channels_; ++c, to += count) to->of[key % 2] = from[c];
  }
  /// Looks at block `b`, for finite().
  void note_finite(Index b) {
    bool all = true;
    for (Index c = 0; c < channels_; ++c)
      for (Index key = 0; key < count; ++key)
        all = all && (std::isfinite)(detail::from_stored<float>(value(b, c, key)));
    finite_[static_cast<std::size_t>(b % capacity_)] = all ? 1 : 0;
  }
  /// Takes block `b` of another ring.
  void copy_block(Index b, const ValueOperands& from) {
    for (Index c = 0; c < channels_; ++c)
      std::copy_n(from[b] + c * count, count / 2, pairs_.data() + place(b) + c * count);
    finite_[static_cast<std::size_t>(b % capacity_)] = from.finite(b) ? 1 : 0;
  }
  /// False if block `b` holds a NaN or an infinity.
  bool finite(Index b) const { return finite_[static_cast<std::size_t>(b % capacity_)] != 0; }

  /// The value of a channel at a key of block `b`.
  const Eigen::bfloat16& value(Index b, Index channel, Index key) const {
    return (*this)[b][channel * count + key / 2].of[key % 2];
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  // Of sums of 0 times all values.
  void take_finite(Index b, const Lanes<Scalar>& sums) {
    alignas(64) Scalar sum[count];
    sums.store(sum);
    finite_[static_cast<std::size_t>(b % capacity_)] = all_finite(sum, count) ? 1 : 0;
  }
  Index place(Index b) const { return place_of(b % capacity_); }
  Index place_of(Index slot) const { return slot / 2 * stride_ + slot % 2 * (count / 2); }

  Index channels_ = 0;
  Index capacity_ = 2;
  Index stride_ = 0;
  BlockBuffer<detail::Pair> pairs_;
  std::vector<std::uint8_t> finite_;
};

namespace detail {

/// What the keys and values of a batch's block lie in, for products of an Arithmetic.
template <typename Scalar, typename Arithmetic>
using BlockKeys =
    std::conditional_t<std::is_same_v<Scalar, Arithmetic>, Ring<Scalar>, KeyOperands<Scalar>>;
template <typename Scalar, typename Arithmetic>
using BlockValues =
    std::conditional_t<std::is_same_v<Scalar, Arithmetic>, Ring<Scalar>, ValueOperands<Scalar>>;

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
