// SPDX-License-Identifier: MIT
// LocalMHA that multiplies in bfloat16: what is too small counts as 0, and what nobody sees as
// nothing, whatever it holds.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <local_mha/local_mha.hpp>

#include "support/operand_blocks.hpp"
#include "support/operand_case.hpp"

namespace bf16_unseen_test {

using local_mha::Index;
using local_mha::LocalMHAConfig;
using local_mha::Tensor;
using reference::Array;
using support::flush;
using support::for_each_case;
using support::layer_of;
using support::OperandCase;
using support::push_rows;
using Layer = support::OperandLayer;

// ---- scores far apart

TEST(Bf16Unseen, AScoreFarAboveAllOthersTakesAllWhereverItLiesInTheWindow) {
  constexpr Index n = 400, channels = 64, loud = 100;
  const local_mha::LocalAttention<float, local_mha::ConfiguredScore, Eigen::bfloat16> attention(
      {.window_size = 200, .causal = true, .exact_windowsize = true});
  Tensor<float, 4> q(1, 1, n, channels), k(1, 1, n, channels), v(1, 1, n, channels);
  q.setConstant(1);
  k.setConstant(0.5F);
  v.setConstant(2);
  for (Index c = 0; c < channels; ++c) {
    k(0, 0, loud, c) = 64;  // 2^700 times as much as the others
    v(0, 0, loud, c) = 0.75F;
  }
  const Tensor<float, 4> out = attention.forward(q, k, v);
  for (Index i = 0; i < n; ++i) {
    const bool sees = loud <= i && i <= loud + 200;
    for (Index c = 0; c < channels; ++c) ASSERT_FLOAT_EQ(out(0, 0, i, c), sees ? 0.75F : 2.0F) << i;
  }
}

// ---- numbers below 2^-126

constexpr float faint = 1e-39F, large = 0x1p100F;

/// A layer of one head whose queries, keys and values are the biases, and what becomes of them.
struct Faint {
  LocalMHAConfig config{.dim = 2,
                        .window_size = 50,
                        .dim_head = 8,
                        .heads = 1,
                        .causal = true,
                        .use_rotary_pos_emb = false,
                        .gate_values_per_head = true,
                        .qkv_bias = true,
                        .sinks = true};
  local_mha::LocalMHAParameters<float> parameters =
      local_mha::LocalMHAParameters<float>::zeros(config);
  float x = 1;

  void set(int part, float bias, float weight = 0) {
    for (Index c = 8 * part; c < 8 * part + 8; ++c) {
      parameters.to_qkv_bias[c] = bias;
      parameters.to_qkv.row(c).setConstant(weight);
    }
  }
};

TEST(Bf16Unseen, NumbersBelowTheSmallestNormalOneAreZeroInEveryProduct) {
  struct Case {
    const char* name;
    bool of_keys;  // scores are 0, else the results are
    void (*make)(Faint&);
  };
  const Case cases[] = {{"rows", false,
                         [](Faint& f) {
                           f.x = faint;
                           f.set(2, 0, large);
                           f.parameters.to_out.setOnes();
                         }},
                        {"weights", false,
                         [](Faint& f) {
                           f.x = large;
                           f.set(2, 0, faint);
                           f.parameters.to_out.setOnes();
                         }},
                        {"values", false,
                         [](Faint& f) {
                           f.set(2, faint);
                           f.parameters.to_out.setConstant(large);
                         }},
                        {"weights behind", false,
                         [](Faint& f) {
                           f.set(2, large);
                           f.parameters.to_out.setConstant(faint);
                         }},
                        {"results", false,
                         [](Faint& f) {
                           f.set(2, 0x1p-126F);
                           f.parameters.to_out.setConstant(large);
                         }},
                        {"keys", true,
                         [](Faint& f) {
                           f.set(0, 1e38F);
                           f.set(1, faint);
                           f.set(2, 1);
                           f.parameters.to_out.setConstant(0.125F);
                         }},
                        {"queries", true,
                         [](Faint& f) {
                           f.set(0, faint);
                           f.set(1, 1e38F);
                           f.set(2, 1);
                           f.parameters.to_out.setConstant(0.125F);
                         }},
                        {"gates", true, [](Faint& f) {
                           f.x = large;
                           f.parameters.to_v_gate_weight.setConstant(faint);
                           f.set(2, 1);
                           f.parameters.to_out.setConstant(0.125F);
                         }}};
  for (const Case& c : cases) {
    Faint faint_layer;
    c.make(faint_layer);
    const Layer layer(faint_layer.config, faint_layer.parameters);
    Tensor<float, 3> x(1, 40, 2);
    x.setConstant(faint_layer.x);
    const auto expect = [&](const Tensor<float, 3>& y, Index chunk) {
      for (Index i = 0; i < 40; ++i) {
        // Beside i + 1 keys, there is the sink; and a half is the gate.
        const double share = static_cast<double>(i + 1) / static_cast<double>(i + 2);
        // The result is an operand, too.
        const double wanted = c.of_keys ? reference::operand(share / 2) : 0;
        ASSERT_NEAR(static_cast<double>(y(0, i, 0)), wanted, c.of_keys ? 2e-3 : 0)
            << c.name << ", row " << i << ", chunks of " << chunk;
      }
    };
    expect(layer.forward(x), 0);
    for (const Index chunk : {1, 3, 40}) {
      Layer::Stream stream(layer);
      Tensor<float, 3> y(1, 40, 2);
      Index out = 0;
      Random random(1);
      push_rows(stream, x, {}, 0, 40, chunk, random, y, out);
      expect(y, chunk);
    }
  }
}

// ---- what nobody sees

/// Whether a query sees a key.
bool sees(const OperandCase& c, const reference::LayerInputs<double>& in, Index b, Index i,
          Index j) {
  return reference::sees(support::reference_options(c).attention, in.masked, {}, c.seqlen(), b, i,
                         j);
}

TEST(Bf16Unseen, RowsThatNobodySeesMayHoldAnything) {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  constexpr float infinite = std::numeric_limits<float>::infinity();
  int unseen = 0, seen = 0;
  for_each_case(random_cases(30), [&](const OperandCase& c) {
    const Layer layer = layer_of(c);
    const auto in = support::reference_inputs(c);
    Tensor<float, 3> x = support::tensor<float, 3>(c.in.x);
    const Tensor<float, 3> wanted = support::forward_of(layer, c);
    Random random(static_cast<std::uint64_t>(c.seqlen()));
    // One row of a sequence, and all that is masked or behind the end.
    const Index sequence = random.integer(0, c.batch() - 1),
                row = random.integer(0, c.seqlen() - 1);
    const bool masked =
        !in.masked.empty() && in.masked[static_cast<std::size_t>(sequence * c.seqlen() + row)] != 0;
    const float poison = random.pick({nan, infinite, -infinite, 3.4e38F});
    std::vector<unsigned char> is_poisoned(static_cast<std::size_t>(c.batch() * c.seqlen()), 0);
    const auto put = [&](Index b, Index i) {
      is_poisoned[static_cast<std::size_t>(b * c.seqlen() + i)] = 1;
      for (Index k = 0; k < c.config.dim; ++k) x(b, i, k) = random.chance(0.3) ? -poison : poison;
    };
    put(sequence, row);
    for (Index b = 0; b < c.batch(); ++b)
      for (Index i = 0; i < c.seqlen(); ++i)
        if (!in.masked.empty() && in.masked[static_cast<std::size_t>(b * c.seqlen() + i)] != 0)
          put(b, i);
    const Tensor<float, 3> got = support::forward_of(layer, c, x);
    for (Index b = 0; b < c.batch(); ++b)
      for (Index i = 0; i < c.seqlen(); ++i) {
        const bool behind = !c.lengths.empty() && i >= c.lengths[static_cast<std::size_t>(b)];
        if (is_poisoned[static_cast<std::size_t>(b * c.seqlen() + i)] != 0 && !behind) continue;
        const bool sees_it = !behind && !masked && b == sequence && sees(c, in, b, i, row);
        (sees_it ? seen : unseen) += 1;
        for (Index k = 0; k < c.config.dim; ++k) {
          if (!sees_it) {
            ASSERT_EQ(std::bit_cast<std::uint32_t>(got(b, i, k)),
                      std::bit_cast<std::uint32_t>(wanted(b, i, k)))
                << b << ' ' << i << " and " << row;
          } else if (std::isnan(poison)) {
            ASSERT_TRUE(std::isnan(got(b, i, k))) << b << ' ' << i << " and " << row;
          }
        }
      }
  });
  EXPECT_GE(seen, 60);
  EXPECT_GE(unseen, 1000);
}

// Rings of another call's keys and values lie beside what a call sees.
TEST(Bf16Unseen, AWorkspaceKeepsNothingOfCallsBefore) {
  for (std::uint64_t seed = 0; seed < random_cases(40); ++seed) {
    const OperandCase c = support::operand_case(66000 + seed, seed % 2 == 0 ? 7 : 70);
    const Layer layer = layer_of(c);
    const local_mha::LocalMHACall<float> call{.cu_seqlens = c.cu_seqlens, .lengths = c.lengths};
    Tensor<float, 3> x = support::tensor<float, 3>(c.in.x);
    const Tensor<float, 3> wanted = layer.forward(x, call);
    Tensor<float, 3> nothing(c.batch(), c.seqlen() + 20, c.config.dim);
    nothing.setConstant(std::numeric_limits<float>::quiet_NaN());
    Tensor<float, 3> y = wanted, other = nothing;
    Layer::Workspace workspace;
    layer.forward_into(other, workspace, nothing);
    layer.forward_into(y, workspace, x, call);
    EXPECT_TRUE(support::same_bits(y, wanted)) << seed << ": " << support::describe_case(c);
  }
}

/// What a head gives its queries, `[blocks][padded channels][block_rows]`.
/// \param poisoned a key whose values are not finite; -1: none
std::vector<float> attended(const local_mha::LocalAttentionConfig& config, Index n, Index d,
                            Index poisoned, float poison) {
  constexpr Index count = local_mha::block_rows<float>;
  const local_mha::Window window(config);
  local_mha::AttentionHead<float> head;
  head.window = &window;
  head.seqlen = n;
  head.queries = head.unmasked = {0, n};
  const Index blocks = local_mha::ceil_div(n, count);
  local_mha::KeyOperands<float> keys(d, blocks);
  local_mha::ValueOperands<float> values(d, blocks);
  Random random(11);
  std::vector<local_mha::BlockBuffer<float>> queries;
  for (Index b = 0; b < blocks; ++b) {
    keys.put(b, support::random_block(random, d).data());
    queries.push_back(support::random_block(random, d));
    auto block = support::random_block(random, d);
    if (poisoned / count == b && poisoned >= 0)
      for (Index c = 0; c < d; c += 2)
        block[static_cast<std::size_t>(c * count + poisoned % count)] = poison;
    values.put(b, block.data());
  }
  local_mha::AttentionKernel<float, Eigen::bfloat16> kernel(d, n);
  const local_mha::KeyStore<float, local_mha::ValueOperands<float>, local_mha::KeyOperands<float>>
      store{&keys, &values};
  std::vector<float> all;
  auto out = local_mha::make_block_buffer<float>(local_mha::padded_channels<float>(d) * count);
  for (Index b = 0; b < blocks; ++b) {
    kernel.attend(head, b * count, queries[static_cast<std::size_t>(b)].data(), store, {},
                  out.data());
    all.insert(all.end(), out.begin(), out.end());
  }
  return all;
}

// Before they are rounded again, which would hide most of it.
TEST(Bf16Unseen, ValuesThatAreNotFiniteLeaveEveryBitOfOtherQueriesAlone) {
  constexpr Index count = local_mha::block_rows<float>;
  for (const bool causal : {true, false})
    for (const Index window : {5, 33, 600})
      for (const Index d : {8, 20, 64, 100}) {
        local_mha::LocalAttentionConfig config{.window_size = window, .causal = causal};
        config.exact_windowsize = true;
        const Index n = window == 600 ? 1500 : 150, stride = local_mha::padded_channels<float>(d);
        const std::vector<float> clean = attended(config, n, d, -1, 0);
        const local_mha::Window shown(config);
        for (Index j = 3; j < n; j += window == 600 ? 331 : 19) {
          const float poison = j % 2 == 0 ? std::numeric_limits<float>::infinity()
                                          : std::numeric_limits<float>::quiet_NaN();
          const std::vector<float> got = attended(config, n, d, j, poison);
          for (Index i = 0; i < n; ++i)
            for (Index c = 0; c < d; ++c) {
              const auto at =
                  static_cast<std::size_t>((i / count * stride + c) * count + i % count);
              if (shown.attends(i, j) && c % 2 == 0) {
                ASSERT_FALSE(std::isfinite(got[at])) << i << " and " << j << ", channel " << c;
              } else {
                ASSERT_EQ(std::bit_cast<std::uint32_t>(got[at]),
                          std::bit_cast<std::uint32_t>(clean[at]))
                    << i << " and " << j << " of " << n << ", channel " << c << ", window "
                    << window;
              }
            }
        }
      }
}

/// A layer in which a row's last channel goes to the values alone, where it becomes infinite.
OperandCase case_with_infinite_values(std::uint64_t seed, Index window) {
  OperandCase c = support::operand_case(seed, window);
  c.config.prenorm = false;
  c.training.reset();
  c.parameters = [&] {
    Random random(seed);
    return support::random_parameters(
        random, support::named<double>(local_mha::LocalMHAParameters<double>::zeros(c.config)));
  }();
  const Index last = c.config.dim - 1, d = c.config.dim_head;
  const Index values = (c.config.heads + resolved_kv_heads(c.config)) * d;
  Array<double>& to_qkv = c.parameters.at("to_qkv.weight");
  for (Index r = 0; r < to_qkv.shape[0]; ++r)
    to_qkv(r, last) = r < values ? 0 : r % 3 == 0 ? 0x1p60 : 0;
  if (c.config.gate_values_per_head)
    for (Index h = 0; h < c.config.heads; ++h) c.parameters.at("to_v_gate.0.weight")(h, last) = 0;
  for (Index row = 0; row < c.batch() * c.seqlen(); ++row)
    c.in.x.data[static_cast<std::size_t>(row * c.config.dim + last)] = 0;
  return c;
}

TEST(Bf16Unseen, ValuesThatAreNotFiniteReachThoseAloneThatSeeThem) {
  int unseen = 0, seen = 0;
  for (std::uint64_t seed = 0; seed < random_cases(150); ++seed) {
    const OperandCase c = case_with_infinite_values(55000 + seed, seed % 3 == 0 ? 40 : 7);
    const Layer layer = layer_of(c);
    const auto in = support::reference_inputs(c);
    const Tensor<float, 3> wanted = support::forward_of(layer, c);
    Random random(seed);
    const Index sequence = random.integer(0, c.batch() - 1),
                row = random.integer(0, c.seqlen() - 1);
    Tensor<float, 3> x = support::tensor<float, 3>(c.in.x);
    x(sequence, row, c.config.dim - 1) = 0x1p80F;
    const Tensor<float, 3> got = support::forward_of(layer, c, x);
    for (Index b = 0; b < c.batch(); ++b)
      for (Index i = 0; i < c.seqlen(); ++i) {
        if (!c.lengths.empty() && i >= c.lengths[static_cast<std::size_t>(b)]) continue;
        const bool sees_it = b == sequence && sees(c, in, b, i, row);
        (sees_it ? seen : unseen) += 1;
        for (Index k = 0; k < c.config.dim; ++k) {
          if (sees_it) {
            ASSERT_FALSE(std::isfinite(got(b, i, k))) << seed << ", row " << i << " and " << row;
          } else {
            ASSERT_EQ(std::bit_cast<std::uint32_t>(got(b, i, k)),
                      std::bit_cast<std::uint32_t>(wanted(b, i, k)))
                << seed << ", row " << i << " of " << c.seqlen() << " and " << row << ": "
                << support::describe_case(c);
          }
        }
      }
    if (c.batch() > 1 || !c.cu_seqlens.empty() || !c.lengths.empty()) continue;
    // A stream of either, too.
    const Tensor<float, 3> bias = support::bias_tensor<float>(c.in.bias);
    for (const Index chunk : {1, 5, 40}) {
      Tensor<float, 3> y[2];
      for (int poisoned = 0; poisoned < 2; ++poisoned) {
        Random of_chunks(1);
        Layer::Stream stream(layer, {}, support::optional_view(bias));
        y[poisoned] = Tensor<float, 3>(1, c.seqlen(), c.config.dim);
        Index out = 0;
        push_rows(stream, poisoned == 1 ? x : support::tensor<float, 3>(c.in.x), c.in.masked, 0,
                  c.seqlen(), chunk, of_chunks, y[poisoned], out);
        flush(stream, y[poisoned], out);
      }
      for (Index i = 0; i < c.seqlen(); ++i)
        for (Index k = 0; k < c.config.dim; ++k) {
          if (sees(c, in, 0, i, row)) {
            ASSERT_FALSE(std::isfinite(y[1](0, i, k))) << seed << ", chunks of " << chunk;
          } else {
            ASSERT_EQ(std::bit_cast<std::uint32_t>(y[1](0, i, k)),
                      std::bit_cast<std::uint32_t>(y[0](0, i, k)))
                << seed << ", chunks of " << chunk << ", row " << i << " of " << c.seqlen()
                << " and " << row << ": " << support::describe_case(c);
          }
        }
    }
  }
  EXPECT_GE(seen, 60);
  EXPECT_GE(unseen, 1000);
}

}  // namespace bf16_unseen_test
