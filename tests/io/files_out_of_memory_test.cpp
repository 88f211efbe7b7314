// SPDX-License-Identifier: MIT
// The 1st, 2nd, … allocation of every call that reads or writes files fails: it throws, and objects
// and files are as they were; tried again, it gives what it gives with enough memory.
#include "support/failing_memory.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <filesystem>
#include <functional>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/io/encoder_weights.hpp>
#include <local_mha/io/weights.hpp>

#include "io/file_builder.hpp"

namespace files_out_of_memory_test {

using namespace local_mha;
using namespace local_mha::io;
using namespace io_test;

const std::filesystem::path golden_folder =
    std::filesystem::path(LOCAL_MHA_TEST_DATA_DIR) / "golden";

/// \param call what is tried
/// \param check is run after each failure, and after the success
void fail_each_allocation(
    const std::function<void()>& call,
    const std::function<void(bool has_succeeded)>& check = [](bool) {}) {
  long failures = 0;
  for (long number = 1;; ++number) {
    bool is_file_error = false;
    const support::Outcome outcome = support::with_failure(number, false, [&] {
      try {
        call();
      } catch (const SafetensorsError&) {  // where the system says that it had no memory
        is_file_error = true;
      }
    });
    if (!outcome.failed) {
      ASSERT_FALSE(is_file_error);
      break;
    }
    ++failures;
    // What the system does without its memory, it does.
    check(!outcome.threw && !is_file_error);
    if (testing::Test::HasFailure()) {
      ADD_FAILURE() << "allocation " << number;
      return;
    }
    ASSERT_LT(number, 100'000);
  }
  check(true);
  if (MEMORY_FAILS) {
    EXPECT_GT(failures, 0);
  }
}

SafetensorsWriter some_tensors() {
  SafetensorsWriter writer;
  writer.add("a long name, which does not fit into a string itself", {2}, std::vector<float>{1, 2});
  writer.add("b", {3}, std::vector<std::int64_t>{1, 2, 3});
  writer.set_metadata("a key that does not fit into a string itself", "as long a text, or longer");
  return writer;
}

TEST(OutOfMemory, OpeningAndReading) {
  const TemporaryFolder folder;
  some_tensors().write(folder / "part");
  const std::string long_name = some_tensors().bytes().empty() ? ""
                                                               : "a long name, which does not "
                                                                 "fit into a string itself";
  write_file(folder / "index", to_bytes(R"({"metadata": {"x": 1, "y": ["z"]}, "weight_map": {")" +
                                        long_name + R"(": "part", "b": "part"}})"));
  const SafetensorsFile before = SafetensorsFile::from_bytes(file("{}"));
  for (const char* name : {"part", "index"})
    for (const FileAccess access : {FileAccess::map, FileAccess::read}) {
      SafetensorsFile opened = before;
      fail_each_allocation([&] { opened = SafetensorsFile(folder / name, access); },
                           [&](bool has_succeeded) {
                             ASSERT_EQ(opened.names().size(), has_succeeded ? 2U : 0U);
                             if (has_succeeded) {
                               EXPECT_EQ(opened.read<float>(long_name)[1], 2);
                             }
                             opened = before;
                           });
    }
  const std::vector<std::string> prefixes{"b"};
  fail_each_allocation([&] { SafetensorsFile(folder / "index", FileAccess::map, prefixes); });
  const Bytes bytes = some_tensors().bytes();
  fail_each_allocation([&] { SafetensorsFile::from_bytes(bytes); });
  const SafetensorsFile opened(folder / "part");
  fail_each_allocation([&] { opened.read<double>(long_name); });
  fail_each_allocation([&] { opened.tensor<std::int64_t, 1>("b"); });
  fail_each_allocation([&] { opened.names(); });
}

TEST(OutOfMemory, TensorsInMemory) {
  const std::string name = "a long name, which does not fit into a string itself";
  const std::vector<float> values{1, 2, 3, 4};
  StateDict before(name);
  before.add(name, values, {2, 2});
  StateDict dict = before;
  const std::vector<std::function<void()>> calls{
      [&] { dict.add(name + "2", values, {4}); },
      [&] { dict.set_metadata(name, name + name); },
      [&] {
        StateDict other(name + name);
        other.add(name + "2", values, {2, 2});
        dict = other;
      },
  };
  for (const auto& call : calls)
    fail_each_allocation(call, [&](bool has_succeeded) {
      const bool is_as_before = dict.names() == before.names() &&
                                dict.metadata() == before.metadata() &&
                                dict.file_name() == before.file_name();
      EXPECT_EQ(is_as_before, !has_succeeded);
      EXPECT_EQ(dict.entry(dict.names().back()).file, dict.file_name());
      if (has_succeeded) dict = before;
    });
  const LocalMHAConfig config{.dim = 2, .window_size = 3, .dim_head = 2, .heads = 1};
  const RowMatrix<float> matrix = RowMatrix<float>::Zero(6, 2);
  StateDict layer;
  layer.add("ema_model.to_qkv.weight", matrix);
  layer.add("ema_model.to_out.weight", matrix.data(), {2, 2});
  fail_each_allocation([&] { load_local_mha_parameters<float>(layer, config); });
}

TEST(OutOfMemory, LoadingWeights) {
  for (const char* name : {"mha_everything", "mha_gated"}) {
    const SafetensorsFile file(golden_folder / (std::string(name) + ".safetensors"));
    Case described;
    fail_each_allocation([&] { described = read_case(file); }, [&](bool) { described = {}; });
    fail_each_allocation([&] { load_local_mha<float>(file); });
  }
  const SafetensorsFile model(golden_folder / "transformer_dynamic_bias.safetensors");
  fail_each_allocation([&] { load_local_transformer<double>(model); });
  fail_each_allocation(
      [&] { load_dynamic_position_bias<float>(model, "param/dynamic_pos_bias."); });
  for (const char* name : {"encoder_streams4", "stack_masked"}) {
    const SafetensorsFile encoder(golden_folder / ".." / "golden_stack" /
                                  (std::string(name) + ".safetensors"));
    fail_each_allocation([&] { load_encoder<float>(encoder); });
  }
  const SafetensorsFile attention(golden_folder / "attn_causal.safetensors");
  fail_each_allocation([&] { load_local_attention(attention); });
}

TEST(OutOfMemory, Configurations) {
  const nlohmann::json kwargs = parse_json(
      R"({"dim": 24, "window_size": 6, "use_xpos": true, "rel_pos_emb_config": [64, 8]})",
      "kwargs");
  fail_each_allocation([&] { local_mha_config(kwargs); });
  const LocalMHAConfig config = local_mha_config(kwargs);
  // The destructor of such a value takes memory and does not throw: not while that is missing.
  nlohmann::json kept;
  const auto forget = [&](bool) { kept = nullptr; };
  fail_each_allocation([&] { kept = to_kwargs(config); }, forget);
  fail_each_allocation([&] { kept = to_kwargs(LocalAttentionConfig{.window_size = 3}); }, forget);
  fail_each_allocation(
      [&] {
        kept = to_kwargs(LocalTransformerConfig{.num_tokens = 2, .max_seq_len = 3, .dim = 4});
      },
      forget);
  fail_each_allocation(
      [&] { kept = parse_json(R"({"dim": [1, {"a": "b"}], "c": null})", "kwargs"); }, forget);
}

TEST(OutOfMemory, CollectingTensors) {
  const LocalMHAConfig config{.dim = 6, .window_size = 3, .dim_head = 4, .heads = 2};
  const auto layer = LocalMHAParameters<float>::zeros(config);
  const LocalTransformerConfig model_config{
      .num_tokens = 5, .max_seq_len = 7, .dim = 6, .depth = 2, .dim_head = 4, .heads = 2};
  const auto model = LocalTransformerParameters<float>::zeros(model_config);
  const Tensor<double, 2> tensor = Tensor<double, 2>(2, 3).setZero();
  const RowMatrix<float> matrix = RowMatrix<float>::Zero(3, 4);
  const SafetensorsWriter before = some_tensors();
  const Bytes bytes_before = before.bytes();
  const Case described{.kind = "LocalMHA", .kwargs = {{"dim", 1}}, .note = "a note"};
  const std::vector<std::function<void(SafetensorsWriter&)>> calls{
      [&](SafetensorsWriter& w) { w.add("x", {2}, std::vector<float>{1, 2}); },
      [&](SafetensorsWriter& w) { w.add("x", tensor); },
      [&](SafetensorsWriter& w) { w.add("x", matrix, Dtype::F16); },
      [&](SafetensorsWriter& w) { w.add_bytes("x", Dtype::U8, {1}, to_bytes("x")); },
      [&](SafetensorsWriter& w) {
        w.set_metadata("a key that does not fit into a string itself",
                       "another text, longer than the other one by far, so that it needs memory");
      },
      [&](SafetensorsWriter& w) { w.set_metadata("key", "text"); },
      [&](SafetensorsWriter& w) { set_case(w, described); },
      [&](SafetensorsWriter& w) { add_local_mha(w, config, layer); },
      [&](SafetensorsWriter& w) { add_local_transformer(w, model_config, model); },
  };
  for (std::size_t i = 0; i < calls.size(); ++i) {
    SCOPED_TRACE(i);
    SafetensorsWriter writer = before;
    fail_each_allocation([&] { calls[i](writer); },
                         [&](bool has_succeeded) {
                           EXPECT_EQ(writer.bytes() == bytes_before, !has_succeeded);
                           if (has_succeeded) writer = before;
                         });
  }
  fail_each_allocation([&] { static_cast<void>(before.bytes()); });
}

TEST(OutOfMemory, WritingFiles) {
  const TemporaryFolder folder;
  const SafetensorsWriter writer = some_tensors();
  const LocalMHAConfig config{.dim = 6, .window_size = 3, .dim_head = 4, .heads = 2};
  const auto layer = LocalMHAParameters<float>::zeros(config);
  std::filesystem::create_symlink("x", folder / "link");
  for (const char* name : {"x", "link"})
    for (const auto& call : std::vector<std::function<void()>>{
             [&] { writer.write(folder / name); },
             [&] { save_local_mha(folder / name, config, layer); },
         }) {
      write_file(folder / "x", to_bytes("old"));
      fail_each_allocation(call, [&](bool has_succeeded) {
        EXPECT_EQ(read_file(folder / "x") == "old", !has_succeeded);
        EXPECT_EQ(folder.number_of_files(), 2U);
        write_file(folder / "x", to_bytes("old"));
      });
    }
  // Not AtomicFile::remove_temporaries(): libstdc++ ends the process where there is no memory to
  // list a folder.
}

}  // namespace files_out_of_memory_test
