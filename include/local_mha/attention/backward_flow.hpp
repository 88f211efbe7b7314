// SPDX-License-Identifier: MIT
/// \file
/// The attention's backward pass through one head of one sequence.
///
/// Query blocks come in the order of the sequence. Keys and values enter a ring just before they
/// are seen, with room for their gradients beside them, and leave when no query to come sees them:
/// the scratch memory is the look-around, whatever the length of the sequence.
#pragma once

#include <algorithm>
#include <optional>

#include <local_mha/attention/backward_kernel.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/tile.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// `Σ_c a_c · b_c` of each position of two blocks.
/// \param a, b `[channels][block_rows]`
template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> dot(Index channels, const Scalar* a, const Scalar* b) {
  using L = Lanes<Scalar>;
  L partial[4] = {L::zero(), L::zero(), L::zero(), L::zero()};
  Index c = 0;
  for (; c + 4 <= channels; c += 4) {
    LOCAL_MHA_UNROLL for (int i = 0; i < 4; ++i) partial[i] =
        fma(L::load(a + (c + i) * L::count), L::load(b + (c + i) * L::count), partial[i]);
  }
  for (; c < channels; ++c)
    partial[0] = fma(L::load(a + c * L::count), L::load(b + c * L::count), partial[0]);
  return (partial[0] + partial[1]) + (partial[2] + partial[3]);
}

/// Room for the backward pass of heads of one shape, one after the other.
///
/// A head is given as an object with
///
///     load_queries(block, to), load_keys(block, to)         before positions and scale
///     load_values(block, to), load_grad_out(block, to), load_out(block, to)
///     load_lse(block, to)                                   [2][block_rows]
///     store_grad_queries(block, from)
///     store_grad_keys(block, from, room)                    and a block of room
///     store_grad_values(block, from)
///
/// and, to have memory fetched in time,
///
///     add_upcoming(queries, keys, finished_keys, to)        blocks that are next
///
/// each of which takes the index of a block and a block `[channels][block_rows]`. What is loaded
/// for rows that do not exist must be 0; what is stored may be changed.
template <typename Scalar>
class AttentionBackwardFlow {
 public:
  /// \param steps of the rotary embedding, if there is one
  AttentionBackwardFlow(const Window& window, Index seqlen, Index dim_head, Index dim_value,
                        double softmax_scale, std::optional<RotarySteps<Scalar>> steps)
      : window_(window),
        made_for_(seqlen),
        seqlen_(seqlen),
        softmax_scale_(softmax_scale),
        steps_(std::move(steps)) {
    const Index reach =
        (std::min)(window.reach_behind(), seqlen) + (std::min)(window.reach_ahead(), seqlen);
    const Index kept =
        (std::max<Index>)(1, (std::min)(ceil_div(reach, count) + 2, ceil_div(seqlen, count)));
    keys_ = Ring<Scalar>(dim_head, kept);
    values_ = Ring<Scalar>(dim_value, kept);
    grad_keys_ = Ring<Scalar>(panel_channels<Scalar>(dim_head), kept);
    grad_values_ = Ring<Scalar>(panel_channels<Scalar>(dim_value), kept);
    kernel_ =
        AttentionBackwardKernel<Scalar>(dim_head, dim_value, (std::min)(reach + count, seqlen));
    queries_ = make_block_buffer<Scalar>(dim_head * count);
    grad_queries_ = make_block_buffer<Scalar>(padded_channels<Scalar>(dim_head) * count);
    grad_out_ = make_block_buffer<Scalar>(dim_value * count);
    out_ = make_block_buffer<Scalar>((std::max)(dim_head, dim_value) * count);
    lse_ = make_block_buffer<Scalar>(2 * count);
    delta_ = make_block_buffer<Scalar>(count);
  }

  /// Whether there is room for heads of `seqlen` rows.
  bool serves(Index seqlen) const { return window_.room_serves(made_for_, seqlen, 2 * count); }

  /// \param rotary null: none
  /// \param head what the queries see; its steps are set here
  /// \param grad_bias null, or the gradient of the head's bias, to be added to
  template <typename Head>
  void run(const RotaryEmbedding<Scalar>* rotary, AttentionHead<Scalar> head, Head&& in_and_out,
           Scalar* grad_bias) {
    rotary_ = rotary;
    seqlen_ = head.seqlen;
    head.steps = steps_ ? &*steps_ : nullptr;
    const Index blocks = ceil_div(seqlen_, count);
    Index made = 0;
    Index finished = 0;
    for (Index block = 0; block < blocks; ++block) {
      const Index first = block * count;
      const Range seen =
          window_.keys_of({first, first + (std::min)(count, seqlen_ - first)}, seqlen_);
      for (; finished < (std::min)(made, seen.begin / count); ++finished)
        finish_keys(finished, in_and_out);
      for (; made * count < seen.end; ++made) make_keys(made, in_and_out);
      make_queries(block, in_and_out);
      kernel_.upcoming().clear();
      in_and_out.add_upcoming(block + 1, made, finished, kernel_.upcoming());
      kernel_.differentiate(head,
                            {.first = first,
                             .queries = queries_.data(),
                             .grad_out = grad_out_.data(),
                             .lse = lse_.data(),
                             .delta = delta_.data(),
                             .grad_queries = grad_queries_.data()},
                            keys_, values_, grad_keys_, grad_values_, grad_bias);
      finish_queries(block, in_and_out);
    }
    for (; finished < made; ++finished) finish_keys(finished, in_and_out);
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  Index dim_head() const { return keys_.channels(); }
  Index dim_value() const { return values_.channels(); }

  template <typename Head>
  void make_queries(Index block, Head& head) {
    head.load_queries(block, queries_.data());
    scale_block(dim_head(), Scalar(softmax_scale_ * log2_e), queries_.data());
    if (rotary_ != nullptr) rotary_->apply_to_queries(queries_.data(), block * count);
    head.load_grad_out(block, grad_out_.data());
    head.load_out(block, out_.data());
    head.load_lse(block, lse_.data());
    dot(dim_value(), grad_out_.data(), out_.data()).store(delta_.data());
  }

  template <typename Head>
  void make_keys(Index block, Head& head) {
    head.load_keys(block, keys_[block]);
    if (rotary_ != nullptr) rotary_->apply_to_keys(keys_[block], block * count);
    head.load_values(block, values_[block]);
    keys_.note_finite(block);
    values_.note_finite(block);
    std::fill_n(grad_keys_[block], grad_keys_.channels() * count, Scalar(0));
    std::fill_n(grad_values_[block], grad_values_.channels() * count, Scalar(0));
  }

  template <typename Head>
  void finish_queries(Index block, Head& head) {
    if (rotary_ != nullptr) rotary_->apply_back_to_queries(grad_queries_.data(), block * count);
    scale_block(dim_head(), Scalar(softmax_scale_), grad_queries_.data());
    head.store_grad_queries(block, grad_queries_.data());
  }

  template <typename Head>
  void finish_keys(Index block, Head& head) {
    panels_to_block(dim_head(), grad_keys_[block], out_.data());
    if (rotary_ != nullptr) rotary_->apply_back_to_keys(out_.data(), block * count);
    // The queries that the kernel had were scaled for powers of 2.
    scale_block(dim_head(), Scalar(ln_2), out_.data());
    // The next queries are not loaded yet.
    head.store_grad_keys(block, out_.data(), queries_.data());
    panels_to_block(dim_value(), grad_values_[block], out_.data());
    head.store_grad_values(block, out_.data());
  }

  Window window_;
  Index made_for_;
  Index seqlen_;
  double softmax_scale_;
  const RotaryEmbedding<Scalar>* rotary_ = nullptr;
  std::optional<RotarySteps<Scalar>> steps_;
  Ring<Scalar> keys_;
  Ring<Scalar> values_;
  Ring<Scalar> grad_keys_;    // panels
  Ring<Scalar> grad_values_;  // panels
  AttentionBackwardKernel<Scalar> kernel_;
  BlockBuffer<Scalar> queries_;
  BlockBuffer<Scalar> grad_queries_;
  BlockBuffer<Scalar> grad_out_;
  BlockBuffer<Scalar> out_;
  BlockBuffer<Scalar> lse_;
  BlockBuffer<Scalar> delta_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
