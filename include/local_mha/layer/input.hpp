// SPDX-License-Identifier: MIT
/// \file
/// The rows of a stretch that come into a layer, and their products with its weights.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include <local_mha/attention/past.hpp>
#include <local_mha/config.hpp>
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

/// Rows come in blocks, which pass a weight together, a head at a time.
///
/// Where sequences come bit by bit, a single row passes all weights at once, one after the other as
/// they lie in memory. Its sums are in another order than those of blocks.
/// \tparam Arithmetic what rows are multiplied as
template <typename Scalar, typename Arithmetic = Scalar>
class LayerInput {
  static constexpr bool of_operands = !std::is_same_v<Scalar, Arithmetic>;

 public:
  template <typename Storage>
  explicit LayerInput(const LayerWeights<Scalar, Storage, Arithmetic>& weights)
      : dim_(weights.config.dim),
        gates_row_(qkv_heads(weights.config) * weights.config.dim_head),
        x_(make_block_buffer<Scalar>((of_operands ? 1 : layer_stretch<Scalar, Arithmetic>)*dim_ *
                                     count)),
        spread_(make_block_buffer<Scalar>(spread_size(weights.to_qkv))),
        projected_(make_block_buffer<Scalar>(gates_row_ + weights.config.heads)) {
    if (of_operands)
      operands_ = make_operand_buffer(layer_stretch<Scalar, Arithmetic> * pairs_of(dim_) * count);
  }

  /// Takes rows, at most layer_stretch blocks of them, normalized if the layer does that.
  /// \param alone they are a single row that passes all weights at once
  /// \param x from the first row on
  template <typename Storage>
  void take(const LayerWeights<Scalar, Storage, Arithmetic>& weights, const Range& rows, bool alone,
            const RowsView<const Scalar>& x) {
    rows_ = rows;
    alone_ = alone;
    if (alone) return take_alone(weights, x);
    Scalar* to = x_.data();
    Pair* pairs = operands_.data();
    for_each_block<Scalar>(rows, [&](Index block, LaneRange lanes) {
      load_lanes(dim_, lanes, x, block * count - rows.begin, to);
      if (weights.config.prenorm) {
        weights.norm.apply(to);
        clear_other_lanes(dim_, lanes, to);
      }
      if constexpr (of_operands) {
        pack_block(dim_, to, pairs);
        pairs += pairs_of(dim_) * count;
      } else {
        to += dim_ * count;
      }
    });
  }

  bool alone() const { return alone_; }

  /// All products of a row that is alone.
  template <typename Storage>
  void project_alone(const AnyDevice& device, Index workers,
                     const LayerWeights<Scalar, Storage, Arithmetic>& weights) {
    const Index heads = qkv_heads(weights.config);
    parallel_for(device, workers, workers, [&](Index, Index i) {
      const Range share{i * heads / workers, (i + 1) * heads / workers};
      project_lane(weights.to_qkv, share, spread_.data(),
                   projected_.data() + share.begin * weights.config.dim_head);
    });
    if (weights.config.gate_values_per_head)
      project_lane(weights.to_v_gate, 0, spread_.data(), projected_.data() + gates_row_, 1);
  }

  /// Products with the weight of a head's queries, keys or values.
  /// \param to block `b` of the sequence goes to `to(b)`, `[dim_head][block_rows]`. A row that is
  ///        alone takes its lane; if that is the first, the others become 0
  template <typename Storage, typename Target>
  void to_qkv(const LayerWeights<Scalar, Storage, Arithmetic>& weights, Index group,
              Target&& to) const {
    project(weights.to_qkv, group, group * weights.config.dim_head, to);
  }
  /// The same with that of the gates, `[heads][block_rows]`.
  template <typename Storage, typename Target>
  void to_v_gate(const LayerWeights<Scalar, Storage, Arithmetic>& weights, Target&& to) const {
    project(weights.to_v_gate, 0, gates_row_, to);
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  template <typename Storage>
  void take_alone(const LayerWeights<Scalar, Storage, Arithmetic>& weights,
                  const RowsView<const Scalar>& x) {
    if (!weights.config.prenorm)
      return spread_lane(weights.to_qkv, x.data, x.channel_stride, spread_.data());
    const Index lane = rows_.begin % count;
    with_lanes_of<Scalar>(rows_, [&]<int Parts>(Index first) {
      for (Index c = 0; c < dim_; ++c) {
        Scalar* const to = x_.data() + c * count;
        Lanes<Scalar, Parts>::zero().store(to + first);
        to[lane] = x(0, c);
      }
      weights.norm.template apply<Parts>(x_.data() + first);
    });
    spread_lane(weights.to_qkv, x_.data() + lane, count, spread_.data());
  }

  // \param first_row of projected_, where that of a row that is alone is
  template <typename Weight, typename Target>
  void project(const Weight& weight, Index group, Index first_row, Target&& to) const {
    const Range blocks = blocks_of<Scalar>(rows_);
    if (blocks.begin == blocks.end) return;
    if (alone_) return put_alone(weight.group_rows(), first_row, to(blocks.begin));
    local_mha::project(weight, group, x(), blocks.end - blocks.begin,
                       [&](Index i) { return to(blocks.begin + i); });
  }
  // Blocks as they pass a weight.
  const auto* x() const {
    if constexpr (of_operands)
      return operands_.data();
    else
      return x_.data();
  }

  void put_alone(Index channels, Index first_row, Scalar* block) const {
    const Index lane = rows_.begin % count;
    if (lane == 0) std::fill(block, block + channels * count, Scalar(0));
    for (Index c = 0; c < channels; ++c)
      block[c * count + lane] = projected_[static_cast<std::size_t>(first_row + c)];
  }

  Index dim_;
  Index gates_row_;
  Range rows_;
  bool alone_ = false;
  BlockBuffer<Scalar> x_;       // [block][dim][count], of operands one after the other
  BlockBuffer<Pair> operands_;  // [block][pairs_of(dim)][count]
  // A row that is alone, as project_lane() takes it, and its products: `[to_qkv's rows, gates]`.
  BlockBuffer<Scalar> spread_;
  BlockBuffer<Scalar> projected_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
