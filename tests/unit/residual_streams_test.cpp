// SPDX-License-Identifier: MIT
// A hyper-connection alone: against the naive reference, and its gradients against differences.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <local_mha/local_mha.hpp>

#include "reference/gradients.hpp"
#include "reference/residual_streams.hpp"
#include "support/differences.hpp"
#include "support/library.hpp"

namespace residual_streams_test {

using local_mha::HyperConnection;
using local_mha::HyperConnectionParameters;
using local_mha::Index;
using local_mha::RowMatrix;
using reference::Array;
using reference::Int;

/// Weights as training makes them: none is 0, and tanh is not linear.
reference::Parameters<double> weights(Random& random, Index streams, Index dim) {
  reference::Parameters<double> p;
  const double width = 1 / std::sqrt(static_cast<double>(dim));
  p["static_alpha"] = random.array({streams, streams + 1});
  p["dynamic_alpha_fn"] = random.array({dim, streams + 1}, width);
  p["dynamic_alpha_scale"] = random.array({}, 0.5);
  p["static_beta"] = random.array({streams});
  p["dynamic_beta_fn"] = random.array({dim}, width);
  p["dynamic_beta_scale"] = random.array({}, 0.5);
  p["norm.gamma"] = random.array({dim}, 0.3);
  return p;
}

template <typename Scalar>
HyperConnection<Scalar> connection(const reference::Parameters<double>& p) {
  auto parameters = HyperConnectionParameters<Scalar>::zeros(p.at("static_beta").shape[0],
                                                             p.at("norm.gamma").shape[0]);
  support::assign(parameters, p);
  return HyperConnection<Scalar>(std::move(parameters));
}

/// Rows of an array whose last axes are `columns` wide.
template <typename Scalar>
RowMatrix<Scalar> rows(const Array<double>& from, Index columns) {
  RowMatrix<Scalar> to(static_cast<Index>(from.data.size()) / columns, columns);
  for (std::size_t i = 0; i < from.data.size(); ++i)
    to.data()[i] = static_cast<Scalar>(from.data[i]);
  return to;
}
template <typename Scalar>
Array<Scalar> array(const RowMatrix<Scalar>& from, const std::vector<Int>& shape) {
  Array<Scalar> to(shape);
  EXPECT_EQ(static_cast<std::size_t>(from.size()), to.data.size());
  for (std::size_t i = 0; i < to.data.size(); ++i) to.data[i] = from.data()[i];
  return to;
}

/// A branch that is easily differentiated: `y = a ⊙ x²`, `a` of each channel.
template <typename Real>
Array<Real> branch(const Array<double>& a, const Array<Real>& x) {
  Array<Real> y = x;
  for (std::size_t i = 0; i < y.data.size(); ++i)
    y.data[i] *= x.data[i] * static_cast<Real>(a.data[i % a.data.size()]);
  return y;
}

/// Streams, weights and a branch.
struct Drawn {
  Drawn(std::uint64_t seed, Index number, Index streams, Index dim)
      : random(seed),
        p(weights(random, streams, dim)),
        a(random.array({dim}, 0.5)),
        r(random.array({1, number, streams, dim})),
        grad(random.array(r.shape)) {}

  template <typename Real>
  Array<Real> expected() const {
    return expected(reference::cast<Real>(p), reference::cast<Real>(r));
  }
  template <typename Real>
  Array<Real> expected(const reference::Parameters<Real>& parameters,
                       const Array<Real>& streams) const {
    return reference::hyper_connection(parameters, "", streams,
                                       [&](const Array<Real>& x) { return branch(a, x); });
  }

  Random random;
  reference::Parameters<double> p;
  Array<double> a, r, grad;
};

template <typename Scalar>
struct Result {
  Array<Scalar> streams, grad;
  reference::Parameters<Scalar> gradients;
};

/// What the library gives.
template <typename Scalar>
Result<Scalar> computed(const Drawn& c) {
  const auto module = connection<Scalar>(c.p);
  const Index dim = module.dim(), width = module.streams() * dim;
  const RowMatrix<Scalar> r = rows<Scalar>(c.r, width);
  const auto mixed = module.mix(r);
  RowMatrix<Scalar> y = mixed.branch_input;
  for (Index i = 0; i < y.size(); ++i)
    y.data()[i] *= y.data()[i] * static_cast<Scalar>(c.a.data[static_cast<std::size_t>(i % dim)]);
  const RowMatrix<Scalar> grad = rows<Scalar>(c.grad, width);
  RowMatrix<Scalar> of_input = module.add_backward(grad, r);
  for (Index i = 0; i < y.size(); ++i)
    of_input.data()[i] *= Scalar(2) * mixed.branch_input.data()[i] *
                          static_cast<Scalar>(c.a.data[static_cast<std::size_t>(i % dim)]);
  auto gradients = HyperConnectionParameters<Scalar>::zeros(module.streams(), dim);
  Result<Scalar> to;
  to.streams = array<Scalar>(module.add(mixed, y), c.r.shape);
  to.grad = array<Scalar>(module.mix_backward(gradients, grad, r, y, of_input), c.r.shape);
  to.gradients = support::named<Scalar>(gradients);
  return to;
}

template <typename Scalar>
class AHyperConnection : public testing::Test {
 protected:
  using Precise = support::Precise<Scalar>;
  static constexpr double epsilon = std::numeric_limits<Scalar>::epsilon();

  static void expect_reference(const Drawn& c, double tolerance) {
    const Result<Scalar> got = computed<Scalar>(c);
    const auto p = reference::cast<Precise>(c.p);
    const auto r = reference::cast<Precise>(c.r);
    Array<Precise> input;
    const Array<Precise> expected =
        reference::hyper_connection(p, "", r, [&](const Array<Precise>& x) {
          input = x;
          return branch(c.a, x);
        });
    EXPECT_TRUE(support::close(got.streams, expected,
                               tolerance * static_cast<double>(support::largest(expected))));
    auto gradients = reference::zeros_like(p);
    const auto grad = reference::hyper_connection_backward(
        p, "", r, branch(c.a, input), reference::cast<Precise>(c.grad), gradients,
        [&](const Array<Precise>& of_y) {
          Array<Precise> of_x = of_y;
          for (std::size_t i = 0; i < of_x.data.size(); ++i)
            of_x.data[i] *= 2 * input.data[i] * static_cast<Precise>(c.a.data[i % c.a.data.size()]);
          return of_x;
        });
    double largest = 0;
    for (const auto& [name, gradient] : gradients)
      largest = std::max(largest, static_cast<double>(support::largest(gradient)));
    // A single number is a sum of many, which may be smaller than they are.
    const auto compare = [&](const std::string& name, const Array<Scalar>& mine,
                             const Array<Precise>& theirs) {
      const double size =
          theirs.data.size() == 1 ? largest : static_cast<double>(support::largest(theirs));
      EXPECT_TRUE(support::close(mine, theirs, tolerance * size)) << name;
    };
    compare("streams", got.grad, grad);
    for (const auto& [name, gradient] : gradients) compare(name, got.gradients.at(name), gradient);
  }
};
TYPED_TEST_SUITE(AHyperConnection, support::Scalars, support::ScalarNames);

TYPED_TEST(AHyperConnection, IsWhatTheFormulasSay) {
  std::uint64_t seed = 0;
  for (const Index streams : {1, 2, 3, 4, 5, 7, 8})
    for (const Index dim : {1, 3, 8, 24, 65})
      for (const Index number : {1, 5, 16, 40})
        this->expect_reference(Drawn(++seed, number, streams, dim), 300 * this->epsilon);
}

// Longer than what is summed up in lanes.
TYPED_TEST(AHyperConnection, AddsUpLongSequences) {
  this->expect_reference(Drawn(1, 700, 4, 6), 300 * this->epsilon);
}

// Streams that are 0 have the norm 1e-12, and so have all that are shorter.
TYPED_TEST(AHyperConnection, BoundsTheNormsOfShortStreams) {
  Drawn c(2, 9, 3, 8);
  const auto scale = [&](Int i, Int s, double by) {
    for (Int channel = 0; channel < 8; ++channel) c.r(0, i, s, channel) *= by;
  };
  for (Int i = 0; i < 9; ++i) {
    scale(i, 0, 0);
    scale(i, 1, i % 2 == 0 ? 1e-14 : 1e-18);
    if (i % 3 == 0) scale(i, 2, 0);
  }
  this->expect_reference(c, 300 * this->epsilon);
}

TYPED_TEST(AHyperConnection, TakesNumbersWhoseSquaresLeaveTheRange) {
  Drawn c(3, 5, 4, 8);
  for (double& number : c.r.data) number *= sizeof(TypeParam) == 4 ? 0x1p80 : 0x1p600;
  const auto module = connection<TypeParam>(c.p);
  const auto mixed = module.mix(rows<TypeParam>(c.r, 32));
  const auto p = reference::cast<long double>(c.p);
  Array<long double> input;
  reference::hyper_connection(p, "", reference::cast<long double>(c.r),
                              [&](const Array<long double>& x) {
                                input = x;
                                return x;
                              });
  EXPECT_TRUE(support::close(array<TypeParam>(mixed.branch_input, {1, 5, 8}), input,
                             300 * this->epsilon * static_cast<double>(support::largest(input))));
}

TYPED_TEST(AHyperConnection, KeepsPositionsApart) {
  // Wherever it stands in a block, a position's result has the same bits; and a NaN stays there.
  Drawn c(4, 37, 4, 9);
  const auto module = connection<TypeParam>(c.p);
  RowMatrix<TypeParam> r = rows<TypeParam>(c.r, 36);
  const auto all = module.mix(r);
  for (const Index begin : {0, 1, 17, 36})
    EXPECT_EQ(module.mix(r.middleRows(begin, 1)).streams, all.streams.row(begin)) << begin;
  r(3, 5) = std::numeric_limits<TypeParam>::quiet_NaN();
  const auto with_nan = module.mix(r);
  for (Index i = 0; i < 37; ++i)
    EXPECT_EQ(with_nan.streams.row(i) == all.streams.row(i), i != 3) << i;
}

TYPED_TEST(AHyperConnection, TakesNoPositionsToo) {
  const auto module = connection<TypeParam>(Drawn(5, 1, 2, 3).p);
  const RowMatrix<TypeParam> none(0, 6), none_of_branch(0, 3);
  auto gradients = HyperConnectionParameters<TypeParam>::zeros(2, 3);
  const auto mixed = module.mix(none);
  EXPECT_EQ(mixed.branch_input.rows(), 0);
  EXPECT_EQ(module.add(mixed, none_of_branch).cols(), 6);
  EXPECT_EQ(module.mix_backward(gradients, none, none, none_of_branch, none_of_branch).rows(), 0);
}

// The gradient is divided by norms, whose squares float does not have.
TEST(HyperConnectionGradients, OfLargeStreamsAreThoseInDouble) {
  const Drawn c(11, 20, 4, 8);
  for (const float scale : {1.F, 1e10F, 1e20F, 1e25F, 1e30F}) {
    const RowMatrix<float> r = scale * rows<float>(c.r, 32);
    const auto of_streams = [&]<typename Scalar>(const RowMatrix<Scalar>& streams) {
      const auto module = connection<Scalar>(c.p);
      const auto mixed = module.mix(streams);  // around a branch that does nothing
      const RowMatrix<Scalar> grad = rows<Scalar>(c.grad, 32);
      auto gradients = HyperConnectionParameters<Scalar>::zeros(4, 8);
      return RowMatrix<double>(module
                                   .mix_backward(gradients, grad, streams, mixed.branch_input,
                                                 module.add_backward(grad, streams))
                                   .template cast<double>());
    };
    const RowMatrix<double> expected = of_streams(RowMatrix<double>(r.cast<double>()));
    EXPECT_LE((of_streams(r) - expected).cwiseAbs().maxCoeff(),
              1e-5 * expected.cwiseAbs().maxCoeff())
        << scale;
  }
}

TEST(HyperConnectionGradients, AreThoseOfDifferences) {
  for (const Index streams : {1, 4}) {
    Drawn c(static_cast<std::uint64_t>(streams), 5, streams, 6);
    const Result<double> got = computed<double>(c);
    using Real = long double;
    const auto loss = [&](const reference::Parameters<Real>& p, const Array<Real>& r) {
      const Array<Real> result = c.expected<Real>(p, r);
      Real sum = 0;
      for (std::size_t i = 0; i < result.data.size(); ++i)
        sum += result.data[i] * static_cast<Real>(c.grad.data[i]);
      return sum;
    };
    const auto p = reference::cast<Real>(c.p);
    const auto r = reference::cast<Real>(c.r);
    support::expect_gradient<double>(
        c.random, got.grad, c.r, [&](const Array<Real>& moved) { return loss(p, moved); }, 1e-9,
        "streams");
    for (const auto& parameter : c.p) {
      const std::string& name = parameter.first;
      support::expect_gradient<double>(
          c.random, got.gradients.at(name), parameter.second,
          [&](const Array<Real>& moved) {
            auto other = p;
            other[name] = moved;
            return loss(other, r);
          },
          1e-9, name);
    }
  }
}

TEST(NewHyperConnections, AddToWhatOneStreamGives) {
  // A branch of layer 6 of 4 streams takes stream 2; all of them get its result.
  local_mha::EncoderConfig config{.depth = 7, .layers = {{.dim = 8, .window_size = 4}}};
  config.layers[0].dim_head = 4;
  config.num_residual_streams = 4;
  const auto parameters =
      local_mha::initial_parameters<local_mha::EncoderParameters<double>>(config, 1);
  const HyperConnection<double> module(*parameters.layers[6].feed_forward_connection);
  Random random(1);
  const RowMatrix<double> r = rows<double>(random.array({3, 32}), 32);
  const RowMatrix<double> y = rows<double>(random.array({3, 8}), 8);
  const auto mixed = module.mix(r);
  EXPECT_EQ(mixed.branch_input, r.middleCols(16, 8));
  EXPECT_EQ(module.add(mixed, y), r + y.replicate(1, 4));
}

}  // namespace residual_streams_test
