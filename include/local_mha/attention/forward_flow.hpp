// SPDX-License-Identifier: MIT
/// \file
/// The attention's forward pass through the heads of one sequence that share keys and values.
///
/// Query blocks come in the order of the sequence. Keys and values enter a ring just before they
/// are seen: the scratch memory is the look-around, whatever the length of the sequence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/kernel.hpp>
#include <local_mha/attention/narrow_kernel.hpp>
#include <local_mha/attention/placement.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/rows.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Dropout of each head of each sequence; none in evaluation.
struct AttentionDropout {
  double probability = 0;
  std::optional<Training> training = {};

  /// \param head `s·H + h`
  template <typename Scalar>
  std::optional<Dropout<Scalar>> of_head(Index head) const {
    if (!training || probability == 0) return std::nullopt;
    return Dropout<Scalar>(probability, training->seed, static_cast<std::uint32_t>(head));
  }
};

/// Room for heads of one shape, one group after the other.
template <typename Scalar>
class AttentionForwardFlow {
 public:
  /// One head of one sequence, `[seqlen, channels]` each.
  struct Rows {
    const Scalar* q;
    const Scalar* k;
    const Scalar* v;
    Scalar* out;
    // [seqlen] each, or null: not wanted.
    Scalar* lse = nullptr;
    Scalar* lse_rest = nullptr;
  };

  AttentionForwardFlow(const detail::Placement<Scalar>& placement, const Window& window,
                       Index seqlen, Index dim_head, Index dim_value)
      : placement_(&placement),
        window_(window),
        made_for_(seqlen),
        dim_head_(dim_head),
        dim_value_(dim_value),
        steps_(placement.steps(window, seqlen)) {
    const Index reach =
        (std::min)(window.reach_behind(), seqlen) + (std::min)(window.reach_ahead(), seqlen);
    const Index kept =
        (std::max<Index>)(1, (std::min)(ceil_div(reach, count) + 2, ceil_div(seqlen, count)));
    keys_ = Ring<Scalar>(dim_head, kept);
    // Values need no change, and are read as fast where they lie.
    if (local_mha::Rows<Scalar>::fits(dim_value))
      value_rows_.emplace(dim_value, kept);
    else
      values_ = Ring<Scalar>(dim_value, kept);
    kernel_ = AttentionKernel<Scalar>(dim_head, (std::min)(reach + count, seqlen));
    queries_ = make_block_buffer<Scalar>(dim_head * count);
    out_ = make_block_buffer<Scalar>(padded_channels<Scalar>(dim_value) * count);
  }

  /// Whether there is room for such heads, of the placement that it was made with.
  bool fits(const Window& window, Index seqlen, Index dim_head, Index dim_value) const {
    return window_ == window && window.room_serves(made_for_, seqlen, 2 * count) &&
           dim_head_ == dim_head && dim_value_ == dim_value;
  }
  /// A placement of the same configuration, for the runs that follow.
  void use(const detail::Placement<Scalar>& placement) { placement_ = &placement; }

  /// Queries `[begin, end)` of a sequence, in blocks, of all heads of a group.
  /// \param rows_of `rows_of(h)` gives the Rows of head `h`
  template <typename RowsOf>
  void run(const detail::AttentionInputs<Scalar>& inputs, Index sequence, Index kv_head,
           const Range& queries, const AttentionDropout& dropout, RowsOf&& rows_of);

 private:
  static constexpr Index count = block_rows<Scalar>;

  struct Member {
    AttentionHead<Scalar> head;
    std::optional<Dropout<Scalar>> dropout;
    Rows rows;
    bool narrow = false;
  };

  template <typename RowsOf>
  void take_members(const detail::AttentionInputs<Scalar>& inputs, Index sequence, Index kv_head,
                    const AttentionDropout& dropout, RowsOf&& rows_of) {
    members_.resize(static_cast<std::size_t>(inputs.group()));
    Index h = kv_head * inputs.group();
    for (Member& member : members_) {
      member.head = inputs.head(sequence, h);
      member.head.steps = steps_ ? &*steps_ : nullptr;
      member.head.shared_qk = placement_->shared_qk();
      member.dropout = dropout.template of_head<Scalar>(sequence * inputs.heads() + h);
      member.head.dropout = member.dropout ? &*member.dropout : nullptr;
      member.rows = rows_of(h++);
      member.narrow = NarrowKernel<Scalar>::fits(member.head, dim_head_, dim_value_);
    }
    seqlen_ = members_.front().head.seqlen;
  }

  // One block of queries of one head.
  void attend(Member& member, Index first) {
    const Rows& rows = member.rows;
    Scalar* lse = rows.lse != nullptr ? lse_.data() : nullptr;
    if (member.narrow) {
      narrow_kernel_.attend(member.head, first, dim_head_, dim_value_,
                            placement_->score_scale(dim_head_), rows.q, rows.k, rows.v, rows.out,
                            lse);
    } else {
      load(queries_.data(), first / count, dim_head_, rows.q);
      placement_->place_queries(dim_head_, queries_.data(), first);
      if (value_rows_)
        kernel_.attend(member.head, first, queries_.data(), keys_, *value_rows_, out_.data(), lse);
      else
        kernel_.attend(member.head, first, queries_.data(), keys_, values_, out_.data(), lse);
      store_block(dim_value_, rows_at(first), out_.data(),
                  [&](Index r) { return rows.out + (first + r) * dim_value_; });
    }
    if (lse == nullptr) return;
    std::copy_n(lse, rows_at(first), rows.lse + first);
    std::copy_n(lse + count, rows_at(first), rows.lse_rest + first);
  }

  // Queries that see nothing but the sink.
  void see_nothing(const Member& member, Index first) {
    const Rows& rows = member.rows;
    std::fill_n(rows.out + first * dim_value_, rows_at(first) * dim_value_, Scalar(0));
    if (rows.lse == nullptr) return;
    SoftmaxState<Scalar>(member.head.sink).log_sum_exp(lse_.data());
    std::copy_n(lse_.data(), rows_at(first), rows.lse + first);
    std::copy_n(lse_.data() + count, rows_at(first), rows.lse_rest + first);
  }

  Index rows_at(Index first) const { return (std::min)(count, seqlen_ - first); }

  // The rows of the next block of queries, and of the keys that it will be the first to see.
  void fetch_next(std::size_t member, Index query, Index key) {
    kernel_.upcoming().clear();
    const auto add = [&](const Scalar* rows, Index first, Index channels) {
      if (first < seqlen_)
        kernel_.upcoming().add(rows + first * channels, rows_at(first) * channels);
    };
    const bool last = member + 1 == members_.size();
    const Rows& next = members_[last ? 0 : member + 1].rows;
    add(next.q, last ? query + count : query, dim_head_);
    add(next.out, last ? query + count : query, dim_value_);
    if (!last) return;
    add(next.k, key, dim_head_);
    add(next.v, key, dim_value_);
  }

  void make_keys(Index block, const Scalar* k, const Scalar* v) {
    load(keys_[block], block, dim_head_, k);
    placement_->place_keys(dim_head_, keys_[block], block * count);
    if (value_rows_) return value_rows_->note_finite(block);
    load(values_[block], block, dim_value_, v);
    values_.note_finite(block);
  }

  // One block of the rows `[seqlen][channels]`.
  void load(Scalar* to, Index block, Index channels, const Scalar* from) const {
    const Scalar* first = from + block * count * channels;
    load_block(channels, rows_at(block * count), [&](Index r) { return first + r * channels; }, to);
  }

  const detail::Placement<Scalar>* placement_;
  Window window_;
  Index made_for_;
  Index seqlen_ = 0;
  Index dim_head_;
  Index dim_value_;
  std::optional<RotarySteps<Scalar>> steps_;
  Ring<Scalar> keys_;
  Ring<Scalar> values_;
  std::optional<local_mha::Rows<Scalar>> value_rows_;
  AttentionKernel<Scalar> kernel_;
  NarrowKernel<Scalar> narrow_kernel_;
  BlockBuffer<Scalar> queries_;
  BlockBuffer<Scalar> out_;
  BlockBuffer<Scalar> lse_ = make_block_buffer<Scalar>(2 * count);
  std::vector<Member> members_;
};

template <typename Scalar>
template <typename RowsOf>
void AttentionForwardFlow<Scalar>::run(const detail::AttentionInputs<Scalar>& inputs,
                                       Index sequence, Index kv_head, const Range& queries,
                                       const AttentionDropout& dropout, RowsOf&& rows_of) {
  take_members(inputs, sequence, kv_head, dropout, rows_of);
  const AttentionHead<Scalar>& head = members_.front().head;
  const Rows& rows = members_.front().rows;
  if (value_rows_) value_rows_->view(rows.v, seqlen_);
  Index made = 0;
  for (Index block = queries.begin; block < queries.end; ++block) {
    const Index first = block * count;
    const Range seen =
        window_.keys_of({first, first + rows_at(first)}, seqlen_).clipped_to(head.unmasked);
    if (seen.begin >= seen.end) {
      for (const Member& member : members_) see_nothing(member, first);
      continue;
    }
    if (!members_.front().narrow)
      for (made = (std::max)(made, seen.begin / count); made * count < seen.end; ++made)
        make_keys(made, rows.k, rows.v);
    for (std::size_t i = 0; i < members_.size(); ++i) {
      if (!members_[i].narrow) fetch_next(i, first, made * count);
      attend(members_[i], first);
    }
  }
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
