// SPDX-License-Identifier: MIT
// LocalMHA whose products are of operands in bfloat16, against a reference that rounds the same
// numbers by their definition. Where the processor has a matrix unit, all of it runs through that.
#define EIGEN_USE_THREADS

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include <local_mha/local_mha.hpp>

#include "support/operand_case.hpp"

namespace bf16_arithmetic_test {

using local_mha::Index;
using local_mha::LocalMHAConfig;
using local_mha::Tensor;
using reference::Array;
using reference::Operands;
using support::apart;
using support::Apart;
using support::flush;
using support::for_each_case;
using support::layer_of;
using support::OperandCase;
using support::push_rows;
using Layer = support::OperandLayer;

struct Threads {
  explicit Threads(int count) : pool(count), device(&pool, count) {}
  Eigen::ThreadPool pool;
  Eigen::ThreadPoolDevice device;
};

/// Of many cases, by the numbers that are not 0.
class Pooled {
 public:
  void add(const Apart& some, const Array<double>& wanted) {
    const double size = static_cast<double>(
        std::count_if(wanted.data.begin(), wanted.data.end(), [](double y) { return y != 0; }));
    squares_ += some.rms * some.rms * size;
    numbers_ += size;
  }
  double rms() const { return std::sqrt(squares_ / numbers_); }

 private:
  double squares_ = 0, numbers_ = 0;
};

// What float's own rounding changes: here and there, an operand becomes the next one. In a single
// case, and in one of few numbers, a few such show more.
constexpr double rms_of_flips = 2e-4, rms_of_case = 8e-4, rms_of_few = 2e-3, most_of_flips = 6e-3;
double rms_of(const Array<double>& wanted) {
  const auto numbers =
      std::count_if(wanted.data.begin(), wanted.data.end(), [](double y) { return y != 0; });
  return numbers > 2000 ? rms_of_case : rms_of_few;
}

std::vector<std::string> features_of(const OperandCase& c) {
  using local_mha::QkNormKind;
  const LocalMHAConfig& o = c.config;
  std::vector<std::string> features;
  const auto add = [&](bool is, const char* name) {
    if (is) features.emplace_back(name);
  };
  add(o.causal, "causal");
  add(!o.causal, "bidirectional");
  add(o.token_window.has_value(), "token window");
  add(!o.token_window && o.exact_windowsize, "exact window");
  add(!o.token_window && !o.exact_windowsize, "buckets");
  add(o.kv_heads.has_value(), "kv_heads");
  add(o.gate_values_per_head, "gates");
  add(o.prenorm && o.norm.kind == local_mha::NormKind::layer, "layer norm");
  add(o.prenorm && o.norm.kind == local_mha::NormKind::rms, "rms norm");
  add(o.qk_norm.kind == QkNormKind::l2, "l2");
  add(o.qk_norm.kind == QkNormKind::rms, "rms");
  add(o.qk_norm.kind == QkNormKind::rms_all, "rms_all");
  add(o.use_xpos, "xpos");
  add(o.rotary.rotary_dim.has_value(), "rotary_dim");
  add(!o.use_rotary_pos_emb, "no rotary");
  add(o.qkv_bias, "qkv_bias");
  add(o.out_bias, "out_bias");
  add(o.sinks, "sinks");
  add(o.relative_bias, "relative_bias");
  add(!c.in.bias.empty(), "attn_bias");
  add(o.score.soft_cap.has_value(), "soft_cap");
  add(!o.score.alibi_slopes.empty(), "alibi");
  add(!c.in.masked.empty(), "mask");
  add(!c.lengths.empty(), "lengths");
  add(!c.cu_seqlens.empty(), "cu_seqlens");
  add(o.first_keys > 0, "first_keys");
  add(c.training.has_value(), "dropout");
  add(c.batch() > 1, "batch");
  return features;
}

TEST(Bf16Arithmetic, IsThatOfRoundedOperands) {
  Pooled of_rounded, of_exact;
  std::map<std::string, int> compared;
  for_each_case(random_cases(40), [&](const OperandCase& c) {
    const auto got = support::array(support::forward_of(layer_of(c), c));
    const Array<double> wanted = support::wanted_of(c), exact = support::exact_of(c);
    const Apart rounded = apart(got, wanted), unrounded = apart(got, exact);
    EXPECT_LT(rounded.rms, rms_of(wanted));
    EXPECT_LT(rounded.most, most_of_flips);
    of_rounded.add(rounded, wanted);
    of_exact.add(unrounded, exact);
    for (const std::string& feature : features_of(c)) ++compared[feature];
  });
  // Results that are not rounded so are far beyond what is allowed.
  EXPECT_LT(of_rounded.rms(), rms_of_flips);
  EXPECT_GT(of_exact.rms(), 10 * rms_of_flips);
  if (random_cases(40) < 40) return;
  EXPECT_EQ(compared.size(), 28U);
  for (const auto& [feature, times] : compared) EXPECT_GE(times, 5) << feature;
}

TEST(Bf16Arithmetic, RoundsEveryKindOfOperand) {
  struct Kind {
    const char* name;
    Operands operands;
    Pooled error;
  };
  const auto without = [](auto member, bool value) {
    Operands operands;
    operands.*member = value;
    return operands;
  };
  std::vector<Kind> kinds{{"all", {}, {}},
                          {"weights", without(&Operands::weights, false), {}},
                          {"rows", without(&Operands::rows, false), {}},
                          {"keys", without(&Operands::keys, false), {}},
                          {"values", without(&Operands::values, false), {}},
                          {"queries", without(&Operands::queries, false), {}},
                          {"probabilities", without(&Operands::probabilities, false), {}},
                          {"heads", without(&Operands::heads, false), {}},
                          {"sum", without(&Operands::sum_of_rounded, false), {}},
                          {"maximum", without(&Operands::whole_maximum, false), {}}};
  for (std::uint64_t seed = 0; seed < random_cases(30); ++seed) {
    const OperandCase c = support::operand_case(77000 + seed, 30);
    const auto got = support::array(support::forward_of(layer_of(c), c));
    for (Kind& kind : kinds) {
      const Array<double> wanted = support::wanted_of(c, kind.operands);
      kind.error.add(apart(got, wanted), wanted);
    }
  }
  for (const Kind& kind : kinds) {
    if (&kind == &kinds.front()) continue;
    EXPECT_GT(kind.error.rms(), 20 * kinds.front().error.rms()) << kind.name;
  }
}

TEST(Bf16Arithmetic, IsUpToThreeTimesAsFarFromTheExactResultAsRoundedInputs) {
  for_each_case(random_cases(20), [](const OperandCase& c) {
    const Array<double> exact = support::exact_of(c);
    OperandCase rounded = c;
    reference::round_if(true, rounded.in.x);
    for (auto& [name, weight] : rounded.parameters)
      reference::round_if(weight.shape.size() == 2 && name != "relative_bias", weight);
    const Apart inputs = apart(support::exact_of(rounded), exact);
    const Apart got = apart(support::array(support::forward_of(layer_of(c), c)), exact);
    EXPECT_LE(got.rms, 3 * inputs.rms);
    EXPECT_LE(got.most, 3 * inputs.most);
  });
}

TEST(Bf16Arithmetic, HoldsTheWeightsThatItMultiplies) {
  OperandCase c = support::operand_case(3, 16);
  c.parameters.at("to_qkv.weight").data[1] = 1e-39;
  const Layer layer = layer_of(c);
  const auto held = support::named<double>(layer.parameters());
  for (const auto& [name, given] : c.parameters) {
    const bool multiplies = given.shape.size() == 2 && name != "relative_bias";
    for (std::size_t i = 0; i < given.data.size(); ++i) {
      const double x = static_cast<double>(static_cast<float>(given.data[i]));
      ASSERT_EQ(held.at(name).data[i], multiplies ? reference::operand(x) : x) << name;
    }
  }
  // Rounding again changes nothing, and a set in 16 bits is the same.
  Layer again(c.config, layer.parameters());
  EXPECT_TRUE(support::same_bits(support::forward_of(again, c), support::forward_of(layer, c)));
  again.set_parameters(layer.parameters());
  EXPECT_TRUE(support::same_bits(support::forward_of(again, c), support::forward_of(layer, c)));
  const Tensor<float, 3> none(2, 0, c.config.dim);
  EXPECT_EQ(layer.forward(none).size(), 0);
}

TEST(Bf16Arithmetic, GivesTheSameBitsOnAnyNumberOfThreads) {
  const Threads two(2), five(5);
  for_each_case(random_cases(30), [&](const OperandCase& c) {
    const Layer layer = layer_of(c);
    const Tensor<float, 3> wanted = support::forward_of(layer, c);
    EXPECT_TRUE(support::same_bits(support::forward_of(layer, c, two.device), wanted));
    EXPECT_TRUE(support::same_bits(support::forward_of(layer, c, five.device), wanted));
  });
}

TEST(Bf16Arithmetic, GivesASequenceTheSameBitsWhateverElseIsInTheBatch) {
  for (std::uint64_t seed = 0; seed < random_cases(30); ++seed) {
    OperandCase c = support::operand_case(88000 + seed, seed % 2 == 0 ? 5 : 40);
    if (c.batch() < 2) continue;
    c.training.reset();
    const Layer layer = layer_of(c);
    const Tensor<float, 3> wanted = support::forward_of(layer, c);
    for (Index b = 0; b < c.batch(); ++b) {
      OperandCase one = c;
      const Index size = c.seqlen() * c.config.dim;
      one.in.x = Array<double>({1, c.seqlen(), c.config.dim});
      std::copy_n(c.in.x.data.begin() + b * size, size, one.in.x.data.begin());
      if (!c.lengths.empty()) one.lengths = {c.lengths[static_cast<std::size_t>(b)]};
      if (!c.in.masked.empty())
        one.in.masked.assign(c.in.masked.begin() + b * c.seqlen(),
                             c.in.masked.begin() + (b + 1) * c.seqlen());
      const Tensor<float, 3> got = support::forward_of(layer, one);
      const Tensor<float, 3> part = wanted.slice(
          Eigen::array<Index, 3>{b, 0, 0}, Eigen::array<Index, 3>{1, c.seqlen(), c.config.dim});
      EXPECT_TRUE(support::same_bits(got, part)) << seed << ": " << support::describe_case(c);
    }
  }
}

// ---- streams

TEST(Bf16Arithmetic, OfAStreamIsThatOfTheWhole) {
  std::map<std::string, int> streamed;
  Pooled pooled;
  for_each_case(random_cases(40), [&](const OperandCase& of_batch) {
    OperandCase c = of_batch;
    if (c.batch() > 1 || !c.cu_seqlens.empty() || !c.lengths.empty()) return;
    c.training.reset();
    for (const std::string& feature : features_of(c)) ++streamed[feature];
    const Layer layer = layer_of(c);
    const Tensor<float, 3> x = support::tensor<float, 3>(c.in.x);
    const Array<double> wanted =
        reference::cast<double>(support::array(support::forward_of(layer, c)));
    const Tensor<float, 3> bias = support::bias_tensor<float>(c.in.bias);
    Random random(static_cast<std::uint64_t>(c.seqlen()));
    for (const Index chunk : {1, 3, 7, 100, 0}) {
      Layer::Stream stream(layer, {.max_rollback = 9}, support::optional_view(bias));
      Tensor<float, 3> y(1, c.seqlen(), c.config.dim);
      Index out = 0;
      const Index half = c.seqlen() / 2;
      push_rows(stream, x, c.in.masked, 0, half, chunk, random, y, out);
      // What is taken back, and what another stream goes on with, changes nothing.
      const Index back = std::min<Index>(stream.most_rollback(), random.integer(0, 9));
      if (c.config.causal && back > 0) {
        stream.rollback(back);
        out -= back;
        push_rows(stream, x, c.in.masked, half - back, half, chunk, random, y, out);
      }
      std::stringstream state;
      stream.save(state);
      Layer::Stream other(layer, {.max_rollback = 9}, support::optional_view(bias));
      other.load(state);
      push_rows(other, x, c.in.masked, half, c.seqlen(), chunk, random, y, out);
      flush(other, y, out);
      const Apart error = apart(support::array(y), wanted);
      EXPECT_LT(error.rms, rms_of(wanted)) << chunk;
      EXPECT_LT(error.most, most_of_flips) << chunk;
      pooled.add(error, wanted);
    }
  });
  EXPECT_LT(pooled.rms(), rms_of_flips);
  if (random_cases(40) < 40) return;
  for (const char* feature : {"gates", "first_keys", "bidirectional", "xpos", "rms_all", "mask"})
    EXPECT_GE(streamed[feature], 2) << feature;
}

TEST(Bf16Arithmetic, OfAStreamGivesTheSameBitsOnThreads) {
  const Threads threads(3);
  for (std::uint64_t seed = 0; seed < random_cases(20); ++seed) {
    OperandCase c = support::operand_case(99000 + seed, 20);
    const Layer layer = layer_of(c);
    const Index batch = c.batch(), n = std::min<Index>(c.seqlen(), 40);
    Layer::Stream alone(layer, {.batch = batch});
    Layer::Stream shared(layer, {.batch = batch, .max_threads = 3});
    for (const Index rows : {n / 3, Index{1}, n / 2}) {
      Tensor<float, 3> x(batch, rows, c.config.dim);
      x.setRandom();
      EXPECT_TRUE(support::same_bits(shared.push(x, {.device = threads.device}), alone.push(x)));
    }
    EXPECT_TRUE(support::same_bits(shared.flush(threads.device), alone.flush()));
  }
}

using Attention = local_mha::LocalAttention<float, local_mha::ConfiguredScore, Eigen::bfloat16>;

TEST(Bf16Arithmetic, OfASingleKeyGivesItsValue) {
  const Attention attention({.window_size = 20, .causal = true});
  Tensor<float, 4> q(1, 2, 40, 8), k(1, 2, 40, 8), v(1, 2, 40, 8);
  for (Tensor<float, 4>* t : {&q, &k, &v}) t->setRandom();
  const Tensor<float, 4> out = attention.forward(q, k, v);
  Attention::Stream stream(attention, 2, 8);
  const auto first = [](const Tensor<float, 4>& t) {
    Tensor<float, 4> row(1, 2, 1, 8);
    for (Index h = 0; h < 2; ++h)
      for (Index c = 0; c < 8; ++c) row(0, h, 0, c) = t(0, h, 0, c);
    return row;
  };
  const Tensor<float, 4> pushed = stream.push(first(q), first(k), first(v));
  for (Index h = 0; h < 2; ++h)
    for (Index c = 0; c < 8; ++c) {
      const auto value = static_cast<float>(Eigen::bfloat16(v(0, h, 0, c)));
      EXPECT_NEAR(out(0, h, 0, c), value, 2e-7 * std::abs(value));
      EXPECT_NEAR(pushed(0, h, 0, c), value, 2e-7 * std::abs(value));
    }
}

TEST(Bf16Arithmetic, OfAnAttentionsStreamTakesNumbersBelowTheLeastNormalOneForZero) {
  local_mha::LocalAttentionConfig config{.window_size = 20, .causal = true};
  config.scale = 1;
  const Attention attention(config);
  constexpr Index rows = 10;
  Tensor<float, 4> q(1, 1, rows, 1), k(1, 1, rows, 1), v(1, 1, rows, 1);
  for (Index i = 0; i < rows; ++i) {
    q(0, 0, i, 0) = 1e38F;
    k(0, 0, i, 0) = static_cast<float>(i) * 1e-39F;
    v(0, 0, i, 0) = static_cast<float>(i);
  }
  const Tensor<float, 4> out = attention.forward(q, k, v);
  Attention::Stream stream(attention, 1, 1);
  for (Index i = 0; i < rows; ++i) {
    Tensor<float, 4> one_q(1, 1, 1, 1), one_k(1, 1, 1, 1), one_v(1, 1, 1, 1);
    one_q.setConstant(q(0, 0, i, 0)), one_k.setConstant(k(0, 0, i, 0));
    one_v.setConstant(v(0, 0, i, 0));
    const Tensor<float, 4> pushed = stream.push(one_q, one_k, one_v);
    // All keys are 0: their values' mean.
    EXPECT_NEAR(out(0, 0, i, 0), static_cast<float>(i) / 2, 1e-5);
    EXPECT_NEAR(pushed(0, 0, 0, 0), static_cast<float>(i) / 2, 1e-5);
  }
}

}  // namespace bf16_arithmetic_test
