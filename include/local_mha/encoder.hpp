// SPDX-License-Identifier: MIT
/// \file
/// Encoder: layers of LocalMHA and FeedForward, rows to rows.
///
///     depth times:  x ← x + LocalMHA(x);  x ← x + FeedForward(x)
///
/// or, with several residual streams, each of the two inside of a HyperConnection.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/on_demand.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/encoder_config.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/parameters.hpp>
#include <local_mha/stack/layer_stack.hpp>
#include <local_mha/stack/layer_stack_backward.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// A stack of layers, the counterpart of the Python package's LocalTransformer without tokens
/// (`num_tokens=None`), and of a ModuleList of pairs of LocalMHA and FeedForward.
///
///     local_mha::EncoderConfig config{.depth = 6, .layers = {{.dim = 512, .window_size = 64}}};
///     local_mha::Encoder<float> encoder(config);
///     auto y = encoder.forward(x);  // [B, N, 512]
///
/// A copy shares the weights, which nobody changes: set_parameters() gives an encoder others, and a
/// stream goes on with those that it was made with.
/// \tparam Scalar float, double, or any type that Eigen computes with
template <typename Scalar>
class Encoder {
  using Stack = detail::LayerStack<Scalar>;

 public:
  using Parameters = EncoderParameters<Scalar>;

  /// Sequences that come bit by bit: see encoder_stream.hpp.
  class Stream;
  /// Room for calls of forward_into().
  using Workspace = typename Stack::Workspace;
  /// What forward_saving() keeps for backward().
  using Saved = typename Stack::Saved;

  /// Starts with the weights of new PyTorch modules.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit Encoder(const EncoderConfig& config, std::uint64_t seed = 0)
      : Encoder(config, initial_parameters<Parameters>(config, seed)) {}

  /// \throws std::invalid_argument also naming the tensor whose shape does not fit
  Encoder(const EncoderConfig& config, Parameters parameters)
      : weights_(std::make_shared<const Weights>(config,
                                                 detail::fitting(std::move(parameters), config))) {}

  // An encoder that was moved from would have no weights: moving is copying.
  Encoder(const Encoder&) = default;
  Encoder& operator=(const Encoder&) = default;

  const EncoderConfig& config() const { return weights_->config; }
  /// The weights as they were given; made at the first call, see LocalMHA::parameters().
  /// \return valid until set_parameters() or an assignment, and as long as the encoder
  const Parameters& parameters() const {
    return weights_->parameters.get([&] { return stack().unpacked(); });
  }

  /// If it throws, the encoder is as it was.
  /// \throws std::invalid_argument naming the tensor whose shape does not fit
  void set_parameters(Parameters parameters) {
    weights_ =
        std::make_shared<const Weights>(config(), detail::fitting(std::move(parameters), config()));
  }

  /// \param x `[B, N, dim]`
  /// \param mask keys that nobody attends, `[B, N]`
  /// \param training dropout acts, with this seed, and drops something else in each layer; empty:
  ///        evaluation
  /// \param cu_seqlens a batch of 1 holds sequences of any lengths, `[S + 1]`: see
  ///        LocalMHA::forward()
  /// \return `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit
  Tensor<Scalar, 3> forward(TensorView<const Scalar, 3> x, const PaddingMask& mask = {},
                            std::optional<Training> training = {},
                            std::span<const Index> cu_seqlens = {}) const {
    return forward(Eigen::DefaultDevice(), x, mask, training, cu_seqlens);
  }

  /// The same on the threads of a device; the same bits for any number of them.
  template <ThreadDevice Device>
  Tensor<Scalar, 3> forward(const Device& device, TensorView<const Scalar, 3> x,
                            const PaddingMask& mask = {}, std::optional<Training> training = {},
                            std::span<const Index> cu_seqlens = {}) const {
    check_arguments(x, mask);
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
    Workspace workspace;
    forward_into(device, y, workspace, x, mask, training, cu_seqlens);
    return y;
  }

  /// The same into given memory. Allocates nothing if the workspace was last used for this
  /// configuration, and before for batches as large and as many threads.
  /// \param y `[B, N, dim]`, must not overlap x
  /// \param workspace for one call at a time
  template <ThreadDevice Device>
  void forward_into(const Device& device, TensorView<Scalar, 3> y, Workspace& workspace,
                    TensorView<const Scalar, 3> x, const PaddingMask& mask = {},
                    std::optional<Training> training = {},
                    std::span<const Index> cu_seqlens = {}) const {
    check_arguments(x, mask);
    require_shape("y", y.dimensions(), x.dimensions());
    detail::require_apart("y", y, "x", x);
    stack().forward(device, y, workspace, x, mask, training, cu_seqlens, nullptr);
  }
  void forward_into(TensorView<Scalar, 3> y, Workspace& workspace, TensorView<const Scalar, 3> x,
                    const PaddingMask& mask = {}, std::optional<Training> training = {},
                    std::span<const Index> cu_seqlens = {}) const {
    forward_into(Eigen::DefaultDevice(), y, workspace, x, mask, training, cu_seqlens);
  }

  /// forward() that keeps what backward() needs, copies of all that it was given included.
  /// \param saved becomes what this call kept
  template <ThreadDevice Device>
  Tensor<Scalar, 3> forward_saving(const Device& device, Saved& saved,
                                   TensorView<const Scalar, 3> x, const PaddingMask& mask = {},
                                   std::optional<Training> training = {},
                                   std::span<const Index> cu_seqlens = {}) const {
    check_arguments(x, mask);
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
    Workspace workspace;
    stack().forward(device, y, workspace, x, mask, training, cu_seqlens, &saved);
    return y;
  }
  Tensor<Scalar, 3> forward_saving(Saved& saved, TensorView<const Scalar, 3> x,
                                   const PaddingMask& mask = {},
                                   std::optional<Training> training = {},
                                   std::span<const Index> cu_seqlens = {}) const {
    return forward_saving(Eigen::DefaultDevice(), saved, x, mask, training, cu_seqlens);
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param gradients those of the weights are added here: `Parameters::zeros(config())` at first
  /// \param saved what forward_saving() kept
  /// \param grad_y `[B, N, dim]`
  /// \return that of x, `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit; then, and where memory
  ///         runs out, the gradients are as they were
  template <ThreadDevice Device>
  Tensor<Scalar, 3> backward(const Device& device, Parameters& gradients, const Saved& saved,
                             TensorView<const Scalar, 3> grad_y) const {
    stack().require_known(saved);
    require_shape("grad_y", grad_y.dimensions(), saved.shape);
    detail::require_fitting(gradients, config());
    // Added at the end, where nothing can fail.
    Parameters made = Parameters::zeros(config());
    Tensor<Scalar, 3> grad =
        Eigen::TensorMap<const Tensor<Scalar, 3>>(grad_y.data(), grad_y.dimensions());
    stack().backward(device, made, saved, grad);
    detail::add(gradients, made);
    return grad;
  }
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved,
                             TensorView<const Scalar, 3> grad_y) const {
    return backward(Eigen::DefaultDevice(), gradients, saved, grad_y);
  }

 private:
  // All that a pass reads of the encoder.
  struct Weights {
    Weights(const EncoderConfig& encoder_config, Parameters given)
        : config(encoder_config), stack(config, std::move(given)) {}

    EncoderConfig config;
    Stack stack;
    detail::OnDemand<Parameters> parameters;
  };

  const Stack& stack() const { return weights_->stack; }

  void check_arguments(const TensorView<const Scalar, 3>& x, const PaddingMask& mask) const {
    require_shape("x", x.dimensions(), {-1, -1, stack().dim()});
    if (mask) require_shape("mask", mask.shape(), {x.dimension(0), x.dimension(1)});
  }

  std::shared_ptr<const Weights> weights_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
