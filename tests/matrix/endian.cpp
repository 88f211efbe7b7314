// SPDX-License-Identifier: MIT
// Files of weights are little-endian whatever the processor: bytes written by hand are read, and
// what is written has those bytes.
#include <bit>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/state_dict.hpp>

namespace {

namespace io = local_mha::io;

int failures = 0;

void expect(bool holds, const char* what) {
  std::printf("%s: %s\n", what, holds ? "yes" : "no");
  failures += holds ? 0 : 1;
}

std::string content_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// 1, -2 and 0.15625 as IEEE 754 writes them, least byte first.
const std::string values("\x00\x00\x80\x3f\x00\x00\x00\xc0\x00\x00\x20\x3e", 12);
const std::string header(R"({"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}})");

std::string file_by_hand() {
  std::string bytes(8, '\0');
  bytes[0] = static_cast<char>(header.size());
  return bytes + header + values;
}

template <typename Scalar>
void check(const io::TensorSource& source, const char* what) {
  const auto w = source.read<Scalar>("w");
  expect(w.size() == 3 && w[0] == Scalar(1) && w[1] == Scalar(-2) && w[2] == Scalar(0.15625), what);
}

}  // namespace

int main() {
  std::printf("%s-endian\n", std::endian::native == std::endian::big ? "big" : "little");
  const auto folder =
      std::filesystem::temp_directory_path() /
      ("local_mha_endian_" + std::to_string(reinterpret_cast<std::uintptr_t>(&failures)));
  std::filesystem::create_directories(folder);
  const auto path = folder / "by_hand.safetensors";
  std::ofstream(path, std::ios::binary) << file_by_hand();
  for (const auto access : {io::FileAccess::map, io::FileAccess::read}) {
    check<float>(io::SafetensorsFile(path, access), "a file is read as float");
    check<double>(io::SafetensorsFile(path, access), "a file is read as double");
    check<Eigen::bfloat16>(io::SafetensorsFile(path, access), "a file is read as bfloat16");
  }

  const std::vector<float> numbers{1.0F, -2.0F, 0.15625F};
  io::SafetensorsWriter writer;
  writer.add("w", {3}, numbers);
  writer.write(path);
  const std::string written = content_of(path);
  expect(written.size() > values.size() && written.ends_with(values),
         "float is written least byte first");
  io::SafetensorsWriter narrow;
  narrow.add("w", {3}, numbers, io::Dtype::F16);
  narrow.write(path);
  expect(content_of(path).ends_with(std::string("\x00\x3c\x00\xc0\x00\x31", 6)),
         "F16 is written least byte first");
  check<float>(io::SafetensorsFile(path), "F16 is read");
  std::filesystem::remove_all(folder);

  io::StateDict weights;
  weights.add("w", numbers.data(), {3});
  check<float>(weights, "numbers in memory are read as they lie there");
  return failures;
}
