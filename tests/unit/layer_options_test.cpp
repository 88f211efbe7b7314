// SPDX-License-Identifier: MIT
// LocalMHA's options beside those of the Python package: forward against loops that are written out
// here, backward against their central differences, as a stream, on threads, and in used memory.
#define EIGEN_USE_THREADS

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/local_mha.hpp>

#include "support/differences.hpp"
#include "support/library.hpp"
#include "support/random_case.hpp"

namespace layer_options_test {

using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalMHAParameters;
using local_mha::Tensor;
using reference::Array;
using reference::Int;
using support::array;
using support::Length;
using support::tensor;

template <typename Real>
struct Result {
  Array<Real> y;
  Array<Real> probabilities;   // [B, H, N, N]
  Real largest_magnitude = 0;  // of a score's terms
};

/// The whole layer for one position after the other.
template <typename Real>
class Naive {
 public:
  Naive(const LocalMHAConfig& config, const reference::Parameters<Real>& parameters)
      : c_(config), p_(parameters) {}

  Result<Real> operator()(const reference::LayerInputs<Real>& in) const {
    const Int batch = in.x.shape[0], n = in.x.shape[1];
    Result<Real> result{Array<Real>(in.x.shape), Array<Real>({batch, c_.heads, n, n})};
    for (Int b = 0; b < batch; ++b) {
      std::vector<std::vector<Real>> x;
      std::vector<std::vector<Real>> q, k, v;
      for (Int i = 0; i < n; ++i) {
        x.push_back(normed_input(&in.x.data[in.x.offset(b, i, 0)]));
        const auto qkv = linear(x.back(), "to_qkv");
        const auto inner = qkv.size() / 3;
        const auto part = [&](std::size_t j) {
          return std::vector<Real>(qkv.begin() + static_cast<long>(j * inner),
                                   qkv.begin() + static_cast<long>((j + 1) * inner));
        };
        q.push_back(normed(part(0), "q"));
        k.push_back(normed(part(1), "k"));
        v.push_back(part(2));
      }
      for (Int i = 0; i < n; ++i) {
        std::vector<Real> heads;
        for (Int h = 0; h < c_.heads; ++h) {
          const auto out = attend(in, b, h, i, q, k, v, result);
          const Real gate = c_.gate_values_per_head ? gate_of(x[at(i)], h) : Real(1);
          for (const Real value : out) heads.push_back(gate * value);
        }
        const auto y = linear(heads, "to_out");
        std::copy(y.begin(), y.end(), &result.y.data[result.y.offset(b, i, 0)]);
      }
    }
    return result;
  }

 private:
  static std::size_t at(Int i) { return static_cast<std::size_t>(i); }
  const Array<Real>& weight(const std::string& name) const { return p_.at(name); }

  std::vector<Real> linear(const std::vector<Real>& x, const std::string& name) const {
    const Array<Real>& w = weight(name + ".weight");
    std::vector<Real> y(at(w.shape[0]), Real(0));
    for (Int o = 0; o < w.shape[0]; ++o) {
      for (Int c = 0; c < w.shape[1]; ++c) y[at(o)] += w(o, c) * x[at(c)];
      if (p_.count(name + ".bias") > 0) y[at(o)] += weight(name + ".bias")(o);
    }
    return y;
  }

  Real gate_of(const std::vector<Real>& x, Int h) const {
    Real sum = weight("to_v_gate.0.bias")(h);
    for (Int c = 0; c < c_.dim; ++c) sum += weight("to_v_gate.0.weight")(h, c) * x[at(c)];
    return 1 / (1 + std::exp(-sum));
  }

  std::vector<Real> normed_input(const Real* from) const {
    std::vector<Real> x(from, from + c_.dim);
    if (!c_.prenorm) return x;
    const bool rms = c_.norm.kind == local_mha::NormKind::rms;
    Real mean = 0, square = 0;
    for (const Real value : x) mean += rms ? 0 : value / static_cast<Real>(c_.dim);
    for (const Real value : x) square += (value - mean) * (value - mean);
    const Real root =
        std::sqrt(square / static_cast<Real>(c_.dim) + static_cast<Real>(c_.norm.eps));
    for (Int c = 0; c < c_.dim; ++c)
      x[at(c)] = (x[at(c)] - mean) / root * weight("norm.weight")(c) +
                 (rms ? Real(0) : weight("norm.bias")(c));
    return x;
  }

  std::vector<Real> normed(std::vector<Real> x, const std::string& which) const {
    using local_mha::QkNormKind;
    if (c_.qk_norm.kind == QkNormKind::rms || c_.qk_norm.kind == QkNormKind::rms_all) {
      const auto& w = weight(which + "_norm.weight");
      const bool all = c_.qk_norm.kind == QkNormKind::rms_all;
      const std::size_t together = all ? x.size() : at(c_.dim_head);
      for (std::size_t first = 0; first < x.size(); first += together) {
        Real square = 0;
        for (std::size_t c = 0; c < together; ++c) square += x[first + c] * x[first + c];
        const Real root =
            std::sqrt(square / static_cast<Real>(together) + static_cast<Real>(c_.qk_norm.eps));
        for (std::size_t c = 0; c < together; ++c) x[first + c] *= w.data[c] / root;
      }
      return x;
    }
    if (!l2()) return x;
    for (Int h = 0; h < c_.heads; ++h) {
      Real square = 0;
      for (Int c = 0; c < c_.dim_head; ++c)
        square += x[at(h * c_.dim_head + c)] * x[at(h * c_.dim_head + c)];
      const Real norm = std::max(std::sqrt(square), static_cast<Real>(1e-12L));
      for (Int c = 0; c < c_.dim_head; ++c)
        x[at(h * c_.dim_head + c)] *= weight(which + "_scale")(c) / norm;
    }
    return x;
  }

  bool sees(Int i, Int j) const {
    const Int w = c_.window_size, back = c_.look_backward;
    const Int ahead = c_.look_forward.value_or(c_.causal ? 0 : 1);
    if (c_.causal && j > i) return false;
    if (j / w < i / w - back || j / w > i / w + ahead) return false;
    return !c_.exact_windowsize || (i - j <= back * w && j - i <= ahead * w);
  }

  bool l2() const { return c_.qk_rmsnorm || c_.qk_norm.kind == local_mha::QkNormKind::l2; }

  double softmax_scale() const {
    if (c_.scale) return *c_.scale;
    if (l2()) return c_.qk_scale;
    return 1 / std::sqrt(static_cast<double>(c_.dim_head));
  }

  // The score of query i and key j, in front of the bias.
  Real score(const Real* q, const Real* k, Int distance, Real& largest) const {
    const auto& rotary = c_.rotary;
    const Int turned = c_.use_rotary_pos_emb ? rotary.rotary_dim.value_or(c_.dim_head) : 0;
    const bool halves = rotary.pairing == local_mha::RotaryPairing::halves;
    Real sum = 0, size = 0;
    for (Int m = 0; m < turned / 2; ++m) {
      const Int first = halves ? m : 2 * m;
      const Int second = halves ? m + turned / 2 : 2 * m + 1;
      const Real frequency = rotary.inv_freq.empty()
                                 ? std::pow(static_cast<Real>(rotary.theta),
                                            static_cast<Real>(-2 * m) / static_cast<Real>(turned))
                                 : static_cast<Real>(rotary.inv_freq[at(m)]);
      const Real angle = static_cast<Real>(distance) * frequency;
      auto factor = static_cast<Real>(rotary.factor * rotary.factor);
      if (c_.use_xpos) {
        const Real base =
            static_cast<Real>(c_.xpos_scale_base.value_or(std::sqrt(static_cast<double>(c_.dim))));
        const Real d = static_cast<Real>(c_.dim_head);
        factor = std::pow((static_cast<Real>(2 * m) + static_cast<Real>(0.4L) * d) /
                              (static_cast<Real>(1.4L) * d),
                          static_cast<Real>(distance) / base);
      }
      const Real along = q[first] * k[first] + q[second] * k[second];
      const Real across = q[first] * k[second] - q[second] * k[first];
      sum += factor * (along * std::cos(angle) + across * std::sin(angle));
      size += factor * (std::abs(q[first] * k[first]) + std::abs(q[second] * k[second]) +
                        std::abs(q[first] * k[second]) + std::abs(q[second] * k[first]));
    }
    for (Int c = turned; c < c_.dim_head; ++c) {
      sum += q[c] * k[c];
      size += std::abs(q[c] * k[c]);
    }
    const Real scale = static_cast<Real>(softmax_scale());
    largest = std::max(largest, std::abs(scale) * size);
    return scale * sum;
  }

  std::vector<Real> attend(const reference::LayerInputs<Real>& in, Int b, Int h, Int i,
                           const std::vector<std::vector<Real>>& q,
                           const std::vector<std::vector<Real>>& k,
                           const std::vector<std::vector<Real>>& v, Result<Real>& result) const {
    const Int w = c_.window_size, n = static_cast<Int>(q.size());
    const Int ahead = c_.look_forward.value_or(c_.causal ? 0 : 1);
    std::vector<std::pair<Real, Int>> scores;
    Real most = -std::numeric_limits<Real>::infinity();
    for (Int j = 0; j < n; ++j) {
      if (!sees(i, j) || (!in.masked.empty() && in.masked[at(b * n + j)] != 0)) continue;
      Real s = score(&q[at(i)][at(h * c_.dim_head)], &k[at(j)][at(h * c_.dim_head)],
                     i - j + ahead * w, result.largest_magnitude);
      if (!in.bias.empty())
        s += in.bias(h % in.bias.shape[0], i % w, j - (i / w - c_.look_backward) * w);
      scores.emplace_back(s, j);
      most = std::max(most, s);
    }
    Real sum = 0;
    std::vector<Real> out(at(c_.dim_head), Real(0));
    for (auto& [s, j] : scores) sum += s = std::exp(s - most);
    for (const auto& [s, j] : scores) {
      result.probabilities(b, h, i, j) = s / sum;
      for (Int c = 0; c < c_.dim_head; ++c)
        out[at(c)] += s / sum * v[at(j)][at(h * c_.dim_head + c)];
    }
    return out;
  }

  const LocalMHAConfig& c_;
  const reference::Parameters<Real>& p_;
};

/// A random layer with an option of this test.
struct Option {
  const char* name;
  std::function<void(Random&, LocalMHAConfig&)> set;
};

void set_biases(Random& random, LocalMHAConfig& config) {
  config.qkv_bias = random.chance(0.75);
  config.out_bias = !config.qkv_bias || random.chance(0.5);
}

void set_rotary(Random& random, LocalMHAConfig& config) {
  auto& rotary = config.rotary;
  rotary.theta = random.pick({1.0, 500.0, 10000.0, 1e6});
  config.use_rotary_pos_emb = config.dim_head > 1;
  config.use_xpos = config.use_xpos && config.dim_head % 2 == 0;
  if (!config.use_rotary_pos_emb || (config.use_xpos && random.chance(0.5))) return;
  config.use_xpos = false;
  if (config.dim_head % 2 != 0 || random.chance(0.6))
    rotary.rotary_dim = 2 * random.integer(1, config.dim_head / 2);
  if (random.chance(0.5)) rotary.pairing = local_mha::RotaryPairing::interleaved;
  if (random.chance(0.4))
    for (Index m = 0; m < rotary.rotary_dim.value_or(config.dim_head) / 2; ++m)
      rotary.inv_freq.push_back(random.uniform(-0.1, 1));
  if (random.chance(0.4)) rotary.factor = random.uniform(0.5, 1.5);
}

void set_scale(Random& random, LocalMHAConfig& config) {
  config.scale = random.pick({0.0, 0.2, 1.0, -0.7});
}

void set_qk_norm(Random& random, LocalMHAConfig& config) {
  using local_mha::QkNormKind;
  config.qk_norm.kind = random.pick(
      {QkNormKind::rms, QkNormKind::rms, QkNormKind::rms_all, QkNormKind::rms_all, QkNormKind::l2});
  config.qk_norm.eps = random.pick({1e-6, 1e-2, 1.0});
  config.qk_rmsnorm = false;
}

void set_norm(Random& random, LocalMHAConfig& config) {
  config.prenorm = config.dim > 2;
  config.norm = {
      .kind = random.chance(0.75) ? local_mha::NormKind::rms : local_mha::NormKind::layer,
      .eps = random.pick({1e-6, 1e-5, 1e-3})};
}

const std::vector<Option>& options() {
  static const std::vector<Option> all = {
      {"Biases", set_biases},
      {"Rotary", set_rotary},
      {"Scale", set_scale},
      {"QkNorm", set_qk_norm},
      {"Norm", set_norm},
      {"All",
       [](Random& random, LocalMHAConfig& config) {
         for (const auto& set : {set_biases, set_rotary, set_scale, set_qk_norm, set_norm})
           if (random.chance(0.6)) set(random, config);
       }},
  };
  return all;
}

support::LayerCase option_case(const Option& option, std::uint64_t seed,
                               Length length = Length::Short) {
  support::LayerCase c = support::layer_case(seed, length);
  Random random(seed + 1000);
  option.set(random, c.config);
  c.parameters = support::random_parameters(
      random, support::named<double>(LocalMHAParameters<double>::zeros(c.config)));
  return c;
}

std::string describe(const LocalMHAConfig& c) {
  std::ostringstream text;
  text << support::describe(c) << ", qkv_bias " << c.qkv_bias << ", out_bias " << c.out_bias
       << ", rotary " << c.rotary.theta << " dim " << c.rotary.rotary_dim.value_or(-1)
       << " pairing " << static_cast<int>(c.rotary.pairing) << " factor " << c.rotary.factor
       << " given " << c.rotary.inv_freq.size() << ", scale " << c.scale.value_or(-99)
       << ", qk_norm " << static_cast<int>(c.qk_norm.kind) << " eps " << c.qk_norm.eps << ", norm "
       << static_cast<int>(c.norm.kind) << " eps " << c.norm.eps;
  return text.str();
}

template <typename Scalar>
LocalMHA<Scalar> layer(const support::LayerCase& c) {
  return LocalMHA<Scalar>(c.config, support::layer_parameters<Scalar>(c.config, c.parameters));
}

template <typename Real>
Result<Real> naive(const support::LayerCase& c) {
  const auto parameters = reference::cast<Real>(c.parameters);
  return Naive<Real>(c.config, parameters)(support::cast<Real>(c.in));
}

/// What the library is given.
template <typename Scalar>
struct Inputs {
  explicit Inputs(const support::LayerCase& c)
      : x(tensor<Scalar, 3>(c.in.x)),
        bias_numbers(support::bias_tensor<Scalar>(c.in.bias)),
        mask(support::padding_mask(c.in.masked, c.in.x.shape[0], c.in.x.shape[1])) {}
  std::optional<local_mha::TensorView<const Scalar, 3>> bias() const {
    return support::optional_view(bias_numbers);
  }
  Tensor<Scalar, 3> x;
  Tensor<Scalar, 3> bias_numbers;
  local_mha::PaddingMask mask;
};

template <typename Scalar>
class LayerOptions : public testing::Test {};
TYPED_TEST_SUITE(LayerOptions, support::Scalars, support::ScalarNames);

template <typename Scalar>
void expect_naive(const Option& option, Length length, std::uint64_t cases) {
  int failures = 0;
  for (std::uint64_t seed = 1; seed <= random_cases(cases) && failures < 3; ++seed) {
    const auto c = option_case(option, seed, length);
    const auto precise = naive<support::Precise<Scalar>>(c);
    const auto rough = naive<Scalar>(c);
    const Inputs<Scalar> in(c);
    // Biases are values of their own.
    const double size = std::max({c.size(), 1.0, static_cast<double>(support::largest(rough.y))});
    const auto result =
        support::close(array(layer<Scalar>(c).forward(in.x, in.mask, in.bias())), precise.y,
                       support::tolerance<Scalar>(support::largest_error(rough.y, precise.y), size,
                                                  static_cast<double>(precise.largest_magnitude) +
                                                      support::largest(c.in.bias)));
    if (!result) ++failures;
    EXPECT_TRUE(result) << option.name << ", seed " << seed << ", N " << c.in.x.shape[1] << ", "
                        << describe(c.config);
  }
}

TYPED_TEST(LayerOptions, AreWhatTheyAreCalled) {
  for (const Option& option : options()) expect_naive<TypeParam>(option, Length::Short, 100);
}

TYPED_TEST(LayerOptions, AreWhatTheyAreCalledInLongSequences) {
  for (const Option& option : options()) expect_naive<TypeParam>(option, Length::Long, 6);
}

template <typename Scalar>
struct Gradients {
  Tensor<Scalar, 3> x;
  LocalMHAParameters<Scalar> parameters;
  Tensor<Scalar, 3> bias;
};

template <typename Scalar, typename Device>
Gradients<Scalar> gradients_of(const Device& device, const support::LayerCase& c,
                               const Array<double>& weights,
                               typename LocalMHA<Scalar>::Workspace& workspace,
                               typename LocalMHA<Scalar>::Saved& saved) {
  const auto mha = layer<Scalar>(c);
  const Inputs<Scalar> in(c);
  Tensor<Scalar, 3> y(in.x.dimensions());
  mha.forward_saving_into(device, y, workspace, saved, in.x, in.mask, in.bias());
  EXPECT_TRUE(support::same_bits(y, mha.forward(in.x, in.mask, in.bias())));
  Gradients<Scalar> g{Tensor<Scalar, 3>(in.x.dimensions()),
                      LocalMHAParameters<Scalar>::zeros(c.config), in.bias_numbers};
  g.bias.setZero();
  mha.backward_into(device, g.x, workspace, g.parameters, saved, tensor<Scalar, 3>(weights), in.x,
                    in.mask, in.bias(), {}, in.bias() ? &g.bias : nullptr);
  return g;
}

template <typename Scalar>
void expect_gradients(const Option& option, std::uint64_t seed, Length length = Length::Short) {
  const auto c = option_case(option, seed, length);
  if (c.in.x.data.empty()) return;
  Random random(seed);
  const auto weights = random.array(c.in.x.shape);
  // What other configurations left in them must not matter.
  static typename LocalMHA<Scalar>::Workspace workspace;
  static typename LocalMHA<Scalar>::Saved saved;
  const auto g = gradients_of<Scalar>(Eigen::DefaultDevice(), c, weights, workspace, saved);
  const auto parameters = reference::cast<long double>(c.parameters);
  const auto in = support::cast<long double>(c.in);
  const auto loss = [&](const auto& p, const auto& inputs) {
    const auto y = Naive<long double>(c.config, p)(inputs).y;
    long double sum = 0;
    for (std::size_t i = 0; i < y.data.size(); ++i)
      sum += y.data[i] * static_cast<long double>(weights.data[i]);
    return sum;
  };
  const double largest_score =
      static_cast<double>(Naive<long double>(c.config, parameters)(in).largest_magnitude) +
      support::largest(c.in.bias);
  const double tolerance = support::tolerance_of_differences<Scalar> * (1 + largest_score);
  const double x = std::max(3e-3, support::largest(c.in.x) / 3);
  const double inner = c.config.prenorm ? 1 : c.config.qkv_bias ? std::max(1.0, x) : x;
  const double size = c.config.out_bias ? std::max(1.0, inner) : inner;
  const support::Sizes of_x{inner / x, size}, of_weights{inner, size};
  const std::string what =
      std::string(option.name) + ", seed " + std::to_string(seed) + ", " + describe(c.config);
  support::expect_gradient(
      random, array(g.x), c.in.x,
      [&](const auto& values) {
        auto moved = in;
        moved.x = values;
        return loss(parameters, moved);
      },
      tolerance, what + ", x", of_x);
  if (!c.in.bias.empty())
    support::expect_gradient(
        random, array(g.bias), c.in.bias,
        [&](const auto& values) {
          auto moved = in;
          moved.bias = values;
          return loss(parameters, moved);
        },
        tolerance, what + ", attn_bias", of_weights);
  for (const auto& [name, gradient] : support::named<Scalar>(g.parameters))
    support::expect_gradient(
        random, gradient, c.parameters.at(name),
        [&, moving = name](const auto& values) {
          auto moved = parameters;
          moved[moving] = values;
          return loss(moved, in);
        },
        tolerance, what + ", " + name, of_weights);
}

TYPED_TEST(LayerOptions, HaveTheirGradients) {
  for (const Option& option : options()) {
    int compared = 0;
    for (std::uint64_t seed = 1; compared < 10; ++seed) {
      const auto c = option_case(option, seed);
      if (c.in.x.data.size() > 400 || c.in.x.empty()) continue;
      ++compared;
      expect_gradients<TypeParam>(option, seed);
    }
  }
}

TYPED_TEST(LayerOptions, HaveTheirGradientsInALongSequence) {
  expect_gradients<TypeParam>(options().back(), 1, Length::Long);
}

TYPED_TEST(LayerOptions, Stream) {
  using Scalar = TypeParam;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  for (const Option& option : options())
    for (std::uint64_t seed = 1; seed <= 40; ++seed) {
      const auto c = option_case(option, seed, seed % 10 == 0 ? Length::Long : Length::Short);
      const auto mha = layer<Scalar>(c);
      const Inputs<Scalar> in(c);
      const auto whole = mha.forward(in.x, in.mask, in.bias());
      const Index batch = c.in.x.shape[0], n = c.in.x.shape[1], dim = c.config.dim;
      const double tolerance =
          32 * std::numeric_limits<Scalar>::epsilon() *
          std::max({c.size(), 1.0, static_cast<double>(support::largest(array(whole)))}) *
          (1 + static_cast<double>(naive<double>(c).largest_magnitude) +
           support::largest(c.in.bias));
      Random random(seed);
      for (const Index chunk : {1, 3, 7, 0}) {  // 0: of any size
        typename LocalMHA<Scalar>::Stream stream(mha, {.batch = batch}, in.bias());
        Tensor<Scalar, 3> together(whole.dimensions());
        Index answered = 0;
        const auto take = [&](const Tensor<Scalar, 3>& y) {
          for (Index b = 0; b < batch; ++b)
            for (Index i = 0; i < y.dimension(1); ++i)
              for (Index d = 0; d < dim; ++d) together(b, answered + i, d) = y(b, i, d);
          answered += y.dimension(1);
        };
        for (Index i = 0; i < n;) {
          const Index size = std::min<Index>(chunk > 0 ? chunk : random.integer(1, 100), n - i);
          Tensor<Scalar, 3> x(batch, size, dim);
          Tensor<bool, 2> masked(batch, size);
          for (Index b = 0; b < batch; ++b)
            for (Index r = 0; r < size; ++r) {
              masked(b, r) =
                  !c.in.masked.empty() && c.in.masked[static_cast<std::size_t>(b * n + i + r)] != 0;
              for (Index d = 0; d < dim; ++d) x(b, r, d) = in.x(b, i + r, d);
            }
          take(stream.push(x, {.mask = local_mha::PaddingMask::masked(masked)}));
          i += size;
        }
        take(stream.flush());
        ASSERT_EQ(answered, n);
        if (chunk == 7) {  // on threads, which share the heads
          typename LocalMHA<Scalar>::Stream shared(mha, {.batch = batch, .max_threads = 3},
                                                   in.bias());
          const Tensor<Scalar, 3> ahead = shared.push(in.x, {.mask = in.mask, .device = device});
          const Tensor<Scalar, 3> behind = shared.flush(device);
          typename LocalMHA<Scalar>::Stream alone(mha, {.batch = batch}, in.bias());
          EXPECT_TRUE(support::same_bits(ahead, alone.push(in.x, {.mask = in.mask})));
          EXPECT_TRUE(support::same_bits(behind, alone.flush()));
        }
        EXPECT_TRUE(support::close(array(together), array(whole), tolerance))
            << option.name << ", seed " << seed << ", chunks of " << chunk << ", "
            << describe(c.config);
      }
    }
}

// The same bits on any number of threads, and whatever the memory held: NaN from a call before.
TYPED_TEST(LayerOptions, GiveTheSameBitsOnThreadsAndInUsedMemory) {
  using Scalar = TypeParam;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  for (const Option& option : options())
    for (std::uint64_t seed = 1; seed <= 30; ++seed) {
      const auto c = option_case(option, seed, seed % 5 == 0 ? Length::Long : Length::Short);
      Random random(seed);
      const auto weights = random.array(c.in.x.shape);
      typename LocalMHA<Scalar>::Workspace workspace, used;
      typename LocalMHA<Scalar>::Saved saved, kept;
      const auto one = gradients_of<Scalar>(Eigen::DefaultDevice(), c, weights, workspace, saved);
      {
        const auto mha = layer<Scalar>(c);
        Tensor<Scalar, 3> nothing(one.x.dimensions()), y(one.x.dimensions());
        nothing.setConstant(std::numeric_limits<Scalar>::quiet_NaN());
        mha.forward_saving_into(device, y, used, kept, nothing);
        auto ignored = LocalMHAParameters<Scalar>::zeros(c.config);
        mha.backward_into(device, y, used, ignored, kept, nothing, nothing);
      }
      const auto other = gradients_of<Scalar>(device, c, weights, used, kept);
      const std::string what =
          std::string(option.name) + ", seed " + std::to_string(seed) + ", " + describe(c.config);
      EXPECT_TRUE(support::same_bits(one.x, other.x)) << what;
      const auto of_other = support::named<Scalar>(other.parameters);
      for (const auto& [name, gradient] : support::named<Scalar>(one.parameters))
        EXPECT_EQ(gradient.data, of_other.at(name).data) << what << ", " << name;
    }
}

TYPED_TEST(LayerOptions, CountInTheProbabilities) {
  using Scalar = TypeParam;
  for (const Option& option : options())
    for (std::uint64_t seed = 1; seed <= 60; ++seed) {
      const auto c = option_case(option, seed);
      const Inputs<Scalar> in(c);
      const auto precise = naive<support::Precise<Scalar>>(c);
      const double tolerance = support::tolerance<Scalar>(
          support::largest_error(naive<Scalar>(c).probabilities, precise.probabilities), 1,
          static_cast<double>(precise.largest_magnitude) + support::largest(c.in.bias));
      EXPECT_TRUE(
          support::close(array(layer<Scalar>(c).attention_probabilities(in.x, in.mask, in.bias())),
                         precise.probabilities, tolerance))
          << option.name << ", seed " << seed << ", " << describe(c.config);
    }
}

// LocalAttention alone, as a layer whose projections take q, k and v from its input.
template <typename Scalar>
struct AttentionAsLayer {
  AttentionAsLayer(const local_mha::RotaryConfig& rotary, Index dim_head, bool causal)
      : config{.dim = 3 * dim_head,
               .window_size = 40,
               .dim_head = dim_head,
               .heads = 1,
               .causal = causal,
               .rotary = rotary},
        attention(attention_config(config)),
        layer([&] {
          auto parameters = LocalMHAParameters<Scalar>::zeros(config);
          parameters.to_qkv.setIdentity();
          parameters.to_out.setIdentity();
          return LocalMHA<Scalar>(config, parameters);
        }()) {}

  /// Channels `[part·D, …)` as those of a head.
  Tensor<Scalar, 4> part(const Tensor<Scalar, 3>& x, Index part) const {
    Tensor<Scalar, 4> to(x.dimension(0), 1, x.dimension(1), config.dim_head);
    for (Index b = 0; b < to.dimension(0); ++b)
      for (Index i = 0; i < to.dimension(2); ++i)
        for (Index c = 0; c < config.dim_head; ++c)
          to(b, 0, i, c) = x(b, i, part * config.dim_head + c);
    return to;
  }

  LocalMHAConfig config;
  local_mha::LocalAttention<Scalar> attention;
  LocalMHA<Scalar> layer;
};

TYPED_TEST(LayerOptions, OfRotaryAreThoseOfTheAttention) {
  using Scalar = TypeParam;
  const double tolerance = 64 * std::numeric_limits<Scalar>::epsilon();
  for (std::uint64_t seed = 1; seed <= 24; ++seed) {
    Random random(seed);
    LocalMHAConfig drawn{.dim = 1, .window_size = 1};
    drawn.dim_head = random.pick<Index>({2, 3, 8, 17, 64});
    set_rotary(random, drawn);
    const AttentionAsLayer<Scalar> both(drawn.rotary, drawn.dim_head, seed % 2 == 0);
    const Index n = random.integer(1, 300);
    const auto x = tensor<Scalar, 3>(random.array({2, n, both.config.dim}));
    const auto q = both.part(x, 0), k = both.part(x, 1), v = both.part(x, 2);

    typename LocalMHA<Scalar>::Saved of_layer;
    const auto y = both.layer.forward_saving(of_layer, x);
    const auto saved = both.attention.forward_saving(q, k, v);
    EXPECT_TRUE(support::close(array(saved.out), array(both.part(y, 0)), tolerance)) << seed;

    auto grad_y = tensor<Scalar, 3>(random.array({2, n, both.config.dim}));
    auto ignored = LocalMHAParameters<Scalar>::zeros(both.config);
    const auto grad_x = both.layer.backward(ignored, of_layer, grad_y, x);
    const auto g = both.attention.backward(saved, both.part(grad_y, 0), q, k, v);
    const Tensor<Scalar, 4>* const grads[] = {&g.q, &g.k, &g.v};
    for (Index part = 0; part < 3; ++part)
      EXPECT_TRUE(
          support::close(array(*grads[part]), array(both.part(grad_x, part)), 16 * tolerance))
          << seed << ", part " << part;

    typename local_mha::LocalAttention<Scalar>::Stream stream(both.attention, 1,
                                                              both.config.dim_head, {.batch = 2});
    const auto first = stream.push(q, k, v);
    const auto rest = stream.flush();
    for (Index b = 0; b < 2; ++b)
      for (Index i = 0; i < n; ++i)
        for (Index c = 0; c < both.config.dim_head; ++c) {
          const Index in = first.dimension(2);
          const Scalar got = i < in ? first(b, 0, i, c) : rest(b, 0, i - in, c);
          ASSERT_TRUE(support::near(got, saved.out(b, 0, i, c), tolerance)) << seed;
        }
  }
}

// Two keys at distances that differ: the score depends on nothing but the distance, at any place.
TEST(RotaryOptions, RowsOfTablesAreTheFormula) {
  for (const bool interleaved : {false, true}) {
    local_mha::RotaryConfig rotary{.theta = 100, .rotary_dim = 4, .factor = 1.25};
    if (interleaved) rotary.pairing = local_mha::RotaryPairing::interleaved;
    const local_mha::RotaryEmbedding<double> embedding(7, {}, rotary);
    Random random(3);
    local_mha::RowMatrix<double> q(5, 7), k(5, 7);
    for (Index i = 0; i < q.size(); ++i)
      q.data()[i] = random.normal(), k.data()[i] = random.normal();
    const auto scores =
        (embedding.rotate_queries(q, 1000) * embedding.rotate_keys(k).transpose()).eval();
    for (Index i = 0; i < 5; ++i)
      for (Index j = 0; j < 5; ++j) {
        double expected = 0;
        for (Index m = 0; m < 2; ++m) {
          const Index a = interleaved ? 2 * m : m, b = interleaved ? 2 * m + 1 : m + 2;
          const double angle = static_cast<double>(1000 + i - j) * (m == 0 ? 1 : 0.1);
          expected += 1.25 * 1.25 *
                      ((q(i, a) * k(j, a) + q(i, b) * k(j, b)) * std::cos(angle) +
                       (q(i, a) * k(j, b) - q(i, b) * k(j, a)) * std::sin(angle));
        }
        for (Index c = 4; c < 7; ++c) expected += q(i, c) * k(j, c);
        EXPECT_NEAR(scores(i, j), expected, 1e-12);
      }
  }
}

// As qk_rmsnorm.
TEST(QkNormOptions, OfLengthsAreQkRmsnorm) {
  LocalMHAConfig named{.dim = 24, .window_size = 5, .dim_head = 8, .heads = 3, .qk_rmsnorm = true};
  LocalMHAConfig kind = named;
  kind.qk_rmsnorm = false;
  kind.qk_norm.kind = local_mha::QkNormKind::l2;
  EXPECT_EQ(named, kind);
  Random random(1);
  const auto x = tensor<double, 3>(random.array({1, 20, 24}));
  EXPECT_TRUE(support::same_bits(LocalMHA<double>(named, 3).forward(x),
                                 LocalMHA<double>(kind, 3).forward(x)));
}

// Squares that leave the scalar's range, and rows that are 0.
TYPED_TEST(LayerOptions, OfNormsTakeNumbersOfAnySize) {
  using Scalar = TypeParam;
  const auto huge = static_cast<Scalar>(std::sqrt(std::numeric_limits<Scalar>::max()) * 16);
  for (const auto kind : {local_mha::QkNormKind::rms, local_mha::QkNormKind::rms_all}) {
    LocalMHAConfig config{.dim = 24, .window_size = 5, .dim_head = 6, .heads = 3};
    config.qk_norm.kind = kind;
    const LocalMHA<Scalar> mha(config, 5);
    Random random(1);
    auto x = tensor<Scalar, 3>(random.array({1, 20, 24}));
    const auto y = mha.forward(x);
    // Normalized queries and keys do not depend on the size of x, and values are as large as x.
    Tensor<Scalar, 3> large = x * huge;
    const Tensor<Scalar, 3> of_large = mha.forward(large) / huge;
    EXPECT_TRUE(support::close(array(of_large), array(y), 1e-3));
    x.setZero();
    typename LocalMHA<Scalar>::Saved saved;
    EXPECT_EQ(support::largest(array(mha.forward_saving(saved, x))), Scalar(0));
    auto gradients = LocalMHAParameters<Scalar>::zeros(config);
    const auto grad_x = mha.backward(gradients, saved, y, x);
    for (const Scalar g : array(grad_x).data) EXPECT_TRUE(std::isfinite(g));
  }
}

// The state of a stream says of which options it is.
TEST(StreamStates, AreThoseOfTheirOptions) {
  const LocalMHAConfig plain{
      .dim = 24, .window_size = 5, .dim_head = 8, .heads = 3, .prenorm = true};
  std::vector<LocalMHAConfig> configs(20, plain);
  configs[1].qkv_bias = true;
  configs[2].out_bias = true;
  configs[3].rotary.theta = 100;
  configs[4].rotary.rotary_dim = 4;
  configs[5].rotary.pairing = local_mha::RotaryPairing::interleaved;
  configs[6].rotary.factor = 1.5;
  configs[7].rotary.inv_freq = {1, 0.5, 0.25, 0.125};
  configs[8].scale = 1;
  configs[9].qk_norm.kind = local_mha::QkNormKind::rms;
  configs[10].qk_norm.kind = local_mha::QkNormKind::rms_all;
  configs[11].norm.kind = local_mha::NormKind::rms;
  configs[12].kv_heads = 1;
  configs[13].sinks = true;
  configs[14].first_keys = 2;
  configs[15].score.soft_cap = 4;
  configs[16].score.alibi_slopes = {1, 0.5, 0.25};
  for (std::size_t i = 17; i < 20; ++i) {
    configs[i].window_size = 0;
    configs[i].token_window = {.left = i == 18 ? 6 : 5, .right = 5};
  }
  configs[19].relative_bias = true;
  Tensor<float, 3> x(1, 9, 24);
  x.setRandom();
  for (std::size_t i = 0; i < configs.size(); ++i) {
    LocalMHA<float>::Stream from(LocalMHA<float>{configs[i]});
    from.push(x);
    std::ostringstream saved;
    from.save(saved);
    for (std::size_t j = 0; j < configs.size(); ++j) {
      LocalMHA<float>::Stream to(LocalMHA<float>{configs[j]});
      std::istringstream in(saved.str());
      if (i == j) {
        to.load(in);
        EXPECT_TRUE(support::same_bits(from.push(x), to.push(x))) << i;
      } else {
        EXPECT_THROW(to.load(in), std::invalid_argument) << i << ", " << j;
      }
    }
  }
}

TEST(Equality, CountsTheOptionsThatHaveAUse) {
  const LocalMHAConfig plain{.dim = 8, .window_size = 4, .dim_head = 4};
  LocalMHAConfig other = plain;
  EXPECT_EQ(plain, other);
  other.rotary.rotary_dim = 4;
  EXPECT_EQ(plain, other);
  other.rotary.rotary_dim = 2;
  EXPECT_NE(plain, other);
  other.use_rotary_pos_emb = false;
  LocalMHAConfig without = plain;
  without.use_rotary_pos_emb = false;
  EXPECT_EQ(without, other);
  other = plain;
  other.rotary.theta = 100;
  EXPECT_NE(plain, other);
  LocalMHAConfig given = plain;
  given.rotary.inv_freq = other.rotary.inv_freq = {1, 0.5};
  EXPECT_EQ(given, other);
  other.rotary.inv_freq = {1, 0.25};
  EXPECT_NE(given, other);
  other = plain;
  other.scale = 2;
  EXPECT_NE(plain, other);
  LocalMHAConfig scaled = other;
  other.qk_rmsnorm = scaled.qk_rmsnorm = true;
  scaled.qk_scale = 3;
  EXPECT_EQ(scaled, other);
  scaled.qk_rmsnorm = false;
  scaled.qk_norm = {.kind = local_mha::QkNormKind::l2, .eps = 1};
  EXPECT_EQ(scaled, other);
  scaled.qk_norm.kind = local_mha::QkNormKind::rms;
  EXPECT_NE(scaled, other);
  other = scaled;
  EXPECT_EQ(scaled, other);
  other.qk_norm.eps = 2;
  EXPECT_NE(scaled, other);
  other = plain;
  other.norm.kind = local_mha::NormKind::rms;
  EXPECT_EQ(plain, other);
  LocalMHAConfig normed = plain;
  normed.prenorm = other.prenorm = true;
  EXPECT_NE(normed, other);
  other = plain;
  other.qkv_bias = true;
  EXPECT_NE(plain, other);
  other = plain;
  other.out_bias = true;
  EXPECT_NE(plain, other);
  other = plain;
  other.kv_heads = plain.heads;
  EXPECT_EQ(plain, other);
  other.kv_heads = 1;
  EXPECT_NE(plain, other);
  for (const auto& change : std::vector<std::function<void(LocalMHAConfig&)>>{
           [](LocalMHAConfig& c) { c.token_window = {.left = 1, .right = 1}; },
           [](LocalMHAConfig& c) { c.score.soft_cap = 1; },
           [](LocalMHAConfig& c) { c.sinks = true; },
           [](LocalMHAConfig& c) { c.relative_bias = true; },
           [](LocalMHAConfig& c) { c.first_keys = 1; }}) {
    other = plain;
    change(other);
    EXPECT_NE(plain, other);
  }
}

}  // namespace layer_options_test
