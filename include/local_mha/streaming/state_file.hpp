// SPDX-License-Identifier: MIT
/// \file
/// How the state of a stream is written and read: numbers as they lie in memory, a description of
/// what they belong to before them, and a checksum behind them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <istream>
#include <ostream>
#include <string>
#include <string_view>
#include <type_traits>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

/// What a state holds: numbers, and those that are stored in 16 bits.
template <typename T>
inline constexpr bool is_state_number =
    std::is_arithmetic_v<T> || std::is_same_v<T, Eigen::bfloat16> || std::is_same_v<T, Eigen::half>;

/// What a state begins with; a machine of the other byte order reads another number.
inline constexpr std::uint64_t state_magic = 0x4C4D48410002FEFF;

/// FNV-1a (G. Fowler, L. C. Noll, K.-P. Vo) over words of 8 bytes. The product carries upwards
/// only, so its high bits are folded down: else the signs of two numbers could change unnoticed.
class Checksum {
 public:
  void add(const char* bytes, std::size_t size) {
    for (std::size_t i = 0; i < size; i += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, bytes + i, std::min<std::size_t>(8, size - i));
      value_ = (value_ ^ word) * 0x100000001B3;
      value_ ^= value_ >> 32;
    }
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xCBF29CE484222325;
};

/// Writes a state.
class StateWriter {
 public:
  /// \param description what the state belongs to
  StateWriter(std::ostream& out, std::string_view description) : out_(out) {
    put(state_magic);
    put(static_cast<std::uint64_t>(description.size()));
    put(description.data(), static_cast<Index>(description.size()));
  }

  template <typename T>
  void put(const T* values, Index n) {
    static_assert(is_state_number<T>, "states are of float or double");
    const auto* bytes = reinterpret_cast<const char*>(values);
    const auto size = static_cast<std::size_t>(n) * sizeof(T);
    checksum_.add(bytes, size);
    out_.write(bytes, static_cast<std::streamsize>(size));
  }
  template <typename T>
    requires is_state_number<T>
  void put(const T& value) {
    put(&value, 1);
  }

  /// \throws std::runtime_error if something could not be written
  void finish() {
    const std::uint64_t checksum = checksum_.value();
    out_.write(reinterpret_cast<const char*>(&checksum), sizeof checksum);
    if (!out_.flush()) throw std::runtime_error("state: cannot be written");
  }

 private:
  std::ostream& out_;
  Checksum checksum_;
};

/// Reads a state.
class StateReader {
 public:
  /// \throws std::invalid_argument if this is not the state of `description`
  StateReader(std::istream& in, std::string_view description) : in_(in) {
    if (get<std::uint64_t>() != state_magic) reject("state", "one that save() wrote", "other data");
    const auto size = get<std::uint64_t>();
    // More than a description has is not read to be shown.
    if (size > (std::max<std::size_t>)(4096, description.size()))
      reject("state", "one that save() wrote", "other data");
    std::string got(size, '\0');
    get(got.data(), static_cast<Index>(size));
    if (got != description) reject("state", "that of " + std::string(description), got);
  }

  template <typename T>
  void get(T* values, Index n) {
    static_assert(is_state_number<T>, "states are of float or double");
    const auto size = static_cast<std::size_t>(n) * sizeof(T);
    in_.read(reinterpret_cast<char*>(values), static_cast<std::streamsize>(size));
    if (!in_) reject("state", "more data", "its end");
    checksum_.add(reinterpret_cast<const char*>(values), size);
  }
  template <typename T>
  T get() {
    T value;
    get(&value, 1);
    return value;
  }
  /// An index in `[least, most]`.
  Index get_index(Index least, Index most) {
    const auto value = get<std::int64_t>();
    if (value < least || value > most)
      reject("state", "a number from " + std::to_string(least) + " to " + std::to_string(most),
             value);
    return static_cast<Index>(value);
  }

  /// \throws std::invalid_argument if what was read is not what was written
  void finish() {
    const std::uint64_t expected = checksum_.value();
    if (get<std::uint64_t>() != expected) reject("state", "one that is intact", "a damaged one");
  }

 private:
  std::istream& in_;
  Checksum checksum_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
