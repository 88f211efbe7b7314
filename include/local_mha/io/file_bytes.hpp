// SPDX-License-Identifier: MIT
/// \file
/// The bytes of a file: mapped into memory where the system can, else read.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#define LOCAL_MHA_MAPS_FILES 1
#else
#define LOCAL_MHA_MAPS_FILES 0
#endif

#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/system_file.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// How the bytes of a file come into memory.
enum class FileAccess : std::uint8_t {
  /// As they are looked at, by mapping the file; read where the system cannot (Windows, some file
  /// systems). Opening takes no time. As long as it is open, nobody may shorten the file: the
  /// system ends the process (SIGBUS) that looks at bytes that are gone.
  map,
  /// All of them at once, into memory. Whatever happens to the file later does not matter.
  read,
};

namespace detail {

/// Read-only bytes and the name of what they come from, shared by whoever looks into them.
class FileBytes {
 public:
  FileBytes(std::vector<std::byte> owned, std::string name)
      : owned_(std::move(owned)), bytes_(owned_), name_(std::move(name)) {}

  FileBytes(const FileBytes&) = delete;
  FileBytes& operator=(const FileBytes&) = delete;

  ~FileBytes() {
#if LOCAL_MHA_MAPS_FILES
    if (mapped_ != nullptr) ::munmap(mapped_, bytes_.size());
#endif
  }

  /// \throws SafetensorsError if `path` is not a regular file that can be read
  static std::shared_ptr<const FileBytes> open(const std::filesystem::path& path,
                                               FileAccess access) {
    std::shared_ptr<FileBytes> result(new FileBytes({}, path_text(path)));
    const SystemFile file = SystemFile::open(path);
    if (!file.is_open()) {
      if (errno == ENXIO) result->fail("cannot be opened: expected a regular file, got a socket");
      result->fail("cannot be opened: " + error_text(last_error()));
    }
    SystemFile::FileStatus status = {};
    if (!file.status(status)) result->fail("cannot be opened: " + error_text(last_error()));
    // Asked when it is open: before, the name could still get another file.
    if (const char* kind = kind_of(status); kind != nullptr)
      result->fail("cannot be opened: expected a regular file, got " + std::string(kind));
    const auto size = static_cast<std::uint64_t>(status.st_size);
    if (size > (std::numeric_limits<std::size_t>::max)())
      result->fail("cannot be read: it is too large for this system");
    if (access == FileAccess::read || !result->map(file, static_cast<std::size_t>(size)))
      result->read(file, static_cast<std::size_t>(size));
    return result;
  }

  std::span<const std::byte> bytes() const { return bytes_; }
  const std::string& name() const { return name_; }

 private:
  [[noreturn]] void fail(const std::string& problem) const {
    throw SafetensorsError(name_, "", problem);
  }

  // Null for a regular file.
  static const char* kind_of(const SystemFile::FileStatus& status) {
    const auto type = status.st_mode & S_IFMT;
    if (type == S_IFREG) return nullptr;
    if (type == S_IFDIR) return "a folder";
    if (type == S_IFIFO) return "a pipe";
    return "a device";
  }

  // Not where the file system does not map files, nor an empty file, which no system maps.
  bool map([[maybe_unused]] const SystemFile& file, [[maybe_unused]] std::size_t size) {
#if LOCAL_MHA_MAPS_FILES
    if (size == 0) return false;
    void* mapped = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
    if (mapped == MAP_FAILED) return false;
    mapped_ = mapped;  // it outlives the descriptor
    bytes_ = {static_cast<const std::byte*>(mapped), size};
    return true;
#else
    return false;
#endif
  }

  void read(const SystemFile& file, std::size_t size) {
    owned_.resize(size);
    const std::int64_t got = file.read(owned_.data(), size);
    if (got < 0) fail("cannot be read: " + error_text(last_error()));
    if (static_cast<std::uint64_t>(got) != size)
      fail("cannot be read: expected " + std::to_string(size) + " bytes, got " +
           std::to_string(got) + ", because others shortened it");
    bytes_ = owned_;
  }

#if LOCAL_MHA_MAPS_FILES
  void* mapped_ = nullptr;
#endif
  std::vector<std::byte> owned_;
  std::span<const std::byte> bytes_;
  std::string name_;
};

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
