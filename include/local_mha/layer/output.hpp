// SPDX-License-Identifier: MIT
/// \file
/// The results of a layer's heads on a stretch of rows, and their product with the last weight.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include <local_mha/attention/past.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/rows_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/layer/plan.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/project_operands.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Results of heads in blocks, which pass the weight together. A row that is alone passes it as in
/// LayerInput.
/// \tparam Arithmetic what they are multiplied as
template <typename Scalar, typename Arithmetic = Scalar>
class LayerOutput {
  static constexpr bool of_operands = !std::is_same_v<Scalar, Arithmetic>;

 public:
  template <typename Storage>
  explicit LayerOutput(const LayerWeights<Scalar, Storage, Arithmetic>& weights)
      : dim_(weights.config.dim),
        heads_(weights.config.heads),
        head_size_(padded_channels<Scalar>(weights.config.dim_head) * count),
        out_(make_block_buffer<Scalar>(
            (of_operands ? 1 : layer_stretch<Scalar, Arithmetic>)*heads_ * head_size_)),
        y_(make_block_buffer<Scalar>(layer_stretch<Scalar, Arithmetic> * dim_ * count)),
        spread_(make_block_buffer<Scalar>(spread_size(weights.to_out))) {
    if (of_operands)
      operands_ = make_operand_buffer(layer_stretch<Scalar, Arithmetic> * operands_of_block());
  }

  /// Where the result of head `h` in block `i` of the stretch is made, `[padded
  /// channels][block_rows]`; of operands, before that in another block.
  Scalar* head(Index i, Index h) {
    return out_.data() + ((of_operands ? 0 : i) * heads_ + h) * head_size_;
  }
  /// It is made, of rows that pass the weight in blocks.
  void take_head(Index i, Index h) {
    if constexpr (of_operands)
      pack_channels(head_size_ / count, head(i, h),
                    operands_.data() + i * operands_of_block() + h * head_size_ / 2);
  }

  /// Gives rows whose heads are made. The workers share the rows of the weight.
  /// \param alone they are a single row that passes the weight alone
  /// \param y from the first row on
  template <typename Storage>
  void give(const AnyDevice& device, Index workers,
            const LayerWeights<Scalar, Storage, Arithmetic>& weights, const Range& rows, bool alone,
            const RowsView<Scalar>& y) {
    if (rows.begin == rows.end) return;
    const Range blocks = blocks_of<Scalar>(rows);
    if (alone) spread_lane(weights.to_out, out_.data() + rows.begin % count, count, spread_.data());
    const auto share_begin = [&](Index i) {
      return i * weights.to_out.group_panels() / workers * weights.to_out.panel_rows;
    };
    parallel_for(device, workers, workers, [&](Index, Index i) {
      const Range share{share_begin(i), (std::min)(share_begin(i + 1), dim_)};
      if (alone)
        project_lane(weights.to_out, 0, share, spread_.data(), y.data, y.channel_stride);
      else
        project(weights.to_out, 0, share, out(), blocks.end - blocks.begin,
                [&](Index block) { return block_of_y(block); });
    });
    const Scalar* const bias = weights.config.out_bias ? weights.to_out_bias.data() : nullptr;
    if (alone) {
      for (Index c = 0; bias != nullptr && c < dim_; ++c) y(0, c) += bias[c];
      return;
    }
    for_each_block<Scalar>(rows, [&](Index block, LaneRange lanes) {
      Scalar* of_block = block_of_y(block - blocks.begin);
      if (bias != nullptr) add_bias(dim_, bias, of_block);
      store_lanes(dim_, lanes, of_block, y, block * count - rows.begin);
    });
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  Index operands_of_block() const { return pairs_of(heads_ * head_size_ / count) * count; }

  // Blocks as they pass the weight.
  const auto* out() const {
    if constexpr (of_operands)
      return operands_.data();
    else
      return out_.data();
  }

  Scalar* block_of_y(Index i) { return y_.data() + i * dim_ * count; }

  Index dim_;
  Index heads_;
  Index head_size_;
  BlockBuffer<Scalar> out_;     // [block][head][padded channel][count], of operands one block
  BlockBuffer<Pair> operands_;  // [block][pair of those channels][count]
  BlockBuffer<Scalar> y_;       // [block][dim][count]
  BlockBuffer<Scalar> spread_;  // a row that is alone, as project_lane() takes it
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
