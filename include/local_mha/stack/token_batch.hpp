// SPDX-License-Identifier: MIT
/// \file
/// A batch of tokens as LocalTransformer takes it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/layer/call.hpp>
#include <local_mha/stack/packed_batch.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// The tokens of a call that pass the model, all of sequences, and where in its sequence each is.
class TokenBatch {
 public:
  using Tokens = TensorView<const std::int64_t, 2>;

  /// \param tokens `[B, N]`
  /// \param call must outlive this
  /// \throws std::invalid_argument if its mask, lengths or cu_seqlens do not fit
  TokenBatch(const Tokens& tokens, const EncoderCall& call)
      : call_(call), shape_(tokens.dimensions()) {
    const auto [batch, seqlen] = shape_;
    if (call.mask) require_shape("mask", call.mask.shape(), shape_);
    check_cu_seqlens(call.cu_seqlens, batch, seqlen);
    rows_.assign({batch, seqlen, 1}, call.lengths, !call.cu_seqlens.empty());
    tokens_ = packed(tokens);
    places_.resize(static_cast<std::size_t>(tokens_.size()));
    for_each_sequence([&](Index, Index begin, Index end) {
      for (Index i = begin; i < end; ++i) places_[static_cast<std::size_t>(i)] = i - begin;
    });
    if (rows_.ragged() && call.mask) rows_.pack(call.mask, flags_);
  }
  TokenBatch(const TokenBatch&) = delete;
  TokenBatch& operator=(const TokenBatch&) = delete;
  ~TokenBatch() = default;

  /// `[B, N]`, or of sequences of different lengths `[1, sum of lengths]`.
  const Tensor<std::int64_t, 2>& tokens() const { return tokens_; }
  std::span<const std::int64_t> places() const { return places_; }
  PaddingMask mask() const {
    if (flags_.empty()) return rows_.ragged() ? PaddingMask() : call_.mask;
    return PaddingMask::masked_view(flags_, tokens_.dimensions());
  }
  std::span<const Index> cu_seqlens() const {
    return rows_.ragged() ? rows_.cu_seqlens() : call_.cu_seqlens;
  }

  /// Calls `visit(sequence, begin, end)` with the rows of tokens() of each.
  template <typename Visitor>
  void for_each_sequence(Visitor&& visit) const {
    const auto [batch, seqlen] = shape_;
    const std::span<const Index> cut = cu_seqlens();
    for (std::size_t s = 1; s < cut.size(); ++s)
      visit(static_cast<Index>(s) - 1, cut[s - 1], cut[s]);
    if (!cut.empty()) return;
    for (Index b = 0; b < batch; ++b) visit(b, b * seqlen, (b + 1) * seqlen);
  }

  /// What stands at the tokens that pass.
  /// \param given `[B, N]`
  Tensor<std::int64_t, 2> packed(const Tokens& given) const {
    const std::array<Index, 3> shape = rows_.packed_shape();
    Tensor<std::int64_t, 2> made(shape[0], shape[1]);
    rows_.pack(StridedView<const std::int64_t>(given.data(), {shape_[0], shape_[1], 1}),
               made.data());
    return made;
  }
  /// Results of the tokens that pass, at their places in the batch; 0 at the others.
  /// \param made `[.., .., channels]`, of tokens()
  /// \return `[B, N, channels]`
  template <typename Scalar>
  Tensor<Scalar, 3> unpacked(Tensor<Scalar, 3> made) const {
    if (!rows_.ragged()) return made;
    const Index channels = made.dimension(2);
    Tensor<Scalar, 3> all(shape_[0], shape_[1], channels);
    all.setZero();
    for_each_sequence([&](Index b, Index begin, Index end) {
      std::copy(made.data() + begin * channels, made.data() + end * channels,
                all.data() + b * shape_[1] * channels);
    });
    return all;
  }

 private:
  const EncoderCall& call_;
  std::array<Index, 2> shape_;
  RaggedBatch rows_;
  Tensor<std::int64_t, 2> tokens_;
  std::vector<std::int64_t> places_;
  std::vector<std::uint8_t> flags_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
