// SPDX-License-Identifier: MIT
/// \file
/// The layers of Encoder and LocalTransformer, and how residual streams pass their connections.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/core/block.hpp>
#include <local_mha/core/stored.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/encoder_config.hpp>
#include <local_mha/mha.hpp>
#include <local_mha/ops/dynamic_position_bias.hpp>
#include <local_mha/ops/feed_forward.hpp>
#include <local_mha/ops/residual_streams.hpp>
#include <local_mha/parameters.hpp>
#include <local_mha/stack/layer_access.hpp>

namespace local_mha::inline LOCAL_MHA_ABI::detail {

// A set of other numbers.
template <typename Scalar, typename Given>
DynamicPositionBiasParameters<Scalar> cast_set(DynamicPositionBiasParameters<Given>&& p) {
  return {cast<Scalar>(std::move(p.weight_0)), cast<Scalar>(std::move(p.bias_0)),
          cast<Scalar>(std::move(p.weight_2)), cast<Scalar>(std::move(p.bias_2)),
          cast<Scalar>(std::move(p.weight_4)), cast<Scalar>(std::move(p.bias_4))};
}
template <typename Scalar, typename Given>
HyperConnectionParameters<Scalar> cast_set(HyperConnectionParameters<Given>&& p) {
  return {cast<Scalar>(std::move(p.static_alpha)),
          cast<Scalar>(std::move(p.alpha_fn)),
          cast<Scalar>(p.alpha_scale),
          cast<Scalar>(std::move(p.static_beta)),
          cast<Scalar>(std::move(p.beta_fn)),
          cast<Scalar>(p.beta_scale),
          cast<Scalar>(std::move(p.norm_gamma))};
}

/// \tparam Storage what weights, keys and values are rounded to: see LocalMHA and FeedForward
/// \tparam Arithmetic what is multiplied in both
template <typename Scalar, typename Storage = Scalar, typename Arithmetic = Scalar>
class StackLayers {
  static constexpr Index count = block_rows<Scalar>;

 public:
  using Bias = typename LocalMHA<Scalar, Storage, Arithmetic>::Bias;
  using Connection = std::optional<HyperConnection<Scalar>>;

  struct Layer {
    // \tparam Parameters EncoderParameters::Layer, of Scalars or of the Storage
    template <typename Parameters>
    Layer(const LocalMHAConfig& config, double dropout, Parameters&& parameters,
          Index kind_of_attention)
        : attention(config, std::move(parameters.attention)),
          feed_forward(std::move(parameters.feed_forward), dropout),
          kind(kind_of_attention) {
      const auto connect = [](auto& weights, Connection& connection) {
        if (weights) connection.emplace(cast_set<Scalar>(std::move(*weights)));
      };
      connect(parameters.attention_connection, attention_connection);
      connect(parameters.feed_forward_connection, feed_forward_connection);
    }

    LocalMHA<Scalar, Storage, Arithmetic> attention;
    FeedForward<Scalar, Storage, Arithmetic> feed_forward;
    // None of a single residual stream.
    Connection attention_connection;
    Connection feed_forward_connection;
    // Attentions of the same configuration have the same, counted from 0.
    Index kind;
  };

  /// \param parameters fit the configuration, which is valid; they go as they are taken in
  template <typename Given>
  StackLayers(const EncoderConfig& config, EncoderParameters<Given>&& parameters)
      : dim_(config.layers.front().dim), streams_(config.num_residual_streams) {
    layers_.reserve(parameters.layers.size());
    for (Index i = 0; i < config.depth; ++i) {
      const LocalMHAConfig& attention = layer_config(config, i);
      const auto same = std::find_if(layers_.begin(), layers_.end(), [&](const Layer& layer) {
        return layer.attention.config() == attention;
      });
      layers_.emplace_back(attention, config.ff_dropout,
                           std::move(parameters.layers[static_cast<std::size_t>(i)]),
                           same == layers_.end() ? kinds_++ : same->kind);
    }
    connection_numbers_ = connection_numbers();
    if (!parameters.dynamic_pos_bias) return;
    const LocalMHAConfig& first = config.layers.front();
    position_bias_.emplace(cast_set<Scalar>(std::move(*parameters.dynamic_pos_bias)));
    bias_ = position_bias_->forward(first.window_size, first.look_backward,
                                    resolved_look_forward(first));
  }

  // It holds views of its own weights.
  StackLayers(const StackLayers&) = delete;
  StackLayers& operator=(const StackLayers&) = delete;

  /// What this was made of, as it is rounded.
  EncoderParameters<Scalar> unpacked() const {
    EncoderParameters<Scalar> parameters;
    parameters.layers.reserve(layers_.size());
    for (const Layer& layer : layers_) {
      auto& to = parameters.layers.emplace_back();
      to.attention = LayerAccess<Scalar, Storage, Arithmetic>::unpacked(layer.attention);
      to.feed_forward = layer.feed_forward.weights_->unpacked();
      if (layer.attention_connection)
        to.attention_connection = layer.attention_connection->parameters();
      if (layer.feed_forward_connection)
        to.feed_forward_connection = layer.feed_forward_connection->parameters();
    }
    if (position_bias_) parameters.dynamic_pos_bias = position_bias_->parameters();
    return parameters;
  }

  const std::vector<Layer>& layers() const { return layers_; }
  /// Different configurations of attentions.
  Index kinds() const { return kinds_; }
  Index dim() const { return dim_; }
  Index streams() const { return streams_; }
  /// The dynamic position bias of all layers, or none.
  Bias attn_bias() const { return bias_ ? Bias(*bias_) : Bias(); }

  /// Channels of the room that a connection takes.
  Index room() const {
    return streams_ == 1 || layers_.empty() ? 0 : layers_.front().attention_connection->room();
  }
  /// A branch's input of the streams, which become what stays of them.
  /// \param r `[S][dim][block_rows]`
  /// \param in `[dim][block_rows]`
  /// \param beta `[S][block_rows]`, for add()
  /// \param room `[room()][block_rows]`
  void mix(const Connection& connection, Scalar* r, Scalar* in, Scalar* beta, Scalar* room) const {
    if (connection)
      connection->apply_mix(r, in, beta, room);
    else
      std::copy_n(r, dim_ * count, in);
  }
  /// Adds a branch's result to the streams.
  void add(const Connection& connection, const Scalar* y, const Scalar* beta, Scalar* r) const {
    using L = Lanes<Scalar>;
    if (connection) return connection->apply_add(y, beta, r);
    for (Index i = 0; i < dim_ * count; i += count) (L::load(r + i) + L::load(y + i)).store(r + i);
  }
  /// All streams are `x`.
  /// \param x `[dim][block_rows]`
  void expand(const Scalar* x, Scalar* r) const {
    for (Index s = 0; s < streams_; ++s) std::copy_n(x, dim_ * count, r + s * dim_ * count);
  }
  /// The sum of the streams.
  void reduce(const Scalar* r, Scalar* x) const {
    using L = Lanes<Scalar>;
    for (Index i = 0; i < dim_ * count; i += count) {
      L sum = L::load(r + i);
      for (Index s = 1; s < streams_; ++s) sum = sum + L::load(r + s * dim_ * count + i);
      sum.store(x + i);
    }
  }

 private:
  std::vector<std::span<const Scalar>> connection_numbers() const {
    std::vector<std::span<const Scalar>> numbers;
    const auto take = [&](const std::string&, const auto& tensor) {
      numbers.emplace_back(tensor.data(), static_cast<std::size_t>(tensor.size()));
    };
    for (const Layer& layer : layers_)
      for (const Connection* connection :
           {&layer.attention_connection, &layer.feed_forward_connection})
        if (*connection) for_each_parameter((*connection)->parameters(), take);
    return numbers;
  }

 protected:
  Index dim_;
  Index streams_;
  Index kinds_ = 0;
  std::vector<Layer> layers_;
  std::optional<DynamicPositionBias<Scalar>> position_bias_;
  std::optional<Tensor<Scalar, 3>> bias_;  // that it gives
  // The weights of all connections.
  std::vector<std::span<const Scalar>> connection_numbers_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI::detail
