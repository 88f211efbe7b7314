// SPDX-License-Identifier: MIT
/// \file
/// How a stretch of rows passes the steps of LocalMHA.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/inputs.hpp>
#include <local_mha/attention/kernel.hpp>
#include <local_mha/attention/key_room.hpp>
#include <local_mha/attention/operand_ring.hpp>
#include <local_mha/attention/past.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/rows_view.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/layer/plan.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/layer/steps.hpp>
#include <local_mha/layer/weights.hpp>
#include <local_mha/ops/project.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// Takes stretches of rows through LayerSteps. When rows come in, their queries, keys, values and
/// gates are made, and go into the rings of a Past; when all keys are there that a stretch of
/// queries sees, it is answered. What a head needs is made while it is in the cache.
/// \tparam Storage what weights are held as, and keys and values rounded to, see can_store: in a
///         batch they lie there as numbers to compute with, in a stream as what they are rounded
///         to, so that both give the same
/// \tparam Arithmetic what is multiplied as what, see can_multiply: then they lie in a batch as
///         operands
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class LayerWorker {
  using Weights = LayerWeights<Scalar, Storage, Arithmetic>;
  static constexpr bool of_operands = !std::is_same_v<Scalar, Arithmetic>;

 public:
  using Steps = LayerSteps<Scalar, Storage, Arithmetic>;
  /// What is kept of a sequence of a batch.
  using BatchPast = Past<Scalar, BlockKeys<Scalar, Arithmetic>, BlockValues<Scalar, Arithmetic>>;

  /// \param seqlen of the longest sequence
  /// \param threads of a device that share the work at most
  LOCAL_MHA_NOINLINE LayerWorker(const Weights& weights, const Window& window, Index seqlen,
                                 Index threads = 1)
      : config_(weights.config), made_for_(seqlen), steps_(weights, window, seqlen, threads) {
    const Index reach = window.reach(seqlen);
    const Index first_keys = (std::min)(window.first_keys(), seqlen);
    // Beside the window's keys, pinned ones in whole blocks.
    const Index range =
        first_keys > 0 ? reach + first_keys + 4 * count : (std::min)(reach + count, seqlen);
    const Index most_channels =
        padded_channels<Scalar>((std::max)(config_.heads, config_.dim_head));
    rooms_.assign(
        static_cast<std::size_t>((std::min)(threads, config_.heads)),
        {AttentionKernel<Scalar, Arithmetic>(config_.dim_head, range),
         make_block_buffer<Scalar>(most_channels * count),
         of_operands ? Keys(config_.dim_head, layer_stretch<Scalar, Arithmetic>) : Keys()});
  }

  /// One for streams.
  static LayerWorker for_stream(const Weights& weights, const Window& window, Index threads = 1) {
    constexpr Index endless = (std::numeric_limits<Index>::max)();
    LayerWorker worker(weights, window, endless, threads);
    if constexpr (!std::is_same_v<Scalar, Storage>)
      for (Room& room : worker.rooms_)
        room.keys = Keys(window, weights.config.dim_head, layer_stretch<Scalar, Arithmetic>);
    return worker;
  }

  bool fits(const Weights& weights, const Window& window, Index seqlen) const {
    return config_ == weights.config && window.room_serves(made_for_, seqlen, count);
  }
  /// To say whose stretches follow.
  Steps& steps() { return steps_; }

  /// Rows come in.
  /// \param x from the first row on
  void make(BatchPast& past, const Range& rows, const RowsView<const Scalar>& x) {
    make_of_all_heads(AnyDevice(), past.gates(), rows, x);
    for (Index kv_head = 0; kv_head < steps_.kv_heads(); ++kv_head)
      make_heads(rooms_.front(), past, rows, kv_head);
  }

  /// Their queries are answered.
  /// \param y from the first row on
  void answer(BatchPast& past, const Range& rows, const RowsView<Scalar>& y) {
    steps_.rotary_to_first_keys(rows);
    for (Index kv_head = 0; kv_head < steps_.kv_heads(); ++kv_head)
      answer_heads(rooms_.front(), past, rows, kv_head);
    steps_.to_out(AnyDevice(), rows, y);
  }

  /// Rows come in, and queries are answered, of which LayerSteps::see() has been told.
  /// The threads of the device share the heads.
  /// \param past a Past, of a batch or of a stream
  template <typename SomePast>
  void make_and_answer(const AnyDevice& device, SomePast& past, const Range& made,
                       const RowsView<const Scalar>& x, const Range& answered,
                       const RowsView<Scalar>& y);

  /// Takes rows of sequence `b` of a stream in, and answers rows, a stretch at a time.
  /// \param sequence a StreamedSequence
  /// \param inputs what its queries see, but for its place
  /// \param x, y from the first row of `in` and of `out` on
  /// \param masked a flag for each row that comes in; null: none is masked
  /// \param complete see flow_through()
  template <typename Sequence, typename Complete>
  void stream(const AnyDevice& device, Sequence& sequence, const AttentionInputs<Scalar>& inputs,
              Index b, const Range& in, const Range& out, const RowsView<const Scalar>& x,
              const std::uint8_t* masked, const RowsView<Scalar>& y, Complete&& complete) {
    steps_.take_stream();
    flow_through<Scalar>(
        in, out, layer_stretch<Scalar, Arithmetic>, complete,
        [&](const Range& made, const Range& answered) {
          sequence.take(made, masked == nullptr ? nullptr : masked + (made.begin - in.begin));
          steps_.see([&](Index h) {
            AttentionHead<Scalar> head = inputs.head(b, h);
            sequence.show(answered, head);
            return head;
          });
          make_and_answer(device, sequence.past(), made, x.from(made.begin - in.begin), answered,
                          y.from(answered.begin - out.begin));
        });
  }

  /// Keys and values of rows, ready for the kernel, of a sequence that LayerSteps has been told of.
  /// \param x from the first row on
  /// \param take `take(block, kv_head, keys, values)` gets a block of the sequence, `[dim_head]
  ///        [block_rows]`, whose other lanes are anything
  template <typename Take>
  void keys_and_values(const Range& rows, const RowsView<const Scalar>& x, Take&& take) {
    const Index size = padded_channels<Scalar>(steps_.dim_head()) * count;
    auto room = make_block_buffer<Scalar>(2 * layer_stretch<Scalar, Arithmetic> * size);
    for (Range some{rows.begin, rows.begin}; some.end < rows.end; some.begin = some.end) {
      const Index first = some.begin / count;
      some.end = (std::min)((first + layer_stretch<Scalar, Arithmetic>)*count, rows.end);
      steps_.prenorm(AnyDevice(), some, x.from(some.begin - rows.begin));
      steps_.to_qk_of_all(AnyDevice(), some);
      const auto keys = [&](Index block) { return room.data() + 2 * (block - first) * size; };
      const auto values = [&](Index block) { return keys(block) + size; };
      for (Index kv_head = 0; kv_head < steps_.kv_heads(); ++kv_head) {
        steps_.to_qkv(Steps::keys, kv_head, some, keys);
        steps_.to_qkv(Steps::values, kv_head, some, values);
        const Range blocks = blocks_of<Scalar>(some);
        for (Index block = blocks.begin; block < blocks.end; ++block) {
          steps_.qk_norm(Steps::keys, kv_head, some, block, keys(block));
          steps_.rotary(Steps::keys, some, block, keys(block));
          take(block, kv_head, static_cast<const Scalar*>(keys(block)),
               static_cast<const Scalar*>(values(block)));
        }
      }
    }
  }

  /// Queries and keys of an item of a batch before their rotary embedding.
  /// \param x from the first row on
  void queries_and_keys(const RowsView<const Scalar>& x, Index b, Tensor<Scalar, 4>& q,
                        Tensor<Scalar, 4>& k) {
    Scalar* const room = rooms_.front().aside.data();
    const AnyDevice here;
    const Index seqlen = q.dimension(2);
    for (Index first = 0; first < seqlen; first += count) {
      const Range rows{first, (std::min)(first + count, seqlen)};
      steps_.prenorm(here, rows, x.from(first));
      steps_.to_qk_of_all(here, rows);
      const auto make = [&](auto part, Index h, Tensor<Scalar, 4>& to) {
        steps_.to_qkv(part, h, rows, [&](Index) { return room; });
        steps_.qk_norm(part, h, rows, first / count, room);
        store_block(steps_.dim_head(), rows.end - first, room,
                    StridedRows{&to(b, h, first, 0), steps_.dim_head()});
      };
      for (Index h = 0; h < steps_.heads(); ++h) make(Steps::queries, h, q);
      for (Index h = 0; h < steps_.kv_heads(); ++h) make(Steps::keys, h, k);
    }
  }

 private:
  using Part = typename Steps::Part;
  static constexpr Index count = block_rows<Scalar>;

  using Keys = KeyRoom<Scalar, Arithmetic>;

  // What a thread needs to compute a head.
  struct Room {
    AttentionKernel<Scalar, Arithmetic> kernel;
    BlockBuffer<Scalar> aside;  // a block on its way into a ring
    Keys keys;                  // where they are kept in 16 bits

    RowsForRing<Scalar> rows_for(Ring<Scalar>& ring, const Range& rows) {
      return {ring, rows, aside.data()};
    }
    template <typename SomeRing>
    auto rows_for(SomeRing& ring, const Range& rows) {
      return keys.rows_for(ring, rows);
    }
  };

  void make_of_all_heads(const AnyDevice& device, Ring<Scalar>& gates, const Range& rows,
                         const RowsView<const Scalar>& x) {
    steps_.prenorm(device, rows, x);
    steps_.to_v_gate(gates, rows, rooms_.front().aside.data());
    steps_.to_qk_of_all(device, rows);
  }

  // The heads that read one head of keys and values.
  template <typename SomePast>
  void make_heads(Room& room, SomePast& past, const Range& rows, Index kv_head) {
    if (rows.begin == rows.end) return;
    for (Index h = kv_head * steps_.members(); h < (kv_head + 1) * steps_.members(); ++h)
      make_queries_or_keys(room, past.queries(h), Steps::queries, rows, h);
    make_queries_or_keys(room, past.keys(kv_head), Steps::keys, rows, kv_head);
    make_values(room, past.values(kv_head), rows, kv_head);
    past.pin(kv_head, rows);
  }

  template <typename SomeRing>
  LOCAL_MHA_NOINLINE void make_queries_or_keys(Room& room, SomeRing& ring, Part part,
                                               const Range& rows, Index h) {
    const auto to = room.rows_for(ring, rows);
    steps_.to_qkv(part, h, rows, to);
    const Range blocks = blocks_of<Scalar>(rows);
    for (Index block = blocks.begin; block < blocks.end; ++block) {
      steps_.qk_norm(part, h, rows, block, to(block));
      steps_.rotary(part, rows, block, to(block));
      if (part == Steps::keys) round_in(ring, rows, to(block));
    }
    to.put();
  }

  // What goes into a ring that does not round it, or not to an operand.
  template <typename SomeRing>
  void round_in(const SomeRing& /*ring*/, [[maybe_unused]] const Range& rows, Scalar* block) const {
    if constexpr (std::is_same_v<SomeRing, Ring<Scalar>>)
      round_as_stored<Storage>(steps_.dim_head() * count, block);
    else if constexpr (of_operands && std::is_same_v<SomeRing, Ring<Scalar, Storage>>)
      with_lanes_of<Scalar>(rows, [&]<int Parts>(Index lane) {
        for (Index at = lane; at < steps_.dim_head() * count; at += count)
          round_to_operands<Arithmetic, Parts>(Lanes<Scalar, Parts>::count, block + at);
      });
  }

  template <typename SomeRing>
  void make_values(Room& room, SomeRing& ring, const Range& rows, Index kv_head) {
    const auto to = room.rows_for(ring, rows);
    steps_.to_qkv(Steps::values, kv_head, rows, to);
    const Range blocks = blocks_of<Scalar>(rows);
    for (Index block = blocks.begin; block < blocks.end; ++block) {
      round_in(ring, rows, to(block));
      steps_.save(&SavedLayer<Scalar>::v, to(block), block, kv_head);
    }
    to.put();
    // Operands are looked at when they are put.
    if constexpr (!std::is_same_v<SomeRing, ValueOperands<Scalar>>)
      for (Index block = blocks.begin; block < blocks.end; ++block) ring.note_finite(block);
  }

  // The heads that read one head of keys and values.
  template <typename SomePast>
  void answer_heads(Room& room, SomePast& past, const Range& rows, Index kv_head) {
    if (rows.begin == rows.end) return;
    show_keys(room.keys, past, kv_head, rows, steps_.keys_of(rows),
              [&](const auto& window, const auto& pinned) {
                const Range blocks = blocks_of<Scalar>(rows);
                const Index first = kv_head * steps_.members();
                for (Index h = first; h < first + steps_.members(); ++h)
                  for (Index block = blocks.begin; block < blocks.end; ++block) {
                    steps_.attend(room.kernel, past.queries(h)[block], window, pinned, rows, block,
                                  h);
                    steps_.gate(past.gates(), rows, block, h);
                  }
              });
  }

  LocalMHAConfig config_;
  Index made_for_;
  Steps steps_;
  std::vector<Room> rooms_;  // of each thread
};

template <typename Scalar, typename Storage, typename Arithmetic>
template <typename SomePast>
void LayerWorker<Scalar, Storage, Arithmetic>::make_and_answer(const AnyDevice& device,
                                                               SomePast& past, const Range& made,
                                                               const RowsView<const Scalar>& x,
                                                               const Range& answered,
                                                               const RowsView<Scalar>& y) {
  make_of_all_heads(device, past.gates(), made, x);
  steps_.rotary_to_first_keys(answered);
  const Index kv_heads = steps_.kv_heads();
  parallel_for(device, (std::min)(steps_.workers(device), kv_heads), kv_heads,
               [&](Index worker, Index kv_head) {
                 Room& room = rooms_[static_cast<std::size_t>(worker)];
                 make_heads(room, past, made, kv_head);
                 answer_heads(room, past, answered, kv_head);
               });
  steps_.to_out(device, answered, y);
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
