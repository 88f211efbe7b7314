// SPDX-License-Identifier: MIT
/// \file
/// Sums: of which type, and in which order.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include <local_mha/core/lanes.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// The type of sums whose length nothing bounds, over positions, classes or weights: double for
/// what is narrower, because a sum of a million equal numbers in float has lost three digits, and
/// of ten million stands still. What is added for each position of a block alone (a norm, a score)
/// is a Scalar.
template <typename Scalar>
using LongSum =
    std::conditional_t<std::is_same_v<Scalar, float> || std::is_same_v<Scalar, Eigen::half> ||
                           std::is_same_v<Scalar, Eigen::bfloat16>,
                       double, Scalar>;

namespace detail {

/// `add(x, sum)` of each channel of a block, one after the other, from 0 on.
/// \param block `[channels][block_rows]`, from the lanes on that are summed
template <int Parts = 1, typename Scalar, typename Add>
LOCAL_MHA_INLINE Lanes<Scalar, Parts> sum_channels(Index channels, const Scalar* block, Add&& add) {
  using L = Lanes<Scalar, Parts>;
  constexpr Index stride = Lanes<Scalar>::count;
  // Four sums, because one would wait for its own additions.
  L partial[4] = {L::zero(), L::zero(), L::zero(), L::zero()};
  Index c = 0;
  for (; c + 4 <= channels; c += 4) {
    LOCAL_MHA_UNROLL for (int i = 0; i < 4; ++i) partial[i] =
        add(L::load(block + (c + i) * stride), partial[i]);
  }
  for (; c < channels; ++c) partial[0] = add(L::load(block + c * stride), partial[0]);
  return (partial[0] + partial[1]) + (partial[2] + partial[3]);
}

/// `Σ_c f(x_c)²` of each position of a block.
template <int Parts = 1, typename Scalar, typename Function>
LOCAL_MHA_INLINE Lanes<Scalar, Parts> sum_squares(Index channels, const Scalar* block,
                                                  Function&& f) {
  using L = Lanes<Scalar, Parts>;
  return sum_channels<Parts>(channels, block, [&](const L& x, const L& sum) {
    const L value = f(x);
    return fma(value, value, sum);
  });
}

/// `Σ_c a_c · b_c` of each position of two blocks.
/// \param a, b `[channels][block_rows]`
template <typename Scalar>
LOCAL_MHA_INLINE Lanes<Scalar> dot(Index channels, const Scalar* a, const Scalar* b) {
  using L = Lanes<Scalar>;
  L partial[4] = {L::zero(), L::zero(), L::zero(), L::zero()};
  Index c = 0;
  for (; c + 4 <= channels; c += 4) {
    LOCAL_MHA_UNROLL for (int i = 0; i < 4; ++i) partial[i] =
        fma(L::load(a + (c + i) * L::count), L::load(b + (c + i) * L::count), partial[i]);
  }
  for (; c < channels; ++c)
    partial[0] = fma(L::load(a + c * L::count), L::load(b + c * L::count), partial[0]);
  return (partial[0] + partial[1]) + (partial[2] + partial[3]);
}

/// `√bounded(factor · Σ_c f(x_c)²)` of each position of a block. Squares may leave the scalar's
/// range, as those of numbers beyond 1e19 do in float: then the bound from below does not count.
/// \param bounded makes Lanes larger where they are small
template <int Parts = 1, typename Scalar, typename Bounded, typename Function>
LOCAL_MHA_INLINE Lanes<Scalar, Parts> root_of_squares(Index channels, const Scalar* block,
                                                      const Scalar& factor, Bounded&& bounded,
                                                      Function&& f) {
  using L = Lanes<Scalar, Parts>;
  const L root = sqrt(bounded(factor * sum_squares<Parts>(channels, block, f)));
  alignas(64) Scalar values[L::count];
  root.store(values);
  if (all_finite<Parts>(values, L::count)) return root;
  // Powers of two: of such numbers no square is too large, and none that counts too small.
  const int exponent = (std::min)(std::numeric_limits<Scalar>::max_exponent * 5 / 8, 1000);
  const Scalar up = Scalar(std::ldexp(1.0, exponent));
  const Scalar down = Scalar(std::ldexp(1.0, -exponent));
  const L scaled =
      sqrt(factor * sum_squares<Parts>(channels, block, [&](const L& x) { return down * f(x); }));
  const L largest = L::broadcast(Scalar(Eigen::NumTraits<Scalar>::highest()));
  return select_negative(root - largest, root, up * scaled);
}

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
