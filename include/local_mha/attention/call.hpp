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
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/ops/dropout.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What may differ from call to call of LocalAttention::forward().
struct LocalAttentionCall {
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
  std::optional<TensorView<const bool, 2>> global_rows = {};
};

/// Learned numbers that take part in the softmax.
template <typename Scalar>
struct AttentionTerms {
  /// `[H or 1, left + right + 1]`, of a token window whose ends are bounded: the score of query `i`
  /// and key `j` has `relative_bias[h, j − i + left]` added.
  std::optional<TensorView<const Scalar, 2>> relative_bias = {};
  /// `[H]`: scores without a value, one for each query, which take their share of the softmax.
  std::optional<TensorView<const Scalar, 1>> sinks = {};
};

namespace detail {

/// What a call's queries see.
/// \throws std::invalid_argument if that is not what the configuration allows
inline Window window_of(const LocalAttentionConfig& config, const LocalAttentionCall& call) {
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

/// What a forward pass was called with: the backward pass takes mask and options from here, and
/// knows the bias again.
template <typename Scalar>
class SavedCall {
 public:
  using Bias = std::optional<TensorView<const Scalar, 3>>;

  void take(const PaddingMask& mask, const Bias& attn_bias, const LocalAttentionCall& options,
            const AttentionTerms<Scalar>& terms = {}) {
    mask_.assign(mask);
    cu_seqlens_.assign(options.cu_seqlens.begin(), options.cu_seqlens.end());
    options_ = options;
    lengths_.assign(options.lengths.begin(), options.lengths.end());
    options_.cu_seqlens = options_.lengths = {};
    options_.global_rows.reset();
    global_rows_.reset();
    if (options.global_rows)
      global_rows_.emplace(Eigen::TensorMap<const Tensor<bool, 2>>(
          options.global_rows->data(), options.global_rows->dimensions()));
    bias_.take(attn_bias);
    relative_bias_.take(terms.relative_bias);
    sinks_.take(terms.sinks);
  }

  const PaddingMask& mask() const { return mask_; }
  /// Valid as long as this.
  LocalAttentionCall options() const {
    LocalAttentionCall options = options_;
    options.cu_seqlens = cu_seqlens_;
    options.lengths = lengths_;
    if (global_rows_) options.global_rows = *global_rows_;
    return options;
  }

  /// \throws std::invalid_argument if a mask or an option is given and is not that of the call, or
  ///         the bias or a term is not
  void require_same_call(const PaddingMask& mask, const Bias& attn_bias,
                         const LocalAttentionCall& options,
                         const AttentionTerms<Scalar>& terms = {}) const {
    require_same("mask", static_cast<bool>(mask), mask, mask_);
    require_same("window_size", options.window_size.has_value(), options.window_size,
                 options_.window_size);
    require_same("first_position", options.first_position != 0, options.first_position,
                 options_.first_position);
    require_same("training", options.training.has_value(), options.training, options_.training);
    require_same("cu_seqlens", !options.cu_seqlens.empty(),
                 std::equal(options.cu_seqlens.begin(), options.cu_seqlens.end(),
                            cu_seqlens_.begin(), cu_seqlens_.end()),
                 true);
    require_same("lengths", !options.lengths.empty(),
                 std::equal(options.lengths.begin(), options.lengths.end(), lengths_.begin(),
                            lengths_.end()),
                 true);
    require_same("global_rows", options.global_rows.has_value(),
                 options.global_rows && global_rows_ &&
                     TensorView<const bool, 2>(*global_rows_).dimensions() ==
                         options.global_rows->dimensions() &&
                     std::equal(global_rows_->data(), global_rows_->data() + global_rows_->size(),
                                options.global_rows->data()),
                 true);
    bias_.require_same("attn_bias", attn_bias);
    relative_bias_.require_same("relative_bias", terms.relative_bias);
    sinks_.require_same("sinks", terms.sinks);
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

  PaddingMask mask_;
  LocalAttentionCall options_;
  std::vector<Index> cu_seqlens_;
  std::vector<Index> lengths_;
  std::optional<Tensor<bool, 2>> global_rows_;
  Known<3> bias_;
  Known<2> relative_bias_;
  Known<1> sinks_;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
