// SPDX-License-Identifier: MIT
/// \file
/// Work: a case with its inputs, ready to be run again and again and then checked.
#pragma once

// Brings Eigen::ThreadPoolDevice.
#ifndef EIGEN_USE_THREADS
#define EIGEN_USE_THREADS
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <Eigen/Dense>

#include <local_mha/local_mha.hpp>

#include "case.hpp"
#include "exact.hpp"
#include "fma_peak.hpp"
#include "random.hpp"

namespace measuring {

class Work {
 public:
  explicit Work(const Case& c) : case_(c), flops_(c.flops()) {}
  virtual ~Work() = default;
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  const Case& of() const { return case_; }
  double flops() const { return flops_; }

  /// Computes once, into memory that is there from the beginning. The result replaces that of the
  /// run before.
  virtual void run() = 0;
  /// The last result's largest deviation from the exact rows, relative to their largest value.
  virtual double max_error() const = 0;
  /// fma_peak() of the case's scalar, in windows as long as a run.
  virtual double peak(double seconds, double run) const = 0;

  /// What max_error() may be: the tolerances of the library's tests.
  double tolerance() const {
    // What is rounded to 8 bits is compared with what is not.
    if (case_.stored_bits == 16 || case_.arithmetic_bits == 16) return 1e-2;
    return case_.scalar == "float" ? 2e-5 : 1e-10;
  }

 private:
  Case case_;
  double flops_;
};

namespace detail {

/// Compares rows, remembering the largest difference and the largest value.
class Comparison {
 public:
  template <typename Computed>
  void add(const Computed& computed, const Eigen::VectorXd& exact) {
    for (Index c = 0; c < exact.size(); ++c) {
      const double difference = std::abs(static_cast<double>(computed(c)) - exact[c]);
      // Not std::max, which would lose a NaN.
      if (!(difference <= difference_)) difference_ = difference;
      largest_ = std::max(largest_, std::abs(exact[c]));
    }
  }

  double relative() const {
    if (std::isnan(difference_)) return std::numeric_limits<double>::infinity();
    return difference_ == 0 ? 0 : difference_ / largest_;
  }

 private:
  double difference_ = 0;
  double largest_ = 0;
};

template <typename Scalar>
using Rows =
    Eigen::Map<const Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;

template <typename Scalar>
Eigen::MatrixXd select_rows(const Rows<Scalar>& all, const std::vector<Index>& rows) {
  Eigen::MatrixXd selected(static_cast<Index>(rows.size()), all.cols());
  for (Index t = 0; t < selected.rows(); ++t)
    selected.row(t) = all.row(rows[static_cast<std::size_t>(t)]).template cast<double>();
  return selected;
}

/// The device of a case: the calling thread, or a pool.
class Threads {
 public:
  explicit Threads(Index count) {
    if (count == 1) return;
    pool_ = std::make_unique<Eigen::ThreadPool>(static_cast<int>(count));
    device_.emplace(pool_.get(), static_cast<int>(count));
  }

  template <typename F>
  void call(F&& f) const {
    if (device_)
      f(*device_);
    else
      f(Eigen::DefaultDevice());
  }

 private:
  std::unique_ptr<Eigen::ThreadPool> pool_;
  std::optional<Eigen::ThreadPoolDevice> device_;
};

/// Queries, keys and values, and the check of what became of them.
template <typename Scalar>
class AttentionWork : public Work {
 public:
  explicit AttentionWork(const Case& c)
      : Work(c),
        lengths_(c.lengths()),
        cu_seqlens_(c.cu_seqlens()),
        q_(shape(c.heads)),
        k_(shape(c.heads_of_keys())),
        v_(shape(c.heads_of_keys())),
        sinks_(c.heads),
        out_(shape(c.heads)) {
    out_.setZero();
    Random random(1);
    for (auto* input : {&q_, &k_, &v_}) random.fill(*input);
    random.fill(sinks_);
    if (c.bias != 0) {
      bias_.emplace(c.heads, c.window_size, (2 + c.look_forward()) * c.window_size);
      random.fill(*bias_);
    }
  }

  double peak(double seconds, double run) const override { return fma_peak<Scalar>(seconds, run); }

  double max_error() const override {
    const Case& c = of();
    const double scale = 1 / std::sqrt(static_cast<double>(c.dim_head));
    Comparison comparison;
    for (const Index b : {Index{0}, c.batch - 1})
      for (const Index h : {Index{0}, c.heads - 1})
        for (const Index row : sampled_rows(c)) {
          // Of packed sequences, the row's own.
          const auto next = std::upper_bound(cu_seqlens_.begin() + 1, cu_seqlens_.end(), row);
          const Index first = c.packed != 0 ? *std::prev(next) : 0;
          const Index end = c.packed != 0 ? *next : lengths_[static_cast<std::size_t>(b)];
          const Index i = row - first;
          const auto rows_of = [&](const local_mha::Tensor<Scalar, 4>& t, Index head) {
            return Rows<Scalar>(&t(b, head, first, 0), c.seqlen - first, c.dim_head);
          };
          const Index kv = c.head_of_keys(h);
          const auto seen = c.seen(i, end - first);
          const Eigen::VectorXd exact = exact_attention(
              c, rows_of(q_, h).row(i).template cast<double>(),
              select_rows<Scalar>(rows_of(k_, kv), seen),
              select_rows<Scalar>(rows_of(v_, kv), seen), seen, i, scale,
              [&](Index column) {
                return static_cast<double>((*bias_)(h, i % c.window_size, column));
              },
              seed, h, static_cast<double>(sinks_(h)));
          comparison.add(rows_of(out_, h).row(i), exact);
        }
    return comparison.relative();
  }

 protected:
  static constexpr std::uint64_t seed = 3;  // of dropout
  static local_mha::Training training() { return {.seed = seed}; }

  std::array<Index, 4> shape(Index heads) const {
    return {of().batch, heads, of().seqlen, of().dim_head};
  }

  std::vector<Index> lengths_;
  std::vector<Index> cu_seqlens_;
  local_mha::Tensor<Scalar, 4> q_, k_, v_;
  local_mha::Tensor<Scalar, 1> sinks_;
  std::optional<local_mha::Tensor<Scalar, 3>> bias_;
  local_mha::Tensor<Scalar, 4> out_;
};

template <typename Scalar, typename Arithmetic = Scalar>
class AttentionBackwardWork;

template <typename Scalar, typename Arithmetic = Scalar>
class LocalAttentionWork final : public AttentionWork<Scalar> {
 public:
  explicit LocalAttentionWork(const Case& c)
      : AttentionWork<Scalar>(c), attention_(configuration(c)), threads_(c.threads) {
    if (c.padding != 0) mask_ = local_mha::PaddingMask::from_lengths(this->lengths_, c.seqlen);
    if (this->bias_) view_of_bias_.emplace(*this->bias_);
  }

  void run() override {
    threads_.call([&](const auto& device) {
      attention_.forward_into(this->out_, workspace_, this->q_, this->k_, this->v_, call(device));
    });
  }

 private:
  local_mha::LocalAttentionCall<Scalar> call(const local_mha::AnyDevice& device) const {
    local_mha::LocalAttentionCall<Scalar> call{
        .mask = mask_, .attn_bias = view_of_bias_, .training = this->training(), .device = device};
    if (this->of().sinks != 0) call.sinks = this->sinks_;
    if (this->of().packed != 0) call.cu_seqlens = this->cu_seqlens_;
    return call;
  }

  static local_mha::LocalAttentionConfig configuration(const Case& c) {
    local_mha::LocalAttentionConfig config;
    config.causal = c.causal != 0;
    if (c.token_window != 0) {
      config.token_window = {c.left, c.right};
    } else {
      config.window_size = c.window_size;
      config.exact_windowsize = c.exact != 0;
    }
    config.first_keys = c.first_keys;
    if (c.soft_cap != 0) config.score.soft_cap = static_cast<double>(c.soft_cap);
    for (Index h = 0; c.alibi != 0 && h < c.heads; ++h)
      config.score.alibi_slopes.push_back(
          std::exp2(-8 * static_cast<double>(h + 1) / static_cast<double>(c.heads)));
    if (c.rotary != 0) config.dim = c.dim_head;
    config.use_xpos = c.xpos != 0;
    config.dropout = static_cast<double>(c.dropout) / 100;
    return config;
  }

  friend class AttentionBackwardWork<Scalar, Arithmetic>;
  using Attention = local_mha::LocalAttention<Scalar, local_mha::ConfiguredScore, Arithmetic>;

  Attention attention_;
  typename Attention::Workspace workspace_;
  Threads threads_;
  local_mha::PaddingMask mask_;
  std::optional<local_mha::TensorView<const Scalar, 3>> view_of_bias_;
};

/// The backward pass alone: the forward pass is done once.
template <typename Scalar, typename Arithmetic>
class AttentionBackwardWork final : public AttentionWork<Scalar> {
 public:
  explicit AttentionBackwardWork(const Case& c)
      : AttentionWork<Scalar>(c),
        attention_(LocalAttentionWork<Scalar, Arithmetic>::configuration(c)),
        threads_(c.threads),
        grad_out_(this->shape(c.heads)),
        saved_(attention_.forward_saving(this->q_, this->k_, this->v_,
                                         {.training = this->training()})) {
    Random random(4);
    random.fill(grad_out_);
  }

  void run() override {
    threads_.call([&](const auto& device) {
      attention_.backward_into(gradients_, workspace_, saved_, grad_out_, this->q_, this->k_,
                               this->v_, {.training = this->training(), .device = device});
    });
  }

  double max_error() const override {
    const Case& c = this->of();
    Comparison q, k, v;
    const auto rows_of = [&](const local_mha::Tensor<Scalar, 4>& t) {
      return Rows<Scalar>(t.data(), c.seqlen, c.dim_head);
    };
    for (const Index i : sampled_rows(c)) {
      const ExactGradients exact = exact_gradients(
          c, rows_of(this->q_), rows_of(this->k_), rows_of(this->v_), rows_of(grad_out_), i,
          [&](Index query, Index key) { return exact_dropout(c, this->seed, query, key); });
      q.add(rows_of(gradients_.q).row(i), exact.q);
      k.add(rows_of(gradients_.k).row(i), exact.k);
      v.add(rows_of(gradients_.v).row(i), exact.v);
    }
    return std::max({q.relative(), k.relative(), v.relative()});
  }

 private:
  using Attention = local_mha::LocalAttention<Scalar, local_mha::ConfiguredScore, Arithmetic>;
  Attention attention_;
  typename Attention::Workspace workspace_;
  Threads threads_;
  local_mha::Tensor<Scalar, 4> grad_out_;
  typename Attention::Saved saved_;
  typename Attention::Gradients gradients_;
};

/// An input and the weights of a layer.
template <typename Scalar>
class LayerWork : public Work {
 public:
  explicit LayerWork(const Case& c) : Work(c), x_(c.batch, c.seqlen, c.dim) {
    Random random(2);
    random.fill(x_);
    parameters_ = local_mha::LocalMHAParameters<Scalar>::zeros(configuration(c));
    random.fill(parameters_.to_qkv, 1 / std::sqrt(static_cast<double>(c.dim)));
    random.fill(parameters_.to_out, 1 / std::sqrt(static_cast<double>(c.inner())));
    for (auto* bias : {&parameters_.to_qkv_bias, &parameters_.to_out_bias, &parameters_.sinks})
      random.fill(*bias);
    for (auto* scale : {&parameters_.q_scale, &parameters_.k_scale}) {
      random.fill(*scale, 0.1);
      scale->array() += Scalar(1);
    }
  }

  double peak(double seconds, double run) const override { return fma_peak<Scalar>(seconds, run); }

 protected:
  static local_mha::LocalMHAConfig configuration(const Case& c) {
    local_mha::LocalMHAConfig config;
    config.dim = c.dim;
    if (c.token_window != 0)
      config.token_window = {c.left, c.right};
    else
      config.window_size = c.window_size;
    config.dim_head = c.dim_head;
    config.heads = c.heads;
    if (c.kv_heads != 0) config.kv_heads = c.kv_heads;
    config.sinks = c.sinks != 0;
    config.qkv_bias = config.out_bias = c.biases != 0;
    config.causal = c.causal != 0;
    config.qk_rmsnorm = c.qk_rmsnorm != 0;
    config.use_xpos = c.xpos != 0;
    if (c.token_window == 0) config.exact_windowsize = c.exact != 0;
    return config;
  }

  /// Sequence `b` of `t`, `[seqlen, dim]`.
  Rows<Scalar> sequence(const local_mha::Tensor<Scalar, 3>& t, Index b) const {
    return Rows<Scalar>(&t(b, 0, 0), of().seqlen, t.dimension(2));
  }

  /// What the layer gives for row `i` of sequence `b`.
  Eigen::VectorXd exact_row(Index b, Index i) const {
    Case c = of();
    c.rotary = 1;
    const auto& p = parameters_;
    const auto x = sequence(x_, b);
    const std::vector<Index> seen = c.seen(i, c.seqlen);
    const Eigen::MatrixXd own = select_rows<Scalar>(x, {i});
    const Eigen::MatrixXd looked_at = select_rows<Scalar>(x, seen);
    const double scale = c.qk_rmsnorm != 0 ? 8 : 1 / std::sqrt(static_cast<double>(c.dim_head));
    Eigen::VectorXd heads(c.inner());
    for (Index h = 0; h < c.heads; ++h) {
      // By the head `at` of to_qkv.
      const auto projected = [&](const Eigen::MatrixXd& rows, Index at) -> Eigen::MatrixXd {
        Eigen::MatrixXd made =
            rows *
            p.to_qkv.middleRows(at * c.dim_head, c.dim_head).template cast<double>().transpose();
        if (c.biases != 0)
          made.rowwise() += p.to_qkv_bias.segment(at * c.dim_head, c.dim_head)
                                .template cast<double>()
                                .transpose();
        return made;
      };
      const Index kv = c.heads + c.head_of_keys(h);
      Eigen::MatrixXd q = projected(own, h);
      Eigen::MatrixXd k = projected(looked_at, kv);
      if (c.qk_rmsnorm != 0) {
        q = (q.rowwise().normalized() * p.q_scale.template cast<double>().asDiagonal()).eval();
        k = (k.rowwise().normalized() * p.k_scale.template cast<double>().asDiagonal()).eval();
      }
      heads.segment(h * c.dim_head, c.dim_head) = exact_attention(
          c, q.row(0), k, projected(looked_at, kv + c.heads_of_keys()), seen, i, scale,
          [](Index) { return 0.0; }, 0, h, c.sinks != 0 ? static_cast<double>(p.sinks[h]) : 0);
    }
    Eigen::VectorXd y = p.to_out.template cast<double>() * heads;
    if (c.biases != 0) y += p.to_out_bias.template cast<double>();
    return y;
  }

  /// Of the layer's result `[batch, seqlen, dim]`.
  double error_of(const local_mha::Tensor<Scalar, 3>& y) const {
    Comparison comparison;
    for (const Index b : {Index{0}, of().batch - 1})
      for (const Index i : sampled_rows(of()))
        comparison.add(sequence(y, b).row(i), exact_row(b, i));
    return comparison.relative();
  }

  local_mha::Tensor<Scalar, 3> x_;
  local_mha::LocalMHAParameters<Scalar> parameters_;
};

template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class LocalMHAWork final : public LayerWork<Scalar> {
 public:
  explicit LocalMHAWork(const Case& c)
      : LayerWork<Scalar>(c),
        layer_(this->configuration(c), this->parameters_),
        threads_(c.threads),
        y_(c.batch, c.seqlen, c.dim) {
    y_.setZero();
  }

  void run() override {
    threads_.call(
        [&](const auto& device) { layer_.forward_into(device, y_, workspace_, this->x_); });
  }

  double max_error() const override { return this->error_of(y_); }

 private:
  local_mha::LocalMHA<Scalar, Storage, Arithmetic> layer_;
  typename local_mha::LocalMHA<Scalar, Storage, Arithmetic>::Workspace workspace_;
  Threads threads_;
  local_mha::Tensor<Scalar, 3> y_;
};

/// A step of training, but for the optimizer: forward, and back to the gradients of x and of the
/// weights.
template <typename Scalar, typename Arithmetic = Scalar>
class LayerStepWork final : public LayerWork<Scalar> {
 public:
  explicit LayerStepWork(const Case& c)
      : LayerWork<Scalar>(c),
        layer_(this->configuration(c), this->parameters_),
        threads_(c.threads),
        grad_y_(c.batch, c.seqlen, c.dim),
        gradients_(this->parameters_),
        y_(c.batch, c.seqlen, c.dim),
        grad_x_(c.batch, c.seqlen, c.dim) {
    Random random(5);
    random.fill(grad_y_);
  }

  void run() override {
    threads_.call([&](const auto& device) {
      local_mha::set_zero(gradients_);
      layer_.forward_saving_into(device, y_, workspace_, saved_, this->x_);
      layer_.backward_into(device, grad_x_, workspace_, gradients_, saved_, grad_y_, this->x_);
    });
  }

  /// By Euler's theorem: with normalized queries and keys, y is linear in x along itself, in the
  /// values' weights and in to_out, and constant in the length of the queries' and keys' weights.
  double max_error() const override {
    const auto& p = this->parameters_;
    const auto sum = [](const auto& a, const auto& b) {
      double total = 0;
      for (Index i = 0; i < a.size(); ++i)
        total += static_cast<double>(a.data()[i]) * static_cast<double>(b.data()[i]);
      return total;
    };
    const double expected = sum(y_, grad_y_);
    double error = 0;
    for (const double got : {sum(this->x_, grad_x_), sum(p.to_qkv, gradients_.to_qkv),
                             sum(p.to_out, gradients_.to_out)}) {
      const double relative = std::abs(got - expected) / std::abs(expected);
      if (!(relative <= error)) error = relative;
    }
    return error;
  }

 private:
  using Layer = local_mha::LocalMHA<Scalar, Arithmetic, Arithmetic>;
  Layer layer_;
  Threads threads_;
  local_mha::Tensor<Scalar, 3> grad_y_;
  local_mha::LocalMHAParameters<Scalar> gradients_;
  typename Layer::Workspace workspace_;
  typename Layer::Saved saved_;
  local_mha::Tensor<Scalar, 3> y_;
  local_mha::Tensor<Scalar, 3> grad_x_;
};

/// The matrix products of the layer and nothing else: `(x·to_qkvᵀ)`, and its first third as heads
/// times `to_outᵀ`.
template <typename Scalar>
class EigenProductWork final : public LayerWork<Scalar> {
 public:
  using LayerWork<Scalar>::LayerWork;

  void run() override {
    const Case& c = this->of();
    const auto& p = this->parameters_;
    qkv_.resize(c.batch * c.seqlen, c.projected());
    y_.resize(c.batch * c.seqlen, c.dim);
    const Rows<Scalar> x(this->x_.data(), c.batch * c.seqlen, c.dim);
    qkv_.noalias() = x * p.to_qkv.transpose();
    y_.noalias() = qkv_.leftCols(c.inner()) * p.to_out.transpose();
  }

  double max_error() const override {
    Comparison comparison;
    const auto& p = this->parameters_;
    for (const Index i : sampled_rows(this->of())) {
      const Eigen::VectorXd row = this->sequence(this->x_, 0).row(i).template cast<double>();
      const Eigen::VectorXd heads =
          p.to_qkv.topRows(this->of().inner()).template cast<double>() * row;
      comparison.add(y_.row(i), p.to_out.template cast<double>() * heads);
    }
    return comparison.relative();
  }

 private:
  local_mha::RowMatrix<Scalar> qkv_;
  local_mha::RowMatrix<Scalar> y_;
};

/// The projections of one position: `to_qkv·x`, and `to_out` times a third of it.
template <typename Scalar>
class EigenVectorsWork final : public LayerWork<Scalar> {
 public:
  using LayerWork<Scalar>::LayerWork;

  void run() override {
    const Case& c = this->of();
    const auto& p = this->parameters_;
    qkv_.noalias() = p.to_qkv * x(c);
    y_.noalias() = p.to_out * qkv_.head(c.inner());
  }

  double max_error() const override {
    const Case& c = this->of();
    const auto& p = this->parameters_;
    const Eigen::VectorXd heads =
        p.to_qkv.topRows(c.inner()).template cast<double>() * x(c).template cast<double>();
    Comparison comparison;
    comparison.add(y_, p.to_out.template cast<double>() * heads);
    return comparison.relative();
  }

 private:
  auto x(const Case& c) const {
    return Eigen::Map<const local_mha::Vector<Scalar>>(this->x_.data(), c.dim);
  }

  local_mha::Vector<Scalar> qkv_;
  local_mha::Vector<Scalar> y_;
};

/// The layer's stream: the whole input in chunks, or its last position again and again; that of
/// several layers, each of which has weights and a stream of its own.
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class StreamWork final : public LayerWork<Scalar> {
 public:
  explicit StreamWork(const Case& c)
      : LayerWork<Scalar>(c),
        layer_(this->configuration(c), this->parameters_),
        threads_(c.threads),
        y_(c.batch, c.seqlen, c.dim) {
    y_.setZero();
    streams_.reserve(static_cast<std::size_t>(c.layers));
    for (Index i = 0; i < c.layers; ++i) {
      if (i > 0) layer_.set_parameters(this->parameters_);
      streams_.emplace_back(layer_, local_mha::StreamConfig{.max_threads = c.threads});
      if (c.of_one_position()) push(streams_.back(), 0, c.seqlen - 1);
    }
  }

  void run() override {
    const Case& c = this->of();
    for (Stream& stream : streams_) {
      if (!c.of_one_position()) stream.reset();
      push(stream, c.of_one_position() ? c.seqlen - 1 : 0, c.seqlen);
    }
  }

  double max_error() const override {
    Comparison comparison;
    if (!this->of().of_one_position()) {
      for (const Index i : sampled_rows(this->of()))
        comparison.add(this->sequence(y_, 0).row(i), this->exact_row(0, i));
      return comparison.relative();
    }
    // In the runs, the last position has followed itself; here it follows the others.
    Stream once(layer_, {.max_threads = this->of().threads});
    const Index last = this->of().seqlen - 1;
    push(once, 0, last);
    push(once, last, last + 1);
    comparison.add(this->sequence(y_, 0).row(last), this->exact_row(0, last));
    return comparison.relative();
  }

 private:
  using Stream = typename local_mha::LocalMHA<Scalar, Storage, Arithmetic>::Stream;

  void push(Stream& stream, Index begin, Index end) const {
    constexpr Index chunk = 512;
    const Index dim = this->of().dim;
    for (Index i = begin; i < end; i += chunk) {
      const Index n = std::min(chunk, end - i);
      threads_.call([&](const auto& device) {
        stream.push_into(
            local_mha::TensorView<Scalar, 3>(y_.data() + i * dim, {1, n, dim}),
            local_mha::TensorView<const Scalar, 3>(this->x_.data() + i * dim, {1, n, dim}),
            {.device = device});
      });
    }
  }

  local_mha::LocalMHA<Scalar, Storage, Arithmetic> layer_;
  Threads threads_;
  std::vector<Stream> streams_;
  mutable local_mha::Tensor<Scalar, 3> y_;
};

}  // namespace detail

}  // namespace measuring
