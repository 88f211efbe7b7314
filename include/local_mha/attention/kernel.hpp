// SPDX-License-Identifier: MIT
/// \file
/// The attention kernel: one block of queries against the keys that its window shows.
///
///     s_ij = softmax_scale · q_i·k_j + attn_bias,   p_ij = exp(s_ij − m_i) / Σ_j exp(s_ij − m_i)
///     out_i = Σ_j p_ij · v_j,   lse_i = m_i + log Σ_j exp(s_ij − m_i)
///
/// Lanes are queries: the scores of a key are one Lanes, `[key][query]`, so that the softmax is
/// vertical and keys and values are read as they lie, one value broadcast at a time. The scores of
/// up to `chunk_keys` keys are kept; longer windows go on with the softmax online: maximum, sum and
/// output so far are rescaled.
///
/// Keys come in strips: what the window shows, and rows that are pinned before and after it. The
/// parts that may be exchanged are visibility.hpp (who sees a key), score.hpp (what a score is),
/// softmax.hpp, and where keys and values lie (Ring, Rows). A single query takes another way
/// through them, one_query_kernel.hpp.
///
/// A key that a query does not see contributes exactly nothing, whatever its key and value hold.
#pragma once

#include <algorithm>
#include <iterator>
#include <limits>
#include <optional>
#include <type_traits>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/one_query_kernel.hpp>
#include <local_mha/attention/operand_ring.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/score.hpp>
#include <local_mha/attention/softmax.hpp>
#include <local_mha/attention/strips.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/attention/weighted_operands.hpp>
#include <local_mha/attention/weighted_values.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/matrix_unit.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/rotary.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Room for one block of queries, and the computation in it.
/// \tparam Arithmetic what queries, keys, probabilities and values are multiplied as, see
///         can_multiply
template <typename Scalar, typename Arithmetic = Scalar>
class AttentionKernel {
 public:
  /// What is computed at a time.
  using L = Lanes<Scalar>;
  /// Positions of a block.
  static constexpr Index count = block_rows<Scalar>;
  /// Keys whose scores are kept at once.
  static constexpr Index chunk_keys = 1024;
  /// Whether products are of operands.
  static constexpr bool of_operands = !std::is_same_v<Arithmetic, Scalar>;
  /// Where the keys of a block of queries lie.
  using BlockKeys = std::conditional_t<of_operands, KeyOperands<Scalar>, Ring<Scalar>>;

  AttentionKernel() = default;
  /// \param longest_range keys that a block of queries sees at most
  AttentionKernel(Index dim_head, Index longest_range)
      : scores_(
            make_block_buffer<Scalar>(((std::min)(longest_range, chunk_keys) + 2 * count) * count)),
        turned_(make_block_buffer<Scalar>(dim_head * count)),
        sums_(make_block_buffer<Scalar>(dim_head * count)),
        bias_(make_block_buffer<Scalar>(count * count)) {
    if (!of_operands) return;
    query_pairs_.resize(static_cast<std::size_t>(detail::pairs_of(dim_head) * count));
    // With the neighbours of the first and the last block of each piece.
    probabilities_.resize(scores_.size() / 2 + static_cast<std::size_t>(3 * count * count));
  }

  /// Memory that attend() fetches while it computes.
  Upcoming<Scalar>& upcoming() { return upcoming_; }

  /// Attends from the block of queries whose first row is `first`.
  /// \param queries `[dim_head][block_rows]`, scaled by softmax_scale·log2(e), turned by their
  /// place
  /// \param keys the blocks that the queries see
  /// \param values the same: a Ring, or Rows
  /// \param out `[padded channels of the values][block_rows]`; 0 where a query sees no key, in
  ///        lanes that are no queries, and in channels that fill up
  /// \param lse null, or `[2][block_rows]`: logarithms of the softmax' denominator, −∞ for no key
  /// and
  ///        in lanes that are no queries; and what they round off
  template <typename Values>
  void attend(const AttentionHead<Scalar>& head, Index first, const Scalar* queries,
              const Ring<Scalar>& keys, const Values& values, Scalar* out, Scalar* lse = nullptr) {
    attend(head, first, queries, KeyStore<Scalar, Values>{&keys, &values}, {}, out, lse);
  }

  /// The same with rows that are pinned.
  /// \param window the blocks that the window shows
  ///        If they are in 16 bits, there is a single query, which drops nothing
  /// \param pinned those of `head.pinned`, one after the other, if there are any
  template <typename Values, typename Keys>
  void attend(const AttentionHead<Scalar>& head, Index first, const Scalar* queries,
              const KeyStore<Scalar, Values, Keys>& window,
              const std::type_identity_t<KeyStore<Scalar, Values, Keys>>& pinned, Scalar* out,
              Scalar* lse = nullptr) {
    const Tile tile(head, first);
    detail::Strips<Scalar, Values, Keys> strips(head, tile, window);
    std::optional<Tile> before, after;
    if (head.pinned != nullptr) {
      strips.add(before.emplace(Tile::before_window(head, first)), pinned, *head.pinned);
      strips.add(after.emplace(Tile::after_window(head, first)), pinned, *head.pinned);
    }
    const Index channels = window.values->channels();
    bool done = false;
    if constexpr (std::is_same_v<Values, Keys>) {
      // Lanes are keys, so that a single query costs what it reads.
      done = tile.single() && head.dropout == nullptr && channels <= window.keys->channels();
      if (done)
        detail::OneQueryKernel<Scalar, Arithmetic>(scores_.data(), std::ssize(scores_) / count,
                                                   turned_.data(), sums_.data())
            .attend(strips, queries, out, lse);
    }
    if constexpr (std::is_same_v<Keys, BlockKeys>) {
      if (!done) {
        Softmax softmax(head.sink);
        attend_block(strips, queries, softmax, true, true, out, lse);
      }
    }
    clear_rest(tile, channels, out, lse);
  }

  /// Attends to all of some keys, which are part of what the queries see.
  /// \param softmax, out those of the parts before; `SoftmaxState(head.sink)` and anything at first
  /// \param begins, ends this is the first part, and the last one
  template <typename Values>
  void attend_part(const AttentionHead<Scalar>& head, Index first, const Scalar* queries,
                   const Range& keys, const KeyStore<Scalar, Values, BlockKeys>& store,
                   SoftmaxState<Scalar>& softmax, bool begins, bool ends, Scalar* out,
                   Scalar* lse) {
    const Tile tile = Tile::all_of(head, first, keys);
    attend_block(Strips<Values>(head, tile, store), queries, softmax, begins, ends, out,
                 ends ? lse : nullptr);
    if (ends) clear_rest(tile, store.values->channels(), out, lse);
  }

 private:
  using Tile = QueryTile<Scalar>;
  using Softmax = SoftmaxState<Scalar>;
  using KeyStrip = detail::KeyStrip<Scalar, BlockKeys>;
  using KeyPiece = detail::KeyPiece<Scalar, BlockKeys>;
  template <typename Values>
  using Strip = detail::Strip<Scalar, Values, BlockKeys>;
  template <typename Values>
  using Strips = detail::Strips<Scalar, Values, BlockKeys>;
  template <typename Values>
  using Chunk = detail::Chunk<Scalar, Values, BlockKeys>;
  static constexpr Index group = Tiling<Scalar>::rows;
  static constexpr int half = Tile::half;
  static constexpr int half_keys = of_operands ? 0 : Tiling<Scalar>::half_keys;
  // Keys of a micro-kernel: those of operands have half as many multiply-adds.
  static constexpr int most = of_operands && Tiling<Scalar>::keys >= 8 ? 16 : Tiling<Scalar>::keys;

  // `begins`: there is no out yet; `ends`: it is divided by the sum.
  template <typename Values>
  void attend_block(const Strips<Values>& strips, const Scalar* queries, Softmax& softmax,
                    bool begins, bool ends, Scalar* out, Scalar* lse) {
    const AttentionHead<Scalar>& head = strips.head;
    const Index channels = strips.strips->values->channels();
#if defined(LOCAL_MHA_AMX)
    std::optional<detail::MatrixUnit> unit;
    if (of_operands && detail::has_matrix_unit()) unit.emplace();
#endif
    Index micro_kernels = 0;
    for (const Strip<Values>& strip : strips)
      micro_kernels += micro_kernels_of(strip.tile->keys.end - strip.tile->keys.begin, channels);
    upcoming_.spread_over(micro_kernels);
    const Strip<Values>* strip = strips.begin();
    Index next = first_of(*strip);
    do {
      const Chunk<Values> chunk = take_chunk(strips, strip, next);
      L maximum = softmax.maximum;
      for (const auto& piece : chunk) maximum = score(head, piece, queries, maximum);
      // So that the scale of the probabilities, which are rounded, is a power of two, and what they
      // become does not depend on how keys are taken together.
      const L rescale = softmax.rise(of_operands ? ceil(maximum) : maximum);
#if defined(LOCAL_MHA_AMX)
      if constexpr (of_operands) {
        if (unit) fetch_values(chunk);
      }
#endif
      for (const auto& piece : chunk) exponentiate(head, piece, softmax);
      const bool last = ends && strip == strips.end();
      const L factor = last ? softmax.weight() : L::broadcast(Scalar(1));
      detail::add_weighted_values(chunk, channels, begins ? nullptr : &rescale, factor, upcoming_,
                                  out);
      begins = false;
    } while (strip != strips.end());
    if (lse != nullptr) softmax.log_sum_exp(lse);
  }

  static Index first_of(const KeyStrip& strip) { return strip.tile->keys.begin / group * group; }

  // Values come from the second-level cache, while probabilities are made, if the first has room.
  template <typename Values>
  void fetch_values(const Chunk<Values>& chunk) {
    constexpr Index room = 10 * 1024;
    Index keys = 0;
    upcoming_operands_.clear();
    for (const auto& piece : chunk) {
      const Range blocks = piece.aligned_blocks();
      keys += (blocks.end - blocks.begin) * count;
      if (keys / 2 * piece.values->channels() > room) break;
      piece.values->add_upcoming(blocks, upcoming_operands_);
    }
    upcoming_operands_.spread_over(keys / 2);
  }

  // As many keys as have room, from `next` of `strip` on, which move on.
  template <typename Values>
  Chunk<Values> take_chunk(const Strips<Values>& strips, const Strip<Values>*& strip, Index& next) {
    Chunk<Values> chunk;
    [[maybe_unused]] detail::Pair* pairs = probabilities_.data();
    for (Index taken = 0; strip != strips.end() && taken < chunk_keys;) {
      const Index end =
          (std::min)(next / count * count + (chunk_keys - taken), strip->tile->keys.end);
      const auto& piece = chunk.pieces[chunk.number++] = {
          {strip, {next, end}, scores_.data() + taken * count, pairs}, strip->values};
      if constexpr (of_operands) pairs = piece.pairs_of_block(piece.aligned_blocks().end);
      taken += ceil_div(end, count) * count - next / count * count;
      next = end;
      if (end < strip->tile->keys.end) break;
      if (++strip != strips.end()) next = first_of(*strip);
    }
    return chunk;
  }

  // Whoever reads whole blocks relies on it.
  static void clear_rest(const Tile& tile, Index channels, Scalar* out, Scalar* lse) {
    clear_other_lanes(channels, tile.queries, out);
    std::fill(out + channels * count, out + padded_channels<Scalar>(channels) * count, Scalar(0));
    if (lse == nullptr || tile.whole()) return;
    const L nothing = L::broadcast(Scalar(-std::numeric_limits<double>::infinity()));
    select_lanes(tile.queries.begin, tile.queries.end, L::load(lse), nothing).store(lse);
    clear_other_lanes(1, tile.queries, lse + count);
  }

  // Those that fetch what is upcoming.
  static Index micro_kernels_of(Index keys, Index dim_value) {
    return keys / Tiling<Scalar>::keys +
           keys / count * ceil_div(dim_value, Index{Tiling<Scalar>::values});
  }

  // scores[key][query] of a piece, −∞ where a query does not see a key. Returns the maximum so far.
  L score(const AttentionHead<Scalar>& head, const KeyPiece& piece, const Scalar* queries,
          L maximum) {
    const Tile& tile = piece.tile();
    const KeyStrip& strip = *piece.strip;
    const BlockKeys& keys = *strip.keys;
    const Range& chunk = piece.keys;
    const auto* turned = operands_of(queries, keys);
    Index groups_back = (std::numeric_limits<Index>::min)();
    LaneRange cursor_of_lanes{0, 0};
    std::optional<BiasRows<Scalar>> bias_rows;
    if (head.attn_bias != nullptr) bias_rows.emplace(head, tile);
    const RotarySteps<Scalar>* const steps = strip.steps(head);
    const bool plain_scores = !head.score;
    auto cursor = keys.cursor(chunk.begin / count);
    [[maybe_unused]] Index multiplied = 0;  // blocks whose products are there
    for (Index begin = chunk.begin; begin < chunk.end; cursor.advance()) {
      const Index end = (std::min)((begin / count + 1) * count, chunk.end);
      const Index first_key = strip.block_in_sequence(begin / count) * count;
      if (steps != nullptr) {
        const Index back = tile.first / steps->group() - first_key / steps->group();
        if (back != groups_back) {
          groups_back = back;
          steps->turn_queries(queries, back, turned_.data());
          turned = operands_of(turned_.data(), keys);
        }
      }
      if (bias_rows) bias_rows->gather(first_key, bias_.data());
      const Index block_end = begin / count * count + count;
#if defined(LOCAL_MHA_AMX)
      if constexpr (of_operands) {
        if (detail::has_matrix_unit()) {
          const Index block = begin / count;
          if (block >= multiplied) {
            multiplied = ceil_div(chunk.end, count);
            if (steps != nullptr)
              for (Index b = multiplied - 1; b > block; --b)
                if (strip.block_in_sequence(b) * count / steps->group() !=
                    first_key / steps->group())
                  multiplied = b;
            detail::score_by_matrix_unit(cursor, multiplied - block, keys.tiles(), turned,
                                         piece.score(block * count));
          }
          Scalar* to = piece.score(begin);
          const Scalar* bias = bias_rows ? bias_.data() + begin % count * count : nullptr;
          const Range scored{begin, block_end};
          const L largest = plain_scores ? add_bias(block_end - begin, bias, to)
                                         : change(head, tile, first_key + begin % count,
                                                  block_end - begin, bias, to);
          maximum = tile.plain(scored) ? (max)(maximum, largest)
                                       : hide(tile, scored, to, cursor_of_lanes, maximum);
          begin = end;
          continue;
        }
      }
#endif
      for (Index key = begin; key < end;) {
        const auto* from = cursor.block() + key % count * keys.position_stride();
        const Scalar* bias = bias_rows ? bias_.data() + key % count * count : nullptr;
        // A function of the scores comes before the bias.
        const Scalar* bias_at_once = plain_scores ? bias : nullptr;
        Scalar* to = piece.score(key);
        const int lane = tile.half_that_sees({key, key + half_keys});
        if (half_keys > 0 && lane >= 0 &&
            Tiling<Scalar>::template is_next<half_keys>(block_end - key)) {
          score_keys<(std::max)(1, half_keys), 2>(
              keys, from, turned + lane, bias_at_once ? bias_at_once + lane : nullptr, to + lane);
          if (!plain_scores) change(head, tile, first_key + key % count, half_keys, bias, to);
          maximum = hide(tile, {key, key + half_keys}, to, cursor_of_lanes, maximum);
          key += half_keys;
          continue;
        }
        upcoming_.fetch();
        const bool many = Tiling<Scalar>::template is_next<most>(block_end - key);
        L largest = many ? score_keys<most>(keys, from, turned, bias_at_once, to)
                         : score_keys<group>(keys, from, turned, bias_at_once, to);
        const Range scored{key, key + (many ? most : group)};
        if (!plain_scores)
          largest = change(head, tile, first_key + key % count, scored.end - key, bias, to);
        maximum = tile.plain(scored) ? (max)(maximum, largest)
                                     : hide(tile, scored, to, cursor_of_lanes, maximum);
        key = scored.end;
      }
      begin = end;
    }
    return maximum;
  }

  // Applies the head's function to scores, and adds the bias. Returns their maximum.
  static LOCAL_MHA_NOINLINE L change(const AttentionHead<Scalar>& head, const Tile& tile,
                                     Index first_key, Index number, const Scalar* bias,
                                     Scalar* scores) {
    const L largest = head.score.apply({head.index, tile.first, first_key}, number, scores);
    return bias == nullptr ? largest : add_bias(number, bias, scores);
  }

  // Adds the bias, if there is one, to scores. Returns their maximum.
  static L add_bias(Index number, const Scalar* bias, Scalar* scores) {
    L largest = L::broadcast(Softmax::lowest());
    for (Index i = 0; i < number; ++i, scores += count) {
      L score = L::load(scores);
      if (bias != nullptr) {
        score = fma(Scalar(log2_e), L::load(bias + i * count), score);
        score.store(scores);
      }
      largest = (max)(largest, score);
    }
    return largest;
  }

  // scores[key][query] of keys of one block, for as many queries as the lanes hold. Returns their
  // maximum.
  template <int Keys, int Parts = 1, typename Operand>
  static LOCAL_MHA_NOINLINE Lanes<Scalar, Parts> score_keys(const BlockKeys& keys,
                                                            const Operand* from,
                                                            const Operand* queries,
                                                            const Scalar* bias, Scalar* to) {
    using P = Lanes<Scalar, Parts>;
    P acc[Keys][1];
    LOCAL_MHA_UNROLL for (int r = 0; r < Keys; ++r) acc[r][0] = P::zero();
    if constexpr (of_operands) {
      for (Index tile = 0; tile < keys.tiles(); ++tile, from += keys.tile) {
        const Operand* const x[1] = {queries + tile * detail::tile_pairs * count};
        multiply(detail::tile_pairs, from, keys.position_stride(), 1, x, acc);
      }
    } else {
      const Operand* const x[1] = {queries};
      multiply(keys.channels(), from, keys.position_stride(), keys.channel_stride(), x, acc);
    }
    if (bias != nullptr) {
      LOCAL_MHA_UNROLL for (int r = 0; r < Keys; ++r) acc[r][0] =
          fma(Scalar(log2_e), P::load(bias + r * count), acc[r][0]);
    }
    LOCAL_MHA_UNROLL for (int r = 0; r < Keys; ++r) acc[r][0].store(to + r * count);
    P largest = acc[0][0];
    LOCAL_MHA_UNROLL for (int r = 1; r < Keys; ++r) largest = (max)(largest, acc[r][0]);
    return largest;
  }

  // What queries are multiplied as.
  const auto* operands_of(const Scalar* queries, const BlockKeys& keys) {
    if constexpr (of_operands) {
      detail::pack_block(keys.channels(), queries, query_pairs_.data());
      return static_cast<const detail::Pair*>(query_pairs_.data());
    } else {
      static_cast<void>(keys);
      return queries;
    }
  }

  // Puts −∞ where a query does not see a key, and the self score where it is its own.
  // Returns the maximum so far.
  // `cursor` starts as {0, 0} and is kept for the keys that follow.
  static LOCAL_MHA_INLINE L hide(const Tile& tile, const Range& keys, Scalar* scores,
                                 LaneRange& cursor, L maximum) {
    const L nothing = L::broadcast(Scalar(-std::numeric_limits<double>::infinity()));
    for (Index key = keys.begin; key < keys.end; ++key, scores += count) {
      L score = L::load(scores);
      const int self = tile.self_lane(key);
      if (self >= 0)
        score = select_lanes(self, self + 1, L::broadcast(binary_self_score<Scalar>()), score);
      const LaneRange lanes = tile.that_see(key, cursor);
      score = select_lanes(lanes.begin, lanes.end, score, nothing);
      score.store(scores);
      maximum = (max)(maximum, score);
    }
    return maximum;
  }

  // Turns the scores of a piece into 2^(score − maximum), and adds them to the sum.
  void exponentiate(const AttentionHead<Scalar>& head, const KeyPiece& piece, Softmax& softmax) {
    if constexpr (of_operands) {
      if (head.dropout == nullptr) return make_operands<true>(piece, softmax, upcoming_operands_);
    }
    const Softmax fixed = softmax;
    L sum = softmax.sum;
    Scalar* scores = piece.score(piece.keys.begin);
    LOCAL_MHA_UNROLL_4 for (Index key = piece.keys.begin; key < piece.keys.end;
                            ++key, scores += count) {
      const L p = fixed.term(L::load(scores));
      sum = sum + p;
      p.store(scores);
    }
    softmax.sum = sum;
    if (head.dropout == nullptr) return;
    drop(*head.dropout, piece);
    if constexpr (of_operands) make_operands<false>(piece, softmax, upcoming_operands_);
  }

  // Makes operands of whole blocks of probabilities: 0 of keys that are not the piece's.
  // \tparam FromScores they are not yet made of the scores, nor added to the sum
  template <bool FromScores>
  LOCAL_MHA_NOINLINE static void make_operands(const KeyPiece& piece, Softmax& softmax,
                                               Upcoming<detail::Pair>& upcoming) {
    const Softmax fixed = softmax;
    // One sum would wait for its own additions.
    L sums[2] = {L::zero(), L::zero()};
    const Range blocks = piece.aligned_blocks();
    Index key = blocks.begin * count;
    detail::Pair* to = piece.pairs;
    const auto take = [&](bool first_is, bool second_is) {
      L p[2] = {L::zero(), L::zero()};
      const bool is[2] = {first_is, second_is};
      LOCAL_MHA_UNROLL for (int i = 0; i < 2; ++i) {
        if (!is[i]) continue;
        p[i] = L::load(piece.score(key + i));
        if constexpr (FromScores) {
          p[i] = fixed.term(p[i]);
          sums[i] = sums[i] + p[i];
        }
      }
      detail::store_pairs(p[0], p[1], to);
      upcoming.fetch();
      key += 2;
      to += count;
    };
    const auto take_some = [&](Index end) {
      while (key < end) take(piece.keys.contains(key), piece.keys.contains(key + 1));
    };
    take_some(piece.keys.begin);
    while (key + 2 <= piece.keys.end) take(true, true);
    take_some(blocks.end * count);
    if constexpr (FromScores) softmax.sum = softmax.sum + (sums[0] + sums[1]);
  }

  // The denominator counts what is dropped.
  void drop(const Dropout<Scalar>& dropout, const KeyPiece& piece) {
    constexpr Index together = Dropout<Scalar>::together;
    L factors[together];
    for (Index octet = piece.keys.begin / together; octet * together < piece.keys.end; ++octet) {
      const Index first = octet * together;
      const Index in_sequence =
          piece.strip->block_in_sequence(first / count) * count + first % count;
      dropout.factors(piece.tile().first, in_sequence / together, factors);
      for (Index i = 0; i < together; ++i) {
        const Index key = first + i;
        if (!piece.keys.contains(key)) continue;
        Scalar* p = piece.score(key);
        (L::load(p) * factors[i]).store(p);
      }
    }
  }

  BlockBuffer<Scalar> scores_;
  BlockBuffer<Scalar> turned_;
  BlockBuffer<Scalar> sums_;
  BlockBuffer<Scalar> bias_;
  // Of operands.
  BlockBuffer<detail::Pair> query_pairs_;
  BlockBuffer<detail::Pair> probabilities_;
  Upcoming<detail::Pair> upcoming_operands_;
  Upcoming<Scalar> upcoming_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
