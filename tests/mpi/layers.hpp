// SPDX-License-Identifier: MIT
// Layers of every kind, and the rows of a rank.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <local_mha/local_mha.hpp>
#include <local_mha/mpi/split.hpp>
#include <support/compare.hpp>
#include <support/random.hpp>

namespace mpi_tests {

using local_mha::Index;
using local_mha::LocalMHAConfig;
using local_mha::Tensor;

struct NamedLayer {
  std::string name;
  LocalMHAConfig config;
};

/// Windows that look back and ahead, exact and bucketed, token windows, first keys, and what a
/// layer can have beside them.
inline std::vector<NamedLayer> layers() {
  const LocalMHAConfig plain{.dim = 12, .window_size = 7, .dim_head = 8, .heads = 4};
  std::vector<NamedLayer> all;
  const auto add = [&](const std::string& name, auto&& change) {
    LocalMHAConfig config = plain;
    change(config);
    all.push_back({name, config});
  };
  add("both sides", [](LocalMHAConfig&) {});
  add("causal", [](LocalMHAConfig& c) { c.causal = true; });
  add("two windows back", [](LocalMHAConfig& c) {
    c.look_backward = 2;
    c.causal = true;
    c.use_xpos = true;
    c.qk_rmsnorm = true;
  });
  add("whole windows", [](LocalMHAConfig& c) { c.exact_windowsize = false; });
  add("whole windows, causal", [](LocalMHAConfig& c) {
    c.exact_windowsize = false;
    c.causal = true;
    c.prenorm = true;
    c.gate_values_per_head = true;
  });
  add("a long window", [](LocalMHAConfig& c) { c.window_size = 60; });
  add("a window of one", [](LocalMHAConfig& c) {
    c.window_size = 1;
    c.causal = true;
  });
  add("shared keys, biases, sinks", [](LocalMHAConfig& c) {
    c.kv_heads = 2;
    c.qkv_bias = c.out_bias = c.sinks = true;
    c.qk_norm.kind = local_mha::QkNormKind::rms;
  });
  add("a token window", [](LocalMHAConfig& c) {
    c.window_size = 0;
    c.token_window = {.left = 30, .right = 4};
    c.relative_bias = true;
    c.prenorm = true;
    c.norm.kind = local_mha::NormKind::rms;
    c.qk_norm.kind = local_mha::QkNormKind::rms_all;
  });
  add("all before", [](LocalMHAConfig& c) {
    c.window_size = 0;
    c.token_window = {.left = local_mha::TokenWindow::unbounded, .right = 0};
    c.score.alibi_slopes = {0.5, 0.25, 0.125, 0.0625};
  });
  add("first keys", [](LocalMHAConfig& c) {
    c.causal = true;
    c.first_keys = 3;
    c.score.soft_cap = 5;
  });
  add("a first key far behind a narrow window", [](LocalMHAConfig& c) {
    c.window_size = 0;
    c.token_window = {.left = 2, .right = 0};
    c.first_keys = 1;
  });
  add("many first keys, both sides", [](LocalMHAConfig& c) {
    c.first_keys = 19;
    c.qkv_bias = true;
  });
  return all;
}

/// A layer whose weights are all at no special value.
template <typename Scalar>
local_mha::LocalMHA<Scalar> layer_of(const LocalMHAConfig& config, std::uint64_t seed = 1) {
  Random random(seed);
  auto parameters = local_mha::LocalMHAParameters<Scalar>::zeros(config);
  local_mha::for_each_parameter(parameters, [&](const std::string& name, auto& tensor) {
    const bool around_one =
        name.find("norm.weight") != std::string::npos || name.find("_scale") != std::string::npos;
    for (Index i = 0; i < tensor.size(); ++i)
      tensor.data()[i] = static_cast<Scalar>((around_one ? 1 : 0) + 0.4 * random.normal());
  });
  return local_mha::LocalMHA<Scalar>(config, std::move(parameters));
}

template <typename Scalar>
Tensor<Scalar, 3> random_rows(Index batch, Index rows, Index dim, std::uint64_t seed) {
  Random random(seed);
  Tensor<Scalar, 3> x(batch, rows, dim);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<Scalar>(random.normal());
  return x;
}

/// The rows of a rank.
template <typename Scalar>
Tensor<Scalar, 3> own_rows(const Tensor<Scalar, 3>& x, const local_mha::mpi::Split& split) {
  Tensor<Scalar, 3> own(x.dimension(0), split.rows(), x.dimension(2));
  for (Index b = 0; b < x.dimension(0); ++b)
    for (Index i = 0; i < split.rows(); ++i)
      for (Index c = 0; c < x.dimension(2); ++c) own(b, i, c) = x(b, split.stretch().begin + i, c);
  return own;
}

inline local_mha::PaddingMask own_mask(const Tensor<bool, 2>& masked,
                                       const local_mha::mpi::Split& split) {
  Tensor<bool, 2> own(masked.dimension(0), split.rows());
  for (Index b = 0; b < masked.dimension(0); ++b)
    for (Index i = 0; i < split.rows(); ++i) own(b, i) = masked(b, split.stretch().begin + i);
  return local_mha::PaddingMask::masked(own);
}

/// The largest difference, or that of the bits: 0 only if all are the same, infinite if one is NaN.
template <typename Scalar, int Rank>
double difference(const Tensor<Scalar, Rank>& a, const Tensor<Scalar, Rank>& b) {
  double most = 0;
  for (Index i = 0; i < a.size(); ++i)
    most = std::max(most, support::distance(a.data()[i], b.data()[i]));
  return most;
}

/// The largest difference of two sets of parameters, as a share of the largest number of a tensor,
/// or of 1.
template <typename Parameters>
double difference_of(const Parameters& a, const Parameters& b) {
  std::vector<double> numbers;
  local_mha::for_each_parameter(a, [&](const std::string&, const auto& tensor) {
    numbers.insert(numbers.end(), tensor.data(), tensor.data() + tensor.size());
  });
  double most = 0;
  std::size_t i = 0;
  local_mha::for_each_parameter(b, [&](const std::string&, const auto& tensor) {
    double largest = 1;
    for (Index j = 0; j < tensor.size(); ++j)
      largest = std::max(largest, std::abs(static_cast<double>(tensor.data()[j])));
    for (Index j = 0; j < tensor.size(); ++j) {
      const auto number = static_cast<double>(tensor.data()[j]);
      most = std::max(most, support::distance(number, numbers[i++]) / largest);
    }
  });
  return most;
}

/// Expects an error of an argument that begins so, on this rank as on all.
template <typename Task>
void says(const std::string& begin, Task&& task) {
  std::string message = "none";
  try {
    task();
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  EXPECT_EQ(message.substr(0, begin.size()), begin);
}

}  // namespace mpi_tests
