// SPDX-License-Identifier: MIT
/// \file
/// Products of rows with a weight, whatever its numbers are multiplied as.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <type_traits>

#include <local_mha/core/block.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/packed_weight.hpp>
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/project_operands.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// Buffers for rows as they pass weights. They serve one product after the other.
/// \tparam Arithmetic what they are multiplied as, see can_multiply
template <typename Scalar, typename Arithmetic = Scalar>
struct PassingRows {
  static constexpr bool of_operands = !std::is_same_v<Scalar, Arithmetic>;

  /// Makes it enough for so many blocks.
  template <typename Storage>
  void fit_blocks(const PackedWeight<Scalar, Storage, Arithmetic>& weight, Index blocks) {
    const Index size = of_operands ? blocks * pairs_of(weight.depth()) * block_rows<Scalar> : 0;
    if (std::ssize(operands) < size) resize_without_values(operands, size);
  }
  /// And for a single row.
  template <typename Storage>
  void fit_single(const PackedWeight<Scalar, Storage, Arithmetic>& weight) {
    const Index size = spread_size(weight);
    if (std::ssize(spread) < size) resize_without_values(spread, size);
  }

  BlockBuffer<Pair> operands;  ///< `[block][pairs_of(depth)][block_rows]`; none of Scalars
  BlockBuffer<Scalar> spread;  ///< `[spread_size(weight)]`
};

}  // namespace detail

/// Rows as project() takes them.
/// \param room enough for them
/// \param from makes block `b`, `[depth][block_rows]`, and says where it lies: `from(b)`, in order.
///        Of Scalars, each lies behind the one before; of operands, they may lie anywhere
/// \return valid until the room is used again
template <typename Scalar, typename Storage, typename Arithmetic, typename From>
const auto* pass_rows(const PackedWeight<Scalar, Storage, Arithmetic>& weight, Index blocks,
                      detail::PassingRows<Scalar, Arithmetic>& room, From&& from) {
  if constexpr (detail::PassingRows<Scalar, Arithmetic>::of_operands) {
    const Index size = detail::pairs_of(weight.depth()) * block_rows<Scalar>;
    for (Index b = 0; b < blocks; ++b)
      detail::pack_block(weight.depth(), from(b), room.operands.data() + b * size);
    return static_cast<const detail::Pair*>(room.operands.data());
  } else {
    const Scalar* const x = from(0);
    for (Index b = 1; b < blocks; ++b) from(b);
    return x;
  }
}

/// project() of all groups of a weight, or project_lane() if there is a single position, in lane 0.
/// \param blocks at least 1
/// \param room enough for them
/// \param from that of pass_rows()
/// \param to block `b` of group `g` goes to `to(g, b)`, `[group_rows][block_rows]`
template <typename Scalar, typename Storage, typename Arithmetic, typename From, typename To>
void project_rows(const PackedWeight<Scalar, Storage, Arithmetic>& weight, Index blocks,
                  bool single, detail::PassingRows<Scalar, Arithmetic>& room, From&& from,
                  To&& to) {
  const Index groups = weight.group_rows() > 0 ? weight.rows() / weight.group_rows() : 0;
  if (single) {
    spread_lane(weight, from(0), block_rows<Scalar>, room.spread.data());
    for (Index group = 0; group < groups; ++group)
      project_lane(weight, group, room.spread.data(), to(group, 0), block_rows<Scalar>);
    return;
  }
  const auto* const x = pass_rows(weight, blocks, room, from);
  for (Index group = 0; group < groups; ++group)
    project(weight, group, x, blocks, [&](Index b) { return to(group, b); });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
