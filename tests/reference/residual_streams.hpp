// SPDX-License-Identifier: MIT
/// \file
/// A hyper-connection around a branch, written out naively, and its gradients. Streams are
/// `[B, N, S, dim]`, what goes through the branch is `[B, N, dim]`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "reference/array.hpp"
#include "reference/norms.hpp"

namespace reference {

/// What a position's streams say of how they are mixed.
template <typename Real>
struct StreamWeights {
  std::vector<Real> norm;            // [S]: max(|r_s|, 1e-12)
  Array<Real> normed;                // [S, dim]: n
  Array<Real> alpha, dynamic_alpha;  // [S, S + 1]: α, and tanh of what n makes
  Array<Real> beta, dynamic_beta;    // [S]: the same for β
};

/// \param r the position's streams, `[S, dim]` one after the other
template <typename Real>
StreamWeights<Real> stream_weights(const Parameters<Real>& parameters, const std::string& prefix,
                                   const Real* r) {
  using std::sqrt, std::tanh;
  const Array<Real>& static_alpha = parameters.at(prefix + "static_alpha");
  const Array<Real>& static_beta = parameters.at(prefix + "static_beta");
  const Array<Real>& alpha_fn = parameters.at(prefix + "dynamic_alpha_fn");
  const Array<Real>& beta_fn = parameters.at(prefix + "dynamic_beta_fn");
  const Array<Real>& gamma = parameters.at(prefix + "norm.gamma");
  const Real alpha_scale = parameters.at(prefix + "dynamic_alpha_scale").data[0];
  const Real beta_scale = parameters.at(prefix + "dynamic_beta_scale").data[0];
  const Int streams = static_alpha.shape[0], dim = gamma.shape[0];
  StreamWeights<Real> to;
  to.normed = Array<Real>({streams, dim});
  to.alpha = to.dynamic_alpha = Array<Real>({streams, streams + 1});
  to.beta = to.dynamic_beta = Array<Real>({streams});
  for (Int s = 0; s < streams; ++s) {
    const Real norm = norm_of(r + s * dim, static_cast<std::size_t>(dim));
    to.norm.push_back(norm);
    for (Int c = 0; c < dim; ++c)
      to.normed(s, c) = r[s * dim + c] / norm * sqrt(static_cast<Real>(dim)) * (Real(1) + gamma(c));
    for (Int t = 0; t <= streams; ++t) {
      Real sum(0);
      for (Int c = 0; c < dim; ++c) sum += to.normed(s, c) * alpha_fn(c, t);
      to.dynamic_alpha(s, t) = tanh(sum);
      to.alpha(s, t) = to.dynamic_alpha(s, t) * alpha_scale + static_alpha(s, t);
    }
    Real sum(0);
    for (Int c = 0; c < dim; ++c) sum += to.normed(s, c) * beta_fn(c);
    to.dynamic_beta(s) = tanh(sum);
    to.beta(s) = to.dynamic_beta(s) * beta_scale + static_beta(s);
  }
  return to;
}

/// `αᵀ·r` of a position, `[S + 1, dim]`: the branch's input, then what the streams become.
template <typename Real>
Array<Real> mixed_streams(const StreamWeights<Real>& weights, const Real* r) {
  const Int streams = weights.normed.shape[0], dim = weights.normed.shape[1];
  Array<Real> mix({streams + 1, dim});
  for (Int t = 0; t <= streams; ++t)
    for (Int s = 0; s < streams; ++s)
      for (Int c = 0; c < dim; ++c) mix(t, c) += weights.alpha(s, t) * r[s * dim + c];
  return mix;
}

/// `r_s ← mix_{s+1} + β_s · branch(mix_0)`.
/// \param branch takes and gives `[B, N, dim]`
template <typename Real, typename Branch>
Array<Real> hyper_connection(const Parameters<Real>& parameters, const std::string& prefix,
                             const Array<Real>& r, Branch&& branch) {
  const Int batch = r.shape[0], n = r.shape[1], streams = r.shape[2], dim = r.shape[3];
  Array<Real> input({batch, n, dim}), result(r.shape);
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i) {
      const Real* at = &r(b, i, 0, 0);
      const Array<Real> mix = mixed_streams(stream_weights(parameters, prefix, at), at);
      for (Int c = 0; c < dim; ++c) {
        input(b, i, c) = mix(0, c);
        for (Int s = 0; s < streams; ++s) result(b, i, s, c) = mix(s + 1, c);
      }
    }
  const Array<Real> y = branch(input);
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i) {
      const StreamWeights<Real> weights = stream_weights(parameters, prefix, &r(b, i, 0, 0));
      for (Int s = 0; s < streams; ++s)
        for (Int c = 0; c < dim; ++c) result(b, i, s, c) += weights.beta(s) * y(b, i, c);
    }
  return result;
}

/// Of hyper_connection(): adds to the gradients of its weights and returns that of r.
/// \param y what the branch gave
/// \param grad gradient of the result, `[B, N, S, dim]`
/// \param branch_backward gives the gradient of the branch's input from that of its result
template <typename Real, typename BranchBackward>
Array<Real> hyper_connection_backward(const Parameters<Real>& parameters, const std::string& prefix,
                                      const Array<Real>& r, const Array<Real>& y,
                                      const Array<Real>& grad, Parameters<Real>& gradients,
                                      BranchBackward&& branch_backward) {
  using std::sqrt;
  const Int batch = r.shape[0], n = r.shape[1], streams = r.shape[2], dim = r.shape[3];
  Array<Real> grad_y(y.shape), grad_r(r.shape);
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i) {
      const StreamWeights<Real> weights = stream_weights(parameters, prefix, &r(b, i, 0, 0));
      for (Int s = 0; s < streams; ++s)
        for (Int c = 0; c < dim; ++c) grad_y(b, i, c) += weights.beta(s) * grad(b, i, s, c);
    }
  const Array<Real> grad_input = branch_backward(grad_y);
  const Array<Real>& alpha_fn = parameters.at(prefix + "dynamic_alpha_fn");
  const Array<Real>& beta_fn = parameters.at(prefix + "dynamic_beta_fn");
  const Array<Real>& gamma = parameters.at(prefix + "norm.gamma");
  const Real alpha_scale = parameters.at(prefix + "dynamic_alpha_scale").data[0];
  const Real beta_scale = parameters.at(prefix + "dynamic_beta_scale").data[0];
  for (Int b = 0; b < batch; ++b)
    for (Int i = 0; i < n; ++i) {
      const StreamWeights<Real> weights = stream_weights(parameters, prefix, &r(b, i, 0, 0));
      const auto grad_mix = [&](Int t, Int c) {
        return t == 0 ? grad_input(b, i, c) : grad(b, i, t - 1, c);
      };
      for (Int s = 0; s < streams; ++s) {
        std::vector<Real> grad_normed(static_cast<std::size_t>(dim), Real(0));
        for (Int t = 0; t <= streams; ++t) {
          Real grad_alpha(0);
          for (Int c = 0; c < dim; ++c) {
            grad_alpha += grad_mix(t, c) * r(b, i, s, c);
            grad_r(b, i, s, c) += weights.alpha(s, t) * grad_mix(t, c);
          }
          const Real& dynamic = weights.dynamic_alpha(s, t);
          gradients.at(prefix + "static_alpha")(s, t) += grad_alpha;
          gradients.at(prefix + "dynamic_alpha_scale").data[0] += grad_alpha * dynamic;
          const Real slope = grad_alpha * alpha_scale * (Real(1) - dynamic * dynamic);
          for (Int c = 0; c < dim; ++c) {
            gradients.at(prefix + "dynamic_alpha_fn")(c, t) += slope * weights.normed(s, c);
            grad_normed[static_cast<std::size_t>(c)] += slope * alpha_fn(c, t);
          }
        }
        Real grad_beta(0);
        for (Int c = 0; c < dim; ++c) grad_beta += grad(b, i, s, c) * y(b, i, c);
        const Real& dynamic = weights.dynamic_beta(s);
        gradients.at(prefix + "static_beta")(s) += grad_beta;
        gradients.at(prefix + "dynamic_beta_scale").data[0] += grad_beta * dynamic;
        const Real slope = grad_beta * beta_scale * (Real(1) - dynamic * dynamic);
        for (Int c = 0; c < dim; ++c) {
          gradients.at(prefix + "dynamic_beta_fn")(c) += slope * weights.normed(s, c);
          grad_normed[static_cast<std::size_t>(c)] += slope * beta_fn(c);
        }
        // n = √dim · (1 + gamma) · r / |r|, and a bounded norm is a constant.
        Array<Real> row({1, dim}), of_unit({1, dim});
        const Real root = sqrt(static_cast<Real>(dim));
        for (Int c = 0; c < dim; ++c) {
          const Real& g = grad_normed[static_cast<std::size_t>(c)];
          row(0, c) = r(b, i, s, c);
          of_unit(0, c) = g * root * (Real(1) + gamma(c));
          gradients.at(prefix + "norm.gamma")(c) +=
              g * root * r(b, i, s, c) / weights.norm[static_cast<std::size_t>(s)];
        }
        const Array<Real> of_row = normalized_rows_backward(row, of_unit);
        for (Int c = 0; c < dim; ++c) grad_r(b, i, s, c) += of_row(0, c);
      }
    }
  return grad_r;
}

}  // namespace reference
