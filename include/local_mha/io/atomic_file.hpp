// SPDX-License-Identifier: MIT
/// \file
/// Writing a file so that its name shows either the old content or the new one, never a part.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <random>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <local_mha/io/safetensors_error.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io::detail {

/// Writes under another name in the same folder; commit() gives the file its name. Without it, the
/// destructor removes what was written.
class AtomicFile {
 public:
  /// \throws SafetensorsError if `path` is something else than a file, or cannot be written beside
  explicit AtomicFile(const std::filesystem::path& path) : path_(path) {
    std::error_code error;
    const std::filesystem::file_status status = std::filesystem::status(path, error);
    // Renaming would put a file in the place of a folder or device.
    if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status))
      fail("expected a regular file or a new name");
    path_ = target(path, error);
    if (error) fail(error.message());
    std::random_device random;
    for (int attempt = 0; attempt < 100 && file_ == nullptr; ++attempt) {
      temporary_ = path_;
      temporary_ += "." + std::to_string(random()) + temporary_extension;
      file_ = std::fopen(temporary_.string().c_str(), "wbx");  // x: fails if it exists
      if (file_ == nullptr && errno != EEXIST) break;
    }
    if (file_ == nullptr) fail(std::system_category().message(errno));
  }

  /// Removes what was written for `path` by programs that were killed before they gave it its
  /// name. Not while another program writes there.
  static void remove_temporaries(const std::filesystem::path& path) {
    namespace fs = std::filesystem;
    std::error_code error;
    const fs::path file = target(path, error);
    const std::string begin = file.filename().string() + ".";
    std::vector<fs::path> found;
    const fs::path folder = file.has_parent_path() ? file.parent_path() : fs::path(".");
    for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
         entry.increment(error)) {
      const fs::path name = entry->path().filename();
      const std::string stem = name.stem().string();
      std::error_code ignored;
      // As many digits as a number has that the constructor draws.
      if (name.extension() == temporary_extension && stem.starts_with(begin) &&
          stem.size() > begin.size() && stem.size() <= begin.size() + 10 &&
          fs::is_regular_file(entry->symlink_status(ignored)) &&
          stem.find_first_not_of("0123456789", begin.size()) == std::string::npos)
        found.push_back(entry->path());
    }
    for (const fs::path& temporary : found) fs::remove(temporary, error);
  }

  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  ~AtomicFile() {
    if (file_ != nullptr) std::fclose(file_);
    if (!committed_) std::remove(temporary_.string().c_str());
  }

  void write(std::span<const std::byte> bytes) {
    if (!bytes.empty() && std::fwrite(bytes.data(), 1, bytes.size(), file_) != bytes.size())
      fail(std::system_category().message(errno));
  }

  void commit() {
    bool flushed = std::fflush(file_) == 0;
#if __has_include(<unistd.h>)
    // Else the new name could reach the disk before the bytes.
    flushed = flushed && ::fsync(::fileno(file_)) == 0;
#endif
    if (!flushed) fail(std::system_category().message(errno));
    std::fclose(std::exchange(file_, nullptr));
    std::error_code error;
    std::filesystem::rename(temporary_, path_, error);
    if (error) fail(error.message());
    committed_ = true;
  }

 private:
  static constexpr const char* temporary_extension = ".tmp";

  // A link keeps pointing to its file.
  static std::filesystem::path target(const std::filesystem::path& path, std::error_code& error) {
    return std::filesystem::exists(path, error) ? std::filesystem::canonical(path, error) : path;
  }

  [[noreturn]] void fail(const std::string& problem) {
    throw SafetensorsError(path_.string(), "", "cannot be written: " + problem);
  }

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  std::FILE* file_ = nullptr;
  bool committed_ = false;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::io::detail
