// SPDX-License-Identifier: MIT
/// \file
/// A head of LocalMHA in the attention's backward pass.
#pragma once

#include <algorithm>
#include <cstddef>

#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/layer/backward_room.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/weight_gradient.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// The blocks of a head of a sequence, which AttentionBackwardFlow calls for.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
struct LayerBackwardHead {
  static constexpr Index count = block_rows<Scalar>;

  const LayerWeights<Scalar, Storage, Arithmetic>& layer;
  const SavedLayer<Scalar>& kept;
  LayerBackwardRoom<Scalar, Storage, Arithmetic>& room;
  Index item;         ///< of the batch
  Index first_block;  ///< where block 0 of the sequence is, or would be
  Index block_count;  ///< up to the last that is here
  Index h;
  Index kv_head;

  Index dim_head() const { return layer.config.dim_head; }
  Index head_size() const { return padded_channels<Scalar>(dim_head()) * count; }
  bool norms_each_head() const { return static_cast<bool>(layer.q_norm); }
  bool norms_all_heads() const { return layer.norms_of_all.front().dim() > 0; }

  Index at(Index block) const { return first_block + block; }
  const Scalar* saved(const BlockArray<Scalar>& blocks, Index block) const {
    return blocks[at(block)] + h * head_size();
  }
  const Scalar* saved_of_keys(const BlockArray<Scalar>& blocks, Index block) const {
    return blocks[at(block)] + kv_head * head_size();
  }
  Scalar* grad(Index part, Index block) const {
    const Index head =
        part == 0 ? h : layer.config.heads + (part - 1) * resolved_kv_heads(layer.config) + kv_head;
    return room.grad_qkv[at(block)] + head * head_size();
  }
  Scalar* sums(Index block) const {
    const Index in_item = at(block) - room.first_block_of_item(kept, item);
    return room.scale_sums[(item * layer.config.heads + h) * room.scale_stretches +
                           in_item / room.scale_stretch];
  }
  void copy(const Scalar* from, Scalar* to) const { std::copy_n(from, dim_head() * count, to); }

  // With 0 in the channels that fill up, which a projection multiplies by 0.
  void put_grad(Index part, Index block, const Scalar* from) const {
    Scalar* to = grad(part, block);
    copy(from, to);
    std::fill(to + dim_head() * count, to + head_size(), Scalar(0));
  }

  void load_queries(Index block, Scalar* to) const {
    load_normed(0, saved(kept.q, block), layer.q_norm, block, to);
  }
  void load_keys(Index block, Scalar* to) const {
    load_normed(1, saved_of_keys(kept.k, block), layer.k_norm, block, to);
  }
  void load_normed(std::size_t part, const Scalar* from, const QkNorm<Scalar>& norm, Index block,
                   Scalar* to) const {
    const Index channels = dim_head();
    if (norms_all_heads())
      return layer.norms_of_all[part].apply(
          (part == 0 ? h : kv_head) * channels, channels,
          Lanes<Scalar>::load(kept.inverses[at(block)] + static_cast<Index>(part) * count), from,
          to);
    copy(from, to);
    if (norm) norm.apply(to);
  }
  void load_values(Index block, Scalar* to) const { copy(saved_of_keys(kept.v, block), to); }
  void load_out(Index block, Scalar* to) const { copy(saved(kept.out, block), to); }
  void load_grad_out(Index block, Scalar* to) const { copy(saved(room.grad_out, block), to); }
  void load_lse(Index block, Scalar* to) const {
    std::copy_n(kept.lse[at(block)] + 2 * h * count, 2 * count, to);
  }
  void store_grad_queries(Index block, Scalar* from) const {
    if (norms_each_head()) layer.q_norm.apply_backward(saved(kept.q, block), from, sums(block));
    put_grad(0, block, from);
  }
  void store_grad_keys(Index block, Scalar* from, Scalar* /*more*/) const {
    if (norms_each_head())
      layer.k_norm.apply_backward(saved_of_keys(kept.k, block), from,
                                  sums(block) + dim_head() * count);
    put_grad(1, block, from);
  }
  void store_grad_values(Index block, Scalar* from) const { put_grad(2, block, from); }

  void add_upcoming(Index queries, Index keys, Index finished_keys, Upcoming<Scalar>& to) const {
    const auto add = [&](const Scalar* block) { to.add(block, dim_head() * count); };
    if (queries < block_count) {
      add(saved(kept.q, queries));
      add(saved(kept.out, queries));
      add(saved(room.grad_out, queries));
      add(grad(0, queries));
    }
    if (keys < block_count) {
      add(saved_of_keys(kept.k, keys));
      add(saved_of_keys(kept.v, keys));
    }
    add(grad(1, finished_keys));
    add(grad(2, finished_keys));
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
