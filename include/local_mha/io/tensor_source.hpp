// SPDX-License-Identifier: MIT
/// \file
/// Named tensors to be read, wherever they lie: what files and state dicts in memory have in
/// common.
#pragma once

#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/core/types.hpp>
#include <local_mha/io/dtype.hpp>
#include <local_mha/io/file_bytes.hpp>
#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/safetensors_header.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

/// Tensors, and what keeps their bytes where the source owns them.
struct TensorContent {
  std::string name;
  std::vector<std::shared_ptr<const FileBytes>> files;
  SafetensorsHeader header;
  std::map<std::string, std::string, std::less<>> elsewhere = {};  ///< in a file that is not open
};

}  // namespace detail

/// What tensors are read as.
///
/// - `double`: F64, F32, F16 and BF16, exactly.
/// - `float`: the same; F64 is rounded to nearest.
/// - `Eigen::half`, `Eigen::bfloat16`: the same, rounded to nearest, ties to even; of its own dtype
///   exactly.
/// - `std::int64_t`: integers and BOOL, exactly; a U64 above 2^63 - 1 is an error.
/// - `std::uint8_t`: U8 and BOOL, exactly.
/// - `bool`: U8 and BOOL; another value than 0 and 1 is an error.
template <typename Scalar>
concept ReadableScalar =
    std::same_as<Scalar, double> || std::same_as<Scalar, float> ||
    std::same_as<Scalar, Eigen::half> || std::same_as<Scalar, Eigen::bfloat16> ||
    std::same_as<Scalar, std::int64_t> || std::same_as<Scalar, std::uint8_t> ||
    std::same_as<Scalar, bool>;

/// Tensors by name, and texts: a SafetensorsFile, or a StateDict in memory. What loads weights
/// takes either. Copies share the tensors.
class TensorSource {
 public:
  // No moves: what was moved from would be none.
  TensorSource(const TensorSource&) = default;
  TensorSource& operator=(const TensorSource&) = default;
  ~TensorSource() = default;

  /// The path of a file, or another name of the source, for errors. Entries say in which of several
  /// files they are.
  const std::string& file_name() const { return content_->name; }

  /// The texts of `__metadata__`.
  const std::map<std::string, std::string>& metadata() const { return content_->header.metadata; }

  /// The tensors, by name. Their bytes stay valid as long as this source or a copy of it, or as
  /// the memory that was given to StateDict.
  const std::map<std::string, TensorEntry, std::less<>>& entries() const {
    return content_->header.tensors;
  }

  /// Names of the tensors, sorted.
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    names.reserve(entries().size());
    for (const auto& named : entries()) names.push_back(named.first);
    return names;
  }

  /// Whether there is a tensor of that name.
  bool contains(std::string_view name) const { return entries().contains(name); }

  /// Where a tensor is that is not among entries(), for messages; empty if nobody knows.
  std::string where(std::string_view name) const {
    const auto found = content_->elsewhere.find(name);
    return found == content_->elsewhere.end()
               ? ""
               : ", it lies in '" + printable(found->second) + "', which was not to be opened";
  }

  /// Type, shape and place of a tensor.
  /// \throws SafetensorsError if there is no such tensor
  const TensorEntry& entry(std::string_view name) const {
    const auto found = entries().find(name);
    if (found == entries().end())
      throw SafetensorsError(file_name(), std::string(name),
                             "there is no such tensor" + where(name));
    return found->second;
  }

  /// All elements, row-major. See ReadableScalar for what converts to what.
  /// \throws SafetensorsError if there is no such tensor or it does not convert
  template <ReadableScalar Scalar>
    requires(!std::same_as<Scalar, bool>)
  std::vector<Scalar> read(std::string_view name) const {
    const TensorEntry& stored = entry(name);
    require_convertible<Scalar>(name, stored);
    std::vector<Scalar> values(static_cast<std::size_t>(stored.size()));
    convert(name, stored, values.data());
    return values;
  }

  /// A single number: a tensor of one element, of any rank (a loss is stored as `[]` or `[1]`).
  /// \throws SafetensorsError if there is no such tensor, it has more elements or does not convert
  template <ReadableScalar Scalar>
  Scalar scalar(std::string_view name) const {
    const TensorEntry& stored = entry(name);
    if (stored.size() != 1) fail(name, stored, "expected one element, got " + to_string(stored));
    Scalar value{};
    convert(name, stored, &value);
    return value;
  }

  /// Reads a tensor, converted to Scalar.
  /// \tparam Rank number of dimensions, which must be the stored one
  /// \throws SafetensorsError if there is no such tensor or it does not convert
  template <ReadableScalar Scalar, int Rank>
  Tensor<Scalar, Rank> tensor(std::string_view name) const {
    const TensorEntry& stored = entry(name);
    require_convertible<Scalar>(name, stored);
    if (stored.shape.size() != Rank)
      fail(name, stored,
           "expected " + std::to_string(Rank) + " dimensions, got " + to_string(stored));
    std::array<Index, static_cast<std::size_t>(Rank)> shape{};
    for (std::size_t axis = 0; axis < Rank; ++axis) shape[axis] = stored.shape[axis];
    Tensor<Scalar, Rank> values(shape);
    convert(name, stored, values.data());
    return values;
  }

  /// Writes all elements to `out`, row-major.
  /// \param out as many elements as the tensor has
  /// \throws SafetensorsError if there is no such tensor, the sizes differ or it does not convert
  template <ReadableScalar Scalar>
  void read_into(std::string_view name, std::span<Scalar> out) const {
    const TensorEntry& stored = entry(name);
    if (out.size() != static_cast<std::size_t>(stored.size()))
      fail(name, stored,
           "expected " + std::to_string(out.size()) + " elements, got " + to_string(stored));
    convert(name, stored, out.data());
  }

 protected:
  explicit TensorSource(std::shared_ptr<const detail::TensorContent> content)
      : content_(std::move(content)) {}

  void set_content(std::shared_ptr<const detail::TensorContent> content) {
    content_ = std::move(content);
  }

 private:
  [[noreturn]] void fail(std::string_view name, const TensorEntry& stored,
                         const std::string& problem) const {
    throw SafetensorsError(stored.file, std::string(name), stored.offset, problem);
  }

  template <typename Scalar>
  void require_convertible(std::string_view name, const TensorEntry& stored) const {
    if constexpr (std::is_floating_point_v<Scalar> || is_16_bits<Scalar>) {
      if (!is_float(stored.dtype))
        fail(name, stored, "expected F64, F32, F16 or BF16, got " + to_string(stored));
    } else if constexpr (std::is_same_v<Scalar, std::int64_t>) {
      if (!is_integer(stored.dtype) && stored.dtype != Dtype::Boolean)
        fail(name, stored, "expected integers or BOOL, got " + to_string(stored));
    } else {
      if (stored.dtype != Dtype::U8 && stored.dtype != Dtype::Boolean)
        fail(name, stored, "expected U8 or BOOL, got " + to_string(stored));
    }
  }

  // out[i] = decode(element i, i)
  template <typename Stored, typename Scalar, typename Decode>
  static void convert_each(const TensorEntry& stored, Scalar* out, const Decode& decode) {
    const std::size_t count = stored.bytes.size() / sizeof(Stored);
    const std::byte* bytes = stored.bytes.data();
    for (std::size_t i = 0; i < count; ++i)
      out[i] = decode(detail::load_element<Stored>(bytes + i * sizeof(Stored)), i);
  }

  template <typename Scalar>
  static constexpr bool is_16_bits =
      std::is_same_v<Scalar, Eigen::half> || std::is_same_v<Scalar, Eigen::bfloat16>;

  // A number in 16 bits that is stored in these.
  template <typename Scalar>
  static void convert_to_16_bits(const TensorEntry& stored, Scalar* out) {
    constexpr bool half = std::is_same_v<Scalar, Eigen::half>;
    const auto rounded = [](double value) {
      return std::bit_cast<Scalar>(half ? to_float16(value) : to_bfloat16(value));
    };
    const auto round = [&](auto value, std::size_t) { return rounded(static_cast<double>(value)); };
    if (stored.dtype == Dtype::F64) return convert_each<double>(stored, out, round);
    if (stored.dtype == Dtype::F32) return convert_each<float>(stored, out, round);
    convert_each<std::uint16_t>(stored, out, [&](std::uint16_t bits, std::size_t) {
      const bool of_half = stored.dtype == Dtype::F16;
      if (of_half == half) return std::bit_cast<Scalar>(bits);
      return rounded(static_cast<double>(of_half ? from_float16(bits) : from_bfloat16(bits)));
    });
  }

  template <typename Scalar>
  void convert(std::string_view name, const TensorEntry& stored, Scalar* out) const {
    require_convertible<Scalar>(name, stored);
    if constexpr (is_16_bits<Scalar>) return convert_to_16_bits(stored, out);
    const auto cast = [](auto value, std::size_t) { return static_cast<Scalar>(value); };
    const auto of_byte = [&](std::uint8_t value, std::size_t i) {
      if ((stored.dtype == Dtype::Boolean || std::is_same_v<Scalar, bool>) && value > 1)
        throw SafetensorsError(stored.file, std::string(name), stored.offset + i,
                               "expected 0 or 1, got " + std::to_string(value));
      return static_cast<Scalar>(value);
    };
    if constexpr (std::is_floating_point_v<Scalar>) {
      static_assert(std::numeric_limits<Scalar>::is_iec559);
      switch (stored.dtype) {
        case Dtype::F64:
          return convert_each<double>(stored, out, cast);
        case Dtype::F32:
          return convert_each<float>(stored, out, cast);
        case Dtype::F16:
          return convert_each<std::uint16_t>(stored, out, [](std::uint16_t bits, std::size_t) {
            return static_cast<Scalar>(from_float16(bits));
          });
        default:
          return convert_each<std::uint16_t>(stored, out, [](std::uint16_t bits, std::size_t) {
            return static_cast<Scalar>(from_bfloat16(bits));
          });
      }
    } else if constexpr (std::is_same_v<Scalar, std::int64_t>) {
      switch (stored.dtype) {
        case Dtype::I64:
          return convert_each<std::int64_t>(stored, out, cast);
        case Dtype::I32:
          return convert_each<std::int32_t>(stored, out, cast);
        case Dtype::I16:
          return convert_each<std::int16_t>(stored, out, cast);
        case Dtype::I8:
          return convert_each<std::int8_t>(stored, out, cast);
        case Dtype::U64:
          return convert_each<std::uint64_t>(stored, out, [&](std::uint64_t value, std::size_t i) {
            if (value > static_cast<std::uint64_t>((std::numeric_limits<std::int64_t>::max)()))
              throw SafetensorsError(stored.file, std::string(name), stored.offset + 8 * i,
                                     "expected at most 2^63 - 1, got " + std::to_string(value));
            return static_cast<std::int64_t>(value);
          });
        case Dtype::U32:
          return convert_each<std::uint32_t>(stored, out, cast);
        case Dtype::U16:
          return convert_each<std::uint16_t>(stored, out, cast);
        default:
          return convert_each<std::uint8_t>(stored, out, of_byte);
      }
    } else {
      return convert_each<std::uint8_t>(stored, out, of_byte);
    }
  }

  std::shared_ptr<const detail::TensorContent> content_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
