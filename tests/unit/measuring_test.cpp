// SPDX-License-Identifier: MIT
// What the benchmarks measure the library against computes the same, and is a case like the others.
#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include <Eigen/Core>

#include "measuring/case.hpp"
#include "measuring/tiled.hpp"
#include "reference/layer.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace measuring_test {

using measuring::Case;
using Matrix = measuring::RowsOf<double>;
using reference::Array;

Eigen::Map<const Matrix> rows_of(const Array<double>& a) {
  const auto channels = static_cast<Eigen::Index>(a.shape.back());
  return {a.data.data(), static_cast<Eigen::Index>(a.data.size()) / channels, channels};
}

Eigen::Map<Matrix> rows_of(Array<double>& a) {
  const auto channels = static_cast<Eigen::Index>(a.shape.back());
  return {a.data.data(), static_cast<Eigen::Index>(a.data.size()) / channels, channels};
}

reference::AttentionOptions options_of(const Case& c) {
  reference::AttentionOptions options;
  options.window_size = c.window_size;
  options.causal = c.causal != 0;
  options.look_forward = c.causal != 0 ? 0 : 1;
  options.exact_windowsize = c.exact != 0;
  return options;
}

// Windows smaller and larger than a tile, and a last tile that is not whole.
TEST(TiledAttention, GivesWhatTheReferenceGives) {
  Random random(1);
  for (const char* window : {"/window_size:1", "/window_size:10", "/window_size:100"})
    for (const char* seqlen : {"/seqlen:7", "/seqlen:64", "/seqlen:263"})
      for (const char* rules : {"", "/causal:0", "/exact:0", "/causal:0/exact:0"}) {
        const Case c =
            Case::parse(std::string("tiled_attention/double/dim_head:5") + window + seqlen + rules);
        reference::AttentionInputs<double> in;
        for (auto* input : {&in.q, &in.k, &in.v}) *input = random.array({1, 1, c.seqlen, 5});
        Array<double> got({1, 1, c.seqlen, 5}, std::nan(""));
        measuring::TiledAttention<double> attention(c);
        attention(rows_of(in.q), rows_of(in.k), rows_of(in.v), 0, 0, 1 / std::sqrt(5.0),
                  rows_of(got));
        EXPECT_TRUE(support::close(got, reference::attention(options_of(c), in).out, 1e-13))
            << c.name();
      }
}

// Sequences of more than a stretch, of which some are not whole, and a window that is longer.
TEST(TiledLayer, GivesWhatTheReferenceGives) {
  Random random(2);
  for (const char* shape : {"/seqlen:3/window_size:4", "/seqlen:530/window_size:40/xpos:1",
                            "/seqlen:1100/window_size:520/qk_rmsnorm:1",
                            "/seqlen:600/window_size:30/xpos:1/qk_rmsnorm:1"}) {
    const Case c = Case::parse(std::string("tiled_layer/double/dim:6/heads:2/dim_head:4") + shape);
    reference::LayerOptions options;
    options.dim = c.dim;
    options.heads = c.heads;
    options.dim_head = c.dim_head;
    options.attention = options_of(c);
    options.attention.rotary = true;
    options.attention.xpos = c.xpos != 0;
    options.attention.xpos_scale_base = std::sqrt(static_cast<double>(c.dim));
    if (c.qk_rmsnorm != 0) options.qk_norm = reference::QkNorm::L2;
    const reference::Parameters<double> parameters{{"to_qkv.weight", random.array({24, 6})},
                                                   {"to_out.weight", random.array({6, 8})},
                                                   {"q_scale", random.array({4})},
                                                   {"k_scale", random.array({4})}};
    reference::LayerInputs<double> in;
    in.x = random.array({1, c.seqlen, c.dim});
    const auto vector = [&](const char* name) -> Eigen::VectorXd {
      return rows_of(parameters.at(name)).row(0);
    };
    measuring::TiledLayer<double> layer(c, rows_of(parameters.at("to_qkv.weight")),
                                        rows_of(parameters.at("to_out.weight")), vector("q_scale"),
                                        vector("k_scale"));
    const Array<double> expected = reference::local_mha(options, parameters, in).y;
    // The second call finds what the first has left.
    for (int call = 0; call < 2; ++call) {
      Array<double> got({1, c.seqlen, c.dim}, std::nan(""));
      layer(rows_of(in.x), rows_of(got));
      EXPECT_TRUE(support::close(got, expected, 1e-12 * support::largest(expected))) << c.name();
    }
  }
}

TEST(MeasuredCase, OfTilesCountsAsTheLibrarysOwn) {
  for (const std::string of : {"attention/float/seqlen:300/dim_head:64/window_size:128",
                               "layer/float/seqlen:300/dim:32/heads:2/dim_head:16/window_size:64/"
                               "xpos:1/qk_rmsnorm:1"}) {
    const Case own = Case::parse(of);
    const Case tiled = Case::parse("tiled_" + of);
    EXPECT_EQ(tiled.name(), "tiled_" + of);
    EXPECT_EQ(tiled.flops(), own.flops());
    EXPECT_EQ(tiled.tokens(), own.tokens());
    EXPECT_TRUE(tiled.of_peer());
    EXPECT_FALSE(own.of_peer());
  }
  // Queries that see 1, 2, 3 and 3 keys.
  EXPECT_EQ(Case::parse("tiled_attention/float/seqlen:4/dim_head:1/window_size:2").flops(),
            4 * (1 + 2 + 3 + 3));
}

TEST(MeasuredCase, OfTilesIsRefusedWhereItComputesSomethingElse) {
  for (const char* text : {"tiled_attention/float/heads:2/kv_heads:1",
                           "tiled_attention/float/sinks:1",
                           "tiled_attention/float/token_window:1/left:3",
                           "tiled_attention/float/dropout:10",
                           "tiled_attention/float/padding:1",
                           "tiled_attention/float/bias:1",
                           "tiled_attention/float/backward:1",
                           "tiled_attention/float/threads:2",
                           "tiled_attention/float/dim:8",
                           "tiled_attention/float/qk_rmsnorm:1",
                           "tiled_attention/float/biases:1",
                           "tiled_attention/float/arithmetic_bits:16",
                           "tiled_layer/float",
                           "tiled_layer/float/dim:8/causal:0",
                           "tiled_layer/float/dim:8/exact:0",
                           "tiled_layer/float/dim:8/dim_head:5",
                           "tiled_layer/float/dim:8/heads:2/kv_heads:1",
                           "tiled_layer/float/dim:8/sinks:1",
                           "tiled_layer/float/dim:8/biases:1",
                           "tiled_layer/float/dim:8/token_window:1/left:3",
                           "tiled_layer/float/dim:8/threads:2",
                           "tiled_layer/float/dim:8/backward:1/qk_rmsnorm:1",
                           "tiled_layer/float/dim:8/stored_bits:16",
                           "tiled_layers/float/dim:8"})
    EXPECT_THROW(Case::parse(text), std::invalid_argument) << text;
}

}  // namespace measuring_test
