// SPDX-License-Identifier: MIT
/// \file
/// Rotary position embedding and its decay xPos, for any position in any scalar type.
///
/// A pair of channels `(m, m + D/2)` of a query at `i` and a key at `j` is turned so that its share
/// of the score is that of the distance `r = i − j`, times a decay:
///
///     ((q₁k₁ + q₂k₂)·cos(rθ_m) + (q₁k₂ − q₂k₁)·sin(rθ_m)) · ζ_m^(r / xpos_scale_base)
///     θ_m = 10000^(−2m/D),   ζ_m = (2m + 0.4·D) / (1.4·D),   without xPos ζ_m = 1
///
/// J. Su et al., "RoFormer", 2021; Y. Sun et al., "A Length-Extrapolatable Transformer", 2022.
///
/// An angle of an absolute position loses its digits in `float`, and `ζ^position` overflows. So
/// positions are counted in groups of a fixed length: a key is turned by its place in its group,
/// and a query by its own place and then by the constant step from the key's group to its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Turns `(a, b)` by an angle given by its cosine and sine, both times a decay.
template <typename Scalar, typename Factor>
LOCAL_MHA_INLINE void rotate_pair(const Scalar* a, const Scalar* b, const Factor& cosine,
                                  const Factor& sine, Scalar* to_a, Scalar* to_b) {
  using L = Lanes<Scalar>;
  const L x = L::load(a);
  const L y = L::load(b);
  (cosine * x - sine * y).store(to_a);
  (sine * x + cosine * y).store(to_b);
}

/// Turns every position of a block by the same angles.
/// \param turns for each pair of channels cosine and sine, times a decay: `[dim_head/2][2]`
template <typename Scalar>
void turn_all(Index dim_head, const Scalar* block, const Scalar* turns, Scalar* turned) {
  constexpr Index count = block_rows<Scalar>;
  const Index half = dim_head / 2;
  for (Index m = 0; m < half; ++m)
    rotate_pair<Scalar>(block + m * count, block + (m + half) * count, turns[2 * m],
                        turns[2 * m + 1], turned + m * count, turned + (m + half) * count);
}

/// The transpose of turn_all(), added: `sum += turnsᵀ · block`.
template <typename Scalar>
void turn_all_back(Index dim_head, const Scalar* block, const Scalar* turns, Scalar* sum) {
  using L = Lanes<Scalar>;
  constexpr Index count = block_rows<Scalar>;
  const Index half = dim_head / 2;
  for (Index m = 0; m < half; ++m) {
    const Scalar cosine = turns[2 * m];
    const Scalar sine = turns[2 * m + 1];
    const L x = L::load(block + m * count);
    const L y = L::load(block + (m + half) * count);
    Scalar* a = sum + m * count;
    Scalar* b = sum + (m + half) * count;
    (L::load(a) + (cosine * x + sine * y)).store(a);
    (L::load(b) + (cosine * y - sine * x)).store(b);
  }
}

/// Tables for the queries and keys of every head.
template <typename Scalar>
class RotaryEmbedding {
 public:
  RotaryEmbedding() = default;

  /// \param dim_head channels of a head, even
  /// \param xpos_scale_base distance over which a score decays by `ζ_m`; empty: no xPos
  /// \throws std::invalid_argument if dim_head is odd or not positive, or the base is below 0.5
  explicit RotaryEmbedding(Index dim_head, std::optional<double> xpos_scale_base = {})
      : dim_head_(checked(dim_head, xpos_scale_base)),
        xpos_scale_base_(xpos_scale_base),
        group_(group_length(xpos_scale_base)) {
    queries_ = make_block_buffer<Scalar>(group_ * dim_head);
    keys_ = make_block_buffer<Scalar>(group_ * dim_head);
    for (Index place = 0; place < group_; ++place)
      for (Index m = 0; m < dim_head / 2; ++m) {
        const Turn turn = turn_by(static_cast<double>(place), m);
        // The key's turn is undone by the score's product: same angle, inverse decay.
        const double square = turn.cosine * turn.cosine + turn.sine * turn.sine;
        const Index at = table_place(place, m);
        queries_[static_cast<std::size_t>(at)] = Scalar(turn.cosine);
        queries_[static_cast<std::size_t>(at + count)] = Scalar(turn.sine);
        keys_[static_cast<std::size_t>(at)] = Scalar(turn.cosine / square);
        keys_[static_cast<std::size_t>(at + count)] = Scalar(turn.sine / square);
      }
  }

  Index dim_head() const { return dim_head_; }
  /// Positions in a group, a multiple of block_rows.
  Index group() const { return group_; }

  /// Turns a block of queries, or of keys, in place by its place in its group.
  /// \param block `[dim_head][block_rows]`
  /// \param first position of the block's first row, a multiple of block_rows
  void apply_to_queries(Scalar* block, Index first) const { apply<false>(queries_, block, first); }
  void apply_to_keys(Scalar* block, Index first) const { apply<false>(keys_, block, first); }

  /// Turns gradients of apply_to_queries(), or of apply_to_keys(), into those of its input.
  void apply_back_to_queries(Scalar* block, Index first) const {
    apply<true>(queries_, block, first);
  }
  void apply_back_to_keys(Scalar* block, Index first) const { apply<true>(keys_, block, first); }

  /// `cos` and `sin` of `distance·θ_m`, both times `ζ_m^(distance / xpos_scale_base)`, `[D/2][2]`.
  void turns(Index distance, Scalar* to) const {
    for (Index m = 0; m < dim_head_ / 2; ++m) {
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
    return map_blocks<Scalar>(keys, dim_head_, 1, [&](Index, const Scalar* in, Scalar* out) {
      std::copy(in, in + dim_head_ * count, out);
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
    auto step = make_block_buffer<Scalar>(dim_head_);
    turns(distance, step.data());
    auto placed = make_block_buffer<Scalar>(dim_head_ * count);
    Index first = 0;
    return map_blocks<Scalar>(queries, dim_head_, 1, [&](Index, const Scalar* in, Scalar* out) {
      std::copy(in, in + dim_head_ * count, placed.data());
      apply_to_queries(placed.data(), first);
      turn_all(dim_head_, placed.data(), step.data(), out);
      first += count;
    });
  }

 private:
  static constexpr Index count = block_rows<Scalar>;

  void check_rows(const char* argument, Index rows, Index columns) const {
    if (columns != dim_head_) reject(argument, std::to_string(dim_head_) + " columns", columns);
    if (rows > group_) reject(argument, "at most " + std::to_string(group_) + " rows", rows);
  }

  static Index checked(Index dim_head, const std::optional<double>& xpos_scale_base) {
    detail::require_dim_head("dim_head", dim_head);
    if (dim_head % 2 != 0) reject("dim_head", "a positive even number", dim_head);
    if (xpos_scale_base && !(std::isfinite(*xpos_scale_base) && *xpos_scale_base >= 0.5))
      reject("xpos_scale_base", "a finite number of at least 0.5", *xpos_scale_base);
    return dim_head;
  }

  struct Turn {
    double cosine;
    double sine;
  };

  // Long groups make tables that leave the cache, short ones many steps; and within a group
  // ζ_0^(−length / base), the largest factor, must stay far from overflow: below 2^24.
  static Index group_length(std::optional<double> xpos_scale_base) {
    constexpr double longest = 256;
    const double most =
        xpos_scale_base
            ? (std::min)(longest, std::min<int>(24, std::numeric_limits<Scalar>::max_exponent / 2) *
                                      std::log(2.0) / std::log(1.4 / 0.4) * *xpos_scale_base)
            : longest;
    return (std::max<Index>)(1, static_cast<Index>(most) / count) * count;
  }

  Turn turn_by(double distance, Index m) const {
    const double dim = static_cast<double>(dim_head_);
    const double two_m = 2 * static_cast<double>(m);
    const double angle = distance * std::pow(10000.0, -two_m / dim);
    const double decay =
        xpos_scale_base_ ? std::pow((two_m + 0.4 * dim) / (1.4 * dim), distance / *xpos_scale_base_)
                         : 1.0;
    return {std::cos(angle) * decay, std::sin(angle) * decay};
  }

  // Tables are [block of the group][m][cosine, sine][block_rows].
  Index table_place(Index place, Index m) const {
    return place / count * dim_head_ * count + m * 2 * count + place % count;
  }

  template <bool Back>
  void apply(const BlockBuffer<Scalar>& table, Scalar* block, Index first) const {
    using L = Lanes<Scalar>;
    const Index half = dim_head_ / 2;
    const Scalar* turn = table.data() + first % group_ * dim_head_;
    for (Index m = 0; m < half; ++m, turn += 2 * count) {
      Scalar* a = block + m * count;
      Scalar* b = block + (m + half) * count;
      // The transpose of a turn is the turn the other way, with the same decay.
      const L sine = L::load(turn + count);
      rotate_pair<Scalar>(a, b, L::load(turn), Back ? L::zero() - sine : sine, a, b);
    }
  }

  Index dim_head_ = 0;
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
  /// \param shift added to every distance, `lf·w`
  /// \param behind, ahead rows before and after its own that a query can see, at least 0
  /// \throws std::invalid_argument if they are negative, or `rotary` is default-constructed
  RotarySteps(const RotaryEmbedding<Scalar>& rotary, Index shift, Index behind, Index ahead)
      : group_(checked(rotary, behind, ahead)),
        dim_head_(rotary.dim_head()),
        first_(-ceil_div(ahead, rotary.group())),
        turns_(make_block_buffer<Scalar>((ceil_div(behind, rotary.group()) - first_ + 1) *
                                         rotary.dim_head())) {
    const Index steps = static_cast<Index>(turns_.size()) / rotary.dim_head();
    for (Index step = 0; step < steps; ++step)
      rotary.turns((first_ + step) * rotary.group() + shift,
                   turns_.data() + step * rotary.dim_head());
  }

  /// Becomes as many steps, up to that over `last` groups: to follow queries that go far from keys
  /// that stay. Allocates nothing.
  /// \param rotary, shift those that this was made with
  void move_to(const RotaryEmbedding<Scalar>& rotary, Index shift, Index last) {
    const Index steps = static_cast<Index>(turns_.size()) / dim_head_;
    if (first_ == last - steps + 1) return;
    first_ = last - steps + 1;
    for (Index step = 0; step < steps; ++step)
      rotary.turns((first_ + step) * rotary.group() + shift, turns_.data() + step * dim_head_);
  }

  Index group() const { return group_; }

  /// \param groups_back from the queries' group to the keys'
  void turn_queries(const Scalar* block, Index groups_back, Scalar* turned) const {
    turn_all(dim_head_, block, turns_.data() + (groups_back - first_) * dim_head_, turned);
  }

  /// Adds, to the gradient of turn_queries()' input, what that of its result makes of it.
  void turn_gradients_back(const Scalar* block, Index groups_back, Scalar* sum) const {
    turn_all_back(dim_head_, block, turns_.data() + (groups_back - first_) * dim_head_, sum);
  }

 private:
  static Index checked(const RotaryEmbedding<Scalar>& rotary, Index behind, Index ahead) {
    detail::require_at_least("rotary.dim_head()", rotary.dim_head(), 1);
    detail::require_at_least("behind", behind, 0);
    detail::require_at_least("ahead", ahead, 0);
    return rotary.group();
  }

  Index group_ = 0;
  Index dim_head_ = 0;
  Index first_ = 0;
  BlockBuffer<Scalar> turns_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
