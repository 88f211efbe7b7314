// SPDX-License-Identifier: MIT
/// \file
/// Which keys a query sees: the only window arithmetic of the library.
#pragma once

#include <algorithm>
#include <limits>
#include <string>

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
/// A token window shows the keys `[i − left, i + right]`. Its `w` is 1: it slides by one position.
///
/// The first keys of a sequence stay visible when the window has moved on from them; as long as it
/// has not, they are part of what it shows.
///
/// Both ends of what a query sees grow with `i`, on which the attention kernel relies.
class Window {
 public:
  /// The window that a configuration describes.
  /// \param window_size takes the place of the configuration's, at least 1; of no use to a token
  ///        window
  /// \param first_position the position of row 0: buckets are counted from position 0
  /// \throws std::invalid_argument naming the argument, or member of the configuration, that is out
  ///         of range
  Window(const LocalAttentionConfig& config, Index window_size, Index first_position = 0)
      : size_(checked(config, window_size, first_position)),
        behind_(times(config.look_backward, size_)),
        ahead_(times(resolved_look_forward(config), size_)),
        look_around_(times(1 + config.look_backward + resolved_look_forward(config), size_)),
        rotary_shift_(ahead_),
        phase_(first_position % size_),
        first_keys_((std::min)(config.first_keys, most_)),
        causal_(config.causal),
        exact_(config.exact_windowsize) {
    if (!config.token_window) return;
    behind_ = (std::min)(config.token_window->left, most_);
    ahead_ = (std::min)(config.token_window->right, most_);
    look_around_ = behind_ + ahead_ + 1;
    rotary_shift_ = 0;
    causal_ = ahead_ == 0;
    exact_ = true;
  }

  /// The window of a configuration.
  explicit Window(const LocalAttentionConfig& config) : Window(config, config.window_size) {}

  /// `w`
  Index size() const { return size_; }
  /// `lb·w`, or `left`
  Index behind() const { return behind_; }
  /// `lf·w`, or `right`
  Index ahead() const { return ahead_; }
  /// Columns of an attention bias, `(1 + lb + lf)·w`, or `left + right + 1`
  Index look_around() const { return look_around_; }
  /// What rotary distances are larger by: `lf·w`, or 0
  Index rotary_shift() const { return rotary_shift_; }
  /// Rows that stay visible.
  Index first_keys() const { return first_keys_; }

  /// Keys that the window shows to query row `i`, if the sequence is endless on both sides, and the
  /// first keys if they adjoin.
  Range keys(Index i) const {
    Range shown = in_window(i);
    if (first_keys_ > 0 && first_keys_ >= shown.begin) {
      shown.begin = (std::min<Index>)(shown.begin, 0);
      if (!causal_) shown.end = (std::max)(shown.end, first_keys_);
    }
    return shown;
  }

  /// What query row `i` sees of a sequence that is endless on both sides, or of `seqlen` rows: the
  /// keys from `begin` to before `end`, first keys that do not adjoin apart.
  /// \throws std::invalid_argument unless `0 <= i`, and `i < seqlen` if that is given
  Range keys_visible(Index i) const {
    detail::require_at_least("i", i, 0);
    return keys(i);
  }
  /// The same of a sequence of `seqlen` rows.
  Range keys_visible(Index i, Index seqlen) const {
    detail::require_at_least("seqlen", seqlen, 0);
    if (i < 0 || i >= seqlen) reject("i", "a row of " + std::to_string(seqlen), i);
    return keys(i).clipped_to({0, seqlen});
  }

  /// Keys that any query of `rows` (not empty) sees, of those in `[0, seqlen)`.
  Range keys_of(const Range& rows, Index seqlen) const {
    return Range{keys(rows.begin).begin, keys(rows.end - 1).end}.clipped_to({0, seqlen});
  }

  /// True if query row `i` sees key row `j`, if there is one.
  bool attends(Index i, Index j) const {
    return keys(i).contains(j) || (Range{0, first_keys_}.contains(j) && (!causal_ || j <= i));
  }

  /// Row of the attention bias for query row `i`, `i mod w`.
  Index place_in_bucket(Index i) const {
    // Where one window holds the whole sequence, phase + i must not overflow.
    return i < size_ - phase_ ? phase_ + i : (i - (size_ - phase_)) % size_;
  }

  /// Key row of the attention bias' column 0 for query row `i`.
  Index look_around_begin(Index i) const { return i - place_in_bucket(i) - behind_; }

  /// True if an end of what a query sees is that of the sequence (TokenWindow::unbounded).
  bool is_endless() const { return exact_ && (behind_ == most_ || ahead_ == most_) && size_ == 1; }

  /// True if what a query sees moves on by one from each query to the next, the ends of the
  /// sequence aside.
  bool slides() const { return exact_ && first_keys_ == 0; }

  /// Query rows `[0, complete)` see none of the key rows from `rows` on.
  Index complete(Index rows) const {
    if (causal_) return rows;
    if (rows < first_keys_) return 0;
    const Index last_seen = rows - ahead_;
    if (last_seen <= 0) return 0;
    return exact_ ? last_seen : (std::max<Index>)(0, last_seen - place_in_bucket(last_seen));
  }

  /// Rows before its own that the window shows to a query row, and rows after it.
  Index reach_behind() const { return (exact_ ? behind_ : behind_ + (size_ - 1)) + first_keys_; }
  /// Rows after its own that the window shows to a query row.
  Index reach_ahead() const {
    if (causal_) return 0;
    return (std::max)(exact_ ? ahead_ : ahead_ + (size_ - 1), first_keys_ - 1);
  }

  /// Rows beside its own that a query row can see in sequences of `seqlen` rows.
  Index reach(Index seqlen) const {
    return (std::min)(reach_behind(), seqlen) + (std::min)(reach_ahead(), seqlen);
  }
  /// Blocks of `rows` rows that a block of queries sees at most, at least 1.
  Index blocks_seen(Index seqlen, Index rows) const {
    const Index most = (std::min)(ceil_div(reach(seqlen), rows) + 2, ceil_div(seqlen, rows));
    return (std::max<Index>)(1, most);
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
    detail::require_at_least("first_keys", config.first_keys, 0);
    detail::require_at_least("first_position", first_position, 0);
    if (config.token_window) {
      detail::require_token_window(config);
      return 1;
    }
    detail::require_at_least("window_size", window_size, 1);
    detail::require_look_around(config);
    return (std::min)(window_size, most_);
  }
  static Index times(Index windows, Index size) {
    return windows > 0 && size > most_ / windows ? most_ : windows * size;
  }

  Range in_window(Index i) const {
    if (exact_) return {i - behind_, i + (causal_ ? 0 : ahead_) + 1};
    const Index bucket = i - place_in_bucket(i);
    return {bucket - behind_, causal_ ? i + 1 : bucket + ahead_ + size_};
  }

  Index size_;
  Index behind_;
  Index ahead_;
  Index look_around_;
  Index rotary_shift_;
  Index phase_;
  Index first_keys_;
  bool causal_;
  bool exact_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
