// SPDX-License-Identifier: MIT
/// \file
/// The attention of a single query, as where a sequence comes position by position.
///
/// Lanes are keys: a packet of keys or values is read as it lies, so that the query costs what it
/// reads. Scores of a key are one value, and the output is a packet for each channel, or for two
/// that are read at a time, which is added up at the end.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <type_traits>

#include <local_mha/attention/head.hpp>
#include <local_mha/attention/ring.hpp>
#include <local_mha/attention/score.hpp>
#include <local_mha/attention/softmax.hpp>
#include <local_mha/attention/strips.hpp>
#include <local_mha/attention/visibility.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/operands.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/rotary.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// In the room of an AttentionKernel, of which it computes the same: with Arithmetic, the query and
/// the probabilities are rounded, and multiplied as what they have become.
template <typename Scalar, typename Arithmetic = Scalar>
class OneQueryKernel {
 public:
  static constexpr Index count = block_rows<Scalar>;
  /// Packets of a block, each of which is taken for itself.
  static constexpr int packets = Lanes<Scalar>::packets;
  using L = Lanes<Scalar, packets>;

  /// \param scores of the keys that are taken at once, which are so many blocks
  /// \param turned, sums `[dim_head][count]`
  OneQueryKernel(Scalar* scores, Index blocks, Scalar* turned, Scalar* sums)
      : scores_(scores), most_packets_(blocks * packets), turned_(turned), sums_(sums) {}

  /// AttentionKernel::attend() of a tile with one query. Other lanes of `out` become 0, those of
  /// `lse` anything.
  /// \tparam Keys a Ring of any storage, which is read as it lies
  template <typename Keys>
  void attend(const Strips<Scalar, Keys, Keys>& strips, const Scalar* queries, Scalar* out,
              Scalar* lse) {
    const AttentionHead<Scalar>& head = strips.head;
    const Index channels = strips.strips->values->channels();
    for (Index c = 0; c < channels; ++c) L::zero().store(sums_ + c * count);
    Softmax softmax(head.sink);
    // A function of scores takes those of a block.
    const Index together = head.score ? packets : 1;
    bool any = false;
    for (const Strip<Scalar, Keys, Keys>& strip : strips) {
      const Index last = ceil_div(strip.tile->keys.end, together * L::count) * together;
      for (Range some{strip.tile->keys.begin / (together * L::count) * together, 0};
           some.begin < last; some.begin = some.end) {
        some.end = (std::min)(some.begin + most_packets_, last);
        score(head, strip, some, queries);
        L maximum = (max)(softmax.maximum, L::broadcast(largest(some)));
        if constexpr (of_operands) maximum = ceil(maximum);
        const L rescale = softmax.rise(maximum);
        if (any) rescale_sums<Keys>(channels, rescale);
        any = true;
        softmax.sum = softmax.sum + L::broadcast(exponentiate(some, softmax));
        add_values(*strip.tile, some, *strip.values);
      }
    }
    const int lane = strips.strips->tile->queries.begin;
    if (lse != nullptr) softmax.log_sum_exp(lse + lane / L::count * L::count);
    store_sums<Keys>(channels, softmax.weight(), lane, out);
  }

 private:
  static constexpr bool of_operands = !std::is_same_v<Arithmetic, Scalar>;
  using Tile = QueryTile<Scalar>;
  using Softmax = SoftmaxState<Scalar, packets>;

  // How channels of keys or values are read.
  template <typename Store>
  using Channels = StoredChannels<L, typename Store::Stored>;
  // From what adds up to a channel of the output to the next, in sums_.
  template <typename Values>
  static constexpr Index sums_stride = count / Channels<Values>::count;

  // Goes through the packets of a store in order.
  template <typename Store>
  class Cursor {
   public:
    Cursor(const Store& store, Index packet)
        : cursor_(store.cursor(packet / packets)), part_(packet % packets) {}
    const auto* packet() const { return cursor_.block() + part_ * L::count; }
    void advance() {
      if (++part_ < packets) return;
      part_ = 0;
      cursor_.advance();
    }

   private:
    typename Store::Cursor cursor_;
    Index part_;
  };
  // The first row of a packet, in the sequence.
  template <typename Keys>
  static Index first_row(const KeyStrip<Scalar, Keys>& strip, Index packet) {
    return strip.block_in_sequence(packet / packets) * count + packet % packets * L::count;
  }

  // scores[key] of some packets, −∞ where the query does not see a key.
  template <typename Keys>
  void score(const AttentionHead<Scalar>& head, const KeyStrip<Scalar, Keys>& strip,
             const Range& some, const Scalar* queries) {
    // Of AVX-512, four hide the time of a multiply-add behind that of reading.
    constexpr int together = std::clamp(Tiling<Scalar>::accumulators, 1, 4) *
                             (sizeof(typename L::Packet) == 64 ? 1 : packets);
    static_assert(together % packets == 0);
    const Tile& tile = *strip.tile;
    const Keys& keys = *strip.keys;
    const RotarySteps<Scalar>* const steps = strip.steps(head);
    const int lane = tile.queries.begin;
    const BiasRow<Scalar> bias =
        head.attn_bias != nullptr ? BiasRow<Scalar>(head, tile.first + lane) : BiasRow<Scalar>();
    Cursor<Keys> cursor(keys, some.begin);
    Scalar* to = scores_;
    for (Index packet = some.begin; packet < some.end;) {
      Index until = some.end;
      if (steps != nullptr) {
        const auto group_of = [&](Index p) { return first_row(strip, p) / steps->group(); };
        const Index group_of_keys = group_of(packet);
        for (until = packet + 1; until < some.end && group_of(until) == group_of_keys;) ++until;
        const int first = lane / L::count * L::count;
        steps->template turn_queries<packets>(
            queries + first, tile.first / steps->group() - group_of_keys, turned_ + first);
      }
      const Scalar* const factors =
          factors_of<Keys>(keys.channels(), (steps != nullptr ? turned_ : queries) + lane);
      for (; packet < until; packet += together) {
        // Where there are fewer packets, the last one is taken again, to no effect.
        const int fresh = static_cast<int>((std::min<Index>)(together, until - packet));
        const typename Keys::Stored* x[together];
        for (int b = 0; b < together; ++b) {
          x[b] = b < fresh ? cursor.packet() : x[b - 1];
          if (b < fresh) cursor.advance();
        }
        L acc[1][together];
        LOCAL_MHA_UNROLL for (int b = 0; b < together; ++b) acc[0][b] = L::zero();
        if constexpr (Channels<Keys>::paired)
          multiply_pairs(keys.channels(), factors, x, acc[0]);
        else
          multiply(keys.channels(), factors, 0, count, x, acc);
        LOCAL_MHA_UNROLL for (int b = 0; b < together; ++b) {
          if (b < fresh) acc[0][b].store(to + b * L::count);
        }
        for (int b = 0; b < fresh; ++b, to += L::count)
          finish(head, tile, bias, packet + b, first_row(strip, packet + b), to);
      }
      packet = until;
    }
  }

  // Applies the head's function to the scores of a packet of keys, or with the first of a block to
  // all of that, adds the bias, and hides what the query does not see.
  // \param first_row of the keys, in the sequence
  static void finish(const AttentionHead<Scalar>& head, const Tile& tile,
                     const BiasRow<Scalar>& bias, Index packet, Index first_row, Scalar* scores) {
    const int lane = tile.queries.begin;
    const Index first = packet * L::count;
    if (head.score && packet % packets == 0)
      head.score.apply({head.index, tile.first + lane, first_row, true}, 1, scores);
    const bool has_bias = head.attn_bias != nullptr;
    const bool bias_at_once =
        has_bias && bias.keys().begin <= first_row && first_row + L::count <= bias.keys().end;
    const bool plain = tile.plain({first, first + L::count});
    if (plain && (!has_bias || bias_at_once)) {
      if (has_bias)
        fma(Scalar(log2_e), L::load_unaligned(bias.at(first_row)), L::load(scores)).store(scores);
      return;
    }
    for (Index r = 0; r < L::count; ++r) {
      const Index key = first + r;
      if (!tile.sees(lane, key))
        scores[r] = Scalar(-std::numeric_limits<double>::infinity());
      else if (tile.self_lane(key) == lane)
        scores[r] = binary_self_score<Scalar>();
      else if (has_bias)
        scores[r] = scores[r] + Scalar(log2_e) * bias.of(first_row + r);
    }
  }

  Scalar largest(const Range& some) const {
    L most = L::broadcast(Softmax::lowest());
    for (Index i = 0; i < some.end - some.begin; ++i)
      most = (max)(most, L::load(scores_ + i * L::count));
    alignas(64) Scalar lanes[L::count];
    most.store(lanes);
    return *std::max_element(lanes, lanes + L::count);
  }

  // Turns the scores into 2^(score − maximum). Returns their sum.
  Scalar exponentiate(const Range& some, const Softmax& softmax) {
    L sums = L::zero();
    for (Index i = 0; i < some.end - some.begin; ++i) {
      Scalar* scores = scores_ + i * L::count;
      L p = softmax.term(L::load(scores));
      p.store(scores);
      if constexpr (of_operands) {
        round_to_operands<Arithmetic, packets>(L::count, scores);
        p = L::load(scores);
      }
      sums = sums + p;
    }
    return sum_of_lanes(sums);
  }

  // What the channels of keys are multiplied with, every `count` values: the query, rounded if
  // operands are, or for two channels at a time, each value of it as often as they have words.
  // \param query its lane of a block
  template <typename Keys>
  const Scalar* factors_of(Index channels, const Scalar* query) const {
    const auto factor = [&](Index c) {
      if constexpr (of_operands)
        return from_stored<Scalar>(to_operand<Arithmetic>(query[c * count]));
      else
        return query[c * count];
    };
    if constexpr (Channels<Keys>::paired) {
      // Where the query is in turned_, two of its channels are read before one is written.
      Scalar* to = turned_;
      for (Index c = 0; c < channels; c += 2, to += count) {
        const Scalar first = factor(c);
        const Scalar second = c + 1 < channels ? factor(c + 1) : Scalar(0);
        std::fill(to, to + count / 2, first);
        std::fill(to + count / 2, to + count, second);
      }
      return turned_;
    } else if constexpr (of_operands) {
      for (Index c = 0; c < channels; ++c) turned_[c * count] = factor(c);
      return turned_;
    } else {
      return query;
    }
  }

  // multiply() of two channels of keys at a time: their sums only meet at the end, where huge ones
  // that would cancel one another may be infinite. If there is one more, zeros lie behind it.
  template <int Blocks, typename Stored>
  static LOCAL_MHA_INLINE void multiply_pairs(Index channels, const Scalar* factors,
                                              const Stored* const (&x)[Blocks], L (&acc)[Blocks]) {
    using Read = StoredChannels<L, Stored>;
    static_assert(Tiling<Scalar>::rows % Read::count == 0, "padded_channels() are whole pairs");
    L sums[Blocks][Read::count];
    for (auto& of_block : sums) std::fill(of_block, of_block + Read::count, L::zero());
    LOCAL_MHA_UNROLL_4 for (Index c = 0; c < channels; c += Read::count, factors += count) {
      const L factor = L::load(factors);
      LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) {
        L keys[Read::count];
        load_side_by_side(x[b] + c * count, keys);
        LOCAL_MHA_UNROLL for (int i = 0; i < Read::count; ++i) sums[b][i] =
            fma(factor, keys[i], sums[b][i]);
      }
    }
    LOCAL_MHA_UNROLL for (int b = 0; b < Blocks; ++b) acc[b] = Read::sum(sums[b]);
  }

  template <typename Values>
  void rescale_sums(Index channels, const L& rescale) {
    alignas(64) Scalar factor[L::count];
    rescale.store(factor);
    scale_block<packets>(ceil_div(channels, Channels<Values>::count), factor[0], sums_);
  }

  // sums[channel] += Σ_key p[key]·v[key], lane by lane.
  template <typename Values>
  void add_values(const Tile& tile, const Range& some, const Values& values) {
    Scalar* const sums = sums_;
    const Scalar* scores = scores_;
    Cursor<Values> cursor(values, some.begin);
    constexpr Index together = 4;
    for (Index packet = some.begin; packet < some.end;) {
      bool finite = packet + together <= some.end;
      for (Index p = packet; finite && p < packet + together; ++p)
        finite = values.finite(p / packets);
      if (finite)
        add_values<together>(values.channels(), scores, cursor, sums);
      else if (values.finite(packet / packets))
        add_values<1>(values.channels(), scores, cursor, sums);
      else
        add_seen_values(tile, packet, values, scores, cursor, sums);
      packet += finite ? together : 1;
      scores += (finite ? together : 1) * L::count;
    }
  }

  // out[channel][lane] = weight·Σ_i sums[channel][i], and 0 in the other lanes.
  template <typename Values>
  void store_sums(Index channels, const L& weight, int lane, Scalar* out) const {
    const Scalar* const sums = sums_;
    alignas(64) Scalar weights[L::count];
    weight.store(weights);
    const Scalar factor = weights[0];
    alignas(64) Scalar lanes[L::count];
    const auto put = [&](Index c, const Scalar& sum) {
      Lanes<Scalar>::zero().store(out + c * count);
      out[c * count + lane] = factor * sum;
    };
    constexpr Index stride = sums_stride<Values>;
    constexpr Index parts = (std::min)(stride, Index{L::count});
    Index c = 0;
    for (; c + L::count <= channels; c += L::count) {
      if constexpr (stride == L::folded) {
        L::sum_folded(sums + c * stride, lanes);
      } else {
        alignas(64) Scalar rows[L::count * L::folded];
        for (Index i = 0; i < L::count; ++i)
          L::load(sums + (c + i) * stride).fold(rows + i * L::folded);
        L::sum_folded(rows, lanes);
      }
      for (Index i = 0; i < L::count; ++i) put(c + i, lanes[i]);
    }
    for (; c < channels; ++c)
      put(c, std::accumulate(sums + c * stride, sums + c * stride + parts, Scalar(0)));
  }

  // sums[channel] += Σ_packet p[packet]·v[packet][channel], lane by lane.
  template <int Packets, typename Values>
  static void add_values(Index channels, const Scalar* scores, Cursor<Values>& cursor,
                         Scalar* sums) {
    using Read = Channels<Values>;
    L p[Packets][Read::count];
    decltype(cursor.packet()) v[Packets];
    for (int b = 0; b < Packets; ++b, cursor.advance()) {
      Read::spread(L::load(scores + b * L::count), p[b]);
      v[b] = cursor.packet();
    }
    LOCAL_MHA_UNROLL_4 for (Index c = 0; c < channels; c += Read::count, sums += count) {
      L sum = L::load(sums);
      LOCAL_MHA_UNROLL for (int b = 0; b < Packets; ++b) {
        L values[Read::count];
        load_side_by_side(v[b] + c * count, values);
        LOCAL_MHA_UNROLL for (int i = 0; i < Read::count; ++i) sum = fma(p[b][i], values[i], sum);
      }
      sum.store(sums);
    }
  }

  // The same of a packet of a block with a NaN or an infinity, which 0 does not cancel: leaves out
  // what is not seen.
  template <typename Values>
  static void add_seen_values(const Tile& tile, Index packet, const Values& values,
                              const Scalar* scores, Cursor<Values>& cursor, Scalar* sums) {
    using Read = Channels<Values>;
    alignas(64) Scalar lanes[L::count];
    for (Index r = 0; r < L::count; ++r)
      lanes[r] = Scalar(tile.sees(tile.queries.begin, packet * L::count + r) ? 0 : -1);
    L p[Read::count], unseen[Read::count];
    Read::spread(L::load(scores), p);
    Read::spread(L::load(lanes), unseen);
    for (Index c = 0; c < values.channels(); c += Read::count, sums += count) {
      L sum = L::load(sums);
      L v[Read::count];
      load_side_by_side(cursor.packet() + c * count, v);
      for (int i = 0; i < Read::count; ++i)
        sum = fma(p[i], select_negative(unseen[i], L::zero(), v[i]), sum);
      sum.store(sums);
    }
    cursor.advance();
  }

  Scalar* scores_;
  Index most_packets_;
  Scalar* turned_;
  Scalar* sums_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail

LOCAL_MHA_INT_BOUNDS_END
