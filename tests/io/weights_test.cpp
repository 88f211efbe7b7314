// SPDX-License-Identifier: MIT
// State dicts of the Python modules: what is read from them, what is refused, what is written.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/Core>
#include <unsupported/Eigen/AutoDiff>

#include <local_mha/io/weights.hpp>

#include "io/file_builder.hpp"
#include "support/golden_file.hpp"

namespace weights_test {

using namespace local_mha;
using namespace local_mha::io;
using namespace io_test;

const std::filesystem::path golden_folder =
    std::filesystem::path(LOCAL_MHA_TEST_DATA_DIR) / "golden";
const std::filesystem::path model_path =
    std::filesystem::path(LOCAL_MHA_EXAMPLE_DATA_DIR) / "shakespeare.safetensors";

SafetensorsFile golden_file(const std::string& name) {
  return SafetensorsFile(golden_folder / (name + ".safetensors"));
}

// The file with its tensors renamed, or left out where there is no new name.
using Rename = std::function<std::optional<std::string>(const std::string&)>;

SafetensorsWriter copy(const SafetensorsFile& file, const Rename& rename) {
  SafetensorsWriter writer;
  for (const auto& [key, text] : file.metadata()) writer.set_metadata(key, text);
  for (const auto& [name, entry] : file.entries())
    if (const auto new_name = rename(name))
      writer.add_bytes(*new_name, entry.dtype, entry.shape, entry.bytes);
  return writer;
}

SafetensorsFile reread(const SafetensorsWriter& writer) {
  return SafetensorsFile::from_bytes(writer.bytes(), "file");
}

Rename without(const std::string& left_out) {
  return [left_out](const std::string& name) {
    return name == left_out ? std::nullopt : std::optional(name);
  };
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  for (std::size_t at = text.find(from); at != std::string::npos;
       at = text.find(from, at + to.size()))
    text.replace(at, from.size(), to);
  return text;
}

// Names, shapes and values, in one map.
template <typename Parameters>
std::map<std::string, std::pair<std::vector<Index>, std::vector<double>>> flatten(
    const Parameters& parameters) {
  std::map<std::string, std::pair<std::vector<Index>, std::vector<double>>> all;
  for_each_parameter(parameters, [&](const std::string& name, const auto& tensor) {
    auto& [shape, values] = all[name];
    shape = {tensor.rows()};
    if (tensor.ColsAtCompileTime != 1) shape.push_back(tensor.cols());
    for (Index i = 0; i < tensor.size(); ++i)
      values.push_back(static_cast<double>(tensor.data()[i]));
  });
  return all;
}

bool is_buffer(const std::string& name) { return name.ends_with("rel_pos.inv_freq"); }

// The error of a file that differs from a golden one.
template <typename Load>
void expect_refused(const SafetensorsWriter& writer, const Load& load, const std::string& tensor,
                    const std::string& text) {
  const SafetensorsFile file = reread(writer);
  try {
    load(file);
    FAIL() << "no exception; expected: " << tensor << ": " << text;
  } catch (const SafetensorsError& error) {
    EXPECT_EQ(error.tensor(), tensor) << error.what();
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    EXPECT_TRUE(std::string(error.what()).starts_with("file: ")) << error.what();
    if (file.contains(tensor)) {
      EXPECT_GE(error.offset(), file.entry(tensor).offset);
    }
  }
}

const auto load_mha = [](const SafetensorsFile& file) { load_local_mha<float>(file); };
const auto load_attention = [](const SafetensorsFile& file) { load_local_attention(file); };
const auto load_model = [](const SafetensorsFile& file) { load_local_transformer<float>(file); };

// ---- The files that Python wrote ----

class Golden : public testing::TestWithParam<std::filesystem::path> {};

template <typename Weights>
void expect_equal_to_file(const Weights& weights, const golden::Case& file,
                          const std::string& prefix) {
  const auto loaded = flatten(weights.parameters);
  EXPECT_EQ(loaded.size(),
            flatten(std::decay_t<decltype(weights.parameters)>::zeros(weights.config)).size());
  std::size_t found = 0;
  for (const auto& [name, array] : file.below(prefix)) {
    if (is_buffer(name)) continue;
    ++found;
    ASSERT_TRUE(loaded.contains(name)) << name;
    EXPECT_EQ(loaded.at(name).first, std::vector<Index>(array.shape.begin(), array.shape.end()));
    EXPECT_EQ(loaded.at(name).second, array.data) << name;
  }
  EXPECT_EQ(found, loaded.size());
}

TEST_P(Golden, FileIsLoaded) {
  const SafetensorsFile file(GetParam());
  const golden::Case expected = golden::read(GetParam());
  EXPECT_EQ(file.names().size(), expected.tensors.size());
  EXPECT_EQ(read_case(file).kwargs, expected.kwargs);
  EXPECT_EQ(read_case(file).call, expected.call);
  if (expected.kind == "LocalMHA") {
    const auto weights = load_local_mha<double>(file);
    expect_equal_to_file(weights, expected, "param/");
    EXPECT_EQ(weights.config.dim, expected.kwargs["dim"]);
    EXPECT_EQ(weights.config.heads, expected.kwargs["heads"]);
    EXPECT_EQ(load_local_mha<float>(file).parameters.to_out,
              weights.parameters.to_out.cast<float>());
  } else if (expected.kind == "LocalTransformer") {
    expect_equal_to_file(load_local_transformer<double>(file), expected, "param/");
  } else {
    ASSERT_EQ(expected.kind, "LocalAttention");
    EXPECT_EQ(load_local_attention(file).window_size, expected.kwargs["window_size"]);
  }
}

TEST_P(Golden, FileComesBackWhenWritten) {
  const SafetensorsFile file(GetParam());
  const std::string kind = read_case(file).kind;
  const TemporaryFolder folder;
  const auto path = folder / "again.safetensors";
  const auto expect_same_entries = [&] {
    const SafetensorsFile again(path);
    const golden::Case reader_apart = golden::read(path);
    for (const auto& [name, entry] : file.entries()) {
      if (!name.starts_with("param/")) continue;
      EXPECT_EQ(reader_apart.at(name).data, again.read<double>(name)) << name;
      const TensorEntry& written = again.entry(name);
      EXPECT_EQ(written.shape, entry.shape) << name;
      if (is_buffer(name)) continue;  // one rounding of the power apart
      EXPECT_TRUE(std::equal(written.bytes.begin(), written.bytes.end(), entry.bytes.begin()))
          << name;
    }
    return again;
  };
  if (kind == "LocalMHA") {
    const auto weights = load_local_mha<double>(file);
    save_local_mha(path, weights.config, weights.parameters);
    const auto again = load_local_mha<double>(expect_same_entries());
    EXPECT_EQ(flatten(again.parameters), flatten(weights.parameters));
    EXPECT_EQ(to_kwargs(again.config), to_kwargs(weights.config));
  } else if (kind == "LocalTransformer") {
    const auto weights = load_local_transformer<double>(file);
    save_local_transformer(path, weights.config, weights.parameters);
    const auto again = load_local_transformer<double>(expect_same_entries());
    EXPECT_EQ(flatten(again.parameters), flatten(weights.parameters));
    EXPECT_EQ(to_kwargs(again.config), to_kwargs(weights.config));
  }
}

INSTANTIATE_TEST_SUITE_P(, Golden, testing::ValuesIn(golden::files(golden_folder)),
                         [](const auto& test) { return test.param.stem().string(); });

TEST(GoldenFiles, AreThere) { EXPECT_GE(golden::files(golden_folder).size(), 39U); }

TEST(TrainedModel, IsLoaded) {
  const SafetensorsFile file(model_path);
  const auto weights = load_local_transformer<float>(file);
  expect_equal_to_file(weights, golden::read(model_path), "");
  Index count = 0;
  for_each_parameter(weights.parameters, [&](const std::string&, const auto& tensor) {
    count += tensor.size();
    EXPECT_TRUE(tensor.allFinite());
  });
  EXPECT_EQ(count, 2'807'424);
  EXPECT_EQ(weights.config.num_tokens, 128);
  EXPECT_EQ(weights.config.max_seq_len, 512);
  EXPECT_EQ(weights.config.depth, 6);
  EXPECT_EQ(weights.config.local_attn_window_size, 64);
  EXPECT_TRUE(weights.config.causal && weights.config.use_xpos && weights.config.qk_rmsnorm);
  EXPECT_EQ(weights.config.xpos_scale_base, 64);
}

TEST(TrainedModel, ComesBackInF16BitForBit) {
  const SafetensorsFile file(model_path);
  const auto weights = load_local_transformer<float>(file);
  SafetensorsWriter writer;
  add_local_transformer(writer, weights.config, weights.parameters,
                        {.prefix = "", .dtype = Dtype::F16, .note = "again"});
  const SafetensorsFile again = reread(writer);
  EXPECT_EQ(again.names(), file.names());
  EXPECT_EQ(read_case(again).note, "again");
  for (const auto& [name, entry] : file.entries()) {
    EXPECT_EQ(to_string(again.entry(name)), to_string(entry)) << name;
    if (!is_buffer(name)) {
      EXPECT_TRUE(
          std::equal(entry.bytes.begin(), entry.bytes.end(), again.entry(name).bytes.begin()))
          << name;
    }
  }
}

// ---- Other names for the same ----

TEST(LocalMhaWeights, MayHaveSeparateProjections) {
  const SafetensorsFile file = golden_file("mha_everything");
  const auto fused = load_local_mha<double>(file);
  SafetensorsWriter writer = copy(file, without("param/to_qkv.weight"));
  const char* const names[] = {"param/to_q.weight", "param/to_k.weight", "param/to_v.weight"};
  for (int part = 0; part < 3; ++part)
    writer.add(names[part], fused.parameters.to_qkv.middleRows(part * 24, 24));
  EXPECT_EQ(flatten(load_local_mha<double>(reread(writer)).parameters), flatten(fused.parameters));
}

TEST(LocalMhaWeights, MayBePartOfAModel) {
  const SafetensorsFile file = golden_file("transformer_xpos_rmsnorm");
  const auto model = load_local_transformer<double>(file);
  const auto& layer = model.parameters.layers[1];
  EXPECT_EQ(flatten(load_local_mha_parameters<double>(file, layer_config(model.config),
                                                      "param/layers.1.0.branch.")),
            flatten(layer.attention));
  EXPECT_EQ(flatten(load_feed_forward_parameters<double>(file, 24, 64, "param/layers.1.1.branch.")),
            flatten(layer.feed_forward));
}

TEST(LocalMhaWeights, MayHaveAnyPrefixOrNone) {
  const SafetensorsFile file = golden_file("mha_gated");
  const auto expected = flatten(load_local_mha<double>(file).parameters);
  for (const std::string prefix : {"", "model.", "layers.3.0.branch.", "a/b "}) {
    const SafetensorsFile renamed = reread(
        copy(file, [&](const std::string& name) { return replaced(name, "param/", prefix); }));
    EXPECT_EQ(flatten(load_local_mha<double>(renamed, prefix).parameters), expected) << prefix;
    if (prefix.empty()) {
      EXPECT_EQ(flatten(load_local_mha<double>(renamed).parameters), expected);
    } else {
      EXPECT_THROW(load_local_mha<double>(renamed), SafetensorsError);
    }
  }
}

TEST(LocalTransformerWeights, MayLackTheBranchOfOlderVersions) {
  const SafetensorsFile file = golden_file("transformer_causal");
  const auto expected = flatten(load_local_transformer<double>(file).parameters);
  const auto all =
      reread(copy(file, [](const std::string& name) { return replaced(name, ".branch.", "."); }));
  EXPECT_EQ(flatten(load_local_transformer<double>(all).parameters), expected);
  const auto one = reread(copy(file, [](const std::string& name) {
    return replaced(name, "layers.1.0.branch.", "layers.1.0.");
  }));
  EXPECT_EQ(flatten(load_local_transformer<double>(one).parameters), expected);
}

TEST(RotaryBuffers, MayBeAbsentOrOfAnyFloatingPointType) {
  const SafetensorsFile file = golden_file("mha_xpos_causal");
  const std::string name = "param/attn_fn.rel_pos.inv_freq";
  const auto expected = flatten(load_local_mha<double>(file).parameters);
  EXPECT_EQ(flatten(load_local_mha<double>(reread(copy(file, without(name)))).parameters),
            expected);
  for (const Dtype dtype : {Dtype::F64, Dtype::F32}) {
    SafetensorsWriter writer = copy(file, without(name));
    writer.add(name, {4}, file.read<double>(name), dtype);
    writer.add("param/attn_fn.rel_pos.scale", {4},
               std::vector<double>{3.2 / 11.2, 5.2 / 11.2, 7.2 / 11.2, 9.2 / 11.2}, dtype);
    EXPECT_EQ(flatten(load_local_mha<double>(reread(writer)).parameters), expected);
  }
}

// Python computes with the rounded ones, whatever they are stored as.
TEST(RotaryBuffers, ThatWereRoundedAreRefusedUnlessIgnored) {
  const SafetensorsFile file = golden_file("mha_xpos_causal");
  const std::vector<double> scale{3.2 / 11.2, 5.2 / 11.2, 7.2 / 11.2, 9.2 / 11.2};
  const auto expected = flatten(load_local_mha<double>(file).parameters);
  for (const std::string buffer : {"inv_freq", "scale"})
    for (const Dtype rounded : {Dtype::F16, Dtype::BF16})
      for (const Dtype stored : {rounded, Dtype::F32, Dtype::F64}) {
        const std::string name = "param/attn_fn.rel_pos." + buffer;
        SafetensorsWriter rounding;
        rounding.add("x", {4}, buffer == "scale" ? scale : file.read<double>(name), rounded);
        SafetensorsWriter writer = copy(file, without(name));
        writer.add(name, {4}, reread(rounding).read<double>("x"), stored);
        expect_refused(writer, load_mha, name, "or load with RotaryBuffers::ignore");
        const SafetensorsFile again = reread(writer);
        EXPECT_EQ(
            flatten(load_local_mha<double>(again, std::nullopt, RotaryBuffers::ignore).parameters),
            expected);
        EXPECT_EQ(flatten(load_local_mha_parameters<double>(
                      again, load_local_mha<double>(file).config, "param/", RotaryBuffers::ignore)),
                  expected);
      }
  // Even then, of the right shape.
  const std::string name = "param/attn_fn.rel_pos.inv_freq";
  SafetensorsWriter writer = copy(file, without(name));
  writer.add(name, {5}, std::vector<float>(5));
  expect_refused(
      writer,
      [](const SafetensorsFile& f) {
        load_local_mha<float>(f, std::nullopt, RotaryBuffers::ignore);
      },
      name, "expected F64, F32, F16 or BF16 [4], got F32 [5]");
}

// As PyTorch computes them: the power in float.
TEST(RotaryBuffers, MayBeRoundedAsPyTorchDoes) {
  for (const Index dim_head : {2, 8, 64, 96, 256}) {
    SafetensorsWriter writer;
    const LocalMHAConfig config{.dim = 1, .window_size = 4, .dim_head = dim_head, .heads = 1};
    add_local_mha(writer, config, LocalMHAParameters<float>::zeros(config), {.prefix = ""});
    const std::string name = "attn_fn.rel_pos.inv_freq";
    SafetensorsWriter rounded = copy(reread(writer), without(name));
    std::vector<float> inv_freq;
    for (Index m = 0; m < dim_head; m += 2)
      inv_freq.push_back(1.F /
                         std::pow(10000.F, static_cast<float>(m) / static_cast<float>(dim_head)));
    rounded.add(name, {dim_head / 2}, inv_freq);
    EXPECT_NO_THROW(load_local_mha<float>(reread(rounded))) << dim_head;
  }
}

// ---- What other tools make of names ----

TEST(Names, OfWrappedModulesAreSeenThrough) {
  const SafetensorsFile file = golden_file("transformer_dynamic_bias");
  const auto expected = flatten(load_local_transformer<double>(file).parameters);
  const auto loads = [&](const Rename& rename, const std::optional<std::string>& prefix = {}) {
    const SafetensorsFile renamed = reread(copy(file, rename));
    EXPECT_EQ(flatten(load_local_transformer<double>(renamed, prefix).parameters), expected);
  };
  const auto with_prefix = [](const std::string& prefix) -> Rename {
    return [prefix](const std::string& name) { return replaced(name, "param/", prefix); };
  };
  for (const std::string wrapper :
       {"_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "_forward_module.",
        "_fsdp_wrapped_module._checkpoint_wrapped_module."}) {
    loads(with_prefix(wrapper));
    loads(with_prefix("param/" + wrapper));
    loads(with_prefix("model." + wrapper), "model.");
    loads(with_prefix("model." + wrapper), "model." + wrapper);
    loads(with_prefix(wrapper + "model."), "model.");
    loads([&](const std::string& name) {
      std::string wrapped = replaced(name, "layers.0.0.", "layers.0.0." + wrapper);
      wrapped = replaced(wrapped, "layers.1.", wrapper + "layers.1.");
      return replaced(replaced(wrapped, "branch.", "branch." + wrapper), "mlp.2.",
                      "mlp.2." + wrapper);
    });
  }
  // A name that is there both ways is the one without, and the other one belongs to nothing.
  SafetensorsWriter twice = copy(file, with_prefix(""));
  twice.add("_orig_mod.token_emb.weight", {2}, std::vector<float>(2));
  expect_refused(twice, load_model, "_orig_mod.token_emb.weight", "expected no such tensor");
  // No part of a name is a wrapper.
  SafetensorsWriter other = copy(file, with_prefix("submodule."));
  expect_refused(
      other, load_model, "token_emb.weight",
      "but 'submodule.token_emb.weight' (is the prefix 'submodule.'? The loader takes it)");
  // The prefix that is asked for comes first.
  SafetensorsWriter two = copy(file, with_prefix("module."));
  for (const auto& [name, entry] : file.entries())
    if (name.starts_with("param/"))
      two.add(replaced(name, "param/", ""), entry.shape,
              std::vector<float>(static_cast<std::size_t>(entry.size())));
  EXPECT_EQ(flatten(load_local_transformer<double>(reread(two), "module.").parameters), expected);
}

TEST(Names, ThatAreTiedAreFound) {
  const SafetensorsFile file = golden_file("transformer_causal");
  const std::string embedding = "token_emb.weight";
  const std::string logits = "to_logits.1.weight";
  for (const std::string prefix : {"param/", "", "model.", "model._orig_mod."})
    for (const auto& [kept, left_out] :
         {std::pair(embedding, logits), std::pair(logits, embedding)}) {
      SafetensorsWriter writer = copy(file, [&, missing = left_out](const std::string& name) {
        return name == "param/" + missing ? std::nullopt
                                          : std::optional(replaced(name, "param/", prefix));
      });
      const auto load = [&](const SafetensorsFile& f) {
        load_local_transformer<double>(f, prefix);
      };
      expect_refused(writer, load, prefix + left_out, "got no such tensor");
      writer.set_metadata("format", "pt");
      writer.set_metadata(prefix + left_out, "no such name");
      expect_refused(writer, load, prefix + left_out, "got no such tensor");
      writer.set_metadata(prefix + left_out, prefix + kept);
      const auto parameters = load_local_transformer<double>(reread(writer), prefix).parameters;
      EXPECT_EQ(parameters.to_logits, parameters.token_emb);
      EXPECT_EQ(parameters.token_emb.rows(), 32);
    }
  // To one that is outside the prefix, and of another shape.
  SafetensorsWriter writer = copy(file, without("param/" + logits));
  writer.add("other", {2}, std::vector<float>(2));
  writer.set_metadata("param/" + logits, "other");
  expect_refused(writer, load_model, "other", ", got F32 [2]");
}

// What the library does not have must not be lost without a word.
TEST(Names, OfWhatIsNotSupportedAreRefused) {
  const SafetensorsFile file = golden_file("mha_gated");
  const auto refused = [&](const std::string& left_out, const std::vector<std::string>& added,
                           const std::string& tensor, const std::string& text) {
    SafetensorsWriter writer = copy(file, without("param/" + left_out));
    for (const std::string& name : added) writer.add("param/" + name, {4}, std::vector<float>(4));
    expect_refused(writer, load_mha, "param/" + tensor, text);
  };
  const std::string unexpected = "expected no such tensor";
  const std::string missing = "got no such tensor";
  const std::string adapters = "merge them into the weights first";
  const std::string norm = "weight normalization is not supported, remove it first";
  refused("", {"to_out.bias"}, "to_out.bias", unexpected);
  refused("", {"to_qkv.bias"}, "to_qkv.bias", unexpected);
  refused("", {"to_kv.weight"}, "to_kv.weight", unexpected);
  refused("to_out.weight", {"to_out.0.weight", "to_out.0.bias"}, "to_out.weight", missing);
  refused("to_qkv.weight", {"to_q.weight", "to_kv.weight"}, "to_q.weight", "got F32 [4]");
  refused("to_qkv.weight", {"to_kv.weight"}, "to_qkv.weight", missing);
  refused("", {"to_qkv.lora_A.weight", "to_qkv.lora_B.weight"}, "to_qkv.lora_A.weight", adapters);
  refused("to_qkv.weight", {"to_qkv.base_layer.weight"}, "to_qkv.weight", adapters);
  refused("to_out.weight", {"to_out.weight_g", "to_out.weight_v"}, "to_out.weight", norm);
  refused("", {"to_out.weight_g"}, "to_out.weight_g", norm);
  refused("to_out.weight", {"to_out.parametrizations.weight.original0"}, "to_out.weight", norm);
  refused("to_out.weight", {"inner.to_out.weight"}, "to_out.weight",
          "is the prefix 'param/inner.'");
  refused("to_out.weight", {"to_out.inner.weight"}, "to_out.weight", "is 'inner.' of a wrapper?");
}

// ---- Parts of models ----

TEST(DynamicPositionBias, IsLoadedAlone) {
  const SafetensorsFile file = golden_file("transformer_dynamic_bias");
  const auto model = load_local_transformer<double>(file);
  const DynamicPositionBias<double> expected(*model.parameters.dynamic_pos_bias);
  const auto values = [](const DynamicPositionBias<double>& bias) {
    const auto made = bias.forward(5, 1, 2);
    return std::vector<double>(made.data(), made.data() + made.size());
  };
  EXPECT_EQ(values(load_dynamic_position_bias<double>(file, "param/dynamic_pos_bias.")),
            values(expected));
  // As audiolm-pytorch calls it, beside what belongs to others.
  const Rename rename = [](const std::string& name) {
    return replaced(name, "param/dynamic_pos_bias.", "encoder_attn.pos_bias.");
  };
  const SafetensorsFile other = reread(copy(file, rename));
  EXPECT_EQ(values(load_dynamic_position_bias<double>(other, "encoder_attn.pos_bias.")),
            values(expected));
  const auto load = [](const SafetensorsFile& f) {
    load_dynamic_position_bias<float>(f, "encoder_attn.pos_bias.");
  };
  const std::string mlp = "encoder_attn.pos_bias.mlp.";
  for (const std::string name :
       {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}) {
    SafetensorsWriter writer = copy(other, without(mlp + name));
    expect_refused(writer, load, mlp + name, "got no such tensor");
    writer.add(mlp + name, {3, 1, 1}, std::vector<float>(3));
    expect_refused(writer, load, mlp + name, "got F32 [3, 1, 1]");
  }
  SafetensorsWriter writer = copy(other, without(mlp + "0.weight"));
  writer.add(mlp + "0.weight", {0, 1}, std::vector<float>());
  expect_refused(writer, load, mlp + "0.weight", "expected a matrix of at least one row");
  SafetensorsWriter more = copy(other, without(""));
  more.add(mlp + "6.weight", {1}, std::vector<float>(1));
  expect_refused(more, load, mlp + "6.weight", "expected no such tensor");
}

TEST(Weights, MayBeInDualNumbers) {
  using Dual = Eigen::AutoDiffScalar<Eigen::Vector2d>;
  const SafetensorsFile file = golden_file("transformer_dynamic_bias");
  const auto expected = load_local_transformer<double>(file);
  const auto dual = load_local_transformer<Dual>(file);
  ASSERT_EQ(dual.parameters.to_logits.size(), expected.parameters.to_logits.size());
  for (Index i = 0; i < expected.parameters.to_logits.size(); ++i)
    EXPECT_EQ(dual.parameters.to_logits.data()[i].value(), expected.parameters.to_logits.data()[i]);
  EXPECT_EQ(dual.parameters.dynamic_pos_bias->bias_4[2].value(),
            expected.parameters.dynamic_pos_bias->bias_4[2]);
}

// ---- What is refused ----

TEST(Weights, ThatAreMissingAreNamed) {
  const SafetensorsFile layer = golden_file("mha_everything");
  const std::map<std::string, std::string> shapes{{"q_scale", "[8]"},
                                                  {"k_scale", "[8]"},
                                                  {"norm.weight", "[24]"},
                                                  {"norm.bias", "[24]"},
                                                  {"to_qkv.weight", "[72, 24]"},
                                                  {"to_v_gate.0.weight", "[3, 24]"},
                                                  {"to_v_gate.0.bias", "[3]"},
                                                  {"to_out.weight", "[24, 24]"}};
  for (const auto& [name, shape] : shapes)
    expect_refused(copy(layer, without("param/" + name)), load_mha, "param/" + name,
                   "expected F64, F32, F16 or BF16 " + shape + ", got no such tensor");

  const SafetensorsFile model = golden_file("transformer_dynamic_bias");
  for (const std::string& name : model.names())
    if (name.starts_with("param/"))
      expect_refused(copy(model, without(name)), load_model, name, "got no such tensor");
}

TEST(Weights, ThatAreMissingForAWrongPrefixComeWithAHint) {
  expect_refused(
      copy(golden_file("mha_gated"),
           [](const std::string& name) { return replaced(name, "param/", "net."); }),
      load_mha, "to_qkv.weight",
      "got no such tensor, but 'net.to_qkv.weight' (is the prefix 'net.'? The loader takes it)");
}

TEST(Weights, OfWhichOneSeparateProjectionIsMissingNameIt) {
  SafetensorsWriter writer = copy(golden_file("mha_gated"), without("param/to_qkv.weight"));
  writer.add("param/to_q.weight", RowMatrix<float>(RowMatrix<float>::Zero(24, 24)));
  writer.add("param/to_v.weight", RowMatrix<float>(RowMatrix<float>::Zero(24, 24)));
  expect_refused(writer, load_mha, "param/to_k.weight", "[24, 24], got no such tensor");
  SafetensorsWriter both = copy(golden_file("mha_gated"), without(""));
  both.add("param/to_q.weight", RowMatrix<float>(RowMatrix<float>::Zero(24, 24)));
  expect_refused(both, load_mha, "param/to_q.weight", "expected no such tensor");
}

TEST(Weights, OfAnotherShapeAreNamed) {
  for (const char* golden : {"mha_everything", "transformer_dynamic_bias"}) {
    const SafetensorsFile file = golden_file(golden);
    const bool is_layer = std::string(golden).starts_with("mha");
    for (const auto& [name, entry] : file.entries()) {
      if (!name.starts_with("param/")) continue;
      std::vector<std::vector<Index>> shapes{{}, {entry.shape[0] + 1}, {1, 1, entry.shape[0]}};
      if (entry.shape.size() == 2) {
        shapes.push_back({entry.shape[0] * entry.shape[1]});
        shapes.push_back({entry.shape[0], entry.shape[1] + 1});
        if (entry.shape[0] != entry.shape[1]) shapes.push_back({entry.shape[1], entry.shape[0]});
      } else {
        shapes.push_back({entry.shape[0], 1});
        shapes.push_back({0});
      }
      for (const auto& shape : shapes) {
        TensorEntry wrong{.dtype = Dtype::F32, .shape = shape, .offset = 0, .bytes = {}};
        Index size = 1;
        for (const Index extent : shape) size *= extent;
        SafetensorsWriter writer = copy(file, without(name));
        writer.add(name, shape, std::vector<float>(static_cast<std::size_t>(size)));
        const std::string text = "expected F64, F32, F16 or BF16" + to_string(entry).substr(3) +
                                 ", got " + to_string(wrong);
        if (is_layer)
          expect_refused(writer, load_mha, name, text);
        else
          expect_refused(writer, load_model, name, text);
      }
    }
  }
}

TEST(Weights, OfIntegersAreNamed) {
  const SafetensorsFile file = golden_file("mha_gated");
  for (const std::string name : {"param/to_out.weight", "param/attn_fn.rel_pos.inv_freq"}) {
    SafetensorsWriter writer = copy(file, without(name));
    const TensorEntry& entry = file.entry(name);
    writer.add(name, entry.shape,
               std::vector<std::int64_t>(static_cast<std::size_t>(entry.size())));
    expect_refused(writer, load_mha, name, "expected F64, F32, F16 or BF16");
  }
}

TEST(Weights, ThatAreNotExpectedAreNamed) {
  const std::vector<std::pair<std::string, std::string>> unexpected{
      {"mha_causal_exact", "param/q_scale"},
      {"mha_causal_exact", "param/norm.weight"},
      {"mha_causal_exact", "param/to_v_gate.0.bias"},
      {"mha_causal_exact", "param/to_out.bias"},
      {"mha_causal_exact", "param/"},
      {"mha_causal_exact", "param/to_qkv.weight.copy"},
      {"mha_no_rotary", "param/attn_fn.rel_pos.inv_freq"},
      {"mha_no_rotary", "param/attn_fn.rel_pos.scale"},
      {"transformer_causal", "param/layers.2.0.branch.norm.weight"},
      {"transformer_causal", "param/layers.0.0.norm.weight"},
      {"transformer_causal", "param/dynamic_pos_bias.mlp.0.weight"},
      {"transformer_causal", "param/layers.0.2.weight"},
      {"transformer_dynamic_bias", "param/layers.0.0.branch.attn_fn.rel_pos.inv_freq"},
  };
  for (const auto& [golden, name] : unexpected) {
    SafetensorsWriter writer = copy(golden_file(golden), without(name));
    writer.add(name, {4}, std::vector<float>(4));
    const std::string text = "expected no such tensor for this configuration, got F32 [4]";
    if (golden.starts_with("mha"))
      expect_refused(writer, load_mha, name, text);
    else
      expect_refused(writer, load_model, name, text);
  }
}

TEST(Weights, OfHyperConnectionsAreExplained) {
  SafetensorsWriter writer = copy(golden_file("transformer_causal"), without(""));
  writer.add("param/layers.0.0.static_beta", {4}, std::vector<float>(4));
  expect_refused(writer, load_model, "param/layers.0.0.static_beta",
                 "hyper-connections, which a module with num_residual_streams > 1 has");
}

TEST(Weights, WithoutPrefixMayStandBesideInputsAndOutputsOnly) {
  SafetensorsWriter writer = copy(SafetensorsFile(model_path), without(""));
  writer.add("input/tokens", {1, 2}, std::vector<std::int64_t>{1, 2});
  writer.add("output/logits", {1}, std::vector<float>{1});
  writer.add("grad/x", {1}, std::vector<float>{1});
  EXPECT_NO_THROW(load_model(reread(writer)));
  writer.add("other/x", {1}, std::vector<float>{1});
  expect_refused(writer, load_model, "other/x", "expected no such tensor");
}

TEST(RotaryBuffers, ThatDifferAreNamedWithTheByte) {
  const SafetensorsFile file = golden_file("mha_causal_exact");
  const std::string inv_freq = "param/attn_fn.rel_pos.inv_freq";
  const std::vector<double> right = file.read<double>(inv_freq);
  for (std::size_t m = 0; m < right.size(); ++m)
    for (const double wrong :
         {right[m] * (1 + 1e-5), right[m] * (1 - 1e-5), -right[m], 0.,
          std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      std::vector<double> values = right;
      values[m] = wrong;
      SafetensorsWriter writer = copy(file, without(inv_freq));
      writer.add(inv_freq, {4}, values);
      expect_refused(writer, load_mha, inv_freq, " at " + std::to_string(m) + ", got ");
      try {
        load_mha(reread(writer));
      } catch (const SafetensorsError& error) {
        EXPECT_EQ(error.offset(), reread(writer).entry(inv_freq).offset + 8 * m);
      }
    }
  // Another base of the powers, as some models have it.
  std::vector<float> other;
  for (Index m = 0; m < 4; ++m) other.push_back(std::pow(500000.F, -static_cast<float>(m) / 4));
  SafetensorsWriter writer = copy(file, without(inv_freq));
  writer.add(inv_freq, {4}, other);
  expect_refused(writer, load_mha, inv_freq, "expected 0.1 at 1, got");
  // xPos.
  SafetensorsWriter scaled = copy(file, without(""));
  scaled.add("param/attn_fn.rel_pos.scale", {4}, std::vector<float>{0.3F, 0.4F, 0.6F, 0.8F});
  expect_refused(scaled, load_mha, "param/attn_fn.rel_pos.scale", "expected 0.285714285714285");
  // LocalAttention has only these.
  SafetensorsWriter attention = copy(golden_file("attn_causal"), without(""));
  attention.add("param/rel_pos.inv_freq", {4}, std::vector<double>(right));
  EXPECT_NO_THROW(load_local_attention(reread(attention)));
  attention.add("param/to_qkv.weight", {4}, std::vector<double>(right));
  expect_refused(attention, load_attention, "param/to_qkv.weight", "expected no such tensor");
}

// The configuration comes from the file, too: it must not decide how much memory is taken.
TEST(Weights, OfAnEnormousConfigurationAreMissing) {
  SafetensorsWriter writer;
  set_case(
      writer,
      {.kind = "LocalMHA",
       .kwargs = {{"dim", 1 << 20}, {"window_size", 4}, {"heads", 1 << 10}, {"dim_head", 256}}});
  writer.add("to_qkv.weight", {2, 2}, std::vector<float>(4));
  expect_refused(writer, load_mha, "to_qkv.weight", "[786432, 1048576], got F32 [2, 2]");

  const SafetensorsFile model = golden_file("transformer_causal");
  Case described = read_case(model);
  described.kwargs["depth"] = 1 << 27;
  SafetensorsWriter deep = copy(model, without(""));
  set_case(deep, described);
  expect_refused(deep, load_model, "param/layers.2.0.norm.weight", "got no such tensor");
  described.kwargs["depth"] = 0;
  set_case(deep, described);
  expect_refused(deep, load_model, "param/layers.0.0.branch.attn_fn.rel_pos.inv_freq",
                 "expected no such tensor");
}

// ---- The case in the metadata ----

TEST(ReadCase, NamesWhatIsMalformed) {
  const auto message = [](const std::optional<std::string>& text) {
    SafetensorsWriter writer;
    if (text) writer.set_metadata("case", *text);
    const SafetensorsFile file = reread(writer);
    EXPECT_EQ(has_case(file), text.has_value());
    return message_of<SafetensorsError>([&] { read_case(file); });
  };
  EXPECT_EQ(message(std::nullopt), "file: __metadata__: expected the key 'case', got none");
  EXPECT_NE(message("{").find("file: case: expected JSON"), std::string::npos);
  EXPECT_NE(message(R"({"kind": "a", "kind": "b"})").find("distinct keys"), std::string::npos);
  EXPECT_EQ(message("[]"), "file: case: expected an object, got an array");
  EXPECT_EQ(message("{}"), "file: case: expected the key 'kind', got none");
  EXPECT_EQ(message(R"({"kind": 3})"), "file: case: kind: expected a string, got 3");
  EXPECT_EQ(message(R"({"kind": "a", "note": null})"),
            "file: case: note: expected a string, got null");
  EXPECT_EQ(message(R"({"kind": "a", "kwargs": 1})"),
            "file: case: kwargs: expected an object, got 1");
  EXPECT_EQ(message(R"({"kind": "a", "call": []})"),
            "file: case: call: expected an object, got an array");
}

TEST(ReadCase, TakesWhatSetCaseWrote) {
  SafetensorsWriter writer;
  set_case(writer,
           {.kind = "k", .kwargs = {{"a", 1}}, .call = {{"b", nullptr}}, .note = "n\xc3\xa9"});
  const Case again = read_case(reread(writer));
  EXPECT_EQ(again.kind, "k");
  EXPECT_EQ(again.kwargs, nlohmann::json({{"a", 1}}));
  EXPECT_EQ(again.call, nlohmann::json({{"b", nullptr}}));
  EXPECT_EQ(again.note, "n\xc3\xa9");
  EXPECT_THROW(set_case(writer, {.kind = "k", .note = "\xff"}), std::invalid_argument);
  writer.set_metadata("case", R"({"kind": "k"})");
  EXPECT_TRUE(read_case(reread(writer)).kwargs.empty());
}

TEST(LoadLocalMha, NamesAnotherKindAndWrongArguments) {
  const auto message = [](const Case& described) {
    SafetensorsWriter writer;
    set_case(writer, described);
    return message_of<SafetensorsError>([&] { load_mha(reread(writer)); });
  };
  EXPECT_EQ(message({.kind = "LocalTransformer"}),
            "file: case: kind: expected 'LocalMHA', got 'LocalTransformer'");
  EXPECT_EQ(message({.kind = "LocalMHA", .kwargs = {{"dim", "4"}}}),
            "file: case: kwargs: dim: expected an integer, got \"4\"");
  EXPECT_EQ(message({.kind = "LocalMHA", .kwargs = {{"dim", 4}, {"window_size", 0}}}),
            "file: case: kwargs: window_size: expected at least 1, or a token_window, got 0");
}

// ---- What is written ----

// Numbers that differ from element to element and tensor to tensor.
template <typename Parameters>
Parameters numbered(Parameters parameters) {
  double next = 0.125;
  for_each_parameter(parameters, [&](const std::string&, auto& tensor) {
    for (Index i = 0; i < tensor.size(); ++i) {
      next += 0.25;
      tensor.data()[i] = static_cast<std::decay_t<decltype(tensor.data()[i])>>(next);
    }
  });
  return parameters;
}

TEST(AddLocalMha, WritesTheStateDictOfPython) {
  const LocalMHAConfig config{.dim = 6,
                              .window_size = 3,
                              .dim_head = 4,
                              .heads = 2,
                              .prenorm = true,
                              .qk_rmsnorm = true,
                              .use_xpos = true,
                              .gate_values_per_head = true};
  const auto parameters = numbered(LocalMHAParameters<double>::zeros(config));
  SafetensorsWriter writer;
  add_local_mha(writer, config, parameters, {.prefix = "net.", .note = "a note"});
  const SafetensorsFile file = reread(writer);
  std::set<std::string> expected{"net.attn_fn.rel_pos.inv_freq"};
  for (const auto& named : flatten(parameters)) expected.insert("net." + named.first);
  const auto names = file.names();
  EXPECT_EQ(std::set<std::string>(names.begin(), names.end()), expected);
  EXPECT_EQ(file.read<double>("net.attn_fn.rel_pos.inv_freq"), (std::vector<double>{1, 0.01}));
  const Case described = read_case(file);
  EXPECT_EQ(described.kind, "LocalMHA");
  EXPECT_EQ(described.note, "a note");
  EXPECT_EQ(described.kwargs["xpos_scale_base"], std::sqrt(6.));
  EXPECT_EQ(flatten(load_local_mha<double>(file, "net.").parameters), flatten(parameters));
}

TEST(LocalMhaWeights, OfWhatPythonDoesNotHaveComeBack) {
  for (const auto kind : {local_mha::QkNormKind::rms, local_mha::QkNormKind::rms_all}) {
    LocalMHAConfig config{.dim = 6, .window_size = 3, .dim_head = 5, .heads = 2};
    config.qkv_bias = config.out_bias = true;
    config.rotary = {.rotary_dim = 4, .inv_freq = {0.5, -0.125}, .factor = 1.5};
    config.scale = 0.3;
    config.qk_norm.kind = kind;
    config.prenorm = true;
    config.norm.kind = local_mha::NormKind::rms;
    const auto parameters = numbered(LocalMHAParameters<double>::zeros(config));
    SafetensorsWriter writer;
    add_local_mha(writer, config, parameters);
    const SafetensorsFile file = reread(writer);
    EXPECT_EQ(file.read<double>("param/attn_fn.rel_pos.inv_freq"), config.rotary.inv_freq);
    EXPECT_EQ(file.read<double>("param/q_norm.weight").size(),
              kind == local_mha::QkNormKind::rms ? 5U : 10U);
    const auto loaded = load_local_mha<double>(file);
    EXPECT_EQ(loaded.config, config);
    EXPECT_EQ(flatten(loaded.parameters), flatten(parameters));
  }
}

TEST(LocalMhaWeights, OfSlidingWindowsComeBack) {
  LocalMHAConfig config{.dim = 6, .dim_head = 4, .heads = 6, .kv_heads = 2};
  config.token_window = {.left = 3, .right = 2};
  config.qkv_bias = config.sinks = config.relative_bias = true;
  config.qk_norm.kind = local_mha::QkNormKind::rms_all;
  const auto parameters = numbered(LocalMHAParameters<double>::zeros(config));
  SafetensorsWriter writer;
  add_local_mha(writer, config, parameters);
  const SafetensorsFile file = reread(writer);
  EXPECT_EQ(file.entries().at("param/to_qkv.weight").shape, (std::vector<Index>{40, 6}));
  EXPECT_EQ(file.entries().at("param/q_norm.weight").shape, (std::vector<Index>{24}));
  EXPECT_EQ(file.entries().at("param/k_norm.weight").shape, (std::vector<Index>{8}));
  EXPECT_EQ(file.entries().at("param/sinks").shape, (std::vector<Index>{6}));
  EXPECT_EQ(file.entries().at("param/relative_bias").shape, (std::vector<Index>{6, 6}));
  const auto loaded = load_local_mha<double>(file);
  EXPECT_EQ(loaded.config, config);
  EXPECT_EQ(flatten(loaded.parameters), flatten(parameters));
  // Projections that stand apart have the rows of their own heads.
  SafetensorsWriter apart = copy(file, [](const std::string& name) {
    return name.starts_with("param/to_qkv.") ? std::nullopt : std::optional(name);
  });
  Index row = 0;
  for (const auto& [name, rows] :
       {std::pair{"to_q", Index{24}}, std::pair{"to_k", Index{8}}, std::pair{"to_v", Index{8}}}) {
    const std::string prefix = std::string("param/") + name;
    apart.add(prefix + ".weight",
              local_mha::RowMatrix<double>(parameters.to_qkv.middleRows(row, rows)));
    apart.add(prefix + ".bias",
              local_mha::Vector<double>(parameters.to_qkv_bias.segment(row, rows)));
    row += rows;
  }
  EXPECT_EQ(flatten(load_local_mha<double>(reread(apart)).parameters), flatten(parameters));
}

TEST(LocalMhaWeights, MayHaveSeparateBiases) {
  const LocalMHAConfig config{
      .dim = 6, .window_size = 3, .dim_head = 4, .heads = 2, .qkv_bias = true, .out_bias = true};
  const auto parameters = numbered(LocalMHAParameters<double>::zeros(config));
  SafetensorsWriter fused;
  add_local_mha(fused, config, parameters);
  const SafetensorsFile file = reread(fused);
  SafetensorsWriter writer = copy(file, without("param/to_qkv.bias"));
  const char* const names[] = {"param/to_q.bias", "param/to_k.bias", "param/to_v.bias"};
  for (int part = 0; part < 3; ++part)
    writer.add(names[part], local_mha::Vector<double>(parameters.to_qkv_bias.segment(part * 8, 8)));
  EXPECT_EQ(flatten(load_local_mha<double>(reread(writer)).parameters), flatten(parameters));
}

TEST(AddLocalTransformer, WritesTheStateDictOfPython) {
  for (const bool dynamic : {false, true}) {
    const LocalTransformerConfig config{.num_tokens = 5,
                                        .max_seq_len = 7,
                                        .dim = 6,
                                        .depth = 3,
                                        .local_attn_window_size = 3,
                                        .dim_head = 4,
                                        .heads = 2,
                                        .ff_mult = 2.5,
                                        .use_dynamic_pos_bias = dynamic,
                                        .qk_rmsnorm = true,
                                        .gate_values_per_head = true};
    const auto parameters = numbered(LocalTransformerParameters<float>::zeros(config));
    const TemporaryFolder folder;
    save_local_transformer(folder / "m", config, parameters);
    const SafetensorsFile file(folder / "m");
    std::set<std::string> expected;
    for (const auto& named : flatten(parameters)) expected.insert("param/" + named.first);
    for (int i = 0; i < 3 && !dynamic; ++i)
      expected.insert("param/layers." + std::to_string(i) + ".0.branch.attn_fn.rel_pos.inv_freq");
    const auto names = file.names();
    EXPECT_EQ(std::set<std::string>(names.begin(), names.end()), expected);
    for (const auto& named : file.entries()) EXPECT_EQ(named.second.dtype, Dtype::F32);
    EXPECT_EQ(flatten(load_local_transformer<float>(file).parameters), flatten(parameters));
  }
}

TEST(AddLocalTransformer, WritesLayersWithOptionsThatPythonDoesNotHave) {
  LocalTransformerConfig config{.num_tokens = 5, .max_seq_len = 7, .dim = 6, .depth = 2};
  LocalMHAConfig layer{.dim = 6, .dim_head = 4, .heads = 2};
  layer.kv_heads = 1;
  layer.token_window = {3, 0};
  layer.sinks = layer.relative_bias = layer.qkv_bias = true;
  layer.qk_norm.kind = local_mha::QkNormKind::rms;
  config.layers = {layer, layer};
  config.layers[1].sinks = false;
  config.layers[1].prenorm = true;
  const auto parameters = numbered(LocalTransformerParameters<float>::zeros(config));
  SafetensorsWriter writer;
  add_local_transformer(writer, config, parameters);
  const SafetensorsFile file = reread(writer);
  EXPECT_TRUE(file.contains("param/layers.0.0.branch.sinks"));
  EXPECT_FALSE(file.contains("param/layers.1.0.branch.sinks"));
  const auto read = load_local_transformer<float>(file);
  EXPECT_EQ(read.config.layers, config.layers);
  EXPECT_EQ(flatten(read.parameters), flatten(parameters));
}

TEST(AddWeights, RejectsWhatDoesNotFitTheConfiguration) {
  const LocalMHAConfig config{.dim = 6, .window_size = 3, .dim_head = 4, .heads = 2};
  const auto sound = LocalMHAParameters<float>::zeros(config);
  SafetensorsWriter writer;
  const auto rejected = [&](const LocalMHAConfig& with, const LocalMHAParameters<float>& parameters,
                            const SaveOptions& options = {}) {
    return message_of<std::invalid_argument>(
        [&] { add_local_mha(writer, with, parameters, options); });
  };
  writer.add("kept", {1}, std::vector<float>{1});
  const auto before = writer.bytes();
  auto wrong = sound;
  wrong.to_out.resize(8, 6);
  EXPECT_EQ(rejected(config, wrong), "to_out.weight: expected shape [6, 8], got [8, 6]");
  wrong = sound;
  wrong.norm_bias.resize(6);
  EXPECT_EQ(rejected(config, wrong), "norm.bias: expected shape [0], got [6]");
  LocalMHAConfig gated = config;
  gated.gate_values_per_head = true;
  EXPECT_EQ(rejected(gated, sound), "to_v_gate.0.weight: expected shape [2, 6], got [0, 0]");
  gated.heads = 0;
  EXPECT_EQ(rejected(gated, sound), "heads: expected at least 1, got 0");
  EXPECT_EQ(rejected(config, sound, {.dtype = Dtype::I32}),
            "dtype: expected F64, F32, F16 or BF16, got I32");
  EXPECT_EQ(writer.bytes(), before);
  writer.add("param/to_out.weight", {1}, std::vector<float>{1});
  const auto with_one = writer.bytes();
  EXPECT_EQ(rejected(config, sound),
            "name: expected one that was not added before, got 'param/to_out.weight'");
  EXPECT_EQ(writer.bytes(), with_one);

  const LocalTransformerConfig model{.num_tokens = 5, .max_seq_len = 7, .dim = 6, .depth = 2};
  const auto parameters = LocalTransformerParameters<float>::zeros(model);
  const auto rejected_model = [&](LocalTransformerConfig changed, auto change) {
    SafetensorsWriter fresh;
    auto changed_parameters = parameters;
    change(changed, changed_parameters);
    return message_of<std::invalid_argument>(
        [&] { add_local_transformer(fresh, changed, changed_parameters); });
  };
  EXPECT_EQ(rejected_model(model, [](auto&, auto& p) { p.layers.pop_back(); }),
            "layers: expected 2, got 1");
  EXPECT_EQ(rejected_model(model, [](auto&, auto& p) { p.dynamic_pos_bias.emplace(); }),
            "dynamic_pos_bias: expected no weights, got some");
  EXPECT_NE(rejected_model(model, [](auto& c, auto&) { c.use_dynamic_pos_bias = true; })
                .find("dynamic_pos_bias: expected weights"),
            std::string::npos);
}

}  // namespace weights_test
