// SPDX-License-Identifier: MIT
/// \file
/// What becomes of scores, as the kernels take it: a function of a few Lanes at a time.
///
/// Whatever is computed of a score is compiled for itself, not with each kernel: they call it once
/// for each micro-kernel's scores while these are in registers' reach, which costs them nothing,
/// and a file pays for the functions that it names.
#pragma once

#include <limits>
#include <type_traits>

#include <local_mha/attention/log_sum_exp.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/types.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// Where the scores of a Lanes stand.
template <typename Scalar>
struct ScorePlace {
  Index head = 0;
  /// Rows of the first lane's query and key.
  Index query = 0;
  Index key = 0;
  /// Lanes are keys, of one query; otherwise queries, of one key.
  bool lanes_are_keys = false;

  Index query_of(Index lane) const { return lanes_are_keys ? query : query + lane; }
  Index key_of(Index lane) const { return lanes_are_keys ? key + lane : key; }

  /// `i − j`, exact up to the integers that a Scalar holds.
  Lanes<Scalar> distance() const {
    using L = Lanes<Scalar>;
    const L first = L::broadcast(Scalar(static_cast<double>(query - key)));
    const L lane = lane_numbers();
    return lanes_are_keys ? first - lane : first + lane;
  }

 private:
  static Lanes<Scalar> lane_numbers() {
    using L = Lanes<Scalar>;
    if constexpr (L::vectorized) {
      struct Numbers {
        alignas(64) Scalar of_lane[L::count];
        constexpr Numbers() : of_lane{} {
          for (int i = 0; i < L::count; ++i) of_lane[i] = static_cast<Scalar>(i);
        }
      };
      static constexpr Numbers numbers;
      return L::load(numbers.of_lane);
    } else {
      return L::make([](int i) { return typename L::Value(i); });
    }
  }
};

/// A function of scores, of any type. What it calls must outlive it.
template <typename Scalar>
class ScoreFunction {
  using L = Lanes<Scalar>;

 public:
  /// None: scores stay.
  ScoreFunction() = default;
  /// \tparam Differentiable it has a derivative, which derivatives() gives
  /// \param functor with `L value(L score, ScorePlace)` and, if it is differentiable,
  ///        `L derivative(L score, ScorePlace)`, of scores in natural units
  template <bool Differentiable, typename Functor>
  static ScoreFunction of(const Functor& functor) {
    ScoreFunction function;
    function.functor_ = &functor;
    function.values_ = [](const void* f, ScorePlace<Scalar> place, Index number, Scalar* scores) {
      Held<Functor> held = *static_cast<const Functor*>(f);
      return for_each(place, number, scores,
                      [&](const L& score, const ScorePlace<Scalar>& at, Index) {
                        return held.value(score, at);
                      });
    };
    if constexpr (Differentiable)
      function.derivatives_ = [](const void* f, ScorePlace<Scalar> place, Index number,
                                 Scalar* scores, Scalar* derivatives) {
        Held<Functor> held = *static_cast<const Functor*>(f);
        for_each(place, number, scores, [&](const L& score, const ScorePlace<Scalar>& at, Index i) {
          held.derivative(score, at).store(derivatives + i * L::count);
          return held.value(score, at);
        });
      };
    return function;
  }

  explicit operator bool() const { return functor_ != nullptr; }

  /// Replaces `number` Lanes of scores in units of log 2, those of adjoining keys or blocks of
  /// keys.
  /// \return their maximum
  L apply(const ScorePlace<Scalar>& place, Index number, Scalar* scores) const {
    return values_(functor_, place, number, scores);
  }
  /// The same, and gives their derivatives.
  void apply(const ScorePlace<Scalar>& place, Index number, Scalar* scores,
             Scalar* derivatives) const {
    derivatives_(functor_, place, number, scores, derivatives);
  }

 private:
  // A small functor as a copy, which nothing that is written can change, so that what depends on it
  // alone is computed once for all scores.
  template <typename Functor>
  using Held = std::conditional_t<std::is_trivially_copyable_v<Functor> && sizeof(Functor) <= 64,
                                  const Functor, const Functor&>;

  template <typename Value>
  static LOCAL_MHA_INLINE L for_each(ScorePlace<Scalar> place, Index number, Scalar* scores,
                                     Value&& value) {
    L largest = L::broadcast(Scalar(-std::numeric_limits<double>::infinity()));
    for (Index i = 0; i < number; ++i, scores += L::count) {
      const L score = Scalar(log2_e) * value(Scalar(ln_2) * L::load(scores), place, i);
      score.store(scores);
      largest = (max)(largest, score);
      place.key += place.lanes_are_keys ? L::count : 1;
    }
    return largest;
  }

  const void* functor_ = nullptr;
  L (*values_)(const void*, ScorePlace<Scalar>, Index, Scalar*) = nullptr;
  void (*derivatives_)(const void*, ScorePlace<Scalar>, Index, Scalar*, Scalar*) = nullptr;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
