// SPDX-License-Identifier: MIT
/// \file
/// Drawing tokens from logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/random.hpp>
#include <local_mha/core/types.hpp>

namespace local_mha::inline LOCAL_MHA_ABI {

/// Which tokens may be drawn, and how likely.
struct SamplingConfig {
  /// What the logits are divided by; 0: always the most likely token.
  double temperature = 1;
  /// Only the most likely `top_k` tokens; 0: all.
  Index top_k = 0;
  /// Only the most likely tokens whose probabilities, of those that top_k leaves, first sum up to
  /// at least `top_p`. A. Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
  double top_p = 1;
};

/// Refuses a configuration that is out of range.
/// \throws std::invalid_argument naming the member that is out of range
inline void validate(const SamplingConfig& config) {
  if (!(config.temperature >= 0) || !std::isfinite(config.temperature))
    reject("temperature", "a finite number of at least 0", config.temperature);
  if (config.top_k < 0) reject("top_k", "at least 0", config.top_k);
  if (!(config.top_p > 0 && config.top_p <= 1))
    reject("top_p", "above 0 and at most 1", config.top_p);
}

/// Draws tokens from softmax(logits / temperature).
class Sampler {
 public:
  /// Draws as the configuration says.
  /// \throws std::invalid_argument naming the member that is out of range
  explicit Sampler(const SamplingConfig& config) : config_(config) { validate(config); }

  /// Draws a token.
  /// \param logits of `num_tokens >= 1` tokens
  /// \throws std::invalid_argument if there are none; std::runtime_error if they are not finite
  template <typename Scalar>
  Index operator()(const Scalar* logits, Index num_tokens, RandomSequence& random) {
    if (num_tokens < 1) reject("num_tokens", "at least 1", num_tokens);
    if (logits == nullptr) reject("logits", "those of the tokens", "null");
    logits_.resize(static_cast<std::size_t>(num_tokens));
    for (std::size_t i = 0; i < logits_.size(); ++i) {
      logits_[i] = static_cast<double>(logits[i]);
      if (!std::isfinite(logits_[i])) throw std::runtime_error("logits: not finite");
    }
    order_.resize(logits_.size());
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    std::size_t kept = order_.size();
    if (config_.top_k > 0) kept = (std::min)(kept, static_cast<std::size_t>(config_.top_k));
    if (config_.temperature == 0) kept = 1;
    // Of equally likely tokens, the smaller comes first.
    std::partial_sort(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(kept),
                      order_.end(), [&](std::size_t a, std::size_t b) {
                        return logits_[a] != logits_[b] ? logits_[a] > logits_[b] : a < b;
                      });
    if (kept == 1) return static_cast<Index>(order_[0]);
    cumulative_.clear();
    double sum = 0;  // also of logits in float: a vocabulary is long
    for (std::size_t i = 0; i < kept; ++i) {
      sum += std::exp((logits_[order_[i]] - logits_[order_[0]]) / config_.temperature);
      cumulative_.push_back(sum);
    }
    if (config_.top_p < 1) {
      const auto enough =
          std::lower_bound(cumulative_.begin(), cumulative_.end(), config_.top_p * sum);
      if (enough != cumulative_.end()) cumulative_.erase(enough + 1, cumulative_.end());
    }
    const double drawn = random.uniform() * cumulative_.back();
    const auto found = std::upper_bound(cumulative_.begin(), cumulative_.end(), drawn);
    const auto place = static_cast<std::size_t>(found - cumulative_.begin());
    return static_cast<Index>(order_[(std::min)(place, cumulative_.size() - 1)]);
  }

 private:
  SamplingConfig config_;
  std::vector<double> logits_;
  std::vector<std::size_t> order_;
  std::vector<double> cumulative_;
};

}  // namespace local_mha::inline LOCAL_MHA_ABI
