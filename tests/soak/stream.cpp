// SPDX-License-Identifier: MIT
// Streams: however a sequence is cut, taken back, saved and loaded, or interrupted by a failure,
// each position gets what the whole sequence gives.
#include <limits>
#include <sstream>
#include <utility>

#include <local_mha/extern.hpp>

#include "reference/gradients.hpp"
#include "soak/attention_draw.hpp"
#include "soak/cases.hpp"
#include "soak/devices.hpp"
#include "soak/encoder_draw.hpp"
#include "soak/memory.hpp"
#include "soak/transformer_draw.hpp"

namespace soak {

namespace {

using local_mha::Encoder;
using local_mha::LocalAttention;
using local_mha::LocalMHA;
using local_mha::LocalTransformer;
using local_mha::PaddingMask;
using local_mha::StreamConfig;
using local_mha::Tensor;

/// Drives a stream. `Source` knows the sequence: it pushes some of it by push() or push_into(),
/// flushes, and compares what comes with what the whole sequence gives.
template <typename Source>
class StreamRun {
 public:
  using Stream = typename Source::Stream;

  StreamRun(Check& check, Random& random, Source& source)
      : check_(check), random_(random), source_(source) {
    config_.batch = source.batch();
    config_.max_rollback = random.chance(0.4) ? random.integer(0, 40) : 0;
    config_.max_threads = random.integer(1, most_threads);
  }

  void run() {
    Stream stream = source_.stream(config_);
    if (random_.chance(0.3)) {  // what another sequence left does not matter
      push(stream, 0, random_.integer(0, source_.seqlen()));
      stream.reset();
    }
    Index position = 0;
    const Index longest = random_.pick<Index>({1, 5, 20, 200});
    int backward_steps = 3;
    while (position < source_.seqlen() && !check_.found()) {
      const Index n = std::min<Index>(random_.integer(random_.chance(0.1) ? 0 : 1, longest),
                                      source_.seqlen() - position);
      if (random_.chance(0.08)) fail(stream, position, n);
      if (random_.chance(0.1))
        push_without_allocating(stream, position, position + n);
      else
        push(stream, position, position + n);
      position += n;
      if (random_.chance(0.1) && backward_steps-- > 0) position -= take_back(stream);
      if (random_.chance(0.05)) reload(stream);
    }
    flush(stream);
  }

 private:
  template <typename Call>
  void on_some_threads(Call&& call) {
    on_threads(random_.chance(0.5) ? 0 : draw_threads(random_), call);
  }

  void push(Stream& stream, Index begin, Index end) {
    const Index first = stream.answered(0);
    on_some_threads([&](const auto& device) {
      source_.compare(check_, source_.push(device, stream, begin, end), first);
    });
  }
  void push_without_allocating(Stream& stream, Index begin, Index end) {
    const Index first = stream.answered(0);
    long allocated = 0;
    const auto results = source_.push_into(stream, begin, end, allocated);
    source_.compare(check_, results, first);
    check_.equal("allocations of push_into()", allocated, 0L);
  }
  void flush(Stream& stream) {
    const Index first = stream.answered(0);
    on_some_threads(
        [&](const auto& device) { source_.compare(check_, source_.flush(device, stream), first); });
    check_.equal("answered when flushed", stream.answered(0), source_.seqlen());
  }

  Index take_back(Stream& stream) {
    const Index most = std::min(stream.most_rollback(), stream.position(0));
    // Promised is to go back from the furthest position, of which some may be taken back already.
    furthest_ = std::max(furthest_, stream.position(0));
    const Index promised = config_.max_rollback - (furthest_ - stream.position(0));
    check_.equal("can go back as promised", most >= std::min(promised, stream.position(0)), true);
    const Index n = random_.integer(0, most);
    stream.rollback(n);
    return n;
  }

  // Another stream goes on from a state.
  void reload(Stream& stream) {
    std::stringstream state;
    stream.save(state);
    Stream other = source_.stream(config_);
    other.load(state);
    stream = std::move(other);
  }

  // A push that runs out of memory leaves the stream as it was, or did all it should.
  void fail(Stream& stream, Index position, Index n) {
    const Index first = stream.answered(0);
    bool failed = false;
    on_some_threads([&](const auto& device) {
      fail_after(random_.integer(0, 6));
      try {
        const auto results = source_.push(device, stream, position, position + n);
        fail_no_more();
        furthest_ = std::max(furthest_, position + n);
        source_.compare(check_, results, first);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      fail_no_more();
    });
    if (failed)
      check_.equal("position after a push that failed", stream.position(0), position);
    else
      stream.rollback(std::min(n, stream.most_rollback()));
    if (!failed && stream.position(0) != position) {  // cannot go back: anew
      stream.reset();
      furthest_ = 0;
      push(stream, 0, position);
    }
  }

  Check& check_;
  Random& random_;
  Source& source_;
  StreamConfig config_;
  Index furthest_ = 0;
};

/// Flags of positions `[begin, end)`.
inline PaddingMask part_of_mask(const std::vector<unsigned char>& masked, Index batch, Index n,
                                Index begin, Index end) {
  if (masked.empty()) return {};
  std::vector<unsigned char> part;
  for (Index b = 0; b < batch; ++b)
    for (Index i = begin; i < end; ++i) part.push_back(masked[static_cast<std::size_t>(b * n + i)]);
  if (part.empty()) return {};
  return support::padding_mask(part, batch, end - begin);
}

template <typename Scalar>
class AttentionSource {
 public:
  using Stream = typename LocalAttention<Scalar>::Stream;

  explicit AttentionSource(Random& random)
      : draw_(draw_attention<Scalar>(random, Arrival::BitByBit)) {
    draw_.call.training.reset();
    attention_.emplace(draw_.config);
    expected_ = expected_of<Scalar>(draw_).out;
    bias_ = support::bias_tensor<Scalar>(draw_.bias);
    relative_bias_ = support::optional_tensor<Scalar, 2>(draw_.relative_bias);
    sinks_ = support::optional_tensor<Scalar, 1>(draw_.sinks);
  }

  std::string description() const { return "attention, " + describe(draw_); }
  Index batch() const { return draw_.batch(); }
  Index seqlen() const { return draw_.seqlen(); }
  Stream stream(const StreamConfig& config) const {
    auto call = support::attention_call<Scalar>(draw_.call, {}, support::optional_view(bias_));
    call.relative_bias = support::optional_view(relative_bias_);
    call.sinks = support::optional_view(sinks_);
    return Stream(*attention_, draw_.heads(), draw_.dim_head(), config, call, draw_.kv_heads());
  }

  template <typename Device>
  Tensor<Scalar, 4> push(const Device& device, Stream& stream, Index begin, Index end) const {
    return stream.push(
        rows(draw_.q, begin, end), rows(draw_.k, begin, end), rows(draw_.v, begin, end),
        {.mask = part_of_mask(draw_.masked, batch(), seqlen(), begin, end), .device = device});
  }
  Tensor<Scalar, 4> push_into(Stream& stream, Index begin, Index end, long& allocated) const {
    const auto q = rows(draw_.q, begin, end), k = rows(draw_.k, begin, end),
               v = rows(draw_.v, begin, end);
    const auto mask = part_of_mask(draw_.masked, batch(), seqlen(), begin, end);
    Tensor<Scalar, 4> out(batch(), draw_.heads(), stream.results_of(end - begin), draw_.dim_head());
    allocated = allocations_of([&] { stream.push_into(out, q, k, v, {.mask = mask}); });
    return out;
  }
  template <typename Device>
  Tensor<Scalar, 4> flush(const Device& device, Stream& stream) const {
    return stream.flush(device);
  }
  void compare(Check& check, const Tensor<Scalar, 4>& got, Index first) const {
    for (Index b = 0; b < got.dimension(0); ++b)
      for (Index h = 0; h < got.dimension(1); ++h)
        for (Index i = 0; i < got.dimension(2); ++i)
          for (Index c = 0; c < got.dimension(3); ++c)
            check.compare("out", expected_.offset(b, h, first + i, c), got(b, h, i, c),
                          expected_(b, h, first + i, c));
  }

 private:
  Tensor<Scalar, 4> rows(const Array<double>& from, Index begin, Index end) const {
    const Index heads = from.shape[1];
    Tensor<Scalar, 4> to(batch(), heads, end - begin, draw_.dim_head());
    for (Index b = 0; b < batch(); ++b)
      for (Index h = 0; h < heads; ++h)
        for (Index i = begin; i < end; ++i)
          for (Index c = 0; c < draw_.dim_head(); ++c)
            to(b, h, i - begin, c) = static_cast<Scalar>(from(b, h, i, c));
    return to;
  }

  AttentionDraw draw_;
  std::optional<LocalAttention<Scalar>> attention_;
  Array<Bounded<Scalar>> expected_;
  Tensor<Scalar, 3> bias_;
  Tensor<Scalar, 2> relative_bias_;
  Tensor<Scalar, 1> sinks_;
};

/// Rows `[first, …)` of `[B, N, channels]`.
template <typename Scalar>
void compare_rows(Check& check, const char* what, const Tensor<Scalar, 3>& got, Index first,
                  const Array<Bounded<Scalar>>& expected) {
  for (Index b = 0; b < got.dimension(0); ++b)
    for (Index i = 0; i < got.dimension(1); ++i)
      for (Index c = 0; c < got.dimension(2); ++c)
        check.compare(what, expected.offset(b, first + i, c), got(b, i, c),
                      expected(b, first + i, c));
}

/// Rows that come with a mask, and the results of the whole sequence.
template <typename Scalar, typename StreamOfRows>
class RowsSource {
 public:
  using Stream = StreamOfRows;

  Index batch() const { return x_.shape[0]; }
  Index seqlen() const { return x_.shape[1]; }
  template <typename Device>
  Tensor<Scalar, 3> push(const Device& device, Stream& stream, Index begin, Index end) const {
    return stream.push(rows(begin, end), {.mask = mask(begin, end), .device = device});
  }
  Tensor<Scalar, 3> push_into(Stream& stream, Index begin, Index end, long& allocated) const {
    const auto x = rows(begin, end);
    const auto masked = mask(begin, end);
    Tensor<Scalar, 3> y(batch(), stream.results_of(end - begin), x_.shape[2]);
    allocated = allocations_of([&] { stream.push_into(y, x, {.mask = masked}); });
    return y;
  }
  template <typename Device>
  Tensor<Scalar, 3> flush(const Device& device, Stream& stream) const {
    return stream.flush(device);
  }
  void compare(Check& check, const Tensor<Scalar, 3>& got, Index first) const {
    compare_rows(check, "y", got, first, expected_);
  }

 protected:
  void take(Array<double> x, std::vector<unsigned char> masked, Array<Bounded<Scalar>> expected) {
    x_ = std::move(x);
    masked_ = std::move(masked);
    expected_ = std::move(expected);
  }

 private:
  PaddingMask mask(Index begin, Index end) const {
    return part_of_mask(masked_, batch(), seqlen(), begin, end);
  }
  Tensor<Scalar, 3> rows(Index begin, Index end) const {
    Tensor<Scalar, 3> rows(batch(), end - begin, x_.shape[2]);
    for (Index b = 0; b < batch(); ++b)
      for (Index i = begin; i < end; ++i)
        for (Index c = 0; c < rows.dimension(2); ++c)
          rows(b, i - begin, c) = static_cast<Scalar>(x_(b, i, c));
    return rows;
  }

  Array<double> x_;
  std::vector<unsigned char> masked_;
  Array<Bounded<Scalar>> expected_;
};

template <typename Scalar>
class LayerSource : public RowsSource<Scalar, typename LocalMHA<Scalar>::Stream> {
 public:
  using typename RowsSource<Scalar, typename LocalMHA<Scalar>::Stream>::Stream;

  explicit LayerSource(Random& random) : draw_(draw_layer<Scalar>(random, Arrival::BitByBit)) {
    draw_.training.reset();
    auto parameters = local_mha::LocalMHAParameters<Scalar>::zeros(draw_.config);
    support::assign(parameters, draw_.parameters);
    layer_.emplace(draw_.config, std::move(parameters));
    this->take(draw_.x, draw_.masked,
               reference::local_mha(options_of<Scalar>(draw_), exact<Scalar>(draw_.parameters),
                                    inputs_of<Scalar>(draw_))
                   .y);
    bias_ = support::bias_tensor<Scalar>(draw_.bias);
  }

  std::string description() const { return "layer, " + describe(draw_); }
  Stream stream(const StreamConfig& config) const {
    return Stream(*layer_, config, support::optional_view(bias_));
  }

 private:
  LayerDraw draw_;
  std::optional<LocalMHA<Scalar>> layer_;
  Tensor<Scalar, 3> bias_;
};

template <typename Scalar>
class EncoderSource : public RowsSource<Scalar, typename Encoder<Scalar>::Stream> {
 public:
  using typename RowsSource<Scalar, typename Encoder<Scalar>::Stream>::Stream;

  explicit EncoderSource(Random& random)
      : draw_(draw_encoder<Scalar>(random)), encoder_(draw_.of.template encoder<Scalar>()) {
    draw_.lengths.clear();
    auto unused = reference::zeros_like(exact<Scalar>(draw_.of.parameters));
    this->take(draw_.of.x, draw_.of.masked, expected_of<Scalar>(draw_, unused).first);
  }

  std::string description() const { return "encoder, " + describe(draw_); }
  Stream stream(const StreamConfig& config) const { return Stream(encoder_, config); }

 private:
  EncoderDraw draw_;
  Encoder<Scalar> encoder_;
};

template <typename Scalar>
class TransformerSource {
 public:
  using Stream = typename LocalTransformer<Scalar>::Stream;

  explicit TransformerSource(Random& random) : draw_(draw_transformer<Scalar>(random)) {
    draw_.lengths.clear();
    auto parameters = local_mha::LocalTransformerParameters<Scalar>::zeros(draw_.config);
    support::assign(parameters, draw_.parameters);
    model_.emplace(draw_.config, std::move(parameters));
    expected_ =
        reference::transformer_logits(transformer_options<Scalar>(draw_.config),
                                      exact<Scalar>(draw_.parameters), draw_.tokens, draw_.masked);
  }

  std::string description() const { return "transformer, " + describe(draw_); }
  Index batch() const { return draw_.batch(); }
  Index seqlen() const { return draw_.seqlen(); }
  Stream stream(const StreamConfig& config) const { return Stream(*model_, config); }
  template <typename Device>
  Tensor<Scalar, 3> push(const Device& device, Stream& stream, Index begin, Index end) const {
    return stream.push(
        rows(begin, end),
        {.mask = part_of_mask(draw_.masked, batch(), seqlen(), begin, end), .device = device});
  }
  Tensor<Scalar, 3> push_into(Stream& stream, Index begin, Index end, long& allocated) const {
    const auto tokens = rows(begin, end);
    const auto mask = part_of_mask(draw_.masked, batch(), seqlen(), begin, end);
    Tensor<Scalar, 3> logits(batch(), stream.results_of(end - begin), draw_.config.num_tokens);
    allocated = allocations_of([&] { stream.push_into(logits, tokens, {.mask = mask}); });
    return logits;
  }
  template <typename Device>
  Tensor<Scalar, 3> flush(const Device& device, Stream& stream) const {
    return stream.flush(device);
  }
  void compare(Check& check, const Tensor<Scalar, 3>& got, Index first) const {
    compare_rows(check, "logits", got, first, expected_);
  }

 private:
  Tensor<std::int64_t, 2> rows(Index begin, Index end) const {
    Tensor<std::int64_t, 2> tokens(batch(), end - begin);
    for (Index b = 0; b < batch(); ++b)
      for (Index i = begin; i < end; ++i) tokens(b, i - begin) = draw_.tokens(b, i);
    return tokens;
  }

  TransformerDraw draw_;
  std::optional<LocalTransformer<Scalar>> model_;
  Array<Bounded<Scalar>> expected_;
};

template <typename Source>
void drive(Check& check, Random& random) {
  Source source(random);
  check.description = source.description();
  StreamRun<Source>(check, random, source).run();
}

template <typename Scalar>
void stream_run(Check& check, Random& random) {
  const double kind = random.uniform();
  if (kind < 0.4)
    drive<AttentionSource<Scalar>>(check, random);
  else if (kind < 0.75)
    drive<LayerSource<Scalar>>(check, random);
  else if (kind < 0.87)
    drive<EncoderSource<Scalar>>(check, random);
  else
    drive<TransformerSource<Scalar>>(check, random);
}

}  // namespace

void stream_case(Check& check, Random& random) {
  if (random.chance(0.7))
    stream_run<float>(check, random);
  else
    stream_run<double>(check, random);
}

}  // namespace soak
