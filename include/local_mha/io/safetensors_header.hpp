// SPDX-License-Identifier: MIT
/// \file
/// The header of a safetensors file, parsed and checked against the bytes behind it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/core/types.hpp>
#include <local_mha/io/dtype.hpp>
#include <local_mha/io/safetensors_error.hpp>

namespace local_mha::io {

/// A tensor as it lies in the file.
struct TensorEntry {
  Dtype dtype = Dtype::F32;
  std::vector<Index> shape;          ///< empty for a single number
  std::uint64_t offset = 0;          ///< of its first byte, in the file
  std::span<const std::byte> bytes;  ///< row-major, little-endian, at any alignment

  /// Number of elements.
  Index size() const { return static_cast<Index>(bytes.size() / size_of(dtype)); }
};

/// `F32 [2, 3]`
inline std::string to_string(const TensorEntry& entry) {
  std::string text(name_of(entry.dtype));
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

/// More dimensions are an error; PyTorch has no more.
inline constexpr std::size_t max_rank = 64;

/// Parses the header's JSON by taking the events of nlohmann's parser. What does not belong at its
/// place ends the parsing at once, so nesting and repetition cost nothing.
class HeaderParser {
 public:
  /// \param file its name in errors
  /// \param text the header; must outlive the parser
  HeaderParser(std::string_view file, std::string_view text) : file_(file), text_(text) {}

  struct Entry {
    std::uint64_t position = 0;  // behind its name, in the file
    std::optional<Dtype> dtype;
    std::optional<std::vector<Index>> shape;
    std::optional<std::vector<std::uint64_t>> offsets;
  };

  std::map<std::string, std::string> metadata;
  std::map<std::string, Entry, std::less<>> entries;  // complete ones

  /// Fills metadata and entries.
  /// \throws SafetensorsError
  void parse() {
    if (!text_.starts_with('{')) fail("header: expected it to begin with '{'");
    // nlohmann's parser takes a null byte for the end of its input.
    if (const std::size_t null = text_.find('\0'); null != std::string_view::npos) {
      position_ = null;
      fail("header: expected JSON, got a null byte");
    }
    const char* first = text_.data();
    nlohmann::json::sax_parse(CountingIterator{first, &position_},
                              CountingIterator{first + text_.size(), &position_}, this);
  }

  // The parser's events. They throw where they could return false, so that all errors are alike.

  bool start_object(std::size_t /*size*/) {
    switch (place_) {
      case Place::file:
        return move_to(Place::header);
      case Place::metadata_value:
        return move_to(Place::metadata);
      case Place::tensor_value:
        return move_to(Place::tensor);
      default:
        unexpected("an object");
    }
  }

  bool key(std::string& name) {
    switch (place_) {
      case Place::metadata:
        if (metadata.contains(name))
          fail("__metadata__: '" + printable(name) + "' stands there twice");
        key_ = name;
        return move_to(Place::metadata_text);
      case Place::header:
        if (name == "__metadata__") {
          if (std::exchange(has_metadata_, true)) fail("__metadata__ stands there twice");
          return move_to(Place::metadata_value);
        }
        tensor_ = name;
        if (entries.contains(name)) fail("expected distinct names, got this one twice");
        entry_ = {};
        entry_.position = 8 + position_;
        return move_to(Place::tensor_value);
      default:
        return tensor_key(name);
    }
  }

  bool end_object() {
    switch (place_) {
      case Place::metadata:
        return move_to(Place::header);
      case Place::tensor:
        if (!entry_.dtype) fail("dtype is missing");
        if (!entry_.shape) fail("shape is missing");
        if (!entry_.offsets) fail("data_offsets is missing");
        entries.emplace(std::exchange(tensor_, {}), std::move(entry_));
        return move_to(Place::header);
      default:
        return move_to(Place::file_end);
    }
  }

  bool start_array(std::size_t /*size*/) {
    switch (place_) {
      case Place::shape_value:
        entry_.shape.emplace();
        return move_to(Place::shape);
      case Place::offsets_value:
        entry_.offsets.emplace();
        return move_to(Place::offsets);
      default:
        unexpected("an array");
    }
  }

  bool end_array() {
    if (place_ == Place::offsets && entry_.offsets->size() != 2)
      fail("data_offsets: expected two numbers, got " + std::to_string(entry_.offsets->size()));
    return move_to(Place::tensor);
  }

  bool string(std::string& text) {
    switch (place_) {
      case Place::metadata_text:
        metadata.emplace(std::move(key_), std::move(text));
        return move_to(Place::metadata);
      case Place::dtype_value:
        entry_.dtype = dtype_from_name(text);
        if (!entry_.dtype)
          fail("dtype: expected F64, F32, F16, BF16, I64 to I8, U64 to U8 or BOOL, got '" +
               printable(text) + "'");
        return move_to(Place::tensor);
      default:
        unexpected("a string");
    }
  }

  bool number_unsigned(std::uint64_t number) {
    switch (place_) {
      case Place::shape:
        if (number > static_cast<std::uint64_t>(std::numeric_limits<Index>::max()))
          unexpected(std::to_string(number));
        if (entry_.shape->size() == max_rank)
          fail("shape: expected at most " + std::to_string(max_rank) + " dimensions, got more");
        entry_.shape->push_back(static_cast<Index>(number));
        return true;
      case Place::offsets:
        if (entry_.offsets->size() == 2) fail("data_offsets: expected two numbers, got more");
        entry_.offsets->push_back(number);
        return true;
      default:
        unexpected(std::to_string(number));
    }
  }

  bool number_integer(std::int64_t /*number*/) { unexpected("a negative number"); }
  bool number_float(double /*number*/, const std::string& text) { unexpected(printable(text)); }
  bool boolean(bool value) { unexpected(value ? "true" : "false"); }
  bool null() { unexpected("null"); }
  bool binary(std::vector<std::uint8_t>& /*bytes*/) { unexpected("binary data"); }

  bool parse_error(std::size_t /*position*/, const std::string& /*token*/,
                   const nlohmann::json::exception& error) {
    fail("header: " + printable(error.what(), 300));
  }

 private:
  // In what the parser stands, or (…_value, …_text) of what it has read the key.
  enum class Place {
    file,
    header,
    metadata_value,
    metadata,
    metadata_text,
    tensor_value,
    tensor,
    dtype_value,
    shape_value,
    shape,
    offsets_value,
    offsets,
    file_end,
  };

  // Knows how far the parser has read, for the errors' byte offsets.
  struct CountingIterator {
    using iterator_category = std::input_iterator_tag;
    using value_type = char;
    using difference_type = std::ptrdiff_t;
    using pointer = const char*;
    using reference = const char&;

    const char* at = nullptr;
    std::uint64_t* count = nullptr;

    reference operator*() const { return *at; }
    CountingIterator& operator++() {
      ++at;
      ++*count;
      return *this;
    }
    CountingIterator operator++(int) {
      const CountingIterator old = *this;
      ++*this;
      return old;
    }
    bool operator==(const CountingIterator& other) const { return at == other.at; }
  };

  bool move_to(Place place) {
    place_ = place;
    return true;
  }

  bool tensor_key(const std::string& name) {
    const auto once = [&](bool there, Place place) {
      if (there) fail(name + " stands there twice");
      return move_to(place);
    };
    if (name == "dtype") return once(entry_.dtype.has_value(), Place::dtype_value);
    if (name == "shape") return once(entry_.shape.has_value(), Place::shape_value);
    if (name == "data_offsets") return once(entry_.offsets.has_value(), Place::offsets_value);
    fail("expected dtype, shape and data_offsets, got '" + printable(name) + "'");
  }

  [[noreturn]] void fail(const std::string& problem) const {
    throw SafetensorsError(file_, tensor_, 8 + position_, problem);
  }

  [[noreturn]] void unexpected(const std::string& got) const {
    fail(expected_here() + ", got " + got);
  }

  std::string expected_here() const {
    switch (place_) {
      case Place::metadata_value:
        return "__metadata__: expected an object";
      case Place::metadata_text:
        return "__metadata__: expected a string for '" + printable(key_) + "'";
      case Place::dtype_value:
        return "dtype: expected a string";
      case Place::shape_value:
        return "shape: expected an array";
      case Place::shape:
        return "shape: expected integers from 0 to 2^63 - 1";
      case Place::offsets_value:
        return "data_offsets: expected an array";
      case Place::offsets:
        return "data_offsets: expected integers from 0 to 2^64 - 1";
      default:
        return "expected an object";
    }
  }

  std::string_view file_;
  std::string_view text_;
  std::uint64_t position_ = 0;  // how far the parser has read
  Place place_ = Place::file;
  bool has_metadata_ = false;
  std::string key_;     // of the metadata being read
  std::string tensor_;  // name of the entry being read
  Entry entry_;
};

/// Bytes of a tensor; empty where the product overflows. A zero does not excuse other extents
/// whose product does: strides are computed from them.
inline std::optional<std::uint64_t> byte_size(Dtype dtype, std::span<const Index> shape) {
  std::uint64_t product = size_of(dtype);
  bool empty = false;
  for (const Index extent : shape) {
    if (extent == 0) {
      empty = true;
      continue;
    }
    const auto factor = static_cast<std::uint64_t>(extent);
    if (product > static_cast<std::uint64_t>(std::numeric_limits<Index>::max()) / factor)
      return std::nullopt;
    product *= factor;
  }
  return empty ? 0 : product;
}

/// Parses and checks the header: every tensor's bytes fit its dtype and shape, and together they
/// cover what follows the header without overlap or gap.
/// \param file its name in errors
/// \param bytes the whole file
/// \throws SafetensorsError
inline SafetensorsHeader parse_header(std::string_view file, std::span<const std::byte> bytes) {
  const auto fail = [&](std::uint64_t offset, const std::string& problem) {
    throw SafetensorsError(file, "", offset, problem);
  };
  if (bytes.size() < 8)
    fail(bytes.size(),
         "truncated: expected 8 bytes with the header's size, got " + std::to_string(bytes.size()));
  const auto header_size = load_element<std::uint64_t>(bytes.data());
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
    const std::optional<std::uint64_t> size = byte_size(tensor.dtype, tensor.shape);
    if (!size) fail_entry("shape: expected fewer than 2^63 bytes, got " + to_string(tensor));
    if (*size != end - begin)
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
}  // namespace local_mha::io
