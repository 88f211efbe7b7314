// SPDX-License-Identifier: MIT
// LocalMHA with what sliding windows can have: token windows, fewer key and value heads, functions
// of scores, sinks, relative biases, first keys and packed sequences. Forward, backward and as a
// stream, against the reference.
#define EIGEN_USE_THREADS

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <local_mha/local_mha.hpp>

#include "reference/gradients.hpp"
#include "support/library.hpp"
#include "support/random_case.hpp"
#include "support/random_sliding_case.hpp"

namespace layer_sliding_test {

using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalMHAParameters;
using local_mha::Tensor;
using local_mha::TokenWindow;
using reference::Array;
using support::array;
using support::ScoreKind;
using support::SlidingLayerCase;
using support::tensor;

/// A random layer of those that the library has: a bias of each head, one function of scores, no
/// global rows.
SlidingLayerCase layer_case(std::uint64_t seed, Index most = 60) {
  SlidingLayerCase c = support::sliding_layer_case(seed, most);
  Random random(seed + 7);
  c.attention.in.global.clear();
  c.options.global_projections = false;
  c.parameters.erase("to_qkv_global.weight");
  c.parameters.erase("to_qkv_global.bias");
  reference::AttentionOptions& o = c.options.attention;
  o.first_position = 0;
  // What a window without a side ahead is.
  if (o.token_window && o.token_window->right == 0) o.causal = true;
  if (c.attention.score_kind == ScoreKind::CappedAlibi) c.attention.score_kind = ScoreKind::SoftCap;
  if (c.attention.score_kind == ScoreKind::ByPlace) c.attention.score_kind = ScoreKind::Alibi;
  if (c.options.relative_bias) {
    Array<double>& bias = c.parameters["relative_bias"];
    const double size = std::max(1e-3, support::largest(bias));
    bias = random.array({c.options.heads, bias.shape[1]}, size);
  }
  c.attention.options = o;
  return c;
}

LocalMHAConfig config_of(const SlidingLayerCase& c) {
  const reference::LayerOptions& o = c.options;
  const reference::AttentionOptions& a = o.attention;
  LocalMHAConfig config{.dim = o.dim, .dim_head = o.dim_head, .heads = o.heads};
  config.dropout = c.attention.dropout;
  config.causal = a.causal;
  if (a.token_window) {
    config.token_window = {a.token_window->left.value_or(TokenWindow::unbounded),
                           a.token_window->right.value_or(TokenWindow::unbounded)};
  } else {
    config.window_size = a.window_size;
    config.look_backward = a.look_backward;
    config.look_forward = a.look_forward;
    config.exact_windowsize = a.exact_windowsize;
  }
  config.prenorm = o.prenorm;
  config.norm.kind = o.prenorm_kind == reference::Prenorm::Rms ? local_mha::NormKind::rms
                                                               : local_mha::NormKind::layer;
  config.norm.eps = o.norm_eps;
  config.qk_norm = {.kind =
                        std::map<reference::QkNorm, local_mha::QkNormKind>{
                            {reference::QkNorm::None, local_mha::QkNormKind::none},
                            {reference::QkNorm::L2, local_mha::QkNormKind::l2},
                            {reference::QkNorm::Rms, local_mha::QkNormKind::rms},
                            {reference::QkNorm::RmsAll, local_mha::QkNormKind::rms_all}}
                            .at(o.qk_norm),
                    .eps = o.qk_norm_eps};
  config.qk_scale = o.qk_scale;
  config.gate_values_per_head = o.gate_values_per_head;
  config.qkv_bias = o.qkv_bias;
  config.out_bias = o.out_bias;
  config.use_rotary_pos_emb = a.rotary;
  config.rotary = {.theta = a.rotary_options.theta,
                   .rotary_dim = a.rotary_options.rotary_dim,
                   .pairing = a.rotary_options.interleaved ? local_mha::RotaryPairing::interleaved
                                                           : local_mha::RotaryPairing::halves,
                   .inv_freq = a.rotary_options.inv_freq,
                   .factor = a.rotary_options.factor};
  config.scale = o.softmax_scale;
  config.kv_heads = o.kv_heads;
  if (c.attention.score_kind == ScoreKind::SoftCap) config.score.soft_cap = c.attention.cap;
  if (c.attention.score_kind == ScoreKind::Alibi)
    config.score.alibi_slopes = c.attention.alibi_slopes;
  config.sinks = o.sinks;
  config.relative_bias = o.relative_bias;
  config.first_keys = a.first_keys;
  return config;
}

/// What the library is given.
template <typename Scalar>
struct Given {
  explicit Given(const SlidingLayerCase& c)
      : layer(config_of(c), support::layer_parameters<Scalar>(config_of(c), c.parameters)),
        x(tensor<Scalar, 3>(c.x)),
        bias_numbers(support::bias_tensor<Scalar>(c.attention.in.bias)),
        mask(support::padding_mask(c.attention.in.masked, c.x.shape[0], c.x.shape[1])),
        cu_seqlens(c.options.attention.cu_seqlens.begin(), c.options.attention.cu_seqlens.end()) {
    if (c.attention.dropout > 0) training = local_mha::Training{.seed = c.attention.dropout_seed};
  }
  std::optional<local_mha::TensorView<const Scalar, 3>> bias() const {
    return support::optional_view(bias_numbers);
  }
  LocalMHA<Scalar> layer;
  Tensor<Scalar, 3> x;
  Tensor<Scalar, 3> bias_numbers;
  local_mha::PaddingMask mask;
  std::optional<local_mha::Training> training;
  std::vector<Index> cu_seqlens;
};

template <typename Real>
struct Expected {
  reference::LayerGradients<Real> of;
  reference::Parameters<Real> gradients;
};
template <typename Real>
Expected<Real> expected(const SlidingLayerCase& c, const Array<double>& grad_y) {
  const auto parameters = reference::cast<Real>(c.parameters);
  Expected<Real> result{{}, reference::zeros_like(parameters)};
  result.of = reference::local_mha_backward(c.options, parameters, c.inputs<Real>(),
                                            reference::cast<Real>(grad_y), result.gradients);
  return result;
}

template <typename Scalar>
struct Gradients {
  Tensor<Scalar, 3> y;
  Tensor<Scalar, 3> x;
  LocalMHAParameters<Scalar> parameters;
  Tensor<Scalar, 3> bias;
};

template <typename Scalar, typename Device>
Gradients<Scalar> gradients_of(const Device& device, const Given<Scalar>& in,
                               const Tensor<Scalar, 3>& grad_y,
                               typename LocalMHA<Scalar>::Workspace& workspace,
                               typename LocalMHA<Scalar>::Saved& saved) {
  Gradients<Scalar> g{Tensor<Scalar, 3>(in.x.dimensions()), Tensor<Scalar, 3>(in.x.dimensions()),
                      LocalMHAParameters<Scalar>::zeros(in.layer.config()), in.bias_numbers};
  g.bias.setZero();
  in.layer.forward_saving_into(device, g.y, workspace, saved, in.x, in.mask, in.bias(), in.training,
                               in.cu_seqlens);
  in.layer.backward_into(device, g.x, workspace, g.parameters, saved, grad_y, in.x, {}, in.bias(),
                         {}, in.bias() ? &g.bias : nullptr);
  return g;
}

template <typename Scalar>
void expect_same_bits(const Gradients<Scalar>& a, const Gradients<Scalar>& b,
                      const std::string& what) {
  EXPECT_TRUE(support::same_bits(a.y, b.y)) << what;
  EXPECT_TRUE(support::same_bits(a.x, b.x)) << what;
  EXPECT_TRUE(support::same_bits(a.bias, b.bias)) << what;
  const auto of_b = support::named<Scalar>(b.parameters);
  for (const auto& [name, gradient] : support::named<Scalar>(a.parameters))
    EXPECT_EQ(gradient.data, of_b.at(name).data) << what << ", " << name;
}

template <typename Scalar>
class LayerSliding : public testing::Test {};
TYPED_TEST_SUITE(LayerSliding, support::Scalars, support::ScalarNames);

// Twice the reference's own error in the same precision, and some roundings of what is added up.
template <typename Scalar, typename Precise>
void expect_close(const Array<Scalar>& got, const Array<Scalar>& rough,
                  const Array<Precise>& precise, double magnitude, double size,
                  const std::string& what) {
  const double most = std::max(size, static_cast<double>(support::largest(precise)));
  EXPECT_TRUE(
      support::close(got, precise,
                     4 * support::largest_error(rough, precise) +
                         16 * std::numeric_limits<Scalar>::epsilon() * (1 + magnitude) * most))
      << what;
}

template <typename Scalar>
void expect_reference(std::uint64_t seed, Index most, std::map<std::string, int>& seen) {
  using Precise = support::Precise<Scalar>;
  const SlidingLayerCase c = layer_case(seed, most);
  const std::string what = "seed " + std::to_string(seed) + ": " + describe(c);
  const Given<Scalar> in(c);
  Random random(seed);
  const Array<double> grad_y = random.array(c.x.shape);
  const auto precise = expected<Precise>(c, grad_y);
  const auto rough = expected<Scalar>(c, grad_y);
  // What other configurations left in them must not matter.
  static typename LocalMHA<Scalar>::Workspace workspace;
  static typename LocalMHA<Scalar>::Saved saved;
  const auto got =
      gradients_of<Scalar>(Eigen::DefaultDevice(), in, tensor<Scalar, 3>(grad_y), workspace, saved);
  EXPECT_TRUE(support::same_bits(
      got.y, in.layer.forward(in.x, in.mask, in.bias(), in.training, in.cu_seqlens)))
      << what;
  const auto attended =
      reference::local_mha(c.options, reference::cast<Precise>(c.parameters), c.inputs<Precise>());
  const double magnitude =
      static_cast<double>(attended.largest_magnitude) + support::largest(c.attention.in.bias) +
      (c.options.relative_bias ? support::largest(c.parameters.at("relative_bias")) : 0) +
      (c.options.sinks ? support::largest(c.parameters.at("sinks")) : 0);
  const double of_x = c.options.prenorm ? 1 : std::max(1e-3, support::largest(c.x));
  expect_close(array(got.y), rough.of.y, precise.of.y, magnitude, std::max(1.0, of_x), what);
  // Through norms of small or large numbers, gradients are as large as the numbers are small.
  const double back = 8 * (1 + magnitude);
  expect_close(array(got.x), rough.of.x, precise.of.x, back, 0, what + ", x");
  if (in.bias())
    expect_close(array(got.bias), rough.of.bias, precise.of.bias, back, std::max(1.0, of_x),
                 what + ", attn_bias");
  for (const auto& [name, gradient] : support::named<Scalar>(got.parameters)) {
    expect_close(gradient, rough.gradients.at(name), precise.gradients.at(name), back,
                 std::max(1.0, of_x), what + ", " + name);
    ++seen[name];
  }
  const LocalMHAConfig& config = in.layer.config();
  seen["token_window"] += config.token_window.has_value();
  seen["unbounded"] += config.token_window && !config.token_window->bounded();
  seen["kv_heads"] += config.kv_heads.has_value();
  seen["soft_cap"] += config.score.soft_cap.has_value();
  seen["alibi"] += !config.score.alibi_slopes.empty();
  seen["first_keys"] += config.first_keys > 0;
  seen["cu_seqlens"] += !in.cu_seqlens.empty();
  seen["dropout"] += in.training.has_value();
}

TYPED_TEST(LayerSliding, IsTheReferenceForwardAndBackward) {
  std::map<std::string, int> seen;
  for (std::uint64_t seed = 1; seed <= random_cases(400); ++seed)
    expect_reference<TypeParam>(seed, 60, seen);
  for (const char* option : {"token_window", "unbounded", "kv_heads", "soft_cap", "alibi", "sinks",
                             "relative_bias", "first_keys", "cu_seqlens", "dropout"})
    EXPECT_GT(seen[option], static_cast<int>(random_cases(400)) / 40) << option;
}

TYPED_TEST(LayerSliding, IsTheReferenceInLongSequences) {
  std::map<std::string, int> seen;
  for (std::uint64_t seed = 1001; seed <= 1012; ++seed)
    expect_reference<TypeParam>(seed, 400, seen);
}

// The same bits on any number of threads, and whatever the memory held: NaN from a call before.
TYPED_TEST(LayerSliding, GivesTheSameBitsOnThreadsAndInUsedMemory) {
  using Scalar = TypeParam;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  for (std::uint64_t seed = 1; seed <= 150; ++seed) {
    const SlidingLayerCase c = layer_case(seed, seed % 5 == 0 ? 400 : 60);
    const Given<Scalar> in(c);
    Random random(seed);
    const auto grad_y = tensor<Scalar, 3>(random.array(c.x.shape));
    typename LocalMHA<Scalar>::Workspace workspace, used;
    typename LocalMHA<Scalar>::Saved saved, kept;
    const auto one = gradients_of<Scalar>(Eigen::DefaultDevice(), in, grad_y, workspace, saved);
    Given<Scalar> nothing = in;
    nothing.x.setConstant(std::numeric_limits<Scalar>::quiet_NaN());
    gradients_of<Scalar>(device, nothing, nothing.x, used, kept);
    const auto other = gradients_of<Scalar>(device, in, grad_y, used, kept);
    expect_same_bits(one, other, "seed " + std::to_string(seed) + ": " + describe(c));
  }
}

TYPED_TEST(LayerSliding, ShowsItsProbabilities) {
  using Scalar = TypeParam;
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    SlidingLayerCase c = layer_case(seed, 40);
    c.attention.dropout = 0;
    c.options.attention.probabilities = true;
    const Given<Scalar> in(c);
    const auto of = [&]<typename Real>(Real) {
      return reference::local_mha(c.options, reference::cast<Real>(c.parameters), c.inputs<Real>());
    };
    const auto precise = of(support::Precise<Scalar>());
    const auto rough = of(Scalar());
    expect_close(array(in.layer.attention_probabilities(in.x, in.mask, in.bias(), in.cu_seqlens)),
                 rough.probabilities, precise.probabilities,
                 static_cast<double>(precise.largest_magnitude), 1,
                 "seed " + std::to_string(seed) + ": " + describe(c));
  }
}

/// Rows of a tensor `[1, N, dim]`.
template <typename Scalar>
Tensor<Scalar, 3> rows(const Tensor<Scalar, 3>& of, Index begin, Index end) {
  Tensor<Scalar, 3> part(1, end - begin, of.dimension(2));
  std::copy(of.data() + begin * of.dimension(2), of.data() + end * of.dimension(2), part.data());
  return part;
}

// Each segment has the bits that it has alone, whatever its neighbours hold, and on any number of
// threads; gradients of the weights are the sums of theirs.
TYPED_TEST(LayerSliding, PackedSequencesAreWhatTheyAreAlone) {
  using Scalar = TypeParam;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  typename LocalMHA<Scalar>::Workspace workspace, on_threads;
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    SlidingLayerCase c = layer_case(seed, 20);
    c.attention.in.masked.clear();
    c.attention.dropout = 0;
    c.options.attention.cu_seqlens.clear();
    const Given<Scalar> in(c);
    Random random(seed);
    std::vector<Index> cuts{0};
    const Index most = random.pick<Index>({1, 3, 40, 700});
    for (Index s = random.integer(1, 30); s > 0; --s)
      cuts.push_back(cuts.back() + (random.chance(0.2) ? 0 : random.integer(0, most)));
    if (random.chance(0.3)) cuts.push_back(cuts.back() + 1000);  // beside short ones
    const std::string what = "seed " + std::to_string(seed) + ": " + describe(c);
    const Index n = cuts.back(), dim = in.layer.config().dim;
    const auto x = tensor<Scalar, 3>(random.array({1, n, dim}));
    const auto grad_y = tensor<Scalar, 3>(random.array({1, n, dim}));
    Tensor<Scalar, 3> y(1, n, dim), grad_x(1, n, dim), on_three(1, n, dim);
    typename LocalMHA<Scalar>::Saved saved, other;
    in.layer.forward_saving_into(Eigen::DefaultDevice(), y, workspace, saved, x, {}, in.bias(), {},
                                 cuts);
    in.layer.forward_saving_into(device, on_three, on_threads, other, x, {}, in.bias(), {}, cuts);
    EXPECT_TRUE(support::same_bits(y, on_three)) << what;
    auto gradients = LocalMHAParameters<Scalar>::zeros(in.layer.config());
    auto of_three = gradients, sums = gradients;
    in.layer.backward_into(Eigen::DefaultDevice(), grad_x, workspace, gradients, saved, grad_y, x,
                           {}, in.bias());
    in.layer.backward_into(device, on_three, on_threads, of_three, other, grad_y, x, {}, in.bias());
    EXPECT_TRUE(support::same_bits(grad_x, on_three)) << what;
    const auto named_of_three = support::named<Scalar>(of_three);
    for (const auto& [name, gradient] : support::named<Scalar>(gradients))
      EXPECT_EQ(gradient.data, named_of_three.at(name).data) << what << ", " << name;
    for (std::size_t s = 0; s + 1 < cuts.size(); ++s) {
      const auto alone = rows(x, cuts[s], cuts[s + 1]);
      typename LocalMHA<Scalar>::Saved of_one;
      EXPECT_TRUE(support::same_bits(in.layer.forward_saving(of_one, alone, {}, in.bias()),
                                     rows(y, cuts[s], cuts[s + 1])))
          << what << ", segment " << s;
      EXPECT_TRUE(support::same_bits(
          in.layer.backward(sums, of_one, rows(grad_y, cuts[s], cuts[s + 1]), alone, {}, in.bias()),
          rows(grad_x, cuts[s], cuts[s + 1])))
          << what << ", segment " << s;
    }
    const auto named_sums = support::named<Scalar>(sums);
    for (const auto& [name, gradient] : support::named<Scalar>(gradients)) {
      const auto& sum = named_sums.at(name);
      EXPECT_TRUE(support::close(gradient, sum,
                                 std::sqrt(std::numeric_limits<Scalar>::epsilon()) *
                                     std::max(1.0, static_cast<double>(support::largest(sum)))))
          << what << ", " << name;
    }
    if (n == 0) continue;
    // One segment of NaN leaves the others as they are.
    const auto s =
        static_cast<std::size_t>(random.integer(0, static_cast<long long>(cuts.size()) - 2));
    Tensor<Scalar, 3> spoilt = x;
    std::fill(spoilt.data() + cuts[s] * dim, spoilt.data() + cuts[s + 1] * dim,
              std::numeric_limits<Scalar>::quiet_NaN());
    const auto beside = in.layer.forward(spoilt, {}, in.bias(), {}, cuts);
    EXPECT_TRUE(support::same_bits(rows(beside, 0, cuts[s]), rows(y, 0, cuts[s]))) << what;
    EXPECT_TRUE(support::same_bits(rows(beside, cuts[s + 1], n), rows(y, cuts[s + 1], n))) << what;
  }
}

// The band of an exact look-around that does not look ahead, whose distances are not shifted.
TYPED_TEST(LayerSliding, ATokenWindowIsTheLookAroundOfItsBand) {
  using Scalar = TypeParam;
  LocalMHAConfig look_around{.dim = 24, .window_size = 7, .dim_head = 6, .heads = 4};
  look_around.causal = true;
  look_around.look_backward = 2;
  LocalMHAConfig band = look_around;
  band.window_size = 0;
  band.look_backward = 1;
  band.token_window = {.left = 14, .right = 0};
  const LocalMHA<Scalar> a(look_around, 3), b(band, 3);
  Random random(1);
  const auto x = tensor<Scalar, 3>(random.array({2, 100, 24}));
  EXPECT_TRUE(support::same_bits(a.forward(x), b.forward(x)));
  typename LocalMHA<Scalar>::Saved of_a, of_b;
  a.forward_saving(of_a, x);
  b.forward_saving(of_b, x);
  auto grad_a = LocalMHAParameters<Scalar>::zeros(look_around), grad_b = grad_a;
  EXPECT_TRUE(support::same_bits(a.backward(grad_a, of_a, x, x), b.backward(grad_b, of_b, x, x)));
  EXPECT_EQ(grad_a.to_qkv, grad_b.to_qkv);
}

// Central differences of the library's own loss, in each number of a small layer's weights.
TEST(LayerSlidingGradients, AreDifferences) {
  for (const Index right : {0, 2}) {
    LocalMHAConfig config{.dim = 5, .dim_head = 4, .heads = 4, .kv_heads = 2};
    config.token_window = {.left = 3, .right = right};
    config.score.soft_cap = 1.5;
    config.sinks = config.relative_bias = true;
    config.first_keys = 2;
    Random random(static_cast<std::uint64_t>(right) + 1);
    auto parameters = LocalMHAParameters<double>::zeros(config);
    local_mha::for_each_parameter(parameters, [&](const std::string&, auto& weight) {
      for (Index i = 0; i < weight.size(); ++i) weight.data()[i] = random.uniform(-1, 1);
    });
    const auto x = tensor<double, 3>(random.array({1, 23, 5}));
    const auto grad_y = tensor<double, 3>(random.array({1, 23, 5}));
    const std::vector<Index> cuts{0, 13, 13, 23};
    const auto loss = [&] {
      const Tensor<double, 3> y = LocalMHA<double>(config, parameters).forward(x, {}, {}, {}, cuts);
      double sum = 0;
      for (Index i = 0; i < y.size(); ++i) sum += y.data()[i] * grad_y.data()[i];
      return sum;
    };
    const LocalMHA<double> layer(config, parameters);
    LocalMHA<double>::Saved saved;
    layer.forward_saving(saved, x, {}, {}, {}, cuts);
    auto gradients = LocalMHAParameters<double>::zeros(config);
    layer.backward(gradients, saved, grad_y, x);
    const auto of_library = support::named<double>(gradients);
    int compared = 0;
    local_mha::for_each_parameter(parameters, [&](const std::string& name, auto& weight) {
      for (Index i = 0; i < weight.size(); ++i) {
        const double at = weight.data()[i];
        const double h = 1e-5;
        weight.data()[i] = at + h;
        const double above = loss();
        weight.data()[i] = at - h;
        const double below = loss();
        weight.data()[i] = at;
        EXPECT_NEAR(of_library.at(name).data[static_cast<std::size_t>(i)],
                    (above - below) / (2 * h), 1e-7)
            << name << ", " << i;
        ++compared;
      }
    });
    EXPECT_EQ(compared, 32 * 5 + 5 * 16 + 4 + 4 * (4 + right));
  }
}

/// A stream's results, one after the other.
template <typename Scalar>
class Together {
 public:
  explicit Together(const Tensor<Scalar, 3>& whole) : all_(whole.dimensions()) {}
  void take(const Tensor<Scalar, 3>& y) {
    for (Index b = 0; b < y.dimension(0); ++b)
      for (Index i = 0; i < y.dimension(1); ++i)
        for (Index c = 0; c < y.dimension(2); ++c) all_(b, answered_ + i, c) = y(b, i, c);
    answered_ += y.dimension(1);
  }
  Index answered() const { return answered_; }
  const Tensor<Scalar, 3>& all() const { return all_; }

 private:
  Tensor<Scalar, 3> all_;
  Index answered_ = 0;
};

TYPED_TEST(LayerSliding, Streams) {
  using Scalar = TypeParam;
  Eigen::ThreadPool pool(3);
  const Eigen::ThreadPoolDevice device(&pool, 3);
  int streamed = 0;
  for (std::uint64_t seed = 1; seed <= random_cases(200); ++seed) {
    SlidingLayerCase c = layer_case(seed, seed % 10 == 0 ? 400 : 60);
    c.attention.dropout = 0;
    c.options.attention.cu_seqlens.clear();
    const Given<Scalar> in(c);
    const LocalMHAConfig& config = in.layer.config();
    const Index batch = c.x.shape[0], n = c.x.shape[1], dim = config.dim;
    if (config.token_window && !config.token_window->bounded()) {
      EXPECT_THROW(typename LocalMHA<Scalar>::Stream(in.layer), std::invalid_argument);
      continue;
    }
    ++streamed;
    const auto whole = in.layer.forward(in.x, in.mask, in.bias());
    const double magnitude =
        static_cast<double>(
            reference::local_mha(c.options, c.parameters, c.inputs<double>()).largest_magnitude) +
        support::largest(c.attention.in.bias);
    const double tolerance =
        32 * std::numeric_limits<Scalar>::epsilon() * (1 + magnitude) *
        std::max({1.0, support::largest(c.x), static_cast<double>(support::largest(array(whole)))});
    Random random(seed);
    for (const Index chunk : {1, 3, 7, 0}) {  // 0: of any size
      typename LocalMHA<Scalar>::Stream stream(
          in.layer, {.batch = batch, .max_rollback = chunk == 3 ? 40 : 0}, in.bias());
      Together<Scalar> together(whole);
      for (Index i = 0; i < n;) {
        const Index size = std::min<Index>(chunk > 0 ? chunk : random.integer(1, 100), n - i);
        Tensor<Scalar, 3> x(batch, size, dim);
        Tensor<bool, 2> masked(batch, size);
        for (Index b = 0; b < batch; ++b)
          for (Index r = 0; r < size; ++r) {
            masked(b, r) = !c.attention.in.masked.empty() &&
                           c.attention.in.masked[static_cast<std::size_t>(b * n + i + r)] != 0;
            for (Index d = 0; d < dim; ++d) x(b, r, d) = in.x(b, i + r, d);
          }
        const auto mask = local_mha::PaddingMask::masked(masked);
        if (chunk == 3 && random.chance(0.3)) {  // and taken back
          stream.push(x, {.mask = mask});
          std::ostringstream state;
          stream.save(state);
          typename LocalMHA<Scalar>::Stream other(stream);
          std::istringstream from(state.str());
          other.load(from);
          stream = other;
          stream.rollback(size);
        }
        together.take(stream.push(x, {.mask = mask}));
        i += size;
      }
      together.take(stream.flush());
      ASSERT_EQ(together.answered(), n);
      EXPECT_TRUE(support::close(array(together.all()), array(whole), tolerance))
          << "seed " << seed << ", chunks of " << chunk << ": " << describe(c);
      if (chunk != 7) continue;
      // On threads, which share the heads.
      typename LocalMHA<Scalar>::Stream shared(in.layer, {.batch = batch, .max_threads = 3},
                                               in.bias());
      Together<Scalar> on_threads(whole), alone(whole);
      on_threads.take(shared.push(in.x, {.mask = in.mask, .device = device}));
      on_threads.take(shared.flush(device));
      typename LocalMHA<Scalar>::Stream one(in.layer, {.batch = batch}, in.bias());
      alone.take(one.push(in.x, {.mask = in.mask}));
      alone.take(one.flush());
      EXPECT_TRUE(support::same_bits(on_threads.all(), alone.all())) << "seed " << seed;
    }
  }
  EXPECT_GT(streamed, static_cast<int>(random_cases(200)) / 2);
}

}  // namespace layer_sliding_test
