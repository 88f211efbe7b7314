// SPDX-License-Identifier: MIT
/// \file
/// The arrays of the reference: a shape and a std::vector, nothing from the library or from Eigen.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace reference {

using Int = long long;

/// A row-major array of any rank.
template <typename Real>
struct Array {
  std::vector<Int> shape;
  std::vector<Real> data;

  Array() = default;
  explicit Array(std::vector<Int> extents, Real fill = Real(0)) : shape(std::move(extents)) {
    std::size_t size = 1;
    for (const Int extent : shape) size *= static_cast<std::size_t>(extent);
    data.assign(size, fill);
  }

  bool empty() const { return data.empty(); }

  template <typename... Indices>
  std::size_t offset(Indices... indices) const {
    std::size_t flat = 0;
    std::size_t axis = 0;
    ((flat = flat * static_cast<std::size_t>(shape[axis++]) + static_cast<std::size_t>(indices)),
     ...);
    return flat;
  }
  template <typename... Indices>
  Real& operator()(Indices... indices) {
    return data[offset(indices...)];
  }
  template <typename... Indices>
  const Real& operator()(Indices... indices) const {
    return data[offset(indices...)];
  }
};

/// The same numbers in another precision.
template <typename To, typename From>
Array<To> cast(const Array<From>& from) {
  Array<To> to;
  to.shape = from.shape;
  for (const From& number : from.data) to.data.push_back(static_cast<To>(number));
  return to;
}

/// Weights by the names of the Python state dict.
template <typename Real>
using Parameters = std::map<std::string, Array<Real>>;

template <typename To, typename From>
Parameters<To> cast(const Parameters<From>& from) {
  Parameters<To> to;
  for (const auto& [name, array] : from) to[name] = cast<To>(array);
  return to;
}

}  // namespace reference
