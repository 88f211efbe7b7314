// SPDX-License-Identifier: MIT
/// \file
/// The stream of Encoder: rows that come bit by bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/encoder.hpp>
#include <local_mha/streaming/sequence_stream.hpp>
#include <local_mha/streaming/stack_stream.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Sequences that come in chunks of any size, and give at every position what forward() of the
/// whole sequence gives; see LocalMHA::Stream, whose guarantees hold here, too.
///
/// Layers that see ahead wait for it one after the other: a position's result comes when all that
/// it depends on through them is there, which is the sum of what they see ahead later. Where all
/// layers are causal, it comes at once.
template <typename Scalar, typename Storage, typename Arithmetic>
class Encoder<Scalar, Storage, Arithmetic>::Stream
    : public detail::StackStream<Scalar, Storage, Arithmetic> {
  using Base = detail::StackStream<Scalar, Storage, Arithmetic>;
  using Sequence = typename Base::Sequence;
  using Worker = typename Base::Worker;

 public:
  /// Begins sequences, and allocates all memory.
  /// \param encoder the stream shares its weights, and goes on with them whatever becomes of it
  /// \throws std::invalid_argument naming the member that does not fit
  explicit Stream(const Encoder& encoder, const StreamConfig& config = {})
      : Base(config, describe(encoder), encoder.stack()), encoder_(encoder) {}
  Stream(const Stream&) = default;
  Stream(Stream&&) = default;
  Stream& operator=(const Stream& other) { return *this = Stream(other); }
  Stream& operator=(Stream&&) = default;
  ~Stream() = default;

  /// Takes the next `n >= 0` positions of every sequence.
  /// \param x `[B, n, dim]`
  /// \return the results that are complete, `[B, results_of(n), dim]`. 0 in rows beyond a
  ///         sequence's own
  /// \throws std::invalid_argument naming the argument that does not fit, before anything changes
  Tensor<Scalar, 3> push(StridedView<const Scalar> x, const PushCall& call = {}) {
    check_arguments(x, call.mask);
    Tensor<Scalar, 3> y(this->batch(), this->results_of(x.dimension(1)), dim());
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
    this->run(call.device, [&](Worker& worker, Sequence& sequence, Index b) {
      this->advance(
          encoder_.stack(), worker, sequence, n, call.mask.row(b),
          [&](Index i, Index some, Scalar* rows) {
            detail::copy_rows(x.sequence(b).from(i), some, dim(), RowsView<Scalar>{rows, dim()});
          },
          writer(y, b));
    });
  }

  /// Ends every sequence: nothing follows, and the positions that wait get their results. Until
  /// reset() or rollback(), a sequence takes no more.
  /// \return `[B, results_of_flush(), dim]`, as push() does
  Tensor<Scalar, 3> flush(const AnyDevice& device = {}) {
    Tensor<Scalar, 3> y(this->batch(), this->results_of_flush(), dim());
    y.setZero();
    flush_into(y, device);
    return y;
  }
  /// The same into given memory, `[B, results_of_flush(), dim]`.
  void flush_into(StridedView<Scalar> y, const AnyDevice& device = {}) {
    check_room(y, this->results_of_flush());
    this->run(device, [&](Worker& worker, Sequence& sequence, Index b) {
      this->finish(encoder_.stack(), worker, sequence, writer(y, b));
    });
  }

 private:
  static std::string describe(const Encoder& encoder) {
    return "Encoder, " + Base::describe(encoder.config(), encoder.stack());
  }

  Index dim() const { return encoder_.stack().dim(); }

  void check_arguments(const StridedView<const Scalar>& x, const PaddingMask& mask) const {
    require_shape("x", x.dimensions(), {this->batch(), -1, dim()});
    this->check_push(x.dimension(1), mask);
  }
  void check_room(const StridedView<Scalar>& y, Index rows) const {
    require_shape("y", y.dimensions(), {this->batch(), rows, dim()});
  }

  // What puts the results of sequence `b` into y, one after the other.
  auto writer(const StridedView<Scalar>& y, Index b) const {
    return [size = dim(), to = y.sequence(b)](const Scalar* rows, Index n) mutable {
      detail::copy_rows(RowsView<const Scalar>{rows, size}, n, size, to);
      to = to.from(n);
    };
  }

  Encoder encoder_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
