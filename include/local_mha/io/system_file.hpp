// SPDX-License-Identifier: MIT
/// \file
/// Files by the calls of the system, POSIX's or those of Windows, which report what went wrong.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/stat.h>
#ifdef _WIN32
#include <io.h>
#else
#include <unistd.h>
#endif

#include <local_mha/core/namespace.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io::detail {

/// A path as messages show it; UTF-8 on Windows, where not every name has a form in `char`.
inline std::string path_text(const std::filesystem::path& path) {
#ifdef _WIN32
  const auto text = path.u8string();
  return {text.begin(), text.end()};
#else
  return path.string();
#endif
}

/// A path that a file names, in UTF-8.
inline std::filesystem::path path_of(std::string_view text) {
#ifdef __cpp_char8_t
  return std::u8string(text.begin(), text.end());
#else
  return text;
#endif
}

/// What `errno` says.
inline std::error_code last_error() { return {errno, std::generic_category()}; }

/// An error of the system, for messages.
inline std::string error_text(const std::error_code& error) {
  if (error == std::errc::no_such_file_or_directory) return "no such file or folder";
  if (error == std::errc::permission_denied || error == std::errc::operation_not_permitted)
    return "permission denied";
  return error.message();
}

/// The result of a call, which a signal may interrupt before it has done anything.
template <typename Call>
auto retried(const Call& call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

/// An open file. Its functions set `errno` where they fail.
class SystemFile {
 public:
#ifdef _WIN32
  using FileStatus = struct ::_stat64;
#else
  using FileStatus = struct ::stat;
#endif

  SystemFile() = default;
  SystemFile(SystemFile&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  SystemFile& operator=(SystemFile&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~SystemFile() { close(); }

  /// For reading. Does not wait for somebody who writes into a pipe.
  static SystemFile open(const std::filesystem::path& path) {
#ifdef _WIN32
    return SystemFile(::_wopen(path.c_str(), _O_RDONLY | _O_BINARY | _O_NOINHERIT));
#else
    return SystemFile(retried(
        [&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); }));
#endif
  }

  /// For writing; fails where the name is there already.
  /// \param is_private nobody else may look into it
  static SystemFile create(const std::filesystem::path& path, [[maybe_unused]] bool is_private) {
#ifdef _WIN32
    return SystemFile(::_wopen(path.c_str(),
                               _O_WRONLY | _O_BINARY | _O_NOINHERIT | _O_CREAT | _O_EXCL,
                               _S_IREAD | _S_IWRITE));
#else
    return SystemFile(retried([&] {
      return ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_CREAT | O_EXCL,
                    is_private ? 0600 : 0666);
    }));
#endif
  }

  bool is_open() const { return descriptor_ >= 0; }
  int descriptor() const { return descriptor_; }

  bool status(FileStatus& status) const {
#ifdef _WIN32
    return ::_fstat64(descriptor_, &status) == 0;
#else
    return ::fstat(descriptor_, &status) == 0;
#endif
  }

  /// \return bytes that were read, fewer only where the file ends; -1 where that fails
  std::int64_t read(std::byte* to, std::size_t size) const {
    std::size_t done = 0;
    while (done < size) {
      const auto part = (std::min)(size - done, largest_part);
#ifdef _WIN32
      const auto count = ::_read(descriptor_, to + done, static_cast<unsigned>(part));
#else
      const auto count = retried([&] { return ::read(descriptor_, to + done, part); });
#endif
      if (count < 0) return -1;
      if (count == 0) break;
      done += static_cast<std::size_t>(count);
    }
    return static_cast<std::int64_t>(done);
  }

  /// Writes all of it.
  bool write(const std::byte* from, std::size_t size) const {
    while (size > 0) {
      const auto part = (std::min)(size, largest_part);
#ifdef _WIN32
      const auto count = ::_write(descriptor_, from, static_cast<unsigned>(part));
#else
      const auto count = retried([&] { return ::write(descriptor_, from, part); });
#endif
      if (count < 0) return false;
      from += count;
      size -= static_cast<std::size_t>(count);
    }
    return true;
  }

  /// Returns when the bytes are on the disk.
  bool sync() const {
#ifdef _WIN32
    return ::_commit(descriptor_) == 0;
#else
    return retried([&] { return ::fsync(descriptor_); }) == 0;
#endif
  }

  bool close() {
    if (descriptor_ < 0) return true;
    const int descriptor = std::exchange(descriptor_, -1);
#ifdef _WIN32
    return ::_close(descriptor) == 0;
#else
    // Interrupted, it has closed the file nevertheless.
    return ::close(descriptor) == 0 || errno == EINTR;
#endif
  }

 private:
  static constexpr std::size_t largest_part = std::size_t{1} << 30;

  explicit SystemFile(int descriptor) : descriptor_(descriptor) {}

  int descriptor_ = -1;
};

/// Gives a new file the mode of the one whose place it takes, and its owner where that is allowed.
inline bool take_mode([[maybe_unused]] const SystemFile& file,
                      [[maybe_unused]] const std::filesystem::path& replaced) {
#ifndef _WIN32
  SystemFile::FileStatus own = {};
  SystemFile::FileStatus old = {};
  if (::stat(replaced.c_str(), &old) != 0 || !file.status(own)) return false;
  auto mode = old.st_mode & 07777;
  if (own.st_uid != old.st_uid || own.st_gid != old.st_gid) {
    const int descriptor = file.descriptor();
    // Who may not give a file away may often give it to its group. What another group may do is
    // what all may, and programs do not run with the rights of another owner.
    const bool group_kept = ::fchown(descriptor, old.st_uid, old.st_gid) == 0 ||
                            ::fchown(descriptor, static_cast<::uid_t>(-1), old.st_gid) == 0;
    if (!group_kept) mode = (mode & ~070U) | ((mode & 07U) << 3);
    if (!file.status(own)) return false;
    if (own.st_uid != old.st_uid || own.st_gid != old.st_gid) mode &= 0777;
  }
  return ::fchmod(file.descriptor(), mode) == 0;
#else
  return true;
#endif
}

/// Whether an existing file may be written to.
inline bool is_writable(const std::filesystem::path& path) {
#ifdef _WIN32
  return ::_waccess(path.c_str(), 2) == 0;
#else
  return ::faccessat(AT_FDCWD, path.c_str(), W_OK, AT_EACCESS) == 0;
#endif
}

/// Returns when a folder's names are on the disk, or where its system cannot say.
/// \return false where the disk has failed
inline bool sync_folder([[maybe_unused]] const std::filesystem::path& folder) {
#ifndef _WIN32
  const SystemFile opened = SystemFile::open(folder);
  if (opened.is_open() && !opened.sync()) return errno != EIO && errno != ENOSPC && errno != EDQUOT;
#endif
  return true;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io::detail
