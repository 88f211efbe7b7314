// SPDX-License-Identifier: MIT
/// \file
/// Sizes, rules, numbers and masks that are not kind.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <local_mha/core/lanes.hpp>

#include "reference/array.hpp"
#include "soak/bounded_reference.hpp"
#include "support/library.hpp"
#include "support/random.hpp"

namespace soak {

using local_mha::Index;
using reference::Array;
using reference::Int;

/// 10^x, x uniform.
inline double power(Random& random, double low, double high) {
  return std::pow(10.0, random.uniform(low, high));
}

/// Lengths of 0 and 1, around whole blocks, and off every grid.
template <typename Scalar>
Index draw_length(Random& random) {
  constexpr Index lanes = local_mha::Lanes<Scalar>::count;
  const double kind = random.uniform();
  if (kind < 0.04) return random.integer(0, 2);
  if (kind < 0.45)
    return std::max<Index>(0, lanes * random.integer(1, 4) + random.pick({-1, 0, 1, 1, 2}));
  if (kind < 0.95) return random.integer(1, 60);
  return random.integer(60, 150);
}

/// From 1 to far beyond the sequence.
inline Index draw_window(Random& random, Index n) {
  const double kind = random.uniform();
  if (kind < 0.1) return 1;
  if (kind < 0.7) return random.integer(1, 20);
  if (kind < 0.85) return random.pick<Index>({7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 64});
  if (kind < 0.95) return random.integer(1, 2 * n + 1);
  return random.pick<Index>({100, 1000});
}

/// What LocalAttention, LocalMHA and LocalTransformer configurations have in common.
template <typename Config>
void draw_rules(Random& random, Config& config) {
  config.causal = random.chance(0.45);
  config.exact_windowsize = random.chance(0.5);
  config.look_backward = random.pick<Index>({0, 1, 1, 1, 1, 2, 3, 5});
  if (config.causal) {
    if (random.chance(0.3)) config.look_forward = 0;
  } else if (random.chance(0.7)) {
    config.look_forward = random.pick<Index>({0, 1, 1, 2, 3});
  }
}

/// A base, or none for the default. Where a key can lie further ahead than rotary's shift makes up
/// for, xPos grows with distance; the base then keeps it from leaving a float's range.
/// \param ahead so many positions further
template <typename Config>
void draw_xpos(Random& random, Config& config, Index ahead, double default_base) {
  const double least = std::max(LOCAL_MHA_LANE_BYTES / 128.0, static_cast<double>(ahead) / 3);
  config.use_xpos = true;
  if (default_base < least || random.chance(0.6))
    config.xpos_scale_base = std::max(least, random.pick({0.5, 1.0, 3.0, 7.5, 16.0, 64.0}));
}

template <typename Scalar>
double round_to(double number) {
  return static_cast<double>(static_cast<Scalar>(number));
}

/// Numbers of about `size`, that a Scalar holds: normal, of one sign, equal in each row or all,
/// with rows of very different sizes, with zeros, or with denormals among them.
template <typename Scalar>
Array<double> draw_numbers(Random& random, std::vector<Int> shape, double size) {
  Array<double> numbers(std::move(shape));
  const auto channels = static_cast<std::size_t>(std::max<Int>(1, numbers.shape.back()));
  const int kind = static_cast<int>(random.integer(0, 16));
  const double spread = random.pick({0.5, 2.0, 4.0});
  std::vector<double> common(channels);
  for (double& number : common) number = random.normal();
  double of_row = 1;
  for (std::size_t i = 0; i < numbers.data.size(); ++i) {
    if (i % channels == 0) of_row = kind == 7 ? power(random, -spread, spread / 2) : 1;
    double number = 0;
    if (kind == 5)
      number = 0.5 + random.uniform();
    else if (kind == 6)
      number = random.chance(0.8) ? common[i % channels] : random.normal();
    else if (kind == 8)
      number = common[0];
    else if (kind == 9)
      number = random.chance(0.5) ? 0 : random.normal();
    else if (kind == 10 && random.chance(0.05))
      number = static_cast<double>(std::numeric_limits<Scalar>::denorm_min()) *
               static_cast<double>(random.integer(0, 1000)) / size;
    else
      number = random.normal();
    numbers.data[i] = round_to<Scalar>(number * of_row * size);
  }
  return numbers;
}

/// Makes every row of `rows` the first one, but for some; and those of `others` a multiple of it,
/// so that their products are equal and, all of one sign, large.
template <typename Scalar>
void align(Random& random, Array<double>& rows, Array<double>& others, double ratio) {
  const auto channels = static_cast<std::size_t>(std::max<Int>(1, rows.shape.back()));
  const double kept = random.pick({0.0, 0.0, 0.1});
  for (std::size_t i = 0; i < rows.data.size(); ++i) {
    if (i % channels == 0 && i > 0 && random.chance(kept)) i += channels;
    if (i < rows.data.size()) rows.data[i] = rows.data[i % channels];
  }
  for (std::size_t i = 0; i < others.data.size(); ++i)
    others.data[i] = round_to<Scalar>(rows.data[i % channels] * ratio);
}

/// `[B, N]` flags: none, random, by length, all of a sequence, or all.
inline std::vector<unsigned char> draw_mask(Random& random, Index batch, Index n) {
  std::vector<unsigned char> masked;
  if (random.chance(0.55)) return masked;
  masked.assign(static_cast<std::size_t>(batch * n), 0);
  const double share = random.pick({0.05, 0.2, 0.3, 0.3, 0.9});
  const int kind = static_cast<int>(random.integer(0, 9));
  for (Index b = 0; b < batch; ++b) {
    const Index length = random.integer(n / 2, n);
    const bool all = kind == 9 && random.chance(0.5);
    for (Index i = 0; i < n; ++i)
      masked[static_cast<std::size_t>(b * n + i)] = all || (kind < 3 && i >= length) ||
                                                    (kind == 3 && i < n - length) ||
                                                    (kind >= 4 && kind < 9 && random.chance(share));
  }
  return masked;
}

/// A number that must not get to where it is not seen.
inline double draw_poison(Random& random) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  return random.pick({std::numeric_limits<double>::quiet_NaN(), infinity, -infinity});
}

/// Of any size, far from 0, and with entries that hide.
template <typename Scalar>
Array<double> draw_bias(Random& random, std::vector<Int> shape) {
  const double size = random.pick({0.1, 1.0, 3.0});
  const double far = random.pick({0.0, 0.0, 0.0, 88.75, -200.0, 1e3, 1e4, -1e6});
  Array<double> bias = draw_numbers<Scalar>(random, std::move(shape), size);
  const double hidden = random.pick({0.0, 0.0, 0.05, 0.5});
  for (double& entry : bias.data) {
    entry = round_to<Scalar>(entry + far);
    if (hidden > 0 && random.chance(hidden))
      entry = random.chance(0.5) ? -static_cast<double>(std::numeric_limits<Scalar>::max())
                                 : -std::numeric_limits<double>::infinity();
  }
  return bias;
}

/// For the line of a case.
inline std::string describe_bias(const Array<double>& bias, const char* name = " bias ") {
  if (bias.empty()) return "";
  const auto [least, most] = std::minmax_element(bias.data.begin(), bias.data.end());
  std::ostringstream text;
  text << name << bias.shape[0] << " x [" << *least << ", " << *most << "]";
  return text.str();
}

/// The same numbers, known exactly.
template <typename Scalar>
Array<Bounded<Scalar>> exact(const Array<double>& numbers) {
  Array<Bounded<Scalar>> to;
  to.shape = numbers.shape;
  to.data.reserve(numbers.data.size());
  for (const double number : numbers.data)
    to.data.push_back({number, std::isfinite(number) ? 0.0 : Bounded<Scalar>::nothing_known});
  return to;
}

}  // namespace soak
