// SPDX-License-Identifier: MIT
/// \file
/// The attention's forward pass through the heads of one sequence that share keys and values.
///
/// Query blocks come in the order of the sequence. Keys and values enter a ring just before they
/// are seen: the scratch memory is the look-around, whatever the length of the sequence. Rows that
/// are pinned are there all the time, and global queries, which see all, come after the others.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <local_mha/attention/attention_dropout.hpp>
#include <local_mha/attention/flow_keys.hpp>
#include <local_mha/attention/forward_rows.hpp>
#include <local_mha/attention/head.hpp>
#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/kernel.hpp>
#include <local_mha/attention/key_products.hpp>
#include <local_mha/attention/narrow_kernel.hpp>
#include <local_mha/attention/placement.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Buffers for heads of one shape, one group after the other.
/// \tparam Arithmetic as of AttentionKernel
template <typename Scalar, typename Arithmetic = Scalar>
class AttentionForwardFlow {
 public:
  using Rows = detail::ForwardRows<Scalar>;

  /// \param pins some rows may be seen from anywhere
  AttentionForwardFlow(const detail::Placement<Scalar>& placement, const Window& window,
                       Index seqlen, Index dim_head, Index dim_value, bool pins)
      : placement_(&placement),
        window_(window),
        made_for_(seqlen),
        dim_head_(dim_head),
        dim_value_(dim_value),
        pins_(pins),
        steps_(placement.steps(window, seqlen)) {
    if (pins) all_steps_ = placement.all_steps(window, seqlen);
    const Index reach = window.reach(seqlen);
    keys_ = Keys(dim_head, dim_value, window.blocks_seen(seqlen, count));
    // With pinned rows, what a query sees is all there is, beside what blocks are rounded up by.
    kernel_ = Kernel(dim_head, pins ? 2 * seqlen + 4 * count : (std::min)(reach + count, seqlen));
    queries_ = make_block_buffer<Scalar>(dim_head * count);
    operands_ = detail::BlockOperands<Scalar, Arithmetic>(dim_head);
    out_ = make_block_buffer<Scalar>(padded_channels<Scalar>(dim_value) * count);
  }

  /// Whether there is room for such heads, of the placement that it was made with.
  bool fits(const Window& window, Index seqlen, Index dim_head, Index dim_value, bool pins) const {
    return window_ == window && window.room_serves(made_for_, seqlen, 2 * count) &&
           dim_head_ == dim_head && dim_value_ == dim_value &&
           (!pins || (pins_ && seqlen <= made_for_));
  }
  /// For the runs that follow: a placement of the same configuration, heads of a group, and
  /// sequences with global rows in so many blocks.
  void use(const detail::Placement<Scalar>& placement, Index group, Index global_blocks) {
    placement_ = &placement;
    members_.resize(static_cast<std::size_t>(group));
    const Index first_keys = (std::min)(window_.first_keys(), made_for_);
    make_pinned_room(ceil_div(first_keys, count) + global_blocks);
    if (global_blocks > 0) make_global_room(global_blocks * group);
  }

  /// Queries `[begin, end)` of a sequence, in blocks, of all heads of a group.
  /// \param rows_of `rows_of(h)` gives the Rows of head `h`
  template <typename RowsOf>
  void run(const detail::AttentionInputs<Scalar>& inputs, Index sequence, Index kv_head,
           const Range& queries, const AttentionDropout& dropout, RowsOf&& rows_of);

 private:
  using Kernel = AttentionKernel<Scalar, Arithmetic>;
  using Keys = detail::FlowKeys<Scalar, Arithmetic>;
  static constexpr Index count = block_rows<Scalar>;

  // Keys of all rows that are there at once for global queries.
  static constexpr Index part_blocks = Kernel::chunk_keys / count;

  struct Member {
    AttentionHead<Scalar> head;
    std::optional<Dropout<Scalar>> dropout;
    Rows rows;
    bool narrow = false;
  };

  template <typename RowsOf>
  void take_members(const detail::AttentionInputs<Scalar>& inputs, Index sequence, Index kv_head,
                    const AttentionDropout& dropout, RowsOf&& rows_of) {
    if (pins_) inputs.assign_pinned(sequence, pinned_);
    Index h = kv_head * inputs.group();
    for (Member& member : members_) {
      member.head = inputs.head(sequence, h);
      member.head.steps = steps_ ? &*steps_ : nullptr;
      member.head.pinned_steps = all_steps_ ? &*all_steps_ : nullptr;
      member.head.pinned = pinned_.empty() ? nullptr : &pinned_;
      member.head.shared_qk = placement_->shared_qk();
      member.dropout = dropout.template of_head<Scalar>(sequence * inputs.heads() + h);
      member.head.dropout = member.dropout ? &*member.dropout : nullptr;
      member.rows = rows_of(h++);
      member.narrow =
          !Kernel::of_operands && NarrowKernel<Scalar>::fits(member.head, dim_head_, dim_value_);
    }
    seqlen_ = members_.front().head.seqlen;
    const detail::SequencePart* part = inputs.part_of(sequence);
    const Index held = part != nullptr ? ceil_div(part->keys.end, count) * count : seqlen_;
    held_ = (std::min)(held, seqlen_);
  }

  // The lanes of a block whose queries are here.
  LaneRange lanes_at(Index first) const {
    const Range own = Range{first, first + count}.clipped_to(members_.front().head.queries);
    return {static_cast<int>(own.begin - first), static_cast<int>(own.end - first)};
  }
  // Whether a block is attended from the rows as they lie.
  bool is_narrow(const Member& member, Index first) const {
    const LaneRange lanes = lanes_at(first);
    return member.narrow && lanes.begin == 0 && lanes.end == rows_at(first);
  }

  // One block of queries of one head.
  void attend(Member& member, Index first) {
    const Rows& rows = member.rows;
    const LaneRange lanes = lanes_at(first);
    Scalar* lse = rows.lse != nullptr ? lse_.data() : nullptr;
    if (is_narrow(member, first)) {
      narrow_kernel_.attend(member.head, first, dim_head_, dim_value_,
                            placement_->score_scale(dim_head_), rows.q, rows.k, rows.v, rows.out,
                            lse);
    } else {
      const auto attend = [&](const auto* queries) {
        Keys::use(keys_, pinned_keys_, [&](const auto& window, const auto& pinned) {
          kernel_.attend(member.head, first, queries, window, pinned, out_.data(), lse);
        });
      };
      const StridedRows<const Scalar> q{rows.q, dim_head_, first};
      bool done = false;
      if constexpr (Kernel::of_operands) {
        done = placement_->only_scales();
        if (done) attend(operands_.of_rows(lanes, q, placement_->score_scale(dim_head_)));
      }
      if (!done) {
        load_lanes(dim_head_, lanes, q, queries_.data());
        placement_->place_queries(dim_head_, queries_.data(), first);
        attend(queries_.data());
      }
      store_lanes(dim_value_, lanes, out_.data(), StridedRows{rows.out, dim_value_, first});
    }
    rows.store_lse(first, lanes, lse_.data());
  }

  // Queries that see nothing but the sink.
  void see_nothing(const Member& member, Index first) {
    member.rows.clear(first, lanes_at(first), dim_value_);
    SoftmaxState<Scalar>(member.head.sink).log_sum_exp(lse_.data());
    member.rows.store_lse(first, lanes_at(first), lse_.data());
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

  void make_pinned_room(Index blocks) {
    if (blocks == 0) return;
    pinned_.make_room(blocks);
    if (pinned_keys_.serves(dim_head_, blocks)) return;
    // It says what there is room for: memory may run out.
    Keys keys(dim_head_, dim_value_, blocks);
    keys.reserve(blocks);
    pinned_keys_ = std::move(keys);
  }

  static constexpr Index padded_rows(Index channels) {
    return padded_channels<Scalar>(channels) * count;
  }

  // Of so many blocks of queries, all heads of a group counted.
  void make_global_room(Index blocks) {
    global_blocks_.reserve(static_cast<std::size_t>(blocks));
    resize_without_values(global_queries_, blocks * dim_head_ * count);
    resize_without_values(global_out_, blocks * padded_rows(dim_value_));
    if (all_keys_.serves(dim_head_, part_blocks)) return;
    part_kernel_ = Kernel(dim_head_, part_blocks * count);
    all_keys_ = Keys(dim_head_, dim_value_, part_blocks);
  }

  // A block of queries of which some are global, of one head.
  struct GlobalBlock {
    Member* member;
    Index block;
    SoftmaxState<Scalar> softmax;
  };

  // The global ones of the queries `[begin, end)`, in blocks: all keys pass them, part by part.
  void attend_global(const bool* global, const Range& queries) {
    global_blocks_.clear();
    for (Index block = queries.begin; block < queries.end; ++block) {
      const bool* flags = global + block * count;
      if (std::none_of(flags, flags + rows_at(block * count), [](bool flag) { return flag; }))
        continue;
      for (Member& member : members_)
        global_blocks_.push_back({&member, block, SoftmaxState<Scalar>(member.head.sink)});
    }
    if (global_blocks_.empty()) return;
    const auto number = static_cast<Index>(global_blocks_.size());
    const Index out_size = padded_rows(dim_value_);
    const auto queries_of = [&](Index i) { return global_queries_.data() + i * dim_head_ * count; };
    const auto out_of = [&](Index i) { return global_out_.data() + i * out_size; };
    const auto at = [&](Index i) -> GlobalBlock& {
      return global_blocks_[static_cast<std::size_t>(i)];
    };
    for (Index i = 0; i < number; ++i) {
      load(queries_of(i), at(i).block, dim_head_, at(i).member->rows.q);
      placement_->place_queries(dim_head_, queries_of(i), at(i).block * count);
    }
    const detail::KeyRows<Scalar> rows{members_.front().rows.k, members_.front().rows.v, seqlen_};
    all_keys_.view(rows);
    const Index blocks = ceil_div(seqlen_, count);
    for (Range part{0, 0}; part.begin < blocks; part.begin = part.end) {
      part.end = (std::min)(part.begin + part_blocks, blocks);
      for (Index block = part.begin; block < part.end; ++block)
        all_keys_.make(*placement_, rows, block);
      const Range keys{part.begin * count, (std::min)(part.end * count, seqlen_)};
      for (Index i = 0; i < number; ++i) {
        AttentionHead<Scalar> head = at(i).member->head;
        head.steps = head.pinned_steps;
        Keys::use(all_keys_, all_keys_, [&](const auto& store, const auto&) {
          part_kernel_.attend_part(head, at(i).block * count, queries_of(i), keys, store,
                                   at(i).softmax, part.begin == 0, part.end == blocks, out_of(i),
                                   lse_.data());
        });
        if (part.end == blocks) store_global(global, at(i), out_of(i));
      }
    }
  }

  // Those of the block's queries that are global.
  void store_global(const bool* global, const GlobalBlock& of, const Scalar* out) {
    const Rows& rows = of.member->rows;
    const Index first = of.block * count;
    for (Index r = 0; r < rows_at(first); ++r) {
      if (!global[first + r]) continue;
      const auto lane = static_cast<int>(r);
      store_lanes(dim_value_, {lane, lane + 1}, out, StridedRows{rows.out, dim_value_, first});
      if (rows.lse == nullptr) continue;
      rows.lse[first + r] = lse_[static_cast<std::size_t>(r)];
      rows.lse_rest[first + r] = lse_[static_cast<std::size_t>(count + r)];
    }
  }

  // One block of the rows `[seqlen][channels]`.
  void load(Scalar* to, Index block, Index channels, const Scalar* from) const {
    const Index first = block * count;
    load_block(channels, rows_at(first), StridedRows{from, channels, first}, to);
  }

  const detail::Placement<Scalar>* placement_;
  Window window_;
  Index made_for_;
  Index seqlen_ = 0;
  Index held_ = 0;  // where the rows of keys and values that are here end
  Index dim_head_;
  Index dim_value_;
  bool pins_;
  std::optional<RotarySteps<Scalar>> steps_;
  std::optional<RotarySteps<Scalar>> all_steps_;
  Keys keys_;
  Kernel kernel_;
  NarrowKernel<Scalar> narrow_kernel_;
  BlockBuffer<Scalar> queries_;
  detail::BlockOperands<Scalar, Arithmetic> operands_;  // of them
  BlockBuffer<Scalar> out_;
  BlockBuffer<Scalar> lse_ = make_block_buffer<Scalar>(2 * count);
  std::vector<Member> members_;
  PinnedRows<Scalar> pinned_;
  Keys pinned_keys_;
  // Of global queries, if there are any.
  Kernel part_kernel_;
  Keys all_keys_;
  std::vector<GlobalBlock> global_blocks_;
  BlockBuffer<Scalar> global_queries_;
  BlockBuffer<Scalar> global_out_;
};

template <typename Scalar, typename Arithmetic>
template <typename RowsOf>
void AttentionForwardFlow<Scalar, Arithmetic>::run(const detail::AttentionInputs<Scalar>& inputs,
                                                   Index sequence, Index kv_head,
                                                   const Range& queries,
                                                   const AttentionDropout& dropout,
                                                   RowsOf&& rows_of) {
  take_members(inputs, sequence, kv_head, dropout, rows_of);
  const AttentionHead<Scalar>& head = members_.front().head;
  const Rows& of_first = members_.front().rows;
  const detail::KeyRows<Scalar> rows{of_first.k, of_first.v, seqlen_};
  keys_.view({rows.k, rows.v, held_});
  pinned_keys_.make_all(*placement_,
                        {of_first.first_k != nullptr ? of_first.first_k : rows.k,
                         of_first.first_v != nullptr ? of_first.first_v : rows.v, seqlen_},
                        pinned_.blocks());
  Index made = 0;
  for (Index block = queries.begin; block < queries.end; ++block) {
    const Index first = block * count;
    const Range seen =
        window_.keys_of(Range{first, first + rows_at(first)}.clipped_to(head.queries), seqlen_)
            .clipped_to(head.unmasked);
    if (seen.begin >= seen.end && pinned_.empty()) {
      for (const Member& member : members_) see_nothing(member, first);
      continue;
    }
    const bool narrow = is_narrow(members_.front(), first);
    if (!narrow)
      for (made = (std::max)(made, seen.begin / count); made * count < seen.end; ++made)
        keys_.make(*placement_, rows, made);
    for (std::size_t i = 0; i < members_.size(); ++i) {
      if (!narrow) fetch_next(i, first, made * count);
      attend(members_[i], first);
    }
  }
  if (const bool* global = inputs.global(sequence)) attend_global(global, queries);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
