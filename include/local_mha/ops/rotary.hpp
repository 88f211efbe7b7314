// SPDX-License-Identifier: MIT
/// \file
/// Rotary position embedding and its decay xPos, for any position in any scalar type.
///
/// A pair of channels, `(m, m + D/2)` or `(2m, 2m + 1)`, of a query at `i` and a key at `j` is
/// turned so that its share of the score is that of the distance `r = i − j`, times a decay:
///
///     ((q₁k₁ + q₂k₂)·cos(rθ_m) + (q₁k₂ − q₂k₁)·sin(rθ_m)) · ζ_m^(r / xpos_scale_base)
///     θ_m = theta^(−2m/D),   ζ_m = (2m + 0.4·D) / (1.4·D),   without xPos ζ_m = 1
///
/// where `D` channels of a head turn, and others follow. RotaryConfig says how: frequencies `θ_m`
/// may be given, and a factor on cosine and sine, whose square then multiplies the share.
///
/// J. Su et al., "RoFormer", 2021; Y. Sun et al., "A Length-Extrapolatable Transformer", 2022.
///
/// An angle of an absolute position loses its digits in `float`, and `ζ^position` overflows. So
/// positions are counted in groups of a fixed length: a key is turned by its place in its group,
/// and a query by its own place and then by the constant step from the key's group to its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Turns `(a, b)` by an angle given by its cosine and sine, both times a decay.
/// \tparam L the lanes that are turned
template <typename L, typename Scalar, typename Factor>
LOCAL_MHA_INLINE void rotate_pair(const Scalar* a, const Scalar* b, const Factor& cosine,
                                  const Factor& sine, Scalar* to_a, Scalar* to_b) {
  const L x = L::load(a);
  const L y = L::load(b);
  (cosine * x - sine * y).store(to_a);
  (sine * x + cosine * y).store(to_b);
}

/// The pairs of a head's channels that turn: pair `m` is `m·step` and `m·step + gap`. The channels
/// behind them stay.
struct RotaryPairs {
  Index channels = 0;  ///< of a head
  /// Number of pairs.
  Index count = 0;
  /// Channels from a pair to the next.
  Index step = 0;
  /// Channels from the first of a pair to the second.
  Index gap = 0;

  /// Channels that turn.
  Index turned() const { return 2 * count; }
};

/// Turns every position of a block by the same angles.
/// \param block, turned `[channels][block_rows]`, from the lanes on that are turned
/// \param turns for each pair of channels cosine and sine, times a decay: `[pairs.count][2]`
template <int Parts = 1, typename Scalar>
void turn_all(const RotaryPairs& pairs, const Scalar* block, const Scalar* turns, Scalar* turned) {
  using L = Lanes<Scalar, Parts>;
  constexpr Index count = block_rows<Scalar>;
  const Index gap = pairs.gap * count;
  for (Index m = 0; m < pairs.count; ++m) {
    const Index at = m * pairs.step * count;
    rotate_pair<L>(block + at, block + at + gap, turns[2 * m], turns[2 * m + 1], turned + at,
                   turned + at + gap);
  }
  for (Index at = pairs.turned() * count; at < pairs.channels * count; at += count)
    L::load(block + at).store(turned + at);
}

/// The transpose of turn_all(), added: `sum += turnsᵀ · block`.
template <typename Scalar>
void turn_all_back(const RotaryPairs& pairs, const Scalar* block, const Scalar* turns,
                   Scalar* sum) {
  using L = Lanes<Scalar>;
  constexpr Index count = block_rows<Scalar>;
  for (Index m = 0; m < pairs.count; ++m) {
    const Scalar cosine = turns[2 * m];
    const Scalar sine = turns[2 * m + 1];
    const Index first = m * pairs.step * count;
    const Index second = first + pairs.gap * count;
    const L x = L::load(block + first);
    const L y = L::load(block + second);
    Scalar* a = sum + first;
    Scalar* b = sum + second;
    (L::load(a) + (cosine * x + sine * y)).store(a);
    (L::load(b) + (cosine * y - sine * x)).store(b);
  }
  for (Index c = pairs.turned(); c < pairs.channels; ++c)
    (L::load(sum + c * count) + L::load(block + c * count)).store(sum + c * count);
}

namespace detail {

/// The pairs of heads of `dim_head` channels.
inline RotaryPairs pairs_of(const RotaryConfig& rotary, Index dim_head) {
  const Index half = rotary.rotary_dim.value_or(dim_head) / 2;
  if (rotary.pairing == RotaryPairing::interleaved) return {dim_head, half, 2, 1};
  return {dim_head, half, 1, half};
}

/// `θ_m` of each pair, in radians per position.
inline std::vector<double> frequencies_of(const RotaryConfig& rotary, Index dim_head) {
  if (!rotary.inv_freq.empty()) return rotary.inv_freq;
  const Index turned = rotary.rotary_dim.value_or(dim_head);
  std::vector<double> frequencies;
  frequencies.reserve(static_cast<std::size_t>(turned) / 2);
  for (Index m = 0; m < turned / 2; ++m)
    frequencies.push_back(
        std::pow(rotary.theta, -2 * static_cast<double>(m) / static_cast<double>(turned)));
  return frequencies;
}

}  // namespace detail

/// Tables for the queries and keys of every head.
template <typename Scalar>
class RotaryEmbedding {
 public:
  RotaryEmbedding() = default;

  /// Prepares the frequencies.
  /// \param dim_head channels of a head, even unless `rotary.rotary_dim` says how many turn
  /// \param xpos_scale_base distance over which a score decays by `ζ_m`; empty: no xPos
  /// \param rotary how they turn
  /// \param max_exponent of what turned keys are stored as
  /// \throws std::invalid_argument if dim_head is odd or not positive, the base is too small, or
  ///         naming the member of `rotary` that is out of range or has no xPos
  explicit RotaryEmbedding(Index dim_head, std::optional<double> xpos_scale_base = {},
                           const RotaryConfig& rotary = {},
                           int max_exponent = std::numeric_limits<Scalar>::max_exponent)
      : pairs_(checked(dim_head, xpos_scale_base, rotary)),
        frequencies_(detail::frequencies_of(rotary, dim_head)),
        xpos_scale_base_(xpos_scale_base),
        group_(group_length(xpos_scale_base, max_exponent)) {
    queries_ = make_block_buffer<Scalar>(group_ * pairs_.turned());
    keys_ = make_block_buffer<Scalar>(group_ * pairs_.turned());
    const double factor = rotary.factor;
    for (Index place = 0; place < group_; ++place)
      for (Index m = 0; m < pairs_.count; ++m) {
        const Turn turn = turn_by(static_cast<double>(place), m);
        // The key's turn is undone by the score's product: same angle, inverse decay.
        const double square = turn.cosine * turn.cosine + turn.sine * turn.sine;
        const Index at = table_place(place, m);
        queries_[static_cast<std::size_t>(at)] = Scalar(factor * turn.cosine);
        queries_[static_cast<std::size_t>(at + count)] = Scalar(factor * turn.sine);
        keys_[static_cast<std::size_t>(at)] = Scalar(factor * (turn.cosine / square));
        keys_[static_cast<std::size_t>(at + count)] = Scalar(factor * (turn.sine / square));
      }
  }

  /// Channels of a head.
  Index dim_head() const { return pairs_.channels; }
  /// Which of them turn.
  const RotaryPairs& pairs() const { return pairs_; }
  /// `θ_m`, `[pairs().count]`
  const std::vector<double>& frequencies() const { return frequencies_; }
  /// Positions in a group, a multiple of block_rows.
  Index group() const { return group_; }

  /// Turns a block of queries, or of keys, in place by its place in its group.
  /// \param block `[dim_head][block_rows]`, from the lanes on that are turned
  /// \param first position of the first of them, a multiple of what a packet holds
  template <int Parts = 1>
  void apply_to_queries(Scalar* block, Index first) const {
    apply<false, Parts>(queries_, block, first);
  }
  /// The same for keys.
  template <int Parts = 1>
  void apply_to_keys(Scalar* block, Index first) const {
    apply<false, Parts>(keys_, block, first);
  }

  /// Turns gradients of apply_to_queries(), or of apply_to_keys(), into those of its input.
  void apply_back_to_queries(Scalar* block, Index first) const {
    apply<true, 1>(queries_, block, first);
  }
  /// The same for keys.
  void apply_back_to_keys(Scalar* block, Index first) const { apply<true, 1>(keys_, block, first); }

  /// `cos` and `sin` of `distance·θ_m`, both times `ζ_m^(distance / xpos_scale_base)`,
  /// `[pairs().count][2]`: without the factor, which the turns by the place have.
  void turns(Index distance, Scalar* to) const {
    for (Index m = 0; m < pairs_.count; ++m) {
      const Turn turn = turn_by(static_cast<double>(distance), m);
      to[2 * m] = Scalar(turn.cosine);
      to[2 * m + 1] = Scalar(turn.sine);
    }
  }

  /// Turns a matrix of keys; row `j` is at place `j` of a group.
  /// \param keys `[rows, dim_head]`, at most group() rows
  /// \throws std::invalid_argument if keys has another width, or more rows
  RowMatrix<Scalar> rotate_keys(const Eigen::Ref<const RowMatrix<Scalar>>& keys) const {
    check_rows("keys", keys.rows(), keys.cols());
    Index first = 0;
    return map_blocks<Scalar>(keys, dim_head(), 1, [&](Index, const Scalar* in, Scalar* out) {
      std::copy(in, in + dim_head() * count, out);
      apply_to_keys(out, first);
      first += count;
    });
  }

  /// Turns a matrix of queries; row `i` is at place `i` of a group. Its product with row `j` of
  /// rotate_keys() is the score of the distance `i − j + distance`.
  /// \param queries `[rows, dim_head]`, at most group() rows
  /// \param distance from the keys' group to the queries', and any shift
  /// \throws std::invalid_argument if queries has another width, or more rows
  RowMatrix<Scalar> rotate_queries(const Eigen::Ref<const RowMatrix<Scalar>>& queries,
                                   Index distance = 0) const {
    check_rows("queries", queries.rows(), queries.cols());
    auto step = make_block_buffer<Scalar>(pairs_.turned());
    turns(distance, step.data());
    auto placed = make_block_buffer<Scalar>(dim_head() * count);
    Index first = 0;
    return map_blocks<Scalar>(queries, dim_head(), 1, [&](Index, const Scalar* in, Scalar* out) {
      std::copy(in, in + dim_head() * count, placed.data());
      apply_to_queries(placed.data(), first);
      turn_all(pairs_, placed.data(), step.data(), out);
      first += count;
    });
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  void check_rows(const char* argument, Index rows, Index cols) const {
    if (cols != dim_head()) reject(argument, std::to_string(dim_head()) + " columns", cols);
    if (rows > group_) reject(argument, "at most " + std::to_string(group_) + " rows", rows);
  }

  static RotaryPairs checked(Index dim_head, const std::optional<double>& xpos_scale_base,
                             const RotaryConfig& rotary) {
    detail::require_dim_head("dim_head", dim_head);
    detail::require_rotary(rotary, "dim_head", dim_head);
    if (xpos_scale_base) {
      if (!(std::isfinite(*xpos_scale_base) && *xpos_scale_base >= detail::least_xpos_scale_base))
        reject("xpos_scale_base",
               std::string("a finite number of ") + detail::at_least_xpos_scale_base,
               *xpos_scale_base);
      detail::require_rotary_of_xpos(rotary, dim_head);
    }
    return detail::pairs_of(rotary, dim_head);
  }

  struct Turn {
    double cosine;
    double sine;
  };

  // Long groups make tables that leave the cache, short ones many steps; and within a group
  // ζ_0^(−length / base), the largest factor, must stay far from overflow: below 2^24.
  static Index group_length(std::optional<double> xpos_scale_base, int max_exponent) {
    constexpr double longest = 256;
    const double most =
        xpos_scale_base ? (std::min)(longest, std::min<int>(24, max_exponent / 2) * std::log(2.0) /
                                                  std::log(1.4 / 0.4) * *xpos_scale_base)
                        : longest;
    return (std::max<Index>)(1, static_cast<Index>(most) / count) * count;
  }

  Turn turn_by(double distance, Index m) const {
    const double dim = static_cast<double>(pairs_.turned());
    const double two_m = 2 * static_cast<double>(m);
    // Rounding ζ_m itself would be raised to the power, too.
    const auto log_zeta = [&] { return std::log1p((two_m - dim) / (1.4 * dim)); };
    const double angle = distance * frequencies_[static_cast<std::size_t>(m)];
    const double decay =
        xpos_scale_base_ ? std::exp(distance / *xpos_scale_base_ * log_zeta()) : 1.0;
    return {std::cos(angle) * decay, std::sin(angle) * decay};
  }

  // Tables are [block of the group][m][cosine, sine][block_rows].
  Index table_place(Index place, Index m) const {
    return place / count * pairs_.turned() * count + m * 2 * count + place % count;
  }

  template <bool Back, int Parts>
  void apply(const BlockBuffer<Scalar>& table, Scalar* block, Index first) const {
    using L = Lanes<Scalar, Parts>;
    const Scalar* turn = table.data() + table_place(first % group_, 0);
    for (Index m = 0; m < pairs_.count; ++m, turn += 2 * count) {
      Scalar* a = block + m * pairs_.step * count;
      Scalar* b = a + pairs_.gap * count;
      // The transpose of a turn is the turn the other way, with the same decay.
      const L sine = L::load(turn + count);
      rotate_pair<L>(a, b, L::load(turn), Back ? L::zero() - sine : sine, a, b);
    }
  }

  RotaryPairs pairs_;
  std::vector<double> frequencies_;
  std::optional<double> xpos_scale_base_;
  Index group_ = 0;
  BlockBuffer<Scalar> queries_;
  BlockBuffer<Scalar> keys_;
};

/// The turns of queries for keys in other groups of positions (see the file's head).
template <typename Scalar>
class RotarySteps {
 public:
  RotarySteps() = default;
  /// Prepares the turns of all distances that a window has.
  /// \param shift added to every distance, `lf·w`
  /// \param behind, ahead rows before and after its own that a query can see, at least 0
  /// \throws std::invalid_argument if they are negative, or `rotary` is default-constructed
  RotarySteps(const RotaryEmbedding<Scalar>& rotary, Index shift, Index behind, Index ahead)
      : group_(checked(rotary, behind, ahead)),
        pairs_(rotary.pairs()),
        first_(-ceil_div(ahead, rotary.group())),
        turns_(make_block_buffer<Scalar>((ceil_div(behind, rotary.group()) - first_ + 1) *
                                         pairs_.turned())) {
    const Index steps = static_cast<Index>(turns_.size()) / pairs_.turned();
    for (Index step = 0; step < steps; ++step)
      rotary.turns((first_ + step) * rotary.group() + shift,
                   turns_.data() + step * pairs_.turned());
  }

  /// Becomes as many steps, up to that over `last` groups: to follow queries that go far from keys
  /// that stay. Allocates nothing.
  /// \param rotary, shift those that this was made with
  void move_to(const RotaryEmbedding<Scalar>& rotary, Index shift, Index last) {
    const Index steps = static_cast<Index>(turns_.size()) / pairs_.turned();
    if (first_ == last - steps + 1) return;
    first_ = last - steps + 1;
    for (Index step = 0; step < steps; ++step)
      rotary.turns((first_ + step) * rotary.group() + shift,
                   turns_.data() + step * pairs_.turned());
  }

  /// Positions in a group, a multiple of block_rows.
  Index group() const { return group_; }

  /// Turns a block of queries for the keys of one group.
  /// \param groups_back from the queries' group to the keys'
  template <int Parts = 1>
  void turn_queries(const Scalar* block, Index groups_back, Scalar* turned) const {
    turn_all<Parts>(pairs_, block, turns_.data() + (groups_back - first_) * pairs_.turned(),
                    turned);
  }

  /// Adds, to the gradient of turn_queries()' input, what that of its result makes of it.
  void turn_gradients_back(const Scalar* block, Index groups_back, Scalar* sum) const {
    turn_all_back(pairs_, block, turns_.data() + (groups_back - first_) * pairs_.turned(), sum);
  }

 private:
  static Index checked(const RotaryEmbedding<Scalar>& rotary, Index behind, Index ahead) {
    detail::require_at_least("rotary.dim_head()", rotary.dim_head(), 1);
    detail::require_at_least("behind", behind, 0);
    detail::require_at_least("ahead", ahead, 0);
    return rotary.group();
  }

  Index group_ = 0;
  RotaryPairs pairs_;
  Index first_ = 0;
  BlockBuffer<Scalar> turns_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
