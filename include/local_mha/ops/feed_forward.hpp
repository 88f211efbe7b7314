// SPDX-License-Identifier: MIT
/// \file
/// The transformer's feed-forward with GEGLU:
/// `y = (a ⊙ gelu(g)) · W_outᵀ`, `[a | g] = LayerNorm(x) · W_inᵀ`.
/// N. Shazeer, "GLU Variants Improve Transformer", 2020.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/attention/call.hpp>
#include <local_mha/component_parameters.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/ops/activations.hpp>
#include <local_mha/ops/call.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/feed_forward_room.hpp>
#include <local_mha/ops/feed_forward_weights.hpp>
#include <local_mha/ops/project_rows.hpp>
#include <local_mha/ops/row_pass.hpp>
#include <local_mha/ops/saved_feed_forward.hpp>
#include <local_mha/ops/weight_gradient.hpp>
#include <local_mha/parameters.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

template <typename Scalar, typename Storage, typename Arithmetic>
class StackLayers;
template <typename Scalar, typename Storage, typename Arithmetic>
class LayerStack;

}  // namespace detail

/// LayerNorm, Linear, GEGLU, dropout, Linear.
///
/// A copy shares the weights, which nobody changes.
/// \tparam Storage what the weights of the projections are rounded to, see can_store; if they are,
///         and multiplied as Scalars, it goes forward alone
/// \tparam Arithmetic what they are multiplied as, see can_multiply: in Eigen::bfloat16, normalized
///         rows, hidden values and the gradients of what projections make are rounded before they
///         pass one, or are multiplied for the gradient of its weight. All else is a Scalar;
///         gradients are those for the numbers that weights were before they were rounded
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class FeedForward {
  friend detail::StackLayers<Scalar, Storage, Arithmetic>;
  friend detail::LayerStack<Scalar, Storage, Arithmetic>;
  using Weights = detail::FeedForwardWeights<Scalar, Storage, Arithmetic>;
  using BackwardRoom = detail::FeedForwardBackwardRoom<Scalar, Storage, Arithmetic>;

 public:
  /// Its weights.
  using Parameters = FeedForwardParameters<Scalar>;

  /// Starts with the weights of new PyTorch modules.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit FeedForward(const FeedForwardConfig& config, std::uint64_t seed = 0)
      : FeedForward(initial_parameters<Parameters>(config, seed), config.dropout) {}

  /// With given weights.
  /// \param dropout probability of dropping a hidden activation, in training mode
  /// \throws std::invalid_argument if dropout is no probability, or naming the weight whose shape
  ///         does not fit the others
  explicit FeedForward(FeedForwardParameters<Scalar> parameters, double dropout = 0)
      : dropout_(dropout) {
    take(std::move(parameters));
  }
  /// Of weights as they are stored.
  template <std::same_as<Storage> Given>
    requires(!std::same_as<Given, Scalar>)
  explicit FeedForward(FeedForwardParameters<Given> parameters, double dropout = 0)
      : dropout_(dropout) {
    take(std::move(parameters));
  }

  // One that was moved from would have no weights: moving is copying.
  FeedForward(const FeedForward&) = default;
  FeedForward& operator=(const FeedForward&) = default;

  /// Channels of input and output.
  Index dim() const { return dim_; }
  /// Hidden width.
  Index inner_dim() const { return inner_; }
  /// Probability of dropping a hidden value, in training mode.
  double dropout() const { return dropout_; }

  /// A copy of the weights, which are held in another order, as they are rounded.
  Parameters parameters() const { return weights_->unpacked(); }
  /// If it throws, the module is as it was.
  /// \throws std::invalid_argument naming the tensor whose shape does not fit
  void set_parameters(Parameters parameters) {
    detail::require_fitting(parameters, dim_, inner_);
    *this = FeedForward(std::move(parameters), dropout_);
  }

  /// Applies it to the rows of a matrix.
  /// \param x `[rows, dim]`
  /// \return `[rows, dim]`, to be added to the residual stream
  /// \throws std::invalid_argument if x has another width
  RowMatrix<Scalar> forward(const Eigen::Ref<const RowMatrix<Scalar>>& x,
                            const ModuleCall& call = {}) const {
    return flow(x, call, nullptr);
  }

  /// Applies it to a batch of sequences.
  /// \param x `[B, N, dim]`
  /// \return `[B, N, dim]`, to be added to the residual stream
  /// \throws std::invalid_argument if x has another width
  Tensor<Scalar, 3> forward(TensorView<const Scalar, 3> x, const ModuleCall& call = {}) const {
    check_input(x);
    Tensor<Scalar, 3> y(x.dimensions());
    Workspace workspace;
    flow(y, workspace, x, call, nullptr);
    return y;
  }

  /// Memory for calls of forward_into() and backward_into(); for one call at a time. For tensors,
  /// it prepares itself.
  class Workspace {
   public:
    Workspace() = default;
    /// Prepared for a layer.
    explicit Workspace(const FeedForward& layer)
        : in_(room(layer.dim_)), out_(in_), values_(room(layer.inner_)), gates_(values_) {
      for (const auto* weight : {&layer.weights_->proj_in, &layer.weights_->proj_out}) {
        passing_.fit_blocks(*weight, together);
        passing_.fit_single(*weight);
      }
    }

   private:
    friend FeedForward;
    friend detail::LayerStack<Scalar, Storage, Arithmetic>;
    bool fits(const FeedForward& layer) const {
      return std::ssize(in_) == together * layer.dim_ * count &&
             std::ssize(values_) == together * layer.inner_ * count;
    }
    // Keeps the rooms of threads and of the backward pass.
    void prepare(const FeedForward& layer) {
      if (fits(layer)) return;
      Workspace made(layer);
      made.of_threads_.swap(of_threads_);
      std::swap(made.backward_, backward_);
      *this = std::move(made);
    }
    static BlockBuffer<Scalar> room(Index channels) {
      return make_block_buffer<Scalar>(together * channels * count);
    }
    BlockBuffer<Scalar> in_;
    BlockBuffer<Scalar> out_;
    BlockBuffer<Scalar> values_;
    BlockBuffer<Scalar> gates_;
    detail::PassingRows<Scalar, Arithmetic> passing_;
    std::vector<Workspace> of_threads_;  // but for the first
    BackwardRoom backward_;
  };

  /// The same into given memory. Allocates nothing if the workspace was last used for these sizes,
  /// and with as many threads.
  /// \param y `[B, N, dim]`, must not overlap x
  void forward_into(TensorView<Scalar, 3> y, Workspace& workspace, TensorView<const Scalar, 3> x,
                    const ModuleCall& call = {}) const {
    check_input(x);
    require_shape("y", y.dimensions(), x.dimensions());
    detail::require_apart("y", y, "x", x);
    flow(y, workspace, x, call, nullptr);
  }

  /// The same of rows. Allocates nothing.
  /// \param x, x_stride `[rows, dim]`, and from row to row, at least `dim`
  /// \param y `[rows, dim]`, row below row
  /// \param workspace of a layer of this one's sizes
  /// \throws std::invalid_argument naming the argument that does not fit
  void forward_into(Index rows, const Scalar* x, Index x_stride, Scalar* y, Workspace& workspace,
                    std::optional<Training> training = {}) const {
    detail::require_at_least("rows", rows, 0);
    if (rows > 1) detail::require_at_least("x_stride", x_stride, dim_);
    if (rows > 0 && x == nullptr) reject("x", "rows of channels", "null");
    if (rows > 0 && y == nullptr) reject("y", "room for rows of channels", "null");
    if (!workspace.fits(*this)) reject("workspace", "one of a layer of these sizes", "another");
    run({0, rows}, x, x_stride, y, workspace, dropout_of(training), rows == 1, nullptr);
  }

  /// What forward_saving() keeps for backward().
  using Saved = SavedFeedForward<Scalar>;

  /// forward() that keeps what backward() needs.
  /// \param saved becomes what this call kept
  RowMatrix<Scalar> forward_saving(Saved& saved, const Eigen::Ref<const RowMatrix<Scalar>>& x,
                                   const ModuleCall& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    if (x.cols() != dim_) reject("x", std::to_string(dim_) + " columns", x.cols());
    RowMatrix<Scalar> y = flow(x, call, &saved);
    complete(saved, x, call.training);
    return y;
  }

  /// The same of tensors `[B, N, dim]`.
  Tensor<Scalar, 3> forward_saving(Saved& saved, TensorView<const Scalar, 3> x,
                                   const ModuleCall& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    check_input(x);
    Tensor<Scalar, 3> y(x.dimensions());
    Workspace workspace;
    flow(y, workspace, x, call, &saved);
    complete(saved, detail::rows_of(x), call.training);
    return y;
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param gradients those of the weights are added here
  /// \param saved what forward_saving() kept. It holds the training: in `call`, it may be left out
  /// \param grad_y `[rows, dim]`
  /// \param x, call what forward_saving() was given; the device may be another
  /// \return that of x, `[rows, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit, or is not that of
  ///         forward_saving(), as far as a sample of its numbers tells; then, and where memory runs
  ///         out, the gradients are as they were
  RowMatrix<Scalar> backward(Parameters& gradients, const Saved& saved,
                             const Eigen::Ref<const RowMatrix<Scalar>>& grad_y,
                             const Eigen::Ref<const RowMatrix<Scalar>>& x,
                             const ModuleCall& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>;

  /// The same of tensors.
  /// \param grad_y, x `[B, N, dim]`
  /// \return that of x, `[B, N, dim]`
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved,
                             TensorView<const Scalar, 3> grad_y, TensorView<const Scalar, 3> x,
                             const ModuleCall& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    check_input(x);
    Tensor<Scalar, 3> grad_x(x.dimensions());
    Workspace workspace;
    backward_into(grad_x, workspace, gradients, saved, grad_y, x, call);
    return grad_x;
  }

  /// The same into given memory. Allocates nothing if the workspace was last used for these sizes,
  /// and before for as many rows and threads.
  /// \param grad_x that of x, `[B, N, dim]`, must not overlap grad_y and x
  void backward_into(TensorView<Scalar, 3> grad_x, Workspace& workspace, Parameters& gradients,
                     const Saved& saved, TensorView<const Scalar, 3> grad_y,
                     TensorView<const Scalar, 3> x, const ModuleCall& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    check_input(x);
    require_shape("grad_y", grad_y.dimensions(), x.dimensions());
    require_shape("grad_x", grad_x.dimensions(), x.dimensions());
    detail::require_apart("grad_x", grad_x, "grad_y", grad_y);
    detail::require_apart("grad_x", grad_x, "x", x);
    flow_back(grad_x.data(), workspace.backward_, gradients, saved, detail::rows_of(grad_y),
              detail::rows_of(x), call);
  }

 private:
  template <typename Given>
  void take(FeedForwardParameters<Given>&& parameters) {
    detail::require_probability("dropout", dropout_);
    weights_ = std::make_shared<const Weights>(std::move(parameters));
    dim_ = weights_->dim, inner_ = weights_->inner;
  }

  void check_input(const TensorView<const Scalar, 3>& x) const {
    require_shape("x", x.dimensions(), {-1, -1, dim_});
  }

  // Those of a matrix whose rows may be apart.
  struct Numbers {
    const Eigen::Ref<const RowMatrix<Scalar>>& of;
    std::size_t size() const { return static_cast<std::size_t>(of.size()); }
    const Scalar& operator[](std::size_t i) const {
      const auto place = static_cast<Index>(i);
      return of.coeffRef(place / of.cols(), place % of.cols());
    }
  };

  using L = Lanes<Scalar>;
  static constexpr Index count = block_rows<Scalar>;
  // Blocks that pass the weights together.
  static constexpr Index together = 4 * Tiling<Scalar>::blocks;

  std::optional<detail::PlacedDropout<Scalar>> dropout_of(
      const std::optional<Training>& training,
      std::span<const detail::RowPlace> places = {}) const {
    if (!training || dropout_ == 0) return std::nullopt;
    return detail::PlacedDropout<Scalar>(Dropout<Scalar>(dropout_, training->seed, 0), places);
  }

  void load_rows(const Eigen::Ref<const RowMatrix<Scalar>>& x, const BatchBlocks& rows, Index block,
                 Scalar* to) const {
    load_block(dim_, rows.rows(block), StridedRows{x.data(), x.outerStride(), rows.row(block)}, to);
  }
  void store_rows(const Scalar* from, const BatchBlocks& rows, Index block, Scalar* y) const {
    store_block(dim_, rows.rows(block), from, StridedRows{y, dim_, rows.row(block)});
  }

  // Makes room for what a forward pass keeps; complete() ends it.
  void prepare(Saved& saved, Index rows) const {
    saved.rows = saved.inner = 0;
    saved.values.prepare(ceil_div(rows, count), inner_);
    saved.gates.prepare(ceil_div(rows, count), inner_);
  }
  void complete(Saved& saved, const Eigen::Ref<const RowMatrix<Scalar>>& x,
                const std::optional<Training>& training,
                std::span<const detail::RowPlace> places = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    saved.dropout = dropout_;
    saved.of_operands = !std::is_same_v<Scalar, Arithmetic>;
    saved.training = training;
    saved.places.assign(places.begin(), places.end());
    saved.input.take(std::array{Numbers{x}});
    saved.weights.take(weights_->numbers());
    saved.rows = x.rows();
    saved.inner = inner_;
  }

  RowMatrix<Scalar> flow(const Eigen::Ref<const RowMatrix<Scalar>>& x, const ModuleCall& call,
                         Saved* saved) const;

  // The same of a tensor, with room for each thread.
  void flow(TensorView<Scalar, 3> y, Workspace& workspace, TensorView<const Scalar, 3> x,
            const ModuleCall& call, Saved* saved) const;

  // The forward pass of some rows, of which the first starts a block. A single row as such sums in
  // another order.
  void run(const Range& rows, const Scalar* x, Index x_stride, Scalar* y, Workspace& workspace,
           const std::optional<detail::PlacedDropout<Scalar>>& dropout, bool single,
           Saved* saved) const;

  // The same of blocks, at most `together`.
  // \param first the first row, of `rows` in all
  // \param in, out `[blocks][dim][count]`; `in` becomes anything
  void apply(Index first, Index rows, Index blocks, Scalar* in, Scalar* out, Workspace& workspace,
             const std::optional<detail::PlacedDropout<Scalar>>& dropout, bool single,
             Saved* saved) const;

  // backward() to rows that adjoin.
  void flow_back(Scalar* grad_x, BackwardRoom& room, Parameters& gradients, const Saved& saved,
                 const Eigen::Ref<const RowMatrix<Scalar>>& grad_y,
                 const Eigen::Ref<const RowMatrix<Scalar>>& x, const ModuleCall& call) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>;

  // The hidden activations of a block, in place of its values.
  void hide(const std::optional<detail::PlacedDropout<Scalar>>& dropout, Index first,
            Scalar* values, const Scalar* gates) const {
    for (Index i = 0; i < inner_ * count; i += count)
      (L::load(values + i) * gelu(L::load(gates + i))).store(values + i);
    if (dropout) drop(*dropout, first, values);
  }

  // From the gradient of the hidden activations, in place of that of the values.
  void differentiate_geglu(const Scalar* values, const Scalar* gates, Scalar* grad_values,
                           Scalar* grad_gates) const;

  void drop(const detail::PlacedDropout<Scalar>& dropout, Index first, Scalar* values) const {
    constexpr Index octet = detail::PlacedDropout<Scalar>::together;
    L factors[octet];
    for (Index c = 0; c < inner_; ++c) {
      if (c % octet == 0) dropout.factors(first, c / octet, factors);
      Scalar* x = values + c * L::count;
      (L::load(x) * factors[c % octet]).store(x);
    }
  }

  std::shared_ptr<const Weights> weights_;
  Index dim_ = 0;
  Index inner_ = 0;
  double dropout_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END

#include <local_mha/ops/feed_forward_backward.hpp>
#include <local_mha/ops/feed_forward_forward.hpp>
