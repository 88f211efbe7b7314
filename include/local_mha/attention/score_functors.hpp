// SPDX-License-Identifier: MIT
/// \file
/// Functions of scores: the ready-made ones, and your own.
///
///     auto square = [](float s, Index h, Index i, Index j) { return s * s; };
///     LocalAttention<float, decltype(square)> attention(config, square);   // forward() alone
///
///     auto both = with_derivative(square, [](float s, Index, Index, Index) { return 2 * s; });
///     LocalAttention<float, decltype(both)> trained(config, both);
///
/// A functor takes the scaled score of query `i` and key `j`, rows of the sequence, in head `h`,
/// and must give the same for the same; the bias is added to what it gives. What it gives for
/// scores of pairs that are not seen, of which it is asked, too, has no effect. A plain one is
/// called score by score; one that takes
///
///     Lanes<Scalar> operator()(const Lanes<Scalar>& s, const ScorePlace<Scalar>& at) const
///
/// is called for many at a time. Where products are of bfloat16, it must leave AMX's tiles alone,
/// and so must what it calls.
#pragma once

#include <concepts>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/attention/score_function.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/block.hpp>
#include <local_mha/core/error.hpp>
#include <local_mha/core/tanh.hpp>
#include <local_mha/core/types.hpp>

LOCAL_MHA_INT_BOUNDS_BEGIN

namespace local_mha::inline LOCAL_MHA_ABI {

/// What LocalAttentionConfig::score says, at run time.
struct ConfiguredScore {};

/// `cap · tanh(s / cap)`, `cap > 0`.
struct SoftCap {
  /// The bound, above 0.
  double cap = 1;

  /// The score of the keys of a packet.
  template <typename Scalar>
  Lanes<Scalar> operator()(const Lanes<Scalar>& s, const ScorePlace<Scalar>&) const {
    return Scalar(cap) * tanh(Scalar(1 / cap) * s);
  }
  /// The derivative of that by the score.
  template <typename Scalar>
  Lanes<Scalar> derivative(const Lanes<Scalar>& s, const ScorePlace<Scalar>&) const {
    const Lanes<Scalar> t = tanh(Scalar(1 / cap) * s);
    return Lanes<Scalar>::broadcast(Scalar(1)) - t * t;
  }
};

/// ALiBi: `s − slopes[h] · |i − j|` (O. Press et al., "Train Short, Test Long", 2022).
struct ALiBi {
  /// `[heads]`
  std::vector<double> slopes;

  /// The score of the keys of a packet.
  template <typename Scalar>
  Lanes<Scalar> operator()(const Lanes<Scalar>& s, const ScorePlace<Scalar>& at) const {
    using L = Lanes<Scalar>;
    const L distance = at.distance();
    const L length = (max)(distance, L::zero() - distance);
    return fma(Scalar(-slopes[static_cast<std::size_t>(at.head)]), length, s);
  }
  /// The derivative of that by the score, 1.
  template <typename Scalar>
  Lanes<Scalar> derivative(const Lanes<Scalar>&, const ScorePlace<Scalar>&) const {
    return Lanes<Scalar>::broadcast(Scalar(1));
  }
};

/// A functor and its derivative by the score, each of either form.
template <typename Value, typename Derivative>
struct ScoreWithDerivative {
  /// The score.
  Value value;
  /// Its derivative.
  Derivative slope;

  /// The score of the keys of a packet.
  template <typename... Arguments>
    requires std::invocable<const Value&, const Arguments&...>
  auto operator()(const Arguments&... arguments) const {
    return value(arguments...);
  }
  /// The derivative of that by the score.
  template <typename... Arguments>
    requires std::invocable<const Derivative&, const Arguments&...>
  auto derivative(const Arguments&... arguments) const {
    return slope(arguments...);
  }
};
/// A functor of a score and its derivative, for the backward pass.
template <typename Value, typename Derivative>
ScoreWithDerivative<Value, Derivative> with_derivative(Value value, Derivative derivative) {
  return {std::move(value), std::move(derivative)};
}

namespace detail {

/// A functor of either form as ScoreFunction takes it.
template <typename Scalar, typename Functor>
struct LanesScore {
  using L = Lanes<Scalar>;
  using Place = ScorePlace<Scalar>;
  static constexpr bool takes_lanes = std::is_invocable_r_v<L, const Functor&, const L&, Place>;
  static constexpr bool takes_scalars =
      std::is_invocable_r_v<Scalar, const Functor&, const Scalar&, Index, Index, Index>;
  static_assert(takes_lanes || takes_scalars,
                "a score functor takes (Scalar s, Index h, Index i, Index j), or "
                "(Lanes<Scalar> s, ScorePlace<Scalar> at)");
  static constexpr bool derives_lanes = requires(const Functor& f, const L& s, const Place& at) {
    { f.derivative(s, at) } -> std::convertible_to<L>;
  };
  static constexpr bool derives_scalars = requires(const Functor& f, const Scalar& s, Index i) {
    { f.derivative(s, i, i, i) } -> std::convertible_to<Scalar>;
  };
  static constexpr bool differentiable = derives_lanes || derives_scalars;

  LOCAL_MHA_INLINE L value(const L& s, const Place& at) const {
    if constexpr (takes_lanes)
      return functor(s, at);
    else
      return one_by_one(s, at, functor);
  }
  LOCAL_MHA_INLINE L derivative(const L& s, const Place& at) const {
    if constexpr (derives_lanes)
      return functor.derivative(s, at);
    else
      return one_by_one(s, at, [&](const Scalar& score, Index h, Index i, Index j) {
        return functor.derivative(score, h, i, j);
      });
  }

  template <typename Function>
  static L one_by_one(const L& s, const Place& at, const Function& function) {
    alignas(64) Scalar scores[L::count];
    s.store(scores);
    for (Index lane = 0; lane < L::count; ++lane)
      scores[lane] = function(scores[lane], at.head, at.query_of(lane), at.key_of(lane));
    return L::load(scores);
  }

  Functor functor;
};

/// The functor of an attention.
template <typename Scalar, typename Score>
class HeldScore {
 public:
  static constexpr bool differentiable = LanesScore<Scalar, Score>::differentiable;

  HeldScore(const LocalAttentionConfig& config, const Score& score) : score_{score} {
    if (config.score != ScoreConfig())
      reject("score", "none, because the attention has a functor of its own", "one");
  }
  ScoreFunction<Scalar> function() const {
    return ScoreFunction<Scalar>::template of<differentiable>(score_);
  }
  void check_heads(Index /*heads*/) const {}

 private:
  LanesScore<Scalar, Score> score_;
};

template <typename Scalar>
class HeldScore<Scalar, ConfiguredScore> {
 public:
  static constexpr bool differentiable = true;

  HeldScore(const LocalAttentionConfig& config, ConfiguredScore)
      : has_soft_cap_(config.score.soft_cap.has_value()),
        soft_cap_{{config.score.soft_cap.value_or(1)}},
        alibi_{{config.score.alibi_slopes}} {}
  ScoreFunction<Scalar> function() const {
    if (has_soft_cap_) return ScoreFunction<Scalar>::template of<true>(soft_cap_);
    if (!slopes().empty()) return ScoreFunction<Scalar>::template of<true>(alibi_);
    return {};
  }
  /// \throws std::invalid_argument unless each head has a slope, if there are slopes
  void check_heads(Index heads) const {
    if (!slopes().empty() && static_cast<Index>(slopes().size()) != heads)
      reject("score.alibi_slopes", std::to_string(heads) + " slopes, one for each head",
             slopes().size());
  }

 private:
  const std::vector<double>& slopes() const { return alibi_.functor.slopes; }

  bool has_soft_cap_;
  LanesScore<Scalar, SoftCap> soft_cap_;
  LanesScore<Scalar, ALiBi> alibi_;
};

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI

LOCAL_MHA_INT_BOUNDS_END
