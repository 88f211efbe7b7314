// SPDX-License-Identifier: MIT
/// \file
/// The JSON of a safetensors file's header, parsed but not yet checked against the file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/core/types.hpp>
#include <local_mha/io/dtype.hpp>
#include <local_mha/io/safetensors_error.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io::detail {

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
    std::string other_dtype;  // its name, if it is Dtype::Other
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
        // Nobody may ever read this tensor.
        entry_.dtype = dtype_from_name(text).value_or(Dtype::Other);
        if (entry_.dtype == Dtype::Other) entry_.other_dtype = std::move(text);
        return move_to(Place::tensor);
      default:
        unexpected("a string");
    }
  }

  bool number_unsigned(std::uint64_t number) {
    switch (place_) {
      case Place::shape:
        if (number > static_cast<std::uint64_t>((std::numeric_limits<Index>::max)()))
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
  enum class Place : std::uint8_t {
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

}  // namespace local_mha::inline LOCAL_MHA_ABI::io::detail
