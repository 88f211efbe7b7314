// SPDX-License-Identifier: MIT
/// \file
/// The exception of everything that reads or writes safetensors files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include <local_mha/core/namespace.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// Text from a file as an error message shows it: at most `longest` bytes, control characters and
/// bytes outside ASCII as `\x..`.
inline std::string printable(std::string_view text, std::size_t longest = 120) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string shown;
  for (const char c : text.substr(0, longest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      shown += c;
    } else {
      shown += "\\x";
      shown += digits[byte >> 4];
      shown += digits[byte & 0xf];
    }
  }
  if (text.size() > longest) shown += "...";
  return shown;
}

/// A file that cannot be read or written, or does not hold what was asked of it.
/// `what()` is ``file: tensor 'name': problem (byte offset)``, without parts that do not apply.
class SafetensorsError : public std::runtime_error {
 public:
  /// Trouble at a byte of a file.
  /// \param file the path, or another name of the bytes
  /// \param tensor empty if the trouble is not with one tensor
  /// \param offset where in the file
  SafetensorsError(std::string_view file, std::string tensor, std::uint64_t offset,
                   std::string_view problem)
      : std::runtime_error(message(file, tensor, offset, problem)),
        tensor_(std::move(tensor)),
        offset_(offset) {}

  /// A file that cannot be opened, found or written, or lacks what was asked for.
  SafetensorsError(std::string_view file, std::string tensor, std::string_view problem)
      : std::runtime_error(message(file, tensor, {}, problem)), tensor_(std::move(tensor)) {}

  /// Name of the tensor; empty if the trouble is not with one tensor.
  const std::string& tensor() const noexcept { return tensor_; }

  /// Byte of the file where the trouble is. In the header, it is where the reader stood when it
  /// noticed: behind the offending token or, for an entry as a whole, behind the tensor's name. For
  /// bytes that overlap, belong to no tensor or have a wrong value, it is the first of them; for
  /// bytes that are missing, the file's end. 0 where no byte is to blame.
  std::uint64_t offset() const noexcept { return offset_; }

 private:
  static std::string message(std::string_view file, std::string_view tensor,
                             std::optional<std::uint64_t> offset, std::string_view problem) {
    std::string text(file);
    if (!tensor.empty()) text += ": tensor '" + printable(tensor) + "'";
    text += ": ";
    text += problem;
    if (offset) text += " (byte " + std::to_string(*offset) + ")";
    return text;
  }

  std::string tensor_;
  std::uint64_t offset_ = 0;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
