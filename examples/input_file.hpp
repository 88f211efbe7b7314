// SPDX-License-Identifier: MIT
/// \file
/// Files that a program reads.
#pragma once

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <system_error>

namespace local_mha::examples {

/// Opens a file for reading bytes; it may be a pipe.
/// \throws std::runtime_error saying why it cannot be read
inline std::ifstream open_input(const std::string& path) {
  std::error_code unknown;
  if (std::filesystem::is_directory(path, unknown))
    throw std::runtime_error(path + ": expected a file, got a directory");
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  const int error = errno;
  if (!file)
    throw std::runtime_error(path + ": cannot be opened" +
                             (error != 0 ? ": " + std::generic_category().message(error) : ""));
  return file;
}

}  // namespace local_mha::examples
