// SPDX-License-Identifier: MIT
/// \file
/// Encoder over the ranks that hold a sequence.
#pragma once

#include <cstdint>
#include <string_view>
#include <type_traits>
#include <utility>

#include <local_mha/core/error.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/encoder.hpp>
#include <local_mha/layer/call.hpp>
#include <local_mha/mpi/agreement.hpp>
#include <local_mha/mpi/call_check.hpp>
#include <local_mha/mpi/communicator.hpp>
#include <local_mha/mpi/split.hpp>
#include <local_mha/mpi/stack.hpp>
#include <local_mha/mpi/sum.hpp>
#include <local_mha/parameters.hpp>
#include <local_mha/stack/packed_batch.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::mpi {

/// local_mha::Encoder of sequences that no rank holds alone: what mpi::LocalMHA says, of all
/// layers.
///
///     local_mha::mpi::Encoder<float> split_encoder(communicator, encoder);
///     auto y = split_encoder.forward(x, split);  // x: [B, split.rows(), dim]
///
/// \tparam Scalar float, double, or another type of numbers that may be copied as bytes
/// \tparam Storage, Arithmetic those of the encoder: see mpi::LocalMHA
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class Encoder {
  static_assert(std::is_trivially_copyable_v<Scalar>, "numbers travel as their bytes");
  using Whole = local_mha::Encoder<Scalar, Storage, Arithmetic>;
  using Access = local_mha::detail::StackAccess<Scalar, Storage, Arithmetic>;
  using Input = StridedView<const Scalar>;
  using Output = StridedView<Scalar>;

 public:
  /// Its weights.
  using Parameters = EncoderParameters<Scalar>;

  /// What forward_saving() keeps for backward().
  class Saved {
    friend Encoder;

    detail::SavedSplitStack<Scalar> stack_;
    std::uint64_t split_ = 0;
    std::uint64_t call_ = 0;
  };

  /// Collective.
  /// \param communicator must outlive this
  /// \param encoder the same on every rank; its weights are shared
  /// \throws std::invalid_argument, on every rank, if they are not the same
  Encoder(const Communicator& communicator, const Whole& encoder)
      : communicator_(&communicator),
        encoder_(encoder),
        weights_(communicator.alone([&] { return checksum_of(encoder); })),
        layers_(communicator.alone([&] {
          return detail::SplitStack<Scalar, Storage, Arithmetic>(communicator, stack(), weights_);
        })) {
    detail::Checksum config;
    detail::agree(communicator, "Encoder", [&](detail::Agreement& agreement) {
      layers_.add_description(stack(), encoder.config().ff_dropout, config);
      agreement.same("config", config);
      agreement.same("weights", weights_);
    });
    weights_.add(config.value());
  }

  /// The encoder whose rows are split.
  const Whole& encoder() const { return encoder_; }
  /// The ranks.
  const Communicator& communicator() const { return *communicator_; }

  /// All layers of the rows of this rank.
  /// \param x `[B, split.rows(), dim]`: the rows of this rank
  /// \param call of the mask the rows of this rank; `cu_seqlens` and `lengths` of the whole
  /// \return their results, in the same shape
  /// \throws std::invalid_argument, on every rank, naming the argument that does not fit on one, or
  ///         is not the same on all
  Tensor<Scalar, 3> forward(Input x, const Split& split, const EncoderCall& call = {}) const {
    agree("forward", nullptr, x, split, call);
    // Memory that one rank has not ends all.
    return communicator_->alone([&] {
      Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
      run(y, x, split, call, nullptr);
      return y;
    });
  }
  /// The same into given memory.
  /// \param y `[B, split.rows(), dim]`, must not overlap x
  void forward_into(Output y, Input x, const Split& split, const EncoderCall& call = {}) const {
    agree("forward", &y, x, split, call);
    communicator_->alone([&] { run(y, x, split, call, nullptr); });
  }

  /// forward() that keeps what backward() needs, copies of all that it was given included.
  /// \param saved becomes what this call kept
  Tensor<Scalar, 3> forward_saving(Saved& saved, Input x, const Split& split,
                                   const EncoderCall& call = {}) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    agree("forward_saving", nullptr, x, split, call);
    return communicator_->alone([&] {
      Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
      saved = Saved();
      run(y, x, split, call, &saved.stack_);
      saved.split_ = split.checksum().value();
      saved.call_ = communicator_->agreements();
      return y;
    });
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param gradients the sums over all ranks are added here, on every rank, in the order of the
  ///        ranks: `Parameters::zeros(config)` at first
  /// \param saved what forward_saving() kept
  /// \param grad_y `[B, split.rows(), dim]`
  /// \param split that of forward_saving()
  /// \return that of x, `[B, split.rows(), dim]`
  /// \throws std::invalid_argument, on every rank, naming the argument that does not fit on one
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved, Input grad_y,
                             const Split& split, const AnyDevice& device = {}) const
    requires local_mha::detail::Trainable<Scalar, Storage, Arithmetic>
  {
    detail::agree(*communicator_, "backward", [&](detail::Agreement& agreement) {
      agreement.check([&] {
        detail::check_split(*communicator_, split, device);
        if (saved.split_ != split.checksum().value())
          reject("saved", "that of a call with this split", "that of another, or none");
        stack().require_known(saved.stack_.stack);
        require_shape("grad_y", grad_y.dimensions(), saved.stack_.rows.batch().shape());
        local_mha::detail::require_fitting(gradients, encoder_.config());
      });
      agreement.same("weights", weights_);
      agreement.same("saved", saved.call_);
    });
    return communicator_->alone([&] {
      const local_mha::detail::RaggedBatch& rows = saved.stack_.rows.batch();
      Tensor<Scalar, 3> grad(rows.packed_shape());
      rows.pack(grad_y, grad.data());
      Parameters own = Parameters::zeros(encoder_.config());
      layers_.backward(stack(), split, device, own, saved.stack_, grad);
      detail::add_sums<Scalar>(*communicator_, own, gradients);
      if (!rows.ragged()) return grad;
      Tensor<Scalar, 3> all(grad_y.dimensions());
      rows.unpack(grad.data(), Output(all));
      return all;
    });
  }

 private:
  const local_mha::detail::LayerStack<Scalar, Storage, Arithmetic>& stack() const {
    return Access::stack(encoder_);
  }

  static detail::Checksum checksum_of(const Whole& encoder) {
    detail::Checksum sum;
    detail::add_parameters(Access::stack(encoder).unpacked(), sum);
    return sum;
  }

  // \param y null: it is not there yet
  void agree(std::string_view name, const Output* y, const Input& x, const Split& split,
             const EncoderCall& call) const {
    detail::agree(*communicator_, name, [&](detail::Agreement& agreement) {
      agreement.check([&] {
        detail::check_split(*communicator_, split, call.device);
        require_shape("x", x.dimensions(), {-1, split.rows(), stack().dim()});
        if (y != nullptr) {
          require_shape("y", y->dimensions(), x.dimensions());
          local_mha::detail::require_apart("y", *y, "x", x);
        }
        detail::check_stack_call(split, x.dimension(0), call);
      });
      agreement.same("weights", weights_);
      detail::agree_on_call(agreement, split, x.dimension(0), call);
    });
  }

  void run(const Output& y, const Input& x, const Split& split, const EncoderCall& call,
           detail::SavedSplitStack<Scalar>* saved) const {
    const detail::OwnRows rows(split, x.dimensions(), call);
    local_mha::detail::PackedBatch<Scalar> batch;
    batch.take(x, y, {.lengths = rows.lengths()});
    layers_.forward(stack(), split, rows, batch.y(y), batch.x(x), call, saved);
    batch.give(y);
  }

  const Communicator* communicator_;
  Whole encoder_;
  detail::Checksum weights_;  // and of the configuration
  detail::SplitStack<Scalar, Storage, Arithmetic> layers_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::mpi
