// SPDX-License-Identifier: MIT
// Rows wherever they lie: the same bits as of a tensor, and nothing else is written.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/library.hpp"
#include "support/random_case.hpp"
#include "support/random_encoder.hpp"

namespace views_test {

using local_mha::channels_first;
using local_mha::Encoder;
using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalMHAParameters;
using local_mha::RowMatrix;
using local_mha::StridedView;
using local_mha::Tensor;
using support::same_bits;

using Shape = std::array<Index, 3>;

// How a batch may lie in memory.
struct Place {
  const char* name;
  Shape (*strides)(const Shape&);
};
constexpr std::array<Place, 6> places{{
    {"rows apart", [](const Shape& n) { return Shape{n[1] * (n[2] + 3), n[2] + 3, 1}; }},
    {"sequences apart", [](const Shape& n) { return Shape{(n[1] + 2) * n[2], n[2], 1}; }},
    {"rows before sequences", [](const Shape& n) { return Shape{n[2], n[0] * n[2], 1}; }},
    {"channels first", [](const Shape& n) { return Shape{n[1] * n[2], 1, n[1]}; }},
    {"channels before sequences", [](const Shape& n) { return Shape{n[1], 1, n[0] * n[1]}; }},
    {"every third number", [](const Shape& n) { return Shape{n[1] * n[2] * 3, n[2] * 3, 3}; }},
}};

// Memory of which a batch takes a part.
template <typename Scalar>
class Scattered {
 public:
  Scattered(const Place& place, const Shape& shape)
      : shape_(shape), strides_(place.strides(shape)) {
    Index size = 1;
    for (std::size_t axis = 0; axis < 3; ++axis)
      size += std::max<Index>(0, shape[axis] - 1) * strides_[axis];
    numbers_.assign(static_cast<std::size_t>(size), -7);
  }
  Scattered(const Place& place, const Tensor<Scalar, 3>& from)
      : Scattered(place, Shape{from.dimension(0), from.dimension(1), from.dimension(2)}) {
    std::fill(numbers_.begin(), numbers_.end(), std::numeric_limits<Scalar>::quiet_NaN());
    each([&](const Shape& i, Scalar& number) { number = from(i[0], i[1], i[2]); });
  }

  StridedView<Scalar> view() { return {numbers_.data(), shape_, strides_}; }
  StridedView<const Scalar> view() const { return {numbers_.data(), shape_, strides_}; }

  Tensor<Scalar, 3> tensor() {
    Tensor<Scalar, 3> to(shape_[0], shape_[1], shape_[2]);
    each([&](const Shape& i, Scalar& number) { to(i[0], i[1], i[2]) = number; });
    return to;
  }
  // Whether what is none of the batch is as it was.
  bool rest_is_untouched() {
    each([&](const Shape&, Scalar& number) { number = -7; });
    return std::all_of(numbers_.begin(), numbers_.end(),
                       [](Scalar number) { return number == -7; });
  }

 private:
  template <typename Visit>
  void each(Visit&& visit) {
    for (Index b = 0; b < shape_[0]; ++b)
      for (Index i = 0; i < shape_[1]; ++i)
        for (Index c = 0; c < shape_[2]; ++c)
          visit(Shape{b, i, c}, numbers_[static_cast<std::size_t>(
                                    b * strides_[0] + i * strides_[1] + c * strides_[2])]);
  }

  Shape shape_;
  Shape strides_;
  std::vector<Scalar> numbers_;
};

template <typename Scalar>
class Views : public testing::Test {};
TYPED_TEST_SUITE(Views, support::Scalars, support::ScalarNames);

TYPED_TEST(Views, OfALayerGiveTheBitsOfATensor) {
  using Scalar = TypeParam;
  using Layer = LocalMHA<Scalar>;
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    const auto c = support::layer_case(seed);
    const Layer layer(c.config, support::layer_parameters<Scalar>(c.config, c.parameters));
    const auto x = support::tensor<Scalar, 3>(c.in.x);
    const Shape shape{x.dimension(0), x.dimension(1), x.dimension(2)};
    Tensor<Scalar, 3> grad_y(shape);
    for (Index i = 0; i < grad_y.size(); ++i) grad_y.data()[i] = Scalar(1) / Scalar(i + 2);
    const auto bias = support::bias_tensor<Scalar>(c.in.bias);
    const typename Layer::Call call{.mask = support::padding_mask(c.in.masked, shape[0], shape[1]),
                                    .attn_bias = support::optional_view(bias)};
    typename Layer::Saved saved;
    const auto y = layer.forward_saving(saved, x, call);
    auto gradients = LocalMHAParameters<Scalar>::zeros(c.config);
    const auto grad_x = layer.backward(gradients, saved, grad_y, x, call);
    for (const Place& place : places) {
      SCOPED_TRACE("seed " + std::to_string(seed) + ", " + place.name);
      const Scattered<Scalar> from(place, x);
      const Scattered<Scalar> from_grad(place, grad_y);
      Scattered<Scalar> to(place, shape);
      typename Layer::Workspace workspace;
      EXPECT_TRUE(same_bits(layer.forward(from.view(), call), y));
      layer.forward_into(to.view(), workspace, from.view(), call);
      EXPECT_TRUE(same_bits(to.tensor(), y));
      EXPECT_TRUE(to.rest_is_untouched());
      // What one call kept serves a call of the same numbers that lie elsewhere.
      typename Layer::Saved kept;
      layer.forward_saving_into(to.view(), workspace, kept, from.view(), call);
      EXPECT_TRUE(same_bits(to.tensor(), y));
      for (const auto* of_forward : {&saved, &kept}) {
        auto again = LocalMHAParameters<Scalar>::zeros(c.config);
        layer.backward_into(to.view(), workspace, again, *of_forward, from_grad.view(), from.view(),
                            call);
        EXPECT_TRUE(same_bits(to.tensor(), grad_x));
        EXPECT_TRUE(to.rest_is_untouched());
        const auto expected = support::named<Scalar>(gradients);
        for (const auto& [name, gradient] : support::named<Scalar>(again))
          EXPECT_EQ(gradient.data, expected.at(name).data) << name;
      }
      if (call.attn_bias) continue;
      typename Layer::Stream stream(layer, {.batch = shape[0]});
      typename Layer::Stream plain(layer, {.batch = shape[0]});
      for (Index at = 0, n = 1; at < shape[1]; at += n, n = n % 5 + 2) {
        n = std::min(n, shape[1] - at);
        const Eigen::array<Index, 3> begin{0, at, 0}, size{shape[0], n, shape[2]};
        const Tensor<Scalar, 3> chunk = x.slice(begin, size);
        const Scattered<Scalar> scattered(place, chunk);
        Scattered<Scalar> out(place, Shape{shape[0], stream.results_of(n), shape[2]});
        stream.push_into(out.view(), scattered.view());
        EXPECT_TRUE(same_bits(out.tensor(), plain.push(chunk)));
        EXPECT_TRUE(out.rest_is_untouched());
      }
      Scattered<Scalar> out(place, Shape{shape[0], stream.results_of_flush(), shape[2]});
      stream.flush_into(out.view());
      EXPECT_TRUE(same_bits(out.tensor(), plain.flush()));
    }
  }
}

TYPED_TEST(Views, OfAnEncoderGiveTheBitsOfATensor) {
  using Scalar = TypeParam;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const support::RandomEncoder c(seed);
    const auto encoder = c.encoder<Scalar>();
    const auto x = c.input<Scalar>();
    const Shape shape{x.dimension(0), x.dimension(1), x.dimension(2)};
    typename Encoder<Scalar>::Saved saved;
    const auto y = encoder.forward_saving(saved, x, {.mask = c.mask()});
    auto gradients = Encoder<Scalar>::Parameters::zeros(c.config);
    const auto grad_x = encoder.backward(gradients, saved, x);
    for (const Place& place : places) {
      SCOPED_TRACE("seed " + std::to_string(seed) + ", " + place.name);
      const Scattered<Scalar> from(place, x);
      Scattered<Scalar> to(place, shape);
      typename Encoder<Scalar>::Workspace workspace;
      encoder.forward_into(to.view(), workspace, from.view(), {.mask = c.mask()});
      EXPECT_TRUE(same_bits(to.tensor(), y));
      EXPECT_TRUE(to.rest_is_untouched());
      typename Encoder<Scalar>::Saved kept;
      EXPECT_TRUE(same_bits(encoder.forward_saving(kept, from.view(), {.mask = c.mask()}), y));
      auto again = Encoder<Scalar>::Parameters::zeros(c.config);
      EXPECT_TRUE(same_bits(encoder.backward(again, kept, from.view()), grad_x));
      typename Encoder<Scalar>::Stream stream(encoder, {.batch = shape[0]});
      typename Encoder<Scalar>::Stream plain(encoder, {.batch = shape[0]});
      Scattered<Scalar> out(place, Shape{shape[0], stream.results_of(shape[1]), shape[2]});
      stream.push_into(out.view(), from.view());
      EXPECT_TRUE(same_bits(out.tensor(), plain.push(x)));
      EXPECT_TRUE(out.rest_is_untouched());
    }
  }
}

const LocalMHAConfig config{.dim = 6, .window_size = 4, .dim_head = 4, .heads = 2};

// What users have in their hands, without a word more.
TYPED_TEST(Views, AreMadeOfWhatIsThere) {
  using Scalar = TypeParam;
  const LocalMHA<Scalar> layer(config);
  Tensor<Scalar, 3> x(1, 21, 6);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = Scalar(i % 13) - Scalar(5);
  const auto y = layer.forward(x);

  std::vector<Scalar> vector(x.data(), x.data() + x.size());
  EXPECT_TRUE(same_bits(layer.forward({vector, {1, 21, 6}}), y));
  EXPECT_TRUE(same_bits(layer.forward({std::span<const Scalar>(vector), {1, 21, 6}}), y));
  EXPECT_TRUE(same_bits(layer.forward({vector.data(), {1, 21, 6}}), y));

  RowMatrix<Scalar> matrix = Eigen::Map<RowMatrix<Scalar>>(x.data(), 21, 6);
  const RowMatrix<Scalar>& constant = matrix;
  EXPECT_TRUE(same_bits(layer.forward(matrix), y));
  EXPECT_TRUE(same_bits(layer.forward(constant), y));
  EXPECT_TRUE(same_bits(layer.forward(Eigen::Map<const RowMatrix<Scalar>>(x.data(), 21, 6)), y));
  EXPECT_TRUE(same_bits(layer.forward(Eigen::Ref<const RowMatrix<Scalar>>(matrix)), y));
  RowMatrix<Scalar> larger = RowMatrix<Scalar>::Constant(30, 11, 99);
  larger.block(4, 2, 21, 6) = matrix;
  EXPECT_TRUE(same_bits(layer.forward(larger.block(4, 2, 21, 6)), y));
  EXPECT_TRUE(same_bits(layer.forward(larger.middleRows(4, 21).middleCols(2, 6)), y));

  typename LocalMHA<Scalar>::Workspace workspace;
  RowMatrix<Scalar> results(21, 6);
  layer.forward_into(results, workspace, matrix);
  EXPECT_EQ(results, (Eigen::Map<const RowMatrix<Scalar>>(y.data(), 21, 6)));
  larger.setConstant(99);
  layer.forward_into(larger.block(3, 1, 21, 6), workspace, matrix);
  EXPECT_EQ(larger.block(3, 1, 21, 6), results);
  EXPECT_EQ(larger.sum() - results.sum(), Scalar(99 * (30 * 11 - 21 * 6)));
  layer.forward_into({vector, {1, 21, 6}}, workspace, x);
  EXPECT_EQ(vector, std::vector<Scalar>(y.data(), y.data() + y.size()));

  const Eigen::array<int, 3> channels_then_rows{0, 2, 1};
  const Tensor<Scalar, 3> turned = x.shuffle(channels_then_rows);
  EXPECT_TRUE(same_bits(layer.forward(channels_first(turned)), y));
  Tensor<Scalar, 3> turned_y(1, 6, 21);
  layer.forward_into(channels_first(turned_y), workspace, channels_first(turned));
  const Tensor<Scalar, 3> back = turned_y.shuffle(channels_then_rows);
  EXPECT_TRUE(same_bits(back, y));

  const local_mha::LocalAttention<Scalar> attention({.window_size = 4});
  const std::vector<Scalar> given(x.data(), x.data() + x.size());
  const Tensor<Scalar, 4> q = x.reshape(Eigen::array<Index, 4>{1, 1, 21, 6});
  EXPECT_TRUE(
      same_bits(attention.forward({given, {1, 1, 21, 6}}, {std::span(given), {1, 1, 21, 6}}, q),
                attention.forward(q, q, q)));
}

// An empty pair of braces is a call without anything, a temporary tensor an argument.
TYPED_TEST(Views, ComeWithCallsOfEveryForm) {
  using Scalar = TypeParam;
  const LocalMHA<Scalar> layer(config);
  Tensor<Scalar, 3> x(2, 9, 6);
  x.setRandom();
  const auto y = layer.forward(x);
  EXPECT_TRUE(same_bits(layer.forward(x, {}), y));
  EXPECT_TRUE(same_bits(layer.forward(x, local_mha::PaddingMask()), y));
  EXPECT_TRUE(same_bits(layer.forward(x, {}, {}), y));
  typename LocalMHA<Scalar>::Saved saved;
  EXPECT_TRUE(same_bits(layer.forward_saving(saved, x, {}), y));
  auto gradients = LocalMHAParameters<Scalar>::zeros(config);
  const auto grad_x = layer.backward(gradients, saved, y, x);
  EXPECT_TRUE(same_bits(layer.backward(gradients, saved, y, x, {}), grad_x));
  EXPECT_TRUE(same_bits(layer.backward(gradients, saved, y, x, local_mha::PaddingMask()), grad_x));
  EXPECT_TRUE(same_bits(layer.attention_probabilities(x, {}), layer.attention_probabilities(x)));
  const Eigen::array<int, 3> channels_then_rows{0, 2, 1};
  EXPECT_TRUE(same_bits(
      layer.forward(channels_first(Tensor<Scalar, 3>(x.shuffle(channels_then_rows)))), y));
}

TYPED_TEST(Views, AllocateNothing) {
  using Scalar = TypeParam;
  const LocalMHA<Scalar> layer(config);
  const Encoder<Scalar> encoder({.depth = 2, .layers = {config}});
  Tensor<Scalar, 3> x(2, 6, 40), y(2, 6, 40);
  x.setRandom();
  typename LocalMHA<Scalar>::Workspace workspace;
  typename Encoder<Scalar>::Workspace of_encoder;
  const auto call = [&] {
    layer.forward_into(channels_first(y), workspace, channels_first(x));
    encoder.forward_into(channels_first(y), of_encoder, channels_first(x));
  };
  call();
  EXPECT_EQ(support::allocations_of(call), 0);
}

}  // namespace views_test
