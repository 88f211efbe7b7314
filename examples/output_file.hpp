// SPDX-License-Identifier: MIT
/// \file
/// Files that a program writes.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/io/atomic_file.hpp>

namespace local_mha::examples {

/// Gives a file this content, or leaves what was there.
/// \throws io::SafetensorsError if it cannot be written
inline void write_file(const std::string& path, std::string_view bytes) {
  io::AtomicFile file(path);
  file.write(std::as_bytes(std::span(bytes)));
  file.commit();
}

/// A file and what it is to the user.
struct NamedFile {
  std::string name;
  std::string path;  ///< empty: there is none
};

/// Rejects files of which one would take the place of another, also by way of links.
/// \param argument that names the file to be written
/// \throws std::invalid_argument naming two files that are one
inline void require_different_files(std::string_view argument,
                                    const std::vector<NamedFile>& files) {
  namespace fs = std::filesystem;
  const auto is_same = [](const std::string& a, const std::string& b) {
    if (a.empty() || b.empty()) return false;
    std::error_code error;
    if (fs::equivalent(a, b, error)) return true;
    return fs::weakly_canonical(fs::absolute(a)) == fs::weakly_canonical(fs::absolute(b));
  };
  for (std::size_t i = 0; i < files.size(); ++i)
    for (std::size_t j = 0; j < i; ++j)
      if (is_same(files[i].path, files[j].path))
        reject(argument, "a name that gives each file a place of its own", files[i].path,
               ", which is ", files[j].name, " and ", files[i].name);
}

}  // namespace local_mha::examples
