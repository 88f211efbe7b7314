// SPDX-License-Identifier: MIT
/// \file
/// Which keys a query sees: the only window arithmetic of the library.
#pragma once

#include <algorithm>
#include <limits>

#include <local_mha/config.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// The look-around of local attention. `w` is the window size, the bucket of position `i` is `i/w`.
///
/// A query at `i` sees the keys at `j` whose bucket lies in `[i/w − lb, i/w + lf]`, of these only
/// `j <= i` if causal, and only `−lf·w <= i − j <= lb·w` if exact. For w = 2, lb = 1:
///
///     causal, exact   causal, bucketed   lf = 1, exact   lf = 1, bucketed
///     1 . . . . .     1 . . . . .        1 1 1 . . .     1 1 1 1 . .
///     1 1 . . . .     1 1 . . . .        1 1 1 1 . .     1 1 1 1 . .
///     1 1 1 . . .     1 1 1 . . .        1 1 1 1 1 .     1 1 1 1 1 1
///     . 1 1 1 . .     1 1 1 1 . .        . 1 1 1 1 1     1 1 1 1 1 1
///     . . 1 1 1 .     . . 1 1 1 .        . . 1 1 1 1     . . 1 1 1 1
///     . . . 1 1 1     . . 1 1 1 1        . . . 1 1 1     . . 1 1 1 1
///
/// Both ends of what a query sees grow with `i`, on which the attention kernel relies.
class Window {
 public:
  /// \param window_size takes the place of the configuration's, at least 1
  /// \param first_position the position of row 0: buckets are counted from position 0
  /// \throws std::invalid_argument naming the argument, or member of the configuration, that is out
  ///         of range
  Window(const LocalAttentionConfig& config, Index window_size, Index first_position = 0)
      : size_(checked(config, window_size, first_position)),
        look_backward_(config.look_backward),
        look_forward_(resolved_look_forward(config)),
        behind_(times(look_backward_, size_)),
        ahead_(times(look_forward_, size_)),
        phase_(first_position % size_),
        causal_(config.causal),
        exact_(config.exact_windowsize) {}

  explicit Window(const LocalAttentionConfig& config) : Window(config, config.window_size) {}

  Index size() const { return size_; }
  /// `lb·w`
  Index behind() const { return behind_; }
  /// `lf·w`
  Index ahead() const { return ahead_; }
  /// Columns of an attention bias, `(1 + lb + lf)·w`
  Index look_around() const { return times(1 + look_backward_ + look_forward_, size_); }

  /// Keys that query row `i` sees, if the sequence is endless on both sides.
  Range keys(Index i) const {
    if (exact_) return {i - behind_, i + (causal_ ? 0 : ahead_) + 1};
    const Index bucket = i - place_in_bucket(i);
    return {bucket - behind_, causal_ ? i + 1 : bucket + ahead_ + size_};
  }

  /// Keys that any query of `rows` (not empty) sees, of those in `[0, seqlen)`.
  Range keys_of(const Range& rows, Index seqlen) const {
    return Range{keys(rows.begin).begin, keys(rows.end - 1).end}.clipped_to({0, seqlen});
  }

  /// True if query row `i` sees key row `j`, if there is one.
  bool attends(Index i, Index j) const { return keys(i).contains(j); }

  /// Row of the attention bias for query row `i`, `i mod w`.
  Index place_in_bucket(Index i) const {
    // Where one window holds the whole sequence, phase + i must not overflow.
    return i < size_ - phase_ ? phase_ + i : (i - (size_ - phase_)) % size_;
  }

  /// Key row of the attention bias' column 0 for query row `i`.
  Index look_around_begin(Index i) const { return i - place_in_bucket(i) - behind_; }

  /// True if what a query sees moves on by one from each query to the next, the ends of the
  /// sequence aside.
  bool slides() const { return exact_; }

  /// Query rows `[0, complete)` see none of the key rows from `rows` on.
  Index complete(Index rows) const {
    if (causal_) return rows;
    const Index last_seen = rows - ahead_;
    if (last_seen <= 0) return 0;
    return exact_ ? last_seen : (std::max<Index>)(0, last_seen - place_in_bucket(last_seen));
  }

  /// Rows before its own that a query row can see, and rows after it.
  Index reach_behind() const { return exact_ ? behind_ : behind_ + (size_ - 1); }
  Index reach_ahead() const {
    if (causal_) return 0;
    return exact_ ? ahead_ : ahead_ + (size_ - 1);
  }

  /// Whether the room that a look-around takes in sequences of `made_for` rows does in those of
  /// `seqlen`, too: they are no longer, or the look-around ends before both.
  /// \param margin rows beside the look-around
  bool room_serves(Index made_for, Index seqlen, Index margin) const {
    return seqlen <= made_for || reach_behind() + reach_ahead() + margin <= made_for;
  }

  friend bool operator==(const Window&, const Window&) = default;

 private:
  // Longer than any sequence, and far from overflow when such sizes are added.
  static constexpr Index most_ = (std::numeric_limits<Index>::max)() / 16;
  static Index checked(const LocalAttentionConfig& config, Index window_size,
                       Index first_position) {
    detail::require_at_least("window_size", window_size, 1);
    detail::require_look_around(config);
    detail::require_at_least("first_position", first_position, 0);
    return (std::min)(window_size, most_);
  }
  static Index times(Index windows, Index size) {
    return windows > 0 && size > most_ / windows ? most_ : windows * size;
  }

  Index size_;
  Index look_backward_;
  Index look_forward_;
  Index behind_;
  Index ahead_;
  Index phase_;
  bool causal_;
  bool exact_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
