// SPDX-License-Identifier: MIT
/// \file
/// How the tensors of a model's layer make up the weights of a layer of this library: one is a part
/// of a parameter's rows, or a table that a parameter is made of.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/prefix.hpp>
#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/state_dict_reader.hpp>
#include <local_mha/io/tensor_source.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

/// A tensor of a model, and of which of a layer's weights it is a part.
struct LayerTensor {
  /// In the file, behind the layer's prefix.
  std::string name;
  std::vector<Index> shape;
  /// As for_each_parameter() names it.
  std::string parameter;
  /// The parameter's row that is the tensor's first.
  Index first_row = 0;
  /// What the layer adds to the numbers in the file.
  double offset = 0;
  /// If not empty, the parameter is made of a table: `parameter(h, c) = tensor(rows[c], h)`.
  std::vector<Index> rows = {};
  /// Of a layer that another one shares the tensor with. Empty: this layer's.
  std::string prefix = {};
};

namespace detail {

/// As it stands before the names of a layer's tensors.
inline std::string layer_prefix(std::string prefix) {
  if (!prefix.empty() && prefix.back() != '.' && prefix.back() != '/') prefix += '.';
  return prefix;
}

/// The same, as it stands in the source.
inline std::string find_layer_prefix(const TensorSource& source, const std::string& prefix) {
  const std::string before = layer_prefix(prefix);
  return before.empty() ? before : find_prefix(source, before, {""});
}

/// More layers than any stack has.
inline constexpr Index most_layers = Index{1} << 30;

/// The first number among the parts of a prefix.
inline std::optional<Index> layer_number(std::string_view prefix) {
  while (!prefix.empty()) {
    const std::string_view part = prefix.substr(0, prefix.find('.'));
    Index number = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), number);
    if (error == std::errc() && end == part.data() + part.size() && number >= 0 &&
        number < most_layers)
      return number;
    prefix.remove_prefix((std::min)(part.size() + 1, prefix.size()));
  }
  return std::nullopt;
}

inline Index size_of(const std::vector<Index>& shape) {
  Index size = 1;
  for (const Index extent : shape) size *= extent;
  return size;
}

/// The tensors of a parameter, one after the other.
template <typename Visitor>
void for_each_part(const std::vector<LayerTensor>& tensors, const std::string& parameter,
                   Visitor&& visit) {
  for (const LayerTensor& tensor : tensors)
    if (tensor.parameter == parameter) visit(tensor);
}

/// \throws std::invalid_argument if a tensor of this shape cannot be a part of the parameter
template <typename Parameter>
void require_part(const LayerTensor& tensor, const Parameter& parameter) {
  bool fits = tensor.first_row >= 0 && tensor.first_row <= parameter.rows();
  if (tensor.rows.empty()) {
    const Index room = (parameter.rows() - tensor.first_row) * parameter.cols();
    Index size = 1;
    for (const Index extent : tensor.shape)
      if (fits = fits && extent >= 0 && (extent == 0 || size <= room / extent); fits)
        size *= extent;
  } else {
    fits = tensor.shape.size() == 2 && tensor.shape[1] == parameter.rows() &&
           static_cast<Index>(tensor.rows.size()) == parameter.cols();
    for (const Index row : tensor.rows) fits = fits && row >= 0 && row < tensor.shape[0];
  }
  if (!fits)
    reject("layer.tensors", "parts of the layer's weights",
           "'" + printable(tensor.name) + "' for " + printable(tensor.parameter));
}

/// Reads a layer's tensors.
template <typename Scalar>
class LayerTensorReader {
 public:
  /// \throws SafetensorsError naming the tensor that is missing, misshapen or not floating-point
  LayerTensorReader(const TensorSource& source, StateDictReader<Scalar>& reader,
                    const std::vector<LayerTensor>& tensors, RotaryBuffers buffers)
      : source_(source), reader_(reader), tensors_(tensors), buffers_(buffers) {
    for (const LayerTensor& tensor : tensors)
      with_reader(tensor, [&](auto& from) { from.check_tensor(tensor.name, tensor.shape); });
  }

  /// Fills what tensors make up of parameters that have their shapes.
  template <typename Parameters>
  void read(Parameters& parameters) {
    for_each_parameter(parameters, [&](const std::string& name, auto& parameter) {
      for_each_part(tensors_, name, [&](const LayerTensor& tensor) { read(tensor, parameter); });
    });
  }

 private:
  template <typename Use>
  void with_reader(const LayerTensor& tensor, Use&& use) {
    if (tensor.prefix.empty()) return use(reader_);
    StateDictReader<Scalar> other(source_, tensor.prefix, buffers_);
    use(other);
  }

  void read_numbers(const LayerTensor& tensor, Scalar* to) {
    const Index size = size_of(tensor.shape);
    with_reader(tensor, [&](auto& from) {
      from.read_into(tensor.name, tensor.shape, {to, static_cast<std::size_t>(size)});
    });
    for (Index i = 0; tensor.offset != 0 && i < size; ++i) to[i] += Scalar(tensor.offset);
  }

  template <typename Parameter>
  void read(const LayerTensor& tensor, Parameter& parameter) {
    require_part(tensor, parameter);
    if (tensor.rows.empty())
      return read_numbers(tensor, parameter.data() + tensor.first_row * parameter.cols());
    RowMatrix<Scalar> table(tensor.shape[0], tensor.shape[1]);
    read_numbers(tensor, table.data());
    for (Index c = 0; c < parameter.cols(); ++c)
      for (Index h = 0; h < parameter.rows(); ++h)
        parameter(h, c) = table(tensor.rows[static_cast<std::size_t>(c)], h);
  }

  const TensorSource& source_;
  StateDictReader<Scalar>& reader_;
  const std::vector<LayerTensor>& tensors_;
  RotaryBuffers buffers_;
};

/// Gradients of tensors from those of the parameters that they make up.
/// \return row-major numbers, by the tensors' names
template <typename Scalar, typename Parameters>
std::map<std::string, std::vector<Scalar>> tensor_gradients(const std::vector<LayerTensor>& tensors,
                                                            const Parameters& gradients) {
  std::map<std::string, std::vector<Scalar>> of_tensors;
  for_each_parameter(gradients, [&](const std::string& name, const auto& gradient) {
    for_each_part(tensors, name, [&](const LayerTensor& tensor) {
      require_part(tensor, gradient);
      const Index cols = gradient.cols();
      std::vector<Scalar>& numbers = of_tensors[tensor.name];
      if (tensor.rows.empty()) {
        const Scalar* first = gradient.data() + tensor.first_row * cols;
        numbers.assign(first, first + size_of(tensor.shape));
        return;
      }
      numbers.assign(static_cast<std::size_t>(size_of(tensor.shape)), Scalar(0));
      for (Index c = 0; c < cols; ++c)
        for (Index h = 0; h < gradient.rows(); ++h)
          numbers[static_cast<std::size_t>(
              tensor.rows[static_cast<std::size_t>(c)] * tensor.shape[1] + h)] += gradient(h, c);
    });
  });
  return of_tensors;
}

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI::io
