// SPDX-License-Identifier: MIT
/// \file
/// How the rows of a batch pass the layers of Encoder and LocalTransformer:
///
///     depth times:  x ← x + LocalMHA(x);  x ← x + FeedForward(x)
///
/// or, with several residual streams, each of the two inside of a HyperConnection. What is not the
/// attention takes each position on its own: from one attention to the next, some blocks of
/// positions at a time pass all of it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <span>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/mha.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/feed_forward.hpp>
#include <local_mha/ops/weight_gradient.hpp>
#include <local_mha/parameters.hpp>
#include <local_mha/stack/backward_room.hpp>
#include <local_mha/stack/saved_stack.hpp>
#include <local_mha/stack/stack_layers.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class LayerStack : public StackLayers<Scalar, Storage, Arithmetic> {
  using Base = StackLayers<Scalar, Storage, Arithmetic>;
  static constexpr Index count = block_rows<Scalar>;
  // Blocks that pass the feed-forward's weights together.
  static constexpr Index together = FeedForward<Scalar, Storage, Arithmetic>::together;

 public:
  using typename Base::Connection;
  using typename Base::Layer;
  using Saved = SavedStack<Scalar>;
  using Base::add;
  using Base::attn_bias;
  using Base::expand;
  using Base::mix;
  using Base::reduce;

  /// Memory for calls of forward() and backward().
  class Workspace {
    friend LayerStack;

    struct Room {
      explicit Room(const LayerStack& stack)
          : streams(make_block_buffer<Scalar>(stack.streams() == 1 ? together * stack.dim() * count
                                                                   : 0)),
            attended(make_block_buffer<Scalar>(stack.dim() * count)),
            beta(make_block_buffer<Scalar>(together * stack.streams() * count)),
            connection(make_block_buffer<Scalar>(stack.room() * count)),
            feed_forward(stack.layers_.front().feed_forward) {}
      bool fits(const LayerStack& stack) const {
        return feed_forward.fits(stack.layers_.front().feed_forward) &&
               std::ssize(beta) == together * stack.streams() * count &&
               streams.empty() == (stack.streams() > 1);
      }

      BlockBuffer<Scalar> streams;  // of blocks, if it is a single one
      BlockBuffer<Scalar> attended;
      BlockBuffer<Scalar> beta;  // of the feed-forward's connection
      BlockBuffer<Scalar> connection;
      typename FeedForward<Scalar, Storage, Arithmetic>::Workspace feed_forward;
    };

    void prepare_attentions(const LayerStack& stack) {
      if (std::ssize(attentions_) < stack.kinds_) attentions_.resize(to_size(stack.kinds_));
    }
    void prepare(const LayerStack& stack, Index rows, Index threads) {
      prepare_attentions(stack);
      if (stack.layers_.empty()) return;
      const Index blocks = ceil_div(rows, count);
      workers_ = (std::min)(threads, ceil_div(blocks, Index{Tiling<Scalar>::blocks}));
      provide(
          rooms_, workers_, [&](const Room& room) { return room.fits(stack); },
          [&] { return Room(stack); });
      resize_without_values(attended_, rows * stack.dim());
      if (stack.streams() == 1) {
        streams_ = beta_ = BlockArray<Scalar>();
        return;
      }
      streams_.prepare(blocks, stack.streams() * stack.dim());
      beta_.prepare(blocks, stack.streams());
    }

    // What the workers take of the blocks.
    EvenRanges ranges(Index blocks) const {
      return EvenRanges(blocks, workers_, together, Tiling<Scalar>::blocks);
    }
    // Of the connection around the attention; null if there is none.
    Scalar* beta(Index block) { return beta_.channels() > 0 ? beta_[block] : nullptr; }

    Index workers_ = 1;
    std::vector<typename LocalMHA<Scalar, Storage, Arithmetic>::Workspace>
        attentions_;                // of each kind
    std::vector<Room> rooms_;       // of each worker
    BlockBuffer<Scalar> attended_;  // rows
    BlockArray<Scalar> streams_;    // of several
    BlockArray<Scalar> beta_;       // of the connection around the attention
    StackBackwardRoom<Scalar, Storage, Arithmetic> backward_;
  };

  using Base::Base;

  /// \param y `[B, N, dim]`, must not overlap x
  /// \param saved null, or what becomes what backward() needs
  /// What it throws of its arguments is what LocalMHA does; there, saved is of no call.
  void forward(const AnyDevice& device, TensorView<Scalar, 3> y, Workspace& workspace,
               TensorView<const Scalar, 3> x, const PaddingMask& mask,
               const std::optional<Training>& training, std::span<const Index> cu_seqlens,
               Saved* saved) const;

  /// forward() of rows whose attentions lie elsewhere.
  /// \param attend `attend(i, attention, training, x, y, saved)` makes y, what the attention of
  ///        layer `i` gives for x; `saved`: null, or the layer's SavedLayer
  /// \param places of the rows in a whole, by which feed-forwards drop; empty: this is all
  template <typename Attend>
  void run(const AnyDevice& device, TensorView<Scalar, 3> y, Workspace& workspace,
           TensorView<const Scalar, 3> x, const std::optional<Training>& training, Saved* saved,
           Attend&& attend, std::span<const RowPlace> places = {}) const;

  /// backward() of such rows.
  /// \param attend `attend(i, attention, gradients, saved, grad_y, x, grad_x, grad_bias)` makes
  ///        grad_x, and adds to the gradients of the weights and of attn_bias()
  template <typename Attend>
  void run_back(const AnyDevice& device, EncoderParameters<Scalar>& gradients, Workspace& workspace,
                const Saved& saved, TensorView<Scalar, 3> grad, Attend&& attend) const
    requires Trainable<Scalar, Storage, Arithmetic>;

  /// Gradients of a loss.
  /// \param gradients those of the weights are added here; if it throws, some of them are
  /// \param saved what forward() kept
  /// \param grad of its result; becomes that of x
  void backward(const AnyDevice& device, EncoderParameters<Scalar>& gradients, Workspace& workspace,
                const Saved& saved, TensorView<Scalar, 3> grad) const
    requires Trainable<Scalar, Storage, Arithmetic>;

  /// \throws std::invalid_argument if saved is not that of a call of a stack of these weights
  void require_known(const Saved& saved) const {
    const std::array<Index, 3>& shape = saved.shape;
    if (shape[2] != dim_ || saved.layers.size() != layers_.size() ||
        !saved.connections.is_of(connection_numbers_))
      reject("saved", "that of layers of these weights", "another, or none");
  }

 private:
  // Each branch drops something else.
  static std::optional<Training> of_part(const std::optional<Training>& training,
                                         std::size_t part) {
    return training ? std::optional(training->of_part(part)) : std::nullopt;
  }

  // Rows of a call, as blocks.
  struct Blocks {
    Index rows;
    Index dim;

    Index number() const { return ceil_div(rows, count); }
    Index rows_of(Index block) const { return (std::min)(count, rows - block * count); }
    void load(const Scalar* from, Index block, Scalar* to) const {
      load_block(dim, rows_of(block), StridedRows{from, dim, block * count}, to);
    }
    void store(const Scalar* from, Index block, Scalar* to) const {
      store_block(dim, rows_of(block), from, StridedRows{to, dim, block * count});
    }
  };

  void prepare(Saved& saved, const std::array<Index, 3>& shape) const {
    const Index rows = shape[0] * shape[1];
    saved.shape = {};
    saved.layers.resize(layers_.size());
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      auto& layer = saved.layers[i];
      for (SavedBranch<Scalar>* branch : {&layer.attention_branch, &layer.feed_forward_branch}) {
        resize_without_values(branch->input, rows * dim_);
        if (streams_ == 1) {
          branch->streams = branch->result = BlockArray<Scalar>();
          continue;
        }
        branch->streams.prepare(ceil_div(rows, count), streams_ * dim_);
        branch->result.prepare(ceil_div(rows, count), dim_);
      }
      layers_[i].feed_forward.prepare(layer.feed_forward, rows);
    }
  }
  static void keep(const Scalar* from, Index block, BlockArray<Scalar>& to) {
    if (to.channels() > 0) std::copy_n(from, to.stride(), to[block]);
  }

  // The input of layer `i`, or the result if there is none, of the streams of a block.
  // \param in room for a block
  // \param to rows
  void enter(std::size_t i, const Blocks& blocks, Index block, Scalar* r, Scalar* in, Scalar* to,
             Workspace& workspace, typename Workspace::Room& room, Saved* saved) const {
    if (i == layers_.size()) {
      reduce(r, in);
    } else {
      if (saved != nullptr) keep(r, block, saved->layers[i].attention_branch.streams);
      mix(layers_[i].attention_connection, r, in, workspace.beta(block), room.connection.data());
    }
    blocks.store(in, block, to);
  }

  // From x to the input of layer 0.
  void begin(const AnyDevice& device, const Blocks& blocks, const Scalar* x, Scalar* to,
             Workspace& workspace, Saved* saved) const {
    if (layers_.empty()) {
      for (Index i = 0; i < blocks.rows * dim_; ++i) {
        to[i] = x[i];
        for (Index s = 1; s < streams_; ++s) to[i] += x[i];
      }
    } else if (streams_ == 1) {
      std::copy_n(x, blocks.rows * dim_, to);
    } else {
      const EvenRanges ranges = workspace.ranges(blocks.number());
      parallel_for(device, workspace.workers_, ranges.count(), [&](Index worker, Index task) {
        auto& room = workspace.rooms_[to_size(worker)];
        Scalar* const in = room.attended.data();
        const auto [first, end] = ranges[task];
        for (Index block = first; block < end; ++block) {
          Scalar* const r = workspace.streams_[block];
          blocks.load(x, block, in);
          expand(in, r);
          enter(0, blocks, block, r, in, to, workspace, room, saved);
        }
      });
    }
  }

  // From what the attention of layer `i` gave to the input of the next one.
  // \param input that of the attention: the streams, if there is a single one
  void pass(const AnyDevice& device, std::size_t i, const Blocks& blocks, const Scalar* input,
            Scalar* to, Workspace& workspace, const std::optional<Training>& training,
            std::span<const RowPlace> places, Saved* saved) const {
    const Layer& layer = layers_[i];
    const FeedForward<Scalar, Storage, Arithmetic>& feed_forward = layer.feed_forward;
    const auto dropout = feed_forward.dropout_of(of_part(training, 2 * i + 1), places);
    auto* const kept = saved != nullptr ? &saved->layers[i] : nullptr;
    const EvenRanges ranges = workspace.ranges(blocks.number());
    parallel_for(device, workspace.workers_, ranges.count(), [&](Index worker, Index task) {
      auto& room = workspace.rooms_[to_size(worker)];
      const Index first = ranges[task].begin;
      const Index number = ranges[task].end - first;
      const auto streams = [&](Index b) {
        return streams_ == 1 ? room.streams.data() + b * dim_ * count
                             : workspace.streams_[first + b];
      };
      const auto beta = [&](Index b) { return room.beta.data() + b * streams_ * count; };
      const auto in = [&](Index b) { return room.feed_forward.in_.data() + b * dim_ * count; };
      const auto out = [&](Index b) { return room.feed_forward.out_.data() + b * dim_ * count; };
      for (Index b = 0; b < number; ++b) {
        const Index block = first + b;
        if (streams_ == 1) blocks.load(input, block, streams(b));
        Scalar* const attended = room.attended.data();
        blocks.load(workspace.attended_.data(), block, attended);
        add(layer.attention_connection, attended, workspace.beta(block), streams(b));
        if (kept != nullptr) {
          keep(attended, block, kept->attention_branch.result);
          keep(streams(b), block, kept->feed_forward_branch.streams);
        }
        mix(layer.feed_forward_connection, streams(b), in(b), beta(b), room.connection.data());
        if (kept != nullptr) blocks.store(in(b), block, kept->feed_forward_branch.input.data());
      }
      feed_forward.apply(first * count, blocks.rows, number, in(0), out(0), room.feed_forward,
                         dropout, false, kept != nullptr ? &kept->feed_forward : nullptr);
      for (Index b = 0; b < number; ++b) {
        if (kept != nullptr) keep(out(b), first + b, kept->feed_forward_branch.result);
        add(layer.feed_forward_connection, out(b), beta(b), streams(b));
        enter(i + 1, blocks, first + b, streams(b), in(b), to, workspace, room, saved);
      }
    });
    if constexpr (Trainable<Scalar, Storage, Arithmetic>) {
      if (kept != nullptr) {
        const Scalar* const x = kept->feed_forward_branch.input.data();
        feed_forward.complete(kept->feed_forward,
                              Eigen::Map<const RowMatrix<Scalar>>(x, blocks.rows, dim_),
                              of_part(training, 2 * i + 1), places);
      }
    }
  }

  static std::size_t to_size(Index i) { return static_cast<std::size_t>(i); }

  using Base::bias_;
  using Base::connection_numbers_;
  using Base::dim_;
  using Base::kinds_;
  using Base::layers_;
  using Base::position_bias_;
  using Base::streams_;
};

template <typename Scalar, typename Storage, typename Arithmetic>
void LayerStack<Scalar, Storage, Arithmetic>::forward(
    const AnyDevice& device, TensorView<Scalar, 3> y, Workspace& workspace,
    TensorView<const Scalar, 3> x, const PaddingMask& mask, const std::optional<Training>& training,
    std::span<const Index> cu_seqlens, Saved* saved) const {
  run(device, y, workspace, x, training, saved,
      [&](std::size_t i, const LocalMHA<Scalar, Storage, Arithmetic>& attention,
          const std::optional<Training>& of_attention, const TensorView<const Scalar, 3>& in,
          const TensorView<Scalar, 3>& attended, SavedLayer<Scalar>* kept) {
        auto& room = workspace.attentions_[to_size(layers_[i].kind)];
        const LocalMHACall<Scalar> call{.mask = mask,
                                        .attn_bias = attn_bias(),
                                        .training = of_attention,
                                        .cu_seqlens = cu_seqlens,
                                        .device = device};
        if constexpr (Trainable<Scalar, Storage, Arithmetic>)
          if (kept != nullptr)
            return attention.forward_saving_into(attended, room, *kept, in, call);
        attention.forward_into(attended, room, in, call);
      });
}

template <typename Scalar, typename Storage, typename Arithmetic>
template <typename Attend>
void LayerStack<Scalar, Storage, Arithmetic>::run(const AnyDevice& device, TensorView<Scalar, 3> y,
                                                  Workspace& workspace,
                                                  TensorView<const Scalar, 3> x,
                                                  const std::optional<Training>& training,
                                                  Saved* saved, Attend&& attend,
                                                  std::span<const RowPlace> places) const {
  const Blocks blocks{x.dimension(0) * x.dimension(1), dim_};
  workspace.prepare(*this, blocks.rows, thread_count(device));
  if (saved != nullptr) prepare(*saved, x.dimensions());
  // Where the input of an attention lies, which is kept, or else makes way for the next one.
  const auto place = [&](std::size_t i) {
    return saved != nullptr && i < layers_.size() ? saved->layers[i].attention_branch.input.data()
                                                  : y.data();
  };
  const Scalar* input = x.data();
  if (layers_.empty() || streams_ > 1 || saved != nullptr) {
    begin(device, blocks, x.data(), place(0), workspace, saved);
    input = place(0);
  }
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const TensorView<const Scalar, 3> in(input, x.dimensions());
    const TensorView<Scalar, 3> attended(workspace.attended_.data(), x.dimensions());
    attend(i, layers_[i].attention, of_part(training, 2 * i), in, attended,
           saved != nullptr ? &saved->layers[i].attention : nullptr);
    pass(device, i, blocks, input, place(i + 1), workspace, training, places, saved);
    input = place(i + 1);
  }
  if (saved == nullptr) return;
  saved->connections.take(connection_numbers_);
  saved->shape = x.dimensions();
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
