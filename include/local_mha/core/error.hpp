// SPDX-License-Identifier: MIT
/// \file
/// How bad arguments are reported. Messages are built only when something is wrong.
#pragma once

#include <array>
#include <cstddef>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include <local_mha/core/index.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// An empty text to write to, the same whatever the program's locale is.
inline std::ostringstream plain_text() {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  return text;
}

}  // namespace detail

/// A shape as text: `[2, 10, 512]`.
template <std::size_t Rank>
std::string to_string(const std::array<Index, Rank>& shape) {
  std::ostringstream text = detail::plain_text();
  text << '[';
  for (std::size_t axis = 0; axis < Rank; ++axis) text << (axis ? ", " : "") << shape[axis];
  text << ']';
  return text.str();
}

/// Throws std::invalid_argument with the text `argument: expected …, got …`.
template <typename... Got>
[[noreturn]] void reject(std::string_view argument, std::string_view expected, const Got&... got) {
  std::ostringstream message = detail::plain_text();
  message << argument << ": expected " << expected << ", got ";
  (message << ... << got);
  throw std::invalid_argument(message.str());
}

/// Rejects `argument` unless its shape is `expected`; a negative extent there accepts any size.
template <std::size_t Rank>
void require_shape(std::string_view argument, const std::array<Index, Rank>& got,
                   const std::array<Index, Rank>& expected) {
  for (std::size_t axis = 0; axis < Rank; ++axis)
    if (expected[axis] >= 0 ? got[axis] != expected[axis] : got[axis] < 0) {
      std::ostringstream shape = detail::plain_text();
      shape << "shape [";
      for (std::size_t a = 0; a < Rank; ++a) {
        shape << (a ? ", " : "");
        if (expected[a] >= 0)
          shape << expected[a];
        else
          shape << "any";
      }
      shape << ']';
      reject(argument, shape.str(), to_string(got));
    }
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
