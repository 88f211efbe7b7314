// SPDX-License-Identifier: MIT
/// \file
/// Writing a file so that its name shows either the old content or the new one, never a part.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <random>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/system_file.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// A file of any content that appears as a whole. It is written under another name in the same
/// folder; commit() gives it its own, once its bytes are on the disk. Without that, the destructor
/// removes what was written, and a file that was there before is as it was.
///
/// A file that is replaced keeps its mode. A link stays one: what it points to is replaced, or made
/// where there is nothing yet.
class AtomicFile {
 public:
  /// Opens a temporary file beside `path`.
  /// \throws SafetensorsError if `path` is something else than a file, or one that may not be
  ///   written to, or nothing can be written beside it
  explicit AtomicFile(const std::filesystem::path& path) : path_(path) {
    namespace fs = std::filesystem;
    std::error_code error;
    path_ = behind_links(path, error);
    if (error) fail(error);
    const fs::file_status status = fs::status(path_, error);
    const bool replaces = fs::exists(status);
    if (!replaces && status.type() != fs::file_type::not_found) fail(error);
    // Renaming would put a file in the place of a folder or device.
    if (!path_.has_filename() || (replaces && !fs::is_regular_file(status)))
      fail("expected a regular file or a new name");
    if (replaces && !detail::is_writable(path_)) fail(detail::last_error());
    std::random_device random;
    for (int attempt = 0; attempt < 100 && !temporary_.file.is_open(); ++attempt) {
      temporary_.path = path_;
      temporary_.path.concat(".").concat(hexadecimal(random()));
      temporary_.path.concat(hexadecimal(random())).concat(extension);
      temporary_.file = detail::SystemFile::create(temporary_.path, replaces);
      if (!temporary_.file.is_open() && errno != EEXIST) break;
    }
    if (!temporary_.file.is_open()) fail(detail::last_error());
    temporary_.is_there = true;
    if (replaces && !detail::take_mode(temporary_.file, path_)) fail(detail::last_error());
  }

  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Adds to what was written.
  /// \throws SafetensorsError if that fails, or the file has its name already
  void write(std::span<const std::byte> bytes) {
    require_uncommitted();
    if (!temporary_.file.write(bytes.data(), bytes.size())) fail(detail::last_error());
  }

  /// Gives the file its name.
  /// \throws SafetensorsError if that fails, or it has it already
  void commit() {
    require_uncommitted();
    const std::filesystem::path folder = folder_of(path_);  // while memory may still run out
    // Before the name, which could else reach the disk before the bytes.
    if (!temporary_.file.sync() || !temporary_.file.close()) fail(detail::last_error());
    std::error_code error;
    std::filesystem::rename(temporary_.path, path_, error);
    if (error) fail(error);
    temporary_.is_there = false;
    if (!detail::sync_folder(folder))
      fail("its folder: " + detail::error_text(detail::last_error()));
  }

  /// Removes what was written for `path` by programs that were killed before they gave it its
  /// name. Not while another program writes there.
  static void remove_temporaries(const std::filesystem::path& path) {
    namespace fs = std::filesystem;
    std::error_code error;
    const fs::path file = behind_links(path, error);
    if (error || !file.has_filename()) return;
    const fs::path::string_type begin = file.filename().native();
    std::vector<fs::path> found;
    for (fs::directory_iterator entry(folder_of(file), error), end; !error && entry != end;
         entry.increment(error)) {
      const fs::path name = entry->path().filename();
      std::error_code ignored;
      if (name.native().starts_with(begin) && is_addition(name.native().substr(begin.size())) &&
          fs::is_regular_file(entry->symlink_status(ignored)))
        found.push_back(entry->path());
    }
    for (const fs::path& temporary : found) fs::remove(temporary, error);
  }

 private:
  static constexpr const char* extension = ".tmp";

  // What is removed again, unless it got its name.
  struct Temporary {
    std::filesystem::path path = {};
    detail::SystemFile file = {};
    bool is_there = false;

    Temporary() = default;
    Temporary(const Temporary&) = delete;
    Temporary& operator=(const Temporary&) = delete;
    ~Temporary() {
      file.close();
      std::error_code ignored;
      if (is_there) std::filesystem::remove(path, ignored);
    }
  };

  static std::string hexadecimal(std::uint32_t number) {
    std::string text(8, '0');
    for (auto digit = text.rbegin(); digit != text.rend(); ++digit, number /= 16)
      *digit = "0123456789abcdef"[number % 16];
    return text;
  }

  // Whether that is what the constructor appends to a name.
  static bool is_addition(const std::filesystem::path::string_type& text) {
    if (text.size() != 1 + 16 + 4) return false;
    const std::string digits(text.begin() + 1, text.begin() + 17);
    return text.front() == '.' && std::filesystem::path(text).extension() == extension &&
           digits.find_first_not_of("0123456789abcdef") == std::string::npos;
  }

  static std::filesystem::path folder_of(const std::filesystem::path& file) {
    return file.has_parent_path() ? file.parent_path() : std::filesystem::path(".");
  }

  // Where a link leads in the end, whether there is something or not.
  static std::filesystem::path behind_links(std::filesystem::path path, std::error_code& error) {
    for (int links = 0; std::filesystem::is_symlink(path, error); ++links) {
      if (links == 40) {
        error = std::make_error_code(std::errc::too_many_symbolic_link_levels);
        break;
      }
      const std::filesystem::path to = std::filesystem::read_symlink(path, error);
      if (error) break;
      path = path.parent_path() / to;
    }
    if (error == std::errc::no_such_file_or_directory) error.clear();
    return path;
  }

  void require_uncommitted() const {
    if (!temporary_.is_there) fail("expected nothing more after commit()");
  }

  [[noreturn]] void fail(const std::error_code& error) const { fail(detail::error_text(error)); }

  [[noreturn]] void fail(const std::string& problem) const {
    throw SafetensorsError(detail::path_text(path_), "", "cannot be written: " + problem);
  }

  std::filesystem::path path_;
  Temporary temporary_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
