// SPDX-License-Identifier: MIT
/// \file
/// Random combinations of what sliding windows can have, as the reference's options and inputs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "reference/attention.hpp"
#include "reference/dropout.hpp"
#include "reference/layer.hpp"
#include "support/random.hpp"

namespace support {

/// What becomes of a scaled score. `ByPlace` is a user's own: s · (1 + (i mod 3)/4 − (j mod 2)/8).
enum class ScoreKind { Plain, SoftCap, Alibi, CappedAlibi, ByPlace };

struct SlidingCase {
  using Int = reference::Int;

  reference::AttentionOptions options;
  reference::AttentionInputs<double> in;  // but score and multiplier, see inputs()
  ScoreKind score_kind = ScoreKind::Plain;
  double cap = 1;                    // of the soft-cap
  std::vector<double> alibi_slopes;  // [H]
  double dropout = 0;
  std::uint64_t dropout_seed = 0;

  Int batch() const { return in.q.shape[0]; }
  Int heads() const { return in.q.shape[1]; }
  Int kv_heads() const { return in.k.shape[1]; }
  Int seqlen() const { return in.q.shape[2]; }
  Int dim_head() const { return in.q.shape[3]; }

  template <typename Real>
  reference::Score<Real> score() const {
    switch (score_kind) {
      case ScoreKind::Plain:
        return {};
      case ScoreKind::SoftCap:
        return reference::soft_cap<Real>(cap);
      case ScoreKind::Alibi:
        return reference::alibi<Real>(alibi_slopes);
      case ScoreKind::CappedAlibi:
        return reference::composed(reference::soft_cap<Real>(cap),
                                   reference::alibi<Real>(alibi_slopes));
      case ScoreKind::ByPlace:
        break;
    }
    const auto factor = [](Int i, Int j) {
      return static_cast<Real>(1 + static_cast<long double>(i % 3) / 4 -
                               static_cast<long double>(j % 2) / 8);
    };
    return {[=](const Real& s, Int, Int i, Int j) { return s * factor(i, j); },
            [=](const Real&, Int, Int i, Int j) { return factor(i, j); }};
  }

  /// All of it, in any precision.
  template <typename Real>
  reference::AttentionInputs<Real> inputs() const {
    reference::AttentionInputs<Real> to{reference::cast<Real>(in.q),    reference::cast<Real>(in.k),
                                        reference::cast<Real>(in.v),    in.masked,
                                        reference::cast<Real>(in.bias), {}};
    if (dropout > 0)
      to.multiplier =
          reference::dropout_factors<Real>(dropout, dropout_seed, heads(), options.cu_seqlens);
    to.score = score<Real>();
    to.relative_bias = reference::cast<Real>(in.relative_bias);
    to.sinks = reference::cast<Real>(in.sinks);
    to.global = in.global;
    return to;
  }
};

/// Where segments begin: some of none, of one and of a few rows, and where the last ends.
inline std::vector<reference::Int> pick_segments(Random& random, reference::Int n) {
  std::vector<reference::Int> cu_seqlens{0};
  while (cu_seqlens.back() < n || cu_seqlens.size() < 2 || random.chance(0.2)) {
    const reference::Int length =
        random.pick<reference::Int>({0, 1, 1, 2, random.integer(1, 20), random.integer(0, n)});
    cu_seqlens.push_back(std::min(n, cu_seqlens.back() + length));
  }
  return cu_seqlens;
}

/// `[B, N]` flags of a share of the rows.
inline std::vector<unsigned char> pick_flags(Random& random, reference::Int size, double share) {
  std::vector<unsigned char> flags;
  for (reference::Int row = 0; row < size; ++row) flags.push_back(random.chance(share));
  return flags;
}

/// A side of a window: few keys, about as many as there are, or without a bound.
inline std::optional<reference::Int> pick_side(Random& random, reference::Int n, bool bounded) {
  if (!bounded && random.chance(0.12)) return std::nullopt;
  if (random.chance(0.12)) return std::max<reference::Int>(0, n + random.integer(-1, 1 + n));
  return random.pick<reference::Int>({0, 0, 1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 31, 33, 40});
}

/// \param most the longest sequence
inline SlidingCase sliding_case(std::uint64_t seed, reference::Int most = 60) {
  using reference::Int;
  Random random(seed);
  SlidingCase c;
  reference::AttentionOptions& o = c.options;

  // Sizes, on and off every grid.
  Int n = random.integer(1, most);
  if (random.chance(0.3))
    n = std::min(most, random.pick<Int>({1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65}));
  if (random.chance(0.02)) n = 0;
  Int batch = random.integer(1, 3);
  Int kv_heads = random.integer(1, 3), group = random.pick<Int>({1, 1, 1, 2, 3, 4, 8});
  Int d = random.integer(1, 9);
  if (most > 100 || random.chance(0.15)) {
    batch = 1;
    kv_heads = random.integer(1, 2);
    group = random.pick<Int>({1, 2, 4});
    d = random.pick<Int>({1, 7, 15, 16, 17, 24, 32, 33, 47, 64, 65, 70});
  }

  // Which keys a query sees.
  o.causal = random.chance(0.4);
  const bool relative = random.chance(0.3);
  if (relative || random.chance(0.7)) {
    o.token_window =
        reference::TokenWindow{pick_side(random, n, relative), pick_side(random, n, relative)};
    if (o.causal) o.token_window->right = 0;
  } else {
    o.window_size = random.pick<Int>({1, 2, 3, 5, 7, 8, 16, 17, 33, 70});
    o.look_backward = random.pick<Int>({0, 1, 1, 2, 3});
    o.look_forward = o.causal ? 0 : random.pick<Int>({0, 1, 1, 2});
    o.exact_windowsize = random.chance(0.5);
  }
  if (random.chance(0.35)) {
    batch = 1;
    o.cu_seqlens = pick_segments(random, n);
  }
  if (random.chance(0.3)) o.first_keys = random.pick<Int>({1, 2, 4, 5, 16, 19, 100});
  if (!o.token_window && o.cu_seqlens.empty() && o.first_keys == 0 && random.chance(0.3))
    o.first_position = random.pick<Int>({1, 7, 1000, 10'000'000});
  if (random.chance(0.25))
    c.in.global = pick_flags(random, batch * n, random.pick({0.02, 0.1, 0.5}));
  if (random.chance(0.4)) {
    c.in.masked = pick_flags(random, batch * n, random.pick({0.05, 0.3, 0.9}));
    if (random.chance(0.3))  // padding at the end of each sequence
      for (Int b = 0; b < batch; ++b) {
        const Int length = random.integer(0, n);
        for (Int i = 0; i < n; ++i) c.in.masked[static_cast<std::size_t>(b * n + i)] = i >= length;
      }
  }

  // Scores.
  const Int heads = kv_heads * group;
  if (random.chance(0.3)) o.scale = random.pick({0.5, 1.0, 2.0, 0.0, -0.75});
  if (random.chance(0.5)) {
    reference::RotaryOptions& rotary = o.rotary_options;
    const Int dim = random.chance(0.6) ? d / 2 * 2 : random.integer(0, d / 2) * 2;
    o.rotary = dim > 0;
    if (o.rotary && (dim < d || random.chance(0.3))) rotary.rotary_dim = dim;
    rotary.theta = random.pick({10000.0, 10000.0, 500.0, 1e6});
    rotary.interleaved = random.chance(0.4);
    if (random.chance(0.2)) {
      for (Int m = 0; m < dim / 2; ++m) rotary.inv_freq.push_back(random.uniform(0, 1));
      rotary.factor = random.pick({1.0, 1.25, 0.75});
    }
  }
  if (random.chance(0.5))
    c.score_kind = random.pick(
        {ScoreKind::SoftCap, ScoreKind::Alibi, ScoreKind::CappedAlibi, ScoreKind::ByPlace});
  c.cap = random.pick({0.5, 2.0, 30.0});
  for (Int h = 0; h < heads; ++h) c.alibi_slopes.push_back(random.pick({0.5, 0.25, 0.0625, 1.0}));
  const Int heads_of_bias = random.chance(0.5) ? heads : 1;
  if (relative)
    c.in.relative_bias =
        random.array({heads_of_bias, *o.token_window->left + *o.token_window->right + 1},
                     random.pick({1.0, 1.0, 0.01, 20.0}));
  if (!o.token_window && random.chance(0.4))
    c.in.bias = random.array(
        {heads_of_bias, o.window_size, (1 + o.look_backward + o.look_forward) * o.window_size},
        random.pick({1.0, 1.0, 0.01, 20.0}));
  if (random.chance(0.35)) c.in.sinks = random.array({heads}, random.pick({1.0, 1.0, 5.0, 50.0}));
  if (random.chance(0.2)) {
    c.dropout = random.pick({0.1, 0.5, 0.9});
    c.dropout_seed = static_cast<std::uint64_t>(random.integer(0, 1LL << 40));
  }

  c.in.q = random.array({batch, heads, n, d}, random.pick({1.0, 1.0, 1.0, 1e-6, 0.1, 4.0}));
  c.in.k = random.array({batch, kv_heads, n, d}, random.pick({1.0, 1.0, 1.0, 1e-6, 0.1, 4.0}));
  c.in.v = random.array({batch, kv_heads, n, d}, random.pick({1.0, 1.0, 1e-12, 1e-3, 1e3, 1e12}));
  return c;
}

inline std::string describe(const SlidingCase& c) {
  const reference::AttentionOptions& o = c.options;
  std::ostringstream text;
  const auto side = [](const std::optional<reference::Int>& of) {
    return of ? std::to_string(*of) : "all";
  };
  text << "B " << c.batch() << " H " << c.heads() << " on " << c.kv_heads() << " N " << c.seqlen()
       << " D " << c.dim_head();
  if (o.token_window)
    text << " {" << side(o.token_window->left) << ", " << side(o.token_window->right) << "}";
  else
    text << " w " << o.window_size << " lb " << o.look_backward << " lf " << o.look_forward
         << (o.exact_windowsize ? " exact" : "");
  text << (o.causal ? " causal" : "");
  if (o.first_position != 0) text << " first_position " << o.first_position;
  if (!o.cu_seqlens.empty()) {
    text << " cu_seqlens";
    for (const reference::Int begin : o.cu_seqlens) text << " " << begin;
  }
  if (o.first_keys > 0) text << " first_keys " << o.first_keys;
  text << (c.in.global.empty() ? "" : " global") << (c.in.masked.empty() ? "" : " mask");
  if (o.scale) text << " scale " << *o.scale;
  if (o.rotary)
    text << " rotary " << o.rotary_options.rotary_dim.value_or(c.dim_head()) << " theta "
         << o.rotary_options.theta << (o.rotary_options.interleaved ? " interleaved" : "")
         << (o.rotary_options.inv_freq.empty() ? "" : " inv_freq") << " factor "
         << o.rotary_options.factor;
  switch (c.score_kind) {
    case ScoreKind::Plain:
      break;
    case ScoreKind::SoftCap:
      text << " cap " << c.cap;
      break;
    case ScoreKind::Alibi:
      text << " alibi";
      break;
    case ScoreKind::CappedAlibi:
      text << " alibi, cap " << c.cap;
      break;
    case ScoreKind::ByPlace:
      text << " score by place";
      break;
  }
  text << (c.in.bias.empty() ? "" : " bias") << (c.in.relative_bias.empty() ? "" : " relative_bias")
       << (c.in.sinks.empty() ? "" : " sinks");
  if (c.dropout > 0) text << " dropout " << c.dropout;
  return text.str();
}

/// A layer with weights and inputs. Its attention's options and inputs are those of a SlidingCase.
struct SlidingLayerCase {
  reference::LayerOptions options;
  reference::Parameters<double> parameters;  // those that the options use
  SlidingCase attention;                     // where score, dropout, mask and global rows come from
  reference::Array<double> x;                // [B, N, dim]

  template <typename Real>
  reference::LayerInputs<Real> inputs() const {
    auto of_attention = attention.inputs<Real>();
    reference::LayerInputs<Real> to{reference::cast<Real>(x), of_attention.masked,
                                    of_attention.bias, of_attention.multiplier};
    to.score = of_attention.score;
    to.global = of_attention.global;
    return to;
  }
};

inline SlidingLayerCase sliding_layer_case(std::uint64_t seed, reference::Int most = 60) {
  using reference::Int;
  using reference::QkNorm;
  SlidingLayerCase c;
  c.attention = sliding_case(seed, most);
  const SlidingCase& a = c.attention;
  Random random(~seed);
  reference::LayerOptions& o = c.options;
  o.dim = random.pick<Int>({1, 2, 3, 5, 8, 12, 17, 24, 33});
  o.heads = a.heads();
  o.dim_head = a.dim_head();
  if (a.kv_heads() < o.heads) o.kv_heads = a.kv_heads();
  o.attention = a.options;
  o.attention.scale.reset();
  o.softmax_scale = a.options.scale;
  o.prenorm = random.chance(0.5) && o.dim > 2;
  if (random.chance(0.5)) o.prenorm_kind = reference::Prenorm::Rms;
  o.norm_eps = random.pick({1e-5, 1e-6, 1e-2});
  o.qk_norm = random.pick({QkNorm::None, QkNorm::None, QkNorm::L2, QkNorm::Rms, QkNorm::RmsAll});
  o.qk_scale = random.pick({8.0, 4.0, 1.5});
  o.qk_norm_eps = random.pick({1e-6, 1e-5, 1e-2});
  o.gate_values_per_head = random.chance(0.3);
  o.qkv_bias = random.chance(0.5);
  o.out_bias = random.chance(0.5);
  o.sinks = !a.in.sinks.empty();
  o.relative_bias = !a.in.relative_bias.empty();
  o.global_projections = !a.in.global.empty() && o.qk_norm == QkNorm::None && random.chance(0.8);

  const auto add = [&](const char* name, std::vector<Int> shape, double center, double scale) {
    c.parameters[name] = random.array(std::move(shape), scale);
    for (double& number : c.parameters[name].data)
      number = static_cast<double>(static_cast<float>(center + number));
  };
  const auto projection = [&](const char* name, Int to, Int from) {
    add(name, {to, from}, 0, 1 / std::sqrt(static_cast<double>(from)));
  };
  const Int d = o.dim_head, rows = (o.heads + 2 * o.key_heads()) * d;
  projection("to_qkv.weight", rows, o.dim);
  if (o.qkv_bias) add("to_qkv.bias", {rows}, 0, 0.3);
  if (o.global_projections) {
    projection("to_qkv_global.weight", rows, o.dim);
    if (o.qkv_bias) add("to_qkv_global.bias", {rows}, 0, 0.3);
  }
  projection("to_out.weight", o.dim, o.heads * d);
  if (o.out_bias) add("to_out.bias", {o.dim}, 0, 0.3);
  if (o.prenorm) add("norm.weight", {o.dim}, 1, 0.3);
  if (o.prenorm && o.prenorm_kind == reference::Prenorm::Layer) add("norm.bias", {o.dim}, 0, 0.3);
  if (o.qk_norm == QkNorm::L2) {
    add("q_scale", {d}, 1, 0.3);
    add("k_scale", {d}, 1, 0.3);
  } else if (o.qk_norm != QkNorm::None) {
    const bool all = o.qk_norm == QkNorm::RmsAll;
    add("q_norm.weight", {all ? o.heads * d : d}, 1, 0.3);
    add("k_norm.weight", {all ? o.key_heads() * d : d}, 1, 0.3);
  }
  if (o.gate_values_per_head) {
    projection("to_v_gate.0.weight", o.heads, o.dim);
    add("to_v_gate.0.bias", {o.heads}, 0, 0.3);
  }
  if (o.sinks) c.parameters["sinks"] = a.in.sinks;
  if (o.relative_bias) c.parameters["relative_bias"] = a.in.relative_bias;
  const bool kept = !o.prenorm;  // the size of x is that of what is computed with
  c.x = random.array({a.batch(), a.seqlen(), o.dim},
                     random.pick({1.0, 1.0, 1.0, kept ? 0.05 : 1e-2, kept ? 4.0 : 1e4}));
  return c;
}

inline std::string describe(const SlidingLayerCase& c) {
  const reference::LayerOptions& o = c.options;
  std::ostringstream text;
  text << describe(c.attention) << " dim " << o.dim;
  for (const auto& [name, weight] : c.parameters) text << " " << name;
  return text.str();
}

}  // namespace support
