// SPDX-License-Identifier: MIT
/// \file
/// Forward, backward and stream in one call: what is compiled for many processors and with many
/// flags.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include <local_mha/local_mha.hpp>

namespace computations {

using local_mha::Index;
using local_mha::Tensor;

/// A NaN is larger than any number.
inline void grow(double& largest, double error) {
  if (!(error <= largest))
    largest = error == error ? error : std::numeric_limits<double>::infinity();
}

template <typename Scalar, int Rank>
double largest_difference(const Tensor<Scalar, Rank>& a, const Tensor<double, Rank>& b) {
  double largest = 0;
  for (Index i = 0; i < b.size(); ++i)
    grow(largest, std::abs(static_cast<double>(a.data()[i]) - b.data()[i]));
  return largest;
}

/// Attention by its formula, in double: causal, over `window` positions back.
inline Tensor<double, 4> naive_attention(const Tensor<double, 4>& q, const Tensor<double, 4>& k,
                                         const Tensor<double, 4>& v, Index window) {
  Tensor<double, 4> out(v.dimensions());
  out.setZero();
  const double scale = 1 / std::sqrt(static_cast<double>(q.dimension(3)));
  for (Index b = 0; b < q.dimension(0); ++b)
    for (Index h = 0; h < q.dimension(1); ++h)
      for (Index i = 0; i < q.dimension(2); ++i) {
        double sum = 0;
        for (Index j = std::max<Index>(0, i - window); j <= i; ++j) {
          double score = 0;
          for (Index c = 0; c < q.dimension(3); ++c) score += q(b, h, i, c) * k(b, h, j, c);
          const double weight = std::exp(scale * score);
          sum += weight;
          for (Index c = 0; c < v.dimension(3); ++c) out(b, h, i, c) += weight * v(b, h, j, c);
        }
        for (Index c = 0; c < v.dimension(3); ++c) out(b, h, i, c) /= sum;
      }
  return out;
}

template <typename Scalar, int Rank>
Tensor<Scalar, Rank> random_tensor(const Eigen::array<Index, Rank>& shape, std::uint64_t seed) {
  Tensor<Scalar, Rank> tensor(shape);
  local_mha::RandomSequence random(seed);
  for (Index i = 0; i < tensor.size(); ++i)
    tensor.data()[i] = static_cast<Scalar>(static_cast<float>(random.normal()));
  return tensor;
}

template <typename Scalar, int Rank>
Tensor<double, Rank> in_double(const Tensor<Scalar, Rank>& from) {
  Tensor<double, Rank> to(from.dimensions());
  for (Index i = 0; i < to.size(); ++i) to.data()[i] = static_cast<double>(from.data()[i]);
  return to;
}

/// Attention in Scalar against the formula.
template <typename Scalar>
double attention_error(Index n, Index window) {
  const Eigen::array<Index, 4> shape{2, 2, n, 16};
  const auto q = random_tensor<Scalar, 4>(shape, 1);
  const auto k = random_tensor<Scalar, 4>(shape, 2);
  const auto v = random_tensor<Scalar, 4>(shape, 3);
  const local_mha::LocalAttention<Scalar> attention(
      {.window_size = window, .causal = true, .exact_windowsize = true});
  return largest_difference(attention.forward(q, k, v),
                            naive_attention(in_double(q), in_double(k), in_double(v), window));
}

struct LayerResults {
  Tensor<double, 3> y;
  Tensor<double, 3> streamed;
  Tensor<double, 3> grad_x;
  Tensor<double, 2> grad_to_out;
};

/// A layer's three ways to compute.
template <typename Scalar>
LayerResults layer_results(Index n) {
  using Layer = local_mha::LocalMHA<Scalar>;
  local_mha::LocalMHAConfig config{.dim = 24, .window_size = 5};
  config.dim_head = 16;
  config.heads = 3;
  config.causal = true;
  config.qk_rmsnorm = true;
  config.use_xpos = true;
  const Layer layer(config, /*seed=*/7);
  const auto x = random_tensor<Scalar, 3>({2, n, 24}, 4);
  const auto grad_y = random_tensor<Scalar, 3>({2, n, 24}, 5);
  LayerResults results;
  typename Layer::Saved saved;
  results.y = in_double(layer.forward_saving(saved, x));
  auto gradients = Layer::Parameters::zeros(config);
  results.grad_x = in_double(layer.backward(gradients, saved, grad_y, x));
  const auto& weight = gradients.to_out;
  results.grad_to_out.resize(weight.rows(), weight.cols());
  for (Index i = 0; i < weight.size(); ++i)
    results.grad_to_out.data()[i] = static_cast<double>(weight.data()[i]);
  typename Layer::Stream stream(layer, {.batch = 2});
  results.streamed.resize(2, n, 24);
  for (Index i = 0; i < n; ++i) {
    Tensor<Scalar, 3> row(2, 1, 24);
    for (Index b = 0; b < 2; ++b)
      for (Index c = 0; c < 24; ++c) row(b, 0, c) = x(b, i, c);
    const auto out = stream.push(row);
    for (Index b = 0; b < 2; ++b)
      for (Index c = 0; c < 24; ++c) results.streamed(b, i, c) = static_cast<double>(out(b, 0, c));
  }
  return results;
}

/// The largest difference of anything that should be equal.
/// \tparam Scalar compared with double, whose attention is compared with the formula
template <typename Scalar>
double largest_error(Index n) {
  const LayerResults exact = layer_results<double>(n);
  const LayerResults some = layer_results<Scalar>(n);
  double largest = 0;
  const auto add = [&](const char* what, double error) {
    std::printf("  %-22s %.2g\n", what, error);
    grow(largest, error);
  };
  add("attention", attention_error<Scalar>(n, 5));
  add("attention, long window", attention_error<Scalar>(n, n));
  add("layer", largest_difference(some.y, exact.y));
  add("stream", largest_difference(some.streamed, exact.y));
  add("gradient of x", largest_difference(some.grad_x, exact.grad_x));
  add("gradient of a weight", largest_difference(some.grad_to_out, exact.grad_to_out) /
                                  std::sqrt(2.0 * static_cast<double>(n)));
  return largest;
}

/// \return the exit status of a program
template <typename Scalar>
int check(const char* name, double most) {
  std::printf("%s, at most %.2g:\n", name, most);
  // With a block that is not full, and with one of a single row.
  double error = 0;
  for (const Index n : {45, 33}) grow(error, largest_error<Scalar>(n));
  if (error <= most) return 0;
  std::printf("%s: %.3g is more than %.3g\n", name, error, most);
  return 1;
}

}  // namespace computations
