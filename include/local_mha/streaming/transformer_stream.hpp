// SPDX-License-Identifier: MIT
/// \file
/// The stream of LocalTransformer: tokens that come bit by bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/project_rows.hpp>
#include <local_mha/streaming/sequence_stream.hpp>
#include <local_mha/streaming/stack_stream.hpp>
#include <local_mha/transformer.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Sequences of tokens that come in chunks of any size, and give at every position the logits that
/// forward() of the whole sequence gives; see LocalMHA::Stream, whose guarantees hold here, too.
///
/// There is no longest sequence: past max_seq_len, the position embedding stays at its last row, as
/// in the Python package's cached generation. The model was not trained for that; see
/// is_past_max_seq_len().
template <typename Scalar, typename Storage, typename Arithmetic>
class LocalTransformer<Scalar, Storage, Arithmetic>::Stream
    : public detail::StackStream<Scalar, Storage, Arithmetic> {
  using Base = detail::StackStream<Scalar, Storage, Arithmetic>;
  using Sequence = typename Base::Sequence;
  using Worker = typename Base::Worker;

 public:
  /// Begins texts, and allocates all memory.
  /// \param model the stream shares its weights, and goes on with them whatever becomes of it
  /// \throws std::invalid_argument naming the member that does not fit
  explicit Stream(const LocalTransformer& model, const StreamConfig& config = {})
      : Base(config, describe(model), model.stack()), model_(model) {
    rooms_.reserve(this->workers_.size());
    while (rooms_.size() < this->workers_.size()) rooms_.emplace_back(model);
  }
  Stream(const Stream&) = default;
  Stream(Stream&&) = default;
  Stream& operator=(const Stream& other) { return *this = Stream(other); }
  Stream& operator=(Stream&&) = default;
  ~Stream() = default;

  /// Takes the next `n >= 0` tokens of every sequence.
  /// \param tokens `[B, n]`, each in `[0, num_tokens)`
  /// \return the logits that are complete, `[B, results_of(n), num_tokens]`. 0 in rows beyond a
  ///         sequence's own
  /// \throws std::invalid_argument naming the argument that does not fit, before anything changes
  Tensor<Scalar, 3> push(Tokens tokens, const PushCall& call = {}) {
    check_arguments(tokens, call.mask);
    Tensor<Scalar, 3> logits(this->batch(), this->results_of(tokens.dimension(1)),
                             model_.config().num_tokens);
    logits.setZero();
    push_into(logits, tokens, call);
    return logits;
  }
  /// The same into given memory.
  /// \param logits `[B, results_of(n), num_tokens]`. Rows beyond a sequence's own stay
  void push_into(TensorView<Scalar, 3> logits, Tokens tokens, const PushCall& call = {}) {
    check_arguments(tokens, call.mask);
    const Index n = tokens.dimension(1);
    check_room(logits, this->results_of(n));
    run(call.device, logits,
        [&](Worker& worker, Sequence& sequence, Index b, Room& room, Scalar* to) {
          advance(worker, sequence, room, tokens.data() + b * n, n, call.mask.row(b), to);
        });
  }

  /// Ends every sequence: nothing follows, and the positions that wait get their logits. Until
  /// reset() or rollback(), a sequence takes no more.
  /// \return `[B, results_of_flush(), num_tokens]`, as push() does
  Tensor<Scalar, 3> flush(const AnyDevice& device = {}) {
    Tensor<Scalar, 3> logits(this->batch(), this->results_of_flush(), model_.config().num_tokens);
    logits.setZero();
    flush_into(logits, device);
    return logits;
  }
  /// The same into given memory, `[B, results_of_flush(), num_tokens]`.
  void flush_into(TensorView<Scalar, 3> logits, const AnyDevice& device = {}) {
    check_room(logits, this->results_of_flush());
    run(device, logits, [&](Worker& worker, Sequence& sequence, Index, Room& room, Scalar* to) {
      this->finish(model_.stack(), worker, sequence,
                   [&](const Scalar* rows, Index n) { map_to_logits(room, rows, n, to); });
    });
  }

  /// True if a sequence is longer than the position embedding.
  bool is_past_max_seq_len() const {
    for (const Sequence& sequence : this->sequences_)
      if (sequence.position() > model_.config().max_seq_len) return true;
    return false;
  }

 private:
  friend LocalTransformer;

  static constexpr Index count = block_rows<Scalar>;

  // What the way to the logits takes.
  struct Room {
    explicit Room(const LocalTransformer& model)
        : in(make_block_buffer<Scalar>(Base::at_once * model.config().dim)),
          out(make_block_buffer<Scalar>(Base::at_once * model.config().num_tokens)) {
      passing.fit_blocks(model.weights_->to_logits.weight(), Base::at_once / count);
      passing.fit_single(model.weights_->to_logits.weight());
    }

    BlockBuffer<Scalar> in;
    BlockBuffer<Scalar> out;
    detail::PassingRows<Scalar, Arithmetic> passing;
  };

  static std::string describe(const LocalTransformer& model) {
    const LocalTransformerConfig& config = model.config();
    return "LocalTransformer, num_tokens " + std::to_string(config.num_tokens) + ", max_seq_len " +
           std::to_string(config.max_seq_len) + ", " +
           Base::describe(encoder_config(config), model.stack());
  }

  void check_arguments(const Tokens& tokens, const PaddingMask& mask) const {
    require_shape("tokens", tokens.dimensions(), {this->batch(), -1});
    model_.check_tokens("tokens", tokens, [n = tokens.dimension(1)](Index) { return n; });
    this->check_push(tokens.dimension(1), mask);
  }
  void check_room(const TensorView<Scalar, 3>& logits, Index rows) const {
    require_shape("logits", logits.dimensions(), {this->batch(), rows, model_.config().num_tokens});
  }

  // `task(worker, sequence, b, room, logits)` for each sequence.
  template <typename Task>
  void run(const AnyDevice& device, const TensorView<Scalar, 3>& logits, Task&& task) {
    Base::run(device, [&](Worker& worker, Sequence& sequence, Index b) {
      task(worker, sequence, b, rooms_[static_cast<std::size_t>(&worker - this->workers_.data())],
           logits.data() + b * logits.dimension(1) * logits.dimension(2));
    });
  }

  void embed(Index first, const std::int64_t* tokens, Index n, Scalar* rows) const {
    const Index dim = model_.config().dim;
    for (Index i = 0; i < n; ++i)
      model_.embed(tokens[i], (std::min)(first + i, model_.config().max_seq_len - 1),
                   rows + i * dim);
  }

  // The next `n` tokens of a sequence.
  // \param masked a flag for each; null: none is masked
  // \param take `take(rows, m)` takes the next `m` results before the logits
  template <typename Take>
  void pass_layers(Worker& worker, Sequence& sequence, const std::int64_t* tokens, Index n,
                   const std::uint8_t* masked, Take&& take) const {
    Base::advance(
        model_.stack(), worker, sequence, n, masked,
        [&](Index i, Index some, Scalar* rows) {
          embed(sequence.position(), tokens + i, some, rows);
        },
        take);
  }
  void advance(Worker& worker, Sequence& sequence, Room& room, const std::int64_t* tokens, Index n,
               const std::uint8_t* masked, Scalar* logits) const {
    pass_layers(worker, sequence, tokens, n, masked, [&](const Scalar* rows, Index m) {
      map_to_logits(room, rows, m, logits);
      logits += m * model_.config().num_tokens;
    });
  }
  // The next `n > 0` tokens of sequence `b` alone, of a causal model.
  // \param logits of the last of them
  void advance_to_last(Index b, const std::int64_t* tokens, Index n, Scalar* logits) {
    Vector<Scalar> last(model_.config().dim);
    pass_layers(this->workers_.front(), this->sequences_[static_cast<std::size_t>(b)], tokens, n,
                nullptr, [&](const Scalar* rows, Index m) {
                  if (m > 0) std::copy_n(rows + (m - 1) * last.size(), last.size(), last.data());
                });
    map_to_logits(rooms_.front(), last.data(), 1, logits);
  }

  void map_to_logits(Room& room, const Scalar* rows, Index n, Scalar* logits) const {
    const Index dim = model_.config().dim;
    const Index num_tokens = model_.config().num_tokens;
    map_rows(n, dim, rows, dim, num_tokens, logits, Base::at_once / count, room.in.data(),
             room.out.data(), [&](Index blocks, Scalar* in, Scalar* out) {
               project_rows(
                   model_.weights_->to_logits.weight(), blocks, n == 1, room.passing,
                   [&](Index b) {
                     Scalar* const x = in + b * dim * count;
                     model_.weights_->to_logits_norm.apply(x);
                     return x;
                   },
                   [&](Index, Index b) { return out + b * num_tokens * count; });
             });
  }

  LocalTransformer model_;
  std::vector<Room> rooms_;  // of each worker
};

template <typename Scalar, typename Storage, typename Arithmetic>
template <typename OnTokens>
Tensor<std::int64_t, 2> LocalTransformer<Scalar, Storage, Arithmetic>::generate(
    Tokens prompt, const GenerateConfig& config, OnTokens&& on_tokens) const {
  const auto [batch, prompted] = prompt.dimensions();
  if (!is_causal(this->config())) {
    if (!this->config().layers.empty())
      reject("layers", "causal ones, because a token is made of those before it", "others");
    reject("causal", "true, because a token is made of those before it", false);
  }
  if (batch < 1 || prompted < 1)
    reject("prompt", "at least 1 token in at least 1 sequence", to_string(prompt.dimensions()));
  const std::vector<Index>& lengths = config.prompt_lengths;
  if (!lengths.empty() && std::ssize(lengths) != batch)
    reject("prompt_lengths", std::to_string(batch) + ", one for each prompt", lengths.size());
  for (std::size_t b = 0; b < lengths.size(); ++b)
    if (lengths[b] < 1 || lengths[b] > prompted)
      reject("prompt_lengths[" + std::to_string(b) + "]", "1 to " + std::to_string(prompted),
             lengths[b]);
  detail::require_at_least("length", config.length, 0);
  if (config.stop_token &&
      (*config.stop_token < 0 || *config.stop_token >= this->config().num_tokens))
    reject("stop_token", "0 to " + std::to_string(this->config().num_tokens - 1),
           *config.stop_token);
  const auto length_of = [&, n = prompted](Index b) {
    return lengths.empty() ? n : lengths[static_cast<std::size_t>(b)];
  };
  check_tokens("prompt", prompt, length_of);
  Sampler sampler(config.sampling);
  std::vector<RandomSequence> random;
  random.reserve(static_cast<std::size_t>(batch));
  for (Index b = 0; b < batch; ++b) random.emplace_back(config.seed, static_cast<std::uint64_t>(b));

  Stream stream(*this, {.batch = batch});
  Tensor<std::int64_t, 2> next(batch, 1);
  const Index vocabulary = this->config().num_tokens;
  Tensor<Scalar, 3> logits(batch, 1, vocabulary);
  for (Index b = 0; b < batch; ++b) {
    const Index end = length_of(b);
    const Index begin = (std::max<Index>)(0, end - this->config().max_seq_len);
    stream.advance_to_last(b, prompt.data() + b * prompted + begin, end - begin, &logits(b, 0, 0));
  }

  std::vector<std::int64_t> made;
  std::vector<bool> stopped(static_cast<std::size_t>(batch), false);
  Index length = 0;
  while (length < config.length &&
         !std::all_of(stopped.begin(), stopped.end(), [](bool stop) { return stop; })) {
    if (length > 0) stream.push_into(logits, next);
    for (Index b = 0; b < batch; ++b) {
      const auto of_sequence = static_cast<std::size_t>(b);
      if (!stopped[of_sequence])
        next(b, 0) = sampler(&logits(b, 0, 0), vocabulary, random[of_sequence]);
      if (config.stop_token && next(b, 0) == *config.stop_token) stopped[of_sequence] = true;
    }
    made.insert(made.end(), next.data(), next.data() + batch);
    ++length;
    on_tokens(std::span<const std::int64_t>(next.data(), static_cast<std::size_t>(batch)));
  }
  Tensor<std::int64_t, 2> tokens(batch, length);
  for (Index i = 0; i < length; ++i)
    for (Index b = 0; b < batch; ++b) tokens(b, i) = made[static_cast<std::size_t>(i * batch + b)];
  return tokens;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
