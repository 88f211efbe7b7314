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
#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/on_demand.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/ops/dropout.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/linear_backward.hpp>
#include <local_mha/ops/packed_weight.hpp>
#include <local_mha/ops/row_pass.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// What LongformerAttention computes.
struct LongformerConfig {
  /// Channels of the input and the output, a multiple of `heads`. Required.
  Index dim = 0;
  /// Number of heads. Required.
  Index heads = 0;
  /// Positions that a query sees on both sides together, even. Required.
  Index attention_window = 0;
  /// Probability of dropping an attention probability, in training mode.
  double dropout = 0;

  friend bool operator==(const LongformerConfig&, const LongformerConfig&) = default;
};

/// \throws std::invalid_argument naming the first member that is out of range
inline void validate(const LongformerConfig& config) {
  detail::require_at_least("dim", config.dim, 1);
  detail::require_at_least("heads", config.heads, 1);
  if (config.dim % config.heads != 0)
    reject("dim", "a multiple of the " + std::to_string(config.heads) + " heads", config.dim);
  detail::require_dim_head("dim / heads", config.dim / config.heads);
  detail::require_product("dim", config.dim, config.dim);
  detail::require_at_least("attention_window", config.attention_window, 0);
  if (config.attention_window % 2 != 0)
    reject("attention_window", "an even number", config.attention_window);
  detail::require_probability("dropout", config.dropout);
}

/// Weights of LongformerAttention.
template <typename Scalar>
struct LongformerParameters {
  RowMatrix<Scalar> to_qkv;         ///< `[3·dim, dim]`: q, k, v; a head's rows adjoin
  Vector<Scalar> to_qkv_bias;       ///< `[3·dim]`
  RowMatrix<Scalar> to_qkv_global;  ///< the same of global queries, and of what they see
  /// `[3·dim]`, the same.
  Vector<Scalar> to_qkv_global_bias;

  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  static LongformerParameters zeros(const LongformerConfig& config) {
    validate(config);
    LongformerParameters p;
    p.to_qkv.setZero(3 * config.dim, config.dim);
    p.to_qkv_bias.setZero(3 * config.dim);
    p.to_qkv_global = p.to_qkv;
    p.to_qkv_global_bias = p.to_qkv_bias;
    return p;
  }

  /// Whether each tensor has the shape that it has in `other`.
  bool has_shapes_of(const LongformerParameters& other) const {
    return detail::same_shape(to_qkv, other.to_qkv) &&
           detail::same_shape(to_qkv_bias, other.to_qkv_bias) &&
           detail::same_shape(to_qkv_global, other.to_qkv_global) &&
           detail::same_shape(to_qkv_global_bias, other.to_qkv_global_bias);
  }

  /// See for_each_parameter().
  template <typename Self, typename Visitor>
  static void visit_each(Self& p, Visitor&& visit) {
    visit(std::string("to_qkv.weight"), p.to_qkv);
    visit(std::string("to_qkv.bias"), p.to_qkv_bias);
    visit(std::string("to_qkv_global.weight"), p.to_qkv_global);
    visit(std::string("to_qkv_global.bias"), p.to_qkv_global_bias);
  }
};

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
 public:
  /// Its weights.
  using Parameters = LongformerParameters<Scalar>;

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

  /// \param x `[B, N, dim]`
  /// \return `[B, N, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit
  Tensor<Scalar, 3> forward(TensorView<const Scalar, 3> x, const LongformerCall& call = {}) const {
    check_arguments(x, call);
    const auto result = [&](const Part& part) {
      const Heads heads = part.heads_of(call.device, x, config().heads);
      return part.attention.forward(heads.q, heads.k, heads.v, of_attention(call));
    };
    Tensor<Scalar, 3> y(x.dimensions());
    const auto local = result(weights_->local);
    put(local, call.global_rows, false, y);
    if (some(call.global_rows)) put(result(weights_->global), call.global_rows, true, y);
    return y;
  }

 private:
  struct Heads {
    Tensor<Scalar, 4> q, k, v;  // [B, H, N, D]
  };

  // An attention, and the projection of what it attends.
  struct Part {
    LocalAttention<Scalar> attention;
    Linear<Scalar> to_qkv;

    Heads heads_of(const AnyDevice& device, const TensorView<const Scalar, 3>& x,
                   Index number) const {
      // clang before 16 does not capture the names of a structured binding.
      const Index batch = x.dimension(0), seqlen = x.dimension(1), dim = x.dimension(2);
      const Tensor<Scalar, 3> made = to_qkv.forward(x, {.device = device});
      const Eigen::Map<const RowMatrix<Scalar>> qkv(made.data(), batch * seqlen, 3 * dim);
      const auto heads = [&](Index from) {
        Tensor<Scalar, 4> all(batch, number, seqlen, dim / number);
        each_row(all, [&](Index row, Index h, auto channels) {
          channels = qkv.block(row, from * dim + h * channels.size(), 1, channels.size());
        });
        return all;
      };
      return {heads(0), heads(1), heads(2)};
    }
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
    const auto kept = [&](const Part& part) {
      typename Saved::Part made{part.heads_of(call.device, x, config().heads), {}};
      made.attention = part.attention.forward_saving(made.heads.q, made.heads.k, made.heads.v,
                                                     of_attention(call));
      return made;
    };
    Saved made;
    made.local_ = kept(weights_->local);
    if (some(call.global_rows)) made.global_ = kept(weights_->global);
    Tensor<Scalar, 3> y(x.dimensions());
    put(made.local_.attention.out, call.global_rows, false, y);
    made.rows_.take(x, weights_->numbers());
    if (made.global_) put(made.global_->attention.out, call.global_rows, true, y);
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
    require_shape("saved", saved.local_.heads.q.dimensions(),
                  {x.dimension(0), config().heads, x.dimension(1), config().dim / config().heads});
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
      each_row(grad_out, [&](Index row, Index h, auto channels) {
        if (is_global(global_rows, row) == global)
          channels =
              RowView(grad_y.data() + row * config().dim + h * channels.size(), channels.size());
        else
          channels.setZero();
      });
      const auto of_heads =
          part.attention.backward(kept.attention, grad_out, q, k, v, of_attention(call));
      const Index rows = x.dimension(0) * x.dimension(1);
      RowMatrix<Scalar> grad_qkv(rows, 3 * config().dim);
      Index begin = 0;
      for (const auto* grad : {&of_heads.q, &of_heads.k, &of_heads.v}) {
        each_row(*grad, [&](Index row, Index h, const auto& channels) {
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
  static LocalAttentionCall<Scalar> of_attention(const LongformerCall& call) {
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

  // Calls `visit(row, h, channels)` for each row of the batch and head.
  template <typename Heads4, typename Visitor>
  static void each_row(Heads4& heads, Visitor&& visit) {
    constexpr bool is_const = std::is_const_v<Heads4>;
    using Row = Eigen::Matrix<Scalar, 1, Eigen::Dynamic>;
    using View = Eigen::Map<std::conditional_t<is_const, const Row, Row>>;
    const Index batch = heads.dimension(0), number = heads.dimension(1);
    const Index seqlen = heads.dimension(2), dim_head = heads.dimension(3);
    for (Index b = 0; b < batch; ++b)
      for (Index h = 0; h < number; ++h)
        for (Index i = 0; i < seqlen; ++i)
          visit(b * seqlen + i, h,
                View(heads.data() + ((b * number + h) * seqlen + i) * dim_head, dim_head));
  }

  // The rows that are global, or those that are not.
  void put(const Tensor<Scalar, 4>& heads,
           const std::optional<TensorView<const bool, 2>>& global_rows, bool global,
           Tensor<Scalar, 3>& y) const {
    each_row(heads, [&](Index row, Index h, const auto& channels) {
      if (is_global(global_rows, row) == global)
        std::copy(channels.data(), channels.data() + channels.size(),
                  y.data() + row * config().dim + h * channels.size());
    });
  }

  std::shared_ptr<const Weights> weights_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
