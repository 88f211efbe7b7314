// SPDX-License-Identifier: MIT
/// \file
/// The transformer's feed-forward with GEGLU:
/// `y = (a ⊙ gelu(g)) · W_outᵀ`, `[a | g] = LayerNorm(x) · W_inᵀ`.
/// N. Shazeer, "GLU Variants Improve Transformer", 2020.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
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
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/ops/activations.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/layer_norm.hpp>
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/row_pass.hpp>
#include <local_mha/ops/weight_gradient.hpp>
#include <local_mha/parameters.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

template <typename Scalar>
class LayerStack;

}  // namespace detail

/// LayerNorm, Linear, GEGLU, dropout, Linear.
template <typename Scalar>
class FeedForward {
  friend detail::LayerStack<Scalar>;

 public:
  using Parameters = FeedForwardParameters<Scalar>;

  /// Starts with the weights of new PyTorch modules.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit FeedForward(const FeedForwardConfig& config, std::uint64_t seed = 0)
      : FeedForward(initial_parameters<Parameters>(config, seed), config.dropout) {}

  /// \param dropout probability of dropping a hidden activation, in training mode
  /// \throws std::invalid_argument if dropout is no probability, or naming the weight whose shape
  ///         does not fit the others
  explicit FeedForward(FeedForwardParameters<Scalar> parameters, double dropout = 0)
      : dim_(parameters.norm_weight.size()), inner_(parameters.proj_out.cols()), dropout_(dropout) {
    detail::require_probability("dropout", dropout);
    require_shape<2>("1.weight", {parameters.proj_in.rows(), parameters.proj_in.cols()},
                     {2 * inner_, dim_});
    require_shape<2>("4.weight", {parameters.proj_out.rows(), parameters.proj_out.cols()},
                     {dim_, inner_});
    norm_ = LayerNorm<Scalar>(parameters.norm_weight, parameters.norm_bias);
    proj_in_ = PackedWeight<Scalar>(parameters.proj_in, inner_);
    proj_out_ = PackedWeight<Scalar>(parameters.proj_out);
    parameters_ = std::move(parameters);
  }

  FeedForward(const FeedForward&) = default;
  FeedForward(FeedForward&&) = default;
  /// If it throws, this is as it was.
  FeedForward& operator=(const FeedForward& other) { return *this = FeedForward(other); }
  FeedForward& operator=(FeedForward&&) = default;
  ~FeedForward() = default;

  Index dim() const { return dim_; }
  /// Hidden width.
  Index inner_dim() const { return inner_; }
  double dropout() const { return dropout_; }

  /// A copy of the weights.
  Parameters parameters() const { return parameters_; }
  /// If it throws, the module is as it was.
  /// \throws std::invalid_argument naming the tensor whose shape does not fit
  void set_parameters(Parameters parameters) {
    detail::require_same_shapes(parameters, Parameters::zeros(dim_, inner_));
    *this = FeedForward(std::move(parameters), dropout_);
  }

  /// \param x `[rows, dim]`
  /// \param training dropout acts, with this seed; empty: evaluation
  /// \return `[rows, dim]`, to be added to the residual stream
  /// \throws std::invalid_argument if x has another width
  RowMatrix<Scalar> forward(const Eigen::Ref<const RowMatrix<Scalar>>& x,
                            std::optional<Training> training = {}) const {
    return forward(Eigen::DefaultDevice(), x, training);
  }

  /// The same on the threads of a device; the same bits for any number of them.
  template <ThreadDevice Device>
  RowMatrix<Scalar> forward(const Device& device, const Eigen::Ref<const RowMatrix<Scalar>>& x,
                            std::optional<Training> training = {}) const {
    return flow(device, x, training, nullptr);
  }

  /// \param x `[B, N, dim]`
  /// \param training dropout acts, with this seed; empty: evaluation
  /// \return `[B, N, dim]`, to be added to the residual stream
  /// \throws std::invalid_argument if x has another width
  Tensor<Scalar, 3> forward(TensorView<const Scalar, 3> x,
                            std::optional<Training> training = {}) const {
    return forward(Eigen::DefaultDevice(), x, training);
  }
  template <ThreadDevice Device>
  Tensor<Scalar, 3> forward(const Device& device, TensorView<const Scalar, 3> x,
                            std::optional<Training> training = {}) const {
    check_input(x);
    Tensor<Scalar, 3> y(x.dimensions());
    Workspace workspace;
    flow(device, y, workspace, x, training, nullptr);
    return y;
  }

  /// Room for calls of forward_into(); for one call at a time. For tensors, it prepares itself.
  class Workspace {
   public:
    Workspace() = default;
    explicit Workspace(const FeedForward& layer)
        : in_(room(layer.dim_)),
          out_(in_),
          values_(room(layer.inner_)),
          gates_(values_),
          spread_(make_block_buffer<Scalar>(
              (std::max)(spread_size(layer.proj_in_), spread_size(layer.proj_out_)))) {}

   private:
    friend FeedForward;
    friend detail::LayerStack<Scalar>;
    bool fits(const FeedForward& layer) const {
      return std::ssize(in_) == together * layer.dim_ * count &&
             std::ssize(values_) == together * layer.inner_ * count;
    }
    // Keeps the rooms of threads.
    void prepare(const FeedForward& layer) {
      if (fits(layer)) return;
      Workspace made(layer);
      made.of_threads_.swap(of_threads_);
      *this = std::move(made);
    }
    static BlockBuffer<Scalar> room(Index channels) {
      return make_block_buffer<Scalar>(together * channels * count);
    }
    BlockBuffer<Scalar> in_;
    BlockBuffer<Scalar> out_;
    BlockBuffer<Scalar> values_;
    BlockBuffer<Scalar> gates_;
    BlockBuffer<Scalar> spread_;
    std::vector<Workspace> of_threads_;  // but for the first
  };

  /// The same into given memory. Allocates nothing if the workspace was last used for these sizes,
  /// and with as many threads.
  /// \param y `[B, N, dim]`, must not overlap x
  template <ThreadDevice Device>
  void forward_into(const Device& device, TensorView<Scalar, 3> y, Workspace& workspace,
                    TensorView<const Scalar, 3> x, std::optional<Training> training = {}) const {
    check_input(x);
    require_shape("y", y.dimensions(), x.dimensions());
    detail::require_apart("y", y, "x", x);
    flow(device, y, workspace, x, training, nullptr);
  }
  void forward_into(TensorView<Scalar, 3> y, Workspace& workspace, TensorView<const Scalar, 3> x,
                    std::optional<Training> training = {}) const {
    forward_into(Eigen::DefaultDevice(), y, workspace, x, training);
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

  /// What forward_saving() keeps for backward(): the result of the first projection. It knows its
  /// layer and its call again.
  struct Saved {
    Index rows = 0;
    Index inner = 0;
    BlockArray<Scalar> values;  ///< `[block][inner][block_rows]`
    BlockArray<Scalar> gates;   ///< the same, before gelu
    double dropout = 0;
    std::optional<Training> training = {};
    /// Samples by which x and the weights are known again.
    detail::Sample<Scalar> input = {};
    detail::Sample<Scalar> weights = {};
  };

  /// forward() that keeps what backward() needs.
  /// \param saved becomes what this call kept
  template <ThreadDevice Device>
  RowMatrix<Scalar> forward_saving(const Device& device, Saved& saved,
                                   const Eigen::Ref<const RowMatrix<Scalar>>& x,
                                   std::optional<Training> training = {}) const {
    if (x.cols() != dim_) reject("x", std::to_string(dim_) + " columns", x.cols());
    RowMatrix<Scalar> y = flow(device, x, training, &saved);
    complete(saved, x, training);
    return y;
  }

  template <ThreadDevice Device>
  Tensor<Scalar, 3> forward_saving(const Device& device, Saved& saved,
                                   TensorView<const Scalar, 3> x,
                                   std::optional<Training> training = {}) const {
    check_input(x);
    Tensor<Scalar, 3> y(x.dimensions());
    Workspace workspace;
    flow(device, y, workspace, x, training, &saved);
    complete(saved, detail::rows_of(x), training);
    return y;
  }
  Tensor<Scalar, 3> forward_saving(Saved& saved, TensorView<const Scalar, 3> x,
                                   std::optional<Training> training = {}) const {
    return forward_saving(Eigen::DefaultDevice(), saved, x, training);
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param gradients those of the weights are added here
  /// \param saved what forward_saving() kept. It holds the training: here, it may be left out
  /// \param grad_y `[rows, dim]`
  /// \param x what forward_saving() was given
  /// \return that of x, `[rows, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit, or is not that of
  ///         forward_saving(), as far as a sample of its numbers tells; then, and where memory runs
  ///         out, the gradients are as they were
  template <ThreadDevice Device>
  RowMatrix<Scalar> backward(const Device& device, FeedForwardParameters<Scalar>& gradients,
                             const Saved& saved, const Eigen::Ref<const RowMatrix<Scalar>>& grad_y,
                             const Eigen::Ref<const RowMatrix<Scalar>>& x,
                             std::optional<Training> training = {}) const;

  /// The same of tensors.
  /// \param grad_y, x `[B, N, dim]`
  /// \return that of x, `[B, N, dim]`
  template <ThreadDevice Device>
  Tensor<Scalar, 3> backward(const Device& device, Parameters& gradients, const Saved& saved,
                             TensorView<const Scalar, 3> grad_y, TensorView<const Scalar, 3> x,
                             std::optional<Training> training = {}) const {
    check_input(x);
    require_shape("grad_y", grad_y.dimensions(), x.dimensions());
    Tensor<Scalar, 3> grad_x(x.dimensions());
    detail::rows_of(TensorView<Scalar, 3>(grad_x)) = backward(
        device, gradients, saved, Eigen::Ref<const RowMatrix<Scalar>>(detail::rows_of(grad_y)),
        Eigen::Ref<const RowMatrix<Scalar>>(detail::rows_of(x)), training);
    return grad_x;
  }
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved,
                             TensorView<const Scalar, 3> grad_y, TensorView<const Scalar, 3> x,
                             std::optional<Training> training = {}) const {
    return backward(Eigen::DefaultDevice(), gradients, saved, grad_y, x, training);
  }

 private:
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
  // Those of the weights.
  std::array<std::span<const Scalar>, 4> numbers() const {
    const auto of = [](const auto& tensor) {
      return std::span<const Scalar>(tensor.data(), static_cast<std::size_t>(tensor.size()));
    };
    const auto& p = parameters_;
    return {of(p.norm_weight), of(p.norm_bias), of(p.proj_in), of(p.proj_out)};
  }

  using L = Lanes<Scalar>;
  static constexpr Index count = block_rows<Scalar>;
  // Blocks that pass the weights together.
  static constexpr Index together = 4 * Tiling<Scalar>::blocks;

  std::optional<Dropout<Scalar>> dropout_of(const std::optional<Training>& training) const {
    if (!training || dropout_ == 0) return std::nullopt;
    return Dropout<Scalar>(dropout_, training->seed, 0);
  }

  void load_rows(const Eigen::Ref<const RowMatrix<Scalar>>& x, const BatchBlocks& rows, Index block,
                 Scalar* to) const {
    load_block(dim_, rows.rows(block), StridedRows{x.data(), x.outerStride(), rows.row(block)}, to);
  }
  void store_rows(const Scalar* from, const BatchBlocks& rows, Index block,
                  RowMatrix<Scalar>& y) const {
    store_block(dim_, rows.rows(block), from, StridedRows{y.data(), dim_, rows.row(block)});
  }

  // Makes room for what a forward pass keeps; complete() ends it.
  void prepare(Saved& saved, Index rows) const {
    saved.rows = saved.inner = 0;
    saved.values.prepare(ceil_div(rows, count), inner_);
    saved.gates.prepare(ceil_div(rows, count), inner_);
  }
  void complete(Saved& saved, const Eigen::Ref<const RowMatrix<Scalar>>& x,
                const std::optional<Training>& training) const {
    saved.dropout = dropout_;
    saved.training = training;
    saved.input.take(std::array{Numbers{x}});
    saved.weights.take(numbers());
    saved.rows = x.rows();
    saved.inner = inner_;
  }

  template <ThreadDevice Device>
  RowMatrix<Scalar> flow(const Device& device, const Eigen::Ref<const RowMatrix<Scalar>>& x,
                         const std::optional<Training>& training, Saved* saved) const;

  // The same of a tensor, with room for each thread.
  template <ThreadDevice Device>
  void flow(const Device& device, TensorView<Scalar, 3> y, Workspace& workspace,
            TensorView<const Scalar, 3> x, const std::optional<Training>& training,
            Saved* saved) const;

  // The forward pass of some rows, of which the first starts a block. A single row as such sums in
  // another order.
  void run(const Range& rows, const Scalar* x, Index x_stride, Scalar* y, Workspace& workspace,
           const std::optional<Dropout<Scalar>>& dropout, bool single, Saved* saved) const;

  // The same of blocks, at most `together`.
  // \param first the first row, of `rows` in all
  // \param in, out `[blocks][dim][count]`; `in` becomes anything
  void apply(Index first, Index rows, Index blocks, Scalar* in, Scalar* out, Workspace& workspace,
             const std::optional<Dropout<Scalar>>& dropout, bool single, Saved* saved) const;

  // The hidden activations of a block, in place of its values.
  void hide(const std::optional<Dropout<Scalar>>& dropout, Index first, Scalar* values,
            const Scalar* gates) const {
    for (Index i = 0; i < inner_ * count; i += count)
      (L::load(values + i) * gelu(L::load(gates + i))).store(values + i);
    if (dropout) drop(*dropout, first, values);
  }

  // From the gradient of the hidden activations, in place of that of the values.
  void differentiate_geglu(const Scalar* values, const Scalar* gates, Scalar* grad_values,
                           Scalar* grad_gates) const {
    for (Index i = 0; i < inner_ * count; i += count) {
      const L gate = L::load(gates + i);
      const Normal<Scalar> at = normal(gate);
      const L grad = L::load(grad_values + i);
      // gelu'(x) = Φ(x) + x·φ(x)
      const L slope = fma(gate, at.density, at.distribution);
      (grad * L::load(values + i) * slope).store(grad_gates + i);
      (grad * (gate * at.distribution)).store(grad_values + i);
    }
  }

  void drop(const Dropout<Scalar>& dropout, Index first, Scalar* values) const {
    constexpr Index octet = Dropout<Scalar>::together;
    L factors[octet];
    for (Index c = 0; c < inner_; ++c) {
      if (c % octet == 0) dropout.factors(first, c / octet, factors);
      Scalar* x = values + c * L::count;
      (L::load(x) * factors[c % octet]).store(x);
    }
  }

  Index dim_;
  Index inner_;
  double dropout_;
  FeedForwardParameters<Scalar> parameters_;
  LayerNorm<Scalar> norm_;
  PackedWeight<Scalar> proj_in_;
  PackedWeight<Scalar> proj_out_;
};

template <typename Scalar>
template <ThreadDevice Device>
RowMatrix<Scalar> FeedForward<Scalar>::backward(const Device& device,
                                                FeedForwardParameters<Scalar>& gradients,
                                                const Saved& saved,
                                                const Eigen::Ref<const RowMatrix<Scalar>>& grad_y,
                                                const Eigen::Ref<const RowMatrix<Scalar>>& x,
                                                std::optional<Training> training) const {
  if (x.cols() != dim_) reject("x", std::to_string(dim_) + " columns", x.cols());
  require_shape<2>("grad_y", {grad_y.rows(), grad_y.cols()}, {x.rows(), x.cols()});
  require_shape<2>("saved", {saved.rows, saved.inner}, {x.rows(), inner_});
  if (saved.dropout != dropout_ || !saved.weights.is_of(numbers()))
    reject("saved", "that of a feed-forward of these weights and this dropout", "another");
  detail::require_same("training", training.has_value(), training, saved.training);
  if (!saved.input.is_of(std::array{Numbers{x}}))
    reject("x", "what forward_saving() was given", "other numbers");
  detail::require_same_shapes(gradients, parameters_);
  const std::optional<Dropout<Scalar>> dropout = dropout_of(saved.training);
  const BatchBlocks rows{1, x.rows(), count};
  RowMatrix<Scalar> grad_x(x.rows(), dim_);
  if (x.rows() == 0) return grad_x;
  // Transposed: from gradients of results to those of inputs.
  const PackedWeight<Scalar> proj_out(parameters_.proj_out.transpose());
  const PackedWeight<Scalar> proj_in(parameters_.proj_in.transpose());
  PanelArray<Scalar> normed_panels(rows.count(), panel_channels<Scalar>(dim_));
  PanelArray<Scalar> hidden_panels(rows.count(), panel_channels<Scalar>(inner_));
  BlockArray<Scalar> grad_out(rows.count(), dim_);
  BlockArray<Scalar> grad_in(rows.count(), 2 * inner_);  // of values, then of gates
  StretchSums<Scalar> norm_sums(ceil_div(rows.count(), stretch_blocks), 2 * dim_);
  for_each_stretch(device, rows.count(), [&](Index part, const Range& blocks) {
    const Index size = blocks.end - blocks.begin;
    BlockArray<Scalar> narrow(size, dim_);
    auto hidden = make_block_buffer<Scalar>((std::max)(inner_, dim_) * count);
    for (Index block = blocks.begin; block < blocks.end; ++block) {
      load_rows(x, rows, block, hidden.data());
      norm_.apply(hidden.data());
      clear_other_lanes(dim_, {0, static_cast<int>(rows.rows(block))}, hidden.data());
      normed_panels.put(block, 0, dim_, hidden.data());
      load_rows(grad_y, rows, block, grad_out[block]);
    }
    project(proj_out, 0, grad_out[blocks.begin], size,
            [&](Index b) { return grad_in[blocks.begin + b]; });
    for (Index block = blocks.begin; block < blocks.end; ++block) {
      const Scalar* gates = saved.gates[block];
      std::copy_n(saved.values[block], inner_ * count, hidden.data());
      hide(dropout, rows.row(block), hidden.data(), gates);
      hidden_panels.put(block, 0, inner_, hidden.data());
      Scalar* grad_values = grad_in[block];
      if (dropout) drop(*dropout, rows.row(block), grad_values);
      differentiate_geglu(saved.values[block], gates, grad_values, grad_values + inner_ * count);
    }
    project(proj_in, 0, grad_in[blocks.begin], size, [&](Index b) { return narrow[b]; });
    for (Index b = 0; b < size; ++b) {
      load_rows(x, rows, blocks.begin + b, hidden.data());
      norm_.apply_backward(hidden.data(), narrow[b], norm_sums[part]);
      store_rows(narrow[b], rows, blocks.begin + b, grad_x);
    }
  });
  norm_sums.add_to(gradients.norm_weight);
  norm_sums.add_to(gradients.norm_bias, dim_);
  add_weight_gradient(device, rows.count(), grad_out[0], grad_out.stride(), Groups::of(dim_),
                      hidden_panels, Groups::of(inner_), gradients.proj_out.data());
  add_weight_gradient(device, rows.count(), grad_in[0], grad_in.stride(), Groups::of(2 * inner_),
                      normed_panels, Groups::of(dim_), gradients.proj_in.data());
  return grad_x;
}

template <typename Scalar>
template <ThreadDevice Device>
RowMatrix<Scalar> FeedForward<Scalar>::flow(const Device& device,
                                            const Eigen::Ref<const RowMatrix<Scalar>>& x,
                                            const std::optional<Training>& training,
                                            Saved* saved) const {
  if (x.cols() != dim_) reject("x", std::to_string(dim_) + " columns", x.cols());
  const std::optional<Dropout<Scalar>> dropout = dropout_of(training);
  if (saved != nullptr) prepare(*saved, x.rows());
  RowMatrix<Scalar> y(x.rows(), dim_);
  for_each_stretch(
      device, ceil_div(x.rows(), count),
      [&](Index, const Range& some) {
        Workspace workspace(*this);
        run({some.begin * count, (std::min)(some.end * count, x.rows())}, x.data(), x.outerStride(),
            y.data(), workspace, dropout, false, saved);
      },
      forward_stretch_blocks);
  return y;
}

template <typename Scalar>
template <ThreadDevice Device>
void FeedForward<Scalar>::flow(const Device& device, TensorView<Scalar, 3> y, Workspace& workspace,
                               TensorView<const Scalar, 3> x,
                               const std::optional<Training>& training, Saved* saved) const {
  const std::optional<Dropout<Scalar>> dropout = dropout_of(training);
  const Index rows = x.dimension(0) * x.dimension(1);
  const Index rows_of_task = forward_stretch_blocks * count;
  const Index tasks = ceil_div(rows, rows_of_task);
  const Index threads = (std::min)(thread_count(device), tasks);
  const auto room_of = [&](Index worker) -> Workspace& {
    return worker == 0 ? workspace : workspace.of_threads_[static_cast<std::size_t>(worker - 1)];
  };
  if (std::ssize(workspace.of_threads_) < threads - 1)
    workspace.of_threads_.resize(static_cast<std::size_t>(threads - 1));
  for (Index worker = 0; worker < threads; ++worker) room_of(worker).prepare(*this);
  if (saved != nullptr) prepare(*saved, rows);
  parallel_for(device, threads, tasks, [&](Index worker, Index task) {
    run({task * rows_of_task, (std::min)((task + 1) * rows_of_task, rows)}, x.data(), dim_,
        y.data(), room_of(worker), dropout, false, saved);
  });
}

template <typename Scalar>
void FeedForward<Scalar>::run(const Range& rows, const Scalar* x, Index x_stride, Scalar* y,
                              Workspace& workspace, const std::optional<Dropout<Scalar>>& dropout,
                              bool single, Saved* saved) const {
  Index first = rows.begin;
  map_rows(rows.end - rows.begin, dim_, x + rows.begin * x_stride, x_stride, dim_,
           y + rows.begin * dim_, together, workspace.in_.data(), workspace.out_.data(),
           [&](Index blocks, Scalar* in, Scalar* out) {
             apply(first, rows.end, blocks, in, out, workspace, dropout, single, saved);
             first += blocks * count;
           });
}

template <typename Scalar>
void FeedForward<Scalar>::apply(Index first, Index rows, Index blocks, Scalar* in, Scalar* out,
                                Workspace& workspace, const std::optional<Dropout<Scalar>>& dropout,
                                bool single, Saved* saved) const {
  const auto value = [&](Index b) { return workspace.values_.data() + b * inner_ * count; };
  const auto gate = [&](Index b) { return workspace.gates_.data() + b * inner_ * count; };
  const auto multiply = [&](const PackedWeight<Scalar>& weight, Index group, const Scalar* x,
                            auto&& to) {
    project_rows(weight, group, x, blocks, single, workspace.spread_.data(), to);
  };
  for (Index b = 0; b < blocks; ++b) {
    const Index rows_of_block = (std::min)(count, rows - first - b * count);
    norm_.apply(in + b * dim_ * count);
    clear_other_lanes(dim_, {0, static_cast<int>(rows_of_block)}, in + b * dim_ * count);
  }
  multiply(proj_in_, 0, in, value);
  multiply(proj_in_, 1, in, gate);
  if (saved != nullptr) {
    std::copy_n(value(0), blocks * inner_ * count, saved->values[first / count]);
    std::copy_n(gate(0), blocks * inner_ * count, saved->gates[first / count]);
  }
  for (Index b = 0; b < blocks; ++b) hide(dropout, first + b * count, value(b), gate(b));
  multiply(proj_out_, 0, value(0), [&](Index b) { return out + b * dim_ * count; });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
