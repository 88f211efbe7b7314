// SPDX-License-Identifier: MIT
/// \file
/// The logarithm of a softmax' denominator, between the forward and the backward pass.
///
/// Kernels count in powers of 2, what is kept is a natural logarithm. Where scores are large, it
/// is, and what rounds at its size costs the probabilities as many digits: here its base changes in
/// a wider type, and it is kept in two parts.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include <local_mha/core/lanes.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

inline constexpr double log2_e = 1.44269504088896340736;
inline constexpr double ln_2 = 0.69314718055994530942;

namespace detail {

/// Wider than Scalar, if there is such a type.
template <typename Scalar>
using Wider = std::conditional_t<
    std::is_same_v<Scalar, Eigen::half> || std::is_same_v<Scalar, Eigen::bfloat16>, float,
    std::conditional_t<std::is_same_v<Scalar, float>, double,
                       std::conditional_t<std::is_same_v<Scalar, double>, long double, Scalar>>>;

}  // namespace detail

/// A logarithm, and what it rounds off: scores of 1e4 leave its float three digits, and those of a
/// probability are in what is left.
template <typename Scalar>
struct LogSumExp {
  Scalar nearest;
  Scalar rest;
};

namespace detail {

template <typename Scalar>
LogSumExp<Scalar> in_two_parts(const Wider<Scalar>& all) {
  const auto nearest = static_cast<Scalar>(all);
  return {nearest, static_cast<Scalar>(all - Wider<Scalar>(nearest))};
}

}  // namespace detail

/// `log(2^maximum · sum)`; −∞ if `sum` is 0.
template <typename Scalar>
LogSumExp<Scalar> natural_log_sum_exp(const Scalar& maximum, const Scalar& sum) {
  using std::log;
  using Wide = detail::Wider<Scalar>;
  if (sum == Scalar(0)) return {Scalar(-std::numeric_limits<double>::infinity()), Scalar(0)};
  if constexpr (std::is_same_v<Wide, Scalar>)
    return {Scalar(ln_2) * maximum + log(sum), Scalar(0)};
  else
    return detail::in_two_parts<Scalar>(Wide(0.693147180559945309417232121458L) * Wide(maximum) +
                                        Wide(log(sum)));
}

/// The same divided by `log(2)`; +∞ for −∞, so that a query that saw nothing has probabilities of
/// 2^−∞.
template <typename Scalar>
LogSumExp<Scalar> binary_log_sum_exp(const LogSumExp<Scalar>& lse) {
  using Wide = detail::Wider<Scalar>;
  if (lse.nearest < Scalar(-Eigen::NumTraits<Scalar>::highest()))
    return {Scalar(std::numeric_limits<double>::infinity()), Scalar(0)};
  if constexpr (std::is_same_v<Wide, Scalar>)
    return {Scalar(log2_e) * lse.nearest, Scalar(0)};
  else
    return detail::in_two_parts<Scalar>(Wide(1.44269504088896340735992468100L) *
                                        (Wide(lse.nearest) + Wide(lse.rest)));
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
