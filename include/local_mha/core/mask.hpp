// SPDX-License-Identifier: MIT
/// \file
/// Which keys are padding, with the polarity in the type.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// The keys of each sequence that nobody attends, `[B, N]`.
///
/// A bare bool tensor does not say whether `true` means "masked" or "attend" (the Python packages
/// document one and implement the other), so a mask is made by the function that says it:
/// masked(), keep(), from_lengths(), or masked_view(). Without an argument it masks nothing.
class PaddingMask {
  using Flags = std::vector<std::uint8_t>;

 public:
  /// Masks nothing, for any `[B, N]`.
  PaddingMask() = default;
  // Copies share what does not change, and moving is copying.
  PaddingMask(const PaddingMask& other)
      : shape_(other.shape_),
        masked_(other.masked_),
        own_(other.own_),
        view_(other.owns() ? own_.data() : other.view_),
        given_(other.given_) {}
  PaddingMask& operator=(const PaddingMask& other) {
    if (this == &other) return *this;
    own_ = other.own_;
    shape_ = other.shape_;
    masked_ = other.masked_;
    view_ = other.owns() ? own_.data() : other.view_;
    given_ = other.given_;
    return *this;
  }
  ~PaddingMask() = default;

  /// A mask whose `true` means: not attended.
  /// \param t `[B, N]`, true = masked, not attended
  static PaddingMask masked(TensorView<const bool, 2> t) { return PaddingMask(t, true); }

  /// A mask whose `true` means: attended.
  /// \param t `[B, N]`, true = attended (the polarity of the Python packages' code)
  static PaddingMask keep(TensorView<const bool, 2> t) { return PaddingMask(t, false); }

  /// The same as masked(), but looks at `t`, which must outlive it, where the others copy: it
  /// allocates nothing. No temporary tensor.
  static PaddingMask masked_view(TensorView<const bool, 2> t) {
    static_assert(sizeof(bool) == 1);
    PaddingMask mask;
    mask.shape_ = t.dimensions();
    mask.view_ = reinterpret_cast<const std::uint8_t*>(t.data());
    mask.given_ = true;
    return mask;
  }
  template <int Options, typename Extent>
  static PaddingMask masked_view(const Eigen::Tensor<bool, 2, Options, Extent>&&) = delete;

  /// The same of flags that are there already, 1 = masked.
  /// \throws std::invalid_argument unless there are `B·N` of them
  static PaddingMask masked_view(std::span<const std::uint8_t> flags,
                                 const std::array<Index, 2>& shape) {
    TensorView<const std::uint8_t, 2> view(flags.data(), shape);
    if (static_cast<Index>(flags.size()) != view.size())
      reject("flags", std::to_string(view.size()) + " for " + to_string(shape), flags.size());
    PaddingMask mask;
    mask.shape_ = shape;
    mask.view_ = flags.data();
    mask.given_ = true;
    return mask;
  }

  /// One that looks at this one's flags, which must outlive it.
  PaddingMask view() const LOCAL_MHA_LIFETIME_BOUND {
    PaddingMask mask;
    mask.shape_ = shape_;
    mask.view_ = view_;
    mask.given_ = given_;
    return mask;
  }

  /// The first `lengths[b]` of `seqlen` positions of sequence `b` are attended.
  /// \throws std::invalid_argument if a length lies outside `[0, seqlen]`
  static PaddingMask from_lengths(std::span<const Index> lengths, Index seqlen) {
    const auto batch = static_cast<Index>(lengths.size());
    constexpr Index most = Index{1} << 40;
    if (seqlen < 0 || (batch > 0 && seqlen > most / batch))
      reject("seqlen", "at least 0, and at most 2^40 positions in all", seqlen);
    for (std::size_t b = 0; b < lengths.size(); ++b)
      if (lengths[b] < 0 || lengths[b] > seqlen)
        reject("lengths[" + std::to_string(b) + "]", "0 to " + std::to_string(seqlen), lengths[b]);
    PaddingMask mask;
    mask.shape_ = {batch, seqlen};
    Flags masked(lengths.size() * static_cast<std::size_t>(seqlen), 1);
    for (std::size_t b = 0; b < lengths.size(); ++b) {
      const auto row = masked.begin() + static_cast<Index>(b) * seqlen;
      std::fill(row, row + lengths[b], std::uint8_t{0});
    }
    mask.own(std::move(masked));
    return mask;
  }

  /// Becomes a copy of another mask that looks at no one's flags, nor shares them. Memory is used
  /// again.
  void assign(const PaddingMask& other) {
    if (this == &other) return;
    given_ = false;
    if (other.given_) {
      own_.assign(other.view_, other.view_ + other.size());
      view_ = own_.data();
    }
    masked_.reset();
    shape_ = other.shape_;
    given_ = other.given_;
  }

  /// The same flags of the same shape, or both masks nothing for any shape.
  friend bool operator==(const PaddingMask& a, const PaddingMask& b) {
    if (a.given_ != b.given_ || a.shape_ != b.shape_) return false;
    return !a.given_ ||
           std::equal(a.view_, a.view_ + a.size(), b.view_,
                      [](std::uint8_t x, std::uint8_t y) { return (x != 0) == (y != 0); });
  }

  /// False for a default-constructed mask, which fits every shape.
  explicit operator bool() const { return given_; }

  /// `[B, N]`
  const std::array<Index, 2>& shape() const { return shape_; }

  /// `N` flags of sequence `b`, 1 = masked; null if nothing is masked.
  /// \throws std::invalid_argument if there is no such sequence
  const std::uint8_t* row(Index b) const {
    if (!given_) return nullptr;
    if (b < 0 || b >= shape_[0]) reject("b", "0 to " + std::to_string(shape_[0] - 1), b);
    return view_ + b * shape_[1];
  }

 private:
  PaddingMask(TensorView<const bool, 2> t, bool true_is_masked) : shape_(t.dimensions()) {
    Flags masked(static_cast<std::size_t>(t.size()));
    for (std::size_t i = 0; i < masked.size(); ++i)
      masked[i] = t.data()[i] == true_is_masked ? 1 : 0;
    own(std::move(masked));
  }

  void own(Flags masked) {
    masked_ = std::make_shared<const Flags>(std::move(masked));
    view_ = masked_->data();
    given_ = true;
  }
  Index size() const { return shape_[0] * shape_[1]; }
  bool owns() const { return !own_.empty() && view_ == own_.data(); }

  std::array<Index, 2> shape_{0, 0};
  std::shared_ptr<const Flags> masked_;  // copies share them
  Flags own_;                            // that assign() has made
  const std::uint8_t* view_ = nullptr;   // of all sequences, if it is given
  bool given_ = false;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
