// SPDX-License-Identifier: MIT
/// \file
/// The stream of LocalTransformer: tokens that come bit by bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/streaming/sequence_stream.hpp>
#include <local_mha/transformer.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// The last rows of a residual stream that wait for the attention's results, and their mask.
template <typename Scalar>
class WaitingRows {
 public:
  /// \param wait rows stay for later calls; else each is needed at once
  WaitingRows(Index dim, Index capacity, bool wait)
      : dim_(dim),
        capacity_(capacity),
        wait_(wait),
        rows_(make_block_buffer<Scalar>(dim * capacity)),
        masked_(static_cast<std::size_t>(capacity), 0) {}

  void put(Index row, const Scalar* x, std::uint8_t masked) {
    std::copy(x, x + dim_, rows_.data() + row % capacity_ * dim_);
    masked_[static_cast<std::size_t>(row % capacity_)] = masked;
    oldest_ = (std::max)(oldest_, row + 1 - capacity_);
  }
  const Scalar* row(Index row) const { return rows_.data() + row % capacity_ * dim_; }
  std::uint8_t masked(Index row) const {
    return masked_[static_cast<std::size_t>(row % capacity_)];
  }
  /// Whether all rows from `begin` on are there: if so, all from any later one on are, too.
  bool hold(Index begin) const { return !wait_ || begin >= oldest_; }
  void reset() { oldest_ = 0; }

  /// \param end one past the last row
  void save(Index end, StateWriter& to) const {
    const Index begin = wait_ ? oldest_ : end;
    to.put(static_cast<std::int64_t>(begin));
    for (Index i = begin; i < end; ++i) {
      to.put(row(i), dim_);
      to.put(masked(i));
    }
  }
  /// \param rows that must be there
  void load(const Range& rows, StateReader& from) {
    oldest_ = 0;
    const Index begin = from.get_index(0, rows.end);
    std::vector<Scalar> x(static_cast<std::size_t>(dim_));
    for (Index i = begin; i < rows.end; ++i) {
      from.get(x.data(), dim_);
      put(i, x.data(), from.get<std::uint8_t>());
    }
    oldest_ = (std::max)(oldest_, begin);
    if (!hold(rows.begin)) reject("state", "all rows that wait for the attention", "less");
  }

 private:
  Index dim_;
  Index capacity_;
  bool wait_;
  BlockBuffer<Scalar> rows_;
  std::vector<std::uint8_t> masked_;
  Index oldest_ = 0;
};

/// A sequence on its way through all layers.
template <typename Scalar>
class StreamedModel {
 public:
  struct Layer {
    StreamedSequence<Scalar> attention;
    WaitingRows<Scalar> residual;
  };

  explicit StreamedModel(std::vector<Layer> layers) : layers_(std::move(layers)) {}

  std::vector<Layer>& layers() { return layers_; }
  Index position() const { return position_; }
  Index answered() const {
    return layers_.empty() ? position_ : layers_.back().attention.answered();
  }
  Index complete(Index positions) const {
    for (const Layer& layer : layers_) positions = layer.attention.complete(positions);
    return positions;
  }
  bool ended() const { return ended_; }
  void take(Index n) { position_ += n; }
  void end() { ended_ = true; }

  void reset() {
    position_ = 0;
    ended_ = false;
    for (Layer& layer : layers_) {
      layer.attention.reset();
      layer.residual.reset();
    }
  }

  Index most_rollback() const {
    return largest_rollback(position_, [&](Index n) {
      Index position = position_ - n;
      for (const Layer& layer : layers_) {
        const Index next = layer.attention.complete(position);
        if (!layer.attention.holds(position) || !layer.residual.hold(next)) return false;
        position = next;
      }
      return true;
    });
  }
  void rollback(Index n) {
    position_ -= n;
    ended_ = false;
    Index position = position_;
    for (Layer& layer : layers_) {
      layer.attention.rollback(layer.attention.position() - position);
      position = layer.attention.complete(position);
    }
  }

  void save(StateWriter& to) const {
    to.put(static_cast<std::int64_t>(position_));
    to.put(static_cast<std::int64_t>(ended_));
    for (const Layer& layer : layers_) {
      layer.attention.save(to);
      layer.residual.save(layer.attention.position(), to);
    }
  }
  void load(StateReader& from) {
    position_ = from.get_index(0, last_position);
    ended_ = from.get_index(0, 1) != 0;
    Index expected = position_;
    for (Layer& layer : layers_) {
      layer.attention.load(from);
      if (layer.attention.position() != expected || layer.attention.ended() != ended_)
        reject("state", "layers that fit together", "others");
      expected = layer.attention.answered();
      layer.residual.load({expected, layer.attention.position()}, from);
    }
  }

 private:
  std::vector<Layer> layers_;
  Index position_ = 0;
  bool ended_ = false;
};

}  // namespace detail

/// Sequences of tokens that come in chunks of any size, and give at every position the logits that
/// forward() of the whole sequence gives; see LocalMHA::Stream, whose guarantees hold here, too.
///
/// There is no longest sequence: past max_seq_len, the position embedding stays at its last row, as
/// in the Python package's cached generation. The model was not trained for that; see
/// is_past_max_seq_len().
template <typename Scalar>
class LocalTransformer<Scalar>::Stream
    : public SequenceStream<Scalar, detail::StreamedModel<Scalar>> {
  using Sequence = detail::StreamedModel<Scalar>;
  using Base = SequenceStream<Scalar, Sequence>;

 public:
  /// \param model the stream shares its weights, and goes on with them whatever becomes of it
  /// \throws std::invalid_argument naming the member that does not fit
  explicit Stream(const LocalTransformer& model, const StreamConfig& config = {})
      : Base(config, describe(model)), model_(model) {
    const LocalMHAConfig layer = layer_config(model.config());
    const Window window(attention_config(layer));
    // Where whole windows become complete at once, each layer may move by a window more.
    const bool in_windows = window.complete(window.size() + window.ahead()) !=
                            window.complete(window.size() + window.ahead() - 1) + 1;
    const Index jump = in_windows ? window.size() - 1 : 0;
    std::vector<typename Sequence::Layer> layers;
    for (Index i = 0; i < model.config().depth; ++i) {
      // At its end, a sequence is further on in this layer than it would be else.
      const Index rollback = config.max_rollback + i * window.reach_ahead();
      layers.push_back(
          {detail::StreamedSequence<Scalar>(
               window, {layer.heads, layer.dim_head, layer.gate_values_per_head},
               LocalMHA<Scalar>::stretch, rollback),
           detail::WaitingRows<Scalar>(
               layer.dim, window.reach_ahead() + rollback + rows_at_once(window, i, jump),
               window.reach_ahead() > 0)});
    }
    this->sequences_.assign(static_cast<std::size_t>(config.batch), Sequence(std::move(layers)));
    workers_.assign(static_cast<std::size_t>((std::min)(config.batch, config.max_threads)),
                    Worker(model, window, rows_at_once(window, model.config().depth, jump)));
  }
  Stream(const Stream&) = default;
  Stream(Stream&&) = default;
  Stream& operator=(const Stream& other) { return *this = Stream(other); }
  Stream& operator=(Stream&&) = default;
  ~Stream() = default;

  /// Takes the next `n >= 0` tokens of every sequence.
  /// \param tokens `[B, n]`, each in `[0, num_tokens)`
  /// \param mask those positions that nobody attends, `[B, n]`
  /// \return the logits that are complete, `[B, results_of(n), num_tokens]`. 0 in rows beyond a
  ///         sequence's own
  /// \throws std::invalid_argument naming the argument that does not fit, before anything changes
  Tensor<Scalar, 3> push(Tokens tokens, const PaddingMask& mask = {}) {
    return push(Eigen::DefaultDevice(), tokens, mask);
  }
  /// The same on the threads of a device, a sequence on each; the same bits for any number of them.
  template <ThreadDevice Device>
  Tensor<Scalar, 3> push(const Device& device, Tokens tokens, const PaddingMask& mask = {}) {
    check_arguments(tokens, mask);
    Tensor<Scalar, 3> logits(this->batch(), this->results_of(tokens.dimension(1)),
                             model_.config().num_tokens);
    logits.setZero();
    push_into(device, logits, tokens, mask);
    return logits;
  }
  /// The same into given memory.
  /// \param logits `[B, results_of(n), num_tokens]`. Rows beyond a sequence's own stay
  template <ThreadDevice Device>
  void push_into(const Device& device, TensorView<Scalar, 3> logits, Tokens tokens,
                 const PaddingMask& mask = {}) {
    check_arguments(tokens, mask);
    const Index n = tokens.dimension(1);
    check_room(logits, this->results_of(n));
    run(device, logits, [&](Worker& worker, Sequence& sequence, Index b, Scalar* to) {
      advance(worker, sequence, tokens.data() + b * n, n, mask.row(b), to);
    });
  }
  void push_into(TensorView<Scalar, 3> logits, Tokens tokens, const PaddingMask& mask = {}) {
    push_into(Eigen::DefaultDevice(), logits, tokens, mask);
  }

  /// Ends every sequence: nothing follows, and the positions that wait get their logits. Until
  /// reset() or rollback(), a sequence takes no more.
  /// \return `[B, results_of_flush(), num_tokens]`, as push() does
  Tensor<Scalar, 3> flush() { return flush(Eigen::DefaultDevice()); }
  template <ThreadDevice Device>
  Tensor<Scalar, 3> flush(const Device& device) {
    Tensor<Scalar, 3> logits(this->batch(), this->results_of_flush(), model_.config().num_tokens);
    logits.setZero();
    flush_into(device, logits);
    return logits;
  }
  template <ThreadDevice Device>
  void flush_into(const Device& device, TensorView<Scalar, 3> logits) {
    check_room(logits, this->results_of_flush());
    run(device, logits, [&](Worker& worker, Sequence& sequence, Index, Scalar* to) {
      if (sequence.ended()) return;
      pass(worker, sequence, 0, true, to);
      sequence.end();
    });
  }
  void flush_into(TensorView<Scalar, 3> logits) { flush_into(Eigen::DefaultDevice(), logits); }

  /// True if a sequence is longer than the position embedding.
  bool is_past_max_seq_len() const {
    for (const Sequence& sequence : this->sequences_)
      if (sequence.position() > model_.config().max_seq_len) return true;
    return false;
  }

 private:
  friend LocalTransformer;

  static constexpr Index count = block_rows<Scalar>;
  // Tokens that pass the layers together.
  static constexpr Index at_once = LocalMHA<Scalar>::stretch * count;

  // Rows that layer `i` gets or gives at once, at most.
  static Index rows_at_once(const Window& window, Index i, Index jump) {
    return (std::max)(at_once + i * jump, (i + 1) * window.reach_ahead()) + 1;
  }

  // Room for one sequence at a time.
  struct Worker {
    Worker(const LocalTransformer& model, const Window& window, Index rows)
        : x(make_block_buffer<Scalar>(rows * model.config().dim)),
          branch(x),
          in(make_block_buffer<Scalar>(at_once * model.config().dim)),
          out(make_block_buffer<Scalar>(at_once * model.config().num_tokens)),
          spread(make_block_buffer<Scalar>(spread_size(model.weights_->to_logits.weight()))),
          masked(static_cast<std::size_t>(rows), 0) {
      if (model.layers().empty()) return;
      flows.emplace_back(*model.layers().front().attention.weights_, window,
                         (std::numeric_limits<Index>::max)());
      feed_forward = typename FeedForward<Scalar>::Workspace(model.layers().front().feed_forward);
    }

    BlockBuffer<Scalar> x;       // rows of the residual stream
    BlockBuffer<Scalar> branch;  // what a layer adds to them
    BlockBuffer<Scalar> in;
    BlockBuffer<Scalar> out;
    BlockBuffer<Scalar> spread;
    std::vector<std::uint8_t> masked;
    std::vector<typename LocalMHA<Scalar>::Flow>
        flows;  // one for all layers; none if there are none
    typename FeedForward<Scalar>::Workspace feed_forward;
  };

  static std::string describe(const LocalTransformer& model) {
    const LocalTransformerConfig& config = model.config();
    const LocalAttention<Scalar> attention(attention_config(layer_config(config)));
    std::ostringstream text = detail::plain_text();
    text << std::boolalpha << "LocalTransformer, depth " << config.depth << ", dim " << config.dim
         << ", num_tokens " << config.num_tokens << ", max_seq_len " << config.max_seq_len
         << ", ff_mult " << config.ff_mult << ", heads " << config.heads << ", dim_head "
         << config.dim_head << ", qk_rmsnorm " << config.qk_rmsnorm << ", gates "
         << config.gate_values_per_head << ", "
         << detail::description_of(attention, Window(attention.config()), model.attn_bias());
    return text.str();
  }

  void check_arguments(const Tokens& tokens, const PaddingMask& mask) const {
    require_shape("tokens", tokens.dimensions(), {this->batch(), -1});
    model_.check_tokens(tokens);
    this->check_push(tokens.dimension(1), mask);
  }
  void check_room(const TensorView<Scalar, 3>& logits, Index rows) const {
    require_shape("logits", logits.dimensions(), {this->batch(), rows, model_.config().num_tokens});
  }

  template <typename Device, typename Task>
  void run(const Device& device, const TensorView<Scalar, 3>& logits, Task&& task) {
    const Index workers = (std::min)(thread_count(device), static_cast<Index>(workers_.size()));
    parallel_for(device, workers, this->batch(), [&](Index worker, Index b) {
      task(workers_[static_cast<std::size_t>(worker)],
           this->sequences_[static_cast<std::size_t>(b)], b,
           logits.data() + b * logits.dimension(1) * logits.dimension(2));
    });
  }

  void embed(Worker& worker, const Sequence& sequence, const std::int64_t* tokens, Index n) const {
    const Parameters& p = model_.parameters();
    const Index dim = model_.config().dim;
    for (Index i = 0; i < n; ++i) {
      const Index place = (std::min)(sequence.position() + i, model_.config().max_seq_len - 1);
      for (Index c = 0; c < dim; ++c)
        worker.x[static_cast<std::size_t>(i * dim + c)] =
            p.token_emb(tokens[i], c) + p.pos_emb(place, c);
    }
  }

  // The next `n` tokens of a sequence.
  // \param masked a flag for each; null: none is masked
  void advance(Worker& worker, Sequence& sequence, const std::int64_t* tokens, Index n,
               const std::uint8_t* masked, Scalar* logits) const {
    for (Index i = 0; i < n;) {
      // Up to the end of a block, so that the next stretch is of whole ones.
      const Index until = (sequence.position() + at_once) / count * count;
      const Index some = (std::min)(n - i, until - sequence.position());
      embed(worker, sequence, tokens + i, some);
      if (masked != nullptr)
        std::copy(masked + i, masked + i + some, worker.masked.begin());
      else
        std::fill_n(worker.masked.begin(), some, std::uint8_t{0});
      logits += pass(worker, sequence, some, false, logits) * model_.config().num_tokens;
      i += some;
    }
  }
  // The same of sequence `b` alone.
  void advance(Index b, const std::int64_t* tokens, Index n, Scalar* logits) {
    advance(workers_.front(), this->sequences_[static_cast<std::size_t>(b)], tokens, n, nullptr,
            logits);
  }

  // Takes `n` rows of worker.x through all layers. Returns the rows of logits that came out.
  Index pass(Worker& worker, Sequence& sequence, Index n, bool ends, Scalar* logits) const;

  void add_branch(Worker& worker, Index n) const {
    for (Index i = 0; i < n * model_.config().dim; ++i)
      worker.x[static_cast<std::size_t>(i)] += worker.branch[static_cast<std::size_t>(i)];
  }

  LocalTransformer model_;
  std::vector<Worker> workers_;
};

template <typename Scalar>
Index LocalTransformer<Scalar>::Stream::pass(Worker& worker, Sequence& sequence, Index n, bool ends,
                                             Scalar* logits) const {
  const Index dim = model_.config().dim;
  const LocalMHAConfig config = layer_config(model_.config());
  const detail::AttentionInputs<Scalar> shown(Window(attention_config(config)), 1, config.heads,
                                              model_.attn_bias());
  sequence.take(n);
  auto* state = sequence.layers().data();
  for (const Layer& layer : model_.layers()) {
    detail::StreamedSequence<Scalar>& attention = state->attention;
    detail::WaitingRows<Scalar>& residual = state->residual;
    ++state;
    const Range in{attention.position(), attention.position() + n};
    const Range out{attention.answered(), ends ? in.end : attention.complete(in.end)};
    for (Index i = 0; i < n; ++i)
      residual.put(in.begin + i, worker.x.data() + i * dim,
                   worker.masked[static_cast<std::size_t>(i)]);
    layer.attention.stream_rows(
        Eigen::DefaultDevice(), worker.flows.front(), attention, shown, 0, in, out, worker.x.data(),
        worker.masked.data(), worker.branch.data(),
        [&](Index rows) { return ends && rows == in.end ? in.end : attention.complete(rows); });
    if (ends) attention.end();
    n = out.end - out.begin;
    for (Index i = 0; i < n; ++i) {
      std::copy_n(residual.row(out.begin + i), dim, worker.x.data() + i * dim);
      worker.masked[static_cast<std::size_t>(i)] = residual.masked(out.begin + i);
    }
    add_branch(worker, n);
    layer.feed_forward.forward_into(n, worker.x.data(), dim, worker.branch.data(),
                                    worker.feed_forward);
    add_branch(worker, n);
  }
  map_rows(n, dim, worker.x.data(), dim, model_.config().num_tokens, logits,
           LocalMHA<Scalar>::stretch, worker.in.data(), worker.out.data(),
           [&](Index blocks, Scalar* rows, Scalar* to) {
             for (Index b = 0; b < blocks; ++b)
               model_.weights_->to_logits_norm.apply(rows + b * dim * count);
             project_rows(model_.weights_->to_logits.weight(), 0, rows, blocks, n == 1,
                          worker.spread.data(),
                          [&](Index b) { return to + b * model_.config().num_tokens * count; });
           });
  return n;
}

template <typename Scalar>
template <typename OnTokens>
Tensor<std::int64_t, 2> LocalTransformer<Scalar>::generate(Tokens prompt,
                                                           const GenerateConfig& config,
                                                           OnTokens&& on_tokens) const {
  const auto [batch, prompted] = prompt.dimensions();
  if (!this->config().causal)
    reject("causal", "true, because a token is made of those before it", false);
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
  check_tokens(prompt, length_of);
  Sampler sampler(config.sampling);
  std::vector<RandomSequence> random;
  random.reserve(static_cast<std::size_t>(batch));
  for (Index b = 0; b < batch; ++b) random.emplace_back(config.seed, static_cast<std::uint64_t>(b));

  Stream stream(*this, {.batch = batch});
  constexpr Index at_once = 256;
  Tensor<std::int64_t, 2> next(batch, 1);
  const Index vocabulary = this->config().num_tokens;
  Tensor<Scalar, 2> of_prompt((std::min)(at_once, prompted), vocabulary);
  Tensor<Scalar, 3> logits(batch, 1, vocabulary);
  for (Index b = 0; b < batch; ++b) {
    const Index end = length_of(b);
    Index n = 0;
    for (Index i = (std::max<Index>)(0, end - this->config().max_seq_len); i < end; i += n) {
      n = (std::min)(at_once, end - i);
      stream.advance(b, prompt.data() + b * prompted + i, n, of_prompt.data());
    }
    std::copy_n(&of_prompt(n - 1, 0), vocabulary, &logits(b, 0, 0));
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
