// SPDX-License-Identifier: MIT
/// \file
/// The weights of stacks of layers, with the names and shapes of the Python state dicts; those of
/// the modules inside a layer come along.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include <local_mha/config.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/encoder_config.hpp>
#include <local_mha/layer_parameters.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Weights of Encoder.
template <typename Scalar>
struct EncoderParameters {
  /// Weights of one layer, and of what connects it.
  struct Layer {
    /// Of the layer's attention.
    LocalMHAParameters<Scalar> attention;
    /// Of the layer's feed-forward.
    FeedForwardParameters<Scalar> feed_forward;
    /// What connects them to several residual streams.
    std::optional<HyperConnectionParameters<Scalar>> attention_connection = {};
    /// The same of the feed-forward.
    std::optional<HyperConnectionParameters<Scalar>> feed_forward_connection = {};
  };

  std::vector<Layer> layers;  ///< `depth` of them
  /// The bias that all layers share, if the configuration has one.
  std::optional<DynamicPositionBiasParameters<Scalar>> dynamic_pos_bias;

  /// All of them 0, in the shapes of a configuration.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  static EncoderParameters zeros(const EncoderConfig& config) {
    validate(config);
    EncoderParameters p;
    for (Index i = 0; i < config.depth; ++i) {
      const LocalMHAConfig& attention = layer_config(config, i);
      Layer& layer = p.layers.emplace_back();
      layer.attention = LocalMHAParameters<Scalar>::zeros(attention);
      layer.feed_forward = FeedForwardParameters<Scalar>::zeros(
          attention.dim, feed_forward_inner_dim(attention.dim, config.ff_mult));
      if (config.num_residual_streams > 1)
        layer.attention_connection = layer.feed_forward_connection =
            HyperConnectionParameters<Scalar>::zeros(config.num_residual_streams, attention.dim);
    }
    if (config.use_dynamic_pos_bias) {
      const LocalMHAConfig& attention = layer_config(config, 0);
      p.dynamic_pos_bias =
          DynamicPositionBiasParameters<Scalar>::zeros(attention.dim / 2, attention.heads);
    }
    return p;
  }

  /// Whether each tensor has the shape that it has in `zeros(config)`.
  /// \throws std::invalid_argument as zeros() does
  bool fits(const EncoderConfig& config) const {
    validate(config);
    if (std::ssize(layers) != config.depth ||
        dynamic_pos_bias.has_value() != config.use_dynamic_pos_bias)
      return false;
    const auto connected = [&](const auto& connection, Index dim) {
      return config.num_residual_streams > 1
                 ? connection && connection->fits(config.num_residual_streams, dim)
                 : !connection;
    };
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const LocalMHAConfig& attention = layer_config(config, static_cast<Index>(i));
      const Layer& layer = layers[i];
      const Index dim = attention.dim;
      if (!layer.attention.fits(attention) ||
          !layer.feed_forward.fits(dim, feed_forward_inner_dim(dim, config.ff_mult)) ||
          !connected(layer.attention_connection, dim) ||
          !connected(layer.feed_forward_connection, dim))
        return false;
    }
    if (!dynamic_pos_bias) return true;
    const LocalMHAConfig& attention = layer_config(config, 0);
    return dynamic_pos_bias->fits(attention.dim / 2, attention.heads);
  }

  /// Whether each tensor has the shape that it has in `other`.
  bool has_shapes_of(const EncoderParameters& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.has_value() == b.has_value() && (!a || a->has_shapes_of(*b));
    };
    return same(dynamic_pos_bias, other.dynamic_pos_bias) &&
           std::equal(layers.begin(), layers.end(), other.layers.begin(), other.layers.end(),
                      [&](const Layer& a, const Layer& b) {
                        return a.attention.has_shapes_of(b.attention) &&
                               a.feed_forward.has_shapes_of(b.feed_forward) &&
                               same(a.attention_connection, b.attention_connection) &&
                               same(a.feed_forward_connection, b.feed_forward_connection);
                      });
  }

  /// See for_each_parameter().
  template <typename Self, typename Visitor>
  static void visit_each(Self& p, Visitor&& visit) {
    const auto below = [&](const std::string& prefix) {
      return
          [&visit, prefix](const std::string& name, auto& tensor) { visit(prefix + name, tensor); };
    };
    const auto connected = [&](const std::string& prefix, auto& connection, auto& branch) {
      const auto visit_branch = [&] { for_each_parameter(branch, below(prefix + "branch.")); };
      if (connection)
        connection->visit_around(*connection, below(prefix), visit_branch);
      else
        visit_branch();
    };
    for (std::size_t i = 0; i < p.layers.size(); ++i) {
      auto& layer = p.layers[i];
      const std::string prefix = "layers." + std::to_string(i);
      connected(prefix + ".0.", layer.attention_connection, layer.attention);
      connected(prefix + ".1.", layer.feed_forward_connection, layer.feed_forward);
    }
    if (p.dynamic_pos_bias) for_each_parameter(*p.dynamic_pos_bias, below("dynamic_pos_bias."));
  }
};

/// Weights of LocalTransformer: those of its layers, embeddings and logits.
template <typename Scalar>
struct LocalTransformerParameters : EncoderParameters<Scalar> {
  RowMatrix<Scalar> token_emb;           ///< `[num_tokens, dim]`
  RowMatrix<Scalar> pos_emb;             ///< `[max_seq_len, dim]`
  Vector<Scalar> to_logits_norm_weight;  ///< `[dim]`
  Vector<Scalar> to_logits_norm_bias;    ///< `[dim]`
  RowMatrix<Scalar> to_logits;           ///< `[num_tokens, dim]`

  /// All of them 0, in the shapes of a configuration.
  /// \throws std::invalid_argument naming the member of the configuration that is out of range
  static LocalTransformerParameters zeros(const LocalTransformerConfig& config) {
    validate(config);
    LocalTransformerParameters p;
    static_cast<EncoderParameters<Scalar>&>(p) =
        EncoderParameters<Scalar>::zeros(encoder_config(config));
    detail::set_zeros([&](auto&& visit) { visit_shapes(p, config, visit); });
    return p;
  }

  /// Whether each tensor has the shape that it has in `zeros(config)`.
  /// \throws std::invalid_argument as zeros() does
  bool fits(const LocalTransformerConfig& config) const {
    validate(config);
    return EncoderParameters<Scalar>::fits(encoder_config(config)) &&
           detail::all_fit([&](auto&& visit) { visit_shapes(*this, config, visit); });
  }

  /// Whether each tensor has the shape that it has in `other`.
  bool has_shapes_of(const LocalTransformerParameters& other) const {
    return EncoderParameters<Scalar>::has_shapes_of(other) &&
           detail::same_shape(token_emb, other.token_emb) &&
           detail::same_shape(pos_emb, other.pos_emb) &&
           detail::same_shape(to_logits_norm_weight, other.to_logits_norm_weight) &&
           detail::same_shape(to_logits_norm_bias, other.to_logits_norm_bias) &&
           detail::same_shape(to_logits, other.to_logits);
  }

  /// See for_each_parameter().
  template <typename Self, typename Visitor>
  static void visit_each(Self& p, Visitor&& visit) {
    visit(std::string("token_emb.weight"), p.token_emb);
    visit(std::string("pos_emb.weight"), p.pos_emb);
    EncoderParameters<Scalar>::visit_each(p, visit);
    visit(std::string("to_logits.0.weight"), p.to_logits_norm_weight);
    visit(std::string("to_logits.0.bias"), p.to_logits_norm_bias);
    visit(std::string("to_logits.1.weight"), p.to_logits);
  }

 private:
  // `visit(tensor, rows, cols)` for each tensor that is no layer's with its shape.
  template <typename Self, typename Visitor>
  static void visit_shapes(Self& p, const LocalTransformerConfig& config, Visitor&& visit) {
    visit(p.token_emb, config.num_tokens, config.dim);
    visit(p.pos_emb, config.max_seq_len, config.dim);
    visit(p.to_logits_norm_weight, config.dim, 1);
    visit(p.to_logits_norm_bias, config.dim, 1);
    visit(p.to_logits, config.num_tokens, config.dim);
  }
};

namespace detail {

// Adds the numbers of a set of the same shapes, which become 0. Allocates nothing.
template <typename Scalar>
void add_and_clear(EncoderParameters<Scalar>& to, EncoderParameters<Scalar>& from) {
  for (std::size_t i = 0; i < to.layers.size(); ++i) {
    auto& layer = to.layers[i];
    auto& other = from.layers[i];
    add_and_clear(layer.attention, other.attention);
    add_and_clear(layer.feed_forward, other.feed_forward);
    if (layer.attention_connection)
      add_and_clear(*layer.attention_connection, *other.attention_connection);
    if (layer.feed_forward_connection)
      add_and_clear(*layer.feed_forward_connection, *other.feed_forward_connection);
  }
  if (to.dynamic_pos_bias) add_and_clear(*to.dynamic_pos_bias, *from.dynamic_pos_bias);
}
template <typename Scalar>
void add_and_clear(LocalTransformerParameters<Scalar>& to,
                   LocalTransformerParameters<Scalar>& from) {
  add_and_clear(static_cast<EncoderParameters<Scalar>&>(to),
                static_cast<EncoderParameters<Scalar>&>(from));
  add_and_clear(to.token_emb, from.token_emb);
  add_and_clear(to.pos_emb, from.pos_emb);
  add_and_clear(to.to_logits_norm_weight, from.to_logits_norm_weight);
  add_and_clear(to.to_logits_norm_bias, from.to_logits_norm_bias);
  add_and_clear(to.to_logits, from.to_logits);
}

}  // namespace detail

}  // namespace local_mha::inline LOCAL_MHA_ABI
