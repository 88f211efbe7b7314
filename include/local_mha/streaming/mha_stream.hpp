// SPDX-License-Identifier: MIT
/// \file
/// The stream of LocalMHA: sequences that come bit by bit, in memory that does not grow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <local_mha/core/mask.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/mha.hpp>
#include <local_mha/streaming/description.hpp>
#include <local_mha/streaming/sequence_stream.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Sequences that come in chunks of any size, and give at every position what forward() of the
/// whole sequence gives.
///
///     local_mha::LocalMHA<float>::Stream stream(mha);
///     auto y = stream.push(x);  // x: [B, n, dim], the next n positions
///
/// A position's result comes as soon as the last position that it can see is in: at once if the
/// layer is causal, else up to `look_forward` windows later. flush() ends the sequence and gives
/// the results that still wait. Sequences may stand at different positions, after reset() of one:
/// then a push may give a different number of results for each, and their rows begin at row 0 each.
///
/// All memory is allocated at construction: the keys and values that a window shows, and buffers
/// for one stretch of rows. It does not depend on the chunks. Without a device, push_into() and
/// flush_into() allocate nothing, lock nothing and throw nothing once their arguments are checked;
/// with one, the device schedules. push() allocates its result, and a mask its flags, but for
/// PaddingMask::masked_view(). There is no training mode.
///
/// Where the layer stores in 16 bits, so does the stream: its keys and values take half the memory.
template <typename Scalar, typename Storage, typename Arithmetic>
class LocalMHA<Scalar, Storage, Arithmetic>::Stream
    : public SequenceStream<Scalar, detail::StreamedSequence<Scalar, Storage>> {
  using Sequence = detail::StreamedSequence<Scalar, Storage>;
  using Base = SequenceStream<Scalar, Sequence>;

 public:
  /// Begins sequences, and allocates all memory.
  /// \param layer the stream shares its weights, and goes on with them whatever becomes of it
  /// \param attn_bias as for forward(), for all pushes; copied
  /// \throws std::invalid_argument naming the argument that does not fit
  explicit Stream(const LocalMHA& layer, const StreamConfig& config = {},
                  const Bias& attn_bias = {})
      : Base(config, describe(layer, attn_bias)), layer_(layer) {
    const Window window(layer.attention().config());
    const auto inputs = layer.shown_to(config.batch, attn_bias);
    if (attn_bias) attn_bias_ = inputs.copy_of_bias();
    this->sequences_.assign(static_cast<std::size_t>(config.batch),
                            Sequence(window,
                                     {.heads = layer.config().heads,
                                      .dim_head = layer.config().dim_head,
                                      .gated = layer.config().gate_values_per_head,
                                      .kv_heads = resolved_kv_heads(layer.config())},
                                     stretch, config.max_rollback));
    flows_.assign(static_cast<std::size_t>((std::min)(config.batch, config.max_threads)),
                  Flow::for_stream(*layer.weights_, window));
    // Of one sequence at a time, so that it does for all.
    if (config.max_threads > config.batch)
      flows_.front() = Flow::for_stream(*layer.weights_, window, config.max_threads);
    max_threads_ = config.max_threads;
  }
  Stream(const Stream&) = default;
  Stream(Stream&&) = default;
  Stream& operator=(const Stream& other) { return *this = Stream(other); }
  Stream& operator=(Stream&&) = default;
  ~Stream() = default;

  /// Takes the next `n >= 0` positions of every sequence.
  /// \param x `[B, n, dim]`
  /// \return the results that are complete, `[B, results_of(n), dim]`: those of the positions from
  ///         answered() on. 0 in rows beyond a sequence's own
  /// \throws std::invalid_argument naming the argument that does not fit, before anything changes
  Tensor<Scalar, 3> push(StridedView<const Scalar> x, const PushCall& call = {}) {
    check_arguments(x, call.mask);
    Tensor<Scalar, 3> y(this->batch(), this->results_of(x.dimension(1)), layer_.config().dim);
    y.setZero();
    push_into(y, x, call);
    return y;
  }
  /// The same into given memory.
  /// \param y `[B, results_of(n), dim]`, must not overlap x. Rows beyond a sequence's own stay
  void push_into(StridedView<Scalar> y, StridedView<const Scalar> x, const PushCall& call = {}) {
    check_arguments(x, call.mask);
    const Index n = x.dimension(1);
    check_room(y, this->results_of(n));
    detail::require_apart("y", y, "x", x);
    run(call.device, y,
        [&](const AnyDevice& threads, Flow& flow, Index b, const RowsView<Scalar>& to) {
          advance(threads, flow, b, n, x.sequence(b), call.mask.row(b), to);
        });
  }

  /// Ends every sequence: nothing follows, and the positions that wait get their results. Until
  /// reset() or rollback(), a sequence takes no more.
  /// \return `[B, results_of_flush(), dim]`, as push() does
  Tensor<Scalar, 3> flush(const AnyDevice& device = {}) {
    Tensor<Scalar, 3> y(this->batch(), this->results_of_flush(), layer_.config().dim);
    y.setZero();
    flush_into(y, device);
    return y;
  }
  /// The same into given memory, `[B, results_of_flush(), dim]`.
  void flush_into(StridedView<Scalar> y, const AnyDevice& device = {}) {
    check_room(y, this->results_of_flush());
    run(device, y, [&](const AnyDevice& threads, Flow& flow, Index b, const RowsView<Scalar>& to) {
      finish(threads, flow, b, to);
    });
  }

 private:
  static std::string describe(const LocalMHA& layer, const Bias& attn_bias) {
    return detail::description_of(layer.config()) +
           detail::description_of(layer.attention(), Window(layer.attention().config()),
                                  attn_bias) +
           detail::description_of_products<Scalar, Arithmetic>();
  }

  void check_arguments(const StridedView<const Scalar>& x, const PaddingMask& mask) const {
    require_shape("x", x.dimensions(), {this->batch(), -1, layer_.config().dim});
    this->check_push(x.dimension(1), mask);
  }
  void check_room(const StridedView<Scalar>& y, Index rows) const {
    require_shape("y", y.dimensions(), {this->batch(), rows, layer_.config().dim});
  }

  // `task(device, flow, b, y)` for each sequence, with the threads that it may use and the place of
  // its results.
  template <typename Task>
  void run(const AnyDevice& device, const StridedView<Scalar>& y, Task&& task) {
    const Index threads = (std::min)(thread_count(device), max_threads_);
    // Sharing heads keeps more threads at work, where there are so many heads.
    if (this->batch() == 1 ||
        (std::min)(threads, resolved_kv_heads(layer_.config())) > this->batch()) {
      for (Index b = 0; b < this->batch(); ++b) task(device, flows_.front(), b, y.sequence(b));
      return;
    }
    const Index workers = (std::min)(threads, static_cast<Index>(flows_.size()));
    parallel_for(device, workers, this->batch(), [&](Index worker, Index b) {
      task(AnyDevice(), flows_[static_cast<std::size_t>(worker)], b, y.sequence(b));
    });
  }

  // The next `n` rows of a sequence.
  // \param x, y from the first row of what comes and of what is complete on
  void advance(const AnyDevice& device, Flow& flow, Index b, Index n,
               const RowsView<const Scalar>& x, const std::uint8_t* masked,
               const RowsView<Scalar>& y) {
    Sequence& sequence = this->sequences_[static_cast<std::size_t>(b)];
    const Range in{sequence.position(), sequence.position() + n};
    const Range out{sequence.answered(), sequence.complete(in.end)};
    layer_.stream_rows(device, flow, sequence, shown(), b, in, out, x, masked, y,
                       [&](Index rows) { return sequence.complete(rows); });
  }

  void finish(const AnyDevice& device, Flow& flow, Index b, const RowsView<Scalar>& y) {
    Sequence& sequence = this->sequences_[static_cast<std::size_t>(b)];
    const Index end = sequence.position();
    layer_.stream_rows(device, flow, sequence, shown(), b, {end, end}, {sequence.answered(), end},
                       {}, nullptr, y, [](Index rows) { return rows; });
    sequence.end();
  }

  // What all queries see, but for their place.
  detail::AttentionInputs<Scalar> shown() const {
    return layer_.shown_to(this->batch(), attn_bias_ ? Bias(*attn_bias_) : Bias());
  }

  LocalMHA layer_;
  Index max_threads_ = 1;
  std::optional<Tensor<Scalar, 3>> attn_bias_;
  std::vector<Flow> flows_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
