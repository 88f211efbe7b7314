// SPDX-License-Identifier: MIT
/// \file
/// Encoders: stacks of the layer and a feed-forward, forward or as a step of training.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "case.hpp"
#include "random.hpp"
#include "work.hpp"

namespace measuring::detail {

template <typename Scalar>
class EncoderWork final : public LayerWork<Scalar> {
  template <typename Real>
  using Encoder = local_mha::Encoder<Real>;

 public:
  explicit EncoderWork(const Case& c)
      : LayerWork<Scalar>(c),
        encoder_(configuration(c), 1),
        gradients_(local_mha::EncoderParameters<Scalar>::zeros(configuration(c))),
        threads_(c.threads),
        grad_y_(c.batch, c.seqlen, c.dim),
        y_(c.batch, c.seqlen, c.dim),
        grad_x_(c.batch, c.seqlen, c.dim) {
    Random random(5);
    random.fill(grad_y_);
    y_.setZero();
  }

  void run() override {
    threads_.call([&](const auto& device) {
      if (this->of().backward == 0)
        return encoder_.forward_into(y_, workspace_, this->x_, {.device = device});
      local_mha::set_zero(gradients_);
      encoder_.forward_saving_into(y_, workspace_, saved_, this->x_, {.device = device});
      encoder_.backward_into(grad_x_, workspace_, gradients_, saved_, grad_y_, device);
    });
  }

  /// Of the first rows, which see no others: against an encoder in double of these rows alone, and
  /// so the gradients of a loss of these rows.
  double max_error() const override {
    const Case& c = this->of();
    const Index rows = std::min<Index>(c.seqlen, 40);
    const auto first = [&](const auto& all) {
      local_mha::Tensor<double, 3> some(1, rows, c.dim);
      for (Index i = 0; i < rows; ++i)
        for (Index channel = 0; channel < c.dim; ++channel)
          some(0, i, channel) = static_cast<double>(all(0, i, channel));
      return some;
    };
    const Encoder<double> exact(configuration(c), in_double());
    const auto x = first(this->x_);
    Encoder<double>::Saved saved;
    Comparison results;
    add(results, first(y_), exact.forward_saving(saved, x));
    if (c.backward == 0) return results.relative();

    auto of_first = grad_y_;
    for (Index b = 0; b < c.batch; ++b)
      for (Index i = b == 0 ? rows : 0; i < c.seqlen; ++i)
        for (Index channel = 0; channel < c.dim; ++channel) of_first(b, i, channel) = Scalar(0);
    auto gradients = local_mha::EncoderParameters<Scalar>::zeros(configuration(c));
    auto expected = local_mha::EncoderParameters<double>::zeros(configuration(c));
    Comparison of_x;
    add(of_x, first(encoder_.backward(gradients, saved_, of_first)),
        exact.backward(expected, saved, first(grad_y_)));
    // Of the first layer, behind all others.
    Comparison of_weights;
    const auto& got = gradients.layers.front().attention.to_qkv;
    const auto& all = expected.layers.front().attention.to_qkv;
    for (Index row = 0; row < all.rows(); ++row) of_weights.add(got.row(row), all.row(row));
    return std::max({results.relative(), of_x.relative(), of_weights.relative()});
  }

 private:
  static local_mha::EncoderConfig configuration(const Case& c) {
    local_mha::LocalMHAConfig layer = LayerWork<Scalar>::configuration(c);
    layer.prenorm = true;
    return {.depth = c.depth,
            .layers = {layer},
            .num_residual_streams = std::max<Index>(1, c.residual_streams)};
  }

  local_mha::EncoderParameters<double> in_double() const {
    std::vector<double> numbers;
    for_each_parameter(encoder_.parameters(), [&](const std::string&, const auto& tensor) {
      numbers.insert(numbers.end(), tensor.data(), tensor.data() + tensor.size());
    });
    auto parameters = local_mha::EncoderParameters<double>::zeros(configuration(this->of()));
    auto from = numbers.begin();
    for_each_parameter(parameters, [&](const std::string&, auto& tensor) {
      std::copy_n(from, tensor.size(), tensor.data());
      from += tensor.size();
    });
    return parameters;
  }

  static void add(Comparison& comparison, const local_mha::Tensor<double, 3>& got,
                  const local_mha::Tensor<double, 3>& exact) {
    for (Index i = 0; i < exact.dimension(1); ++i) {
      const auto row = [&](const local_mha::Tensor<double, 3>& all) {
        return Eigen::Map<const Eigen::VectorXd>(all.data() + i * all.dimension(2),
                                                 all.dimension(2));
      };
      comparison.add(row(got), row(exact));
    }
  }

  Encoder<Scalar> encoder_;
  local_mha::EncoderParameters<Scalar> gradients_;
  Threads threads_;
  local_mha::Tensor<Scalar, 3> grad_y_, y_, grad_x_;
  typename Encoder<Scalar>::Workspace workspace_;
  typename Encoder<Scalar>::Saved saved_;
};

}  // namespace measuring::detail
