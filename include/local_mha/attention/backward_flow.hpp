// SPDX-License-Identifier: MIT
/// \file
/// The attention's backward pass through the heads of one sequence that share keys and values.
///
/// Query blocks come in the order of the sequence. Keys and values enter a ring just before they
/// are seen, with buffers for their gradients beside them, and leave when no query to come sees
/// them: the scratch memory is the look-around, whatever the length of the sequence. Pinned rows
/// stay to the end, as do the gradients of global queries, whom a key meets just before it leaves.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <local_mha/attention/backward_kernel.hpp>
#include <local_mha/attention/backward_strip.hpp>
#include <local_mha/attention/bias_gradients.hpp>
#include <local_mha/attention/head.hpp>
#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/placement.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/sum.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Buffers for the backward pass of heads of one shape, one group after the other.
///
/// A head of queries is given as an object with
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
/// and, if some keys come from elsewhere ready for the kernel,
///
///     put_placed_keys(block, to)                            over those that are here
///     take_placed_grad_keys(block, from)                    times log2(e)
///
/// each of which takes the index of a block and a block `[channels][block_rows]`. What is loaded
/// for rows that do not exist must be 0; what is stored may be changed. Keys and values are those
/// of the first head of a group.
/// \tparam Arithmetic as of AttentionKernel
template <typename Scalar, typename Arithmetic = Scalar>
class AttentionBackwardFlow {
 public:
  /// One head of a group.
  struct Member {
    /// What the queries see; its steps are set here.
    AttentionHead<Scalar> head = {};
    std::optional<Dropout<Scalar>> dropout = {};
    /// Null, or the gradient of the head's bias, to be added to.
    LongSum<Scalar>* grad_bias = nullptr;
    /// The same of its sink.
    LongSum<Scalar>* grad_sink = nullptr;
  };

  /// \param changes_scores heads have a function of the scores
  /// \param pins some rows may be seen from anywhere
  AttentionBackwardFlow(const detail::Placement<Scalar>& placement, const Window& window,
                        Index seqlen, Index dim_head, Index dim_value, bool changes_scores,
                        bool pins)
      : window_(window),
        made_for_(seqlen),
        seqlen_(seqlen),
        softmax_scale_(placement.softmax_scale(dim_head)),
        pins_(pins),
        steps_(placement.steps(window, seqlen)) {
    if (pins) all_steps_ = placement.all_steps(window, seqlen);
    const Index reach = window.reach(seqlen);
    const Index kept = window.blocks_seen(seqlen, count);
    rings_ = Rings(dim_head, dim_value, kept);
    kernel_ = AttentionBackwardKernel<Scalar, Arithmetic>(
        dim_head, dim_value, pins ? seqlen + count : (std::min)(reach + count, seqlen),
        changes_scores);
    queries_ = make_block_buffer<Scalar>(dim_head * count);
    grad_queries_ = make_block_buffer<Scalar>(padded_channels<Scalar>(dim_head) * count);
    grad_out_ = make_block_buffer<Scalar>(dim_value * count);
    out_ = make_block_buffer<Scalar>((std::max)(dim_head, dim_value) * count);
    lse_ = make_block_buffer<Scalar>(2 * count);
    delta_ = make_block_buffer<Scalar>(count);
  }

  /// Whether there is room for heads of `seqlen` rows.
  bool serves(Index seqlen) const {
    return window_.room_serves(made_for_, seqlen, 2 * count) && (!pins_ || seqlen <= made_for_);
  }

  /// For the runs that follow: heads of a group, and sequences with global rows in so many blocks.
  void use(Index group, Index global_blocks) {
    members(group);
    const Index first_keys = (std::min)(window_.first_keys(), made_for_);
    make_pinned_room(ceil_div(first_keys, count) + global_blocks);
    const auto number = static_cast<std::size_t>(global_blocks * group);
    while (global_blocks_.size() < number) {
      const auto like = [](const BlockBuffer<Scalar>& buffer) {
        return make_block_buffer<Scalar>(static_cast<Index>(buffer.size()));
      };
      global_blocks_.push_back({0, 0, like(queries_), like(grad_out_), like(lse_), like(delta_),
                                like(grad_queries_), like(grad_queries_)});
    }
  }

  /// Buffers for the members of a group, to be filled for run().
  std::vector<Member>& members(Index number) {
    members_.resize(static_cast<std::size_t>(number));
    return members_;
  }

  /// \param rotary null: none
  /// \param inputs, sequence those of the members
  /// \param member_of `member_of(i)` gives the blocks of member `i`
  template <typename MemberOf>
  void run(const RotaryEmbedding<Scalar>* rotary, const detail::AttentionInputs<Scalar>& inputs,
           Index sequence, MemberOf&& member_of) {
    rotary_ = rotary;
    seqlen_ = members_.front().head.seqlen;
    const Range own = members_.front().head.queries;
    if (own.begin >= own.end) return;
    global_ = inputs.global(sequence);
    if (pins_) inputs.assign_pinned(sequence, pinned_);
    for (Member& member : members_) {
      member.head.steps = steps_ ? &*steps_ : nullptr;
      member.head.pinned_steps = all_steps_ ? &*all_steps_ : nullptr;
      member.head.pinned = pinned_.empty() ? nullptr : &pinned_;
      member.head.dropout = member.dropout ? &*member.dropout : nullptr;
    }
    auto keys = member_of(Index{0});
    make_pinned(keys);
    make_global(member_of);
    Index made = window_.keys_of({own.begin, own.begin + 1}, seqlen_).begin / count;
    Index finished = made;
    std::size_t next_global = 0;
    for (Index block = own.begin / count; block * count < own.end; ++block) {
      const Index first = block * count;
      const Range seen = window_.keys_of(Range{first, first + count}.clipped_to(own), seqlen_);
      for (; finished < (std::min)(made, seen.begin / count); ++finished)
        finish_keys(finished, keys);
      for (; made * count < seen.end; ++made) make_keys(made, keys);
      const bool some_global = has_global(block);
      for (std::size_t i = 0; i < members_.size(); ++i) {
        auto queries = member_of(static_cast<Index>(i));
        make_queries(block, queries);
        if (some_global) keep_lanes(block, false);
        add_to_sink(members_[i]);
        kernel_.upcoming().clear();
        if (i + 1 == members_.size())
          member_of(Index{0}).add_upcoming(block + 1, made, finished, kernel_.upcoming());
        kernel_.differentiate(members_[i].head,
                              {.first = first,
                               .queries = queries_.data(),
                               .grad_out = grad_out_.data(),
                               .lse = lse_.data(),
                               .delta = delta_.data(),
                               .grad_queries = grad_queries_.data()},
                              rings_, pinned_rings_, members_[i].grad_bias);
        // The other lanes of a block with global queries are done at the end, too.
        if (some_global)
          global_blocks_[next_global++].grad_of_window = grad_queries_;
        else
          finish_queries(block, queries);
      }
    }
    for (; finished < made; ++finished) finish_keys(finished, keys);
    finish_pinned(keys);
    for (const GlobalBlock& global : global_blocks()) {
      auto queries = member_of(global.member);
      take_lanes(global);
      finish_queries(global.block, queries);
    }
  }

 private:
  using Rings = detail::GradientRings<Scalar, Arithmetic>;
  static constexpr Index count = block_rows<Scalar>;

  Index dim_head() const { return rings_.keys().channels(); }
  Index dim_value() const { return rings_.values().channels(); }

  template <typename Head>
  void make_queries(Index block, Head& head) {
    head.load_queries(block, queries_.data());
    scale_block(dim_head(), Scalar(softmax_scale_ * log2_e), queries_.data());
    if (rotary_ != nullptr) rotary_->apply_to_queries(queries_.data(), block * count);
    head.load_grad_out(block, grad_out_.data());
    detail::round_to_operands<Arithmetic>(dim_value() * count, grad_out_.data());
    head.load_out(block, out_.data());
    head.load_lse(block, lse_.data());
    detail::dot(dim_value(), grad_out_.data(), out_.data()).store(delta_.data());
  }

  void make_pinned_room(Index blocks) {
    if (blocks == 0) return;
    pinned_.make_room(blocks);
    if (pinned_rings_.keys().capacity() < blocks || pinned_rings_.keys().channels() != dim_head())
      pinned_rings_ = Rings(dim_head(), dim_value(), blocks);
  }

  // Keys of pinned rows, each at its place; their gradients come together there.
  template <typename Head>
  void make_pinned(Head& head) {
    const auto number = static_cast<Index>(pinned_.blocks().size());
    for (Index at = 0; at < number; ++at)
      make_keys(pinned_.blocks()[static_cast<std::size_t>(at)], at, head, pinned_rings_);
  }

  template <typename Head>
  void finish_pinned(Head& head) {
    for (std::size_t at = 0; at < pinned_.blocks().size(); ++at)
      store_keys(pinned_.blocks()[at], head, pinned_rings_.grad_keys[static_cast<Index>(at)],
                 pinned_rings_.grad_values[static_cast<Index>(at)]);
  }

  bool has_global(Index block) const {
    if (global_ == nullptr) return false;
    const bool* flags = global_ + block * count;
    return std::any_of(flags, flags + (std::min)(count, seqlen_ - block * count),
                       [](bool flag) { return flag; });
  }

  // Of the block of queries that is made, keeps those that are global, or those that are not: the
  // others are nothing, have no gradient and see nothing.
  void keep_lanes(Index block, bool global) {
    for (Index r = 0; r < count; ++r) {
      const Index row = block * count + r;
      if (row < seqlen_ && global_[row] == global) continue;
      for (Index c = 0; c < dim_head(); ++c)
        queries_[static_cast<std::size_t>(c * count + r)] = Scalar(0);
      for (Index c = 0; c < dim_value(); ++c)
        grad_out_[static_cast<std::size_t>(c * count + r)] = Scalar(0);
      delta_[static_cast<std::size_t>(r)] = Scalar(0);
      lse_[static_cast<std::size_t>(r)] = Scalar(-std::numeric_limits<double>::infinity());
      lse_[static_cast<std::size_t>(count + r)] = Scalar(0);
    }
  }

  // A block of queries of which some are global, of one head.
  struct GlobalBlock {
    Index member = 0;
    Index block = 0;
    BlockBuffer<Scalar> queries;
    BlockBuffer<Scalar> grad_out;
    BlockBuffer<Scalar> lse;
    BlockBuffer<Scalar> delta;
    BlockBuffer<Scalar> grad;            // of the queries, those that are global
    BlockBuffer<Scalar> grad_of_window;  // of the others
  };
  std::span<GlobalBlock> global_blocks() { return {global_blocks_.data(), number_of_global_}; }

  // Each lane's gradient of its own: what a query does not see may be no number.
  void take_lanes(const GlobalBlock& of) {
    for (Index r = 0; r < (std::min)(count, seqlen_ - of.block * count); ++r) {
      const BlockBuffer<Scalar>& from = global_[of.block * count + r] ? of.grad : of.grad_of_window;
      for (Index c = 0; c < dim_head(); ++c) {
        const auto at = static_cast<std::size_t>(c * count + r);
        grad_queries_[at] = from[at];
      }
    }
  }

  template <typename MemberOf>
  void make_global(MemberOf&& member_of) {
    number_of_global_ = 0;
    for (Index block = 0; block < ceil_div(seqlen_, count) && global_ != nullptr; ++block) {
      if (!has_global(block)) continue;
      for (std::size_t i = 0; i < members_.size(); ++i) {
        GlobalBlock& global = global_blocks_[number_of_global_++];
        auto queries = member_of(static_cast<Index>(i));
        make_queries(block, queries);
        keep_lanes(block, true);
        add_to_sink(members_[i]);
        global.member = static_cast<Index>(i);
        global.block = block;
        global.queries = queries_;
        global.grad_out = grad_out_;
        global.lse = lse_;
        global.delta = delta_;
        global.grad.assign(grad_queries_.size(), Scalar(0));
      }
    }
  }

  // What global queries give to a block of keys, and take from it.
  void meet_global(Index block) {
    const Range rows{block * count, (std::min)((block + 1) * count, seqlen_)};
    kernel_.upcoming().clear();
    for (GlobalBlock& global : global_blocks()) {
      Member& member = members_[static_cast<std::size_t>(global.member)];
      AttentionHead<Scalar> head = member.head;
      head.steps = head.pinned_steps;
      kernel_.differentiate_part(head,
                                 {.first = global.block * count,
                                  .queries = global.queries.data(),
                                  .grad_out = global.grad_out.data(),
                                  .lse = global.lse.data(),
                                  .delta = global.delta.data(),
                                  .grad_queries = global.grad.data()},
                                 rows, rings_, member.grad_bias);
    }
  }

  static void add(Index size, const Scalar* from, Scalar* to) {
    for (Index i = 0; i < size; ++i) to[i] = to[i] + from[i];
  }

  void add_to_sink(const Member& member) {
    if (member.grad_sink != nullptr)
      detail::add_sink_gradient(member.head.sink, lse_.data(), delta_.data(), *member.grad_sink);
  }

  template <typename Head>
  void make_keys(Index block, Head& head) {
    make_keys(block, block, head, rings_);
  }
  // Block `block` of the sequence as block `at` of some rings.
  template <typename Head>
  void make_keys(Index block, Index at, Head& head, Rings& rings) {
    Scalar* const keys = rings.made_keys(at);
    head.load_keys(block, keys);
    if (rotary_ != nullptr) rotary_->apply_to_keys(keys, block * count);
    if constexpr (requires { head.put_placed_keys(block, keys); })
      head.put_placed_keys(block, keys);
    rings.take_keys(at);
    head.load_values(block, rings.made_values(at));
    rings.take_values(at);
    rings.clear_gradients(at);
  }

  template <typename Head>
  void finish_queries(Index block, Head& head) {
    if (rotary_ != nullptr) rotary_->apply_back_to_queries(grad_queries_.data(), block * count);
    scale_block(dim_head(), Scalar(softmax_scale_), grad_queries_.data());
    head.store_grad_queries(block, grad_queries_.data());
  }

  template <typename Head>
  void finish_keys(Index block, Head& head) {
    meet_global(block);
    const Index at = pinned_.place_of_block(block);
    if (at < 0) return store_keys(block, head, rings_.grad_keys[block], rings_.grad_values[block]);
    add(rings_.grad_keys.channels() * count, rings_.grad_keys[block], pinned_rings_.grad_keys[at]);
    add(rings_.grad_values.channels() * count, rings_.grad_values[block],
        pinned_rings_.grad_values[at]);
  }

  // \param grad_keys, grad_values panels
  template <typename Head>
  void store_keys(Index block, Head& head, const Scalar* grad_keys, const Scalar* grad_values) {
    panels_to_block(dim_head(), grad_keys, out_.data());
    if constexpr (requires { head.take_placed_grad_keys(block, out_.data()); })
      head.take_placed_grad_keys(block, out_.data());
    if (rotary_ != nullptr) rotary_->apply_back_to_keys(out_.data(), block * count);
    // The queries that the kernel had were scaled for powers of 2.
    scale_block(dim_head(), Scalar(ln_2), out_.data());
    // The next queries are not loaded yet.
    head.store_grad_keys(block, out_.data(), queries_.data());
    panels_to_block(dim_value(), grad_values, out_.data());
    head.store_grad_values(block, out_.data());
  }

  Window window_;
  Index made_for_;
  Index seqlen_;
  double softmax_scale_;
  const RotaryEmbedding<Scalar>* rotary_ = nullptr;
  bool pins_;
  std::optional<RotarySteps<Scalar>> steps_;
  std::optional<RotarySteps<Scalar>> all_steps_;
  Rings rings_;
  AttentionBackwardKernel<Scalar, Arithmetic> kernel_;
  std::vector<Member> members_;
  BlockBuffer<Scalar> queries_;
  BlockBuffer<Scalar> grad_queries_;
  BlockBuffer<Scalar> grad_out_;
  BlockBuffer<Scalar> out_;
  BlockBuffer<Scalar> lse_;
  BlockBuffer<Scalar> delta_;
  PinnedRows<Scalar> pinned_;
  Rings pinned_rings_;
  const bool* global_ = nullptr;
  std::vector<GlobalBlock> global_blocks_;  // room, and how many there are
  std::size_t number_of_global_ = 0;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
