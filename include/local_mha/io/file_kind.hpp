// SPDX-License-Identifier: MIT
/// \file
/// What a file is that is not what was asked for, for messages that help.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include <local_mha/io/safetensors_error.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io::detail {

inline std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// Whether it begins as a text in ASCII does.
inline bool begins_as_text(std::string_view content) {
  constexpr std::string_view spaces = "\t\n\r\f";
  return !content.empty() && std::ranges::all_of(content.substr(0, 16), [&](char c) {
    return (c >= ' ' && c <= '~') || spaces.find(c) != std::string_view::npos;
  });
}

/// A text without the spaces and the byte order mark before it.
inline std::string_view without_leading_space(std::string_view content) {
  if (content.starts_with("\xef\xbb\xbf")) content.remove_prefix(3);
  const std::size_t first = content.find_first_not_of("\t\n\r\f ");
  return content.substr((std::min)(first, content.size()));
}

/// Whether it is a JSON text of an object, as an index of several files is. A safetensors file is
/// not: its first eight bytes, a number below 10^8, are no text.
inline bool is_json_object(std::string_view content) {
  const std::string_view text = without_leading_space(content);
  return text.starts_with('{') && begins_as_text(text);
}

/// What a file seems to be that is no safetensors file; empty where nothing is known.
inline std::string seems_to_be(std::span<const std::byte> bytes) {
  struct Kind {
    std::string_view begin;
    std::string_view name;
  };
  using namespace std::string_view_literals;
  constexpr std::string_view pickle =
      "a Python pickle, as PyTorch's older .pt files are; write the weights by safetensors.torch";
  static constexpr std::array kinds{
      Kind{"version https://git-lfs"sv,
           "a Git LFS pointer instead of the file that it stands for, which `git lfs pull` gets"sv},
      Kind{"PK\x03\x04"sv,
           "a zip archive, as PyTorch's .pt, .pth, .bin and .ckpt files are; write the weights by "
           "safetensors.torch"sv},
      Kind{"PK\x05\x06"sv, "an empty zip archive"sv},
      Kind{"\x80\x02"sv, pickle},
      Kind{"\x80\x03"sv, pickle},
      Kind{"\x80\x04"sv, pickle},
      Kind{"\x80\x05"sv, pickle},
      Kind{"\x1f\x8b"sv, "a file compressed by gzip"sv},
      Kind{"BZh"sv, "a file compressed by bzip2"sv},
      Kind{"\xfd\x37zXZ\0"sv, "a file compressed by xz"sv},
      Kind{"\x28\xb5\x2f\xfd"sv, "a file compressed by zstd"sv},
      Kind{"\x04\x22\x4d\x18"sv, "a file compressed by lz4"sv},
      Kind{"7z\xbc\xaf\x27\x1c"sv, "a 7z archive"sv},
      Kind{"Rar!\x1a\x07"sv, "a RAR archive"sv},
      Kind{"GGUF"sv, "a GGUF file, as llama.cpp reads it"sv},
      Kind{"lmgg"sv, "a GGML file, as llama.cpp read it"sv},
      Kind{"tjgg"sv, "a GGML file, as llama.cpp read it"sv},
      Kind{"\x89HDF\r\n\x1a\n"sv, "an HDF5 file, as Keras writes it"sv},
      Kind{"\x93NUMPY"sv, "a NumPy array (.npy)"sv},
      Kind{"RIFF"sv, "a RIFF file, such as a WAV"sv},
      Kind{"\x89PNG"sv, "a PNG image"sv},
      Kind{"\xff\xd8\xff"sv, "a JPEG image"sv},
      Kind{"%PDF"sv, "a PDF"sv},
      Kind{"\x7f\x45LF"sv, "a program (ELF)"sv},
      Kind{"\xff\xfe"sv, "a text in UTF-16"sv},
      Kind{"\xfe\xff"sv, "a text in UTF-16"sv},
  };
  const std::string_view content = as_text(bytes);
  if (content.empty()) return "an empty file";
  for (const auto& [begin, name] : kinds)
    if (content.starts_with(begin)) return std::string(name);
  if (content.size() > 262 && content.substr(257, 5) == "ustar") return "a tar archive";

  const std::string_view text = without_leading_space(content);
  const auto begins_with = [&](std::string_view lower_case) {
    return std::ranges::equal(text.substr(0, lower_case.size()), lower_case, {},
                              [](char c) { return c >= 'A' && c <= 'Z' ? char(c + 32) : c; });
  };
  if (begins_with("<!doctype html") || begins_with("<html") || begins_with("<head"))
    return "an HTML page, as a failed download leaves it";
  if (begins_with("<?xml")) return "XML, as a failed download leaves it";
  if (is_json_object(content) || (text.starts_with('[') && begins_as_text(text))) return "JSON";
  if (begins_as_text(text))
    return "a text that begins with '" + printable(text.substr(0, text.find_first_of("\r\n")), 40) +
           "'";
  if (std::ranges::all_of(content.substr(0, 4096), [](char c) { return c == '\0'; }))
    return "nothing but zeros, as an interrupted download leaves it";
  return "";
}

}  // namespace local_mha::inline LOCAL_MHA_ABI::io::detail
