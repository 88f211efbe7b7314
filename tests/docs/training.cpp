// SPDX-License-Identifier: MIT
// Trains a layer to give at each position what came three positions before.
#include <iostream>

#include <local_mha/local_mha.hpp>

int main() {
  using namespace local_mha;
  using Layer = LocalMHA<float>;
  const LocalMHAConfig config{
      .dim = 16, .window_size = 8, .dim_head = 16, .heads = 2, .causal = true};
  Layer layer(config, /*seed=*/1);
  auto parameters = layer.parameters();
  auto gradients = Layer::Parameters::zeros(config);
  AdamW optimizer({.weight_decay = 0.0}, parameters);
  const CosineSchedule learning_rate(2e-2, 1e-3, /*warmup_steps=*/20, /*steps=*/400);

  const Index batch = 4, length = 64, back = 3;
  RandomSequence random(2);
  Tensor<float, 3> x(batch, length, 16), grad_y(batch, length, 16);
  double first = 0, last = 0;
  for (Index step = 0; step < 400; ++step) {
    for (Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>(random.normal());
    x.chip(0, 2).setConstant(3);  // a channel by which queries and keys know each other's distance
    Layer::Saved saved;
    const auto y = layer.forward_saving(saved, x);
    // Mean squared error, and its gradient by y.
    double loss = 0;
    grad_y.setZero();
    const double scale = 1.0 / static_cast<double>(batch * (length - back) * 16);
    for (Index b = 0; b < batch; ++b)
      for (Index i = back; i < length; ++i)
        for (Index c = 0; c < 16; ++c) {
          const double error = y(b, i, c) - x(b, i - back, c);
          loss += scale * error * error;
          grad_y(b, i, c) = static_cast<float>(2 * scale * error);
        }
    set_zero(gradients);
    layer.backward(gradients, saved, grad_y, x);
    clip_gradients(gradients, 1.0);
    optimizer.step(parameters, gradients, learning_rate(step));
    layer.set_parameters(parameters);
    if (step == 0) first = loss;
    last = loss;
    if (step % 100 == 0) std::cout << "step " << step << ": " << loss << '\n';
  }
  std::cout << "loss " << first << " became " << last << '\n';
  return last < 0.1 * first ? 0 : 1;
}
