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
/// output so far are rescaled (M. Milakov, N. Gimelshein, "Online normalizer calculation for
/// softmax", 2018). Scores are in units of log 2, because 2^x is what a processor makes.
///
/// A key that a query does not see contributes exactly nothing, whatever its key and value hold.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>

#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/tile.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/upcoming.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/rotary.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Room for one block of queries, and the computation in it.
template <typename Scalar>
class AttentionKernel {
 public:
  using L = Lanes<Scalar>;
  static constexpr Index count = block_rows<Scalar>;
  /// Keys whose scores are kept at once.
  static constexpr Index chunk_keys = 1024;

  AttentionKernel() = default;
  /// \param longest_range keys that a block of queries sees at most
  AttentionKernel(Index dim_head, Index longest_range)
      : scores_(
            make_block_buffer<Scalar>(((std::min)(longest_range, chunk_keys) + 2 * count) * count)),
        turned_(make_block_buffer<Scalar>(dim_head * count)),
        sums_(make_block_buffer<Scalar>(dim_head * count)),
        bias_(make_block_buffer<Scalar>(count * count)) {}

  /// Below every score, and finite, so that its difference to −∞ is −∞.
  static Scalar lowest() { return Scalar(-Eigen::NumTraits<Scalar>::highest() * Scalar(0.25)); }

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
    const Tile tile(head, first);
    bool done = false;
    if constexpr (std::is_same_v<Values, Ring<Scalar>>) {
      // Lanes are keys, so that a single query costs what it reads.
      done = tile.single() && head.dropout == nullptr && values.channels() <= keys.channels();
      if (done) attend_one(head, tile, queries, keys, values, out, lse);
    }
    if (!done) attend_block(head, tile, queries, keys, values, out, lse);
    clear_rest(tile, values.channels(), out, lse);
  }

  /// `maximum` of scores in units of log 2 and `sum` of `2^(score − maximum)`, to logarithms.
  /// \param lse `[2][block_rows]`
  static void log_sum_exp(const L& maximum, const L& sum, Scalar* lse) {
    alignas(64) Scalar sums[count];
    sum.store(sums);
    maximum.store(lse);
    for (Index r = 0; r < count; ++r) {
      const LogSumExp<Scalar> parts = natural_log_sum_exp(lse[r], sums[r]);
      lse[r] = parts.nearest;
      lse[count + r] = parts.rest;
    }
  }

 private:
  using Tile = QueryTile<Scalar>;
  static constexpr Index group = Tiling<Scalar>::rows;
  static constexpr int half = Tile::half;
  static constexpr int half_keys = Tiling<Scalar>::half_keys;

  template <typename Values>
  void attend_block(const AttentionHead<Scalar>& head, const Tile& tile, const Scalar* queries,
                    const Ring<Scalar>& keys, const Values& values, Scalar* out, Scalar* lse) {
    upcoming_.spread_over(micro_kernels(tile.keys.end - tile.keys.begin, values.channels()));
    const L one = L::broadcast(Scalar(1));
    L maximum = L::broadcast(lowest());
    L sum = L::zero();
    Range chunk{tile.keys.begin / group * group, 0};
    do {
      chunk.end = (std::min)(chunk.begin / count * count + chunk_keys, tile.keys.end);
      const L before = maximum;
      maximum = score(head, tile, chunk, queries, keys, maximum);
      const L rescale = exp2(before - maximum);
      sum = exponentiate(head, tile, chunk, maximum, rescale * sum);
      const bool first_chunk = chunk.begin <= tile.keys.begin;
      const bool last_chunk = chunk.end == tile.keys.end;
      // The output of a query that sees nothing is 0, and so is its sum.
      const L factor = last_chunk ? one / select_negative(L::zero() - sum, sum, sum + one) : one;
      accumulate(head, tile, chunk, values, first_chunk ? nullptr : &rescale, factor, out);
      chunk.begin = chunk.end;
    } while (chunk.begin < tile.keys.end);
    if (lse != nullptr) log_sum_exp(maximum, sum, lse);
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
  static Index micro_kernels(Index keys, Index dim_value) {
    return keys / Tiling<Scalar>::keys +
           keys / count * ceil_div(dim_value, Index{Tiling<Scalar>::values});
  }

  Scalar* score_row(const Range& chunk, Index key) {
    return scores_.data() + (key - chunk.begin / count * count) * count;
  }

  // scores[key][query] of a chunk, −∞ where a query does not see a key. Returns the maximum so far.
  L score(const AttentionHead<Scalar>& head, const Tile& tile, const Range& chunk,
          const Scalar* queries, const Ring<Scalar>& keys, L maximum) {
    const Scalar* turned = queries;
    Index groups_back = (std::numeric_limits<Index>::min)();
    LaneRange lanes{0, 0};
    std::optional<BiasRows<Scalar>> bias_rows;
    if (head.attn_bias != nullptr) bias_rows.emplace(head, tile);
    auto cursor = keys.cursor(chunk.begin / count);
    for (Index begin = chunk.begin; begin < chunk.end; cursor.advance()) {
      const Index end = (std::min)((begin / count + 1) * count, chunk.end);
      if (head.steps != nullptr) {
        const Index back = tile.first / head.steps->group() - begin / head.steps->group();
        if (back != groups_back) {
          groups_back = back;
          head.steps->turn_queries(queries, back, turned_.data());
          turned = turned_.data();
        }
      }
      if (bias_rows) bias_rows->gather(begin / count * count, bias_.data());
      const Index block_end = begin / count * count + count;
      for (Index key = begin; key < end;) {
        constexpr Index most = Tiling<Scalar>::keys;
        const Scalar* from = cursor.block() + key % count * keys.position_stride();
        const Scalar* bias = bias_rows ? bias_.data() + key % count * count : nullptr;
        Scalar* to = score_row(chunk, key);
        const int lane = tile.half_that_sees({key, key + half_keys});
        if (half_keys > 0 && lane >= 0 &&
            Tiling<Scalar>::template is_next<half_keys>(block_end - key)) {
          score_keys<(std::max)(1, half_keys), 2>(keys, from, turned + lane,
                                                  bias ? bias + lane : nullptr, to + lane);
          maximum = hide(head, tile, {key, key + half_keys}, to, lanes, maximum);
          key += half_keys;
          continue;
        }
        upcoming_.fetch();
        const bool many = Tiling<Scalar>::template is_next<most>(block_end - key);
        const L largest = many ? score_keys<most>(keys, from, turned, bias, to)
                               : score_keys<group>(keys, from, turned, bias, to);
        const Range scored{key, key + (many ? most : group)};
        maximum = tile.plain(head, scored) ? (max)(maximum, largest)
                                           : hide(head, tile, scored, to, lanes, maximum);
        key = scored.end;
      }
      begin = end;
    }
    return maximum;
  }

  // scores[key][query] of keys of one block, for as many queries as the lanes hold. Returns their
  // maximum.
  template <int Keys, int Parts = 1>
  static LOCAL_MHA_NOINLINE Lanes<Scalar, Parts> score_keys(const Ring<Scalar>& keys,
                                                            const Scalar* from,
                                                            const Scalar* queries,
                                                            const Scalar* bias, Scalar* to) {
    using P = Lanes<Scalar, Parts>;
    P acc[Keys][1];
    LOCAL_MHA_UNROLL for (int r = 0; r < Keys; ++r) acc[r][0] = P::zero();
    const Scalar* const x[1] = {queries};
    multiply(keys.channels(), from, keys.position_stride(), keys.channel_stride(), x, acc);
    if (bias != nullptr) {
      LOCAL_MHA_UNROLL for (int r = 0; r < Keys; ++r) acc[r][0] =
          fma(Scalar(log2_e), P::load(bias + r * count), acc[r][0]);
    }
    LOCAL_MHA_UNROLL for (int r = 0; r < Keys; ++r) acc[r][0].store(to + r * count);
    P largest = acc[0][0];
    LOCAL_MHA_UNROLL for (int r = 1; r < Keys; ++r) largest = (max)(largest, acc[r][0]);
    return largest;
  }

  // Puts −∞ where a query does not see a key, and the self score where it is its own.
  // Returns the maximum so far.
  // `lanes` starts as {0, 0} and is kept for the keys that follow.
  static L hide(const AttentionHead<Scalar>& head, const Tile& tile, const Range& keys,
                Scalar* scores, LaneRange& lanes, L maximum) {
    const L nothing = L::broadcast(Scalar(-std::numeric_limits<double>::infinity()));
    for (Index key = keys.begin; key < keys.end; ++key, scores += count) {
      L score = L::load(scores);
      if (head.shared_qk && tile.first <= key && key < tile.first + count) {
        const int self = static_cast<int>(key - tile.first);
        score = select_lanes(self, self + 1, L::broadcast(binary_self_score<Scalar>()), score);
      }
      tile.advance(lanes, key);
      const bool masked = key < head.seqlen && head.is_masked(key);
      score = select_lanes(lanes.begin, masked ? 0 : lanes.end, score, nothing);
      score.store(scores);
      maximum = (max)(maximum, score);
    }
    return maximum;
  }

  // Turns the scores of a chunk into 2^(score − maximum). Returns their sum, added to `sum`.
  L exponentiate(const AttentionHead<Scalar>& head, const Tile& tile, const Range& chunk,
                 const L& maximum, L sum) {
    Scalar* scores = score_row(chunk, chunk.begin);
    LOCAL_MHA_UNROLL_4 for (Index key = chunk.begin; key < chunk.end; ++key, scores += count) {
      const L p = exp2(L::load(scores) - maximum);
      sum = sum + p;
      p.store(scores);
    }
    if (head.dropout != nullptr) drop(*head.dropout, tile, chunk);
    return sum;
  }

  // The denominator counts what is dropped.
  void drop(const Dropout<Scalar>& dropout, const Tile& tile, const Range& chunk) {
    constexpr Index together = Dropout<Scalar>::together;
    L factors[together];
    for (Index octet = chunk.begin / together; octet * together < chunk.end; ++octet) {
      dropout.factors(tile.first, octet, factors);
      for (Index i = 0; i < together; ++i) {
        const Index key = octet * together + i;
        if (!chunk.contains(key)) continue;
        Scalar* p = score_row(chunk, key);
        (L::load(p) * factors[i]).store(p);
      }
    }
  }

  // out = (rescale·out + Σ_key p[key]·v[key])·factor; without `rescale` there is no out yet.
  template <typename Values>
  void accumulate(const AttentionHead<Scalar>& head, const Tile& tile, const Range& chunk,
                  const Values& values, const L* rescale, const L& factor, Scalar* out) {
    constexpr int most = Tiling<Scalar>::values;
    for (Index block = chunk.begin / count; block * count < chunk.end; ++block)
      if (!values.finite(block))
        return accumulate_seen(head, tile, chunk, values, rescale, factor, out);
    const Index channels = padded_channels<Scalar>(values.channels());
    for (Index c = 0; c < channels;) {
      if (Tiling<Scalar>::template is_next<most>(channels - c)) {
        accumulate_channels<most>(chunk, values, c, rescale, factor, out);
        c += most;
      } else {
        accumulate_channels<group>(chunk, values, c, rescale, factor, out);
        c += group;
      }
    }
  }

  template <int Channels, typename Values>
  void accumulate_channels(const Range& chunk, const Values& values, Index c, const L* rescale,
                           const L& factor, Scalar* out) {
    out += c * count;
    L acc[Channels][1];
    LOCAL_MHA_UNROLL for (int r = 0; r < Channels; ++r) acc[r][0] =
        rescale == nullptr ? L::zero() : *rescale * L::load(out + r * count);
    auto cursor = values.cursor(chunk.begin / count);
    for (Index begin = chunk.begin; begin < chunk.end; cursor.advance()) {
      const Index end = (std::min)((begin / count + 1) * count, chunk.end);
      const Scalar* block = cursor.block() + c * values.channel_stride();
      const Scalar* const p[1] = {score_row(chunk, begin)};
      upcoming_.fetch();
      if (end - begin == count)
        multiply(count, block, values.channel_stride(), values.position_stride(), p, acc);
      else
        multiply(end - begin, block + begin % count * values.position_stride(),
                 values.channel_stride(), values.position_stride(), p, acc);
      begin = end;
    }
    LOCAL_MHA_UNROLL for (int r = 0; r < Channels; ++r)(acc[r][0] * factor).store(out + r * count);
  }

  // Where there is a NaN or an infinity, which 0 does not cancel: leaves out what is not seen.
  template <typename Values>
  void accumulate_seen(const AttentionHead<Scalar>& head, const Tile& tile, const Range& chunk,
                       const Values& values, const L* rescale, const L& factor, Scalar* out) {
    for (Index c = 0; c < values.channels(); ++c, out += count) {
      L sum = rescale == nullptr ? L::zero() : *rescale * L::load(out);
      LaneRange lanes{0, 0};
      auto cursor = values.cursor(chunk.begin / count);
      for (Index key = chunk.begin; key < chunk.end; ++key) {
        if (key % count == 0 && key > chunk.begin) cursor.advance();
        tile.advance(lanes, key);
        if (head.is_masked(key)) continue;
        const Scalar& value =
            cursor.block()[c * values.channel_stride() + key % count * values.position_stride()];
        const L more = fma(value, L::load(score_row(chunk, key)), sum);
        sum = select_lanes(lanes.begin, lanes.end, more, sum);
      }
      (sum * factor).store(out);
    }
  }

  // attend() for a single query, whose lane of `out` it writes.
  void attend_one(const AttentionHead<Scalar>& head, const Tile& tile, const Scalar* queries,
                  const Ring<Scalar>& keys, const Ring<Scalar>& values, Scalar* out, Scalar* lse) {
    const Index last = ceil_div(tile.keys.end, count);
    const Index most_blocks = std::ssize(scores_) / count;
    std::fill_n(sums_.data(), values.channels() * count, Scalar(0));
    Scalar maximum = lowest();
    Scalar sum(0);
    for (Range blocks{tile.keys.begin / count, 0}; blocks.begin < last; blocks.begin = blocks.end) {
      blocks.end = (std::min)(blocks.begin + most_blocks, last);
      score_one(head, tile, blocks, queries + tile.queries.begin, keys);
      const Scalar before = maximum;
      maximum = (std::max)(before, largest_one(blocks));
      if (sum != Scalar(0)) sum = sum * rescale_sums(values.channels(), before - maximum);
      sum += exponentiate_one(blocks, maximum);
      add_values(head, tile, blocks, values);
    }
    if (lse != nullptr) log_sum_exp(L::broadcast(maximum), L::broadcast(sum), lse);
    // The output of a query that sees nothing is 0, and so is its sum.
    const Scalar factor = Scalar(1) / (sum == Scalar(0) ? Scalar(1) : sum);
    store_sums(values.channels(), factor, out + tile.queries.begin);
  }

  // scores[key] of whole blocks, −∞ where the query does not see a key.
  void score_one(const AttentionHead<Scalar>& head, const Tile& tile, const Range& blocks,
                 const Scalar* query, const Ring<Scalar>& keys) {
    constexpr int together = std::clamp(Tiling<Scalar>::accumulators, 1, 4);
    const Scalar* turned = query;
    auto cursor = keys.cursor(blocks.begin);
    Scalar* to = scores_.data();
    for (Index block = blocks.begin; block < blocks.end;) {
      Index until = blocks.end;
      if (head.steps != nullptr) {
        const Index group_of_keys = block * count / head.steps->group();
        until = (std::min)(until, (group_of_keys + 1) * head.steps->group() / count);
        head.steps->turn_queries(query - tile.queries.begin,
                                 tile.first / head.steps->group() - group_of_keys, turned_.data());
        turned = turned_.data() + tile.queries.begin;
      }
      for (; block < until; block += together) {
        // Where there are fewer blocks, the last one is taken again, to no effect.
        const int fresh = static_cast<int>((std::min<Index>)(together, until - block));
        const Scalar* x[together];
        for (int b = 0; b < together; ++b) {
          x[b] = cursor.block();
          if (b < fresh) cursor.advance();
          if (b >= fresh) x[b] = x[b - 1];
        }
        L acc[1][together];
        LOCAL_MHA_UNROLL for (int b = 0; b < together; ++b) acc[0][b] = L::zero();
        multiply(keys.channels(), turned, 0, count, x, acc);
        LOCAL_MHA_UNROLL for (int b = 0; b < together; ++b) {
          if (b < fresh) acc[0][b].store(to + b * count);
        }
        for (int b = 0; b < fresh; ++b, to += count) finish_one(head, tile, block + b, to);
      }
      block = until;
    }
  }

  // Adds the bias to the scores of a block of keys, and hides what the query does not see.
  static void finish_one(const AttentionHead<Scalar>& head, const Tile& tile, Index block,
                         Scalar* scores) {
    const Index query = tile.first + tile.queries.begin;
    const Index first = block * count;
    const Scalar* bias = nullptr;
    Index look_around = 0;
    if (head.attn_bias != nullptr) {
      bias = head.attn_bias + head.window->place_in_bucket(query) * head.window->look_around();
      look_around = head.window->look_around_begin(query);
    }
    if (tile.plain(head, {first, first + count})) {
      if (bias != nullptr)
        fma(Scalar(log2_e), L::load_unaligned(bias + (first - look_around)), L::load(scores))
            .store(scores);
      return;
    }
    for (Index r = 0; r < count; ++r) {
      const Index key = first + r;
      if (!tile.keys.contains(key) || head.is_masked(key))
        scores[r] = Scalar(-std::numeric_limits<double>::infinity());
      else if (head.shared_qk && key == query)
        scores[r] = binary_self_score<Scalar>();
      else if (bias != nullptr)
        scores[r] = scores[r] + Scalar(log2_e) * bias[key - look_around];
    }
  }

  Scalar largest_one(const Range& blocks) const {
    L most = L::broadcast(lowest());
    for (Index i = 0; i < blocks.end - blocks.begin; ++i)
      most = (max)(most, L::load(scores_.data() + i * count));
    alignas(64) Scalar lanes[count];
    most.store(lanes);
    return *std::max_element(lanes, lanes + count);
  }

  // Turns the scores into 2^(score − maximum). Returns their sum.
  Scalar exponentiate_one(const Range& blocks, const Scalar& maximum) {
    const L all = L::broadcast(maximum);
    L sums = L::zero();
    for (Index i = 0; i < blocks.end - blocks.begin; ++i) {
      Scalar* scores = scores_.data() + i * count;
      const L p = exp2(L::load(scores) - all);
      sums = sums + p;
      p.store(scores);
    }
    return sum_of_lanes(sums);
  }

  // Multiplies what was summed up below another maximum by 2^difference, which it returns.
  Scalar rescale_sums(Index channels, const Scalar& difference) {
    alignas(64) Scalar factor[count];
    exp2(L::broadcast(difference)).store(factor);
    scale_block(channels, factor[0], sums_.data());
    return factor[0];
  }

  // sums[channel] += Σ_key p[key]·v[key], lane by lane.
  void add_values(const AttentionHead<Scalar>& head, const Tile& tile, const Range& blocks,
                  const Ring<Scalar>& values) {
    Scalar* const sums = sums_.data();
    const Scalar* scores = scores_.data();
    auto cursor = values.cursor(blocks.begin);
    constexpr Index together = 4;
    for (Index block = blocks.begin; block < blocks.end;) {
      bool finite = block + together <= blocks.end;
      for (Index b = block; finite && b < block + together; ++b) finite = values.finite(b);
      const Index some = finite ? together : 1;
      if (finite)
        add_values<together>(values.channels(), scores, cursor, sums);
      else if (values.finite(block))
        add_values<1>(values.channels(), scores, cursor, sums);
      else
        add_seen_values(head, tile, block, values, scores, cursor, sums);
      block += some;
      scores += some * count;
    }
  }

  // out[channel] = factor·Σ_lane sums[channel][lane]
  void store_sums(Index channels, const Scalar& factor, Scalar* out) const {
    const Scalar* const sums = sums_.data();
    alignas(64) Scalar rows[count * L::folded];
    alignas(64) Scalar lanes[count];
    Index c = 0;
    for (; c + count <= channels; c += count) {
      for (Index i = 0; i < count; ++i) L::load(sums + (c + i) * count).fold(rows + i * L::folded);
      L::sum_folded(rows, lanes);
      for (Index i = 0; i < count; ++i) out[(c + i) * count] = factor * lanes[i];
    }
    for (; c < channels; ++c) out[c * count] = factor * sum_of_lanes(L::load(sums + c * count));
  }

  // sums[channel] += Σ_block p[block]·v[block][channel], lane by lane.
  template <int Blocks>
  static void add_values(Index channels, const Scalar* scores,
                         typename Ring<Scalar>::Cursor& cursor, Scalar* sums) {
    L p[Blocks];
    const Scalar* v[Blocks];
    for (int b = 0; b < Blocks; ++b, cursor.advance()) {
      p[b] = L::load(scores + b * count);
      v[b] = cursor.block();
    }
    LOCAL_MHA_UNROLL_4 for (Index c = 0; c < channels * count; c += count) {
      L sum = L::load(sums + c);
      LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) sum = fma(p[b], L::load(v[b] + c), sum);
      sum.store(sums + c);
    }
  }

  // The same of one block with a NaN or an infinity, which 0 does not cancel: leaves out what is
  // not seen.
  static void add_seen_values(const AttentionHead<Scalar>& head, const Tile& tile, Index block,
                              const Ring<Scalar>& values, const Scalar* scores,
                              typename Ring<Scalar>::Cursor& cursor, Scalar* sums) {
    alignas(64) Scalar unseen[count];
    for (Index r = 0; r < count; ++r) {
      const Index key = block * count + r;
      unseen[r] = Scalar(tile.keys.contains(key) && !head.is_masked(key) ? 0 : -1);
    }
    const L p = L::load(scores);
    for (Index c = 0; c < values.channels() * count; c += count) {
      const L v = select_negative(L::load(unseen), L::zero(), L::load(cursor.block() + c));
      fma(p, v, L::load(sums + c)).store(sums + c);
    }
    cursor.advance();
  }

  BlockBuffer<Scalar> scores_;
  BlockBuffer<Scalar> turned_;
  BlockBuffer<Scalar> sums_;
  BlockBuffer<Scalar> bias_;
  Upcoming<Scalar> upcoming_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
