// SPDX-License-Identifier: MIT
// Attention layers of published models as their files describe them: what is read, and what is
// refused.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/core/random.hpp>
#include <local_mha/io/attention_case.hpp>
#include <local_mha/io/attention_layers.hpp>
#include <local_mha/io/longformer_layers.hpp>
#include <local_mha/local_mha.hpp>

#include "io/file_builder.hpp"
#include "reference/bias.hpp"
#include "reference/frequencies.hpp"

namespace load_attention_test {

using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::RandomSequence;
namespace io = local_mha::io;
using io::AttentionLayer;
using io::SafetensorsFile;
using Json = nlohmann::json;

/// A layer of a small model: a file with its tensors, and its configuration.
struct Model {
  std::string prefix = "model.layers.3.self_attn";
  Json config;
  std::map<std::string, std::vector<Index>> shapes;  // behind the prefix

  SafetensorsFile file() const {
    io::SafetensorsWriter writer;
    RandomSequence random(1);
    for (const auto& [name, shape] : shapes) {
      Index size = 1;
      for (const Index extent : shape) size *= extent;
      std::vector<double> numbers(static_cast<std::size_t>(size));
      for (double& number : numbers) number = random.uniform() - 0.5;
      const bool is_elsewhere = name.starts_with('/');
      writer.add(is_elsewhere ? name.substr(1) : prefix + '.' + name, shape, numbers);
    }
    return SafetensorsFile::from_bytes(writer.bytes(), "model");
  }
  AttentionLayer layer() const { return io::attention_layer(file(), prefix, config); }
  LocalMHA<double> load() const { return io::load_attention<double>(file(), prefix, config); }

  /// What load() says against it.
  std::string error() const {
    try {
      load();
    } catch (const std::invalid_argument& error) {
      return error.what();
    } catch (const io::SafetensorsError& refused) {
      return refused.what();
    }
    return "no error";
  }
};

Model decoder(const char* model_type, Json members = Json::object()) {
  Json config{{"model_type", model_type},       {"hidden_size", 12}, {"num_attention_heads", 3},
              {"num_key_value_heads", nullptr}, {"head_dim", 4},     {"sliding_window", 5}};
  config.update(members);
  return {.config = config,
          .shapes = {{"q_proj.weight", {12, 12}},
                     {"k_proj.weight", {12, 12}},
                     {"v_proj.weight", {12, 12}},
                     {"o_proj.weight", {12, 12}}}};
}

Model with_norms(Model model) {
  model.shapes["q_norm.weight"] = model.shapes["k_norm.weight"] = {4};
  return model;
}

testing::AssertionResult says(const std::string& message, const std::string& part) {
  if (message.find(part) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << message << "\ninstead of\n" << part;
}

TEST(LoadedAttention, ReadsTheConfigurationFromItsFile) {
  const io_test::TemporaryFolder folder;
  io_test::write_file(folder / "config.json", io_test::to_bytes(R"({"model_type": "mistral"})"));
  EXPECT_EQ(io::read_model_config(folder / "config.json"), Json({{"model_type", "mistral"}}));
  io_test::write_file(folder / "config.json", io_test::to_bytes(R"({"a": 1, "a": 2})"));
  EXPECT_THROW(io::read_model_config(folder / "config.json"), std::invalid_argument);
  EXPECT_THROW(io::read_model_config(folder / "none.json"), io::SafetensorsError);
}

TEST(LoadedAttention, TakesAPrefixWithOrWithoutADot) {
  Model model = decoder("mistral");
  const auto a = model.load();
  const auto b = io::load_attention<double>(model.file(), model.prefix + '.', model.config);
  EXPECT_EQ(a.config(), b.config());
  EXPECT_EQ(a.parameters().to_qkv, b.parameters().to_qkv);
}

TEST(LoadedAttention, IsThatOfTheLanguageModelOfSeveral) {
  Model model = decoder("mistral");
  model.config = {{"model_type", "mistral3"}, {"text_config", model.config}};
  EXPECT_EQ(model.layer().model_type, "mistral");
  EXPECT_EQ(model.layer().config.token_window, (local_mha::TokenWindow{4, 0}));
}

TEST(LoadedAttention, HasTheBiasesThatAreThere) {
  Model model = decoder("qwen2", {{"use_sliding_window", true}, {"max_window_layers", 0}});
  for (const char* name : {"q_proj.bias", "k_proj.bias", "v_proj.bias"}) model.shapes[name] = {12};
  const auto layer = model.load();
  EXPECT_TRUE(layer.config().qkv_bias);
  EXPECT_FALSE(layer.config().out_bias);
  EXPECT_EQ(layer.parameters().to_qkv_bias.tail(12),
            (Eigen::Map<const local_mha::Vector<double>>(
                model.file().read<double>(model.prefix + ".v_proj.bias").data(), 12)));
  model.shapes.erase("k_proj.bias");
  EXPECT_TRUE(
      says(model.error(), "k_proj.bias': expected F64, F32, F16 or BF16 [12], got no such"));
  // Or are said to be there.
  EXPECT_TRUE(says(decoder("ministral", {{"attention_bias", true}}).error(),
                   "q_proj.bias': expected F64, F32, F16 or BF16 [12], got no such tensor"));
}

TEST(LoadedAttention, OfFusedProjectionsHasTheBiasOfThese) {
  Model model = decoder("phi3");
  // The last is nobody's.
  model.shapes = {{"qkv_proj.weight", {36, 12}}, {"o_proj.weight", {12, 12}}, {".bias", {36}}};
  EXPECT_FALSE(model.layer().config.qkv_bias);
  EXPECT_TRUE(says(model.error(), "self_attn..bias': expected no such tensor"));
  model.shapes.erase(".bias");
  model.shapes["qkv_proj.bias"] = {36};
  const auto layer = model.load();
  ASSERT_TRUE(layer.config().qkv_bias);
  EXPECT_EQ(layer.parameters().to_qkv_bias,
            (Eigen::Map<const local_mha::Vector<double>>(
                model.file().read<double>(model.prefix + ".qkv_proj.bias").data(), 36)));
}

TEST(LoadedAttention, KnowsWhichLayersSlide) {
  const auto sliding = [](Model model, Index layers) {
    std::string drawn;
    for (Index i = 0; i < layers; ++i) {
      model.prefix = "model.layers." + std::to_string(i) + ".self_attn";
      try {
        model.layer();
        drawn += 's';
      } catch (const std::invalid_argument& error) {
        EXPECT_TRUE(says(error.what(), "prefix: expected a layer of"));
        EXPECT_TRUE(says(error.what(), "that slides, got layer " + std::to_string(i)));
        drawn += '.';
      }
    }
    return drawn;
  };
  EXPECT_EQ(sliding(decoder("mistral"), 3), "sss");
  EXPECT_EQ(sliding(decoder("mistral", {{"sliding_window", nullptr}}), 3), "...");
  EXPECT_EQ(sliding(decoder("phi3", {{"sliding_window", nullptr}}), 2), "..");
  EXPECT_EQ(sliding(decoder("qwen2"), 30), std::string(30, '.'));
  const Json used{{"use_sliding_window", true}};
  EXPECT_EQ(sliding(decoder("qwen2", used), 30), std::string(28, '.') + "ss");
  const Json from_1{{"use_sliding_window", true}, {"max_window_layers", 1}};
  EXPECT_EQ(sliding(decoder("qwen3", from_1), 3), ".ss");
  EXPECT_EQ(sliding(decoder("qwen3_moe", used), 3), "sss");
  const Json scalar{{"query_pre_attn_scalar", 4}};
  EXPECT_EQ(sliding(decoder("gemma2", scalar), 4), "s.s.");
  EXPECT_EQ(sliding(decoder("gemma3_text", scalar), 8), "sssss.ss");
  EXPECT_EQ(sliding(decoder("gpt_oss"), 4), "s.s.");
  EXPECT_EQ(sliding(decoder("cohere2"), 5), "sss.s");
  EXPECT_EQ(sliding(decoder("cohere2", {{"sliding_window_pattern", 2}}), 5), "s.s.s");
  EXPECT_EQ(sliding(decoder("olmo3"), 5), "sss.s");
  EXPECT_EQ(sliding(decoder("exaone4"), 5), "sss.s");
  EXPECT_EQ(sliding(decoder("modernbert", {{"local_attention", 4}}), 5), ".ss.s");
  const Json every_other{{"local_attention", 4}, {"global_attn_every_n_layers", 2}};
  EXPECT_EQ(sliding(decoder("modernbert", every_other), 5), ".s.s.");
  EXPECT_EQ(
      sliding(decoder("smollm3", {{"use_sliding_window", true}, {"no_rope_layers", {1, 1, 0}}}), 3),
      "..s");
  EXPECT_EQ(sliding(decoder("gpt_neo", {{"num_heads", 3},
                                        {"window_size", 4},
                                        {"attention_layers", {"global", "local"}}}),
                    2),
            ".s");
  // What the configuration lists counts.
  const Json listed{{"layer_types", {"full_attention", "sliding_attention"}},
                    {"query_pre_attn_scalar", 4}};
  for (const char* family : {"mistral", "ministral", "qwen2", "gemma2", "gpt_oss", "modernbert"})
    EXPECT_EQ(sliding(decoder(family, listed), 2), ".s") << family;
  Model past = decoder("ministral", listed);
  EXPECT_TRUE(says(past.error(), "config.layer_types: expected an element for layer 3, got 2"));
  past.prefix = "model.layers.0.self_attn";
  EXPECT_TRUE(says(past.error(), "which is 'full_attention' in config.layer_types"));
  for (const char* prefix : {"model.layers.9223372036854775807.self_attn", "model.-1"}) {
    past.prefix = prefix;
    EXPECT_TRUE(says(past.error(), "prefix: expected the layer's number"));
  }
  past.prefix = "attention";
  EXPECT_TRUE(says(past.error(),
                   "prefix: expected the layer's number, as in model.layers.0.self_attn, got "));
  EXPECT_TRUE(says(decoder("mistral", {{"sliding_window", nullptr}}).error(),
                   "prefix: expected a layer of mistral that slides, got layer 3, where "
                   "config.sliding_window is none"));
  EXPECT_TRUE(says(decoder("qwen2", {{"use_sliding_window", false}}).error(),
                   "where config.use_sliding_window is false"));
}

TEST(LoadedAttention, HasTheWindowOfItsFamily) {
  using local_mha::TokenWindow;
  EXPECT_EQ(decoder("mistral").layer().config.token_window, (TokenWindow{4, 0}));
  Model encoder = decoder("modernbert", {{"local_attention", 6}});
  encoder.prefix = "layers.1.attn";
  EXPECT_EQ(encoder.layer().config.token_window, (TokenWindow{3, 3}));
  encoder.config.erase("local_attention");
  EXPECT_EQ(encoder.layer().config.token_window, (TokenWindow{5, 5}));
  encoder.config["model_type"] = "modernbert-decoder";
  EXPECT_EQ(encoder.layer().config.token_window, (TokenWindow{4, 0}));
  EXPECT_TRUE(encoder.layer().config.causal);
}

TEST(LoadedAttention, NamesTheTensorThatDoesNotFit) {
  Model model = decoder("mistral");
  model.shapes.erase("v_proj.weight");
  EXPECT_TRUE(says(model.error(),
                   "model: tensor 'model.layers.3.self_attn.v_proj.weight': expected F64, F32, F16 "
                   "or BF16 [12, 12], got no such tensor"));
  model = decoder("mistral", {{"num_key_value_heads", 1}});
  EXPECT_TRUE(says(model.error(),
                   "k_proj.weight': expected F64, F32, F16 or BF16 [4, 12], got F64 "
                   "[12, 12]"));
  model = decoder("mistral");
  model.shapes["q_norm.weight"] = {4};
  EXPECT_TRUE(
      says(model.error(), "q_norm.weight': expected no such tensor for this configuration"));
  EXPECT_TRUE(says(
      decoder("qwen3", {{"layer_types", Json::array({"", "", "", "sliding_attention"})}}).error(),
      "q_norm.weight': expected"));
  EXPECT_TRUE(says(
      decoder("gpt_oss", {{"layer_types", Json::array({"", "", "", "sliding_attention"})}}).error(),
      "sinks': expected"));
  // Other layers' are theirs.
  model = decoder("mistral");
  model.shapes["/model.layers.30.self_attn.q_proj.weight"] = {1};
  EXPECT_EQ(model.error(), "no error");
}

TEST(LoadedAttention, NamesTheMemberThatDoesNotFit) {
  const auto error = [](Json members) { return decoder("mistral", members).error(); };
  EXPECT_TRUE(says(error({{"model_type", "llama"}}),
                   "config.model_type: expected one of mistral, mixtral, "));
  EXPECT_TRUE(says(error({{"model_type", nullptr}}), "config.model_type: expected a value"));
  EXPECT_TRUE(says(error({{"hidden_size", nullptr}}),
                   "config.hidden_size: expected a value, because the layer needs it, got none"));
  EXPECT_TRUE(says(error({{"hidden_size", "12"}}), "config.hidden_size: expected an integer"));
  EXPECT_TRUE(says(error({{"hidden_size", 0}}), "config.hidden_size: expected at least 1, got 0"));
  EXPECT_TRUE(says(error({{"num_attention_heads", 0}}), "config.num_attention_heads: expected"));
  EXPECT_TRUE(says(error({{"num_key_value_heads", 2}}), "kv_heads: expected a divisor of the 3"));
  EXPECT_TRUE(says(error({{"head_dim", 0}}), "config.head_dim: expected at least 1, got 0"));
  EXPECT_TRUE(says(error({{"head_dim", 1 << 30}}), "config.head_dim: expected 1 to 2^20"));
  EXPECT_TRUE(says(error({{"hidden_size", std::int64_t{1} << 62}}), "dim: expected at most 2^40"));
  EXPECT_TRUE(says(error({{"sliding_window", -1}}), "config.sliding_window: expected at least 1"));
  EXPECT_TRUE(
      says(error({{"sliding_window", true}}), "config.sliding_window: expected an integer"));
  EXPECT_TRUE(says(error({{"attention_dropout", 2}}), "dropout: expected a probability"));
  EXPECT_TRUE(says(error({{"rope_theta", "x"}}), "config.rope_theta: expected a number"));
  EXPECT_TRUE(says(error({{"rope_theta", -1}}), "rotary.theta: expected"));
  EXPECT_TRUE(says(error({{"partial_rotary_factor", 1.5}}), "partial_rotary_factor: expected a"));
  EXPECT_TRUE(says(error({{"rope_scaling", 1}}), "config.rope_scaling: expected a JSON object"));
  const auto rope_error = [&](Json rope) { return error({{"rope_scaling", rope}}); };
  EXPECT_TRUE(says(rope_error({{"rope_type", "longrope"}}),
                   "config.rope_scaling.rope_type: expected default, linear, llama3 or yarn, whose "
                   "frequencies are constant, got 'longrope'"));
  EXPECT_TRUE(says(rope_error({{"type", "dynamic"}}), "got 'dynamic'"));
  EXPECT_TRUE(says(rope_error({{"type", "linear"}}), "rope_scaling.factor: expected a value"));
  EXPECT_TRUE(says(rope_error({{"type", "linear"}, {"factor", 0}}),
                   "config.rope_scaling.factor: expected a positive finite number, got 0"));
  EXPECT_TRUE(says(rope_error({{"type", "yarn"}, {"factor", 2}}),
                   "config.max_position_embeddings: expected a value"));
  EXPECT_TRUE(says(rope_error({{"type", "llama3"},
                               {"factor", 2},
                               {"original_max_position_embeddings", 8},
                               {"low_freq_factor", 4},
                               {"high_freq_factor", 4}}),
                   "config.rope_scaling.high_freq_factor: expected more than low_freq_factor"));
  const Json bidirectional{{"query_pre_attn_scalar", 4},
                           {"use_bidirectional_attention", true},
                           {"layer_types", Json::array({"", "", "", "sliding_attention"})}};
  EXPECT_TRUE(says(decoder("gemma3", bidirectional).error(),
                   "config.use_bidirectional_attention: expected false, got 1"));
  EXPECT_TRUE(says(decoder("gemma2", {{"sliding_window_pattern", 8}}).error(),
                   "config.query_pre_attn_scalar: expected a value"));
}

/// The rotary embedding of a layer with these members.
local_mha::RotaryConfig rotary_of(const char* family, Json members) {
  members["head_dim"] = 16;
  members["layer_types"] = {"", "", "", "sliding_attention"};
  members["query_pre_attn_scalar"] = 4;
  return decoder(family, members).layer().config.rotary;
}

TEST(LoadedAttention, TurnsByTheFrequenciesOfItsConfiguration) {
  const auto plain = rotary_of("mistral", {{"rope_theta", 1e6}});
  EXPECT_EQ(plain.theta, 1e6);
  EXPECT_TRUE(plain.inv_freq.empty());
  EXPECT_EQ(rotary_of("mistral", {{"rope_parameters", {{"rope_theta", 5e5}}}}).theta, 5e5);
  EXPECT_EQ(rotary_of("phi3", {{"partial_rotary_factor", 0.75}}).rotary_dim, 12);
  EXPECT_EQ(rotary_of("cohere2", Json::object()).pairing, local_mha::RotaryPairing::interleaved);

  const auto linear = rotary_of("mistral", {{"rope_scaling", {{"type", "linear"}, {"factor", 4}}}});
  const auto frequencies = reference::plain_frequencies(10000, 16);
  for (std::size_t m = 0; m < 8; ++m) EXPECT_DOUBLE_EQ(linear.inv_freq[m], frequencies[m] / 4);

  for (const bool truncate : {true, false}) {
    const auto yarn = rotary_of("mistral", {{"rope_theta", 150000},
                                            {"rope_scaling",
                                             {{"rope_type", "yarn"},
                                              {"factor", 32},
                                              {"truncate", truncate},
                                              {"original_max_position_embeddings", 4096}}}});
    const auto expected = reference::yarn_frequencies(
        {.theta = 150000, .factor = 32, .original_length = 4096, .truncate = truncate}, 16);
    for (std::size_t m = 0; m < 8; ++m) EXPECT_NEAR(yarn.inv_freq[m], expected[m], 1e-15);
    EXPECT_DOUBLE_EQ(yarn.factor, reference::yarn_scale(32));
  }
  const auto given_factor = rotary_of(
      "mistral",
      {{"max_position_embeddings", 4096},
       {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 32}, {"attention_factor", 1.25}}}});
  EXPECT_EQ(given_factor.factor, 1.25);
  const auto llama3 = rotary_of("mistral", {{"rope_scaling",
                                             {{"rope_type", "llama3"},
                                              {"factor", 8},
                                              {"low_freq_factor", 1},
                                              {"high_freq_factor", 4},
                                              {"original_max_position_embeddings", 8192}}}});
  const auto expected = reference::llama3_frequencies(
      {.factor = 8, .low_freq_factor = 1, .high_freq_factor = 4, .original_length = 8192}, 16);
  for (std::size_t m = 0; m < 8; ++m) EXPECT_NEAR(llama3.inv_freq[m], expected[m], 1e-15);
}

TEST(LoadedAttention, TurnsByTheThetaOfLayersThatSlide) {
  const Json stretched{{"rope_type", "linear"}, {"factor", 8}};
  // As older files have them, where what stretches is of the other layers.
  const auto gemma = rotary_of(
      "gemma3", {{"rope_theta", 1e6}, {"rope_local_base_freq", 2e4}, {"rope_scaling", stretched}});
  EXPECT_EQ(gemma.theta, 2e4);
  EXPECT_TRUE(gemma.inv_freq.empty());
  EXPECT_EQ(rotary_of("gemma3", {{"rope_theta", 1e6}}).theta, 10000);
  EXPECT_EQ(rotary_of("modernbert", {{"global_rope_theta", 1e6}, {"local_rope_theta", 3e4}}).theta,
            3e4);
  // As newer ones.
  const Json by_kind{{"sliding_attention", {{"rope_theta", 4e4}, {"rope_type", "default"}}},
                     {"full_attention", {{"rope_theta", 1e6}, {"rope_type", "yarn"}}}};
  for (const char* family : {"gemma3", "modernbert", "mistral"})
    EXPECT_EQ(rotary_of(family, {{"rope_parameters", by_kind}}).theta, 4e4) << family;
  // OLMo 3's sliding layers read theta above them, and are not stretched.
  EXPECT_EQ(rotary_of("olmo3", {{"rope_parameters", by_kind}}).theta, 10000);
  const auto olmo = rotary_of("olmo3", {{"rope_theta", 5e5}, {"rope_scaling", stretched}});
  EXPECT_EQ(olmo.theta, 5e5);
  EXPECT_TRUE(olmo.inv_freq.empty());
}

TEST(LoadedAttention, ChecksRotaryBuffersOfOlderFiles) {
  Model model = decoder("mistral");
  model.shapes["rotary_emb.inv_freq"] = {2};
  EXPECT_TRUE(says(model.error(), "rotary_emb.inv_freq': expected 1.0 at 0, got"));
  EXPECT_NO_THROW(io::load_attention<float>(model.file(), model.prefix, model.config,
                                            io::RotaryBuffers::ignore));
}

Model long_t5(const std::string& prefix) {
  const std::string block_0 = "/encoder.block.0.layer.0.LocalSelfAttention.";
  return {.prefix = prefix,
          .config = {{"model_type", "longt5"},
                     {"d_model", 6},
                     {"num_heads", 3},
                     {"d_kv", 2},
                     {"local_radius", 40},
                     {"encoder_attention_type", "local"}},
          .shapes = {{"q.weight", {6, 6}},
                     {"k.weight", {6, 6}},
                     {"v.weight", {6, 6}},
                     {"o.weight", {6, 6}},
                     {block_0 + "relative_attention_bias.weight", {32, 3}}}};
}

TEST(LoadedAttention, SharesTheBiasOfLongT5sFirstBlock) {
  const Model model = long_t5("encoder.block.2.layer.0.LocalSelfAttention");
  const auto layer = model.load();
  const auto table = model.file().read<double>(
      "encoder.block.0.layer.0.LocalSelfAttention.relative_attention_bias.weight");
  for (Index ahead = -40; ahead <= 40; ++ahead) {
    const Index bucket = reference::bucket_of({}, ahead);
    EXPECT_EQ(layer.parameters().relative_bias(1, ahead + 40),
              table[static_cast<std::size_t>(3 * bucket + 1)])
        << ahead;
  }
  EXPECT_EQ(layer.config().scale, 1);
  Model without = model;
  without.shapes.erase(
      "/encoder.block.0.layer.0.LocalSelfAttention.relative_attention_bias.weight");
  EXPECT_TRUE(says(without.error(),
                   "encoder.block.0.layer.0.LocalSelfAttention.relative_attention_bias.weight': "
                   "expected F64, F32, F16 or BF16 [32, 3], got no such tensor"));
  without.config["encoder_attention_type"] = "transient-global";
  EXPECT_TRUE(says(without.error(), "config.encoder_attention_type: expected local, got"));
  without.config.erase("encoder_attention_type");
  without.config["relative_attention_max_distance"] = 8;
  EXPECT_TRUE(says(without.error(),
                   "config.relative_attention_max_distance: expected more than a quarter of the 32 "
                   "buckets, got 8"));
  without.config["relative_attention_num_buckets"] = 3;
  EXPECT_TRUE(says(without.error(), "config.relative_attention_num_buckets: expected 4 to 2^20"));
  without.config["local_radius"] = 1 << 30;
  EXPECT_TRUE(says(without.error(), "config.local_radius: expected at most 2^24"));
  EXPECT_TRUE(says(long_t5("decoder.block.0.layer.0.SelfAttention").error(),
                   "prefix: expected a layer that slides, one of the encoder"));
}

TEST(LoadedAttention, OfGraniteHasSinksAndAScale) {
  Model model = decoder("granite_swa", {{"attention_multiplier", 0.25}});
  EXPECT_TRUE(says(model.error(), "sinks"));
  model.shapes["sinks"] = {model.config["num_attention_heads"].get<Index>()};
  const auto layer = model.load();
  EXPECT_EQ(layer.config().scale, 0.25);
  EXPECT_TRUE(layer.config().sinks);
  EXPECT_EQ(layer.parameters().sinks[1], model.file().read<double>(model.prefix + ".sinks")[1]);
}

TEST(LoadedAttention, OfLongformerIsLoadedByItsOwnFunction) {
  EXPECT_TRUE(says(decoder("longformer").error(),
                   "config.model_type: expected another one, because it is load_longformer() that "
                   "reads it, got 'longformer'"));
  Model model{.prefix = "encoder.layers.1.self_attn.longformer_self_attn",
              .config = {{"model_type", "led"},
                         {"d_model", 6},
                         {"encoder_attention_heads", 3},
                         {"attention_window", {4, 8}}},
              .shapes = {}};
  for (const char* name : {"query", "key", "value"})
    for (const char* of : {"", "_global"}) {
      model.shapes[std::string(name) + of + ".weight"] = {6, 6};
      model.shapes[std::string(name) + of + ".bias"] = {6};
    }
  const auto layer = io::load_longformer<double>(model.file(), model.prefix, model.config);
  EXPECT_EQ(layer.config(), (local_mha::LongformerConfig{6, 3, 8, 0}));
  EXPECT_EQ(layer.parameters().to_qkv_global(13, 2),
            model.file().read<double>(model.prefix + ".value_global.weight")[6 + 2]);
  EXPECT_THROW(io::longformer_layer(model.config), std::invalid_argument);
  Json same_everywhere = model.config;
  same_everywhere["attention_window"] = 6;
  EXPECT_EQ(io::longformer_layer(same_everywhere).config,
            (local_mha::LongformerConfig{6, 3, 6, 0}));
  model.shapes.erase("key_global.bias");
  EXPECT_THROW(io::load_longformer<double>(model.file(), model.prefix, model.config),
               io::SafetensorsError);
}

TEST(LoadedAttention, OfReformerIsALocalLayer) {
  Model model{
      .prefix = "encoder.layers.1.attention.self_attention",
      .config = {{"model_type", "reformer"},
                 {"hidden_size", 6},
                 {"num_attention_heads", 3},
                 {"attention_head_size", 2},
                 {"local_attn_chunk_length", 4},
                 {"is_decoder", true},
                 {"attn_layers", {"local", "lsh"}}},
      .shapes = {{"query.weight", {6, 6}}, {"key.weight", {6, 6}}, {"value.weight", {6, 6}}}};
  EXPECT_TRUE(says(model.error(), "layer 1, which is 'lsh' in config.attn_layers"));
  model.prefix = "encoder.layers.0.attention.self_attention";
  EXPECT_EQ(model.load().parameters().to_out, (local_mha::RowMatrix<double>::Identity(6, 6)));
  model.config["attention_head_size"] = 4;
  EXPECT_TRUE(says(model.error(),
                   "config.attention_head_size: expected 6 channels of all heads, those of the "
                   "input, because the module has no output projection, got 12"));
  model.config["attention_head_size"] = 2;
  model.config["is_decoder"] = false;
  EXPECT_TRUE(says(model.error(),
                   "config.is_decoder: expected true, because otherwise the first chunks look "
                   "round to the last ones, got false"));
  model.config["local_num_chunks_before"] = 0;
  EXPECT_FALSE(model.load().config().causal);
}

TEST(LoadedAttention, OfGptNeoHasNoScale) {
  Model model = decoder(
      "gpt_neo", {{"num_heads", 3}, {"window_size", 4}, {"attention_layers", {"global", "local"}}});
  model.prefix = "transformer.h.1.attn.attention";
  model.shapes.erase("o_proj.weight");
  model.shapes["out_proj.weight"] = {12, 12};
  model.shapes["out_proj.bias"] = {12};
  model.shapes["bias"] = {1, 1, 8, 8};
  const auto layer = model.load();
  EXPECT_EQ(layer.config().scale, 1);
  EXPECT_FALSE(layer.config().use_rotary_pos_emb);
  EXPECT_TRUE(layer.config().out_bias);
  EXPECT_EQ(layer.config().token_window, (local_mha::TokenWindow{3, 0}));
  model.config.erase("attention_layers");
  EXPECT_TRUE(says(model.error(), "config.attention_layers: expected an array, got none"));
  model.config["attention_layers"] = "local";
  EXPECT_TRUE(says(model.error(), "config.attention_layers: expected an array, got \"local\""));
}

TEST(AttentionCase, NamesWhatItLacks) {
  const auto error = [](const Json& described) -> std::string {
    io::SafetensorsWriter writer;
    writer.set_metadata("case", described.dump());
    try {
      io::read_attention_case(SafetensorsFile::from_bytes(writer.bytes(), "file"));
    } catch (const io::SafetensorsError& refused) {
      return refused.what();
    }
    return "no error";
  };
  EXPECT_TRUE(says(error({{"config", 1}}), "file: case.config: expected a JSON object, got 1"));
  EXPECT_TRUE(says(error({{"config", Json::object()}}), "file: case.family: expected a value"));
  const Json config = decoder("mistral").config;
  EXPECT_TRUE(says(error({{"family", "llama"}, {"config", config}}), "file: config.model_type: "));
  EXPECT_TRUE(says(error({{"family", "mistral"}, {"config", config}, {"layer", -1}}),
                   "file: number: expected 0 to 2^30 - 1, got -1"));
  EXPECT_EQ(error({{"family", "mistral"}, {"config", config}}), "no error");
}

}  // namespace load_attention_test
