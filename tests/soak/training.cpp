// SPDX-License-Identifier: MIT
// What a training is made of: the loss of many positions, clipping, and steps of AdamW.
#include <limits>
#include <utility>

#include <local_mha/extern.hpp>

#include "reference/gradients.hpp"
#include "soak/cases.hpp"
#include "soak/draw.hpp"

namespace soak {

namespace {

using local_mha::LocalMHAParameters;
using local_mha::Tensor;

/// The mean of many numbers is as exact as they are: the library sums them in double.
template <typename Scalar>
Bounded<Scalar> mean_of(const std::vector<Bounded<Scalar>>& terms) {
  double value = 0, error = 0;
  for (const Bounded<Scalar>& term : terms) {
    value += term.value;
    error += term.error;
  }
  const auto count = static_cast<double>(terms.size());
  return Bounded<Scalar>::rounded(value / count, error / count);
}

template <typename Scalar>
void cross_entropy_case(Check& check, Random& random) {
  const bool is_long = random.chance(0.3);
  const Index n = is_long ? random.integer(500, 6000) : draw_length<Scalar>(random);
  const Index batch = random.integer(1, 2),
              classes = random.chance(0.03) ? 1 : random.integer(2, is_long ? 3 : 20);
  const double size =
      random.pick({0.0, 1e-20, 1.0, 1.0, 1.0, 10.0, 10.0, 1e3, random.pick({1e10, 1e30})});
  auto logits = draw_numbers<Scalar>(random, {batch, n, classes}, size == 0 ? 1 : size);
  if (size == 0) std::fill(logits.data.begin(), logits.data.end(), random.normal());
  for (double& logit : logits.data) logit = round_to<Scalar>(logit);
  const Int ignore = random.pick<Int>({-1, -100, 0});
  const double ignored = random.chance(0.03) ? 1 : random.pick({0.0, 0.0, 0.3});
  Array<Int> labels({batch, n});
  for (Int& label : labels.data)
    label = random.chance(ignored) ? ignore : random.integer(0, classes - 1);
  std::ostringstream text;
  text << "cross entropy, B " << batch << " N " << n << " classes " << classes << " size " << size;
  check.description = text.str();

  const auto exact_logits = exact<Scalar>(logits);
  std::vector<Bounded<Scalar>> terms;
  for (std::size_t row = 0; row < labels.data.size(); ++row) {
    if (labels.data[row] == ignore) continue;
    Array<Bounded<Scalar>> of_row({1, 1, classes});
    for (Int c = 0; c < classes; ++c)
      of_row(0, 0, c) =
          exact_logits.data[row * static_cast<std::size_t>(classes) + static_cast<std::size_t>(c)];
    terms.push_back(reference::cross_entropy(of_row, Array<Int>({1, 1}, labels.data[row]), ignore));
  }
  const auto library_logits = support::tensor<Scalar, 3>(logits);
  const auto library_labels = support::tensor<std::int64_t, 2>(labels);
  const Scalar loss = local_mha::cross_entropy<Scalar>(library_logits, library_labels, ignore);
  if (terms.empty()) return check.equal("loss is NaN", std::isnan(loss), true);
  check.compare("loss", 0, loss, mean_of(terms));
  const auto gradient =
      local_mha::cross_entropy_gradient<Scalar>(library_logits, library_labels, ignore);
  check.compare("grad logits", gradient.data(),
                reference::cross_entropy_backward(exact_logits, labels, ignore));
}

/// A set of weights, with what a training does to it, in a few steps. Each step starts from where
/// the library stands, so that errors do not add up.
template <typename Scalar>
class Steps {
  using Parameters = LocalMHAParameters<Scalar>;
  using Number = Bounded<Scalar>;

 public:
  Steps(Check& check, Random& random) : check_(check), random_(random) {
    layer_.dim = random.integer(1, 20);
    layer_.window_size = 1;
    layer_.heads = random.integer(1, 3);
    layer_.dim_head = 2 * random.integer(1, 8);
    layer_.prenorm = random.chance(0.5);
    layer_.qk_rmsnorm = random.chance(0.5);
    layer_.gate_values_per_head = random.chance(0.5);
    config_.beta1 = random.pick({0.9, 0.0, 0.5});
    config_.beta2 = random.pick({0.999, 0.95, 0.0});
    config_.eps = random.pick({1e-8, 1e-8, 1e-3, 1e-12});
    config_.weight_decay = random.pick({0.0, 0.01, 0.5});
    config_.decay_vectors = random.chance(0.5);
  }

  void run() {
    const double size = random_.chance(0.5) ? power(random_, -12, 12) : 1;
    std::ostringstream text;
    text << "AdamW, dim " << layer_.dim << " H " << layer_.heads << " D " << layer_.dim_head
         << " gradients of " << size;
    check_.description = text.str();
    Parameters weights = set(1);
    // A set of the right shapes, whatever it holds.
    local_mha::AdamW optimizer(config_, random_.chance(0.5) ? weights : Parameters::zeros(layer_));
    Parameters mean = Parameters::zeros(layer_), square = mean;
    const int steps = static_cast<int>(random_.integer(1, 4));
    for (int step = 1; step <= steps; ++step) {
      Parameters gradients = set(size);
      if (random_.chance(0.6)) clip(gradients);
      const double rate = random_.pick({1e-3, 3e-4, 1.0, 0.0});
      const Parameters before = weights;
      optimizer.step(weights, gradients, rate);
      compare(step, rate, before, gradients, mean, square, weights, optimizer.mean(),
              optimizer.square());
      mean = optimizer.mean();
      square = optimizer.square();
    }
  }

 private:
  Parameters set(double size) {
    auto values = support::named<double>(Parameters::zeros(layer_));
    for (auto& [name, array] : values) array = draw_numbers<Scalar>(random_, array.shape, size);
    auto parameters = Parameters::zeros(layer_);
    support::assign(parameters, values);
    return parameters;
  }

  static Array<Number> numbers(const Array<double>& array) { return exact<Scalar>(array); }

  void clip(Parameters& gradients) {
    const auto before = support::named<double>(gradients);
    double squares = 0;
    for (const auto& [name, array] : before)
      for (const double g : array.data) squares += g * g;
    const double norm = std::sqrt(squares), most = power(random_, -3, 3);
    const double got = local_mha::clip_gradients(gradients, most);
    // Of some thousand squares, summed in double.
    constexpr double relative = 1e-13;
    check_.compare("norm", 0, got, Bounded<double>::rounded(norm, relative * norm));
    const double scale = std::min(1.0, most / (norm + 1e-6));
    const Number factor = Number::rounded(scale, scale < 1 ? relative * scale : 0);
    for_each_parameter(gradients, [&](const std::string& name, const auto& tensor) {
      Array<Number> expected = numbers(before.at(name));
      for (Number& g : expected.data) g *= factor;
      check_.compare("clipped " + name, tensor.data(), expected);
    });
  }

  void compare(int step, double rate, const Parameters& before, const Parameters& gradients,
               const Parameters& mean, const Parameters& square, const Parameters& weights,
               const Parameters& new_mean, const Parameters& new_square) {
    const auto constant = [](double value) { return Number::rounded(value, 0); };
    const Number beta1 = constant(config_.beta1), beta2 = constant(config_.beta2);
    const Number rest1 = constant(1 - config_.beta1), rest2 = constant(1 - config_.beta2);
    const Number correction1 = constant(1 - std::pow(config_.beta1, step));
    const Number correction2 = constant(std::sqrt(1 - std::pow(config_.beta2, step)));
    const auto w = support::named<double>(before), g = support::named<double>(gradients);
    auto m = exact_set(mean), v = exact_set(square), expected = exact_set(before);
    for (auto& [name, array] : expected) {
      const bool decays = array.shape.size() == 2 || config_.decay_vectors;
      const Number keep = constant(1 - (decays ? rate * config_.weight_decay : 0));
      for (std::size_t i = 0; i < array.data.size(); ++i) {
        const Number gradient(g.at(name).data[i]);
        Number& first = m.at(name).data[i];
        Number& second = v.at(name).data[i];
        first = beta1 * first + rest1 * gradient;
        second = beta2 * second + rest2 * gradient * gradient;
        array.data[i] =
            keep * array.data[i] - constant(rate) * (first / correction1) /
                                       (sqrt(second) / correction2 + constant(config_.eps));
      }
    }
    const auto same = [&](const char* what, const Parameters& got,
                          const reference::Parameters<Number>& of) {
      for_each_parameter(got, [&](const std::string& name, const auto& tensor) {
        check_.compare(what + name, tensor.data(), of.at(name));
      });
    };
    same("mean of ", new_mean, m);
    same("square of ", new_square, v);
    same("weight ", weights, expected);
  }

  static reference::Parameters<Number> exact_set(const Parameters& parameters) {
    reference::Parameters<Number> to;
    for (const auto& [name, array] : support::named<double>(parameters)) to[name] = numbers(array);
    return to;
  }

  Check& check_;
  Random& random_;
  local_mha::LocalMHAConfig layer_;
  local_mha::AdamWConfig config_;
};

template <typename Scalar>
void training_run(Check& check, Random& random) {
  if (random.chance(0.4))
    cross_entropy_case<Scalar>(check, random);
  else
    Steps<Scalar>(check, random).run();
}

}  // namespace

void training_case(Check& check, Random& random) {
  if (random.chance(0.7))
    training_run<float>(check, random);
  else
    training_run<double>(check, random);
}

}  // namespace soak
