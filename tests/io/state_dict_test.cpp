// SPDX-License-Identifier: MIT
// Weights from memory: the same as from a file that holds them; and prefixes that are found.
#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <local_mha/io/attention_layers.hpp>
#include <local_mha/io/encoder_weights.hpp>
#include <local_mha/io/longformer_layers.hpp>
#include <local_mha/io/weights.hpp>

#include "io/file_builder.hpp"

namespace state_dict_test {

using namespace local_mha;
using namespace local_mha::io;
using namespace io_test;

const std::filesystem::path data = LOCAL_MHA_TEST_DATA_DIR;

using Rename = std::function<std::optional<std::string>(const std::string&)>;

/// Views of the file's tensors, under other names.
StateDict views(const SafetensorsFile& file, const Rename& rename) {
  StateDict dict("memory");
  for (const auto& [name, entry] : file.entries())
    if (const auto other = rename(name))
      dict.add_bytes(*other, entry.dtype, entry.shape, entry.bytes);
  for (const auto& [key, text] : file.metadata()) dict.set_metadata(key, text);
  return dict;
}

/// The weights of a golden file, with this before their names.
StateDict weights(const SafetensorsFile& file, const std::string& prefix) {
  return views(file, [&](const std::string& name) {
    return name.starts_with("param/") ? std::optional(prefix + name.substr(6)) : std::nullopt;
  });
}

template <typename Parameters>
std::map<std::string, std::vector<double>> numbers(const Parameters& parameters) {
  std::map<std::string, std::vector<double>> all;
  for_each_parameter(parameters, [&](const std::string& name, const auto& tensor) {
    for (Index i = 0; i < tensor.size(); ++i) all[name].push_back(double(tensor.data()[i]));
  });
  return all;
}

template <typename Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "no error";
}

void expect_error(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

TEST(StateDict, GivesWhatWasAdded) {
  const std::vector<float> values{1, 2, 3, 4, 5, 6};
  const std::array<double, 2> pair{7, 8};
  const RowMatrix<float> matrix = RowMatrix<float>::Random(2, 3);
  const Vector<double> vector = Vector<double>::Random(4);
  const Single<float> single(2.5F);
  Tensor<std::int64_t, 3> tensor(1, 2, 1);
  tensor.setConstant(9);
  StateDict dict;
  dict.add("pointer", values.data(), {3, 2});
  dict.add("values", values, {6});
  dict.add("span", std::span(pair), {2, 1});
  dict.add("matrix", matrix);
  dict.add("vector", vector);
  dict.add("single", single);
  dict.add("tensor", tensor);
  dict.add("nothing", static_cast<const float*>(nullptr), {0, 3});
  EXPECT_EQ(dict.names().size(), 8U);
  EXPECT_EQ(dict.entry("pointer").shape, (std::vector<Index>{3, 2}));
  EXPECT_EQ(dict.entry("matrix").shape, (std::vector<Index>{2, 3}));
  EXPECT_EQ(dict.entry("vector").shape, (std::vector<Index>{4}));
  EXPECT_TRUE(dict.entry("single").shape.empty());
  EXPECT_EQ(dict.entry("tensor").shape, (std::vector<Index>{1, 2, 1}));
  EXPECT_EQ(dict.read<float>("pointer"), values);
  EXPECT_EQ(dict.read<double>("span"), (std::vector<double>{7, 8}));
  EXPECT_EQ(dict.read<float>("matrix")[3], matrix(1, 0));
  EXPECT_EQ(dict.scalar<float>("single"), 2.5F);
  EXPECT_EQ(dict.read<std::int64_t>("tensor")[1], 9);
  // Views, not copies.
  EXPECT_EQ(static_cast<const void*>(dict.entry("matrix").bytes.data()), matrix.data());
}

TEST(StateDict, OfACopyIsIndependent) {
  const std::vector<float> values{1, 2};
  std::optional<StateDict> first("first");
  first->add("a", values, {2});
  StateDict second = *first;
  second.add("b", values, {2});
  EXPECT_FALSE(first->contains("b"));
  StateDict third;
  third = second;
  third.add("c", values, {2});
  EXPECT_FALSE(second.contains("c"));
  first.reset();
  // The name that entries look at is still there.
  EXPECT_EQ(second.entry("a").file, "first");
  EXPECT_EQ(third.names(), (std::vector<std::string>{"a", "b", "c"}));
}

TEST(StateDict, RefusesWhatIsNoTensor) {
  const std::vector<float> values{1, 2};
  StateDict dict;
  dict.add("a", values, {2});
  expect_error(error_of([&] { dict.add("a", values, {2}); }), "name: expected one that was not");
  expect_error(error_of([&] { dict.add("b", values, {3}); }),
               "shape: expected 8 bytes, as were given, got 12 for 'b'");
  expect_error(error_of([&] { dict.add("b", values, {-1}); }),
               "shape: expected extents of at least 0, got -1 for 'b'");
  expect_error(error_of([&] { dict.add("b", values.data(), {Index{1} << 62, 4}); }),
               "shape: expected fewer than 2^63 bytes");
  expect_error(error_of([&] { dict.add("b", static_cast<const float*>(nullptr), {2}); }),
               "data: expected 8 bytes, got null for 'b'");
  expect_error(error_of([&] { dict.add_bytes("b", Dtype::F16, {1}, std::array<std::byte, 3>()); }),
               "shape: expected 3 bytes, as were given, got 2 for 'b'");
  expect_error(error_of([&] { dict.add_bytes("b", Dtype::Other, {0}, {}); }),
               "dtype: expected one that this library knows");
  EXPECT_EQ(dict.names(), (std::vector<std::string>{"a"}));
}

TEST(StateDict, IsLoadedWhereAFileIs) {
  const SafetensorsFile layer(data / "golden/mha_everything.safetensors");
  const auto of_layer = load_local_mha<double>(layer);
  for (const std::string prefix : {"param/", ""}) {
    const StateDict dict = weights(layer, prefix);
    EXPECT_EQ(numbers(load_local_mha<double>(dict).parameters), numbers(of_layer.parameters));
    EXPECT_EQ(numbers(load_local_mha_parameters<double>(dict, of_layer.config)),
              numbers(of_layer.parameters));
  }
  const SafetensorsFile model(data / "golden/transformer_dynamic_bias.safetensors");
  const auto of_model = load_local_transformer<double>(model);
  EXPECT_EQ(numbers(load_local_transformer_parameters<double>(weights(model, ""), of_model.config)),
            numbers(of_model.parameters));
  EXPECT_NO_THROW(
      load_dynamic_position_bias<double>(weights(model, "module."), "dynamic_pos_bias."));
  const SafetensorsFile encoder(data / "golden_stack/encoder_streams4.safetensors");
  const auto of_encoder = load_encoder<double>(encoder);
  EXPECT_EQ(numbers(load_encoder<double>(weights(encoder, "")).parameters),
            numbers(of_encoder.parameters));

  const RowMatrix<float> matrix = RowMatrix<float>::Random(8, 8);
  StateDict attention;
  for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj"})
    attention.add("model.layers.0.self_attn." + std::string(name) + ".weight", matrix);
  const nlohmann::json config{{"model_type", "mistral"},
                              {"hidden_size", 8},
                              {"num_attention_heads", 2},
                              {"sliding_window", 5}};
  EXPECT_EQ(
      load_attention<float>(attention, "model.layers.0.self_attn", config).parameters().to_out,
      matrix);
}

// What a user has: a set of weights by its names.
TEST(StateDict, OfAParameterSetGivesItBack) {
  const EncoderConfig config{.depth = 2,
                             .layers = {{.dim = 6, .window_size = 3, .dim_head = 2, .heads = 3}},
                             .num_residual_streams = 2};
  const auto parameters = initial_parameters<EncoderParameters<float>>(config, 1);
  StateDict dict;
  for_each_parameter(parameters,
                     [&](const std::string& name, const auto& t) { dict.add("net/" + name, t); });
  EXPECT_EQ(numbers(load_encoder_parameters<float>(dict, config, "net/")), numbers(parameters));
}

TEST(StateDict, ThatLacksATensorNamesIt) {
  const SafetensorsFile file(data / "golden/mha_gated.safetensors");
  const StateDict dict = views(file, [](const std::string& name) {
    return name == "param/to_out.weight" ? std::nullopt : std::optional(name);
  });
  expect_error(error_of([&] { load_local_mha<float>(dict); }),
               "memory: tensor 'param/to_out.weight': expected F64, F32, F16 or BF16 [24, 24], got "
               "no such tensor");
}

TEST(Prefix, OfWhatHoldsTheModelIsFound) {
  const SafetensorsFile layer(data / "golden/mha_everything.safetensors");
  const auto expected = load_local_mha<double>(layer);
  const SafetensorsFile stack(data / "golden_stack/stack_masked.safetensors");
  const auto of_stack = load_encoder<double>(stack);
  const SafetensorsFile model(data / "golden/transformer_causal.safetensors");
  const auto of_model = load_local_transformer<double>(model);
  for (const std::string prefix :
       {"module.", "_orig_mod.", "ema_model.", "_orig_mod.module.", "ema_model.module.",
        "module.ema_model._orig_mod.", "ema.", "state_dict.ema_model.", "online_model."}) {
    SCOPED_TRACE(prefix);
    EXPECT_EQ(numbers(load_local_mha<double>(weights(layer, prefix)).parameters),
              numbers(expected.parameters));
    EXPECT_EQ(numbers(load_local_mha_parameters<double>(weights(layer, prefix), expected.config)),
              numbers(expected.parameters));
    EXPECT_EQ(numbers(load_encoder<double>(weights(stack, prefix)).parameters),
              numbers(of_stack.parameters));
    EXPECT_EQ(numbers(load_local_transformer<double>(weights(model, prefix)).parameters),
              numbers(of_model.parameters));
    // Behind a prefix of the module's own, too.
    EXPECT_EQ(numbers(load_local_mha_parameters<double>(weights(layer, prefix + "net.attn."),
                                                        expected.config, "net.attn.")),
              numbers(expected.parameters));
  }
}

TEST(Prefix, OfAnAverageBesideOthersIsFoundAndOfTwoModelsIsNot) {
  const SafetensorsFile layer(data / "golden/mha_everything.safetensors");
  const auto expected = load_local_mha<double>(layer);
  const std::vector<float> other{1};
  StateDict average = weights(layer, "ema_model.");
  average.add("initted", other, {1});
  EXPECT_EQ(numbers(load_local_mha<double>(average).parameters), numbers(expected.parameters));
  for (const auto& [name, entry] : layer.entries())
    if (name.starts_with("param/"))
      average.add_bytes("online_model." + name.substr(6), entry.dtype, entry.shape, entry.bytes);
  expect_error(error_of([&] { load_local_mha<double>(average); }),
               "memory: expected one module, or a prefix that says which, got them at 'ema_model.' "
               "and 'online_model.'");
  EXPECT_EQ(numbers(load_local_mha<double>(average, "online_model.").parameters),
            numbers(expected.parameters));
  // What is there as it is asked for comes first, and the rest belongs to nothing.
  StateDict both = weights(layer, "");
  both.add("ema_model.to_out.weight", other, {1});
  expect_error(error_of([&] { load_local_mha<double>(both); }),
               "'ema_model.to_out.weight': expected no such tensor");
  // Not all names have it.
  const StateDict some = views(layer, [](const std::string& name) {
    if (!name.starts_with("param/")) return std::optional<std::string>();
    return std::optional((name == "param/to_out.weight" ? "" : "ema_model.") + name.substr(6));
  });
  expect_error(error_of([&] { load_local_mha<double>(some); }), "got no such tensor, but 'ema_mod");
}

TEST(Prefix, OfAPublishedModelsLayerIsFound) {
  const RowMatrix<float> matrix = RowMatrix<float>::Random(8, 8);
  const nlohmann::json config{{"model_type", "mistral"},
                              {"hidden_size", 8},
                              {"num_attention_heads", 2},
                              {"sliding_window", 5}};
  for (const std::string before : {"module.", "ema_model.", "ema_model._orig_mod."}) {
    StateDict attention;
    for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj"})
      attention.add(before + "model.layers.0.self_attn." + name + ".weight", matrix);
    EXPECT_EQ(
        load_attention<float>(attention, "model.layers.0.self_attn", config).parameters().to_out,
        matrix);
  }
}

TEST(ResidualStreams, OfWhichATensorIsMissingNameThatOne) {
  for (const char* name : {"encoder_streams4", "transformer_streams4"}) {
    const SafetensorsFile file(data / "golden_stack" / (std::string(name) + ".safetensors"));
    Case described = read_case(file);
    described.kwargs.erase("num_residual_streams");
    SafetensorsWriter with_case;
    set_case(with_case, described);
    const std::string text = SafetensorsFile::from_bytes(with_case.bytes()).metadata().at("case");
    for (const std::string& missing : file.names()) {
      if (!missing.starts_with("param/") || missing.ends_with("inv_freq")) continue;
      StateDict dict = views(file, [&](const std::string& tensor) {
        return tensor == missing ? std::nullopt : std::optional(tensor);
      });
      for (const bool says_streams : {true, false}) {
        if (!says_streams) dict.set_metadata("case", text);
        const std::string message = error_of([&] {
          std::string(name).starts_with("encoder") ? void(load_encoder<float>(dict))
                                                   : void(load_local_transformer<float>(dict));
        });
        expect_error(message, "tensor '" + missing + "': expected F64");
        EXPECT_TRUE(message.ends_with("got no such tensor")) << message;
      }
    }
  }
}

}  // namespace state_dict_test
