// SPDX-License-Identifier: MIT
/// \file
/// The stream of LocalAttention: queries, keys and values that come bit by bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include <local_mha/attention/kernel.hpp>
#include <local_mha/attention/key_room.hpp>
#include <local_mha/attention/local_attention.hpp>
#include <local_mha/attention/past.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/streaming/description.hpp>
#include <local_mha/streaming/sequence_stream.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// The same for queries, keys and values as LocalMHA::Stream for a layer's input: chunks of any
/// size, at every position the result of forward() of the whole sequence, constant memory.
/// \tparam Storage what keys, normalized and turned, and values are rounded to when they come:
///         forward() does not round them, but for what it multiplies
template <typename Scalar, typename Score, typename Arithmetic>
template <typename Storage>
class LocalAttention<Scalar, Score, Arithmetic>::StreamOf
    : public SequenceStream<Scalar, detail::StreamedSequence<Scalar, Storage>> {
  static_assert(can_multiply<Scalar, Storage, Arithmetic>,
                "what is multiplied as Eigen::bfloat16 is kept so");
  using Sequence = detail::StreamedSequence<Scalar, Storage>;
  using Base = SequenceStream<Scalar, Sequence>;

 public:
  /// Begins sequences, and allocates all memory.
  /// \param attention copied
  /// \param heads, dim_head of the queries, keys and values
  /// \param call as for forward(), for all pushes: biases, sinks, the window and the first
  ///        position; tensors are copied
  /// \param kv_heads of the keys and values, if there are fewer
  /// \throws std::invalid_argument naming the argument that does not fit
  StreamOf(const LocalAttention& attention, Index heads, Index dim_head,
           const StreamConfig& config = {}, const Call& call = {},
           std::optional<Index> kv_heads = {})
      : Base(config, describe(attention, heads, dim_head, call, kv_heads.value_or(heads))),
        attention_(attention.template keys_as<Storage>()),
        heads_(heads),
        kv_heads_(kv_heads.value_or(heads)),
        dim_head_(dim_head),
        window_(attention.window(call)) {
    const Window& window = window_;
    detail::AttentionInputs<Scalar> inputs(window, config.batch, heads,
                                           attention.bias_of(window, heads, call));
    attention_.add_options(inputs, kv_heads_, call);
    bias_ = inputs.copy_of_bias();
    if (call.sinks)
      sinks_.emplace(Eigen::TensorMap<const Tensor<Scalar, 1>>(call.sinks->data(), heads));
    this->sequences_.assign(
        static_cast<std::size_t>(config.batch),
        Sequence(window, {.heads = heads, .dim_head = dim_head, .kv_heads = kv_heads_}, stretch,
                 config.max_rollback));
    constexpr Index endless = (std::numeric_limits<Index>::max)();
    steps_ = attention_.rotary_steps(window, endless);
    const Index range =
        window.reach_behind() + window.reach_ahead() + window.first_keys() + 4 * count;
    const Index block = padded_channels<Scalar>(dim_head) * count;
    workers_.assign(static_cast<std::size_t>((std::min)(config.batch, config.max_threads)),
                    {AttentionKernel<Scalar, Arithmetic>(dim_head, range),
                     make_block_buffer<Scalar>(block),
                     std::is_same_v<Scalar, Storage>
                         ? detail::KeyRoom<Scalar, Arithmetic>()
                         : detail::KeyRoom<Scalar, Arithmetic>(window, dim_head, stretch),
                     {}});
    if (window.first_keys() == 0 || attention_.rotary() == nullptr) return;
    for (Worker& worker : workers_)
      worker.pinned_steps.emplace(*attention_.rotary(), window.rotary_shift(), window.first_keys(),
                                  0);
  }
  StreamOf(const StreamOf&) = default;
  StreamOf(StreamOf&&) = default;
  StreamOf& operator=(const StreamOf& other) { return *this = StreamOf(other); }
  StreamOf& operator=(StreamOf&&) = default;
  ~StreamOf() = default;

  /// Takes the next `n >= 0` positions of every sequence.
  /// \param q, k, v `[B, H, n, D]`; with shared_qk, `k` is the same as `q`
  /// \return the results that are complete, `[B, H, results_of(n), D]`: those of the positions from
  ///         answered() on. 0 in rows beyond a sequence's own
  /// \throws std::invalid_argument naming the argument that does not fit, before anything changes
  Tensor<Scalar, 4> push(View q, View k, View v, const PushCall& call = {}) {
    check_arguments(q, k, v, call.mask);
    Tensor<Scalar, 4> out(this->batch(), heads_, this->results_of(q.dimension(2)), dim_head_);
    out.setZero();
    push_into(out, q, k, v, call);
    return out;
  }
  /// The same into given memory.
  /// \param out `[B, H, results_of(n), D]`, must not overlap the inputs. Rows beyond a sequence's
  ///        own stay
  void push_into(TensorView<Scalar, 4> out, View q, View k, View v, const PushCall& call = {});

  /// Ends every sequence: nothing follows, and the positions that wait get their results. Until
  /// reset() or rollback(), a sequence takes no more.
  /// \return `[B, H, results_of_flush(), D]`, as push() does
  Tensor<Scalar, 4> flush(const AnyDevice& device = {}) {
    Tensor<Scalar, 4> out(this->batch(), heads_, this->results_of_flush(), dim_head_);
    out.setZero();
    flush_into(out, device);
    return out;
  }
  /// The same into given memory, `[B, H, results_of_flush(), D]`.
  void flush_into(TensorView<Scalar, 4> out, const AnyDevice& device = {});

 private:
  static constexpr Index count = block_rows<Scalar>;
  // Blocks that come in at once.
  static constexpr Index stretch = 8;

  struct Worker {
    AttentionKernel<Scalar, Arithmetic> kernel;
    BlockBuffer<Scalar> block;
    detail::KeyRoom<Scalar, Arithmetic> keys;
    // To the first keys, from where the queries are.
    std::optional<RotarySteps<Scalar>> pinned_steps;

    detail::RowsForRing<Scalar> rows_for(Ring<Scalar>& ring, const Range& rows) {
      return {ring, rows, block.data()};
    }
    template <typename Stored>
    detail::RoundedRowsForRing<Scalar, Stored> rows_for(Ring<Scalar, Stored>& ring,
                                                        const Range& rows) {
      return keys.rows_for(ring, rows);
    }
  };

  // The first row of the first head, and how many rows a head has.
  struct Inputs {
    const Scalar* q = nullptr;
    const Scalar* k = nullptr;
    const Scalar* v = nullptr;
    Index rows = 0;
  };

  static std::string describe(const LocalAttention& attention, Index heads, Index dim_head,
                              const Call& call, Index kv_heads) {
    detail::require_at_least("heads", heads, 1);
    detail::require_dim_head("dim_head", dim_head);
    if (attention.config().dim && dim_head != *attention.config().dim)
      reject("dim_head", std::to_string(*attention.config().dim) + ", the configuration's dim",
             dim_head);
    if (call.mask) reject("mask", "none, because push() takes one", "one");
    if (thread_count(call.device) > 1)
      reject("device", "none, because push() takes one", "one of ", thread_count(call.device),
             " threads");
    if (call.training) reject("training", "none, because a stream does not train", "one");
    if (!call.cu_seqlens.empty())
      reject("cu_seqlens", "none, because a stream takes whole sequences", "some");
    if (!call.lengths.empty()) reject("lengths", "none, because a stream ends at flush()", "some");
    if (call.global_rows)
      reject("global_rows", "none, because queries see them before they come", "some");
    std::ostringstream text = detail::plain_text();
    text << "LocalAttention, heads " << heads << ", dim_head " << dim_head << ", "
         << detail::description_of(attention, attention.window(call), call.attn_bias);
    if (kv_heads != heads) text << ", kv_heads " << kv_heads;
    if (call.relative_bias)
      text << ", relative_bias " << to_string(call.relative_bias->dimensions());
    if (call.sinks) text << ", sinks";
    text << detail::description_of_products<Scalar, Arithmetic>();
    return text.str();
  }

  void check_arguments(const View& q, const View& k, const View& v, const PaddingMask& mask) const {
    require_shape("q", q.dimensions(), {this->batch(), heads_, -1, dim_head_});
    require_shape("k", k.dimensions(), {this->batch(), kv_heads_, q.dimension(2), dim_head_});
    require_shape("v", v.dimensions(), k.dimensions());
    this->check_push(q.dimension(2), mask);
  }
  void check_room(const TensorView<Scalar, 4>& out, Index rows) const {
    require_shape("out", out.dimensions(), {this->batch(), heads_, rows, dim_head_});
  }

  template <typename Task>
  void run(const AnyDevice& device, Task&& task) {
    const Index workers = (std::min)(thread_count(device), static_cast<Index>(workers_.size()));
    parallel_for(device, workers, this->batch(), [&](Index worker, Index b) {
      task(workers_[static_cast<std::size_t>(worker)], b);
    });
  }

  // Takes rows in and answers rows, a stretch at a time.
  template <typename Complete>
  void move(Worker& worker, Sequence& sequence, const Range& in, const Range& out,
            const Inputs& inputs, const std::uint8_t* masked, const TensorView<Scalar, 4>& result,
            Index b, Complete&& complete) const {
    detail::AttentionInputs<Scalar> shown(window_, this->batch(), heads_,
                                          bias_ ? Bias(*bias_) : Bias());
    shown.share_keys(kv_heads_);
    if (sinks_) shown.add_sinks(TensorView<const Scalar, 1>(*sinks_));
    shown.set_score(attention_.score());
    StoredPast<Scalar, Storage>& past = sequence.past();
    flow_through<Scalar>(in, out, stretch, complete, [&](const Range& made, const Range& answered) {
      sequence.take(made, masked == nullptr ? nullptr : masked + (made.begin - in.begin));
      const auto first = [&](const Scalar* x, Index h) {
        return x + (h * inputs.rows + made.begin - in.begin) * dim_head_;
      };
      for (Index h = 0; h < kv_heads_; ++h) {
        take(worker, past.keys(h), made, first(inputs.k, h), &LocalAttention::place_keys);
        take(worker, past.values(h), made, first(inputs.v, h), nullptr);
        for_each_block<Scalar>(made,
                               [&](Index block, LaneRange) { past.values(h).note_finite(block); });
        past.pin(h, made);
      }
      for (Index h = 0; h < heads_; ++h)
        take(worker, past.queries(h), made, first(inputs.q, h), &LocalAttention::place_queries);
      if (answered.begin == answered.end) return;
      const Range keys = window_.keys_of(answered, sequence.position());
      for (Index kv_head = 0; kv_head < kv_heads_; ++kv_head)
        detail::show_keys(
            worker.keys, past, kv_head, answered, keys,
            [&](const auto& window, const auto& pinned) {
              for (Index h = kv_head * shown.group(); h < (kv_head + 1) * shown.group(); ++h) {
                AttentionHead<Scalar> head = shown.head(b, h);
                sequence.show(answered, head);
                head.steps = steps_ ? &*steps_ : nullptr;
                head.shared_qk = attention_.config().shared_qk;
                head.pinned_steps = worker.pinned_steps ? &*worker.pinned_steps : nullptr;
                Scalar* to = result.data() + (((b * heads_ + h) * result.dimension(2)) +
                                              answered.begin - out.begin) *
                                                 dim_head_;
                attend(worker, past.queries(h), window, pinned, head, answered, to);
              }
            });
    });
  }

  // What turns and scales a block of queries or keys.
  using Place = void (LocalAttention::*)(Index channels, Scalar* block, Index first_row) const;

  // Takes rows into a ring, as `place` puts them there, unless it is null.
  template <typename SomeRing>
  void take(Worker& worker, SomeRing& ring, const Range& rows, const Scalar* from,
            Place place) const {
    if (rows.begin == rows.end) return;
    const auto to = worker.rows_for(ring, rows);
    for_each_block<Scalar>(rows, [&](Index block, LaneRange lanes) {
      load_lanes(dim_head_, lanes, StridedRows{from, dim_head_, block * count - rows.begin},
                 to(block));
      if (place != nullptr) (attention_.*place)(dim_head_, to(block), block * count);
      // Keys and values that are kept as they are multiplied.
      if constexpr (!std::is_same_v<SomeRing, Ring<Scalar>>)
        detail::round_to_operands<Arithmetic>(dim_head_ * count, to(block));
    });
    to.put();
  }

  // Answers queries. \param to the first one's row
  template <typename Store>
  void attend(Worker& worker, const Ring<Scalar>& of_head, const Store& window, const Store& pinned,
              const AttentionHead<Scalar>& head, const Range& queries, Scalar* to) const {
    for_each_block<Scalar>(queries, [&](Index block, LaneRange lanes) {
      if (head.pinned_steps != nullptr)
        worker.pinned_steps->move_to(*attention_.rotary(), window_.rotary_shift(),
                                     block * count / head.pinned_steps->group());
      worker.kernel.attend(head, block * count, of_head[block], window, pinned,
                           worker.block.data());
      store_lanes(dim_head_, lanes, worker.block.data(),
                  StridedRows{to, dim_head_, block * count - queries.begin});
    });
  }

  LocalAttention attention_;
  Index heads_;
  Index kv_heads_;
  Index dim_head_;
  Window window_;
  std::optional<Tensor<Scalar, 3>> bias_;
  std::optional<Tensor<Scalar, 1>> sinks_;
  std::optional<RotarySteps<Scalar>> steps_;
  std::vector<Worker> workers_;
};

template <typename Scalar, typename Score, typename Arithmetic>
template <typename Storage>
void LocalAttention<Scalar, Score, Arithmetic>::StreamOf<Storage>::push_into(
    TensorView<Scalar, 4> out, View q, View k, View v, const PushCall& call) {
  check_arguments(q, k, v, call.mask);
  const Index n = q.dimension(2);
  check_room(out, this->results_of(n));
  detail::require_apart("out", out, "q", q);
  detail::require_apart("out", out, "k", k);
  detail::require_apart("out", out, "v", v);
  run(call.device, [&](Worker& worker, Index b) {
    Sequence& sequence = this->sequences_[static_cast<std::size_t>(b)];
    const Range in{sequence.position(), sequence.position() + n};
    const Index head = b * heads_ * n * dim_head_;
    const Index kv_head = b * kv_heads_ * n * dim_head_;
    move(worker, sequence, in, {sequence.answered(), sequence.complete(in.end)},
         {q.data() + head, k.data() + kv_head, v.data() + kv_head, n}, call.mask.row(b), out, b,
         [&](Index rows) { return sequence.complete(rows); });
  });
}

template <typename Scalar, typename Score, typename Arithmetic>
template <typename Storage>
void LocalAttention<Scalar, Score, Arithmetic>::StreamOf<Storage>::flush_into(
    TensorView<Scalar, 4> out, const AnyDevice& device) {
  check_room(out, this->results_of_flush());
  run(device, [&](Worker& worker, Index b) {
    Sequence& sequence = this->sequences_[static_cast<std::size_t>(b)];
    const Index end = sequence.position();
    move(worker, sequence, {end, end}, {sequence.answered(), end}, {}, nullptr, out, b,
         [](Index rows) { return rows; });
    sequence.end();
  });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
