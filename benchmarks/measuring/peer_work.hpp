// SPDX-License-Identifier: MIT
/// \file
/// The attention and the layer by others than the library: what it is measured against.
#pragma once

#include "case.hpp"
#include "naive.hpp"
#include "tiled.hpp"
#include "work.hpp"

namespace measuring::detail {

template <typename Scalar>
class NaiveAttentionWork final : public AttentionWork<Scalar> {
 public:
  using AttentionWork<Scalar>::AttentionWork;

  void run() override {
    const Case& c = this->of();
    for (Index at = 0; at < this->q_.size(); at += c.seqlen * c.dim_head)
      naive_attention(c, this->q_.data() + at, this->k_.data() + at, this->v_.data() + at,
                      this->out_.data() + at);
  }
};

template <typename Scalar>
class TiledAttentionWork final : public AttentionWork<Scalar> {
 public:
  explicit TiledAttentionWork(const Case& c) : AttentionWork<Scalar>(c), attention_(c) {}

  void run() override {
    const Case& c = this->of();
    const auto scale = static_cast<Scalar>(1 / std::sqrt(static_cast<double>(c.dim_head)));
    for (Index at = 0; at < this->q_.size(); at += c.seqlen * c.dim_head) {
      const auto head = [&](const local_mha::Tensor<Scalar, 4>& all) {
        return Rows<Scalar>(all.data() + at, c.seqlen, c.dim_head);
      };
      attention_(head(this->q_), head(this->k_), head(this->v_), 0, 0, scale,
                 Eigen::Map<RowsOf<Scalar>>(this->out_.data() + at, c.seqlen, c.dim_head));
    }
  }

 private:
  TiledAttention<Scalar> attention_;
};

template <typename Scalar>
class TiledLayerWork final : public LayerWork<Scalar> {
 public:
  explicit TiledLayerWork(const Case& c)
      : LayerWork<Scalar>(c),
        layer_(c, this->parameters_.to_qkv, this->parameters_.to_out, this->parameters_.q_scale,
               this->parameters_.k_scale),
        y_(c.batch, c.seqlen, c.dim) {
    y_.setZero();
  }

  void run() override {
    const Case& c = this->of();
    for (Index b = 0; b < c.batch; ++b)
      layer_(this->sequence(this->x_, b),
             Eigen::Map<RowsOf<Scalar>>(&y_(b, 0, 0), c.seqlen, c.dim));
  }

  double max_error() const override { return this->error_of(y_); }

 private:
  TiledLayer<Scalar> layer_;
  local_mha::Tensor<Scalar, 3> y_;
};

}  // namespace measuring::detail
