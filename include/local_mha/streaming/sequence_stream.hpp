// SPDX-License-Identifier: MIT
/// \file
/// What the streams of LocalMHA, LocalAttention, Encoder and LocalTransformer have in common: where
/// each sequence stands, and going back, saving and loading.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <istream>
#include <ostream>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/streaming/state_file.hpp>
#include <local_mha/streaming/streamed_sequence.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// How large a stream is.
struct StreamConfig {
  /// Sequences side by side, at least 1.
  Index batch = 1;
  /// Positions behind the furthest one pushed to which rollback() can always go back. It can go
  /// further as long as the rings hold what is needed.
  Index max_rollback = 0;
  /// Threads that a push uses at most, if it gets a device with as many.
  Index max_threads = 1;
};

/// What a push is given beside its positions; all of it may be left out:
///
///     stream.push(x, {.mask = mask, .device = device});
struct PushCall {
  /// Those positions that nobody attends, `[B, n]`.
  PaddingMask mask = {};
  /// Whose threads share the work, at most `max_threads`; the same bits for any number of them.
  AnyDevice device = {};
};

/// What all streams offer.
/// \tparam Sequence a StreamedSequence, or what has its interface
template <typename Scalar, typename Sequence = detail::StreamedSequence<Scalar>>
class SequenceStream {
 public:
  /// Sequences, B.
  Index batch() const { return static_cast<Index>(sequences_.size()); }

  /// Positions pushed so far, of one sequence of the batch.
  Index position(Index sequence = 0) const { return at(sequence).position(); }
  /// Positions whose results are out; the others wait for what they see ahead.
  Index answered(Index sequence = 0) const { return at(sequence).answered(); }

  /// Rows of results that pushing `n` positions gives: the most of any sequence.
  /// \throws std::invalid_argument unless n is 0 to 2^60
  Index results_of(Index n) const {
    if (n < 0 || n > detail::last_position) reject("n", "0 to 2^60 positions", n);
    Index most = 0;
    for (const Sequence& sequence : sequences_) most = (std::max)(most, results_of(sequence, n));
    return most;
  }
  /// Rows of results that flush() gives.
  Index results_of_flush() const {
    Index most = 0;
    for (const Sequence& sequence : sequences_)
      most = (std::max)(most, sequence.position() - sequence.answered());
    return most;
  }

  /// Starts all sequences anew.
  void reset() {
    for (Sequence& sequence : sequences_) sequence.reset();
  }
  /// Starts one sequence of the batch anew. From then on, it is at another position than the
  /// others.
  void reset(Index sequence) { at(sequence).reset(); }

  /// The most positions that rollback() can take back.
  Index most_rollback(Index sequence = 0) const { return at(sequence).most_rollback(); }
  /// Takes the last `n` positions of every sequence back, as if they had never been pushed, and the
  /// end that flush() set. Results that depended on them come again.
  /// \throws std::invalid_argument if the rings do not hold what then would be needed
  void rollback(Index n) {
    for (Index b = 0; b < batch(); ++b) check_rollback(b, n);
    for (Sequence& sequence : sequences_) sequence.rollback(n);
  }
  /// The same of one sequence.
  void rollback(Index sequence, Index n) {
    at(sequence);
    check_rollback(sequence, n);
    at(sequence).rollback(n);
  }

  /// Writes what load() of a stream of the same configuration and weights needs to go on to the
  /// same bits. The weights are not part of it.
  /// \throws std::runtime_error if it cannot be written
  void save(std::ostream& out) const {
    detail::StateWriter writer(out, description_);
    for (const Sequence& sequence : sequences_) sequence.save(writer);
    writer.finish();
  }
  /// Takes a state that save() wrote. If something is wrong with it, this stream stays as it was.
  /// \throws std::invalid_argument if it is that of another configuration, or damaged
  void load(std::istream& in) {
    detail::StateReader reader(in, description_);
    std::vector<Sequence> loaded = sequences_;
    for (Sequence& sequence : loaded) sequence.load(reader);
    reader.finish();
    sequences_ = std::move(loaded);
  }

 protected:
  SequenceStream(const StreamConfig& config, std::string description)
      : description_(std::move(description)) {
    detail::require_at_least("max_rollback", config.max_rollback, 0);
    detail::require_at_least("max_threads", config.max_threads, 1);
    detail::require_at_least("batch", config.batch, 1);
    if (config.batch > Index{1} << 32) reject("batch", "at most 2^32 sequences", config.batch);
    description_ += ", batch " + std::to_string(config.batch) + ", " +
                    std::to_string(sizeof(Scalar)) + " bytes";
    if constexpr (!std::is_same_v<typename Sequence::Stored, Scalar>)
      description_ +=
          std::string(", kept as ") + detail::name_of_storage<typename Sequence::Stored>();
  }
  ~SequenceStream() = default;
  SequenceStream(const SequenceStream&) = default;
  SequenceStream(SequenceStream&&) = default;
  SequenceStream& operator=(const SequenceStream&) = default;
  SequenceStream& operator=(SequenceStream&&) = default;

  static Index results_of(const Sequence& sequence, Index n) {
    return sequence.complete(sequence.position() + n) - sequence.answered();
  }

  Sequence& at(Index sequence) { return const_cast<Sequence&>(std::as_const(*this).at(sequence)); }
  const Sequence& at(Index sequence) const {
    if (sequence < 0 || sequence >= batch())
      reject("sequence", "0 to " + std::to_string(batch() - 1), sequence);
    return sequences_[static_cast<std::size_t>(sequence)];
  }

  /// Checks what push() was given.
  /// \throws std::invalid_argument if `n` positions with this mask cannot be pushed
  void check_push(Index n, const PaddingMask& mask) const {
    if (mask) require_shape("mask", mask.shape(), {batch(), n});
    for (Index b = 0; b < batch(); ++b) {
      if (at(b).ended())
        reject("sequence " + std::to_string(b), "one that goes on, after reset() or rollback()",
               "one that flush() ended");
      if (n > detail::last_position - at(b).position())
        reject("sequence " + std::to_string(b), "at most 2^60 positions", at(b).position(), " and ",
               n, " more");
    }
  }

  std::vector<Sequence> sequences_;
  std::string description_;

 private:
  void check_rollback(Index b, Index n) const {
    detail::require_at_least("n", n, 0);
    const Index most = at(b).most_rollback();
    if (n > most)
      reject("n", "at most " + std::to_string(most) + " positions to take back", n, " in sequence ",
             b, " at position ", at(b).position());
  }
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
