// SPDX-License-Identifier: MIT
/// \file
/// What a call sees of its sequences: checked once, then asked for each head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include <local_mha/attention/head.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// \param lengths rows of each sequence of a batch `[batch, seqlen]`; empty: all
/// \param packed whether the batch is one of packed sequences
/// \throws std::invalid_argument if they are not
inline void check_lengths(std::span<const Index> lengths, Index batch, Index seqlen, bool packed) {
  if (lengths.empty()) return;
  if (packed) reject("lengths", "none beside cu_seqlens", "some");
  if (static_cast<Index>(lengths.size()) != batch)
    reject("lengths", std::to_string(batch) + " (batch) numbers", lengths.size());
  for (std::size_t b = 0; b < lengths.size(); ++b)
    if (lengths[b] < 0 || lengths[b] > seqlen)
      reject("lengths[" + std::to_string(b) + "]", "0 to " + std::to_string(seqlen), lengths[b]);
}

/// Rejects borders of packed sequences that are none.
inline void check_cu_seqlens(std::span<const Index> cu_seqlens, Index batch, Index seqlen) {
  if (cu_seqlens.empty()) return;
  if (batch != 1) reject("cu_seqlens", "none unless the batch is 1", "a batch of ", batch);
  if (cu_seqlens.front() != 0) reject("cu_seqlens", "0 at first", cu_seqlens.front());
  for (std::size_t s = 1; s < cu_seqlens.size(); ++s)
    if (cu_seqlens[s] < cu_seqlens[s - 1])
      reject("cu_seqlens", "numbers that never fall", cu_seqlens[s], " after ", cu_seqlens[s - 1]);
  if (cu_seqlens.back() != seqlen)
    reject("cu_seqlens", std::to_string(seqlen) + " (rows) at last", cu_seqlens.back());
}

/// What queries see of a sequence of which only a part is here.
struct SequencePart {
  /// Keys that the window shows to the queries that are here, first keys apart, counted in the
  /// sequence.
  Range keys;
  /// Flags of the keys from row `masked_begin` on, as far as `keys` goes, 1 = masked; null: none
  /// is, of the whole sequence.
  const std::uint8_t* masked = nullptr;
  Index masked_begin = 0;
  /// No key of the whole sequence outside of it is unmasked.
  Range unmasked;
  /// Flags of first keys; null: none is masked.
  const std::uint8_t* first_masked = nullptr;
};

/// The sequences of a batch, or the segments of a packed one, their heads, and what their queries
/// see.
template <typename Scalar>
class AttentionInputs {
 public:
  using Bias = std::optional<TensorView<const Scalar, 3>>;
  using Sinks = std::optional<TensorView<const Scalar, 1>>;

  /// \param mask must outlive this
  /// \throws std::invalid_argument if the mask or the bias does not fit
  AttentionInputs(const Window& window, Index batch, Index heads, Index seqlen,
                  const PaddingMask& mask, const Bias& attn_bias)
      : AttentionInputs(window, batch, heads, attn_bias) {
    seqlen_ = seqlen;
    mask_ = &mask;
    if (mask) require_shape("mask", mask.shape(), {batch, seqlen});
  }

  /// Of streams, whose rows and masks come bit by bit.
  AttentionInputs(const Window& window, Index batch, Index heads, const Bias& attn_bias)
      : window_(window), batch_(batch), heads_(heads), kv_heads_(heads), attn_bias_(attn_bias) {
    if (!attn_bias) return;
    require_shape("attn_bias", attn_bias->dimensions(), {-1, window.size(), window.look_around()});
    const Index biases = attn_bias->dimension(0);
    const bool divides = biases > 0 && batch > 0 && heads > 0 && batch * heads % biases == 0;
    if (!divides && biases != heads && biases != 1)
      reject("attn_bias",
             "a first dimension that divides " + std::to_string(batch * heads) +
                 " (batch x heads), such as " + std::to_string(heads) + " (heads) or 1",
             biases);
  }

  /// Heads that adjoin read one head of keys and values.
  /// \throws std::invalid_argument unless the heads divide
  void share_keys(Index kv_heads) {
    if (kv_heads < 0 || (kv_heads == 0) != (heads_ == 0) ||
        (kv_heads > 0 && heads_ % kv_heads != 0))
      reject("k", "a number of heads that divides those of q, " + std::to_string(heads_), kv_heads);
    kv_heads_ = kv_heads;
  }

  /// \param sinks `[heads]`, must outlive this
  /// \throws std::invalid_argument if it has another shape
  void add_sinks(const Sinks& sinks) {
    if (!sinks) return;
    require_shape("sinks", sinks->dimensions(), {heads_});
    add_sinks(sinks->data());
  }
  void add_sinks(const Scalar* sinks) { sinks_ = sinks; }

  /// Rows are segments `[cu_seqlens[s], cu_seqlens[s + 1])`, each a sequence of its own.
  /// \param cu_seqlens empty: no segments; must outlive this
  /// \throws std::invalid_argument if that is not what they are
  void cut(std::span<const Index> cu_seqlens) {
    check_cu_seqlens(cu_seqlens, batch_, seqlen_);
    cu_seqlens_ = cu_seqlens;
  }

  /// Of each item of the batch, only the first rows are its sequence.
  /// \param lengths `[batch]`; empty: all rows are; must outlive this
  /// \throws std::invalid_argument if that is not what they are
  void shorten(std::span<const Index> lengths) {
    check_lengths(lengths, batch_, seqlen_, packed());
    lengths_ = lengths;
  }

  /// Rows that everyone sees, and that see everyone of their sequence.
  /// \param global `[batch, seqlen]`, true = global; must outlive this
  /// \throws std::invalid_argument if it has another shape
  void add_global(const std::optional<TensorView<const bool, 2>>& global) {
    if (!global) return;
    require_shape("global_rows", global->dimensions(), {batch_, seqlen_});
    global_ = global->data();
  }

  /// Of each item of the batch, only some rows are here: their queries attend, and what these see
  /// of other rows is at hand elsewhere. Sequences, masks apart, stay those of whole items.
  /// \param seen what is said of each sequence's keys, `[sequences]`; must outlive this
  void take_part(const Range& here, std::span<const SequencePart> seen) {
    here_ = here;
    parts_ = seen;
  }

  /// What becomes of scores; what it calls must outlive this.
  void set_score(const ScoreFunction<Scalar>& score) { score_ = score; }

  /// Whether an item of the batch holds several sequences.
  bool packed() const { return !cu_seqlens_.empty(); }
  /// Sequences that see nothing of one another.
  Index sequences() const {
    return cu_seqlens_.empty() ? batch_ : static_cast<Index>(cu_seqlens_.size()) - 1;
  }
  /// Those of an item of the batch.
  Range sequences_of(Index b) const {
    return cu_seqlens_.empty() ? Range{b, b + 1} : Range{0, sequences()};
  }
  /// The item of the batch that holds a sequence, and its rows there.
  Index item(Index sequence) const { return cu_seqlens_.empty() ? sequence : 0; }
  Range rows(Index sequence) const {
    if (!lengths_.empty()) return {0, lengths_[static_cast<std::size_t>(sequence)]};
    if (cu_seqlens_.empty()) return {0, seqlen_};
    const Index* begin = cu_seqlens_.data() + sequence;
    return {begin[0], begin[1]};
  }
  /// Those of its rows that are here, counted in the sequence: all, but for take_part().
  Range own(Index sequence) const {
    const Range in_item = rows(sequence);
    if (parts_.empty()) return {0, in_item.end - in_item.begin};
    const Index begin = (std::max)(in_item.begin, here_.begin);
    const Index end = (std::min)(in_item.end, here_.end);
    if (begin >= end) return {0, 0};
    return {begin - in_item.begin, end - in_item.begin};
  }
  /// Where the first of these lies among all rows of the batch that are here.
  Index place(Index sequence) const {
    const Index row = rows(sequence).begin + own(sequence).begin;
    if (parts_.empty()) return item(sequence) * seqlen_ + row;
    return item(sequence) * (here_.end - here_.begin) + row - here_.begin;
  }
  Index longest() const {
    const bool equal = cu_seqlens_.empty() && lengths_.empty();
    Index longest = equal ? seqlen_ : 0;
    for (Index s = 0; s < sequences() && !equal; ++s)
      longest = (std::max)(longest, rows(s).end - rows(s).begin);
    return longest;
  }

  /// Gives rows of no sequence a value.
  /// \param to `[B, of_heads, N, channels]`
  void clear_other_rows(Index of_heads, Index channels, const Scalar& value, Scalar* to) const {
    if (packed()) return;
    const Index here = parts_.empty() ? seqlen_ : here_.end - here_.begin;
    for (Index b = 0; b < batch_; ++b)
      for (Index h = 0; h < of_heads; ++h, to += here * channels)
        std::fill(to + (own(b).end - own(b).begin) * channels, to + here * channels, value);
  }

  /// Flags of a sequence's rows, true = global; null: none is.
  const bool* global(Index sequence) const {
    return global_ == nullptr ? nullptr : global_ + item(sequence) * seqlen_ + rows(sequence).begin;
  }
  /// Whether some rows may be seen from anywhere.
  bool pins() const { return window_.first_keys() > 0 || global_ != nullptr; }

  /// Of all sequences, the most blocks that hold a global row.
  Index most_global_blocks() const {
    Index most = 0;
    for (Index s = 0; global_ != nullptr && s < sequences(); ++s) {
      const bool* flags = global(s);
      const Range in_item = rows(s);
      const Index length = in_item.end - in_item.begin;
      Index blocks = 0;
      for (Index first = 0; first < length; first += block_rows<Scalar>)
        blocks += std::find(flags + first, flags + (std::min)(first + block_rows<Scalar>, length),
                            true) != flags + (std::min)(first + block_rows<Scalar>, length);
      most = (std::max)(most, blocks);
    }
    return most;
  }

  /// The rows that stay visible to a sequence's queries.
  void assign_pinned(Index sequence, PinnedRows<Scalar>& pinned) const {
    const Range in_item = rows(sequence);
    if (!parts_.empty()) {
      const std::uint8_t* first = part(sequence).first_masked;
      return pinned.assign(in_item.end - in_item.begin, window_.first_keys(), nullptr,
                           [&](Index row) { return first != nullptr && first[row] != 0; });
    }
    const std::uint8_t* masked = mask_ != nullptr ? mask_->row(item(sequence)) : nullptr;
    pinned.assign(in_item.end - in_item.begin, window_.first_keys(), global(sequence),
                  [&](Index row) { return masked != nullptr && masked[in_item.begin + row] != 0; });
  }

  /// What the kernel gets for head `h` of a sequence, but for rotary, dropout and pinned rows.
  AttentionHead<Scalar> head(Index sequence, Index h) const {
    const Index b = item(sequence);
    const Range in_item = rows(sequence);
    AttentionHead<Scalar> head;
    head.index = h;
    head.window = &window_;
    head.seqlen = in_item.end - in_item.begin;
    head.queries = own(sequence);
    if (parts_.empty()) {
      show_masked(b, in_item, head);
    } else {
      head.masked = part(sequence).masked;
      head.masked_begin = part(sequence).masked_begin;
      head.unmasked = part(sequence).unmasked;
    }
    head.score = score_;
    if (attn_bias_) {
      const Index bias = (b * heads_ + h) % attn_bias_->dimension(0);
      head.attn_bias = attn_bias_->data() + bias * window_.size() * window_.look_around();
    }
    if (sinks_ != nullptr) head.sink = Scalar(log2_e) * sinks_[h];
    return head;
  }

  Index heads() const { return heads_; }
  Index kv_heads() const { return kv_heads_; }
  /// Heads that read the same keys and values.
  Index group() const { return kv_heads_ > 0 ? heads_ / kv_heads_ : 1; }
  const Window& window() const { return window_; }
  /// The sinks, or null.
  const Scalar* sinks() const { return sinks_; }
  const ScoreFunction<Scalar>& score() const { return score_; }
  /// The bias, for what outlives it.
  std::optional<Tensor<Scalar, 3>> copy_of_bias() const {
    if (!attn_bias_) return std::nullopt;
    return Eigen::TensorMap<const Tensor<Scalar, 3>>(attn_bias_->data(), attn_bias_->dimensions());
  }

  /// Where keys lie whose queries are not all here; null: all are.
  const SequencePart* part_of(Index sequence) const {
    return parts_.empty() ? nullptr : &part(sequence);
  }

 private:
  const SequencePart& part(Index sequence) const {
    return parts_[static_cast<std::size_t>(sequence)];
  }

  void show_masked(Index item, const Range& in_item, AttentionHead<Scalar>& head) const {
    const std::uint8_t* masked = mask_ != nullptr ? mask_->row(item) : nullptr;
    head.masked = masked != nullptr ? masked + in_item.begin : nullptr;
    head.unmasked = unmasked(head.masked, head.seqlen);
    // A padding mask's only say is where its sequence ends.
    if (head.masked != nullptr &&
        std::none_of(head.masked + head.unmasked.begin, head.masked + head.unmasked.end,
                     [](std::uint8_t flag) { return flag != 0; }))
      head.masked = nullptr;
  }

  // From the first to the last key that is not masked.
  static Range unmasked(const std::uint8_t* masked, Index seqlen) {
    Range keys{0, seqlen};
    if (masked == nullptr) return keys;
    while (keys.begin < keys.end && masked[keys.begin] != 0) ++keys.begin;
    while (keys.begin < keys.end && masked[keys.end - 1] != 0) --keys.end;
    return keys;
  }

  Window window_;
  Index batch_;
  Index heads_;
  Index kv_heads_;
  Index seqlen_ = 0;
  const PaddingMask* mask_ = nullptr;
  Bias attn_bias_;
  const Scalar* sinks_ = nullptr;
  std::span<const Index> cu_seqlens_;
  std::span<const Index> lengths_;
  const bool* global_ = nullptr;
  Range here_;
  std::span<const SequencePart> parts_;
  ScoreFunction<Scalar> score_;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
