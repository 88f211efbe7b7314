// SPDX-License-Identifier: MIT
// A program may set a global locale whose numbers look otherwise: neither files nor messages may.
#include <gtest/gtest.h>

#include <clocale>
#include <exception>
#include <filesystem>
#include <functional>
#include <locale>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/io/weights.hpp>

#include "io/file_builder.hpp"

namespace files_locale_test {

using namespace local_mha;
using namespace local_mha::io;
using namespace io_test;

// What is made of numbers and texts, and read again.
std::vector<std::string> everything(const std::filesystem::path& path) {
  LocalMHAConfig config{.dim = 1200, .window_size = 12345, .dim_head = 2, .heads = 1};
  config.dropout = 0.25;
  config.use_xpos = true;
  config.xpos_scale_base = 1234.5;
  auto parameters = LocalMHAParameters<double>::zeros(config);
  parameters.to_out.setConstant(0.1);
  save_local_mha(path, config, parameters, {.note = "1234567.5"});
  const std::string bytes = read_file(path);
  std::vector<std::string> all{std::to_string(std::hash<std::string>{}(bytes))};
  const SafetensorsFile file(path);
  const auto weights = load_local_mha<double>(file);
  EXPECT_EQ(weights.parameters.to_out(1000, 1), 0.1);
  EXPECT_EQ(local_mha_config(
                parse_json(R"({"dim": 1200, "window_size": 2048, "dropout": 0.125})", "kwargs"))
                .dropout,
            0.125);
  all.push_back(to_kwargs(weights.config).dump());
  all.push_back(to_string(file.entry("param/to_out.weight")));

  const auto add = [&](const auto& run) {
    try {
      run();
    } catch (const std::exception& error) {
      all.emplace_back(error.what());
    }
  };
  add([&] { static_cast<void>(file.read<std::int64_t>("param/to_out.weight")); });
  add([&] { static_cast<void>(file.scalar<float>("param/to_out.weight")); });
  add([&] { load_local_mha<float>(file, "net."); });
  add([&] { SafetensorsFile::from_bytes(to_bytes(size_field(123456789) + std::string(8, '\1'))); });
  add([&] { local_mha_config({{"dim", 1200}, {"window_size", 2048.5}}); });
  add([&] { local_mha_config({{"dim", 1200}, {"window_size", 2048}, {"dropout", 1234.5}}); });
  add([&] { local_mha_config({{"dim", -12000}, {"window_size", 2048}}); });
  add([&] { load_feed_forward_parameters<float>(file, -12000, 3, ""); });
  add([&] { parse_json(std::string(5000, ' ') + std::string(1, '\0'), "text"); });
  SafetensorsWriter writer;
  add([&] { writer.add("x", {12345}, std::vector<float>(2345)); });
  add([&] { writer.add("x", {-12345}, std::vector<float>(2345)); });
  writer.add("param/attn_fn.rel_pos.inv_freq", {1}, std::vector<float>{1234.5F});
  set_case(writer, {.kind = "LocalMHA",
                    .kwargs = {{"dim", 1200}, {"window_size", 2}, {"dim_head", 2}, {"heads", 1}}});
  writer.add("param/to_qkv.weight", {6, 1200}, std::vector<float>(7200));
  add([&] { load_local_mha<float>(SafetensorsFile::from_bytes(writer.bytes(), "file")); });
  return all;
}

struct Swiss : std::numpunct<char> {
  char do_decimal_point() const override { return ','; }
  char do_thousands_sep() const override { return '\''; }
  std::string do_grouping() const override { return "\3"; }
  std::string do_truename() const override { return "wahr"; }
};

TEST(GlobalLocale, ChangesNeitherFilesNorMessages) {
  const TemporaryFolder folder;
  const std::vector<std::string> expected = everything(folder / "x");
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Swiss));
  const std::vector<std::string> got = everything(folder / "x");
  std::locale::global(before);
  EXPECT_EQ(got, expected);

  // The C library's, where the system has one with a comma.
  for (const char* name : {"de_DE.UTF-8", "fr_FR.UTF-8", "de_DE", "German_Germany"})
    if (std::setlocale(LC_ALL, name) != nullptr) {
      const std::vector<std::string> in_c = everything(folder / "x");
      std::setlocale(LC_ALL, "C");
      EXPECT_EQ(in_c, expected) << name;
    }
}

}  // namespace files_locale_test
