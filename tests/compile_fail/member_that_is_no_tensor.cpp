// SPDX-License-Identifier: MIT
// A set of weights has tensors and sets.
#include <vector>

#include <local_mha/local_mha.hpp>

struct Weights {
#ifdef CORRECTED
  local_mha::Vector<float> bias;
#else
  std::vector<float> bias;
#endif
  static void visit_each(auto& set, auto&& visit) { visit("bias", set.bias); }
};

double norm(const Weights& weights) { return local_mha::global_norm(weights); }
