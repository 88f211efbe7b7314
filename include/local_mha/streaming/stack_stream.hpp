// SPDX-License-Identifier: MIT
/// \file
/// What the streams of Encoder and LocalTransformer have in common: how rows that come in pass the
/// layers, each of which gives those whose look-around is complete to the next one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/encoder_config.hpp>
#include <local_mha/stack/layer_access.hpp>
#include <local_mha/stack/layer_stack.hpp>
#include <local_mha/streaming/description.hpp>
#include <local_mha/streaming/sequence_stream.hpp>
#include <local_mha/streaming/streamed_stack.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class StackStream : public SequenceStream<Scalar, StreamedStack<Scalar, Storage>> {
  using Base = SequenceStream<Scalar, StreamedStack<Scalar, Storage>>;
  using Access = LayerAccess<Scalar, Storage, Arithmetic>;

 protected:
  using Stack = LayerStack<Scalar, Storage, Arithmetic>;
  using Sequence = StreamedStack<Scalar, Storage>;

  static constexpr Index count = block_rows<Scalar>;
  // Rows that pass the layers together.
  static constexpr Index at_once = Access::stretch * count;

  // Buffers for one sequence at a time. A row of streams is `[S][dim]` and, of several, their `[S]`
  // factors of the branch that they wait for.
  struct Worker {
    Worker(const Stack& stack, Index most_rows)
        : rows(make_block_buffer<Scalar>(most_rows * stack.dim())),
          branch(rows),
          masked(static_cast<std::size_t>(most_rows), 0) {
      if (stack.streams() > 1) {
        streams = make_block_buffer<Scalar>(most_rows * width(stack));
        block = make_block_buffer<Scalar>(width(stack) * count);
        of_branch = make_block_buffer<Scalar>(stack.dim() * count);
        connection = make_block_buffer<Scalar>(stack.room() * count);
      }
      if (stack.layers().empty()) return;
      for (const auto& layer : stack.layers())
        if (static_cast<std::size_t>(layer.kind) == flows.size())
          flows.push_back(Access::make_flow(layer.attention));
      feed_forward = typename FeedForward<Scalar, Storage, Arithmetic>::Workspace(
          stack.layers().front().feed_forward);
    }

    BlockBuffer<Scalar> rows;    // that come in and go out, and the inputs of branches
    BlockBuffer<Scalar> branch;  // what a branch gives
    std::vector<std::uint8_t> masked;
    std::vector<typename Access::Flow> flows;  // of each kind of attention
    typename FeedForward<Scalar, Storage, Arithmetic>::Workspace feed_forward;
    // Of several residual streams.
    BlockBuffer<Scalar> streams;
    BlockBuffer<Scalar> block;
    BlockBuffer<Scalar> of_branch;
    BlockBuffer<Scalar> connection;
  };

  // What a state says of the layers.
  static std::string describe(const EncoderConfig& config, const Stack& stack) {
    std::ostringstream text = plain_text();
    text << "depth " << config.depth << ", ff_mult " << config.ff_mult << ", num_residual_streams "
         << config.num_residual_streams;
    for (Index i = 0; i < config.depth; ++i) {
      const LocalMHAConfig& layer = layer_config(config, i);
      const auto attention =
          LocalAttention<Scalar>(attention_config(layer)).template keys_as<Storage>();
      text << "; " << description_of(layer)
           << description_of(attention, Window(attention.config()), stack.attn_bias());
    }
    text << description_of_products<Scalar, Arithmetic>();
    return text.str();
  }

  StackStream(const StreamConfig& config, std::string description, const Stack& stack)
      : Base(config, std::move(description)) {
    std::vector<typename Sequence::Layer> layers;
    // What this layer and those before it make sequences wait for, and by how many rows more than
    // come in they may move on.
    Index ahead = 0;
    Index jumps = 0;
    for (const auto& layer : stack.layers()) {
      const LocalMHAConfig& attention = layer.attention.config();
      const Window window(attention_config(attention));
      // At its end, a sequence is further on in this layer than it would be else.
      const Index rollback = config.max_rollback + ahead;
      ahead += window.reach_ahead();
      const Index rows = (std::max)(at_once + jumps, ahead) + 1;
      layers.push_back(
          {StreamedSequence<Scalar, Storage>(window,
                                             {.heads = attention.heads,
                                              .dim_head = attention.dim_head,
                                              .gated = attention.gate_values_per_head,
                                              .kv_heads = resolved_kv_heads(attention)},
                                             Access::stretch, rollback),
           WaitingRows<Scalar>(width(stack), window.reach_ahead() + rollback + rows,
                               window.reach_ahead() > 0)});
      jumps += jump(window);
    }
    this->sequences_.assign(static_cast<std::size_t>(config.batch), Sequence(std::move(layers)));
    workers_.assign(static_cast<std::size_t>((std::min)(config.batch, config.max_threads)),
                    Worker(stack, (std::max)(at_once + jumps, ahead) + 1));
  }
  StackStream(const StackStream&) = default;
  StackStream(StackStream&&) = default;
  StackStream& operator=(const StackStream&) = default;
  StackStream& operator=(StackStream&&) = default;
  ~StackStream() = default;

  // `task(worker, sequence, b)` for each sequence.
  template <typename Task>
  void run(const AnyDevice& device, Task&& task) {
    const Index workers = (std::min)(thread_count(device), static_cast<Index>(workers_.size()));
    parallel_for(device, workers, this->batch(), [&](Index worker, Index b) {
      task(workers_[static_cast<std::size_t>(worker)],
           this->sequences_[static_cast<std::size_t>(b)], b);
    });
  }

  // The next `n` rows of a sequence.
  // \param masked a flag for each; null: none is masked
  // \param fill `fill(i, some, rows)` makes rows `[i, i + some)` of them
  // \param take `take(rows, m)` takes the next `m` results
  template <typename Fill, typename Take>
  void advance(const Stack& stack, Worker& worker, Sequence& sequence, Index n,
               const std::uint8_t* masked, Fill&& fill, Take&& take) const {
    for (Index i = 0; i < n;) {
      // Up to the end of a block, so that the next stretch is of whole ones.
      const Index until = (sequence.position() + at_once) / count * count;
      const Index some = (std::min)(n - i, until - sequence.position());
      fill(i, some, worker.rows.data());
      if (masked != nullptr)
        std::copy(masked + i, masked + i + some, worker.masked.begin());
      else
        std::fill_n(worker.masked.begin(), some, std::uint8_t{0});
      const Index m = pass(stack, worker, sequence, some, false);
      take(worker.rows.data(), m);
      i += some;
    }
  }

  // Ends a sequence.
  template <typename Take>
  void finish(const Stack& stack, Worker& worker, Sequence& sequence, Take&& take) const {
    if (sequence.ended()) return;
    const Index m = pass(stack, worker, sequence, 0, true);
    take(worker.rows.data(), m);
    sequence.end();
  }

  std::vector<Worker> workers_;

 private:
  // Rows by which more may become complete at once than come in.
  static Index jump(const Window& window) {
    if (window.first_keys() > 0) return window.reach_ahead();
    const bool in_windows = window.complete(window.size() + window.ahead()) !=
                            window.complete(window.size() + window.ahead() - 1) + 1;
    return in_windows ? window.size() - 1 : 0;
  }

  // Numbers of a row of streams.
  static Index width(const Stack& stack) {
    return stack.streams() == 1 ? stack.dim() : stack.streams() * (stack.dim() + 1);
  }
  // Those rows; a single stream is what the branches take.
  static Scalar* streams(Worker& worker) {
    return worker.streams.empty() ? worker.rows.data() : worker.streams.data();
  }

  // `apply(block, in)` for each block of `n` rows of several streams: `[S·(dim + 1)][count]` of the
  // streams, and `[dim][count]` of `rows`. Both go back where they come from.
  template <typename Apply>
  static void for_each_block_of(const Stack& stack, Worker& worker, Index n, Scalar* rows,
                                Apply&& apply) {
    const Index dim = stack.dim();
    const Index all = width(stack);
    for (Index first = 0; first < n; first += count) {
      const Index some = (std::min)(count, n - first);
      load_block(all, some, StridedRows{worker.streams.data(), all, first}, worker.block.data());
      load_block(dim, some, StridedRows{rows, dim, first}, worker.of_branch.data());
      apply(worker.block.data(), worker.of_branch.data());
      store_block(all, some, worker.block.data(), StridedRows{worker.streams.data(), all, first});
      store_block(dim, some, worker.of_branch.data(), StridedRows{rows, dim, first});
    }
  }

  // What a branch takes of `n` rows of streams, in worker.rows.
  static void mix(const Stack& stack, const typename Stack::Connection& connection, Worker& worker,
                  Index n) {
    if (!connection) return;
    for_each_block_of(stack, worker, n, worker.rows.data(), [&](Scalar* r, Scalar* in) {
      stack.mix(connection, r, in, r + stack.streams() * stack.dim() * count,
                worker.connection.data());
    });
  }
  // Adds what the branch gave.
  static void add(const Stack& stack, const typename Stack::Connection& connection, Worker& worker,
                  Index n) {
    if (!connection) {
      for (Index i = 0; i < n * stack.dim(); ++i)
        worker.rows[static_cast<std::size_t>(i)] += worker.branch[static_cast<std::size_t>(i)];
      return;
    }
    for_each_block_of(stack, worker, n, worker.branch.data(), [&](Scalar* r, Scalar* y) {
      stack.add(connection, y, r + stack.streams() * stack.dim() * count, r);
    });
  }

  // Takes `n` rows in worker.rows through all layers. Returns how many came out, there.
  static Index pass(const Stack& stack, Worker& worker, Sequence& sequence, Index n, bool ends);
};

template <typename Scalar, typename Storage, typename Arithmetic>
Index StackStream<Scalar, Storage, Arithmetic>::pass(const Stack& stack, Worker& worker,
                                                     Sequence& sequence, Index n, bool ends) {
  sequence.take(n);
  const Index all = width(stack);
  if (stack.streams() > 1)
    for_each_block_of(stack, worker, n, worker.rows.data(),
                      [&](Scalar* r, Scalar* x) { stack.expand(x, r); });
  auto* state = sequence.layers().data();
  for (const auto& layer : stack.layers()) {
    StreamedSequence<Scalar, Storage>& attention = state->attention;
    WaitingRows<Scalar>& waiting = state->residual;
    ++state;
    const Range in{attention.position(), attention.position() + n};
    const Range out{attention.answered(), ends ? in.end : attention.complete(in.end)};
    mix(stack, layer.attention_connection, worker, n);
    for (Index i = 0; waiting.wait() && i < n; ++i)
      waiting.put(in.begin + i, streams(worker) + i * all,
                  worker.masked[static_cast<std::size_t>(i)]);
    Access::stream_rows(layer.attention, worker.flows[static_cast<std::size_t>(layer.kind)],
                        attention, Access::shown_to(layer.attention, stack.attn_bias()), in, out,
                        {worker.rows.data(), stack.dim()}, worker.masked.data(),
                        {worker.branch.data(), stack.dim()}, [&](Index rows) {
                          return ends && rows == in.end ? in.end : attention.complete(rows);
                        });
    if (ends) attention.end();
    n = out.end - out.begin;
    for (Index i = 0; waiting.wait() && i < n; ++i) {
      std::copy_n(waiting.row(out.begin + i), all, streams(worker) + i * all);
      worker.masked[static_cast<std::size_t>(i)] = waiting.masked(out.begin + i);
    }
    add(stack, layer.attention_connection, worker, n);
    mix(stack, layer.feed_forward_connection, worker, n);
    layer.feed_forward.forward_into(n, worker.rows.data(), stack.dim(), worker.branch.data(),
                                    worker.feed_forward);
    add(stack, layer.feed_forward_connection, worker, n);
  }
  if (stack.streams() > 1)
    for_each_block_of(stack, worker, n, worker.rows.data(),
                      [&](Scalar* r, Scalar* x) { stack.reduce(r, x); });
  return n;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
