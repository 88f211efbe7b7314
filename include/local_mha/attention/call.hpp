// SPDX-License-Identifier: MIT
/// \file
/// How an attention is called, and what a forward pass keeps of its call for the backward pass.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/optional_view.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What a call of LocalAttention is given beside queries, keys and values; all of it may be left
/// out:
///
///     attention.forward(q, k, v, {.mask = mask, .device = device});
template <typename Scalar>
struct LocalAttentionCall {
  /// Keys that nobody attends, `[B, N]`.
  PaddingMask mask = {};
  /// `[H or 1, w, (1 + lb + lf)·w]`, or `[B·H, …]`, one for each sequence, or of any number that
  /// divides `B·H`: head `b·H + h` takes that of its number modulo theirs. Added to the scaled
  /// scores: query `i` takes row `i mod w`, and key `j` column `j − (i/w − lb)·w`. None with a
  /// token window.
  OptionalView<Scalar, 3> attn_bias = {};
  /// `[H or 1, left + right + 1]`, of a token window whose ends are bounded: the score of query `i`
  /// and key `j` has `relative_bias[h, j − i + left]` added.
  OptionalView<Scalar, 2> relative_bias = {};
  /// `[H]`: scores without a value, one for each query, which take their share of the softmax.
  OptionalView<Scalar, 1> sinks = {};
  /// Takes the place of the configuration's window in every rule, while xpos_scale_base stays.
  /// Allowed with xPos only.
  std::optional<Index> window_size = {};
  /// Position of row 0, from which windows are counted, at least 0. Rows before it do not exist.
  Index first_position = 0;
  /// Training mode, in which dropout acts. Empty: evaluation.
  std::optional<Training> training = {};
  /// Packed sequences, if not empty: rows `[cu_seqlens[s], cu_seqlens[s + 1])` of a batch of 1 are
  /// a sequence of their own, in every rule. `[S + 1]`, from 0, never falling, to N.
  std::span<const Index> cu_seqlens = {};
  /// Rows of each sequence, if not empty, `[B]`: those behind them are not computed, and their
  /// results are 0. Not beside cu_seqlens.
  std::span<const Index> lengths = {};
  /// Rows that every query of their sequence sees, and that see every key of it, whatever else
  /// says: `[B, N]`, true = global.
  OptionalView<bool, 2> global_rows = {};
  /// Whose threads share the work; the same bits for any number of them.
  AnyDevice device = {};
};

namespace detail {

/// What a call's queries see.
/// \throws std::invalid_argument if that is not what the configuration allows
template <typename Scalar>
Window window_of(const LocalAttentionConfig& config, const LocalAttentionCall<Scalar>& call) {
  if (call.window_size) {
    if (!config.use_xpos)
      reject("window_size", "none at the call, because the attention has no xPos",
             *call.window_size);
    if (config.token_window)
      reject("window_size", "none at the call, because the attention has a token window",
             *call.window_size);
    require_at_least("window_size", *call.window_size, 1);
  }
  constexpr Index farthest = Index{1} << 60;
  if (call.first_position < 0 || call.first_position > farthest)
    reject("first_position", "0 to 2^60", call.first_position);
  if (call.first_position != 0 && !call.cu_seqlens.empty())
    reject("first_position", "0, because packed sequences start there", call.first_position);
  return Window(config, call.window_size.value_or(config.window_size), call.first_position);
}

/// Some numbers of tensors, by which others are told from them: all of a small tensor, 64 that are
/// spread over a large one. Tensors come as a range of what has `size()` and `[i]`, such as
/// std::span.
template <typename Scalar>
class Sample {
 public:
  /// Memory for as many numbers is used again.
  template <typename Tensors>
  void take(const Tensors& tensors) {
    values_.clear();
    size_ = size_of(tensors);
    for_each(tensors, [&](const Scalar& value) { values_.push_back(value); });
  }
  template <typename Tensors>
  bool is_of(const Tensors& tensors) const {
    if (size_of(tensors) != size_) return false;
    std::size_t i = 0;
    bool same = true;
    for_each(tensors, [&](const Scalar& value) {
      same = same && i < values_.size() && is_same(value, values_[i]);
      ++i;
    });
    return same && i == values_.size();
  }

 private:
  // A NaN is the same as another.
  static bool is_same(const Scalar& a, const Scalar& b) { return a == b || (a != a && b != b); }
  template <typename Tensors>
  static std::size_t size_of(const Tensors& tensors) {
    std::size_t size = 0;
    for (const auto& tensor : tensors) size += tensor.size();
    return size;
  }
  template <typename Tensors, typename Visit>
  static void for_each(const Tensors& tensors, Visit&& visit) {
    constexpr std::size_t most = 64;
    for (const auto& tensor : tensors) {
      const std::size_t size = tensor.size();
      // Of a matrix, the numbers are not of one column.
      for (std::size_t i = 0; i < (std::min)(size, most); ++i)
        visit(tensor[size <= most ? i : (size - 1) * i / (most - 1)]);
    }
  }

  std::size_t size_ = 0;
  std::vector<Scalar> values_;
};

template <typename Scalar, int Rank>
std::array<std::span<const Scalar>, 1> numbers_of(const TensorView<const Scalar, Rank>& tensor) {
  return {std::span(tensor.data(), static_cast<std::size_t>(tensor.size()))};
}

/// Rejects an argument of a backward pass if it is given and is not what the forward pass had.
template <typename T>
void require_same(std::string_view argument, bool given, const T& got, const T& of_forward) {
  if (given && !(got == of_forward))
    reject(argument, "that of forward_saving(), or none", "another");
}

/// What a forward pass was called with: the backward pass takes from here what it was given, but
/// for tensors of numbers, which it knows again.
template <typename Scalar>
class SavedCall {
 public:
  using Call = LocalAttentionCall<Scalar>;

  void take(const Call& given) {
    kept_ = {.window_size = given.window_size,
             .first_position = given.first_position,
             .training = given.training};
    mask_.assign(given.mask);
    cu_seqlens_.assign(given.cu_seqlens.begin(), given.cu_seqlens.end());
    lengths_.assign(given.lengths.begin(), given.lengths.end());
    global_rows_.reset();
    if (given.global_rows)
      global_rows_.emplace(Eigen::TensorMap<const Tensor<bool, 2>>(
          given.global_rows->data(), given.global_rows->dimensions()));
    attn_bias_.take(given.attn_bias);
    relative_bias_.take(given.relative_bias);
    sinks_.take(given.sinks);
  }

  /// That of the forward pass, with the tensors and the device of `given`, which are not kept.
  /// \return valid as long as this and `given`
  Call with_tensors_of(const Call& given) const {
    Call call = kept_;
    call.mask = mask_.view();
    call.cu_seqlens = cu_seqlens_;
    call.lengths = lengths_;
    if (global_rows_) call.global_rows = *global_rows_;
    call.attn_bias = given.attn_bias;
    call.relative_bias = given.relative_bias;
    call.sinks = given.sinks;
    call.device = given.device;
    return call;
  }
  std::span<const Index> lengths() const { return lengths_; }

  /// \throws std::invalid_argument if something is given and is not that of the call, or a tensor
  ///         that is not kept is missing
  void require_same_call(const Call& given) const {
    require_same("mask", static_cast<bool>(given.mask), given.mask, mask_);
    require_same("window_size", given.window_size.has_value(), given.window_size,
                 kept_.window_size);
    require_same("first_position", given.first_position != 0, given.first_position,
                 kept_.first_position);
    require_same("training", given.training.has_value(), given.training, kept_.training);
    require_same("cu_seqlens", !given.cu_seqlens.empty(),
                 std::ranges::equal(given.cu_seqlens, cu_seqlens_), true);
    require_same("lengths", !given.lengths.empty(), std::ranges::equal(given.lengths, lengths_),
                 true);
    require_same("global_rows", given.global_rows.has_value(),
                 given.global_rows && global_rows_ &&
                     TensorView<const bool, 2>(*global_rows_).dimensions() ==
                         given.global_rows->dimensions() &&
                     std::equal(global_rows_->data(), global_rows_->data() + global_rows_->size(),
                                given.global_rows->data()),
                 true);
    attn_bias_.require_same("attn_bias", given.attn_bias);
    relative_bias_.require_same("relative_bias", given.relative_bias);
    sinks_.require_same("sinks", given.sinks);
  }

 private:
  // A tensor that may be there, by its shape and a sample.
  template <int Rank>
  class Known {
   public:
    using View = std::optional<TensorView<const Scalar, Rank>>;

    void take(const View& tensor) {
      shape_.reset();
      if (!tensor) return;
      numbers_.take(numbers_of(*tensor));
      shape_ = tensor->dimensions();
    }
    void require_same(std::string_view argument, const View& tensor) const {
      const auto describe = [](const auto& shape) {
        return shape ? to_string(*shape) : std::string("none");
      };
      const auto shape = tensor ? std::optional(tensor->dimensions()) : std::nullopt;
      if (shape != shape_)
        reject(argument, "that of forward_saving(), " + describe(shape_), describe(shape));
      if (tensor && !numbers_.is_of(numbers_of(*tensor)))
        reject(argument, "that of forward_saving()", "another");
    }

   private:
    std::optional<std::array<Index, static_cast<std::size_t>(Rank)>> shape_;
    Sample<Scalar> numbers_;
  };

  // What is no view.
  Call kept_;
  PaddingMask mask_;
  std::vector<Index> cu_seqlens_;
  std::vector<Index> lengths_;
  std::optional<Tensor<bool, 2>> global_rows_;
  Known<3> attn_bias_;
  Known<2> relative_bias_;
  Known<1> sinks_;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
