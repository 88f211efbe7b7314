// SPDX-License-Identifier: MIT
/// \file
/// Writing safetensors files. The format is described in safetensors.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/atomic_file.hpp>
#include <local_mha/io/dtype.hpp>
#include <local_mha/io/json.hpp>
#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/safetensors_header.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// Collects tensors (copies of them) and metadata, then writes them to a file.
///
/// The file depends on nothing but what was added: the widest dtypes come first, so that every
/// tensor is aligned to its elements, then names in order; the header is padded to 8 bytes.
class SafetensorsWriter {
 public:
  /// Adds a text to `__metadata__`, in place of an earlier one with the same key.
  /// \throws std::invalid_argument if one of them is not UTF-8
  void set_metadata(std::string key, std::string text) {
    require_utf8("metadata key", key);
    require_utf8("metadata text", text);
    metadata_.insert_or_assign(std::move(key), std::move(text));
  }

  /// Adds a tensor: `add("x", {2, 3}, values)`.
  /// \param shape empty for a single number
  /// \param values row-major, as many as the shape says: float, double, bool or an integer type, in
  ///   a vector, an array or a span
  /// \param stored empty: as it is; float and double may be rounded to F64, F32, F16 or BF16
  /// \throws std::invalid_argument if the name was added before or is `__metadata__`, or the sizes
  ///   differ
  template <std::ranges::contiguous_range Values>
    requires std::ranges::sized_range<Values>
  void add(std::string name, const std::vector<Index>& shape, const Values& values,
           std::optional<Dtype> stored = {}) {
    using Scalar = std::ranges::range_value_t<Values>;
    const Dtype dtype = stored.value_or(dtype_of<Scalar>());
    if (std::is_floating_point_v<Scalar> ? !is_float(dtype) : dtype != dtype_of<Scalar>())
      reject("stored",
             std::is_floating_point_v<Scalar> ? std::string_view("F64, F32, F16 or BF16")
                                              : name_of(dtype_of<Scalar>()),
             name_of(dtype), " for '", printable(name), "'");
    TensorData tensor = prepare(name, dtype, shape, std::ranges::size(values) * size_of(dtype));
    std::byte* bytes = tensor.bytes.data();
    for (const Scalar value : values) {
      store(dtype, value, bytes);
      bytes += size_of(dtype);
    }
    tensors_.emplace(std::move(name), std::move(tensor));
  }

  /// Adds a tensor with its own shape.
  template <typename Element, int Rank>
  void add(std::string name, TensorView<Element, Rank> values, std::optional<Dtype> stored = {}) {
    add(std::move(name), {values.dimensions().begin(), values.dimensions().end()},
        std::span(values.data(), static_cast<std::size_t>(values.size())), stored);
  }

  /// Adds an Eigen tensor.
  template <typename Scalar, int Rank, typename Extent>
  void add(std::string name, const Eigen::Tensor<Scalar, Rank, Eigen::RowMajor, Extent>& values,
           std::optional<Dtype> stored = {}) {
    add(std::move(name), TensorView<const Scalar, Rank>(values), stored);
  }

  /// Adds an Eigen matrix of any storage order, `[rows, cols]`, or a vector, `[size]`.
  template <typename Derived>
  void add(std::string name, const Eigen::DenseBase<Derived>& values,
           std::optional<Dtype> stored = {}) {
    const RowMatrix<typename Derived::Scalar> matrix = values;
    std::vector<Index> shape{matrix.rows(), matrix.cols()};
    if (Derived::IsVectorAtCompileTime) shape = {matrix.size()};
    add(std::move(name), shape, std::span(matrix.data(), static_cast<std::size_t>(matrix.size())),
        stored);
  }

  /// Adds a tensor of any dtype from its little-endian bytes.
  /// \throws std::invalid_argument if the name was added before or is `__metadata__`, the sizes
  ///   differ or the dtype is Dtype::Other
  void add_bytes(std::string name, Dtype dtype, const std::vector<Index>& shape,
                 std::span<const std::byte> bytes) {
    if (bits_of(dtype) == 0)
      reject("dtype", "one that this library knows", "another for '", printable(name), "'");
    TensorData tensor = prepare(name, dtype, shape, bytes.size());
    std::copy(bytes.begin(), bytes.end(), tensor.bytes.begin());
    tensors_.emplace(std::move(name), std::move(tensor));
  }

  /// Moves over all that another has; of a text that both have, the other's stays.
  /// \throws std::invalid_argument if both have a tensor of one name; then neither is changed
  void merge(SafetensorsWriter& other) {
    if (&other == this) return;
    for (const auto& named : other.tensors_) require_new(named.first);
    tensors_.merge(other.tensors_);
    metadata_.swap(other.metadata_);
    metadata_.merge(other.metadata_);
    other.metadata_.clear();
  }

  /// The file's bytes.
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> bytes;
    const auto append = [&](std::span<const std::byte> part) {
      bytes.insert(bytes.end(), part.begin(), part.end());
    };
    for_each_part(append);
    return bytes;
  }

  /// Writes the file: under another name beside `path`, then renamed, so that nobody sees half a
  /// file and a failure leaves what was there.
  /// \throws SafetensorsError if the file cannot be written
  void write(const std::filesystem::path& path) const {
    AtomicFile file(path);
    for_each_part([&](std::span<const std::byte> part) { file.write(part); });
    file.commit();
  }

 private:
  struct TensorData {
    Dtype dtype;
    std::vector<Index> shape;
    std::vector<std::byte> bytes;
  };

  static void require_utf8(std::string_view argument, const std::string& text) {
    try {
      static_cast<void>(quoted(text));
    } catch (const nlohmann::json::exception&) {
      reject(argument, "UTF-8", "'", printable(text), "'");
    }
  }

  void require_new(const std::string& name) const {
    if (tensors_.contains(name))
      reject("name", "one that was not added before", "'", printable(name), "'");
  }

  TensorData prepare(const std::string& name, Dtype dtype, const std::vector<Index>& shape,
                     std::size_t size) const {
    require_utf8("name", name);
    if (name == "__metadata__")
      reject("name", "a tensor's name", "'__metadata__', which the format keeps for its texts");
    require_new(name);
    TensorData tensor{dtype, shape, {}};
    for (const Index extent : shape)
      if (extent < 0)
        reject("shape", "extents of at least 0", extent, " for '", printable(name), "'");
    if (shape.size() > detail::max_rank)
      reject("shape", "at most " + std::to_string(detail::max_rank) + " dimensions", shape.size(),
             " for '", printable(name), "'");
    const std::optional<std::uint64_t> expected = detail::byte_size(dtype, shape);
    if (!expected || *expected != size)
      reject("values",
             (expected ? std::to_string(*expected) + " bytes"
                       : std::string(detail::expected_size(dtype))) +
                 " for '" + printable(name) + "'",
             size);
    tensor.bytes.resize(size);
    return tensor;
  }

  template <typename Scalar>
  static void store(Dtype dtype, Scalar value, std::byte* bytes) {
    if constexpr (std::is_floating_point_v<Scalar>) {
      switch (dtype) {
        case Dtype::F64:
          return detail::store_element(static_cast<double>(value), bytes);
        case Dtype::F32:
          return detail::store_element(static_cast<float>(value), bytes);
        case Dtype::F16:
          return detail::store_element(to_float16(static_cast<double>(value)), bytes);
        default:
          return detail::store_element(to_bfloat16(static_cast<double>(value)), bytes);
      }
    } else {
      detail::store_element(value, bytes);
    }
  }

  // Calls append(bytes) with the parts of the file in order.
  template <typename Append>
  void for_each_part(const Append& append) const {
    using Named = std::map<std::string, TensorData>::value_type;
    std::vector<const Named*> order;
    order.reserve(tensors_.size());
    for (const Named& named : tensors_) order.push_back(&named);
    std::sort(order.begin(), order.end(), [](const Named* a, const Named* b) {
      const auto bits_of_a = bits_of(a->second.dtype);
      const auto bits_of_b = bits_of(b->second.dtype);
      return bits_of_a != bits_of_b ? bits_of_a > bits_of_b : a->first < b->first;
    });

    std::string text = "{";
    const auto put = [&](const auto&... parts) { (text.append(parts), ...); };
    if (!metadata_.empty()) {
      text += "\"__metadata__\":{";
      for (const auto& [key, value] : metadata_)
        put(text.back() == '{' ? "" : ",", quoted(key), ":", quoted(value));
      text += "}";
    }
    std::uint64_t begin = 0;
    for (const Named* named : order) {
      const TensorData& tensor = named->second;
      const std::uint64_t end = begin + tensor.bytes.size();
      put(text.size() > 1 ? "," : "", quoted(named->first), ":{\"dtype\":\"", name_of(tensor.dtype),
          "\",\"shape\":[");
      for (std::size_t axis = 0; axis < tensor.shape.size(); ++axis)
        put(axis > 0 ? "," : "", std::to_string(tensor.shape[axis]));
      put("],\"data_offsets\":[", std::to_string(begin), ",", std::to_string(end), "]}");
      begin = end;
    }
    text += "}";
    text.resize((text.size() + 7) / 8 * 8, ' ');
    if (text.size() > detail::max_header_size)
      reject("header", "at most " + std::to_string(detail::max_header_size) + " bytes",
             text.size());

    std::array<std::byte, 8> size;
    detail::store_element(static_cast<std::uint64_t>(text.size()), size.data());
    append(std::span<const std::byte>(size));
    append(std::as_bytes(std::span(text)));
    for (const Named* named : order) append(std::span<const std::byte>(named->second.bytes));
  }

  std::map<std::string, std::string> metadata_;
  std::map<std::string, TensorData> tensors_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
