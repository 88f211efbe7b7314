// SPDX-License-Identifier: MIT
// The naive backward passes against differences of the naive forward passes, and what a number that
// bounds its error says of naive results in float.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "reference/gradients.hpp"
#include "soak/bounded.hpp"
#include "support/every_element.hpp"
#include "support/random.hpp"

namespace reference_gradient_test {

using reference::Array;
using reference::Int;
using Real = long double;
using support::expect_gradient;
using support::loss_of;

Array<Real> numbers(Random& random, std::vector<Int> shape, double scale = 1) {
  return reference::cast<Real>(random.array(std::move(shape), scale));
}

reference::AttentionOptions options_of(int kind) {
  reference::AttentionOptions o;
  o.window_size = 3;
  o.causal = kind % 2 == 0;
  o.look_forward = o.causal ? 0 : 1;
  o.exact_windowsize = kind % 3 == 0;
  o.rotary = kind >= 2;
  o.xpos = kind >= 4;
  o.xpos_scale_base = 4;
  o.shared_qk = kind == 1 || kind == 5;
  return o;
}

TEST(ReferenceGradient, OfAttention) {
  for (int kind = 0; kind < 6; ++kind) {
    Random random(static_cast<std::uint64_t>(kind));
    const reference::AttentionOptions o = options_of(kind);
    const Int n = 7, d = 4;
    const Int keys = (1 + o.look_backward + o.look_forward) * o.window_size;
    reference::AttentionInputs<Real> in{numbers(random, {1, 2, n, d}),
                                        numbers(random, {1, 2, n, d}),
                                        numbers(random, {1, 2, n, d}),
                                        {0, 1, 0, 0, 0, 1, 0},
                                        numbers(random, {kind % 2 + 1, o.window_size, keys}),
                                        {}};
    if (kind == 3) in.multiplier = [](Int, Int, Int i, Int j) { return Real((i + j) % 2 * 2); };
    const auto weight = numbers(random, {1, 2, n, d});
    const auto got = reference::attention_backward(o, in, weight);
    const auto loss = [&] { return loss_of(reference::attention(o, in).out, weight); };
    const std::string name = "kind " + std::to_string(kind);
    EXPECT_EQ(got.out.data, reference::attention(o, in).out.data);
    EXPECT_EQ(got.lse.data, reference::attention(o, in).lse.data);
    expect_gradient(name + " q", in.q, loss, got.q);
    expect_gradient(name + " k", in.k, loss, got.k);
    expect_gradient(name + " v", in.v, loss, got.v);
    expect_gradient(name + " bias", in.bias, loss, got.bias);
  }
}

TEST(ReferenceGradient, OfALayer) {
  for (int kind = 0; kind < 6; ++kind) {
    Random random(static_cast<std::uint64_t>(kind));
    reference::LayerOptions o;
    o.dim = 5;
    o.heads = 2;
    o.dim_head = 4;
    o.prenorm = kind % 2 == 0;
    if (kind % 3 == 0) o.qk_norm = reference::QkNorm::L2;
    o.gate_values_per_head = kind < 3;
    o.attention = options_of(kind);
    o.attention.shared_qk = false;
    reference::Parameters<Real> parameters;
    const auto add = [&](const char* name, std::vector<Int> shape) {
      parameters[name] = numbers(random, std::move(shape), 0.6);
    };
    add("to_qkv.weight", {24, 5});
    add("to_out.weight", {5, 8});
    add("norm.weight", {5});
    add("norm.bias", {5});
    add("q_scale", {4});
    add("k_scale", {4});
    add("to_v_gate.0.weight", {2, 5});
    add("to_v_gate.0.bias", {2});
    const Int keys = (2 + o.attention.look_forward) * 3;
    reference::LayerInputs<Real> in{
        numbers(random, {1, 6, 5}), {0, 0, 1, 0, 0, 0}, numbers(random, {2, 3, keys}), {}};
    const auto weight = numbers(random, {1, 6, 5});
    auto gradients = reference::zeros_like(parameters);
    const auto got = reference::local_mha_backward(o, parameters, in, weight, gradients);
    const auto loss = [&] { return loss_of(reference::local_mha(o, parameters, in).y, weight); };
    EXPECT_EQ(got.y.data, reference::local_mha(o, parameters, in).y.data);
    expect_gradient("x", in.x, loss, got.x);
    expect_gradient("bias", in.bias, loss, got.bias);
    for (auto& [name, array] : parameters)
      expect_gradient("kind " + std::to_string(kind) + " " + name, array, loss, gradients.at(name));
  }
}

TEST(ReferenceGradient, OfATransformer) {
  for (const Int streams : {1, 3})
    for (const bool dynamic : {false, true}) {
      Random random(streams == 1 ? 1 : 4);
      reference::TransformerOptions o;
      o.depth = 2;
      o.streams = streams;
      o.use_dynamic_pos_bias = dynamic;
      o.layer.dim = 4;
      o.layer.heads = 2;
      o.layer.dim_head = 2;
      o.layer.prenorm = true;
      o.layer.attention = options_of(dynamic ? 0 : 2);
      reference::Parameters<Real> parameters;
      const auto add = [&](const std::string& name, std::vector<Int> shape, double scale = 0.7) {
        parameters[name] = numbers(random, std::move(shape), scale);
      };
      add("token_emb.weight", {3, 4});
      add("pos_emb.weight", {5, 4});
      for (const char* layer : {"layers.0", "layers.1"}) {
        const std::string attention = std::string(layer) + ".0.branch.";
        const std::string feed_forward = std::string(layer) + ".1.branch.";
        add(attention + "norm.weight", {4});
        add(attention + "norm.bias", {4});
        add(attention + "to_qkv.weight", {12, 4});
        add(attention + "to_out.weight", {4, 4});
        add(feed_forward + "0.weight", {4});
        add(feed_forward + "0.bias", {4});
        add(feed_forward + "1.weight", {6, 4});
        add(feed_forward + "4.weight", {4, 3});
        for (const char* connection : {".0.", ".1."}) {
          if (streams == 1) continue;
          const std::string names = layer + std::string(connection);
          add(names + "static_alpha", {streams, streams + 1}, 1);
          add(names + "dynamic_alpha_fn", {4, streams + 1}, 0.2);
          add(names + "dynamic_alpha_scale", {});
          add(names + "static_beta", {streams});
          add(names + "dynamic_beta_fn", {4}, 0.2);
          add(names + "dynamic_beta_scale", {});
          add(names + "norm.gamma", {4}, 0.2);
        }
      }
      add("to_logits.0.weight", {4});
      add("to_logits.0.bias", {4});
      add("to_logits.1.weight", {3, 4});
      if (dynamic) {
        add("dynamic_pos_bias.mlp.0.weight", {2, 1});
        add("dynamic_pos_bias.mlp.0.bias", {2});
        add("dynamic_pos_bias.mlp.2.weight", {2, 2});
        add("dynamic_pos_bias.mlp.2.bias", {2});
        add("dynamic_pos_bias.mlp.4.weight", {2, 2});
        add("dynamic_pos_bias.mlp.4.bias", {2});
      }
      Array<Int> tokens({1, 5}), labels({1, 5});
      tokens.data = {0, 2, 1, 1, 0};
      labels.data = {2, -1, 1, 0, 2};
      auto gradients = reference::zeros_like(parameters);
      const auto got =
          reference::transformer_backward(o, parameters, tokens, labels, Int{-1}, {}, gradients);
      const auto loss = [&] {
        return reference::cross_entropy(reference::transformer_logits(o, parameters, tokens),
                                        labels, -1);
      };
      EXPECT_EQ(got.loss, loss());
      for (auto& [name, array] : parameters) expect_gradient(name, array, loss, gradients.at(name));
    }
}

// Naive results in float lie within the bounds, and these are no more than some thousand times as
// wide as they need be.
TEST(ReferenceGradient, InFloatLiesWithinItsBounds) {
  using Bounded = soak::Bounded<float>;
  double worst = 0;
  for (int kind = 0; kind < 6; ++kind)
    for (const double size : {0.1, 1.0, 5.0, 30.0}) {
      Random random(static_cast<std::uint64_t>(kind));
      const reference::AttentionOptions o = options_of(kind);
      const auto draw = [&] { return random.array({1, 2, 30, 8}, size); };
      const reference::AttentionInputs<double> in{draw(), draw(), draw(), {}, {}, {}};
      const auto weight = random.array({1, 2, 30, 8});
      const auto in_real = [&]<typename To>(const To&) {
        return reference::attention_backward(
            o,
            reference::AttentionInputs<To>{reference::cast<To>(in.q),
                                           reference::cast<To>(in.k),
                                           reference::cast<To>(in.v),
                                           {},
                                           {},
                                           {}},
            reference::cast<To>(weight));
      };
      const auto bounded = in_real(Bounded());
      const auto naive = in_real(float());
      const auto compare = [&](const Array<float>& got, const Array<Bounded>& expected) {
        for (std::size_t i = 0; i < got.data.size(); ++i) {
          const Bounded& e = expected.data[i];
          if (!e.known()) continue;
          const double error = std::abs(static_cast<double>(got.data[i]) - e.value);
          EXPECT_LE(error, e.error) << "kind " << kind << " size " << size << " at " << i;
          if (e.error > 0) worst = std::max(worst, error / e.error);
        }
      };
      compare(naive.out, bounded.out);
      compare(naive.lse, bounded.lse);
      compare(naive.q, bounded.q);
      compare(naive.k, bounded.k);
      compare(naive.v, bounded.v);
    }
  EXPECT_GE(worst, 1e-3);
}

}  // namespace reference_gradient_test
