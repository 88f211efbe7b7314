// SPDX-License-Identifier: MIT
/// \file
/// Reading the tensors of a state dict.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/config.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/io/rotary_buffers.hpp>
#include <local_mha/io/safetensors_error.hpp>
#include <local_mha/io/safetensors_header.hpp>
#include <local_mha/io/tensor_names.hpp>
#include <local_mha/io/tensor_source.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::io {

namespace detail {

/// Reads tensors under a prefix, and knows which were read.
template <typename Scalar>
class StateDictReader {
 public:
  StateDictReader(const TensorSource& source, std::string prefix, RotaryBuffers buffers)
      : source_(source), prefix_(std::move(prefix)), buffers_(buffers) {
    const auto& entries = source_.entries();
    const auto first = entries.lower_bound(prefix_);
    const bool is_there = first != entries.end() && first->first.starts_with(prefix_);
    const std::string prefix_without = without_wrappers(prefix_);
    // The name behind the prefix, wrappers or not.
    const auto behind = [&](const std::string& name) -> std::optional<std::string> {
      if (is_there)
        return name.starts_with(prefix_)
                   ? std::optional(without_wrappers(std::string_view(name).substr(prefix_.size())))
                   : std::nullopt;
      const std::string without = without_wrappers(name);
      return without.starts_with(prefix_without)
                 ? std::optional(without.substr(prefix_without.size()))
                 : std::nullopt;
    };
    for (const Stored& stored : entries)
      if (const auto name = behind(stored.first)) {
        under_prefix_.push_back(&stored);
        const auto [other, is_new] = names_.emplace(*name, &stored);
        if (!is_new && stored.first == prefix_ + *name) other->second = &stored;
      }
    // A weight that is another one, too, stands in the file once: metadata names the other one.
    for (const auto& [tied, name] : source_.metadata())
      if (const auto behind_prefix = behind(tied))
        if (const auto other = entries.find(name); other != entries.end())
          names_.emplace(*behind_prefix, &*other);
  }

  /// A weight that the configuration has if `used`.
  void tensor(bool used, const std::string& name, RowMatrix<Scalar>& matrix, Index rows,
              Index cols) {
    if (!used) return;
    const Stored& stored = required(name, {{rows, cols}});
    matrix.resize(rows, cols);
    read(stored, {matrix.data(), static_cast<std::size_t>(matrix.size())});
  }

  void tensor(bool used, const std::string& name, Vector<Scalar>& vector, Index size) {
    if (!used) return;
    const Stored& stored = required(name, {{size}});
    vector.resize(size);
    read(stored, {vector.data(), static_cast<std::size_t>(size)});
  }

  /// A tensor without dimensions, or as older versions of PyTorch wrote it, `[1]`.
  void tensor(bool used, const std::string& name, Single<Scalar>& number) {
    if (!used) return;
    const auto found = names_.find(name);
    const bool listed =
        found != names_.end() && found->second->second.shape == std::vector<Index>{1};
    read(required(name, std::vector<Index>(listed ? 1 : 0, 1)), {number.data(), 1});
  }

  bool has(const std::string& name) const { return names_.contains(name); }

  /// Checks a tensor that read_into() reads when there is memory for it.
  void check_tensor(const std::string& name, const std::vector<Index>& shape) {
    required(name, shape);
  }
  /// \param out as many elements as `shape` says
  void read_into(const std::string& name, const std::vector<Index>& shape, std::span<Scalar> out) {
    read(required(name, shape), out);
  }

  /// A tensor that may be there, and is no weight.
  void ignore(const std::string& name) {
    if (const auto found = names_.find(name); found != names_.end()) read_.insert(found->second);
  }

  /// Projections of the same input, in one tensor or one each.
  /// \param rows of each, with `cols` columns
  void stacked(const std::string& name, const std::array<std::string, 3>& parts,
               RowMatrix<Scalar>& matrix, const std::array<Index, 3>& rows, Index cols) {
    if (!apart(name, parts))
      return tensor(true, name, matrix, std::accumulate(rows.begin(), rows.end(), Index{0}), cols);
    std::array<const Stored*, 3> stored{};
    for (std::size_t i = 0; i < parts.size(); ++i)
      stored[i] = &required(parts[i], {{rows[i], cols}});
    matrix.resize(std::accumulate(rows.begin(), rows.end(), Index{0}), cols);
    read_each(stored, {rows[0] * cols, rows[1] * cols, rows[2] * cols}, matrix.data());
  }

  /// Their biases, in the same way.
  void stacked(bool used, const std::string& name, const std::array<std::string, 3>& parts,
               Vector<Scalar>& vector, const std::array<Index, 3>& sizes) {
    if (!used) return;
    if (!apart(name, parts))
      return tensor(true, name, vector, std::accumulate(sizes.begin(), sizes.end(), Index{0}));
    std::array<const Stored*, 3> stored{};
    for (std::size_t i = 0; i < parts.size(); ++i) stored[i] = &required(parts[i], {sizes[i]});
    vector.resize(std::accumulate(sizes.begin(), sizes.end(), Index{0}));
    read_each(stored, sizes, vector.data());
  }

  /// `branch.` where the module of a layer stands in a residual connection of its own.
  std::string branch(const std::string& layer) const {
    const auto first = names_.lower_bound(layer + "branch.");
    return first != names_.end() && first->first.starts_with(layer + "branch.") ? "branch." : "";
  }

  /// Rows of a matrix whose size nothing else says, at least 1.
  Index rows(const std::string& name) const {
    const auto found = names_.find(name);
    if (found == names_.end()) fail_missing(name, "expected a matrix");
    const auto& [full_name, stored] = *found->second;
    if (stored.shape.size() != 2 || stored.shape[0] < 1)
      throw SafetensorsError(stored.file, full_name, stored.offset,
                             "expected a matrix of at least one row, got " + to_string(stored));
    return stored.shape[0];
  }

  /// The first name behind the prefix that ends so; empty if none does.
  std::string first_name(std::string_view end) const {
    const auto found =
        std::ranges::find_if(names_, [&](const auto& named) { return named.first.ends_with(end); });
    return found == names_.end() ? "" : found->first;
  }

  /// The weights of layer `i` of `count`.
  template <typename Layer>
  Layer& layer(std::vector<Layer>& layers, Index /*i*/, Index /*count*/) {
    return layers.emplace_back();
  }

  /// A set of weights that the configuration has if `used`.
  template <typename Parameters>
  Parameters* optional(bool used, const std::string& /*name*/, std::optional<Parameters>& set) {
    return used ? &set.emplace() : nullptr;
  }

  /// The buffers of the rotary embedding, which may be there or not.
  void rotary_buffers(const std::string& prefix, Index dim_head, const RotaryConfig& rotary) {
    rotary_buffer(prefix + "inv_freq", rotary_frequencies(dim_head, rotary));
    rotary_buffer(prefix + "scale", xpos_scales(rotary.rotary_dim.value_or(dim_head)));
  }

  /// \throws SafetensorsError if a tensor under the prefix was not read
  void reject_unexpected() const {
    for (const Stored* named : under_prefix_) {
      const auto& [name, stored] = *named;
      if (read_.contains(named) || (prefix_.empty() && is_of_case(name))) continue;
      throw SafetensorsError(stored.file, name, stored.offset,
                             "expected no such tensor for this configuration, got " +
                                 to_string(stored) + std::string(remedy(name)));
    }
  }

 private:
  using Stored = std::pair<const std::string, TensorEntry>;

  bool apart(const std::string& name, const std::array<std::string, 3>& parts) const {
    return !has(name) && (has(parts[0]) || has(parts[1]) || has(parts[2]));
  }

  // One tensor after the other.
  void read_each(const std::array<const Stored*, 3>& stored, const std::array<Index, 3>& sizes,
                 Scalar* to) const {
    for (std::size_t i = 0; i < stored.size(); to += sizes[i++])
      read(*stored[i], {to, static_cast<std::size_t>(sizes[i])});
  }

  // Inputs, outputs and gradients may stand beside a state dict that has no prefix.
  static bool is_of_case(const std::string& name) {
    return name.starts_with("input/") || name.starts_with("output/") || name.starts_with("grad/");
  }

  static std::string expected(const std::vector<Index>& shape) {
    const TensorEntry wanted{.shape = shape};
    return "expected F64, F32, F16 or BF16" +
           to_string(wanted).substr(name_of(wanted.dtype).size());
  }

  const Stored& required(const std::string& name, const std::vector<Index>& shape) {
    const auto found = names_.find(name);
    if (found == names_.end()) fail_missing(name, expected(shape));
    const auto& [full_name, stored] = *found->second;
    if (!is_float(stored.dtype) || stored.shape != shape)
      throw SafetensorsError(stored.file, full_name, stored.offset,
                             expected(shape) + ", got " + to_string(stored));
    read_.insert(found->second);
    return *found->second;
  }

  [[noreturn]] void fail_missing(const std::string& name, const std::string& expectation) const {
    throw SafetensorsError(
        source_.file_name(), prefix_ + name,
        expectation + ", got no such tensor" + source_.where(prefix_ + name) + similar(name));
  }

  // A hint for a wrong prefix, or for names that another tool has made.
  std::string similar(const std::string& name) const {
    for (const auto& named : source_.entries()) {
      const std::string without = without_wrappers(named.first);
      if (without.ends_with(name) && !is_of_case(named.first))
        return ", but '" + printable(named.first) + "' (is the prefix '" +
               printable(without.substr(0, without.size() - name.size())) +
               "'? The loader takes it)";
    }
    for (const Stored* named : under_prefix_)
      if (const std::string_view text = remedy(named->first);
          !text.empty() && !is_of_connection(named->first))
        return ", but '" + printable(named->first) + "'" + std::string(text);
    for (const auto& named : source_.entries()) {
      const std::string without = without_wrappers(named.first);
      if (const std::string_view part = part_more(without, prefix_ + name); !part.empty())
        return ", but '" + printable(named.first) + "' (is '" + printable(std::string(part)) +
               "' of a wrapper? Save the module inside of it, or give a StateDict with names "
               "without it)";
    }
    return "";
  }

  void read(const Stored& stored, std::span<Scalar> out) const {
    if constexpr (ReadableScalar<Scalar>) {
      source_.read_into<Scalar>(stored.first, out);
    } else {
      const std::vector<double> values = source_.read<double>(stored.first);
      std::transform(values.begin(), values.end(), out.begin(),
                     [](double value) { return Scalar(value); });
    }
  }

  // The Python package computes buffers in float, and then with what is left of them in the dtype
  // that they are converted to: however they are stored, one rule.
  void rotary_buffer(const std::string& name, const Vector<double>& expected) {
    if (!has(name)) return;
    const auto& [full_name, stored] = required(name, {expected.size()});
    if (buffers_ == RotaryBuffers::ignore) return;
    constexpr double tolerance = 16 * static_cast<double>(std::numeric_limits<float>::epsilon());
    const std::vector<double> values = source_.read<double>(full_name);
    for (std::size_t m = 0; m < values.size(); ++m) {
      const double wanted = expected[static_cast<Index>(m)];
      if (!(std::abs(values[m] - wanted) <= tolerance * std::abs(wanted)))
        throw SafetensorsError(
            stored.file, full_name, stored.offset + m * size_of(stored.dtype),
            "expected " + nlohmann::json(wanted).dump() + " at " + std::to_string(m) + ", got " +
                nlohmann::json(values[m]).dump() +
                "; this library computes with the former, Python with the latter: store it "
                "unrounded, leave it out, or load with RotaryBuffers::ignore");
    }
  }

  TensorSource source_;
  std::string prefix_;
  RotaryBuffers buffers_;
  std::vector<const Stored*> under_prefix_;
  std::map<std::string, const Stored*, std::less<>> names_;  // without prefix and wrappers
  std::set<const Stored*> read_;
};

}  // namespace detail
}  // namespace local_mha::inline LOCAL_MHA_ABI::io
