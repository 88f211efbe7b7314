// SPDX-License-Identifier: MIT
// Attentions of every kind, and the rows of a rank.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/local_mha.hpp>
#include <local_mha/mpi/split.hpp>
#include <support/random.hpp>

namespace mpi_tests {

using local_mha::Index;
using local_mha::LocalAttentionConfig;

using Heads = local_mha::Tensor<double, 4>;

inline Heads random_heads(Index batch, Index heads, Index rows, Index channels,
                          std::uint64_t seed) {
  Random random(seed);
  Heads x(batch, heads, rows, channels);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = random.normal();
  return x;
}

inline Heads own_rows(const Heads& x, const local_mha::mpi::Split& split) {
  Heads own(x.dimension(0), x.dimension(1), split.rows(), x.dimension(3));
  for (Index b = 0; b < own.dimension(0); ++b)
    for (Index h = 0; h < own.dimension(1); ++h)
      for (Index i = 0; i < split.rows(); ++i)
        for (Index c = 0; c < own.dimension(3); ++c)
          own(b, h, i, c) = x(b, h, split.stretch().begin + i, c);
  return own;
}

// Of heads of 16 channels; those that look least far have a kernel of their own.
inline std::vector<std::pair<std::string, LocalAttentionConfig>> attentions() {
  std::vector<std::pair<std::string, LocalAttentionConfig>> all;
  const auto add = [&](const std::string& name, auto&& change) {
    LocalAttentionConfig config{.window_size = 9};
    change(config);
    all.emplace_back(name, config);
  };
  add("both sides", [](LocalAttentionConfig& c) { c.dim = 16; });
  add("exact, causal", [](LocalAttentionConfig& c) {
    c.dim = 16;
    c.exact_windowsize = c.causal = true;
    c.look_backward = 2;
  });
  add("narrow", [](LocalAttentionConfig& c) {
    c.window_size = 2;
    c.exact_windowsize = c.causal = true;
  });
  add("narrow, both sides", [](LocalAttentionConfig& c) { c.window_size = 1; });
  add("shared keys", [](LocalAttentionConfig& c) { c.shared_qk = true; });
  add("xpos", [](LocalAttentionConfig& c) {
    c.dim = 16;
    c.use_xpos = c.causal = true;
  });
  add("long", [](LocalAttentionConfig& c) { c.window_size = 90; });
  add("tokens", [](LocalAttentionConfig& c) {
    c.window_size = 0;
    c.token_window = {.left = 33, .right = 5};
    c.dim = 16;
  });
  add("first keys", [](LocalAttentionConfig& c) {
    c.exact_windowsize = c.causal = true;
    c.first_keys = 3;
    c.dim = 16;
  });
  add("many first keys", [](LocalAttentionConfig& c) {
    c.first_keys = 21;
    c.score.soft_cap = 4;
  });
  return all;
}

}  // namespace mpi_tests
