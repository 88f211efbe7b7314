// SPDX-License-Identifier: MIT
// A struct of a user's own as a set of weights, and calls whose template arguments are deduced.
#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/library.hpp"

namespace parameter_set_test {

using local_mha::AdamW;
using local_mha::EncoderParameters;
using local_mha::Index;
using local_mha::ParameterSet;
using local_mha::RowMatrix;
using local_mha::Single;
using local_mha::Tensor;
using local_mha::TensorView;
using local_mha::Vector;

const local_mha::EncoderConfig encoder_config{
    .depth = 1, .layers = {{.dim = 4, .window_size = 2, .dim_head = 2, .heads = 2}}};

struct Head {
  RowMatrix<double> weight;
  Vector<double> bias;
  static void visit_each(auto& set, auto&& visit) {
    visit("weight", set.weight);
    visit("bias", set.bias);
  }
};

/// All that a set may have; the scalars differ.
struct Model {
  RowMatrix<float> embedding = RowMatrix<float>::Constant(3, 4, 1);
  EncoderParameters<float> encoder =
      local_mha::initial_parameters<EncoderParameters<float>>(encoder_config, 1);
  Head head{RowMatrix<double>::Constant(2, 4, 2), Vector<double>::Constant(2, 3)};
  std::optional<Single<float>> scale;
  std::optional<Single<float>> offset = Single<float>(5);
  std::vector<Head> more{head, head};

  static void visit_each(auto& set, auto&& visit) {
    visit("embedding", set.embedding);
    visit("encoder", set.encoder);
    visit("head", set.head);
    visit("scale", set.scale);
    visit("offset", set.offset);
    visit("more", set.more);
  }
};

struct NoSet {
  RowMatrix<float> weight;
};
struct NotOfConst {
  RowMatrix<float> weight;
  static void visit_each(NotOfConst& set, auto&& visit) { visit("weight", set.weight); }
};
static_assert(ParameterSet<Model> && ParameterSet<const Model> && ParameterSet<Head>);
static_assert(ParameterSet<EncoderParameters<float>>);
static_assert(ParameterSet<local_mha::LocalTransformerParameters<double>>);
static_assert(!ParameterSet<NoSet> && !ParameterSet<NotOfConst> && !ParameterSet<int>);

std::vector<std::pair<std::string, double>> sums(const Model& model) {
  std::vector<std::pair<std::string, double>> all;
  local_mha::for_each_parameter(model, [&](const std::string& name, const auto& tensor) {
    all.emplace_back(name, tensor.template cast<double>().sum());
  });
  return all;
}

TEST(ParameterSet, OfAUsersOwnIsVisitedWithTheSetsInIt) {
  const Model model;
  std::vector<std::string> names;
  for (const auto& named : sums(model)) names.push_back(named.first);
  std::vector<std::string> expected{"embedding"};
  local_mha::for_each_parameter(model.encoder, [&](const std::string& name, const auto&) {
    expected.push_back("encoder." + name);
  });
  EXPECT_GT(expected.size(), 5U);
  for (const char* name : {"head.weight", "head.bias", "offset", "more.0.weight", "more.0.bias",
                           "more.1.weight", "more.1.bias"})
    expected.emplace_back(name);
  EXPECT_EQ(names, expected);
}

TEST(ParameterSet, OfAUsersOwnIsClippedAndSetToZero) {
  Model gradients;
  double squares = 0;
  local_mha::for_each_parameter(gradients, [&](const std::string&, const auto& tensor) {
    squares += tensor.template cast<double>().squaredNorm();
  });
  const double norm = std::sqrt(squares);
  EXPECT_NEAR(local_mha::global_norm(gradients), norm, 1e-12 * norm);
  EXPECT_EQ(local_mha::clip_gradients(gradients, 2 * norm), local_mha::global_norm(gradients));
  EXPECT_EQ(gradients.head.bias(0), 3);
  EXPECT_NEAR(local_mha::clip_gradients(gradients, 1.0), norm, 1e-12 * norm);
  EXPECT_NEAR(local_mha::global_norm(gradients), 1, 1e-6);
  EXPECT_NEAR(gradients.head.bias(0), 3 / norm, 1e-6);
  EXPECT_NEAR((*gradients.offset)(0), 5 / norm, 1e-6);
  local_mha::set_zero(gradients);
  for (const auto& [name, sum] : sums(gradients)) EXPECT_EQ(sum, 0) << name;
}

// Each tensor's step is that of a set of its own.
TEST(ParameterSet, OfAUsersOwnIsOptimized) {
  Model model;
  Model gradients;
  gradients.head.weight.setRandom();
  gradients.embedding.setRandom();
  Model alone = model;
  const local_mha::AdamWConfig config{.weight_decay = 0.1, .decay_vectors = false};
  AdamW optimizer(config, model);
  AdamW of_head(config, alone.head);
  AdamW of_encoder(config, alone.encoder);
  static_assert(std::is_same_v<decltype(optimizer), AdamW<Model>>);
  for (int step = 0; step < 3; ++step) {
    optimizer.step(model, gradients, 0.1);
    of_head.step(alone.head, gradients.head, 0.1);
    of_encoder.step(alone.encoder, gradients.encoder, 0.1);
  }
  // But for roundings: one may be compiled with fused multiplications, and the other without.
  const auto same = [](const auto& a, const auto& b) { return a.isApprox(b, 1e-6F); };
  EXPECT_TRUE(same(model.head.weight, alone.head.weight));
  EXPECT_TRUE(same(model.head.bias, alone.head.bias));
  EXPECT_TRUE(
      same(model.encoder.layers[0].attention.to_qkv, alone.encoder.layers[0].attention.to_qkv));
  EXPECT_NE(model.embedding, alone.embedding);
  EXPECT_EQ(optimizer.mean().more.size(), 2U);
}

TEST(ParameterSet, OfOtherShapesIsRefusedByName) {
  Model model;
  AdamW optimizer({}, model);
  const auto refused = [&](const Model& gradients) {
    try {
      optimizer.step(model, gradients, 0.1);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  Model gradients;
  gradients.head.bias.resize(3);
  EXPECT_EQ(refused(gradients), "head.bias: expected shape [2, 1], got [3, 1]");
  gradients = Model();
  gradients.offset.reset();
  EXPECT_EQ(refused(gradients), "offset: expected shape [1, 1], got more.0.weight in its place");
  gradients = Model();
  gradients.more.push_back(gradients.head);
  EXPECT_EQ(refused(gradients),
            "more.2.weight: expected nothing, the configuration has no such "
            "tensor, got [2, 4]");
  gradients = Model();
  gradients.encoder.layers[0].feed_forward.proj_out.resize(1, 1);
  EXPECT_EQ(refused(gradients).find("encoder.layers.0.1.branch.4.weight: expected shape"), 0U);
  EXPECT_EQ(optimizer.steps(), 0U);
}

template <typename Scalar>
struct OfAScalar {
  Vector<Scalar> bias;
  static void visit_each(auto& set, auto&& visit) { visit("bias", set.bias); }
};
struct WithAScalar : Head {
  using Scalar = double;
};

TEST(ParameterSet, OfOneScalarIsListed) {
  OfAScalar<float> set{Vector<float>::Ones(3)};
  auto entries = local_mha::list_parameters(set);
  static_assert(std::is_same_v<decltype(entries[0].data), float*>);
  ASSERT_EQ(entries.size(), 1U);
  EXPECT_EQ(entries[0].name, "bias");
  EXPECT_FALSE(entries[0].is_matrix);
  entries[0].data[2] = 7;
  EXPECT_EQ(set.bias(2), 7);
  const WithAScalar other{{RowMatrix<double>::Ones(2, 3), Vector<double>::Ones(2)}};
  const auto of_other = local_mha::list_parameters(other);
  static_assert(std::is_same_v<decltype(of_other[0].data), const double*>);
  EXPECT_EQ(of_other.size(), 2U);
  EXPECT_TRUE(of_other[0].is_matrix);
}

TEST(Deduced, AreTheScalarsOfViewsAndFunctions) {
  Tensor<double, 3> logits(1, 2, 3);
  logits.setRandom();
  Tensor<std::int64_t, 2> labels(1, 2);
  labels.setConstant(1);
  const TensorView view(logits);
  static_assert(std::is_same_v<decltype(view), const TensorView<double, 3>>);
  const TensorView constant(std::as_const(logits));
  static_assert(std::is_same_v<decltype(constant), const TensorView<const double, 3>>);
  const Eigen::TensorMap<const Tensor<double, 3>> map(logits.data(), logits.dimensions());
  static_assert(std::is_same_v<decltype(TensorView(map)), TensorView<const double, 3>>);
  const TensorView of_pointer(logits.data(), std::array<Index, 2>{2, 3});
  static_assert(std::is_same_v<decltype(of_pointer), const TensorView<double, 2>>);
  const double loss = local_mha::cross_entropy<double>(logits, labels);
  EXPECT_EQ(local_mha::cross_entropy(logits, labels), loss);
  EXPECT_EQ(local_mha::cross_entropy(view, labels), loss);
  EXPECT_EQ(local_mha::cross_entropy(map, labels, -1), loss);
  EXPECT_TRUE(support::same_bits(local_mha::cross_entropy_gradient(constant, labels),
                                 local_mha::cross_entropy_gradient<double>(logits, labels)));

  const RowMatrix<double> x = RowMatrix<double>::Random(4, 3);
  const RowMatrix<double> weight = RowMatrix<double>::Random(2, 3);
  const RowMatrix<double> grad_y = RowMatrix<double>::Random(4, 2);
  RowMatrix<double> grad_weight = RowMatrix<double>::Zero(2, 3);
  Vector<double> grad_bias = Vector<double>::Zero(2);
  const auto grad_x = local_mha::linear_backward(Eigen::DefaultDevice(), weight, x, grad_y,
                                                 grad_weight, &grad_bias);
  EXPECT_TRUE(grad_x.isApprox(grad_y * weight));
  EXPECT_TRUE(grad_weight.isApprox(grad_y.transpose() * x));
  EXPECT_EQ(
      local_mha::linear_backward(Eigen::DefaultDevice(), weight, x, grad_y, grad_weight, nullptr),
      grad_x);
  RowMatrix<double> table = RowMatrix<double>::Zero(5, 2);
  const std::vector<std::int64_t> rows{4, 0, 4, 1};
  local_mha::embedding_backward(table, rows, grad_y);
  EXPECT_TRUE(table.row(4).isApprox(grad_y.row(0) + grad_y.row(2)));
}

// What it has beside its base counts, too.
struct MoreThanALinear : local_mha::LinearParameters<float> {
  Vector<float> more;
  static void visit_each(auto& set, auto&& visit) {
    local_mha::LinearParameters<float>::visit_each(set, visit);
    visit("more", set.more);
  }
};

TEST(AParameterSet, ThatIsDerivedIsComparedAsAWhole) {
  MoreThanALinear weights;
  weights.weight = RowMatrix<float>::Ones(2, 3);
  weights.more = Vector<float>::Ones(4);
  MoreThanALinear gradients = weights;
  local_mha::AdamW optimizer({}, weights);
  EXPECT_NO_THROW(optimizer.step(weights, gradients, 0.1));
  gradients.more = Vector<float>::Ones(3);
  EXPECT_THROW(optimizer.step(weights, gradients, 0.1), std::invalid_argument);
}

}  // namespace parameter_set_test
