// SPDX-License-Identifier: MIT
/// \file
/// Longformer's self-attention: a window on both sides of a query, and global rows with projections
/// of their own.
///
/// I. Beltagy et al., "Longformer: The Long-Document Transformer", 2020.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include <local_mha/attention/local_attention.hpp>
#include <local_mha/attention/token_window.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/on_demand.hpp>
#include <local_mha/core/parallel.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/longformer_parameters.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/linear_backward.hpp>
#include <local_mha/ops/packed_weight.hpp>
#include <local_mha/ops/row_pass.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What a call of LongformerAttention is given beside its rows; all of it may be left out.
struct LongformerCall {
  /// Rows that see all and that all see, `[B, N]`, true = global. Empty: none is.
  OptionalView<bool, 2> global_rows = {};
  /// Keys that nobody attends, `[B, N]`.
  PaddingMask mask = {};
  /// Dropout acts, with this seed. Empty: evaluation.
  std::optional<Training> training = {};
  /// Whose threads share the work; the same bits for any number of them.
  AnyDevice device = {};
};

/// Longformer's self-attention, without the output projection that follows it.
///
/// A query sees `attention_window / 2` positions on each side of it, and all global rows. A global
/// row sees all: its query, and the keys and values that it sees, are of the global projections. As
/// a key, it is seen by others through the ordinary ones.
///
/// Two attentions make it up: that of ordinary projections, whose results of global rows are not
/// used, and that of global projections, of which nothing else is. The second costs little, since
/// queries that are not global see next to nothing in it; without global rows, it is left out.
///
/// A copy shares the weights, which nobody changes.
template <typename Scalar>
class LongformerAttention {
  using Heads4 = TensorView<Scalar, 4>;

 public:
  /// Its weights.
  using Parameters = LongformerParameters<Scalar>;

  /// Memory for calls of forward_into().
  class Workspace {
    friend LongformerAttention;

    typename Linear<Scalar>::Workspace to_qkv_;
    // Of the two windows.
    typename LocalAttention<Scalar>::Workspace local_;
    typename LocalAttention<Scalar>::Workspace global_;
    // Of one attention after the other: what is projected, and queries, keys, values, results.
    BlockBuffer<Scalar> qkv_;
    BlockBuffer<Scalar> heads_;
  };

  /// There is none: making one does not compile, and the message says what to do.
  class Stream {
   public:
    /// Of no arguments.
    template <typename... Arguments>
    explicit Stream(const Arguments&...) {
      static_assert(
          sizeof...(Arguments) > 1000,
          "LongformerAttention has no stream: the result of a global row, which sees all "
          "rows, would come at the end, and need all of them until then. Without global "
          "rows, the stream of a LocalMHA with token_windows::longformer() gives the same");
    }
  };

  /// With given weights.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range, or
  ///   the tensor whose shape does not fit
  LongformerAttention(const LongformerConfig& config, const Parameters& parameters)
      : weights_(std::make_shared<const Weights>(checked(config), parameters)) {}

  // An attention that was moved from would have no weights: moving is copying.
  LongformerAttention(const LongformerAttention&) = default;
  LongformerAttention& operator=(const LongformerAttention&) = default;

  /// What it was made with.
  const LongformerConfig& config() const { return weights_->config; }
  /// The weights as they were given; made at the first call, see LocalMHA::parameters().
  /// \return valid until an assignment, and as long as the attention
  const Parameters& parameters() const {
    return weights_->parameters.get([&] { return weights_->unpacked(); });
  }

  /// Computes the layer: projections, attention over window and global positions, output.
  /// \param x `[B, N, dim]`
  /// \return `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit
  Tensor<Scalar, 3> forward(TensorView<const Scalar, 3> x, const LongformerCall& call = {}) const {
    check_arguments(x, call);
    Tensor<Scalar, 3> y(x.dimensions());
    Workspace workspace;
    forward_into(y, workspace, x, call);
    return y;
  }

  /// The same into given memory. Allocates nothing if the workspace was last used for this
  /// configuration, and before for batches as large, as many threads, and as many global rows.
  /// \param y `[B, N, dim]`, must not overlap x
  /// \param workspace for one call at a time
  void forward_into(TensorView<Scalar, 3> y, Workspace& workspace, TensorView<const Scalar, 3> x,
                    const LongformerCall& call = {}) const {
    check_arguments(x, call);
    require_shape("y", y.dimensions(), x.dimensions());
    detail::require_apart("y", y, "x", x);
    resize_without_values(workspace.heads_, 4 * x.size());
    const auto heads = [&](Index which) {
      return Heads4(workspace.heads_.data() + which * x.size(), shape_of_heads(x));
    };
    const auto pass = [&](const Part& part, auto& of_attention, bool global) {
      project(part, call.device, workspace, x, heads(0), heads(1), heads(2));
      part.attention.forward_into(heads(3), of_attention, heads(0), heads(1), heads(2),
                                  attention_call(call));
      put(call, heads(3), global, y);
    };
    pass(weights_->local, workspace.local_, false);
    if (some(call.global_rows)) pass(weights_->global, workspace.global_, true);
  }

 private:
  struct Heads {
    Tensor<Scalar, 4> q, k, v;  // [B, H, N, D]
  };

  // An attention, and the projection of what it attends.
  struct Part {
    LocalAttention<Scalar> attention;
    Linear<Scalar> to_qkv;
  };

  // All that a pass reads of the attention.
  struct Weights {
    Weights(const LongformerConfig& of_attention, const Parameters& given)
        : config(of_attention),
          local{LocalAttention<Scalar>(
                    {.dropout = config.dropout,
                     .token_window = token_windows::longformer(config.attention_window)}),
                fitting(given.to_qkv, given.to_qkv_bias, "to_qkv")},
          global{LocalAttention<Scalar>({.dropout = config.dropout, .token_window = TokenWindow{}}),
                 fitting(given.to_qkv_global, given.to_qkv_global_bias, "to_qkv_global")} {}

    Parameters unpacked() const {
      return {local.to_qkv.weight().unpacked(), local.to_qkv.bias(),
              global.to_qkv.weight().unpacked(), global.to_qkv.bias()};
    }
    Linear<Scalar> fitting(const RowMatrix<Scalar>& weight, const Vector<Scalar>& bias,
                           const std::string& name) const {
      require_shape(name + ".weight", std::array<Index, 2>{weight.rows(), weight.cols()},
                    {3 * config.dim, config.dim});
      require_shape(name + ".bias", std::array<Index, 1>{bias.size()}, {3 * config.dim});
      return Linear<Scalar>(weight, bias);
    }

    // By which a backward pass knows them again.
    std::array<detail::TensorNumbers<Scalar>, 4> numbers() const {
      const auto of = [](const auto& tensor) { return detail::TensorNumbers<Scalar>(tensor); };
      return {of(local.to_qkv.weight()), of(local.to_qkv.bias()), of(global.to_qkv.weight()),
              of(global.to_qkv.bias())};
    }

    LongformerConfig config;
    Part local;
    Part global;
    detail::OnDemand<Parameters> parameters;
  };

 public:
  /// What forward_saving() keeps for backward().
  class Saved {
    friend LongformerAttention;
    struct Part {
      Heads heads;
      typename LocalAttention<Scalar>::Saved attention;
    };
    Part local_;
    std::optional<Part> global_;
    detail::SavedRows<Scalar> rows_;
  };

  /// forward() that keeps what backward() needs.
  /// \param saved becomes what this call kept
  Tensor<Scalar, 3> forward_saving(Saved& saved, TensorView<const Scalar, 3> x,
                                   const LongformerCall& call = {}) const {
    check_arguments(x, call);
    Workspace workspace;
    const auto kept = [&](const Part& part) {
      const auto shape = shape_of_heads(x);
      typename Saved::Part made{
          {Tensor<Scalar, 4>(shape), Tensor<Scalar, 4>(shape), Tensor<Scalar, 4>(shape)}, {}};
      Heads& heads = made.heads;
      project(part, call.device, workspace, x, heads.q, heads.k, heads.v);
      made.attention =
          part.attention.forward_saving(heads.q, heads.k, heads.v, attention_call(call));
      return made;
    };
    Saved made;
    made.local_ = kept(weights_->local);
    if (some(call.global_rows)) made.global_ = kept(weights_->global);
    Tensor<Scalar, 3> y(x.dimensions());
    put(call, made.local_.attention.out, false, y);
    made.rows_.take(x, weights_->numbers());
    if (made.global_) put(call, made.global_->attention.out, true, y);
    saved = std::move(made);
    return y;
  }

  /// Gradients of a loss whose gradient for forward()'s result is `grad_y`.
  /// \param gradients those of the weights are added here: `Parameters::zeros(config())` at first
  /// \param saved what forward_saving() kept
  /// \param grad_y `[B, N, dim]`
  /// \param x, call what forward_saving() was given. `saved` holds the mask and the training, which
  ///        may be left out; the device may be another
  /// \return that of x, `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit; then, and where memory
  ///         runs out, the gradients are as they were
  Tensor<Scalar, 3> backward(Parameters& gradients, const Saved& saved,
                             TensorView<const Scalar, 3> grad_y, TensorView<const Scalar, 3> x,
                             const LongformerCall& call = {}) const {
    check_arguments(x, call);
    require_shape("grad_y", grad_y.dimensions(), x.dimensions());
    require_shape("saved", saved.local_.heads.q.dimensions(), shape_of_heads(x));
    saved.rows_.require_known(x, weights_->numbers(), "a LongformerAttention");
    const auto& global_rows = call.global_rows;
    if (saved.global_.has_value() != some(global_rows))
      reject("global_rows", "those of forward_saving()", some(global_rows) ? "some" : "none");
    auto made = Parameters::zeros(config());
    detail::require_same_shapes(gradients, made);
    Tensor<Scalar, 3> grad_x(x.dimensions());
    grad_x.setZero();
    if (x.size() == 0) return grad_x;
    const auto add = [&](const Part& part, const typename Saved::Part& kept, bool global,
                         RowMatrix<Scalar>& grad_weight, Vector<Scalar>& grad_bias) {
      const auto& [q, k, v] = kept.heads;
      Tensor<Scalar, 4> grad_out(q.dimensions());
      each_row(call.device, Heads4(grad_out), [&](Index row, Index h, auto channels) {
        if (is_global(global_rows, row) == global)
          channels =
              RowView(grad_y.data() + row * config().dim + h * channels.size(), channels.size());
        else
          channels.setZero();
      });
      const auto of_heads =
          part.attention.backward(kept.attention, grad_out, q, k, v, attention_call(call));
      const Index rows = x.dimension(0) * x.dimension(1);
      RowMatrix<Scalar> grad_qkv(rows, 3 * config().dim);
      Index begin = 0;
      for (const auto* grad : {&of_heads.q, &of_heads.k, &of_heads.v}) {
        const TensorView<const Scalar, 4> of_rows(*grad);
        each_row(call.device, of_rows, [&](Index row, Index h, const auto& channels) {
          grad_qkv.block(row, begin + h * channels.size(), 1, channels.size()) = channels;
        });
        begin += config().dim;
      }
      const Eigen::Map<const RowMatrix<Scalar>> in(x.data(), rows, config().dim);
      Eigen::Map<RowMatrix<Scalar>>(grad_x.data(), rows, config().dim) +=
          linear_backward<AnyDevice, Scalar>(call.device, part.to_qkv.weight(), in, grad_qkv,
                                             grad_weight, &grad_bias);
    };
    add(weights_->local, saved.local_, false, made.to_qkv, made.to_qkv_bias);
    if (saved.global_)
      add(weights_->global, *saved.global_, true, made.to_qkv_global, made.to_qkv_global_bias);
    gradients.to_qkv += made.to_qkv;
    gradients.to_qkv_bias += made.to_qkv_bias;
    gradients.to_qkv_global += made.to_qkv_global;
    gradients.to_qkv_global_bias += made.to_qkv_global_bias;
    return grad_x;
  }

 private:
  using RowView = Eigen::Map<const Eigen::Matrix<Scalar, 1, Eigen::Dynamic>>;

  static const LongformerConfig& checked(const LongformerConfig& config) {
    validate(config);
    return config;
  }

  void check_arguments(const TensorView<const Scalar, 3>& x, const LongformerCall& call) const {
    require_shape("x", x.dimensions(), {-1, -1, config().dim});
    const std::array<Index, 2> rows{x.dimension(0), x.dimension(1)};
    if (call.global_rows) require_shape("global_rows", call.global_rows->dimensions(), rows);
    if (call.mask) require_shape("mask", call.mask.shape(), rows);
  }
  static LocalAttentionCall<Scalar> attention_call(const LongformerCall& call) {
    return {.mask = call.mask,
            .training = call.training,
            .global_rows = some(call.global_rows) ? call.global_rows : std::nullopt,
            .device = call.device};
  }

  static bool is_global(const std::optional<TensorView<const bool, 2>>& global_rows, Index row) {
    return global_rows && global_rows->data()[row];
  }
  static bool some(const std::optional<TensorView<const bool, 2>>& global_rows) {
    return global_rows &&
           std::any_of(global_rows->data(), global_rows->data() + global_rows->size(),
                       [](bool global) { return global; });
  }

  // Calls `visit(row, h, channels)` for each row of the batch and head, on threads.
  template <typename Element, typename Visitor>
  static void each_row(const AnyDevice& device, const TensorView<Element, 4>& heads,
                       Visitor&& visit) {
    using Row = Eigen::Matrix<Scalar, 1, Eigen::Dynamic>;
    using View = Eigen::Map<std::conditional_t<std::is_const_v<Element>, const Row, Row>>;
    const Index number = heads.dimension(1), seqlen = heads.dimension(2);
    const Index dim_head = heads.dimension(3), all = heads.dimension(0) * number;
    parallel_for(device, (std::min)(thread_count(device), all), all, [&](Index, Index head) {
      const Index first = head / number * seqlen;
      for (Index i = 0; i < seqlen; ++i)
        visit(first + i, head % number,
              View(heads.data() + (head * seqlen + i) * dim_head, dim_head));
    });
  }

  std::array<Index, 4> shape_of_heads(const TensorView<const Scalar, 3>& x) const {
    return {x.dimension(0), config().heads, x.dimension(1), config().dim / config().heads};
  }

  // Queries, keys and values, head by head.
  void project(const Part& part, const AnyDevice& device, Workspace& workspace,
               const TensorView<const Scalar, 3>& x, const Heads4& q, const Heads4& k,
               const Heads4& v) const {
    const Index dim = config().dim;
    resize_without_values(workspace.qkv_, 3 * x.size());
    const TensorView<Scalar, 3> qkv(workspace.qkv_.data(),
                                    {x.dimension(0), x.dimension(1), 3 * dim});
    part.to_qkv.forward_into(qkv, workspace.to_qkv_, x, {.device = device});
    Index from = 0;
    for (const Heads4* heads : {&q, &k, &v}) {
      each_row(device, *heads, [&](Index row, Index h, auto channels) {
        channels =
            RowView(qkv.data() + row * 3 * dim + from + h * channels.size(), channels.size());
      });
      from += dim;
    }
  }

  // The rows that are global, or those that are not.
  void put(const LongformerCall& call, const TensorView<const Scalar, 4>& heads, bool global,
           const TensorView<Scalar, 3>& y) const {
    each_row(call.device, heads, [&](Index row, Index h, const auto& channels) {
      if (is_global(call.global_rows, row) == global)
        std::copy(channels.data(), channels.data() + channels.size(),
                  y.data() + row * config().dim + h * channels.size());
    });
  }

  std::shared_ptr<const Weights> weights_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
