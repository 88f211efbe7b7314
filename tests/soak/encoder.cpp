// SPDX-License-Identifier: MIT
// Encoder: results and gradients of rows wherever they lie, of sequences of different lengths.
#include <cmath>
#include <limits>
#include <sstream>
#include <utility>
#include <vector>

#include <local_mha/extern.hpp>

#include "reference/gradients.hpp"
#include "soak/cases.hpp"
#include "soak/devices.hpp"
#include "soak/encoder_draw.hpp"
#include "soak/memory.hpp"

namespace soak {

namespace {

using local_mha::Encoder;
using local_mha::EncoderCall;
using local_mha::EncoderParameters;
using local_mha::StridedView;
using local_mha::Tensor;

/// `[B, N, dim]` in memory of its own, in one of the ways in which users have it.
template <typename Scalar>
class Placed {
 public:
  Placed(Random& random, const std::array<Index, 3>& shape) : shape_(shape) {
    const auto [batch, n, dim] = shape;
    const Index between = random.integer(0, 3), behind = random.integer(0, 3);
    if (random.chance(0.4))
      strides_ = {n * dim, dim, 1};
    else if (random.chance(0.5))
      strides_ = {(n + behind) * (dim + between), dim + between, 1};
    else
      strides_ = {dim * (n + behind), 1, n + behind};  // channels first
    numbers_.assign(static_cast<std::size_t>((batch + 1) * (n + behind + 1) * (dim + between + 1)),
                    std::numeric_limits<Scalar>::quiet_NaN());
  }

  StridedView<Scalar> view() { return {numbers_.data(), shape_, strides_}; }
  /// Takes the rows of the sequences; the others stay NaN.
  void take(const Array<double>& from, const std::vector<Index>& lengths) {
    for (Index b = 0; b < shape_[0]; ++b)
      for (Index i = 0; i < length_of(lengths, b, shape_[1]); ++i)
        for (Index c = 0; c < shape_[2]; ++c)
          view().sequence(b)(i, c) = static_cast<Scalar>(from(b, i, c));
  }
  std::vector<Scalar> numbers() {
    std::vector<Scalar> to;
    for (Index b = 0; b < shape_[0]; ++b)
      for (Index i = 0; i < shape_[1]; ++i)
        for (Index c = 0; c < shape_[2]; ++c) to.push_back(view().sequence(b)(i, c));
    return to;
  }

 private:
  std::array<Index, 3> shape_;
  std::array<Index, 3> strides_{};
  std::vector<Scalar> numbers_;
};

template <typename Scalar>
class EncoderRun {
  using Parameters = EncoderParameters<Scalar>;

 public:
  EncoderRun(Check& check, Random& random)
      : check_(check), random_(random), draw_(draw_encoder<Scalar>(random)) {
    check.description = describe(draw_);
  }

  void run() {
    const int threads = draw_threads(random_);
    check_.description += ", " + std::to_string(threads) + " threads";
    const auto encoder = draw_.of.encoder<Scalar>();
    const std::array<Index, 3> shape{draw_.batch(), draw_.seqlen(), draw_.dim()};
    auto expected_gradients = reference::zeros_like(exact<Scalar>(draw_.of.parameters));
    const auto [expected, expected_x] = expected_of<Scalar>(draw_, expected_gradients);

    Placed<Scalar> x(random_, shape), y(random_, shape), grad_y(random_, shape);
    x.take(draw_.of.x, draw_.lengths);
    grad_y.take(draw_.of.grad_y, draw_.lengths);
    const local_mha::PaddingMask mask = draw_.of.mask();
    typename Encoder<Scalar>::Workspace workspace;
    typename Encoder<Scalar>::Saved saved;
    auto gradients = Parameters::zeros(draw_.of.config);
    Tensor<Scalar, 3> grad_x;
    on_threads(threads, [&](const auto& device) {
      const EncoderCall call{.mask = mask, .lengths = draw_.lengths, .device = device};
      if (random_.chance(0.5)) spoil(encoder, workspace, saved, call);
      encoder.forward_into(y.view(), workspace, x.view(), call);
      check_.compare("y", y.numbers().data(), expected);
      const Tensor<Scalar, 3> same = encoder.forward_saving(saved, x.view(), call);
      check_.same("y of forward_saving", same.data(), y.numbers().data(), same.size());
      grad_x = encoder.backward(gradients, saved, grad_y.view(), device);
      check_.equal(
          "allocations of a repeated forward_into()",
          allocations_of([&] { encoder.forward_into(y.view(), workspace, x.view(), call); }), 0L);
    });
    check_.compare("grad x", grad_x.data(), expected_x);
    for_each_parameter(gradients, [&](const std::string& name, const auto& gradient) {
      check_.compare("grad " + name, gradient.data(), expected_gradients.at(name));
    });
    const int others = draw_threads(random_);
    on_threads(others, [&](const auto& device) {
      const Tensor<Scalar, 3> again =
          encoder.forward(x.view(), {.mask = mask, .lengths = draw_.lengths, .device = device});
      check_.same("y on other threads", again.data(), y.numbers().data(), again.size());
    });
  }

 private:
  // Leaves NaN in all that is kept.
  void spoil(const Encoder<Scalar>& encoder, typename Encoder<Scalar>::Workspace& workspace,
             typename Encoder<Scalar>::Saved& saved, const EncoderCall& call) {
    Tensor<Scalar, 3> nan(draw_.batch(), draw_.seqlen() + random_.integer(0, 20), draw_.dim());
    nan.setConstant(std::numeric_limits<Scalar>::quiet_NaN());
    Tensor<Scalar, 3> y(nan.dimensions());
    encoder.forward_into(y, workspace, nan, {.device = call.device});
    encoder.forward_saving(saved, nan, {.device = call.device});
    auto gradients = Parameters::zeros(draw_.of.config);
    encoder.backward(gradients, saved, nan, call.device);
  }

  Check& check_;
  Random& random_;
  EncoderDraw draw_;
};

}  // namespace

void encoder_case(Check& check, Random& random) {
  if (random.chance(0.5))
    EncoderRun<float>(check, random).run();
  else
    EncoderRun<double>(check, random).run();
}

}  // namespace soak
