// SPDX-License-Identifier: MIT
/// \file
/// The ten steps of LocalMHA on one stretch of rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/kernel.hpp>
#include <local_mha/attention/past.hpp>
#include <local_mha/attention/pinned.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/strips.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/rows_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/layer/input.hpp>
#include <local_mha/layer/output.hpp>
#include <local_mha/layer/plan.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/ops/activations.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// What LocalMHA computes, step by step as formulas.md counts them, of one stretch of rows after
/// the other: at most layer_stretch blocks. LayerWorker says when each is taken.
///
/// | step | what | method |
/// |---|---|---|
/// | 1 | normalization of the input | prenorm() |
/// | 2 | queries, keys and values | to_qkv() |
/// | 3 | normalization of queries and keys | qk_norm() |
/// | 4 | rotary embedding | rotary() |
/// | 5 | what a query sees | see(), attend() |
/// | 6 | scores | see(), attend() |
/// | 7 | softmax | attend() |
/// | 8 | dropout | drop(), attend() |
/// | 9 | gates | to_v_gate(), gate() |
/// | 10 | the result | to_out() |
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class LayerSteps {
  using Weights = LayerWeights<Scalar, Storage, Arithmetic>;

 public:
  /// What to_qkv() makes.
  enum Part : std::uint8_t { queries, keys, values };

  /// \param seqlen of the longest sequence
  /// \param threads of a device that share a step at most
  LayerSteps(const Weights& weights, const Window& window, Index seqlen, Index threads)
      : weights_(&weights),
        config_(weights.config),
        threads_(threads),
        rotary_steps_(weights.attention.rotary_steps(window, seqlen)),
        input_(weights),
        output_(weights) {
    if (norms_all_heads())
      raw_ = make_block_buffer<Scalar>(2 * layer_stretch<Scalar, Arithmetic> *
                                       (heads() * dim_head() + 1) * count);
    const Index first_keys = (std::min)(window.first_keys(), seqlen);
    if (first_keys > 0 && weights.attention.rotary() != nullptr)
      pinned_rotary_steps_.emplace(*weights.attention.rotary(), window.rotary_shift(),
                                   first_keys + layer_stretch<Scalar, Arithmetic> * count, 0);
    pinned_.make_room(ceil_div(first_keys, count));
    heads_.resize(to_size(heads()));
    dropouts_.reserve(to_size(config().dropout > 0 ? heads() : 0));
  }

  /// The weights of the calls that follow, which are of the same configuration.
  void use(const Weights& weights) { weights_ = &weights; }

  /// Stretches that follow are of a sequence of a batch, each of whole blocks but for its end.
  /// \param saved null, or where is kept what the backward pass needs, from block `first_saved` on
  void take_sequence(const AttentionInputs<Scalar>& inputs, Index sequence,
                     const std::optional<Training>& training, SavedLayer<Scalar>* saved,
                     Index first_saved) {
    one_by_one_ = false;
    saved_ = saved;
    first_saved_ = first_saved;
    drop(sequence, training);
    if (inputs.pins()) inputs.assign_pinned(sequence, pinned_);
    see([&](Index h) {
      AttentionHead<Scalar> head = inputs.head(sequence, h);
      head.pinned = inputs.pins() ? &pinned_ : nullptr;
      head.dropout = dropouts_.empty() ? nullptr : &dropouts_[to_size(h)];
      return head;
    });
  }

  /// They are of a sequence that comes bit by bit, in rows of any number.
  void take_stream() { one_by_one_ = true; }

  /// Step 1: rows come in.
  /// \param x from the first row on
  void prenorm(const AnyDevice& device, const Range& rows, const RowsView<const Scalar>& x) {
    input_.take(*weights_, rows, is_alone(rows), x);
    if (input_.alone()) input_.project_alone(device, workers(device), *weights_);
  }

  /// Step 2: blocks of a head of the rows that came in.
  /// \param to block `b` goes to `to(b)`, `[dim_head][block_rows]`
  template <typename Target>
  void to_qkv(Part part, Index h, const Range& rows, Target&& to) const {
    if (part != values && norms_all_heads()) return;  // to_qk_of_all() has
    const Index group = group_of(part, h);
    input_.to_qkv(*weights_, group, to);
    add_qkv_bias(group, rows, to);
  }

  /// Step 2 of queries and keys that are normalized over all heads, which must all be there before
  /// one can be: to_qkv() leaves them to this. The threads of the device share the heads.
  void to_qk_of_all(const AnyDevice& device, const Range& rows) {
    if (!norms_all_heads() || rows.begin == rows.end) return;
    const Index first_block = rows.begin / count;
    const Index groups = heads() + kv_heads();
    parallel_for(device, (std::min)(workers(device), groups), groups, [&](Index, Index group) {
      const Part part = group < heads() ? queries : keys;
      const auto to = [&](Index block) {
        return raw(part, block - first_block, group - part * heads());
      };
      if (input_.alone()) std::fill_n(to(first_block), dim_head() * count, Scalar(0));
      input_.to_qkv(*weights_, group, to);
      add_qkv_bias(group, rows, to);
    });
    for (const Part part : {queries, keys}) {
      const Range blocks = blocks_of(rows);
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        Scalar* to = inverse(part, block - first_block);
        weights_->norms_of_all[to_size(part)].inverse(raw(part, block - first_block, 0)).store(to);
        if (saved_ != nullptr)
          std::copy_n(to, count, saved_->inverses[first_saved_ + block] + part * count);
      }
    }
  }

  /// Step 3: a head's block of queries or keys, in place.
  void qk_norm(Part part, Index h, const Range& rows, Index block, Scalar* to) {
    const auto saved_part = part == queries ? &SavedLayer<Scalar>::q : &SavedLayer<Scalar>::k;
    if (norms_all_heads()) {
      const Index i = block - rows.begin / count;
      save(saved_part, raw(part, i, h), block, h);
      with_lanes_of<Scalar>(rows, [&]<int Parts>(Index lane) {
        weights_->norms_of_all[to_size(part)].apply(
            h * dim_head(), dim_head(), Lanes<Scalar, Parts>::load(inverse(part, i) + lane),
            raw(part, i, h) + lane, to + lane);
      });
      return;
    }
    save(saved_part, to, block, h);
    const QkNorm<Scalar>& norm = part == queries ? weights_->q_norm : weights_->k_norm;
    if (norm)
      with_lanes_of<Scalar>(rows,
                            [&]<int Parts>(Index lane) { norm.template apply<Parts>(to + lane); });
  }

  /// Step 4, and the scale of the scores: a head's block of queries or keys, in place.
  void rotary(Part part, const Range& rows, Index block, Scalar* to) const {
    with_lanes_of<Scalar>(rows, [&]<int Parts>(Index lane) {
      const auto& attention = weights_->attention;
      if (part == queries)
        attention.template place_queries<Parts>(dim_head(), to + lane, block * count + lane);
      else
        attention.template place_keys<Parts>(dim_head(), to + lane, block * count + lane);
    });
  }

  /// Step 4 of first keys: turns the way from a stretch of queries to them.
  void rotary_to_first_keys(const Range& rows) {
    if (pinned_rotary_steps_ && rows.begin < rows.end)
      pinned_rotary_steps_->move_to(*weights_->attention.rotary(),
                                    heads_.front().window->rotary_shift(),
                                    (rows.end - 1) / pinned_rotary_steps_->group());
  }

  /// Steps 5 and 6: what queries see, and what is added to their scores.
  /// \param head_of `head_of(h)` gives all of a head but the rotary steps
  template <typename HeadOf>
  void see(HeadOf&& head_of) {
    for (Index h = 0; h < heads(); ++h) {
      heads_[to_size(h)] = head_of(h);
      heads_[to_size(h)].steps = rotary_steps_ ? &*rotary_steps_ : nullptr;
      heads_[to_size(h)].pinned_steps = pinned_rotary_steps_ ? &*pinned_rotary_steps_ : nullptr;
    }
  }

  /// Keys that the window shows to any of some queries, of which see() was told.
  Range keys_of(const Range& rows) const {
    return heads_.front().window->keys_of(rows, heads_.front().seqlen);
  }

  /// Step 8: what each head of a sequence drops.
  void drop(Index sequence, const std::optional<Training>& training) {
    dropouts_.clear();
    if (!training || config().dropout <= 0) return;
    for (Index h = 0; h < heads(); ++h)
      dropouts_.emplace_back(config().dropout, training->seed,
                             static_cast<std::uint32_t>(sequence * heads() + h));
  }

  /// Steps 5 to 8: a block of the queries `rows` of a head.
  /// \param of_queries that block of the past
  /// \param window, pinned the keys and values that the head reads
  template <typename Values, typename Keys>
  void attend(AttentionKernel<Scalar, Arithmetic>& kernel, const Scalar* of_queries,
              const KeyStore<Scalar, Values, Keys>& window,
              const KeyStore<Scalar, Values, Keys>& pinned, const Range& rows, Index block,
              Index h) {
    AttentionHead<Scalar>& head = heads_[to_size(h)];
    head.queries = rows;
    Scalar* out = output_.head(block - rows.begin / count, h);
    Scalar* lse = saved_ != nullptr ? saved_->lse[first_saved_ + block] + 2 * h * count : nullptr;
    kernel.attend(head, block * count, of_queries, window, pinned, out, lse);
    save(&SavedLayer<Scalar>::out, out, block, h);
  }

  /// Step 9: the gates of all heads of the rows that came in.
  /// \param aside room for a block of them
  void to_v_gate(Ring<Scalar>& gates, const Range& rows, Scalar* aside) {
    if (!config().gate_values_per_head || rows.begin == rows.end) return;
    const RowsForRing<Scalar> to(gates, rows, aside);
    input_.to_v_gate(*weights_, to);
    const Range blocks = blocks_of(rows);
    for (Index block = blocks.begin; block < blocks.end; ++block) {
      for (Index h = 0; h < heads(); ++h) {
        Scalar* gate = to(block) + h * count;
        const auto bias = Lanes<Scalar>::broadcast(weights_->to_v_gate_bias[h]);
        sigmoid(Lanes<Scalar>::load(gate) + bias).store(gate);
      }
      if (saved_ != nullptr)
        std::copy_n(to(block), heads() * count, saved_->gates[first_saved_ + block]);
    }
    to.put();
  }

  /// Step 9: a block of what the queries `rows` of a head have got, which is complete then.
  void gate(const Ring<Scalar>& gates, const Range& rows, Index block, Index h) {
    const Index i = block - rows.begin / count;
    if (config().gate_values_per_head) {
      Scalar* out = output_.head(i, h);
      with_lanes_of<Scalar>(rows, [&]<int Parts>(Index lane) {
        using L = Lanes<Scalar, Parts>;
        const L gate = L::load(gates[block] + h * count + lane);
        for (Index at = lane; at < dim_head() * count; at += count)
          (gate * L::load(out + at)).store(out + at);
      });
    }
    if (!is_alone(rows)) output_.take_head(i, h);
  }

  /// Step 10: the results of rows whose heads are there.
  /// \param y from the first row on
  void to_out(const AnyDevice& device, const Range& rows, const RowsView<Scalar>& y) {
    output_.give(device, workers(device), *weights_, rows, is_alone(rows), y);
  }

  /// Keeps a head's block for the backward pass.
  void save(BlockArray<Scalar> SavedLayer<Scalar>::* part, const Scalar* from, Index block,
            Index h) {
    if (saved_ == nullptr) return;
    std::copy_n(from, dim_head() * count, (saved_->*part)[first_saved_ + block] + h * head_size());
  }

  const LocalMHAConfig& config() const { return config_; }
  Index heads() const { return config().heads; }
  Index kv_heads() const { return resolved_kv_heads(config()); }
  /// Heads that read the same keys and values.
  Index members() const { return heads() / kv_heads(); }
  Index dim_head() const { return config().dim_head; }
  Index head_size() const { return padded_channels<Scalar>(dim_head()) * count; }
  /// Threads of a device that share a step.
  Index workers(const AnyDevice& device) const {
    return (std::min)(thread_count(device), threads_);
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  static std::size_t to_size(Index i) { return static_cast<std::size_t>(i); }
  static Range blocks_of(const Range& rows) { return local_mha::blocks_of<Scalar>(rows); }
  // See LayerInput. Not in a batch, whose results must not depend on where it is cut.
  bool is_alone(const Range& rows) const { return one_by_one_ && rows.end - rows.begin == 1; }

  // Of to_qkv's rows.
  Index group_of(Part part, Index h) const {
    return part == queries ? h : heads() + (part - 1) * kv_heads() + h;
  }

  // What is none of `rows` becomes 0, as it is without a bias.
  template <typename Target>
  void add_qkv_bias(Index group, const Range& rows, Target&& to) const {
    if (!config().qkv_bias) return;
    const Scalar* bias = weights_->to_qkv_bias.data() + group * dim_head();
    for_each_block<Scalar>(rows, [&](Index block, LaneRange lanes) {
      add_bias(dim_head(), bias, to(block));
      clear_other_lanes(dim_head(), lanes, to(block));
    });
  }

  bool norms_all_heads() const { return resolved_qk_norm(config()) == QkNormKind::rms_all; }

  // Blocks that are projected, but not yet normalized, and what they are to be multiplied with.
  // \param i block of the stretch
  Scalar* raw(Part part, Index i, Index h) {
    const Index block = heads() * dim_head() + 1;
    return raw_.data() +
           ((part * layer_stretch<Scalar, Arithmetic> + i) * block + h * dim_head()) * count;
  }
  Scalar* inverse(Part part, Index i) { return raw(part, i, heads()); }

  const Weights* weights_;  // of the call
  LocalMHAConfig config_;
  Index threads_;
  std::optional<RotarySteps<Scalar>> rotary_steps_;
  std::optional<RotarySteps<Scalar>> pinned_rotary_steps_;
  PinnedRows<Scalar> pinned_;  // of the sequence
  LayerInput<Scalar, Arithmetic> input_;
  LayerOutput<Scalar, Arithmetic> output_;
  // Of to_qk_of_all(), `[queries, keys][block][channels of all heads, inverse][count]`.
  BlockBuffer<Scalar> raw_;
  std::vector<AttentionHead<Scalar>> heads_;
  std::vector<Dropout<Scalar>> dropouts_;
  bool one_by_one_ = false;
  SavedLayer<Scalar>* saved_ = nullptr;  // null: nothing is kept
  Index first_saved_ = 0;                // the sequence's first block there
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
