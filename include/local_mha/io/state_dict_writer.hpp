// SPDX-License-Identifier: MIT
/// \file
/// Writing the tensors of a state dict.
#pragma once

#include <array>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/config.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/rotary_buffers.hpp>
#include <local_mha/io/safetensors.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

/// Adds tensors under a prefix, and checks that they have the shapes that the configuration says.
template <typename Scalar>
class StateDictWriter {
 public:
  /// \param dtype empty: as `Scalar` is
  /// \param branch stands before the names of a layer's modules
  StateDictWriter(SafetensorsWriter& writer, std::string prefix, std::optional<Dtype> dtype,
                  std::string branch = "branch.")
      : writer_(writer),
        prefix_(std::move(prefix)),
        branch_(std::move(branch)),
        dtype_(dtype.value_or(dtype_of<Scalar>())) {
    if (!is_float(dtype_)) reject("dtype", "F64, F32, F16 or BF16", name_of(dtype_));
  }

  void tensor(bool used, const std::string& name, const RowMatrix<Scalar>& matrix, Index rows,
              Index cols) {
    const auto expected = used ? std::array<Index, 2>{rows, cols} : std::array<Index, 2>{0, 0};
    require_shape(name, std::array<Index, 2>{matrix.rows(), matrix.cols()}, expected);
    if (used) writer_.add(prefix_ + name, matrix, dtype_);
  }

  void tensor(bool used, const std::string& name, const Vector<Scalar>& vector, Index size) {
    require_shape(name, std::array<Index, 1>{vector.size()}, {used ? size : 0});
    if (used) writer_.add(prefix_ + name, vector, dtype_);
  }

  void stacked(const std::string& name, const std::array<std::string, 3>& /*parts*/,
               const RowMatrix<Scalar>& matrix, const std::array<Index, 3>& rows, Index cols) {
    tensor(true, name, matrix, std::accumulate(rows.begin(), rows.end(), Index{0}), cols);
  }

  void stacked(bool used, const std::string& name, const std::array<std::string, 3>& /*parts*/,
               const Vector<Scalar>& vector, const std::array<Index, 3>& sizes) {
    tensor(used, name, vector, std::accumulate(sizes.begin(), sizes.end(), Index{0}));
  }

  void tensor(bool used, const std::string& name, const Single<Scalar>& number) {
    if (used) writer_.add(prefix_ + name, {}, std::span(number.data(), 1), dtype_);
  }

  std::string branch(const std::string& /*layer*/) const { return branch_; }

  template <typename Layer>
  static const Layer& layer(const std::vector<Layer>& layers, Index i, Index count) {
    if (static_cast<Index>(layers.size()) != count)
      reject("layers", std::to_string(count), layers.size());
    return layers[static_cast<std::size_t>(i)];
  }

  template <typename Parameters>
  static const Parameters* optional(bool used, const std::string& name,
                                    const std::optional<Parameters>& set) {
    if (used != set.has_value())
      reject(name, used ? "weights, because the configuration has it" : "no weights",
             set ? "some" : "none");
    return set ? &*set : nullptr;
  }

  /// Python's `load_state_dict` would miss them.
  void rotary_buffers(const std::string& prefix, Index dim_head, const RotaryConfig& rotary) {
    writer_.add(prefix_ + prefix + "inv_freq", rotary_frequencies(dim_head, rotary),
                dtype_ == Dtype::F64 ? Dtype::F64 : Dtype::F32);
  }

 private:
  SafetensorsWriter& writer_;
  std::string prefix_;
  std::string branch_;
  Dtype dtype_;
};

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
