// SPDX-License-Identifier: MIT
// Models in several files, by their index.
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/io/safetensors.hpp>

#include "io/file_builder.hpp"

namespace sharded_test {

using namespace local_mha::io;
using namespace io_test;

using Values = std::vector<float>;
using Tensors = std::vector<std::pair<std::string, Values>>;

class ShardedFile : public testing::Test {
 protected:
  void write_shard(const std::string& name, const Tensors& tensors,
                   const std::vector<std::pair<std::string, std::string>>& metadata = {}) const {
    SafetensorsWriter writer;
    for (const auto& [tensor, values] : tensors)
      writer.add(tensor, {static_cast<local_mha::Index>(values.size())}, values);
    for (const auto& [key, text] : metadata) writer.set_metadata(key, text);
    writer.write(folder_ / name);
  }

  void write_index(const nlohmann::json& weight_map) const {
    write_text(nlohmann::json{{"metadata", {{"total_size", 1}, {"from", "index"}}},
                              {"weight_map", weight_map}}
                   .dump(2));
  }

  void write_text(const std::string& text) const { write_file(index_, to_bytes(text)); }

  void expect_refused(const std::string& text, const std::string& tensor = "") const {
    try {
      SafetensorsFile{index_};
      FAIL() << "no exception; expected: " << text;
    } catch (const SafetensorsError& error) {
      EXPECT_EQ(error.tensor(), tensor) << error.what();
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
  }

  TemporaryFolder folder_;
  std::filesystem::path index_ = folder_ / "model.safetensors.index.json";
};

// Without taking memory for it.
TEST_F(ShardedFile, OfAHugeIndexIsRefused) {
  write_text("{\"weight_map\": {");
  std::filesystem::resize_file(index_, 100'000'001);
  expect_refused("index: expected at most 100000000 bytes, got 100000001");
}

TEST_F(ShardedFile, IsReadAsOne) {
  write_shard("1", {{"a", {1, 2}}, {"c", {3}}}, {{"format", "pt"}, {"case", "of 1"}});
  write_shard("2", {{"b", {4, 5, 6}}}, {{"format", "pt"}, {"case", "of 2"}, {"from", "2"}});
  write_index({{"a", "1"}, {"b", "2"}});  // c is there all the same
  for (const FileAccess access : {FileAccess::map, FileAccess::read}) {
    SafetensorsFile file(index_, access);
    const SafetensorsFile copy = file;
    file = SafetensorsFile::from_bytes(io_test::file("{}"));
    EXPECT_EQ(copy.names(), (std::vector<std::string>{"a", "b", "c"}));
    EXPECT_EQ(copy.read<float>("a"), (Values{1, 2}));
    EXPECT_EQ(copy.read<float>("b"), (Values{4, 5, 6}));
    EXPECT_EQ(copy.scalar<double>("c"), 3);
    EXPECT_EQ(copy.file_name(), index_.string());
    EXPECT_EQ(copy.entry("b").file, (folder_ / "2").string());
    EXPECT_EQ(copy.metadata().at("format"), "pt");
    EXPECT_EQ(copy.metadata().at("case"), "of 1");
    EXPECT_EQ(copy.metadata().at("from"), "index");
    EXPECT_EQ(message_of<SafetensorsError>([&] {
                copy.read<std::int64_t>("b");
              }).find((folder_ / "2").string() + ": tensor 'b': expected integers"),
              0U);
  }
}

TEST_F(ShardedFile, MayLieInAFolderBelowAndHoldNothing) {
  std::filesystem::create_directory(folder_ / "parts");
  write_shard("parts/1", {{"a", {1}}});
  write_index({{"a", "parts/1"}});
  EXPECT_EQ(SafetensorsFile(index_).read<float>("a"), (Values{1}));
  write_index(nlohmann::json::object());
  EXPECT_TRUE(SafetensorsFile(index_).names().empty());
}

TEST_F(ShardedFile, TakesATensorFromWhereTheIndexSays) {
  write_shard("1", {{"a", {1}}, {"b", {2}}});
  write_shard("2", {{"a", {3}}, {"c", {4}}});
  write_index({{"a", "2"}, {"b", "1"}});
  EXPECT_EQ(SafetensorsFile(index_).read<float>("a"), (Values{3}));
  write_index({{"b", "1"}, {"c", "2"}});
  expect_refused("expected it in one file, or the index to say in which", "a");
}

TEST_F(ShardedFile, ThatLacksSomethingIsAnError) {
  write_shard("1", {{"a", {1}}});
  write_index({{"a", "1"}, {"b", "2"}});
  expect_refused((folder_ / "2").string() + ": cannot be opened: no such file");
  write_index({{"a", "1"}, {"b", "1"}});
  expect_refused("expected it in '1', got no such tensor there", "b");
  write_file(folder_ / "2", to_bytes("version https://git-lfs.github.com/spec/v1\n"));
  write_index({{"a", "1"}, {"b", "2"}});
  expect_refused("2: expected a safetensors file, got what seems to be a Git LFS pointer");
  write_file(folder_ / "2", to_bytes(R"({"weight_map": {}})"));
  expect_refused("2: expected a safetensors file, got what seems to be JSON");
}

TEST_F(ShardedFile, OpensOnlyWhatIsAskedFor) {
  write_shard("1", {{"layers.0.a", {1, 2}}, {"layers.1.a", {3}}});
  write_index({{"layers.0.a", "1"}, {"layers.1.a", "1"}, {"layers.2.a", "2"}, {"z", "3"}});
  write_file(folder_ / "3", to_bytes("no safetensors file"));
  const auto open = [&](const std::vector<std::string>& prefixes) {
    return SafetensorsFile(index_, FileAccess::map, prefixes);
  };
  for (const std::string prefix : {"layers.0.", "layers.0.a", "module.layers.0."}) {
    const SafetensorsFile file = open({prefix});
    EXPECT_EQ(file.read<float>("layers.0.a"), (Values{1, 2}));
    EXPECT_TRUE(file.contains("layers.1.a"));
    EXPECT_EQ(message_of<SafetensorsError>([&] { file.entry("layers.2.a"); }),
              index_.string() +
                  ": tensor 'layers.2.a': there is no such tensor, it lies in '2', "
                  "which was not to be opened");
    EXPECT_EQ(message_of<SafetensorsError>([&] { file.entry("y"); }),
              index_.string() + ": tensor 'y': there is no such tensor");
  }
  // All of them, or one that is missing or malformed, is an error as ever.
  EXPECT_THROW(open({}), SafetensorsError);
  EXPECT_NE(message_of<SafetensorsError>([&] {
              open({"layers.2"});
            }).find((folder_ / "2").string() + ": cannot be opened: no such file"),
            std::string::npos);
  EXPECT_THROW(open({"layers.0.", "z"}), SafetensorsError);
  EXPECT_EQ(message_of<SafetensorsError>([&] { open({"layers.0.", "layers.3."}); }),
            index_.string() +
                ": tensor 'layers.3.': expected it, or names that begin so, in the "
                "index, got none");
  write_index({{"layers.0.a", "1"}, {"layers.0.b", "1"}});
  EXPECT_NE(message_of<SafetensorsError>([&] {
              open({"layers.0.a"});
            }).find("tensor 'layers.0.b': expected it in '1', got no such tensor there"),
            std::string::npos);
}

TEST_F(ShardedFile, StaysInItsFolder) {
  write_shard("1", {{"a", {1}}});
  for (const std::string name : {"../1", "parts/../../1", "/etc/passwd", "..", "", "parts/", "./1",
                                 "parts//1", "parts/./1"}) {
    write_index({{"a", name}});
    expect_refused("index: expected the name of a file beside the index, got '" + name + "'", "a");
  }
}

TEST_F(ShardedFile, NamesWhatIsMalformed) {
  write_text("{");
  expect_refused("index: expected JSON");
  write_text("{\"a\": 1, \"a\": 2}");
  expect_refused("index: expected JSON with distinct keys");
  write_text("  \n{\"hidden_size\": 5}");
  expect_refused("expected a safetensors file, or an index of several with the key 'weight_map'");
  write_text(R"({"weight_map": []})");
  expect_refused("index: weight_map: expected an object, got an array");
  write_text(R"({"weight_map": {"a": 1}})");
  expect_refused("index: expected a file's name, got 1", "a");
  write_text(R"({"weight_map": {}, "metadata": 5})");
  EXPECT_NO_THROW(SafetensorsFile{index_});
  // What is not an object says nothing.
  write_text(R"({"weight_map": {}, "metadata": "text"})");
  EXPECT_TRUE(SafetensorsFile(index_).metadata().empty());
}

}  // namespace sharded_test
