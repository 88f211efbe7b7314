// SPDX-License-Identifier: MIT
// Dual numbers of Eigen's AutoDiff module through the forward pass: the derivatives against central
// differences of the reference.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include <local_mha/autodiff.hpp>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace autodiff_test {

using local_mha::Index;
using local_mha::Tensor;
using reference::Array;
using reference::Int;
using reference::Parameters;

// Derivatives of a size fixed at compile time, and of one known at run time.
using Duals =
    testing::Types<Eigen::AutoDiffScalar<Eigen::Vector2d>, Eigen::AutoDiffScalar<Eigen::VectorXd>>;

/// Seeds that give direction 0 the derivative `along`, and direction 1 its double.
template <typename Dual>
Dual dual(double value, double along) {
  typename Dual::DerType derivatives(2);
  derivatives << along, 2 * along;
  return Dual(value, derivatives);
}

template <typename Dual, int Rank>
Tensor<Dual, Rank> dual_tensor(const Array<double>& values, const Array<double>& along) {
  Tensor<Dual, Rank> to = support::tensor<Dual, Rank>(values);
  for (std::size_t i = 0; i < values.data.size(); ++i)
    to.data()[i] = dual<Dual>(values.data[i], along.data[i]);
  return to;
}

template <typename Dual, typename LibraryParameters>
void assign_duals(LibraryParameters& parameters, const Parameters<double>& values,
                  const Parameters<double>& along) {
  local_mha::for_each_parameter(parameters, [&](const std::string& name, auto& weight) {
    const auto& value = values.at(name).data;
    const auto& direction = along.at(name).data;
    ASSERT_EQ(static_cast<std::size_t>(weight.size()), value.size());
    for (std::size_t i = 0; i < value.size(); ++i)
      weight.data()[i] = dual<Dual>(value[i], direction[i]);
  });
}

/// As large as the values, for a step of the difference is a share of them.
Array<double> direction_like(Random& random, const Array<double>& values) {
  if (values.empty()) return {};
  Array<double> along = random.array(values.shape);
  const double size = support::largest(values);
  for (double& number : along.data) number *= size > 0 ? size : 1;
  return along;
}

Parameters<double> direction_like(Random& random, const Parameters<double>& values) {
  Parameters<double> along;
  for (const auto& [name, array] : values) along[name] = direction_like(random, array);
  return along;
}

/// values + h · along
Array<long double> moved(const Array<double>& values, const Array<double>& along, long double h) {
  Array<long double> to = reference::cast<long double>(values);
  for (std::size_t i = 0; i < to.data.size(); ++i)
    to.data[i] += h * static_cast<long double>(along.data[i]);
  return to;
}

Parameters<long double> moved(const Parameters<double>& values, const Parameters<double>& along,
                              long double h) {
  Parameters<long double> to;
  for (const auto& [name, array] : values) to[name] = moved(array, along.at(name), h);
  return to;
}

/// Compares values and derivatives with f(0) and (f(h) - f(-h)) / 2h of the reference.
template <typename Dual, int Rank, typename F>
void expect_derivatives(const Tensor<Dual, Rank>& got, const F& f, const std::string& what) {
  constexpr long double h = 2e-8L;
  const Array<long double> at = f(0.0L), ahead = f(h), behind = f(-h);
  ASSERT_EQ(static_cast<std::size_t>(got.size()), at.data.size());
  Array<double> value(at.shape), first(at.shape), second(at.shape);
  Array<long double> slope(at.shape), twice(at.shape);
  for (std::size_t i = 0; i < at.data.size(); ++i) {
    const Dual& result = got.data()[i];
    value.data[i] = result.value();
    // A constant may have no derivatives, which stands for zeros.
    if (result.derivatives().size() == 2) {
      first.data[i] = result.derivatives()(0);
      second.data[i] = result.derivatives()(1);
    }
    slope.data[i] = (ahead.data[i] - behind.data[i]) / (2 * h);
    twice.data[i] = 2 * slope.data[i];
  }
  const auto size = 1 + static_cast<double>(support::largest(slope));
  EXPECT_TRUE(support::close(value, at, 1e-11 * (1 + static_cast<double>(support::largest(at)))))
      << what;
  EXPECT_TRUE(support::close(first, slope, 2e-9 * size)) << what;
  EXPECT_TRUE(support::close(second, twice, 4e-9 * size)) << what;
}

template <typename Dual>
class DualNumbers : public testing::Test {};
TYPED_TEST_SUITE(DualNumbers, Duals);

TYPED_TEST(DualNumbers, GoThroughLocalAttention) {
  for (std::uint64_t seed = 300; seed < 360; ++seed) {
    const support::AttentionCase c = support::attention_case(seed);
    if (c.seqlen() > 40) continue;
    Random random(seed);
    const auto dq = direction_like(random, c.in.q), dk = direction_like(random, c.in.k),
               dv = direction_like(random, c.in.v), db = direction_like(random, c.in.bias);
    Tensor<TypeParam, 3> bias(0, 0, 0);
    if (!c.in.bias.empty()) bias = dual_tensor<TypeParam, 3>(c.in.bias, db);
    const local_mha::LocalAttention<TypeParam> attention(c.config);
    const auto y = attention.forward(
        dual_tensor<TypeParam, 4>(c.in.q, dq), dual_tensor<TypeParam, 4>(c.in.k, dk),
        dual_tensor<TypeParam, 4>(c.in.v, dv),
        support::attention_call<TypeParam>(
            c.call, support::padding_mask(c.in.masked, c.batch(), c.seqlen()),
            support::optional_view(bias)));
    const auto f = [&](long double h) {
      return reference::attention(support::options(c.config, c.call),
                                  reference::AttentionInputs<long double>{moved(c.in.q, dq, h),
                                                                          moved(c.in.k, dk, h),
                                                                          moved(c.in.v, dv, h),
                                                                          c.in.masked,
                                                                          moved(c.in.bias, db, h),
                                                                          {}})
          .out;
    };
    expect_derivatives(y, f, "seed " + std::to_string(seed) + ", " + support::describe(c.config));
  }
}

TYPED_TEST(DualNumbers, GoThroughFunctionsOfScores) {
  for (const bool capped : {false, true}) {
    local_mha::LocalAttentionConfig config{.window_size = 5};
    if (capped)
      config.score.soft_cap = 0.7;
    else
      config.score.alibi_slopes = {0.5, 0.125};
    Random random(capped ? 7 : 8);
    const auto q = random.array({1, 2, 21, 4}), k = random.array(q.shape),
               v = random.array(q.shape);
    const auto dq = direction_like(random, q), dk = direction_like(random, k),
               dv = direction_like(random, v);
    const local_mha::LocalAttention<TypeParam> attention(config);
    const auto saved =
        attention.forward_saving(dual_tensor<TypeParam, 4>(q, dq), dual_tensor<TypeParam, 4>(k, dk),
                                 dual_tensor<TypeParam, 4>(v, dv));
    const auto attended = [&](long double h) {
      reference::AttentionInputs<long double> in{
          moved(q, dq, h), moved(k, dk, h), moved(v, dv, h), {}, {}, {}};
      in.score = support::score<long double>(config.score);
      return reference::attention(support::options(config), in);
    };
    const std::string what = capped ? "soft-cap" : "ALiBi";
    expect_derivatives(saved.out, [&](long double h) { return attended(h).out; }, what);
    expect_derivatives(saved.lse, [&](long double h) { return attended(h).lse; }, what + ", lse");
  }
}

TYPED_TEST(DualNumbers, GoThroughLocalMHA) {
  for (std::uint64_t seed = 400; seed < 440; ++seed) {
    const support::LayerCase c = support::layer_case(seed);
    if (c.in.x.data.size() > 1000) continue;
    Random random(seed);
    const auto dx = direction_like(random, c.in.x);
    const auto db = direction_like(random, c.in.bias);
    const auto along = direction_like(random, c.parameters);
    auto parameters = local_mha::LocalMHAParameters<TypeParam>::zeros(c.config);
    assign_duals<TypeParam>(parameters, c.parameters, along);
    Tensor<TypeParam, 3> bias(0, 0, 0);
    if (!c.in.bias.empty()) bias = dual_tensor<TypeParam, 3>(c.in.bias, db);
    const local_mha::LocalMHA<TypeParam> mha(c.config, std::move(parameters));
    const auto y = mha.forward(dual_tensor<TypeParam, 3>(c.in.x, dx),
                               support::padding_mask(c.in.masked, c.in.x.shape[0], c.in.x.shape[1]),
                               support::optional_view(bias));
    const auto f = [&](long double h) {
      return reference::local_mha(
                 support::options(c.config), moved(c.parameters, along, h),
                 reference::LayerInputs<long double>{
                     moved(c.in.x, dx, h), c.in.masked, moved(c.in.bias, db, h), {}})
          .y;
    };
    expect_derivatives(y, f, "seed " + std::to_string(seed) + ", " + support::describe(c.config));
  }
}

TYPED_TEST(DualNumbers, GoThroughLocalTransformer) {
  for (const bool dynamic : {false, true}) {
    local_mha::LocalTransformerConfig config{.num_tokens = 7,
                                             .max_seq_len = 15,
                                             .dim = 6,
                                             .depth = 2,
                                             .local_attn_window_size = 4,
                                             .dim_head = 4,
                                             .heads = 2};
    config.use_dynamic_pos_bias = dynamic;
    config.use_xpos = !dynamic;
    config.qk_rmsnorm = true;
    config.gate_values_per_head = true;
    Random random(dynamic ? 1 : 2);
    const auto values = support::random_parameters(
        random,
        support::named<double>(local_mha::LocalTransformerParameters<double>::zeros(config)));
    const auto along = direction_like(random, values);
    auto parameters = local_mha::LocalTransformerParameters<TypeParam>::zeros(config);
    assign_duals<TypeParam>(parameters, values, along);
    const local_mha::LocalTransformer<TypeParam> model(config, std::move(parameters));

    Array<Int> tokens({2, 12}), inputs({2, 11});
    for (Int& token : tokens.data) token = random.integer(0, 6);
    for (Int b = 0; b < 2; ++b)
      for (Int i = 0; i < 11; ++i) inputs(b, i) = tokens(b, i);
    const auto options = support::options(config);
    expect_derivatives(
        model.forward(support::tensor<std::int64_t, 2>(inputs)),
        [&](long double h) {
          return reference::transformer_logits(options, moved(values, along, h), inputs);
        },
        "logits");
    Tensor<TypeParam, 1> loss(1);
    loss(0) = model.loss(support::tensor<std::int64_t, 2>(tokens));
    expect_derivatives(
        loss,
        [&](long double h) {
          Array<long double> of_reference({1});
          of_reference(0) =
              reference::transformer_loss(options, moved(values, along, h), tokens, -1);
          return of_reference;
        },
        "loss");
  }
}

TYPED_TEST(DualNumbers, HaveZeroDerivativesWhereNoKeyIsSeen) {
  Random random(5);
  const auto q = random.array({1, 2, 9, 4});
  const auto dual_q = dual_tensor<TypeParam, 4>(q, random.array(q.shape));
  const local_mha::LocalAttention<TypeParam> attention(
      {.window_size = 3, .causal = true, .dim = 4});
  const auto y =
      attention.forward(dual_q, dual_q, dual_q,
                        {.mask = support::padding_mask(std::vector<unsigned char>(9, 1), 1, 9)});
  for (Index i = 0; i < y.size(); ++i) {
    EXPECT_EQ(y.data()[i].value(), 0);
    for (Index d = 0; d < y.data()[i].derivatives().size(); ++d)
      EXPECT_EQ(y.data()[i].derivatives()(d), 0);
  }
}

// What has the size of a packet of AVX-512 is none.
TEST(DualNumbers, OfSixtyFourBytesAreSelected) {
  using Dual = Eigen::AutoDiffScalar<Eigen::Matrix<double, 7, 1>>;
  static_assert(sizeof(Dual) == 64);
  using L = local_mha::Lanes<Dual>;
  const L chosen = local_mha::select_lanes(1, 3, L::broadcast(Dual(1)), L::broadcast(Dual(2)));
  for (int i = 0; i < L::count; ++i)
    EXPECT_EQ(chosen.packet[i].value(), i == 1 || i == 2 ? 1 : 2) << i;
}

}  // namespace autodiff_test
