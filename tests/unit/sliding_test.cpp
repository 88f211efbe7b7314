// SPDX-License-Identifier: MIT
// What sliding-window layers add to the look-around: token windows, fewer key and value heads,
// sinks, packed sequences, functions of scores, relative biases, first keys, global rows. Forward,
// backward and as a stream, against plain loops.
#define EIGEN_USE_THREADS

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <local_mha/attention/token_window.hpp>
#include <local_mha/local_mha.hpp>

#include "support/random.hpp"

namespace sliding_test {

using local_mha::AnyDevice;
using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionCall;
using local_mha::LocalAttentionConfig;
using local_mha::PaddingMask;
using local_mha::Tensor;
using local_mha::TensorView;
using local_mha::TokenWindow;
using Real = long double;

// All that a call is given. Numbers are exact in float.
struct Case {
  LocalAttentionConfig config;
  Index batch = 1, heads = 1, kv_heads = 1, n = 0, d = 1;
  std::vector<double> q, k, v, bias, sinks;  // bias: relative, or of the look-around
  Index biases = 0;
  std::vector<char> masked;  // empty: no mask
  std::vector<char> global;  // empty: no global rows
  std::vector<Index> cu_seqlens;

  Index columns() const {
    if (config.token_window) return config.token_window->left + config.token_window->right + 1;
    return (1 + config.look_backward + look_forward()) * config.window_size;
  }
  Index look_forward() const { return config.look_forward.value_or(config.causal ? 0 : 1); }
  Index bias_rows() const { return config.token_window ? 1 : config.window_size; }

  std::string text() const {
    std::ostringstream out;
    out << "B " << batch << ", H " << heads << " on " << kv_heads << ", N " << n << ", D " << d;
    if (config.token_window)
      out << ", window " << config.token_window->left << " " << config.token_window->right;
    else
      out << ", w " << config.window_size << ", lb " << config.look_backward << ", lf "
          << look_forward() << (config.causal ? ", causal" : "")
          << (config.exact_windowsize ? ", exact" : "");
    out << (config.dim ? ", rotary" : "") << (config.use_xpos ? ", xpos" : "")
        << (config.shared_qk ? ", shared_qk" : "") << (bias.empty() ? "" : ", bias")
        << (sinks.empty() ? "" : ", sinks") << (masked.empty() ? "" : ", mask")
        << (global.empty() ? "" : ", global") << ", first " << config.first_keys << ", segments "
        << cu_seqlens.size() << (config.score.soft_cap ? ", soft-cap" : "")
        << (config.score.alibi_slopes.empty() ? "" : ", ALiBi");
    return out.str();
  }
};

// Does row i of a segment see row j of it? Global rows apart.
bool shows(const Case& c, Index i, Index j) {
  const bool causal =
      c.config.causal || (c.config.token_window && c.config.token_window->right == 0);
  if (j < c.config.first_keys && (!causal || j <= i)) return true;
  if (c.config.token_window) {
    const auto [left, right] = *c.config.token_window;
    if (left != TokenWindow::unbounded && j < i - left) return false;
    return right == TokenWindow::unbounded || j <= i + right;
  }
  const Index w = c.config.window_size;
  if (j / w < i / w - c.config.look_backward || j / w > i / w + c.look_forward()) return false;
  if (causal && j > i) return false;
  if (c.config.exact_windowsize)
    return i - j <= c.config.look_backward * w && j - i <= c.look_forward() * w;
  return true;
}

struct Inputs {
  std::vector<Real> q, k, v, bias, sinks;
};

std::vector<Real> exact(const std::vector<double>& values) {
  return std::vector<Real>(values.begin(), values.end());
}
Inputs inputs_of(const Case& c) {
  return {exact(c.q), exact(c.k), exact(c.v), exact(c.bias), exact(c.sinks)};
}

Real product(const Case& c, const Real* q, const Real* k, Index i, Index j) {
  Real sum = 0;
  if (!c.config.dim) {
    for (Index m = 0; m < c.d; ++m) sum += q[m] * k[m];
    return sum;
  }
  const Index shift = c.config.token_window ? 0 : c.look_forward() * c.config.window_size;
  const auto r = static_cast<Real>(i - j + shift);
  const auto d = static_cast<Real>(c.d);
  for (Index m = 0; m < c.d / 2; ++m) {
    const Real angle = r * std::pow(10000.0L, -2 * static_cast<Real>(m) / d);
    Real decay = 1;
    if (c.config.use_xpos)
      decay = std::pow((2 * static_cast<Real>(m) + 0.4L * d) / (1.4L * d),
                       r / static_cast<Real>(c.config.xpos_scale_base.value_or(
                               std::sqrt(static_cast<double>(c.d)))));
    const Real q1 = q[m], q2 = q[m + c.d / 2], k1 = k[m], k2 = k[m + c.d / 2];
    sum += ((q1 * k1 + q2 * k2) * std::cos(angle) + (q1 * k2 - q2 * k1) * std::sin(angle)) * decay;
  }
  return sum;
}

// [B, H, N, D]; of rows whose flag is in `asked`, if there are any.
std::vector<Real> naive(const Case& c, Inputs in,
                        Real (*score)(Real, Index, Index, Index) = nullptr) {
  std::vector<Real> out(static_cast<std::size_t>(c.batch * c.heads * c.n * c.d));
  if (c.config.shared_qk)
    for (std::size_t row = 0; row < in.k.size(); row += static_cast<std::size_t>(c.d)) {
      Real square = 0;
      for (Index m = 0; m < c.d; ++m)
        square += in.k[row + static_cast<std::size_t>(m)] * in.k[row + static_cast<std::size_t>(m)];
      for (Index m = 0; m < c.d; ++m)
        in.k[row + static_cast<std::size_t>(m)] /=
            std::max(std::sqrt(square), static_cast<Real>(1e-12L));
    }
  const Real scale = c.config.scale.value_or(1 / std::sqrt(static_cast<double>(c.d)));
  const std::vector<Index> whole{0, c.n};
  const std::vector<Index>& cuts = c.cu_seqlens.empty() ? whole : c.cu_seqlens;
  for (Index b = 0; b < c.batch; ++b)
    for (Index h = 0; h < c.heads; ++h)
      for (std::size_t s = 0; s + 1 < cuts.size(); ++s)
        for (Index i = 0; i < cuts[s + 1] - cuts[s]; ++i) {
          const Index row = cuts[s] + i;
          const auto flag = [&](const std::vector<char>& flags, Index r) {
            return !flags.empty() && flags[static_cast<std::size_t>(b * c.n + r)] != 0;
          };
          const Real* q = in.q.data() + ((b * c.heads + h) * c.n + row) * c.d;
          const Index kv = b * c.kv_heads + h / (c.heads / c.kv_heads);
          std::vector<Real> scores;
          std::vector<Index> seen;
          for (Index j = 0; j < cuts[s + 1] - cuts[s]; ++j) {
            const Index key = cuts[s] + j;
            if (!shows(c, i, j) && !flag(c.global, row) && !flag(c.global, key)) continue;
            if (flag(c.masked, key)) continue;
            Real x = scale * product(c, q, in.k.data() + (kv * c.n + key) * c.d, i, j);
            if (c.config.score.soft_cap) {
              const Real cap = *c.config.score.soft_cap;
              x = cap * std::tanh(x / cap);
            }
            if (!c.config.score.alibi_slopes.empty())
              x -= static_cast<Real>(c.config.score.alibi_slopes[static_cast<std::size_t>(h)]) *
                   static_cast<Real>(std::abs(i - j));
            if (score != nullptr) x = score(x, h, i, j);
            if (!c.bias.empty()) {
              const Index column = c.config.token_window
                                       ? j - i + c.config.token_window->left
                                       : j - (i / c.config.window_size - c.config.look_backward) *
                                                 c.config.window_size;
              const Index bias_row = (c.biases == 1 ? 0 : h) * c.bias_rows() + i % c.bias_rows();
              if (column >= 0 && column < c.columns())
                x += in.bias[static_cast<std::size_t>(bias_row * c.columns() + column)];
            }
            if (c.config.shared_qk && i == j) x = -5e4L;
            scores.push_back(x);
            seen.push_back(key);
          }
          if (seen.empty()) continue;
          Real most = *std::max_element(scores.begin(), scores.end());
          if (!c.sinks.empty()) most = std::max(most, in.sinks[static_cast<std::size_t>(h)]);
          Real sum =
              c.sinks.empty() ? Real(0) : std::exp(in.sinks[static_cast<std::size_t>(h)] - most);
          for (const Real x : scores) sum += std::exp(x - most);
          for (std::size_t at = 0; at < seen.size(); ++at)
            for (Index m = 0; m < c.d; ++m)
              out[static_cast<std::size_t>(((b * c.heads + h) * c.n + row) * c.d + m)] +=
                  std::exp(scores[at] - most) / sum *
                  in.v[static_cast<std::size_t>((kv * c.n + seen[at]) * c.d + m)];
        }
  return out;
}

template <typename Scalar, int Rank>
Tensor<Scalar, Rank> tensor(const std::vector<double>& values, std::array<Index, Rank> shape) {
  Tensor<Scalar, Rank> t(shape);
  for (std::size_t i = 0; i < values.size(); ++i) t.data()[i] = static_cast<Scalar>(values[i]);
  return t;
}

// The arguments of a call, in a scalar type.
template <typename Scalar>
struct Arguments {
  explicit Arguments(const Case& c)
      : q(tensor<Scalar, 4>(c.q, {c.batch, c.heads, c.n, c.d})),
        k(tensor<Scalar, 4>(c.k, {c.batch, c.kv_heads, c.n, c.d})),
        v(tensor<Scalar, 4>(c.v, {c.batch, c.kv_heads, c.n, c.d})),
        sinks(tensor<Scalar, 1>(c.sinks, {static_cast<Index>(c.sinks.size())})),
        cu_seqlens(c.cu_seqlens) {
    if (!c.masked.empty()) {
      Tensor<bool, 2> flags(c.batch, c.n);
      for (Index i = 0; i < c.batch * c.n; ++i)
        flags.data()[i] = c.masked[static_cast<std::size_t>(i)] != 0;
      mask = PaddingMask::masked(flags);
    }
    if (c.config.token_window)
      relative = tensor<Scalar, 2>(c.bias, {c.biases, c.bias.empty() ? 0 : c.columns()});
    else
      bias = tensor<Scalar, 3>(
          c.bias, {c.biases, c.bias.empty() ? 0 : c.bias_rows(), c.bias.empty() ? 0 : c.columns()});
    if (c.global.empty()) return;
    global = Tensor<bool, 2>(c.batch, c.n);
    for (Index i = 0; i < c.batch * c.n; ++i)
      global.data()[i] = c.global[static_cast<std::size_t>(i)] != 0;
  }
  // All of a call. Valid as long as this.
  LocalAttentionCall<Scalar> call(const AnyDevice& device = {}) const {
    LocalAttentionCall<Scalar> call = of_backward(device);
    call.mask = mask;
    call.cu_seqlens = cu_seqlens;
    if (global.size() > 0) call.global_rows = global;
    return call;
  }
  // What the backward pass is given again.
  LocalAttentionCall<Scalar> of_backward(const AnyDevice& device = {}) const {
    LocalAttentionCall<Scalar> call{.device = device};
    if (bias.size() > 0) call.attn_bias = bias;
    if (relative.size() > 0) call.relative_bias = relative;
    if (sinks.size() > 0) call.sinks = sinks;
    return call;
  }

  Tensor<Scalar, 4> q, k, v;
  Tensor<Scalar, 1> sinks;
  Tensor<Scalar, 3> bias;
  Tensor<Scalar, 2> relative;
  Tensor<bool, 2> global;
  PaddingMask mask;
  std::vector<Index> cu_seqlens;
};

std::vector<double> numbers(Random& random, Index size, double scale = 1) {
  return random.array({size}, scale).data;
}

struct Draw {
  bool token_windows = true;
  bool heads = false, sinks = false, packed = false, scores = false, bias = false, first = false,
       global = false, unbounded = true;
};

Case draw(std::uint64_t seed, const Draw& what, Index longest = 70) {
  Random random(seed);
  Case c;
  c.batch = random.integer(1, 2);
  c.n = random.chance(0.1) ? random.integer(0, 3) : random.integer(1, longest);
  c.d = random.pick<Index>({1, 2, 3, 8, 16, 20});
  c.heads = c.kv_heads = random.integer(1, 3);
  if (what.heads) {
    c.kv_heads = random.integer(1, 2);
    c.heads = c.kv_heads * random.pick<Index>({1, 2, 3, 4});
  }
  if (what.token_windows && random.chance(0.8)) {
    TokenWindow window{random.integer(0, 40), random.chance(0.5) ? 0 : random.integer(0, 30)};
    if (random.chance(0.2)) window = {random.integer(0, 3), random.integer(0, 2)};
    if (what.unbounded && random.chance(0.1)) window.left = TokenWindow::unbounded;
    if (what.unbounded && random.chance(0.1)) window.right = TokenWindow::unbounded;
    c.config.token_window = window;
  } else {
    c.config.window_size = random.integer(1, 12);
    c.config.causal = random.chance(0.5);
    c.config.exact_windowsize = random.chance(0.5);
    c.config.look_backward = random.integer(0, 2);
    if (!c.config.causal) c.config.look_forward = random.integer(0, 2);
  }
  const auto rotary = random.chance(0.3);
  if (rotary && c.d % 2 == 0) {
    c.config.dim = c.d;
    if (random.chance(0.3)) c.config.use_xpos = true, c.config.xpos_scale_base = 40;
  }
  if (c.kv_heads == c.heads && random.chance(0.1)) c.config.shared_qk = true;
  c.q = numbers(random, c.batch * c.heads * c.n * c.d);
  c.k = c.config.shared_qk ? c.q : numbers(random, c.batch * c.kv_heads * c.n * c.d);
  c.v = numbers(random, c.batch * c.kv_heads * c.n * c.d);
  const bool bounded = !c.config.token_window || c.config.token_window->bounded();
  if (what.bias && bounded && random.chance(0.7)) {
    c.biases = random.chance(0.5) ? 1 : c.heads;
    c.bias = numbers(random, c.biases * c.bias_rows() * c.columns());
  }
  if (what.sinks && random.chance(0.8)) c.sinks = numbers(random, c.heads, 2);
  if (what.scores && random.chance(0.8)) {
    if (random.chance(0.5))
      c.config.score.soft_cap = random.pick({0.5, 3.0, 50.0});
    else
      for (Index h = 0; h < c.heads; ++h)
        c.config.score.alibi_slopes.push_back(random.uniform(0, 1));
  }
  if (what.first && random.chance(0.8)) c.config.first_keys = random.pick<Index>({1, 3, 4, 17, 40});
  if (random.chance(0.4)) {
    c.masked.resize(static_cast<std::size_t>(c.batch * c.n));
    const double probability = random.pick({0.1, 0.5, 0.95});
    for (char& flag : c.masked) flag = random.chance(probability);
  }
  if (what.global && random.chance(0.8)) {
    c.global.resize(static_cast<std::size_t>(c.batch * c.n));
    const double probability = random.pick({0.03, 0.3});
    for (char& flag : c.global) flag = random.chance(probability);
  }
  if (what.packed && random.chance(0.9)) {
    c.batch = 1;
    for (auto* values : {&c.q, &c.k, &c.v})
      values->resize(values->size() / static_cast<std::size_t>(c.batch));
    const auto fit = [](auto& values, Index size) {
      values.resize(std::min(values.size(), static_cast<std::size_t>(size)));
    };
    fit(c.q, c.heads * c.n * c.d), fit(c.k, c.kv_heads * c.n * c.d),
        fit(c.v, c.kv_heads * c.n * c.d);
    fit(c.masked, c.n), fit(c.global, c.n);
    c.cu_seqlens = {0, c.n};
    for (Index cut = random.integer(0, 6); cut > 0; --cut)
      c.cu_seqlens.push_back(random.integer(0, c.n));
    std::sort(c.cu_seqlens.begin(), c.cu_seqlens.end());
  }
  return c;
}

template <typename Scalar>
double largest_error(const Tensor<Scalar, 4>& got, const std::vector<Real>& expected) {
  double largest = got.size() == static_cast<Index>(expected.size()) ? 0 : 1e9;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double error =
        std::abs(static_cast<double>(static_cast<Real>(got.data()[i]) - expected[i]));
    largest = error <= largest ? largest : error;  // a NaN stays
  }
  return largest;
}

template <typename Scalar>
void expect_forward(const Case& c, std::uint64_t seed) {
  const Arguments<Scalar> a(c);
  const LocalAttention<Scalar> attention(c.config);
  const auto out = attention.forward(a.q, a.k, a.v, a.call());
  const double tolerance = std::is_same_v<Scalar, float> ? 3e-5 : 2e-13;
  EXPECT_LE(largest_error(out, naive(c, inputs_of(c))), tolerance)
      << "seed " << seed << ": " << c.text();
}

// Derivatives of Σ weights·out along random directions.
void expect_gradients(const Case& c, std::uint64_t seed) {
  Random random(seed + 1000000);
  const Arguments<double> a(c);
  const LocalAttention<double> attention(c.config);
  const auto weights = numbers(random, c.batch * c.heads * c.n * c.d);
  const auto saved = attention.forward_saving(a.q, a.k, a.v, a.call());
  const auto gradients =
      attention.backward(saved, tensor<double, 4>(weights, {c.batch, c.heads, c.n, c.d}), a.q, a.k,
                         a.v, a.of_backward());
  const auto loss = [&](const Inputs& in) {
    const auto out = naive(c, in);
    Real sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * weights[i];
    return sum;
  };
  const auto check = [&](std::vector<Real> Inputs::* member, const double* gradient, Index size,
                         const char* name) {
    const Inputs at = inputs_of(c);
    ASSERT_EQ(size, static_cast<Index>((at.*member).size())) << name;
    for (int direction = 0; direction < 2 && size > 0; ++direction) {
      std::vector<double> along = numbers(random, size);
      if (direction == 1) {  // one element
        const Index one = random.integer(0, size - 1);
        for (Index i = 0; i < size; ++i) along[static_cast<std::size_t>(i)] = i == one;
      }
      constexpr Real h = 1e-6L;
      Inputs more = at, less = at;
      Real expected = 0, magnitude = 1;
      for (std::size_t i = 0; i < along.size(); ++i) {
        (more.*member)[i] += h * static_cast<Real>(along[i]);
        (less.*member)[i] -= h * static_cast<Real>(along[i]);
        expected += static_cast<Real>(gradient[i]) * static_cast<Real>(along[i]);
        magnitude += std::abs(static_cast<Real>(gradient[i]) * static_cast<Real>(along[i]));
      }
      const Real difference = (loss(more) - loss(less)) / (2 * h);
      EXPECT_LE(static_cast<double>(std::abs(difference - expected) / magnitude), 2e-9)
          << name << ", seed " << seed << ": " << c.text();
    }
  };
  check(&Inputs::q, gradients.q.data(), gradients.q.size(), "q");
  check(&Inputs::k, gradients.k.data(), gradients.k.size(), "k");
  check(&Inputs::v, gradients.v.data(), gradients.v.size(), "v");
  ASSERT_EQ(gradients.sinks.has_value(), !c.sinks.empty());
  if (gradients.sinks)
    check(&Inputs::sinks, gradients.sinks->data(), gradients.sinks->size(), "sinks");
  ASSERT_EQ(gradients.relative_bias.has_value(),
            !c.bias.empty() && c.config.token_window.has_value());
  if (gradients.relative_bias)
    check(&Inputs::bias, gradients.relative_bias->data(), gradients.relative_bias->size(),
          "relative_bias");
  if (gradients.attn_bias)
    check(&Inputs::bias, gradients.attn_bias->data(), gradients.attn_bias->size(), "attn_bias");
}

template <typename Scalar>
void expect_stream(const Case& c, std::uint64_t seed) {
  Random random(seed + 2000000);
  const Arguments<Scalar> a(c);
  const LocalAttention<Scalar> attention(c.config);
  const auto whole = attention.forward(a.q, a.k, a.v, a.call());
  LocalAttentionCall<Scalar> of_stream = a.call();
  of_stream.mask = {};
  typename LocalAttention<Scalar>::Stream stream(attention, c.heads, c.d, {.batch = c.batch},
                                                 of_stream, c.kv_heads);
  Index in = 0, out = 0;
  double largest = 0;
  const auto compare = [&](const Tensor<Scalar, 4>& y) {
    for (Index b = 0; b < c.batch; ++b)
      for (Index h = 0; h < c.heads; ++h)
        for (Index i = 0; i < y.dimension(2); ++i)
          for (Index m = 0; m < c.d; ++m) {
            const double error =
                std::abs(static_cast<double>(y(b, h, i, m) - whole(b, h, out + i, m)));
            largest = error <= largest ? largest : error;
          }
    out += y.dimension(2);
  };
  while (in < c.n) {
    const Index rows = std::min(random.pick<Index>({1, 1, 3, 7, random.integer(1, 200)}), c.n - in);
    const auto part = [&](const Tensor<Scalar, 4>& x) {
      Tensor<Scalar, 4> t(x.dimension(0), x.dimension(1), rows, x.dimension(3));
      for (Index b = 0; b < t.dimension(0); ++b)
        for (Index h = 0; h < t.dimension(1); ++h)
          for (Index i = 0; i < rows; ++i)
            for (Index m = 0; m < c.d; ++m) t(b, h, i, m) = x(b, h, in + i, m);
      return t;
    };
    PaddingMask mask;
    if (!c.masked.empty()) {
      Tensor<bool, 2> flags(c.batch, rows);
      for (Index b = 0; b < c.batch; ++b)
        for (Index i = 0; i < rows; ++i)
          flags(b, i) = c.masked[static_cast<std::size_t>(b * c.n + in + i)] != 0;
      mask = PaddingMask::masked(flags);
    }
    compare(stream.push(part(a.q), part(a.k), part(a.v), {.mask = mask}));
    in += rows;
  }
  compare(stream.flush());
  EXPECT_EQ(out, c.n);
  EXPECT_LE(largest, (std::is_same_v<Scalar, float> ? 1e-5 : 1e-12))
      << "seed " << seed << ": " << c.text();
}

template <typename Check>
void over(std::uint64_t cases, Check&& check) {
  for (std::uint64_t seed = 1; seed <= random_cases(cases) && !testing::Test::HasFailure(); ++seed)
    check(seed);
}

void expect_all(const Draw& what, std::uint64_t cases) {
  over(cases, [&](std::uint64_t seed) {
    expect_forward<float>(draw(seed, what), seed);
    expect_forward<double>(draw(seed, what), seed);
  });
  over(cases / 10, [&](std::uint64_t seed) { expect_forward<float>(draw(seed, what, 400), seed); });
  over(cases / 2, [&](std::uint64_t seed) { expect_gradients(draw(seed, what, 40), seed); });
  Draw streamed = what;
  streamed.unbounded = streamed.packed = streamed.global = false;
  over(cases / 2,
       [&](std::uint64_t seed) { expect_stream<double>(draw(seed, streamed, 150), seed); });
  over(cases / 10,
       [&](std::uint64_t seed) { expect_stream<float>(draw(seed, streamed, 300), seed); });
}

TEST(Sliding, TokenWindows) { expect_all({}, 160); }
TEST(Sliding, FewerKeyHeads) { expect_all({.heads = true}, 100); }
TEST(Sliding, Sinks) { expect_all({.sinks = true}, 100); }
TEST(Sliding, PackedSequences) { expect_all({.packed = true}, 100); }
TEST(Sliding, FunctionsOfScores) { expect_all({.scores = true}, 100); }
TEST(Sliding, RelativeBiases) { expect_all({.bias = true}, 100); }
TEST(Sliding, FirstKeys) { expect_all({.first = true}, 100); }
TEST(Sliding, GlobalRows) { expect_all({.global = true}, 100); }
TEST(Sliding, AllTogether) {
  expect_all({.heads = true,
              .sinks = true,
              .packed = true,
              .scores = true,
              .bias = true,
              .first = true,
              .global = true},
             160);
}

// What the rows 0, middle and last of 64 see by each convention: the table in token_window.hpp.
TEST(TokenWindows, AreThoseOfTheirSystems) {
  namespace windows = local_mha::token_windows;
  using local_mha::Range;
  using local_mha::Window;
  constexpr Index n = 64, middle = 31, last = n - 1;
  const auto expect = [&](const char* what, const LocalAttentionConfig& config, const Range& first,
                          const Range& in_middle, const Range& at_last) {
    const Window window(config);
    EXPECT_EQ(window.keys_visible(0, n), first) << what;
    EXPECT_EQ(window.keys_visible(middle, n), in_middle) << what;
    EXPECT_EQ(window.keys_visible(last, n), at_last) << what;
    for (const Index i : {Index{0}, middle, last})
      for (Index j = 0; j < n; ++j)
        EXPECT_EQ(window.attends(i, j), window.keys_visible(i, n).contains(j)) << what;
  };
  const auto of = [](const TokenWindow& window) {
    LocalAttentionConfig config;
    config.token_window = window;
    return config;
  };
  expect("lookaround_exact(4, 2, 1)", of(windows::lookaround_exact(4, 2, 1)), {0, 5}, {23, 36},
         {55, 64});
  for (const Index w : {1, 2, 5, 64, 100}) {
    const Index left = std::min<Index>(w - 1, middle), most = std::min<Index>(w - 1, last);
    for (const auto& config : {of(windows::hugging_face(w)), of(windows::onnx_runtime(w))})
      expect("w - 1, 0", config, {0, 1}, {middle - left, middle + 1}, {last - most, n});
  }
  for (const Index a : {0, 1, 2, 7, 8}) {
    const Index side = a / 2;
    for (const auto& config :
         {of(windows::modernbert(a)), of(windows::longformer(a)), of(windows::long_t5(side)),
          of(windows::flash(side, side)), of(windows::onnx(side, side))})
      expect("a / 2", config, {0, side + 1}, {middle - side, middle + side + 1}, {last - side, n});
  }
  expect("reformer(8, 1, 0)", windows::reformer(8, 1, 0), {0, 8}, {16, 32}, {48, 64});
  expect("reformer(8, 1, 1)", windows::reformer(8, 1, 1), {0, 16}, {16, 40}, {48, 64});
  expect("reformer(8, 1, 0), decoder", windows::reformer(8, 1, 0, true), {0, 1}, {16, 32},
         {48, 64});
  expect("flash(-1, 0)", of(windows::flash(-1, 0)), {0, 1}, {0, 32}, {0, 64});
  expect("flash(3, -1)", of(windows::flash(3, -1)), {0, 64}, {28, 64}, {60, 64});
  expect("flash(2, 5)", of(windows::flash(2, 5)), {0, 6}, {29, 37}, {61, 64});
  expect("onnx(2, 5)", of(windows::onnx(2, 5)), {0, 6}, {29, 37}, {61, 64});
  expect("onnx(-1, -1)", of(windows::onnx(-1, -1)), {0, 64}, {0, 64}, {0, 64});
  EXPECT_EQ(Window(of({3, 2})).keys_visible(0), (Range{-3, 3}));
}

TEST(TokenWindows, GiveTheBitsOfTheLookAroundOfTheSameBand) {
  Random random(4);
  for (const auto& [w, lf] : {std::pair<Index, Index>{4, 0}, {16, 1}, {40, 0}}) {
    LocalAttentionConfig look_around{.window_size = w, .causal = lf == 0, .exact_windowsize = true};
    LocalAttentionConfig window;
    window.token_window = local_mha::token_windows::lookaround_exact(w, 1, lf);
    const auto q = tensor<float, 4>(numbers(random, 2 * 130 * 16), {1, 2, 130, 16});
    const auto a = LocalAttention<float>(look_around).forward(q, q, q);
    const auto b = LocalAttention<float>(window).forward(q, q, q);
    for (Index i = 0; i < a.size(); ++i) ASSERT_EQ(a.data()[i], b.data()[i]) << i;
  }
}

TEST(Sliding, WindowsOfMoreKeysThanAreKeptAtOnce) {
  for (const bool first : {false, true})
    for (const Index left : {Index{1500}, TokenWindow::unbounded}) {
      Case c;
      Random random(6);
      c.n = 2200, c.d = 2, c.heads = 2;
      c.config.token_window = {left, 0};
      c.config.first_keys = first ? 1100 : 0;
      c.config.dim = 2;
      c.q = numbers(random, 2 * c.n * c.d), c.k = numbers(random, c.n * c.d);
      c.v = numbers(random, c.n * c.d), c.sinks = numbers(random, 2);
      if (!first) {
        c.global.resize(static_cast<std::size_t>(c.n));
        c.global[5] = c.global[1700] = 1;
      }
      expect_forward<double>(c, 1);
    }
}

// Of each segment, what it gives alone; dropout as that of the sequences of a batch.
TEST(PackedSequences, AreWhatTheyGiveAlone) {
  Random random(9);
  const Index length = 37, heads = 2, d = 8;
  LocalAttentionConfig config{.window_size = 5, .dropout = 0.3};
  config.dim = d;
  const LocalAttention<double> attention(config);
  const auto batch =
      tensor<double, 4>(numbers(random, 3 * heads * length * d), {3, heads, length, d});
  Tensor<double, 4> packed(1, heads, 3 * length, d);
  for (Index b = 0; b < 3; ++b)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < length; ++i)
        for (Index m = 0; m < d; ++m) packed(0, h, b * length + i, m) = batch(b, h, i, m);
  const auto bias = tensor<double, 3>(numbers(random, heads * 5 * 15), {heads, 5, 15});
  const std::vector<Index> cuts{0, length, 2 * length, 3 * length};
  LocalAttentionCall<double> call{.attn_bias = bias, .training = local_mha::Training{.seed = 3}};
  const auto alone = attention.forward(batch, batch, batch, call);
  const auto saved_alone = attention.forward_saving(batch, batch, batch, call);
  const auto back_alone =
      attention.backward(saved_alone, batch, batch, batch, batch, {.attn_bias = bias});
  call.cu_seqlens = cuts;
  const auto together = attention.forward(packed, packed, packed, call);
  const auto saved = attention.forward_saving(packed, packed, packed, call);
  const auto back = attention.backward(saved, packed, packed, packed, packed, {.attn_bias = bias});
  for (Index b = 0; b < 3; ++b)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < length; ++i)
        for (Index m = 0; m < d; ++m) {
          ASSERT_EQ(together(0, h, b * length + i, m), alone(b, h, i, m)) << b << ' ' << i;
          ASSERT_EQ(back.k(0, h, b * length + i, m), back_alone.k(b, h, i, m)) << b << ' ' << i;
        }
  for (Index i = 0; i < bias.size(); ++i)
    EXPECT_NEAR(back.attn_bias->data()[i], back_alone.attn_bias->data()[i], 1e-12);
}

// NaN in one segment, or in a key that a window does not show, reaches no other result.
TEST(PackedSequences, NeverDependOnWhatTheirNeighboursHold) {
  Random random(10);
  auto q = tensor<float, 4>(numbers(random, 50 * 8), {1, 1, 50, 8});
  LocalAttentionConfig config;
  config.token_window = {40, 3};
  config.first_keys = 2;
  const LocalAttention<float> attention(config);
  const std::vector<Index> cuts{0, 13, 13, 31, 50};
  const auto before = attention.forward_saving(q, q, q, {.cu_seqlens = cuts});
  const auto gradients_before = attention.backward(before, q, q, q, q);
  auto poisoned = q;
  for (Index i = 13; i < 31; ++i)
    for (Index m = 0; m < 8; ++m) poisoned(0, 0, i, m) = std::numeric_limits<float>::quiet_NaN();
  const auto after = attention.forward_saving(poisoned, poisoned, poisoned, {.cu_seqlens = cuts});
  const auto gradients = attention.backward(after, poisoned, poisoned, poisoned, poisoned);
  for (Index i = 0; i < 50; ++i)
    for (Index m = 0; m < 8; ++m) {
      if (i >= 13 && i < 31) continue;
      EXPECT_EQ(before.out(0, 0, i, m), after.out(0, 0, i, m)) << i;
      EXPECT_EQ(gradients_before.k(0, 0, i, m), gradients.k(0, 0, i, m)) << i;
    }
}

TEST(Scores, OfTheUserGoForwardAndBack) {
  // A plain function of scalars, and the same over Lanes.
  const auto value = [](double s, Index h, Index i, Index j) {
    return s + 0.1 * s * s / (1 + static_cast<double>(h)) - 0.02 * static_cast<double>(i * j % 7);
  };
  const auto slope = [](double s, Index h, Index, Index) {
    return 1 + 0.2 * s / (1 + static_cast<double>(h));
  };
  const auto in_reals = [](Real s, Index h, Index i, Index j) {
    return s + 0.1L * s * s / static_cast<Real>(1 + h) - 0.02L * static_cast<Real>(i * j % 7);
  };
  Case c;
  Random random(12);
  c.n = 45, c.d = 4, c.heads = 2, c.kv_heads = 1;
  c.config.token_window = {9, 4};
  c.q = numbers(random, 2 * c.n * c.d), c.k = numbers(random, c.n * c.d);
  c.v = numbers(random, c.n * c.d);
  const Arguments<double> a(c);
  const auto both = local_mha::with_derivative(value, slope);
  const LocalAttention<double, decltype(value)> forward_only(c.config, value);
  const LocalAttention<double, std::remove_const_t<decltype(both)>> attention(c.config, both);
  const auto expected = naive(c, inputs_of(c), in_reals);
  EXPECT_LE(largest_error(forward_only.forward(a.q, a.k, a.v), expected), 1e-13);
  const auto saved = attention.forward_saving(a.q, a.k, a.v);
  EXPECT_LE(largest_error(saved.out, expected), 1e-13);
  const auto gradients = attention.backward(saved, a.q, a.q, a.k, a.v);
  const auto loss = [&](const Inputs& in) {
    const auto out = naive(c, in, in_reals);
    Real sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * static_cast<Real>(c.q[i]);
    return sum;
  };
  for (Index i = 0; i < a.k.size(); i += 7) {
    Inputs more = inputs_of(c), less = more;
    more.k[static_cast<std::size_t>(i)] += 1e-6L;
    less.k[static_cast<std::size_t>(i)] -= 1e-6L;
    EXPECT_NEAR(gradients.k.data()[i], static_cast<double>((loss(more) - loss(less)) / 2e-6L),
                1e-9);
  }
}

TEST(Tanh, IsExactToAFewUnitsInTheLastPlace) {
  const auto check = [](auto zero) {
    using Scalar = decltype(zero);
    using L = local_mha::Lanes<Scalar>;
    double worst = 0;
    Random random(3);
    for (int i = 0; i < 200000; ++i) {
      alignas(64) Scalar x[L::count];
      for (Scalar& value : x)
        value =
            static_cast<Scalar>(std::exp(random.uniform(-20, 4)) * (random.chance(0.5) ? 1 : -1));
      x[0] = 0;
      alignas(64) Scalar y[L::count];
      tanh(L::load(x)).store(y);
      for (int lane = 0; lane < L::count; ++lane) {
        const Real exact = std::tanh(static_cast<Real>(x[lane]));
        const Real error = std::abs(static_cast<Real>(y[lane]) - exact);
        const Real unit =
            std::abs(exact) * static_cast<Real>(std::numeric_limits<Scalar>::epsilon());
        if (error > 0) worst = std::max(worst, static_cast<double>(error / unit));
      }
    }
    EXPECT_LE(worst, 4) << sizeof(Scalar);
  };
  check(0.0F);
  check(0.0);
}

// Back and forth, and saved and loaded, with rows that are pinned.
TEST(Streams, GoBackAndAreLoadedWithFirstKeys) {
  Case c;
  Random random(20);
  c.n = 120, c.d = 8, c.heads = 2;
  c.config.token_window = {10, 0};
  c.config.first_keys = 5;
  c.config.dim = 8;
  c.q = numbers(random, 2 * c.n * c.d), c.k = numbers(random, c.n * c.d);
  c.v = numbers(random, c.n * c.d);
  const Arguments<double> a(c);
  const LocalAttention<double> attention(c.config);
  const auto whole = attention.forward(a.q, a.k, a.v);
  using Stream = LocalAttention<double>::Stream;
  Stream stream(attention, 2, 8, {.max_rollback = 4}, {}, 1);
  const auto row = [&](const Tensor<double, 4>& x, Index i) {
    Tensor<double, 4> t(1, x.dimension(1), 1, 8);
    for (Index h = 0; h < x.dimension(1); ++h)
      for (Index m = 0; m < 8; ++m) t(0, h, 0, m) = x(0, h, i, m);
    return t;
  };
  for (Index i = 0; i < c.n; ++i) {
    if (i % 9 == 3 && random.chance(0.7)) {  // something else first
      const auto wrong = row(a.q, i / 2);
      const auto wrong_key = row(a.v, i / 2);
      stream.push(wrong, wrong_key, wrong_key);
      stream.rollback(1);
    }
    if (i % 17 == 4) {
      std::stringstream state;
      stream.save(state);
      Stream other(attention, 2, 8, {.max_rollback = 4}, {}, 1);
      other.load(state);
      stream = other;
    }
    const auto y = stream.push(row(a.q, i), row(a.k, i), row(a.v, i));
    for (Index h = 0; h < 2; ++h)
      for (Index m = 0; m < 8; ++m) ASSERT_NEAR(y(0, h, 0, m), whole(0, h, i, m), 1e-12) << i;
  }
}

// Cuts of the work into tasks do not change a bit.
TEST(Sliding, GivesTheSameBitsOnAnyNumberOfThreads) {
  Eigen::ThreadPool pool(4);
  over(30, [&](std::uint64_t seed) {
    const Case c = draw(seed,
                        {.heads = true,
                         .sinks = true,
                         .packed = true,
                         .scores = true,
                         .bias = true,
                         .first = true,
                         .global = true},
                        400);
    const Arguments<float> a(c);
    const LocalAttention<float> attention(c.config);
    const auto pass = [&](const auto& device) {
      const auto saved = attention.forward_saving(a.q, a.k, a.v, a.call(device));
      auto gradients = attention.backward(saved, saved.out, a.q, a.k, a.v, a.of_backward(device));
      return std::pair(saved.out, std::move(gradients));
    };
    const auto [out, gradients] = pass(Eigen::DefaultDevice());
    const auto same = [&](const auto& x, const auto& y) {
      ASSERT_EQ(x.size(), y.size());
      for (Index i = 0; i < x.size(); ++i) ASSERT_EQ(x.data()[i], y.data()[i]) << c.text();
    };
    for (const int threads : {2, 4}) {
      const auto [other, others] = pass(Eigen::ThreadPoolDevice(&pool, threads));
      same(out, other);
      same(gradients.q, others.q);
      same(gradients.k, others.k);
      same(gradients.v, others.v);
      if (gradients.sinks) same(*gradients.sinks, *others.sinks);
      if (gradients.relative_bias) same(*gradients.relative_bias, *others.relative_bias);
      if (gradients.attn_bias) same(*gradients.attn_bias, *others.attn_bias);
    }
  });
}

}  // namespace sliding_test
