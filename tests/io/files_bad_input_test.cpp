// SPDX-License-Identifier: MIT
// Every function that reads or writes files, with what it must refuse: an error that says what was
// expected, before anything is changed. What has no such case says why.
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include <local_mha/io/attention_case.hpp>
#include <local_mha/io/attention_layers.hpp>
#include <local_mha/io/encoder_weights.hpp>
#include <local_mha/io/longformer_layers.hpp>
#include <local_mha/io/model_config.hpp>
#include <local_mha/io/weights.hpp>

#include "io/file_builder.hpp"
#include "support/public_names.hpp"

namespace files_bad_input_test {

using namespace local_mha;
using namespace local_mha::io;
using namespace io_test;

const std::filesystem::path include_folder = LOCAL_MHA_INCLUDE_DIR "/local_mha/io";

struct BadInput {
  std::string function;
  std::function<void()> call;
  std::string message;
};

SafetensorsFile one_tensor() {
  SafetensorsWriter writer;
  writer.add("x", {2}, std::vector<float>{1, 2});
  return SafetensorsFile::from_bytes(writer.bytes(), "file");
}

std::vector<BadInput> of_files() {
  static const SafetensorsFile file = one_tensor();
  const auto writer = [](const auto& use) {
    return [use] {
      SafetensorsWriter filled;
      filled.add("x", {1}, std::vector<float>{1});
      const Bytes before = filled.bytes();
      try {
        use(filled);
      } catch (...) {
        EXPECT_EQ(filled.bytes(), before);
        throw;
      }
    };
  };
  using Writer = SafetensorsWriter&;
  return {
      {"SafetensorsFile::SafetensorsFile", [] { SafetensorsFile("/"); }, "got a folder"},
      {"SafetensorsFile::from_bytes", [] { SafetensorsFile::from_bytes({}); }, "an empty file"},
      {"TensorSource::entry", [] { file.entry("y"); }, "there is no such tensor"},
      {"TensorSource::read", [] { file.read<std::int64_t>("x"); }, "expected integers"},
      {"TensorSource::scalar", [] { file.scalar<float>("x"); }, "expected one element"},
      {"TensorSource::tensor", [] { file.tensor<float, 2>("x"); }, "expected 2 dimensions"},
      {"TensorSource::read_into",
       [] {
         std::vector<float> out(3);
         file.read_into<float>("x", out);
       },
       "expected 3 elements"},
      {"SafetensorsFile::SafetensorsFile", [] { SafetensorsFile("/", FileAccess::read, {"x"}); },
       "got a folder"},
      {"StateDict::add", [] { StateDict().add("y", static_cast<const float*>(nullptr), {1}); },
       "data: expected 4 bytes, got null for 'y'"},
      {"StateDict::add_bytes", [] { StateDict().add_bytes("y", Dtype::Other, {}, {}); },
       "dtype: expected one that this library knows"},
      {"SafetensorsWriter::add", writer([](Writer w) { w.add("y", {2}, std::vector<float>{1}); }),
       "expected 8 bytes"},
      {"SafetensorsWriter::add", writer([](Writer w) { w.add("x", {1}, std::vector<float>{1}); }),
       "not added before"},
      {"SafetensorsWriter::add",
       writer([](Writer w) { w.add("y", {1}, std::vector<float>{1}, static_cast<Dtype>(99)); }),
       "stored: expected F64, F32, F16 or BF16"},
      {"SafetensorsWriter::add_bytes",
       writer([](Writer w) { w.add_bytes("y", static_cast<Dtype>(99), {1}, Bytes(1)); }),
       "dtype: expected one that this library knows"},
      {"SafetensorsWriter::add_bytes",
       writer([](Writer w) { w.add_bytes("y", Dtype::F32, {1}, Bytes(3)); }), "expected 4 bytes"},
      {"SafetensorsWriter::merge", writer([](Writer w) {
         SafetensorsWriter other;
         other.add("x", {1}, std::vector<float>{1});
         w.merge(other);
       }),
       "not added before"},
      {"SafetensorsWriter::set_metadata", writer([](Writer w) { w.set_metadata("\xff", ""); }),
       "expected UTF-8"},
      {"SafetensorsWriter::write", writer([](Writer w) { w.write("/"); }),
       "expected a regular file or a new name"},
      {"AtomicFile::AtomicFile", [] { AtomicFile(""); }, "expected a regular file or a new name"},
      {"AtomicFile::write",
       [] {
         const TemporaryFolder folder;
         AtomicFile written(folder / "x");
         written.commit();
         written.write({});
       },
       "expected nothing more after commit()"},
      {"parse_json", [] { parse_json("{", "text"); }, "text: expected JSON"},
      {"read_case", [] { read_case(file); }, "expected the key 'case'"},
      {"set_case", writer([](Writer w) { set_case(w, {.kind = "\xff"}); }), "expected UTF-8"},
      {"set_case", writer([](Writer w) { set_case(w, {.kwargs = {{"x", "\xff"}}}); }),
       "expected UTF-8"},
      {"read_model_config", [] { read_model_config("/"); }, "got a folder"},
      {"attention_layer", [] { attention_layer(file, "", 1); }, "config: expected a JSON object"},
      {"attention_layer", [] { attention_layer(file, "", {{"model_type", "mistral"}}, -1); },
       "number: expected 0 to 2^30 - 1, got -1"},
      {"load_attention", [] { load_attention<float>(file, "", {{"model_type", "llama"}}); },
       "config.model_type: expected one of mistral, "},
      {"load_attention_parameters", [] { load_attention_parameters<float>(file, "", {}); },
       "dim: expected"},
      {"attention_gradients",
       [] {
         const LocalMHAConfig config{.dim = 2, .window_size = 3};
         attention_gradients<float>({.model_type = "", .config = config, .tensors = {}}, {});
       },
       "to_qkv.weight: expected shape"},
      {"family_of_case",
       [] {
         SafetensorsWriter with_case;
         with_case.set_metadata("case", "1");
         family_of_case(SafetensorsFile::from_bytes(with_case.bytes()));
       },
       "case: expected an object"},
      {"read_attention_case", [] { read_attention_case(file); },
       "file: case.config: expected a JSON object"},
      {"read_longformer_case", [] { read_longformer_case(file); },
       "file: case.config: expected a JSON object"},
      {"longformer_layer", [] { longformer_layer({{"model_type", "bert"}}); },
       "config.model_type: expected longformer or led, got 'bert'"},
      {"load_longformer", [] { load_longformer<float>(file, "", 1); },
       "config: expected a JSON object"},
      {"load_longformer_parameters", [] { load_longformer_parameters<float>(file, "", {}); },
       "dim: expected"},
      {"longformer_gradients",
       [] { longformer_gradients<float>({{.dim = 2, .heads = 1, .attention_window = 2}, {}}, {}); },
       "to_qkv.weight: expected shape"},
      {"load_attention_parameters",
       [] {
         load_attention_parameters<float>(file, "",
                                          {.model_type = "",
                                           .config = {.dim = 2, .window_size = 3},
                                           .tensors = {{"x", {2}, "to_out.weight", 2}}});
       },
       "layer.tensors: expected parts of the layer's weights, got 'x' for to_out.weight"},
      {"local_attention_config", [] { local_attention_config(1); }, "expected a JSON object"},
      {"local_mha_config", [] { local_mha_config({{"dim", 4}}); }, "window_size: expected"},
      {"local_transformer_config", [] { local_transformer_config({{"dim", 4}}); },
       "num_tokens: expected"},
      {"load_local_attention", [] { load_local_attention(file); }, "expected the key 'case'"},
      {"load_local_mha", [] { load_local_mha<float>(file); }, "expected the key 'case'"},
      {"load_local_transformer", [] { load_local_transformer<float>(file); },
       "expected the key 'case'"},
      {"load_local_mha_parameters", [] { load_local_mha_parameters<float>(file, {}, ""); },
       "dim: expected"},
      {"load_local_transformer_parameters",
       [] { load_local_transformer_parameters<float>(file, {}, ""); }, "num_tokens: expected"},
      {"load_feed_forward_parameters", [] { load_feed_forward_parameters<float>(file, 0, 1, ""); },
       "dim: expected at least 1"},
      {"load_feed_forward_parameters", [] { load_feed_forward_parameters<float>(file, 1, 0, ""); },
       "inner: expected at least 1"},
      {"load_dynamic_position_bias", [] { load_dynamic_position_bias<float>(file, ""); },
       "'mlp.0.weight': expected a matrix"},
      {"add_local_mha",
       writer([](Writer w) { add_local_mha<float>(w, {.dim = 2, .window_size = 3}, {}); }),
       "to_qkv.weight: expected shape"},
      {"add_local_transformer", writer([](Writer w) {
         add_local_transformer<float>(w, {.num_tokens = 2, .max_seq_len = 3, .dim = 4, .depth = 1},
                                      {});
       }),
       "token_emb.weight: expected shape"},
      {"local_transformer_encoder_config", [] { local_transformer_encoder_config({{"dim", 4}}); },
       "depth: expected"},
      {"stack_config", [] { stack_config(1); }, "kwargs: expected a JSON object"},
      {"stack_config", [] { stack_config({{"depth", 1}}); }, "dim: expected"},
      {"to_local_transformer_kwargs",
       [] { to_local_transformer_kwargs({.depth = 1, .layers = {{.dim = 2, .window_size = 3}}}); },
       "layers: expected what a Python LocalTransformer has"},
      {"to_stack_kwargs", [] { to_stack_kwargs({.depth = 1}); }, "layers: expected"},
      {"load_encoder", [] { load_encoder<float>(file); }, "expected the key 'case'"},
      {"load_encoder_parameters", [] { load_encoder_parameters<float>(file, {.depth = 1}, ""); },
       "layers: expected"},
      {"add_encoder", writer([](Writer w) {
         add_encoder<float>(w, {.depth = 1, .layers = {{.dim = 2, .window_size = 3}}}, {},
                            EncoderForm::module_list);
       }),
       "expected"},
      {"save_encoder", [] { save_encoder<float>("/", {.depth = 1}, {}, EncoderForm::module_list); },
       "layers: expected"},
      {"save_local_mha", [] { save_local_mha<float>("/", {}, {}); }, "dim: expected"},
      {"save_local_transformer", [] { save_local_transformer<float>("/", {}, {}); },
       "num_tokens: expected"},
  };
}

// Reason: names.
const std::map<std::string, std::set<std::string>> without_bad_input{
    {"takes any text, name or number",
     {"StateDict::StateDict", "StateDict::set_metadata", "TensorSource::contains",
      "TensorSource::where", "SafetensorsError::SafetensorsError", "printable", "dtype_from_name",
      "to_float16", "to_bfloat16", "from_float16", "from_bfloat16"}},
    {"of any other name, false", {"is_longformer"}},
    {"an unknown dtype is Dtype::Other",
     {"bits_of", "size_of", "name_of", "is_float", "is_integer"}},
    {"says what it is given", {"describe", "to_string", "to_kwargs", "has_case"}},
    {"nlohmann's own error", {"quoted"}},
    {"ignores what is not there", {"AtomicFile::remove_temporaries"}},
};

TEST(FilesBadInput, IsRefusedByEveryFunction) {
  std::set<std::string> known;
  for (const BadInput& bad : of_files()) {
    known.insert(bad.function);
    std::string message;
    try {
      bad.call();
      ADD_FAILURE() << bad.function << ": no exception; expected: " << bad.message;
    } catch (const std::invalid_argument& error) {
      message = error.what();
    } catch (const SafetensorsError& error) {
      message = error.what();
    }
    EXPECT_NE(message.find(bad.message), std::string::npos) << bad.function << ": " << message;
  }
  for (const auto& [reason, names] : without_bad_input) known.insert(names.begin(), names.end());
  std::set<std::string> present;
  for (const auto& header : std::filesystem::directory_iterator(include_folder))
    present.merge(support::PublicNames::of_file(header.path()));
  EXPECT_EQ(present, known);
}

TEST(Dtypes, OfNoEnumeratorAreOther) {
  const auto unknown = static_cast<Dtype>(200);
  EXPECT_EQ(bits_of(unknown), 0U);
  EXPECT_EQ(size_of(unknown), 0U);
  EXPECT_EQ(name_of(unknown), name_of(Dtype::Other));
  EXPECT_FALSE(is_float(unknown) || is_integer(unknown));
  EXPECT_FALSE(dtype_from_name(name_of(Dtype::Other)).has_value());
}

}  // namespace files_bad_input_test
