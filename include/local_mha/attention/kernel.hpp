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

#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/tile.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/rotary.hpp>

namespace local_mha {

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
            make_block_buffer<Scalar>((std::min(longest_range, chunk_keys) + 2 * count) * count)),
        turned_(make_block_buffer<Scalar>(dim_head * count)),
        bias_(make_block_buffer<Scalar>(count * count)) {}

  /// Attends from the block of queries whose first row is `first`.
  /// \param queries `[dim_head][block_rows]`, scaled by softmax_scale·log2(e), turned by their
  /// place
  /// \param keys the blocks that the queries see
  /// \param values the same: a Ring, or Rows
  /// \param out `[padded channels of the values][block_rows]`; 0 where a query sees no key
  /// \param lse null, or `block_rows` logarithms of the softmax' denominator; −∞ for no key
  template <typename Values>
  void attend(const AttentionHead<Scalar>& head, Index first, const Scalar* queries,
              const Ring<Scalar>& keys, const Values& values, Scalar* out, Scalar* lse = nullptr) {
    const Tile tile(head, first);
    const L one = L::broadcast(Scalar(1));
    L maximum = L::broadcast(lowest());
    L sum = L::zero();
    Range chunk{tile.keys.begin / group * group, 0};
    do {
      chunk.end = std::min(chunk.begin / count * count + chunk_keys, tile.keys.end);
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

 private:
  using Tile = QueryTile<Scalar>;
  static constexpr Index group = Tiling<Scalar>::rows;
  // Below every score, and finite, so that its difference to −∞ is −∞.
  static Scalar lowest() { return Scalar(-Eigen::NumTraits<Scalar>::highest() / 4); }

  Scalar* score_row(const Range& chunk, Index key) {
    return scores_.data() + (key - chunk.begin / count * count) * count;
  }

  // scores[key][query] of a chunk, −∞ where a query does not see a key. Returns the maximum so far.
  L score(const AttentionHead<Scalar>& head, const Tile& tile, const Range& chunk,
          const Scalar* queries, const Ring<Scalar>& keys, L maximum) {
    const Scalar* turned = queries;
    Index groups_back = std::numeric_limits<Index>::min();
    LaneRange lanes{0, 0};
    auto cursor = keys.cursor(chunk.begin / count);
    for (Index begin = chunk.begin; begin < chunk.end; cursor.advance()) {
      const Index end = std::min((begin / count + 1) * count, chunk.end);
      if (head.steps != nullptr) {
        const Index back = tile.first / head.steps->group() - begin / head.steps->group();
        if (back != groups_back) {
          groups_back = back;
          head.steps->turn_queries(queries, back, turned_.data());
          turned = turned_.data();
        }
      }
      if (head.attn_bias != nullptr) gather_bias(head, tile, {begin, end}, bias_.data());
      for (Index key = begin; key < end; key += group) {
        L acc[group][1];
        LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) acc[r][0] = L::zero();
        const Scalar* const x[1] = {turned};
        multiply(keys.channels(), cursor.block() + key % count * keys.position_stride(),
                 keys.position_stride(), keys.channel_stride(), x, acc);
        if (head.attn_bias != nullptr) {
          LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) acc[r][0] =
              fma(Scalar(log2_e), L::load(bias_.data() + (key % count + r) * count), acc[r][0]);
        }
        Scalar* to = score_row(chunk, key);
        LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) acc[r][0].store(to + r * count);
        if (tile.plain(head, {key, key + group})) {
          LOCAL_MHA_UNROLL for (Index r = 0; r < group; ++r) maximum = max(maximum, acc[r][0]);
        } else {
          maximum = hide(head, tile, key, to, lanes, maximum);
        }
      }
      begin = end;
    }
    return maximum;
  }

  // Puts −∞ where a query does not see a key of the group, and the self score where it is its own.
  // Apart from score(), whose accumulators must not have an address. Returns the maximum so far.
  // `lanes` starts as {0, 0} and is kept for the keys that follow.
  static L hide(const AttentionHead<Scalar>& head, const Tile& tile, Index first_key,
                Scalar* scores, LaneRange& lanes, L maximum) {
    const L nothing = L::broadcast(Scalar(-std::numeric_limits<double>::infinity()));
    for (Index key = first_key; key < first_key + group; ++key, scores += count) {
      L score = L::load(scores);
      if (head.shared_qk && tile.first <= key && key < tile.first + count) {
        const int self = static_cast<int>(key - tile.first);
        score = select_lanes(self, self + 1, L::broadcast(Scalar(self_score * log2_e)), score);
      }
      tile.advance(lanes, key);
      const bool masked = head.masked != nullptr && key < head.seqlen && head.masked[key] != 0;
      score = select_lanes(lanes.begin, masked ? 0 : lanes.end, score, nothing);
      score.store(scores);
      maximum = max(maximum, score);
    }
    return maximum;
  }

  // Turns the scores of a chunk into 2^(score − maximum). Returns their sum, added to `sum`.
  L exponentiate(const AttentionHead<Scalar>& head, const Tile& tile, const Range& chunk,
                 const L& maximum, L sum) {
    const Index end = chunk.begin + ceil_div(chunk.end - chunk.begin, group) * group;
    Scalar* scores = score_row(chunk, chunk.begin);
    LOCAL_MHA_UNROLL_4 for (Index key = chunk.begin; key < end; ++key, scores += count) {
      const L p = exp2(L::load(scores) - maximum);
      sum = sum + p;
      p.store(scores);
    }
    if (head.dropout != nullptr) drop(*head.dropout, tile, {chunk.begin, end}, chunk);
    return sum;
  }

  // The denominator counts what is dropped.
  void drop(const Dropout<Scalar>& dropout, const Tile& tile, const Range& keys,
            const Range& chunk) {
    constexpr Index together = Dropout<Scalar>::together;
    L factors[together];
    for (Index octet = keys.begin / together; octet * together < keys.end; ++octet) {
      dropout.factors(tile.first, octet, factors);
      for (Index i = 0; i < together; ++i) {
        const Index key = octet * together + i;
        if (!keys.contains(key)) continue;
        Scalar* p = score_row(chunk, key);
        (L::load(p) * factors[i]).store(p);
      }
    }
  }

  // out = (rescale·out + Σ_key p[key]·v[key])·factor; without `rescale` there is no out yet.
  template <typename Values>
  void accumulate(const AttentionHead<Scalar>& head, const Tile& tile, const Range& chunk,
                  const Values& values, const L* rescale, const L& factor, Scalar* out) {
    constexpr int most = Tiling<Scalar>::value_rows;
    for (Index block = chunk.begin / count; block * count < chunk.end; ++block)
      if (!values.finite(block))
        return accumulate_seen(head, tile, chunk, values, rescale, factor, out);
    const Index channels = padded_channels<Scalar>(values.channels());
    Index c = 0;
    for (; c + most <= channels; c += most)
      accumulate_channels<most>(chunk, values, c, rescale, factor, out);
    for (; c < channels; c += group)
      accumulate_channels<group>(chunk, values, c, rescale, factor, out);
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
      const Index end = std::min((begin / count + 1) * count, chunk.end);
      const Scalar* block = cursor.block() + c * values.channel_stride();
      const Scalar* const p[1] = {score_row(chunk, begin)};
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
        if (head.masked != nullptr && head.masked[key] != 0) continue;
        const Scalar& value =
            cursor.block()[c * values.channel_stride() + key % count * values.position_stride()];
        const L more = fma(value, L::load(score_row(chunk, key)), sum);
        sum = select_lanes(lanes.begin, lanes.end, more, sum);
      }
      (sum * factor).store(out);
    }
    // The room of a block may hold what another block left.
    std::fill(out, out + (padded_channels<Scalar>(values.channels()) - values.channels()) * count,
              Scalar(0));
  }

  static void log_sum_exp(const L& maximum, const L& sum, Scalar* lse) {
    using std::log;
    alignas(64) Scalar sums[count];
    sum.store(sums);
    (Scalar(ln_2) * maximum).store(lse);
    for (Index r = 0; r < count; ++r)
      lse[r] = sums[r] == Scalar(0) ? Scalar(-std::numeric_limits<double>::infinity())
                                    : Scalar(lse[r] + log(sums[r]));
  }

  BlockBuffer<Scalar> scores_;
  BlockBuffer<Scalar> turned_;
  BlockBuffer<Scalar> bias_;
};

}  // namespace local_mha
