// SPDX-License-Identifier: MIT
/// \file
/// Random configurations and inputs, and the tolerances of comparisons with the reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "reference/attention.hpp"
#include "support/library.hpp"
#include "support/random.hpp"

namespace support {

/// How far the library's result may lie from the reference in higher precision: twice what the
/// reference in the same precision makes of it, and some roundings of numbers as large as those
/// that are added up. `magnitude` is the largest sum of the absolute terms of a score, its bias
/// included: an error of a score is relative to it, and multiplies the result.
template <typename Scalar>
double tolerance(double naive_error, double largest_value, double magnitude) {
  constexpr double epsilon = std::numeric_limits<Scalar>::epsilon();
  return 2 * naive_error + 4 * epsilon * (1 + magnitude) * largest_value;
}

/// How long the sequences of random cases are.
enum class Length { Short, Long };

/// Lengths around the ends of windows and tiles, and windows beyond the sequence; few are 0.
inline void pick_sizes(Random& random, Length length, Index& n, Index& window) {
  if (length == Length::Long) {  // several stretches of blocks, which flow through a ring
    n = random.integer(130, 420);
    window = random.pick<Index>({1, 3, 5, 16, 17, 40, 64, 100, 144, 200, 500});
    return;
  }
  window = random.pick<Index>({1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 20, 31, 32, 33});
  switch (random.integer(0, 5)) {
    case 0:
      n = random.integer(1, 5);
      break;
    case 1:
      n = std::max<Index>(1, random.integer(1, 3) * window + random.integer(-1, 1));
      break;
    case 2:
      n = random.pick<Index>({15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65});
      break;
    case 3:
      n = random.integer(1, 40);
      window = random.integer(n, 3 * n);
      break;
    default:
      n = random.integer(1, 60);
  }
  if (random.chance(0.015)) n = 0;
}

/// `[B, N]` flags: none, random, by length, or all of a sequence; few mask all sequences.
inline std::vector<unsigned char> pick_mask(Random& random, Index batch, Index n) {
  std::vector<unsigned char> masked;
  if (random.chance(0.4)) return masked;
  masked.assign(static_cast<std::size_t>(batch * n), 0);
  const double share = random.pick({0.05, 0.3, 0.7, 0.95});
  const int kind = static_cast<int>(random.integer(0, 3));
  for (Index b = 0; b < batch; ++b) {
    const Index length = random.integer(0, n);
    const bool all = kind == 3 && random.chance(0.5);
    for (Index i = 0; i < n; ++i)
      masked[static_cast<std::size_t>(b * n + i)] = all || (kind == 0 && i >= length) ||
                                                    (kind == 1 && i < length) ||
                                                    (kind >= 2 && random.chance(share));
  }
  if (random.chance(0.03)) {
    std::fill(masked.begin(), masked.end(), 1);
  } else if (!masked.empty()) {
    masked[static_cast<std::size_t>(random.integer(0, batch * n - 1))] = 0;
  }
  return masked;
}

/// What LocalAttention, LocalMHA and LocalTransformer configurations have in common.
template <typename Config>
void pick_window_rules(Random& random, Config& config) {
  config.causal = random.chance(0.5);
  config.exact_windowsize = random.chance(0.5);
  config.look_backward = random.pick<Index>({0, 1, 1, 1, 2, 3, 4});
  if (config.causal) {
    if (random.chance(0.3)) config.look_forward = 0;
  } else if (random.chance(0.7)) {
    config.look_forward = random.pick<Index>({0, 1, 2, 3, 4});
  }
}

/// A base, or none for the default. Where a key can lie further ahead than rotary's shift makes up
/// for, xPos grows with distance; the base then keeps it from overflowing a float's exponent.
template <typename Config>
void pick_xpos_base(Random& random, Config& config, Index window, double default_base) {
  const bool grows = !config.causal && !config.exact_windowsize;
  constexpr double least_of_all = LOCAL_MHA_LANE_BYTES / 128.0;
  const double least =
      grows ? std::max(least_of_all, static_cast<double>(window) / 3) : least_of_all;
  if (default_base < least || random.chance(0.6))
    config.xpos_scale_base = std::max(least, random.pick({0.5, 1.0, 3.0, 7.5, 16.0, 64.0}));
}

inline std::string describe(const local_mha::LocalAttentionConfig& c) {
  std::ostringstream text;
  text << std::boolalpha << "window_size " << c.window_size << ", causal " << c.causal
       << ", look_backward " << c.look_backward << ", look_forward "
       << (c.look_forward ? std::to_string(*c.look_forward) : "default") << ", exact_windowsize "
       << c.exact_windowsize << ", shared_qk " << c.shared_qk << ", dim "
       << (c.dim ? std::to_string(*c.dim) : "none") << ", rotary " << c.use_rotary_pos_emb
       << ", xpos " << c.use_xpos << ", base "
       << (c.xpos_scale_base ? std::to_string(*c.xpos_scale_base) : "default") << ", scale "
       << (c.scale ? std::to_string(*c.scale) : "default");
  return text.str();
}

inline std::string describe(const local_mha::LocalMHAConfig& c) {
  std::ostringstream text;
  text << std::boolalpha << "dim " << c.dim << ", window_size " << c.window_size << ", dim_head "
       << c.dim_head << ", heads " << c.heads << ", causal " << c.causal << ", prenorm "
       << c.prenorm << ", qk_rmsnorm " << c.qk_rmsnorm << ", qk_scale " << c.qk_scale << ", xpos "
       << c.use_xpos << ", base "
       << (c.xpos_scale_base ? std::to_string(*c.xpos_scale_base) : "default")
       << ", exact_windowsize " << c.exact_windowsize << ", look_backward " << c.look_backward
       << ", look_forward " << (c.look_forward ? std::to_string(*c.look_forward) : "default")
       << ", rotary " << c.use_rotary_pos_emb << ", gates " << c.gate_values_per_head;
  return text.str();
}

/// A configuration of LocalAttention with inputs for it.
struct AttentionCase {
  local_mha::LocalAttentionConfig config;
  AttentionOptions call;
  reference::AttentionInputs<double> in;  // of magnitudes of their own

  Int batch() const { return in.q.shape[0]; }
  Int seqlen() const { return in.q.shape[2]; }
};

inline AttentionCase attention_case(std::uint64_t seed, Length length = Length::Short) {
  Random random(seed);
  AttentionCase c;
  Index n = 0;
  pick_sizes(random, length, n, c.config.window_size);
  pick_window_rules(random, c.config);

  Index batch = random.integer(1, 3);
  Index heads = random.integer(1, 3);
  Index d = random.integer(1, 9);
  if (length == Length::Long) batch = 1;
  if (random.chance(length == Length::Long ? 0.4 : 0.15)) {
    batch = heads = 1;
    d = random.pick<Index>({12, 15, 16, 17, 24, 32, 33, 64, 80, 128});
    if (length == Length::Long) n = std::min<Index>(n, 260);  // the reference takes its time
  }
  if (random.chance(0.7)) {
    c.config.dim = d;
    c.config.use_rotary_pos_emb = d % 2 == 0 && random.chance(0.85);
    if (c.config.use_rotary_pos_emb && random.chance(0.4)) {
      c.config.use_xpos = true;
      pick_xpos_base(random, c.config, c.config.window_size, std::sqrt(static_cast<double>(d)));
    }
  }
  if (c.config.use_xpos) {
    // Draws of its own: a seed's other draws do not depend on it. A larger window could outgrow
    // the base, see pick_xpos_base().
    Random of_the_call(~seed);
    if (of_the_call.chance(0.3)) c.call.window_size = of_the_call.integer(1, c.config.window_size);
  }
  const Index window = c.call.window_size.value_or(c.config.window_size);
  c.config.shared_qk = random.chance(0.15);
  if (random.chance(0.3)) c.config.scale = random.pick({0.5, 1.0, 2.0, 0.0, -0.75});
  if (random.chance(0.3))
    c.call.first_position =
        random.pick<Index>({1, 2, 7, window - 1, window, 3 * window + 1, 1000, 10'000'000});

  // From scores that are all alike to those that leave one key nearly all of the probability.
  c.in.q = random.array({batch, heads, n, d}, random.pick({1.0, 1.0, 1.0, 1e-6, 0.1, 4.0}));
  c.in.k = random.array({batch, heads, n, d}, random.pick({1.0, 1.0, 1.0, 1e-6, 0.1, 4.0}));
  if (c.config.shared_qk) c.in.k = random.array({batch, heads, n, d});  // normalized anyhow
  c.in.v = random.array({batch, heads, n, d}, random.pick({1.0, 1.0, 1e-12, 1e-3, 1e3, 1e12}));
  c.in.masked = pick_mask(random, batch, n);
  if (random.chance(0.3)) {
    const Index ahead = c.config.look_forward.value_or(c.config.causal ? 0 : 1);
    c.in.bias = random.array(
        {random.chance(0.5) ? heads : 1, window, (1 + c.config.look_backward + ahead) * window},
        random.pick({1.0, 1.0, 0.01, 20.0}));
  }
  return c;
}

/// Small windows without anything added, in whole packets of channels, which have a kernel of their
/// own; sequences may end early.
inline AttentionCase narrow_attention_case(std::uint64_t seed) {
  AttentionCase c = attention_case(seed);
  Random random(seed);
  c.config.dim.reset();
  c.call.window_size.reset();
  c.config.use_rotary_pos_emb = c.config.use_xpos = c.config.shared_qk = false;
  c.config.window_size = random.integer(1, 16);
  c.config.look_backward = random.integer(0, 2);
  if (!c.config.causal) c.config.look_forward = random.integer(0, 2);
  const Index n = random.chance(0.01) ? 0 : random.integer(1, 70);
  const Index batch = random.integer(1, 2);
  const Index d = random.pick<Index>({16, 32, 48, 64, 80, 128});
  c.in.q = random.array({batch, 2, n, d}, random.pick({1.0, 1.0, 0.1, 4.0}));
  c.in.k = random.array({batch, 2, n, d}, random.pick({1.0, 1.0, 0.1, 4.0}));
  c.in.v = random.array({batch, 2, n, d}, random.pick({1.0, 1e-12, 1e12}));
  c.in.bias = {};
  c.in.masked.clear();
  if (random.chance(0.3)) {
    for (Index b = 0; b < batch; ++b) {
      const Index begin = random.chance(0.5) ? 0 : random.integer(0, n);
      const Index end = random.integer(begin, n);
      for (Index j = 0; j < n; ++j) c.in.masked.push_back(j < begin || j >= end);
    }
  }
  return c;
}

template <typename Real>
reference::AttentionInputs<Real> cast(const reference::AttentionInputs<double>& in) {
  return {reference::cast<Real>(in.q),    reference::cast<Real>(in.k),
          reference::cast<Real>(in.v),    in.masked,
          reference::cast<Real>(in.bias), {}};
}

template <typename Real>
reference::LayerInputs<Real> cast(const reference::LayerInputs<double>& in) {
  return {reference::cast<Real>(in.x), in.masked, reference::cast<Real>(in.bias), {}};
}

/// A configuration of LocalMHA with weights and inputs for it.
struct LayerCase {
  local_mha::LocalMHAConfig config;
  reference::Parameters<double> parameters;
  reference::LayerInputs<double> in;

  /// The size of what the projections take in; the results of random weights are about as large.
  double size() const { return config.prenorm ? 1 : largest(in.x); }
};

/// Weights of the size that training gives, none of them at a special value.
inline reference::Parameters<double> random_parameters(Random& random,
                                                       reference::Parameters<double> shapes) {
  for (auto& [name, array] : shapes) {
    const bool around_one =
        name.find("norm.weight") != std::string::npos || name.find("_scale") != std::string::npos;
    const double scale = around_one || array.shape.size() < 2
                             ? 0.3
                             : 1 / std::sqrt(static_cast<double>(array.shape.back()));
    array = random.array(array.shape, scale);
    if (around_one)
      for (double& value : array.data) value = static_cast<double>(static_cast<float>(1 + value));
  }
  return shapes;
}

inline LayerCase layer_case(std::uint64_t seed, Length length = Length::Short) {
  Random random(seed);
  LayerCase c;
  Index n = 0;
  pick_sizes(random, length, n, c.config.window_size);
  pick_window_rules(random, c.config);
  c.config.dim = random.pick<Index>({1, 2, 3, 5, 8, 12, 17, 24});
  c.config.heads = random.integer(1, 5);
  c.config.dim_head = random.pick<Index>({1, 2, 3, 4, 5, 8, 10, 16});
  if (length == Length::Long) {
    c.config.heads = random.integer(1, 3);
    if (random.chance(0.3)) {
      c.config.heads = 1;
      c.config.dim_head = random.pick<Index>({17, 24, 32, 64, 80});
      n = std::min<Index>(n, 260);
    }
  } else if (random.chance(0.1)) {
    c.config.dim = random.pick<Index>({64, 72, 100});
    c.config.dim_head = random.pick<Index>({16, 32, 64});
    c.config.heads = 2;
  }
  c.config.prenorm = random.chance(0.4) && c.config.dim > 2;
  c.config.qk_rmsnorm = random.chance(0.4);
  if (c.config.qk_rmsnorm) c.config.qk_scale = random.pick({8.0, 4.0, 1.5});
  c.config.gate_values_per_head = random.chance(0.4);
  c.config.use_rotary_pos_emb = c.config.dim_head % 2 == 0 && random.chance(0.85);
  if (c.config.use_rotary_pos_emb && random.chance(0.4)) {
    c.config.use_xpos = true;
    pick_xpos_base(random, c.config, c.config.window_size,
                   std::sqrt(static_cast<double>(c.config.dim)));
  }
  const Index batch = length == Length::Long ? 1 : random.integer(1, 3);
  c.parameters = random_parameters(
      random, named<double>(local_mha::LocalMHAParameters<double>::zeros(c.config)));
  const bool kept = !c.config.prenorm;  // the size of x is that of what is computed with
  c.in.x = random.array({batch, n, c.config.dim},
                        random.pick({1.0, 1.0, 1.0, kept ? 0.05 : 1e-4, kept ? 4.0 : 1e4}));
  c.in.masked = pick_mask(random, batch, n);
  if (random.chance(0.3)) {
    const Index ahead = c.config.look_forward.value_or(c.config.causal ? 0 : 1);
    c.in.bias = random.array({random.chance(0.5) ? c.config.heads : 1, c.config.window_size,
                              (1 + c.config.look_backward + ahead) * c.config.window_size},
                             random.pick({1.0, 1.0, 0.01, 20.0}));
  }
  return c;
}

template <typename Scalar>
local_mha::LocalMHAParameters<Scalar> layer_parameters(
    const local_mha::LocalMHAConfig& config, const reference::Parameters<double>& values) {
  auto parameters = local_mha::LocalMHAParameters<Scalar>::zeros(config);
  assign(parameters, values);
  return parameters;
}

template <typename Scalar>
local_mha::LocalTransformerParameters<Scalar> transformer_parameters(
    const local_mha::LocalTransformerConfig& config, const reference::Parameters<double>& values) {
  auto parameters = local_mha::LocalTransformerParameters<Scalar>::zeros(config);
  assign(parameters, values);
  return parameters;
}

}  // namespace support
