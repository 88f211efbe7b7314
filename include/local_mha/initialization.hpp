// SPDX-License-Identifier: MIT
/// \file
/// Initial weights as PyTorch's modules make them, from a seed and the same on every platform.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include <local_mha/component_parameters.hpp>
#include <local_mha/core/random.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/parameter_set.hpp>
#include <local_mha/parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

namespace detail {

/// `nn.Linear`: weight and bias uniform in `±1/√in` (Kaiming uniform with a = √5).
template <typename Scalar>
void initialize_linear(Scalar* numbers, Index size, Index in, RandomSequence& random) {
  const double bound = in > 0 ? 1 / std::sqrt(static_cast<double>(in)) : 0;
  for (Index i = 0; i < size; ++i) numbers[i] = Scalar((2 * random.uniform() - 1) * bound);
}
template <typename Scalar, typename Tensor>
void initialize_linear(Tensor& tensor, Index in, RandomSequence& random) {
  initialize_linear(tensor.data(), tensor.size(), in, random);
}

template <typename Scalar>
void initialize(LocalMHAParameters<Scalar>& p, RandomSequence& random) {
  p.norm_weight.setOnes();
  p.q_scale.setOnes();
  p.k_scale.setOnes();
  p.q_norm_weight.setOnes();
  p.k_norm_weight.setOnes();
  initialize_linear<Scalar>(p.to_qkv, p.to_qkv.cols(), random);
  initialize_linear<Scalar>(p.to_qkv_bias, p.to_qkv.cols(), random);
  initialize_linear<Scalar>(p.to_v_gate_weight, p.to_v_gate_weight.cols(), random);
  initialize_linear<Scalar>(p.to_v_gate_bias, p.to_v_gate_weight.cols(), random);
  initialize_linear<Scalar>(p.to_out, p.to_out.cols(), random);
  initialize_linear<Scalar>(p.to_out_bias, p.to_out.cols(), random);
}

template <typename Scalar>
void initialize(FeedForwardParameters<Scalar>& p, RandomSequence& random) {
  p.norm_weight.setOnes();
  initialize_linear<Scalar>(p.proj_in, p.proj_in.cols(), random);
  initialize_linear<Scalar>(p.proj_out, p.proj_out.cols(), random);
}

template <typename Scalar>
void initialize(DynamicPositionBiasParameters<Scalar>& p, RandomSequence& random) {
  initialize_linear<Scalar>(p.weight_0, p.weight_0.cols(), random);
  initialize_linear<Scalar>(p.bias_0, p.weight_0.cols(), random);
  initialize_linear<Scalar>(p.weight_2, p.weight_2.cols(), random);
  initialize_linear<Scalar>(p.bias_2, p.weight_2.cols(), random);
  initialize_linear<Scalar>(p.weight_4, p.weight_4.cols(), random);
  initialize_linear<Scalar>(p.bias_4, p.weight_4.cols(), random);
}

/// At first, a branch takes one stream, another one in each layer, and adds to all of them: `which`
/// is the layer's number.
template <typename Scalar>
void initialize(HyperConnectionParameters<Scalar>& p, Index which) {
  const Index streams = p.static_beta.size();
  p.static_alpha.rightCols(streams).setIdentity();
  p.static_alpha(which % streams, 0) = Scalar(1);
  p.static_beta.setOnes();
  p.alpha_scale(0) = p.beta_scale(0) = Scalar(0.01);
}

template <typename Scalar>
void initialize(EncoderParameters<Scalar>& p, RandomSequence& random) {
  for (std::size_t i = 0; i < p.layers.size(); ++i) {
    auto& layer = p.layers[i];
    initialize(layer.attention, random);
    initialize(layer.feed_forward, random);
    const auto which = static_cast<Index>(i);
    if (layer.attention_connection) initialize(*layer.attention_connection, which);
    if (layer.feed_forward_connection) initialize(*layer.feed_forward_connection, which);
  }
  if (p.dynamic_pos_bias) initialize(*p.dynamic_pos_bias, random);
}

/// `nn.Embedding` is standard normal.
template <typename Scalar>
void initialize(LocalTransformerParameters<Scalar>& p, RandomSequence& random) {
  for (auto* embedding : {&p.token_emb, &p.pos_emb})
    for (Index i = 0; i < embedding->size(); ++i) embedding->data()[i] = Scalar(random.normal());
  initialize(static_cast<EncoderParameters<Scalar>&>(p), random);
  p.to_logits_norm_weight.setOnes();
  initialize_linear<Scalar>(p.to_logits, p.to_logits.cols(), random);
}

template <typename Scalar>
void initialize(LinearParameters<Scalar>& p, RandomSequence& random) {
  initialize_linear<Scalar>(p.weight, p.weight.cols(), random);
  initialize_linear<Scalar>(p.bias, p.weight.cols(), random);
}

template <typename Scalar>
void initialize(LayerNormParameters<Scalar>& p, RandomSequence& /*random*/) {
  p.weight.setOnes();
}

/// \throws std::invalid_argument naming the first tensor of `got` whose shape is not `expected`'s
template <ParameterSet Parameters>
void require_same_shapes(const Parameters& got, const Parameters& expected) {
  // Of the set itself: that of a base knows nothing of what is more.
  using HasShapesOf = bool (Parameters::*)(const Parameters&) const;
  if constexpr (requires {
                  requires std::same_as<decltype(&Parameters::has_shapes_of), HasShapesOf>;
                })
    if (got.has_shapes_of(expected)) return;
  struct Shape {
    std::string name;
    std::array<Index, 2> extent;
  };
  const auto shapes = [](const Parameters& parameters) {
    std::vector<Shape> all;
    for_each_parameter(parameters, [&](const std::string& name, const auto& tensor) {
      all.push_back({name, {tensor.rows(), tensor.cols()}});
    });
    return all;
  };
  const std::vector<Shape> want = shapes(expected);
  const std::vector<Shape> have = shapes(got);
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (i >= have.size() || have[i].name != want[i].name)
      reject(want[i].name, "shape " + to_string(want[i].extent),
             i < have.size() ? have[i].name + " in its place" : std::string("nothing"));
    require_shape(want[i].name, have[i].extent, want[i].extent);
  }
  if (have.size() > want.size())
    reject(have[want.size()].name, "nothing, the configuration has no such tensor",
           to_string(have[want.size()].extent));
}

/// \param sizes what `Parameters::zeros()` takes
/// \throws std::invalid_argument as that does, and naming the first tensor of `parameters` whose
///         shape is another
template <typename Parameters, typename... Sizes>
void require_fitting(const Parameters& parameters, const Sizes&... sizes) {
  if (!parameters.fits(sizes...)) require_same_shapes(parameters, Parameters::zeros(sizes...));
}

/// `parameters`, which fit a configuration.
/// \throws std::invalid_argument as require_fitting() does
template <typename Parameters, typename Config>
Parameters fitting(Parameters parameters, const Config& config) {
  require_fitting(parameters, config);
  return parameters;
}

}  // namespace detail

/// The weights that a module starts with.
/// \tparam Parameters a set that has `zeros(config)`
/// \throws std::invalid_argument naming the member of the configuration that is out of range
template <typename Parameters, typename Config>
Parameters initial_parameters(const Config& config, std::uint64_t seed) {
  validate(config);
  Parameters parameters = Parameters::zeros(config);
  RandomSequence random(seed);
  detail::initialize(parameters, random);
  return parameters;
}

}  // namespace local_mha::inline LOCAL_MHA_ABI
