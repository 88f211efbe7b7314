// SPDX-License-Identifier: MIT
/// \file
/// The bytes of a file: mapped into memory where the system can, else read.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#if __has_include(<sys/mman.h>) && __has_include(<unistd.h>)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#include <local_mha/io/safetensors_error.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io::detail {

/// Read-only bytes, shared by whoever looks into them. A mapped file must not be truncated while
/// it is open: the system answers an access to a page that is gone with a signal.
class FileBytes {
 public:
  explicit FileBytes(std::vector<std::byte> owned) : owned_(std::move(owned)), bytes_(owned_) {}

  FileBytes(const FileBytes&) = delete;
  FileBytes& operator=(const FileBytes&) = delete;

  ~FileBytes() {
#if __has_include(<sys/mman.h>) && __has_include(<unistd.h>)
    if (mapped_ != nullptr) ::munmap(mapped_, bytes_.size());
#endif
  }

  /// \throws SafetensorsError if `path` is not a regular file that can be read
  static std::shared_ptr<const FileBytes> open(const std::filesystem::path& path) {
    // Asked first, because opening a pipe would wait for somebody to write into it.
    std::error_code status_error;
    const std::filesystem::file_status status = std::filesystem::status(path, status_error);
    if (!std::filesystem::exists(status)) fail(path, "cannot be opened: no such file");
    if (!std::filesystem::is_regular_file(status))
      fail(path, "cannot be opened: expected a regular file");
#if __has_include(<sys/mman.h>) && __has_include(<unistd.h>)
    if (auto mapped = map(path)) return mapped;
#endif
    return read(path);
  }

  /// Without mapping.
  /// \throws SafetensorsError if the file cannot be read
  static std::shared_ptr<const FileBytes> read(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    const std::streamoff size = file ? static_cast<std::streamoff>(file.tellg()) : -1;
    if (size < 0) fail(path, "cannot be opened");
    std::vector<std::byte> bytes(static_cast<std::size_t>(size));
    file.seekg(0);
    if (!file.read(reinterpret_cast<char*>(bytes.data()), size)) fail(path, "cannot be read");
    return std::make_shared<const FileBytes>(std::move(bytes));
  }

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  FileBytes() = default;

  [[noreturn]] static void fail(const std::filesystem::path& path, const std::string& problem) {
    throw SafetensorsError(path.string(), "", problem);
  }

#if __has_include(<sys/mman.h>) && __has_include(<unistd.h>)
  // Null where the file system does not map files, and for an empty file, which no system maps.
  static std::shared_ptr<const FileBytes> map(const std::filesystem::path& path) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) fail(path, "cannot be opened: " + std::system_category().message(errno));
    struct ::stat file = {};
    void* mapped = MAP_FAILED;
    std::size_t size = 0;
    if (::fstat(descriptor, &file) == 0 && file.st_size > 0) {
      size = static_cast<std::size_t>(file.st_size);
      mapped = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    }
    ::close(descriptor);  // the mapping outlives it
    if (mapped == MAP_FAILED) return nullptr;
    struct Unmap {
      std::size_t size;
      void operator()(void* address) const { ::munmap(address, size); }
    };
    std::unique_ptr<void, Unmap> guard(mapped, Unmap{size});
    std::shared_ptr<FileBytes> result(new FileBytes);
    result->mapped_ = guard.release();
    result->bytes_ = {static_cast<const std::byte*>(mapped), size};
    return result;
  }

  void* mapped_ = nullptr;
#endif
  std::vector<std::byte> owned_;
  std::span<const std::byte> bytes_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::io::detail
