// SPDX-License-Identifier: MIT
/// \file
/// A random call of LocalAttention, and what it should give.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include <local_mha/config.hpp>

#include "reference/dropout.hpp"
#include "reference/gradients.hpp"
#include "soak/draw.hpp"
#include "soak/sliding_draw.hpp"
#include "support/library.hpp"

namespace soak {

/// A configuration, the arguments of a call, and the gradient of its result.
struct AttentionDraw {
  local_mha::LocalAttentionConfig config;
  support::AttentionOptions call;  // but for what `places` says
  Places places;
  Array<double> q, k, v, grad_out, bias, relative_bias, sinks;
  std::vector<unsigned char> masked;
  std::string sizes;

  Index batch() const { return q.shape[0]; }
  Index heads() const { return q.shape[1]; }
  Index kv_heads() const { return k.shape[1]; }
  Index seqlen() const { return q.shape[2]; }
  Index dim_head() const { return q.shape[3]; }

  /// The call with its segments, which are this draw's.
  support::AttentionOptions packed_call() const {
    support::AttentionOptions packed = call;
    packed.cu_seqlens = places.cu_seqlens;
    return packed;
  }
};

/// The exponents of ten of queries, keys, values and the gradient of the result. Products stay in
/// a float's range, most of them, and scores are about `score`.
struct Sizes {
  double q, k, v, grad;

  /// \param most the largest exponent
  Sizes(Random& random, double score, bool keys_are_normalized, double most) {
    const bool wild = random.chance(0.5);
    // Keys that are normalized have a square.
    const double reach = keys_are_normalized ? std::min(15.0, most) : most;
    k = wild ? random.uniform(-reach, reach) : 0;
    q = keys_are_normalized ? std::log10(score) : std::log10(score) - k;
    if (std::abs(q) > most) k += q - std::copysign(most, q);
    q = std::clamp(q, -most, most);
    v = random.chance(0.5) ? random.uniform(-most, most) : 0;
    const double up = std::max({0.0, q, k}), down = std::min({0.0, q, k});
    grad = random.chance(0.5) ? random.uniform(-most, most) : 0;
    grad = std::max(grad, std::min(-most - v - down, most));
    grad = std::clamp(grad, -most, std::max(-most, most - std::max(0.0, v) - up));
  }

  std::string describe(double score) const {
    std::ostringstream text;
    text.precision(3);
    text << ", scores " << score << ", 10^(q " << q << " k " << k << " v " << v << " grad " << grad
         << ")";
    return text.str();
  }
};

template <typename Scalar>
AttentionDraw draw_attention(Random& random, Arrival arrival = Arrival::AtOnce) {
  AttentionDraw a;
  local_mha::LocalAttentionConfig& config = a.config;
  const Index n = draw_length<Scalar>(random);
  const bool sliding = random.chance(0.6);  // what the look-around alone does not have
  const bool relative = sliding && random.chance(0.4);
  config.window_size = draw_window(random, n);
  draw_rules(random, config);
  if (sliding) draw_window_rules(random, config, n, relative || arrival == Arrival::BitByBit);
  config.shared_qk = random.chance(0.12);
  Index batch = random.integer(1, 2);
  Heads heads{random.integer(1, 3), 1};
  if (sliding && !config.shared_qk) heads = draw_heads(random);
  Index d = random.integer(1, 20);
  if (random.chance(0.3)) d = random.pick<Index>({16, 32, 48, 64});
  if (random.chance(0.1)) d = random.integer(1, 70);
  const bool packed = sliding && arrival == Arrival::AtOnce && random.chance(0.3);
  if (n * keys_seen(config, config.window_size, n) * d > 20'000) {
    batch = 1;
    heads = {1, std::min<Index>(heads.group, 2)};
  }
  if (packed) {
    batch = 1;
    a.places.cu_seqlens = draw_segments(random, n);
  }
  if (sliding && arrival == Arrival::AtOnce && random.chance(0.2))
    a.places.global = support::pick_flags(random, batch * n, random.pick({0.02, 0.1, 0.3}));
  if (random.chance(0.7)) {
    config.dim = d;
    config.use_rotary_pos_emb = (sliding ? d > 1 : d % 2 == 0) && random.chance(0.75);
    if (config.use_rotary_pos_emb && d % 2 == 0 && random.chance(0.35))
      draw_xpos(random, config,
                ahead_of_shift(config, config.window_size, n, !a.places.global.empty()),
                std::sqrt(static_cast<double>(d)));
    if (config.use_rotary_pos_emb && sliding)
      draw_rotary(random, config.rotary, d, config.use_xpos);
  }
  if (config.use_xpos && !config.token_window && random.chance(0.3))
    a.call.window_size = random.integer(1, config.window_size);
  // What is not used may hold anything.
  if (!config.use_xpos && random.chance(0.1))
    config.xpos_scale_base = std::numeric_limits<double>::quiet_NaN();
  const Index window = a.call.window_size.value_or(config.window_size);
  if (random.chance(0.3)) config.scale = random.pick({0.5, 1.0, 2.0, 0.0, -0.75});
  if (!packed && random.chance(0.3))
    a.call.first_position = random.pick<Index>(
        {1, 2, 7, std::max<Index>(1, window) - 1, window, 3 * window + 1, 1000, 10'000'000});
  if (random.chance(0.2)) {
    config.dropout = random.pick({0.1, 0.1, 0.5, 0.5, 0.9});
    a.call.training = local_mha::Training{static_cast<std::uint64_t>(random.integer(0, 1 << 30))};
  }

  const double score =
      random.chance(0.05) ? 1e5 : random.pick({1e-20, 0.1, 1.0, 1.0, 1.0, 3.0, 10.0, 50.0, 1e3});
  // xPos is made of two factors of up to 2^±60.
  const Sizes sizes(random, score, config.shared_qk, config.use_xpos ? 8 : 30);
  const auto numbers = [&](Index of_heads, double exponent) {
    return draw_numbers<Scalar>(random, {batch, of_heads, n, d}, std::pow(10.0, exponent));
  };
  a.q = numbers(heads.all(), sizes.q);
  a.k = numbers(heads.kv_heads, sizes.k);
  if (n > 0 && random.chance(0.15))
    align<Scalar>(random, a.q, a.k, random.pick({-1, 1}) * std::pow(10.0, sizes.k - sizes.q));
  a.v = numbers(heads.kv_heads, sizes.v);
  a.grad_out = numbers(heads.all(), sizes.grad);
  a.sizes = sizes.describe(score);
  a.masked = draw_mask(random, batch, n);
  const Index biases = random.chance(0.5) ? heads.all() : 1;
  const Index ahead = config.look_forward.value_or(config.causal ? 0 : 1);
  const Index keys = (1 + config.look_backward + ahead) * window;
  const Index columns = relative_columns(config);
  if (!config.token_window && random.chance(0.3) && window * keys <= 4096)
    a.bias = draw_bias<Scalar>(random, {biases, window, keys});
  if (relative && columns > 0) a.relative_bias = draw_bias<Scalar>(random, {biases, columns});
  if (sliding && random.chance(0.35)) a.sinks = draw_sinks<Scalar>(random, heads.all(), score);
  if (sliding && random.chance(0.35)) draw_score(random, config.score, heads.all(), score);

  // Masked keys hold anything, and now and then one that is seen does.
  const double poisoned = random.pick({0.0, 0.3, 1.0});
  // Whether a hidden or a vanishing score hides a NaN, nobody says.
  const bool may_be_seen = n > 0 && a.bias.empty() && a.relative_bias.empty() && !config.shared_qk;
  const Index seen =
      may_be_seen && random.chance(sliding ? 0.08 : 0.03) ? random.integer(0, batch * n - 1) : -1;
  for (Index row = 0; row < batch * n; ++row) {
    const bool masked = !a.masked.empty() && a.masked[static_cast<std::size_t>(row)];
    if (!(masked && random.chance(poisoned)) && row != seen) continue;
    for (Index h = 0; h < heads.kv_heads; ++h)
      for (Index c = 0; c < d; ++c) {
        a.k(row / n, h, row % n, c) = draw_poison(random);
        a.v(row / n, h, row % n, c) = draw_poison(random);
      }
    if (row != seen || random.chance(0.6)) continue;
    for (Index h = 0; h < heads.all(); ++h)
      for (Index c = 0; c < d; ++c) a.q(row / n, h, row % n, c) = draw_poison(random);
  }
  return a;
}

template <typename Scalar>
reference::AttentionGradients<Bounded<Scalar>> expected_of(const AttentionDraw& a) {
  reference::AttentionOptions options = support::options(a.config, a.packed_call());
  options.hiding_bias = -static_cast<double>(std::numeric_limits<Scalar>::max()) / 4;
  reference::AttentionInputs<Bounded<Scalar>> in{exact<Scalar>(a.q),    exact<Scalar>(a.k),
                                                 exact<Scalar>(a.v),    a.masked,
                                                 exact<Scalar>(a.bias), {}};
  // A hiding bias is no number that takes part.
  if (a.call.training && a.config.dropout > 0)
    in.multiplier = reference::dropout_factors<Bounded<Scalar>>(
        a.config.dropout, a.call.training->seed, a.heads(), options.cu_seqlens);
  in.score = support::score<Bounded<Scalar>>(a.config.score);
  in.relative_bias = exact<Scalar>(a.relative_bias);
  in.sinks = exact<Scalar>(a.sinks);
  in.global = a.places.global;
  return reference::attention_backward(options, std::move(in), exact<Scalar>(a.grad_out));
}

inline std::string describe(const AttentionDraw& a) {
  std::ostringstream text;
  text << "B " << a.batch() << " H " << a.heads();
  if (a.kv_heads() < a.heads()) text << " on " << a.kv_heads();
  text << " N " << a.seqlen() << " D " << a.dim_head() << describe_window(a.config);
  if (a.call.window_size) text << " w of the call " << *a.call.window_size;
  if (a.call.first_position != 0) text << " first_position " << a.call.first_position;
  text << describe(a.places) << (a.config.shared_qk ? " shared_qk" : "")
       << (a.config.dim && a.config.use_rotary_pos_emb ? describe(a.config.rotary) : "")
       << (a.config.use_xpos ? " xpos" : "")
       << (a.config.scale ? " scale " + std::to_string(*a.config.scale) : "")
       << describe(a.config.score) << describe_bias(a.bias)
       << describe_bias(a.relative_bias, " relative_bias ") << describe_bias(a.sinks, " sinks ")
       << (a.masked.empty() ? "" : " mask") << (a.call.training ? " dropout" : "") << a.sizes;
  return text.str();
}

}  // namespace soak
