// SPDX-License-Identifier: MIT
/// \file
/// Random layers whose products are of operands in bfloat16, their calls, and how far results are
/// apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include <local_mha/local_mha.hpp>

#include "reference/dropout.hpp"
#include "reference/operands.hpp"
#include "support/library.hpp"
#include "support/random_case.hpp"

namespace support {

/// A layer, and a call of it.
struct OperandCase {
  local_mha::LocalMHAConfig config;
  reference::Parameters<double> parameters;
  reference::LayerInputs<double> in;  // but the score, and what lengths mask
  std::vector<Index> cu_seqlens;
  std::vector<Index> lengths;  // of each sequence; empty: all rows
  std::optional<local_mha::Training> training;

  Index batch() const { return in.x.shape[0]; }
  Index seqlen() const { return in.x.shape[1]; }
  /// Nothing but rows, as streams take them.
  bool is_plain() const {
    return batch() == 1 && in.masked.empty() && cu_seqlens.empty() && lengths.empty() && !training;
  }
};

inline std::string describe_case(const OperandCase& c) {
  std::ostringstream text;
  const auto& o = c.config;
  text << describe(o) << ", B " << c.batch() << ", N " << c.seqlen();
  if (o.token_window) text << ", {" << o.token_window->left << ", " << o.token_window->right << '}';
  if (o.kv_heads) text << ", kv_heads " << *o.kv_heads;
  if (o.first_keys > 0) text << ", first_keys " << o.first_keys;
  if (o.score.soft_cap) text << ", soft_cap " << *o.score.soft_cap;
  if (!o.score.alibi_slopes.empty()) text << ", alibi";
  if (!c.in.masked.empty()) text << ", mask";
  if (!c.in.bias.empty()) text << ", attn_bias";
  if (!c.lengths.empty()) text << ", lengths";
  if (c.training) text << ", dropout " << o.dropout;
  for (const Index begin : c.cu_seqlens) text << ' ' << begin;
  for (const auto& [name, weight] : c.parameters) text << ' ' << name;
  return text.str();
}

/// \param window of the look-around, or before a query
inline OperandCase operand_case(std::uint64_t seed, Index window) {
  using local_mha::QkNormKind;
  Random random(seed);
  OperandCase c;
  local_mha::LocalMHAConfig& o = c.config;
  const bool is_long = window > 64;
  // Which keys a query sees.
  o.causal = random.chance(0.5);
  Index n = random.integer(1, 3 * std::min<Index>(window, 40) + 40);
  if (window > 64) n = random.integer(window + 10, 2 * window + 60);
  if (window > 1024) n = window + random.integer(30, 120);
  if (random.chance(0.4)) {
    o.token_window = {window, o.causal ? 0 : random.integer(0, 40)};
  } else {
    o.window_size = window;
    o.exact_windowsize = random.chance(0.5);
    o.look_backward = random.pick<Index>({0, 1, 1, 2});
    if (!o.causal && random.chance(0.5)) o.look_forward = random.integer(0, 1);
  }
  if (random.chance(0.25)) o.first_keys = random.pick<Index>({1, 4, 16, 19});
  // The layer.
  o.dim = random.pick<Index>({20, 32, 33, 64, 97});
  o.dim_head = random.pick<Index>({7, 8, 12, 40, 64, 96, 128});
  o.heads = random.pick<Index>({1, 2, 2, 4});
  if (is_long) {
    o.heads = 2;
    o.dim_head = random.pick<Index>({8, 12, 40});
  }
  if (o.heads > 1 && random.chance(0.5)) o.kv_heads = o.heads / 2;
  o.prenorm = random.chance(0.4);
  if (random.chance(0.5)) o.norm.kind = local_mha::NormKind::rms;
  o.qk_norm.kind = random.pick(
      {QkNormKind::none, QkNormKind::none, QkNormKind::l2, QkNormKind::rms, QkNormKind::rms_all});
  o.qk_scale = random.pick({8.0, 4.0});
  o.gate_values_per_head = random.chance(0.4);
  o.qkv_bias = random.chance(0.4);
  o.out_bias = random.chance(0.4);
  o.sinks = random.chance(0.3);
  o.relative_bias = o.token_window && random.chance(0.5);
  o.use_rotary_pos_emb = o.dim_head % 2 == 0 && random.chance(0.8);
  if (o.use_rotary_pos_emb) {
    if (random.chance(0.4)) {
      o.use_xpos = true;
      pick_xpos_base(random, o, window, std::sqrt(static_cast<double>(o.dim)));
      // Ahead, it grows.
      if (o.token_window && o.token_window->right > 0) o.xpos_scale_base = 64;
      // The least that wide lanes take.
      if (o.xpos_scale_base) o.xpos_scale_base = std::max(1.0, *o.xpos_scale_base);
    } else if (random.chance(0.5)) {
      if (random.chance(0.5)) o.rotary.rotary_dim = o.dim_head / 4 * 2;
      o.rotary.theta = random.pick({10000.0, 500.0});
      if (random.chance(0.5)) o.rotary.pairing = local_mha::RotaryPairing::interleaved;
    }
  }
  if (random.chance(0.2)) o.score.soft_cap = random.pick({2.0, 30.0});
  if (!o.score.soft_cap && random.chance(0.2))
    for (Index h = 0; h < o.heads; ++h) o.score.alibi_slopes.push_back(random.pick({0.5, 0.0625}));
  if (random.chance(0.2)) {
    o.dropout = random.pick({0.1, 0.5});
    c.training = {.seed = static_cast<std::uint64_t>(random.integer(0, 1LL << 40))};
  }
  // The call.
  Index batch = is_long ? 1 : random.integer(1, 3);
  const int kind = static_cast<int>(random.integer(0, 5));
  if (kind == 0) {
    batch = 1;
    for (Index begin = 0; begin < n; begin += random.integer(1, n)) c.cu_seqlens.push_back(begin);
    c.cu_seqlens.push_back(n);
  } else if (kind == 1) {
    for (Index b = 0; b < batch; ++b) c.lengths.push_back(random.integer(0, n));
  } else if (kind == 2) {
    c.in.masked = pick_mask(random, batch, n);
  }
  c.parameters =
      random_parameters(random, named<double>(local_mha::LocalMHAParameters<double>::zeros(o)));
  c.in.x = random.array({batch, n, o.dim});
  if (!o.token_window && window <= 64 && random.chance(0.3)) {
    const Index ahead = o.look_forward.value_or(o.causal ? 0 : 1);
    c.in.bias = random.array(
        {random.chance(0.5) ? o.heads : 1, window, (1 + o.look_backward + ahead) * window});
  }
  return c;
}

/// What the reference is given: rows behind lengths are masked.
inline reference::LayerInputs<double> reference_inputs(const OperandCase& c) {
  reference::LayerInputs<double> in = c.in;
  const Index n = c.seqlen();
  if (!c.lengths.empty()) {
    in.masked.resize(static_cast<std::size_t>(c.batch() * n), 0);
    for (Index b = 0; b < c.batch(); ++b)
      for (Index i = c.lengths[static_cast<std::size_t>(b)]; i < n; ++i)
        in.masked[static_cast<std::size_t>(b * n + i)] = 1;
  }
  in.score = score<double>(c.config.score);
  if (c.training)
    in.multiplier = reference::dropout_factors<double>(
        c.config.dropout, c.training->seed, c.config.heads,
        std::vector<Int>(c.cu_seqlens.begin(), c.cu_seqlens.end()));
  return in;
}

/// Rows behind lengths come out as 0.
inline Array<double> without_rows_behind_lengths(const OperandCase& c, Array<double> y) {
  for (Index b = 0; !c.lengths.empty() && b < c.batch(); ++b)
    for (Index i = c.lengths[static_cast<std::size_t>(b)]; i < c.seqlen(); ++i)
      for (Index k = 0; k < c.config.dim; ++k) y(b, i, k) = 0;
  return y;
}

inline reference::LayerOptions reference_options(const OperandCase& c) {
  reference::LayerOptions o = options(c.config);
  o.attention.cu_seqlens.assign(c.cu_seqlens.begin(), c.cu_seqlens.end());
  return o;
}

/// Positions in whose middle queries and keys meet.
inline Index rotary_group(const OperandCase& c) {
  const local_mha::LocalAttention<float> attention(local_mha::attention_config(c.config));
  return attention.rotary() ? attention.rotary()->group() : 1 << 20;
}

/// The reference's layer, with these operands rounded.
inline Array<double> wanted_of(const OperandCase& c, const reference::Operands& operands = {}) {
  return without_rows_behind_lengths(
      c, reference::local_mha_of_operands(reference_options(c), c.parameters, reference_inputs(c),
                                          rotary_group(c), operands));
}
/// The reference's layer as it is.
inline Array<double> exact_of(const OperandCase& c) {
  return without_rows_behind_lengths(
      c, reference::local_mha(reference_options(c), c.parameters, reference_inputs(c)).y);
}

/// forward() of a layer.
/// \param x the rows, if they are others
template <typename Layer>
local_mha::Tensor<float, 3> forward_of(const Layer& layer, const OperandCase& c,
                                       const local_mha::Tensor<float, 3>& x,
                                       const local_mha::AnyDevice& device = {}) {
  const local_mha::Tensor<float, 3> bias = bias_tensor<float>(c.in.bias);
  local_mha::LocalMHACall<float> call{.mask = padding_mask(c.in.masked, c.batch(), c.seqlen()),
                                      .training = c.training,
                                      .cu_seqlens = c.cu_seqlens,
                                      .lengths = c.lengths,
                                      .device = device};
  if (bias.size() > 0) call.attn_bias = local_mha::TensorView<const float, 3>(bias);
  return layer.forward(x, call);
}
template <typename Layer>
local_mha::Tensor<float, 3> forward_of(const Layer& layer, const OperandCase& c,
                                       const local_mha::AnyDevice& device = {}) {
  return forward_of(layer, c, tensor<float, 3>(c.in.x), device);
}

/// How far `got` is from `wanted`: as a share of the root mean square, and of the largest.
struct Apart {
  double rms = 0;
  double most = 0;
};
template <typename Got, typename Wanted>
Apart apart(const Array<Got>& got, const Array<Wanted>& wanted) {
  constexpr double infinite = std::numeric_limits<double>::infinity();
  if (got.shape != wanted.shape) return {infinite, infinite};
  double squares = 0, of_wanted = 0, most = 0, largest_wanted = 0;
  for (std::size_t i = 0; i < got.data.size(); ++i) {
    const double error = distance(got.data[i], wanted.data[i]);
    squares += error * error;
    const auto is = static_cast<double>(wanted.data[i]);
    of_wanted += is * is;
    most = std::max(most, error);
    largest_wanted = std::max(largest_wanted, std::abs(is));
  }
  if (most == 0) return {};
  return {std::sqrt(squares / of_wanted), most / largest_wanted};
}

/// What multiplies in bfloat16.
using OperandLayer = local_mha::LocalMHA<float, Eigen::bfloat16, Eigen::bfloat16>;

inline OperandLayer layer_of(const OperandCase& c) {
  return OperandLayer(c.config, layer_parameters<float>(c.config, c.parameters));
}

/// Cases of windows of every kind: those above 1024 keys take several chunks of the kernel's.
template <typename Visit>
void for_each_case(std::uint64_t cases, Visit&& visit) {
  for (const Index window : {1, 3, 16, 64, 300, 1500}) {
    const std::uint64_t some = window > 1024 ? (cases + 9) / 10
                               : window > 64 ? (cases + 3) / 4
                                             : cases;
    for (std::uint64_t seed = 0; seed < some; ++seed) {
      const OperandCase c = operand_case(1000 * static_cast<std::uint64_t>(window) + seed, window);
      SCOPED_TRACE(std::to_string(seed) + ": " + describe_case(c));
      visit(c);
    }
  }
}

/// Pushes rows in chunks, of random lengths if `chunk` is 0.
/// \param first, out rows that have been pushed and answered
inline void push_rows(OperandLayer::Stream& stream, const local_mha::Tensor<float, 3>& x,
                      const std::vector<unsigned char>& masked, Index first, Index end, Index chunk,
                      Random& random, local_mha::Tensor<float, 3>& y, Index& out) {
  const Index dim = x.dimension(2);
  for (Index i = first; i < end;) {
    const Index n = std::min<Index>(chunk > 0 ? chunk : random.integer(1, 60), end - i);
    local_mha::Tensor<float, 3> part(1, n, dim);
    std::copy_n(x.data() + i * dim, part.size(), part.data());
    local_mha::PushCall call;
    if (!masked.empty()) {
      const std::vector<unsigned char> flags(masked.begin() + i, masked.begin() + i + n);
      call.mask = padding_mask(flags, 1, n);
    }
    const local_mha::Tensor<float, 3> got = stream.push(part, call);
    std::copy_n(got.data(), got.size(), y.data() + out * dim);
    out += got.dimension(1);
    i += n;
  }
}
inline void flush(OperandLayer::Stream& stream, local_mha::Tensor<float, 3>& y, Index& out) {
  const local_mha::Tensor<float, 3> got = stream.flush();
  std::copy_n(got.data(), got.size(), y.data() + out * y.dimension(2));
  out += got.dimension(1);
  EXPECT_EQ(out, y.dimension(1));
}

}  // namespace support
