// SPDX-License-Identifier: MIT
// Files with encoders: configurations in both forms that Python has, and those that do not fit.
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/io/encoder_weights.hpp>

#include "support/random_encoder.hpp"
#include "support/temporary_folder.hpp"

namespace encoder_files_test {

namespace io = local_mha::io;
using local_mha::EncoderConfig;
using local_mha::EncoderParameters;
using nlohmann::json;

const std::string golden = LOCAL_MHA_TEST_DATA_DIR "/golden_stack/";

/// A copy of a golden file's weights under another case.
io::SafetensorsFile with_case(const std::string& name, const std::string& kind, json kwargs) {
  const io::SafetensorsFile file(golden + name + ".safetensors");
  io::SafetensorsWriter writer;
  for (const std::string& tensor : file.names())
    if (tensor.starts_with("param/"))
      writer.add(tensor, file.entry(tensor).shape, file.read<double>(tensor));
  set_case(writer, {.kind = kind, .kwargs = std::move(kwargs)});
  // An open file stays as long as it is read.
  const support::TemporaryFolder folder;
  const auto path = folder / "encoder.safetensors";
  writer.write(path);
  return io::SafetensorsFile(path);
}

json kwargs_of(const std::string& name) {
  return io::read_case(io::SafetensorsFile(golden + name + ".safetensors")).kwargs;
}

template <typename Call>
std::string message_of(Call&& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "nothing was thrown";
}
void expect_message(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

TEST(EncoderFiles, WithoutANumberOfStreamsHaveThatOfTheirWeights) {
  for (const auto& [name, streams] :
       {std::pair("encoder_streams1", 1), std::pair("encoder_streams4", 4)}) {
    json kwargs = kwargs_of(name);
    for (const bool null : {false, true}) {
      kwargs.erase("num_residual_streams");
      if (null) kwargs["num_residual_streams"] = nullptr;
      const auto loaded = io::load_encoder<float>(with_case(name, "LocalTransformer", kwargs));
      EXPECT_EQ(loaded.config.num_residual_streams, streams);
    }
  }
  json kwargs = kwargs_of("transformer_streams2");
  kwargs.erase("num_residual_streams");
  EXPECT_EQ(io::load_local_transformer<float>(
                with_case("transformer_streams2", "LocalTransformer", kwargs))
                .config.num_residual_streams,
            2);
}

TEST(EncoderFiles, OfAnotherNumberOfStreamsAreRefused) {
  json kwargs = kwargs_of("encoder_streams4");
  kwargs["num_residual_streams"] = 3;
  const auto load = [&] {
    return message_of([&] {
      io::load_encoder<float>(with_case("encoder_streams4", "LocalTransformer", kwargs));
    });
  };
  expect_message(load(), "layers.0.0.static_alpha");
  kwargs["num_residual_streams"] = 1;
  expect_message(load(), "hyper-connections");
}

// Names do not depend on the kind that the file says.
TEST(EncoderFiles, AreReadInEitherForm) {
  json kwargs = kwargs_of("stack_soundstream");
  const EncoderConfig config = io::stack_config(kwargs);
  const io::SafetensorsFile list(golden + "stack_soundstream.safetensors");
  const auto parameters = io::load_encoder_parameters<double>(list, config, "param/");
  const support::TemporaryFolder folder;
  const auto path = folder / "encoder.safetensors";
  io::save_encoder(path, config, parameters, io::EncoderForm::local_transformer);
  const auto loaded = io::load_encoder<double>(io::SafetensorsFile(path));
  EXPECT_EQ(loaded.config, config);
  const auto expected = support::named<double>(parameters);
  for (const auto& [name, weight] : support::named<double>(loaded.parameters))
    EXPECT_EQ(weight.data, expected.at(name).data) << name;
}

TEST(EncoderFiles, OfAnyEncoderComeBack) {
  const support::TemporaryFolder folder;
  const auto path = folder / "encoder.safetensors";
  for (std::uint64_t seed = 1; seed < 30; ++seed) {
    SCOPED_TRACE(seed);
    const support::RandomEncoder c(seed);
    auto parameters = EncoderParameters<float>::zeros(c.config);
    support::assign(parameters, c.parameters);
    io::save_encoder(path, c.config, parameters, io::EncoderForm::module_list);
    const auto loaded = io::load_encoder<float>(io::SafetensorsFile(path));
    // A default that depends on others is written as what it is.
    EXPECT_EQ(io::to_stack_kwargs(loaded.config), io::to_stack_kwargs(c.config));
    const auto expected = support::named<float>(parameters);
    for (const auto& [name, weight] : support::named<float>(loaded.parameters))
      EXPECT_EQ(weight.data, expected.at(name).data) << name;
  }
}

TEST(EncoderFiles, OfLayersThatPythonsTransformerDoesNotHaveAreRefused) {
  EncoderConfig config{.depth = 2, .layers = {{.dim = 4, .window_size = 2}}};
  config.layers[0].dim_head = 2;
  const auto write = [&] {
    return message_of([&] {
      io::SafetensorsWriter writer;
      io::add_encoder(writer, config, EncoderParameters<float>::zeros(config),
                      io::EncoderForm::local_transformer);
    });
  };
  expect_message(write(), "layers: expected what a Python LocalTransformer has");
  config.layers[0].prenorm = true;
  EXPECT_EQ(write(), "nothing was thrown");
  config.layers.push_back(config.layers[0]);
  config.layers[1].window_size = 3;
  expect_message(write(), "layers: expected what a Python LocalTransformer has");
}

TEST(EncoderKwargs, ThatAreWrongAreNamed) {
  const json good = kwargs_of("stack_masked");
  const auto stack = [&](const char* key, const json& value) {
    json kwargs = good;
    kwargs[key] = value;
    return message_of([&] { io::stack_config(kwargs); });
  };
  expect_message(stack("depth", nullptr), "depth: expected a value");
  expect_message(stack("ff_mult", "4"), "ff_mult: expected a number");
  expect_message(stack("window_size", 0),
                 "window_size: expected at least 1, or a token_window, got 0");
  expect_message(stack("layers", 3), "layers: expected a list");
  expect_message(stack("layers", json::array()), "expected nothing beside layers");
  expect_message(stack("num_tokens", 3), "num_tokens: expected a keyword argument");
  expect_message(message_of([] { io::stack_config(3); }), "kwargs: expected a JSON object");
  json encoder = kwargs_of("encoder_streams1");
  encoder["num_tokens"] = 5;
  expect_message(message_of([&] { io::local_transformer_encoder_config(encoder); }),
                 "num_tokens: expected null, because an encoder takes rows, not tokens, got 5");
  expect_message(message_of([] {
                   io::load_encoder<float>(io::SafetensorsFile(LOCAL_MHA_TEST_DATA_DIR
                                                               "/golden/mha_gated.safetensors"));
                 }),
                 "case: kind: expected 'LocalTransformer', got 'LocalMHA'");
}

}  // namespace encoder_files_test
