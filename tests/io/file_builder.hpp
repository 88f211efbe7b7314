// SPDX-License-Identifier: MIT
/// \file
/// Safetensors files put together by hand, right or wrong.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include <local_mha/io/safetensors.hpp>

#include "support/temporary_folder.hpp"

namespace io_test {

using Bytes = std::vector<std::byte>;
using support::TemporaryFolder;

inline Bytes to_bytes(std::string_view text) {
  Bytes bytes(text.size());
  if (!text.empty()) std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

/// Eight bytes, little-endian.
inline std::string size_field(std::uint64_t size) {
  std::string field;
  for (int byte = 0; byte < 8; ++byte) field += static_cast<char>(size >> (8 * byte) & 0xff);
  return field;
}

/// A file with this header, of the right size, and these bytes of data behind it.
inline Bytes file(std::string_view header, std::string_view data = {}) {
  return to_bytes(size_field(header.size()) + std::string(header) + std::string(data));
}

/// The same with `count` bytes of data.
inline Bytes file_with_data(std::string_view header, std::size_t count) {
  return file(header, std::string(count, '\0'));
}

inline void write_file(const std::filesystem::path& path, const Bytes& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
}

inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// The message of the Error that `run` throws; fails the test for another or none.
template <typename Error, typename Run>
std::string message_of(const Run& run) {
  try {
    run();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another exception: " << error.what();
    return "";
  }
  ADD_FAILURE() << "no exception";
  return "";
}

}  // namespace io_test
