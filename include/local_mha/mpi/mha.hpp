// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA over the ranks that hold a sequence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/layer/backward.hpp>
#include <local_mha/layer/backward_room.hpp>
#include <local_mha/layer/call.hpp>
#include <local_mha/mha.hpp>
#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/call_check.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/exchange.hpp>
#include <local_mha/mpi/mha_backward.hpp>
#include <local_mha/mpi/mha_forward.hpp>
#include <local_mha/mpi/parts.hpp>
#include <local_mha/mpi/saved_mha.hpp>
#include <local_mha/mpi/split.hpp>
#include <local_mha/mpi/sum.hpp>
#include <local_mha/stack/layer_access.hpp>
#include <local_mha/streaming/description.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi {

namespace detail {

template <typename Scalar, typename Storage, typename Arithmetic>
struct MhaAccess;

}  // namespace detail

/// local_mha::LocalMHA of sequences that no rank holds alone: every position gets what one process
/// gives it, bit for bit where the stretches of the Split begin at multiples of a tile, as those do
/// of Split::even().
///
///     local_mha::mpi::LocalMHA<float> mha(communicator, layer);
///     auto y = mha.forward(x, split);  // x: [B, split.rows(), dim], the positions of this rank
///
/// Keys and values travel, after normalization and rotation, and only those that another rank's
/// window shows: of each layer, sequence and cut, `2 · kv_heads · dim_head · sizeof(Storage)` bytes
/// a position, for `reach_behind` positions to the right and `reach_ahead` to the left. Meanwhile
/// queries that see nothing of other ranks are answered. Backward, as many gradients are sent back.
///
/// All calls are collective. What is wrong on one rank, or differs between them (the configuration,
/// the weights, the batch, the stretches, what else a call is given), is thrown on every rank as
/// std::invalid_argument before anything is computed.
///
/// \tparam Scalar float, double, or another type of numbers that may be copied as bytes
/// \tparam Storage that of the layer: what travels is stored as it is, but for gradients. A layer
///         whose weights are rounded goes forward alone, unless it multiplies what it rounds
/// \tparam Arithmetic that of the layer: what travels is an operand, and what a split within a tile
///         changes is then rounded to another one here and there
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class LocalMHA {
  static_assert(std::is_trivially_copyable_v<Scalar>, "numbers travel as their bytes");
  using Layer = local_mha::LocalMHA<Scalar, Storage, Arithmetic>;
  using Input = StridedView<const Scalar>;
  using Output = StridedView<Scalar>;
  using GradBias = Tensor<Scalar, 3>;
  using Room = local_mha::detail::LayerBackwardRoom<Scalar, Storage, Arithmetic>;
  friend detail::MhaAccess<Scalar, Storage, Arithmetic>;

 public:
  /// What a call is given beside its rows: of the mask those of this rank, `[B, rows]`; the rest is
  /// that of the whole, and the same on every rank: `lengths` up to the total, `cu_seqlens` from 0
  /// to it.
  using Call = LocalMHACall<Scalar>;
  /// What a forward pass keeps for the backward pass.
  using Saved = SavedMHA<Scalar>;
  /// Its weights.
  using Parameters = LocalMHAParameters<Scalar>;

  /// Memory for calls of backward_into().
  class Workspace {
    friend LocalMHA;

    Room backward_;
  };

  /// Collective.
  /// \param communicator must outlive this
  /// \param layer the same on every rank; its weights are shared
  /// \throws std::invalid_argument, on every rank, if they are not the same
  LocalMHA(const Communicator& communicator, const Layer& layer)
      : communicator_(&communicator),
        layer_(layer),
        weights_(communicator.alone([&] { return checksum_of(layer); })) {
    detail::agree(communicator, "LocalMHA", [&](detail::Agreement& agreement) {
      agreement.same("config", description());
      agreement.same("weights", weights_);
    });
  }

  /// The layer whose rows are split.
  const Layer& layer() const { return layer_; }
  /// The ranks.
  const Communicator& communicator() const { return *communicator_; }

  /// Computes the rows of this rank.
  /// \param x `[B, split.rows(), dim]`: the rows of this rank
  /// \return their results, in the same shape
  /// \throws std::invalid_argument, on every rank, naming the argument that does not fit on one, or
  ///         is not the same on all
  Tensor<Scalar, 3> forward(Input x, const Split& split, const Call& call = {}) const {
    agree("forward", split, x, call, [] {});
    // Memory that one rank has not ends all.
    return communicator_->alone([&] {
      Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
      run(y, x, split, call, see(split, x.dimension(0), call), nullptr);
      return y;
    });
  }
  /// The same into given memory.
  /// \param y `[B, split.rows(), dim]`, must not overlap x
  void forward_into(Output y, Input x, const Split& split, const Call& call = {}) const {
    agree("forward", split, x, call, [&] { check_result("y", y, x); });
    communicator_->alone(
        [&] { run(y, x, split, call, see(split, x.dimension(0), call), nullptr); });
  }

  /// forward() that keeps what backward() needs.
  /// \param saved becomes what this call kept
  Tensor<Scalar, 3> forward_saving(Saved& saved, Input x, const Split& split,
                                   const Call& call = {}) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    agree("forward_saving", split, x, call, [] {});
    return communicator_->alone([&] {
      Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
      run(y, x, split, call, see(split, x.dimension(0), call), &saved);
      return y;
    });
  }
  /// The same into given memory.
  void forward_saving_into(Output y, Saved& saved, Input x, const Split& split,
                           const Call& call = {}) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    agree("forward_saving", split, x, call, [&] { check_result("y", y, x); });
    communicator_->alone([&] { run(y, x, split, call, see(split, x.dimension(0), call), &saved); });
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  ///
  /// What a rank has made of borrowed keys and values goes home, and is added there in the order of
  /// the ranks; so are the gradients of the weights, whose bits depend on the stretches alone.
  /// \param gradients the sums over all ranks are added here, on every rank:
  ///        `Parameters::zeros(config)` at first
  /// \param saved what forward_saving() kept. It holds the mask, the training and the lengths: in
  ///        `call`, they may be left out
  /// \param grad_y `[B, split.rows(), dim]`
  /// \param x, split, call what forward_saving() was given; the device may be another
  /// \param grad_attn_bias null, or where that of attn_bias is added, in its shape; on all ranks,
  ///        or on none
  /// \return that of x, `[B, split.rows(), dim]`
  /// \throws std::invalid_argument, on every rank, as LocalMHA::backward() does and forward() here
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved, Input grad_y, Input x,
                             const Split& split, const Call& call = {},
                             GradBias* grad_attn_bias = nullptr) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    agree(
        "backward", split, x, call,
        [&] { check_backward(gradients, saved, grad_y, x, split, call, grad_attn_bias); },
        grad_attn_bias != nullptr, saved.call);
    return communicator_->alone([&] {
      Tensor<Scalar, 3> grad_x(x.dimension(0), x.dimension(1), x.dimension(2));
      Room room;
      run_back(room, grad_x, gradients, saved, grad_y, x, split, call, grad_attn_bias);
      return grad_x;
    });
  }
  /// The same into given memory. What lies between the steps, seven to nine tensors of the size of
  /// x, stays in the workspace for the next call.
  /// \param grad_x that of x, must not overlap grad_y and x
  /// \param workspace for one call at a time
  void backward_into(Output grad_x, Workspace& workspace, Parameters& gradients, const Saved& saved,
                     Input grad_y, Input x, const Split& split, const Call& call = {},
                     GradBias* grad_attn_bias = nullptr) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    agree(
        "backward", split, x, call,
        [&] {
          check_result("grad_x", grad_x, x);
          check_backward(gradients, saved, grad_y, x, split, call, grad_attn_bias);
          local_mha::detail::require_apart("grad_x", grad_x, "grad_y", grad_y);
        },
        grad_attn_bias != nullptr, saved.call);
    communicator_->alone([&] {
      run_back(workspace.backward_, grad_x, gradients, saved, grad_y, x, split, call,
               grad_attn_bias);
    });
  }

 private:
  // A layer of a stack, whose ranks have agreed.
  LocalMHA(const Communicator& communicator, const Layer& layer, const detail::Checksum& weights)
      : communicator_(&communicator), layer_(layer), weights_(weights) {}

  using Access = local_mha::detail::LayerAccess<Scalar, Storage, Arithmetic>;
  using Inputs = local_mha::detail::AttentionInputs<Scalar>;
  using Bias = std::optional<TensorView<const Scalar, 3>>;

  const LocalMHAConfig& config() const { return layer_.config(); }
  const auto& weights() const { return Access::weights(layer_); }

  Inputs inputs_of(const Split& split, Index batch, const Call& call) const {
    return Access::inputs_of(layer_, batch, split.total(), call);
  }

  // What a call's queries see. Collective if there is a mask.
  std::shared_ptr<const detail::SeenRows> see(const Split& split, Index batch,
                                              const Call& call) const {
    const Inputs inputs = inputs_of(split, batch, call);
    return std::make_shared<const detail::SeenRows>(split, inputs, call.mask,
                                                    detail::Unmasked(split, inputs, call.mask));
  }

  // A call's rows, and what travels for them as Numbers.
  template <typename Number>
  struct Part {
    // \param seen must outlive this
    Part(const LocalMHA& mha, const Split& split, Index batch, const Call& call,
         const detail::SeenRows& seen)
        : inputs(mha.inputs_of(split, batch, call)),
          exchange(*mha.communicator_, seen.plan, detail::row_width(mha.config())) {
      inputs.take_part(split.stretch(), seen.parts.all());
    }

    Inputs inputs;
    detail::RowExchange<Number> exchange;
  };

  // \param seen see see()
  // \param saved null, or what becomes what backward() needs
  void run(const Output& y, const Input& x, const Split& split, const Call& call,
           const std::shared_ptr<const detail::SeenRows>& seen, Saved* saved) const {
    Part<Storage> part(*this, split, x.dimension(0), call, *seen);
    SavedLayer<Scalar>* const layer = saved != nullptr ? &saved->layer : nullptr;
    if (layer != nullptr) layer->prepare(config(), x.dimension(0), x.dimension(1), part.inputs);
    detail::MhaForward<Scalar, Storage, Arithmetic>(call.device, weights(), part.inputs,
                                                    part.exchange)
        .run(communicator_->traffic(), call.training, x, y, layer);
    if constexpr (local_mha::detail::Trainable<Scalar, Storage, Arithmetic>)
      if (saved != nullptr) complete(*saved, part, seen, split, x, call);
  }

  void complete(Saved& saved, Part<Storage>& part,
                const std::shared_ptr<const detail::SeenRows>& seen, const Split& split,
                const Input& x, const Call& call) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    saved.seen = seen;
    if constexpr (std::is_same_v<Scalar, Storage>)
      saved.borrowed = part.exchange.take_borrowed();
    else
      part.exchange.copy_borrowed(saved.borrowed);
    saved.split = split.checksum().value();
    saved.call = communicator_->agreements();
    saved.lengths.assign(call.lengths.begin(), call.lengths.end());
    const std::vector<Index> lengths = detail::own_lengths(split, call.lengths);
    saved.layer.complete(weights(), x, own_call(call, lengths));
  }

  void run_back(Room& room, const Output& grad_x, Parameters& gradients, const Saved& saved,
                const Input& grad_y, const Input& x, const Split& split, const Call& call,
                GradBias* grad_attn_bias) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    Parameters own = Parameters::zeros(config());
    GradBias own_bias;
    if (grad_attn_bias != nullptr) own_bias = grad_attn_bias->constant(Scalar(0));
    run_own_back(room, grad_x, own, saved, grad_y, x, split, call,
                 grad_attn_bias != nullptr ? &own_bias : nullptr);
    detail::add_sums<Scalar>(*communicator_, own, gradients);
    if (grad_attn_bias == nullptr) return;
    std::vector<Scalar> of_bias(own_bias.data(), own_bias.data() + own_bias.size());
    detail::sum_over_ranks(*communicator_, of_bias);
    for (std::size_t i = 0; i < of_bias.size(); ++i) grad_attn_bias->data()[i] += of_bias[i];
  }

  // The same, of this rank alone.
  void run_own_back(Room& room, const Output& grad_x, Parameters& own, const Saved& saved,
                    const Input& grad_y, const Input& x, const Split& split, const Call& call,
                    GradBias* grad_attn_bias) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    const auto kept = saved.layer.call.with_tensors_of(SavedLayer<Scalar>::of_attention(call));
    const Call of_forward{.mask = kept.mask,
                          .attn_bias = call.attn_bias,
                          .training = kept.training,
                          .cu_seqlens = kept.cu_seqlens,
                          .lengths = saved.lengths,
                          .device = call.device};
    Part<Scalar> part(*this, split, x.dimension(0), of_forward, *saved.seen);
    typename local_mha::LocalAttention<Scalar>::BiasGradients grad_bias;
    const bool wants_bias = config().relative_bias || grad_attn_bias != nullptr;
    grad_bias.prepare(wants_bias ? Access::bias_of(layer_, call.attn_bias) : Bias(),
                      config().heads);
    detail::MhaPart<Scalar, Storage, Arithmetic> here(*communicator_, weights(), part.inputs,
                                                      saved.borrowed, part.exchange);
    local_mha::detail::LayerBackward<Scalar, Storage, Arithmetic>(weights(), saved.layer, room,
                                                                  thread_count(call.device))
        .run_part(call.device, part.inputs, of_forward.training, x, grad_y, grad_x, own, grad_bias,
                  here);
    if (config().relative_bias) grad_bias.add_to(own.relative_bias.data());
    if (grad_attn_bias != nullptr) grad_bias.add_to(*grad_attn_bias);
  }

  detail::Checksum description() const {
    detail::Checksum sum;
    sum.add(local_mha::detail::description_of(config()));
    const auto& attention = weights().attention;
    sum.add(local_mha::detail::description_of(attention, Window(attention.config()), Bias()));
    sum.add(config().dropout);
    sum.add(sizeof(Scalar));
    sum.add(std::numeric_limits<Storage>::digits);
    sum.add(std::numeric_limits<Arithmetic>::digits);
    return sum;
  }
  static detail::Checksum checksum_of(const Layer& layer) {
    detail::Checksum sum;
    detail::add_parameters(Access::unpacked(layer), sum);
    return sum;
  }

  // What a call is for this rank's rows.
  static Call own_call(const Call& call, const std::vector<Index>& lengths) {
    Call own = call;
    own.lengths = lengths;
    return own;
  }

  static void check_result(std::string_view name, const Output& y, const Input& x) {
    require_shape(name, y.dimensions(), x.dimensions());
    local_mha::detail::require_apart(name, y, "x", x);
  }
  void check_backward(const Parameters& gradients, const Saved& saved, const Input& grad_y,
                      const Input& x, const Split& split, const Call& call,
                      const GradBias* grad_attn_bias) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    require_shape("grad_y", grad_y.dimensions(), x.dimensions());
    if (saved.split != split.checksum().value())
      reject("saved", "that of a call with this split", "that of another");
    if (!call.lengths.empty() && !std::ranges::equal(call.lengths, saved.lengths))
      reject("lengths", "that of forward_saving()", "another");
    const std::vector<Index> lengths = detail::own_lengths(split, call.lengths);
    saved.layer.check_arguments(weights(), x, own_call(call, lengths));
    weights().require_same_shapes(gradients);
    if (grad_attn_bias == nullptr) return;
    if (!call.attn_bias)
      reject("grad_attn_bias", "null, because there is no attn_bias", "a tensor");
    require_shape("grad_attn_bias", TensorView<const Scalar, 3>(*grad_attn_bias).dimensions(),
                  call.attn_bias->dimensions());
  }

  // \param check throws what else is wrong
  template <typename Check>
  void agree(std::string_view name, const Split& split, const Input& x, const Call& call,
             Check&& check, bool wants_grad_attn_bias = false, std::uint64_t saved = 0) const {
    detail::agree(*communicator_, name, [&](detail::Agreement& agreement) {
      agreement.check([&] {
        detail::check_split(*communicator_, split, call.device);
        require_shape("x", x.dimensions(), {-1, split.rows(), config().dim});
        inputs_of(split, x.dimension(0), call);
        detail::check_mask(call.mask, x.dimension(0), split);
        check();
      });
      agreement.same("config", description());
      agreement.same("weights", weights_);
      agreement.same("saved", saved);
      detail::agree_on_call(agreement, split, x.dimension(0), call);
      detail::agree_on_tensor(agreement, "attn_bias", call.attn_bias);
      agreement.same("grad_attn_bias", Index{wants_grad_attn_bias ? 1 : 0});
    });
  }

  const Communicator* communicator_;
  Layer layer_;
  detail::Checksum weights_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi
