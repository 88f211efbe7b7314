// SPDX-License-Identifier: MIT
/// \file
/// Encoder: layers of LocalMHA and FeedForward, rows to rows.
///
///     depth times:  x ← x + LocalMHA(x);  x ← x + FeedForward(x)
///
/// or, with several residual streams, each of the two inside of a HyperConnection.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include <local_mha/attention/inputs.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/on_demand.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/strided_view.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/encoder_config.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/layer/call.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/parameters.hpp>
#include <local_mha/stack/layer_stack.hpp>
#include <local_mha/stack/layer_stack_backward.hpp>
#include <local_mha/stack/packed_batch.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

template <typename Scalar, typename Storage, typename Arithmetic>
struct StackAccess;

}  // namespace detail

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
/// \tparam Storage what weights, keys and values are rounded to: see LocalMHA
/// \tparam Arithmetic what is multiplied: see LocalMHA and FeedForward
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class Encoder {
  friend detail::StackAccess<Scalar, Storage, Arithmetic>;
  using Stack = detail::LayerStack<Scalar, Storage, Arithmetic>;
  using Input = StridedView<const Scalar>;
  using Output = StridedView<Scalar>;

 public:
  /// Its weights.
  using Parameters = EncoderParameters<Scalar>;

  /// Sequences that come bit by bit: see encoder_stream.hpp.
  class Stream;
  /// Memory for calls of forward_into(), forward_saving_into() and backward_into().
  class Workspace {
    friend Encoder;

    typename Stack::Workspace stack_;
    detail::PackedBatch<Scalar> batch_;
    // Of a backward pass: what it adds to the gradients, and the gradient of the rows that pass.
    Parameters made_;
    bool made_is_zero_ = false;
    BlockBuffer<Scalar> grad_;
  };
  /// What forward_saving() keeps for backward().
  class Saved {
   public:
    /// What the attention of a layer was given, `[B, N, dim]`, or of sequences of different lengths
    /// all rows, `[1, sum of lengths, dim]`.
    /// \return valid as long as this is, and until it becomes that of another call
    /// \throws std::invalid_argument if there is no such layer
    TensorView<const Scalar, 3> input_of_attention(Index layer) const {
      const Index layers = std::ssize(stack_.layers);
      if (layer < 0 || layer >= layers)
        reject("layer", "0 to " + std::to_string(layers - 1), layer);
      return {stack_.layers[static_cast<std::size_t>(layer)].attention_branch.input.data(),
              stack_.shape};
    }

   private:
    friend Encoder;

    typename Stack::Saved stack_;
    detail::RaggedBatch batch_;
  };

  /// Starts with the weights of new PyTorch modules.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit Encoder(const EncoderConfig& config, std::uint64_t seed = 0)
      : Encoder(config, initial_parameters<Parameters>(config, seed)) {}

  /// With given weights.
  /// \throws std::invalid_argument also naming the tensor whose shape does not fit
  Encoder(const EncoderConfig& config, Parameters parameters)
      : weights_(std::make_shared<const Weights>(config,
                                                 detail::fitting(std::move(parameters), config))) {}

  /// Of weights as they are stored: see LocalMHA.
  template <std::same_as<Storage> Given>
    requires(!std::same_as<Given, Scalar>)
  Encoder(const EncoderConfig& config, EncoderParameters<Given> parameters)
      : weights_(std::make_shared<const Weights>(config,
                                                 detail::fitting(std::move(parameters), config))) {}

  // An encoder that was moved from would have no weights: moving is copying.
  Encoder(const Encoder&) = default;
  Encoder& operator=(const Encoder&) = default;

  /// What it was made with.
  const EncoderConfig& config() const { return weights_->config; }
  /// The weights as they were given, or rounded; made at the first call, see
  /// LocalMHA::parameters().
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

  /// All layers, and the final norm if there is one.
  /// \param x `[B, N, dim]`: see StridedView
  /// \return `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit
  Tensor<Scalar, 3> forward(Input x, const EncoderCall& call = {}) const {
    check_arguments(x, call);
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
    Workspace workspace;
    forward_into(y, workspace, x, call);
    return y;
  }

  /// The same into given memory. Allocates nothing if the workspace was last used for this
  /// configuration, and before for batches as large and as many threads.
  /// \param y `[B, N, dim]`, must not overlap x
  /// \param workspace for one call at a time
  void forward_into(Output y, Workspace& workspace, Input x, const EncoderCall& call = {}) const {
    flow(y, workspace, x, call, nullptr);
  }

  /// forward() that keeps what backward() needs, copies of all that it was given included.
  /// \param saved becomes what this call kept
  Tensor<Scalar, 3> forward_saving(Saved& saved, Input x, const EncoderCall& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    check_arguments(x, call);
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), x.dimension(2));
    Workspace workspace;
    forward_saving_into(y, workspace, saved, x, call);
    return y;
  }

  /// The same into given memory, also that of `saved`: see forward_into().
  void forward_saving_into(Output y, Workspace& workspace, Saved& saved, Input x,
                           const EncoderCall& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    flow(y, workspace, x, call, &saved);
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param gradients those of the weights are added here: `Parameters::zeros(config())` at first
  /// \param saved what forward_saving() kept
  /// \param grad_y `[B, N, dim]`
  /// \return that of x, `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit; then, and where memory
  ///         runs out, the gradients are as they were
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved, Input grad_y,
                             const AnyDevice& device = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    stack().require_known(saved.stack_);
    require_shape("grad_y", grad_y.dimensions(), saved.batch_.shape());
    Tensor<Scalar, 3> grad_x(grad_y.dimensions());
    Workspace workspace;
    backward_into(grad_x, workspace, gradients, saved, grad_y, device);
    return grad_x;
  }

  /// The same into given memory. What lies between the steps, a set of weights included, stays in
  /// the workspace for the next call, which allocates nothing where forward_into() would not,
  /// unless there is a dynamic position bias.
  /// \param grad_x that of x, `[B, N, dim]`, must not overlap grad_y
  /// \param workspace for one call at a time
  void backward_into(Output grad_x, Workspace& workspace, Parameters& gradients, const Saved& saved,
                     Input grad_y, const AnyDevice& device = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    stack().require_known(saved.stack_);
    const detail::RaggedBatch& batch = saved.batch_;
    require_shape("grad_y", grad_y.dimensions(), batch.shape());
    require_shape("grad_x", grad_x.dimensions(), batch.shape());
    detail::require_apart("grad_x", grad_x, "grad_y", grad_y);
    detail::require_fitting(gradients, config());
    // Added at the end, where nothing can fail.
    Parameters& made = workspace.made_;
    if (!std::exchange(workspace.made_is_zero_, false) || !made.has_shapes_of(gradients))
      made = Parameters::zeros(config());
    const bool copies = batch.ragged() || !detail::adjoins(grad_x);
    const auto shape = batch.packed_shape();
    resize_without_values(workspace.grad_, copies ? shape[0] * shape[1] * shape[2] : 0);
    const TensorView<Scalar, 3> grad(copies ? workspace.grad_.data() : grad_x.data(), shape);
    batch.pack(grad_y, grad.data());
    stack().backward(device, made, workspace.stack_, saved.stack_, grad);
    if (copies) batch.unpack(grad.data(), grad_x);
    detail::add_and_clear(gradients, made);
    workspace.made_is_zero_ = true;
  }

 private:
  // All that a pass reads of the encoder.
  struct Weights {
    template <typename Given>
    Weights(const EncoderConfig& encoder_config, EncoderParameters<Given> given)
        : config(encoder_config), stack(config, std::move(given)) {}

    EncoderConfig config;
    Stack stack;
    detail::OnDemand<Parameters> parameters;
  };

  const Stack& stack() const { return weights_->stack; }

  void check_arguments(const Input& x, const EncoderCall& call) const {
    require_shape("x", x.dimensions(), {-1, -1, stack().dim()});
    if (call.mask) require_shape("mask", call.mask.shape(), {x.dimension(0), x.dimension(1)});
    detail::check_cu_seqlens(call.cu_seqlens, x.dimension(0), x.dimension(1));
  }

  // \param saved null, or what becomes what backward() needs
  void flow(const Output& y, Workspace& workspace, const Input& x, const EncoderCall& call,
            Saved* saved) const {
    check_arguments(x, call);
    require_shape("y", y.dimensions(), x.dimensions());
    detail::require_apart("y", y, "x", x);
    detail::PackedBatch<Scalar>& batch = workspace.batch_;
    batch.take(x, y, call);
    if (saved != nullptr) {
      saved->stack_.shape = {};
      saved->batch_ = batch.batch();
    }
    stack().forward(call.device, batch.y(y), workspace.stack_, batch.x(x), batch.mask(call.mask),
                    call.training, batch.cu_seqlens(call.cu_seqlens),
                    saved != nullptr ? &saved->stack_ : nullptr);
    batch.give(y);
  }

  std::shared_ptr<const Weights> weights_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
