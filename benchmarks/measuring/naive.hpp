// SPDX-License-Identifier: MIT
/// \file
/// The attention as one writes it with Eigen: a bucket of queries against its look-around, in
/// matrix expressions. The baseline beside the kernel.
#pragma once

#include <algorithm>
#include <limits>

#include <Eigen/Dense>

#include "case.hpp"

namespace measuring {

/// \param q, k, v `[seqlen, dim_head]` of one head
/// \param out `[seqlen, dim_head]`
template <typename Scalar>
void naive_attention(const Case& c, const Scalar* q, const Scalar* k, const Scalar* v,
                     Scalar* out) {
  using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Rows = Eigen::Map<const Matrix>;
  const Index w = c.window_size;
  const Rows queries(q, c.seqlen, c.dim_head);
  const Rows keys(k, c.seqlen, c.dim_head);
  const Rows values(v, c.seqlen, c.dim_head);
  Eigen::Map<Matrix> result(out, c.seqlen, c.dim_head);
  const auto scale = static_cast<Scalar>(1 / std::sqrt(static_cast<double>(c.dim_head)));
  for (Index first = 0; first < c.seqlen; first += w) {
    const Index rows = std::min(w, c.seqlen - first);
    const Index begin = std::max<Index>(0, first - w);
    const Index seen = std::min(c.seqlen, first + (1 + c.look_forward()) * w) - begin;
    Matrix scores =
        scale * queries.middleRows(first, rows) * keys.middleRows(begin, seen).transpose();
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < seen; ++j)
        if (!c.sees(first + i, begin + j, c.seqlen))
          scores(i, j) = -std::numeric_limits<Scalar>::infinity();
    scores.colwise() -= scores.rowwise().maxCoeff().eval();
    scores = scores.array().exp().matrix();
    scores.array().colwise() /= scores.rowwise().sum().array().eval();
    result.middleRows(first, rows).noalias() = scores * values.middleRows(begin, seen);
  }
}

}  // namespace measuring
