// SPDX-License-Identifier: MIT
/// \file
/// State dicts in memory: names to views of tensors that somebody else owns.
///
///     io::StateDict weights;
///     weights.add("to_qkv.weight", pointer, {1536, 512});
///     weights.add("to_out.weight", matrix);
///     auto parameters = io::load_local_mha_parameters<float>(weights, config);
///
/// What loads weights from a file loads them from here by the same code.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <ranges>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/dtype.hpp>
#include <local_mha/io/file_bytes.hpp>
#include <local_mha/io/rotary_buffers.hpp>
#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/safetensors_header.hpp>
#include <local_mha/io/state_dict_layout.hpp>
#include <local_mha/io/state_dict_reader.hpp>
#include <local_mha/io/state_dict_writer.hpp>
#include <local_mha/io/tensor_source.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// Tensors by name, in memory. Nothing is copied: what was added must stay as long as this is used.
/// (Big-endian processors copy numbers that are not added by their bytes when they are added.)
/// Copies are independent lists of the same tensors. Where adding throws, nothing was added.
class StateDict : public TensorSource {
 public:
  /// Begins empty.
  /// \param name stands for a file's path in errors
  explicit StateDict(std::string name = "state dict")
      : StateDict(std::make_shared<detail::TensorContent>(named(std::move(name)))) {}

  StateDict(const StateDict& other)
      : StateDict(std::make_shared<detail::TensorContent>(*other.tensors_)) {}
  StateDict& operator=(const StateDict& other) {
    if (this == &other) return *this;
    auto tensors = std::make_shared<detail::TensorContent>(*other.tensors_);
    set_content(tensors);
    tensors_ = std::move(tensors);
    return *this;
  }
  ~StateDict() = default;

  /// Adds a tensor, row-major: `add("x", pointer, {2, 3})`.
  /// \tparam Scalar float, double, bool or an integer type
  /// \param shape empty for a single number
  /// \throws std::invalid_argument if the name was added before, an extent is negative, memory
  ///   could not hold that many elements, or `data` is null although there are some
  template <typename Scalar>
    requires std::is_arithmetic_v<Scalar>
  void add(std::string name, const Scalar* data, std::vector<Index> shape) {
    add_entry(std::move(name), dtype_of<Scalar>(), std::move(shape),
              reinterpret_cast<const std::byte*>(data), std::nullopt, sizeof(Scalar));
  }

  /// Adds the numbers of a vector, an array or a span: `add("x", values, {2, 3})`.
  /// \throws std::invalid_argument as for a pointer, and if there are more or fewer numbers
  template <std::ranges::contiguous_range Values>
    requires(std::ranges::sized_range<Values> && std::ranges::borrowed_range<Values> &&
             std::is_arithmetic_v<std::ranges::range_value_t<Values>>)
  void add(std::string name, Values&& values, std::vector<Index> shape) {
    using Scalar = std::ranges::range_value_t<Values>;
    add_entry(std::move(name), dtype_of<Scalar>(), std::move(shape),
              reinterpret_cast<const std::byte*>(std::ranges::data(values)),
              std::ranges::size(values) * sizeof(Scalar), sizeof(Scalar));
  }

  /// Adds a tensor with its own shape.
  template <typename Element, int Rank>
  void add(std::string name, const TensorView<Element, Rank>& tensor) {
    add(std::move(name), static_cast<const std::remove_const_t<Element>*>(tensor.data()),
        {tensor.dimensions().begin(), tensor.dimensions().end()});
  }
  /// Adds an Eigen tensor.
  template <typename Scalar, int Rank, typename Extent>
  void add(std::string name, const Eigen::Tensor<Scalar, Rank, Eigen::RowMajor, Extent>& tensor
                                 LOCAL_MHA_LIFETIME_BOUND) {
    add(std::move(name), TensorView<const Scalar, Rank>(tensor));
  }
  template <typename Scalar, int Rank, typename Extent>
  void add(std::string name,
           Eigen::Tensor<Scalar, Rank, Eigen::RowMajor, Extent>&& tensor) = delete;

  /// Adds a row-major matrix, `[rows, cols]`, a vector, `[size]`, or a Single, `[]`.
  template <typename Scalar, int Rows, int Cols, int Options, int MaxRows, int MaxCols>
  void add(std::string name,
           const Eigen::Matrix<Scalar, Rows, Cols, Options, MaxRows, MaxCols>& matrix
               LOCAL_MHA_LIFETIME_BOUND) {
    static_assert(Rows == 1 || Cols == 1 || (Options & Eigen::RowMajor) != 0,
                  "a state dict's matrices are row-major: local_mha::RowMatrix");
    std::vector<Index> shape{matrix.rows(), matrix.cols()};
    if (Rows == 1 && Cols == 1)
      shape.clear();
    else if (Rows == 1 || Cols == 1)
      shape = {matrix.size()};
    add(std::move(name), static_cast<const Scalar*>(matrix.data()), std::move(shape));
  }
  template <typename Scalar, int Rows, int Cols, int Options, int MaxRows, int MaxCols>
  void add(std::string name,
           Eigen::Matrix<Scalar, Rows, Cols, Options, MaxRows, MaxCols>&& matrix) = delete;

  /// Adds a tensor of any dtype, such as F16 or BF16, by its little-endian bytes.
  /// \throws std::invalid_argument as for a pointer, and if the sizes differ or the dtype is
  ///   Dtype::Other
  void add_bytes(std::string name, Dtype dtype, std::vector<Index> shape,
                 std::span<const std::byte> bytes) {
    if (bits_of(dtype) == 0)
      reject("dtype", "one that this library knows", "another for '", printable(name), "'");
    add_entry(std::move(name), dtype, std::move(shape), bytes.data(), bytes.size());
  }

  /// A text, as a file has them in `__metadata__`, in place of an earlier one with the same key.
  void set_metadata(const std::string& key, std::string text) {
    tensors_->header.metadata.insert_or_assign(key, std::move(text));
  }

 private:
  explicit StateDict(std::shared_ptr<detail::TensorContent> tensors)
      : TensorSource(tensors), tensors_(std::move(tensors)) {}

  // The bytes of nothing keep the name, for entries look at it.
  static detail::TensorContent named(std::string name) {
    auto source = std::make_shared<const detail::FileBytes>(std::vector<std::byte>(), name);
    return {std::move(name), {std::move(source)}, {}};
  }

  // `native`: the size of a number, if they lie as this processor has them, else 1.
  void add_entry(std::string name, Dtype dtype, std::vector<Index> shape, const std::byte* data,
                 std::optional<std::size_t> given, [[maybe_unused]] std::size_t native = 1) {
    for (const Index extent : shape)
      if (extent < 0)
        reject("shape", "extents of at least 0", extent, " for '", printable(name), "'");
    const std::optional<std::uint64_t> size = detail::byte_size(dtype, shape);
    if (!size)
      reject("shape", detail::expected_size(dtype), "another number for '", printable(name), "'");
    if (given && *given != *size)
      reject("shape", std::to_string(*given) + " bytes, as were given", *size, " for '",
             printable(name), "'");
    if (data == nullptr && *size > 0)
      reject("data", std::to_string(*size) + " bytes", "null for '", printable(name), "'");
    TensorEntry entry{.dtype = dtype,
                      .shape = std::move(shape),
                      .bytes = {data, static_cast<std::size_t>(*size)},
                      .file = tensors_->files.front()->name()};
    if (tensors_->header.tensors.contains(name))
      reject("name", "one that was not added before", "'", printable(name), "'");
    if constexpr (std::endian::native == std::endian::big) {
      if (native > 1) {
        std::vector<std::byte> turned(entry.bytes.begin(), entry.bytes.end());
        for (auto at = turned.begin(); at != turned.end();
             at += static_cast<std::ptrdiff_t>(native))
          std::reverse(at, at + static_cast<std::ptrdiff_t>(native));
        tensors_->files.push_back(std::make_shared<const detail::FileBytes>(
            std::move(turned), tensors_->files.front()->name()));
        entry.bytes = tensors_->files.back()->bytes();
      }
    }
    tensors_->header.tensors.emplace(std::move(name), std::move(entry));
  }

  std::shared_ptr<detail::TensorContent> tensors_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
