// SPDX-License-Identifier: MIT
// Weights, keys and values that are stored in 16 bits and computed with in float, against a
// reference that rounds the same things by their definition.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/io/encoder_weights.hpp>
#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>

#include "measuring/heap.hpp"
#include "support/library.hpp"
#include "support/random_case.hpp"

namespace sixteen_bits_test {

using Eigen::bfloat16;
using Eigen::half;
using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalTransformer;
using local_mha::Tensor;
using reference::Array;
using reference::Int;

/// A format by its definition.
template <typename Storage>
struct Format {
  static constexpr bool is_half = std::is_same_v<Storage, half>;
  static constexpr int digits = is_half ? 11 : 8;
  static constexpr int least_exponent = is_half ? -14 : -126;
  static constexpr int most_exponent = is_half ? 15 : 127;

  /// From a number to the next one.
  static double step(double x) {
    const int exponent = x == 0 ? least_exponent : std::max(std::ilogb(x), least_exponent);
    return std::ldexp(1.0, exponent - (digits - 1));
  }
  /// The nearest, ties to even.
  static double rounded(double x) {
    if (!std::isfinite(x)) return x;
    const double nearest = std::nearbyint(x / step(x)) * step(x);
    if (std::abs(nearest) < std::ldexp(1.0, most_exponent + 1)) return nearest;
    return std::copysign(std::numeric_limits<double>::infinity(), x);
  }
  /// How far from the middle of two numbers, where rounding turns.
  static double distance_to_tie(double x) {
    const double place = std::abs(x) / step(x);
    return std::abs(place - std::floor(place) - 0.5) * step(x);
  }
};

template <typename Storage>
class SixteenBits : public testing::Test {};
using Storages = testing::Types<bfloat16, half>;
TYPED_TEST_SUITE(SixteenBits, Storages);

// ---- numbers

/// What blocks of numbers become, and what they are when they are read.
template <typename Storage>
std::vector<float> stored(std::vector<float> numbers) {
  constexpr Index count = local_mha::block_rows<float>;
  const Index size = local_mha::ceil_div(static_cast<Index>(numbers.size()), count) * count;
  numbers.resize(static_cast<std::size_t>(size));
  auto from = local_mha::make_block_buffer<float>(size);
  auto packed = local_mha::make_block_buffer<Storage>(size);
  std::copy(numbers.begin(), numbers.end(), from.begin());
  local_mha::detail::pack(from.data(), size, packed.data());
  for (Index i = 0; i < size; ++i) {
    const auto at = static_cast<std::size_t>(i);
    // One by one as many at once.
    const auto alone = local_mha::detail::to_stored<Storage>(numbers[at]);
    if (!std::isnan(numbers[at])) {
      EXPECT_EQ(std::bit_cast<std::uint16_t>(alone), std::bit_cast<std::uint16_t>(packed[at]));
    }
    const auto value = local_mha::detail::from_stored<float>(alone);
    EXPECT_TRUE(std::isnan(numbers[at]) ? std::isnan(value)
                                        : value == static_cast<float>(packed[at]));
  }
  local_mha::detail::unpack(packed.data(), size, from.data());
  std::vector<float> in_place = numbers;
  auto rounded = local_mha::make_block_buffer<float>(size);
  std::copy(numbers.begin(), numbers.end(), rounded.begin());
  local_mha::detail::round_as_stored<Storage>(size, rounded.data());
  EXPECT_EQ(std::memcmp(rounded.data(), from.data(), static_cast<std::size_t>(size) * 4), 0);
  return {from.begin(), from.end()};
}

TYPED_TEST(SixteenBits, EveryNumberOfTheFormatIsReadAsWhatItIs) {
  std::vector<float> numbers;
  for (std::uint32_t bits = 0; bits <= 0xffff; ++bits)
    numbers.push_back(
        static_cast<float>(std::bit_cast<TypeParam>(static_cast<std::uint16_t>(bits))));
  const std::vector<float> got = stored<TypeParam>(numbers);
  for (std::size_t i = 0; i < numbers.size(); ++i)
    if (std::isnan(numbers[i])) {
      ASSERT_TRUE(std::isnan(got[i])) << i;
    } else {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(got[i]), std::bit_cast<std::uint32_t>(numbers[i]))
          << i;
    }
}

TYPED_TEST(SixteenBits, NumbersAreRoundedToTheNearestTiesToEven) {
  std::vector<float> numbers{0.0F,
                             -0.0F,
                             std::numeric_limits<float>::infinity(),
                             -std::numeric_limits<float>::infinity(),
                             std::numeric_limits<float>::max(),
                             std::numeric_limits<float>::min(),
                             std::numeric_limits<float>::denorm_min(),
                             -std::numeric_limits<float>::denorm_min(),
                             65504.0F,
                             65519.996F,
                             65520.0F,
                             -65520.0F,
                             0x1p-24F,
                             0x1p-25F,
                             0x1.8p-25F,
                             0x1p-126F,
                             0x1p-133F,
                             0x1p-134F,
                             0x1.8p-134F};
  for (int i = 0; i < 256; ++i) {  // ties
    numbers.push_back(std::ldexp(static_cast<float>(2 * i + 1), -9));
    numbers.push_back(std::ldexp(static_cast<float>(2 * i + 1), -12));
    numbers.push_back(std::nextafter(numbers.back(), 0.0F));
    numbers.push_back(std::nextafter(std::ldexp(static_cast<float>(2 * i + 1), -9), 9.0F));
  }
  Random random(7);
  for (int i = 0; i < 20000; ++i)
    numbers.push_back(
        std::bit_cast<float>(static_cast<std::uint32_t>(random.integer(0, 0xffffffffLL))));
  const std::vector<float> got = stored<TypeParam>(numbers);
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const double wanted = Format<TypeParam>::rounded(static_cast<double>(numbers[i]));
    if (std::isnan(numbers[i])) {
      ASSERT_TRUE(std::isnan(got[i])) << i;
    } else {
      ASSERT_EQ(static_cast<double>(got[i]), wanted) << numbers[i];
      ASSERT_EQ(std::signbit(got[i]), std::signbit(numbers[i])) << numbers[i];
    }
  }
}

TYPED_TEST(SixteenBits, ANaNWhoseFirstBitsAreZeroStaysOne) {
  for (const std::uint32_t bits : {0x7f800001U, 0xff800001U, 0x7fffffffU, 0xffffffffU, 0x7fc00000U})
    for (const float got : stored<TypeParam>(std::vector<float>(33, std::bit_cast<float>(bits))))
      ASSERT_TRUE(got == 0.0F || std::isnan(got));
}

TYPED_TEST(SixteenBits, NumbersThatAreNotFiniteAreFound) {
  constexpr Index count = local_mha::block_rows<float>;
  for (const Index blocks : {1, 2, 3, 8})
    for (Index place = 0; place < blocks * count; place += 3) {
      auto values = local_mha::make_block_buffer<TypeParam>(blocks * count);
      EXPECT_TRUE(local_mha::detail::all_finite_stored<float>(values.data(), blocks * count));
      for (const float value :
           {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        values[static_cast<std::size_t>(place)] = TypeParam(value);
        EXPECT_FALSE(local_mha::detail::all_finite_stored<float>(values.data(), blocks * count));
      }
    }
}

// ---- products

template <typename Storage>
Array<double> rounded(Array<double> array) {
  for (double& value : array.data) value = Format<Storage>::rounded(value);
  return array;
}

TYPED_TEST(SixteenBits, LinearMultipliesWithTheRoundedWeight) {
  Random random(3);
  for (const auto& [out, in, rows] : {std::array<Int, 3>{1, 1, 1},
                                      {13, 7, 5},
                                      {16, 3, 50},
                                      {17, 1, 33},
                                      {64, 96, 20},
                                      {24, 700, 130},
                                      {40, 1031, 3}}) {
    const Array<double> weight = random.array({out, in});
    const Array<double> x = random.array({1, rows, in});
    const Array<double> bias = random.array({out});
    local_mha::LinearParameters<float> parameters{local_mha::RowMatrix<float>(out, in),
                                                  local_mha::Vector<float>(out)};
    std::copy(weight.data.begin(), weight.data.end(), parameters.weight.data());
    std::copy(bias.data.begin(), bias.data.end(), parameters.bias.data());
    const local_mha::Linear<float, TypeParam> linear(parameters);
    const Array<double> wanted = reference::linear(x, rounded<TypeParam>(weight), bias);
    const double tolerance = 2e-6 * std::sqrt(static_cast<double>(in)) * (1 + support::largest(x));
    EXPECT_TRUE(support::close(support::array(linear.forward(support::tensor<float, 3>(x))), wanted,
                               tolerance));
    // What is asked for is what is multiplied with, and rounding it again changes nothing.
    const auto held = linear.parameters();
    for (Index i = 0; i < held.weight.size(); ++i)
      ASSERT_EQ(static_cast<double>(held.weight.data()[i]),
                Format<TypeParam>::rounded(weight.data[static_cast<std::size_t>(i)]));
    local_mha::Linear<float, TypeParam> again(held);
    EXPECT_TRUE(support::same_bits(again.forward(support::tensor<float, 3>(x)),
                                   linear.forward(support::tensor<float, 3>(x))));
    // Of numbers that are stored so.
    const local_mha::RowMatrix<TypeParam> given = held.weight.template cast<TypeParam>();
    const local_mha::Linear<float, TypeParam> of_stored(given, parameters.bias);
    EXPECT_TRUE(support::same_bits(of_stored.forward(support::tensor<float, 3>(x)),
                                   linear.forward(support::tensor<float, 3>(x))));
  }
}

// ---- the layer

/// The reference's layer, with what is stored rounded. Where a number lies so close to the middle
/// of two that float may round it to the other one, `doubt` grows by their distance.
template <typename Storage>
struct RoundedLayer {
  const LocalMHAConfig& config;
  Index group;  // of rotary
  reference::Parameters<double> parameters;
  double doubt = 0;

  RoundedLayer(const LocalMHAConfig& layer, const reference::Parameters<double>& given,
               const std::string& prefix = "")
      : config(layer), parameters(given) {
    for (const char* name : {"to_qkv.weight", "to_out.weight", "to_v_gate.0.weight"})
      if (auto weight = parameters.find(prefix + name); weight != parameters.end())
        weight->second = rounded<Storage>(weight->second);
    const auto attention =
        LocalAttention<float>(local_mha::attention_config(layer)).template keys_as<Storage>();
    group = attention.rotary() ? attention.rotary()->group() : 0;
  }

  double round(double x, double size) {
    if (Format<Storage>::distance_to_tie(x) < 4e-7 * size) doubt += Format<Storage>::step(x);
    return Format<Storage>::rounded(x);
  }

  void round_row(double* row, Int d) {
    double size = 0;
    for (Int c = 0; c < d; ++c) size = std::max(size, std::abs(row[c]));
    for (Int c = 0; c < d; ++c) row[c] = round(row[c], size);
  }

  // A key is rounded as it is turned by its place in its group.
  void round_key(double* key, Int d, Int position) {
    if (group == 0) return round_row(key, d);
    const auto place = static_cast<double>(position % group);
    const auto turn = [&](bool back) {
      for (Int m = 0; m < d / 2; ++m) {
        const double two_m = 2.0 * static_cast<double>(m), of = static_cast<double>(d);
        const double angle = (back ? -place : place) * std::pow(10000.0, -two_m / of);
        const double base =
            config.xpos_scale_base.value_or(std::sqrt(static_cast<double>(config.dim)));
        const double decay =
            config.use_xpos ? std::pow((two_m + 0.4 * of) / (1.4 * of), -place / base) : 1.0;
        const double factor = back ? 1 / decay : decay;
        double& a = key[m];
        double& b = key[m + d / 2];
        const double x = a, y = b;
        a = factor * (std::cos(angle) * x - std::sin(angle) * y);
        b = factor * (std::sin(angle) * x + std::cos(angle) * y);
      }
    };
    turn(false);
    round_row(key, d);
    turn(true);
  }

  Array<double> operator()(const reference::LayerInputs<double>& in,
                           const std::string& prefix = "") {
    const reference::LayerOptions o = support::options(config);
    const Array<double> x = reference::prenormed(o, parameters, in.x, prefix);
    const auto raw = reference::projected(o, parameters, x, prefix + "to_qkv");
    auto attend = reference::attention_inputs(o, parameters, in, x, raw, prefix);
    const Int d = o.dim_head, n = in.x.shape[1];
    for (std::size_t row = 0; row < attend.k.data.size() / static_cast<std::size_t>(d); ++row) {
      const auto first = row * static_cast<std::size_t>(d);
      round_key(attend.k.data.data() + first, d, static_cast<Int>(row) % n);
      round_row(attend.v.data.data() + first, d);
    }
    auto attended = reference::attention(reference::attention_options(o), attend);
    if (o.gate_values_per_head) {
      const Array<double> gates = reference::linear(x, parameters.at(prefix + "to_v_gate.0.weight"),
                                                    parameters.at(prefix + "to_v_gate.0.bias"));
      for (Int b = 0; b < attended.out.shape[0]; ++b)
        for (Int h = 0; h < o.heads; ++h)
          for (Int i = 0; i < n; ++i)
            for (Int c = 0; c < d; ++c)
              attended.out(b, h, i, c) *= reference::sigmoid(gates(b, i, h));
    }
    return reference::linear(reference::merged(attended.out),
                             parameters.at(prefix + "to_out.weight"));
  }
};

/// Pushes rows of one sequence in chunks.
template <typename Stream>
Tensor<float, 3> pushed(Stream& stream, const Tensor<float, 3>& x, Random& random, Index chunk) {
  Tensor<float, 3> y(1, x.dimension(1), x.dimension(2));
  Index out = 0;
  const auto take = [&](const Tensor<float, 3>& got) {
    std::copy_n(got.data(), got.size(), y.data() + out);
    out += got.size();
  };
  for (Index i = 0; i < x.dimension(1);) {
    const Index n = std::min<Index>(chunk > 0 ? chunk : random.integer(1, 60), x.dimension(1) - i);
    Tensor<float, 3> part(1, n, x.dimension(2));
    std::copy_n(x.data() + i * x.dimension(2), part.size(), part.data());
    take(stream.push(part));
    i += n;
  }
  take(stream.flush());
  EXPECT_EQ(out, y.size());
  return y;
}

TYPED_TEST(SixteenBits, TheLayerAndItsStreamAreThoseOfTheRoundedNumbers) {
  int compared = 0, streamed = 0;
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    support::LayerCase c = support::layer_case(seed);
    if (std::is_same_v<TypeParam, half> && support::largest(c.in.x) > 1e3) continue;
    RoundedLayer<TypeParam> reference(c.config, c.parameters);
    const Array<double> wanted = reference(c.in);
    const double largest = support::largest(wanted);
    if (!(reference.doubt <= 2e-6 * std::max(1.0, c.size())) || wanted.data.empty()) continue;
    const LocalMHA<float, TypeParam> layer(
        c.config, support::layer_parameters<float>(c.config, c.parameters));
    const Int batch = c.in.x.shape[0], n = c.in.x.shape[1];
    const Tensor<float, 3> bias = support::bias_tensor<float>(c.in.bias);
    const Tensor<float, 3> x = support::tensor<float, 3>(c.in.x);
    const double tolerance = 2e-5 * std::max(largest, c.size());
    EXPECT_TRUE(
        support::close(support::array(layer.forward(x, support::padding_mask(c.in.masked, batch, n),
                                                    support::optional_view(bias))),
                       wanted, tolerance))
        << seed << ": " << support::describe(c.config);
    ++compared;
    if (batch > 1 || !c.in.masked.empty()) continue;
    ++streamed;
    Random random(seed);
    for (const Index chunk : {1, 3, 0}) {
      typename LocalMHA<float, TypeParam>::Stream stream(layer, {}, support::optional_view(bias));
      EXPECT_TRUE(
          support::close(support::array(pushed(stream, x, random, chunk)), wanted, tolerance))
          << seed << ", chunks of " << chunk << ": " << support::describe(c.config);
    }
  }
  EXPECT_GE(compared, 60);
  EXPECT_GE(streamed, 10);
}

/// Numbers that are computed without rounding: keys and values are rounded, ties among them.
template <typename Config>
reference::Parameters<double> exact_parameters(Random& random, const Config& config) {
  auto parameters = support::named<double>(local_mha::LocalMHAParameters<double>::zeros(config));
  for (auto& [name, array] : parameters)
    for (double& value : array.data)
      value = static_cast<double>(random.integer(-12, 12)) * (name == "to_qkv.weight" ? 0x1p-4 : 1);
  return parameters;
}

TYPED_TEST(SixteenBits, LongStreamsRoundWhatTheyKeepWhateverTheChunks) {
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    Random random(seed);
    LocalMHAConfig config{.dim = random.pick<Index>({3, 8, 12}),
                          .window_size = random.pick<Index>({5, 16, 33, 70, 150}),
                          .dim_head = random.pick<Index>({4, 8, 17, 24}),
                          .heads = 2,
                          .causal = random.chance(0.5),
                          .exact_windowsize = random.chance(0.5),
                          .use_rotary_pos_emb = false};
    if (random.chance(0.4)) config.kv_heads = 1;
    if (random.chance(0.4)) {
      config.window_size = 0;
      config.token_window = {random.integer(0, 90), config.causal ? 0 : random.integer(0, 40)};
      config.first_keys = random.integer(0, 20);
    }
    const auto parameters = exact_parameters(random, config);
    Array<double> x({1, 330, config.dim});
    for (double& value : x.data) value = static_cast<double>(random.integer(-31, 31)) * 0x1p-5;
    RoundedLayer<TypeParam> reference(config, parameters);
    const Array<double> wanted = reference({x, {}, {}, {}});
    const double tolerance = 2e-5 * support::largest(wanted);
    const LocalMHA<float, TypeParam> layer(config,
                                           support::layer_parameters<float>(config, parameters));
    const Tensor<float, 3> rows = support::tensor<float, 3>(x);
    EXPECT_TRUE(support::close(support::array(layer.forward(rows)), wanted, tolerance)) << seed;
    for (const Index chunk : {1, 3, 16, 330, 0}) {
      typename LocalMHA<float, TypeParam>::Stream stream(layer);
      EXPECT_TRUE(
          support::close(support::array(pushed(stream, rows, random, chunk)), wanted, tolerance))
          << seed << ", chunks of " << chunk << ": " << support::describe(config);
    }
    // Without rounding it would be another result.
    const LocalMHA<float> unrounded(config, support::layer_parameters<float>(config, parameters));
    if constexpr (!std::is_same_v<TypeParam, half>) {
      EXPECT_FALSE(support::close(support::array(unrounded.forward(rows)), wanted, tolerance))
          << seed;
    }
  }
}

TYPED_TEST(SixteenBits, ValuesThatAreNotFiniteReachThoseThatSeeThem) {
  const LocalMHAConfig config{.dim = 8,
                              .window_size = 6,
                              .dim_head = 8,
                              .heads = 1,
                              .causal = true,
                              .use_rotary_pos_emb = false};
  const LocalMHA<float, TypeParam> layer(config, 5);
  Tensor<float, 3> x(1, 60, 8);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = std::sin(static_cast<float>(i));
  // Finite in float, but not as it is stored.
  const float large = std::is_same_v<TypeParam, half> ? 4e5F : 3.4e38F;
  for (Index c = 0; c < 8; ++c) x(0, 20, c) = c % 2 == 0 ? large : -large;
  const Tensor<float, 3> y = layer.forward(x);
  for (const Index chunk : {1, 5, 16, 60}) {
    typename LocalMHA<float, TypeParam>::Stream stream(layer);
    Random random(1);
    const Tensor<float, 3> z = pushed(stream, x, random, chunk);
    for (Index i = 0; i < 60; ++i)
      for (Index c = 0; c < 8; ++c) {
        const bool sees = i >= 20 && i <= 26;
        EXPECT_TRUE(sees || (std::isfinite(y(0, i, c)) && std::isfinite(z(0, i, c)))) << i;
        EXPECT_EQ(std::isfinite(y(0, i, c)), std::isfinite(z(0, i, c))) << i;
        // Those beside it, which a query sees or not, count as ever.
        if (!sees) EXPECT_NEAR(y(0, i, c), z(0, i, c), 1e-5) << i << " by " << chunk;
      }
  }
}

TYPED_TEST(SixteenBits, ParametersAreTheRoundedOnes) {
  const LocalMHAConfig config{.dim = 12,
                              .window_size = 4,
                              .dim_head = 6,
                              .heads = 3,
                              .prenorm = true,
                              .gate_values_per_head = true};
  const LocalMHA<float> whole(config, 9);
  LocalMHA<float, TypeParam> layer(config, whole.parameters());
  const auto wanted = support::named<double>(whole.parameters());
  const auto got = support::named<double>(layer.parameters());
  for (const auto& [name, array] : wanted)
    for (std::size_t i = 0; i < array.data.size(); ++i) {
      const bool is_rounded = array.shape.size() == 2;
      ASSERT_EQ(got.at(name).data[i],
                is_rounded ? Format<TypeParam>::rounded(array.data[i]) : array.data[i])
          << name;
    }
  Tensor<float, 3> x(1, 9, 12);
  x.setRandom();
  const Tensor<float, 3> y = layer.forward(x);
  layer.set_parameters(layer.parameters());
  EXPECT_TRUE(support::same_bits(layer.forward(x), y));
}

template <typename Layer>
concept GoesBack = requires(const Layer& layer, typename Layer::Saved& saved,
                            const Tensor<float, 3>& x) { layer.forward_saving(saved, x); };
static_assert(GoesBack<LocalMHA<float>> && !GoesBack<LocalMHA<float, bfloat16>>);
static_assert(std::is_same_v<LocalMHA<float>, LocalMHA<float, float>>);

// ---- streams

TYPED_TEST(SixteenBits, AStateIsHalfAsLongAndGoesOnToTheSameBits) {
  const LocalMHAConfig config{
      .dim = 16, .window_size = 40, .dim_head = 16, .heads = 2, .causal = true, .use_xpos = true};
  const LocalMHA<float, TypeParam> layer(config, 2);
  const LocalMHA<float> whole(config, 2);
  Tensor<float, 3> x(1, 100, 16), more(1, 30, 16);
  x.setRandom();
  more.setRandom();
  typename LocalMHA<float, TypeParam>::Stream stream(layer), other(layer);
  LocalMHA<float>::Stream of_float(whole);
  stream.push(x);
  of_float.push(x);
  std::stringstream state, longer;
  stream.save(state);
  of_float.save(longer);
  EXPECT_LT(state.str().size(), longer.str().size() / 2 + 800);
  EXPECT_THROW(of_float.load(state), std::invalid_argument);
  state.clear();
  state.seekg(0);
  other.load(state);
  EXPECT_TRUE(support::same_bits(other.push(more), stream.push(more)));
  stream.rollback(5);
  other.rollback(5);
  EXPECT_TRUE(support::same_bits(other.push(more), stream.push(more)));
}

TYPED_TEST(SixteenBits, AStreamOfTheAttentionRoundsKeysAndValues) {
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    Random random(seed);
    const Int heads = 4, kv_heads = random.pick<Int>({1, 2, 4}), n = 90,
              d = random.pick<Int>({5, 8, 16});
    local_mha::LocalAttentionConfig config{.window_size = random.pick<Index>({4, 17, 40}),
                                           .causal = random.chance(0.5)};
    config.exact_windowsize = random.chance(0.5);
    const LocalAttention<float> attention(config);
    const auto q = support::tensor<float, 4>(random.array({1, heads, n, d}));
    const auto k = support::tensor<float, 4>(random.array({1, kv_heads, n, d}));
    const auto v = support::tensor<float, 4>(random.array({1, kv_heads, n, d}));
    // Keys that do not turn are what they are when they come.
    const auto round = [](Tensor<float, 4> t) {
      for (Index i = 0; i < t.size(); ++i)
        t.data()[i] =
            static_cast<float>(Format<TypeParam>::rounded(static_cast<double>(t.data()[i])));
      return t;
    };
    const Tensor<float, 4> wanted = attention.forward(q, round(k), round(v));
    for (const Index chunk : {1, 3, 90}) {
      typename LocalAttention<float>::template StreamOf<TypeParam> stream(attention, heads, d, {},
                                                                          {}, kv_heads);
      Index out = 0;
      const auto compare = [&](const Tensor<float, 4>& y) {
        for (Index h = 0; h < heads; ++h)
          for (Index i = 0; i < y.dimension(2); ++i)
            for (Index c = 0; c < d; ++c)
              ASSERT_NEAR(y(0, h, i, c), wanted(0, h, out + i, c), 2e-5) << seed << ' ' << chunk;
        out += y.dimension(2);
      };
      const auto part = [&](const Tensor<float, 4>& t, Index first, Index some) {
        return Tensor<float, 4>(t.slice(Eigen::array<Index, 4>{0, 0, first, 0},
                                        Eigen::array<Index, 4>{1, t.dimension(1), some, d}));
      };
      for (Index i = 0; i < n; i += chunk)
        compare(stream.push(part(q, i, std::min<Index>(chunk, n - i)),
                            part(k, i, std::min<Index>(chunk, n - i)),
                            part(v, i, std::min<Index>(chunk, n - i))));
      compare(stream.flush());
      EXPECT_EQ(out, n);
    }
  }
}

// ---- models

local_mha::LocalTransformerConfig small_model() {
  return {.num_tokens = 40,
          .max_seq_len = 64,
          .dim = 16,
          .depth = 2,
          .local_attn_window_size = 8,
          .dim_head = 8,
          .heads = 2};
}

TYPED_TEST(SixteenBits, AModelIsThatOfTheRoundedNumbers) {
  const auto config = small_model();
  int compared = 0;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    Random random(seed);
    auto values = support::random_parameters(
        random,
        support::named<double>(local_mha::LocalTransformerParameters<double>::zeros(config)));
    const LocalTransformer<float, TypeParam> model(
        config, support::transformer_parameters<float>(config, values));
    const Int n = std::is_same_v<TypeParam, half> ? 6 : 14;
    Array<Int> tokens({1, n});
    Tensor<std::int64_t, 2> given(1, n);
    for (Int i = 0; i < n; ++i) tokens(0, i) = given(0, i) = random.integer(0, 39);
    for (auto& [name, array] : values)
      if (array.shape.size() == 2) array = rounded<TypeParam>(array);
    // As the reference's encoder, with layers that round.
    const auto encoder = local_mha::encoder_config(config);
    Array<double> x = reference::embedded(values, tokens);
    double doubt = 0;
    for (Index i = 0; i < config.depth; ++i) {
      const std::string prefix = "layers." + std::to_string(i);
      const LocalMHAConfig of_layer = local_mha::layer_config(encoder, i);
      RoundedLayer<TypeParam> layer(of_layer, values, prefix + ".0.branch.");
      const Array<double> attended = layer({x, {}, {}, {}}, prefix + ".0.branch.");
      doubt += layer.doubt;
      for (std::size_t k = 0; k < x.data.size(); ++k) x.data[k] += attended.data[k];
      const Array<double> fed = reference::feed_forward(values, x, prefix + ".1.branch.");
      for (std::size_t k = 0; k < x.data.size(); ++k) x.data[k] += fed.data[k];
    }
    const Array<double> wanted = reference::linear(
        reference::layer_norm(x, values.at("to_logits.0.weight"), values.at("to_logits.0.bias")),
        values.at("to_logits.1.weight"));
    if (doubt > 2e-5) continue;
    ++compared;
    const double tolerance = 2e-5 * std::max(1.0, support::largest(wanted));
    EXPECT_TRUE(support::close(support::array(model.forward(given)), wanted, tolerance)) << seed;
    for (const Index chunk : {1, 3, 14}) {
      typename LocalTransformer<float, TypeParam>::Stream stream(model);
      for (Index i = 0; i < n; i += chunk) {
        Tensor<std::int64_t, 2> part(1, std::min<Index>(chunk, n - i));
        std::copy_n(given.data() + i, part.size(), part.data());
        const auto logits = stream.push(part);
        for (Index r = 0; r < part.dimension(1); ++r)
          for (Index c = 0; c < 40; ++c)
            ASSERT_NEAR(static_cast<double>(logits(0, r, c)), wanted(0, i + r, c), tolerance)
                << seed << ", chunks of " << chunk;
      }
    }
  }
  EXPECT_GE(compared, 3);
}

TYPED_TEST(SixteenBits, AModelGeneratesAsItsStreamDoes) {
  const LocalTransformer<float, TypeParam> model(small_model(), 4);
  Tensor<std::int64_t, 2> prompt(1, 5);
  for (Index i = 0; i < 5; ++i) prompt(0, i) = 3 * i;
  const auto tokens = model.generate(prompt, {.length = 20, .sampling = {.temperature = 0}});
  typename LocalTransformer<float, TypeParam>::Stream stream(model);
  Tensor<float, 3> logits = stream.push(prompt);
  for (Index i = 0; i < 20; ++i) {
    const float* last = &logits(0, logits.dimension(1) - 1, 0);
    const Index best = std::max_element(last, last + 40) - last;
    ASSERT_EQ(tokens(0, i), best) << i;
    Tensor<std::int64_t, 2> next(1, 1);
    next(0, 0) = best;
    logits = stream.push(next);
  }
}

TYPED_TEST(SixteenBits, AnEncoderWithStreamsGoesByRowsAsAtOnce) {
  const local_mha::EncoderConfig config{.depth = 2,
                                        .layers = {{.dim = 16,
                                                    .window_size = 5,
                                                    .dim_head = 8,
                                                    .heads = 2,
                                                    .prenorm = true,
                                                    .use_rotary_pos_emb = false}},
                                        .num_residual_streams = 2};
  const local_mha::Encoder<float, TypeParam> encoder(config, 8);
  Tensor<float, 3> x(1, 40, 16);
  x.setRandom();
  const Tensor<float, 3> wanted = encoder.forward(x);
  typename local_mha::Encoder<float, TypeParam>::Stream stream(encoder);
  Random random(3);
  const Tensor<float, 3> got = pushed(stream, x, random, 0);
  // Where float sums in another order, a number may be rounded to the next one.
  const double step = std::is_same_v<TypeParam, half> ? 0x1p-11 : 0x1p-8;
  EXPECT_TRUE(support::close(support::array(got), support::array(wanted), step));
}

// ---- memory

template <typename Make>
std::size_t held_by(Make&& make) {
  const std::size_t before = measuring::heap_use().live;
  const auto object = make();
  return measuring::heap_use().live - before;
}

TYPED_TEST(SixteenBits, WeightsAndRingsTakeHalfTheBytes) {
  if (!measuring::counts_heap) GTEST_SKIP();
  const LocalMHAConfig config{
      .dim = 256, .window_size = 128, .dim_head = 64, .heads = 4, .causal = true, .prenorm = true};
  const std::size_t weights = 4 * 256 * 256 * (sizeof(float));
  // What a process allocates once is no layer's.
  static_cast<void>(LocalMHA<float>(config)), static_cast<void>(LocalMHA<float, TypeParam>(config));
  const std::size_t of_float = held_by([&] { return LocalMHA<float>(config); });
  const std::size_t of_storage = held_by([&] { return LocalMHA<float, TypeParam>(config); });
  EXPECT_GE(of_float, weights);
  // Beside weights, there are tables of rotary.
  EXPECT_NEAR(static_cast<double>(of_float - of_storage), static_cast<double>(weights / 2), 256);

  // Of one more sequence: its rings.
  const LocalMHA<float> whole(config);
  const LocalMHA<float, TypeParam> layer(config);
  const auto ring_of = [&]<typename Stream, typename Layer>(const Layer& of, Stream*) {
    return held_by([&] { return Stream(of, {.batch = 9}); }) -
           held_by([&] { return Stream(of, {.batch = 1}); });
  };
  const auto rings = ring_of(whole, static_cast<LocalMHA<float>::Stream*>(nullptr));
  const auto half_rings =
      ring_of(layer, static_cast<typename LocalMHA<float, TypeParam>::Stream*>(nullptr));
  // Keys and values of what a window shows and of a stretch; queries stay float.
  const std::size_t kept = (128 / local_mha::block_rows<float>)*local_mha::block_rows<float>;
  EXPECT_GE(rings - half_rings, 8 * 2 * 4 * kept * 64 * 2);
  EXPECT_LT(half_rings, rings * 65 / 100);

  const auto model = small_model();
  const std::size_t model_of_float = held_by([&] { return LocalTransformer<float>(model); });
  const std::size_t model_of_storage =
      held_by([&] { return LocalTransformer<float, TypeParam>(model); });
  EXPECT_LT(model_of_storage, model_of_float);
}

TYPED_TEST(SixteenBits, AStepAllocatesNothing) {
  if (!measuring::counts_heap) GTEST_SKIP();
  const LocalMHAConfig config{.dim = 32, .window_size = 20, .dim_head = 16, .heads = 2};
  const LocalMHA<float, TypeParam> layer(config);
  typename LocalMHA<float, TypeParam>::Stream stream(layer, {});
  Tensor<float, 3> x(1, 50, 32), y(1, 50, 32);
  x.setRandom();
  for (const Index n : {1, 7, 50, 1, 1, 30}) {
    const local_mha::TensorView<const float, 3> in(x.data(), {1, n, 32});
    const local_mha::TensorView<float, 3> out(y.data(), {1, stream.results_of(n), 32});
    measuring::restart_heap_count();
    stream.push_into(out, in);
    EXPECT_EQ(measuring::heap_use().allocations, 0U) << n;
  }
}

// ---- files

template <typename Storage>
constexpr local_mha::io::Dtype dtype =
    std::is_same_v<Storage, half> ? local_mha::io::Dtype::F16 : local_mha::io::Dtype::BF16;

TYPED_TEST(SixteenBits, FilesInTheFormatAreReadAsTheyAre) {
  const auto config = small_model();
  const LocalTransformer<float> whole(config, 6);
  local_mha::io::SafetensorsWriter writer;
  local_mha::io::add_local_transformer(writer, config, whole.parameters(),
                                       {.dtype = dtype<TypeParam>});
  const auto file = local_mha::io::SafetensorsFile::from_bytes(writer.bytes());
  auto [read_config, in_16_bits] = local_mha::io::load_local_transformer<TypeParam>(file);
  auto of_float = local_mha::io::load_local_transformer<float>(file).parameters;
  const auto wanted = support::named<double>(of_float);
  for (const auto& [name, array] : support::named<double>(in_16_bits))
    EXPECT_EQ(array.data, wanted.at(name).data) << name;
  const LocalTransformer<float, TypeParam> model(read_config, std::move(in_16_bits));
  const LocalTransformer<float, TypeParam> by_float(read_config, std::move(of_float));
  Tensor<std::int64_t, 2> tokens(1, 12);
  for (Index i = 0; i < 12; ++i) tokens(0, i) = (7 * i) % 40;
  EXPECT_TRUE(support::same_bits(model.forward(tokens), by_float.forward(tokens)));
}

TYPED_TEST(SixteenBits, NumbersOfOtherFormatsAreRoundedWhenTheyAreRead) {
  using local_mha::io::Dtype;
  local_mha::io::SafetensorsWriter writer;
  const std::vector<double> numbers{1.0 / 3, -2.7, 1e-5, 7e4, 0, 65520};
  for (const Dtype stored : {Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16})
    writer.add(std::string(local_mha::io::name_of(stored)), {6}, numbers, stored);
  const auto file = local_mha::io::SafetensorsFile::from_bytes(writer.bytes());
  for (const Dtype stored : {Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16}) {
    const std::string name(local_mha::io::name_of(stored));
    const auto got = file.read<TypeParam>(name);
    const auto exact = file.read<double>(name);
    for (std::size_t i = 0; i < got.size(); ++i)
      EXPECT_EQ(static_cast<double>(static_cast<float>(got[i])),
                Format<TypeParam>::rounded(exact[i]))
          << name << ' ' << i;
  }
}

TYPED_TEST(SixteenBits, ReadingAFileTakesNoFloatCopyOfTheWhole) {
  if (!measuring::counts_heap) GTEST_SKIP();
  const LocalMHAConfig config{.dim = 256, .window_size = 16, .dim_head = 64, .heads = 4};
  std::vector<std::byte> bytes;
  {
    local_mha::io::SafetensorsWriter writer;
    local_mha::io::add_local_mha(writer, config, LocalMHA<float>(config).parameters(),
                                 {.dtype = dtype<TypeParam>});
    bytes = writer.bytes();
  }
  const auto file = local_mha::io::SafetensorsFile::from_bytes(std::move(bytes));
  const std::size_t before = measuring::heap_use().live;
  measuring::restart_heap_count();
  auto [read, parameters] = local_mha::io::load_local_mha<TypeParam>(file);
  const LocalMHA<float, TypeParam> layer(read, std::move(parameters));
  // The set as it is in the file, and the weights as they are packed.
  const std::size_t stored = 4 * 256 * 256 * sizeof(TypeParam);
  EXPECT_LT(measuring::heap_use().most - before, 2 * stored + stored / 2);
}

}  // namespace sixteen_bits_test
