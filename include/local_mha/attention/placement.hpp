// SPDX-License-Identifier: MIT
/// \file
/// How queries and keys become what the kernels take: scaled, normalized, turned by their places.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include <local_mha/attention/log_sum_exp.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

template <typename Scalar>
class Placement {
 public:
  /// \param max_exponent of what keys are stored as
  explicit Placement(const LocalAttentionConfig& config,
                     int max_exponent = std::numeric_limits<Scalar>::max_exponent)
      : scale_(config.scale), shared_qk_(config.shared_qk) {
    if (!config.dim || !config.use_rotary_pos_emb) return;
    std::optional<double> base;
    if (config.use_xpos)
      base = config.xpos_scale_base.value_or(std::sqrt(static_cast<double>(*config.dim)));
    rotary_.emplace(*config.dim, base, config.rotary, max_exponent);
  }

  /// Factor of the scores for heads of `dim_head` channels.
  double softmax_scale(Index dim_head) const {
    return scale_.value_or(1 / std::sqrt(static_cast<double>(dim_head)));
  }
  /// The same for scores in units of log 2.
  Scalar score_scale(Index dim_head) const { return Scalar(softmax_scale(dim_head) * log2_e); }

  bool shared_qk() const { return shared_qk_; }
  /// Whether queries are scaled and nothing more, and keys stay what they are.
  bool only_scales() const { return !shared_qk_ && !rotary_; }
  /// Null: none.
  const RotaryEmbedding<Scalar>* rotary() const { return rotary_ ? &*rotary_ : nullptr; }

  /// \param block `[dim_head][block_rows]`, in place, from the lanes on that count
  /// \param first position of the first of them
  template <int Parts = 1>
  void place_queries(Index dim_head, Scalar* block, Index first) const {
    scale_block<Parts>(dim_head, score_scale(dim_head), block);
    if (rotary_) rotary_->template apply_to_queries<Parts>(block, first);
  }
  template <int Parts = 1>
  void place_keys(Index dim_head, Scalar* block, Index first) const {
    if (shared_qk_) l2_normalize<Parts>(dim_head, block);
    if (rotary_) rotary_->template apply_to_keys<Parts>(block, first);
  }

  /// Those between any two rows.
  std::optional<RotarySteps<Scalar>> all_steps(const Window& window, Index seqlen) const {
    if (!rotary_) return std::nullopt;
    return RotarySteps<Scalar>(*rotary_, window.rotary_shift(), seqlen, seqlen);
  }

  /// The steps of the rotary embedding in sequences of `seqlen` rows.
  std::optional<RotarySteps<Scalar>> steps(const Window& window, Index seqlen) const {
    if (!rotary_) return std::nullopt;
    return RotarySteps<Scalar>(*rotary_, window.rotary_shift(),
                               (std::min)(window.reach_behind(), seqlen),
                               (std::min)(window.reach_ahead(), seqlen));
  }

 private:
  std::optional<double> scale_;
  bool shared_qk_;
  std::optional<RotaryEmbedding<Scalar>> rotary_;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
