// SPDX-License-Identifier: MIT
/// \file
/// The projection `y = x·Wᵀ (+ b)`.
#pragma once

#include <array>
#include <concepts>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/component_parameters.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/ops/call.hpp>
#include <local_mha/ops/linear_backward.hpp>
#include <local_mha/ops/packed_weight.hpp>
#include <local_mha/ops/project_rows.hpp>
#include <local_mha/ops/row_pass.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// PyTorch's `nn.Linear`: `y = x·Wᵀ + b`.
/// \tparam Storage what the weight is held as, see can_store; the bias stays a Scalar. Where it is
///         rounded, and multiplied as a Scalar, a Linear goes forward alone
/// \tparam Arithmetic what it is multiplied as, see can_multiply. In Eigen::bfloat16, rows are
///         rounded before they pass it; in backward(), they and the gradients of results. Sums are
///         Scalars, and gradients those for the numbers that the weight was before it was rounded
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class Linear {
  using Weight = PackedWeight<Scalar, Storage, Arithmetic>;
  using Numbers = detail::TensorNumbers<Scalar, Storage, Arithmetic>;

 public:
  /// Its weights.
  using Parameters = LinearParameters<Scalar>;

  /// Memory for calls of forward_into(); for one call at a time. It prepares itself.
  class Workspace {
    friend Linear;
    struct Room : detail::RowRoom<Scalar> {
      detail::PassingRows<Scalar, Arithmetic> passing;
    };
    std::vector<Room> rooms_;
  };
  /// What forward_saving() keeps for backward(), by which that knows the call again.
  class Saved {
    friend Linear;
    detail::SavedRows<Scalar> rows_;
  };

  /// Starts with the weights of a new PyTorch module: weight and bias uniform in
  /// `±1/√in_features`.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  explicit Linear(const LinearConfig& config, std::uint64_t seed = 0)
      : Linear(initial_parameters<Parameters>(config, seed)) {}

  /// With given weights.
  /// \throws std::invalid_argument if the bias has another size than the weight's rows, and is not
  ///         empty
  explicit Linear(Parameters parameters) : Linear(parameters.weight, std::move(parameters.bias)) {}

  /// With a given weight and bias.
  /// \param weight `[out, in]`, of Scalars or as it is stored
  /// \param bias `[out]`, or empty for none
  /// \throws std::invalid_argument if bias has another size
  template <typename Matrix>
    requires(std::same_as<typename Matrix::Scalar, Scalar> ||
             std::same_as<typename Matrix::Scalar, Storage>)
  explicit Linear(const Eigen::MatrixBase<Matrix>& weight, Vector<Scalar> bias = {})
      : out_(weight.rows()), bias_(std::move(bias)), packed_(weight) {
    if (bias_.size() != 0 && bias_.size() != out_)
      reject("bias", std::to_string(out_) + " values or none", bias_.size());
  }

  // One that was moved from would have no weights: moving is copying.
  Linear(const Linear&) = default;
  Linear& operator=(const Linear&) = default;

  /// The matrix, packed.
  const Weight& weight() const { return packed_; }
  /// `[out]`, or empty.
  const Vector<Scalar>& bias() const { return bias_; }
  /// Channels of the input.
  Index in_features() const { return packed_.depth(); }
  /// Channels of the output.
  Index out_features() const { return out_; }
  /// What would make one of this size.
  LinearConfig config() const { return {in_features(), out_features(), bias_.size() > 0}; }

  /// A copy of the weights, which are held in another order, as they are rounded.
  Parameters parameters() const { return {packed_.unpacked(), bias_}; }
  /// If it throws, the module is as it was.
  /// \throws std::invalid_argument naming the tensor whose shape does not fit
  void set_parameters(const Parameters& parameters) {
    detail::require_same_shapes(parameters, Parameters::zeros(config()));
    *this = Linear(parameters);
  }

  /// Projects the rows of a matrix.
  /// \param x `[rows, in]`
  /// \return `[rows, out]`
  /// \throws std::invalid_argument if x has another width
  RowMatrix<Scalar> forward(const Eigen::Ref<const RowMatrix<Scalar>>& x) const {
    if (x.cols() != in_features())
      reject("x", std::to_string(in_features()) + " columns", x.cols());
    RowMatrix<Scalar> y(x.rows(), out_);
    Workspace workspace;
    flow(AnyDevice(), workspace, x.rows(), x.data(), x.outerStride(), y.data());
    return y;
  }

  /// Projects a batch of sequences.
  /// \param x `[B, N, in_features]`
  /// \return `[B, N, out_features]`
  /// \throws std::invalid_argument if x has another width
  Tensor<Scalar, 3> forward(TensorView<const Scalar, 3> x, const ModuleCall& call = {}) const {
    check_input(x);
    Tensor<Scalar, 3> y(x.dimension(0), x.dimension(1), out_);
    Workspace workspace;
    forward_into(y, workspace, x, call);
    return y;
  }

  /// The same into given memory. Allocates nothing if the workspace has served a batch as large and
  /// as many threads before.
  /// \param y `[B, N, out_features]`, must not overlap x
  void forward_into(TensorView<Scalar, 3> y, Workspace& workspace, TensorView<const Scalar, 3> x,
                    const ModuleCall& call = {}) const {
    check_input(x);
    require_shape("y", y.dimensions(), {x.dimension(0), x.dimension(1), out_});
    detail::require_apart("y", y, "x", x);
    flow(call.device, workspace, x.dimension(0) * x.dimension(1), x.data(), in_features(),
         y.data());
  }

  /// forward() that keeps what backward() needs.
  /// \param saved becomes what this call kept
  Tensor<Scalar, 3> forward_saving(Saved& saved, TensorView<const Scalar, 3> x,
                                   const ModuleCall& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    check_input(x);
    saved.rows_.take(x, numbers());
    return forward(x, call);
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param gradients those of the weights are added here: `Parameters::zeros(config())` at first
  /// \param saved what forward_saving() kept
  /// \param grad_y `[B, N, out_features]`
  /// \param x what forward_saving() was given
  /// \return that of x, `[B, N, in_features]`
  /// \throws std::invalid_argument naming the argument that does not fit, or is not that of
  ///         forward_saving(), as far as a sample of its numbers tells; then, and where memory runs
  ///         out, the gradients are as they were
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved,
                             TensorView<const Scalar, 3> grad_y, TensorView<const Scalar, 3> x,
                             const ModuleCall& call = {}) const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    saved.rows_.require_known(x, numbers(), "a Linear");
    require_shape("grad_y", grad_y.dimensions(), {x.dimension(0), x.dimension(1), out_});
    detail::require_same_shapes(gradients, Parameters::zeros(config()));
    Tensor<Scalar, 3> grad_x(x.dimensions());
    detail::rows_of(TensorView<Scalar, 3>(grad_x)) =
        linear_backward(call.device, packed_, detail::rows_of(x), detail::rows_of(grad_y),
                        gradients.weight, gradients.bias.size() > 0 ? &gradients.bias : nullptr);
    return grad_x;
  }

 private:
  void check_input(const TensorView<const Scalar, 3>& x) const {
    require_shape("x", x.dimensions(), {-1, -1, in_features()});
  }

  // Those of the weights, as they are rounded.
  std::array<Numbers, 2> numbers() const
    requires detail::Trainable<Scalar, Storage, Arithmetic>
  {
    return {Numbers(packed_), Numbers(bias_)};
  }

  void flow(const AnyDevice& device, Workspace& workspace, Index rows, const Scalar* x,
            Index x_stride, Scalar* y) const;

  Index out_;
  Vector<Scalar> bias_;
  Weight packed_;
};

template <typename Matrix>
explicit Linear(const Eigen::MatrixBase<Matrix>& weight) -> Linear<typename Matrix::Scalar>;
template <typename Matrix>
explicit Linear(const Eigen::MatrixBase<Matrix>& weight, Vector<typename Matrix::Scalar> bias)
    -> Linear<typename Matrix::Scalar>;

template <typename Scalar, typename Storage, typename Arithmetic>
void Linear<Scalar, Storage, Arithmetic>::flow(const AnyDevice& device, Workspace& workspace,
                                               Index rows, const Scalar* x, Index x_stride,
                                               Scalar* y) const {
  constexpr Index count = block_rows<Scalar>;
  constexpr Index together = 8 * Tiling<Scalar>::blocks;
  detail::map_rows_on(
      device, workspace.rooms_, rows, in_features(), x, x_stride, out_, y, together,
      [&](typename Workspace::Room& room) { room.passing.fit_blocks(packed_, together); },
      [&](typename Workspace::Room& room, Index blocks, const Scalar* in, Scalar* out) {
        const auto block = [&](Index b) { return out + b * out_ * count; };
        project_rows(
            packed_, blocks, false, room.passing,
            [&](Index b) { return in + b * in_features() * count; },
            [&](Index, Index b) { return block(b); });
        if (bias_.size() == 0) return;
        for (Index b = 0; b < blocks; ++b) add_bias(out_, bias_.data(), block(b));
      });
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
