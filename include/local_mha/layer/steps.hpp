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
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/layer/input.hpp>
#include <local_mha/layer/output.hpp>
#include <local_mha/layer/plan.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/ops/activations.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// What LocalMHA computes, and a worker's memory for it. A stretch of rows comes in, which makes
/// its queries, keys, values and gates: steps 1 to 4 and the first half of 9. When all keys that a
/// stretch of queries sees have come, it is answered: steps 5 to 10.
///
/// | step | what | method |
/// |---|---|---|
/// | 1 | normalization of the input | prenorm() |
/// | 2 | queries, keys and values | to_qkv(), to_qk_of_all() |
/// | 3 | normalization of queries and keys | qk_norm() |
/// | 4 | rotary embedding, scale | rotary() |
/// | 5 | what a query sees | see() |
/// | 6 | scores | see(), attend() |
/// | 7 | softmax | attend() |
/// | 8 | dropout | drop(), attend() |
/// | 9 | gates | to_v_gate(), gate() |
/// | 10 | the result | to_out() |
template <typename Scalar>
class LayerSteps {
 public:
  /// \param seqlen of the longest sequence
  /// \param threads that make_and_answer() uses at most
  LOCAL_MHA_NOINLINE LayerSteps(const LayerWeights<Scalar>& weights, const Window& window,
                                Index seqlen, Index threads = 1)
      : weights_(&weights),
        config_(weights.config),
        made_for_(seqlen),
        threads_(threads),
        steps_(weights.attention.rotary_steps(window, seqlen)),
        input_(weights),
        output_(weights) {
    if (norms_all_heads())
      raw_ =
          make_block_buffer<Scalar>(2 * layer_stretch<Scalar> * (heads() * dim_head() + 1) * count);
    const Index reach = window.reach(seqlen);
    const Index first_keys = (std::min)(window.first_keys(), seqlen);
    if (first_keys > 0 && weights.attention.rotary() != nullptr)
      pinned_steps_.emplace(*weights.attention.rotary(), window.rotary_shift(),
                            first_keys + layer_stretch<Scalar> * count, 0);
    pinned_.make_room(ceil_div(first_keys, count));
    // Beside the window's keys, pinned ones in whole blocks.
    const Index range =
        first_keys > 0 ? reach + first_keys + 4 * count : (std::min)(reach + count, seqlen);
    const Index most_channels = padded_channels<Scalar>((std::max)(heads(), dim_head()));
    rooms_.assign(to_size((std::min)(threads, heads())),
                  {AttentionKernel<Scalar>(dim_head(), range),
                   make_block_buffer<Scalar>(most_channels * count)});
    heads_.resize(to_size(heads()));
    dropouts_.reserve(to_size(config().dropout > 0 ? heads() : 0));
  }

  bool fits(const LayerWeights<Scalar>& weights, const Window& window, Index seqlen) const {
    return config_ == weights.config && window.room_serves(made_for_, seqlen, count);
  }
  /// What this fits: the weights of the calls that follow.
  void use(const LayerWeights<Scalar>& weights) { weights_ = &weights; }

  /// make() and answer() are of a sequence of a batch.
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

  /// Makes what the rows give. Stretches are layer_stretch blocks at most.
  /// \param x the first row
  void make(Past<Scalar>& past, const Range& rows, const Scalar* x) {
    const Eigen::DefaultDevice here;
    prenorm(here, rows, x);
    to_v_gate(past, rows);
    to_qk_of_all(here, rows);
    for (Index kv_head = 0; kv_head < kv_heads(); ++kv_head)
      make_heads(rooms_.front(), past, rows, kv_head);
  }

  /// Answers the queries of rows.
  /// \param y the first row
  void answer(Past<Scalar>& past, const Range& rows, Scalar* y) {
    move_pinned_steps(rows);
    for (Index h = 0; h < heads(); ++h) answer_head(rooms_.front(), past, rows, h);
    to_out(Eigen::DefaultDevice(), rows, y);
  }

  /// Both, of a sequence that comes bit by bit; `see` comes before. The threads of the device share
  /// the heads.
  template <typename Device>
  void make_and_answer(const Device& device, Past<Scalar>& past, const Range& made, const Scalar* x,
                       const Range& answered, Scalar* y);

  /// Steps 5 and 6: what queries see, and what is added to their scores. Step 4 for their keys.
  /// \param head_of `head_of(h)` gives all of a head but the rotary steps
  template <typename HeadOf>
  void see(HeadOf&& head_of) {
    for (Index h = 0; h < heads(); ++h) {
      heads_[to_size(h)] = head_of(h);
      heads_[to_size(h)].steps = steps_ ? &*steps_ : nullptr;
      heads_[to_size(h)].pinned_steps = pinned_steps_ ? &*pinned_steps_ : nullptr;
    }
  }

  /// Steps 1 to 3 of an item of a batch: its queries and keys.
  /// \param x its first row
  void queries_and_keys(const Scalar* x, Index b, Tensor<Scalar, 4>& q, Tensor<Scalar, 4>& k) {
    auto room = make_block_buffer<Scalar>(head_size());
    const Index seqlen = q.dimension(2);
    for (Index first = 0; first < seqlen; first += count) {
      const Range rows{first, (std::min)(first + count, seqlen)};
      prenorm(Eigen::DefaultDevice(), rows, x + first * dim());
      to_qk_of_all(Eigen::DefaultDevice(), rows);
      const auto make = [&](Part part, Index h, Tensor<Scalar, 4>& to) {
        to_qkv(part, h, rows, [&](Index) { return room.data(); });
        qk_norm(part, h, rows, first / count, room.data());
        store_block(dim_head(), rows.end - first, room.data(),
                    StridedRows{&to(b, h, first, 0), dim_head()});
      };
      for (Index h = 0; h < heads(); ++h) make(queries, h, q);
      for (Index h = 0; h < kv_heads(); ++h) make(keys, h, k);
    }
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  // What to_qkv makes.
  enum Part : Index { queries, keys, values };

  // What a thread needs to compute a head.
  struct Room {
    AttentionKernel<Scalar> kernel;
    BlockBuffer<Scalar> aside;  // a block on its way into a ring
  };

  const LocalMHAConfig& config() const { return config_; }
  Index dim() const { return config().dim; }
  Index heads() const { return config().heads; }
  Index kv_heads() const { return resolved_kv_heads(config()); }
  // Heads that read the same keys and values.
  Index members() const { return heads() / kv_heads(); }
  // Of to_qkv's rows.
  Index group_of(Part part, Index h) const {
    return part == queries ? h : heads() + (part - 1) * kv_heads() + h;
  }
  Index dim_head() const { return config().dim_head; }
  Index head_size() const { return padded_channels<Scalar>(dim_head()) * count; }
  static std::size_t to_size(Index i) { return static_cast<std::size_t>(i); }
  template <typename Device>
  Index workers(const Device& device) const {
    return (std::min)(thread_count(device), threads_);
  }
  bool is_alone(const Range& rows) const { return one_by_one_ && rows.end - rows.begin == 1; }
  static Range blocks_of(const Range& rows) { return local_mha::blocks_of<Scalar>(rows); }

  // Step 1. The rows of `x` come in.
  template <typename Device>
  void prenorm(const Device& device, const Range& rows, const Scalar* x) {
    input_.take(*weights_, rows, is_alone(rows), x);
    if (input_.alone()) input_.project_alone(device, workers(device), *weights_);
  }

  // Step 2. Blocks of a head, block `b` at `to(b)`.
  template <typename Target>
  void to_qkv(Part part, Index h, const Range& rows, Target&& to) const {
    if (part != values && norms_all_heads()) return;  // to_qk_of_all() has
    const Index group = group_of(part, h);
    input_.to_qkv(*weights_, group, to);
    add_qkv_bias(group, rows, to);
  }

  // What is none of `rows` becomes 0, as it is without a bias.
  template <typename Target>
  void add_qkv_bias(Index group, const Range& rows, Target&& to) const {
    if (!config().qkv_bias) return;
    const Scalar* bias = weights_->parameters.to_qkv_bias.data() + group * dim_head();
    for_each_block<Scalar>(rows, [&](Index block, LaneRange lanes) {
      add_bias(dim_head(), bias, to(block));
      clear_other_lanes(dim_head(), lanes, to(block));
    });
  }

  // Queries and keys are normalized over all heads.
  bool norms_all_heads() const { return resolved_qk_norm(config()) == QkNormKind::rms_all; }

  // Steps 2 and 3 where they are: before queries and keys of all heads are there, none can be
  // normalized. The threads of the device share the heads.
  template <typename Device>
  void to_qk_of_all(const Device& device, const Range& rows) {
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
  // Blocks that are projected, but not yet normalized, and what they are to be multiplied with.
  // \param i block of the stretch
  Scalar* raw(Part part, Index i, Index h) {
    const Index block = heads() * dim_head() + 1;
    return raw_.data() + ((part * layer_stretch<Scalar> + i) * block + h * dim_head()) * count;
  }
  Scalar* inverse(Part part, Index i) { return raw(part, i, heads()); }

  // Step 3. A head's block of queries or keys.
  void qk_norm(Part part, Index h, const Range& rows, Index block, Scalar* to) {
    const auto saved_part = part == queries ? &SavedLayer<Scalar>::q : &SavedLayer<Scalar>::k;
    if (norms_all_heads()) {
      const Index i = block - rows.begin / count;
      save(saved_part, raw(part, i, h), block, h);
      return weights_->norms_of_all[to_size(part)].apply(
          h * dim_head(), dim_head(), Lanes<Scalar>::load(inverse(part, i)), raw(part, i, h), to);
    }
    save(saved_part, to, block, h);
    const QkNorm<Scalar>& norm = part == queries ? weights_->q_norm : weights_->k_norm;
    if (norm) norm.apply(to);
  }

  // Step 4, and the scale of the scores. A head's block of queries or keys.
  void rotary(Part part, Index block, Scalar* to) const {
    if (part == queries)
      weights_->attention.place_queries(dim_head(), to, block * count);
    else
      weights_->attention.place_keys(dim_head(), to, block * count);
  }

  // Queries or keys of a head as the kernel takes them.
  LOCAL_MHA_NOINLINE void make_queries_or_keys(Room& room, Ring<Scalar>& ring, Part part,
                                               const Range& rows, Index h) {
    const RowsForRing<Scalar> to(ring, rows, room.aside.data());
    to_qkv(part, h, rows, to);
    const Range blocks = blocks_of(rows);
    for (Index block = blocks.begin; block < blocks.end; ++block) {
      qk_norm(part, h, rows, block, to(block));
      rotary(part, block, to(block));
    }
    to.put();
  }

  // The heads that read one head of keys and values.
  void make_heads(Room& room, Past<Scalar>& past, const Range& rows, Index kv_head) {
    if (rows.begin == rows.end) return;
    for (Index h = kv_head * members(); h < (kv_head + 1) * members(); ++h)
      make_queries_or_keys(room, past.queries(h), queries, rows, h);
    make_queries_or_keys(room, past.keys(kv_head), keys, rows, kv_head);
    Ring<Scalar>& ring = past.values(kv_head);
    const RowsForRing<Scalar> to(ring, rows, room.aside.data());
    to_qkv(values, kv_head, rows, to);
    const Range blocks = blocks_of(rows);
    for (Index block = blocks.begin; block < blocks.end; ++block)
      save(&SavedLayer<Scalar>::v, to(block), block, kv_head);
    to.put();
    for (Index block = blocks.begin; block < blocks.end; ++block) ring.note_finite(block);
    past.pin(kv_head, rows);
  }

  // Keeps a head's block.
  void save(BlockArray<Scalar> SavedLayer<Scalar>::* part, const Scalar* from, Index block,
            Index h) {
    if (saved_ == nullptr) return;
    std::copy_n(from, dim_head() * count, (saved_->*part)[first_saved_ + block] + h * head_size());
  }

  // Step 4 for first keys: the steps from a stretch of queries to them.
  void move_pinned_steps(const Range& rows) {
    if (pinned_steps_ && rows.begin < rows.end)
      pinned_steps_->move_to(*weights_->attention.rotary(), heads_.front().window->rotary_shift(),
                             (rows.end - 1) / pinned_steps_->group());
  }

  // Step 8. What each head drops.
  void drop(Index sequence, const std::optional<Training>& training) {
    dropouts_.clear();
    if (!training || config().dropout <= 0) return;
    for (Index h = 0; h < heads(); ++h)
      dropouts_.emplace_back(config().dropout, training->seed,
                             static_cast<std::uint32_t>(sequence * heads() + h));
  }

  // Steps 5 to 8. A block of queries of a head.
  void attend(Room& room, Past<Scalar>& past, Index block, Index h, Scalar* out) {
    const Index kv_head = h / members();
    Scalar* lse = saved_ != nullptr ? saved_->lse[first_saved_ + block] + 2 * h * count : nullptr;
    room.kernel.attend(heads_[to_size(h)], block * count, past.queries(h)[block],
                       KeyStore<Scalar, Ring<Scalar>>{&past.keys(kv_head), &past.values(kv_head)},
                       {past.pinned_keys(kv_head), past.pinned_values(kv_head)}, out, lse);
    save(&SavedLayer<Scalar>::out, out, block, h);
  }

  // Step 9, the gates of all heads.
  void to_v_gate(Past<Scalar>& past, const Range& rows) {
    if (!config().gate_values_per_head || rows.begin == rows.end) return;
    const RowsForRing<Scalar> to(past.gates(), rows, rooms_.front().aside.data());
    input_.to_v_gate(*weights_, to);
    const Range blocks = blocks_of(rows);
    for (Index block = blocks.begin; block < blocks.end; ++block) {
      for (Index h = 0; h < heads(); ++h) {
        Scalar* gate = to(block) + h * count;
        const auto bias = Lanes<Scalar>::broadcast(weights_->parameters.to_v_gate_bias[h]);
        sigmoid(Lanes<Scalar>::load(gate) + bias).store(gate);
      }
      if (saved_ != nullptr)
        std::copy_n(to(block), heads() * count, saved_->gates[first_saved_ + block]);
    }
    to.put();
  }
  // Step 9, a head's block of results.
  void gate(Past<Scalar>& past, Index block, Index h, Scalar* out) const {
    if (!config().gate_values_per_head) return;
    const auto gate = Lanes<Scalar>::load(past.gates()[block] + h * count);
    for (Index c = 0; c < dim_head(); ++c)
      (gate * Lanes<Scalar>::load(out + c * count)).store(out + c * count);
  }

  void answer_head(Room& room, Past<Scalar>& past, const Range& rows, Index h) {
    heads_[to_size(h)].queries = rows;
    const Range blocks = blocks_of(rows);
    for (Index block = blocks.begin; block < blocks.end; ++block) {
      Scalar* out = output_.head(block - blocks.begin, h);
      attend(room, past, block, h, out);
      gate(past, block, h, out);
    }
  }

  // Step 10.
  template <typename Device>
  void to_out(const Device& device, const Range& rows, Scalar* y) {
    output_.give(device, workers(device), *weights_, rows, is_alone(rows), y);
  }

  const LayerWeights<Scalar>* weights_;  // of the call
  LocalMHAConfig config_;
  Index made_for_;
  Index threads_;
  std::optional<RotarySteps<Scalar>> steps_;
  std::optional<RotarySteps<Scalar>> pinned_steps_;
  PinnedRows<Scalar> pinned_;  // of the sequence
  LayerInput<Scalar> input_;
  LayerOutput<Scalar> output_;
  std::vector<Room> rooms_;  // of each thread
  // A single row is alone, see LayerInput: not in a batch, whose results must not depend on where
  // it is cut into stretches.
  bool one_by_one_ = false;
  // If queries and keys are normalized over all heads: see to_qk_of_all().
  BlockBuffer<Scalar> raw_;  // [queries, keys][block][channels of all heads, inverse][count]
  std::vector<AttentionHead<Scalar>> heads_;
  std::vector<Dropout<Scalar>> dropouts_;
  SavedLayer<Scalar>* saved_ = nullptr;  // null: nothing is kept
  Index first_saved_ = 0;                // the sequence's first block there
};

template <typename Scalar>
template <typename Device>
void LayerSteps<Scalar>::make_and_answer(const Device& device, Past<Scalar>& past,
                                         const Range& made, const Scalar* x, const Range& answered,
                                         Scalar* y) {
  one_by_one_ = true;
  prenorm(device, made, x);
  to_v_gate(past, made);
  to_qk_of_all(device, made);
  move_pinned_steps(answered);
  parallel_for(device, (std::min)(workers(device), kv_heads()), kv_heads(),
               [&](Index worker, Index kv_head) {
                 Room& room = rooms_[to_size(worker)];
                 make_heads(room, past, made, kv_head);
                 for (Index h = kv_head * members(); h < (kv_head + 1) * members(); ++h)
                   answer_head(room, past, answered, h);
               });
  to_out(device, answered, y);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
