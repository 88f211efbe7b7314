// SPDX-License-Identifier: MIT
/// \file
/// The header of a safetensors file, parsed and checked against the bytes behind it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <local_mha/core/types.hpp>
#include <local_mha/io/dtype.hpp>
#include <local_mha/io/file_kind.hpp>
#include <local_mha/io/header_parser.hpp>
#include <local_mha/io/safetensors_error.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// A tensor as it lies in the file.
struct TensorEntry {
  /// What its elements are stored as.
  Dtype dtype = Dtype::F32;
  std::vector<Index> shape = {};          ///< empty for a single number
  std::uint64_t offset = 0;               ///< of its first byte, in the file
  std::span<const std::byte> bytes = {};  ///< row-major, little-endian, at any alignment
  std::string_view file = {};             ///< name of the file that it lies in
  std::string other_dtype = {};           ///< as the file says it, if dtype is Dtype::Other

  /// Number of elements.
  Index size() const {
    Index product = 1;
    for (const Index extent : shape) product *= extent;
    return product;
  }
};

/// `F32 [2, 3]`
inline std::string to_string(const TensorEntry& entry) {
  std::string text = entry.dtype == Dtype::Other ? "'" + printable(entry.other_dtype, 40) + "'"
                                                 : std::string(name_of(entry.dtype));
  text += " [";
  for (std::size_t axis = 0; axis < entry.shape.size(); ++axis)
    text += (axis ? ", " : "") + std::to_string(entry.shape[axis]);
  return text + "]";
}

namespace detail {

/// What the header says.
struct SafetensorsHeader {
  std::map<std::string, std::string> metadata;
  std::map<std::string, TensorEntry, std::less<>> tensors;
};

/// More bytes of header are an error, as in the format's own implementation.
inline constexpr std::uint64_t max_header_size = 100'000'000;

/// Bytes of a tensor, of Dtype::Other its elements; empty where the product overflows, or the last
/// byte would not be filled. A zero does not excuse other extents whose product overflows: strides
/// are computed from them.
inline std::optional<std::uint64_t> byte_size(Dtype dtype, std::span<const Index> shape) {
  std::uint64_t product = std::max<std::uint64_t>(size_of(dtype), 1);
  bool empty = false;
  for (const Index extent : shape) {
    if (extent == 0) {
      empty = true;
      continue;
    }
    const auto factor = static_cast<std::uint64_t>(extent);
    if (product > static_cast<std::uint64_t>((std::numeric_limits<Index>::max)()) / factor)
      return std::nullopt;
    product *= factor;
  }
  if (empty) return 0;
  const std::uint64_t bits = bits_of(dtype);
  if (bits % 8 == 0) return product;
  if (product % 8 * bits % 8 != 0) return std::nullopt;
  return product / 8 * bits + product % 8 * bits / 8;
}

/// What byte_size() must be.
inline std::string_view expected_size(Dtype dtype) {
  return bits_of(dtype) % 8 == 0 ? "fewer than 2^63 bytes" : "whole bytes, fewer than 2^63";
}

/// Parses and checks the header: every tensor's bytes fit its dtype and shape, and together they
/// cover what follows the header without overlap or gap.
/// \param file its name, in errors and entries
/// \param bytes the whole file
/// \throws SafetensorsError
inline SafetensorsHeader parse_header(std::string_view file, std::span<const std::byte> bytes) {
  const auto fail = [&](std::uint64_t offset, const std::string& problem) {
    throw SafetensorsError(file, "", offset, problem);
  };
  const auto fail_as_other_kind = [&] {
    if (const std::string kind = seems_to_be(bytes); !kind.empty())
      fail(0, "expected a safetensors file, got what seems to be " + kind);
  };
  if (bytes.size() < 8) {
    fail_as_other_kind();
    fail(bytes.size(),
         "truncated: expected 8 bytes with the header's size, got " + std::to_string(bytes.size()));
  }
  const auto header_size = load_element<std::uint64_t>(bytes.data());
  const bool has_header = bytes.size() > 8 && bytes[8] == std::byte{'{'};
  if (!has_header) fail_as_other_kind();
  if (!has_header && header_size > max_header_size)
    fail(0, "expected a safetensors file, got one that begins with '" +
                printable({reinterpret_cast<const char*>(bytes.data()), 8}) + "'");
  if (header_size > max_header_size)
    fail(0, "header: expected at most " + std::to_string(max_header_size) + " bytes, got " +
                std::to_string(header_size));
  if (header_size > bytes.size() - 8)
    fail(bytes.size(), "truncated: expected " + std::to_string(header_size) +
                           " bytes of header, got " + std::to_string(bytes.size() - 8));
  const std::uint64_t data_start = 8 + header_size;
  const std::uint64_t data_size = bytes.size() - data_start;

  HeaderParser parser(file, {reinterpret_cast<const char*>(bytes.data()) + 8,
                             static_cast<std::size_t>(header_size)});
  parser.parse();

  struct Extent {
    std::uint64_t begin;
    std::uint64_t end;
    std::uint64_t position;
    const std::string* name;
  };
  SafetensorsHeader header;
  header.metadata = std::move(parser.metadata);
  std::vector<Extent> extents;
  extents.reserve(parser.entries.size());
  for (auto& [name, entry] : parser.entries) {
    const auto fail_entry = [&, &tensor = name, &at = entry.position](const std::string& problem) {
      throw SafetensorsError(file, tensor, at, problem);
    };
    const std::uint64_t begin = (*entry.offsets)[0];
    const std::uint64_t end = (*entry.offsets)[1];
    if (begin > end)
      fail_entry("data_offsets: expected begin <= end, got [" + std::to_string(begin) + ", " +
                 std::to_string(end) + "]");
    TensorEntry tensor;
    tensor.dtype = *entry.dtype;
    tensor.shape = std::move(*entry.shape);
    tensor.file = file;
    tensor.other_dtype = std::move(entry.other_dtype);
    const std::optional<std::uint64_t> size = byte_size(tensor.dtype, tensor.shape);
    if (!size)
      fail_entry("shape: expected " + std::string(expected_size(tensor.dtype)) + ", got " +
                 to_string(tensor));
    if (tensor.dtype != Dtype::Other && *size != end - begin)
      fail_entry("data_offsets: expected " + std::to_string(*size) + " bytes for " +
                 to_string(tensor) + ", got " + std::to_string(end - begin));
    const auto inserted =
        header.tensors.emplace_hint(header.tensors.end(), name, std::move(tensor));
    extents.push_back({begin, end, entry.position, &inserted->first});
  }

  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::uint64_t covered = 0;
  const std::string* previous = nullptr;
  for (const auto& [begin, end, position, name] : extents) {
    if (end > data_size)
      throw SafetensorsError(file, *name, bytes.size(),
                             "truncated: expected its data at [" + std::to_string(begin) + ", " +
                                 std::to_string(end) + ") behind the header, got " +
                                 std::to_string(data_size) + " bytes there");
    if (begin < covered)
      throw SafetensorsError(file, *name, data_start + begin,
                             "data_offsets: overlaps '" + printable(*previous) + "'");
    if (begin > covered)
      throw SafetensorsError(file, *name, data_start + covered,
                             "data_offsets: expected to begin at " + std::to_string(covered) +
                                 ", got " + std::to_string(begin) +
                                 ", which leaves bytes to no tensor");
    TensorEntry& tensor = header.tensors.find(*name)->second;
    tensor.offset = data_start + begin;
    tensor.bytes = bytes.subspan(static_cast<std::size_t>(tensor.offset),
                                 static_cast<std::size_t>(end - begin));
    covered = end;
    previous = name;
  }
  if (covered != data_size)
    fail(data_start + covered, "expected the file to end with the last tensor, got " +
                                   std::to_string(data_size - covered) + " more bytes");
  return header;
}

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
