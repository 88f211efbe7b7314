// SPDX-License-Identifier: MIT
/// \file
/// Element types of safetensors files, and the 16-bit floating-point formats among them.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>
#include <type_traits>

#include <local_mha/core/namespace.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// What the elements of a stored tensor are.
enum class Dtype : std::uint8_t {
  F64,
  F32,
  F16,   ///< IEEE binary16: 5 bits of exponent, 10 of significand
  BF16,  ///< the upper half of an F32: 8 bits of exponent, 7 of significand
  I64,
  I32,
  I16,
  I8,
  U64,
  U32,
  U16,
  U8,
  Boolean,  ///< one byte, 0 or 1; `BOOL` in the file
  // What this library knows by size alone:
  C64,  ///< two F32, real and imaginary part
  F8_E5M2,
  F8_E4M3,
  F8_E8M0,
  F6_E3M2,  ///< four in three bytes
  F6_E2M3,  ///< four in three bytes
  F4,       ///< two in a byte
  Other,    ///< one that this library does not know
};

namespace detail {

struct DtypeTraits {
  Dtype dtype;
  std::string_view name;
  std::size_t bits;
  bool is_float;
  bool is_integer;
};

inline constexpr std::array<DtypeTraits, 21> dtype_table{{
    {Dtype::F64, "F64", 64, true, false},
    {Dtype::F32, "F32", 32, true, false},
    {Dtype::F16, "F16", 16, true, false},
    {Dtype::BF16, "BF16", 16, true, false},
    {Dtype::I64, "I64", 64, false, true},
    {Dtype::I32, "I32", 32, false, true},
    {Dtype::I16, "I16", 16, false, true},
    {Dtype::I8, "I8", 8, false, true},
    {Dtype::U64, "U64", 64, false, true},
    {Dtype::U32, "U32", 32, false, true},
    {Dtype::U16, "U16", 16, false, true},
    {Dtype::U8, "U8", 8, false, true},
    {Dtype::Boolean, "BOOL", 8, false, false},
    {Dtype::C64, "C64", 64, false, false},
    {Dtype::F8_E5M2, "F8_E5M2", 8, false, false},
    {Dtype::F8_E4M3, "F8_E4M3", 8, false, false},
    {Dtype::F8_E8M0, "F8_E8M0", 8, false, false},
    {Dtype::F6_E3M2, "F6_E3M2", 6, false, false},
    {Dtype::F6_E2M3, "F6_E2M3", 6, false, false},
    {Dtype::F4, "F4", 4, false, false},
    {Dtype::Other, "another dtype", 0, false, false},
}};

constexpr const DtypeTraits& traits(Dtype dtype) {
  const auto place = static_cast<std::size_t>(dtype);
  return dtype_table[(std::min)(place, dtype_table.size() - 1)];
}

}  // namespace detail

/// Bits of an element; 0 for Dtype::Other.
constexpr std::size_t bits_of(Dtype dtype) { return detail::traits(dtype).bits; }

/// Bytes of an element; 0 where elements share bytes (F6 and F4) and for Dtype::Other.
constexpr std::size_t size_of(Dtype dtype) { return bits_of(dtype) / 8; }

/// As it stands in the file: `F64`, …, `BOOL`.
constexpr std::string_view name_of(Dtype dtype) { return detail::traits(dtype).name; }

/// Whether it is read as float and double: F64, F32, F16 and BF16.
constexpr bool is_float(Dtype dtype) { return detail::traits(dtype).is_float; }

/// Whether it is one of I64 to I8 and U64 to U8.
constexpr bool is_integer(Dtype dtype) { return detail::traits(dtype).is_integer; }

/// Empty for a name that is not in the enumeration.
constexpr std::optional<Dtype> dtype_from_name(std::string_view name) {
  for (const detail::DtypeTraits& traits : detail::dtype_table)
    if (traits.name == name && traits.dtype != Dtype::Other) return traits.dtype;
  return std::nullopt;
}

/// The dtype that stores a `Scalar` as it is.
template <typename Scalar>
constexpr Dtype dtype_of() {
  static_assert(std::is_same_v<Scalar, float> || std::is_same_v<Scalar, double> ||
                    (std::is_integral_v<Scalar> && sizeof(Scalar) <= 8),
                "safetensors files hold float, double, integers and bool");
  if constexpr (std::is_same_v<Scalar, float>)
    return Dtype::F32;
  else if constexpr (std::is_same_v<Scalar, double>)
    return Dtype::F64;
  else if constexpr (std::is_same_v<Scalar, bool>)
    return Dtype::Boolean;
  else if constexpr (std::is_signed_v<Scalar>)
    return sizeof(Scalar) == 8   ? Dtype::I64
           : sizeof(Scalar) == 4 ? Dtype::I32
           : sizeof(Scalar) == 2 ? Dtype::I16
                                 : Dtype::I8;
  else
    return sizeof(Scalar) == 8   ? Dtype::U64
           : sizeof(Scalar) == 4 ? Dtype::U32
           : sizeof(Scalar) == 2 ? Dtype::U16
                                 : Dtype::U8;
}

namespace detail {

template <std::size_t Size>
using UnsignedOf = std::conditional_t<
    Size == 8, std::uint64_t,
    std::conditional_t<Size == 4, std::uint32_t,
                       std::conditional_t<Size == 2, std::uint16_t, std::uint8_t>>>;

// Files are little-endian and their tensors need not be aligned: an element is copied out, and
// turned around where the machine is big-endian.
template <typename Stored>
Stored load_element(const std::byte* bytes) {
  std::array<std::byte, sizeof(Stored)> element;
  std::memcpy(element.data(), bytes, sizeof(Stored));
  if constexpr (std::endian::native == std::endian::big)
    std::reverse(element.begin(), element.end());
  return std::bit_cast<Stored>(element);
}

template <typename Stored>
void store_element(Stored value, std::byte* bytes) {
  auto element = std::bit_cast<std::array<std::byte, sizeof(Stored)>>(value);
  if constexpr (std::endian::native == std::endian::big)
    std::reverse(element.begin(), element.end());
  std::memcpy(bytes, element.data(), sizeof(Stored));
}

}  // namespace detail

/// The value of an F16, exactly: every one is a float. A NaN stays one.
inline float from_float16(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits >> 15) << 31;
  const std::uint32_t exponent = (bits >> 10) & 0x1fU;
  const std::uint32_t significand = bits & 0x3ffU;
  std::uint32_t magnitude = 0;
  if (exponent == 31)  // infinity and NaN
    magnitude = 0x7f800000U | significand << 13;
  else if (exponent == 0)  // zero and subnormals: significand · 2^-24
    magnitude = std::bit_cast<std::uint32_t>(static_cast<float>(significand) * 0x1p-24F);
  else  // the biases are 15 and 127
    magnitude = (exponent + 112) << 23 | significand << 13;
  return std::bit_cast<float>(sign | magnitude);
}

/// The value of a BF16, exactly.
inline float from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

namespace detail {

// Rounds to the nearest value with the given format, ties to the even one, beyond the largest to
// infinity. From double, so that a double is rounded only once.
template <int SignificandBits, int MinExponent>
std::uint16_t round_to_16_bits(double value) {
  constexpr int exponent_bits = 15 - SignificandBits;
  constexpr std::uint64_t infinity = ((1U << exponent_bits) - 1) << SignificandBits;
  const auto bits = std::bit_cast<std::uint64_t>(value);
  const std::uint64_t sign = bits >> 63 << 15;
  const std::uint64_t fraction = bits & ((std::uint64_t{1} << 52) - 1);
  const int biased = static_cast<int>(bits >> 52 & 0x7ff);
  if (biased == 0x7ff) {
    const std::uint64_t quiet_nan = std::uint64_t{1} << (SignificandBits - 1);
    const std::uint64_t payload = fraction >> (52 - SignificandBits);
    return static_cast<std::uint16_t>(sign | infinity | (fraction ? quiet_nan | payload : 0));
  }
  if (biased == 0) return static_cast<std::uint16_t>(sign);  // far below the smallest subnormal

  // value = significand · 2^(exponent - 52); the low `dropped` bits do not fit.
  const std::uint64_t significand = fraction | std::uint64_t{1} << 52;
  const int exponent = biased - 1023;
  const int dropped = 52 - SignificandBits + (std::max)(0, MinExponent - exponent);
  if (dropped > 53) return static_cast<std::uint16_t>(sign);  // below half of the smallest
  std::uint64_t kept = significand >> dropped;
  const std::uint64_t rest = significand & ((std::uint64_t{1} << dropped) - 1);
  const std::uint64_t half = std::uint64_t{1} << (dropped - 1);
  if (rest > half || (rest == half && (kept & 1U) != 0)) ++kept;

  // The leading bit of a normal number adds one to the exponent field, as does a carry.
  std::uint64_t magnitude = kept;
  if (exponent >= MinExponent)
    magnitude += static_cast<std::uint64_t>(exponent - MinExponent) << SignificandBits;
  return static_cast<std::uint16_t>(sign | (std::min)(magnitude, infinity));
}

}  // namespace detail

/// The nearest F16, ties to even; beyond 65504 infinity.
inline std::uint16_t to_float16(double value) { return detail::round_to_16_bits<10, -14>(value); }

/// The nearest BF16, ties to even.
inline std::uint16_t to_bfloat16(double value) { return detail::round_to_16_bits<7, -126>(value); }

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
