// SPDX-License-Identifier: MIT
/// \file
/// Local (sliding-window) multi-head attention over Eigen: the entry header.
///
/// Brings LocalMHA, LocalAttention, Encoder, LocalTransformer and their components; needs Eigen
/// alone. Files are read and written by the headers under `io/`, which nothing here includes.
#pragma once

#include <local_mha/attention/local_attention.hpp>
#include <local_mha/component_config.hpp>
#include <local_mha/component_parameters.hpp>
#include <local_mha/config.hpp>
#include <local_mha/core/mask.hpp>
#include <local_mha/core/types.hpp>
#include <local_mha/core/window.hpp>
#include <local_mha/encoder.hpp>
#include <local_mha/encoder_config.hpp>
#include <local_mha/mha.hpp>
#include <local_mha/ops/cross_entropy.hpp>
#include <local_mha/ops/dynamic_position_bias.hpp>
#include <local_mha/ops/embedding.hpp>
#include <local_mha/ops/feed_forward.hpp>
#include <local_mha/ops/layer_norm.hpp>
#include <local_mha/ops/linear.hpp>
#include <local_mha/ops/prenorm.hpp>
#include <local_mha/ops/qk_norm.hpp>
#include <local_mha/ops/residual_streams.hpp>
#include <local_mha/ops/rms_norm.hpp>
#include <local_mha/ops/rotary.hpp>
#include <local_mha/ops/sampling.hpp>
#include <local_mha/parameter_set.hpp>
#include <local_mha/parameters.hpp>
#include <local_mha/streaming/encoder_stream.hpp>
#include <local_mha/streaming/local_attention_stream.hpp>
#include <local_mha/streaming/mha_stream.hpp>
#include <local_mha/streaming/transformer_stream.hpp>
#include <local_mha/training/adamw.hpp>
#include <local_mha/training/clip_gradients.hpp>
#include <local_mha/training/cosine_schedule.hpp>
#include <local_mha/transformer.hpp>
#include <local_mha/version.hpp>
