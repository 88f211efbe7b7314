// SPDX-License-Identifier: MIT
/// \file
/// Residual streams: a hyper-connection around a branch, in place of a residual connection.
///
///     n   = r / max(‖r‖₂, 1e-12) · √dim ⊙ (1 + norm.gamma)               of each stream
///     α   = tanh(n · dynamic_alpha_fn) · dynamic_alpha_scale + static_alpha   [S, S + 1]
///     β   = tanh(n · dynamic_beta_fn) · dynamic_beta_scale + static_beta      [S]
///     mix = αᵀ · r                                                            [S + 1, dim]
///     r_s ← mix_{s+1} + β_s · branch(mix_0)
///
/// D. Zhu et al., "Hyper-Connections", 2024, algorithm 2 of appendix J.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/tanh.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/initialization.hpp>
#include <local_mha/layer_parameters.hpp>
#include <local_mha/ops/project.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/weight_gradient.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// How a branch, such as an attention, takes its input from `S` residual streams and adds its
/// result to them. Each position is on its own.
template <typename Scalar>
class HyperConnection {
  using L = Lanes<Scalar>;
  static constexpr Index count = block_rows<Scalar>;

 public:
  /// With given weights.
  /// \throws std::invalid_argument naming the tensor whose shape does not fit the others
  explicit HyperConnection(HyperConnectionParameters<Scalar> parameters)
      : parameters_(std::move(parameters)) {
    const auto& p = parameters_;
    detail::require_streams("static_beta", streams(), dim());
    detail::require_at_least("norm.gamma", dim(), 1);
    detail::require_fitting(p, streams(), dim());
    root_ = Scalar(std::sqrt(static_cast<double>(dim())));
    RowMatrix<Scalar> functions(dim(), streams() + 2);
    for (Index c = 0; c < dim(); ++c) {
      const Scalar gain = Scalar(root_ * (Scalar(1) + p.norm_gamma[c]));
      for (Index t = 0; t <= streams(); ++t) functions(c, t) = Scalar(gain * p.alpha_fn(c, t));
      functions(c, streams() + 1) = Scalar(gain * p.beta_fn[c]);
    }
    functions_ = PackedWeight<Scalar>(functions.transpose());
  }

  /// Its weights.
  const HyperConnectionParameters<Scalar>& parameters() const { return parameters_; }
  /// Number of streams, S.
  Index streams() const { return parameters_.static_beta.size(); }
  /// Channels of a stream.
  Index dim() const { return parameters_.norm_gamma.size(); }

  /// What mix() makes.
  struct Mixed {
    RowMatrix<Scalar> branch_input;  ///< `[rows, dim]`: mix_0
    RowMatrix<Scalar> streams;       ///< `[rows, S·dim]`: mix_1, …, mix_S side by side
    RowMatrix<Scalar> beta;          ///< `[rows, S]`
  };

  /// What the branch takes of the streams, and what stays.
  /// \param streams `[rows, S·dim]`, a position's streams side by side
  /// \throws std::invalid_argument if they have another width
  Mixed mix(const Eigen::Ref<const RowMatrix<Scalar>>& streams) const;

  /// The streams behind the branch.
  /// \param mixed what mix() gave
  /// \param y the branch's result for `mixed.branch_input`, `[rows, dim]`
  /// \return `[rows, S·dim]`
  /// \throws std::invalid_argument naming the argument that does not fit
  RowMatrix<Scalar> add(const Mixed& mixed, const Eigen::Ref<const RowMatrix<Scalar>>& y) const;

  /// The gradient of the branch's result from that of the streams behind it.
  /// \param grad gradient of add()'s result, `[rows, S·dim]`
  /// \param streams what mix() was given
  /// \return `[rows, dim]`
  /// \throws std::invalid_argument naming the argument that does not fit
  RowMatrix<Scalar> add_backward(const Eigen::Ref<const RowMatrix<Scalar>>& grad,
                                 const Eigen::Ref<const RowMatrix<Scalar>>& streams) const;

  /// The gradient of mix()'s streams, once that of the branch's input is known.
  /// \param gradients those of the weights are added here
  /// \param grad, streams as add_backward() took them
  /// \param y the branch's result
  /// \param grad_branch_input what the branch made of add_backward()'s result, `[rows, dim]`
  /// \return `[rows, S·dim]`
  /// \throws std::invalid_argument naming the argument that does not fit; then, and where memory
  ///         runs out, the gradients are as they were
  RowMatrix<Scalar> mix_backward(
      HyperConnectionParameters<Scalar>& gradients, const Eigen::Ref<const RowMatrix<Scalar>>& grad,
      const Eigen::Ref<const RowMatrix<Scalar>>& streams,
      const Eigen::Ref<const RowMatrix<Scalar>>& y,
      const Eigen::Ref<const RowMatrix<Scalar>>& grad_branch_input) const;

  /// Channels of the room that the functions of a block take.
  Index room() const { return 3 * table() + 4 * (streams() + 1); }
  /// Channels of the sums of apply_mix_backward().
  Index sums() const { return dim() * cols() + table() + 2; }

  /// mix() of a block.
  /// \param r `[S][dim][block_rows]`, mixed in place
  /// \param branch_input `[dim][block_rows]`
  /// \param beta `[S][block_rows]`
  /// \param room `[room()][block_rows]`
  void apply_mix(Scalar* r, Scalar* branch_input, Scalar* beta, Scalar* room) const;

  /// add() of a block, `r_s += β_s · y`.
  /// \param y `[dim][block_rows]`
  /// \param beta what apply_mix() gave
  /// \param r `[S][dim][block_rows]`
  void apply_add(const Scalar* y, const Scalar* beta, Scalar* r) const;

  /// add_backward() of a block.
  /// \param grad `[S][dim][block_rows]`
  /// \param r `[S][dim][block_rows]`, what apply_mix() was given
  /// \param grad_y `[dim][block_rows]`
  /// \param room `[room()][block_rows]`
  void apply_add_backward(const Scalar* grad, const Scalar* r, Scalar* grad_y, Scalar* room) const;

  /// mix_backward() of a block.
  /// \param r `[S][dim][block_rows]`, what apply_mix() was given
  /// \param y, grad_branch_input `[dim][block_rows]`
  /// \param grad that of the streams behind the branch; becomes that of r
  /// \param room `[room()][block_rows]`
  /// \param sums `[sums()][block_rows]`: sums of positions, a value for each lane, from which
  ///        add_gradients() makes those of the weights
  void apply_mix_backward(const Scalar* r, const Scalar* y, const Scalar* grad_branch_input,
                          Scalar* grad, Scalar* room, Scalar* sums) const;

  /// Adds the gradients of the weights.
  void add_gradients(const StretchSums<Scalar>& sums,
                     HyperConnectionParameters<Scalar>& gradients) const;

 private:
  // Of each stream, α and, at last, β.
  Index cols() const { return streams() + 2; }
  Index table() const { return streams() * cols(); }
  Index stream(Index s) const { return s * dim(); }
  // Of the table.
  Index beta_row(Index s) const { return (s + 1) * cols() - 1; }
  static L at(const Scalar* lanes, Index i) { return L::load(lanes + i * count); }
  static void put(const L& value, Scalar* lanes, Index i) { value.store(lanes + i * count); }
  static void accumulate(const L& a, const L& b, Scalar* lanes, Index i) {
    put(fma(a, b, at(lanes, i)), lanes, i);
  }

  // `f<n>(i)` for groups of `n` adjoining ones of `number`, as many as registers hold.
  template <typename F>
  static LOCAL_MHA_INLINE void in_groups(Index number, F&& f) {
    Index i = 0;
    for (; i + 4 <= number; i += 4) f.template operator()<4>(i);
    if (number - i == 3) f.template operator()<3>(i);
    if (number - i == 2) f.template operator()<2>(i);
    if (number - i == 1) f.template operator()<1>(i);
  }

  const Scalar& function(Index t, Index c) const {
    constexpr Index rows = PackedWeight<Scalar>::panel_rows;
    return functions_.panel(0, t / rows)[c * rows + t % rows];
  }

  L inverse_norm(const Scalar* r, Index s) const {
    return L::broadcast(Scalar(1)) / l2_norm(dim(), r + stream(s) * count);
  }

  // What tanh takes: `values` `[S][S + 2][block_rows]`.
  void make_arguments(const Scalar* r, Scalar* values) const {
    project(functions_, 0, r, streams(), [&](Index s) { return values + s * cols() * count; });
    for (Index s = 0; s < streams(); ++s) {
      const L inverse = inverse_norm(r, s);
      for (Index i = s * cols(); i < (s + 1) * cols(); ++i) put(inverse * at(values, i), values, i);
    }
  }
  Scalar scale(Index t) const {
    return t <= streams() ? parameters_.alpha_scale(0) : parameters_.beta_scale(0);
  }
  Scalar fixed(Index s, Index t) const {
    return t <= streams() ? parameters_.static_alpha(s, t) : parameters_.static_beta[s];
  }
  // α and β of their arguments. `[S][S + 2][block_rows]`, may be the same.
  void make_weights(const Scalar* arguments, Scalar* weights) const {
    for (Index s = 0; s < streams(); ++s)
      for (Index t = 0; t < cols(); ++t) {
        const Index i = s * cols() + t;
        put(fma(scale(t), tanh(at(arguments, i)), L::broadcast(fixed(s, t))), weights, i);
      }
  }

  void check_rows(const char* name, const Eigen::Ref<const RowMatrix<Scalar>>& rows, Index number,
                  Index channels) const {
    require_shape<2>(name, {rows.rows(), rows.cols()}, {number, channels});
  }

  // `apply(first, rows)` for each block of positions.
  template <typename Apply>
  static void for_each_block_of(Index rows, Apply&& apply) {
    for (Index first = 0; first < rows; first += count)
      apply(first, (std::min)(count, rows - first));
  }
  static void load(const Eigen::Ref<const RowMatrix<Scalar>>& from, Index first, Index rows,
                   Scalar* to) {
    load_block(from.cols(), rows, StridedRows{from.data(), from.outerStride(), first}, to);
  }
  static void store(const Scalar* from, Index first, Index rows, RowMatrix<Scalar>& to) {
    store_block(to.cols(), rows, from, StridedRows{to.data(), to.cols(), first});
  }

  HyperConnectionParameters<Scalar> parameters_;
  Scalar root_;                     // √dim
  PackedWeight<Scalar> functions_;  // `[S + 2, dim]`: of a stream of length 1 to what tanh takes
};

template <typename Scalar>
void HyperConnection<Scalar>::apply_mix(Scalar* r, Scalar* branch_input, Scalar* beta,
                                        Scalar* room) const {
  Scalar* const weights = room;
  Scalar* const before = room + table() * count;  // a channel of the streams
  make_arguments(r, weights);
  make_weights(weights, weights);
  for (Index s = 0; s < streams(); ++s) put(at(weights, beta_row(s)), beta, s);
  for (Index c = 0; c < dim(); ++c) {
    for (Index s = 0; s < streams(); ++s) put(at(r, stream(s) + c), before, s);
    in_groups(streams() + 1, [&]<int n>(Index first) {
      L mixed[std::size_t{n}];
      LOCAL_MHA_UNROLL for (int i = 0; i < n; ++i) mixed[i] = L::zero();
      for (Index s = 0; s < streams(); ++s) {
        const L value = at(before, s);
        LOCAL_MHA_UNROLL for (int i = 0; i < n; ++i) mixed[i] =
            fma(at(weights, s * cols() + first + i), value, mixed[i]);
      }
      LOCAL_MHA_UNROLL for (int i = 0; i < n; ++i) {
        const Index t = first + i;
        put(mixed[i], t == 0 ? branch_input : r, t == 0 ? c : stream(t - 1) + c);
      }
    });
  }
}

template <typename Scalar>
void HyperConnection<Scalar>::apply_add(const Scalar* y, const Scalar* beta, Scalar* r) const {
  for (Index s = 0; s < streams(); ++s) {
    const L factor = at(beta, s);
    for (Index c = 0; c < dim(); ++c) accumulate(factor, at(y, c), r, stream(s) + c);
  }
}

template <typename Scalar>
auto HyperConnection<Scalar>::mix(const Eigen::Ref<const RowMatrix<Scalar>>& streams) const
    -> Mixed {
  const Index rows = streams.rows();
  check_rows("streams", streams, rows, this->streams() * dim());
  Mixed mixed{RowMatrix<Scalar>(rows, dim()), RowMatrix<Scalar>(rows, streams.cols()),
              RowMatrix<Scalar>(rows, this->streams())};
  auto r = make_block_buffer<Scalar>(streams.cols() * count);
  auto branch_input = make_block_buffer<Scalar>(dim() * count);
  auto beta = make_block_buffer<Scalar>(this->streams() * count);
  auto room = make_block_buffer<Scalar>(this->room() * count);
  for_each_block_of(rows, [&](Index first, Index some) {
    load(streams, first, some, r.data());
    apply_mix(r.data(), branch_input.data(), beta.data(), room.data());
    store(branch_input.data(), first, some, mixed.branch_input);
    store(r.data(), first, some, mixed.streams);
    for (Index i = 0; i < some; ++i)
      for (Index s = 0; s < this->streams(); ++s)
        mixed.beta(first + i, s) = beta[static_cast<std::size_t>(s * count + i)];
  });
  return mixed;
}

template <typename Scalar>
RowMatrix<Scalar> HyperConnection<Scalar>::add(const Mixed& mixed,
                                               const Eigen::Ref<const RowMatrix<Scalar>>& y) const {
  const Index rows = mixed.streams.rows();
  check_rows("mixed.streams", mixed.streams, rows, streams() * dim());
  check_rows("mixed.beta", mixed.beta, rows, streams());
  check_rows("y", y, rows, dim());
  RowMatrix<Scalar> to(rows, streams() * dim());
  auto r = make_block_buffer<Scalar>(to.cols() * count);
  auto result = make_block_buffer<Scalar>(dim() * count);
  auto beta = make_block_buffer<Scalar>(this->streams() * count);
  for_each_block_of(rows, [&](Index first, Index some) {
    load(mixed.streams, first, some, r.data());
    load(y, first, some, result.data());
    for (Index i = 0; i < some; ++i)
      for (Index s = 0; s < streams(); ++s)
        beta[static_cast<std::size_t>(s * count + i)] = mixed.beta(first + i, s);
    apply_add(result.data(), beta.data(), r.data());
    store(r.data(), first, some, to);
  });
  return to;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI

#include <local_mha/ops/residual_streams_backward.hpp>
