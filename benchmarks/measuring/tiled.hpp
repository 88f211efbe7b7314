// SPDX-License-Identifier: MIT
/// \file
/// The attention and the layer as one writes them with Eigen in an afternoon, for speed: tiles of
/// queries, of which each is two of Eigen's matrix products and array expressions between them, in
/// memory that is kept. The peers of the kernel and of the layer.
#pragma once

#include <algorithm>
#include <cmath>

#include <Eigen/Dense>

#include "case.hpp"

namespace measuring {

template <typename Scalar>
using RowsOf = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// Rows of a matrix `[rows, channels]`, or of some of its channels.
template <typename Scalar>
using SomeRows = Eigen::Ref<const RowsOf<Scalar>, 0, Eigen::OuterStride<>>;
template <typename Scalar>
using ResultRows = Eigen::Ref<RowsOf<Scalar>, 0, Eigen::OuterStride<>>;

/// Softmax over what queries see around them, a tile of them at a time.
template <typename Scalar>
class TiledAttention {
 public:
  static constexpr Index tile = 64;

  explicit TiledAttention(const Case& c)
      : w_(c.window_size),
        causal_(c.causal != 0),
        exact_(c.exact != 0),
        scores_((causal_ ? 1 : 2) * (exact_ ? 1 : 2) * w_ + tile, tile),
        weights_(tile) {}

  /// Of one head.
  /// \param queries `[rows, dim_head]` of the positions `first_row + first_key …`
  /// \param keys, values `[seen, dim_head]` of the positions `first_key …`, which are all that a
  ///        query sees
  /// \param first_row of the first query, counted from the first key
  /// \param first_key its position in the sequence
  /// \param scale of scores
  /// \param result `[rows, dim_head]`
  void operator()(const SomeRows<Scalar>& queries, const SomeRows<Scalar>& keys,
                  const SomeRows<Scalar>& values, Index first_row, Index first_key, Scalar scale,
                  ResultRows<Scalar> result) {
    for (Index first = 0; first < queries.rows(); first += tile) {
      const Index rows = std::min(tile, queries.rows() - first);
      const Index at = first_key + first_row + first;  // position of the tile's first query
      const Index begin = begin_of(at) - first_key;
      const Index seen = std::min(keys.rows(), end_of(at + rows - 1) - first_key) - begin;
      // A column is a query, and so contiguous.
      auto scores = scores_.topLeftCorner(seen, rows);
      scores.noalias() =
          scale * keys.middleRows(begin, seen) * queries.middleRows(first, rows).transpose();
      for (Index t = 0; t < rows; ++t) {
        const Index before = begin_of(at + t) - first_key - begin;
        const Index end = std::min(seen, end_of(at + t) - first_key - begin);
        auto column = scores.col(t);
        auto seen_by_it = column.segment(before, end - before).array();
        const Scalar largest = seen_by_it.maxCoeff();
        seen_by_it = (seen_by_it - largest).exp();
        weights_[t] = 1 / seen_by_it.sum();
        column.head(before).setZero();
        column.tail(seen - end).setZero();
      }
      auto rows_of_result = result.middleRows(first, rows);
      rows_of_result.noalias() = scores.transpose() * values.middleRows(begin, seen);
      rows_of_result.array().colwise() *= weights_.head(rows);
    }
  }

 private:
  /// The positions that query `i` sees, but for the sequence's end: a single interval.
  Index begin_of(Index i) const { return std::max<Index>(0, exact_ ? i - w_ : (i / w_ - 1) * w_); }
  Index end_of(Index i) const {
    if (causal_) return i + 1;
    return exact_ ? i + w_ + 1 : (i / w_ + 2) * w_;
  }

  Index w_;
  bool causal_;
  bool exact_;
  Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic> scores_;  ///< `[keys, queries]`
  Eigen::Array<Scalar, Eigen::Dynamic, 1> weights_;
};

/// The causal layer with rotary, and with xPos and qk_rmsnorm where the case has them: a stretch of
/// rows is projected, each head's queries and keys are normalized and turned, attended to, and
/// projected again.
template <typename Scalar>
class TiledLayer {
 public:
  using Matrix = RowsOf<Scalar>;
  using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;
  static constexpr Index stretch = 512;

  /// \param to_qkv `[3·heads·dim_head, dim]`, \param to_out `[dim, heads·dim_head]`
  /// \param q_scale, k_scale `[dim_head]`, which qk_rmsnorm alone reads
  TiledLayer(const Case& c, const SomeRows<Scalar>& to_qkv, const SomeRows<Scalar>& to_out,
             const Vector& q_scale, const Vector& k_scale)
      : case_(c),
        to_qkv_(to_qkv.transpose()),
        to_out_(to_out.transpose()),
        q_scale_(q_scale),
        k_scale_(k_scale),
        attention_(c),
        qkv_(c.window_size + stretch, c.projected()),
        queries_(stretch, c.dim_head),
        keys_(c.window_size + stretch, c.dim_head),
        values_(c.window_size + stretch, c.dim_head),
        heads_(stretch, c.inner()) {
    // Positions count from the middle of what a stretch reads, so that powers of xPos stay small.
    const Index half = c.dim_head / 2, rows = qkv_.rows();
    for (auto* table : {&query_cos_, &query_sin_, &key_cos_, &key_sin_}) table->resize(rows, half);
    const double base = std::sqrt(static_cast<double>(c.dim));
    const auto d = static_cast<double>(c.dim_head);
    for (Index row = 0; row < rows; ++row)
      for (Index m = 0; m < half; ++m) {
        const auto position = static_cast<double>(row - rows / 2);
        const double angle = position * std::pow(10000.0, -2 * static_cast<double>(m) / d);
        const double zeta = (2 * static_cast<double>(m) + 0.4 * d) / (1.4 * d);
        const double power = c.xpos != 0 ? std::pow(zeta, position / base) : 1;
        query_cos_(row, m) = static_cast<Scalar>(power * std::cos(angle));
        query_sin_(row, m) = static_cast<Scalar>(power * std::sin(angle));
        key_cos_(row, m) = static_cast<Scalar>(std::cos(angle) / power);
        key_sin_(row, m) = static_cast<Scalar>(std::sin(angle) / power);
      }
  }

  /// Of one sequence.
  /// \param x `[seqlen, dim]`, \param y `[seqlen, dim]`
  void operator()(const SomeRows<Scalar>& x, ResultRows<Scalar> y) {
    const Index w = case_.window_size, d = case_.dim_head, inner = case_.inner();
    const auto scale =
        static_cast<Scalar>(case_.qk_rmsnorm != 0 ? 8.0 : 1 / std::sqrt(static_cast<double>(d)));
    for (Index first = 0; first < x.rows(); first += stretch) {
      const Index rows = std::min(stretch, x.rows() - first);
      const Index before = std::min(w, first);  // rows of keys and values that are there already
      auto qkv = qkv_.middleRows(w, rows);
      qkv.noalias() = x.middleRows(first, rows) * to_qkv_;
      if (case_.qk_rmsnorm != 0)
        for (Index h = 0; h < case_.heads; ++h) {
          normalize(qkv.middleCols(h * d, d), q_scale_);
          normalize(qkv.middleCols(inner + h * d, d), k_scale_);
        }
      auto keys = keys_.topRows(before + rows);
      auto values = values_.topRows(before + rows);
      for (Index h = 0; h < case_.heads; ++h) {
        const auto seen = qkv_.middleRows(w - before, before + rows);
        turn(queries_.topRows(rows), qkv.middleCols(h * d, d), query_cos_.middleRows(w, rows),
             query_sin_.middleRows(w, rows));
        turn(keys, seen.middleCols(inner + h * d, d),
             key_cos_.middleRows(w - before, before + rows),
             key_sin_.middleRows(w - before, before + rows));
        values = seen.middleCols(2 * inner + h * d, d);
        attention_(queries_.topRows(rows), keys, values, before, first - before, scale,
                   heads_.block(0, h * d, rows, d));
      }
      y.middleRows(first, rows).noalias() = heads_.topRows(rows) * to_out_;
      // What the next stretch sees of this one; it lies before where that will be.
      if (first + rows < x.rows())
        for (Index row = 0; row < w; ++row)
          qkv_.row(row).tail(2 * inner) = qkv_.row(stretch + row).tail(2 * inner);
    }
  }

 private:
  template <typename Block>
  static void normalize(Block&& block, const Vector& scale) {
    for (Index i = 0; i < block.rows(); ++i) {
      auto row = block.row(i);
      row.array() *= scale.transpose().array() / row.norm();
    }
  }

  /// Each pair of channels `(m, m + D/2)` by the angle of its row.
  template <typename Result, typename Block, typename Table>
  static void turn(Result&& result, const Block& block, const Table& cos, const Table& sin) {
    const Index half = cos.cols();
    const auto left = block.leftCols(half).array();
    const auto right = block.rightCols(half).array();
    result.leftCols(half) = (left * cos.array() - right * sin.array()).matrix();
    result.rightCols(half) = (right * cos.array() + left * sin.array()).matrix();
  }

  Case case_;
  Matrix to_qkv_;  ///< `[dim, 3·heads·dim_head]`
  Matrix to_out_;  ///< `[heads·dim_head, dim]`
  Vector q_scale_;
  Vector k_scale_;
  TiledAttention<Scalar> attention_;
  Matrix qkv_;                      ///< a window's rows before the stretch, and the stretch
  Matrix queries_, keys_, values_;  ///< of one head
  Matrix heads_;
  Matrix query_cos_, query_sin_, key_cos_, key_sin_;  ///< with the powers of xPos
};

}  // namespace measuring
