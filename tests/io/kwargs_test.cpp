// SPDX-License-Identifier: MIT
// Configurations from the Python modules' keyword arguments, and back.
#include <gtest/gtest.h>

#include <cmath>
#include <concepts>
#include <limits>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/io/kwargs.hpp>

#include "io/file_builder.hpp"

namespace kwargs_test {

using namespace local_mha;
using namespace local_mha::io;
using io_test::message_of;
using nlohmann::json;

LocalAttentionConfig attention(std::string_view text) {
  return local_attention_config(parse_json(text, "kwargs"));
}
LocalMHAConfig mha(std::string_view text) { return local_mha_config(parse_json(text, "kwargs")); }
LocalTransformerConfig transformer(std::string_view text) {
  return local_transformer_config(parse_json(text, "kwargs"));
}

// ---- Values ----

TEST(Kwargs, OfLocalAttentionDefaultAsInPython) {
  for (const char* text :
       {R"({"window_size": 6})",
        R"({"window_size": 6, "causal": null, "look_backward": null, "look_forward": null,
            "dropout": null, "shared_qk": null, "rel_pos_emb_config": null, "dim": null,
            "autopad": null, "exact_windowsize": null, "scale": null, "use_rotary_pos_emb": null,
            "use_xpos": null, "xpos_scale_base": null})"}) {
    const LocalAttentionConfig config = attention(text);
    EXPECT_EQ(config.window_size, 6);
    EXPECT_FALSE(config.causal);
    EXPECT_EQ(config.look_backward, 1);
    EXPECT_FALSE(config.look_forward.has_value());
    EXPECT_EQ(config.dropout, 0);
    EXPECT_FALSE(config.shared_qk);
    EXPECT_FALSE(config.dim.has_value());
    EXPECT_FALSE(config.exact_windowsize);
    EXPECT_FALSE(config.scale.has_value());
    EXPECT_TRUE(config.use_rotary_pos_emb);
    EXPECT_FALSE(config.use_xpos);
    EXPECT_FALSE(config.xpos_scale_base.has_value());
  }
}

TEST(Kwargs, OfLocalAttentionAreAllTaken) {
  const LocalAttentionConfig config = attention(
      R"({"window_size": 6, "causal": false, "look_backward": 2, "look_forward": 3,
          "dropout": 0.25, "shared_qk": true, "dim": 8, "autopad": true, "exact_windowsize": true,
          "scale": 0.5, "use_rotary_pos_emb": true, "use_xpos": true, "xpos_scale_base": 2.5})");
  EXPECT_FALSE(config.causal);
  EXPECT_EQ(config.look_backward, 2);
  EXPECT_EQ(config.look_forward, 3);
  EXPECT_EQ(config.dropout, 0.25);
  EXPECT_TRUE(config.shared_qk);
  EXPECT_EQ(config.dim, 8);
  EXPECT_TRUE(config.exact_windowsize);
  EXPECT_EQ(config.scale, 0.5);
  EXPECT_TRUE(config.use_xpos);
  EXPECT_EQ(config.xpos_scale_base, 2.5);
  EXPECT_TRUE(attention(R"({"window_size": 6, "causal": true})").causal);
  EXPECT_FALSE(
      attention(R"({"window_size": 6, "dim": 4, "use_rotary_pos_emb": false})").use_rotary_pos_emb);
  EXPECT_EQ(attention(R"({"window_size": 6, "rel_pos_emb_config": [16, 4]})").dim, 16);
  EXPECT_EQ(attention(R"({"window_size": 6, "dim": 8, "rel_pos_emb_config": [16, 4]})").dim, 16);
}

TEST(Kwargs, OfLocalMhaDefaultAsInPython) {
  for (const char* text :
       {R"({"dim": 24, "window_size": 6})",
        R"({"dim": 24, "window_size": 6, "dim_head": null, "heads": null, "dropout": null,
            "causal": null, "prenorm": null, "qk_rmsnorm": null, "qk_scale": null,
            "use_xpos": null, "xpos_scale_base": null, "exact_windowsize": null,
            "gate_values_per_head": null, "look_backward": null, "look_forward": null,
            "use_rotary_pos_emb": null, "shared_qk": null, "rel_pos_emb_config": null})"}) {
    const LocalMHAConfig config = mha(text);
    EXPECT_EQ(config.dim, 24);
    EXPECT_EQ(config.window_size, 6);
    EXPECT_EQ(config.dim_head, 64);
    EXPECT_EQ(config.heads, 8);
    EXPECT_EQ(config.dropout, 0);
    EXPECT_FALSE(config.causal);
    EXPECT_FALSE(config.prenorm);
    EXPECT_FALSE(config.qk_rmsnorm);
    EXPECT_EQ(config.qk_scale, 8);
    EXPECT_FALSE(config.use_xpos);
    EXPECT_FALSE(config.xpos_scale_base.has_value());
    EXPECT_TRUE(config.exact_windowsize);
    EXPECT_EQ(config.look_backward, 1);
    EXPECT_FALSE(config.look_forward.has_value());
    EXPECT_TRUE(config.use_rotary_pos_emb);
    EXPECT_FALSE(config.gate_values_per_head);
  }
}

TEST(Kwargs, OfLocalMhaAreAllTaken) {
  const LocalMHAConfig config =
      mha(R"({"dim": 24, "window_size": 6, "dim_head": 10, "heads": 3, "dropout": 0.1,
              "causal": false, "prenorm": true, "qk_rmsnorm": true, "qk_scale": 4.5,
              "use_xpos": true, "xpos_scale_base": 16, "exact_windowsize": false,
              "look_backward": 2, "look_forward": 3, "use_rotary_pos_emb": true,
              "gate_values_per_head": true, "shared_qk": false, "rel_pos_emb_config": [10, 3]})");
  EXPECT_EQ(config.dim_head, 10);
  EXPECT_EQ(config.heads, 3);
  EXPECT_EQ(config.dropout, 0.1);
  EXPECT_TRUE(config.prenorm);
  EXPECT_TRUE(config.qk_rmsnorm);
  EXPECT_EQ(config.qk_scale, 4.5);
  EXPECT_TRUE(config.use_xpos);
  EXPECT_EQ(config.xpos_scale_base, 16);
  EXPECT_FALSE(config.exact_windowsize);
  EXPECT_EQ(config.look_backward, 2);
  EXPECT_EQ(config.look_forward, 3);
  EXPECT_TRUE(config.gate_values_per_head);
  EXPECT_TRUE(mha(R"({"dim": 24, "window_size": 6, "causal": true})").causal);
  EXPECT_FALSE(
      mha(R"({"dim": 24, "window_size": 6, "use_rotary_pos_emb": false})").use_rotary_pos_emb);
}

TEST(Kwargs, OfLocalTransformerDefaultAsInPython) {
  for (const char* text :
       {R"({"num_tokens": 32, "max_seq_len": 64, "dim": 24, "depth": 2})",
        R"({"num_tokens": 32, "max_seq_len": 64, "dim": 24, "depth": 2, "causal": null,
            "local_attn_window_size": null, "dim_head": null, "heads": null, "ff_mult": null,
            "attn_dropout": null, "ff_dropout": null, "ignore_index": null, "use_xpos": null,
            "xpos_scale_base": null, "use_dynamic_pos_bias": null, "global_attn_layer": null,
            "layers_insert_global_attn": null, "num_residual_streams": null, "qk_rmsnorm": null,
            "qk_scale": null, "exact_windowsize": null, "look_backward": null,
            "look_forward": null, "gate_values_per_head": null})"}) {
    const LocalTransformerConfig config = transformer(text);
    EXPECT_EQ(config.num_tokens, 32);
    EXPECT_EQ(config.max_seq_len, 64);
    EXPECT_EQ(config.dim, 24);
    EXPECT_EQ(config.depth, 2);
    EXPECT_TRUE(config.causal);
    EXPECT_EQ(config.local_attn_window_size, 512);
    EXPECT_EQ(config.dim_head, 64);
    EXPECT_EQ(config.heads, 8);
    EXPECT_EQ(config.ff_mult, 4);
    EXPECT_EQ(config.attn_dropout, 0);
    EXPECT_EQ(config.ff_dropout, 0);
    EXPECT_EQ(config.ignore_index, -1);
    EXPECT_FALSE(config.use_xpos);
    EXPECT_FALSE(config.xpos_scale_base.has_value());
    EXPECT_FALSE(config.use_dynamic_pos_bias);
    EXPECT_EQ(config.num_residual_streams, 1);
    EXPECT_FALSE(config.qk_rmsnorm);
    EXPECT_EQ(config.qk_scale, 8);
    EXPECT_TRUE(config.exact_windowsize);
    EXPECT_EQ(config.look_backward, 1);
    EXPECT_FALSE(config.look_forward.has_value());
    EXPECT_FALSE(config.gate_values_per_head);
  }
}

TEST(Kwargs, OfLocalTransformerAreAllTaken) {
  const LocalTransformerConfig config = transformer(
      R"({"num_tokens": 32, "max_seq_len": 64, "dim": 24, "depth": 2, "causal": false,
          "local_attn_window_size": 7, "dim_head": 10, "heads": 3, "ff_mult": 2.5,
          "attn_dropout": 0.1, "ff_dropout": 0.2, "ignore_index": -100, "use_xpos": true,
          "xpos_scale_base": 16.5, "num_residual_streams": 3, "qk_rmsnorm": true, "qk_scale": 10,
          "exact_windowsize": false, "look_backward": 2, "look_forward": 3,
          "gate_values_per_head": true})");
  EXPECT_FALSE(config.causal);
  EXPECT_EQ(config.local_attn_window_size, 7);
  EXPECT_EQ(config.dim_head, 10);
  EXPECT_EQ(config.heads, 3);
  EXPECT_EQ(config.ff_mult, 2.5);
  EXPECT_EQ(config.attn_dropout, 0.1);
  EXPECT_EQ(config.ff_dropout, 0.2);
  EXPECT_EQ(config.ignore_index, -100);
  EXPECT_TRUE(config.use_xpos);
  EXPECT_EQ(config.xpos_scale_base, 16.5);
  EXPECT_EQ(config.num_residual_streams, 3);
  EXPECT_TRUE(config.qk_rmsnorm);
  EXPECT_EQ(config.qk_scale, 10);
  EXPECT_FALSE(config.exact_windowsize);
  EXPECT_EQ(config.look_backward, 2);
  EXPECT_EQ(config.look_forward, 3);
  EXPECT_TRUE(config.gate_values_per_head);
  EXPECT_TRUE(transformer(R"({"num_tokens": 32, "max_seq_len": 64, "dim": 24, "depth": 2,
                              "use_dynamic_pos_bias": true})")
                  .use_dynamic_pos_bias);
}

TEST(Kwargs, WithoutXposScaleBaseTakeHalfTheWindowAsThePythonCodeDoes) {
  EXPECT_EQ(attention(R"({"window_size": 7, "dim": 8, "use_xpos": true})").xpos_scale_base, 3);
  EXPECT_EQ(mha(R"({"dim": 24, "window_size": 6, "use_xpos": true})").xpos_scale_base, 3);
  EXPECT_EQ(mha(R"({"dim": 24, "window_size": 2, "use_xpos": true, "xpos_scale_base": null})")
                .xpos_scale_base,
            1);
  EXPECT_EQ(transformer(R"({"num_tokens": 3, "max_seq_len": 6, "dim": 4, "depth": 1,
                            "use_xpos": true})")
                .xpos_scale_base,
            256);
}

// Python constructs these, and its xPos then has no rotary embedding to act on.
TEST(Kwargs, XposWithoutRotaryIsOffAsInPython) {
  EXPECT_FALSE(attention(R"({"window_size": 6, "use_xpos": true})").use_xpos);
  EXPECT_FALSE(attention(R"({"window_size": 6, "dim": 8, "use_xpos": true,
                             "use_rotary_pos_emb": false})")
                   .use_xpos);
  EXPECT_FALSE(mha(R"({"dim": 4, "window_size": 6, "use_xpos": true, "use_rotary_pos_emb": false})")
                   .use_xpos);
  EXPECT_FALSE(transformer(R"({"num_tokens": 3, "max_seq_len": 6, "dim": 4, "depth": 1,
                               "use_xpos": true, "use_dynamic_pos_bias": true})")
                   .use_xpos);
}

// ---- Errors ----

struct Wrong {
  std::string name;
  std::string module;
  std::string kwargs;
  std::string message;
};

void PrintTo(const Wrong& wrong, std::ostream* out) { *out << wrong.name; }

std::vector<Wrong> wrong_kwargs() {
  const std::string base = R"("dim": 24, "window_size": 6)";
  const std::string model = R"("num_tokens": 32, "max_seq_len": 64, "dim": 24, "depth": 2)";
  const auto a = [](const std::string& name, const std::string& more, const std::string& message) {
    return Wrong{"Attention" + name, "a", R"({"window_size": 6)" + more + "}", message};
  };
  const auto m = [&](const std::string& name, const std::string& more, const std::string& message) {
    return Wrong{"Mha" + name, "m", "{" + base + more + "}", message};
  };
  const auto t = [&](const std::string& name, const std::string& more, const std::string& message) {
    return Wrong{"Transformer" + name, "t", "{" + model + more + "}", message};
  };
  return {
      // Not an object.
      {"Array", "m", "[]", "kwargs: expected a JSON object, got an array"},
      {"Number", "a", "3", "kwargs: expected a JSON object, got 3"},
      {"Null", "t", "null", "kwargs: expected a JSON object, got null"},
      // Missing.
      {"AttentionNothing", "a", "{}",
       "window_size: expected a value, because LocalAttention has no default for it, got none"},
      {"MhaNoDim", "m", R"({"window_size": 6})", "dim: expected a value, because LocalMHA"},
      {"MhaNullDim", "m", R"({"dim": null, "window_size": 6})", "dim: expected a value"},
      {"MhaNoWindow", "m", R"({"dim": 6})", "window_size: expected a value"},
      {"TransformerNothing", "t", "{}", "num_tokens: expected a value"},
      {"TransformerNoDepth", "t", R"({"num_tokens": 1, "max_seq_len": 1, "dim": 2})",
       "depth: expected a value, because LocalTransformer has no default for it, got none"},
      // What Python does not have.
      m("RotaryNumber", R"(, "rotary": 3)", "rotary: expected a JSON object, got 3"),
      m("RotaryUnknown", R"(, "rotary": {"base": 3})",
        "rotary.base: expected a member of an argument of LocalMHA (theta, rotary_dim,"),
      m("RotaryPairing", R"(, "rotary": {"pairing": "pairs"})",
        "rotary.pairing: expected one of halves, interleaved, got"),
      m("RotaryFrequencies", R"(, "rotary": {"inv_freq": 1})",
        "rotary.inv_freq: expected an array of numbers, got 1"),
      m("RotaryFrequency", R"(, "rotary": {"inv_freq": [1, "2"]})",
        "rotary.inv_freq: expected a number, got"),
      m("RotaryTheta", R"(, "rotary": {"theta": 0.5})", "rotary.theta: expected a finite number"),
      m("QkNormKind", R"(, "qk_norm": {"kind": "layer"})",
        "qk_norm.kind: expected one of none, l2, rms, rms_all, got"),
      m("NormEps", R"(, "prenorm": true, "norm": {"eps": 0})",
        "norm.eps: expected a number from 1e-30 to 1e30, got 0"),
      m("QkNormTwice", R"(, "qk_rmsnorm": true, "qk_norm": {"kind": "rms"})",
        "qk_norm.kind: expected none or l2, because qk_rmsnorm is the latter, got rms"),
      m("QkvBias", R"(, "qkv_bias": 1)", "qkv_bias: expected true or false, got 1"),
      m("KvHeads", R"(, "kv_heads": 3)", "kv_heads: expected a divisor of the 8 heads, got 3"),
      m("KvHeadsNone", R"(, "kv_heads": 0)", "kv_heads: expected a divisor of the 8 heads, got 0"),
      m("TokenWindowType", R"(, "token_window": 4)", "token_window: expected a JSON object, got 4"),
      m("TokenWindowMember", R"(, "token_window": {"back": 4})",
        "token_window.back: expected a member of an argument of LocalMHA (left, right), got 4"),
      m("TokenWindowToo", R"(, "token_window": {"left": 4})",
        "window_size: expected 0, because a token window takes its place, got 6"),
      {"TokenWindowEnd", "m", R"({"dim": 24, "token_window": {"left": -2}})",
       "token_window.left: expected at least 0, got -2"},
      {"NoWindow", "m", R"({"dim": 24, "token_window": null})",
       "window_size: expected at least 1, or a token_window, got 0"},
      m("SoftCap", R"(, "score": {"soft_cap": 0})",
        "score.soft_cap: expected a finite positive number, got 0"),
      m("AlibiSlopes", R"(, "score": {"alibi_slopes": [1, 2, 3]})",
        "score.alibi_slopes: expected 8 slopes, one for each head, got 3"),
      m("Sinks", R"(, "sinks": 1)", "sinks: expected true or false, got 1"),
      m("RelativeBias", R"(, "relative_bias": true)",
        "relative_bias: expected false, because it is for token windows with bounded ends, got"),
      {"RelativeBiasEnd", "m",
       R"({"dim": 24, "token_window": {"left": 3, "right": -1}, "relative_bias": true})",
       "relative_bias: expected false, because it is for token windows with bounded ends, got"},
      {"RelativeBiasSize", "m",
       R"({"dim": 24, "token_window": {"left": 1099511627776}, "relative_bias": true})",
       "token_window.left: expected a side whose relative_bias has at most 2^40 values, got 10995"},
      m("FirstKeys", R"(, "first_keys": -1)", "first_keys: expected at least 0, got -1"),
      // Unknown.
      a("Unknown", R"(, "heads": 3)",
        "heads: expected a keyword argument of LocalAttention (window"),
      m("Unknown", R"(, "windowsize": 3)",
        "windowsize: expected a keyword argument of LocalMHA (dim,"),
      m("Autopad", R"(, "autopad": true)", "autopad: expected a keyword argument of LocalMHA"),
      m("Scale", R"(, "scale": 1)", "scale: expected a keyword argument of LocalMHA"),
      m("UnknownNull", R"(, "foo": null)", "foo: expected a keyword argument of LocalMHA"),
      m("UnknownEmpty", R"(, "": 1)", ": expected a keyword argument of LocalMHA"),
      t("Prenorm", R"(, "prenorm": true)", "prenorm: expected a keyword argument of LocalTransf"),
      t("Window", R"(, "window_size": 3)", "window_size: expected a keyword argument of LocalTr"),
      t("Rotary", R"(, "use_rotary_pos_emb": true)", "use_rotary_pos_emb: expected a keyword arg"),
      t("Dropout", R"(, "dropout": 0.1)", "dropout: expected a keyword argument of LocalTransf"),
      // Types.
      {"WindowText", "a", R"({"window_size": "6"})", "window_size: expected an integer, got \"6\""},
      {"WindowFloat", "a", R"({"window_size": 6.0})", "window_size: expected an integer, got 6.0"},
      {"WindowTrue", "a", R"({"window_size": true})", "window_size: expected an integer, got true"},
      {"WindowArray", "a", R"({"window_size": [6]})",
       "window_size: expected an integer, got an array"},
      {"WindowTooLarge", "a", R"({"window_size": 9223372036854775808})",
       "window_size: expected an integer, got 9223372036854775808"},
      a("CausalNumber", R"(, "causal": 1)", "causal: expected true or false, got 1"),
      a("CausalText", R"(, "causal": "True")", "causal: expected true or false, got \"True\""),
      a("DropoutText", R"(, "dropout": "0.1")", "dropout: expected a number, got \"0.1\""),
      a("ScaleTrue", R"(, "scale": true)", "scale: expected a number, got true"),
      a("DimFloat", R"(, "dim": 8.5)", "dim: expected an integer, got 8.5"),
      a("LookForwardText", R"(, "look_forward": "1")", "look_forward: expected an integer"),
      a("AutopadNumber", R"(, "autopad": 1)", "autopad: expected true or false, got 1"),
      a("LegacyNumber", R"(, "rel_pos_emb_config": 8)",
        "rel_pos_emb_config: expected [dim, heads]"),
      a("LegacyEmpty", R"(, "rel_pos_emb_config": [])",
        "rel_pos_emb_config: expected [dim, heads]"),
      a("LegacyText", R"(, "rel_pos_emb_config": ["8"])", "rel_pos_emb_config: expected [dim, he"),
      a("LegacyTooLarge", R"(, "rel_pos_emb_config": [18446744073709551615, 1])",
        "rel_pos_emb_config: expected [dim, heads]"),
      m("HeadsObject", R"(, "heads": {})", "heads: expected an integer, got an object"),
      m("PrenormNumber", R"(, "prenorm": 0)", "prenorm: expected true or false, got 0"),
      m("QkScaleText", R"(, "qk_scale": "8")", "qk_scale: expected a number, got \"8\""),
      m("XposScaleBaseText", R"(, "xpos_scale_base": "8")", "xpos_scale_base: expected a number"),
      m("ExactNumber", R"(, "exact_windowsize": 1)", "exact_windowsize: expected true or false"),
      m("LegacyOther", R"(, "rel_pos_emb_config": [8, 3])",
        "rel_pos_emb_config: expected [dim_head, heads] with the layer's dim_head, got 8 first"),
      m("LegacyEmpty", R"(, "rel_pos_emb_config": [])",
        "rel_pos_emb_config: expected [dim_head, heads] with the layer's dim_head, got an array"),
      m("LegacyNumber", R"(, "rel_pos_emb_config": 64)", "rel_pos_emb_config: expected [dim_head"),
      t("FfMultText", R"(, "ff_mult": "4")", "ff_mult: expected a number, got \"4\""),
      t("IgnoreIndexFloat", R"(, "ignore_index": -1.0)",
        "ignore_index: expected an integer, got -1.0"),
      t("DynamicText", R"(, "use_dynamic_pos_bias": "yes")", "use_dynamic_pos_bias: expected true"),
      // Not supported.
      m("SharedQk", R"(, "shared_qk": true)",
        "shared_qk: expected false, because a layer projects"),
      t("ResidualStreams", R"(, "num_residual_streams": 0)",
        "num_residual_streams: expected 1 to 1024 residual streams, got 0"),
      t("ResidualStreamsTrue", R"(, "num_residual_streams": true)",
        "num_residual_streams: expected an integer"),
      t("GlobalLayers", R"(, "layers_insert_global_attn": [1])",
        "layers_insert_global_attn: expected null, because global layers are not supported"),
      // Values.
      {"WindowZero", "a", R"({"window_size": 0})",
       "window_size: expected at least 1, or a token_window, got 0"},
      {"WindowNegativeWithXpos", "a", R"({"window_size": -3, "dim": 8, "use_xpos": true})",
       "window_size: expected at least 1, or a token_window, got -3"},
      a("LookForwardIfCausal", R"(, "causal": true, "look_forward": 1)",
        "look_forward: expected 0"),
      a("DropoutOne", R"(, "dropout": 1)", "dropout: expected a probability in [0, 1), got 1"),
      a("OddDim", R"(, "dim": 7)", "dim: expected an even number"),
      m("OddDimHead", R"(, "dim_head": 7)", "dim_head: expected an even number"),
      m("HugeHeads", R"(, "heads": 9223372036854775807)", "heads: expected at most 2^40"),
      m("XposScaleBaseZero", R"(, "use_xpos": true, "xpos_scale_base": 0)",
        "xpos_scale_base: expected at least 0.5, got 0"),
      t("WindowZero", R"(, "local_attn_window_size": 0)",
        "local_attn_window_size: expected at least 1"),
      t("FfMultNegative", R"(, "ff_mult": -4)", "ff_mult: expected positive"),
      // Half of a window of one is zero.
      {"AttentionXposOfWindow1", "a", R"({"window_size": 1, "dim": 8, "use_xpos": true})",
       "xpos_scale_base: expected a value, because the Python default, window_size // 2, is 0"},
      {"MhaXposOfWindow1", "m", R"({"dim": 8, "window_size": 1, "use_xpos": true})",
       "xpos_scale_base: expected a value, because the Python default, window_size // 2, is 0"},
      t("XposOfWindow1", R"(, "local_attn_window_size": 1, "use_xpos": true)",
        "because the Python default, local_attn_window_size // 2, is 0 for a window of 1"),
  };
}

class WrongKwargs : public testing::TestWithParam<Wrong> {};

TEST_P(WrongKwargs, NameTheArgumentWhatWasExpectedAndWhatCame) {
  const Wrong& wrong = GetParam();
  const json kwargs = parse_json(wrong.kwargs, "kwargs");
  const std::string message = message_of<std::invalid_argument>([&] {
    if (wrong.module == "a") local_attention_config(kwargs);
    if (wrong.module == "m") local_mha_config(kwargs);
    if (wrong.module == "t") local_transformer_config(kwargs);
  });
  EXPECT_NE(message.find(wrong.message), std::string::npos) << message;
  EXPECT_NE(message.find(": expected "), std::string::npos) << message;
  EXPECT_NE(message.find(", got "), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(, WrongKwargs, testing::ValuesIn(wrong_kwargs()),
                         [](const auto& test) { return test.param.name; });

// ---- Back to Python ----

template <typename Config, typename Read>
void expect_round_trip(const Config& config, const Read& read) {
  const json kwargs = to_kwargs(config);
  const Config again = read(parse_json(kwargs.dump(), "kwargs"));
  EXPECT_EQ(kwargs, to_kwargs(again));
  if constexpr (std::equality_comparable<Config>) EXPECT_EQ(config, again) << kwargs;
}

TEST(ToKwargs, ComeBack) {
  expect_round_trip(LocalAttentionConfig{.window_size = 6}, local_attention_config);
  expect_round_trip(LocalAttentionConfig{.window_size = 6,
                                         .look_backward = 2,
                                         .look_forward = 3,
                                         .dropout = 0.1,
                                         .shared_qk = true,
                                         .dim = 8,
                                         .exact_windowsize = true,
                                         .scale = 1. / 3,
                                         .use_xpos = true,
                                         .xpos_scale_base = 0.7},
                    local_attention_config);
  expect_round_trip(LocalMHAConfig{.dim = 24, .window_size = 6}, local_mha_config);
  expect_round_trip(LocalMHAConfig{.dim = 24,
                                   .window_size = 1,
                                   .dim_head = 7,
                                   .heads = 3,
                                   .dropout = 0.3,
                                   .causal = true,
                                   .prenorm = true,
                                   .qk_rmsnorm = true,
                                   .qk_scale = 1e-3,
                                   .exact_windowsize = false,
                                   .look_backward = 0,
                                   .look_forward = 0,
                                   .use_rotary_pos_emb = false,
                                   .gate_values_per_head = true,
                                   .qkv_bias = true,
                                   .out_bias = true},
                    local_mha_config);
  expect_round_trip(LocalTransformerConfig{.num_tokens = 3, .max_seq_len = 5, .dim = 4, .depth = 0},
                    local_transformer_config);
  expect_round_trip(LocalTransformerConfig{.num_tokens = 3,
                                           .max_seq_len = 5,
                                           .dim = 4,
                                           .depth = 7,
                                           .causal = false,
                                           .local_attn_window_size = 1,
                                           .dim_head = 6,
                                           .heads = 1,
                                           .ff_mult = 8. / 3,
                                           .attn_dropout = 0.1,
                                           .ff_dropout = 0.2,
                                           .ignore_index = -100,
                                           .use_xpos = true,
                                           .xpos_scale_base = 1.5,
                                           .qk_rmsnorm = true,
                                           .look_backward = 3,
                                           .look_forward = 2},
                    local_transformer_config);
}

// Written explicitly, because Python's default would be half the window.
TEST(ToKwargs, KeepTheSquareRootThatStandsForAnEmptyXposScaleBase) {
  const LocalMHAConfig layer{.dim = 25, .window_size = 6, .use_xpos = true};
  EXPECT_EQ(to_kwargs(layer)["xpos_scale_base"], 5.);
  EXPECT_EQ(local_mha_config(to_kwargs(layer)).xpos_scale_base, 5);
  const LocalAttentionConfig inner{.window_size = 6, .dim = 16, .use_xpos = true};
  EXPECT_EQ(to_kwargs(inner)["xpos_scale_base"], 4.);
  const LocalTransformerConfig model{
      .num_tokens = 3, .max_seq_len = 5, .dim = 36, .depth = 1, .use_xpos = true};
  EXPECT_EQ(to_kwargs(model)["xpos_scale_base"], 6.);
  EXPECT_FALSE(to_kwargs(LocalMHAConfig{.dim = 25, .window_size = 6}).contains("xpos_scale_base"));
}

TEST(ToKwargs, HaveWhatPythonDoesNotOnlyWhereItIsAskedFor) {
  const LocalMHAConfig plain{.dim = 24, .window_size = 6};
  for (const char* key :
       {"qkv_bias", "out_bias", "softmax_scale", "rotary", "qk_norm", "norm", "kv_heads",
        "token_window", "score", "sinks", "relative_bias", "first_keys"})
    EXPECT_FALSE(to_kwargs(plain).contains(key)) << key;
  LocalMHAConfig all{.dim = 24, .window_size = 6, .dim_head = 12};
  all.qkv_bias = all.out_bias = true;
  all.scale = 1. / 3;
  all.prenorm = true;
  all.norm = {.kind = local_mha::NormKind::rms, .eps = 1e-6};
  all.qk_norm = {.kind = local_mha::QkNormKind::rms_all, .eps = 1e-5};
  all.rotary = {.theta = 1e6,
                .rotary_dim = 4,
                .pairing = local_mha::RotaryPairing::interleaved,
                .inv_freq = {1, 1. / 3},
                .factor = 1.1};
  expect_round_trip(all, local_mha_config);
  EXPECT_EQ(local_mha_config(to_kwargs(all)), all);
  LocalMHAConfig sliding{.dim = 24, .heads = 2, .kv_heads = 1};
  sliding.score.soft_cap = 1. / 3;
  sliding.sinks = sliding.relative_bias = true;
  sliding.first_keys = 4;
  for (const local_mha::TokenWindow window : {local_mha::TokenWindow{.left = 3, .right = 5},
                                              local_mha::TokenWindow{.left = 0, .right = 0}}) {
    sliding.token_window = window;
    expect_round_trip(sliding, local_mha_config);
    EXPECT_EQ(local_mha_config(to_kwargs(sliding)), sliding);
  }
  sliding.relative_bias = false;
  sliding.score = {.alibi_slopes = {0.5, 1. / 3}};
  sliding.token_window = {local_mha::TokenWindow::unbounded, 2};
  EXPECT_EQ(to_kwargs(sliding)["token_window"]["left"], -1);
  EXPECT_EQ(local_mha_config(to_kwargs(sliding)), sliding);
  const LocalAttentionConfig inner{.window_size = 6, .dim = 12, .rotary = all.rotary};
  EXPECT_FALSE(to_kwargs(LocalAttentionConfig{.window_size = 6}).contains("rotary"));
  EXPECT_EQ(local_attention_config(to_kwargs(inner)), inner);
}

TEST(ToKwargs, OfATransformerHaveLayersOnlyWherePythonHasNone) {
  LocalTransformerConfig model{.num_tokens = 3, .max_seq_len = 5, .dim = 24, .depth = 2};
  model.local_attn_window_size = 6;
  model.heads = 4;
  model.qk_rmsnorm = true;
  const json plain = to_kwargs(model);
  EXPECT_FALSE(plain.contains("layers"));
  model.layers = {layer_config(model)};
  EXPECT_EQ(to_kwargs(model), plain);
  model.layers.assign(2, model.layers.front());
  EXPECT_EQ(to_kwargs(model), plain);

  LocalMHAConfig& layer = model.layers[1];
  layer.kv_heads = 2;
  layer.sinks = true;
  layer.token_window = {local_mha::TokenWindow::unbounded, 0};
  layer.window_size = 0;
  model.local_attn_window_size = 512;
  const json kwargs = to_kwargs(model);
  for (const char* key : {"causal", "heads", "local_attn_window_size", "qk_rmsnorm"})
    EXPECT_FALSE(kwargs.contains(key)) << key;
  const LocalTransformerConfig read = local_transformer_config(kwargs);
  EXPECT_EQ(read.layers, model.layers);
  EXPECT_EQ(encoder_config(read), encoder_config(model));
  expect_round_trip(read, local_transformer_config);

  const auto refused = [&](auto change) {
    json changed = kwargs;
    change(changed);
    return message_of<std::invalid_argument>([&] { local_transformer_config(changed); });
  };
  EXPECT_EQ(refused([](json& k) { k["layers"] = 3; }),
            "layers: expected a list of keyword arguments, got 3");
  EXPECT_EQ(refused([](json& k) { k["depth"] = 3; }),
            "layers: expected 1, or as many as the depth, 3, got 2");
  EXPECT_EQ(refused([](json& k) { k["heads"] = 3; }),
            "heads: expected its default, or what layers[0].heads is, got 3");
  EXPECT_EQ(refused([](json& k) { k["layers"][1]["kv_heads"] = 3; }),
            "kv_heads: expected a divisor of the 4 heads, got 3");
}

TEST(ToKwargs, OfATransformerSayHowManyResidualStreams) {
  // Python's default is another one.
  LocalTransformerConfig model{.num_tokens = 3, .max_seq_len = 5, .dim = 4, .depth = 1};
  EXPECT_EQ(to_kwargs(model)["num_residual_streams"], 1);
  model.num_residual_streams = 4;
  EXPECT_EQ(to_kwargs(model)["num_residual_streams"], 4);
  EXPECT_EQ(local_transformer_config(to_kwargs(model)).num_residual_streams, 4);
}

// ---- JSON ----

TEST(ParseJson, TakesJson) {
  EXPECT_EQ(parse_json(R"( {"a": [1, {"a": null}], "b": {"a": 2}} )", "x"),
            json::parse(R"({"a": [1, {"a": null}], "b": {"a": 2}})"));
  EXPECT_EQ(parse_json("3", "x"), 3);
  std::string nested = "1";
  for (int level = 0; level < 32; ++level) nested = "[" + nested + "]";
  EXPECT_TRUE(parse_json(nested, "x").is_array());
}

TEST(ParseJson, RejectsTheRestNamingTheArgument) {
  const auto rejected = [](std::string_view text) {
    const std::string message =
        message_of<std::invalid_argument>([&] { static_cast<void>(parse_json(text, "case")); });
    EXPECT_TRUE(message.starts_with("case: expected JSON")) << message;
    EXPECT_LT(message.size(), 400U);
    return message;
  };
  const auto has = [](const std::string& text, std::string_view part) {
    return text.find(part) != std::string::npos;
  };
  EXPECT_TRUE(has(rejected(""), "byte") || has(rejected(""), "column"));
  rejected("{");
  rejected("{} {}");
  rejected("{'a': 1}");
  rejected("// comment\n{}");
  rejected("NaN");
  rejected("1e999");
  rejected("\"\xff\"");
  EXPECT_TRUE(has(rejected(std::string_view("{}\0", 3)), "a null byte at byte 2"));
  EXPECT_TRUE(has(rejected(R"({"a": 1, "a": 2})"), "'a' twice"));
  EXPECT_TRUE(has(rejected(R"([{"b": {"a": 1, "x": {}, "\u0061": 2}}])"), "'a' twice"));
  EXPECT_TRUE(has(rejected(std::string(100'000, '[')), "at most 32 levels"));
  std::string objects;
  for (int level = 0; level < 100'000; ++level) objects += R"({"":)";
  EXPECT_TRUE(has(rejected(objects), "at most 32 levels"));
  rejected("\"" + std::string(100'000, 'x'));
}

}  // namespace kwargs_test
