// SPDX-License-Identifier: MIT
/// \file
/// LocalMHA over the ranks that hold a sequence.
#pragma once

#include <algorithm>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/layer/call.hpp>
#include <local_mha/layer/saved.hpp>
#include <local_mha/mha.hpp>
#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/borrow_plan.hpp>
#include <local_mha/mpi/call_check.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/exchange.hpp>
#include <local_mha/mpi/mha_forward.hpp>
#include <local_mha/mpi/parts.hpp>
#include <local_mha/mpi/split.hpp>
#include <local_mha/stack/layer_access.hpp>
#include <local_mha/streaming/description.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi {

/// local_mha::LocalMHA of sequences that no rank holds alone: every position gets what one process
/// gives it, bit for bit where the stretches of the Split begin on the grid of tiles, such as those
/// of Split::even().
///
///     local_mha::mpi::LocalMHA<float> mha(communicator, layer);
///     auto y = mha.forward(x, split);  // x: [B, split.rows(), dim], the positions of this rank
///
/// Keys and values travel, after normalization and rotation, and only those that another rank's
/// window shows: of each layer, sequence and cut, `2 · kv_heads · dim_head · sizeof(Scalar)` bytes
/// a position, for `reach_behind` positions to the right and `reach_ahead` to the left. Meanwhile
/// the queries are answered that see nothing of other ranks.
///
/// All calls are collective. What is wrong on one rank, or differs between them (the configuration,
/// the weights, the batch, the stretches, what else a call is given), is thrown on every rank as
/// std::invalid_argument before anything is computed.
///
/// \tparam Scalar float, double, or another type of numbers that may be copied as bytes
template <typename Scalar>
class LocalMHA {
  static_assert(std::is_trivially_copyable_v<Scalar>, "numbers travel as their bytes");
  using Layer = local_mha::LocalMHA<Scalar>;
  using Access = local_mha::detail::LayerAccess<Scalar>;
  using Inputs = local_mha::detail::AttentionInputs<Scalar>;
  using Input = StridedView<const Scalar>;
  using Output = StridedView<Scalar>;

 public:
  /// What a call is given beside its rows: of the mask those of this rank, `[B, rows]`; the rest is
  /// that of the whole, and the same on every rank: `lengths` up to the total, `cu_seqlens` from 0
  /// to it.
  using Call = LocalMHACall<Scalar>;

  /// Collective.
  /// \param communicator must outlive this
  /// \param layer the same on every rank; its weights are shared
  /// \throws std::invalid_argument, on every rank, if they are not the same
  LocalMHA(const Communicator& communicator, const Layer& layer)
      : communicator_(&communicator), layer_(layer), weights_(checksum_of(layer)) {
    detail::Agreement agreement(communicator, "LocalMHA");
    agreement.same("config", description());
    agreement.same("weights", weights_);
    agreement.settle();
  }

  const Layer& layer() const { return layer_; }
  const Communicator& communicator() const { return *communicator_; }

  /// \param x `[B, split.rows(), dim]`: the rows of this rank
  /// \return their results, in the same shape
  /// \throws std::invalid_argument, on every rank, naming the argument that does not fit on one, or
  ///         is not the same on all
  Tensor<Scalar, 3> forward(Input x, const Split& split, const Call& call = {}) const {
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
    forward_into(y, x, split, call);
    return y;
  }

  /// The same into given memory.
  /// \param y `[B, split.rows(), dim]`, must not overlap x
  void forward_into(Output y, Input x, const Split& split, const Call& call = {}) const {
    agree("forward", split, x, call, [&] { check_result("y", y, x); });
    communicator_->alone([&] {
      Inputs inputs = Access::inputs_of(layer_, x.dimension(0), split.total(), call);
      const detail::BorrowPlan plan(split, inputs);
      const detail::Parts parts(split, plan, inputs, call.mask);
      inputs.take_part(split.stretch(), parts.all());
      detail::RowExchange<Scalar> exchange(*communicator_, plan, detail::row_width(config()));
      detail::MhaForward<Scalar>(call.device, Access::weights(layer_), inputs, exchange)
          .run(communicator_->traffic(), call.training, x, y, nullptr);
    });
  }

 private:
  const LocalMHAConfig& config() const { return layer_.config(); }

  detail::Checksum description() const {
    detail::Checksum sum;
    sum.add(local_mha::detail::description_of(config()));
    const auto& attention = Access::weights(layer_).attention;
    sum.add(local_mha::detail::description_of(attention, Window(attention.config()),
                                              std::optional<TensorView<const Scalar, 3>>()));
    sum.add(config().dropout);
    sum.add(sizeof(Scalar));
    return sum;
  }
  static detail::Checksum checksum_of(const Layer& layer) {
    detail::Checksum sum;
    for (const auto& tensor : Access::weights(layer).numbers()) {
      sum.add(tensor.size());
      for (std::size_t i = 0; i < tensor.size(); ++i) sum.add(&tensor[i], sizeof(Scalar));
    }
    return sum;
  }

  static void check_result(std::string_view name, const Output& y, const Input& x) {
    require_shape(name, y.dimensions(), x.dimensions());
    local_mha::detail::require_apart(name, y, "x", x);
  }

  // \param check throws what else is wrong
  template <typename Check>
  void agree(std::string_view name, const Split& split, const Input& x, const Call& call,
             Check&& check) const {
    detail::Agreement agreement(*communicator_, name);
    agreement.check([&] {
      detail::check_split(*communicator_, split, call.device);
      require_shape("x", x.dimensions(), {-1, split.rows(), config().dim});
      Access::inputs_of(layer_, x.dimension(0), split.total(), call);
      detail::check_mask(call.mask, x.dimension(0), split);
      check();
    });
    agreement.same("weights", weights_);
    detail::agree_on_call(agreement, split, x.dimension(0), call);
    detail::agree_on_tensor(agreement, "attn_bias", call.attn_bias);
    agreement.settle();
  }

  const Communicator* communicator_;
  Layer layer_;
  detail::Checksum weights_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi
