// SPDX-License-Identifier: MIT
// The random cases of sliding windows: that every two options meet, and that the reference's
// results and gradients of them agree with each other.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "reference/gradients.hpp"
#include "support/compare.hpp"
#include "support/differences.hpp"
#include "support/random_sliding_case.hpp"

namespace random_sliding_case_test {

using reference::Array;
using reference::Int;
using support::SlidingCase;

/// The options that a case uses.
std::vector<std::string> options_of(const SlidingCase& c) {
  std::vector<std::string> used;
  const auto use = [&](bool is_used, const char* name) {
    if (is_used) used.push_back(name);
  };
  const auto& o = c.options;
  use(o.token_window.has_value(), "token window");
  use(o.token_window && !o.token_window->left, "unbounded left");
  use(o.token_window && !o.token_window->right, "unbounded right");
  use(!o.token_window, "look-around");
  use(o.causal, "causal");
  use(!o.cu_seqlens.empty(), "packed");
  use(o.first_keys > 0, "first keys");
  use(!c.in.global.empty(), "global rows");
  use(!c.in.masked.empty(), "mask");
  use(c.kv_heads() < c.heads(), "fewer key heads");
  use(o.rotary, "rotary");
  use(o.rotary && o.rotary_options.rotary_dim.has_value(), "rotary_dim");
  use(o.rotary && o.rotary_options.interleaved, "interleaved");
  use(o.rotary && !o.rotary_options.inv_freq.empty(), "inv_freq");
  use(c.score_kind != support::ScoreKind::Plain, "score");
  use(!c.in.bias.empty(), "bias");
  use(!c.in.relative_bias.empty(), "relative bias");
  use(!c.in.sinks.empty(), "sinks");
  use(c.dropout > 0, "dropout");
  use(c.batch() > 1, "batch");
  use(c.dim_head() > 9, "wide head");
  return used;
}

TEST(RandomSlidingCase, LetsEveryTwoOptionsMeet) {
  std::map<std::pair<std::string, std::string>, int> met;
  std::map<std::string, int> alone;
  std::map<Int, int> lengths, widths, of_segments;
  for (std::uint64_t seed = 1; seed <= 3000; ++seed) {
    const SlidingCase c = support::sliding_case(seed);
    const auto used = options_of(c);
    for (const auto& a : used) {
      ++alone[a];
      for (const auto& b : used) ++met[{a, b}];
    }
    ++lengths[c.seqlen()];
    ++widths[c.dim_head()];
    for (std::size_t s = 0; s + 1 < c.options.cu_seqlens.size(); ++s)
      ++of_segments[c.options.cu_seqlens[s + 1] - c.options.cu_seqlens[s]];
    if (!c.options.cu_seqlens.empty()) {
      EXPECT_EQ(c.options.cu_seqlens.back(), c.seqlen());
      EXPECT_EQ(c.batch(), 1);
    }
  }
  EXPECT_EQ(alone.size(), 21U);
  // What excludes one another.
  const auto excluded = [](const std::string& a, const std::string& b) {
    const auto either = [&](const char* x, const char* y) {
      return (a == x && b == y) || (a == y && b == x);
    };
    for (const char* of_window :
         {"token window", "unbounded left", "unbounded right", "relative bias"})
      if (either(of_window, "look-around") || either(of_window, "bias")) return true;
    for (const char* side : {"unbounded left", "unbounded right"})
      if (either(side, "relative bias")) return true;
    return either("causal", "unbounded right") || either("packed", "batch") ||
           either("wide head", "batch");
  };
  for (const auto& [a, of_a] : alone) {
    EXPECT_GE(of_a, 60) << a;
    for (const auto& [b, of_b] : alone)
      EXPECT_GE((met[{a, b}]), excluded(a, b) ? 0 : 5) << a << " and " << b;
  }
  for (const Int length : {0, 1, 2, 15, 16, 17, 33, 60}) EXPECT_GE(lengths[length], 5) << length;
  for (const Int width : {1, 2, 3, 7, 16, 17, 65, 70}) EXPECT_GE(widths[width], 5) << width;
  for (const Int length : {0, 1, 2, 3, 17}) EXPECT_GE(of_segments[length], 5) << length;
}

TEST(RandomSlidingCase, GivesTheSameInTwoPrecisions) {
  for (std::uint64_t seed = 1; seed <= random_cases(300); ++seed) {
    const SlidingCase c = support::sliding_case(seed, seed % 10 == 0 ? 150 : 60);
    const auto got = reference::attention(c.options, c.inputs<double>());
    const auto expected = reference::attention(c.options, c.inputs<long double>());
    const double size = 1 + static_cast<double>(expected.largest_magnitude) +
                        support::largest(c.in.bias) + support::largest(c.in.relative_bias) +
                        support::largest(c.in.sinks);
    EXPECT_TRUE(support::close(got.out, expected.out, 1e-14 * size * support::largest(c.in.v)))
        << seed << ": " << describe(c);
    EXPECT_TRUE(support::close(got.lse, expected.lse, 1e-14 * size)) << seed << ": " << describe(c);
  }
}

TEST(RandomSlidingCase, GradientsAreDifferences) {
  using In = reference::AttentionInputs<long double>;
  std::uint64_t compared = 0;
  for (std::uint64_t seed = 1; compared < random_cases(150); ++seed) {
    const SlidingCase c = support::sliding_case(seed, 25);
    if (c.in.q.data.size() > 1500 || c.in.q.empty()) continue;
    ++compared;
    Random random(seed);
    const Array<double> weights = random.array(c.in.q.shape);
    const auto gradients = reference::attention_backward(c.options, c.inputs<double>(), weights);
    const In in = c.inputs<long double>();
    const auto of = [&](Array<long double> In::* member) {
      return [&, member](const Array<long double>& values) {
        In moved = in;
        moved.*member = values;
        const auto out = reference::attention(c.options, moved).out;
        long double sum = 0;
        for (std::size_t i = 0; i < out.data.size(); ++i)
          sum += out.data[i] * static_cast<long double>(weights.data[i]);
        return sum;
      };
    };
    const double score =
        static_cast<double>(reference::attention(c.options, in).largest_magnitude) +
        support::largest(c.in.bias) + support::largest(c.in.relative_bias) +
        support::largest(c.in.sinks);
    const auto dim_head = static_cast<double>(c.dim_head());
    const double tolerance = support::tolerance_of_differences<double> * (1 + score) *
                             std::max(1.0, std::sqrt(dim_head) / 4) / (1 - c.dropout);
    const double factor = c.options.rotary_options.factor;
    const double scale = std::abs(c.options.scale.value_or(1 / std::sqrt(dim_head))) *
                         std::max(1.0, factor * factor) * 1.5;
    const double q = support::largest(c.in.q), k = support::largest(c.in.k),
                 v = support::largest(c.in.v);
    const std::string what = "seed " + std::to_string(seed) + ": " + describe(c) + ", ";
    support::expect_gradient(random, gradients.q, c.in.q, of(&In::q), tolerance, what + "q",
                             {scale * k * v, v});
    support::expect_gradient(random, gradients.k, c.in.k, of(&In::k), tolerance, what + "k",
                             {scale * q * v, v});
    support::expect_gradient(random, gradients.v, c.in.v, of(&In::v), tolerance, what + "v",
                             {1, v});
    support::expect_gradient(random, gradients.bias, c.in.bias, of(&In::bias), tolerance,
                             what + "bias", {v, v});
    support::expect_gradient(random, gradients.relative_bias, c.in.relative_bias,
                             of(&In::relative_bias), tolerance, what + "relative_bias", {v, v});
    support::expect_gradient(random, gradients.sinks, c.in.sinks, of(&In::sinks), tolerance,
                             what + "sinks", {v, v});
  }
}

TEST(RandomSlidingCase, GradientsOfLayersAreDifferences) {
  std::map<std::string, std::uint64_t> compared;
  for (std::uint64_t seed = 1; seed <= random_cases(300); ++seed) {
    const auto c = support::sliding_layer_case(seed, 15);
    if (c.x.empty() || c.attention.in.q.data.size() > 1000) continue;
    Random random(seed);
    const auto in = c.inputs<double>();
    const Array<double> weights = random.array(c.x.shape);
    auto gradients = reference::zeros_like(c.parameters);
    const auto got = reference::local_mha_backward(c.options, c.parameters, in, weights, gradients);
    const auto precise = reference::cast<long double>(c.parameters);
    const auto precise_in = c.inputs<long double>();
    const auto loss = [&](const reference::Parameters<long double>& parameters,
                          const reference::LayerInputs<long double>& inputs) {
      const auto y = reference::local_mha(c.options, parameters, inputs).y;
      long double sum = 0;
      for (std::size_t i = 0; i < y.data.size(); ++i)
        sum += y.data[i] * static_cast<long double>(weights.data[i]);
      return sum;
    };
    const std::string what = "seed " + std::to_string(seed) + ": " + describe(c) + ", ";
    // Sharp scores and small roots make differences coarse: their steps are small beside both.
    const auto result = reference::local_mha(c.options, c.parameters, in);
    const double size = 1 + static_cast<double>(result.largest_magnitude);
    const support::Sizes sizes{size * 10, 1 + support::largest(result.y)};
    const double tolerance = 1e-10 * size;
    for (const auto& [name, gradient] : gradients) {
      support::expect_gradient(
          random, gradient, c.parameters.at(name),
          [&](const Array<long double>& values) {
            auto moved = precise;
            moved[name] = values;
            return loss(moved, precise_in);
          },
          tolerance, what + name, sizes);
      ++compared[name];
    }
    const double root = c.options.prenorm ? support::largest(c.x) : 1;
    support::expect_gradient(random, got.x, c.x,
                             [&](const Array<long double>& values) {
                               auto moved = precise_in;
                               moved.x = values;
                               return loss(precise, moved);
                             },
                             tolerance, what + "x",
                             {sizes.gradient / std::min(1.0, root), sizes.loss});
  }
  for (const char* name : {"to_qkv.weight", "to_qkv.bias", "to_qkv_global.weight",
                           "to_qkv_global.bias", "to_out.weight", "to_out.bias", "norm.weight",
                           "norm.bias", "q_scale", "k_scale", "q_norm.weight", "k_norm.weight",
                           "to_v_gate.0.weight", "to_v_gate.0.bias", "sinks", "relative_bias"})
    EXPECT_GE(compared[name], random_cases(5)) << name;
}

}  // namespace random_sliding_case_test
