// SPDX-License-Identifier: MIT
/// \file
/// Keys and values of a flow, as the kernel takes them: made of rows that lie in tensors.
#pragma once

#include <algorithm>
#include <optional>
#include <span>
#include <type_traits>

#include <local_mha/attention/operand_ring.hpp>
#include <local_mha/attention/placement.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/rows.hpp>
#include <local_mha/attention/strips.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Where the rows of a head lie, `[seqlen][channels]`.
template <typename Scalar>
struct KeyRows {
  const Scalar* k;
  const Scalar* v;
  Index seqlen;
};

/// Buffers for some blocks of one head after the other.
/// \tparam Arithmetic as of AttentionKernel
template <typename Scalar, typename Arithmetic = Scalar>
class FlowKeys {
  static constexpr Index count = block_rows<Scalar>;
  static constexpr bool of_operands = !std::is_same_v<Scalar, Arithmetic>;
  using Keys = BlockKeys<Scalar, Arithmetic>;
  using Values = BlockValues<Scalar, Arithmetic>;

 public:
  FlowKeys() = default;
  FlowKeys(Index dim_head, Index dim_value, Index blocks)
      : dim_value_(dim_value), keys_(dim_head, blocks) {
    // Values need no change, and are read as fast where they lie.
    if (!of_operands && Rows<Scalar>::fits(dim_value))
      rows_.emplace(dim_value, blocks);
    else
      values_ = Values(dim_value, blocks);
    if (of_operands) aside_ = make_block_buffer<Scalar>(dim_head * count);
  }

  /// Whether it has room for so many blocks of such heads.
  bool serves(Index dim_head, Index blocks) const {
    return keys_.capacity() >= blocks && keys_.channels() == dim_head;
  }

  /// The rows of which blocks are made, where their values lie with the others.
  void view(const KeyRows<Scalar>& rows) {
    if (rows_) rows_->view(rows.v, rows.seqlen);
  }

  /// Makes a block of the sequence in its place.
  void make(const Placement<Scalar>& placement, const KeyRows<Scalar>& rows, Index block) {
    make_keys(placement, rows, block, block);
    if (rows_) return rows_->note_finite(block);
    make_values(rows, block, block);
  }

  /// Makes some blocks of the sequence, one after the other.
  void make_all(const Placement<Scalar>& placement, const KeyRows<Scalar>& rows,
                std::span<const Index> blocks) {
    Index at = 0;
    for (const Index block : blocks) {
      make_keys(placement, rows, block, at);
      if (!rows_) make_values(rows, block, at);
      ++at;
    }
    if (!rows_ || blocks.empty()) return;
    copied_.assign(blocks.size() * static_cast<std::size_t>(count * dim_value_), Scalar(0));
    Scalar* to = copied_.data();
    for (const Index block : blocks) {
      const Index first = block * count;
      std::copy_n(rows.v + first * dim_value_, rows_at(rows, block) * dim_value_, to);
      to += count * dim_value_;
    }
    rows_->view(copied_.data(), at * count);
    while (at > 0) rows_->note_finite(--at);
  }
  /// For make_all() of so many blocks not to allocate.
  void reserve(Index blocks) {
    if (rows_) copied_.reserve(static_cast<std::size_t>(blocks * count * dim_value_));
  }

  /// Calls `use(window, pinned)` with where the kernel finds both.
  template <typename Use>
  static void use(const FlowKeys& window, const FlowKeys& pinned, Use&& use) {
    if constexpr (!of_operands) {
      if (window.rows_) {
        using Store = KeyStore<Scalar, Rows<Scalar>>;
        return use(Store{&window.keys_, &*window.rows_},
                   Store{&pinned.keys_, pinned.rows_ ? &*pinned.rows_ : nullptr});
      }
    }
    using Store = KeyStore<Scalar, Values, Keys>;
    use(Store{&window.keys_, &window.values_}, Store{&pinned.keys_, &pinned.values_});
  }

 private:
  static Index rows_at(const KeyRows<Scalar>& rows, Index block) {
    return (std::min)(count, rows.seqlen - block * count);
  }

  // One block of the rows `[seqlen][channels]`.
  static void load(const KeyRows<Scalar>& rows, Index block, Index channels, const Scalar* from,
                   Scalar* to) {
    load_block(channels, rows_at(rows, block), StridedRows{from, channels, block * count}, to);
  }

  void make_keys(const Placement<Scalar>& placement, const KeyRows<Scalar>& rows, Index block,
                 Index at) {
    const Index channels = keys_.channels();
    if constexpr (of_operands) {
      if (placement.only_scales())
        return keys_.put_rows(at, rows_at(rows, block), {rows.k, channels, block * count});
      load(rows, block, channels, rows.k, aside_.data());
      placement.place_keys(channels, aside_.data(), block * count);
      keys_.put(at, aside_.data());
    } else {
      load(rows, block, channels, rows.k, keys_[at]);
      placement.place_keys(channels, keys_[at], block * count);
    }
  }
  void make_values(const KeyRows<Scalar>& rows, Index block, Index at) {
    if constexpr (of_operands) {
      values_.put_rows(at, rows_at(rows, block), {rows.v, dim_value_, block * count});
    } else {
      load(rows, block, dim_value_, rows.v, values_[at]);
      values_.note_finite(at);
    }
  }

  Index dim_value_ = 0;
  Keys keys_;
  Values values_;
  std::optional<Rows<Scalar>> rows_;  // in place of values_
  BlockBuffer<Scalar> copied_;        // values of make_all()
  BlockBuffer<Scalar> aside_;         // keys that become operands
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
