// SPDX-License-Identifier: MIT
/// \file
/// A stack of layers over the ranks that hold a sequence.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/encoder.hpp>
#include <local_mha/layer/backward_room.hpp>
#include <local_mha/layer/call.hpp>
#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/call_check.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/mha.hpp>
#include <local_mha/mpi/parts.hpp>
#include <local_mha/mpi/split.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/stack/layer_stack.hpp>
#include <local_mha/stack/layer_stack_backward.hpp>
#include <local_mha/stack/packed_batch.hpp>
#include <local_mha/transformer.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// What calls over ranks may do with models beyond what everybody may.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
struct StackAccess {
  using Model = LocalTransformer<Scalar, Storage, Arithmetic>;

  static const LayerStack<Scalar, Storage, Arithmetic>& stack(
      const Encoder<Scalar, Storage, Arithmetic>& encoder) {
    return encoder.stack();
  }
  static const auto& weights(const Model& model) { return *model.weights_; }
  static Tensor<Scalar, 3> project(const Model& model, const AnyDevice& device,
                                   const RowMatrix<Scalar>& normed, const Tensor<Scalar, 3>& x) {
    return model.project(device, normed, x);
  }
  /// Rejects what are no tokens.
  /// \param lengths how many tokens of each sequence there are; empty: all
  static void check_tokens(const Model& model, const char* name,
                           const TensorView<const std::int64_t, 2>& tokens,
                           std::span<const Index> lengths,
                           std::optional<std::int64_t> ignored = {}) {
    const auto length_of = [&, n = tokens.dimension(1)](Index b) {
      return lengths.empty() ? n : lengths[static_cast<std::size_t>(b)];
    };
    model.check_tokens(name, tokens, length_of, ignored);
  }
  static void embed(const Model& model, std::int64_t token, Index place, Scalar* to) {
    model.embed(token, place, to);
  }
};

}  // namespace detail

namespace mpi::detail {

/// What a stack does with its attentions beyond what everybody may.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
struct MhaAccess {
  using Mha = LocalMHA<Scalar, Storage, Arithmetic>;
  using Room = local_mha::detail::LayerBackwardRoom<Scalar, Storage, Arithmetic>;

  static Mha make(const Communicator& communicator,
                  const local_mha::LocalMHA<Scalar, Storage, Arithmetic>& layer,
                  const Checksum& weights) {
    return Mha(communicator, layer, weights);
  }
  static Checksum description(const Mha& mha) { return mha.description(); }
  static local_mha::detail::AttentionInputs<Scalar> inputs_of(const Mha& mha, const Split& split,
                                                              Index batch,
                                                              const LocalMHACall<Scalar>& call) {
    return mha.inputs_of(split, batch, call);
  }
  static void run(const Mha& mha, const TensorView<Scalar, 3>& y,
                  const TensorView<const Scalar, 3>& x, const Split& split,
                  const LocalMHACall<Scalar>& call, const std::shared_ptr<const SeenRows>& seen,
                  SavedMHA<Scalar>* saved) {
    mha.run(y, x, split, call, seen, saved);
  }
  static void run_back(const Mha& mha, Room& room, const TensorView<Scalar, 3>& grad_x,
                       LocalMHAParameters<Scalar>& own, const SavedMHA<Scalar>& saved,
                       const TensorView<const Scalar, 3>& grad_y,
                       const TensorView<const Scalar, 3>& x, const Split& split,
                       const LocalMHACall<Scalar>& call, Tensor<Scalar, 3>* grad_attn_bias) {
    mha.run_own_back(room, grad_x, own, saved, grad_y, x, split, call, grad_attn_bias);
  }
};

/// The rows of a rank that pass a stack: all, or those of sequences, one after the other.
class OwnRows {
 public:
  /// \param shape `[B, split.rows(), dim]`
  OwnRows(const Split& split, const std::array<Index, 3>& shape, const EncoderCall& call)
      : lengths_(own_lengths(split, call.lengths)) {
    rows_.assign(shape, lengths_, !call.cu_seqlens.empty());
    const Index begin = split.stretch().begin;
    Index row = 0, whole = 0;
    for (std::size_t b = 0; b < static_cast<std::size_t>(shape[0]); ++b) {
      places_.push_back({row, whole + begin});
      row += lengths_.empty() ? split.rows() : lengths_[b];
      whole += lengths_.empty() ? split.total() : call.lengths[b];
    }
  }
  OwnRows() = default;

  const local_mha::detail::RaggedBatch& batch() const { return rows_; }
  /// Of each sequence here; empty: all.
  const std::vector<Index>& lengths() const { return lengths_; }
  /// In the batch as one process has it.
  const std::vector<local_mha::detail::RowPlace>& places() const { return places_; }

  /// Calls `task(in, out)` with tensors `[B, split.rows(), dim]` of rows that pass, and of
  /// what is made of them.
  template <typename Scalar, typename Task>
  void unpacked(const std::vector<TensorView<const Scalar, 3>>& in,
                const TensorView<Scalar, 3>& out, Task&& task) const {
    if (!rows_.ragged()) return task(in, out);
    std::vector<Tensor<Scalar, 3>> room(in.size() + 1, Tensor<Scalar, 3>(rows_.shape()));
    std::vector<TensorView<const Scalar, 3>> views;
    for (std::size_t i = 0; i < in.size(); ++i) {
      rows_.unpack(in[i].data(), StridedView<Scalar>(room[i]));
      views.emplace_back(room[i]);
    }
    task(views, TensorView<Scalar, 3>(room.back()));
    rows_.pack(StridedView<const Scalar>(room.back()), out.data());
  }

 private:
  std::vector<Index> lengths_;
  std::vector<local_mha::detail::RowPlace> places_;
  local_mha::detail::RaggedBatch rows_;
};

/// What a stack keeps over ranks: all but what it keeps of attentions, and that.
template <typename Scalar>
struct SavedSplitStack {
  local_mha::detail::SavedStack<Scalar> stack = {};
  OwnRows rows = {};
  std::vector<SavedMHA<Scalar>> attentions = {};
};

/// The layers of a stack, whose attentions are over ranks. All of its calls are after an agreement.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class SplitStack {
  using Stack = local_mha::detail::LayerStack<Scalar, Storage, Arithmetic>;
  using Access = MhaAccess<Scalar, Storage, Arithmetic>;

 public:
  /// \param weights of all that the stack is part of
  SplitStack(const Communicator& communicator, const Stack& stack, const Checksum& weights) {
    for (const auto& layer : stack.layers())
      attentions_.push_back(Access::make(communicator, layer.attention, weights));
  }

  /// Of all layers' configurations.
  void add_description(const Stack& stack, double ff_dropout, Checksum& to) const {
    to.add(stack.streams());
    to.add(ff_dropout);
    for (const auto& attention : attentions_) to.add(Access::description(attention).value());
  }

  /// \param x, y those rows that pass
  /// \param saved null, or what becomes what backward() needs
  void forward(const Stack& stack, const Split& split, const OwnRows& rows, TensorView<Scalar, 3> y,
               TensorView<const Scalar, 3> x, const EncoderCall& call,
               SavedSplitStack<Scalar>* saved) const {
    typename Stack::Workspace workspace;
    if (saved != nullptr) {
      saved->attentions.resize(attentions_.size());
      saved->rows = rows;
    }
    const auto seen = see(stack, split, rows, call);
    stack.run(
        call.device, y, workspace, x, call.training, saved != nullptr ? &saved->stack : nullptr,
        [&](std::size_t i, const auto&, const std::optional<Training>& training,
            const TensorView<const Scalar, 3>& in, const TensorView<Scalar, 3>& attended,
            const auto*) {
          rows.template unpacked<Scalar>(
              {in}, attended, [&](const auto& from, const TensorView<Scalar, 3>& to) {
                LocalMHACall<Scalar> of_layer = layer_call(stack, call);
                of_layer.training = training;
                Access::run(attentions_[i], to, from[0], split, of_layer, seen[kind(stack, i)],
                            saved != nullptr ? &saved->attentions[i] : nullptr);
              });
        },
        rows.places());
  }

  /// \param own gradients of this rank alone, to be added to
  /// \param grad of the result; becomes that of the input
  void backward(const Stack& stack, const Split& split, const AnyDevice& device,
                EncoderParameters<Scalar>& own, const SavedSplitStack<Scalar>& saved,
                TensorView<Scalar, 3> grad) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    typename Stack::Workspace workspace;
    // Of all layers, one after the other.
    typename Access::Room room;
    stack.run_back(
        device, own, workspace, saved.stack, grad,
        [&](std::size_t i, const auto&, LocalMHAParameters<Scalar>& to, const auto&,
            const TensorView<const Scalar, 3>& grad_y, const TensorView<const Scalar, 3>& x,
            const TensorView<Scalar, 3>& grad_x, Tensor<Scalar, 3>* grad_bias) {
          saved.rows.template unpacked<Scalar>(
              {grad_y, x}, grad_x, [&](const auto& from, const TensorView<Scalar, 3>& of_x) {
                Access::run_back(attentions_[i], room, of_x, to, saved.attentions[i], from[0],
                                 from[1], split, {.attn_bias = stack.attn_bias(), .device = device},
                                 grad_bias);
              });
        });
  }

 private:
  static std::size_t kind(const Stack& stack, std::size_t layer) {
    return static_cast<std::size_t>(stack.layers()[layer].kind);
  }
  static LocalMHACall<Scalar> layer_call(const Stack& stack, const EncoderCall& call) {
    return {.mask = call.mask,
            .attn_bias = stack.attn_bias(),
            .cu_seqlens = call.cu_seqlens,
            .lengths = call.lengths,
            .device = call.device};
  }

  // What the queries of each kind of attention see. Collective if there is a mask: once for all.
  std::vector<std::shared_ptr<const SeenRows>> see(const Stack& stack, const Split& split,
                                                   const OwnRows& rows,
                                                   const EncoderCall& call) const {
    std::vector<std::shared_ptr<const SeenRows>> seen(static_cast<std::size_t>(stack.kinds()));
    std::optional<Unmasked> unmasked;
    const LocalMHACall<Scalar> of_layer = layer_call(stack, call);
    for (std::size_t i = 0; i < attentions_.size(); ++i) {
      auto& of_kind = seen[kind(stack, i)];
      if (of_kind) continue;
      const auto inputs =
          Access::inputs_of(attentions_[i], split, rows.batch().shape()[0], of_layer);
      if (!unmasked) unmasked.emplace(split, inputs, call.mask);
      of_kind = std::make_shared<const SeenRows>(split, inputs, call.mask, *unmasked);
    }
    return seen;
  }

  std::vector<LocalMHA<Scalar, Storage, Arithmetic>> attentions_;
};

/// \throws std::invalid_argument naming the member of a call that does not fit
inline void check_stack_call(const Split& split, Index batch, const EncoderCall& call) {
  local_mha::detail::check_lengths(call.lengths, batch, split.total(), !call.cu_seqlens.empty());
  local_mha::detail::check_cu_seqlens(call.cu_seqlens, batch, split.total());
  check_mask(call.mask, batch, split);
}

}  // namespace mpi::detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
