// SPDX-License-Identifier: MIT
/// \file
/// Counter-based random numbers: the same for any order of evaluation.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include <local_mha/core/lanes.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/words.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four
/// random words for a counter and a key.
class Philox {
 public:
  /// Four words of 32 bits.
  using Counter = std::array<std::uint32_t, 4>;

  /// With the seed as key.
  explicit Philox(std::uint64_t seed) {
    auto k0 = static_cast<std::uint32_t>(seed);
    auto k1 = static_cast<std::uint32_t>(seed >> 32);
    for (auto& key : keys_) {
      key = {k0, k1};
      k0 += 0x9E3779B9U;
      k1 += 0xBB67AE85U;
    }
  }

  /// The words of a counter.
  Counter operator()(Counter c) const {
    std::uint32_t words[4];
    apply<Words<OneWord>>(c[0], {c[1], c[2], c[3]}, words);
    return {words[0], words[1], words[2], words[3]};
  }

  /// The same of counters side by side, which differ in their first word.
  /// \tparam Side a Words
  /// \param c0 first words
  /// \param c the other three, of every counter
  /// \param to the random words
  template <typename Side>
  LOCAL_MHA_INLINE void apply(const typename Side::Word& c0, const std::array<std::uint32_t, 3>& c,
                              typename Side::Word (&to)[4]) const {
    using Word = typename Side::Word;
    using One = Words<OneWord>;
    // Of the first two rounds, half is the same in every counter.
    const std::uint32_t same = One::multiply_high(c[1], factor1) ^ c[0] ^ keys_[0][0];
    const Word first = Side::multiply_high(c0, factor0) ^ (c[2] ^ keys_[0][1]);
    to[0] = Side::multiply_high(first, factor1) ^ (c[1] * factor1 ^ keys_[1][0]);
    to[1] = first * factor1;
    to[2] = c0 * factor0 ^ (One::multiply_high(same, factor0) ^ keys_[1][1]);
    to[3] = Side::broadcast(same * factor0);
    LOCAL_MHA_UNROLL for (std::size_t round = 2; round < rounds; ++round) {
      const Word high0 = Side::multiply_high(to[0], factor0);
      const Word high1 = Side::multiply_high(to[2], factor1);
      const Word low0 = to[0] * factor0;
      const Word low1 = to[2] * factor1;
      to[0] = high1 ^ to[1] ^ keys_[round][0];
      to[1] = low1;
      to[2] = high0 ^ to[3] ^ keys_[round][1];
      to[3] = low0;
    }
  }

 private:
  static constexpr std::size_t rounds = 10;
  static constexpr std::uint32_t factor0 = 0xD2511F53;
  static constexpr std::uint32_t factor1 = 0xCD9E8D57;

  std::array<std::array<std::uint32_t, 2>, rounds> keys_;
};

/// Uniform and normal numbers, the same on every platform.
class RandomSequence {
 public:
  /// Begins one of the sequences of a seed.
  /// \param which of the sequences of a seed, none of which is one of another seed
  explicit RandomSequence(std::uint64_t seed, std::uint64_t which = 0)
      : philox_(seed), which_(which) {}

  /// Uniform in `[0, 1)`, 53 bits.
  double uniform() {
    const auto high = std::uint64_t{next()} >> 5;
    const auto low = std::uint64_t{next()} >> 6;
    return static_cast<double>((high << 26) + low) * 0x1p-53;
  }

  /// Standard normal (Box and Muller).
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(6.283185307179586476925 * uniform());
  }

 private:
  std::uint32_t next() {
    if (used_ == 4) {
      words_ =
          philox_({static_cast<std::uint32_t>(counter_), static_cast<std::uint32_t>(counter_ >> 32),
                   static_cast<std::uint32_t>(which_), static_cast<std::uint32_t>(which_ >> 32)});
      ++counter_;
      used_ = 0;
    }
    return words_[used_++];
  }

  Philox philox_;
  std::uint64_t which_;
  Philox::Counter words_{};
  std::uint64_t counter_ = 0;
  std::size_t used_ = 4;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
