// SPDX-License-Identifier: MIT
// LocalTransformer: logits, loss and gradients; and its feed-forward alone.
#include <limits>
#include <utility>

#include <local_mha/extern.hpp>

#include "reference/gradients.hpp"
#include "soak/cases.hpp"
#include "soak/devices.hpp"
#include "soak/memory.hpp"
#include "soak/transformer_draw.hpp"

namespace soak {

namespace {

using local_mha::FeedForward;
using local_mha::FeedForwardParameters;
using local_mha::LocalTransformer;
using local_mha::RowMatrix;
using local_mha::Tensor;

template <typename Scalar>
class TransformerRun {
  using Model = LocalTransformer<Scalar>;
  using Parameters = typename Model::Parameters;

 public:
  TransformerRun(Check& check, Random& random)
      : check_(check),
        random_(random),
        draw_(draw_transformer<Scalar>(random)),
        model_(draw_.config, weights(draw_.parameters)),
        tokens_(tensor_of(draw_.tokens)),
        labels_(tensor_of(draw_.labels)),
        mask_(support::padding_mask(draw_.masked, draw_.batch(), draw_.seqlen())) {
    check.description = describe(draw_);
  }

  void run() {
    const int threads = draw_threads(random_);
    check_.description += ", " + std::to_string(threads) + " threads";
    const auto parameters = exact<Scalar>(draw_.parameters);
    auto expected_gradients = reference::zeros_like(parameters);
    const auto expected = draw_.lengths.empty()
                              ? reference::transformer_backward(
                                    transformer_options<Scalar>(draw_.config), parameters,
                                    draw_.tokens, draw_.labels, draw_.config.ignore_index,
                                    draw_.masked, expected_gradients, dropout_of<Scalar>(draw_))
                              : of_each_sequence(parameters, expected_gradients);
    auto gradients = Parameters::zeros(draw_.config);
    Tensor<Scalar, 3> logits;
    Scalar loss = 0, loss_of_backward = 0;
    for (Index b = 0; b < draw_.batch(); ++b)
      for (Index i = length_of(draw_.lengths, b, draw_.seqlen()); i < draw_.seqlen(); ++i)
        tokens_(b, i) = labels_(b, i) = -7;
    on_threads(threads, [&](const auto& device) {
      logits = model_.forward(tokens_, call(device));
      loss = model_.loss(tokens_, labels_, call(device));
      loss_of_backward = model_.backward(gradients, tokens_, labels_, call(device));
    });
    check_.compare("logits", logits.data(), expected.logits);
    if (draw_.counted() == 0) return check_.equal("loss is NaN", std::isnan(loss), true);
    check_.compare("loss", 0, loss, expected.loss);
    check_.compare("loss of backward", 0, loss_of_backward, expected.loss);
    for_each_parameter(gradients, [&](const std::string& name, const auto& gradient) {
      check_.compare("grad " + name, gradient.data(), expected_gradients.at(name));
    });
    if (random_.chance(0.15)) repeat_at_once(logits);
    if (random_.chance(0.15)) fail_to_set_parameters(logits);
  }

 private:
  local_mha::EncoderCall call(const local_mha::AnyDevice& device) const {
    return {.mask = mask_, .training = draw_.training, .lengths = draw_.lengths, .device = device};
  }

  // One sequence after the other, whose losses count as many times as they have labels.
  reference::TransformerGradients<Bounded<Scalar>> of_each_sequence(
      const reference::Parameters<Bounded<Scalar>>& parameters,
      reference::Parameters<Bounded<Scalar>>& gradients) const {
    using Real = Bounded<Scalar>;
    const Index n = draw_.seqlen();
    reference::TransformerGradients<Real> all;
    all.logits = Array<Real>({draw_.batch(), n, draw_.config.num_tokens});
    for (Index b = 0; b < draw_.batch(); ++b) {
      const Index length = length_of(draw_.lengths, b, n);
      auto of_one = reference::zeros_like(parameters);
      const auto one = reference::transformer_backward(
          transformer_options<Scalar>(draw_.config), parameters,
          sequence_of(draw_.tokens, b, length), sequence_of(draw_.labels, b, length),
          draw_.config.ignore_index, sequence_of(draw_.masked, b, length, n), of_one);
      put_sequence(one.logits, b, all.logits);
      if (draw_.counted(b) == 0) continue;
      const Real share =
          Real(static_cast<double>(draw_.counted(b))) / Real(static_cast<double>(draw_.counted()));
      all.loss += share * one.loss;
      for (auto& [name, gradient] : gradients)
        for (std::size_t i = 0; i < gradient.data.size(); ++i)
          gradient.data[i] += share * of_one.at(name).data[i];
    }
    return all;
  }

  Parameters weights(const reference::Parameters<double>& values) const {
    auto parameters = Parameters::zeros(draw_.config);
    support::assign(parameters, values);
    return parameters;
  }
  static Tensor<std::int64_t, 2> tensor_of(const Array<Int>& tokens) {
    return support::tensor<std::int64_t, 2>(tokens);
  }

  void repeat_at_once(const Tensor<Scalar, 3>& logits) {
    const int threads = draw_threads(random_);
    Tensor<Scalar, 3> others[2];
    all_at_once(2, [&](int i) {
      on_threads(i == 0 ? threads : 0,
                 [&](const auto& device) { others[i] = model_.forward(tokens_, call(device)); });
    });
    for (const Tensor<Scalar, 3>& other : others)
      check_.same("logits of calls at once", other.data(), logits.data(), logits.size());
  }

  // A model keeps its weights if it cannot take others.
  void fail_to_set_parameters(const Tensor<Scalar, 3>& logits) {
    auto others = draw_.parameters;
    for (auto& [name, array] : others)
      for (double& number : array.data) number = round_to<Scalar>(number / 2 + 0.25);
    Parameters other = weights(others);
    fail_after(random_.integer(0, 40));
    bool failed = false;
    try {
      model_.set_parameters(std::move(other));
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    fail_no_more();
    if (!failed) return;
    const Tensor<Scalar, 3> again = model_.forward(tokens_, call({}));
    check_.same("logits of a model that could not take other weights", again.data(), logits.data(),
                logits.size());
  }

  Check& check_;
  Random& random_;
  TransformerDraw draw_;
  Model model_;
  Tensor<std::int64_t, 2> tokens_, labels_;
  local_mha::PaddingMask mask_;
};

template <typename Scalar>
class FeedForwardRun {
  using Layer = FeedForward<Scalar>;
  using Parameters = FeedForwardParameters<Scalar>;

 public:
  FeedForwardRun(Check& check, Random& random) : check_(check), random_(random) {}

  void run() {
    const Index dim = random_.integer(2, 30), inner = random_.integer(1, 40);
    const Index rows = draw_length<Scalar>(random_);
    const double size_of_x = random_.chance(0.4) ? random_.uniform(-25, 25) : 0;
    auto parameters = support::named<double>(Parameters::zeros(dim, inner));
    for (auto& [name, array] : parameters) {
      const bool is_matrix = array.shape.size() == 2;
      const double fan_in = is_matrix ? std::sqrt(static_cast<double>(array.shape.back())) : 1;
      const double spread = is_matrix && random_.chance(0.3) ? power(random_, -3, 3) : 1;
      array = draw_numbers<Scalar>(random_, array.shape, spread / fan_in);
    }
    const auto x = draw_numbers<Scalar>(random_, {rows, dim}, std::pow(10.0, size_of_x));
    const auto grad_y = draw_numbers<Scalar>(random_, {rows, dim}, power(random_, -5, 5));
    std::ostringstream text;
    text << "feed-forward, rows " << rows << " dim " << dim << " inner " << inner << ", 10^(x "
         << size_of_x << ")";
    check_.description = text.str();

    auto library = Parameters::zeros(dim, inner);
    support::assign(library, parameters);
    const Layer layer(library);
    const auto weights = exact<Scalar>(parameters);
    auto expected_gradients = reference::zeros_like(weights);
    const auto exact_x = exact<Scalar>(x);
    const auto expected = reference::feed_forward(weights, exact_x);
    const auto expected_x = reference::feed_forward_backward(
        weights, exact_x, exact<Scalar>(grad_y), expected_gradients);
    auto gradients = Parameters::zeros(dim, inner);
    typename Layer::Saved saved;
    on_threads(draw_threads(random_), [&](const auto& device) {
      if (random_.chance(0.4)) {
        const RowMatrix<Scalar> nan = RowMatrix<Scalar>::Constant(
            rows + random_.integer(0, 3), dim, std::numeric_limits<Scalar>::quiet_NaN());
        layer.forward_saving(saved, nan, {.device = device});
      }
      const RowMatrix<Scalar> y = layer.forward_saving(saved, matrix(x), {.device = device});
      check_.compare("y", y.data(), expected);
      const RowMatrix<Scalar> grad_x =
          layer.backward(gradients, saved, matrix(grad_y), matrix(x), {.device = device});
      check_.compare("grad x", grad_x.data(), expected_x);
    });
    for_each_parameter(gradients, [&](const std::string& name, const auto& gradient) {
      check_.compare("grad " + name, gradient.data(), expected_gradients.at(name));
    });
  }

 private:
  static RowMatrix<Scalar> matrix(const Array<double>& array) {
    RowMatrix<Scalar> to(array.shape[0], array.shape[1]);
    for (std::size_t i = 0; i < array.data.size(); ++i)
      to.data()[i] = static_cast<Scalar>(array.data[i]);
    return to;
  }

  Check& check_;
  Random& random_;
};

template <typename Scalar>
void transformer_run(Check& check, Random& random) {
  if (random.chance(0.4))
    FeedForwardRun<Scalar>(check, random).run();
  else
    TransformerRun<Scalar>(check, random).run();
}

}  // namespace

void transformer_case(Check& check, Random& random) {
  if (random.chance(0.5))
    transformer_run<float>(check, random);
  else
    transformer_run<double>(check, random);
}

}  // namespace soak
